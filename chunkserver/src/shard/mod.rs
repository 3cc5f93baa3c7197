//! A shard: the copysets, the log and the chunk store of one core, as one sans-I/O state machine.
//!
//! Promises: a write is answered only after its log batch is durable and it is applied; every request gets exactly one
//! reply; chunk data reaches its slot only after a durable record of its commit (rule 10); log space is released only
//! after what it covers is durable elsewhere (rule 11). A failed log write, write-back or sync ends the shard for good.

mod admin;
mod apply;
mod boot;
mod bulk;
mod catchup;
pub mod diskless;
mod effects;
pub mod entry;
mod flush;
mod follow;
mod guard;
mod install;
mod lease;
mod log;
pub mod mail;
mod members;
mod mend;
mod pace;
mod peers;
mod propose;
mod read;
mod renew;
mod replay;
pub mod request;
mod slow;
mod supply;
mod suspects;
#[cfg(test)]
mod tests;
mod throttle;
mod trash;

pub use boot::log_geometry;

use crate::chunk::{self, ApplyError, ExtentPool, Layout, Store};
use crate::io::buffer::Arena;
use crate::io::{Completion, Done, Errno, FileId, Instant, Op};
use crate::metrics::{Counter, ShardMetrics};
use crate::shard::request::{Origin, Outcome, Reply, ReplyData, Request, RequestOp, ShardStatus};
use copyset::{Committed, Copyset, Effect};
use propose::Deferred;
use raftlog::{CopysetId, Log, WriteId};
use slab::Slab;
use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

/// The disk of a shard, as the reactor numbers files.
pub const DISK: FileId = FileId(0);

/// An idle log is sealed after this, milliseconds.
const SEAL_AFTER_MS: u64 = 1_000;

/// What is still owed so long after a stop was asked for is refused, milliseconds.
const DRAIN_MS: u64 = 150;
/// What found no buffer is tried again after this, milliseconds.
const RETRY_MS: u64 = 1;

/// What a shard is told at start.
#[derive(Clone, Debug)]
pub struct Config {
    /// This shard.
    pub shard: u16,
    /// Own peer id (`copyset::PeerId`).
    pub peer: u64,
    /// Payload bytes that may wait for write-back.
    pub dirty_limit: usize,
    /// Dirty data older than this is written back, nanoseconds.
    pub flush_age_ns: u64,
    /// Election timeout of copysets with several voters, milliseconds.
    pub election_ms: u64,
    /// Chunk data of raft snapshots that may move, in and out together, bytes per second; 0: no limit.
    pub snapshot_rate: u64,
    /// A deleted copyset's chunks are kept for so long, seconds; 0: not at all.
    pub trash_s: u64,
    /// Seconds since 1970 when `Instant` was 0.
    pub wall_s: u64,
    /// Randomness of this process's life: incarnations, election timeouts.
    pub seed: u64,
}

/// Buffers, by what they are for: what frees memory takes none from the pool it frees (rule 14).
#[derive(Clone, Debug)]
pub struct Arenas {
    /// Payloads on their way in, until written back.
    pub payload: Arc<Arena>,
    /// Log headers, metadata pages, device reads.
    pub work: Arc<Arena>,
    /// Every shard's payload arena: one of them running low makes all shards write back.
    pub all_payload: Vec<Arc<Arena>>,
}

/// What a step asks for; emptied by the reactor.
#[derive(Debug, Default)]
pub struct Effects {
    /// Disk operations, each with a number to give back.
    pub ops: Vec<(u64, Op)>,
    /// Answers.
    pub replies: Vec<Reply>,
    /// To other replicas, in order per peer.
    pub mail: Vec<mail::PeerMail>,
}

/// Why a shard ended.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum Failure {
    /// The log cannot be written.
    #[error("log write failed: {0}; this disk is out of service")]
    LogWrite(Errno),
    /// Chunk data or metadata cannot be written.
    #[error("chunk write-back failed: {0}; this disk is out of service")]
    WriteBack(Errno),
    /// The log cannot be recovered.
    #[error("log recovery failed: {0}")]
    Recovery(String),
    /// The metadata cannot be read.
    #[error("chunk metadata cannot be loaded: {0}")]
    Load(String),
    /// A committed entry is not understood.
    #[error(transparent)]
    Entry(#[from] entry::BadHeader),
    /// A committed entry cannot be applied.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// A copyset cannot start from what the log says.
    #[error("copyset {0:?}: {1}")]
    Copyset(CopysetId, String),
}

/// One copyset on this shard.
struct Group {
    raft: Copyset,
    applied: u64,
    queue: VecDeque<Committed>,
    fetching: bool,
    fetch_failures: u32,
    fetch_after: Instant,
    dirty: bool,
    unpersisted: bool,
    applying: bool,
    follow: follow::Follow,
    /// Entries of the log are lost to rot and there is no peer to fetch them from.
    damaged: bool,
}

/// Who waits for a disk operation.
enum Task {
    BootSync,
    BootRead((u64, usize)),
    /// A piece of the log, by its offset in the zone.
    Window(u64),
    LogWrite(WriteId),
    Round(chunk::IoId),
    Read {
        job: usize,
        piece: usize,
    },
    Fetch {
        copyset: CopysetId,
        index: u64,
    },
    CatchUp {
        copyset: CopysetId,
        index: u64,
        term: u64,
    },
}

/// A proposal whose outcome is awaited.
struct Waiting {
    /// `None`: it has been answered.
    origin: Option<Origin>,
    chunk: u64,
    op: request::ChunkOp,
    pinned: usize,
}

enum State {
    Boot(boot::Boot),
    Serving,
    Draining { sealed: Option<raftlog::Seq>, until: Instant },
    Stopped,
    Failed(Failure),
}

/// See the module text.
pub struct Shard {
    config: Config,
    layout: Layout,
    arenas: Arenas,
    log: Rc<RefCell<Log>>,
    store: Store,
    groups: BTreeMap<CopysetId, Group>,
    /// Copysets raft has news for.
    dirty: Vec<CopysetId>,
    /// Copysets with entries on their way to the log.
    unpersisted: Vec<CopysetId>,
    /// Copysets with committed entries to apply.
    applying: Vec<CopysetId>,
    /// An empty list for whoever takes one of the three above, so that none is allocated each turn.
    spare: Vec<CopysetId>,
    tasks: Slab<Task>,
    waiting: Slab<Waiting>,
    reads: Slab<read::Job>,
    /// Reads without a buffer yet.
    read_queue: VecDeque<usize>,
    /// Requests that came before start-up was over.
    early: Vec<Request>,
    /// Writes that found no room, in order.
    deferred: VecDeque<Deferred>,
    guards: guard::Guards,
    /// Payload bytes proposed and not yet applied.
    in_flight_bytes: usize,
    /// Log space of proposals that raft has not handed to the log yet.
    proposed_cost: u64,
    admin: Vec<admin::Pending>,
    peers: peers::Peers,
    catch_up: catchup::CatchUp,
    installs: install::Installs,
    supply: supply::Supply,
    throttle: throttle::Throttle,
    mends: mend::Mends,
    suspects: suspects::Suspects,
    members: members::Members,
    renewals: renew::Renewals,
    /// Reads that wait for a quorum's word that this replica still leads.
    parked: Slab<Request>,
    flush: flush::Flush,
    pace: pace::Pace,
    slow: slow::Slow,
    state: State,
    extents: Arc<ExtentPool>,
    /// What the log held at start and is not applied yet: copyset and last index.
    replaying: Vec<(CopysetId, u64)>,
    replay_over: bool,
    replay: replay::Replay,
    /// Copysets of which durable log records are lost.
    lost: Vec<CopysetId>,
    /// A batch of the log is lost, and with it whose records it held.
    forgetful: bool,
    /// Of these, the ones that cannot even start.
    broken: Vec<CopysetId>,
    /// The log has no room, and what fills it is kept for a copyset that is out of service.
    wedged: bool,
    /// Of the store, as last published.
    counted: chunk::Counters,
    now: Instant,
    /// When the trash is to be looked at.
    trash_at: Instant,
    /// When a failed fetch is due again.
    fetch_at: Instant,
    boot_retry: boot::Retry,
    next_tick: Instant,
    /// Every other tick, which idle copysets do without.
    even_tick: bool,
    /// When an idle log says that all of it is durable (rule 5).
    seal_at: Instant,
    incarnations: u64,
    /// A log header, a metadata page or a payload of the replay found no buffer.
    starved: bool,
    effects: Vec<Effect>,
    metrics: Arc<ShardMetrics>,
}

impl std::fmt::Debug for Shard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shard").field("shard", &self.config.shard).field("copysets", &self.groups.len()).finish()
    }
}

impl Shard {
    /// Take one request; the reply follows now or in a later step.
    pub fn request(&mut self, request: Request, out: &mut Effects) {
        match self.state {
            State::Serving => {}
            // Bounded by what the others may have in flight here.
            State::Boot(_) => return self.early.push(request),
            State::Draining { .. } | State::Stopped => return reply(out, request.origin, Outcome::Stopping),
            State::Failed(_) => return reply(out, request.origin, Outcome::DiskFail),
        }
        match request.op {
            RequestOp::Admin(_) => self.administer(request, out),
            RequestOp::Chunk { .. } => self.chunk_request(request, out),
            RequestOp::Guarded { guard, chunk, op } => {
                let Request { copyset, origin, .. } = request;
                if !self.guards.passes(&guard) {
                    return reply(out, origin, Outcome::Failed); // nobody waits for this answer
                }
                let term = self.groups.get(&copyset).map(|group| group.raft.term());
                if guard.term != 0 && term.is_some_and(|term| term != guard.term) {
                    return self.redirect(copyset, origin, out);
                }
                self.chunk_request(Request { copyset, op: RequestOp::Chunk { chunk, op }, origin }, out);
            }
        }
    }

    /// One of this shard's disk operations ended.
    pub fn completed(&mut self, number: u64, completion: Completion, out: &mut Effects) {
        let Some(task) = self.tasks.try_remove(number as usize) else { return };
        match (task, completion.done) {
            (Task::BootRead(read), Done::Read { buf, result }) => self.boot_read(read, buf, result),
            (Task::BootSync, Done::Sync(Ok(()))) => self.boot_synced(),
            (Task::BootSync, Done::Sync(Err(error))) => self.fail(Failure::LogWrite(error)),
            (Task::LogWrite(id), Done::Write(Ok(()))) => self.log_written(id),
            (Task::LogWrite(_), Done::Write(Err(error))) => self.fail(Failure::LogWrite(error)),
            (Task::Round(id), Done::Write(Ok(())) | Done::Sync(Ok(()))) => self.store.io_done(id),
            (Task::Round(_), Done::Write(Err(error)) | Done::Sync(Err(error))) => self.fail(Failure::WriteBack(error)),
            (Task::Read { job, piece }, Done::Read { buf, result }) => self.read_done(job, piece, buf, result, out),
            (Task::Window(at), Done::Read { buf, result }) => self.replay.arrived(at, result.is_ok().then_some(buf)),
            (Task::Fetch { copyset, index }, Done::Read { buf, result }) => self.fetched(copyset, index, buf, result),
            (Task::CatchUp { copyset, index, term }, Done::Read { buf, result }) => {
                self.read_back_done(copyset, (index, term), buf, result);
            }
            (_, done) => unreachable!("a disk operation came back as {done:?}"),
        }
        self.supply_step(out);
    }

    /// What time it is. To be called after a turn's input was received and before it is handed in: a lease counts by it.
    pub fn observe(&mut self, now: Instant) {
        self.now = self.now.max(now);
    }

    /// Do what this turn's events made possible: raft, log writes, write-back, waiting reads.
    pub fn end_turn(&mut self, now: Instant, out: &mut Effects) {
        self.observe(now);
        match self.state {
            State::Failed(_) | State::Stopped => return self.refuse_all(Outcome::DiskFail, out),
            State::Boot(_) => {
                self.boot_step(out);
                if !matches!(self.state, State::Serving) {
                    return;
                }
                for request in std::mem::take(&mut self.early) {
                    self.request(request, out);
                }
            }
            State::Serving | State::Draining { .. } => {}
        }
        if self.fetch_at <= self.now {
            self.fetch_at = Instant::FAR;
        }
        self.pace.turn(now, self.log.borrow().queued_records());
        self.tick();
        self.trash_step(out);
        self.starved = false;
        loop {
            self.work(out);
            self.flush_step(out);
            // A round that ended may have made the room that the first deferred write waits for.
            if !self.may_admit() && !self.may_take() {
                break;
            }
        }
        self.refuse_wedged(out);
        if self.seal_at <= self.now {
            // None: said already, or something is under way, which will set the time anew.
            self.log.borrow_mut().seal();
            self.seal_at = Instant::FAR;
        }
        self.write_log(out);
        self.catch_up_step(out);
        self.feed_step(out);
        self.mend_step(out);
        self.suspects_step(out);
        self.renew_step(out);
        self.start_waiting_reads(out);
        self.replay_step();
        self.supply_waiting(out);
        self.supply_step(out);
        self.drain_step(out);
        self.publish();
    }

    fn work(&mut self, out: &mut Effects) {
        loop {
            self.retry_held();
            self.admit_deferred(out);
            self.admin_step(out);
            let worked = self.raft_ready(out) | self.apply_ready(out);
            if !worked {
                return;
            }
        }
    }

    /// When `end_turn` must run again even if nothing completes.
    #[must_use]
    pub fn deadline(&self) -> Instant {
        match self.state {
            State::Serving | State::Draining { .. } => {
                let trash = if matches!(self.state, State::Serving) { self.trash_at } else { Instant::FAR };
                let retry = if self.wants_buffers() { self.now.after_ms(RETRY_MS) } else { Instant::FAR };
                let over = if let State::Draining { until, .. } = self.state {
                    until.max(self.now.after_ms(1))
                } else {
                    Instant::FAR
                };
                self.flush_deadline()
                    .min(self.install_deadline())
                    .min(self.supply_deadline())
                    .min(self.mend_deadline())
                    .min(self.renew_deadline())
                    .min(self.suspects_deadline())
                    .min(self.log_write_deadline())
                    .min(self.next_tick)
                    .min(self.seal_at)
                    .min(trash)
                    .min(self.fetch_at)
                    .min(retry)
                    .min(over)
            }
            State::Boot(_) => self.boot_deadline(),
            State::Stopped | State::Failed(_) => Instant::FAR,
        }
    }

    /// Writes must not wait for what only an operator can do.
    fn refuse_wedged(&mut self, out: &mut Effects) {
        if !std::mem::take(&mut self.wedged) || self.deferred.is_empty() {
            return;
        }
        tracing::error!(shard = self.config.shard, "the log is full of what copysets out of service keep: delete them");
        for Deferred { request, .. } in std::mem::take(&mut self.deferred) {
            reply(out, request.origin, Outcome::DiskFail);
        }
    }

    /// Something waits for a buffer of the work arena. Those come back on other threads too, which wakes nobody.
    fn wants_buffers(&self) -> bool {
        self.starved || !self.read_queue.is_empty()
    }

    /// Requests are answered, by every shard of the disk.
    #[must_use]
    pub fn serving(&self) -> bool {
        matches!(self.state, State::Serving) && self.extents.is_open()
    }

    /// The disk is out of service; the process should say so and stop.
    #[must_use]
    pub fn failure(&self) -> Option<&Failure> {
        if let State::Failed(failure) = &self.state { Some(failure) } else { None }
    }

    /// Refuse new requests, finish those in flight, seal the log.
    pub fn drain(&mut self) {
        match self.state {
            State::Serving => {
                self.state = State::Draining { sealed: None, until: self.now.after_ms(DRAIN_MS) };
                let _ = self.hand_over();
            }
            State::Boot(_) => self.state = State::Stopped,
            _ => {}
        }
    }

    /// Somebody waits for payload memory: write back what is dirty.
    pub fn want_memory(&mut self) {
        self.flush.urgent = true;
        self.flush.next = self.now;
    }

    /// Write-back rounds so far, and bytes not written back.
    #[must_use]
    pub fn write_back(&self) -> (u64, u64) {
        (self.store.counters().rounds, self.store.pinned_bytes())
    }

    /// Every copyset that needs nobody's consent leads (those out of service excepted).
    #[must_use]
    pub fn leads_alone(&self) -> bool {
        self.groups.values().all(|group| group.damaged || group.raft.needs_ticks() || group.raft.is_leader_ready())
    }

    /// None of its disk operations is in flight.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.tasks.is_empty()
    }

    /// Draining is over.
    #[must_use]
    pub fn stopped(&self) -> bool {
        matches!(self.state, State::Stopped)
    }

    fn drain_step(&mut self, out: &mut Effects) {
        let State::Draining { until, .. } = self.state else { return };
        for Deferred { request, .. } in std::mem::take(&mut self.deferred) {
            reply(out, request.origin, Outcome::Stopping); // not begun: the log may have no room for it for long
        }
        if until <= self.now {
            self.refuse_all(Outcome::Stopping, out);
        }
        let State::Draining { sealed, .. } = &mut self.state else { return };
        let mut log = self.log.borrow_mut();
        match *sealed {
            None if self.waiting.is_empty()
                && self.reads.is_empty()
                && self.parked.is_empty()
                && self.mends.is_empty() =>
            {
                *sealed = Some(log.seal().unwrap_or_else(|| log.durable_seq()));
            }
            Some(seq) if log.durable_seq() >= seq => self.state = State::Stopped,
            _ => {}
        }
    }

    fn fail(&mut self, failure: Failure) {
        if !matches!(self.state, State::Failed(_)) {
            tracing::error!(shard = self.config.shard, "{failure}");
            self.state = State::Failed(failure);
        }
    }

    /// Answer everything that is still owed.
    fn refuse_all(&mut self, outcome: Outcome, out: &mut Effects) {
        for waiting in std::mem::take(&mut self.waiting).into_iter().filter_map(|(_, w)| w.origin) {
            reply(out, waiting, outcome);
        }
        let deferred = std::mem::take(&mut self.deferred).into_iter().map(|deferred| deferred.request);
        for request in deferred.chain(std::mem::take(&mut self.early)) {
            reply(out, request.origin, outcome);
        }
        for job in std::mem::take(&mut self.reads).into_iter().map(|(_, job)| job.origin) {
            reply(out, job, outcome);
        }
        self.stop_mends(None, outcome, out);
        let parked = std::mem::take(&mut self.parked).into_iter().map(|(_, request)| request.origin);
        let admin = std::mem::take(&mut self.admin).into_iter().filter_map(|pending| pending.origin);
        for origin in parked.chain(admin).chain(self.members.give_up(None)).chain(self.renewals.give_up()) {
            reply(out, origin, outcome);
        }
        self.stop_supply(out);
        self.in_flight_bytes = 0;
        self.read_queue.clear();
    }

    fn submit(&mut self, out: &mut Effects, task: Task, op: Op) {
        out.ops.push((self.tasks.insert(task) as u64, op));
    }

    /// Collect what raft wants done; true if there was anything.
    fn raft_ready(&mut self, out: &mut Effects) -> bool {
        let mut dirty = std::mem::replace(&mut self.dirty, std::mem::take(&mut self.spare));
        let worked = !dirty.is_empty();
        for id in dirty.drain(..) {
            let Some(group) = self.groups.get_mut(&id) else { continue };
            group.dirty = false;
            let mut effects = std::mem::take(&mut self.effects);
            group.raft.ready(&mut effects);
            if group.raft.awaits_log() && !std::mem::replace(&mut group.unpersisted, true) {
                self.unpersisted.push(id);
            }
            for effect in effects.drain(..) {
                self.raft_effect(id, effect, out);
            }
            self.effects = effects;
            self.after_ready(id);
        }
        self.spare = dirty;
        self.all_ready();
        worked
    }

    /// What only the shard knows of itself.
    #[must_use]
    pub fn status(&self) -> ShardStatus {
        let log = self.log.borrow();
        let (kept, live): (Vec<_>, Vec<_>) = self.groups.iter().partition(|(_, group)| group.raft.retired() != 0);
        let trashed = kept.into_iter().map(|(&id, _)| self.store.chunks_of(id)).sum::<u64>();
        ShardStatus {
            shard: self.config.shard,
            copysets: live.len() as u64,
            leaders: live.iter().filter(|(_, group)| group.raft.is_leader_ready()).count() as u64,
            chunks: self.store.chunk_count() - trashed,
            trashed,
            slots_free: self.store.spare_slots(),
            slots_unclaimed: self.extents.free_slots(),
            dirty_bytes: self.store.pinned_bytes(),
            log_used_bytes: log.used_bytes(),
            log_bytes: log.capacity_bytes(),
            buffers_free_bytes: self.arenas.payload.free_bytes() as u64,
            failed: self.failure().map(ToString::to_string),
            peers: Vec::new(),
        }
    }

    /// Counters for whoever scrapes.
    fn publish(&mut self) {
        let (now, last) = (self.store.counters(), self.counted);
        if now == last {
            return;
        }
        for (counter, by) in [
            (Counter::DataWrites, now.data_writes - last.data_writes),
            (Counter::DataWriteBytes, now.data_bytes - last.data_bytes),
            (Counter::MetaWrites, now.meta_writes - last.meta_writes),
            (Counter::MetaWriteBytes, now.meta_bytes - last.meta_bytes),
            (Counter::CrcWrites, now.crc_writes - last.crc_writes),
            (Counter::CrcWriteBytes, now.crc_bytes - last.crc_bytes),
            (Counter::Syncs, now.syncs - last.syncs),
            (Counter::Rounds, now.rounds - last.rounds),
        ] {
            self.metrics.add(counter, by);
        }
        self.counted = now;
    }
}

fn reply(out: &mut Effects, origin: Origin, outcome: Outcome) {
    out.replies.push(Reply { origin, outcome, applied_index: 0, data: ReplyData::None });
}
