//! A simulated Curve client: several operations at a time over one connection, timeouts, reconnects, slow reading.
//!
//! Every operation is tried once; what its answer promises goes into the history. A client that sweeps reads a list of
//! blocks, each again and again until it is answered.

use crate::codec::{self, ChunkRequest, Frame, Value};
use crate::history::{BLOCK, History, Kind, Outcome, Place, Record, stamp, unstamp};
use crate::rng::Rng;
use crate::rot;
use crate::run::Actor;
use crate::world::{ActorEvent, World};
use bytes::BytesMut;
use chunkserver::io::{ConnId, ListenerId};
use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

pub(crate) const CHUNK: &str = "curve.chunkserver.ChunkService";
pub(crate) const COPYSET: &str = "curve.chunkserver.CopysetService";
const INTERNAL: &str = "chunkserver.internal.ZeroService";
pub(crate) const POOL: u64 = 1;
const THINK: u64 = 0;
const RESUME: u64 = 1;
const RECONNECT: u64 = 2;
/// Chunk ids from here on exist only to fill the pool.
pub(crate) const FILLER: u64 = 100;
/// The chunk of each copyset that is deleted and zeroed.
const MORTAL: u64 = 3;

#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) copysets: u64,
    pub(crate) peer: String,
    pub(crate) depth: usize,
    /// Blocks per chunk that are used; the first few are hot.
    pub(crate) blocks: u64,
    pub(crate) timeout_ns: u64,
}

enum Plan {
    /// At least so many operations, and on until the nemesis is done.
    Random(u64),
    Sweep(VecDeque<Place>),
}

enum Waiting {
    Copyset(u64),
    Op(usize),
}

pub(crate) struct Client {
    me: usize,
    shape: Shape,
    history: Rc<RefCell<History>>,
    rng: Rng,
    plan: Plan,
    conn: Option<(ConnId, bool)>,
    inbox: BytesMut,
    paused: bool,
    copysets_left: VecDeque<u64>,
    waiting: BTreeMap<u64, Waiting>,
    answered: u64,
    next: u64,
    thinking: bool,
    pub(crate) finished: bool,
}

impl Client {
    pub(crate) fn random(me: usize, shape: &Shape, history: &Rc<RefCell<History>>, rng: Rng, ops: u64) -> Self {
        Self::new(me, shape, history, rng, Plan::Random(ops))
    }

    pub(crate) fn sweep(me: usize, shape: &Shape, history: &Rc<RefCell<History>>, rng: Rng) -> Self {
        let places = history.borrow().places().into();
        let mut this = Self::new(me, shape, history, rng, Plan::Sweep(places));
        this.copysets_left.clear();
        this
    }

    fn new(me: usize, shape: &Shape, history: &Rc<RefCell<History>>, rng: Rng, plan: Plan) -> Self {
        Self {
            me,
            shape: shape.clone(),
            history: Rc::clone(history),
            rng,
            plan,
            conn: None,
            inbox: BytesMut::new(),
            paused: false,
            copysets_left: (1..=shape.copysets).collect(),
            waiting: BTreeMap::new(),
            answered: 0,
            next: 16,
            thinking: false,
            finished: false,
        }
    }

    fn over(&self) -> bool {
        match &self.plan {
            Plan::Random(ops) => self.answered >= *ops && self.history.borrow().calm,
            Plan::Sweep(left) => left.is_empty(),
        }
    }

    fn reconnect(&mut self, world: &mut World) {
        self.inbox.clear();
        self.paused = false;
        for (_, waiting) in std::mem::take(&mut self.waiting) {
            self.unanswered(&waiting);
        }
        self.conn = Some((world.connect(self.me, 0, ListenerId(0)), false));
    }

    /// An operation that will not be answered.
    fn unanswered(&mut self, waiting: &Waiting) {
        match (waiting, &mut self.plan) {
            (Waiting::Copyset(id), _) => self.copysets_left.push_back(*id),
            (Waiting::Op(id), Plan::Sweep(left)) => left.push_back(self.history.borrow().records[*id].first),
            (Waiting::Op(_), Plan::Random(_)) => self.answered += 1,
        }
    }

    fn act(&mut self, world: &mut World) {
        let Some((conn, true)) = self.conn else { return };
        while self.waiting.len() < self.shape.depth && !self.over() {
            if let Some(id) = self.copysets_left.pop_front() {
                let body = codec::create_copyset(POOL, id, &self.shape.peer);
                self.call(world, conn, (COPYSET, "CreateCopysetNode2"), (&body, &[]), Waiting::Copyset(id));
            } else if !self.waiting.values().any(|w| matches!(w, Waiting::Copyset(_))) {
                self.operate(world, conn);
                if matches!(self.plan, Plan::Random(_)) && !self.rng.ppm(400_000) {
                    break;
                }
            } else {
                break;
            }
        }
        if !self.over() && !self.thinking {
            self.thinking = true;
            let pause = self.rng.skewed(50_000, 16_000_000);
            world.tell_at(world.now() + pause, self.me, ActorEvent::Timer(THINK));
        }
    }

    fn choose(&mut self) -> (Kind, Place, u64) {
        if let Plan::Sweep(left) = &mut self.plan {
            let place = left.pop_front().unwrap_or(Place { copyset: 1, chunk: 1, block: 0 });
            return (Kind::Read, place, 1);
        }
        let copyset = self.rng.between(1, self.shape.copysets);
        let filling = self.history.borrow().filling;
        choose(&mut self.rng, copyset, self.shape.blocks, filling)
    }

    fn operate(&mut self, world: &mut World, conn: ConnId) {
        let (kind, first, blocks) = self.choose();
        let id = self.history.borrow().records.len();
        let (service, method, body, payload) = call_for(id, kind, first, blocks);
        let (client, start) = (self.me, world.stamp());
        let (outcome, end) = (Outcome::Unknown, u64::MAX);
        self.history.borrow_mut().records.push(Record {
            client,
            kind,
            first,
            blocks,
            start,
            end,
            outcome,
            seen: Vec::new(),
        });
        self.call(world, conn, (service, method), (&body, &payload), Waiting::Op(id));
    }

    fn call(&mut self, world: &mut World, conn: ConnId, to: (&str, &str), what: (&[u8], &[u8]), waiting: Waiting) {
        let correlation = self.next;
        self.next += 1;
        self.waiting.insert(correlation, waiting);
        world.send(self.me, conn, codec::request(to.0, to.1, correlation, what.0, what.1));
        let timeout = self.shape.timeout_ns + self.rng.below(self.shape.timeout_ns);
        world.tell_at(world.now() + timeout, self.me, ActorEvent::Timer(correlation));
    }

    fn readable(&mut self, world: &mut World, conn: ConnId) {
        if self.paused || self.conn != Some((conn, true)) {
            return;
        }
        loop {
            let limit = self.rng.between(1, 256 << 10) as usize;
            let bytes = world.receive(self.me, conn, limit);
            if bytes.is_empty() {
                break;
            }
            self.inbox.extend_from_slice(&bytes);
            if self.rng.ppm(2_000) {
                self.paused = true;
                self.history.borrow_mut().count("slow reader");
                let pause = self.rng.between(1_000_000, 300_000_000);
                world.tell_at(world.now() + pause, self.me, ActorEvent::Timer(RESUME));
                break;
            }
        }
        loop {
            match codec::cut(&mut self.inbox) {
                Ok(Some(frame)) => self.answer(world, &frame),
                Ok(None) => break,
                Err(why) => {
                    self.history.borrow_mut().violations.push(format!("client {}: bad frame: {why}", self.me));
                    break;
                }
            }
        }
        if self.rng.ppm(300_000) {
            self.act(world);
        }
    }

    fn answer(&mut self, world: &mut World, frame: &Frame) {
        // Late answers of operations that timed out find nobody.
        let Some(waiting) = self.waiting.remove(&frame.correlation) else { return };
        let Some(fields) = codec::fields(&frame.body) else {
            self.history.borrow_mut().violations.push("an answer that does not parse".into());
            return;
        };
        let status = codec::get_number(&fields, 1);
        match waiting {
            Waiting::Copyset(_) if frame.error == 0 && matches!(status, Some(0 | 1)) => {}
            Waiting::Copyset(id) if world.nodes[0].disk.exposed.lost(id) => {}
            Waiting::Copyset(_) => self.unanswered(&waiting),
            Waiting::Op(id) => {
                let status = if frame.error == 0 { status.unwrap_or(u64::MAX) } else { 1000 };
                let done = self.record(world, id, status, frame);
                match &mut self.plan {
                    Plan::Sweep(left) if !done => left.push_back(self.history.borrow().records[id].first),
                    _ => self.answered += 1,
                }
            }
        }
    }

    fn record(&mut self, world: &mut World, id: usize, status: u64, frame: &Frame) -> bool {
        let mut history = self.history.borrow_mut();
        history.count(status_name(status));
        let mut record = history.records[id].clone();
        record.end = world.stamp();
        record.outcome = match (status, record.kind) {
            (0, _) | (7, Kind::Zero | Kind::Delete) => Outcome::Done,
            (7, Kind::Read) => {
                record.seen = vec![0; record.blocks as usize];
                Outcome::Done
            }
            // No copyset, no space, invalid, overload, older version, fence: refused before anything happened.
            (4 | 5 | 6 | 9 | 10 | 12, _) => Outcome::NotDone,
            _ => Outcome::Unknown,
        };
        if status == 3 {
            rot::name_the_harmed(&mut world.nodes[0].disk);
        }
        let exposed = &mut world.nodes[0].disk.exposed;
        // Nobody may know any more of a copyset whose log is harmed, if it never held anything.
        let copyset = record.first.copyset;
        let forgotten = || exposed.everything || exposed.lost(copyset) && !history.holds(copyset);
        let harmed = status == 3 && exposed.explains(&record) || status == 6 && forgotten();
        if harmed {
            history.count("refused for what is harmed");
        } else if status == 3 {
            history.violations.push(format!("CRC_FAIL, but nothing rotted: {record:?}"));
        } else if record.outcome == Outcome::Done {
            exposed.heal(&record, record.end);
        }
        if status == 4 || status == 10 {
            history.violations.push(format!("a good request was refused with {status}: {record:?}"));
        }
        let versions = codec::fields(&frame.body).unwrap_or_default();
        if record.kind == Kind::Info && versions.iter().any(|&(field, v)| field == 3 && !matches!(v, Value::Number(1)))
        {
            history.violations.push(format!("a version nobody wrote with: {versions:?} for {record:?}"));
        }
        if record.kind == Kind::Read && status == 0 {
            if frame.attachment.len() as u64 != record.blocks * BLOCK as u64 {
                history.violations.push(format!("{} bytes for {record:?}", frame.attachment.len()));
            }
            record.seen = values_of(record.first, &frame.attachment, &mut history.violations);
        }
        let done = record.outcome == Outcome::Done || harmed;
        history.records[id] = record;
        done
    }

    fn timer(&mut self, world: &mut World, id: u64) {
        match id {
            THINK => {
                self.thinking = false;
                self.act(world);
            }
            RESUME => {
                self.paused = false;
                if let Some((conn, _)) = self.conn {
                    self.readable(world, conn);
                }
            }
            RECONNECT if self.conn.is_none() => self.reconnect(world),
            RECONNECT => {}
            correlation => {
                let Some(waiting) = self.waiting.remove(&correlation) else { return };
                self.history.borrow_mut().count("timeout");
                self.unanswered(&waiting);
                if let (Some((conn, _)), true) = (self.conn, self.rng.coin()) {
                    let reset = self.rng.coin();
                    world.close(self.me, conn, reset);
                    self.lost(world);
                }
                self.act(world);
            }
        }
    }

    fn lost(&mut self, world: &mut World) {
        self.conn = None;
        let pause = self.rng.between(100_000, 20_000_000);
        world.tell_at(world.now() + pause, self.me, ActorEvent::Timer(RECONNECT));
    }
}

impl Actor for Client {
    fn event(&mut self, world: &mut World, event: ActorEvent) {
        if self.finished {
            return;
        }
        match event {
            ActorEvent::Start => self.reconnect(world),
            ActorEvent::Timer(id) => self.timer(world, id),
            ActorEvent::Connected(conn) if self.conn == Some((conn, false)) => {
                self.conn = Some((conn, true));
                self.act(world);
            }
            ActorEvent::Readable(conn) => self.readable(world, conn),
            ActorEvent::Closed(conn) if self.conn.is_some_and(|(mine, _)| mine == conn) => {
                self.history.borrow_mut().count("connection lost");
                world.close(self.me, conn, false);
                self.lost(world);
            }
            ActorEvent::Connected(_) | ActorEvent::Closed(_) | ActorEvent::Tripped => {}
        }
        if self.over() && self.waiting.is_empty() {
            self.finished = true;
            if let Some((conn, _)) = self.conn.take() {
                world.close(self.me, conn, false);
            }
        } else if !self.thinking {
            self.act(world);
        }
    }

    fn done(&self) -> bool {
        self.finished
    }
}

/// What to do next with a copyset.
pub(crate) fn choose(rng: &mut Rng, copyset: u64, blocks_used: u64, filling: bool) -> (Kind, Place, u64) {
    if rng.ppm(if filling { 700_000 } else { 30_000 }) {
        let place = Place { copyset, chunk: FILLER + rng.below(40), block: 0 };
        let kind = if filling && rng.ppm(700_000) { Kind::Write } else { Kind::Delete };
        return (kind, place, 1);
    }
    let chunk = rng.between(1, MORTAL);
    let big = rng.ppm(40_000);
    let hot = if rng.ppm(850_000) { 6 } else { blocks_used };
    let block = if big { 0 } else { rng.below(hot) };
    let most = blocks_used - block;
    let blocks = if big { most } else { rng.skewed(1, 4).min(most) };
    let place = Place { copyset, chunk, block };
    match rng.below(100) {
        0..=1 if chunk == MORTAL => (Kind::Delete, place, 1),
        2..=9 if chunk == MORTAL => (Kind::Zero, place, blocks),
        10..=11 => (Kind::Info, place, 1),
        12..=54 => (Kind::Read, place, blocks),
        _ => (Kind::Write, place, blocks),
    }
}

/// A call as it goes on the wire: service, method, message, attachment.
pub(crate) type Call = (&'static str, &'static str, BytesMut, Vec<u8>);

/// The call for the operation that will be record `id` of the history.
pub(crate) fn call_for(id: usize, kind: Kind, first: Place, blocks: u64) -> Call {
    let mut request = ChunkRequest {
        op: 0,
        pool: POOL,
        copyset: first.copyset,
        chunk: first.chunk,
        offset: first.block * BLOCK as u64,
        size: blocks * BLOCK as u64,
        sn: 1,
    };
    let mut payload = Vec::new();
    let (service, method) = match kind {
        Kind::Write => {
            let place = |at| Place { block: first.block + at, ..first };
            (0..blocks).for_each(|at| stamp(place(at), History::value(id, at), &mut payload));
            request.op = 2;
            (CHUNK, "WriteChunk")
        }
        Kind::Read => {
            (request.op, request.sn) = (1, 0);
            (CHUNK, "ReadChunk")
        }
        Kind::Zero => {
            request.op = 2;
            (INTERNAL, "Zero")
        }
        Kind::Delete => {
            (request.offset, request.size) = (0, 0);
            (CHUNK, "DeleteChunk")
        }
        Kind::Info => return (CHUNK, "GetChunkInfo", info_request(first), payload),
    };
    (service, method, request.encode(), payload)
}

/// The values that a read returned; what is corrupt is noted.
pub(crate) fn values_of(first: Place, attachment: &[u8], violations: &mut Vec<String>) -> Vec<u64> {
    let value = |(at, block): (usize, &[u8])| {
        let place = Place { block: first.block + at as u64, ..first };
        unstamp(place, block).unwrap_or_else(|| {
            violations.push(format!("corrupt block {place:?}: {:02x?}", &block[..24]));
            u64::MAX
        })
    };
    attachment.chunks(BLOCK).enumerate().map(value).collect()
}

fn info_request(place: Place) -> BytesMut {
    let mut body = BytesMut::new();
    codec::number(&mut body, 1, POOL);
    codec::number(&mut body, 2, place.copyset);
    codec::number(&mut body, 3, place.chunk);
    body
}

pub(crate) fn status_name(status: u64) -> &'static str {
    const NAMES: [&str; 13] = [
        "SUCCESS",
        "REDIRECTED",
        "DISK_FAIL",
        "CRC_FAIL",
        "INVALID_REQUEST",
        "NOSPACE",
        "COPYSET_NOTEXIST",
        "CHUNK_NOTEXIST",
        "FAILURE_UNKNOWN",
        "OVERLOAD",
        "BACKWARD",
        "CHUNK_EXIST",
        "EPOCH_TOO_OLD",
    ];
    NAMES.get(status as usize).copied().unwrap_or("RPC error")
}
