//! When the next log write starts: how well commits are grouped.
//!
//! A log write costs the device one flush, however much it carries, so fewer and larger ones are faster for everybody
//! once the device is busy. Two rules, both without a knob:
//! * A second write starts beside one in flight only for [`SECOND_WRITE_BYTES`]: with less it would split a group.
//! * When a write completes, the clients it answers ask again at once, as a rule, and what they ask for joins what
//!   waited meanwhile. So the next write waits until as many entries are there as were outstanding, but at most for
//!   a quarter of the time the last write took. A client alone (queue depth 1) never waits.
//!
//! What was measured: docs/decisions/0011-grouping-log-writes.md.

use super::Shard;
use crate::io::Instant;
use raftlog::WriteId;
use smallvec::SmallVec;

/// From this many queued bytes on, two writes in flight are faster than one.
const SECOND_WRITE_BYTES: u64 = 64 << 10;
/// The longest wait for company, nanoseconds.
const HOLD_NS_MAX: u64 = 300_000;

/// What the last writes tell about the next one.
#[derive(Debug)]
pub(super) struct Pace {
    /// Writes in flight: when they started, and their records.
    flights: SmallVec<[(WriteId, Instant, u64); 2]>,
    /// Of the writes that completed since the last turn: start of the newest, records of all.
    done: Option<(Instant, u64)>,
    /// Entries that were outstanding when the last write completed.
    expected: u64,
    /// Until then the next write waits for them.
    until: Instant,
}

impl Pace {
    pub(super) fn new() -> Self {
        Self { flights: SmallVec::new(), done: None, expected: 0, until: Instant(0) }
    }

    /// A write of so many records leaves.
    pub(super) fn started(&mut self, now: Instant, id: WriteId, records: u64) {
        self.flights.push((id, now, records));
    }

    /// A write completed.
    pub(super) fn done(&mut self, id: WriteId) {
        let Some(at) = self.flights.iter().position(|flight| flight.0 == id) else { return };
        let (_, start, records) = self.flights.remove(at);
        let before = self.done.map_or(0, |done| done.1);
        self.done = Some((start, before + records));
    }

    /// A turn begins; `queued` records were waiting before it.
    pub(super) fn turn(&mut self, now: Instant, queued: u64) {
        if let Some((start, records)) = self.done.take() {
            self.expected = queued + records;
            self.until = now.after_ns((now.since_ns(start) / 4).min(HOLD_NS_MAX));
        }
    }

    fn may_start(&self, now: Instant, queued: u64, bytes: u64) -> bool {
        match self.flights.is_empty() {
            true => queued >= self.expected || now >= self.until,
            false => bytes >= SECOND_WRITE_BYTES,
        }
    }
}

impl Shard {
    /// Whether what waits for the log shall be written now.
    pub(super) fn log_write_due(&self) -> bool {
        let log = self.log.borrow();
        self.pace.may_start(self.now, log.queued_records(), log.queued_bytes())
    }

    /// When a log write that waits for company starts without it.
    pub(super) fn log_write_deadline(&self) -> Instant {
        let waits = self.pace.flights.is_empty() && self.log.borrow().queued_records() > 0;
        if waits { self.pace.until } else { Instant::FAR }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(us: u64) -> Instant {
        Instant(us * 1000)
    }

    #[test]
    fn a_client_alone_never_waits() {
        let mut pace = Pace::new();
        assert!(pace.may_start(at(0), 1, 8192));
        pace.started(at(0), WriteId(1), 1);
        pace.done(WriteId(1));
        pace.turn(at(400), 0);
        assert!(pace.may_start(at(401), 1, 8192), "as many as before");
    }

    #[test]
    fn a_group_is_waited_for_but_not_for_long() {
        let mut pace = Pace::new();
        pace.started(at(0), WriteId(1), 20);
        assert!(!pace.may_start(at(100), 12, 48 << 10), "a second write would split the group");
        assert!(pace.may_start(at(100), 16, SECOND_WRITE_BYTES), "unless it is large");
        pace.done(WriteId(1));
        pace.turn(at(400), 12);
        assert!(!pace.may_start(at(450), 31, 124 << 10), "one of 32 is missing");
        assert!(pace.may_start(at(450), 32, 128 << 10));
        assert!(pace.may_start(at(500), 13, 52 << 10), "a quarter of 400 us is over");
        pace.started(at(500), WriteId(2), 13);
        pace.done(WriteId(2));
        pace.turn(at(90_500), 0);
        assert!(!pace.may_start(at(90_700), 1, 4096));
        assert!(pace.may_start(at(90_800), 1, 4096), "never longer than HOLD_NS_MAX");
    }
}
