//! Connections between shards of different chunkservers, sans-I/O: mail of the copysets in, frames out, and back.
//!
//! A shard dials every shard it sends to, twice: a data connection and a small one for what must not wait behind data
//! (rule 23). A connection carries mail one way, from the dialer; the other way only a welcome and answers to pings.
//! Dialers live in [`Peers`] (one [`link`] each), the other end is an [`Inbound`]. See decision 0014.
//!
//! Promises: mail of one lane arrives in order or not at all; what is queued for a peer is bounded, and mail that found
//! no room or was lost with its connection is reported; bytes of a payload are looked at once, in the pass that copies
//! them; nobody speaks here who has not shaken hands as who it is (rule 24).

pub mod convert;
pub mod inbound;
pub mod link;
pub mod peers;

pub use inbound::{Identity, Inbound, Progress, judge};
pub use link::{Link, LinkEnd};
pub use peers::{Address, PeerCounts, PeerEvent, PeerState, Peers};

#[cfg(test)]
mod tests;
