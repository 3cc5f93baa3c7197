//! A disk of 512-byte sectors: what is durable, and the writes that are not.

use std::collections::BTreeMap;
use std::rc::Rc;

pub(super) const SECTOR: usize = 512;

type Sector = Rc<[u8; SECTOR]>;

/// Sectors that are not zero, by offset.
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Image(BTreeMap<u64, Sector>);

impl Image {
    fn put(&mut self, at: u64, sector: &Sector) {
        if sector.iter().all(|b| *b == 0) {
            self.0.remove(&at);
        } else {
            self.0.insert(at, Rc::clone(sector));
        }
    }

    fn get(&self, at: u64) -> Sector {
        self.0.get(&at).cloned().unwrap_or_else(|| Rc::new([0; SECTOR]))
    }

    pub(super) fn read(&self, offset: u64, out: &mut [u8]) {
        out.fill(0);
        for (at, sector) in self.0.range(offset..offset + out.len() as u64) {
            let from = (at - offset) as usize;
            out[from..from + SECTOR].copy_from_slice(&**sector);
        }
    }
}

/// Not durable yet.
struct Write {
    number: u64,
    completed: bool,
    sectors: Vec<(u64, Sector)>,
}

/// A sector and all it may hold.
pub(super) struct Choice {
    at: u64,
    values: Vec<Sector>,
}

#[derive(Default)]
pub(super) struct Medium {
    pub(super) durable: Image,
    pending: Vec<Write>,
}

impl Medium {
    pub(super) fn of(durable: Image) -> Self {
        Self { durable, pending: Vec::new() }
    }

    pub(super) fn submit(&mut self, number: u64, offset: u64, data: &[u8]) {
        let sector = |(n, bytes): (usize, &[u8])| (offset + (n * SECTOR) as u64, Rc::new(bytes.try_into().unwrap()));
        let sectors = data.chunks(SECTOR).enumerate().map(sector).collect();
        self.pending.push(Write { number, completed: false, sectors });
    }

    /// A write ended; durable by itself only if it is dsync.
    pub(super) fn complete(&mut self, number: u64, durable: bool) {
        for write in self.pending.iter_mut().filter(|w| w.number == number) {
            write.completed = true;
        }
        if durable {
            self.harden(&[number]);
        }
    }

    /// The writes a sync that starts now will cover.
    pub(super) fn completed(&self) -> Vec<u64> {
        self.pending.iter().filter(|w| w.completed).map(|w| w.number).collect()
    }

    pub(super) fn harden(&mut self, numbers: &[u64]) {
        let (done, rest) = std::mem::take(&mut self.pending).into_iter().partition(|w| numbers.contains(&w.number));
        self.pending = rest;
        let done: Vec<Write> = done;
        done.iter().flat_map(|w| &w.sectors).for_each(|(at, sector)| self.durable.put(*at, sector));
    }

    /// What a process reads: the drive's cache.
    pub(super) fn read(&self, offset: u64, out: &mut [u8]) {
        self.durable.read(offset, out);
        let inside = offset..offset + out.len() as u64;
        for (at, sector) in self.pending.iter().flat_map(|w| &w.sectors).filter(|(at, _)| inside.contains(at)) {
            let from = (at - offset) as usize;
            out[from..from + SECTOR].copy_from_slice(&**sector);
        }
    }

    /// The process is gone; what it wrote is in the drive's cache.
    pub(super) fn killed(&mut self) {
        self.pending.iter_mut().for_each(|w| w.completed = true);
    }

    pub(super) fn choices(&self) -> Vec<Choice> {
        let mut found: BTreeMap<u64, Vec<Sector>> = BTreeMap::new();
        for (at, sector) in self.pending.iter().flat_map(|w| &w.sectors) {
            let values = found.entry(*at).or_insert_with(|| vec![self.durable.get(*at)]);
            if !values.contains(sector) {
                values.push(Rc::clone(sector));
            }
        }
        let free = found.into_iter().filter(|(_, values)| values.len() > 1);
        free.map(|(at, values)| Choice { at, values }).collect()
    }

    /// Every image a power cut may leave now.
    pub(super) fn each_image(&self, choices: &[Choice], mut look: impl FnMut(&Image, &[usize])) {
        let (mut image, mut digits) = (self.durable.clone(), vec![0usize; choices.len()]);
        loop {
            look(&image, &digits);
            // Count up, and write the sectors that changed.
            let mut nth = 0;
            loop {
                let Some(choice) = choices.get(nth) else { return };
                digits[nth] = (digits[nth] + 1) % choice.values.len();
                image.put(choice.at, &choice.values[digits[nth]]);
                if digits[nth] > 0 {
                    break;
                }
                nth += 1;
            }
        }
    }
}
