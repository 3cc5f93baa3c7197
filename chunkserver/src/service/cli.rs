//! CliService2 and its forerunner CliService.
//!
//! GetLeader is served: ENOENT for an unknown copyset, EAGAIN ("Unknown leader") for one without leader, both as RPC
//! errors. Everything that changes membership is answered with EOPNOTSUPP (95) and a text that says so: the request was
//! understood, the operation does not exist here yet; it is none of the codes brpc retries on, and EPERM or EBUSY would
//! tell an operator to try another node or later.

use super::table::Cli as Method;
use super::{Context, Handled, Pending, Step, Ticket, with};
use crate::io::Instant;
use crate::shard::request::{AdminOp, Outcome, Reply, ReplyData, RequestOp};
use bytes::Bytes;
use copyset::PeerId;
use proto::chunkserver as wire;
use proto::code::errno;
use proto::common::Peer;
use raftlog::CopysetId;

/// Operation not supported.
const EOPNOTSUPP: i32 = 95;

/// A GetLeader that waits for its shard.
#[derive(Debug)]
pub(super) struct Waiting {
    ticket: Ticket,
    copyset: CopysetId,
    /// Asked through CliService.
    v1: bool,
}

pub(super) fn dispatch(ctx: &Context, now: Instant, ticket: Ticket, method: Method, body: Bytes) -> Handled {
    let leader = |ticket, pool, copyset, v1| {
        let copyset = CopysetId::new(pool, copyset);
        let pending = Pending(Step::Cli(Waiting { ticket, copyset, v1 }));
        Handled::Shard { copyset, op: RequestOp::Admin(AdminOp::CopysetStatus), charge: 0, pending }
    };
    // A request that does not parse is EREQUEST, whatever it asks for.
    macro_rules! refuse {
        ($request:ty) => {
            with(ctx, now, ticket, body, |ticket, _: $request| {
                let text = format!("{method:?} is not supported by this server");
                ticket.fail(ctx, now, EOPNOTSUPP, &text)
            })
        };
    }
    match method {
        Method::GetLeader => with(ctx, now, ticket, body, |t, m: wire::GetLeaderRequest2| {
            leader(t, m.logic_pool_id, m.copyset_id, false)
        }),
        Method::GetLeaderV1 => {
            with(ctx, now, ticket, body, |t, m: wire::GetLeaderRequest| leader(t, m.logic_pool_id, m.copyset_id, true))
        }
        Method::AddPeer => refuse!(wire::AddPeerRequest2),
        Method::RemovePeer => refuse!(wire::RemovePeerRequest2),
        Method::ChangePeers => refuse!(wire::ChangePeersRequest2),
        Method::TransferLeader => refuse!(wire::TransferLeaderRequest2),
        Method::ResetPeer => refuse!(wire::ResetPeerRequest2),
        Method::Snapshot => refuse!(wire::SnapshotRequest2),
        Method::SnapshotAll => refuse!(wire::SnapshotAllRequest),
        Method::AddPeerV1 => refuse!(wire::AddPeerRequest),
        Method::RemovePeerV1 => refuse!(wire::RemovePeerRequest),
        Method::ChangePeersV1 => refuse!(wire::ChangePeersRequest),
        Method::TransferLeaderV1 => refuse!(wire::TransferLeaderRequest),
        Method::ResetPeerV1 => refuse!(wire::ResetPeerRequest),
        Method::SnapshotV1 => refuse!(wire::SnapshotRequest),
    }
}

pub(super) fn resume(ctx: &Context, now: Instant, waiting: Waiting, reply: &Reply) -> Handled {
    let Waiting { ticket, copyset, v1 } = waiting;
    let leader = match (reply.outcome, &reply.data) {
        (Outcome::Stopping, _) => return ticket.log_off(ctx, now),
        (Outcome::Success, ReplyData::Copysets(list)) => list.first().map(|found| PeerId(found.leader)),
        _ => None,
    };
    match leader {
        None => ticket.fail(ctx, now, errno::ENOENT, &format!("No nodes in group {}", copyset.0)),
        Some(leader) if leader.is_none() => ticket.fail(ctx, now, errno::EAGAIN, "Unknown leader"),
        Some(leader) if v1 => ticket.reply(ctx, now, &wire::GetLeaderResponse { leader_id: leader.to_string() }),
        Some(leader) => {
            let leader = Peer { id: None, address: Some(leader.to_string()) };
            ticket.reply(ctx, now, &wire::GetLeaderResponse2 { leader })
        }
    }
}
