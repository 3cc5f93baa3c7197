//! The CRC page: CRC32Cs of up to 1000 blocks of a slot (format: docs/formats.md, "CRC page"). Pure codec.
//!
//! Two copies, written in turn like metapages. A page counts only with the slot generation of the slot's metapage, so
//! a recycled slot inherits nothing.

use super::layout::Layout;
use super::page::{self, Page, put, u16_at, u32_at, u64_at};
use raftlog::BLOCK;

/// CRCs of one page.
pub(super) const CRCS: usize = 1000;

const MAGIC: u32 = u32::from_le_bytes(*b"CCRC");
const VERSION: u16 = 1;
const CRC_AT: usize = 4;
const BODY_AT: usize = 32;
const _: () = assert!(BODY_AT + 4 * CRCS + 64 == BLOCK);

/// The part of a chunk's CRC table that page `page` holds.
pub(super) fn range(page: u32, table_len: usize) -> std::ops::Range<usize> {
    let first = (page as usize * CRCS).min(table_len);
    first..(first + CRCS).min(table_len)
}

/// Write page number `page` of `slot` with its part of the chunk's CRC table.
pub(super) fn encode(
    layout: &Layout,
    slot: u32,
    page: u32,
    generation: u64,
    page_generation: u64,
    table: &[u32],
    out: &mut [u8],
) {
    out.fill(0);
    put(out, 0, &MAGIC.to_le_bytes());
    put(out, 8, &slot.to_le_bytes());
    put(out, 12, &(page as u16).to_le_bytes());
    put(out, 14, &VERSION.to_le_bytes());
    put(out, 16, &generation.to_le_bytes());
    put(out, 24, &page_generation.to_le_bytes());
    let body = &mut out[BODY_AT..BODY_AT + 4 * CRCS];
    for (bytes, crc) in body.chunks_exact_mut(4).zip(&table[range(page, table.len())]) {
        bytes.copy_from_slice(&crc.to_le_bytes());
    }
    page::seal(out, CRC_AT, layout.seed());
}

/// Copy the CRCs of the page into the chunk's table. Returns its page generation; `None`, and the table untouched, if
/// it is not page `page` of this life of the slot with a page generation above `newer_than`.
pub(super) fn decode(
    layout: &Layout,
    slot: u32,
    page: u32,
    generation: u64,
    newer_than: u64,
    bytes: &Page,
    table: &mut [u32],
) -> Option<u64> {
    let ours = u32_at(bytes, 0) == MAGIC
        && u32_at(bytes, 8) == slot
        && u32::from(u16_at(bytes, 12)) == page
        && u16_at(bytes, 14) == VERSION
        && u64_at(bytes, 16) == generation
        && u64_at(bytes, 24) > newer_than
        && u64_at(bytes, 24) <= page::GENERATION_MAX;
    if !ours || !page::verify(bytes, CRC_AT, layout.seed()) {
        return None;
    }
    let range = range(page, table.len());
    for (crc, from) in table[range].iter_mut().zip(bytes[BODY_AT..].chunks_exact(4)) {
        *crc = from.iter().rev().fold(0, |acc, &b| acc << 8 | u32::from(b));
    }
    Some(u64_at(bytes, 24))
}
