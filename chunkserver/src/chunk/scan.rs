//! The metadata zone, read once by all shards together: each claims pieces of it while it has nothing else to read,
//! and hands what it finds to the shard it belongs to.
//!
//! Invariant: a slot is claimed once and reported once; no shard believes to know the zone before all of it has been
//! reported. Nobody writes a metapage before that, so all see the same zone.

use super::layout::{Layout, shard_of};
use super::meta::{Claim, Content, Metapage};
use super::pool::SlotHistory;
use raftlog::CopysetId;
use std::collections::BTreeSet;
use std::ops::Range;

/// One of a slot's two metapages.
#[derive(Debug)]
pub(super) enum Copy {
    Valid(Box<Metapage>),
    Blank,
    Bad(Claim),
    Unreadable,
}

/// What a slot's metapages say.
#[derive(Debug)]
pub(super) struct Found {
    /// The newer valid one.
    pub(super) page: Metapage,
    pub(super) other: Copy,
}

/// A chunk that only a damaged metapage names.
#[derive(Debug)]
pub(super) struct Ghost {
    pub(super) slot: u32,
    pub(super) copyset: CopysetId,
    pub(super) claim: Claim,
    /// Nothing is lost if replay makes the chunk again.
    pub(super) begun: bool,
}

/// Slots read by one shard and not reported yet.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// Slots that are done with, whatever is in them.
    pub(super) slots: u32,
    /// The ones with a valid page.
    pub(super) found: Vec<Found>,
    pub(super) ghosts: Vec<Ghost>,
    /// The ones without a readable page that may hold something.
    pub(super) quarantined: Vec<u32>,
}

/// How far the zone is read, by all shards.
#[derive(Debug)]
pub(super) struct Scan {
    shards: u16,
    slots: u32,
    claimed: u32,
    reported: u32,
    pub(super) history: Vec<SlotHistory>,
    pub(super) quarantined: BTreeSet<u32>,
    /// By the shard whose they are.
    found: Vec<(Vec<Found>, Vec<Ghost>)>,
}

impl Scan {
    pub(super) fn new(layout: &Layout) -> Self {
        Self {
            shards: layout.shards,
            slots: layout.slot_count,
            claimed: 0,
            reported: 0,
            history: vec![SlotHistory::default(); layout.slot_count as usize],
            quarantined: BTreeSet::new(),
            found: (0..layout.shards).map(|_| Default::default()).collect(),
        }
    }

    /// The next slots nobody reads yet, at most `max`; `None` when all are claimed.
    pub(super) fn claim(&mut self, max: u32) -> Option<Range<u32>> {
        let first = self.claimed;
        self.claimed = first.saturating_add(max).min(self.slots);
        (first < self.claimed).then_some(first..self.claimed)
    }

    /// Take over what a shard has read.
    pub(super) fn report(&mut self, batch: &mut Batch) {
        self.reported += std::mem::take(&mut batch.slots);
        assert!(self.reported <= self.claimed, "a slot is reported once");
        self.quarantined.extend(batch.quarantined.drain(..));
        for found in batch.found.drain(..) {
            let Metapage { slot, generation, page, ref content } = found.page;
            self.history[slot as usize] = SlotHistory { generation, page };
            let copyset = match content {
                Content::Chunk(meta) => meta.copyset,
                Content::Tombstone(tomb) => tomb.copyset,
            };
            self.found[usize::from(shard_of(copyset, self.shards))].0.push(found);
        }
        for ghost in batch.ghosts.drain(..) {
            self.found[usize::from(shard_of(ghost.copyset, self.shards))].1.push(ghost);
        }
    }

    /// All that was found for a shard, in the order it was read; `None` before the whole zone is read.
    pub(super) fn take(&mut self, shard: u16) -> Option<(Vec<Found>, Vec<Ghost>)> {
        (self.reported == self.slots).then(|| std::mem::take(&mut self.found[usize::from(shard)]))
    }
}
