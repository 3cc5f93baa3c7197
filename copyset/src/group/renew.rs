//! A group that starts anew from its own log, because an operator wants it otherwise than its log says: out of the trash,
//! or with voters that are forced on it.
//!
//! Three steps. [`Copyset::freeze`]: it steps down and does nothing any more but have its committed entries applied.
//! [`Copyset::renew`]: a checkpoint at the applied index says what is different. When that is durable the raft node is
//! started again from the log, exactly as after a crash at that moment, and [`Effect::Renewed`] tells. So a crash before
//! that leaves the group as it was, one after it as it is wanted; and nothing of the former life, no lease and no
//! promise but the ones that a restart keeps, survives.
//!
//! Forced voters (Curve's ResetPeer) come with a term of their own and one epoch more. The log's tail stays: what this
//! replica acknowledged may have been committed by a leader that is gone. Membership changes in that tail are void
//! ([`ConfState::void`]), or they would undo what was forced as soon as they are committed. Suspicion ends (rule 21):
//! the operator's word is that this replica's state is what counts.

use super::snapshot::Installing;
use super::{Copyset, InProgress, MEMBERS_MAX, Role, Started};
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
    /// These are its voters, whoever they were. Others do not learn of it.
    Reset(Vec<u64>),
}

/// Why voters are not forced on a replica. Nothing has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResetRefused {
    /// No voters, too many, or nobody (0).
    #[error("not a possible set of voters")]
    Invalid,
    /// It has no configuration yet: nothing here could count.
    #[error("the replica is not in service")]
    Inactive,
    /// It leads, and a membership change is under way; or it is being started anew already.
    #[error("a membership change is under way")]
    Busy,
}

impl Copyset {
    /// Whether `peers` can be forced as voters; [`Started::Already`] if they are just that.
    pub fn may_reset(&self, peers: &[u64]) -> Result<Started, ResetRefused> {
        if peers.is_empty() || peers.len() > MEMBERS_MAX / 2 || peers.contains(&0) {
            return Err(ResetRefused::Invalid);
        }
        if self.role() == Role::Passive || self.raw.raft.term >= NUMBER_MAX {
            return Err(ResetRefused::Inactive);
        }
        let changing = matches!(self.change_in_progress(), Some(InProgress::Change { .. } | InProgress::Settling));
        if self.inert() || self.role() == Role::Leader && changing {
            return Err(ResetRefused::Busy);
        }
        let (wanted, conf) = (ConfState::of(peers), self.conf());
        let same = wanted.voters == conf.voters && !conf.joint() && conf.learners.is_empty();
        Ok(if same { Started::Already } else { Started::Begun })
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
        let Renewal::Reset(peers) = how else {
            checkpoint.conf = before.encode();
            let seq = self.log.borrow_mut().checkpoint(self.config.id, checkpoint);
            self.installing = Some(Installing::renewal(seq, self.suspicion));
            return seq;
        };
        let (last, void) = self.tail();
        checkpoint.conf = ConfState { epoch: before.epoch + 1, void, ..ConfState::of(peers) }.encode();
        checkpoint.hard_state =
            HardState { term: self.raw.raft.term + 1, vote: 0, commit: checkpoint.hard_state.commit.min(last) };
        let seq = match self.suspicion {
            Suspicion::Clear => self.log.borrow_mut().checkpoint(self.config.id, checkpoint),
            // What was lost before this does not matter any more, also to the next restart.
            _ => self.log.borrow_mut().renew(self.config.id, checkpoint, last),
        };
        self.installing = Some(Installing::renewal(seq, Suspicion::Clear));
        seq
    }

    /// The last entry behind the applied ones that can be kept, and the last membership change up to there (0: none). A
    /// log that lost records may have lost a payload of its tail; what comes behind that is lost with it.
    fn tail(&self) -> (u64, u64) {
        let log = self.log.borrow();
        let Some(index) = log.index(self.config.id) else { return (self.applied, 0) };
        let lacks = |at: &u64| *at > self.applied && self.suspicion.holds();
        let lost = index.not_resident().into_iter().map(|(at, _)| at).find(lacks);
        let last = lost.map_or(index.last_index(), |at| at - 1);
        let tail = index.entries(self.applied + 1, last + 1, usize::MAX);
        let void = tail.iter().rev().find(|entry| entry.kind == EntryKind::ConfChange);
        (last, void.map_or(0, |entry| entry.index))
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
