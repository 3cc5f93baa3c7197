//! NEBD part2: volumes for clients of Curve's libnebd (QEMU, tgt, curve-nbd), over a Unix socket.
//!
//! [`service`] understands calls and writes answers, [`files`] decides which of them may run and when, [`server`] is
//! what shards share of it, [`executor`] the seam to volumes, [`metafile`] what survives a restart. The reactor
//! (`reactor/nebd.rs`) carries calls between them and runs the I/O; the worker (`control/nebd.rs`) does the slow work.

pub mod conf;
pub mod executor;
pub mod files;
pub mod metafile;
pub mod name;
pub mod server;
pub mod service;
pub mod stat;
