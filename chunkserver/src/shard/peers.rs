//! Messages between replicas, and raft's time.
//!
//! An append is admitted before raft sees it (rules 13, 14): its payload matches its checksums, there are memory and
//! log space for it and a slot for each chunk it creates. What finds no memory or log space is held, in order, a bounded
//! number of messages; what finds no slot is cut off, and the leader offers it again. Memory for what others lead is
//! not taken from what is proposed here, nor the other way round: two nodes never wait for each other.

use super::bulk::Bulk;
use super::entry::Header;
use super::follow::change_of;
use super::mail::{PeerBody, PeerMail};
use super::{Effects, Shard, State};
use crate::chunk::Change;
use crate::metrics::Counter;
use bytes::Bytes;
use copyset::raft::eraftpb::{Entry, EntryType, Message, MessageType};
use raftlog::{BLOCK, CopysetId, crc32c};
use smallvec::SmallVec;
use std::collections::VecDeque;

/// Appends of one copyset that may wait for room; a leader has fewer in flight.
const HELD_MAX: usize = 64;

/// What a shard knows of its peers' traffic.
#[derive(Debug, Default)]
pub(super) struct Peers {
    /// Payloads in memory of entries that are logged and not applied, of copysets led elsewhere.
    pub(super) tail_bytes: usize,
    /// Of appends that raft was given and the log not yet.
    pub(super) stepped_bytes: usize,
    /// Copysets with appends that wait for room, each with its messages in order.
    held: Vec<(CopysetId, VecDeque<Message>)>,
}

impl Peers {
    /// A copyset is gone.
    pub(super) fn forget(&mut self, id: CopysetId) {
        self.held.retain(|held| held.0 != id);
    }
}

impl Shard {
    /// A message of a replica of one of this shard's copysets. What cannot be used is dropped: raft repeats what matters.
    pub fn peer_mail(&mut self, mail: PeerMail, out: &mut Effects) {
        if !matches!(self.state, State::Serving | State::Draining { .. }) || !self.extents.is_open() {
            return;
        }
        let PeerMail { copyset: id, from, to, body } = mail;
        let known = self.groups.get(&id).filter(|group| !group.damaged && group.raft.retired() == 0);
        if known.is_none_or(|group| group.raft.peer() != to) {
            return self.metrics.add(Counter::PeerRefused, 1);
        }
        let message = match body {
            PeerBody::Raft(message) if message.from == from && message.to == to => message,
            PeerBody::Raft(_) => return self.metrics.add(Counter::PeerRefused, 1),
            PeerBody::Bulk { head, payload } => return self.bulk(id, from, &head, &payload, out),
        };
        if message.get_msg_type() == MessageType::MsgAppend && !message.get_entries().is_empty() {
            self.append(id, *message);
        } else {
            self.step(id, *message);
        }
    }

    fn bulk(&mut self, id: CopysetId, from: u64, head: &[u8], payload: &Bytes, out: &mut Effects) {
        match Bulk::decode(head) {
            Ok(Bulk::AskList { index, from: first }) => self.supply_list(id, from, index, first, out),
            Ok(Bulk::AskPiece { index, chunk, offset, len }) => {
                self.supply_piece(id, from, index, (chunk, offset, len), out);
            }
            Ok(Bulk::List { index, from: first, more, chunks }) => self.listed(id, from, index, first, more, chunks),
            Ok(piece @ Bulk::Piece { .. }) => {
                self.piece(id, from, piece, payload, out);
                self.supply_step(out); // what it mended may have been waited for to be supplied
            }
            Ok(Bulk::AskState { last }) => self.tell_state(id, from, last, out),
            Ok(Bulk::State { term, last }) => self.told_state(id, from, term, last),
            Err(error) => {
                tracing::warn!(copyset = ?id, from, %error, "a peer's message is refused");
                self.metrics.add(Counter::PeerRefused, 1);
            }
        }
    }

    /// The transport threw mail to this peer away: of one copyset, or of all, when the connection is gone.
    pub fn peer_lost(&mut self, peer: u64, copyset: Option<CopysetId>) {
        match copyset {
            Some(id) => self.groups.get_mut(&id).into_iter().for_each(|group| group.raft.unreachable(peer)),
            None => self.groups.values_mut().for_each(|group| group.raft.unreachable(peer)),
        }
    }

    /// This replica leads a copyset and may propose.
    #[must_use]
    pub fn leads(&self, id: CopysetId) -> bool {
        self.groups
            .get(&id)
            .is_some_and(|group| group.raft.is_leader_ready() && !group.damaged && group.raft.retired() == 0)
    }

    fn step(&mut self, id: CopysetId, message: Message) {
        let Some(group) = self.groups.get_mut(&id) else { return };
        if let Err(error) = group.raft.step(self.now.0, message) {
            tracing::debug!(copyset = ?id, %error, "a peer's message is refused");
            self.metrics.add(Counter::PeerRefused, 1);
        }
        self.mark_dirty(id);
    }

    fn append(&mut self, id: CopysetId, message: Message) {
        if !message.get_entries().iter().all(well_formed) {
            tracing::warn!(copyset = ?id, from = message.from, "an entry of a peer does not match its checksums");
            return self.metrics.add(Counter::PeerRefused, 1);
        }
        let held = self.peers.held.iter_mut().find(|h| h.0 == id);
        let rest = if held.is_some() { Some(message) } else { self.take(id, message) };
        let Some(rest) = rest else { return };
        match self.peers.held.iter_mut().find(|h| h.0 == id) {
            Some((_, queue)) if queue.len() >= HELD_MAX => {}
            Some((_, queue)) => queue.push_back(rest),
            None => self.peers.held.push((id, VecDeque::from([rest]))),
        }
        self.metrics.add(Counter::PeerHeld, 1);
        self.tell_commit(id);
    }

    /// Appends that waited, as far as there is room now.
    pub(super) fn retry_held(&mut self) {
        for (id, mut queue) in std::mem::take(&mut self.peers.held) {
            if !self.groups.contains_key(&id) {
                continue;
            }
            while let Some(message) = queue.pop_front() {
                if let Some(rest) = self.take(id, message) {
                    queue.push_front(rest);
                    break;
                }
            }
            if !queue.is_empty() {
                self.peers.held.push((id, queue));
            }
        }
    }

    /// Somebody's write waits for memory or log space.
    pub(super) fn writes_wait(&self) -> bool {
        !self.deferred.is_empty() || !self.peers.held.is_empty()
    }

    /// The first append that waits would find room now.
    pub(super) fn may_take(&self) -> bool {
        let first = |queue: &VecDeque<Message>| {
            let entry = queue.front().and_then(|message| message.get_entries().first());
            entry.is_none_or(|entry| self.has_room_to_follow(0, 0, entry.data.len()))
        };
        self.peers.held.iter().any(|(_, queue)| first(queue))
    }

    /// What is held may say that entries we have are committed; applying them is what makes room.
    fn tell_commit(&mut self, id: CopysetId) {
        let Some((_, queue)) = self.peers.held.iter().find(|h| h.0 == id) else { return };
        let (Some(front), Some(group)) = (queue.front(), self.groups.get(&id)) else { return };
        let newest = queue.iter().filter(|m| m.term == front.term).map(|m| m.commit).max().unwrap_or(0);
        let commit = newest.min(front.index);
        if commit <= group.raft.commit_index() || front.index > group.raft.last_index() {
            return;
        }
        let mut message = front.clone();
        message.mut_entries().clear();
        message.commit = commit;
        self.step(id, message);
    }

    /// Give raft as much of an append as there is room for; what is left has to wait.
    fn take(&mut self, id: CopysetId, mut message: Message) -> Option<Message> {
        let entries = message.get_entries();
        let known = {
            let log = self.log.borrow();
            let has = |entry: &&Entry| log.index(id).and_then(|i| i.term(entry.index)) == Some(entry.term);
            entries.iter().take_while(has).count()
        };
        let (mut fit, mut bytes, mut cost) = (known, 0, 0);
        for entry in entries.iter().skip(known) {
            let len = entry.data.len();
            if !self.has_room_to_follow(bytes, cost, len) {
                break;
            }
            (fit, bytes, cost) = (fit + 1, bytes + len, cost + self.log.borrow().entry_cost(len));
        }
        if fit == 0 {
            return Some(message);
        }
        let rest = (fit < entries.len()).then(|| split(&mut message, fit));
        if !self.promise_slots(id, &mut message, known) {
            return None; // the leader offers it again; it must not wait here, where only an operator makes room
        }
        self.peers.stepped_bytes += bytes;
        self.proposed_cost += cost;
        self.step(id, message);
        rest
    }

    /// Promise a slot to each chunk that entries from `known` on create, or cut the message where there is none; false if
    /// nothing is left of it.
    fn promise_slots(&mut self, id: CopysetId, message: &mut Message, known: usize) -> bool {
        let entries = message.get_entries();
        let new: SmallVec<[Option<(u64, Change)>; 8]> =
            entries.iter().skip(known).map(|e| change_of(&e.context, e.data.len())).collect();
        let Some(group) = self.groups.get_mut(&id) else { return false };
        let (stepped, promised) = (&mut group.follow.stepped, &mut group.follow.promised);
        let mut fit = 0;
        for change in &new {
            stepped.extend(*change);
            let needed = self.store.slots_needed(id, stepped.iter().copied());
            if needed > *promised && !self.store.promise(needed - *promised) {
                stepped.pop();
                break;
            }
            (fit, *promised) = (fit + 1, needed.max(*promised));
        }
        if fit < new.len() {
            self.metrics.add(Counter::PeerNoSpace, 1);
            self.want_slots();
            message.mut_entries().truncate(known + fit);
        }
        !message.get_entries().is_empty()
    }

    /// Room for an entry of `len` payload bytes behind others of `bytes` and log cost `cost`.
    ///
    /// When write-back has nothing left to free, only commits make room, and what commits them may be this very entry (a
    /// new leader's first): it must not wait. Its payload is in memory already, so what bounds it is the arena.
    fn has_room_to_follow(&self, bytes: usize, cost: u64, len: usize) -> bool {
        let (pinned, ours) =
            (self.store.pinned_bytes() as usize, self.peers.tail_bytes + self.peers.stepped_bytes + bytes);
        let memory = pinned == 0 || ours == 0 || pinned + ours + len <= self.config.dirty_limit;
        memory && self.log.borrow().has_room(self.proposed_cost + cost, len)
    }
}

/// Cut a message in two, the first with `count` entries.
fn split(message: &mut Message, count: usize) -> Message {
    let mut entries = message.take_entries().into_vec();
    let mut rest = message.clone();
    rest.set_entries(entries.split_off(count).into());
    message.set_entries(entries.into());
    if let Some(last) = message.get_entries().last() {
        (rest.index, rest.log_term) = (last.index, last.term);
    }
    rest
}

/// An entry whose payload is what its checksums say, with a header that can be applied.
fn well_formed(entry: &Entry) -> bool {
    if entry.get_entry_type() != EntryType::EntryNormal || entry.context.is_empty() && entry.data.is_empty() {
        return true; // raft's own; the copyset looks at it
    }
    let blocks = entry.data.len() / BLOCK;
    let Some((crcs, header)) = entry.context.split_at_checked(blocks * 4) else { return false };
    let crcs = crcs.as_chunks::<4>().0.iter().map(|crc| u32::from_le_bytes(*crc));
    entry.data.len().is_multiple_of(BLOCK)
        && Header::decode(header).is_ok_and(|header| header.fits(entry.data.len()))
        && entry.data.chunks(BLOCK).zip(crcs).all(|(block, crc)| crc32c(block) == crc)
}
