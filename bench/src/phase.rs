//! A phase of a benchmark: workers on threads of their own, and somebody who looks on meanwhile.

use crate::stats::Stats;
use anyhow::{Result, anyhow, bail};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Requests of this size fill and check: the largest a C++ client sends.
pub(crate) const SWEEP_SIZE: u32 = 64 << 10;
pub(crate) const SWEEP_DEPTH: usize = 64;

/// Runs all workers to their ends; `during` runs on this thread meanwhile, and is told when they are done.
pub(crate) fn run<R: Send, T>(
    workers: Vec<impl FnOnce() -> R + Send>,
    during: impl FnOnce(&AtomicBool) -> T,
) -> Result<(Vec<R>, T)> {
    let running = AtomicBool::new(true);
    let (results, seen) = std::thread::scope(|scope| {
        let handles: Vec<_> = workers.into_iter().map(|worker| scope.spawn(worker)).collect();
        let running = &running;
        let watcher = scope.spawn(move || {
            let results: Vec<_> = handles.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
            running.store(false, Ordering::Release);
            results
        });
        let seen = during(running);
        (watcher.join(), seen)
    });
    let panicked = |_| anyhow!("a worker panicked");
    let results = results.map_err(panicked)?.into_iter().collect::<std::thread::Result<_>>();
    Ok((results.map_err(panicked)?, seen))
}

/// The counts of a phase that must not leave anything undone.
pub(crate) fn complete(phase: &str, stats: Stats) -> Result<Stats> {
    if stats.unanswered + stats.failed > 0 {
        bail!("{phase}: {} requests refused, {} unanswered: {:?}", stats.failed, stats.unanswered, stats.statuses);
    }
    Ok(stats)
}

/// Sleeps until `nanos` after `epoch`, or until the workers are done.
pub(crate) fn wait_until(epoch: Instant, nanos: u64, running: &AtomicBool) {
    while running.load(Ordering::Acquire) {
        let left = Duration::from_nanos(nanos).saturating_sub(epoch.elapsed());
        if left.is_zero() {
            return;
        }
        std::thread::sleep(left.min(Duration::from_millis(20)));
    }
}
