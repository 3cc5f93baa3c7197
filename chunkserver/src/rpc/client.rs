//! Calls to other servers, sans-I/O: one connection per server, many calls in flight, each answered exactly once.
//!
//! Promises: a call ends within its time, with an answer or with what is known of it ([`CallError::was_sent`]); a server
//! that is gone costs no memory, it is tried again after pauses that double; what is queued and what an answer may bring is
//! bounded. Payloads of answers go into pool buffers, with their block CRCs, as those of requests do.

use super::outbox::{Outbox, SendBufs};
use super::payload::{Attachment, Fill};
use crate::io::buffer::{Arena, PoolBuf};
use crate::io::{Address, Instant};
use crate::limits::{
    BLOCK, CHUNK_BYTES_MAX, CONNECTION_BYTES_MAX, CONNECTION_REQUESTS_MAX, IGNORED_ATTACHMENT_BYTES_MAX,
    answer_may_take,
};
use bytes::{Bytes, BytesMut};
use proto::frame::{Decoder, FrameHead, RequestHead, Step, put_request_bytes};
use smallvec::SmallVec;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// A connect that takes longer has failed, milliseconds.
pub const DIAL_MS: u32 = 1_000;
/// Pauses between attempts, half to one and a half times this, doubling from the first to the last, milliseconds.
const PAUSE_MS: (u64, u64) = (10, 1_000);

/// A call to be made.
#[derive(Clone, Debug)]
pub struct Outgoing {
    /// Given back with the answer.
    pub token: u64,
    /// Full name.
    pub service: &'static str,
    /// Bare name.
    pub method: &'static str,
    /// The serialized request.
    pub body: Bytes,
    /// What goes with it.
    pub attachment: SmallVec<[Bytes; 2]>,
    /// When its caller does not wait any more.
    pub until: Instant,
}

/// Why a call has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// The server cannot be reached (now); the call was not sent.
    #[error("the server cannot be reached")]
    Unreachable,
    /// Too much waits for this server; the call was not sent.
    #[error("too much waits for the server")]
    Full,
    /// No answer in time; the server may have done it.
    #[error("no answer in time")]
    TimedOut,
    /// The connection broke; the server may have done it.
    #[error("the connection broke")]
    Broken,
    /// The server answered with an RPC error.
    #[error("RPC error {code}: {text}")]
    Rpc {
        /// Its code.
        code: i32,
        /// Its text.
        text: String,
    },
    /// The answer's attachment is longer than anything that was asked for.
    #[error("an answer with an attachment of {0} bytes")]
    TooLong(usize),
}

impl CallError {
    /// The server may have acted on it.
    #[must_use]
    pub fn was_sent(&self) -> bool {
        !matches!(self, Self::Unreachable | Self::Full)
    }
}

/// How a call ended.
#[derive(Debug)]
pub struct Answer {
    /// The call's.
    pub token: u64,
    /// The serialized response and what came behind it.
    pub result: Result<(Bytes, Attachment), CallError>,
}

/// What the caller does for a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Do {
    /// Connect, then [`Client::dialed`].
    Dial,
}

#[derive(Debug)]
enum State {
    Idle,
    Pause(Instant),
    Dialing,
    Up,
}

/// What is being received behind an answer's message.
#[derive(Debug)]
enum Receiving {
    Nothing,
    /// A payload that waits for a buffer.
    Buffer(Head, usize),
    Payload(Head, Box<Fill>),
    /// A small one.
    Text(Head, usize, BytesMut),
    /// Passed over; the answer that is due then, if somebody waits.
    Skip(usize, Option<Answer>),
}

/// An answer without its attachment.
#[derive(Debug)]
struct Head {
    id: i64,
    body: Bytes,
}

/// Calls to one server.
#[derive(Debug)]
pub struct Client {
    address: Address,
    state: State,
    failures: u32,
    decoder: Decoder,
    receiving: Receiving,
    outbox: Outbox,
    next_id: i64,
    /// By correlation id: token and deadline.
    waiting: BTreeMap<i64, (u64, Instant)>,
    deadlines: BTreeSet<(Instant, i64)>,
}

impl Client {
    /// Nothing is dialed before the first call.
    #[must_use]
    pub fn new(address: Address) -> Self {
        Self {
            address,
            state: State::Idle,
            failures: 0,
            decoder: Decoder::new(),
            receiving: Receiving::Nothing,
            outbox: Outbox::default(),
            next_id: 0,
            waiting: BTreeMap::new(),
            deadlines: BTreeSet::new(),
        }
    }

    /// Whom it calls.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.address
    }
    /// Calls without an answer.
    #[must_use]
    pub fn calls(&self) -> usize {
        self.waiting.len()
    }
    /// It has a connection.
    #[must_use]
    pub fn is_up(&self) -> bool {
        matches!(self.state, State::Up)
    }

    /// It is getting one.
    #[must_use]
    pub fn is_dialing(&self) -> bool {
        matches!(self.state, State::Dialing)
    }

    /// Make a call; refused ones are answered at once.
    pub fn call(&mut self, now: Instant, call: Outgoing, out: &mut Vec<Answer>) {
        let Outgoing { token, service, method, body, attachment, until } = call;
        let refuse = |why| Answer { token, result: Err(why) };
        if matches!(self.state, State::Pause(at) if at > now) {
            return out.push(refuse(CallError::Unreachable));
        }
        let len: usize = attachment.iter().map(Bytes::len).sum();
        let queued = self.outbox.backlog();
        let full = queued > 0 && queued + body.len() + len > CONNECTION_BYTES_MAX;
        if full || self.waiting.len() >= CONNECTION_REQUESTS_MAX {
            return out.push(refuse(CallError::Full));
        }
        self.next_id += 1;
        let id = self.next_id;
        let head = RequestHead { service, method, log_id: None, correlation_id: id };
        let mut frame = BytesMut::new();
        put_request_bytes(&mut frame, &head, &body, len);
        self.outbox.push(frame.freeze(), attachment);
        self.waiting.insert(id, (token, until));
        self.deadlines.insert((until, id));
    }

    /// What is due: a connection to be made, calls whose time is up.
    pub fn poll(&mut self, now: Instant, out: &mut Vec<Answer>) -> Option<Do> {
        while let Some(&(until, id)) = self.deadlines.first().filter(|first| first.0 <= now) {
            self.deadlines.remove(&(until, id));
            if let Some((token, _)) = self.waiting.remove(&id) {
                out.push(Answer { token, result: Err(CallError::TimedOut) });
            }
        }
        let ready = match self.state {
            State::Idle => true,
            State::Pause(at) => at <= now,
            State::Dialing | State::Up => false,
        };
        if !ready || self.waiting.is_empty() {
            return None;
        }
        self.state = State::Dialing;
        Some(Do::Dial)
    }

    /// When [`Self::poll`] must be called, apart from after calls.
    #[must_use]
    pub fn deadline(&self) -> Instant {
        self.deadlines.first().map_or(Instant::FAR, |first| first.0)
    }

    /// How [`Do::Dial`] went.
    pub fn dialed(&mut self, now: Instant, connected: bool, draw: u64, out: &mut Vec<Answer>) {
        assert!(matches!(self.state, State::Dialing), "nobody dialed");
        if connected {
            self.state = State::Up;
        } else {
            self.end(now, draw, &CallError::Unreachable, out);
        }
    }

    /// The connection is gone.
    pub fn closed(&mut self, now: Instant, draw: u64, out: &mut Vec<Answer>) {
        self.end(now, draw, &CallError::Broken, out);
    }

    fn end(&mut self, now: Instant, draw: u64, why: &CallError, out: &mut Vec<Answer>) {
        let pause = (PAUSE_MS.0 << self.failures.min(16)).min(PAUSE_MS.1) * 1_000_000;
        self.failures += 1;
        self.state = State::Pause(now.after_ns(pause / 2 + draw % pause));
        (self.decoder, self.outbox, self.receiving) = (Decoder::new(), Outbox::default(), Receiving::Nothing);
        self.deadlines.clear();
        let waiting = std::mem::take(&mut self.waiting).into_values();
        out.extend(waiting.map(|(token, _)| Answer { token, result: Err(why.clone()) }));
    }

    /// Buffers for the next send.
    pub fn take_send(&mut self, max_bufs: usize) -> SendBufs {
        if self.is_up() { self.outbox.take(max_bufs) } else { SendBufs::new() }
    }
    /// The send completed.
    pub fn sent(&mut self) {
        self.outbox.sent();
    }

    /// Bytes arrived. True: a payload waits for a buffer; keep the rest of the input and call again when some came back.
    ///
    /// # Errors
    /// The connection is to be closed, then [`Self::closed`].
    pub fn received(
        &mut self,
        input: &mut &[u8],
        arena: &Arc<Arena>,
        out: &mut Vec<Answer>,
    ) -> Result<bool, super::CloseReason> {
        loop {
            match std::mem::replace(&mut self.receiving, Receiving::Nothing) {
                Receiving::Nothing => match self.decoder.step(input)? {
                    Step::NeedMore => return Ok(false),
                    Step::Head(head) => self.head(head, out),
                    // An answer that the framing refuses: whoever waits for it has its time-out.
                    Step::Reject(_) => {}
                    Step::Http(_) => return Err(proto::frame::FrameError::UnknownProtocol.into()),
                },
                Receiving::Buffer(head, len) => {
                    if !self.waiting.contains_key(&head.id) {
                        self.receiving = Receiving::Skip(len, None); // nobody waits for it any more
                        continue;
                    }
                    let room = answer_may_take(arena.free_bytes(), arena.size(), len);
                    let Some(buf) = room.then(|| arena.alloc(len)).flatten() else {
                        self.receiving = Receiving::Buffer(head, len);
                        return Ok(true);
                    };
                    self.receiving = Receiving::Payload(head, Box::new(Fill::new(buf)));
                }
                Receiving::Payload(head, mut fill) => {
                    fill.take(input);
                    if !fill.is_complete() {
                        self.receiving = Receiving::Payload(head, fill);
                        return Ok(false);
                    }
                    self.attached(head, fill.finish(), out);
                }
                Receiving::Text(head, len, mut text) => {
                    let (part, rest) = input.split_at((len - text.len()).min(input.len()));
                    text.extend_from_slice(part);
                    *input = rest;
                    if text.len() < len {
                        self.receiving = Receiving::Text(head, len, text);
                        return Ok(false);
                    }
                    self.attached(head, Attachment::Data { data: text.freeze(), crcs: SmallVec::new() }, out);
                }
                Receiving::Skip(left, answer) => {
                    let count = left.min(input.len());
                    *input = input.get(count..).unwrap_or_default();
                    if count < left {
                        self.receiving = Receiving::Skip(left - count, answer);
                        return Ok(false);
                    }
                    self.decoder.attachment_done();
                    out.extend(answer);
                }
            }
        }
    }

    fn head(&mut self, head: FrameHead, out: &mut Vec<Answer>) {
        let FrameHead { meta, body, attachment_len: len } = head;
        let id = meta.correlation_id;
        self.failures = 0;
        let code = meta.error_code();
        let refusal = match meta.response {
            Some(response) if code != 0 => {
                Some(CallError::Rpc { code, text: String::from_utf8_lossy(&response.error_text).into_owned() })
            }
            _ if len > CHUNK_BYTES_MAX => Some(CallError::TooLong(len)),
            _ if len > IGNORED_ATTACHMENT_BYTES_MAX && !len.is_multiple_of(BLOCK) => Some(CallError::TooLong(len)),
            _ => None,
        };
        let known = self.waiting.contains_key(&id);
        if let (true, None) = (known && len > 0, &refusal) {
            let head = Head { id, body };
            self.receiving = if len.is_multiple_of(BLOCK) {
                Receiving::Buffer(head, len)
            } else {
                Receiving::Text(head, len, BytesMut::with_capacity(len))
            };
            return;
        }
        let result = refusal.map_or(Ok((body, Attachment::None)), Err);
        let answer = self.end_of(id).map(|token| Answer { token, result });
        if len > 0 {
            self.receiving = Receiving::Skip(len, answer);
        } else {
            out.extend(answer);
        }
    }

    /// The call with this id is over; its token.
    fn end_of(&mut self, id: i64) -> Option<u64> {
        let (token, until) = self.waiting.remove(&id)?;
        self.deadlines.remove(&(until, id));
        Some(token)
    }

    fn attached(&mut self, head: Head, attachment: Attachment, out: &mut Vec<Answer>) {
        self.decoder.attachment_done();
        if let Some(token) = self.end_of(head.id) {
            out.push(Answer { token, result: Ok((head.body, attachment)) });
        }
    }

    /// The payload buffer, if the kernel should receive the rest of it straight into it; then [`Self::direct_done`].
    pub fn direct(&mut self) -> Option<(PoolBuf, usize)> {
        match &mut self.receiving {
            Receiving::Payload(_, fill) => fill.lend(),
            _ => None,
        }
    }
    /// The kernel is done with the buffer of [`Self::direct`]. What became complete is handed out by the next
    /// [`Self::received`], which needs no input for it.
    pub fn direct_done(&mut self, buf: PoolBuf, added: usize) {
        let Receiving::Payload(_, fill) = &mut self.receiving else { panic!("no payload buffer was lent") };
        fill.returned(buf, added);
    }
    /// An answer's payload is being received, and has its buffer.
    #[must_use]
    pub fn holds_payload(&self) -> bool {
        matches!(self.receiving, Receiving::Payload(..))
    }
    /// It waits for a payload buffer.
    #[must_use]
    pub fn wants_buffer(&self) -> bool {
        matches!(self.receiving, Receiving::Buffer(..))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::frame::{put_error, put_response_bytes};

    const NOW: Instant = Instant(1_000_000_000);

    fn outgoing(token: u64, ms: u64, attachment: usize) -> Outgoing {
        let (body, until) = (Bytes::from(vec![token as u8; 3]), NOW.after_ms(ms));
        let attachment = std::iter::once(Bytes::from(vec![9; attachment])).filter(|a| !a.is_empty()).collect();
        Outgoing { token, service: "a.Service", method: "Method", body, attachment, until }
    }

    fn up(calls: u64) -> (Client, Arc<Arena>, Vec<Answer>) {
        let mut client = Client::new(Address::Tcp(std::net::Ipv4Addr::LOCALHOST, 1));
        let mut out = Vec::new();
        assert_eq!(client.poll(NOW, &mut out), None, "nothing to do");
        (1..=calls).for_each(|token| client.call(NOW, outgoing(token, 100 + token, 0), &mut out));
        assert_eq!(client.poll(NOW, &mut out), Some(Do::Dial));
        client.dialed(NOW, true, 0, &mut out);
        assert!(out.is_empty() && client.is_up());
        (client, Arena::new(1 << 20).unwrap(), out)
    }

    fn reply(id: i64, attachment: &[u8]) -> Vec<u8> {
        let mut out = BytesMut::new();
        if attachment.is_empty() {
            put_response_bytes(&mut out, id, &[id as u8; 5]);
        } else {
            proto::frame::put_response(&mut out, id, &(), attachment.len());
        }
        [&out[..], attachment].concat()
    }

    #[test]
    fn requests_are_frames_and_answers_find_their_calls_in_any_order() {
        let (mut client, arena, mut out) = up(3);
        let sent: Vec<u8> = client.take_send(100).iter().flat_map(|buf| buf.to_vec()).collect();
        client.sent();
        let (mut decoder, mut input) = (Decoder::new(), &sent[..]);
        for token in 1..=3u8 {
            let Ok(Step::Head(head)) = decoder.step(&mut input) else { panic!("a frame") };
            assert_eq!(head.meta.names(), (&b"a.Service"[..], &b"Method"[..]));
            assert_eq!((head.meta.correlation_id, &head.body[..]), (i64::from(token), &[token; 3][..]));
        }
        let data: Vec<u8> = (0..80 * BLOCK).map(|at| (at / 3) as u8).collect();
        let mut error = BytesMut::new();
        put_error(&mut error, 1, 1002, "no");
        let stream = [reply(3, &data), reply(77, &data), reply(2, b"text"), error.to_vec(), reply(1, b"")].concat();
        for piece in stream.chunks(5000) {
            let mut input = piece;
            assert!(!client.received(&mut input, &arena, &mut out).unwrap());
        }
        let seen: Vec<u64> = out.iter().map(|answer| answer.token).collect();
        assert_eq!((seen, client.calls()), (vec![3, 2, 1], 0));
        let Ok((_, Attachment::Data { data: found, crcs })) = &out[0].result else { panic!("data") };
        assert_eq!((&found[..], crcs.len()), (&data[..], 80));
        assert!(matches!(&out[1].result, Ok((_, Attachment::Data { data, .. })) if data == "text"));
        assert_eq!(out[2].result.as_ref().err(), Some(&CallError::Rpc { code: 1002, text: "no".into() }));
    }

    #[test]
    fn every_call_ends_once_in_time_or_with_its_connection() {
        let (mut client, arena, mut out) = up(4);
        assert_eq!(client.deadline(), NOW.after_ms(101));
        assert_eq!(client.poll(NOW.after_ms(102), &mut out), None);
        let timed_out: Vec<_> = out.drain(..).map(|a| (a.token, a.result.err())).collect();
        assert_eq!(timed_out, [(1, Some(CallError::TimedOut)), (2, Some(CallError::TimedOut))]);
        let mut input = &reply(1, &[1; BLOCK])[..];
        assert!(!client.received(&mut input, &arena, &mut out).unwrap() && out.is_empty(), "too late: passed over");
        client.closed(NOW, 0, &mut out);
        let broken: Vec<_> = out.drain(..).map(|a| (a.token, a.result.err())).collect();
        assert_eq!(broken, [(3, Some(CallError::Broken)), (4, Some(CallError::Broken))]);
        assert!(CallError::Broken.was_sent() && !CallError::Unreachable.was_sent());

        client.call(NOW, outgoing(5, 100, 0), &mut out);
        assert!(matches!(out.pop(), Some(Answer { token: 5, result: Err(CallError::Unreachable) })), "in the pause");
        let later = NOW.after_ms(50);
        client.call(later, outgoing(6, 100, 0), &mut out);
        assert_eq!(client.poll(later, &mut out), Some(Do::Dial));
        client.dialed(later, false, 0, &mut out);
        assert!(matches!(out.pop(), Some(Answer { token: 6, result: Err(CallError::Unreachable) })));
        assert!(out.is_empty() && client.calls() == 0);
    }

    #[test]
    fn what_waits_for_a_server_is_bounded() {
        let (mut client, _, mut out) = up(1);
        for token in 2..100 {
            client.call(NOW, outgoing(token, 100, 1 << 20), &mut out);
        }
        assert!(out.iter().all(|answer| answer.result.as_ref().err() == Some(&CallError::Full)));
        assert!((60..75).contains(&out.len()), "{}", out.len());
    }

    #[test]
    fn an_answer_without_a_buffer_waits() {
        let (mut client, arena, mut out) = up(1);
        // What is left is the peers' (rule 14).
        let taken = arena.alloc((1 << 20) - 64 * BLOCK).unwrap();
        let stream = reply(1, &[4; 64 * BLOCK]);
        let (first, rest) = stream.split_at(100);
        let mut input = first;
        assert!(client.received(&mut input, &arena, &mut out).unwrap());
        assert!(client.wants_buffer() && client.direct().is_none() && !client.holds_payload());
        drop(taken);
        assert!(!client.received(&mut input, &arena, &mut out).unwrap() && client.holds_payload());
        let (mut buf, filled) = client.direct().unwrap();
        let missing = 64 * BLOCK - filled;
        assert_eq!(missing, rest.len());
        buf[filled..].copy_from_slice(rest);
        client.direct_done(buf, missing);
        assert!(out.is_empty());
        assert!(!client.received(&mut &[][..], &arena, &mut out).unwrap());
        assert!(matches!(&out[0].result, Ok((_, Attachment::Data { data, .. })) if data == &[4; 64 * BLOCK][..]));
    }
}
