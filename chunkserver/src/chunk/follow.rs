//! Admission where the leader has decided already: of what the log holds, only slots are to be promised (rules 13, 14).
//!
//! A replica that does not lead keeps the proposed views from the tail of its own log: what it may have to apply. So a
//! replica that becomes leader judges new operations by a view that has the unapplied tail in it.

use super::admit::Change;
use super::store::Store;
use raftlog::CopysetId;
use smallvec::SmallVec;

impl Store {
    /// How many chunks a run of entries will create, when all that is admitted so far comes before it.
    pub fn slots_needed(&self, copyset: CopysetId, run: impl Iterator<Item = (u64, Change)>) -> usize {
        let mut seen: SmallVec<[(u64, bool); 8]> = SmallVec::new();
        let mut needed = 0;
        for (chunk, change) in run {
            let at = seen.iter().position(|s| s.0 == chunk).unwrap_or_else(|| {
                seen.push((chunk, self.will_exist(copyset, chunk)));
                seen.len() - 1
            });
            let Some((_, exists)) = seen.get_mut(at) else { continue };
            match change {
                Change::Write(_) => needed += usize::from(!std::mem::replace(exists, true)),
                Change::Delete => *exists = false,
                Change::Nothing => {}
            }
        }
        needed
    }

    /// Promise slots for entries that are about to be logged; false, and none is promised, when there are not so many.
    pub fn promise(&mut self, count: usize) -> bool {
        for had in 0..count {
            if self.slots.reserve().is_err() {
                self.slots.unreserve(had);
                return false;
            }
        }
        true
    }

    /// Take back promises that [`Store::promise`] made.
    pub fn unpromise(&mut self, count: usize) {
        self.slots.unreserve(count);
    }

    /// Slots promised to operations in flight.
    #[must_use]
    pub fn promised_slots(&self) -> usize {
        self.slots.promised()
    }

    /// Admit an entry that is in the log, behind all that was admitted of its copyset before. False: it needs a slot
    /// and there is none.
    pub fn follow(&mut self, copyset: CopysetId, chunk: u64, change: Change) -> bool {
        let applied = self.applied_view(copyset, chunk);
        self.admission.follow((copyset, chunk), change, applied, &mut self.slots)
    }

    fn will_exist(&self, copyset: CopysetId, chunk: u64) -> bool {
        let proposed = self.admission.view((copyset, chunk));
        proposed.unwrap_or_else(|| self.applied_view(copyset, chunk)).exists
    }
}
