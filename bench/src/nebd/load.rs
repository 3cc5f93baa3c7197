//! One worker of `bench nebd`: a client of its own whose completions ask for the next request, so that a closed loop runs
//! on part1's thread alone, and everything a batch of answers leads to leaves in one system call.

use crate::engine::{self, Check};
use crate::model::{Model, ReadToken, Survival};
use crate::nebd::PIECE;
use crate::plan::{Access, Geometry, Pace, Source};
use crate::stats::Stats;
use crate::verdict::{self, Answered, first};
use bytes::Bytes;
use nebd::{Completion, Error, Io, NebdClient, NebdFd, ReadBuffer};
use slab::Slab;
use std::borrow::Cow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const TICK: Duration = Duration::from_millis(5);
/// An open loop's starts are collected this long.
const QUANTUM: u64 = 50_000;

/// Knobs of a phase; times in nanoseconds since it began.
#[derive(Debug, Clone)]
pub(super) struct Setup {
    /// What to check.
    pub(super) check: Check,
    /// Measuring starts here.
    pub(super) measure_from: u64,
    /// No request starts after this.
    pub(super) stop_at: u64,
    /// Open requests are given up when nothing was answered for this long.
    pub(super) give_up: u64,
    /// At most this many requests start.
    pub(super) ops: u64,
    /// An open loop's bound of unanswered requests.
    pub(super) inflight_max: usize,
}

/// What a phase came to.
#[derive(Default)]
pub(super) struct Results {
    pub(super) stats: Stats,
    pub(super) survival: Survival,
    pub(super) model: Option<Model>,
    /// Nanoseconds.
    pub(super) length: u64,
}

impl Results {
    /// Adds another worker's.
    pub(super) fn add(&mut self, other: Self) {
        self.stats.add(other.stats);
        self.survival.survived += other.survival.survived;
        self.survival.vanished += other.survival.vanished;
        self.survival.hidden += other.survival.hidden;
        self.length = self.length.max(other.length);
    }
}

struct Open {
    access: Access,
    intended: u64,
    seq: u64,
    token: Option<ReadToken>,
}

/// What is asked, what is open, what was found.
pub(super) struct Load {
    setup: Setup,
    geometry: Geometry,
    source: Source,
    pace: Pace,
    model: Option<Model>,
    open: Slab<Open>,
    issued: u64,
    exhausted: bool,
    over: bool,
    last_progress: u64,
    stats: Stats,
    survival: Survival,
    /// What is written when nothing is checked.
    plain: Bytes,
    buffers: Vec<Vec<u8>>,
}

impl Load {
    pub(super) fn new(setup: Setup, geometry: Geometry, source: Source, pace: Pace, model: Option<Model>) -> Self {
        let exhausted = source.remaining() == Some(0) || setup.ops == 0;
        Self {
            setup,
            geometry,
            source,
            pace,
            model,
            open: Slab::new(),
            issued: 0,
            exhausted,
            over: false,
            last_progress: 0,
            stats: Stats::default(),
            survival: Survival::default(),
            plain: Bytes::new(),
            buffers: Vec::new(),
        }
    }

    /// The next request that is due.
    fn next(&mut self, now: u64) -> Option<(usize, Io)> {
        if self.over || self.exhausted || self.open.len() >= self.setup.inflight_max {
            return None;
        }
        let intended = self.pace.due(now, self.open.len())?;
        let access = if intended < self.setup.stop_at { self.source.next(&self.geometry) } else { None };
        let Some(access) = access else {
            self.exhausted = true;
            return None;
        };
        self.issued += 1;
        self.exhausted = self.issued >= self.setup.ops || self.source.remaining() == Some(0);
        if self.open.is_empty() {
            self.last_progress = now;
        }
        let (seq, token) = verdict::begin(self.setup.check, self.model.as_mut(), &access);
        let key = self.open.insert(Open { access, intended, seq, token });
        Some((key, self.io(&access, seq)))
    }

    fn io(&mut self, access: &Access, seq: u64) -> Io {
        let chunk = self.geometry.chunks.get(access.chunk).map_or(0, |addr| addr.chunk);
        let (offset, len) = (chunk * PIECE + u64::from(access.offset), access.len as usize);
        if !access.write {
            let mut bytes = self.buffers.pop().unwrap_or_default();
            bytes.resize(len, 0);
            return Io::Read { offset, buffer: ReadBuffer::Owned(bytes) };
        }
        let Some(model) = &self.model else {
            if self.plain.len() < len {
                self.plain = engine::plain_payload(len).into();
            }
            return Io::Write { offset, data: self.plain.slice(..len) };
        };
        let mut data = vec![0; len];
        model.fill(access.chunk, first(access), seq, &mut data);
        Io::Write { offset, data: data.into() }
    }

    fn done(&mut self, key: usize, completion: Completion, now: u64) {
        let Completion { result, buffer, retries } = completion;
        // What comes after the end is part1's own: it ends all that is open.
        let Some(op) = (if self.over { None } else { self.open.try_remove(key) }) else { return };
        self.last_progress = now;
        self.stats.retries += u64::from(retries);
        let bytes = match buffer {
            Some(ReadBuffer::Owned(bytes)) => Some(bytes),
            _ => None,
        };
        if let Err(error) = result {
            self.stats.failed += 1;
            self.stats.count(match error {
                Error::Refused => Cow::Borrowed("REFUSED"),
                other => Cow::Owned(other.to_string()),
            });
            if let (Some(token), Some(model)) = (op.token, &mut self.model) {
                model.cancel_read(token);
            }
        } else {
            let Open { access, intended, seq, token } = op;
            let answered = Answered { access, intended, seq, token, data: bytes.as_deref() };
            let window = self.setup.measure_from..self.setup.stop_at;
            let counts = (&mut self.stats, &mut self.survival);
            answered.count(self.setup.check, window, now, self.model.as_mut(), counts);
        }
        self.buffers.extend(bytes);
    }

    /// Whether the phase is over; if not, how long nothing is due.
    fn look(&mut self, now: u64) -> Option<Duration> {
        let closed = self.exhausted || now >= self.setup.stop_at;
        let stuck = now.saturating_sub(self.last_progress) > self.setup.give_up && !self.open.is_empty();
        self.over = (closed && self.open.is_empty()) || stuck;
        if self.over {
            return None;
        }
        let start = if self.exhausted { None } else { self.pace.next_start() };
        Some(start.map_or(TICK, |start| Duration::from_nanos(start.saturating_sub(now) + QUANTUM).min(TICK)))
    }
}

/// A load on a client.
pub(super) struct Worker {
    client: NebdClient,
    fd: NebdFd,
    epoch: Instant,
    load: Mutex<Load>,
    /// The last request was answered.
    drained: Condvar,
    progress: Arc<AtomicU64>,
}

impl Worker {
    pub(super) fn new(
        client: NebdClient,
        fd: NebdFd,
        epoch: Instant,
        load: Load,
        progress: Arc<AtomicU64>,
    ) -> Arc<Self> {
        Arc::new(Self { client, fd, epoch, load: Mutex::new(load), drained: Condvar::new(), progress })
    }

    fn now(&self) -> u64 {
        self.epoch.elapsed().as_nanos() as u64
    }

    fn load(&self) -> MutexGuard<'_, Load> {
        self.load.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs the phase to its end.
    pub(super) fn run(self: Arc<Self>) -> Results {
        loop {
            self.pump();
            let mut load = self.load();
            let Some(pause) = load.look(self.now()) else { break };
            drop(self.drained.wait_timeout(load, pause).unwrap_or_else(PoisonError::into_inner));
        }
        let length = self.now();
        self.client.shutdown();
        let (counted, mut load) = (self.client.stats(), self.load());
        load.stats.disconnects += counted.disconnects;
        load.stats.late_replies += counted.late_replies;
        let (from, stop) = (load.setup.measure_from, load.setup.stop_at);
        for (_, op) in std::mem::take(&mut load.open) {
            load.stats.unanswered += 1;
            if (from..stop).contains(&op.intended) {
                load.stats.record(op.access.write, length.saturating_sub(op.intended));
            }
            if let (Some(token), Some(model)) = (op.token, &mut load.model) {
                model.cancel_read(token);
            }
        }
        let stats = std::mem::take(&mut load.stats);
        Results { stats, survival: load.survival, model: load.model.take(), length }
    }

    /// Submits all that is due.
    fn pump(self: &Arc<Self>) {
        loop {
            let next = self.load().next(self.now());
            let Some((key, io)) = next else { return };
            self.submit(key, io);
        }
    }

    fn submit(self: &Arc<Self>, key: usize, io: Io) {
        let worker = Arc::clone(self);
        self.client.submit(self.fd, io, move |completion| {
            let now = worker.now();
            let mut load = worker.load();
            load.done(key, completion, now);
            let (next, drained) = (load.next(now), load.open.is_empty());
            drop(load);
            worker.progress.fetch_add(1, Ordering::Relaxed);
            match next {
                // In an open loop more than one may be due by now.
                Some((key, io)) => {
                    worker.submit(key, io);
                    worker.pump();
                }
                None if drained => worker.drained.notify_all(),
                None => {}
            }
        });
    }
}
