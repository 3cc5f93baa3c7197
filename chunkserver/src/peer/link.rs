//! The dialer's end of one connection: dialed when there is mail, greeted, fed one batch per turn, given up when silent.
//!
//! Promise: it holds at most its budget of mail, and none while nobody can say when it will leave: between two attempts
//! mail is refused, so that a dead peer costs no memory. What was queued when a connection ends is gone; raft sends again.

use super::convert::to_wire;
use crate::io::Instant;
use crate::limits::{
    PEER_CONTROL_BYTES_MAX, PEER_DATA_BYTES_MAX, PEER_EARLY_BYTES_MAX, PEER_FRAME_BYTES, PEER_FRAME_HEAD_BYTES,
};
use crate::rpc::outbox::{Outbox, SendBufs};
use crate::shard::mail::PeerMail;
use bytes::BytesMut;
use proto::frame::{Decoder, FrameHead, RequestHead, Step, put_request_bytes};
use proto::peer::{BatchWriter, HELLO, Hello, Lane, PING, PeerError, SERVICE, Status, Welcome};

/// A connect that takes longer has failed, milliseconds.
pub const DIAL_MS: u32 = 1_000;
/// A greeting must be answered in this time, milliseconds.
const GREET_MS: u64 = 1_000;
/// Between two pings, milliseconds.
const PING_MS: u64 = 500;
/// A ping of the control lane must be answered in this time, one of the data lane (behind data) in that, milliseconds.
const SILENCE_MS: [u64; 2] = [10_000, 2_000];
/// Pauses between attempts, drawn from half to one and a half times this, doubling from the first to the last.
const PAUSE_MS: (u64, u64) = (10, 500);
/// The same after a refusal: only an operator can change it.
const REFUSED_MS: (u64, u64) = (1_000, 8_000);

/// Why a connection ended, or was not made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkEnd {
    /// Nobody listens there, or the network is down.
    #[error("it cannot be reached")]
    Unreachable,
    /// The connection broke.
    #[error("the connection broke")]
    Broken,
    /// No answer in time.
    #[error("it does not answer")]
    Silent,
    /// The handshake was refused.
    #[error("the handshake failed: {0}")]
    Refused(Status),
    /// It answers with an RPC error: a server, but not one of ours (rule 24).
    #[error("the handshake failed: it is no peer of ours (RPC error {0})")]
    Foreign(i32),
    /// Bytes that make no sense.
    #[error("it speaks another protocol")]
    Protocol,
    /// Not needed any more.
    #[error("it is not used")]
    Unused,
}

impl LinkEnd {
    fn is_refusal(self) -> bool {
        match self {
            Self::Refused(status) => status != Status::NotReady,
            Self::Foreign(_) | Self::Protocol => true,
            Self::Unreachable | Self::Broken | Self::Silent | Self::Unused => false,
        }
    }
}

/// What the caller does for a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Do {
    /// Connect, then [`Link::dialed`].
    Dial,
    /// Close the connection, then [`Link::closed`].
    Close,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Never wanted, or its connection ended when it was not wanted.
    Idle,
    /// Not before this.
    Pause(Instant),
    Dialing,
    Greeting(Instant),
    Up,
    /// To be closed; why is in `end`.
    Ending,
}

/// See the module's text.
#[derive(Debug)]
pub struct Link {
    hello: Hello,
    state: State,
    /// Why the last connection ended.
    end: Option<LinkEnd>,
    /// There was mail since the last attempt.
    wanted: bool,
    failures: u32,
    decoder: Decoder,
    batch: BatchWriter,
    outbox: Outbox,
    correlation_id: i64,
    /// Correlation id of the ping that is not answered yet, and when it was sent.
    pinged: Option<(i64, Instant)>,
    ping_at: Instant,
    rtt_ns: u64,
    close_said: bool,
}

impl Link {
    /// To the peer and shard that the hello names.
    #[must_use]
    pub fn new(hello: Hello) -> Self {
        Self {
            hello,
            state: State::Idle,
            end: None,
            wanted: false,
            failures: 0,
            decoder: Decoder::new(),
            batch: BatchWriter::default(),
            outbox: Outbox::default(),
            correlation_id: 0,
            pinged: None,
            ping_at: Instant::FAR,
            rtt_ns: 0,
            close_said: false,
        }
    }

    /// To whom.
    #[must_use]
    pub fn peer(&self) -> u64 {
        self.hello.to
    }
    /// For what.
    #[must_use]
    pub fn lane(&self) -> Lane {
        self.hello.lane
    }
    /// Mail leaves at once.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.state == State::Up
    }
    /// Nothing of it is under way.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        matches!(self.state, State::Idle | State::Pause(_))
    }
    /// Why there is no connection, if there was a reason.
    #[must_use]
    pub fn end(&self) -> Option<LinkEnd> {
        if self.is_up() { None } else { self.end }
    }
    /// Of the last answered ping, nanoseconds.
    #[must_use]
    pub fn rtt_ns(&self) -> u64 {
        self.rtt_ns
    }
    /// Bytes that have not left yet.
    #[must_use]
    pub fn backlog(&self) -> usize {
        self.batch.head_bytes() + self.batch.payload_bytes() + self.outbox.backlog()
    }

    fn budget(&self) -> usize {
        match (self.state, self.hello.lane) {
            (State::Pause(_) | State::Ending, _) => 0,
            (State::Up, Lane::Data) => PEER_DATA_BYTES_MAX,
            (State::Up, Lane::Control) => PEER_CONTROL_BYTES_MAX,
            (State::Idle | State::Dialing | State::Greeting(_), _) => PEER_EARLY_BYTES_MAX,
        }
    }

    /// Queue mail; false if it is lost.
    pub fn push(&mut self, mail: PeerMail) -> bool {
        self.wanted = true;
        let (backlog, budget) = (self.backlog(), self.budget());
        // One message always passes a link with nothing to do: the largest write must not wait for ever.
        if budget == 0 || (backlog > 0 && backlog + mail.bytes() > budget) {
            return false;
        }
        match to_wire(mail) {
            Ok(message) => self.batch.push(message),
            Err(why) => {
                tracing::error!(%why, "mail that cannot travel");
                return false;
            }
        }
        let full = self.batch.payload_bytes() >= PEER_FRAME_BYTES || self.batch.head_bytes() >= PEER_FRAME_HEAD_BYTES;
        // Before the welcome nothing may follow the greeting into the outbox.
        if full && self.is_up() {
            self.close_batch();
        }
        true
    }

    fn next_id(&mut self) -> i64 {
        self.correlation_id += 1;
        self.correlation_id
    }

    fn close_batch(&mut self) {
        if !self.batch.is_empty() {
            let id = self.next_id();
            let mut head = BytesMut::new();
            let payloads = self.batch.finish(&mut head, id);
            self.outbox.push(head.freeze(), payloads);
        }
    }

    /// Buffers for the next send; all mail of the turn is one frame.
    pub fn take_send(&mut self, max_bufs: usize) -> SendBufs {
        match self.state {
            State::Up => self.close_batch(),
            State::Greeting(_) => {}
            _ => return SendBufs::new(),
        }
        self.outbox.take(max_bufs)
    }

    /// The send completed.
    pub fn sent(&mut self) {
        self.outbox.sent();
    }

    /// What is due; call again at [`Self::deadline`] and after everything that happened to it.
    pub fn poll(&mut self, now: Instant) -> Option<Do> {
        match self.state {
            State::Pause(until) if until <= now && !self.wanted => self.state = State::Idle,
            State::Idle | State::Pause(_) if self.wanted && self.due(now) => {
                self.wanted = false;
                self.state = State::Dialing;
                return Some(Do::Dial);
            }
            State::Greeting(until) if until <= now => self.give_up(LinkEnd::Silent),
            State::Up => self.ping(now),
            _ => {}
        }
        (self.state == State::Ending && !std::mem::replace(&mut self.close_said, true)).then_some(Do::Close)
    }

    fn due(&self, now: Instant) -> bool {
        if let State::Pause(until) = self.state { until <= now } else { true }
    }

    /// When [`Self::poll`] must be called.
    #[must_use]
    pub fn deadline(&self) -> Instant {
        match self.state {
            State::Idle if self.wanted => Instant(0),
            State::Idle | State::Dialing => Instant::FAR,
            State::Pause(until) | State::Greeting(until) => until,
            State::Up => match self.pinged {
                Some((_, at)) => at.after_ms(SILENCE_MS[self.hello.lane as usize]),
                None => self.ping_at,
            },
            State::Ending if self.close_said => Instant::FAR,
            State::Ending => Instant(0),
        }
    }

    fn ping(&mut self, now: Instant) {
        match self.pinged {
            Some((_, at)) if at.after_ms(SILENCE_MS[self.hello.lane as usize]) <= now => self.give_up(LinkEnd::Silent),
            None if self.ping_at <= now => {
                self.close_batch();
                let correlation_id = self.next_id();
                self.pinged = Some((correlation_id, now));
                self.put(PING, correlation_id, &[]);
            }
            _ => {}
        }
    }

    fn put(&mut self, method: &'static str, correlation_id: i64, message: &[u8]) {
        let mut out = BytesMut::new();
        let head = RequestHead { service: SERVICE, method, log_id: None, correlation_id };
        put_request_bytes(&mut out, &head, message, 0);
        self.outbox.push(out.freeze(), []);
    }

    /// There is something that [`Self::take_send`] would give.
    #[must_use]
    pub fn wants_send(&self) -> bool {
        match self.state {
            State::Up => self.backlog() > 0,
            State::Greeting(_) => self.outbox.backlog() > 0,
            _ => false,
        }
    }

    /// End the connection, if there is one; [`Self::poll`] says the rest.
    pub fn give_up(&mut self, why: LinkEnd) {
        if matches!(self.state, State::Greeting(_) | State::Up) {
            self.state = State::Ending;
            self.end = Some(why);
        }
    }

    /// How [`Do::Dial`] went.
    pub fn dialed(&mut self, now: Instant, connected: bool, draw: u64) {
        assert!(self.state == State::Dialing, "nobody dialed");
        if !connected {
            self.end = Some(LinkEnd::Unreachable);
            return self.rest(now, draw);
        }
        self.state = State::Greeting(now.after_ms(GREET_MS));
        // Mail that waited leaves behind the greeting, as soon as it is answered.
        let id = self.next_id();
        self.put(HELLO, id, &self.hello.encode());
    }

    /// Bytes arrived. The first welcome is returned: the link is up.
    ///
    /// # Errors
    /// The connection is to be closed; `poll` says so too.
    pub fn received(&mut self, now: Instant, mut input: &[u8]) -> Result<Option<Welcome>, LinkEnd> {
        let mut welcome = None;
        loop {
            let found = match self.decoder.step(&mut input) {
                Ok(Step::NeedMore) => return Ok(welcome),
                Ok(Step::Head(head)) if head.attachment_len == 0 => self.answer(now, &head),
                Ok(_) | Err(_) => Err(LinkEnd::Protocol),
            };
            match found {
                Ok(found) => welcome = welcome.or(found),
                Err(end) => {
                    self.give_up(end);
                    return Err(end);
                }
            }
        }
    }

    fn answer(&mut self, now: Instant, head: &FrameHead) -> Result<Option<Welcome>, LinkEnd> {
        let code = head.meta.response.as_ref().map_or(0, |response| response.error_code);
        let id = head.meta.correlation_id;
        match self.state {
            State::Greeting(_) if code != 0 => Err(LinkEnd::Foreign(code)),
            State::Greeting(_) if id == self.correlation_id => self.welcomed(now, &head.body).map(Some),
            State::Up if code == 0 && self.pinged.is_some_and(|(pinged, _)| pinged == id) => {
                let sent = self.pinged.take().map_or(now, |(_, at)| at);
                (self.rtt_ns, self.failures) = (now.since_ns(sent), 0);
                self.ping_at = now.after_ms(PING_MS);
                Ok(None)
            }
            State::Ending => Ok(None),
            _ => Err(LinkEnd::Protocol),
        }
    }

    fn welcomed(&mut self, now: Instant, body: &[u8]) -> Result<Welcome, LinkEnd> {
        let welcome = match Welcome::decode(body) {
            Ok(welcome) => welcome,
            Err(PeerError::Version(_)) => return Err(LinkEnd::Refused(Status::Version)),
            Err(_) => return Err(LinkEnd::Protocol),
        };
        match welcome.status {
            // Another number of shards than thought: the caller finds out, and where to.
            Status::Ok | Status::Shard => {}
            refused => return Err(LinkEnd::Refused(refused)),
        }
        if welcome.peer != self.hello.to {
            return Err(LinkEnd::Refused(Status::NotMe));
        }
        if welcome.chunk_size != self.hello.chunk_size {
            return Err(LinkEnd::Refused(Status::ChunkSize));
        }
        self.state = State::Up;
        self.end = None;
        self.ping_at = now;
        Ok(welcome)
    }

    /// The connection is gone, whoever ended it. True if it was up or had mail: that is lost.
    pub fn closed(&mut self, now: Instant, draw: u64) -> bool {
        let lost = matches!(self.state, State::Up | State::Ending) || self.backlog() > 0;
        if self.state != State::Ending {
            self.end = Some(LinkEnd::Broken);
        }
        self.rest(now, draw);
        lost
    }

    /// The peer is alive: it has just called us. Do not wait for the end of a pause.
    pub fn nudge(&mut self) {
        if matches!(self.state, State::Pause(_)) && !self.end.is_some_and(LinkEnd::is_refusal) {
            (self.state, self.failures) = (State::Idle, 0);
        }
    }

    /// Pause before the next attempt, longer from time to time.
    fn rest(&mut self, now: Instant, draw: u64) {
        let (first, last) = if self.end.is_some_and(LinkEnd::is_refusal) { REFUSED_MS } else { PAUSE_MS };
        let pause = (first << self.failures.min(16)).min(last) * 1_000_000;
        self.failures += 1;
        self.state = State::Pause(now.after_ns(pause / 2 + draw % pause));
        (self.decoder, self.outbox, self.batch) = (Decoder::new(), Outbox::default(), BatchWriter::default());
        (self.pinged, self.ping_at, self.close_said) = (None, Instant::FAR, false);
    }
}
