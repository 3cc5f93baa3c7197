//! What replicas of a copyset tell each other: plain values between a shard and the transport.

use bytes::Bytes;
use copyset::raft::eraftpb::Message;
use copyset::{Lane, lane};
use raftlog::CopysetId;

/// A message from one replica of a copyset to another one.
#[derive(Clone, Debug)]
pub struct PeerMail {
    /// Copyset.
    pub copyset: CopysetId,
    /// Sender, as [`copyset::PeerId`] packs it. The transport vouches for it.
    pub from: u64,
    /// Addressee.
    pub to: u64,
    /// What.
    pub body: PeerBody,
}

/// What a [`PeerMail`] says.
#[derive(Clone, Debug)]
pub enum PeerBody {
    /// A message of raft's. The payload of each entry is 4 KiB-aligned memory of its own.
    Raft(Box<Message>),
    /// Of a raft snapshot. The transport does not look into `head`.
    Bulk {
        /// At most 64 KiB.
        head: Bytes,
        /// Whole blocks, at most 1 MiB.
        payload: Bytes,
    },
}

impl PeerMail {
    /// Votes, heartbeats and lease rounds have a small connection of their own (rule 23).
    #[must_use]
    pub fn urgent(&self) -> bool {
        matches!(&self.body, PeerBody::Raft(message) if lane(message.get_msg_type()) == Lane::Control)
    }

    /// Payload bytes it keeps in memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match &self.body {
            PeerBody::Raft(message) => message.get_entries().iter().map(|entry| entry.data.len()).sum(),
            PeerBody::Bulk { payload, .. } => payload.len(),
        }
    }
}
