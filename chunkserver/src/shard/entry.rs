//! The op header inside a raft entry's context: what a replica must know to apply the entry.
//!
//! Format (little endian), behind the block CRCs which raftlog reads: `kind u8, version u8, 2 bytes 0, offset u32,
//! length u32, chunk u64, sn u64` = 28 bytes. Empty = the own-term entry of a new leader. Documented in
//! docs/formats.md; a version this code does not know stops the replica (rule D2: replay refuses what it does not know).

use crate::chunk::Change;
use crate::shard::request::ChunkOp;

/// Length of an encoded header, bytes.
pub const LEN: usize = 28;
const VERSION: u8 = 1;

/// What an entry does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Store the payload.
    Write = 1,
    /// Remove the chunk.
    Delete = 2,
    /// Forget blocks.
    Zero = 3,
}

/// A decoded header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What.
    pub kind: Kind,
    /// Byte offset in the chunk.
    pub offset: u32,
    /// Length, bytes.
    pub len: u32,
    /// Chunk.
    pub chunk: u64,
    /// Version.
    pub sn: u64,
}

/// An entry of a version or kind this code does not know, or a malformed one.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("a log entry's header is not understood (length {len}, version {version}, kind {kind})")]
pub struct BadHeader {
    len: usize,
    version: u8,
    kind: u8,
}

impl Header {
    /// Header of a proposal; `None` for operations that are not logged.
    #[must_use]
    pub fn of(chunk: u64, op: &ChunkOp) -> Option<Self> {
        Some(match *op {
            ChunkOp::Write { sn, offset, ref payload, .. } => {
                Self { kind: Kind::Write, offset, len: u32::try_from(payload.len()).ok()?, chunk, sn }
            }
            ChunkOp::Delete { sn } => Self { kind: Kind::Delete, offset: 0, len: 0, chunk, sn },
            ChunkOp::Zero { offset, len } => Self { kind: Kind::Zero, offset, len, chunk, sn: 0 },
            ChunkOp::Read { .. } | ChunkOp::Info | ChunkOp::Hash { .. } => return None,
        })
    }

    /// What it does to the chunk, as far as admission goes.
    #[must_use]
    pub fn change(&self) -> Change {
        match self.kind {
            Kind::Write => Change::Write(self.sn),
            Kind::Delete => Change::Delete,
            Kind::Zero => Change::Nothing,
        }
    }

    /// Whether an entry with a payload so long can be applied.
    #[must_use]
    pub fn fits(&self, payload_len: usize) -> bool {
        match self.kind {
            Kind::Write => payload_len > 0 && payload_len == self.len as usize,
            Kind::Delete | Kind::Zero => payload_len == 0,
        }
    }

    /// To bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; LEN] {
        let mut out = [0; LEN];
        out[0] = self.kind as u8;
        out[1] = VERSION;
        out[4..8].copy_from_slice(&self.offset.to_le_bytes());
        out[8..12].copy_from_slice(&self.len.to_le_bytes());
        out[12..20].copy_from_slice(&self.chunk.to_le_bytes());
        out[20..28].copy_from_slice(&self.sn.to_le_bytes());
        out
    }

    /// From bytes.
    ///
    /// # Errors
    /// [`BadHeader`].
    pub fn decode(bytes: &[u8]) -> Result<Self, BadHeader> {
        let bad = || BadHeader {
            len: bytes.len(),
            version: bytes.get(1).copied().unwrap_or(0),
            kind: bytes.first().copied().unwrap_or(0),
        };
        let raw: &[u8; LEN] = bytes.try_into().map_err(|_| bad())?;
        let kind = match raw[0] {
            1 => Kind::Write,
            2 => Kind::Delete,
            3 => Kind::Zero,
            _ => return Err(bad()),
        };
        if raw[1] != VERSION || raw[2] != 0 || raw[3] != 0 {
            return Err(bad());
        }
        let u32_at = |at: usize| u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        Ok(Self { kind, offset: u32_at(4), len: u32_at(8), chunk: u64_at(12), sn: u64_at(20) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn round_trip(kind in 1u8..4, offset: u32, len: u32, chunk: u64, sn: u64) {
            let kind = [Kind::Write, Kind::Delete, Kind::Zero][usize::from(kind - 1)];
            let header = Header { kind, offset, len, chunk, sn };
            prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
        }

        #[test]
        fn hostile_bytes_are_an_error_or_a_header(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(header) = Header::decode(&bytes) {
                prop_assert_eq!(&header.encode()[..], &bytes[..]);
            }
        }
    }

    #[test]
    fn bytes_on_disk() {
        let header = Header { kind: Kind::Write, offset: 4096, len: 8192, chunk: 7, sn: 3 };
        let hex: String = header.encode().iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, "01010000001000000020000007000000000000000300000000000000");
    }
}
