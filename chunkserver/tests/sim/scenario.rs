//! One seed: a node, clients, a nemesis; then calm, a sweep over every block, a power cut, and the sweep again.

use crate::client::{Client, Shape};
use crate::disk::Crash;
use crate::history::{History, Outcome as OpOutcome};
use crate::nemesis::Nemesis;
use crate::rng::Rng;
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
    let peer = system.peer();
    let mut rng = Rng::new(seed ^ 0x5eed);
    let mut sim = Sim::new(seed, system, 1);
    let history = Rc::new(RefCell::new(History::default()));
    for _ in 0..CLIENTS {
        let shape = shape(&mut rng, &peer);
        let client = Client::random(sim.actors.len(), &shape, &history, rng.fork(), OPS / CLIENTS);
        sim.add_actor(Box::new(client));
    }
    let faults = rng.between(6, 10);
    let nemesis = Rc::new(RefCell::new(Nemesis::new(sim.actors.len(), &history, rng.fork(), faults)));
    sim.add_actor(Box::new(Watched(Rc::clone(&nemesis))));

    let mut stuck = None;
    if !sim.run(PATIENCE) {
        stuck = Some("clients or nemesis did not finish");
    }
    for round in 0..2 {
        if stuck.is_some() {
            break;
        }
        if round == 1 {
            sim.command(Command::Crash(0, Crash::Power));
            sim.command(Command::Boot(0));
        }
        let shape = Shape { depth: 8, timeout_ns: 500_000_000, ..shape(&mut rng, &peer) };
        let sweep = Client::sweep(sim.actors.len(), &shape, &history, rng.fork());
        sim.add_actor(Box::new(sweep));
        let limit = sim.world.borrow().now() + PATIENCE;
        if !sim.run(limit) {
            stuck = Some("the last reads did not finish");
        }
    }
    let mut history = history.borrow_mut();
    history.violations.extend(stuck.map(|why| format!("no progress: {why}")));
    history.check();
    let counts = nemesis.borrow().counts.clone();
    report(seed, &sim, &history, counts)
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
    Box::new(crate::node::ServerSystem)
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// The seeds: one with its whole report (`SIM_SEED`), or many (`SIM_SEEDS`, from `SIM_FROM`).
#[test]
fn seeds() {
    let (from, count) = match (number("SIM_SEED"), number("SIM_SEEDS")) {
        (Some(seed), _) => (seed, 1),
        (None, many) => (number("SIM_FROM").unwrap_or(0), many.unwrap_or(10)),
    };
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
