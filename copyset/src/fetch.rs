//! Payloads that must come back from the log before they can be sent.
//!
//! raft-rs is told "not now" together with a context that it wants back when the entries are there. It may ask again
//! meanwhile: the same question is kept once. One fetch is under way at a time.

use raft::GetEntriesContext;
use std::collections::BTreeMap;

/// See the module's comment.
#[derive(Debug, Default)]
pub(crate) struct Fetches {
    /// What raft-rs asked for, by the text of its question (it cannot be compared otherwise): the first entry absent.
    asked: BTreeMap<String, (u64, GetEntriesContext)>,
    /// Being fetched.
    under_way: Option<(u64, u64)>,
}

impl Fetches {
    pub(crate) fn ask(&mut self, low: u64, context: GetEntriesContext) {
        self.asked.insert(format!("{context:?}"), (low, context));
    }

    /// The first entry to fetch, if a fetch may begin.
    pub(crate) fn wanted(&self) -> Option<u64> {
        if self.under_way.is_some() {
            return None;
        }
        self.asked.values().map(|(low, _)| *low).min()
    }

    pub(crate) fn begin(&mut self, low: u64, high: u64) {
        self.under_way = Some((low, high));
    }

    /// The fetch that began at `low` is over; gives the questions it answers.
    pub(crate) fn finish(&mut self, low: u64) -> Vec<GetEntriesContext> {
        let Some((_, high)) = self.under_way.take_if(|(from, _)| *from == low) else { return Vec::new() };
        let answered = self.asked.extract_if(.., |_, (first, _)| (low..high).contains(first));
        answered.map(|(_, (_, context))| context).collect()
    }

    /// Leadership or term is lost: nobody asks any more.
    pub(crate) fn clear(&mut self) {
        self.asked.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_fetch_answers_all_that_asked_for_its_range() {
        let mut fetches = Fetches::default();
        fetches.ask(7, GetEntriesContext::empty(true));
        fetches.ask(5, GetEntriesContext::empty(false));
        fetches.ask(6, GetEntriesContext::empty(false));
        assert_eq!((fetches.asked.len(), fetches.wanted()), (2, Some(6)), "asked twice, kept once");
        fetches.begin(6, 7);
        assert_eq!(fetches.wanted(), None);
        assert!(fetches.finish(5).is_empty(), "not the one under way");
        assert_eq!(fetches.finish(6).len(), 1);
        assert_eq!(fetches.wanted(), Some(7));
    }
}
