//! Applying what was committed, and the graves of what was deleted.

use super::admit::{self, Change};
use super::bitmap::Bitmap;
use super::meta::{ChunkMeta, Tombstone};
use super::overlay::Dirty;
use super::pool::SlotHistory;
use super::store::{Chunk, Store};
use crate::shard::request::BlockCrcs;
use bytes::Bytes;
use raftlog::{BLOCK, CopysetId};

/// A committed operation.
#[derive(Clone, Debug)]
pub enum ApplyOp {
    /// Store whole blocks.
    Write {
        /// Version of the volume.
        sn: u64,
        /// Byte offset in the chunk.
        offset: u32,
        /// Data.
        payload: Bytes,
        /// CRC32C of each block.
        crcs: BlockCrcs,
    },
    /// Remove the chunk.
    Delete,
    /// Make blocks read as zero.
    Zero {
        /// Byte offset.
        offset: u32,
        /// Length.
        len: u32,
    },
}

/// Why a committed entry could not be applied. Both mean that this disk must stop serving: going on would make the
/// replica differ from its log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApplyError {
    /// No slot for a chunk that was admitted; only slots lost to damaged metapages can cause it.
    #[error("no slot for a committed write")]
    NoSlot,
    /// The entry is not one this build would have proposed.
    #[error("a committed entry is malformed")]
    Malformed,
}

/// A slot whose chunk is gone. It is reusable when its tombstone is durable and, unless nothing can bring the chunk
/// back, the checkpoint that covers the Delete is too (rule 13).
#[derive(Debug)]
pub(super) struct Grave {
    pub(super) slot: u32,
    pub(super) history: SlotHistory,
    pub(super) tomb: Tombstone,
    /// A checkpoint must cover `tomb.deleted_index` first.
    pub(super) waits: bool,
    pub(super) stage: GraveStage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum GraveStage {
    /// No tombstone written yet.
    Open,
    /// In the round that is running.
    InRound,
    /// Tombstone durable.
    Closed,
}

impl Store {
    /// Apply the committed operation at log index `index`. `now`: nanoseconds.
    ///
    /// # Errors
    /// See [`ApplyError`]: the disk must stop serving.
    ///
    /// # Panics
    /// When the copyset was never added.
    pub fn apply(
        &mut self,
        copyset: CopysetId,
        index: u64,
        chunk: u64,
        op: ApplyOp,
        now: u64,
    ) -> Result<(), ApplyError> {
        assert!(self.copysets.contains_key(&copyset), "apply to a copyset that was not added");
        let key = (copyset, chunk);
        let change = match &op {
            ApplyOp::Write { sn, payload, .. } if !payload.is_empty() => Change::Write(*sn),
            ApplyOp::Write { .. } | ApplyOp::Zero { .. } => Change::Nothing,
            ApplyOp::Delete => Change::Delete,
        };
        self.admission.settle(key, change, &mut self.slots);
        if self.is_over(copyset, chunk, index) {
            return Ok(());
        }
        let slot = self.index.get(&key).copied();
        self.changed_at = now;
        // A metapage written now would hide that the one before it is lost; only a Delete ends this.
        let suspect = slot.and_then(|slot| self.chunks.get(&slot)).is_some_and(|chunk| chunk.suspect);
        if suspect && !matches!(op, ApplyOp::Delete) {
            return Ok(());
        }
        match op {
            ApplyOp::Write { payload, crcs, .. } if payload.is_empty() && crcs.is_empty() => Ok(()),
            ApplyOp::Write { sn, offset, payload, crcs } => {
                let whole = admit::in_range(offset, payload.len() as u64, self.layout.chunk_size);
                if !whole || crcs.len() != payload.len() / BLOCK {
                    return Err(ApplyError::Malformed);
                }
                let slot = match slot {
                    Some(slot) => slot,
                    None => self.create(copyset, index, chunk)?,
                };
                self.write(slot, index, sn, offset, payload, &crcs, now);
                Ok(())
            }
            ApplyOp::Delete => {
                if let Some(slot) = slot {
                    self.bury(slot, Some(index));
                    self.dirty_since.get_or_insert(now);
                }
                Ok(())
            }
            ApplyOp::Zero { offset, len } => {
                if !admit::in_range(offset, u64::from(len), self.layout.chunk_size) {
                    return Err(ApplyError::Malformed);
                }
                if let Some(slot) = slot {
                    self.zero(slot, index, offset, len, now);
                }
                Ok(())
            }
        }
    }

    /// The payload of the committed write at `index` is lost: its chunk is in doubt, unless nothing of the write is left
    /// there. False: there is no slot for it.
    pub fn apply_lost(&mut self, copyset: CopysetId, index: u64, chunk: u64, sn: u64, now: u64) -> bool {
        self.admission.settle((copyset, chunk), Change::Write(sn), &mut self.slots);
        self.is_over(copyset, chunk, index) || self.doubt(copyset, index, chunk, now)
    }

    /// The entry at `index` is of a life of the chunk that has ended: its deletion is known, or the creation of a later
    /// one, which has the Delete before it.
    #[must_use]
    pub fn is_over(&self, copyset: CopysetId, chunk: u64, index: u64) -> bool {
        let gone = self.gone.get(&(copyset, chunk)).is_some_and(|&deleted| index <= deleted);
        gone || self.find(copyset, chunk).is_some_and(|(_, found)| found.meta.created_index > index)
    }

    pub(super) fn create(&mut self, copyset: CopysetId, index: u64, chunk: u64) -> Result<u32, ApplyError> {
        let (slot, history) = self.slots.take().ok_or(ApplyError::NoSlot)?;
        let incarnation = self.copysets.get_mut(&copyset).map_or(0, |state| {
            state.chunks += 1;
            state.incarnation
        });
        let meta = ChunkMeta {
            copyset,
            incarnation,
            chunk,
            created_index: index,
            applied_index: index,
            whole_at: 0,
            sn: 0,
            corrected_sn: 0,
            snapshot: None,
            fence: 0,
            written: Bitmap::new(self.layout.blocks()),
            clone: None,
        };
        let fresh = Chunk::new(&self.layout, meta, history.generation + 1, history.page);
        self.chunks.insert(slot, fresh);
        self.index.insert((copyset, chunk), slot);
        Ok(slot)
    }

    #[allow(clippy::too_many_arguments)]
    fn write(&mut self, slot: u32, index: u64, sn: u64, offset: u32, payload: Bytes, crcs: &[u32], now: u64) {
        let Some(chunk) = self.chunks.get_mut(&slot) else { return };
        chunk.touch(index);
        chunk.meta.sn = chunk.meta.sn.max(sn);
        let mut at = self.pins.hold(payload);
        for (block, &crc) in (offset / BLOCK as u32..).zip(crcs) {
            chunk.overlay.put(&mut self.pins, block, Dirty { at, crc, index, oldest: index, captured: false });
            at = at.next();
        }
        self.dirty.insert(slot);
        self.dirty_since.get_or_insert(now);
    }

    fn zero(&mut self, slot: u32, index: u64, offset: u32, len: u32, now: u64) {
        let Some(chunk) = self.chunks.get_mut(&slot) else { return };
        chunk.touch(index);
        let range = offset / BLOCK as u32..(offset + len) / BLOCK as u32;
        chunk.overlay.drop_range(&mut self.pins, range.clone());
        for block in range {
            chunk.meta.written.clear(block);
        }
        self.dirty.insert(slot);
        self.dirty_since.get_or_insert(now);
    }

    /// The chunk in `slot` is gone: forget it and queue its tombstone. `deleted_index`: what a checkpoint must cover
    /// before the slot is reusable; `None` when replay cannot bring the chunk back.
    pub(super) fn bury(&mut self, slot: u32, deleted_index: Option<u64>) {
        let Some(mut chunk) = self.chunks.remove(&slot) else { return };
        chunk.overlay.drop_range(&mut self.pins, 0..u32::MAX);
        let key = (chunk.meta.copyset, chunk.meta.chunk);
        // While loading, the slot of another life of the same chunk may be the one indexed.
        if self.index.get(&key) == Some(&slot) {
            self.index.remove(&key);
            self.doubts.remove(&key);
        }
        if let Some(state) = self.copysets.get_mut(&chunk.meta.copyset) {
            state.chunks -= 1;
        }
        self.dirty.remove(&slot);
        self.singles.remove(&slot);
        let history = SlotHistory { generation: chunk.generation, page: chunk.page };
        let tomb = Tombstone {
            copyset: chunk.meta.copyset,
            incarnation: chunk.meta.incarnation,
            chunk: chunk.meta.chunk,
            created_index: chunk.meta.created_index,
            deleted_index: deleted_index.unwrap_or(0),
        };
        let waits = deleted_index.is_some();
        self.graves.push(Grave { slot, history, tomb, waits, stage: GraveStage::Open });
        self.open_graves += 1;
        if let Some(round) = &mut self.round {
            round.orphan(slot, chunk);
        }
    }

    /// Slots of deleted chunks are not reusable yet: a round or a checkpoint will make them so.
    #[must_use]
    pub fn has_graves(&self) -> bool {
        !self.graves.is_empty()
    }

    /// Some of them wait for the next round, to write that their chunk is gone.
    #[must_use]
    pub fn has_open_graves(&self) -> bool {
        self.open_graves > 0
    }

    /// Give back every slot whose grave is closed and waits for nothing.
    pub(super) fn release_graves(&mut self) {
        let slots = &mut self.slots;
        self.graves.retain(|grave| {
            let done = grave.stage == GraveStage::Closed && !grave.waits;
            if done {
                slots.release(grave.slot, grave.history);
            }
            !done
        });
    }
}
