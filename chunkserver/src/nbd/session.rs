//! One NBD connection: bytes in, volume I/Os out; their results in, bytes out.
//!
//! ```text
//!  input ─► negotiation ─► header ─► payload ─► NbdEvent::Io ─► (the caller runs the VolumeIo) ─► done() ─► take_send()
//! ```
//!
//! Invariants: each request is answered once, in any order; what a session holds (payloads, reads not yet sent, replies)
//! is at most its byte limit plus one request and one list of exports; payload buffers are taken all at once or not at
//! all; after an error the session is dead and the connection must be closed.

mod saved;

pub use saved::Saved;

use super::export::{self, FLAGS, errno_of};
use super::outbox::{Outbox, SEND_BUFS_MAX};
use super::payload::PayloadReceiver;
use crate::io::Instant;
use crate::io::buffer::{Arena, PoolBuf};
use crate::volume::Volume;
use crate::volume::catalog::SharedCatalog;
use crate::volume::io::{IoKind, Pieces, VolumeError, VolumeIo};
use bytes::Bytes;
use proto::nbd::negotiation::{self, put_ack, put_error, put_export, put_list_entry};
use proto::nbd::transmission::{BadRequestMagic, RequestDecoder};
use proto::nbd::{
    BLOCK_SIZE, ClientOption, Command, Haggle, MAX_PAYLOAD, Negotiation, NegotiationError, Request, errno, option,
    reply, simple_reply,
};
use slab::Slab;
use smallvec::SmallVec;
use std::sync::Arc;

/// With fewer bytes of a payload missing than this, receiving straight into its buffer saves nothing.
const DIRECT_BYTES_MIN: usize = 64 << 10;
/// With more bytes of small replies than this not yet sent, nothing more is asked for. (A client that haggles or errs
/// for ever without reading.)
const REPLY_BYTES_MAX: usize = 64 << 10;

/// How much one session may hold and how long its I/O may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Requests not yet answered.
    pub requests: usize,
    /// Payloads and reads of these requests, and replies not yet sent.
    pub bytes: usize,
    /// I/O that is refused for a passing reason is asked again for this long.
    pub io_timeout_ms: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { requests: 256, bytes: MAX_PAYLOAD as usize, io_timeout_ms: 30_000 }
    }
}

/// What the caller is to do.
#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "nearly every event is the large one; a box would be an allocation per I/O"
)]
pub enum NbdEvent {
    /// Run it; then [`Session::done`] with this id.
    Io {
        /// Names the request.
        id: u32,
        /// What.
        io: VolumeIo,
    },
    /// The client is leaving: receive no more, close when [`Session::is_finished`].
    Disconnect,
}

/// How far the input was used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// All of it.
    Consumed,
    /// Not all: no buffer is free, or the session holds as much as it may. Keep the rest (it may be empty) and call again
    /// after a reply was sent or memory was freed; receive nothing more before.
    Stalled,
}

/// Why the connection must be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    /// While negotiating.
    #[error("NBD negotiation: {0}")]
    Negotiation(#[from] NegotiationError),
    /// An export that does not exist, chosen in a way that has no other answer.
    #[error("the client chose an unknown export")]
    UnknownExport,
    /// No request where one must begin.
    #[error("NBD transmission: {0}")]
    Request(#[from] BadRequestMagic),
    /// The session failed before.
    #[error("the session has failed")]
    Failed,
}

#[derive(Debug)]
enum Phase {
    Negotiating(Negotiation),
    /// Where a request begins or in its header.
    Header,
    /// The header of a write is here, memory for its payload is not.
    Admit(Request),
    Payload(Request, PayloadReceiver),
    /// Payload of a refused write.
    Skip {
        left: usize,
        cookie: u64,
        error: u32,
    },
    /// The client left: finish what is in flight.
    Leaving,
    Failed,
}

/// A request in flight.
#[derive(Debug)]
struct InFlight {
    cookie: u64,
    /// What it counts against the limit.
    bytes: usize,
}

/// One connection.
#[derive(Debug)]
pub struct Session {
    exports: SharedCatalog,
    limits: Limits,
    phase: Phase,
    volume: Option<Arc<Volume>>,
    decoder: RequestDecoder,
    in_flight: Slab<InFlight>,
    in_flight_bytes: usize,
    outbox: Outbox,
}

impl Session {
    /// A fresh connection; the greeting is ready to be sent.
    #[must_use]
    pub fn new(exports: SharedCatalog, limits: Limits) -> Self {
        let mut outbox = Outbox::default();
        outbox.put(&negotiation::greeting());
        Self {
            exports,
            limits,
            phase: Phase::Negotiating(Negotiation::new()),
            volume: None,
            decoder: RequestDecoder::new(),
            in_flight: Slab::new(),
            in_flight_bytes: 0,
            outbox,
        }
    }

    /// Take received bytes from the front of `input`.
    ///
    /// # Errors
    /// [`CloseReason`]: close the connection, drop the session.
    pub fn received(
        &mut self,
        now: Instant,
        input: &mut &[u8],
        arena: &Arc<Arena>,
        out: &mut Vec<NbdEvent>,
    ) -> Result<Progress, CloseReason> {
        loop {
            match self.step(now, input, arena, out) {
                Ok(Step::Again) => {}
                Ok(Step::Hungry) => return Ok(Progress::Consumed),
                Ok(Step::Stalled) => return Ok(Progress::Stalled),
                Err(reason) => {
                    self.phase = Phase::Failed;
                    return Err(reason);
                }
            }
        }
    }

    /// Whether the caller should receive at all. While false the client waits in its socket. It changes with
    /// [`Self::done`], [`Self::sent`] and, after [`Progress::Stalled`], with another call of [`Self::received`].
    #[must_use]
    pub fn may_receive(&self) -> bool {
        match &self.phase {
            Phase::Payload(..) | Phase::Skip { .. } => true,
            Phase::Negotiating(_) | Phase::Header => self.has_room(),
            Phase::Admit(_) | Phase::Leaving | Phase::Failed => false,
        }
    }

    /// A payload buffer to receive into, and how much of it is filled, when that is worth it. Until it is given back
    /// with [`Self::direct_done`] no bytes may be given to [`Self::received`].
    pub fn direct(&mut self) -> Option<(PoolBuf, usize)> {
        match &mut self.phase {
            Phase::Payload(_, receiver) => receiver.lend(DIRECT_BYTES_MIN),
            _ => None,
        }
    }

    /// The buffer of [`Self::direct`] with `added` more bytes in it.
    pub fn direct_done(&mut self, now: Instant, buf: PoolBuf, added: usize, out: &mut Vec<NbdEvent>) {
        let Phase::Payload(_, receiver) = &mut self.phase else { panic!("a buffer came back that was not lent") };
        receiver.give_back(buf, added);
        self.finish_payload(now, out);
    }

    /// The I/O of an [`NbdEvent::Io`] ended.
    pub fn done(&mut self, id: u32, result: Result<Pieces, VolumeError>) {
        let InFlight { cookie, bytes } = self.in_flight.remove(id as usize);
        self.in_flight_bytes -= bytes;
        match result {
            Ok(pieces) => {
                self.outbox.put(&simple_reply(0, cookie));
                pieces.into_iter().for_each(|piece| self.outbox.share(piece));
            }
            Err(error) => self.outbox.put(&simple_reply(errno_of(error), cookie)),
        }
    }

    /// The next bytes to send, empty when there are none. One send at a time; [`Self::sent`] ends it.
    pub fn take_send(&mut self) -> SmallVec<[Bytes; SEND_BUFS_MAX]> {
        self.outbox.take()
    }

    /// The send in flight ended.
    pub fn sent(&mut self) {
        self.outbox.sent();
    }

    /// Waits for a payload buffer.
    #[must_use]
    pub const fn wants_buffer(&self) -> bool {
        matches!(self.phase, Phase::Admit(_))
    }

    /// A payload is being received, and has its buffers.
    #[must_use]
    pub const fn holds_payload(&self) -> bool {
        matches!(self.phase, Phase::Payload(..))
    }

    /// Bytes that wait to be sent or are being sent.
    #[must_use]
    pub fn backlog_bytes(&self) -> usize {
        self.outbox.bytes()
    }

    /// Requests not yet answered.
    #[must_use]
    pub fn requests_in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// The client left and everything it asked for is answered and sent: close the connection.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        matches!(self.phase, Phase::Leaving) && self.in_flight.is_empty() && self.outbox.is_empty()
    }

    /// Whether the stream may end here without cutting something short.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        matches!(self.phase, Phase::Header | Phase::Leaving) && self.decoder.is_idle() && self.in_flight.is_empty()
    }

    /// The volume in use, once chosen.
    #[must_use]
    pub const fn volume(&self) -> Option<&Arc<Volume>> {
        self.volume.as_ref()
    }

    fn has_room(&self) -> bool {
        self.in_flight.len() < self.limits.requests
            && self.in_flight_bytes + self.outbox.bytes() < self.limits.bytes
            && self.outbox.reply_bytes() < REPLY_BYTES_MAX
    }

    fn step(
        &mut self,
        now: Instant,
        input: &mut &[u8],
        arena: &Arc<Arena>,
        out: &mut Vec<NbdEvent>,
    ) -> Result<Step, CloseReason> {
        if matches!(self.phase, Phase::Negotiating(_) | Phase::Header) && !self.has_room() {
            return Ok(if input.is_empty() { Step::Hungry } else { Step::Stalled });
        }
        match &mut self.phase {
            Phase::Negotiating(negotiation) => match negotiation.step(input)? {
                Some(option) => self.option(option, out).map(|()| Step::Again),
                None => Ok(Step::Hungry),
            },
            Phase::Header => match self.decoder.step(input)? {
                Some(request) => {
                    self.request(now, request, out);
                    Ok(Step::Again)
                }
                None => Ok(Step::Hungry),
            },
            Phase::Admit(request) => {
                let request = *request;
                Ok(self.admit(request, arena))
            }
            Phase::Payload(_, receiver) => {
                receiver.take(input);
                if receiver.is_complete() {
                    self.finish_payload(now, out);
                    return Ok(Step::Again);
                }
                Ok(Step::Hungry)
            }
            Phase::Skip { left, .. } => {
                let count = (*left).min(input.len());
                *left -= count;
                *input = input.get(count..).unwrap_or_default();
                Ok(self.finish_skip())
            }
            Phase::Leaving => {
                *input = &[];
                Ok(Step::Hungry)
            }
            Phase::Failed => Err(CloseReason::Failed),
        }
    }

    fn option(&mut self, option: ClientOption, out: &mut Vec<NbdEvent>) -> Result<(), CloseReason> {
        let catalog = self.exports.snapshot();
        match option {
            ClientOption::ExportName(name) => {
                let volume = Arc::clone(export::find(&catalog, &name).ok_or(CloseReason::UnknownExport)?);
                let no_zeroes = matches!(&self.phase, Phase::Negotiating(n) if n.no_zeroes());
                self.outbox.write(|buf| put_export(buf, volume.size(), FLAGS, no_zeroes));
                self.start(volume);
            }
            ClientOption::Abort => {
                self.outbox.write(|buf| put_ack(buf, option::ABORT));
                self.leave(out);
            }
            ClientOption::List => self.outbox.write(|buf| {
                catalog.volumes().for_each(|volume| put_list_entry(buf, volume.name()));
                put_ack(buf, option::LIST);
            }),
            ClientOption::Info(haggle) => {
                self.describe(option::INFO, export::find(&catalog, &haggle.name), &haggle);
            }
            ClientOption::Go(haggle) => {
                let volume = export::find(&catalog, &haggle.name);
                self.describe(option::GO, volume, &haggle);
                if let Some(volume) = volume {
                    self.start(Arc::clone(volume));
                }
            }
            ClientOption::Refuse { option, reply, text } => {
                self.outbox.write(|buf| put_error(buf, option, reply, text));
            }
        }
        Ok(())
    }

    /// Answer INFO or GO. Block sizes are sent to whoever asks or not: requests of any other alignment are refused.
    fn describe(&mut self, option: u32, volume: Option<&Arc<Volume>>, haggle: &Haggle) {
        self.outbox.write(|buf| {
            let Some(volume) = volume else {
                return put_error(buf, option, reply::ERR_UNKNOWN, "no such export");
            };
            negotiation::put_info_export(buf, option, volume.size(), FLAGS);
            negotiation::put_info_block_size(buf, option);
            if haggle.wants_name {
                negotiation::put_info_name(buf, option, volume.name());
            }
            put_ack(buf, option);
        });
    }

    fn start(&mut self, volume: Arc<Volume>) {
        self.volume = Some(volume);
        self.phase = Phase::Header;
    }

    fn leave(&mut self, out: &mut Vec<NbdEvent>) {
        self.phase = Phase::Leaving;
        out.push(NbdEvent::Disconnect);
    }

    fn request(&mut self, now: Instant, request: Request, out: &mut Vec<NbdEvent>) {
        if request.command == Command::Disconnect {
            return self.leave(out);
        }
        if let Err(error) = self.check(&request) {
            return self.refuse(&request, error);
        }
        match request.command {
            Command::Write => self.phase = Phase::Admit(request),
            Command::Read => self.begin(now, &request, IoKind::Read, request.length as usize, out),
            Command::Trim | Command::WriteZeroes => self.begin(now, &request, IoKind::Zero, 0, out),
            // Every write answered so far is committed.
            Command::Flush => self.outbox.put(&simple_reply(0, request.cookie)),
            Command::Disconnect | Command::Cache | Command::Other(_) => self.refuse(&request, errno::EINVAL),
        }
    }

    fn check(&self, request: &Request) -> Result<(), u32> {
        let volume = self.volume.as_deref().ok_or(errno::EINVAL)?;
        request.check(volume.size(), BLOCK_SIZE, MAX_PAYLOAD)?;
        if request.command != Command::Flush && volume.is_deleted() { Err(errno::ESHUTDOWN) } else { Ok(()) }
    }

    fn refuse(&mut self, request: &Request, error: u32) {
        self.phase = Phase::Skip { left: request.payload_len() as usize, cookie: request.cookie, error };
    }

    fn finish_skip(&mut self) -> Step {
        let Phase::Skip { left: 0, cookie, error } = self.phase else { return Step::Hungry };
        self.outbox.put(&simple_reply(error, cookie));
        self.phase = Phase::Header;
        Step::Again
    }

    /// Take the memory for a payload.
    fn admit(&mut self, request: Request, arena: &Arc<Arena>) -> Step {
        let Some(volume) = &self.volume else { return Step::Stalled };
        let extents = volume.geometry().extents(request.offset, u64::from(request.length));
        match PayloadReceiver::new(extents.map(|extent| extent.len), arena) {
            Some(receiver) => self.phase = Phase::Payload(request, receiver),
            // It would wait for ever.
            None if request.length as usize > arena.size() / 2 => self.refuse(&request, errno::ENOMEM),
            None => return Step::Stalled,
        }
        Step::Again
    }

    fn finish_payload(&mut self, now: Instant, out: &mut Vec<NbdEvent>) {
        if !matches!(&self.phase, Phase::Payload(_, receiver) if receiver.is_complete()) {
            return;
        }
        if let Phase::Payload(request, receiver) = std::mem::replace(&mut self.phase, Phase::Header) {
            let kind = IoKind::Write(receiver.finish());
            self.begin(now, &request, kind, request.length as usize, out);
        }
    }

    fn begin(&mut self, now: Instant, request: &Request, kind: IoKind, bytes: usize, out: &mut Vec<NbdEvent>) {
        let Some(volume) = &self.volume else { return };
        let deadline = now.after_ms(self.limits.io_timeout_ms);
        match VolumeIo::new(volume, kind, request.offset, u64::from(request.length), deadline) {
            Ok(io) => {
                let id = self.in_flight.insert(InFlight { cookie: request.cookie, bytes }) as u32;
                self.in_flight_bytes += bytes;
                out.push(NbdEvent::Io { id, io });
            }
            Err(error) => self.outbox.put(&simple_reply(errno_of(error), request.cookie)),
        }
    }
}

enum Step {
    Again,
    /// More bytes are needed.
    Hungry,
    /// Something else than bytes is needed.
    Stalled,
}
