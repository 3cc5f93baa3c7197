//! Which of the batches that were found belong to the log: the rule of torn tail and rot.
//!
//! The rule: batches are taken in number order while each follows the one before it by CRC and is whole. A batch
//! that is missing or broken is rot if any header says it was durable, else it and all behind it are the torn
//! tail, dropped together: no later one was ever acknowledged.

use crate::draft::{At, Draft, replay};
use crate::index::Place;
use crate::record::Body;
use crate::scan::Found;
use crate::{BLOCK, CopysetId, Seq};
use rustc_hash::FxHashMap;
use std::collections::VecDeque;

/// The log, rebuilt batch by batch.
#[derive(Default)]
pub(crate) struct Chain {
    pub(crate) drafts: FxHashMap<CopysetId, Draft>,
    /// First batch there can be a trace of, once anything was found.
    pub(crate) first: Option<Seq>,
    /// Last batch taken or known lost.
    pub(crate) last: Seq,
    /// CRC of batch `last`; 0 if it is lost.
    pub(crate) last_crc: u32,
    /// Newest `durable_seq` and `live_seq` of headers that count.
    pub(crate) durable: Seq,
    pub(crate) live: Seq,
    pub(crate) last_records: Seq,
    /// Offset behind the last batch taken.
    pub(crate) end: u64,
    /// Batches whose records are lost, first and last of each range.
    pub(crate) lost: Vec<(Seq, Seq)>,
    pub(crate) pending: VecDeque<Found>,
    pub(crate) batches: u64,
    pub(crate) bytes: u64,
}

impl Chain {
    /// Takes the next batch found, in order of segments and offsets.
    pub(crate) fn offer(&mut self, found: Found) {
        let head = &found.head;
        self.durable = self.durable.max(head.durable_seq);
        if self.first.is_none() {
            self.last = if head.seal { head.seq } else { head.seq - 1 };
            self.first = Some(self.last + 1);
        }
        if head.seal {
            // Alone on its way when it was written: all before it is durable, so nothing can make it stale.
            self.live = self.live.max(head.live_seq);
            let end = found.end();
            self.settle();
            if self.last < head.seq {
                self.lose(head.seq);
            }
            self.end = end;
        } else if head.seq > self.pending.back().map_or(self.last, |p| p.head.seq) {
            self.pending.push_back(found);
            self.settle();
        }
    }

    fn settle(&mut self) {
        loop {
            let next = self.last + 1;
            match self.pending.front() {
                Some(f) if f.head.seq == next => {
                    let chains = f.head.prev_crc == self.last_crc || f.head.prev_crc == 0 || self.last_crc == 0;
                    if !(chains && f.good() || next <= self.durable) {
                        return;
                    }
                    let Some(found) = self.pending.pop_front() else { return };
                    match chains && found.records.is_some() {
                        true => self.take(found),
                        false => self.lose(next),
                    }
                }
                Some(f) if next <= self.durable => self.lose(self.durable.min(f.head.seq - 1)),
                _ => return,
            }
        }
    }

    /// Everything up to `through` that was not found was durable once: rot.
    fn lose(&mut self, through: Seq) {
        self.lost.push((self.last + 1, through));
        (self.last, self.last_crc) = (through, 0);
    }

    fn take(&mut self, found: Found) {
        let (base, seq, end) = (found.base(), found.head.seq, found.end());
        self.batches += 1;
        self.bytes += end - found.head.offset;
        self.live = self.live.max(found.head.live_seq);
        (self.last, self.last_crc, self.end) = (seq, found.crc, end);
        let mut at = 0u64;
        for record in found.records.into_iter().flatten() {
            self.last_records = seq;
            let len = match record.body {
                Body::Entry { payload_len, .. } => u64::from(payload_len),
                _ => 0,
            };
            let blocks = at / BLOCK as u64..(at + len) / BLOCK as u64;
            let first_bad = found.bad_blocks.partition_point(|b| *b < blocks.start);
            let rotten = found.bad_blocks.get(first_bad).is_some_and(|b| blocks.contains(b));
            replay(&mut self.drafts, record, At { seq, place: Place::Disk(base + at), rotten });
            at += len;
        }
    }
}
