//! The copyset's own pseudo-random numbers (SplitMix64): the same seed gives the same elections.

/// Generator state.
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    /// Seeded; `salt` keeps the groups and replicas of one process apart.
    pub(crate) const fn new(seed: u64, salt: [u64; 2]) -> Self {
        Self(seed ^ salt[0].rotate_left(32) ^ salt[1].wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number in `low..low + width`; `width` > 0.
    pub(crate) fn draw(&mut self, low: u64, width: u64) -> u64 {
        low + self.next() % width
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeded_and_in_range() {
        let draw = |seed, salt| {
            let mut rng = Rng::new(seed, salt);
            (0..64).map(|_| rng.draw(10, 10)).collect::<Vec<_>>()
        };
        assert_eq!(draw(1, [2, 3]), draw(1, [2, 3]));
        assert_ne!(draw(1, [2, 3]), draw(1, [3, 2]));
        assert!(draw(1, [2, 3]).iter().all(|t| (10..20).contains(t)));
    }
}
