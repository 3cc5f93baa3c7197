//! One raft group: proposals and messages in, log appends and effects out.
//!
//! Invariants:
//! * **Nothing leaves before it is durable.** Each raft `Ready` remembers the log batch it needs ([`Held`]); its
//!   messages and its `on_persist_ready` wait for that batch. raft-rs hands out committed entries only when the own
//!   log has persisted them, and that is asserted.
//! * **raft-rs and the log agree whenever `ready` returns**: entries of a `Ready` are appended before it is advanced.
//!   [`Copyset::hard_state_for_log`] is the state of the last `Ready`, never a newer one: a commit must not reach the
//!   log before the entries it speaks of.
//! * **A promise to a leader is kept by the clock** (rule 18): see `lease.rs` and `time.rs`.
//! * **A term is used once.** A sole voter becomes leader before its own vote is durable; it keeps its messages until
//!   the batch with that vote is, or a learner could be sent two different entries of one term across a crash.

mod flow;
mod idle;
mod member;
mod read;
mod ready;
mod renew;
mod snapshot;
mod status;
mod step;
mod time;

use crate::conf::ConfState;
use crate::config::{Config, quiet, raft_config};
use crate::effect::Effect;
use crate::fetch::Fetches;
use crate::history::History;
use crate::lease::Lease;
use crate::plan::Plan;
use crate::proposals::{Contexts, Proposals};
use crate::reads::Reads;
use crate::restore::{self, Error, Start};
use crate::rng::Rng;
use crate::screen::HEADER_MAX;
use crate::storage::LogStorage;
use crate::suspicion::Suspicion;
use crate::time::Time;
use crate::window::Window;
use bytes::Bytes;
use raft::eraftpb::{self, ConfChangeV2, Message};
use raft::{RaftState, RawNode, StateRole, Storage};
use raftlog::{BLOCK, Checkpoint, HardState, Log, Seq};
use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use idle::Idle;
pub use member::{ChangeRefused, InProgress, Started};
use ready::{MEMBERS_MAX, send};
pub use renew::{Renewal, ResetRefused};
pub use snapshot::{InstallError, Offer};
use snapshot::{Installing, What};
pub use status::Role;

/// Why a proposal was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// Another replica leads, or none.
    #[error("not the leader")]
    NotLeader {
        /// Who does, 0 if unknown.
        leader: u64,
    },
    /// Elected, but no entry of the own term is applied yet (or leadership is being handed over): what admission
    /// would decide on may be stale.
    #[error("the leader is not ready yet")]
    NotReady,
    /// Too much is waiting to be committed.
    #[error("too many proposals in flight")]
    Full,
    /// An entry this long fits into no segment of the log.
    #[error("the payload is longer than a log entry may be")]
    TooLarge,
}

/// A `Ready` whose batch is not durable yet.
struct Held {
    seq: Seq,
    number: u64,
    messages: Vec<Message>,
}

/// One replica of one copyset.
pub struct Copyset {
    config: Config,
    log: Rc<RefCell<Log>>,
    raw: RawNode<LogStorage>,
    entry_bytes_max: usize,
    rng: Rng,
    time: Time,
    /// Term and role as last looked at.
    seen: (u64, StateRole),
    proposals: Proposals,
    contexts: Contexts,
    history: History,
    lease: Lease,
    reads: Reads,
    idle: Idle,
    window: Window,
    fetches: Fetches,
    /// A membership change begun here.
    plan: Option<Plan>,
    /// When a transfer of leadership is given up.
    transfer_until: Option<u64>,
    /// Peers that were offered the checkpoint, and when they last fetched some of it.
    offers: BTreeMap<u64, u64>,
    /// The checkpoint that was offered to this replica.
    offer: Option<Offer>,
    installing: Option<Installing>,
    /// See [`Self::freeze`].
    frozen: bool,
    suspicion: Suspicion,
    /// Committed as of the last tick, and until when others are let lead: see `tick_commit`.
    committed: u64,
    yields_until: u64,
    /// See [`Self::is_lossy`].
    lossy: bool,
    /// Not fit to lead, says the shard.
    held_back: bool,
    /// No member any more, says a member.
    removed: bool,
    /// See [`Self::retire`].
    retired: u64,
    /// As of the last `Ready`.
    hard_state: HardState,
    /// The newest one the log was given.
    logged: HardState,
    /// Newest batch this copyset needs, and the newest that changed term or vote.
    last_seq: Seq,
    vote_seq: Seq,
    durable: Seq,
    held: VecDeque<Held>,
    /// Newest entry handed out for apply, and its term.
    emitted: (u64, u64),
    applied: u64,
    applied_term: u64,
    /// Effects that arose between two calls of `ready`.
    outbox: Vec<Effect>,
    announced: (u64, u64, bool),
}

impl Copyset {
    /// The first checkpoint of a copyset; logging it creates the copyset.
    ///
    /// With voters it stands at index 1, term 1, as if a first entry had said who they are: a peer that joins later
    /// with an empty log then never matches a leader's log by accident and is sent a raft snapshot, which carries the
    /// configuration. Without voters (a passive replica that waits to be added) it stands at 0.
    #[must_use]
    pub fn initial_checkpoint(voters: &[u64], incarnation: u64) -> Checkpoint {
        let conf = ConfState::of(voters);
        let at = u64::from(!conf.voters.is_empty());
        Checkpoint {
            applied_index: at,
            applied_term: at,
            hard_state: HardState { term: at, vote: 0, commit: at },
            conf: conf.encode(),
            incarnation,
        }
    }

    /// What stands in the log for a copyset of which it has lost even the checkpoint: that there is one, and nothing else.
    #[must_use]
    pub fn lost_checkpoint() -> Checkpoint {
        let conf = ConfState { suspect: true, ..ConfState::default() };
        Checkpoint { conf: conf.encode(), ..Self::initial_checkpoint(&[], 0) }
    }

    /// Whether that is all that a checkpoint says.
    #[must_use]
    pub fn is_lost(checkpoint: &Checkpoint) -> bool {
        ConfState::decode(&checkpoint.conf).is_ok_and(|conf| conf.suspect && conf.voters.is_empty())
    }

    /// Starts from what the log says; a first start and a restart are the same. A sole voter campaigns at once.
    /// `now`: see [`Self::tick`].
    pub fn new(config: Config, log: Rc<RefCell<Log>>, now: u64) -> Result<Self, Error> {
        if config.peer == 0 {
            return Err(Error::Nobody);
        }
        let (start, logged, durable, entry_bytes_max) = {
            let log = log.borrow();
            let start = restore::load(&log, config.id, config.suspect)?;
            let logged = log.index(config.id).map(raftlog::Index::hard_state).unwrap_or_default();
            (start, logged, log.durable_seq(), log.max_entry_bytes())
        };
        let Start { conf, suspect, applied, applied_term, hard_state } = start;
        let mut state = eraftpb::HardState::default();
        (state.term, state.vote, state.commit) = (hard_state.term, hard_state.vote, hard_state.commit);
        let storage = LogStorage::new(Rc::clone(&log), config.id, RaftState::new(state, conf.to_raft()));
        let marked = conf.suspect;
        let raw = RawNode::new(&raft_config(&config, applied), storage, &quiet())?;
        // Whoever echoed a leader's round had made its term durable first; the first leader's term is 2.
        let fresh = hard_state.term <= 1 && hard_state.vote == 0 && !suspect;
        let mut this = Self {
            rng: Rng::new(config.seed, [config.id.0, config.peer]),
            time: Time::new(&config, now, fresh),
            seen: (hard_state.term, StateRole::Follower),
            proposals: Proposals::default(),
            contexts: Contexts::default(),
            retired: conf.retired,
            // What others may be told.
            history: History::new(applied, ConfState { retired: 0, suspect: false, ..conf }),
            lease: Lease::default(),
            reads: Reads::default(),
            idle: Idle::new(now),
            window: Window::default(),
            fetches: Fetches::default(),
            plan: None,
            transfer_until: None,
            offers: BTreeMap::new(),
            offer: None,
            installing: None,
            frozen: false,
            suspicion: if suspect { Suspicion::Unknown } else { Suspicion::Clear },
            committed: 0,
            yields_until: 0,
            lossy: suspect,
            held_back: false,
            removed: false,
            hard_state,
            logged,
            last_seq: durable,
            vote_seq: durable,
            durable,
            held: VecDeque::new(),
            emitted: (applied, applied_term),
            applied,
            applied_term,
            outbox: Vec::new(),
            announced: (0, hard_state.term, false),
            entry_bytes_max,
            config,
            log,
            raw,
        };
        if suspect && !marked {
            this.log_suspicion();
        }
        this.draw_timeout();
        this.campaign_alone();
        Ok(this)
    }

    /// Queues an operation. Its context becomes `crcs` (u32 little-endian) ++ `header`; the payload is not copied.
    /// Everything queued in a turn is proposed at once by the next [`Self::ready`].
    ///
    /// # Panics
    /// If `header` is empty (such entries are raft's own) or longer than [`crate::HEADER_MAX`], or `crcs` are not one
    /// for each block of `payload`.
    pub fn propose(&mut self, cookie: u64, header: &[u8], crcs: &[u32], payload: Bytes) -> Result<(), ProposeError> {
        assert!((1..=HEADER_MAX).contains(&header.len()), "a header of {} bytes", header.len());
        assert_eq!(crcs.len() * BLOCK, payload.len(), "one CRC per payload block");
        self.may_propose()?;
        if payload.len() > self.entry_bytes_max {
            return Err(ProposeError::TooLarge);
        }
        let full = self.proposals.bytes() + payload.len() > self.config.max_waiting_bytes;
        if self.proposals.count() >= self.config.max_waiting || (full && self.proposals.count() > 0) {
            return Err(ProposeError::Full);
        }
        let mut entry = eraftpb::Entry::default();
        (entry.data, entry.context) = (payload, self.contexts.make(header, crcs));
        self.proposals.push(cookie, entry);
        self.used();
        Ok(())
    }

    /// Proposes a membership change; one at a time. What came of it shows in [`Self::conf`] once applied.
    pub fn propose_change(&mut self, change: &ConfChangeV2) -> Result<(), ProposeError> {
        self.may_propose()?;
        if self.raw.raft.has_pending_conf() {
            return Err(ProposeError::Full);
        }
        if self.members_with(change) > MEMBERS_MAX {
            return Err(ProposeError::TooLarge);
        }
        let outcome = self.raw.propose_conf_change(Vec::new(), change.clone());
        outcome.map_err(|_| ProposeError::NotReady)
    }

    /// True if this replica leads, has applied an entry of its own term and is not handing leadership over: it may
    /// propose, and knows the newest committed state. Whether it may also answer reads is [`Self::may_read`].
    #[must_use]
    pub fn is_leader_ready(&self) -> bool {
        self.may_read_index() && self.raw.raft.lead_transferee.is_none()
    }

    /// True if [`Self::ready`] has anything to do.
    #[must_use]
    pub fn dirty(&self) -> bool {
        if self.inert() {
            return !self.outbox.is_empty();
        }
        self.proposals.has_queued()
            || !self.outbox.is_empty()
            || self.announced != self.standing()
            || self.reads.needs_round()
            || self.reads.has_ready(self.applied)
            || self.raw.has_ready()
    }

    /// Drains raft: new entries go to the log, effects to `out`. Called at the end of a turn.
    pub fn ready(&mut self, out: &mut Vec<Effect>) {
        if self.inert() {
            return out.append(&mut self.outbox);
        }
        self.propose_queued();
        if self.reads.needs_round() {
            self.start_round();
        }
        while self.raw.has_ready() {
            self.one_ready(out);
        }
        self.reads.take_ready(self.applied, out);
        self.fetch(out);
        out.append(&mut self.outbox);
        let standing = self.standing();
        if self.announced != standing {
            self.announced = standing;
            let (leader, term, ready) = standing;
            out.push(Effect::LeaderChanged { leader, term, ready });
        }
    }

    /// The log is durable up to batch `durable`.
    pub fn persisted(&mut self, durable: Seq) {
        self.durable = self.durable.max(durable);
        if let Some(Installing { what, .. }) = self.installing.take_if(|it| it.seq <= durable) {
            return match what {
                What::Offer(offer) => self.installed(&offer),
                What::Renewal(suspicion) => self.renewed(suspicion),
            };
        }
        let mut number = None;
        while let Some(held) = self.held.pop_front_if(|held| held.seq <= durable) {
            number = Some(held.number);
            self.outbox.extend(held.messages.into_iter().map(send));
        }
        if let Some(number) = number {
            // The messages leave at the next `ready`, hence after this.
            self.raw.on_persist_ready(number);
            self.look();
            self.weigh_suspicion();
        }
    }

    /// The shard has applied everything up to `index`.
    ///
    /// # Panics
    /// If that was never handed out.
    pub fn applied(&mut self, index: u64) {
        assert!(index <= self.emitted.0, "entry {index} was not handed out for apply");
        if index <= self.applied || self.installing.is_some() {
            return; // what is being installed holds it already
        }
        self.applied = index;
        self.applied_term = self.term_at(index);
        self.raw.advance_apply_to(index);
        self.history.forget_below(self.raw.store().checkpoint_index());
        self.look();
        self.campaign_alone();
        self.drive();
    }

    /// What to restart from once everything up to `index` is durable outside the log. `index` lies between the
    /// log's newest checkpoint and [`Self::applied_index`].
    #[must_use]
    pub fn checkpoint_at(&self, index: u64) -> Checkpoint {
        assert!(index <= self.applied, "a checkpoint at {index} above the applied {}", self.applied);
        Checkpoint {
            applied_index: index,
            applied_term: self.term_at(index),
            hard_state: self.hard_state,
            conf: self.own(self.history.at(index).clone()).encode(),
            incarnation: self.raw.store().incarnation(),
        }
    }

    /// With what is only of this replica.
    fn own(&self, conf: ConfState) -> ConfState {
        ConfState { retired: self.retired, suspect: self.suspicion.holds(), ..conf }
    }

    /// From now on every checkpoint says that this replica was taken out of service for good at `at`, seconds since 1970
    /// and not 0. What that means is the shard's business.
    pub fn retire(&mut self, at: u64) {
        self.retired = at;
    }

    /// When it was retired, 0 if it was not.
    #[must_use]
    pub fn retired(&self) -> u64 {
        self.retired
    }

    /// The hard state to log when its commit must become durable. Everything handed out for apply is covered.
    #[must_use]
    pub fn hard_state_for_log(&self) -> HardState {
        self.hard_state
    }

    /// A replica may propose only what it can decide: see [`ProposeError::NotReady`].
    fn may_propose(&self) -> Result<(), ProposeError> {
        match self.role() {
            Role::Leader if self.is_leader_ready() => Ok(()),
            Role::Leader => Err(ProposeError::NotReady),
            _ => Err(ProposeError::NotLeader { leader: self.leader() }),
        }
    }

    fn members_with(&self, change: &ConfChangeV2) -> usize {
        let conf = self.conf();
        conf.voters.len() + conf.learners.len() + conf.voters_outgoing.len() + change.get_changes().len()
    }

    fn standing(&self) -> (u64, u64, bool) {
        (self.leader(), self.term(), self.is_leader_ready())
    }

    fn term_at(&self, index: u64) -> u64 {
        let term = self.raw.store().term(index);
        term.unwrap_or_else(|e| panic!("{:?}: no term of applied entry {index}: {e}", self.config.id))
    }
}
