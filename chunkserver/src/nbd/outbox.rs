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

#[derive(Debug, Default)]
pub(super) struct Outbox {
    queue: VecDeque<Bytes>,
    /// Small replies after the last of `queue`.
    tail: BytesMut,
    queued: usize,
    sending: usize,
}

impl Outbox {
    /// Append a few bytes.
    pub(super) fn put(&mut self, bytes: &[u8]) {
        if self.tail.capacity() - self.tail.len() < bytes.len() {
            self.tail.reserve(bytes.len().max(GATHER_BYTES));
        }
        self.tail.extend_from_slice(bytes);
        self.queued += bytes.len();
    }

    /// Append shared data.
    pub(super) fn share(&mut self, data: Bytes) {
        self.close_tail();
        self.queued += data.len();
        self.queue.push_back(data);
    }

    fn close_tail(&mut self) {
        if !self.tail.is_empty() {
            self.queue.push_back(self.tail.split().freeze());
        }
    }

    /// The next buffers to send; empty when there is nothing. One send at a time, each ended with [`Self::sent`].
    pub(super) fn take(&mut self) -> SmallVec<[Bytes; SEND_BUFS_MAX]> {
        self.close_tail();
        let count = self.queue.len().min(SEND_BUFS_MAX);
        let bufs: SmallVec<[Bytes; SEND_BUFS_MAX]> = self.queue.drain(..count).collect();
        let bytes: usize = bufs.iter().map(Bytes::len).sum();
        self.queued -= bytes;
        self.sending += bytes;
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
        assert_eq!(out.bytes(), want.len());
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
    }
}
