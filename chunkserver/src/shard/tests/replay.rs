//! The replay after a restart: few large reads, whatever fails, and never more than its memory.

use super::model::stamps;
use super::world::{Setup, World};
use crate::shard::request::{ChunkOp, Outcome};
use raftlog::{BLOCK, CopysetId};

const COPYSETS: [CopysetId; 3] = [CopysetId::new(1, 1), CopysetId::new(1, 2), CopysetId::new(1, 3)];
const CHUNKS: u64 = 4;
const BLOCKS: u32 = 8;

/// A disk whose log holds `writes` writes of one block each, of three copysets in turn, that are on no slot yet; power
/// is lost, and start-up has only to replay.
fn replaying(setup: &Setup, writes: u64) -> World {
    let mut world = World::new(Setup { flush_age_ms: 100_000, ..setup.clone() }, 7);
    world.boot();
    COPYSETS.iter().for_each(|&id| world.create(id));
    for stamp in 1..=writes {
        let (copyset, chunk, block) = place(stamp);
        let slot = world.write(copyset, chunk, block, 1, stamp).expect("a buffer");
        assert_eq!(world.outcome_of(slot), Outcome::Success);
    }
    world.crash();
    world
}

fn place(stamp: u64) -> (CopysetId, u64, u32) {
    let (copyset, at) = (COPYSETS[(stamp % 3) as usize], stamp / 3);
    (copyset, at % CHUNKS, (at / CHUNKS) as u32 % BLOCKS)
}

/// Every block holds what was written to it last.
fn check(world: &mut World, writes: u64) {
    for stamp in (1..=writes).rev().take((3 * CHUNKS * u64::from(BLOCKS)) as usize) {
        let (copyset, chunk, block) = place(stamp);
        let read = ChunkOp::Read { offset: block * BLOCK as u32, len: BLOCK as u32 };
        let slot = world.chunk(copyset, chunk, read);
        let reply = world.answer(slot);
        assert_eq!((reply.outcome, stamps(&reply.data)), (Outcome::Success, vec![stamp]));
    }
}

fn roomy() -> Setup {
    let setup = Setup { size: 24 << 20, segment: 1 << 20, segments: 8, ..Setup::default() };
    Setup { payload_arena: 8 << 20, work_arena: 16 << 20, dirty_limit: 2 << 20, ..setup }
}

#[test]
fn the_log_is_read_in_pieces_not_entry_by_entry() {
    let writes = 300;
    let mut world = replaying(&roomy(), writes);
    world.reads = 0;
    world.boot();
    let zone_in_pieces = 8 + 8; // of the recovery and of the replay
    assert!(world.reads < 2 * zone_in_pieces + 8, "{} reads for {writes} entries", world.reads);
    check(&mut world, writes);
}

#[test]
fn pieces_that_cannot_be_read_are_only_a_short_cut() {
    let mut world = replaying(&roomy(), 200);
    world.read_errors = Some(3);
    world.boot();
    world.read_errors = None;
    check(&mut world, 200);
}

#[test]
fn a_replay_beyond_the_dirty_limit_ends_with_little_memory() {
    // No room for a piece; for one; for some.
    for work_arena in [2 << 20, 5 << 20, 16 << 20] {
        let mut world = replaying(&Setup { work_arena, ..roomy() }, 200);
        world.setup.dirty_limit = 64 << 10; // less than what waits: the replay has to write back
        world.crash();
        world.boot();
        check(&mut world, 200);
    }
}
