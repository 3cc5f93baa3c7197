//! Where batches go: segments, Free -> Active -> Sealed -> Free.
//!
//! Invariants, which recovery relies on:
//! * segments are freed oldest first and reused in that order, so what superseded a record outlives it on disk;
//! * a freed segment is reused only when a durable header says (`live_seq`) that it is not needed;
//! * the first batch of a segment is written alone: when it exists, everything before it is durable;
//! * the last block of a segment is kept for the seal that advertises `live_seq` when nothing else did;
//! * a restart opens a new segment; with none free it goes on in the segment the log ended in. Wherever it would
//!   write over a batch that recovery dropped, the first write is a seal, alone: it wipes that batch's header.
//!   (Writing the same records again in that place could complete the torn batch, and then it, and an
//!   unacknowledged one behind it, would be back.)

use crate::{BLOCK, Geometry, Seq};
use std::collections::VecDeque;

/// A segment that may hold live records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    /// Place in the zone.
    pub(crate) slot: u32,
    pub(crate) first_seq: Seq,
    /// Bytes used.
    pub(crate) end: u64,
}

/// A segment that may be reused once `live_seq >= until` is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Free {
    pub(crate) slot: u32,
    pub(crate) until: Seq,
    /// It starts with a batch that recovery dropped.
    pub(crate) torn: bool,
}

/// Where the next batch goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Behind the last one.
    Append,
    /// Into a fresh segment, alone.
    Rotate,
    /// First a seal, alone, into a fresh segment that starts with a dropped batch.
    RotateSeal,
    /// First a seal in the active segment, alone.
    Seal,
}

impl Place {
    /// Whether a seal goes first.
    pub(crate) fn seals(self) -> bool {
        matches!(self, Self::Seal | Self::RotateSeal)
    }
}

/// All segments of a zone.
#[derive(Debug)]
pub(crate) struct Segments {
    geometry: Geometry,
    /// Oldest first.
    pub(crate) live: VecDeque<Segment>,
    pub(crate) free: VecDeque<Free>,
    /// Whether `live.back()` takes batches (not so after a restart that found a free segment).
    pub(crate) active: bool,
    /// The active segment is the one the log ended in: a seal must come first.
    pub(crate) resumed: bool,
    pub(crate) generation: u64,
}

impl Segments {
    pub(crate) fn new(geometry: Geometry, live: VecDeque<Segment>, free: VecDeque<Free>, newest: u64) -> Self {
        let active = free.is_empty() && !live.is_empty();
        Self { geometry, live, free, active, resumed: active, generation: newest + u64::from(active) }
    }

    /// Most bytes a batch may have.
    pub(crate) fn batch_max(geometry: &Geometry) -> u64 {
        geometry.segment_size - BLOCK as u64
    }

    /// First batch of the oldest live segment; `next` when there is none.
    pub(crate) fn live_seq(&self, next: Seq) -> Seq {
        self.live.front().map_or(next, |s| s.first_seq)
    }

    /// Bytes left for batches in the active segment.
    pub(crate) fn room(&self) -> u64 {
        let used = self.live.back().filter(|_| self.active).map_or(u64::MAX, |s| s.end);
        Self::batch_max(&self.geometry).saturating_sub(used)
    }

    /// Where a batch of `len` bytes would go; `None` while it has to wait for writes in flight or for space.
    pub(crate) fn place(&self, len: u64, idle: bool, advertised: Seq) -> Option<Place> {
        let end = self.live.back().filter(|_| self.active).map(|s| s.end);
        let seal = end.is_some_and(|end| end + BLOCK as u64 <= self.geometry.segment_size).then_some(Place::Seal);
        if self.resumed {
            return seal.filter(|_| idle);
        }
        if len <= self.room() {
            return Some(Place::Append);
        }
        let next = self.free.front().filter(|_| idle)?;
        match (next.until <= advertised, next.torn) {
            (true, false) => Some(Place::Rotate),
            (true, true) => Some(Place::RotateSeal),
            (false, _) => seal,
        }
    }

    /// Opens the next free segment; batch `seq` is the first in it.
    pub(crate) fn rotate(&mut self, seq: Seq) {
        if let Some(free) = self.free.pop_front() {
            self.live.push_back(Segment { slot: free.slot, first_seq: seq, end: 0 });
            self.active = true;
            self.generation += 1;
        }
    }

    /// Takes `len` bytes of the active segment; returns their offset in the zone.
    pub(crate) fn take(&mut self, len: u64) -> u64 {
        let size = self.geometry.segment_size;
        let Some(active) = self.live.back_mut() else { return 0 };
        let offset = u64::from(active.slot) * size + active.end;
        active.end += len;
        assert!(active.end <= size, "a batch stays inside its segment");
        self.resumed = false;
        offset
    }

    /// Frees, oldest first, what holds nothing at or after `need`; the newest segment always stays.
    pub(crate) fn free(&mut self, need: Seq) -> usize {
        let mut count = 0;
        while let (Some(oldest), Some(next)) = (self.live.front(), self.live.get(1)) {
            if next.first_seq > need {
                break;
            }
            self.free.push_back(Free { slot: oldest.slot, until: next.first_seq, torn: false });
            self.live.pop_front();
            count += 1;
        }
        count
    }

    /// Bytes from the oldest live record's segment to the end of the log.
    pub(crate) fn used_bytes(&self) -> u64 {
        let sealed = self.live.len().saturating_sub(1) as u64 * self.geometry.segment_size;
        sealed + self.live.back().map_or(0, |s| if self.active { s.end } else { self.geometry.segment_size })
    }

    /// Bytes that entries may take without touching the segment reserved for what frees space (rule 9). Each
    /// segment's end may stay unused because the next batch is longer: up to `waste`.
    pub(crate) fn space_for_entries(&self, waste: u64) -> u64 {
        let Some(free) = (self.free.len() as u64).checked_sub(1) else { return 0 };
        let segment = Self::batch_max(&self.geometry).saturating_sub(waste);
        free * segment + self.room().saturating_sub(waste)
    }
}
