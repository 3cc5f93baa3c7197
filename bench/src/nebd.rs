//! `bench nebd`: the same load as `bench rpc`, on a volume that an NEBD server (part2) serves, through part1.
//!
//! open → fill → (warm-up, measured load) → final check over fresh connections → close. One client opens the volume and
//! keeps it alive; each phase has clients of its own, one per worker. Connections that break are part1's to mend: the
//! longest stall of a restart is the longest latency.

mod load;

use crate::engine::Check;
use crate::model::{ChunkAddr, Model, Survival};
use crate::observe::{Delta, Targets};
use crate::plan::{Geometry, Pace, Pattern, Rng, Source, parse_mix, parse_size};
use crate::report::{self, Report};
use crate::rpc::{OPEN_INFLIGHT_MAX, SECOND, SWEEP_DEPTH, SWEEP_SIZE, wait_until};
use crate::stamp::{BLOCK, mix};
use crate::state::State;
use crate::stats::Stats;
use anyhow::{Context, Result, bail};
use load::{Results, Setup};
use nebd::{Config, NebdClient, NebdFd, OpenFlags, block_on};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

/// The volume is looked at in pieces of this size; what a chunk is to `bench rpc`.
const PIECE: u64 = 16 << 20;

/// Options of `bench nebd`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The server's socket.
    #[arg(long, value_name = "PATH", required_unless_present = "conf", conflicts_with = "conf")]
    pub socket: Option<PathBuf>,
    /// Configuration file of the client, in place of `--socket` and `--lock-dir`.
    #[arg(long, value_name = "FILE")]
    pub conf: Option<PathBuf>,
    /// Folder of the lock files; only clients with the same one exclude each other. Default: the system's temporary
    /// folder.
    #[arg(long, value_name = "DIR")]
    pub lock_dir: Option<PathBuf>,
    /// Name of the volume, as part2 knows it.
    #[arg(long, value_name = "NAME")]
    pub file: String,
    /// Open with flags, as curve-nbd does: exclusive or not. Default: without, as QEMU does.
    #[arg(long, value_name = "BOOL")]
    pub exclusive: Option<bool>,
    /// Bytes used of the volume; default all.
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
    /// Workers (clients, each with a connection and a thread).
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
    /// Only read and judge what the state file says, and settle what was unanswered (after a crash).
    #[arg(long, requires = "state")]
    pub verify_only: bool,
    /// The volume was never written: with `--verify`, what this run did not write must be zeros.
    #[arg(long)]
    pub fresh: bool,
    /// Remember what was written here; an existing file is continued.
    #[arg(long, value_name = "FILE")]
    pub state: Option<PathBuf>,
    /// Write the whole span once before.
    #[arg(long)]
    pub fill: bool,
    /// Seconds without any answer after which open requests are left unanswered.
    #[arg(long, value_name = "SECONDS", default_value_t = 30.0)]
    pub give_up: f64,
    /// Seed of everything random.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Process of the server; the one that listens on the socket if not given.
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
    let mut session = Session::open(args)?;
    let report = session.run();
    // Whatever came of it, the server need not wait for keep-alives.
    let closed = block_on(session.opener.close(session.fd));
    let report = report?;
    closed.context("close")?;
    Ok(report)
}

struct Session<'a> {
    args: &'a Args,
    config: Config,
    opener: NebdClient,
    fd: NebdFd,
    geometries: Vec<Geometry>,
    read_percent: u32,
    state: State,
    models: Vec<Option<Model>>,
    progress: Arc<AtomicU64>,
}

impl<'a> Session<'a> {
    fn open(args: &'a Args) -> Result<Self> {
        if args.threads == 0 || args.depth == 0 || args.rate.is_some_and(|rate| !rate.is_finite() || rate <= 0.0) {
            bail!("--threads, --depth and --rate must be above 0");
        }
        let read_percent = parse_mix(&args.mix)?;
        let config = match (&args.conf, &args.socket) {
            (Some(conf), _) => Config::load(conf)?,
            (None, socket) => Config {
                server_address: socket.clone().context("--socket or --conf is needed")?,
                lock_dir: args.lock_dir.clone().unwrap_or_else(std::env::temp_dir),
                ..Config::default()
            },
        };
        let opener = NebdClient::new(config.clone()).context("start part1")?;
        let flags = args.exclusive.map(|exclusive| OpenFlags { exclusive });
        let fd = block_on(opener.open(&args.file, flags)).with_context(|| format!("open {}", args.file))?;
        let size = block_on(opener.file_size(fd)).context("size")?;
        let span = args.span.unwrap_or(size).min(size);
        let piece = span.min(PIECE) / args.bs.max(1) * args.bs;
        if args.bs == 0 || !args.bs.is_multiple_of(BLOCK as u64) || piece == 0 {
            bail!("--bs must be a multiple of 4096, and fit into 16 MiB and the --span");
        }
        let total = if span < PIECE { 1 } else { span / PIECE };
        let workers = (args.threads as u64).min(total);
        let place = |chunk| ChunkAddr { pool: 0, copyset: 0, chunk };
        let part = |worker: u64| (0..total).filter(|index| index % workers == worker).map(place).collect();
        let geometries: Vec<Geometry> =
            (0..workers).map(|worker| Geometry { chunks: part(worker), span: piece as u32 }).collect();
        let state = State::continued(args.state.as_deref(), args.verify_only, args.seed, args.fresh)?;
        let models = state.models(&geometries, args.verify || args.verify_only)?;
        Ok(Self { args, config, opener, fd, geometries, read_percent, state, models, progress: Arc::default() })
    }

    fn run(&mut self) -> Result<Report> {
        let mut side = Stats::default();
        if self.args.verify_only {
            let (stats, survival) = self.sweep(Check::Settle)?;
            self.save()?;
            return Ok(Report::check_only(stats, survival));
        }
        if self.args.fill {
            side.add_counts(self.fill()?);
        }
        let (load, seconds, delta) = self.load()?;
        if self.args.verify {
            let (stats, _) = self.sweep(Check::Judge)?;
            side.add_counts(stats);
        }
        self.save()?;
        Ok(Report::load(load, side, seconds, delta))
    }

    fn save(&mut self) -> Result<()> {
        let Some(path) = &self.args.state else { return Ok(()) };
        let models: Vec<Model> = self.models.iter_mut().filter_map(Option::take).collect();
        self.state.absorb(&models);
        self.state.save(path)
    }

    fn setup(&self, check: Check) -> Setup {
        let give_up = (self.args.give_up * SECOND as f64) as u64;
        Setup { check, measure_from: 0, stop_at: u64::MAX, give_up, ops: u64::MAX, inflight_max: usize::MAX }
    }

    /// Runs one phase on all workers; `during` runs on this thread meanwhile.
    fn phase<T>(
        &mut self,
        setup: &Setup,
        part: impl Fn(usize, &Geometry, Option<&Model>) -> (Source, Pace, u64),
        during: impl FnOnce(Instant, &AtomicBool) -> T,
    ) -> Result<(Results, T)> {
        self.progress.store(0, Ordering::Relaxed);
        let epoch = Instant::now();
        let mut workers = Vec::new();
        for (worker, geometry) in self.geometries.iter().enumerate() {
            let client = NebdClient::new(self.config.clone()).context("start part1")?;
            let model = self.models.get_mut(worker).and_then(Option::take);
            let (source, pace, ops) = part(worker, geometry, model.as_ref());
            let setup = Setup { ops, ..setup.clone() };
            let load = load::Load::new(setup, geometry.clone(), source, pace, model);
            workers.push(load::Worker::new(client, self.fd, epoch, load, Arc::clone(&self.progress)));
        }
        let running = AtomicBool::new(true);
        let (results, seen) = std::thread::scope(|scope| {
            let handles: Vec<_> = workers.into_iter().map(|worker| scope.spawn(move || worker.run())).collect();
            let running_ref = &running;
            let watcher = scope.spawn(move || {
                let results: Vec<_> = handles.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
                running_ref.store(false, Ordering::Release);
                results
            });
            let seen = during(epoch, &running);
            (watcher.join(), seen)
        });
        let mut all = Results::default();
        let results = results.map_err(|_| anyhow::anyhow!("a worker panicked"))?;
        for (slot, result) in self.models.iter_mut().zip(results) {
            let mut result = result.map_err(|_| anyhow::anyhow!("a worker panicked"))?;
            *slot = result.model.take();
            all.add(result);
        }
        Ok((all, seen))
    }

    fn fill(&mut self) -> Result<Stats> {
        let setup = self.setup(if self.args.verify { Check::Judge } else { Check::Off });
        let each = |part: &Geometry| part.chunks.len() as u64 * u64::from(part.span.div_ceil(SWEEP_SIZE));
        let total = self.geometries.iter().map(each).sum();
        let progress = Arc::clone(&self.progress);
        let (results, ()) = self.phase(
            &setup,
            |_, geometry, _| (Source::fill(geometry, SWEEP_SIZE), Pace::Closed(SWEEP_DEPTH), u64::MAX),
            |_, running| report::progress("fill", total, &progress, running),
        )?;
        complete("fill", results.stats)
    }

    /// Reads every block written, over fresh connections.
    fn sweep(&mut self, check: Check) -> Result<(Stats, Survival)> {
        let setup = self.setup(check);
        let progress = Arc::clone(&self.progress);
        let (results, ()) = self.phase(
            &setup,
            |_, geometry, model| (Source::written(geometry, model, SWEEP_SIZE), Pace::Closed(SWEEP_DEPTH), u64::MAX),
            |_, running| report::progress("check", 0, &progress, running),
        )?;
        Ok((complete("check", results.stats)?, results.survival))
    }

    fn load(&mut self) -> Result<(Stats, f64, Delta)> {
        let args = self.args;
        let (warmup, seconds) = if args.ops.is_some() { (0.0, f64::INFINITY) } else { (args.warmup, args.seconds) };
        let nanos = |seconds: f64| (seconds * SECOND as f64) as u64;
        let setup = Setup {
            measure_from: nanos(warmup),
            stop_at: nanos(warmup + seconds),
            inflight_max: if args.rate.is_some() { OPEN_INFLIGHT_MAX } else { usize::MAX },
            ..self.setup(if args.verify { Check::Judge } else { Check::Off })
        };
        let target = Targets::find_local(&self.config.server_address, args.server_pid, args.disk.as_deref());
        let (workers, read_percent) = (self.geometries.len(), self.read_percent);
        let (until, end) = (setup.measure_from, setup.stop_at);
        let start = |worker: usize, _: &Geometry, _: Option<&Model>| {
            let rng = Rng::new(args.seed ^ mix(worker as u64));
            let source = Source::Load { pattern: args.pattern, read_percent, size: args.bs as u32, cursor: 0, rng };
            let share = |total: usize| total / workers + usize::from(worker < total % workers);
            let pace =
                args.rate.map_or(Pace::Closed(share(args.depth).max(1)), |rate| Pace::open(rate / workers as f64));
            (source, pace, args.ops.map_or(u64::MAX, |ops| share(ops as usize) as u64))
        };
        let (results, delta) = self.phase(&setup, start, |epoch, running| {
            wait_until(epoch, until, running);
            let before = target.sample();
            wait_until(epoch, end, running);
            before.until(&target.sample())
        })?;
        let Results { stats, length, .. } = results;
        let measured = if args.ops.is_some() { stats.last_answer } else { length.min(end).saturating_sub(until) };
        Ok((stats, measured as f64 / SECOND as f64, delta))
    }
}

fn complete(phase: &str, stats: Stats) -> Result<Stats> {
    if stats.unanswered + stats.failed > 0 {
        bail!("{phase}: {} requests refused, {} unanswered: {:?}", stats.failed, stats.unanswered, stats.statuses);
    }
    Ok(stats)
}
