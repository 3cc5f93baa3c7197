//! A disk of 512-byte sectors that keeps un-synced writes apart, and a driver that runs a store on it.

use super::super::*;
use crate::io::buffer::Arena;
use crate::shard::request::{BlockCrcs, Outcome};
use bytes::Bytes;
use raftlog::{BLOCK, CopysetId};
use rustc_hash::FxHashMap;
use std::collections::BTreeMap;
use std::sync::Arc;

const SECTOR: usize = 512;

/// A small generator, so that a failure is its seed.
pub(super) struct Rng(pub(super) u64);

impl Rng {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }
    pub(super) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

#[derive(Clone, Default)]
pub(super) struct Disk {
    durable: FxHashMap<u64, [u8; SECTOR]>,
    /// Completed or in-flight writes not yet covered by a sync, in order.
    pending: Vec<(u64, Vec<u8>)>,
}

impl Disk {
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        assert!(offset.is_multiple_of(BLOCK as u64) && data.len().is_multiple_of(BLOCK));
        self.pending.push((offset, data.to_vec()));
    }

    pub(super) fn sync(&mut self) {
        for (offset, data) in std::mem::take(&mut self.pending) {
            for (at, sector) in (offset..).step_by(SECTOR).zip(data.chunks_exact(SECTOR)) {
                self.durable.insert(at, sector.try_into().unwrap());
            }
        }
    }

    pub(super) fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        for (at, sector) in (offset..).step_by(SECTOR).zip(out.chunks_exact_mut(SECTOR)) {
            if let Some(data) = self.durable.get(&at) {
                sector.copy_from_slice(data);
            }
        }
        for (start, data) in &self.pending {
            let (from, to) = (offset.max(*start), (offset + len as u64).min(start + data.len() as u64));
            if from < to {
                let source = &data[(from - start) as usize..(to - start) as usize];
                out[(from - offset) as usize..(to - offset) as usize].copy_from_slice(source);
            }
        }
        out
    }

    /// Power is lost: each sector of each un-synced write survives with probability `keep` of 4.
    pub(super) fn crash(&mut self, rng: &mut Rng, keep: u64) {
        for (offset, data) in std::mem::take(&mut self.pending) {
            for (at, sector) in (offset..).step_by(SECTOR).zip(data.chunks_exact(SECTOR)) {
                if rng.below(4) < keep {
                    self.durable.insert(at, sector.try_into().unwrap());
                }
            }
        }
    }

    pub(super) fn flip(&mut self, offset: u64) {
        let sector = offset / SECTOR as u64 * SECTOR as u64;
        self.durable.entry(sector).or_insert([0; SECTOR])[(offset % SECTOR as u64) as usize] ^= 0x10;
    }

    pub(super) fn set(&mut self, offset: u64, byte: u8) {
        let sector = offset / SECTOR as u64 * SECTOR as u64;
        self.durable.entry(sector).or_insert([0; SECTOR])[(offset % SECTOR as u64) as usize] = byte;
    }
}

pub(super) fn layout(size: u64, shards: u16, chunk_size: u32) -> Layout {
    let params = Params {
        uuid: *b"0123456789abcdef",
        size,
        shards,
        chunk_size,
        log_bytes_per_shard: 3 << 16,
        log_segment_size: 1 << 16,
        flags: FLAG_SPARSE,
    };
    Layout::new(&params).unwrap()
}

/// Run a loader to its end.
pub(super) fn load(
    layout: &Layout,
    shard: u16,
    pool: &Arc<ExtentPool>,
    disk: &Disk,
    known: &BTreeMap<CopysetId, Known>,
) -> Result<(Store, LoadReport), LoadError> {
    let config = StoreConfig { write_bytes_max: 32 << 10 };
    let mut loader = Loader::new(layout, shard, Arc::clone(pool), config);
    while let Some((offset, len)) = loader.next_read() {
        assert!(len <= READ_BYTES_MAX);
        loader.feed((offset, len), Ok(&disk.read(offset, len)));
    }
    let (mut store, report) = loader.finish(&|id| known.get(&id).copied())?;
    for (&copyset, &Known { incarnation, .. }) in known {
        if shard_of(copyset, layout.shards) == shard {
            store.add_copyset(copyset, incarnation);
        }
    }
    Ok((store, report))
}

/// A payload whose blocks are all `stamp` and its CRCs.
pub(super) fn payload(stamp: u64, blocks: usize) -> (Bytes, BlockCrcs) {
    let data: Vec<u8> = stamp.to_le_bytes().repeat(blocks * BLOCK / 8);
    let crcs = data.chunks(BLOCK).map(raftlog::crc32c).collect();
    (Bytes::from(data), crcs)
}

/// Carry out one operation of the round; false when none may start.
pub(super) fn start_io(store: &mut Store, disk: &mut Disk, arena: &Arc<Arena>) -> Option<(IoId, bool)> {
    let (id, io) = store.next_io(4, &mut |len| arena.alloc(len))?;
    match io {
        RoundIo::Write { offset, bufs } => {
            disk.write(offset, &bufs.concat());
            Some((id, false))
        }
        RoundIo::Sync => {
            // Only what completed is covered: the store must not have asked for it earlier.
            disk.sync();
            Some((id, true))
        }
    }
}

/// A whole round without interruption; the checkpoints it allows.
pub(super) fn round(store: &mut Store, disk: &mut Disk, applied: &[(CopysetId, u64)]) -> Vec<(CopysetId, u64)> {
    let arena = Arena::new(1 << 20).unwrap();
    if store.begin_round(applied).is_none() {
        return applied.to_vec();
    }
    while let Some((id, _)) = start_io(store, disk, &arena) {
        store.io_done(id);
    }
    store.round_done().expect("all operations are done")
}

/// Read and verify a range as a shard would.
pub(super) fn read(
    store: &Store,
    disk: &Disk,
    copyset: CopysetId,
    chunk: u64,
    offset: u32,
    len: u32,
) -> Result<Vec<u8>, Outcome> {
    let plan = store.read(copyset, chunk, offset, len)?;
    let mut out = Vec::new();
    for piece in &plan.pieces {
        match piece {
            Piece::Memory(bytes) => out.extend_from_slice(bytes),
            Piece::Zeros(n) => out.resize(out.len() + *n as usize, 0),
            Piece::Device { disk_offset, len, first_block } => {
                let data = disk.read(*disk_offset, *len as usize);
                match store.check(&plan.key, *first_block, &data) {
                    Verified::Ok => out.extend_from_slice(&data),
                    Verified::Rot { .. } => return Err(Outcome::CrcFail),
                    Verified::Stale => panic!("nothing ran in between"),
                }
            }
        }
    }
    assert_eq!(out.len(), len as usize);
    Ok(out)
}
