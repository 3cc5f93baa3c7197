//! The chunk store of one shard: which chunks there are, what is in them, what of it is not on the disk yet.
//!
//! Admission decides, apply obeys: [`Store::admit`] answers before an operation is proposed, [`Store::apply`] does what
//! was committed whatever the chunk's version says. After a crash the metapages may be newer than the checkpoint that
//! replay starts from, and data, CRC page and metapage of one round may be durable in any combination; doing every
//! entry again, in order, is what makes them agree (rule 10).
//!
//! The only entries replay leaves out are those of lives of a chunk that the disk knows to be over: before the creation
//! of the life that is there, or up to the deletion that a tombstone tells of. That is why replay never needs more slots
//! than the crashed run had taken: a life whose end is durable takes none, any other takes one, as it did then, and
//! no slot changes hands before a checkpoint covers the Delete.

use super::admit::{self, Admission, ChunkView};
use super::apply::Grave;
use super::layout::Layout;
use super::meta::ChunkMeta;
use super::overlay::{Overlay, Pins};
use super::pool::{ExtentPool, Slots};
use super::read::{self, PlanKey, ReadPlan, Verified};
use super::writeback::Round;
use crate::shard::request::{ChunkOp, Outcome};
use raftlog::{BLOCK, CopysetId};
use rustc_hash::FxHashMap;
use smallvec::SmallVec;
use std::collections::BTreeSet;
use std::sync::Arc;

/// A chunk and where it is.
#[derive(Debug)]
pub(super) struct Chunk {
    pub(super) meta: ChunkMeta,
    /// Life of the slot.
    pub(super) generation: u64,
    /// Generation of the last metapage written.
    pub(super) page: u64,
    /// CRC32C per block as it is on the slot; meaningful where `meta.written` is set.
    pub(super) crcs: Box<[u32]>,
    /// Generation of the last write of each CRC page.
    pub(super) crc_pages: SmallVec<[u64; 5]>,
    pub(super) overlay: Overlay,
    /// Device writes completed, so that a read can tell that the slot changed under it.
    pub(super) version: u64,
    /// Only one copy of its metapage is of this life: the next round writes the other, so that no single rotten page can
    /// make a chunk vanish.
    pub(super) single: bool,
    /// Its newest metapage is rotten: nothing of it is believed, and nothing more is written to it.
    pub(super) suspect: bool,
}

/// Limits of a store.
#[derive(Clone, Copy, Debug)]
pub struct StoreConfig {
    /// Bytes of one merged device write at most.
    pub write_bytes_max: u32,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self { write_bytes_max: 256 << 10 }
    }
}

/// What a store has done; only ever rises.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Device writes of chunk data.
    pub data_writes: u64,
    /// Their bytes.
    pub data_bytes: u64,
    /// Device writes of metapages.
    pub meta_writes: u64,
    /// Their bytes.
    pub meta_bytes: u64,
    /// Device writes of CRC pages.
    pub crc_writes: u64,
    /// Their bytes.
    pub crc_bytes: u64,
    /// Syncs.
    pub syncs: u64,
    /// Rounds begun.
    pub rounds: u64,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct CopysetState {
    pub(super) incarnation: u64,
    pub(super) chunks: u64,
}

/// The chunks of one shard.
#[derive(Debug)]
pub struct Store {
    pub(super) layout: Layout,
    pub(super) config: StoreConfig,
    pub(super) index: FxHashMap<(CopysetId, u64), u32>,
    /// By slot; an iteration is never observable (no order is taken from it).
    pub(super) chunks: FxHashMap<u32, Chunk>,
    pub(super) copysets: FxHashMap<CopysetId, CopysetState>,
    pub(super) slots: Slots,
    pub(super) pins: Pins,
    pub(super) admission: Admission,
    /// Slots of chunks that differ from their metapage or have dirty blocks not in the running round.
    pub(super) dirty: BTreeSet<u32>,
    pub(super) dirty_since: Option<u64>,
    /// When the newest change was applied.
    pub(super) changed_at: u64,
    /// Slots whose chunk has only one metapage of its life: a round that happens anyway writes the other one.
    pub(super) singles: BTreeSet<u32>,
    /// Chunks in doubt: those whose `suspect` is set.
    pub(super) doubts: BTreeSet<(CopysetId, u64)>,
    pub(super) graves: Vec<Grave>,
    /// Those that wait for the next round.
    pub(super) open_graves: usize,
    /// Chunks whose deletion up to this index was on the disk at start, or is known from another replica; until a
    /// checkpoint covers it.
    pub(super) gone: FxHashMap<(CopysetId, u64), u64>,
    pub(super) round: Option<Round>,
    pub(super) counters: Counters,
}

impl Store {
    /// A store with nothing in it. [`Loader`](super::Loader) makes the ones that are used.
    pub(super) fn empty(layout: Layout, config: StoreConfig, slots: Slots) -> Self {
        Self {
            layout,
            config,
            index: FxHashMap::default(),
            chunks: FxHashMap::default(),
            copysets: FxHashMap::default(),
            slots,
            pins: Pins::default(),
            admission: Admission::default(),
            dirty: BTreeSet::new(),
            dirty_since: None,
            changed_at: 0,
            singles: BTreeSet::new(),
            doubts: BTreeSet::new(),
            graves: Vec::new(),
            open_graves: 0,
            gone: FxHashMap::default(),
            round: None,
            counters: Counters::default(),
        }
    }

    /// The store of a freshly formatted disk, without reading it.
    #[must_use]
    pub fn blank(layout: &Layout, shard: u16, pool: Arc<ExtentPool>) -> Self {
        Self::empty(layout.clone(), StoreConfig::default(), Slots::new(pool, shard))
    }

    /// Make a copyset known. Every copyset of the shard must be before anything is applied to it: at start (chunks
    /// were loaded or not), later when it is created.
    pub fn add_copyset(&mut self, copyset: CopysetId, incarnation: u64) {
        let state = self.copysets.entry(copyset).or_insert(CopysetState { incarnation, chunks: 0 });
        assert!(state.incarnation == incarnation, "a copyset was added twice with different incarnations");
    }

    /// Forget a copyset and free its chunks. To be called when the log's Purge of it is *durable*: a tombstone that
    /// survives a crash which the Purge does not would lose data.
    pub fn remove_copyset(&mut self, copyset: CopysetId) {
        self.admission.reset(copyset, &mut self.slots);
        let own = self.chunks.iter().filter(|(_, c)| c.meta.copyset == copyset);
        let mut own: Vec<u32> = own.map(|(&slot, _)| slot).collect();
        own.sort_unstable();
        for slot in own {
            self.bury(slot, None);
        }
        for grave in &mut self.graves {
            if grave.tomb.copyset == copyset {
                grave.waits = false;
            }
        }
        self.gone.retain(|key, _| key.0 != copyset);
        self.copysets.remove(&copyset);
        self.release_graves();
    }

    /// This shard has applied everything its logs held at start. From now on, and when all shards say so, new extents
    /// are handed out to [`Store::admit`].
    pub fn replay_done(&mut self) {
        self.slots.replay_done();
    }

    /// Decide the outcome of `op` before it is proposed. `Ok` for operations that are not proposed means that their
    /// range is valid.
    ///
    /// # Errors
    /// The outcome to answer; nothing was changed.
    pub fn admit(&mut self, copyset: CopysetId, chunk: u64, op: &ChunkOp) -> Result<(), Outcome> {
        if !self.copysets.contains_key(&copyset) {
            return Err(Outcome::NoCopyset);
        }
        if self.doubtful(copyset, chunk) && !matches!(op, ChunkOp::Delete { .. } | ChunkOp::Info) {
            return Err(Outcome::CrcFail);
        }
        let applied = self.applied_view(copyset, chunk);
        self.admission.admit((copyset, chunk), op, self.layout.chunk_size, applied, &mut self.slots)
    }

    /// An admitted operation was not proposed after all, or dropped.
    pub fn abandon(&mut self, copyset: CopysetId, chunk: u64, op: &ChunkOp) {
        let applied = self.applied_view(copyset, chunk);
        if let Some(change) = admit::change_of(op) {
            self.admission.abandon((copyset, chunk), change, applied, &mut self.slots);
        }
    }

    /// Nothing admitted so far of `copyset` counts: what its log still holds is admitted anew with [`Store::follow`].
    pub fn reset_proposed(&mut self, copyset: CopysetId) {
        self.admission.reset(copyset, &mut self.slots);
    }

    pub(super) fn applied_view(&self, copyset: CopysetId, chunk: u64) -> ChunkView {
        self.find(copyset, chunk).map_or_else(ChunkView::default, |(_, c)| ChunkView {
            exists: true,
            sn: c.meta.sn,
            corrected_sn: c.meta.corrected_sn,
        })
    }

    /// The checkpoint of `copyset` at `index` is durable: slots of chunks deleted up to there become reusable once
    /// their tombstones are durable as well.
    pub fn checkpoint_durable(&mut self, copyset: CopysetId, index: u64) {
        for grave in &mut self.graves {
            if grave.tomb.copyset == copyset && grave.tomb.deleted_index <= index {
                grave.waits = false;
            }
        }
        self.gone.retain(|key, deleted| key.0 != copyset || *deleted > index);
        self.release_graves();
    }

    /// The valid copy of its metapage may be an old one: nothing of the chunk can be trusted, and a write would hide it.
    #[must_use]
    pub fn is_doubtful(&self, copyset: CopysetId, chunk: u64) -> bool {
        self.doubtful(copyset, chunk)
    }

    pub(super) fn doubtful(&self, copyset: CopysetId, chunk: u64) -> bool {
        self.find(copyset, chunk).is_some_and(|(_, c)| c.suspect)
    }

    pub(super) fn find(&self, copyset: CopysetId, chunk: u64) -> Option<(u32, &Chunk)> {
        let slot = *self.index.get(&(copyset, chunk))?;
        Some((slot, self.chunks.get(&slot)?))
    }

    /// Plan a read of whole blocks.
    ///
    /// # Errors
    /// `Invalid` or `NoChunk`; `CrcFail` when the chunk's metapage may have lost its newest copy.
    pub fn read(&self, copyset: CopysetId, chunk: u64, offset: u32, len: u32) -> Result<ReadPlan, Outcome> {
        if !admit::in_range(offset, u64::from(len), self.layout.chunk_size) {
            return Err(Outcome::Invalid);
        }
        let (slot, found) = self.find(copyset, chunk).ok_or(Outcome::NoChunk)?;
        if found.suspect {
            return Err(Outcome::CrcFail);
        }
        let key = PlanKey { copyset, chunk, slot, generation: found.generation, version: found.version };
        let blocks = offset / BLOCK as u32..(offset + len) / BLOCK as u32;
        let pieces = read::pieces(found, &self.pins, blocks, |block| self.layout.block_offset(slot, block));
        Ok(ReadPlan { key, pieces })
    }

    /// Judge what the device returned for a [`Piece::Device`](super::Piece) of the plan `key` is from. On `Rot` the
    /// caller reads the piece once more with the same plan; a second `Rot` is one.
    #[must_use]
    pub fn check(&self, key: &PlanKey, first_block: u32, data: &[u8]) -> Verified {
        match self.find(key.copyset, key.chunk) {
            Some((slot, chunk)) if slot == key.slot && chunk.generation == key.generation => {
                read::check(chunk, key, first_block, data)
            }
            _ => Verified::Stale,
        }
    }

    /// Versions of a chunk; `None` if absent.
    #[must_use]
    pub fn info(&self, copyset: CopysetId, chunk: u64) -> Option<SmallVec<[u64; 2]>> {
        let (_, found) = self.find(copyset, chunk)?;
        let mut versions = SmallVec::from_slice(&[found.meta.sn]);
        versions.extend(found.meta.snapshot.map(|s| s.sn));
        Some(versions)
    }

    /// Chunks of one copyset.
    #[must_use]
    pub fn chunks_of(&self, copyset: CopysetId) -> u64 {
        self.copysets.get(&copyset).map_or(0, |state| state.chunks)
    }

    /// Chunks of all copysets.
    #[must_use]
    pub fn chunk_count(&self) -> u64 {
        self.chunks.len() as u64
    }

    /// Free slots in this shard's hands that are not promised.
    #[must_use]
    pub fn spare_slots(&self) -> u64 {
        self.slots.spare() as u64
    }

    /// Bytes of payload buffers kept in memory by blocks not yet on their slots.
    #[must_use]
    pub fn pinned_bytes(&self) -> u64 {
        self.pins.bytes()
    }

    /// When the oldest change not yet written back was applied (the running round's included).
    #[must_use]
    pub fn oldest_dirty_ns(&self) -> Option<u64> {
        let running = self.round.as_ref().and_then(|round| round.since);
        running.into_iter().chain(self.dirty_since).min()
    }

    /// When the newest change was applied.
    #[must_use]
    pub fn changed_ns(&self) -> u64 {
        self.changed_at
    }

    /// Lowest index of `copyset` whose data is in memory only and not part of the running round. After a round it is
    /// above every index the round allows to checkpoint.
    #[must_use]
    pub fn oldest_unwritten(&self, copyset: CopysetId) -> Option<u64> {
        let own = self.chunks.values().filter(|c| c.meta.copyset == copyset);
        own.flat_map(|c| c.overlay.iter().filter(|(_, d)| !d.captured).map(|(_, d)| d.oldest)).min()
    }

    /// Chunks in doubt: they answer `CrcFail` until they are deleted or taken from another replica.
    #[must_use]
    pub fn suspect_chunks(&self) -> u64 {
        self.doubts.len() as u64
    }

    /// Counters.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// The map of the disk.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }
}

impl Chunk {
    pub(super) fn new(layout: &Layout, meta: ChunkMeta, generation: u64, page: u64) -> Self {
        Self {
            meta,
            generation,
            page,
            crcs: vec![0; layout.blocks() as usize].into_boxed_slice(),
            crc_pages: SmallVec::from_elem(0, layout.crc_pages() as usize),
            overlay: Overlay::default(),
            version: 0,
            single: true,
            suspect: false,
        }
    }

    pub(super) fn touch(&mut self, index: u64) {
        // Replay takes it back to where it begins, and so does an older entry on top of what another replica sent: until
        // the log has passed what had been seen here, the chunk is a mixture.
        let seen = self.meta.whole_at.max(self.meta.applied_index);
        self.meta.whole_at = if index < seen { seen } else { 0 };
        self.meta.applied_index = index;
    }

    /// Version `index` of `block`, whose bytes have this `crc`, is on the slot.
    pub(super) fn landed(&mut self, pins: &mut Pins, block: u32, index: u64, crc: u32) {
        self.version += 1;
        if let Some(slot) = self.crcs.get_mut(block as usize) {
            *slot = crc;
        }
        if self.overlay.written(pins, block, index) {
            self.meta.written.set(block);
        }
    }
}
