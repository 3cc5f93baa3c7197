//! Part2 at start: its lock, its socket, what it has on record.

use crate::config::{Config, NebdConfig};
use crate::control::disk;
use crate::control::nebd::Setup;
use crate::io::uring::{Doorbells, clock};
use crate::nebd::conf;
use crate::nebd::executor::flags_of;
use crate::nebd::files::Known;
use crate::nebd::metafile::Metafile;
use crate::nebd::server::{Options, Server};
use crate::replace::beside;
use anyhow::{Context, bail};
use rustix::fs::{FlockOperation, flock};
use socket2::Socket;
use std::fs::{File, OpenOptions, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What must be in order before anything starts.
pub(super) struct Prepared {
    config: NebdConfig,
    metafile: Metafile,
    lock: Lock,
}

/// No other server, ours or the original, has this socket, while one lives; but for one that takes over.
pub(super) struct Lock(File);

/// The configuration, with what a `nebd-server.conf` says in the place of the section's own keys.
pub(super) fn resolve(config: &Config) -> anyhow::Result<Config> {
    Ok(Config { nebd: config.nebd.as_ref().map(effective).transpose()?, ..config.clone() })
}

/// The listening socket. From here on clients can connect, and wait.
pub(super) fn listen(path: &Path) -> anyhow::Result<Socket> {
    let socket = super::unix(path, false).with_context(|| format!("listen on {}", path.display()))?;
    // Whoever runs virtual machines connects as whoever he is.
    std::fs::set_permissions(path, Permissions::from_mode(0o777)).with_context(|| path.display().to_string())?;
    Ok(socket)
}

impl Prepared {
    /// Take the lock of the socket, waiting at most `wait` for a server that is ending, and read the metafile.
    pub(super) fn new(config: &Config, wait: Duration) -> anyhow::Result<Option<Self>> {
        Self::with_lock(config, FlockOperation::NonBlockingLockExclusive, wait, None)
    }

    /// The same, from a process that writes nothing more: either it has called [`Lock::share`], or it never had this
    /// socket, which has been locked for us.
    pub(super) fn join(config: &Config, lock: Option<Lock>) -> anyhow::Result<Option<Self>> {
        Self::with_lock(config, FlockOperation::NonBlockingLockShared, Duration::ZERO, lock)
    }

    fn with_lock(
        config: &Config,
        how: FlockOperation,
        wait: Duration,
        lock: Option<Lock>,
    ) -> anyhow::Result<Option<Self>> {
        let Some(config) = config.nebd.clone() else { return Ok(None) };
        let lock = lock.map_or_else(|| Lock::new(&config.socket, how, wait), Ok)?;
        let metafile = Metafile::open(&config.metafile)?;
        Ok(Some(Self { config, metafile, lock }))
    }

    /// Part2, and what its worker needs; files on record are being reopened from now on.
    pub(super) fn start(self, shards: u16, bells: &Arc<Doorbells>) -> (Setup, Lock) {
        let Self { config, metafile, lock } = self;
        let (send, work) = tokio::sync::mpsc::unbounded_channel();
        let bells = Arc::clone(bells);
        let known = metafile.records().iter().map(|record| {
            let flags = flags_of(&record.attributes).unwrap_or_default(); // reopening it says what is wrong with them
            Known { fd: record.fd, name: record.name.clone(), flags }
        });
        let options = Options {
            heartbeat_timeout_ns: config.heartbeat_timeout_s.saturating_mul(1_000_000_000),
            return_io_errors: config.return_io_errors,
        };
        let server = Server::new(
            options,
            known.collect(),
            shards,
            clock(),
            Box::new(move |work| drop(send.send(work))), // without a receiver the process is ending
            Box::new(move |shard| bells.ring(shard)),
        );
        (Setup { server, work, metafile, check_ms: config.heartbeat_check_ms }, lock)
    }
}

/// The section, or what a `nebd-server.conf` says in its place.
fn effective(nebd: &NebdConfig) -> anyhow::Result<NebdConfig> {
    let mut config = nebd.clone();
    if let Some(path) = &nebd.conf {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let conf = conf::parse(&text).with_context(|| path.display().to_string())?;
        (config.socket, config.metafile) = (conf.socket, conf.metafile);
        config.heartbeat_timeout_s = conf.heartbeat_timeout_s;
        config.heartbeat_check_ms = conf.heartbeat_check_ms;
        config.return_io_errors = conf.return_io_errors;
    }
    config.check()?;
    Ok(config)
}

impl Lock {
    fn new(socket: &Path, how: FlockOperation, wait: Duration) -> anyhow::Result<Self> {
        lock(&beside(socket, ".lock"), how, wait).map(Self)
    }

    /// Of a socket that the process we take over from does not have.
    pub(super) fn of_new(socket: &Path) -> anyhow::Result<Self> {
        Self::new(socket, FlockOperation::NonBlockingLockExclusive, Duration::ZERO)
    }

    /// Let the process that takes over have a share of it.
    pub(super) fn share(&self) -> std::io::Result<()> {
        Ok(flock(&self.0, FlockOperation::NonBlockingLockShared)?)
    }

    /// Have it alone again, waiting at most `wait` for the other process to be gone.
    pub(super) fn claim(&self, wait: Duration) -> std::io::Result<()> {
        disk::claim(&self.0, wait)
    }

    /// Another descriptor of it.
    pub(super) fn try_clone(&self) -> std::io::Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }
}

fn lock(path: &Path, how: FlockOperation, wait: Duration) -> anyhow::Result<File> {
    let shown = path.display();
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(path);
    let file = file.with_context(|| format!("NEBD: cannot open {shown}"))?;
    let until = Instant::now() + wait;
    loop {
        match flock(&file, how) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(rustix::io::Errno::WOULDBLOCK) => bail!("NEBD: another server has the socket ({shown} is locked)"),
            Err(error) => bail!("NEBD: cannot lock {shown}: {error}"),
        }
    }
}
