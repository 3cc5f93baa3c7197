//! Start-up: recover the log, load the chunk metadata, start the copysets. The same code runs after a clean stop, a
//! kill and a power cut.

use super::replay::Replay;
use super::{Arenas, Config, DISK, Effects, Failure, Group, Shard, State, Task, flush};
use crate::chunk::{self, ExtentPool, Layout, Loader, Store, StoreConfig};
use crate::io::buffer::PoolBuf;
use crate::io::{Errno, Instant, Op};
use crate::metrics::ShardMetrics;
use copyset::Copyset;
use raftlog::{CopysetId, Geometry, Index, Limits, ReadFailed, Recovery};
use slab::Slab;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

/// Start-up reads under way at once, of at most 1 MiB each: enough to keep a fast disk busy.
const READS_MAX: usize = 8;
/// Start-up reads that fail are tried again this often in all, this far apart: two seconds.
const RETRIES: u32 = 100;
const RETRY_MS: u64 = 20;

/// A read: offset on the disk and length.
type Read = (u64, usize);

/// Start-up reads to be performed later.
pub(super) struct Retry {
    reads: VecDeque<Read>,
    due: Instant,
    left: u32,
}

/// The log being read: recovery takes its pieces in order, the disk delivers several at a time.
pub(super) struct LogReader {
    recovery: Recovery,
    /// Where the log zone is on the disk.
    base: u64,
    under_way: BTreeSet<Read>,
    /// Ahead of their turn.
    arrived: BTreeMap<Read, Result<PoolBuf, Errno>>,
}

impl LogReader {
    fn next_read(&mut self) -> Option<Read> {
        let base = self.base;
        let mut ahead = self.recovery.reads_ahead().take(READS_MAX).map(|(offset, len)| (base + offset, len));
        let read = ahead.find(|read| !self.under_way.contains(read) && !self.arrived.contains_key(read))?;
        self.under_way.insert(read);
        Some(read)
    }

    fn feed(&mut self, read: Read, result: Result<PoolBuf, Errno>) {
        self.under_way.remove(&read);
        self.arrived.insert(read, result);
        while let Some((offset, len)) = self.recovery.next_read()
            && let Some(result) = self.arrived.remove(&(self.base + offset, len))
        {
            self.recovery.feed(result.as_deref().map_err(|_| ReadFailed));
        }
        // What turned out not to be needed holds no memory.
        let base = self.base;
        let ahead: BTreeSet<Read> =
            self.recovery.reads_ahead().take(READS_MAX).map(|(offset, len)| (base + offset, len)).collect();
        self.arrived.retain(|read, _| ahead.contains(read));
    }
}

/// How far start-up is.
pub(super) enum Boot {
    /// Before anything is believed, it must be durable: a killed process's last writes may sit in the drive's cache.
    Sync,
    Log {
        reader: Option<Box<LogReader>>,
        started: Instant,
    },
    Metadata {
        loader: Option<Box<Loader>>,
        started: Instant,
    },
    /// Other shards still read: no slot may be taken before all have said which are theirs.
    Others,
}

impl Shard {
    /// A shard that will recover from `layout`'s disk.
    ///
    /// # Errors
    /// When the disk's log geometry is impossible.
    pub fn new(
        config: Config,
        layout: Layout,
        arenas: Arenas,
        extents: Arc<ExtentPool>,
        metrics: Arc<ShardMetrics>,
        now: Instant,
    ) -> Result<Self, Failure> {
        let geometry = log_geometry(&layout, config.shard);
        let log = Recovery::blank(geometry, Limits::default()).map_err(|e| Failure::Recovery(e.to_string()))?;
        let log = Rc::new(RefCell::new(log));
        let store = Store::blank(&layout, config.shard, Arc::clone(&extents));
        Ok(Self {
            layout,
            arenas,
            log,
            store,
            groups: BTreeMap::new(),
            dirty: Vec::new(),
            unpersisted: Vec::new(),
            applying: Vec::new(),
            spare: Vec::new(),
            tasks: Slab::with_capacity(1024),
            waiting: Slab::with_capacity(1024),
            reads: Slab::with_capacity(256),
            read_queue: VecDeque::new(),
            early: Vec::new(),
            deferred: VecDeque::new(),
            guards: super::guard::Guards::default(),
            trash_at: now,
            in_flight_bytes: 0,
            proposed_cost: 0,
            admin: Vec::new(),
            peers: super::peers::Peers::default(),
            catch_up: super::catchup::CatchUp::default(),
            installs: super::install::Installs::default(),
            supply: super::supply::Supply::default(),
            throttle: super::throttle::Throttle::new(config.snapshot_rate),
            mends: super::mend::Mends::default(),
            suspects: super::suspects::Suspects::default(),
            members: super::members::Members::default(),
            renewals: super::renew::Renewals::default(),
            parked: Slab::new(),
            flush: flush::Flush::new(now),
            pace: super::pace::Pace::new(),
            slow: super::slow::Slow::default(),
            state: State::Boot(Boot::Sync),
            extents,
            replaying: Vec::new(),
            replay_over: false,
            lost: Vec::new(),
            forgetful: false,
            broken: Vec::new(),
            fetch_at: Instant::FAR,
            replay: Replay::default(),
            boot_retry: Retry { reads: VecDeque::new(), due: Instant::FAR, left: RETRIES },
            wedged: false,
            now,
            next_tick: now,
            even_tick: false,
            seal_at: Instant::FAR,
            incarnations: 0,
            starved: false,
            effects: Vec::new(),
            counted: chunk::Counters::default(),
            metrics,
            config,
        })
    }

    pub(super) fn boot_deadline(&self) -> Instant {
        match &self.state {
            // What they wait for happens in other shards, which ring no bell for it.
            State::Boot(Boot::Others | Boot::Metadata { .. }) if self.tasks.is_empty() => self.now.after_ms(1),
            _ => self.boot_retry.due,
        }
    }

    /// Ask for the next pieces, or go to the next stage.
    pub(super) fn boot_step(&mut self, out: &mut Effects) {
        while self.tasks.len() < READS_MAX {
            if matches!(self.state, State::Boot(Boot::Sync)) {
                if self.tasks.is_empty() {
                    self.submit(out, Task::BootSync, Op::Sync { file: DISK });
                }
                return;
            }
            let went_on = match self.boot_next_read() {
                Some(read) => self.boot_submit(read, out),
                None => self.tasks.is_empty() && self.boot_retry.reads.is_empty() && self.boot_advance(),
            };
            if !went_on {
                return;
            }
        }
    }

    fn boot_next_read(&mut self) -> Option<Read> {
        if !self.boot_retry.reads.is_empty() {
            return if self.now >= self.boot_retry.due { self.boot_retry.reads.pop_front() } else { None };
        }
        self.boot_retry.due = Instant::FAR;
        let State::Boot(boot) = &mut self.state else { return None };
        match boot {
            Boot::Log { reader: Some(reader), .. } => reader.next_read(),
            Boot::Metadata { loader: Some(loader), .. } => loader.next_read(),
            _ => None,
        }
    }

    /// False when there is no buffer: the read waits for one of those under way.
    fn boot_submit(&mut self, read: Read, out: &mut Effects) -> bool {
        let (offset, len) = read;
        let Some(mut buf) = self.arenas.work.alloc(len) else {
            self.boot_retry.reads.push_front(read);
            self.boot_retry.due = self.now;
            if self.tasks.is_empty() {
                self.fail(Failure::Load("no buffer for start-up reads: the work arena is too small".into()));
            }
            return false;
        };
        buf.truncate(len);
        self.submit(out, Task::BootRead(read), Op::Read { file: DISK, offset, buf });
        true
    }

    pub(super) fn boot_synced(&mut self) {
        let geometry = log_geometry(&self.layout, self.config.shard);
        let reader = LogReader {
            recovery: Recovery::new(geometry, Limits::default()),
            base: self.layout.log_offset_of(self.config.shard),
            under_way: BTreeSet::new(),
            arrived: BTreeMap::new(),
        };
        self.state = State::Boot(Boot::Log { reader: Some(Box::new(reader)), started: self.now });
    }

    pub(super) fn boot_read(&mut self, read: Read, buf: PoolBuf, result: Result<(), Errno>) {
        // An unreadable piece of the log may have held acknowledged writes: before it counts as lost, a passing error
        // gets time to pass. Reads that fail together are tried again together.
        if result.is_err() && self.boot_retry.left > 0 {
            if self.boot_retry.reads.is_empty() {
                self.boot_retry.left -= 1;
                self.boot_retry.due = self.now.after_ms(RETRY_MS);
            }
            self.boot_retry.reads.push_back(read);
            return;
        }
        let State::Boot(boot) = &mut self.state else { return };
        match boot {
            Boot::Log { reader: Some(reader), .. } => reader.feed(read, result.map(|()| buf)),
            Boot::Metadata { loader: Some(loader), .. } => {
                loader.feed(read, result.as_ref().map(|()| &*buf).map_err(|_| chunk::ReadFailed));
            }
            _ => {}
        }
    }

    /// A stage has read all it wants; false when it must wait, and when start-up is over or has failed.
    fn boot_advance(&mut self) -> bool {
        let State::Boot(boot) = &mut self.state else { return false };
        let result = match boot {
            Boot::Log { reader, started } => {
                let (reader, started) = (reader.take(), *started);
                reader.map_or(Ok(()), |reader| self.log_recovered(reader.recovery, started))
            }
            Boot::Metadata { loader, started } => {
                let (complete, started) = (loader.take_if(|loader| loader.is_complete()), *started);
                match complete {
                    Some(loader) => self.metadata_loaded(*loader, started),
                    None => return false, // other shards still read pieces of the zone
                }
            }
            Boot::Others if self.extents.is_loaded() => self.start_copysets(),
            Boot::Others | Boot::Sync => return false,
        };
        if let Err(failure) = result {
            self.fail(failure);
        }
        matches!(self.state, State::Boot(_))
    }

    fn log_recovered(&mut self, recovery: Recovery, started: Instant) -> Result<(), Failure> {
        let (log, report) = recovery.finish().map_err(|e| Failure::Recovery(e.to_string()))?;
        let ms = self.now.since_ns(started) / 1_000_000;
        tracing::info!(shard = self.config.shard, ms, batches = report.batches, bytes = report.bytes, "log recovered");
        if !report.rot.is_empty() || report.unreadable_blocks > 0 {
            tracing::error!(shard = self.config.shard, ?report, "the log has lost records that were durable");
        }
        *self.log.borrow_mut() = log;
        self.lost = report.suspects.iter().copied().chain(report.rot.iter().filter_map(|rot| rot.copyset)).collect();
        let log = self.log.borrow();
        let marked = |id: &CopysetId| log.index(*id).is_some_and(|index| Copyset::is_lost(index.checkpoint()));
        self.lost.extend(log.copysets().into_iter().filter(marked));
        drop(log);
        self.forgetful = report.rot.iter().any(|rot| rot.copyset.is_none());
        let (extents, config) = (Arc::clone(&self.extents), StoreConfig::default());
        let loader = Some(Box::new(Loader::new(&self.layout, self.config.shard, extents, config)));
        self.state = State::Boot(Boot::Metadata { loader, started: self.now });
        Ok(())
    }

    fn metadata_loaded(&mut self, loader: Loader, started: Instant) -> Result<(), Failure> {
        let log = Rc::clone(&self.log);
        let (lost, forgetful) = (&self.lost, self.forgetful);
        let forgotten = RefCell::new(BTreeSet::new());
        let known = |id: CopysetId| {
            let log = log.borrow();
            let Some(index) = log.index(id).filter(|index| !Copyset::is_lost(index.checkpoint())) else {
                // A batch is lost, and nobody can say whose records it held: the log may have forgotten a copyset that
                // has chunks here. They are not free because of that.
                let unheard = forgetful && !lost.contains(&id);
                if unheard {
                    forgotten.borrow_mut().insert(id);
                }
                return (unheard || lost.contains(&id)).then_some(chunk::Known::LOST);
            };
            let (checkpoint, last) = (index.checkpoint(), index.last_index());
            Some(chunk::Known { incarnation: checkpoint.incarnation, checkpoint: checkpoint.applied_index, last })
        };
        let (store, report) = loader.finish(&known).map_err(|e| Failure::Load(e.to_string()))?;
        let ms = self.now.since_ns(started) / 1_000_000;
        tracing::info!(shard = self.config.shard, ms, ?report, "chunk metadata loaded");
        let forgotten = forgotten.into_inner().into_iter().filter(|&id| !store.list(id, 0, 1).is_empty());
        self.lost.extend(forgotten);
        self.store = store;
        self.state = State::Boot(Boot::Others);
        Ok(())
    }

    fn start_copysets(&mut self) -> Result<(), Failure> {
        let ids = self.log.borrow().copysets();
        let lost: Vec<CopysetId> = self.lost.clone();
        for id in lost.into_iter().filter(|id| !ids.contains(id)) {
            // Even its checkpoint is lost. What shows that is released some day; what is on its slots must outlive it.
            self.log.borrow_mut().checkpoint(id, Copyset::lost_checkpoint());
            self.broken.push(id);
        }
        for &id in &ids {
            let last = self.log.borrow().index(id).map_or(0, Index::last_index);
            match self.start_copyset(id) {
                // What others must agree to first is not waited for: nothing of it is outside the log (rule 10).
                Ok(()) => {
                    let target = self.groups.get(&id).filter(|g| g.raft.needs_ticks()).map(|g| g.raft.commit_index());
                    self.replaying.push((id, target.unwrap_or(last)));
                }
                // The log lost what it needs. The others go on; it answers CRC_FAIL until it is deleted (rule 21).
                Err(failure) => {
                    tracing::error!("{failure}; this copyset is out of service");
                    self.broken.push(id);
                }
            }
        }
        self.broken.sort_unstable();
        self.broken.dedup();
        self.state = State::Serving;
        self.replay_step();
        Ok(())
    }

    /// Everything the log held at start is applied: new extents may be taken, doubtful chunks are known as such.
    pub(super) fn replay_step(&mut self) {
        if self.replay_over {
            return;
        }
        let groups = &self.groups;
        let open = |id: &CopysetId, last: u64| groups.get(id).is_some_and(|g| !g.damaged && g.applied < last);
        self.replaying.retain(|(id, last)| open(id, *last));
        if self.replaying.is_empty() {
            self.replay_over = true;
            let ids = self.log.borrow().copysets();
            for id in ids {
                self.follow_log(id); // before others may take the slots that the log's tail had
            }
            self.replay = Replay::default();
            self.store.replay_done();
            self.look_for_doubts();
            tracing::info!(shard = self.config.shard, copysets = self.groups.len(), "replay is over");
        }
    }

    /// Make a copyset live from what the log says of it.
    pub(super) fn start_copyset(&mut self, id: CopysetId) -> Result<(), Failure> {
        let config = copyset::Config {
            seed: self.config.seed ^ id.0.rotate_left(17),
            // What is proposed is bounded by the shard: it makes writes wait, a copyset would refuse them (rule 25).
            max_waiting: usize::MAX,
            max_waiting_bytes: usize::MAX,
            suspect: self.lost.contains(&id),
            // Idle copysets cost heartbeats and nothing else; of three in T, two may be late.
            heartbeat_ns: 2 * self.tick_ns(),
            ..copyset::Config::new(id, self.config.peer, 0).with_election_timeout(self.config.election_ms * 1_000_000)
        };
        let checkpoint =
            self.log.borrow().index(id).map(|i| (i.checkpoint().incarnation, i.checkpoint().applied_index));
        let Some((incarnation, applied)) = checkpoint else {
            return Err(Failure::Copyset(id, "the log does not know it".into()));
        };
        if self.log.borrow().index(id).is_some_and(|index| Copyset::is_lost(index.checkpoint())) {
            return Err(Failure::Copyset(id, "the log has lost its checkpoint".into()));
        }
        let raft =
            Copyset::new(config, Rc::clone(&self.log), self.now.0).map_err(|e| Failure::Copyset(id, e.to_string()))?;
        let suspect = raft.is_suspect();
        let alone = !raft.conf().voters.iter().any(|&voter| voter != self.config.peer);
        let group = Group {
            raft,
            applied,
            queue: VecDeque::new(),
            fetching: false,
            fetch_failures: 0,
            fetch_after: Instant(0),
            dirty: false,
            unpersisted: false,
            applying: false,
            follow: super::follow::Follow::default(),
            damaged: suspect && alone,
        };
        self.groups.insert(id, group);
        if suspect && !alone {
            self.suspect(id);
        }
        self.store.add_copyset(id, incarnation);
        self.next_tick = self.now;
        self.mark_dirty(id);
        Ok(())
    }
}

/// The log of one shard.
#[must_use]
pub fn log_geometry(layout: &Layout, shard: u16) -> Geometry {
    let mut uuid = layout.uuid;
    // Each shard's log is a log of its own: a misdirected write must not pass for a record of another shard's.
    for (byte, own) in uuid.iter_mut().zip(shard.to_le_bytes()) {
        *byte ^= own;
    }
    let segment_count = (layout.log_bytes_per_shard / layout.log_segment_size) as u32;
    Geometry { uuid, segment_size: layout.log_segment_size, segment_count }
}
