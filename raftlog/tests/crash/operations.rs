//! One operation each, watched from its start to its end.

use crate::common::{checkpoint, geometry};
use crate::rig::{Rig, thin};
use raftlog::{CopysetId, HardState, Limits};

pub const ID: CopysetId = CopysetId(7);
pub const QUIET: CopysetId = CopysetId(8);
const LIMITS: Limits = Limits { batch_bytes_max: 12 << 10, writes_in_flight: 2 };
pub const ALL: [usize; 8] = [0, 1, 2, 3, 4, 5, 6, 7];
const SOME: [usize; 3] = [0, 3, 7];
/// Segments of three blocks for batches and one for a seal.
const SEGMENT: u64 = 16 << 10;

fn hs(term: u64, commit: u64) -> HardState {
    HardState { term, vote: 1, commit }
}

/// Copysets that were just created, in a zone of which some sectors of every block were used before.
fn start(ids: &[CopysetId], segment: u64, segments: u32, used: &[usize]) -> Rig {
    let mut rig = Rig::new(geometry(segment, segments), LIMITS, used);
    for &id in ids {
        rig.act(|log| log.checkpoint(id, checkpoint(0, 0, id.0)));
    }
    rig.settle();
    rig
}

pub fn wide() -> Rig {
    start(&[ID, QUIET], 2 * SEGMENT, 3, &[])
}

pub fn append(rig: &mut Rig) {
    rig.append(ID, 1, &ALL);
    rig.settle();
}

/// The second write is durable first.
pub fn two_in_flight(rig: &mut Rig) {
    rig.append(ID, 1, &SOME);
    rig.submit();
    rig.append(ID, 1, &SOME);
    assert_eq!(rig.submit(), 1);
    rig.complete(1);
    rig.append(ID, 0, &[]);
    rig.settle();
}

fn append_over_an_earlier_use(rig: &mut Rig) {
    rig.act(|log| log.append(ID, vec![thin(1, 1, 1, &SOME, 0x11)], Some(hs(1, 0))));
    rig.settle();
}

fn replace_a_tail(rig: &mut Rig) {
    for _ in 0..3 {
        rig.append(ID, 1, &SOME);
    }
    rig.settle();
    rig.watch();
    rig.act(|log| log.append(ID, vec![thin(2, 2, 1, &SOME, 0), thin(3, 2, 0, &[], 0)], Some(hs(2, 1))));
    rig.settle();
}

fn seal(rig: &mut Rig) {
    rig.append(ID, 1, &SOME);
    rig.settle();
    rig.watch();
    rig.act(|log| log.seal().unwrap());
    rig.settle();
}

fn checkpoint_and_more(rig: &mut Rig) {
    for _ in 0..3 {
        rig.append(ID, 1, &SOME);
    }
    rig.settle();
    rig.watch();
    rig.act(|log| log.checkpoint(ID, checkpoint(2, 1, ID.0)));
    rig.submit();
    rig.append(ID, 1, &SOME);
    rig.settle();
}

fn relog(rig: &mut Rig) {
    rig.append(QUIET, 1, &SOME);
    rig.append(QUIET, 0, &[]);
    rig.settle();
    rig.watch();
    rig.act(|log| log.relog(QUIET));
    rig.settle();
}

/// Entries wait, staged, in batches of their own; nothing changes until the last one is there.
fn relog_in_parts(rig: &mut Rig) {
    for _ in 0..2 {
        rig.append(QUIET, 2, &[1]);
    }
    rig.settle();
    rig.watch();
    rig.act(|log| log.relog(QUIET));
    rig.settle();
}

fn purge_and_create_again(rig: &mut Rig) {
    rig.append(ID, 1, &SOME);
    rig.settle();
    rig.watch();
    rig.act(|log| log.purge(ID));
    rig.submit();
    rig.act(|log| log.checkpoint(ID, checkpoint(0, 0, 99)));
    rig.settle();
    rig.append(ID, 1, &SOME);
    rig.settle();
}

/// The segment is full: the next batch opens one that was never used, alone, another one waits behind it.
pub fn roll(rig: &mut Rig) {
    rig.append(ID, 1, &SOME);
    rig.settle();
    rig.watch();
    // In flight when the segment turns out to be full.
    rig.append(ID, 0, &[]);
    assert_eq!(rig.submit(), 1);
    rig.append(ID, 2, &[0, 5]);
    rig.submit();
    rig.append(ID, 0, &[]);
    rig.settle();
}

/// Round and round through three segments: what is superseded is freed, a closing seal says so, and the oldest segment
/// is written over. `QUIET` says nothing new and is logged again.
pub fn recycle(rig: &mut Rig) {
    rig.append(QUIET, 0, &[]);
    rig.settle();
    for turn in 0..16 {
        if turn == 6 {
            rig.watch();
        }
        rig.append(ID, 1, &[0, 6]);
        rig.settle();
        let last = rig.log.index(ID).unwrap().last_index();
        rig.act(|log| log.checkpoint(ID, checkpoint(last, 1, ID.0)));
        rig.settle();
        if rig.log.pinning().contains(&QUIET) {
            rig.act(|log| log.relog(QUIET));
            rig.settle();
        }
        rig.log.free_segments();
    }
    assert!(rig.log.durable_seq() > 20, "the log went round");
}

/// Each segment is filled, and what fills it frees the only one that is reused next: nothing has said so yet.
pub fn closing_seal(rig: &mut Rig) {
    for _ in 0..2 {
        rig.append(ID, 0, &[]);
        rig.settle();
    }
    for turn in 0..8 {
        if turn == 4 {
            rig.watch();
        }
        rig.append(ID, 1, &[0, 6]);
        rig.settle();
        let done = rig.log.index(ID).unwrap().last_index().saturating_sub(2);
        rig.act(|log| log.checkpoint(ID, checkpoint(done, u64::from(done > 0), ID.0)));
        rig.settle();
        rig.log.free_segments();
    }
}

/// No segment is free: after the crash the log goes on in the one it ended in.
pub fn full() -> Rig {
    let mut rig = start(&[ID], 2 * SEGMENT, 2, &[2]);
    rig.append(ID, 5, &[]);
    rig.settle();
    rig.append(ID, 0, &[]);
    rig.settle();
    rig
}

pub fn small() -> Rig {
    start(&[ID, QUIET], SEGMENT, 4, &[])
}

pub fn alone() -> Rig {
    start(&[ID], SEGMENT, 3, &[])
}

pub fn tight() -> Rig {
    start(&[ID, QUIET], SEGMENT, 3, &[])
}

/// What is tried again after a crash: the same records, and one that was in flight behind them.
pub fn retried(rig: &mut Rig) {
    let last = rig.log.index(ID).unwrap().last_index();
    rig.act(|log| log.append(ID, vec![thin(last + 1, 1, 0, &[], 0)], Some(hs(1, last))));
    rig.submit();
    rig.act(|log| log.append(ID, vec![thin(last + 2, 1, 0, &[], 0)], Some(hs(1, last))));
    rig.settle();
}

/// A segment's first batch is torn, and written again there.
pub fn retried_at_a_start(rig: &mut Rig) {
    let last = rig.log.index(ID).unwrap().last_index();
    rig.act(|log| log.append(ID, vec![thin(last + 1, 1, 1, &[2], 0)], Some(hs(1, last))));
    rig.settle();
}

pub fn filled() -> Rig {
    let mut rig = small();
    rig.append(ID, 1, &SOME);
    rig.settle();
    rig
}

type Operation = (&'static str, fn() -> Rig, fn(&mut Rig));

const OPERATIONS: &[Operation] = &[
    ("append", wide, append),
    ("append, two in flight", wide, two_in_flight),
    ("append over an earlier use", || start(&[ID, QUIET], 2 * SEGMENT, 3, &ALL), append_over_an_earlier_use),
    ("append that replaces a tail", wide, replace_a_tail),
    ("seal", wide, seal),
    ("checkpoint", wide, checkpoint_and_more),
    ("re-log", wide, relog),
    ("re-log in several batches", wide, relog_in_parts),
    ("purge, create again", wide, purge_and_create_again),
    ("roll to a new segment", small, roll),
    ("re-log, free, recycle a segment", tight, recycle),
    ("free, seal, recycle a segment", alone, closing_seal),
];

#[test]
fn every_image_of_every_operation_is_recovered() {
    for (name, setup, operation) in OPERATIONS {
        let mut rig = setup();
        if name.starts_with("append") && !name.contains("tail") {
            rig.watch();
        }
        operation(&mut rig);
        println!("{name}: {} images, up to {} free sectors", rig.images, rig.free_most);
        assert!(rig.images > 2, "{name}");
    }
}

#[test]
fn every_image_of_a_crash_after_a_crash_is_recovered() {
    let twice: &[Operation] = &[
        ("append, torn, again", wide, retried),
        ("append in the last segment, torn, again", full, retried),
        ("first batch of a segment, torn, again", filled, retried_at_a_start),
    ];
    for (name, setup, operation) in twice {
        let mut first = setup();
        first.kept = Some(Vec::new());
        first.watch();
        operation(&mut first);
        let mut kept = first.kept.take().unwrap();
        kept.sort_unstable();
        kept.dedup();
        let (mut images, mut free) = (first.images, first.free_most);
        for image in &kept {
            let mut second = first.after(image);
            second.watch();
            operation(&mut second);
            (images, free) = (images + second.images, free.max(second.free_most));
        }
        println!("{name}: {images} images, up to {free} free sectors");
    }
}
