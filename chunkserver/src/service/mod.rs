//! What the wire's services mean: validate a call, make it a request to a shard, make the reply a response.
//!
//! Sans-I/O. [`handle`] answers at once or names the shard(s) to ask and gives a [`Pending`]; with their replies the
//! caller calls [`resume`] (one shard) or [`resume_all`], which answers or asks again. Every [`Incoming`] ends in exactly
//! one [`Out`], also when its connection is gone by then (the counters depend on it).
//!
//! The only place that chooses a status of the wire: `chunk.rs` and `copyset.rs`.

mod chunk;
mod cli;
mod context;
mod copyset;
mod fence;
mod pages;
mod raft_stat;
mod table;

pub use context::{Context, Info, Shared};
pub use fence::Fences;
pub use table::{names, route};

use crate::io::Instant;
use crate::metrics::Counter;
use crate::rpc::{Call, Incoming, MethodId, Out, Reject};
use crate::shard::request::{AdminOp, Reply, RequestOp};
use bytes::Bytes;
use proto::{Checked, code, frame};
use raftlog::CopysetId;
use smallvec::SmallVec;
use table::Method;

/// What to do about an [`Incoming`].
#[derive(Debug)]
pub enum Handled {
    /// Send this.
    Reply(Out),
    /// Ask the shard of this copyset, then [`resume`].
    Shard {
        /// Copyset.
        copyset: CopysetId,
        /// What to ask.
        op: RequestOp,
        /// Bytes the reply may pin: to be charged to the connection (`Connection::charge`); [`Out::cost`] has them.
        charge: usize,
        /// For [`resume`].
        pending: Pending,
    },
    /// Ask every shard, then [`resume_all`] with all their replies.
    AllShards {
        /// What to ask.
        op: AdminOp,
        /// For [`resume_all`].
        pending: Pending,
    },
}

/// A call that waits for a shard. Must be given back to [`resume`] or [`resume_all`].
#[derive(Debug)]
#[must_use = "the call is never answered"]
pub struct Pending(Step);

#[derive(Debug)]
enum Step {
    Chunk(chunk::Waiting),
    Copyset(copyset::Waiting),
    Cli(cli::Waiting),
    RaftStat(Ticket),
    Page(Box<pages::Waiting>),
}

/// What every reply needs to know of its call.
#[derive(Debug)]
struct Ticket {
    method: MethodId,
    correlation_id: i64,
    cost: usize,
    started: Instant,
    /// Counts among the chunk requests in flight.
    counted: bool,
}

/// Data of a reply.
type Parts = SmallVec<[Bytes; 2]>;

impl Ticket {
    fn new(call: &Call, now: Instant) -> Self {
        let Call { method, correlation_id, cost, .. } = *call;
        Self { method, correlation_id, cost, started: now, counted: false }
    }

    fn end(&self, ctx: &Context, now: Instant, ok: bool) {
        ctx.metrics().method(self.method.0.into()).end(ok, now.since_ns(self.started));
        if self.counted {
            ctx.leave();
        }
    }

    /// Answer with a message and no data.
    fn reply<M: prost::Message>(self, ctx: &Context, now: Instant, message: &M) -> Handled {
        self.reply_with(ctx, now, message, Parts::new())
    }

    /// Answer with a message and an attachment.
    fn reply_with<M: prost::Message>(self, ctx: &Context, now: Instant, message: &M, attachments: Parts) -> Handled {
        self.end(ctx, now, true);
        let len = attachments.iter().map(Bytes::len).sum();
        let head = ctx.encode(|out| frame::put_response(out, self.correlation_id, message, len));
        Handled::Reply(Out { head, attachments, cost: self.cost, ..Out::default() })
    }

    /// Answer with an RPC error.
    fn fail(self, ctx: &Context, now: Instant, code: i32, text: &str) -> Handled {
        self.end(ctx, now, false);
        Handled::Reply(error(ctx, self.correlation_id, self.cost, code, text))
    }

    /// The server stops: the peer must go elsewhere.
    fn log_off(self, ctx: &Context, now: Instant) -> Handled {
        self.fail(ctx, now, code::ELOGOFF, "Server is stopping")
    }
}

fn error(ctx: &Context, correlation_id: i64, cost: usize, code: i32, text: &str) -> Out {
    // brpc's form; C++ tools print it as it is.
    let text = format!("[{}][E{code}]{text}", ctx.info().address());
    let head = ctx.encode(|out| frame::put_error(out, correlation_id, code, &text));
    Out { head, cost, close: code == code::ELOGOFF, ..Out::default() }
}

/// Serve one thing that arrived on a connection.
pub fn handle(ctx: &Context, now: Instant, incoming: Incoming) -> Handled {
    match incoming {
        Incoming::Call(call) => dispatch(ctx, now, call),
        Incoming::Greeting(greeting) => {
            ctx.metrics().add(Counter::NonService, 1);
            let text = "a peer's greeting must be the only call of its connection";
            Handled::Reply(error(ctx, greeting.correlation_id, greeting.cost, code::EREQUEST, text))
        }
        Incoming::Reject(reject) => Handled::Reply(refuse(ctx, &reject)),
        Incoming::Http(request) => {
            ctx.metrics().add(Counter::HttpRequests, 1);
            pages::handle(ctx, now, request)
        }
    }
}

fn refuse(ctx: &Context, reject: &Reject) -> Out {
    ctx.metrics().add(Counter::NonService, 1);
    let Reject { correlation_id, code, text, cost } = reject;
    if ctx.is_draining() {
        return error(ctx, *correlation_id, *cost, code::ELOGOFF, "Server is stopping");
    }
    error(ctx, *correlation_id, *cost, *code, text)
}

/// Serve a call.
pub fn dispatch(ctx: &Context, now: Instant, call: Call) -> Handled {
    let ticket = Ticket::new(&call, now);
    ctx.metrics().method(call.method.0.into()).begin();
    if ctx.is_draining() {
        return ticket.log_off(ctx, now);
    }
    let Some(method) = table::method(call.method) else {
        return ticket.fail(ctx, now, code::ENOMETHOD, "Fail to find method");
    };
    match method {
        Method::Chunk(method) => chunk::dispatch(ctx, now, ticket, method, call),
        Method::Copyset(method) => copyset::dispatch(ctx, now, ticket, method, call.body),
        Method::Cli(method) => cli::dispatch(ctx, now, ticket, method, call.body),
        Method::RaftStat => Handled::AllShards { op: AdminOp::ListCopysets, pending: Pending(Step::RaftStat(ticket)) },
    }
}

/// The shard asked has answered.
pub fn resume(ctx: &Context, now: Instant, pending: Pending, reply: Reply) -> Handled {
    match pending.0 {
        Step::Chunk(waiting) => chunk::resume(ctx, now, waiting, reply),
        Step::Copyset(waiting) => copyset::resume(ctx, now, waiting, reply),
        Step::Cli(waiting) => cli::resume(ctx, now, waiting, &reply),
        step => resume_all(ctx, now, Pending(step), vec![reply]),
    }
}

/// All shards asked have answered.
pub fn resume_all(ctx: &Context, now: Instant, pending: Pending, replies: Vec<Reply>) -> Handled {
    match pending.0 {
        Step::RaftStat(ticket) => {
            let text = raft_stat::text(&raft_stat::copysets(replies), None);
            // braft's IndexResponse has no fields; the text is the attachment.
            ticket.reply_with(ctx, now, &(), Parts::from_iter([Bytes::from(text)]))
        }
        Step::Page(waiting) => pages::resume(ctx, now, *waiting, replies),
        Step::Cli(waiting) if replies.len() != 1 => cli::resume_all(ctx, now, waiting, &replies),
        step => {
            let reply = replies.into_iter().next();
            resume(ctx, now, Pending(step), reply.expect("every shard answers"))
        }
    }
}

/// Decode a message and serve it, or answer EREQUEST.
fn with<M: Checked>(
    ctx: &Context,
    now: Instant,
    ticket: Ticket,
    body: Bytes,
    serve: impl FnOnce(Ticket, M) -> Handled,
) -> Handled {
    let size = body.len();
    match proto::decode(body) {
        Ok(message) => serve(ticket, message),
        Err(why) => {
            let text = format!("Fail to parse request message, CompressType=none, request_size={size}: {why}");
            ticket.fail(ctx, now, code::EREQUEST, &text)
        }
    }
}
