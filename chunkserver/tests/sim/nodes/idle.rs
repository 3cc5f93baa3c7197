//! What copysets cost that nobody uses: turns and messages, counted; none of them may grow with anything but what must.
//!
//! `IDLE_COPYSETS=n` runs with so many and prints what one node costs of a core, the simulator included.

use super::Founder;
use crate::node::ServerSystem;
use crate::run::{Actor, Sim};
use crate::scenario::number;
use crate::world::{ActorEvent, World};
use chunkserver::metrics::Counter;

const NODES: usize = 3;
const ELECTION_MS: u64 = 400;
const SECOND: u64 = 1_000_000_000;

/// Lets so many seconds pass.
struct Wait {
    me: usize,
    seconds: u64,
    over: bool,
}

impl Actor for Wait {
    fn event(&mut self, world: &mut World, event: ActorEvent) {
        match event {
            ActorEvent::Start => {
                let until = world.now() + self.seconds * SECOND;
                world.tell_at(until, self.me, ActorEvent::Timer(0));
            }
            _ => self.over = true,
        }
    }
    fn done(&self) -> bool {
        self.over
    }
}

fn wait(sim: &mut Sim, seconds: u64) {
    let wait = Wait { me: sim.actors.len(), seconds, over: false };
    sim.add_actor(Box::new(wait));
    assert!(sim.run(u64::MAX));
}

/// Per second over five seconds, all nodes together: turns, frames of mail, disk operations; and CPU time of a node.
struct Cost {
    turns: u64,
    mail: u64,
    disk: u64,
    cpu_ms: f64,
}

/// CPU time of this thread, milliseconds.
fn cpu_ms() -> f64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    now.tv_sec as f64 * 1e3 + now.tv_nsec as f64 / 1e6
}

fn idle(copysets: u64) -> Cost {
    let mut sim = Sim::new(7, Box::new(ServerSystem { election_ms: ELECTION_MS, trash_s: 0 }), NODES);
    let members = (1..=copysets).map(|copyset| (copyset, (0..NODES).collect())).collect();
    sim.add_actor(Box::new(Founder::new(0, NODES, &members)));
    assert!(sim.run(60 * SECOND), "the copysets are not created");
    wait(&mut sim, 15);
    let disk = |sim: &Sim| sim.world.borrow().nodes.iter().map(|node| node.disk.counts.ops).sum::<u64>();
    let mail = |sim: &Sim| (0..NODES).map(|node| sim.count(node, Counter::PeerMailIn)).sum::<u64>();
    let before = (sim.world.borrow().turns, mail(&sim), disk(&sim), cpu_ms());
    wait(&mut sim, 5);
    let led: usize = (0..NODES).flat_map(|node| sim.copysets(node)).filter(|status| status.state == 1).count();
    assert_eq!(led as u64, copysets, "each has one leader");
    let turns = sim.world.borrow().turns;
    Cost {
        turns: (turns - before.0) / 5,
        mail: (mail(&sim) - before.1) / 5,
        disk: (disk(&sim) - before.2) / 5,
        cpu_ms: (cpu_ms() - before.3) / 5.0 / NODES as f64,
    }
}

#[test]
fn idle_copysets_cost_heartbeats_and_nothing_else() {
    let many = number("IDLE_COPYSETS").unwrap_or(60);
    let (few, all) = (idle(6), idle(many));
    println!(
        "{many} idle copysets: {} turns, {} messages, {} disk operations a second; a node costs {:.1} ms of CPU a second \
         (with 6: {} turns, {} messages, {:.1} ms)",
        all.turns, all.mail, all.disk, all.cpu_ms, few.turns, few.mail, few.cpu_ms
    );
    // Three heartbeats in T to two followers, and their answers; of idle copysets an eighth of that.
    let beats = many * 4 * 3 * 1000 / ELECTION_MS / copyset::IDLE_FACTOR;
    assert!(all.mail <= beats + beats / 4, "{} messages a second for {beats}", all.mail);
    assert!(all.turns < 4 * few.turns, "turns grow with the copysets: {} and {}", few.turns, all.turns);
    assert_eq!(all.disk, 0, "idle copysets write nothing");
}
