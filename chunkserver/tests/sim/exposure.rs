//! What a disk's silent faults may show to clients, so that the checker can tell an honest CRC_FAIL from a false one.
//!
//! With one replica nobody can repair: what rotted, or went to the wrong place, may answer CRC_FAIL. That is legal for
//! exactly what is noted here, and wrong data never is. Whoever harms the disk notes it before anybody can see it.

use crate::history::{Kind, Place, Record};
use std::collections::{BTreeMap, BTreeSet};

/// What is harmed.
#[derive(Debug, Default)]
pub(crate) struct Exposure {
    /// Blocks of data: when they were harmed, and when an overwrite that began after that was answered.
    blocks: BTreeMap<Place, (u64, u64)>,
    /// Chunks whose checksums or metadata are harmed, by copyset.
    chunks: BTreeSet<(u64, u64)>,
    /// Slots whose checksums or metadata are harmed.
    pub(crate) slots: BTreeSet<u32>,
    /// Whether this disk harms CRC pages (or writes of data), once that is decided.
    pub(crate) pages: Option<bool>,
    /// Copysets of whose log something durable is lost.
    copysets: BTreeSet<u64>,
    /// Reads of the device may be misdirected until then.
    reads_until: u64,
    /// Nothing on the disk is certain.
    pub(crate) everything: bool,
    /// Now, kept by the world.
    pub(crate) now: u64,
}

impl Exposure {
    pub(crate) fn block(&mut self, place: Place) {
        self.blocks.insert(place, (self.now, u64::MAX));
    }

    pub(crate) fn chunk(&mut self, copyset: u64, chunk: u64) {
        self.chunks.insert((copyset, chunk));
    }

    pub(crate) fn copyset(&mut self, copyset: u64) {
        self.copysets.insert(copyset);
    }

    /// Reads that begin before `until` may go wrong.
    pub(crate) fn reads(&mut self, until: u64) {
        self.reads_until = until;
    }

    /// Whether this copyset may be out of service.
    pub(crate) fn lost(&self, copyset: u64) -> bool {
        self.everything || self.copysets.contains(&copyset)
    }

    /// Whether anything of this chunk is, or was, harmed.
    pub(crate) fn harms(&self, copyset: u64, chunk: u64) -> bool {
        let first = Place { copyset, chunk, block: 0 };
        let blocks = self.blocks.range(first..=Place { block: u64::MAX, ..first }).next().is_some();
        self.lost(copyset) || self.chunks.contains(&(copyset, chunk)) || blocks || self.reads_until == u64::MAX
    }

    /// Whether CRC_FAIL is a legal answer to `record`.
    pub(crate) fn explains(&self, record: &Record) -> bool {
        let first = record.first;
        let last = Place { block: first.block.saturating_add(record.blocks), ..first };
        let reads = record.kind == Kind::Read;
        let harmed = |(_, &(_, healed)): (&Place, &(u64, u64))| healed > record.start;
        self.lost(first.copyset)
            || self.chunks.contains(&(first.copyset, first.chunk))
            || (reads && (record.start < self.reads_until || self.blocks.range(first..last).any(harmed)))
    }

    /// `record` was answered at `now`: what it wrote anew is whole again.
    pub(crate) fn heal(&mut self, record: &Record, now: u64) {
        if matches!(record.kind, Kind::Write | Kind::Zero) {
            let first = record.first;
            let last = Place { block: first.block.saturating_add(record.blocks), ..first };
            let older = self.blocks.range_mut(first..last).filter(|(_, harm)| harm.0 < record.start);
            older.for_each(|(_, harm)| harm.1 = now.min(harm.1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::Outcome;

    fn record(kind: Kind, block: u64, blocks: u64, start: u64) -> Record {
        let first = Place { copyset: 1, chunk: 2, block };
        Record { client: 0, kind, first, blocks, start, end: 0, outcome: Outcome::Unknown, seen: Vec::new() }
    }

    #[test]
    fn exactly_what_is_harmed_may_fail_and_an_overwrite_heals() {
        let mut harm = Exposure { now: 7, ..Exposure::default() };
        harm.block(Place { copyset: 1, chunk: 2, block: 5 });
        assert!(harm.explains(&record(Kind::Read, 4, 2, 10)));
        assert!(!harm.explains(&record(Kind::Read, 4, 1, 10)) && !harm.explains(&record(Kind::Read, 6, 1, 10)));
        assert!(!harm.explains(&record(Kind::Write, 5, 1, 10)), "what is rotten can be overwritten");
        harm.heal(&record(Kind::Write, 5, 1, 6), 20);
        assert!(harm.explains(&record(Kind::Read, 5, 1, 21)), "that may be the very write that went astray");
        harm.heal(&record(Kind::Write, 5, 1, 10), 20);
        assert!(harm.explains(&record(Kind::Read, 5, 1, 19)) && !harm.explains(&record(Kind::Read, 5, 1, 21)));
        harm.chunk(1, 2);
        assert!(harm.explains(&record(Kind::Write, 0, 1, 30)) && !harm.lost(1));
        harm.copyset(1);
        assert!(harm.lost(1) && !harm.lost(2));
    }
}
