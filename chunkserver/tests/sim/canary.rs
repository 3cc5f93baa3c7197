//! Bugs planted between the server and its disk (rule 32): the code that ships is what runs, on an `Io` that does to it
//! what one wrong line in it would do. Each must be found. Bugs that need a wrong line inside the server are patches, in
//! `chunkserver/tests/sim/planted`; the list of all, with the seeds that find them, is docs/canaries.md.

use crate::world::Route;
use chunkserver::io::{Done, Op};

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Canary {
    /// A log write completes when it starts.
    AckBeforePersist,
    /// The log is written without dsync.
    LogWithoutDsync,
    /// Write-back does not wait for its syncs, and they do nothing.
    SyncsSkipped,
    /// Recovery believes what it reads before that is durable.
    RecoveredUnsynced,
}

impl Canary {
    /// What becomes of an operation: what the disk is told to do, for whom, and what the server is told at once. `first`:
    /// it is the first one of this shard's life.
    pub(crate) fn bend(self, route: Route, op: Op, first: bool) -> (Option<(Route, Op)>, Option<Done>) {
        // Nobody hears of an operation of a life that never was.
        let unheard = Route { life: 0, ..route };
        match (self, op) {
            (Self::AckBeforePersist, op @ Op::Write { dsync: true, .. }) => {
                (Some((unheard, op)), Some(Done::Write(Ok(()))))
            }
            (Self::LogWithoutDsync, Op::Write { file, offset, bufs, dsync: true }) => {
                (Some((route, Op::Write { file, offset, bufs, dsync: false })), None)
            }
            (Self::SyncsSkipped, Op::Sync { .. }) if !first => (None, Some(Done::Sync(Ok(())))),
            (Self::RecoveredUnsynced, Op::Sync { .. }) if first => (None, Some(Done::Sync(Ok(())))),
            (_, op) => (Some((route, op)), None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::ServerSystem;
    use crate::scenario::{Outcome, run_with};

    fn seed(seed: u64, canary: Canary) -> Outcome {
        run_with(seed, Box::new(ServerSystem::default()), Some(canary))
    }

    /// Each with a seed that finds it, which is tried first: any change of the workload may move it.
    #[test]
    fn every_planted_bug_is_found_within_200_seeds() {
        use Canary::{AckBeforePersist, LogWithoutDsync, RecoveredUnsynced, SyncsSkipped};
        for (canary, first) in [(AckBeforePersist, 3), (LogWithoutDsync, 0), (SyncsSkipped, 0), (RecoveredUnsynced, 74)]
        {
            let mut seeds = std::iter::once(first).chain(0..200);
            let found = seeds.find(|&n| !seed(n, canary).violations.is_empty());
            println!("{canary:?} found by seed {found:?}");
            assert!(found.is_some(), "{canary:?} was not found");
        }
    }
}
