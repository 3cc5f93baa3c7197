//! Old entries for peers that lag: payloads that are no longer in memory are read back from the log zone, a bounded
//! number of bytes at a time, and given up again as soon as raft has made its messages of them. In the same way a tail
//! comes back into memory that is to be logged again, after a restart.

use super::{DISK, Effects, Group, Shard, Task};
use crate::io::Instant;
use crate::io::buffer::PoolBuf;
use crate::io::{Errno, Op};
use copyset::Role;
use raftlog::{BLOCK, CopysetId, Log, crc32c};
use std::collections::BTreeMap;

/// Payload bytes read back for peers at once, unless one entry alone is longer.
const BYTES_MAX: usize = 8 << 20;
/// Between two attempts to get tails back, milliseconds.
const TAILS_MS: u64 = 100;

/// Entries `low..high` of a copyset, on their way into memory.
#[derive(Debug)]
struct Fetching {
    low: u64,
    high: u64,
    /// Not asked of the device yet.
    next: u64,
    in_flight: usize,
    bytes: usize,
    failed: bool,
}

/// What is read back for peers.
#[derive(Debug, Default)]
pub(super) struct CatchUp {
    fetching: BTreeMap<CopysetId, Fetching>,
    bytes: usize,
    /// Ranges whose messages the next `ready` makes.
    lent: Vec<(CopysetId, u64, u64)>,
    tails_at: Instant,
}

impl CatchUp {
    /// Payloads of this copyset are being read back.
    pub(super) fn fetches(&self, id: CopysetId) -> bool {
        self.fetching.contains_key(&id)
    }
}

impl Shard {
    /// A copyset needs payloads of `low..high` in memory.
    pub(super) fn fetch_for_peers(&mut self, id: CopysetId, low: u64, high: u64) {
        if self.catch_up.fetching.contains_key(&id) {
            // Its tail is being fetched, since it was a follower: raft asks again.
            return self.groups.get_mut(&id).into_iter().for_each(|group| group.raft.fetched(low, false));
        }
        let fetching = Fetching { low, high, next: low, in_flight: 0, bytes: 0, failed: false };
        self.catch_up.fetching.insert(id, fetching);
    }

    /// These followers' tails up to these indexes are to be logged again, and are not in memory after a restart. (What a
    /// leader needs it asks for itself.)
    pub(super) fn fetch_tails(&mut self, log: &Log, tails: &[(CopysetId, u64)]) {
        if self.catch_up.tails_at > self.now {
            return;
        }
        self.catch_up.tails_at = self.now.after_ms(TAILS_MS);
        for &(id, last) in tails {
            let follows = |group: &Group| group.raft.role() != Role::Leader && !group.damaged;
            let follows = self.groups.get(&id).is_some_and(follows);
            let Some(index) = log.index(id).filter(|_| follows && !self.catch_up.fetching.contains_key(&id)) else {
                continue;
            };
            let low = index.first_index();
            let bytes = (low..=last).filter_map(|n| index.payload_len(n)).sum::<usize>();
            if bytes <= BYTES_MAX && !(low..=last).any(|n| index.is_rotten(n)) {
                self.fetch_for_peers(id, low, last + 1);
            }
        }
    }

    /// Read on, as far as there is memory.
    pub(super) fn catch_up_step(&mut self, out: &mut Effects) {
        let ids: Vec<CopysetId> = self.catch_up.fetching.keys().copied().collect();
        for id in ids {
            self.read_back(id, out);
            let over = |f: &Fetching| f.in_flight == 0 && (f.failed || f.next >= f.high);
            if self.catch_up.fetching.get(&id).is_some_and(over) {
                self.fetched_for_peers(id, out);
            }
        }
    }

    fn read_back(&mut self, id: CopysetId, out: &mut Effects) {
        while let Some(fetching) = self.catch_up.fetching.get_mut(&id).filter(|f| !f.failed && f.next < f.high) {
            let index = fetching.next;
            let (location, term) = {
                let log = self.log.borrow();
                let known = log.index(id);
                (known.and_then(|i| i.absent(index)), known.and_then(|i| i.term(index)))
            };
            let (Some(location), Some(term)) = (location, term) else {
                fetching.failed |= term.is_none(); // else it is in memory
                fetching.next += 1;
                continue;
            };
            let room = self.catch_up.bytes == 0 || self.catch_up.bytes + location.len <= BYTES_MAX;
            let Some(mut buf) = room.then(|| self.arenas.payload.alloc(location.len)).flatten() else {
                self.starved |= room;
                return;
            };
            buf.truncate(location.len);
            (fetching.next, fetching.in_flight) = (index + 1, fetching.in_flight + 1);
            fetching.bytes += location.len;
            self.catch_up.bytes += location.len;
            let offset = self.layout.log_offset_of(self.config.shard) + location.offset;
            self.submit(out, Task::CatchUp { copyset: id, index, term }, Op::Read { file: DISK, offset, buf });
        }
    }

    pub(super) fn read_back_done(
        &mut self,
        id: CopysetId,
        (index, term): (u64, u64),
        buf: PoolBuf,
        result: Result<(), Errno>,
    ) {
        let Some(fetching) = self.catch_up.fetching.get_mut(&id) else { return };
        if fetching.in_flight == 0 || !(fetching.low..fetching.next).contains(&index) {
            return; // of a former life of the copyset
        }
        fetching.in_flight -= 1;
        let mut log = self.log.borrow_mut();
        let entry = log.index(id).and_then(|i| i.entries(index, index + 1, usize::MAX).pop());
        let whole = entry.filter(|entry| entry.term == term).is_some_and(|entry| {
            let crcs = entry.context.as_chunks::<4>().0.iter().map(|crc| u32::from_le_bytes(*crc));
            buf.chunks(BLOCK).zip(crcs).all(|(block, crc)| crc32c(block) == crc)
        });
        if result.is_ok() && whole {
            log.lend(id, index, buf.freeze());
        } else {
            tracing::warn!(copyset = ?id, index, "an entry of the log cannot be read back for a peer");
            fetching.failed = true;
        }
    }

    fn fetched_for_peers(&mut self, id: CopysetId, out: &mut Effects) {
        let Some(fetching) = self.catch_up.fetching.remove(&id) else { return };
        self.catch_up.bytes -= fetching.bytes;
        if fetching.failed && !self.members.wants_checkpoint(id) {
            // What it says is on the slots: from behind a checkpoint a peer is given that.
            self.want_checkpoints(&[id], None, out);
        }
        if let Some(group) = self.groups.get_mut(&id) {
            group.raft.fetched(fetching.low, !fetching.failed);
            self.catch_up.lent.push((id, fetching.low, fetching.high.min(group.applied + 1)));
            self.mark_dirty(id);
        }
    }

    /// Raft's messages are made, and hold what they need.
    pub(super) fn end_catch_up(&mut self, id: CopysetId) {
        for (_, low, high) in self.catch_up.lent.extract_if(.., |lent| lent.0 == id) {
            self.log.borrow_mut().take_back(id, low, high);
        }
    }

    /// A copyset is gone.
    pub(super) fn stop_catch_up(&mut self, id: CopysetId) {
        let gone = self.catch_up.fetching.remove(&id);
        self.catch_up.bytes -= gone.map_or(0, |f| f.bytes);
    }
}
