//! Write-back: when a round starts, what must hold before and after it, and how log space is released.
//!
//! A round: commits durable (rule 10) -> chunk data -> sync -> CRC, bitmap and metadata pages -> sync -> checkpoints
//! durable -> slots reusable, segments free (rule 11). One round at a time.

use super::{DISK, Effects, Group, Shard, State, Task};
use crate::chunk::RoundIo;
use crate::io::{Instant, Op};
use copyset::Copyset;
use raftlog::{BLOCK, CopysetId, Log, Seq};
use std::rc::Rc;

/// Device writes of a round in flight, with room for new writes and without.
const DEPTH_MIN: usize = 8;
const DEPTH_MAX: usize = 64;
/// Nothing was written for this part of the age at which data is written back: the device has time for a round. (Not at
/// once: a program that writes now and then would get a round, with its pages, for each of its writes.)
const IDLE_PART: u64 = 10;
/// Longest tail of entries, and their payload, that is logged again to free a segment.
const RELOG_ENTRIES_MAX: u64 = 16;
const RELOG_BYTES_MAX: usize = 64 << 10;
/// What an entry takes in a log header, checksums included, rounded up.
const RELOG_ENTRY_BYTES: u64 = 256;

/// Checkpoints written, awaited: (batch, copyset, applied index).
type Checkpoints = Vec<(Seq, CopysetId, u64)>;

/// Where the round is.
#[derive(Debug)]
pub(super) struct Flush {
    phase: Phase,
    /// Next look at the age of dirty data.
    pub(super) next: Instant,
    /// Somebody waits for memory or log space that this shard's dirty data holds.
    pub(super) urgent: bool,
    /// Somebody found no slot; what was deleted may hold some until a checkpoint covers it.
    slots_wanted: bool,
    /// How often that had been said, by any shard, when it was last looked at.
    wants_seen: u64,
}

#[derive(Debug)]
enum Phase {
    Idle,
    /// Commit records on their way to the log.
    Commits(Seq),
    /// Device writes and syncs; the store knows which.
    Device,
    /// Checkpoints on their way to the log.
    Checkpoints(Checkpoints),
}

impl Flush {
    pub(super) fn new(now: Instant) -> Self {
        Self { phase: Phase::Idle, next: now, urgent: false, slots_wanted: false, wants_seen: 0 }
    }
}

impl Shard {
    pub(super) fn flush_deadline(&self) -> Instant {
        match self.flush.phase {
            Phase::Idle => self.flush.next,
            _ => Instant::FAR,
        }
    }

    /// Move the round on as far as it goes.
    pub(super) fn flush_step(&mut self, out: &mut Effects) {
        if self.checkpoints_wanted() && matches!(self.flush.phase, Phase::Idle) {
            self.checkpoints_durable(out); // an earlier round may have made them
        }
        loop {
            let moved = match &self.flush.phase {
                Phase::Idle => self.round_start(),
                Phase::Commits(seq) => {
                    let durable = self.log.borrow().durable_seq() >= *seq;
                    if durable {
                        self.flush.phase = Phase::Device;
                    }
                    durable
                }
                Phase::Device => self.round_io(out),
                Phase::Checkpoints(_) => self.round_end(out),
            };
            if !moved {
                return;
            }
        }
    }

    /// Half the memory, half the log, old age, or nothing else to do.
    fn round_due(&mut self) -> bool {
        let dirty = self.store.pinned_bytes() as usize;
        let log = self.log.borrow();
        if log.used_bytes() * 2 >= log.capacity_bytes()
            || self.writes_wait()
            || self.checkpoints_wanted()
            || self.renewals.want_checkpoints()
        {
            return true;
        }
        let wants = self.extents.wanted();
        self.flush.slots_wanted |= std::mem::replace(&mut self.flush.wants_seen, wants) != wants;
        self.flush.slots_wanted &= self.store.has_graves();
        if self.flush.slots_wanted {
            return true;
        }
        let idle = Instant(self.store.changed_ns()).after_ns(self.config.flush_age_ns / IDLE_PART);
        let Some(oldest) = self.store.oldest_dirty_ns() else {
            // What a purged copyset held may be all that there is to write, and another shard may need its slots.
            self.flush.next = match self.store.has_open_graves() {
                true => idle,
                false if self.lost.iter().any(|&id| self.shows_loss(id)) => self.flush.next.min(self.now.after_ms(100)),
                false => Instant::FAR,
            };
            return self.flush.next <= self.now;
        };
        if dirty * 2 >= self.config.dirty_limit || std::mem::take(&mut self.flush.urgent) {
            return true;
        }
        if self.arenas.all_payload.iter().any(|a| a.free_bytes() < a.size() / 4) {
            return true;
        }
        self.flush.next = Instant(oldest).after_ns(self.config.flush_age_ns).min(idle);
        self.flush.next <= self.now
    }

    fn round_start(&mut self) -> bool {
        if !matches!(self.state, State::Serving | State::Draining { .. }) || !self.round_due() {
            return false;
        }
        let applied: Vec<(CopysetId, u64)> = self.groups.iter().map(|(&id, g)| (id, g.applied)).collect();
        let Some(start) = self.store.begin_round(&applied) else {
            // Nothing to write: what pins the log are entries without data and old checkpoints.
            return self.write_checkpoints(applied);
        };
        let mut log = self.log.borrow_mut();
        let mut last = log.durable_seq();
        for (id, index) in start.commits {
            if let Some(group) = self.groups.get(&id)
                && log.durable_commit(id) < index
            {
                last = last.max(log.append(id, Vec::new(), Some(group.raft.hard_state_for_log())));
            }
        }
        self.flush.phase = Phase::Commits(last);
        true
    }

    /// Device writes of the round in flight: few while there is room for what clients write, since each makes log
    /// writes wait behind it, and more the less room is left.
    fn round_depth(&self) -> usize {
        let dirty = self.store.pinned_bytes() as usize;
        let half = self.config.dirty_limit / 2;
        let over = dirty.saturating_sub(half).min(half);
        DEPTH_MIN + (DEPTH_MAX - DEPTH_MIN) * over / half.max(1)
    }

    fn round_io(&mut self, out: &mut Effects) -> bool {
        let work = self.arenas.work.clone();
        let mut starved = false;
        let mut alloc = |len: usize| {
            let buf = work.alloc(len);
            starved = buf.is_none();
            buf
        };
        let depth = self.round_depth();
        while let Some((id, io)) = self.store.next_io(depth, &mut alloc) {
            let op = match io {
                RoundIo::Write { offset, bufs } => Op::Write { file: DISK, offset, bufs, dsync: false },
                RoundIo::Sync => Op::Sync { file: DISK },
            };
            self.submit(out, Task::Round(id), op);
        }
        self.starved |= starved;
        let Some(done) = self.store.round_done() else { return false };
        self.write_checkpoints(done);
        true
    }

    /// A slot was wanted and there was none. The other shards see that at their next turn.
    pub(super) fn want_slots(&mut self) {
        self.extents.want();
        self.flush.next = self.now;
    }

    /// Log what the copysets may restart from; false if there was nothing new to say.
    fn write_checkpoints(&mut self, done: Vec<(CopysetId, u64)>) -> bool {
        let mut written = Checkpoints::new();
        for (id, index) in done {
            let known = self.log.borrow().index(id).map(|i| i.checkpoint().applied_index);
            let index = self.checkpoint_index(id, index);
            let newer = known.is_some_and(|known| index > known);
            // The copyset looks into the log itself: no borrow of it may be held.
            if let Some(group) = self.groups.get(&id).filter(|_| newer) {
                let checkpoint = group.raft.checkpoint_at(index);
                written.push((self.log.borrow_mut().checkpoint(id, checkpoint), id, index));
            }
        }
        self.relog_lossy(&mut written);
        self.release_oldest(&mut written);
        let any = !written.is_empty();
        if !any {
            // What was purged, or superseded since the last round, may free a segment all the same.
            let mut log = self.log.borrow_mut();
            let freed = log.free_segments();
            let lost = |id: &CopysetId| self.broken.contains(id) || self.groups.get(id).is_some_and(|g| g.damaged);
            self.wedged = freed == 0 && self.waiting.is_empty() && log.pinning().iter().any(lost);
        }
        // A round that changed nothing still ends: the next one is due by age.
        self.flush.phase = if any { Phase::Checkpoints(written) } else { Phase::Idle };
        self.flush.next = self.now.after_ms(100);
        self.flush.slots_wanted = false;
        any
    }

    /// Its log lost records; it has caught up since, but whoever starts from this log would find it suspect again.
    fn shows_loss(&self, id: CopysetId) -> bool {
        let over = |group: &Group| !group.damaged && group.raft.is_lossy() && !group.raft.is_suspect();
        self.groups.get(&id).is_some_and(over)
    }

    /// Log again what is there of such copysets, in one stroke: then what was lost before does not matter any more. (Nobody
    /// could clear a sole voter.)
    fn relog_lossy(&mut self, written: &mut Checkpoints) {
        let mut log = self.log.borrow_mut();
        for id in std::mem::take(&mut self.lost) {
            let fits = self.shows_loss(id) && log.index(id).is_some_and(|i| i.not_resident().is_empty());
            if fits
                && relog_cost(&log, id) <= log.space_for_entries()
                && let Some(group) = self.groups.get_mut(&id)
            {
                written.push((log.relog(id), id, 0));
                group.raft.relogged();
            } else {
                self.lost.push(id);
            }
        }
    }

    /// Rule 8: copysets that say nothing new must not pin the oldest segment when space is short.
    fn release_oldest(&mut self, written: &mut Checkpoints) {
        let log = Rc::clone(&self.log);
        let mut log = log.borrow_mut();
        if log.used_bytes() * 2 < log.capacity_bytes() && !self.writes_wait() {
            return;
        }
        let mut absent = Vec::new();
        for id in log.pinning() {
            let kept = self.broken.contains(&id) && !log.index(id).is_some_and(|i| Copyset::is_lost(i.checkpoint()));
            if written.iter().any(|w| w.1 == id) || kept || !self.can_relog(&log, id) {
                continue;
            }
            match log.index(id).map(|index| (index.not_resident().is_empty(), index.last_index())) {
                Some((false, last)) => absent.push((id, last)),
                _ => written.push((log.relog(id), id, 0)),
            }
        }
        self.fetch_tails(&log, &absent);
    }

    fn round_end(&mut self, out: &mut Effects) -> bool {
        let Phase::Checkpoints(written) = &mut self.flush.phase else { return false };
        let mut log = self.log.borrow_mut();
        if written.iter().any(|w| w.0 > log.durable_seq()) {
            return false;
        }
        let written = std::mem::take(written);
        for (_, id, index) in written.into_iter().filter(|w| w.2 > 0) {
            self.store.checkpoint_durable(id, index);
        }
        log.free_segments();
        drop(log);
        self.flush.phase = Phase::Idle;
        self.checkpoints_durable(out);
        true
    }

    /// How far a copyset's log may be forgotten when all up to `done` is on the slots. While there is room, entries are
    /// kept for replicas that lag: to send them is cheaper than to send chunks.
    fn checkpoint_index(&self, id: CopysetId, done: u64) -> u64 {
        let several = self.groups.get(&id).is_some_and(|group| group.raft.needs_ticks());
        let wanted = self.members.wants_checkpoint(id) || self.renewals.wants_checkpoint(id);
        if !several || wanted || self.is_short() || self.lost.contains(&id) && self.shows_loss(id) {
            return done;
        }
        0
    }

    /// Log space, or slots that only a checkpoint sets free, are scarce.
    fn is_short(&self) -> bool {
        let log = self.log.borrow();
        let slots = self.flush.slots_wanted || self.store.spare_slots() == 0 && self.extents.free_slots() == 0;
        log.used_bytes() * 2 >= log.capacity_bytes() || self.writes_wait() || slots
    }

    /// A tail that is short or stuck: without a quorum nothing of it is on its way to be applied. One that
    /// is on its way is covered by the next round's checkpoint; to log it again would take the very space that is short.
    fn can_relog(&self, log: &Log, id: CopysetId) -> bool {
        let Some(index) = log.index(id) else { return false };
        let entries = index.last_index() + 1 - index.first_index();
        let bytes = (index.first_index()..=index.last_index()).filter_map(|n| index.payload_len(n)).sum::<usize>();
        let stuck = |group: &Group| {
            let applied = group.raft.commit_index() == group.applied && index.first_index() == group.applied + 1;
            applied && relog_cost(log, id) <= log.space_for_entries()
        };
        entries <= RELOG_ENTRIES_MAX && bytes <= RELOG_BYTES_MAX || self.groups.get(&id).is_some_and(stuck)
    }
}

/// What a copyset's tail takes in the log, about.
fn relog_cost(log: &Log, id: CopysetId) -> u64 {
    let Some(index) = log.index(id) else { return 0 };
    let entries = index.last_index() + 1 - index.first_index();
    let bytes = (index.first_index()..=index.last_index()).filter_map(|n| index.payload_len(n)).sum::<usize>();
    (bytes + BLOCK) as u64 + entries * RELOG_ENTRY_BYTES
}
