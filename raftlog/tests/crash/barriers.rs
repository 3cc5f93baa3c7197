//! Each barrier of the log, dropped: the enumeration must notice.

use crate::operations::{
    ID, alone, append, closing_seal, filled, full, recycle, retried, roll, small, tight, two_in_flight, wide,
};
use crate::rig::{Rig, Violation, is_checkpoint, is_seal};

/// Reports the first write that `lie` picks durable though it is not; `violation` must be found.
#[track_caller]
fn dropped(setup: fn() -> Rig, operation: fn(&mut Rig), lie: fn(&[u8]) -> bool, violation: Violation) {
    let mut rig = setup();
    (rig.lie, rig.enough) = (Some(lie), Some(violation));
    rig.watch();
    operation(&mut rig);
    assert!(rig.lie.is_none(), "no write was picked");
    assert!(rig.found.contains(&violation), "{:?}", rig.found);
}

#[test]
fn a_write_is_durable_before_it_is_acknowledged() {
    dropped(wide, append, |_| true, Violation::Lost);
}

#[test]
fn batches_are_acknowledged_in_order() {
    let mut rig = wide();
    rig.eager = true;
    rig.watch();
    two_in_flight(&mut rig);
    assert!(rig.found.contains(&Violation::Lost), "{:?}", rig.found);
}

/// Else a header says that batches are durable that are not: a crash looks like rot.
#[test]
fn the_first_batch_of_a_segment_travels_alone() {
    dropped(small, roll, |_| true, Violation::Rot);
}

/// Else a segment is written over that, as far as the disk says, is needed.
#[test]
fn live_seq_is_durable_before_a_segment_is_reused() {
    dropped(alone, closing_seal, is_seal, Violation::Rot);
}

/// Else the only record of a copyset is written over.
#[test]
fn what_supersedes_a_record_is_durable_before_its_segment_is_freed() {
    dropped(tight, recycle, is_checkpoint, Violation::Meaning);
}

/// Else the torn batch stands before what is written behind it, with the same number.
#[test]
fn a_dropped_batch_is_wiped_before_its_place_is_used() {
    let mut first = full();
    first.kept = Some(Vec::new());
    first.watch();
    retried(&mut first);
    // The first batch is torn, the second one is whole.
    let torn = first.kept.take().unwrap().into_iter().max_by_key(|image| first.torn(image)).unwrap();
    let mut second = first.after(&torn);
    second.lie = Some(is_seal);
    second.enough = Some(Violation::Lost);
    second.watch();
    retried(&mut second);
    assert!(second.found.contains(&Violation::Lost), "{:?}", second.found);
}

#[test]
fn recovery_syncs_before_it_reads() {
    for sync in [true, false] {
        let mut rig = filled();
        rig.append(ID, 0, &[]);
        rig.submit();
        rig.kill(sync);
        rig.watch();
        rig.append(ID, 0, &[]);
        rig.settle();
        assert_eq!(rig.found.contains(&Violation::Lost), !sync, "{:?}", rig.found);
    }
}
