//! `chunkserver serve`: put the parts together, wait for a signal or a failure, stop in good order, or hand over.

mod crew;
mod notify;
mod take_over;
mod upgrade;

pub use take_over::take_over;

use crate::chunk::ExtentPool;
use crate::config::Config;
use crate::control::disk::Disk;
use crate::control::server::{self, Setup as ControlSetup};
use crate::control::shards::{Port, connect};
use crate::io::ListenerId;
use crate::io::buffer::Arena;
use crate::io::uring::{self, Doorbells, RingCounters, Setup as RingSetup, Uring};
use crate::mailbox::{Mailbox, mesh};
use crate::metrics::ProcessStats;
use crate::reactor::handover::{Pause, Stage};
use crate::reactor::{Protocol, Reactor, Setup};
use crate::service::{Info, Shared};
use crate::shard::{self, Arenas, Shard};
use crate::volume::catalog::{Catalog, CatalogGate, CatalogStore, SharedCatalog};
use anyhow::Context;
use copyset::PeerId;
use crew::{Begin, Client, Crew, Left};
use socket2::{Domain, SockAddr, Socket, Type};
use std::collections::VecDeque;
use std::io::IsTerminal;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};
use take_over::Predecessor;
use tracing_subscriber::filter::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Exit code when the disk failed while serving: a supervisor should not restart blindly.
pub const EXIT_DISK_FAILED: u8 = 74;
/// Receive buffers of a shard: how many are offered, and their size.
const RECV_BUFFERS: (u16, usize) = (64, 64 << 10);
const RING_ENTRIES: u32 = 1024;
const BACKLOG: i32 = 4096;

/// What happens to a running server.
enum Event {
    Signal(i32),
    /// A shard's ring is up.
    Up,
    Shard(u16, Result<Left, String>),
    Upgrade(server::Upgrade),
}

/// Serve until told to stop.
///
/// # Errors
/// Whatever prevents the start, in one line.
pub fn run(config: &Config) -> anyhow::Result<ExitCode> {
    let set_log = start_logging(&config.log)?;
    uring::probe()?;
    raise_fd_limit();
    let disk = Disk::open(&config.data, Duration::from_millis(config.start_wait_ms))?;
    serve(config, &disk, set_log, None)
}

/// Serve an open disk; with a predecessor, from where it stopped.
fn serve(
    config: &Config,
    disk: &Disk,
    set_log: server::SetLog,
    mut predecessor: Option<Predecessor>,
) -> anyhow::Result<ExitCode> {
    let layout = disk.layout.clone();
    config.check_disk(layout.chunk_size)?;
    // A predecessor has it until it has stopped.
    let catalog = predecessor.is_none().then(|| CatalogStore::open(&config.catalog())).transpose()?;
    let inherited = predecessor.as_mut().map(Predecessor::take_sockets).unwrap_or_default();
    let sockets = Sockets::bind(config, Duration::from_millis(config.start_wait_ms), inherited)?;
    let peer = peer_id(sockets.rpc_address)?;
    if let Some(predecessor) = &predecessor {
        predecessor.check(disk, peer)?;
    }
    let shared = Shared::new(info(config, peer, layout.chunk_size), usize::from(layout.shards));
    let bells = Doorbells::new(layout.shards).context("event fds")?;
    let (links, ports) = connect(layout.shards, &bells);
    let (events, happened) = channel();
    watch_signals(events.clone())?;
    let stage = if predecessor.is_some() { Stage::Wait } else { Stage::Serve };
    let pause = Pause::new(stage, layout.shards);
    let parts = Parts { config, disk, shared: &shared, bells: &bells, peer, sockets: &sockets, pause: &pause };
    let crew = parts.start_shards(ports, &events)?;

    let catalog = match (&mut predecessor, catalog) {
        (None, Some(catalog)) => {
            crew.go(Vec::new(), &catalog.shared());
            catalog
        }
        (Some(predecessor), _) => predecessor.succeed(&parts, &crew, &happened)?,
        (None, None) => anyhow::bail!("no catalog"),
    };
    let (gate, volumes) = (catalog.gate(), catalog.shared());
    let control = ControlSetup {
        socket: config.ctl_socket(),
        links,
        catalog,
        peer: peer.0,
        chunk_size: layout.chunk_size,
        about: about(config, &layout, peer),
        set_log,
        upgrade: {
            let events = events.clone();
            Box::new(move |order| events.send(Event::Upgrade(order)).is_ok())
        },
    };
    let ctl_socket = config.ctl_socket();
    std::thread::Builder::new().name("control".into()).spawn(move || {
        if let Err(error) = server::run(control) {
            tracing::error!(%error, "the command socket is not served");
        }
    })?;
    tracing::info!(listen = %sockets.rpc_address, data = %config.data.display(), shards = layout.shards, "serving");
    if let Some(predecessor) = predecessor {
        predecessor.confirm(disk, &config.data)?;
    }

    let mut server = Server { parts, crew, gate, volumes, events, happened, later: VecDeque::new() };
    let end = server.supervise();
    if end == End::HandedOver {
        return Ok(ExitCode::SUCCESS); // the sockets' names are the successor's
    }
    let _ = std::fs::remove_file(ctl_socket);
    if let Some(path) = &config.nbd_socket {
        let _ = std::fs::remove_file(path);
    }
    match end {
        End::Code(code) => Ok(ExitCode::from(code)),
        End::Stopped | End::HandedOver => {
            server.crew.threads.into_iter().for_each(|t| drop(t.join()));
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// How serving ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Stopped,
    HandedOver,
    Code(u8),
}

/// A running server, as the main thread sees it.
struct Server<'a> {
    parts: Parts<'a>,
    crew: Crew,
    gate: CatalogGate,
    volumes: SharedCatalog,
    events: Sender<Event>,
    happened: Receiver<Event>,
    /// What happened meanwhile.
    later: VecDeque<Event>,
}

impl Server<'_> {
    /// Wait for the end, and bring it about in good order.
    fn supervise(&mut self) -> End {
        let shards = self.parts.disk.layout.shards;
        let (mut running, mut announced) = (shards, false);
        while running > 0 {
            if !announced && self.parts.shared.is_loaded() {
                announced = true;
                notify::notify("READY=1");
            }
            let wait = if announced { Duration::from_secs(3600) } else { Duration::from_millis(20) };
            let next = self.later.pop_front().ok_or(RecvTimeoutError::Timeout);
            match next.or_else(|_| self.happened.recv_timeout(wait)) {
                Ok(Event::Signal(signal_hook::consts::SIGUSR2)) => {
                    if let Some(end) = self.upgrade(None) {
                        return end;
                    }
                }
                Ok(Event::Upgrade(order)) => {
                    if let Some(end) = self.upgrade(Some(order)) {
                        return end;
                    }
                }
                Ok(Event::Signal(number)) => {
                    if self.parts.shared.is_draining() {
                        tracing::warn!("second signal: leaving at once");
                        return End::Code(128u8.wrapping_add(number as u8));
                    }
                    tracing::info!(signal = number, "stopping");
                    notify::notify("STOPPING=1");
                    self.parts.shared.drain();
                    self.parts.ring_all();
                }
                Ok(Event::Shard(_, Ok(_))) => running -= 1,
                Ok(Event::Shard(shard, Err(why))) => {
                    // One disk per process: nothing is left to serve, and a failed sync must not be followed by another.
                    tracing::error!(shard, "{why}; leaving");
                    return End::Code(EXIT_DISK_FAILED);
                }
                Ok(Event::Up) | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        tracing::info!("stopped");
        End::Stopped
    }
}

struct Parts<'a> {
    config: &'a Config,
    disk: &'a Disk,
    shared: &'a Arc<Shared>,
    bells: &'a Arc<Doorbells>,
    peer: PeerId,
    sockets: &'a Sockets,
    pause: &'a Arc<Pause>,
}

/// What one shard's thread is made of.
struct Seed {
    number: u16,
    ring: RingSetup,
    shard: shard::Config,
    arenas: Arenas,
    extents: Arc<ExtentPool>,
    setup: Setup,
    cpu: Option<usize>,
    begin: Receiver<Begin>,
    pause: Arc<Pause>,
}

impl Parts<'_> {
    fn start_shards(&self, ports: Vec<Port>, events: &Sender<Event>) -> anyhow::Result<Crew> {
        let layout = &self.disk.layout;
        let extents = ExtentPool::new(layout);
        let arenas = |size: u64| -> anyhow::Result<Vec<Arc<Arena>>> {
            (0..layout.shards).map(|_| Arena::new(size as usize).context("memory for buffers")).collect()
        };
        let payload = arenas(self.config.payload_buffers.0)?;
        let work = arenas(self.config.work_buffers.0)?;
        let all: Vec<Arc<Arena>> = payload.iter().chain(&work).cloned().collect();
        let cpus = cpus();
        let mut crew = Crew { threads: Vec::new(), begin: Vec::new() };
        for (number, (mailbox, port)) in (0..layout.shards).zip(mesh(layout.shards).into_iter().zip(ports)) {
            let n = usize::from(number);
            let arenas =
                Arenas { payload: Arc::clone(&payload[n]), work: Arc::clone(&work[n]), all_payload: payload.clone() };
            let (go, begin) = channel();
            crew.begin.push(go);
            let seed = Seed {
                number,
                begin,
                pause: Arc::clone(self.pause),
                ring: RingSetup {
                    shard: number,
                    files: vec![self.disk.file.as_raw_fd()],
                    listeners: self.sockets.fds(),
                    arenas: all.clone(),
                    entries: RING_ENTRIES,
                    recv_buffers: RECV_BUFFERS,
                    doorbells: Arc::clone(self.bells),
                },
                shard: self.shard_config(number),
                extents: Arc::clone(&extents),
                setup: self.setup(number, mailbox, port, arenas.clone()),
                arenas,
                cpu: self.config.pin_shards.then(|| cpus.get(n).copied()).flatten(),
            };
            let events = events.clone();
            let shared = Arc::clone(self.shared);
            let layout = layout.clone();
            let thread = std::thread::Builder::new().name(format!("shard-{number}"));
            crew.threads.push(thread.spawn(move || {
                let result = shard_thread(seed, &layout, &shared, &events);
                let _ = events.send(Event::Shard(number, result));
            })?);
        }
        Ok(crew)
    }

    fn ring_all(&self) {
        (0..self.disk.layout.shards).for_each(|shard| self.bells.ring(shard));
    }

    fn shard_config(&self, shard: u16) -> shard::Config {
        let mut seed = [0; 8];
        let _ = rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty());
        shard::Config {
            shard,
            peer: self.peer.0,
            dirty_limit: self.config.dirty_limit.0 as usize,
            flush_age_ns: self.config.flush_age_ms.saturating_mul(1_000_000),
            election_ms: self.config.election_timeout_ms,
            seed: u64::from_le_bytes(seed),
        }
    }

    fn setup(&self, number: u16, mailbox: Mailbox, port: Port, arenas: Arenas) -> Setup {
        let listeners = if number == 0 { self.sockets.listeners() } else { Vec::new() };
        Setup {
            listeners,
            shared: Arc::clone(self.shared),
            catalog: SharedCatalog::new(Catalog::default()), // comes with the order to begin
            mailbox,
            control: Some(port),
            arenas,
            layout: self.disk.layout.clone(),
        }
    }
}

fn shard_thread(
    mut seed: Seed,
    layout: &crate::chunk::Layout,
    shared: &Arc<Shared>,
    events: &Sender<Event>,
) -> Result<Left, String> {
    if let Some(cpu) = seed.cpu {
        let mut set = rustix::thread::CpuSet::new();
        set.set(cpu);
        if let Err(error) = rustix::thread::sched_setaffinity(None, &set) {
            tracing::debug!(%error, cpu, "not pinned");
        }
    }
    seed.arenas.payload.adopt();
    seed.arenas.work.adopt();
    let io = Uring::new(seed.ring).map_err(|e| e.to_string())?;
    let counters: Arc<RingCounters> = io.counters();
    let metrics = shared.registry().shard(usize::from(seed.number)).ok_or("no metrics for this shard")?;
    let _ = events.send(Event::Up);
    let Ok(begin) = seed.begin.recv() else { return Ok(Left::default()) }; // the start was given up
    seed.setup.catalog = begin.catalog;
    let now = uring::clock();
    let shard = Shard::new(seed.shard, layout.clone(), seed.arenas, seed.extents, Arc::clone(metrics), now)
        .map_err(|e| e.to_string())?;
    let mut reactor = Reactor::new(io, seed.number, shard, seed.setup);
    reactor.take_part(seed.pause, begin.clients.into_iter().map(Client::handed).collect());
    while !reactor.finished() {
        reactor.turn();
        metrics.set(crate::metrics::Counter::Enters, counters.enters.load(std::sync::atomic::Ordering::Relaxed));
    }
    match reactor.failure() {
        Some(failure) => Err(failure.to_string()),
        None if reactor.has_left() => Ok(Left::of(reactor.part())),
        None => Ok(Left::default()),
    }
}

/// The listening sockets of the process.
struct Sockets {
    all: Vec<(Socket, Protocol)>,
    rpc_address: SocketAddr,
}

impl Sockets {
    /// Those that are `inherited` are not made anew; what nobody wants of them is closed.
    fn bind(config: &Config, wait: Duration, inherited: Vec<Socket>) -> anyhow::Result<Self> {
        let until = Instant::now() + wait;
        let mut inherited = Inherited(inherited);
        let tcp = |address, until, from: &mut Inherited| from.tcp(address).map_or_else(|| tcp(address, until), Ok);
        let unix = |path: &Path, from: &mut Inherited| from.unix(path).map_or_else(|| unix(path), Ok);
        let rpc = tcp(config.listen, until, &mut inherited).with_context(|| format!("listen on {}", config.listen))?;
        let rpc_address = rpc.local_addr()?.as_socket().context("an IP address")?;
        let mut all = vec![(rpc, Protocol::Rpc)];
        if let Some(address) = config.nbd_listen {
            let socket = tcp(address, until, &mut inherited);
            all.push((socket.with_context(|| format!("listen on {address}"))?, Protocol::Nbd));
        }
        if let Some(path) = &config.nbd_socket {
            let socket = unix(path, &mut inherited);
            all.push((socket.with_context(|| format!("listen on {}", path.display()))?, Protocol::Nbd));
        }
        Ok(Self { all, rpc_address })
    }
    fn fds(&self) -> Vec<RawFd> {
        self.all.iter().map(|s| s.0.as_raw_fd()).collect()
    }
    fn listeners(&self) -> Vec<(ListenerId, Protocol)> {
        self.all.iter().zip(0..).map(|((_, protocol), i)| (ListenerId(i), *protocol)).collect()
    }
}

/// Listening sockets of another process.
struct Inherited(Vec<Socket>);

impl Inherited {
    fn take(&mut self, wanted: impl Fn(&SockAddr) -> bool) -> Option<Socket> {
        let found = self.0.iter().position(|socket| socket.local_addr().is_ok_and(|address| wanted(&address)))?;
        Some(self.0.swap_remove(found))
    }
    fn tcp(&mut self, address: SocketAddr) -> Option<Socket> {
        self.take(|at| at.as_socket() == Some(address))
    }
    fn unix(&mut self, path: &Path) -> Option<Socket> {
        self.take(|at| at.as_pathname() == Some(path))
    }
}

/// An ended process may still hold the port for a moment: bind is retried (rule 2).
fn tcp(address: SocketAddr, until: Instant) -> std::io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.set_tcp_nodelay(true)?; // inherited by accepted sockets
    loop {
        match socket.bind(&address.into()) {
            Err(e) if e.kind() == std::io::ErrorKind::AddrInUse && Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(20));
            }
            other => break other?,
        }
    }
    socket.listen(BACKLOG)?;
    Ok(socket)
}

fn unix(path: &Path) -> std::io::Result<Socket> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
        _ => {} // the lock on the disk says that no other server of this disk lives
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.bind(&SockAddr::unix(path)?)?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

fn peer_id(address: SocketAddr) -> anyhow::Result<PeerId> {
    match address.ip() {
        IpAddr::V4(ip) => Ok(PeerId::new(ip, address.port(), 0)),
        IpAddr::V6(_) => anyhow::bail!("listen: Curve's peer ids are IPv4"),
    }
}

fn info(config: &Config, peer: PeerId, chunk_size: u32) -> Info {
    let shown = toml::Table::try_from(config).unwrap_or_default();
    Info {
        peer,
        chunk_size,
        max_inflight: config.max_inflight_requests as usize,
        version: env!("CARGO_PKG_VERSION").into(),
        config: shown.into_iter().map(|(k, v)| (k, v.to_string().trim_matches('"').to_owned())).collect(),
        process: ProcessStats::read,
    }
}

fn about(config: &Config, layout: &crate::chunk::Layout, peer: PeerId) -> serde_json::Value {
    serde_json::json!({
        "version": env!("CARGO_PKG_VERSION"), "pid": std::process::id(), "peer": peer.to_string(),
        "data": config.data, "nbd_socket": config.nbd_socket, "nbd_listen": config.nbd_listen,
        "chunk_size": layout.chunk_size, "slots": layout.slot_count, "disk_size": layout.size,
    })
}

/// CPUs this process may run on.
fn cpus() -> Vec<usize> {
    let Ok(set) = rustix::thread::sched_getaffinity(None) else { return Vec::new() };
    (0..rustix::thread::CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect()
}

/// One descriptor per connection: ask for as many as are allowed.
fn raise_fd_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}

fn start_logging(filter: &str) -> anyhow::Result<server::SetLog> {
    let parse = |text: &str| EnvFilter::try_new(text).map_err(|e| format!("log filter {text:?}: {e}"));
    let (layer, handle) = tracing_subscriber::reload::Layer::new(parse(filter).map_err(anyhow::Error::msg)?);
    let output =
        tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal());
    tracing_subscriber::registry().with(layer).with(output).init();
    Ok(Box::new(move |text| {
        let filter = EnvFilter::try_new(text).map_err(|e| format!("log filter {text:?}: {e}"))?;
        handle.reload(filter).map_err(|e| e.to_string())
    }))
}

fn watch_signals(events: Sender<Event>) -> anyhow::Result<()> {
    use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR2};
    let mut signals = signal_hook::iterator::Signals::new([SIGTERM, SIGINT, SIGUSR2])?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        for number in signals.forever() {
            if events.send(Event::Signal(number)).is_err() {
                return;
            }
        }
    })?;
    Ok(())
}
