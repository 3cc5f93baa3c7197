//! From request to raft proposal: the only place where an operation can be refused (rules 13, 14).

use super::entry::Header;
use super::request::{BlockCrcs, ChunkOp, Origin, Outcome, Reply, ReplyData, Request, RequestOp};
use super::{Effects, Shard, State, Waiting, reply};
use bytes::Bytes;
use copyset::ProposeError;
use raftlog::CopysetId;

/// A write that found no room.
pub(super) struct Deferred {
    pub(super) request: Request,
    /// When it came this replica led in this term. In another one it is not proposed any more (rule 30).
    term: u64,
}

impl Shard {
    pub(super) fn chunk_request(&mut self, request: Request, out: &mut Effects) {
        let RequestOp::Chunk { chunk, ref op } = request.op else { return };
        self.wanted(request.copyset);
        let Some(group) = self.groups.get(&request.copyset) else {
            let broken = self.broken.contains(&request.copyset);
            return reply(out, request.origin, if broken { Outcome::CrcFail } else { Outcome::NoCopyset });
        };
        if group.raft.retired() != 0 {
            return reply(out, request.origin, Outcome::NoCopyset);
        }
        if group.damaged {
            return reply(out, request.origin, Outcome::CrcFail);
        }
        // A checksum may be asked of any replica; everything else only of a leader that has caught up with itself.
        if !group.raft.may_read_index() && !matches!(op, ChunkOp::Hash { .. }) {
            return self.redirect(request.copyset, request.origin, out);
        }
        match *op {
            ChunkOp::Read { .. } | ChunkOp::Info => {
                if let Some(request) = self.may_read(request, out) {
                    self.read_now(&request, out);
                }
            }
            ChunkOp::Hash { offset, len } => self.hash(request.origin, request.copyset, chunk, offset, len, out),
            ChunkOp::Write { .. } | ChunkOp::Delete { .. } | ChunkOp::Zero { .. } => {
                if !group.raft.is_leader_ready() {
                    self.redirect(request.copyset, request.origin, out);
                } else if self.writes_wait() || !self.has_room(op) {
                    let term = group.raft.term();
                    self.deferred.push_back(Deferred { request, term });
                } else {
                    self.propose(request, out);
                }
            }
        }
    }

    /// Is there memory and log space for this operation now?
    fn has_room(&self, op: &ChunkOp) -> bool {
        let len = payload_len(op);
        let waiting = self.store.pinned_bytes() as usize + self.in_flight_bytes;
        // One operation always fits: a payload larger than the limit must not wait for ever.
        let memory = waiting == 0 || waiting + len <= self.config.dirty_limit;
        memory && self.log.borrow().has_room(self.proposed_cost, len)
    }

    /// The first write that waits would find room now.
    pub(super) fn may_admit(&self) -> bool {
        let Some(Deferred { request: Request { op: RequestOp::Chunk { op, .. }, .. }, .. }) = self.deferred.front()
        else {
            return false;
        };
        !matches!(self.state, State::Failed(_)) && self.has_room(op)
    }

    /// Try again what found no room, in order.
    pub(super) fn admit_deferred(&mut self, out: &mut Effects) {
        while let Some(deferred) = self.deferred.front() {
            let RequestOp::Chunk { ref op, .. } = deferred.request.op else {
                unreachable!("only chunk operations wait")
            };
            if !self.has_room(op) {
                return;
            }
            let Some(Deferred { request, term }) = self.deferred.pop_front() else { return };
            match self.groups.get(&request.copyset) {
                Some(group) if group.raft.retired() != 0 => reply(out, request.origin, Outcome::NoCopyset),
                None => reply(out, request.origin, Outcome::NoCopyset),
                Some(group) if !group.raft.is_leader_ready() || group.raft.term() != term => {
                    self.redirect(request.copyset, request.origin, out)
                }
                Some(_) => self.propose(request, out),
            }
        }
    }

    fn propose(&mut self, request: Request, out: &mut Effects) {
        let RequestOp::Chunk { chunk, op } = request.op else { return };
        let id = request.copyset;
        if payload_len(&op) > self.log.borrow().max_entry_bytes() {
            return reply(out, request.origin, Outcome::Invalid);
        }
        if let Err(outcome) = self.store.admit(id, chunk, &op) {
            if outcome == Outcome::NoSpace {
                self.want_slots();
            }
            if outcome == Outcome::CrcFail {
                let request = Request { copyset: id, op: RequestOp::Chunk { chunk, op }, origin: request.origin };
                if let Some(request) = self.mend_request(request, chunk) {
                    reply(out, request.origin, outcome);
                }
                return;
            }
            return reply(out, request.origin, outcome);
        }
        let applied_index = self.groups.get(&id).map_or(0, |g| g.applied);
        if is_noop(&op) {
            let data = ReplyData::None;
            return out.replies.push(Reply { origin: request.origin, outcome: Outcome::Success, applied_index, data });
        }
        let Some(header) = Header::of(chunk, &op) else { return };
        let (payload, crcs) = match &op {
            ChunkOp::Write { payload, crcs, .. } => (payload.clone(), crcs.clone()),
            _ => (Bytes::new(), BlockCrcs::new()),
        };
        let pinned = payload.len();
        let cookie = self.waiting.insert(Waiting { origin: Some(request.origin), chunk, op, pinned }) as u64;
        self.in_flight_bytes += pinned;
        let Some(group) = self.groups.get_mut(&id) else { return };
        if let Err(error) = group.raft.propose(cookie, &header.encode(), &crcs, payload) {
            let outcome = match error {
                ProposeError::NotLeader { .. } | ProposeError::NotReady => Outcome::NotLeader,
                ProposeError::Full => Outcome::Overload,
                ProposeError::TooLarge => Outcome::Invalid,
            };
            return self.withdraw(id, cookie, outcome, out);
        }
        self.proposed_cost += self.log.borrow().entry_cost(pinned);
        self.mark_dirty(id);
    }

    /// A proposal will never commit.
    ///
    /// If the log may hold it a later leader may commit it: what was reserved for it stays (rule 13).
    pub(super) fn dropped(&mut self, id: CopysetId, cookie: u64, may_commit: bool, out: &mut Effects) {
        let answered = out.replies.len();
        if may_commit {
            self.settle(cookie, Outcome::NotLeader, 0, out);
        } else {
            self.withdraw(id, cookie, Outcome::NotLeader, out);
        }
        if let Some(reply) = out.replies.get_mut(answered) {
            reply.data = ReplyData::Leader(self.leader_of(id));
        }
    }

    /// Another replica is to be asked.
    pub(super) fn redirect(&self, id: CopysetId, origin: Origin, out: &mut Effects) {
        let data = ReplyData::Leader(self.leader_of(id));
        out.replies.push(Reply { origin, outcome: Outcome::NotLeader, applied_index: 0, data });
    }

    fn leader_of(&self, id: CopysetId) -> u64 {
        self.groups.get(&id).map_or(0, |group| group.raft.leader())
    }

    /// It never reached the log: give back what was reserved for it.
    fn withdraw(&mut self, id: CopysetId, cookie: u64, outcome: Outcome, out: &mut Effects) {
        if let Some(waiting) = self.waiting.get(cookie as usize) {
            self.store.abandon(id, waiting.chunk, &waiting.op);
        }
        self.settle(cookie, outcome, 0, out);
    }

    /// Answer a proposal.
    pub(super) fn settle(&mut self, cookie: u64, outcome: Outcome, index: u64, out: &mut Effects) {
        let Some(waiting) = self.waiting.try_remove(cookie as usize) else { return };
        self.in_flight_bytes -= waiting.pinned;
        if let Some(origin) = waiting.origin {
            out.replies.push(Reply { origin, outcome, applied_index: index, data: ReplyData::None });
        }
    }
}

fn payload_len(op: &ChunkOp) -> usize {
    if let ChunkOp::Write { payload, .. } = op { payload.len() } else { 0 }
}

/// Valid, but changes nothing: no entry is made of it.
fn is_noop(op: &ChunkOp) -> bool {
    match op {
        ChunkOp::Write { payload, .. } => payload.is_empty(),
        ChunkOp::Zero { len, .. } => *len == 0,
        _ => false,
    }
}
