//! The listening sockets of the process: made, or inherited from the process that hands over.

use super::nebd;
use crate::config::Config;
use crate::io::ListenerId;
use crate::reactor::Protocol;
use anyhow::Context;
use socket2::{Domain, SockAddr, Socket, Type};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::time::{Duration, Instant};

const BACKLOG: i32 = 4096;

/// The listening sockets of the process.
pub(super) struct Sockets {
    pub(super) all: Vec<(Socket, Protocol)>,
    pub(super) rpc_address: SocketAddr,
}

impl Sockets {
    /// Those that are `inherited` are not made anew; what nobody wants of them is closed. NEBD's is locked already.
    pub(super) fn bind(config: &Config, wait: Duration, inherited: Vec<Socket>) -> anyhow::Result<Self> {
        let until = Instant::now() + wait;
        let taking_over = !inherited.is_empty();
        let mut inherited = Inherited(inherited);
        let tcp = |address, until, from: &mut Inherited| from.tcp(address).map_or_else(|| tcp(address, until), Ok);
        let unix = |path: &Path, from: &mut Inherited| from.unix(path).map_or_else(|| unix(path, taking_over), Ok);
        let rpc = tcp(config.listen, until, &mut inherited).with_context(|| format!("listen on {}", config.listen))?;
        let rpc_address = rpc.local_addr()?.as_socket().context("an IP address")?;
        let mut all = vec![(rpc, Protocol::Rpc)];
        if let Some(address) = config.nbd_listen {
            let socket = tcp(address, until, &mut inherited);
            all.push((socket.with_context(|| format!("listen on {address}"))?, Protocol::Nbd));
        }
        if let Some(path) = &config.nbd_socket {
            let socket = unix(path, &mut inherited);
            all.push((socket.with_context(|| format!("listen on {}", path.display()))?, Protocol::Nbd));
        }
        if let Some(nebd) = &config.nebd {
            let socket = inherited.unix(&nebd.socket).map_or_else(|| nebd::listen(&nebd.socket), Ok)?;
            all.push((socket, Protocol::Nebd));
        }
        Ok(Self { all, rpc_address })
    }
    pub(super) fn fds(&self) -> Vec<RawFd> {
        self.all.iter().map(|s| s.0.as_raw_fd()).collect()
    }
    pub(super) fn listeners(&self) -> Vec<(ListenerId, Protocol)> {
        self.all.iter().zip(0..).map(|((_, protocol), i)| (ListenerId(i), *protocol)).collect()
    }
}

/// Listening sockets of another process.
struct Inherited(Vec<Socket>);

impl Inherited {
    fn take(&mut self, wanted: impl Fn(&SockAddr) -> bool) -> Option<Socket> {
        let found = self.0.iter().position(|socket| socket.local_addr().is_ok_and(|address| wanted(&address)))?;
        Some(self.0.swap_remove(found))
    }
    fn tcp(&mut self, address: SocketAddr) -> Option<Socket> {
        self.take(|at| at.as_socket() == Some(address))
    }
    fn unix(&mut self, path: &Path) -> Option<Socket> {
        self.take(|at| is_at(at, path))
    }
}

fn is_at(address: &SockAddr, path: &Path) -> bool {
    address.as_pathname() == Some(path)
}

/// One of these listens at this path.
pub(super) fn has_path(sockets: &[Socket], path: &Path) -> bool {
    sockets.iter().any(|socket| socket.local_addr().is_ok_and(|address| is_at(&address, path)))
}

/// An ended process may still hold the port for a moment, and say so at either call: both are retried (rule 2).
fn tcp(address: SocketAddr, until: Instant) -> std::io::Result<Socket> {
    let attempt = || -> std::io::Result<Socket> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.set_tcp_nodelay(true)?; // inherited by accepted sockets
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        Ok(socket)
    };
    loop {
        match attempt() {
            Err(e) if e.kind() == std::io::ErrorKind::AddrInUse && Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(20));
            }
            other => return other,
        }
    }
}

/// A name that is left of an ended server is taken from it. That it has ended is known by the lock of the disk, the catalog
/// or NEBD's socket; a process that takes over does not have them yet (but for the last), so it asks.
pub(super) fn unix(path: &Path, ask: bool) -> std::io::Result<Socket> {
    if ask && is_listening(path)? {
        return Err(std::io::ErrorKind::AddrInUse.into());
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.bind(&SockAddr::unix(path)?)?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

/// Somebody listens there, perhaps too busy to take us.
fn is_listening(path: &Path) -> std::io::Result<bool> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    let refused = [std::io::ErrorKind::NotFound, std::io::ErrorKind::ConnectionRefused];
    Ok(socket.connect(&SockAddr::unix(path)?).map_or_else(|error| !refused.contains(&error.kind()), |()| true))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_somebody_listens_at_is_not_taken() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.sock");
        let first = unix(&path, true).unwrap();
        assert_eq!(unix(&path, true).unwrap_err().kind(), std::io::ErrorKind::AddrInUse);
        let other_spelling = folder.path().join(".").join("a.sock");
        assert_eq!(unix(&other_spelling, true).unwrap_err().kind(), std::io::ErrorKind::AddrInUse);
        assert!(is_listening(&path).unwrap(), "it has its name still");
        assert!(has_path(std::slice::from_ref(&first), &path));
        drop(first);
        assert!(path.exists() && !is_listening(&path).unwrap());
        drop(unix(&path, true).unwrap());
        drop(unix(&path, false).unwrap());
    }
}
