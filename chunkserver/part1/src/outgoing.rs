//! Frames on their way to the socket, many of them in one system call, payloads from where they lie.

use std::{collections::VecDeque, io::IoSlice};

use bytes::{Bytes, BytesMut};
use smallvec::SmallVec;

/// Pieces handed to the kernel at a time: 64 frames with payload.
pub(crate) const PIECES: usize = 128;
/// Heads are cut from buffers of this size.
const HEADS: usize = 16 << 10;
/// Room in which a head fits but for the rare long name.
const HEAD: usize = 256;

struct Frame {
    key: usize,
    correlation_id: i64,
    head: Bytes,
    payload: Bytes,
}

/// The frames not yet wholly sent, in order.
#[derive(Default)]
pub(crate) struct Outgoing {
    frames: VecDeque<Frame>,
    /// Bytes of the first frame that are sent.
    sent: usize,
    heads: BytesMut,
}

impl Outgoing {
    pub(crate) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Appends a frame, the head of which `put` writes.
    pub(crate) fn push(&mut self, key: usize, correlation_id: i64, payload: Bytes, put: impl FnOnce(&mut BytesMut)) {
        if self.heads.capacity() < HEAD {
            self.heads = BytesMut::with_capacity(HEADS);
        }
        put(&mut self.heads);
        let head = self.heads.split().freeze();
        self.frames.push_back(Frame { key, correlation_id, head, payload });
    }

    /// What is to be sent next.
    pub(crate) fn pieces(&self) -> SmallVec<[IoSlice<'_>; PIECES]> {
        let mut pieces = SmallVec::new();
        let mut skip = self.sent;
        let parts = self.frames.iter().flat_map(|frame| [&frame.head, &frame.payload]);
        for part in parts {
            let rest = part.get(skip.min(part.len())..).unwrap_or_default();
            skip -= part.len() - rest.len();
            if !rest.is_empty() {
                pieces.push(IoSlice::new(rest));
            }
            if pieces.len() == PIECES {
                break;
            }
        }
        pieces
    }

    /// So many bytes were sent; tells whose frame is complete with that.
    pub(crate) fn advance(&mut self, count: usize, mut complete: impl FnMut(usize, i64)) {
        self.sent += count;
        while let Some(frame) = self.frames.front() {
            let length = frame.head.len() + frame.payload.len();
            if self.sent < length {
                return;
            }
            self.sent -= length;
            complete(frame.key, frame.correlation_id);
            self.frames.pop_front();
        }
        assert!(self.sent == 0, "more was sent than there was");
    }

    /// Forgets everything; the stream ends here.
    pub(crate) fn clear(&mut self) {
        self.frames.clear();
        self.sent = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_split_sends_every_byte_once_and_in_order() {
        let payload = |n: u8| Bytes::from(vec![n; usize::from(n) % 7]);
        for step in 1..40 {
            let (mut out, mut wanted) = (Outgoing::default(), Vec::new());
            for n in 0..100u8 {
                out.push(usize::from(n), i64::from(n) + 7, payload(n), |head| head.extend_from_slice(&[0xff, n, n]));
                wanted.extend([0xff, n, n]);
                wanted.extend(&payload(n));
            }
            let (mut sent, mut done) = (Vec::new(), Vec::new());
            while !out.is_empty() {
                let pieces = out.pieces();
                assert!(pieces.len() <= PIECES && pieces.iter().all(|piece| !piece.is_empty()));
                let bytes: Vec<u8> = pieces.iter().flat_map(|piece| piece.to_vec()).take(step).collect();
                drop(pieces);
                sent.extend_from_slice(&bytes);
                out.advance(bytes.len(), |key, id| done.push((key, id)));
            }
            assert_eq!(sent, wanted);
            assert_eq!(done, (0..100).map(|n| (n, n as i64 + 7)).collect::<Vec<_>>());
        }
    }
}
