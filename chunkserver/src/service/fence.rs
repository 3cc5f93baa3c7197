//! Volume fences: the epoch a write must carry, per volume (`UpdateEpoch`, rule 26's memory half).
//!
//! Invariant: an update that was answered is seen by every check that starts later, on any shard; epochs never go back.
//! A check takes no lock: each shard keeps the map it saw last and takes the new one when the generation moved.

use crate::limits::FENCES_MAX;
use rustc_hash::FxHashMap;
use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

type Map = FxHashMap<u64, u64>;

/// The fences of a server.
#[derive(Debug, Default)]
pub struct Fences {
    map: Mutex<Arc<Map>>,
    /// Raised after `map` changed, while it is locked.
    generation: AtomicU64,
}

/// How an update ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Update {
    Done,
    /// A higher epoch is known.
    TooOld,
    /// Too many volumes.
    Full,
}

impl Fences {
    fn lock(&self) -> MutexGuard<'_, Arc<Map>> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Set a volume's epoch, unless a higher one is known.
    pub(super) fn update(&self, file: u64, epoch: u64) -> Update {
        let mut map = self.lock();
        match map.get(&file) {
            Some(&known) if known > epoch => return Update::TooOld,
            Some(&known) if known == epoch => return Update::Done,
            None if map.len() >= FENCES_MAX => return Update::Full,
            _ => {}
        }
        Arc::make_mut(&mut map).insert(file, epoch);
        self.generation.fetch_add(1, Ordering::Release);
        Update::Done
    }

    /// All that are known.
    #[must_use]
    pub fn known(&self) -> Vec<(u64, u64)> {
        self.lock().iter().map(|(&file, &epoch)| (file, epoch)).collect()
    }

    /// Take over many, each unless a higher one is known (the `epochMap` of a registration).
    pub fn learn(&self, epochs: impl IntoIterator<Item = (u64, u64)>) {
        let mut map = self.lock();
        let known = Arc::make_mut(&mut map);
        for (file, epoch) in epochs {
            let slot = known.entry(file).or_default();
            *slot = epoch.max(*slot);
        }
        self.generation.fetch_add(1, Ordering::Release);
    }
}

/// What one shard saw last.
#[derive(Debug, Default)]
pub(super) struct View {
    seen: RefCell<(u64, Arc<Map>)>,
}

impl View {
    /// An unknown volume passes; a known one only with exactly its epoch.
    pub(super) fn passes(&self, fences: &Fences, file: u64, epoch: u64) -> bool {
        let generation = fences.generation.load(Ordering::Acquire);
        let mut seen = self.seen.borrow_mut();
        if seen.0 != generation {
            *seen = (generation, Arc::clone(&fences.lock()));
        }
        seen.1.get(&file).is_none_or(|&known| known == epoch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_equality_passes_and_epochs_never_go_back() {
        let (fences, view) = (Fences::default(), View::default());
        assert!(view.passes(&fences, 42, 9), "an unknown volume passes");
        assert_eq!(fences.update(42, 5), Update::Done);
        assert_eq!(fences.update(42, 5), Update::Done);
        assert_eq!(fences.update(42, 4), Update::TooOld);
        for (epoch, passes) in [(4, false), (5, true), (6, false)] {
            assert_eq!(view.passes(&fences, 42, epoch), passes, "{epoch}");
        }
        fences.learn([(42, 3), (43, 1)]);
        assert!(view.passes(&fences, 42, 5) && view.passes(&fences, 43, 1) && !view.passes(&fences, 43, 2));
    }
}
