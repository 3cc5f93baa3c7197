//! Measures and verifies a chunkserver from outside, over the wire and through a client of its own.
//!
//! The parts that decide anything (`codec`, `stamp`, `model`, `plan`, `engine`, `verdict`, `stats`) know no socket, file
//! or clock; `driver` and `phase` run them, `observe` looks at the server's process, disk and counters; `rpc` and `nebd`
//! (with the `options` they share) and `raw`
//! are the commands. Nothing here uses the server's own protocol code, so that both can be tested against each other;
//! only `nebd` is there to drive a client of the project's, part1.
#![forbid(unsafe_code)]

pub mod codec;
pub mod driver;
pub mod engine;
pub mod leaders;
pub mod model;
pub mod nebd;
pub mod observe;
pub mod options;
mod phase;
pub mod plan;
pub mod raw;
pub mod report;
pub mod rpc;
pub mod setup;
pub mod stamp;
pub mod state;
pub mod stats;
mod verdict;
