//! An operator's word: the replica that is left is the only voter, replicas taken out of the trash; with crashes around it.

use super::changes::{self, cluster};
use super::cluster::{Cluster, peer};
use super::mend;
use super::model::stamps;
use super::world::{Setup, World};
use crate::shard::request::{AdminOp, ChunkOp, MemberOp, Outcome, Reply, ReplyData, RequestOp};
use crate::shard::throttle::Throttle;
use raftlog::{BLOCK, CopysetId};

const ID: CopysetId = changes::ID;

fn admin(op: AdminOp) -> RequestOp {
    RequestOp::Admin(op)
}

fn reset(nodes: &[usize]) -> RequestOp {
    admin(AdminOp::Members(MemberOp::Reset(nodes.iter().map(|&n| peer(n)).collect())))
}

fn voters(c: &mut Cluster, node: usize, id: CopysetId) -> Vec<u64> {
    c.status(node, id).expect("it is there").peers
}

fn write(c: &mut Cluster, node: usize, id: CopysetId, chunk: u64, first: u32, stamp: u64) -> Outcome {
    let slot = c.nodes[node].write(id, chunk, first, 1, stamp).expect("a buffer");
    c.answer(node, slot).outcome
}

fn read(c: &mut Cluster, node: usize, id: CopysetId, chunk: u64, blocks: u32) -> Reply {
    let op = ChunkOp::Read { offset: 0, len: blocks * BLOCK as u32 };
    c.ask(node, id, RequestOp::Chunk { chunk, op })
}

/// Blocks of two chunks, as the survivor must know them.
fn holds(c: &mut Cluster, node: usize) {
    for chunk in 0..2 {
        let reply = read(c, node, ID, chunk, 8);
        assert_eq!(reply.outcome, Outcome::Success);
        assert_eq!(stamps(&reply.data), (0..8).map(|block| 100 + chunk * 8 + block).collect::<Vec<u64>>());
    }
}

/// Three voters of which two are gone; all that was answered is on the third, which may not know that it is committed.
fn last_of_three(seed: u64) -> (Cluster, usize) {
    let mut c = cluster(3, &[0, 1, 2], &Setup::default(), seed);
    let leader = c.wait_leader(ID);
    let (survivor, other) = ((leader + 1) % 3, (leader + 2) % 3);
    c.isolate(other);
    for n in 0..16 {
        assert_eq!(write(&mut c, leader, ID, n / 8, (n % 8) as u32, 100 + n), Outcome::Success);
    }
    c.kill(leader);
    c.kill(other);
    c.cut.clear();
    (c, survivor)
}

#[test]
fn the_last_of_three_leads_alone_and_others_join_it() {
    for seed in 0..6 {
        let (mut c, node) = last_of_three(seed);
        c.until("it does not lead", |c| c.leader(ID).is_none());
        let before = c.status(node, ID).unwrap();
        assert_eq!(c.ask(node, ID, reset(&[])).outcome, Outcome::Invalid);
        for others in [vec![0, 1, 2], vec![(node + 1) % 3], vec![node, (node + 1) % 3]] {
            assert_eq!(c.ask(node, ID, reset(&others)).outcome, Outcome::Invalid, "itself, or nobody");
        }
        assert_eq!(c.status(node, ID).unwrap().term, before.term);
        let unknown = CopysetId::new(1, 99);
        assert_eq!(c.ask(node, unknown, reset(&[node])).outcome, Outcome::NoCopyset);
        assert_eq!(c.ask(node, ID, reset(&[node])).outcome, Outcome::Success);
        assert_eq!(c.wait_leader(ID), node);
        let after = c.status(node, ID).unwrap();
        assert_eq!((after.peers, after.term > before.term + 1), (vec![peer(node)], true));
        assert!(after.epoch > before.epoch + 1);
        holds(&mut c, node);
        assert_eq!(write(&mut c, node, ID, 5, 0, 7), Outcome::Success);
        c.kill(node);
        c.start(node);
        assert_eq!(c.wait_leader(ID), node);
        holds(&mut c, node);
        // New machines in the place of the others.
        for gone in [(node + 1) % 3, (node + 2) % 3] {
            c.replace(gone, Setup { peer: peer(gone), ..Setup::default() });
            let empty = c.ask(gone, ID, admin(AdminOp::CreateCopyset { peers: vec![] }));
            assert_eq!(empty.outcome, Outcome::Success);
            assert_eq!(c.ask(gone, ID, reset(&[gone])).outcome, Outcome::NotLeader, "nothing there could count");
            let added = c.ask(node, ID, admin(AdminOp::Members(MemberOp::Add(peer(gone)))));
            assert_eq!(added.outcome, Outcome::Success, "{}", c.describe());
        }
        c.quiesce(&[ID]);
        c.compare(ID, 6);
        assert_eq!(voters(&mut c, node, ID).len(), 3);
        let leader = c.wait_leader(ID);
        holds(&mut c, leader);
    }
}

#[test]
fn a_crash_on_the_way_leaves_the_old_voters_or_the_forced_ones() {
    let mut seen = [0; 2];
    for seed in 0..40 {
        let (mut c, node) = last_of_three(seed);
        c.nodes[node].ask(ID, reset(&[node]));
        for _ in 0..c.rng.below(60) {
            c.step();
        }
        c.kill(node);
        c.start(node);
        c.until("it serves", |c| c.nodes[node].shard().serving());
        let forced = voters(&mut c, node, ID) == [peer(node)];
        seen[usize::from(forced)] += 1;
        assert_eq!(c.ask(node, ID, reset(&[node])).outcome, Outcome::Success);
        assert_eq!(c.wait_leader(ID), node);
        holds(&mut c, node);
    }
    assert!(seen.iter().all(|&n| n > 4), "{seen:?}");
}

#[test]
fn a_leader_with_writes_under_way_is_reset_too() {
    let mut c = cluster(3, &[0, 1, 2], &Setup::default(), 3);
    let leader = c.wait_leader(ID);
    assert_eq!(write(&mut c, leader, ID, 0, 0, 1), Outcome::Success);
    c.isolate(leader);
    let pending = c.nodes[leader].write(ID, 0, 1, 1, 2).expect("a buffer");
    let change = c.nodes[leader].ask(ID, admin(AdminOp::Members(MemberOp::Add(peer(9)))));
    assert_eq!(c.ask(leader, ID, reset(&[leader])).outcome, Outcome::Busy, "while it leads and a change is under way");
    c.until("it leads no more", |c| !c.nodes[leader].shard().leads(ID));
    let first = c.nodes[leader].ask(ID, reset(&[leader]));
    assert_eq!(c.ask(leader, ID, reset(&[leader])).outcome, Outcome::Busy);
    assert_eq!(
        c.ask(leader, ID, admin(AdminOp::DeleteCopyset)).outcome,
        Outcome::Failed,
        "nor is it deleted meanwhile"
    );
    assert_eq!(c.answer(leader, first).outcome, Outcome::Success);
    assert_eq!(c.answer(leader, pending).outcome, Outcome::NotLeader);
    assert_eq!(c.answer(leader, change).outcome, Outcome::NotLeader);
    c.until("it leads alone", |c| c.nodes[leader].shard().leads(ID));
    let reply = read(&mut c, leader, ID, 0, 2);
    assert_eq!(stamps(&reply.data), [1, 2], "what was in its log is kept, answered or not");
    assert_eq!(voters(&mut c, leader, ID), [peer(leader)], "the change in its log does not count");
    assert_eq!(c.nodes[leader].shard().in_flight_bytes, 0);
}

#[test]
fn a_suspect_whose_voters_are_gone_serves_again() {
    for (seed, in_front) in (0..6).flat_map(|seed| [(seed, true), (seed, false)]) {
        let mut c = Cluster::new(3, &Setup { flush_age_ms: 1, ..Setup::default() }, seed);
        // Another copyset, whose records keep the segment that what is lost is in.
        let other = CopysetId::new(1, 8);
        c.create(other, &[0, 1, 2]);
        let lead = c.wait_leader(other);
        assert_eq!(write(&mut c, lead, other, 0, 0, 1), Outcome::Success);
        let leader = mend::fill(&mut c);
        let node = (leader + 1) % 3;
        let sealed = c.now.after_ms(3_000);
        c.until("the logs are sealed", |c| c.now >= sealed);
        (0..3).for_each(|n| c.kill(n));
        c.nodes[node].rot(12, in_front);
        c.start(node);
        c.until("it serves", |c| c.nodes[node].shard().serving());
        let lost = c.nodes[node].shard().groups[&mend::ID].raft.is_suspect();
        assert!(lost, "seed {seed}: nobody can tell it what it lost");
        for _ in 0..2_000 {
            c.step();
        }
        assert!(c.nodes[node].shard().groups[&mend::ID].raft.is_suspect());
        assert_eq!(c.ask(node, mend::ID, reset(&[node])).outcome, Outcome::Success);
        for _ in 0..2 {
            assert_eq!(c.wait_leader(mend::ID), node);
            let group = &c.nodes[node].shard().groups[&mend::ID];
            assert!(!group.raft.is_suspect() && !group.damaged);
            // What is known to be lost is refused, and nothing else.
            let reply = read(&mut c, node, mend::ID, mend::CHUNK, 1);
            let right = reply.outcome == Outcome::Success && stamps(&reply.data) == [11];
            assert!(right || reply.outcome == Outcome::CrcFail, "{reply:?}");
            assert_eq!(write(&mut c, node, mend::ID, 9, 0, 5), Outcome::Success);
            assert_eq!(stamps(&read(&mut c, node, mend::ID, 9, 1).data), [5]);
            c.kill(node);
            c.start(node); // with what rotted still in its log
        }
    }
}

fn delete(c: &mut Cluster, node: usize, chunk: u64) -> Outcome {
    c.ask(node, ID, RequestOp::Chunk { chunk, op: ChunkOp::Delete { sn: 1 } }).outcome
}

/// What each chunk holds there; `None` where nothing is.
fn contents(c: &mut Cluster, node: usize, chunks: u64) -> Vec<Option<Vec<u64>>> {
    let blocks = c.nodes[node].blocks();
    let look = |chunk| {
        let reply = read(c, node, ID, chunk, blocks);
        (reply.outcome == Outcome::Success).then(|| stamps(&reply.data))
    };
    (0..chunks).map(look).collect()
}

/// A follower that has `before` and is about to be fed what became of it; who leads, and the follower.
fn left_behind(c: &mut Cluster) -> (usize, usize, Vec<Option<Vec<u64>>>) {
    let (leader, mut stamp) = (c.wait_leader(ID), 0);
    let node = (leader + 1) % 3;
    changes::fill(c, 6, 100 << 10, &mut stamp);
    c.quiesce(&[ID]);
    let before = contents(c, leader, 6);
    c.isolate(node);
    let last = c.status(node, ID).unwrap().last;
    while changes::first_index(c, leader) <= last + 1 {
        changes::fill(c, 6, 64 << 10, &mut stamp);
    }
    (leader, node, before)
}

fn only(c: &mut Cluster, node: usize) {
    [(node + 1) % 3, (node + 2) % 3].into_iter().for_each(|gone| c.kill(gone));
    c.cut.clear();
}

#[test]
fn what_was_fed_from_beyond_the_log_hides_nothing_that_follows() {
    for seed in 0..6 {
        let mut c = cluster(3, &[0, 1, 2], &Setup { flush_age_ms: 1, ..Setup::default() }, seed);
        let (leader, node, _) = left_behind(&mut c);
        // Chunk 2 is of another life, chunk 3 is gone, chunk 77 is new.
        for gone in [2, 3] {
            assert_eq!(delete(&mut c, leader, gone), Outcome::Success);
        }
        for (chunk, stamp) in [(2, 9002), (77, 9077)] {
            assert_eq!(write(&mut c, leader, ID, chunk, 0, stamp), Outcome::Success);
        }
        c.cut.clear();
        let fed = |c: &mut Cluster| c.nodes[node].shard().store.chunk_info(ID, 77).is_some_and(|info| info.applied > 0);
        c.until("all is fed", fed);
        only(&mut c, node);
        let last = c.status(node, ID).unwrap().last;
        assert!(c.nodes[node].shard().store.chunk_info(ID, 77).unwrap().created > last, "the log does not know of it");
        let replayed = seed % 2 == 1;
        if replayed {
            let clean = |c: &mut Cluster| c.nodes[node].shard().store.oldest_dirty_ns().is_none();
            c.until("it is on the slots", clean);
            c.kill(node);
            c.start(node);
            c.until("it serves", |c| c.nodes[node].shard().serving());
        }
        assert_eq!(c.ask(node, ID, reset(&[node])).outcome, Outcome::Success);
        assert_eq!(c.wait_leader(ID), node);
        assert_eq!(stamps(&read(&mut c, node, ID, 77, 1).data), [9077], "what was fed is kept");
        // What the log has of chunk 1 is older than what was fed: replay has made a mixture of it.
        let mixed = read(&mut c, node, ID, 1, 1).outcome == Outcome::CrcFail;
        assert_eq!(mixed, replayed);
        if mixed {
            assert_eq!(delete(&mut c, node, 1), Outcome::Success);
        }
        for (chunk, stamp) in [(77, 7), (3, 8), (1, 9)] {
            assert_eq!(write(&mut c, node, ID, chunk, 1, stamp), Outcome::Success);
        }
        for chunk in [2, 0] {
            assert_eq!(delete(&mut c, node, chunk), Outcome::Success);
        }
        for round in 0..3 {
            assert_eq!(stamps(&read(&mut c, node, ID, 77, 2).data), [9077, 7], "seed {seed}, {round}");
            let third = stamps(&read(&mut c, node, ID, 3, 2).data);
            assert!(third[1] == 8 && (replayed || third[0] == 0), "seed {seed}, {round}: {third:?}");
            assert_eq!(stamps(&read(&mut c, node, ID, 1, 2).data)[1], 9, "seed {seed}, {round}");
            for chunk in [2, 0] {
                assert_eq!(read(&mut c, node, ID, chunk, 1).outcome, Outcome::NoChunk, "seed {seed}, {round}");
            }
            if round == 1 {
                let clean = |c: &mut Cluster| c.nodes[node].shard().store.oldest_dirty_ns().is_none();
                c.until("it is on the slots", clean);
            }
            c.kill(node);
            c.start(node);
            assert_eq!(c.wait_leader(ID), node);
        }
    }
}

#[test]
fn a_mixture_of_two_states_is_never_served() {
    let mut refused = 0;
    for seed in 0..10 {
        let mut c = cluster(3, &[0, 1, 2], &Setup { flush_age_ms: 1, ..Setup::default() }, seed);
        let (leader, node, before) = left_behind(&mut c);
        let after = contents(&mut c, leader, 6);
        c.nodes[node].shard().throttle = Throttle::new(64 << 10);
        c.cut.clear();
        let wait = c.rng.below(20);
        let fed = |c: &mut Cluster| c.nodes[node].shard().throttle.turns() >= 3 + wait;
        c.until("some of it is fed", fed);
        only(&mut c, node);
        let clean = |c: &mut Cluster| c.nodes[node].shard().store.oldest_dirty_ns().is_none();
        c.until("it is on the slots", clean);
        if seed % 5 > 0 {
            c.kill(node);
            c.start(node); // replays what it has on top of what was fed
            c.until("it serves", |c| c.nodes[node].shard().serving());
        }
        assert_eq!(c.ask(node, ID, reset(&[node])).outcome, Outcome::Success);
        for _ in 0..2 {
            // The answer was durable, for all it says.
            c.kill(node);
            c.start(node);
            assert_eq!(c.wait_leader(ID), node);
            let now = contents(&mut c, node, 6);
            for (chunk, now) in now.iter().enumerate() {
                let whole = now == &before[chunk] || now == &after[chunk];
                assert!(
                    now.is_none() || whole,
                    "seed {seed} chunk {chunk}: {now:?} {:?} {:?}",
                    before[chunk],
                    after[chunk]
                );
            }
            refused += now.iter().filter(|now| now.is_none()).count();
        }
        for chunk in 0..6 {
            if read(&mut c, node, ID, chunk, 1).outcome != Outcome::Success {
                assert_eq!(read(&mut c, node, ID, chunk, 1).outcome, Outcome::CrcFail);
                assert_eq!(delete(&mut c, node, chunk), Outcome::Success);
                assert_eq!(write(&mut c, node, ID, chunk, 1, 5), Outcome::Success);
                assert_eq!(stamps(&read(&mut c, node, ID, chunk, 2).data), [0, 5]);
            }
        }
    }
    assert!((1..60).contains(&refused), "{refused}");
}

#[test]
fn reads_that_fail_for_a_while_cost_nothing_of_the_tail() {
    let mut tails = 0;
    for seed in 0..6 {
        let (mut c, node) = last_of_three(seed);
        let sealed = c.now.after_ms(3_000);
        c.until("the log is sealed", |c| c.now >= sealed);
        c.kill(node);
        c.nodes[node].rot(100, false);
        c.start(node);
        c.until("it serves", |c| c.nodes[node].shard().serving());
        let raft = &c.nodes[node].shard().groups[&ID].raft;
        assert!(raft.is_suspect());
        tails += raft.last_index() - raft.commit_index();
        c.nodes[node].read_errors = Some(2);
        assert_eq!(c.ask(node, ID, reset(&[node])).outcome, Outcome::Success);
        c.nodes[node].read_errors = None;
        assert_eq!(c.wait_leader(ID), node);
        assert_eq!(stamps(&read(&mut c, node, ID, 1, 8).data), (108..116).collect::<Vec<u64>>(), "seed {seed}");
    }
    assert!(tails > 2, "{tails}");
}

/// A copyset of one replica, beside another whose records keep the segment that what is lost is in.
fn alone_and_suspect(seed: u64, in_front: bool) -> Cluster {
    let mut c = Cluster::new(1, &Setup { flush_age_ms: 1, ..Setup::default() }, seed);
    for (id, stamp) in [(CopysetId::new(1, 8), 1), (ID, 11), (ID, 12)] {
        if stamp != 12 {
            c.create(id, &[0]);
            c.wait_leader(id);
        }
        assert_eq!(write(&mut c, 0, id, stamp % 10, 0, stamp), Outcome::Success);
    }
    let sealed = c.now.after_ms(3_000);
    c.until("the log is sealed", |c| c.now >= sealed);
    c.kill(0);
    c.nodes[0].rot(12, in_front);
    c.start(0);
    c.until("it serves", |c| c.nodes[0].shard().serving());
    c
}

#[test]
fn who_is_alone_and_suspect_is_reset_too() {
    for seed in 0..4 {
        let mut c = alone_and_suspect(seed, true);
        assert!(c.nodes[0].shard().groups[&ID].damaged, "out of service, for nobody can tell what is lost");
        assert_eq!(c.ask(0, ID, reset(&[0])).outcome, Outcome::Success);
        for round in 0..3 {
            assert_eq!(c.wait_leader(ID), 0);
            assert!(!c.nodes[0].shard().groups[&ID].damaged, "seed {seed}, {round}");
            assert_eq!(write(&mut c, 0, ID, 9, round, 5), Outcome::Success);
            assert_eq!(stamps(&read(&mut c, 0, ID, 1, 1).data), [11]);
            c.kill(0);
            c.start(0);
        }
    }
}

#[test]
fn who_was_suspect_once_may_be_alone_later() {
    for (seed, forced) in (0..4).flat_map(|seed| [(seed, true), (seed, false)]) {
        let (mut c, leader) = mend::three(seed);
        let node = (leader + 1) % 3;
        let sealed = c.now.after_ms(3_000);
        c.until("the logs are sealed", |c| c.now >= sealed);
        c.kill(node);
        c.nodes[node].rot(12, true);
        c.start(node);
        c.until("it serves", |c| c.nodes[node].shard().serving());
        c.until("it has caught up", |c| !c.nodes[node].shard().groups[&mend::ID].raft.is_suspect());
        if forced {
            only(&mut c, node); // at once
            assert_eq!(c.ask(node, mend::ID, reset(&[node])).outcome, Outcome::Success);
        } else {
            let shown = |c: &mut Cluster| c.nodes[node].shard().groups[&mend::ID].raft.is_lossy();
            c.until("its log shows no loss any more", |c| !shown(c));
            for gone in [(node + 1) % 3, (node + 2) % 3] {
                let op = MemberOp::Remove(peer(gone));
                let mut outcome = Outcome::NotLeader;
                while outcome != Outcome::Success {
                    let leader = c.wait_leader(mend::ID);
                    outcome = c.ask(leader, mend::ID, admin(AdminOp::Members(op.clone()))).outcome;
                }
                c.until("it is gone", |c| !c.nodes[node].shard().groups[&mend::ID].raft.conf().has_member(peer(gone)));
                c.kill(gone);
            }
        }
        for _ in 0..2 {
            c.until("it leads", |c| c.nodes[node].shard().leads(mend::ID));
            assert_eq!(stamps(&read(&mut c, node, mend::ID, mend::CHUNK, 3).data), [11, 12, 13], "seed {seed}");
            c.kill(node);
            c.start(node);
            c.until("it serves", |c| c.nodes[node].shard().serving());
            assert!(!c.nodes[node].shard().groups[&mend::ID].damaged, "seed {seed}");
        }
    }
}

const KEPT: Setup = Setup {
    size: 8 << 20,
    chunk_size: 64 << 10,
    segment: 128 << 10,
    segments: 4,
    payload_arena: 4 << 20,
    work_arena: 2 << 20,
    dirty_limit: 512 << 10,
    flush_age_ms: 50,
    trash_s: 3600,
    election_ms: 1000,
    peer: 7,
};

fn do_admin(world: &mut World, op: AdminOp) -> Outcome {
    let slot = world.ask(ID, admin(op));
    world.outcome_of(slot)
}

fn trashed(world: &mut World) -> usize {
    let slot = world.ask(ID, admin(AdminOp::ListTrash));
    let reply = world.answer(slot);
    let ReplyData::Copysets(all) = reply.data else { panic!("{reply:?}") };
    all.len()
}

fn look(world: &mut World) -> Reply {
    let slot = world.chunk(ID, 1, ChunkOp::Read { offset: 0, len: 2 * BLOCK as u32 });
    world.answer(slot)
}

/// One replica with a chunk, of which one block is written back, in the trash.
fn deleted(seed: u64) -> World {
    let mut world = World::new(KEPT, seed);
    world.boot();
    assert_eq!(do_admin(&mut world, AdminOp::RestoreCopyset), Outcome::NoCopyset);
    world.create(ID);
    assert_eq!(do_admin(&mut world, AdminOp::RestoreCopyset), Outcome::Exists, "it lives");
    for stamp in [21, 22] {
        let slot = world.write(ID, 1, stamp - 21, 1, u64::from(stamp)).expect("a buffer");
        assert_eq!(world.outcome_of(slot), Outcome::Success);
        if stamp == 21 {
            assert_eq!(do_admin(&mut world, AdminOp::Checkpoint), Outcome::Success);
        }
    }
    assert_eq!(do_admin(&mut world, AdminOp::DeleteCopyset), Outcome::Success);
    assert_eq!((look(&mut world).outcome, trashed(&mut world)), (Outcome::NoCopyset, 1));
    world
}

fn lives(world: &mut World) {
    for _ in 0..10_000 {
        let reply = look(world);
        if reply.outcome == Outcome::Success {
            assert_eq!(stamps(&reply.data), [21, 22]);
            assert_eq!((trashed(world), do_admin(world, AdminOp::RestoreCopyset)), (0, Outcome::Exists));
            return;
        }
        assert_eq!(reply.outcome, Outcome::NotLeader);
        world.step();
    }
    panic!("it never leads");
}

#[test]
fn out_of_the_trash_a_replica_is_as_it_was() {
    for restarted in [false, true] {
        let mut world = deleted(5);
        if restarted {
            world.kill();
            world.start();
            world.boot();
            assert_eq!(trashed(&mut world), 1);
        }
        assert_eq!(do_admin(&mut world, AdminOp::RestoreCopyset), Outcome::Success);
        lives(&mut world);
        let slot = world.write(ID, 2, 0, 1, 23).expect("a buffer");
        assert_eq!(world.outcome_of(slot), Outcome::Success);
        world.kill();
        world.start();
        world.boot();
        lives(&mut world);
        // And again into the trash, and for good.
        for gone in [1, 0] {
            assert_eq!(do_admin(&mut world, AdminOp::DeleteCopyset), Outcome::Success);
            assert_eq!(trashed(&mut world), gone);
        }
        assert_eq!(do_admin(&mut world, AdminOp::RestoreCopyset), Outcome::NoCopyset);
    }
}

#[test]
fn a_crash_while_it_is_restored_leaves_it_in_the_trash_or_out_of_it() {
    let mut seen = [0; 2];
    for seed in 0..60 {
        let mut world = deleted(seed);
        let asked = world.ask(ID, admin(AdminOp::RestoreCopyset));
        let steps = world.rng.below(40);
        for _ in 0..steps {
            world.step();
        }
        let answered = world.replies.iter().any(|reply| reply.origin.slot == asked);
        world.kill();
        world.start();
        world.boot();
        let kept = trashed(&mut world);
        assert!(!answered || kept == 0, "what was answered is durable");
        seen[kept] += 1;
        if kept == 1 {
            assert_eq!(look(&mut world).outcome, Outcome::NoCopyset);
            assert_eq!(do_admin(&mut world, AdminOp::RestoreCopyset), Outcome::Success);
        }
        lives(&mut world);
    }
    assert!(seen.iter().all(|&n| n > 5), "{seen:?}");
}

#[test]
fn a_restored_member_catches_up() {
    let mut c = cluster(3, &[0, 1, 2], &Setup { trash_s: 3600, ..Setup::default() }, 7);
    let leader = c.wait_leader(ID);
    let node = (leader + 1) % 3;
    assert_eq!(write(&mut c, leader, ID, 0, 0, 1), Outcome::Success);
    c.quiesce(&[ID]);
    assert_eq!(c.ask(node, ID, admin(AdminOp::DeleteCopyset)).outcome, Outcome::Success);
    assert_eq!(c.ask(node, ID, reset(&[node])).outcome, Outcome::NoCopyset, "what is in the trash is not here");
    assert_eq!(write(&mut c, leader, ID, 0, 1, 2), Outcome::Success);
    assert_eq!(c.ask(node, ID, admin(AdminOp::RestoreCopyset)).outcome, Outcome::Success);
    c.quiesce(&[ID]);
    c.compare(ID, 1);
    // It counts again: with it alone there is a majority.
    c.isolate((leader + 2) % 3);
    let leader = c.wait_leader(ID);
    assert_eq!(write(&mut c, leader, ID, 0, 2, 3), Outcome::Success);
}
