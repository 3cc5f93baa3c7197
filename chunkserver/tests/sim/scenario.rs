//! One seed: a node, clients, a nemesis; then calm, a sweep over every block, a power cut, and the sweep again.

use crate::canary::Canary;
use crate::client::{Client, Shape};
use crate::disk::{Crash, Faults};
use crate::history::{History, Outcome as OpOutcome};
use crate::nemesis::Nemesis;
use crate::rng::Rng;
use crate::rot;
use crate::run::{Sim, System};
use crate::world::Command;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

const CLIENTS: u64 = 6;
const OPS: u64 = 1_080;
/// Nothing may take longer than this after the faults ended, virtual ns.
const PATIENCE: u64 = 60_000_000_000;

/// What a seed came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) seed: u64,
    /// Hash of all that clients saw and of every event of the world.
    pub(crate) history_hash: u64,
    pub(crate) ops: usize,
    pub(crate) acknowledged: usize,
    pub(crate) faults: BTreeMap<&'static str, u64>,
    pub(crate) effects: BTreeMap<&'static str, u64>,
    pub(crate) answers: BTreeMap<&'static str, u64>,
    /// Why programs stopped by themselves, and how often.
    pub(crate) exits: BTreeMap<String, u64>,
    pub(crate) virtual_ms: u64,
    pub(crate) turns: u64,
    pub(crate) violations: Vec<String>,
}

impl Outcome {
    pub(crate) fn fault_count(&self) -> u64 {
        self.faults.values().sum()
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "seed {} hash {:016x}: {} ops, {} acknowledged, ",
            self.seed, self.history_hash, self.ops, self.acknowledged
        )?;
        writeln!(f, "{} turns, {} virtual ms", self.turns, self.virtual_ms)?;
        writeln!(f, "  faults  {:?}", self.faults)?;
        writeln!(f, "  effects {:?}", self.effects)?;
        writeln!(f, "  answers {:?}", self.answers)?;
        writeln!(f, "  exits   {:?}", self.exits)?;
        self.violations.iter().take(5).try_for_each(|violation| writeln!(f, "  VIOLATION: {violation}"))
    }
}

/// The nemesis and its counts, kept readable after it became an actor.
struct Watched(Rc<RefCell<Nemesis>>);

impl crate::run::Actor for Watched {
    fn event(&mut self, world: &mut crate::world::World, event: crate::world::ActorEvent) {
        self.0.borrow_mut().event(world, event);
    }
    fn done(&self) -> bool {
        self.0.borrow().done()
    }
}

fn shape(rng: &mut Rng, peer: &str) -> Shape {
    Shape {
        copysets: 4,
        peer: peer.to_owned(),
        depth: rng.between(1, 8) as usize,
        blocks: 32,
        timeout_ns: rng.between(50_000_000, 500_000_000),
    }
}

/// Run one seed.
pub(crate) fn run(seed: u64, system: Box<dyn System>) -> Outcome {
    run_with(seed, system, None)
}

/// Run one seed with a bug planted below the server.
pub(crate) fn run_with(seed: u64, system: Box<dyn System>, canary: Option<Canary>) -> Outcome {
    let peer = system.peer();
    let mut rng = Rng::new(seed ^ 0x5eed);
    let mut sim = Sim::new(seed, system, 1);
    sim.world.borrow_mut().canary = canary;
    let history = Rc::new(RefCell::new(History::default()));
    for _ in 0..CLIENTS {
        let shape = shape(&mut rng, &peer);
        let client = Client::random(sim.actors.len(), &shape, &history, rng.fork(), OPS / CLIENTS);
        sim.add_actor(Box::new(client));
    }
    let faults = rng.between(6, 10);
    let nemesis = Rc::new(RefCell::new(Nemesis::new(sim.actors.len(), &history, rng.fork(), faults)));
    sim.add_actor(Box::new(Watched(Rc::clone(&nemesis))));

    let mut run = Run { sim, history, rng, peer };
    let mut stuck = if run.sim.run(PATIENCE) { None } else { Some("clients or nemesis did not finish") };
    stuck = stuck.or_else(|| run.read_all(2));
    if stuck.is_none() && run.rng.below(3) == 0 {
        stuck = run.distrust(&nemesis);
    }
    let Run { sim, history, .. } = run;
    let mut history = history.borrow_mut();
    history.violations.extend(stuck.map(|why| format!("no progress: {why}")));
    history.check();
    let counts = nemesis.borrow().counts.clone();
    report(seed, &sim, &history, counts)
}

/// A seed under way.
struct Run {
    sim: Sim,
    history: Rc<RefCell<History>>,
    rng: Rng,
    peer: String,
}

impl Run {
    /// Read every block `rounds` times, with a power cut between two rounds. Why that did not end, if it did not.
    fn read_all(&mut self, rounds: u64) -> Option<&'static str> {
        for round in 0..rounds {
            if round > 0 {
                self.restart(Crash::Power);
            }
            let shape = Shape { depth: 8, timeout_ns: 500_000_000, ..shape(&mut self.rng, &self.peer) };
            let sweep = Client::sweep(self.sim.actors.len(), &shape, &self.history, self.rng.fork());
            self.sim.add_actor(Box::new(sweep));
            if !self.go(PATIENCE) {
                return Some("the last reads did not finish");
            }
        }
        None
    }

    fn go(&mut self, ns: u64) -> bool {
        let limit = self.sim.world.borrow().now() + ns;
        self.sim.run(limit)
    }

    fn restart(&mut self, crash: Crash) {
        self.sim.command(Command::Crash(0, crash));
        self.sim.command(Command::Boot(0));
    }

    /// The disk breaks its word in a way that one replica cannot make good: for a while it makes nothing durable, or
    /// loses writes; then the power fails. What it forgot is forgotten, and the checker is told so. But what is served is
    /// never garbage, and from then on all rules hold again. A server that finds the disk beyond use may refuse it.
    fn distrust(&mut self, nemesis: &RefCell<Nemesis>) -> Option<&'static str> {
        rot::layout(&self.sim.world.borrow().nodes[0].disk)?;
        let lying = self.rng.coin();
        {
            let disk = &mut self.sim.world.borrow_mut().nodes[0].disk;
            let lost_write_ppm = if lying { 0 } else { self.rng.between(1_000, 100_000) as u32 };
            disk.faults = Faults { lying, lost_write_ppm, ..Faults::default() };
            disk.exposed.everything = !lying;
        }
        *nemesis.borrow_mut().counts.entry(if lying { "lost flush" } else { "lost writes" }).or_default() += 1;
        for _ in 0..CLIENTS {
            let shape = shape(&mut self.rng, &self.peer);
            let client = Client::random(self.sim.actors.len(), &shape, &self.history, self.rng.fork(), 40);
            self.sim.add_actor(Box::new(client));
        }
        let ns = self.rng.between(1_000_000, 150_000_000);
        self.go(ns);
        self.sim.command(Command::Crash(0, Crash::Power));
        {
            let mut world = self.sim.world.borrow_mut();
            world.nodes[0].disk.faults = Faults::default();
            world.nodes[0].disk.exposed.everything = true;
            self.history.borrow_mut().forgotten = Some((world.stamp(), world.stamp()));
        }
        self.sim.command(Command::Boot(0));
        self.sim.exits_left = 3;
        let stuck = if self.go(PATIENCE) { self.read_all(2) } else { Some("clients did not finish") };
        if stuck.is_some() && self.sim.exits_left == 0 {
            self.history.borrow_mut().count("refused a disk beyond use");
            return None;
        }
        stuck
    }
}

fn report(seed: u64, sim: &Sim, history: &History, faults: BTreeMap<&'static str, u64>) -> Outcome {
    let world = sim.world.borrow();
    let disk = &world.nodes[0].disk.counts;
    let (survived, vanished) = history.unanswered();
    let effects = BTreeMap::from([
        ("disk ops", disk.ops),
        ("eio", disk.eio),
        ("latency spikes", disk.spikes),
        ("torn writes", disk.torn),
        ("lost writes", disk.lost),
        ("kept un-synced writes", disk.survived),
        ("reads gone astray", disk.stray_reads),
        ("writes gone astray", disk.stray_writes),
        ("flushes not done", disk.lost_flushes),
        ("writes not done", disk.lost_writes),
        ("resets", world.net.resets),
        ("refused connections", world.net.refusals),
        ("unanswered writes seen later", survived as u64),
        ("unanswered writes never seen", vanished as u64),
    ]);
    Outcome {
        seed,
        history_hash: history.hash() ^ world.trace,
        ops: history.records.len(),
        acknowledged: history.records.iter().filter(|r| r.outcome == OpOutcome::Done).count(),
        faults,
        effects,
        answers: history.counts.clone(),
        exits: sim.exits.clone(),
        virtual_ms: world.now() / 1_000_000 - 1_000,
        turns: world.turns,
        violations: history.violations.clone(),
    }
}

/// What the seeds run.
fn system() -> Box<dyn System> {
    Box::new(crate::node::ServerSystem::default())
}

pub(crate) fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// With one seed: what the nodes say, as `RUST_LOG` wants it.
pub(crate) fn speak() {
    if number("SIM_SEED").is_some() {
        let filter = tracing_subscriber::EnvFilter::from_default_env();
        let _ = tracing_subscriber::fmt().with_env_filter(filter).without_time().try_init();
    }
}

/// The seeds: one with its whole report (`SIM_SEED`), or many (`SIM_SEEDS`, from `SIM_FROM`).
#[test]
fn seeds() {
    let (from, count) = match (number("SIM_SEED"), number("SIM_SEEDS")) {
        (Some(seed), _) => (seed, 1),
        (None, many) => (number("SIM_FROM").unwrap_or(0), many.unwrap_or(10)),
    };
    speak();
    let (mut totals, mut ops) = (BTreeMap::<&'static str, u64>::new(), 0);
    for seed in from..from + count {
        let outcome = std::panic::catch_unwind(|| run(seed, system()));
        let Ok(outcome) = outcome else { panic!("seed {seed} panicked; replay it with: scripts/sim {seed}") };
        if number("SIM_SEED").is_some() || !outcome.violations.is_empty() {
            println!("{outcome}");
        }
        assert!(outcome.violations.is_empty(), "seed {seed} failed; replay it with: scripts/sim {seed}");
        assert!(outcome.ops >= 1_000 && outcome.fault_count() >= 5, "too little happened in seed {seed}: {outcome}");
        ops += outcome.ops;
        for (kind, n) in outcome.faults.iter().chain(&outcome.effects) {
            *totals.entry(kind).or_default() += n;
        }
    }
    println!("{count} seeds from {from}: {ops} operations, no violation\n  {totals:?}");
}

/// Seeds that found a defect (docs/bugs-found.md). A change of the workload makes other histories of them.
#[test]
fn seeds_that_found_something_are_clean() {
    for seed in [1187, 300_716, 305_400, 2_002_712] {
        let outcome = run(seed, system());
        assert!(outcome.violations.is_empty(), "seed {seed}: {outcome}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::toy::{Bug, ToySystem};

    fn toy(seed: u64, bug: Bug) -> Outcome {
        run(seed, Box::new(ToySystem(bug)))
    }

    #[test]
    fn a_correct_toy_passes() {
        for seed in 1_000..1_003 {
            let outcome = toy(seed, Bug::None);
            assert!(outcome.violations.is_empty(), "{outcome}");
            assert!(outcome.ops >= 1_000 && outcome.fault_count() >= 5, "too little happened: {outcome}");
        }
    }

    #[test]
    fn one_seed_is_one_history() {
        assert_eq!(run(3, system()), run(3, system()));
        assert_ne!(run(3, system()).history_hash, run(4, system()).history_hash);
        assert_eq!(toy(3, Bug::None), toy(3, Bug::None));
    }

    #[test]
    fn every_planted_bug_is_found_within_200_seeds() {
        for bug in [Bug::AckBeforeDurable, Bug::NoDsync, Bug::NoChecksum, Bug::NoSyncAfterReplay] {
            let found = (0..200).find(|&seed| !toy(seed, bug).violations.is_empty());
            println!("{bug:?} found by seed {found:?}");
            assert!(found.is_some(), "{bug:?} was not found");
        }
    }
}
