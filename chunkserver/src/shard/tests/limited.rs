//! A limit on the chunk data of raft snapshots: it holds on either side, and slows down without spoiling anything.

use super::changes::{ID, cluster, leave_behind};
use super::cluster::Cluster;
use super::world::Setup;
use crate::metrics::Counter;
use crate::shard::throttle::Throttle;

/// So slow that a piece of an unlimited asker is on its way for longer than an offer stands by itself.
const RATE: u64 = 3 << 10;
/// Of a chunk of 64 KiB.
const PIECE: u64 = 8 << 10;

fn moved(c: &mut Cluster, node: usize, counter: Counter) -> u64 {
    c.nodes[node].shard().metrics.value(counter)
}

/// Feed a replica that fell behind, with the limit on one side or both; how long that took and what was moved.
fn feed(giver: bool, taker: bool) -> (u64, u64) {
    let mut c = cluster(3, &[0, 1, 2], &Setup::default(), 31);
    let mut stamp = 0;
    let follower = leave_behind(&mut c, &mut stamp);
    let leader = c.wait_leader(ID);
    for (node, limited) in [(leader, giver), (follower, taker)] {
        c.nodes[node].shard().throttle = Throttle::new(if limited { RATE } else { 0 });
    }
    c.cut.clear();
    c.until("chunks are taken in", |c| c.nodes[follower].shard().installs(ID));
    let start = c.now;
    c.until("all are", |c| !c.nodes[follower].shard().installs(ID));
    let took = c.now.since_ns(start);
    let bytes = moved(&mut c, follower, Counter::SnapshotBytesIn);
    assert!(moved(&mut c, leader, Counter::SnapshotBytesOut) >= bytes);
    c.quiesce(&[ID]);
    c.compare(ID, 6);
    (took, bytes)
}

#[test]
fn a_limited_catch_up_takes_its_time_and_ends_equal() {
    let (quick, all) = feed(false, false);
    assert!(all >= 8 * PIECE, "{all} bytes are something to move");
    for (giver, taker) in [(true, false), (false, true), (true, true)] {
        let (took, bytes) = feed(giver, taker);
        // Free are the first piece and what a quarter of a second had left over.
        let least = (bytes - PIECE - RATE / 4) * 1_000_000_000 / RATE;
        assert!(took >= least && took > 5 * quick, "{bytes} bytes in {took} ns, without a limit {quick} ns");
        assert!(took < 2 * least + 5_000_000_000, "{bytes} bytes in {took} ns: it waits for more than the limit");
        assert!(bytes <= all + 4 * PIECE, "{bytes} bytes for {all}: it begins again and again");
    }
}
