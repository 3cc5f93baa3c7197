//! What the commands and the server say to each other over `ctl.sock`: one line of JSON each way per command.

use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Longest line, bytes.
pub const LINE_BYTES_MAX: usize = 1 << 20;

/// A command to a running server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Command {
    /// Create a volume.
    VolumeCreate {
        /// Name.
        name: String,
        /// Bytes.
        size: u64,
        /// (pool, copyset) pairs in mapping order; empty = all copysets of this server.
        copysets: Vec<(u32, u32)>,
        /// Servers that have these copysets; empty = this server, and whom its replicas know.
        #[serde(default)]
        peers: Vec<String>,
        /// Id of a volume that another server describes too.
        #[serde(default)]
        id: Option<u32>,
        /// Bytes of a chunk, if not this server's.
        #[serde(default)]
        chunk_size: Option<u32>,
        /// Bytes, 0 = not striped.
        stripe_unit: u32,
        /// Chunks side by side, 0 = not striped.
        stripe_count: u32,
    },
    /// List volumes.
    VolumeList,
    /// Delete a volume and its chunks.
    VolumeDelete {
        /// Name.
        name: String,
    },
    /// Make a volume larger.
    VolumeResize {
        /// Name.
        name: String,
        /// New size, bytes.
        size: u64,
    },
    /// Create copysets with this server as the only member.
    CopysetCreate {
        /// Logical pool.
        pool: u32,
        /// First copyset id.
        first: u32,
        /// How many.
        count: u32,
    },
    /// List copysets.
    CopysetList,
    /// One copyset.
    CopysetStatus {
        /// Logical pool.
        pool: u32,
        /// Copyset id.
        copyset: u32,
    },
    /// Destroy a copyset and its chunks.
    CopysetDelete {
        /// Logical pool.
        pool: u32,
        /// Copyset id.
        copyset: u32,
    },
    /// Take a copyset out of the trash.
    CopysetRestore {
        /// Logical pool.
        pool: u32,
        /// Copyset id.
        copyset: u32,
    },
    /// The server and its shards.
    Status,
    /// Hand over to a new process.
    Upgrade {
        /// Program; `None` = the path this one was started from.
        binary: Option<PathBuf>,
        /// How long the new one may take from when it has everything until it can serve, milliseconds.
        timeout_ms: u64,
    },
    /// Change the log filter.
    LogLevel {
        /// As `log` in the configuration.
        filter: String,
    },
}

/// What the server answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Done.
    Ok(serde_json::Value),
    /// Not done, and why.
    Error(String),
}

/// Why a command got no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// No server.
    #[error("no server answers at {path}: {source}")]
    Connect {
        /// Socket.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// Broken off.
    #[error("the server broke off: {0}")]
    Broken(#[from] std::io::Error),
    /// Not JSON.
    #[error("the server's answer is not understood: {0}")]
    Json(#[from] serde_json::Error),
    /// It said no.
    #[error("{0}")]
    Refused(String),
}

/// Send a command, wait for the answer.
///
/// # Errors
/// [`CallError`].
pub fn call(socket: &Path, command: &Command) -> Result<serde_json::Value, CallError> {
    let connect = |source| CallError::Connect { path: socket.to_owned(), source };
    let mut stream = UnixStream::connect(socket).map_err(connect)?;
    stream.set_read_timeout(Some(Duration::from_secs(600)))?;
    let mut line = serde_json::to_vec(command)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut answer = String::new();
    BufReader::new(stream).take(64 << 20).read_line(&mut answer)?;
    if answer.is_empty() {
        return Err(CallError::Broken(std::io::ErrorKind::UnexpectedEof.into()));
    }
    match serde_json::from_str(&answer)? {
        Answer::Ok(value) => Ok(value),
        Answer::Error(why) => Err(CallError::Refused(why)),
    }
}
