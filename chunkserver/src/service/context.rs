//! What services know beside the call: the server's identity, its state, and what all its shards share.
//!
//! [`Shared`] is read and written by every shard and the control thread: atomics, and one lock that only `UpdateEpoch`
//! takes. [`Context`] is one shard's view of it.

use super::fence::{Fences, View};
use crate::io::Instant;
use crate::metrics::{ProcessStats, Registry, ShardMetrics, process::Reader};
use bytes::{Bytes, BytesMut};
use copyset::PeerId;
use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Who this server is; does not change while it runs.
#[derive(Clone, Debug)]
pub struct Info {
    /// This node as a raft peer: internal address, index 0.
    pub peer: PeerId,
    /// Chunk size of the disk, bytes.
    pub chunk_size: u32,
    /// Chunk requests in flight above which OVERLOAD is answered.
    pub max_inflight: usize,
    /// Version of the program.
    pub version: String,
    /// Configuration: Curve's keys and values, shown as `config_*` variables and by `/flags`.
    pub config: Vec<(String, String)>,
    /// How the pages learn about the process.
    pub process: Reader,
}

impl Info {
    /// `ip:port`.
    #[must_use]
    pub fn address(&self) -> String {
        format!("{}:{}", self.peer.ip(), self.peer.port())
    }
}

/// One shard's count, on a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Slot(AtomicUsize);

/// What all shards of a server share.
#[derive(Debug)]
pub struct Shared {
    info: Info,
    registry: Registry,
    fences: Fences,
    draining: AtomicBool,
    quiet: AtomicUsize,
    loaded: AtomicBool,
    inflight: Box<[Slot]>,
    cpu: Mutex<(Instant, ProcessStats)>,
}

impl Shared {
    /// For a server with this many shards.
    #[must_use]
    pub fn new(info: Info, shards: usize) -> Arc<Self> {
        Arc::new(Self {
            info,
            registry: Registry::new(shards),
            fences: Fences::default(),
            draining: AtomicBool::new(false),
            quiet: AtomicUsize::new(0),
            loaded: AtomicBool::new(false),
            inflight: (0..shards).map(|_| Slot::default()).collect(),
            cpu: Mutex::default(),
        })
    }
    /// Who this server is.
    #[must_use]
    pub fn info(&self) -> &Info {
        &self.info
    }
    /// Counters of all shards.
    #[must_use]
    pub fn registry(&self) -> &Registry {
        &self.registry
    }
    /// Volume fences.
    #[must_use]
    pub fn fences(&self) -> &Fences {
        &self.fences
    }
    /// From now on every call is answered with ELOGOFF and its connection closed.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Release);
    }
    /// The server is stopping.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }
    /// A draining shard owes no answers any more (or has run out of patience).
    pub fn shard_quiet(&self) {
        self.quiet.fetch_add(1, Ordering::AcqRel);
    }
    /// All shards are quiet.
    #[must_use]
    pub fn all_quiet(&self) -> bool {
        self.quiet.load(Ordering::Acquire) >= self.inflight.len()
    }
    /// Every local copyset has finished loading: copysets may be created, `copysetLoadFin` is true.
    pub fn set_loaded(&self) {
        self.loaded.store(true, Ordering::Release);
    }
    /// Every local copyset has finished loading.
    #[must_use]
    pub fn is_loaded(&self) -> bool {
        self.loaded.load(Ordering::Acquire)
    }
    /// Chunk requests in flight.
    #[must_use]
    pub fn inflight(&self) -> usize {
        self.inflight.iter().map(|slot| slot.0.load(Ordering::Relaxed)).sum()
    }

    /// A reading of the process, and the cores used (user, system) since the last one.
    pub(super) fn process(&self, now: Instant) -> (ProcessStats, f64, f64) {
        let stats = (self.info.process)();
        let mut last = self.cpu.lock().unwrap_or_else(PoisonError::into_inner);
        let us = (now.since_ns(last.0) / 1000).max(1) as f64;
        let user = stats.user_us.saturating_sub(last.1.user_us) as f64 / us;
        let system = stats.system_us.saturating_sub(last.1.system_us) as f64 / us;
        *last = (now, stats);
        (stats, user, system)
    }
}

/// Replies are cut from buffers of this size.
const SCRATCH: usize = 16 * 1024;

/// A shard's view.
#[derive(Debug)]
pub struct Context {
    shared: Arc<Shared>,
    shard: usize,
    metrics: Arc<ShardMetrics>,
    fences: View,
    scratch: RefCell<BytesMut>,
}

impl Context {
    /// Of this shard.
    ///
    /// # Panics
    /// If `shared` was made for fewer shards.
    #[must_use]
    pub fn new(shared: Arc<Shared>, shard: usize) -> Self {
        let metrics = shared.registry.shard(shard).map(Arc::clone).expect("a shard beyond those the server has");
        let fences = View::default();
        Self { shared, shard, metrics, fences, scratch: RefCell::default() }
    }
    /// What all shards share.
    #[must_use]
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
    /// Who this server is.
    #[must_use]
    pub fn info(&self) -> &Info {
        &self.shared.info
    }
    /// This shard's counters.
    #[must_use]
    pub fn metrics(&self) -> &ShardMetrics {
        &self.metrics
    }
    /// The server is stopping.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.shared.draining.load(Ordering::Acquire)
    }
    /// Copysets are loaded.
    #[must_use]
    pub fn is_loaded(&self) -> bool {
        self.shared.loaded.load(Ordering::Acquire)
    }

    /// May a write with this epoch to this volume go on?
    pub(super) fn fence_passes(&self, file: u64, epoch: u64) -> bool {
        self.fences.passes(&self.shared.fences, file, epoch)
    }

    fn slot(&self) -> &AtomicUsize {
        &self.shared.inflight[self.shard].0
    }

    /// Count a chunk request; false if there are too many now (it is counted all the same, until [`Self::leave`]).
    ///
    /// The counts of the other shards are looked at only when this one has more than its share: a sum above the limit
    /// implies such a shard, so OVERLOAD is never answered below the limit, and the excess above it is less than once
    /// the limit.
    pub(super) fn enter(&self) -> bool {
        let own = self.slot().load(Ordering::Relaxed) + 1;
        self.slot().store(own, Ordering::Relaxed);
        let max = self.shared.info.max_inflight;
        own * self.shared.inflight.len() <= max || self.shared.inflight() <= max
    }

    /// A chunk request was answered.
    pub(super) fn leave(&self) {
        let own = self.slot().load(Ordering::Relaxed);
        assert!(own > 0, "a chunk request was answered twice");
        self.slot().store(own - 1, Ordering::Relaxed);
    }

    /// Bytes written by `put`, cut from a larger buffer: no allocation per reply.
    pub(super) fn encode(&self, put: impl FnOnce(&mut BytesMut)) -> Bytes {
        let mut scratch = self.scratch.borrow_mut();
        if scratch.capacity() < SCRATCH / 8 {
            scratch.reserve(SCRATCH);
        }
        put(&mut scratch);
        scratch.split().freeze()
    }
}
