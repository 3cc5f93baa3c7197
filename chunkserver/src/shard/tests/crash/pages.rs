//! A disk looked at as it lies there, before anything is replayed. The reader of pages is written from docs/formats.md.

use super::history::History;
use super::lab::Violation;
use super::medium::{Image, SECTOR};
use crate::chunk::Layout;
use raftlog::{BLOCK, crc32c};

type Page = [u8; BLOCK];

struct Metapage {
    chunk: bool,
    generation: u64,
    id: u64,
    index: u64,
    page: Page,
}

impl Metapage {
    fn says_written(&self, block: u32) -> bool {
        self.page[112 + block as usize / 8] >> (block % 8) & 1 == 1
    }
}

fn u64_at(page: &Page, at: usize) -> u64 {
    u64::from_le_bytes(page[at..at + 8].try_into().unwrap())
}

/// The newer of two copies; both kinds of page have their generation at byte 24.
fn newer(pages: [Option<Page>; 2]) -> Option<Page> {
    pages.into_iter().flatten().max_by_key(|page| u64_at(page, 24))
}

/// An image, and what may be in it.
pub(super) struct Lying<'a> {
    pub(super) layout: &'a Layout,
    pub(super) image: &'a Image,
    pub(super) history: &'a History,
    /// The index up to which the log holds a durable commit.
    pub(super) commit: u64,
}

impl Lying<'_> {
    /// What is wrong with it, if anything is.
    pub(super) fn check(&self) -> Result<(), Violation> {
        (0..self.layout.slot_count).try_for_each(|slot| {
            self.nothing_ahead_of_the_log(slot)?;
            match self.metapage(slot)? {
                Some(meta) if meta.index > self.commit => Err(Violation::AheadOfLog),
                Some(meta) if meta.chunk => self.chunk(slot, &meta),
                _ => Ok(()),
            }
        })
    }

    /// Rule 10: what is in a slot is committed by a durable record.
    fn nothing_ahead_of_the_log(&self, slot: u32) -> Result<(), Violation> {
        for &block in &self.history.blocks {
            for sector in self.read(self.layout.block_offset(slot, block)).chunks(SECTOR) {
                let number = u64::from_le_bytes(sector[..8].try_into().unwrap()) as usize;
                if number > 0 && self.history.index_of(number) > self.commit {
                    return Err(Violation::AheadOfLog);
                }
            }
        }
        Ok(())
    }

    /// What the pages of a slot say is in place.
    fn chunk(&self, slot: u32, meta: &Metapage) -> Result<(), Violation> {
        let state = self.history.at(meta.index);
        let Some(blocks) = state.get(&meta.id) else { return Err(Violation::Wrong) };
        for &block in &self.history.blocks {
            if meta.says_written(block) != blocks.contains_key(&block) {
                return Err(Violation::Wrong);
            }
            let in_place = |first: &usize| self.in_place(slot, meta.id, block, *first);
            // A CRC page may be of the round before the metapage's, or of the one after.
            let crc = self.checksum(slot, meta.generation, block);
            let summed = self.history.writes_of(meta.id, block, 1).find(|n| Some(self.crc_of(*n)) == crc);
            if !blocks.get(&block).is_none_or(in_place) || !summed.as_ref().is_none_or(in_place) {
                return Err(Violation::AheadOfData);
            }
        }
        Ok(())
    }

    fn read(&self, offset: u64) -> Page {
        let mut page = [0; BLOCK];
        self.image.read(offset, &mut page);
        page
    }

    /// A page that verifies.
    fn page(&self, offset: u64, magic: &[u8; 4]) -> Option<Page> {
        let page = self.read(offset);
        let stored = u32::from_le_bytes(page[4..8].try_into().unwrap());
        let mut sealed = page;
        sealed[4..8].copy_from_slice(&crc32c(&self.layout.uuid).to_le_bytes());
        (page[..4] == *magic && crc32c(&sealed) == stored).then_some(page)
    }

    fn metapage(&self, slot: u32) -> Result<Option<Metapage>, Violation> {
        let places = [0, 1].map(|copy| self.layout.metapage_offset(slot, copy));
        let Some(page) = newer(places.map(|at| self.page(at, b"CMPG"))) else {
            // The first page of all goes to copy 1: torn, it leaves copy 0 blank.
            let blank = self.read(places[0]).iter().all(|byte| *byte == 0);
            return if blank { Ok(None) } else { Err(Violation::Rot) };
        };
        let (generation, id, index) = (u64_at(&page, 16), u64_at(&page, 48), u64_at(&page, 64));
        Ok(Some(Metapage { chunk: page[10] == 1, generation, id, index, page }))
    }

    /// The checksum a slot's CRC page has for a block.
    fn checksum(&self, slot: u32, generation: u64, block: u32) -> Option<u32> {
        let places = [0, 1].map(|copy| self.layout.crcpage_offset(slot, block / 1000, copy));
        let own = |page: &Page| u64_at(page, 16) == generation;
        let page = newer(places.map(|at| self.page(at, b"CCRC").filter(own)))?;
        let at = 32 + (block as usize % 1000) * 4;
        Some(u32::from_le_bytes(page[at..at + 4].try_into().unwrap()))
    }

    fn crc_of(&self, number: usize) -> u32 {
        crc32c(&self.history.content(number))
    }

    /// Whether each sector of a block in its slot is as operation `first` or a later one wrote it.
    fn in_place(&self, slot: u32, chunk: u64, block: u32, first: usize) -> bool {
        let bytes = self.read(self.layout.block_offset(slot, block));
        let versions: Vec<Vec<u8>> =
            self.history.writes_of(chunk, block, first).map(|n| self.history.content(n)).collect();
        let mut sectors = bytes.chunks(SECTOR).zip((0..).step_by(SECTOR));
        sectors.all(|(sector, at)| versions.iter().any(|version| version[at..at + SECTOR] == *sector))
    }
}
