//! Counters of a shard, cheap to write and readable from any thread.
//!
//! Invariant: each [`ShardMetrics`] has one writer, the thread of its shard. So a count is a relaxed load and a relaxed
//! store, no locked instruction; a reader may see a value that is one step old, never a torn one. Rates are made by the
//! writer, once a second ([`ShardMetrics::tick`]), as bvar's sampler would.

pub mod process;
pub mod recorder;
pub mod text;

pub use process::ProcessStats;
pub use recorder::{Recorder, Summary};

use crate::io::Instant;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Add to a counter this thread alone writes.
#[inline]
fn bump(cell: &AtomicU64, by: u64) {
    cell.store(cell.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
}
#[inline]
fn get(cell: &AtomicU64) -> u64 {
    cell.load(Ordering::Relaxed)
}

/// Operations with a full set of measurements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpKind {
    /// ReadChunk.
    Read,
    /// WriteChunk.
    Write,
    /// DeleteChunk.
    Delete,
    /// The private Zero.
    Zero,
}

impl OpKind {
    /// All, in the order of [`ShardMetrics`].
    pub const ALL: [Self; 4] = [Self::Read, Self::Write, Self::Delete, Self::Zero];

    /// Part of the variable's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Delete => "delete",
            Self::Zero => "zero",
        }
    }
}

/// Measurements of one kind of operation, named as Curve's IO metrics.
#[derive(Debug, Default)]
pub struct OpMetrics {
    requests: AtomicU64,
    done: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    /// Latency of successes, ns.
    pub latency: Recorder,
    /// Size of successes, bytes.
    pub size: Recorder,
    /// Counts at the last tick and the per-second rates made there: requests, done, bytes, errors.
    last: [AtomicU64; 4],
    rates: [AtomicU64; 4],
}

/// Sums over shards of [`OpMetrics`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpTotals {
    /// Requests received.
    pub requests: u64,
    /// Successes.
    pub done: u64,
    /// Bytes of successes.
    pub bytes: u64,
    /// Failures.
    pub errors: u64,
    /// Per second, over the last second: the four above in order.
    pub rates: [u64; 4],
}

impl OpMetrics {
    /// A request arrived.
    pub fn arrived(&self) {
        bump(&self.requests, 1);
    }
    /// It was done: `bytes` moved in `ns`.
    pub fn succeeded(&self, bytes: u64, ns: u64) {
        bump(&self.done, 1);
        bump(&self.bytes, bytes);
        self.latency.record(ns);
        self.size.record(bytes);
    }
    /// It failed.
    pub fn failed(&self) {
        bump(&self.errors, 1);
    }
    fn counts(&self) -> [u64; 4] {
        [get(&self.requests), get(&self.done), get(&self.bytes), get(&self.errors)]
    }
    fn tick(&self, elapsed_ns: u64) {
        for ((now, last), rate) in self.counts().into_iter().zip(&self.last).zip(&self.rates) {
            let delta = now.wrapping_sub(get(last));
            let per_second = u128::from(delta) * 1_000_000_000 / u128::from(elapsed_ns.max(1));
            rate.store(u64::try_from(per_second).unwrap_or(u64::MAX), Ordering::Relaxed);
            last.store(now, Ordering::Relaxed);
        }
    }
    fn add_to(&self, total: &mut OpTotals) {
        let [requests, done, bytes, errors] = self.counts();
        total.requests += requests;
        total.done += done;
        total.bytes += bytes;
        total.errors += errors;
        for (sum, rate) in total.rates.iter_mut().zip(&self.rates) {
            *sum += get(rate);
        }
    }
}

/// Measurements of one RPC method, as brpc keeps them.
#[derive(Debug, Default)]
pub struct MethodMetrics {
    errors: AtomicU64,
    concurrency: AtomicU64,
    /// Latency of calls without an RPC error, ns.
    pub latency: Recorder,
}

impl MethodMetrics {
    /// A call of the method begins.
    pub fn begin(&self) {
        bump(&self.concurrency, 1);
    }
    /// It ends; `ok` unless it was answered with an RPC error code.
    pub fn end(&self, ok: bool, ns: u64) {
        bump(&self.concurrency, u64::MAX);
        if ok {
            self.latency.record(ns);
        } else {
            bump(&self.errors, 1);
        }
    }
    /// RPC errors.
    #[must_use]
    pub fn errors(&self) -> u64 {
        get(&self.errors)
    }
    /// Calls being served.
    #[must_use]
    pub fn concurrency(&self) -> u64 {
        get(&self.concurrency)
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// Plain counters and gauges of a shard.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(usize)]
        pub enum Counter { $($(#[$doc])* $variant,)* }
        impl Counter {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];
            /// The variable's name after the server's prefix.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }
    };
}

counters! {
    /// Log writes submitted (one per batch).
    LogWrites = "log_write_num",
    /// Bytes of log writes.
    LogBytes = "log_write_bytes",
    /// Writes of chunk data to slots.
    DataWrites = "device_data_write_num",
    /// Bytes of them.
    DataWriteBytes = "device_data_write_bytes",
    /// Reads of chunk data from slots.
    DataReads = "device_data_read_num",
    /// Bytes of them.
    DataReadBytes = "device_data_read_bytes",
    /// Writes of metapages.
    MetaWrites = "device_meta_write_num",
    /// Bytes of them.
    MetaWriteBytes = "device_meta_write_bytes",
    /// Writes of CRC pages.
    CrcWrites = "device_crc_write_num",
    /// Bytes of them.
    CrcWriteBytes = "device_crc_write_bytes",
    /// fdatasync calls.
    Syncs = "device_sync_num",
    /// Write-back rounds finished.
    Rounds = "write_back_round_num",
    /// io_uring_enter system calls.
    Enters = "io_uring_enter_total",
    /// Turns of the reactor.
    Turns = "reactor_turn_total",
    /// Open RPC connections (a gauge).
    Connections = "connection_count",
    /// RPC connections accepted.
    Accepted = "connection_accepted_num",
    /// Connections closed because of what the peer sent.
    ClosedByUs = "connection_refused_num",
    /// Bytes received.
    BytesIn = "net_in_bytes",
    /// Bytes sent.
    BytesOut = "net_out_bytes",
    /// Times a connection had to wait for a payload buffer.
    BufferStalls = "buffer_stall_num",
    /// Times a connection was not read because of its own budget.
    BudgetStalls = "budget_stall_num",
    /// Requests that took a mailbox hop.
    Hops = "mailbox_hop_num",
    /// OVERLOAD answers.
    Overloads = "overload_num",
    /// Blocks whose checksum was wrong.
    Rot = "rot_block_num",
    /// Device errors.
    DeviceErrors = "device_error_num",
    /// RPC errors that belong to no method (brpc's `error`).
    NonService = "non_service_error_num",
    /// NBD requests.
    NbdRequests = "nbd_request_num",
    /// NEBD requests, signs of life apart.
    NebdRequests = "nebd_request_num",
    /// NEBD requests whose I/O failed and that were left unanswered.
    NebdParked = "nebd_parked_num",
    /// HTTP requests.
    HttpRequests = "http_request_num",
    /// Connections to peers that are up (a gauge).
    PeerLinks = "peer_link_count",
    /// Peers of which not every connection is up, per shard that calls them (a gauge).
    PeersDown = "peer_down_count",
    /// Attempts to connect to a peer.
    PeerDials = "peer_dial_num",
    /// Handshakes with peers that failed, on either side.
    PeerHandshakesFailed = "peer_handshake_failed_num",
    /// Messages for peers.
    PeerMailOut = "peer_mail_out_num",
    /// Of these, thrown away: no connection, or its queue was full.
    PeerMailLost = "peer_mail_lost_num",
    /// Messages of peers.
    PeerMailIn = "peer_mail_in_num",
    /// Messages of peers that were dropped: bad checksums, not understood, another shard's.
    PeerBad = "peer_mail_bad_num",
    /// Messages of other replicas that were refused: of another copyset or replica, malformed, or with a wrong checksum.
    PeerRefused = "peer_refused_num",
    /// Appends of other replicas that had to wait for memory or log space.
    PeerHeld = "peer_append_held_num",
    /// Appends of other replicas cut short because no slot was free.
    PeerNoSpace = "peer_append_nospace_num",
    /// Operations of volumes sent to other servers.
    RemoteSent = "remote_request_num",
    /// Of these, ended without their server's answer; they are sent again.
    RemoteLost = "remote_request_lost_num",
    /// Operations of volumes that wait for another server, and questions for a leader (a gauge).
    RemoteWaiting = "remote_request_count",
    /// Questions for the leader of a copyset.
    LeaderLooks = "leader_lookup_num",
    /// Rotten blocks replaced by those of another replica.
    MendedBlocks = "mended_blocks_num",
    /// Chunks in doubt taken over from another replica.
    MendedChunks = "mended_chunks_num",
    /// Chunk data sent to replicas that are fed chunks.
    SnapshotBytesOut = "raft_snapshot_sent_bytes",
    /// Chunk data taken in by replicas here that are fed chunks.
    SnapshotBytesIn = "raft_snapshot_taken_bytes",
    /// Leaderships handed over because the own disk was slow.
    LeadersLeft = "leaders_left_slow_disk_num",
    /// Shards whose log writes have been slow for a while (a gauge).
    SlowDisk = "slow_disk",
}

/// RPC methods measured; the service's table must not be longer.
pub const METHODS_MAX: usize = 64;

/// Everything one shard counts.
#[derive(Debug)]
pub struct ShardMetrics {
    ops: [OpMetrics; 4],
    methods: Vec<MethodMetrics>,
    counters: Vec<AtomicU64>,
    ticked_at: AtomicU64,
    rotated_at: AtomicU64,
}

impl Default for ShardMetrics {
    fn default() -> Self {
        Self {
            ops: Default::default(),
            methods: (0..METHODS_MAX).map(|_| MethodMetrics::default()).collect(),
            counters: Counter::ALL.iter().map(|_| AtomicU64::new(0)).collect(),
            ticked_at: AtomicU64::new(0),
            rotated_at: AtomicU64::new(0),
        }
    }
}

const SECOND_NS: u64 = 1_000_000_000;
/// Window of latency recorders, as bvar's `bvar_dump_interval`.
const WINDOW_NS: u64 = 10 * SECOND_NS;

impl ShardMetrics {
    /// Count. Gauges go down with [`Self::sub`].
    #[inline]
    pub fn add(&self, counter: Counter, by: u64) {
        bump(&self.counters[counter as usize], by);
    }
    /// Lower a gauge.
    #[inline]
    pub fn sub(&self, counter: Counter, by: u64) {
        bump(&self.counters[counter as usize], by.wrapping_neg());
    }
    /// Take over a count that is kept elsewhere.
    pub fn set(&self, counter: Counter, value: u64) {
        self.counters[counter as usize].store(value, Ordering::Relaxed);
    }
    /// Current value.
    #[must_use]
    pub fn value(&self, counter: Counter) -> u64 {
        get(&self.counters[counter as usize])
    }
    /// Measurements of one kind of operation.
    #[must_use]
    pub fn op(&self, kind: OpKind) -> &OpMetrics {
        &self.ops[kind as usize]
    }
    /// Measurements of the method at this place of the service's table.
    #[must_use]
    pub fn method(&self, index: usize) -> &MethodMetrics {
        &self.methods[index]
    }
    /// Make the rates. For the writer, as often as it likes: it does something once a second.
    pub fn tick(&self, now: Instant) {
        let elapsed = now.0.saturating_sub(get(&self.ticked_at));
        if elapsed < SECOND_NS {
            return;
        }
        self.ticked_at.store(now.0, Ordering::Relaxed);
        self.ops.iter().for_each(|op| op.tick(elapsed));
        if now.0.saturating_sub(get(&self.rotated_at)) >= WINDOW_NS {
            self.rotated_at.store(now.0, Ordering::Relaxed);
            let recorders = self.ops.iter().flat_map(|op| [&op.latency, &op.size]);
            recorders.chain(self.methods.iter().map(|m| &m.latency)).for_each(|recorder| recorder.rotate(now));
        }
    }
}

/// The metrics of all shards.
#[derive(Clone, Debug, Default)]
pub struct Registry {
    shards: Arc<[Arc<ShardMetrics>]>,
}

impl Registry {
    /// For `shards` shards.
    #[must_use]
    pub fn new(shards: usize) -> Self {
        Self { shards: (0..shards).map(|_| Arc::default()).collect() }
    }
    /// The metrics of one shard; its thread is the one to write them.
    #[must_use]
    pub fn shard(&self, shard: usize) -> Option<&Arc<ShardMetrics>> {
        self.shards.get(shard)
    }
    /// Number of shards.
    #[must_use]
    pub fn shards(&self) -> usize {
        self.shards.len()
    }
    /// Sum over all shards.
    #[must_use]
    pub fn total(&self, counter: Counter) -> u64 {
        self.shards.iter().fold(0, |sum, shard| sum.wrapping_add(shard.value(counter)))
    }
    /// Sums over all shards.
    #[must_use]
    pub fn op(&self, kind: OpKind) -> OpTotals {
        let mut total = OpTotals::default();
        self.shards.iter().for_each(|shard| shard.op(kind).add_to(&mut total));
        total
    }
    /// A recorder of every shard, merged.
    #[must_use]
    pub fn summary<'a>(&'a self, pick: impl Fn(&'a ShardMetrics) -> &'a Recorder, now: Instant) -> Summary {
        Summary::of(self.shards.iter().map(|shard| pick(shard)), now)
    }
    /// RPC errors and calls being served of one method.
    #[must_use]
    pub fn method(&self, index: usize) -> (u64, u64) {
        self.shards.iter().map(|shard| shard.method(index)).fold((0, 0), |(errors, running), method| {
            (errors.wrapping_add(method.errors()), running.wrapping_add(method.concurrency()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_per_second_and_sum_over_shards() {
        let registry = Registry::new(2);
        for shard in 0..2 {
            let metrics = registry.shard(shard).unwrap();
            metrics.tick(Instant(SECOND_NS));
            for _ in 0..100 {
                metrics.op(OpKind::Write).arrived();
                metrics.op(OpKind::Write).succeeded(4096, 50_000);
            }
            metrics.op(OpKind::Write).failed();
            metrics.tick(Instant(3 * SECOND_NS));
        }
        let total = registry.op(OpKind::Write);
        assert_eq!((total.requests, total.done, total.bytes, total.errors), (200, 200, 200 * 4096, 2));
        assert_eq!(total.rates, [100, 100, 100 * 4096, 0]);
        let latency = registry.summary(|shard| &shard.op(OpKind::Write).latency, Instant(4 * SECOND_NS));
        assert_eq!((latency.count, latency.max), (200, 50_000));
    }

    #[test]
    fn gauges_go_down() {
        let metrics = ShardMetrics::default();
        metrics.add(Counter::Connections, 3);
        metrics.sub(Counter::Connections, 2);
        assert_eq!(metrics.value(Counter::Connections), 1);
        metrics.method(0).begin();
        metrics.method(0).end(true, 5);
        assert_eq!(metrics.method(0).concurrency(), 0);
    }
}
