//! Shards that load a disk side by side: in any order of their reads they find what each would find alone.

use super::super::*;
use super::disk::{Disk, Rng, layout, load, payload, round};
use crate::shard::request::Outcome;
use raftlog::{BLOCK, CopysetId};
use std::collections::BTreeMap;
use std::sync::Arc;

const SHARDS: u16 = 2;
const CHUNK: u32 = 64 << 10;

/// A disk whose slots are half used, by copysets of both shards, and partly rotten.
fn disk(layout: &Layout, known: &BTreeMap<CopysetId, Known>) -> Disk {
    let mut disk = Disk::default();
    let pool = ExtentPool::new(layout);
    let load = |shard| load(layout, shard, &pool, &disk, known).unwrap().0;
    let mut stores: Vec<Store> = (0..SHARDS).map(load).collect();
    stores.iter_mut().for_each(Store::replay_done);
    for n in 0..u64::from(layout.slot_count) / 2 {
        for &copyset in known.keys() {
            let (payload, crcs) = payload(n + 1, 1);
            let op = ApplyOp::Write { sn: 1, offset: 0, payload, crcs };
            let store = &mut stores[usize::from(shard_of(copyset, SHARDS))];
            store.apply(copyset, n + 1, n / 4, op, 0).unwrap();
        }
    }
    for (shard, store) in (0..).zip(&mut stores) {
        let own = known.keys().filter(|id| shard_of(**id, SHARDS) == shard);
        round(store, &mut disk, &own.map(|&id| (id, u64::from(layout.slot_count))).collect::<Vec<_>>());
    }
    disk.flip(layout.metapage_offset(0, 0));
    disk.flip(layout.metapage_offset(0, 1));
    disk
}

#[test]
fn in_any_order_shards_read_each_metapage_once_and_find_what_they_would_alone() {
    let layout = layout((8 << 20) + 400 * u64::from(CHUNK), SHARDS, CHUNK);
    let ids = (0..SHARDS).map(|shard| (1..).map(CopysetId).find(|&id| shard_of(id, SHARDS) == shard).unwrap());
    let known: BTreeMap<_, _> =
        ids.map(|id| (id, Known { incarnation: 1, checkpoint: 1 << 20, last: 1 << 40 })).collect();
    let disk = disk(&layout, &known);
    let pool = ExtentPool::new(&layout);
    let alone: Vec<LoadReport> = (0..SHARDS).map(|s| load(&layout, s, &pool, &disk, &known).unwrap().1).collect();
    assert!(alone.iter().all(|report| report.chunks > 20), "{alone:?}");
    assert!(alone.iter().any(|report| report.torn + report.quarantined > 0), "{alone:?}");

    for seed in 0..50 {
        let mut rng = Rng(seed);
        let pool = ExtentPool::new(&layout);
        let new = |shard| Loader::new(&layout, shard, Arc::clone(&pool), StoreConfig::default());
        let mut loaders: Vec<Loader> = (0..SHARDS).map(new).collect();
        let mut flights: Vec<(usize, (u64, usize))> = Vec::new();
        let mut blocks: BTreeMap<u64, u32> = BTreeMap::new();
        while !loaders.iter().all(Loader::is_complete) {
            let who = rng.below(u64::from(SHARDS)) as usize;
            flights.extend(loaders[who].next_read().map(|read| (who, read)));
            if flights.is_empty() || rng.below(2) == 0 {
                continue;
            }
            let at = rng.below(flights.len() as u64) as usize;
            let (who, (offset, len)) = flights.swap_remove(at);
            if len > BLOCK && rng.below(4) == 0 {
                loaders[who].feed((offset, len), Err(ReadFailed)); // and again page by page
                continue;
            }
            (offset..offset + len as u64).step_by(BLOCK).for_each(|block| *blocks.entry(block).or_default() += 1);
            loaders[who].feed((offset, len), Ok(&disk.read(offset, len)));
        }
        let metapages = u64::from(layout.slot_count) * 2;
        let read = blocks.range(layout.meta_offset..layout.crc_offset);
        assert!(read.clone().all(|(_, &times)| times == 1) && read.count() as u64 == metapages, "seed {seed}");
        for (loader, alone) in loaders.into_iter().zip(&alone) {
            let (_, report) = loader.finish(&|id| known.get(&id).copied()).unwrap();
            assert_eq!(report, *alone, "seed {seed}");
        }
        assert!(pool.is_loaded());
    }
}

#[test]
fn a_shard_alone_waits_for_what_another_still_reads() {
    let layout = layout((8 << 20) + 400 * u64::from(CHUNK), SHARDS, CHUNK);
    let disk = Disk::default();
    let pool = ExtentPool::new(&layout);
    let new = |shard| Loader::new(&layout, shard, Arc::clone(&pool), StoreConfig::default());
    let (mut first, mut second) = (new(0), new(1));
    let piece = first.next_read().unwrap();
    while let Some(read) = second.next_read() {
        second.feed(read, Ok(&disk.read(read.0, read.1)));
    }
    assert!(!second.is_complete(), "a chunk of its own may be in that piece");
    assert!(matches!(new(1).finish(&|_| None), Err(LoadError::Unfinished)));
    first.feed(piece, Ok(&disk.read(piece.0, piece.1)));
    assert!(second.next_read().is_none() && second.is_complete());
    let (mut store, _) = second.finish(&|_| None).unwrap();
    assert!(!pool.is_loaded(), "the first one has not said what is its own");
    store.add_copyset(CopysetId(1), 1);
    let (payload, crcs) = payload(1, 1);
    let write = crate::shard::request::ChunkOp::Write { sn: 1, offset: 0, payload, crcs };
    assert_eq!(store.admit(CopysetId(1), 1, &write), Err(Outcome::Overload));
}
