//! One promise per test.

use super::super::*;
use super::disk::{Disk, Rng, layout, load, payload, read, round, start_io};
use crate::io::buffer::Arena;
use crate::shard::request::{ChunkOp, Outcome};
use bytes::Bytes;
use raftlog::{BLOCK, CopysetId};
use std::collections::BTreeMap;
use std::sync::Arc;

pub(super) const C: CopysetId = CopysetId(1);
pub(super) const K: u32 = 4096;
pub(super) const CHUNK: u32 = 64 << 10;

pub(super) fn known(checkpoint: u64) -> BTreeMap<CopysetId, Known> {
    [(C, Known { incarnation: 7, checkpoint, last: 1 << 40 })].into()
}

pub(super) fn start(layout: &Layout, disk: &Disk, checkpoint: u64) -> Store {
    let (mut store, _) = load(layout, 0, &ExtentPool::new(layout), disk, &known(checkpoint)).unwrap();
    store.replay_done();
    store
}

pub(super) fn small(slots: u64) -> Layout {
    // 1 MiB each for head, log, metadata and CRC zone.
    let layout = layout((4 << 20) + slots * u64::from(CHUNK) + 512, 1, CHUNK);
    assert_eq!(u64::from(layout.slot_count), slots);
    layout
}

pub(super) fn write_op(sn: u64, offset: u32, stamp: u64, blocks: usize) -> ChunkOp {
    let (payload, crcs) = payload(stamp, blocks);
    ChunkOp::Write { sn, offset, payload, crcs }
}

pub(super) fn apply_write(store: &mut Store, index: u64, chunk: u64, offset: u32, stamp: u64, blocks: usize) {
    let (payload, crcs) = payload(stamp, blocks);
    store.apply(C, index, chunk, ApplyOp::Write { sn: 1, offset, payload, crcs }, index).unwrap();
}

pub(super) fn byte(data: &[u8], block: usize) -> u8 {
    data[block * BLOCK]
}

#[test]
fn version_rules() {
    let mut store = start(&small(8), &Disk::default(), 0);
    let admit = |store: &mut Store, op: &ChunkOp| store.admit(C, 1, op);
    assert_eq!(admit(&mut store, &write_op(0, 0, 1, 1)), Err(Outcome::Failed), "sn 0 creates nothing");
    assert_eq!(admit(&mut store, &write_op(3, 0, 1, 1)), Ok(()));
    // Judged by what is proposed, not by what is applied.
    assert_eq!(admit(&mut store, &write_op(2, 0, 1, 1)), Err(Outcome::Backward));
    assert_eq!(admit(&mut store, &write_op(4, 0, 1, 1)), Err(Outcome::Failed), "needs a chunk snapshot");
    assert_eq!(admit(&mut store, &ChunkOp::Delete { sn: 2 }), Err(Outcome::Failed));
    assert_eq!(admit(&mut store, &ChunkOp::Delete { sn: 3 }), Ok(()));
    assert_eq!(admit(&mut store, &write_op(1, 0, 1, 1)), Ok(()), "behind the Delete it is a new chunk");
    assert_eq!(admit(&mut store, &ChunkOp::Delete { sn: 9 }), Ok(()));
    assert_eq!(admit(&mut store, &ChunkOp::Delete { sn: 0 }), Ok(()), "absent: the apply does nothing");
    assert_eq!(store.admit(CopysetId(2), 1, &ChunkOp::Info), Err(Outcome::NoCopyset));
    store.reset_proposed(C);
    assert_eq!(admit(&mut store, &write_op(2, 0, 1, 1)), Ok(()), "nothing was applied");
}

#[test]
fn shapes_are_checked() {
    let mut store = start(&small(8), &Disk::default(), 0);
    let mut bad = vec![
        write_op(1, 1, 1, 1),
        write_op(1, CHUNK, 1, 1),
        write_op(1, CHUNK - K, 1, 2),
        ChunkOp::Read { offset: 0, len: 1 },
        ChunkOp::Read { offset: u32::MAX - K + 1, len: 2 * K },
        ChunkOp::Zero { offset: K, len: CHUNK },
        ChunkOp::Hash { offset: u32::MAX, len: 2 },
    ];
    let (payload, _) = payload(1, 2);
    bad.push(ChunkOp::Write { sn: 1, offset: 0, payload: payload.slice(1..), crcs: [1, 2].into_iter().collect() });
    bad.push(ChunkOp::Write { sn: 1, offset: 0, payload, crcs: [1].into_iter().collect() });
    for op in bad {
        assert_eq!(store.admit(C, 1, &op), Err(Outcome::Invalid), "{op:?}");
    }
    assert_eq!(store.read(C, 1, 0, K).unwrap_err(), Outcome::NoChunk);
    assert_eq!(store.read(C, 1, 3, K).unwrap_err(), Outcome::Invalid);
    // A write of nothing passes and does nothing.
    let nothing = ChunkOp::Write { sn: 1, offset: 0, payload: Bytes::new(), crcs: [].into_iter().collect() };
    assert_eq!(store.admit(C, 1, &nothing), Ok(()));
    let nothing = ApplyOp::Write { sn: 1, offset: 0, payload: Bytes::new(), crcs: [].into_iter().collect() };
    store.apply(C, 1, 1, nothing, 0).unwrap();
    assert_eq!(store.chunk_count(), 0);
    let wild = ApplyOp::Zero { offset: 5, len: 1 };
    assert_eq!(store.apply(C, 2, 1, wild, 0), Err(ApplyError::Malformed));
}

#[test]
fn a_read_comes_in_as_few_pieces_as_possible() {
    let (layout, mut disk) = (small(8), Disk::default());
    let mut store = start(&layout, &disk, 0);
    apply_write(&mut store, 1, 5, 0, 1, 4);
    round(&mut store, &mut disk, &[(C, 1)]);
    apply_write(&mut store, 2, 5, 2 * K, 2, 4);
    let plan = store.read(C, 5, 0, 8 * K).unwrap();
    let (memory, _) = payload(2, 4);
    let disk_offset = layout.block_offset(0, 0);
    let device = Piece::Device { disk_offset, len: 2 * K, first_block: 0 };
    assert_eq!(plan.pieces.as_slice(), [device, Piece::Memory(memory), Piece::Zeros(2 * K)]);
    assert_eq!(store.info(C, 5).unwrap().as_slice(), [1]);
    assert_eq!(store.info(C, 6), None);
}

#[test]
fn neighbours_go_out_in_one_write_and_repeats_once() {
    let (layout, mut disk) = (small(8), Disk::default());
    let mut store = start(&layout, &disk, 0);
    for (index, block) in [3u32, 1, 0, 2, 3, 3, 9].into_iter().enumerate() {
        apply_write(&mut store, index as u64 + 1, 1, block * K, 10 + index as u64, 1);
    }
    // The last block of slot 0 and the first of slot 1 are neighbours on the disk.
    apply_write(&mut store, 8, 1, 15 * K, 50, 1);
    apply_write(&mut store, 9, 2, 0, 51, 1);
    assert_eq!(store.pinned_bytes(), 7 * u64::from(K), "superseded payloads are let go");
    assert_eq!(store.oldest_dirty_ns(), Some(1));
    assert_eq!(store.oldest_unwritten(C), Some(1), "block 3 waits since index 1");
    assert_eq!(round(&mut store, &mut disk, &[(C, 9)]), [(C, 9)]);
    let counters = store.counters();
    assert_eq!((counters.data_writes, counters.data_bytes), (3, 7 * u64::from(K)));
    assert_eq!((counters.meta_writes, counters.crc_writes, counters.syncs), (2, 2, 2));
    assert_eq!((store.pinned_bytes(), store.oldest_dirty_ns()), (0, None));
    let data = read(&store, &disk, C, 1, 0, CHUNK).unwrap();
    assert_eq!([0, 1, 2, 3, 9, 15, 4].map(|b| byte(&data, b)), [12, 11, 13, 15, 16, 50, 0]);
    assert!(store.begin_round(&[(C, 9)]).is_none(), "nothing left to write");
}

#[test]
fn a_payload_counts_until_its_last_block_is_out() {
    let (layout, mut disk) = (small(8), Disk::default());
    let mut store = start(&layout, &disk, 0);
    apply_write(&mut store, 1, 1, 0, 1, 4);
    apply_write(&mut store, 2, 1, 0, 2, 3);
    // The second payload is three blocks in a buffer of four.
    assert_eq!(store.pinned_bytes(), 8 * u64::from(K));
    apply_write(&mut store, 3, 1, 3 * K, 3, 1);
    assert_eq!(store.pinned_bytes(), 5 * u64::from(K));
    store.apply(C, 4, 1, ApplyOp::Zero { offset: 0, len: 3 * K }, 4).unwrap();
    assert_eq!(store.pinned_bytes(), u64::from(K));
    round(&mut store, &mut disk, &[(C, 4)]);
    assert_eq!(store.pinned_bytes(), 0);
}

#[test]
fn changes_during_a_round_belong_to_the_next() {
    let (layout, mut disk) = (small(8), Disk::default());
    let arena = Arena::new(1 << 20).unwrap();
    let mut store = start(&layout, &disk, 0);
    for chunk in 0..4 {
        apply_write(&mut store, chunk + 1, chunk, 0, 1, 2);
    }
    let commits = store.begin_round(&[(C, 4)]).unwrap().commits;
    assert_eq!(commits, [(C, 4)]);
    let (first, _) = start_io(&mut store, &mut disk, &arena).unwrap();
    apply_write(&mut store, 5, 0, 0, 9, 1);
    store.apply(C, 6, 1, ApplyOp::Zero { offset: 0, len: K }, 6).unwrap();
    store.apply(C, 7, 2, ApplyOp::Delete, 7).unwrap();
    store.io_done(first);
    let check = |store: &Store, disk: &Disk| {
        assert_eq!(byte(&read(store, disk, C, 0, 0, K).unwrap(), 0), 9);
        let zeroed = read(store, disk, C, 1, 0, 2 * K).unwrap();
        assert_eq!((byte(&zeroed, 0), byte(&zeroed, 1)), (0, 1));
        assert_eq!(read(store, disk, C, 2, 0, K), Err(Outcome::NoChunk));
        assert_eq!(byte(&read(store, disk, C, 3, 0, K).unwrap(), 0), 1);
    };
    check(&store, &disk);
    while let Some((id, _)) = start_io(&mut store, &mut disk, &arena) {
        store.io_done(id);
    }
    assert_eq!(store.round_done().unwrap(), [(C, 4)]);
    check(&store, &disk);
    // What is durable is the state at index 4: with its CRCs, although the chunk is gone in memory.
    let (old, _) = load(&layout, 0, &ExtentPool::new(&layout), &disk, &known(4)).unwrap();
    for chunk in 0..4 {
        let data = read(&old, &disk, C, chunk, 0, 2 * K).unwrap();
        assert_eq!((byte(&data, 0), byte(&data, 1)), (1, 1));
    }
    round(&mut store, &mut disk, &[(C, 7)]);
    check(&start(&layout, &disk, 7), &disk);
}

#[test]
fn a_full_pool_refuses_and_recovers_after_the_checkpoint() {
    let (layout, mut disk) = (small(3), Disk::default());
    let mut store = start(&layout, &disk, 0);
    for chunk in 0..3 {
        assert_eq!(store.admit(C, chunk, &write_op(1, 0, 1, 1)), Ok(()));
        assert_eq!(store.admit(C, chunk, &write_op(1, 0, 1, 1)), Ok(()), "one reservation per chunk");
    }
    assert_eq!(store.admit(C, 3, &write_op(1, 0, 1, 1)), Err(Outcome::NoSpace));
    store.abandon(C, 2, &write_op(1, 0, 1, 1));
    assert_eq!(store.admit(C, 3, &write_op(1, 0, 1, 1)), Err(Outcome::NoSpace), "the other write needs it");
    store.abandon(C, 2, &write_op(1, 0, 1, 1));
    assert_eq!(store.admit(C, 3, &write_op(1, 0, 1, 1)), Ok(()));
    let mut index = 0;
    for chunk in [0, 0, 1, 1, 3] {
        index += 1;
        apply_write(&mut store, index, chunk, 0, 1, 1);
    }
    assert_eq!(store.admit(C, 0, &write_op(1, K, 1, 1)), Ok(()), "overwrites go on");
    apply_write(&mut store, 6, 0, K, 1, 1);
    assert_eq!(store.admit(C, 1, &ChunkOp::Delete { sn: 1 }), Ok(()));
    store.apply(C, 7, 1, ApplyOp::Delete, 7).unwrap();
    let full = |store: &mut Store| store.admit(C, 9, &write_op(1, 0, 1, 1)) == Err(Outcome::NoSpace);
    assert!(full(&mut store), "deleted, but nothing of it durable");
    store.checkpoint_durable(C, 7);
    assert!(full(&mut store), "no tombstone");
    apply_write(&mut store, 8, 3, 0, 1, 1);
    store.apply(C, 9, 3, ApplyOp::Delete, 9).unwrap();
    round(&mut store, &mut disk, &[(C, 9)]);
    assert_eq!(store.admit(C, 9, &write_op(1, 0, 1, 1)), Ok(()), "slot of chunk 1");
    assert_eq!(store.admit(C, 10, &write_op(1, 0, 1, 1)), Err(Outcome::NoSpace), "chunk 3: no checkpoint yet");
    store.checkpoint_durable(C, 9);
    assert_eq!(store.admit(C, 10, &write_op(1, 0, 1, 1)), Ok(()));
}

#[test]
fn a_recycled_slot_inherits_nothing() {
    let (layout, mut disk) = (small(1), Disk::default());
    let mut store = start(&layout, &disk, 0);
    apply_write(&mut store, 1, 1, 0, 7, 16);
    round(&mut store, &mut disk, &[(C, 1)]);
    store.apply(C, 2, 1, ApplyOp::Delete, 2).unwrap();
    let done = round(&mut store, &mut disk, &[(C, 2)]);
    store.checkpoint_durable(done[0].0, done[0].1);
    apply_write(&mut store, 3, 2, 4 * K, 8, 1);
    for _ in 0..2 {
        let data = read(&store, &disk, C, 2, 0, CHUNK).unwrap();
        assert!((0..16).all(|b| byte(&data, b) == if b == 4 { 8 } else { 0 }));
        round(&mut store, &mut disk, &[(C, 3)]);
        store = start(&layout, &disk, 3);
    }
}

#[test]
fn of_two_claims_the_later_life_wins() {
    let (layout, mut disk) = (small(8), Disk::default());
    let arena = Arena::new(1 << 20).unwrap();
    let mut store = start(&layout, &disk, 0);
    apply_write(&mut store, 1, 1, 0, 1, 1);
    round(&mut store, &mut disk, &[(C, 1)]);
    store.apply(C, 2, 1, ApplyOp::Delete, 2).unwrap();
    apply_write(&mut store, 3, 1, 0, 3, 1);
    store.begin_round(&[(C, 3)]).unwrap();
    let mut lost = Disk::default();
    while let Some((id, io)) = store.next_io(4, &mut |len| arena.alloc(len)) {
        if let RoundIo::Write { offset, bufs } = io {
            // The tombstone of slot 0 is the write that does not make it.
            let meta_of_0 = layout.metapage_offset(0, 0)..layout.metapage_offset(1, 0);
            if meta_of_0.contains(&offset) {
                lost.write(offset, &bufs.concat());
            } else {
                disk.write(offset, &bufs.concat());
            }
        }
        store.io_done(id);
    }
    disk.sync();
    let (mut store, report) = load(&layout, 0, &ExtentPool::new(&layout), &disk, &known(1)).unwrap();
    assert_eq!((report.chunks, report.superseded), (1, 1));
    store.apply(C, 2, 1, ApplyOp::Delete, 0).unwrap();
    assert_eq!(store.chunk_count(), 1, "that Delete was of the life before");
    apply_write(&mut store, 3, 1, 0, 3, 1);
    store.replay_done();
    assert_eq!(byte(&read(&store, &disk, C, 1, 0, K).unwrap(), 0), 3);
    round(&mut store, &mut disk, &[(C, 3)]);
    let (_, report) = load(&layout, 0, &ExtentPool::new(&layout), &disk, &known(3)).unwrap();
    assert_eq!((report.chunks, report.superseded), (1, 0));
}

#[test]
fn chunks_of_unknown_copysets_and_lives_are_freed() {
    let (layout, mut disk) = (small(2), Disk::default());
    let mut store = start(&layout, &disk, 0);
    apply_write(&mut store, 1, 1, 0, 1, 1);
    apply_write(&mut store, 2, 2, 0, 1, 1);
    assert_eq!(store.chunks_of(C), 2);
    round(&mut store, &mut disk, &[(C, 2)]);
    let other_life: BTreeMap<_, _> = [(C, Known { incarnation: 8, checkpoint: 0, last: 1 << 40 })].into();
    let (mut store, report) = load(&layout, 0, &ExtentPool::new(&layout), &disk, &other_life).unwrap();
    assert_eq!((report.chunks, report.orphaned), (0, 2));
    store.replay_done();
    assert_eq!(store.admit(C, 1, &write_op(1, 0, 1, 1)), Err(Outcome::NoSpace));
    round(&mut store, &mut disk, &[]);
    assert_eq!(store.admit(C, 1, &write_op(1, 0, 1, 1)), Ok(()), "their tombstones are enough");
    apply_write(&mut store, 1, 1, 0, 1, 1);
    store.remove_copyset(C);
    assert_eq!((store.chunk_count(), store.pinned_bytes()), (0, 0));
    store.add_copyset(C, 9);
    round(&mut store, &mut disk, &[]);
    let pool = ExtentPool::new(&layout);
    load(&layout, 0, &pool, &disk, &other_life).unwrap();
    assert_eq!(pool.free_slots(), 2);
}

#[test]
fn rot_is_told_from_change() {
    let (layout, mut disk) = (small(4), Disk::default());
    let mut store = start(&layout, &disk, 0);
    apply_write(&mut store, 1, 1, 0, 1, 4);
    round(&mut store, &mut disk, &[(C, 1)]);
    let plan = store.read(C, 1, 0, 4 * K).unwrap();
    let good = disk.read(layout.block_offset(0, 0), 4 * BLOCK);
    assert_eq!(store.check(&plan.key, 0, &good), Verified::Ok);
    disk.flip(layout.block_offset(0, 2) + 17);
    let bad = disk.read(layout.block_offset(0, 0), 4 * BLOCK);
    assert_eq!(store.check(&plan.key, 0, &bad), Verified::Rot { block: 2 });
    assert_eq!(read(&store, &disk, C, 1, 0, 2 * K).map(|d| byte(&d, 1)), Ok(1), "other blocks are served");
    // A block on its way to the slot explains a mismatch, and so does one that got there since.
    apply_write(&mut store, 2, 1, 2 * K, 2, 1);
    assert_eq!(store.check(&plan.key, 0, &bad), Verified::Stale);
    round(&mut store, &mut disk, &[(C, 2)]);
    assert_eq!(store.check(&plan.key, 0, &bad), Verified::Stale);
    assert_eq!(byte(&read(&store, &disk, C, 1, 0, 4 * K).unwrap(), 2), 2, "overwriting heals");
    store.apply(C, 3, 1, ApplyOp::Delete, 3).unwrap();
    assert_eq!(store.check(&plan.key, 0, &good), Verified::Stale);
}

#[test]
fn a_lost_crc_page_is_reported_and_its_blocks_refused() {
    let (layout, mut disk) = (small(4), Disk::default());
    let mut store = start(&layout, &disk, 0);
    apply_write(&mut store, 1, 1, 0, 1, 1);
    round(&mut store, &mut disk, &[(C, 1)]);
    disk.flip(layout.crcpage_offset(0, 0, 1) + 40);
    let (mut store, report) = load(&layout, 0, &ExtentPool::new(&layout), &disk, &known(1)).unwrap();
    store.replay_done();
    assert_eq!(report.crc_pages_lost, 1);
    assert_eq!(read(&store, &disk, C, 1, 0, K), Err(Outcome::CrcFail));
    assert_eq!(read(&store, &disk, C, 1, K, K), Ok(vec![0; BLOCK]));
}

#[test]
fn failed_reads_at_start_are_narrowed_down() {
    let (layout, mut disk) = (small(8), Disk::default());
    let mut store = start(&layout, &disk, 0);
    for chunk in 0..3 {
        apply_write(&mut store, chunk + 1, chunk, 0, chunk + 1, 1);
    }
    round(&mut store, &mut disk, &[(C, 3)]);
    let broken = layout.metapage_offset(1, 1);
    let mut loader = Loader::new(&layout, 0, ExtentPool::new(&layout), StoreConfig::default());
    while let Some((offset, len)) = loader.next_read() {
        if (offset..offset + len as u64).contains(&broken) {
            loader.feed((offset, len), Err(ReadFailed));
        } else {
            loader.feed((offset, len), Ok(&disk.read(offset, len)));
        }
    }
    let (store, report) = loader.finish(&|_| Some(Known { incarnation: 7, checkpoint: 3, last: 1 << 40 })).unwrap();
    assert_eq!((report.quarantined, report.chunks), (1, 2));
    assert_eq!(byte(&read(&store, &disk, C, 2, 0, K).unwrap(), 0), 3);
}

#[test]
fn shards_share_the_pool() {
    let layout = layout((6 << 20) + 40 * u64::from(CHUNK), 2, CHUNK);
    let total = u64::from(layout.slot_count);
    let ids: Vec<CopysetId> =
        (0..2).map(|shard| (1..).map(CopysetId).find(|&id| shard_of(id, 2) == shard).unwrap()).collect();
    let known: BTreeMap<_, _> =
        ids.iter().map(|&id| (id, Known { incarnation: 1, checkpoint: 0, last: 1 << 40 })).collect();
    let mut disk = Disk::default();
    let pool = ExtentPool::new(&layout);
    let mut stores: Vec<Store> = (0..2).map(|shard| load(&layout, shard, &pool, &disk, &known).unwrap().0).collect();
    assert!(pool.is_loaded() && !pool.is_open());
    stores[0].replay_done();
    assert_eq!(stores[0].admit(ids[0], 1, &write_op(1, 0, 1, 1)), Err(Outcome::Overload), "shard 1 may need it");
    stores[1].replay_done();
    let mut rng = Rng(1);
    let mut count = [0u64; 2];
    while stores.iter_mut().zip(&ids).zip(&count).any(|((s, &id), &n)| {
        s.spare_slots() > 0 || {
            let fits = s.admit(id, n, &write_op(1, 0, 1, 1)).is_ok();
            s.reset_proposed(id);
            fits
        }
    }) {
        let who = rng.below(2) as usize;
        let (payload, crcs) = payload(who as u64 + 1, 1);
        if stores[who].admit(ids[who], count[who], &write_op(1, 0, 1, 1)).is_ok() {
            let op = ApplyOp::Write { sn: 1, offset: 0, payload, crcs };
            stores[who].apply(ids[who], count[who] + 1, count[who], op, 0).unwrap();
            count[who] += 1;
        }
    }
    assert_eq!(count[0] + count[1], total, "every slot finds a taker");
    for (who, store) in stores.iter_mut().enumerate() {
        round(store, &mut disk, &[(ids[who], count[who])]);
    }
    // Everything of shard 0 goes; its extents come back and shard 1 gets them, generations and all.
    stores[0].remove_copyset(ids[0]);
    round(&mut stores[0], &mut disk, &[]);
    assert_eq!(pool.free_slots(), count[0]);
    for n in 0..count[0] {
        let (payload, crcs) = payload(3, 1);
        let op = ApplyOp::Write { sn: 1, offset: K, payload, crcs };
        stores[1].apply(ids[1], 1000 + n, 1000 + n, op, 0).unwrap();
    }
    round(&mut stores[1], &mut disk, &[(ids[1], 2000)]);
    let pool = ExtentPool::new(&layout);
    for shard in 0..2 {
        let (store, report) = load(&layout, shard, &pool, &disk, &known).unwrap();
        assert_eq!(report.chunks, if shard == 1 { total } else { 0 });
        if shard == 1 {
            let data = read(&store, &disk, ids[1], 1000, 0, 2 * K).unwrap();
            assert_eq!((byte(&data, 0), byte(&data, 1)), (0, 3));
        }
    }
}

#[test]
fn pages_wait_for_memory() {
    let (layout, mut disk) = (small(8), Disk::default());
    let mut store = start(&layout, &disk, 0);
    for chunk in 0..4 {
        apply_write(&mut store, chunk + 1, chunk, 0, 1, 1);
    }
    let arena = Arena::new(BLOCK).unwrap();
    store.begin_round(&[(C, 4)]).unwrap();
    let mut hold = true;
    let mut waits = 0;
    loop {
        let arena: Arc<Arena> = Arc::clone(&arena);
        match store.next_io(4, &mut |len| if hold { None } else { arena.alloc(len) }) {
            Some((id, RoundIo::Write { offset, bufs })) => {
                disk.write(offset, &bufs.concat());
                drop(bufs);
                store.io_done(id);
            }
            Some((id, RoundIo::Sync)) => {
                disk.sync();
                store.io_done(id);
            }
            None if store.round_done().is_some() => break,
            None => {
                waits += 1;
                hold = false;
            }
        }
        assert!(waits < 3);
    }
    assert_eq!(waits, 1);
    assert_eq!(byte(&read(&start(&layout, &disk, 4), &disk, C, 3, 0, K).unwrap(), 0), 1);
}
