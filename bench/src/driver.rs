//! Runs an engine on sockets: one thread, tokio-uring, a reader and a writer per connection, one timer.
//!
//! Requests that become due while a send is on its way leave together in the next one, and one receive hands the
//! engine all replies it brought, so the cost per request falls as the load rises.

use crate::codec;
use crate::engine::Engine;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::net::{Shutdown, SocketAddr};
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use tokio_uring::buf::BoundedBuf;
use tokio_uring::fs::File;
use tokio_uring::net::TcpStream;

const RECEIVE: usize = 256 << 10;
const RECONNECT: Duration = Duration::from_millis(20);

struct Shared {
    engine: RefCell<Engine>,
    epoch: Instant,
    output: Vec<Notify>,
    /// Open streams, to be shut down when the phase is over.
    streams: RefCell<Vec<Option<Rc<TcpStream>>>>,
    over: Notify,
    /// Wakes whoever waits for a connection when the phase is over.
    closing: Notify,
    stopped: Cell<bool>,
    progress: Arc<AtomicU64>,
    /// How much of this worker's answers `progress` holds already.
    reported: Cell<u64>,
}

impl Shared {
    fn now(&self) -> u64 {
        self.epoch.elapsed().as_nanos() as u64
    }

    /// Lets the engine send what is due and wakes whom that concerns.
    fn pump(&self) {
        let mut engine = self.engine.borrow_mut();
        engine.poll(self.now());
        for (conn, notify) in self.output.iter().enumerate() {
            if engine.has_output(conn) {
                notify.notify_one();
            }
        }
        let answered = engine.answered();
        self.progress.fetch_add(answered - self.reported.replace(answered), Ordering::Relaxed);
        if engine.is_over() {
            self.over.notify_one();
        }
    }
}

/// Runs `engine` against the nodes at `addrs`, with `conns` connections to each, until it is over and returns it with
/// the phase's length in nanoseconds. `epoch` is the moment its times count from; `progress` grows by every answer.
pub fn run(
    engine: Engine,
    addrs: &[SocketAddr],
    conns: usize,
    epoch: Instant,
    progress: &Arc<AtomicU64>,
) -> std::io::Result<(Engine, u64)> {
    let progress = Arc::clone(progress);
    let addrs: Vec<SocketAddr> = addrs.iter().flat_map(|addr| std::iter::repeat_n(*addr, conns.max(1))).collect();
    let conns = addrs.len();
    tokio_uring::start(async move {
        let shared = Rc::new(Shared {
            engine: RefCell::new(engine),
            epoch,
            output: (0..conns).map(|_| Notify::new()).collect(),
            streams: RefCell::new((0..conns).map(|_| None).collect()),
            over: Notify::new(),
            closing: Notify::new(),
            stopped: Cell::new(false),
            progress,
            reported: Cell::new(0),
        });
        let timer = Timer::new()?;
        let mut tasks = vec![tokio_uring::spawn(tick(Rc::clone(&shared), timer))];
        let keep = |(conn, addr)| tokio_uring::spawn(connection(Rc::clone(&shared), addr, conn));
        tasks.extend(addrs.into_iter().enumerate().map(keep));
        shared.over.notified().await;
        let end = shared.now();
        shared.stopped.set(true);
        shared.closing.notify_waiters();
        for (stream, output) in shared.streams.borrow().iter().zip(&shared.output) {
            output.notify_one();
            if let Some(stream) = stream {
                let _ = stream.shutdown(Shutdown::Both);
            }
        }
        for task in tasks {
            let _ = task.await;
        }
        let shared = Rc::into_inner(shared).ok_or_else(|| std::io::Error::other("a task outlived its phase"))?;
        Ok((shared.engine.into_inner(), end))
    })
}

/// A timer that io_uring reads like a file: finer than tokio's milliseconds, and no second poller.
struct Timer {
    fd: OwnedFd,
    file: File,
}

impl Timer {
    fn new() -> std::io::Result<Self> {
        let fd = rustix::time::timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC)?;
        let file = File::from_std(std::fs::File::from(fd.try_clone()?));
        Ok(Self { fd, file })
    }

    async fn sleep(&self, nanos: u64) -> std::io::Result<()> {
        let nanos = nanos.max(1);
        let value = Timespec { tv_sec: (nanos / 1_000_000_000) as i64, tv_nsec: (nanos % 1_000_000_000) as i64 };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        rustix::time::timerfd_settime(&self.fd, TimerfdTimerFlags::empty(), &once)?;
        self.file.read_at(Vec::with_capacity(8), 0).await.0.map(|_| ())
    }
}

async fn tick(shared: Rc<Shared>, timer: Timer) {
    while !shared.stopped.get() {
        let now = shared.now();
        let deadline = shared.engine.borrow().deadline(now);
        if timer.sleep(deadline.saturating_sub(now)).await.is_err() {
            // Without a timer there is no pace: end the phase rather than measure nonsense.
            shared.over.notify_one();
            return;
        }
        shared.pump();
    }
}

/// What `work` comes to, or `None` if `end` comes first: a host that is cut off answers to a connect after minutes.
async fn until<T>(end: impl Future<Output = ()>, work: impl Future<Output = T>) -> Option<T> {
    let (mut end, mut work) = (pin!(end), pin!(work));
    poll_fn(|cx| match work.as_mut().poll(cx) {
        Poll::Ready(value) => Poll::Ready(Some(value)),
        Poll::Pending => end.as_mut().poll(cx).map(|()| None),
    })
    .await
}

/// Keeps connection `conn` open: connects, runs it, connects again.
async fn connection(shared: Rc<Shared>, addr: SocketAddr, conn: usize) {
    let Ok(pause) = Timer::new() else { return };
    while !shared.stopped.get() {
        if let Some(Ok(stream)) = until(shared.closing.notified(), TcpStream::connect(addr)).await {
            let _ = stream.set_nodelay(true);
            let stream = Rc::new(stream);
            if let Some(slot) = shared.streams.borrow_mut().get_mut(conn) {
                *slot = Some(Rc::clone(&stream));
            }
            let now = shared.now();
            shared.engine.borrow_mut().on_connect(conn, now);
            shared.pump();
            let open = Rc::new(Cell::new(true));
            let writer = tokio_uring::spawn(write(Rc::clone(&shared), Rc::clone(&stream), conn, Rc::clone(&open)));
            if !shared.stopped.get() {
                read(&shared, &stream).await;
            }
            open.set(false);
            let _ = stream.shutdown(Shutdown::Both);
            let now = shared.now();
            shared.engine.borrow_mut().on_disconnect(conn, now);
            shared.pump();
            if let Some(notify) = shared.output.get(conn) {
                notify.notify_one();
            }
            let _ = writer.await;
            if let Some(slot) = shared.streams.borrow_mut().get_mut(conn) {
                *slot = None;
            }
        }
        if !shared.stopped.get() {
            let _ = pause.sleep(RECONNECT.as_nanos() as u64).await;
        }
    }
}

/// Feeds replies to the engine until the connection ends.
async fn read(shared: &Shared, stream: &TcpStream) {
    let mut buf: Vec<u8> = Vec::with_capacity(RECEIVE);
    loop {
        // Room for the rest of the frame that has begun, and never less than a small read.
        let wanted = codec::frame_len(&buf).ok().flatten().unwrap_or(0).saturating_sub(buf.len());
        buf.reserve(wanted.max(4096));
        let filled = buf.len();
        let (result, slice) = stream.read(buf.slice(filled..)).await;
        buf = slice.into_inner();
        match result {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let now = shared.now();
        let used = shared.engine.borrow_mut().on_bytes(&buf, now);
        shared.pump();
        match used {
            Ok(used) => drop(buf.drain(..used)),
            Err(error) => {
                eprintln!("bench: connection dropped: {error}");
                return;
            }
        }
    }
}

/// Sends what the engine has for this connection until the connection ends.
async fn write(shared: Rc<Shared>, stream: Rc<TcpStream>, conn: usize, open: Rc<Cell<bool>>) {
    let Some(notify) = shared.output.get(conn) else { return };
    let mut buf = Vec::with_capacity(RECEIVE);
    while open.get() && !shared.stopped.get() {
        if !shared.engine.borrow_mut().take_output(conn, &mut buf) {
            notify.notified().await;
            continue;
        }
        let (result, sent) = stream.write_all(buf).await;
        buf = sent;
        buf.clear();
        if result.is_err() {
            let _ = stream.shutdown(Shutdown::Both);
            return;
        }
    }
}
