//! Reads that wait for a quorum's word that this replica still leads, when its lease does not say so (ReadIndex).
//!
//! Invariant: a read is answered only after a quorum echoed a lease round that started after the read came, and when
//! everything is applied that was committed when it came. Any later round serves as well, so a lost one delays a read
//! by a heartbeat and loses nothing (rule 17). raft-rs's own read index, which drops requests, is not used.

use crate::effect::Effect;
use std::collections::VecDeque;

#[derive(Debug)]
struct Read {
    cookie: u64,
    /// Committed when it came.
    index: u64,
    /// The first round that started after it came; 0 until that starts.
    round: u64,
}

/// Reads in the order they came; their indexes and rounds rise.
#[derive(Debug, Default)]
pub(crate) struct Reads {
    waiting: VecDeque<Read>,
    /// How many at the front a quorum has answered for.
    confirmed: usize,
}

impl Reads {
    pub(crate) fn push(&mut self, cookie: u64, index: u64) {
        self.waiting.push_back(Read { cookie, index, round: 0 });
    }

    pub(crate) fn count(&self) -> usize {
        self.waiting.len()
    }

    /// Some wait for a round to start.
    pub(crate) fn needs_round(&self) -> bool {
        self.waiting.back().is_some_and(|read| read.round == 0)
    }

    /// A round starts now.
    pub(crate) fn started(&mut self, round: u64) {
        self.waiting.iter_mut().rev().take_while(|read| read.round == 0).for_each(|read| read.round = round);
    }

    /// A quorum echoed `round`.
    pub(crate) fn agreed(&mut self, round: u64) {
        let more = self.waiting.iter().skip(self.confirmed);
        self.confirmed += more.take_while(|read| read.round != 0 && read.round <= round).count();
    }

    /// Some can be answered.
    pub(crate) fn has_ready(&self, applied: u64) -> bool {
        self.confirmed > 0 && self.waiting.front().is_some_and(|read| read.index <= applied)
    }

    /// Those that can be answered.
    pub(crate) fn take_ready(&mut self, applied: u64, out: &mut Vec<Effect>) {
        while self.has_ready(applied) {
            let Some(read) = self.waiting.pop_front() else { return };
            self.confirmed -= 1;
            out.push(Effect::ReadReady { cookie: read.cookie });
        }
    }

    /// Leadership or term is lost.
    pub(crate) fn drop_all(&mut self, out: &mut Vec<Effect>) {
        self.confirmed = 0;
        out.extend(self.waiting.drain(..).map(|read| Effect::ReadDropped { cookie: read.cookie }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_waits_for_a_later_round_and_for_its_index() {
        let mut reads = Reads::default();
        let mut out = Vec::new();
        reads.push(1, 10);
        assert!(reads.needs_round());
        reads.started(5);
        reads.push(2, 12);
        reads.agreed(5);
        reads.take_ready(9, &mut out);
        assert!(out.is_empty(), "not applied");
        reads.take_ready(12, &mut out);
        assert_eq!(out, [Effect::ReadReady { cookie: 1 }], "the second came after round 5 had started");
        assert!(reads.needs_round());
        reads.started(6);
        reads.push(3, 12);
        reads.agreed(7);
        reads.take_ready(12, &mut out);
        assert_eq!(out[1..], [Effect::ReadReady { cookie: 2 }]);
        reads.drop_all(&mut out);
        assert_eq!(out[2..], [Effect::ReadDropped { cookie: 3 }]);
        assert!(reads.count() == 0 && !reads.has_ready(99));
    }
}
