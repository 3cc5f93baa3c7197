//! A disk file, a server on it, and the means to start, stop, kill and ask it.

use super::client::Client;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Anything that must happen happens within this, on any machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_chunkserver");
pub(crate) const MIB: u64 = 1 << 20;
/// Every test's logical pool.
pub(crate) const POOL: u64 = 1;

/// How a disk is formatted and served.
#[derive(Clone)]
pub(crate) struct Setup {
    pub(crate) size: u64,
    pub(crate) chunk: u64,
    pub(crate) log: u64,
    pub(crate) shards: u16,
    pub(crate) dirty: u64,
    pub(crate) buffers: u64,
    pub(crate) flush_age_ms: u64,
    /// More lines of the configuration; `@` stands for the lab's folder.
    pub(crate) extra: String,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            size: 128 * MIB,
            chunk: MIB,
            log: 16 * MIB,
            shards: 2,
            dirty: 4 * MIB,
            buffers: 16 * MIB,
            flush_age_ms: 200,
            extra: String::new(),
        }
    }
}

impl Setup {
    /// Work buffers: what the server asks for at least.
    pub(crate) fn work(&self) -> u64 {
        (8 * MIB + 2 * self.chunk).max(16 * MIB)
    }
}

/// A folder with a formatted disk, a configuration, and an address nobody else uses.
pub(crate) struct Lab {
    pub(crate) setup: Setup,
    pub(crate) address: SocketAddr,
    folder: TempDir,
}

/// A loopback address of this process's own, by its id and a counter.
fn own_address() -> SocketAddr {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let (pid, count) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let [_, _, high, low] = pid.to_be_bytes();
    let [.., last] = count.to_be_bytes();
    SocketAddr::from((Ipv4Addr::new(127, high | 1, low, last), 8402))
}

impl Lab {
    pub(crate) fn new(setup: Setup) -> Self {
        let lab = Self::blank(setup);
        let out = lab.format(&["--sparse"]);
        assert!(out.status.success(), "{}", text(&out.stderr));
        lab
    }

    /// Without a disk.
    pub(crate) fn blank(setup: Setup) -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let lab = Self { setup, address: own_address(), folder };
        lab.configure();
        lab
    }

    /// A server that only exports volumes of others.
    pub(crate) fn exporter(setup: Setup) -> Self {
        let lab = Self::blank(setup);
        let mut toml = std::fs::read_to_string(lab.path("chunkserver.toml")).unwrap();
        let own = format!("ctl_socket = {:?}\ncatalog = {:?}\n", lab.path("ctl.sock"), lab.path("volumes.json"));
        toml = toml.replace(&format!("data = {:?}\n", lab.disk()), &format!("export_shards = 2\n{own}"));
        std::fs::write(lab.path("chunkserver.toml"), toml).unwrap();
        lab
    }

    fn configure(&self) {
        let Setup { dirty, buffers, flush_age_ms, extra, .. } = &self.setup;
        let extra = extra.replace('@', &self.folder.path().display().to_string());
        let toml = format!(
            "data = {:?}\nlisten = \"{}\"\nnbd_socket = {:?}\ndirty_limit = {dirty}\npayload_buffers = {buffers}\n\
             work_buffers = {}\nflush_age_ms = {flush_age_ms}\npin_shards = false\nstart_wait_ms = 10000\n{extra}\n",
            self.disk(),
            self.address,
            self.path("nbd.sock"),
            self.setup.work(),
        );
        std::fs::write(self.path("chunkserver.toml"), toml).unwrap();
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
    pub(crate) fn disk(&self) -> PathBuf {
        self.path("disk")
    }
    pub(crate) fn peer(&self) -> String {
        format!("{}:0", self.address)
    }
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.path("server.log")).unwrap_or_default()
    }

    pub(crate) fn format(&self, more: &[&str]) -> Output {
        let Setup { size, chunk, log, shards, .. } = &self.setup;
        let numbers = [size.to_string(), chunk.to_string(), log.to_string(), shards.to_string()];
        Command::new(BINARY)
            .args(["format", "--size", &numbers[0], "--chunk-size", &numbers[1], "--log-size", &numbers[2]])
            .args(["--shards", &numbers[3], "--data"])
            .arg(self.disk())
            .args(more)
            .output()
            .unwrap()
    }

    /// `serve`, not started yet.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(BINARY);
        command.arg("serve").arg("--config").arg(self.path("chunkserver.toml"));
        command
    }

    /// Run a server that is expected to refuse its start: its exit status and what it says.
    pub(crate) fn refused(&self, more: &[&str]) -> String {
        let mut command = self.command();
        command.args(more);
        refusal(command)
    }

    /// Start a server without waiting for it.
    pub(crate) fn launch(&self, mut command: Command) -> Server<'_> {
        let log = OpenOptions::new().create(true).append(true).open(self.path("server.log")).unwrap();
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        Server { lab: self, child }
    }

    /// Start a server and wait until it answers.
    pub(crate) fn start(&self) -> Server<'_> {
        let server = self.start_unled();
        self.wait_led();
        server
    }

    /// The same, but not every copyset needs to have a leader.
    pub(crate) fn start_unled(&self) -> Server<'_> {
        let mut server = self.launch(self.command());
        server.wait_ready();
        server
    }

    /// A command to the running server.
    pub(crate) fn cli(&self, args: &[&str]) -> Output {
        Command::new(BINARY).args(args).arg("--ctl").arg(self.path("ctl.sock")).output().unwrap()
    }

    /// A command that must succeed, and what it says.
    pub(crate) fn ask(&self, args: &[&str]) -> Value {
        let out = self.cli(&[args, &["--json"]].concat());
        assert!(out.status.success(), "{args:?}: {}", text(&out.stderr));
        serde_json::from_slice(&out.stdout).unwrap()
    }

    /// Copysets 1..=count of the pool.
    pub(crate) fn copysets(&self, count: u32) {
        self.ask(&["copyset", "create", "--pool", "1", "--first", "1", "--count", &count.to_string()]);
        self.wait_led();
    }

    /// Until every copyset has its leader; before that it answers REDIRECTED, as any copyset does during an election.
    pub(crate) fn wait_led(&self) {
        wait_for("leaders", || {
            let shards = self.ask(&["status"])["shards"].clone();
            shards.as_array().unwrap().iter().all(|s| s["leaders"] == s["copysets"])
        });
    }

    pub(crate) fn inspect(&self) -> Value {
        self.try_inspect().unwrap()
    }

    /// While a server writes, a look at the disk may come out torn.
    fn try_inspect(&self) -> Result<Value, String> {
        let out = Command::new(BINARY).arg("inspect").arg(self.disk()).arg("--json").output().unwrap();
        if out.status.success() { Ok(serde_json::from_slice(&out.stdout).unwrap()) } else { Err(text(&out.stderr)) }
    }

    /// Until all that was written is in its slots, and for these copysets covered by checkpoints: a restart replays
    /// nothing of it.
    pub(crate) fn wait_written_back(&self, copysets: &[u64]) {
        wait_for("write-back", || {
            let clean = self.ask(&["status"])["shards"].as_array().unwrap().iter().all(|s| s["dirty_bytes"] == 0);
            let covers =
                |c: &Value| c["checkpoint"] == c["last"] || !copysets.contains(&c["copyset"].as_u64().unwrap());
            let covered = |seen: Value| seen["copysets"].as_array().unwrap().iter().all(covers);
            clean && self.try_inspect().is_ok_and(covered)
        });
    }
}

/// A server process; killed when dropped.
pub(crate) struct Server<'a> {
    lab: &'a Lab,
    child: Child,
}

impl Server<'_> {
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn wait_ready(&mut self) {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("the server ended with {status}:\n{}", self.lab.log());
            }
            if self.lab.path("ctl.sock").exists()
                && http(self.lab.address, "/health").is_ok_and(|r| r.contains("200 OK"))
            {
                return;
            }
            assert!(Instant::now() < until, "the server does not get ready:\n{}", self.lab.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn client(&self) -> Client {
        Client::connect(self.lab.address)
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        wait_for("the server's end", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    /// SIGTERM and a good end; how long that took.
    pub(crate) fn stop(mut self) -> Duration {
        let begun = Instant::now();
        self.signal(Signal::TERM);
        let status = self.wait();
        assert!(status.success(), "{status}:\n{}", self.lab.log());
        begun.elapsed()
    }

    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub(crate) fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// A number of `/proc/PID/status`, in bytes.
    pub(crate) fn resident_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
    }

    /// Open file descriptors.
    pub(crate) fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }
}

impl Drop for Server<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- log of the server\n{}", self.lab.log());
        }
    }
}

pub(crate) fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < until, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A command that must fail by itself, with one line on stderr: the line.
pub(crate) fn refusal(mut command: Command) -> String {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let until = Instant::now() + PATIENCE;
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None if Instant::now() > until => {
                child.kill().unwrap();
                child.wait().unwrap();
                panic!("it was not refused: {command:?}");
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(!status.success(), "{said}");
    assert!(status.code().is_some(), "{status}: {said}");
    assert!(!said.contains("panicked"), "{said}");
    said
}

/// One GET; head and body as they come.
pub(crate) fn http(address: SocketAddr, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Size and checksum of the head of a file: what a refusal must not change.
pub(crate) fn fingerprint(path: &Path) -> (u64, u32) {
    let mut file = File::open(path).unwrap();
    let mut head = Vec::new();
    (&mut file).take(4 * MIB).read_to_end(&mut head).unwrap();
    (file.metadata().unwrap().len(), crc32c::crc32c(&head))
}
