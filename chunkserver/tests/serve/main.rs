//! The wire as a peer sees it: bytes into a connection, through the services, to a shard of maps, and bytes back.
//!
//! Frames are made and taken apart by a codec of the test's own (`wire.rs`), so the server's codec is never compared
//! with itself.
#![allow(clippy::unwrap_used, missing_docs)]

mod connection;
mod node;
mod pages;
mod replay;
mod services;
mod wire;
