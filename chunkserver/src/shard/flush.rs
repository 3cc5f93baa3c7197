//! Write-back: when a round starts, what must hold before and after it, and how log space is released.
//!
//! A round: commits durable (rule 10) -> chunk data -> sync -> CRC, bitmap and metadata pages -> sync -> checkpoints
//! durable -> slots reusable, segments free (rule 11). One round at a time.

use super::{DISK, Effects, Shard, State, Task};
use crate::chunk::RoundIo;
use crate::io::{Instant, Op};
use raftlog::{CopysetId, Seq};

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
        Self { phase: Phase::Idle, next: now, urgent: false }
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
                Phase::Checkpoints(_) => self.round_end(),
            };
            if !moved {
                return;
            }
        }
    }

    /// Half the memory, half the log, or old age.
    fn round_due(&mut self) -> bool {
        let dirty = self.store.dirty_bytes();
        let log = self.log.borrow();
        if log.used_bytes() * 2 >= log.capacity_bytes() || !self.deferred.is_empty() {
            return true;
        }
        if !self.store.has_dirty() {
            self.flush.next = Instant::FAR;
            return false;
        }
        if dirty * 2 >= self.config.dirty_limit || std::mem::take(&mut self.flush.urgent) {
            return true;
        }
        if self.arenas.all_payload.iter().any(|a| a.free_bytes() < a.size() / 4) {
            return true;
        }
        let oldest = Instant(self.store.oldest_dirty().unwrap_or(self.now.0));
        self.flush.next = oldest.after_ns(self.config.flush_age_ns);
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
        self.metrics.round();
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

    fn round_io(&mut self, out: &mut Effects) -> bool {
        let work = self.arenas.work.clone();
        while let Some((id, io)) = self.store.next_io(&mut |len| work.alloc(len)) {
            let op = match io {
                RoundIo::Write { offset, bufs } => Op::Write { file: DISK, offset, bufs, dsync: false },
                RoundIo::Sync => Op::Sync { file: DISK },
            };
            self.submit(out, Task::Round(id), op);
        }
        let Some(done) = self.store.round_done() else { return false };
        self.write_checkpoints(done);
        true
    }

    /// Log what the copysets may restart from; false if there was nothing new to say.
    fn write_checkpoints(&mut self, done: Vec<(CopysetId, u64)>) -> bool {
        let mut written = Checkpoints::new();
        let mut log = self.log.borrow_mut();
        let crowded = log.used_bytes() * 2 >= log.capacity_bytes();
        let pinning = if crowded { log.pinning() } else { Vec::new() };
        for (id, index) in done {
            let Some(group) = self.groups.get(&id) else { continue };
            let Some(known) = log.index(id).map(|i| i.checkpoint().applied_index) else { continue };
            let seq = if index > known {
                log.checkpoint(id, group.raft.checkpoint_at(index))
            } else if pinning.contains(&id) {
                log.relog(id)
            } else {
                continue;
            };
            written.push((seq, id, index));
        }
        for id in pinning {
            if !written.iter().any(|w| w.1 == id) {
                written.push((log.relog(id), id, 0));
            }
        }
        let any = !written.is_empty();
        // A round that changed nothing still ends: the next one is due by age.
        self.flush.phase = if any { Phase::Checkpoints(written) } else { Phase::Idle };
        self.flush.next = self.now.after_ms(100);
        any
    }

    fn round_end(&mut self) -> bool {
        let Phase::Checkpoints(written) = &mut self.flush.phase else { return false };
        let mut log = self.log.borrow_mut();
        if written.iter().any(|w| w.0 > log.durable_seq()) {
            return false;
        }
        for (_, id, index) in written.drain(..).filter(|w| w.2 > 0) {
            self.store.checkpoint_durable(id, index);
        }
        log.free_segments();
        self.flush.phase = Phase::Idle;
        true
    }
}
