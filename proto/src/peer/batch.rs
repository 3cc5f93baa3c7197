//! A batch: the messages of one turn from one shard to another, in order.
//!
//! ```text
//! version u16 | 0 u16 | count u32 | count messages                            attachment: all payloads, in order
//! message   kind u8 | flags u8 | 0 u16 | head u32 | copyset u64 |  then by kind
//!   bulk    payload u32 | 0 u32 | head bytes
//!   raft    term | log_term | index | commit | commit_term | reject_hint u64 each | entries u32 | snapshot u32
//!           | context bytes | with a snapshot: index u64, term u64, its bytes | entries
//! entry     term u64 | index u64 | payload u32 | context u32 | kind u8 | 0 u8 × 3 | context bytes
//! ```
//! Sender and addressee are those of the handshake and do not travel.

use super::{BATCH, Fields, PeerError, SERVICE, VERSION};
use crate::encode::{RequestHead, put_request_bytes};
use bytes::{BufMut, Bytes, BytesMut};

/// Bytes before the first message.
pub const BATCH_HEAD: usize = 8;
const MESSAGE_HEAD: usize = 16;
const ENTRY_HEAD: usize = 28;
const BLOCK: u32 = 4096;
const REJECT: u8 = 1;
const SNAPSHOT: u8 = 2;

/// What a receiver lets in.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Longest payload, bytes.
    pub payload_max: u32,
    /// Longest context of a message, head of bulk data or description of a snapshot, bytes.
    pub head_max: u32,
    /// Longest context of an entry behind its checksums, bytes.
    pub context_max: u32,
}

/// Kinds of raft messages that travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
#[expect(missing_docs, reason = "raft's words")]
pub enum Kind {
    Append = 1,
    AppendResponse = 2,
    RequestVote = 3,
    RequestVoteResponse = 4,
    Snapshot = 5,
    Heartbeat = 6,
    HeartbeatResponse = 7,
    TimeoutNow = 8,
    PreVote = 9,
    PreVoteResponse = 10,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Append,
        Self::AppendResponse,
        Self::RequestVote,
        Self::RequestVoteResponse,
        Self::Snapshot,
        Self::Heartbeat,
        Self::HeartbeatResponse,
        Self::TimeoutNow,
        Self::PreVote,
        Self::PreVoteResponse,
    ];
}

/// Kinds of log entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum EntryKind {
    /// An operation.
    Normal = 0,
    /// A membership change, described in the context.
    ConfChange = 1,
}

/// A log entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Of the proposal.
    pub term: u64,
    /// Place in the log.
    pub index: u64,
    /// What it is.
    pub kind: EntryKind,
    /// A CRC32C (u32 LE) for each block of the payload, then the operation's header.
    pub context: Bytes,
    /// Length of the payload, bytes; whole blocks.
    pub payload_len: u32,
    /// The payload; empty after decoding, until it is received.
    pub payload: Bytes,
}

/// What a snapshot message says of the snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Last index it holds.
    pub index: u64,
    /// Its term.
    pub term: u64,
    /// The sender's words on it.
    pub data: Bytes,
}

/// A raft message.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "raft's words")]
pub struct Raft {
    pub kind: Kind,
    pub term: u64,
    pub log_term: u64,
    pub index: u64,
    pub commit: u64,
    pub commit_term: u64,
    pub reject: bool,
    pub reject_hint: u64,
    pub context: Bytes,
    pub snapshot: Option<Snapshot>,
    pub entries: Vec<Entry>,
}

/// What a message is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// Raft's.
    Raft(Raft),
    /// Anything else shards tell each other.
    Bulk {
        /// Opaque here.
        head: Bytes,
        /// Length of the payload, bytes; whole blocks.
        payload_len: u32,
        /// The payload; empty after decoding, until it is received.
        payload: Bytes,
    },
}

/// A message between two replicas of a copyset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Group.
    pub copyset: u64,
    /// What.
    pub body: Body,
}

impl Message {
    /// The place of its `n`-th payload, counted over everything that may have one, and its length.
    pub fn payload_slot(&mut self, n: usize) -> Option<(u32, &mut Bytes)> {
        match &mut self.body {
            Body::Raft(raft) => raft.entries.get_mut(n).map(|entry| (entry.payload_len, &mut entry.payload)),
            Body::Bulk { payload_len, payload, .. } => (n == 0).then_some((*payload_len, payload)),
        }
    }
}

/// Decoded messages of a batch.
#[derive(Debug)]
pub struct Batch;

impl Batch {
    /// All messages of a batch, without their payloads.
    ///
    /// # Errors
    /// Any byte that is not as above; none of its messages counts then.
    pub fn decode(body: &Bytes, attachment_len: usize, limits: &Limits) -> Result<Vec<Message>, PeerError> {
        let mut reader = Reader { whole: body, fields: Fields(body), limits, payloads: 0 };
        match reader.fields.u16("batch")? {
            VERSION => reader.fields.zeros(2, "batch padding")?,
            other => return Err(PeerError::Version(other)),
        }
        let count = reader.fields.u32("batch")? as usize;
        if count > reader.fields.0.len() / MESSAGE_HEAD {
            return Err(PeerError::Length("message count"));
        }
        let messages = (0..count).map(|_| reader.message()).collect::<Result<Vec<_>, _>>()?;
        reader.fields.end("batch")?;
        match (reader.payloads, attachment_len as u64) {
            (said, found) if said == found => Ok(messages),
            (said, found) => Err(PeerError::Attachment { said, found }),
        }
    }
}

struct Reader<'a> {
    whole: &'a Bytes,
    fields: Fields<'a>,
    limits: &'a Limits,
    payloads: u64,
}

impl Reader<'_> {
    fn bytes(&mut self, len: u32, max: u32, what: &'static str) -> Result<Bytes, PeerError> {
        if len > max {
            return Err(PeerError::Length(what));
        }
        Ok(self.whole.slice_ref(self.fields.take(len as usize, what)?))
    }

    fn payload(&mut self, len: u32) -> Result<u32, PeerError> {
        if !len.is_multiple_of(BLOCK) || len > self.limits.payload_max {
            return Err(PeerError::Payload(len));
        }
        self.payloads += u64::from(len);
        Ok(len)
    }

    fn message(&mut self) -> Result<Message, PeerError> {
        let (kind, flags) = (self.fields.u8("message")?, self.fields.u8("message")?);
        self.fields.zeros(2, "message padding")?;
        let (head_len, copyset) = (self.fields.u32("message")?, self.fields.u64("message")?);
        let body = if kind == 0 { self.bulk(flags, head_len)? } else { Body::Raft(self.raft(kind, flags, head_len)?) };
        Ok(Message { copyset, body })
    }

    fn bulk(&mut self, flags: u8, head_len: u32) -> Result<Body, PeerError> {
        if flags != 0 {
            return Err(PeerError::Unknown { what: "flags", value: u32::from(flags) });
        }
        let len = self.fields.u32("bulk")?;
        let payload_len = self.payload(len)?;
        self.fields.zeros(4, "bulk padding")?;
        Ok(Body::Bulk { head: self.bytes(head_len, self.limits.head_max, "head")?, payload_len, payload: Bytes::new() })
    }

    fn raft(&mut self, kind: u8, flags: u8, head_len: u32) -> Result<Raft, PeerError> {
        let unknown = |what, value: u8| PeerError::Unknown { what, value: u32::from(value) };
        let found = Kind::ALL.into_iter().find(|known| *known as u8 == kind);
        let kind = found.ok_or_else(|| unknown("message kind", kind))?;
        if flags & !(REJECT | SNAPSHOT) != 0 {
            return Err(unknown("flags", flags));
        }
        let mut number = || self.fields.u64("raft message");
        let [term, log_term, index] = [number()?, number()?, number()?];
        let [commit, commit_term, reject_hint] = [number()?, number()?, number()?];
        let (count, snapshot_len) = (self.fields.u32("raft message")? as usize, self.fields.u32("raft message")?);
        let context = self.bytes(head_len, self.limits.head_max, "context")?;
        let snapshot = match flags & SNAPSHOT {
            0 if snapshot_len != 0 => return Err(PeerError::Length("snapshot")),
            0 => None,
            _ => Some(Snapshot {
                index: self.fields.u64("snapshot")?,
                term: self.fields.u64("snapshot")?,
                data: self.bytes(snapshot_len, self.limits.head_max, "snapshot")?,
            }),
        };
        if count > self.fields.0.len() / ENTRY_HEAD {
            return Err(PeerError::Length("entry count"));
        }
        let entries = (0..count).map(|_| self.entry()).collect::<Result<Vec<_>, _>>()?;
        let reject = flags & REJECT != 0;
        Ok(Raft { kind, term, log_term, index, commit, commit_term, reject, reject_hint, context, snapshot, entries })
    }

    fn entry(&mut self) -> Result<Entry, PeerError> {
        let (term, index) = (self.fields.u64("entry")?, self.fields.u64("entry")?);
        let (payload_len, context_len) = (self.fields.u32("entry")?, self.fields.u32("entry")?);
        let kind = match self.fields.u8("entry")? {
            0 => EntryKind::Normal,
            1 => EntryKind::ConfChange,
            other => return Err(PeerError::Unknown { what: "entry kind", value: u32::from(other) }),
        };
        self.fields.zeros(3, "entry padding")?;
        let payload_len = self.payload(payload_len)?;
        let crcs = payload_len / BLOCK * 4;
        if context_len < crcs || (kind == EntryKind::ConfChange && payload_len > 0) {
            return Err(PeerError::Payload(payload_len));
        }
        let context = self.bytes(context_len, crcs.saturating_add(self.limits.context_max), "entry context")?;
        Ok(Entry { term, index, kind, context, payload_len, payload: Bytes::new() })
    }
}

/// Collects messages into a batch.
#[derive(Debug, Default)]
pub struct BatchWriter {
    body: BytesMut,
    count: u32,
    payloads: Vec<Bytes>,
    payload_bytes: usize,
}

impl BatchWriter {
    /// Nothing was pushed.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
    /// Bytes of the batch, without its payloads.
    pub fn head_bytes(&self) -> usize {
        self.body.len()
    }
    /// Bytes of its payloads.
    pub fn payload_bytes(&self) -> usize {
        self.payload_bytes
    }

    /// Append a message.
    pub fn push(&mut self, message: Message) {
        self.begin();
        self.count += 1;
        match message.body {
            Body::Bulk { head, payload, .. } => {
                self.head(0, 0, head.len(), message.copyset);
                self.body.put_u32_le(payload.len() as u32);
                self.body.put_u32_le(0);
                self.body.put_slice(&head);
                self.payload(payload);
            }
            Body::Raft(raft) => self.raft(message.copyset, raft),
        }
    }

    fn begin(&mut self) {
        if self.body.is_empty() {
            self.body.put_u16_le(VERSION);
            self.body.put_u16_le(0);
            self.body.put_u32_le(0);
        }
    }

    fn head(&mut self, kind: u8, flags: u8, len: usize, copyset: u64) {
        self.body.put_slice(&[kind, flags, 0, 0]);
        self.body.put_u32_le(len as u32);
        self.body.put_u64_le(copyset);
    }

    fn payload(&mut self, payload: Bytes) {
        if !payload.is_empty() {
            self.payload_bytes += payload.len();
            self.payloads.push(payload);
        }
    }

    fn raft(&mut self, copyset: u64, raft: Raft) {
        let flags = (u8::from(raft.reject) * REJECT) | (u8::from(raft.snapshot.is_some()) * SNAPSHOT);
        self.head(raft.kind as u8, flags, raft.context.len(), copyset);
        for number in [raft.term, raft.log_term, raft.index, raft.commit, raft.commit_term, raft.reject_hint] {
            self.body.put_u64_le(number);
        }
        self.body.put_u32_le(raft.entries.len() as u32);
        self.body.put_u32_le(raft.snapshot.as_ref().map_or(0, |snapshot| snapshot.data.len() as u32));
        self.body.put_slice(&raft.context);
        if let Some(snapshot) = &raft.snapshot {
            self.body.put_u64_le(snapshot.index);
            self.body.put_u64_le(snapshot.term);
            self.body.put_slice(&snapshot.data);
        }
        for entry in raft.entries {
            self.body.put_u64_le(entry.term);
            self.body.put_u64_le(entry.index);
            self.body.put_u32_le(entry.payload.len() as u32);
            self.body.put_u32_le(entry.context.len() as u32);
            self.body.put_slice(&[entry.kind as u8, 0, 0, 0]);
            self.body.put_slice(&entry.context);
            self.payload(entry.payload);
        }
    }

    /// The frame up to its attachment, appended to `out`, and the attachment's parts. The writer is empty again.
    pub fn finish(&mut self, out: &mut BytesMut, correlation_id: i64) -> Vec<Bytes> {
        self.begin();
        if let Some(place) = self.body.get_mut(4..BATCH_HEAD) {
            place.copy_from_slice(&self.count.to_le_bytes());
        }
        let head = RequestHead { service: SERVICE, method: BATCH, log_id: None, correlation_id };
        put_request_bytes(out, &head, &self.body, self.payload_bytes);
        self.body.clear();
        (self.count, self.payload_bytes) = (0, 0);
        std::mem::take(&mut self.payloads)
    }
}
