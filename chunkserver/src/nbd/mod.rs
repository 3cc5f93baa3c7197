//! NBD: the volumes for fio, qemu, libnbd and the kernel, with no client of our own.
//!
//! [`session`] is one connection's state machine, sans-I/O: bytes in, volume I/Os and bytes out. [`export`] says how a
//! volume looks to an NBD client. Bytes on the wire are `proto::nbd`'s.
//!
//! Promises: every reply means committed, whichever connection or command it answers, so FLUSH and FUA cost nothing and
//! CAN_MULTI_CONN is true; a client that sends nonsense, stalls or does not read its replies harms its own session only.

pub mod export;
mod outbox;
mod payload;
pub mod session;

pub use outbox::SEND_BUFS_MAX;
pub use session::{CloseReason, Limits, NbdEvent, Progress, Saved, Session};

#[cfg(test)]
mod tests;
