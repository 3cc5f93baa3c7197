//! The extents of a disk's slots, shared by its shards; and one shard's slots.
//!
//! Shards get slots in extents (rule 1), so the mutex here is touched rarely. Invariants: an extent has at most one
//! owner; the slot and page generations of a slot never go back, whoever owns it; a shard that serves takes no extent
//! before every shard has replayed its log, because replay may need as many slots as the crashed run had taken.

use super::layout::Layout;
use super::scan::{Batch, Found, Ghost, Scan};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Generations a slot has reached; what follows must be higher.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct SlotHistory {
    /// Of the slot (one per chunk it held).
    pub(super) generation: u64,
    /// Of its metapage (one per write).
    pub(super) page: u64,
}

/// Slots of one extent on their way between pool and shard.
#[derive(Debug)]
pub(super) struct Extent {
    pub(super) number: u32,
    /// Usable slots (quarantined ones are left out).
    pub(super) slots: Vec<(u32, SlotHistory)>,
}

/// The metadata zone contradicts itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("extent {extent} holds slots of shards {first} and {second}")]
pub struct ExtentConflict {
    /// Extent.
    pub extent: u32,
    /// One owner.
    pub first: u16,
    /// Another.
    pub second: u16,
}

/// Why no slot could be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoSlot {
    /// Another shard has not loaded, or not replayed its log.
    NotYet,
    /// The disk is full.
    Full,
}

struct Inner {
    loaded: Vec<bool>,
    owner: Vec<Option<u16>>,
    scan: Scan,
    replayed: Vec<bool>,
}

/// All extents of a disk; one per process, shared by its shards.
pub struct ExtentPool {
    layout: Layout,
    inner: Mutex<Inner>,
    /// How often a shard found no slot.
    wanted: AtomicU64,
}

impl std::fmt::Debug for ExtentPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ExtentPool").field("free_slots", &self.free_slots()).finish_non_exhaustive()
    }
}

impl ExtentPool {
    /// A pool that hands out nothing until every shard has loaded.
    #[must_use]
    pub fn new(layout: &Layout) -> Arc<Self> {
        let inner = Inner {
            loaded: vec![false; usize::from(layout.shards)],
            owner: vec![None; layout.extents() as usize],
            scan: Scan::new(layout),
            replayed: vec![false; usize::from(layout.shards)],
        };
        Arc::new(Self { layout: layout.clone(), inner: Mutex::new(inner), wanted: AtomicU64::new(0) })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing here can panic half-way through a change.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A piece of the metadata zone that nobody else reads, at most `slots` slots; `None` when all are being read.
    pub(super) fn claim(&self, slots: u32) -> Option<Range<u32>> {
        self.lock().scan.claim(slots)
    }

    /// What was in claimed pieces; empties `batch`.
    pub(super) fn report(&self, batch: &mut Batch) {
        self.lock().scan.report(batch);
    }

    /// What the metadata zone holds for `shard`; `None` until the shards have read all of it. Given once.
    pub(super) fn found(&self, shard: u16) -> Option<(Vec<Found>, Vec<Ghost>)> {
        self.lock().scan.take(shard)
    }

    /// A slot is known to hold a chunk of the calling shard after all.
    pub(super) fn rescue(&self, slot: u32) {
        self.lock().scan.quarantined.remove(&slot);
    }

    /// Slots out of use because both copies of their metapage are unreadable.
    pub(super) fn quarantined(&self) -> u64 {
        self.lock().scan.quarantined.len() as u64
    }

    /// A shard knows its chunks: it takes the extents it has `used` slots in. No shard writes metapages before all have
    /// loaded.
    pub(super) fn publish(&self, shard: u16, used: &dyn Fn(u32) -> bool) -> Result<Vec<Extent>, ExtentConflict> {
        let mut inner = self.lock();
        assert!(!inner.loaded[usize::from(shard)], "a shard loads once");
        let mut own = Vec::new();
        for extent in (0..self.layout.extents()).filter(|&e| self.layout.extent_range(e).any(used)) {
            match inner.owner[extent as usize].replace(shard) {
                Some(first) => return Err(ExtentConflict { extent, first, second: shard }),
                None => own.push(self.contents(&inner, extent)),
            }
        }
        inner.loaded[usize::from(shard)] = true;
        Ok(own)
    }

    /// Whether every shard has loaded. Before that nothing may be applied: replay may need an extent, and which ones
    /// are free is not known yet.
    #[must_use]
    pub fn is_loaded(&self) -> bool {
        self.lock().loaded.iter().all(|&done| done)
    }

    fn contents(&self, inner: &Inner, number: u32) -> Extent {
        let range = self.layout.extent_range(number);
        let usable = range.filter(|slot| !inner.scan.quarantined.contains(slot));
        Extent { number, slots: usable.map(|slot| (slot, inner.scan.history[slot as usize])).collect() }
    }

    fn take(&self, shard: u16, replaying: bool) -> Result<Extent, NoSlot> {
        let mut inner = self.lock();
        let loaded = inner.loaded.iter().all(|&done| done);
        if !loaded || !(replaying || inner.replayed.iter().all(|&done| done)) {
            return Err(NoSlot::NotYet);
        }
        for number in 0..self.layout.extents() {
            if inner.owner[number as usize].is_none() {
                let extent = self.contents(&inner, number);
                if !extent.slots.is_empty() {
                    inner.owner[number as usize] = Some(shard);
                    return Ok(extent);
                }
            }
        }
        Err(NoSlot::Full)
    }

    fn give_back(&self, shard: u16, extent: &Extent) {
        let mut inner = self.lock();
        assert!(inner.owner[extent.number as usize] == Some(shard), "only its owner returns an extent");
        inner.owner[extent.number as usize] = None;
        for &(slot, history) in &extent.slots {
            inner.scan.history[slot as usize] = history;
        }
    }

    fn replay_done(&self, shard: u16) {
        self.lock().replayed[usize::from(shard)] = true;
    }

    /// Whether every shard has replayed its log: from then on extents are handed out to whoever serves.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.lock().replayed.iter().all(|&done| done)
    }

    /// A shard found no slot: what another one's deleted chunks hold may help.
    pub fn want(&self) {
        self.wanted.fetch_add(1, Ordering::Relaxed);
    }

    /// How often that was said.
    #[must_use]
    pub fn wanted(&self) -> u64 {
        self.wanted.load(Ordering::Relaxed)
    }

    /// Usable slots no shard owns.
    #[must_use]
    pub fn free_slots(&self) -> u64 {
        let inner = self.lock();
        let free = |&extent: &u32| inner.owner[extent as usize].is_none();
        (0..self.layout.extents()).filter(free).map(|e| self.contents(&inner, e).slots.len() as u64).sum()
    }
}

#[derive(Debug)]
struct Held {
    usable: u32,
    free: u32,
}

/// The slots of one shard.
///
/// `reserved` slots are promised to operations in flight: `free.len() >= reserved`, so a reserved creation cannot fail
/// when it is applied. (Unless damaged metapages put slots out of use that entries in the log need.)
#[derive(Debug)]
pub(super) struct Slots {
    shard: u16,
    extent_slots: u32,
    pool: Arc<ExtentPool>,
    free: BTreeSet<u32>,
    reserved: usize,
    history: BTreeMap<u32, SlotHistory>,
    held: BTreeMap<u32, Held>,
    replaying: bool,
}

impl Slots {
    pub(super) fn new(pool: Arc<ExtentPool>, shard: u16) -> Self {
        Self {
            shard,
            extent_slots: pool.layout.extent_slots,
            pool,
            free: BTreeSet::new(),
            reserved: 0,
            history: BTreeMap::new(),
            held: BTreeMap::new(),
            replaying: true,
        }
    }

    /// Take over an extent; `used` says which of its slots hold something.
    pub(super) fn adopt(&mut self, extent: &Extent, used: impl Fn(u32) -> bool) {
        let mut free = 0;
        for &(slot, history) in extent.slots.iter().filter(|(slot, _)| !used(*slot)) {
            self.free.insert(slot);
            self.history.insert(slot, history);
            free += 1;
        }
        self.held.insert(extent.number, Held { usable: extent.slots.len() as u32, free });
    }

    pub(super) fn replay_done(&mut self) {
        self.replaying = false;
        self.pool.replay_done(self.shard);
    }

    /// Every shard has loaded.
    pub(super) fn all_loaded(&self) -> bool {
        self.pool.is_loaded()
    }

    fn grow(&mut self) -> Result<(), NoSlot> {
        let extent = self.pool.take(self.shard, self.replaying)?;
        self.adopt(&extent, |_| false);
        Ok(())
    }

    /// Promise one slot.
    pub(super) fn reserve(&mut self) -> Result<(), NoSlot> {
        while self.free.len() <= self.reserved {
            self.grow()?;
        }
        self.reserved += 1;
        Ok(())
    }

    /// Promise one slot to an entry that is in the log already. False: there is none now.
    pub(super) fn reserve_anyway(&mut self) -> bool {
        let there = self.reserve().is_ok();
        self.reserved += usize::from(!there);
        there
    }

    /// Take back `count` promises.
    pub(super) fn unreserve(&mut self, count: usize) {
        assert!(count <= self.reserved);
        self.reserved -= count;
    }

    /// A slot for a new chunk, with its history. The caller has turned in its promise, if it had one.
    pub(super) fn take(&mut self) -> Option<(u32, SlotHistory)> {
        if self.free.len() <= self.reserved && self.grow().is_err() && self.free.is_empty() {
            return None;
        }
        let slot = self.free.pop_first()?;
        let history = self.history.remove(&slot).unwrap_or_default();
        if let Some(held) = self.held.get_mut(&(slot / self.extent_slots)) {
            held.free -= 1;
        }
        Some((slot, history))
    }

    /// A slot that holds nothing any more, on disk neither. An extent that becomes wholly free goes back.
    pub(super) fn release(&mut self, slot: u32, history: SlotHistory) {
        let number = slot / self.extent_slots;
        let held = self.held.get_mut(&number);
        let Some(held) = held else { panic!("slot {slot} is not in an extent of this shard") };
        assert!(self.free.insert(slot), "slot {slot} freed twice");
        self.history.insert(slot, history);
        held.free += 1;
        let usable = held.usable;
        if held.free == usable && self.free.len() >= self.reserved + usable as usize {
            self.return_extent(number);
        }
    }

    fn return_extent(&mut self, number: u32) {
        self.held.remove(&number);
        let first = number * self.extent_slots;
        let slots: Vec<u32> = self.free.range(first..first + self.extent_slots).copied().collect();
        let slots = slots.into_iter().map(|slot| {
            self.free.remove(&slot);
            (slot, self.history.remove(&slot).unwrap_or_default())
        });
        let extent = Extent { number, slots: slots.collect() };
        self.pool.give_back(self.shard, &extent);
    }

    /// Slots promised to operations in flight.
    pub(super) fn promised(&self) -> usize {
        self.reserved
    }

    /// Free slots that are not promised.
    pub(super) fn spare(&self) -> usize {
        self.free.len() - self.reserved.min(self.free.len())
    }
}
