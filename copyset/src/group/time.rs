//! Ticks: elections, heartbeats with their lease rounds, check-quorum. raft-rs's own ticks are not used.

use super::{Copyset, Role};
use crate::time::Due;
use bytes::Bytes;
use raft::StateRole;
use raft::eraftpb::{Message, MessageType};

/// A pre-vote in vain is tried again soon at first, then ever later: T/8 times this power of two at most.
const BACKOFF_MAX: u32 = 3;

impl Copyset {
    /// Time has passed. Missed ticks are not made up for (rule 17).
    ///
    /// `now`, here and elsewhere: nanoseconds of a clock that goes on while the machine or the process is suspended,
    /// **read after the input it goes with was received**. An older one would shorten a promise made to a leader.
    ///
    /// False if the copyset is idle and nothing was due.
    pub fn tick(&mut self, now: u64) -> bool {
        let due = self.time.tick(now);
        if self.time.is_idle() && due == Due::default() {
            return false;
        }
        if self.inert() {
            return true;
        }
        if self.role() == Role::Leader {
            if due.check_quorum {
                self.check_quorum();
            }
            if due.heartbeat {
                self.start_round();
            }
            self.tick_leader();
        } else if self.conf().sole_voter(self.config.peer) {
            // Not by the timer: it would campaign with entries that are not durable yet.
            self.campaign_alone();
        } else if due.election {
            self.campaign();
        }
        true
    }

    /// What a leader does by the clock, besides heartbeats.
    fn tick_leader(&mut self) {
        let now = self.time.now();
        if self.transfer_until.is_some_and(|until| now >= until) {
            self.transfer_until = None;
            self.raw.raft.abort_leader_transfer();
        }
        self.renew_offers();
        self.drive();
    }

    /// A leader that no quorum answered for T steps down.
    fn check_quorum(&mut self) {
        let mut message = Message::default();
        message.set_msg_type(MessageType::MsgCheckQuorum);
        let _ = self.raw.raft.step(message);
        self.look();
    }

    /// A round of the lease: heartbeats that carry its number.
    pub(super) fn start_round(&mut self) {
        if self.raw.raft.state != StateRole::Leader {
            return;
        }
        let round = self.lease.start(self.time.now());
        self.reads.started(round);
        self.time.beaten();
        self.raw.raft.ping();
        let context = Bytes::copy_from_slice(&(round | self.calm()).to_le_bytes());
        let beats = self.raw.raft.msgs.iter_mut().filter(|m| m.get_msg_type() == MessageType::MsgHeartbeat);
        beats.filter(|m| m.context.is_empty()).for_each(|m| m.context = context.clone());
        self.settle_lease();
    }

    /// True if this replica may ask for votes, its own included.
    fn may_campaign(&self) -> bool {
        let able = self.raw.raft.promotable() && !self.removed && !self.held_back && !self.suspicion.holds();
        able && !self.time.refuses_votes()
    }

    fn campaign(&mut self) {
        if !self.may_campaign() {
            return;
        }
        self.time.attempts = self.time.attempts.saturating_add(1);
        // Refused while a committed membership change waits to be applied; tried again after that.
        let _ = self.raw.campaign();
        self.look();
        self.draw_timeout();
    }

    /// A sole voter needs no timer and nobody's vote. raft-rs requires that its whole log is durable.
    pub(super) fn campaign_alone(&mut self) {
        let alone = self.conf().sole_voter(self.config.peer) && !self.inert();
        let able = !self.held_back && !self.suspicion.holds() && self.raw.raft.state != StateRole::Leader;
        if alone && able && self.durable_index() == self.last_index() {
            let _ = self.raw.campaign();
            self.look();
        }
    }

    /// After anything that may have changed term or role.
    pub(super) fn look(&mut self) {
        let now = (self.raw.raft.term, self.raw.raft.state);
        let before = std::mem::replace(&mut self.seen, now);
        if before == now {
            return;
        }
        self.time.set_idle(false);
        if before.1 == StateRole::Leader {
            self.lost_leadership();
        }
        if now.1 == StateRole::Leader {
            self.lease.reset();
            self.time.restart_leader();
            self.time.heard(self.time.now());
            self.start_round();
        }
        self.draw_timeout();
    }

    fn lost_leadership(&mut self) {
        self.proposals.drop_all(&mut self.outbox);
        self.reads.drop_all(&mut self.outbox);
        self.fail_plan();
        self.lease.reset();
        self.window.clear();
        self.fetches.clear();
        self.offers.clear();
        self.transfer_until = None;
    }

    pub(super) fn draw_timeout(&mut self) {
        let t = self.config.election_timeout_ns;
        let (low, width) = match self.raw.raft.state {
            // Soon, but not all at the same moment; raft-rs's message for it is small and changes nothing.
            StateRole::PreCandidate => {
                let wait = (t / 8) << self.time.attempts.saturating_sub(1).min(BACKOFF_MAX);
                (wait, wait)
            }
            StateRole::Candidate => (t / 4, t / 4),
            StateRole::Follower if self.time.never_led() && self.time.attempts == 0 => (t / 8, t / 4),
            StateRole::Follower | StateRole::Leader => (t, t / 2),
        };
        let wait = self.rng.draw(low, width.max(1));
        self.time.restart(wait);
    }
}
