//! Which node leads a copyset, as far as this client was told; a guess is good enough, a follower says whom to ask.
//!
//! As libcurve's cache: a redirect's hint is believed at once, and a node that does not answer is left for the next one.
//! A guess that is wrong costs a round trip, never an answer.

use std::collections::BTreeMap;
use std::net::SocketAddr;

/// Nodes of a cluster and the leader of each copyset among them.
#[derive(Debug, Clone)]
pub struct Leaders {
    nodes: Vec<SocketAddr>,
    known: BTreeMap<(u32, u32), usize>,
}

impl Leaders {
    /// Of `nodes`, none of which is known to lead anything.
    pub const fn new(nodes: Vec<SocketAddr>) -> Self {
        Self { nodes, known: BTreeMap::new() }
    }

    /// Addresses of the nodes, in the order that numbers them.
    pub fn nodes(&self) -> &[SocketAddr] {
        &self.nodes
    }

    /// Number of the node to ask for `copyset`, `(logical pool, id)`; the first one if nothing is known.
    pub fn of(&self, copyset: (u32, u32)) -> usize {
        self.known.get(&copyset).copied().unwrap_or_default()
    }

    /// A node named `peer` (`ip:port:index`) as the leader. False, and nothing changes, if that is none of ours.
    pub fn learn(&mut self, copyset: (u32, u32), peer: &str) -> bool {
        let Some((address, _)) = peer.rsplit_once(':') else { return false };
        let node = address.parse().ok().and_then(|at: SocketAddr| self.nodes.iter().position(|node| *node == at));
        if let Some(node) = node {
            self.known.insert(copyset, node);
        }
        node.is_some()
    }

    /// Node `node` did not do as the leader of `copyset`: the next one is asked, unless another is known by now.
    pub fn doubt(&mut self, copyset: (u32, u32), node: usize) {
        if self.of(copyset) == node && !self.nodes.is_empty() {
            self.known.insert(copyset, (node + 1) % self.nodes.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hints_are_believed_and_silent_nodes_are_left_once() {
        let nodes: Vec<SocketAddr> = (1..=3).map(|port| SocketAddr::from(([127, 0, 0, 1], port))).collect();
        let mut leaders = Leaders::new(nodes);
        let (copyset, other) = ((1, 7), (1, 8));
        assert_eq!(leaders.of(copyset), 0);
        assert!(leaders.learn(copyset, "127.0.0.1:3:0"));
        assert_eq!((leaders.of(copyset), leaders.of(other)), (2, 0));
        for stranger in ["127.0.0.1:4:0", "127.0.0.2:1:0", "", "127.0.0.1", "leader:1:0"] {
            assert!(!leaders.learn(copyset, stranger), "{stranger}");
        }
        leaders.doubt(copyset, 2);
        leaders.doubt(copyset, 2);
        assert_eq!(leaders.of(copyset), 0, "the second request that got no answer moves nothing");
        assert_eq!(leaders.of(other), 0);
    }
}
