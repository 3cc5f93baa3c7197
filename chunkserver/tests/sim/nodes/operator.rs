//! Who creates the copysets and then, until it is calm, changes who leads them and who is in them, and asks for
//! checkpoints: through the public calls, as Curve's MDS and its operators do.

use super::client::{Links, node_of};
use crate::client::{COPYSET, POOL};
use crate::codec::{self, Frame};
use crate::history::History;
use crate::node::peer;
use crate::rng::Rng;
use crate::run::Actor;
use crate::world::{ActorEvent, World};
use bytes::BytesMut;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

const CLI: &str = "curve.chunkserver.CliService2";
const NEXT: u64 = 0;
const PATIENCE: u64 = 3_000_000_000;

/// A call with a copyset's name and peers: field and node.
fn message(copyset: u64, peers: &[(u64, usize)]) -> BytesMut {
    let mut out = BytesMut::new();
    codec::number(&mut out, 1, POOL);
    codec::number(&mut out, 2, copyset);
    for &(field, node) in peers {
        let mut name = BytesMut::new();
        codec::bytes(&mut name, 3, peer(node).to_string().as_bytes());
        codec::bytes(&mut out, field, &name);
    }
    out
}

/// Creates copysets on their first members, each until it is answered.
pub(crate) struct Founder {
    me: usize,
    links: Links,
    /// Copyset, member; not there yet.
    left: Vec<(u64, usize)>,
    members: BTreeMap<u64, Vec<usize>>,
}

impl Founder {
    pub(crate) fn new(me: usize, nodes: usize, members: &BTreeMap<u64, Vec<usize>>) -> Self {
        let left = members.iter().flat_map(|(&copyset, nodes)| nodes.iter().map(move |&node| (copyset, node)));
        Self { me, links: Links::new(nodes), left: left.collect(), members: members.clone() }
    }
}

impl Actor for Founder {
    fn event(&mut self, world: &mut World, event: ActorEvent) {
        match event {
            ActorEvent::Start | ActorEvent::Timer(_) if !self.left.is_empty() => {
                for &(copyset, node) in &self.left {
                    let Some(conn) = self.links.ready(world, self.me, node) else { continue };
                    let peers: Vec<String> = self.members[&copyset].iter().map(|&n| peer(n).to_string()).collect();
                    let body = codec::create_copyset_of(POOL, copyset, &peers);
                    let id = copyset << 8 | node as u64;
                    world.send(self.me, conn, codec::request(COPYSET, "CreateCopysetNode2", id, &body, &[]));
                }
                world.tell_at(world.now() + 20_000_000, self.me, ActorEvent::Timer(NEXT));
            }
            ActorEvent::Connected(conn) => self.links.connected(conn),
            ActorEvent::Readable(conn) => {
                for frame in self.links.receive(world, self.me, conn).expect("frames") {
                    let status = codec::fields(&frame.body).and_then(|fields| codec::get_number(&fields, 1));
                    if frame.error == 0 && matches!(status, Some(0 | 1)) {
                        self.left.retain(|&(copyset, node)| frame.correlation != copyset << 8 | node as u64);
                    }
                }
            }
            ActorEvent::Closed(conn) => drop(self.links.closed(world, self.me, conn)),
            _ => {}
        }
    }
    fn done(&self) -> bool {
        self.left.is_empty()
    }
}

#[derive(Clone, Copy, Debug)]
enum Want {
    Transfer,
    Snapshot,
    Members,
}

#[derive(Clone, Copy, Debug)]
enum Stage {
    /// Who leads? The node asked.
    Leader,
    /// The new members' replicas are being created; the leader.
    Create(usize),
    Change,
}

/// See the module's text.
pub(crate) struct Operator {
    me: usize,
    nodes: usize,
    /// Copysets may be left with fewer members than they began with.
    shrinks: bool,
    links: Links,
    history: Rc<RefCell<History>>,
    rng: Rng,
    /// As last heard.
    members: BTreeMap<u64, Vec<usize>>,
    copyset: u64,
    want: Want,
    stage: Stage,
    /// What the change is to lead to.
    goal: Vec<usize>,
    /// Correlation id of the answer that is awaited.
    waits: u64,
    serial: u64,
    finished: bool,
}

impl Operator {
    pub(crate) fn new(
        me: usize,
        nodes: usize,
        shrinks: bool,
        members: BTreeMap<u64, Vec<usize>>,
        history: &Rc<RefCell<History>>,
        rng: Rng,
    ) -> Self {
        let links = Links::new(nodes);
        let (copyset, want, stage, goal) = (1, Want::Transfer, Stage::Leader, Vec::new());
        let history = Rc::clone(history);
        Self {
            me,
            nodes,
            shrinks,
            links,
            history,
            rng,
            members,
            copyset,
            want,
            stage,
            goal,
            waits: 0,
            serial: 1 << 32,
            finished: false,
        }
    }

    fn some_node(&mut self) -> usize {
        self.rng.below(self.nodes as u64) as usize
    }

    fn later(&mut self, world: &mut World) {
        self.waits = 0;
        let pause = self.rng.skewed(10_000_000, 500_000_000);
        world.tell_at(world.now() + pause, self.me, ActorEvent::Timer(NEXT));
    }

    fn begin(&mut self, world: &mut World) {
        if self.history.borrow().calm {
            self.finished = true;
            return;
        }
        self.copyset = self.rng.between(1, self.members.len() as u64);
        self.want = match self.rng.below(10) {
            0..=3 => Want::Transfer,
            4..=5 => Want::Snapshot,
            _ => Want::Members,
        };
        self.stage = Stage::Leader;
        let node = self.some_node();
        self.call(world, node, (CLI, "GetLeader"), &message(self.copyset, &[]));
    }

    fn call(&mut self, world: &mut World, node: usize, to: (&str, &str), body: &[u8]) {
        let Some(conn) = self.links.ready(world, self.me, node) else { return self.later(world) };
        self.serial += 1;
        self.waits = self.serial;
        world.send(self.me, conn, codec::request(to.0, to.1, self.serial, body, &[]));
        world.tell_at(world.now() + PATIENCE, self.me, ActorEvent::Timer(self.serial));
    }

    fn answer(&mut self, world: &mut World, frame: &Frame) {
        if frame.correlation != self.waits {
            return;
        }
        if frame.error != 0 {
            self.history.borrow_mut().count(match self.stage {
                Stage::Change => "operator refused",
                _ => "operator without a leader",
            });
            return self.later(world);
        }
        let fields = codec::fields(&frame.body).unwrap_or_default();
        match self.stage {
            Stage::Leader => {
                let name = codec::get_bytes(&fields, 1).and_then(codec::fields).unwrap_or_default();
                match codec::get_bytes(&name, 3).and_then(|name| node_of(name, self.nodes)) {
                    Some(leader) => self.change(world, leader),
                    None => self.later(world),
                }
            }
            Stage::Create(leader) => self.set_members(world, leader),
            Stage::Change => {
                self.history.borrow_mut().count(match self.want {
                    Want::Transfer => "transfers",
                    Want::Snapshot => "checkpoints asked for",
                    Want::Members => "changes of members",
                });
                if matches!(self.want, Want::Members) {
                    self.members.insert(self.copyset, std::mem::take(&mut self.goal));
                }
                self.later(world);
            }
        }
    }

    fn change(&mut self, world: &mut World, leader: usize) {
        let members = self.members[&self.copyset].clone();
        match self.want {
            Want::Transfer => {
                self.stage = Stage::Change;
                let to = members[self.rng.below(members.len() as u64) as usize];
                let body = message(self.copyset, &[(3, leader), (4, to)]);
                self.call(world, leader, (CLI, "TransferLeader"), &body);
            }
            Want::Snapshot => {
                self.stage = Stage::Change;
                let node = members[self.rng.below(members.len() as u64) as usize];
                let body = message(self.copyset, &[(3, node)]);
                self.call(world, node, (CLI, "Snapshot"), &body);
            }
            Want::Members => {
                let mut all: Vec<usize> = (0..self.nodes).collect();
                self.rng.shuffle(&mut all);
                let fewer = self.shrinks && self.rng.coin();
                all.truncate(if fewer { 2 } else { 3 });
                all.sort_unstable();
                self.goal = all;
                match self.goal.iter().copied().find(|node| !members.contains(node)) {
                    // Several new ones are several creations; the change finds the others absent and is refused.
                    Some(new) => {
                        self.stage = Stage::Create(leader);
                        let body = codec::create_copyset_of(POOL, self.copyset, &[]);
                        self.call(world, new, (COPYSET, "CreateCopysetNode2"), &body);
                    }
                    None => self.set_members(world, leader),
                }
            }
        }
    }

    fn set_members(&mut self, world: &mut World, leader: usize) {
        self.stage = Stage::Change;
        let peers: Vec<(u64, usize)> =
            [(3, leader)].into_iter().chain(self.goal.iter().map(|&node| (4, node))).collect();
        self.call(world, leader, (CLI, "ChangePeers"), &message(self.copyset, &peers));
    }
}

impl Actor for Operator {
    fn event(&mut self, world: &mut World, event: ActorEvent) {
        if self.finished {
            return;
        }
        match event {
            ActorEvent::Start => self.later(world),
            ActorEvent::Timer(NEXT) => self.begin(world),
            ActorEvent::Timer(id) if id == self.waits => self.later(world),
            ActorEvent::Connected(conn) => self.links.connected(conn),
            ActorEvent::Readable(conn) => {
                for frame in self.links.receive(world, self.me, conn).expect("frames") {
                    self.answer(world, &frame);
                }
            }
            ActorEvent::Closed(conn) => drop(self.links.closed(world, self.me, conn)),
            ActorEvent::Timer(_) | ActorEvent::Tripped => {}
        }
    }
    fn done(&self) -> bool {
        self.finished
    }
}
