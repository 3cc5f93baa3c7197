//! `bench nebd`: the same load as `bench rpc`, on a volume that an NEBD server (part2) serves, through part1.
//!
//! open → fill → (warm-up, measured load) → final check over fresh connections → close. One client opens the volume and
//! keeps it alive; each phase has clients of its own, one per worker. Connections that break are part1's to mend: the
//! longest stall of a restart is the longest latency.

mod load;

use crate::engine::Check;
use crate::model::{ChunkAddr, Model, Survival};
use crate::observe::{Delta, Targets};
use crate::options::Load;
use crate::phase::{self, SWEEP_DEPTH, SWEEP_SIZE, complete};
use crate::plan::{Geometry, Pace, Source};
use crate::report::{self, Report};
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
    /// The volume was never written: with `--verify`, what this run did not write must be zeros.
    #[arg(long)]
    pub fresh: bool,
    /// The load.
    #[command(flatten)]
    pub load: Load,
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
        let read_percent = args.load.check()?;
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
        let span = args.load.span.unwrap_or(size).min(size);
        let piece = span.min(PIECE) / args.load.bs * args.load.bs;
        if piece == 0 {
            bail!("--bs must fit into 16 MiB and the --span");
        }
        let total = if span < PIECE { 1 } else { span / PIECE };
        let workers = (args.load.threads as u64).min(total);
        let place = |chunk| ChunkAddr { pool: 0, copyset: 0, chunk };
        let part = |worker: u64| (0..total).filter(|index| index % workers == worker).map(place).collect();
        let geometries: Vec<Geometry> =
            (0..workers).map(|worker| Geometry { chunks: part(worker), span: piece as u32 }).collect();
        let state = State::continued(args.load.state.as_deref(), args.load.verify_only, args.load.seed, args.fresh)?;
        let models = state.models(&geometries, args.load.verify || args.load.verify_only)?;
        Ok(Self { args, config, opener, fd, geometries, read_percent, state, models, progress: Arc::default() })
    }

    fn run(&mut self) -> Result<Report> {
        let mut side = Stats::default();
        if self.args.load.verify_only {
            let (stats, survival) = self.sweep(Check::Settle)?;
            self.save()?;
            return Ok(Report::check_only(stats, survival));
        }
        if self.args.load.fill {
            side.add_counts(self.fill()?);
        }
        let (load, seconds, delta) = self.load()?;
        if self.args.load.verify {
            let (stats, _) = self.sweep(Check::Judge)?;
            side.add_counts(stats);
        }
        self.save()?;
        Ok(Report::load(load, side, seconds, delta))
    }

    fn save(&mut self) -> Result<()> {
        let Some(path) = &self.args.load.state else { return Ok(()) };
        let models: Vec<Model> = self.models.iter_mut().filter_map(Option::take).collect();
        self.state.absorb(&models);
        self.state.save(path)
    }

    fn setup(&self, check: Check) -> Setup {
        let give_up = self.args.load.give_up_ns();
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
        let (results, seen) =
            phase::run(workers.into_iter().map(|worker| move || worker.run()).collect(), |running| {
                during(epoch, running)
            })?;
        let mut all = Results::default();
        for (slot, mut result) in self.models.iter_mut().zip(results) {
            *slot = result.model.take();
            all.add(result);
        }
        Ok((all, seen))
    }

    fn fill(&mut self) -> Result<Stats> {
        let setup = self.setup(self.args.load.judging());
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
        let (from, until) = args.load.window();
        let setup = Setup {
            measure_from: from,
            stop_at: until,
            inflight_max: args.load.inflight_max(),
            ..self.setup(args.load.judging())
        };
        let target = Targets::find_local(&self.config.server_address, args.load.server_pid, args.load.disk.as_deref());
        let (workers, read_percent) = (self.geometries.len(), self.read_percent);
        let part = |worker: usize, _: &Geometry, _: Option<&Model>| args.load.part(worker, workers, read_percent);
        let (results, delta) =
            self.phase(&setup, part, |epoch, running| target.measure(epoch, (from, until), running))?;
        let Results { stats, length, .. } = results;
        let seconds = args.load.measured(&stats, length);
        Ok((stats, seconds, delta))
    }
}
