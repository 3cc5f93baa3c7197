//! One segment's blocks in, its batches out. Takes a block at a time and never looks back.
//!
//! Promises: a batch is found wherever its fixed header is intact, also behind rotten or torn ones; what an
//! earlier use of the segment left behind is not found, because generations and numbers only go up.

use crate::record::{Body, Head, Parsed, Record, parse_head, parse_records};
use crate::{BLOCK, Geometry, Seq, crc32c};

/// A batch as it lies on disk.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) head: Head,
    pub(crate) crc: u32,
    /// `None` if the header blocks are torn or rotten.
    pub(crate) records: Option<Vec<Record>>,
    /// Payload blocks with a wrong CRC, ascending.
    pub(crate) bad_blocks: Vec<u64>,
    /// The device could not read a part of it.
    pub(crate) unreadable: bool,
}

impl Found {
    pub(crate) fn good(&self) -> bool {
        self.records.is_some() && self.bad_blocks.is_empty()
    }
    /// Offset of the payload in the zone.
    pub(crate) fn base(&self) -> u64 {
        self.head.offset + u64::from(self.head.header_len)
    }
    /// Offset behind the batch.
    pub(crate) fn end(&self) -> u64 {
        self.base() + self.head.payload_len
    }
}

enum State {
    Header,
    /// Collecting header blocks.
    Records {
        found: Found,
        records_crc: u32,
    },
    /// Checking payload blocks; `crcs` is empty when the records are lost.
    Payload {
        found: Found,
        crcs: Vec<u32>,
        block: u64,
    },
}

/// What a block ended.
pub(crate) enum Step {
    More,
    Found(Found),
    Version(u16),
}

/// Looks for batches in one segment.
pub(crate) struct Scanner {
    geometry: Geometry,
    state: State,
    header: Vec<u8>,
    generation: u64,
    last_seq: Seq,
    /// The next block is where the next header belongs.
    on_track: bool,
    /// The block where the next header belongs could not be read.
    pub(crate) tail_unreadable: bool,
}

impl Scanner {
    pub(crate) fn new(geometry: Geometry, generation: u64) -> Self {
        let header = Vec::new();
        let state = State::Header;
        Self { geometry, state, header, generation, last_seq: 0, on_track: true, tail_unreadable: false }
    }

    /// Whether batch `seq - 1` is found and no part of another is pending.
    pub(crate) fn complete_before(&self, seq: Seq) -> bool {
        matches!(self.state, State::Header) && self.last_seq.checked_add(1) == Some(seq)
    }

    /// Takes the block at `offset`; `None` if the device could not read it.
    pub(crate) fn block(&mut self, offset: u64, data: Option<&[u8]>) -> Step {
        match std::mem::replace(&mut self.state, State::Header) {
            State::Header => self.at_header(offset, data),
            State::Records { mut found, records_crc } => {
                found.unreadable |= data.is_none();
                self.header.extend_from_slice(data.unwrap_or(&[0; BLOCK]));
                self.header_grew(found, records_crc)
            }
            State::Payload { mut found, crcs, block } => {
                found.unreadable |= data.is_none();
                let bad = data.is_none_or(|d| crcs.get(block as usize).is_some_and(|want| crc32c(d) != *want));
                if bad {
                    found.bad_blocks.push(block);
                }
                self.payload(found, crcs, block + 1)
            }
        }
    }

    fn at_header(&mut self, offset: u64, data: Option<&[u8]>) -> Step {
        let parsed = data.and_then(|d| parse_head(d, &self.geometry, offset));
        match parsed {
            Some(Parsed::Version(v)) => Step::Version(v),
            Some(Parsed::Head { head, crc, records_crc }) if self.follows(&head) => {
                self.header.clear();
                self.header.extend_from_slice(data.unwrap_or_default());
                (self.generation, self.last_seq) = (head.generation, head.seq);
                (self.on_track, self.tail_unreadable) = (true, false);
                let found = Found { head, crc, records: None, bad_blocks: Vec::new(), unreadable: false };
                self.header_grew(found, records_crc)
            }
            _ => {
                self.tail_unreadable |= self.on_track && data.is_none();
                self.on_track = false;
                Step::More
            }
        }
    }

    fn follows(&self, head: &Head) -> bool {
        let next = if head.seal { head.seq >= self.last_seq } else { head.seq > self.last_seq };
        head.generation >= self.generation && next
    }

    fn header_grew(&mut self, mut found: Found, records_crc: u32) -> Step {
        if self.header.len() < found.head.header_len as usize {
            self.state = State::Records { found, records_crc };
            return Step::More;
        }
        found.records = parse_records(&self.header, &found.head, records_crc);
        let crcs = found.records.iter().flatten().flat_map(block_crcs).collect();
        self.payload(found, crcs, 0)
    }

    fn payload(&mut self, found: Found, crcs: Vec<u32>, block: u64) -> Step {
        if block * (BLOCK as u64) < found.head.payload_len {
            self.state = State::Payload { found, crcs, block };
            return Step::More;
        }
        Step::Found(found)
    }
}

/// The CRCs of a record's payload blocks: the start of an entry's context.
fn block_crcs(record: &Record) -> impl Iterator<Item = u32> {
    let crcs = match &record.body {
        Body::Entry { context, payload_len, .. } => context.get(..*payload_len as usize / BLOCK * 4),
        _ => None,
    };
    crcs.unwrap_or_default().as_chunks::<4>().0.iter().map(|c| u32::from_le_bytes(*c))
}
