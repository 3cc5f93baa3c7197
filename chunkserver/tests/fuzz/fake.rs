//! A shard that answers at once: usually with success and zeros, else with anything a shard may answer.

use crate::engine::Rng;
use bytes::Bytes;
use chunkserver::shard::request::{
    AdminOp, ChunkOp, CopysetStatus, Origin, Outcome, Reply, ReplyData, RequestOp, ShardStatus,
};
use raftlog::{BLOCK, crc32c};
use smallvec::SmallVec;

static ZEROS: [u8; 1 << 16] = [0; 1 << 16];

const OUTCOMES: [Outcome; 13] = [
    Outcome::Success,
    Outcome::NotLeader,
    Outcome::DiskFail,
    Outcome::CrcFail,
    Outcome::Invalid,
    Outcome::NoSpace,
    Outcome::NoCopyset,
    Outcome::NoChunk,
    Outcome::Failed,
    Outcome::Overload,
    Outcome::Backward,
    Outcome::Exists,
    Outcome::Stopping,
];

pub(crate) fn zeros(mut len: usize) -> SmallVec<[Bytes; 2]> {
    let mut all = SmallVec::new();
    while len > 0 {
        let step = len.min(ZEROS.len());
        all.push(Bytes::from_static(&ZEROS[..step]));
        len -= step;
    }
    all
}

/// What a payload must be when it reaches a shard.
fn check(op: &RequestOp, chunk_size: u32) {
    let RequestOp::Chunk { op, .. } = op else { return };
    let range = |offset: u32, len: usize| {
        assert!((offset as usize).is_multiple_of(BLOCK) && len.is_multiple_of(BLOCK), "whole blocks");
        assert!(offset as usize + len <= chunk_size as usize, "inside the chunk");
    };
    match op {
        ChunkOp::Write { offset, payload, crcs, .. } => {
            range(*offset, payload.len());
            assert_eq!(payload.as_ptr() as usize % BLOCK, 0, "aligned memory");
            assert!(payload.chunks(BLOCK).map(crc32c).eq(crcs.iter().copied()), "checksums travel with the payload");
        }
        ChunkOp::Read { offset, len } | ChunkOp::Zero { offset, len } | ChunkOp::Hash { offset, len } => {
            range(*offset, *len as usize);
        }
        ChunkOp::Delete { .. } | ChunkOp::Info => {}
    }
}

/// Answers one request. One in `odd` answers is not success.
pub(crate) fn answer(op: &RequestOp, chunk_size: u32, odd: usize, rng: &mut Rng) -> Reply {
    check(op, chunk_size);
    let outcome = if rng.one_in(odd) { *rng.pick(&OUTCOMES) } else { Outcome::Success };
    let status = || CopysetStatus {
        id: 0x1_0000_02bd,
        state: 1,
        peer: 0x7f00_0001_20d2_0000,
        leader: if matches!(op, RequestOp::Admin(AdminOp::ListCopysets)) { 0 } else { 0x7f00_0001_20d2_0000 },
        peers: vec![0x7f00_0001_20d2_0000],
        ..CopysetStatus::default()
    };
    let data = match (outcome, op) {
        (Outcome::Success, RequestOp::Chunk { op: ChunkOp::Read { len, .. }, .. }) => {
            ReplyData::Data(zeros(*len as usize))
        }
        (Outcome::Success, RequestOp::Chunk { op: ChunkOp::Info, .. }) => {
            ReplyData::Versions((0..rng.below(2) as u64).collect())
        }
        (Outcome::Success, RequestOp::Chunk { op: ChunkOp::Hash { .. }, .. }) => {
            ReplyData::Hash(rng.one_in(2).then_some(7))
        }
        (_, RequestOp::Admin(AdminOp::CopysetStatus)) => ReplyData::Copysets(vec![status()]),
        (_, RequestOp::Admin(AdminOp::ListCopysets)) => ReplyData::Copysets(vec![status(); rng.below(3)]),
        (_, RequestOp::Admin(AdminOp::ShardStatus)) => ReplyData::Shard(Box::<ShardStatus>::default()),
        _ => ReplyData::None,
    };
    Reply { origin: Origin { shard: 0, slot: 0, serial: 0 }, outcome, applied_index: rng.next(), data }
}
