//! When it is calm: replicas that are no members any more are deleted, as Curve's MDS orders it. Until then they keep
//! their chunks, and may fill the disks of a quorum.

use super::asker::{Asker, Part};
use super::audit::{LEADER, STEPS};
use super::client::Links;
use super::{COPYSETS, Run, peer};
use crate::client::POOL;
use crate::codec::{self, Frame};
use bytes::BytesMut;
use raftlog::CopysetId;
use std::collections::BTreeSet;

const NOT_THERE: u64 = 2;

/// For a replica's deletion.
fn deletion_of((_, copyset, _): Part) -> BytesMut {
    let mut body = BytesMut::new();
    codec::number(&mut body, 1, POOL);
    codec::number(&mut body, 2, copyset);
    body
}

/// The first time a replica may only go to the trash.
fn is_gone(_: Part, frame: &Frame) -> bool {
    codec::fields(&frame.body).is_some_and(|fields| codec::get_number(&fields, 1) == Some(NOT_THERE))
}

impl Run {
    /// Replicas of nodes that their copyset's leader does not count, and whether every copyset has a leader to say so.
    fn dead(&self) -> (BTreeSet<Part>, bool) {
        let all: Vec<_> = (0..self.nodes).map(|node| self.sim.copysets(node)).collect();
        let (mut dead, mut sure) = (BTreeSet::new(), true);
        for copyset in 1..=COPYSETS {
            let id = CopysetId(POOL << 32 | copyset).0;
            let find = |node: usize| all[node].iter().find(|status| status.id == id);
            let leaders = (0..self.nodes).filter_map(find).filter(|status| status.state == LEADER);
            match leaders.max_by_key(|status| status.term).filter(|status| !status.changing) {
                Some(leader) => {
                    let out = |node: &usize| find(*node).is_some() && !leader.peers.contains(&peer(*node).0);
                    dead.extend((0..self.nodes).filter(out).map(|node| (node, copyset, 0)));
                }
                None => sure = false,
            }
        }
        (dead, sure)
    }

    /// See the module's text. Why it was not done, if not. `all`: wait until every copyset says who its members are. What is
    /// full for one copyset's dead may keep another one from saying so.
    pub(super) fn bury(&mut self, all: bool) -> Option<&'static str> {
        for _ in 0..STEPS {
            let (left, sure) = self.dead();
            if left.is_empty() && (sure || !all) {
                return None;
            }
            let (me, links) = (self.sim.actors.len(), Links::new(self.nodes));
            let (pause, call) = (200_000_000, ("chunkserver.internal.ReplicaService", "Delete"));
            let answered = Box::new(is_gone);
            self.sim.add_actor(Box::new(Asker { me, links, left, pause, call, body: deletion_of, answered }));
            if !self.go(super::PATIENCE) {
                return Some("replicas that are no members were not deleted");
            }
            self.sleep();
        }
        Some("no leader, or a change of members without end")
    }
}
