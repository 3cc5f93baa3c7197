//! Settings of a copyset, and what raft-rs is told of them.

use raftlog::CopysetId;

/// Settings of one copyset. Times are nanoseconds of the clock its caller passes in.
#[derive(Clone, Debug)]
pub struct Config {
    /// Group.
    pub id: CopysetId,
    /// This replica, as [`crate::PeerId`] packs it.
    pub peer: u64,
    /// T: a follower that hears nothing from a leader campaigns after T to 1.5 T; a leader without its quorum steps
    /// down after T to 2 T. The same on all replicas of a copyset: leases rest on it.
    pub election_timeout_ns: u64,
    /// Between two heartbeats of a leader; each starts a lease round.
    pub heartbeat_ns: u64,
    /// A copyset that nobody used for so long becomes idle: its heartbeats are rare, see [`IDLE_FACTOR`].
    pub idle_after_ns: u64,
    /// Payload bytes of one append message to a peer. A single entry larger than this travels alone.
    pub max_message_bytes: u64,
    /// Append messages in flight to one peer.
    pub max_in_flight: usize,
    /// Append bytes in flight to one peer; exceeded by less than one message.
    pub window_bytes: u64,
    /// Payload bytes of one round of committed entries, and of one fetch from the log.
    pub max_batch_bytes: u64,
    /// Proposals not yet committed.
    pub max_waiting: usize,
    /// Bytes of proposals not yet committed.
    pub max_waiting_bytes: usize,
    /// A learner becomes a voter when it lacks no more entries than this.
    pub catch_up_entries: u64,
    /// A membership change is given up when a learner made no progress for so long.
    pub catch_up_idle_ns: u64,
    /// The log lost records that may have been this copyset's (rule 21): see `Copyset::suspect_until`. Checkpoints say so
    /// until it has caught up, so that it starts as suspect again when the loss itself cannot be seen any more.
    pub suspect: bool,
    /// For election timeouts; the same seed, the same run.
    pub seed: u64,
}

const MS: u64 = 1_000_000;

/// Heartbeats, elections and check-quorum of an idle copyset take so many times as long.
pub const IDLE_FACTOR: u64 = 8;

impl Config {
    /// With the defaults: T of 400 ms, a heartbeat every fifth of it, idle after 25 T.
    #[must_use]
    pub const fn new(id: CopysetId, peer: u64, seed: u64) -> Self {
        Self {
            id,
            peer,
            election_timeout_ns: 400 * MS,
            heartbeat_ns: 80 * MS,
            idle_after_ns: 10_000 * MS,
            max_message_bytes: 256 << 10,
            max_in_flight: 128,
            window_bytes: 8 << 20,
            max_batch_bytes: 1 << 20,
            max_waiting: 5000,
            max_waiting_bytes: 64 << 20,
            catch_up_entries: 1000,
            catch_up_idle_ns: 30_000 * MS,
            suspect: false,
            seed,
        }
    }

    /// With another T, a heartbeat every fifth of it, idle after 25 of it.
    #[must_use]
    pub const fn with_election_timeout(mut self, ns: u64) -> Self {
        (self.election_timeout_ns, self.heartbeat_ns, self.idle_after_ns) = (ns, ns / 5, 25 * ns);
        self
    }

    /// How often to call `Copyset::tick`, T/20: followers that lost a leader differ in how long they wait by up to T/2,
    /// and should not meet on the same tick. A later call makes elections later, nothing else.
    #[must_use]
    pub const fn tick_ns(&self) -> u64 {
        self.heartbeat_ns / 4
    }

    /// Append messages that fill the window if each is as long as it may be.
    pub(crate) fn messages_at_once(&self) -> usize {
        let full = usize::try_from(self.window_bytes / self.max_message_bytes.max(1)).unwrap_or(usize::MAX);
        full.clamp(1, self.max_in_flight)
    }

    /// A lease ends so long before the T in which voters refuse: clocks of two nodes may differ in rate by 5 %.
    #[must_use]
    pub const fn lease_margin_ns(&self) -> u64 {
        self.election_timeout_ns / 20
    }
}

/// For raft-rs. Its ticks are not used: time is the copyset's (`group/time.rs`). So is check-quorum, whose other half,
/// refusing votes while a leader is heard, raft-rs counts in ticks and a lease needs by the clock.
pub(crate) fn raft_config(config: &Config, applied: u64) -> raft::Config {
    raft::Config {
        id: config.peer,
        election_tick: 2,
        heartbeat_tick: 1,
        applied,
        max_size_per_msg: config.max_message_bytes,
        max_inflight_msgs: config.messages_at_once(),
        check_quorum: false,
        pre_vote: true,
        max_committed_size_per_ready: config.max_batch_bytes,
        ..raft::Config::default()
    }
}

/// raft-rs's own log lines repeat what the effects say.
pub(crate) fn quiet() -> slog::Logger {
    slog::Logger::root(slog::Discard, slog::o!())
}
