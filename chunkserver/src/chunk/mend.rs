//! Making good what rotted, with what another replica has (rule 22).
//!
//! A block is taken over if it has the checksum that the own table wants: then it is what was here, whoever sends it.
//! Where the table itself or the metapage is lost nothing can be compared; such a chunk is *in doubt* and is taken in as
//! a whole, at a point of the log at least as new as the own. Doubt is kept on the disk ([`DOUBT`]): neither a restart
//! nor an entry that is applied makes such a chunk look whole.

use super::apply::GraveStage;
use super::overlay::Dirty;
use super::store::Store;
use bytes::Bytes;
use raftlog::{BLOCK, CopysetId};

/// The applied index of a chunk in doubt, in memory and in its metapage: no log ever gets there.
pub(super) const DOUBT: u64 = u64::MAX;

impl Store {
    /// Chunks of a copyset that are in doubt.
    #[must_use]
    pub fn doubts(&self, copyset: CopysetId) -> Vec<u64> {
        self.doubts.range((copyset, 0)..=(copyset, u64::MAX)).map(|key| key.1).collect()
    }

    /// Nothing of this chunk can be trusted from now on; it is created at `index` if it is not there. False: there is no
    /// slot for it.
    pub fn doubt(&mut self, copyset: CopysetId, index: u64, chunk: u64, now: u64) -> bool {
        let slot = match self.find(copyset, chunk) {
            Some((slot, _)) => slot,
            None => match self.create(copyset, index, chunk) {
                Ok(slot) => slot,
                Err(_) => return false,
            },
        };
        if let Some(found) = self.chunks.get_mut(&slot) {
            (found.suspect, found.meta.applied_index) = (true, DOUBT);
            self.doubts.insert((copyset, chunk));
        }
        self.dirty.insert(slot);
        self.dirty_since.get_or_insert(now);
        true
    }

    /// With the log applied up to `applied` it is a mixture of two states: see [`ChunkMeta::whole_at`](super::ChunkMeta).
    #[must_use]
    pub fn is_mixed(&self, copyset: CopysetId, chunk: u64, applied: u64) -> bool {
        self.find(copyset, chunk).is_some_and(|(_, found)| found.meta.whole_at > applied)
    }

    /// Another replica has no such chunk as of `index`, which is not below what is applied here: a chunk in doubt is gone,
    /// and what entries up to there do to it is over.
    pub fn doubt_gone(&mut self, copyset: CopysetId, index: u64, chunk: u64, now: u64) {
        let found = self.find(copyset, chunk).filter(|(_, chunk)| chunk.suspect);
        let Some(slot) = found.map(|(slot, _)| slot) else { return };
        self.bury(slot, Some(index));
        self.gone.insert((copyset, chunk), index);
        self.dirty_since.get_or_insert(now);
    }

    /// The log of `copyset` ends at `last` and goes on from there with a history of its own: what another replica sent of
    /// the former one must not hide what comes now under the same indexes. A chunk that is whole is as of `last` then,
    /// and what is in the log's tail is in it; one that is not, and will not be, is in doubt. All this counts when a
    /// round has written it. Gives the chunks that are in doubt now.
    pub fn ends_at(&mut self, copyset: CopysetId, last: u64, now: u64) -> Vec<u64> {
        let mut half = Vec::new();
        // A new leader's own entry has this index, so no entry of a chunk has.
        let beyond = last + 1;
        for (&slot, chunk) in self.chunks.iter_mut().filter(|(_, chunk)| chunk.meta.copyset == copyset) {
            let meta = &mut chunk.meta;
            let before = (meta.created_index, meta.applied_index, meta.whole_at);
            if !chunk.suspect && (meta.applied_index == 0 || meta.whole_at > last) {
                half.push(meta.chunk);
            } else if !chunk.suspect && meta.applied_index > last {
                (meta.created_index, meta.applied_index) = (beyond, beyond);
            }
            meta.created_index = meta.created_index.min(beyond);
            meta.whole_at = if meta.whole_at > last { 0 } else { meta.whole_at };
            if before != (meta.created_index, meta.applied_index, meta.whole_at) {
                chunk.single = true; // the other page says what hides new entries
                self.dirty.insert(slot);
                self.dirty_since.get_or_insert(now);
            }
        }
        half.sort_unstable();
        for &chunk in &half {
            self.doubt(copyset, 0, chunk, now);
        }
        for (_, deleted) in self.gone.iter_mut().filter(|(key, _)| key.0 == copyset) {
            *deleted = last.min(*deleted);
        }
        for grave in self.graves.iter_mut().filter(|g| g.tomb.copyset == copyset && g.tomb.deleted_index > last) {
            self.open_graves += usize::from(grave.stage != GraveStage::Open);
            (grave.tomb.deleted_index, grave.stage) = (last, GraveStage::Open);
            self.dirty_since.get_or_insert(now);
        }
        half
    }

    /// Take over those blocks of another replica's piece that are what the own table wants; how many those are. A block
    /// that is in memory, or that holds nothing here, needs none.
    pub fn mend(
        &mut self,
        copyset: CopysetId,
        chunk: u64,
        offset: u32,
        payload: Bytes,
        crcs: &[u32],
        now: u64,
    ) -> usize {
        let Some(slot) = self.find(copyset, chunk).filter(|(_, c)| !c.suspect).map(|(slot, _)| slot) else { return 0 };
        let Some(found) = self.chunks.get_mut(&slot) else { return 0 };
        if payload.is_empty() || payload.len() != crcs.len() * BLOCK {
            return 0;
        }
        let (index, mut at, mut mended) = (found.meta.applied_index, self.pins.hold(payload), 0);
        for (block, &crc) in (offset / BLOCK as u32..).zip(crcs) {
            let wanted = found.crcs.get(block as usize) == Some(&crc) && found.meta.written.get(block);
            if wanted && found.overlay.get(block).is_none() {
                found.overlay.put(&mut self.pins, block, Dirty { at, crc, index, oldest: index, captured: false });
                mended += 1;
            } else {
                self.pins.release(at);
            }
            at = at.next();
        }
        if mended > 0 {
            self.dirty.insert(slot);
            self.dirty_since.get_or_insert(now);
        }
        mended
    }
}
