//! Several nodes on links that delay, lose and cut, and a client that knows what each chunk may hold.
//!
//! Links keep their order, as TCP does; a loss throws away what a link holds. The clock of all nodes is one, and moves
//! only when nothing else can happen, or by chance.

use super::model::stamps;
use super::world::{Rng, Setup, World};
use crate::io::Instant;
use crate::shard::mail::PeerMail;
use crate::shard::request::{AdminOp, ChunkOp, CopysetStatus, Outcome, Reply, ReplyData, RequestOp};
use raftlog::{BLOCK, CopysetId};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Peer of node `n`.
pub(super) fn peer(node: usize) -> u64 {
    101 + node as u64
}

type Link = (usize, usize, bool);

pub(super) struct Cluster {
    pub(super) nodes: Vec<World>,
    links: BTreeMap<Link, VecDeque<PeerMail>>,
    pub(super) cut: BTreeSet<(usize, usize)>,
    pub(super) now: Instant,
    pub(super) rng: Rng,
    /// Lose what a link holds, once in so many steps.
    pub(super) loss: Option<usize>,
    /// Let time pass although there is something to do, once in so many steps.
    pub(super) lag: usize,
    pub(super) delivered: u64,
    pub(super) lost: u64,
}

impl Cluster {
    pub(super) fn new(count: usize, setup: &Setup, seed: u64) -> Self {
        let node = |n: usize| World::new(Setup { peer: peer(n), ..setup.clone() }, seed ^ (n as u64 + 1) << 40);
        let nodes: Vec<World> = (0..count).map(node).collect();
        let mut cluster = Self {
            now: nodes[0].now,
            nodes,
            links: BTreeMap::new(),
            cut: BTreeSet::new(),
            rng: Rng(seed),
            loss: None,
            lag: 300,
            delivered: 0,
            lost: 0,
        };
        cluster.until("start-up ends", |c| c.nodes.iter_mut().all(|n| n.shard().serving()));
        cluster
    }

    /// Make a copyset with these nodes as voters on each of them.
    pub(super) fn create(&mut self, id: CopysetId, voters: &[usize]) {
        let peers: Vec<u64> = voters.iter().map(|&n| peer(n)).collect();
        for &n in voters {
            let op = RequestOp::Admin(AdminOp::CreateCopyset { peers: peers.clone() });
            let reply = self.ask(n, id, op);
            assert_eq!(reply.outcome, Outcome::Success);
        }
    }

    /// Ask one node and wait for its answer.
    pub(super) fn ask(&mut self, node: usize, id: CopysetId, op: RequestOp) -> Reply {
        let slot = self.nodes[node].ask(id, op);
        self.answer(node, slot)
    }

    pub(super) fn answer(&mut self, node: usize, slot: u32) -> Reply {
        for _ in 0..400_000 {
            if let Some(reply) = self.take(node, slot) {
                return reply;
            }
            self.step();
        }
        panic!("request {slot} of node {node} is never answered: {}", self.describe());
    }

    pub(super) fn take(&mut self, node: usize, slot: u32) -> Option<Reply> {
        let replies = &mut self.nodes[node].replies;
        let at = replies.iter().position(|r| r.origin.slot == slot)?;
        Some(replies.swap_remove(at))
    }

    /// Until the logs are idle and say that all of them is durable: then a bad batch is rot, not a torn tail.
    pub(super) fn seal(&mut self) {
        let sealed = self.now.after_ms(3_000);
        self.until("the logs are sealed", |c| c.now >= sealed);
    }

    pub(super) fn status(&mut self, node: usize, id: CopysetId) -> Option<CopysetStatus> {
        let reply = self.ask(node, id, RequestOp::Admin(AdminOp::CopysetStatus));
        match reply.data {
            ReplyData::Copysets(list) => list.into_iter().next(),
            _ => None,
        }
    }

    pub(super) fn describe(&mut self) -> String {
        let nodes = self.nodes.iter_mut().filter(|n| n.is_up());
        nodes.map(|n| n.describe() + "\n").collect()
    }

    pub(super) fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        for _ in 0..600_000 {
            if done(self) {
                return;
            }
            self.step();
        }
        panic!("never: {what}: {}", self.describe());
    }

    /// The node that leads and may propose.
    pub(super) fn leader(&mut self, id: CopysetId) -> Option<usize> {
        let leads = |n: &mut World| n.is_up() && n.shard().leads(id);
        let found: Vec<usize> = (0..self.nodes.len()).filter(|&n| leads(&mut self.nodes[n])).collect();
        // Of several the one with the newest term: the others do not know yet.
        found.into_iter().max_by_key(|&n| self.nodes[n].shard().groups[&id].raft.term())
    }

    pub(super) fn wait_leader(&mut self, id: CopysetId) -> usize {
        self.until("a leader", |c| c.leader(id).is_some());
        self.leader(id).unwrap()
    }

    /// One thing happens somewhere.
    pub(super) fn step(&mut self) {
        if self.loss.is_some_and(|n| self.rng.one_in(n)) {
            self.lose();
        }
        let busy: Vec<usize> = (0..self.nodes.len()).filter(|&n| self.nodes[n].is_busy()).collect();
        let full: Vec<Link> = self.links.iter().filter(|(_, q)| !q.is_empty()).map(|(&link, _)| link).collect();
        let total = busy.len() + full.len();
        if total == 0 || self.rng.one_in(self.lag) {
            return self.pass_time();
        }
        let at = self.rng.below(total);
        if let Some(&node) = busy.get(at) {
            self.nodes[node].now = self.now.max(self.nodes[node].now);
            self.nodes[node].work();
            self.now = self.now.max(self.nodes[node].now);
            self.collect(node);
        } else {
            self.deliver(full[at - busy.len()]);
        }
    }

    fn pass_time(&mut self) {
        let deadlines = self.nodes.iter_mut().filter(|n| n.is_up()).map(|n| n.shard().deadline());
        let next = deadlines.min().unwrap_or(Instant::FAR);
        self.now = if next == Instant::FAR { self.now.after_ms(1) } else { next.max(Instant(self.now.0 + 1)) };
        for n in 0..self.nodes.len() {
            if self.nodes[n].is_up() && self.nodes[n].shard().deadline() <= self.now {
                self.nodes[n].now = self.now;
                self.nodes[n].turn();
                self.collect(n);
            }
        }
    }

    fn collect(&mut self, node: usize) {
        for mail in std::mem::take(&mut self.nodes[node].mail) {
            assert_eq!(mail.from, peer(node), "a node speaks for itself");
            let Some(to) = (0..self.nodes.len()).find(|&n| peer(n) == mail.to) else { continue };
            if !self.cut.contains(&(node, to)) && self.nodes[to].is_up() {
                self.links.entry((node, to, mail.urgent())).or_default().push_back(mail);
            }
        }
    }

    fn deliver(&mut self, link: Link) {
        let (from, to, _) = link;
        let Some(mail) = self.links.get_mut(&link).and_then(VecDeque::pop_front) else { return };
        if self.cut.contains(&(from, to)) || !self.nodes[to].is_up() {
            return;
        }
        self.nodes[to].now = self.now.max(self.nodes[to].now);
        self.delivered += 1;
        self.nodes[to].receive(mail);
        self.collect(to);
    }

    fn lose(&mut self) {
        let full: Vec<Link> = self.links.iter().filter(|(_, q)| !q.is_empty()).map(|(&link, _)| link).collect();
        if full.is_empty() {
            return;
        }
        let link = full[self.rng.below(full.len())];
        let lost = self.links.remove(&link).map_or(0, |q| q.len());
        self.lost += lost as u64;
        if self.nodes[link.0].is_up() {
            self.nodes[link.0].lost(peer(link.1));
        }
    }

    /// Another machine in its place, before anything is on it.
    pub(super) fn replace(&mut self, node: usize, setup: Setup) {
        self.nodes[node] = World::new(setup, self.rng.next());
        self.nodes[node].now = self.now;
        self.until("start-up ends", |c| c.nodes[node].shard().serving());
    }

    /// Cut a node off from all others, both ways.
    pub(super) fn isolate(&mut self, node: usize) {
        for other in 0..self.nodes.len() {
            self.cut.insert((node, other));
            self.cut.insert((other, node));
        }
    }

    pub(super) fn kill(&mut self, node: usize) {
        self.nodes[node].kill();
        self.links.retain(|link, _| link.0 != node && link.1 != node);
        for n in 0..self.nodes.len() {
            if self.nodes[n].is_up() {
                self.nodes[n].lost(peer(node));
            }
        }
    }

    pub(super) fn start(&mut self, node: usize) {
        self.nodes[node].now = self.now;
        self.nodes[node].start();
    }

    /// Until all replicas have applied the same, and nothing is promised or held back anywhere.
    pub(super) fn quiesce(&mut self, ids: &[CopysetId]) {
        self.until("start-up ends", |c| c.nodes.iter_mut().filter(|n| n.is_up()).all(|n| n.shard().serving()));
        for &id in ids {
            self.wait_leader(id);
            self.until("all replicas apply the same", |c| {
                let ups = c.nodes.iter_mut().filter(|n| n.is_up());
                let groups = ups.filter_map(|n| n.shard().groups.get(&id).map(|g| (g.applied, g.raft.last_index())));
                let all: Vec<(u64, u64)> = groups.collect();
                all.iter().all(|a| a.0 == a.1 && *a == all[0])
            });
        }
        for n in self.nodes.iter_mut().filter(|n| n.is_up()) {
            let shard = n.shard();
            assert_eq!((shard.peers.tail_bytes, shard.in_flight_bytes), (0, 0), "memory is counted that nobody holds");
            assert_eq!(shard.store.promised_slots(), 0, "slots are promised to nobody");
        }
    }

    /// The replicas of a copyset hold the same bytes.
    pub(super) fn compare(&mut self, id: CopysetId, chunks: u64) {
        let len = self.nodes[0].setup.chunk_size;
        for chunk in 0..chunks {
            let (mut hashes, mut told) = (Vec::new(), Vec::new());
            for n in 0..self.nodes.len() {
                if self.nodes[n].is_up() && self.nodes[n].shard().groups.contains_key(&id) {
                    let reply = self.ask(n, id, RequestOp::Chunk { chunk, op: ChunkOp::Hash { offset: 0, len } });
                    let ReplyData::Hash(hash) = reply.data else { panic!("no hash: {reply:?}") };
                    let shard = self.nodes[n].shard();
                    let (first, applied) = (shard.groups[&id].raft.first_index(), shard.groups[&id].applied);
                    told.push((n, hash, first, applied, shard.store.chunk_info(id, chunk)));
                    hashes.push(hash);
                }
            }
            assert!(hashes.windows(2).all(|w| w[0] == w[1]), "{id:?} chunk {chunk}: replicas differ: {told:#?}");
        }
    }
}

type State = Option<Vec<u64>>;

struct Asked {
    node: usize,
    slot: u32,
    what: What,
}

enum What {
    Write { first: u32, blocks: u32, stamp: u64 },
    Zero { first: u32, blocks: u32 },
    Delete,
    Read,
}

/// One chunk as its only client knows it: the states it may be in. Its operations come one after the other.
struct Known {
    states: Vec<State>,
    asked: Option<Asked>,
}

/// A client of one copyset.
pub(super) struct Client {
    id: CopysetId,
    chunks: Vec<Known>,
    guess: usize,
    stamp: u64,
    pub(super) done: u64,
    pub(super) redirected: u64,
    pub(super) refused: u64,
    pub(super) reads: u64,
}

impl Client {
    pub(super) fn new(id: CopysetId, chunks: usize) -> Self {
        let known = || Known { states: vec![None], asked: None };
        let chunks = (0..chunks).map(|_| known()).collect();
        Self { id, chunks, guess: 0, stamp: id.0 << 40, done: 0, redirected: 0, refused: 0, reads: 0 }
    }

    /// Ask for something about a chunk that nothing is asked about.
    pub(super) fn ask(&mut self, c: &mut Cluster) {
        let chunk = c.rng.below(self.chunks.len());
        if self.chunks[chunk].asked.is_some() {
            return;
        }
        if c.rng.one_in(8) || !c.nodes[self.guess].is_up() {
            self.guess = match c.leader(self.id).filter(|_| !c.rng.one_in(4)) {
                Some(leader) => leader,
                None => c.rng.below(c.nodes.len()),
            };
        }
        let node = self.guess;
        if !c.nodes[node].is_up() {
            return;
        }
        let per_chunk = c.nodes[node].blocks();
        let first = c.rng.below(per_chunk as usize) as u32;
        let blocks = 1 + c.rng.below((per_chunk - first).min(4) as usize) as u32;
        // Each answer that says nothing doubles what may be: look before it is too much.
        let unsure = self.chunks[chunk].states.len() > 8;
        let what = match c.rng.below(12) {
            _ if unsure => What::Read,
            0 => What::Delete,
            1 => What::Zero { first, blocks },
            2..=4 => What::Read,
            _ => {
                self.stamp += 1;
                What::Write { first, blocks, stamp: self.stamp }
            }
        };
        self.send(c, node, chunk, what);
    }

    fn send(&mut self, c: &mut Cluster, node: usize, chunk: usize, what: What) {
        let world = &mut c.nodes[node];
        let size = |blocks: u32| blocks * BLOCK as u32;
        let slot = match what {
            What::Write { first, blocks, stamp } => world.write(self.id, chunk as u64, first, blocks, stamp),
            What::Zero { first, blocks } => {
                let op = ChunkOp::Zero { offset: size(first), len: size(blocks) };
                Some(world.chunk(self.id, chunk as u64, op))
            }
            What::Delete => Some(world.chunk(self.id, chunk as u64, ChunkOp::Delete { sn: 1 })),
            What::Read => {
                let op = ChunkOp::Read { offset: 0, len: world.setup.chunk_size };
                Some(world.chunk(self.id, chunk as u64, op))
            }
        };
        match slot {
            Some(slot) => self.chunks[chunk].asked = Some(Asked { node, slot, what }),
            None => world.shard().want_memory(),
        }
    }

    /// What was asked of a node that died is unknown for ever.
    pub(super) fn died(&mut self, node: usize, per_chunk: u32) {
        for known in &mut self.chunks {
            if let Some(asked) = known.asked.take_if(|asked| asked.node == node) {
                known.maybe(&asked.what, per_chunk);
            }
        }
    }

    pub(super) fn collect(&mut self, c: &mut Cluster) {
        for chunk in 0..self.chunks.len() {
            let Some(asked) = &self.chunks[chunk].asked else { continue };
            let (node, slot) = (asked.node, asked.slot);
            let Some(reply) = c.take(node, slot) else { continue };
            let per_chunk = c.nodes[node].blocks();
            self.answered(chunk, &reply, per_chunk);
        }
    }

    fn answered(&mut self, chunk: usize, reply: &Reply, per_chunk: u32) {
        let known = &mut self.chunks[chunk];
        let Some(asked) = known.asked.take() else { return };
        match (reply.outcome, asked.what) {
            (Outcome::Success, What::Read) => {
                self.reads += 1;
                known.found(&Some(stamps(&reply.data)), chunk);
            }
            (Outcome::NoChunk, What::Read) => {
                self.reads += 1;
                known.found(&None, chunk);
            }
            (Outcome::Success, what) => {
                self.done += 1;
                known.states = known.states.iter().map(|s| after(s, &what, per_chunk)).collect();
                known.settle();
            }
            (Outcome::NotLeader, what) => {
                self.redirected += 1;
                known.maybe(&what, per_chunk);
            }
            (Outcome::NoSpace, _) => self.refused += 1,
            (other, _) => panic!("chunk {chunk}: {other:?}"),
        }
    }

    pub(super) fn is_quiet(&self) -> bool {
        self.chunks.iter().all(|known| known.asked.is_none())
    }

    /// Every chunk reads as one of the states it may be in.
    pub(super) fn check_all(&mut self, c: &mut Cluster) {
        c.until("the client's requests are answered", |c| {
            self.collect(c);
            self.is_quiet()
        });
        for chunk in 0..self.chunks.len() {
            let before = self.reads;
            while self.reads == before {
                let leader = c.wait_leader(self.id);
                self.send(c, leader, chunk, What::Read);
                c.until("a read is answered", |c| {
                    self.collect(c);
                    self.is_quiet()
                });
            }
        }
    }
}

fn after(state: &State, what: &What, per_chunk: u32) -> State {
    let set = |mut blocks: Vec<u64>, first: u32, count: u32, stamp| {
        blocks[first as usize..(first + count) as usize].fill(stamp);
        Some(blocks)
    };
    match *what {
        What::Write { first, blocks, stamp } => {
            set(state.clone().unwrap_or_else(|| vec![0; per_chunk as usize]), first, blocks, stamp)
        }
        What::Zero { first, blocks } => state.clone().and_then(|s| set(s, first, blocks, 0)),
        What::Delete => None,
        What::Read => state.clone(),
    }
}

impl Known {
    fn maybe(&mut self, what: &What, per_chunk: u32) {
        let more: Vec<State> = self.states.iter().map(|s| after(s, what, per_chunk)).collect();
        self.states.extend(more);
        self.settle();
    }

    fn settle(&mut self) {
        self.states.sort();
        self.states.dedup();
    }

    fn found(&mut self, state: &State, chunk: usize) {
        assert!(self.states.contains(state), "chunk {chunk} reads {state:?}, legal are {:?}", self.states);
        self.states = vec![state.clone()];
    }
}
