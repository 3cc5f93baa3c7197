//! What our chunkservers say to each other: a handshake, then batches of raft messages. Fixed binary layouts, little
//! endian, as the message part of baidu_std frames of the service [`SERVICE`]; docs/wire.md has the tables.
//!
//! * [`Hello`] and [`Welcome`] (`hello.rs`) open a connection and say who is at its ends;
//! * [`Batch`] (`batch.rs`) carries the messages of one turn, of many copysets. Payloads are the frame's attachment, in
//!   the order of their entries.
//!
//! Promise: whatever the bytes are, nothing panics, and what decoding allocates is bounded by a small multiple of the
//! bytes received. Who may send what is the caller's business.

mod batch;
mod hello;

pub use batch::{BATCH_HEAD, Batch, BatchWriter, Body, Entry, EntryKind, Kind, Limits, Message, Raft, Snapshot};
pub use hello::{HELLO_LEN, Hello, Lane, Status, VERSION, WELCOME_LEN, Welcome};

/// Full name of the service. A server without it answers 1002 (ENOMETHOD), as all of brpc does.
pub const SERVICE: &str = "chunkserver.internal.PeerService";
/// Opens a connection; answered by a [`Welcome`].
pub const HELLO: &str = "Hello";
/// A [`Batch`]; never answered.
pub const BATCH: &str = "Batch";
/// An empty message, answered by an empty one: the other end is alive.
pub const PING: &str = "Ping";

/// Bytes that are no message of this protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// Cut short, or longer than what it says it holds.
    #[error("a length does not fit: {0}")]
    Length(&'static str),
    /// A version that is not ours.
    #[error("version {0} of the peer protocol, this is version {VERSION}")]
    Version(u16),
    /// A number that means nothing.
    #[error("{what} {value} is not known")]
    Unknown {
        /// What it numbers.
        what: &'static str,
        /// The number.
        value: u32,
    },
    /// A payload that is no whole blocks, too long, or without its checksums.
    #[error("a payload of {0} bytes")]
    Payload(u32),
    /// The payloads are not as long as the attachment.
    #[error("payloads of {said} bytes in an attachment of {found}")]
    Attachment {
        /// Sum of the payload lengths.
        said: u64,
        /// Bytes that follow the message.
        found: u64,
    },
}

/// Reads little-endian numbers from the front of a slice.
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl<'a> Fields<'a> {
    pub(crate) fn take(&mut self, count: usize, what: &'static str) -> Result<&'a [u8], PeerError> {
        let (head, rest) = self.0.split_at_checked(count).ok_or(PeerError::Length(what))?;
        self.0 = rest;
        Ok(head)
    }
    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], PeerError> {
        let (head, rest) = self.0.split_first_chunk().ok_or(PeerError::Length(what))?;
        self.0 = rest;
        Ok(*head)
    }
    pub(crate) fn u8(&mut self, what: &'static str) -> Result<u8, PeerError> {
        self.array::<1>(what).map(|[byte]| byte)
    }
    pub(crate) fn u16(&mut self, what: &'static str) -> Result<u16, PeerError> {
        self.array(what).map(u16::from_le_bytes)
    }
    pub(crate) fn u32(&mut self, what: &'static str) -> Result<u32, PeerError> {
        self.array(what).map(u32::from_le_bytes)
    }
    pub(crate) fn u64(&mut self, what: &'static str) -> Result<u64, PeerError> {
        self.array(what).map(u64::from_le_bytes)
    }
    pub(crate) fn uuid(&mut self, what: &'static str) -> Result<[u8; 16], PeerError> {
        self.array(what)
    }
    /// Bytes that must be 0: a later version may give them a meaning that must not be missed.
    pub(crate) fn zeros(&mut self, count: usize, what: &'static str) -> Result<(), PeerError> {
        match self.take(count, what)?.iter().find(|&&byte| byte != 0) {
            Some(&byte) => Err(PeerError::Unknown { what, value: u32::from(byte) }),
            None => Ok(()),
        }
    }
}
