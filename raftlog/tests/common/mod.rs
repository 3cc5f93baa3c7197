//! What the log's tests share: a disk image that only changes when a write completes (or tears), and a model.
#![allow(dead_code, unreachable_pub)]

use bytes::Bytes;
use raftlog::{
    BLOCK, Checkpoint, CopysetId, Entry, EntryKind, Geometry, HardState, Limits, Log, ReadFailed, RecoverError,
    Recovery, Report, Seq, WriteId,
};
use std::collections::BTreeMap;

pub const UUID: [u8; 16] = *b"0123456789abcdef";

pub fn geometry(segment_size: u64, segment_count: u32) -> Geometry {
    Geometry { uuid: UUID, segment_size, segment_count }
}

pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// A write that was submitted and not completed.
#[derive(Clone)]
pub struct Flying {
    pub id: WriteId,
    pub seq: Seq,
    pub offset: u64,
    pub bytes: Vec<u8>,
}

#[derive(Clone)]
pub struct Disk {
    pub image: Vec<u8>,
    pub flying: Vec<Flying>,
    pub bad: Vec<u64>,
}

impl Disk {
    pub fn new(g: &Geometry) -> Self {
        let len = (g.segment_size * u64::from(g.segment_count)) as usize;
        Self { image: vec![0; len], flying: Vec::new(), bad: Vec::new() }
    }

    /// Takes every write the log will give now.
    pub fn submit(&mut self, log: &mut Log) -> usize {
        let mut n = 0;
        while let Some(len) = log.next_header() {
            assert_eq!(log.next_header(), Some(len));
            let mut bytes = vec![0xa5; len];
            let w = log.take_write(&mut bytes);
            for p in &w.payloads {
                assert!(!p.is_empty() && p.len().is_multiple_of(BLOCK));
                bytes.extend_from_slice(p);
            }
            assert!(w.payloads.len() <= 1023 && w.offset.is_multiple_of(BLOCK as u64));
            self.flying.push(Flying { id: w.id, seq: w.seq, offset: w.offset, bytes });
            n += 1;
        }
        n
    }

    pub fn land(&mut self, offset: u64, bytes: &[u8]) {
        self.image[offset as usize..offset as usize + bytes.len()].copy_from_slice(bytes);
    }

    pub fn complete(&mut self, log: &mut Log, at: usize) -> Option<Seq> {
        let w = self.flying.remove(at);
        self.land(w.offset, &w.bytes);
        log.write_done(w.id)
    }

    /// Writes until there is nothing more to write.
    pub fn drain(&mut self, log: &mut Log) {
        loop {
            self.submit(log);
            if self.flying.is_empty() {
                return;
            }
            self.complete(log, 0);
        }
    }

    pub fn recover(&self, g: Geometry, limits: Limits) -> Result<(Log, Report), RecoverError> {
        let mut r = Recovery::new(g, limits);
        let mut reads = 0;
        while let Some((offset, len)) = r.next_read() {
            assert!(len > 0 && len <= 1 << 20 && len.is_multiple_of(BLOCK) && offset.is_multiple_of(BLOCK as u64));
            // What a caller may read in advance begins with what is wanted, is in the zone, and no two are the same.
            let ahead: Vec<_> = r.reads_ahead().take(4).collect();
            assert_eq!(ahead.first(), Some(&(offset, len)));
            assert!(ahead.iter().all(|(at, len)| at + *len as u64 <= self.image.len() as u64));
            assert!(ahead.windows(2).all(|pair| pair[0].0 != pair[1].0));
            let range = offset..offset + len as u64;
            match self.bad.iter().any(|b| range.contains(b)) {
                true => r.feed(Err(ReadFailed)),
                false => r.feed(Ok(&self.image[offset as usize..offset as usize + len])),
            }
            reads += 1;
            assert!(reads < 100_000, "recovery must end");
        }
        r.finish()
    }

    pub fn open(&self, g: Geometry, limits: Limits) -> Log {
        let (log, report) = self.recover(g, limits).unwrap();
        assert_eq!((report.rot, report.suspects), (vec![], vec![]));
        log
    }

    pub fn read(&self, log: &Log, id: CopysetId, index: u64) -> Vec<u8> {
        let Some(l) = log.index(id).unwrap().location(index) else { return Vec::new() };
        self.image[l.offset as usize..l.offset as usize + l.len].to_vec()
    }

    /// Gives every payload that is not in memory back to the log.
    pub fn restore(&self, log: &mut Log, id: CopysetId) {
        for (index, l) in log.index(id).unwrap().not_resident() {
            let payload = &self.image[l.offset as usize..l.offset as usize + l.len];
            log.restore(id, index, Bytes::copy_from_slice(payload));
        }
    }
}

pub fn entry(index: u64, term: u64, blocks: usize, stamp: u64) -> Entry {
    let mut payload = vec![0u8; blocks * BLOCK];
    for (i, word) in payload.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        *word = (stamp ^ (index << 32) ^ i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
    }
    let mut context: Vec<u8> =
        payload.as_chunks::<BLOCK>().0.iter().flat_map(|b| crc32c::crc32c(b).to_le_bytes()).collect();
    context.extend_from_slice(&stamp.to_le_bytes());
    let kind = if stamp.is_multiple_of(7) { EntryKind::ConfChange } else { EntryKind::Normal };
    Entry { index, term, kind, context: context.into(), payload: payload.into() }
}

pub fn checkpoint(applied_index: u64, applied_term: u64, incarnation: u64) -> Checkpoint {
    let hard_state = HardState { term: applied_term, vote: 1, commit: applied_index };
    Checkpoint { applied_index, applied_term, hard_state, conf: Bytes::from_static(b"conf"), incarnation }
}

/// What a copyset must look like.
#[derive(Clone, PartialEq, Debug)]
pub struct Copy {
    pub checkpoint: Checkpoint,
    pub hard_state: HardState,
    pub entries: Vec<Entry>,
}

pub type State = BTreeMap<CopysetId, Copy>;

/// What the log says, payloads read from memory or from disk.
pub fn state(log: &Log, disk: &Disk) -> State {
    let mut state = State::new();
    for id in log.copysets() {
        let index = log.index(id).unwrap();
        let mut entries = index.entries(index.first_index(), index.last_index() + 1, usize::MAX);
        for e in &mut entries {
            if e.payload.len() != index.payload_len(e.index).unwrap() {
                e.payload = disk.read(log, id, e.index).into();
            }
        }
        let copy = Copy { checkpoint: index.checkpoint().clone(), hard_state: index.hard_state(), entries };
        state.insert(id, copy);
    }
    state
}
