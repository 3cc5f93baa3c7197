//! What a shard is asked and what it answers: plain values that can cross a mailbox.

use bytes::Bytes;
use raftlog::CopysetId;
use smallvec::SmallVec;

/// Where a reply goes; opaque to the shard. The reactor that made it resolves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Origin {
    /// Shard that asked (its reactor routes the reply); `u16::MAX` = the control thread.
    pub shard: u16,
    /// Slot of the asker's table of requests in flight.
    pub slot: u32,
    /// Guards against a reply to a slot that was reused.
    pub serial: u32,
}

/// One CRC32C per 4 KiB block of a payload.
pub type BlockCrcs = SmallVec<[u32; 4]>;

/// An operation on one chunk. Offsets and lengths are bytes inside the chunk.
#[derive(Clone, Debug)]
pub enum ChunkOp {
    /// Store `payload` (whole blocks, 4 KiB aligned memory) at `offset`.
    Write {
        /// Version of the volume.
        sn: u64,
        /// Byte offset.
        offset: u32,
        /// Data.
        payload: Bytes,
        /// CRC32C of each block of `payload`, computed when it entered.
        crcs: BlockCrcs,
    },
    /// Read `len` bytes at `offset`.
    Read {
        /// Byte offset.
        offset: u32,
        /// Length.
        len: u32,
    },
    /// Remove the chunk.
    Delete {
        /// Version guard.
        sn: u64,
    },
    /// Make blocks read as zero again; an absent chunk stays absent.
    Zero {
        /// Byte offset.
        offset: u32,
        /// Length.
        len: u32,
    },
    /// Versions of the chunk.
    Info,
    /// CRC32C over a range of the data.
    Hash {
        /// Byte offset.
        offset: u32,
        /// Length.
        len: u32,
    },
}

/// What copysets are asked apart from chunk operations.
#[derive(Clone, Debug)]
pub enum AdminOp {
    /// Create a copyset with these voters (`ip:port:idx` as [`copyset`]'s peer ids); empty = passive.
    CreateCopyset {
        /// Voters.
        peers: Vec<u64>,
    },
    /// State of one copyset.
    CopysetStatus,
    /// State of all copysets of this shard.
    ListCopysets,
    /// Destroy a copyset: into the trash, and if it is there out of it; its chunks are free then.
    DeleteCopyset,
    /// What is in the trash of this shard.
    ListTrash,
    /// Take a copyset out of the trash.
    RestoreCopyset,
    /// Counters that only the shard knows (pool, log, dirty data).
    ShardStatus,
    /// Change who is in a copyset, or who leads it; asked of the leader.
    Members(MemberOp),
    /// Make the copyset's applied state durable outside the log.
    Checkpoint,
    /// The same for all copysets of this shard.
    CheckpointAll,
}

/// A change of a copyset's members or leader. Peers as [`copyset::PeerId`] packs them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemberOp {
    /// One voter more.
    Add(u64),
    /// One less.
    Remove(u64),
    /// These voters, whoever they were before.
    Set(Vec<u64>),
    /// Hand leadership over; 0 = to whoever is furthest. Answered when it has begun.
    Transfer(u64),
    /// Force the replica that is asked to be the only voter, leader or not; no other list is taken. Answered when that is
    /// durable.
    Reset(Vec<u64>),
}

/// What makes a change harmless that its sender may send again, having lost sight of it (rule 30).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Guard {
    /// Life of the sender: a number drawn at its start.
    pub client: u64,
    /// The change, among the sender's.
    pub id: u64,
    /// How often it was sent before without an answer. Once a later attempt came, earlier ones are not done any more.
    pub attempt: u32,
    /// Term in which the addressee led when it was sent, 0 if not known: it is done in no other.
    pub term: u64,
}

/// An operation.
#[derive(Clone, Debug)]
pub enum RequestOp {
    /// On a chunk.
    Chunk {
        /// Chunk id.
        chunk: u64,
        /// What.
        op: ChunkOp,
    },
    /// The same, if it is not outdated.
    Guarded {
        /// When it is.
        guard: Guard,
        /// Chunk id.
        chunk: u64,
        /// What.
        op: ChunkOp,
    },
    /// On a copyset or the shard.
    Admin(AdminOp),
}

/// A request to a shard.
#[derive(Clone, Debug)]
pub struct Request {
    /// Copyset; ignored by shard-wide operations.
    pub copyset: CopysetId,
    /// What.
    pub op: RequestOp,
    /// Where the reply goes.
    pub origin: Origin,
}

/// Outcome of a request. The service maps it to the wire's status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Done.
    Success,
    /// This node does not lead the copyset (now).
    NotLeader,
    /// The device failed this request.
    DiskFail,
    /// A block's checksum is wrong: the data is not handed out.
    CrcFail,
    /// Unaligned or out of range.
    Invalid,
    /// No free slot.
    NoSpace,
    /// Unknown copyset.
    NoCopyset,
    /// Absent chunk.
    NoChunk,
    /// Anything else; not done.
    Failed,
    /// Too many requests in flight.
    Overload,
    /// Older version than the chunk's.
    Backward,
    /// It exists already.
    Exists,
    /// Another change of members or leader is under way.
    Busy,
    /// A new member did not catch up.
    CatchUp,
    /// The shard is shutting down or its disk is gone.
    Stopping,
}

/// State of one copyset, as `GetCopysetStatus` and `copyset status` show it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CopysetStatus {
    /// Group id.
    pub id: u64,
    /// 1 leader, 3 candidate, 4 follower, 5 out of service (its log is damaged), 6 uninitialised (passive).
    pub state: u32,
    /// This node, 0 if not a member.
    pub peer: u64,
    /// Leader, 0 if unknown.
    pub leader: u64,
    /// Voters.
    pub peers: Vec<u64>,
    /// It leads, and a change of members or of the leader is under way.
    pub changing: bool,
    /// Raft term.
    pub term: u64,
    /// Committed index.
    pub committed: u64,
    /// Applied index.
    pub applied: u64,
    /// First index in the log.
    pub first: u64,
    /// Last index in the log.
    pub last: u64,
    /// Last durable index.
    pub durable: u64,
    /// ConfEpoch.
    pub epoch: u64,
    /// Chunks of this copyset.
    pub chunks: u64,
}

/// Another server that a shard has mail for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerView {
    /// Who.
    pub peer: u64,
    /// Connections to its shards that are up.
    pub up: u64,
    /// Connections there should be.
    pub links: u64,
    /// Round trip of the connection for votes and heartbeats, nanoseconds; 0 if not known.
    pub rtt_ns: u64,
    /// Why one of them is not up.
    pub why: Option<String>,
}

/// What only the shard knows of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ShardStatus {
    /// Shard number.
    pub shard: u16,
    /// Copysets.
    pub copysets: u64,
    /// Of them led here.
    pub leaders: u64,
    /// Chunks, without those in the trash.
    pub chunks: u64,
    /// Chunks of deleted copysets that are kept for a while.
    pub trashed: u64,
    /// Free slots this shard holds in reserve.
    pub slots_free: u64,
    /// Free slots of the disk that no shard holds; the same number from every shard.
    pub slots_unclaimed: u64,
    /// Bytes of payload pinned by blocks not yet on their slots.
    pub dirty_bytes: u64,
    /// Bytes of log in use.
    pub log_used_bytes: u64,
    /// Bytes of log.
    pub log_bytes: u64,
    /// Buffer bytes free.
    pub buffers_free_bytes: u64,
    /// Set when the disk is out of service.
    pub failed: Option<String>,
    /// Its peers; the reactor knows them.
    pub peers: Vec<PeerView>,
}

/// What a reply carries besides its outcome.
#[derive(Clone, Debug, Default)]
pub enum ReplyData {
    /// Nothing.
    #[default]
    None,
    /// Data of a read, in order; total length = the length asked.
    Data(SmallVec<[Bytes; 2]>),
    /// Versions: `[sn]`, or empty for an absent chunk.
    Versions(SmallVec<[u64; 2]>),
    /// CRC32C of a hash request; `None` for an absent chunk.
    Hash(Option<u32>),
    /// Copyset states.
    Copysets(Vec<CopysetStatus>),
    /// Shard state.
    Shard(Box<ShardStatus>),
    /// Who leads, with [`Outcome::NotLeader`]; 0 if unknown.
    Leader(u64),
    /// Voters before and after a change.
    Members {
        /// Before.
        old: Vec<u64>,
        /// After.
        new: Vec<u64>,
    },
}

/// Answer to a [`Request`]; every request gets exactly one.
#[derive(Clone, Debug)]
pub struct Reply {
    /// Copied from the request.
    pub origin: Origin,
    /// Outcome.
    pub outcome: Outcome,
    /// Applied index of the copyset when the request was applied or read (0 when it never got that far).
    pub applied_index: u64,
    /// Payload.
    pub data: ReplyData,
}
