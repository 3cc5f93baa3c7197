//! Membership changes and leader transfer, as Curve's clients order them.

use super::{Copyset, MEMBERS_MAX, Role};
use crate::effect::{ChangeFailed, Changed, Effect};
use crate::plan::{Next, Plan, Stage, View};
use raft::ProgressState;
use std::cmp::Reverse;

/// Why a change was not begun. Nothing has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChangeRefused {
    /// Another replica leads, or none.
    #[error("not the leader")]
    NotLeader {
        /// Who does, 0 if unknown.
        leader: u64,
    },
    /// No entry of the own term is applied yet.
    #[error("the leader is not ready yet")]
    NotReady,
    /// Another change, or a transfer of leadership, is under way.
    #[error("a membership change or leader transfer is under way")]
    Busy,
    /// No voters, too many, nobody (0), or not a voter.
    #[error("not a possible set of voters, or not a voter")]
    Invalid,
}

/// What the order for a change led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Started {
    /// It is so already: answer at once.
    Already,
    /// It began. A membership change's end is told by [`Effect::ChangeDone`]; a transfer's by a new leader, or after T
    /// by this replica going on.
    Begun,
}

/// What is going on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InProgress<'a> {
    /// A change of the voters, begun here.
    Change {
        /// Voters wanted.
        target: &'a [u64],
        /// How far it is.
        stage: Stage,
    },
    /// Leadership is being handed over to this voter.
    Transfer(u64),
    /// A change an earlier leader left behind, or that was proposed as such, takes effect.
    Settling,
}

impl Copyset {
    /// Makes `target` the voters: new ones first learn, then all voters are exchanged in one change.
    pub fn change_peers(&mut self, now: u64, cookie: u64, target: &[u64]) -> Result<Started, ChangeRefused> {
        self.time.advance(now);
        let mut target = target.to_vec();
        target.sort_unstable();
        target.dedup();
        self.may_change()?;
        if target.is_empty() || target.len() > MEMBERS_MAX / 2 || target.contains(&0) {
            return Err(ChangeRefused::Invalid);
        }
        if target == self.conf().voters {
            return Ok(Started::Already);
        }
        self.plan = Some(Plan::new(cookie, self.conf().voters.clone(), target));
        self.drive();
        Ok(Started::Begun)
    }

    /// Adds one voter.
    pub fn add_peer(&mut self, now: u64, cookie: u64, peer: u64) -> Result<Started, ChangeRefused> {
        let target: Vec<u64> = self.conf().voters.iter().copied().chain([peer]).collect();
        self.change_peers(now, cookie, &target)
    }

    /// Removes one voter; not the last one.
    pub fn remove_peer(&mut self, now: u64, cookie: u64, peer: u64) -> Result<Started, ChangeRefused> {
        let target: Vec<u64> = self.conf().voters.iter().copied().filter(|&id| id != peer).collect();
        self.change_peers(now, cookie, &target)
    }

    /// Hands leadership to a voter, or with 0 to the one that lacks least. Until it has led, or T has passed, this
    /// replica takes no proposals; afterwards it reads without a lease for the rest of its term.
    pub fn transfer_leader(&mut self, now: u64, to: u64) -> Result<Started, ChangeRefused> {
        self.time.advance(now);
        if to == self.config.peer && self.role() == Role::Leader {
            return Ok(Started::Already);
        }
        self.may_change()?;
        let to = if to == 0 { self.best_follower().ok_or(ChangeRefused::Invalid)? } else { to };
        if !self.conf().voters.contains(&to) {
            return Err(ChangeRefused::Invalid);
        }
        self.transfer_until = Some(self.time.now() + self.config.election_timeout_ns);
        self.raw.transfer_leader(to);
        Ok(Started::Begun)
    }

    /// What keeps another change from being begun.
    #[must_use]
    pub fn change_in_progress(&self) -> Option<InProgress<'_>> {
        if let Some(plan) = &self.plan {
            return Some(InProgress::Change { target: &plan.target, stage: plan.stage });
        }
        if let Some(to) = self.raw.raft.lead_transferee {
            return Some(InProgress::Transfer(to));
        }
        let leads = self.role() == Role::Leader;
        (leads && (self.raw.raft.has_pending_conf() || self.conf().joint())).then_some(InProgress::Settling)
    }

    fn may_change(&self) -> Result<(), ChangeRefused> {
        if self.role() != Role::Leader {
            return Err(ChangeRefused::NotLeader { leader: self.leader() });
        }
        if !self.may_read_index() {
            return Err(ChangeRefused::NotReady);
        }
        match self.change_in_progress() {
            Some(_) => Err(ChangeRefused::Busy),
            None => Ok(()),
        }
    }

    fn best_follower(&self) -> Option<u64> {
        let voters = self.conf().voters.iter().copied().filter(|&id| id != self.config.peer);
        let rank = |id: u64| {
            let progress = self.raw.raft.prs().get(id)?;
            Some((progress.recent_active, progress.matched, Reverse(id)))
        };
        voters.max_by_key(|&id| rank(id))
    }

    /// The next step of the change under way, if one is due.
    pub(super) fn drive(&mut self) {
        let Some(mut plan) = self.plan.take() else { return };
        let settled = !self.raw.raft.has_pending_conf() && !self.conf().joint();
        if !settled || !self.is_leader_ready() {
            self.plan = Some(plan);
            return;
        }
        let next = {
            let (prs, last) = (self.raw.raft.prs(), self.last_index());
            let progress = |id| {
                let Some(progress) = prs.get(id) else { return (0, None) };
                let follows = progress.state == ProgressState::Replicate;
                (progress.matched, follows.then(|| last.saturating_sub(progress.matched)))
            };
            plan.next(&View {
                conf: self.conf(),
                now: self.time.now(),
                lag_max: self.config.catch_up_entries,
                idle_max: self.config.catch_up_idle_ns,
                progress: &progress,
            })
        };
        match next {
            Next::Wait => self.plan = Some(plan),
            Next::Propose(change) => {
                // Dropped if leadership is being handed over: asked for again.
                let _ = self.raw.propose_conf_change(Vec::new(), change);
                self.plan = Some(plan);
            }
            Next::Done => self.finish(plan),
            Next::Failed(why) => self.outbox.push(Effect::ChangeDone { cookie: plan.cookie, result: Err(why) }),
        }
    }

    /// A configuration took effect: a leader that it removes must still say that it did.
    pub(super) fn conf_changed(&mut self) {
        let conf = self.history.current();
        if !conf.joint()
            && let Some(plan) = self.plan.take_if(|plan| plan.target == conf.voters)
        {
            self.finish(plan);
        }
    }

    fn finish(&mut self, plan: Plan) {
        let changed = Changed { old: plan.old, new: plan.target };
        self.outbox.push(Effect::ChangeDone { cookie: plan.cookie, result: Ok(changed) });
    }

    pub(super) fn fail_plan(&mut self) {
        if let Some(plan) = self.plan.take() {
            let result = Err(ChangeFailed::LeaderLost);
            self.outbox.push(Effect::ChangeDone { cookie: plan.cookie, result });
        }
    }
}
