//! Calls on the NEBD socket: what they ask for, and what their answers look like (wire-nebd, nebd-behaviour §B6).
//!
//! Promise: a call that can be understood is answered with kOK or kNoOK, or not at all; never with an RPC error, which
//! makes part1 send it again for ever. Answers are exact: a read has the bytes asked for, or none.

use super::executor::{FileInfo, Handle, OpenFlags};
use super::files::NebdFd;
use super::stat::IoKindStat;
use crate::io::Instant;
use crate::limits::{NEBD_NAME_BYTES_MAX, NEBD_READ_BYTES_MAX};
use crate::rpc::{Attachment, Call};
use crate::service::{Context, Handled, NebdMethod, Ticket, nebd_method};
use crate::shard::request::BlockCrcs;
use crate::volume::io::{IoKind, Pieces, VolumeError, VolumeIo};
use bytes::Bytes;
use proto::code::{self, RetCode};
use proto::{Checked, nebd};

/// What a call asks for.
#[derive(Debug)]
pub enum Op {
    /// OpenFile.
    Open {
        /// Complete name.
        name: String,
        /// Flags.
        flags: OpenFlags,
    },
    /// CloseFile.
    Close,
    /// Read.
    Read {
        /// Bytes.
        offset: u64,
        /// Bytes.
        size: u64,
    },
    /// Write.
    Write {
        /// Bytes.
        offset: u64,
        /// Whole blocks.
        data: Bytes,
        /// Checksum of each block.
        crcs: BlockCrcs,
    },
    /// Discard.
    Discard {
        /// Bytes.
        offset: u64,
        /// Bytes.
        size: u64,
    },
    /// ResizeFile.
    Resize(u64),
    /// Flush.
    Flush,
    /// GetInfo.
    Info,
    /// InvalidateCache.
    Invalidate,
    /// A write that failed and whose data was given up: it is never answered.
    Lost,
}

impl Op {
    /// Kind and bytes of an I/O.
    #[must_use]
    pub fn io(&self) -> Option<(IoKindStat, u64)> {
        match self {
            Self::Read { size, .. } => Some((IoKindStat::Read, *size)),
            Self::Write { data, .. } => Some((IoKindStat::Write, data.len() as u64)),
            Self::Discard { size, .. } => Some((IoKindStat::Discard, *size)),
            _ => None,
        }
    }
}

/// What arrived.
#[derive(Debug)]
pub enum Parsed {
    /// Ask the table of files.
    Call {
        /// For the answer.
        ticket: Ticket,
        /// Of the file; 0 for OpenFile.
        fd: NebdFd,
        /// What.
        op: Op,
    },
    /// A sign of life; answer with [`alive`].
    KeepAlive(Ticket, nebd::HeartbeatRequest),
    /// It is answered already.
    Answered(Handled),
}

/// How a call ended.
#[derive(Debug)]
pub enum Outcome {
    /// kNoOK.
    Refused,
    /// kOK.
    Done,
    /// kOK and a number.
    Opened(NebdFd),
    /// kOK and data.
    Data(Pieces),
    /// kOK and the size.
    Info(FileInfo),
}

/// What a request of an open file comes to.
#[derive(Debug)]
pub enum Run {
    /// Run this I/O.
    Io(VolumeIo),
    /// Make the file so large.
    Extend(u64),
    /// Answer.
    Answer(Outcome),
}

/// Understand a call.
pub fn parse(ctx: &Context, now: Instant, call: Call) -> Parsed {
    let ticket = Ticket::new(&call, now);
    ctx.metrics().method(call.method.0.into()).begin();
    let Call { method, body, attachment, .. } = call;
    let Some(method) = nebd_method(method) else {
        return Parsed::Answered(ticket.fail(ctx, now, code::ENOMETHOD, "Fail to find method"));
    };
    let attached = attachment.len() as u64;
    match method {
        NebdMethod::Open => with(ctx, now, ticket, body, |m: nebd::OpenFileRequest| {
            let fits = m.file_name.len() <= NEBD_NAME_BYTES_MAX;
            fits.then(|| (0, Op::Open { name: m.file_name, flags: m.flags.map(|f| f.exclusive) }))
        }),
        NebdMethod::Close => with(ctx, now, ticket, body, |m: nebd::CloseFileRequest| Some((m.fd, Op::Close))),
        NebdMethod::Read => with(ctx, now, ticket, body, |m: nebd::ReadRequest| {
            let fits = m.size <= NEBD_READ_BYTES_MAX as u64;
            fits.then_some((m.fd, Op::Read { offset: m.offset, size: m.size }))
        }),
        NebdMethod::Write => with(ctx, now, ticket, body, |m: nebd::WriteRequest| {
            let (data, crcs) = match attachment {
                Attachment::Data { data, crcs } => (data, crcs),
                Attachment::None => (Bytes::new(), BlockCrcs::new()),
                Attachment::Dropped(_) => return None,
            };
            (m.size == attached).then_some((m.fd, Op::Write { offset: m.offset, data, crcs }))
        }),
        NebdMethod::Discard => with(ctx, now, ticket, body, |m: nebd::DiscardRequest| {
            Some((m.fd, Op::Discard { offset: m.offset, size: m.size }))
        }),
        NebdMethod::Resize => {
            with(ctx, now, ticket, body, |m: nebd::ResizeRequest| Some((m.fd, Op::Resize(m.new_size))))
        }
        NebdMethod::Flush => with(ctx, now, ticket, body, |m: nebd::FlushRequest| Some((m.fd, Op::Flush))),
        NebdMethod::Info => with(ctx, now, ticket, body, |m: nebd::GetInfoRequest| Some((m.fd, Op::Info))),
        NebdMethod::Invalidate => {
            with(ctx, now, ticket, body, |m: nebd::InvalidateCacheRequest| Some((m.fd, Op::Invalidate)))
        }
        NebdMethod::KeepAlive => match decode(ctx, now, ticket, body) {
            Ok((ticket, message)) => Parsed::KeepAlive(ticket, message),
            Err(answered) => Parsed::Answered(*answered),
        },
    }
}

fn decode<M: Checked>(ctx: &Context, now: Instant, ticket: Ticket, body: Bytes) -> Result<(Ticket, M), Box<Handled>> {
    match proto::decode(body) {
        Ok(message) => Ok((ticket, message)),
        // No client of NEBD sends such a thing. It gets what brpc answers.
        Err(why) => {
            let text = format!("Fail to parse request message: {why}");
            Err(Box::new(ticket.fail(ctx, now, code::EREQUEST, &text)))
        }
    }
}

/// Decode, and refuse at once what `read` makes nothing of.
fn with<M: Checked>(
    ctx: &Context,
    now: Instant,
    ticket: Ticket,
    body: Bytes,
    read: impl FnOnce(M) -> Option<(NebdFd, Op)>,
) -> Parsed {
    let (ticket, message) = match decode(ctx, now, ticket, body) {
        Ok(decoded) => decoded,
        Err(answered) => return Parsed::Answered(*answered),
    };
    match read(message) {
        Some((fd, op)) => Parsed::Call { ticket, fd, op },
        // All messages of refusal have the same bytes.
        None => Parsed::Answered(answer(ctx, now, ticket, &Op::Close, Outcome::Refused)),
    }
}

/// Begin a request of an open file. `op` keeps its data, so that it can be begun again.
pub fn run(op: &Op, handle: &dyn Handle) -> Run {
    let io = |io: Result<VolumeIo, VolumeError>| match io {
        Ok(io) => Run::Io(io),
        Err(why) => {
            tracing::debug!(%why, "a request is refused");
            Run::Answer(Outcome::Refused)
        }
    };
    let done = |result: Result<(), VolumeError>| match result {
        Ok(()) => Run::Answer(Outcome::Done),
        Err(_) => Run::Answer(Outcome::Refused),
    };
    match op {
        // The originals never answer these.
        Op::Read { size: 0, .. } | Op::Discard { size: 0, .. } => done(handle.flush()),
        Op::Write { data, .. } if data.is_empty() => done(handle.flush()),
        Op::Read { offset, size } => io(handle.start(IoKind::Read, *offset, *size, Instant::FAR)),
        Op::Write { offset, data, crcs } => {
            let kind = IoKind::write(data.clone(), crcs.clone());
            io(handle.start(kind, *offset, data.len() as u64, Instant::FAR))
        }
        Op::Discard { offset, size } => match handle.discard(*offset, *size, Instant::FAR) {
            Ok(None) => Run::Answer(Outcome::Done),
            Ok(Some(discard)) => Run::Io(discard),
            Err(why) => io(Err(why)),
        },
        Op::Resize(size) => Run::Extend(*size),
        Op::Flush => done(handle.flush()),
        Op::Invalidate => done(handle.invalidate_cache()),
        Op::Info => Run::Answer(handle.info().map_or(Outcome::Refused, Outcome::Info)),
        Op::Open { .. } | Op::Close | Op::Lost => Run::Answer(Outcome::Refused),
    }
}

/// Answer a KeepAlive.
pub fn alive(ctx: &Context, now: Instant, ticket: Ticket, all_known: bool) -> Handled {
    let ret_code = if all_known { RetCode::KOk } else { RetCode::KNoOk }.into();
    ticket.reply(ctx, now, &nebd::HeartbeatResponse { ret_code })
}

/// Answer a call.
pub fn answer(ctx: &Context, now: Instant, ticket: Ticket, op: &Op, outcome: Outcome) -> Handled {
    let ok = !matches!(outcome, Outcome::Refused);
    let ret_code = i32::from(if ok { RetCode::KOk } else { RetCode::KNoOk });
    let ret_msg = None; // the originals never fill it
    match op {
        Op::Open { .. } => {
            let fd = if let Outcome::Opened(fd) = outcome { Some(fd) } else { None };
            ticket.reply(ctx, now, &nebd::OpenFileResponse { ret_code, ret_msg, fd })
        }
        Op::Close => ticket.reply(ctx, now, &nebd::CloseFileResponse { ret_code, ret_msg }),
        Op::Read { .. } => {
            let pieces = if let Outcome::Data(pieces) = outcome { pieces } else { Pieces::new() };
            ticket.reply_with(ctx, now, &nebd::ReadResponse { ret_code, ret_msg }, pieces.into_iter().collect())
        }
        Op::Write { .. } | Op::Lost => ticket.reply(ctx, now, &nebd::WriteResponse { ret_code, ret_msg }),
        Op::Discard { .. } => ticket.reply(ctx, now, &nebd::DiscardResponse { ret_code, ret_msg }),
        Op::Resize(_) => ticket.reply(ctx, now, &nebd::ResizeResponse { ret_code, ret_msg }),
        Op::Flush => ticket.reply(ctx, now, &nebd::FlushResponse { ret_code, ret_msg }),
        Op::Invalidate => ticket.reply(ctx, now, &nebd::InvalidateCacheResponse { ret_code, ret_msg }),
        Op::Info => {
            let info = if let Outcome::Info(info) = outcome { Some(info_message(info)) } else { None };
            ticket.reply(ctx, now, &nebd::GetInfoResponse { ret_code, ret_msg, info })
        }
    }
}

fn info_message(info: FileInfo) -> nebd::FileInfo {
    nebd::FileInfo {
        size: info.size,
        obj_size: info.chunk_size,
        obj_nums: info.size.div_ceil(info.chunk_size.max(1)),
        blocksize: Some(info.block_size),
    }
}
