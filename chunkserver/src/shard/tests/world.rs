//! One shard, its disk and its clock. The clock only moves to where the shard asked to be woken: a condition that
//! nobody wakes shows as a hang.

use crate::chunk::{ExtentPool, FLAG_SPARSE, Layout, Params};
use crate::io::buffer::Arena;
use crate::io::{Bufs, Completion, Done, Errno, Instant, Op, Token};
use crate::metrics::Registry;
use crate::shard::mail::{PeerBody, PeerMail};
use crate::shard::request::{AdminOp, ChunkOp, Origin, Outcome, Reply, Request, RequestOp};
use crate::shard::{Arenas, Config, Effects, Shard};
use copyset::raft::eraftpb::{Entry, EntryType};
use raftlog::{BLOCK, CopysetId};
use std::collections::BTreeMap;

const SECTOR: usize = 512;
const PEER: u64 = 7;

/// SplitMix64: a failure is its seed.
pub(super) struct Rng(pub(super) u64);

impl Rng {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }
    pub(super) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    pub(super) fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

/// Sectors; writes are durable after a sync or when they are dsync.
struct Disk {
    durable: Vec<u8>,
    current: Vec<u8>,
    /// Completed, not synced: serial, offset, data.
    volatile: Vec<(u64, u64, Vec<u8>)>,
    serial: u64,
}

fn flat(bufs: &Bufs) -> Vec<u8> {
    bufs.concat()
}

impl Disk {
    fn put(image: &mut [u8], offset: u64, data: &[u8]) {
        image[offset as usize..offset as usize + data.len()].copy_from_slice(data);
    }

    fn scatter(image: &mut [u8], offset: u64, data: &[u8], rng: &mut Rng, keep: usize) {
        for (at, sector) in (offset as usize..).step_by(SECTOR).zip(data.chunks(SECTOR)) {
            if rng.below(4) < keep {
                image[at..at + SECTOR].copy_from_slice(sector);
            }
        }
    }

    fn written(&mut self, offset: u64, data: Vec<u8>, dsync: bool) {
        Self::put(&mut self.current, offset, &data);
        self.serial += 1;
        if dsync {
            Self::put(&mut self.durable, offset, &data);
        } else {
            self.volatile.push((self.serial, offset, data));
        }
    }

    fn synced(&mut self, until: u64) {
        let (done, rest) = std::mem::take(&mut self.volatile).into_iter().partition(|w| w.0 <= until);
        self.volatile = rest;
        let done: Vec<(u64, u64, Vec<u8>)> = done;
        for (_, offset, data) in done {
            Self::put(&mut self.durable, offset, &data);
        }
    }
}

struct Flight {
    number: u64,
    op: Op,
    /// Of a sync: the newest write it covers.
    covers: u64,
}

/// What a world is made of.
#[derive(Clone, Debug)]
pub(super) struct Setup {
    pub(super) size: u64,
    pub(super) chunk_size: u32,
    pub(super) segment: u64,
    pub(super) segments: u64,
    pub(super) payload_arena: usize,
    pub(super) work_arena: usize,
    pub(super) dirty_limit: usize,
    pub(super) flush_age_ms: u64,
    pub(super) trash_s: u64,
    pub(super) election_ms: u64,
    pub(super) peer: u64,
}

impl Setup {
    pub(super) const SMALL: Self = Self {
        size: 8 << 20,
        chunk_size: 64 << 10,
        segment: 128 << 10,
        segments: 4,
        payload_arena: 4 << 20,
        work_arena: 2 << 20,
        dirty_limit: 512 << 10,
        flush_age_ms: 50,
        trash_s: 0,
        election_ms: 1000,
        peer: PEER,
    };
}

impl Default for Setup {
    fn default() -> Self {
        Self::SMALL
    }
}

pub(super) struct World {
    pub(super) setup: Setup,
    layout: Layout,
    disk: Disk,
    pub(super) arenas: Arenas,
    shard: Option<Shard>,
    effects: Effects,
    flights: Vec<Flight>,
    /// To other nodes.
    pub(super) mail: Vec<PeerMail>,
    pub(super) now: Instant,
    pub(super) rng: Rng,
    next_slot: u32,
    /// Requests without an answer.
    pub(super) owed: BTreeMap<u32, ()>,
    pub(super) replies: Vec<Reply>,
    /// Something happened that makes a turn.
    pending_turn: bool,
    pub(super) turns: u64,
    pub(super) crashes: u64,
    /// Fail device reads of one in so many.
    pub(super) read_errors: Option<usize>,
    /// Device reads asked for.
    pub(super) reads: u64,
}

impl World {
    pub(super) fn new(setup: Setup, seed: u64) -> Self {
        let params = Params {
            uuid: *b"0123456789abcdef",
            size: setup.size,
            shards: 1,
            chunk_size: setup.chunk_size,
            log_bytes_per_shard: setup.segment * setup.segments,
            log_segment_size: setup.segment,
            flags: FLAG_SPARSE,
        };
        let layout = Layout::new(&params).unwrap();
        let payload = Arena::new(setup.payload_arena).unwrap();
        let arenas =
            Arenas { all_payload: vec![payload.clone()], payload, work: Arena::new(setup.work_arena).unwrap() };
        let image = vec![0; setup.size as usize];
        let disk = Disk { durable: image.clone(), current: image, volatile: Vec::new(), serial: 0 };
        let mut world = Self {
            setup,
            layout,
            disk,
            arenas,
            shard: None,
            effects: Effects::default(),
            flights: Vec::new(),
            mail: Vec::new(),
            now: Instant(1_000_000_000),
            rng: Rng(seed),
            next_slot: 0,
            owed: BTreeMap::new(),
            replies: Vec::new(),
            pending_turn: false,
            turns: 0,
            crashes: 0,
            read_errors: None,
            reads: 0,
        };
        world.start();
        world
    }

    pub(super) fn start(&mut self) {
        let config = Config {
            shard: 0,
            peer: self.setup.peer,
            dirty_limit: self.setup.dirty_limit,
            flush_age_ns: self.setup.flush_age_ms * 1_000_000,
            election_ms: self.setup.election_ms,
            snapshot_rate: 0,
            trash_s: self.setup.trash_s,
            wall_s: 0,
            seed: self.rng.next(),
        };
        let registry = Registry::new(1);
        let metrics = registry.shard(0).unwrap().clone();
        let extents = ExtentPool::new(&self.layout);
        let shard = Shard::new(config, self.layout.clone(), self.arenas.clone(), extents, metrics, self.now).unwrap();
        self.shard = Some(shard);
        self.pending_turn = true;
    }

    /// Until requests are served.
    pub(super) fn boot(&mut self) {
        for _ in 0..100_000 {
            if self.shard().serving() && self.flights.is_empty() {
                return;
            }
            self.step();
        }
        panic!("start-up does not end: {:?}", self.shard().failure());
    }

    pub(super) fn shard(&mut self) -> &mut Shard {
        self.shard.as_mut().unwrap()
    }

    /// Hand a request in; its slot names it.
    pub(super) fn ask(&mut self, copyset: CopysetId, op: RequestOp) -> u32 {
        let slot = self.next_slot;
        self.next_slot += 1;
        self.owed.insert(slot, ());
        let origin = Origin { shard: 0, slot, serial: slot };
        let now = self.now;
        let mut effects = std::mem::take(&mut self.effects);
        self.shard().observe(now);
        self.shard().request(Request { copyset, op, origin }, &mut effects);
        self.effects = effects;
        self.pending_turn = true;
        self.collect();
        slot
    }

    pub(super) fn chunk(&mut self, copyset: CopysetId, chunk: u64, op: ChunkOp) -> u32 {
        self.ask(copyset, RequestOp::Chunk { chunk, op })
    }

    /// A write of whole blocks that all hold `stamp`; `None` when there is no buffer.
    pub(super) fn write(&mut self, copyset: CopysetId, chunk: u64, first: u32, blocks: u32, stamp: u64) -> Option<u32> {
        let mut buf = self.arenas.payload.alloc(blocks as usize * BLOCK)?;
        for word in buf.as_chunks_mut::<8>().0 {
            *word = stamp.to_le_bytes();
        }
        let crcs = buf.chunks(BLOCK).map(raftlog::crc32c).collect();
        let op = ChunkOp::Write { sn: 1, offset: first * BLOCK as u32, payload: buf.freeze(), crcs };
        Some(self.chunk(copyset, chunk, op))
    }

    /// A message of another node, its payload in memory of our own; false when there is none for it.
    pub(super) fn receive(&mut self, mut mail: PeerMail) -> bool {
        if let PeerBody::Raft(message) = &mut mail.body {
            // A membership change carries no payload.
            let carries =
                |entry: &&mut Entry| entry.get_entry_type() == EntryType::EntryNormal && !entry.data.is_empty();
            for entry in message.mut_entries().iter_mut().filter(carries) {
                let Some(mut buf) = self.arenas.payload.alloc(entry.data.len()) else {
                    self.shard().want_memory();
                    self.pending_turn = true;
                    return false;
                };
                buf.truncate(entry.data.len());
                buf.copy_from_slice(&entry.data);
                entry.data = buf.freeze();
            }
        }
        let now = self.now;
        let mut effects = std::mem::take(&mut self.effects);
        self.shard().observe(now);
        self.shard().peer_mail(mail, &mut effects);
        self.effects = effects;
        self.pending_turn = true;
        self.collect();
        true
    }

    /// Mail to this peer was thrown away.
    pub(super) fn lost(&mut self, peer: u64) {
        self.shard().peer_lost(peer, None);
        self.pending_turn = true;
    }

    pub(super) fn create(&mut self, copyset: CopysetId) {
        let slot = self.ask(copyset, RequestOp::Admin(AdminOp::CreateCopyset { peers: vec![PEER] }));
        assert_eq!(self.outcome_of(slot), Outcome::Success);
        // Until it leads.
        self.settle();
    }

    pub(super) fn outcome_of(&mut self, slot: u32) -> Outcome {
        self.answer(slot).outcome
    }

    /// Run until this request is answered.
    pub(super) fn answer(&mut self, slot: u32) -> Reply {
        for _ in 0..200_000 {
            if let Some(at) = self.replies.iter().position(|r| r.origin.slot == slot) {
                return self.replies.swap_remove(at);
            }
            self.step();
        }
        panic!("request {slot} is never answered");
    }

    /// Run until every request is answered and nothing is under way.
    pub(super) fn settle(&mut self) {
        let mut idle = 0;
        for _ in 0..400_000 {
            if self.owed.is_empty() && self.flights.is_empty() && !self.pending_turn {
                return;
            }
            idle = if self.flights.is_empty() { idle + 1 } else { 0 };
            assert!(idle < 2000, "{} requests wait and nothing happens: {}", self.owed.len(), self.describe());
            self.step();
        }
        panic!("{} requests are never answered: {}", self.owed.len(), self.describe());
    }

    pub(super) fn describe(&mut self) -> String {
        let status = self.shard().status();
        let deadline = self.shard().deadline().since_ns(self.now) / 1000;
        let shard = self.shard();
        let (waiting, deferred, reads, queue) =
            (shard.waiting.len(), shard.deferred.len(), shard.reads.len(), shard.read_queue.len());
        let held = (shard.admin.len(), shard.log.borrow().space_for_entries(), shard.log.borrow().durable_seq());
        format!(
            "deadline in {deadline} us, {waiting} proposed, {deferred} deferred, {reads} reads ({queue} queued), {held:?}, {:?}, {status:?}",
            shard.flush
        )
    }

    /// One thing happens: a turn that is due, a completion, or the time the shard wants to be woken at.
    pub(super) fn step(&mut self) {
        if self.pending_turn && (self.flights.is_empty() || !self.rng.one_in(4)) {
            return self.turn();
        }
        if !self.flights.is_empty() {
            let at = self.rng.below(self.flights.len());
            self.complete(at);
            return;
        }
        let deadline = self.shard().deadline();
        assert!(deadline != Instant::FAR || self.owed.is_empty(), "nothing will ever wake it: {}", self.describe());
        if deadline == Instant::FAR {
            return;
        }
        self.now = deadline.max(Instant(self.now.0 + 1));
        self.turn();
    }

    pub(super) fn turn(&mut self) {
        self.pending_turn = false;
        self.turns += 1;
        self.now = self.now.after_ns(10_000);
        let now = self.now;
        let mut effects = std::mem::take(&mut self.effects);
        self.shard().end_turn(now, &mut effects);
        self.effects = effects;
        self.collect();
        let failure = self.shard().failure().cloned();
        assert!(failure.is_none(), "{}", failure.unwrap());
    }

    fn collect(&mut self) {
        for (number, op) in self.effects.ops.drain(..) {
            let covers = self.disk.serial;
            self.reads += u64::from(matches!(op, Op::Read { .. }));
            self.flights.push(Flight { number, op, covers });
        }
        for reply in self.effects.replies.drain(..) {
            assert!(self.owed.remove(&reply.origin.slot).is_some(), "answered twice: {reply:?}");
            self.replies.push(reply);
        }
        self.mail.append(&mut self.effects.mail);
    }

    /// Something of it can happen without time passing.
    pub(super) fn is_busy(&self) -> bool {
        self.shard.is_some() && (self.pending_turn || !self.flights.is_empty())
    }

    pub(super) fn is_up(&self) -> bool {
        self.shard.is_some()
    }

    /// A turn that is due, or a completion.
    pub(super) fn work(&mut self) {
        if self.pending_turn && (self.flights.is_empty() || !self.rng.one_in(3)) {
            self.turn();
        } else if !self.flights.is_empty() {
            let at = self.rng.below(self.flights.len());
            self.complete(at);
        }
    }

    pub(super) fn in_flight(&self) -> usize {
        self.flights.len()
    }

    /// Kinds of operations in flight: log writes, other writes, syncs, reads.
    pub(super) fn flights_by_kind(&self) -> [usize; 4] {
        let mut counts = [0; 4];
        for flight in &self.flights {
            counts[match flight.op {
                Op::Write { dsync: true, .. } => 0,
                Op::Write { .. } => 1,
                Op::Sync { .. } => 2,
                _ => 3,
            }] += 1;
        }
        counts
    }

    /// Complete one operation of a kind, if there is one.
    pub(super) fn complete_kind(&mut self, kind: impl Fn(&Op) -> bool) -> bool {
        let found = self.flights.iter().position(|f| kind(&f.op));
        found.map(|at| self.complete(at)).is_some()
    }

    pub(super) fn complete(&mut self, at: usize) {
        let Flight { number, op, covers } = self.flights.swap_remove(at);
        let done = match op {
            Op::Read { offset, mut buf, .. } => {
                let failed = self.read_errors.is_some_and(|n| self.rng.one_in(n));
                let from = offset as usize;
                let len = buf.len();
                buf.copy_from_slice(&self.disk.current[from..from + len]);
                self.tear(offset, &mut buf);
                Done::Read { buf, result: if failed { Err(Errno(libc::EIO)) } else { Ok(()) } }
            }
            Op::Write { offset, ref bufs, dsync, .. } => {
                self.disk.written(offset, flat(bufs), dsync);
                Done::Write(Ok(()))
            }
            Op::Sync { .. } => {
                self.disk.synced(covers);
                Done::Sync(Ok(()))
            }
            other => panic!("a shard does not ask for {other:?}"),
        };
        let mut effects = std::mem::take(&mut self.effects);
        self.shard().completed(number, Completion { token: Token(number), done }, &mut effects);
        self.effects = effects;
        self.pending_turn = true;
        self.collect();
    }

    /// A read beside a write in flight sees any mixture.
    fn tear(&mut self, offset: u64, out: &mut [u8]) {
        let end = offset + out.len() as u64;
        for flight in &self.flights {
            let Op::Write { offset: start, ref bufs, .. } = flight.op else { continue };
            let len: usize = bufs.iter().map(bytes::Bytes::len).sum();
            let (from, to) = (offset.max(start), end.min(start + len as u64));
            if from < to {
                let data = flat(bufs);
                let data = &data[(from - start) as usize..(to - start) as usize];
                Disk::scatter(&mut out[(from - offset) as usize..(to - offset) as usize], 0, data, &mut self.rng, 2);
            }
        }
    }

    /// Power is lost. Who waited for an answer gets none.
    pub(super) fn crash(&mut self) {
        self.kill();
        self.now = self.now.after_ms(1);
        self.start();
    }

    /// Power is lost, and stays away.
    pub(super) fn kill(&mut self) {
        self.crashes += 1;
        self.shard = None;
        self.pending_turn = false;
        self.mail.clear();
        self.effects = Effects::default();
        self.owed.clear();
        let keep = self.rng.below(5);
        for (_, offset, data) in std::mem::take(&mut self.disk.volatile) {
            Disk::scatter(&mut self.disk.durable, offset, &data, &mut self.rng, keep);
        }
        for flight in std::mem::take(&mut self.flights) {
            if let Op::Write { offset, bufs, .. } = flight.op {
                Disk::scatter(&mut self.disk.durable, offset, &flat(&bufs), &mut self.rng, keep);
            }
        }
        self.disk.current.clone_from(&self.disk.durable);
    }

    /// Spoil the first block of the log that holds `stamp`, or the block in front of it.
    pub(super) fn rot(&mut self, stamp: u64, in_front: bool) {
        let zone = self.layout.log_offset as usize..self.layout.meta_offset as usize;
        let found =
            self.disk.durable[zone.clone()].chunks(BLOCK).position(|b| b.chunks(8).all(|w| w == stamp.to_le_bytes()));
        let at = zone.start + (found.expect("the stamp is in the log") - usize::from(in_front)) * BLOCK;
        self.disk.durable[at + 9] ^= 0x40;
        self.disk.current[at + 9] ^= 0x40;
    }

    /// Spoil every batch of the log that speaks of `copyset`.
    pub(super) fn rot_batches_of(&mut self, copyset: CopysetId) {
        let zone = self.layout.log_offset as usize..self.layout.meta_offset as usize;
        let id = copyset.0.to_le_bytes();
        let speaks = |b: &[u8]| b.starts_with(b"RAFTLOG1") && b.windows(8).any(|w| w == id);
        let found: Vec<usize> = zone.step_by(BLOCK).filter(|&at| speaks(&self.disk.durable[at..at + BLOCK])).collect();
        assert!(!found.is_empty());
        for at in found {
            self.disk.durable[at + 9] ^= 0x40;
            self.disk.current[at + 9] ^= 0x40;
        }
    }

    /// Spoil every block outside the log that holds `stamp`; how many there are.
    pub(super) fn rot_slot(&mut self, stamp: u64) -> usize {
        let (from, disk) = (self.layout.slots_offset as usize, &mut self.disk);
        let holds = |b: &[u8]| b.chunks(8).all(|w| w == stamp.to_le_bytes());
        let places = (from..disk.current.len() / BLOCK * BLOCK).step_by(BLOCK);
        let found: Vec<usize> = places.filter(|&at| holds(&disk.current[at..at + BLOCK])).collect();
        for at in &found {
            disk.current[at + 9] ^= 0x40;
            disk.durable[at + 9] ^= 0x40;
        }
        found.len()
    }

    /// Stop in good order and start again.
    pub(super) fn restart(&mut self) {
        self.shard().drain();
        self.pending_turn = true;
        for _ in 0..100_000 {
            if self.shard().stopped() {
                break;
            }
            self.step();
        }
        assert!(self.shard().stopped(), "draining does not end: {}", self.describe());
        assert!(self.owed.is_empty(), "{} requests were never answered", self.owed.len());
        self.crash();
        self.crashes -= 1;
    }

    pub(super) fn blocks(&self) -> u32 {
        self.setup.chunk_size / BLOCK as u32
    }
}
