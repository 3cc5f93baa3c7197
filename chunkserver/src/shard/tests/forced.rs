//! A replica that is forced to be the only voter, whatever it was in the middle of: being fed, suspect, out of service.

use super::changes::{self, ID, cluster};
use super::cluster::{Cluster, peer};
use super::mend;
use super::model::stamps;
use super::renew::{admin, last_of_three, read, reset, write};
use super::world::Setup;
use crate::shard::request::{AdminOp, ChunkOp, MemberOp, Outcome, RequestOp};
use crate::shard::throttle::Throttle;
use raftlog::CopysetId;

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
        c.seal();
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
