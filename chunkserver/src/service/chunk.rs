//! ChunkService and the private ZeroService. The only place that turns an [`Outcome`] into a CHUNK_OP_STATUS.
//!
//! Order of checks (wire-chunkserver §3.1): overload → fence → parameters → copyset → leader; the last two are the
//! shard's. What a payload must be is checked here: an attachment that is not exactly `size` bytes is INVALID_REQUEST,
//! nothing is proposed. `opType` of a request is not looked at: the method decides.
//!
//! Not served yet: chunk snapshots, clones. Those methods check their parameters, copyset and leader as the original and
//! then answer FAILURE_UNKNOWN; nothing is changed.

use super::fence::Update;
use super::table::Chunk as Method;
use super::{Context, Handled, Parts, Pending, Step, Ticket, with};
use crate::io::Instant;
use crate::limits::BLOCK;
use crate::metrics::{Counter, OpKind};
use crate::rpc::{Attachment, Call};
use crate::shard::request::{AdminOp, ChunkOp, Guard, Outcome, Reply, ReplyData, RequestOp};
use bytes::Bytes;
use copyset::PeerId;
use proto::chunkserver::{
    ChunkOpStatus as Status, ChunkRequest, ChunkResponse, CreateS3CloneChunkRequest, CreateS3CloneChunkResponse,
    GetChunkHashRequest, GetChunkHashResponse, GetChunkInfoRequest, GetChunkInfoResponse, UpdateEpochRequest,
    UpdateEpochResponse,
};
use raftlog::CopysetId;

/// A call that waits for its shard.
#[derive(Debug)]
pub(super) struct Waiting {
    ticket: Ticket,
    want: Want,
}

#[derive(Debug)]
enum Want {
    /// An operation that answers with a ChunkResponse.
    Op {
        kind: OpKind,
        size: u32,
    },
    Info,
    Hash,
    /// The copyset's state, to say what the original would have said before doing what we cannot.
    Unsupported,
}

/// The wire's word for how a shard ended a request; `None`: the shard is stopping.
fn status(outcome: Outcome) -> Option<Status> {
    Some(match outcome {
        Outcome::Success => Status::Success,
        Outcome::NotLeader => Status::Redirected,
        Outcome::DiskFail => Status::DiskFail,
        Outcome::CrcFail => Status::CrcFail,
        Outcome::Invalid => Status::InvalidRequest,
        Outcome::NoSpace => Status::Nospace,
        Outcome::NoCopyset => Status::CopysetNotexist,
        Outcome::NoChunk => Status::ChunkNotexist,
        Outcome::Failed | Outcome::Busy | Outcome::CatchUp => Status::FailureUnknown,
        Outcome::Overload => Status::Overload,
        Outcome::Backward => Status::Backward,
        Outcome::Exists => Status::ChunkExist,
        Outcome::Stopping => return None,
    })
}

/// Whole blocks inside the chunk. Sums that would wrap around are refused.
fn in_chunk(ctx: &Context, offset: u32, size: u32) -> bool {
    let aligned = (offset as usize).is_multiple_of(BLOCK) && (size as usize).is_multiple_of(BLOCK);
    aligned && offset.checked_add(size).is_some_and(|end| end <= ctx.info().chunk_size)
}

pub(super) fn dispatch(ctx: &Context, now: Instant, ticket: Ticket, method: Method, call: Call) -> Handled {
    let Call { body, attachment, .. } = call;
    match method {
        Method::Write => with(ctx, now, ticket, body, |t, m| write(ctx, now, t, &m, attachment)),
        Method::Read => with(ctx, now, ticket, body, |t, m| read(ctx, now, t, &m)),
        Method::Delete => with(ctx, now, ticket, body, |t, m| delete(ctx, now, t, &m)),
        Method::Zero => with(ctx, now, ticket, body, |t, m| zero(ctx, now, t, &m)),
        Method::Info => with(ctx, now, ticket, body, |t, m| info(ctx, now, t, &m)),
        Method::Hash => with(ctx, now, ticket, body, |t, m| hash(ctx, now, t, &m)),
        Method::UpdateEpoch => with(ctx, now, ticket, body, |t, m| update_epoch(ctx, now, t, &m)),
        Method::CreateS3Clone => with(ctx, now, ticket, body, |t, _: CreateS3CloneChunkRequest| {
            let status = Status::InvalidRequest.into();
            t.reply(ctx, now, &CreateS3CloneChunkResponse { status, redirect: None })
        }),
        Method::ReadSnapshot | Method::Recover => with(ctx, now, ticket, body, |t, m: ChunkRequest| {
            let valid = in_chunk(ctx, m.offset(), m.size());
            unsupported(ctx, now, t, &m, valid)
        }),
        Method::DeleteSnapshot => with(ctx, now, ticket, body, |t, m: ChunkRequest| {
            let valid = m.corrected_sn.is_some();
            unsupported(ctx, now, t, &m, valid)
        }),
        Method::CreateClone => with(ctx, now, ticket, body, |t, m: ChunkRequest| {
            let valid = m.size() == ctx.info().chunk_size;
            unsupported(ctx, now, t, &m, valid)
        }),
    }
}

fn respond(ctx: &Context, now: Instant, ticket: Ticket, status: Status) -> Handled {
    ticket.reply(ctx, now, &ChunkResponse { status: status.into(), ..ChunkResponse::default() })
}

/// Refused before any shard was asked.
fn refuse(ctx: &Context, now: Instant, ticket: Ticket, kind: OpKind, status: Status) -> Handled {
    ctx.metrics().op(kind).failed();
    respond(ctx, now, ticket, status)
}

/// Count the request among those in flight; false when there are too many.
fn enter(ctx: &Context, ticket: &mut Ticket) -> bool {
    ticket.counted = true;
    let fits = ctx.enter();
    if !fits {
        ctx.metrics().add(Counter::Overloads, 1);
    }
    fits
}

fn copyset_of(request: &ChunkRequest) -> CopysetId {
    CopysetId::new(request.logic_pool_id, request.copyset_id)
}

fn ask(request: &ChunkRequest, ticket: Ticket, kind: OpKind, size: u32, op: ChunkOp) -> Handled {
    let (chunk, reads) = (request.chunk_id, matches!(op, ChunkOp::Read { .. }));
    let op = match guard_of(request) {
        Some(guard) if !reads => RequestOp::Guarded { guard, chunk, op },
        _ => RequestOp::Chunk { chunk, op },
    };
    let pending = Pending(Step::Chunk(Waiting { ticket, want: Want::Op { kind, size } }));
    Handled::Shard { copyset: copyset_of(request), op, charge: 0, pending }
}

/// What our own clients say of changes that they may send again.
fn guard_of(request: &ChunkRequest) -> Option<Guard> {
    let (client, id) = (request.client_id?, request.request_id?);
    Some(Guard { client, id, attempt: request.attempt(), term: request.leader_term() })
}

fn fenced(ctx: &Context, request: &ChunkRequest) -> bool {
    request.epoch.is_some_and(|epoch| !ctx.fence_passes(request.file_id(), epoch))
}

fn write(ctx: &Context, now: Instant, mut ticket: Ticket, request: &ChunkRequest, attachment: Attachment) -> Handled {
    let kind = OpKind::Write;
    ctx.metrics().op(kind).arrived();
    let (offset, size) = (request.offset(), request.size());
    if !enter(ctx, &mut ticket) {
        return refuse(ctx, now, ticket, kind, Status::Overload);
    }
    if fenced(ctx, request) {
        return refuse(ctx, now, ticket, kind, Status::EpochTooOld);
    }
    if !in_chunk(ctx, offset, size) || attachment.len() != size as usize {
        return refuse(ctx, now, ticket, kind, Status::InvalidRequest);
    }
    let (payload, crcs) = match attachment {
        Attachment::Data { data, crcs } => (data, crcs),
        Attachment::None => Default::default(),
        Attachment::Dropped(_) => return refuse(ctx, now, ticket, kind, Status::InvalidRequest),
    };
    ask(request, ticket, kind, size, ChunkOp::Write { sn: request.sn(), offset, payload, crcs })
}

fn read(ctx: &Context, now: Instant, mut ticket: Ticket, request: &ChunkRequest) -> Handled {
    let kind = OpKind::Read;
    ctx.metrics().op(kind).arrived();
    let (offset, len) = (request.offset(), request.size());
    if !enter(ctx, &mut ticket) {
        return refuse(ctx, now, ticket, kind, Status::Overload);
    }
    if !in_chunk(ctx, offset, len) {
        return refuse(ctx, now, ticket, kind, Status::InvalidRequest);
    }
    ticket.cost += len as usize;
    let mut asked = ask(request, ticket, kind, len, ChunkOp::Read { offset, len });
    if let Handled::Shard { charge, .. } = &mut asked {
        *charge = len as usize;
    }
    asked
}

fn delete(ctx: &Context, now: Instant, mut ticket: Ticket, request: &ChunkRequest) -> Handled {
    let kind = OpKind::Delete;
    ctx.metrics().op(kind).arrived();
    if !enter(ctx, &mut ticket) {
        return refuse(ctx, now, ticket, kind, Status::Overload);
    }
    ask(request, ticket, kind, 0, ChunkOp::Delete { sn: request.sn() })
}

fn zero(ctx: &Context, now: Instant, mut ticket: Ticket, request: &ChunkRequest) -> Handled {
    let kind = OpKind::Zero;
    ctx.metrics().op(kind).arrived();
    let (offset, len) = (request.offset(), request.size());
    if !enter(ctx, &mut ticket) {
        return refuse(ctx, now, ticket, kind, Status::Overload);
    }
    if fenced(ctx, request) {
        return refuse(ctx, now, ticket, kind, Status::EpochTooOld);
    }
    if !in_chunk(ctx, offset, len) {
        return refuse(ctx, now, ticket, kind, Status::InvalidRequest);
    }
    ask(request, ticket, kind, len, ChunkOp::Zero { offset, len })
}

fn info(ctx: &Context, now: Instant, mut ticket: Ticket, request: &GetChunkInfoRequest) -> Handled {
    if !enter(ctx, &mut ticket) {
        let status = Status::Overload.into();
        return ticket.reply(ctx, now, &GetChunkInfoResponse { status, ..GetChunkInfoResponse::default() });
    }
    let copyset = CopysetId::new(request.logic_pool_id, request.copyset_id);
    let op = RequestOp::Chunk { chunk: request.chunk_id, op: ChunkOp::Info };
    let pending = Pending(Step::Chunk(Waiting { ticket, want: Want::Info }));
    Handled::Shard { copyset, op, charge: 0, pending }
}

fn hash(ctx: &Context, now: Instant, ticket: Ticket, request: &GetChunkHashRequest) -> Handled {
    let (offset, len) = (request.offset, request.length);
    if !in_chunk(ctx, offset, len) {
        let status = Status::InvalidRequest.into();
        return ticket.reply(ctx, now, &GetChunkHashResponse { status, hash: None });
    }
    let op = RequestOp::Chunk { chunk: request.chunk_id, op: ChunkOp::Hash { offset, len } };
    let pending = Pending(Step::Chunk(Waiting { ticket, want: Want::Hash }));
    Handled::Shard { copyset: CopysetId::new(request.logic_pool_id, request.copyset_id), op, charge: 0, pending }
}

fn update_epoch(ctx: &Context, now: Instant, ticket: Ticket, request: &UpdateEpochRequest) -> Handled {
    let status = match ctx.shared().fences().update(request.file_id, request.epoch) {
        Update::Done => Status::Success,
        Update::TooOld => Status::EpochTooOld,
        Update::Full => Status::FailureUnknown,
    };
    ticket.reply(ctx, now, &UpdateEpochResponse { status: status.into() })
}

fn unsupported(ctx: &Context, now: Instant, mut ticket: Ticket, request: &ChunkRequest, valid: bool) -> Handled {
    if !enter(ctx, &mut ticket) {
        return respond(ctx, now, ticket, Status::Overload);
    }
    if !valid {
        return respond(ctx, now, ticket, Status::InvalidRequest);
    }
    let op = RequestOp::Admin(AdminOp::CopysetStatus);
    let pending = Pending(Step::Chunk(Waiting { ticket, want: Want::Unsupported }));
    Handled::Shard { copyset: copyset_of(request), op, charge: 0, pending }
}

pub(super) fn resume(ctx: &Context, now: Instant, waiting: Waiting, reply: Reply) -> Handled {
    let Waiting { ticket, want } = waiting;
    let Some(status) = status(reply.outcome) else {
        if let Want::Op { kind, .. } = want {
            ctx.metrics().op(kind).failed();
        }
        return ticket.log_off(ctx, now);
    };
    match want {
        Want::Op { kind, size } => finish_op(ctx, now, ticket, kind, size, status, reply),
        Want::Info => {
            let redirect = leader_hint(&reply.data);
            let versions = match reply.data {
                ReplyData::Versions(versions) => versions.to_vec(),
                _ => Vec::new(),
            };
            let response = GetChunkInfoResponse { status: status.into(), redirect, chunk_sn: versions };
            ticket.reply(ctx, now, &response)
        }
        Want::Hash => {
            let hash = match (status, reply.data) {
                (Status::Success, ReplyData::Hash(hash)) => Some(hash.unwrap_or(0).to_string()),
                _ => None,
            };
            ticket.reply(ctx, now, &GetChunkHashResponse { status: status.into(), hash })
        }
        Want::Unsupported => respond(ctx, now, ticket, unsupported_status(status, &reply.data)),
    }
}

/// Whom to ask instead, as clients write it.
fn leader_hint(data: &ReplyData) -> Option<String> {
    match *data {
        ReplyData::Leader(leader) if leader != 0 => Some(PeerId(leader).to_string()),
        _ => None,
    }
}

fn unsupported_status(status: Status, data: &ReplyData) -> Status {
    const LEADER: u32 = 1;
    match data {
        ReplyData::Copysets(list) if list.first().is_some_and(|copyset| copyset.state != LEADER) => Status::Redirected,
        _ if status == Status::Success => Status::FailureUnknown,
        _ => status,
    }
}

fn finish_op(
    ctx: &Context,
    now: Instant,
    ticket: Ticket,
    kind: OpKind,
    size: u32,
    status: Status,
    reply: Reply,
) -> Handled {
    let redirect = leader_hint(&reply.data);
    let mut data = match reply.data {
        ReplyData::Data(parts) => parts,
        _ => Parts::new(),
    };
    if kind == OpKind::Read && status == Status::Success {
        let len: usize = data.iter().map(Bytes::len).sum();
        assert!(len == size as usize, "a read of {size} bytes was answered with {len}");
    } else {
        data.clear();
    }
    if status == Status::Overload {
        ctx.metrics().add(Counter::Overloads, 1);
    }
    let metrics = ctx.metrics().op(kind);
    // As the original counts: an absent chunk is no failure of a read.
    let absent = kind == OpKind::Read && status == Status::ChunkNotexist;
    if status == Status::Success || absent {
        metrics.succeeded(if absent { 0 } else { size.into() }, now.since_ns(ticket.started));
    } else {
        metrics.failed();
    }
    let applied_index = (reply.applied_index > 0).then_some(reply.applied_index);
    let response = ChunkResponse { status: status.into(), redirect, applied_index, ..ChunkResponse::default() };
    ticket.reply_with(ctx, now, &response, data)
}
