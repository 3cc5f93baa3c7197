//! What takes a shard's place in a process without a disk: it has no copysets, and says so.
//!
//! Such a process exports volumes whose copysets are on other servers. Its reactors are those of any other.

use super::request::{AdminOp, Outcome, Reply, ReplyData, Request, RequestOp, ShardStatus};
use super::{Effects, Failure, Shard, mail::PeerMail};
use crate::io::buffer::Arena;
use crate::io::{Completion, Instant};
use raftlog::CopysetId;
use std::sync::Arc;

/// See the module text.
#[derive(Debug)]
pub struct Diskless {
    shard: u16,
    payload: Arc<Arena>,
    stopped: bool,
}

impl Diskless {
    /// Number `shard` of its process; `payload`: the memory whose use it reports.
    #[must_use]
    pub fn new(shard: u16, payload: Arc<Arena>) -> Self {
        Self { shard, payload, stopped: false }
    }

    fn answer(&self, request: &Request) -> (Outcome, ReplyData) {
        if self.stopped {
            return (Outcome::Stopping, ReplyData::None);
        }
        match &request.op {
            RequestOp::Admin(AdminOp::ListCopysets | AdminOp::ListTrash) => {
                (Outcome::Success, ReplyData::Copysets(Vec::new()))
            }
            RequestOp::Admin(AdminOp::ShardStatus) => {
                let buffers_free_bytes = self.payload.free_bytes() as u64;
                let status = ShardStatus { shard: self.shard, buffers_free_bytes, ..ShardStatus::default() };
                (Outcome::Success, ReplyData::Shard(Box::new(status)))
            }
            RequestOp::Admin(AdminOp::CheckpointAll) => (Outcome::Success, ReplyData::None),
            RequestOp::Admin(AdminOp::CreateCopyset { .. }) => (Outcome::NoSpace, ReplyData::None),
            RequestOp::Admin(_) | RequestOp::Chunk { .. } | RequestOp::Guarded { .. } => {
                (Outcome::NoCopyset, ReplyData::None)
            }
        }
    }
}

/// A shard, or what takes its place. Methods are [`Shard`]'s.
#[derive(Debug)]
pub enum Core {
    /// Of a process with a disk.
    Shard(Box<Shard>),
    /// Of one without.
    Diskless(Diskless),
}

impl From<Shard> for Core {
    fn from(shard: Shard) -> Self {
        Self::Shard(Box::new(shard))
    }
}
impl From<Diskless> for Core {
    fn from(diskless: Diskless) -> Self {
        Self::Diskless(diskless)
    }
}

#[expect(missing_docs, reason = "they are those of the shard")]
impl Core {
    /// Whether there may be copysets.
    #[must_use]
    pub fn has_disk(&self) -> bool {
        matches!(self, Self::Shard(_))
    }

    pub fn request(&mut self, request: Request, out: &mut Effects) {
        match self {
            Self::Shard(shard) => shard.request(request, out),
            Self::Diskless(diskless) => {
                let (outcome, data) = diskless.answer(&request);
                out.replies.push(Reply { origin: request.origin, outcome, applied_index: 0, data });
            }
        }
    }

    pub fn completed(&mut self, number: u64, completion: Completion, out: &mut Effects) {
        if let Self::Shard(shard) = self {
            shard.completed(number, completion, out);
        }
    }

    pub fn observe(&mut self, now: Instant) {
        if let Self::Shard(shard) = self {
            shard.observe(now);
        }
    }

    pub fn end_turn(&mut self, now: Instant, out: &mut Effects) {
        if let Self::Shard(shard) = self {
            shard.end_turn(now, out);
        }
    }

    #[must_use]
    pub fn deadline(&self) -> Instant {
        match self {
            Self::Shard(shard) => shard.deadline(),
            Self::Diskless(_) => Instant::FAR,
        }
    }

    #[must_use]
    pub fn serving(&self) -> bool {
        match self {
            Self::Shard(shard) => shard.serving(),
            Self::Diskless(diskless) => !diskless.stopped,
        }
    }

    #[must_use]
    pub fn failure(&self) -> Option<&Failure> {
        match self {
            Self::Shard(shard) => shard.failure(),
            Self::Diskless(_) => None,
        }
    }

    pub fn drain(&mut self) {
        match self {
            Self::Shard(shard) => shard.drain(),
            Self::Diskless(diskless) => diskless.stopped = true,
        }
    }

    #[must_use]
    pub fn write_back(&self) -> (u64, u64) {
        match self {
            Self::Shard(shard) => shard.write_back(),
            Self::Diskless(_) => (0, 0),
        }
    }

    pub fn hand_over(&mut self) -> bool {
        match self {
            Self::Shard(shard) => shard.hand_over(),
            Self::Diskless(_) => false,
        }
    }

    #[must_use]
    pub fn leads_alone(&self) -> bool {
        match self {
            Self::Shard(shard) => shard.leads_alone(),
            Self::Diskless(_) => true,
        }
    }

    #[must_use]
    pub fn is_idle(&self) -> bool {
        match self {
            Self::Shard(shard) => shard.is_idle(),
            Self::Diskless(_) => true,
        }
    }

    pub fn want_memory(&mut self) {
        if let Self::Shard(shard) = self {
            shard.want_memory();
        }
    }

    #[must_use]
    pub fn stopped(&self) -> bool {
        match self {
            Self::Shard(shard) => shard.stopped(),
            Self::Diskless(diskless) => diskless.stopped,
        }
    }

    pub fn peer_mail(&mut self, mail: PeerMail, out: &mut Effects) {
        if let Self::Shard(shard) = self {
            shard.peer_mail(mail, out);
        }
    }

    pub fn peer_lost(&mut self, peer: u64, copyset: Option<CopysetId>) {
        if let Self::Shard(shard) = self {
            shard.peer_lost(peer, copyset);
        }
    }
}
