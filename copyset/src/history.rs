//! The configuration at every index a checkpoint may be asked for.
//!
//! Invariant: the first step stands at or below the log's checkpoint, so for each index from there on the answer is
//! the last step at or below it. Curve saves members and epoch at some moment near the snapshot; here they belong to
//! exactly one index, so a replay counts no election twice.

use crate::conf::ConfState;
use std::collections::VecDeque;

/// Configurations by the index they hold from.
#[derive(Debug)]
pub(crate) struct History {
    steps: VecDeque<(u64, ConfState)>,
}

impl History {
    /// `conf` holds from `index` on.
    pub(crate) fn new(index: u64, conf: ConfState) -> Self {
        Self { steps: VecDeque::from([(index, conf)]) }
    }

    /// The newest configuration.
    pub(crate) fn current(&self) -> &ConfState {
        let Some((_, conf)) = self.steps.back() else { unreachable!("a history is never empty") };
        conf
    }

    /// The configuration at `index`, which is not below the first step.
    pub(crate) fn at(&self, index: u64) -> &ConfState {
        let after = self.steps.partition_point(|(from, _)| *from <= index);
        let step = after.checked_sub(1).and_then(|i| self.steps.get(i));
        let Some((_, conf)) = step else { panic!("no configuration is known as old as index {index}") };
        conf
    }

    /// `conf` holds from `index` on; indexes rise.
    pub(crate) fn push(&mut self, index: u64, conf: ConfState) {
        assert!(self.steps.back().is_none_or(|(last, _)| *last < index), "configuration steps out of order");
        self.steps.push_back((index, conf));
    }

    /// Nobody will ask for an index below `index` any more.
    pub(crate) fn forget_below(&mut self, index: u64) {
        while self.steps.get(1).is_some_and(|(from, _)| *from <= index) {
            self.steps.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_for_exactly_one_index() {
        let conf = |epoch| ConfState { epoch, ..ConfState::of(&[1]) };
        let mut history = History::new(10, conf(0));
        history.push(12, conf(1));
        history.push(20, conf(2));
        let epoch = |h: &History, i| h.at(i).epoch;
        assert_eq!([10, 11, 12, 19, 20, 99].map(|i| epoch(&history, i)), [0, 0, 1, 1, 2, 2]);
        history.forget_below(15);
        assert_eq!([15, 20].map(|i| epoch(&history, i)), [1, 2]);
        history.forget_below(100);
        assert_eq!((history.steps.len(), history.current().epoch), (1, 2));
    }
}
