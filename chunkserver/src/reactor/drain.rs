//! Stopping in good order: no new work, the work in flight answered, the log sealed; within a bounded time.

use super::Reactor;
use crate::io::{Instant, Io};

/// After this the shard stops whatever is still unanswered, milliseconds.
const PATIENCE_MS: u64 = 600;

/// Where the stop is.
#[derive(Debug)]
pub(super) struct Drain {
    until: Instant,
    reported: bool,
}

impl<I: Io> Reactor<I> {
    pub(super) fn drain_step(&mut self) {
        let now = self.io.now();
        if self.draining.is_none() {
            if !self.context.is_draining() {
                return;
            }
            tracing::info!(shard = self.number, "draining");
            self.draining = Some(Drain { until: now.after_ms(PATIENCE_MS), reported: false });
        }
        let answered = self.is_quiet() && self.conns.iter().all(|(_, c)| c.is_quiet());
        let Some(drain) = &mut self.draining else { return };
        if (answered || drain.until <= now) && !std::mem::replace(&mut drain.reported, true) {
            self.setup.shared.shard_quiet();
        }
        // Another shard may still have requests for ours: all of them are quiet, or time is up.
        if self.setup.shared.all_quiet() || drain.until.after_ms(PATIENCE_MS / 4) <= now {
            self.shard.drain();
        }
    }
}
