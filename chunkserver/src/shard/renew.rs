//! Replicas that start anew from their own log because an operator wants them otherwise: out of the trash, or as the only
//! voter (`copyset/src/group/renew.rs` has the rules).
//!
//! The copyset is frozen, what it has handed out is applied, a write-back round takes that to the slots, a checkpoint
//! says what is different, and with it durable the copyset goes on; then the answer. A crash before that leaves it as it
//! was. Of a log that lost records the tail's payloads are read back first, since the tail is logged again. Chunks that
//! know of indexes beyond the log, for another replica sent them, are told where it ends, and that is written, before the
//! log may go on with other entries under those indexes ([`crate::chunk::Store::ends_at`]).

use super::request::{Origin, Outcome};
use super::{Effects, Group, Shard, reply};
use crate::io::Instant;
use copyset::{Renewal, ResetRefused, Started};
use raftlog::CopysetId;
use std::collections::BTreeMap;

/// Payload bytes of a tail that are read back at once, unless one entry alone is longer.
const TAIL_BYTES: usize = 4 << 20;
/// A payload of the tail that cannot be read is asked for this often, this far apart: two seconds. Then it is lost.
const TAIL_TRIES: u32 = 20;
const TAIL_RETRY_MS: u64 = 100;

#[derive(Debug)]
enum Stage {
    /// Until what was handed out is applied, and on its slots.
    Settle,
    /// Until its tail is in memory; the entry that was asked for last, how often, and when it may be again.
    Tail { asked: u64, tries: u32, due: Instant },
    /// Until its chunks say where its log ends: the round that writes it, once it has begun, has this number.
    Write(Option<u64>),
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

    /// Make a replica the only voter, and end whatever it has under way with others.
    pub(super) fn reset_peer(&mut self, id: CopysetId, peers: &[u64], origin: Origin, out: &mut Effects) {
        let Some(group) = self.groups.get(&id) else {
            let broken = self.broken.contains(&id);
            return reply(out, origin, if broken { Outcome::CrcFail } else { Outcome::NoCopyset });
        };
        let outcome = match group.raft.may_reset(peers) {
            _ if group.raft.retired() != 0 => Outcome::NoCopyset,
            Err(ResetRefused::Invalid) => Outcome::Invalid,
            _ if group.damaged && !waits_for_word(group, self.config.peer) => Outcome::CrcFail,
            Err(ResetRefused::Inactive) => Outcome::NotLeader,
            Err(ResetRefused::Busy) => Outcome::Busy,
            _ if self.admin_busy(id) => Outcome::Busy,
            Ok(Started::Already) => Outcome::Success,
            Ok(Started::Begun) => {
                tracing::warn!(copyset = ?id, "this replica is forced to be the only voter");
                self.silence(id, Outcome::NotLeader, out);
                self.groups.entry(id).and_modify(|group| group.damaged = false);
                return self.renew(id, Renewal::Reset, origin);
            }
        };
        reply(out, origin, outcome);
    }

    /// Its creation, deletion or renewal is on its way to the log.
    pub(super) fn admin_busy(&self, id: CopysetId) -> bool {
        self.admin.iter().any(|pending| pending.copyset == id) || self.renewals.has(id)
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
                    let tail = Stage::Tail { asked: 0, tries: 0, due: self.now };
                    job.stage = if job.how == Renewal::Reset { tail } else { Stage::Write(None) };
                }
                settled
            }
            Stage::Tail { asked, tries, due } => {
                if self.catch_up.fetches(id) {
                    return false;
                }
                let again = group.raft.is_lossy();
                let absent = if again { absent(&self.log.borrow(), id, group.applied) } else { None };
                // What was asked for in vain is lost, and what is behind it with it.
                if let Some((low, high)) = absent.filter(|absent| absent.0 != asked || tries < TAIL_TRIES) {
                    if low != asked || due <= self.now {
                        let tries = if low == asked { tries + 1 } else { 1 };
                        job.stage = Stage::Tail { asked: low, tries, due: self.now.after_ms(TAIL_RETRY_MS) };
                        self.fetch_for_peers(id, low, high);
                    }
                    return false;
                }
                job.stage = Stage::Write(None);
                for chunk in self.store.ends_at(id, group.raft.tail_end(), self.now.0) {
                    tracing::error!(copyset = ?id, chunk, "a chunk that was only half taken in is in doubt");
                }
                true
            }
            Stage::Write(round) => {
                let rounds = self.store.counters().rounds;
                match round {
                    _ if self.store.round_active() => return false,
                    None => job.stage = Stage::Write(Some(rounds)),
                    Some(before) if rounds == before && self.store.oldest_dirty_ns().is_some() => {
                        self.want_memory();
                        return false;
                    }
                    Some(_) => {
                        job.stage = Stage::Log;
                        group.raft.renew(&job.how);
                        if !std::mem::replace(&mut group.unpersisted, true) {
                            self.unpersisted.push(id);
                        }
                    }
                }
                true
            }
            Stage::Log => false,
        }
    }

    /// When a payload is asked for again.
    pub(super) fn renew_deadline(&self) -> Instant {
        let due = |(&id, job): (&CopysetId, &Job)| match job.stage {
            Stage::Tail { due, .. } if !self.catch_up.fetches(id) => due,
            _ => Instant::FAR,
        };
        self.renewals.0.iter().map(due).min().unwrap_or(Instant::FAR)
    }

    /// The checkpoint is durable, and the copyset is another.
    pub(super) fn renewed(&mut self, id: CopysetId, index: u64, out: &mut Effects) {
        let Some(group) = self.groups.get_mut(&id) else { return };
        // Its new life may have handed out what it knew to be committed and not durable before.
        let rests = group.applied == index && group.queue.iter().all(|committed| committed.index > index);
        assert!(rests, "a copyset at rest is renewed");
        group.follow.forget();
        let (lossy, asks) = (group.raft.is_lossy(), group.raft.wants_word());
        self.tail_applied(id);
        self.store.checkpoint_durable(id, index);
        if asks {
            self.suspect(id); // in the trash it asked nobody
        }
        if !lossy {
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

/// It is out of service only because its log lost records and there is nobody who could tell which.
fn waits_for_word(group: &Group, me: u64) -> bool {
    group.raft.wants_word() && group.raft.conf().voters.iter().all(|&voter| voter == me)
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
