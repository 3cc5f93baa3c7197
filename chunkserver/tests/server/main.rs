//! The binary on a real disk file, as its users meet it: processes, signals, sockets, commands.
//!
//! Nothing here links to the server's code: frames are made and taken apart by the test's own codec (rule 34), NBD by
//! its own few lines, commands by the command line. Every server has a loopback address of its own, so the tests run
//! side by side without choosing ports. Nothing depends on the machine's speed: what must happen is waited for.
#![allow(clippy::unwrap_used, missing_docs)]

mod admission;
mod cli;
mod client;
mod config;
mod crash;
mod crowds;
mod disks;
mod foreign;
mod frames;
mod guest;
mod harness;
mod leaders;
mod nbd;
mod nebd;
mod pages;
mod peers;
mod replay;
mod replicas;
mod reset;
mod rot;
mod slow;
mod space;
mod stop;
mod trash;
mod upgrade;
mod upgrade_failures;
#[path = "../serve/wire.rs"]
#[allow(dead_code)] // the service tests use more of it
mod wire;
