//! What the clients did and saw, and how a block's content names the write it came from.

use crate::checker::{self, BlockOp, Kind as BlockKind, NEVER};
use std::collections::{BTreeMap, BTreeSet};

pub(crate) const BLOCK: usize = 4096;
const MAGIC: u64 = 0x7374_616d_7065_6421;

/// A block of a chunk of a copyset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    pub(crate) copyset: u64,
    pub(crate) chunk: u64,
    pub(crate) block: u64,
}

fn word(place: Place, value: u64, at: u64) -> u64 {
    match at % 64 {
        0 => MAGIC,
        1 => value,
        2 => place.copyset << 48 ^ place.chunk << 16 ^ place.block,
        _ => value.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left((at % 63) as u32) ^ at,
    }
}

/// The content of a block for this value. Every sector carries it, so a torn block cannot pass for a whole one.
pub(crate) fn stamp(place: Place, value: u64, out: &mut Vec<u8>) {
    (0..BLOCK as u64 / 8).for_each(|at| out.extend_from_slice(&word(place, value, at).to_le_bytes()));
}

/// The place a block's content was written for, if it is whole.
pub(crate) fn place_of(block: &[u8]) -> Option<Place> {
    let word = |at: usize| Some(u64::from_le_bytes(block.get(at * 8..at * 8 + 8)?.try_into().ok()?));
    let name = word(2).filter(|_| word(0) == Some(MAGIC))?;
    let place = Place { copyset: name >> 48, chunk: name >> 16 & 0xffff_ffff, block: name & 0xffff };
    unstamp(place, block).map(|_| place)
}

/// The value of a block's content: 0 for zeros, `None` for anything that no write put there.
pub(crate) fn unstamp(place: Place, block: &[u8]) -> Option<u64> {
    if block.iter().all(|&byte| byte == 0) {
        return Some(0);
    }
    let value = u64::from_le_bytes(block.get(8..16)?.try_into().ok()?);
    let same = |(at, bytes): (usize, &[u8])| bytes == word(place, value, at as u64).to_le_bytes();
    block.chunks(8).enumerate().all(same).then_some(value)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Write,
    Read,
    /// Blocks read as zero afterwards.
    Zero,
    /// The whole chunk is absent afterwards; reads of it count as zeros.
    Delete,
    Info,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// No answer (yet), or one that does not say whether it was done.
    Unknown,
    Done,
    /// An answer that promises it was not and will not be done.
    NotDone,
}

/// One operation of a client.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    pub(crate) client: usize,
    pub(crate) kind: Kind,
    pub(crate) first: Place,
    pub(crate) blocks: u64,
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) outcome: Outcome,
    /// Values read.
    pub(crate) seen: Vec<u64>,
}

/// Everything the clients share.
#[derive(Default)]
pub(crate) struct History {
    pub(crate) records: Vec<Record>,
    /// What is wrong by itself: corrupt blocks, impossible answers.
    pub(crate) violations: Vec<String>,
    /// Answers by status, timeouts, broken connections.
    pub(crate) counts: BTreeMap<&'static str, u64>,
    /// The nemesis is done: clients may finish.
    pub(crate) calm: bool,
    /// Clients try to fill the chunk pool.
    pub(crate) filling: bool,
    /// When a disk that had broken its word lost power: two points in time, with nothing between them. What was
    /// answered before may be gone, but each block then is what it once was, and all rules hold again.
    pub(crate) forgotten: Option<(u64, u64)>,
}

impl History {
    pub(crate) fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    /// Whether a write to this copyset was ever answered. (Zero and Delete may find nothing to do.)
    pub(crate) fn holds(&self, copyset: u64) -> bool {
        let written = |r: &Record| r.kind == Kind::Write && r.outcome == Outcome::Done;
        self.records.iter().any(|r| r.first.copyset == copyset && written(r))
    }

    /// The value that operation `id` writes into its `at`-th block; unique in the run.
    pub(crate) fn value(id: usize, at: u64) -> u64 {
        (id as u64 + 1) << 8 | at
    }

    /// Hash of all that the clients saw.
    pub(crate) fn hash(&self) -> u64 {
        let fold = |hash: u64, n: &u64| (hash ^ n).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
        self.records.iter().fold(0xcbf2_9ce4_8422_2325, |hash, r| {
            let head = [r.client as u64, r.kind as u64, r.first.copyset, r.first.chunk, r.first.block, r.blocks];
            let tail = [r.start, r.end, r.outcome as u64];
            head.iter().chain(&tail).chain(&r.seen).fold(hash, fold)
        })
    }

    /// Every block that a client ever touched.
    pub(crate) fn places(&self) -> Vec<Place> {
        self.per_block().into_keys().collect()
    }

    fn per_block(&self) -> BTreeMap<Place, Vec<BlockOp>> {
        let mut all: BTreeMap<Place, Vec<BlockOp>> = BTreeMap::new();
        let add = |id: usize, record: &Record, all: &mut BTreeMap<Place, Vec<BlockOp>>| {
            for at in 0..record.blocks {
                let kind = match record.kind {
                    Kind::Write => BlockKind::Write(Self::value(id, at)),
                    Kind::Zero => BlockKind::Write(0),
                    Kind::Read => match record.seen.get(at as usize) {
                        Some(&value) => BlockKind::Read(value),
                        None => continue,
                    },
                    Kind::Delete | Kind::Info => continue,
                };
                let place = Place { block: record.first.block + at, ..record.first };
                let end = if record.outcome == Outcome::Done { record.end } else { NEVER };
                all.entry(place).or_default().push(BlockOp { kind, start: record.start, end });
            }
        };
        let live = || self.records.iter().enumerate().filter(|(_, r)| r.outcome != Outcome::NotDone);
        live().for_each(|(id, record)| add(id, record, &mut all));
        for (_, record) in live().filter(|(_, r)| r.kind == Kind::Delete) {
            let end = if record.outcome == Outcome::Done { record.end } else { NEVER };
            let first = Place { block: 0, ..record.first };
            let last = Place { block: u64::MAX, ..record.first };
            for ops in all.range_mut(first..=last).map(|(_, ops)| ops) {
                ops.push(BlockOp { kind: BlockKind::Write(0), start: record.start, end });
            }
        }
        all
    }

    /// Check every block; what is wrong is added to `violations`.
    pub(crate) fn check(&mut self) {
        for (place, ops) in self.per_block() {
            let result = match self.forgotten {
                Some(when) => check_twice(&ops, when),
                None => checker::check(&ops),
            };
            if let Err(violation) = result {
                let mut ops = ops;
                ops.sort_by_key(|op| op.start);
                self.violations.push(format!("{place:?}: {violation}\n    {}", show(&ops)));
            }
        }
    }

    /// Writes without an answer: how many were seen later, how many never.
    pub(crate) fn unanswered(&self) -> (usize, usize) {
        let seen: BTreeSet<u64> = self.records.iter().flat_map(|r| &r.seen).copied().collect();
        let open = |(_, r): &(usize, &Record)| r.kind == Kind::Write && r.outcome == Outcome::Unknown;
        let all: Vec<_> = self.records.iter().enumerate().filter(open).collect();
        let survived =
            all.iter().filter(|(id, r)| (0..r.blocks).any(|at| seen.contains(&Self::value(*id, at)))).count();
        (survived, all.len() - survived)
    }
}

/// Check what was before a point where anything may have been forgotten, and what was after it. There each block holds
/// one of the values it ever had.
fn check_twice(ops: &[BlockOp], (from, to): (u64, u64)) -> Result<(), String> {
    let (old, mut new): (Vec<BlockOp>, Vec<BlockOp>) = ops.iter().partition(|op| op.start < from);
    checker::check(&old)?;
    let writes = |ops: &[BlockOp]| -> BTreeSet<u64> {
        ops.iter().filter_map(|op| if let BlockKind::Write(value) = op.kind { Some(value) } else { None }).collect()
    };
    let (before, after) = (writes(&old), writes(&new));
    let seen = new.iter().filter_map(|op| match op.kind {
        BlockKind::Read(value) if value != 0 && op.end != NEVER && !after.contains(&value) => Some(value),
        _ => None,
    });
    let seen: BTreeSet<u64> = seen.collect();
    if let Some(&value) = seen.first() {
        if seen.len() > 1 || !before.contains(&value) {
            return Err(format!("{seen:x?} were read after the power cut: not one value that the block once had"));
        }
        new.push(BlockOp { kind: BlockKind::Write(value), start: from, end: to });
    }
    checker::check(&new)
}

fn show(ops: &[BlockOp]) -> String {
    let one = |op: &BlockOp| match op.end {
        NEVER => format!("{:?}@{}..", op.kind, op.start),
        end => format!("{:?}@{}..{end}", op.kind, op.start),
    };
    ops.iter().map(one).collect::<Vec<_>>().join("\n    ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_lying_disk_forgot_was_once_there() {
        let op = |kind, start, end| BlockOp { kind, start, end };
        let old = [op(BlockKind::Write(1), 1, 2), op(BlockKind::Write(2), 3, 4), op(BlockKind::Write(3), 5, NEVER)];
        let after = |new: &[BlockOp]| check_twice(&[&old, new].concat(), (10, 11));
        for once in 0..=3 {
            assert!(after(&[op(BlockKind::Read(once), 12, 13), op(BlockKind::Read(once), 14, 15)]).is_ok());
        }
        assert!(after(&[op(BlockKind::Read(1), 12, 13), op(BlockKind::Read(2), 14, 15)]).is_err(), "one of them");
        assert!(after(&[op(BlockKind::Read(4), 12, 13)]).is_err(), "nobody wrote it");
        let anew = [op(BlockKind::Write(5), 12, 13), op(BlockKind::Read(2), 14, 15)];
        assert!(after(&anew).is_err(), "what is written afterwards stays");
    }

    #[test]
    fn stamps_name_their_write_and_only_theirs() {
        let place = Place { copyset: 3, chunk: 2, block: 7 };
        let (mut block, mut other) = (Vec::new(), Vec::new());
        stamp(place, 0x1234, &mut block);
        stamp(place, 0x1235, &mut other);
        assert_eq!(unstamp(place, &block), Some(0x1234));
        assert_eq!(unstamp(Place { block: 8, ..place }, &block), None);
        block[512..1024].copy_from_slice(&other[512..1024]);
        assert_eq!(unstamp(place, &block), None, "a torn block");
        assert_eq!(unstamp(place, &[0; BLOCK]), Some(0));
        assert_eq!((place_of(&other), place_of(&block), place_of(&[0; BLOCK])), (Some(place), None, None));
    }
}
