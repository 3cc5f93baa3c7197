//! What a ring does for a hand-over: end operations on sockets early, and leave its doorbell to its successor.

use super::flight::Kind;
use super::{IGNORE, Uring};
use crate::io::{Cancel, Io};
use bytes::Bytes;
use io_uring::opcode;
use smallvec::SmallVec;

impl Uring {
    /// Leave the doorbell to another ring: one that is torn down later must not take what rings for its successor.
    pub fn retire(&mut self) {
        self.retiring = true;
        self.doorbells.ring(self.shard);
        let mut out = Vec::new();
        for _ in 0..100 {
            if !self.watching {
                return;
            }
            self.turn(self.now.after_ms(10), &mut out);
        }
    }

    /// See [`Io::cancel`].
    pub(super) fn cancel_in_flight(&mut self, what: Cancel) {
        self.sends_cut |= what == Cancel::Sends;
        for slot in 0..self.flights.len() {
            let hit = match self.flights[slot].kind {
                Kind::Accept | Kind::Connect(_) | Kind::Recv(_) | Kind::RecvInto(..) => what == Cancel::Receives,
                Kind::Send { .. } => what == Cancel::Sends,
                _ => false,
            };
            if hit {
                self.push(&opcode::AsyncCancel::new(slot as u64).build().user_data(IGNORE));
            }
        }
    }
}

/// The buffers without their first `skip` bytes.
pub(super) fn without(bufs: &mut SmallVec<[Bytes; 16]>, mut skip: usize) -> Vec<Bytes> {
    let mut rest = Vec::new();
    for mut buf in bufs.drain(..) {
        let gone = skip.min(buf.len());
        skip -= gone;
        let left = buf.split_off(gone);
        if !left.is_empty() {
            rest.push(left);
        }
    }
    rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_sent_is_gone_from_the_front() {
        let all: SmallVec<[Bytes; 16]> = [&b"abc"[..], b"", b"de", b"f"].map(Bytes::from_static).into_iter().collect();
        for sent in 0..=6 {
            assert_eq!(without(&mut all.clone(), sent).concat(), b"abcdef"[sent..]);
        }
    }
}
