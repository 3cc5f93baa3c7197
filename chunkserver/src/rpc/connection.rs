//! One connection of the RPC port: calls and HTTP requests out of a byte stream, replies back into it. Sans-I/O.
//!
//! Promises
//! * The same calls whatever the split of the stream; frames and HTTP requests may alternate.
//! * A payload goes into a pool buffer that is taken when the frame's lengths are known, not before (rule 15). When the
//!   pool has none, this connection alone stands still ([`Progress::NoBuffer`]).
//! * A peer that does not read its replies or floods requests is not read any more ([`Connection::may_receive`]), so
//!   what it can make us hold is bounded by `limits.rs`.
//! * Bytes nobody can use are passed over, never stored.

mod saved;

pub use saved::Saved;

use super::http::{HttpParser, HttpRequest};
use super::outbox::{Outbox, SendBufs};
use super::payload::{Attachment, Fill};
use crate::io::buffer::{Arena, PoolBuf};
use crate::limits::{
    BLOCK, CONNECTION_BYTES_MAX, CONNECTION_REQUESTS_MAX, IGNORED_ATTACHMENT_BYTES_MAX, REQUEST_OVERHEAD_BYTES,
    client_may_take,
};
use bytes::Bytes;
use proto::code;
use proto::frame::{self, Decoder, FrameError, FrameHead, Step};
use smallvec::SmallVec;
use std::sync::Arc;

/// A method's place in the service's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MethodId(pub u16);

/// What the service says of a pair of names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// A method; `payload`: its attachment is data to store.
    Method {
        /// Which.
        id: MethodId,
        /// Takes whole blocks as attachment.
        payload: bool,
    },
    /// The call that makes this a connection of a peer.
    Peer,
    /// No such service or method: the error code to answer.
    Unknown(i32),
}

/// What all connections of a listener have in common.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Finds a method by service and method name.
    pub route: fn(&[u8], &[u8]) -> Route,
    /// Largest payload, bytes.
    pub chunk_size: usize,
}

/// A call, complete.
#[derive(Debug)]
pub struct Call {
    /// Which method.
    pub method: MethodId,
    /// To be echoed.
    pub correlation_id: i64,
    /// The caller's number for logs.
    pub log_id: Option<i64>,
    /// The serialized request message.
    pub body: Bytes,
    /// What came behind it.
    pub attachment: Attachment,
    /// What it counts against the connection's budget until it is answered; belongs into [`Out::cost`].
    pub cost: usize,
}

/// A call that cannot be served; an error reply is due.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reject {
    /// To be echoed.
    pub correlation_id: i64,
    /// RPC error code.
    pub code: i32,
    /// Its text.
    pub text: String,
    /// Belongs into [`Out::cost`].
    pub cost: usize,
}

/// A peer's shard wants to talk to one of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// To be echoed.
    pub correlation_id: i64,
    /// What it says.
    pub body: Bytes,
    /// Belongs into [`Out::cost`], if it is answered here.
    pub cost: usize,
}

/// Something to answer. Each gets exactly one [`Out`].
#[derive(Debug)]
pub enum Incoming {
    /// A call.
    Call(Call),
    /// A peer's greeting: its connection is another kind of session from now on, if it has nothing else in flight.
    Greeting(Greeting),
    /// A call refused before it got anywhere.
    Reject(Reject),
    /// An HTTP request.
    Http(HttpRequest),
}

/// A reply.
#[derive(Clone, Debug, Default)]
pub struct Out {
    /// Frame up to the attachment, or a whole HTTP reply.
    pub head: Bytes,
    /// The attachment's parts.
    pub attachments: SmallVec<[Bytes; 2]>,
    /// The budget it gives back.
    pub cost: usize,
    /// Close the connection when everything owed has been sent.
    pub close: bool,
    /// It answers an HTTP request.
    pub http: bool,
}

/// How far the input was used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// All of it.
    Consumed,
    /// A call may pin much once it is looked at: handle what is in `out`, then go on with the rest of the input.
    More,
    /// No payload buffer is free. Keep the rest of the input and call again when buffers came back.
    NoBuffer,
    /// The connection is over its budget or waits for an HTTP reply. Keep the rest of the input and call again when
    /// [`Connection::may_receive`] is true again, after a reply was pushed or sent.
    Later,
}

/// Why a connection is to be closed at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    /// The stream cannot be followed.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

#[derive(Debug)]
enum State {
    /// The decoder is at work.
    Frames,
    /// Inside an HTTP request.
    Http(HttpParser),
    /// The payload of `pending` waits for a buffer of this size.
    Buffer(usize),
    /// The payload of `pending` is being received into `fill`.
    Payload,
    /// Bytes are passed over; what is due then.
    Skip(usize, Box<Incoming>),
}

/// The state of one connection.
#[derive(Debug)]
pub struct Connection {
    options: Options,
    decoder: Decoder,
    state: State,
    /// Of [`State::Buffer`] and [`State::Payload`]; beside the state, so that changing it moves little.
    pending: Option<Call>,
    fill: Option<Fill>,
    outbox: Outbox,
    /// Sum of the costs of what is not answered, and of a payload being received.
    held: usize,
    requests: usize,
    http_waits: bool,
    closing: bool,
    /// What the last call pins is not known yet.
    uncounted: bool,
}

impl Connection {
    /// A fresh one.
    #[must_use]
    pub fn new(options: Options) -> Self {
        Self {
            options,
            decoder: Decoder::new(),
            state: State::Frames,
            pending: None,
            fill: None,
            outbox: Outbox::default(),
            held: 0,
            requests: 0,
            http_waits: false,
            closing: false,
            uncounted: false,
        }
    }

    /// Bytes arrived. Whatever became complete is appended to `out`.
    ///
    /// # Errors
    /// The connection is to be closed without a reply; calls already in `out` may still be served.
    pub fn received(
        &mut self,
        input: &mut &[u8],
        arena: &Arc<Arena>,
        out: &mut Vec<Incoming>,
    ) -> Result<Progress, CloseReason> {
        loop {
            let state = std::mem::replace(&mut self.state, State::Frames);
            let progress = match state {
                State::Frames if input.is_empty() => Some(Progress::Consumed),
                State::Frames if !self.may_receive() => Some(Progress::Later),
                State::Frames => self.frames(input, out)?,
                State::Http(parser) => self.http(parser, input, out),
                State::Buffer(len) => self.buffer(len, arena),
                State::Payload => self.payload(input, out),
                State::Skip(left, incoming) => self.skip(left, incoming, input, out),
            };
            if let Some(progress) = progress {
                return Ok(progress);
            }
            if std::mem::take(&mut self.uncounted) && !input.is_empty() {
                return Ok(Progress::More);
            }
        }
    }

    fn frames(&mut self, input: &mut &[u8], out: &mut Vec<Incoming>) -> Result<Option<Progress>, CloseReason> {
        match self.decoder.step(input)? {
            Step::NeedMore => return Ok(Some(Progress::Consumed)),
            Step::Head(head) => self.head(head, out),
            Step::Reject(reject) => {
                let (service, method) = reject.meta.names();
                let (code, text) = match (self.options.route)(service, method) {
                    Route::Unknown(code) => (code, unknown(code, service, method)),
                    Route::Method { .. } | Route::Peer => (frame::Reject::CODE, reject.reason.to_string()),
                };
                let reject = Reject { correlation_id: reject.meta.correlation_id, code, text, cost: 0 };
                self.emit(Incoming::Reject(reject), out);
            }
            Step::Http(start) => {
                let mut parser = HttpParser::default();
                let mut first = start.as_bytes();
                // A dozen bytes at most, which hold no valid request; an empty one closes the connection, and what is
                // behind it does not matter.
                if let Some(request) = parser.feed(&mut first) {
                    self.http_waits = true;
                    self.emit(Incoming::Http(request), out);
                    return Ok(None);
                }
                self.state = State::Http(parser);
            }
        }
        Ok(None)
    }

    /// Decide what becomes of a frame.
    fn head(&mut self, head: FrameHead, out: &mut Vec<Incoming>) {
        let FrameHead { meta, body, attachment_len: len } = head;
        let (service, method) = meta.names();
        let correlation_id = meta.correlation_id;
        let reject = |code, text| Incoming::Reject(Reject { correlation_id, code, text, cost: 0 });
        let (id, payload) = match (self.options.route)(service, method) {
            Route::Method { id, payload } => (id, payload),
            Route::Peer if len == 0 => {
                return self.emit(Incoming::Greeting(Greeting { correlation_id, body, cost: 0 }), out);
            }
            Route::Peer => {
                let text = "Fail to parse request message, a greeting has no attachment".into();
                return self.pass_over(len, reject(code::EREQUEST, text), out);
            }
            Route::Unknown(code) => return self.pass_over(len, reject(code, unknown(code, service, method)), out),
        };
        let log_id = meta.request.as_ref().and_then(|request| request.log_id);
        let cost = body.len() + REQUEST_OVERHEAD_BYTES;
        let mut call = Call { method: id, correlation_id, log_id, body, attachment: Attachment::None, cost };
        if len == 0 {
            self.emit(Incoming::Call(call), out);
        } else if payload && len <= self.options.chunk_size && len.is_multiple_of(BLOCK) {
            self.pending = Some(call);
            self.state = State::Buffer(len);
        } else if payload || len <= IGNORED_ATTACHMENT_BYTES_MAX {
            call.attachment = Attachment::Dropped(len);
            self.pass_over(len, Incoming::Call(call), out);
        } else {
            let text = format!("Fail to parse request message, an attachment of {len} bytes is not expected");
            self.pass_over(len, reject(code::EREQUEST, text), out);
        }
    }

    fn pass_over(&mut self, len: usize, incoming: Incoming, out: &mut Vec<Incoming>) {
        if len == 0 {
            self.emit(incoming, out);
        } else {
            self.state = State::Skip(len, Box::new(incoming));
        }
    }

    fn skip(
        &mut self,
        left: usize,
        incoming: Box<Incoming>,
        input: &mut &[u8],
        out: &mut Vec<Incoming>,
    ) -> Option<Progress> {
        let count = left.min(input.len());
        *input = input.get(count..).unwrap_or_default();
        if left > count {
            self.state = State::Skip(left - count, incoming);
            return Some(Progress::Consumed);
        }
        self.decoder.attachment_done();
        self.emit(*incoming, out);
        None
    }

    fn buffer(&mut self, len: usize, arena: &Arc<Arena>) -> Option<Progress> {
        let room = client_may_take(arena.free_bytes(), arena.size(), len);
        let Some(buf) = room.then(|| arena.alloc(len)).flatten() else {
            self.state = State::Buffer(len);
            return Some(Progress::NoBuffer);
        };
        let fill = Fill::new(buf);
        let call = self.pending.as_mut().expect("a payload belongs to a call");
        call.cost += fill.pinned();
        self.held += call.cost;
        self.fill = Some(fill);
        self.state = State::Payload;
        None
    }

    fn payload(&mut self, input: &mut &[u8], out: &mut Vec<Incoming>) -> Option<Progress> {
        let fill = self.fill.as_mut().expect("a payload that is received has its buffer");
        fill.take(input);
        if !fill.is_complete() {
            self.state = State::Payload;
            return Some(Progress::Consumed);
        }
        self.complete(out);
        None
    }

    /// The payload is there. The state is back at [`State::Frames`].
    fn complete(&mut self, out: &mut Vec<Incoming>) {
        let (call, fill) = (self.pending.take(), self.fill.take());
        let (Some(mut call), Some(fill)) = (call, fill) else { panic!("no payload is being received") };
        call.attachment = fill.finish();
        self.decoder.attachment_done();
        // Counted since its buffer was taken.
        self.held -= call.cost;
        self.emit(Incoming::Call(call), out);
    }

    fn http(&mut self, mut parser: HttpParser, input: &mut &[u8], out: &mut Vec<Incoming>) -> Option<Progress> {
        match parser.feed(input) {
            Some(request) => {
                // Replies to pipelined HTTP requests go in order: one at a time.
                self.http_waits = true;
                self.emit(Incoming::Http(request), out);
                None
            }
            None => {
                self.state = State::Http(parser);
                Some(Progress::Consumed)
            }
        }
    }

    fn emit(&mut self, mut incoming: Incoming, out: &mut Vec<Incoming>) {
        self.requests += 1;
        // One receive may bring hundreds of reads; each is to be counted before the next is let in.
        self.uncounted |=
            matches!(&incoming, Incoming::Call(call) if !matches!(call.attachment, Attachment::Data { .. }));
        self.held += match &mut incoming {
            Incoming::Call(call) => call.cost,
            Incoming::Reject(reject) => {
                reject.cost = REQUEST_OVERHEAD_BYTES;
                reject.cost
            }
            Incoming::Greeting(greeting) => {
                greeting.cost = REQUEST_OVERHEAD_BYTES;
                greeting.cost
            }
            Incoming::Http(_) => 0,
        };
        out.push(incoming);
    }

    /// The payload buffer, and how many of its bytes are in use, if the kernel should receive the rest of the payload
    /// straight into it. Until [`Self::direct_done`] nothing else is received.
    pub fn direct(&mut self) -> Option<(PoolBuf, usize)> {
        self.fill.as_mut().and_then(Fill::lend)
    }

    /// The kernel is done with the buffer of [`Self::direct`] and added so many bytes (0 after an error or at the end of
    /// the stream).
    pub fn direct_done(&mut self, buf: PoolBuf, added: usize, out: &mut Vec<Incoming>) {
        let fill = self.fill.as_mut().expect("no payload buffer was lent");
        fill.returned(buf, added);
        if fill.is_complete() {
            self.state = State::Frames;
            self.complete(out);
        }
    }

    /// Whether to read from the socket. A payload that has its buffer is always read to its end.
    #[must_use]
    pub fn may_receive(&self) -> bool {
        match self.state {
            State::Payload => return true,
            State::Buffer(_) => return false,
            State::Frames | State::Http(_) | State::Skip(..) => {}
        }
        let fits = self.held + self.outbox.backlog() < CONNECTION_BYTES_MAX && self.requests < CONNECTION_REQUESTS_MAX;
        fits && !self.closing && !self.http_waits
    }

    /// Nothing is read before some of its requests are answered: they are as many, or pin as much, as they may.
    #[must_use]
    pub fn is_full(&self) -> bool {
        let waits = !matches!(self.state, State::Payload | State::Buffer(_));
        waits && (self.held >= CONNECTION_BYTES_MAX || self.requests >= CONNECTION_REQUESTS_MAX)
    }

    /// It waits for a payload buffer of this many bytes.
    #[must_use]
    pub fn wants_buffer(&self) -> Option<usize> {
        match self.state {
            State::Buffer(len) => Some(len),
            _ => None,
        }
    }

    /// A payload is being received, and has its buffer.
    #[must_use]
    pub fn holds_payload(&self) -> bool {
        matches!(self.state, State::Payload)
    }

    /// Count bytes a request will pin elsewhere (the data of a read) until it is answered; add them to its [`Out::cost`].
    pub fn charge(&mut self, bytes: usize) {
        self.held += bytes;
    }

    /// Take bytes that an unanswered request counts out of the budget; its [`Out::cost`] must not have them any more.
    pub fn release(&mut self, bytes: usize) {
        assert!(self.held >= bytes, "more than is held");
        self.held -= bytes;
    }

    /// Queue a reply.
    pub fn push_reply(&mut self, reply: Out) {
        assert!(self.requests > 0 && self.held >= reply.cost, "a reply to nothing");
        self.requests -= 1;
        self.held -= reply.cost;
        self.closing |= reply.close;
        if reply.http {
            self.http_waits = false;
        }
        self.outbox.push(reply.head, reply.attachments);
    }

    /// Buffers for the next send; empty when there is nothing to send or one is in flight.
    pub fn take_send(&mut self, max_bufs: usize) -> SendBufs {
        self.outbox.take(max_bufs)
    }

    /// The send completed.
    pub fn sent(&mut self) {
        self.outbox.sent();
    }

    /// Bytes of replies not yet sent.
    #[must_use]
    pub fn backlog_bytes(&self) -> usize {
        self.outbox.backlog()
    }

    /// Bytes of budget in use by unanswered requests.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        self.held
    }

    /// Requests not yet answered.
    #[must_use]
    pub fn requests(&self) -> usize {
        self.requests
    }

    /// Nothing is owed to the peer and nothing was begun: it may be closed at any time.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.requests == 0 && self.backlog_bytes() == 0 && matches!(self.state, State::Frames) && self.decoder.is_idle()
    }

    /// The last reply said so, and everything owed has been sent: close it now.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.closing && self.requests == 0 && self.backlog_bytes() == 0
    }
}

/// brpc's texts for unknown names.
fn unknown(code: i32, service: &[u8], method: &[u8]) -> String {
    let (service, method) = (String::from_utf8_lossy(service), String::from_utf8_lossy(method));
    match code {
        code::ENOSERVICE => format!("Fail to find service={service}"),
        _ => format!("Fail to find method={service}/{method}"),
    }
}
