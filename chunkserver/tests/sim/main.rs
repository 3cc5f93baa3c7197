//! The simulator: whole nodes on a simulated disk, network and clock, under a checker.
//!
//! `SIM_SEED=n` replays one seed with its report, `SIM_SEEDS=n` runs that many (see `scripts/sim`); without either a
//! few seeds run. What runs is the shipping server (`node.rs`); the toy (`toy.rs`) and its planted bugs test the simulator.

mod canary;
mod checker;
mod client;
mod codec;
mod disk;
mod exposure;
mod history;
mod nemesis;
mod net;
mod node;
mod nodes;
mod rng;
mod rot;
mod run;
mod scenario;
mod toy;
mod world;
