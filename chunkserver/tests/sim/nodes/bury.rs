//! When it is calm: replicas that are no members any more are deleted, as Curve's MDS orders it. Until then they keep
//! their chunks, and may fill the disks of a quorum.

use super::audit::{LEADER, STEPS};
use super::client::Links;
use super::{COPYSETS, Run, peer};
use crate::client::POOL;
use crate::codec;
use crate::run::Actor;
use crate::world::{ActorEvent, World};
use bytes::BytesMut;
use raftlog::CopysetId;
use std::collections::BTreeSet;

const NOT_THERE: u64 = 2;

/// Asks for each replica's deletion until it is not there: the first time it may only go to the trash.
struct Undertaker {
    me: usize,
    links: Links,
    /// Node, copyset.
    left: BTreeSet<(usize, u64)>,
}

impl Undertaker {
    fn ask(&mut self, world: &mut World) {
        for &(node, copyset) in &self.left {
            let Some(conn) = self.links.ready(world, self.me, node) else { continue };
            let mut body = BytesMut::new();
            codec::number(&mut body, 1, POOL);
            codec::number(&mut body, 2, copyset);
            let id = (node as u64) << 56 | copyset;
            let call = codec::request("chunkserver.internal.ReplicaService", "Delete", id, &body, &[]);
            world.send(self.me, conn, call);
        }
        world.tell_at(world.now() + 200_000_000, self.me, ActorEvent::Timer(0));
    }
}

impl Actor for Undertaker {
    fn event(&mut self, world: &mut World, event: ActorEvent) {
        match event {
            ActorEvent::Connected(conn) => self.links.connected(conn),
            ActorEvent::Readable(conn) => {
                for frame in self.links.receive(world, self.me, conn).expect("frames") {
                    let fields = codec::fields(&frame.body).unwrap_or_default();
                    if frame.error == 0 && codec::get_number(&fields, 1) == Some(NOT_THERE) {
                        let id = frame.correlation;
                        self.left.remove(&((id >> 56) as usize, id & 0xffff_ffff));
                    }
                }
            }
            ActorEvent::Closed(conn) => drop(self.links.closed(world, self.me, conn)),
            ActorEvent::Start | ActorEvent::Timer(_) if !self.done() => self.ask(world),
            _ => {}
        }
    }
    fn done(&self) -> bool {
        self.left.is_empty()
    }
}

impl Run {
    /// Replicas of nodes that their copyset's leader does not count, and whether every copyset has a leader to say so.
    fn dead(&self) -> (BTreeSet<(usize, u64)>, bool) {
        let all: Vec<_> = (0..self.nodes).map(|node| self.sim.copysets(node)).collect();
        let (mut dead, mut sure) = (BTreeSet::new(), true);
        for copyset in 1..=COPYSETS {
            let id = CopysetId(POOL << 32 | copyset).0;
            let find = |node: usize| all[node].iter().find(|status| status.id == id);
            let leaders = (0..self.nodes).filter_map(find).filter(|status| status.state == LEADER);
            match leaders.max_by_key(|status| status.term).filter(|status| !status.changing) {
                Some(leader) => {
                    let out = |node: &usize| find(*node).is_some() && !leader.peers.contains(&peer(*node).0);
                    dead.extend((0..self.nodes).filter(out).map(|node| (node, copyset)));
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
            self.sim.add_actor(Box::new(Undertaker { me, links, left }));
            if !self.go(super::PATIENCE) {
                return Some("replicas that are no members were not deleted");
            }
            self.sleep();
        }
        Some("no leader, or a change of members without end")
    }
}
