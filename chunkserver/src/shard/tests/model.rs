//! What a chunk may hold. A shard carries out the operations on a copyset in the order it was given them, so a chunk's
//! history is a line of states, and every answer must fit a point of it.

use super::world::{Rng, World};
use crate::shard::request::{ChunkOp, Outcome, Reply, ReplyData};
use raftlog::{BLOCK, CopysetId};
use std::collections::BTreeMap;

/// Stamp of each block, 0 for zeros; `None`: no such chunk.
type State = Option<Vec<u64>>;

#[derive(Clone, Copy, Debug)]
enum Change {
    Write { first: u32, blocks: u32, stamp: u64 },
    Zero { first: u32, blocks: u32 },
    Delete,
    Nothing,
}

#[derive(Default)]
struct Line {
    /// `states[n]` follows `states[n - 1]` by `changes[n - 1]`.
    states: Vec<State>,
    changes: Vec<Change>,
    /// So many changes were answered.
    acked: usize,
}

#[derive(Debug)]
enum Asked {
    Change { key: (CopysetId, u64), number: usize },
    Read { key: (CopysetId, u64), first: u32, blocks: u32, from: usize },
}

#[derive(Default)]
pub(super) struct Model {
    lines: BTreeMap<(CopysetId, u64), Line>,
    asked: BTreeMap<u32, Asked>,
    next_stamp: u64,
    pub(super) reads: u64,
    pub(super) changes: u64,
    pub(super) refused: u64,
    /// Of the changes not answered before a crash.
    pub(super) survived: u64,
    pub(super) vanished: u64,
}

fn apply(state: &State, change: Change, blocks_per_chunk: u32) -> State {
    let set = |mut blocks: Vec<u64>, first: u32, count: u32, stamp| {
        blocks[first as usize..(first + count) as usize].fill(stamp);
        Some(blocks)
    };
    match change {
        Change::Write { first, blocks, stamp } => {
            set(state.clone().unwrap_or_else(|| vec![0; blocks_per_chunk as usize]), first, blocks, stamp)
        }
        Change::Zero { first, blocks } => state.clone().and_then(|s| set(s, first, blocks, 0)),
        Change::Delete => None,
        Change::Nothing => state.clone(),
    }
}

impl Line {
    fn push(&mut self, change: Change, blocks: u32) -> usize {
        if self.states.is_empty() {
            self.states.push(None);
        }
        let next = apply(self.states.last().unwrap(), change, blocks);
        self.states.push(next);
        self.changes.push(change);
        self.changes.len()
    }
    /// Change `number` was refused.
    fn cancel(&mut self, number: usize, blocks: u32) {
        self.changes[number - 1] = Change::Nothing;
        for n in number..self.states.len() {
            self.states[n] = apply(&self.states[n - 1], self.changes[n - 1], blocks);
        }
    }
}

/// The stamp every word of a block holds.
fn stamp_of(block: &[u8]) -> u64 {
    let words = block.as_chunks::<8>().0;
    assert!(words.iter().all(|w| w == &words[0]), "a torn block was handed out");
    u64::from_le_bytes(words[0])
}

pub(super) fn stamps(data: &ReplyData) -> Vec<u64> {
    let ReplyData::Data(parts) = data else { panic!("no data: {data:?}") };
    let all: Vec<u8> = parts.concat();
    all.chunks(BLOCK).map(stamp_of).collect()
}

impl Model {
    /// Ask for something at random.
    pub(super) fn ask(&mut self, world: &mut World, copysets: &[CopysetId], chunks: usize) {
        let copyset = copysets[world.rng.below(copysets.len())];
        let chunk = world.rng.below(chunks) as u64;
        let per_chunk = world.blocks();
        let first = world.rng.below(per_chunk as usize) as u32;
        let blocks = 1 + pick_len(&mut world.rng, per_chunk - first);
        match world.rng.below(20) {
            0..=9 => {
                self.next_stamp += 1;
                let stamp = self.next_stamp;
                match world.write(copyset, chunk, first, blocks, stamp) {
                    Some(slot) => {
                        self.changed(slot, (copyset, chunk), Change::Write { first, blocks, stamp }, per_chunk)
                    }
                    None => world.shard().want_memory(),
                }
            }
            10 => {
                let (offset, len) = (first * BLOCK as u32, blocks * BLOCK as u32);
                let slot = world.chunk(copyset, chunk, ChunkOp::Zero { offset, len });
                self.changed(slot, (copyset, chunk), Change::Zero { first, blocks }, per_chunk);
            }
            11 => {
                let slot = world.chunk(copyset, chunk, ChunkOp::Delete { sn: 1 });
                self.changed(slot, (copyset, chunk), Change::Delete, per_chunk);
            }
            _ => self.read(world, (copyset, chunk), first, blocks),
        }
        self.take_replies(world);
    }

    fn changed(&mut self, slot: u32, key: (CopysetId, u64), change: Change, per_chunk: u32) {
        self.changes += 1;
        let number = self.lines.entry(key).or_default().push(change, per_chunk);
        self.asked.insert(slot, Asked::Change { key, number });
    }

    fn read(&mut self, world: &mut World, key: (CopysetId, u64), first: u32, blocks: u32) {
        let op = ChunkOp::Read { offset: first * BLOCK as u32, len: blocks * BLOCK as u32 };
        let from = self.lines.get(&key).map_or(0, |l| l.acked);
        let slot = world.chunk(key.0, key.1, op);
        self.asked.insert(slot, Asked::Read { key, first, blocks, from });
    }

    pub(super) fn take_replies(&mut self, world: &mut World) {
        let blocks = world.blocks();
        for reply in std::mem::take(&mut world.replies) {
            match self.asked.remove(&reply.origin.slot) {
                Some(Asked::Change { key, number }) => self.acknowledge(key, number, &reply, blocks),
                Some(Asked::Read { key, first, blocks, from }) => self.check(key, first, blocks, from, &reply),
                None => panic!("an answer to nothing"),
            }
        }
    }

    fn acknowledge(&mut self, key: (CopysetId, u64), number: usize, reply: &Reply, blocks: u32) {
        let line = self.lines.get_mut(&key).unwrap();
        match reply.outcome {
            Outcome::Success => line.acked = line.acked.max(number),
            // Not ready after a restart, or no slot: nothing was done. It may overtake what was asked before it.
            Outcome::NotLeader | Outcome::NoSpace | Outcome::Stopping => {
                self.refused += 1;
                line.cancel(number, blocks);
            }
            other => panic!("change {number} of {key:?}: {other:?}"),
        }
    }

    fn check(&mut self, key: (CopysetId, u64), first: u32, blocks: u32, from: usize, reply: &Reply) {
        let none = [None];
        let states = self.lines.get(&key).map_or(&none[..], |l| l.states.get(from..).unwrap_or(&none));
        match reply.outcome {
            Outcome::Success => {
                let got = stamps(&reply.data);
                assert_eq!(got.len(), blocks as usize);
                for (n, stamp) in got.iter().enumerate() {
                    let at = first as usize + n;
                    let legal = states.iter().flatten().any(|s| s[at] == *stamp);
                    assert!(
                        legal,
                        "{key:?} block {at} reads {stamp}, legal are {:?}",
                        states.iter().map(|s| s.as_ref().map(|s| s[at])).collect::<Vec<_>>()
                    );
                }
                self.reads += 1;
            }
            Outcome::NoChunk => {
                assert!(states.iter().any(Option::is_none), "{key:?} is gone: {states:?}");
                self.reads += 1;
            }
            Outcome::NotLeader | Outcome::Stopping => {}
            other => panic!("read of {key:?}: {other:?}"),
        }
    }

    /// After a crash and a start: for each chunk the answered changes hold, and of the others the first few.
    pub(super) fn recover(&mut self, world: &mut World) {
        self.asked.clear();
        let blocks = world.blocks();
        let keys: Vec<_> = self.lines.keys().copied().collect();
        for key in keys {
            let op = ChunkOp::Read { offset: 0, len: blocks * BLOCK as u32 };
            let reply = loop {
                let slot = world.chunk(key.0, key.1, op.clone());
                let reply = world.answer(slot);
                if reply.outcome != Outcome::NotLeader {
                    break reply;
                }
                world.step(); // the own-term entry is on its way
            };
            let found: State = match reply.outcome {
                Outcome::Success => Some(stamps(&reply.data)),
                Outcome::NoChunk => None,
                other => panic!("{key:?} after a crash: {other:?}"),
            };
            let line = self.lines.get_mut(&key).unwrap();
            let legal = &line.states[line.acked..];
            let Some(n) = legal.iter().position(|s| *s == found) else {
                panic!("{key:?} after a crash: {found:?}, legal are {legal:?}");
            };
            self.survived += n as u64;
            self.vanished += (legal.len() - 1 - n) as u64;
            *line = Line { states: vec![found], changes: Vec::new(), acked: 0 };
        }
    }

    pub(super) fn unanswered(&self) -> usize {
        self.asked.len()
    }
}

/// Mostly small.
fn pick_len(rng: &mut Rng, room: u32) -> u32 {
    let most = if rng.one_in(4) { room } else { room.min(2) };
    rng.below(most as usize) as u32
}
