//! A log on a medium whose un-synced sectors are known one by one.

use crate::common::{Disk, State, entry, state};
use raftlog::{BLOCK, CopysetId, Entry, Geometry, HardState, Limits, Log, Seq, WriteId};
use std::collections::BTreeSet;

pub const SECTOR: usize = 512;
/// Most sectors that may go either way at one moment: 2^14 images.
pub const FREE_MAX: usize = 14;

/// What is wrong with what was recovered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Violation {
    /// A batch that was acknowledged, or that arrived whole behind whole ones, is not there.
    Lost,
    /// A batch is there that did not arrive whole.
    Back,
    /// Damage is reported though there is none.
    Rot,
    /// The batches are right, what they say is not.
    Meaning,
    /// Recovery gave up, or the log cannot live on.
    Stuck,
}

/// Not durable yet.
struct Write {
    id: WriteId,
    seq: Seq,
    seal: bool,
    /// The log was told that it is durable: it is not, and will not be.
    lied: bool,
    offset: usize,
    bytes: Vec<u8>,
}

/// A sector and what it may hold, first what is durable.
struct Choice {
    at: usize,
    values: Vec<Vec<u8>>,
}

pub struct Rig {
    pub geometry: Geometry,
    pub limits: Limits,
    pub log: Log,
    durable: Disk,
    pending: Vec<Write>,
    /// After each batch that ended an operation.
    states: Vec<(Seq, State)>,
    /// Last batch handed out, last one acknowledged.
    taken: Seq,
    promised: Seq,
    /// Of the first such write, the log is told at once that it is durable.
    pub lie: Option<fn(&[u8]) -> bool>,
    /// Acknowledge in the order of completion.
    pub eager: bool,
    watched: bool,
    pub images: u64,
    pub free_most: usize,
    pub found: BTreeSet<Violation>,
    /// Look no further once this was found.
    pub enough: Option<Violation>,
    /// Images to be kept, for a second crash.
    pub kept: Option<Vec<Vec<u8>>>,
}

impl Rig {
    /// On a zone that holds zeros, and something else in the `used` sectors of every block.
    pub fn new(geometry: Geometry, limits: Limits, used: &[usize]) -> Self {
        let mut disk = Disk::new(&geometry);
        let sectors = disk.image.chunks_mut(SECTOR).enumerate();
        sectors.filter(|(n, _)| used.contains(&(n % (BLOCK / SECTOR)))).for_each(|(_, sector)| sector.fill(0x11));
        Self::open(geometry, limits, disk)
    }

    fn open(geometry: Geometry, limits: Limits, disk: Disk) -> Self {
        let mut log = disk.open(geometry, limits);
        for id in log.copysets() {
            disk.restore(&mut log, id);
        }
        let last = log.durable_seq();
        Self {
            states: vec![(last, state(&log, &disk))],
            geometry,
            limits,
            log,
            durable: disk,
            pending: Vec::new(),
            taken: last,
            promised: last,
            lie: None,
            eager: false,
            watched: false,
            images: 0,
            free_most: 0,
            found: BTreeSet::new(),
            enough: None,
            kept: None,
        }
    }

    /// The life after a power cut that left `image`.
    pub fn after(&self, image: &[u8]) -> Self {
        let mut disk = self.durable.clone();
        disk.image.copy_from_slice(image);
        Self::open(self.geometry, self.limits, disk)
    }

    /// Batches that are legible in `image` and dropped.
    pub fn torn(&self, image: &[u8]) -> u64 {
        let mut disk = self.durable.clone();
        disk.image.copy_from_slice(image);
        disk.recover(self.geometry, self.limits).unwrap().1.torn
    }

    /// The process is killed; what it had written is in the drive's cache. `sync`: the next life syncs before it reads.
    pub fn kill(&mut self, sync: bool) {
        let mut seen = self.durable.clone();
        for w in &self.pending {
            seen.land(w.offset as u64, &w.bytes);
        }
        self.log = seen.open(self.geometry, self.limits);
        for id in self.log.copysets() {
            seen.restore(&mut self.log, id);
        }
        let last = self.log.durable_seq();
        self.states.push((last, state(&self.log, &seen)));
        (self.taken, self.promised) = (last, last);
        if sync {
            (self.durable, self.pending) = (seen, Vec::new());
        } else {
            self.pending.iter_mut().for_each(|w| w.lied = true);
        }
    }

    /// From now on every moment is looked at.
    pub fn watch(&mut self) {
        self.watched = true;
    }

    /// An operation; it returns the number of its batch.
    pub fn act(&mut self, operation: impl FnOnce(&mut Log) -> Seq) {
        let seq = operation(&mut self.log);
        self.states.push((seq, state(&self.log, &self.durable)));
    }

    /// An entry behind the last one, with a commit up to it.
    pub fn append(&mut self, id: CopysetId, blocks: usize, sectors: &[usize]) {
        let last = self.log.index(id).unwrap().last_index();
        let hs = HardState { term: 1, vote: 1, commit: last };
        self.act(|log| log.append(id, vec![thin(last + 1, 1, blocks, sectors, 0)], Some(hs)));
    }

    /// Starts what may be started.
    pub fn submit(&mut self) -> usize {
        let before = self.pending.len();
        while let Some(len) = self.log.next_header() {
            let mut bytes = vec![0xa5; len];
            let w = self.log.take_write(&mut bytes);
            w.payloads.iter().for_each(|p| bytes.extend_from_slice(p));
            let seal = is_seal(&bytes);
            let lied = self.watched && self.lie.take_if(|lie| lie(&bytes)).is_some();
            self.taken = self.taken.max(w.seq);
            self.pending.push(Write { id: w.id, seq: w.seq, seal, lied, offset: w.offset as usize, bytes });
            if lied {
                self.told(w.id, w.seq);
            }
        }
        self.look();
        self.pending.len() - before
    }

    fn told(&mut self, id: WriteId, seq: Seq) {
        self.log.write_done(id);
        self.promised = if self.eager { self.promised.max(seq) } else { self.log.durable_seq() };
        self.log.free_segments();
    }

    /// The `nth` of the writes under way is durable.
    pub fn complete(&mut self, nth: usize) {
        let at = self.pending.iter().enumerate().filter(|(_, w)| !w.lied).nth(nth).unwrap().0;
        let w = self.pending.remove(at);
        self.durable.land(w.offset as u64, &w.bytes);
        self.told(w.id, w.seq);
        self.look();
    }

    /// Until nothing is under way.
    pub fn settle(&mut self) {
        loop {
            self.submit();
            if self.pending.iter().all(|w| w.lied) {
                return;
            }
            self.complete(0);
        }
    }

    fn choices(&self) -> Vec<Choice> {
        let mut choices: Vec<Choice> = Vec::new();
        for w in &self.pending {
            for (n, new) in w.bytes.chunks(SECTOR).enumerate() {
                let at = w.offset + n * SECTOR;
                match choices.iter_mut().find(|c| c.at == at) {
                    Some(known) if !known.values.iter().any(|v| v == new) => known.values.push(new.to_vec()),
                    Some(_) => {}
                    None => {
                        let old = &self.durable.image[at..at + SECTOR];
                        if old != new {
                            choices.push(Choice { at, values: vec![old.to_vec(), new.to_vec()] });
                        }
                    }
                }
            }
        }
        choices
    }

    /// Every image of this moment.
    fn look(&mut self) {
        let enough = self.enough.is_some_and(|violation| self.found.contains(&violation));
        if !self.watched || enough {
            return;
        }
        let choices = self.choices();
        self.free_most = self.free_most.max(choices.len());
        assert!(choices.len() <= FREE_MAX, "{} sectors can go either way", choices.len());
        let mut disk = self.durable.clone();
        let mut digits = vec![0usize; choices.len()];
        loop {
            self.judge(&disk, &digits);
            if self.enough.is_some_and(|violation| self.found.contains(&violation)) {
                return;
            }
            // The next combination: count up, and write the sectors that changed.
            let mut nth = 0;
            loop {
                let Some(choice) = choices.get(nth) else { return };
                digits[nth] = (digits[nth] + 1) % choice.values.len();
                disk.land(choice.at as u64, &choice.values[digits[nth]]);
                if digits[nth] > 0 {
                    break;
                }
                nth += 1;
            }
        }
    }

    fn judge(&mut self, disk: &Disk, digits: &[usize]) {
        self.images += 1;
        let honest = self.lie.is_none() && !self.eager && !self.pending.iter().any(|w| w.lied);
        for violation in self.violations(disk, honest) {
            assert!(!honest, "{violation:?} with sectors {digits:?} of {} writes", self.pending.len());
            self.found.insert(violation);
        }
        if let Some(kept) = &mut self.kept {
            kept.push(disk.image.clone());
        }
    }

    /// Newest batch that is there whole, with all before it.
    fn arrived(&self, disk: &Disk) -> Seq {
        let batches = self.pending.iter().filter(|w| !w.seal);
        let torn = batches.filter(|w| disk.image[w.offset..][..w.bytes.len()] != w.bytes).map(|w| w.seq);
        torn.min().map_or(self.taken, |first| first - 1)
    }

    fn violations(&self, disk: &Disk, live_on: bool) -> Vec<Violation> {
        let Ok((log, report)) = disk.recover(self.geometry, self.limits) else { return vec![Violation::Stuck] };
        let (arrived, last) = (self.arrived(disk), log.durable_seq());
        let mut found = Vec::new();
        if last < arrived || last < self.promised {
            found.push(Violation::Lost);
        }
        if last > arrived {
            found.push(Violation::Back);
        }
        if !report.rot.is_empty() || !report.suspects.is_empty() {
            found.push(Violation::Rot);
        }
        let expected = self.states.iter().rev().find(|(seq, _)| *seq <= last).map(|(_, state)| state);
        if expected != Some(&state(&log, disk)) {
            found.push(Violation::Meaning);
        }
        if live_on && !self.lives_on(disk, log) {
            found.push(Violation::Stuck);
        }
        found
    }

    /// One more entry for everybody, if there is room, and another recovery.
    fn lives_on(&self, disk: &Disk, mut log: Log) -> bool {
        if !log.has_room(0, 0) {
            return true; // its owner would free some first
        }
        let mut disk = disk.clone();
        for id in log.copysets() {
            let next = log.index(id).unwrap().last_index() + 1;
            log.append(id, vec![entry(next, 9, 0, 1)], None);
        }
        disk.drain(&mut log);
        let Ok((again, report)) = disk.recover(self.geometry, self.limits) else { return false };
        report.rot.is_empty()
            && report.suspects.is_empty()
            && again.durable_seq() == log.durable_seq()
            && state(&again, &disk) == state(&log, &disk)
    }
}

/// Whether the bytes of a write are a seal; and whether the first record of a batch is a checkpoint.
pub fn is_seal(bytes: &[u8]) -> bool {
    bytes[14] & 1 == 1
}

pub fn is_checkpoint(bytes: &[u8]) -> bool {
    !is_seal(bytes) && bytes[128] == 3
}

/// An entry of whose payload only some sectors of each block are not `fill`.
pub fn thin(index: u64, term: u64, blocks: usize, sectors: &[usize], fill: u8) -> Entry {
    let mut payload = vec![fill; blocks * BLOCK];
    for (n, sector) in payload.chunks_mut(SECTOR).enumerate() {
        if sectors.contains(&(n % (BLOCK / SECTOR))) {
            for word in sector.as_chunks_mut::<8>().0 {
                *word = (index << 32 | term << 16 | n as u64 | 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
            }
        }
    }
    let crcs = payload.as_chunks::<BLOCK>().0.iter().flat_map(|b| crc32c::crc32c(b).to_le_bytes());
    let context: Vec<u8> = crcs.chain(index.to_le_bytes()).collect();
    Entry { index, term, kind: raftlog::EntryKind::Normal, context: context.into(), payload: payload.into() }
}
