//! What is lost on one replica is taken from another one (rules 21, 22).

use super::cluster::Cluster;
use super::model::stamps;
use super::world::Setup;
use crate::chunk::ChunkInfo;
use crate::metrics::Counter;
use crate::shard::request::{ChunkOp, Outcome, Reply, RequestOp};
use raftlog::{BLOCK, CopysetId};

pub(super) const ID: CopysetId = CopysetId::new(1, 1);
pub(super) const CHUNK: u64 = 1;

/// Three replicas of a copyset with a chunk of three blocks, all on their slots; and who leads.
pub(super) fn three(seed: u64) -> (Cluster, usize) {
    let mut c = Cluster::new(3, &Setup { flush_age_ms: 1, ..Setup::default() }, seed);
    let leader = fill(&mut c);
    (c, leader)
}

/// The copyset and its chunk; gives its leader.
pub(super) fn fill(c: &mut Cluster) -> usize {
    c.create(ID, &[0, 1, 2]);
    let leader = c.wait_leader(ID);
    for (block, stamp) in [(0, 11), (1, 12), (2, 13)] {
        let slot = c.nodes[leader].write(ID, CHUNK, block, 1, stamp).expect("a buffer");
        assert_eq!(c.answer(leader, slot).outcome, Outcome::Success);
    }
    written(c);
    leader
}

/// All replicas have everything on their slots.
fn written(c: &mut Cluster) {
    c.quiesce(&[ID]);
    let clean = |c: &mut Cluster| c.nodes.iter_mut().all(|n| n.shard().store.oldest_dirty_ns().is_none());
    c.until("everything is written back", clean);
}

fn read(c: &mut Cluster, node: usize, blocks: u32) -> Reply {
    let op = ChunkOp::Read { offset: 0, len: blocks * BLOCK as u32 };
    c.ask(node, ID, RequestOp::Chunk { chunk: CHUNK, op })
}

fn mended(c: &mut Cluster, node: usize) -> (u64, u64) {
    let metrics = c.nodes[node].shard().metrics.clone();
    (metrics.value(Counter::MendedBlocks), metrics.value(Counter::MendedChunks))
}

#[test]
fn replicas_with_different_rotten_blocks_mend_each_other() {
    for seed in 0..8 {
        let (mut c, leader) = three(seed);
        let other = (leader + 1) % 3;
        assert_eq!((c.nodes[leader].rot_slot(12), c.nodes[other].rot_slot(13)), (1, 1));
        let reply = read(&mut c, leader, 3);
        assert_eq!((reply.outcome, stamps(&reply.data)), (Outcome::Success, vec![11, 12, 13]));
        assert_eq!(mended(&mut c, leader), (1, 0));
        c.compare(ID, CHUNK + 1); // reads all of every replica, which mends the other one
        assert_eq!(mended(&mut c, other), (1, 0));
        written(&mut c);
        c.compare(ID, CHUNK + 1);
        let again = read(&mut c, leader, 3);
        assert_eq!(stamps(&again.data), [11, 12, 13]);
    }
}

#[test]
fn what_rotted_everywhere_is_refused_and_can_be_overwritten() {
    let (mut c, leader) = three(5);
    (0..3).for_each(|node| assert_eq!(c.nodes[node].rot_slot(12), 1));
    assert_eq!(read(&mut c, leader, 3).outcome, Outcome::CrcFail);
    assert_eq!(read(&mut c, leader, 1).outcome, Outcome::Success);
    let slot = c.nodes[leader].write(ID, CHUNK, 1, 1, 22).expect("a buffer");
    assert_eq!(c.answer(leader, slot).outcome, Outcome::Success);
    assert_eq!(stamps(&read(&mut c, leader, 3).data), [11, 22, 13]);
}

#[test]
fn a_chunk_in_doubt_is_taken_from_a_peer_while_writes_wait() {
    for seed in 0..8 {
        let (mut c, leader) = three(seed);
        let now = c.nodes[leader].now.0;
        assert!(c.nodes[leader].shard().store.doubt(ID, 0, CHUNK, now));
        let slot = c.nodes[leader].write(ID, CHUNK, 1, 1, 22).expect("a buffer");
        let reply = read(&mut c, leader, 1);
        assert_eq!((reply.outcome, stamps(&reply.data)), (Outcome::Success, vec![11]));
        assert_eq!(c.answer(leader, slot).outcome, Outcome::Success);
        assert_eq!(mended(&mut c, leader), (0, 1));
        assert_eq!(stamps(&read(&mut c, leader, 3).data), [11, 22, 13]);
        written(&mut c);
        c.compare(ID, CHUNK + 1);
    }
}

#[test]
fn doubt_survives_a_power_cut_and_ends_by_itself() {
    for seed in 0..8 {
        let (mut c, leader) = three(seed);
        let node = (leader + 1) % 3;
        c.isolate(node);
        let now = c.nodes[node].now.0;
        assert!(c.nodes[node].shard().store.doubt(ID, 0, CHUNK, now));
        c.until("that is on the disk", |c| c.nodes[node].shard().store.oldest_dirty_ns().is_none());
        c.kill(node);
        c.start(node);
        c.until("it serves again", |c| c.nodes[node].shard().serving());
        assert_eq!(c.nodes[node].shard().store.doubts(ID), [CHUNK]);
        c.cut.clear();
        c.until("it is mended", |c| c.nodes[node].shard().store.suspect_chunks() == 0);
        written(&mut c);
        c.compare(ID, CHUNK + 1);
    }
}

fn delete(c: &mut Cluster, node: usize) {
    let op = RequestOp::Chunk { chunk: CHUNK, op: ChunkOp::Delete { sn: 1 } };
    assert_eq!(c.ask(node, ID, op).outcome, Outcome::Success);
}

fn infos(c: &mut Cluster) -> Vec<Option<ChunkInfo>> {
    c.nodes.iter_mut().map(|n| n.shard().store.chunk_info(ID, CHUNK)).collect()
}

#[test]
fn a_rotten_entry_of_a_chunk_that_was_deleted_since_leaves_no_doubt() {
    for seed in 0..8 {
        let (mut c, leader) = three(seed);
        let node = (leader + 1) % 3;
        delete(&mut c, leader);
        written(&mut c);
        c.seal();
        c.kill(node);
        c.nodes[node].rot(12, false);
        c.isolate(node);
        c.start(node);
        c.until("it serves again", |c| c.nodes[node].shard().serving());
        let commit = c.nodes[node].shard().groups[&ID].raft.commit_index();
        c.until("it has replayed", |c| c.nodes[node].shard().groups[&ID].applied == commit);
        assert_eq!((infos(&mut c)[node], c.nodes[node].shard().store.suspect_chunks()), (None, 0), "seed {seed}");
        c.cut.clear();
        written(&mut c);
        c.compare(ID, CHUNK + 1);
    }
}

#[test]
fn a_chunk_in_doubt_that_no_peer_has_is_gone() {
    for seed in 0..8 {
        let (mut c, leader) = three(seed);
        let node = (leader + 1) % 3;
        delete(&mut c, leader);
        written(&mut c);
        let (now, applied) = (c.nodes[node].now.0, c.nodes[node].shard().groups[&ID].applied);
        assert!(c.nodes[node].shard().store.doubt(ID, applied, CHUNK, now));
        c.nodes[node].shard().look_for_doubts();
        c.until("it is gone", |c| c.nodes[node].shard().store.suspect_chunks() == 0);
        let slot = c.nodes[leader].write(ID, CHUNK, 1, 1, 22).expect("a buffer");
        assert_eq!(c.answer(leader, slot).outcome, Outcome::Success);
        written(&mut c);
        c.kill(node);
        c.start(node);
        written(&mut c);
        c.compare(ID, CHUNK + 1);
        assert_eq!(infos(&mut c)[node], infos(&mut c)[leader]);
    }
}

#[test]
fn who_is_in_doubt_hands_out_nothing_but_what_it_has_got_back() {
    for seed in 0..8 {
        let (mut c, leader) = three(seed);
        let (node, third) = ((leader + 1) % 3, (leader + 2) % 3);
        let whole = infos(&mut c)[third];
        c.cut.extend([(node, third), (third, node)]); // it can ask only the leader
        for n in [leader, node] {
            let now = c.nodes[n].now.0;
            assert!(c.nodes[n].shard().store.doubt(ID, 0, CHUNK, now));
            c.nodes[n].shard().look_for_doubts();
        }
        c.until("both are mended", |c| c.nodes.iter_mut().all(|n| n.shard().store.suspect_chunks() == 0));
        assert_eq!(infos(&mut c), [whole; 3], "seed {seed}");
        c.compare(ID, CHUNK + 1);
    }
}

#[test]
fn a_gap_does_not_begin_a_repair_anew() {
    for seed in 0..8 {
        let (mut c, leader) = three(seed);
        let node = (leader + 1) % 3;
        let now = c.nodes[node].now.0;
        assert!(c.nodes[node].shard().store.doubt(ID, 0, CHUNK, now));
        c.nodes[node].shard().look_for_doubts();
        c.until("a piece has come", |c| c.nodes[node].shard().store.pinned_bytes() > 0);
        c.isolate(node);
        let later = c.now.after_ms(500);
        c.until("a while passes", |c| c.now >= later);
        assert_eq!(c.nodes[node].shard().store.doubts(ID), [CHUNK], "seed {seed}");
        c.cut.clear();
        c.until("it is mended", |c| c.nodes[node].shard().store.suspect_chunks() == 0);
        assert_eq!(c.nodes[node].shard().mends.attempts, 1, "seed {seed}");
        written(&mut c);
        c.compare(ID, CHUNK + 1);
    }
}

#[test]
fn a_read_that_meets_another_ones_repair_waits_for_it() {
    for seed in 0..8 {
        let (mut c, leader) = three(seed);
        assert_eq!(c.nodes[leader].rot_slot(12), 1);
        let op = ChunkOp::Read { offset: 0, len: 3 * BLOCK as u32 };
        let slot = c.nodes[leader].ask(ID, RequestOp::Chunk { chunk: CHUNK, op });
        c.until("the device is asked", |c| !c.nodes[leader].shard().reads.is_empty());
        let now = c.nodes[leader].now.0;
        assert!(c.nodes[leader].shard().store.doubt(ID, 0, CHUNK, now));
        let reply = c.answer(leader, slot);
        assert_eq!((reply.outcome, stamps(&reply.data)), (Outcome::Success, vec![11, 12, 13]), "seed {seed}");
    }
}

#[test]
fn a_suspect_stays_one_when_what_it_lost_is_out_of_sight() {
    const OWN: CopysetId = CopysetId::new(1, 2);
    for seed in 0..4 {
        let (mut c, leader) = three(seed);
        let node = (leader + 1) % 3;
        // An entry that it acknowledges and does not know to be committed: nothing but its batch tells of it.
        let last = c.nodes[node].shard().groups[&ID].raft.last_index() + 1;
        let slot = c.nodes[leader].write(ID, CHUNK, 0, 1, 14).expect("a buffer");
        let holds = |c: &mut Cluster| c.nodes[node].shard().groups[&ID].raft.durable_index() == last;
        c.until("it holds the entry", holds);
        c.isolate(node);
        assert_eq!(c.answer(leader, slot).outcome, Outcome::Success);
        c.seal();
        assert!(c.nodes[node].shard().groups[&ID].raft.commit_index() < last);
        c.kill(node);
        c.nodes[node].rot(14, true);
        c.start(node);
        c.until("it serves again", |c| c.nodes[node].shard().serving());
        assert!(c.nodes[node].shard().lost.contains(&ID));
        // All segments of the log are used anew.
        c.create(OWN, &[node]);
        c.until("it leads what is its own", |c| c.nodes[node].shard().leads(OWN));
        for stamp in 0..200 {
            let slot = c.nodes[node].write(OWN, CHUNK, 0, 1, 100 + stamp).expect("a buffer");
            assert_eq!(c.answer(node, slot).outcome, Outcome::Success);
        }
        c.kill(node);
        c.start(node);
        c.until("it serves again", |c| c.nodes[node].shard().serving());
        assert!(!c.nodes[node].shard().lost.contains(&ID), "seed {seed}: nothing shows the loss any more");
        assert!(c.nodes[node].shard().groups[&ID].raft.is_suspect(), "seed {seed}");
        // One of the others is down: the suspect must not be the second vote.
        let third = (leader + 2) % 3;
        c.isolate(third);
        c.cut.retain(|&(from, to)| (from, to) != (node, leader) && (from, to) != (leader, node));
        let later = c.now.after_ms(5_000);
        c.until("time passes", |c| c.now >= later);
        assert!(c.nodes[node].shard().groups[&ID].raft.is_suspect(), "seed {seed}");
        c.cut.clear();
        c.until("it has caught up", |c| !c.nodes[node].shard().groups[&ID].raft.is_suspect());
        written(&mut c);
        c.kill(node);
        c.start(node);
        c.until("it serves again", |c| c.nodes[node].shard().serving());
        assert!(!c.nodes[node].shard().groups[&ID].raft.is_suspect(), "seed {seed}");
        written(&mut c);
        c.compare(ID, CHUNK + 1);
    }
}

#[test]
fn a_log_that_lost_durable_records_catches_up() {
    for (seed, in_front) in (0..8).flat_map(|seed| [(seed, true), (seed, false)]) {
        let (mut c, leader) = three(seed);
        let node = (leader + 1) % 3;
        c.seal();
        c.kill(node);
        c.nodes[node].rot(12, in_front);
        c.start(node);
        c.until("it serves again", |c| c.nodes[node].shard().serving());
        assert!(c.nodes[node].shard().lost.contains(&ID), "seed {seed}");
        c.until("it has caught up", |c| !c.nodes[node].shard().groups[&ID].raft.is_suspect());
        written(&mut c);
        c.compare(ID, CHUNK + 1);
        // It counts again: with it and without another one, writes are answered.
        let third = (leader + 2) % 3;
        c.isolate(third);
        let leader = c.wait_leader(ID);
        let slot = c.nodes[leader].write(ID, CHUNK, 1, 1, 22).expect("a buffer");
        assert_eq!(c.answer(leader, slot).outcome, Outcome::Success, "seed {seed}");
    }
}

/// What a lagging peer lacks has rotted in the leader's log, after it was applied.
#[test]
fn what_cannot_be_read_back_from_the_log_is_given_from_the_slots() {
    for seed in 0..4 {
        let (mut c, leader) = three(seed);
        let away = (leader + 1) % 3;
        c.isolate(away);
        for stamp in 600..606 {
            let slot = c.nodes[leader].write(ID, CHUNK, stamp as u32 % 4, 1, stamp).expect("a buffer");
            assert_eq!(c.answer(leader, slot).outcome, Outcome::Success);
        }
        c.nodes[leader].rot(602, false);
        c.cut.clear();
        let applied = |c: &mut Cluster, node: usize| c.nodes[node].shard().groups[&ID].applied;
        c.until("it has caught up", |c| applied(c, away) == applied(c, leader));
        c.compare(ID, CHUNK + 1);
    }
}
