//! The loop: takes the world's events in order and runs the shard programs and actors they are for.

use crate::disk::Disk;
use crate::world::{ActorEvent, Command, Next, Shared, World};
use chunkserver::metrics::Counter;
use chunkserver::shard::request::CopysetStatus;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

/// One shard's program; dropped when its node goes down.
pub(crate) trait Program {
    /// One pass of its loop. `Some(reason)` when it stopped for good.
    fn turn(&mut self) -> Option<String>;
    /// The copysets it leads: id, term, and the configuration's epoch once it may answer.
    fn led(&self, _see: &mut dyn FnMut(u64, u64, Option<u64>)) {}
    /// What it has counted.
    fn count(&self, _counter: Counter) -> u64 {
        0
    }
    /// What it says of itself.
    fn status(&self) -> String {
        String::new()
    }
    /// What it says of each of its copysets.
    fn copysets(&self) -> Vec<CopysetStatus> {
        Vec::new()
    }
}

/// What runs on the nodes: the shipping server, or the toy that tests the simulator.
pub(crate) trait System {
    fn shards(&self) -> u16;
    fn listeners(&self) -> u32;
    fn disk_len(&self) -> u64;
    /// The address copysets are created with.
    fn peer(&self) -> String;
    /// Fill a node's new disk.
    fn format(&self, node: usize, disk: &mut Disk);
    /// Begin a life: one program per shard.
    fn boot(&self, world: &Shared, node: usize, life: u64) -> Vec<Box<dyn Program>>;
}

/// Someone outside the nodes.
pub(crate) trait Actor {
    fn event(&mut self, world: &mut World, event: ActorEvent);
    fn done(&self) -> bool;
}

pub(crate) struct Sim {
    pub(crate) world: Shared,
    system: Box<dyn System>,
    programs: Vec<Vec<Box<dyn Program>>>,
    pub(crate) actors: Vec<Box<dyn Actor>>,
    /// Reasons given by programs that stopped by themselves, and how often.
    pub(crate) exits: BTreeMap<String, u64>,
    /// How often programs may still stop by themselves before a run is given up.
    pub(crate) exits_left: u64,
    /// Who led each term of each copyset.
    leaders: BTreeMap<(u64, u64), usize>,
    /// Newest term of each copyset whose leader could answer, and the epoch it had then.
    epochs: BTreeMap<u64, (u64, u64)>,
    /// Two leaders of one term, or an election that did not raise the epoch (rule 19), if ever.
    pub(crate) bad_leaders: Vec<String>,
}

impl Sim {
    pub(crate) fn new(seed: u64, system: Box<dyn System>, nodes: usize) -> Self {
        let mut world = World::new(seed);
        for node in 0..nodes {
            let mut disk = Disk::new(system.disk_len());
            system.format(node, &mut disk);
            world.add_node(disk);
        }
        let programs = (0..nodes).map(|_| Vec::new()).collect();
        let mut sim = Self {
            world: Rc::new(RefCell::new(world)),
            system,
            programs,
            actors: Vec::new(),
            exits: BTreeMap::new(),
            exits_left: u64::MAX,
            leaders: BTreeMap::new(),
            epochs: BTreeMap::new(),
            bad_leaders: Vec::new(),
        };
        (0..nodes).for_each(|node| sim.command(Command::Boot(node)));
        sim
    }

    pub(crate) fn add_actor(&mut self, actor: Box<dyn Actor>) -> usize {
        let id = self.actors.len();
        self.actors.push(actor);
        let mut world = self.world.borrow_mut();
        let now = world.now();
        world.tell_at(now, id, ActorEvent::Start);
        id
    }

    pub(crate) fn command(&mut self, command: Command) {
        match command {
            Command::Crash(node, crash) => {
                self.world.borrow_mut().crash(node, crash);
                // After the world let go of what was in flight: buffers of the dead go back to their pool first.
                self.programs[node].clear();
            }
            Command::Boot(node) => {
                if self.world.borrow().nodes[node].up {
                    return;
                }
                let life = self.world.borrow_mut().boot(node, self.system.shards(), self.system.listeners());
                self.programs[node] = self.system.boot(&self.world, node, life);
            }
        }
    }

    /// Run until every actor is done; false when `limit` (virtual ns) came first, nothing was left to happen, or programs
    /// stopped by themselves too often.
    pub(crate) fn run(&mut self, limit: u64) -> bool {
        loop {
            let next = self.world.borrow_mut().step();
            match next {
                Next::Turn(node, shard) => self.turn(node, shard),
                Next::Tell(actor, event) => {
                    self.actors[actor].event(&mut self.world.borrow_mut(), event);
                    if self.actors.iter().all(|actor| actor.done()) {
                        return true;
                    }
                }
                Next::Nothing => {}
                Next::End => return false,
            }
            let commands = std::mem::take(&mut self.world.borrow_mut().commands);
            commands.into_iter().for_each(|command| self.command(command));
            if self.world.borrow().now() > limit || self.exits_left == 0 {
                return false;
            }
        }
    }

    fn turn(&mut self, node: usize, shard: u16) {
        if let Some(reason) = self.programs[node][usize::from(shard)].turn() {
            // A process that gives up is gone as if killed; whoever watches over it may start it again.
            *self.exits.entry(reason).or_default() += 1;
            self.exits_left -= 1;
            self.command(Command::Crash(node, crate::disk::Crash::Kill));
            return;
        }
        self.world.borrow_mut().after_turn(node, shard);
        let Self { leaders, epochs, bad_leaders: bad, .. } = self;
        self.programs[node][usize::from(shard)].led(&mut |copyset, term, epoch| {
            let first = *leaders.entry((copyset, term)).or_insert(node);
            if first != node && bad.is_empty() {
                bad.push(format!("nodes {first} and {node} both led term {term} of copyset {copyset:#x}"));
            }
            let Some(epoch) = epoch else { return };
            let newest = epochs.entry(copyset).or_insert((term, epoch));
            if term > newest.0 {
                if epoch <= newest.1 && bad.is_empty() {
                    bad.push(format!("term {term} of copyset {copyset:#x} began with epoch {epoch}, after {newest:?}"));
                }
                *newest = (term, epoch);
            }
        });
    }

    /// Terms of copysets that had a leader.
    pub(crate) fn elections(&self) -> usize {
        self.leaders.len()
    }

    /// What a node's shards have counted.
    pub(crate) fn count(&self, node: usize, counter: Counter) -> u64 {
        self.programs[node].iter().map(|program| program.count(counter)).sum()
    }

    /// What a node's shards say of themselves.
    pub(crate) fn status(&self, node: usize) -> String {
        self.programs[node].iter().map(|program| program.status()).collect()
    }

    /// What a node's shards say of their copysets.
    pub(crate) fn copysets(&self, node: usize) -> Vec<CopysetStatus> {
        self.programs[node].iter().flat_map(|program| program.copysets()).collect()
    }
}
