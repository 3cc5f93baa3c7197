//! What raft wants done, and raft's time.

use super::mail::{PeerBody, PeerMail};
use super::{Effects, Shard};
use crate::io::Instant;
use copyset::Effect;
use raftlog::CopysetId;

impl Shard {
    pub(super) fn raft_effect(&mut self, id: CopysetId, effect: Effect, out: &mut Effects) {
        if self.is_muted(id, &effect) {
            return;
        }
        match effect {
            Effect::Apply(committed) => {
                let Some(group) = self.groups.get_mut(&id) else { return };
                group.queue.push_back(committed);
                if !std::mem::replace(&mut group.applying, true) {
                    self.applying.push(id);
                }
            }
            Effect::Dropped { cookie, may_commit } => self.dropped(id, cookie, may_commit, out),
            Effect::Send(message) => {
                let (from, to) = (message.from, message.to);
                out.mail.push(PeerMail { copyset: id, from, to, body: PeerBody::Raft(message) });
            }
            Effect::LeaderChanged { leader, term, ready } => {
                tracing::debug!(copyset = ?id, leader, term, ready, "leader changed");
            }
            Effect::ReadReady { cookie } => self.read_ready(cookie, out),
            Effect::ReadDropped { cookie } => self.read_dropped(cookie, out),
            Effect::ChangeDone { cookie, result } => self.change_done(cookie, result, out),
            Effect::Fetch { low, high } => self.fetch_for_peers(id, low, high),
            Effect::SnapshotNeeded { peer, index, .. } => {
                tracing::info!(copyset = ?id, peer, index, "a peer needs more than the log has: it is offered the chunks");
            }
            Effect::SnapshotOffered { from, index, .. } => self.offered(id, from, index),
            Effect::Installed { index, .. } => self.installed(id, index),
            Effect::Renewed { index } => self.renewed(id, index, out),
        }
    }

    /// A copyset's raft has said what it wants done.
    pub(super) fn after_ready(&mut self, id: CopysetId) {
        if self.replay_over {
            self.follow_log(id);
        }
        self.end_catch_up(id);
        let ticks = self.groups.get(&id).is_some_and(|group| group.raft.needs_ticks());
        if ticks && self.next_tick > self.now.after_ns(self.tick_ns()) {
            self.next_tick = self.now.after_ns(self.tick_ns());
        }
    }

    /// A client wants something of a copyset, or wants to know who leads it: it may be idle.
    pub(super) fn wanted(&mut self, id: CopysetId) {
        let now = self.now.0;
        if let Some(group) = self.groups.get_mut(&id) {
            group.raft.wanted(now);
            if group.raft.dirty() {
                self.mark_dirty(id);
            }
        }
    }

    pub(super) fn mark_dirty(&mut self, id: CopysetId) {
        if let Some(group) = self.groups.get_mut(&id)
            && !std::mem::replace(&mut group.dirty, true)
        {
            self.dirty.push(id);
        }
    }

    /// All of raft's news of this turn is in the log.
    pub(super) fn all_ready(&mut self) {
        self.proposed_cost = 0;
        self.peers.stepped_bytes = 0;
    }

    /// Half of a heartbeat's interval, which is a third of the election timeout.
    pub(super) fn tick_ns(&self) -> u64 {
        (self.config.election_ms * 1_000_000 / 6).max(1_000_000)
    }

    /// Raft time. Sole voters need none; a missed tick is dropped (rule 17). A copyset that lost part of its log neither
    /// votes nor asks for votes (rule 21).
    pub(super) fn tick(&mut self) {
        if self.now < self.next_tick {
            return;
        }
        let next = self.now.after_ns(self.tick_ns());
        self.next_tick = Instant::FAR;
        self.leave_slow_disk();
        let lives = |group: &super::Group| group.raft.needs_ticks() && !group.damaged && group.raft.retired() == 0;
        // A tick is half a heartbeat, and who is idle has time.
        self.even_tick = !self.even_tick;
        for (&id, group) in self.groups.iter_mut().filter(|(_, group)| lives(group)) {
            self.next_tick = next;
            let waits = self.even_tick && group.raft.is_idle();
            if !waits && group.raft.tick(self.now.0) && group.raft.dirty() && !std::mem::replace(&mut group.dirty, true)
            {
                self.dirty.push(id);
            }
        }
    }
}
