//! Chunks on their way from another replica (rule 20): what there is, and taking it in.
//!
//! Two replicas whose chunk has the same creation index and the same index of its last change hold the same bytes: both
//! got there by the same committed entries. That is the only reason to skip a chunk. So a chunk that is being taken in
//! says index 0 until it is complete, and replaying an older entry over a newer chunk takes its index back; after a crash
//! at any point an incomplete chunk is never mistaken for a complete one. What the log must pass before it is whole
//! (`whole_at` in its metapage) outlasts both, for there may be nobody left to ask for it again.

use super::store::Store;
use bytes::Bytes;
use raftlog::{BLOCK, CopysetId};

use super::overlay::Dirty;

/// What one replica tells another of a chunk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChunkInfo {
    /// Chunk.
    pub chunk: u64,
    /// Log index that created it.
    pub created: u64,
    /// Log index of its last change.
    pub applied: u64,
    /// Version.
    pub sn: u64,
    /// Version up to which chunk snapshots are finished.
    pub corrected_sn: u64,
}

impl Store {
    /// Chunks of a copyset from number `from` on, in ascending order, at most `max`.
    #[must_use]
    pub fn list(&self, copyset: CopysetId, from: u64, max: usize) -> Vec<ChunkInfo> {
        let own = self.index.keys().filter(|key| key.0 == copyset && key.1 >= from);
        let mut chunks: Vec<u64> = own.map(|key| key.1).collect();
        chunks.sort_unstable();
        chunks.truncate(max);
        chunks.into_iter().filter_map(|chunk| self.chunk_info(copyset, chunk)).collect()
    }

    /// One chunk; `None` if absent.
    #[must_use]
    pub fn chunk_info(&self, copyset: CopysetId, chunk: u64) -> Option<ChunkInfo> {
        let (_, found) = self.find(copyset, chunk)?;
        let meta = &found.meta;
        let (created, applied, corrected_sn) = (meta.created_index, meta.applied_index, meta.corrected_sn);
        Some(ChunkInfo { chunk, created, applied, sn: meta.sn, corrected_sn })
    }

    /// Whether a chunk must be taken in to be what another replica says of its own: it differs, or nothing of it can be
    /// trusted here.
    #[must_use]
    pub fn lacks(&self, copyset: CopysetId, info: &ChunkInfo) -> bool {
        self.doubtful(copyset, info.chunk) || self.chunk_info(copyset, info.chunk) != Some(*info)
    }

    /// Begin to take a chunk in: what is here of another life of it goes, of the same life it is overwritten. False: there
    /// is no slot.
    pub fn install_begin(&mut self, copyset: CopysetId, info: &ChunkInfo) -> bool {
        let (chunk, created) = (info.chunk, info.created);
        let here = self.find(copyset, chunk).map(|(slot, found)| (slot, found.meta.created_index == created));
        if let Some((slot, false)) = here {
            self.bury(slot, None);
        }
        let slot = match here {
            Some((slot, true)) => slot,
            _ => match self.create(copyset, created, chunk) {
                Ok(slot) => slot,
                Err(_) => return false,
            },
        };
        if let Some(found) = self.chunks.get_mut(&slot) {
            found.meta.applied_index = if found.suspect { super::mend::DOUBT } else { 0 };
        }
        self.dirty.insert(slot);
        self.install_seen(copyset, info);
        true
    }

    /// A piece comes of a chunk that was begun, and this is what the chunk was when it was sent.
    pub fn install_seen(&mut self, copyset: CopysetId, info: &ChunkInfo) {
        let slot = self.find(copyset, info.chunk).map(|(slot, _)| slot);
        if let Some(found) = slot.and_then(|slot| self.chunks.get_mut(&slot)) {
            found.meta.whole_at = found.meta.whole_at.max(info.applied);
        }
    }

    /// Blocks of a chunk that was begun. `index`: anything that rises from one installation to the next.
    pub fn install_data(
        &mut self,
        copyset: CopysetId,
        chunk: u64,
        index: u64,
        offset: u32,
        (payload, crcs): (Bytes, &[u32]),
        now: u64,
    ) {
        let Some(slot) = self.find(copyset, chunk).map(|(slot, _)| slot) else { return };
        let Some(found) = self.chunks.get_mut(&slot) else { return };
        let mut at = self.pins.hold(payload);
        for (block, &crc) in (offset / BLOCK as u32..).zip(crcs) {
            found.overlay.put(&mut self.pins, block, Dirty { at, crc, index, oldest: index, captured: false });
            at = at.next();
        }
        self.dirty.insert(slot);
        self.dirty_since.get_or_insert(now);
    }

    /// Blocks of it that hold nothing.
    pub fn install_hole(&mut self, copyset: CopysetId, chunk: u64, offset: u32, len: u32) {
        let Some(slot) = self.find(copyset, chunk).map(|(slot, _)| slot) else { return };
        let Some(found) = self.chunks.get_mut(&slot) else { return };
        let range = offset / BLOCK as u32..(offset + len) / BLOCK as u32;
        found.overlay.drop_range(&mut self.pins, range.clone());
        range.for_each(|block| found.meta.written.clear(block));
        self.dirty.insert(slot);
    }

    /// All of a chunk is here.
    pub fn install_end(&mut self, copyset: CopysetId, info: &ChunkInfo, now: u64) {
        let Some(slot) = self.find(copyset, info.chunk).map(|(slot, _)| slot) else { return };
        let Some(found) = self.chunks.get_mut(&slot) else { return };
        (found.meta.applied_index, found.suspect) = (info.applied, false);
        if found.meta.whole_at <= info.applied {
            found.meta.whole_at = 0;
        }
        (found.meta.sn, found.meta.corrected_sn) = (info.sn, info.corrected_sn);
        self.doubts.remove(&(copyset, info.chunk));
        self.dirty.insert(slot);
        self.dirty_since.get_or_insert(now);
    }

    /// The other replica has no such chunk.
    pub fn install_drop(&mut self, copyset: CopysetId, chunk: u64, now: u64) {
        if let Some(slot) = self.find(copyset, chunk).map(|(slot, _)| slot) {
            self.bury(slot, None);
            self.dirty_since.get_or_insert(now);
        }
    }
}
