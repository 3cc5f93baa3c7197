//! Results for people and as JSON.

use crate::model::Survival;
use crate::observe::Delta;
use crate::stats::{OpStats, Stats};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// One kind of operation in numbers; latencies in microseconds.
#[derive(Debug, Clone, Default, Serialize)]
pub struct OpReport {
    /// Operations answered in the measured time.
    pub ops: u64,
    /// Per second.
    pub iops: f64,
    /// Million bytes per second.
    pub mbps: f64,
    /// Mean latency.
    pub mean_us: f64,
    /// Median.
    pub p50_us: f64,
    /// 90th percentile.
    pub p90_us: f64,
    /// 99th percentile.
    pub p99_us: f64,
    /// 99.9th percentile.
    pub p999_us: f64,
    /// Longest.
    pub max_us: f64,
}

impl OpReport {
    fn new(stats: &OpStats, seconds: f64) -> Self {
        let quantile = |q: f64| stats.latency.value_at_quantile(q) as f64 / 1000.0;
        let per_second = |count: u64| if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
        Self {
            ops: stats.ops,
            iops: per_second(stats.ops),
            mbps: per_second(stats.bytes) / 1e6,
            mean_us: stats.latency.mean() / 1000.0,
            p50_us: quantile(0.5),
            p90_us: quantile(0.9),
            p99_us: quantile(0.99),
            p999_us: quantile(0.999),
            max_us: stats.latency.max() as f64 / 1000.0,
        }
    }
}

/// Everything a run of `bench rpc` or `bench nebd` found. Numbers that could not be measured are absent.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// Measured seconds.
    pub seconds: f64,
    /// Reads.
    pub read: OpReport,
    /// Writes.
    pub write: OpReport,
    /// Reads and writes together.
    pub total: OpReport,
    /// Server CPU per operation, in microseconds.
    pub server_cpu_us_per_op: Option<f64>,
    /// Server's `io_uring_enter` calls per operation.
    pub syscalls_per_op: Option<f64>,
    /// Device writes per write.
    pub device_writes_per_write: Option<f64>,
    /// Bytes written to the device per byte written by the client.
    pub write_amplification: Option<f64>,
    /// CPU of this client per operation, in microseconds.
    pub client_cpu_us_per_op: Option<f64>,
    /// What was observed of the server.
    pub observed: Delta,
    /// Requests refused for good.
    pub failed: u64,
    /// Requests never answered.
    pub unanswered: u64,
    /// Attempts after the first.
    pub retries: u64,
    /// Attempts that timed out.
    pub timeouts: u64,
    /// Connections that broke.
    pub disconnects: u64,
    /// Replies that came too late.
    pub late_replies: u64,
    /// Bad statuses and RPC errors by name.
    pub statuses: BTreeMap<String, u64>,
    /// Blocks read and judged, final check included.
    pub checked_blocks: u64,
    /// Wrong blocks.
    pub verify_errors: u64,
    /// The first wrong blocks in words.
    pub verify_examples: Vec<String>,
    /// Of a check after a restart: unanswered writes found.
    pub unanswered_survived: Option<u64>,
    /// … not found though nothing newer was.
    pub unanswered_vanished: Option<u64>,
    /// … below a newer write.
    pub unanswered_hidden: Option<u64>,
}

impl Report {
    /// Of a load; `side` are the counts of the phases around it.
    pub fn load(load: Stats, side: Stats, seconds: f64, observed: Delta) -> Self {
        let mut all = load.reads.clone();
        all.add(&load.writes);
        let per = |value: Option<f64>, count: u64| value.filter(|_| count > 0).map(|value| value / count as f64);
        let mut report = Self {
            seconds,
            read: OpReport::new(&load.reads, seconds),
            write: OpReport::new(&load.writes, seconds),
            total: OpReport::new(&all, seconds),
            server_cpu_us_per_op: per(observed.server_cpu_us.map(|us| us as f64), all.ops),
            syscalls_per_op: per(observed.server_syscalls, all.ops),
            device_writes_per_write: per(observed.disk_writes.map(|count| count as f64), load.writes.ops),
            write_amplification: per(observed.disk_write_bytes.map(|bytes| bytes as f64), load.writes.bytes),
            client_cpu_us_per_op: per(observed.client_cpu_us.map(|us| us as f64), all.ops),
            observed,
            ..Self::default()
        };
        let mut counts = load;
        counts.add_counts(side);
        report.take_counts(counts);
        report
    }

    /// Of a check after a restart.
    pub fn check_only(stats: Stats, survival: Survival) -> Self {
        let mut report = Self {
            unanswered_survived: Some(survival.survived),
            unanswered_vanished: Some(survival.vanished),
            unanswered_hidden: Some(survival.hidden),
            ..Self::default()
        };
        report.take_counts(stats);
        report
    }

    fn take_counts(&mut self, stats: Stats) {
        self.failed = stats.failed;
        self.unanswered = stats.unanswered;
        self.retries = stats.retries;
        self.timeouts = stats.timeouts;
        self.disconnects = stats.disconnects;
        self.late_replies = stats.late_replies;
        self.statuses = stats.statuses.into_iter().map(|(name, count)| (name.into_owned(), count)).collect();
        self.checked_blocks = stats.checked_blocks;
        self.verify_errors = stats.verify_errors;
        self.verify_examples = stats.examples;
    }

    /// True if no block was wrong.
    pub const fn is_clean(&self) -> bool {
        self.verify_errors == 0
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kinds = [("read", &self.read), ("write", &self.write), ("total", &self.total)];
        if self.total.ops > 0 {
            writeln!(
                f,
                "{:<6} {:>9} {:>9} {:>9} | {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}  (µs)",
                "", "ops", "IOPS", "MB/s", "mean", "p50", "p90", "p99", "p99.9", "max"
            )?;
        }
        for (name, op) in kinds.into_iter().filter(|(_, op)| op.ops > 0) {
            write!(f, "{name:<6} {:>9} {:>9.0} {:>9.1} |", op.ops, op.iops, op.mbps)?;
            for value in [op.mean_us, op.p50_us, op.p90_us, op.p99_us, op.p999_us, op.max_us] {
                write!(f, " {value:>9.0}")?;
            }
            writeln!(f)?;
        }
        let per_op = [
            ("server CPU µs/op", self.server_cpu_us_per_op),
            ("client CPU µs/op", self.client_cpu_us_per_op),
            ("syscalls/op", self.syscalls_per_op),
            ("device writes/write", self.device_writes_per_write),
            ("write amplification", self.write_amplification),
        ];
        for (name, value) in per_op {
            if let Some(value) = value {
                writeln!(f, "{name}: {value:.2}")?;
            }
        }
        let counts = [
            ("refused", self.failed),
            ("unanswered", self.unanswered),
            ("retries", self.retries),
            ("timeouts", self.timeouts),
            ("disconnects", self.disconnects),
            ("late replies", self.late_replies),
        ];
        for (name, count) in counts.into_iter().filter(|(_, count)| *count > 0) {
            writeln!(f, "{name}: {count}")?;
        }
        for (name, count) in &self.statuses {
            writeln!(f, "status {name}: {count}")?;
        }
        if let (Some(survived), Some(vanished), Some(hidden)) =
            (self.unanswered_survived, self.unanswered_vanished, self.unanswered_hidden)
        {
            writeln!(
                f,
                "unanswered blocks: {survived} survived, {vanished} vanished, {hidden} hidden by newer writes"
            )?;
        }
        writeln!(f, "blocks read: {}, wrong: {}", self.checked_blocks, self.verify_errors)?;
        for example in &self.verify_examples {
            writeln!(f, "  WRONG {example}")?;
        }
        Ok(())
    }
}

/// Shows a phase's progress on a terminal while `running`; `total` 0 means unknown.
pub(crate) fn progress(name: &'static str, total: u64, done: &AtomicU64, running: &AtomicBool) {
    let bar = if total > 0 { ProgressBar::new(total) } else { ProgressBar::new_spinner() };
    let template = if total > 0 { "{msg} {wide_bar} {pos}/{len} {per_sec} {eta}" } else { "{msg} {pos} {per_sec}" };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_message(name);
    while running.load(Ordering::Acquire) {
        bar.set_position(done.load(Ordering::Relaxed));
        std::thread::sleep(Duration::from_millis(20));
    }
    bar.finish_and_clear();
}
