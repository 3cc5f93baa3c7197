//! NEBD's client side, part1: block I/O on volumes that a part2 on the same host serves over a Unix socket.
//!
//! Two faces of one client: [`NebdClient`] for Rust, whose futures run on any executor or none ([`block_on`]), and
//! [`ffi`], libnebd's C API, for which the crate is also built as `libnebd.so` (header: `include/libnebd.h`).
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let client = nebd::NebdClient::new(nebd::Config::load("/etc/nebd/nebd-client.conf".as_ref())?)?;
//! let fd = nebd::block_on(client.open("cbd:pool//volume_user_", None))?;
//! nebd::block_on(client.write(fd, 0, vec![7; 4096].into()))?;
//! assert_eq!(nebd::block_on(client.read(fd, 0, 4096))?, [7; 4096]);
//! nebd::block_on(client.close(fd))?;
//! # Ok(()) }
//! ```
//!
//! # What it promises
//! * One connection, any number of requests in flight, one thread of its own. A request is sent by the thread that makes
//!   it; what is made inside a callback leaves with everything else of that turn, in one system call.
//! * I/O waits for the server as long as it takes: a broken connection is opened anew and what was unanswered is sent
//!   again. So a write may be executed twice, and there is no order among requests in flight. Calls that are answered
//!   while the caller waits (open, close, sizes) give up after a number of attempts.
//! * A buffer handed in is not looked at any more once its request is complete.
//! * Bytes from the server are hostile: what does not fit is an error or ends the connection, memory is bounded.
//!
//! # Rooms
//! `config`, `error`, `lock`: what they say. `request`: what is asked, and what a reply means. `outgoing`: frames on their
//! way. `exchange`: the requests and their retries, without a socket or a clock. `driver`: the thread with both.
//! `client`: the API. `ffi`: the C API, the only room with `unsafe`.
#![deny(unsafe_code)]

mod client;
mod config;
mod driver;
mod error;
mod exchange;
#[allow(unsafe_code, reason = "pointers of C callers")]
pub mod ffi;
mod inbox;
mod lock;
mod logging;
mod outgoing;
mod request;
mod wait;

pub use client::{Completion, FileInfo, Io, NebdClient, NebdFd, OpenFlags};
pub use config::{Config, ConfigError};
pub use error::{Error, Failure};
pub use exchange::Stats;
pub use request::{MAX_IO, ReadBuffer};
pub use wait::block_on;
