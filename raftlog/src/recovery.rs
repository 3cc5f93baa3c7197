//! From a disk back to a [`Log`]: asks for reads, is fed bytes, judges what they say.
//!
//! Two passes. The first reads one block per segment and learns the order of segments and which are dead; the
//! second reads the living ones from oldest to newest. Memory is bounded by the log's headers. Nothing fed can
//! make it panic. The owner syncs the disk before the first read, so that what is read is also durable.

use crate::chain::Chain;
use crate::log::Tail;
use crate::record::{Parsed, parse_head};
use crate::scan::{Scanner, Step};
use crate::segment::{Free, Segment, Segments};
use crate::{BLOCK, CopysetId, Geometry, Limits, Log, Seq};
use rustc_hash::FxHashMap;
use std::collections::VecDeque;
use thiserror::Error;

/// Longest read asked for.
const READ_MAX: u64 = 1 << 20;

/// A read the device could not serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the device could not read the log")]
pub struct ReadFailed;

/// Why there is no log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum RecoverError {
    /// The geometry cannot hold a log.
    #[error("log geometry: segments must be at least two, of at least 16 KiB, and whole blocks of 4 KiB")]
    Geometry,
    /// Written by a newer version.
    #[error("the log has format version {0}, this program knows version 1")]
    Version(u16),
    /// `finish` came before all reads were fed.
    #[error("recovery was ended before the log was read")]
    Unfinished,
}

/// Something durable that is not there any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rot {
    /// The batch; 0 if unknown.
    pub seq: Seq,
    /// The copyset; `None` if the batch's records are lost, see [`Report::suspects`].
    pub copyset: Option<CopysetId>,
    /// The entry: its payload is rotten ([`crate::Index::is_rotten`]) or, behind the tail, it and all after it are missing.
    pub index: u64,
}

/// What recovery found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Batches taken over.
    pub batches: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Legible batches dropped with the torn tail: none was acknowledged.
    pub torn: u64,
    /// Blocks the device could not read.
    pub unreadable_blocks: u64,
    /// Durable records that are damaged or missing.
    pub rot: Vec<Rot>,
    /// Copysets that may have had a record in a lost batch (rule 21), sorted.
    pub suspects: Vec<CopysetId>,
}

/// A segment's first legible header.
#[derive(Clone, Copy)]
struct Known {
    slot: u32,
    generation: u64,
    first_seq: Seq,
    live_seq: Seq,
    /// No batch from here on belongs to the log as far as this segment is concerned: a later one starts there.
    cut: Seq,
}

enum Pass {
    /// Looking for the first header of a segment.
    First {
        slot: u32,
        at: u64,
    },
    /// Reading the `nth` living segment.
    Read {
        nth: usize,
        at: u64,
        scanner: Box<Scanner>,
    },
    Done,
}

/// Reads a log back. Sans-I/O: `next_read`, `feed`, ..., `finish`.
pub struct Recovery {
    geometry: Geometry,
    limits: Limits,
    pass: Pass,
    /// A read failed: single blocks up to this offset.
    single_until: u64,
    known: Vec<Known>,
    unused: Vec<u32>,
    dead: Vec<Known>,
    generation: u64,
    chain: Chain,
    tail_unreadable: bool,
    unreadable: u64,
    error: Option<RecoverError>,
}

impl Recovery {
    /// Starts; the zone may be zeroed.
    #[must_use]
    pub fn new(geometry: Geometry, limits: Limits) -> Self {
        let size = geometry.segment_size;
        let zone = size.checked_mul(u64::from(geometry.segment_count));
        let whole = size.is_multiple_of(BLOCK as u64) && size >= 4 * BLOCK as u64;
        let ok = whole && geometry.segment_count >= 2 && zone.is_some_and(|z| z < 1 << 62);
        Self {
            geometry,
            limits,
            pass: if ok { Pass::First { slot: 0, at: 0 } } else { Pass::Done },
            single_until: 0,
            known: Vec::new(),
            unused: Vec::new(),
            dead: Vec::new(),
            generation: 0,
            chain: Chain::default(),
            tail_unreadable: false,
            unreadable: 0,
            error: (!ok).then_some(RecoverError::Geometry),
        }
    }

    /// The log of a zeroed zone, without reading it.
    ///
    /// # Errors
    /// If the geometry is impossible.
    pub fn blank(geometry: Geometry, limits: Limits) -> Result<Log, RecoverError> {
        let mut this = Self::new(geometry, limits);
        this.pass = Pass::Done;
        this.unused = (0..geometry.segment_count).collect();
        this.finish().map(|(log, _)| log)
    }

    /// The next read to feed: offset in the zone and length, whole blocks and at most 1 MiB.
    #[must_use]
    pub fn next_read(&self) -> Option<(u64, usize)> {
        self.reads_ahead().next()
    }

    /// The next read and, as far as can be known now, those after it, for a caller that keeps several under way. What is
    /// fed may change all but the first: a segment can turn out to need no more, or a failed read to be split.
    pub fn reads_ahead(&self) -> impl Iterator<Item = (u64, usize)> + '_ {
        let (mut nth, mut at) = match &self.pass {
            Pass::First { slot, at } => (*slot as usize, *at),
            Pass::Read { nth, at, .. } => (*nth, *at),
            Pass::Done => (usize::MAX, 0),
        };
        std::iter::from_fn(move || {
            let (slot, max) = match &self.pass {
                Pass::First { .. } if nth < self.geometry.segment_count as usize => {
                    (nth as u32, if at == 0 { BLOCK as u64 } else { READ_MAX })
                }
                Pass::Read { .. } => (self.known.get(nth)?.slot, READ_MAX),
                Pass::First { .. } | Pass::Done => return None,
            };
            let offset = u64::from(slot) * self.geometry.segment_size + at;
            let max = if offset < self.single_until { BLOCK as u64 } else { max };
            let len = max.min(self.geometry.segment_size - at);
            at += len;
            // A probe that finds its header is over.
            let probed = matches!(self.pass, Pass::First { .. }) && at == BLOCK as u64;
            if probed || at == self.geometry.segment_size {
                (nth, at) = (nth + 1, 0);
            }
            Some((offset, len as usize))
        })
    }

    /// The answer to [`Self::next_read`]. A failed read is asked for again block by block.
    pub fn feed(&mut self, data: Result<&[u8], ReadFailed>) {
        let Some((offset, len)) = self.next_read() else { return };
        let data = data.ok().filter(|d| d.len() == len);
        if data.is_none() && len > BLOCK {
            self.single_until = offset + len as u64;
            return;
        }
        self.unreadable += u64::from(data.is_none());
        let mut same_segment = true;
        for nth in 0..len / BLOCK {
            if same_segment {
                let block = data.and_then(|d| d.get(nth * BLOCK..(nth + 1) * BLOCK));
                same_segment = self.block(offset + (nth * BLOCK) as u64, block);
            }
        }
    }

    /// Takes a block; false when its segment needs no more.
    fn block(&mut self, offset: u64, data: Option<&[u8]>) -> bool {
        match &mut self.pass {
            Pass::First { .. } => self.probe(offset, data),
            Pass::Read { .. } => self.read(offset, data),
            Pass::Done => false,
        }
    }

    fn fail(&mut self, version: u16) -> bool {
        self.error = Some(RecoverError::Version(version));
        self.pass = Pass::Done;
        false
    }

    /// First pass. A first block of zeros is a segment never used; anything else illegible may be rot, so the
    /// segment is searched for its next header.
    fn probe(&mut self, offset: u64, data: Option<&[u8]>) -> bool {
        let Pass::First { slot, at } = &mut self.pass else { return false };
        let slot = *slot;
        match data.and_then(|d| parse_head(d, &self.geometry, offset)) {
            Some(Parsed::Version(v)) => return self.fail(v),
            Some(Parsed::Head { head: h, .. }) => {
                let (generation, live_seq) = (h.generation, h.live_seq);
                let first_seq = h.seq + u64::from(h.seal); // a seal repeats the number before
                self.known.push(Known { slot, generation, first_seq, live_seq, cut: u64::MAX });
            }
            None => {
                let zeros = *at == 0 && data.is_some_and(|d| d.iter().all(|b| *b == 0));
                *at += BLOCK as u64;
                if !zeros && *at < self.geometry.segment_size {
                    return true;
                }
                self.unused.push(slot);
            }
        }
        if slot + 1 < self.geometry.segment_count {
            self.pass = Pass::First { slot: slot + 1, at: 0 };
        } else {
            self.order();
        }
        false
    }

    /// Between the passes: what the newest segment's start says is not needed is not read.
    fn order(&mut self) {
        self.known.sort_unstable_by_key(|k| (k.generation, k.first_seq));
        let live = self.known.last().map_or(0, |k| k.live_seq);
        self.generation = self.known.last().map_or(0, |k| k.generation);
        // Also for judging: that start repeats what was durable when it was written, in a seal that may not be read.
        self.chain.live = live;
        let mut cut = u64::MAX;
        for k in self.known.iter_mut().rev() {
            k.cut = cut;
            cut = cut.min(k.first_seq);
        }
        let (dead, living) = std::mem::take(&mut self.known).into_iter().partition(|k| k.cut <= live);
        (self.dead, self.known) = (dead, living);
        self.enter(0);
    }

    fn enter(&mut self, nth: usize) {
        self.pass = match self.known.get(nth) {
            Some(k) => Pass::Read { nth, at: 0, scanner: Box::new(Scanner::new(self.geometry, k.generation)) },
            None => Pass::Done,
        };
    }

    /// Second pass.
    fn read(&mut self, offset: u64, data: Option<&[u8]>) -> bool {
        let Pass::Read { nth, at, scanner } = &mut self.pass else { return false };
        let (nth, cut) = (*nth, self.known.get(*nth).map_or(0, |k| k.cut));
        *at += BLOCK as u64;
        match scanner.block(offset, data) {
            Step::Version(v) => return self.fail(v),
            Step::Found(found) => {
                self.generation = self.generation.max(found.head.generation);
                if found.head.seq < cut {
                    self.chain.offer(found);
                }
            }
            Step::More => {}
        }
        if *at < self.geometry.segment_size && !scanner.complete_before(cut) {
            return true;
        }
        self.tail_unreadable = scanner.tail_unreadable;
        self.enter(nth + 1);
        false
    }

    /// The log and what was found. Every copyset starts from what the returned log says.
    ///
    /// # Errors
    /// If the geometry is impossible, the log is of a newer version, or not all reads were fed.
    pub fn finish(self) -> Result<(Log, Report), RecoverError> {
        if let Some(error) = self.error {
            return Err(error);
        }
        if !matches!(self.pass, Pass::Done) {
            return Err(RecoverError::Unfinished);
        }
        let segments = self.segments();
        let Self { geometry, limits, mut chain, .. } = self;
        let mut report = Report {
            batches: chain.batches,
            bytes: chain.bytes,
            torn: chain.pending.len() as u64,
            unreadable_blocks: self.unreadable,
            ..Report::default()
        };
        if let Some(first) = chain.first.filter(|first| *first > chain.live) {
            chain.lost.push((chain.live, first - 1));
        }
        if self.tail_unreadable || chain.pending.iter().any(|f| f.unreadable) {
            // What cannot be read may have been acknowledged.
            chain.lost.push((chain.last + 1, chain.last + 1));
        }
        chain.lost.retain(|(_, last)| *last >= chain.live);
        report.rot = chain.lost.iter().map(|(seq, _)| Rot { seq: *seq, copyset: None, index: 0 }).collect();
        let lost = chain.lost.iter().map(|(_, last)| *last).max();
        let mut indexes = FxHashMap::default();
        let mut drafts: Vec<_> = chain.drafts.drain().collect();
        drafts.sort_unstable_by_key(|(id, _)| *id);
        for (id, draft) in drafts {
            let judged = draft.judge(chain.live);
            let rotten = judged.rotten.into_iter();
            let missing = judged.missing.map(|index| (index, 0));
            report.rot.extend(rotten.chain(missing).map(|(index, seq)| Rot { seq, copyset: Some(id), index }));
            if let Some(index) = judged.index {
                if lost.is_some_and(|lost| judged.since <= lost) {
                    report.suspects.push(id);
                }
                indexes.insert(id, index);
            }
        }
        let tail = Tail {
            last_seq: chain.last,
            prev_crc: chain.last_crc,
            live_seq: chain.live.clamp(1, chain.last.max(1)),
            covered: chain.durable,
            last_records: chain.last_records,
        };
        let mut log = Log::new(geometry, limits, segments, &tail, indexes);
        // Now, so that a log that goes on in a full segment can say it in the one block that is left there.
        log.free_segments();
        Ok((log, report))
    }

    /// Who lives and who is free. To be reused first: segments the log never reached (a torn first batch), then
    /// those never used, then the oldest.
    fn segments(&self) -> Segments {
        let (size, chain) = (self.geometry.segment_size, &self.chain);
        let free = |slot: u32| Free { slot, until: 0, torn: false };
        let ended = self.known.iter().position(|k| u64::from(k.slot) == chain.end.saturating_sub(1) / size);
        let reached = match ended {
            Some(nth) if chain.end > 0 => nth + 1,
            _ => 0,
        };
        let (reached, beyond) = self.known.split_at(reached);
        let mut queue: VecDeque<Free> = beyond.iter().map(|k| Free { torn: true, ..free(k.slot) }).collect();
        queue.extend(self.unused.iter().map(|slot| free(*slot)));
        queue.extend(self.dead.iter().map(|k| free(k.slot)));
        let mut live = VecDeque::new();
        for (nth, k) in reached.iter().enumerate() {
            let last = nth + 1 == reached.len();
            match k.cut <= chain.live && !last {
                true => queue.push_back(free(k.slot)),
                false => {
                    let end = if last { chain.end - u64::from(k.slot) * size } else { size };
                    live.push_back(Segment { slot: k.slot, first_seq: k.first_seq, end });
                }
            }
        }
        Segments::new(self.geometry, live, queue, self.generation)
    }
}
