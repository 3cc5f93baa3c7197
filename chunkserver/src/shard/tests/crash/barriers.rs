//! Each barrier of a round, of the log and of start-up, dropped: the enumeration must notice.

use super::lab::{Kind, Lab, Violation};
use super::operations::{A, FEW, delete_and_reuse, killed, overwrite, overwritten, reuse, written_back};

#[track_caller]
fn dropped(kind: Kind, setup: fn() -> Lab, operation: fn(&mut Lab), as_what: Violation) {
    let mut lab = setup();
    lab.dropped = Some(kind);
    operation(&mut lab);
    assert!(lab.found.contains(&as_what), "{:?} in {} images, {} free", lab.found, lab.images, lab.free_most);
}

/// No round: a write that is never durable can go either way for ever.
fn append(lab: &mut Lab) {
    lab.watch();
    lab.write(A, 0, FEW);
    lab.settle();
}

/// A block that was never written before.
fn extend(lab: &mut Lab) {
    lab.watch();
    lab.write(A, 1, FEW);
    lab.settle();
    written_back(lab);
}

#[test]
fn a_log_write_is_durable_before_its_operation_is_answered() {
    dropped(Kind::Append, overwritten, append, Violation::Lost);
}

#[test]
fn a_commit_is_durable_before_its_data_goes_in_place() {
    dropped(Kind::Commit, overwritten, overwrite, Violation::AheadOfLog);
}

#[test]
fn data_is_durable_before_its_pages_are_written() {
    dropped(Kind::DataSync, overwritten, overwrite, Violation::AheadOfData);
}

#[test]
fn pages_are_durable_before_the_checkpoint() {
    dropped(Kind::PagesSync, overwritten, extend, Violation::Lost);
}

#[test]
fn a_checkpoint_is_durable_before_a_slot_is_used_again() {
    // The log misses a record it called durable, before replay could miss the slot.
    dropped(Kind::Checkpoint, delete_and_reuse, reuse, Violation::Rot);
}

#[test]
fn start_up_syncs_before_it_reads() {
    // What was replayed is lost, and the log says that a record is missing.
    dropped(Kind::BootSync, overwritten, killed, Violation::Rot);
}

#[test]
fn a_page_never_overwrites_its_valid_copy() {
    let mut lab = overwritten();
    lab.one_copy = true;
    extend(&mut lab);
    assert!(lab.found.contains(&Violation::Rot), "{:?}", lab.found);
}
