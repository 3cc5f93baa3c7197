//! A leader that is heard and whose entries nobody takes: followers without room for the chunks that these would create.

#![allow(clippy::unwrap_used)]

mod common;

use common::{ID, Node};
use copyset::raft::eraftpb::{Message, MessageType};
use copyset::{Config, Role};

struct Group {
    nodes: Vec<Node>,
    /// Entries of this one are not taken by the others.
    refused: u64,
}

impl Group {
    fn new(seed: u64) -> Self {
        let node = |peer| Node::new(Config::new(ID, peer, seed), &[1, 2, 3], seed);
        Self { nodes: [1, 2, 3].map(node).into(), refused: 0 }
    }

    fn exchange(&mut self) {
        loop {
            let mut mail: Vec<Message> = Vec::new();
            for node in &mut self.nodes {
                node.settle();
                mail.append(&mut node.outgoing);
            }
            if mail.is_empty() {
                return;
            }
            for message in mail {
                let entries = message.get_msg_type() == MessageType::MsgAppend && !message.get_entries().is_empty();
                if !(entries && message.from == self.refused) {
                    let _ = self.nodes[message.to as usize - 1].step(message);
                }
            }
        }
    }

    /// So many T pass.
    fn pass(&mut self, timeouts: u64) {
        let config = &self.nodes[0].config;
        for _ in 0..timeouts * config.election_timeout_ns / config.tick_ns() {
            self.nodes.iter_mut().for_each(Node::tick);
            self.exchange();
        }
    }

    fn leader(&self) -> usize {
        self.nodes.iter().position(|n| n.copyset.role() == Role::Leader).expect("a leader")
    }
}

#[test]
fn a_leader_whose_entries_nobody_takes_lets_another_one_lead() {
    for seed in 0..5 {
        let mut group = Group::new(seed);
        group.pass(4);
        let leader = group.leader();
        group.nodes[leader].propose(1, 1).unwrap();
        group.exchange();
        assert_eq!(group.nodes[leader].answered.get(&1), Some(&None), "seed {seed}");
        group.refused = leader as u64 + 1;
        group.nodes[leader].propose(2, 1).unwrap();
        group.pass(8);
        assert_eq!(group.leader(), leader, "seed {seed}: not at once");
        group.pass(8);
        let next = group.leader();
        assert_ne!(next, leader, "seed {seed}");
        assert_eq!(group.nodes[leader].answered.get(&2), Some(&Some(true)), "seed {seed}: it was never committed");
        group.nodes[next].propose(3, 1).unwrap();
        group.exchange();
        assert_eq!(group.nodes[next].answered.get(&3), Some(&None), "seed {seed}: what makes room is committed");
        let applied = |n: &Node| n.copyset.applied_index();
        group.pass(1);
        assert!(group.nodes.iter().all(|n| applied(n) == applied(&group.nodes[next])), "seed {seed}");
    }
}

#[test]
fn a_leader_with_work_or_without_stays_as_it_was() {
    let mut group = Group::new(9);
    group.pass(4);
    let (leader, term) = (group.leader(), group.nodes[0].copyset.term());
    group.pass(40);
    assert_eq!((group.leader(), group.nodes[0].copyset.term()), (leader, term));
    for cookie in 0..40 {
        group.nodes[leader].propose(cookie, 1).unwrap();
        group.pass(1);
    }
    assert_eq!((group.leader(), group.nodes[leader].copyset.term()), (leader, term));
}
