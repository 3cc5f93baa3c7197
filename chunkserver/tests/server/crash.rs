//! kill -9 with writes in flight, on a real disk: whatever was acknowledged is there after the restart (rule 33).
//!
//! The checker knows for every block which contents it may have: the last acknowledged write, or the one that was in
//! flight. `scripts/crash` does the same for hours; this is the part of it that every test run has.

use super::client::{BLOCK, Client, NO_CHUNK, SUCCESS, pattern, write_frame};
use super::harness::{Lab, MIB, Setup};
use std::io::Write;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub(super) const WRITERS: u64 = 4;
const DEPTH: usize = 12;
/// Blocks of a writer: four chunks of its copyset.
const BLOCKS: usize = 256;
const BLOCKS_OF_CHUNK: usize = 64;

#[derive(Clone, Copy, Default)]
struct Block {
    /// Newest write known to be there; 0 = none.
    known: u64,
    /// Unanswered write; 0 = none.
    pending: u64,
}

pub(super) struct Writer {
    copyset: u64,
    blocks: Vec<Block>,
    version: u64,
    random: u64,
    pub(super) acknowledged: u64,
}

fn content(copyset: u64, block: usize, version: u64) -> Vec<u8> {
    pattern(copyset << 56 | (block as u64) << 40 | version, BLOCK)
}

impl Writer {
    fn place(block: usize) -> (u64, u64) {
        (1 + (block / BLOCKS_OF_CHUNK) as u64, (block % BLOCKS_OF_CHUNK * BLOCK) as u64)
    }

    fn random(&mut self, below: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random % below as u64) as usize
    }

    /// Write random blocks until the connection breaks; one write of a block at a time.
    pub(super) fn run(&mut self, mut client: Client) {
        let mut outstanding = 0;
        loop {
            while outstanding < DEPTH {
                let block = self.random(BLOCKS);
                if self.blocks[block].pending != 0 {
                    continue;
                }
                self.version += 1;
                self.blocks[block].pending = self.version;
                let (chunk, offset) = Self::place(block);
                let data = content(self.copyset, block, self.version);
                if client.stream.write_all(&write_frame(block as u64, self.copyset, chunk, offset, &data)).is_err() {
                    return;
                }
                outstanding += 1;
            }
            let Ok(answer) = client.try_receive() else { return };
            assert_eq!(answer.status(), SUCCESS);
            let block = &mut self.blocks[answer.cid as usize];
            block.known = std::mem::take(&mut block.pending);
            outstanding -= 1;
            self.acknowledged += 1;
        }
    }

    /// Compare every block with what it may hold; (survived, vanished) of the unanswered writes.
    pub(super) fn check(&mut self, client: &mut Client) -> (u64, u64) {
        let (mut survived, mut vanished) = (0, 0);
        for index in 0..BLOCKS {
            let (chunk, offset) = Self::place(index);
            let (status, data) = client.read(self.copyset, chunk, offset, BLOCK);
            let Block { known, pending } = self.blocks[index];
            let is = |version: u64| match version {
                0 => status == NO_CHUNK || (status == SUCCESS && data == vec![0; BLOCK]),
                v => status == SUCCESS && data == content(self.copyset, index, v),
            };
            let seen = if pending != 0 && is(pending) {
                survived += 1;
                pending
            } else {
                assert!(
                    is(known),
                    "copyset {} block {index}: status {status}, neither {known} nor {pending}",
                    self.copyset
                );
                vanished += u64::from(pending != 0);
                known
            };
            self.blocks[index] = Block { known: seen, pending: 0 };
        }
        (survived, vanished)
    }
}

/// One per copyset.
pub(super) fn writers(seed: u64) -> Vec<Writer> {
    let one = |copyset| Writer {
        copyset,
        blocks: vec![Block::default(); BLOCKS],
        version: 0,
        random: seed ^ copyset << 40,
        acknowledged: 0,
    };
    (1..=WRITERS).map(one).collect()
}

#[test]
fn acknowledged_writes_survive_kills() {
    // A small log and dirty limit: rounds, checkpoints and segment changes go on all the time.
    let setup = Setup { size: 64 * MIB, log: 8 * MIB, dirty: 2 * MIB, flush_age_ms: 20, ..Setup::default() };
    let lab = Lab::new(setup);
    let mut random = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64 | 1;
    println!("seed {random}");
    let mut writers = writers(random);
    let server = lab.start();
    lab.copysets(WRITERS as u32);
    let mut server = Some(server);
    let (mut survived, mut vanished) = (0, 0);
    for kill in 0..10 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let running = server.take().unwrap();
        std::thread::scope(|scope| {
            for writer in &mut writers {
                let client = running.client();
                scope.spawn(|| writer.run(client));
            }
            std::thread::sleep(Duration::from_millis(40 + (random >> 33) % 250));
            running.kill();
        });
        // Some kills come while the next one recovers.
        for early in 0..kill % 3 {
            let recovering = lab.launch(lab.command());
            std::thread::sleep(Duration::from_millis((random >> 20) % 40 * (early + 1)));
            recovering.kill();
        }
        let again = lab.start();
        let mut client = again.client();
        for writer in &mut writers {
            let (s, v) = writer.check(&mut client);
            survived += s;
            vanished += v;
        }
        server = Some(again);
    }
    let acknowledged: u64 = writers.iter().map(|w| w.acknowledged).sum();
    println!("{acknowledged} writes acknowledged; of the unanswered {survived} survived, {vanished} vanished");
    assert!(acknowledged > 0 && survived + vanished > 0);
}
