//! The trash: replicas that were deleted and keep their chunks for a while, in case it was a mistake.
//!
//! A replica in the trash is as good as gone: it answers nobody, hears nobody, says nothing, and has no time; a sole voter
//! leads there, unheard, so that its log comes to an end. Its group stays, so that its log is released and its dirty data
//! written back as ever. That it is there is in every checkpoint of it from the first on, whose durability is waited for
//! before the deletion is answered; so it is there after a crash too.
//! When it has been there long enough, is deleted again or is created anew, it is purged as any other. Until then it can be
//! taken out of it (`renew.rs`): it goes on as after a restart, with what the others have done meanwhile to be caught up.

use super::admin::Then;
use super::request::{Origin, Outcome};
use super::{Effects, Shard, State, reply};
use crate::io::Instant;
use copyset::Effect;
use raftlog::CopysetId;

/// How often it is looked for what has been there long enough.
const LOOK_MS: u64 = 500;

impl Shard {
    /// Put a replica into the trash.
    pub(super) fn retire(&mut self, id: CopysetId, origin: Option<Origin>, out: &mut Effects) {
        let at = self.wall_s().max(1);
        let Some(group) = self.groups.get_mut(&id) else { return };
        group.raft.retire(at);
        let index = self.log.borrow().index(id).map_or(0, |index| index.checkpoint().applied_index);
        let checkpoint = group.raft.checkpoint_at(index);
        let seq = self.log.borrow_mut().checkpoint(id, checkpoint);
        self.silence(id, Outcome::NoCopyset, out);
        if let Some(group) = self.groups.get_mut(&id) {
            group.raft.step_down(); // nobody will answer it: what it has proposed is settled now
        }
        self.mark_dirty(id);
        self.await_record(id, seq, origin, Then::Answer);
        self.trash_at = self.now;
    }

    /// Answer everything this copyset owes, and end what it has under way with others.
    pub(super) fn silence(&mut self, id: CopysetId, outcome: Outcome, out: &mut Effects) {
        self.stop_catch_up(id);
        self.stop_install(id);
        self.stop_mends(Some(id), outcome, out);
        self.peers.forget(id);
        let parked: Vec<usize> = self.parked.iter().filter(|(_, r)| r.copyset == id).map(|(key, _)| key).collect();
        for key in parked {
            reply(out, self.parked.remove(key).origin, outcome);
        }
        for origin in self.members.give_up(Some(id)) {
            reply(out, origin, outcome);
        }
        // They keep their places: raft may still tell what became of them.
        let Some(group) = self.groups.get(&id) else { return };
        let queued = group.queue.iter().filter_map(|committed| committed.cookie);
        for cookie in group.raft.waiting_cookies().chain(queued) {
            if let Some(origin) = self.waiting.get_mut(cookie as usize).and_then(|waiting| waiting.origin.take()) {
                reply(out, origin, outcome);
            }
        }
    }

    /// Seconds since 1970, as far as the clock that the server started with goes.
    fn wall_s(&self) -> u64 {
        self.config.wall_s.saturating_add(self.now.0 / 1_000_000_000)
    }

    /// Whether it is in the trash.
    pub(super) fn is_retired(&self, id: CopysetId) -> bool {
        self.groups.get(&id).is_some_and(|group| group.raft.retired() != 0)
    }

    /// Purge what has been there long enough.
    pub(super) fn trash_step(&mut self, out: &mut Effects) {
        if self.now < self.trash_at || !matches!(self.state, State::Serving) {
            return;
        }
        let now = self.wall_s();
        let retired: Vec<(CopysetId, u64)> =
            self.groups.iter().map(|(&id, group)| (id, group.raft.retired())).collect();
        let mut left = false;
        for (id, at) in retired.into_iter().filter(|&(_, at)| at != 0) {
            let leaves = self.renewals.has(id);
            if !leaves && now.saturating_sub(at) >= self.config.trash_s {
                tracing::info!(
                    pool = id.pool(),
                    copyset = id.copyset(),
                    "a deleted copyset's time in the trash is over"
                );
                self.delete_copyset(id, None, out);
            }
            left = true;
        }
        self.trash_at = if left { self.now.after_ms(LOOK_MS) } else { Instant::FAR };
    }

    /// Of what raft wants of a replica in the trash nothing is done but bookkeeping.
    pub(super) fn is_muted(&self, id: CopysetId, effect: &Effect) -> bool {
        let kept = matches!(effect, Effect::Apply(_) | Effect::Dropped { .. } | Effect::Installed { .. });
        !kept && self.is_retired(id)
    }
}
