//! The only room that knows io_uring: one ring per shard, one `io_uring_enter` a turn. This file, not those below it,
//! has `unsafe`.
//!
//! Every operation in flight owns its memory through a `Flight`: buffers, iovecs and the message header live there,
//! at stable addresses, until the kernel has posted the completion. A `Uring` that is dropped with operations in
//! flight leaks their flights on purpose: the kernel may still write into them.
//!
//! Ring: SINGLE_ISSUER, DEFER_TASKRUN, SUBMIT_ALL; disk files and the arenas are registered; receives pick their
//! buffer from a provided-buffer ring, so a waiting receive owns no memory.

mod connect;
mod flight;
mod leave;
mod setup;
#[cfg(test)]
mod tests;

pub use setup::{Doorbells, KERNEL_MIN, SetupError, probe};

use crate::io::buffer::{Arena, BLOCK, PoolBuf, RecvBuf};
use crate::io::{Cancel, Completion, ConnId, Done, Instant, Io, Op, Token};
use bytes::Bytes;
use flight::{Flight, Kind, fill_iov, finish};
use io_uring::types::{BufRingEntry, Fd, Fixed, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};
use setup::{build, classify, supports};
use smallvec::SmallVec;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};

/// What a ring is made of.
#[derive(Debug)]
pub struct Setup {
    /// This shard.
    pub shard: u16,
    /// Disk files, by [`crate::io::FileId`].
    pub files: Vec<RawFd>,
    /// Listening sockets, by [`crate::io::ListenerId`].
    pub listeners: Vec<RawFd>,
    /// Every shard's arena: payloads may come from any of them.
    pub arenas: Vec<Arc<Arena>>,
    /// They have been touched, so that registering them is quick: only then that is done.
    pub touched: Arc<AtomicBool>,
    /// Submission queue entries.
    pub entries: u32,
    /// Receive buffers (a power of two) and their size, bytes.
    pub recv_buffers: (u16, usize),
    /// How to wake the others.
    pub doorbells: Arc<Doorbells>,
}

/// System calls and completions of one ring, readable from any thread.
#[derive(Debug, Default)]
pub struct RingCounters {
    /// `io_uring_enter` calls.
    pub enters: AtomicU64,
    /// Completions reaped.
    pub completions: AtomicU64,
}

// User data of completions that belong to no flight.
const IGNORE: u64 = u64::MAX;
const WAKE: u64 = u64::MAX - 1;
const DOORBELL: u64 = u64::MAX - 2;
const RECV_GROUP: u16 = 0;

/// The receive buffers offered to the kernel.
struct RecvRing {
    arena: Arc<Arena>,
    entries: std::ptr::NonNull<BufRingEntry>,
    mask: u16,
    size: usize,
    tail: u16,
    slots: Vec<Option<PoolBuf>>,
    missing: Vec<u16>,
}

/// One shard's ring.
pub struct Uring {
    ring: IoUring,
    shard: u16,
    listeners: Vec<RawFd>,
    regions: Vec<(usize, usize)>,
    fixed: bool,
    /// To be registered when this says so.
    unregistered: Option<(Arc<AtomicBool>, Vec<Arc<Arena>>)>,
    /// The kernel takes vectored writes from registered memory (6.15).
    writev_fixed: bool,
    recv: RecvRing,
    #[expect(clippy::vec_box, reason = "the kernel holds pointers into a flight: its address must not change")]
    flights: Vec<Box<Flight>>,
    free: Vec<u32>,
    in_flight: usize,
    doorbells: Arc<Doorbells>,
    doorbell_value: std::mem::ManuallyDrop<Box<u64>>,
    /// By descriptor: how many connections of that number were closed here. A send that the kernel cut short may only
    /// go on while its connection is open: after the close the number may be another client's.
    lives: Vec<u32>,
    /// Sends were cancelled: one that the kernel cut short does not go on.
    sends_cut: bool,
    /// The event fd is being read; it is not read again.
    watching: bool,
    retiring: bool,
    now: Instant,
    counters: Arc<RingCounters>,
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring").field("shard", &self.shard).field("in_flight", &self.in_flight).finish_non_exhaustive()
    }
}

/// CLOCK_BOOTTIME.
#[must_use]
pub fn clock() -> Instant {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Instant(t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64)
}

impl Uring {
    /// Build the ring; must run on the thread that will use it.
    ///
    /// # Errors
    /// [`SetupError`], in one line.
    pub fn new(setup: Setup) -> Result<Self, SetupError> {
        let ring = build(setup.entries)?;
        if !setup.files.is_empty() {
            ring.submitter().register_files(&setup.files)?;
        }
        let recv = RecvRing::new(&ring, setup.recv_buffers.0, setup.recv_buffers.1)?;
        setup.doorbells.rings[usize::from(setup.shard)].store(ring.as_raw_fd(), Ordering::Release);
        let regions = setup.arenas.iter().map(|a| (a.region().0 as usize, a.region().1)).collect();
        let mut this = Self {
            shard: setup.shard,
            listeners: setup.listeners,
            regions,
            fixed: false,
            unregistered: Some((setup.touched, setup.arenas)),
            writev_fixed: supports(&ring, opcode::WritevFixed::CODE),
            recv,
            flights: Vec::new(),
            free: Vec::new(),
            in_flight: 0,
            doorbells: setup.doorbells,
            doorbell_value: std::mem::ManuallyDrop::new(Box::new(0)),
            lives: Vec::new(),
            sends_cut: false,
            watching: false,
            retiring: false,
            now: clock(),
            counters: Arc::default(),
            ring,
        };
        this.register_arenas();
        this.watch_doorbell();
        Ok(this)
    }

    /// Once, as soon as it is quick. Until then I/O costs a little more CPU, and the start does not wait.
    fn register_arenas(&mut self) {
        let ready = self.unregistered.take_if(|(touched, _)| touched.load(Ordering::Acquire));
        if let Some((_, arenas)) = ready {
            self.fixed = register_arenas(&self.ring, &arenas);
        }
    }

    /// Counters, shared with whoever reports them.
    #[must_use]
    pub fn counters(&self) -> Arc<RingCounters> {
        Arc::clone(&self.counters)
    }

    /// Give a connection out of this ring's hands, open as it is.
    ///
    /// # Panics
    /// If an operation on it is in flight.
    pub fn release(&mut self, conn: ConnId) -> OwnedFd {
        let busy = |flight: &Flight| match flight.kind {
            Kind::Recv(on) | Kind::RecvInto(on, _) | Kind::Send { conn: on, .. } => on == conn,
            _ => false,
        };
        let idle = self.in_flight == 0 || !self.flights.iter().any(|flight| busy(flight));
        assert!(idle, "a connection is released in the middle of something");
        // SAFETY: a `ConnId` is the descriptor of an accepted connection that nobody else owns; with nothing in flight
        // on it, and its session gone, the caller is its only user.
        unsafe { OwnedFd::from_raw_fd(conn.0) }
    }

    fn watch_doorbell(&mut self) {
        if std::mem::replace(&mut self.watching, !self.retiring) || self.retiring {
            return;
        }
        let event = Fd(self.doorbells.events[usize::from(self.shard)].as_raw_fd());
        let entry = opcode::Read::new(event, std::ptr::from_mut(&mut **self.doorbell_value).cast(), 8);
        self.push(&entry.build().user_data(DOORBELL));
    }

    fn push(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: every pointer in the entry leads into a `Flight`, the receive ring or a field of `self`, all of
            // which outlive the operation (see the module text).
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return;
            }
            self.enter(0);
        }
    }

    /// Submit what is queued until so many entries fit.
    fn make_room(&mut self, entries: usize) {
        loop {
            let queue = self.ring.submission();
            if queue.capacity() - queue.len() >= entries {
                return;
            }
            drop(queue);
            self.enter(0);
        }
    }

    fn take(&mut self, token: Token, kind: Kind) -> u32 {
        let slot = self.free.pop().unwrap_or_else(|| {
            // SAFETY: an all-zero msghdr is a valid "nothing" value.
            self.flights.push(Flight::new(unsafe { std::mem::zeroed() }));
            (self.flights.len() - 1) as u32
        });
        let flight = &mut self.flights[slot as usize];
        flight.token = token;
        flight.kind = kind;
        self.in_flight += 1;
        slot
    }

    /// Index of the registered region that holds the whole range.
    fn region(&self, ptr: *const u8, len: usize) -> Option<u16> {
        if !self.fixed {
            return None;
        }
        let at = ptr as usize;
        self.regions.iter().position(|&(base, size)| at >= base && at + len <= base + size).map(|i| i as u16)
    }

    /// The registered region that holds all of these, if one does.
    fn common_region(&self, iov: &[libc::iovec]) -> Option<u16> {
        let mut regions = iov.iter().map(|v| self.region(v.iov_base.cast_const().cast(), v.iov_len));
        let first = regions.next()??;
        regions.all(|region| region == Some(first)).then_some(first)
    }

    fn enter(&mut self, wait_ns: u64) {
        self.counters.enters.store(self.counters.enters.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        let timeout = Timespec::new().sec(wait_ns / 1_000_000_000).nsec((wait_ns % 1_000_000_000) as u32);
        let result = if wait_ns == u64::MAX {
            self.ring.submitter().submit_and_wait(1)
        } else {
            self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&timeout))
        };
        if let Err(error) = result {
            match error.raw_os_error() {
                Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => {}
                _ => panic!("io_uring_enter failed: {error}"),
            }
        }
    }

    fn submit_read(&mut self, token: Token, file: u32, offset: u64, mut buf: PoolBuf) {
        let (ptr, len) = (buf.as_mut_ptr(), buf.len() as u32);
        let entry = match self.region(ptr, len as usize) {
            Some(index) => opcode::ReadFixed::new(Fixed(file), ptr, len, index).offset(offset).build(),
            None => opcode::Read::new(Fixed(file), ptr, len).offset(offset).build(),
        };
        let slot = self.take(token, Kind::Read(Some(buf)));
        self.push(&entry.user_data(u64::from(slot)));
    }

    fn submit_write(&mut self, token: Token, file: u32, offset: u64, bufs: impl Iterator<Item = Bytes>, dsync: bool) {
        let slot = self.take(token, Kind::Free);
        let flight = &mut self.flights[slot as usize];
        flight.bufs.extend(bufs);
        let len = fill_iov(&flight.bufs, 0, &mut flight.iov);
        flight.kind = Kind::Write { len };
        let flags = if dsync { libc::RWF_DSYNC } else { 0 };
        let iov = &self.flights[slot as usize].iov;
        let (start, count) = (iov.as_ptr(), iov.len() as u32);
        let entry = match (iov.as_slice(), self.common_region(iov)) {
            ([one], Some(index)) => {
                let (ptr, len) = (one.iov_base.cast_const().cast(), one.iov_len as u32);
                opcode::WriteFixed::new(Fixed(file), ptr, len, index).offset(offset).rw_flags(flags).build()
            }
            (_, Some(index)) if self.writev_fixed => {
                opcode::WritevFixed::new(Fixed(file), start, count, index).offset(offset).rw_flags(flags).build()
            }
            _ => opcode::Writev::new(Fixed(file), start, count).offset(offset).rw_flags(flags).build(),
        };
        self.push(&entry.user_data(u64::from(slot)));
    }

    fn submit_send(&mut self, token: Token, conn: ConnId, bufs: SmallVec<[Bytes; 16]>) {
        let slot = self.take(token, Kind::Free);
        let life = self.life(conn);
        let flight = &mut self.flights[slot as usize];
        flight.bufs = bufs;
        let len = flight.bufs.iter().map(Bytes::len).sum();
        flight.kind = Kind::Send { conn, life, len, sent: 0 };
        self.push_send(slot);
    }

    /// Push the unsent rest of a send.
    fn push_send(&mut self, slot: u32) {
        let flight = &mut self.flights[slot as usize];
        let Kind::Send { conn, sent, .. } = flight.kind else { return };
        fill_iov(&flight.bufs, sent, &mut flight.iov);
        flight.header.msg_iov = flight.iov.as_mut_ptr();
        flight.header.msg_iovlen = flight.iov.len();
        let flags = (libc::MSG_WAITALL | libc::MSG_NOSIGNAL) as u32;
        let entry = opcode::SendMsg::new(Fd(conn.0), &raw const flight.header).flags(flags).build();
        self.push(&entry.user_data(u64::from(slot)));
    }

    fn life(&self, conn: ConnId) -> u32 {
        usize::try_from(conn.0).ok().and_then(|fd| self.lives.get(fd)).copied().unwrap_or(0)
    }

    fn submit_close(&mut self, token: Token, conn: ConnId) {
        let slot = self.take(token, Kind::Close);
        if let Ok(fd) = usize::try_from(conn.0) {
            self.lives.resize(self.lives.len().max(fd + 1), 0);
            self.lives[fd] = self.lives[fd].wrapping_add(1);
        }
        // A link ends with the submission: alone, the shutdown could meet the next owner of the number.
        self.make_room(2);
        let shutdown = opcode::Shutdown::new(Fd(conn.0), libc::SHUT_RDWR).build();
        self.push(&shutdown.flags(squeue::Flags::IO_HARDLINK).user_data(IGNORE));
        self.push(&opcode::Close::new(Fd(conn.0)).build().user_data(u64::from(slot)));
    }

    fn submit_wake(&mut self, shard: u16) {
        let fd = self.doorbells.rings[usize::from(shard)].load(Ordering::Acquire);
        if fd < 0 {
            self.doorbells.ring(shard); // not started yet: its event fd keeps the wake-up
            return;
        }
        let entry = opcode::MsgRingData::new(Fd(fd), 0, WAKE, None).build();
        self.push(&entry.flags(squeue::Flags::SKIP_SUCCESS).user_data(IGNORE));
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        let mut resend: SmallVec<[u32; 4]> = SmallVec::new();
        let mut watch = false;
        let mut count = 0;
        // SAFETY: this thread is the only one that touches the ring's completion queue.
        let completions = unsafe { self.ring.completion_shared() };
        for entry in completions {
            count += 1;
            match entry.user_data() {
                IGNORE => {}
                WAKE => out.push(Completion { token: Token(0), done: Done::Wake }),
                DOORBELL => {
                    watch = true;
                    self.watching = false;
                    out.push(Completion { token: Token(0), done: Done::Wake });
                }
                slot => {
                    let slot = slot as u32;
                    let flight = &mut self.flights[slot as usize];
                    let open = match flight.kind {
                        Kind::Send { conn, life, .. } => self.lives.get(conn.0 as usize).copied().unwrap_or(0) == life,
                        _ => true,
                    };
                    match finish(flight, &entry, &mut self.recv, open, self.sends_cut) {
                        Some(done) => {
                            out.push(Completion { token: flight.token, done });
                            flight.kind = Kind::Free;
                            flight.bufs.clear();
                            self.free.push(slot);
                            self.in_flight -= 1;
                        }
                        None => resend.push(slot),
                    }
                }
            }
        }
        self.counters.completions.store(self.counters.completions.load(Ordering::Relaxed) + count, Ordering::Relaxed);
        for slot in resend {
            self.push_send(slot);
        }
        if watch {
            self.watch_doorbell();
        }
        self.recv.refill();
    }
}

/// Register the arenas as fixed buffers; without enough lockable memory go on unregistered, with one warning.
fn register_arenas(ring: &IoUring, arenas: &[Arc<Arena>]) -> bool {
    let iov: Vec<_> = arenas
        .iter()
        .map(|a| libc::iovec { iov_base: a.region().0.cast_mut().cast(), iov_len: a.region().1 })
        .collect();
    // SAFETY: the regions stay mapped while any buffer of theirs is alive; a flight keeps its buffer alive.
    match unsafe { ring.submitter().register_buffers(&iov) } {
        Ok(()) => true,
        Err(error) => {
            static ONCE: std::sync::Once = std::sync::Once::new();
            ONCE.call_once(|| {
                tracing::warn!(%error, "buffers are not registered with io_uring (RLIMIT_MEMLOCK?); I/O costs a little more CPU");
            });
            false
        }
    }
}

impl RecvRing {
    fn new(ring: &IoUring, count: u16, size: usize) -> Result<Self, SetupError> {
        assert!(count.is_power_of_two() && size.is_multiple_of(BLOCK));
        // Twice as many buffers as the kernel is offered: those being parsed must not starve the ring.
        let ring_bytes = usize::from(count) * size_of::<BufRingEntry>();
        let arena = Arena::new(usize::from(count) * 2 * size + ring_bytes.next_multiple_of(BLOCK).next_power_of_two())?;
        let mut table = arena.alloc(ring_bytes).expect("the arena was sized for it");
        let entries = std::ptr::NonNull::new(table.as_mut_ptr().cast::<BufRingEntry>()).expect("not null");
        // SAFETY: page-aligned memory of the right size; it is leaked right below, so it outlives the ring.
        unsafe { ring.submitter().register_buf_ring_with_flags(entries.as_ptr() as u64, count, RECV_GROUP, 0) }
            .map_err(classify)?;
        std::mem::forget(table);
        let slots = (0..count).map(|_| None).collect();
        let mut this =
            Self { arena, entries, mask: count - 1, size, tail: 0, slots, missing: (0..count).rev().collect() };
        this.refill();
        Ok(this)
    }

    fn take(&mut self, id: u16, len: usize) -> RecvBuf {
        let buf = self.slots[usize::from(id)].take().expect("the kernel picks among offered buffers");
        self.missing.push(id);
        RecvBuf::pooled(buf, len)
    }

    /// Offer a fresh buffer for every slot that was used.
    fn refill(&mut self) {
        let before = self.tail;
        while let Some(id) = self.missing.pop() {
            let Some(mut buf) = self.arena.alloc(self.size) else {
                self.missing.push(id);
                break;
            };
            // SAFETY: the index is masked to the table's size; only this thread writes entries, and the kernel reads
            // an entry only after the tail store below.
            let entry = unsafe { &mut *self.entries.as_ptr().add(usize::from(self.tail & self.mask)) };
            entry.set_addr(buf.as_mut_ptr() as u64);
            entry.set_len(buf.len() as u32);
            entry.set_bid(id);
            self.slots[usize::from(id)] = Some(buf);
            self.tail = self.tail.wrapping_add(1);
        }
        if before != self.tail {
            // SAFETY: the tail is the `resv` field of the first entry, written by us alone, read by the kernel.
            unsafe {
                let tail = BufRingEntry::tail(self.entries.as_ptr()).cast::<AtomicU16>();
                (*tail).store(self.tail, Ordering::Release);
            }
        }
    }
}

impl Io for Uring {
    fn now(&self) -> Instant {
        self.now
    }

    fn submit(&mut self, token: Token, op: Op) {
        match op {
            Op::Read { file, offset, buf } => self.submit_read(token, file.0, offset, buf),
            Op::Write { file, offset, bufs, dsync } => {
                self.submit_write(token, file.0, offset, bufs.into_iter(), dsync)
            }
            Op::Sync { file } => {
                let slot = self.take(token, Kind::Sync);
                let entry = opcode::Fsync::new(Fixed(file.0)).flags(FsyncFlags::DATASYNC).build();
                self.push(&entry.user_data(u64::from(slot)));
            }
            Op::Accept { listener } => {
                let slot = self.take(token, Kind::Accept);
                let fd = Fd(self.listeners[listener.0 as usize]);
                let entry = opcode::Accept::new(fd, std::ptr::null_mut(), std::ptr::null_mut());
                self.push(&entry.flags(libc::SOCK_CLOEXEC).build().user_data(u64::from(slot)));
            }
            Op::Connect { address, timeout_ms } => self.submit_connect(token, &address, timeout_ms),
            Op::Recv { conn } => {
                let slot = self.take(token, Kind::Recv(conn));
                let entry = opcode::Recv::new(Fd(conn.0), std::ptr::null_mut(), 0).buf_group(RECV_GROUP).build();
                self.push(&entry.flags(squeue::Flags::BUFFER_SELECT).user_data(u64::from(slot)));
            }
            Op::RecvInto { conn, mut buf, filled } => {
                let rest = &mut buf[filled..];
                let entry = opcode::Recv::new(Fd(conn.0), rest.as_mut_ptr(), rest.len() as u32).build();
                let slot = self.take(token, Kind::RecvInto(conn, Some(buf)));
                self.push(&entry.user_data(u64::from(slot)));
            }
            Op::Send { conn, bufs } => self.submit_send(token, conn, bufs),
            Op::Close { conn } => self.submit_close(token, conn),
            Op::Wake { shard } => self.submit_wake(shard.0),
        }
    }

    fn turn(&mut self, deadline: Instant, out: &mut Vec<Completion>) {
        self.register_arenas();
        // What the turn before gave back is there before its receives are.
        self.recv.refill();
        let wait = if deadline == Instant::FAR { u64::MAX } else { deadline.since_ns(clock()) };
        self.enter(wait);
        self.now = clock();
        self.reap(out);
    }

    fn cancel(&mut self, what: Cancel) {
        self.cancel_in_flight(what);
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        self.doorbells.rings[usize::from(self.shard)].store(-1, Ordering::Release);
        // Operations may still be in flight: their memory, and the receive buffers, must stay.
        for flight in self.flights.drain(..) {
            if !matches!(flight.kind, Kind::Free) {
                std::mem::forget(flight);
            }
        }
        for buf in self.recv.slots.drain(..).flatten() {
            std::mem::forget(buf);
        }
    }
}
