//! The seam between the state machines and the kernel.
//!
//! An [`Op`] owns its buffers and its [`Completion`] gives them back, so no lifetime crosses the kernel. One
//! implementation drives io_uring (`uring.rs`), the other is the simulator of the tests; both run the same reactor.

pub mod buffer;
pub mod uring;

use crate::io::buffer::{PoolBuf, RecvBuf};
use bytes::Bytes;
use smallvec::SmallVec;
use std::net::Ipv4Addr;
use std::path::PathBuf;

/// Monotonic time that counts suspension (`CLOCK_BOOTTIME`), nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(pub u64);

impl Instant {
    /// No deadline.
    pub const FAR: Self = Self(u64::MAX);

    /// `self + ns`, saturating.
    #[must_use]
    pub const fn after_ns(self, ns: u64) -> Self {
        Self(self.0.saturating_add(ns))
    }
    /// `self + ms`, saturating.
    #[must_use]
    pub const fn after_ms(self, ms: u64) -> Self {
        self.after_ns(ms.saturating_mul(1_000_000))
    }
    /// Nanoseconds since `earlier`; 0 if `earlier` is later.
    #[must_use]
    pub const fn since_ns(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// Says whose operation completed; the reactor packs an owner and that owner's id into it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token(pub u64);

/// An open disk file, by its place in the set given to the implementation at start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId(pub u32);

/// A listening socket, likewise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ListenerId(pub u32);

/// A connected socket. Valid on every shard of the process until closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnId(pub i32);

/// Where somebody listens.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Address {
    /// TCP: address and port.
    Tcp(Ipv4Addr, u16),
    /// A Unix socket of this machine.
    Unix(PathBuf),
}

/// One core's reactor, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ShardId(pub u16);

/// A kernel error number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub i32);

impl std::fmt::Display for Errno {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::io::Error::from_raw_os_error(self.0).fmt(f)
    }
}
impl std::error::Error for Errno {}

/// Buffers of one vectored write or send.
pub type Bufs = SmallVec<[Bytes; 4]>;

#[expect(clippy::large_enum_variant, reason = "ops live on queues of values; boxing would allocate per operation")]
/// What to do. Disk offsets and lengths are multiples of 4 KiB and buffers are 4 KiB aligned (O_DIRECT).
#[derive(Debug)]
pub enum Op {
    /// Fill the whole of `buf` from `offset`.
    Read {
        /// File.
        file: FileId,
        /// Byte offset.
        offset: u64,
        /// Destination; its length is the length of the read.
        buf: PoolBuf,
    },
    /// Write all of `bufs` at `offset`; with `dsync` the data is durable when it completes.
    Write {
        /// File.
        file: FileId,
        /// Byte offset.
        offset: u64,
        /// Data, in order.
        bufs: Bufs,
        /// RWF_DSYNC.
        dsync: bool,
    },
    /// Make every write that completed before this was submitted durable (fdatasync).
    Sync {
        /// File.
        file: FileId,
    },
    /// Take one connection from a listener.
    Accept {
        /// Listener.
        listener: ListenerId,
    },
    /// Open a connection; TCP sends what it is given at once (no Nagle).
    Connect {
        /// To whom.
        address: Address,
        /// Given up after this, milliseconds, with ETIMEDOUT.
        timeout_ms: u32,
    },
    /// Receive what is there into a buffer of the implementation's choice (a waiting receive owns no memory).
    Recv {
        /// Connection.
        conn: ConnId,
    },
    /// Receive into `buf[filled..]`; completes with at least one more byte, or end of stream.
    RecvInto {
        /// Connection.
        conn: ConnId,
        /// Destination.
        buf: PoolBuf,
        /// Bytes of `buf` that are in use already.
        filled: usize,
    },
    /// Send all of `bufs`.
    Send {
        /// Connection.
        conn: ConnId,
        /// Data, in order.
        bufs: SmallVec<[Bytes; 16]>,
    },
    /// Stop and close a connection. Receives and sends in flight complete (with an error or end of stream) first or later;
    /// the id must not be used in a new operation.
    Close {
        /// Connection.
        conn: ConnId,
    },
    /// Make another shard's `turn` return.
    Wake {
        /// Who.
        shard: ShardId,
    },
}

/// How an operation ended. Buffers come back whatever the result.
#[derive(Debug)]
pub enum Done {
    /// Of [`Op::Read`]. A short read is an error (EIO).
    Read {
        /// The buffer.
        buf: PoolBuf,
        /// Result.
        result: Result<(), Errno>,
    },
    /// Of [`Op::Write`].
    Write(Result<(), Errno>),
    /// Of [`Op::Sync`].
    Sync(Result<(), Errno>),
    /// Of [`Op::Accept`].
    Accept(Result<ConnId, Errno>),
    /// Of [`Op::Connect`].
    Connect(Result<ConnId, Errno>),
    /// Of [`Op::Recv`]. Empty = end of stream. ENOBUFS = no receive buffer free: try again later.
    Recv(Result<RecvBuf, Errno>),
    /// Of [`Op::RecvInto`]: the buffer and how many bytes were added (0 = end of stream).
    RecvInto {
        /// The buffer.
        buf: PoolBuf,
        /// Bytes added.
        result: Result<usize, Errno>,
    },
    /// Of [`Op::Send`].
    Send(Result<(), Errno>),
    /// Of an [`Op::Send`] that [`Io::cancel`] cut short: what was not sent, in order.
    SendCut(Vec<Bytes>),
    /// Of [`Op::Close`].
    Close,
    /// Another shard (or the control thread) sent a wake-up; no token of ours.
    Wake,
}

/// An operation that ended.
#[derive(Debug)]
pub struct Completion {
    /// The token it was submitted with.
    pub token: Token,
    /// How it ended.
    pub done: Done,
}

/// What [`Io::cancel`] ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cancel {
    /// Accepts, connects and receives.
    Receives,
    /// Sends.
    Sends,
}

/// The kernel as a shard sees it.
pub trait Io {
    /// Now; constant between two calls of `turn`.
    fn now(&self) -> Instant;

    /// Queue an operation; it starts at the next `turn` at the latest.
    fn submit(&mut self, token: Token, op: Op);

    /// Start everything queued, wait until something completed or `deadline` passed, and append all completions to
    /// `out`. One system call.
    fn turn(&mut self, deadline: Instant, out: &mut Vec<Completion>);

    /// Make the socket operations of a kind that are in flight end soon: each completes with ECANCELED
    /// ([`Done::SendCut`]), or as it would have. No byte is lost. Needed for a hand-over only; an implementation without
    /// it lets them be.
    fn cancel(&mut self, _what: Cancel) {}
}
