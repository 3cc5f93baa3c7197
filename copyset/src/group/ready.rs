//! What one call of `ready` does: proposals to raft-rs, its `Ready`s to the log, committed entries to the shard.

use super::{Copyset, Held};
use crate::conf::ConfState;
use crate::effect::{Committed, Effect};
use crate::entry::{change_of, to_log};
use bytes::Bytes;
use raft::StateRole;
use raft::eraftpb::{self, ConfChangeV2, EntryType, Message, MessageType};
use raftlog::HardState;

/// Members a configuration may grow to; `conf.rs` could not encode more than 64.
pub(super) const MEMBERS_MAX: usize = 32;

impl Copyset {
    /// One message for all of a turn's proposals: one append, one `Ready`.
    pub(super) fn propose_queued(&mut self) {
        if !self.proposals.has_queued() {
            return;
        }
        let entries = self.proposals.take(self.last_index() + 1, self.term());
        let count = entries.len();
        let mut message = Message::default();
        message.set_msg_type(MessageType::MsgPropose);
        message.from = self.config.peer;
        message.set_entries(entries.into());
        if self.raw.raft.step(message).is_err() {
            self.proposals.refuse_last(count, &mut self.outbox);
        }
    }

    pub(super) fn one_ready(&mut self, out: &mut Vec<Effect>) {
        let mut ready = self.raw.ready();
        assert!(ready.snapshot().is_empty(), "raft-rs is never given a snapshot");
        self.append(ready.take_entries());
        let mut kept = ready.take_persisted_messages();
        let mut free = ready.take_messages();
        for message in &free {
            self.count(message);
            self.note_offer(message, out);
        }
        if self.vote_seq > self.durable {
            kept.append(&mut free);
        } else {
            // Answers that speak of the term only. A slow disk must not cost the leader its lease.
            free.extend(kept.extract_if(.., |message| speaks_of_term_only(message)));
        }
        out.extend(free.into_iter().map(send));
        let committed = ready.take_committed_entries();
        let number = ready.number();
        self.raw.advance_append_async(ready);
        self.hold(number, kept);
        if self.suspicion.holds() {
            self.weigh_suspicion();
        }
        for entry in committed {
            self.emit(entry, out);
        }
        self.look();
    }

    /// Entries and hard state of one `Ready`, in one call. A commit that moved alone waits for the next one.
    fn append(&mut self, entries: Vec<eraftpb::Entry>) {
        let state = self.raw.raft.hard_state();
        self.hard_state = HardState { term: state.term, vote: state.vote, commit: state.commit };
        let voted = (state.term, state.vote) != (self.logged.term, self.logged.vote);
        if entries.is_empty() && !voted {
            return;
        }
        let changed = (self.hard_state != self.logged).then_some(self.hard_state);
        let entries = entries.into_iter().map(to_log).collect();
        self.last_seq = self.log.borrow_mut().append(self.config.id, entries, changed);
        self.logged = self.hard_state;
        if voted {
            self.vote_seq = self.last_seq;
        }
    }

    /// Keeps a `Ready` until its batch, and so those before it, are durable.
    fn hold(&mut self, number: u64, mut messages: Vec<Message>) {
        if self.last_seq <= self.durable {
            self.raw.on_persist_ready(number);
            self.outbox.extend(messages.into_iter().map(send));
            return;
        }
        let seq = self.last_seq;
        match self.held.back_mut() {
            Some(last) if last.seq == seq => {
                last.number = number;
                last.messages.append(&mut messages);
            }
            _ => self.held.push_back(Held { seq, number, messages }),
        }
    }

    /// Hands out one committed entry; what concerns the group itself takes effect here.
    fn emit(&mut self, mut entry: eraftpb::Entry, out: &mut Vec<Effect>) {
        let (index, term) = (entry.index, entry.term);
        let (last, last_term) = self.emitted;
        assert!(index == last + 1 && index <= self.durable_index(), "entry {index} is out of turn");
        let mut committed = Committed {
            index,
            term,
            cookie: self.proposals.committed(index, term),
            context: Bytes::new(),
            payload: Bytes::new(),
            payload_len: 0,
        };
        if entry.get_entry_type() != EntryType::EntryNormal {
            self.change(index, &change_of(&entry));
        } else if entry.context.is_empty() {
            // raft-rs also turns a refused membership change into an empty entry; only the first of a term counts.
            if term > last_term {
                let conf = self.conf();
                let void = if index < conf.void { conf.void } else { 0 };
                self.history.push(index, ConfState { epoch: conf.epoch + 1, void, ..conf.clone() });
            }
        } else {
            committed.context = std::mem::take(&mut entry.context);
            committed.payload = std::mem::take(&mut entry.data);
            committed.payload_len = match committed.payload.len() {
                0 => self.raw.store().payload_len(index),
                len => len,
            };
        }
        self.emitted = (index, term);
        out.push(Effect::Apply(committed));
    }

    /// A committed membership change. Whether it is refused depends on the configuration before it
    /// only, so all replicas agree.
    fn change(&mut self, index: u64, change: &ConfChangeV2) {
        if self.members_with(change) > MEMBERS_MAX || index <= self.conf().void {
            return;
        }
        let before = self.conf().clone();
        let Ok(state) = self.raw.apply_conf_change(change) else { return };
        let mut conf = ConfState::from_raft(&state, before.epoch);
        // Curve counts changes of the voters, once each; a joint stage counts when it ends.
        let old = if before.joint() { &before.voters_outgoing } else { &before.voters };
        conf.epoch += u64::from(!conf.joint() && conf.voters != *old);
        self.history.push(index, conf);
        self.conf_changed();
        let raft = &mut self.raw.raft;
        if raft.state == StateRole::Leader && raft.prs().get(raft.id).is_none() {
            // raft-rs would stay leader and fail at its next persisted entry.
            let term = raft.term;
            raft.become_follower(term, 0);
        }
    }
}

fn speaks_of_term_only(message: &Message) -> bool {
    matches!(message.get_msg_type(), MessageType::MsgHeartbeatResponse | MessageType::MsgRequestPreVoteResponse)
}

pub(super) fn send(message: Message) -> Effect {
    Effect::Send(Box::new(message))
}
