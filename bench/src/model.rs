//! Which stamps each block may legally show: the checker behind `--verify`.
//!
//! Every block is a register; its history is the list of writes with the moment they were issued and answered. A read
//! may return a write that was issued before the read ended and was not certainly overwritten before the read began:
//! a write is *dead* once another one, issued after its answer, has been answered, or once a read that began after its
//! answer saw something else; being seen counts as an answer. Writes never answered (timeout, lost connection, killed server) stay possible for ever,
//! until [`Model::settle`] decides them after a restart: from then on only what was seen is legal, so a write that
//! vanished and comes back later is found too. Time is a counter of events, not a clock.

use crate::stamp::{self, Address, BLOCK, Block, Content, Stamp};
use std::collections::VecDeque;
use std::fmt;

/// What a block held before this run wrote it (number of the write that stands for it).
const INITIAL: u64 = 0;
const NEVER: u64 = u64::MAX;

/// What is known of blocks before the first write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Initial {
    /// Fresh copysets: absent chunks, zeros.
    Zero,
    /// Somebody used them before: anything that does not claim to be ours.
    Unknown,
}

/// A block that shows what it may not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The block that was read.
    pub address: Address,
    /// What is wrong with it.
    pub kind: Wrong,
    /// What it showed.
    pub seen: Content,
    /// Numbers of the writes that would have been legal (0: the state before the first write).
    pub legal: Vec<u64>,
}

/// The ways a block can be wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wrong {
    /// Zeros although a write was acknowledged.
    Lost,
    /// An older write than the last acknowledged one.
    Stale,
    /// Neither zeros nor a whole stamp.
    Garbage,
    /// A whole stamp of another block.
    Misplaced,
    /// A whole stamp of another run.
    Foreign,
    /// Our run, but a write never issued to this block.
    NeverWritten,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Address { pool, copyset, chunk, block } = self.address;
        write!(f, "copyset {pool}:{copyset} chunk {chunk} block {block}: {:?}: ", self.kind)?;
        match &self.seen {
            Content::Zero => write!(f, "zeros")?,
            Content::Garbage => write!(f, "no valid stamp")?,
            Content::Stamped(stamp) => write!(f, "run {:x} write {} of {:?}", stamp.run, stamp.seq, stamp.address)?,
        }
        write!(f, "; legal writes: {:?}", self.legal)
    }
}

#[derive(Debug, Clone, Copy)]
struct Write {
    seq: u64,
    issued: u64,
    acked: u64,
    dead: u64,
}

/// History of one block. Quiet blocks hold only `base`; `writes` is in use while more than one outcome is possible.
#[derive(Debug, Clone, Default)]
struct History {
    base: u64,
    writes: Vec<Write>,
}

impl History {
    fn issue(&mut self, seq: u64, now: u64) {
        if self.writes.is_empty() {
            self.writes.push(Write { seq: self.base, issued: 0, acked: 0, dead: NEVER });
        }
        self.writes.push(Write { seq, issued: now, acked: NEVER, dead: NEVER });
    }

    fn ack(&mut self, seq: u64, now: u64, oldest_read: u64) {
        let Some(issued) = self.writes.iter_mut().find(|write| write.seq == seq).map(|write| {
            write.acked = write.acked.min(now);
            write.issued
        }) else {
            return;
        };
        for write in self.writes.iter_mut().filter(|write| write.acked < issued) {
            write.dead = write.dead.min(now);
        }
        self.prune(oldest_read);
    }

    /// Forgets writes that no read in flight may still return.
    fn prune(&mut self, oldest_read: u64) {
        self.writes.retain(|write| write.dead >= oldest_read);
        if let [only] = self.writes[..]
            && only.acked != NEVER
        {
            self.base = only.seq;
            self.writes.clear();
        }
    }

    fn is_legal(&self, seq: u64, began: u64) -> bool {
        match self.writes.iter().find(|write| write.seq == seq) {
            Some(write) => write.dead > began,
            None => self.writes.is_empty() && self.base == seq,
        }
    }

    fn legal(&self, began: u64) -> Vec<u64> {
        if self.writes.is_empty() {
            return vec![self.base];
        }
        self.writes.iter().filter(|write| write.dead > began).map(|write| write.seq).collect()
    }

    /// A read that began at `began` returned `seq`: what was answered before it began is overwritten by now. The write
    /// itself is done, answered or not: each number is sent once, so it cannot be done again.
    fn observe(&mut self, seq: u64, began: u64, now: u64, oldest_read: u64) {
        if self.writes.is_empty() {
            return;
        }
        for write in self.writes.iter_mut().filter(|write| write.seq != seq && write.acked < began) {
            write.dead = write.dead.min(now);
        }
        if let Some(seen) = self.writes.iter_mut().find(|write| write.seq == seq) {
            seen.acked = seen.acked.min(now);
        }
        self.prune(oldest_read);
    }

    fn newest_known(&self) -> u64 {
        self.writes.iter().map(|write| write.seq).max().unwrap_or(self.base).max(self.base)
    }
}

/// A chunk as the model addresses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChunkAddr {
    /// Logical pool.
    pub pool: u32,
    /// Copyset inside the pool.
    pub copyset: u32,
    /// Chunk id.
    pub chunk: u64,
}

struct Chunk {
    addr: ChunkAddr,
    blocks: Vec<History>,
}

/// What became of unanswered writes, counted by [`Model::settle`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Survival {
    /// Blocks of unanswered writes that were found.
    pub survived: u64,
    /// Blocks of unanswered writes that were not there although nothing newer was.
    pub vanished: u64,
    /// Blocks of unanswered writes below a newer write: nobody can tell.
    pub hidden: u64,
}

/// Candidates of one block, as they are saved: (block, answered and possibly visible, unanswered).
pub type SavedBlock = (u32, Vec<u64>, Vec<u64>);

/// The histories of all blocks one worker writes.
pub struct Model {
    run: u64,
    seed: u64,
    initial: Initial,
    next_seq: u64,
    stride: u64,
    clock: u64,
    /// Starts of reads in flight, oldest first; finished ones are taken out lazily.
    reads: VecDeque<(u64, bool)>,
    chunks: Vec<Chunk>,
}

/// A read in flight; hand it back with [`Model::end_read`] or [`Model::cancel_read`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadToken(u64);

impl Model {
    /// A model of `chunks` with `blocks` blocks each. Writes are numbered `first_seq, first_seq + stride, …` so that
    /// several workers of a run never use the same number.
    pub fn new(run: u64, seed: u64, initial: Initial, chunks: &[ChunkAddr], blocks: u32, seqs: (u64, u64)) -> Self {
        let blocks = vec![History::default(); blocks as usize];
        let chunks = chunks.iter().map(|addr| Chunk { addr: *addr, blocks: blocks.clone() }).collect();
        let (next_seq, stride) = (seqs.0.max(1), seqs.1.max(1));
        Self { run, seed, initial, next_seq, stride, clock: 1, reads: VecDeque::new(), chunks }
    }

    /// Number the next write will get.
    pub const fn next_seq(&self) -> u64 {
        self.next_seq
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn oldest_read(&mut self) -> u64 {
        while let Some((_, true)) = self.reads.front() {
            self.reads.pop_front();
        }
        self.reads.front().map_or(NEVER, |(began, _)| *began)
    }

    fn span(&mut self, chunk: usize, first: u32, count: u32) -> &mut [History] {
        let (first, count) = (first as usize, count as usize);
        self.chunks.get_mut(chunk).and_then(|chunk| chunk.blocks.get_mut(first..first + count)).unwrap_or_default()
    }

    /// Starts a write of `count` blocks and returns its number.
    pub fn begin_write(&mut self, chunk: usize, first: u32, count: u32) -> u64 {
        let seq = self.next_seq;
        self.next_seq += self.stride;
        let now = self.tick();
        for history in self.span(chunk, first, count) {
            history.issue(seq, now);
        }
        seq
    }

    /// The server said that write `seq` is done.
    pub fn end_write(&mut self, chunk: usize, first: u32, count: u32, seq: u64) {
        let (now, oldest) = (self.tick(), self.oldest_read());
        for history in self.span(chunk, first, count) {
            history.ack(seq, now, oldest);
        }
    }

    /// The payload of write `seq`, block by block.
    pub fn fill(&self, chunk: usize, first: u32, seq: u64, payload: &mut [u8]) {
        let Some(addr) = self.chunks.get(chunk).map(|chunk| chunk.addr) else { return };
        let (blocks, _) = payload.as_chunks_mut::<BLOCK>();
        for (block, number) in blocks.iter_mut().zip(first..) {
            let address = Address { pool: addr.pool, copyset: addr.copyset, chunk: addr.chunk, block: number };
            stamp::put(&Stamp { run: self.run, seq, seed: self.seed, address }, block);
        }
    }

    /// Starts a read.
    pub fn begin_read(&mut self) -> ReadToken {
        let now = self.tick();
        self.reads.push_back((now, false));
        ReadToken(now)
    }

    /// Forgets a read that got no answer.
    pub fn cancel_read(&mut self, token: ReadToken) {
        if let Ok(at) = self.reads.binary_search_by_key(&token.0, |(began, _)| *began)
            && let Some(read) = self.reads.get_mut(at)
        {
            read.1 = true;
        }
    }

    /// Checks what a read returned (`None`: the chunk does not exist, all zeros); wrong blocks go to `wrong`.
    pub fn end_read(
        &mut self,
        token: ReadToken,
        chunk: usize,
        range: (u32, u32),
        data: Option<&[u8]>,
        wrong: &mut dyn FnMut(Violation),
    ) {
        self.check(token.0, chunk, range, data, wrong, None);
        self.cancel_read(token);
    }

    /// Like a read, but after a restart and with nothing in flight: what is seen becomes the only legal content.
    pub fn settle(
        &mut self,
        chunk: usize,
        range: (u32, u32),
        data: Option<&[u8]>,
        wrong: &mut dyn FnMut(Violation),
    ) -> Survival {
        let mut survival = Survival::default();
        let now = self.tick();
        self.check(now, chunk, range, data, wrong, Some(&mut survival));
        survival
    }

    fn check(
        &mut self,
        began: u64,
        chunk: usize,
        (first, count): (u32, u32),
        data: Option<&[u8]>,
        wrong: &mut dyn FnMut(Violation),
        mut settle: Option<&mut Survival>,
    ) {
        let (now, oldest) = (self.tick(), self.oldest_read());
        let (run, initial) = (self.run, self.initial);
        let Some(addr) = self.chunks.get(chunk).map(|chunk| chunk.addr) else { return };
        let blocks: &[Block] = data.map_or(&[], |data| data.as_chunks::<BLOCK>().0);
        for (index, history) in self.span(chunk, first, count).iter_mut().enumerate() {
            let block = first + index as u32;
            let address = Address { pool: addr.pool, copyset: addr.copyset, chunk: addr.chunk, block };
            let seen = match data {
                None => Content::Zero,
                Some(_) => blocks.get(index).map_or(Content::Garbage, stamp::get),
            };
            match judge(history, &seen, run, initial, address, began) {
                Ok(seq) => match settle.as_deref_mut() {
                    None => history.observe(seq, began, now, oldest),
                    Some(survival) => settle_block(history, seq, survival),
                },
                Err(kind) => wrong(Violation { address, kind, seen, legal: history.legal(began) }),
            }
        }
    }

    /// Blocks of chunk `chunk` that were ever written, ascending.
    pub fn written(&self, chunk: usize) -> impl Iterator<Item = u32> + '_ {
        let blocks = self.chunks.get(chunk).map_or(&[][..], |chunk| &chunk.blocks);
        let used = |history: &History| history.base != INITIAL || !history.writes.is_empty();
        blocks.iter().zip(0..).filter(move |(history, _)| used(history)).map(|(_, block)| block)
    }

    /// Every chunk with the candidates of its written blocks, for saving.
    pub fn save(&self) -> Vec<(ChunkAddr, Vec<SavedBlock>)> {
        let candidates = |block: u32, history: &History| -> SavedBlock {
            if history.writes.is_empty() {
                return (block, vec![history.base], vec![]);
            }
            let alive = history.writes.iter().filter(|write| write.dead == NEVER);
            let (answered, open): (Vec<Write>, Vec<Write>) = alive.partition(|write| write.acked != NEVER);
            let seqs = |writes: Vec<Write>| writes.iter().map(|write| write.seq).collect();
            (block, seqs(answered), seqs(open))
        };
        let chunks = (0..self.chunks.len()).filter_map(|index| {
            let chunk = self.chunks.get(index)?;
            let blocks = self.written(index).filter_map(|block| {
                let history = chunk.blocks.get(block as usize)?;
                Some(candidates(block, history))
            });
            Some((chunk.addr, blocks.collect::<Vec<_>>()))
        });
        chunks.filter(|(_, blocks)| !blocks.is_empty()).collect()
    }

    /// Takes over saved candidates of one of this model's chunks; `false` if a block lies outside.
    pub fn restore(&mut self, addr: ChunkAddr, saved: &[SavedBlock]) -> bool {
        let Some(chunk) = self.chunks.iter_mut().find(|chunk| chunk.addr == addr) else { return false };
        for (block, answered, open) in saved {
            let Some(history) = chunk.blocks.get_mut(*block as usize) else { return false };
            let answered = answered.iter().map(|seq| Write { seq: *seq, issued: 0, acked: 0, dead: NEVER });
            let open = open.iter().map(|seq| Write { seq: *seq, issued: 0, acked: NEVER, dead: NEVER });
            history.writes = answered.chain(open).collect();
            history.prune(NEVER);
        }
        true
    }
}

fn judge(
    history: &History,
    seen: &Content,
    run: u64,
    initial: Initial,
    address: Address,
    began: u64,
) -> Result<u64, Wrong> {
    let before = history.is_legal(INITIAL, began);
    let anything = before && initial == Initial::Unknown;
    match seen {
        Content::Zero if before => Ok(INITIAL),
        Content::Zero => Err(Wrong::Lost),
        Content::Garbage if anything => Ok(INITIAL),
        Content::Garbage => Err(Wrong::Garbage),
        Content::Stamped(stamp) if stamp.address != address => Err(Wrong::Misplaced),
        Content::Stamped(stamp) if stamp.run != run => {
            if anything {
                Ok(INITIAL)
            } else {
                Err(Wrong::Foreign)
            }
        }
        Content::Stamped(stamp) if stamp.seq != INITIAL && history.is_legal(stamp.seq, began) => Ok(stamp.seq),
        Content::Stamped(stamp) if stamp.seq <= history.newest_known() => Err(Wrong::Stale),
        Content::Stamped(_) => Err(Wrong::NeverWritten),
    }
}

fn settle_block(history: &mut History, seen: u64, survival: &mut Survival) {
    for write in history.writes.iter().filter(|write| write.acked == NEVER) {
        match write.seq.cmp(&seen) {
            std::cmp::Ordering::Equal => survival.survived += 1,
            std::cmp::Ordering::Greater => survival.vanished += 1,
            std::cmp::Ordering::Less => survival.hidden += 1,
        }
    }
    history.base = seen;
    history.writes.clear();
}

#[cfg(test)]
#[path = "model_tests.rs"]
mod tests;
