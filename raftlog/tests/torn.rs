//! Torn tail or rot: every prefix and every missing sector of the writes in flight; damage in what was durable;
//! reads that fail; and what must never come back from an earlier use of a segment.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Disk, checkpoint, entry, geometry, state};
use raftlog::{BLOCK, CopysetId, Geometry, HardState, Limits, Log, Rot, Seq};

const LIMITS: Limits = Limits { batch_bytes_max: 64 << 10, writes_in_flight: 2 };
const ID: CopysetId = CopysetId(7);
const OTHER: CopysetId = CopysetId(8);

fn hs(term: u64, commit: u64) -> HardState {
    HardState { term, vote: 1, commit }
}

/// A log with two copysets and four durable entries in `ID`, one batch each.
fn setup(g: Geometry) -> (Disk, Log) {
    let mut disk = Disk::new(&g);
    let mut log = disk.open(g, LIMITS);
    log.checkpoint(ID, checkpoint(0, 0, 1));
    log.checkpoint(OTHER, checkpoint(0, 0, 2));
    disk.drain(&mut log);
    for i in 1..=4 {
        log.append(ID, vec![entry(i, 1, 2, i)], Some(hs(1, i - 1)));
        disk.drain(&mut log);
    }
    (disk, log)
}

fn last(log: &Log) -> u64 {
    log.index(ID).unwrap().last_index()
}

/// Two writes in flight, `keep(write, sector)` decides what lands; returns the last entry found.
fn tear(keep: impl Fn(usize, usize) -> bool) -> u64 {
    let g = geometry(128 << 10, 3);
    let (mut disk, mut log) = setup(g);
    log.append(ID, vec![entry(5, 1, 1, 5)], Some(hs(1, 4)));
    assert_eq!(disk.submit(&mut log), 1);
    log.append(ID, vec![entry(6, 1, 0, 6)], Some(hs(1, 4)));
    assert_eq!(disk.submit(&mut log), 1);
    for (n, w) in std::mem::take(&mut disk.flying).into_iter().enumerate() {
        for (s, sector) in w.bytes.chunks(512).enumerate().filter(|(s, _)| keep(n, *s)) {
            disk.land(w.offset + s as u64 * 512, sector);
        }
    }
    let log = disk.open(g, LIMITS);
    assert_eq!(log.index(ID).unwrap().checkpoint().incarnation, 1);
    for i in 1..=last(&log) {
        assert_eq!(disk.read(&log, ID, i), entry(i, 1, [2, 1, 0][i.saturating_sub(4) as usize], i).payload);
    }
    last(&log)
}

#[test]
fn every_prefix_and_every_missing_sector() {
    // Sectors of zeros that stay away leave a header as it was meant to be.
    let header_sectors = 1;
    for a in 0..=16 {
        for b in 0..=8 {
            let first = a == 16;
            let want = 4 + u64::from(first) + u64::from(first && b >= header_sectors);
            assert_eq!(tear(|n, s| s < [a, b][n]), want, "prefixes {a} {b}");
        }
        let first = a != 0 && a < 8 || a == 16;
        assert_eq!(tear(|n, s| n == 1 || s != a), if first { 6 } else { 4 }, "all but sector {a}");
    }
}

#[test]
fn a_retried_batch_never_wakes_what_followed_the_torn_one() {
    // The same records again, in the same place where there is no other: whatever part of that lands.
    for segments in [2u32, 3] {
        for (cut, other) in [(0, 8), (3, 3), (9, 12)] {
            let g = geometry(32 << 10, segments);
            let mut disk = Disk::new(&g);
            disk.image.fill(0x11); // an earlier use: padding that did not land is no padding
            let mut log = disk.open(g, LIMITS);
            log.checkpoint(ID, checkpoint(0, 0, 1));
            disk.drain(&mut log);
            // With two segments: the first is full, the second active, none is free.
            let blocks = if segments == 2 { 5 } else { 0 };
            log.append(ID, vec![entry(1, 1, blocks, 1)], Some(hs(1, 0)));
            disk.drain(&mut log);
            log.append(ID, vec![], Some(hs(1, 0)));
            disk.drain(&mut log);
            let retry = |log: &mut Log| log.append(ID, vec![entry(2, 1, 1, 2)], Some(hs(1, 1)));
            retry(&mut log);
            disk.submit(&mut log);
            log.append(ID, vec![entry(3, 1, 0, 3)], Some(hs(1, 1)));
            assert_eq!(disk.submit(&mut log), 1);
            let flying = std::mem::take(&mut disk.flying);
            for (s, sector) in flying[0].bytes.chunks(512).enumerate().filter(|(s, _)| *s != cut) {
                disk.land(flying[0].offset + s as u64 * 512, sector);
            }
            disk.land(flying[1].offset, &flying[1].bytes);
            let mut log = disk.open(g, LIMITS);
            assert_eq!(last(&log), 1);
            retry(&mut log);
            loop {
                disk.submit(&mut log);
                let w = disk.flying.remove(0);
                // Crash here, with one sector of this write on disk, or all but one.
                for all_but in [false, true] {
                    let mut torn = disk.clone();
                    for (s, sector) in
                        w.bytes.chunks(512).enumerate().filter(|(s, _)| all_but != [cut, other].contains(s))
                    {
                        torn.land(w.offset + s as u64 * 512, sector);
                    }
                    assert!(last(&torn.open(g, LIMITS)) <= 2, "entry 3 is back: {segments} {cut} {other} {all_but}");
                }
                disk.land(w.offset, &w.bytes);
                if log.write_done(w.id).is_some() {
                    break;
                }
            }
            assert_eq!(last(&disk.open(g, LIMITS)), 2);
        }
    }
}

/// Offset of the header of the batch that holds entry `i` (headers here are one block).
fn header_of(log: &Log, i: u64) -> usize {
    log.index(ID).unwrap().location(i).unwrap().offset as usize - BLOCK
}

#[test]
fn rotten_payload_is_known_by_copyset_and_index() {
    let g = geometry(128 << 10, 3);
    let (mut disk, log) = setup(g);
    let at = header_of(&log, 2) + BLOCK + 5000;
    disk.image[at] ^= 1;
    let (log, report) = disk.recover(g, LIMITS).unwrap();
    assert_eq!(report.rot, [Rot { seq: 3, copyset: Some(ID), index: 2 }]);
    assert_eq!((last(&log), report.suspects, report.torn), (4, vec![], 0));
    let index = log.index(ID).unwrap();
    assert_eq!((1..=4).filter(|i| index.is_rotten(*i)).collect::<Vec<_>>(), [2]);
}

#[test]
fn rot_that_is_not_needed_any_more_is_not_reported() {
    let g = geometry(128 << 10, 3);
    let (mut disk, mut log) = setup(g);
    let at = header_of(&log, 2) + BLOCK;
    log.checkpoint(ID, checkpoint(3, 1, 1));
    disk.drain(&mut log);
    disk.image[at] ^= 1;
    let log = disk.open(g, LIMITS);
    assert_eq!((log.index(ID).unwrap().first_index(), last(&log)), (4, 4));
}

#[test]
fn a_lost_header_makes_suspects_until_they_are_logged_again() {
    let g = geometry(128 << 10, 3);
    for byte in [200, 20] {
        // In the records, or in the fixed part: then not even the length is known.
        let (mut disk, log) = setup(g);
        let at = header_of(&log, 3) + byte;
        disk.image[at] ^= 0x40;
        let (mut log, report) = disk.recover(g, LIMITS).unwrap();
        let missing = Rot { seq: 0, copyset: Some(ID), index: 3 };
        assert_eq!(report.rot, [Rot { seq: 4, copyset: None, index: 0 }, missing]);
        assert_eq!((report.suspects, last(&log)), (vec![ID, OTHER], 2));
        // Entries 3.. come from a peer; then everything is said again behind the lost batch.
        log.append(ID, (3..=4).map(|i| entry(i, 1, 2, i)).collect(), Some(hs(1, 3)));
        disk.drain(&mut log);
        disk.restore(&mut log, ID);
        log.relog(ID);
        log.relog(OTHER);
        disk.drain(&mut log);
        let (log, report) = disk.recover(g, LIMITS).unwrap();
        assert_eq!((report.suspects, last(&log)), (vec![], 4));
        assert!(report.rot.iter().all(|r| r.copyset.is_none()));
    }
}

#[test]
fn a_replaced_tail_whose_record_is_lost_is_noticed() {
    let g = geometry(128 << 10, 3);
    let (mut disk, mut log) = setup(g);
    log.append(ID, vec![entry(3, 2, 1, 33)], Some(hs(2, 2)));
    disk.drain(&mut log);
    let at = header_of(&log, 3);
    for i in 4..6 {
        log.append(ID, vec![entry(i, 2, 1, i + 30)], Some(hs(2, 2)));
        disk.drain(&mut log);
    }
    disk.image[at] ^= 1;
    let (log, report) = disk.recover(g, LIMITS).unwrap();
    assert_eq!(last(&log), 2, "entry 3 of term 1 was replaced");
    assert!(report.rot.contains(&Rot { seq: 0, copyset: Some(ID), index: 3 }));
}

#[test]
fn the_last_batch_is_torn_unless_a_seal_covers_it() {
    let g = geometry(128 << 10, 3);
    for sealed in [false, true] {
        let (mut disk, mut log) = setup(g);
        let at = header_of(&log, 4) + BLOCK;
        if sealed {
            assert_eq!(log.seal(), Some(6));
            assert_eq!(log.seal(), None, "one is queued");
            disk.drain(&mut log);
            assert_eq!(log.seal(), None, "nothing to say");
            assert_eq!(disk.open(g, LIMITS).seal(), None, "nor after a restart");
        }
        disk.image[at] ^= 1;
        let (log, report) = disk.recover(g, LIMITS).unwrap();
        let (rot, torn) = if sealed { (1, 0) } else { (0, 1) };
        assert_eq!((report.rot.len(), report.torn), (rot, torn));
        assert_eq!(last(&log), if sealed { 4 } else { 3 });
    }
}

#[test]
fn a_failed_read_costs_one_block_and_is_never_a_torn_tail() {
    let g = geometry(2 << 20, 3);
    let (mut disk, log) = setup(g);
    disk.bad = vec![header_of(&log, 2) as u64 + BLOCK as u64];
    let (log, report) = disk.recover(g, LIMITS).unwrap();
    assert_eq!(report.unreadable_blocks, 1);
    assert_eq!(report.rot, [Rot { seq: 3, copyset: Some(ID), index: 2 }]);
    assert_eq!(last(&log), 4);
    for at in [0, BLOCK] {
        // The tail: as far as anyone can tell it was acknowledged.
        disk.bad = vec![(header_of(&log, 4) + at) as u64];
        let (log, report) = disk.recover(g, LIMITS).unwrap();
        assert_eq!((last(&log), report.torn), (3, u64::from(at > 0)));
        assert_eq!((report.rot.len(), report.suspects), (1, vec![ID, OTHER]));
    }
    disk.bad = (0..g.segment_size * 3).step_by(BLOCK).collect();
    let (log, report) = disk.recover(g, LIMITS).unwrap();
    assert_eq!(report.unreadable_blocks, g.segment_size * 3 / BLOCK as u64);
    assert_eq!(log.copysets(), []);
}

#[test]
fn rot_at_the_start_of_a_segment_loses_one_batch() {
    let g = geometry(64 << 10, 4);
    let (mut disk, mut log) = setup(g);
    for i in 5..=16 {
        log.append(ID, vec![entry(i, 1, 2, i)], Some(hs(1, i - 1)));
        disk.drain(&mut log);
    }
    log.seal();
    disk.drain(&mut log);
    let starts: Vec<u64> = (5..=16).filter(|i| header_of(&log, *i).is_multiple_of(64 << 10)).collect();
    assert!(starts.len() >= 2);
    for i in starts {
        let mut disk = disk.clone();
        let at = header_of(&log, i);
        disk.image[at..at + BLOCK].fill(0xee);
        let (log, report) = disk.recover(g, LIMITS).unwrap();
        assert_eq!((last(&log), report.rot.len()), (i - 1, 2), "the batches behind it are read");
        assert_eq!(report.batches, log.durable_seq() - 1);
    }
}

#[test]
fn the_former_life_of_a_copyset_is_not_read() {
    let g = geometry(128 << 10, 3);
    let (mut disk, mut log) = setup(g);
    log.purge(ID);
    assert_eq!(log.index(ID).map(|_| ()), None);
    log.checkpoint(ID, checkpoint(0, 0, 9));
    log.append(ID, vec![entry(1, 5, 1, 77)], Some(hs(5, 0)));
    disk.drain(&mut log);
    let again = disk.open(g, LIMITS);
    assert_eq!(state(&again, &disk), state(&log, &disk));
    assert_eq!((last(&again), again.index(ID).unwrap().checkpoint().incarnation), (1, 9));
}

#[test]
fn a_newer_format_is_refused() {
    let g = geometry(128 << 10, 3);
    let (mut disk, log) = setup(g);
    let at = header_of(&log, 1);
    let first = &mut disk.image[..128];
    first[12] = 2;
    let crc = crc32c::crc32c(&first[12..128]).to_le_bytes();
    first[8..12].copy_from_slice(&crc);
    assert_eq!(disk.recover(g, LIMITS).map(|_| ()), Err(raftlog::RecoverError::Version(2)));
    assert!(at > 0);
    let other = Geometry { uuid: [1; 16], ..g };
    assert_eq!(disk.open(other, LIMITS).copysets(), [], "another log's batches are not ours");
}

#[test]
fn recovery_is_the_same_twice_and_writes_nothing() {
    let g = geometry(128 << 10, 3);
    let (disk, log) = setup(g);
    let (a, ra) = disk.recover(g, LIMITS).unwrap();
    let (b, rb) = disk.recover(g, LIMITS).unwrap();
    assert_eq!((ra, a.durable_seq()), (rb, b.durable_seq()));
    assert_eq!(state(&a, &disk), state(&log, &disk));
    let seqs: Vec<Seq> = [a, b].iter().map(Log::durable_seq).collect();
    assert_eq!(seqs, [log.durable_seq(); 2]);
}

#[test]
fn a_torn_start_of_a_segment_is_not_completed_by_its_retry() {
    let g = geometry(32 << 10, 3);
    let mut disk = Disk::new(&g);
    let mut log = disk.open(g, LIMITS);
    log.checkpoint(ID, checkpoint(0, 0, 1));
    log.append(ID, vec![entry(1, 1, 6, 1)], Some(hs(1, 0)));
    disk.drain(&mut log); // the first segment is full
    let retry = |log: &mut Log| log.append(ID, vec![entry(2, 1, 1, 2)], Some(hs(1, 1)));
    retry(&mut log);
    disk.submit(&mut log);
    let w = disk.flying.remove(0);
    assert_eq!((w.offset, w.bytes.len()), (32 << 10, 2 * BLOCK));
    disk.land(w.offset, &w.bytes[..BLOCK]);
    let mut log = disk.open(g, LIMITS);
    retry(&mut log);
    disk.submit(&mut log);
    let w = disk.flying.remove(0);
    disk.land(w.offset + 512, &w.bytes[512..]);
    assert_eq!(last(&disk.open(g, LIMITS)), 1, "a dropped batch is back");
    disk.land(w.offset, &w.bytes);
    log.write_done(w.id);
    disk.drain(&mut log);
    assert_eq!(last(&disk.open(g, LIMITS)), 2);
}

#[test]
fn what_a_later_life_wrote_anew_stays_when_an_old_block_heals() {
    let g = geometry(128 << 10, 3);
    let (mut disk, log) = setup(g);
    let at = header_of(&log, 4) as u64;
    disk.bad = vec![at];
    let (mut log, report) = disk.recover(g, LIMITS).unwrap();
    assert_eq!((last(&log), report.rot.len()), (3, 1));
    log.append(ID, vec![entry(4, 9, 1, 99)], Some(hs(9, 3)));
    disk.drain(&mut log);
    disk.bad.clear();
    let log = disk.open(g, LIMITS);
    assert_eq!(log.index(ID).unwrap().term(4), Some(9));
}
