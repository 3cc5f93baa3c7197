//! Nodes on a network that delays, loses, duplicates and cuts, with clocks that run apart, disks that are slow and
//! crashes; and a checker that sees all of them at once. Everything follows from the seed.

use super::{ID, Node, Rng};
use copyset::raft::eraftpb::Message;
use copyset::{ChangeRefused, ConfState, Config, Role, Started, StepError};
use std::collections::{BTreeMap, BTreeSet};

pub const MS: u64 = 1_000_000;
/// One round of the simulation.
pub const QUANTUM: u64 = MS;

/// What goes wrong, by chance. `0` in a `one in` means never.
#[derive(Clone, Debug)]
pub struct Weather {
    pub delay_ns: (u64, u64),
    pub lose_one_in: u64,
    pub duplicate_one_in: u64,
    /// Mean time of a log write.
    pub disk_ns: u64,
}

pub const FAIR: Weather = Weather { delay_ns: (MS / 10, 2 * MS), lose_one_in: 0, duplicate_one_in: 0, disk_ns: 2 * MS };

/// How the shard around a copyset may be wrong, to see that the checker sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fault {
    #[default]
    None,
    /// Votes as if no leader had been heard for long.
    VotesAtOnce,
    /// Says that a batch is durable when it is written.
    EarlyPersist,
    /// Makes up for the ticks missed in a pause.
    TickBurst,
}

/// One node's clock against the world's.
#[derive(Clone, Copy, Debug)]
struct Clock {
    offset: u64,
    /// Parts per thousand it runs fast (or slow).
    drift: i64,
}

pub struct Net {
    pub nodes: BTreeMap<u64, Node>,
    pub time: u64,
    pub rng: Rng,
    pub weather: Weather,
    pub fault: Fault,
    /// Links that carry nothing, one-way.
    pub cut: BTreeSet<(u64, u64)>,
    pub down: BTreeSet<u64>,
    pub paused: BTreeSet<u64>,
    pub cookie: u64,
    clocks: BTreeMap<u64, Clock>,
    ticked: BTreeMap<u64, u64>,
    flying: BTreeMap<(u64, u64), Message>,
    sent: u64,
    /// Chunks on their way: due -> (follower, leader, index).
    transfers: Vec<(u64, u64, u64, u64)>,
    /// What is known to be committed: index -> (term, context).
    facts: BTreeMap<u64, (u64, Vec<u8>)>,
    leaders: BTreeMap<u64, u64>,
    /// Highest index any client was answered for.
    pub answered: u64,
    /// Reads under way: cookie -> (node, what must be seen).
    reading: BTreeMap<u64, (u64, u64)>,
    pub lease_reads: u64,
    pub index_reads: u64,
    pub fetched: u64,
    /// Refusals by kind, as text.
    pub refused: BTreeMap<String, u64>,
    /// What the checker found.
    pub violations: Vec<String>,
}

pub fn config(peer: u64, seed: u64) -> Config {
    Config { catch_up_entries: 20, catch_up_idle_ns: 5000 * MS, ..Config::new(ID, peer, seed) }
}

impl Net {
    pub fn new(count: u64, seed: u64) -> Self {
        let voters: Vec<u64> = (1..=count).collect();
        let mut net = Self {
            nodes: BTreeMap::new(),
            time: 0,
            rng: Rng(seed),
            weather: FAIR,
            fault: Fault::None,
            cut: BTreeSet::new(),
            down: BTreeSet::new(),
            paused: BTreeSet::new(),
            cookie: 0,
            clocks: BTreeMap::new(),
            ticked: BTreeMap::new(),
            flying: BTreeMap::new(),
            sent: 0,
            transfers: Vec::new(),
            facts: BTreeMap::new(),
            leaders: BTreeMap::new(),
            answered: 0,
            reading: BTreeMap::new(),
            lease_reads: 0,
            index_reads: 0,
            fetched: 0,
            refused: BTreeMap::new(),
            violations: Vec::new(),
        };
        voters.iter().for_each(|&peer| net.add(peer, &voters, seed));
        net
    }

    /// A node that is there, be it a member or not.
    pub fn add(&mut self, peer: u64, voters: &[u64], seed: u64) {
        let mut node = Node::new(config(peer, seed), voters, seed ^ (peer << 32));
        let clock = Clock { offset: self.rng.below(1 << 40), drift: self.rng.below(41) as i64 - 20 };
        self.clocks.insert(peer, clock);
        node.now = self.now(peer);
        node.copyset = copyset::Copyset::new(node.config.clone(), node.log.clone(), node.now).unwrap();
        // Ticks of different nodes fall apart.
        self.ticked.insert(peer, self.time + self.rng.below(node.config.tick_ns()));
        self.nodes.insert(peer, node);
    }

    /// A node's clock.
    pub fn now(&self, peer: u64) -> u64 {
        let clock = self.clocks[&peer];
        (clock.offset + self.time).wrapping_add_signed(self.time as i64 * clock.drift / 1000)
    }

    pub fn node(&mut self, peer: u64) -> &mut Node {
        let now = self.now(peer);
        let node = self.nodes.get_mut(&peer).unwrap();
        node.now = now;
        node
    }

    fn runs(&self, peer: u64) -> bool {
        !self.down.contains(&peer) && !self.paused.contains(&peer)
    }

    /// Time passes.
    pub fn run(&mut self, ns: u64) {
        let end = self.time + ns;
        while self.time < end {
            self.time += QUANTUM;
            self.deliver();
            self.move_chunks();
            for peer in self.nodes.keys().copied().collect::<Vec<_>>() {
                if self.runs(peer) {
                    self.turn(peer);
                }
            }
        }
    }

    /// One node's turn.
    fn turn(&mut self, peer: u64) {
        let tick_ns = self.nodes[&peer].config.tick_ns();
        let ticked = self.ticked.get(&peer).copied().unwrap_or(0);
        if self.time >= ticked + tick_ns {
            self.ticked.insert(peer, self.time);
            let missed = if self.fault == Fault::TickBurst { (self.time - ticked) / tick_ns } else { 1 };
            let node = self.node(peer);
            let now = node.now;
            for i in (0..missed).rev() {
                node.copyset.tick(now - i * tick_ns);
            }
        }
        let done = self.rng.below(self.weather.disk_ns / QUANTUM + 1) == 0;
        let early = self.fault == Fault::EarlyPersist;
        let node = self.node(peer);
        node.turn();
        if early {
            // All that was submitted counts as durable: the batches up to the next one that would be made.
            let next = node.last_submitted();
            node.copyset.persisted(next);
            node.turn();
        }
        if done {
            while node.complete_one() {}
            let full = node.log.borrow().used_bytes() * 2 > node.log.borrow().capacity_bytes();
            if full {
                node.checkpoint(node.copyset.applied_index()); // as a shard would
            }
            let before = node.fetches.len() as u64;
            node.do_fetches();
            node.turn();
            self.fetched += before;
        }
        self.check(peer);
        let node = self.node(peer);
        let messages = std::mem::take(&mut node.outgoing);
        let offers = std::mem::take(&mut node.offers);
        messages.iter().for_each(|message| self.send(message));
        for (from, index) in offers {
            if !self.transfers.iter().any(|t| t.1 == peer && t.3 == index) {
                let due = self.time + 5 * MS + self.rng.below(100 * MS);
                self.transfers.push((due, peer, from, index));
            }
        }
    }

    fn send(&mut self, message: &Message) {
        let Weather { delay_ns: (low, high), lose_one_in, duplicate_one_in, .. } = self.weather;
        if lose_one_in > 0 && self.rng.one_in(lose_one_in) {
            return;
        }
        let copies = if duplicate_one_in > 0 && self.rng.one_in(duplicate_one_in) { 2 } else { 1 };
        for _ in 0..copies {
            let due = self.time + low + self.rng.below(high - low + 1);
            self.sent += 1;
            self.flying.insert((due, self.sent), message.clone());
        }
    }

    fn deliver(&mut self) {
        let mut later = Vec::new();
        while let Some(entry) = self.flying.first_entry()
            && entry.key().0 <= self.time
        {
            let ((_, number), message) = entry.remove_entry();
            let (from, to) = (message.from, message.to);
            if self.paused.contains(&to) {
                let due = (self.time / (8 * QUANTUM) + 1) * 8 * QUANTUM;
                later.push(((due, number), message)); // waits in the socket
            } else if !self.cut.contains(&(from, to)) && !self.down.contains(&to) && self.nodes.contains_key(&to) {
                self.step(to, message);
            }
        }
        self.flying.extend(later);
    }

    fn step(&mut self, to: u64, message: Message) {
        use copyset::raft::eraftpb::MessageType::{MsgRequestPreVote, MsgRequestVote};
        let vote = matches!(message.get_msg_type(), MsgRequestVote | MsgRequestPreVote);
        let early = self.fault == Fault::VotesAtOnce && vote;
        let node = self.node(to);
        let now = node.now;
        let mut voting = message.clone();
        if early {
            // As a replica would that forgot whom it heard.
            voting.context = raft::CAMPAIGN_TRANSFER.into();
        }
        match node.copyset.step(now, if early { voting } else { message }) {
            Ok(()) => {}
            Err(StepError::Raft(_)) => *self.refused.entry("raft".into()).or_default() += 1,
            Err(e) => {
                *self.refused.entry(format!("{e:?}").split([' ', '{', '(']).next().unwrap().into()).or_default() += 1
            }
        }
    }

    /// Chunks reach a follower that was offered a snapshot.
    fn move_chunks(&mut self) {
        let due = self.transfers.extract_if(.., |t| t.0 <= self.time).collect::<Vec<_>>();
        for (_, to, from, index) in due {
            if !self.runs(to) || !self.runs(from) || self.cut.contains(&(from, to)) || self.cut.contains(&(to, from)) {
                continue;
            }
            let chunks = self.nodes[&from].applied.clone();
            let leader = self.node(from);
            leader.copyset.snapshot_progress(leader.now, to);
            let node = self.node(to);
            if node.copyset.install_snapshot(node.now, index).is_ok() {
                node.applied.extend(chunks.into_iter().filter(|(at, _)| *at <= index));
            }
        }
    }

    fn violate(&mut self, what: &str) {
        if self.violations.len() < 8 {
            self.violations.push(format!("at {} ms: {what}", self.time / MS));
        }
    }

    /// What must hold always, looked at after each turn of a node.
    fn check(&mut self, peer: u64) {
        let node = self.nodes.get_mut(&peer).unwrap();
        let (role, term) = (node.copyset.role(), node.copyset.term());
        let fresh = std::mem::take(&mut node.fresh);
        let mismatches = std::mem::take(&mut node.mismatches);
        let applied = node.copyset.applied_index();
        let facts: Vec<_> = fresh.iter().map(|(i, _)| (*i, node.applied[i].0, node.applied[i].1.to_vec())).collect();
        let done: Vec<_> =
            self.reading.iter().filter(|(_, (at, _))| *at == peer).map(|(&c, &(_, must))| (c, must)).collect();
        let done: Vec<_> = done.into_iter().filter_map(|(c, must)| Some((c, must, *node.reads.get(&c)?))).collect();
        let lease = node.may_read();
        for (index, term, context) in facts {
            let fact = (term, context);
            if self.facts.entry(index).or_insert_with(|| fact.clone()) != &fact {
                self.violate(&format!("{peer} applies another entry {index} than was committed"));
            }
        }
        if mismatches > 0 {
            self.violate(&format!("{peer} applies other entries than in its earlier life"));
        }
        if role == Role::Leader {
            let first = *self.leaders.entry(term).or_insert(peer);
            if first != peer {
                self.violate(&format!("{first} and {peer} lead term {term}"));
            }
        }
        if lease {
            self.lease_reads += 1;
            if applied < self.answered {
                let must = self.answered;
                self.violate(&format!("{peer} may read at {applied}, but {must} was answered"));
            }
        }
        for (cookie, must, ok) in done {
            self.reading.remove(&cookie);
            if ok {
                self.index_reads += 1;
                if applied < must {
                    self.violate(&format!("{peer} answers a read at {applied} that must see {must}"));
                }
            }
        }
        for (index, answered) in fresh {
            if answered {
                self.answered = self.answered.max(index);
            }
        }
    }

    /// A node that leads and may propose, of the highest term.
    pub fn leader(&self) -> Option<u64> {
        let ready = self.nodes.iter().filter(|(p, n)| self.runs(**p) && n.copyset.is_leader_ready());
        ready.max_by_key(|(_, n)| n.copyset.term()).map(|(&peer, _)| peer)
    }

    /// Runs until there is one; panics after `ms`.
    pub fn await_leader(&mut self, ms: u64) -> u64 {
        self.await_that(ms, "a leader", |net| net.leader())
    }

    pub fn await_that<T>(&mut self, ms: u64, what: &str, found: impl Fn(&mut Self) -> Option<T>) -> T {
        for _ in 0..ms {
            if let Some(found) = found(self) {
                return found;
            }
            self.run(MS);
        }
        panic!("no {what} within {ms} ms: {:?} {:?}", self.refused, self.violations);
    }

    /// Proposes at any node that thinks it leads.
    pub fn write(&mut self, blocks: usize) {
        for peer in self.nodes.keys().copied().collect::<Vec<_>>() {
            if self.runs(peer) && self.nodes[&peer].copyset.is_leader_ready() {
                self.cookie += 1;
                let cookie = self.cookie;
                let _ = self.node(peer).propose(cookie, blocks);
            }
        }
    }

    /// Reads with a quorum's word at any node that thinks it leads.
    pub fn read(&mut self) {
        for peer in self.nodes.keys().copied().collect::<Vec<_>>() {
            if !self.runs(peer) {
                continue;
            }
            self.cookie += 1;
            let (cookie, must) = (self.cookie, self.answered);
            let node = self.node(peer);
            if node.copyset.read_index(node.now, cookie).is_ok() {
                self.reading.insert(cookie, (peer, must));
            }
        }
    }

    pub fn crash(&mut self, peer: u64) {
        let node = self.node(peer);
        node.restart();
        node.fresh.clear();
        self.reading.retain(|_, (at, _)| *at != peer);
    }

    /// Orders a change at the leader, if there is one that takes it.
    pub fn change(&mut self, target: &[u64]) -> Option<(u64, u64, Result<Started, ChangeRefused>)> {
        let leader = self.leader()?;
        self.cookie += 1;
        let cookie = self.cookie;
        let node = self.node(leader);
        let started = node.copyset.change_peers(node.now, cookie, target);
        Some((leader, cookie, started))
    }

    /// Nothing is wrong any more.
    pub fn heal(&mut self) {
        self.weather = FAIR;
        self.cut.clear();
        self.down.clear();
        self.paused.clear();
    }

    pub fn isolate(&mut self, peer: u64) {
        for other in self.nodes.keys().copied().filter(|&other| other != peer).collect::<Vec<_>>() {
            self.cut.insert((peer, other));
            self.cut.insert((other, peer));
        }
    }

    /// Faults have stopped: members agree on everything within `ms`, and a write goes through.
    pub fn converge(&mut self, ms: u64) {
        self.heal();
        let leader = self.await_leader(ms);
        self.cookie += 1;
        let cookie = self.cookie;
        let _ = self.node(leader).propose(cookie, 1);
        self.await_that(ms, "agreement", |net| {
            let leader = net.leader()?;
            let conf = net.nodes[&leader].copyset.conf().clone();
            let at = |n: &Node| (n.copyset.applied_index(), n.copyset.last_index(), n.copyset.conf().clone());
            let all = at(&net.nodes[&leader]);
            let members = net.nodes.iter().filter(|(peer, _)| conf.has_member(**peer));
            (all.0 == all.1 && !conf.joint() && members.clone().all(|(_, n)| at(n) == all)).then_some(())
        });
        self.compare();
    }

    /// Every replica's history is the same, configurations included.
    fn compare(&mut self) {
        let mut confs: BTreeMap<u64, ConfState> = BTreeMap::new();
        let mut wrong = Vec::new();
        for (peer, node) in self.nodes.iter().filter(|(_, node)| !node.copyset.is_installing()) {
            for (index, (term, context, _)) in &node.applied {
                if self.facts.get(index).is_some_and(|fact| *fact != (*term, context.to_vec())) {
                    wrong.push(format!("{peer} has applied another entry {index}"));
                }
            }
            for index in node.copyset.first_index() - 1..=node.copyset.applied_index() {
                let conf = ConfState::decode(&node.copyset.checkpoint_at(index).conf).unwrap();
                if confs.entry(index).or_insert_with(|| conf.clone()) != &conf {
                    wrong.push(format!("{peer} has another configuration at {index}"));
                }
            }
        }
        wrong.iter().for_each(|what| self.violate(what));
    }

    pub fn assert_clean(&self) {
        assert!(self.violations.is_empty(), "{:#?}", self.violations);
    }
}
