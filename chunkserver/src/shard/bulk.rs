//! What shards tell each other of a raft snapshot: the chunks there are, and their pieces.
//!
//! Format owned (little-endian): `version u8 = 1, kind u8`, then
//! ```text
//! 1 which chunks?   index u64, from u64
//! 2 these           index u64, from u64, more u8, count u16, count x { chunk, created, applied, sn, corrected sn: u64 }
//! 3 a piece?        index u64, chunk u64, offset u32, len u32
//! 4 that piece      index u64 (applied by the sender, at least), chunk u64, offset u32, len u32, exists u8, created, applied, sn, corrected sn: u64,
//!                   blocks u16, blocks x crc u32 (0 and a block of zeros in the payload: nothing is there)
//! 5 how far are you? last u64 (own last index; the asker's log has lost records)
//! 6 so far           term u64, last u64
//! ```
//! The payload of 4 is the whole piece, or empty if nothing is in it.

use crate::chunk::ChunkInfo;
use bytes::{BufMut, Bytes, BytesMut};
use raftlog::BLOCK;

const VERSION: u8 = 1;
/// Chunks of one list.
pub(super) const LIST_MAX: usize = 1000;
/// Bytes of one piece at most.
pub(super) const PIECE_BYTES: u32 = 1 << 20;
/// Pieces of a chunk at least, if it has so many blocks: that it comes in pieces is to be seen with small chunks, too.
const PIECES_MIN: u32 = 8;

/// All pieces of a chunk, of at most `max` bytes in whole blocks: offset and length.
pub(super) fn pieces(chunk_size: u32, max: u32) -> impl Iterator<Item = (u32, u32)> {
    let len = (chunk_size / PIECES_MIN).next_multiple_of(BLOCK as u32).min(max);
    (0..chunk_size).step_by(len as usize).map(move |at| (at, len.min(chunk_size - at)))
}

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Bulk {
    /// Which chunks are there from `from` on? `index`: the state asked for is at least that new.
    AskList { index: u64, from: u64 },
    /// These, and perhaps more.
    List { index: u64, from: u64, more: bool, chunks: Vec<ChunkInfo> },
    /// What is in this part of a chunk?
    AskPiece { index: u64, chunk: u64, offset: u32, len: u32 },
    /// This, as of an index not below `index`. `info` is `None` when there is no such chunk (any more).
    Piece { index: u64, chunk: u64, offset: u32, len: u32, info: Option<ChunkInfo>, crcs: Vec<u32> },
    /// How far are you? The asker's log has lost records and ends at `last`.
    AskState { last: u64 },
    /// So far.
    State { term: u64, last: u64 },
}

/// Not one of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a snapshot message is not understood")]
pub(super) struct BadBulk;

impl Bulk {
    pub(super) fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(64);
        out.put_u8(VERSION);
        match self {
            Self::AskList { index, from } => {
                out.put_u8(1);
                out.put_u64_le(*index);
                out.put_u64_le(*from);
            }
            Self::List { index, from, more, chunks } => {
                assert!(chunks.len() <= LIST_MAX, "a list of {} chunks", chunks.len());
                out.put_u8(2);
                out.put_u64_le(*index);
                out.put_u64_le(*from);
                out.put_u8(u8::from(*more));
                out.put_u16_le(chunks.len() as u16);
                chunks.iter().for_each(|info| {
                    out.put_u64_le(info.chunk);
                    put_info(&mut out, info);
                });
            }
            Self::AskPiece { index, chunk, offset, len } => {
                out.put_u8(3);
                out.put_u64_le(*index);
                out.put_u64_le(*chunk);
                out.put_u32_le(*offset);
                out.put_u32_le(*len);
            }
            Self::Piece { index, chunk, offset, len, info, crcs } => {
                out.put_u8(4);
                out.put_u64_le(*index);
                out.put_u64_le(*chunk);
                out.put_u32_le(*offset);
                out.put_u32_le(*len);
                out.put_u8(u8::from(info.is_some()));
                put_info(&mut out, &info.unwrap_or_default());
                out.put_u16_le(crcs.len() as u16);
                crcs.iter().for_each(|crc| out.put_u32_le(*crc));
            }
            Self::AskState { last } => {
                out.put_u8(5);
                out.put_u64_le(*last);
            }
            Self::State { term, last } => {
                out.put_u8(6);
                out.put_u64_le(*term);
                out.put_u64_le(*last);
            }
        }
        out.freeze()
    }

    /// Any bytes are safe.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, BadBulk> {
        let mut r = Reader(bytes);
        if r.u8()? != VERSION {
            return Err(BadBulk);
        }
        let bulk = match r.u8()? {
            1 => Self::AskList { index: r.u64()?, from: r.u64()? },
            2 => {
                let (index, from, more, count) = (r.u64()?, r.u64()?, r.flag()?, usize::from(r.u16()?));
                if count > LIST_MAX {
                    return Err(BadBulk);
                }
                let chunks = (0..count).map(|_| {
                    let chunk = r.u64()?;
                    r.info(chunk)
                });
                Self::List { index, from, more, chunks: chunks.collect::<Result<_, _>>()? }
            }
            3 => Self::AskPiece { index: r.u64()?, chunk: r.u64()?, offset: r.u32()?, len: r.u32()? },
            4 => {
                let (index, chunk, offset, len, exists) = (r.u64()?, r.u64()?, r.u32()?, r.u32()?, r.flag()?);
                let info = r.info(chunk)?;
                let count = usize::from(r.u16()?);
                let crcs = (0..count).map(|_| r.u32()).collect::<Result<_, _>>()?;
                Self::Piece { index, chunk, offset, len, info: exists.then_some(info), crcs }
            }
            5 => Self::AskState { last: r.u64()? },
            6 => Self::State { term: r.u64()?, last: r.u64()? },
            _ => return Err(BadBulk),
        };
        let whole = match bulk {
            Self::AskPiece { offset, len, .. } | Self::Piece { offset, len, .. } => {
                let block = BLOCK as u32;
                offset.is_multiple_of(block) && len.is_multiple_of(block) && (1..=PIECE_BYTES).contains(&len)
            }
            _ => true,
        };
        if whole && r.0.is_empty() { Ok(bulk) } else { Err(BadBulk) }
    }
}

fn put_info(out: &mut BytesMut, info: &ChunkInfo) {
    [info.created, info.applied, info.sn, info.corrected_sn].into_iter().for_each(|value| out.put_u64_le(value));
}

/// A cursor that never reads past the end.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], BadBulk> {
        let (head, tail) = self.0.split_first_chunk::<N>().ok_or(BadBulk)?;
        self.0 = tail;
        Ok(*head)
    }
    fn u8(&mut self) -> Result<u8, BadBulk> {
        self.array::<1>().map(|[b]| b)
    }
    fn flag(&mut self) -> Result<bool, BadBulk> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(BadBulk),
        }
    }
    fn u16(&mut self) -> Result<u16, BadBulk> {
        self.array().map(u16::from_le_bytes)
    }
    fn u32(&mut self) -> Result<u32, BadBulk> {
        self.array().map(u32::from_le_bytes)
    }
    fn u64(&mut self) -> Result<u64, BadBulk> {
        self.array().map(u64::from_le_bytes)
    }
    fn info(&mut self, chunk: u64) -> Result<ChunkInfo, BadBulk> {
        Ok(ChunkInfo { chunk, created: self.u64()?, applied: self.u64()?, sn: self.u64()?, corrected_sn: self.u64()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn info(chunk: u64) -> ChunkInfo {
        ChunkInfo { chunk, created: 2, applied: 3, sn: 4, corrected_sn: 5 }
    }

    #[test]
    fn round_trip_and_bytes() {
        let all = [
            Bulk::AskList { index: 7, from: 0 },
            Bulk::List { index: 7, from: 9, more: true, chunks: vec![info(9), info(11)] },
            Bulk::AskPiece { index: 7, chunk: 9, offset: 4096, len: 8192 },
            Bulk::Piece { index: 7, chunk: 9, offset: 0, len: 4096, info: None, crcs: vec![] },
            Bulk::Piece { index: 7, chunk: 9, offset: 0, len: 8192, info: Some(info(9)), crcs: vec![1, 0] },
            Bulk::AskState { last: 8 },
            Bulk::State { term: 3, last: 8 },
        ];
        for bulk in all {
            assert_eq!(Bulk::decode(&bulk.encode()), Ok(bulk));
        }
        let ask = Bulk::AskPiece { index: 1, chunk: 2, offset: 4096, len: 8192 }.encode();
        assert_eq!(&ask[..], [1, 3, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 32, 0, 0]);
        let odd = Bulk::AskPiece { index: 1, chunk: 2, offset: 100, len: 8192 }.encode();
        assert_eq!(Bulk::decode(&odd), Err(BadBulk));
    }

    proptest! {
        #[test]
        fn hostile_bytes_are_an_error_or_a_message(mut bytes in proptest::collection::vec(any::<u8>(), 0..120), kind in 0u8..8) {
            if let [version, of, ..] = bytes.as_mut_slice() {
                (*version, *of) = (VERSION, kind);
            }
            if let Ok(bulk) = Bulk::decode(&bytes) {
                let again = bulk.encode();
                prop_assert_eq!(Bulk::decode(&again), Ok(bulk));
            }
        }
    }
}
