//! The log of a shard while it runs: records in, writes out, durability back.
//!
//! Promises: what is appended is readable from the [`Index`] at once and durable when [`Log::durable_seq`] reaches
//! the number it was given; numbers become durable in order; nothing is overwritten before what supersedes it
//! is durable. The owner writes what [`Log::take_write`] hands out with one vectored dsync write, and stops
//! serving the disk when one fails.

use crate::batch::{Batch, Need, Queue, header_len};
use crate::index::{Place as SlotPlace, Slot};
use crate::record::{HEADER_MAX, Head, LAG_MAX, RECORD_LEN, checkpoint_len, encode_header};
use crate::segment::{Place, Segments};
use crate::{BLOCK, Checkpoint, CopysetId, Entry, Geometry, HardState, Index, Limits, Seq};
use bytes::Bytes;
use rustc_hash::FxHashMap;
use std::collections::{VecDeque, hash_map};

/// Room for the part of an entry's context that is not block CRCs, when sizing the largest payload.
const CONTEXT_ROOM: usize = 2048;

/// Names a write in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WriteId(pub u64);

/// A write to be made: the header that was just filled, then `payloads`, at `offset` of the log zone.
#[derive(Debug)]
pub struct PendingWrite {
    /// To be given back to [`Log::write_done`].
    pub id: WriteId,
    /// The batch in it; for a segment's own seal, the batch before it.
    pub seq: Seq,
    /// Records in it; a batch without any counts as one.
    pub records: u64,
    /// Offset in the log zone.
    pub offset: u64,
    /// Payload buffers, whole blocks each.
    pub payloads: Vec<Bytes>,
}

#[derive(Debug)]
struct Flight {
    id: WriteId,
    batch: Batch,
    /// Offset of the payload in the zone.
    base: u64,
    live_seq: Seq,
    seal: bool,
    alone: bool,
    done: bool,
}

/// What recovery knows about the end of the log.
pub(crate) struct Tail {
    pub(crate) last_seq: Seq,
    pub(crate) prev_crc: u32,
    pub(crate) live_seq: Seq,
    /// Newest `durable_seq` on disk, and the newest batch with records.
    pub(crate) covered: Seq,
    pub(crate) last_records: Seq,
}

/// The write-ahead log of a shard.
#[derive(Debug)]
pub struct Log {
    geometry: Geometry,
    limits: Limits,
    queue: Queue,
    segments: Segments,
    indexes: FxHashMap<CopysetId, Index>,
    /// Purged copysets: (batch of the Purge, oldest batch needed until it is durable).
    dying: Vec<(Seq, Seq)>,
    flights: VecDeque<Flight>,
    plan: Option<(Place, usize)>,
    next_write: u64,
    /// Number and header CRC of the last batch taken.
    taken: Seq,
    prev_crc: u32,
    durable: Seq,
    /// Newest durable `live_seq`.
    advertised: Seq,
    /// Newest `durable_seq` in a header that was taken, and the newest batch taken that has records.
    covered: Seq,
    last_records: Seq,
    max_entry_bytes: usize,
}

/// Largest payload that fits a batch of `room` bytes, with its hard state.
fn max_entry_bytes(room: u64) -> usize {
    let header = |blocks: usize| header_len(2 * RECORD_LEN + CONTEXT_ROOM + 4 * blocks);
    let fits = |n: &usize| header(*n) <= HEADER_MAX && (header(*n) + n * BLOCK) as u64 <= room;
    let most = (room / BLOCK as u64).min((HEADER_MAX / 4) as u64) as usize;
    (0..most).rev().find(fits).unwrap_or(0) * BLOCK
}

impl Log {
    pub(crate) fn new(
        geometry: Geometry,
        limits: Limits,
        segments: Segments,
        tail: &Tail,
        indexes: FxHashMap<CopysetId, Index>,
    ) -> Self {
        assert!((1..=LAG_MAX as usize / 2).contains(&limits.writes_in_flight), "writes in flight: 1 to 32");
        let hard_max = Segments::batch_max(&geometry);
        Self {
            geometry,
            limits,
            queue: Queue::new(tail.last_seq + 1, limits.batch_bytes_max, hard_max),
            segments,
            indexes,
            dying: Vec::new(),
            flights: VecDeque::new(),
            plan: None,
            next_write: 1,
            taken: tail.last_seq,
            prev_crc: tail.prev_crc,
            durable: tail.last_seq,
            advertised: tail.live_seq,
            covered: tail.covered,
            last_records: tail.last_records,
            max_entry_bytes: max_entry_bytes(hard_max),
        }
    }

    /// Every copyset in the log, sorted.
    #[must_use]
    pub fn copysets(&self) -> Vec<CopysetId> {
        let mut ids: Vec<_> = self.indexes.keys().copied().collect();
        ids.sort_unstable();
        ids
    }

    /// What the log says about a copyset.
    #[must_use]
    pub fn index(&self, id: CopysetId) -> Option<&Index> {
        self.indexes.get(&id)
    }

    /// Queues entries, which replace any tail from the first one on, and the hard state of the same `Ready`. They
    /// share a batch; more than a batch can hold is split, and no part carries a commit beyond its own entries.
    /// A change of commit alone needs no call: it comes with the next one.
    ///
    /// # Panics
    /// If the copyset has no checkpoint, entries are not consecutive or leave a gap, or one fits no segment.
    pub fn append(&mut self, id: CopysetId, entries: Vec<Entry>, hs: Option<HardState>) -> Seq {
        let durable = self.durable;
        let Some(index) = self.indexes.get_mut(&id) else { panic!("append to a copyset without a checkpoint") };
        let life = index.checkpoint().incarnation;
        if let Some(first) = entries.first() {
            assert!((index.first_index()..=index.last_index() + 1).contains(&first.index), "entries leave no gap");
            index.truncate(first.index);
        }
        let tail = Need::record(hs.map_or(0, |_| RECORD_LEN));
        let all = entries.iter().fold(tail, |sum, e| sum.and(Need::entry(e)));
        if all.records > 0 && self.queue.fits_one(all) {
            self.queue.open_for(all);
        }
        for (nth, entry) in entries.into_iter().enumerate() {
            let need = Need::entry(&entry).and(tail);
            if let (true, Some(hs)) = (nth > 0 && !self.queue.has_room(need), hs) {
                let commit = hs.commit.min(index.last_index()).max(index.hard_state().commit);
                self.queue.open_batch().encoder(id, life).hard_state(&HardState { commit, ..hs });
            }
            self.queue.open_for(need);
            push_entry(index, self.queue.open_batch(), id, entry);
        }
        if let Some(hs) = hs {
            self.queue.open_for(tail);
            self.queue.open_batch().encoder(id, life).hard_state(&hs);
            index.set_hard_state(hs, self.queue.last_seq(), durable);
        }
        index.note_keep(self.queue.last_seq(), durable);
        self.queue.last_seq()
    }

    /// Queues a checkpoint and forgets the entries it covers. The first one creates the copyset; one of another
    /// incarnation ends the former life. Its hard state is raised to the newest known.
    pub fn checkpoint(&mut self, id: CopysetId, cp: Checkpoint) -> Seq {
        self.put_checkpoint(id, cp, None)
    }

    /// Queues the whole tail again with the checkpoint behind it; with the last of them durable, nothing earlier
    /// of this copyset is needed (rule 8). One batch if it fits one; else the entries wait, staged, for the
    /// checkpoint that swaps them in.
    ///
    /// # Panics
    /// If the copyset is unknown or a payload is neither resident nor was restored ([`Index::not_resident`]).
    pub fn relog(&mut self, id: CopysetId) -> Seq {
        let Some(index) = self.indexes.get(&id) else { panic!("relog of an unknown copyset") };
        self.put_again(id, index.checkpoint().clone())
    }

    /// A checkpoint of the same life from which everything begins: the tail behind it ends at `last`, and its hard state
    /// counts as it is, though its commit be lower than what was said before. With it durable nothing earlier of this
    /// copyset is needed, nor missed if it is lost.
    ///
    /// # Panics
    /// As [`Self::relog`], or if the checkpoint is older than the newest one or `last` below it.
    pub fn renew(&mut self, id: CopysetId, cp: Checkpoint, last: u64) -> Seq {
        let Some(index) = self.indexes.get_mut(&id) else { panic!("renewal of an unknown copyset") };
        assert!(cp.applied_index <= last && cp.hard_state.commit <= last, "a tail begins behind its checkpoint");
        index.truncate(last + 1);
        index.set_hard_state(cp.hard_state, self.queue.last_seq(), self.durable);
        self.put_again(id, cp)
    }

    fn put_again(&mut self, id: CopysetId, cp: Checkpoint) -> Seq {
        let Some(index) = self.indexes.get_mut(&id) else { panic!("relog of an unknown copyset") };
        let checkpoint = Need::record(checkpoint_len(&cp));
        let entries = index.entries(cp.applied_index + 1, u64::MAX, usize::MAX);
        let all = entries.iter().fold(checkpoint, |sum, e| sum.and(Need::entry(e)));
        if self.queue.fits_one(all) {
            self.queue.open_for(all);
        }
        let mut prev_term = cp.applied_term;
        for entry in &entries {
            self.queue.open_for(Need::entry(entry));
            let (seq, batch) = (self.queue.last_seq(), self.queue.open_batch());
            let at = batch.push_entry(id, cp.incarnation, entry, prev_term, true);
            prev_term = entry.term;
            if let Some(slot) = index.slot_mut(entry.index) {
                assert_eq!(entry.payload.len(), slot.payload_len as usize, "a re-logged payload is in memory");
                (slot.seq, slot.place) = (seq, SlotPlace::Queued(at));
            }
        }
        let last = index.last_index();
        self.put_checkpoint(id, cp, Some(last))
    }

    fn put_checkpoint(&mut self, id: CopysetId, cp: Checkpoint, swap: Option<u64>) -> Seq {
        self.queue.open_for(Need::record(checkpoint_len(&cp)));
        let (seq, durable) = (self.queue.last_seq(), self.durable);
        // A new life starts with an empty tail, and says so: everything about it is behind this record.
        let begins = self.indexes.get(&id).is_none_or(|known| known.checkpoint().incarnation != cp.incarnation);
        let swap = if begins { Some(cp.applied_index) } else { swap };
        let index = match self.indexes.entry(id) {
            hash_map::Entry::Occupied(known) => {
                let index = known.into_mut();
                index.set_checkpoint(cp, seq, durable);
                index
            }
            hash_map::Entry::Vacant(free) => free.insert(Index::new(cp, seq)),
        };
        let cp = index.checkpoint();
        self.queue.open_batch().encoder(id, cp.incarnation).checkpoint(cp, swap);
        seq
    }

    /// Queues the end of a copyset. The record needs no keeping: segments are freed and reused oldest first, so
    /// everything it ends is overwritten before it is.
    pub fn purge(&mut self, id: CopysetId) -> Seq {
        let Some(index) = self.indexes.remove(&id) else { return self.queue.last_seq() };
        self.queue.open_for(Need::record(RECORD_LEN));
        self.queue.open_batch().encoder(id, index.checkpoint().incarnation).purge();
        let seq = self.queue.last_seq();
        self.dying.push((seq, index.keep(self.durable)));
        seq
    }

    /// For an idle log: queues a batch without records whose header says that all before it is durable, so that a
    /// bad batch there is known as rot. `None` when that is said already or while something is under way.
    pub fn seal(&mut self) -> Option<Seq> {
        let busy = !self.queue.is_empty() || !self.flights.is_empty() || self.plan.is_some();
        if busy || self.covered >= self.last_records {
            return None;
        }
        self.queue.open();
        Some(self.queue.last_seq())
    }

    /// Length of the header of the next write, whole blocks; `None` if nothing may be written now. The answer
    /// stands until [`Self::take_write`].
    pub fn next_header(&mut self) -> Option<usize> {
        if let Some((_, len)) = self.plan {
            return Some(len);
        }
        if self.flights.len() >= self.limits.writes_in_flight || self.flights.iter().any(|f| f.alone) {
            return None;
        }
        let front = self.queue.front()?;
        let place = self.segments.place(front.len(), self.flights.is_empty(), self.advertised)?;
        let len = if place.seals() {
            BLOCK
        } else {
            let len = front.header_len();
            self.queue.close_front();
            len
        };
        self.plan = Some((place, len));
        Some(len)
    }

    /// Fills `header`, which has the length [`Self::next_header`] told, and hands out the write.
    ///
    /// # Panics
    /// Without a `next_header` that said `Some`, or with a buffer of another length.
    pub fn take_write(&mut self, header: &mut [u8]) -> PendingWrite {
        let Some((place, _)) = self.plan.take() else { panic!("take_write follows next_header") };
        let seal = place.seals();
        let mut batch = match seal {
            true => Batch::empty(self.taken),
            false => self.queue.pop().unwrap_or_default(),
        };
        let rotate = matches!(place, Place::Rotate | Place::RotateSeal);
        if rotate {
            self.segments.rotate(self.taken + 1);
        }
        let alone = place != Place::Append;
        // Recovery skips what a segment's first header calls dead, so that one says nothing new.
        let live_seq = if rotate { self.advertised } else { self.segments.live_seq(batch.seq) };
        let offset = self.segments.take(batch.len());
        let head = Head {
            seal,
            generation: self.segments.generation,
            seq: batch.seq,
            durable_seq: self.durable,
            live_seq,
            prev_crc: self.prev_crc,
            offset,
            header_len: batch.header_len() as u32,
            record_count: batch.record_count,
            records_len: batch.records.len() as u32,
            payload_len: batch.payload_len,
        };
        let crc = encode_header(header, &self.geometry, &head, &batch.records);
        self.covered = self.covered.max(self.durable);
        if !seal {
            (self.prev_crc, self.taken) = (crc, batch.seq);
        }
        if batch.record_count > 0 {
            self.last_records = batch.seq;
        }
        let (id, seq) = (WriteId(self.next_write), batch.seq);
        self.next_write += 1;
        let payloads = std::mem::take(&mut batch.payloads);
        let records = u64::from(batch.record_count).max(1);
        let base = offset + header.len() as u64;
        self.flights.push_back(Flight { id, batch, base, live_seq, seal, alone, done: false });
        PendingWrite { id, seq, records, offset, payloads }
    }

    /// A write is durable. Returns the new [`Self::durable_seq`] if that advanced: writes may complete in any
    /// order, batches become durable in theirs.
    ///
    /// # Panics
    /// If `id` is not in flight.
    pub fn write_done(&mut self, id: WriteId) -> Option<Seq> {
        let Some(flight) = self.flights.iter_mut().find(|f| f.id == id) else { panic!("write_done of no write") };
        flight.done = true;
        for run in &flight.batch.runs {
            if let Some(index) = self.indexes.get_mut(&run.copyset) {
                index.place(run.first, run.count, flight.batch.seq, flight.base);
            }
        }
        let before = self.durable;
        while self.flights.front().is_some_and(|f| f.done) {
            let Some(flight) = self.flights.pop_front() else { break };
            self.advertised = self.advertised.max(flight.live_seq);
            if !flight.seal {
                self.durable = flight.batch.seq;
                self.queue.recycle(flight.batch);
            }
        }
        (self.durable > before).then_some(self.durable)
    }

    /// Records that wait to be written.
    #[must_use]
    pub fn queued_records(&self) -> u64 {
        self.queue.records()
    }

    /// Bytes they take in the log, at most.
    #[must_use]
    pub fn queued_bytes(&self) -> u64 {
        self.queue.charge()
    }

    /// Everything up to this batch is durable.
    #[must_use]
    pub fn durable_seq(&self) -> Seq {
        self.durable
    }

    /// Commit of the newest durable hard state of a copyset (rule 10); 0 if there is none.
    #[must_use]
    pub fn durable_commit(&self, id: CopysetId) -> u64 {
        self.indexes.get(&id).map_or(0, |i| i.durable_commit(self.durable))
    }

    /// Whether an entry with a payload so long may be appended, when others that cost `pending` ([`Self::entry_cost`]
    /// each) are about to be. Leaves one segment for what frees space (rule 9). The log does not refuse more, it eats
    /// into that segment, and stops when it is full: what frees space queues behind what does not fit.
    ///
    /// A log whose last segment alone is live takes any one entry up to [`Self::max_entry_bytes`].
    #[must_use]
    pub fn has_room(&self, pending: u64, payload_len: usize) -> bool {
        let alone = pending == 0 && self.queue.is_empty() && self.segments.free.len() >= 2;
        alone || pending.saturating_add(self.entry_cost(payload_len)) <= self.space_for_entries()
    }

    /// Bytes that entries may still take: [`Self::entry_cost`] each.
    #[must_use]
    pub fn space_for_entries(&self) -> u64 {
        let waste = (self.limits.batch_bytes_max as u64).min(self.geometry.segment_size / 2);
        self.segments.space_for_entries(waste).saturating_sub(self.queue.charge())
    }

    /// What an entry costs at most: its payload and header blocks that nothing else shares, and what it leaves unused
    /// at the end of a segment if it is longer than the waste every segment is allowed.
    #[must_use]
    pub fn entry_cost(&self, payload_len: usize) -> u64 {
        let header = header_len(2 * RECORD_LEN + CONTEXT_ROOM + payload_len / BLOCK * 4);
        self.queue.charge_of((payload_len + header) as u64)
    }

    /// Bytes between the oldest live segment's start and the end of the log.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.segments.used_bytes()
    }

    /// Bytes of the zone.
    #[must_use]
    pub fn capacity_bytes(&self) -> u64 {
        self.geometry.segment_size * u64::from(self.geometry.segment_count)
    }

    /// Copysets that keep the oldest segment from being freed, sorted; empty while there is only one. A record
    /// pins until what supersedes it is durable.
    #[must_use]
    pub fn pinning(&self) -> Vec<CopysetId> {
        let Some(next) = self.segments.live.get(1) else { return Vec::new() };
        let pins = self.indexes.iter().filter(|(_, index)| index.keep(self.durable) < next.first_seq);
        let mut ids: Vec<_> = pins.map(|(id, _)| *id).collect();
        ids.sort_unstable();
        ids
    }

    /// Frees what may be freed, oldest first; returns how many segments.
    pub fn free_segments(&mut self) -> usize {
        let durable = self.durable;
        self.dying.retain(|(seq, _)| *seq > durable);
        let dying = self.dying.iter().map(|(_, keep)| *keep);
        let keeps = self.indexes.values().map(|i| i.keep(durable));
        let need = dying.chain(keeps).min().unwrap_or(u64::MAX).min(durable + 1);
        self.segments.free(need)
    }

    /// Largest payload an entry may have.
    #[must_use]
    pub fn max_entry_bytes(&self) -> usize {
        self.max_entry_bytes
    }

    /// Drops payloads of entries up to `index` from memory, as far as they are on disk.
    pub fn evict(&mut self, id: CopysetId, index: u64) {
        if let Some(log) = self.indexes.get_mut(&id) {
            log.evict(index);
        }
    }

    /// Gives a payload that was fetched by [`Index::absent`] and verified, to be sent to a peer; [`Self::take_back`] ends that.
    /// Ignored if the entry has another length meanwhile.
    pub fn lend(&mut self, id: CopysetId, index: u64, payload: Bytes) {
        let slot = self.indexes.get_mut(&id).and_then(|log| log.slot_mut(index));
        if let Some(slot) = slot.filter(|slot| slot.payload_len as usize == payload.len()) {
            slot.payload = payload;
        }
    }

    /// Drops the payloads of entries `low..high` from memory, as far as they are on disk.
    pub fn take_back(&mut self, id: CopysetId, low: u64, high: u64) {
        let Some(log) = self.indexes.get_mut(&id) else { return };
        for index in low..high {
            if let Some(slot) = log.slot_mut(index).filter(|slot| matches!(slot.place, SlotPlace::Disk(_))) {
                slot.payload = Bytes::new();
            }
        }
    }

    /// Gives a payload back that was fetched (and verified) by [`Index::location`], or from a peer.
    ///
    /// # Panics
    /// If it has another length than the entry's.
    pub fn restore(&mut self, id: CopysetId, index: u64, payload: Bytes) {
        if let Some(log) = self.indexes.get_mut(&id) {
            log.restore(index, payload);
        }
    }
}

/// Queues one entry and makes it readable.
fn push_entry(index: &mut Index, batch: &mut Batch, id: CopysetId, entry: Entry) {
    assert_eq!(entry.index, index.last_index() + 1, "entries are consecutive");
    assert!(entry.payload.len().is_multiple_of(BLOCK), "payloads are whole blocks");
    assert!(entry.context.len() >= entry.payload.len() / BLOCK * 4, "a context starts with the payload's block CRCs");
    let prev_term = index.term(entry.index - 1).unwrap_or(0);
    let at = batch.push_entry(id, index.checkpoint().incarnation, &entry, prev_term, false);
    index.slots.push_back(Slot {
        term: entry.term,
        kind: entry.kind,
        rotten: false,
        payload_len: entry.payload.len() as u32,
        seq: batch.seq,
        place: SlotPlace::Queued(at),
        context: entry.context,
        payload: entry.payload,
    });
}
