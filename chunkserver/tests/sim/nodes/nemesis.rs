//! Who makes trouble between nodes: several faults may be on at once. Whatever it does to processes, clocks and the
//! network, a copyset must stay right; what it does silently to disks, only one node's disk suffers.

use crate::disk::{Crash, Faults};
use crate::history::History;
use crate::rng::Rng;
use crate::rot;
use crate::run::Actor;
use crate::world::{ActorEvent, Command, World};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

const STRIKE: u64 = 0;
const WATCH: u64 = 1;
const CRASH: u64 = 1 << 16;
const RESTART: u64 = 2 << 16;
const HEAL: u64 = 3 << 16;
/// A node that was started so long ago has recovered, ns of the world.
const SETTLED: u64 = 200_000_000;

const KINDS: [&str; 22] = [
    "power cut",
    "kill",
    "kill",
    "restart storm",
    "all down",
    "isolated node",
    "isolated node",
    "split",
    "deaf node",
    "mute node",
    "one way",
    "broken connections",
    "broken connections",
    "slow network",
    "slow disk",
    "pause",
    "pause",
    "pause of several",
    "clock jump",
    "clock drift",
    "disk errors",
    "full pool",
];
/// Of the node whose disk breaks its word.
const HARM: [&str; 3] = ["rot at rest", "misdirected reads", "misdirected writes"];

/// A fault that is on.
#[derive(Debug, Default)]
struct Active {
    kind: &'static str,
    node: usize,
    pairs: Vec<(usize, usize)>,
}

pub(crate) struct Nemesis {
    me: usize,
    nodes: usize,
    rng: Rng,
    history: Rc<RefCell<History>>,
    faults_left: u64,
    /// The node whose disk may break its word.
    doubtful: Option<usize>,
    down: BTreeSet<usize>,
    /// Crashes that wait for a disk operation.
    armed: BTreeSet<usize>,
    crash: Vec<Crash>,
    /// More crashes to come, soon after the next start.
    again: Vec<u64>,
    /// When each node was last started.
    started: Vec<u64>,
    active: BTreeMap<u64, Active>,
    serial: u64,
    pub(crate) counts: BTreeMap<&'static str, u64>,
    finished: bool,
}

impl Nemesis {
    pub(crate) fn new(
        me: usize,
        nodes: usize,
        doubtful: Option<usize>,
        history: &Rc<RefCell<History>>,
        rng: Rng,
        faults: u64,
    ) -> Self {
        Self {
            me,
            nodes,
            rng,
            history: Rc::clone(history),
            faults_left: faults,
            doubtful,
            down: BTreeSet::new(),
            armed: BTreeSet::new(),
            crash: vec![Crash::Power; nodes],
            again: vec![0; nodes],
            started: vec![0; nodes],
            active: BTreeMap::new(),
            serial: 0,
            counts: BTreeMap::new(),
            finished: false,
        }
    }

    fn after(&mut self, world: &mut World, low_us: u64, high_us: u64, timer: u64) {
        let pause = self.rng.skewed(low_us * 1_000, high_us * 1_000);
        world.tell_at(world.now() + pause, self.me, ActorEvent::Timer(timer));
    }

    fn some(&mut self, count: u64) -> Vec<usize> {
        let mut all: Vec<usize> = (0..self.nodes).collect();
        self.rng.shuffle(&mut all);
        all.truncate(count as usize);
        all
    }

    fn strike(&mut self, world: &mut World) {
        if self.faults_left == 0 {
            return self.end(world);
        }
        self.faults_left -= 1;
        let harm = self.doubtful.is_some() && self.rng.below(3) == 0;
        let mut kind = KINDS[self.rng.below(KINDS.len() as u64) as usize];
        let mut node = self.rng.below(self.nodes as u64) as usize;
        if let Some(doubtful) = self.doubtful.filter(|_| harm) {
            let wanted = HARM[self.rng.below(HARM.len() as u64) as usize];
            (kind, node) = (self.distrust(world, doubtful, wanted).unwrap_or("kill"), doubtful);
        }
        *self.counts.entry(kind).or_default() += 1;
        let others: Vec<usize> = (0..self.nodes).filter(|&other| other != node).collect();
        let (mut pairs, mut lasts) = (Vec::new(), true);
        match kind {
            "power cut" | "kill" | "all down" | "restart storm" => {
                let count = match kind {
                    "all down" => self.nodes as u64,
                    _ => 1 + u64::from(self.rng.ppm(300_000)),
                };
                let crash = if kind == "power cut" || self.rng.ppm(300_000) { Crash::Power } else { Crash::Kill };
                for node in self.some(count) {
                    self.crash[node] = crash;
                    self.again[node] = if kind == "restart storm" { self.rng.between(2, 5) } else { 0 };
                    self.crash_soon(world, node);
                }
                lasts = false;
            }
            "isolated node" => others.iter().for_each(|&other| pairs.extend([(node, other), (other, node)])),
            "deaf node" => pairs.extend(others.iter().map(|&other| (other, node))),
            "mute node" => pairs.extend(others.iter().map(|&other| (node, other))),
            "one way" => pairs.push((node, others[self.rng.below(others.len() as u64) as usize])),
            "split" => {
                let side: Vec<bool> = (0..self.nodes).map(|_| self.rng.coin()).collect();
                let all = (0..self.nodes).flat_map(|a| (0..self.nodes).map(move |b| (a, b)));
                pairs.extend(all.filter(|&(a, b)| side[a] != side[b]));
            }
            "broken connections" => {
                for conn in world.net.between_nodes() {
                    if self.rng.coin() {
                        world.cut(conn);
                    }
                }
                for (_, conn) in world.net.open() {
                    if self.rng.ppm(200_000) {
                        world.cut(conn);
                    }
                }
                lasts = false;
            }
            "slow network" => world.net.faults.slower = self.rng.below(100),
            "slow disk" => {
                let most = [40, 200, 1_000][self.rng.below(3) as usize];
                let faults = &mut world.nodes[node].disk.faults;
                (faults.slower, faults.spike_ppm) = (self.rng.between(9, most), 10_000);
            }
            "pause" => world.pause(node, self.rng.skewed(1_000_000, 4_000_000_000)),
            "pause of several" => {
                for node in self.some(2) {
                    world.pause(node, self.rng.skewed(1_000_000, 2_000_000_000));
                }
            }
            "clock jump" => world.jump(node, 1_000_000 << self.rng.below(32)),
            // A lease allows for five per cent between two nodes.
            "clock drift" => world.drift(node, self.rng.between(0, 48_000) as i64 - 24_000),
            "disk errors" => {
                let ppm = self.rng.between(10_000, 200_000) as u32;
                let faults = &mut world.nodes[node].disk.faults;
                match self.rng.below(3) {
                    0 => faults.read_ppm = ppm,
                    1 => faults.write_ppm = ppm / 4,
                    _ => faults.sync_ppm = ppm,
                }
            }
            "full pool" => self.history.borrow_mut().filling = true,
            _ => {} // done by `distrust`
        }
        pairs.iter().for_each(|&(from, to)| world.block(from, to));
        if lasts {
            self.serial += 1;
            self.active.insert(self.serial, Active { kind, node, pairs });
            self.after(world, 3_000, 1_500_000, HEAL + self.serial);
        }
        self.after(world, 5_000, 500_000, STRIKE);
    }

    /// The one disk breaks its word; `None` when that is not possible now.
    fn distrust(&mut self, world: &mut World, node: usize, kind: &'static str) -> Option<&'static str> {
        let (ppm, now) = (self.rng.between(50_000, 500_000) as u32, world.stamp());
        let at = world.now();
        let World { nodes, rng, .. } = world;
        let crate::world::Node { disk, up, .. } = &mut nodes[node];
        rot::layout(disk)?;
        let recovers = self.down.contains(&node) || !*up || self.started[node] + SETTLED > at;
        if kind == "misdirected reads" && recovers {
            return None; // see `trust_reads`
        }
        disk.exposed.now = now;
        match kind {
            "misdirected reads" => {
                disk.faults.stray_read_ppm = ppm;
                disk.exposed.reads(u64::MAX);
            }
            "misdirected writes" => disk.faults.stray_write_ppm = ppm / 2,
            _ => return rot::strike(disk, rng),
        }
        Some(kind)
    }

    fn crash_soon(&mut self, world: &mut World, node: usize) {
        if self.rng.coin() {
            self.armed.insert(node);
            let ops = self.rng.skewed(1, 60);
            world.trip_after(node, self.me, ops);
        }
        self.after(world, 1, 30_000, CRASH + node as u64);
    }

    /// Reads go where they should before a node starts. A server that is misled about its own log and metadata while it
    /// recovers has nothing left to compare them with.
    fn trust_reads(&mut self, world: &mut World, node: usize) {
        let of = |(_, fault): &(&u64, &Active)| fault.kind == "misdirected reads" && fault.node == node;
        let faults: Vec<u64> = self.active.iter().filter(of).map(|(&id, _)| id).collect();
        faults.into_iter().for_each(|fault| self.heal(world, fault));
    }

    fn crash(&mut self, world: &mut World, node: usize) {
        self.armed.remove(&node);
        world.untrip(node);
        if !self.down.insert(node) {
            return;
        }
        self.trust_reads(world, node);
        world.commands.push(Command::Crash(node, self.crash[node]));
        let most = [80_000, 400_000, 2_500_000][self.rng.below(3) as usize];
        self.after(world, 10, most, RESTART + node as u64);
    }

    fn restart(&mut self, world: &mut World, node: usize) {
        if !self.down.remove(&node) {
            return;
        }
        world.commands.push(Command::Boot(node));
        self.started[node] = world.now();
        if self.again[node] > 0 {
            self.again[node] -= 1;
            self.crash[node] = if self.rng.coin() { Crash::Power } else { Crash::Kill };
            self.crash_soon(world, node);
        }
    }

    fn heal(&mut self, world: &mut World, fault: u64) {
        let Some(Active { kind, node, pairs }) = self.active.remove(&fault) else { return };
        let still: BTreeSet<(usize, usize)> = self.active.values().flat_map(|a| a.pairs.iter().copied()).collect();
        let over: Vec<(usize, usize)> = pairs.into_iter().filter(|pair| !still.contains(pair)).collect();
        if !over.is_empty() {
            world.unblock(&over);
        }
        let now = world.stamp();
        match kind {
            "slow network" => world.net.faults = crate::net::Faults::default(),
            "clock drift" => world.drift(node, 0),
            "full pool" => self.history.borrow_mut().filling = false,
            "slow disk" | "disk errors" | "misdirected reads" | "misdirected writes" => {
                let disk = &mut world.nodes[node].disk;
                disk.faults = Faults::default();
                if kind == "misdirected reads" {
                    disk.exposed.reads(now);
                }
                if kind == "disk errors" {
                    // It may have failed already; a failed write or sync is never the end of the story.
                    self.crash[node] = if self.rng.coin() { Crash::Power } else { Crash::Kill };
                    self.crash(world, node);
                }
            }
            _ => {}
        }
    }

    /// Everything heals, and everybody comes back.
    fn end(&mut self, world: &mut World) {
        let on: Vec<u64> = self.active.keys().copied().collect();
        on.into_iter().for_each(|fault| self.heal(world, fault));
        self.again = vec![0; self.nodes];
        let down: Vec<usize> = self.down.iter().copied().collect();
        down.into_iter().for_each(|node| self.restart(world, node));
        (0..self.nodes).for_each(|node| world.pause(node, 0));
        self.finished = true;
        let mut history = self.history.borrow_mut();
        (history.calm, history.filling) = (true, false);
    }
}

impl Actor for Nemesis {
    fn event(&mut self, world: &mut World, event: ActorEvent) {
        match event {
            ActorEvent::Start => {
                self.after(world, 5_000, 300_000, STRIKE);
                self.after(world, 5_000, 10_000, WATCH);
            }
            // Who stopped by itself is started again, for ever.
            ActorEvent::Timer(WATCH) => {
                let up: Vec<usize> = (0..self.nodes).filter(|node| !self.down.contains(node)).collect();
                for node in up {
                    if !world.nodes[node].up {
                        self.trust_reads(world, node);
                        self.started[node] = world.now();
                        world.commands.push(Command::Boot(node));
                    }
                }
                self.after(world, 5_000, 30_000, WATCH);
            }
            ActorEvent::Timer(timer) if (RESTART..HEAL).contains(&timer) => {
                self.restart(world, (timer - RESTART) as usize);
            }
            _ if self.finished => {}
            ActorEvent::Timer(STRIKE) => self.strike(world),
            ActorEvent::Timer(timer) if timer >= HEAL => self.heal(world, timer - HEAL),
            ActorEvent::Timer(timer) if timer >= CRASH => self.crash(world, (timer - CRASH) as usize),
            ActorEvent::Tripped => {
                let sprung: Vec<usize> = self.armed.iter().copied().filter(|&node| !world.armed(node)).collect();
                for node in sprung {
                    self.crash(world, node);
                }
            }
            _ => {}
        }
    }

    fn done(&self) -> bool {
        self.finished
    }
}
