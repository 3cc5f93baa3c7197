//! Start-up: the metadata zone, which all shards of the disk read together (`scan.rs`), then the CRC pages of the shard's
//! own chunks, as reads that the caller performs, any number of them at a time and in any order.
//!
//! Of two valid copies of a page the newer one counts; a torn one leaves the other. A page of a newer format refuses the
//! disk.
//!
//! A damaged metapage is torn or rotten, and rot must not make old content, or no chunk at all, out of a chunk. What a
//! torn page was about is not covered by a checkpoint, so replay does it again; what a page says that a checkpoint covers
//! was durable, so its damage is rot and the chunk it names answers CRC_FAIL. A slot both of whose copies are unreadable
//! and name no chunk is put out of use and counted.

use super::apply::{Grave, GraveStage};
use super::crcpage;
use super::layout::{Layout, META_PAIR};
use super::meta::{self, ChunkMeta, Claim, Content, MetaError, Metapage, Tombstone};
use super::page::{self, Page, u64_at};
use super::pool::{ExtentConflict, ExtentPool, SlotHistory, Slots};
use super::scan::{Batch, Copy, Found, Ghost};
use super::store::{Chunk, CopysetState, Store, StoreConfig};
use raftlog::{BLOCK, CopysetId};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

/// Largest read asked for, bytes.
pub const READ_BYTES_MAX: usize = 1 << 20;
/// Slots whose metapages one read takes.
const SLOTS_PER_READ: u32 = (READ_BYTES_MAX as u64 / META_PAIR) as u32;

/// The device could not deliver a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("read failed")]
pub struct ReadFailed;

/// What the log knows of a copyset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    /// Its life.
    pub incarnation: u64,
    /// Applied index of its newest checkpoint.
    pub checkpoint: u64,
    /// Last index of its log.
    pub last: u64,
}

impl Known {
    /// Of a copyset whose records are lost: it exists, and its chunks are not to be freed.
    pub const LOST: Self = Self { incarnation: 0, checkpoint: 0, last: 0 };

    /// Whether the log will do again what happened at `index`.
    fn replays(&self, index: u64) -> bool {
        self.checkpoint < index && index <= self.last
    }
}

/// Why a disk cannot be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// Metapages of a newer format.
    #[error("slot {slot} has a metapage of version {version}, newer than this build")]
    Newer {
        /// Slot.
        slot: u32,
        /// Version.
        version: u16,
    },
    /// Two shards in one extent.
    #[error(transparent)]
    Conflict(#[from] ExtentConflict),
    /// `finish` before all reads were fed.
    #[error("not everything has been read")]
    Unfinished,
}

/// What loading found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadReport {
    /// Chunks of this shard.
    pub chunks: u64,
    /// Slots of the disk out of use because both copies of their metapage are unreadable.
    pub quarantined: u64,
    /// Chunks of this shard whose newest metapage is rotten.
    pub torn: u64,
    /// Slots of this shard freed because another slot holds a later life of the same chunk.
    pub superseded: u64,
    /// Slots of this shard freed because the log does not know their copyset.
    pub orphaned: u64,
    /// CRC pages without a readable copy though blocks of theirs hold data. Replay restores the torn ones among them;
    /// blocks of the others read as `CrcFail`.
    pub crc_pages_lost: u64,
}

#[derive(PartialEq, Eq)]
enum Stage {
    Meta,
    Crc,
}

/// Reads what one shard needs to start.
pub struct Loader {
    layout: Layout,
    shard: u16,
    pool: Arc<ExtentPool>,
    config: StoreConfig,
    stage: Stage,
    /// Reads to ask for.
    reads: VecDeque<(u64, usize)>,
    /// Reads asked for and not fed.
    outstanding: usize,
    /// The copy that is known of slots whose other copy comes in a read of its own, with its number.
    halves: BTreeMap<u32, (u64, Copy)>,
    batch: Batch,
    chunks: BTreeMap<u32, Chunk>,
    tombs: BTreeMap<u32, (Tombstone, SlotHistory)>,
    /// Slots of chunks whose other metapage is newer and damaged, and what it claims.
    torn: BTreeMap<u32, Claim>,
    /// Slots without a valid metapage of the chunk that a damaged one names, and whether nothing is lost if replay makes
    /// that chunk again.
    ghosts: BTreeMap<u32, (Claim, bool)>,
    report: LoadReport,
    error: Option<LoadError>,
}

impl Loader {
    /// A loader for `shard` of the disk. All shards of a disk share `pool`.
    #[must_use]
    pub fn new(layout: &Layout, shard: u16, pool: Arc<ExtentPool>, config: StoreConfig) -> Self {
        assert!(shard < layout.shards, "the disk has no such shard");
        Self {
            layout: layout.clone(),
            shard,
            pool,
            config,
            stage: Stage::Meta,
            reads: VecDeque::new(),
            outstanding: 0,
            halves: BTreeMap::new(),
            batch: Batch::default(),
            chunks: BTreeMap::new(),
            tombs: BTreeMap::new(),
            torn: BTreeMap::new(),
            ghosts: BTreeMap::new(),
            report: LoadReport::default(),
            error: None,
        }
    }

    /// A read to perform: absolute offset and length (whole blocks), to be answered with [`Loader::feed`]. `None` =
    /// nothing to read now: either [`Loader::is_complete`], or what is outstanding, here or in another shard, must be
    /// fed first.
    pub fn next_read(&mut self) -> Option<(u64, usize)> {
        if self.error.is_some() {
            return None;
        }
        if self.reads.is_empty() && self.stage == Stage::Meta {
            if let Some(slots) = self.pool.claim(SLOTS_PER_READ) {
                let offset = self.layout.metapage_offset(slots.start, 0);
                self.reads.push_back((offset, slots.len() * META_PAIR as usize));
            } else if let Some(found) = self.pool.found(self.shard) {
                self.stage = Stage::Crc;
                let (found, ghosts) = found;
                found.into_iter().for_each(|found| self.own(found));
                self.ghosts = ghosts.into_iter().map(|ghost| (ghost.slot, (ghost.claim, ghost.begun))).collect();
                self.plan_crc_reads();
            }
        }
        let read = self.reads.pop_front()?;
        self.outstanding += 1;
        Some(read)
    }

    /// Everything is read, or reading on is pointless: go to [`Loader::finish`].
    #[must_use]
    pub fn is_complete(&self) -> bool {
        let read = self.stage == Stage::Crc && self.reads.is_empty() && self.outstanding == 0;
        read || self.error.is_some()
    }

    fn plan_crc_reads(&mut self) {
        let per_slot = self.layout.crc_bytes_per_slot();
        let mut run: Option<(u64, u64)> = None;
        for &slot in self.chunks.keys() {
            let at = self.layout.crcpage_offset(slot, 0, 0);
            run = match run {
                Some((start, len)) if start + len == at => Some((start, len + per_slot)),
                before => {
                    if let Some((start, len)) = before {
                        push_reads(&mut self.reads, start, len);
                    }
                    Some((at, per_slot))
                }
            };
        }
        if let Some((start, len)) = run {
            push_reads(&mut self.reads, start, len);
        }
    }

    /// The result of a read that [`Loader::next_read`] gave. A failed read is split into single pages.
    pub fn feed(&mut self, (offset, len): (u64, usize), data: Result<&[u8], ReadFailed>) {
        self.outstanding = self.outstanding.saturating_sub(1);
        match data {
            Ok(data) if data.len() == len => {
                for (at, bytes) in (offset..).step_by(BLOCK).zip(data.chunks_exact(BLOCK)) {
                    self.page(at, page::page(bytes));
                }
            }
            _ if len > BLOCK => {
                for page in (0..(len / BLOCK) as u64).rev() {
                    self.reads.push_front((offset + page * BLOCK as u64, BLOCK));
                }
            }
            _ => self.page(offset, None),
        }
        if self.batch.slots > 0 {
            self.pool.report(&mut self.batch);
        }
    }

    fn page(&mut self, offset: u64, bytes: Option<&Page>) {
        match self.stage {
            Stage::Meta => self.metapage(offset, bytes),
            Stage::Crc => self.crcpage(offset, bytes),
        }
    }

    fn metapage(&mut self, offset: u64, bytes: Option<&Page>) {
        let at = offset - self.layout.meta_offset;
        let slot = (at / META_PAIR) as u32;
        let copy_number = at / BLOCK as u64 % 2;
        let copy = match bytes.map(|page| (meta::decode(&self.layout, slot, page), page)) {
            None => Copy::Unreadable,
            Some((Ok(found), _)) if found.page & 1 == copy_number => Copy::Valid(Box::new(found)),
            Some((Err(MetaError::Newer(version)), _)) => {
                self.error.get_or_insert(LoadError::Newer { slot, version });
                Copy::Unreadable
            }
            Some((Err(MetaError::Blank), _)) => Copy::Blank,
            Some((_, page)) => Copy::Bad(meta::claim(&self.layout, slot, page)),
        };
        match self.halves.remove(&slot) {
            None => {
                self.halves.insert(slot, (copy_number, copy));
            }
            Some((0, first)) => self.slot(slot, first, copy),
            Some((_, second)) => self.slot(slot, copy, second),
        }
    }

    /// Both copies of a slot are known.
    fn slot(&mut self, slot: u32, first: Copy, second: Copy) {
        self.batch.slots += 1;
        let (page, other) = match (first, second) {
            (Copy::Valid(a), Copy::Valid(b)) => {
                let (newer, older) = if a.page > b.page { (a, b) } else { (b, a) };
                (newer, Copy::Valid(older))
            }
            (Copy::Valid(found), other) | (other, Copy::Valid(found)) => (found, other),
            (Copy::Blank, Copy::Blank) => return,
            (first, second) => return self.unreadable(slot, first, second),
        };
        // The next life of the slot may have begun.
        if let (Content::Tombstone(_), Copy::Bad(claim)) = (&page.content, &other)
            && claim.page == page.page + 1
            && claim.generation == page.generation + 1
        {
            self.ghost(slot, claim.clone(), true);
        }
        self.batch.found.push(Found { page: *page, other });
    }

    /// Neither copy is valid.
    fn unreadable(&mut self, slot: u32, first: Copy, second: Copy) {
        // The very first write of a metapage goes to copy 1; torn, it leaves this.
        let begun = matches!((&first, &second), (Copy::Blank, Copy::Bad(_)));
        if !begun {
            self.batch.quarantined.push(slot);
        }
        let claims = [first, second].into_iter().filter_map(|copy| match copy {
            Copy::Bad(claim) if claim.chunk.is_some() => Some(claim),
            _ => None,
        });
        if let Some(newest) = claims.max_by_key(|claim| claim.page) {
            self.ghost(slot, newest, begun);
        }
    }

    fn ghost(&mut self, slot: u32, claim: Claim, begun: bool) {
        if let Some(copyset) = claim.chunk.as_ref().map(|chunk| chunk.copyset) {
            self.batch.ghosts.push(Ghost { slot, copyset, claim, begun });
        }
    }

    /// Take over what was found for this shard.
    fn own(&mut self, Found { page, other }: Found) {
        let Metapage { slot, generation, page, content } = page;
        match content {
            Content::Chunk(meta) => self.chunk(slot, meta, generation, page, other),
            Content::Tombstone(tomb) => {
                self.tombs.insert(slot, (tomb, SlotHistory { generation, page }));
            }
        }
    }

    fn chunk(&mut self, slot: u32, meta: ChunkMeta, generation: u64, page: u64, other: Copy) {
        let mut chunk = Chunk::new(&self.layout, meta, generation, page);
        let last = chunk.meta.applied_index;
        let doubt = last == super::mend::DOUBT;
        match other {
            Copy::Valid(older) => chunk.single = older.generation != generation,
            Copy::Blank => chunk.suspect = page > 1,
            // A damaged copy that is older, or was to say the same again, is no loss, whatever damaged it.
            Copy::Bad(claim) if claim.page.checked_add(1) == Some(page) && claim.last_index <= last => {}
            Copy::Bad(claim) if claim.page == page + 1 && claim.last_index == last => {}
            Copy::Bad(claim) if claim.page == page + 1 => drop(self.torn.insert(slot, claim)),
            Copy::Bad(_) | Copy::Unreadable => chunk.suspect = true,
        }
        chunk.suspect |= doubt;
        self.chunks.insert(slot, chunk);
    }

    /// Now that the log is known: which damaged pages were torn, and which are rotten.
    fn judge(&mut self, known: &dyn Fn(CopysetId) -> Option<Known>) {
        for (slot, claim) in std::mem::take(&mut self.torn) {
            if let Some(chunk) = self.chunks.get_mut(&slot) {
                chunk.suspect |= known(chunk.meta.copyset).is_none_or(|k| !k.replays(claim.last_index));
            }
        }
        for (slot, (claim, begun)) in std::mem::take(&mut self.ghosts) {
            let Claim { generation, page, last_index, chunk: Some(meta) } = claim else { continue };
            let log = known(meta.copyset).filter(|k| k.incarnation == meta.incarnation);
            if log.is_some_and(|k| last_index <= k.last && !(begun && k.replays(last_index))) {
                self.pool.rescue(slot);
                self.tombs.remove(&slot);
                let mut chunk = Chunk::new(&self.layout, *meta, generation, page);
                chunk.suspect = true;
                self.chunks.insert(slot, chunk);
            }
        }
        self.report.torn = self.chunks.values().filter(|chunk| chunk.suspect).count() as u64;
    }

    fn crcpage(&mut self, offset: u64, bytes: Option<&Page>) {
        let at = offset - self.layout.crc_offset;
        let per_slot = self.layout.crc_bytes_per_slot();
        let (slot, inside) = ((at / per_slot) as u32, at % per_slot / BLOCK as u64);
        let pages = u64::from(self.layout.crc_pages());
        let (copy, number) = (inside / pages, (inside % pages) as u32);
        let (Some(chunk), Some(bytes)) = (self.chunks.get_mut(&slot), bytes) else { return };
        let Some(known) = chunk.crc_pages.get_mut(number as usize) else { return };
        // A page in the wrong copy's place was misdirected.
        if u64_at(bytes, 24) & 1 == copy {
            let newer = crcpage::decode(&self.layout, slot, number, chunk.generation, *known, bytes, &mut chunk.crcs);
            *known = newer.unwrap_or(*known);
        }
    }

    /// The store. `known` answers for the copysets the log knows; chunks of others are freed. Every copyset of the shard
    /// must then be added with [`Store::add_copyset`], and replay may start when [`ExtentPool::is_loaded`].
    ///
    /// # Errors
    /// When the disk must not be used.
    pub fn finish(mut self, known: &dyn Fn(CopysetId) -> Option<Known>) -> Result<(Store, LoadReport), LoadError> {
        if let Some(error) = self.error {
            return Err(error);
        }
        if !self.is_complete() {
            return Err(LoadError::Unfinished);
        }
        self.judge(known);
        // A tombstone keeps its slot only while replay may need it.
        self.tombs.retain(|_, (tomb, _)| {
            known(tomb.copyset).is_some_and(|k| k.incarnation == tomb.incarnation && k.checkpoint < tomb.deleted_index)
        });
        let used = |slot| self.chunks.contains_key(&slot) || self.tombs.contains_key(&slot);
        let own = self.pool.publish(self.shard, &used)?;
        self.report.quarantined = self.pool.quarantined();
        self.report.crc_pages_lost = self.chunks.values().map(pages_lost).sum();
        let mut slots = Slots::new(Arc::clone(&self.pool), self.shard);
        for extent in &own {
            slots.adopt(extent, used);
        }
        let mut store = Store::empty(self.layout, self.config, slots);
        for (slot, (tomb, history)) in self.tombs {
            let gone = store.gone.entry((tomb.copyset, tomb.chunk)).or_default();
            *gone = tomb.deleted_index.max(*gone);
            store.graves.push(Grave { slot, history, tomb, waits: true, stage: GraveStage::Closed });
        }
        for (slot, chunk) in self.chunks {
            index_chunk(&mut store, slot, chunk, known, &mut self.report);
        }
        self.report.chunks = store.chunk_count();
        Ok((store, self.report))
    }
}

/// Take a loaded chunk into the store, or bury it, or the one it supersedes.
fn index_chunk(
    store: &mut Store,
    slot: u32,
    mut chunk: Chunk,
    known: &dyn Fn(CopysetId) -> Option<Known>,
    report: &mut LoadReport,
) {
    let (copyset, incarnation) = (chunk.meta.copyset, chunk.meta.incarnation);
    let key = (copyset, chunk.meta.chunk);
    let rank = (chunk.meta.created_index, chunk.generation);
    if std::mem::take(&mut chunk.single) && !chunk.suspect {
        store.singles.insert(slot);
    }
    store.chunks.insert(slot, chunk);
    store.copysets.entry(copyset).or_insert(CopysetState { incarnation, chunks: 0 }).chunks += 1;
    if known(copyset).is_none_or(|k| k != Known::LOST && k.incarnation != incarnation) {
        report.orphaned += 1;
        store.bury(slot, None);
        forget_if_empty(store, copyset);
        return;
    }
    // An orphan of a former life may have brought the entry.
    if let Some(state) = store.copysets.get_mut(&copyset) {
        state.incarnation = incarnation;
    }
    // Its own tombstone is lost, but a later life has one.
    if let Some(&deleted) = store.gone.get(&key).filter(|&&deleted| deleted >= rank.0) {
        report.superseded += 1;
        return store.bury(slot, Some(deleted));
    }
    let rival = store.index.get(&key).copied();
    let rival_rank = rival.and_then(|r| store.chunks.get(&r)).map(|c| (c.meta.created_index, c.generation));
    // The later life of the chunk is the chunk; the tombstone of the earlier one did not make it. Its Delete is before
    // the later creation.
    report.superseded += u64::from(rival.is_some());
    match rival.zip(rival_rank) {
        Some((_, other)) if other >= rank => return store.bury(slot, Some(other.0.saturating_sub(1))),
        Some((rival, _)) => store.bury(rival, Some(rank.0.saturating_sub(1))),
        None => {}
    }
    store.index.insert(key, slot);
    if store.chunks.get(&slot).is_some_and(|chunk| chunk.suspect) {
        store.doubts.insert(key);
    }
}

fn forget_if_empty(store: &mut Store, copyset: CopysetId) {
    if store.chunks_of(copyset) == 0 {
        store.copysets.remove(&copyset);
    }
}

fn pages_lost(chunk: &Chunk) -> u64 {
    let lost = |&(page, &generation): &(u32, &u64)| {
        let blocks = crcpage::range(page, chunk.crcs.len());
        generation == 0 && blocks.into_iter().any(|block| chunk.meta.written.get(block as u32))
    };
    (0u32..).zip(&chunk.crc_pages).filter(lost).count() as u64
}

fn push_reads(reads: &mut VecDeque<(u64, usize)>, start: u64, len: u64) {
    for at in (start..start + len).step_by(READ_BYTES_MAX) {
        reads.push_back((at, (start + len - at).min(READ_BYTES_MAX as u64) as usize));
    }
}
