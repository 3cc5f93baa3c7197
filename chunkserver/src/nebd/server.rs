//! What all shards and the worker share of part2: the table of files, the clients heard of, and who is told what.
//!
//! A shard takes the lock for the few steps a request costs, never over I/O. An answer for a request of another shard
//! goes into that shard's inbox. Slow work goes to the worker, which is not a shard.

use super::executor::{Handle, OpenFlags};
use super::files::{Closed, Effect, Files, Known, NebdFd, Task};
use super::stat::{FileStat, IoKindStat};
use crate::io::Instant;
use crate::limits::{NEBD_CLIENTS_MAX, NEBD_VERSION_BYTES_MAX};
use crate::metrics::text::{Var, Vars, underscored};
use crate::shard::request::Origin;
use smallvec::SmallVec;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How it behaves.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// A file without heartbeat for so long is closed, nanoseconds.
    pub heartbeat_timeout_ns: u64,
    /// Answer kNoOK when an I/O failed; otherwise it stays unanswered and is tried again.
    pub return_io_errors: bool,
}

/// Slow work.
#[derive(Debug)]
pub enum Work {
    /// On a file; ends with [`Server::opened`] or [`Server::closed`].
    File(Task),
    /// Make a file larger; ends with [`Server::extended`].
    Extend {
        /// Who asked.
        whom: Origin,
        /// Its name.
        name: String,
        /// New size, bytes.
        size: u64,
    },
}

/// What became of a request.
#[derive(Debug)]
pub enum Answer {
    /// It may run, with this; then [`Server::end`].
    Go(Arc<dyn Handle>),
    /// The file is open under this number.
    Opened(NebdFd),
    /// Done.
    Done,
    /// kNoOK.
    Refused,
}

/// An [`Answer`] and whose it is.
#[derive(Debug)]
pub struct Reply {
    /// Who asked.
    pub whom: Origin,
    /// What became of it.
    pub answer: Answer,
}

#[derive(Debug)]
struct Client {
    version: String,
    seen: Instant,
}

#[derive(Debug)]
struct Table {
    files: Files<Arc<dyn Handle>>,
    clients: BTreeMap<i32, Client>,
    ticked: Instant,
    /// An empty list, so that none is made for each request.
    effects: Vec<Effect<Arc<dyn Handle>>>,
}

#[derive(Debug, Default)]
struct Inbox {
    full: AtomicBool,
    replies: Mutex<Vec<Reply>>,
}

/// Shards to be woken when the lock is free again.
type Wakes = SmallVec<[u16; 4]>;
/// Gives work to the worker.
pub type SendWork = Box<dyn Fn(Work) + Send + Sync>;
/// Wakes a shard.
pub type Wake = Box<dyn Fn(u16) + Send + Sync>;

/// Part2.
pub struct Server {
    options: Options,
    table: Mutex<Table>,
    inboxes: Box<[Inbox]>,
    send: SendWork,
    wake: Wake,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("nebd::Server").field("options", &self.options).finish_non_exhaustive()
    }
}

impl Server {
    /// For `shards` shards, with the files on record; their reopening is given to the worker at once.
    #[must_use]
    pub fn new(
        options: Options,
        known: Vec<Known>,
        shards: u16,
        now: Instant,
        send: SendWork,
        wake: Wake,
    ) -> Arc<Self> {
        let mut effects = Vec::new();
        let files = Files::new(known, options.heartbeat_timeout_ns, now, &mut effects);
        for effect in effects.drain(..) {
            if let Effect::Task(task) = effect {
                send(Work::File(task));
            }
        }
        let table = Mutex::new(Table { files, clients: BTreeMap::new(), ticked: now, effects });
        let inboxes = (0..shards).map(|_| Inbox::default()).collect();
        Arc::new(Self { options, table, inboxes, send, wake })
    }

    /// How it behaves.
    #[must_use]
    pub fn options(&self) -> Options {
        self.options
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Let the table do something and hand out what comes of it: to `out` what is `shard`'s.
    fn step(
        &self,
        shard: Option<u16>,
        out: &mut Vec<Reply>,
        step: impl FnOnce(&mut Files<Arc<dyn Handle>>, &mut Vec<Effect<Arc<dyn Handle>>>),
    ) {
        let mut wakes = Wakes::new();
        let mut table = self.table();
        let mut effects = std::mem::take(&mut table.effects);
        step(&mut table.files, &mut effects);
        for effect in effects.drain(..) {
            let (whom, answer) = match effect {
                Effect::Task(task) => {
                    (self.send)(Work::File(task));
                    continue;
                }
                Effect::Go { whom, handle } => (whom, Answer::Go(handle)),
                Effect::Opened { whom, fd } => (whom, Answer::Opened(fd)),
                Effect::Done(whom) => (whom, Answer::Done),
                Effect::Refused(whom) => (whom, Answer::Refused),
            };
            let reply = Reply { whom, answer };
            if Some(whom.shard) == shard { out.push(reply) } else { self.post(reply, &mut wakes) }
        }
        table.effects = effects;
        drop(table);
        wakes.into_iter().for_each(|shard| (self.wake)(shard));
    }

    fn post(&self, reply: Reply, wakes: &mut Wakes) {
        let shard = reply.whom.shard;
        let Some(inbox) = self.inboxes.get(usize::from(shard)) else { return };
        inbox.replies.lock().unwrap_or_else(PoisonError::into_inner).push(reply);
        inbox.full.store(true, Ordering::Release);
        if !wakes.contains(&shard) {
            wakes.push(shard);
        }
    }

    /// What others left for this shard.
    pub fn receive(&self, shard: u16, out: &mut Vec<Reply>) {
        let Some(inbox) = self.inboxes.get(usize::from(shard)) else { return };
        if inbox.full.load(Ordering::Acquire) {
            let mut replies = inbox.replies.lock().unwrap_or_else(PoisonError::into_inner);
            inbox.full.store(false, Ordering::Release);
            out.append(&mut replies);
        }
    }

    /// The worker has no task on a file.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.table().files.is_idle()
    }

    /// OpenFile.
    pub fn open(&self, name: &str, flags: OpenFlags, whom: Origin, now: Instant, out: &mut Vec<Reply>) {
        self.step(Some(whom.shard), out, |files, effects| files.open(name, flags, whom, now, effects));
    }
    /// CloseFile.
    pub fn close(&self, fd: NebdFd, whom: Origin, now: Instant, out: &mut Vec<Reply>) {
        self.step(Some(whom.shard), out, |files, effects| files.close(fd, whom, now, effects));
    }
    /// Any other request.
    pub fn request(&self, fd: NebdFd, whom: Origin, now: Instant, out: &mut Vec<Reply>) {
        self.step(Some(whom.shard), out, |files, effects| files.request(fd, whom, now, effects));
    }
    /// The connection of a running request broke.
    pub fn orphaned(&self, fd: NebdFd) {
        self.table().files.orphaned(fd);
    }
    /// A running request of `shard` ended; `io`: what is to be counted (kind, bytes, nanoseconds, success).
    pub fn end(
        &self,
        shard: u16,
        fd: NebdFd,
        orphan: bool,
        io: Option<(IoKindStat, u64, u64, bool)>,
        now: Instant,
        out: &mut Vec<Reply>,
    ) {
        self.step(Some(shard), out, |files, effects| {
            if let Some((kind, bytes, ns, ok)) = io {
                files.count(fd, kind, bytes, ns, ok);
            }
            files.end(fd, orphan, now, effects);
        });
    }

    /// ResizeFile of a running request.
    pub fn extend(&self, fd: NebdFd, size: u64, whom: Origin) {
        let name = self.table().files.name_of(fd).map(str::to_owned);
        match name {
            Some(name) => (self.send)(Work::Extend { whom, name, size }),
            None => self.extended(whom, false),
        }
    }

    /// KeepAlive. False if a file is not known.
    pub fn keep_alive(&self, pid: i32, version: &str, fds: impl Iterator<Item = NebdFd>, now: Instant) -> bool {
        let mut table = self.table();
        let known = table.clients.contains_key(&pid);
        if !known && table.clients.len() >= NEBD_CLIENTS_MAX {
            let oldest = table.clients.iter().min_by_key(|(_, c)| c.seen).map(|(&pid, _)| pid);
            oldest.and_then(|pid| table.clients.remove(&pid));
        }
        // It is shown inside a JSON text that nobody escapes.
        let plain = |c: &char| c.is_ascii_graphic() && *c != '"' && *c != '\\';
        let version = version.chars().filter(plain).take(NEBD_VERSION_BYTES_MAX).collect();
        table.clients.insert(pid, Client { version, seen: now });
        table.files.alive(fds, now)
    }

    /// The worker opened a file, or could not.
    pub fn opened(&self, fd: NebdFd, handle: Option<Arc<dyn Handle>>, now: Instant) {
        self.step(None, &mut Vec::new(), |files, effects| files.opened(fd, handle, now, effects));
    }
    /// The worker closed a file, or could not.
    pub fn closed(&self, fd: NebdFd, how: Closed, now: Instant) {
        self.step(None, &mut Vec::new(), |files, effects| files.closed(fd, how, now, effects));
    }
    /// The worker made a file larger, or could not.
    pub fn extended(&self, whom: Origin, done: bool) {
        let mut wakes = Wakes::new();
        self.post(Reply { whom, answer: if done { Answer::Done } else { Answer::Refused } }, &mut wakes);
        wakes.into_iter().for_each(|shard| (self.wake)(shard));
    }

    /// Close files and forget clients that were silent for too long.
    pub fn expire(&self, now: Instant) {
        let timeout_ns = self.options.heartbeat_timeout_ns;
        self.table().clients.retain(|_, client| now.since_ns(client.seen) <= timeout_ns);
        let mut silent = Vec::new();
        self.step(None, &mut Vec::new(), |files, effects| silent = files.expire(now, effects));
        for (fd, name) in silent {
            tracing::info!(fd, name, "no heartbeat: the file is closed until it is used again");
        }
    }
    /// Once a second: make the rates.
    pub fn tick(&self, now: Instant) {
        let mut table = self.table();
        let elapsed = now.since_ns(std::mem::replace(&mut table.ticked, now));
        table.files.tick_stats(elapsed);
    }

    /// Variables of part2 and of the volumes it has open (nebd-behaviour §B11).
    pub fn vars(&self, version: &str, address: &str, vars: &mut Vars) {
        let labels = |version: &str| Var::Labels(vec![("version", version.to_owned())]);
        // Shards wait for the table: what takes long is done without it.
        let table = self.table();
        let clients: Vec<(i32, String)> = table.clients.iter().map(|(&pid, c)| (pid, c.version.clone())).collect();
        let open: Vec<(String, u32, FileStat)> =
            table.files.stats().map(|(name, running, stat)| (name.to_owned(), running, *stat)).collect();
        drop(table);
        vars.set("nebd_version", labels(version));
        vars.int("nebd_client_num", clients.len() as u64);
        for (pid, version) in &clients {
            vars.set(format!("nebd_client_pid_{pid}_version"), labels(version));
        }
        vars.int(underscored(&format!("open_file_num_{address}")), open.len() as u64);
        // One volume may be open under several names.
        let mut sums = BTreeMap::<String, u64>::new();
        for (name, running, stat) in &open {
            let mut add = |of: String, value: u64| {
                let sum = sums.entry(underscored(&format!("curve_client_{}_{of}", shown(name)))).or_default();
                *sum = if of.ends_with("lat_latency") { value.max(*sum) } else { sum.saturating_add(value) };
            };
            add("inflight_rpc_num".into(), u64::from(*running));
            for (kind, stat) in stat.kinds() {
                for (of, value) in [
                    ("qps", stat.rate.done),
                    ("rps", stat.rate.done + stat.rate.errors),
                    ("eps", stat.rate.errors),
                    ("bps", stat.rate.bytes),
                    ("lat_latency", stat.rate.ns / 1000),
                    ("lat_count", stat.total.done),
                    ("error_num", stat.total.errors),
                    ("io_bytes", stat.total.bytes),
                ] {
                    add(format!("{}_{of}", kind.name()), value);
                }
            }
        }
        sums.into_iter().for_each(|(name, value)| vars.int(name, value));
    }
}

/// A file as Curve's client calls it: its path, without type, pool, owner and configuration.
fn shown(name: &str) -> &str {
    super::name::CurveName::parse(name).map_or(name, |name| name.path)
}
