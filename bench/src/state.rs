//! The state file: what a run wrote and what it was told, so that a later process can check it after a crash.
//!
//! JSON: format 1, run, seed, next write number, what was there initially, bytes used of each chunk, and per chunk
//! its written blocks with the numbers of answered and of unanswered writes that may be seen. Replaced atomically
//! (temporary file, sync, rename): a killed client leaves the old state, never half a new one.

use crate::model::{ChunkAddr, Initial, Model, SavedBlock};
use crate::plan::Geometry;
use crate::stamp::{BLOCK, mix};
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::Path;

const FORMAT: u32 = 1;

/// Written blocks of a chunk.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub struct SavedChunk {
    /// Logical pool.
    pub pool: u32,
    /// Copyset.
    pub copyset: u32,
    /// Chunk id.
    pub chunk: u64,
    /// Candidates of each written block.
    pub blocks: Vec<SavedBlock>,
}

/// The file's content.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub struct State {
    format: u32,
    /// Name of the run, in every stamp.
    pub run: u64,
    /// Seed, in every stamp.
    pub seed: u64,
    /// First number that no write ever had.
    pub next_seq: u64,
    /// True if blocks not listed are known to be zero.
    pub initially_zero: bool,
    /// Written chunks.
    pub chunks: Vec<SavedChunk>,
}

impl State {
    /// A run that has written nothing.
    pub const fn new(run: u64, seed: u64, initially_zero: bool) -> Self {
        Self { format: FORMAT, run, seed, next_seq: 1, initially_zero, chunks: Vec::new() }
    }

    /// The run of a state file, or a new one if there is none (unless one `must` be there).
    pub fn continued(path: Option<&Path>, must: bool, seed: u64, initially_zero: bool) -> Result<Self> {
        if let Some(path) = path.filter(|path| must || path.exists()) {
            return Self::load(path);
        }
        let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_nanos() as u64;
        Ok(Self::new(mix(time ^ u64::from(std::process::id())), seed, initially_zero))
    }

    /// Reads a state file.
    pub fn load(path: &Path) -> Result<Self> {
        let text = fs::read(path).with_context(|| format!("read {}", path.display()))?;
        let state: Self = serde_json::from_slice(&text).with_context(|| format!("parse {}", path.display()))?;
        if state.format != FORMAT {
            bail!("{}: format {} is not {FORMAT}", path.display(), state.format);
        }
        Ok(state)
    }

    /// Replaces a state file.
    pub fn save(&self, path: &Path) -> Result<()> {
        let temporary = path.with_extension("tmp");
        let write = || -> Result<()> {
            let file = fs::File::create(&temporary)?;
            serde_json::to_writer(std::io::BufWriter::new(&file), self)?;
            file.sync_all()?;
            Ok(fs::rename(&temporary, path)?)
        };
        write().with_context(|| format!("write {}", path.display()))
    }

    /// What the run knows of blocks it never wrote.
    pub const fn initial(&self) -> Initial {
        if self.initially_zero { Initial::Zero } else { Initial::Unknown }
    }

    /// Model of one of `workers` workers over its chunks, with everything saved of them.
    pub fn model(&self, worker: usize, workers: usize, chunks: &[ChunkAddr], blocks: u32) -> Result<Model> {
        let seqs = (self.next_seq + worker as u64, workers as u64);
        let mut model = Model::new(self.run, self.seed, self.initial(), chunks, blocks, seqs);
        for saved in &self.chunks {
            let addr = ChunkAddr { pool: saved.pool, copyset: saved.copyset, chunk: saved.chunk };
            if chunks.contains(&addr) && !model.restore(addr, &saved.blocks) {
                bail!("chunk {}: the state file has blocks beyond --span; use the same options", saved.chunk);
            }
        }
        Ok(model)
    }

    /// A model per worker, or none if nothing is checked.
    pub fn models(&self, parts: &[Geometry], checked: bool) -> Result<Vec<Option<Model>>> {
        let make = |(at, part): (usize, &Geometry)| {
            let blocks = part.span / BLOCK as u32;
            checked.then(|| self.model(at, parts.len(), &part.chunks, blocks)).transpose()
        };
        parts.iter().enumerate().map(make).collect()
    }

    /// Takes over what the models know; chunks that are not theirs stay as they are.
    pub fn absorb(&mut self, models: &[Model]) {
        for model in models {
            self.next_seq = self.next_seq.max(model.next_seq());
            for (addr, blocks) in model.save() {
                let same = |saved: &SavedChunk| {
                    (saved.pool, saved.copyset, saved.chunk) == (addr.pool, addr.copyset, addr.chunk)
                };
                match self.chunks.iter_mut().find(|saved| same(saved)) {
                    Some(saved) => saved.blocks = blocks,
                    None => {
                        let ChunkAddr { pool, copyset, chunk } = addr;
                        self.chunks.push(SavedChunk { pool, copyset, chunk, blocks });
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_saved_run_goes_on_with_new_numbers_and_the_same_candidates() {
        let chunks = [ChunkAddr { pool: 1, copyset: 1, chunk: 1 }, ChunkAddr { pool: 1, copyset: 2, chunk: 2 }];
        let mut state = State::new(5, 6, true);
        let mut model = state.model(0, 1, &chunks, 4).unwrap();
        let acked = model.begin_write(1, 2, 2);
        model.end_write(1, 2, 2, acked);
        let open = model.begin_write(1, 3, 1);
        state.absorb(&[model]);
        let path = std::env::temp_dir().join(format!("bench-state-{}.json", std::process::id()));
        state.save(&path).unwrap();
        let loaded = State::load(&path).unwrap();
        fs::remove_file(&path).unwrap();
        assert_eq!(loaded, state);
        assert_eq!(loaded.chunks[0].blocks, [(2, vec![acked], vec![]), (3, vec![acked], vec![open])]);
        assert!(loaded.model(0, 2, &chunks, 4).unwrap().next_seq() > open);
        assert!(loaded.model(0, 1, &chunks, 3).is_err(), "a smaller span would lose blocks");
    }
}
