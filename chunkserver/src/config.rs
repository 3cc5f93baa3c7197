//! The configuration file of `chunkserver serve`: TOML, every key with a default, unknown keys are errors.

use crate::limits;
use bytesize::ByteSize;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// Block numbers of an arena have 32 bits; far below that, nobody has the memory.
const MEMORY_MAX: u64 = 1 << 40;
/// `sun_path` of a Unix socket's address, its final NUL included.
const SOCKET_PATH_BYTES: usize = 108;
const DAY_MS: u64 = 24 * 60 * 60 * 1000;

/// Configuration of a server. Sizes are written as `"64MiB"`, durations end in their unit.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Disk file or block device that `chunkserver format` prepared. Without one the server has no chunks of its own: it
    /// exports volumes whose copysets are on other servers.
    pub data: Option<PathBuf>,
    /// Address of the RPC port: ChunkService, CopysetService, CliService2 and the HTTP pages. Its IP and port are also
    /// the peer id (`ip:port:0`), so the IP must be the one that clients and peers use.
    pub listen: SocketAddr,
    /// Identity of the cluster, a UUID. Servers that name different ones do not talk to each other; one that names none
    /// talks to all.
    pub cluster: Option<String>,
    /// Unix socket of the commands (`chunkserver volume …`, `copyset …`, `status`). Default: `ctl.sock` beside `data`, or in the
    /// current folder.
    pub ctl_socket: Option<PathBuf>,
    /// File that describes the volumes. Default: `volumes.json` beside `data`, or in the current folder.
    pub catalog: Option<PathBuf>,
    /// Unix socket on which all volumes are exported over NBD; none by default.
    pub nbd_socket: Option<PathBuf>,
    /// TCP address on which all volumes are exported over NBD; none by default. NBD has no authentication.
    pub nbd_listen: Option<SocketAddr>,
    /// Chunk requests in flight above which OVERLOAD is answered.
    pub max_inflight_requests: u32,
    /// Payload bytes per shard that may wait for write-back.
    pub dirty_limit: ByteSize,
    /// Dirty data older than this is written back, milliseconds; a tenth of it when nothing is written meanwhile.
    pub flush_age_ms: u64,
    /// Memory per shard for payloads on their way in; larger than `dirty_limit`.
    pub payload_buffers: ByteSize,
    /// Memory per shard for device reads, log headers and metadata pages.
    pub work_buffers: ByteSize,
    /// Threads of a server without a disk; 0 = one less than cores. With a disk, `format` has decided.
    pub export_shards: u16,
    /// Pin shard N to the N-th CPU this process may run on.
    pub pin_shards: bool,
    /// Election timeout of copysets with several voters, milliseconds.
    pub election_timeout_ms: u64,
    /// Most chunk data a second for replicas that are fed chunks (raft snapshots), here and by this server, both together;
    /// each shard has an even part of it. 0: no limit.
    pub snapshot_bytes_per_s: ByteSize,
    /// A deleted copyset's chunks keep their slots for so long, seconds, in case it was a mistake; 0: they are free at once.
    pub trash_expire_s: u64,
    /// How long to wait for the lock on `data` and for the ports (an ended process may still hold them), milliseconds.
    pub start_wait_ms: u64,
    /// Log filter: `error`, `warn`, `info`, `debug`, `trace`, or per module as `info,chunkserver::shard=debug`.
    pub log: String,
    /// NEBD part2, for clients of Curve's libnebd: a section of its own; not served without it.
    pub nebd: Option<NebdConfig>,
}

/// Section `[nebd]`: part2 of NEBD.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct NebdConfig {
    /// A `nebd-server.conf` of Curve, read in place of the keys below.
    pub conf: Option<PathBuf>,
    /// Unix socket of the clients; at most 107 bytes. `<socket>.lock` is locked while it is served.
    pub socket: PathBuf,
    /// File that remembers which files are open, in the format of the original.
    pub metafile: PathBuf,
    /// A file without heartbeat for so long is closed, seconds; its record stays, and its next request opens it again.
    pub heartbeat_timeout_s: u64,
    /// Between two looks for such files, milliseconds.
    pub heartbeat_check_ms: u64,
    /// Answer a request whose I/O failed with an error; otherwise it stays unanswered and is tried again.
    pub return_io_errors: bool,
}

impl Default for NebdConfig {
    fn default() -> Self {
        Self {
            conf: None,
            socket: PathBuf::from("/data/nebd/nebd.sock"),
            metafile: PathBuf::from("/data/nebd/nebdserver.meta"),
            heartbeat_timeout_s: 30,
            heartbeat_check_ms: 3000,
            return_io_errors: false,
        }
    }
}

impl NebdConfig {
    /// Check what the parser cannot.
    ///
    /// # Errors
    /// [`ConfigError::Value`].
    pub fn check(&self) -> Result<(), ConfigError> {
        let bad = |key, message: String| Err(ConfigError::Value { key, message });
        let length = self.socket.as_os_str().len();
        if length == 0 || length >= SOCKET_PATH_BYTES {
            return bad("nebd.socket", format!("a path of 1 to {} bytes, not {length}", SOCKET_PATH_BYTES - 1));
        }
        if self.heartbeat_timeout_s == 0 || self.heartbeat_check_ms == 0 || self.heartbeat_check_ms > DAY_MS {
            return bad("nebd.heartbeat_timeout_s, nebd.heartbeat_check_ms", "must not be 0, nor a day between".into());
        }
        Ok(())
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data: None,
            listen: SocketAddr::from(([127, 0, 0, 1], 8200)),
            cluster: None,
            ctl_socket: None,
            catalog: None,
            nbd_socket: None,
            nbd_listen: None,
            max_inflight_requests: limits::INFLIGHT_REQUESTS_MAX as u32,
            dirty_limit: ByteSize(limits::DIRTY_BYTES_MAX as u64),
            flush_age_ms: 5_000,
            payload_buffers: ByteSize(limits::ARENA_BYTES as u64),
            work_buffers: ByteSize::mib(64),
            export_shards: 0,
            pin_shards: true,
            election_timeout_ms: 1_000,
            snapshot_bytes_per_s: ByteSize(0),
            trash_expire_s: 300,
            start_wait_ms: 5_000,
            log: "info".into(),
            nebd: None,
        }
    }
}

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{path}: {source}")]
    Read {
        /// File.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// Not TOML, an unknown key or a value of the wrong type.
    #[error("{path}: {message}")]
    Parse {
        /// File.
        path: PathBuf,
        /// What and where.
        message: String,
    },
    /// A value that cannot work.
    #[error("{key}: {message}")]
    Value {
        /// Key.
        key: &'static str,
        /// Why.
        message: String,
    },
}

impl Config {
    /// Read a file.
    ///
    /// # Errors
    /// [`ConfigError`], naming the file, and line and key where it can.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        toml::from_str(&text).map_err(|e| ConfigError::Parse { path: path.to_owned(), message: e.to_string() })
    }

    /// Check what the parser cannot.
    ///
    /// # Errors
    /// [`ConfigError::Value`].
    pub fn check(&self) -> Result<(), ConfigError> {
        let bad = |key, message: &str| Err(ConfigError::Value { key, message: message.into() });
        if !self.listen.is_ipv4() || self.listen.ip().is_unspecified() {
            return bad("listen", "must be a specific IPv4 address: it is part of the peer id");
        }
        if self.dirty_limit.0 < 1 << 20 {
            return bad("dirty_limit", "at least 1MiB");
        }
        if self.payload_buffers.0 < self.dirty_limit.0.saturating_add(self.dirty_limit.0 / 2) {
            return bad("payload_buffers", "at least one and a half times dirty_limit");
        }
        if self.work_buffers.0 < 16 << 20 {
            return bad("work_buffers", "at least 16MiB");
        }
        if self.flush_age_ms > DAY_MS {
            return bad("flush_age_ms", "at most a day");
        }
        if self.flush_age_ms == 0 || self.max_inflight_requests == 0 {
            return bad("flush_age_ms, max_inflight_requests", "must not be 0");
        }
        let exports = self.nbd_socket.is_some() || self.nbd_listen.is_some() || self.nebd.is_some();
        if self.data.is_none() && !exports {
            return bad("data", "give a disk, or nbd_socket, nbd_listen or [nebd] to export volumes of other servers");
        }
        if self.cluster.as_ref().is_some_and(|text| uuid(text).is_none()) {
            return bad("cluster", "must be a UUID other than all zeros, 32 hexadecimal digits with or without dashes");
        }
        if (1..1 << 20).contains(&self.snapshot_bytes_per_s.0) {
            return bad("snapshot_bytes_per_s", "at least 1MiB, or 0 for no limit");
        }
        if self.export_shards > 256 {
            return bad("export_shards", "at most 256");
        }
        if self.election_timeout_ms < 50 {
            return bad("election_timeout_ms", "at least 50");
        }
        self.nebd.as_ref().map_or(Ok(()), NebdConfig::check)
    }

    /// Check what depends on the disk.
    ///
    /// # Errors
    /// [`ConfigError::Value`].
    pub fn check_disk(&self, chunk_size: u32) -> Result<(), ConfigError> {
        let bad = |key, message: String| Err(ConfigError::Value { key, message });
        let chunk = u64::from(chunk_size);
        // Buffers are pieces of a power of two: one for a whole chunk must fit beside others, or its writer waits for ever.
        if self.payload_buffers.0 < 2 * chunk {
            return bad("payload_buffers", format!("at least two chunks of this disk, {}", ByteSize(2 * chunk)));
        }
        // Pieces of a read are rounded up, to less than twice their size.
        let reads = 2 * chunk + limits::READ_RESERVE_BYTES as u64;
        if self.work_buffers.0 < reads {
            return bad("work_buffers", format!("at least {} for chunks of this disk", ByteSize(reads)));
        }
        if self.payload_buffers.0.max(self.work_buffers.0) > MEMORY_MAX {
            return bad("payload_buffers, work_buffers", format!("at most {} each", ByteSize(MEMORY_MAX)));
        }
        Ok(())
    }

    /// Identity of the cluster; zeros: none.
    #[must_use]
    pub fn cluster_id(&self) -> [u8; 16] {
        self.cluster.as_deref().and_then(uuid).unwrap_or_default()
    }

    /// Where the commands connect to.
    #[must_use]
    pub fn ctl_socket(&self) -> PathBuf {
        self.ctl_socket.clone().unwrap_or_else(|| beside(self.data.as_deref(), "ctl.sock"))
    }

    /// Where the volumes are described.
    #[must_use]
    pub fn catalog(&self) -> PathBuf {
        self.catalog.clone().unwrap_or_else(|| beside(self.data.as_deref(), "volumes.json"))
    }
}

fn uuid(text: &str) -> Option<[u8; 16]> {
    let digits: String = text.chars().filter(|&c| c != '-').collect();
    if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    let number = u128::from_str_radix(&digits, 16).ok().filter(|&number| number != 0)?;
    (digits.len() == 32).then(|| number.to_be_bytes())
}

fn beside(path: Option<&Path>, name: &str) -> PathBuf {
    path.and_then(Path::parent).unwrap_or_else(|| Path::new("")).join(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk() -> Config {
        Config { data: Some(PathBuf::from("disk")), ..Config::default() }
    }

    #[test]
    fn without_a_disk_there_must_be_an_export() {
        assert!(Config::default().check().unwrap_err().to_string().starts_with("data: give a disk"));
        let socket = Some(PathBuf::from("nbd.sock"));
        let config = Config { nbd_socket: socket, export_shards: 2, ..Config::default() };
        config.check().unwrap();
        let only_nebd = Config { nbd_socket: None, nebd: Some(NebdConfig::default()), ..config.clone() };
        only_nebd.check().unwrap();
        assert_eq!(config.ctl_socket(), Path::new("ctl.sock"));
        assert_eq!(Config { data: Some("a/disk".into()), ..config }.catalog(), Path::new("a/volumes.json"));
    }

    #[test]
    fn a_cluster_is_a_uuid() {
        let of = |text: &str| Config { cluster: Some(text.into()), ..disk() };
        let good = of("00112233-4455-6677-8899-AABBccddeeff");
        good.check().unwrap();
        assert_eq!(good.cluster_id()[..4], [0, 0x11, 0x22, 0x33]);
        assert_eq!(disk().cluster_id(), [0; 16]);
        for bad in ["", "cluster", "0011", "+0112233445566778899aabbccddeeff", &"0".repeat(32), &"f".repeat(33)] {
            assert!(of(bad).check().is_err(), "{bad}");
        }
    }

    #[test]
    fn defaults_pass_their_own_check_and_round_trip() {
        let config = disk();
        config.check().unwrap();
        config.check_disk(16 << 20).unwrap();
        let text = toml::to_string(&config).unwrap();
        let again: Config = toml::from_str(&text).unwrap();
        assert_eq!(format!("{again:?}"), format!("{config:?}"));
    }

    #[test]
    fn buffers_too_small_for_the_disk_are_refused() {
        let small = Config { payload_buffers: ByteSize::mib(8), dirty_limit: ByteSize::mib(2), ..disk() };
        small.check().unwrap();
        assert!(small.check_disk(16 << 20).is_err() && small.check_disk(1 << 20).is_ok());
        let small = Config { work_buffers: ByteSize::mib(16), ..disk() };
        assert!(small.check_disk(16 << 20).is_err());
        let huge = Config { dirty_limit: ByteSize(u64::MAX), payload_buffers: ByteSize(u64::MAX), ..disk() };
        assert!(huge.check().is_err() || huge.check_disk(1 << 20).is_err());
    }

    #[test]
    fn absurd_sizes_are_refused() {
        let config = Config { dirty_limit: ByteSize(u64::MAX), ..disk() };
        assert!(config.check().is_err());
        let config = Config { flush_age_ms: u64::MAX, ..disk() };
        assert!(config.check().is_err());
        let slow = |bytes| Config { snapshot_bytes_per_s: ByteSize(bytes), ..disk() }.check().is_err();
        assert_eq!([0, 1, (1 << 20) - 1, 1 << 20, u64::MAX].map(slow), [false, true, true, false, false]);
    }

    #[test]
    fn unknown_keys_and_wrong_types_name_the_line() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for (text, word) in [("dirty_limt = \"1MiB\"", "dirty_limt"), ("listen = 7", "listen"), ("a = [", "a = [")] {
            std::fs::write(file.path(), text).unwrap();
            let error = Config::load(file.path()).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
