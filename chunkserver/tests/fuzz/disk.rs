//! Superblock, metapages and CRC pages: a disk that real stores wrote, changed and sealed again.
//!
//! Checked: loading ends, never panics; what it accepts can be read, written, written back and loaded again.

use crate::engine::{Rng, Target};
use crate::fake;
use bytes::Bytes;
use chunkserver::chunk::{
    ApplyOp, ExtentPool, FLAG_SPARSE, Known, Layout, Loader, Params, Piece, ReadFailed, RoundIo, Store, StoreConfig,
    shard_of,
};
use chunkserver::io::buffer::Arena;
use raftlog::{BLOCK, CopysetId, crc32c};
use std::collections::BTreeMap;
use std::sync::Arc;

const SHARDS: u16 = 2;

fn layout() -> Layout {
    Layout::new(&Params {
        uuid: *b"0123456789abcdef",
        size: 5 << 20,
        shards: SHARDS,
        chunk_size: 64 << 10,
        log_bytes_per_shard: 3 << 16,
        log_segment_size: 1 << 16,
        flags: FLAG_SPARSE,
    })
    .unwrap()
}

/// The metadata and CRC zones.
#[derive(Clone)]
struct Zones {
    meta: Vec<u8>,
    crc: Vec<u8>,
}

impl Zones {
    fn blank(layout: &Layout) -> Self {
        let pairs = layout.slot_count as usize * 2 * BLOCK;
        Self { meta: vec![0; pairs], crc: vec![0; layout.slot_count as usize * layout.crc_bytes_per_slot() as usize] }
    }
    fn at(&mut self, layout: &Layout, offset: u64, len: usize) -> Option<&mut [u8]> {
        let zone = |zone: u64| usize::try_from(offset.checked_sub(zone)?).ok();
        if let Some(at) = zone(layout.crc_offset) {
            return self.crc.get_mut(at..at + len);
        }
        self.meta.get_mut(zone(layout.meta_offset)?..)?.get_mut(..len)
    }
}

/// Known copysets: some of each shard.
fn copysets() -> BTreeMap<CopysetId, Known> {
    (0..6).map(|i| (CopysetId::new(1, i), Known { incarnation: 5, checkpoint: 3, last: 9 })).collect()
}

fn load(
    layout: &Layout,
    zones: &mut Zones,
    known: &BTreeMap<CopysetId, Known>,
    bad: Option<u64>,
) -> Option<(Vec<Store>, Arc<ExtentPool>)> {
    let pool = ExtentPool::new(layout);
    let mut stores = Vec::new();
    for shard in 0..SHARDS {
        let config = StoreConfig { write_bytes_max: 32 << 10 };
        let mut loader = Loader::new(layout, shard, Arc::clone(&pool), config);
        let mut reads = 0;
        while let Some((offset, len)) = loader.next_read() {
            let failed = bad.is_some_and(|at| (offset..offset + len as u64).contains(&at));
            match zones.at(layout, offset, len).filter(|_| !failed) {
                Some(data) => loader.feed((offset, len), Ok(data)),
                None => {
                    assert!(failed, "a read outside the zones: {offset}+{len}");
                    loader.feed((offset, len), Err(ReadFailed));
                }
            }
            reads += 1;
            assert!(reads < 1000, "loading must end");
        }
        let (mut store, _) = loader.finish(&|id| known.get(&id).copied()).ok()?;
        for (&id, known) in known.iter().filter(|(id, _)| shard_of(**id, SHARDS) == shard) {
            store.add_copyset(id, known.incarnation);
        }
        stores.push(store);
    }
    Some((stores, pool))
}

fn write(store: &mut Store, id: CopysetId, index: u64, chunk: u64, offset: u32, blocks: usize) -> bool {
    let payload = Bytes::from(vec![index as u8; blocks * BLOCK]);
    let crcs = payload.chunks(BLOCK).map(crc32c).collect();
    store.apply(id, index, chunk, ApplyOp::Write { sn: 1, offset, payload, crcs }, index).is_ok()
}

/// A whole round; pages go to the zones, data nowhere.
fn round(store: &mut Store, layout: &Layout, zones: &mut Zones, arena: &Arc<Arena>, applied: &[(CopysetId, u64)]) {
    if store.begin_round(applied).is_none() {
        return;
    }
    for _ in 0..10_000 {
        let Some((id, io)) = store.next_io(4, &mut |len| arena.alloc(len)) else { break };
        if let RoundIo::Write { offset, bufs } = io {
            let bytes = bufs.concat();
            assert!(offset + bytes.len() as u64 <= layout.size, "a write beyond the disk");
            if offset < layout.slots_offset {
                zones.at(layout, offset, bytes.len()).expect("pages go to their zones").copy_from_slice(&bytes);
            }
        }
        store.io_done(id);
    }
    for (id, index) in store.round_done().expect("all is done") {
        store.checkpoint_durable(id, index);
    }
}

pub(crate) struct Loads {
    layout: Layout,
    images: Vec<Zones>,
    known: BTreeMap<CopysetId, Known>,
    arena: Arc<Arena>,
    seed: u32,
}

impl Loads {
    pub(crate) fn new() -> Self {
        let (layout, known) = (layout(), copysets());
        assert!(layout.slot_count >= 16, "{layout:?}");
        let arena = Arena::new(1 << 20).unwrap();
        let images = (0..12).map(|seed| Self::image(&layout, &known, &arena, seed)).collect();
        let seed = crc32c(&layout.uuid);
        Self { layout, images, known, arena, seed }
    }

    /// Lives of stores on one disk.
    fn image(layout: &Layout, known: &BTreeMap<CopysetId, Known>, arena: &Arc<Arena>, seed: u64) -> Zones {
        let mut rng = Rng::of(seed, 3);
        let mut zones = Zones::blank(layout);
        let (mut stores, _) = load(layout, &mut zones, known, None).unwrap();
        stores.iter_mut().for_each(Store::replay_done);
        for index in 4..4 + 12 * (1 + seed) {
            let id = CopysetId::new(1, rng.below(6) as u32);
            let store = &mut stores[usize::from(shard_of(id, SHARDS))];
            let chunk = rng.below(3) as u64;
            match rng.below(6) {
                0 => store.apply(id, index, chunk, ApplyOp::Delete, index).unwrap(),
                1 => store.apply(id, index, chunk, ApplyOp::Zero { offset: 0, len: 8192 }, index).unwrap(),
                _ if store.chunk_count() + 1 < u64::from(layout.slot_count) / 2 => {
                    write(store, id, index, chunk, 4096 * rng.below(14) as u32, 1 + rng.below(2));
                }
                _ => {}
            }
            if rng.one_in(5) {
                let shard = stores.iter().position(|s| s.oldest_dirty_ns().is_some()).unwrap_or(0);
                let own: Vec<_> = known
                    .keys()
                    .filter(|id| usize::from(shard_of(**id, SHARDS)) == shard)
                    .map(|&id| (id, index))
                    .collect();
                let applied = if rng.one_in(2) { &own[..] } else { &[] };
                round(&mut stores[shard], layout, &mut zones, arena, applied);
            }
        }
        zones
    }

    /// Makes a page's CRC right.
    fn seal(page: &mut [u8], seed: u32) {
        page[4..8].copy_from_slice(&seed.to_le_bytes());
        let crc = crc32c(page);
        page[4..8].copy_from_slice(&crc.to_le_bytes());
    }

    fn mutate(&self, zones: &mut Zones, rng: &mut Rng) {
        for _ in 0..1 + rng.below(5) {
            let zone = if rng.one_in(4) { &mut zones.crc } else { &mut zones.meta };
            let pages = zone.len() / BLOCK;
            let used: Vec<usize> = (0..pages).filter(|p| zone[p * BLOCK] != 0).collect();
            let Some(&page) = (!used.is_empty()).then(|| rng.pick(&used)) else { continue };
            if rng.one_in(6) {
                let to = rng.below(pages);
                zone.copy_within(page * BLOCK..(page + 1) * BLOCK, to * BLOCK);
                if rng.one_in(2) {
                    let bytes = &mut zone[to * BLOCK..(to + 1) * BLOCK];
                    // Said to belong there.
                    bytes[12..16].copy_from_slice(&(to as u32 / 2).to_le_bytes());
                    bytes[24] = bytes[24] & 0xfe | (to & 1) as u8;
                    Self::seal(bytes, self.seed);
                }
                continue;
            }
            let bytes = &mut zone[page * BLOCK..(page + 1) * BLOCK];
            match rng.below(8) {
                0 => bytes[rng.below(BLOCK)] ^= 1 << rng.below(8),
                1 => bytes[rng.below(8) * 512..][..512].fill(0),
                2 => bytes[112 + rng.below(1024)] = rng.next() as u8,
                3 => {
                    // Whose chunk: another of the known copysets, or of the chunk ids in use.
                    bytes[32..40].copy_from_slice(&CopysetId::new(1, rng.below(7) as u32).0.to_le_bytes());
                    bytes[48..56].copy_from_slice(&(rng.below(4) as u64).to_le_bytes());
                }
                4 => bytes[10] ^= 1,
                _ => {
                    let fields = [8, 10, 12, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 92, 94, 96, 104];
                    crate::mutate::number(bytes, *rng.pick(&fields), rng);
                }
            }
            if !rng.one_in(5) {
                Self::seal(bytes, self.seed);
            }
        }
    }

    fn use_all(&self, stores: &mut [Store], zones: &mut Zones, rng: &mut Rng) {
        for &id in self.known.keys() {
            let shard = shard_of(id, SHARDS);
            let store = &mut stores[usize::from(shard)];
            for chunk in 0..5 {
                let _ = store.info(id, chunk);
                let Ok(plan) = store.read(id, chunk, 0, self.layout.chunk_size) else { continue };
                let mut total = 0;
                for piece in &plan.pieces {
                    total += match piece {
                        Piece::Memory(bytes) => bytes.len() as u32,
                        Piece::Zeros(len) => *len,
                        Piece::Device { disk_offset, len, first_block } => {
                            assert!(*disk_offset >= self.layout.slots_offset);
                            assert!(disk_offset + u64::from(*len) <= self.layout.size);
                            let _ = store.check(&plan.key, *first_block, &fake::zeros(*len as usize)[0]);
                            *len
                        }
                    };
                }
                assert_eq!(total, self.layout.chunk_size);
            }
            // Replay: what the log holds behind the checkpoint.
            for index in 4..7 {
                let chunk = rng.below(5) as u64;
                match rng.below(5) {
                    0 => drop(store.apply(id, index, chunk, ApplyOp::Delete, index)),
                    1 => drop(store.apply(id, index, chunk, ApplyOp::Zero { offset: 4096, len: 4096 }, index)),
                    _ => drop(write(store, id, index, chunk, 4096 * rng.below(15) as u32, 1)),
                }
            }
        }
        stores.iter_mut().for_each(Store::replay_done);
        for (shard, store) in stores.iter_mut().enumerate() {
            let own = self.known.keys().filter(|id| usize::from(shard_of(**id, SHARDS)) == shard);
            let applied: Vec<_> = own.map(|&id| (id, 6)).collect();
            round(store, &self.layout, zones, &self.arena, &applied);
            if rng.one_in(4) {
                applied.iter().for_each(|&(id, _)| store.remove_copyset(id));
                round(store, &self.layout, zones, &self.arena, &[]);
            }
        }
    }
}

impl Target for Loads {
    fn input(&mut self, rng: &mut Rng) -> bool {
        let mut zones = rng.pick(&self.images).clone();
        self.mutate(&mut zones, rng);
        let bad = rng.one_in(8).then(|| {
            let zone = if rng.one_in(3) { self.layout.crc_offset } else { self.layout.meta_offset };
            zone + (rng.below(self.layout.slot_count as usize * 2) * BLOCK) as u64
        });
        let Some((mut stores, _)) = load(&self.layout, &mut zones, &self.known, bad) else { return false };
        self.use_all(&mut stores, &mut zones, rng);
        drop(stores);
        let again = load(&self.layout, &mut zones, &self.known, None);
        assert!(again.is_some() || bad.is_some(), "what loaded once loads again");
        assert_eq!(self.arena.free_bytes(), self.arena.size());
        true
    }
}

/// The first two blocks of disks.
pub(crate) struct Superblocks(Vec<Layout>);

impl Superblocks {
    pub(crate) fn new() -> Self {
        let params = |size: u64, shards, chunk_size, log: u64, segment| Params {
            uuid: [7; 16],
            size,
            shards,
            chunk_size,
            log_bytes_per_shard: log,
            log_segment_size: segment,
            flags: FLAG_SPARSE,
        };
        let all = [
            params(6 << 20, 2, 64 << 10, 3 << 16, 1 << 16),
            params(1 << 40, 8, 16 << 20, 512 << 20, 32 << 20),
            params(64 << 30, 256, 1 << 20, 64 << 20, 1 << 20),
        ];
        Self(all.iter().map(|params| Layout::new(params).unwrap()).collect())
    }
}

fn seal_superblock(page: &mut [u8]) {
    let seed = crc32c(&page[16..32]);
    page[12..16].copy_from_slice(&seed.to_le_bytes());
    let crc = crc32c(page);
    page[12..16].copy_from_slice(&crc.to_le_bytes());
}

impl Target for Superblocks {
    fn input(&mut self, rng: &mut Rng) -> bool {
        let layout = rng.pick(&self.0);
        let mut head = [layout.encode(), layout.encode()].concat();
        for _ in 0..rng.below(5) {
            let copy = rng.below(2) * BLOCK;
            match rng.below(4) {
                0 => head[copy + rng.below(136)] ^= 1 << rng.below(8),
                1 => head[copy + rng.below(BLOCK)] ^= 1 << rng.below(8),
                _ => {
                    let fields = [0, 8, 16, 32, 40, 44, 48, 52, 54, 56, 64, 72, 76, 80, 88, 96, 104, 112];
                    let at = copy + *rng.pick(&fields);
                    crate::mutate::number(&mut head, at, rng);
                }
            }
            if !rng.one_in(3) {
                seal_superblock(&mut head[copy..copy + BLOCK]);
            }
            if rng.one_in(2) {
                head.copy_within(copy..copy + BLOCK, BLOCK - copy);
            }
        }
        let cut = if rng.one_in(20) { rng.below(head.len()) } else { head.len() };
        let size = if rng.one_in(8) { rng.number(layout.size) } else { layout.size };
        // The disk may have any size: try the one the superblock says, too.
        let said = u64::from_le_bytes(head[32..40].try_into().unwrap());
        let mut taken = false;
        for size in [size, said] {
            let Ok(found) = Layout::decode(&head[..cut], size) else { continue };
            let page = found.encode();
            assert!(head[..BLOCK] == page || head[BLOCK..2 * BLOCK] == page, "it says what was there");
            assert!(found.block_offset(found.slot_count - 1, found.blocks() - 1) < found.size);
            assert!(found.extent_range(found.extents() - 1).end == found.slot_count);
            assert!(found.log_offset_of(found.shards) <= found.meta_offset);
            assert!(found.metapage_offset(found.slot_count - 1, 1) < found.crc_offset);
            taken = true;
            assert!(found.crcpage_offset(found.slot_count - 1, found.crc_pages() - 1, 1) < found.slots_offset);
        }
        taken
    }
}
