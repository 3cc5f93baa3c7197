//! What all pages of ours on disk share: little-endian fields at constant offsets and a CRC32C that is bound to the
//! disk.
//!
//! The CRC of a page covers the whole page with its own field set to the disk's *seed* (CRC32C of the disk's uuid). A
//! page of another disk, or of the life before a re-format, therefore never verifies.

use raftlog::BLOCK;

/// One page: 4 KiB.
pub(super) type Page = [u8; BLOCK];

/// Generations count from 0 by ones; a larger one was never reached by counting, and must not be counted on from.
pub(super) const GENERATION_MAX: u64 = 1 << 62;

/// View `data` as one page; `None` for any other length.
pub(super) fn page(data: &[u8]) -> Option<&Page> {
    data.try_into().ok()
}

/// True when nothing was ever written here.
pub(super) fn is_blank(page: &Page) -> bool {
    // By 64 bytes, so that the compiler makes vector instructions of it: start-up asks this of whole zones.
    page.as_chunks::<64>().0.iter().all(|bytes| bytes.iter().fold(0, |all, byte| all | byte) == 0)
}

pub(super) fn u16_at(page: &Page, at: usize) -> u16 {
    u16::from_le_bytes(bytes_at(page, at))
}
pub(super) fn u32_at(page: &Page, at: usize) -> u32 {
    u32::from_le_bytes(bytes_at(page, at))
}
pub(super) fn u64_at(page: &Page, at: usize) -> u64 {
    u64::from_le_bytes(bytes_at(page, at))
}

/// `N` bytes at a constant offset (never one that was read from disk).
pub(super) fn bytes_at<const N: usize>(page: &Page, at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&page[at..at + N]);
    out
}

pub(super) fn put(page: &mut [u8], at: usize, bytes: &[u8]) {
    page[at..at + bytes.len()].copy_from_slice(bytes);
}

/// The seed of a disk's page CRCs.
pub(super) fn seed_of(uuid: &[u8; 16]) -> u32 {
    raftlog::crc32c(uuid)
}

fn crc(page: &[u8], crc_at: usize, seed: u32) -> u32 {
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    digest.update(&page[..crc_at]);
    digest.update(&seed.to_le_bytes());
    digest.update(&page[crc_at + 4..]);
    digest.finalize() as u32
}

/// Store the page's CRC at `crc_at`. The last change to a page before it is written.
pub(super) fn seal(page: &mut [u8], crc_at: usize, seed: u32) {
    assert!(page.len() == BLOCK, "a page is one block");
    let crc = crc(page, crc_at, seed);
    put(page, crc_at, &crc.to_le_bytes());
}

/// Whether the CRC at `crc_at` is right for this disk.
pub(super) fn verify(page: &Page, crc_at: usize, seed: u32) -> bool {
    u32_at(page, crc_at) == crc(page, crc_at, seed)
}
