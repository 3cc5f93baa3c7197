//! How fast the chunk data of raft snapshots may move: bytes per second, for what is sent and what is taken in together.
//!
//! A token bucket told as a time: until when what was taken is paid for. Nothing is taken before that, so in any time
//! t at most `rate x (t + DEPTH)` bytes and one piece more move. Pure; who waits for it asks [`Throttle::due`] for the
//! moment to be woken at.

use crate::io::Instant;
use raftlog::BLOCK;

/// What was left over is kept for so long, nanoseconds: a waker that comes late costs no throughput, and a quiet minute
/// does not become a burst.
const DEPTH_NS: u64 = 250_000_000;
/// Pieces a second, about: a peer that is fed slowly must still hear often that it is being fed.
const PIECES_PER_S: u64 = 16;
const SECOND_NS: u64 = 1_000_000_000;

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct Throttle {
    /// Bytes per second; 0: no limit.
    rate: u64,
    paid: Instant,
    taken: usize,
}

impl Throttle {
    pub(super) fn new(rate: u64) -> Self {
        Self { rate, ..Self::default() }
    }

    /// Something may be taken.
    pub(super) fn ready(&self, now: Instant) -> bool {
        self.paid <= now
    }

    /// When something may be taken again.
    pub(super) fn due(&self) -> Instant {
        self.paid
    }

    pub(super) fn take(&mut self, now: Instant, bytes: u32) {
        self.taken = self.taken.wrapping_add(1);
        self.paid = self.paid.max(Instant(now.0.saturating_sub(DEPTH_NS))).after_ns(self.cost(bytes));
    }

    /// It did not move after all.
    pub(super) fn give_back(&mut self, bytes: u32) {
        self.paid = Instant(self.paid.0.saturating_sub(self.cost(bytes)));
    }

    /// How often something was taken: whoever is served first is drawn from it.
    pub(super) fn turns(&self) -> usize {
        self.taken
    }

    /// Bytes to be asked for at once, whole blocks and at most `max`.
    pub(super) fn piece(&self, max: u32) -> u32 {
        if self.rate == 0 {
            return max;
        }
        let blocks = (self.rate / PIECES_PER_S).min(u64::from(max)) as u32 / BLOCK as u32;
        blocks.max(1) * BLOCK as u32
    }

    fn cost(&self, bytes: u32) -> u64 {
        (u64::from(bytes) * SECOND_NS).checked_div(self.rate).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// Take as soon and as much as may be taken, woken up to `late` nanoseconds late; the time it took.
    fn drain(throttle: &mut Throttle, pieces: u64, piece: u32, late: u64) -> u64 {
        let start = Instant(60 * SECOND_NS);
        let mut now = start;
        for n in 0..pieces {
            if !throttle.ready(now) {
                now = throttle.due().max(now).after_ns(late * (n % 2));
            }
            assert!(throttle.ready(now));
            throttle.take(now, piece);
        }
        now.since_ns(start)
    }

    #[test]
    fn as_much_as_the_rate_says_and_no_more() {
        for late in [0, DEPTH_NS / 2] {
            let mut throttle = Throttle::new(4 * MIB);
            let ns = drain(&mut throttle, 401, MIB as u32, late);
            // The first piece and what a quarter of a second had left over are free.
            assert!((99 * SECOND_NS..101 * SECOND_NS).contains(&ns), "{ns} ns for 400 MiB at 4 MiB/s, {late} ns late");
        }
    }

    #[test]
    fn a_quiet_time_is_no_burst() {
        let mut throttle = Throttle::new(8 * MIB);
        throttle.take(Instant(0), MIB as u32);
        let later = Instant(3600 * SECOND_NS);
        let mut burst = 0;
        while throttle.ready(later) {
            throttle.take(later, MIB as u32);
            burst += 1;
        }
        assert_eq!(burst, 3, "a quarter of a second and the piece that exceeds it");
        assert_eq!(throttle.due(), later.after_ns(SECOND_NS / 8));
    }

    #[test]
    fn what_did_not_move_is_not_paid_for() {
        let mut throttle = Throttle::new(MIB);
        let now = Instant(SECOND_NS);
        while throttle.ready(now) {
            throttle.take(now, MIB as u32);
        }
        throttle.give_back(MIB as u32);
        assert!(throttle.ready(now));
        throttle.give_back(u32::MAX); // far more than was taken
        throttle.take(now, MIB as u32);
        assert!(!throttle.ready(now), "and no credit for it");
    }

    #[test]
    fn no_limit_no_wait() {
        let mut throttle = Throttle::new(0);
        (0..1000).for_each(|_| throttle.take(Instant(1), u32::MAX));
        assert!(throttle.ready(Instant(1)));
        assert_eq!(throttle.piece(MIB as u32), MIB as u32);
    }

    #[test]
    fn pieces_are_whole_blocks_and_small_when_it_is_slow() {
        let piece = |rate| Throttle::new(rate).piece(MIB as u32);
        assert_eq!([1, MIB, MIB + 7, 16 * MIB, u64::MAX].map(piece), [4096, 65536, 65536, MIB as u32, MIB as u32]);
    }
}
