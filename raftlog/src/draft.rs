//! A copyset while its records are read again, in log order.
//!
//! Records may be missing: what was freed is gone, what rotted is lost. So a draft takes entries with holes and
//! before any checkpoint, and only at the end it is judged whether it is whole.

use crate::index::Slot;
use crate::record::{Body, Record};
use crate::{Checkpoint, CopysetId, HardState, Index, Seq};
use bytes::Bytes;
use rustc_hash::FxHashMap;
use std::collections::{BTreeMap, VecDeque};

/// Where a record was found.
#[derive(Clone, Copy)]
pub(crate) struct At {
    pub(crate) seq: Seq,
    pub(crate) place: crate::index::Place,
    pub(crate) rotten: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Draft {
    incarnation: u64,
    checkpoint: Option<(Checkpoint, Seq)>,
    hard_state: HardState,
    slots: BTreeMap<u64, Slot>,
    staged: BTreeMap<u64, Slot>,
    /// The tail ends here if nothing is missing.
    reaches: u64,
    /// Batch since which the log holds everything about this copyset (its creation or last re-logging).
    since: Seq,
    last_seq: Seq,
}

/// A draft, judged.
pub(crate) struct Judged {
    /// `None`: not a living copyset.
    pub(crate) index: Option<Index>,
    /// First index that is missing.
    pub(crate) missing: Option<u64>,
    /// Indexes whose payload is rotten, and their batches.
    pub(crate) rotten: Vec<(u64, Seq)>,
    pub(crate) since: Seq,
}

/// Takes one record over.
pub(crate) fn replay(drafts: &mut FxHashMap<CopysetId, Draft>, record: Record, at: At) {
    let Record { copyset, incarnation, body } = record;
    if let Body::Purge = body {
        if drafts.get(&copyset).is_some_and(|d| d.incarnation == incarnation) {
            drafts.remove(&copyset);
        }
        return;
    }
    let draft = drafts.entry(copyset).or_default();
    if draft.incarnation != incarnation {
        // Another life begins with a checkpoint; before any was seen, the later record is of the later life. Nobody's life
        // (0) begins when nothing else is known: it is written by whoever could not read what was there.
        let begins = matches!(body, Body::Checkpoint { .. }) && incarnation != 0 || draft.checkpoint.is_none();
        if !begins {
            return;
        }
        *draft = Draft { incarnation, ..Draft::default() };
    }
    draft.last_seq = at.seq;
    match body {
        Body::Checkpoint { checkpoint, swap } => draft.checkpoint(checkpoint, swap, at.seq),
        Body::HardState(hs) => draft.hard_state = hs,
        Body::Entry { index, term, prev_term, kind, staged, payload_len, context } => {
            let At { seq, place, rotten } = at;
            let slot = Slot { term, kind, rotten, payload_len, seq, place, context, payload: Bytes::new() };
            draft.entry(index, slot, prev_term, staged);
        }
        Body::Purge => {}
    }
}

impl Draft {
    fn applied(&self) -> u64 {
        self.checkpoint.as_ref().map_or(0, |(cp, _)| cp.applied_index)
    }

    fn entry(&mut self, index: u64, slot: Slot, prev_term: u64, staged: bool) {
        if index <= self.applied() {
            return;
        }
        let slots = if staged { &mut self.staged } else { &mut self.slots };
        slots.split_off(&index);
        if slots.get(&(index - 1)).is_some_and(|before| before.term != prev_term) {
            slots.remove(&(index - 1)); // replaced by a record that is lost
        }
        slots.insert(index, slot);
        if !staged {
            self.reaches = index;
        }
    }

    fn checkpoint(&mut self, mut cp: Checkpoint, swap: Option<u64>, seq: Seq) {
        if let Some(last) = swap {
            self.slots = std::mem::take(&mut self.staged);
            (self.reaches, self.since) = (last, seq);
        }
        let applied = cp.applied_index;
        if self.slots.get(&applied).is_some_and(|s| s.term != cp.applied_term) {
            self.slots.clear();
            self.reaches = applied;
        }
        self.slots = self.slots.split_off(&(applied + 1));
        cp.hard_state.commit = cp.hard_state.commit.max(applied);
        self.hard_state = cp.hard_state;
        self.checkpoint = Some((cp, seq));
    }

    /// The copyset if it lives: its checkpoint is not older than `live_seq`. Its tail ends before the first hole.
    pub(crate) fn judge(mut self, live_seq: Seq) -> Judged {
        let mut judged = Judged { index: None, missing: None, rotten: Vec::new(), since: self.since };
        let Some((cp, seq)) = self.checkpoint.take() else {
            // Entries of a copyset whose checkpoint should be here, or of one that died before `live_seq`.
            judged.missing = (self.last_seq >= live_seq).then(|| self.slots.keys().next().copied().unwrap_or(0));
            return judged;
        };
        if seq < live_seq {
            return judged;
        }
        let mut tail = VecDeque::new();
        for (index, slot) in self.slots {
            if index != cp.applied_index + 1 + tail.len() as u64 {
                break;
            }
            if slot.rotten {
                judged.rotten.push((index, slot.seq));
            }
            tail.push_back(slot);
        }
        let last = cp.applied_index + tail.len() as u64;
        judged.missing = (last < self.reaches.max(self.hard_state.commit)).then_some(last + 1);
        judged.index = Some(Index::recovered(cp, seq, self.hard_state, tail));
        judged
    }
}
