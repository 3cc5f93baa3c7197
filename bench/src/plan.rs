//! What is asked for: which chunks, in which order, reads or writes, and when.
//!
//! The plan is decided before any answer is known. In particular an open loop's start times are fixed by the rate
//! alone ([`Pace`]), so a slow server cannot slow down the clock it is measured with (no coordinated omission).

use crate::model::{ChunkAddr, Model};
use crate::stamp::{BLOCK, mix};
use anyhow::{Context, Result, bail};

/// One request to make, in units of bytes inside one of the worker's chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// Write (else read).
    pub write: bool,
    /// Index into the worker's chunks.
    pub chunk: usize,
    /// Bytes from the chunk's start.
    pub offset: u32,
    /// Bytes.
    pub len: u32,
}

/// Order of accesses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Pattern {
    /// Uniformly random, aligned to the request size.
    Random,
    /// Chunk after chunk, from start to end, round and round.
    Sequential,
}

/// The part of the chunks that is used.
#[derive(Debug, Clone)]
pub struct Geometry {
    /// The worker's chunks.
    pub chunks: Vec<ChunkAddr>,
    /// Bytes used from the start of each of them.
    pub span: u32,
}

/// A reproducible sequence of random numbers.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// The sequence of a seed.
    pub const fn new(seed: u64) -> Self {
        Self(mix(seed))
    }

    /// The next number below `bound` (0 for bound 0).
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(1);
        ((u128::from(mix(self.0)) * u128::from(bound)) >> 64) as u64
    }
}

/// Where the accesses of a phase come from.
#[derive(Debug, Clone)]
pub enum Source {
    /// Endless load.
    Load {
        /// Order.
        pattern: Pattern,
        /// Share of reads, 0-100.
        read_percent: u32,
        /// Bytes per request.
        size: u32,
        /// Next position of the sequential order.
        cursor: u64,
        /// Random numbers.
        rng: Rng,
    },
    /// A list that ends.
    List(std::vec::IntoIter<Access>),
}

impl Source {
    /// Every byte of the span written once, in order.
    pub fn fill(geometry: &Geometry, size: u32) -> Self {
        let size = size.min(geometry.span).max(1);
        let mut list = Vec::new();
        // Offset by offset over all chunks, so that every copyset is busy all the time.
        for offset in (0..geometry.span).step_by(size as usize) {
            let len = size.min(geometry.span - offset);
            list.extend((0..geometry.chunks.len()).map(|chunk| Access { write: true, chunk, offset, len }));
        }
        Self::List(list.into_iter())
    }

    /// Reads of these blocks (ascending), neighbours joined up to `size` bytes.
    pub fn blocks(written: impl Iterator<Item = (usize, u32)>, size: u32) -> Self {
        let mut list: Vec<Access> = Vec::new();
        for (chunk, block) in written {
            let offset = block * BLOCK as u32;
            match list.last_mut() {
                Some(last) if last.chunk == chunk && last.offset + last.len == offset && last.len < size => {
                    last.len += BLOCK as u32;
                }
                _ => list.push(Access { write: false, chunk, offset, len: BLOCK as u32 }),
            }
        }
        Self::List(list.into_iter())
    }

    /// Reads of every block the model knows to be written, in pieces of up to `size` bytes.
    pub fn written(geometry: &Geometry, model: Option<&Model>, size: u32) -> Self {
        let blocks = model.into_iter().flat_map(|model| {
            (0..geometry.chunks.len()).flat_map(move |chunk| model.written(chunk).map(move |block| (chunk, block)))
        });
        Self::blocks(blocks, size)
    }

    /// How many accesses are left, if that is known.
    pub fn remaining(&self) -> Option<usize> {
        match self {
            Self::Load { .. } => None,
            Self::List(list) => Some(list.len()),
        }
    }

    /// The next access; `None` at the end of a list.
    pub fn next(&mut self, geometry: &Geometry) -> Option<Access> {
        match self {
            Self::List(list) => list.next(),
            Self::Load { pattern, read_percent, size, cursor, rng } => {
                let slots = u64::from(geometry.span / *size);
                let total = slots * geometry.chunks.len() as u64;
                let at = match pattern {
                    Pattern::Random => rng.below(total),
                    Pattern::Sequential => *cursor % total.max(1),
                };
                *cursor += 1;
                let write = rng.below(100) >= u64::from(*read_percent);
                let (chunk, slot) = (at.checked_div(slots)?, at.checked_rem(slots)?);
                Some(Access { write, chunk: chunk as usize, offset: slot as u32 * *size, len: *size })
            }
        }
    }
}

/// When requests start. All times are nanoseconds since the phase began.
#[derive(Debug, Clone, Copy)]
pub enum Pace {
    /// As many at a time as this, a new one as soon as one is answered.
    Closed(usize),
    /// At fixed moments, whatever the answers do.
    Open {
        /// Nanoseconds from one start to the next.
        interval: f64,
        /// Starts handed out so far.
        started: u64,
    },
}

impl Pace {
    /// An open loop of `rate` requests per second.
    pub fn open(rate: f64) -> Self {
        Self::Open { interval: 1e9 / rate, started: 0 }
    }

    /// Intended start of the next request, if it is due at `now` with `inflight` others unanswered.
    pub fn due(&mut self, now: u64, inflight: usize) -> Option<u64> {
        match self {
            Self::Closed(depth) => (inflight < *depth).then_some(now),
            Self::Open { .. } => {
                let start = self.next_start()?;
                if let Self::Open { started, .. } = self
                    && start <= now
                {
                    *started += 1;
                    return Some(start);
                }
                None
            }
        }
    }

    /// When an open loop's next request is due.
    pub fn next_start(&self) -> Option<u64> {
        match self {
            Self::Closed(_) => None,
            Self::Open { interval, started } => Some((*started as f64 * interval) as u64),
        }
    }
}

/// Copysets as the command line names them: `POOL:FIRST-LAST`, `POOL:ID`, several separated by commas.
pub fn parse_copysets(text: &str) -> Result<Vec<(u32, u32)>> {
    let mut list = Vec::new();
    for part in text.split(',') {
        let (pool, ids) = part.split_once(':').with_context(|| format!("{part}: want POOL:FIRST-LAST"))?;
        let pool: u32 = pool.trim().parse().with_context(|| format!("{part}: pool"))?;
        let (first, last) = ids.split_once('-').unwrap_or((ids, ids));
        let (first, last): (u32, u32) = (
            first.trim().parse().with_context(|| format!("{part}: first copyset"))?,
            last.trim().parse().with_context(|| format!("{part}: last copyset"))?,
        );
        if first > last || last - first >= 100_000 {
            bail!("{part}: an empty or absurd range");
        }
        list.extend((first..=last).map(|id| (pool, id)));
    }
    Ok(list)
}

/// Percent of reads in a mix READ:WRITE.
pub fn parse_mix(text: &str) -> Result<u32> {
    let (read, write) = text.split_once(':').context("--mix: want READ:WRITE")?;
    let (read, write): (u32, u32) = (read.parse().context("--mix")?, write.parse().context("--mix")?);
    if read.checked_add(write) != Some(100) {
        bail!("--mix: the two must add up to 100");
    }
    Ok(read)
}

/// A size as people write it: `4096`, `4k`, `16MiB`, `2G` (powers of two).
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        unit => return Err(format!("{unit}: no such unit")),
    };
    let number: u64 = digits.trim().parse().map_err(|_| format!("{text}: not a size"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text}: too large"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(chunks: u64, span: u32) -> Geometry {
        let chunks = (0..chunks).map(|chunk| ChunkAddr { pool: 1, copyset: 1, chunk }).collect();
        Geometry { chunks, span }
    }

    #[test]
    fn copysets_and_sizes_as_people_write_them() {
        assert_eq!(parse_copysets("1:1-3,2:9").unwrap(), [(1, 1), (1, 2), (1, 3), (2, 9)]);
        assert!(parse_copysets("1-3").is_err() && parse_copysets("1:3-1").is_err());
        assert_eq!(parse_size("4k"), Ok(4096));
        assert_eq!(parse_size("16MiB"), Ok(16 << 20));
        assert_eq!(parse_size("512"), Ok(512));
        assert!(parse_size("4x").is_err() && parse_size("").is_err() && parse_size("99999999T").is_err());
    }

    #[test]
    fn a_fill_covers_every_byte_once_and_a_load_stays_inside() {
        let geometry = geometry(3, 40_960);
        let mut source = Source::fill(&geometry, 16_384);
        let mut bytes = [0u32; 3];
        while let Some(access) = source.next(&geometry) {
            assert!(access.write && access.offset + access.len <= 40_960);
            bytes[access.chunk] += access.len;
        }
        assert_eq!(bytes, [40_960; 3]);
        for pattern in [Pattern::Random, Pattern::Sequential] {
            let mut load = Source::Load { pattern, read_percent: 30, size: 4096, cursor: 0, rng: Rng::new(1) };
            let list: Vec<Access> = (0..3000).filter_map(|_| load.next(&geometry)).collect();
            assert_eq!(list.len(), 3000);
            assert!(list.iter().all(|a| a.chunk < 3 && a.offset + a.len <= 40_960 && a.offset % 4096 == 0));
            let reads = list.iter().filter(|a| !a.write).count();
            assert!((700..1100).contains(&reads), "{reads} reads of 3000 at 30 %");
        }
    }

    #[test]
    fn joined_blocks_do_not_cross_gaps_chunks_or_the_size() {
        let written = [(0, 0), (0, 1), (0, 2), (0, 5), (1, 6)];
        let Source::List(list) = Source::blocks(written.into_iter(), 8192) else { panic!() };
        let ranges: Vec<_> = list.map(|a| (a.chunk, a.offset / 4096, a.len / 4096)).collect();
        assert_eq!(ranges, [(0, 0, 2), (0, 2, 1), (0, 5, 1), (1, 6, 1)]);
    }

    #[test]
    fn an_open_loop_keeps_its_schedule_through_a_stall() {
        let mut pace = Pace::open(1000.0);
        assert_eq!(pace.due(0, 0), Some(0));
        assert_eq!(pace.due(999_999, 0), None);
        // Nobody asked for 5 ms: the missed starts are handed out with their own times, however many are in flight.
        let missed: Vec<_> = std::iter::from_fn(|| pace.due(5_000_000, 1_000_000)).collect();
        assert_eq!(missed, [1_000_000, 2_000_000, 3_000_000, 4_000_000, 5_000_000]);
    }
}
