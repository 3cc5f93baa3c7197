//! What a thousand idle copysets cost. A report, no limit: machines differ (`--nocapture`).
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::disallowed_types)] // measures

mod common;

use common::Node;
use copyset::raft::eraftpb::Message;
use copyset::{Config, Role};
use raftlog::CopysetId;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

const GROUPS: usize = 30;
const SECONDS: u64 = 4;

#[test]
fn a_thousand_idle_copysets() {
    let config = |peer, seed| Config::new(CopysetId::new(1, 7), peer, seed);
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
    let leading = groups.iter().flatten().filter(|n| n.copyset.role() == Role::Leader && n.may_read()).count();
    assert_eq!(leading, GROUPS, "each has a leader with a lease");
    let share = spent["idle"].as_secs_f64() / SECONDS as f64 / GROUPS as f64 / 3.0 * 1000.0;
    println!(
        "1000 idle replicas (of {GROUPS} groups measured, test and all): {:.2} % of a core, {} messages/s each",
        share * 100.0,
        messages / SECONDS / GROUPS as u64 / 3
    );
}
