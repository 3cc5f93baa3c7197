//! A group that starts anew from its own log, because an operator wants it otherwise than its log says: out of the trash,
//! or as the only voter.
//!
//! Three steps. [`Copyset::freeze`]: it steps down and does nothing any more but have its committed entries applied.
//! [`Copyset::renew`]: a checkpoint at the applied index says what is different. When that is durable the raft node is
//! started again from the log, exactly as after a crash at that moment, and [`Effect::Renewed`] tells. So a crash before
//! that leaves the group as it was, one after it as it is wanted; and nothing of the former life, no lease and no
//! promise but the ones that a restart keeps, survives.
//!
//! To be the only voter (Curve's ResetPeer) comes with a term of its own and one epoch more. The log's tail stays: what
//! this replica acknowledged may have been committed by a leader that is gone. Membership changes in that tail are void
//! ([`ConfState::void`]), or they would undo what was forced as soon as they are committed. Suspicion ends (rule 21):
//! the operator's word is that this replica's state is what counts.
//!
//! Several voters cannot be forced: each replica would have a configuration of its own, as its tail says what is void,
//! and tails differ.

use super::snapshot::Installing;
use super::{Copyset, InProgress, Role, Started};
use crate::conf::ConfState;
use crate::effect::Effect;
use crate::restore::NUMBER_MAX;
use crate::suspicion::Suspicion;
use raftlog::{EntryKind, HardState, Seq};

/// What is different in a group's next life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Renewal {
    /// It is retired no more.
    Restored,
    /// It is the only voter, whoever they were. Others do not learn of it.
    Reset,
}

/// Why a replica is not made the only voter. Nothing has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResetRefused {
    /// Others are wanted too, or nobody is.
    #[error("only the replica itself can be forced as a voter")]
    Invalid,
    /// It has no configuration yet: nothing here could count.
    #[error("the replica is not in service")]
    Inactive,
    /// It leads, and a membership change is under way; or it is being started anew already.
    #[error("a membership change is under way")]
    Busy,
}

impl Copyset {
    /// Whether `peers`, which must be this replica alone, can be forced as voters; [`Started::Already`] if that is so and
    /// the log says it whatever it lost before.
    pub fn may_reset(&self, peers: &[u64]) -> Result<Started, ResetRefused> {
        if peers.is_empty() || peers.iter().any(|&peer| peer != self.config.peer) {
            return Err(ResetRefused::Invalid);
        }
        if self.role() == Role::Passive || self.raw.raft.term >= NUMBER_MAX {
            return Err(ResetRefused::Inactive);
        }
        let changing = matches!(self.change_in_progress(), Some(InProgress::Change { .. } | InProgress::Settling));
        if self.inert() || self.role() == Role::Leader && changing {
            return Err(ResetRefused::Busy);
        }
        let conf = self.conf();
        let same = conf.voters == [self.config.peer] && !conf.joint() && conf.learners.is_empty();
        Ok(if same && !self.lossy { Started::Already } else { Started::Begun })
    }

    /// From now on this replica leads, votes and follows no more, and nothing more is handed out for apply. Only
    /// [`Self::renew`] ends that.
    pub fn freeze(&mut self, now: u64) {
        self.time.advance(now);
        let term = self.raw.raft.term;
        self.raw.raft.become_follower(term, 0);
        self.look();
        self.frozen = true;
        self.offer = None;
    }

    /// Everything that was handed out is applied.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.applied == self.emitted.0
    }

    /// Logs what the group is started anew from. All that is applied must be durable outside the log: the log forgets it.
    /// Gives the batch to wait for; once [`Self::persisted`] has reached it, [`Effect::Renewed`] follows.
    ///
    /// # Panics
    /// If it was not frozen, or if not all that was handed out is applied.
    pub fn renew(&mut self, how: &Renewal) -> Seq {
        assert!(self.frozen && self.is_settled() && self.installing.is_none(), "a group at rest is renewed");
        let mut checkpoint = self.checkpoint_at(self.applied);
        let before = ConfState { retired: 0, ..self.own(self.history.at(self.applied).clone()) };
        if *how == Renewal::Restored {
            checkpoint.conf = before.encode();
            let seq = self.log.borrow_mut().checkpoint(self.config.id, checkpoint);
            self.installing = Some(Installing::renewal(seq, self.suspicion));
            return seq;
        }
        let (last, void) = self.tail();
        let alone = ConfState::of(&[self.config.peer]);
        checkpoint.conf = ConfState { epoch: before.epoch + 1, void, ..alone }.encode();
        checkpoint.hard_state =
            HardState { term: self.raw.raft.term + 1, vote: 0, commit: checkpoint.hard_state.commit.min(last) };
        let mut log = self.log.borrow_mut();
        let seq = match self.lossy {
            false => log.checkpoint(self.config.id, checkpoint),
            // What was lost before this does not matter any more, also to the next restart.
            true => log.renew(self.config.id, checkpoint, last),
        };
        drop(log);
        self.lossy = false;
        self.installing = Some(Installing::renewal(seq, Suspicion::Clear));
        seq
    }

    /// The last entry behind the applied ones that can be kept, and the last membership change up to there (0: none). A
    /// log that lost records may have lost a payload of its tail; what comes behind that is lost with it.
    fn tail(&self) -> (u64, u64) {
        let log = self.log.borrow();
        let Some(index) = log.index(self.config.id) else { return (self.applied, 0) };
        let lacks = |at: &u64| *at > self.applied && self.lossy;
        let lost = index.not_resident().into_iter().map(|(at, _)| at).find(lacks);
        let last = lost.map_or(index.last_index(), |at| at - 1);
        let tail = index.entries(self.applied + 1, last + 1, usize::MAX);
        let void = tail.iter().rev().find(|entry| entry.kind == EntryKind::ConfChange);
        (last, void.map_or(0, |entry| entry.index))
    }

    /// The last entry that [`Self::renew`] with [`Renewal::Reset`] would keep, as things are.
    #[must_use]
    pub fn tail_end(&self) -> u64 {
        self.tail().0
    }

    /// The log has lost records of this group and still shows it, so that each restart would find it suspect, though it be
    /// so no longer: its tail is to be logged again, by [`Self::renew`] or [`Self::relogged`].
    #[must_use]
    pub fn is_lossy(&self) -> bool {
        self.lossy
    }

    /// Its checkpoint and its tail were logged again in one stroke, and what was lost before that matters no more.
    pub fn relogged(&mut self) {
        self.lossy &= self.suspicion.holds();
    }

    /// The checkpoint of [`Self::renew`] is durable.
    pub(super) fn renewed(&mut self, suspicion: Suspicion) {
        let index = self.applied;
        self.begin_anew(suspicion.holds());
        self.suspicion = suspicion;
        self.outbox.push(Effect::Renewed { index });
        self.weigh_suspicion();
    }

    /// Nothing happens by itself, and no message is taken.
    pub(super) fn inert(&self) -> bool {
        self.frozen || self.installing.is_some()
    }
}
