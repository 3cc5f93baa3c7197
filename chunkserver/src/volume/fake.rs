//! A shard in memory for tests: chunks of blocks, absent until written; checks what a real shard relies on.

use crate::io::buffer::{Arena, PoolBuf};
use crate::shard::request::{ChunkOp, Origin, Outcome, Reply, ReplyData, RequestOp};
use crate::volume::Volume;
use crate::volume::map::{Geometry, Shape};
use bytes::Bytes;
use raftlog::{BLOCK, CopysetId, crc32c};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

#[derive(Default)]
pub(crate) struct FakeShard {
    /// Blocks by (copyset, chunk) and block number.
    chunks: BTreeMap<(CopysetId, u64), BTreeMap<u32, Bytes>>,
    /// Chunks that fail, and how.
    pub(crate) broken: BTreeMap<u64, Outcome>,
    /// Widest range asked of one chunk.
    pub(crate) longest: u32,
    pub(crate) requests: usize,
    owners: BTreeMap<u64, BTreeSet<CopysetId>>,
}

pub(crate) fn reply(outcome: Outcome, data: ReplyData) -> Reply {
    Reply { origin: Origin { shard: 0, slot: 0, serial: 0 }, outcome, applied_index: 0, data }
}

impl FakeShard {
    pub(crate) fn serve(&mut self, copyset: CopysetId, op: RequestOp) -> Reply {
        let RequestOp::Chunk { chunk, op } = op else { panic!("not a chunk operation") };
        self.requests += 1;
        self.owners.entry(chunk).or_default().insert(copyset);
        assert_eq!(self.owners[&chunk].len(), 1, "a chunk lives in one copyset");
        if let Some(&outcome) = self.broken.get(&chunk) {
            return reply(outcome, ReplyData::None);
        }
        let key = (copyset, chunk);
        match op {
            ChunkOp::Write { sn, offset, payload, crcs } => {
                assert!(sn > 0 && !payload.is_empty());
                assert_eq!(payload.as_ptr() as usize % BLOCK, 0, "aligned memory");
                assert_eq!(crcs.len() * BLOCK, payload.len());
                let blocks = self.chunks.entry(key).or_default();
                for (i, crc) in crcs.iter().enumerate() {
                    let block = payload.slice(i * BLOCK..(i + 1) * BLOCK);
                    assert_eq!(crc32c(&block), *crc);
                    blocks.insert(offset / BLOCK as u32 + i as u32, block);
                }
                self.longest = self.longest.max(payload.len() as u32);
                reply(Outcome::Success, ReplyData::None)
            }
            ChunkOp::Zero { offset, len } => {
                let blocks = offset / BLOCK as u32..(offset + len) / BLOCK as u32;
                if let Some(chunk) = self.chunks.get_mut(&key) {
                    chunk.retain(|block, _| !blocks.contains(block));
                }
                reply(Outcome::Success, ReplyData::None)
            }
            ChunkOp::Read { offset, len } => self.read(key, offset, len),
            other => panic!("unexpected {other:?}"),
        }
    }

    fn read(&mut self, key: (CopysetId, u64), offset: u32, len: u32) -> Reply {
        self.longest = self.longest.max(len);
        let Some(blocks) = self.chunks.get(&key) else { return reply(Outcome::NoChunk, ReplyData::None) };
        let range = offset / BLOCK as u32..(offset + len) / BLOCK as u32;
        let mut all = vec![0u8; len as usize];
        for (i, block) in range.enumerate() {
            if let Some(data) = blocks.get(&block) {
                all[i * BLOCK..(i + 1) * BLOCK].copy_from_slice(data);
            }
        }
        let mut first = Bytes::from(all);
        let rest = first.split_off(first.len() / 2);
        reply(Outcome::Success, ReplyData::Data([first, rest].into_iter().collect()))
    }
}

pub(crate) fn volume(name: &str, shape: Shape) -> Arc<Volume> {
    let copysets = (0..3).map(|i| CopysetId::new(1, 100 + i)).collect();
    Arc::new(Volume::new(5, name.to_owned(), 1, 0, Geometry::new(5, shape, copysets).unwrap()))
}

/// Aligned memory with these bytes.
pub(crate) fn pooled(arena: &Arc<Arena>, data: &[u8]) -> PoolBuf {
    let mut buf = arena.alloc(data.len()).unwrap();
    buf.copy_from_slice(data);
    buf
}
