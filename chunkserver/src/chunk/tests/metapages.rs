//! Metapages that are torn, rotten or gone: which chunk is served, which refused, which slot is put out of use.

use super::super::*;
use super::disk::{Disk, load, payload, read, round};
use super::scripted::{C, CHUNK, K, apply_write, byte, known, small, start, write_op};
use crate::shard::request::{ChunkOp, Outcome};

#[test]
fn damaged_metapages_never_give_wrong_data() {
    let (layout, mut disk) = (small(4), Disk::default());
    let mut store = start(&layout, &disk, 0);
    for index in 1..=3 {
        apply_write(&mut store, index, 1, index as u32 * K, index, 1);
        apply_write(&mut store, index + 10, 2, index as u32 * K, index, 1);
        round(&mut store, &mut disk, &[(C, index + 10)]);
    }
    // Page generation 3 is the newest, in copy 1; generation 2, in copy 0, lacks a block.
    disk.flip(layout.metapage_offset(0, 3) + 100);
    let mut store = start(&layout, &disk, 13);
    assert_eq!(store.suspect_chunks(), 1);
    assert_eq!(read(&store, &disk, C, 1, 0, K), Err(Outcome::CrcFail));
    assert_eq!(store.admit(C, 1, &write_op(1, 0, 1, 1)), Err(Outcome::CrcFail));
    assert_eq!(store.admit(C, 1, &ChunkOp::Delete { sn: 1 }), Ok(()));
    assert!(read(&store, &disk, C, 2, 0, CHUNK).is_ok());
    disk.flip(layout.metapage_offset(0, 2) + 2000);
    let (store, report) = load(&layout, 0, &ExtentPool::new(&layout), &disk, &known(13)).unwrap();
    assert_eq!((report.quarantined, report.chunks), (0, 2), "a slot that still names its chunk is not free");
    assert_eq!(read(&store, &disk, C, 1, 0, K), Err(Outcome::CrcFail));
    // The copy before the newest one is history; its damage costs nothing.
    disk.flip(layout.metapage_offset(1, 2) + 2000);
    let store = start(&layout, &disk, 13);
    assert_eq!(store.suspect_chunks(), 1);
    assert_eq!(byte(&read(&store, &disk, C, 2, 0, CHUNK).unwrap(), 3), 3);
    // A slot that does not even name a chunk is put out of use.
    disk.flip(layout.metapage_offset(0, 2));
    disk.flip(layout.metapage_offset(0, 3));
    let (_, report) = load(&layout, 0, &ExtentPool::new(&layout), &disk, &known(13)).unwrap();
    assert_eq!((report.quarantined, report.chunks), (1, 1));
}

#[test]
fn a_torn_metapage_is_not_rot_and_rot_is_never_taken_for_torn() {
    let (layout, mut disk) = (small(4), Disk::default());
    let mut store = start(&layout, &disk, 0);
    for index in 1..=3 {
        apply_write(&mut store, index, 1, index as u32 * K, index, 1);
        round(&mut store, &mut disk, &[(C, index)]);
    }
    disk.flip(layout.metapage_offset(0, 3) + 2000);
    // The checkpoint does not cover what the page was about: replay does that again.
    let mut store = start(&layout, &disk, 2);
    assert_eq!(store.suspect_chunks(), 0);
    apply_write(&mut store, 3, 1, 3 * K, 3, 1);
    assert_eq!(byte(&read(&store, &disk, C, 1, 0, CHUNK).unwrap(), 3), 3);
    // It does: what replay does to the chunk afterwards changes nothing, now and at every later start.
    for checkpoint in 3..6 {
        let mut store = start(&layout, &disk, checkpoint);
        apply_write(&mut store, checkpoint + 1, 1, 5 * K, 5, 1);
        store.apply(C, checkpoint + 2, 1, ApplyOp::Zero { offset: 0, len: K }, 1).unwrap();
        apply_write(&mut store, checkpoint + 2, 2, 0, 1, 1);
        round(&mut store, &mut disk, &[(C, checkpoint + 2)]);
        assert_eq!(read(&store, &disk, C, 1, 0, K), Err(Outcome::CrcFail));
        assert!(read(&store, &disk, C, 2, 0, K).is_ok());
    }
    // The generation that a rotten page claims may be the one before.
    disk.flip(layout.metapage_offset(0, 3) + 2000);
    disk.set(layout.metapage_offset(0, 3) + 24, 1);
    assert_eq!(start(&layout, &disk, 9).suspect_chunks(), 1);
    let mut store = start(&layout, &disk, 9);
    store.apply(C, 10, 1, ApplyOp::Delete, 1).unwrap();
    round(&mut store, &mut disk, &[(C, 10)]);
    assert_eq!(start(&layout, &disk, 10).suspect_chunks(), 0, "a Delete ends it");
}

#[test]
fn no_rotten_metapage_makes_a_chunk_vanish() {
    let (layout, mut disk) = (small(4), Disk::default());
    let mut store = start(&layout, &disk, 0);
    apply_write(&mut store, 1, 1, 0, 1, 1);
    round(&mut store, &mut disk, &[(C, 1)]);
    // Its only one: torn if replay makes the chunk again, else rotten.
    disk.flip(layout.metapage_offset(0, 1) + 2000);
    assert_eq!(start(&layout, &disk, 0).chunk_count(), 0);
    assert_eq!(read(&start(&layout, &disk, 1), &disk, C, 1, 0, K), Err(Outcome::CrcFail));
    disk.flip(layout.metapage_offset(0, 1) + 2000);
    // The next round writes it a second time, also when the one after the first was lost with a restart.
    for mut store in [store, start(&layout, &disk, 1)] {
        let mut disk = disk.clone();
        apply_write(&mut store, 2, 2, 0, 2, 1);
        round(&mut store, &mut disk, &[(C, 2)]);
        for at in [0, 12, 16, 24, 40, 48, 64, 2000] {
            for page in 1..=2 {
                let mut disk = disk.clone();
                disk.flip(layout.metapage_offset(0, page) + at);
                let store = start(&layout, &disk, 2);
                assert_eq!(store.chunk_count(), 2, "byte {at} of page {page}");
                let one = read(&store, &disk, C, 1, 0, K).map(|data| byte(&data, 0));
                assert!(matches!(one, Ok(1) | Err(Outcome::CrcFail)), "byte {at} of page {page}: {one:?}");
                assert!(at != 2000 || one == Ok(1), "either copy is enough");
            }
        }
    }
}

#[test]
fn doubt_waits_for_no_commit_that_never_comes() {
    let (layout, mut disk) = (small(4), Disk::default());
    let mut store = start(&layout, &disk, 0);
    apply_write(&mut store, 1, 1, 0, 1, 1);
    round(&mut store, &mut disk, &[(C, 1)]);
    apply_write(&mut store, 2, 1, K, 2, 1);
    assert!(store.doubt(C, 0, 1, 1));
    assert_eq!(store.begin_round(&[(C, 3)]).unwrap().commits, [(C, 3)], "what was applied to it, and no more");
}

#[test]
fn where_a_log_ends_counts_after_a_restart() {
    let (layout, mut disk) = (small(8), Disk::default());
    let mut store = start(&layout, &disk, 0);
    for chunk in 1..=4 {
        apply_write(&mut store, chunk, chunk, 0, chunk, 1);
    }
    // From a replica that is at 500: a newer life of 1, more of 2, the half of 3; 4 is gone there; 5 is new.
    for (chunk, created, whole) in [(1, 400, true), (2, 2, true), (3, 3, false), (5, 450, true)] {
        let info = ChunkInfo { chunk, created, applied: 490, sn: 1, corrected_sn: 0 };
        assert!(store.install_begin(C, &info));
        let (data, crcs) = payload(100 + chunk, 1);
        store.install_data(C, chunk, 500, 0, (data, &crcs[..]), 1);
        if whole {
            store.install_end(C, &info, 1);
        }
    }
    assert!(store.doubt(C, 0, 4, 1));
    store.doubt_gone(C, 500, 4, 1);
    round(&mut store, &mut disk, &[(C, 4)]);
    assert_eq!(store.ends_at(C, 6, 1), [3]);
    round(&mut store, &mut disk, &[(C, 4)]);
    for restarts in 0..2 {
        if restarts > 0 {
            store = start(&layout, &disk, 4);
        }
        // The tail is older than what was sent; what follows is not.
        for (index, stamp) in [(5, 5), (6, 6), (8, 8)] {
            for chunk in [1, 2, 4, 5] {
                let at = if index == 8 { K } else { 0 };
                apply_write(&mut store, index, chunk, at, stamp, 1);
            }
        }
        for chunk in [1, 2, 5] {
            let data = read(&store, &disk, C, chunk, 0, CHUNK).unwrap();
            assert_eq!((byte(&data, 0), byte(&data, 1)), (100 + chunk as u8, 8), "chunk {chunk}");
        }
        let data = read(&store, &disk, C, 4, 0, CHUNK).unwrap();
        assert_eq!((byte(&data, 0), byte(&data, 1)), (0, 8));
        assert_eq!(read(&store, &disk, C, 3, 0, K), Err(Outcome::CrcFail));
    }
    store.apply(C, 9, 3, ApplyOp::Delete, 1).unwrap();
    store.apply(C, 9, 5, ApplyOp::Delete, 1).unwrap();
    round(&mut store, &mut disk, &[(C, 9)]);
    assert_eq!([3, 5].map(|chunk| read(&store, &disk, C, chunk, 0, K)), [Err(Outcome::NoChunk), Err(Outcome::NoChunk)]);
}

#[test]
fn older_entries_on_a_newer_chunk_are_known_until_the_log_has_passed_it() {
    let (layout, mut disk) = (small(4), Disk::default());
    for (last, doubt) in [(8, vec![1]), (20, vec![])] {
        let mut store = start(&layout, &disk, 0);
        apply_write(&mut store, 1, 1, 0, 1, 1);
        let info = ChunkInfo { chunk: 1, created: 1, applied: 9, sn: 1, corrected_sn: 0 };
        assert!(store.install_begin(C, &info));
        store.install_end(C, &info, 1);
        round(&mut store, &mut disk, &[(C, 1)]);
        let mut store = start(&layout, &disk, 1);
        apply_write(&mut store, 5, 1, K, 5, 1);
        assert!(store.is_mixed(C, 1, 8) && !store.is_mixed(C, 1, 9));
        round(&mut store, &mut disk, &[(C, 5)]);
        let mut store = start(&layout, &disk, 5);
        if last == 20 {
            apply_write(&mut store, 9, 1, 0, 9, 1);
            assert!(!store.is_mixed(C, 1, 0));
        }
        assert_eq!(store.ends_at(C, last, 1), doubt);
        disk = Disk::default();
    }
}

#[test]
fn another_replica_s_chunk_ends_the_doubt() {
    let (layout, mut disk) = (small(4), Disk::default());
    let mut store = start(&layout, &disk, 0);
    for index in 1..=3 {
        apply_write(&mut store, index, 1, index as u32 * K, index, 1);
        round(&mut store, &mut disk, &[(C, index)]);
    }
    disk.flip(layout.metapage_offset(0, 3) + 2000);
    let mut store = start(&layout, &disk, 3);
    let theirs = ChunkInfo { chunk: 1, created: 1, applied: 3, sn: 1, corrected_sn: 0 };
    let ours = store.chunk_info(C, 1).unwrap();
    assert!(store.lacks(C, &theirs) && store.lacks(C, &ours), "whatever it says of itself");
    assert!(store.install_begin(C, &theirs));
    for stamp in 1..=3 {
        let (data, crcs) = payload(stamp, 1);
        store.install_data(C, 1, 4, stamp as u32 * K, (data, &crcs[..]), 1);
    }
    store.install_end(C, &theirs, 1);
    assert!(!store.lacks(C, &theirs));
    round(&mut store, &mut disk, &[(C, 4)]);
    let store = start(&layout, &disk, 4);
    assert_eq!(store.suspect_chunks(), 0);
    assert_eq!(byte(&read(&store, &disk, C, 1, 0, CHUNK).unwrap(), 3), 3);
}
