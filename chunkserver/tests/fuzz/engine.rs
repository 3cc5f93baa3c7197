//! The engine: runs a target on inputs 0, 1, 2, ... of a seed, each made from (seed, index) alone.
//!
//! After every input: no panic (the hook says how to replay it), no more heap than the target allows, and no growth: what
//! lives after a reset of the target is what lived after the first one, give or take [`SLACK`].

use crate::heap;
use std::time::{Duration, Instant};

/// Bytes that may live on after a reset (buffers that a library keeps).
const SLACK: isize = 1 << 20;
/// An input that takes longer than this did unbounded work (or the machine was asleep).
const SLOW: Duration = Duration::from_secs(20);

/// Something that takes hostile bytes.
pub(crate) trait Target {
    /// One input, made with `rng`. True if it was taken for valid as far as the target can tell: a share of nothing or of
    /// everything means that the inputs are not worth much.
    fn input(&mut self, rng: &mut Rng) -> bool;
    /// Forget what earlier inputs did. Called every [`Spec::every`] inputs.
    fn reset(&mut self) {}
}

/// A target and its bounds.
#[derive(Clone, Copy)]
pub(crate) struct Spec {
    pub(crate) name: &'static str,
    pub(crate) make: fn() -> Box<dyn Target>,
    /// Inputs in `cargo test`.
    pub(crate) smoke: u64,
    /// Inputs between resets; a replay starts at the last one.
    pub(crate) every: u64,
    /// Bytes one input may have live at most.
    pub(crate) heap_max: usize,
    /// Share of the time of `scripts/fuzz all`.
    pub(crate) weight: u64,
}

/// What a run did.
#[derive(Default)]
pub(crate) struct Stats {
    pub(crate) inputs: u64,
    pub(crate) accepted: u64,
    pub(crate) peak: isize,
    pub(crate) slowest: (Duration, u64),
    pub(crate) allocations: (u64, u64),
}

/// Runs inputs from `first` on until `stop` says so (asked every [`Spec::every`] inputs).
pub(crate) fn run(spec: &Spec, seed: u64, first: u64, mut stop: impl FnMut(u64) -> bool) -> Stats {
    hook();
    let mut target = (spec.make)();
    let mut stats = Stats::default();
    let (mut index, mut settled) = (first / spec.every * spec.every, None);
    while !stop(index) {
        target.reset();
        let base = heap::live();
        let settled = *settled.get_or_insert(base);
        assert!(base <= settled + SLACK, "{}: {settled} bytes have become {base} by input {index}", spec.name);
        for _ in 0..spec.every {
            one(spec, &mut *target, seed, index, &mut stats);
            index += 1;
        }
    }
    stats
}

fn one(spec: &Spec, target: &mut dyn Target, seed: u64, index: u64, stats: &mut Stats) {
    heap::at(spec.name, seed, index);
    let (before, count, started) = (heap::mark(), heap::count(), Instant::now());
    let accepted = target.input(&mut Rng::of(seed, index));
    let (peak, count, took) = (heap::peak() - before, heap::count() - count, started.elapsed());
    assert!(peak <= spec.heap_max as isize, "one input made {peak} bytes live");
    assert!(took < SLOW, "one input took {took:?}");
    stats.inputs += 1;
    stats.accepted += u64::from(accepted);
    stats.peak = stats.peak.max(peak);
    stats.slowest = stats.slowest.max((took, index));
    stats.allocations = stats.allocations.max((count, index));
}

/// A panic says which input it was.
fn hook() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let (name, seed, index) = heap::place();
            if !name.is_empty() {
                eprintln!("FAIL {name} seed {seed} input {index}: scripts/fuzz {name} --seed {seed} --at {index}");
            }
            before(info);
        }));
    });
}

/// SplitMix64.
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn of(seed: u64, index: u64) -> Self {
        let mut rng = Self(seed ^ index.wrapping_mul(0xd134_2543_de82_ef95));
        rng.0 = rng.next() ^ index;
        rng
    }
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// Below `n`; 0 for 0.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next()) * n as u128) >> 64) as usize
    }
    pub(crate) fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
    pub(crate) fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
    /// A number near one that matters.
    pub(crate) fn number(&mut self, known: u64) -> u64 {
        let small = self.below(4) as u64;
        match self.below(12) {
            0 => self.next(),
            1 => 0,
            2 => small,
            3 => u64::MAX - small,
            4 => u64::from(u32::MAX).wrapping_add(small).wrapping_sub(2),
            5 => (i64::MAX as u64).wrapping_add(small).wrapping_sub(2),
            6 => 1 << self.below(64),
            7 => known.wrapping_mul(2),
            8 => known ^ 1 << self.below(64),
            9 => (self.next() >> 32) & 0xffff,
            10 => known.wrapping_add(4096),
            _ => known.wrapping_add(small).wrapping_sub(2),
        }
    }
}

/// Where to cut a stream: the lengths of its pieces, for ever.
pub(crate) struct Cuts {
    rng: Rng,
    most: usize,
}

impl Cuts {
    pub(crate) fn new(rng: &mut Rng) -> Self {
        let most = *rng.pick(&[1, 3, 17, 200, 5000]);
        Self { rng: Rng(rng.next()), most }
    }
    /// All in one.
    pub(crate) fn none() -> Self {
        Self { rng: Rng(0), most: 0 }
    }
    /// Takes the next piece off the front of `rest`.
    pub(crate) fn piece<'a>(&mut self, rest: &mut &'a [u8]) -> &'a [u8] {
        let len = if self.most == 0 { rest.len() } else { (1 + self.rng.below(self.most)).min(rest.len()) };
        let (piece, behind) = rest.split_at(len);
        *rest = behind;
        piece
    }
}
