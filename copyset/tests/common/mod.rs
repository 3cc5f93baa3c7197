//! A shard in miniature: one log on a disk that completes writes late and out of order, one copyset, and a record of
//! what was applied. A crash keeps any part of the writes in flight, sector by sector.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

pub mod net;
pub mod trio;

use bytes::Bytes;
use copyset::raft::eraftpb::Message;
use copyset::{ChangeFailed, Changed, Config, Copyset, Effect, StepError};
use raftlog::{BLOCK, CopysetId, Geometry, Limits, Log, Recovery, WriteId, crc32c};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

pub const ID: CopysetId = CopysetId::new(1, 7);
const SECTOR: usize = 512;
const SEGMENT: u64 = 256 * 1024;
const SEGMENTS: u32 = 24;

/// SplitMix64.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// The log's writes and what of them is on the platter.
pub struct Disk {
    pub image: Vec<u8>,
    flying: Vec<(WriteId, u64, Vec<u8>)>,
    submitted: u64,
}

impl Disk {
    pub fn new() -> Self {
        Self { image: vec![0; SEGMENT as usize * SEGMENTS as usize], flying: Vec::new(), submitted: 0 }
    }

    /// Starts every write the log has.
    pub fn submit(&mut self, log: &mut Log) {
        while let Some(len) = log.next_header() {
            let mut bytes = vec![0; len];
            let write = log.take_write(&mut bytes);
            write.payloads.iter().for_each(|p| bytes.extend_from_slice(p));
            self.submitted = write.seq;
            self.flying.push((write.id, write.offset, bytes));
        }
    }

    /// Finishes one write, any of those in flight.
    pub fn complete(&mut self, log: &mut Log, rng: &mut Rng) -> Option<u64> {
        if self.flying.is_empty() {
            return None;
        }
        let (id, offset, bytes) = self.flying.swap_remove(rng.below(self.flying.len() as u64) as usize);
        let at = offset as usize;
        self.image[at..at + bytes.len()].copy_from_slice(&bytes);
        let durable = log.write_done(id);
        log.free_segments();
        durable
    }

    /// Power fails: of each write in flight nothing, all, a prefix or any sectors are kept.
    fn crash(&mut self, rng: &mut Rng) {
        for (_, offset, bytes) in self.flying.drain(..) {
            let fate = rng.below(4);
            let prefix = rng.below(bytes.len() as u64 / SECTOR as u64 + 1) as usize;
            for (i, sector) in bytes.chunks(SECTOR).enumerate() {
                let kept = match fate {
                    0 => false,
                    1 => true,
                    2 => i < prefix,
                    _ => rng.one_in(2),
                };
                if kept {
                    let at = offset as usize + i * SECTOR;
                    self.image[at..at + sector.len()].copy_from_slice(sector);
                }
            }
        }
    }

    pub fn recover(&self) -> Log {
        let geometry = Geometry { uuid: [7; 16], segment_size: SEGMENT, segment_count: SEGMENTS };
        let mut recovery = Recovery::new(geometry, Limits { batch_bytes_max: 64 * 1024, writes_in_flight: 2 });
        while let Some((offset, len)) = recovery.next_read() {
            let at = offset as usize;
            recovery.feed(Ok(&self.image[at..at + len]));
        }
        recovery.finish().expect("the log recovers").0
    }
}

/// What a replica applied: index -> (term, context, payload).
pub type Applied = BTreeMap<u64, (u64, Bytes, Bytes)>;

/// One replica.
pub struct Node {
    pub config: Config,
    voters: Vec<u64>,
    pub log: Rc<RefCell<Log>>,
    pub copyset: Copyset,
    pub disk: Disk,
    pub rng: Rng,
    /// Survives restarts: what the replica ever applied.
    pub applied: Applied,
    /// Index of the last `Apply` of this life.
    pub handed_out: u64,
    /// Cookies answered: committed, or dropped with `may_commit`.
    pub answered: BTreeMap<u64, Option<bool>>,
    pub outgoing: Vec<Message>,
    pub leader_changes: Vec<(u64, u64, bool)>,
    /// Its clock.
    pub now: u64,
    /// Entries applied that differ from what an earlier life applied there.
    pub mismatches: usize,
    /// (index, answered to a client) of what was applied since somebody looked.
    pub fresh: Vec<(u64, bool)>,
    /// Cookies of reads: answered, or dropped.
    pub reads: BTreeMap<u64, bool>,
    pub fetches: Vec<(u64, u64)>,
    /// Offers made and received since somebody looked.
    pub offers_made: Vec<(u64, u64)>,
    pub offers: Vec<(u64, u64)>,
    pub installed: usize,
    pub renewed: usize,
    pub changes: BTreeMap<u64, Result<Changed, ChangeFailed>>,
}

impl Node {
    pub fn new(config: Config, voters: &[u64], seed: u64) -> Self {
        let disk = Disk::new();
        let mut log = disk.recover();
        log.checkpoint(config.id, Copyset::initial_checkpoint(voters, 1));
        let log = Rc::new(RefCell::new(log));
        let now = 1_000_000_000;
        let copyset = Copyset::new(config.clone(), Rc::clone(&log), now).expect("a new copyset starts");
        let handed_out = copyset.applied_index();
        Self {
            config,
            voters: voters.to_vec(),
            log,
            copyset,
            disk,
            rng: Rng(seed),
            applied: Applied::new(),
            handed_out,
            answered: BTreeMap::new(),
            outgoing: Vec::new(),
            leader_changes: Vec::new(),
            now,
            mismatches: 0,
            fresh: Vec::new(),
            reads: BTreeMap::new(),
            fetches: Vec::new(),
            offers_made: Vec::new(),
            offers: Vec::new(),
            installed: 0,
            renewed: 0,
            changes: BTreeMap::new(),
        }
    }

    /// A tick passes, by its clock.
    pub fn tick(&mut self) {
        self.now += self.config.tick_ns();
        self.copyset.tick(self.now);
    }

    pub fn step(&mut self, message: Message) -> Result<(), StepError> {
        self.copyset.step(self.now, message)
    }

    pub fn may_read(&self) -> bool {
        self.copyset.may_read(self.now)
    }

    /// Proposes `blocks` blocks of a pattern made from the cookie.
    pub fn propose(&mut self, cookie: u64, blocks: usize) -> Result<(), copyset::ProposeError> {
        let payload = pattern(cookie, blocks);
        let crcs: Vec<u32> = payload.chunks(BLOCK).map(crc32c).collect();
        self.copyset.propose(cookie, &cookie.to_le_bytes(), &crcs, payload)
    }

    /// End of a turn: effects, then the log's writes start.
    pub fn turn(&mut self) {
        let mut effects = Vec::new();
        while self.copyset.dirty() {
            self.copyset.ready(&mut effects);
            for effect in effects.drain(..) {
                self.handle(effect);
            }
        }
        self.disk.submit(&mut self.log.borrow_mut());
    }

    fn handle(&mut self, effect: Effect) {
        match effect {
            Effect::Apply(entry) => {
                assert_eq!(entry.index, self.handed_out + 1, "indexes are contiguous");
                assert!(entry.index <= self.copyset.durable_index(), "only durable entries are applied");
                self.handed_out = entry.index;
                let payload = if entry.is_absent() { self.fetch(entry.index) } else { entry.payload.clone() };
                assert_eq!(payload.len(), entry.payload_len);
                if !entry.is_internal() {
                    let cookie = u64::from_le_bytes(entry.header().unwrap().try_into().unwrap());
                    assert_eq!(payload, pattern(cookie, payload.len() / BLOCK));
                    assert!(entry.crcs().eq(payload.chunks(BLOCK).map(crc32c)));
                    assert!(entry.cookie.is_none_or(|c| c == cookie));
                }
                if let Some(cookie) = entry.cookie {
                    assert!(self.answered.insert(cookie, None).is_none(), "answered once");
                }
                self.fresh.push((entry.index, entry.cookie.is_some()));
                let fact = (entry.term, entry.context, payload);
                if self.applied.get(&entry.index).is_some_and(|before| *before != fact) {
                    self.mismatches += 1; // what was applied is applied again, unchanged
                }
                self.applied.insert(entry.index, fact);
                self.copyset.applied(entry.index);
            }
            Effect::Dropped { cookie, may_commit } => {
                assert!(self.answered.insert(cookie, Some(may_commit)).is_none(), "answered once");
            }
            Effect::Send(message) => self.outgoing.push(*message),
            Effect::LeaderChanged { leader, term, ready } => self.leader_changes.push((leader, term, ready)),
            Effect::ReadReady { cookie } => assert!(self.reads.insert(cookie, true).is_none(), "answered once"),
            Effect::ReadDropped { cookie } => assert!(self.reads.insert(cookie, false).is_none(), "answered once"),
            Effect::Fetch { low, high } => self.fetches.push((low, high)),
            Effect::SnapshotNeeded { peer, index, .. } => self.offers_made.push((peer, index)),
            Effect::SnapshotOffered { from, index, .. } => self.offers.push((from, index)),
            Effect::Installed { index, .. } => (self.handed_out, self.installed) = (index, self.installed + 1),
            Effect::Renewed { index } => {
                assert_eq!(index, self.handed_out, "a group at rest is renewed");
                self.renewed += 1;
            }
            Effect::ChangeDone { cookie, result } => {
                assert!(self.changes.insert(cookie, result).is_none(), "answered once");
            }
        }
    }

    /// Brings the payloads of the whole tail back into memory, as sending them to peers needs.
    pub fn fetch_tail(&mut self) {
        let absent = self.log.borrow().index(ID).unwrap().not_resident();
        for (index, _) in absent {
            let payload = self.fetch(index);
            self.log.borrow_mut().restore(ID, index, payload);
        }
    }

    /// Does what `Fetch` effects asked for.
    pub fn do_fetches(&mut self) {
        for (low, high) in std::mem::take(&mut self.fetches) {
            for index in low..high {
                let place = self.log.borrow().index(ID).unwrap().location(index);
                if place.is_some() {
                    let payload = self.fetch(index);
                    self.log.borrow_mut().restore(ID, index, payload);
                }
            }
            self.copyset.fetched(low, true);
        }
    }

    fn fetch(&self, index: u64) -> Bytes {
        let log = self.log.borrow();
        let location = log.index(ID).unwrap().location(index).expect("a payload that is not resident is on disk");
        let at = location.offset as usize;
        Bytes::copy_from_slice(&self.disk.image[at..at + location.len])
    }

    /// Newest batch that is on its way to the disk.
    pub fn last_submitted(&self) -> u64 {
        self.disk.submitted
    }

    /// Finishes one write in flight; false if there is none.
    pub fn complete_one(&mut self) -> bool {
        let before = self.disk.flying.len();
        let durable = self.disk.complete(&mut self.log.borrow_mut(), &mut self.rng);
        if let Some(durable) = durable {
            self.copyset.persisted(durable);
        }
        before > 0
    }

    /// Until nothing moves any more.
    pub fn settle(&mut self) {
        loop {
            self.turn();
            if !self.complete_one() && !self.copyset.dirty() {
                break;
            }
        }
        assert_eq!(self.mismatches, 0);
    }

    /// Loses everything in memory and starts again from the disk.
    pub fn restart(&mut self) {
        self.disk.crash(&mut self.rng);
        self.log = Rc::new(RefCell::new(self.disk.recover()));
        if self.log.borrow().index(ID).is_none() {
            assert!(self.applied.is_empty(), "only a copyset that never did anything may be lost");
            let first = Copyset::initial_checkpoint(&self.voters, 1);
            self.log.borrow_mut().checkpoint(ID, first);
        }
        self.copyset = Copyset::new(self.config.clone(), Rc::clone(&self.log), self.now).expect("a copyset restarts");
        self.handed_out = self.copyset.applied_index();
        self.outgoing.clear();
        self.fetches.clear();
        self.offers.clear();
        self.offers_made.clear();
    }

    /// The epoch is the number of internal entries up to the index it is asked for.
    pub fn check_epoch(&self) {
        let base = self.copyset.first_index() - 1;
        for index in base..=self.copyset.applied_index() {
            let checkpoint = self.copyset.checkpoint_at(index);
            let conf = copyset::ConfState::decode(&checkpoint.conf).unwrap();
            let internal = self.applied.range(..=index).filter(|(_, (_, context, _))| context.is_empty()).count();
            assert_eq!(conf.epoch, internal as u64, "epoch at {index}");
            assert!(checkpoint.hard_state.commit >= index);
        }
    }

    /// As the shard does after a write-back round.
    pub fn checkpoint(&mut self, index: u64) {
        if self.copyset.is_installing() {
            return;
        }
        let checkpoint = self.copyset.checkpoint_at(index);
        self.log.borrow_mut().checkpoint(ID, checkpoint);
    }
}

pub fn pattern(cookie: u64, blocks: usize) -> Bytes {
    cookie.to_le_bytes().repeat(blocks * BLOCK / 8).into()
}
