//! Sockets of a reactor: accept, receive, send, close. What the bytes mean is the sessions' business.
//!
//! A connection stays in its slot until every operation on it has come back, so a slot's completions never reach a
//! later connection. A client that stalls or does not read its replies only makes its own connection wait.

use super::conn::{Conn, Session};
use super::handover::Stage;
use super::{Owner, Protocol, Reactor, token};
use crate::io::buffer::{PoolBuf, RecvBuf};
use crate::io::{ConnId, Done, Errno, Io, ListenerId, Op};
use crate::metrics::Counter;
use crate::nbd;
use crate::peer;
use crate::rpc;
use bytes::Bytes;

/// Accepts in flight per listener.
const ACCEPTS: usize = 4;
/// Buffers of one vectored send.
const SEND_BUFS: usize = 256;
/// A payload that did not grow for this long gives up its buffer when others wait for one: its connection is closed.
const STALL_MS: u64 = 1000;
/// Pause after accept failed (out of file descriptors, most likely), milliseconds.
const ACCEPT_PAUSE_MS: u64 = 50;

impl<I: Io> Reactor<I> {
    /// Arm the listeners at start and after a pause.
    pub(super) fn accept_more(&mut self) {
        let due = self.accept_again.is_some_and(|at| at <= self.io.now());
        let may = self.shard.serving() && self.stage == Stage::Serve && self.accepting == 0;
        if !due || !may {
            if due {
                self.accept_again = Some(self.io.now().after_ms(1)); // not before start-up is over
            }
            return;
        }
        self.accept_again = None;
        for (i, &(listener, _)) in self.setup.listeners.iter().enumerate() {
            for _ in 0..ACCEPTS {
                self.accepting += 1;
                self.io.submit(token(Owner::Accept, 0, i), Op::Accept { listener });
            }
        }
        if !self.setup.listeners.is_empty() {
            self.setup.shared.set_loaded();
        }
    }

    pub(super) fn accepted(&mut self, index: usize, done: Done) {
        let Some(&(listener, protocol)) = self.setup.listeners.get(index) else { return };
        self.accepting -= 1;
        match done {
            Done::Accept(Ok(conn)) => {
                self.context.metrics().add(Counter::Accepted, 1);
                let shard = self.round_robin();
                if shard.0 == self.number {
                    self.open(conn, protocol as u8);
                } else if let Err(conn) = self.setup.mailbox.send_connection(shard.0, conn, protocol as u8) {
                    self.open(conn, protocol as u8);
                }
                self.accept_one(index, listener);
            }
            Done::Accept(Err(Errno(libc::ECANCELED))) => {} // a hand-over; `accept_more` begins anew
            Done::Accept(Err(error)) => {
                if self.draining.is_none() {
                    tracing::debug!(%error, "accept failed");
                    let at = self.io.now().after_ms(ACCEPT_PAUSE_MS);
                    let serial = self.next_serial();
                    self.timers.push(std::cmp::Reverse((at, super::routing::ACCEPT_TIMER + index, serial)));
                }
            }
            other => unreachable!("an accept came back as {other:?}"),
        }
    }

    fn accept_one(&mut self, index: usize, listener: ListenerId) {
        if self.draining.is_none() && !self.is_holding() {
            self.accepting += 1;
            self.io.submit(token(Owner::Accept, 0, index), Op::Accept { listener });
        }
    }

    /// Try again after a pause.
    pub(super) fn accept_timer(&mut self, index: usize) {
        if let Some(&(listener, _)) = self.setup.listeners.get(index) {
            self.accept_one(index, listener);
        }
    }

    pub(super) fn serve(&mut self, id: ConnId, protocol: Protocol) {
        let session = match protocol {
            Protocol::Rpc => Session::Rpc(Box::new(rpc::Connection::new(self.options))),
            Protocol::Nebd => Session::Nebd(Box::new(rpc::Connection::new(self.nebd_options))),
            Protocol::Nbd => {
                let session = nbd::Session::new(self.setup.catalog.clone(), nbd::Limits::default());
                Session::Nbd(Box::new(session))
            }
        };
        self.add(id, session);
    }

    /// A connection begins.
    pub(super) fn add(&mut self, id: ConnId, session: Session) -> usize {
        self.context.metrics().add(Counter::Connections, 1);
        let serial = self.next_serial() & super::SERIAL_MASK;
        let index = self.conns.insert(Conn {
            id,
            serial,
            session,
            input: None,
            receiving: false,
            moved: self.io.now(),
            sending: false,
            unsent: Vec::new(),
            listed: false,
            touched: false,
            doomed: false,
            close_sent: false,
            close_done: false,
        });
        self.touch(index);
        index
    }

    /// Look at this connection at the end of the turn: send, receive, close.
    pub(super) fn touch(&mut self, index: usize) {
        if let Some(conn) = self.conns.get_mut(index)
            && !std::mem::replace(&mut conn.touched, true)
        {
            self.touched.push(index);
        }
    }

    pub(super) fn received(&mut self, index: usize, serial: u32, done: Done) {
        let now = self.io.now();
        let Some(conn) = self.conns.get_mut(index).filter(|c| c.serial == serial) else { return };
        conn.receiving = false;
        conn.moved = now;
        self.touch(index);
        match done {
            Done::Recv(Ok(data)) => self.input(index, data),
            // Every receive buffer is in use; they come back within the turn.
            Done::Recv(Err(Errno(libc::ENOBUFS | libc::EINTR | libc::EAGAIN | libc::ECANCELED))) => self.again = true,
            Done::Recv(Err(_)) => self.doom(index),
            Done::RecvInto { buf, result } => self.input_direct(index, buf, result),
            other => unreachable!("a receive came back as {other:?}"),
        }
    }

    fn input(&mut self, index: usize, data: RecvBuf) {
        let Some(conn) = self.conns.get_mut(index) else { return };
        if data.is_empty() {
            return self.doom(index); // half-closed peers are treated as gone, as brpc does
        }
        self.context.metrics().add(Counter::BytesIn, data.len() as u64);
        // It may have to wait: a held connection keeps none of the few receive buffers, peers need them.
        let held = self.stage.is_holding() && conn.is_heard();
        let data = if held { RecvBuf::new(Bytes::copy_from_slice(&data)) } else { data };
        conn.input = Some((data, 0));
        self.parse(index);
    }

    /// Bytes that another process received.
    pub(super) fn give_input(&mut self, index: usize, data: RecvBuf) {
        let Some(conn) = self.conns.get_mut(index) else { return };
        conn.input = Some((data, 0));
        self.wait_for_input(index);
    }

    /// Look again at what a connection has received.
    pub(super) fn wait_for_input(&mut self, index: usize) {
        let Some(conn) = self.conns.get_mut(index) else { return };
        if conn.input.is_some() && !std::mem::replace(&mut conn.listed, true) {
            self.unread.push(index);
        }
        self.touch(index);
    }

    fn input_direct(&mut self, index: usize, buf: PoolBuf, result: Result<usize, Errno>) {
        let now = self.io.now();
        // Of a server that was given up, `remote` has forgotten the buffer.
        let Some(conn) = self.conns.get_mut(index).filter(|conn| !conn.doomed) else { return };
        let added = match result {
            Ok(added) => added,
            Err(Errno(libc::EINTR | libc::EAGAIN | libc::ECANCELED)) => 0,
            Err(_) => return self.doom(index),
        };
        if added == 0 && result.is_ok() {
            return self.doom(index);
        }
        self.context.metrics().add(Counter::BytesIn, added as u64);
        match &mut conn.session {
            Session::Rpc(c) | Session::Nebd(c) => c.direct_done(buf, added, &mut self.incoming),
            Session::Nbd(s) => s.direct_done(now, buf, added, &mut self.nbd_events),
            Session::Peer(p) => {
                p.direct_done(buf, added);
                conn.input = Some((RecvBuf::new(Bytes::new()), 0));
                return self.parse(index);
            }
            Session::Server(server) => {
                self.remote.direct_done(*server, buf, added);
                conn.input = Some((RecvBuf::new(Bytes::new()), 0));
                return self.parse(index);
            }
            Session::Link(_) => {}
        }
        self.handle_incoming(index);
    }

    /// Let the session use what was received.
    fn parse(&mut self, index: usize) {
        while self.parse_some(index) {}
    }

    /// True if there is more to parse, now that what came of it so far is begun.
    fn parse_some(&mut self, index: usize) -> bool {
        let (now, holding) = (self.io.now(), self.is_holding());
        let Some(conn) = self.conns.get_mut(index) else { return false };
        if holding && conn.is_heard() {
            return false;
        }
        let Some((data, at)) = conn.input.take().filter(|_| !conn.doomed) else { return false };
        let mut rest = data.get(at..).unwrap_or_default();
        let arena = &self.setup.arenas.payload;
        let mut more = false;
        let (waits, starved, failed) = match &mut conn.session {
            Session::Rpc(c) | Session::Nebd(c) => match c.received(&mut rest, arena, &mut self.incoming) {
                Ok(rpc::Progress::Consumed) => (false, false, None),
                Ok(rpc::Progress::More) => {
                    more = true;
                    (false, false, None)
                }
                Ok(rpc::Progress::NoBuffer) => (true, true, None),
                Ok(rpc::Progress::Later) => (true, false, None),
                Err(reason) => (false, false, Some(reason.to_string())),
            },
            Session::Nbd(s) => match s.received(now, &mut rest, arena, &mut self.nbd_events) {
                Ok(nbd::Progress::Consumed) => (false, false, None),
                Ok(nbd::Progress::Stalled) => (true, true, None),
                Err(reason) => (false, false, Some(reason.to_string())),
            },
            Session::Peer(p) => {
                p.heard(now);
                match p.received(&mut rest, arena, &mut self.peer_mail) {
                    Ok(peer::Progress::Consumed) => (false, false, None),
                    Ok(peer::Progress::NoBuffer) => (true, true, None),
                    Ok(peer::Progress::Later) => (true, false, None),
                    Err(reason) => (false, false, Some(reason.to_string())),
                }
            }
            Session::Link(link) => {
                self.peers.received(now, *link, rest, &mut self.peer_events);
                (false, false, None)
            }
            Session::Server(server) => match self.remote.received(now, *server, &mut rest, arena) {
                Ok(waits) => (waits, waits, None),
                Err(reason) => (false, false, Some(reason.to_string())),
            },
        };
        if more {
            let at = data.len() - rest.len();
            conn.input = Some((data, at));
        } else if waits {
            // A connection that waits keeps none of the few receive buffers: the others need them.
            let kept = if data.is_pooled() {
                (RecvBuf::new(Bytes::copy_from_slice(rest)), 0)
            } else {
                let at = data.len() - rest.len();
                (data, at)
            };
            conn.input = Some(kept);
        }
        if waits {
            let counter = if starved { Counter::BufferStalls } else { Counter::BudgetStalls };
            if !std::mem::replace(&mut conn.listed, true) {
                self.context.metrics().add(counter, 1);
                self.unread.push(index);
            }
            self.starved |= starved;
        }
        self.handle_incoming(index);
        self.deliver_mail(index);
        if let Some(reason) = failed {
            tracing::debug!(reason, "closing a connection");
            self.context.metrics().add(Counter::ClosedByUs, 1);
            self.doom(index);
        }
        more
    }

    /// Somebody waits for payload memory: whoever stopped in the middle of a payload does not keep his (rule 15).
    pub(super) fn end_stalled(&mut self) {
        let now = self.io.now();
        if now < self.look_for_stalled {
            return;
        }
        self.look_for_stalled = now.after_ms(STALL_MS / 10);
        let answer = |conn: &Conn| matches!(conn.session, Session::Server(from) if self.remote.holds_payload(from));
        let holds = |conn: &Conn| conn.holds_payload() || answer(conn);
        let stalled = |conn: &Conn| !conn.doomed && conn.moved.after_ms(STALL_MS) <= now && holds(conn);
        let all: Vec<usize> = self.conns.iter().filter(|(_, c)| stalled(c)).map(|(index, _)| index).collect();
        for index in all {
            tracing::debug!("closing a connection that stopped in the middle of a payload");
            self.context.metrics().add(Counter::ClosedByUs, 1);
            self.doom(index);
        }
    }

    /// Connections that had to wait for memory or for their own replies.
    pub(super) fn retry_unread(&mut self) {
        let mut unread = std::mem::replace(&mut self.unread, std::mem::take(&mut self.spare));
        for index in unread.drain(..) {
            if let Some(conn) = self.conns.get_mut(index) {
                conn.listed = false;
                self.touch(index);
                self.parse(index);
            }
        }
        self.spare = unread;
    }

    /// At the end of a turn: send, receive on, close.
    pub(super) fn finish_sockets(&mut self) {
        let mut touched = std::mem::replace(&mut self.touched, std::mem::take(&mut self.spare));
        for index in touched.drain(..) {
            let Some(conn) = self.conns.get_mut(index) else { continue };
            conn.touched = false;
            self.start_send(index);
            self.start_receive(index);
            self.finish_close(index);
        }
        self.spare = touched;
    }

    fn start_send(&mut self, index: usize) {
        let cut = self.is_cut();
        let Some(conn) = self.conns.get_mut(index).filter(|c| !c.sending && !c.doomed) else { return };
        if cut && conn.is_client() {
            return;
        }
        let (bufs, finished) = match &mut conn.session {
            Session::Rpc(c) | Session::Nebd(c) => (c.take_send(SEND_BUFS), c.is_finished()),
            Session::Nbd(s) => (s.take_send().into_iter().collect(), s.is_finished()),
            Session::Peer(p) => (p.take_send(SEND_BUFS), p.is_finished()),
            Session::Link(link) => (self.peers.take_send(*link, SEND_BUFS), false),
            Session::Server(server) => (self.remote.take_send(*server, SEND_BUFS), false),
        };
        if bufs.is_empty() {
            conn.doomed |= finished;
            return;
        }
        conn.sending = true;
        let bytes: usize = bufs.iter().map(Bytes::len).sum();
        self.context.metrics().add(Counter::BytesOut, bytes as u64);
        self.io.submit(token(Owner::Send, conn.serial, index), Op::Send { conn: conn.id, bufs });
    }

    fn start_receive(&mut self, index: usize) {
        let (stop_volumes, holding) = (self.draining.is_some(), self.is_holding());
        let Some(conn) = self.conns.get_mut(index) else { return };
        if (holding && conn.is_heard())
            || conn.doomed
            || conn.receiving
            || conn.input.is_some()
            || (stop_volumes && conn.is_of_a_volume())
        {
            return;
        }
        let (may, direct) = match &mut conn.session {
            Session::Rpc(c) | Session::Nebd(c) => (c.may_receive(), c.direct()),
            Session::Nbd(s) => (s.may_receive(), s.direct()),
            Session::Peer(p) => (p.may_receive(), p.direct()),
            Session::Link(_) => (true, None),
            Session::Server(server) => {
                let (waits, direct) = (self.remote.wants_buffer(*server), self.remote.direct(*server));
                (!waits, direct)
            }
        };
        let op = match direct {
            Some((buf, filled)) => Op::RecvInto { conn: conn.id, buf, filled },
            None if may => Op::Recv { conn: conn.id },
            // A session that waits for a payload buffer although all its input is used.
            None => return self.list_if_hungry(index),
        };
        conn.receiving = true;
        self.io.submit(token(Owner::Recv, conn.serial, index), op);
    }

    /// The session holds a frame head whose payload found no buffer: try again next turn.
    fn list_if_hungry(&mut self, index: usize) {
        let Some(conn) = self.conns.get_mut(index) else { return };
        let hungry = match &conn.session {
            Session::Rpc(c) | Session::Nebd(c) => c.wants_buffer().is_some(),
            Session::Nbd(s) => s.wants_buffer(),
            Session::Peer(p) => p.wants_buffer(),
            Session::Server(server) => self.remote.wants_buffer(*server),
            Session::Link(_) => false,
        };
        if hungry && !std::mem::replace(&mut conn.listed, true) {
            conn.input = Some((RecvBuf::new(Bytes::new()), 0));
            self.unread.push(index);
            self.starved = true;
        }
    }

    pub(super) fn sent(&mut self, index: usize, serial: u32, done: Done) {
        let Some(conn) = self.conns.get_mut(index).filter(|c| c.serial == serial) else { return };
        conn.sending = false;
        match &mut conn.session {
            Session::Rpc(c) | Session::Nebd(c) => c.sent(),
            Session::Nbd(s) => s.sent(),
            Session::Peer(p) => p.sent(),
            // The link or server has forgotten this connection.
            Session::Link(_) | Session::Server(_) if conn.doomed => {}
            Session::Link(link) => self.peers.sent(*link),
            Session::Server(server) => self.remote.sent(*server),
        }
        match done {
            Done::SendCut(rest) if conn.is_client() => conn.unsent = rest,
            Done::Send(Err(_)) | Done::SendCut(_) => self.doom(index),
            _ => {}
        }
        self.touch(index);
    }

    /// Give a connection up.
    pub(super) fn doom(&mut self, index: usize) {
        if let Some(conn) = self.conns.get_mut(index) {
            let first = !std::mem::replace(&mut conn.doomed, true);
            conn.input = None;
            let (link, server) = match conn.session {
                Session::Link(link) => (Some(link), None),
                Session::Server(server) => (None, Some(server)),
                _ => (None, None),
            };
            let nebd = matches!(conn.session, Session::Nebd(_));
            self.touch(index);
            if nebd && first {
                self.nebd_hangup(index);
            }
            if let Some(link) = link.filter(|_| first) {
                self.unlinked(link);
            }
            if let Some(server) = server.filter(|_| first) {
                self.server_lost(server);
            }
        }
    }

    fn finish_close(&mut self, index: usize) {
        let Some(conn) = self.conns.get_mut(index) else { return };
        if conn.doomed && !conn.close_sent {
            conn.close_sent = true;
            self.io.submit(token(Owner::Close, conn.serial, index), Op::Close { conn: conn.id });
        }
        if conn.gone() {
            self.conns.remove(index);
            self.context.metrics().sub(Counter::Connections, 1);
        }
    }

    pub(super) fn closed(&mut self, index: usize, serial: u32) {
        if let Some(conn) = self.conns.get_mut(index).filter(|c| c.serial == serial) {
            conn.close_done = true;
            self.touch(index);
        }
    }
}
