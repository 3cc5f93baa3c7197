//! Servers that end and begin under load, as part1 lives through it: what got no answer is sent again over a new
//! connection, with the same numbers, until it is answered. No request may fail, and no answered write may be lost.

use super::client::{FILE, K, Nebd, OK, VOL1, lab, range};
use crate::client::pattern;
use crate::harness::Lab;
use crate::upgrade::{Heir, upgrade};
use crate::upgrade_failures::{fails, fake};
use crate::wire::request;
use rustix::process::Signal;
use std::collections::BTreeMap;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Requests in flight.
const DEPTH: usize = 16;
const BLOCKS: u64 = 512;

/// A write that waits for its answer: where, which version, and since when.
#[derive(Clone, Copy)]
struct Pending {
    block: u64,
    version: u64,
    since: Instant,
}

fn seed(block: u64, version: u64) -> u64 {
    block << 32 | version
}

/// What part1 does with one file, until told to stop.
struct Part1<'a> {
    lab: &'a Lab,
    fd: u64,
    client: Option<Nebd>,
    pending: BTreeMap<u64, Pending>,
    next: u64,
    /// Newest answered version of each block.
    acked: BTreeMap<u64, u64>,
    longest: Duration,
    connections: u64,
}

impl<'a> Part1<'a> {
    fn new(lab: &'a Lab, fd: u64) -> Self {
        Self {
            lab,
            fd,
            client: None,
            pending: BTreeMap::new(),
            next: 0,
            acked: BTreeMap::new(),
            longest: Duration::ZERO,
            connections: 0,
        }
    }

    fn send(&mut self, cid: u64) -> std::io::Result<()> {
        let Pending { block, version, .. } = self.pending[&cid];
        let bytes = request(FILE, "Write", cid, &range(self.fd, block * 4096, 4096), &pattern(seed(block, version), K));
        self.client.as_mut().unwrap().stream.write_all(&bytes)
    }

    /// A connection, with everything sent that waits.
    fn reconnect(&mut self) {
        loop {
            self.client = Nebd::try_connect(self.lab).ok();
            let all: Vec<u64> = self.pending.keys().copied().collect();
            if self.client.is_some() && all.into_iter().all(|cid| self.send(cid).is_ok()) {
                self.connections += 1;
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn step(&mut self, more: bool) {
        if self.client.is_none() {
            self.reconnect();
        }
        while more && self.pending.len() < DEPTH {
            // One write of a block at a time, as a guest's file system does.
            self.next += 1;
            let block = (self.next * 7) % BLOCKS;
            self.pending.insert(self.next, Pending { block, version: self.next, since: Instant::now() });
            if self.send(self.next).is_err() {
                self.client = None;
                return;
            }
        }
        match self.client.as_mut().unwrap().try_receive() {
            Ok(answer) => {
                assert_eq!((answer.error_code, answer.status()), (0, OK), "part1 would tell the guest");
                let done = self.pending.remove(&answer.cid).expect("an answer to nothing, or a second one");
                self.longest = self.longest.max(done.since.elapsed());
                self.acked.insert(done.block, done.version);
            }
            Err(_) => self.client = None,
        }
    }
}

/// Writes while `exchange` happens, from one client; at the end every answered write is there. How many connections it
/// took.
fn under_load(lab: &Lab, exchange: impl FnOnce()) -> u64 {
    let fd = Nebd::connect(lab).open(VOL1);
    let stop = AtomicBool::new(false);
    let part1 = std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            let mut part1 = Part1::new(lab, fd);
            while !stop.load(Ordering::Relaxed) || !part1.pending.is_empty() {
                part1.step(!stop.load(Ordering::Relaxed));
            }
            part1
        });
        exchange();
        std::thread::sleep(Duration::from_millis(300));
        stop.store(true, Ordering::Relaxed);
        load.join().unwrap()
    });
    let (count, connections) = (part1.next, part1.connections);
    println!("{count} writes over {connections} connections, longest {} ms", part1.longest.as_millis());
    assert!(count > 200, "{count}");
    let mut client = Nebd::connect(lab);
    for (block, version) in part1.acked {
        assert!(client.read(fd, block * 4096, 4096) == (OK, pattern(seed(block, version), K)), "block {block}");
    }
    assert_eq!(client.plain("CloseFile", fd), OK);
    connections
}

#[test]
fn a_server_is_exchanged_under_load() {
    let lab = lab("");
    let mut server = Some(lab.start());
    let connections = under_load(&lab, || {
        for round in 0..6 {
            std::thread::sleep(Duration::from_millis(300));
            let old = server.take().unwrap();
            if round % 2 == 0 {
                old.stop();
            } else {
                old.kill();
            }
            server = Some(lab.start());
        }
    });
    assert!(connections > 6, "{connections}");
    server.unwrap().stop();
}

#[test]
fn a_server_hands_over_under_load() {
    let lab = lab("");
    let mut first = lab.start();
    let mut heir: Option<Heir> = None;
    let connections = under_load(&lab, || {
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(300));
            heir = Some(upgrade(&lab).0);
        }
    });
    assert!(connections > 3, "a hand-over closes them: {connections}");
    assert!(first.wait().success());
    // A file that was open when a server took over is known to it, and to the next that is started.
    let fd = Nebd::connect(&lab).open(VOL1);
    let heir = heir.map(|_| upgrade(&lab).0);
    assert_eq!(Nebd::connect(&lab).open(VOL1), fd);
    heir.unwrap().end(Signal::TERM);
    let last = lab.start();
    assert_eq!(Nebd::connect(&lab).open(VOL1), fd);
    last.stop();
}

/// The new process may have opened files and told their numbers. The old one knows them only when it reads its records.
#[test]
fn a_successor_that_dies_at_last() {
    let lab = lab("");
    let mut server = lab.start();
    let fd = Nebd::connect(&lab).open(VOL1);
    let said = fails(&lab, fake(&lab, "dies-committed").to_str().unwrap());
    assert!(said.contains("goes on"), "{said}");
    let mut client = Nebd::connect(&lab);
    assert_eq!(client.write(fd, 0, &pattern(1, K)), OK);
    assert!(client.open(&format!("{VOL1}:x")) != fd);
    drop(client);
    let said = fails(&lab, fake(&lab, "opens-a-file").to_str().unwrap());
    assert!(said.contains("only a new start knows"), "{said}");
    assert_eq!(server.wait().code(), Some(1), "and may be started at once");
    let server = lab.start();
    assert_eq!(Nebd::connect(&lab).read(fd, 0, 4096), (OK, pattern(1, K)));
    server.stop();
}
