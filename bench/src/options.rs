//! What `bench rpc` and `bench nebd` have in common: the options of a load, and what they make of the measured phase.

use crate::engine::Check;
use crate::plan::{Pace, Pattern, Rng, Source, parse_mix, parse_size};
use crate::stamp::{BLOCK, mix};
use crate::stats::Stats;
use anyhow::{Result, bail};
use std::path::PathBuf;

pub(crate) const SECOND: u64 = 1_000_000_000;
/// An open loop stops starting (and lets latency show it) beyond this many unanswered requests per worker.
const OPEN_INFLIGHT_MAX: usize = 4096;

/// Options of a load, wherever it goes.
#[derive(Debug, Clone, clap::Args)]
pub struct Load {
    /// Bytes used of everything together; default all.
    #[arg(long, value_parser = parse_size)]
    pub span: Option<u64>,
    /// Bytes per request.
    #[arg(long, value_parser = parse_size, default_value = "4k")]
    pub bs: u64,
    /// Closed loop: requests in flight, all workers together.
    #[arg(long, default_value_t = 64, conflicts_with = "rate")]
    pub depth: usize,
    /// Open loop: requests per second; latency counts from the intended start.
    #[arg(long, value_name = "IOPS")]
    pub rate: Option<f64>,
    /// Workers, each a thread with connections of its own.
    #[arg(long, default_value_t = 1)]
    pub threads: usize,
    /// Percent of reads and of writes, as READ:WRITE.
    #[arg(long, default_value = "0:100")]
    pub mix: String,
    /// Order of requests.
    #[arg(long, value_enum, default_value = "random")]
    pub pattern: Pattern,
    /// Seconds before measuring starts.
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    pub warmup: f64,
    /// Seconds measured.
    #[arg(long, default_value_t = 10.0)]
    pub seconds: f64,
    /// Measure this many requests instead (no warm-up).
    #[arg(long)]
    pub ops: Option<u64>,
    /// Stamp every block written, judge every block read, and read everything written at the end.
    #[arg(long)]
    pub verify: bool,
    /// Only read and judge what the state file says, and settle what was unanswered (after a restart of the server).
    #[arg(long, requires = "state")]
    pub verify_only: bool,
    /// Remember what was written here; an existing file is continued.
    #[arg(long, value_name = "FILE")]
    pub state: Option<PathBuf>,
    /// Write the whole span once before.
    #[arg(long)]
    pub fill: bool,
    /// Seconds without any answer after which open requests are left unanswered.
    #[arg(long, value_name = "SECONDS", default_value_t = 30.0)]
    pub give_up: f64,
    /// Seed of everything random.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Process of the server; found by its address if it is local.
    #[arg(long, value_name = "PID")]
    pub server_pid: Option<u32>,
    /// A path on the server's disk, to count its device writes.
    #[arg(long, value_name = "PATH")]
    pub disk: Option<PathBuf>,
    /// Write the results to this file as JSON.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

impl Load {
    /// Whether these can be done at all; the percentage of reads.
    pub(crate) fn check(&self) -> Result<u32> {
        if self.threads == 0 || self.depth == 0 {
            bail!("--threads and --depth must not be 0");
        }
        if self.bs == 0 || !self.bs.is_multiple_of(BLOCK as u64) {
            bail!("--bs must be a multiple of 4096");
        }
        if self.rate.is_some_and(|rate| !rate.is_finite() || rate <= 0.0) {
            bail!("--rate must be above 0");
        }
        parse_mix(&self.mix)
    }

    /// What becomes of the blocks of a phase that loads or fills.
    pub(crate) fn judging(&self) -> Check {
        if self.verify { Check::Judge } else { Check::Off }
    }

    /// When measuring begins and ends, nanoseconds from the start of the phase.
    pub(crate) fn window(&self) -> (u64, u64) {
        let nanos = |seconds: f64| (seconds * SECOND as f64) as u64;
        match self.ops {
            Some(_) => (0, u64::MAX),
            None => (nanos(self.warmup), nanos(self.warmup + self.seconds)),
        }
    }

    /// Requests of a worker that may be unanswered.
    pub(crate) fn inflight_max(&self) -> usize {
        if self.rate.is_some() { OPEN_INFLIGHT_MAX } else { usize::MAX }
    }

    /// See `--give-up`, nanoseconds.
    pub(crate) fn give_up_ns(&self) -> u64 {
        (self.give_up * SECOND as f64) as u64
    }

    /// One worker's part of the measured phase: what it asks, how fast, and how often.
    pub(crate) fn part(&self, worker: usize, workers: usize, read_percent: u32) -> (Source, Pace, u64) {
        let rng = Rng::new(self.seed ^ mix(worker as u64));
        let source = Source::Load { pattern: self.pattern, read_percent, size: self.bs as u32, cursor: 0, rng };
        let share = |total: usize| total / workers + usize::from(worker < total % workers);
        let pace = self.rate.map_or(Pace::Closed(share(self.depth).max(1)), |rate| Pace::open(rate / workers as f64));
        (source, pace, self.ops.map_or(u64::MAX, |ops| share(ops as usize) as u64))
    }

    /// Seconds that were measured, of a phase that took `length` nanoseconds.
    pub(crate) fn measured(&self, stats: &Stats, length: u64) -> f64 {
        let (from, until) = self.window();
        let ns = if self.ops.is_some() { stats.last_answer } else { length.min(until).saturating_sub(from) };
        ns as f64 / SECOND as f64
    }
}
