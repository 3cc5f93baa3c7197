//! What a copyset asks of its shard. Effects are handled in the order they were left.

use bytes::Bytes;
use raft::eraftpb::Message;
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
    /// Send to `message.to`. Whatever had to be durable first is. In order per peer.
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
}
