//! The checker sees what it is there to see: a shard around the copyset that breaks one rule is found out.
#![allow(clippy::unwrap_used)]

mod common;

use common::net::{Fault, MS, Net};

/// The leader keeps one follower, then loses it at the moment the other asks it for its vote.
fn elect_behind_the_leaders_back(fault: Fault, seed: u64) -> Net {
    let mut net = Net::new(3, seed);
    let leader = net.await_leader(3000);
    net.fault = fault;
    net.await_that(1000, "lease", |net| net.node(leader).may_read().then_some(()));
    let (near, far) = match leader {
        1 => (2, 3),
        2 => (3, 1),
        _ => (1, 2),
    };
    net.cut.extend([(leader, far), (far, leader)]);
    net.await_that(2000, "campaign", |net| (net.nodes[&far].copyset.role() == copyset::Role::Candidate).then_some(()));
    net.cut.extend([(leader, near), (near, leader)]);
    for _ in 0..1000 {
        net.write(1);
        net.run(MS);
    }
    net
}

#[test]
fn a_voter_that_does_not_keep_silent() {
    let stale = |fault| {
        let lives = (0..10).map(|seed| elect_behind_the_leaders_back(fault, seed));
        lives.filter(|net| !net.violations.is_empty()).count()
    };
    let (broken, sound) = (stale(Fault::VotesAtOnce), stale(Fault::None));
    assert!(broken >= 8 && sound == 0, "{broken} and {sound} of 10");
}

#[test]
fn an_acknowledgement_before_the_disk() {
    let lost = |fault| {
        let mut lost = 0;
        for seed in 0..20 {
            let mut net = Net::new(3, seed);
            net.await_leader(3000);
            net.fault = fault;
            net.weather.disk_ns = 200 * MS;
            for _ in 0..60 {
                net.write(1);
                net.run(2 * MS);
            }
            // The power fails everywhere.
            (1..=3).for_each(|peer| net.crash(peer));
            net.fault = Fault::None;
            net.heal();
            net.await_leader(20_000);
            net.run(2000 * MS);
            for _ in 0..10 {
                net.write(1);
                net.run(20 * MS);
            }
            lost += u64::from(!net.violations.is_empty());
        }
        lost
    };
    assert!(lost(Fault::EarlyPersist) >= 10);
    assert_eq!(lost(Fault::None), 0);
}

#[test]
fn ticks_made_up_for() {
    // Followers that slept campaign at once, before they have read what came meanwhile.
    let disturbed = |fault| {
        let mut disturbed = 0;
        for seed in 0..10 {
            let mut net = Net::new(3, seed);
            let leader = net.await_leader(3000);
            net.fault = fault;
            for follower in (1..=3).filter(|&p| p != leader) {
                net.paused.insert(follower);
                net.run(900 * MS);
                net.paused.clear();
                for _ in 0..8 {
                    net.run(MS);
                    disturbed += u64::from(net.nodes[&follower].copyset.role() == copyset::Role::Candidate);
                }
                net.run(500 * MS);
            }
        }
        disturbed
    };
    let (broken, sound) = (disturbed(Fault::TickBurst), disturbed(Fault::None));
    assert!(broken >= 5 && sound == 0, "{broken} and {sound}");
}
