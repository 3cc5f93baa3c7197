//! Every way to run out of something, and that it ends.

use super::model::{Model, stamps};
use super::world::{Setup, World};
use crate::io::Op;
use crate::shard::request::{AdminOp, ChunkOp, Outcome, RequestOp};
use raftlog::{BLOCK, CopysetId};

const A: CopysetId = CopysetId::new(1, 1);
const B: CopysetId = CopysetId::new(1, 2);

fn world(setup: Setup, seed: u64) -> World {
    let mut world = World::new(setup, seed);
    world.boot();
    for id in [A, B] {
        world.create(id);
    }
    world
}

/// Writes of `blocks` blocks, `depth` at a time, `count` in all; every one succeeds.
fn pour(world: &mut World, blocks: u32, depth: usize, count: u64) {
    let mut sent = 0;
    while sent < count {
        let per_chunk = u64::from(world.blocks() / blocks);
        let (chunk, first) = (sent / per_chunk % 4, (sent % per_chunk) as u32 * blocks);
        if world.owed.len() < depth && world.write(A, chunk, first, blocks, sent + 1).is_some() {
            sent += 1;
            continue;
        }
        if world.owed.len() < depth {
            world.shard().want_memory();
        }
        world.step();
    }
    world.settle();
    assert!(world.replies.drain(..).all(|r| r.outcome == Outcome::Success));
}

#[test]
fn a_log_of_three_segments_takes_writes_of_a_whole_chunk_beside_an_idle_copyset() {
    for segment in [80 << 10, 100 << 10, 160 << 10] {
        let mut world = world(Setup { segment, segments: 3, flush_age_ms: 100_000, ..Setup::default() }, segment);
        pour(&mut world, 16, 6, 60);
        pour(&mut world, 9, 6, 60);
        pour(&mut world, 1, 6, 60);
        pour(&mut world, 16, 6, 60);
        assert!(world.now.0 < 60_000_000_000, "it waits for deadlines instead of events: {:?}", world.now);
    }
}

#[test]
fn writes_that_wait_for_the_log_or_memory_go_on_when_a_round_ends_not_at_a_deadline() {
    for (dirty_limit, segment) in [(16 << 10, 512 << 10), (2 << 20, 96 << 10)] {
        let setup = Setup { segment, segments: 3, dirty_limit, flush_age_ms: 100_000, ..Setup::default() };
        let mut world = world(setup, 3);
        let before = world.now;
        pour(&mut world, 2, 32, 400);
        // A turn takes 10 us; waits for a deadline would be 100 ms each.
        assert!(world.now.since_ns(before) < 200_000_000, "{:?}", world.now.since_ns(before));
    }
}

#[test]
fn many_writes_in_flight_to_one_copyset_wait_and_are_not_refused() {
    let setup = Setup {
        payload_arena: 64 << 20,
        dirty_limit: 48 << 20,
        segment: 4 << 20,
        segments: 8,
        size: 48 << 20,
        ..Setup::default()
    };
    let mut world = world(setup, 1);
    for n in 0..7000u32 {
        world.write(A, u64::from(n / 16 % 8), n % 16, 1, u64::from(n)).expect("the arena holds them all");
    }
    world.settle();
    assert!(world.replies.iter().all(|r| r.outcome == Outcome::Success));
}

#[test]
fn a_configuration_nobody_can_encode_is_refused() {
    let mut world = world(Setup::default(), 1);
    let peers: Vec<u64> = (1..=100).collect();
    let slot = world.ask(CopysetId::new(1, 9), RequestOp::Admin(AdminOp::CreateCopyset { peers }));
    assert_eq!(world.outcome_of(slot), Outcome::Invalid);
}

#[test]
fn reads_without_buffers_wait_and_come_back() {
    let mut world = world(Setup { flush_age_ms: 1, ..Setup::default() }, 2);
    pour(&mut world, 16, 4, 8);
    for _ in 0..2000 {
        world.step(); // written back
    }
    let read = ChunkOp::Read { offset: 0, len: 16 * BLOCK as u32 };
    // Somebody on another thread holds nearly all buffers, and drops them without a word.
    let work = world.arenas.work.clone();
    let held: Vec<_> = std::iter::from_fn(|| work.alloc(BLOCK).map(crate::io::buffer::PoolBuf::freeze)).collect();
    let slots: Vec<u32> = (0..20).map(|_| world.chunk(A, 0, read.clone())).collect();
    for _ in 0..50 {
        world.step();
    }
    assert_eq!(world.owed.len(), 20);
    std::thread::spawn(move || drop(held)).join().unwrap();
    for slot in slots {
        let reply = world.answer(slot);
        assert_eq!((reply.outcome, stamps(&reply.data).len()), (Outcome::Success, 16));
    }
    world.settle();
    assert_eq!(work.free_bytes(), work.size());
}

#[test]
fn log_headers_and_pages_without_buffers_wait_and_come_back() {
    let mut world = world(Setup { flush_age_ms: 1, ..Setup::default() }, 2);
    let work = world.arenas.work.clone();
    let mut held = Vec::new();
    for n in 0..40 {
        let slot = world.write(A, n % 4, 0, 1, n + 1).unwrap();
        while world.replies.is_empty() && world.in_flight() + held.len() < 1 {
            world.step();
        }
        held.extend(std::iter::from_fn(|| work.alloc(BLOCK)));
        for _ in 0..30 {
            world.step();
        }
        held.clear();
        assert_eq!(world.outcome_of(slot), Outcome::Success);
    }
    world.settle();
}

#[test]
fn a_full_pool_refuses_new_chunks_only_and_deletes_make_room() {
    let mut world = world(Setup { size: 5 << 20, flush_age_ms: 1, ..Setup::default() }, 5);
    let mut chunks = 0;
    loop {
        let slot = world.write(A, chunks, 0, 1, chunks + 1).unwrap();
        match world.outcome_of(slot) {
            Outcome::Success => chunks += 1,
            Outcome::NoSpace => break,
            other => panic!("{other:?}"),
        }
    }
    assert!(chunks > 4);
    let slot = world.write(A, 0, 1, 1, 77).unwrap();
    assert_eq!(world.outcome_of(slot), Outcome::Success, "overwrites go on");
    let slot = world.chunk(A, 1, ChunkOp::Delete { sn: 1 });
    assert_eq!(world.outcome_of(slot), Outcome::Success);
    for _ in 0..3000 {
        let slot = world.write(B, 1000, 0, 1, 99).unwrap();
        if world.outcome_of(slot) == Outcome::Success {
            return;
        }
        world.step();
    }
    panic!("the slot of a deleted chunk never comes back: {}", world.describe());
}

#[test]
fn slots_of_a_purged_copyset_come_back_though_nothing_else_happens() {
    for seed in 0..4 {
        let mut world = world(Setup::default(), seed);
        let free = |world: &mut World| world.shard().status().slots_unclaimed;
        let all = free(&mut world);
        for chunk in 0..5 {
            let slot = world.write(A, chunk, 0, 1, 7 + chunk).unwrap();
            assert_eq!(world.outcome_of(slot), Outcome::Success);
        }
        world.settle();
        assert!(free(&mut world) < all);
        let gone = world.ask(A, RequestOp::Admin(AdminOp::DeleteCopyset));
        assert_eq!(world.outcome_of(gone), Outcome::Success);
        world.now = world.now.after_ms(2_000);
        world.turn();
        world.settle();
        assert_eq!(free(&mut world), all, "{}", world.describe());
    }
}

#[test]
fn copysets_deleted_and_created_again_under_load() {
    for seed in 0..6 {
        let mut world = world(Setup { segments: 3, flush_age_ms: 1, ..Setup::default() }, seed);
        for round in 0..30u64 {
            let writes: Vec<u32> =
                (0..12).filter_map(|n| world.write(A, n % 3, n as u32, 1, round * 100 + n)).collect();
            for _ in 0..world.rng.below(40) {
                world.step();
            }
            let gone = world.ask(A, RequestOp::Admin(AdminOp::DeleteCopyset));
            assert_eq!(world.outcome_of(gone), Outcome::Success);
            for slot in writes {
                assert!(matches!(world.outcome_of(slot), Outcome::Success | Outcome::NoCopyset | Outcome::NotLeader));
            }
            world.create(A);
            let read = world.chunk(A, 0, ChunkOp::Read { offset: 0, len: BLOCK as u32 });
            assert_eq!(world.outcome_of(read), Outcome::NoChunk, "a copyset inherits nothing");
            if world.rng.one_in(4) {
                world.crash();
                world.boot();
                world.settle();
            }
            world.replies.clear();
        }
    }
}

#[test]
fn a_drain_ends_although_the_log_has_no_room() {
    let mut world = world(Setup { segments: 3, segment: 96 << 10, ..Setup::default() }, 4);
    for n in 0..40 {
        world.write(A, n % 4, 0, 16, n + 1).unwrap();
    }
    let before = world.now;
    world.restart();
    assert!(world.now.since_ns(before) < 400_000_000);
    assert!(world.replies.iter().any(|r| r.outcome == Outcome::Stopping));
    world.boot();
}

#[test]
fn a_failed_device_read_is_that_requests_failure() {
    let mut world = world(Setup { flush_age_ms: 1, ..Setup::default() }, 6);
    pour(&mut world, 1, 4, 16);
    for _ in 0..1000 {
        world.step();
    }
    world.read_errors = Some(1);
    let read = ChunkOp::Read { offset: 0, len: BLOCK as u32 };
    let slot = world.chunk(A, 0, read.clone());
    assert_eq!(world.outcome_of(slot), Outcome::DiskFail);
    world.read_errors = None;
    let slot = world.chunk(A, 0, read);
    assert_eq!(world.outcome_of(slot), Outcome::Success);
}

#[test]
fn nothing_is_answered_before_its_log_write_and_no_slot_is_written_before_a_durable_commit() {
    let mut world = world(Setup { flush_age_ms: 1, ..Setup::default() }, 8);
    let slot = world.write(A, 0, 0, 1, 5).unwrap();
    for _ in 0..50 {
        world.turn();
    }
    assert_eq!((world.flights_by_kind(), world.replies.len()), ([1, 0, 0, 0], 0));
    assert!(world.complete_kind(|op| matches!(op, Op::Write { dsync: true, .. })));
    world.turn();
    assert_eq!(world.replies.pop().unwrap().origin.slot, slot);
    // Due by age: first the commit record, alone, then data, a sync, pages, a sync, and the checkpoint.
    world.now = world.now.after_ms(5);
    let mut kinds = Vec::new();
    for _ in 0..100 {
        world.turn();
        let now = world.flights_by_kind();
        let kind = now.iter().position(|&n| n > 0);
        assert!(now.iter().filter(|&&n| n > 0).count() <= 1, "{now:?}");
        let Some(kind) = kind else { break };
        if kinds.last() != Some(&kind) {
            kinds.push(kind);
        }
        world.complete(0);
    }
    assert_eq!(kinds, [0, 1, 2, 1, 2, 0]);
}

#[test]
fn reads_stay_exact_when_blocks_change_under_them() {
    let mut world = world(Setup { flush_age_ms: 1, dirty_limit: 32 << 10, ..Setup::default() }, 9);
    let mut model = Model::default();
    for _ in 0..20_000 {
        if world.owed.len() < 24 && world.rng.one_in(2) {
            model.ask(&mut world, &[A], 1);
        } else {
            world.step();
            model.take_replies(&mut world);
        }
    }
    world.settle();
    model.take_replies(&mut world);
    assert!(model.reads > 1000);
}

#[test]
fn a_copyset_whose_log_is_rotten_is_out_of_service_alone_and_can_be_deleted() {
    for in_front in [false, true] {
        let mut world = world(Setup { segments: 3, flush_age_ms: 1_000_000, ..Setup::default() }, 11);
        for n in 0..4 {
            let (a, b) = (world.write(A, 0, n, 1, 70 + u64::from(n)).unwrap(), world.write(B, 0, n, 1, 80).unwrap());
            assert_eq!((world.outcome_of(a), world.outcome_of(b)), (Outcome::Success, Outcome::Success));
        }
        world.now = world.now.after_ms(2_000);
        world.turn();
        world.settle(); // sealed
        world.rot(71, in_front);
        world.crash();
        world.boot();
        let read = |world: &mut World, id| {
            for _ in 0..100 {
                world.step();
            }
            let slot = world.chunk(id, 0, ChunkOp::Read { offset: 0, len: BLOCK as u32 });
            world.outcome_of(slot)
        };
        assert_eq!(read(&mut world, A), Outcome::CrcFail);
        if !in_front {
            assert_eq!(read(&mut world, B), Outcome::Success);
        }
        // It keeps the log from being freed: others are refused at the end, they do not wait for ever.
        let mut last = Outcome::Success;
        const C: CopysetId = CopysetId::new(1, 3);
        world.create(C);
        for n in 0..400 {
            let slot = world.write(C, 0, n % 16, 1, 5000 + u64::from(n)).unwrap();
            last = world.outcome_of(slot);
        }
        assert_eq!(last, Outcome::DiskFail);
        for id in [A, B] {
            let slot = world.ask(id, RequestOp::Admin(AdminOp::DeleteCopyset));
            assert_eq!(world.outcome_of(slot), Outcome::Success);
        }
        for n in 0..400 {
            let slot = world.write(C, 0, n % 16, 1, 9000 + u64::from(n)).unwrap();
            last = world.outcome_of(slot);
        }
        assert_eq!(last, Outcome::Success);
    }
}

/// The batch that created a copyset is lost, nothing else speaks of it but its chunks, and all that shows the loss is
/// released: it is out of service still, and keeps its slots, until it is deleted.
#[test]
fn a_copyset_that_the_log_forgot_stays_out_of_service() {
    for seed in 0..4 {
        let mut world = world(Setup { segments: 4, flush_age_ms: 1, ..Setup::default() }, seed);
        let slot = world.write(A, 0, 0, 1, 71).unwrap();
        assert_eq!(world.outcome_of(slot), Outcome::Success);
        world.now = world.now.after_ms(2_000);
        world.turn();
        world.settle();
        world.rot_batches_of(A);
        world.crash();
        world.boot();
        const C: CopysetId = CopysetId::new(1, 3);
        world.create(C);
        let read = |world: &mut World| {
            let slot = world.chunk(A, 0, ChunkOp::Read { offset: 0, len: BLOCK as u32 });
            world.outcome_of(slot)
        };
        for life in 0..3 {
            assert_eq!(read(&mut world), Outcome::CrcFail, "life {life}");
            for n in 0..400 {
                let slot = world.write(C, 0, n % 16, 1, 5000 + u64::from(n)).unwrap();
                assert_eq!(world.outcome_of(slot), Outcome::Success, "its mark moves on with the log");
            }
            world.settle();
            world.crash();
            world.boot();
            world.settle();
        }
        let used = world.shard().status().slots_unclaimed;
        let gone = world.ask(A, RequestOp::Admin(AdminOp::DeleteCopyset));
        assert_eq!(world.outcome_of(gone), Outcome::Success);
        world.now = world.now.after_ms(2_000);
        world.turn();
        world.settle();
        assert!(world.shard().status().slots_unclaimed >= used);
        world.create(A);
        assert_eq!(read(&mut world), Outcome::NoChunk);
    }
}
