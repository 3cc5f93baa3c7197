//! `nebd-client.conf`, in the C++ client's format, with its keys and rules.
//!
//! A line is `key=value`; all white space goes, empty lines and those that begin with `#` are passed over, unknown keys
//! too. Other than C++: ` # …` behind a value is a comment, not part of the value.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

/// How a client behaves. [`Config::default`] has the values of the packaged file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The server's socket.
    pub server_address: PathBuf,
    /// Folder of the lock files, one per open file.
    pub lock_dir: PathBuf,
    /// Attempts of a call that its caller waits for, the first included.
    pub sync_attempts: u32,
    /// Pause between the attempts of such a call; first pause of I/O after an RPC error.
    pub retry_interval: Duration,
    /// Longest pause of I/O after RPC errors.
    pub retry_interval_max: Duration,
    /// Pause between two attempts to connect, and of I/O after the RPC error EHOSTDOWN.
    pub host_down_interval: Duration,
    /// How long a connection whose server is stopping may take to answer what is in flight before it is given up.
    pub health_check_interval: Duration,
    /// Pause between keep-alives.
    pub heartbeat_interval: Duration,
    /// How long the answer to a keep-alive is waited for.
    pub heartbeat_timeout: Duration,
    /// Folder of the log file (C API only).
    pub log_dir: PathBuf,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{path}: {error}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's word.
        error: io::Error,
    },
    /// A key every file has is not there.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A value that cannot be.
    #[error("{key}={value}: want {want}")]
    Value {
        /// The key.
        key: &'static str,
        /// As it stands in the file.
        value: String,
        /// What it should be.
        want: &'static str,
    },
}

impl Default for Config {
    fn default() -> Self {
        Self {
            server_address: "/data/nebd/nebd.sock".into(),
            lock_dir: "/data/nebd/lock".into(),
            sync_attempts: 50,
            retry_interval: Duration::from_millis(100),
            retry_interval_max: Duration::from_secs(64),
            host_down_interval: Duration::from_millis(10),
            health_check_interval: Duration::from_secs(1),
            heartbeat_interval: Duration::from_secs(5),
            heartbeat_timeout: Duration::from_millis(500),
            log_dir: "/data/log/nebd/client".into(),
        }
    }
}

impl Config {
    /// Reads a file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read(path).map_err(|error| ConfigError::Read { path: path.into(), error })?;
        Self::parse(&String::from_utf8_lossy(&text))
    }

    /// Reads the text of a file.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let values = Values::new(text);
        // C++ wants these as well; they steer brpc's probing of a lost server. Here a request that waits connects.
        values.number("request.rpcMaxDelayHealthCheckIntervalMs", 0)?;
        if values.0.contains_key("request.rpcSendExecQueueNum") {
            values.number("request.rpcSendExecQueueNum", 0)?;
        }
        let attempts = values.number("request.syncRpcMaxRetryTimes", 1)?;
        Ok(Self {
            server_address: values.path("nebdserver.serverAddress")?,
            lock_dir: values.path("metacache.fileLockPath")?,
            sync_attempts: u32::try_from(attempts).unwrap_or(u32::MAX),
            retry_interval: Duration::from_micros(values.number("request.rpcRetryIntervalUs", 1)?),
            retry_interval_max: Duration::from_micros(values.number("request.rpcRetryMaxIntervalUs", 1)?),
            host_down_interval: Duration::from_micros(values.number("request.rpcHostDownRetryIntervalUs", 1)?),
            health_check_interval: Duration::from_secs(values.number("request.rpcHealthCheckIntervalS", 0)?),
            heartbeat_interval: Duration::from_secs(values.number("heartbeat.intervalS", 1)?),
            heartbeat_timeout: Duration::from_millis(values.number("heartbeat.rpcTimeoutMs", 1)?),
            log_dir: values.path("log.path")?,
        })
    }
}

struct Values(BTreeMap<String, String>);

impl Values {
    fn new(text: &str) -> Self {
        let mut values = BTreeMap::new();
        for line in text.lines() {
            let comment = line
                .char_indices()
                .zip(line.chars().skip(1))
                .find_map(|((at, before), here)| (before.is_whitespace() && here == '#').then_some(at));
            let line = line.get(..comment.unwrap_or(line.len())).unwrap_or_default();
            let line: String = line.chars().filter(|c| !c.is_whitespace()).collect();
            if let Some((key, value)) = line.split_once('=')
                && !line.starts_with('#')
            {
                values.insert(key.to_owned(), value.to_owned());
            }
        }
        Self(values)
    }

    fn text(&self, key: &'static str) -> Result<&str, ConfigError> {
        self.0.get(key).map(String::as_str).ok_or(ConfigError::Missing(key))
    }

    fn path(&self, key: &'static str) -> Result<PathBuf, ConfigError> {
        let value = self.text(key)?;
        if value.is_empty() {
            return Err(ConfigError::Value { key, value: String::new(), want: "a path" });
        }
        Ok(value.into())
    }

    /// A number up to a few thousand years in the smallest unit: no sum of times overflows.
    fn number(&self, key: &'static str, least: u64) -> Result<u64, ConfigError> {
        const MOST: u64 = 1 << 36;
        let value = self.text(key)?;
        let number = value.parse().ok().filter(|number| (least..=MOST).contains(number));
        let want = if least == 0 { "a number" } else { "a number above 0" };
        number.ok_or_else(|| ConfigError::Value { key, value: value.to_owned(), want })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHIPPED: &str = "
# the packaged file
nebdserver.serverAddress=/data/nebd/nebd.sock  # __CURVEADM_TEMPLATE__ x=y
metacache.fileLockPath = /data/nebd/lock
request.syncRpcMaxRetryTimes=50
request.rpcRetryIntervalUs=100000
request.rpcRetryMaxIntervalUs=64000000
request.rpcHostDownRetryIntervalUs=10000
request.rpcHealthCheckIntervalS=1
\trequest.rpcMaxDelayHealthCheckIntervalMs=100
request.rpcSendExecQueueNum=2
heartbeat.intervalS=5
heartbeat.rpcTimeoutMs=500
log.path=/data/log/nebd/client
something.else=1
a line without anything
";

    #[test]
    fn the_packaged_file_has_the_default_values() {
        assert_eq!(Config::parse(SHIPPED).unwrap(), Config::default());
        let hash = SHIPPED.replace("/data/nebd/lock", "/a#b");
        assert_eq!(Config::parse(&hash).unwrap().lock_dir, Path::new("/a#b"), "only ` #` begins a comment");
    }

    #[test]
    fn every_key_but_one_must_be_there_and_hold_a_sane_value() {
        let lines: Vec<&str> = SHIPPED.lines().filter(|line| line.contains('=') && !line.contains("else")).collect();
        assert_eq!(lines.len(), 12);
        for gone in &lines {
            let key = gone.trim().split('=').next().unwrap().trim();
            let text = lines.iter().filter(|line| line != &gone).copied().collect::<Vec<_>>().join("\n");
            match Config::parse(&text) {
                Err(ConfigError::Missing(missing)) => assert_eq!(missing, key),
                Ok(_) => assert_eq!(key, "request.rpcSendExecQueueNum"),
                Err(other) => panic!("{other}"),
            }
            for bad in ["", "x", "-1", "99999999999999999999"] {
                let text = format!("{text}\n{key}={bad}");
                let is_path = ["server", "Path", "path"].iter().any(|word| key.contains(word));
                assert_eq!(Config::parse(&text).is_err(), !is_path || bad.is_empty(), "{key}={bad}");
            }
        }
        let zero = SHIPPED.replace("intervalS=5", "intervalS=0");
        assert!(matches!(Config::parse(&zero), Err(ConfigError::Value { key: "heartbeat.intervalS", .. })));
        assert!(matches!(Config::load("/nonexistent".as_ref()), Err(ConfigError::Read { .. })));
    }
}
