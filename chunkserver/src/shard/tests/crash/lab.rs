//! One shard on that disk, one event after the other, and the judge of what a power cut leaves of it.

use super::history::{Change, History};
use super::medium::{Image, Medium};
use super::pages::Lying;
use crate::chunk::{ApplyError, ExtentPool, FLAG_SPARSE, Layout, Params};
use crate::io::buffer::Arena;
use crate::io::{Completion, Done, Instant, Op, Token};
use crate::metrics::{Registry, ShardMetrics};
use crate::shard::boot::Boot;
use crate::shard::request::{AdminOp, ChunkOp, Origin, Outcome, Reply, ReplyData, Request, RequestOp};
use crate::shard::{Arenas, Config, Effects, Failure, Shard, State};
use raftlog::{BLOCK, CopysetId, Index};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

/// Most sectors that may go either way at one moment.
pub(super) const FREE_MAX: usize = 12;
/// One in so many recovered images goes through a round and another start.
pub(super) const LIVE_ON: u64 = 8;

const ID: CopysetId = CopysetId::new(1, 1);
const PEER: u64 = 7;
const BLOCK_LEN: u32 = BLOCK as u32;

/// What is wrong with an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Violation {
    /// An answered operation is gone.
    Lost,
    /// The chunks are in no state they ever were in.
    Wrong,
    /// Sound data counts as rotten, or lost.
    Rot,
    /// In place, or in a page, is what the log does not know as committed.
    AheadOfLog,
    /// A page speaks of data that is not in place.
    AheadOfData,
    /// Replay finds no slot.
    NoSlot,
    /// The shard does not start.
    Stuck,
}

/// What a disk operation is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    BootSync,
    Read,
    /// A log write outside a round.
    Append,
    /// The commit record a round starts with.
    Commit,
    Data,
    DataSync,
    Page,
    PagesSync,
    Checkpoint,
}

struct Flight {
    number: u64,
    kind: Kind,
    op: Op,
    /// Of a sync: the writes it makes durable.
    covers: Vec<u64>,
}

#[derive(Clone)]
pub(super) struct Setup {
    layout: Layout,
    arenas: Arenas,
    metrics: Arc<ShardMetrics>,
}

impl Setup {
    pub(super) fn new(chunk_size: u32, slots: u64) -> Self {
        let params = Params {
            uuid: *b"0123456789abcdef",
            size: (4 << 20) + slots * u64::from(chunk_size) + 512,
            shards: 1,
            chunk_size,
            // Roomy: a restart opens a new segment, and a log half full would start a round by itself, whose sync hides
            // what start-up did not sync.
            log_bytes_per_shard: 8 << 16,
            log_segment_size: 1 << 16,
            flags: FLAG_SPARSE,
        };
        let layout = Layout::new(&params).unwrap();
        assert_eq!(u64::from(layout.slot_count), slots);
        let payload = Arena::new(2 << 20).unwrap();
        let arenas = Arenas { all_payload: vec![payload.clone()], payload, work: Arena::new(4 << 20).unwrap() };
        Self { layout, arenas, metrics: Registry::new(1).shard(0).unwrap().clone() }
    }
}

pub(super) struct Lab {
    setup: Setup,
    medium: Medium,
    shard: Shard,
    effects: Effects,
    flights: VecDeque<Flight>,
    now: Instant,
    next_slot: u32,
    writes: u64,
    asked: BTreeMap<u32, usize>,
    replies: Vec<Reply>,
    pub(super) history: History,
    /// To tell what an operation is for.
    round_asked: bool,
    pages_written: bool,
    pages_synced: bool,
    /// Operations of this kind are reported done that are not.
    pub(super) dropped: Option<Kind>,
    /// Pages overwrite both of their copies.
    pub(super) one_copy: bool,
    watched: bool,
    pub(super) images: u64,
    pub(super) free_most: usize,
    pub(super) found: BTreeSet<Violation>,
}

impl Lab {
    /// A copyset that leads, on a disk with nothing in it.
    pub(super) fn new(setup: Setup) -> Self {
        let mut lab = Self::on(setup, Medium::default(), History::new());
        lab.boot(&Image::default()).unwrap();
        lab.ask(RequestOp::Admin(AdminOp::CreateCopyset { peers: vec![PEER] }));
        lab.settle();
        assert_eq!(lab.replies.pop().unwrap().outcome, Outcome::Success);
        lab.history.next_index = lab.last_index() + 1;
        lab
    }

    fn on(setup: Setup, medium: Medium, history: History) -> Self {
        let now = Instant(1_000_000_000);
        let shard = Self::shard(&setup, now);
        Self {
            setup,
            medium,
            shard,
            effects: Effects::default(),
            flights: VecDeque::new(),
            now,
            next_slot: 0,
            writes: 0,
            asked: BTreeMap::new(),
            replies: Vec::new(),
            history,
            round_asked: false,
            pages_written: false,
            pages_synced: false,
            dropped: None,
            one_copy: false,
            watched: false,
            images: 0,
            free_most: 0,
            found: BTreeSet::new(),
        }
    }

    fn shard(setup: &Setup, now: Instant) -> Shard {
        let config = Config {
            shard: 0,
            peer: PEER,
            dirty_limit: 1 << 20,
            flush_age_ns: 3_600_000_000_000,
            election_ms: 1000,
            snapshot_rate: 0,
            trash_s: 0,
            wall_s: 0,
            seed: 1,
        };
        let extents = ExtentPool::new(&setup.layout);
        let metrics = Arc::clone(&setup.metrics);
        Shard::new(config, setup.layout.clone(), setup.arenas.clone(), extents, metrics, now).unwrap()
    }

    /// From now on every moment is looked at.
    pub(super) fn watch(&mut self) {
        self.watched = true;
    }

    /// From start to serving. `image`: what it starts from, to be looked at when the log is recovered and before
    /// anything is replayed.
    fn boot(&mut self, image: &Image) -> Result<(), Violation> {
        let mut looked = false;
        for _ in 0..10_000 {
            if !looked && matches!(self.shard.state, State::Boot(Boot::Metadata { .. })) {
                looked = true;
                let commit = self.shard.log.borrow().index(ID).map_or(0, |index| index.hard_state().commit);
                let lying = Lying { layout: &self.setup.layout, image, history: &self.history, commit };
                self.found.extend(lying.check().err());
            }
            match self.shard.failure() {
                Some(Failure::Apply(ApplyError::NoSlot)) => return Err(Violation::NoSlot),
                Some(_) => return Err(Violation::Stuck),
                None if self.shard.serving() && self.shard.replay_over && self.idle() => {
                    let lost = !self.shard.lost.is_empty() || self.shard.store.suspect_chunks() > 0;
                    return if lost { Err(Violation::Rot) } else { Ok(()) };
                }
                None => {}
            }
            match self.flights.is_empty() {
                true => self.turn(),
                false => self.step(),
            }
        }
        Err(Violation::Stuck)
    }

    /// Of the log; the leader's own entries are in it too.
    fn last_index(&self) -> u64 {
        self.shard.log.borrow().index(ID).map_or(0, Index::last_index)
    }

    /// The process is killed and starts again on the same disk, which kept its cache.
    pub(super) fn kill(&mut self) {
        (self.flights, self.asked) = (VecDeque::new(), BTreeMap::new());
        self.medium.killed();
        self.shard = Self::shard(&self.setup, self.now);
        // What is replayed is answered for: reads have seen it.
        let watched = std::mem::take(&mut self.watched);
        self.boot(&Image::default()).unwrap();
        self.history.next_index = self.last_index() + 1;
        self.history.answered = self.history.len();
        self.watched = watched;
    }

    fn ask(&mut self, op: RequestOp) -> u32 {
        let slot = self.next_slot;
        self.next_slot += 1;
        let origin = Origin { shard: 0, slot, serial: slot };
        let mut effects = std::mem::take(&mut self.effects);
        self.shard.request(Request { copyset: ID, op, origin }, &mut effects);
        self.effects = effects;
        self.turn();
        slot
    }

    fn change(&mut self, change: Change, sectors: &'static [usize], op: impl FnOnce(&Self, usize) -> (u64, ChunkOp)) {
        let number = self.history.ask(change, sectors);
        let (chunk, op) = op(self, number);
        self.asked.insert(self.next_slot, number);
        self.ask(RequestOp::Chunk { chunk, op });
        self.look();
    }

    /// Asks for a write of one block, of which only `sectors` are not zero.
    pub(super) fn write(&mut self, chunk: u64, block: u32, sectors: &'static [usize]) {
        self.change(Change::Write { chunk, block }, sectors, |lab, number| {
            let mut buf = lab.setup.arenas.payload.alloc(BLOCK).unwrap();
            buf.copy_from_slice(&lab.history.content(number));
            let crcs = std::iter::once(raftlog::crc32c(&buf)).collect();
            (chunk, ChunkOp::Write { sn: 1, offset: block * BLOCK_LEN, payload: buf.freeze(), crcs })
        });
    }

    pub(super) fn zero(&mut self, chunk: u64, block: u32) {
        let op = ChunkOp::Zero { offset: block * BLOCK_LEN, len: BLOCK_LEN };
        self.change(Change::Zero { chunk, block }, &[], |_, _| (chunk, op));
    }

    pub(super) fn delete(&mut self, chunk: u64) {
        self.change(Change::Delete { chunk }, &[], |_, _| (chunk, ChunkOp::Delete { sn: 1 }));
    }

    /// Starts a round.
    pub(super) fn round(&mut self) {
        self.shard.want_memory();
        self.round_asked = true;
        self.turn();
        self.look();
    }

    /// Nothing is under way, nor held up.
    fn idle(&self) -> bool {
        self.flights.is_empty() && self.shard.log_write_deadline() == Instant::FAR
    }

    /// Until nothing is under way, nor held up.
    pub(super) fn settle(&mut self) {
        while !self.idle() {
            if self.flights.is_empty() {
                self.now = self.now.max(self.shard.log_write_deadline());
                self.turn();
                self.look();
            } else {
                self.step();
            }
        }
    }

    /// Until an operation of this kind is under way.
    pub(super) fn until(&mut self, kind: Kind) {
        while !self.flights.iter().any(|f| f.kind == kind) {
            assert!(!self.flights.is_empty(), "no {kind:?}");
            self.step();
        }
    }

    fn turn(&mut self) {
        self.now = self.now.after_ns(10_000);
        let mut effects = std::mem::take(&mut self.effects);
        self.shard.end_turn(self.now, &mut effects);
        for (number, op) in effects.ops.drain(..) {
            self.submit(number, op);
        }
        for reply in effects.replies.drain(..) {
            match self.asked.remove(&reply.origin.slot) {
                Some(number) => {
                    assert_eq!(reply.outcome, Outcome::Success, "operation {number}");
                    self.history.answer(number, reply.applied_index);
                }
                None => self.replies.push(reply),
            }
        }
        self.effects = effects;
    }

    fn kind_of(&mut self, op: &Op) -> Kind {
        match op {
            Op::Read { .. } => Kind::Read,
            Op::Sync { .. } if matches!(self.shard.state, State::Boot(_)) => Kind::BootSync,
            Op::Sync { .. } if self.pages_written => {
                (self.pages_written, self.pages_synced) = (false, true);
                Kind::PagesSync
            }
            Op::Sync { .. } => Kind::DataSync,
            Op::Write { dsync: true, .. } if std::mem::take(&mut self.pages_synced) => Kind::Checkpoint,
            Op::Write { dsync: true, .. } if std::mem::take(&mut self.round_asked) => Kind::Commit,
            Op::Write { dsync: true, .. } => Kind::Append,
            Op::Write { offset, .. } => {
                self.round_asked = false;
                let data = *offset >= self.setup.layout.slots_offset;
                self.pages_written |= !data;
                if data { Kind::Data } else { Kind::Page }
            }
            other => panic!("a shard does not ask for {other:?}"),
        }
    }

    fn submit(&mut self, number: u64, op: Op) {
        let kind = self.kind_of(&op);
        let mut covers = Vec::new();
        match &op {
            Op::Write { offset, bufs, .. } => {
                // Names a write on the medium; the shard's own numbers are used again.
                self.writes += 1;
                covers.push(self.writes);
                let data = bufs.concat();
                self.medium.submit(self.writes, *offset, &data);
                if self.one_copy && kind == Kind::Page {
                    self.medium.submit(self.writes, other_copy(&self.setup.layout, *offset), &data);
                }
            }
            Op::Sync { .. } => covers = self.medium.completed(),
            _ => {}
        }
        self.flights.push_back(Flight { number, kind, op, covers });
    }

    /// The oldest operation under way ends.
    fn step(&mut self) {
        let Some(Flight { number, kind, op, covers }) = self.flights.pop_front() else { return };
        let honest = self.dropped != Some(kind);
        let done = match op {
            Op::Read { offset, mut buf, .. } => {
                self.medium.read(offset, &mut buf);
                Done::Read { buf, result: Ok(()) }
            }
            Op::Write { dsync, .. } => {
                // A dsync write that is reported early is still on its way, and no sync covers it.
                if honest {
                    self.medium.complete(covers[0], dsync);
                }
                Done::Write(Ok(()))
            }
            _ => {
                if honest {
                    self.medium.harden(&covers);
                }
                Done::Sync(Ok(()))
            }
        };
        let mut effects = std::mem::take(&mut self.effects);
        self.shard.completed(number, Completion { token: Token(number), done }, &mut effects);
        self.effects = effects;
        self.turn();
        if kind != Kind::Read {
            self.look();
        }
    }

    /// Every image of this moment.
    fn look(&mut self) {
        if !self.watched {
            return;
        }
        let choices = self.medium.choices();
        self.free_most = self.free_most.max(choices.len());
        assert!(choices.len() <= FREE_MAX, "{} sectors can go either way", choices.len());
        let honest = self.dropped.is_none() && !self.one_copy;
        let (mut images, mut found) = (self.images, BTreeSet::new());
        self.medium.each_image(&choices, |image, digits| {
            images += 1;
            let mut wrong = self.judge(image, honest && images.is_multiple_of(LIVE_ON));
            let under_way = || self.flights.iter().map(|f| f.kind).collect::<Vec<_>>();
            let ok = wrong.is_empty() || !honest;
            assert!(ok, "{wrong:?} with sectors {digits:?} of {:?}: {:?}", under_way(), self.history);
            found.append(&mut wrong);
        });
        self.images = images;
        self.found.append(&mut found);
    }

    fn judge(&self, image: &Image, live_on: bool) -> BTreeSet<Violation> {
        let mut life = self.life(image);
        let count = life.boot(image).and_then(|()| life.state());
        life.found.extend(count.err());
        if live_on && life.found.is_empty() {
            // What it found is the truth from now on, through a round and another start.
            life.round();
            life.settle();
            let image = life.medium.durable.clone();
            let mut next = self.life(&image);
            let again = next.boot(&image).and_then(|()| next.state());
            life.found.append(&mut next.found);
            life.found.extend((again != count).then_some(Violation::Wrong));
        }
        life.found
    }

    /// A life on what a power cut left.
    fn life(&self, image: &Image) -> Self {
        Self::on(self.setup.clone(), Medium::of(image.clone()), self.history.clone())
    }

    /// After how many operations the chunks are.
    fn state(&mut self) -> Result<usize, Violation> {
        let mut found = BTreeMap::new();
        for chunk in self.history.chunks.clone() {
            for block in self.history.blocks.clone() {
                let op = ChunkOp::Read { offset: block * BLOCK_LEN, len: BLOCK_LEN };
                self.ask(RequestOp::Chunk { chunk, op });
                self.settle();
                let reply = self.replies.pop();
                let bytes = match reply.map(|reply| (reply.outcome, reply.data)) {
                    Some((Outcome::Success, ReplyData::Data(parts))) => Some(parts.concat()),
                    Some((Outcome::NoChunk, _)) => None,
                    Some((Outcome::CrcFail, _)) => return Err(Violation::Rot),
                    _ => return Err(Violation::Stuck),
                };
                found.insert((chunk, block), bytes);
            }
        }
        let history = &self.history;
        let is = |count: &usize| {
            let state = history.after(*count);
            found.iter().all(|((chunk, block), bytes)| {
                let want = state.get(chunk).map(|blocks| match blocks.get(block) {
                    Some(number) => history.content(*number),
                    None => vec![0; BLOCK],
                });
                *bytes == want
            })
        };
        if let Some(count) = (history.answered..=history.len()).rev().find(is) {
            return Ok(count);
        }
        Err(if (0..history.answered).any(|count| is(&count)) { Violation::Lost } else { Violation::Wrong })
    }
}

/// Where the other copy of a page lies.
fn other_copy(layout: &Layout, offset: u64) -> u64 {
    let (zone, copy) = match offset < layout.crc_offset {
        true => (layout.meta_offset, BLOCK as u64),
        false => (layout.crc_offset, u64::from(layout.crc_pages()) * BLOCK as u64),
    };
    let at = offset - zone;
    zone + if (at / copy).is_multiple_of(2) { at + copy } else { at - copy }
}
