//! A client of replicated copysets: it asks whom it believes to lead, and follows what it is told.
//!
//! Every operation is tried once, so that each is a line of the history; what a redirected write comes to is unknown,
//! for a later leader may find it in its log. A client that sweeps reads a list of blocks, each until it is answered.

use crate::client::{FILLER, call_for, choose, status_name, values_of};
use crate::codec::{self, Frame, Value};
use crate::history::{BLOCK, History, Kind, Outcome, Place, Record};
use crate::node;
use crate::rng::Rng;
use crate::rot;
use crate::run::Actor;
use crate::world::{ActorEvent, World};
use bytes::BytesMut;
use chunkserver::io::{ConnId, ListenerId};
use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

const THINK: u64 = 0;

#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) nodes: usize,
    pub(crate) copysets: u64,
    pub(crate) depth: usize,
    /// Blocks per chunk that are used.
    pub(crate) blocks: u64,
    pub(crate) timeout_ns: u64,
}

enum Plan {
    /// So many operations that are answered, and on until the nemesis is done.
    Random(u64),
    /// Each of these until it is answered.
    Sweep(VecDeque<(Kind, Place)>),
}

#[derive(Default)]
pub(crate) struct Link {
    pub(crate) conn: Option<(ConnId, bool)>,
    inbox: BytesMut,
}

/// Connections to every node.
pub(crate) struct Links(Vec<Link>);

impl Links {
    pub(crate) fn new(nodes: usize) -> Self {
        Self((0..nodes).map(|_| Link::default()).collect())
    }

    /// The connection to a node, if it stands; else one is begun.
    pub(crate) fn ready(&mut self, world: &mut World, me: usize, node: usize) -> Option<ConnId> {
        let link = &mut self.0[node];
        if link.conn.is_none() {
            link.inbox.clear();
            link.conn = Some((world.connect(me, node, ListenerId(0)), false));
        }
        link.conn.filter(|(_, ready)| *ready).map(|(conn, _)| conn)
    }

    pub(crate) fn node_of(&self, conn: ConnId) -> Option<usize> {
        self.0.iter().position(|link| link.conn.is_some_and(|(mine, _)| mine == conn))
    }

    pub(crate) fn connected(&mut self, conn: ConnId) {
        if let Some(node) = self.node_of(conn) {
            self.0[node].conn = Some((conn, true));
        }
    }

    /// Whose connection it was.
    pub(crate) fn closed(&mut self, world: &mut World, me: usize, conn: ConnId) -> Option<usize> {
        let node = self.node_of(conn)?;
        world.close(me, conn, false);
        self.0[node].conn = None;
        Some(node)
    }

    pub(crate) fn close(&mut self, world: &mut World, me: usize, node: usize, reset: bool) {
        if let Some((conn, _)) = self.0[node].conn.take() {
            world.close(me, conn, reset);
        }
    }

    /// Whole frames that have arrived.
    pub(crate) fn receive(&mut self, world: &mut World, me: usize, conn: ConnId) -> Result<Vec<Frame>, &'static str> {
        let Some(node) = self.node_of(conn) else { return Ok(Vec::new()) };
        let (inbox, mut frames) = (&mut self.0[node].inbox, Vec::new());
        loop {
            let bytes = world.receive(me, conn, 256 << 10);
            if bytes.is_empty() {
                break;
            }
            inbox.extend_from_slice(&bytes);
        }
        while let Some(frame) = codec::cut(inbox)? {
            frames.push(frame);
        }
        Ok(frames)
    }
}

/// The node that a replica's name belongs to.
pub(crate) fn node_of(name: &[u8], nodes: usize) -> Option<usize> {
    (0..nodes).find(|&node| node::peer(node).to_string().as_bytes() == name)
}

pub(crate) struct Client {
    me: usize,
    shape: Shape,
    history: Rc<RefCell<History>>,
    rng: Rng,
    plan: Plan,
    links: Links,
    /// Who is believed to lead each copyset, and before when it is not worth asking.
    leaders: Vec<(usize, u64)>,
    /// By correlation id: the operation and whom it was asked of.
    waiting: BTreeMap<u64, (usize, usize)>,
    answered: u64,
    next: u64,
    thinking: bool,
    finished: bool,
}

impl Client {
    pub(crate) fn random(me: usize, shape: &Shape, history: &Rc<RefCell<History>>, rng: Rng, ops: u64) -> Self {
        Self::new(me, shape, history, rng, Plan::Random(ops))
    }

    pub(crate) fn sweep(me: usize, shape: &Shape, history: &Rc<RefCell<History>>, rng: Rng) -> Self {
        let reads = history.borrow().places().into_iter().map(|place| (Kind::Read, place)).collect();
        Self::new(me, shape, history, rng, Plan::Sweep(reads))
    }

    /// Delete what was only there to fill the disk: a replica that is short of slots cannot come to agree.
    pub(crate) fn clean(me: usize, shape: &Shape, history: &Rc<RefCell<History>>, rng: Rng) -> Self {
        let fillers = history.borrow().places().into_iter().filter(|place| place.chunk >= FILLER);
        let deletes = fillers.map(|place| (Kind::Delete, place)).collect();
        Self::new(me, shape, history, rng, Plan::Sweep(deletes))
    }

    fn new(me: usize, shape: &Shape, history: &Rc<RefCell<History>>, mut rng: Rng, plan: Plan) -> Self {
        let leaders = (0..=shape.copysets).map(|_| (rng.below(shape.nodes as u64) as usize, 0)).collect();
        Self {
            me,
            shape: shape.clone(),
            history: Rc::clone(history),
            rng,
            plan,
            links: Links::new(shape.nodes),
            leaders,
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

    /// An operation that will not be answered, or not usefully.
    fn unanswered(&mut self, id: usize) {
        if let Plan::Sweep(left) = &mut self.plan {
            let record = &self.history.borrow().records[id];
            left.push_back((record.kind, record.first));
        }
    }

    fn act(&mut self, world: &mut World) {
        while self.waiting.len() < self.shape.depth && !self.over() {
            if !self.operate(world) || matches!(self.plan, Plan::Random(_)) && !self.rng.ppm(400_000) {
                break;
            }
        }
        if !self.thinking {
            self.thinking = true;
            let pause = self.rng.skewed(50_000, 16_000_000);
            world.tell_at(world.now() + pause, self.me, ActorEvent::Timer(THINK));
        }
    }

    fn choose(&mut self) -> (Kind, Place, u64) {
        if let Plan::Sweep(left) = &mut self.plan {
            let (kind, place) = left.pop_front().unwrap_or((Kind::Read, Place { copyset: 1, chunk: 1, block: 0 }));
            return (kind, place, 1);
        }
        let copyset = self.rng.between(1, self.shape.copysets);
        let filling = self.history.borrow().filling;
        choose(&mut self.rng, copyset, self.shape.blocks, filling)
    }

    /// Begin one more operation; false if that is not possible now.
    fn operate(&mut self, world: &mut World) -> bool {
        let (kind, first, blocks) = self.choose();
        let (node, not_before) = self.leaders[first.copyset as usize];
        let ready = if not_before > world.now() { None } else { self.links.ready(world, self.me, node) };
        let Some(conn) = ready else {
            if let Plan::Sweep(left) = &mut self.plan {
                left.push_back((kind, first));
            }
            return false;
        };
        let id = self.history.borrow().records.len();
        let (service, method, body, payload) = call_for(id, kind, first, blocks);
        let (client, start) = (self.me, world.stamp());
        let (outcome, end, seen) = (Outcome::Unknown, u64::MAX, Vec::new());
        self.history.borrow_mut().records.push(Record { client, kind, first, blocks, start, end, outcome, seen });
        let correlation = self.next;
        self.next += 1;
        self.waiting.insert(correlation, (id, node));
        world.send(self.me, conn, codec::request(service, method, correlation, &body, &payload));
        let timeout = self.shape.timeout_ns + self.rng.below(self.shape.timeout_ns);
        world.tell_at(world.now() + timeout, self.me, ActorEvent::Timer(correlation));
        true
    }

    /// Whom to ask next of a copyset that `node` does not lead; `hint`: who does, it says.
    fn elsewhere(&mut self, world: &World, copyset: u64, node: usize, hint: Option<usize>) {
        let other = hint.filter(|&hint| hint != node);
        let pause = if other.is_some() { 0 } else { self.rng.between(1_000_000, 40_000_000) };
        let next = other.unwrap_or_else(|| self.rng.below(self.shape.nodes as u64) as usize);
        self.leaders[copyset as usize] = (next, world.now() + pause);
    }

    fn answer(&mut self, world: &mut World, frame: &Frame) {
        // Late answers of operations that timed out find nobody.
        let Some((id, node)) = self.waiting.remove(&frame.correlation) else { return };
        let Some(fields) = codec::fields(&frame.body) else {
            self.history.borrow_mut().violations.push("an answer that does not parse".into());
            return;
        };
        let status = if frame.error == 0 { codec::get_number(&fields, 1).unwrap_or(u64::MAX) } else { 1000 };
        if self.record(world, id, status, frame) {
            self.answered += 1;
            return;
        }
        self.unanswered(id);
        let copyset = self.history.borrow().records[id].first.copyset;
        let hint = codec::get_bytes(&fields, 2).and_then(|name| node_of(name, self.shape.nodes));
        match status {
            0 | 5 => {}
            1 => self.elsewhere(world, copyset, node, hint),
            _ => self.elsewhere(world, copyset, node, None),
        }
    }

    /// Note what an answer promises; true if that ends the operation.
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
            (1, Kind::Read | Kind::Info) | (4 | 5 | 6 | 9 | 10 | 12, _) => Outcome::NotDone,
            _ => Outcome::Unknown,
        };
        if status == 3 && !explained(world, &record) {
            history.violations.push(format!("CRC_FAIL, but nothing rotted: {record:?}"));
        }
        if record.outcome == Outcome::Done {
            world.nodes.iter_mut().for_each(|node| node.disk.exposed.heal(&record, record.end));
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
        let done = record.outcome == Outcome::Done || status == 5;
        history.records[id] = record;
        done
    }

    fn timer(&mut self, world: &mut World, id: u64) {
        if id == THINK {
            self.thinking = false;
        } else if let Some((op, node)) = self.waiting.remove(&id) {
            self.history.borrow_mut().count("timeout");
            self.unanswered(op);
            let copyset = self.history.borrow().records[op].first.copyset;
            self.elsewhere(world, copyset, node, None);
            if self.rng.ppm(300_000) {
                let reset = self.rng.coin();
                self.links.close(world, self.me, node, reset);
                self.lost(node);
            }
        }
    }

    fn lost(&mut self, node: usize) {
        let gone: Vec<u64> = self.waiting.iter().filter(|(_, w)| w.1 == node).map(|(&id, _)| id).collect();
        for (op, _) in gone.iter().filter_map(|id| self.waiting.remove(id)).collect::<Vec<_>>() {
            self.unanswered(op);
        }
    }

    fn closed(&mut self, world: &mut World, conn: ConnId) {
        let Some(node) = self.links.closed(world, self.me, conn) else { return };
        self.history.borrow_mut().count("connection lost");
        self.lost(node);
        for copyset in 1..=self.shape.copysets {
            if self.leaders[copyset as usize].0 == node {
                self.elsewhere(world, copyset, node, None);
            }
        }
    }
}

/// Whether what some disk did makes CRC_FAIL a legal answer.
fn explained(world: &mut World, record: &Record) -> bool {
    world.nodes.iter_mut().any(|node| {
        rot::name_the_harmed(&mut node.disk);
        node.disk.exposed.explains(record)
    })
}

impl Actor for Client {
    fn event(&mut self, world: &mut World, event: ActorEvent) {
        if self.finished {
            return;
        }
        match event {
            ActorEvent::Timer(id) => self.timer(world, id),
            ActorEvent::Connected(conn) => self.links.connected(conn),
            ActorEvent::Readable(conn) => match self.links.receive(world, self.me, conn) {
                Ok(frames) => frames.iter().for_each(|frame| self.answer(world, frame)),
                Err(why) => self.history.borrow_mut().violations.push(format!("client {}: bad frame: {why}", self.me)),
            },
            ActorEvent::Closed(conn) => self.closed(world, conn),
            ActorEvent::Start | ActorEvent::Tripped => {}
        }
        if self.over() && self.waiting.is_empty() {
            self.finished = true;
            (0..self.shape.nodes).for_each(|node| self.links.close(world, self.me, node, false));
        } else if !self.thinking {
            self.act(world);
        }
    }

    fn done(&self) -> bool {
        self.finished
    }
}
