//! The proposed views and the memory of what others lead: taken from the tail of the own log.
//!
//! While a copyset leads, its views hold what it proposed. When it does not (any more), they are what its log may yet
//! have to apply: slots stay promised to entries that a later leader may commit, and come back from those that it
//! overwrites. Invariant: at the end of a turn the views of a copyset are those of its applied state and its log.

use super::entry::Header;
use super::{Group, Shard};
use copyset::Role;
use raftlog::{BLOCK, CopysetId, Entry, EntryKind, Index};
use std::collections::VecDeque;
use std::rc::Rc;

use crate::chunk::Change;

/// What a copyset remembers of its unapplied tail.
#[derive(Debug, Default)]
pub(super) struct Follow {
    /// Term it leads in.
    led: Option<u64>,
    /// Newest entry in the views: index and term. `None`: they are to be made anew.
    admitted: Option<(u64, u64)>,
    /// Entries raft was given and the log not yet; so many slots are promised to them.
    pub(super) stepped: Vec<(u64, Change)>,
    pub(super) promised: usize,
    /// Payloads in memory of entries that are logged and not applied: index and bytes.
    tail: VecDeque<(u64, usize)>,
}

/// What an entry of the log does; `None` for raft's own.
pub(super) fn change_of(context: &[u8], payload_len: usize) -> Option<(u64, Change)> {
    let header = Header::decode(context.get(payload_len / BLOCK * 4..)?).ok()?;
    Some((header.chunk, header.change()))
}

impl Follow {
    /// The log starts anew: the views are to be made again.
    pub(super) fn forget(&mut self) {
        self.admitted = None;
    }

    /// True if `index` and what is before it are in the views as the log has it.
    fn knows(&self, log: &Index, applied: u64) -> Option<u64> {
        let (at, term) = self.admitted?;
        (at <= applied || log.term(at) == Some(term)).then_some(at.max(applied))
    }
}

impl Shard {
    /// A copyset's raft has had its say: see the module's text.
    pub(super) fn follow_log(&mut self, id: CopysetId) {
        let log = Rc::clone(&self.log);
        let log = log.borrow();
        let Some((group, index)) = self.groups.get_mut(&id).zip(log.index(id)) else { return };
        let leads = (group.raft.role() == Role::Leader).then(|| group.raft.term());
        let led = std::mem::replace(&mut group.follow.led, leads);
        self.store.unpromise(std::mem::take(&mut group.follow.promised));
        group.follow.stepped.clear();
        if led.is_some() && led == leads {
            return; // it goes on leading: what it proposes it has admitted
        }
        if led.is_some() {
            group.follow.admitted = None;
        }
        let applied = group.applied;
        let known = group.follow.knows(index, applied);
        if known.is_none() {
            self.store.reset_proposed(id);
            self.peers.tail_bytes -= group.follow.tail.drain(..).map(|(_, bytes)| bytes).sum::<usize>();
        }
        let last = index.last_index();
        let from = known.unwrap_or(applied) + 1;
        if from <= last {
            for entry in index.entries(from, last + 1, usize::MAX) {
                self.follow_entry(id, &entry, index.payload_len(entry.index).unwrap_or(0));
            }
        }
        let newest = index.term(last).map(|term| (last, term));
        if let Some(group) = self.groups.get_mut(&id) {
            group.follow.admitted = newest;
        }
    }

    fn follow_entry(&mut self, id: CopysetId, entry: &Entry, payload_len: usize) {
        let normal = entry.kind == EntryKind::Normal && !entry.context.is_empty();
        if let Some((chunk, change)) = change_of(&entry.context, payload_len).filter(|_| normal)
            && !self.store.follow(id, chunk, change)
        {
            tracing::error!(copyset = ?id, index = entry.index, "no slot for a chunk that the log will create");
        }
        if let (false, Some(group)) = (entry.payload.is_empty(), self.groups.get_mut(&id)) {
            group.follow.tail.push_back((entry.index, payload_len));
            self.peers.tail_bytes += payload_len;
        }
    }

    /// Everything of a copyset up to its applied index is in the store now, whose memory is counted there.
    pub(super) fn tail_applied(&mut self, id: CopysetId) {
        let Some(Group { follow, applied, .. }) = self.groups.get_mut(&id) else { return };
        while let Some((_, bytes)) = follow.tail.pop_front_if(|(index, _)| *index <= *applied) {
            self.peers.tail_bytes -= bytes;
        }
    }

    /// A copyset goes: its promises and its memory come back.
    pub(super) fn unfollow(&mut self, group: &mut Group) {
        self.store.unpromise(std::mem::take(&mut group.follow.promised));
        self.peers.tail_bytes -= group.follow.tail.drain(..).map(|(_, bytes)| bytes).sum::<usize>();
    }
}
