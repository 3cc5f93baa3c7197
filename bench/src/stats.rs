//! Counts and latency histograms of a phase, and how several workers' add up.

use hdrhistogram::Histogram;
use std::borrow::Cow;
use std::collections::BTreeMap;

/// How many wrong blocks are described; the rest is only counted.
const EXAMPLES: usize = 10;
/// Latencies are recorded up to here.
const LATENCY_MAX: u64 = 600_000_000_000;

/// One kind of operation.
#[derive(Debug, Clone)]
pub struct OpStats {
    /// Operations answered inside the measured window.
    pub ops: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Latencies in nanoseconds, of the operations whose intended start lies in the window.
    pub latency: Histogram<u64>,
}

impl Default for OpStats {
    fn default() -> Self {
        // Three digits over ten minutes: the parameters are constants hdrhistogram accepts.
        #[expect(clippy::unwrap_used, reason = "constant arguments")]
        let latency = Histogram::new_with_bounds(1, LATENCY_MAX, 3).unwrap();
        Self { ops: 0, bytes: 0, latency }
    }
}

impl OpStats {
    /// Adds another worker's.
    pub fn add(&mut self, other: &Self) {
        self.ops += other.ops;
        self.bytes += other.bytes;
        // Same bounds: nothing can be out of range.
        let _ = self.latency.add(&other.latency);
    }
}

/// Everything counted in a phase.
#[derive(Debug, Clone, Default)]
pub struct Stats {
    /// Reads.
    pub reads: OpStats,
    /// Writes.
    pub writes: OpStats,
    /// Good answers in the whole phase, warm-up included.
    pub answered: u64,
    /// Refused for good.
    pub failed: u64,
    /// Never answered.
    pub unanswered: u64,
    /// Attempts after the first.
    pub retries: u64,
    /// Attempts that timed out.
    pub timeouts: u64,
    /// Connections that broke.
    pub disconnects: u64,
    /// Replies nobody waited for any more.
    pub late_replies: u64,
    /// Bad statuses and RPC errors by name.
    pub statuses: BTreeMap<Cow<'static, str>, u64>,
    /// Blocks read (and judged, if checking was on).
    pub checked_blocks: u64,
    /// Wrong blocks.
    pub verify_errors: u64,
    /// The first of them, in words.
    pub examples: Vec<String>,
    /// When the last answer inside the window came, in nanoseconds since the phase began.
    pub last_answer: u64,
}

impl Stats {
    fn kind(&mut self, write: bool) -> &mut OpStats {
        if write { &mut self.writes } else { &mut self.reads }
    }

    pub(crate) fn record(&mut self, write: bool, nanos: u64) {
        self.kind(write).latency.saturating_record(nanos.max(1));
    }

    pub(crate) fn complete(&mut self, write: bool, bytes: u64, now: u64) {
        let kind = self.kind(write);
        kind.ops += 1;
        kind.bytes += bytes;
        self.last_answer = self.last_answer.max(now);
    }

    pub(crate) fn count(&mut self, status: Cow<'static, str>) {
        *self.statuses.entry(status).or_default() += 1;
    }

    pub(crate) fn wrong(&mut self, count: u64, example: String) {
        self.verify_errors += count;
        if self.examples.len() < EXAMPLES {
            self.examples.push(example);
        }
    }

    /// Adds another worker's, or another phase's.
    pub fn add(&mut self, other: Self) {
        self.reads.add(&other.reads);
        self.writes.add(&other.writes);
        self.add_counts(other);
    }

    /// Adds only what must never get lost (errors and verdicts), not operations and latencies.
    pub fn add_counts(&mut self, other: Self) {
        self.answered += other.answered;
        self.failed += other.failed;
        self.unanswered += other.unanswered;
        self.retries += other.retries;
        self.timeouts += other.timeouts;
        self.disconnects += other.disconnects;
        self.late_replies += other.late_replies;
        self.checked_blocks += other.checked_blocks;
        self.verify_errors += other.verify_errors;
        self.last_answer = self.last_answer.max(other.last_answer);
        for (name, count) in other.statuses {
            *self.statuses.entry(name).or_default() += count;
        }
        let room = EXAMPLES.saturating_sub(self.examples.len());
        self.examples.extend(other.examples.into_iter().take(room));
    }
}
