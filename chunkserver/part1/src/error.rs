//! What can go wrong with a call.

use std::path::PathBuf;

use crate::request::MAX_IO;

/// Why a call came to nothing. In the C API each of them is −1.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The server answered kNoOK.
    #[error("the server refused the call")]
    Refused,
    /// All attempts of a call with a budget failed.
    #[error("{attempts} attempts failed, the last one: {last}")]
    Attempts {
        /// How many.
        attempts: u32,
        /// Why the last one failed.
        last: Failure,
    },
    /// The server said kOK and sent something that cannot be it; trying again would not help.
    #[error("an unusable reply: {0}")]
    Reply(&'static str),
    /// More than a frame can carry.
    #[error("{0} bytes are more than the {MAX_IO} that one request may move")]
    TooLarge(u64),
    /// The file is open in this host already: its lock is held.
    #[error("{0} is locked: the file is open on this host")]
    Locked(PathBuf),
    /// The lock file cannot be made.
    #[error("lock file {path}: {error}")]
    Lock {
        /// The lock file.
        path: PathBuf,
        /// The system's word.
        error: String,
    },
    /// The server gave the new file a number that another open file has: it has forgotten its files. The new one was
    /// closed again, as requests for the old one would have reached it.
    #[error("the server's number {0} belongs to another open file")]
    FdInUse(i32),
    /// The client was shut down.
    #[error("the client is stopped")]
    Stopped,
}

/// Why an attempt got no answer. What the answer says is never a failure in this sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// No connection, or it broke before the answer.
    #[error("no connection to the server")]
    HostDown,
    /// The RPC failed with this code.
    #[error("RPC error {0}")]
    Rpc(i32),
    /// The answer is none: a required field is missing, a value is unknown.
    #[error("an unreadable reply")]
    BadReply,
    /// No answer in time.
    #[error("no answer in time")]
    TimedOut,
}
