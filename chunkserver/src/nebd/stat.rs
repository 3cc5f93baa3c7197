//! Counts of one file's I/O, and their rates, as a client of Curve shows them.

/// Kinds that are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoKindStat {
    /// Read.
    Read,
    /// Write.
    Write,
    /// Discard.
    Discard,
}

impl IoKindStat {
    /// All, in the order of [`FileStat::kinds`].
    pub const ALL: [Self; 3] = [Self::Read, Self::Write, Self::Discard];

    /// Part of the variable's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Discard => "discard",
        }
    }
}

/// Sums since the file was first opened, or over a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sums {
    /// Successes.
    pub done: u64,
    /// Failures.
    pub errors: u64,
    /// Bytes of successes.
    pub bytes: u64,
    /// Nanoseconds of successes.
    pub ns: u64,
}

/// One kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KindStat {
    /// Since the file is known.
    pub total: Sums,
    /// Per second, over the last second; `ns` is the mean latency there.
    pub rate: Sums,
    last: Sums,
}

/// All kinds.
#[derive(Clone, Copy, Debug, Default)]
pub struct FileStat {
    kinds: [KindStat; 3],
}

impl FileStat {
    /// Kind and numbers.
    pub fn kinds(&self) -> impl Iterator<Item = (IoKindStat, &KindStat)> {
        IoKindStat::ALL.into_iter().zip(&self.kinds)
    }

    pub(super) fn count(&mut self, kind: IoKindStat, bytes: u64, ns: u64, ok: bool) {
        let total = &mut self.kinds[kind as usize].total;
        if ok {
            total.done += 1;
            total.bytes = total.bytes.wrapping_add(bytes);
            total.ns = total.ns.wrapping_add(ns);
        } else {
            total.errors += 1;
        }
    }

    pub(super) fn tick(&mut self, elapsed_ns: u64) {
        for kind in &mut self.kinds {
            let (now, last) = (kind.total, std::mem::replace(&mut kind.last, kind.total));
            let per_second = |a: u64, b: u64| {
                let rate = u128::from(a.wrapping_sub(b)) * 1_000_000_000 / u128::from(elapsed_ns.max(1));
                u64::try_from(rate).unwrap_or(u64::MAX)
            };
            let done = now.done - last.done;
            kind.rate = Sums {
                done: per_second(now.done, last.done),
                errors: per_second(now.errors, last.errors),
                bytes: per_second(now.bytes, last.bytes),
                ns: now.ns.wrapping_sub(last.ns).checked_div(done).unwrap_or(0),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_of_the_last_second() {
        let mut stat = FileStat::default();
        for _ in 0..10 {
            stat.count(IoKindStat::Write, 4096, 1000, true);
        }
        stat.count(IoKindStat::Write, 4096, 9, false);
        stat.tick(500_000_000);
        let write = stat.kinds[1];
        assert_eq!(write.rate, Sums { done: 20, errors: 2, bytes: 81_920, ns: 1000 });
        stat.tick(500_000_000);
        assert_eq!((stat.kinds[1].rate, stat.kinds[1].total.done), (Sums::default(), 10));
    }
}
