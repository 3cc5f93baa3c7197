//! Random operations, crashes at any operation of a round with torn sectors, restart and replay: reads always equal a
//! model that has no disk at all.

use super::super::*;
use super::disk::{Disk, Rng, layout, load, payload, read, start_io};
use crate::io::buffer::Arena;
use crate::shard::request::{ChunkOp, Outcome};
use raftlog::{BLOCK, CopysetId};
use std::collections::BTreeMap;
use std::sync::Arc;

type Model = BTreeMap<(CopysetId, u64), Vec<u64>>;

/// One log: every admitted operation is committed.
struct World {
    layout: Layout,
    disk: Disk,
    arena: Arc<Arena>,
    rng: Rng,
    store: Store,
    log: BTreeMap<CopysetId, Vec<(u64, u64, ApplyOp)>>,
    applied: BTreeMap<CopysetId, u64>,
    known: BTreeMap<CopysetId, Known>,
    model: Model,
    flights: Vec<IoId>,
    crashes: u64,
    no_space: u64,
}

impl World {
    fn new(seed: u64, chunk_size: u32, slots: u64) -> Self {
        let per_slot = u64::from(chunk_size) + 64 * 1024;
        let layout = layout((4 << 20) + slots * per_slot, 1, chunk_size);
        let known: BTreeMap<_, _> = [
            (CopysetId(1), Known { incarnation: 7, checkpoint: 0, last: 1 << 40 }),
            (CopysetId(2), Known { incarnation: 8, checkpoint: 0, last: 1 << 40 }),
        ]
        .into();
        let (mut store, _) = load(&layout, 0, &ExtentPool::new(&layout), &Disk::default(), &known).unwrap();
        store.replay_done();
        let zero: BTreeMap<_, _> = known.keys().map(|&id| (id, 0)).collect();
        Self {
            layout,
            disk: Disk::default(),
            arena: Arena::new(1 << 20).unwrap(),
            rng: Rng(seed),
            store,
            log: known.keys().map(|&id| (id, Vec::new())).collect(),
            known,
            applied: zero,
            model: Model::new(),
            flights: Vec::new(),
            crashes: 0,
            no_space: 0,
        }
    }

    fn random_op(&mut self, stamp: u64) -> ChunkOp {
        let blocks = u64::from(self.layout.blocks());
        let first = self.rng.below(blocks);
        let count = 1 + self.rng.below((blocks - first).min(9));
        let offset = first as u32 * BLOCK as u32;
        match self.rng.below(10) {
            0 => ChunkOp::Delete { sn: 1 },
            1 => ChunkOp::Zero { offset, len: count as u32 * BLOCK as u32 },
            _ => {
                let (payload, crcs) = payload(stamp, count as usize);
                ChunkOp::Write { sn: 1, offset, payload, crcs }
            }
        }
    }

    fn operate(&mut self, stamp: u64, chunks: u64) {
        let copyset = CopysetId(1 + self.rng.below(2));
        let chunk = self.rng.below(chunks);
        let op = self.random_op(stamp);
        match self.store.admit(copyset, chunk, &op) {
            Ok(()) => {}
            Err(Outcome::NoSpace) => {
                self.no_space += 1;
                return;
            }
            Err(other) => panic!("{other:?}"),
        }
        if self.rng.below(20) == 0 {
            self.store.abandon(copyset, chunk, &op);
            return;
        }
        let index = self.applied[&copyset] + 1;
        let op = match op {
            ChunkOp::Write { sn, offset, payload, crcs } => ApplyOp::Write { sn, offset, payload, crcs },
            ChunkOp::Delete { .. } => ApplyOp::Delete,
            ChunkOp::Zero { offset, len } => ApplyOp::Zero { offset, len },
            _ => unreachable!(),
        };
        self.log.get_mut(&copyset).unwrap().push((index, chunk, op.clone()));
        self.store.apply(copyset, index, chunk, op.clone(), index).unwrap();
        self.applied.insert(copyset, index);
        self.update_model(copyset, chunk, stamp, &op);
    }

    fn update_model(&mut self, copyset: CopysetId, chunk: u64, stamp: u64, op: &ApplyOp) {
        let blocks = self.layout.blocks() as usize;
        match op {
            ApplyOp::Delete => {
                self.model.remove(&(copyset, chunk));
            }
            ApplyOp::Write { offset, payload, .. } => {
                let content = self.model.entry((copyset, chunk)).or_insert_with(|| vec![0; blocks]);
                let first = *offset as usize / BLOCK;
                content[first..first + payload.len() / BLOCK].fill(stamp);
            }
            ApplyOp::Zero { offset, len } => {
                if let Some(content) = self.model.get_mut(&(copyset, chunk)) {
                    let first = *offset as usize / BLOCK;
                    content[first..first + *len as usize / BLOCK].fill(0);
                }
            }
        }
    }

    /// One small step of write-back.
    fn write_back(&mut self) {
        if !self.store.round_active() {
            let applied: Vec<_> = self.applied.iter().map(|(&c, &i)| (c, i)).collect();
            match self.store.begin_round(&applied) {
                None => self.checkpoints(&applied),
                Some(start) => {
                    for (copyset, index) in start.commits {
                        assert!(index <= self.applied[&copyset], "only committed entries are written");
                    }
                }
            }
            return;
        }
        if let Some((id, sync)) = start_io(&mut self.store, &mut self.disk, &self.arena) {
            assert!(!sync || self.flights.is_empty(), "a sync covers completed writes only");
            self.flights.push(id);
        } else if !self.flights.is_empty() {
            let any = self.rng.below(self.flights.len() as u64) as usize;
            let id = self.flights.swap_remove(any);
            self.store.io_done(id);
        }
        if let Some(done) = self.store.round_done() {
            for &(copyset, index) in &done {
                assert!(self.store.oldest_unwritten(copyset).is_none_or(|oldest| oldest > index));
            }
            // The checkpoint may be lost in a crash as well.
            if self.rng.below(4) > 0 {
                self.checkpoints(&done);
            }
        }
    }

    fn checkpoints(&mut self, done: &[(CopysetId, u64)]) {
        for &(copyset, index) in done {
            self.known.get_mut(&copyset).unwrap().checkpoint = index;
            self.store.checkpoint_durable(copyset, index);
        }
    }

    fn crash(&mut self) {
        self.crashes += 1;
        let keep = self.rng.below(5);
        self.disk.crash(&mut self.rng, keep);
        self.flights.clear();
        let pool = ExtentPool::new(&self.layout);
        let (store, report) = load(&self.layout, 0, &pool, &self.disk, &self.known).unwrap();
        assert_eq!(report.quarantined, 0, "one crash never spoils both copies");
        self.store = store;
        for (&copyset, entries) in &self.log {
            for (index, chunk, op) in entries.iter().filter(|e| e.0 > self.known[&copyset].checkpoint) {
                self.store.apply(copyset, *index, *chunk, op.clone(), 0).unwrap();
            }
        }
        self.store.replay_done();
        assert_eq!(self.store.suspect_chunks(), 0, "replay reaches everything that was torn");
    }

    fn check_all(&mut self, chunks: u64) {
        for copyset in [CopysetId(1), CopysetId(2)] {
            for chunk in 0..chunks {
                self.check_chunk(copyset, chunk);
            }
        }
        assert_eq!(self.store.chunk_count(), self.model.len() as u64);
    }

    fn check_chunk(&mut self, copyset: CopysetId, chunk: u64) {
        let got = read(&self.store, &self.disk, copyset, chunk, 0, self.layout.chunk_size);
        let Some(content) = self.model.get(&(copyset, chunk)) else {
            assert_eq!(got, Err(Outcome::NoChunk));
            return;
        };
        let got = got.unwrap();
        for (block, (bytes, stamp)) in got.chunks(BLOCK).zip(content).enumerate() {
            let want = stamp.to_le_bytes();
            assert!(bytes.chunks(8).all(|b| b == want), "chunk {chunk} block {block}: {:?} not {stamp}", &bytes[..8]);
        }
    }

    fn run(&mut self, steps: u64, chunks: u64) {
        for step in 0..steps {
            match self.rng.below(100) {
                0 => {
                    self.crash();
                    self.check_all(chunks);
                }
                1..=30 => self.operate(step + 1, chunks),
                31..=34 => {
                    let (copyset, chunk) = (CopysetId(1 + self.rng.below(2)), self.rng.below(chunks));
                    self.check_chunk(copyset, chunk);
                }
                _ => self.write_back(),
            }
        }
        self.crash();
        self.check_all(chunks);
        self.drain();
        self.check_all(chunks);
        self.crash();
        self.check_all(chunks);
    }

    /// Write everything back; nothing may stay behind.
    fn drain(&mut self) {
        for _ in 0..3 {
            loop {
                self.write_back();
                if !self.store.round_active() {
                    break;
                }
            }
        }
        assert_eq!(self.store.pinned_bytes(), 0, "no payload is kept once all is written");
        assert_eq!(self.store.oldest_dirty_ns(), None);
        assert_eq!(self.arena.free_bytes(), self.arena.size());
    }
}

#[test]
fn reads_equal_the_model_through_crashes() {
    let (mut crashes, mut no_space) = (0, 0);
    for seed in 0..30 {
        // Fewer slots than chunks, so that slots are recycled and run out.
        let mut world = World::new(seed, 64 << 10, 12);
        world.run(1500, 8);
        crashes += world.crashes;
        no_space += world.no_space;
    }
    assert!(crashes > 300 && no_space > 0, "{crashes} crashes, {no_space} refusals");
}

#[test]
fn chunks_with_several_crc_pages() {
    for seed in 0..2 {
        let mut world = World::new(1000 + seed, 8 << 20, 5);
        world.run(300, 3);
    }
}
