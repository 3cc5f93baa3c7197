//! What was asked of the chunks, in log order, and what they hold after each operation.

use super::medium::SECTOR;
use raftlog::BLOCK;
use std::collections::{BTreeMap, BTreeSet};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Write { chunk: u64, block: u32 },
    Zero { chunk: u64, block: u32 },
    Delete { chunk: u64 },
}

#[derive(Clone, Debug)]
struct Asked {
    index: u64,
    change: Change,
    /// The sectors of the block that are not zero.
    sectors: &'static [usize],
}

/// Per chunk that is there: the operation that wrote each block last, counted from 1.
pub(super) type State = BTreeMap<u64, BTreeMap<u32, usize>>;

#[derive(Clone, Debug)]
pub(super) struct History {
    asked: Vec<Asked>,
    pub(super) answered: usize,
    pub(super) next_index: u64,
    pub(super) chunks: BTreeSet<u64>,
    pub(super) blocks: BTreeSet<u32>,
}

impl History {
    pub(super) fn new() -> Self {
        Self { asked: Vec::new(), answered: 0, next_index: 1, chunks: BTreeSet::new(), blocks: BTreeSet::new() }
    }

    /// The number of the new operation.
    pub(super) fn ask(&mut self, change: Change, sectors: &'static [usize]) -> usize {
        let (chunk, block) = match change {
            Change::Write { chunk, block } | Change::Zero { chunk, block } => (chunk, Some(block)),
            Change::Delete { chunk } => (chunk, None),
        };
        self.chunks.insert(chunk);
        self.blocks.extend(block);
        self.asked.push(Asked { index: self.next_index, change, sectors });
        self.next_index += 1;
        self.asked.len()
    }

    pub(super) fn answer(&mut self, number: usize, index: u64) {
        assert_eq!(self.asked[number - 1].index, index, "operations get their indexes in order");
        self.answered = self.answered.max(number);
    }

    pub(super) fn len(&self) -> usize {
        self.asked.len()
    }

    pub(super) fn index_of(&self, number: usize) -> u64 {
        self.asked[number - 1].index
    }

    /// After the first `count` operations.
    pub(super) fn after(&self, count: usize) -> State {
        let mut state = State::new();
        for (number, asked) in (1..).zip(&self.asked[..count]) {
            match asked.change {
                Change::Write { chunk, block } => {
                    state.entry(chunk).or_default().insert(block, number);
                }
                Change::Zero { chunk, block } => {
                    if let Some(blocks) = state.get_mut(&chunk) {
                        blocks.remove(&block);
                    }
                }
                Change::Delete { chunk } => {
                    state.remove(&chunk);
                }
            }
        }
        state
    }

    /// After everything up to log index `index`.
    pub(super) fn at(&self, index: u64) -> State {
        self.after(self.asked.iter().take_while(|asked| asked.index <= index).count())
    }

    /// The bytes operation `number` writes to a block.
    pub(super) fn content(&self, number: usize) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK];
        for &sector in self.asked[number - 1].sectors {
            for word in bytes[sector * SECTOR..(sector + 1) * SECTOR].as_chunks_mut::<8>().0 {
                *word = (number as u64).to_le_bytes();
            }
        }
        bytes
    }

    /// The operations that wrote a block, from `first` on.
    pub(super) fn writes_of(&self, chunk: u64, block: u32, first: usize) -> impl Iterator<Item = usize> {
        let numbered = (1..).zip(&self.asked);
        let own = numbered.filter(move |(_, asked)| asked.change == Change::Write { chunk, block });
        own.map(|(number, _)| number).filter(move |number| *number >= first)
    }
}
