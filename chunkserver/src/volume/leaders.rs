//! Who leads which copyset, as far as this shard knows, and how it finds out.
//!
//! Promises: a leader is believed until it fails or says that it is none; then every member is asked, again and again
//! while somebody wants to know, and the first answer that can be true is taken. An answer that names the replica that
//! has just failed, in the same term, is believed only of that replica itself: the others may not have noticed yet. Nobody
//! is asked twice at a time.

use crate::io::Instant;
use raftlog::CopysetId;
use rustc_hash::FxHashMap;
use smallvec::SmallVec;
use std::collections::BTreeSet;

/// Pause between two rounds of asking, doubling from the first to the second, milliseconds.
const ROUND_MS: (u64, u64) = (10, 50);
/// Nobody wanted to know for this long: no more asking, milliseconds.
const WANTED_MS: u64 = 2_000;
/// What nobody wanted to know for this long may be forgotten, if it can be found again, milliseconds.
const FORGET_MS: u64 = 60_000;
/// So many copysets are remembered in any case.
const REMEMBERED_MIN: usize = 1024;
/// Members remembered of a copyset.
const PEERS_MAX: usize = 16;

/// A replica that leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leader {
    /// Who, as [`copyset::PeerId`] packs it.
    pub peer: u64,
    /// In which term; 0 if it was not said.
    pub term: u64,
}

#[derive(Debug)]
struct Looking {
    next: Instant,
    pause_ms: u64,
}

#[derive(Debug, Default)]
struct Entry {
    peers: SmallVec<[u64; 4]>,
    /// Some of these are not among its homes: nobody else knows them.
    moved: bool,
    leader: Option<Leader>,
    /// The last one that failed.
    suspect: Option<Leader>,
    looking: Option<Looking>,
    /// Asked and not answered.
    asked: SmallVec<[u64; 4]>,
    wanted: Instant,
    /// When the leader was last heard to be one.
    sure: Instant,
}

/// See the module's text.
#[derive(Debug)]
pub struct Leaders {
    me: Option<u64>,
    entries: FxHashMap<CopysetId, Entry>,
    /// With so many entries, old ones are forgotten.
    sweep_at: usize,
    queue: BTreeSet<(Instant, CopysetId)>,
}

impl Leaders {
    /// `me`: this process as a peer, if it has replicas.
    #[must_use]
    pub fn new(me: Option<u64>) -> Self {
        Self { me, entries: FxHashMap::default(), sweep_at: REMEMBERED_MIN, queue: BTreeSet::new() }
    }

    /// Who leads; `None`: not known now, ask again soon. `homes`: where to begin. Without any it can only be this process.
    pub fn find(&mut self, now: Instant, copyset: CopysetId, homes: &[u64]) -> Option<Leader> {
        let me = self.me;
        if self.entries.len() >= self.sweep_at {
            let keep = |entry: &Entry| entry.moved || entry.looking.is_some() || entry.wanted.after_ms(FORGET_MS) > now;
            self.entries.retain(|_, entry| keep(entry));
            self.sweep_at = REMEMBERED_MIN.max(2 * self.entries.len());
        }
        let entry = self.entries.entry(copyset).or_insert_with(|| {
            let mut entry = Entry::default();
            homes.iter().for_each(|&peer| entry.learn(peer));
            match me {
                Some(me) if homes.is_empty() || homes.contains(&me) => {
                    entry.learn(me);
                    // The replica at hand may be it; if not it says who is.
                    entry.leader = Some(Leader { peer: me, term: 0 });
                }
                _ => {}
            }
            entry.moved = false;
            entry
        });
        entry.wanted = now;
        if entry.leader.is_none() {
            self.look(now, copyset);
        }
        self.entries.get(&copyset).and_then(|entry| entry.leader)
    }

    /// Whether anybody but this process may have it.
    #[must_use]
    pub fn is_elsewhere(&self, copyset: CopysetId) -> bool {
        self.entries.get(&copyset).is_some_and(|entry| entry.peers.iter().any(|&peer| Some(peer) != self.me))
    }

    /// This one does not answer, or says that it does not lead; `hint`: who does, 0 = it does not know.
    pub fn failed(&mut self, now: Instant, copyset: CopysetId, leader: Leader, hint: u64) {
        let Some(entry) = self.entries.get_mut(&copyset) else { return };
        entry.learn(hint);
        if entry.leader == Some(leader) {
            entry.leader = None;
            entry.suspect = Some(leader);
            self.look(now, copyset);
        }
    }

    /// It takes long to answer: ask whether it still leads.
    pub fn doubt(&mut self, now: Instant, copyset: CopysetId, after_ms: u64) {
        if let Some(entry) = self.entries.get_mut(&copyset)
            && entry.sure.after_ms(after_ms) <= now
        {
            entry.wanted = now;
            self.look(now, copyset);
        }
    }

    fn look(&mut self, now: Instant, copyset: CopysetId) {
        if let Some(entry) = self.entries.get_mut(&copyset)
            && entry.looking.is_none()
        {
            entry.looking = Some(Looking { next: now, pause_ms: ROUND_MS.0 });
            self.queue.insert((now, copyset));
        }
    }

    /// When [`Self::due`] has something.
    #[must_use]
    pub fn deadline(&self) -> Instant {
        self.queue.first().map_or(Instant::FAR, |first| first.0)
    }

    /// Whom to ask now about what; each must be answered with [`Self::answered`].
    pub fn due(&mut self, now: Instant, mut ask: impl FnMut(CopysetId, u64)) {
        while let Some(&(at, copyset)) = self.queue.first().filter(|first| first.0 <= now) {
            self.queue.remove(&(at, copyset));
            let Some(entry) = self.entries.get_mut(&copyset) else { continue };
            let Some(looking) = &mut entry.looking else { continue };
            if entry.wanted.after_ms(WANTED_MS) <= now {
                entry.looking = None;
                continue;
            }
            looking.next = now.after_ms(looking.pause_ms);
            looking.pause_ms = (looking.pause_ms * 2).min(ROUND_MS.1);
            self.queue.insert((looking.next, copyset));
            for &peer in entry.peers.iter().filter(|peer| !entry.asked.contains(peer)) {
                ask(copyset, peer);
            }
            entry.asked = entry.peers.clone();
        }
    }

    /// What `from` says: who leads, if it knows. A leader in a later term than the one believed in so far is returned: it
    /// has taken over.
    pub fn answered(
        &mut self,
        now: Instant,
        copyset: CopysetId,
        from: u64,
        said: Option<Leader>,
    ) -> Option<(Leader, Leader)> {
        let entry = self.entries.get_mut(&copyset)?;
        entry.asked.retain(|peer| *peer != from);
        let said = said.filter(|leader| leader.peer != 0)?;
        entry.learn(said.peer);
        let itself = said.peer == from;
        let old = entry.leader;
        let believable = itself || (entry.suspect != Some(said) && old != Some(said));
        let newer = old.is_none_or(|old| said.term >= old.term);
        if !believable || !newer {
            return None;
        }
        entry.leader = Some(said);
        entry.sure = now;
        if let Some(looking) = entry.looking.take() {
            self.queue.remove(&(looking.next, copyset));
        }
        old.filter(|old| *old != said).map(|old| (old, said))
    }
}

impl Entry {
    fn learn(&mut self, peer: u64) {
        if peer != 0 && !self.peers.contains(&peer) {
            if self.peers.len() >= PEERS_MAX {
                self.peers.remove(0);
            }
            self.peers.push(peer);
            self.moved = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SET: CopysetId = CopysetId(1 << 32 | 7);
    const NOW: Instant = Instant(1_000_000_000);
    const HOMES: [u64; 3] = [11, 12, 13];

    fn asked(leaders: &mut Leaders, now: Instant) -> Vec<u64> {
        let mut all = Vec::new();
        leaders.due(now, |copyset, peer| {
            assert_eq!(copyset, SET);
            all.push(peer);
        });
        all
    }
    const fn at(peer: u64, term: u64) -> Leader {
        Leader { peer, term }
    }

    #[test]
    fn what_nobody_wants_any_more_is_forgotten() {
        let mut leaders = Leaders::new(Some(11));
        let find = |leaders: &mut Leaders, second: u64, set: u64| {
            let now = NOW.after_ms(second * 1000);
            assert!(leaders.find(now, SET, &HOMES).is_some() && leaders.find(now, CopysetId(set), &HOMES).is_some());
        };
        (0..100_000).for_each(|n| find(&mut leaders, n / 100, 2 << 32 | n));
        assert!(leaders.entries.len() < 2 * 6_200, "{}", leaders.entries.len());
        assert!(leaders.entries.contains_key(&SET));
    }

    #[test]
    fn everybody_is_asked_until_one_knows() {
        let mut leaders = Leaders::new(None);
        assert_eq!(leaders.find(NOW, SET, &HOMES), None);
        assert_eq!(leaders.deadline(), NOW);
        assert_eq!(asked(&mut leaders, NOW), HOMES);
        assert_eq!(leaders.answered(NOW, SET, 11, None), None);
        assert_eq!(leaders.find(NOW, SET, &HOMES), None);
        assert!(asked(&mut leaders, NOW.after_ms(9)).is_empty(), "not yet");
        assert_eq!(asked(&mut leaders, NOW.after_ms(10)), [11], "the others have not answered");
        assert_eq!(leaders.answered(NOW, SET, 12, Some(at(13, 4))), None);
        assert_eq!(leaders.find(NOW, SET, &HOMES), Some(at(13, 4)));
        assert_eq!(leaders.deadline(), Instant::FAR);
        assert!(leaders.is_elsewhere(SET));
    }

    #[test]
    fn who_failed_is_believed_only_itself() {
        let mut leaders = Leaders::new(None);
        leaders.find(NOW, SET, &HOMES);
        leaders.answered(NOW, SET, 11, Some(at(11, 4)));
        leaders.failed(NOW, SET, at(12, 4), 0);
        assert_eq!(leaders.find(NOW, SET, &HOMES), Some(at(11, 4)), "somebody else failed");
        leaders.failed(NOW, SET, at(11, 4), 0);
        assert_eq!(leaders.find(NOW, SET, &HOMES), None);
        assert_eq!(asked(&mut leaders, NOW), HOMES);
        leaders.answered(NOW, SET, 12, Some(at(11, 4)));
        assert_eq!(leaders.find(NOW, SET, &HOMES), None, "12 has not noticed");
        leaders.answered(NOW, SET, 13, Some(at(13, 5)));
        assert_eq!(leaders.find(NOW, SET, &HOMES), Some(at(13, 5)));
        leaders.answered(NOW, SET, 12, Some(at(11, 4)));
        assert_eq!(leaders.find(NOW, SET, &HOMES), Some(at(13, 5)), "an older term");
        leaders.failed(NOW, SET, at(13, 5), 14);
        assert_eq!(asked(&mut leaders, NOW), [12, 13, 14], "a hint is a member too, and 11 has not answered yet");
        leaders.answered(NOW, SET, 13, Some(at(13, 5)));
        assert_eq!(leaders.find(NOW, SET, &HOMES), Some(at(13, 5)), "it says so itself");
    }

    #[test]
    fn doubt_keeps_the_leader_until_another_one_shows() {
        let mut leaders = Leaders::new(None);
        leaders.find(NOW, SET, &HOMES);
        leaders.answered(NOW, SET, 11, Some(at(11, 4)));
        leaders.doubt(NOW.after_ms(100), SET, 200);
        assert_eq!(leaders.deadline(), Instant::FAR, "it was sure a moment ago");
        let later = NOW.after_ms(300);
        leaders.doubt(later, SET, 200);
        assert_eq!(asked(&mut leaders, later), HOMES);
        assert_eq!(leaders.answered(later, SET, 12, Some(at(11, 4))), None, "it may be gone all the same");
        assert_eq!(leaders.find(later, SET, &HOMES), Some(at(11, 4)));
        assert!(leaders.deadline() < Instant::FAR);
        assert_eq!(leaders.answered(later, SET, 13, Some(at(12, 5))), Some((at(11, 4), at(12, 5))));
        assert_eq!(leaders.deadline(), Instant::FAR);
    }

    #[test]
    fn this_process_is_tried_first() {
        let mut leaders = Leaders::new(Some(12));
        assert_eq!(leaders.find(NOW, SET, &HOMES), Some(at(12, 0)));
        leaders.failed(NOW, SET, at(12, 0), 13);
        assert_eq!(asked(&mut leaders, NOW), HOMES);
        leaders.answered(NOW, SET, 12, Some(at(12, 3)));
        assert_eq!(leaders.find(NOW, SET, &HOMES), Some(at(12, 3)));
        let mut alone = Leaders::new(Some(12));
        assert_eq!(alone.find(NOW, SET, &[]), Some(at(12, 0)));
        assert!(!alone.is_elsewhere(SET));
    }

    #[test]
    fn asking_ends_when_nobody_wants_to_know() {
        let mut leaders = Leaders::new(None);
        leaders.find(NOW, SET, &HOMES);
        let (mut now, mut rounds) = (NOW, 0);
        while leaders.deadline() < Instant::FAR {
            now = leaders.deadline();
            for peer in asked(&mut leaders, now) {
                leaders.answered(now, SET, peer, None);
            }
            rounds += 1;
            assert!(rounds < 100);
        }
        assert!(rounds > 20 && now >= NOW.after_ms(WANTED_MS), "{rounds}");
    }
}
