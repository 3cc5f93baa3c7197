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
    assert!(store.install_begin(C, 1, 1));
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
