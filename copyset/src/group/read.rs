//! Reads: by the lease, else with a quorum's word for each turn of them.

use super::{Copyset, ProposeError, Role};
use raft::StateRole;

impl Copyset {
    /// True if this replica leads and has applied an entry of its own term: what is applied is the newest state, if
    /// it still leads.
    #[must_use]
    pub fn may_read_index(&self) -> bool {
        let raft = &self.raw.raft;
        raft.state == StateRole::Leader && self.applied_term == raft.term
    }

    /// True if a read may be answered from the applied state at once. `now` must have been read **after the read
    /// arrived**: then no other leader had been elected when it arrived, however long this process sleeps before
    /// it answers. A sole voter needs nobody's word.
    #[must_use]
    pub fn may_read(&self, now: u64) -> bool {
        let length = self.config.election_timeout_ns - self.config.lease_margin_ns();
        let alone = self.conf().sole_voter(self.config.peer);
        self.may_read_index() && (alone || self.lease.holds(now.max(self.time.now()), length))
    }

    /// Asks a quorum whether this replica still leads. One `ReadReady` or `ReadDropped` follows.
    pub fn read_index(&mut self, now: u64, cookie: u64) -> Result<(), ProposeError> {
        self.time.advance(now);
        if self.role() != Role::Leader {
            return Err(ProposeError::NotLeader { leader: self.leader() });
        }
        if !self.may_read_index() {
            return Err(ProposeError::NotReady);
        }
        if self.reads.count() >= self.config.max_waiting {
            return Err(ProposeError::Full);
        }
        self.reads.push(cookie, self.commit_index());
        self.used();
        Ok(())
    }

    /// After an echo, or a round nobody has to echo.
    pub(super) fn settle_lease(&mut self) {
        if let Some(sent) = self.lease.settle(self.config.peer, self.history.current()) {
            self.time.heard(sent);
            self.reads.agreed(self.lease.agreed());
        }
    }

    /// Reads that wait for a quorum's word, or for entries to be applied.
    #[must_use]
    pub fn reads_waiting(&self) -> usize {
        self.reads.count()
    }
}
