//! Crash enumeration of the chunk store under its shard: for each operation, every image a power cut may leave.
//!
//! What is enumerated: after every submission and every completion of an operation, each 512-byte sector of each write
//! that is not durable holds what is durable or what one of those writes puts there. *All* combinations are tried;
//! sectors whose old and new bytes are equal count as one. Blocks are zero but for a few sectors so that no moment has
//! more than [`lab::FREE_MAX`] sectors that can go either way; a moment with more fails the test.
//!
//! Each image is looked at twice. **As it lies there**, with a reader of the pages written from docs/formats.md: what
//! a metapage or CRC page speaks of is in place, and nothing is in place that the log does not know as committed. And
//! **after recovery** by the shard that ships, from the sync to the replay: the chunks are in the state after some
//! prefix of the operations that contains all answered ones, nothing counts as rot, and nothing else is there; one in
//! [`lab::LIVE_ON`] images lives on through a round and another start.
//!
//! That the enumeration sees something is shown by dropping each barrier in the harness (`barriers`): an operation is
//! reported done that is not, so that what should have waited for it does not.

mod barriers;
mod history;
mod lab;
mod medium;
mod operations;
mod pages;
