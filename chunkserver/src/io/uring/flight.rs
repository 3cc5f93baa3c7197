//! An operation in flight: what it is, the memory it keeps alive, and what its completion means.

use super::{RecvRing, connect, leave};
use crate::io::buffer::{PoolBuf, RecvBuf};
use crate::io::{ConnId, Done, Errno, Token};
use bytes::Bytes;
use io_uring::cqueue;
use smallvec::SmallVec;

/// What an operation is, and what it owns beside buffers.
pub(super) enum Kind {
    Free,
    Read(Option<PoolBuf>),
    Write {
        len: usize,
    },
    Sync,
    Accept,
    Connect(Box<connect::Connecting>),
    Recv(ConnId),
    RecvInto(ConnId, Option<PoolBuf>),
    /// `life`: see [`Uring::lives`].
    Send {
        conn: ConnId,
        life: u32,
        len: usize,
        sent: usize,
    },
    Close,
}

/// One operation in flight; boxed so that its address is stable.
pub(super) struct Flight {
    pub(super) token: Token,
    pub(super) kind: Kind,
    pub(super) bufs: SmallVec<[Bytes; 16]>,
    pub(super) iov: Vec<libc::iovec>,
    pub(super) header: libc::msghdr,
}

impl Flight {
    /// A flight that nothing uses; `header` names nothing.
    pub(super) fn new(header: libc::msghdr) -> Box<Self> {
        Box::new(Self { token: Token(0), kind: Kind::Free, bufs: SmallVec::new(), iov: Vec::with_capacity(64), header })
    }
}

/// Turn a kernel completion into ours; `None` = a short send that goes on.
pub(super) fn finish(
    flight: &mut Flight,
    entry: &cqueue::Entry,
    recv: &mut RecvRing,
    open: bool,
    cut: bool,
) -> Option<Done> {
    let result = entry.result();
    let errno = || Errno(-result);
    let whole = |len: usize| {
        if result < 0 {
            Err(errno())
        } else if result as usize == len {
            Ok(())
        } else {
            Err(Errno(libc::EIO))
        }
    };
    Some(match &mut flight.kind {
        Kind::Read(buf) => {
            let buf = buf.take().expect("a read owns its buffer");
            let result = whole(buf.len());
            Done::Read { buf, result }
        }
        Kind::Write { len } => Done::Write(whole(*len)),
        Kind::Sync => Done::Sync(whole(0)),
        Kind::Accept => Done::Accept(if result < 0 { Err(errno()) } else { Ok(ConnId(result)) }),
        Kind::Connect(connecting) => Done::Connect(connecting.finish(result)),
        Kind::Recv(_) => {
            // Whatever the result: a buffer that was used up is ours again.
            let buf = cqueue::buffer_select(entry.flags()).map(|id| recv.take(id, result.max(0) as usize));
            Done::Recv(if result < 0 { Err(errno()) } else { Ok(buf.unwrap_or_else(|| RecvBuf::new(Bytes::new()))) })
        }
        Kind::RecvInto(_, buf) => Done::RecvInto {
            buf: buf.take().expect("a receive owns its buffer"),
            result: if result < 0 { Err(errno()) } else { Ok(result as usize) },
        },
        Kind::Send { len, sent, .. } => {
            if cut && open && (result > 0 || result == -libc::ECANCELED) {
                *sent += result.max(0) as usize;
                if *sent < *len {
                    return Some(Done::SendCut(leave::without(&mut flight.bufs, *sent)));
                }
                Done::Send(Ok(()))
            } else if result < 0 {
                Done::Send(Err(errno()))
            } else {
                *sent += result as usize;
                if *sent < *len && result > 0 && open {
                    return None;
                }
                Done::Send(if *sent == *len { Ok(()) } else { Err(Errno(libc::EPIPE)) })
            }
        }
        Kind::Close => Done::Close,
        Kind::Free => unreachable!("a completion for a free flight"),
    })
}

/// Describe `bufs` without their first `skip` bytes; returns the length described.
pub(super) fn fill_iov(bufs: &[Bytes], mut skip: usize, iov: &mut Vec<libc::iovec>) -> usize {
    iov.clear();
    let mut total = 0;
    for buf in bufs {
        if skip >= buf.len() {
            skip -= buf.len();
            continue;
        }
        let rest = &buf[skip..];
        skip = 0;
        total += rest.len();
        iov.push(libc::iovec { iov_base: rest.as_ptr().cast_mut().cast(), iov_len: rest.len() });
    }
    total
}
