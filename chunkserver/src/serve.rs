//! `chunkserver serve`: put the parts together, wait for a signal or a failure, stop in good order.

use crate::chunk::{ExtentPool, Layout};
use crate::config::Config;
use crate::control::disk::Disk;
use crate::control::server::{self, Setup as ControlSetup};
use crate::control::shards::{Port, connect};
use crate::io::buffer::Arena;
use crate::io::uring::{self, Doorbells, RingCounters, Setup as RingSetup, Uring};
use crate::io::{Io, ListenerId};
use crate::limits::CHUNK_BYTES_MAX;
use crate::mailbox::{Mailbox, mesh};
use crate::metrics::ProcessStats;
use crate::reactor::{Protocol, Reactor, Setup};
use crate::service::{Info, Shared};
use crate::shard::diskless::{Core, Diskless};
use crate::shard::{self, Arenas, Shard};
use crate::volume::catalog::{CatalogStore, SharedCatalog};
use anyhow::Context;
use copyset::PeerId;
use socket2::{Domain, SockAddr, Socket, Type};
use std::io::IsTerminal;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};
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
    Shard(u16, Result<(), String>),
}

/// Serve until told to stop.
///
/// # Errors
/// Whatever prevents the start, in one line.
pub fn run(config: &Config) -> anyhow::Result<ExitCode> {
    let set_log = start_logging(&config.log)?;
    uring::probe()?;
    raise_fd_limit();
    let wait = Duration::from_millis(config.start_wait_ms);
    let disk = config.data.as_deref().map(|data| Disk::open(data, wait)).transpose()?;
    let node = Node::new(config, disk.as_ref())?;
    let catalog = CatalogStore::open(&config.catalog())?;
    let sockets = Sockets::bind(config, wait)?;
    let peer = peer_id(sockets.rpc_address)?;
    let shared = Shared::new(info(config, peer, node.chunk_size), usize::from(node.shards));
    let bells = Doorbells::new(node.shards).context("event fds")?;
    let (links, ports) = connect(node.shards, &bells);
    let (events, happened) = channel();
    watch_signals(events.clone())?;

    let parts = Parts {
        config,
        disk: disk.as_ref(),
        node: &node,
        shared: &shared,
        catalog: catalog.shared(),
        bells: &bells,
        peer,
        sockets: &sockets,
    };
    let threads = parts.start_shards(ports, &events)?;
    let control = ControlSetup {
        socket: config.ctl_socket(),
        links,
        catalog,
        peer: peer.0,
        chunk_size: node.chunk_size,
        about: about(config, disk.as_ref(), &node, peer),
        set_log,
    };
    let ctl_socket = config.ctl_socket();
    std::thread::Builder::new().name("control".into()).spawn(move || {
        if let Err(error) = server::run(control) {
            tracing::error!(%error, "the command socket is not served");
        }
    })?;
    let data = config.data.as_deref().map_or_else(|| "none".into(), Path::to_string_lossy);
    tracing::info!(listen = %sockets.rpc_address, %data, shards = node.shards, "serving");

    let code = supervise(&happened, &shared, &bells, node.shards);
    let _ = std::fs::remove_file(ctl_socket);
    if let Some(path) = &config.nbd_socket {
        let _ = std::fs::remove_file(path);
    }
    if code == ExitCode::SUCCESS {
        threads.into_iter().for_each(|t| drop(t.join()));
    }
    Ok(code)
}

/// Wait for the end, and bring it about in good order.
fn supervise(happened: &std::sync::mpsc::Receiver<Event>, shared: &Shared, bells: &Doorbells, shards: u16) -> ExitCode {
    let mut running = shards;
    while running > 0 {
        match happened.recv() {
            Ok(Event::Signal(number)) => {
                if shared.is_draining() {
                    tracing::warn!("second signal: leaving at once");
                    return ExitCode::from(128u8.wrapping_add(number as u8));
                }
                tracing::info!(signal = number, "stopping");
                shared.drain();
                (0..shards).for_each(|s| bells.ring(s));
            }
            Ok(Event::Shard(_, Ok(()))) => running -= 1,
            Ok(Event::Shard(shard, Err(why))) => {
                // One disk per process: nothing is left to serve, and a failed sync must not be followed by another.
                tracing::error!(shard, "{why}; leaving");
                return ExitCode::from(EXIT_DISK_FAILED);
            }
            Err(_) => break,
        }
    }
    tracing::info!("stopped");
    ExitCode::SUCCESS
}

/// What does not depend on whether there is a disk.
struct Node {
    shards: u16,
    chunk_size: u32,
    /// Identity of the disk, or a number of this life.
    id: [u8; 16],
    /// Drawn for this life.
    seed: u64,
}

impl Node {
    fn new(config: &Config, disk: Option<&Disk>) -> anyhow::Result<Self> {
        let mut drawn = [0; 24];
        let _ = rustix::rand::getrandom(&mut drawn, rustix::rand::GetRandomFlags::empty());
        let ([id @ .., _, _, _, _, _, _, _, _], seed) = (&drawn, drawn.last_chunk::<8>().copied().unwrap_or_default());
        let seed = u64::from_le_bytes(seed);
        let Some(Disk { layout, .. }) = disk else {
            let cores = std::thread::available_parallelism().map_or(1, |n| (n.get() - 1).clamp(1, 256) as u16);
            let shards = if config.export_shards == 0 { cores } else { config.export_shards };
            return Ok(Self { shards, chunk_size: CHUNK_BYTES_MAX as u32, id: *id, seed });
        };
        config.check_disk(layout.chunk_size)?;
        Ok(Self { shards: layout.shards, chunk_size: layout.chunk_size, id: layout.uuid, seed })
    }
}

struct Parts<'a> {
    config: &'a Config,
    disk: Option<&'a Disk>,
    node: &'a Node,
    shared: &'a Arc<Shared>,
    catalog: SharedCatalog,
    bells: &'a Arc<Doorbells>,
    peer: PeerId,
    sockets: &'a Sockets,
}

/// What one shard's thread is made of.
struct Seed {
    number: u16,
    ring: RingSetup,
    shard: shard::Config,
    arenas: Arenas,
    disk: Option<(Layout, Arc<ExtentPool>)>,
    setup: Setup,
    cpu: Option<usize>,
}

impl Parts<'_> {
    fn start_shards(
        &self,
        ports: Vec<Port>,
        events: &Sender<Event>,
    ) -> anyhow::Result<Vec<std::thread::JoinHandle<()>>> {
        let shards = self.node.shards;
        let disk = self.disk.map(|disk| (disk.layout.clone(), ExtentPool::new(&disk.layout)));
        let arenas = |size: u64| -> anyhow::Result<Vec<Arc<Arena>>> {
            (0..shards).map(|_| Arena::new(size as usize).context("memory for buffers")).collect()
        };
        let payload = arenas(self.config.payload_buffers.0)?;
        let work = arenas(if disk.is_some() { self.config.work_buffers.0 } else { 1 << 20 })?;
        let all: Vec<Arc<Arena>> = payload.iter().chain(&work).cloned().collect();
        let cpus = cpus();
        let mut threads = Vec::new();
        for (number, (mailbox, port)) in (0..shards).zip(mesh(shards).into_iter().zip(ports)) {
            let n = usize::from(number);
            let arenas =
                Arenas { payload: Arc::clone(&payload[n]), work: Arc::clone(&work[n]), all_payload: payload.clone() };
            let seed = Seed {
                number,
                ring: RingSetup {
                    shard: number,
                    files: self.disk.iter().map(|disk| disk.file.as_raw_fd()).collect(),
                    listeners: self.sockets.fds(),
                    arenas: all.clone(),
                    entries: RING_ENTRIES,
                    recv_buffers: RECV_BUFFERS,
                    doorbells: Arc::clone(self.bells),
                },
                shard: self.shard_config(number),
                disk: disk.clone(),
                setup: self.setup(number, mailbox, port, arenas.clone()),
                arenas,
                cpu: self.config.pin_shards.then(|| cpus.get(n).copied()).flatten(),
            };
            let events = events.clone();
            let shared = Arc::clone(self.shared);
            let thread = std::thread::Builder::new().name(format!("shard-{number}"));
            threads.push(thread.spawn(move || {
                let result = shard_thread(seed, &shared);
                let _ = events.send(Event::Shard(number, result));
            })?);
        }
        Ok(threads)
    }

    fn shard_config(&self, shard: u16) -> shard::Config {
        shard::Config {
            shard,
            peer: self.peer.0,
            dirty_limit: self.config.dirty_limit.0 as usize,
            flush_age_ns: self.config.flush_age_ms.saturating_mul(1_000_000),
            election_ms: self.config.election_timeout_ms,
            trash_s: self.config.trash_expire_s,
            wall_s: wall_s(),
            seed: self.node.seed.rotate_left(u32::from(shard)) ^ u64::from(shard) << 56,
        }
    }

    fn setup(&self, number: u16, mailbox: Mailbox, port: Port, arenas: Arenas) -> Setup {
        let listeners = if number == 0 { self.sockets.listeners() } else { Vec::new() };
        Setup {
            listeners,
            shared: Arc::clone(self.shared),
            catalog: self.catalog.clone(),
            mailbox,
            control: Some(port),
            arenas,
            shards: self.node.shards,
            chunk_size: self.node.chunk_size,
            disk: self.node.id,
            cluster: self.config.cluster_id(),
            seed: self.node.seed,
        }
    }
}

fn shard_thread(seed: Seed, shared: &Arc<Shared>) -> Result<(), String> {
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
    let now = io.now();
    let core = match seed.disk {
        Some((layout, extents)) => {
            let shard = Shard::new(seed.shard, layout, seed.arenas, extents, Arc::clone(metrics), now);
            Core::from(shard.map_err(|e| e.to_string())?)
        }
        None => Diskless::new(seed.number, seed.arenas.payload).into(),
    };
    let mut reactor = Reactor::new(io, seed.number, core, seed.setup);
    while !reactor.finished() {
        reactor.turn();
        metrics.set(crate::metrics::Counter::Enters, counters.enters.load(std::sync::atomic::Ordering::Relaxed));
    }
    reactor.failure().map_or(Ok(()), |failure| Err(failure.to_string()))
}

/// The listening sockets of the process.
struct Sockets {
    all: Vec<(Socket, Protocol)>,
    rpc_address: SocketAddr,
}

impl Sockets {
    fn bind(config: &Config, wait: Duration) -> anyhow::Result<Self> {
        let until = Instant::now() + wait;
        let rpc = tcp(config.listen, until).with_context(|| format!("listen on {}", config.listen))?;
        let rpc_address = rpc.local_addr()?.as_socket().context("an IP address")?;
        let mut all = vec![(rpc, Protocol::Rpc)];
        if let Some(address) = config.nbd_listen {
            all.push((tcp(address, until).with_context(|| format!("listen on {address}"))?, Protocol::Nbd));
        }
        if let Some(path) = &config.nbd_socket {
            all.push((unix(path).with_context(|| format!("listen on {}", path.display()))?, Protocol::Nbd));
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

fn about(config: &Config, disk: Option<&Disk>, node: &Node, peer: PeerId) -> serde_json::Value {
    let (slots, size) = disk.map_or((0, 0), |disk| (disk.layout.slot_count, disk.layout.size));
    serde_json::json!({
        "version": env!("CARGO_PKG_VERSION"), "pid": std::process::id(), "peer": peer.to_string(),
        "data": config.data, "nbd_socket": config.nbd_socket, "nbd_listen": config.nbd_listen,
        "chunk_size": node.chunk_size, "slots": slots, "disk_size": size,
    })
}

/// Seconds since 1970 when the clock that shards count by was 0.
fn wall_s() -> u64 {
    let seconds = |id| u64::try_from(rustix::time::clock_gettime(id).tv_sec).unwrap_or(0);
    seconds(rustix::time::ClockId::Realtime).saturating_sub(seconds(rustix::time::ClockId::Boottime))
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
    use signal_hook::consts::{SIGINT, SIGTERM};
    let mut signals = signal_hook::iterator::Signals::new([SIGTERM, SIGINT])?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        for number in signals.forever() {
            if events.send(Event::Signal(number)).is_err() {
                return;
            }
        }
    })?;
    Ok(())
}
