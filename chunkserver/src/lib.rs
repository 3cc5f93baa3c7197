//! The chunkserver: composes the log, the copysets and the chunk store into shards, and serves them.
#![deny(unsafe_code)]

#[allow(unsafe_code)]
pub mod io;

pub mod chunk;
pub mod config;
pub mod control;
pub mod handover;
pub mod limits;
pub mod mailbox;
pub mod metrics;
pub mod nbd;
pub mod nebd;
pub mod peer;
pub mod reactor;
pub mod replace;
pub mod rpc;
pub mod serve;
pub mod service;
pub mod shard;
pub mod volume;
