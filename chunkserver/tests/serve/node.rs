//! A chunkserver whose shards are maps: just enough of a shard to answer what services ask.

use bytes::Bytes;
use chunkserver::io::Instant;
use chunkserver::io::buffer::Arena;
use chunkserver::metrics::ProcessStats;
use chunkserver::rpc::{Connection, Incoming, Options, Out, Progress};
use chunkserver::service::{Context, Handled, Info, Pending, Shared, handle, resume, resume_all, route};
use chunkserver::shard::request::{
    AdminOp, ChunkOp, CopysetStatus, MemberOp, Origin, Outcome, Reply, ReplyData, RequestOp, ShardStatus,
};
use copyset::PeerId;
use raftlog::CopysetId;
use std::collections::BTreeMap;
use std::sync::Arc;

pub(crate) const CHUNK_SIZE: u32 = 16 << 20;

#[derive(Default)]
pub(crate) struct Chunk {
    pub(crate) sn: u64,
    pub(crate) blocks: BTreeMap<u32, Vec<u8>>,
}

pub(crate) struct Node {
    pub(crate) ctx: Context,
    pub(crate) arena: Arc<Arena>,
    pub(crate) copysets: BTreeMap<CopysetId, CopysetStatus>,
    pub(crate) chunks: BTreeMap<(CopysetId, u64), Chunk>,
    /// Who leads every copyset created from now on.
    pub(crate) leader: u64,
    pub(crate) now: Instant,
}

pub(crate) fn peer(port: u16) -> u64 {
    format!("127.0.0.1:{port}:0").parse::<PeerId>().unwrap().0
}

impl Node {
    pub(crate) fn new(port: u16, leader_port: u16) -> Self {
        let info = Info {
            peer: PeerId(peer(port)),
            chunk_size: CHUNK_SIZE,
            max_inflight: 5000,
            version: "0.1.0".into(),
            config: vec![("copyset.raft_log_uri".into(), "curve:///data".into())],
            process: ProcessStats::default,
        };
        let shared = Shared::new(info, 1);
        shared.set_loaded();
        Self {
            ctx: Context::new(shared, 0),
            arena: Arena::new(64 << 20).unwrap(),
            copysets: BTreeMap::new(),
            chunks: BTreeMap::new(),
            leader: peer(leader_port),
            now: Instant(1_000_000_000),
        }
    }

    /// With copyset 1:701, led here.
    pub(crate) fn with_copyset() -> Self {
        let mut node = Self::new(8402, 8402);
        node.create(CopysetId::new(1, 701), &[peer(8402)]);
        node
    }

    pub(crate) fn connection(&self) -> Connection {
        Connection::new(Options { route, chunk_size: CHUNK_SIZE as usize })
    }

    fn create(&mut self, copyset: CopysetId, peers: &[u64]) -> Outcome {
        if self.copysets.contains_key(&copyset) {
            return Outcome::Exists;
        }
        let own = self.ctx.info().peer.0;
        let status = CopysetStatus {
            id: copyset.0,
            state: if own == self.leader { 1 } else { 4 },
            peer: own,
            leader: self.leader,
            peers: peers.to_vec(),
            changing: false,
            term: 2,
            committed: 1,
            applied: 1,
            first: 1,
            last: 1,
            durable: 1,
            epoch: 1,
            chunks: 0,
        };
        self.copysets.insert(copyset, status);
        Outcome::Success
    }

    /// One request to the shard.
    pub(crate) fn ask(&mut self, copyset: CopysetId, op: RequestOp) -> Reply {
        let (outcome, data) = match op {
            RequestOp::Admin(op) => self.admin(copyset, op),
            RequestOp::Chunk { chunk, op } | RequestOp::Guarded { chunk, op, .. } => {
                match self.copysets.get_mut(&copyset) {
                    None => (Outcome::NoCopyset, ReplyData::None),
                    Some(status) if status.state != 1 && !matches!(op, ChunkOp::Hash { .. }) => {
                        (Outcome::NotLeader, ReplyData::Leader(status.leader))
                    }
                    Some(status) => {
                        status.applied += 1;
                        self.chunk(copyset, chunk, op)
                    }
                }
            }
        };
        let reached = matches!(outcome, Outcome::Success | Outcome::NoChunk | Outcome::Failed);
        let applied = self.copysets.get(&copyset).map_or(0, |status| status.applied);
        let origin = Origin { shard: 0, slot: 0, serial: 0 };
        Reply { origin, outcome, applied_index: if reached { applied } else { 0 }, data }
    }

    fn admin(&mut self, copyset: CopysetId, op: AdminOp) -> (Outcome, ReplyData) {
        match op {
            AdminOp::CreateCopyset { peers } => (self.create(copyset, &peers), ReplyData::None),
            AdminOp::CopysetStatus => match self.copysets.get(&copyset) {
                Some(status) => (Outcome::Success, ReplyData::Copysets(vec![status.clone()])),
                None => (Outcome::NoCopyset, ReplyData::None),
            },
            AdminOp::ListCopysets => (Outcome::Success, ReplyData::Copysets(self.copysets.values().cloned().collect())),
            AdminOp::ListTrash => (Outcome::Success, ReplyData::Copysets(Vec::new())),
            AdminOp::DeleteCopyset | AdminOp::RestoreCopyset => (Outcome::Failed, ReplyData::None),
            AdminOp::Members(op) => self.members(copyset, op),
            AdminOp::Checkpoint | AdminOp::CheckpointAll => (Outcome::Success, ReplyData::None),
            AdminOp::ShardStatus => {
                let status = ShardStatus {
                    leaders: 1,
                    chunks: self.chunks.len() as u64,
                    slots_unclaimed: 61,
                    ..ShardStatus::default()
                };
                (Outcome::Success, ReplyData::Shard(Box::new(status)))
            }
        }
    }

    /// A leader does as it is told; a transfer is always in its way.
    fn members(&mut self, copyset: CopysetId, op: MemberOp) -> (Outcome, ReplyData) {
        let own = self.ctx.info().peer.0;
        let Some(status) = self.copysets.get_mut(&copyset) else { return (Outcome::NoCopyset, ReplyData::None) };
        if let MemberOp::Reset(peers) = op {
            let outcome = match status.state {
                _ if peers != [own] => Outcome::Invalid,
                2 => Outcome::Busy, // a change is under way
                5 => Outcome::CrcFail,
                6 => Outcome::NotLeader,
                _ => Outcome::Success,
            };
            return (outcome, ReplyData::None);
        }
        if status.state != 1 {
            return (Outcome::NotLeader, ReplyData::Leader(status.leader));
        }
        let old = status.peers.clone();
        match op {
            MemberOp::Add(peer) => status.peers.push(peer),
            MemberOp::Remove(peer) => status.peers.retain(|&p| p != peer),
            MemberOp::Set(peers) => status.peers = peers,
            MemberOp::Transfer(_) | MemberOp::Reset(_) => return (Outcome::Busy, ReplyData::None),
        }
        (Outcome::Success, ReplyData::Members { old, new: status.peers.clone() })
    }

    fn chunk(&mut self, copyset: CopysetId, id: u64, op: ChunkOp) -> (Outcome, ReplyData) {
        let key = (copyset, id);
        let known = self.chunks.get(&key).map(|chunk| chunk.sn);
        let only = |outcome| (outcome, ReplyData::None);
        match op {
            ChunkOp::Write { sn, offset, payload, crcs } => {
                let expected: Vec<u32> = payload.chunks(4096).map(crc32c::crc32c).collect();
                assert_eq!(crcs.to_vec(), expected, "block CRCs travel with the payload");
                assert_eq!(payload.as_ptr() as usize % 4096, 0, "payloads are aligned");
                match known {
                    None if sn == 0 => return only(Outcome::Failed),
                    Some(known) if sn < known => return only(Outcome::Backward),
                    Some(known) if sn > known => return only(Outcome::Failed),
                    _ => {}
                }
                let chunk = self.chunks.entry(key).or_default();
                chunk.sn = sn;
                for (at, block) in (offset..).step_by(4096).zip(payload.chunks(4096)) {
                    chunk.blocks.insert(at, block.to_vec());
                }
                only(Outcome::Success)
            }
            ChunkOp::Read { offset, len } => match self.chunks.get(&key) {
                None => only(Outcome::NoChunk),
                Some(chunk) => {
                    let blocks = (offset..offset + len).step_by(4096);
                    let data = blocks.map(|at| chunk.blocks.get(&at).cloned().unwrap_or_else(|| vec![0; 4096]));
                    (Outcome::Success, ReplyData::Data(data.map(Bytes::from).collect()))
                }
            },
            ChunkOp::Delete { sn } => {
                if known.is_some_and(|known| sn < known) {
                    return only(Outcome::Failed);
                }
                self.chunks.remove(&key);
                only(Outcome::Success)
            }
            ChunkOp::Zero { offset, len } => {
                if let Some(chunk) = self.chunks.get_mut(&key) {
                    chunk.blocks.retain(|&at, _| at < offset || at >= offset + len);
                }
                only(Outcome::Success)
            }
            ChunkOp::Info => (Outcome::Success, ReplyData::Versions(known.into_iter().collect())),
            ChunkOp::Hash { offset, len } => {
                let hash = self.chunks.get(&key).map(|chunk| {
                    (offset..offset + len).step_by(4096).fold(0, |crc, at| {
                        let zeros = vec![0; 4096];
                        crc32c::crc32c_append(crc, chunk.blocks.get(&at).unwrap_or(&zeros))
                    })
                });
                (Outcome::Success, ReplyData::Hash(hash))
            }
        }
    }

    /// What the services make of one incoming thing, without asking any shard.
    pub(crate) fn begin(&self, incoming: Incoming) -> Handled {
        handle(&self.ctx, self.now, incoming)
    }

    /// Ask the shard until there is an answer.
    pub(crate) fn finish(&mut self, mut handled: Handled, connection: &mut Connection) -> Out {
        loop {
            handled = match handled {
                Handled::Reply(out) => return out,
                Handled::Shard { copyset, op, charge, pending } => {
                    connection.charge(charge);
                    self.answer(copyset, op, pending)
                }
                Handled::AllShards { op, pending } => {
                    let reply = self.ask(CopysetId(0), RequestOp::Admin(op));
                    resume_all(&self.ctx, self.now, pending, vec![reply])
                }
            };
        }
    }

    fn answer(&mut self, copyset: CopysetId, op: RequestOp, pending: Pending) -> Handled {
        let reply = self.ask(copyset, op);
        resume(&self.ctx, self.now, pending, reply)
    }

    /// Receive, serve, send: everything `bytes` asks for, and the bytes that answer it.
    pub(crate) fn serve(&mut self, connection: &mut Connection, mut bytes: &[u8]) -> Vec<u8> {
        let mut sent = Vec::new();
        loop {
            let mut incoming = Vec::new();
            let progress = connection.received(&mut bytes, &self.arena, &mut incoming).unwrap();
            for one in incoming {
                let handled = self.begin(one);
                let out = self.finish(handled, connection);
                connection.push_reply(out);
            }
            loop {
                let bufs = connection.take_send(16);
                if bufs.is_empty() {
                    break;
                }
                bufs.iter().for_each(|buf| sent.extend_from_slice(buf));
                connection.sent();
            }
            match progress {
                Progress::Consumed => return sent,
                Progress::NoBuffer => panic!("the arena is empty"),
                Progress::Later if connection.is_finished() => return sent,
                Progress::Later | Progress::More => {}
            }
        }
    }
}
