//! Receiving the payload of a write: copied once from the stream into pool buffers, CRC32C of each block in that pass.
//!
//! Promises: one buffer per extent of the write, so that a block waiting for write-back never pins a larger buffer; all
//! buffers are taken at once or none, so sessions that wait for memory hold none; bytes that arrive straight into a
//! buffer are never copied.

use crate::io::buffer::{Arena, PoolBuf};
use crate::limits::client_may_take;
use crate::shard::request::BlockCrcs;
use crate::volume::io::Payload;
use raftlog::{BLOCK, crc32c};
use smallvec::SmallVec;
use std::sync::Arc;

#[derive(Debug)]
pub(super) struct PayloadReceiver {
    /// Buffers not complete, last first; the last one is being filled.
    left: SmallVec<[PoolBuf; 1]>,
    /// Bytes in the buffer being filled.
    filled: usize,
    /// Checksums of its complete blocks.
    crcs: BlockCrcs,
    ready: SmallVec<[Payload; 1]>,
    /// The buffer being filled is with the kernel.
    lent: bool,
}

impl PayloadReceiver {
    /// Buffers of these lengths (whole blocks), or `None` when the arena has not enough now.
    pub(super) fn new(lens: impl Iterator<Item = u32>, arena: &Arc<Arena>) -> Option<Self> {
        let lens: SmallVec<[usize; 4]> = lens.map(|len| len as usize).collect();
        if !client_may_take(arena.free_bytes(), arena.size(), lens.iter().sum()) {
            return None;
        }
        let mut left = SmallVec::new();
        for len in lens {
            left.push(arena.alloc(len)?);
        }
        left.reverse();
        Some(Self { left, filled: 0, crcs: BlockCrcs::new(), ready: SmallVec::new(), lent: false })
    }

    /// Whether every byte is here.
    pub(super) fn is_complete(&self) -> bool {
        self.left.is_empty() && !self.lent
    }

    /// The data; call when complete.
    pub(super) fn finish(self) -> SmallVec<[Payload; 1]> {
        self.ready
    }

    /// What is here, in order. Not to be called while a buffer is lent.
    pub(super) fn received(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = self.ready.iter().flat_map(|payload| payload.data.iter().copied()).collect();
        let current = self.left.last().and_then(|buf| buf.get(..self.filled));
        bytes.extend_from_slice(current.unwrap_or_default());
        bytes
    }

    /// Consume what belongs to the payload.
    pub(super) fn take(&mut self, input: &mut &[u8]) {
        while let Some(buf) = self.left.last_mut().filter(|_| !self.lent) {
            // Up to the end of the block, so that its checksum is computed while it is in the cache.
            let room = (BLOCK - self.filled % BLOCK).min(input.len());
            let Some((now, rest)) = input.split_at_checked(room).filter(|(now, _)| !now.is_empty()) else { return };
            buf[self.filled..self.filled + room].copy_from_slice(now);
            *input = rest;
            self.advance(room);
        }
    }

    /// Lend the buffer being filled for receiving into it, when at least `min` bytes of it are missing.
    pub(super) fn lend(&mut self, min: usize) -> Option<(PoolBuf, usize)> {
        if self.lent || self.left.last().is_none_or(|buf| buf.len() - self.filled < min) {
            return None;
        }
        let buf = self.left.pop()?;
        self.lent = true;
        Some((buf, self.filled))
    }

    /// Take the lent buffer back with `added` more bytes in it.
    pub(super) fn give_back(&mut self, buf: PoolBuf, added: usize) {
        assert!(self.lent && self.filled + added <= buf.len(), "a buffer came back that was not lent");
        self.lent = false;
        self.left.push(buf);
        self.advance(added);
    }

    fn advance(&mut self, added: usize) {
        self.filled += added;
        let Some(buf) = self.left.last() else { return };
        while let Some(block) = buf[..self.filled].get(self.crcs.len() * BLOCK..(self.crcs.len() + 1) * BLOCK) {
            self.crcs.push(crc32c(block));
        }
        if self.filled == buf.len() {
            let data = self.left.pop().map(PoolBuf::freeze).unwrap_or_default();
            self.ready.push(Payload { data, crcs: std::mem::take(&mut self.crcs) });
            self.filled = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn all_buffers_or_none() {
        let arena = Arena::new(16 * BLOCK).unwrap();
        assert!(PayloadReceiver::new([8192u32; 9].into_iter(), &arena).is_none());
        assert_eq!(arena.free_bytes(), 16 * BLOCK);
        assert!(PayloadReceiver::new([8192u32; 8].into_iter(), &arena).is_some());
        assert_eq!(arena.free_bytes(), 16 * BLOCK);
    }

    proptest! {
        #[test]
        fn any_split_copied_or_direct_gives_the_same(
            lens in prop::collection::vec(1u32..5, 1..4),
            cuts in prop::collection::vec((1usize..9000, any::<bool>()), 1..40),
        ) {
            let arena = Arena::new(64 * BLOCK).unwrap();
            let total = lens.iter().sum::<u32>() as usize * BLOCK;
            let data: Vec<u8> = (0..total + 100).map(|i| (i * 31 / 7) as u8).collect();
            let mut receiver = PayloadReceiver::new(lens.iter().map(|n| n * BLOCK as u32), &arena).unwrap();
            let (mut at, mut cuts) = (0, cuts.into_iter().cycle());
            while !receiver.is_complete() {
                let (len, direct) = cuts.next().unwrap();
                if direct && let Some((mut buf, filled)) = receiver.lend(1) {
                    let added = len.min(buf.len() - filled);
                    buf[filled..filled + added].copy_from_slice(&data[at..at + added]);
                    prop_assert!(receiver.lend(1).is_none() && !receiver.is_complete());
                    receiver.give_back(buf, added);
                    at += added;
                } else {
                    let mut input = &data[at..(at + len).min(data.len())];
                    let before = input.len();
                    receiver.take(&mut input);
                    at += before - input.len();
                }
            }
            prop_assert_eq!(at, total, "nothing beyond the payload is consumed");
            let ready = receiver.finish();
            prop_assert_eq!(ready.iter().map(|p| p.data.len() as u32 / 4096).collect::<Vec<_>>(), lens);
            let joined: Vec<u8> = ready.iter().flat_map(|p| p.data.to_vec()).collect();
            prop_assert!(joined == data[..total]);
            for Payload { data, crcs } in ready {
                prop_assert_eq!(crcs.to_vec(), data.chunks(BLOCK).map(crc32c::crc32c).collect::<Vec<_>>());
            }
        }
    }
}
