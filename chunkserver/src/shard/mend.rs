//! Repair from peers (rule 22): a rotten block is asked of the other replicas, and so is a chunk that is in doubt.
//!
//! Whoever finds the harm waits while it is mended: a read, a write to a chunk in doubt, a piece that a lagging replica
//! asked of this one. Nobody leads less for it: a leader asks its followers, a follower whom it likes.
//!
//! A **block** is taken if its checksum is the one the own table wants (`chunk/mend.rs`). A **chunk** is taken in whole,
//! as of an index at least as new as the own; nothing of its copyset is applied meanwhile, so that every entry the
//! piece's sender had beyond that is applied on top of it, in order, and the result is what the sender has. Until it is
//! complete the chunk stays in doubt, on the disk too.
//!
//! The wire has nothing of its own for this: these are the questions and pieces of a raft snapshot (`bulk.rs`).

use super::bulk::{Bulk, PIECE_BYTES, pieces};
use super::read::Job;
use super::request::{Outcome, Request};
use super::supply::PEERS;
use super::{Effects, Shard, reply};
use crate::chunk::ChunkInfo;
use crate::io::Instant;
use crate::metrics::Counter;
use bytes::Bytes;
use copyset::Role;
use raftlog::{BLOCK, CopysetId};
use std::collections::{BTreeMap, VecDeque};

/// What was not answered after so long is asked of another replica, milliseconds.
const PATIENCE_MS: u64 = 200;
/// Chunks in doubt are looked for again after this, milliseconds.
const LOOK_MS: u64 = 500;
/// Pieces of a chunk asked for at once.
const PIECES_MAX: usize = 4;
/// Who has begun to send a chunk is asked so often for what is missing before another one is asked for all of it.
const AGAIN_MAX: u32 = 5;
/// Rounds of all other replicas that are asked.
const ROUNDS: usize = 3;
/// A read is mended in vain at most this often, and from so many times on by taking in its whole chunk.
const MENDS_MAX: u8 = 6;
const WHOLE_FROM: u8 = 4;
/// What nobody has is asked for again after [`LOOK_MS`], then after twice as long, and so on up to this power of two.
const BACKOFF_MAX: u32 = 7;
/// No log index has this bit: a block on its way to its slot must not be taken for one that was taken in meanwhile.
const VERSIONS: u64 = 1 << 63;
/// Those who wait for one chunk; others are refused.
const WAITING_MAX: usize = 1024;

#[derive(Debug)]
enum What {
    /// The one at this offset, by the own table.
    Block { offset: u32 },
    /// Everything.
    Whole {
        todo: VecDeque<(u32, u32)>,
        asked: Vec<(u32, u32)>,
        /// As of its first piece.
        info: Option<ChunkInfo>,
    },
}

/// One chunk that is being mended.
struct Mend {
    what: What,
    /// Who was asked, how many were before, and when the next one is.
    peer: u64,
    tries: usize,
    due: Instant,
    /// How often it has been asked again since its last piece.
    again: u32,
    /// What blocks taken in are told apart by; of each attempt its own.
    version: u64,
    reads: Vec<Job>,
    /// Each with the term it came in: in another one it is not proposed any more (rule 30).
    requests: Vec<(Request, u64)>,
}

/// What is being mended on a shard.
#[derive(Default)]
pub(super) struct Mends {
    jobs: BTreeMap<(CopysetId, u64), Mend>,
    /// There may be chunks in doubt: look at this time. `None`: there are none.
    look: Option<Instant>,
    /// Chunks that nobody could supply: when they are asked for again, and how often that was in vain.
    failed: BTreeMap<(CopysetId, u64), (Instant, u32)>,
    pub(super) attempts: u64,
}

impl Mends {
    /// Nothing of this copyset may be applied now.
    pub(super) fn holds(&self, id: CopysetId) -> bool {
        let of = self.jobs.range((id, 0)..=(id, u64::MAX));
        of.into_iter().any(|(_, mend)| matches!(mend.what, What::Whole { .. }))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.jobs.values().all(|mend| mend.reads.is_empty() && mend.requests.is_empty())
    }
}

impl Shard {
    fn term_of(&self, id: CopysetId) -> u64 {
        self.groups.get(&id).map_or(0, |group| group.raft.term())
    }

    /// There are other replicas that may have what is lost here.
    pub(super) fn has_peers(&self, id: CopysetId) -> bool {
        let Some(group) = self.groups.get(&id).filter(|group| !group.damaged && group.raft.retired() == 0) else {
            return false;
        };
        group.raft.conf().voters.iter().any(|&voter| voter != self.config.peer)
    }

    /// A read found rot. `Err`: it is not to be mended, or was tried often enough.
    pub(super) fn mend_read(&mut self, mut job: Job) -> Result<(), Box<Job>> {
        let (id, chunk) = (job.copyset, job.chunk);
        let leads = self.groups.get(&id).is_some_and(|group| group.raft.role() == Role::Leader);
        // Followers mend for themselves only, or two rotten replicas would ask each other for ever.
        if job.mends >= MENDS_MAX || !self.has_peers(id) || job.origin.shard == PEERS && !leads {
            return Err(Box::new(job));
        }
        job.mends += 1;
        let whole = job.mends >= WHOLE_FROM || self.store.is_doubtful(id, chunk);
        if whole && !self.may_take_in((id, chunk)) {
            return Err(Box::new(job));
        }
        if whole && self.store.chunk_info(id, chunk).is_some() {
            self.store.doubt(id, 0, chunk, self.now.0);
            self.mends.look.get_or_insert(self.now);
        }
        let blocks = What::Block { offset: job.rotten * BLOCK as u32 };
        let mend = self.mends.jobs.entry((id, chunk)).or_insert_with(|| Mend::new(blocks));
        if whole && !matches!(mend.what, What::Whole { .. }) {
            mend.start_whole(self.layout.chunk_size);
        }
        mend.reads.push(job);
        Ok(())
    }

    /// An operation on a chunk in doubt waits until that is over; given back if it will not be.
    pub(super) fn mend_request(&mut self, request: Request, chunk: u64) -> Option<Request> {
        let id = request.copyset;
        if !self.has_peers(id) || !self.may_take_in((id, chunk)) {
            return Some(request);
        }
        let (size, term) = (self.layout.chunk_size, self.term_of(id));
        let mend = self.mends.jobs.entry((id, chunk)).or_insert_with(|| Mend::whole(size));
        if mend.requests.len() >= WAITING_MAX {
            return Some(request);
        }
        mend.requests.push((request, term));
        None
    }

    /// A chunk may be taken in: no raft snapshot is, and it is not one that nobody had a moment ago. (While it is asked
    /// for, nothing of its copyset is applied.)
    fn may_take_in(&self, key: (CopysetId, u64)) -> bool {
        !self.installs(key.0) && self.mends.failed.get(&key).is_none_or(|(at, _)| *at <= self.now)
    }

    /// There may be chunks in doubt.
    pub(super) fn look_for_doubts(&mut self) {
        self.mends.look.get_or_insert(self.now);
    }

    pub(super) fn mend_deadline(&self) -> Instant {
        let due = self.mends.jobs.values().map(|mend| mend.due).min().unwrap_or(Instant::FAR);
        due.min(self.mends.look.unwrap_or(Instant::FAR))
    }

    /// Begin what is due, and ask again what was not answered.
    pub(super) fn mend_step(&mut self, out: &mut Effects) {
        if self.mends.look.is_some_and(|at| at <= self.now) {
            self.find_doubts();
        }
        let due = |mend: &Mend| mend.due <= self.now;
        let keys: Vec<(CopysetId, u64)> =
            self.mends.jobs.iter().filter(|(_, mend)| due(mend)).map(|(&key, _)| key).collect();
        for key in keys {
            self.ask_next(key, out);
        }
    }

    /// One chunk in doubt of each copyset that could be taken in.
    fn find_doubts(&mut self) {
        let any = self.store.suspect_chunks() > 0;
        self.mends.failed.retain(|key, _| self.store.is_doubtful(key.0, key.1));
        self.mends.look = any.then(|| self.now.after_ms(LOOK_MS));
        if !any || !self.replay_over {
            return;
        }
        let ids: Vec<CopysetId> = self.groups.keys().copied().collect();
        for id in ids {
            let led = self.groups.get(&id).is_some_and(|group| group.raft.leader() != 0);
            if led
                && self.has_peers(id)
                && !self.mends.holds(id)
                && let Some(chunk) = self.store.doubts(id).into_iter().find(|&chunk| self.may_take_in((id, chunk)))
            {
                let size = self.layout.chunk_size;
                self.mends.jobs.entry((id, chunk)).or_insert_with(|| Mend::whole(size));
            }
        }
    }

    /// Ask again for what is missing, or ask the next replica; after some rounds of all of them, give up for now.
    fn ask_next(&mut self, key: (CopysetId, u64), out: &mut Effects) {
        let id = key.0;
        let size = self.layout.chunk_size;
        let (mut others, leader, index) = match self.groups.get(&id) {
            Some(group) => (group.raft.conf().voters.clone(), group.raft.leader(), group.applied),
            None => (Vec::new(), 0, 0),
        };
        others.retain(|&voter| voter != self.config.peer);
        others.sort_by_key(|&voter| voter != leader);
        let Some(mend) = self.mends.jobs.get_mut(&key) else { return };
        if self.installs.takes(id) {
            return self.end_mend(key, false, out);
        }
        if let What::Whole { asked, info: Some(_), .. } = &mend.what
            && mend.again < AGAIN_MAX
            && others.contains(&mend.peer)
        {
            (mend.again, mend.due) = (mend.again + 1, self.now.after_ms(PATIENCE_MS));
            let (asks, to) = (asked.clone(), mend.peer);
            return self.ask_for(key, to, index, &asks, out);
        }
        if mend.tries >= ROUNDS * others.len() {
            return self.end_mend(key, false, out);
        }
        mend.peer = others.get(mend.tries % others.len()).copied().unwrap_or(0);
        mend.tries += 1;
        self.mends.attempts += 1;
        mend.version = VERSIONS | self.mends.attempts;
        (mend.again, mend.due) = (0, self.now.after_ms(PATIENCE_MS));
        let asks: Vec<(u32, u32)> = match &mut mend.what {
            What::Block { offset } => vec![(*offset, BLOCK as u32)],
            What::Whole { todo, asked, info } => {
                (*todo, *info) = (pieces(size, PIECE_BYTES).collect(), None);
                asked.clear();
                asked.extend(todo.drain(..PIECES_MAX.min(todo.len())));
                asked.clone()
            }
        };
        let to = mend.peer;
        self.ask_for(key, to, index, &asks, out);
    }

    fn ask_for(&self, (id, chunk): (CopysetId, u64), to: u64, index: u64, asks: &[(u32, u32)], out: &mut Effects) {
        for &(offset, len) in asks {
            self.send_bulk(id, to, &Bulk::AskPiece { index, chunk, offset, len }, Bytes::new(), out);
        }
    }

    /// A piece of a chunk that is being mended, whose checksums hold.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn mend_piece(
        &mut self,
        key: (CopysetId, u64),
        (offset, len): (u32, u32),
        index: u64,
        info: Option<ChunkInfo>,
        crcs: &[u32],
        payload: &Bytes,
        out: &mut Effects,
    ) {
        let (id, chunk) = key;
        let applied = self.groups.get(&id).map_or(u64::MAX, |group| group.applied);
        let Some(mend) = self.mends.jobs.get_mut(&key) else { return };
        match &mut mend.what {
            What::Block { offset: at } if (*at, BLOCK as u32) == (offset, len) => {
                let mended = info.map_or(0, |_| self.store.mend(id, chunk, offset, payload.clone(), crcs, self.now.0));
                self.metrics.add(Counter::MendedBlocks, mended as u64);
                if mended > 0 {
                    mend.reads.iter_mut().for_each(|job| job.mends -= 1); // not in vain
                }
                // Whoever read it looks again, mended or not: the block may have been overwritten meanwhile, on either side.
                self.end_mend(key, true, out);
            }
            What::Block { .. } => {}
            What::Whole { todo, asked, info: first } => {
                if index < applied {
                    return; // a late answer to what was asked when less was applied here
                }
                let Some(at) = asked.iter().position(|&piece| piece == (offset, len)) else { return };
                let Some(info) = info else {
                    // Deleted at or behind the own index: so will it be here.
                    self.store.doubt_gone(id, index, chunk, self.now.0);
                    return self.end_mend(key, true, out);
                };
                if first.is_some_and(|first| first.created != info.created) {
                    (mend.due, mend.again) = (self.now, AGAIN_MAX); // another life of it: from the beginning
                    return;
                }
                asked.swap_remove(at);
                let begins = first.is_none();
                first.get_or_insert(info);
                let (next, first) = (todo.pop_front(), first.unwrap_or(info));
                asked.extend(next);
                let over = asked.is_empty();
                (mend.due, mend.again) = (self.now.after_ms(PATIENCE_MS), 0);
                let (to, version) = (mend.peer, mend.version);
                if begins && !self.take_in_begin(id, &info) {
                    return self.end_mend(key, false, out);
                }
                self.store.install_seen(id, &info);
                self.take_in(id, chunk, version, offset, crcs, payload);
                if let Some((offset, len)) = next {
                    self.send_bulk(id, to, &Bulk::AskPiece { index: applied, chunk, offset, len }, Bytes::new(), out);
                } else if over {
                    self.store.install_end(id, &first, self.now.0);
                    self.metrics.add(Counter::MendedChunks, 1);
                    tracing::warn!(copyset = ?id, chunk, from = to, "a chunk that was lost here is taken from a peer");
                    self.end_mend(key, true, out);
                }
            }
        }
    }

    /// Make place for a chunk that is taken in; what another life of it holds goes.
    fn take_in_begin(&mut self, id: CopysetId, info: &ChunkInfo) -> bool {
        let (chunk, created) = (info.chunk, info.created);
        // It is in doubt from now on, whatever it was: half a chunk must not look like one.
        let same_life = self.store.chunk_info(id, chunk).is_some_and(|here| here.created == created);
        if !same_life {
            if !self.store.promise(1) {
                self.want_slots();
                return false;
            }
            self.store.unpromise(1);
        }
        self.store.install_begin(id, info) && self.store.doubt(id, created, chunk, self.now.0)
    }

    /// It is over, well or not: those who wait try again, or are told.
    fn end_mend(&mut self, key: (CopysetId, u64), well: bool, out: &mut Effects) {
        let Some(mend) = self.mends.jobs.remove(&key) else { return };
        if well {
            self.mends.failed.remove(&key);
        } else if matches!(mend.what, What::Whole { .. }) {
            let failed = self.mends.failed.entry(key).or_insert((self.now, 0));
            *failed = (self.now.after_ms(LOOK_MS << failed.1.min(BACKOFF_MAX)), failed.1 + 1);
        }
        if let Some(group) = self.groups.get_mut(&key.0).filter(|g| !g.queue.is_empty() && !g.applying) {
            group.applying = true;
            self.applying.push(key.0);
        }
        for job in mend.reads {
            if well { self.read_again(job, out) } else { self.give_up_read(job, out) }
        }
        for (request, term) in mend.requests {
            match well {
                true if self.term_of(key.0) != term => self.redirect(key.0, request.origin, out),
                true => self.chunk_request(request, out),
                false => reply(out, request.origin, Outcome::CrcFail),
            }
        }
        if self.store.suspect_chunks() > 0 {
            self.mends.look.get_or_insert(self.now.after_ms(if well { 0 } else { LOOK_MS }));
        }
    }

    /// Whose pieces these are: the replica that was asked for this chunk.
    pub(super) fn mends_from(&self, key: (CopysetId, u64), from: u64) -> bool {
        self.mends.jobs.get(&key).is_some_and(|mend| mend.peer == from)
    }

    /// A copyset, or all, will not be mended any more.
    pub(super) fn stop_mends(&mut self, id: Option<CopysetId>, outcome: Outcome, out: &mut Effects) {
        self.mends.failed.retain(|key, _| id.is_some_and(|id| key.0 != id));
        for (_, mend) in self.mends.jobs.extract_if(.., |key, _| id.is_none_or(|id| key.0 == id)) {
            for origin in mend.reads.iter().map(|job| job.origin).chain(mend.requests.iter().map(|r| r.0.origin)) {
                reply(out, origin, outcome);
            }
        }
    }
}

impl Mend {
    fn new(what: What) -> Self {
        Self { what, peer: 0, tries: 0, due: Instant(0), again: 0, version: 0, reads: Vec::new(), requests: Vec::new() }
    }

    fn whole(chunk_size: u32) -> Self {
        Self::new(What::Whole { todo: pieces(chunk_size, PIECE_BYTES).collect(), asked: Vec::new(), info: None })
    }

    fn start_whole(&mut self, chunk_size: u32) {
        let Self { reads, requests, .. } = std::mem::replace(self, Self::whole(chunk_size));
        (self.reads, self.requests) = (reads, requests);
    }
}
