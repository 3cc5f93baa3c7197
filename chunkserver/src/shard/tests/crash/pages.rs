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

fn u64_at(page: &Page, at: usize) -> u64 {
    u64::from_le_bytes(page[at..at + 8].try_into().unwrap())
}

/// A page that verifies.
fn page(layout: &Layout, image: &Image, offset: u64, magic: &[u8; 4]) -> Option<Page> {
    let mut page = [0; BLOCK];
    image.read(offset, &mut page);
    let stored = u32::from_le_bytes(page[4..8].try_into().unwrap());
    let mut sealed = page;
    sealed[4..8].copy_from_slice(&crc32c(&layout.uuid).to_le_bytes());
    (page[..4] == *magic && crc32c(&sealed) == stored).then_some(page)
}

fn is_blank(image: &Image, offset: u64) -> bool {
    let mut page = [0; BLOCK];
    image.read(offset, &mut page);
    page.iter().all(|b| *b == 0)
}

/// The newer of two copies, by the generation at byte 24 (metapage) or 24 (CRC page).
fn newer(pages: [Option<Page>; 2]) -> Option<Page> {
    pages.into_iter().flatten().max_by_key(|page| u64_at(page, 24))
}

fn metapage(layout: &Layout, image: &Image, slot: u32) -> Result<Option<Metapage>, Violation> {
    let places = [0, 1].map(|copy| layout.metapage_offset(slot, copy));
    let Some(page) = newer(places.map(|at| page(layout, image, at, b"CMPG"))) else {
        // The first page of all goes to copy 1: torn, it leaves copy 0 blank.
        return if is_blank(image, places[0]) { Ok(None) } else { Err(Violation::Rot) };
    };
    let (generation, id, index) = (u64_at(&page, 16), u64_at(&page, 48), u64_at(&page, 64));
    Ok(Some(Metapage { chunk: page[10] == 1, generation, id, index, page }))
}

/// The checksum a slot's CRC page has for a block.
fn checksum(layout: &Layout, image: &Image, slot: u32, generation: u64, block: u32) -> Option<u32> {
    let places = [0, 1].map(|copy| layout.crcpage_offset(slot, block / 1000, copy));
    let own = |page: &Page| u64_at(page, 16) == generation;
    let page = newer(places.map(|at| page(layout, image, at, b"CCRC").filter(own)))?;
    let at = 32 + (block as usize % 1000) * 4;
    Some(u32::from_le_bytes(page[at..at + 4].try_into().unwrap()))
}

/// Whether each sector of a block in its slot is as operation `first` or a later one wrote it.
fn in_place(layout: &Layout, image: &Image, history: &History, slot: u32, chunk: u64, block: u32, first: usize) -> bool {
    let mut bytes = [0; BLOCK];
    image.read(layout.block_offset(slot, block), &mut bytes);
    let versions: Vec<Vec<u8>> = history.writes_of(chunk, block, first).map(|n| history.content(n)).collect();
    bytes.chunks(SECTOR).zip((0..).step_by(SECTOR)).all(|(s, at)| versions.iter().any(|v| v[at..at + SECTOR] == *s))
}

/// `commit`: what the log holds as committed.
pub(super) fn check(layout: &Layout, image: &Image, history: &History, commit: u64) -> Result<(), Violation> {
    for slot in 0..layout.slot_count {
        nothing_ahead_of_the_log(layout, image, history, slot, commit)?;
        let Some(meta) = metapage(layout, image, slot)? else { continue };
        if meta.index > commit {
            return Err(Violation::AheadOfLog);
        }
        if !meta.chunk {
            continue;
        }
        let state = history.at(meta.index);
        let Some(blocks) = state.get(&meta.id) else { return Err(Violation::Wrong) };
        for &block in &history.blocks {
            let in_place = |first| in_place(layout, image, history, slot, meta.id, block, first);
            let written = meta.page[112 + block as usize / 8] >> (block % 8) & 1 == 1;
            if written != blocks.contains_key(&block) {
                return Err(Violation::Wrong);
            }
            if blocks.get(&block).is_some_and(|number| !in_place(*number)) {
                return Err(Violation::AheadOfData);
            }
            // A CRC page may be of the round before the metapage's, or of the one after.
            let Some(crc) = checksum(layout, image, slot, meta.generation, block) else { continue };
            let of = history.writes_of(meta.id, block, 1).find(|n| crc32c(&history.content(*n)) == crc);
            if of.is_some_and(|number| !in_place(number)) {
                return Err(Violation::AheadOfData);
            }
        }
    }
    Ok(())
}

/// Rule 10: what is in a slot is committed by a durable record.
fn nothing_ahead_of_the_log(
    layout: &Layout,
    image: &Image,
    history: &History,
    slot: u32,
    commit: u64,
) -> Result<(), Violation> {
    for &block in &history.blocks {
        let mut bytes = [0; BLOCK];
        image.read(layout.block_offset(slot, block), &mut bytes);
        for sector in bytes.chunks(SECTOR) {
            let number = u64::from_le_bytes(sector[..8].try_into().unwrap()) as usize;
            if number > 0 && history.index_of(number) > commit {
                return Err(Violation::AheadOfLog);
            }
        }
    }
    Ok(())
}
