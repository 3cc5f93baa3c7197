//! When it is calm: the voters of a copyset come to say the same of themselves, and to hold the same bytes.

use super::asker::{Asker, Part};
use super::{COPYSETS, Run, peer};
use crate::client::{CHUNK, POOL};
use crate::codec::{self, Frame};
use crate::run::Actor;
use crate::world::{ActorEvent, World};
use bytes::BytesMut;
use chunkserver::shard::request::CopysetStatus;
use raftlog::CopysetId;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

const CHUNK_BYTES: u64 = 256 << 10;
pub(super) const LEADER: u32 = 1;
const OUT_OF_SERVICE: u32 = 5;
const STEP: u64 = 100_000_000;
/// So long may replicas take to agree, steps.
pub(super) const STEPS: u64 = 400;
/// So often is a replica asked that refuses a chunk which another one has, steps apart: longer than the server's longest
/// pause between two attempts to repair.
const ASKS: u64 = 90;
const STEPS_APART: u64 = 10;

/// Lets time pass.
struct Sleep {
    me: usize,
    over: bool,
}

impl Actor for Sleep {
    fn event(&mut self, world: &mut World, event: ActorEvent) {
        match event {
            ActorEvent::Start => world.tell_at(world.now() + STEP, self.me, ActorEvent::Timer(0)),
            _ => self.over = true,
        }
    }
    fn done(&self) -> bool {
        self.over
    }
}

/// Status and checksum.
type Said = (u64, Vec<u8>);

/// For the checksum of a whole chunk.
fn hash_of((_, copyset, chunk): Part) -> BytesMut {
    let mut body = BytesMut::new();
    for (field, value) in (1..).zip([POOL, copyset, chunk, 0, CHUNK_BYTES]) {
        codec::number(&mut body, field, value);
    }
    body
}

impl Run {
    pub(super) fn sleep(&mut self) {
        let me = self.sim.actors.len();
        self.sim.add_actor(Box::new(Sleep { me, over: false }));
        self.go(2 * STEP);
    }

    /// What each node says of a copyset.
    fn show(&self, copyset: u64) -> String {
        let id = CopysetId(POOL << 32 | copyset).0;
        let name = |peer: u64| (0..self.nodes).find(|&node| self::peer(node).0 == peer);
        let line = |node: usize| {
            let all = self.sim.copysets(node);
            let s = all.iter().find(|s| s.id == id).cloned().unwrap_or_default();
            let (leader, peers) = (name(s.leader), s.peers.iter().map(|&p| name(p)).collect::<Vec<_>>());
            let (up, shards) = (self.sim.world.borrow().nodes[node].up, all.len());
            format!(
                "\n    node {node} up {up}, {shards} copysets: state {} term {} leader {leader:?} of {peers:?}, log {}..{}, committed {}, applied {}, chunks {}",
                s.state, s.term, s.first, s.last, s.committed, s.applied, s.chunks
            )
        };
        (0..self.nodes).map(line).collect()
    }

    /// What everybody says of everything.
    pub(super) fn state(&self) -> String {
        let nodes = (0..self.nodes).map(|node| format!("\n    node {node}:{}", self.sim.status(node)));
        let copysets = (1..=COPYSETS).map(|copyset| format!("\n   copyset {copyset}:{}", self.show(copyset)));
        nodes.chain(copysets).collect()
    }

    /// All of each copyset's voters, if one leads them and all have applied the same; else what is said of it.
    fn voters(&self) -> Result<BTreeMap<u64, Vec<usize>>, String> {
        let all: Vec<Vec<CopysetStatus>> = (0..self.nodes).map(|node| self.sim.copysets(node)).collect();
        let mut voters = BTreeMap::new();
        for copyset in 1..=COPYSETS {
            let id = CopysetId(POOL << 32 | copyset);
            let find = |node: usize| all[node].iter().find(|status| status.id == id.0);
            let leaders: Vec<&CopysetStatus> =
                (0..self.nodes).filter_map(find).filter(|status| status.state == LEADER).collect();
            let newest = leaders.iter().max_by_key(|status| status.term);
            let Some(leader) = newest else {
                return Err(format!("copyset {copyset} has no leader"));
            };
            // A replica whose log lost even its checkpoint is out of service until an operator makes it anew.
            let lost = |&node: &usize| {
                let harmed = self.sim.world.borrow().nodes[node].disk.exposed.lost(copyset);
                harmed && find(node).is_some_and(|s| s.state == OUT_OF_SERVICE && s.peers.is_empty())
            };
            let member = |node: &usize| leader.peers.contains(&peer(*node).0);
            let nodes: Vec<usize> = (0..self.nodes).filter(member).filter(|node| !lost(node)).collect();
            let same = |&node: &usize| {
                find(node).is_some_and(|s| {
                    (s.applied, s.last, s.term, s.leader) == (leader.last, leader.last, leader.term, leader.peer)
                })
            };
            if !nodes.iter().all(same) {
                return Err(format!("the replicas of copyset {copyset} differ"));
            }
            voters.insert(copyset, nodes);
        }
        Ok(voters)
    }

    /// See the module's text. Why it cannot be told, if it cannot; replicas that differ are violations.
    pub(super) fn audit(&mut self) -> Option<&'static str> {
        let mut voters = self.voters();
        for _ in 0..STEPS {
            if voters.is_ok() {
                break;
            }
            self.sleep();
            voters = self.voters();
        }
        let voters = match voters {
            Ok(voters) => voters,
            Err(why) => {
                self.history.borrow_mut().violations.push(why);
                return Some("the replicas did not come to agree");
            }
        };
        let chunks: BTreeSet<(u64, u64)> =
            self.history.borrow().places().iter().map(|place| (place.copyset, place.chunk)).collect();
        let parts = chunks
            .iter()
            .flat_map(|&(copyset, chunk)| voters[&copyset].iter().map(move |&node| (node, copyset, chunk)));
        let (mut left, found) = (parts.collect::<BTreeSet<Part>>(), Rc::default());
        for _ in 0..ASKS {
            if !self.hash(&left, &found) {
                return Some("checksums of chunks were not answered");
            }
            // What is harmed on all of them is lost; all else must come back.
            left.retain(|part| found.borrow()[part].0 != 0);
            left.retain(|&(_, copyset, chunk)| !voters[&copyset].iter().all(|&n| self.harmed(n, copyset, chunk)));
            if left.is_empty() {
                break;
            }
            (0..STEPS_APART).for_each(|_| self.sleep());
        }
        for (copyset, chunk) in chunks {
            let of = |&node: &usize| (node, found.borrow()[&(node, copyset, chunk)].clone());
            let all: Vec<(usize, Said)> = voters[&copyset].iter().map(of).collect();
            let healthy: Vec<_> =
                all.iter().filter(|(node, said)| said.0 == 0 || left.contains(&(*node, copyset, chunk))).collect();
            if healthy.iter().any(|(_, said)| said.0 != 0 || *said != healthy[0].1) {
                let why = format!("copyset {copyset} chunk {chunk}: the replicas' checksums differ: {all:?}");
                self.history.borrow_mut().violations.push(why);
            }
        }
        None
    }

    /// Have these answered.
    fn hash(&mut self, parts: &BTreeSet<Part>, found: &Rc<RefCell<BTreeMap<Part, Said>>>) -> bool {
        let (me, links) = (self.sim.actors.len(), super::client::Links::new(self.nodes));
        let found = Rc::clone(found);
        let answered = Box::new(move |part, frame: &Frame| {
            let fields = codec::fields(&frame.body).unwrap_or_default();
            let Some(status) = codec::get_number(&fields, 1) else { return false };
            let hash = codec::get_bytes(&fields, 2).unwrap_or_default().to_vec();
            found.borrow_mut().insert(part, (status, hash));
            true
        });
        let (left, pause, call) = (parts.clone(), 2_000_000_000, (CHUNK, "GetChunkHash"));
        self.sim.add_actor(Box::new(Asker { me, links, left, pause, call, body: hash_of, answered }));
        self.go(super::PATIENCE)
    }

    /// Whether a node's disk has harmed this chunk, so that it may refuse to read it.
    fn harmed(&self, node: usize, copyset: u64, chunk: u64) -> bool {
        let mut world = self.sim.world.borrow_mut();
        let disk = &mut world.nodes[node].disk;
        crate::rot::name_the_harmed(disk);
        disk.exposed.harms(copyset, chunk)
    }
}
