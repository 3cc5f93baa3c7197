//! Settings of a copyset, and what raft-rs is told of them.

use raftlog::CopysetId;

/// Settings of one copyset.
#[derive(Clone, Debug)]
pub struct Config {
    /// Group.
    pub id: CopysetId,
    /// This replica, as [`crate::PeerId`] packs it.
    pub peer: u64,
    /// Length of a tick, for the caller that ticks; not used here.
    pub tick_ms: u64,
    /// Ticks without a leader before an election; drawn from this up to twice this.
    pub election_ticks: usize,
    /// Ticks between heartbeats.
    pub heartbeat_ticks: usize,
    /// Payload bytes of one append message to a peer, and of one round of committed entries.
    pub max_batch_bytes: u64,
    /// Append messages in flight to one peer.
    pub max_in_flight: usize,
    /// Proposals not yet committed.
    pub max_waiting: usize,
    /// Bytes of proposals not yet committed.
    pub max_waiting_bytes: usize,
    /// For election timeouts; the same seed, the same run.
    pub seed: u64,
}

impl Config {
    /// With the defaults: Curve's election timeout of 1 s as 10 ticks, a heartbeat every 3.
    #[must_use]
    pub const fn new(id: CopysetId, peer: u64, seed: u64) -> Self {
        Self {
            id,
            peer,
            tick_ms: 100,
            election_ticks: 10,
            heartbeat_ticks: 3,
            max_batch_bytes: 1 << 20,
            max_in_flight: 16,
            max_waiting: 5000,
            max_waiting_bytes: 64 << 20,
            seed,
        }
    }
}

/// For raft-rs. `check_quorum` and `pre_vote` are not optional: leases and calm restarts rest on them.
pub(crate) fn raft_config(config: &Config, applied: u64) -> raft::Config {
    raft::Config {
        id: config.peer,
        election_tick: config.election_ticks,
        heartbeat_tick: config.heartbeat_ticks,
        applied,
        max_size_per_msg: config.max_batch_bytes,
        max_inflight_msgs: config.max_in_flight,
        check_quorum: true,
        pre_vote: true,
        max_committed_size_per_ready: config.max_batch_bytes,
        ..raft::Config::default()
    }
}

/// raft-rs's own log lines repeat what the effects say.
pub(crate) fn quiet() -> slog::Logger {
    slog::Logger::root(slog::Discard, slog::o!())
}
