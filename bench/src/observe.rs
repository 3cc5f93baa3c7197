//! The server seen from outside: CPU of its process, writes of its disk, counters of its `/metrics`.
//!
//! Every source may be missing (another host, no such page): then the numbers that need it are left out, not guessed.

use crate::phase::wait_until;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

/// Bytes of a sector in /proc/diskstats.
const SECTOR: u64 = 512;
const METRICS_MAX: u64 = 16 << 20;

/// Servers that are observed together.
#[derive(Debug, Clone)]
pub struct Targets(Vec<Target>);

impl Targets {
    /// What happens on them between these moments of a phase, nanoseconds after `epoch`.
    pub(crate) fn measure(&self, epoch: Instant, (from, until): (u64, u64), running: &AtomicBool) -> Delta {
        wait_until(epoch, from, running);
        let before = self.sample();
        wait_until(epoch, until, running);
        before.until(&self.sample())
    }

    /// The servers at `addrs`; `pid` names the process of a single one, `disk` is a path on the disk of all.
    pub fn find(addrs: &[SocketAddr], pid: Option<u32>, disk: Option<&Path>) -> Self {
        Self(addrs.iter().map(|addr| Target::find(*addr, pid.filter(|_| addrs.len() == 1), disk)).collect())
    }

    /// The server on a Unix socket.
    pub fn find_local(socket: &Path, pid: Option<u32>, disk: Option<&Path>) -> Self {
        Self(vec![Target::find_local(socket, pid, disk)])
    }

    /// Reads all sources once and adds up CPU and counters; the disk is counted once.
    pub fn sample(&self) -> Sample {
        let mut samples = self.0.iter().map(Target::sample);
        let mut sum = samples.next().unwrap_or_default();
        for sample in samples {
            // A server that cannot be seen makes the sum unknown, not smaller.
            sum.cpu_micros = sum.cpu_micros.zip(sample.cpu_micros).map(|(a, b)| a + b);
            for (name, value) in sample.counters {
                *sum.counters.entry(name).or_default() += value;
            }
        }
        sum
    }
}

/// Where a server speaks HTTP.
#[derive(Debug, Clone)]
pub enum Address {
    /// At its RPC port.
    Tcp(SocketAddr),
    /// On a Unix socket.
    Unix(PathBuf),
}

/// One server.
#[derive(Debug, Clone)]
pub struct Target {
    /// The server's RPC and HTTP port.
    pub addr: Address,
    /// Its process, if it runs on this machine.
    pub pid: Option<u32>,
    /// Its whole-disk name in /proc/diskstats.
    pub disk: Option<String>,
}

impl Target {
    /// Finds what was not named: the process by the listening socket, the disk by the path on it.
    pub fn find(addr: SocketAddr, pid: Option<u32>, disk: Option<&Path>) -> Self {
        let pid = pid.or_else(|| if addr.ip().is_loopback() { listener_pid(addr.port()) } else { None });
        Self { addr: Address::Tcp(addr), pid, disk: disk.and_then(disk_of) }
    }

    /// The same for a server on a Unix socket, whose process the kernel knows.
    fn find_local(socket: &Path, pid: Option<u32>, disk: Option<&Path>) -> Self {
        let peer = || rustix::net::sockopt::socket_peercred(UnixStream::connect(socket).ok()?).ok();
        let pid = pid.or_else(|| u32::try_from(peer()?.pid.as_raw_nonzero().get()).ok());
        Self { addr: Address::Unix(socket.to_owned()), pid, disk: disk.and_then(disk_of) }
    }

    /// Reads all sources once.
    pub fn sample(&self) -> Sample {
        Sample {
            cpu_micros: self.pid.and_then(cpu_micros),
            client_micros: cpu_micros(std::process::id()),
            disk: self.disk.as_deref().and_then(|name| disk_writes(&fs::read_to_string("/proc/diskstats").ok()?, name)),
            counters: http_get(&self.addr, "/metrics").map(|text| parse_metrics(&text)).unwrap_or_default(),
        }
    }
}

/// One look at the sources.
#[derive(Debug, Clone, Default)]
pub struct Sample {
    /// CPU time of the process so far, in microseconds.
    pub cpu_micros: Option<u64>,
    /// CPU time of this client so far, in microseconds.
    pub client_micros: Option<u64>,
    /// Writes completed by the disk and bytes written.
    pub disk: Option<(u64, u64)>,
    /// Counters by name, label sets added up.
    pub counters: BTreeMap<String, f64>,
}

/// What happened between two samples.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Delta {
    /// CPU time of the server in microseconds.
    pub server_cpu_us: Option<u64>,
    /// CPU time of the client in microseconds.
    pub client_cpu_us: Option<u64>,
    /// Writes the disk completed (of everybody on it).
    pub disk_writes: Option<u64>,
    /// Bytes the disk wrote.
    pub disk_write_bytes: Option<u64>,
    /// `io_uring_enter` calls by the server's own counter.
    pub server_syscalls: Option<f64>,
    /// All counters of the server that moved.
    pub server_counters: BTreeMap<String, f64>,
}

impl Sample {
    /// From `self` to `later`.
    pub fn until(&self, later: &Self) -> Delta {
        let mut moved = BTreeMap::new();
        for (name, value) in &later.counters {
            let change = value - self.counters.get(name).copied().unwrap_or(0.0);
            if change != 0.0 && (name.ends_with("_total") || name.ends_with("_count") || name.ends_with("_sum")) {
                moved.insert(name.clone(), change);
            }
        }
        let enters: Vec<f64> = moved
            .iter()
            .filter(|(name, _)| name.ends_with("io_uring_enter_total"))
            .map(|(_, change)| *change)
            .collect();
        let disk = self.disk.zip(later.disk);
        let spent = |from: Option<u64>, to: Option<u64>| Some(to?.saturating_sub(from?));
        Delta {
            server_cpu_us: spent(self.cpu_micros, later.cpu_micros),
            client_cpu_us: spent(self.client_micros, later.client_micros),
            disk_writes: disk.map(|(from, to)| to.0.saturating_sub(from.0)),
            disk_write_bytes: disk.map(|(from, to)| to.1.saturating_sub(from.1)),
            server_syscalls: (!enters.is_empty()).then(|| enters.iter().sum()),
            server_counters: moved,
        }
    }
}

/// utime + stime of /proc/PID/stat (the whole process, threads that ended included).
pub fn cpu_micros(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let ticks = cpu_ticks(&stat)?;
    Some(ticks * 1_000_000 / rustix::param::clock_ticks_per_second().max(1))
}

fn cpu_ticks(stat: &str) -> Option<u64> {
    // The command name may hold anything; the numbers start behind its last parenthesis, with field 3.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    Some(user + fields.next()?.parse::<u64>().ok()?)
}

/// Writes completed and bytes written of `name` in the text of /proc/diskstats.
pub fn disk_writes(text: &str, name: &str) -> Option<(u64, u64)> {
    let line = text.lines().find(|line| line.split_ascii_whitespace().nth(2) == Some(name))?;
    let mut fields = line.split_ascii_whitespace().skip(7);
    let writes = fields.next()?.parse().ok()?;
    let sectors: u64 = fields.nth(1)?.parse().ok()?;
    Some((writes, sectors * SECTOR))
}

/// The whole disk under a file, folder or block device; `None` where there is none (overlay, tmpfs).
pub fn disk_of(path: &Path) -> Option<String> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let meta = fs::metadata(path).ok()?;
    let dev = if meta.file_type().is_block_device() { meta.rdev() } else { meta.dev() };
    let id = format!("{}:{}", rustix::fs::major(dev), rustix::fs::minor(dev));
    let mut device: PathBuf = fs::canonicalize(Path::new("/sys/dev/block").join(id)).ok()?;
    if device.join("partition").exists() {
        device.pop();
    }
    Some(device.file_name()?.to_string_lossy().into_owned())
}

/// The process that listens on a TCP port of this machine.
fn listener_pid(port: u16) -> Option<u32> {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"];
    let inode = tables.iter().find_map(|table| listener_inode(&fs::read_to_string(table).ok()?, port))?;
    let wanted = PathBuf::from(format!("socket:[{inode}]"));
    let owns = |pid: &u32| {
        let fds = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        fds.filter_map(|fd| fs::read_link(fd.path()).ok()).any(|link| link == wanted)
    };
    fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).find(owns)
}

fn listener_inode(table: &str, port: u16) -> Option<u64> {
    table.lines().skip(1).find_map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let local = fields.get(1)?.rsplit_once(':')?.1;
        let listening = fields.get(3) == Some(&"0A") && u16::from_str_radix(local, 16) == Ok(port);
        if listening { fields.get(9)?.parse().ok() } else { None }
    })
}

/// Body of a page of the server's HTTP side, or `None` if there is no such page.
fn http_get(addr: &Address, path: &str) -> Option<String> {
    let limit = Duration::from_secs(2);
    match addr {
        Address::Tcp(addr) => {
            let stream = TcpStream::connect_timeout(addr, limit).ok()?;
            stream.set_read_timeout(Some(limit)).ok()?;
            http_on(stream, &addr.to_string(), path)
        }
        Address::Unix(socket) => {
            let stream = UnixStream::connect(socket).ok()?;
            stream.set_read_timeout(Some(limit)).ok()?;
            http_on(stream, "localhost", path)
        }
    }
}

fn http_on(mut stream: impl Read + Write, host: &str, path: &str) -> Option<String> {
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: curl/7.54.0\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = Vec::new();
    stream.take(METRICS_MAX).read_to_end(&mut answer).ok()?;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n")?;
    (head.split_ascii_whitespace().nth(1) == Some("200")).then(|| body.to_owned())
}

/// Sums of a Prometheus text, by metric name.
pub fn parse_metrics(text: &str) -> BTreeMap<String, f64> {
    let mut sums = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let Some((name, value)) = line.trim().rsplit_once(' ') else { continue };
        let Ok(value) = value.parse::<f64>() else { continue };
        let name = name.split('{').next().unwrap_or(name).trim();
        *sums.entry(name.to_owned()).or_insert(0.0) += value;
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_files_are_read_as_the_kernel_writes_them() {
        let stat = "42 (a) b (c) S 1 42 42 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 3 0 100 1 1 0 0";
        assert_eq!(cpu_ticks(stat), Some(300));
        let diskstats = " 254 0 vda 10 0 80 5 7 1 560 9 0 1 2 0 0 0 0\n 254 1 vda1 1 0 8 5 3 1 24 9 0 1 2";
        assert_eq!(disk_writes(diskstats, "vda"), Some((7, 560 * 512)));
        assert_eq!(disk_writes(diskstats, "vdb"), None);
        let tcp = "  sl  local_address rem_address   st\n 0: 0100007F:1F90 00000000:0000 0A 0:0 00:0 0 0 0 777 1";
        assert_eq!(listener_inode(tcp, 8080), Some(777));
        assert_eq!(listener_inode(tcp, 8081), None);
        assert!(cpu_micros(std::process::id()).is_some());
    }

    #[test]
    fn counters_add_up_over_labels_and_only_movement_is_kept() {
        let before = Sample {
            counters: parse_metrics(
                "# TYPE x counter\nx_io_uring_enter_total{shard=\"0\"} 5\nx_io_uring_enter_total{shard=\"1\"} 6\ny 1\n",
            ),
            ..Sample::default()
        };
        let after =
            Sample { counters: parse_metrics("x_io_uring_enter_total 21\ny 1\nz_total 0\n"), ..Sample::default() };
        let delta = before.until(&after);
        assert_eq!(delta.server_syscalls, Some(10.0));
        assert_eq!(delta.server_counters.len(), 1);
        assert_eq!(delta.server_cpu_us, None);
    }

    #[test]
    fn this_process_is_found_by_its_socket() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(listener_pid(listener.local_addr().unwrap().port()), Some(std::process::id()));
    }
}
