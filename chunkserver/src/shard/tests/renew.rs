//! An operator's word: the replica that is left is the only voter, replicas taken out of the trash; with crashes around it.

use super::changes::{self, cluster};
use super::cluster::{Cluster, peer};
use super::mend;
use super::model::stamps;
use super::world::{Setup, World};
use crate::shard::request::{AdminOp, ChunkOp, MemberOp, Outcome, Reply, ReplyData, RequestOp};
use raftlog::{BLOCK, CopysetId};

const ID: CopysetId = changes::ID;

pub(super) fn admin(op: AdminOp) -> RequestOp {
    RequestOp::Admin(op)
}

pub(super) fn reset(nodes: &[usize]) -> RequestOp {
    admin(AdminOp::Members(MemberOp::Reset(nodes.iter().map(|&n| peer(n)).collect())))
}

fn voters(c: &mut Cluster, node: usize, id: CopysetId) -> Vec<u64> {
    c.status(node, id).expect("it is there").peers
}

pub(super) fn write(c: &mut Cluster, node: usize, id: CopysetId, chunk: u64, first: u32, stamp: u64) -> Outcome {
    let slot = c.nodes[node].write(id, chunk, first, 1, stamp).expect("a buffer");
    c.answer(node, slot).outcome
}

pub(super) fn read(c: &mut Cluster, node: usize, id: CopysetId, chunk: u64, blocks: u32) -> Reply {
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
pub(super) fn last_of_three(seed: u64) -> (Cluster, usize) {
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
        c.seal();
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

const KEPT: Setup = Setup { trash_s: 3600, ..Setup::SMALL };

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
