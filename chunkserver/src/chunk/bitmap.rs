//! A fixed number of bits; on disk least significant bit first, byte by byte.

/// One bit per block of a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    words: Box<[u64]>,
    bits: u32,
}

impl Bitmap {
    /// `bits` clear bits.
    #[must_use]
    pub fn new(bits: u32) -> Self {
        Self { words: vec![0; bits.div_ceil(64) as usize].into_boxed_slice(), bits }
    }

    /// Number of bits.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.bits
    }

    /// Whether there are no bits at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bits == 0
    }

    /// Bit `at`; clear beyond the end.
    #[must_use]
    pub fn get(&self, at: u32) -> bool {
        at < self.bits && self.words[at as usize / 64] >> (at % 64) & 1 == 1
    }

    /// Set bit `at`.
    ///
    /// # Panics
    /// Beyond the end.
    pub fn set(&mut self, at: u32) {
        assert!(at < self.bits);
        self.words[at as usize / 64] |= 1 << (at % 64);
    }

    /// Clear bit `at`.
    ///
    /// # Panics
    /// Beyond the end.
    pub fn clear(&mut self, at: u32) {
        assert!(at < self.bits);
        self.words[at as usize / 64] &= !(1 << (at % 64));
    }

    /// Number of set bits.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.words.iter().map(|w| w.count_ones()).sum()
    }

    /// Write the bits into `out`, as many bytes as it has.
    pub(super) fn encode(&self, out: &mut [u8]) {
        for (word, bytes) in self.words.iter().zip(out.chunks_mut(8)) {
            let n = bytes.len();
            bytes.copy_from_slice(&word.to_le_bytes()[..n]);
        }
    }

    /// Read `bits` bits; `None` when `from` is too short or has a bit set beyond them.
    pub(super) fn decode(bits: u32, from: &[u8]) -> Option<Self> {
        let mut map = Self::new(bits);
        let used = bits.div_ceil(8) as usize;
        let (body, rest) = from.split_at_checked(used)?;
        for (at, &byte) in body.iter().enumerate() {
            map.words[at / 8] |= u64::from(byte) << (at % 8 * 8);
        }
        let spare = bits % 64;
        let tail_clear = spare == 0 || map.words.last().is_none_or(|w| w >> spare == 0);
        (tail_clear && rest.iter().all(|&b| b == 0)).then_some(map)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_lsb_first_and_round_trip() {
        let mut map = Bitmap::new(100);
        for bit in [0, 9, 63, 64, 99] {
            map.set(bit);
        }
        let mut out = [0u8; 512];
        map.encode(&mut out);
        assert_eq!((out[0], out[1], out[7], out[8], out[12]), (1, 2, 0x80, 1, 8));
        assert_eq!(Bitmap::decode(100, &out), Some(map.clone()));
        assert_eq!(map.count(), 5);
        map.clear(63);
        assert!(!map.get(63) && map.get(64) && !map.get(100));
    }

    #[test]
    fn a_bit_beyond_the_end_is_refused() {
        let mut out = [0u8; 512];
        out[12] = 0x10;
        assert_eq!(Bitmap::decode(100, &out), None);
        out[12] = 0;
        out[200] = 1;
        assert_eq!(Bitmap::decode(100, &out), None);
        assert_eq!(Bitmap::decode(100, &out[..12]), None);
    }
}
