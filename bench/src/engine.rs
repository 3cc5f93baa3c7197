//! The client as a state machine: bytes and times in, bytes out. It owns no socket and no clock.
//!
//! It keeps the plan's pace, matches replies to requests by correlation id, retries as libcurve does (redirect 10 ms,
//! overload 100 ms doubling to 8 s, else 100 ms; timeouts resend on the same connection at once and double), lets the
//! model judge every answer, and times an operation from its *intended* start to its final answer, retries included.
//! With several nodes each request goes to the one that leads its copyset, as far as is known.
//!
//! What is never answered stays open in the model. An attempt that may have been executed, and may still be, is never
//! sent again as the same write: the retry is stamped as a new one. So an old attempt that turns up late (from the
//! socket of a process that was paused, say) is told from the write that was acknowledged.

use crate::codec::{self, ChunkRequest};
use crate::leaders::Leaders;
use crate::model::{ChunkAddr, Model, ReadToken, Survival};
use crate::plan::{Access, Geometry, Pace, Source};
use crate::stats::Stats;
use crate::verdict::{self, count, first};
use slab::Slab;
use std::collections::BTreeSet;

const MS: u64 = 1_000_000;
const TICK: u64 = 5 * MS;
/// An open loop's starts are collected this long, so that a high rate does not cost a wake-up per request.
const QUANTUM: u64 = 50_000;

/// What is done with the contents of reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Check {
    /// Writes carry a fixed payload, reads are only counted.
    Off,
    /// Writes are stamped, reads are judged.
    Judge,
    /// Reads are judged and decide what became of unanswered writes.
    Settle,
}

/// Knobs of a phase; times in nanoseconds since it began.
#[derive(Debug, Clone)]
pub struct Config {
    /// What to check.
    pub check: Check,
    /// Number of connections to each node.
    pub conns: usize,
    /// File version of writes.
    pub sn: u64,
    /// First timeout of a request; doubles up to 8 s.
    pub timeout: u64,
    /// Measuring starts here (before: warm-up).
    pub measure_from: u64,
    /// No request starts after this.
    pub stop_at: u64,
    /// Open requests are given up this long after `stop_at`, or when nothing was answered for this long.
    pub give_up: u64,
    /// At most this many requests start.
    pub ops: u64,
    /// An open loop's bound of unanswered requests; beyond it they start late, which their latency shows.
    pub inflight_max: usize,
    /// End the phase when a connection breaks (for crash tests), leaving what is open unanswered.
    pub until_disconnect: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Sent { conn: usize, deadline: u64 },
    Waiting { until: u64 },
}

struct Op {
    access: Access,
    intended: u64,
    cid: u64,
    timeout: u64,
    overloads: u32,
    redirects: u32,
    seq: u64,
    /// An attempt left that may be executed, now or later.
    tried: bool,
    token: Option<ReadToken>,
    state: State,
}

#[derive(Default)]
struct Conn {
    up: bool,
    out: Vec<u8>,
}

/// One worker's side of one phase.
pub struct Engine {
    config: Config,
    geometry: Geometry,
    leaders: Leaders,
    source: Source,
    pace: Pace,
    model: Option<Model>,
    payload: Vec<u8>,
    ops: Slab<Op>,
    waiting: BTreeSet<(u64, usize)>,
    conns: Vec<Conn>,
    generation: u32,
    issued: u64,
    exhausted: bool,
    over: bool,
    last_progress: u64,
    next_scan: u64,
    stats: Stats,
    survival: Survival,
}

impl Engine {
    /// A phase that has not begun. Connections are numbered node by node.
    pub fn new(
        config: Config,
        geometry: Geometry,
        leaders: Leaders,
        source: Source,
        pace: Pace,
        model: Option<Model>,
    ) -> Self {
        let conns = config.conns.max(1) * leaders.nodes().len();
        let conns = (0..conns).map(|_| Conn::default()).collect();
        let mut engine = Self {
            config,
            geometry,
            leaders,
            source,
            pace,
            model,
            payload: Vec::new(),
            ops: Slab::new(),
            waiting: BTreeSet::new(),
            conns,
            generation: 0,
            issued: 0,
            exhausted: false,
            over: false,
            last_progress: 0,
            next_scan: 0,
            stats: Stats::default(),
            survival: Survival::default(),
        };
        engine.exhausted = engine.source.remaining() == Some(0);
        engine
    }

    /// True when nothing more will be asked or awaited.
    pub const fn is_over(&self) -> bool {
        self.over
    }

    /// Results, model and survivals of unanswered writes, when the phase is over at `now`.
    pub fn into_results(mut self, now: u64) -> (Stats, Option<Model>, Survival) {
        let (from, stop) = (self.config.measure_from, self.config.stop_at);
        for (_, op) in &self.ops {
            self.stats.unanswered += 1;
            if (from..stop).contains(&op.intended) {
                self.stats.record(op.access.write, now.saturating_sub(op.intended));
            }
            if let (Some(token), Some(model)) = (op.token, &mut self.model) {
                model.cancel_read(token);
            }
        }
        (self.stats, self.model, self.survival)
    }

    /// Who leads what, as far as the phase has found out.
    pub const fn leaders(&self) -> &Leaders {
        &self.leaders
    }

    /// Operations answered so far.
    pub const fn answered(&self) -> u64 {
        self.stats.answered
    }

    /// Connection `conn` is ready for requests.
    pub fn on_connect(&mut self, conn: usize, now: u64) {
        if let Some(conn) = self.conns.get_mut(conn) {
            conn.up = true;
            conn.out.clear();
        }
        self.poll(now);
    }

    /// Connection `conn` broke: what was on it is retried on another one, or the phase ends.
    pub fn on_disconnect(&mut self, conn: usize, now: u64) {
        let Some(state) = self.conns.get_mut(conn) else { return };
        if !std::mem::take(&mut state.up) || self.over {
            return;
        }
        state.out.clear();
        self.stats.disconnects += 1;
        if self.config.until_disconnect {
            self.over = true;
            return;
        }
        let lost = |op: &Op| matches!(op.state, State::Sent { conn: on, .. } if on == conn);
        let keys: Vec<usize> = self.ops.iter().filter(|(_, op)| lost(op)).map(|(key, _)| key).collect();
        for key in keys {
            self.retry(key, now + 10 * MS, now);
        }
    }

    /// Bytes waiting for connection `conn`, exchanged against an empty buffer.
    pub fn take_output(&mut self, conn: usize, empty: &mut Vec<u8>) -> bool {
        let Some(conn) = self.conns.get_mut(conn) else { return false };
        std::mem::swap(&mut conn.out, empty);
        !empty.is_empty()
    }

    /// True if connection `conn` has something to send.
    pub fn has_output(&self, conn: usize) -> bool {
        self.conns.get(conn).is_some_and(|conn| !conn.out.is_empty())
    }

    /// When [`Self::poll`] wants to be called at the latest.
    pub fn deadline(&self, now: u64) -> u64 {
        let mut at = now + TICK;
        if !self.exhausted
            && let Some(start) = self.pace.next_start()
        {
            at = at.min(start.max(now) + QUANTUM);
        }
        if let Some((until, _)) = self.waiting.first() {
            at = at.min((*until).max(now));
        }
        at
    }

    /// Sends what is due.
    pub fn poll(&mut self, now: u64) {
        if self.over {
            return;
        }
        while let Some((until, key)) = self.waiting.first().copied()
            && until <= now
        {
            self.waiting.remove(&(until, key));
            self.send(key, now);
        }
        self.scan_timeouts(now);
        self.start_due(now);
        let closed = self.exhausted || now >= self.config.stop_at;
        let drained = now >= self.config.stop_at.saturating_add(self.config.give_up);
        let stuck = now.saturating_sub(self.last_progress) > self.config.give_up && !self.ops.is_empty();
        self.over = (closed && self.ops.is_empty()) || drained || stuck;
    }

    fn start_due(&mut self, now: u64) {
        // Without any connection an open loop lets its starts pile up; a closed loop waits.
        if !self.conns.iter().any(|conn| conn.up) {
            return;
        }
        while !self.exhausted && self.ops.len() < self.config.inflight_max {
            let Some(intended) = self.pace.due(now, self.ops.len()) else { return };
            if intended >= self.config.stop_at {
                self.exhausted = true;
                return;
            }
            let Some(access) = self.source.next(&self.geometry) else {
                self.exhausted = true;
                return;
            };
            self.issued += 1;
            self.exhausted = self.issued >= self.config.ops || self.source.remaining() == Some(0);
            if self.ops.is_empty() {
                self.last_progress = now;
            }
            let (seq, token) = verdict::begin(self.config.check, self.model.as_mut(), &access);
            let op = Op {
                access,
                intended,
                cid: 0,
                timeout: self.config.timeout,
                overloads: 0,
                redirects: 0,
                seq,
                tried: false,
                token,
                state: State::Waiting { until: now },
            };
            let key = self.ops.insert(op);
            self.send(key, now);
        }
    }

    /// The copyset of op `key`.
    fn copyset(&self, key: usize) -> Option<(u32, u32)> {
        let chunk = self.geometry.chunks.get(self.ops.get(key)?.access.chunk)?;
        Some((chunk.pool, chunk.copyset))
    }

    /// An open connection to the node that leads `copyset`. A leader without one is doubted.
    fn connection(&mut self, key: usize, copyset: (u32, u32)) -> Option<usize> {
        let (node, each) = (self.leaders.of(copyset), self.config.conns.max(1));
        let up = |at: &usize| self.conns.get(*at).is_some_and(|conn| conn.up);
        let found = (key..key + each).map(|at| node * each + at % each).find(up);
        if found.is_none() {
            self.leaders.doubt(copyset, node);
        }
        found
    }

    /// A write that may have been executed already is sent as another one.
    fn renew(&mut self, key: usize) {
        let (Some(op), Some(model)) = (self.ops.get_mut(key), &mut self.model) else { return };
        if op.access.write && op.tried {
            op.seq = model.begin_write(op.access.chunk, first(&op.access), count(&op.access));
        }
    }

    /// Puts op `key` on a connection, or lets it wait for one.
    fn send(&mut self, key: usize, now: u64) {
        let Some(copyset) = self.copyset(key) else { return };
        let on = self.connection(key, copyset);
        if on.is_some() {
            self.renew(key);
        }
        let Some(op) = self.ops.get_mut(key) else { return };
        let Some(addr) = self.geometry.chunks.get(op.access.chunk).copied() else { return };
        let Some((on, conn)) = on.and_then(|on| Some((on, self.conns.get_mut(on)?))) else {
            op.state = State::Waiting { until: now + 10 * MS };
            self.waiting.insert((now + 10 * MS, key));
            return;
        };
        self.generation = self.generation.wrapping_add(1);
        op.cid = u64::from(self.generation) << 32 | key as u64;
        op.state = State::Sent { conn: on, deadline: now + op.timeout };
        op.tried = true;
        let ChunkAddr { pool, copyset, chunk } = addr;
        let Access { write, offset, len: size, .. } = op.access;
        let sn = write.then_some(self.config.sn);
        let request = ChunkRequest { write, pool, copyset, chunk, offset, size, sn, file_id: None, epoch: None };
        codec::put_chunk_request(&mut conn.out, op.cid, &request);
        if write {
            put_payload(&mut conn.out, op, self.model.as_ref(), &mut self.payload);
        }
    }
}

mod answer;

fn put_payload(out: &mut Vec<u8>, op: &Op, model: Option<&Model>, plain: &mut Vec<u8>) {
    let len = op.access.len as usize;
    if let Some(model) = model {
        let start = out.len();
        out.resize(start + len, 0);
        if let Some(payload) = out.get_mut(start..) {
            model.fill(op.access.chunk, first(&op.access), op.seq, payload);
        }
        return;
    }
    if plain.len() < len {
        *plain = plain_payload(len);
    }
    out.extend_from_slice(plain.get(..len).unwrap_or_default());
}

/// At least `len` bytes that do not compress, to be written when nothing is checked.
pub(crate) fn plain_payload(len: usize) -> Vec<u8> {
    (0..len.next_multiple_of(8) as u64).step_by(8).flat_map(|at| crate::stamp::mix(at).to_le_bytes()).collect()
}
