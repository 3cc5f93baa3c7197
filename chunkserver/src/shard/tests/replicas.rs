//! Copysets of several nodes, under faults: what was answered holds, the replicas hold the same bytes, and nothing is
//! promised or counted that nobody has.

use super::cluster::{Client, Cluster};
use super::world::{Rng, Setup};
use crate::shard::request::{AdminOp, ChunkOp, Outcome, RequestOp};
use raftlog::CopysetId;

fn setup(rng: &mut Rng) -> Setup {
    let segment = [128 << 10, 512 << 10][rng.below(2)];
    let segments = 4 + rng.below(4) as u64;
    let slots = [16, 60][rng.below(2)];
    Setup {
        size: segment * segments + (4 << 20) + slots * (80 << 10),
        segment,
        segments,
        payload_arena: 4 << 20,
        dirty_limit: [64 << 10, 256 << 10, 1 << 20][rng.below(3)],
        flush_age_ms: [1, 50, 5000][rng.below(3)],
        ..Setup::default()
    }
}

#[derive(Default, Debug)]
struct Totals {
    done: u64,
    reads: u64,
    redirected: u64,
    refused: u64,
    kills: u64,
    cuts: u64,
    lost: u64,
    delivered: u64,
}

fn copysets(count: usize) -> Vec<CopysetId> {
    (1..=count as u32).map(|n| CopysetId::new(1, n)).collect()
}

fn start(count: usize, setup: &Setup, seed: u64, ids: &[CopysetId]) -> Cluster {
    let mut cluster = Cluster::new(count, setup, seed);
    let voters: Vec<usize> = (0..count).collect();
    for &id in ids {
        cluster.create(id, &voters);
    }
    for &id in ids {
        cluster.wait_leader(id);
    }
    cluster
}

/// Faults come and go; at most a minority is down or cut off at a time, and sometimes all are.
struct Nemesis {
    down: Vec<usize>,
    alone: Option<usize>,
}

impl Nemesis {
    fn act(&mut self, c: &mut Cluster, clients: &mut [Client], totals: &mut Totals) {
        let count = c.nodes.len();
        match c.rng.below(8) {
            0 | 1 if self.down.len() < (count - 1) / 2 => {
                let node = c.rng.below(count);
                if c.nodes[node].is_up() {
                    self.kill(c, clients, node, totals);
                }
            }
            2 if c.rng.one_in(4) => {
                for node in 0..count {
                    if c.nodes[node].is_up() {
                        self.kill(c, clients, node, totals);
                    }
                }
            }
            3 if self.alone.is_none() => {
                let node = c.rng.below(count);
                totals.cuts += 1;
                self.alone = Some(node);
                if c.rng.one_in(3) {
                    // One way only: it speaks and does not hear.
                    c.cut.extend((0..count).map(|other| (other, node)));
                } else {
                    c.isolate(node);
                }
            }
            4 | 5 => {
                self.alone = None;
                c.cut.clear();
            }
            _ => {
                if let Some(node) = self.down.pop() {
                    c.start(node);
                }
            }
        }
    }

    fn kill(&mut self, c: &mut Cluster, clients: &mut [Client], node: usize, totals: &mut Totals) {
        let per_chunk = c.nodes[node].blocks();
        // What it answered before it died counts.
        clients.iter_mut().for_each(|client| client.collect(c));
        c.kill(node);
        clients.iter_mut().for_each(|client| client.died(node, per_chunk));
        self.down.push(node);
        totals.kills += 1;
    }

    fn end(&mut self, c: &mut Cluster) {
        c.cut.clear();
        c.loss = None;
        for node in std::mem::take(&mut self.down) {
            c.start(node);
        }
    }
}

fn run(seed: u64, steps: usize, totals: &mut Totals) {
    let mut rng = Rng(seed);
    let setup = setup(&mut rng);
    let count = [3, 3, 5, 2][rng.below(4)];
    let ids = copysets(1 + rng.below(3));
    let chunks = 1 + rng.below(8);
    let mut c = start(count, &setup, seed, &ids);
    let mut clients: Vec<Client> = ids.iter().map(|&id| Client::new(id, chunks)).collect();
    let mut nemesis = Nemesis { down: Vec::new(), alone: None };
    c.loss = [None, Some(400), Some(2000)][rng.below(3)];
    let calm = [usize::MAX, 600, 2000][rng.below(3)];
    for _ in 0..steps {
        if rng.one_in(3) {
            let at = rng.below(clients.len());
            clients[at].ask(&mut c);
        }
        c.step();
        clients.iter_mut().for_each(|client| client.collect(&mut c));
        if calm != usize::MAX && rng.one_in(calm) {
            nemesis.act(&mut c, &mut clients, totals);
        }
    }
    nemesis.end(&mut c);
    clients.iter_mut().for_each(|client| client.check_all(&mut c));
    c.quiesce(&ids);
    ids.iter().for_each(|&id| c.compare(id, chunks as u64));
    for client in &clients {
        totals.done += client.done;
        totals.reads += client.reads;
        totals.redirected += client.redirected;
        totals.refused += client.refused;
    }
    totals.lost += c.lost;
    totals.delivered += c.delivered;
}

/// `REPLICA_SEED` runs one, `REPLICA_SEEDS` so many.
#[test]
fn replicas_agree_and_keep_what_was_answered() {
    let number = |name| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    let (first, count) = match number("REPLICA_SEED") {
        Some(seed) => (seed, 1),
        None => (0, number("REPLICA_SEEDS").unwrap_or(20)),
    };
    let mut totals = Totals::default();
    for seed in first..first + count {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(seed, 8000, &mut totals)));
        if let Err(why) = result {
            eprintln!("REPLICA_SEED={seed}");
            std::panic::resume_unwind(why);
        }
    }
    eprintln!("{totals:?}");
    if count >= 20 {
        assert!(totals.done > 1000 && totals.reads > 300 && totals.redirected > 10, "{totals:?}");
        assert!(totals.kills > 20 && totals.cuts > 5 && totals.lost > 20, "{totals:?}");
    }
}

#[test]
fn a_tail_that_waits_for_a_quorum_pins_no_log_after_a_restart() {
    let (id, own) = (CopysetId::new(1, 1), CopysetId::new(1, 2));
    let mut c = start(3, &Setup::default(), 5, &[id]);
    let leader = c.wait_leader(id);
    let node = (leader + 1) % 3;
    c.create(own, &[node]);
    c.isolate((leader + 2) % 3);
    let last = c.nodes[node].shard().groups[&id].raft.last_index() + 1;
    c.nodes[leader].write(id, 1, 0, 1, 11).expect("a buffer");
    let holds = |c: &mut Cluster| c.nodes[node].shard().groups[&id].raft.durable_index() == last;
    c.until("it holds an entry", holds);
    c.kill(node);
    c.isolate(node);
    c.start(node);
    c.until("it leads what is its own", |c| c.nodes[node].shard().leads(own));
    assert!(c.nodes[node].shard().groups[&id].raft.commit_index() < last, "and does not know it to be committed");
    for stamp in 0..200 {
        let slot = c.nodes[node].write(own, 1, 0, 1, 100 + stamp).expect("a buffer");
        assert_eq!(c.answer(node, slot).outcome, Outcome::Success);
    }
    assert_eq!(c.nodes[node].shard().groups[&id].raft.last_index(), last);
    c.cut.clear();
    c.quiesce(&[id, own]);
    c.compare(id, 2);
}

#[test]
fn a_leader_in_the_trash_holds_no_memory_and_leads_no_more() {
    let (setup, id) = (Setup { trash_s: 1_000_000, ..Setup::default() }, CopysetId::new(1, 1));
    let mut c = start(3, &setup, 3, &[id]);
    let leader = c.wait_leader(id);
    c.isolate(leader);
    let slot = c.nodes[leader].write(id, 1, 0, 4, 11).expect("a buffer");
    let reads = RequestOp::Chunk { chunk: 1, op: ChunkOp::Read { offset: 0, len: 4096 } };
    assert!(c.nodes[leader].shard().in_flight_bytes > 0);
    let reply = c.ask(leader, id, RequestOp::Admin(AdminOp::DeleteCopyset));
    assert_eq!(reply.outcome, Outcome::Success);
    assert_eq!(c.answer(leader, slot).outcome, Outcome::NoCopyset);
    assert_eq!(c.ask(leader, id, reads).outcome, Outcome::NoCopyset);
    let shard = c.nodes[leader].shard();
    assert_eq!((shard.groups.len(), shard.in_flight_bytes, shard.led().count()), (1, 0, 0));
}
