//! A replica's clocks: how long it has waited, and until when it owes a leader silence.
//!
//! Two kinds of time. **Waiting** (elections, heartbeats, check-quorum) is counted in ticks that were received, each
//! worth what passed since the one before but no more than a heartbeat: a process that was paused did not wait, it
//! was not there, and acts as if it had just fallen asleep (rule 17). **Promises** (the lease, refusing votes) are
//! compared with the clock, which goes on while the process is paused (rule 18).
//!
//! All waiting, and no promise, is longer while the copyset is idle (`group/idle.rs`).

use crate::config::{Config, IDLE_FACTOR};

/// A leader that is heard by a quorum, and commits nothing of what waits for so many T, lets another one try.
const STUCK_TIMEOUTS: u64 = 10;

/// What a tick asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Due {
    pub(crate) election: bool,
    pub(crate) heartbeat: bool,
    pub(crate) check_quorum: bool,
    /// Nothing was committed for long, though something waits.
    pub(crate) stuck: bool,
}

/// See the module's comment.
#[derive(Debug)]
pub(crate) struct Time {
    /// Newest time seen.
    now: u64,
    /// The last tick, and what the longest one may count.
    ticked: u64,
    tick_max: u64,
    heartbeat_ns: u64,
    timeout_ns: u64,
    /// Waited for an election, and how long to wait.
    waited: u64,
    wait: u64,
    since_heartbeat: u64,
    since_check: u64,
    since_commit: u64,
    /// Waiting takes [`IDLE_FACTOR`] times as long.
    idle: bool,
    /// Elections in vain since a leader was heard.
    pub(crate) attempts: u32,
    /// Votes are refused until T after this.
    silent_from: Option<u64>,
}

impl Time {
    /// `fresh`: this replica cannot have promised anything in an earlier life.
    pub(crate) fn new(config: &Config, now: u64, fresh: bool) -> Self {
        Self {
            now,
            ticked: now,
            tick_max: config.heartbeat_ns,
            heartbeat_ns: config.heartbeat_ns,
            timeout_ns: config.election_timeout_ns,
            waited: 0,
            wait: config.election_timeout_ns,
            since_heartbeat: 0,
            since_check: 0,
            since_commit: 0,
            idle: false,
            attempts: 0,
            silent_from: (!fresh).then_some(now),
        }
    }

    /// Newest time seen. A clock does not go back; if one is passed that did, the newest stands.
    pub(crate) fn now(&self) -> u64 {
        self.now
    }

    pub(crate) fn advance(&mut self, now: u64) {
        self.now = self.now.max(now);
    }

    /// A tick; what it makes due is due once.
    pub(crate) fn tick(&mut self, now: u64) -> Due {
        self.advance(now);
        let passed = self.now.saturating_sub(self.ticked).min(self.tick_max);
        self.ticked = self.now;
        self.waited += passed;
        self.since_heartbeat += passed;
        self.since_check += passed;
        self.since_commit += passed;
        let longer = if self.idle { IDLE_FACTOR } else { 1 };
        let heartbeat = self.since_heartbeat >= self.heartbeat_ns * longer;
        let check_quorum = self.since_check >= self.timeout_ns * longer;
        self.since_heartbeat *= u64::from(!heartbeat);
        self.since_check *= u64::from(!check_quorum);
        let stuck = self.since_commit >= self.timeout_ns * STUCK_TIMEOUTS;
        Due { election: self.waited >= self.wait * longer, heartbeat, check_quorum, stuck }
    }

    /// Waiting for an election begins anew.
    pub(crate) fn restart(&mut self, wait: u64) {
        (self.waited, self.wait) = (0, wait);
    }

    /// So does a leader's waiting.
    pub(crate) fn restart_leader(&mut self) {
        (self.since_heartbeat, self.since_check) = (0, 0);
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.idle
    }

    /// Wait for longer, or no longer for longer.
    pub(crate) fn set_idle(&mut self, idle: bool) {
        self.idle = idle;
    }

    /// A heartbeat is due at the next tick.
    pub(crate) fn beat_soon(&mut self) {
        self.since_heartbeat = self.heartbeat_ns;
    }

    /// A leader's entries are committed, or it has none that wait.
    pub(crate) fn committed(&mut self) {
        self.since_commit = 0;
    }

    /// A heartbeat leaves now.
    pub(crate) fn beaten(&mut self) {
        self.since_heartbeat = 0;
    }

    /// A leader was heard, or heard by a quorum, at `when`.
    pub(crate) fn heard(&mut self, when: u64) {
        self.silent_from = self.silent_from.max(Some(when));
        (self.waited, self.attempts) = (0, 0);
    }

    /// Nobody, not even this replica itself, gets its vote now.
    pub(crate) fn refuses_votes(&self) -> bool {
        self.silent_from.is_some_and(|from| self.now < from.saturating_add(self.timeout_ns))
    }

    /// No leader was ever heard, and in no earlier life either.
    pub(crate) fn never_led(&self) -> bool {
        self.silent_from.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use raftlog::CopysetId;

    fn time(fresh: bool) -> Time {
        let config = Config::new(CopysetId(1), 1, 0).with_election_timeout(1000);
        Time::new(&config, 5000, fresh)
    }

    #[test]
    fn a_pause_counts_as_a_heartbeat() {
        let mut time = time(true);
        time.restart(1000);
        for now in (5100..5900).step_by(100) {
            assert!(!time.tick(now).election);
        }
        let due = time.tick(60_000);
        assert_eq!(due, Due { election: true, heartbeat: true, check_quorum: true, stuck: false });
        time.restart(1000);
        assert_eq!(time.tick(90_000), Due { heartbeat: true, ..Due::default() }, "but no election: 200 passed");
        let dues = (1..=10).filter(|i| time.tick(90_000 + i * 100).election).count();
        assert_eq!(dues, 3, "from 800 more on");
    }

    #[test]
    fn an_idle_copyset_waits_longer_and_promises_the_same() {
        let mut time = time(false);
        time.restart(1000);
        time.set_idle(true);
        time.heard(5000);
        let ticks = |time: &mut Time, from: u64| {
            (1..=20).map(|i| time.tick(from + i * 100)).fold([0, 0, 0], |[e, h, c], due| {
                [e + usize::from(due.election), h + usize::from(due.heartbeat), c + usize::from(due.check_quorum)]
            })
        };
        assert_eq!(ticks(&mut time, 5000), [0, 1, 0], "a heartbeat in 1600 instead of 200");
        assert!(!time.refuses_votes(), "2000 after the leader was heard");
        time.set_idle(false);
        assert_eq!(time.tick(7100), Due { election: true, heartbeat: true, check_quorum: true, stuck: false });
        time.beat_soon();
        assert!(time.tick(7100).heartbeat);
    }

    #[test]
    fn silence_is_owed_by_the_clock() {
        let mut time = time(false);
        assert!(time.refuses_votes() && !time.never_led());
        time.advance(5999);
        assert!(time.refuses_votes(), "T after its own start");
        time.advance(6000);
        assert!(!time.refuses_votes());
        time.heard(5500);
        assert!(time.refuses_votes());
        time.advance(6500);
        assert!(!time.refuses_votes());
        time.advance(0);
        assert_eq!(time.now(), 6500);
    }

    #[test]
    fn a_fresh_replica_owes_nothing() {
        let mut time = time(true);
        assert!(!time.refuses_votes() && time.never_led());
        time.heard(5000);
        assert!(time.refuses_votes() && !time.never_led());
    }
}
