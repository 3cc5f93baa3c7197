//! One raft group per copyset, over raft-rs and the shard's shared log. Sans-I/O: this crate is fed the time, messages,
//! proposals and "the log is durable up to here", and leaves [`Effect`]s; it owns no file, socket, thread or clock.
//!
//! Promises, each kept by the file named:
//! * an entry is handed out for apply only after it is committed **and** durable in the own log ([`Copyset::ready`]);
//! * entries and hard state of one raft `Ready` go to the log in one call, so they share a batch (`group.rs`);
//! * what a copyset restarts from is {index, term, configuration, epoch} at exactly one index (`history.rs`);
//! * bytes from the log or a peer never reach raft-rs where they could make it panic (`restore.rs`, `screen.rs`),
//!   and never reach rust-protobuf's parser (`change.rs`);
//! * the same calls in the same order give the same effects: election timeouts come from a seeded generator.
#![forbid(unsafe_code)]

mod change;
mod conf;
mod config;
mod effect;
mod entry;
mod fetch;
mod group;
mod history;
mod lease;
mod peer;
mod plan;
mod proposals;
mod reads;
mod restore;
mod rng;
mod screen;
mod storage;
mod suspicion;
mod time;
mod window;

pub use change::{ChangeError, decode_change, encode_change};
pub use conf::{ConfError, ConfState};
pub use config::{Config, IDLE_FACTOR};
pub use effect::{ChangeFailed, Changed, Committed, Effect, Lane, lane};
pub use entry::{from_log as entry_from_log, to_log as entry_to_log};
pub use group::{
    ChangeRefused, Copyset, InProgress, InstallError, Offer, ProposeError, Renewal, ResetRefused, Role, Started,
};
pub use peer::{PeerId, PeerIdError};
pub use plan::Stage;
pub use raft;
pub use restore::Error;
pub use screen::{HEADER_MAX, StepError};
