//! `bench rpc`: load on a chunkserver's ChunkService, checked if asked, in phases.
//!
//! create → fill → (warm-up, measured load) → final check over fresh connections. Workers share nothing: each owns a
//! part of the chunks, its own connections and its own model.

use crate::driver;
use crate::engine::{Check, Config, Engine};
use crate::leaders::Leaders;
use crate::model::{ChunkAddr, Model, Survival};
use crate::observe::{Delta, Targets};
use crate::plan::{Geometry, Pace, Pattern, Rng, Source, parse_copysets, parse_mix, parse_size};
use crate::report::Report;
use crate::stamp::{BLOCK, mix};
use crate::state::State;
use crate::stats::Stats;
use crate::{report, setup};
use anyhow::{Context, Result, bail};
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

pub(crate) const SECOND: u64 = 1_000_000_000;
/// An open loop stops starting (and lets latency show it) beyond this many unanswered requests per worker.
pub(crate) const OPEN_INFLIGHT_MAX: usize = 4096;
/// Requests of this size fill and check: the largest a C++ client sends.
pub(crate) const SWEEP_SIZE: u32 = 64 << 10;
pub(crate) const SWEEP_DEPTH: usize = 64;

/// Options of `bench rpc`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The chunkserver's RPC address.
    #[arg(long, value_name = "HOST:PORT", required_unless_present = "peers", conflicts_with = "peers")]
    pub addr: Option<String>,
    /// RPC addresses of several chunkservers, separated by commas: each request goes to the one that leads its copyset,
    /// as redirects and silence tell.
    #[arg(long, value_name = "IP:PORT,...", value_delimiter = ',')]
    pub peers: Vec<SocketAddr>,
    /// Copysets to use: POOL:FIRST-LAST, several separated by commas.
    #[arg(long, value_name = "LIST", default_value = "1:1-8")]
    pub copysets: String,
    /// Chunks per copyset.
    #[arg(long, default_value_t = 4)]
    pub chunks: u64,
    /// Id of the first chunk; they count up from there.
    #[arg(long, value_name = "ID", default_value_t = 1)]
    pub first_chunk: u64,
    /// Chunk size of the server.
    #[arg(long, value_parser = parse_size, default_value = "16MiB")]
    pub chunk_size: u64,
    /// Bytes used of all chunks together; default all.
    #[arg(long, value_parser = parse_size)]
    pub span: Option<u64>,
    /// Bytes per request.
    #[arg(long, value_parser = parse_size, default_value = "4k")]
    pub bs: u64,
    /// Closed loop: requests in flight, all workers together.
    #[arg(long, default_value_t = 64, conflicts_with = "rate")]
    pub depth: usize,
    /// Open loop: requests per second; latency counts from the intended start.
    #[arg(long, value_name = "IOPS")]
    pub rate: Option<f64>,
    /// Connections per worker.
    #[arg(long, default_value_t = 1)]
    pub conns: usize,
    /// Workers (threads).
    #[arg(long, default_value_t = 1)]
    pub threads: usize,
    /// Percent of reads and of writes, as READ:WRITE.
    #[arg(long, default_value = "0:100")]
    pub mix: String,
    /// Order of requests.
    #[arg(long, value_enum, default_value = "random")]
    pub pattern: Pattern,
    /// Seconds before measuring starts.
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    pub warmup: f64,
    /// Seconds measured.
    #[arg(long, default_value_t = 10.0)]
    pub seconds: f64,
    /// Measure this many requests instead (no warm-up).
    #[arg(long)]
    pub ops: Option<u64>,
    /// Stamp every block written, judge every block read, and read everything written at the end.
    #[arg(long)]
    pub verify: bool,
    /// Only read and judge what the state file says, and settle what was unanswered (after a restart of the server).
    #[arg(long, requires = "state")]
    pub verify_only: bool,
    /// Remember what was written here; an existing file is continued.
    #[arg(long, value_name = "FILE")]
    pub state: Option<PathBuf>,
    /// Stop when a connection breaks and leave what is open unanswered (for crash tests); no final check.
    #[arg(long)]
    pub until_disconnect: bool,
    /// Write the whole span once before.
    #[arg(long)]
    pub fill: bool,
    /// Create the copysets, with the server or all `--peers` as their members, and wait for their leaders.
    #[arg(long)]
    pub create: bool,
    /// File version of writes.
    #[arg(long, default_value_t = 1)]
    pub sn: u64,
    /// First timeout of a request, in milliseconds; doubles up to 8000 (2000 with `--peers`).
    #[arg(long, value_name = "MS", default_value_t = 1000)]
    pub timeout: u64,
    /// Seconds without any answer after which open requests are left unanswered.
    #[arg(long, value_name = "SECONDS", default_value_t = 30.0)]
    pub give_up: f64,
    /// Seed of everything random.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Process of the server; found by its port if it is local.
    #[arg(long, value_name = "PID")]
    pub server_pid: Option<u32>,
    /// A path on the server's disk, to count its device writes.
    #[arg(long, value_name = "PATH")]
    pub disk: Option<PathBuf>,
    /// Write the results to this file as JSON.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// Runs the command; the report says whether anything was wrong.
pub fn run(args: &Args) -> Result<Report> {
    let plan = Plan::check(args)?;
    let mut session = Session::open(&plan)?;
    let mut side = Stats::default();
    if plan.args.verify_only {
        let (stats, survival) = session.sweep(Check::Settle)?;
        session.save()?;
        return Ok(Report::check_only(stats, survival));
    }
    if plan.args.fill {
        side.add_counts(session.fill()?);
    }
    let (load, seconds, delta) = session.load()?;
    // A crash test's server is gone: its check comes after the restart.
    if plan.args.verify && !(plan.args.until_disconnect && load.disconnects > 0) {
        let (stats, _) = session.sweep(Check::Judge)?;
        side.add_counts(stats);
    }
    session.save()?;
    Ok(Report::load(load, side, seconds, delta))
}

/// Options that fit together.
struct Plan {
    args: Args,
    nodes: Vec<SocketAddr>,
    copysets: Vec<(u32, u32)>,
    geometries: Vec<Geometry>,
    read_percent: u32,
}

impl Plan {
    fn check(args: &Args) -> Result<Self> {
        let nodes = match &args.addr {
            None => args.peers.clone(),
            Some(name) => {
                let addr = name.to_socket_addrs().with_context(|| name.clone())?.next();
                vec![addr.with_context(|| format!("{name}: no address"))?]
            }
        };
        let copysets = parse_copysets(&args.copysets)?;
        let total = copysets.len() as u64 * args.chunks;
        if total == 0 || args.threads == 0 || args.conns == 0 || args.depth == 0 {
            bail!("--chunks, --threads, --conns and --depth must not be 0");
        }
        let span = (args.span.unwrap_or(total * args.chunk_size) / total).min(args.chunk_size);
        let span = u32::try_from(span / args.bs.max(1) * args.bs).context("--chunk-size: 4 GiB or more")?;
        if args.bs == 0 || !args.bs.is_multiple_of(BLOCK as u64) || span == 0 {
            bail!("--bs must be a multiple of 4096 and fit into the --span of a chunk");
        }
        if args.rate.is_some_and(|rate| !rate.is_finite() || rate <= 0.0) {
            bail!("--rate must be above 0");
        }
        let read = parse_mix(&args.mix)?;
        let place = |index: u64| {
            let (pool, copyset) = copysets.get((index % copysets.len() as u64) as usize).copied().unwrap_or_default();
            ChunkAddr { pool, copyset, chunk: args.first_chunk + index }
        };
        let workers = (args.threads as u64).min(total);
        let part = |worker: u64| (0..total).filter(|index| index % workers == worker).map(place).collect();
        let geometries = (0..workers).map(|worker| Geometry { chunks: part(worker), span }).collect();
        Ok(Self { args: args.clone(), nodes, copysets, geometries, read_percent: read })
    }
}

/// What lives across phases.
struct Session<'a> {
    plan: &'a Plan,
    state: State,
    models: Vec<Option<Model>>,
    leaders: Leaders,
    progress: Arc<AtomicU64>,
}

impl<'a> Session<'a> {
    fn open(plan: &'a Plan) -> Result<Self> {
        let args = &plan.args;
        let mut fresh = false;
        let mut leaders = Leaders::new(plan.nodes.clone());
        if args.create {
            fresh = setup::create_copysets(&plan.nodes, &plan.copysets)?;
            setup::wait_for_leaders(&mut leaders, &plan.copysets)?;
        } else if plan.nodes.len() > 1 {
            // Whom nobody knows yet, redirects will tell.
            setup::find_leaders(&mut leaders, &mut plan.copysets.clone())?;
        }
        let state = State::continued(args.state.as_deref(), args.verify_only, args.seed, fresh)?;
        let models = state.models(&plan.geometries, args.verify || args.verify_only)?;
        Ok(Self { plan, state, models, leaders, progress: Arc::default() })
    }

    fn save(&mut self) -> Result<()> {
        let Some(path) = &self.plan.args.state else { return Ok(()) };
        let models: Vec<Model> = self.models.iter_mut().filter_map(Option::take).collect();
        self.state.absorb(&models);
        self.state.save(path)
    }

    fn config(&self, check: Check) -> Config {
        let args = &self.plan.args;
        Config {
            check,
            conns: args.conns,
            sn: args.sn,
            timeout: args.timeout.max(1) * 1_000_000,
            measure_from: 0,
            stop_at: u64::MAX,
            give_up: (args.give_up * SECOND as f64) as u64,
            ops: u64::MAX,
            inflight_max: usize::MAX,
            until_disconnect: false,
        }
    }

    /// Runs one phase on all workers; `during` runs on this thread meanwhile.
    fn phase<T>(
        &mut self,
        config: &Config,
        part: impl Fn(usize, &Geometry, Option<&Model>) -> (Source, Pace, u64),
        during: impl FnOnce(Instant, &AtomicBool) -> T,
    ) -> Result<(Stats, Survival, u64, T)> {
        self.progress.store(0, Ordering::Relaxed);
        let running = AtomicBool::new(true);
        let mut engines = Vec::new();
        for (worker, geometry) in self.plan.geometries.iter().enumerate() {
            let model = self.models.get_mut(worker).and_then(Option::take);
            let (source, pace, ops) = part(worker, geometry, model.as_ref());
            let config = Config { ops, ..config.clone() };
            engines.push(Engine::new(config, geometry.clone(), self.leaders.clone(), source, pace, model));
        }
        let epoch = Instant::now();
        let (nodes, progress, conns) = (&self.plan.nodes[..], &self.progress, config.conns);
        let (results, seen) = std::thread::scope(|scope| {
            let start = |engine| scope.spawn(move || driver::run(engine, nodes, conns, epoch, progress));
            let handles: Vec<_> = engines.into_iter().map(start).collect();
            let running_ref = &running;
            let watcher = scope.spawn(move || {
                let results: Vec<_> = handles.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
                running_ref.store(false, Ordering::Release);
                results
            });
            let seen = during(epoch, &running);
            (watcher.join(), seen)
        });
        let (mut stats, mut survival, mut length) = (Stats::default(), Survival::default(), 0);
        let results = results.map_err(|_| anyhow::anyhow!("a worker panicked"))?;
        for (slot, result) in self.models.iter_mut().zip(results) {
            let (engine, end) = result.map_err(|_| anyhow::anyhow!("a worker panicked"))??;
            self.leaders.clone_from(engine.leaders());
            let (part, model, survived) = engine.into_results(end);
            *slot = model;
            stats.add(part);
            survival.survived += survived.survived;
            survival.vanished += survived.vanished;
            survival.hidden += survived.hidden;
            length = length.max(end);
        }
        Ok((stats, survival, length, seen))
    }

    fn fill(&mut self) -> Result<Stats> {
        let check = if self.plan.args.verify { Check::Judge } else { Check::Off };
        let config = self.config(check);
        let total: u64 = self
            .plan
            .geometries
            .iter()
            .map(|part| part.chunks.len() as u64 * u64::from(part.span.div_ceil(SWEEP_SIZE)))
            .sum();
        let progress = Arc::clone(&self.progress);
        let (stats, _, _, ()) = self.phase(
            &config,
            |_, geometry, _| (Source::fill(geometry, SWEEP_SIZE), Pace::Closed(SWEEP_DEPTH), u64::MAX),
            |_, running| report::progress("fill", total, &progress, running),
        )?;
        if stats.unanswered + stats.failed > 0 {
            bail!("fill: {} requests refused, {} unanswered: {:?}", stats.failed, stats.unanswered, stats.statuses);
        }
        Ok(stats)
    }

    /// Reads every block written, over fresh connections.
    fn sweep(&mut self, check: Check) -> Result<(Stats, Survival)> {
        let config = self.config(check);
        let progress = Arc::clone(&self.progress);
        let (stats, survival, _, ()) = self.phase(
            &config,
            |_, geometry, model| (Source::written(geometry, model, SWEEP_SIZE), Pace::Closed(SWEEP_DEPTH), u64::MAX),
            |_, running| report::progress("check", 0, &progress, running),
        )?;
        if stats.unanswered + stats.failed > 0 {
            bail!("check: {} reads refused, {} unanswered: {:?}", stats.failed, stats.unanswered, stats.statuses);
        }
        Ok((stats, survival))
    }

    fn load(&mut self) -> Result<(Stats, f64, Delta)> {
        let args = &self.plan.args;
        let (warmup, seconds) = if args.ops.is_some() { (0.0, f64::INFINITY) } else { (args.warmup, args.seconds) };
        let nanos = |seconds: f64| (seconds * SECOND as f64) as u64;
        let config = Config {
            measure_from: nanos(warmup),
            stop_at: nanos(warmup + seconds),
            inflight_max: if args.rate.is_some() { OPEN_INFLIGHT_MAX } else { usize::MAX },
            until_disconnect: args.until_disconnect,
            ..self.config(if args.verify { Check::Judge } else { Check::Off })
        };
        let target = Targets::find(&self.plan.nodes, args.server_pid, args.disk.as_deref());
        let workers = self.plan.geometries.len();
        let read_percent = self.plan.read_percent;
        let (until, end) = (config.measure_from, config.stop_at);
        let start = |worker: usize, _: &Geometry, _: Option<&Model>| {
            let rng = Rng::new(args.seed ^ mix(worker as u64));
            let size = args.bs as u32;
            let source = Source::Load { pattern: args.pattern, read_percent, size, cursor: 0, rng };
            let share = |total: usize| total / workers + usize::from(worker < total % workers);
            let pace =
                args.rate.map_or(Pace::Closed(share(args.depth).max(1)), |rate| Pace::open(rate / workers as f64));
            (source, pace, args.ops.map_or(u64::MAX, |ops| share(ops as usize) as u64))
        };
        let (stats, _, length, delta) = self.phase(&config, start, |epoch, running| {
            wait_until(epoch, until, running);
            let before = target.sample();
            wait_until(epoch, end, running);
            before.until(&target.sample())
        })?;
        let measured = if args.ops.is_some() { stats.last_answer } else { length.min(end).saturating_sub(until) };
        Ok((stats, measured as f64 / SECOND as f64, delta))
    }
}

/// Sleeps until `nanos` after `epoch`, or until the workers are done.
pub(crate) fn wait_until(epoch: Instant, nanos: u64, running: &AtomicBool) {
    while running.load(Ordering::Acquire) {
        let left = Duration::from_nanos(nanos).saturating_sub(epoch.elapsed());
        if left.is_zero() {
            return;
        }
        std::thread::sleep(left.min(Duration::from_millis(20)));
    }
}
