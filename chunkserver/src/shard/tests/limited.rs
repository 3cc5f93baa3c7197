//! A limit on the chunk data of raft snapshots: it holds on either side, and slows down without spoiling anything.

use super::changes::{ID, cluster, leave_behind};
use super::cluster::Cluster;
use super::world::Setup;
use crate::metrics::Counter;
use crate::shard::throttle::Throttle;

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
