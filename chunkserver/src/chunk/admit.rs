//! Admission: the outcome of an operation is decided before it is proposed, so applying it cannot fail (rules 13, 14).
//!
//! Operations are pipelined, so each is judged by the chunk as it will be once everything admitted before it is
//! applied: the *proposed view*. A view exists while operations of its chunk are in flight; it holds one slot
//! reservation per operation that will create the chunk.

use super::pool::{NoSlot, Slots};
use crate::shard::request::{ChunkOp, Outcome};
use raftlog::{BLOCK, CopysetId};
use rustc_hash::FxHashMap;
use std::collections::VecDeque;
use std::collections::hash_map::Entry;

/// What admission needs to know of a chunk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ChunkView {
    pub(super) exists: bool,
    pub(super) sn: u64,
    pub(super) corrected_sn: u64,
}

/// What an operation does to the view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Create the chunk if absent; raise its version to this.
    Write(u64),
    /// Remove it.
    Delete,
    /// Nothing that admission sees (zero, writes of nothing).
    Nothing,
}

impl ChunkView {
    /// Apply; true if this creates the chunk.
    fn change(&mut self, change: Change) -> bool {
        match change {
            Change::Write(sn) if self.exists => self.sn = self.sn.max(sn),
            Change::Write(sn) => {
                *self = Self { exists: true, sn, corrected_sn: 0 };
                return true;
            }
            Change::Delete => *self = Self::default(),
            Change::Nothing => {}
        }
        false
    }
}

#[derive(Debug)]
struct Pending {
    change: Change,
    /// Holds a reservation.
    creates: bool,
}

#[derive(Debug)]
struct Proposed {
    view: ChunkView,
    ops: VecDeque<Pending>,
}

type Key = (CopysetId, u64);

/// The proposed views of a shard.
#[derive(Debug, Default)]
pub(super) struct Admission {
    proposed: FxHashMap<Key, Proposed>,
    /// Empty queues kept for their memory.
    spare: Vec<VecDeque<Pending>>,
}

/// What `op` changes; `None` for operations that are not proposed.
pub(super) fn change_of(op: &ChunkOp) -> Option<Change> {
    match op {
        ChunkOp::Write { sn, payload, .. } if !payload.is_empty() => Some(Change::Write(*sn)),
        ChunkOp::Write { .. } | ChunkOp::Zero { .. } => Some(Change::Nothing),
        ChunkOp::Delete { .. } => Some(Change::Delete),
        ChunkOp::Read { .. } | ChunkOp::Info | ChunkOp::Hash { .. } => None,
    }
}

/// Whether `offset..offset + len` is a range of whole blocks inside a chunk.
pub(super) fn in_range(offset: u32, len: u64, chunk_size: u32) -> bool {
    offset.is_multiple_of(BLOCK as u32)
        && len.is_multiple_of(BLOCK as u64)
        && u64::from(offset) + len <= u64::from(chunk_size)
}

/// The checks that need no chunk.
fn check_shape(op: &ChunkOp, chunk_size: u32) -> Result<(), Outcome> {
    let ok = match op {
        ChunkOp::Write { offset, payload, crcs, .. } => {
            in_range(*offset, payload.len() as u64, chunk_size) && crcs.len() == payload.len() / BLOCK
        }
        ChunkOp::Read { offset, len } | ChunkOp::Zero { offset, len } => in_range(*offset, u64::from(*len), chunk_size),
        ChunkOp::Hash { offset, len } => u64::from(*offset) + u64::from(*len) <= u64::from(chunk_size),
        ChunkOp::Delete { .. } | ChunkOp::Info => true,
    };
    if ok { Ok(()) } else { Err(Outcome::Invalid) }
}

/// The version rules (datastore.md §7), as far as chunk snapshots do not exist yet.
fn check_version(op: &ChunkOp, view: ChunkView) -> Result<(), Outcome> {
    match *op {
        ChunkOp::Write { sn: 0, .. } => Err(Outcome::Failed),
        ChunkOp::Write { sn, .. } if view.exists => {
            if sn < view.sn || sn < view.corrected_sn {
                return Err(Outcome::Backward);
            }
            // A newer version must freeze the old content first. Until that can be done the write is refused:
            // overwriting would silently lose the version a chunk snapshot was taken for.
            if sn > view.sn && sn > view.corrected_sn {
                return Err(Outcome::Failed);
            }
            Ok(())
        }
        ChunkOp::Delete { sn } if view.exists && sn < view.sn => Err(Outcome::Failed),
        _ => Ok(()),
    }
}

impl Admission {
    /// Decide on `op`, given the chunk as applied; remember it if it will be proposed.
    pub(super) fn admit(
        &mut self,
        key: Key,
        op: &ChunkOp,
        chunk_size: u32,
        applied: ChunkView,
        slots: &mut Slots,
    ) -> Result<(), Outcome> {
        check_shape(op, chunk_size)?;
        let view = self.proposed.get(&key).map_or(applied, |p| p.view);
        check_version(op, view)?;
        let Some(change) = change_of(op) else { return Ok(()) };
        let mut after = view;
        let creates = after.change(change);
        if creates {
            slots.reserve().map_err(|e| match e {
                NoSlot::Full => Outcome::NoSpace,
                NoSlot::NotYet => Outcome::Overload,
            })?;
        }
        let spare = &mut self.spare;
        let proposed =
            self.proposed.entry(key).or_insert_with(|| Proposed { view, ops: spare.pop().unwrap_or_default() });
        proposed.view = after;
        proposed.ops.push_back(Pending { change, creates });
        Ok(())
    }

    /// Remember an entry that is in the log, whatever the view says of it. False: it creates the chunk, and there is no
    /// slot for it.
    pub(super) fn follow(&mut self, key: Key, change: Change, applied: ChunkView, slots: &mut Slots) -> bool {
        let spare = &mut self.spare;
        let begin = || Proposed { view: applied, ops: spare.pop().unwrap_or_default() };
        let proposed = self.proposed.entry(key).or_insert_with(begin);
        let creates = proposed.view.change(change);
        proposed.ops.push_back(Pending { change, creates });
        !creates || slots.reserve_anyway()
    }

    /// The chunk as it will be, if operations of it are in flight.
    pub(super) fn view(&self, key: Key) -> Option<ChunkView> {
        self.proposed.get(&key).map(|proposed| proposed.view)
    }

    /// An operation of this chunk is being applied: its reservation, if any, is turned in for the real slot.
    pub(super) fn settle(&mut self, key: Key, change: Change, slots: &mut Slots) {
        let Entry::Occupied(mut entry) = self.proposed.entry(key) else { return };
        match entry.get_mut().ops.pop_front() {
            Some(op) if op.change == change => {
                slots.unreserve(usize::from(op.creates));
                if entry.get().ops.is_empty() {
                    self.spare.push(entry.remove().ops);
                }
            }
            // Not what was admitted: the view describes a future that will not be.
            other => {
                let held = other.iter().chain(&entry.get().ops).filter(|op| op.creates).count();
                slots.unreserve(held);
                entry.remove();
            }
        }
    }

    /// An admitted operation will never be applied.
    pub(super) fn abandon(&mut self, key: Key, change: Change, applied: ChunkView, slots: &mut Slots) {
        let Some(proposed) = self.proposed.get_mut(&key) else { return };
        let Some(at) = proposed.ops.iter().rposition(|op| op.change == change) else { return };
        let before = proposed.ops.iter().filter(|op| op.creates).count();
        proposed.ops.remove(at);
        let mut view = applied;
        for op in &mut proposed.ops {
            op.creates = view.change(op.change);
        }
        proposed.view = view;
        // Taking an operation out never makes more of the others create the chunk.
        let after = proposed.ops.iter().filter(|op| op.creates).count();
        slots.unreserve(before - after);
        if proposed.ops.is_empty() {
            self.proposed.remove(&key);
        }
    }

    /// Nothing of this copyset is in flight any more, as far as this node can tell.
    pub(super) fn reset(&mut self, copyset: CopysetId, slots: &mut Slots) {
        self.proposed.retain(|key, proposed| {
            if key.0 == copyset {
                slots.unreserve(proposed.ops.iter().filter(|op| op.creates).count());
            }
            key.0 != copyset
        });
    }
}
