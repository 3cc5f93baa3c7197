//! Append bytes in flight to each peer.
//!
//! raft-rs counts messages in flight; a window of messages is either too small for short ones or too large for long
//! ones. So the number it may have in flight follows from the bytes that are: `group/flow.rs` sets it.

use std::collections::{BTreeMap, VecDeque};

#[derive(Debug, Default)]
struct Flight {
    /// (last index, bytes) of each message, oldest first.
    messages: VecDeque<(u64, u64)>,
    bytes: u64,
    /// The number raft-rs was last told.
    cap: usize,
}

/// See the module's comment.
#[derive(Debug, Default)]
pub(crate) struct Window {
    peers: BTreeMap<u64, Flight>,
}

impl Window {
    /// A message with entries up to `last` leaves.
    pub(crate) fn sent(&mut self, peer: u64, last: u64, bytes: u64) {
        let flight = self.peers.entry(peer).or_default();
        flight.messages.push_back((last, bytes));
        flight.bytes += bytes;
    }

    /// The peer has everything up to `index`.
    pub(crate) fn acknowledged(&mut self, peer: u64, index: u64) {
        let Some(flight) = self.peers.get_mut(&peer) else { return };
        while let Some((_, bytes)) = flight.messages.pop_front_if(|(last, _)| *last <= index) {
            flight.bytes -= bytes;
        }
    }

    /// What was in flight is not waited for any more.
    pub(crate) fn forget(&mut self, peer: u64) {
        self.peers.remove(&peer);
    }

    /// As [`Self::forget`], for the oldest message: it may be lost, and something must move.
    pub(crate) fn forget_oldest(&mut self, peer: u64) {
        if let Some(flight) = self.peers.get_mut(&peer)
            && let Some((_, bytes)) = flight.messages.pop_front()
        {
            flight.bytes -= bytes;
        }
    }

    pub(crate) fn clear(&mut self) {
        self.peers.clear();
    }

    /// Bytes in flight.
    pub(crate) fn bytes(&self, peer: u64) -> u64 {
        self.peers.get(&peer).map_or(0, |flight| flight.bytes)
    }

    /// How many messages raft-rs, which counts `count` in flight, may have there; `None` if what it was told before
    /// still fits. Never 0, which would mean "no more" for good.
    pub(crate) fn cap(&mut self, peer: u64, count: usize, limits: &Limits) -> Option<usize> {
        let flight = self.peers.entry(peer).or_default();
        let more = match limits.window.saturating_sub(flight.bytes) {
            0 => 0,
            room => usize::try_from(room / limits.message.max(1)).unwrap_or(usize::MAX).max(1),
        };
        let most = count.saturating_add(more).clamp(1, limits.messages);
        let least = count.saturating_add(more.div_ceil(2)).clamp(1, most);
        if (least..=most).contains(&flight.cap) {
            return None;
        }
        flight.cap = most;
        Some(most)
    }
}

/// Bounds of one peer's window.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Bytes in flight.
    pub(crate) window: u64,
    /// Bytes of a message.
    pub(crate) message: u64,
    /// Messages in flight.
    pub(crate) messages: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { window: 1000, message: 100, messages: 64 };

    #[test]
    fn the_number_of_messages_follows_the_bytes() {
        let mut window = Window::default();
        assert_eq!(window.cap(2, 0, &LIMITS), Some(10));
        (1..=5).for_each(|last| window.sent(2, last, 10));
        assert_eq!(window.cap(2, 5, &LIMITS), None, "ten may fly, five do: no need to tell again");
        (6..=10).for_each(|last| window.sent(2, last, 90));
        assert_eq!(window.cap(2, 10, &LIMITS), Some(15));
        (11..=15).for_each(|last| window.sent(2, last, 100));
        assert_eq!((window.bytes(2), window.cap(2, 15, &LIMITS)), (1000, None), "full");
        window.acknowledged(2, 6);
        assert_eq!(window.cap(2, 9, &LIMITS), Some(10));
        window.forget_oldest(2);
        assert_eq!(window.bytes(2), 770);
        window.forget(2);
        assert_eq!((window.bytes(2), window.cap(2, 0, &LIMITS)), (0, Some(10)));
    }

    #[test]
    fn a_full_window_stops_at_what_is_there() {
        let mut window = Window::default();
        window.sent(2, 1, 5000);
        assert_eq!(window.cap(2, 1, &LIMITS), Some(1));
        assert_eq!(window.cap(2, 0, &LIMITS), None);
        window.acknowledged(2, 1);
        assert_eq!(window.cap(2, 0, &LIMITS), Some(10));
    }
}
