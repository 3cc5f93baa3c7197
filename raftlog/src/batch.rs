//! Batches that wait to be written: records are encoded when they are queued, so a write only copies one header.
//!
//! Invariants: batch numbers are given in queue order and never again; only the last batch takes records, and none
//! once its header's length was told to the caller.

use crate::record::{Encoder, HEAD_LEN, HEADER_MAX, RECORD_LEN};
use crate::{BLOCK, CopysetId, Entry, Seq};
use bytes::Bytes;
use std::collections::VecDeque;

/// Most payload buffers in one batch: with the header they are one vectored write (`IOV_MAX` is 1024).
const PAYLOADS_MAX: usize = 512;

/// Room made for payloads at once.
const PAYLOADS_USUAL: usize = 32;

/// Consecutive entries of one copyset in a batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    pub(crate) copyset: CopysetId,
    pub(crate) first: u64,
    pub(crate) count: u64,
}

/// Records on their way to one write.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    pub(crate) seq: Seq,
    pub(crate) records: Vec<u8>,
    pub(crate) record_count: u32,
    pub(crate) payloads: Vec<Bytes>,
    pub(crate) payload_len: u64,
    pub(crate) runs: Vec<Run>,
    closed: bool,
}

impl Batch {
    /// One that only says what its header says.
    pub(crate) fn empty(seq: Seq) -> Self {
        Self { seq, closed: true, ..Self::default() }
    }

    /// Bytes of the header blocks.
    pub(crate) fn header_len(&self) -> usize {
        header_len(self.records.len())
    }

    /// Bytes of the whole batch.
    pub(crate) fn len(&self) -> u64 {
        self.header_len() as u64 + self.payload_len
    }

    pub(crate) fn encoder(&mut self, copyset: CopysetId, incarnation: u64) -> Encoder<'_> {
        self.record_count += 1;
        Encoder { out: &mut self.records, copyset, incarnation }
    }

    /// Adds an entry; returns how far behind the header its payload will lie.
    pub(crate) fn push_entry(&mut self, id: CopysetId, life: u64, e: &Entry, prev_term: u64, staged: bool) -> u64 {
        self.encoder(id, life).entry(e, prev_term, staged);
        let at = self.payload_len;
        if !e.payload.is_empty() {
            self.payload_len += e.payload.len() as u64;
            if self.payloads.is_empty() {
                self.payloads.reserve(PAYLOADS_USUAL); // the write before kept its list
            }
            self.payloads.push(e.payload.clone());
        }
        match self.runs.last_mut() {
            Some(run) if run.copyset == id && run.first + run.count == e.index => run.count += 1,
            _ => self.runs.push(Run { copyset: id, first: e.index, count: 1 }),
        }
        at
    }
}

/// Header blocks for so many bytes of records.
pub(crate) const fn header_len(records: usize) -> usize {
    (HEAD_LEN + records).next_multiple_of(BLOCK)
}

/// What a group of records adds to a batch.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Need {
    pub(crate) records: usize,
    pub(crate) payload: u64,
    pub(crate) payloads: usize,
}

impl Need {
    pub(crate) fn entry(e: &Entry) -> Self {
        let payloads = usize::from(!e.payload.is_empty());
        Self { records: RECORD_LEN + e.context.len(), payload: e.payload.len() as u64, payloads }
    }
    pub(crate) fn record(len: usize) -> Self {
        Self { records: len, ..Self::default() }
    }
    pub(crate) fn and(self, other: Self) -> Self {
        Self {
            records: self.records + other.records,
            payload: self.payload + other.payload,
            payloads: self.payloads + other.payloads,
        }
    }
}

/// The batches not yet taken for writing.
#[derive(Debug)]
pub(crate) struct Queue {
    batches: VecDeque<Batch>,
    /// Buffers of written batches, to be used again.
    spare: Vec<Batch>,
    next_seq: Seq,
    soft_max: u64,
    /// What a segment can hold: the hard limit of a batch.
    hard_max: u64,
    /// Of all batches but the open one.
    charge: u64,
}

impl Queue {
    pub(crate) fn new(next_seq: Seq, soft_max: usize, hard_max: u64) -> Self {
        let soft_max = (soft_max as u64).min(hard_max);
        Self { batches: VecDeque::new(), spare: Vec::new(), next_seq, soft_max, hard_max, charge: 0 }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.batches.is_empty()
    }

    /// Records of all batches; at least one for each, since a batch without records wants to be written too.
    pub(crate) fn records(&self) -> u64 {
        self.batches.iter().map(|b| u64::from(b.record_count).max(1)).sum()
    }

    /// Bytes of log that what waits may take; the header of the open batch counts as it is now.
    pub(crate) fn charge(&self) -> u64 {
        self.charge + self.batches.back().map_or(0, |b| self.charge_of(b.len()))
    }

    /// A batch that is longer than most may leave as much unused at the end of the segment where it does not fit.
    pub(crate) fn charge_of(&self, batch_len: u64) -> u64 {
        if batch_len > self.soft_max.min((self.hard_max + BLOCK as u64) / 2) { 2 * batch_len } else { batch_len }
    }

    /// Whether `need` goes into `batch` under the soft limit.
    fn fits(&self, batch: &Batch, need: Need) -> bool {
        let header = header_len(batch.records.len() + need.records);
        header <= HEADER_MAX
            && batch.payloads.len() + need.payloads <= PAYLOADS_MAX
            && header as u64 + batch.payload_len + need.payload <= self.soft_max
    }

    /// Whether `need` would fit a batch of its own under the soft limit.
    pub(crate) fn fits_one(&self, need: Need) -> bool {
        self.fits(&Batch::default(), need)
    }

    /// Whether the open batch takes `need`.
    pub(crate) fn has_room(&self, need: Need) -> bool {
        self.batches.back().is_some_and(|b| !b.closed && self.fits(b, need))
    }

    /// Opens a new batch unless the open one has room for `need`. What is larger than the soft limit gets a batch
    /// for itself; what no segment can hold breaks the owner's limits.
    pub(crate) fn open_for(&mut self, need: Need) {
        let alone = header_len(need.records);
        let fits_segment = alone <= HEADER_MAX && alone as u64 + need.payload <= self.hard_max;
        assert!(fits_segment, "a record must fit in a segment (Log::max_entry_bytes)");
        if !self.has_room(need) {
            self.open();
        }
    }

    /// The batch that takes records; after [`Self::open_for`] there is one.
    pub(crate) fn open_batch(&mut self) -> &mut Batch {
        let last = self.batches.len() - 1;
        &mut self.batches[last]
    }

    /// Opens a new batch behind the others.
    pub(crate) fn open(&mut self) {
        self.charge += self.batches.back().map_or(0, |b| self.charge_of(b.len()));
        let mut batch = self.spare.pop().unwrap_or_default();
        (batch.seq, batch.closed) = (self.next_seq, false);
        self.next_seq += 1;
        self.batches.push_back(batch);
    }

    /// Number of the newest batch that was opened.
    pub(crate) fn last_seq(&self) -> Seq {
        self.next_seq - 1
    }

    /// The next batch to write.
    pub(crate) fn front(&self) -> Option<&Batch> {
        self.batches.front()
    }

    /// No more records for the next batch: its length is known to others now.
    pub(crate) fn close_front(&mut self) {
        if let Some(front) = self.batches.front_mut() {
            front.closed = true;
        }
    }

    pub(crate) fn pop(&mut self) -> Option<Batch> {
        let batch = self.batches.pop_front()?;
        if !self.batches.is_empty() {
            self.charge -= self.charge_of(batch.len());
        }
        Some(batch)
    }

    /// Takes a written batch's buffers back.
    pub(crate) fn recycle(&mut self, mut batch: Batch) {
        if self.spare.len() < 4 {
            batch.records.clear();
            batch.payloads.clear();
            batch.runs.clear();
            (batch.record_count, batch.payload_len) = (0, 0);
            self.spare.push(batch);
        }
    }
}
