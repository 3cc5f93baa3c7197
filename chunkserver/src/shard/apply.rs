//! Committed entries into memory, in order per copyset. After a restart their payloads are fetched from the log first.

use super::entry::{Header, Kind};
use super::request::{BlockCrcs, Outcome};
use super::{DISK, Effects, Failure, Shard, Task};
use crate::chunk::ApplyOp;
use crate::io::buffer::PoolBuf;
use crate::io::{Errno, Op};
use copyset::Committed;
use raftlog::{BLOCK, CopysetId, crc32c};

/// Payload fetches in flight at once.
const FETCHES_MAX: usize = 64;

/// A fetch that fails is tried again this often, this far apart: two seconds.
const FETCH_RETRIES: u32 = 20;
const FETCH_RETRY_MS: u64 = 100;

/// What became of the entry at the head of a copyset's queue.
enum Step {
    Applied,
    Wait,
    Failed(Failure),
}

impl Shard {
    /// Apply what can be applied now; true if anything was.
    pub(super) fn apply_ready(&mut self, out: &mut Effects) -> bool {
        let mut worked = false;
        let mut applying = std::mem::replace(&mut self.applying, std::mem::take(&mut self.spare));
        for id in applying.drain(..) {
            let before = self.groups.get(&id).map_or(0, |g| g.applied);
            let waits = loop {
                match self.apply_next(id, out) {
                    Some(Step::Applied) => {}
                    Some(Step::Wait) => break true,
                    Some(Step::Failed(failure)) => {
                        self.fail(failure);
                        return false;
                    }
                    None => break false,
                }
            };
            let Some(group) = self.groups.get_mut(&id) else { continue };
            group.applying = waits;
            if waits {
                self.applying.push(id);
            }
            if group.applied > before {
                worked = true;
                group.raft.applied(group.applied);
                self.log.borrow_mut().evict(id, group.applied);
                self.tail_applied(id);
                self.mark_dirty(id);
            }
        }
        self.spare = applying;
        worked
    }

    /// Apply the head of a copyset's queue; `None` when the queue is empty.
    fn apply_next(&mut self, id: CopysetId, out: &mut Effects) -> Option<Step> {
        let group = self.groups.get_mut(&id)?;
        if group.damaged || group.fetching || group.fetch_after > self.now || self.mends.holds(id) {
            return Some(Step::Wait);
        }
        let head = group.queue.front()?;
        if head.is_absent() {
            let (index, len) = (head.index, head.payload_len);
            if !self.fetch(id, index, len, out) {
                return Some(Step::Wait);
            }
        }
        let group = self.groups.get_mut(&id)?;
        let committed = group.queue.pop_front()?;
        self.stop_install(id); // the log goes on after all
        let (index, cookie) = (committed.index, committed.cookie);
        if let Err(failure) = self.apply(id, committed) {
            return Some(Step::Failed(failure));
        }
        if let Some(group) = self.groups.get_mut(&id) {
            group.applied = index;
        }
        if let Some(cookie) = cookie {
            self.settle(cookie, Outcome::Success, index, out);
        }
        Some(Step::Applied)
    }

    fn apply(&mut self, id: CopysetId, committed: Committed) -> Result<(), Failure> {
        if committed.is_internal() {
            return Ok(()); // a leader's own-term entry, or a conf change that raft applied
        }
        let header = Header::decode(committed.header().unwrap_or_default())?;
        let crcs: BlockCrcs = committed.crcs().collect();
        let Committed { index, payload, .. } = committed;
        let op = match header.kind {
            Kind::Write => ApplyOp::Write { sn: header.sn, offset: header.offset, payload, crcs },
            Kind::Delete => ApplyOp::Delete,
            Kind::Zero => ApplyOp::Zero { offset: header.offset, len: header.len },
        };
        Ok(self.store.apply(id, index, header.chunk, op, self.now.0)?)
    }

    /// Get an entry's payload back from the log, when there is room for it; true if it is there now.
    fn fetch(&mut self, id: CopysetId, index: u64, len: usize, out: &mut Effects) -> bool {
        let dirty = self.store.pinned_bytes() as usize;
        if dirty > 0 && dirty + len > self.config.dirty_limit {
            self.want_memory(); // not before old age makes the round due
            return false;
        }
        let location = self.log.borrow().index(id).and_then(|i| i.location(index));
        let Some(location) = location else {
            self.fail(Failure::Recovery(format!("entry {index} of {id:?} is not in the log")));
            return false;
        };
        if self.replay_read_ahead(location, out) {
            return false;
        }
        let Some(mut buf) = self.arenas.payload.alloc(len) else {
            self.starved = true;
            self.want_memory();
            return false;
        };
        buf.truncate(len);
        let Some(group) = self.groups.get_mut(&id) else { return false };
        if let Some(data) = self.replay.find(location)
            && let Some(head) = group.queue.front_mut()
            && fits(head, data)
        {
            buf.copy_from_slice(data);
            head.payload = buf.freeze();
            return true;
        }
        if self.tasks.iter().filter(|(_, task)| matches!(task, Task::Fetch { .. })).count() < FETCHES_MAX {
            group.fetching = true;
            let offset = self.layout.log_offset_of(self.config.shard) + location.offset;
            self.submit(out, Task::Fetch { copyset: id, index }, Op::Read { file: DISK, offset, buf });
        }
        false
    }

    /// The payload of the committed entry at the head of the queue is lost. Other replicas have what it did: its chunk is
    /// taken from one of them. With one replica there is nobody to repair from: the copyset answers CRC_FAIL, the others go
    /// on (rule 21); unless somebody has just said that what is left of it is what counts.
    fn unreadable(&mut self, id: CopysetId, index: u64) {
        let may_doubt = self.has_peers(id) || self.is_retired(id) || self.renewals.has(id);
        let Some(group) = self.groups.get_mut(&id) else { return };
        let header = group.queue.front().and_then(|head| Header::decode(head.header()?).ok());
        if let Some(header) = header.filter(|h| may_doubt || self.store.is_over(id, h.chunk, index))
            && self.store.apply_lost(id, index, header.chunk, header.sn, self.now.0)
            && let Some(head) = group.queue.pop_front()
        {
            tracing::error!(copyset = ?id, index, "a committed log entry is unreadable; its chunk, if it lives, is asked of a peer");
            (group.applied, group.fetch_failures) = (head.index, 0);
            group.raft.applied(head.index);
            self.mark_dirty(id);
            self.look_for_doubts();
        } else {
            tracing::error!(copyset = ?id, index, "a committed log entry is unreadable; the copyset is out of service");
            group.damaged = true;
        }
    }

    pub(super) fn fetched(&mut self, id: CopysetId, index: u64, buf: PoolBuf, result: Result<(), Errno>) {
        let Some(group) = self.groups.get_mut(&id) else { return };
        group.fetching = false;
        let Some(head) = group.queue.front_mut().filter(|head| head.index == index) else { return };
        if result.is_ok() && fits(head, &buf) {
            head.payload = buf.freeze();
            group.fetch_failures = 0;
        } else if group.fetch_failures < FETCH_RETRIES {
            group.fetch_failures += 1; // a passing error gets time to pass
            group.fetch_after = self.now.after_ms(FETCH_RETRY_MS);
            self.fetch_at = self.fetch_at.min(group.fetch_after);
        } else {
            self.unreadable(id, index);
        }
    }
}

/// Whether this is the payload that the entry's checksums tell of.
fn fits(entry: &Committed, data: &[u8]) -> bool {
    let crcs = entry.crcs();
    crcs.len() * BLOCK == data.len() && data.chunks(BLOCK).zip(crcs).all(|(block, crc)| crc32c(block) == crc)
}
