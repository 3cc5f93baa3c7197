//! Raft snapshots: a peer that needs entries the log no longer has is offered the checkpoint instead; the shards move
//! the chunks.
//!
//! raft-rs never sees a snapshot on the receiving side. An offer is kept here; when its chunks are durable, the
//! checkpoint goes to the log, and when that is durable the raft node is started again from the log, exactly as after
//! a crash at that moment. So there is one way in which raft's state and the log come to agree, and it is the one every
//! restart tests. Until then nothing is taken and nothing is sent.

use super::ready::send;
use super::{Copyset, Role};
use crate::conf::ConfState;
use crate::config::Config;
use crate::effect::Effect;
use crate::screen::StepError;
use crate::suspicion::Suspicion;
use bytes::Bytes;
use raft::eraftpb::{Message, MessageType};
use raft::{ProgressState, SnapshotStatus};
use raftlog::{Checkpoint, HardState, Seq};

/// A checkpoint that a leader offers instead of entries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Leader.
    pub from: u64,
    /// Its term.
    pub leader_term: u64,
    /// Applied index of the checkpoint.
    pub index: u64,
    /// Term of `index`.
    pub term: u64,
    /// Configuration at `index`, as in a checkpoint.
    pub conf: Bytes,
}

/// Why a raft snapshot is not installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InstallError {
    /// No checkpoint at this index is offered (any more).
    #[error("no snapshot at this index is offered")]
    NotOffered,
    /// The log has what the snapshot would bring.
    #[error("the log is committed up to {commit} already")]
    Outdated {
        /// Committed index.
        commit: u64,
    },
    /// One is being installed, or this replica leads.
    #[error("not now")]
    Busy,
}

/// A checkpoint on its way to the disk, from which the group starts anew.
#[derive(Debug)]
pub(super) struct Installing {
    /// Batch of the checkpoint.
    pub(super) seq: Seq,
    pub(super) what: What,
}

#[derive(Debug)]
pub(super) enum What {
    /// What a leader offered.
    Offer(Offer),
    /// What an operator wanted; with so much suspicion it goes on.
    Renewal(Suspicion),
}

impl Installing {
    pub(super) fn renewal(seq: Seq, suspicion: Suspicion) -> Self {
        Self { seq, what: What::Renewal(suspicion) }
    }
}

impl Copyset {
    /// The offer that waits for its chunks.
    #[must_use]
    pub fn offered(&self) -> Option<&Offer> {
        self.offer.as_ref()
    }

    /// True while an installed checkpoint is not durable yet.
    #[must_use]
    pub fn is_installing(&self) -> bool {
        self.installing.is_some()
    }

    pub(super) fn take_offer(&mut self, message: &Message) -> Result<(), StepError> {
        // A heartbeat says everything to raft-rs that the offer does, except what is not ready yet.
        let mut beat = Message::default();
        beat.set_msg_type(MessageType::MsgHeartbeat);
        (beat.from, beat.to, beat.term) = (message.from, message.to, message.term);
        self.pass(beat)?;
        if self.raw.raft.leader_id != message.from || self.raw.raft.term != message.term {
            return Ok(()); // an old leader's
        }
        let metadata = message.get_snapshot().get_metadata();
        let (index, term) = (metadata.index, metadata.term);
        if index <= self.commit_index() {
            self.acknowledge(message.from, self.commit_index().min(self.durable_index()));
            return Ok(());
        }
        let conf = message.get_snapshot().data.clone();
        let offer = Offer { from: message.from, leader_term: message.term, index, term, conf: conf.clone() };
        self.offer = Some(offer);
        self.outbox.push(Effect::SnapshotOffered { from: message.from, index, term, conf });
        Ok(())
    }

    /// Tells the leader what is durable here.
    fn acknowledge(&mut self, leader: u64, index: u64) {
        let mut answer = Message::default();
        answer.set_msg_type(MessageType::MsgAppendResponse);
        (answer.from, answer.to, answer.term) = (self.config.peer, leader, self.raw.raft.term);
        (answer.index, answer.commit) = (index, index);
        // Not before the own term is durable.
        match self.held.back_mut() {
            Some(held) if self.vote_seq > self.durable => held.messages.push(answer),
            _ => self.outbox.push(send(answer)),
        }
    }

    /// The chunks of the offer at `index` are durable here, each at least as new: start again from there. Gives the
    /// batch of the log to wait for; once [`Self::persisted`] has reached it, [`Effect::Installed`] follows.
    pub fn install_snapshot(&mut self, now: u64, index: u64) -> Result<Seq, InstallError> {
        self.time.advance(now);
        let commit = self.commit_index();
        let offer = self.offer.take_if(|offer| offer.index == index).ok_or(InstallError::NotOffered)?;
        if index <= commit {
            return Err(InstallError::Outdated { commit });
        }
        if self.inert() || self.role() == Role::Leader {
            self.offer = Some(offer);
            return Err(InstallError::Busy);
        }
        let conf = ConfState::decode(&offer.conf);
        let conf = conf.unwrap_or_else(|e| panic!("{:?}: an offer that was checked: {e}", self.config.id));
        let state = self.raw.raft.hard_state();
        let checkpoint = Checkpoint {
            applied_index: index,
            applied_term: offer.term,
            hard_state: HardState { term: state.term, vote: state.vote, commit: index },
            conf: self.own(conf).encode(),
            incarnation: self.raw.store().incarnation(),
        };
        let seq = self.log.borrow_mut().checkpoint(self.config.id, checkpoint);
        self.held.clear(); // messages that were not sent are as good as lost
        self.installing = Some(Installing { seq, what: What::Offer(offer) });
        Ok(seq)
    }

    /// The checkpoint is durable.
    pub(super) fn installed(&mut self, offer: &Offer) {
        let (index, term, suspicion) = (offer.index, offer.term, self.suspicion);
        self.begin_anew(suspicion.holds());
        self.suspicion = suspicion;
        self.outbox.push(Effect::Installed { index, term });
        if offer.leader_term == self.raw.raft.term {
            self.acknowledge(offer.from, index);
        }
        self.weigh_suspicion();
    }

    /// Another life, from what the log says.
    pub(super) fn begin_anew(&mut self, suspect: bool) {
        let config = Config { suspect, ..self.config.clone() };
        let life = Self::new(config, self.log.clone(), self.time.now());
        let life = life.unwrap_or_else(|e| panic!("{:?}: a checkpoint that was checked: {e}", self.config.id));
        let before = std::mem::replace(self, life);
        let own = std::mem::replace(&mut self.outbox, before.outbox);
        self.outbox.extend(own);
        (self.rng, self.announced, self.held_back) = (before.rng, before.announced, before.held_back);
        self.lossy = before.lossy;
        self.draw_timeout();
    }

    /// An offer leaves.
    pub(super) fn note_offer(&mut self, message: &Message, out: &mut Vec<Effect>) {
        if message.get_msg_type() != MessageType::MsgSnapshot {
            return;
        }
        let (peer, snapshot) = (message.to, message.get_snapshot());
        let (index, term) = (snapshot.get_metadata().index, snapshot.get_metadata().term);
        self.offers.insert(peer, self.time.now());
        out.push(Effect::SnapshotNeeded { peer, index, term, conf: snapshot.data.clone() });
    }

    /// Chunks are offered to this peer instead of entries.
    #[must_use]
    pub fn feeds(&self, peer: u64) -> bool {
        self.offers.contains_key(&peer)
    }

    /// A peer is fetching chunks: its offer stands.
    pub fn snapshot_progress(&mut self, now: u64, peer: u64) {
        self.time.advance(now);
        let now = self.time.now();
        if let Some(moved) = self.offers.get_mut(&peer) {
            *moved = now;
        }
        if let Some(plan) = &mut self.plan {
            plan.moved(peer, now);
        }
    }

    /// A transfer to a peer is known to be over. Not needed when it succeeds: the peer says so itself.
    pub fn snapshot_sent(&mut self, peer: u64, ok: bool) {
        if self.offers.remove(&peer).is_some() {
            self.raw.report_snapshot(peer, if ok { SnapshotStatus::Finish } else { SnapshotStatus::Failure });
        }
    }

    /// Offers nobody took up for 2 T are made again, by then perhaps of a newer checkpoint.
    pub(super) fn renew_offers(&mut self) {
        if self.offers.is_empty() {
            return;
        }
        let (now, patience) = (self.time.now(), 2 * self.config.election_timeout_ns);
        let progress = self.raw.raft.prs();
        let waits = |id: u64| progress.get(id).is_some_and(|p| p.state == ProgressState::Snapshot);
        self.offers.retain(|&peer, _| waits(peer));
        let stale = self.offers.iter().filter(|(_, moved)| now.saturating_sub(**moved) >= patience);
        for peer in stale.map(|(&peer, _)| peer).collect::<Vec<_>>() {
            self.snapshot_sent(peer, false);
        }
    }
}
