//! Replicas under everything at once, by seed: loss, duplicates, delay, one-way cuts, pauses, crashes, slow disks,
//! clocks that run apart, transfers, membership changes, truncated logs. What must hold always is checked at every
//! turn (`common/net.rs`); liveness once the faults stop.
//!
//! More seeds: `CHAOS_SEEDS=2000 cargo test -p copyset --test chaos`.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;

use common::net::{MS, Net, Weather};
use std::collections::BTreeMap;

fn seeds(few: u64) -> u64 {
    std::env::var("CHAOS_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(few)
}

#[derive(Default)]
struct Tally(BTreeMap<&'static str, u64>);

impl Tally {
    fn count(&mut self, what: &'static str, n: u64) {
        *self.0.entry(what).or_default() += n;
    }
}

fn weather(net: &mut Net) -> Weather {
    let slow = net.rng.one_in(4);
    Weather {
        delay_ns: (MS / 10, if slow { 60 * MS } else { 3 * MS }),
        lose_one_in: [0, 0, 50, 8][net.rng.below(4) as usize],
        duplicate_one_in: [0, 20][net.rng.below(2) as usize],
        disk_ns: if net.rng.one_in(5) { 40 * MS } else { 2 * MS },
    }
}

/// One thing goes wrong, or right.
fn event(net: &mut Net, count: u64, tally: &mut Tally) {
    let peer = 1 + net.rng.below(count);
    let other = 1 + net.rng.below(count);
    match net.rng.below(16) {
        0 | 1 => {
            net.crash(peer);
            tally.count("crash", 1);
        }
        2 => {
            net.paused.insert(peer);
            tally.count("pause", 1);
        }
        3 => {
            net.down.insert(peer);
            tally.count("down", 1);
        }
        4 => {
            net.isolate(peer);
            tally.count("isolation", 1);
        }
        5 => {
            net.cut.insert((peer, other));
            tally.count("one-way cut", 1);
        }
        6 | 7 => {
            net.weather = weather(net);
            tally.count("weather", 1);
        }
        8 | 9 => {
            let node = net.node(peer);
            let (first, applied) = (node.copyset.first_index() - 1, node.copyset.applied_index());
            if !node.copyset.is_installing() && applied > first {
                let at = first + net.rng.below(applied - first + 1);
                net.node(peer).checkpoint(at);
                tally.count("truncation", 1);
            }
        }
        10 => {
            let node = net.node(peer);
            let applied = node.copyset.applied_index();
            node.log.borrow_mut().evict(common::ID, applied);
            tally.count("eviction", 1);
        }
        11 => {
            if let Some(leader) = net.leader() {
                let node = net.node(leader);
                tally.count("transfer", u64::from(node.copyset.transfer_leader(node.now, 0).is_ok()));
            }
        }
        12 | 13 => {
            let mut target: Vec<u64> = (1..=count).filter(|_| net.rng.one_in(2)).collect();
            target.extend((target.is_empty()).then_some(other));
            if let Some((.., Ok(_))) = net.change(&target) {
                tally.count("change", 1);
            }
        }
        _ => {
            net.heal();
            tally.count("healing", 1);
        }
    }
}

fn life(count: u64, seed: u64, tally: &mut Tally) {
    let mut net = Net::new(count, seed);
    if seed.is_multiple_of(3) {
        // Idle whenever nobody uses it for a moment.
        for node in net.nodes.values_mut() {
            node.config.idle_after_ns = 0;
            node.restart();
        }
    }
    for _ in 0..30 {
        event(&mut net, count, tally);
        for _ in 0..net.rng.below(60) {
            match net.rng.below(4) {
                0 => net.read(),
                1 => {}
                _ => {
                    let blocks = net.rng.below(3) as usize;
                    net.write(blocks);
                }
            }
            let pause = 1 + net.rng.below(10);
            net.run(pause * MS);
        }
    }
    net.converge(60_000);
    assert!(net.violations.is_empty(), "seed {seed}, {count} replicas: {:#?}", net.violations);
    tally.count("answered", net.answered);
    tally.count("lease reads", net.lease_reads);
    tally.count("quorum reads", net.index_reads);
    tally.count("fetches", net.fetched);
    tally.count("installs", net.nodes.values().map(|n| n.installed as u64).sum());
    tally.count(
        "changes done",
        net.nodes.values().flat_map(|n| n.changes.values()).filter(|c| c.is_ok()).count() as u64,
    );
    for (_, fate) in net.nodes.values().flat_map(|n| &n.answered) {
        tally.count(if fate.is_none() { "writes answered" } else { "writes in doubt" }, 1);
    }
    // Nothing answered is lost: it is in what every member has applied.
    let leader = net.leader().unwrap();
    let applied = &net.nodes[&leader].applied;
    let cookies: std::collections::BTreeSet<u64> =
        applied.values().filter_map(|(_, c, _)| c.last_chunk::<8>()).map(|c| u64::from_le_bytes(*c)).collect();
    for (cookie, fate) in net.nodes.values().flat_map(|n| &n.answered) {
        match fate {
            None => assert!(cookies.contains(cookie), "seed {seed}: {cookie} was answered, then lost"),
            Some(false) => assert!(!cookies.contains(cookie), "seed {seed}: {cookie} was reported gone, yet applied"),
            Some(true) => {}
        }
    }
}

#[test]
fn nothing_answered_is_lost_and_no_read_is_stale() {
    let mut tally = Tally::default();
    for seed in 0..seeds(40) {
        life([3, 3, 5, 2, 1, 3][seed as usize % 6], seed, &mut tally);
    }
    println!("{:?}", tally.0);
    for what in ["crash", "pause", "isolation", "one-way cut", "truncation", "eviction", "transfer", "change"] {
        assert!(tally.0.get(what).is_some_and(|&n| n > 5), "{what}: {:?}", tally.0);
    }
    for (what, least) in [("writes answered", 2000), ("writes in doubt", 20), ("lease reads", 1000)] {
        assert!(tally.0[what] > least, "{what}: {:?}", tally.0);
    }
    for what in ["quorum reads", "fetches", "installs", "changes done"] {
        assert!(tally.0[what] > 0, "{what}: {:?}", tally.0);
    }
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let run = |seed| {
        let mut tally = Tally::default();
        life(3, seed, &mut tally);
        tally.0
    };
    assert_eq!(run(5), run(5));
}
