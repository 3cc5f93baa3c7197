//! What flows to each peer: a window in bytes, payloads back from the log, lost connections.

use super::{Copyset, Role};
use crate::effect::Effect;
use crate::window::Limits;
use raft::ProgressState;
use raft::eraftpb::{Message, MessageType};

impl Copyset {
    /// Messages to this peer were lost, or its connection: replication asks again how far it is.
    pub fn unreachable(&mut self, peer: u64) {
        if !self.inert() {
            self.window.forget(peer);
            self.raw.report_unreachable(peer);
            if self.role() == Role::Leader || self.leader() == peer {
                self.stir();
            }
        }
    }

    /// The fetch from `low` on has ended; `ok` if the payloads are back in the log's memory. They are sent now, so
    /// they may be evicted again after the next [`Self::ready`]. If not ok it is asked for again with the next
    /// heartbeat.
    pub fn fetched(&mut self, low: u64, ok: bool) {
        for context in self.fetches.finish(low) {
            if ok && !self.inert() {
                self.raw.on_entries_fetched(context); // looks at term and leadership itself
            }
        }
    }

    /// Fetches that may begin.
    pub(super) fn fetch(&mut self, out: &mut Vec<Effect>) {
        for (low, context) in self.raw.store().take_absent() {
            self.fetches.ask(low, context);
        }
        if let Some(low) = self.fetches.wanted() {
            let high = self.raw.store().fetch_end(low, self.config.max_batch_bytes);
            self.fetches.begin(low, high);
            out.push(Effect::Fetch { low, high });
        }
    }

    /// Counts what leaves.
    pub(super) fn count(&mut self, message: &Message) {
        match message.get_msg_type() {
            MessageType::MsgAppend => {
                let Some(last) = message.get_entries().last() else { return };
                let bytes = message.get_entries().iter().map(|e| e.data.len() + e.context.len()).sum::<usize>();
                self.window.sent(message.to, last.index, bytes as u64);
                self.fit(message.to);
            }
            // Whoever gets it is elected without regard to the lease.
            MessageType::MsgTimeoutNow => self.lease.give_up(),
            _ => {}
        }
    }

    /// A peer has everything up to `index`.
    pub(super) fn make_room(&mut self, peer: u64, index: u64) {
        self.window.acknowledged(peer, index);
        self.fit(peer);
    }

    /// A peer answers heartbeats: if its window is full, the oldest message may have been lost. raft-rs does the same
    /// with its own count.
    pub(super) fn make_way(&mut self, peer: u64) {
        if self.window.bytes(peer) >= self.config.window_bytes {
            self.window.forget_oldest(peer);
        }
        self.fit(peer);
    }

    /// Tells raft-rs how many messages a peer may have in flight.
    fn fit(&mut self, peer: u64) {
        let limits = Limits {
            window: self.config.window_bytes,
            message: self.config.max_message_bytes,
            messages: self.config.max_in_flight,
        };
        let Some(progress) = self.raw.raft.prs().get(peer) else { return self.window.forget(peer) };
        if progress.state != ProgressState::Replicate {
            // What was in flight is lost or will be answered; how much may fly at once when it goes on is set now.
            self.window.forget(peer);
            return self.raw.raft.adjust_max_inflight_msgs(peer, self.config.messages_at_once());
        }
        if let Some(cap) = self.window.cap(peer, progress.ins.count(), &limits) {
            self.raw.raft.adjust_max_inflight_msgs(peer, cap);
        }
    }

    /// Append bytes in flight to a peer.
    #[must_use]
    pub fn bytes_in_flight(&self, peer: u64) -> u64 {
        self.window.bytes(peer)
    }
}
