//! The called end of a connection: who may speak, and mail out of a byte stream.
//!
//! Promises
//! * The same mail whatever the split of the stream. A payload goes into a pool buffer of its own, taken when the frame's
//!   lengths are known (rule 15); each byte is copied once and checksummed in that pass.
//! * A message with an entry whose payload has other checksums than its context says is dropped and counted; what else
//!   the frame holds is delivered. Anything else that is wrong ends the connection, before any of the frame is used.

use super::convert::{crcs_match, from_wire};
use crate::io::Instant;
use crate::io::buffer::{Arena, PoolBuf};
use crate::limits::PEER_HEAD_BYTES_MAX;
use crate::rpc::Attachment;
use crate::rpc::outbox::{Outbox, SendBufs};
use crate::rpc::payload::Fill;
use crate::shard::mail::PeerMail;
use bytes::{Bytes, BytesMut};
use proto::frame::{Decoder, FrameHead, Step, put_response_bytes};
use proto::peer::{BATCH, Batch, Body, EntryKind, Hello, Lane, Limits, Message, PING, PeerError, SERVICE, Status};
use proto::peer::{HELLO, Welcome};
use std::sync::Arc;

/// Answers to pings that a peer does not read; above it, it is not read either.
const ANSWERS_MAX: usize = 4096;
/// A peer that said nothing for so long is not there any more, milliseconds: it pings far more often.
const SILENCE_MS: u64 = 10_000;

/// Who we are, for handshakes.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Own peer id.
    pub peer: u64,
    /// This shard.
    pub shard: u16,
    /// Shards of this process.
    pub shards: u16,
    /// Chunk size of the disk, bytes.
    pub chunk_size: u32,
    /// Identity of the disk.
    pub disk: [u8; 16],
    /// Identity of the cluster; zeros = unknown.
    pub cluster: [u8; 16],
}

impl Identity {
    /// The answer to a hello.
    #[must_use]
    pub fn welcome(&self, status: Status) -> Welcome {
        Welcome { status, chunk_size: self.chunk_size, peer: self.peer, shards: self.shards, disk: self.disk }
    }
}

/// Whether whoever says this hello may speak to us; the shard it wants may be another one of this process.
#[must_use]
pub fn judge(me: &Identity, hello: &Hello) -> Status {
    let clusters = hello.cluster != me.cluster && hello.cluster != [0; 16] && me.cluster != [0; 16];
    if hello.to != me.peer {
        Status::NotMe
    } else if hello.from == me.peer || hello.from == 0 {
        Status::Duplicate
    } else if clusters {
        Status::Cluster
    } else if hello.chunk_size != me.chunk_size {
        Status::ChunkSize
    } else if hello.to_shard >= me.shards {
        Status::Shard
    } else {
        Status::Ok
    }
}

/// How far the input was used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// All of it.
    Consumed,
    /// No payload buffer is free. Keep the rest of the input and call again when buffers came back.
    NoBuffer,
    /// The peer does not read its answers. Keep the rest and call again when some were sent.
    Later,
}

/// Why a connection is to be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Bad {
    /// The stream cannot be followed.
    #[error(transparent)]
    Frame(#[from] proto::frame::FrameError),
    /// A frame that makes no sense here.
    #[error("a frame that makes no sense on a peer's connection")]
    Call,
    /// A batch that makes no sense.
    #[error(transparent)]
    Batch(#[from] PeerError),
}

/// A batch whose payloads are being received.
#[derive(Debug)]
struct Receiving {
    messages: std::vec::IntoIter<Message>,
    current: Option<Message>,
    /// The payload of `current` that is being received or waited for.
    place: usize,
    fill: Option<Fill>,
    /// An entry of `current` has a payload with wrong checksums.
    rotten: bool,
    /// The frame has an attachment.
    attached: bool,
}

/// See the module's text.
#[derive(Debug)]
pub struct Inbound {
    hello: Hello,
    limits: Limits,
    decoder: Decoder,
    receiving: Option<Box<Receiving>>,
    outbox: Outbox,
    refused: bool,
    /// When something came last; `None`: nobody has looked yet.
    heard: Option<Instant>,
    bad_crcs: u64,
    bad_mail: u64,
}

impl Inbound {
    /// Answers the hello of call `correlation_id`; with another status than `Ok` it is over when that is sent.
    #[must_use]
    pub fn new(me: &Identity, hello: Hello, correlation_id: i64, status: Status) -> Self {
        let mut out = BytesMut::new();
        put_response_bytes(&mut out, correlation_id, &me.welcome(status).encode());
        let mut outbox = Outbox::default();
        outbox.push(out.freeze(), []);
        let head_max = PEER_HEAD_BYTES_MAX as u32;
        Self {
            hello,
            limits: Limits { payload_max: me.chunk_size, head_max, context_max: copyset::HEADER_MAX as u32 },
            decoder: Decoder::new(),
            receiving: None,
            outbox,
            refused: status != Status::Ok,
            heard: None,
            bad_crcs: 0,
            bad_mail: 0,
        }
    }

    /// Who is at the other end, as it said.
    #[must_use]
    pub fn hello(&self) -> &Hello {
        &self.hello
    }
    /// For what.
    #[must_use]
    pub fn lane(&self) -> Lane {
        self.hello.lane
    }
    /// Something arrived.
    pub fn heard(&mut self, now: Instant) {
        self.heard = Some(now);
    }
    /// Nobody is at the other end any more. To be asked from time to time: while nothing is read, nothing can be heard.
    pub fn is_silent(&mut self, now: Instant) -> bool {
        if !self.may_receive() {
            self.heard = Some(now);
        }
        self.heard.get_or_insert(now).after_ms(SILENCE_MS) <= now
    }
    /// Messages dropped since the last call: for a payload with wrong checksums, for a membership change not understood.
    pub fn take_bad(&mut self) -> (u64, u64) {
        (std::mem::take(&mut self.bad_crcs), std::mem::take(&mut self.bad_mail))
    }

    /// Bytes arrived. Mail that is complete is appended to `out`.
    ///
    /// # Errors
    /// The connection is to be closed; mail already in `out` counts.
    pub fn received(
        &mut self,
        input: &mut &[u8],
        arena: &Arc<Arena>,
        out: &mut Vec<PeerMail>,
    ) -> Result<Progress, Bad> {
        loop {
            if let Some(receiving) = self.receiving.take() {
                if let Some(progress) = self.payloads(receiving, input, arena, out) {
                    return Ok(progress);
                }
                continue;
            }
            if input.is_empty() {
                return Ok(Progress::Consumed);
            }
            if !self.may_receive() {
                return Ok(Progress::Later);
            }
            match self.decoder.step(input)? {
                Step::NeedMore => return Ok(Progress::Consumed),
                Step::Head(head) => self.head(&head)?,
                Step::Reject(_) | Step::Http(_) => return Err(Bad::Call),
            }
        }
    }

    fn head(&mut self, head: &FrameHead) -> Result<(), Bad> {
        let (service, method) = head.meta.names();
        if service != SERVICE.as_bytes() || self.refused {
            return Err(Bad::Call);
        }
        if method == BATCH.as_bytes() {
            let messages = Batch::decode(&head.body, head.attachment_len, &self.limits)?.into_iter();
            let attached = head.attachment_len > 0;
            let receiving = Receiving { messages, current: None, place: 0, fill: None, rotten: false, attached };
            self.receiving = Some(Box::new(receiving));
            return Ok(());
        }
        if method != PING.as_bytes() || head.attachment_len > 0 || !head.body.is_empty() {
            return Err(Bad::Call);
        }
        let mut out = BytesMut::new();
        put_response_bytes(&mut out, head.meta.correlation_id, &[]);
        self.outbox.push(out.freeze(), []);
        Ok(())
    }

    /// Receive payloads and hand out messages as they become complete; `None` when the batch is.
    fn payloads(
        &mut self,
        mut batch: Box<Receiving>,
        input: &mut &[u8],
        arena: &Arc<Arena>,
        out: &mut Vec<PeerMail>,
    ) -> Option<Progress> {
        let stopped = loop {
            if batch.current.is_none() {
                batch.current = batch.messages.next();
                (batch.place, batch.rotten) = (0, false);
            }
            let Some(message) = &mut batch.current else {
                // No message is left, and by their lengths nothing of the attachment either.
                if batch.attached {
                    self.decoder.attachment_done();
                }
                return None;
            };
            let Some((len, _)) = message.payload_slot(batch.place) else {
                self.complete(&mut batch, out);
                continue;
            };
            if len == 0 {
                batch.place += 1;
                continue;
            }
            let Some(fill) = &mut batch.fill else {
                match arena.alloc(len as usize) {
                    Some(buf) => batch.fill = Some(Fill::new(buf)),
                    None => break Progress::NoBuffer,
                }
                continue;
            };
            fill.take(input);
            if !fill.is_complete() {
                break Progress::Consumed;
            }
            batch.filled();
        };
        self.receiving = Some(batch);
        Some(stopped)
    }

    fn complete(&mut self, batch: &mut Receiving, out: &mut Vec<PeerMail>) {
        let Some(message) = batch.current.take() else { return };
        if std::mem::take(&mut batch.rotten) {
            self.bad_crcs += 1;
            return;
        }
        match from_wire(message, self.hello.from, self.hello.to) {
            Ok(mail) => out.push(mail),
            Err(_) => self.bad_mail += 1,
        }
    }

    /// The payload buffer, and how many of its bytes are in use, if the kernel should receive the rest straight into it.
    pub fn direct(&mut self) -> Option<(PoolBuf, usize)> {
        self.receiving.as_mut()?.fill.as_mut()?.lend()
    }

    /// The kernel is done with the buffer of [`Self::direct`] and added so many bytes. What became complete is handed out
    /// by the next [`Self::received`], which needs no input for it.
    pub fn direct_done(&mut self, buf: PoolBuf, added: usize) {
        let fill = self.receiving.as_mut().and_then(|batch| batch.fill.as_mut());
        fill.expect("no payload buffer was lent").returned(buf, added);
    }

    /// A payload is being received, and has its buffer.
    #[must_use]
    pub fn holds_payload(&self) -> bool {
        self.receiving.as_ref().is_some_and(|batch| batch.fill.is_some())
    }

    /// It waits for a payload buffer.
    #[must_use]
    pub fn wants_buffer(&self) -> bool {
        self.receiving.as_ref().is_some_and(|batch| batch.fill.is_none())
    }

    /// Whether to read from the socket.
    #[must_use]
    pub fn may_receive(&self) -> bool {
        !self.wants_buffer() && !self.refused && self.outbox.backlog() < ANSWERS_MAX
    }

    /// Buffers for the next send.
    pub fn take_send(&mut self, max_bufs: usize) -> SendBufs {
        self.outbox.take(max_bufs)
    }
    /// The send completed.
    pub fn sent(&mut self) {
        self.outbox.sent();
    }
    /// The refusal is said: close it.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.refused && self.outbox.backlog() == 0
    }
}

impl Receiving {
    /// The payload is there: check it and put it where it belongs.
    fn filled(&mut self) {
        let Some(Attachment::Data { data, crcs }) = self.fill.take().map(Fill::finish) else { return };
        let Some(message) = &mut self.current else { return };
        if let Body::Raft(raft) = &message.body
            && let Some(entry) = raft.entries.get(self.place)
            && entry.kind == EntryKind::Normal
        {
            self.rotten |= !crcs_match(&entry.context, &crcs);
        }
        if let Some((_, payload)) = message.payload_slot(self.place) {
            *payload = data;
        }
        self.place += 1;
    }
}

/// Whether these names are those of the call that opens a peer's connection.
#[must_use]
pub fn is_hello(service: &[u8], method: &[u8]) -> bool {
    service == SERVICE.as_bytes() && method == HELLO.as_bytes()
}

/// The hello of a call's message, or how to refuse it.
///
/// # Errors
/// The status to answer.
pub fn read_hello(body: &Bytes) -> Result<Hello, Status> {
    Hello::decode(body).map_err(|error| match error {
        PeerError::Version(_) => Status::Version,
        _ => Status::Malformed,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_not_listened_to_is_not_silent() {
        let (disk, cluster) = ([1; 16], [0; 16]);
        let me = Identity { peer: 2, shard: 0, shards: 1, chunk_size: 4096, disk, cluster };
        let (lane, chunk_size, from, to) = (Lane::Data, 4096, 1, 2);
        let hello = Hello { lane, chunk_size, from, to, from_shard: 0, to_shard: 0, shards: 1, disk, cluster };
        let at = |seconds: u64| Instant(seconds * 1_000_000_000);
        let mut inbound = Inbound::new(&me, hello, 1, Status::Ok);
        assert!(!inbound.is_silent(at(100)) && !inbound.is_silent(at(109)));
        inbound.heard(at(109));
        assert!(!inbound.is_silent(at(118)));
        // It does not read its answers, so it is not read.
        inbound.outbox.push(Bytes::from(vec![0; ANSWERS_MAX]), []);
        assert!(!inbound.may_receive() && !inbound.is_silent(at(200)));
        inbound.take_send(8);
        inbound.sent();
        assert!(inbound.may_receive() && !inbound.is_silent(at(209)) && inbound.is_silent(at(210)));
    }
}
