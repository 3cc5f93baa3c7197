//! The thread that owns a client's socket: it connects, receives, keeps time and delivers completions.
//!
//! Sending is everybody's: who submits a request from another thread sends it at once, under the lock, if nothing waits
//! before it. Where many are in flight already no one waits for a single one, and a system call each would cost more than
//! all the rest: then requests are collected, and leave together in this thread's next turn, as does always what its
//! callbacks submit. The socket never blocks: what it does not take is sent by this thread when it does.
//!
//! While callbacks run the driver lies in a thread-local place. A callback that waits for another call of the client
//! would wait for ever for its own thread; [`hand_over`] gives the driver to a new thread instead, with the completions
//! that wait behind this callback (it may wait for one of them), and this thread ends when its callback is done.

use std::{
    cell::RefCell,
    collections::{BTreeMap, VecDeque},
    os::fd::OwnedFd,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use proto::nebd;
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, eventfd, poll},
    io::{Errno, read, write},
    net::{
        AddressFamily, SendAncillaryBuffer, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, sendmsg,
        socket_with, sockopt,
    },
    time::Timespec,
};

use crate::{
    config::Config,
    exchange::{Exchange, Finished, Stats},
    inbox::{Inbox, Replies},
    lock::FileLock,
    request::{Body, Budget, Outcome, Request},
};

/// Asked of the kernel for requests on their way; it gives what it allows.
const SEND_BUFFER: usize = 4 << 20;
/// In this time the log gets so many lines about connections.
const NEWS: Duration = Duration::from_secs(1);
const NEWS_MAX: u32 = 4;
/// From so many requests in flight on they are collected.
const MANY: usize = 4;
/// The longest sleep.
const LONG: Duration = Duration::from_secs(3600);

/// An open file.
pub(crate) struct OpenFile {
    pub(crate) name: String,
    /// Held as long as the file is open.
    pub(crate) _lock: FileLock,
}

/// What the client, its callers and its thread share.
pub(crate) struct Shared {
    pub(crate) config: Config,
    address: SocketAddrUnix,
    state: Mutex<State>,
    pub(crate) files: Mutex<BTreeMap<i32, OpenFile>>,
    wake: OwnedFd,
    exit: Condvar,
}

struct State {
    exchange: Exchange,
    socket: Option<Arc<OwnedFd>>,
    /// The thread will look at the requests before it sleeps.
    awake: bool,
    stopping: bool,
    exited: bool,
}

/// A mutex of ours is never poisoned by a callback: none runs while one is held.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Starts the thread.
    pub(crate) fn start(config: Config) -> std::io::Result<Arc<Self>> {
        let address = SocketAddrUnix::new(&config.server_address)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let state = State {
            exchange: Exchange::new(config.clone()),
            socket: None,
            awake: true,
            stopping: false,
            exited: false,
        };
        let shared =
            Self { config, address, state: Mutex::new(state), files: Mutex::default(), wake, exit: Condvar::new() };
        let shared = Arc::new(shared);
        let driver = Box::new(Driver {
            shared: Arc::clone(&shared),
            socket: None,
            inbox: Inbox::new(),
            next_heartbeat: Instant::now(),
            finished: VecDeque::new(),
            news: News::default(),
        });
        thread::Builder::new().name("nebd-client".into()).spawn(move || run(driver))?;
        Ok(shared)
    }

    pub(crate) fn submit(&self, request: Request) {
        let mut state = locked(&self.state);
        let (had_output, had_parked) = (state.exchange.has_output(), state.exchange.parked() > 0);
        let over = state.exchange.submit(request);
        if let Some(over) = over {
            drop(state);
            return over.deliver();
        }
        if is_here(self) {
            return;
        }
        let wake = if !state.exchange.is_up() {
            !had_parked
        } else if had_output {
            // It is sent with those before it.
            false
        } else if state.exchange.in_flight() > MANY {
            !state.awake
        } else {
            !state.flush()
        };
        drop(state);
        if wake {
            self.wake();
        }
    }

    pub(crate) fn stats(&self) -> Stats {
        locked(&self.state).exchange.stats
    }

    /// Ends the thread; what is open fails. Returns when every callback was called (one that waits for a call of its own
    /// may still run, on a thread of its own); from a callback it returns at once.
    pub(crate) fn stop(&self) {
        locked(&self.state).stopping = true;
        self.wake();
        if is_here(self) {
            return;
        }
        let mut state = locked(&self.state);
        while !state.exited {
            state = self.exit.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn set_exited(&self) {
        locked(&self.state).exited = true;
        self.exit.notify_all();
    }

    fn wake(&self) {
        // A full counter wakes as well.
        let _ = write(&self.wake, &1u64.to_ne_bytes());
    }
}

impl Replies for Shared {
    fn with<T>(&self, work: impl FnOnce(&mut Exchange) -> T) -> T {
        work(&mut locked(&self.state).exchange)
    }
}

impl State {
    /// Sends as much as the socket takes; true if that was all, or if the connection turns out to be broken (which the
    /// receiving side finds out and deals with).
    fn flush(&mut self) -> bool {
        let Some(socket) = &self.socket else { return true };
        while self.exchange.has_output() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            let sent = sendmsg(socket, &self.exchange.output(), &mut SendAncillaryBuffer::default(), flags);
            match sent {
                Ok(count) => self.exchange.sent(count),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM) => return false,
                Err(_) => return true,
            }
        }
        true
    }
}

thread_local! {
    /// The driver of this thread while its callbacks run.
    static HERE: RefCell<Option<Box<Driver>>> = const { RefCell::new(None) };
}

/// Whether this is `shared`'s own thread, inside a callback.
fn is_here(shared: &Shared) -> bool {
    let same = |here: &RefCell<Option<Box<Driver>>>| {
        here.borrow().as_ref().is_some_and(|driver| std::ptr::eq(Arc::as_ptr(&driver.shared), shared))
    };
    HERE.try_with(same).unwrap_or(false)
}

/// This thread is about to wait: if it drives a client, another one does from now on.
pub(crate) fn hand_over() {
    let Some(driver) = HERE.try_with(|here| here.borrow_mut().take()).ok().flatten() else { return };
    let place = Arc::new(Mutex::new(Some(driver)));
    let theirs = Arc::clone(&place);
    let started = thread::Builder::new().name("nebd-client".into()).spawn(move || {
        let driver = locked(&theirs).take();
        if let Some(driver) = driver {
            run(driver);
        }
    });
    if started.is_err() {
        // Without threads there is nobody to answer: fail what is open, the caller's call included.
        tracing::error!("no thread for the client, it ends here");
        let driver = locked(&place).take();
        if let Some(mut driver) = driver {
            driver.exit();
            std::mem::take(&mut driver.finished).into_iter().for_each(deliver);
            driver.shared.set_exited();
        }
    }
}

fn deliver(finished: Finished) {
    if catch_unwind(AssertUnwindSafe(|| finished.deliver())).is_err() {
        tracing::error!("a completion callback panicked");
    }
}

/// A client's loop.
struct Driver {
    shared: Arc<Shared>,
    socket: Option<Arc<OwnedFd>>,
    inbox: Inbox,
    next_heartbeat: Instant,
    /// To be delivered, in order. A callback may be handed over in the middle of them.
    finished: VecDeque<Finished>,
    news: News,
}

/// What is logged about connections: of a server that takes and drops them a hundred times a second, a few lines.
#[derive(Default)]
struct News {
    since: Option<Instant>,
    told: u32,
    kept_back: u64,
}

impl News {
    fn tell(&mut self, now: Instant, what: std::fmt::Arguments<'_>) {
        if self.since.is_none_or(|since| now >= since + NEWS) {
            (self.since, self.told) = (Some(now), 0);
            if self.kept_back > 0 {
                tracing::info!("{} lines about connections were kept back", self.kept_back);
                self.kept_back = 0;
            }
        }
        self.told += 1;
        if self.told > NEWS_MAX {
            self.kept_back += 1;
        } else {
            tracing::info!("{what}");
        }
    }
}

/// Turns until the client is stopped or the driver was handed over.
fn run(mut driver: Box<Driver>) {
    loop {
        // What another thread left goes first.
        let goes_on = !driver.finished.is_empty() || driver.turn();
        while let Some(finished) = driver.finished.pop_front() {
            HERE.set(Some(driver));
            deliver(finished);
            match HERE.take() {
                Some(back) => driver = back,
                None => return,
            }
        }
        if !goes_on {
            let shared = Arc::clone(&driver.shared);
            drop(driver);
            return shared.set_exited();
        }
    }
}

impl Driver {
    /// One pass: what is due, what is to be sent, what has come. False when the client is stopped.
    fn turn(&mut self) -> bool {
        let now = Instant::now();
        self.heartbeat(now);
        let shared = Arc::clone(&self.shared);
        let mut state = locked(&shared.state);
        if state.stopping {
            drop(state);
            self.exit();
            return false;
        }
        state.exchange.poll(now);
        if state.exchange.connect_at(now).is_some_and(|at| at <= now) {
            self.connect(&mut state, now);
        }
        if state.exchange.is_left(now) {
            self.disconnect(&mut state, now);
        }
        let all_sent = state.flush();
        state.exchange.take_finished(&mut self.finished);
        let deadline = state.exchange.deadline(now).unwrap_or(now + LONG).min(self.next_heartbeat);
        state.awake = !self.finished.is_empty();
        drop(state);
        let timeout = if self.finished.is_empty() { deadline.saturating_duration_since(now) } else { Duration::ZERO };
        let came = self.wait(timeout, !all_sent);
        locked(&self.shared.state).awake = true;
        if came {
            self.receive();
        }
        true
    }

    /// Sleeps until something comes, the socket takes more, somebody wakes us, or the time is over; true if bytes came.
    fn wait(&self, timeout: Duration, want_output: bool) -> bool {
        let out = if want_output { PollFlags::OUT } else { PollFlags::empty() };
        let mut polled = smallvec::SmallVec::<[PollFd<'_>; 2]>::new();
        polled.push(PollFd::new(&self.shared.wake, PollFlags::IN));
        if let Some(socket) = &self.socket {
            polled.push(PollFd::new(socket, PollFlags::IN | out));
        }
        let timeout = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(timeout.subsec_nanos()) };
        if poll(&mut polled, Some(&timeout)).is_err() {
            return false;
        }
        if polled.first().is_some_and(|woken| !woken.revents().is_empty()) {
            let _ = read(&self.shared.wake, &mut [0; 8]);
        }
        let came = PollFlags::IN | PollFlags::HUP | PollFlags::ERR;
        polled.get(1).is_some_and(|socket| socket.revents().intersects(came))
    }

    fn receive(&mut self) {
        let Some(socket) = &self.socket else { return };
        let result = self.inbox.receive(socket, &*self.shared);
        let shared = Arc::clone(&self.shared);
        let mut state = locked(&shared.state);
        if let Err(error) = result {
            let now = Instant::now();
            self.news.tell(now, format_args!("connection lost: {error}"));
            self.disconnect(&mut state, now);
        }
        state.exchange.take_finished(&mut self.finished);
    }

    fn connect(&mut self, state: &mut State, now: Instant) {
        let attempt = || -> rustix::io::Result<OwnedFd> {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            // A Unix socket connects at once or not at all (a full backlog is EAGAIN).
            connect(&socket, &self.shared.address)?;
            let _ = sockopt::set_socket_send_buffer_size(&socket, SEND_BUFFER);
            Ok(socket)
        };
        match attempt() {
            Ok(socket) => {
                self.news.tell(now, format_args!("connected"));
                let socket = Arc::new(socket);
                (self.socket, state.socket) = (Some(Arc::clone(&socket)), Some(socket));
                state.exchange.on_connected(now);
            }
            Err(error) => {
                tracing::debug!("connect: {error}");
                state.exchange.on_connect_failed(now);
            }
        }
    }

    fn disconnect(&mut self, state: &mut State, now: Instant) {
        (self.socket, state.socket) = (None, None);
        if let Some((key, buffer)) = self.inbox.reset() {
            state.exchange.give_back(key, buffer);
        }
        state.exchange.on_broken(now);
    }

    /// One keep-alive per period while files are open. Its answer changes nothing.
    fn heartbeat(&mut self, now: Instant) {
        if now < self.next_heartbeat {
            return;
        }
        self.next_heartbeat = now + self.shared.config.heartbeat_interval;
        let files = locked(&self.shared.files);
        let info = |(fd, file): (&i32, &OpenFile)| nebd::HeartbeatFileInfo { fd: *fd, name: file.name.clone() };
        let info: Vec<_> = files.iter().map(info).collect();
        drop(files);
        if info.is_empty() {
            return;
        }
        let pid = i32::try_from(std::process::id()).unwrap_or_default();
        let message = nebd::HeartbeatRequest { pid, nebd_version: env!("CARGO_PKG_VERSION").into(), info };
        let done = |outcome: Outcome| {
            if let Err(error) = outcome.result {
                tracing::warn!("keep-alive: {error}");
            }
        };
        let request = Request {
            body: Body::KeepAlive(message),
            payload: bytes::Bytes::new(),
            buffer: None,
            budget: Budget::Once(now + self.shared.config.heartbeat_timeout),
            done: Box::new(done),
        };
        let over = locked(&self.shared.state).exchange.submit(request);
        self.finished.extend(over);
    }

    fn exit(&mut self) {
        let mut state = locked(&self.shared.state);
        (self.socket, state.socket) = (None, None);
        if let Some((key, buffer)) = self.inbox.reset() {
            state.exchange.give_back(key, buffer);
        }
        state.exchange.stop();
        state.exchange.take_finished(&mut self.finished);
    }
}
