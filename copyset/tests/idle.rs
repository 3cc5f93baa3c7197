//! Idle copysets: when they slow down, and what ends it. What a thousand cost is a report, no limit: machines differ
//! (`--nocapture`).
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::disallowed_types)] // measures

mod common;

use common::Node;
use common::trio::Trio;
use copyset::raft::eraftpb::{Message, MessageType};
use copyset::{Config, Role};
use raftlog::CopysetId;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

const GROUPS: usize = 30;
const SECONDS: u64 = 4;

#[test]
fn a_thousand_idle_copysets() {
    let config = |peer, seed| Config { idle_after_ns: 0, ..Config::new(CopysetId::new(1, 7), peer, seed) };
    let mut groups: Vec<[Node; 3]> =
        (0..GROUPS).map(|g| [1, 2, 3].map(|peer| Node::new(config(peer, g as u64), &[1, 2, 3], g as u64))).collect();
    let tick_ns = groups[0][0].config.tick_ns();
    let mut spent = BTreeMap::from([("settling", Duration::ZERO), ("idle", Duration::ZERO)]);
    let mut messages = 0;
    for tick in 0..(SECONDS + 2) * 1_000_000_000 / tick_ns {
        let phase = if tick * tick_ns < 2_000_000_000 { "settling" } else { "idle" };
        for group in &mut groups {
            let started = Instant::now();
            let mut mail: Vec<Message> = Vec::new();
            for node in group.iter_mut() {
                node.tick();
                node.settle();
                mail.append(&mut node.outgoing);
            }
            while let Some(message) = mail.pop() {
                messages += u64::from(phase == "idle");
                let node = &mut group[message.to as usize - 1];
                node.step(message).unwrap();
                node.settle();
                mail.append(&mut node.outgoing);
            }
            *spent.get_mut(phase).unwrap() += started.elapsed();
        }
    }
    let leading = groups.iter().flatten().filter(|n| n.copyset.role() == Role::Leader).count();
    assert_eq!(leading, GROUPS, "each has a leader");
    assert!(groups.iter().flatten().all(|n| n.copyset.is_idle()));
    let share = spent["idle"].as_secs_f64() / SECONDS as f64 / GROUPS as f64 / 3.0 * 1000.0;
    println!(
        "1000 idle replicas (of {GROUPS} groups measured, test and all): {:.2} % of a core, {} messages/s each",
        share * 100.0,
        messages / SECONDS / GROUPS as u64 / 3
    );
}

/// Idle after 2 T.
fn group(seed: u64) -> Trio {
    Trio::new(seed, |config| Config { idle_after_ns: 2 * config.election_timeout_ns, ..config })
}

fn all_idle(group: &Trio) -> bool {
    group.nodes.iter().all(|n| n.copyset.is_idle())
}

fn asleep(seed: u64) -> Trio {
    let mut group = group(seed);
    group.pass(10);
    assert!(all_idle(&group));
    group
}

#[test]
fn unused_copysets_beat_rarely_and_stay_led() {
    let mut group = asleep(1);
    let (leader, term) = (group.leader(), group.nodes[0].copyset.term());
    group.pass(200);
    assert!(all_idle(&group) && group.leader() == leader && group.nodes[0].copyset.term() == term);
    let count = |kind| group.sent.iter().filter(|sent| **sent == kind).count();
    let (beats, answers) = (count(MessageType::MsgHeartbeat), count(MessageType::MsgHeartbeatResponse));
    assert!((2 * 120..=2 * 130).contains(&beats), "{beats} beats to two followers; 2 * 1000 if they were in use");
    assert_eq!(group.sent.len(), beats + answers, "beats and answers, nothing else");
}

#[test]
fn one_follower_that_does_not_slow_down_keeps_all_awake() {
    let mut group = group(2);
    group.pass(2);
    let leader = group.leader();
    let away = (leader + 1) % 3;
    group.cut = vec![away as u64 + 1];
    group.pass(20);
    assert!(!group.nodes[leader].copyset.is_idle());
    group.cut.clear();
    group.pass(10);
    assert!(all_idle(&group));
}

#[test]
fn use_ends_it() {
    let mut group = asleep(3);
    let leader = group.leader();
    assert!(!group.nodes[leader].may_read(), "no lease between two rare beats");
    let now = group.nodes[leader].now;
    group.nodes[leader].copyset.wanted(now);
    group.nodes[leader].copyset.read_index(now, 77).unwrap();
    group.exchange();
    assert_eq!(group.nodes[leader].reads.get(&77), Some(&true), "answered without waiting for a beat");
    assert!(group.nodes[leader].may_read() && !group.nodes.iter().any(|n| n.copyset.is_idle()));
    group.pass(1);
    assert!(group.nodes[leader].may_read() && !all_idle(&group), "for a while");
    group.pass(10);
    assert!(all_idle(&group));
    group.nodes[leader].propose(5, 1).unwrap();
    group.exchange();
    assert!(group.nodes.iter().all(|n| !n.copyset.is_idle() && n.answered.len() + n.applied.len() > 0));
}

#[test]
fn a_client_at_a_follower_wakes_the_leader_if_there_is_one() {
    let mut group = asleep(4);
    let (leader, term) = (group.leader(), group.nodes[0].copyset.term());
    let asked = (leader + 1) % 3;
    let now = group.nodes[asked].now;
    group.nodes[asked].copyset.wanted(now);
    group.exchange();
    assert!(!group.nodes[leader].copyset.is_idle());
    group.pass(4);
    assert_eq!((group.leader(), group.nodes[asked].copyset.term()), (leader, term), "nobody is deposed");

    group.pass(10);
    assert!(all_idle(&group));
    group.cut = vec![leader as u64 + 1];
    let now = group.nodes[asked].now;
    group.nodes[asked].copyset.wanted(now);
    group.pass(3);
    assert_ne!(group.leader(), leader, "T after somebody wanted it, not 8 T");
}

#[test]
fn a_leader_that_dies_unnoticed_is_replaced_later_and_one_whose_connection_breaks_at_once() {
    for (noticed, within) in [(true, 3), (false, 8 * 3)] {
        let mut group = asleep(5);
        let leader = group.leader();
        group.cut = vec![leader as u64 + 1];
        if noticed {
            (0..3).filter(|at| *at != leader).for_each(|at| group.nodes[at].copyset.unreachable(leader as u64 + 1));
        }
        group.pass(within);
        assert_ne!(group.leader(), leader);
    }
}

#[test]
fn a_broken_connection_deposes_nobody() {
    let mut group = asleep(6);
    let (leader, term) = (group.leader(), group.nodes[0].copyset.term());
    for other in (0..3).filter(|at| *at != leader) {
        // Only one side notices.
        group.nodes[other].copyset.unreachable(leader as u64 + 1);
        group.pass(20);
        assert_eq!((group.leader(), group.nodes[other].copyset.term()), (leader, term));
    }
    // The word that it is awake is lost, and its pre-votes are heard by the others, who are asleep.
    let lost = (leader + 1) % 3;
    group.nodes[lost].copyset.unreachable(leader as u64 + 1);
    group.nodes[lost].settle();
    group.nodes[lost].outgoing.clear();
    group.pass(20);
    assert_eq!((group.leader(), group.nodes[lost].copyset.term()), (leader, term));
}
