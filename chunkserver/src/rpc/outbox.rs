//! Replies on their way out: many per send, in order, one send at a time.
//!
//! Small heads that follow each other are joined into one buffer (copying some 30 bytes is cheaper than another iovec);
//! payloads are passed on as they are.

use bytes::{Bytes, BytesMut};
use smallvec::SmallVec;
use std::collections::VecDeque;

/// Buffers of one send.
pub type SendBufs = SmallVec<[Bytes; 16]>;

/// Heads up to this size are joined.
const JOIN_MAX: usize = 1024;
/// Heads are joined into buffers of this size, so that joining never reallocates.
const TAIL: usize = 4096;

/// Bytes to send.
#[derive(Debug, Default)]
pub struct Outbox {
    queue: VecDeque<Bytes>,
    /// Joined heads behind everything in `queue`.
    tail: BytesMut,
    queued: usize,
    sending: usize,
}

impl Outbox {
    /// Append one message.
    pub fn push(&mut self, head: Bytes, attachments: impl IntoIterator<Item = Bytes>) {
        self.queued += head.len();
        if head.len() <= JOIN_MAX {
            if self.tail.len() + head.len() > TAIL {
                self.close_tail();
            }
            if self.tail.capacity() - self.tail.len() < head.len() {
                self.tail.reserve(TAIL);
            }
            self.tail.extend_from_slice(&head);
        } else {
            self.close_tail();
            self.queue.push_back(head);
        }
        for attachment in attachments.into_iter().filter(|bytes| !bytes.is_empty()) {
            self.close_tail();
            self.queued += attachment.len();
            self.queue.push_back(attachment);
        }
    }

    fn close_tail(&mut self) {
        if !self.tail.is_empty() {
            self.queue.push_back(self.tail.split().freeze());
        }
    }

    /// Up to `max_bufs` buffers for the next send; empty when there is nothing to send or a send is in flight.
    pub fn take(&mut self, max_bufs: usize) -> SendBufs {
        let mut bufs = SendBufs::new();
        if self.sending > 0 {
            return bufs;
        }
        self.close_tail();
        while bufs.len() < max_bufs {
            let Some(next) = self.queue.pop_front() else { break };
            self.sending += next.len();
            bufs.push(next);
        }
        self.queued -= self.sending;
        bufs
    }

    /// The send completed.
    pub fn sent(&mut self) {
        self.sending = 0;
    }

    /// Bytes not yet sent, those in flight included.
    #[must_use]
    pub fn backlog(&self) -> usize {
        self.queued + self.sending
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_join_payloads_do_not_and_the_order_stays() {
        let mut outbox = Outbox::default();
        let mut expected = Vec::new();
        for i in 0..500u32 {
            let head = Bytes::from(vec![i as u8; 20 + (i as usize % 3) * 600]);
            let data = Bytes::from(vec![!i as u8; if i % 7 == 0 { 4096 } else { 0 }]);
            expected.extend_from_slice(&head);
            expected.extend_from_slice(&data);
            outbox.push(head, [data]);
        }
        assert_eq!(outbox.backlog(), expected.len());
        let (mut seen, mut bufs) = (Vec::new(), 0);
        loop {
            let taken = outbox.take(16);
            assert!(taken.len() <= 16);
            if taken.is_empty() {
                break;
            }
            assert!(outbox.take(16).is_empty(), "one send at a time");
            bufs += taken.len();
            taken.iter().for_each(|buf| seen.extend_from_slice(buf));
            outbox.sent();
        }
        assert_eq!((seen == expected, outbox.backlog()), (true, 0));
        assert!(bufs < 500, "{bufs} buffers");
    }
}
