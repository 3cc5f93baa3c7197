//! CliService2 and its forerunner CliService: who leads a copyset, and changes of its members and leader.
//!
//! Errors are RPC errors, as braft's: ENOENT for a copyset or a replica that is not here, EINVAL for a peer that does
//! not parse, EPERM from a replica that does not lead, EBUSY while another change runs, ECATCHUP when a new member did
//! not catch up, EAGAIN for GetLeader without a leader. ResetPeer makes the replica it is sent to the only voter, whoever
//! leads: EPERM from one that is out of service, EINVAL for any other list.

use super::table::Cli as Method;
use super::{Context, Handled, Pending, Step, Ticket, with};
use crate::io::Instant;
use crate::shard::request::{AdminOp, MemberOp, Outcome, Reply, ReplyData, RequestOp};
use bytes::Bytes;
use copyset::PeerId;
use proto::chunkserver as wire;
use proto::code::{self, errno};
use proto::common::Peer;
use raftlog::CopysetId;

/// braft's: a new member did not catch up.
const ECATCHUP: i32 = 10003;

/// A call that waits for its shard.
#[derive(Debug)]
pub(super) struct Waiting {
    ticket: Ticket,
    copyset: CopysetId,
    want: Want,
}

/// The form of the answer.
#[derive(Clone, Copy, Debug)]
enum Want {
    Leader { v1: bool, term: bool },
    Add { v1: bool },
    Remove { v1: bool },
    Change,
    Transfer { v1: bool },
    Reset,
    Snapshot,
    SnapshotAll,
}

pub(super) fn dispatch(ctx: &Context, now: Instant, ticket: Ticket, method: Method, body: Bytes) -> Handled {
    macro_rules! serve {
        ($request:ty, $m:ident => $call:expr) => {
            with(ctx, now, ticket, body, |ticket, $m: $request| {
                let call: Call = $call;
                ask(ctx, now, ticket, CopysetId::new($m.logic_pool_id, $m.copyset_id), call)
            })
        };
    }
    // A request that does not parse is EREQUEST, whatever it asks for.
    macro_rules! refuse {
        ($request:ty, $code:expr) => {
            with(ctx, now, ticket, body, |ticket, _: $request| {
                let text = format!("{method:?} is not supported by this server");
                ticket.fail(ctx, now, $code, &text)
            })
        };
    }
    let (v1, v2) = (true, false);
    match method {
        Method::GetLeader => serve!(wire::GetLeaderRequest2, m => Call::leader(v2, m.want_term())),
        Method::GetLeaderV1 => serve!(wire::GetLeaderRequest, m => Call::leader(v1, false)),
        Method::AddPeer => {
            serve!(wire::AddPeerRequest2, m => Call::one(m.leader.address(), m.add_peer.address(), Want::Add { v1: v2 }, MemberOp::Add))
        }
        Method::AddPeerV1 => {
            serve!(wire::AddPeerRequest, m => Call::one(&m.leader_id, &m.peer_id, Want::Add { v1 }, MemberOp::Add))
        }
        Method::RemovePeer => {
            serve!(wire::RemovePeerRequest2, m => Call::one(m.leader.address(), m.remove_peer.address(), Want::Remove { v1: v2 }, MemberOp::Remove))
        }
        Method::RemovePeerV1 => {
            serve!(wire::RemovePeerRequest, m => Call::one(&m.leader_id, &m.peer_id, Want::Remove { v1 }, MemberOp::Remove))
        }
        Method::ChangePeers => {
            serve!(wire::ChangePeersRequest2, m => Call::set(m.leader.address(), m.new_peers.iter().map(Peer::address)))
        }
        Method::TransferLeader => {
            serve!(wire::TransferLeaderRequest2, m => Call::transfer(m.leader.address(), m.transferee.address(), v2))
        }
        Method::TransferLeaderV1 => {
            serve!(wire::TransferLeaderRequest, m => Call::transfer(&m.leader_id, m.peer_id(), v1))
        }
        Method::Snapshot => serve!(wire::SnapshotRequest2, m => {
            let at = m.peer.as_ref().map(|peer| parse(peer.address()));
            Call { at: at.unwrap_or(Some(ctx.info().peer)), op: Some(AdminOp::Checkpoint), want: Want::Snapshot }
        }),
        Method::SnapshotAll => with(ctx, now, ticket, body, |ticket, _: wire::SnapshotAllRequest| {
            let waiting = Waiting { ticket, copyset: CopysetId(0), want: Want::SnapshotAll };
            Handled::AllShards { op: AdminOp::CheckpointAll, pending: Pending(Step::Cli(waiting)) }
        }),
        Method::ResetPeer => {
            serve!(wire::ResetPeerRequest2, m => Call::reset(m.request_peer.address(), m.new_peers.iter().map(Peer::address)))
        }
        // As the original, which never had them.
        Method::ChangePeersV1 => refuse!(wire::ChangePeersRequest, code::ENOMETHOD),
        Method::ResetPeerV1 => refuse!(wire::ResetPeerRequest, code::ENOMETHOD),
        Method::SnapshotV1 => refuse!(wire::SnapshotRequest, code::ENOMETHOD),
    }
}

/// What a request asks for.
struct Call {
    /// The replica it is for; `None`: its name does not parse.
    at: Option<PeerId>,
    /// `None`: a peer in it does not parse.
    op: Option<AdminOp>,
    want: Want,
}

impl Call {
    fn leader(v1: bool, term: bool) -> Self {
        Self { at: Some(PeerId::NONE), op: Some(AdminOp::CopysetStatus), want: Want::Leader { v1, term } }
    }

    fn one(at: &str, peer: &str, want: Want, op: impl FnOnce(u64) -> MemberOp) -> Self {
        let op = parse(peer).filter(|peer| !peer.is_none()).map(|peer| AdminOp::Members(op(peer.0)));
        Self { at: parse(at), op, want }
    }

    fn set<'a>(at: &str, peers: impl Iterator<Item = &'a str>) -> Self {
        let op = parse_all(peers).map(|peers| AdminOp::Members(MemberOp::Set(peers)));
        Self { at: parse(at), op, want: Want::Change }
    }

    fn reset<'a>(at: &str, peers: impl Iterator<Item = &'a str>) -> Self {
        let op = parse_all(peers).map(|peers| AdminOp::Members(MemberOp::Reset(peers)));
        Self { at: parse(at), op, want: Want::Reset }
    }

    /// No peer, or nobody: whoever is furthest.
    fn transfer(at: &str, to: &str, v1: bool) -> Self {
        let to = if to.is_empty() { Some(PeerId::NONE) } else { parse(to) };
        let op = to.map(|to| AdminOp::Members(MemberOp::Transfer(to.0)));
        Self { at: parse(at), op, want: Want::Transfer { v1 } }
    }
}

fn parse(text: &str) -> Option<PeerId> {
    text.parse().ok()
}

/// `None` if one does not parse, or is nobody.
fn parse_all<'a>(mut peers: impl Iterator<Item = &'a str>) -> Option<Vec<u64>> {
    peers.try_fold(Vec::new(), |mut all, peer| {
        all.push(parse(peer).filter(|peer| !peer.is_none())?.0);
        Some(all)
    })
}

fn ask(ctx: &Context, now: Instant, ticket: Ticket, copyset: CopysetId, call: Call) -> Handled {
    let Call { at: Some(at), op: Some(op), want } = call else {
        return ticket.fail(ctx, now, errno::EINVAL, "Fail to parse peer id, ip:port:index expected");
    };
    if !matches!(want, Want::Leader { .. }) && at != ctx.info().peer {
        return ticket.fail(ctx, now, errno::ENOENT, &format!("Fail to find node {at} in group {}", copyset.0));
    }
    let pending = Pending(Step::Cli(Waiting { ticket, copyset, want }));
    Handled::Shard { copyset, op: RequestOp::Admin(op), charge: 0, pending }
}

/// The RPC error of an outcome; `None`: none.
fn failure(copyset: CopysetId, want: Want, reply: &Reply) -> Option<(i32, String)> {
    Some(match reply.outcome {
        Outcome::Success => return None,
        Outcome::NotLeader | Outcome::CrcFail if matches!(want, Want::Reset) => {
            (errno::EPERM, "The node is not in an active state".into())
        }
        Outcome::Invalid if matches!(want, Want::Reset) => {
            (errno::EINVAL, "Only the replica itself can be forced as a member: reset one, add the others anew".into())
        }
        Outcome::NoCopyset => (errno::ENOENT, format!("No nodes in group {}", copyset.0)),
        Outcome::NotLeader => (errno::EPERM, "Not a leader".into()),
        Outcome::Busy => (errno::EBUSY, "Doing another configuration change".into()),
        Outcome::Invalid => (errno::EINVAL, "Invalid peers".into()),
        Outcome::CatchUp => (ECATCHUP, "A new member does not catch up".into()),
        outcome => (errno::EIO, format!("Not done: {outcome:?}")),
    })
}

pub(super) fn resume(ctx: &Context, now: Instant, waiting: Waiting, reply: &Reply) -> Handled {
    let Waiting { ticket, copyset, want } = waiting;
    if reply.outcome == Outcome::Stopping {
        return ticket.log_off(ctx, now);
    }
    if let Want::Leader { v1, term } = want {
        return leader(ctx, now, ticket, copyset, (v1, term), reply);
    }
    if let Some((code, text)) = failure(copyset, want, reply) {
        return ticket.fail(ctx, now, code, &text);
    }
    let (old, new) = match &reply.data {
        ReplyData::Members { old, new } => (names(old), names(new)),
        _ => Default::default(),
    };
    let peers = |names: Vec<String>| -> Vec<Peer> { names.into_iter().map(peer).collect() };
    match want {
        Want::Add { v1: true } => ticket.reply(ctx, now, &wire::AddPeerResponse { old_peers: old, new_peers: new }),
        Want::Add { v1: false } => {
            let (old_peers, new_peers) = (peers(old), peers(new));
            ticket.reply(ctx, now, &wire::AddPeerResponse2 { old_peers, new_peers })
        }
        Want::Remove { v1: true } => {
            ticket.reply(ctx, now, &wire::RemovePeerResponse { old_peers: old, new_peers: new })
        }
        Want::Remove { v1: false } => {
            let (old_peers, new_peers) = (peers(old), peers(new));
            ticket.reply(ctx, now, &wire::RemovePeerResponse2 { old_peers, new_peers })
        }
        Want::Change => {
            let (old_peers, new_peers) = (peers(old), peers(new));
            ticket.reply(ctx, now, &wire::ChangePeersResponse2 { old_peers, new_peers })
        }
        Want::Transfer { v1: true } => ticket.reply(ctx, now, &wire::TransferLeaderResponse {}),
        Want::Transfer { v1: false } => ticket.reply(ctx, now, &wire::TransferLeaderResponse2 {}),
        Want::Reset => ticket.reply(ctx, now, &wire::ResetPeerResponse2 {}),
        Want::Snapshot | Want::Leader { .. } => ticket.reply(ctx, now, &wire::SnapshotResponse2 {}),
        Want::SnapshotAll => ticket.reply(ctx, now, &wire::SnapshotAllResponse {}),
    }
}

/// All shards have made their copysets' state durable, or not.
pub(super) fn resume_all(ctx: &Context, now: Instant, waiting: Waiting, replies: &[Reply]) -> Handled {
    let failed = replies.iter().find(|reply| reply.outcome != Outcome::Success);
    match failed.or(replies.first()) {
        Some(reply) => resume(ctx, now, waiting, reply),
        None => waiting.ticket.fail(ctx, now, errno::EIO, "No shard answers"),
    }
}

/// `form`: CliService's, and with the term.
fn leader(
    ctx: &Context,
    now: Instant,
    ticket: Ticket,
    copyset: CopysetId,
    form: (bool, bool),
    reply: &Reply,
) -> Handled {
    let found = match (reply.outcome, &reply.data) {
        (Outcome::Success, ReplyData::Copysets(list)) => list.first().map(|found| (PeerId(found.leader), found.term)),
        _ => None,
    };
    let Some((leader, term)) = found else {
        return ticket.fail(ctx, now, errno::ENOENT, &format!("No nodes in group {}", copyset.0));
    };
    if leader.is_none() {
        return ticket.fail(ctx, now, errno::EAGAIN, "Unknown leader");
    }
    let name = leader.to_string();
    match form {
        (true, _) => ticket.reply(ctx, now, &wire::GetLeaderResponse { leader_id: name }),
        (false, wanted) => {
            let term = wanted.then_some(term);
            ticket.reply(ctx, now, &wire::GetLeaderResponse2 { leader: peer(name), term })
        }
    }
}

fn names(peers: &[u64]) -> Vec<String> {
    peers.iter().map(|&peer| PeerId(peer).to_string()).collect()
}

fn peer(address: String) -> Peer {
    Peer { id: None, address: Some(address) }
}
