//! `chunkserver serve`: put the parts together, wait for a signal or a failure, stop in good order, or hand over.

mod crew;
mod nebd;
mod notify;
mod sockets;
mod take_over;
mod upgrade;

pub use take_over::take_over;

use crate::chunk::{ExtentPool, Layout};
use crate::config::Config;
use crate::control::disk::Disk;
use crate::control::server::{self, Setup as ControlSetup};
use crate::control::shards::{Port, connect};
use crate::io::buffer::Arena;
use crate::io::uring::{self, Doorbells, RingCounters, Setup as RingSetup, Uring};
use crate::limits::CHUNK_BYTES_MAX;
use crate::mailbox::{Mailbox, mesh};
use crate::metrics::ProcessStats;
use crate::metrics::text::{Var, Vars};
use crate::nebd::server::Server as NebdServer;
use crate::reactor::handover::{Pause, Stage};
use crate::reactor::{Reactor, Setup};
use crate::service::{Info, Shared};
use crate::shard::diskless::{Core, Diskless};
use crate::shard::{self, Arenas, Shard};
use crate::volume::catalog::{Catalog, CatalogGate, CatalogStore, SharedCatalog};
use anyhow::Context;
use copyset::PeerId;
use crew::{Begin, Client, Crew, Left};
use socket2::Socket;
use sockets::{Sockets, unix};
use std::collections::VecDeque;
use std::io::IsTerminal;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;
use take_over::Predecessor;
use tracing_subscriber::filter::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Exit code when the disk failed while serving: a supervisor should not restart blindly.
pub const EXIT_DISK_FAILED: u8 = 74;
/// Receive buffers of a shard: how many are offered, and their size.
const RECV_BUFFERS: (u16, usize) = (64, 64 << 10);
const RING_ENTRIES: u32 = 1024;

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
    let wait = Duration::from_millis(config.start_wait_ms);
    let disk = config.data.as_deref().map(|data| Disk::open(data, wait)).transpose()?;
    serve(config, disk.as_ref(), set_log, None)
}

/// Serve, from an open disk if there is one; with a predecessor, from where it stopped.
fn serve(
    config: &Config,
    disk: Option<&Disk>,
    set_log: server::SetLog,
    mut predecessor: Option<Predecessor>,
) -> anyhow::Result<ExitCode> {
    let wait = Duration::from_millis(config.start_wait_ms);
    let mut node = Node::new(config, disk)?;
    // A predecessor has these until it has stopped.
    let catalog = predecessor.is_none().then(|| CatalogStore::open_within(&config.catalog(), wait)).transpose()?;
    let config = &nebd::resolve(config)?;
    let prepared = match predecessor {
        None => nebd::Prepared::new(config, wait)?,
        Some(_) => None,
    };
    let inherited = predecessor.as_mut().map(|from| from.take_sockets(config)).transpose()?.unwrap_or_default();
    let sockets = Sockets::bind(config, wait, inherited)?;
    let peer = peer_id(sockets.rpc_address)?;
    if let Some(predecessor) = &predecessor {
        predecessor.check(disk, peer)?;
        predecessor.keep_identity(disk, &mut node);
    }
    let shared = Shared::new(info(config, peer, node.chunk_size), usize::from(node.shards));
    let bells = Doorbells::new(node.shards).context("event fds")?;
    let (links, ports) = connect(node.shards, &bells);
    let (events, happened) = channel();
    watch_signals(events.clone())?;
    let stage = if predecessor.is_some() { Stage::Wait } else { Stage::Serve };
    let pause = Pause::new(stage, node.shards);
    let parts =
        Parts { config, disk, node: &node, shared: &shared, bells: &bells, peer, sockets: &sockets, pause: &pause };
    let crew = parts.start_shards(ports, &events, predecessor.is_some())?;

    let (catalog, nebd) = match (&mut predecessor, catalog) {
        (None, Some(catalog)) => {
            let nebd = prepared.map(|prepared| prepared.start(node.shards, &bells));
            crew.go(Vec::new(), &catalog.shared(), nebd.as_ref().map(|n| &n.0.server));
            (catalog, nebd)
        }
        (Some(predecessor), _) => predecessor.succeed(&parts, &crew, &happened)?,
        (None, None) => anyhow::bail!("no catalog"),
    };
    let (nebd, nebd_lock) = nebd.unzip();
    if let Some(setup) = &nebd {
        show_nebd(&shared, &setup.server);
    }
    let (gate, volumes) = (catalog.gate(), catalog.shared());
    let nebd_server = nebd.as_ref().map(|setup| Arc::clone(&setup.server));
    let control = ControlSetup {
        socket: config.ctl_socket(),
        links,
        catalog,
        peer: peer.0,
        chunk_size: node.chunk_size,
        about: about(config, disk, &node, peer),
        set_log,
        nebd,
        upgrade: {
            let events = events.clone();
            Box::new(move |order| events.send(Event::Upgrade(order)).is_ok())
        },
    };
    let ctl_socket = config.ctl_socket();
    let (serving, confirmed) = channel::<()>();
    std::thread::Builder::new().name("control".into()).spawn(move || {
        if confirmed.recv().is_err() {
            return; // the predecessor goes on, and needs the name of its socket
        }
        if let Err(error) = server::run(control) {
            tracing::error!(%error, "the command socket is not served");
        }
    })?;
    let data = config.data.as_deref().map_or_else(|| "none".into(), Path::to_string_lossy);
    tracing::info!(listen = %sockets.rpc_address, %data, shards = node.shards, "serving");
    if let Some(predecessor) = predecessor {
        predecessor.confirm(config, disk, nebd_lock.as_ref())?;
    }
    let _ = serving.send(()); // a thread that has ended has said so

    let mut server =
        Server { parts, crew, gate, volumes, nebd: nebd_server, nebd_lock, events, happened, later: VecDeque::new() };
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
    nebd: Option<Arc<NebdServer>>,
    nebd_lock: Option<nebd::Lock>,
    events: Sender<Event>,
    happened: Receiver<Event>,
    /// What happened meanwhile.
    later: VecDeque<Event>,
}

impl Server<'_> {
    /// Wait for the end, and bring it about in good order.
    fn supervise(&mut self) -> End {
        let shards = self.parts.node.shards;
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

/// What does not depend on whether there is a disk.
struct Node {
    shards: u16,
    chunk_size: u32,
    /// Identity of the disk, or a number of this life.
    id: [u8; 16],
}

impl Node {
    fn new(config: &Config, disk: Option<&Disk>) -> anyhow::Result<Self> {
        let Some(Disk { layout, .. }) = disk else {
            let cores = std::thread::available_parallelism().map_or(1, |n| (n.get() - 1).clamp(1, 256) as u16);
            let shards = if config.export_shards == 0 { cores } else { config.export_shards };
            return Ok(Self { shards, chunk_size: CHUNK_BYTES_MAX as u32, id: drawn() });
        };
        config.check_disk(layout.chunk_size)?;
        Ok(Self { shards: layout.shards, chunk_size: layout.chunk_size, id: layout.uuid })
    }
}

fn drawn<const BYTES: usize>() -> [u8; BYTES] {
    let mut drawn = [0; BYTES];
    let _ = rustix::rand::getrandom(&mut drawn, rustix::rand::GetRandomFlags::empty());
    drawn
}

struct Parts<'a> {
    config: &'a Config,
    disk: Option<&'a Disk>,
    node: &'a Node,
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
    disk: Option<(Layout, Arc<ExtentPool>)>,
    setup: Setup,
    cpu: Option<usize>,
    begin: Receiver<Begin>,
    pause: Arc<Pause>,
}

impl Parts<'_> {
    /// Each time under a number of its own: what shards number by it is never numbered so again.
    /// `patient`: nothing waits for them yet, so that they may begin with all that takes long.
    fn start_shards(&self, ports: Vec<Port>, events: &Sender<Event>, patient: bool) -> anyhow::Result<Crew> {
        let shards = self.node.shards;
        let life = u64::from_le_bytes(drawn());
        let disk = self.disk.map(|disk| (disk.layout.clone(), ExtentPool::new(&disk.layout)));
        let arenas = |size: u64| -> anyhow::Result<Vec<Arc<Arena>>> {
            (0..shards).map(|_| Arena::new(size as usize).context("memory for buffers")).collect()
        };
        let payload = arenas(self.config.payload_buffers.0)?;
        let work = arenas(if disk.is_some() { self.config.work_buffers.0 } else { 1 << 20 })?;
        let all: Vec<Arc<Arena>> = payload.iter().chain(&work).cloned().collect();
        let touched = touch(all.clone(), patient, Arc::clone(self.shared))?;
        let cpus = cpus();
        let mut crew = Crew { threads: Vec::new(), begin: Vec::new() };
        for (number, (mailbox, port)) in (0..shards).zip(mesh(shards).into_iter().zip(ports)) {
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
                    files: self.disk.iter().map(|disk| disk.file.as_raw_fd()).collect(),
                    listeners: self.sockets.fds(),
                    arenas: all.clone(),
                    touched: Arc::clone(&touched),
                    entries: RING_ENTRIES,
                    recv_buffers: RECV_BUFFERS,
                    doorbells: Arc::clone(self.bells),
                },
                shard: self.shard_config(number, life),
                disk: disk.clone(),
                setup: self.setup(number, mailbox, port, arenas.clone(), life),
                arenas,
                cpu: self.config.pin_shards.then(|| cpus.get(n).copied()).flatten(),
            };
            let events = events.clone();
            let shared = Arc::clone(self.shared);
            let thread = std::thread::Builder::new().name(format!("shard-{number}"));
            crew.threads.push(thread.spawn(move || {
                let result = shard_thread(seed, &shared, &events);
                let _ = events.send(Event::Shard(number, result));
            })?);
        }
        Ok(crew)
    }

    fn ring_all(&self) {
        (0..self.node.shards).for_each(|shard| self.bells.ring(shard));
    }

    fn shard_config(&self, shard: u16, life: u64) -> shard::Config {
        shard::Config {
            shard,
            peer: self.peer.0,
            dirty_limit: self.config.dirty_limit.0 as usize,
            flush_age_ns: self.config.flush_age_ms.saturating_mul(1_000_000),
            election_ms: self.config.election_timeout_ms,
            snapshot_rate: self.config.snapshot_bytes_per_s.0 / u64::from(self.node.shards).max(1),
            trash_s: self.config.trash_expire_s,
            wall_s: wall_s(),
            seed: life.rotate_left(u32::from(shard)) ^ u64::from(shard) << 56,
        }
    }

    fn setup(&self, number: u16, mailbox: Mailbox, port: Port, arenas: Arenas, life: u64) -> Setup {
        let listeners = if number == 0 { self.sockets.listeners() } else { Vec::new() };
        Setup {
            listeners,
            shared: Arc::clone(self.shared),
            catalog: SharedCatalog::new(Catalog::default()), // comes with the order to begin, as does the next
            nebd: None,
            mailbox,
            control: Some(port),
            arenas,
            shards: self.node.shards,
            chunk_size: self.node.chunk_size,
            disk: self.node.id,
            cluster: self.config.cluster_id(),
            seed: life,
        }
    }
}

/// How often it is looked whether all is recovered; the pause between two arenas.
const TOUCH_PAUSE: Duration = Duration::from_millis(10);

/// Touch all of the buffers' memory, by and by, when a start that somebody waits for is over: where the kernel must first
/// make room for it, that may take a second. Whether it has been touched. (Else the registration with the rings does it.)
fn touch(arenas: Vec<Arc<Arena>>, by_registration: bool, shared: Arc<Shared>) -> std::io::Result<Arc<AtomicBool>> {
    let touched = Arc::new(AtomicBool::new(by_registration));
    if !by_registration {
        let done = Arc::clone(&touched);
        std::thread::Builder::new().name("memory".into()).spawn(move || {
            while !shared.is_loaded() {
                std::thread::sleep(TOUCH_PAUSE);
            }
            for arena in arenas {
                arena.populate();
                std::thread::sleep(TOUCH_PAUSE);
            }
            done.store(true, Ordering::Release);
        })?;
    }
    Ok(touched)
}

fn shard_thread(mut seed: Seed, shared: &Arc<Shared>, events: &Sender<Event>) -> Result<Left, String> {
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
    (seed.setup.catalog, seed.setup.nebd) = (begin.catalog, begin.nebd);
    let now = uring::clock();
    let core = match seed.disk {
        Some((layout, extents)) => {
            let shard = Shard::new(seed.shard, layout, seed.arenas, extents, Arc::clone(metrics), now);
            Core::from(shard.map_err(|e| e.to_string())?)
        }
        None => Diskless::new(seed.number, seed.arenas.payload).into(),
    };
    let mut reactor = Reactor::new(io, seed.number, core, seed.setup);
    reactor.take_part(seed.pause, begin.clients.into_iter().map(Client::handed).collect());
    while !reactor.finished() {
        reactor.turn();
        metrics.set(crate::metrics::Counter::Enters, counters.enters.load(Ordering::Relaxed));
    }
    match reactor.failure() {
        Some(failure) => Err(failure.to_string()),
        None if reactor.has_left() => Ok(Left::of(reactor.part())),
        None => Ok(Left::default()),
    }
}

/// Part2's variables on the pages. Curve's tools take the process's command line from there, too.
fn show_nebd(shared: &Arc<Shared>, server: &Arc<NebdServer>) {
    let server = Arc::clone(server);
    let (version, address) = (shared.info().version.clone(), shared.info().address());
    let command: Vec<String> = std::env::args().collect();
    let command = command.join(" ").replace('"', "'");
    shared.set_nebd_vars(Box::new(move |vars: &mut Vars| {
        server.vars(&version, &address, vars);
        vars.set("process_cmdline", Var::Text(command.clone()));
    }));
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
        config: shown.into_iter().flat_map(|(key, value)| flat(key, value)).collect(),
        process: ProcessStats::read,
    }
}

/// Keys of a section with its name before them.
fn flat(key: String, value: toml::Value) -> Vec<(String, String)> {
    match value {
        toml::Value::Table(section) => section.into_iter().flat_map(|(k, v)| flat(format!("{key}.{k}"), v)).collect(),
        plain => vec![(key, plain.to_string().trim_matches('"').to_owned())],
    }
}

fn about(config: &Config, disk: Option<&Disk>, node: &Node, peer: PeerId) -> serde_json::Value {
    let (slots, size) = disk.map_or((0, 0), |disk| (disk.layout.slot_count, disk.layout.size));
    serde_json::json!({
        "version": env!("CARGO_PKG_VERSION"), "pid": std::process::id(), "peer": peer.to_string(),
        "data": config.data, "nebd_socket": config.nebd.as_ref().map(|n| &n.socket),
        "nbd_socket": config.nbd_socket, "nbd_listen": config.nbd_listen,
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
