//! Servers that end and begin under load, as part1 lives through it: what got no answer is sent again over a new
//! connection, with the same numbers, until it is answered. No request may fail, and no answered write may be lost.

use super::client::{FILE, K, Nebd, OK, VOL1, lab, range};
use crate::client::pattern;
use crate::harness::Lab;
use crate::wire::request;
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

#[test]
fn a_server_is_exchanged_under_load() {
    let lab = lab("");
    let first = lab.start();
    let fd = Nebd::connect(&lab).open(VOL1);
    let stop = AtomicBool::new(false);
    let (server, (acked, count, longest, connections)) = std::thread::scope(|scope| {
        let mut server = first;
        let load = scope.spawn(|| {
            let mut part1 = Part1::new(&lab, fd);
            while !stop.load(Ordering::Relaxed) || !part1.pending.is_empty() {
                part1.step(!stop.load(Ordering::Relaxed));
            }
            (part1.acked, part1.next, part1.longest, part1.connections)
        });
        for round in 0..6 {
            std::thread::sleep(Duration::from_millis(300));
            if round % 2 == 0 {
                server.stop();
            } else {
                server.kill();
            }
            server = lab.start();
        }
        std::thread::sleep(Duration::from_millis(300));
        stop.store(true, Ordering::Relaxed);
        (server, load.join().unwrap())
    });
    println!("{count} writes over {connections} connections, longest {} ms", longest.as_millis());
    assert!(count > 200 && connections > 6, "{count} {connections}");
    let mut client = Nebd::connect(&lab);
    for (block, version) in acked {
        assert!(client.read(fd, block * 4096, 4096) == (OK, pattern(seed(block, version), K)), "block {block}");
    }
    assert_eq!(client.plain("CloseFile", fd), OK);
    server.stop();
}
