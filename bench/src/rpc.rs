//! `bench rpc`: load on a chunkserver's ChunkService, checked if asked, in phases.
//!
//! create → fill → (warm-up, measured load) → final check over fresh connections. Workers share nothing: each owns a
//! part of the chunks, its own connections and its own model.

use crate::driver;
use crate::engine::{Check, Config, Engine};
use crate::leaders::Leaders;
use crate::model::{ChunkAddr, Model, Survival};
use crate::observe::{Delta, Targets};
use crate::options::Load;
use crate::phase::{self, SWEEP_DEPTH, SWEEP_SIZE, complete};
use crate::plan::{Geometry, Pace, Source, parse_copysets, parse_size};
use crate::report::Report;
use crate::state::State;
use crate::stats::Stats;
use crate::{report, setup};
use anyhow::{Context, Result, bail};
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

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
    /// Connections per worker.
    #[arg(long, default_value_t = 1)]
    pub conns: usize,
    /// Stop when a connection breaks and leave what is open unanswered (for crash tests); no final check.
    #[arg(long)]
    pub until_disconnect: bool,
    /// Create the copysets, with the server or all `--peers` as their members, and wait for their leaders.
    #[arg(long)]
    pub create: bool,
    /// File version of writes.
    #[arg(long, default_value_t = 1)]
    pub sn: u64,
    /// First timeout of a request, in milliseconds; doubles up to 8000 (2000 with `--peers`).
    #[arg(long, value_name = "MS", default_value_t = 1000)]
    pub timeout: u64,
    /// The load.
    #[command(flatten)]
    pub load: Load,
}

/// Runs the command; the report says whether anything was wrong.
pub fn run(args: &Args) -> Result<Report> {
    let plan = Plan::check(args)?;
    let mut session = Session::open(&plan)?;
    let mut side = Stats::default();
    if plan.args.load.verify_only {
        let (stats, survival) = session.sweep(Check::Settle)?;
        session.save()?;
        return Ok(Report::check_only(stats, survival));
    }
    if plan.args.load.fill {
        side.add_counts(session.fill()?);
    }
    let (load, seconds, delta) = session.load()?;
    // A crash test's server is gone: its check comes after the restart.
    if plan.args.load.verify && !(plan.args.until_disconnect && load.disconnects > 0) {
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
        let read = args.load.check()?;
        if total == 0 || args.conns == 0 {
            bail!("--chunks and --conns must not be 0");
        }
        let span = (args.load.span.unwrap_or(total * args.chunk_size) / total).min(args.chunk_size);
        let span = u32::try_from(span / args.load.bs * args.load.bs).context("--chunk-size: 4 GiB or more")?;
        if span == 0 {
            bail!("--bs must fit into the --span of a chunk");
        }
        let place = |index: u64| {
            let (pool, copyset) = copysets.get((index % copysets.len() as u64) as usize).copied().unwrap_or_default();
            ChunkAddr { pool, copyset, chunk: args.first_chunk + index }
        };
        let workers = (args.load.threads as u64).min(total);
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
        let state = State::continued(args.load.state.as_deref(), args.load.verify_only, args.load.seed, fresh)?;
        let models = state.models(&plan.geometries, args.load.verify || args.load.verify_only)?;
        Ok(Self { plan, state, models, leaders, progress: Arc::default() })
    }

    fn save(&mut self) -> Result<()> {
        let Some(path) = &self.plan.args.load.state else { return Ok(()) };
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
            give_up: args.load.give_up_ns(),
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
        let mut engines = Vec::new();
        for (worker, geometry) in self.plan.geometries.iter().enumerate() {
            let model = self.models.get_mut(worker).and_then(Option::take);
            let (source, pace, ops) = part(worker, geometry, model.as_ref());
            let config = Config { ops, ..config.clone() };
            engines.push(Engine::new(config, geometry.clone(), self.leaders.clone(), source, pace, model));
        }
        let epoch = Instant::now();
        let (nodes, progress, conns) = (&self.plan.nodes[..], &self.progress, config.conns);
        let worker = |engine| move || driver::run(engine, nodes, conns, epoch, progress);
        let (results, seen) = phase::run(engines.into_iter().map(worker).collect(), |running| during(epoch, running))?;
        let (mut stats, mut survival, mut length) = (Stats::default(), Survival::default(), 0);
        for (slot, result) in self.models.iter_mut().zip(results) {
            let (engine, end) = result?;
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
        let config = self.config(self.plan.args.load.judging());
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
        complete("fill", stats)
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
        Ok((complete("check", stats)?, survival))
    }

    fn load(&mut self) -> Result<(Stats, f64, Delta)> {
        let args = &self.plan.args;
        let (from, until) = args.load.window();
        let config = Config {
            measure_from: from,
            stop_at: until,
            inflight_max: args.load.inflight_max(),
            until_disconnect: args.until_disconnect,
            ..self.config(args.load.judging())
        };
        let target = Targets::find(&self.plan.nodes, args.load.server_pid, args.load.disk.as_deref());
        let (workers, read_percent) = (self.plan.geometries.len(), self.plan.read_percent);
        let part = |worker: usize, _: &Geometry, _: Option<&Model>| args.load.part(worker, workers, read_percent);
        let (stats, _, length, delta) =
            self.phase(&config, part, |epoch, running| target.measure(epoch, (from, until), running))?;
        let seconds = args.load.measured(&stats, length);
        Ok((stats, seconds, delta))
    }
}
