//! The write-back round: from memory to slots, in the order that any crash survives (rule 11).
//!
//! A round captures everything applied so far and then goes: data writes → sync → CRC pages and metapages → sync →
//! done. What is applied meanwhile belongs to the next round; the pages of this one are built from the captured state.
//! When it is done, the captured indexes may be checkpointed. Each page goes to the copy that is not the valid one, so
//! until the second sync the state before the round stays readable.
//!
//! The caller must have a log record durable with commit ≥ every index in [`RoundStart::commits`] before it asks for
//! the first operation (rule 10). A failed write or sync is fatal for the disk: there is no way to say so here.

use super::apply::GraveStage;
use super::crcpage;
use super::mend::DOUBT;
use super::meta::{self, Content};
use super::overlay::PinRef;
use super::pool::SlotHistory;
use super::store::{Chunk, Store};
use crate::io::Bufs;
use crate::io::buffer::PoolBuf;
use raftlog::{BLOCK, CopysetId};
use rustc_hash::FxHashMap;
use slab::Slab;
use smallvec::SmallVec;
use std::collections::BTreeMap;

/// Names an operation of a round until it is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IoId(pub u32);

/// An operation of a round.
#[derive(Debug)]
pub enum RoundIo {
    /// Write `bufs` at `offset`; not dsync.
    Write {
        /// Byte offset on the disk.
        offset: u64,
        /// Data, in order.
        bufs: Bufs,
    },
    /// Make everything written so far durable.
    Sync,
}

/// What a round is about to write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoundStart {
    /// Highest captured index per copyset: the log must hold a commit that covers it first.
    pub commits: Vec<(CopysetId, u64)>,
}

#[derive(Debug)]
struct Captured {
    slot: u32,
    block: u32,
    at: PinRef,
    crc: u32,
    index: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PageKind {
    Meta,
    Crc(u32),
}

/// A page to be written. Its bytes are made when its turn comes.
#[derive(Debug)]
struct PageRef {
    offset: u64,
    slot: u32,
    page_generation: u64,
    kind: PageKind,
}

/// What the metapage of a slot will say.
#[derive(Debug)]
struct Image {
    generation: u64,
    content: Content,
}

#[derive(Debug)]
enum Flight {
    Data(std::ops::Range<usize>),
    Pages,
    Sync,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Data,
    DataSync,
    Pages,
    PagesSync,
    End,
}

/// A round under way.
#[derive(Debug)]
pub(super) struct Round {
    pub(super) since: Option<u64>,
    /// With the incarnation each index belongs to.
    applied: Vec<(CopysetId, u64, u64)>,
    /// In disk order.
    blocks: Vec<Captured>,
    images: FxHashMap<u32, Image>,
    /// In disk order.
    pages: Vec<PageRef>,
    /// Captured chunks that were deleted since: their CRC pages are still to be built from them.
    orphans: FxHashMap<u32, Chunk>,
    flights: Slab<Flight>,
    phase: Phase,
    cursor: usize,
}

impl Round {
    pub(super) fn orphan(&mut self, slot: u32, chunk: Chunk) {
        if self.images.contains_key(&slot) {
            self.orphans.insert(slot, chunk);
        }
    }
}

impl Store {
    /// Whether a round is under way.
    #[must_use]
    pub fn round_active(&self) -> bool {
        self.round.is_some()
    }

    /// Capture everything applied so far. `applied`: the applied index of each copyset that may be checkpointed at
    /// the end. `None` when there is nothing to write: `applied` is on the disk already.
    ///
    /// # Panics
    /// While a round is under way, or before [`ExtentPool::is_loaded`](super::ExtentPool::is_loaded).
    pub fn begin_round(&mut self, applied: &[(CopysetId, u64)]) -> Option<RoundStart> {
        assert!(self.round.is_none(), "rounds do not overlap");
        assert!(self.slots.all_loaded(), "no shard writes metapages while another one still reads them");
        if self.dirty.is_empty() && !self.has_open_graves() {
            return None;
        }
        let incarnation =
            |&(copyset, index): &(CopysetId, u64)| Some((copyset, self.copysets.get(&copyset)?.incarnation, index));
        let mut round = Round {
            since: self.dirty_since.take(),
            applied: applied.iter().filter_map(incarnation).collect(),
            blocks: Vec::new(),
            images: FxHashMap::default(),
            pages: Vec::new(),
            orphans: FxHashMap::default(),
            flights: Slab::new(),
            phase: Phase::Data,
            cursor: 0,
        };
        let mut commits = BTreeMap::new();
        self.capture_chunks(&mut round, &mut commits);
        self.capture_graves(&mut round, &mut commits);
        round.pages.sort_unstable_by_key(|page| page.offset);
        self.round = Some(round);
        self.counters.rounds += 1;
        Some(RoundStart { commits: commits.into_iter().collect() })
    }

    fn capture_chunks(&mut self, round: &mut Round, commits: &mut BTreeMap<CopysetId, u64>) {
        // Slots ascend, and so do the blocks of an overlay: `blocks` comes out in disk order.
        self.dirty.append(&mut self.singles);
        for slot in std::mem::take(&mut self.dirty) {
            let Some(chunk) = self.chunks.get_mut(&slot) else { continue };
            if std::mem::take(&mut chunk.single) {
                self.singles.insert(slot);
            }
            let mut meta = chunk.meta.clone();
            let mut last_page = None;
            for (block, dirty) in chunk.overlay.capture() {
                self.pins.share(dirty.at);
                let (at, crc, index) = (dirty.at, dirty.crc, dirty.index);
                round.blocks.push(Captured { slot, block, at, crc, index });
                meta.written.set(block);
                let page = block / crcpage::CRCS as u32;
                if last_page.replace(page) != Some(page) {
                    let generation = &mut chunk.crc_pages[page as usize];
                    *generation += 1;
                    let offset = self.layout.crcpage_offset(slot, page, *generation);
                    let kind = PageKind::Crc(page);
                    round.pages.push(PageRef { offset, slot, page_generation: *generation, kind });
                }
            }
            chunk.page += 1;
            let offset = self.layout.metapage_offset(slot, chunk.page);
            round.pages.push(PageRef { offset, slot, page_generation: chunk.page, kind: PageKind::Meta });
            // What is being taken in, or in doubt, has no index; what entries did to it is applied.
            let index = match meta.applied_index {
                0 | DOUBT => round.applied.iter().find(|of| of.0 == meta.copyset).map_or(0, |of| of.2),
                index => index,
            };
            let highest = commits.entry(meta.copyset).or_default();
            *highest = index.max(*highest);
            round.images.insert(slot, Image { generation: chunk.generation, content: Content::Chunk(meta) });
        }
    }

    fn capture_graves(&mut self, round: &mut Round, commits: &mut BTreeMap<CopysetId, u64>) {
        self.open_graves = 0;
        for grave in self.graves.iter_mut().filter(|grave| grave.stage == GraveStage::Open) {
            grave.stage = GraveStage::InRound;
            grave.history.page += 1;
            let SlotHistory { generation, page } = grave.history;
            let offset = self.layout.metapage_offset(grave.slot, page);
            let slot = grave.slot;
            round.pages.push(PageRef { offset, slot, page_generation: page, kind: PageKind::Meta });
            round.images.insert(slot, Image { generation, content: Content::Tombstone(grave.tomb) });
            if grave.waits {
                let highest = commits.entry(grave.tomb.copyset).or_default();
                *highest = grave.tomb.deleted_index.max(*highest);
            }
        }
    }

    /// The next operation of the round, if one may be started now. `alloc` gives buffers for pages; when it gives none,
    /// ask again when memory is free. At most `depth` are in flight.
    pub fn next_io(
        &mut self,
        depth: usize,
        alloc: &mut dyn FnMut(usize) -> Option<PoolBuf>,
    ) -> Option<(IoId, RoundIo)> {
        loop {
            let round = self.round.as_mut()?;
            if round.flights.len() >= depth.max(1) {
                return None;
            }
            match round.phase {
                Phase::Data if round.cursor < round.blocks.len() => return Some(self.data_write()),
                Phase::Pages if round.cursor < round.pages.len() => {
                    // The sync that precedes the pages must be over.
                    let syncing = round.flights.iter().any(|(_, flight)| matches!(flight, Flight::Sync));
                    return if syncing { None } else { self.page_write(alloc) };
                }
                Phase::End => return None,
                _ if !round.flights.is_empty() => return None,
                Phase::Data => {
                    round.phase = if round.blocks.is_empty() { Phase::Pages } else { Phase::DataSync };
                    round.cursor = 0;
                }
                Phase::DataSync => return Some(self.sync(Phase::Pages)),
                Phase::Pages => round.phase = Phase::PagesSync,
                Phase::PagesSync => return Some(self.sync(Phase::End)),
            }
        }
    }

    fn sync(&mut self, next: Phase) -> (IoId, RoundIo) {
        self.counters.syncs += 1;
        let round = self.round.as_mut();
        let Some(round) = round else { panic!("a sync belongs to a round") };
        round.phase = next;
        (IoId(round.flights.insert(Flight::Sync) as u32), RoundIo::Sync)
    }

    /// As many captured blocks from the cursor on as lie next to each other on the disk.
    fn data_write(&mut self) -> (IoId, RoundIo) {
        let Some(round) = self.round.as_mut() else { panic!("a write belongs to a round") };
        let limit = (self.config.write_bytes_max as usize / BLOCK).max(1);
        let first = round.cursor;
        let place = |c: &Captured| self.layout.block_offset(c.slot, c.block);
        let offset = place(&round.blocks[first]);
        let run = round.blocks[first..].iter().take(limit).zip(0u64..);
        let count = run.take_while(|(c, n)| place(c) == offset + n * BLOCK as u64).count();
        let mut bufs = Bufs::new();
        let mut start = round.blocks[first].at;
        let (mut end, mut blocks) = (start, 1);
        for captured in &round.blocks[first + 1..first + count] {
            if end.next() == captured.at {
                blocks += 1;
            } else {
                bufs.push(self.pins.slice(start, blocks));
                (start, blocks) = (captured.at, 1);
            }
            end = captured.at;
        }
        bufs.push(self.pins.slice(start, blocks));
        round.cursor += count;
        self.counters.data_writes += 1;
        self.counters.data_bytes += (count * BLOCK) as u64;
        let id = round.flights.insert(Flight::Data(first..first + count));
        (IoId(id as u32), RoundIo::Write { offset, bufs })
    }

    /// As many pages from the cursor on as lie next to each other and are of one kind.
    fn page_write(&mut self, alloc: &mut dyn FnMut(usize) -> Option<PoolBuf>) -> Option<(IoId, RoundIo)> {
        let round = self.round.as_mut()?;
        let limit = (self.config.write_bytes_max as usize / BLOCK).max(1);
        let rest = &round.pages[round.cursor..];
        let (offset, is_meta) = (rest[0].offset, rest[0].kind == PageKind::Meta);
        let run = rest.iter().take(limit).zip(0u64..);
        let fits =
            |(p, n): &(&PageRef, u64)| p.offset == offset + n * BLOCK as u64 && (p.kind == PageKind::Meta) == is_meta;
        let count = run.take_while(fits).count();
        // One page at a time is better than none when memory is short.
        let mut buf = alloc(count * BLOCK).or_else(|| alloc(BLOCK))?;
        let count = count.min(buf.len() / BLOCK);
        buf.truncate(count * BLOCK);
        for (page, out) in rest[..count].iter().zip(buf.chunks_exact_mut(BLOCK)) {
            let Some(image) = round.images.get(&page.slot) else { panic!("every page has its image") };
            let (slot, generation) = (page.slot, image.generation);
            match page.kind {
                PageKind::Meta => {
                    meta::encode(&self.layout, slot, generation, page.page_generation, &image.content, out);
                }
                PageKind::Crc(number) => {
                    let chunk = self.chunks.get(&slot).or_else(|| round.orphans.get(&slot));
                    let Some(chunk) = chunk else { panic!("a captured chunk lives until its round is over") };
                    let table = &chunk.crcs;
                    crcpage::encode(&self.layout, slot, number, generation, page.page_generation, table, out);
                }
            }
        }
        round.cursor += count;
        let bytes = (count * BLOCK) as u64;
        let counters = &mut self.counters;
        let (writes, total) = if is_meta {
            (&mut counters.meta_writes, &mut counters.meta_bytes)
        } else {
            (&mut counters.crc_writes, &mut counters.crc_bytes)
        };
        *writes += 1;
        *total += bytes;
        let id = round.flights.insert(Flight::Pages);
        let bufs = SmallVec::from_iter([buf.freeze()]);
        Some((IoId(id as u32), RoundIo::Write { offset, bufs }))
    }

    /// An operation of the round completed without error.
    ///
    /// # Panics
    /// When there is no such operation.
    pub fn io_done(&mut self, id: IoId) {
        let round = self.round.as_mut();
        let flight = round.and_then(|round| round.flights.try_remove(id.0 as usize));
        let Some(flight) = flight else { panic!("completion of an operation that was not started") };
        if let Flight::Data(range) = flight {
            self.data_done(range);
        }
    }

    fn data_done(&mut self, range: std::ops::Range<usize>) {
        let Some(round) = self.round.as_mut() else { return };
        for captured in &round.blocks[range] {
            let chunk = match self.chunks.get_mut(&captured.slot) {
                Some(chunk) => Some(chunk),
                None => round.orphans.get_mut(&captured.slot),
            };
            if let Some(chunk) = chunk {
                chunk.landed(&mut self.pins, captured.block, captured.index, captured.crc);
            }
            self.pins.release(captured.at);
        }
    }

    /// Once, when the round is over: the indexes that may be checkpointed now. The caller reports each checkpoint with
    /// [`Store::checkpoint_durable`].
    pub fn round_done(&mut self) -> Option<Vec<(CopysetId, u64)>> {
        let over = self.round.as_ref().is_some_and(|r| r.phase == Phase::End && r.flights.is_empty());
        if !over {
            return None;
        }
        let round = self.round.take()?;
        for grave in self.graves.iter_mut().filter(|grave| grave.stage == GraveStage::InRound) {
            grave.stage = GraveStage::Closed;
        }
        self.release_graves();
        // A copyset that was removed, or removed and created again, has nothing to checkpoint.
        let alive = |&(copyset, incarnation, index): &(CopysetId, u64, u64)| {
            let state = self.copysets.get(&copyset)?;
            (state.incarnation == incarnation).then_some((copyset, index))
        };
        Some(round.applied.iter().filter_map(alive).collect())
    }
}
