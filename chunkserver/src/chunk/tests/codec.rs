//! The formats: golden hashes, hostile bytes, refusals.

use super::super::layout::{FLAG_SPARSE, Layout, LayoutError, Params, SuperblockError};
use super::super::meta::{
    self, ChunkMeta, ChunkSnapshot, CloneMeta, Content, LOCATION_INLINE_MAX, MetaError, Tombstone,
};
use super::super::{Bitmap, Metapage, crcpage, page, shard_of};
use super::disk::layout;
use proptest::prelude::*;
use raftlog::{BLOCK, CopysetId};

fn params() -> Params {
    Params {
        uuid: *b"an-identity-1234",
        size: 64 << 20,
        shards: 2,
        chunk_size: 1 << 20,
        log_bytes_per_shard: 4 << 20,
        log_segment_size: 1 << 20,
        flags: 0,
    }
}

fn two(block: [u8; BLOCK]) -> Vec<u8> {
    [block, block].concat()
}

fn full_chunk(layout: &Layout) -> ChunkMeta {
    let mut written = Bitmap::new(layout.blocks());
    let mut present = Bitmap::new(layout.blocks());
    for bit in [0, 1, 5, layout.blocks() - 1] {
        written.set(bit);
        present.set(bit);
    }
    ChunkMeta {
        copyset: CopysetId::new(3, 17),
        incarnation: 0x1111,
        chunk: 0x2222,
        created_index: 0x3333,
        applied_index: 0x4444,
        whole_at: 0,
        sn: 0x5555,
        corrected_sn: 0x6666,
        snapshot: Some(ChunkSnapshot { slot: 1, sn: 0x7777 }),
        fence: 0x8888,
        written,
        clone: Some(CloneMeta { location: b"/clone/source:16777216@cs".to_vec(), present }),
    }
}

fn encode(layout: &Layout, slot: u32, content: &Content) -> [u8; BLOCK] {
    let mut out = [0xee; BLOCK];
    meta::encode(layout, slot, 5, 6, content, &mut out);
    out
}

/// A changed hash is a changed format: it needs a new version, not a new hash.
#[test]
fn golden_hashes() {
    let small = Layout::new(&params()).unwrap();
    assert_eq!(raftlog::crc32c(&small.encode()), GOLDEN_SUPERBLOCK);
    let chunk = encode(&small, 2, &Content::Chunk(full_chunk(&small)));
    assert_eq!(raftlog::crc32c(&chunk), GOLDEN_METAPAGE);
    let tomb = Tombstone { copyset: CopysetId(9), incarnation: 8, chunk: 7, created_index: 6, deleted_index: 5 };
    let tomb = encode(&small, 2, &Content::Tombstone(tomb));
    assert_eq!(raftlog::crc32c(&tomb), GOLDEN_TOMBSTONE);
    let table: Vec<u32> = (0..4096u32).map(|n| n.wrapping_mul(0x9e37_79b9)).collect();
    let mut out = [0; BLOCK];
    crcpage::encode(&layout(1 << 30, 1, 16 << 20), 3, 4, 5, 6, &table, &mut out);
    assert_eq!(raftlog::crc32c(&out), GOLDEN_CRC_PAGE);
    let shards: Vec<u16> = (0..8).map(|n| shard_of(CopysetId::new(1, n), 3)).collect();
    assert_eq!(shards, GOLDEN_SHARDS);
}

const GOLDEN_SUPERBLOCK: u32 = 0xe035_77e3;
const GOLDEN_METAPAGE: u32 = 0x099e_deea;
const GOLDEN_TOMBSTONE: u32 = 0x39ad_4483;
const GOLDEN_CRC_PAGE: u32 = 0x8995_e1ba;
const GOLDEN_SHARDS: [u16; 8] = [2, 0, 2, 1, 1, 0, 0, 0];

#[test]
fn layouts_of_all_sizes_are_disjoint_and_fit() {
    let mut cases = vec![params()];
    for shards in [1, 2, 7, 64] {
        for (size, chunk_size) in [(64 << 20, 64 << 10), (4 << 30, 16 << 20), (1 << 40, 16 << 20), (30 << 40, 16 << 20)]
        {
            let segment = if size < 1 << 30 { 64 << 10 } else { 1 << 20 };
            cases.push(Params {
                size: size + 511,
                shards,
                chunk_size,
                log_segment_size: segment,
                log_bytes_per_shard: 4 * segment,
                ..params()
            });
        }
    }
    for p in cases {
        let l = Layout::new(&p).unwrap();
        assert!(l.slot_count >= u32::from(p.shards));
        assert!(l.log_offset_of(p.shards) <= l.meta_offset);
        assert!(l.metapage_offset(l.slot_count - 1, 1) + 4096 <= l.crc_offset);
        assert!(l.crcpage_offset(l.slot_count - 1, l.crc_pages() - 1, 1) + 4096 <= l.slots_offset);
        assert!(l.block_offset(l.slot_count, 0) <= p.size);
        assert_eq!((0..l.extents()).map(|e| l.extent_range(e).len() as u32).sum::<u32>(), l.slot_count);
        assert!(l.extents() >= u32::from(p.shards), "every shard can have an extent");
        let wasted = p.size - l.block_offset(l.slot_count, 0);
        assert!(wasted < u64::from(p.chunk_size) + (4 << 20), "{wasted} bytes unused");
        assert_eq!(Layout::decode(&two(l.encode()), p.size), Ok(l));
    }
}

#[test]
fn impossible_layouts_are_refused() {
    let refuse = |change: fn(&mut Params)| {
        let mut p = params();
        change(&mut p);
        Layout::new(&p).unwrap_err()
    };
    assert!(matches!(refuse(|p| p.size = 9 << 20), LayoutError::TooSmall { .. }));
    assert_eq!(refuse(|p| p.shards = 0), LayoutError::Shards(0));
    assert_eq!(refuse(|p| p.chunk_size = 3 << 20), LayoutError::ChunkSize(3 << 20));
    assert_eq!(refuse(|p| p.chunk_size = 32 << 20), LayoutError::ChunkSize(32 << 20));
    assert!(matches!(refuse(|p| p.log_bytes_per_shard += 4096), LayoutError::Log { .. }));
    assert!(matches!(refuse(|p| p.log_segment_size = 0), LayoutError::Log { .. }));
    assert_eq!(refuse(|p| p.flags = 2), LayoutError::Flags(2));
    assert_eq!(refuse(|p| p.size = u64::MAX), LayoutError::TooLarge(u64::MAX));
}

#[test]
fn superblocks_are_told_apart() {
    let l = Layout::new(&params()).unwrap();
    let size = params().size;
    let good = l.encode();
    assert_eq!(Layout::decode(&[0; 2 * BLOCK], size), Err(SuperblockError::Blank));
    assert_eq!(Layout::decode(&[7; 2 * BLOCK], size), Err(SuperblockError::Foreign));
    assert_eq!(Layout::decode(&good, size), Err(SuperblockError::Blank), "too short");
    let mut torn = two(good);
    torn[512..4096].fill(0);
    torn[40] ^= 1;
    assert_eq!(Layout::decode(&torn, size).as_ref(), Ok(&l), "one copy is enough");
    torn[4096 + 100] ^= 1;
    assert_eq!(Layout::decode(&torn, size), Err(SuperblockError::Corrupt));
    let mut newer = two(good);
    newer[8] = 2;
    newer[4096 + 8] = 2;
    assert_eq!(Layout::decode(&newer, size), Err(SuperblockError::Newer(2)));
    let grown = SuperblockError::WrongSize { formatted: size, actual: size + 4096 };
    assert_eq!(Layout::decode(&two(good), size + 4096), Err(grown));
    assert_eq!(Layout::decode(&two(good), size + 511).as_ref(), Ok(&l));
    let mut other = good;
    page::put(&mut other, 72, &1u32.to_le_bytes());
    page::seal(&mut other, 12, page::seed_of(&l.uuid));
    assert!(matches!(Layout::decode(&two(other), size), Err(SuperblockError::Invalid(_))));
}

#[test]
fn metapages_round_trip() {
    let l = Layout::new(&Params { flags: FLAG_SPARSE, ..params() }).unwrap();
    let mut longest = full_chunk(&l);
    longest.clone.as_mut().unwrap().location = vec![b'x'; LOCATION_INLINE_MAX];
    longest.whole_at = 0x4445_4647_4849_4a4b;
    let tomb = Tombstone { copyset: CopysetId(9), incarnation: 8, chunk: 7, created_index: 6, deleted_index: 5 };
    for content in [Content::Chunk(full_chunk(&l)), Content::Chunk(longest), Content::Tombstone(tomb)] {
        let bytes = encode(&l, 2, &content);
        let page = Metapage { slot: 2, generation: 5, page: 6, content };
        assert_eq!(meta::decode(&l, 2, &bytes), Ok(page));
        assert_eq!(meta::decode(&l, 3, &bytes), Err(MetaError::Misplaced(2)));
        let reformatted = Layout::new(&Params { uuid: [1; 16], ..params() }).unwrap();
        assert_eq!(meta::decode(&reformatted, 2, &bytes), Err(MetaError::Corrupt), "another disk's page");
    }
    assert_eq!(meta::decode(&l, 0, &[0; BLOCK]), Err(MetaError::Blank));
    let mut newer = encode(&l, 2, &Content::Tombstone(tomb));
    newer[8] = 2;
    page::seal(&mut newer, 4, l.seed());
    assert_eq!(meta::decode(&l, 2, &newer), Err(MetaError::Newer(2)));
}

proptest! {
    /// Whatever is on the disk, even with a right checksum, is refused or understood, never fatal.
    #[test]
    fn hostile_metapages(
        flips in prop::collection::vec((0usize..BLOCK, any::<u8>()), 0..40),
        sealed in any::<bool>(),
    ) {
        let l = Layout::new(&params()).unwrap();
        let mut bytes = encode(&l, 2, &Content::Chunk(full_chunk(&l)));
        let good = bytes;
        for (at, value) in flips {
            bytes[at % if sealed { 1700 } else { BLOCK }] = value;
        }
        if sealed {
            page::seal(&mut bytes, 4, l.seed());
        }
        match meta::decode(&l, 2, &bytes) {
            Ok(found) => {
                prop_assert!(sealed || bytes == good);
                let mut again = [0; BLOCK];
                meta::encode(&l, 2, found.generation, found.page, &found.content, &mut again);
                prop_assert_eq!(meta::decode(&l, 2, &again), Ok(found));
            }
            Err(_) => prop_assert!(bytes != good),
        }
        let mut table = vec![0; 256];
        let known = crcpage::decode(&l, 2, 0, 5, 0, &bytes, &mut table);
        prop_assert_eq!(known, None);
    }

    #[test]
    fn hostile_superblocks(
        flips in prop::collection::vec((0usize..140, any::<u8>()), 0..8),
        sealed in any::<bool>(),
        size in any::<u64>(),
    ) {
        let mut bytes = Layout::new(&params()).unwrap().encode();
        for (at, value) in flips {
            bytes[at] = value;
        }
        if sealed {
            let seed = page::seed_of(&page::bytes_at(&bytes, 16));
            page::seal(&mut bytes, 12, seed);
        }
        let _ = Layout::decode(&two(bytes), size);
        if let Ok(found) = Layout::decode(&two(bytes), params().size) {
            prop_assert_eq!(&found.encode()[..], &bytes[..]);
        }
    }

    #[test]
    fn crc_pages_round_trip(slot in 0u32..60, generation: u64, page_generation in 1u64..=page::GENERATION_MAX, stale in 0u64..3) {
        let l = layout(2 << 30, 1, 16 << 20);
        let table: Vec<u32> = (0..4096u32).map(|n| n ^ slot).collect();
        let mut bytes = [0; BLOCK];
        let mut back = vec![0u32; 4096];
        for number in 0..l.crc_pages() {
            crcpage::encode(&l, slot, number, generation, page_generation, &table, &mut bytes);
            let other = generation.wrapping_add(1);
            prop_assert_eq!(crcpage::decode(&l, slot, number, other, 0, &bytes, &mut back), None);
            let floor = page_generation.saturating_add(stale);
            prop_assert_eq!(crcpage::decode(&l, slot, number, generation, floor, &bytes, &mut back), None);
            let newer = page_generation - 1;
            let found = crcpage::decode(&l, slot, number, generation, newer, &bytes, &mut back);
            prop_assert_eq!(found, Some(page_generation));
        }
        prop_assert_eq!(back, table);
    }
}

#[test]
fn absurd_generations_are_refused() {
    let layout = Layout::new(&params()).unwrap();
    let content = Content::Chunk(full_chunk(&layout));
    for (generation, number) in [(u64::MAX, 6), (5, u64::MAX), (page::GENERATION_MAX + 1, 6)] {
        let mut out = [0; BLOCK];
        meta::encode(&layout, 2, generation, number, &content, &mut out);
        assert_eq!(meta::decode(&layout, 2, &out), Err(MetaError::Invalid("generation")));
    }
    let (mut out, mut table) = ([0; BLOCK], vec![0; layout.blocks() as usize]);
    crcpage::encode(&layout, 2, 0, 5, u64::MAX, &table, &mut out);
    assert_eq!(crcpage::decode(&layout, 2, 0, 5, 0, &out, &mut table), None);
}

#[test]
fn the_checksum_is_crc32c_of_page_with_seed() {
    let l = Layout::new(&params()).unwrap();
    let mut bytes = encode(&l, 2, &Content::Chunk(full_chunk(&l)));
    let stored = bytes[4..8].to_vec();
    bytes[4..8].copy_from_slice(&crc32c::crc32c(&l.uuid).to_le_bytes());
    assert_eq!(stored, crc32c::crc32c(&bytes).to_le_bytes(), "a second implementation agrees");
}

#[test]
fn copysets_spread_evenly() {
    for shards in [1u16, 2, 3, 8, 64] {
        let mut count = vec![0u32; usize::from(shards)];
        for id in 0..6400 {
            count[usize::from(shard_of(CopysetId::new(1, id), shards))] += 1;
        }
        let expected = 6400 / u32::from(shards);
        assert!(count.iter().all(|&n| n > expected / 2 && n < expected * 2), "{count:?}");
    }
}
