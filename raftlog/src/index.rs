//! What the log says about one copyset: checkpoint, hard state and the tail of entries, in memory from `append` on.
//!
//! Invariants: `slots[k]` is the entry `applied_index + 1 + k`; sequence numbers of slots never decrease, so the
//! oldest batch a copyset needs is known without a search; what a record supersedes stays pinned until that
//! record is durable.

use crate::{Checkpoint, Entry, EntryKind, HardState, Seq};
use bytes::Bytes;
use std::collections::VecDeque;

/// Where a payload lies in the log zone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Location {
    /// Offset in the zone, bytes.
    pub offset: u64,
    /// Length, bytes.
    pub len: usize,
}

/// Where an entry's payload is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In batch `Slot::seq`, this far behind its header; not written yet.
    Queued(u64),
    /// At this offset of the zone.
    Disk(u64),
}

/// One entry of the tail.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    pub(crate) term: u64,
    pub(crate) kind: EntryKind,
    pub(crate) rotten: bool,
    pub(crate) payload_len: u32,
    pub(crate) seq: Seq,
    pub(crate) place: Place,
    pub(crate) context: Bytes,
    /// Empty when `payload_len > 0`: not resident.
    pub(crate) payload: Bytes,
}

impl Slot {
    fn resident(&self) -> bool {
        self.payload.len() == self.payload_len as usize
    }
}

/// Values that hold once a batch is durable, oldest first.
#[derive(Debug, Default)]
struct Marks(VecDeque<(Seq, u64)>);

impl Marks {
    fn push(&mut self, seq: Seq, value: u64, durable: Seq) {
        while self.0.get(1).is_some_and(|next| next.0 <= durable) {
            self.0.pop_front();
        }
        match self.0.back_mut() {
            Some(last) if last.0 == seq => last.1 = value,
            _ => self.0.push_back((seq, value)),
        }
    }
    fn at(&self, durable: Seq) -> Option<u64> {
        self.0.iter().take_while(|m| m.0 <= durable).last().map(|m| m.1)
    }
}

/// The log of one copyset.
#[derive(Debug)]
pub struct Index {
    checkpoint: Checkpoint,
    hard_state: HardState,
    pub(crate) slots: VecDeque<Slot>,
    /// Batch of the checkpoint record.
    checkpoint_seq: Seq,
    /// No slot at or below this one holds a payload that could still be evicted.
    evicted: u64,
    /// Oldest batch needed.
    keeps: Marks,
    commits: Marks,
}

impl Index {
    pub(crate) fn new(checkpoint: Checkpoint, seq: Seq) -> Self {
        let hard_state = checkpoint.hard_state;
        let mut index = Self {
            evicted: checkpoint.applied_index,
            checkpoint,
            hard_state,
            slots: VecDeque::new(),
            checkpoint_seq: seq,
            keeps: Marks::default(),
            commits: Marks::default(),
        };
        index.keeps.push(seq, seq, 0);
        index.commits.push(seq, hard_state.commit, 0);
        index
    }

    /// As recovered: everything is durable already.
    pub(crate) fn recovered(cp: Checkpoint, seq: Seq, hard_state: HardState, slots: VecDeque<Slot>) -> Self {
        let mut index = Self::new(cp, seq);
        (index.slots, index.hard_state) = (slots, hard_state);
        index.keeps = Marks([(0, index.oldest())].into());
        index.commits = Marks([(0, hard_state.commit)].into());
        index
    }

    /// First index of the tail: the one after the checkpoint.
    #[must_use]
    pub fn first_index(&self) -> u64 {
        self.checkpoint.applied_index + 1
    }

    /// Last index of the tail; the checkpoint's when the tail is empty.
    #[must_use]
    pub fn last_index(&self) -> u64 {
        self.checkpoint.applied_index + self.slots.len() as u64
    }

    /// Term of an entry, also of the checkpoint's.
    #[must_use]
    pub fn term(&self, index: u64) -> Option<u64> {
        if index == self.checkpoint.applied_index {
            return Some(self.checkpoint.applied_term);
        }
        self.slot(index).map(|s| s.term)
    }

    /// Newest hard state, durable or not.
    #[must_use]
    pub fn hard_state(&self) -> HardState {
        self.hard_state
    }

    /// Newest checkpoint, durable or not.
    #[must_use]
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Entries `[lo, hi)`, cut when `max_bytes` is passed but never empty if `lo` is there. A payload that is not
    /// resident comes empty; [`Self::payload_len`] tells.
    #[must_use]
    pub fn entries(&self, lo: u64, hi: u64, max_bytes: usize) -> Vec<Entry> {
        let mut bytes = 0usize;
        let hi = hi.min(self.last_index() + 1);
        let mut found = Vec::with_capacity(hi.saturating_sub(lo).min(64) as usize);
        for index in lo..hi {
            let Some(slot) = self.slot(index) else { break };
            bytes = bytes.saturating_add(slot.context.len() + slot.payload_len as usize);
            if bytes > max_bytes && !found.is_empty() {
                break;
            }
            found.push(self.entry(index, slot));
        }
        found
    }

    /// Bytes of an entry's payload, resident or not.
    #[must_use]
    pub fn payload_len(&self, index: u64) -> Option<usize> {
        self.slot(index).map(|s| s.payload_len as usize)
    }

    /// Where an entry's payload lies on disk, once it was written and if it has one.
    #[must_use]
    pub fn location(&self, index: u64) -> Option<Location> {
        let slot = self.slot(index).filter(|s| s.payload_len > 0)?;
        match slot.place {
            Place::Disk(offset) => Some(Location { offset, len: slot.payload_len as usize }),
            Place::Queued(_) => None,
        }
    }

    /// Where an entry's payload is to be read from, if it is not in memory.
    #[must_use]
    pub fn absent(&self, index: u64) -> Option<Location> {
        self.location(index).filter(|_| self.slot(index).is_some_and(|slot| !slot.resident()))
    }

    /// Whether recovery found the entry's payload on disk rotten (see [`crate::Report::rot`]).
    #[must_use]
    pub fn is_rotten(&self, index: u64) -> bool {
        self.slot(index).is_some_and(|s| s.rotten)
    }

    /// Entries whose payload must be fetched and given to [`crate::Log::restore`] before the tail can be re-logged.
    #[must_use]
    pub fn not_resident(&self) -> Vec<(u64, Location)> {
        let missing = (self.first_index()..).zip(&self.slots).filter(|(_, s)| !s.resident());
        missing.filter_map(|(i, _)| self.location(i).map(|l| (i, l))).collect()
    }

    pub(crate) fn entry(&self, index: u64, slot: &Slot) -> Entry {
        let (context, payload) = (slot.context.clone(), slot.payload.clone());
        Entry { index, term: slot.term, kind: slot.kind, context, payload }
    }

    fn slot(&self, index: u64) -> Option<&Slot> {
        self.slots.get(usize::try_from(index.checked_sub(self.first_index())?).ok()?)
    }

    pub(crate) fn slot_mut(&mut self, index: u64) -> Option<&mut Slot> {
        let at = usize::try_from(index.checked_sub(self.first_index())?).ok()?;
        self.slots.get_mut(at)
    }

    /// Drops every entry from `index` on.
    pub(crate) fn truncate(&mut self, index: u64) {
        self.slots.truncate((index - self.first_index()) as usize);
        self.evicted = self.evicted.min(index - 1);
    }

    pub(crate) fn set_hard_state(&mut self, hs: HardState, seq: Seq, durable: Seq) {
        self.hard_state = hs;
        self.commits.push(seq, hs.commit, durable);
    }

    /// Takes a checkpoint over, with the newest hard state in it: a caller's may be older than the last vote.
    pub(crate) fn set_checkpoint(&mut self, mut cp: Checkpoint, seq: Seq, durable: Seq) {
        let mut hs = self.hard_state;
        if cp.incarnation != self.checkpoint.incarnation {
            self.slots.clear();
            hs = cp.hard_state;
        } else {
            assert!(cp.applied_index >= self.checkpoint.applied_index, "a checkpoint never goes back");
            if cp.hard_state.term > hs.term {
                (hs.term, hs.vote) = (cp.hard_state.term, cp.hard_state.vote);
            }
            hs.commit = hs.commit.max(cp.hard_state.commit);
            if self.term(cp.applied_index).is_some_and(|t| t != cp.applied_term) {
                self.slots.clear(); // a raft snapshot of another history: no entry of ours follows it
            }
            let gone = (cp.applied_index - self.checkpoint.applied_index).min(self.slots.len() as u64);
            self.slots.drain(..gone as usize);
        }
        hs.commit = hs.commit.max(cp.applied_index);
        cp.hard_state = hs;
        self.evicted = self.evicted.max(cp.applied_index).min(cp.applied_index + self.slots.len() as u64);
        (self.checkpoint, self.checkpoint_seq) = (cp, seq);
        self.set_hard_state(hs, seq, durable);
        self.note_keep(seq, durable);
    }

    /// Oldest batch that holds a live record.
    fn oldest(&self) -> Seq {
        self.slots.front().map_or(self.checkpoint_seq, |s| s.seq.min(self.checkpoint_seq))
    }

    /// After records went into batch `seq`: what is needed once that batch is durable.
    pub(crate) fn note_keep(&mut self, seq: Seq, durable: Seq) {
        let oldest = self.oldest();
        if self.keeps.0.back().is_none_or(|last| last.1 != oldest) {
            self.keeps.push(seq, oldest, durable);
        }
    }

    /// Oldest batch needed if the machine lost power now.
    pub(crate) fn keep(&self, durable: Seq) -> Seq {
        self.keeps.at(durable).or(self.keeps.0.front().map(|m| m.1)).unwrap_or(self.checkpoint_seq)
    }

    pub(crate) fn durable_commit(&self, durable: Seq) -> u64 {
        self.commits.at(durable).unwrap_or(0)
    }

    /// Batch `seq` is written: payloads of `[first, first + count)` lie behind `base`.
    pub(crate) fn place(&mut self, first: u64, count: u64, seq: Seq, base: u64) {
        for index in first.max(self.first_index())..first + count {
            let Some(slot) = self.slot_mut(index) else { break };
            if let (true, Place::Queued(at)) = (slot.seq == seq, slot.place) {
                slot.place = Place::Disk(base + at);
            }
        }
    }

    /// Drops resident payloads up to `index`, as far as they are on disk.
    pub(crate) fn evict(&mut self, index: u64) {
        for i in self.evicted + 1..=index.min(self.last_index()) {
            let Some(slot) = self.slot_mut(i) else { break };
            if matches!(slot.place, Place::Queued(_)) {
                break;
            }
            slot.payload = Bytes::new();
            self.evicted = i;
        }
    }

    pub(crate) fn restore(&mut self, index: u64, payload: Bytes) {
        if let Some(slot) = self.slot_mut(index) {
            assert_eq!(payload.len(), slot.payload_len as usize, "a restored payload has the length it had");
            (slot.payload, slot.rotten) = (payload, false);
            self.evicted = self.evicted.min(index - 1);
        }
    }
}
