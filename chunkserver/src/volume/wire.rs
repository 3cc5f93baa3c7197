//! Chunk operations as calls to another server, and its answers as outcomes.

use crate::rpc::Attachment;
use crate::shard::request::{ChunkOp, Guard, Outcome, ReplyData};
use crate::volume::io::zeros as zero_bytes;
use crate::volume::leaders::Leader;
use crate::volume::map::EXTENT_BYTES_MAX;
use bytes::Bytes;
use copyset::PeerId;
use prost::Message;
use proto::chunkserver::{
    ChunkOpStatus as Status, ChunkOpType, ChunkRequest, ChunkResponse, GetLeaderRequest2, GetLeaderResponse2,
};
use raftlog::CopysetId;
use smallvec::SmallVec;
use std::iter;

const CHUNK: &str = "curve.chunkserver.ChunkService";
const ZERO: &str = "chunkserver.internal.ZeroService";
const CLI: &str = "curve.chunkserver.CliService2";

/// What is sent: service, method, message, what goes with it.
pub(super) struct Letter {
    pub(super) service: &'static str,
    pub(super) method: &'static str,
    pub(super) body: Bytes,
    pub(super) attachment: SmallVec<[Bytes; 2]>,
}

/// A chunk operation. `None`: it is none that volumes ask of others. `zeros`: Zero is a write with this sn.
pub(super) fn letter(copyset: CopysetId, chunk: u64, op: &ChunkOp, zeros: Option<u64>, guard: Guard) -> Option<Letter> {
    let mut request = ChunkRequest {
        op_type: ChunkOpType::ChunkOpWrite.into(),
        logic_pool_id: copyset.pool(),
        copyset_id: copyset.copyset(),
        chunk_id: chunk,
        ..ChunkRequest::default()
    };
    let mut attachment = SmallVec::new();
    let (service, method) = match *op {
        ChunkOp::Read { offset, len } => {
            request.op_type = ChunkOpType::ChunkOpRead.into();
            (request.offset, request.size) = (Some(offset), Some(len));
            (CHUNK, "ReadChunk")
        }
        ChunkOp::Write { sn, offset, ref payload, .. } => {
            (request.sn, request.offset, request.size) = (Some(sn), Some(offset), Some(payload.len() as u32));
            attachment.push(payload.clone());
            (CHUNK, "WriteChunk")
        }
        ChunkOp::Zero { offset, len } => {
            (request.offset, request.size, request.sn) = (Some(offset), Some(len), zeros);
            if zeros.is_some() {
                let lens =
                    iter::repeat_n(EXTENT_BYTES_MAX, (len / EXTENT_BYTES_MAX) as usize).chain([len % EXTENT_BYTES_MAX]);
                attachment.extend(lens.filter(|&len| len > 0).map(zero_bytes));
                (CHUNK, "WriteChunk")
            } else {
                (ZERO, "Zero")
            }
        }
        ChunkOp::Delete { sn } => {
            request.op_type = ChunkOpType::ChunkOpDelete.into();
            request.sn = Some(sn);
            (CHUNK, "DeleteChunk")
        }
        ChunkOp::Info | ChunkOp::Hash { .. } => return None,
    };
    if !matches!(op, ChunkOp::Read { .. }) {
        (request.client_id, request.request_id) = (Some(guard.client), Some(guard.id));
        request.attempt = (guard.attempt > 0).then_some(guard.attempt);
        request.leader_term = (guard.term > 0).then_some(guard.term);
    }
    Some(Letter { service, method, body: request.encode_to_vec().into(), attachment })
}

/// What a server made of an operation; with [`Outcome::NotLeader`] whom it names.
pub(super) fn outcome(body: Bytes, attachment: Attachment) -> (Outcome, ReplyData) {
    let Ok(response) = proto::decode::<ChunkResponse>(body) else { return (Outcome::Failed, ReplyData::None) };
    let outcome = match response.status() {
        Status::Success => Outcome::Success,
        Status::Redirected | Status::CopysetNotexist => {
            let hint = response.redirect().parse::<PeerId>().map_or(0, |peer| peer.0);
            return (Outcome::NotLeader, ReplyData::Leader(hint));
        }
        Status::DiskFail => Outcome::DiskFail,
        Status::CrcFail => Outcome::CrcFail,
        Status::InvalidRequest => Outcome::Invalid,
        Status::Nospace => Outcome::NoSpace,
        Status::ChunkNotexist => Outcome::NoChunk,
        Status::FailureUnknown | Status::EpochTooOld => Outcome::Failed,
        Status::Overload => Outcome::Overload,
        Status::Backward => Outcome::Backward,
        Status::ChunkExist => Outcome::Exists,
    };
    let data = match attachment {
        Attachment::Data { data, .. } if outcome == Outcome::Success => ReplyData::Data(SmallVec::from_iter([data])),
        _ => ReplyData::None,
    };
    (outcome, data)
}

/// Who leads, and in which term?
pub(super) fn ask_leader(copyset: CopysetId) -> Letter {
    let (logic_pool_id, copyset_id) = (copyset.pool(), copyset.copyset());
    let ask = GetLeaderRequest2 { logic_pool_id, copyset_id, want_term: Some(true), ..GetLeaderRequest2::default() };
    Letter { service: CLI, method: "GetLeader", body: ask.encode_to_vec().into(), attachment: SmallVec::new() }
}

/// The answer to [`ask_leader`].
pub(super) fn leader(body: Bytes) -> Option<Leader> {
    let answer = proto::decode::<GetLeaderResponse2>(body).ok()?;
    let peer = answer.leader.address().parse::<PeerId>().ok()?;
    Some(Leader { peer: peer.0, term: answer.term() })
}
