//! Idle copysets: nobody uses them, every member has everything, and all of them know. Their heartbeats, elections and
//! check-quorum take [`crate::IDLE_FACTOR`] times as long: a node has thousands of copysets and few are in use.
//!
//! Only waiting changes, never a promise: a leader that beats slowly has no lease between two beats, and whoever may
//! vote may. So nothing here can make an answer wrong; what it could cost is time. Hence:
//! * A leader slows down only when **all** members have said that they did: nobody waits T for a beat that comes in 8 T.
//! * Anything but such a beat and its echo ends it: a request of a client (even to a follower, which then asks the leader
//!   whether it is there), a lost connection, any other message. Then all goes on as if a beat had just been heard.
//! * A replica that is woken by a pre-vote lets that one pass without an answer. A leader that lives is heard before the
//!   next one, and is not deposed by a replica that lost a connection.

use super::{Copyset, Role};
use crate::screen::{IDLE_ASKED, IDLE_TAKEN, from_leader, says};
use bytes::Bytes;
use raft::eraftpb::{Message, MessageType};

/// What a leader knows of it.
#[derive(Debug)]
pub(super) struct Idle {
    /// When the copyset was last used here.
    used: u64,
    /// Who has slowed down since the leader last asked for it.
    taken: Vec<u64>,
}

impl Idle {
    pub(super) fn new(now: u64) -> Self {
        Self { used: now, taken: Vec::new() }
    }

    /// A member's echo says that it waits for longer now.
    pub(super) fn taken_by(&mut self, member: u64) {
        if !self.taken.contains(&member) {
            self.taken.push(member);
        }
    }
}

impl Copyset {
    /// A client wants something of this copyset, of whichever replica. `now`: see [`Self::tick`].
    pub fn wanted(&mut self, now: u64) {
        self.time.advance(now);
        self.used();
    }

    /// True while heartbeats are rare: see the module `group/idle.rs`.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.time.is_idle()
    }

    pub(super) fn used(&mut self) {
        self.idle.used = self.time.now();
        if self.time.is_idle() {
            self.rouse();
            // What the client wants says it to the others at once; if not, the next tick does.
            self.time.beat_soon();
        }
    }

    /// Something happened to the group, other than a client.
    pub(super) fn stir(&mut self) {
        if self.time.is_idle() {
            self.rouse();
            self.start_round();
        }
    }

    /// Whether this message ended the idleness. A leader's offer to become idle is marked as taken: the echo will say so.
    pub(super) fn stirred_by(&mut self, message: &mut Message) -> bool {
        if says(message, IDLE_ASKED) && message.get_msg_type() == MessageType::MsgHeartbeat {
            let mut context = [0; 8];
            context.copy_from_slice(&message.context);
            message.context = Bytes::copy_from_slice(&(u64::from_le_bytes(context) | IDLE_TAKEN).to_le_bytes());
            return false;
        }
        let idle = self.time.is_idle() && !says(message, IDLE_TAKEN);
        // What only a leader sends says by itself what time it is.
        if idle && !(message.from == self.leader() && from_leader(message.get_msg_type())) {
            self.stir();
        }
        idle
    }

    fn rouse(&mut self) {
        self.time.set_idle(false);
        self.time.restart_leader();
        self.idle.used = self.time.now();
        self.idle.taken.clear();
        if self.role() == Role::Leader {
            return;
        }
        self.draw_timeout();
        let leader = self.leader();
        if leader != 0 {
            let mut here = Message::default();
            here.set_msg_type(MessageType::MsgHeartbeatResponse);
            (here.from, here.to, here.term) = (self.config.peer, leader, self.term());
            self.outbox.push(super::ready::send(here));
        }
    }

    /// A leader's round begins: the bit that says how it waits for the next one, and 0 if as ever.
    pub(super) fn calm(&mut self) -> u64 {
        let quiet = self.time.now() >= self.idle.used.saturating_add(self.config.idle_after_ns);
        let last = self.last_index();
        let done = self.is_leader_ready() && self.applied == last && self.commit_index() == last;
        let busy = self.plan.is_some() || !self.offers.is_empty() || self.reads.count() + self.proposals.count() > 0;
        let prs = self.raw.raft.prs();
        let mut others = prs.iter().filter(|(id, _)| **id != self.config.peer);
        if !quiet || !done || busy || others.any(|(_, progress)| progress.matched != last) {
            self.idle.taken.clear();
            self.time.set_idle(false);
            return 0;
        }
        let taken = &self.idle.taken;
        let all = prs.iter().all(|(id, _)| *id == self.config.peer || taken.contains(id));
        self.time.set_idle(all);
        IDLE_ASKED
    }
}
