//! Replicas that start anew from their own log because an operator wants them otherwise: out of the trash, or with voters
//! that are forced on them (`copyset/src/group/renew.rs` has the rules).
//!
//! The copyset is frozen, what it has handed out is applied, a write-back round takes that to the slots, a checkpoint
//! says what is different, and with it durable the copyset goes on; then the answer. A crash before that leaves it as it
//! was. Of a log that lost records the tail's payloads are read back first, since the tail is logged again.

use super::request::{Origin, Outcome};
use super::{Effects, Shard, reply};
use copyset::{Renewal, ResetRefused, Started};
use raftlog::CopysetId;
use std::collections::BTreeMap;

/// Payload bytes of a tail that are read back at once, unless one entry alone is longer.
const TAIL_BYTES: usize = 4 << 20;

#[derive(Debug)]
enum Stage {
    /// Until what was handed out is applied, and on its slots.
    Settle,
    /// Until its tail is in memory; the entry that was asked for last.
    Tail(u64),
    /// The checkpoint is on its way to the log.
    Log,
}

#[derive(Debug)]
struct Job {
    how: Renewal,
    origin: Origin,
    stage: Stage,
}

/// The renewals of a shard.
#[derive(Debug, Default)]
pub(super) struct Renewals(BTreeMap<CopysetId, Job>);

impl Renewals {
    /// This copyset is about to start anew.
    pub(super) fn has(&self, id: CopysetId) -> bool {
        self.0.contains_key(&id)
    }

    /// A checkpoint of this copyset is waited for.
    pub(super) fn wants_checkpoint(&self, id: CopysetId) -> bool {
        self.0.get(&id).is_some_and(|job| matches!(job.stage, Stage::Settle))
    }

    /// Somebody waits for a checkpoint.
    pub(super) fn want_checkpoints(&self) -> bool {
        self.0.values().any(|job| matches!(job.stage, Stage::Settle))
    }

    /// Everybody who waits.
    pub(super) fn give_up(&mut self) -> impl Iterator<Item = Origin> + use<> {
        std::mem::take(&mut self.0).into_values().map(|job| job.origin)
    }
}

impl Shard {
    /// Take a replica out of the trash.
    pub(super) fn restore_copyset(&mut self, id: CopysetId, origin: Origin, out: &mut Effects) {
        let Some(group) = self.groups.get(&id) else {
            let known = self.broken.contains(&id) || self.admin_busy(id);
            return reply(out, origin, if known { Outcome::Exists } else { Outcome::NoCopyset });
        };
        if self.admin_busy(id) {
            return reply(out, origin, Outcome::Busy);
        }
        if group.raft.retired() == 0 {
            return reply(out, origin, Outcome::Exists);
        }
        self.renew(id, Renewal::Restored, origin);
    }

    /// Force these voters on a replica, and end whatever it has under way with others.
    pub(super) fn reset_peer(&mut self, id: CopysetId, peers: Vec<u64>, origin: Origin, out: &mut Effects) {
        let Some(group) = self.groups.get(&id) else {
            let broken = self.broken.contains(&id);
            return reply(out, origin, if broken { Outcome::CrcFail } else { Outcome::NoCopyset });
        };
        let outcome = match group.raft.may_reset(&peers) {
            _ if group.raft.retired() != 0 => Outcome::NoCopyset,
            Err(ResetRefused::Invalid) => Outcome::Invalid,
            _ if group.damaged => Outcome::CrcFail,
            Err(ResetRefused::Inactive) => Outcome::NotLeader,
            Err(ResetRefused::Busy) => Outcome::Busy,
            _ if self.admin_busy(id) => Outcome::Busy,
            Ok(Started::Already) => Outcome::Success,
            Ok(Started::Begun) => {
                tracing::warn!(copyset = ?id, ?peers, "voters are forced on this replica");
                self.doubt_half_taken(id);
                self.silence(id, Outcome::NotLeader, out);
                return self.renew(id, Renewal::Reset(peers), origin);
            }
        };
        reply(out, origin, outcome);
    }

    /// Its creation, deletion or renewal is on its way to the log.
    pub(super) fn admin_busy(&self, id: CopysetId) -> bool {
        self.admin.iter().any(|pending| pending.copyset == id) || self.renewals.has(id)
    }

    /// Chunks that were being taken in are a mixture of two states. As long as the rest could be had that did no harm; now
    /// they must not be read as if they were one of them.
    fn doubt_half_taken(&mut self, id: CopysetId) {
        let half: Vec<u64> =
            self.store.list(id, 0, usize::MAX).into_iter().filter(|info| info.applied == 0).map(|i| i.chunk).collect();
        for chunk in half {
            tracing::error!(copyset = ?id, chunk, "a chunk that was only half taken in is in doubt");
            self.store.doubt(id, 0, chunk, self.now.0);
        }
    }

    fn renew(&mut self, id: CopysetId, how: Renewal, origin: Origin) {
        if let Some(group) = self.groups.get_mut(&id) {
            group.raft.freeze(self.now.0);
            self.renewals.0.insert(id, Job { how, origin, stage: Stage::Settle });
            self.flush.next = self.now;
            self.mark_dirty(id);
        }
    }

    /// Move all renewals on.
    pub(super) fn renew_step(&mut self, out: &mut Effects) {
        let ids: Vec<CopysetId> = self.renewals.0.keys().copied().collect();
        for id in ids {
            while self.renew_next(id, out) {}
        }
    }

    /// True if it got on.
    fn renew_next(&mut self, id: CopysetId, out: &mut Effects) -> bool {
        let Some((job, group)) = self.renewals.0.get_mut(&id).zip(self.groups.get_mut(&id)) else { return false };
        match job.stage {
            Stage::Settle if group.damaged => {
                let origin = job.origin;
                self.renewals.0.remove(&id); // what it has committed cannot be read: it stays out of service
                reply(out, origin, Outcome::CrcFail);
                false
            }
            Stage::Settle => {
                let known = self.log.borrow().index(id).map(|index| index.checkpoint().applied_index);
                let settled = group.raft.is_settled() && known == Some(group.applied);
                if settled {
                    job.stage = Stage::Tail(0);
                }
                settled
            }
            Stage::Tail(asked) => {
                if self.catch_up.fetches(id) {
                    return false;
                }
                let again = matches!(job.how, Renewal::Reset(_)) && group.raft.is_suspect();
                let absent = if again { absent(&self.log.borrow(), id, group.applied) } else { None };
                // What was asked for in vain is lost, and what is behind it with it.
                if let Some((low, high)) = absent.filter(|absent| absent.0 > asked) {
                    job.stage = Stage::Tail(low);
                    self.fetch_for_peers(id, low, high);
                    return false;
                }
                job.stage = Stage::Log;
                group.raft.renew(&job.how);
                if !std::mem::replace(&mut group.unpersisted, true) {
                    self.unpersisted.push(id);
                }
                false
            }
            Stage::Log => false,
        }
    }

    /// The checkpoint is durable, and the copyset is another.
    pub(super) fn renewed(&mut self, id: CopysetId, index: u64, out: &mut Effects) {
        let Some(group) = self.groups.get_mut(&id) else { return };
        assert!(group.queue.is_empty() && group.applied == index, "a copyset at rest is renewed");
        group.follow.forget();
        let (suspect, asks) = (group.raft.is_suspect(), group.raft.wants_word());
        self.tail_applied(id);
        self.store.checkpoint_durable(id, index);
        if asks {
            self.suspect(id); // in the trash it asked nobody
        }
        if !suspect {
            self.lost.retain(|&lost| lost != id);
        }
        self.next_tick = self.now;
        self.mark_dirty(id);
        if let Some(job) = self.renewals.0.remove(&id) {
            tracing::warn!(copyset = ?id, how = ?job.how, index, "a replica has started anew");
            reply(out, job.origin, Outcome::Success);
        }
    }
}

/// The first entries behind `applied` whose payloads are not in memory, as many as may be read back at once.
fn absent(log: &raftlog::Log, id: CopysetId, applied: u64) -> Option<(u64, u64)> {
    let index = log.index(id)?;
    let low = index.not_resident().into_iter().map(|(at, _)| at).find(|&at| at > applied)?;
    let mut bytes = 0;
    let fits = |&at: &u64| {
        bytes += index.payload_len(at).unwrap_or(0);
        bytes <= TAIL_BYTES
    };
    let more = (low + 1..=index.last_index()).take_while(fits).count() as u64;
    Some((low, low + 1 + more))
}
