//! Three replicas, and messages that arrive at once unless they are cut off or refused.

use super::{ID, Node};
use copyset::raft::eraftpb::{Message, MessageType};
use copyset::{Config, Role};

pub struct Trio {
    pub nodes: [Node; 3],
    /// Who hears nobody, and is not heard.
    pub cut: Vec<u64>,
    /// Entries of this one are not taken by the others.
    pub refused: u64,
    /// Since [`Self::pass`] began.
    pub sent: Vec<MessageType>,
}

impl Trio {
    pub fn new(seed: u64, set: impl Fn(Config) -> Config) -> Self {
        let node = |peer| Node::new(set(Config::new(ID, peer, seed)), &[1, 2, 3], seed);
        Self { nodes: [1, 2, 3].map(node), cut: Vec::new(), refused: 0, sent: Vec::new() }
    }

    fn arrives(&self, message: &Message) -> bool {
        let entries = message.get_msg_type() == MessageType::MsgAppend && !message.get_entries().is_empty();
        let cut = self.cut.contains(&message.from) || self.cut.contains(&message.to);
        !(cut || entries && message.from == self.refused)
    }

    pub fn exchange(&mut self) {
        loop {
            let mut mail: Vec<Message> = Vec::new();
            for node in &mut self.nodes {
                node.settle();
                mail.append(&mut node.outgoing);
            }
            if mail.is_empty() {
                return;
            }
            mail.retain(|message| self.arrives(message));
            for message in mail {
                self.sent.push(message.get_msg_type());
                let _ = self.nodes[message.to as usize - 1].step(message);
            }
        }
    }

    /// So many times T pass.
    pub fn pass(&mut self, timeouts: u64) {
        self.sent.clear();
        let config = &self.nodes[0].config;
        for _ in 0..timeouts * config.election_timeout_ns / config.tick_ns() {
            self.nodes.iter_mut().for_each(Node::tick);
            self.exchange();
        }
    }

    /// The place of the one that leads and is not cut off.
    pub fn leader(&self) -> usize {
        let leads = |n: &Node| n.copyset.role() == Role::Leader && !self.cut.contains(&n.copyset.peer());
        self.nodes.iter().position(leads).expect("a leader")
    }
}
