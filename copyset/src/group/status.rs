//! What a copyset says of itself.

use super::Copyset;
use crate::conf::ConfState;
use crate::config::Config;
use raft::StateRole;
use raftlog::CopysetId;

/// What a replica is. The values are those of braft's states in `GetCopysetStatus`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Role {
    /// Leads.
    Leader = 1,
    /// Asks for votes.
    Candidate = 3,
    /// Follows, or waits for a leader.
    Follower = 4,
    /// Has no configuration yet: waits to be added.
    Passive = 6,
}

impl Copyset {
    /// Members and epoch, up to the newest entry handed out for apply.
    #[must_use]
    pub fn conf(&self) -> &ConfState {
        self.history.current()
    }

    /// Group.
    #[must_use]
    pub fn id(&self) -> CopysetId {
        self.config.id
    }
    /// This replica.
    #[must_use]
    pub fn peer(&self) -> u64 {
        self.config.peer
    }
    /// Settings.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }
    /// What this replica is.
    #[must_use]
    pub fn role(&self) -> Role {
        match self.raw.raft.state {
            StateRole::Leader => Role::Leader,
            StateRole::Candidate | StateRole::PreCandidate => Role::Candidate,
            StateRole::Follower if self.conf().voters.is_empty() => Role::Passive,
            StateRole::Follower => Role::Follower,
        }
    }
    /// The leader, 0 if unknown.
    #[must_use]
    pub fn leader(&self) -> u64 {
        self.raw.raft.leader_id
    }
    /// Current term.
    #[must_use]
    pub fn term(&self) -> u64 {
        self.raw.raft.term
    }
    /// Applied by the shard.
    #[must_use]
    pub fn applied_index(&self) -> u64 {
        self.applied
    }
    /// Known committed.
    #[must_use]
    pub fn commit_index(&self) -> u64 {
        self.raw.raft.raft_log.committed
    }
    /// Oldest entry in the log.
    #[must_use]
    pub fn first_index(&self) -> u64 {
        self.raw.store().checkpoint_index() + 1
    }
    /// Newest entry.
    #[must_use]
    pub fn last_index(&self) -> u64 {
        self.raw.raft.raft_log.last_index()
    }
    /// Newest entry that is durable here.
    #[must_use]
    pub fn durable_index(&self) -> u64 {
        self.raw.raft.raft_log.persisted
    }
    /// A batch of the log must become durable before this replica goes on.
    #[must_use]
    pub fn awaits_log(&self) -> bool {
        !self.held.is_empty() || self.installing.is_some()
    }
    /// Elections and heartbeats matter: there are voters, and this one is not the only member.
    #[must_use]
    pub fn needs_ticks(&self) -> bool {
        let conf = self.conf();
        let alone = conf.sole_voter(self.config.peer) && conf.learners.is_empty();
        !conf.voters.is_empty() && (!alone || self.plan.is_some())
    }
    /// Cookies of the proposals made here that are not committed yet.
    pub fn waiting_cookies(&self) -> impl Iterator<Item = u64> + '_ {
        self.proposals.cookies()
    }
    /// Proposals made here that are not committed yet.
    #[must_use]
    pub fn waits(&self) -> usize {
        self.proposals.count()
    }
}
