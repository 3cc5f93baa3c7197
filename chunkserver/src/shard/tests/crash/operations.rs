//! One operation each, watched from its start until it is checkpointed.

use super::lab::{Kind, Lab, Setup};

pub(super) const A: u64 = 1;
pub(super) const B: u64 = 2;
const ALL: &[usize] = &[0, 1, 2, 3, 4, 5, 6, 7];
/// Sectors that make a block tear, and leave few images.
pub(super) const FEW: &[usize] = &[0, 5];
const ONE: &[usize] = &[3];

/// Four slots of a size at which a CRC page is one, its sectors several.
pub(super) fn small(slots: u64) -> Lab {
    Lab::new(Setup::new(1 << 20, slots))
}

/// A round from its start to its end.
pub(super) fn written_back(lab: &mut Lab) {
    lab.round();
    lab.settle();
}

fn first_write() -> Lab {
    let mut lab = small(4);
    lab.watch();
    lab.write(A, 0, ALL);
    lab.settle();
    written_back(&mut lab);
    lab
}

/// Two blocks whose checksums lie in two sectors of their page; the page and its metapage are of the third generation.
pub(super) fn overwritten() -> Lab {
    let mut lab = small(4);
    for _ in 0..2 {
        lab.write(A, 0, FEW);
        lab.write(A, 200, FEW);
        lab.settle();
        written_back(&mut lab);
    }
    lab
}

pub(super) fn overwrite(lab: &mut Lab) {
    lab.watch();
    lab.write(A, 0, FEW);
    lab.write(A, 200, ONE);
    lab.settle();
    written_back(lab);
}

/// What is written during a round belongs to the next one.
fn overwrite_during_a_round(lab: &mut Lab) {
    lab.write(A, 0, FEW);
    lab.settle();
    lab.round();
    lab.watch();
    lab.until(Kind::Data);
    lab.write(A, 0, ONE);
    lab.write(B, 0, ONE);
    lab.settle();
    written_back(lab);
}

fn zero(lab: &mut Lab) {
    lab.watch();
    lab.zero(A, 0);
    lab.settle();
    written_back(lab);
    lab.write(A, 0, ONE);
    lab.zero(A, 200);
    lab.settle();
    written_back(lab);
}

/// The only slot goes from one chunk to another.
pub(super) fn delete_and_reuse() -> Lab {
    let mut lab = small(1);
    lab.write(A, 0, FEW);
    lab.write(A, 200, ONE);
    lab.settle();
    written_back(&mut lab);
    lab
}

pub(super) fn reuse(lab: &mut Lab) {
    lab.watch();
    lab.delete(A);
    lab.settle();
    written_back(lab);
    lab.write(B, 1, FEW);
    lab.settle();
    written_back(lab);
    lab.write(B, 0, ONE);
    lab.settle();
    written_back(lab);
}

/// Two lives of a chunk in one round, in two slots: the end of one and the beginning of the other are not ordered.
fn delete_and_create_again(lab: &mut Lab) {
    lab.watch();
    lab.delete(A);
    lab.write(A, 1, FEW);
    lab.settle();
    written_back(lab);
}

/// Chunks so large that bitmap and checksums spread over sectors and pages.
fn large() -> Lab {
    let mut lab = Lab::new(Setup::new(16 << 20, 2));
    for _ in 0..2 {
        lab.write(A, 0, ONE);
        lab.settle();
        written_back(&mut lab);
    }
    lab
}

fn write_back_of_wide_pages(lab: &mut Lab) {
    lab.watch();
    lab.write(A, 0, ONE);
    lab.write(A, 3300, ONE);
    lab.settle();
    written_back(lab);
    lab.write(A, 3300, ONE);
    lab.zero(A, 0);
    lab.settle();
    written_back(lab);
}

/// The process dies with a write under way; the next one finds it in the drive's cache, goes on, and power is cut.
pub(super) fn killed(lab: &mut Lab) {
    lab.write(A, 0, ONE);
    lab.kill();
    lab.watch();
    lab.write(A, 200, ONE);
    lab.settle();
    written_back(lab);
}

/// Every image of one operation is recovered.
fn enumerate(name: &str, setup: fn() -> Lab, operation: fn(&mut Lab)) {
    let mut lab = setup();
    operation(&mut lab);
    println!("{name}: {} images, up to {} free sectors", lab.images, lab.free_most);
    assert!(lab.images > 10, "nothing was looked at");
}

#[test]
fn a_slot_is_taken_and_written_first() {
    enumerate("take slot, first write", first_write, |_| ());
}

#[test]
fn blocks_are_overwritten() {
    enumerate("overwrite", overwritten, overwrite);
}

#[test]
fn blocks_are_overwritten_during_a_round() {
    enumerate("overwrite during a round", overwritten, overwrite_during_a_round);
}

#[test]
fn blocks_are_zeroed_and_written_again() {
    enumerate("zero, write again", overwritten, zero);
}

#[test]
fn the_only_slot_is_freed_and_taken_again() {
    enumerate("delete, reuse of the slot", delete_and_reuse, reuse);
}

#[test]
fn a_chunk_is_deleted_and_created_in_one_round() {
    enumerate("delete, create again in one round", overwritten, delete_and_create_again);
}

#[test]
fn checksums_and_bitmap_spread_over_pages_and_sectors() {
    enumerate("wide pages", large, write_back_of_wide_pages);
}

#[test]
fn the_process_is_killed_and_power_is_cut_later() {
    enumerate("killed, then power cut", overwritten, killed);
}
