//! Before a ring is there: what the kernel must have, why a ring cannot be made, and how shards find each other's.

use io_uring::{IoUring, opcode};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicI32;

/// Oldest kernel this was built for.
pub const KERNEL_MIN: &str = "6.1";

/// Why io_uring cannot be used here. There is no fallback engine (decision 0001).
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The kernel has no io_uring.
    #[error("this kernel has no io_uring; Linux {KERNEL_MIN} or newer is needed")]
    Missing,
    /// A policy forbids it.
    #[error(
        "io_uring is forbidden here (seccomp profile, or sysctl kernel.io_uring_disabled); allow it and start again"
    )]
    Forbidden,
    /// A feature is missing.
    #[error("io_uring of this kernel lacks {0}; Linux {KERNEL_MIN} or newer is needed")]
    TooOld(&'static str),
    /// Not enough memory to lock.
    #[error("io_uring could not lock memory for its rings; raise RLIMIT_MEMLOCK")]
    Memlock,
    /// Anything else.
    #[error("io_uring: {0}")]
    Other(#[from] std::io::Error),
}

pub(super) fn classify(error: std::io::Error) -> SetupError {
    match error.raw_os_error() {
        Some(libc::ENOSYS) => SetupError::Missing,
        Some(libc::EPERM | libc::EACCES) => SetupError::Forbidden,
        Some(libc::EINVAL) => SetupError::TooOld("SINGLE_ISSUER or DEFER_TASKRUN"),
        Some(libc::ENOMEM) => SetupError::Memlock,
        _ => SetupError::Other(error),
    }
}

/// Try what a shard needs and throw it away again: the start-up probe.
///
/// # Errors
/// Says in one line what is missing.
pub fn probe() -> Result<(), SetupError> {
    let ring = build(8)?;
    let mut probe = io_uring::Probe::new();
    ring.submitter().register_probe(&mut probe).map_err(classify)?;
    for (code, name) in [
        (opcode::Writev::CODE, "WRITEV"),
        (opcode::ReadFixed::CODE, "READ_FIXED"),
        (opcode::Accept::CODE, "ACCEPT"),
        (opcode::Connect::CODE, "CONNECT"),
        (opcode::LinkTimeout::CODE, "LINK_TIMEOUT"),
        (opcode::Recv::CODE, "RECV"),
        (opcode::SendMsg::CODE, "SENDMSG"),
        (opcode::Shutdown::CODE, "SHUTDOWN"),
        (opcode::MsgRingData::CODE, "MSG_RING"),
        (opcode::AsyncCancel::CODE, "ASYNC_CANCEL"),
    ] {
        if !probe.is_supported(code) {
            return Err(SetupError::TooOld(name));
        }
    }
    Ok(())
}

/// Whether the kernel knows this operation.
pub(super) fn supports(ring: &IoUring, code: u8) -> bool {
    let mut probe = io_uring::Probe::new();
    ring.submitter().register_probe(&mut probe).is_ok() && probe.is_supported(code)
}

/// A ring for one shard.
pub(super) fn build(entries: u32) -> Result<IoUring, SetupError> {
    let mut builder = IoUring::builder();
    builder.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag().setup_submit_all();
    builder.setup_cqsize(entries * 4);
    builder.build(entries).map_err(classify)
}

/// How a shard finds the others to wake them: ring and event fd of each.
#[derive(Debug)]
pub struct Doorbells {
    pub(super) rings: Vec<AtomicI32>,
    pub(super) events: Vec<OwnedFd>,
}

impl Doorbells {
    /// For `shards` shards.
    ///
    /// # Errors
    /// When the process is out of file descriptors.
    pub fn new(shards: u16) -> std::io::Result<Arc<Self>> {
        let events = (0..shards)
            .map(|_| Ok(rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)?))
            .collect::<std::io::Result<_>>()?;
        Ok(Arc::new(Self { rings: (0..shards).map(|_| AtomicI32::new(-1)).collect(), events }))
    }

    /// Wake a shard from a thread without a ring (the control thread). One system call.
    pub fn ring(&self, shard: u16) {
        if let Some(event) = self.events.get(usize::from(shard)) {
            let _ = rustix::io::write(event, &1u64.to_ne_bytes());
        }
    }
}
