//! A replica whose log lost records (rule 21): what it acknowledged or whom it voted for may be among them.
//!
//! It may have voted in a term it no longer knows of, and acknowledged entries it no longer has. So at first it takes
//! part in nothing. Once every other voter has said how far it is, a leader of at least the highest of these terms
//! cannot be contradicted by a lost vote, and is followed; and once the log holds, as committed, what any of them
//! had, no acknowledged entry is missing any more.

/// How far suspicion goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Suspicion {
    /// None.
    #[default]
    Clear,
    /// Records are lost, and nothing is known of them.
    Unknown,
    /// Records are lost, none of them above this term or index.
    Until {
        /// Highest term of any other voter.
        term: u64,
        /// Highest last index of any other voter.
        index: u64,
    },
}

impl Suspicion {
    /// True while it neither votes nor campaigns.
    pub(crate) fn holds(self) -> bool {
        self != Self::Clear
    }

    /// True if a leader of `term` must not be answered.
    pub(crate) fn bars(self, term: u64) -> bool {
        match self {
            Self::Clear => false,
            Self::Unknown => true,
            Self::Until { term: lost, .. } => term < lost,
        }
    }

    /// The replica is at `term`, and holds durably what is committed up to `index`.
    pub(crate) fn reached(&mut self, term: u64, index: u64) {
        if let Self::Until { term: t, index: i } = *self
            && term >= t
            && index >= i
        {
            *self = Self::Clear;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_with_what_the_others_have() {
        let mut suspicion = Suspicion::Unknown;
        suspicion.reached(99, 99);
        assert!(suspicion.holds() && suspicion.bars(99));
        suspicion = Suspicion::Until { term: 5, index: 20 };
        assert!(suspicion.bars(4) && !suspicion.bars(5));
        suspicion.reached(5, 19);
        suspicion.reached(4, 20);
        assert!(suspicion.holds());
        suspicion.reached(5, 20);
        assert!(!suspicion.holds() && !suspicion.bars(1));
    }
}
