//! A membership change on its way, as its leader sees it: new members first as learners, then, caught up, one change of
//! the voters (joint if it concerns more than one). What it wants next follows from the configuration alone, so no
//! step can be lost or done twice.

use crate::conf::ConfState;
use crate::effect::ChangeFailed;
use raft::eraftpb::{ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2};
use std::collections::BTreeMap;

/// A change that is applied as an empty entry was refused by raft-rs; so often it is tried again.
const PROPOSALS_MAX: u32 = 16;

/// How far a change has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// New members are being made learners, or catch up.
    CatchUp,
    /// The voters are being exchanged.
    Switch,
    /// The learners are being removed again.
    Undo,
}

/// What to do next.
#[derive(Debug, PartialEq)]
pub(crate) enum Next {
    /// Nothing until something changes.
    Wait,
    Propose(ConfChangeV2),
    Done,
    Failed(ChangeFailed),
}

/// One learner's progress.
#[derive(Clone, Copy, Debug)]
struct Learner {
    matched: u64,
    /// When that last rose, or the peer was seen fetching a snapshot.
    moved: u64,
}

/// See the module's comment.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) cookie: u64,
    pub(crate) old: Vec<u64>,
    /// Voters wanted.
    pub(crate) target: Vec<u64>,
    pub(crate) stage: Stage,
    learners: BTreeMap<u64, Learner>,
    given_up: Option<u64>,
    proposals: u32,
}

/// What a plan must know.
pub(crate) struct View<'a> {
    pub(crate) conf: &'a ConfState,
    pub(crate) now: u64,
    /// Entries a learner may lack, and how long it may stand still.
    pub(crate) lag_max: u64,
    pub(crate) idle_max: u64,
    /// (matched, lag if it is replicating) of a member.
    pub(crate) progress: &'a dyn Fn(u64) -> (u64, Option<u64>),
}

impl Plan {
    pub(crate) fn new(cookie: u64, old: Vec<u64>, target: Vec<u64>) -> Self {
        let stage = if target.iter().all(|id| old.contains(id)) { Stage::Switch } else { Stage::CatchUp };
        Self { cookie, old, target, stage, learners: BTreeMap::new(), given_up: None, proposals: 0 }
    }

    /// A learner is fetching a snapshot.
    pub(crate) fn moved(&mut self, peer: u64, now: u64) {
        if let Some(learner) = self.learners.get_mut(&peer) {
            learner.moved = learner.moved.max(now);
        }
    }

    /// Called while no other change is pending; `view.conf` is not joint.
    pub(crate) fn next(&mut self, view: &View<'_>) -> Next {
        if let Some(peer) = self.given_up {
            let ours: Vec<u64> = self.new_members().filter(|id| view.conf.learners.contains(id)).collect();
            return match ours.is_empty() {
                true => Next::Failed(ChangeFailed::CatchUp { peer }),
                false => self.propose(&each(&ours, ConfChangeType::RemoveNode)),
            };
        }
        if view.conf.voters == self.target {
            return Next::Done;
        }
        let known = |id: &u64| view.conf.voters.contains(id) || view.conf.learners.contains(id);
        let strangers: Vec<u64> = self.new_members().filter(|id| !known(id)).collect();
        if !strangers.is_empty() {
            return self.propose(&each(&strangers, ConfChangeType::AddLearnerNode));
        }
        match self.late(view) {
            None => {
                self.stage = Stage::Switch;
                self.propose(&self.switch(view.conf))
            }
            Some((peer, moved)) if view.now.saturating_sub(moved) >= view.idle_max => {
                (self.given_up, self.stage) = (Some(peer), Stage::Undo);
                self.next(view)
            }
            Some(_) => Next::Wait,
        }
    }

    fn new_members(&self) -> impl Iterator<Item = u64> + '_ {
        self.target.iter().copied().filter(|id| !self.old.contains(id))
    }

    /// The learner that stands still longest of those that are not caught up, and since when.
    fn late(&mut self, view: &View<'_>) -> Option<(u64, u64)> {
        let members: Vec<u64> = self.new_members().collect();
        let mut worst: Option<(u64, u64)> = None;
        for id in members {
            let (matched, lag) = (view.progress)(id);
            let learner = self.learners.entry(id).or_insert(Learner { matched, moved: view.now });
            if matched > learner.matched {
                *learner = Learner { matched, moved: view.now };
            }
            let late = lag.is_none_or(|lag| lag > view.lag_max);
            if late && worst.is_none_or(|(_, moved)| learner.moved < moved) {
                worst = Some((id, learner.moved));
            }
        }
        worst
    }

    /// From the voters there are to those wanted. Learners left over from a change that came to nothing go with it.
    fn switch(&self, conf: &ConfState) -> Vec<(u64, ConfChangeType)> {
        let wanted = |id: &&u64| self.target.contains(*id);
        let added = self.target.iter().filter(|id| !conf.voters.contains(id));
        let removed = conf.voters.iter().chain(&conf.learners).filter(|id| !wanted(id));
        let added = added.map(|&id| (id, ConfChangeType::AddNode));
        added.chain(removed.map(|&id| (id, ConfChangeType::RemoveNode))).collect()
    }

    fn propose(&mut self, changes: &[(u64, ConfChangeType)]) -> Next {
        self.proposals += 1;
        if self.proposals > PROPOSALS_MAX {
            return Next::Failed(ChangeFailed::Refused);
        }
        Next::Propose(change_of(changes))
    }
}

fn each(ids: &[u64], kind: ConfChangeType) -> Vec<(u64, ConfChangeType)> {
    ids.iter().map(|&id| (id, kind)).collect()
}

/// As raft-rs wants it: several at once go through a joint stage that ends by itself.
fn change_of(changes: &[(u64, ConfChangeType)]) -> ConfChangeV2 {
    let mut all = ConfChangeV2::default();
    if changes.len() > 1 {
        all.set_transition(ConfChangeTransition::Implicit);
    }
    for &(node, kind) in changes {
        let mut single = ConfChangeSingle::default();
        single.set_change_type(kind);
        single.set_node_id(node);
        all.mut_changes().push(single);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn next(plan: &mut Plan, conf: &ConfState, now: u64, progress: (u64, Option<u64>)) -> Next {
        let progress = |_| progress;
        plan.next(&View { conf, now, lag_max: 10, idle_max: 100, progress: &progress })
    }

    fn learners(conf: &ConfState, learners: &[u64]) -> ConfState {
        ConfState { learners: learners.to_vec(), ..conf.clone() }
    }

    #[test]
    fn new_members_learn_first() {
        let conf = ConfState::of(&[1, 2, 3]);
        let mut plan = Plan::new(7, conf.voters.clone(), vec![1, 2, 4]);
        let add = change_of(&[(4, ConfChangeType::AddLearnerNode)]);
        assert_eq!(next(&mut plan, &conf, 0, (0, None)), Next::Propose(add));
        let conf = learners(&conf, &[4]);
        assert_eq!(next(&mut plan, &conf, 0, (0, None)), Next::Wait);
        assert_eq!(next(&mut plan, &conf, 90, (5, Some(11))), Next::Wait);
        assert_eq!(next(&mut plan, &conf, 180, (5, Some(11))), Next::Wait, "it moved at 90");
        let switch = change_of(&[(4, ConfChangeType::AddNode), (3, ConfChangeType::RemoveNode)]);
        assert_eq!(switch.get_transition(), ConfChangeTransition::Implicit);
        assert_eq!(next(&mut plan, &conf, 181, (5, Some(10))), Next::Propose(switch));
        assert_eq!(next(&mut plan, &ConfState::of(&[1, 2, 4]), 190, (5, Some(0))), Next::Done);
    }

    #[test]
    fn a_learner_that_stands_still_is_taken_out_again() {
        let conf = learners(&ConfState::of(&[1]), &[2]);
        let mut plan = Plan::new(7, vec![1], vec![1, 2]);
        assert_eq!(next(&mut plan, &conf, 50, (3, None)), Next::Wait);
        plan.moved(2, 100);
        assert_eq!(next(&mut plan, &conf, 199, (3, None)), Next::Wait, "it fetches a snapshot");
        let remove = change_of(&[(2, ConfChangeType::RemoveNode)]);
        assert_eq!(next(&mut plan, &conf, 200, (3, None)), Next::Propose(remove));
        let failed = Next::Failed(ChangeFailed::CatchUp { peer: 2 });
        assert_eq!(next(&mut plan, &ConfState::of(&[1]), 201, (0, None)), failed);
    }

    #[test]
    fn a_removal_needs_no_learner_and_takes_leftovers_along() {
        let conf = learners(&ConfState::of(&[1, 2, 3]), &[9]);
        let mut plan = Plan::new(7, conf.voters.clone(), vec![1, 2]);
        let both = change_of(&[(3, ConfChangeType::RemoveNode), (9, ConfChangeType::RemoveNode)]);
        assert_eq!(next(&mut plan, &conf, 0, (0, None)), Next::Propose(both));
        for _ in 1..PROPOSALS_MAX {
            assert!(matches!(next(&mut plan, &conf, 0, (0, None)), Next::Propose(_)));
        }
        assert_eq!(next(&mut plan, &conf, 0, (0, None)), Next::Failed(ChangeFailed::Refused));
    }
}
