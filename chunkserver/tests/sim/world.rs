//! The world: one virtual clock, one queue of events, nodes with a disk each, a network, and the `Io` each shard sees.
//!
//! Time moves only from event to event. `SimIo::turn` never blocks: it notes the deadline, starts what was queued and
//! returns what has completed; the loop in `Sim` calls a shard's program when something completed or its deadline came.
//! Order is (time, serial) and every choice is drawn from one generator, so a seed is a history. Nothing here knows what
//! a node runs.

use crate::canary::Canary;
use crate::disk::{Crash, Disk};
use crate::net::{Effect, Net, NetEvent, Owner};
use crate::rng::Rng;
use chunkserver::io::{Completion, ConnId, Done, Instant, Io, ListenerId, Op, ShardId, Token};
use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

pub(crate) type Shared = Rc<RefCell<World>>;

/// Whose operation it is: a shard of one life of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Route {
    pub(crate) node: usize,
    pub(crate) shard: u16,
    pub(crate) life: u64,
    pub(crate) token: Token,
}

/// What actors (clients, the nemesis) are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ActorEvent {
    Start,
    Timer(u64),
    Connected(ConnId),
    Readable(ConnId),
    /// Refused, ended or reset.
    Closed(ConnId),
    /// The disk operation waited for with [`World::trip_after`] was started.
    Tripped,
}

/// What actors want done to nodes; carried out between two events.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Command {
    Crash(usize, Crash),
    Boot(usize),
}

#[derive(Debug)]
enum Event {
    Disk { node: usize, id: u64 },
    Net(NetEvent),
    Complete(Route, Done),
    Turn { node: usize, shard: u16, life: u64, serial: u64 },
    Tell(usize, ActorEvent),
}

/// What the loop has to run next.
pub(crate) enum Next {
    Turn(usize, u16),
    Tell(usize, ActorEvent),
    /// Something inside the world happened.
    Nothing,
    /// No event is left.
    End,
}

#[derive(Default)]
struct Port {
    queued: VecDeque<(Token, Op)>,
    ready: Vec<Completion>,
    deadline: u64,
    /// The last turn had something to do, so its deadline may be out of date.
    busy: bool,
    turn_at: u64,
    turn_serial: u64,
    /// It has used its disk in this life.
    disk_used: bool,
}

pub(crate) struct Node {
    pub(crate) disk: Disk,
    pub(crate) up: bool,
    life: u64,
    ports: Vec<Port>,
    /// No shard gets a turn before this: the process is stopped, or starved.
    paused_until: u64,
    /// What its clock shows beyond the world's. It counts suspension, so it jumps ahead; it starts anew with the power.
    clock_ahead: i64,
    /// How much faster than the world's it runs, parts per million, and since when.
    drift: (i64, u64),
    /// Who is told after how many more disk operations.
    trip: Option<(usize, u64)>,
}

pub(crate) struct World {
    now: u64,
    serial: u64,
    queue: BTreeMap<(u64, u64), Event>,
    pub(crate) rng: Rng,
    pub(crate) nodes: Vec<Node>,
    pub(crate) net: Net,
    pub(crate) commands: Vec<Command>,
    /// Running hash of every event: two runs with one hash did the same.
    pub(crate) trace: u64,
    pub(crate) turns: u64,
    /// A bug planted below the server.
    pub(crate) canary: Option<Canary>,
}

fn mix(hash: u64, value: u64) -> u64 {
    (hash ^ value).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23)
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            now: 1_000_000_000,
            serial: 0,
            queue: BTreeMap::new(),
            rng: Rng::new(seed),
            nodes: Vec::new(),
            net: Net::default(),
            commands: Vec::new(),
            trace: 0xcbf2_9ce4_8422_2325,
            turns: 0,
            canary: None,
        }
    }

    pub(crate) fn now(&self) -> u64 {
        self.now
    }

    /// A point in the total order of everything that happens.
    pub(crate) fn stamp(&mut self) -> u64 {
        self.serial += 1;
        self.serial
    }

    /// Fold something into the trace hash.
    pub(crate) fn note(&mut self, value: u64) {
        self.trace = mix(self.trace, value);
    }

    pub(crate) fn add_node(&mut self, disk: Disk) -> usize {
        self.nodes.push(Node {
            disk,
            up: false,
            life: 0,
            ports: Vec::new(),
            paused_until: 0,
            clock_ahead: 0,
            drift: (0, 0),
            trip: None,
        });
        self.nodes.len() - 1
    }

    fn push(&mut self, at: u64, event: Event) {
        self.serial += 1;
        self.queue.insert((at.max(self.now), self.serial), event);
    }

    pub(crate) fn tell_at(&mut self, at: u64, actor: usize, event: ActorEvent) {
        self.push(at, Event::Tell(actor, event));
    }

    /// Tell `actor` when the `count`-th disk operation from now is started on `node`.
    pub(crate) fn trip_after(&mut self, node: usize, actor: usize, count: u64) {
        self.nodes[node].trip = Some((actor, count.max(1)));
    }

    /// Stop a node's programs for a while; disk, network and clock go on.
    pub(crate) fn pause(&mut self, node: usize, ns: u64) {
        self.nodes[node].paused_until = self.now + ns;
    }

    /// A node's clock jumps ahead, as after a suspension.
    pub(crate) fn jump(&mut self, node: usize, ns: u64) {
        self.nodes[node].clock_ahead += ns as i64;
    }

    /// From now on a node's clock runs faster than the world's by `ppm` parts per million.
    pub(crate) fn drift(&mut self, node: usize, ppm: i64) {
        let ahead = self.drifted(node);
        let node = &mut self.nodes[node];
        node.clock_ahead += ahead;
        node.drift = (ppm, self.now);
    }

    fn drifted(&self, node: usize) -> i64 {
        let (ppm, since) = self.nodes[node].drift;
        ((self.now - since) as i64 / 1_000) * ppm / 1_000
    }

    /// What a node's clock shows.
    fn node_now(&self, node: usize) -> Instant {
        Instant(self.now.wrapping_add_signed(self.nodes[node].clock_ahead + self.drifted(node)))
    }

    /// When a node's clock will show `time`, if it does not jump.
    fn when(&self, node: usize, time: Instant) -> u64 {
        if time == Instant::FAR {
            return u64::MAX;
        }
        let (left, ppm) = (time.since_ns(self.node_now(node)), self.nodes[node].drift.0);
        self.now + if ppm == 0 { left } else { left.saturating_mul(1_000_000) / (1_000_000 + ppm) as u64 + 2_000 }
    }

    /// Forget the trip wire; true if there was one.
    pub(crate) fn untrip(&mut self, node: usize) -> bool {
        self.nodes[node].trip.take().is_some()
    }

    /// Whether the trip wire still waits.
    pub(crate) fn armed(&self, node: usize) -> bool {
        self.nodes[node].trip.is_some()
    }

    /// Do what the network asked for.
    fn settle(&mut self) {
        for effect in std::mem::take(&mut self.net.out) {
            match effect {
                Effect::Complete(route, done) => {
                    let at = self.now + self.rng.below(2_000);
                    self.push(at, Event::Complete(route, done));
                }
                Effect::Tell(actor, event) => self.push(self.now, Event::Tell(actor, event)),
                Effect::At(at, event) => self.push(at, Event::Net(event)),
            }
        }
    }

    pub(crate) fn connect(&mut self, actor: usize, node: usize, listener: ListenerId) -> ConnId {
        let conn = self.net.connect(self.now, &mut self.rng, actor, node, listener);
        self.settle();
        conn
    }

    pub(crate) fn send(&mut self, actor: usize, conn: ConnId, data: bytes::Bytes) {
        self.net.send(self.now, &mut self.rng, Owner::Actor(actor), None, conn, VecDeque::from([data]));
        self.settle();
    }

    pub(crate) fn receive(&mut self, actor: usize, conn: ConnId, max: usize) -> bytes::Bytes {
        let bytes = self.net.take(self.now, &mut self.rng, actor, conn, max);
        self.settle();
        bytes
    }

    pub(crate) fn close(&mut self, actor: usize, conn: ConnId, reset: bool) {
        self.net.close(self.now, &mut self.rng, Owner::Actor(actor), conn, reset);
        self.settle();
    }

    /// Nothing of `from` reaches `to` until [`Self::unblock`].
    pub(crate) fn block(&mut self, from: usize, to: usize) {
        self.net.block(from, to);
    }

    pub(crate) fn unblock(&mut self, pairs: &[(usize, usize)]) {
        self.net.unblock(self.now, &mut self.rng, pairs);
        self.settle();
    }

    pub(crate) fn cut(&mut self, conn: ConnId) {
        self.net.cut(self.now, &mut self.rng, conn);
        self.settle();
    }

    /// A node begins a life with this many shards and listeners `0..listeners`; its programs are made by the caller.
    pub(crate) fn boot(&mut self, node: usize, shards: u16, listeners: u32) -> u64 {
        let this = &mut self.nodes[node];
        assert!(!this.up, "node {node} is up already");
        (this.up, this.paused_until) = (true, 0);
        this.life += 1;
        this.ports = (0..shards).map(|_| Port { turn_at: u64::MAX, ..Port::default() }).collect();
        let life = this.life;
        (0..listeners).for_each(|id| self.net.listen(node, ListenerId(id)));
        (0..shards).for_each(|shard| self.wake(node, shard, self.now));
        life
    }

    pub(crate) fn crash(&mut self, node: usize, crash: Crash) {
        let this = &mut self.nodes[node];
        this.up = false;
        this.life += 1;
        this.ports.clear();
        this.disk.crash(crash, &mut self.rng);
        if crash == Crash::Power {
            let uptime = self.rng.between(1_000_000_000, 100_000_000_000);
            (this.clock_ahead, this.drift) = (uptime as i64 - self.now as i64, (0, self.now));
        }
        self.net.crash(self.now, &mut self.rng, node);
        self.settle();
    }

    /// See that a shard gets a turn at `at` or before.
    fn wake(&mut self, node: usize, shard: u16, at: u64) {
        let at = at.max(self.now).saturating_add(200 + self.rng.below(3_000));
        let life = self.nodes[node].life;
        let Some(port) = self.nodes[node].ports.get_mut(usize::from(shard)) else { return };
        if port.turn_at <= at {
            return;
        }
        port.turn_at = at;
        port.turn_serial += 1;
        let serial = port.turn_serial;
        self.push(at, Event::Turn { node, shard, life, serial });
    }

    fn complete(&mut self, route: Route, done: Done) {
        let node = &mut self.nodes[route.node];
        if node.life != route.life || !node.up {
            return;
        }
        if let Some(port) = node.ports.get_mut(usize::from(route.shard)) {
            port.ready.push(Completion { token: route.token, done });
            self.wake(route.node, route.shard, self.now);
        }
    }

    /// Take the next event and do the world's part of it.
    pub(crate) fn step(&mut self) -> Next {
        let Some(((at, serial), event)) = self.queue.pop_first() else { return Next::End };
        self.now = at;
        self.note(at ^ serial.rotate_left(32));
        match event {
            Event::Disk { node, id } => {
                self.nodes[node].disk.exposed.now = self.serial;
                if let Some((route, done)) = self.nodes[node].disk.finish(id, &mut self.rng) {
                    self.complete(route, done);
                }
            }
            Event::Net(event) => {
                self.net.event(at, &mut self.rng, event);
                self.settle();
            }
            Event::Complete(route, done) => self.complete(route, done),
            Event::Tell(actor, event) => return Next::Tell(actor, event),
            Event::Turn { node, shard, life, serial } => {
                let this = &mut self.nodes[node];
                if this.paused_until > at {
                    let until = this.paused_until;
                    self.push(until, Event::Turn { node, shard, life, serial });
                    return Next::Nothing;
                }
                let port = this.ports.get_mut(usize::from(shard));
                if let Some(port) = port.filter(|port| this.life == life && port.turn_serial == serial) {
                    port.turn_at = u64::MAX;
                    self.turns += 1;
                    return Next::Turn(node, shard);
                }
            }
        }
        Next::Nothing
    }

    /// After a program's turn: when must it run again?
    pub(crate) fn after_turn(&mut self, node: usize, shard: u16) {
        let now = self.now;
        let Some(port) = self.nodes[node].ports.get_mut(usize::from(shard)) else { return };
        let busy = std::mem::take(&mut port.busy) || !port.queued.is_empty() || !port.ready.is_empty();
        let at = if busy { now } else { port.deadline };
        if at != u64::MAX {
            self.wake(node, shard, at);
        }
    }

    fn start(&mut self, route: Route, op: Op) {
        let (now, owner) = (self.now, Owner::Node(route.node));
        match op {
            Op::Read { .. } | Op::Write { .. } | Op::Sync { .. } => self.start_disk(route, op),
            Op::Accept { listener } => self.net.accept(&mut self.rng, route, listener),
            Op::Connect { address, timeout_ms } => {
                self.net.dial(now, &mut self.rng, route, &address, u64::from(timeout_ms) * 1_000_000);
            }
            Op::Recv { conn } => self.net.recv(now, &mut self.rng, route, conn, None),
            Op::RecvInto { conn, buf, filled } => self.net.recv(now, &mut self.rng, route, conn, Some((buf, filled))),
            Op::Send { conn, bufs } => {
                self.net.send(now, &mut self.rng, owner, Some(route), conn, bufs.into_iter().collect());
            }
            Op::Close { conn } => {
                self.net.close(now, &mut self.rng, owner, conn, false);
                self.push(now + 500, Event::Complete(route, Done::Close));
            }
            Op::Wake { shard: ShardId(shard) } => {
                let at = now + self.rng.between(200, 5_000);
                self.push(at, Event::Complete(Route { shard, token: Token(0), ..route }, Done::Wake));
            }
        }
        self.settle();
    }

    fn start_disk(&mut self, route: Route, op: Op) {
        let used = self.nodes[route.node].ports.get_mut(usize::from(route.shard)).map(|port| &mut port.disk_used);
        let first = used.is_some_and(|used| !std::mem::replace(used, true));
        let (there, here) = match self.canary {
            Some(canary) => canary.bend(route, op, first),
            None => (Some((route, op)), None),
        };
        if let Some(done) = here {
            self.push(self.now, Event::Complete(route, done));
        }
        let Some((route, op)) = there else { return };
        let node = &mut self.nodes[route.node];
        let (id, latency) = node.disk.start(route, op, &mut self.rng);
        let tripped = match &mut node.trip {
            Some((actor, left)) => {
                *left -= 1;
                (*left == 0).then_some(*actor)
            }
            None => None,
        };
        if let Some(actor) = tripped {
            node.trip = None;
            let at = self.now + self.rng.below(latency + latency / 2);
            self.push(at, Event::Tell(actor, ActorEvent::Tripped));
        }
        self.push(self.now + latency, Event::Disk { node: route.node, id });
    }
}

/// One shard's kernel.
pub(crate) struct SimIo {
    world: Shared,
    node: usize,
    shard: u16,
    life: u64,
    now: Instant,
}

impl SimIo {
    pub(crate) fn new(world: &Shared, node: usize, shard: u16, life: u64) -> Self {
        let now = world.borrow().node_now(node);
        Self { world: Rc::clone(world), node, shard, life, now }
    }
}

impl Io for SimIo {
    fn now(&self) -> Instant {
        self.now
    }

    fn submit(&mut self, token: Token, op: Op) {
        let node = &mut self.world.borrow_mut().nodes[self.node];
        if node.life == self.life {
            node.ports[usize::from(self.shard)].queued.push_back((token, op));
        }
    }

    fn turn(&mut self, deadline: Instant, out: &mut Vec<Completion>) {
        let world = &mut *self.world.borrow_mut();
        let (node, shard, life) = (self.node, self.shard, self.life);
        self.now = world.node_now(node);
        if world.nodes[node].life != life {
            return;
        }
        let queued = std::mem::take(&mut world.nodes[node].ports[usize::from(shard)].queued);
        for (token, op) in queued {
            world.start(Route { node, shard, life, token }, op);
        }
        let deadline = world.when(node, deadline);
        let port = &mut world.nodes[node].ports[usize::from(shard)];
        world.rng.shuffle(&mut port.ready);
        port.busy |= !port.ready.is_empty() || deadline <= world.now;
        port.deadline = deadline;
        out.append(&mut port.ready);
    }
}
