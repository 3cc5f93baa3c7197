//! Who is in a copyset, and the epoch of that answer; what `Checkpoint.conf` holds.
//!
//! Format owned (little-endian):
//! ```text
//! | version u8 = 1 | flags u8 (bit 0: leave the joint stage by itself, 1: retired, 2: suspect, 3: void) | 4 x count u16 | epoch u64 | ids u64 ... |
//! | if retired: u64 | if void: u64 |
//! ```
//! The counts and ids are voters, learners, outgoing voters, next learners. A decoded state is one raft-rs accepts:
//! it ends the process over some that contradict themselves, so those are refused here.

use bytes::{BufMut, Bytes, BytesMut};
use raft::eraftpb;

const VERSION: u8 = 1;
const FLAG_AUTO_LEAVE: u8 = 1;
const FLAG_RETIRED: u8 = 2;
const FLAG_SUSPECT: u8 = 4;
const FLAG_VOID: u8 = 8;
const HEAD: usize = 2 + 4 * 2 + 8;
/// Most members in one list; a bound for hostile input, far above any real copyset.
const MEMBERS_MAX: usize = 64;

/// Members at one log index. Lists ascend and hold no id twice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConfState {
    /// Voters; of the incoming half while joint.
    pub voters: Vec<u64>,
    /// Members that only receive.
    pub learners: Vec<u64>,
    /// Voters of the outgoing half; empty unless joint.
    pub voters_outgoing: Vec<u64>,
    /// Outgoing voters that become learners when the joint stage ends.
    pub learners_next: Vec<u64>,
    /// The joint stage ends by itself once applied.
    pub auto_leave: bool,
    /// Curve's ConfEpoch: one more at every new leader's first entry and at every finished change of the voters.
    pub epoch: u64,
    /// When this replica was taken out of service for good, seconds since 1970; 0: it was not. Only of this replica: it is
    /// never sent.
    pub retired: u64,
    /// This replica's log lost records, and it has not caught up with what they may have held. Never sent either.
    pub suspect: bool,
    /// Membership changes up to this index of the log do not count: the voters were forced while they stood in its tail.
    /// 0: all do.
    pub void: u64,
}

/// Why bytes are no [`ConfState`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfError {
    /// Written by a newer program, or rotten.
    #[error("configuration has unknown version {0}")]
    Version(u8),
    /// Unknown flag bits.
    #[error("configuration has unknown flags {0:#x}")]
    Flags(u8),
    /// Length does not fit the counts.
    #[error("configuration of {0} bytes is cut short, too long or has too many members")]
    Length(usize),
    /// Members contradict each other.
    #[error("configuration contradicts itself: {0}")]
    Contradiction(&'static str),
}

impl ConfState {
    /// A plain configuration of `voters` at epoch 0. Nobody (0) and repeats are left out.
    #[must_use]
    pub fn of(voters: &[u64]) -> Self {
        let mut voters: Vec<u64> = voters.iter().copied().filter(|&id| id != 0).collect();
        voters.sort_unstable();
        voters.dedup();
        Self { voters, ..Self::default() }
    }

    /// True while two majorities must agree.
    #[must_use]
    pub fn joint(&self) -> bool {
        !self.voters_outgoing.is_empty()
    }

    /// True if `id` alone decides.
    #[must_use]
    pub fn sole_voter(&self, id: u64) -> bool {
        self.voters == [id] && (self.voters_outgoing.is_empty() || self.voters_outgoing == [id])
    }

    /// True if `id` votes or learns.
    #[must_use]
    pub fn has_member(&self, id: u64) -> bool {
        self.voters.contains(&id) || self.learners.contains(&id) || self.voters_outgoing.contains(&id)
    }

    /// Bytes for a checkpoint.
    ///
    /// # Panics
    /// With more members than the format allows, which no conf change of this crate lets happen.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let lists = self.lists();
        let mut out = BytesMut::with_capacity(HEAD + 16 + 8 * lists.iter().map(|l| l.len()).sum::<usize>());
        out.put_u8(VERSION);
        let flag = |set, flag| if set { flag } else { 0 };
        let own = flag(self.retired != 0, FLAG_RETIRED) | flag(self.suspect, FLAG_SUSPECT);
        out.put_u8(flag(self.auto_leave, FLAG_AUTO_LEAVE) | own | flag(self.void != 0, FLAG_VOID));
        for list in lists {
            assert!(list.len() <= MEMBERS_MAX, "configuration with {} members", list.len());
            out.put_u16_le(list.len() as u16);
        }
        out.put_u64_le(self.epoch);
        lists.iter().flat_map(|list| list.iter()).for_each(|&id| out.put_u64_le(id));
        [self.retired, self.void].into_iter().filter(|&value| value != 0).for_each(|value| out.put_u64_le(value));
        out.freeze()
    }

    /// Reads what [`Self::encode`] wrote; any bytes are safe.
    pub fn decode(bytes: &[u8]) -> Result<Self, ConfError> {
        let short = || ConfError::Length(bytes.len());
        let (head, mut ids) = bytes.split_first_chunk::<HEAD>().ok_or_else(short)?;
        let [version, flags, c0, c1, c2, c3, c4, c5, c6, c7, epoch @ ..] = *head;
        if version != VERSION {
            return Err(ConfError::Version(version));
        }
        if flags & !(FLAG_AUTO_LEAVE | FLAG_RETIRED | FLAG_SUSPECT | FLAG_VOID) != 0 {
            return Err(ConfError::Flags(flags));
        }
        let mut take = |count: [u8; 2]| {
            let count = usize::from(u16::from_le_bytes(count));
            let (list, rest) = ids.split_at_checked(count * 8).filter(|_| count <= MEMBERS_MAX).ok_or_else(short)?;
            ids = rest;
            Ok(list.as_chunks::<8>().0.iter().map(|id| u64::from_le_bytes(*id)).collect::<Vec<_>>())
        };
        let mut this = Self {
            voters: take([c0, c1])?,
            learners: take([c2, c3])?,
            voters_outgoing: take([c4, c5])?,
            learners_next: take([c6, c7])?,
            auto_leave: flags & FLAG_AUTO_LEAVE != 0,
            epoch: u64::from_le_bytes(epoch),
            retired: 0,
            suspect: flags & FLAG_SUSPECT != 0,
            void: 0,
        };
        for (flag, value, never) in [
            (FLAG_RETIRED, &mut this.retired, "retired at no time"),
            (FLAG_VOID, &mut this.void, "changes void up to no index"),
        ] {
            if flags & flag != 0 {
                let (bytes, rest) = ids.split_first_chunk::<8>().ok_or_else(short)?;
                (*value, ids) = (u64::from_le_bytes(*bytes), rest);
                if *value == 0 {
                    return Err(ConfError::Contradiction(never));
                }
            }
        }
        if !ids.is_empty() {
            return Err(short());
        }
        this.check()?;
        Ok(this)
    }

    /// The same members as raft-rs writes them.
    #[must_use]
    pub fn to_raft(&self) -> eraftpb::ConfState {
        let mut out = eraftpb::ConfState::default();
        out.set_voters(self.voters.clone());
        out.set_learners(self.learners.clone());
        out.set_voters_outgoing(self.voters_outgoing.clone());
        out.set_learners_next(self.learners_next.clone());
        out.set_auto_leave(self.auto_leave);
        out
    }

    /// From raft-rs's form (whose lists come in hash order) and an epoch.
    #[must_use]
    pub fn from_raft(state: &eraftpb::ConfState, epoch: u64) -> Self {
        let sorted = |list: &[u64]| {
            let mut list = list.to_vec();
            list.sort_unstable();
            list
        };
        Self {
            voters: sorted(state.get_voters()),
            learners: sorted(state.get_learners()),
            voters_outgoing: sorted(state.get_voters_outgoing()),
            learners_next: sorted(state.get_learners_next()),
            auto_leave: state.get_auto_leave(),
            epoch,
            retired: 0,
            suspect: false,
            void: 0,
        }
    }

    fn lists(&self) -> [&[u64]; 4] {
        [&self.voters, &self.learners, &self.voters_outgoing, &self.learners_next]
    }

    fn check(&self) -> Result<(), ConfError> {
        let rule = |holds: bool, why| if holds { Ok(()) } else { Err(ConfError::Contradiction(why)) };
        let ascending = |l: &&[u64]| l.first() != Some(&0) && l.windows(2).all(|w| w.first() < w.last());
        rule(self.lists().iter().all(ascending), "a list is unsorted or holds nobody")?;
        let apart = |a: &[u64], b: &[u64]| a.iter().all(|id| !b.contains(id));
        rule(apart(&self.learners, &self.voters), "a learner votes")?;
        rule(apart(&self.learners, &self.voters_outgoing), "a learner votes in the outgoing half")?;
        rule(apart(&self.learners_next, &self.voters), "a next learner votes in the incoming half")?;
        rule(apart(&self.learners_next, &self.learners), "a next learner is a learner already")?;
        let outgoing = |id| self.voters_outgoing.contains(id);
        rule(self.learners_next.iter().all(outgoing), "a next learner does not vote in the outgoing half")?;
        rule(self.joint() || !self.auto_leave, "leaving a joint stage that is none")?;
        let members = self.learners.len() + self.voters_outgoing.len();
        rule(!self.voters.is_empty() || members == 0, "members but no voter")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn joint() -> ConfState {
        ConfState {
            voters: vec![1, 2, 3],
            learners: vec![9],
            voters_outgoing: vec![2, 3, 4],
            learners_next: vec![4],
            auto_leave: true,
            epoch: 7,
            retired: 0,
            suspect: false,
            void: 0,
        }
    }

    #[test]
    fn golden_bytes() {
        let conf = ConfState { epoch: 5, ..ConfState::of(&[0x0102, 1, 0, 1]) };
        let bytes = [
            &[1u8, 0, 2, 0, 0, 0, 0, 0, 0, 0][..],
            &[5, 0, 0, 0, 0, 0, 0, 0],
            &[1, 0, 0, 0, 0, 0, 0, 0],
            &[2, 1, 0, 0, 0, 0, 0, 0],
        ];
        assert_eq!(conf.encode(), bytes.concat());
        assert_eq!(ConfState::decode(&bytes.concat()), Ok(conf));
    }

    #[test]
    fn a_retired_replica_says_when() {
        let conf = ConfState { retired: 0x0102, ..ConfState::of(&[1]) };
        let bytes = conf.encode();
        assert_eq!((bytes[1], &bytes[bytes.len() - 8..]), (2, &[2, 1, 0, 0, 0, 0, 0, 0][..]));
        assert_eq!(ConfState::decode(&bytes), Ok(conf));
        assert!(ConfState::decode(&bytes[..bytes.len() - 8]).is_err(), "it must say when");
        let mut never = bytes.to_vec();
        never.truncate(bytes.len() - 8);
        never.extend([0; 8]);
        assert_eq!(ConfState::decode(&never), Err(ConfError::Contradiction("retired at no time")));
    }

    #[test]
    fn void_changes_end_somewhere() {
        let conf = ConfState { void: 0x0304, ..ConfState::of(&[1]) };
        let bytes = conf.encode();
        assert_eq!((bytes[1], &bytes[bytes.len() - 8..]), (8, &[4, 3, 0, 0, 0, 0, 0, 0][..]));
        assert_eq!(ConfState::decode(&bytes), Ok(conf.clone()));
        let both = ConfState { retired: 7, ..conf };
        assert_eq!((both.encode()[1], ConfState::decode(&both.encode())), (10, Ok(both)));
        let nowhere = [&bytes[..bytes.len() - 8], &[0; 8]].concat();
        assert_eq!(ConfState::decode(&nowhere), Err(ConfError::Contradiction("changes void up to no index")));
    }

    #[test]
    fn a_suspect_replica_says_so() {
        let conf = ConfState { suspect: true, ..ConfState::of(&[1]) };
        let bytes = conf.encode();
        assert_eq!((bytes[1], bytes.len()), (4, ConfState::of(&[1]).encode().len()));
        assert_eq!(ConfState::decode(&bytes), Ok(conf));
    }

    #[test]
    fn joint_round_trip() {
        assert_eq!(ConfState::decode(&joint().encode()), Ok(joint()));
        assert_eq!(ConfState::from_raft(&joint().to_raft(), 7), joint());
    }

    #[test]
    fn contradictions_are_refused() {
        type Spoil = fn(&mut ConfState);
        let spoilers: [Spoil; 9] = [
            |c| c.voters = vec![2, 1],
            |c| c.voters = vec![1, 1],
            |c| c.voters = vec![0, 1],
            |c| c.learners = vec![1],
            |c| c.learners = vec![4],
            |c| c.learners_next = vec![2],
            |c| c.learners_next = vec![8],
            |c| (c.voters_outgoing, c.learners_next) = (vec![], vec![]),
            |c| c.voters.clear(),
        ];
        for (i, spoil) in spoilers.iter().enumerate() {
            let mut conf = joint();
            spoil(&mut conf);
            assert!(ConfState::decode(&conf.encode()).is_err(), "spoiler {i}");
        }
    }

    #[test]
    fn sole_voter_counts_both_halves() {
        let mut conf = ConfState::of(&[1]);
        assert!(conf.sole_voter(1) && !conf.sole_voter(2));
        conf.voters_outgoing = vec![1, 2];
        assert!(!conf.sole_voter(1));
        assert!(!ConfState::default().sole_voter(0));
    }

    proptest! {
        #[test]
        fn any_bytes_are_safe(mut bytes in proptest::collection::vec(any::<u8>(), 0..80), plausible: bool) {
            if plausible && bytes.len() > 10 {
                bytes[..10].copy_from_slice(&[1, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
            }
            if let Ok(conf) = ConfState::decode(&bytes) {
                prop_assert_eq!(conf.encode(), bytes);
            }
        }
        #[test]
        fn a_flipped_bit_never_panics(bit in 0usize..(18 + 64) * 8) {
            let mut bytes = joint().encode().to_vec();
            if let Some(byte) = bytes.get_mut(bit / 8) {
                *byte ^= 1 << (bit % 8);
            }
            let _ = ConfState::decode(&bytes);
        }
    }
}
