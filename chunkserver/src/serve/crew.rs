//! The threads of the shards from outside: what they are given when they may touch the disk, and what they leave.

use crate::control::shards::Port;
use crate::io::ConnId;
use crate::io::uring::Uring;
use crate::reactor::handover::{Handed, Parting, SavedSession};
use crate::volume::catalog::SharedCatalog;
use std::os::fd::{IntoRawFd, OwnedFd};
use std::sync::mpsc::Sender;

/// What a shard that was left for a hand-over leaves.
#[derive(Default)]
pub(super) struct Left {
    pub(super) control: Option<Port>,
    pub(super) clients: Vec<Client>,
}

/// A client's connection between two lives.
pub(super) struct Client {
    pub(super) socket: OwnedFd,
    pub(super) session: SavedSession,
    pub(super) input: Vec<u8>,
    pub(super) unsent: Vec<u8>,
}

/// The threads of the shards: they have their rings and wait to be told to begin.
pub(super) struct Crew {
    pub(super) threads: Vec<std::thread::JoinHandle<()>>,
    pub(super) begin: Vec<Sender<Begin>>,
}

/// What a shard is given when it may touch the disk.
pub(super) struct Begin {
    pub(super) clients: Vec<Client>,
    pub(super) catalog: SharedCatalog,
}

impl Crew {
    /// Begin, with these connections.
    pub(super) fn go(&self, clients: Vec<Client>, catalog: &SharedCatalog) {
        let mut shares: Vec<Vec<Client>> = self.begin.iter().map(|_| Vec::new()).collect();
        let count = shares.len().max(1);
        for (number, client) in clients.into_iter().enumerate() {
            if let Some(share) = shares.get_mut(number % count) {
                share.push(client);
            }
        }
        for (begin, clients) in self.begin.iter().zip(shares) {
            let _ = begin.send(Begin { clients, catalog: catalog.clone() }); // one that has failed has said so
        }
    }
}

impl Left {
    pub(super) fn of(parting: Parting<Uring>) -> Self {
        let Parting { mut io, control, connections } = parting;
        let clients = connections.into_iter().map(|handed| {
            let Handed { conn, session, input, unsent } = handed;
            Client { socket: io.release(conn), session, input, unsent }
        });
        let clients = clients.collect();
        io.retire();
        Self { control, clients }
    }
}

impl Client {
    pub(super) fn handed(self) -> Handed {
        let conn = ConnId(self.socket.into_raw_fd());
        Handed { conn, session: self.session, input: self.input, unsent: self.unsent }
    }
}
