//! Distribution of a value (latency, size) over the last ten to twenty seconds, and its count since start.
//!
//! Log-linear buckets: 16 per power of two, so a percentile is at most 1/16 too high. One writer, any reader; the
//! window is the difference to what the counts were one to two rotations ago, so recording costs one bucket.

use super::{bump, get};
use crate::io::Instant;
use std::sync::atomic::{AtomicU64, Ordering};

const SUB_BITS: u32 = 4;
/// Values below this have buckets of equal width.
const LINEAR_BITS: u32 = 10;
const OCTAVE_MAX: u32 = 38;
const BUCKETS: usize = ((OCTAVE_MAX - LINEAR_BITS + 2) << SUB_BITS) as usize;

fn bucket(value: u64) -> usize {
    let octave = 63 - (value | 1).leading_zeros();
    if octave < LINEAR_BITS {
        return (value >> (LINEAR_BITS - SUB_BITS)) as usize;
    }
    let octave = octave.min(OCTAVE_MAX);
    let sub = (value >> (octave - SUB_BITS)).min((2 << SUB_BITS) - 1) & ((1 << SUB_BITS) - 1);
    (((octave - LINEAR_BITS + 1) << SUB_BITS) as usize) + sub as usize
}

/// Largest value of a bucket.
fn upper(index: usize) -> u64 {
    let (group, sub) = ((index >> SUB_BITS) as u32, (index & ((1 << SUB_BITS) - 1)) as u64);
    if group == 0 {
        return ((sub + 1) << (LINEAR_BITS - SUB_BITS)) - 1;
    }
    let octave = group - 1 + LINEAR_BITS;
    (((1 << SUB_BITS) + sub + 1) << (octave - SUB_BITS)) - 1
}

fn zeros() -> Box<[AtomicU64]> {
    (0..BUCKETS).map(|_| AtomicU64::new(0)).collect()
}

/// Counts at a moment.
#[derive(Debug)]
struct Base {
    at: AtomicU64,
    sum: AtomicU64,
    max: AtomicU64,
    buckets: Box<[AtomicU64]>,
}

impl Default for Base {
    fn default() -> Self {
        Self { at: AtomicU64::new(0), sum: AtomicU64::new(0), max: AtomicU64::new(0), buckets: zeros() }
    }
}

/// The distribution of one value. See the file's head for who may call what.
#[derive(Debug)]
pub struct Recorder {
    sum: AtomicU64,
    /// Largest since the last rotation.
    max: AtomicU64,
    buckets: Box<[AtomicU64]>,
    /// At the last rotation; its `max` is that of the window before.
    recent: Base,
    /// At the rotation before.
    old: Base,
}

impl Default for Recorder {
    fn default() -> Self {
        Self {
            sum: AtomicU64::new(0),
            max: AtomicU64::new(0),
            buckets: zeros(),
            recent: Base::default(),
            old: Base::default(),
        }
    }
}

impl Recorder {
    /// Writer: one more value.
    #[inline]
    pub fn record(&self, value: u64) {
        bump(&self.sum, value);
        bump(&self.buckets[bucket(value)], 1);
        if value > get(&self.max) {
            self.max.store(value, Ordering::Relaxed);
        }
    }

    /// Writer: begin another window.
    pub fn rotate(&self, now: Instant) {
        let copy = |to: &AtomicU64, from: &AtomicU64| to.store(get(from), Ordering::Relaxed);
        copy(&self.old.at, &self.recent.at);
        copy(&self.old.sum, &self.recent.sum);
        self.recent.at.store(now.0, Ordering::Relaxed);
        copy(&self.recent.sum, &self.sum);
        copy(&self.recent.max, &self.max);
        self.max.store(0, Ordering::Relaxed);
        for ((now, recent), old) in self.buckets.iter().zip(&self.recent.buckets).zip(&self.old.buckets) {
            copy(old, recent);
            copy(recent, now);
        }
    }
}

/// Quantiles brpc shows, in thousandths of a percent.
pub const QUANTILES: [(&str, f64); 5] = [("80", 0.8), ("90", 0.9), ("99", 0.99), ("999", 0.999), ("9999", 0.9999)];

/// What a reader sees of one or more recorders.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Summary {
    /// Values since start.
    pub count: u64,
    /// Values a second in the window.
    pub per_second: u64,
    /// Mean of the window.
    pub mean: u64,
    /// Largest of the window.
    pub max: u64,
    /// Upper bounds of [`QUANTILES`] in the window.
    pub quantiles: [u64; 5],
}

impl Summary {
    /// Merge recorders (the same one of each shard).
    pub fn of<'a>(recorders: impl Iterator<Item = &'a Recorder>, now: Instant) -> Self {
        let mut window = [0u64; BUCKETS];
        let mut summary = Self::default();
        let (mut sum, mut since) = (0u64, u64::MAX);
        for recorder in recorders {
            for ((slot, now), old) in window.iter_mut().zip(&recorder.buckets).zip(&recorder.old.buckets) {
                summary.count += get(now);
                *slot += get(now).saturating_sub(get(old));
            }
            sum = sum.wrapping_add(get(&recorder.sum).wrapping_sub(get(&recorder.old.sum)));
            summary.max = summary.max.max(get(&recorder.max)).max(get(&recorder.recent.max));
            since = since.min(get(&recorder.old.at));
        }
        let values: u64 = window.iter().sum();
        if values == 0 {
            return Self { max: 0, ..summary };
        }
        let elapsed_ns = now.0.saturating_sub(since).max(1);
        summary.per_second =
            u64::try_from(u128::from(values) * 1_000_000_000 / u128::from(elapsed_ns)).unwrap_or(u64::MAX);
        summary.mean = sum / values;
        for (slot, (_, quantile)) in summary.quantiles.iter_mut().zip(QUANTILES) {
            *slot = at_quantile(&window, values, quantile).min(summary.max);
        }
        summary
    }
}

fn at_quantile(window: &[u64], values: u64, quantile: f64) -> u64 {
    let rank = ((values as f64 * quantile).ceil() as u64).clamp(1, values);
    let mut seen = 0;
    for (index, count) in window.iter().enumerate() {
        seen += count;
        if seen >= rank {
            return upper(index);
        }
    }
    u64::MAX
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_bucket_holds_its_values(value in 0u64..1 << 40) {
            let index = bucket(value);
            prop_assert!(index < BUCKETS);
            if value < 1 << OCTAVE_MAX {
                prop_assert!(value <= upper(index));
                prop_assert!(upper(index) - value <= (value >> SUB_BITS).max(63));
                prop_assert!(index == 0 || upper(index - 1) < value);
            }
        }
    }

    #[test]
    fn huge_values_stay_in_range() {
        let recorder = Recorder::default();
        recorder.record(u64::MAX);
        let summary = Summary::of([&recorder].into_iter(), Instant(1));
        assert_eq!((summary.count, summary.max), (1, u64::MAX));
    }

    #[test]
    fn the_window_forgets_after_two_rotations_but_the_count_does_not() {
        let recorder = Recorder::default();
        (1..=1000).for_each(|us| recorder.record(us * 1000));
        let seen = Summary::of([&recorder].into_iter(), Instant(1_000_000_000));
        assert_eq!((seen.count, seen.per_second, seen.max), (1000, 1000, 1_000_000));
        assert!((490_000..=510_000).contains(&seen.mean));
        assert!((800_000..=850_000).contains(&seen.quantiles[0]), "{seen:?}");
        recorder.rotate(Instant(10_000_000_000));
        assert_eq!(Summary::of([&recorder].into_iter(), Instant(11_000_000_000)).max, 1_000_000);
        recorder.rotate(Instant(20_000_000_000));
        let later = Summary::of([&recorder].into_iter(), Instant(21_000_000_000));
        assert_eq!((later.count, later.per_second, later.max, later.mean), (1000, 0, 0, 0));
    }
}
