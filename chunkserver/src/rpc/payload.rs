//! The one copy of a payload: from the receive buffer into aligned pool memory, with its block CRCs in the same pass.
//!
//! Promise: each byte is written once and read once (by the CRC, block by block, right behind the copy, so from the
//! cache). Bytes the kernel put into the buffer itself are only read.

use crate::io::buffer::PoolBuf;
use crate::limits::{BLOCK, DIRECT_RECV_BYTES_MIN};
use bytes::Bytes;
use smallvec::SmallVec;

/// One CRC32C per 4 KiB block.
pub type Crcs = SmallVec<[u32; 4]>;

/// What came behind the message of a call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Attachment {
    /// Nothing.
    #[default]
    None,
    /// Whole blocks in pool memory.
    Data {
        /// The bytes.
        data: Bytes,
        /// CRC32C of each block.
        crcs: Crcs,
    },
    /// So many bytes that no operation can use (not whole blocks, larger than a chunk, or for a method that takes none).
    /// They were passed over.
    Dropped(usize),
}

impl Attachment {
    /// Its length on the wire.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::None => 0,
            Self::Data { data, .. } => data.len(),
            Self::Dropped(len) => *len,
        }
    }
    /// Nothing was attached.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A payload being received. Its buffer has exactly its length, so the kernel cannot receive beyond it.
#[derive(Debug)]
pub struct Fill {
    /// `None` while it is lent to the kernel.
    buf: Option<PoolBuf>,
    pinned: usize,
    len: usize,
    filled: usize,
    crcs: Crcs,
}

impl Fill {
    /// Into this buffer, all of it.
    #[must_use]
    pub fn new(buf: PoolBuf) -> Self {
        let (pinned, len) = (buf.pinned(), buf.len());
        Self { buf: Some(buf), pinned, len, filled: 0, crcs: Crcs::with_capacity(len / BLOCK) }
    }

    /// Bytes of pool memory it holds.
    #[must_use]
    pub fn pinned(&self) -> usize {
        self.pinned
    }
    /// Bytes still to come.
    #[must_use]
    pub fn missing(&self) -> usize {
        self.len - self.filled
    }

    /// What is here of the payload. Not to be called while the buffer is lent.
    #[must_use]
    pub fn received(&self) -> &[u8] {
        self.buf.as_ref().and_then(|buf| buf.get(..self.filled)).unwrap_or_default()
    }

    /// Copy from the front of `input`.
    pub fn take(&mut self, input: &mut &[u8]) {
        let buf = self.buf.as_mut().expect("bytes arrived while the kernel was receiving into the payload buffer");
        while self.filled < self.len && !input.is_empty() {
            let room = BLOCK - self.filled % BLOCK;
            let (head, rest) = input.split_at(room.min(input.len()));
            buf[self.filled..self.filled + head.len()].copy_from_slice(head);
            *input = rest;
            self.filled += head.len();
            if self.filled.is_multiple_of(BLOCK) {
                self.crcs.push(raftlog::crc32c(&buf[self.filled - BLOCK..self.filled]));
            }
        }
    }

    /// Lend the buffer to the kernel, with the number of bytes in use, if enough is missing to be worth it.
    pub fn lend(&mut self) -> Option<(PoolBuf, usize)> {
        if self.missing() < DIRECT_RECV_BYTES_MIN {
            return None;
        }
        Some((self.buf.take()?, self.filled))
    }

    /// The kernel is done with the buffer and added so many bytes.
    pub fn returned(&mut self, buf: PoolBuf, added: usize) {
        assert!(self.buf.is_none() && buf.len() == self.len && added <= self.missing(), "not the buffer that was lent");
        self.filled += added;
        while (self.crcs.len() + 1) * BLOCK <= self.filled {
            let from = self.crcs.len() * BLOCK;
            self.crcs.push(raftlog::crc32c(&buf[from..from + BLOCK]));
        }
        self.buf = Some(buf);
    }

    /// Everything is there and here.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.filled == self.len && self.buf.is_some()
    }

    /// The payload, read-only from now on.
    #[must_use]
    pub fn finish(self) -> Attachment {
        assert!(self.is_complete(), "the payload is not complete");
        let data = self.buf.map(PoolBuf::freeze).unwrap_or_default();
        Attachment::Data { data, crcs: self.crcs }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::buffer::Arena;

    #[test]
    fn copied_and_received_bytes_mix_in_any_way() {
        let arena = Arena::new(1 << 20).unwrap();
        let bytes: Vec<u8> = (0..64 * BLOCK).map(|i| (i * 7 + i / 251) as u8).collect();
        for (copied, added) in [(0, 100), (5000, 64 * BLOCK - 5000), (3 * BLOCK, 3 * BLOCK), (BLOCK - 1, 2)] {
            let mut fill = Fill::new(arena.alloc(bytes.len()).unwrap());
            fill.take(&mut &bytes[..copied]);
            let (mut buf, filled) = fill.lend().unwrap();
            assert_eq!(filled, copied);
            assert!(!fill.is_complete() && fill.lend().is_none(), "lent once");
            buf[filled..filled + added].copy_from_slice(&bytes[filled..filled + added]);
            fill.returned(buf, added);
            let mut rest = &bytes[copied + added..];
            fill.take(&mut rest);
            assert!(rest.is_empty());
            let Attachment::Data { data, crcs } = fill.finish() else { panic!() };
            assert_eq!(data, bytes);
            let expected: Crcs = bytes.chunks(BLOCK).map(crc32c::crc32c).collect();
            assert_eq!(crcs, expected);
        }
        assert_eq!(arena.free_bytes(), 1 << 20);
    }

    #[test]
    fn a_small_rest_is_not_worth_a_receive_of_its_own() {
        let arena = Arena::new(1 << 20).unwrap();
        assert!(Fill::new(arena.alloc(BLOCK).unwrap()).lend().is_none());
        assert!(Fill::new(arena.alloc(DIRECT_RECV_BYTES_MIN).unwrap()).lend().is_some());
    }
}
