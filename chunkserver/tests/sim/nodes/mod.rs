//! Several whole nodes: clients that follow leaders, an operator who changes members, a nemesis that breaks processes,
//! clocks, disks and the network between them; then calm, and every check there is.
//!
//! Checked: each block is a register that nothing violates, answered writes are there in the end, also after a power
//! cut of everything; no term has two leaders; once the faults are over everything is answered in bounded time; the
//! voters of a copyset come to hold the same bytes.

mod asker;
mod audit;
mod bury;
mod client;
mod idle;
mod nemesis;
mod operator;

use crate::canary::Canary;
use crate::disk::Crash;
use crate::history::{History, Outcome as OpOutcome};
use crate::node::{ServerSystem, peer};
use crate::rng::Rng;
use crate::run::{Actor, Sim};
use crate::scenario::{Outcome, number};
use crate::world::{ActorEvent, Command, World};
use client::{Client, Shape};
use nemesis::Nemesis;
use operator::{Founder, Operator};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

const CLIENTS: u64 = 4;
const OPS: u64 = 1_080;
const COPYSETS: u64 = 3;
/// Nothing may take longer than this after the faults ended, virtual ns.
const PATIENCE: u64 = 60_000_000_000;
/// Nor the faults themselves.
const TROUBLE: u64 = 300_000_000_000;

/// An actor that stays readable.
struct Watched<A>(Rc<RefCell<A>>);

impl<A: Actor> Actor for Watched<A> {
    fn event(&mut self, world: &mut World, event: ActorEvent) {
        self.0.borrow_mut().event(world, event);
    }
    fn done(&self) -> bool {
        self.0.borrow().done()
    }
}

/// A seed under way.
pub(crate) struct Run {
    pub(crate) sim: Sim,
    pub(crate) nodes: usize,
    pub(crate) history: Rc<RefCell<History>>,
    pub(crate) rng: Rng,
}

impl Run {
    fn shape(&mut self) -> Shape {
        let rng = &mut self.rng;
        Shape {
            nodes: self.nodes,
            copysets: COPYSETS,
            depth: rng.between(1, 8) as usize,
            blocks: 32,
            timeout_ns: rng.between(100_000_000, 900_000_000),
        }
    }

    pub(crate) fn go(&mut self, ns: u64) -> bool {
        let limit = self.sim.world.borrow().now() + ns;
        self.sim.run(limit)
    }

    /// Read every block that anybody touched.
    fn sweep(&mut self) -> Option<&'static str> {
        let shape = Shape { depth: 8, timeout_ns: 500_000_000, ..self.shape() };
        let sweep = Client::sweep(self.sim.actors.len(), &shape, &self.history, self.rng.fork());
        self.sim.add_actor(Box::new(sweep));
        (!self.go(PATIENCE)).then_some("the last reads did not finish")
    }

    fn clean(&mut self) -> Option<&'static str> {
        let shape = Shape { depth: 8, timeout_ns: 500_000_000, ..self.shape() };
        let clean = Client::clean(self.sim.actors.len(), &shape, &self.history, self.rng.fork());
        self.sim.add_actor(Box::new(clean));
        (!self.go(PATIENCE)).then_some("the last deletes did not finish")
    }

    /// Everything that must hold once it is calm; why not, if not.
    fn end(&mut self) -> Option<&'static str> {
        if let Some(stuck) = self.bury(false).or_else(|| self.clean()).or_else(|| self.bury(true)) {
            return Some(stuck);
        }
        if let Some(stuck) = self.sweep().or_else(|| self.audit()) {
            return Some(stuck);
        }
        for node in 0..self.nodes {
            self.sim.command(Command::Crash(node, Crash::Power));
        }
        (0..self.nodes).for_each(|node| self.sim.command(Command::Boot(node)));
        self.sweep().or_else(|| self.audit())
    }
}

/// Run one seed with so many nodes.
pub(crate) fn run(seed: u64, nodes: usize, canary: Option<Canary>) -> Outcome {
    let mut rng = Rng::new(seed ^ 0x90de5 ^ (nodes as u64) << 32);
    let election_ms = [150, 300, 400][rng.below(3) as usize];
    let mut sim = Sim::new(seed, Box::new(ServerSystem { election_ms, trash_s: 2 * (seed & 1) }), nodes);
    sim.world.borrow_mut().canary = canary;
    let history = Rc::new(RefCell::new(History::default()));
    let mut members = BTreeMap::new();
    for copyset in 1..=COPYSETS {
        let mut all: Vec<usize> = (0..nodes).collect();
        rng.shuffle(&mut all);
        all.truncate(if nodes >= 5 && copyset == 1 { 5 } else { 3 });
        all.sort_unstable();
        members.insert(copyset, all);
    }
    sim.add_actor(Box::new(Founder::new(0, nodes, &members)));
    let mut run = Run { sim, nodes, history: Rc::clone(&history), rng };
    let mut stuck = (!run.go(PATIENCE)).then_some("the copysets were not created");

    for _ in 0..CLIENTS {
        let shape = run.shape();
        let client = Client::random(run.sim.actors.len(), &shape, &history, run.rng.fork(), OPS / CLIENTS);
        run.sim.add_actor(Box::new(client));
    }
    let doubtful = (run.rng.below(3) == 0).then(|| run.rng.below(nodes as u64) as usize);
    // With a disk that breaks its word, two members would be one too few.
    let (shrinks, fork) = (doubtful.is_none(), run.rng.fork());
    let operator = Operator::new(run.sim.actors.len(), nodes, shrinks, members, &history, fork);
    run.sim.add_actor(Box::new(operator));
    let (faults, fork) = (run.rng.between(8, 16), run.rng.fork());
    let nemesis = Nemesis::new(run.sim.actors.len(), nodes, doubtful, &history, fork, faults);
    let nemesis = Rc::new(RefCell::new(nemesis));
    run.sim.add_actor(Box::new(Watched(Rc::clone(&nemesis))));
    stuck = stuck.or_else(|| (!run.go(TROUBLE)).then_some("clients, operator or nemesis did not finish"));
    stuck = stuck.or_else(|| run.end());

    let state = if stuck.is_some() { run.state() } else { String::new() };
    let Run { sim, history, .. } = run;
    let mut history = history.borrow_mut();
    history.violations.extend(stuck.map(|why| format!("no progress: {why}{state}")));
    history.violations.extend(sim.bad_leaders.iter().cloned());
    history.check();
    let counts = nemesis.borrow().counts.clone();
    report(seed, &sim, &history, counts)
}

fn report(seed: u64, sim: &Sim, history: &History, faults: BTreeMap<&'static str, u64>) -> Outcome {
    let world = sim.world.borrow();
    let (survived, vanished) = history.unanswered();
    let disks = |count: fn(&crate::disk::Counts) -> u64| world.nodes.iter().map(|n| count(&n.disk.counts)).sum();
    let effects = BTreeMap::from([
        ("disk ops", disks(|c| c.ops)),
        ("eio", disks(|c| c.eio)),
        ("torn writes", disks(|c| c.torn)),
        ("lost writes", disks(|c| c.lost)),
        ("kept un-synced writes", disks(|c| c.survived)),
        ("reads gone astray", disks(|c| c.stray_reads)),
        ("writes gone astray", disks(|c| c.stray_writes)),
        ("resets", world.net.resets),
        ("held back by partitions", world.net.held),
        ("terms with a leader", sim.elections() as u64),
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

/// The seeds: one with its whole report (`SIM_SEED`), or many (`SIM_SEEDS`, from `SIM_FROM`); of `SIM_NODES` nodes, else
/// of three, sometimes four or five.
#[test]
fn seeds() {
    let (from, count) = match (number("SIM_SEED"), number("SIM_SEEDS")) {
        (Some(seed), _) => (seed, 1),
        (None, many) => (number("SIM_FROM").unwrap_or(0), many.unwrap_or(3)),
    };
    crate::scenario::speak();
    let mut totals = BTreeMap::<&'static str, u64>::new();
    let (mut ops, mut virtual_ms) = (0, 0);
    for seed in from..from + count {
        let nodes = number("SIM_NODES").map_or([3, 4, 3, 5, 3, 3][seed as usize % 6], |nodes| nodes as usize);
        let replay = format!("replay it with: scripts/sim --nodes {nodes} {seed}");
        let outcome = std::panic::catch_unwind(|| run(seed, nodes, None));
        let Ok(outcome) = outcome else { panic!("seed {seed} panicked; {replay}") };
        if number("SIM_SEED").is_some() || !outcome.violations.is_empty() {
            println!("{nodes} nodes, {outcome}");
        }
        assert!(outcome.violations.is_empty(), "seed {seed} failed; {replay}");
        assert!(
            outcome.acknowledged >= 1_000 && outcome.fault_count() >= 5,
            "too little happened in {seed}: {outcome}"
        );
        (ops, virtual_ms) = (ops + outcome.acknowledged, virtual_ms + outcome.virtual_ms);
        for (&kind, n) in outcome.faults.iter().chain(&outcome.effects).chain(&outcome.answers) {
            *totals.entry(kind).or_default() += n;
        }
    }
    println!("{count} seeds from {from}: {ops} operations in {virtual_ms} virtual ms, no violation\n  {totals:?}");
}

#[test]
fn one_seed_is_one_history() {
    assert_eq!(run(3, 3, None), run(3, 3, None));
}
