//! Random histories against a model: whatever the log does between two crashes, and whatever part of the writes in
//! flight reached the disk, recovery finds the state after a prefix of the batches that contains every
//! acknowledged one, and nothing else.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Copy, Disk, Rng, State, checkpoint, entry, geometry, state};
use raftlog::{CopysetId, Geometry, HardState, Limits, Log, Seq};

const LIMITS: Limits = Limits { batch_bytes_max: 64 << 10, writes_in_flight: 2 };

struct World {
    rng: Rng,
    geometry: Geometry,
    limits: Limits,
    disk: Disk,
    log: Log,
    /// State now, and after each batch that ended an operation.
    now: State,
    after: Vec<(Seq, State)>,
    acked: Seq,
    /// Completed before the batch in front of it.
    early: Vec<Seq>,
    stamp: u64,
    lives: u64,
    freed: usize,
    survived: u64,
    vanished: u64,
}

impl World {
    fn new(seed: u64, geometry: Geometry, limits: Limits) -> Self {
        let disk = Disk::new(&geometry);
        let log = disk.open(geometry, limits);
        let (now, after) = (State::new(), vec![(0, State::new())]);
        let (acked, stamp, lives, freed, survived, vanished) = (0, 1, 1, 0, 0, 0);
        let (rng, early) = (Rng(seed), Vec::new());
        Self { rng, geometry, limits, disk, log, now, after, acked, early, stamp, lives, freed, survived, vanished }
    }

    fn did(&mut self, seq: Seq) {
        if self.after.last().is_some_and(|(s, _)| *s == seq) {
            self.after.pop();
        }
        self.after.push((seq, self.now.clone()));
    }

    fn pick(&mut self) -> Option<CopysetId> {
        let ids: Vec<_> = self.now.keys().copied().collect();
        (!ids.is_empty()).then(|| ids[self.rng.below(ids.len() as u64) as usize])
    }

    fn create(&mut self) {
        let id = CopysetId::new(1, self.rng.below(4) as u32);
        let incarnation = self.stamp;
        self.stamp += 1;
        if self.now.contains_key(&id) && !self.rng.one_in(10) {
            return;
        }
        let cp = checkpoint(0, 0, incarnation);
        let hs = cp.hard_state;
        self.now.insert(id, Copy { checkpoint: cp.clone(), hard_state: hs, entries: vec![] });
        let seq = self.log.checkpoint(id, cp);
        self.did(seq);
    }

    fn append(&mut self) {
        let Some(id) = self.pick() else { return self.create() };
        let copy = self.now.get_mut(&id).unwrap();
        let applied = copy.checkpoint.applied_index;
        let floor = copy.hard_state.commit.max(applied);
        let mut next = applied + 1 + copy.entries.len() as u64;
        if self.rng.one_in(5) && next > floor + 1 {
            next = floor + 1 + self.rng.below(next - floor); // a new leader's entries replace a tail
        }
        copy.entries.truncate((next - applied - 1) as usize);
        let prev = copy.entries.last().map_or(copy.checkpoint.applied_term, |e| e.term).max(copy.hard_state.term);
        let term = prev + u64::from(self.rng.one_in(4));
        let mut new = Vec::new();
        for i in 0..self.rng.below(5) {
            self.stamp += 1;
            new.push(entry(next + i, term, self.rng.below(3) as usize, self.stamp));
        }
        let cost: u64 = new.iter().map(|e| self.log.entry_cost(e.payload.len())).sum();
        if copy.entries.len() > 5 || cost > self.log.space_for_entries() {
            copy.entries = state(&self.log, &self.disk)[&id].entries.clone();
            return self.make_room();
        }
        copy.entries.extend(new.iter().cloned());
        let last = applied + copy.entries.len() as u64;
        let hs =
            HardState { term, vote: self.rng.below(3), commit: floor + self.rng.below(last + 1 - floor.min(last)) };
        let hs = (!new.is_empty() || self.rng.one_in(2)).then_some(hs);
        copy.hard_state = hs.unwrap_or(copy.hard_state);
        if new.is_empty() && hs.is_none() {
            copy.entries = state(&self.log, &self.disk)[&id].entries.clone();
            return;
        }
        if new.is_empty() {
            copy.entries = state(&self.log, &self.disk)[&id].entries.clone(); // nothing was truncated
            let last = applied + copy.entries.len() as u64;
            copy.hard_state.commit = copy.hard_state.commit.min(last).max(floor);
        }
        let hs = hs.map(|_| copy.hard_state);
        let seq = self.log.append(id, new, hs);
        self.did(seq);
    }

    fn checkpoint(&mut self, id: CopysetId) {
        let copy = self.now.get_mut(&id).unwrap();
        let old = &copy.checkpoint;
        let n = self.rng.below(copy.entries.len() as u64 + 1) as usize;
        let term = if n == 0 { old.applied_term } else { copy.entries[n - 1].term };
        let mut cp = checkpoint(old.applied_index + n as u64, term, old.incarnation);
        if self.rng.one_in(2) {
            cp.hard_state = copy.hard_state;
        }
        copy.entries.drain(..n);
        copy.hard_state.commit = copy.hard_state.commit.max(cp.applied_index);
        copy.checkpoint = cp.clone();
        copy.checkpoint.hard_state = copy.hard_state;
        let seq = self.log.checkpoint(id, cp);
        self.did(seq);
    }

    fn relog(&mut self, id: CopysetId) {
        self.drain_location(id);
        self.disk.restore(&mut self.log, id);
        let copy = self.now.get_mut(&id).unwrap();
        copy.checkpoint.hard_state = copy.hard_state;
        let seq = self.log.relog(id);
        self.did(seq);
    }

    /// A payload evicted from memory was written, so it can always be read.
    fn drain_location(&self, id: CopysetId) {
        let index = self.log.index(id).unwrap();
        for (i, l) in index.not_resident() {
            assert_eq!(Some(l.len), index.payload_len(i));
        }
    }

    fn make_room(&mut self) {
        for id in self.log.copysets() {
            self.checkpoint(id);
        }
        for id in self.log.pinning() {
            self.relog(id);
        }
        while self.rng.one_in(2) {
            self.io();
        }
        if self.rng.one_in(2) {
            // The promise of the reserve: this never gets stuck, and ends with space.
            let rounds = 2 * self.geometry.segment_count;
            for round in 0..=rounds {
                self.settle();
                assert_eq!(self.log.durable_seq(), self.after.last().unwrap().0, "the log is stuck");
                if self.log.space_for_entries() > (64 << 10).min(self.geometry.segment_size / 4) {
                    break;
                }
                assert!(round < rounds, "no space after all was re-logged");
                for id in self.log.pinning() {
                    self.relog(id);
                }
            }
        }
    }

    fn settle(&mut self) {
        loop {
            self.disk.submit(&mut self.log);
            if self.disk.flying.is_empty() {
                break;
            }
            self.complete();
        }
    }

    fn complete(&mut self) {
        let at = self.rng.below(self.disk.flying.len() as u64) as usize;
        self.early.push(self.disk.flying[at].seq);
        if let Some(seq) = self.disk.complete(&mut self.log, at) {
            assert!(seq > self.acked);
            self.acked = seq;
        }
        self.freed += self.log.free_segments();
    }

    fn io(&mut self) {
        self.disk.submit(&mut self.log);
        assert!(self.disk.flying.len() <= self.limits.writes_in_flight);
        if !self.disk.flying.is_empty() && self.rng.one_in(2) {
            self.complete();
        }
    }

    fn step(&mut self) {
        match self.rng.below(40) {
            0 => self.create(),
            1..=16 => self.append(),
            17..=19 => {
                if let Some(id) = self.pick() {
                    self.checkpoint(id);
                }
            }
            20 => {
                if let Some(id) = self.pick() {
                    self.relog(id);
                }
            }
            21 if self.rng.one_in(4) => {
                if let Some(id) = self.pick() {
                    self.now.remove(&id);
                    let seq = self.log.purge(id);
                    self.did(seq);
                }
            }
            22 => {
                if let Some(seq) = self.log.seal() {
                    self.did(seq);
                }
            }
            23 => {
                if let Some(id) = self.pick() {
                    self.log.evict(id, self.stamp);
                }
            }
            _ => self.io(),
        }
        if self.rng.one_in(16) {
            assert!(state(&self.log, &self.disk) == self.now);
        }
    }

    /// Any subset of the sectors in flight reaches the disk, then power is gone.
    fn crash(&mut self) {
        let flying = std::mem::take(&mut self.disk.flying);
        let mode = self.rng.below(4);
        for w in &flying {
            let sectors = w.bytes.chunks(512).len() as u64;
            let cut = self.rng.below(sectors + 1);
            let whole = self.rng.one_in(2);
            for (n, sector) in w.bytes.chunks(512).enumerate() {
                let lands = match mode {
                    0 => whole,
                    1 => (n as u64) < cut,
                    2 => n as u64 != cut,
                    _ => self.rng.one_in(2),
                };
                if lands {
                    self.disk.land(w.offset + n as u64 * 512, sector);
                }
            }
        }
        let landed = |w: &common::Flying| self.disk.image[w.offset as usize..][..w.bytes.len()] == w.bytes;
        let mut want = self.acked;
        let mut pending: Vec<_> = flying.iter().filter(|w| w.seq > self.acked).collect();
        pending.sort_by_key(|w| w.seq);
        for w in pending {
            if w.seq == want + 1 && landed(w) {
                want += 1;
                self.survived += 1;
            } else {
                self.vanished += 1;
            }
            while self.early.contains(&(want + 1)) {
                want += 1;
            }
        }
        self.recover(want);
    }

    fn recover(&mut self, want: Seq) {
        let (log, report) = self.disk.recover(self.geometry, self.limits).unwrap();
        assert_eq!((&report.rot, &report.suspects), (&vec![], &vec![]), "a crash is not rot");
        assert_eq!(log.durable_seq(), want, "acknowledged {}", self.acked);
        let at = self.after.iter().rposition(|(seq, _)| *seq <= want).unwrap();
        let expect = self.after[at].1.clone();
        assert!(state(&log, &self.disk) == expect, "another state than after batch {want}");
        for (id, copy) in &expect {
            assert_eq!(log.durable_commit(*id), copy.hard_state.commit);
        }
        (self.now, self.after) = (expect.clone(), vec![(want, expect)]);
        (self.log, self.acked, self.early) = (log, want, Vec::new());
        self.lives += 1;
        // Nobody lives on without having read the tail back.
        for id in self.log.copysets() {
            self.disk.restore(&mut self.log, id);
        }
    }
}

fn run(seed: u64, geometry: Geometry, limits: Limits, steps: u64, crash: u64) -> World {
    let mut w = World::new(seed, geometry, limits);
    for _ in 0..steps {
        w.step();
        if w.rng.one_in(crash) {
            w.crash();
        }
    }
    w.settle();
    w.crash();
    w
}

#[test]
fn recovery_equals_the_model() {
    let (mut freed, mut lives, mut survived, mut vanished) = (0, 0, 0, 0);
    for seed in 0..60 {
        let segments = 4 + (seed % 3) as u32;
        let w = std::panic::catch_unwind(|| run(seed, geometry(256 << 10, segments), LIMITS, 700, 60));
        let w = w.unwrap_or_else(|_| panic!("seed {seed}"));
        freed += w.freed;
        lives += w.lives;
        survived += w.survived;
        vanished += w.vanished;
    }
    println!(
        "{lives} lives, {freed} segments recycled, {survived} unacknowledged batches survived, {vanished} vanished"
    );
    assert!(freed > 100 && lives > 300 && survived > 20 && vanished > 20);
}

#[test]
fn crash_after_crash_never_runs_out_of_segments() {
    for seed in 100..120 {
        let w = std::panic::catch_unwind(|| run(seed, geometry(256 << 10, 3), LIMITS, 500, 6));
        w.unwrap_or_else(|_| panic!("seed {seed}"));
    }
}

#[test]
fn crashes_around_the_change_of_segments() {
    // No append is larger than a batch, so none is split.
    let limits = Limits { batch_bytes_max: 40 << 10, writes_in_flight: 4 };
    let mut freed = 0;
    for seed in 200..400 {
        let w = std::panic::catch_unwind(|| run(seed, geometry(44 << 10, 12), limits, 500, 25));
        freed += w.unwrap_or_else(|_| panic!("seed {seed}")).freed;
    }
    assert!(freed > 1000, "{freed}");
}
