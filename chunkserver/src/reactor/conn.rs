//! A connection of a reactor: what is spoken on it, and what it is in the middle of.

use crate::io::buffer::RecvBuf;
use crate::io::{ConnId, Instant};
use crate::{nbd, peer, rpc};
use bytes::Bytes;

/// What is spoken on a connection.
#[derive(Debug)]
pub(super) enum Session {
    Rpc(Box<rpc::Connection>),
    /// The same bytes, other methods.
    Nebd(Box<rpc::Connection>),
    Nbd(Box<nbd::Session>),
    /// A peer called us.
    Peer(Box<peer::Inbound>),
    /// We called a peer: a link of `Reactor::peers`.
    Link(usize),
    /// We called a server for a volume: one of `Reactor::remote`.
    Server(usize),
}

/// A connection.
#[derive(Debug)]
pub(super) struct Conn {
    pub(super) id: ConnId,
    pub(super) serial: u32,
    pub(super) session: Session,
    /// Received and not yet used.
    pub(super) input: Option<(RecvBuf, usize)>,
    pub(super) receiving: bool,
    /// When bytes last arrived.
    pub(super) moved: Instant,
    pub(super) sending: bool,
    /// What a send that was cut off did not send.
    pub(super) unsent: Vec<Bytes>,
    pub(super) listed: bool,
    pub(super) touched: bool,
    /// To be closed; nothing more is read or sent.
    pub(super) doomed: bool,
    pub(super) close_sent: bool,
    pub(super) close_done: bool,
}

impl Conn {
    pub(super) fn gone(&self) -> bool {
        self.close_done && !self.receiving && !self.sending
    }
    /// Its client is a disk's user: while the server stops, nothing new is read from it.
    pub(super) fn is_of_a_volume(&self) -> bool {
        matches!(self.session, Session::Nbd(_) | Session::Nebd(_))
    }
    /// During a hand-over nothing is received from it.
    pub(super) fn is_heard(&self) -> bool {
        self.is_client() || matches!(self.session, Session::Nebd(_))
    }
    /// Its connection goes over in a hand-over. (NEBD's clients connect anew and send again what is unanswered.)
    pub(super) fn is_client(&self) -> bool {
        matches!(self.session, Session::Rpc(_) | Session::Nbd(_))
    }
    /// Has answers to send.
    pub(super) fn owes_bytes(&self) -> bool {
        match &self.session {
            Session::Rpc(c) => c.backlog_bytes() > 0,
            Session::Nbd(s) => s.backlog_bytes() > 0,
            _ => false,
        }
    }
    /// Owes nothing but bytes, and no more of the client's can arrive.
    pub(super) fn is_held(&self) -> bool {
        match &self.session {
            _ if self.doomed => true,
            Session::Rpc(c) => !self.receiving && c.requests() == 0,
            Session::Nbd(s) => !self.receiving && s.requests_in_flight() == 0,
            Session::Nebd(_) => !self.receiving,
            Session::Peer(_) | Session::Link(_) | Session::Server(_) => true,
        }
    }
    /// Socket, session, what was received and not used, what was cut off.
    pub(super) fn dismantled(self) -> (ConnId, Session, Bytes, Vec<Bytes>) {
        let rest =
            self.input.map_or_else(Bytes::new, |(data, at)| Bytes::copy_from_slice(data.get(at..).unwrap_or_default()));
        (self.id, self.session, rest, self.unsent)
    }
    /// In the middle of a payload, with memory for all of it.
    pub(super) fn holds_payload(&self) -> bool {
        match &self.session {
            Session::Rpc(c) | Session::Nebd(c) => c.holds_payload(),
            Session::Nbd(s) => s.holds_payload(),
            Session::Peer(p) => p.holds_payload(),
            Session::Link(_) | Session::Server(_) => false, // of servers `remote` knows
        }
    }
    /// Owes no answer and has none queued.
    pub(super) fn is_quiet(&self) -> bool {
        match &self.session {
            Session::Rpc(c) => c.requests() == 0 && c.backlog_bytes() == 0,
            // What is unanswered and not running is sent again, to whoever serves next.
            Session::Nebd(c) => c.backlog_bytes() == 0,
            Session::Nbd(s) => s.requests_in_flight() == 0 && s.backlog_bytes() == 0,
            Session::Peer(_) | Session::Link(_) | Session::Server(_) => true, // nobody waits for an answer
        }
    }
}
