//! Copysets whose log lost records, with peers that have them (rule 21): until every other voter has said how far it
//! is, such a replica neither votes nor follows; then it catches up like any that lags.
//!
//! Its leader must be told, for it believes what was acknowledged to be there.

use super::bulk::Bulk;
use super::{Effects, Shard};
use crate::io::Instant;
use bytes::Bytes;
use raftlog::CopysetId;
use std::collections::BTreeMap;

/// Who has not answered is asked again after this, milliseconds.
const ASK_MS: u64 = 200;

/// What other voters have said, by copyset: term and last index.
#[derive(Debug)]
pub(super) struct Suspects {
    told: BTreeMap<CopysetId, BTreeMap<u64, (u64, u64)>>,
    next: Instant,
}

impl Default for Suspects {
    fn default() -> Self {
        Self { told: BTreeMap::new(), next: Instant::FAR }
    }
}

impl Shard {
    /// A copyset was started from a log that lost records of it.
    pub(super) fn suspect(&mut self, id: CopysetId) {
        tracing::error!(copyset = ?id, "durable log records are lost; the other replicas are asked for what they held");
        self.suspects.told.insert(id, BTreeMap::new());
        self.suspects.next = self.now;
    }

    pub(super) fn suspects_deadline(&self) -> Instant {
        self.suspects.next
    }

    /// Ask again whoever has not said how far it is.
    pub(super) fn suspects_step(&mut self, out: &mut Effects) {
        if self.suspects.next > self.now {
            return;
        }
        let groups = &self.groups;
        let wants =
            |id: &CopysetId| groups.get(id).is_some_and(|group| group.raft.wants_word() && group.raft.retired() == 0);
        self.suspects.told.retain(|id, _| wants(id));
        let open = !self.suspects.told.is_empty();
        self.suspects.next = if open { self.now.after_ms(ASK_MS) } else { Instant::FAR };
        let mut asks = Vec::new();
        for (&id, told) in &self.suspects.told {
            let Some(group) = self.groups.get(&id) else { continue };
            let others = group.raft.conf().voters.iter().filter(|&&v| v != self.config.peer && !told.contains_key(&v));
            asks.extend(others.map(|&voter| (id, voter, group.raft.last_index())));
        }
        for (id, to, last) in asks {
            self.send_bulk(id, to, &Bulk::AskState { last }, Bytes::new(), out);
        }
    }

    /// A replica that lost records asks. Who is suspect itself knows nothing that others can rely on.
    pub(super) fn tell_state(&mut self, id: CopysetId, to: u64, last: u64, out: &mut Effects) {
        let Some(group) = self.groups.get_mut(&id).filter(|group| !group.raft.is_suspect()) else { return };
        group.raft.forgot(to, last);
        let state = Bulk::State { term: group.raft.term(), last: group.raft.last_index() };
        self.mark_dirty(id);
        self.send_bulk(id, to, &state, Bytes::new(), out);
    }

    /// An answer. With the last one it is known what may be lost.
    pub(super) fn told_state(&mut self, id: CopysetId, from: u64, term: u64, last: u64) {
        let Some((told, group)) = self.suspects.told.get_mut(&id).zip(self.groups.get_mut(&id)) else { return };
        let me = self.config.peer;
        let voters: Vec<u64> = group.raft.conf().voters.iter().copied().filter(|&voter| voter != me).collect();
        if !voters.contains(&from) {
            return;
        }
        told.insert(from, (term, last));
        if voters.iter().all(|voter| told.contains_key(voter)) {
            let newest = told.values().fold((0, 0), |a, b| (a.0.max(b.0), a.1.max(b.1)));
            group.raft.suspect_until(newest.0, newest.1);
            self.suspects.next = self.now;
            self.mark_dirty(id);
        }
    }
}
