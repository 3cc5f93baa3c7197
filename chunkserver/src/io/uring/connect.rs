//! Outgoing connections: a socket is made, connected by the ring, and given up by a linked timeout.
//!
//! The socket, its address and the timeout live in the flight, boxed, until the kernel has answered; a socket that did
//! not get connected is closed with it. Sockets are blocking, as accepted ones are: on a non-blocking one the ring would
//! answer EAGAIN instead of waiting.

use super::flight::Kind;
use super::{IGNORE, Uring};
use crate::io::{Address, ConnId, Errno, Token};
use io_uring::types::{Fd, Timespec};
use io_uring::{opcode, squeue};
use socket2::{Domain, SockAddr, Socket, Type};
use std::net::SocketAddrV4;
use std::os::fd::{AsRawFd, IntoRawFd};

/// A connection under way.
pub(super) struct Connecting {
    /// Why there is no socket; taken when it is connected.
    socket: Result<Option<Socket>, Errno>,
    timeout: Timespec,
    address: Option<SockAddr>,
}

impl Connecting {
    fn new(address: &Address, timeout_ms: u32) -> Self {
        let timeout = Timespec::new().sec(u64::from(timeout_ms / 1000)).nsec(timeout_ms % 1000 * 1_000_000);
        match open(address) {
            Ok((socket, address)) => Self { socket: Ok(Some(socket)), timeout, address: Some(address) },
            Err(error) => {
                let error = Errno(error.raw_os_error().unwrap_or(libc::EINVAL));
                Self { socket: Err(error), timeout, address: None }
            }
        }
    }

    /// What the kernel said.
    pub(super) fn finish(&mut self, result: i32) -> Result<ConnId, Errno> {
        let socket = self.socket.as_mut().map_err(|error| *error)?.take();
        match (result, socket) {
            (0.., Some(socket)) => Ok(ConnId(socket.into_raw_fd())),
            (_, None) => Err(Errno(libc::EBADF)),
            // The linked timeout cancels it.
            (error, _) if error == -libc::ECANCELED || error == -libc::EINTR => Err(Errno(libc::ETIMEDOUT)),
            (error, _) => Err(Errno(-error)),
        }
    }
}

fn open(address: &Address) -> std::io::Result<(Socket, SockAddr)> {
    match address {
        Address::Tcp(ip, port) => {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            socket.set_tcp_nodelay(true)?;
            Ok((socket, SocketAddrV4::new(*ip, *port).into()))
        }
        Address::Unix(path) => Ok((Socket::new(Domain::UNIX, Type::STREAM, None)?, SockAddr::unix(path)?)),
    }
}

impl Uring {
    pub(super) fn submit_connect(&mut self, token: Token, address: &Address, timeout_ms: u32) {
        let connecting = Box::new(Connecting::new(address, timeout_ms));
        let entries = match (&connecting.socket, &connecting.address) {
            (Ok(Some(socket)), Some(address)) => {
                let connect = opcode::Connect::new(Fd(socket.as_raw_fd()), address.as_ptr().cast(), address.len());
                let timeout = opcode::LinkTimeout::new(&raw const connecting.timeout).build();
                Some((connect.build().flags(squeue::Flags::IO_LINK), timeout.user_data(IGNORE)))
            }
            _ => None,
        };
        let slot = u64::from(self.take(token, Kind::Connect(connecting)));
        match entries {
            Some((connect, timeout)) => {
                // A link ends with the submission.
                self.make_room(2);
                self.push(&connect.user_data(slot));
                self.push(&timeout);
            }
            // Nothing to connect: the answer comes by way of the ring all the same.
            None => self.push(&opcode::Nop::new().build().user_data(slot)),
        }
    }
}
