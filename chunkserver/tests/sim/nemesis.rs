//! Who makes trouble, one kind after the other, and who restarts a node that gave up.

use crate::disk::{Crash, Faults};
use crate::history::History;
use crate::rng::Rng;
use crate::rot;
use crate::run::Actor;
use crate::world::{ActorEvent, Command, World};
use bytes::Bytes;
use chunkserver::io::{ConnId, ListenerId};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

const NEXT: u64 = 0;
const WATCH: u64 = 1;
const RESTART: u64 = 2;
const CALM: u64 = 3;
const CRASH_AGAIN: u64 = 4;

const KINDS: [&str; 18] = [
    "power cut",
    "power cut",
    "kill",
    "kill",
    "crash in recovery",
    "read EIO",
    "write EIO",
    "sync EIO",
    "slow disk",
    "slow network",
    "paused process",
    "connection resets",
    "rude peers",
    "full pool",
    "rot at rest",
    "misdirected reads",
    "misdirected writes",
    "clock jump",
];

pub(crate) struct Nemesis {
    me: usize,
    rng: Rng,
    history: Rc<RefCell<History>>,
    faults_left: u64,
    kind: &'static str,
    crash: Crash,
    again: u64,
    /// The node is down on purpose.
    down: bool,
    /// The fault that is on ends with a crash, because a failed write or sync may have stopped the disk.
    crash_after: bool,
    /// Errors the disk had given before an EIO fault began, and how often that fault may still be prolonged.
    eio_before: u64,
    prolong: u64,
    /// Through how many more faults the pool stays full.
    filling_left: u64,
    rude: Vec<ConnId>,
    pub(crate) counts: BTreeMap<&'static str, u64>,
    finished: bool,
}

impl Nemesis {
    pub(crate) fn new(me: usize, history: &Rc<RefCell<History>>, rng: Rng, faults: u64) -> Self {
        Self {
            me,
            rng,
            history: Rc::clone(history),
            faults_left: faults,
            kind: "",
            crash: Crash::Power,
            again: 0,
            down: false,
            crash_after: false,
            eio_before: 0,
            prolong: 0,
            filling_left: 0,
            rude: Vec::new(),
            counts: BTreeMap::new(),
            finished: false,
        }
    }

    fn after(&mut self, world: &mut World, low_us: u64, high_us: u64, timer: u64) {
        let pause = self.rng.skewed(low_us * 1_000, high_us * 1_000);
        world.tell_at(world.now() + pause, self.me, ActorEvent::Timer(timer));
    }

    fn strike(&mut self, world: &mut World) {
        if self.faults_left == 0 {
            self.finished = true;
            let mut history = self.history.borrow_mut();
            (history.calm, history.filling) = (true, false);
            return;
        }
        self.faults_left -= 1;
        self.kind = KINDS[self.rng.below(KINDS.len() as u64) as usize];
        self.crash_after = false;
        if self.filling_left == 0 {
            self.history.borrow_mut().filling = false;
        }
        self.filling_left = self.filling_left.saturating_sub(1);
        if !self.distrust(world) {
            // Nothing there that could be harmed: something else.
            self.kind = "kill";
        }
        *self.counts.entry(self.kind).or_default() += 1;
        let ppm = self.rng.between(20_000, 400_000) as u32;
        (self.eio_before, self.prolong) = (world.nodes[0].disk.counts.eio, 10);
        let faults = &mut world.nodes[0].disk.faults;
        match self.kind {
            "power cut" => return self.crash_soon(world, Crash::Power, 0),
            "kill" => return self.crash_soon(world, Crash::Kill, 0),
            "crash in recovery" => {
                let crash = if self.rng.coin() { Crash::Power } else { Crash::Kill };
                let again = self.rng.between(1, 3);
                return self.crash_soon(world, crash, again);
            }
            "read EIO" => faults.read_ppm = ppm,
            "write EIO" => (faults.write_ppm, self.crash_after) = (ppm / 4, true),
            "sync EIO" => (faults.sync_ppm, self.crash_after) = (ppm, true),
            "slow disk" => {
                let most = [40, 200, 1_000][self.rng.below(3) as usize];
                (faults.slower, faults.spike_ppm) = (self.rng.between(9, most), ppm / 20);
            }
            "slow network" => {
                world.net.faults.slower = self.rng.below(100);
                world.net.faults.enobufs_ppm = ppm / 4;
                world.net.faults.emfile_ppm = ppm;
            }
            "paused process" => world.pause(0, self.rng.between(1_000_000, 3_000_000_000)),
            "connection resets" => {
                for (_, conn) in world.net.open() {
                    if self.rng.coin() {
                        world.cut(conn);
                    }
                }
            }
            "rude peers" => (0..4).for_each(|_| self.rude.push(world.connect(self.me, 0, ListenerId(0)))),
            "full pool" => {
                self.history.borrow_mut().filling = true;
                // Crashes are to find it full, and slots changing hands.
                self.filling_left = self.rng.between(1, 3);
                return self.after(world, 30_000, 200_000, CALM);
            }
            // From a millisecond to a month.
            "clock jump" => world.jump(0, 1_000_000 << self.rng.below(32)),
            _ => {} // done by `distrust`
        }
        self.after(world, 2_000, 150_000, CALM);
    }

    /// Begin a fault of a disk that breaks its promises silently; false when this one is impossible here.
    fn distrust(&mut self, world: &mut World) -> bool {
        let (ppm, now) = (self.rng.between(50_000, 500_000) as u32, world.stamp());
        let World { nodes, rng, .. } = world;
        let disk = &mut nodes[0].disk;
        if !self.kind.starts_with("rot") && !self.kind.starts_with("misdirected") {
            return true;
        }
        if rot::layout(disk).is_none() {
            return false;
        }
        disk.exposed.now = now;
        match self.kind {
            "misdirected reads" => {
                disk.faults.stray_read_ppm = ppm;
                disk.exposed.reads(u64::MAX);
            }
            "misdirected writes" => disk.faults.stray_write_ppm = ppm / 2,
            _ => match rot::strike(disk, rng) {
                Some(what) => self.kind = what,
                None => return false,
            },
        }
        true
    }

    /// Crash after some more disk operations, or after some time if there are too few.
    fn crash_soon(&mut self, world: &mut World, crash: Crash, again: u64) {
        (self.crash, self.again) = (crash, again);
        let ops = self.rng.skewed(1, 60);
        world.trip_after(0, self.me, ops);
        self.after(world, 40_000, 60_000, CRASH_AGAIN);
    }

    fn crash(&mut self, world: &mut World) {
        if std::mem::replace(&mut self.down, true) {
            return;
        }
        world.commands.push(Command::Crash(0, self.crash));
        let low = if self.rng.coin() { 10 } else { 1_000 };
        self.after(world, low, 80_000, RESTART);
    }

    fn restart(&mut self, world: &mut World) {
        world.commands.push(Command::Boot(0));
        self.down = false;
        if self.again == 0 {
            return self.after(world, 5_000, 80_000, NEXT);
        }
        self.again -= 1;
        // What a kill left in the drive's cache may be lost by a power cut that follows.
        self.crash = if self.rng.coin() { Crash::Power } else { Crash::Kill };
        *self.counts.entry("crash in recovery").or_default() += 1;
        let ops = self.rng.skewed(1, 30);
        world.trip_after(0, self.me, ops);
        self.after(world, 5_000, 30_000, CRASH_AGAIN);
    }

    fn calm(&mut self, world: &mut World) {
        // A fault that did not happen is none.
        if self.kind.ends_with("EIO") && world.nodes[0].disk.counts.eio == self.eio_before && self.prolong > 0 {
            self.prolong -= 1;
            return self.after(world, 2_000, 50_000, CALM);
        }
        let now = world.stamp();
        let disk = &mut world.nodes[0].disk;
        disk.faults = Faults::default();
        if self.kind == "misdirected reads" {
            disk.exposed.reads(now);
        }
        world.net.faults = crate::net::Faults::default();
        for conn in std::mem::take(&mut self.rude) {
            world.close(self.me, conn, true);
        }
        if self.crash_after {
            self.crash_after = false;
            (self.crash, self.again) = (if self.rng.coin() { Crash::Power } else { Crash::Kill }, 0);
            self.crash(world);
        } else {
            self.after(world, 2_000, 60_000, NEXT);
        }
    }

    /// Garbage, a frame that never ends, half a header, or nothing at all.
    fn be_rude(&mut self, world: &mut World, conn: ConnId) {
        let bytes: &'static [u8] = match self.rng.below(5) {
            0 => b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03garbage, not a frame of ours",
            1 => b"PRPC\x00\x10\x00\x00\x00\x00\x00\x20half a frame",
            2 => b"PRPC\xff\xff\xff\xff\x00\x00\x00\x01",
            3 => b"PRP",
            _ => b"",
        };
        world.send(self.me, conn, Bytes::from_static(bytes));
        if bytes.is_empty() {
            world.close(self.me, conn, false);
            self.rude.retain(|&other| other != conn);
        }
    }
}

impl Actor for Nemesis {
    fn event(&mut self, world: &mut World, event: ActorEvent) {
        match event {
            ActorEvent::Start => {
                self.after(world, 5_000, 40_000, NEXT);
                self.after(world, 5_000, 10_000, WATCH);
            }
            ActorEvent::Timer(NEXT) => self.strike(world),
            ActorEvent::Timer(CALM) => self.calm(world),
            ActorEvent::Timer(RESTART) => self.restart(world),
            // The trip wire may have been faster; then the node is down, or a later life of it is up.
            ActorEvent::Timer(CRASH_AGAIN) | ActorEvent::Tripped if world.untrip(0) || event == ActorEvent::Tripped => {
                self.crash(world);
            }
            ActorEvent::Timer(WATCH) => {
                if !self.down && !world.nodes[0].up {
                    world.commands.push(Command::Boot(0));
                }
                self.after(world, 5_000, 30_000, WATCH);
            }
            ActorEvent::Connected(conn) if self.rude.contains(&conn) => self.be_rude(world, conn),
            _ => {}
        }
    }

    fn done(&self) -> bool {
        self.finished
    }
}
