//! What a copyset asks of its shard. Effects are handled in the order they were left.

use bytes::Bytes;
use raft::eraftpb::{Message, MessageType};
use raftlog::BLOCK;

/// A committed and durable entry, in log order; indexes are contiguous.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    /// Log index.
    pub index: u64,
    /// Term it was proposed in.
    pub term: u64,
    /// Of the proposal, if it was proposed here and since the last restart or loss of leadership.
    pub cookie: Option<u64>,
    /// Block CRCs (u32 little-endian each), then the operation's header. Empty for [`Self::is_internal`] entries.
    pub context: Bytes,
    /// Data. Empty although `payload_len` is not: no longer in memory, to be fetched from the log.
    pub payload: Bytes,
    /// Length of the data.
    pub payload_len: usize,
}

impl Committed {
    /// True for a new leader's first entry and for membership changes. The copyset has applied what they mean; the
    /// shard has nothing to do with them but to call `applied` in order.
    #[must_use]
    pub fn is_internal(&self) -> bool {
        self.context.is_empty()
    }

    /// True if the data must be fetched from the log first.
    #[must_use]
    pub fn is_absent(&self) -> bool {
        self.payload.is_empty() && self.payload_len > 0
    }

    /// The operation's header: what follows the CRCs. `None` if the context is shorter than its CRCs.
    #[must_use]
    pub fn header(&self) -> Option<&[u8]> {
        self.context.get(self.payload_len / BLOCK * 4..)
    }

    /// CRC32C of each block of the payload.
    pub fn crcs(&self) -> impl ExactSizeIterator<Item = u32> {
        let end = (self.payload_len / BLOCK * 4).min(self.context.len());
        let crcs = self.context.get(..end).unwrap_or_default();
        crcs.as_chunks::<4>().0.iter().map(|crc| u32::from_le_bytes(*crc))
    }
}

/// A wish or a notice.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Apply this entry, then call `Copyset::applied` with its index.
    Apply(Committed),
    /// A proposal's answer will not come from an `Apply` with its cookie: leadership or term was lost.
    Dropped {
        /// Of the proposal.
        cookie: u64,
        /// False: it is gone for good. True: it is in the log, so a later leader may still commit it, then without a
        /// cookie. The client is redirected in both cases; what was reserved for the operation may be released only
        /// if this is false.
        may_commit: bool,
    },
    /// Send to `message.to`. Whatever had to be durable first is. In order per peer and [`lane`].
    Send(Box<Message>),
    /// The leader, the term or this replica's readiness to lead changed.
    LeaderChanged {
        /// The leader, 0 if unknown.
        leader: u64,
        /// Current term.
        term: u64,
        /// This replica leads and may propose: see `Copyset::is_leader_ready`.
        ready: bool,
    },
    /// A read of `Copyset::read_index` may be answered from the applied state as it is now.
    ReadReady {
        /// Of the read.
        cookie: u64,
    },
    /// A read of `Copyset::read_index` is another leader's to answer.
    ReadDropped {
        /// Of the read.
        cookie: u64,
    },
    /// A peer needs the entries `low..high`, and payloads of them are no longer in memory. Read them from the log,
    /// give them to `Log::restore`, then call `Copyset::fetched`. One at a time.
    Fetch {
        /// First entry.
        low: u64,
        /// The one after the last.
        high: u64,
    },
    /// A peer needs entries that are no longer in the log. The checkpoint at `index` is offered to it; it will ask for
    /// the chunks. If the log keeps its tail behind `index` meanwhile, one transfer is enough.
    SnapshotNeeded {
        /// Who.
        peer: u64,
        /// Of the checkpoint.
        index: u64,
        /// Term of `index`.
        term: u64,
        /// Configuration at `index`, as in a checkpoint.
        conf: Bytes,
    },
    /// The leader's log no longer has what this replica needs next. Get its chunks, at least as new as `index`, make
    /// them durable, then call `Copyset::install_snapshot`. Comes again until that is done; a newer one replaces it.
    SnapshotOffered {
        /// Leader.
        from: u64,
        /// Of its checkpoint.
        index: u64,
        /// Term of `index`.
        term: u64,
        /// Configuration at `index`, as in a checkpoint.
        conf: Bytes,
    },
    /// The checkpoint of `Copyset::install_snapshot` is durable: `Apply` goes on behind `index`.
    Installed {
        /// Applied index.
        index: u64,
        /// Its term.
        term: u64,
    },
    /// The checkpoint of `Copyset::renew` is durable, and the group started anew from it: `Apply` goes on behind `index`.
    Renewed {
        /// Applied index.
        index: u64,
    },
    /// What became of a membership change that had started.
    ChangeDone {
        /// Of the change.
        cookie: u64,
        /// Voters before and after, or why not.
        result: Result<Changed, ChangeFailed>,
    },
}

/// Voters before and after a membership change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changed {
    /// Before.
    pub old: Vec<u64>,
    /// After.
    pub new: Vec<u64>,
}

/// Why a membership change did not come to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChangeFailed {
    /// A new member made no progress for too long. It is no member any more.
    #[error("the new member does not catch up")]
    CatchUp {
        /// Which one.
        peer: u64,
    },
    /// Leadership was lost on the way; the change may still come about.
    #[error("leadership was lost")]
    LeaderLost,
    /// raft refused it again and again.
    #[error("the change was refused")]
    Refused,
}

/// Which connection of a pair of nodes a message takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// The small one, which payloads never hold up: votes, heartbeats and the lease rounds in them (rule 23).
    Control,
    /// Appends, their answers, snapshot offers.
    Data,
}

/// Lane of a kind of message.
#[must_use]
pub fn lane(kind: MessageType) -> Lane {
    match kind {
        MessageType::MsgAppend | MessageType::MsgAppendResponse | MessageType::MsgSnapshot => Lane::Data,
        _ => Lane::Control,
    }
}
