//! CopysetService, ChunkServerService.ChunkServerStatus and ScanService.FollowScanMap. The only place that chooses a
//! COPYSET_OP_STATUS.
//!
//! Differences from the original, on purpose: CreateCopysetNode2 refuses (FAILURE_UNKNOWN) an entry with an address that
//! does not parse, where the original goes on with an empty peer; GetCopysetStatus with `queryHash` answers without a
//! hash (the original's covers its own file headers, so no other implementation can produce it).

use super::table::Copyset as Method;
use super::{Context, Handled, Pending, Step, Ticket, with};
use crate::io::Instant;
use crate::shard::request::{AdminOp, CopysetStatus, Outcome, Reply, ReplyData, RequestOp};
use bytes::Bytes;
use copyset::PeerId;
use proto::chunkserver::{
    ChunkOpStatus, ChunkServerStatusRequest, ChunkServerStatusResponse, Copyset, CopysetOpStatus as Status,
    CopysetRequest, CopysetRequest2, CopysetResponse, CopysetResponse2, CopysetStatusRequest, CopysetStatusResponse,
    FollowScanMapRequest, FollowScanMapResponse,
};
use proto::code::errno;
use proto::common::Peer;
use raftlog::CopysetId;

/// braft's state of a replica that is out of service.
const STATE_ERROR: u32 = 5;

/// A call that waits for its shard.
#[derive(Debug)]
pub(super) struct Waiting {
    ticket: Ticket,
    want: Want,
}

#[derive(Debug)]
enum Want {
    Create,
    /// Entries still to be created.
    CreateMany(std::vec::IntoIter<Copyset>),
    /// Looks whether it is broken, then deletes it.
    DeleteBroken(CopysetId),
    Delete,
    Status {
        ours: bool,
    },
}

pub(super) fn dispatch(ctx: &Context, now: Instant, ticket: Ticket, method: Method, body: Bytes) -> Handled {
    match method {
        Method::Create => with(ctx, now, ticket, body, |t, m| create(ctx, now, t, &m)),
        Method::CreateMany => with(ctx, now, ticket, body, |t, m| create_many(ctx, now, t, m)),
        Method::DeleteBroken => with(ctx, now, ticket, body, |t, m: CopysetRequest| {
            let copyset = CopysetId::new(m.logic_pool_id, m.copyset_id);
            ask(t, Want::DeleteBroken(copyset), copyset, AdminOp::CopysetStatus)
        }),
        Method::Delete => with(ctx, now, ticket, body, |t, m: CopysetRequest| {
            ask(t, Want::Delete, CopysetId::new(m.logic_pool_id, m.copyset_id), AdminOp::DeleteCopyset)
        }),
        Method::Status => with(ctx, now, ticket, body, |t, m: CopysetStatusRequest| {
            let want = Want::Status { ours: m.want_members() };
            ask(t, want, CopysetId::new(m.logic_pool_id, m.copyset_id), AdminOp::CopysetStatus)
        }),
        Method::ServerStatus => with(ctx, now, ticket, body, |t, _: ChunkServerStatusRequest| {
            t.reply(ctx, now, &ChunkServerStatusResponse { copyset_load_fin: ctx.is_loaded() })
        }),
        Method::FollowScanMap => with(ctx, now, ticket, body, |t, _: FollowScanMapRequest| {
            // No scan runs here, so no job waits for this map.
            let ret_code = ChunkOpStatus::InvalidRequest.into();
            t.reply(ctx, now, &FollowScanMapResponse { ret_code })
        }),
    }
}

fn ask(ticket: Ticket, want: Want, copyset: CopysetId, op: AdminOp) -> Handled {
    let pending = Pending(Step::Copyset(Waiting { ticket, want }));
    Handled::Shard { copyset, op: RequestOp::Admin(op), charge: 0, pending }
}

fn answer_one(ctx: &Context, now: Instant, ticket: Ticket, status: Status) -> Handled {
    ticket.reply(ctx, now, &CopysetResponse { status: Some(status.into()), redirect: None })
}

fn answer_many(ctx: &Context, now: Instant, ticket: Ticket, status: Status) -> Handled {
    ticket.reply(ctx, now, &CopysetResponse2 { status: Some(status.into()) })
}

fn create(ctx: &Context, now: Instant, ticket: Ticket, request: &CopysetRequest) -> Handled {
    let Some(peers) = parse(request.peerid.iter().map(String::as_str)) else {
        return ticket.fail(ctx, now, errno::EINVAL, "Fail to parse peer id, ip:port:index expected");
    };
    if !ctx.is_loaded() {
        return answer_one(ctx, now, ticket, Status::FailureUnknown);
    }
    let copyset = CopysetId::new(request.logic_pool_id, request.copyset_id);
    ask(ticket, Want::Create, copyset, AdminOp::CreateCopyset { peers })
}

fn create_many(ctx: &Context, now: Instant, ticket: Ticket, request: CopysetRequest2) -> Handled {
    if !ctx.is_loaded() {
        return answer_many(ctx, now, ticket, Status::FailureUnknown);
    }
    create_next(ctx, now, ticket, request.copysets.into_iter())
}

/// Entries are created in order; those before a failing one stay.
fn create_next(ctx: &Context, now: Instant, ticket: Ticket, mut rest: std::vec::IntoIter<Copyset>) -> Handled {
    let Some(entry) = rest.next() else {
        return answer_many(ctx, now, ticket, Status::Success);
    };
    match parse(entry.peers.iter().map(|peer| peer.address())) {
        Some(peers) => {
            let copyset = CopysetId::new(entry.logic_pool_id, entry.copyset_id);
            ask(ticket, Want::CreateMany(rest), copyset, AdminOp::CreateCopyset { peers })
        }
        None => answer_many(ctx, now, ticket, Status::FailureUnknown),
    }
}

fn parse<'a>(peers: impl Iterator<Item = &'a str>) -> Option<Vec<u64>> {
    peers.map(|text| text.parse::<PeerId>().ok().filter(|peer| !peer.is_none()).map(|peer| peer.0)).collect()
}

fn created(outcome: Outcome) -> Status {
    match outcome {
        Outcome::Success => Status::Success,
        Outcome::Exists => Status::Exist,
        _ => Status::FailureUnknown,
    }
}

pub(super) fn resume(ctx: &Context, now: Instant, waiting: Waiting, reply: Reply) -> Handled {
    let Waiting { ticket, want } = waiting;
    if reply.outcome == Outcome::Stopping {
        return ticket.log_off(ctx, now);
    }
    match want {
        Want::Create => answer_one(ctx, now, ticket, created(reply.outcome)),
        Want::CreateMany(rest) => match created(reply.outcome) {
            Status::Success => create_next(ctx, now, ticket, rest),
            status => answer_many(ctx, now, ticket, status),
        },
        Want::DeleteBroken(copyset) => match (reply.outcome, &reply.data) {
            (Outcome::Success, ReplyData::Copysets(list)) if list.iter().any(|c| c.state == STATE_ERROR) => {
                ask(ticket, Want::Delete, copyset, AdminOp::DeleteCopyset)
            }
            (Outcome::Success, _) => answer_one(ctx, now, ticket, Status::CopysetIsHealthy),
            _ => answer_one(ctx, now, ticket, Status::FailureUnknown),
        },
        Want::Delete => {
            let status = match reply.outcome {
                Outcome::Success => Status::Success,
                Outcome::NoCopyset => Status::CopysetNotexist,
                _ => Status::FailureUnknown,
            };
            answer_one(ctx, now, ticket, status)
        }
        Want::Status { ours } => ticket.reply(ctx, now, &status_response(reply, ours)),
    }
}

fn status_response(reply: Reply, ours: bool) -> CopysetStatusResponse {
    let only = |status: Status| CopysetStatusResponse { status: status.into(), ..CopysetStatusResponse::default() };
    match (reply.outcome, reply.data) {
        (Outcome::Success, ReplyData::Copysets(list)) => match list.first() {
            Some(copyset) => full(copyset, ours),
            None => only(Status::FailureUnknown),
        },
        (Outcome::NoCopyset, _) => only(Status::CopysetNotexist),
        _ => only(Status::FailureUnknown),
    }
}

fn full(copyset: &CopysetStatus, ours: bool) -> CopysetStatusResponse {
    let peer = |id: u64| Some(Peer { id: None, address: Some(PeerId(id).to_string()) });
    let index = |value: u64| Some(i64::try_from(value).unwrap_or(i64::MAX));
    CopysetStatusResponse {
        status: Status::Success.into(),
        state: Some(copyset.state),
        peer: peer(copyset.peer),
        leader: peer(copyset.leader),
        read_only: Some(false),
        term: index(copyset.term),
        committed_index: index(copyset.committed),
        known_applied_index: index(copyset.applied),
        pending_index: Some(0),
        pending_queue_size: Some(0),
        applying_index: Some(0),
        first_index: index(copyset.first),
        last_index: index(copyset.last),
        disk_index: index(copyset.durable),
        epoch: Some(copyset.epoch),
        hash: None,
        members: copyset.peers.iter().filter(|_| ours).filter_map(|&id| peer(id)).collect(),
        chunks: ours.then_some(copyset.chunks),
    }
}
