//! Leaders leave a slow disk.
//!
//! A majority hides a slow follower, nothing hides a slow leader. So a shard whose log writes have been slow for a while
//! hands the copysets it leads to the followers that are furthest, if there are any, and not again before a pause is
//! over: with all disks slow, leadership must not wander. It may be elected again; only a disk that has become fast is
//! told apart from one that has not (hysteresis), nobody is kept from campaigning.

use super::Shard;
use crate::io::Instant;
use crate::metrics::Counter;
use raftlog::{CopysetId, WriteId};
use smallvec::SmallVec;

/// A log write this part of the election timeout long, on average, is slow;
const SLOW_PART: u64 = 4;
/// one this part of it is fast again.
const FAST_PART: u64 = 16;
/// Slow for so long, and leaders leave, milliseconds;
const PATIENCE_MS: u64 = 1_000;
/// and after so long those that came back do, milliseconds.
const PAUSE_MS: u64 = 10_000;

/// How slow the log's device is.
#[derive(Debug, Default)]
pub(super) struct Slow {
    flights: SmallVec<[(WriteId, Instant); 4]>,
    /// Running average of log writes, nanoseconds.
    average: u64,
    /// Slow since then.
    since: Option<Instant>,
    left_at: Option<Instant>,
}

impl Slow {
    /// A log write leaves.
    pub(super) fn started(&mut self, now: Instant, id: WriteId) {
        self.flights.push((id, now));
    }

    /// A log write completed.
    pub(super) fn done(&mut self, now: Instant, id: WriteId) {
        if let Some(at) = self.flights.iter().position(|flight| flight.0 == id) {
            let (_, start) = self.flights.remove(at);
            self.average = (self.average * 7 + now.since_ns(start)) / 8;
        }
    }

    /// Time has passed. A write that does not come back counts for what it has taken so far.
    fn observe(&mut self, now: Instant, timeout_ns: u64) {
        let oldest = self.flights.first().map_or(0, |flight| now.since_ns(flight.1));
        let cost = self.average.max(oldest);
        if cost >= timeout_ns / SLOW_PART {
            self.since.get_or_insert(now);
        } else if cost <= timeout_ns / FAST_PART {
            self.since = None;
        }
    }

    /// Whether leaders shall leave now, if there are any.
    fn leave(&mut self, now: Instant) -> bool {
        let slow = self.is_slow(now);
        let rested = self.left_at.is_none_or(|left| left.after_ms(PAUSE_MS) <= now);
        if slow && rested {
            self.left_at = Some(now);
        }
        slow && rested
    }

    /// The device has been slow for a while.
    pub(super) fn is_slow(&self, now: Instant) -> bool {
        self.since.is_some_and(|since| since.after_ms(PATIENCE_MS) <= now)
    }
}

impl Shard {
    /// Hand over what is led here, if the device has become slow.
    pub(super) fn leave_slow_disk(&mut self) {
        self.slow.observe(self.now, self.config.election_ms * 1_000_000);
        self.metrics.set(Counter::SlowDisk, u64::from(self.slow.is_slow(self.now)));
        let led = self.groups.iter().filter(|(_, group)| group.raft.is_leader_ready());
        let ids: Vec<CopysetId> = led.map(|(&id, _)| id).filter(|&id| self.has_peers(id)).collect();
        if ids.is_empty() || !self.slow.leave(self.now) {
            return;
        }
        for id in ids {
            let Some(group) = self.groups.get_mut(&id) else { continue };
            if group.raft.transfer_leader(self.now.0, 0).is_ok() {
                tracing::warn!(copyset = ?id, average_ns = self.slow.average, "leadership leaves a slow disk");
                self.metrics.add(Counter::LeadersLeft, 1);
                self.mark_dirty(id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn write(slow: &mut Slow, now: &mut u64, ms: u64) -> bool {
        slow.started(Instant(*now * MS), WriteId(1));
        *now += ms;
        slow.done(Instant(*now * MS), WriteId(1));
        tick(slow, *now)
    }

    /// What a shard that leads does.
    fn tick(slow: &mut Slow, now: u64) -> bool {
        slow.observe(Instant(now * MS), 400 * MS);
        slow.leave(Instant(now * MS))
    }

    #[test]
    fn leaders_leave_when_it_is_slow_for_a_while_and_again_after_a_pause() {
        let (mut slow, mut now) = (Slow::default(), 1_000);
        assert!(!(0..50).any(|_| write(&mut slow, &mut now, 1)));
        assert!(!write(&mut slow, &mut now, 500), "one slow write is none");
        assert!(!(0..40).any(|_| write(&mut slow, &mut now, 1)));
        let began = now;
        while !write(&mut slow, &mut now, 150) {}
        assert!((1_000..4_000).contains(&(now - began)), "{}", now - began);
        let left = now;
        while !write(&mut slow, &mut now, 60) {}
        assert!(now - left >= PAUSE_MS, "between slow and fast it stays what it was");
        assert!(slow.is_slow(Instant(now * MS)));
        assert!(!(0..100).any(|_| write(&mut slow, &mut now, 1)) && !slow.is_slow(Instant(now * MS)));
    }

    #[test]
    fn a_write_that_never_comes_back_is_slow() {
        let mut slow = Slow::default();
        slow.started(Instant(0), WriteId(1));
        assert!(!tick(&mut slow, 100));
        assert!(!tick(&mut slow, 1_000));
        assert!(tick(&mut slow, 1_100));
    }
}
