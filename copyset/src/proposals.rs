//! Proposals between `propose` and their commit: queued for the turn's one `MsgPropose`, then waiting in the log.
//!
//! Invariant: waiting proposals are contiguous up to the leader's last own entry and all of the current term; when
//! leadership or term goes, all of them go.

use crate::effect::Effect;
use bytes::{BufMut, Bytes, BytesMut};
use raft::eraftpb::Entry;
use std::collections::VecDeque;

/// Contexts of entries, many in one allocation: they are small, made together and forgotten together.
#[derive(Debug, Default)]
pub(crate) struct Contexts(BytesMut);

impl Contexts {
    /// Bytes of one allocation, and so the most that one context keeps in memory.
    const CHUNK: usize = 4096;

    /// `crcs` (u32 little-endian), then `header`.
    pub(crate) fn make(&mut self, header: &[u8], crcs: &[u32]) -> Bytes {
        let len = crcs.len() * 4 + header.len();
        if self.0.capacity() < len {
            self.0 = BytesMut::with_capacity(len.max(Self::CHUNK));
        }
        crcs.iter().for_each(|&crc| self.0.put_u32_le(crc));
        self.0.extend_from_slice(header);
        self.0.split().freeze()
    }
}

#[derive(Debug)]
struct Waiting {
    index: u64,
    term: u64,
    cookie: u64,
    bytes: usize,
}

/// See the module's comment.
#[derive(Debug, Default)]
pub(crate) struct Proposals {
    queued: Vec<Entry>,
    /// How many the turn before had.
    usual: usize,
    cookies: Vec<u64>,
    waiting: VecDeque<Waiting>,
    /// Payload and context of both.
    bytes: usize,
}

impl Proposals {
    pub(crate) fn has_queued(&self) -> bool {
        !self.queued.is_empty()
    }

    pub(crate) fn count(&self) -> usize {
        self.queued.len() + self.waiting.len()
    }

    pub(crate) fn cookies(&self) -> impl Iterator<Item = u64> + '_ {
        self.waiting.iter().map(|w| w.cookie).chain(self.cookies.iter().copied())
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn push(&mut self, cookie: u64, entry: Entry) {
        self.bytes += size(&entry);
        if self.queued.is_empty() {
            self.queued.reserve_exact(self.usual.max(1)); // raft kept the last one
        }
        self.queued.push(entry);
        self.cookies.push(cookie);
    }

    /// Everything queued, for one message. Its entries will stand at `first_index..` in `term`; if raft refuses them
    /// the caller drops all.
    pub(crate) fn take(&mut self, first_index: u64, term: u64) -> Vec<Entry> {
        let cookies = self.cookies.drain(..);
        for (index, (cookie, entry)) in (first_index..).zip(cookies.zip(&self.queued)) {
            self.waiting.push_back(Waiting { index, term, cookie, bytes: size(entry) });
        }
        self.usual = self.queued.len();
        std::mem::take(&mut self.queued)
    }

    /// Cookie of the entry committed at `index`, if it waits here.
    pub(crate) fn committed(&mut self, index: u64, term: u64) -> Option<u64> {
        let found = self.waiting.pop_front_if(|w| w.index <= index)?;
        assert!((found.index, found.term) == (index, term), "entry {index} of term {term} is not the one proposed");
        self.bytes -= found.bytes;
        Some(found.cookie)
    }

    /// Leadership or term is lost.
    pub(crate) fn drop_all(&mut self, out: &mut Vec<Effect>) {
        let logged = self.waiting.drain(..).map(|w| Effect::Dropped { cookie: w.cookie, may_commit: true });
        out.extend(logged);
        out.extend(self.cookies.drain(..).map(|cookie| Effect::Dropped { cookie, may_commit: false }));
        self.queued.clear();
        self.bytes = 0;
    }

    /// raft refused the last `count` entries taken: they never reached the log.
    pub(crate) fn refuse_last(&mut self, count: usize, out: &mut Vec<Effect>) {
        let keep = self.waiting.len() - count;
        for refused in self.waiting.drain(keep..) {
            self.bytes -= refused.bytes;
            out.push(Effect::Dropped { cookie: refused.cookie, may_commit: false });
        }
    }
}

fn size(entry: &Entry) -> usize {
    entry.data.len() + entry.context.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(bytes: usize) -> Entry {
        Entry { data: vec![0; bytes].into(), ..Entry::default() }
    }

    #[test]
    fn cookies_follow_their_entries() {
        let mut proposals = Proposals::default();
        (0..3).for_each(|cookie| proposals.push(cookie, entry(10)));
        assert_eq!(proposals.take(5, 2).len(), 3);
        proposals.push(3, entry(10));
        assert_eq!((proposals.count(), proposals.bytes()), (4, 40));
        assert_eq!(proposals.committed(4, 1), None);
        assert_eq!(proposals.committed(5, 2), Some(0));
        let mut out = Vec::new();
        proposals.drop_all(&mut out);
        let dropped = |cookie, may_commit| Effect::Dropped { cookie, may_commit };
        assert_eq!(out, [dropped(1, true), dropped(2, true), dropped(3, false)]);
        assert_eq!((proposals.count(), proposals.bytes()), (0, 0));
    }

    #[test]
    fn refused_entries_never_commit() {
        let mut proposals = Proposals::default();
        proposals.push(1, entry(4));
        proposals.take(5, 2);
        proposals.push(2, entry(6));
        assert_eq!(proposals.take(6, 2).len(), 1);
        let mut out = Vec::new();
        proposals.refuse_last(1, &mut out);
        assert_eq!(out, [Effect::Dropped { cookie: 2, may_commit: false }]);
        assert_eq!((proposals.committed(5, 2), proposals.bytes()), (Some(1), 0));
    }
}
