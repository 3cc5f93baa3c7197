//! Crash enumeration of the log: for each operation, every image a power cut may leave.
//!
//! What is enumerated: at every moment at which something was submitted or completed, each 512-byte sector of each
//! write that is not durable has either arrived or not. *All* combinations are tried; sectors whose old and new bytes
//! are equal count as one. Operations are made so small that no moment has more than [`rig::FREE_MAX`] sectors that can
//! go either way (a payload may be zero but for some sectors, and what lies under it may be too); a moment with more
//! fails the test. Each image is recovered with the code that ships, must hold exactly the batches that arrived whole
//! behind each other, at least all that were acknowledged, without rot, in the state they left; and must be able to
//! live on: one more append, one more recovery.
//!
//! That the enumeration sees something is shown by dropping each barrier of docs/formats.md in the harness (a write
//! is reported durable that is not, acknowledgements in the order of completion, recovery from a drive's cache) and
//! expecting the fault that barrier prevents.
#![allow(clippy::unwrap_used, unreachable_pub)]

#[path = "../common/mod.rs"]
mod common;

mod barriers;
mod operations;
mod rig;
