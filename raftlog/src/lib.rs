//! One write-ahead log per shard, shared by all its copysets. Sans-I/O: this crate decides *what* bytes go
//! *where* and when they count as durable; its caller owns the disk.
//!
//! Promises: a batch is all or nothing; records of one raft `Ready` share a batch; batches are acknowledged in
//! order; a segment is reused only when nothing live is left in it.
//!
//! Rooms: `record` is the codec, `batch` what waits to be written, `segment` where it goes, `index` what the log
//! says about each copyset, `log` the writer's face; `scan`, `chain`, `draft` and `recovery` turn a disk back into
//! a [`Log`]. The format is described in docs/formats.md.
#![forbid(unsafe_code)]

mod batch;
mod chain;
mod draft;
mod index;
mod log;
mod record;
mod recovery;
mod scan;
mod segment;

use bytes::Bytes;

pub use index::{Index, Location};
pub use log::{Log, PendingWrite, WriteId};
pub use recovery::{ReadFailed, RecoverError, Recovery, Report, Rot};

/// Number of a batch, from 1. Batches are written, and become durable, in this order.
pub type Seq = u64;

/// Where a shard's log zone is cut. Every offset this crate speaks of is relative to the zone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Random identity of the log. A client must never learn it: it is what keeps payload from passing for a header.
    pub uuid: [u8; 16],
    /// Bytes of a segment; whole blocks.
    pub segment_size: u64,
    /// Segments in the zone.
    pub segment_count: u32,
}

/// How the log batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes after which a batch takes no more records; one record larger than this gets a batch of its own.
    pub batch_bytes_max: usize,
    /// Batches being written at the same time, 1 to 32.
    pub writes_in_flight: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { batch_bytes_max: 1 << 20, writes_in_flight: 2 }
    }
}

/// Unit of every offset and length on disk, bytes.
pub const BLOCK: usize = 4096;

/// CRC32C (Castagnoli) of `data`.
#[must_use]
pub fn crc32c(data: &[u8]) -> u32 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, data) as u32
}

/// A copyset's group id: `(logical pool id << 32) | copyset id`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CopysetId(pub u64);

impl CopysetId {
    /// From Curve's pair of ids.
    #[must_use]
    pub const fn new(pool: u32, copyset: u32) -> Self {
        Self(((pool as u64) << 32) | copyset as u64)
    }
    /// Logical pool id.
    #[must_use]
    pub const fn pool(self) -> u32 {
        (self.0 >> 32) as u32
    }
    /// Copyset id inside the pool.
    #[must_use]
    pub const fn copyset(self) -> u32 {
        self.0 as u32
    }
}

/// What an entry carries. Values are on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum EntryKind {
    /// An operation, or the empty entry of a new leader.
    Normal = 0,
    /// A raft conf change (v2 message in `context`).
    ConfChange = 1,
}

/// One raft log entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Raft log index.
    pub index: u64,
    /// Raft term.
    pub term: u64,
    /// Kind.
    pub kind: EntryKind,
    /// `payload.len() / BLOCK` little-endian u32 CRC32Cs of the payload's blocks, then bytes this crate does not read.
    pub context: Bytes,
    /// Whole blocks; empty for entries without data. Written to disk from this very buffer (4 KiB aligned memory).
    pub payload: Bytes,
}

/// Raft's hard state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HardState {
    /// Current term.
    pub term: u64,
    /// Peer voted for in `term`; 0 = none.
    pub vote: u64,
    /// Committed index.
    pub commit: u64,
}

/// The state a copyset restarts from (rule 7).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// Everything up to here is durable outside the log.
    pub applied_index: u64,
    /// Term of `applied_index`.
    pub applied_term: u64,
    /// Hard state with `commit >= applied_index`.
    pub hard_state: HardState,
    /// Configuration and its epoch at exactly `applied_index`, encoded by the owner.
    pub conf: Bytes,
    /// Tells this life of the copyset from an earlier one of the same id; never 0.
    pub incarnation: u64,
}
