//! A leader's lease (rule 18): the time in which no other replica can have been elected.
//!
//! A round is one broadcast of heartbeats; its number travels in the heartbeat's context, and raft's answer carries
//! it back. Who echoes a round heard from this leader after the round's send time, and refuses votes until T after
//! that (`group/time.rs`). So from the send time of a round that a quorum has echoed, nobody is elected for T. The
//! lease is cut short by a margin for clocks that run at different rates. raft-rs's own lease counts ticks, and
//! answers stale reads.

use crate::conf::ConfState;
use std::collections::{BTreeMap, VecDeque};

/// Rounds remembered while nobody answers.
const PENDING_MAX: usize = 1024;

/// See the module's comment. All times are those of the own clock.
#[derive(Debug, Default)]
pub(crate) struct Lease {
    /// Number of the newest round; numbers are used once in a process's life.
    last: u64,
    /// Rounds and their send times, oldest first, until a quorum has echoed them.
    pending: VecDeque<(u64, u64)>,
    /// Newest round each replica echoed.
    echoed: BTreeMap<u64, u64>,
    /// Newest round a quorum echoed, and its send time.
    agreed: Option<(u64, u64)>,
    given_up: bool,
}

impl Lease {
    /// Leadership or term changed: what was echoed was echoed to another leader.
    pub(crate) fn reset(&mut self) {
        *self = Self { last: self.last, ..Self::default() };
    }

    /// A round leaves not before `now`.
    pub(crate) fn start(&mut self, now: u64) -> u64 {
        self.last += 1;
        if self.pending.len() == PENDING_MAX {
            self.pending.pop_front();
        }
        self.pending.push_back((self.last, now));
        self.last
    }

    /// Newest round started.
    pub(crate) fn last(&self) -> u64 {
        self.last
    }

    /// A member echoed a round.
    pub(crate) fn echo(&mut self, from: u64, round: u64) {
        let newest = self.echoed.entry(from).or_default();
        *newest = round.min(self.last).max(*newest);
    }

    /// Counts what `conf`'s voters echoed, in both halves while joint; gives the send time of the newest round that a
    /// quorum echoed, if it is a newer one than before.
    pub(crate) fn settle(&mut self, me: u64, conf: &ConfState) -> Option<u64> {
        let mut round = self.quorum(me, &conf.voters);
        if conf.joint() {
            round = round.min(self.quorum(me, &conf.voters_outgoing));
        }
        let mut newest = None;
        while let Some(found) = self.pending.pop_front_if(|(number, _)| *number <= round) {
            newest = Some(found);
        }
        self.agreed = newest.or(self.agreed);
        newest.map(|(_, sent)| sent)
    }

    fn quorum(&self, me: u64, voters: &[u64]) -> u64 {
        let round = |id| if id == me { self.last } else { self.echoed.get(&id).copied().unwrap_or(0) };
        let mut rounds: Vec<u64> = voters.iter().map(|&id| round(id)).collect();
        rounds.sort_unstable();
        let majority = rounds.len() / 2 + 1;
        rounds.len().checked_sub(majority).and_then(|at| rounds.get(at)).copied().unwrap_or(0)
    }

    /// Newest round a quorum echoed; 0 if there is none.
    pub(crate) fn agreed(&self) -> u64 {
        self.agreed.map_or(0, |(round, _)| round)
    }

    /// Another replica was told to take over at once: voters no longer refuse it.
    pub(crate) fn give_up(&mut self) {
        self.given_up = true;
    }

    /// True before the lease's end. `length` is T less the margin.
    pub(crate) fn holds(&self, now: u64, length: u64) -> bool {
        !self.given_up && self.agreed.is_some_and(|(_, sent)| now < sent.saturating_add(length))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_from_the_send_time_of_a_round_a_quorum_echoed() {
        let conf = ConfState::of(&[1, 2, 3]);
        let mut lease = Lease::default();
        let first = lease.start(1000);
        let second = lease.start(1500);
        assert_eq!(lease.settle(1, &conf), None);
        lease.echo(9, second);
        assert_eq!(lease.settle(1, &conf), None, "not a voter");
        lease.echo(2, first);
        assert_eq!(lease.settle(1, &conf), Some(1000));
        assert!(lease.holds(1379, 380) && !lease.holds(1380, 380));
        lease.echo(3, second);
        assert_eq!(lease.settle(1, &conf), Some(1500));
        lease.echo(3, first);
        assert!(lease.settle(1, &conf).is_none() && lease.holds(1800, 380), "a late echo takes nothing away");
        lease.give_up();
        assert!(!lease.holds(1501, 380));
        lease.reset();
        lease.echo(2, second);
        assert!(lease.settle(1, &conf).is_none() && !lease.holds(1501, 380), "echoed to another leader");
        assert_eq!(lease.start(2000), 3, "numbers are used once");
    }

    #[test]
    fn a_joint_configuration_needs_both_halves() {
        let conf = ConfState { voters_outgoing: vec![1, 4, 5], ..ConfState::of(&[1, 2, 3]) };
        let mut lease = Lease::default();
        let round = lease.start(10);
        lease.echo(2, round);
        lease.echo(3, round);
        assert_eq!(lease.settle(1, &conf), None);
        lease.echo(4, round);
        assert_eq!(lease.settle(1, &conf), Some(10));
    }

    #[test]
    fn an_echo_from_the_future_counts_as_the_newest_round() {
        let mut lease = Lease::default();
        lease.start(10);
        lease.echo(2, u64::MAX);
        lease.settle(1, &ConfState::of(&[1, 2]));
        lease.start(20);
        assert_eq!(lease.settle(1, &ConfState::of(&[1, 2])), None);
        assert_eq!(lease.agreed(), 1);
    }
}
