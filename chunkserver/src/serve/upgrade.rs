//! The old process of a hand-over: start the new one, stop, give it everything, and end; or go on.
//!
//! ```text
//!  start it ─► prepared? ─► write back ─► hold ─► leave ─► send ─► ready? ─► commit ─► serving? ─► end
//!      │           │            │          │                 │       │                    │
//!      └───────────┴────────────┴──────────┴─ go on          └───────┴─ start the shards  └─ the same, but
//!                                                               anew, with the connections   without connections
//! ```
//!
//! Promises: until it is prepared nothing stops; whatever goes wrong later, the new process is dead and its I/O over
//! (it holds a share of the disk's lock as long as that lasts) before this one touches the disk again; after the commit
//! no connection is used by this process.

use super::nebd::Lock;
use super::{Client, Crew, Disk, End, Event, Left, Server, Stage, notify, server, uring};
use crate::control::shards::Port;
use crate::handover::{Channel, ChannelError, Message, Offer, PROTOCOL};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

/// For all of a new process that needs no disk: configuration, memory, rings.
const PREPARE_WAIT: Duration = Duration::from_secs(30);
/// For writing back beforehand; what is not through then is replayed.
const WRITE_BACK_WAIT: Duration = Duration::from_secs(3);
/// For the requests in flight; a hand-over that would make clients wait longer is given up.
const HOLD_WAIT: Duration = Duration::from_millis(1500);
/// For the log's last write and everything else the disk is doing. A disk that takes longer is out of service.
const LEAVE_WAIT: Duration = Duration::from_secs(30);
/// For a process that is told something to take it.
const SEND_WAIT: Duration = Duration::from_secs(10);
/// For a process that has been told to serve to say that it does.
const SERVING_WAIT: Duration = Duration::from_secs(10);
/// For the I/O of a killed process to end.
const CLAIM_WAIT: Duration = Duration::from_secs(30);
/// For the recovery after a hand-over that failed.
const RECOVER_WAIT: Duration = Duration::from_secs(600);
/// For whoever asked to be told.
const TELL_WAIT: Duration = Duration::from_secs(1);
/// What SIGUSR2 gives a new process to recover.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The process that is to take over; killed when dropped, unless it has.
struct Successor {
    child: Child,
    channel: Channel,
    took_over: bool,
}

impl Drop for Successor {
    fn drop(&mut self) {
        if !self.took_over {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// What a successor that serves is.
struct Done {
    pid: u32,
    version: String,
    pause_us: u64,
    connections: usize,
}

/// Why it was given up, or that nothing can go on, or nothing but a process that starts anew.
enum Failed {
    GivenUp(String),
    Fatal(String),
    Restart(String),
}

impl From<ChannelError> for Failed {
    fn from(error: ChannelError) -> Self {
        Self::GivenUp(error.to_string())
    }
}

impl Server<'_> {
    /// Hand over; the end of this process, if it worked or if nothing works any more.
    pub(super) fn upgrade(&mut self, order: Option<server::Upgrade>) -> Option<End> {
        if self.parts.shared.is_draining() {
            return None; // whoever asked sees the connection end
        }
        let (binary, timeout, answer) = match order {
            Some(server::Upgrade { binary, timeout, answer }) => (binary, timeout, Some(answer)),
            None => (None, TIMEOUT, None),
        };
        let binary = binary.map_or_else(started_from, PathBuf::into_os_string);
        tracing::info!(binary = %binary.display(), "handing over to a new process");
        let outcome = self.hand_over(&binary, timeout);
        let result = match &outcome {
            Ok(done) => {
                let pause_ms = done.pause_us as f64 / 1000.0;
                tracing::info!(pid = done.pid, pause_ms, connections = done.connections, "handed over");
                notify::notify(&format!("MAINPID={}", done.pid));
                self.pass_signals_on(done.pid);
                self.parts.disk.inspect(|disk| disk.leave());
                Ok(json!({
                    "pid": done.pid, "version": done.version, "pause_ms": pause_ms, "connections": done.connections,
                }))
            }
            Err(Failed::GivenUp(why)) => {
                tracing::error!(why, "the new process does not take over; going on");
                Err(format!("the new process does not take over: {why}; the old one goes on"))
            }
            Err(Failed::Fatal(why) | Failed::Restart(why)) => {
                tracing::error!("{why}; leaving");
                Err(why.clone())
            }
        };
        if let Some(answer) = answer {
            let (told, wait) = std::sync::mpsc::channel();
            if answer.send(server::Upgraded { result, told }).is_ok() && !matches!(outcome, Err(Failed::GivenUp(_))) {
                let _ = wait.recv_timeout(TELL_WAIT);
            }
        }
        match outcome {
            Ok(_) => Some(End::HandedOver),
            Err(Failed::GivenUp(_)) => None,
            Err(Failed::Fatal(_)) => Some(End::Code(super::EXIT_DISK_FAILED)),
            Err(Failed::Restart(_)) => Some(End::Code(1)),
        }
    }

    /// A signal that came meanwhile meant the server, not this process.
    fn pass_signals_on(&mut self, pid: u32) {
        self.later.extend(self.happened.try_iter());
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        for event in self.later.drain(..) {
            if let (Event::Signal(number), Some(pid)) = (event, pid)
                && let Some(signal) = Signal::from_named_raw(number)
            {
                let _ = kill_process(pid, signal);
            }
        }
    }

    fn hand_over(&mut self, binary: &OsString, timeout: Duration) -> Result<Done, Failed> {
        let begun = Instant::now();
        let mut successor = self.start(binary)?;
        let (pid, version) = match successor.channel.receive(Some(PREPARE_WAIT))?.message {
            Message::Prepared { protocol: PROTOCOL, pid, version } => (pid, version),
            Message::Prepared { protocol, version, .. } => {
                let why = format!("version {version} takes over by protocol {protocol}, this is {PROTOCOL}");
                return Err(Failed::GivenUp(why));
            }
            other => return Err(Failed::GivenUp(format!("instead of being prepared it says {other:?}"))),
        };
        let prepared_ms = begun.elapsed().as_millis() as u64;
        self.enter(Stage::WriteBack);
        self.wait_reported(WRITE_BACK_WAIT)?;
        let wrote_ms = begun.elapsed().as_millis() as u64 - prepared_ms;
        let since_ns = uring::clock().0;
        self.enter(Stage::Hold);
        if !self.wait_reported(HOLD_WAIT)? {
            self.enter(Stage::Serve);
            return Err(Failed::GivenUp("requests in flight did not end in time".into()));
        }
        let held_ms = uring::clock().0.saturating_sub(since_ns) / 1_000_000;
        self.gate.close();
        self.enter(Stage::Leave);
        let (ports, clients) = self.collect()?;
        let stopped_ms = uring::clock().0.saturating_sub(since_ns) / 1_000_000;
        tracing::info!(
            prepared_ms,
            wrote_ms,
            held_ms,
            stopped_ms,
            connections = clients.len(),
            "stopped for the new process"
        );
        let connections = clients.len();
        let on_record = self.nebd_record();
        match self.give(&mut successor.channel, &clients, since_ns, timeout) {
            Ok(()) => {}
            Err(why) => {
                drop(successor);
                self.go_on(ports, clients)?;
                return Err(Failed::GivenUp(why.to_string()));
            }
        }
        match successor.channel.receive(Some(SERVING_WAIT)).map(|received| received.message) {
            Ok(Message::Serving { pause_us }) => {
                successor.took_over = true;
                Ok(Done { pid, version, pause_us, connections })
            }
            other => {
                let why = other.map_or_else(|error| error.to_string(), |message| format!("it says {message:?}"));
                drop(successor);
                // What it has received from clients and answered them is not known here: they must connect anew.
                drop(clients);
                if on_record.is_none() || self.nebd_record() != on_record {
                    let what = "and it opened or closed files of NEBD, of which only a new start knows";
                    return Err(Failed::Restart(format!("{why} (after it had the connections, {what})")));
                }
                self.go_on(ports, Vec::new())?;
                Err(Failed::GivenUp(format!("{why} (after it had the connections: they are closed)")))
            }
        }
    }

    /// What the metafile says; `None` if that cannot be known. While clients are held nobody writes it but a successor that
    /// serves.
    fn nebd_record(&self) -> Option<Vec<u8>> {
        let Some(nebd) = &self.parts.config.nebd else { return Some(Vec::new()) };
        match std::fs::read(&nebd.metafile) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Some(Vec::new()),
            read => read.ok(),
        }
    }

    /// Start the program with our arguments, and say who we are.
    fn start(&self, binary: &OsString) -> Result<Successor, Failed> {
        let given_up = |what: &str, error: std::io::Error| Failed::GivenUp(format!("{what}: {error}"));
        let (ours, theirs) = UnixStream::pair().map_err(|e| given_up("a socket pair", e))?;
        let ours = Channel::with_send_wait(ours, SEND_WAIT).map_err(|e| given_up("a socket pair", e))?;
        let own = std::env::args_os().skip(1).filter(|argument| argument != "--take-over");
        let child = Command::new(binary)
            .args(own)
            .arg("--take-over")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .spawn()
            .map_err(|e| given_up(&binary.display().to_string(), e))?;
        let mut successor = Successor { child, channel: ours, took_over: false };
        let offer = Offer {
            protocol: PROTOCOL,
            version: env!("CARGO_PKG_VERSION").into(),
            peer: self.parts.peer.0,
            disk: self.parts.disk.map(Disk::identity).transpose().map_err(|e| given_up("the disk", e))?,
            uuid: self.parts.node.id,
        };
        let sockets: Vec<_> = self.parts.sockets.all.iter().map(|(socket, _)| socket.as_fd()).collect();
        successor.channel.send(&Message::Offer(offer), [&[], &[]], &sockets)?;
        Ok(successor)
    }

    fn enter(&self, stage: Stage) {
        self.parts.pause.set(stage);
        self.parts.ring_all();
    }

    /// Whether all shards are through with the stage in time.
    fn wait_reported(&mut self, wait: Duration) -> Result<bool, Failed> {
        let until = Instant::now() + wait;
        while !self.parts.pause.is_reported() {
            if Instant::now() >= until {
                return Ok(false);
            }
            match self.happened.recv_timeout(Duration::from_millis(1)) {
                Ok(Event::Shard(_, Err(why))) => return Err(Failed::Fatal(why)),
                Ok(other) => self.later.push_back(other),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(Failed::Fatal("the shards are gone".into())),
            }
        }
        Ok(true)
    }

    /// What the shards leave, when all have ended.
    fn collect(&mut self) -> Result<(Vec<Port>, Vec<Client>), Failed> {
        let shards = usize::from(self.parts.node.shards);
        let mut left: Vec<(u16, Left)> = Vec::new();
        let until = Instant::now() + LEAVE_WAIT;
        while left.len() < shards {
            match self.happened.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(Event::Shard(shard, Ok(some))) => left.push((shard, some)),
                Ok(Event::Shard(_, Err(why))) => return Err(Failed::Fatal(why)),
                Ok(other) => self.later.push_back(other),
                Err(_) => return Err(Failed::Fatal("the disk does not finish what it is doing".into())),
            }
        }
        left.sort_by_key(|(shard, _)| *shard);
        let (mut ports, mut clients) = (Vec::new(), Vec::new());
        for (_, Left { control, clients: some }) in left {
            ports.extend(control);
            clients.extend(some);
        }
        self.crew.threads.drain(..).for_each(|thread| drop(thread.join()));
        Ok((ports, clients))
    }

    /// Give the successor everything, until it is committed to serve.
    fn give(&self, to: &mut Channel, clients: &[Client], since_ns: u64, timeout: Duration) -> Result<(), ChannelError> {
        self.parts.disk.map_or(Ok(()), Disk::share)?;
        self.nebd_lock.as_ref().map_or(Ok(()), Lock::share)?;
        for client in clients {
            let message = Message::Connection { session: client.session.clone(), input: client.input.len() };
            to.send(&message, [&client.input, &client.unsent], &[client.socket.as_fd()])?;
        }
        to.say(&Message::Fences { epochs: self.parts.shared.fences().known() })?;
        to.say(&Message::End { connections: clients.len(), since_ns })?;
        match to.receive(Some(timeout))?.message {
            Message::Ready => to.say(&Message::Commit),
            other => Err(ChannelError::Garbage(format!("{other:?}"))),
        }
    }

    /// The successor is dead: recover from the disk, as after any restart, with these connections.
    fn go_on(&mut self, ports: Vec<Port>, clients: Vec<Client>) -> Result<(), Failed> {
        let fatal = |error: &dyn std::fmt::Display| Failed::Fatal(error.to_string());
        let parts = &self.parts;
        if let (Some(disk), Some(path)) = (parts.disk, &parts.config.data) {
            disk.claim(path, CLAIM_WAIT).map_err(|error| fatal(&error))?;
        }
        self.nebd_lock.as_ref().map_or(Ok(()), |lock| lock.claim(CLAIM_WAIT)).map_err(|error| fatal(&error))?;
        if let Err(error) = self.gate.open() {
            tracing::error!(%error, "volumes cannot be changed until the next start");
        }
        parts.pause.set(Stage::Wait);
        let crew: Crew = parts.start_shards(ports, &self.events, false).map_err(|error| fatal(&error))?;
        crew.go(clients, &self.volumes, self.nebd.as_ref());
        self.crew = crew;
        if !self.wait_reported(RECOVER_WAIT)? {
            return Err(Failed::Fatal("the shards do not recover".into()));
        }
        self.enter(Stage::Serve);
        Ok(())
    }
}

/// As it was called: a path that leads to another file now means that one.
fn started_from() -> OsString {
    std::env::args_os().next().unwrap_or_else(|| "chunkserver".into())
}
