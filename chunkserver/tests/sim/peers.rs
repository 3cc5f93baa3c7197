//! Three nodes whose shards talk over the simulated network: writes go on while connections between them break, one of
//! them is slow, stops for a while or is killed.

use crate::codec::{self, ChunkRequest, Frame};
use crate::disk::Crash;
use crate::net::Faults;
use crate::node::{ServerSystem, peer};
use crate::run::{Actor, Sim};
use crate::world::{ActorEvent, Command, World};
use bytes::{Bytes, BytesMut};
use chunkserver::io::{ConnId, ListenerId};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

const NODES: usize = 3;
const COPYSETS: u64 = 3;
const BLOCK: u64 = 4096;
const OPS: u64 = 200;
const CREATE: u64 = 1 << 32;
const AGAIN: u64 = 1 << 33;
const MS: u64 = 1_000_000;

#[derive(Default)]
struct Count {
    acked: u64,
    retries: u64,
    cuts: usize,
    faults: BTreeMap<&'static str, u64>,
}

/// One client with one write at a time, which also makes the trouble.
struct Writer {
    me: usize,
    conns: [Option<(ConnId, bool, BytesMut)>; NODES],
    created: u64,
    /// Where each copyset's leader was last.
    leaders: [usize; COPYSETS as usize],
    next: u64,
    /// Correlation id of the write under way, and of the timer that gives it up.
    waits: u64,
    serial: u64,
    down: Option<usize>,
    count: Rc<RefCell<Count>>,
}

impl Writer {
    fn new(me: usize, count: &Rc<RefCell<Count>>) -> Self {
        let (conns, leaders) = (Default::default(), [0; COPYSETS as usize]);
        Self { me, conns, created: 0, leaders, next: 0, waits: 0, serial: 0, down: None, count: Rc::clone(count) }
    }

    fn connect(&mut self, world: &mut World, node: usize) {
        let conn = world.connect(self.me, node, ListenerId(0));
        self.conns[node] = Some((conn, false, BytesMut::new()));
    }

    fn create(&self, world: &mut World, conn: ConnId) {
        let peers: Vec<String> = (0..NODES).map(|node| peer(node).to_string()).collect();
        for copyset in 1..=COPYSETS {
            let body = codec::create_copyset_of(1, copyset, &peers);
            let frame =
                codec::request("curve.chunkserver.CopysetService", "CreateCopysetNode2", CREATE + copyset, &body, &[]);
            world.send(self.me, conn, frame);
        }
    }

    fn copyset(&self) -> usize {
        (self.next % COPYSETS) as usize
    }

    /// Send the write that is due to whom we think leads.
    fn write(&mut self, world: &mut World) {
        if self.done() {
            return;
        }
        let node = self.leaders[self.copyset()];
        self.serial += 1;
        self.waits = self.serial;
        world.tell_at(world.now() + 600 * MS, self.me, ActorEvent::Timer(self.serial));
        let blocks = 1 + self.next % 40;
        let request = ChunkRequest {
            op: 2,
            pool: 1,
            copyset: self.copyset() as u64 + 1,
            chunk: 1,
            offset: self.next % 20 * BLOCK,
            size: blocks * BLOCK,
            sn: 1,
        };
        let data = vec![self.next as u8; (blocks * BLOCK) as usize];
        match &self.conns[node] {
            Some((conn, true, _)) => {
                let service = "curve.chunkserver.ChunkService";
                let frame = codec::request(service, "WriteChunk", self.serial, &request.encode(), &data);
                world.send(self.me, *conn, frame);
            }
            Some(_) => {}
            None => self.connect(world, node),
        }
    }

    /// The write was not done there.
    fn elsewhere(&mut self, world: &mut World) {
        let at = self.copyset();
        self.leaders[at] = (self.leaders[at] + 1) % NODES;
        self.count.borrow_mut().retries += 1;
        self.waits = 0;
        world.tell_at(world.now() + 30 * MS, self.me, ActorEvent::Timer(AGAIN));
    }

    fn answer(&mut self, world: &mut World, frame: &Frame) {
        let fields = codec::fields(&frame.body).expect("a message");
        let status = codec::get_number(&fields, 1).unwrap_or(u64::MAX);
        if frame.correlation >= CREATE {
            assert!(status <= 1, "copysets are created, or exist: {status}");
            self.created += 1;
            if self.created == COPYSETS * NODES as u64 {
                self.write(world);
            }
        } else if frame.correlation == self.waits {
            if frame.error != 0 || status != 0 {
                return self.elsewhere(world);
            }
            self.next += 1;
            self.count.borrow_mut().acked += 1;
            if self.next.is_multiple_of(8) {
                self.trouble(world);
            }
            self.write(world);
        }
    }

    fn trouble(&mut self, world: &mut World) {
        if let Some(node) = self.down.take() {
            world.commands.push(Command::Boot(node));
        }
        world.net.faults = Faults::default();
        let node = world.rng.below(NODES as u64) as usize;
        let kind = match world.rng.below(4) {
            0 => {
                let all = world.net.between_nodes();
                let some: Vec<ConnId> = all.into_iter().filter(|_| world.rng.coin()).collect();
                self.count.borrow_mut().cuts += some.len();
                some.into_iter().for_each(|conn| world.cut(conn));
                "cut"
            }
            1 => {
                world.net.faults.slower = world.rng.below(30);
                "slow"
            }
            2 => {
                let ns = world.rng.between(50, 3_000) * MS;
                world.pause(node, ns);
                "pause"
            }
            _ => {
                world.commands.push(Command::Crash(node, Crash::Power));
                self.down = Some(node);
                "crash"
            }
        };
        *self.count.borrow_mut().faults.entry(kind).or_default() += 1;
    }

    fn readable(&mut self, world: &mut World, conn: ConnId) {
        let mut frames = Vec::new();
        for (found, _, inbox) in self.conns.iter_mut().flatten().filter(|entry| entry.0 == conn) {
            loop {
                let bytes: Bytes = world.receive(self.me, *found, 1 << 20);
                if bytes.is_empty() {
                    break;
                }
                inbox.extend_from_slice(&bytes);
            }
            while let Some(frame) = codec::cut(inbox).expect("frames") {
                frames.push(frame);
            }
        }
        frames.iter().for_each(|frame| self.answer(world, frame));
    }
}

impl Actor for Writer {
    fn event(&mut self, world: &mut World, event: ActorEvent) {
        match event {
            ActorEvent::Start => (0..NODES).for_each(|node| self.connect(world, node)),
            ActorEvent::Connected(conn) => {
                for entry in self.conns.iter_mut().flatten().filter(|entry| entry.0 == conn) {
                    entry.1 = true;
                }
                if self.created < COPYSETS * NODES as u64 {
                    self.create(world, conn);
                }
            }
            ActorEvent::Readable(conn) => self.readable(world, conn),
            ActorEvent::Closed(conn) => {
                self.readable(world, conn);
                world.close(self.me, conn, false);
                self.conns.iter_mut().filter(|c| c.as_ref().is_some_and(|c| c.0 == conn)).for_each(|c| *c = None);
            }
            ActorEvent::Timer(AGAIN) => self.write(world),
            ActorEvent::Timer(serial) if serial == self.waits => self.elsewhere(world),
            ActorEvent::Timer(_) | ActorEvent::Tripped => {}
        }
    }
    fn done(&self) -> bool {
        self.next >= OPS
    }
}

fn run(seed: u64) -> (Count, u64, BTreeMap<String, u64>) {
    let mut sim = Sim::new(seed, Box::new(ServerSystem), NODES);
    let count = Rc::new(RefCell::new(Count::default()));
    let writer = Writer::new(sim.actors.len(), &count);
    sim.add_actor(Box::new(writer));
    let finished = sim.run(600_000 * MS);
    let trace = sim.world.borrow().trace;
    let count = std::mem::take(&mut *count.borrow_mut());
    assert!(finished, "seed {seed}: stuck after {} writes, {:?}, {:?}", count.acked, count.faults, sim.exits);
    (count, trace, sim.exits.clone())
}

#[test]
fn writes_go_on_while_the_connections_between_nodes_break() {
    let (mut cuts, mut faults) = (0, BTreeMap::<&str, u64>::new());
    for seed in 0..4 {
        let (count, _, exits) = run(seed);
        assert_eq!((count.acked, exits.len()), (OPS, 0), "seed {seed}: {exits:?}");
        cuts += count.cuts;
        count.faults.iter().for_each(|(kind, n)| *faults.entry(kind).or_default() += n);
        println!("seed {seed}: {} retries, {} connections cut", count.retries, count.cuts);
    }
    assert!(cuts > 10 && faults.len() == 4, "{cuts} connections cut, {faults:?}");
}

#[test]
fn one_seed_is_one_history() {
    assert_eq!(run(9).1, run(9).1);
}
