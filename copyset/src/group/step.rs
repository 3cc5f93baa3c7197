//! Messages from peers.

use super::{Copyset, Role};
use crate::conf::ConfState;
use crate::screen::{self, IDLE_ASKED, IDLE_TAKEN, Receiver, StepError, from_leader, round_of, says};
use crate::suspicion::Suspicion;
use raft::eraftpb::{Message, MessageType};
use raft::{CAMPAIGN_TRANSFER, StateRole};

impl Copyset {
    /// Takes a peer's message. On an error nothing has changed. `now`: see [`Self::tick`].
    pub fn step(&mut self, now: u64, mut message: Message) -> Result<(), StepError> {
        self.time.advance(now);
        if self.inert() {
            return Err(StepError::Installing);
        }
        screen::check(&message, &self.receiver())?;
        let kind = message.get_msg_type();
        if from_leader(kind) && self.suspicion.bars(message.term) {
            return Err(StepError::Suspect);
        }
        if self.stirred_by(&mut message) && kind == MessageType::MsgRequestPreVote {
            return Ok(()); // whether there is a leader shows before it is asked again
        }
        match kind {
            MessageType::MsgRequestVote | MessageType::MsgRequestPreVote => {
                self.tell_stranger(&message);
                if self.suspicion.holds() {
                    return Err(StepError::Suspect);
                }
                if self.owes_silence(&message) {
                    return Ok(());
                }
            }
            MessageType::MsgRequestPreVoteResponse if !message.context.is_empty() => return self.removal(&message),
            MessageType::MsgTimeoutNow if !self.takes_over() => return Ok(()),
            MessageType::MsgSnapshot => return self.take_offer(&message),
            _ => {}
        }
        self.pass(message)
    }

    /// To raft-rs, and what follows from it.
    pub(super) fn pass(&mut self, message: Message) -> Result<(), StepError> {
        let Message { from, term, index, reject, .. } = message;
        let (kind, round) = (message.get_msg_type(), round_of(&message));
        let (asked, taken) = (says(&message, IDLE_ASKED), says(&message, IDLE_TAKEN));
        match kind {
            MessageType::MsgAppendResponse if !reject => self.make_room(from, index),
            MessageType::MsgHeartbeatResponse => self.make_way(from),
            _ => {}
        }
        let outcome = self.raw.step(message).map_err(|e| StepError::Raft(e.to_string()));
        self.look();
        let raft = &self.raw.raft;
        if outcome.is_err() || term != raft.term {
            return outcome;
        }
        match raft.state {
            StateRole::Follower if from_leader(kind) && raft.leader_id == from => self.heard_leader(asked),
            StateRole::Leader if kind == MessageType::MsgHeartbeatResponse => {
                if taken {
                    self.idle.taken_by(from);
                }
                if let Some(round) = round {
                    self.lease.echo(from, round);
                    self.settle_lease();
                }
            }
            _ => {}
        }
        outcome
    }

    fn heard_leader(&mut self, idle: bool) {
        let first = self.time.never_led();
        self.time.heard(self.time.now());
        self.time.set_idle(idle);
        self.removed = false;
        if first {
            self.draw_timeout(); // what was drawn was for a copyset without a leader
        }
    }

    fn receiver(&self) -> Receiver {
        let raft = &self.raw.raft;
        Receiver {
            me: self.config.peer,
            role: raft.state,
            term: raft.term,
            leader: raft.leader_id,
            last: self.last_index(),
            durable: self.durable_index(),
            round: self.lease.last(),
            payload_max: self.entry_bytes_max,
        }
    }

    /// Votes are refused while a leader may count on it (rule 18). Not if the leader itself asked for the election:
    /// it gave up its lease first.
    fn owes_silence(&self, message: &Message) -> bool {
        message.context != CAMPAIGN_TRANSFER && self.time.refuses_votes()
    }

    /// Whether it takes leadership over when told to.
    fn takes_over(&self) -> bool {
        // A sole voter campaigns by itself, when its log is durable.
        let alone = self.conf().sole_voter(self.config.peer);
        !alone && !self.held_back && !self.removed && !self.suspicion.holds()
    }

    /// Whoever asks for votes and is no member was removed while it was away: it never got the entry that says so.
    fn tell_stranger(&mut self, message: &Message) {
        let conf = self.conf();
        let stranger = !conf.voters.is_empty() && !conf.has_member(message.from);
        if message.get_msg_type() != MessageType::MsgRequestPreVote || !stranger {
            return;
        }
        let mut notice = Message::default();
        notice.set_msg_type(MessageType::MsgRequestPreVoteResponse);
        (notice.from, notice.to, notice.term) = (self.config.peer, message.from, self.raw.raft.term);
        (notice.reject, notice.context) = (true, conf.encode());
        self.outbox.push(super::ready::send(notice));
    }

    /// A member's word that this replica is none. A newer configuration than the own is believed.
    fn removal(&mut self, message: &Message) -> Result<(), StepError> {
        let conf = ConfState::decode(&message.context).map_err(|_| StepError::Context)?;
        if !message.reject || !self.conf().has_member(message.from) {
            return Err(StepError::Unasked);
        }
        let out = conf.epoch > self.conf().epoch && !conf.has_member(self.config.peer) && !conf.voters.is_empty();
        if out && self.role() != Role::Leader {
            self.removed = true;
            let term = self.raw.raft.term;
            self.raw.raft.become_follower(term, 0);
            self.look();
        }
        Ok(())
    }

    /// Every other voter has said that its term and its last index are at most these: what this replica lost is not
    /// above them. From now on it follows leaders of at least that term; it votes and campaigns when it has caught up.
    /// No effect unless it started as suspect ([`crate::Config::suspect`], or its checkpoint says so).
    pub fn suspect_until(&mut self, term: u64, index: u64) {
        if self.suspicion.holds() {
            self.suspicion = Suspicion::Until { term, index };
            self.weigh_suspicion();
        }
    }

    /// Whether the others' answers are still wanted: see [`Self::suspect_until`].
    #[must_use]
    pub fn wants_word(&self) -> bool {
        self.suspicion == Suspicion::Unknown
    }

    /// A peer says that its log ends at `last`, though it had acknowledged more: what it lost is sent again. No effect
    /// unless this replica leads.
    pub fn forgot(&mut self, peer: u64, last: u64) {
        if self.role() != Role::Leader {
            return;
        }
        if let Some(progress) = self.raw.raft.mut_prs().get_mut(peer).filter(|p| p.matched > last) {
            progress.matched = last;
            progress.become_probe();
        }
    }

    pub(super) fn weigh_suspicion(&mut self) {
        if self.installing.is_some() {
            return; // weighed when that is durable
        }
        let (before, held) = (self.suspicion.holds(), self.commit_index().min(self.durable_index()));
        self.suspicion.reached(self.raw.raft.term, held);
        if self.suspicion.holds() != before {
            self.log_suspicion();
        }
        self.campaign_alone();
    }

    /// Has the log say whether this replica is suspect. What shows that records are lost goes with the segments they were
    /// in, and the replica must not forget it with them. That it is suspect no more counts at the next restart only when
    /// its log shows the loss no more: see [`Self::is_lossy`].
    pub(super) fn log_suspicion(&mut self) {
        let checkpoint = self.checkpoint_at(self.raw.store().checkpoint_index());
        self.log.borrow_mut().checkpoint(self.config.id, checkpoint);
    }

    /// True while this replica neither votes nor campaigns because its log lost records (rule 21).
    #[must_use]
    pub fn is_suspect(&self) -> bool {
        self.suspicion.holds()
    }

    /// Leads no longer; what was proposed is dropped. No effect on a sole voter, which would lead again at once.
    pub fn step_down(&mut self) {
        if self.role() == Role::Leader && !self.conf().sole_voter(self.config.peer) {
            let term = self.raw.raft.term;
            self.raw.raft.become_follower(term, 0);
            self.look();
        }
    }

    /// While `true`, this replica does not campaign: its chunks are not what its log says, as during the installation
    /// of a raft snapshot.
    pub fn hold_back(&mut self, hold: bool) {
        self.held_back = hold;
        self.campaign_alone();
    }

    /// A member said that this replica is none any more. It does not campaign; a leader's message ends that.
    #[must_use]
    pub fn is_removed(&self) -> bool {
        self.removed
    }
}
