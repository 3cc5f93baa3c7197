//! Changes that come late: of an attempt that was given up and made again (rule 30).
//!
//! A client that has no answer in time sends a change again, perhaps over another connection or to another replica, and
//! goes on when that is answered. The first one may still lie in a socket, and done after what the client wrote next it
//! would undo it. Two things keep it from being done. In another term than it was sent for: the term it carries. In the
//! same term, so by this very shard: what is sent again says so and is remembered here, and earlier attempts of it that
//! come later are refused.

use super::request::Guard;
use rustc_hash::FxHashMap;
use std::collections::VecDeque;

/// Changes remembered; beyond that the oldest are forgotten.
const REMEMBERED_MAX: usize = 65_536;

/// Changes of which an attempt was lost, with the latest attempt.
#[derive(Debug, Default)]
pub(super) struct Guards {
    latest: FxHashMap<(u64, u64), u32>,
    order: VecDeque<(u64, u64)>,
}

impl Guards {
    /// Whether no later attempt of the same change came before.
    pub(super) fn passes(&mut self, guard: &Guard) -> bool {
        let key = (guard.client, guard.id);
        if guard.attempt == 0 {
            return self.latest.is_empty() || !self.latest.contains_key(&key);
        }
        if let Some(latest) = self.latest.get_mut(&key) {
            let passes = guard.attempt >= *latest;
            *latest = guard.attempt.max(*latest);
            return passes;
        }
        if self.order.len() >= REMEMBERED_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.latest.remove(&oldest);
        }
        self.order.push_back(key);
        self.latest.insert(key, guard.attempt);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_earlier_attempt_is_refused_once_a_later_one_came() {
        let mut guards = Guards::default();
        let guard = |client, id, attempt| Guard { client, id, attempt, term: 3 };
        assert!(guards.passes(&guard(1, 1, 0)) && guards.passes(&guard(1, 2, 0)));
        assert!(guards.passes(&guard(1, 1, 2)));
        assert!(!guards.passes(&guard(1, 1, 0)) && !guards.passes(&guard(1, 1, 1)));
        assert!(guards.passes(&guard(1, 1, 2)) && guards.passes(&guard(1, 1, 3)));
        assert!(guards.passes(&guard(2, 1, 0)), "another client");
        assert!(guards.passes(&guard(1, 2, 0)), "another change");
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut guards = Guards::default();
        let guard = |id, attempt| Guard { client: 1, id, attempt, term: 3 };
        for id in 0..REMEMBERED_MAX as u64 + 10 {
            assert!(guards.passes(&guard(id, 1)));
        }
        assert_eq!((guards.latest.len(), guards.order.len()), (REMEMBERED_MAX, REMEMBERED_MAX));
        assert!(guards.passes(&guard(9, 0)) && !guards.passes(&guard(10, 0)), "the oldest are forgotten");
    }
}
