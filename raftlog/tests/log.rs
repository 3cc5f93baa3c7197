//! The writer, case by case: batching, order, visibility, space, freeing, re-logging, hard states.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Disk, Rng, checkpoint, entry, geometry, state};
use raftlog::{BLOCK, CopysetId, Entry, HardState, Limits, Log};

const LIMITS: Limits = Limits { batch_bytes_max: 64 << 10, writes_in_flight: 2 };
const ID: CopysetId = CopysetId(7);

fn hs(term: u64, commit: u64) -> HardState {
    HardState { term, vote: 1, commit }
}

fn entries(range: std::ops::RangeInclusive<u64>, blocks: usize) -> Vec<Entry> {
    range.map(|i| entry(i, 1, blocks, i)).collect()
}

fn start(segment: u64, count: u32) -> (Disk, Log) {
    let g = geometry(segment, count);
    let mut disk = Disk::new(&g);
    let mut log = disk.open(g, LIMITS);
    log.checkpoint(ID, checkpoint(0, 0, 1));
    disk.drain(&mut log);
    (disk, log)
}

#[test]
fn records_of_all_copysets_share_a_batch_until_it_is_taken() {
    let (mut disk, mut log) = start(1 << 20, 3);
    let other = CopysetId(9);
    let a = log.append(ID, entries(1..=2, 1), Some(hs(1, 0)));
    let b = log.checkpoint(other, checkpoint(0, 0, 2));
    let c = log.append(other, entries(1..=1, 1), None);
    assert_eq!((a, b, c), (2, 2, 2));
    assert_eq!(log.index(ID).unwrap().entries(1, 3, usize::MAX), entries(1..=2, 1), "visible at once");
    assert_eq!(log.index(ID).unwrap().location(1), None);
    assert_eq!(log.next_header(), Some(BLOCK));
    assert_eq!(log.append(ID, entries(3..=3, 1), None), 3, "its length was told");
    let mut header = vec![0; BLOCK];
    let w = log.take_write(&mut header);
    let got: Vec<_> = w.payloads.iter().map(|p| p.as_ptr()).collect();
    let index = log.index(ID).unwrap();
    let sent = index.entries(1, 3, usize::MAX);
    assert_eq!(got[..2], [sent[0].payload.as_ptr(), sent[1].payload.as_ptr()], "no copy");
    assert_eq!((w.seq, log.durable_seq(), w.payloads.len()), (2, 1, 3));
    disk.submit(&mut log);
    assert_eq!(disk.flying.len(), 1, "batch 3 beside it");
    assert_eq!(log.next_header(), None, "two in flight");
    assert_eq!(disk.complete(&mut log, 0), None, "batch 3 is written before batch 2");
    assert_eq!(log.durable_commit(other), 0);
    assert_eq!(log.write_done(w.id), Some(3));
    let l = log.index(ID).unwrap().location(2).unwrap();
    assert_eq!((l.offset, l.len), (w.offset + 2 * BLOCK as u64, BLOCK));
}

#[test]
fn entries_replace_the_tail_and_come_in_slices() {
    let (mut disk, mut log) = start(1 << 20, 3);
    log.append(ID, entries(1..=5, 1), Some(hs(1, 2)));
    log.append(ID, vec![entry(4, 2, 2, 44)], Some(hs(2, 2)));
    let index = log.index(ID).unwrap();
    assert_eq!((index.first_index(), index.last_index()), (1, 4));
    assert_eq!([index.term(0), index.term(3), index.term(4), index.term(5)], [Some(0), Some(1), Some(2), None]);
    assert_eq!((index.payload_len(4), index.payload_len(5)), (Some(2 * BLOCK), None));
    assert_eq!(index.entries(1, 5, 0).len(), 1);
    assert_eq!(index.entries(1, 5, 2 * (BLOCK + 12)).len(), 2);
    assert_eq!((index.entries(5, 9, 99), index.entries(0, 3, 99)), (vec![], vec![]));
    disk.drain(&mut log);
    let again = disk.open(geometry(1 << 20, 3), LIMITS);
    assert_eq!(state(&again, &disk), state(&log, &disk));
    let index = again.index(ID).unwrap();
    assert!(index.entries(1, 2, 99)[0].payload.is_empty() && index.payload_len(1) == Some(BLOCK));
    assert_eq!(index.not_resident().len(), 4);
}

#[test]
fn a_large_append_is_split_and_no_part_commits_beyond_itself() {
    let g = geometry(1 << 20, 3);
    let (mut disk, mut log) = start(1 << 20, 3);
    let last = log.append(ID, entries(1..=40, 4), Some(hs(1, 39)));
    assert!(last > 10);
    loop {
        disk.submit(&mut log);
        if disk.flying.is_empty() {
            break;
        }
        disk.complete(&mut log, 0);
        let part = disk.open(g, LIMITS);
        let index = part.index(ID).unwrap();
        assert_eq!(index.hard_state().term, 1);
        assert_eq!(index.hard_state().commit, index.last_index().min(39));
    }
    assert_eq!((log.durable_commit(ID), log.index(ID).unwrap().last_index()), (39, 40));
}

#[test]
fn the_largest_entry_fits_and_gets_a_batch_of_its_own() {
    for segment in [32 << 10, 1 << 20] {
        let (mut disk, mut log) = start(segment, 4);
        let blocks = log.max_entry_bytes() / BLOCK;
        assert!(blocks * BLOCK * 100 > segment as usize * 70);
        let a = log.append(ID, entries(1..=1, 0), None);
        let b = log.append(ID, vec![entry(2, 1, blocks, 2)], Some(hs(1, 1)));
        let c = log.append(ID, entries(3..=3, 0), None);
        assert!(a <= b && b <= c);
        disk.drain(&mut log);
        assert_eq!(log.durable_seq(), c);
        let again = disk.open(geometry(segment, 4), LIMITS);
        assert_eq!(state(&again, &disk), state(&log, &disk));
    }
}

#[test]
#[should_panic(expected = "no gap")]
fn a_gap_is_a_bug() {
    start(1 << 20, 3).1.append(ID, entries(2..=2, 1), None);
}

#[test]
#[should_panic(expected = "must fit in a segment")]
fn an_entry_larger_than_a_segment_is_a_bug() {
    start(32 << 10, 3).1.append(ID, entries(1..=1, 8), None);
}

#[test]
fn a_checkpoint_releases_memory_and_keeps_the_newest_vote() {
    let (mut disk, mut log) = start(1 << 20, 3);
    let mut all = entries(1..=3, 1);
    let memory: std::sync::Arc<[u8]> = vec![0u8; BLOCK].into();
    all[0].payload = bytes::Bytes::from_owner(memory.clone());
    all[0].context = bytes::Bytes::copy_from_slice(&raftlog::crc32c(&memory).to_le_bytes());
    log.append(ID, all, Some(hs(1, 1)));
    log.append(ID, vec![], Some(HardState { term: 4, vote: 3, commit: 2 }));
    disk.drain(&mut log);
    assert_eq!(std::sync::Arc::strong_count(&memory), 2);
    log.checkpoint(ID, checkpoint(1, 1, 1)); // captured before the vote
    disk.drain(&mut log);
    assert_eq!(std::sync::Arc::strong_count(&memory), 1);
    for log in [&log, &disk.open(geometry(1 << 20, 3), LIMITS)] {
        let index = log.index(ID).unwrap();
        assert_eq!(index.hard_state(), HardState { term: 4, vote: 3, commit: 2 });
        assert_eq!((index.first_index(), index.last_index(), log.durable_commit(ID)), (2, 3, 2));
    }
    log.checkpoint(ID, checkpoint(10, 6, 1)); // a raft snapshot
    log.append(ID, entries(11..=11, 1), None);
    disk.drain(&mut log);
    let again = disk.open(geometry(1 << 20, 3), LIMITS);
    assert_eq!(state(&again, &disk), state(&log, &disk));
    assert_eq!(again.index(ID).unwrap().hard_state(), HardState { term: 6, vote: 1, commit: 10 });
}

#[test]
fn commit_counts_when_it_is_durable() {
    let (mut disk, mut log) = start(1 << 20, 3);
    log.append(ID, entries(1..=3, 1), Some(hs(1, 1)));
    disk.submit(&mut log);
    log.append(ID, vec![], Some(hs(1, 3)));
    assert_eq!(log.durable_commit(ID), 0);
    disk.complete(&mut log, 0);
    assert_eq!(log.durable_commit(ID), 1);
    disk.drain(&mut log);
    assert_eq!(log.durable_commit(ID), 3);
    assert_eq!(log.durable_commit(CopysetId(99)), 0);
}

#[test]
fn evicted_payloads_are_on_disk_and_a_relog_takes_them_back() {
    let (mut disk, mut log) = start(1 << 20, 3);
    log.append(ID, entries(1..=3, 1), None);
    log.evict(ID, 3);
    assert_eq!(log.index(ID).unwrap().not_resident(), [], "not on disk yet");
    disk.drain(&mut log);
    log.append(ID, entries(4..=4, 1), None);
    log.evict(ID, 4);
    assert_eq!(log.index(ID).unwrap().not_resident().len(), 3);
    log.evict(ID, u64::MAX);
    disk.drain(&mut log);
    disk.restore(&mut log, ID);
    log.relog(ID);
    disk.drain(&mut log);
    log.evict(ID, 4);
    assert_eq!(log.index(ID).unwrap().not_resident().len(), 4);
    let again = disk.open(geometry(1 << 20, 3), LIMITS);
    assert_eq!(state(&again, &disk), state(&log, &disk));
}

#[test]
#[should_panic(expected = "in memory")]
fn relog_without_the_payloads_is_a_bug() {
    let (mut disk, mut log) = start(1 << 20, 3);
    log.append(ID, entries(1..=3, 1), None);
    disk.drain(&mut log);
    disk.open(geometry(1 << 20, 3), LIMITS).relog(ID);
}

#[test]
fn a_quiet_copyset_pins_until_its_relog_is_durable() {
    let (mut disk, mut log) = start(128 << 10, 4);
    let busy = CopysetId(8);
    log.append(ID, entries(1..=1, 1), Some(hs(1, 0)));
    log.checkpoint(busy, checkpoint(0, 0, 2));
    for i in 1.. {
        if log.space_for_entries() < log.entry_cost(4 * BLOCK) {
            break;
        }
        log.append(busy, vec![entry(i, 1, 4, i)], None);
        disk.drain(&mut log);
        log.checkpoint(busy, checkpoint(i, 1, 2));
    }
    disk.drain(&mut log);
    let used = log.used_bytes();
    assert!(used > log.capacity_bytes() / 2 && used + (128 << 10) <= log.capacity_bytes(), "one segment stays free");
    assert_eq!((log.pinning(), log.free_segments()), (vec![ID], 0));
    log.relog(ID);
    assert_eq!((log.pinning(), log.free_segments()), (vec![ID], 0), "not durable yet");
    disk.drain(&mut log);
    assert_eq!(log.pinning(), []);
    assert!(log.free_segments() >= 1 && log.used_bytes() < used && log.space_for_entries() > 0);
    let again = disk.open(geometry(128 << 10, 4), LIMITS);
    assert_eq!(state(&again, &disk), state(&log, &disk));
}

#[test]
fn a_purge_outlives_what_it_purges() {
    let g = geometry(32 << 10, 3);
    let (mut disk, mut log) = start(32 << 10, 3);
    let busy = CopysetId(8);
    log.append(ID, entries(1..=1, 1), Some(hs(1, 0)));
    log.checkpoint(busy, checkpoint(0, 0, 2));
    disk.drain(&mut log);
    log.purge(ID);
    let mut recycled = 0;
    for i in 1..40 {
        log.append(busy, vec![entry(i, 1, 2, i)], Some(hs(1, i)));
        log.checkpoint(busy, checkpoint(i, 1, 2));
        loop {
            disk.submit(&mut log);
            assert_eq!(disk.open(g, LIMITS).copysets().len(), 1 + usize::from(log.durable_seq() < 3));
            if disk.flying.is_empty() {
                break;
            }
            disk.complete(&mut log, 0);
            recycled += log.free_segments();
        }
    }
    assert!(recycled > 10);
}

#[test]
fn a_relog_larger_than_a_batch_takes_effect_as_one() {
    let g = geometry(256 << 10, 5);
    let (mut disk, mut log) = start(256 << 10, 5);
    log.append(ID, entries(1..=20, 4), Some(hs(1, 0)));
    disk.drain(&mut log);
    let before = state(&log, &disk);
    log.relog(ID);
    loop {
        disk.submit(&mut log);
        let Some(w) = disk.flying.first() else { break };
        let last = w.seq == log.append(ID, vec![], None);
        disk.complete(&mut log, 0);
        assert_eq!(state(&disk.open(g, LIMITS), &disk)[&ID].entries, before[&ID].entries);
        assert!(last || log.free_segments() == 0);
    }
    assert!(log.free_segments() > 0);
    assert_eq!(state(&disk.open(g, LIMITS), &disk), state(&log, &disk));
}

#[test]
fn five_hundred_empty_entries_are_one_batch_and_payloads_never_exceed_a_vectored_write() {
    let (mut disk, mut log) = start(4 << 20, 3);
    let small = log.append(ID, entries(1..=500, 0), None);
    disk.drain(&mut log);
    assert_eq!(small, 2);
    let mut wide = Disk::new(&geometry(16 << 20, 3));
    let mut log = wide.open(geometry(16 << 20, 3), Limits { batch_bytes_max: 8 << 20, ..LIMITS });
    log.checkpoint(ID, checkpoint(0, 0, 1));
    log.append(ID, entries(1..=1300, 1), None);
    wide.drain(&mut log);
    assert_eq!(log.durable_seq(), 3);
}

#[test]
fn the_first_batch_of_a_segment_travels_alone() {
    let (mut disk, mut log) = start(32 << 10, 4);
    log.append(ID, entries(1..=1, 5), None);
    assert_eq!(disk.submit(&mut log), 1); // the segment is full
    log.append(ID, entries(2..=2, 1), None);
    assert_eq!(disk.submit(&mut log), 0, "not before all of the old segment is durable");
    disk.complete(&mut log, 0);
    assert_eq!(disk.submit(&mut log), 1);
    log.append(ID, entries(3..=3, 1), None);
    assert_eq!(disk.submit(&mut log), 0, "nothing beside it");
    disk.complete(&mut log, 0);
    log.append(ID, entries(4..=4, 0), None);
    assert_eq!((disk.submit(&mut log), log.append(ID, entries(5..=5, 0), None), disk.submit(&mut log)), (1, 5, 1));
}

#[test]
fn a_purge_frees_nothing_before_it_is_durable() {
    let (mut disk, mut log) = start(32 << 10, 4);
    let other = CopysetId(8);
    log.append(ID, entries(1..=1, 5), None);
    disk.drain(&mut log);
    log.checkpoint(other, checkpoint(0, 0, 2));
    disk.drain(&mut log);
    assert_eq!((log.pinning(), log.free_segments()), (vec![ID], 0));
    log.purge(ID);
    disk.submit(&mut log);
    assert_eq!(log.free_segments(), 0);
    disk.complete(&mut log, 0);
    assert_eq!(log.free_segments(), 1);
}

/// What `has_room` lets in never takes the place of what frees space: it queues behind.
#[test]
fn long_entries_that_were_let_in_leave_room_for_the_checkpoint_behind_them() {
    const SEGMENT: u64 = 256 << 10;
    let limits = Limits { batch_bytes_max: 16 << 10, ..LIMITS };
    for seed in 0..200 {
        let (mut rng, count) = (Rng(seed), 3 + (seed % 7) as u32);
        let mut disk = Disk::new(&geometry(SEGMENT, count));
        let mut log = disk.open(geometry(SEGMENT, count), limits);
        log.checkpoint(ID, checkpoint(0, 0, 1));
        let (mut next, mut rounds) = (1, 0);
        let size = [1, 40, 63, 12][rng.below(4) as usize];
        while rounds < 30 {
            let blocks =
                if rng.one_in(3) { 1 + rng.below(63) as usize } else { size }.min(log.max_entry_bytes() / BLOCK);
            if log.has_room(0, blocks * BLOCK) {
                log.append(ID, vec![entry(next, 1, blocks, next)], None);
                next += 1;
                if rng.one_in(4) {
                    disk.drain(&mut log);
                }
                continue;
            }
            let seq = log.checkpoint(ID, checkpoint(next - 1, 1, 1));
            disk.drain(&mut log);
            assert!(log.durable_seq() >= seq, "seed {seed}: the checkpoint waits behind an entry that fits nowhere");
            log.free_segments();
            rounds += 1;
            assert!(log.has_room(0, log.max_entry_bytes()), "seed {seed}: an empty log takes any entry");
        }
    }
}

#[test]
fn a_renewal_ends_the_tail_and_takes_a_commit_back() {
    let (mut disk, mut log) = start(1 << 20, 3);
    log.append(ID, entries(1..=6, 1), Some(hs(1, 5)));
    disk.drain(&mut log);
    let cp = raftlog::Checkpoint { hard_state: hs(4, 3), ..checkpoint(2, 1, 1) };
    let seq = log.renew(ID, cp, 4);
    let renewed = |log: &Log| {
        let index = log.index(ID).unwrap();
        (index.first_index(), index.last_index(), index.hard_state(), index.entries(3, 5, usize::MAX).len())
    };
    assert_eq!(renewed(&log), (3, 4, hs(4, 3), 2));
    let g = geometry(1 << 20, 3);
    let before = disk.clone().open(g, LIMITS);
    assert_eq!((before.index(ID).unwrap().last_index(), before.index(ID).unwrap().hard_state()), (6, hs(1, 5)));
    disk.drain(&mut log);
    assert_eq!(log.durable_seq(), seq);
    assert_eq!(renewed(&disk.clone().open(g, LIMITS)), (3, 4, hs(4, 3), 2));
    // It goes on as ever.
    log.append(ID, vec![entry(5, 4, 1, 5)], Some(hs(4, 4)));
    disk.drain(&mut log);
    let again = disk.open(g, LIMITS);
    assert_eq!((again.index(ID).unwrap().last_index(), again.index(ID).unwrap().hard_state()), (5, hs(4, 4)));
}
