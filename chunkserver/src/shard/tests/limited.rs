//! A limit on the chunk data of raft snapshots: it holds on either side, and slows down without spoiling anything.

use super::changes::{ID, cluster, leave_behind};
use super::cluster::{Cluster, peer};
use super::world::Setup;
use crate::metrics::Counter;
use crate::shard::request::{AdminOp, MemberOp, Outcome, RequestOp};
use crate::shard::throttle::Throttle;
use raftlog::CopysetId;

/// So slow that a piece of an unlimited asker is on its way for longer than an offer stands by itself.
const GIVEN: u64 = 3 << 10;
/// Its own pieces are smaller: it is heard often enough.
const TAKEN: u64 = 32 << 10;
/// Of a chunk of 64 KiB.
const PIECE: u64 = 8 << 10;

fn moved(c: &mut Cluster, node: usize, counter: Counter) -> u64 {
    c.nodes[node].shard().metrics.value(counter)
}

/// Feed a replica that fell behind, with the limit on one side or both; how long that took and what was moved.
fn feed(giver: u64, taker: u64) -> (u64, u64) {
    let mut c = cluster(3, &[0, 1, 2], &Setup { election_ms: 300, ..Setup::default() }, 31);
    let mut stamp = 0;
    let follower = leave_behind(&mut c, &mut stamp);
    let leader = c.wait_leader(ID);
    for (node, rate) in [(leader, giver), (follower, taker)] {
        c.nodes[node].shard().throttle = Throttle::new(rate);
    }
    c.cut.clear();
    c.until("chunks are taken in", |c| c.nodes[follower].shard().installs(ID));
    let start = c.now;
    c.until("all are", |c| !c.nodes[follower].shard().installs(ID));
    let took = c.now.since_ns(start);
    let bytes = moved(&mut c, follower, Counter::SnapshotBytesIn);
    assert_eq!(c.wait_leader(ID), leader);
    let given = moved(&mut c, leader, Counter::SnapshotBytesOut);
    assert!(given >= bytes, "{bytes} bytes taken, {given} counted by who gave them: {giver} {taker}");
    c.quiesce(&[ID]);
    c.compare(ID, 6);
    (took, bytes)
}

#[test]
fn a_limited_catch_up_takes_its_time_and_ends_equal() {
    let (quick, all) = feed(0, 0);
    assert!(all >= 8 * PIECE, "{all} bytes are something to move");
    for (giver, taker) in [(GIVEN, 0), (0, TAKEN), (GIVEN, TAKEN)] {
        let (took, bytes) = feed(giver, taker);
        let rate = if giver > 0 { giver } else { taker };
        // Free are the first piece and what a quarter of a second had left over.
        let least = (bytes - PIECE - rate / 4) * 1_000_000_000 / rate;
        assert!(took >= least && took > 5 * quick, "{bytes} bytes in {took} ns, without a limit {quick} ns");
        assert!(took < 2 * least + 5_000_000_000, "{bytes} bytes in {took} ns: it waits for more than the limit");
        assert!(bytes <= all + 4 * PIECE, "{bytes} bytes for {all}: it begins again and again");
    }
}

#[test]
fn who_is_fed_gives_all_the_same() {
    let mut c = Cluster::new(3, &Setup { flush_age_ms: 1, ..Setup::default() }, 5);
    // Node 1 is fed the one by node 0, and feeds the other to node 2.
    let (taken, given) = (CopysetId::new(1, 1), CopysetId::new(1, 2));
    for (id, node) in [(taken, 0), (given, 1)] {
        c.create(id, &[node]);
        c.wait_leader(id);
        for n in 0..64 {
            let slot = c.nodes[node].write(id, n / 16, (n % 16) as u32, 1, n + 1).expect("a buffer");
            assert_eq!(c.answer(node, slot).outcome, Outcome::Success);
        }
    }
    c.quiesce(&[taken, given]);
    for (id, node) in [(taken, 1), (given, 2)] {
        let empty = c.ask(node, id, RequestOp::Admin(AdminOp::CreateCopyset { peers: vec![] }));
        assert_eq!(empty.outcome, Outcome::Success);
    }
    c.nodes[1].shard().throttle = Throttle::new(64 << 10);
    for (id, node) in [(taken, 0), (given, 1)] {
        c.nodes[node].ask(id, RequestOp::Admin(AdminOp::Members(MemberOp::Add(peer(node + 1)))));
    }
    c.until("much is taken in", |c| moved(c, 1, Counter::SnapshotBytesIn) >= 100 << 10);
    let bytes = [Counter::SnapshotBytesIn, Counter::SnapshotBytesOut].map(|counter| moved(&mut c, 1, counter));
    assert!(bytes[1] * 3 >= bytes[0], "{bytes:?}");
}
