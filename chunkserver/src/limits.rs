//! Every maximum of the server, in one place, and how they relate (checked when it is compiled).
//!
//! Promise: nothing on the data path grows beyond a number that stands here or in the configuration these are the
//! defaults of. Add a limit here before adding a container that could grow.

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

/// Unit of chunk offsets and lengths on the wire and on disk, bytes.
pub const BLOCK: usize = 4096;
/// Largest chunk a disk may be formatted with, bytes.
pub const CHUNK_BYTES_MAX: usize = 16 * MIB;

/// Largest body of an RPC frame (meta + message + attachment); the connection is closed above it, as brpc does.
pub const FRAME_BYTES_MAX: usize = 64 * MIB;
/// Attachment of a method that takes none: up to this it is skipped silently (as brpc does), above it the call is
/// refused. Neither way holds memory.
pub const IGNORED_ATTACHMENT_BYTES_MAX: usize = 64 * KIB;
/// From this many missing payload bytes on, the kernel receives straight into the payload buffer.
pub const DIRECT_RECV_BYTES_MIN: usize = 64 * KIB;
/// Open RPC connections per process; more are accepted and closed at once.
pub const CONNECTIONS_MAX: usize = 32_768;
/// Payload bytes pinned by one connection's unanswered requests, plus bytes of its replies not yet sent. Above it the
/// connection is not read. One request is always let in, so the largest write passes.
pub const CONNECTION_BYTES_MAX: usize = 32 * MIB;
/// Unanswered requests of one connection; above it the connection is not read. Larger than [`INFLIGHT_REQUESTS_MAX`],
/// so that a single connection can see OVERLOAD where a C++ server would answer it.
pub const CONNECTION_REQUESTS_MAX: usize = 8192;
/// What a request without payload counts against [`CONNECTION_BYTES_MAX`].
pub const REQUEST_OVERHEAD_BYTES: usize = 512;
/// Chunk requests in flight in the process (default of `max_inflight_requests`); OVERLOAD above it.
pub const INFLIGHT_REQUESTS_MAX: usize = 5000;
/// Known volume fences (`UpdateEpoch`); above it an update of an unknown volume is refused.
pub const FENCES_MAX: usize = 65_536;

/// Request line and headers of an HTTP request.
pub const HTTP_HEAD_BYTES_MAX: usize = 8 * KIB;
/// Body of an HTTP request; it is skipped, never kept.
pub const HTTP_BODY_BYTES_MAX: usize = 64 * KIB;

/// Requests (and, on their way back, replies) one shard may have in flight at another.
pub const MAILBOX_DEPTH: usize = 4096;
/// Largest NBD read or write.
pub const NBD_REQUEST_BYTES_MAX: usize = 32 * MIB;

/// Files that NEBD clients have open or on record.
pub const NEBD_FILES_MAX: usize = 16_384;
/// Longest name of such a file.
pub const NEBD_NAME_BYTES_MAX: usize = 4096;
/// Length of NEBD's metafile.
pub const NEBD_METAFILE_BYTES_MAX: usize = 4 * MIB;
/// NEBD clients that are remembered for the variables; beyond it the one that was silent longest is forgotten.
pub const NEBD_CLIENTS_MAX: usize = 4096;
/// Of a client's version this much is kept.
pub const NEBD_VERSION_BYTES_MAX: usize = 64;
/// Largest NEBD read, and largest write where a quarter of the payload arena is not less.
pub const NEBD_READ_BYTES_MAX: usize = NBD_REQUEST_BYTES_MAX;

/// Bytes queued for one peer's shard on its data connection; what finds no room is lost, and raft is told.
pub const PEER_DATA_BYTES_MAX: usize = 16 * MIB;
/// The same on the connection for votes and heartbeats.
pub const PEER_CONTROL_BYTES_MAX: usize = MIB;
/// The same while the first connection is being made.
pub const PEER_EARLY_BYTES_MAX: usize = 256 * KIB;
/// A frame to a peer ends with the message that brings its payloads to this, or its heads to that.
pub const PEER_FRAME_BYTES: usize = 4 * MIB;
/// See [`PEER_FRAME_BYTES`].
pub const PEER_FRAME_HEAD_BYTES: usize = 128 * KIB;
/// Longest context of a peer's message or head of its bulk data.
pub const PEER_HEAD_BYTES_MAX: usize = 64 * KIB;
/// Peers a shard sends to.
pub const PEERS_MAX: usize = 256;

/// Default size of a shard's payload arena.
pub const ARENA_BYTES: usize = 256 * MIB;
/// Default bound of payload bytes a shard keeps pinned for blocks not yet on their slots.
pub const DIRTY_BYTES_MAX: usize = 96 * MIB;
/// Payload bytes a shard may have between propose and apply.
pub const PROPOSED_BYTES_MAX: usize = 64 * MIB;
/// Device reads leave this much of a shard's work arena, but a quarter of it at most, for what frees memory: log headers
/// and metadata pages.
pub const READ_RESERVE_BYTES: usize = 8 * MIB;
/// Default size of a shard's log zone.
pub const LOG_BYTES: usize = 512 * MIB;
/// Size of a log segment; one of them is kept for HardState, Checkpoint and Purge (rule 9).
pub const LOG_SEGMENT_BYTES: usize = 32 * MIB;

/// What clients leave of a payload arena of this size to peers: two nodes full of clients' writes must not wait for each
/// other's appends (rule 14).
#[must_use]
pub const fn peer_reserve(arena: usize) -> usize {
    let share = arena / 8;
    if share < 2 * CHUNK_BYTES_MAX { share } else { 2 * CHUNK_BYTES_MAX }
}

/// Whether a client's payload of `len` bytes may come in: it leaves the peers' share, or nobody else uses the arena.
#[must_use]
pub const fn client_may_take(arena_free: usize, arena: usize, len: usize) -> bool {
    arena_free == arena || arena_free >= len + peer_reserve(arena)
}

/// The same for the payload of an answer to a call of our own. It may take some of what clients leave, or answers would wait
/// for the very writes that wait for them.
#[must_use]
pub const fn answer_may_take(arena_free: usize, arena: usize, len: usize) -> bool {
    arena_free == arena || arena_free >= len + peer_reserve(arena) / 2
}

const _: () = assert!(CHUNK_BYTES_MAX.is_multiple_of(BLOCK));
const _: () = assert!(CHUNK_BYTES_MAX < FRAME_BYTES_MAX, "a whole chunk fits into a frame");
const _: () = assert!(CHUNK_BYTES_MAX <= CONNECTION_BYTES_MAX, "a whole chunk fits into a connection's budget");
const _: () = assert!(
    PEER_FRAME_BYTES + 2 * CHUNK_BYTES_MAX + MIB <= FRAME_BYTES_MAX,
    "a frame that is almost full takes the largest message too"
);
const _: () = assert!(PEER_FRAME_BYTES <= PEER_DATA_BYTES_MAX && PEER_EARLY_BYTES_MAX <= PEER_CONTROL_BYTES_MAX);
const _: () = assert!(NBD_REQUEST_BYTES_MAX <= CONNECTION_BYTES_MAX);
const _: () = assert!(CONNECTION_REQUESTS_MAX > INFLIGHT_REQUESTS_MAX, "OVERLOAD stays reachable");
const _: () = assert!(CONNECTION_REQUESTS_MAX * REQUEST_OVERHEAD_BYTES < CONNECTION_BYTES_MAX);
const _: () = assert!(DIRECT_RECV_BYTES_MIN.is_multiple_of(BLOCK) && DIRECT_RECV_BYTES_MIN <= CHUNK_BYTES_MAX);
const _: () = assert!(
    DIRTY_BYTES_MAX + PROPOSED_BYTES_MAX + CONNECTION_BYTES_MAX + peer_reserve(ARENA_BYTES) <= ARENA_BYTES,
    "what waits for write-back, what is proposed and what is being received fit together, so each can make progress"
);
const _: () = assert!(
    DIRTY_BYTES_MAX + PROPOSED_BYTES_MAX + 2 * LOG_SEGMENT_BYTES <= LOG_BYTES,
    "rule 9: log size >= dirty limit + in flight + reserve"
);
