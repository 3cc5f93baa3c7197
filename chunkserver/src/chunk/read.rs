//! Reading: where each part of a range is, and whether what the device returned is what was written (rule 12).

use super::overlay::{Overlay, PinRef, Pins};
use super::store::Chunk;
use bytes::Bytes;
use raftlog::{BLOCK, CopysetId};
use smallvec::SmallVec;

/// A part of a range, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// These bytes.
    Memory(Bytes),
    /// This many zeros.
    Zeros(u32),
    /// To be read from the disk and then checked with [`Store::check`](super::Store::check).
    Device {
        /// Where on the disk.
        disk_offset: u64,
        /// How much.
        len: u32,
        /// Number of its first block in the chunk.
        first_block: u32,
    },
}

/// The chunk as it was when a read was planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanKey {
    pub(super) copyset: CopysetId,
    pub(super) chunk: u64,
    pub(super) slot: u32,
    pub(super) generation: u64,
    pub(super) version: u64,
}

/// How to read a range.
#[derive(Clone, Debug)]
pub struct ReadPlan {
    /// For [`Store::check`](super::Store::check).
    pub key: PlanKey,
    /// The range, in order and without gaps.
    pub pieces: SmallVec<[Piece; 4]>,
}

impl ReadPlan {
    /// The plan of a read that cannot be made yet.
    #[must_use]
    pub fn none() -> Self {
        let key = PlanKey { copyset: CopysetId(0), chunk: 0, slot: 0, generation: 0, version: 0 };
        Self { key, pieces: SmallVec::new() }
    }
}

/// What a device read turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verified {
    /// As written.
    Ok,
    /// The chunk changed meanwhile: plan again and read again.
    Stale,
    /// A block is not what was written. The caller reads once more; twice means rot.
    Rot {
        /// Number of the block in the chunk.
        block: u32,
    },
}

enum Run {
    Memory(PinRef, PinRef, u32),
    Zeros(u32),
    Device(u32, u32),
}

impl Run {
    fn emit(self, pins: &Pins, disk_offset: impl Fn(u32) -> u64) -> Piece {
        match self {
            Self::Memory(first, _, blocks) => Piece::Memory(pins.slice(first, blocks)),
            Self::Zeros(blocks) => Piece::Zeros(blocks * BLOCK as u32),
            Self::Device(first_block, blocks) => {
                Piece::Device { disk_offset: disk_offset(first_block), len: blocks * BLOCK as u32, first_block }
            }
        }
    }
}

/// Cut blocks `first..end` of `chunk` into as few pieces as possible.
pub(super) fn pieces(
    chunk: &Chunk,
    pins: &Pins,
    range: std::ops::Range<u32>,
    disk_offset: impl Fn(u32) -> u64,
) -> SmallVec<[Piece; 4]> {
    let mut out = SmallVec::new();
    let mut run: Option<Run> = None;
    for block in range {
        let here = where_is(chunk, &chunk.overlay, block);
        run = match (run.take(), here) {
            (Some(Run::Memory(first, last, n)), Run::Memory(at, ..)) if last.next() == at => {
                Some(Run::Memory(first, at, n + 1))
            }
            (Some(Run::Zeros(n)), Run::Zeros(_)) => Some(Run::Zeros(n + 1)),
            (Some(Run::Device(first, n)), Run::Device(..)) => Some(Run::Device(first, n + 1)),
            (before, here) => {
                out.extend(before.map(|run| run.emit(pins, &disk_offset)));
                Some(here)
            }
        };
    }
    out.extend(run.map(|run| run.emit(pins, &disk_offset)));
    out
}

fn where_is(chunk: &Chunk, overlay: &Overlay, block: u32) -> Run {
    match overlay.get(block) {
        Some(dirty) => Run::Memory(dirty.at, dirty.at, 1),
        None if chunk.meta.written.get(block) => Run::Device(block, 1),
        None => Run::Zeros(1),
    }
}

/// Compare what the device returned for blocks from `first_block` on with the CRC table.
pub(super) fn check(chunk: &Chunk, key: &PlanKey, first_block: u32, data: &[u8]) -> Verified {
    for (block, bytes) in (first_block..).zip(data.chunks(BLOCK)) {
        let expected = chunk.crcs.get(block as usize).copied();
        if expected == Some(raftlog::crc32c(bytes)) {
            continue;
        }
        // The table follows the device: it changes when a write completes. So a mismatch is rot only if no write of
        // this chunk completed since the plan and none of this block may be on its way.
        let on_device = chunk.overlay.get(block).is_none() && chunk.meta.written.get(block);
        if chunk.version != key.version || !on_device {
            return Verified::Stale;
        }
        return Verified::Rot { block };
    }
    Verified::Ok
}
