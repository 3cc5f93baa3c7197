//! What a session has to send: small replies gathered in one buffer, data of reads shared and never copied.
//!
//! Promises: bytes leave in the order they were put in; [`Outbox::bytes`] counts everything from `put` until the send
//! that carried it has ended, so a client that does not read its replies stops being served, not the server.

use bytes::{Bytes, BytesMut};
use smallvec::SmallVec;
use std::collections::VecDeque;

/// Buffers of one send.
pub const SEND_BUFS_MAX: usize = 16;
/// Room made at a time for small replies.
const GATHER_BYTES: usize = 1024;
/// Less room than this makes more.
const ROOM_MIN: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Reply,
    Data,
}

#[derive(Debug, Default)]
pub(super) struct Outbox {
    queue: VecDeque<(Kind, Bytes)>,
    /// Small replies after the last of `queue`.
    tail: BytesMut,
    queued: usize,
    /// Of them small replies.
    replies: usize,
    sending: usize,
}

impl Outbox {
    /// Append a few bytes.
    pub(super) fn put(&mut self, bytes: &[u8]) {
        self.write(|tail| tail.extend_from_slice(bytes));
    }

    /// Append what `fill` appends to the buffer it is given.
    pub(super) fn write(&mut self, fill: impl FnOnce(&mut BytesMut)) {
        if self.tail.capacity() - self.tail.len() < ROOM_MIN {
            self.tail.reserve(GATHER_BYTES);
        }
        let before = self.tail.len();
        fill(&mut self.tail);
        self.queued += self.tail.len() - before;
        self.replies += self.tail.len() - before;
    }

    /// Append shared data.
    pub(super) fn share(&mut self, data: Bytes) {
        self.close_tail();
        self.queued += data.len();
        self.queue.push_back((Kind::Data, data));
    }

    fn close_tail(&mut self) {
        if !self.tail.is_empty() {
            self.queue.push_back((Kind::Reply, self.tail.split().freeze()));
        }
    }

    /// The next buffers to send; empty when there is nothing. One send at a time, each ended with [`Self::sent`].
    pub(super) fn take(&mut self) -> SmallVec<[Bytes; SEND_BUFS_MAX]> {
        self.close_tail();
        let count = self.queue.len().min(SEND_BUFS_MAX);
        let mut bufs = SmallVec::new();
        for (kind, bytes) in self.queue.drain(..count) {
            self.queued -= bytes.len();
            self.sending += bytes.len();
            self.replies -= if kind == Kind::Reply { bytes.len() } else { 0 };
            bufs.push(bytes);
        }
        bufs
    }

    /// The send in flight ended.
    pub(super) fn sent(&mut self) {
        self.sending = 0;
    }

    /// Bytes queued or in flight.
    pub(super) fn bytes(&self) -> usize {
        self.queued + self.sending
    }

    /// Bytes of small replies queued.
    pub(super) fn reply_bytes(&self) -> usize {
        self.replies
    }

    /// Whether all is sent.
    pub(super) fn is_empty(&self) -> bool {
        self.bytes() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_is_kept_and_bytes_are_counted_until_sent() {
        let mut out = Outbox::default();
        assert!(out.take().is_empty() && out.is_empty());
        let mut want = Vec::new();
        let shared = Bytes::from(vec![9; 5000]);
        for i in 0..40u8 {
            out.put(&[i; 16]);
            want.extend_from_slice(&[i; 16]);
            if i % 3 == 0 {
                out.share(shared.clone());
                want.extend_from_slice(&shared);
            }
        }
        assert_eq!((out.bytes(), out.reply_bytes()), (want.len(), 40 * 16));
        let mut got = Vec::new();
        loop {
            let bufs = out.take();
            if bufs.is_empty() {
                break;
            }
            assert!(bufs.len() <= SEND_BUFS_MAX && !out.is_empty());
            got.extend(bufs.concat());
            out.sent();
        }
        assert!(got == want && out.is_empty());
        assert_eq!(out.reply_bytes(), 0);
    }
}
