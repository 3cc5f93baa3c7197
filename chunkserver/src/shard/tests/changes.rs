//! One thing at a time on copysets of several nodes: lagging behind the log, no space, members that come and go, leaders
//! that hand over, quorums lost and found.

use super::cluster::{Cluster, peer};
use super::world::Setup;
use crate::shard::request::{AdminOp, ChunkOp, MemberOp, Outcome, Reply, ReplyData, RequestOp};
use raftlog::{BLOCK, CopysetId};

pub(super) const ID: CopysetId = CopysetId::new(1, 7);

pub(super) fn cluster(nodes: usize, voters: &[usize], setup: &Setup, seed: u64) -> Cluster {
    let mut c = Cluster::new(nodes, setup, seed);
    c.create(ID, voters);
    c.wait_leader(ID);
    c
}

/// Write until it succeeds at whoever leads; the outcome of the last try otherwise.
fn write(c: &mut Cluster, chunk: u64, first: u32, stamp: u64) -> Outcome {
    for _ in 0..200 {
        let leader = c.wait_leader(ID);
        let Some(slot) = c.nodes[leader].write(ID, chunk, first, 1, stamp) else {
            c.nodes[leader].shard().want_memory();
            (0..50).for_each(|_| c.step());
            continue;
        };
        match c.answer(leader, slot).outcome {
            Outcome::NotLeader | Outcome::Overload => {}
            outcome => return outcome,
        }
    }
    panic!("a write finds no leader: {}", c.describe());
}

fn read(c: &mut Cluster, node: usize, chunk: u64) -> Reply {
    let len = c.nodes[node].setup.chunk_size;
    c.ask(node, ID, RequestOp::Chunk { chunk, op: ChunkOp::Read { offset: 0, len } })
}

fn members(c: &mut Cluster, node: usize, op: MemberOp) -> Reply {
    c.ask(node, ID, RequestOp::Admin(AdminOp::Members(op)))
}

/// More than the log keeps, over all chunks.
pub(super) fn fill(c: &mut Cluster, chunks: u64, bytes: u64, stamp: &mut u64) {
    let blocks = c.nodes[0].blocks();
    for n in 0..bytes / BLOCK as u64 {
        *stamp += 1;
        let (chunk, block) = (n % chunks, (n / chunks % u64::from(blocks)) as u32);
        assert_eq!(write(c, chunk, block, *stamp), Outcome::Success);
    }
}

fn applied(c: &mut Cluster, node: usize) -> u64 {
    c.nodes[node].shard().groups[&ID].applied
}

pub(super) fn first_index(c: &mut Cluster, node: usize) -> u64 {
    c.nodes[node].shard().groups[&ID].raft.first_index()
}

/// Cut a follower off and write until the leader has forgotten what it needs.
pub(super) fn leave_behind(c: &mut Cluster, stamp: &mut u64) -> usize {
    let leader = c.wait_leader(ID);
    let follower = (leader + 1) % 3;
    fill(c, 6, 100 << 10, stamp);
    c.isolate(follower);
    // What it has and knows no commit of still joins on to the leader's log.
    let last = c.status(follower, ID).unwrap().last;
    while first_index(c, leader) <= last + 1 {
        fill(c, 6, 64 << 10, stamp);
        assert_eq!(c.wait_leader(ID), leader, "the others go on as they were");
    }
    follower
}

#[test]
fn behind_the_log_the_chunks_are_sent() {
    let mut c = cluster(3, &[0, 1, 2], &Setup::default(), 1);
    let mut stamp = 0;
    let follower = leave_behind(&mut c, &mut stamp);
    // One that is gone meanwhile, one that is unchanged, one that is new.
    let leader = c.wait_leader(ID);
    let gone = c.nodes[leader].chunk(ID, 2, ChunkOp::Delete { sn: 1 });
    assert_eq!(c.answer(leader, gone).outcome, Outcome::Success);
    assert_eq!(write(&mut c, 77, 3, 4242), Outcome::Success);
    c.cut.clear();
    let lag = applied(&mut c, follower);
    c.until("chunks are taken in", |c| c.nodes[follower].shard().installs(ID));
    c.quiesce(&[ID]);
    assert!(first_index(&mut c, follower) > lag + 1, "the follower's log starts behind what it lacked");
    c.compare(ID, 80);
    assert_eq!(write(&mut c, 1, 1, 99), Outcome::Success);
    c.quiesce(&[ID]);
    c.compare(ID, 80);
}

#[test]
fn crashes_on_either_side_do_not_spoil_what_is_taken_in() {
    for seed in 0..12 {
        let mut c = cluster(3, &[0, 1, 2], &Setup { flush_age_ms: 1, ..Setup::default() }, seed);
        let mut stamp = 0;
        let follower = leave_behind(&mut c, &mut stamp);
        c.cut.clear();
        c.until("chunks are taken in", |c| c.nodes[follower].shard().installs(ID));
        let victim = if seed % 3 == 2 { c.wait_leader(ID) } else { follower };
        for _ in 0..c.rng.below(400) {
            c.step();
        }
        c.kill(victim);
        for _ in 0..c.rng.below(200) {
            c.step();
        }
        c.start(victim);
        fill(&mut c, 6, 32 << 10, &mut stamp);
        c.quiesce(&[ID]);
        c.compare(ID, 6);
    }
}

#[test]
fn a_replica_without_space_stops_and_the_others_go_on() {
    let mut c = Cluster::new(3, &Setup { size: 16 << 20, ..Setup::default() }, 5);
    let small = Setup { size: 5 << 20, peer: peer(2), ..Setup::default() };
    c.replace(2, small);
    c.create(ID, &[0, 1, 2]);
    c.until("a node with space leads", |c| {
        let leader = c.leader(ID);
        if leader == Some(2) {
            let slot = c.nodes[2].ask(ID, RequestOp::Admin(AdminOp::Members(MemberOp::Transfer(peer(0)))));
            c.answer(2, slot);
        }
        leader.is_some_and(|leader| leader != 2)
    });
    for chunk in 0..60 {
        assert_eq!(write(&mut c, chunk, 0, chunk + 1), Outcome::Success, "chunk {chunk}");
    }
    assert!(c.nodes[2].shard().store.chunks_of(ID) < 60, "the small disk cannot hold them");
    assert!(applied(&mut c, 2) < applied(&mut c, 0));
    let leader = c.wait_leader(ID);
    assert_ne!(leader, 2);
    for chunk in 4..60 {
        let slot = c.nodes[leader].chunk(ID, chunk, ChunkOp::Delete { sn: 1 });
        assert_eq!(c.answer(leader, slot).outcome, Outcome::Success);
    }
    // What it could not take it gets as chunks, once somebody makes the others forget the entries.
    for node in [0, 1] {
        let reply = c.ask(node, ID, RequestOp::Admin(AdminOp::Checkpoint));
        assert_eq!(reply.outcome, Outcome::Success);
    }
    c.quiesce(&[ID]);
    c.compare(ID, 60);
}

#[test]
fn members_come_and_go() {
    let mut c = cluster(5, &[0, 1, 2], &Setup::default(), 9);
    let mut stamp = 0;
    fill(&mut c, 4, 64 << 10, &mut stamp);
    let passive = c.ask(3, ID, RequestOp::Admin(AdminOp::CreateCopyset { peers: vec![] }));
    assert_eq!(passive.outcome, Outcome::Success);
    let leader = c.wait_leader(ID);
    let follower = (leader + 1) % 3;
    assert_eq!(members(&mut c, follower, MemberOp::Add(peer(3))).outcome, Outcome::NotLeader);
    let added = members(&mut c, leader, MemberOp::Add(peer(3)));
    assert_eq!(added.outcome, Outcome::Success);
    let ReplyData::Members { old, new } = added.data else { panic!("{added:?}") };
    assert_eq!((old, new), ((0..3).map(peer).collect::<Vec<_>>(), (0..4).map(peer).collect::<Vec<_>>()));
    let again = members(&mut c, leader, MemberOp::Add(peer(3)));
    assert_eq!(again.outcome, Outcome::Success, "a member is added already");
    c.quiesce(&[ID]);
    c.compare(ID, 4);
    let leader = c.wait_leader(ID);
    let removed = members(&mut c, leader, MemberOp::Remove(peer(follower)));
    assert_eq!(removed.outcome, Outcome::Success);
    assert_eq!(write(&mut c, 0, 0, 7777), Outcome::Success);
    // It is told, stays, and disturbs nobody.
    let before = c.status(leader, ID).unwrap();
    for _ in 0..20_000 {
        c.step();
    }
    let after = c.status(leader, ID).unwrap();
    assert_eq!((before.term, before.epoch), (after.term, after.epoch));
    assert_eq!(after.peers.len(), 3);
    let cleaned = c.ask(follower, ID, RequestOp::Admin(AdminOp::DeleteCopyset));
    assert_eq!(cleaned.outcome, Outcome::Success);
    c.quiesce(&[ID]);
    c.compare(ID, 4);
}

#[test]
fn a_new_member_that_is_not_there_is_given_up_and_changes_exclude_each_other() {
    let mut c = cluster(3, &[0, 1, 2], &Setup::default(), 11);
    let leader = c.wait_leader(ID);
    let first = c.nodes[leader].ask(ID, RequestOp::Admin(AdminOp::Members(MemberOp::Add(peer(9)))));
    c.step();
    let second = members(&mut c, leader, MemberOp::Remove(peer((leader + 1) % 3)));
    assert_eq!(second.outcome, Outcome::Busy);
    assert_eq!(c.answer(leader, first).outcome, Outcome::CatchUp);
    assert_eq!(write(&mut c, 0, 0, 1), Outcome::Success);
}

#[test]
fn leadership_is_handed_over() {
    let mut c = cluster(3, &[0, 1, 2], &Setup::default(), 13);
    assert_eq!(write(&mut c, 0, 0, 1), Outcome::Success);
    let leader = c.wait_leader(ID);
    let next = (leader + 1) % 3;
    assert_eq!(members(&mut c, leader, MemberOp::Transfer(peer(77))).outcome, Outcome::Invalid);
    assert_eq!(members(&mut c, leader, MemberOp::Transfer(peer(next))).outcome, Outcome::Success);
    c.until("the other leads", |c| c.leader(ID) == Some(next));
    let told = read(&mut c, leader, 0);
    assert_eq!(told.outcome, Outcome::NotLeader);
    assert!(matches!(told.data, ReplyData::Leader(hint) if hint == peer(next)), "{told:?}");
    assert_eq!(read(&mut c, next, 0).outcome, Outcome::Success);
}

/// Before clients are held for a hand-over: what others can lead they lead, and everything is served meanwhile.
#[test]
fn what_others_can_lead_is_given_away() {
    let mut c = cluster(3, &[0, 1, 2], &Setup::default(), 23);
    let leader = c.wait_leader(ID);
    let alone = CopysetId::new(1, 8);
    c.create(alone, &[leader]);
    c.until("it leads its own", |c| c.nodes[leader].shard().leads(alone));
    assert_eq!(write(&mut c, 0, 0, 1), Outcome::Success);
    assert!(c.nodes[leader].shard().hand_over());
    assert!(c.nodes[leader].shard().hand_over(), "on its way, and not there");
    c.until("it leads nothing of others", |c| !c.nodes[leader].shard().hand_over());
    assert_ne!(c.status(leader, ID).unwrap().state, 1);
    assert!(c.nodes[leader].shard().leads(alone) && c.nodes[leader].shard().serving());
    assert_eq!(write(&mut c, 0, 0, 2), Outcome::Success);
    let next = c.wait_leader(ID);
    assert_ne!(next, leader);
    // With nobody to take over it is led on.
    c.isolate(next);
    assert!(c.nodes[next].shard().hand_over());
}

#[test]
fn without_a_quorum_nothing_is_answered_that_is_not_so() {
    let mut c = cluster(3, &[0, 1, 2], &Setup::default(), 17);
    assert_eq!(write(&mut c, 0, 0, 1), Outcome::Success);
    let leader = c.wait_leader(ID);
    let others = [(leader + 1) % 3, (leader + 2) % 3];
    c.isolate(leader);
    let lost = c.nodes[leader].write(ID, 0, 0, 1, 2).unwrap();
    c.until("the others elect", |c| c.leader(ID).is_some_and(|l| others.contains(&l)));
    // It may hold the old leadership for a moment; it must not read from it.
    let stale = read(&mut c, leader, 0);
    assert_eq!(stale.outcome, Outcome::NotLeader);
    assert_eq!(c.answer(leader, lost).outcome, Outcome::NotLeader);
    assert_eq!(write(&mut c, 0, 0, 3), Outcome::Success);
    c.cut.clear();
    c.quiesce(&[ID]);
    c.compare(ID, 1);
    for node in others {
        c.kill(node);
    }
    c.until("nobody leads", |c| c.leader(ID).is_none());
    assert_eq!(read(&mut c, leader, 0).outcome, Outcome::NotLeader);
    others.iter().for_each(|&node| c.start(node));
    assert_eq!(write(&mut c, 0, 0, 4), Outcome::Success);
    c.quiesce(&[ID]);
    c.compare(ID, 1);
}

#[test]
fn a_quorumless_tail_does_not_stop_the_log_for_others() {
    let mut c = cluster(3, &[0, 1, 2], &Setup::default(), 19);
    let alone = CopysetId::new(1, 8);
    c.create(alone, &[0]);
    c.wait_leader(alone);
    c.until("node 0 leads", |c| {
        let leader = c.wait_leader(ID);
        if leader != 0 {
            members(c, leader, MemberOp::Transfer(peer(0)));
        }
        leader == 0
    });
    c.kill(1);
    c.kill(2);
    let waiting: Vec<u32> = (0..14).filter_map(|n| c.nodes[0].write(ID, n, 0, 1, u64::from(n as u32) + 1)).collect();
    for n in 0..400u64 {
        let slot = c.nodes[0].write(alone, n % 5, (n % 16) as u32, 1, n + 1);
        if let Some(slot) = slot {
            assert_eq!(c.answer(0, slot).outcome, Outcome::Success, "write {n} of the copyset that needs nobody");
        }
    }
    c.start(1);
    c.start(2);
    for slot in waiting {
        assert!(matches!(c.answer(0, slot).outcome, Outcome::Success | Outcome::NotLeader));
    }
    c.quiesce(&[ID]);
    c.compare(ID, 14);
}
