//! Log zones: images the real [`Log`] wrote, changed and their CRCs made right again, so that what is wrong gets deep.
//!
//! Checked: recovery ends, never panics, gives the same answer twice; whatever it accepts can be used: every copyset can
//! be asked for everything, started or refused, and the log goes on taking batches and can be recovered again.

use crate::engine::{Rng, Target};
use bytes::Bytes;
use chunkserver::shard::entry::{Header, Kind};
use copyset::{ConfState, Copyset};
use raftlog::{
    BLOCK, Checkpoint, CopysetId, Entry, EntryKind, Geometry, HardState, Limits, Log, ReadFailed, RecoverError,
    Recovery, Report, crc32c,
};
use std::cell::RefCell;
use std::rc::Rc;

const SEGMENT: u64 = 32 << 10;
const SEGMENTS: u32 = 5;
/// Offsets in a batch's fixed header (docs/formats-log.md) and their widths.
const HEAD: &[(usize, usize)] = &[
    (12, 2),
    (14, 2),
    (16, 8),
    (32, 8),
    (40, 8),
    (48, 8),
    (56, 8),
    (64, 4),
    (72, 4),
    (76, 4),
    (80, 4),
    (84, 4),
    (88, 8),
    (96, 8),
];
/// Likewise in a record.
const RECORD: &[(usize, usize)] =
    &[(0, 1), (1, 1), (2, 2), (4, 4), (8, 8), (16, 8), (24, 8), (32, 8), (40, 8), (48, 4), (52, 4)];
const HEAD_LEN: usize = 128;
const RECORD_LEN: usize = 56;

fn geometry() -> Geometry {
    Geometry { uuid: *b"0123456789abcdef", segment_size: SEGMENT, segment_count: SEGMENTS }
}

fn limits() -> Limits {
    Limits { batch_bytes_max: 24 << 10, writes_in_flight: 2 }
}

pub(crate) fn entry(index: u64, term: u64, blocks: usize, rng: &mut Rng) -> Entry {
    if blocks == 0 && rng.one_in(6) {
        let change = copyset::encode_change(&copyset::raft::eraftpb::ConfChangeV2::default());
        return Entry { index, term, kind: EntryKind::ConfChange, context: change, payload: Bytes::new() };
    }
    let payload = vec![rng.next() as u8; blocks * BLOCK];
    let mut context: Vec<u8> = payload.chunks(BLOCK).flat_map(|block| crc32c(block).to_le_bytes()).collect();
    if blocks > 0 || rng.one_in(2) {
        let kind = if blocks > 0 { Kind::Write } else { *rng.pick(&[Kind::Delete, Kind::Zero]) };
        let header = Header { kind, offset: 0, len: payload.len() as u32, chunk: rng.next() % 4, sn: 1 };
        context.extend_from_slice(&header.encode());
    }
    Entry { index, term, kind: EntryKind::Normal, context: context.into(), payload: payload.into() }
}

/// Writes what the log has to write.
fn drain(log: &mut Log, image: &mut [u8]) {
    while let Some(len) = log.next_header() {
        let mut header = vec![0; len];
        let write = log.take_write(&mut header);
        let mut at = write.offset as usize;
        for part in std::iter::once(&header[..]).chain(write.payloads.iter().map(|p| &p[..])) {
            image[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        }
        log.write_done(write.id);
    }
}

/// A life of a log with three copysets.
fn image(seed: u64, operations: usize) -> Vec<u8> {
    let mut rng = Rng::of(seed, 77);
    let mut image = vec![0; (SEGMENT * u64::from(SEGMENTS)) as usize];
    let mut log = Recovery::blank(geometry(), limits()).unwrap();
    let ids: Vec<CopysetId> = (0..3).map(|i| CopysetId::new(1, i)).collect();
    for (i, &id) in ids.iter().enumerate() {
        log.checkpoint(id, Copyset::initial_checkpoint(&[1, 2, 3][..1 + 2 * (i % 2)], 7 + i as u64));
    }
    for _ in 0..operations {
        let id = *rng.pick(&ids);
        let Some(index) = log.index(id) else { continue };
        let (last, hs) = (index.last_index(), index.hard_state());
        match rng.below(10) {
            0 => {
                let at = index.first_index().max(hs.commit).min(last);
                if let Some(applied_term) = index.term(at) {
                    let conf = index.checkpoint().conf.clone();
                    let incarnation = index.checkpoint().incarnation;
                    let hard_state = HardState { commit: hs.commit.max(at), ..hs };
                    log.checkpoint(id, Checkpoint { applied_index: at, applied_term, hard_state, conf, incarnation });
                }
            }
            1 if index.not_resident().is_empty() => {
                log.relog(id);
            }
            2 if rng.one_in(6) => {
                log.purge(id);
                log.checkpoint(id, Copyset::initial_checkpoint(&[1], rng.next() | 1));
            }
            3 => {
                log.seal();
            }
            _ => {
                let term = hs.term.max(index.term(last).unwrap_or(0)) + u64::from(rng.one_in(8));
                let first = if rng.one_in(6) { last.max(hs.commit + 1) } else { last + 1 };
                let first = first.max(index.first_index());
                let count = 1 + rng.below(3) as u64;
                let blocks = rng.below(3);
                let entries: Vec<Entry> = (first..first + count).map(|i| entry(i, term, blocks, &mut rng)).collect();
                let room: u64 = entries.iter().map(|e| log.entry_cost(e.payload.len())).sum();
                if log.space_for_entries() < room {
                    continue;
                }
                let commit = hs.commit.max(first + rng.below(count as usize) as u64);
                log.append(id, entries, Some(HardState { term, vote: 1, commit }));
            }
        }
        if rng.one_in(2) {
            drain(&mut log, &mut image);
            log.free_segments();
        }
    }
    drain(&mut log, &mut image);
    image
}

/// Where the legible headers are.
fn headers(image: &[u8]) -> Vec<usize> {
    (0..image.len()).step_by(BLOCK).filter(|&at| image[at..].starts_with(b"RAFTLOG1")).collect()
}

fn u64_at(image: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(image[at..at + 8].try_into().unwrap())
}

fn u32_at(image: &[u8], at: usize) -> usize {
    u32::from_le_bytes(image[at..at + 4].try_into().unwrap()) as usize
}

/// Makes a batch's CRCs right: of the payload, of the records, of the header.
fn seal(image: &mut [u8], at: usize, payload: bool) {
    let header_len = u32_at(image, at + 72);
    let Some(end) = at.checked_add(header_len).filter(|&end| end <= image.len() && header_len >= BLOCK) else {
        return seal_head(image, at);
    };
    if payload {
        for (context, len, data) in records(image, at) {
            let blocks = (len / BLOCK).min((image.len() - data.min(image.len())) / BLOCK);
            for n in 0..blocks {
                let crc = crc32c(&image[data + n * BLOCK..data + (n + 1) * BLOCK]);
                if context + n * 4 + 4 <= end {
                    image[context + n * 4..context + n * 4 + 4].copy_from_slice(&crc.to_le_bytes());
                }
            }
        }
    }
    let crc = crc32c(&image[at + HEAD_LEN..end]);
    image[at + 68..at + 72].copy_from_slice(&crc.to_le_bytes());
    seal_head(image, at);
}

fn seal_head(image: &mut [u8], at: usize) {
    let crc = crc32c(&image[at + 12..at + HEAD_LEN]);
    image[at + 8..at + 12].copy_from_slice(&crc.to_le_bytes());
}

/// The records of a batch that are entries: (place of the context, length of the payload, place of the payload).
fn records(image: &[u8], at: usize) -> Vec<(usize, usize, usize)> {
    let mut all = Vec::new();
    let mut data = at + u32_at(image, at + 72);
    for place in places(image, at) {
        let len = u32_at(image, place + 48);
        if image[place] == 1 && len > 0 && len < image.len() {
            all.push((place + RECORD_LEN, len, data));
            data += len;
        }
    }
    all
}

/// Where records start.
fn places(image: &[u8], at: usize) -> Vec<usize> {
    let (end, mut place, mut all) =
        ((at + HEAD_LEN + u32_at(image, at + 80)).min(image.len()), at + HEAD_LEN, Vec::new());
    while place + RECORD_LEN <= end && all.len() < 200 {
        all.push(place);
        place = place.saturating_add(RECORD_LEN + u32_at(image, place + 4));
    }
    all
}

fn change_field(image: &mut [u8], at: usize, width: usize, rng: &mut Rng) {
    let mut old = [0; 8];
    old[..width].copy_from_slice(&image[at..at + width]);
    let new = match rng.below(3) {
        0 => rng.number(u64::from_le_bytes(old)),
        1 => u64::from_le_bytes(old).wrapping_add(1 + rng.below(3) as u64),
        _ => u64::from_le_bytes(old).wrapping_sub(1 + rng.below(3) as u64),
    };
    image[at..at + width].copy_from_slice(&new.to_le_bytes()[..width]);
}

/// Makes the batches behind a changed one chain again.
fn chain(image: &mut [u8]) {
    let mut all: Vec<(u64, usize)> = headers(image).into_iter().map(|at| (u64_at(image, at + 40), at)).collect();
    all.sort_unstable();
    for pair in 1..all.len() {
        let ((before, from), (seq, at)) = (all[pair - 1], all[pair]);
        if before.wrapping_add(1) == seq {
            image.copy_within(from + 8..from + 12, at + 64);
            seal_head(image, at);
        }
    }
}

/// Changes an image of a log. True if headers were forged: batches may then claim any order, also one that has no end.
pub(crate) fn mutate(image: &mut [u8], rng: &mut Rng) -> bool {
    let mut forged = false;
    for _ in 0..1 + rng.below(4) {
        let all = headers(image);
        if all.is_empty() {
            break;
        }
        let at = *rng.pick(&all);
        let honest = !rng.one_in(4);
        match rng.below(10) {
            0..=2 => {
                let &(field, width) = rng.pick(HEAD);
                change_field(image, at + field, width, rng);
                forged = true;
            }
            3..=5 => {
                let places = places(image, at);
                if !places.is_empty() {
                    let place = *rng.pick(&places);
                    let &(field, width) = rng.pick(RECORD);
                    change_field(image, place + field, width, rng);
                }
            }
            6 => {
                // Inside contexts: configurations, changes, op headers.
                let used = u32_at(image, at + 80).min(BLOCK - HEAD_LEN);
                let byte = at + HEAD_LEN + rng.below(used);
                image[byte] = if rng.one_in(2) { rng.next() as u8 } else { image[byte] ^ 1 << rng.below(8) };
            }
            7 => {
                // A batch elsewhere, perhaps said to belong there.
                let blocks = image.len() / BLOCK;
                let (to, len) = (rng.below(blocks) * BLOCK, BLOCK * (1 + rng.below(3)));
                let len = len.min(image.len() - at).min(image.len() - to);
                image.copy_within(at..at + len, to);
                forged = true;
                if honest {
                    image[to + 96..to + 104].copy_from_slice(&(to as u64).to_le_bytes());
                    seal(image, to, false);
                }
                continue;
            }
            8 => {
                // Torn: sectors of nothing, or of something else.
                let sector = rng.below(image.len() / 512) * 512;
                let from = rng.below(image.len() / 512) * 512;
                if rng.one_in(2) {
                    image[sector..sector + 512].fill(0);
                } else {
                    image.copy_within(from..from + 512, sector);
                }
                continue;
            }
            _ => {
                let byte = rng.below(image.len());
                image[byte] ^= 1 << rng.below(8);
                continue;
            }
        }
        if honest {
            seal(image, at, rng.one_in(2));
            if rng.one_in(2) {
                chain(image);
            }
        }
    }
    forged
}

fn recover(image: &[u8], bad: &[u64]) -> Result<(Log, Report), RecoverError> {
    let mut recovery = Recovery::new(geometry(), limits());
    let mut reads = 0;
    while let Some((offset, len)) = recovery.next_read() {
        let range = offset..offset + len as u64;
        if bad.iter().any(|at| range.contains(at)) {
            recovery.feed(Err(ReadFailed));
        } else {
            recovery.feed(Ok(&image[offset as usize..offset as usize + len]));
        }
        reads += 1;
        assert!(reads < 10_000, "recovery must end");
    }
    recovery.finish()
}

/// Everything the log says, in words.
fn said(log: &Log) -> String {
    let one = |id| {
        let index = log.index(id).unwrap();
        let (first, last) = (index.first_index(), index.last_index());
        assert!(first <= last.saturating_add(1), "{first}..{last}");
        let entries = index.entries(first, last.saturating_add(1).min(first + 200), usize::MAX);
        for entry in &entries {
            if let Some(place) = index.location(entry.index) {
                assert!(place.offset + place.len as u64 <= SEGMENT * u64::from(SEGMENTS));
            }
            let _ = (index.term(entry.index), index.payload_len(entry.index), index.is_rotten(entry.index));
        }
        let numbers: Vec<_> = entries.iter().map(|e| (e.index, e.term, crc32c(&e.context))).collect();
        format!("{id:?} {:?} {:?} {numbers:?}", index.checkpoint(), index.hard_state())
    };
    log.copysets().into_iter().map(one).collect()
}

pub(crate) struct Recoveries(Vec<Vec<u8>>);

impl Recoveries {
    pub(crate) fn new() -> Self {
        Self((0..24).map(|seed| image(seed, 4 + 6 * seed as usize)).collect())
    }
}

impl Target for Recoveries {
    fn input(&mut self, rng: &mut Rng) -> bool {
        let mut image = rng.pick(&self.0).clone();
        let forged = mutate(&mut image, rng);
        let bad: Vec<u64> =
            (0..rng.below(8) / 6).map(|_| rng.below(image.len() / BLOCK) as u64 * BLOCK as u64).collect();
        let Ok((mut log, report)) = recover(&image, &bad) else { return false };
        let what = said(&log);
        if rng.one_in(4) {
            let (again, report_again) = recover(&image, &bad).unwrap();
            assert_eq!((said(&again), &report_again), (what.clone(), &report), "the same bytes say the same");
        }
        // Batches only go where nothing live is.
        let fresh = CopysetId::new(9, 9);
        log.checkpoint(fresh, Copyset::initial_checkpoint(&[1], 99));
        for index in 2..5 {
            log.append(fresh, vec![entry(index, 1, 1, rng)], Some(HardState { term: 1, vote: 1, commit: index }));
            drain(&mut log, &mut image);
        }
        let stuck = log.next_header().is_none() && log.index(fresh).is_some_and(|_| log.durable_commit(fresh) < 4);
        let started = start(log, rng);
        // A log without a free segment may have to wait for space; otherwise all of it is there again.
        let (log, _) = match recover(&image, &[]) {
            Ok(again) => again,
            // A header of another version counts wherever it is met, also behind what was written now.
            Err(RecoverError::Version(_)) => return true,
            Err(_) if !bad.is_empty() => return true,
            Err(error) => panic!("what was understood once is not any more: {error}"),
        };
        let known = log.index(fresh).map(raftlog::Index::last_index);
        assert!(
            forged || stuck || !bad.is_empty() || known == Some(4),
            "acknowledged entries are gone: {known:?} {report:?} {what}"
        );
        // Beside the one made here.
        started > 1
    }
}

/// Every copyset starts or is refused; how many started.
fn start(log: Log, rng: &mut Rng) -> usize {
    let (ids, log) = (log.copysets(), Rc::new(RefCell::new(log)));
    let mut started = 0;
    for id in ids {
        let conf = log.borrow().index(id).map(|index| ConfState::decode(&index.checkpoint().conf));
        let config = copyset::Config::new(id, 1, rng.next());
        let Ok(mut copyset) = Copyset::new(config, Rc::clone(&log), 0) else { continue };
        assert!(matches!(conf, Some(Ok(_))), "an unreadable configuration is refused");
        let mut effects = Vec::new();
        for turn in 0..4 {
            copyset.ready(&mut effects);
            for effect in effects.drain(..) {
                if let copyset::Effect::Apply(committed) = effect {
                    let _ = (committed.header().map(Header::decode), committed.crcs().len());
                    copyset.applied(committed.index);
                }
            }
            copyset.tick(turn * 1_000_000_000);
        }
        started += 1;
    }
    started
}
