//! Connections between chunkservers: those this shard dials, and those that peers open.
//!
//! A peer's connection arrives as an RPC connection whose first call is a greeting. Whoever accepted it hands it to the
//! shard it names before the greeting is answered: the peer sends nothing meanwhile, so no byte is handed over, and mail
//! never hops between shards.

use super::conn::Session;
use super::routing::Client;
use super::{Owner, Reactor, Setup, token};
use crate::chunk::shard_of;
use crate::io::{ConnId, Done, Instant, Io, Op};
use crate::mailbox::Greeted;
use crate::metrics::Counter;
use crate::peer::{Identity, Inbound, PeerEvent, PeerState, inbound, judge};
use crate::rpc::{Greeting, Incoming};
use crate::service::{self, Context};
use crate::shard::request::PeerView;
use proto::peer::{Hello, Lane, Status};

/// Between two looks for peers that are not there any more, milliseconds.
const SWEEP_MS: u64 = 1_000;

impl<I: Io> Reactor<I> {
    fn identity(&self) -> Identity {
        identity(&self.context, &self.setup, self.number)
    }

    /// A connection of the RPC port says that it is a peer's.
    pub(super) fn greeted(&mut self, client: Client, greeting: Greeting) {
        let index = client.index;
        let Some(conn) = self.conns.get(index) else { return };
        let alone = match &conn.session {
            Session::Rpc(session) => session.requests() == 1 && session.backlog_bytes() == 0,
            _ => false,
        };
        if !alone {
            let handled = service::handle(&self.context, self.io.now(), Incoming::Greeting(greeting));
            return self.handled(client, handled);
        }
        let correlation_id = greeting.correlation_id;
        let (hello, status) = match inbound::read_hello(&greeting.body) {
            Ok(hello) => (hello, judge(&self.identity(), &hello)),
            Err(status) => (nobody(), status),
        };
        if status == Status::Ok && hello.to_shard != self.number {
            return self.hand_over(index, Greeted { hello, correlation_id });
        }
        let status = if status == Status::Ok { self.admit(&hello) } else { status };
        let session = self.inbound(hello, correlation_id, status);
        if let Some(conn) = self.conns.get_mut(index) {
            conn.session = session;
        }
        self.touch(index);
    }

    fn hand_over(&mut self, index: usize, greeted: Greeted) {
        let Some(conn) = self.conns.try_remove(index) else { return };
        self.context.metrics().sub(Counter::Connections, 1);
        if let Err(conn) = self.setup.mailbox.send_peer(greeted.hello.to_shard, conn.id, greeted) {
            self.io.submit(token(Owner::Close, 0, 0xffff_ffff), Op::Close { conn });
        }
    }

    /// Another shard accepted it.
    pub(super) fn open_peer(&mut self, conn: ConnId, greeted: &Greeted) {
        let status = self.admit(&greeted.hello);
        let session = self.inbound(greeted.hello, greeted.correlation_id, status);
        self.add(conn, session);
    }

    fn inbound(&mut self, hello: Hello, correlation_id: i64, status: Status) -> Session {
        if status == Status::Ok {
            self.peers.nudge(self.io.now(), hello.from);
            self.sweep_at = self.sweep_at.min(self.io.now().after_ms(SWEEP_MS));
        } else {
            tracing::warn!(peer = %copyset::PeerId(hello.from), %status, "a peer's greeting is refused");
            self.context.metrics().add(Counter::PeerHandshakesFailed, 1);
        }
        Session::Peer(Box::new(Inbound::new(&self.identity(), hello, correlation_id, status)))
    }

    /// What only the shard itself can say of a greeting that is good otherwise.
    fn admit(&mut self, hello: &Hello) -> Status {
        if self.draining.is_some() || !self.shard.serving() {
            return Status::NotReady;
        }
        self.drop_silent();
        let mut older = Vec::new();
        for (index, conn) in &self.conns {
            let Session::Peer(peer) = &conn.session else { continue };
            let known = peer.hello();
            if known.from != hello.from || conn.doomed {
                continue;
            }
            if known.disk != hello.disk {
                return Status::Duplicate;
            }
            if (known.from_shard, known.lane) == (hello.from_shard, hello.lane) {
                older.push(index); // the peer has lost it, and we have not noticed yet
            }
        }
        older.into_iter().for_each(|index| self.doom(index));
        Status::Ok
    }

    /// Connections whose peers died without a word would stay for ever. True if any peer's is left.
    fn drop_silent(&mut self) -> bool {
        let (now, mut silent, mut left) = (self.io.now(), Vec::new(), false);
        for (index, conn) in &mut self.conns {
            let Session::Peer(peer) = &mut conn.session else { continue };
            match peer.is_silent(now) {
                true => silent.push(index),
                false => left = true,
            }
        }
        silent.into_iter().for_each(|index| self.doom(index));
        left
    }

    fn sweep(&mut self) {
        let now = self.io.now();
        if self.sweep_at <= now {
            self.sweep_at = if self.drop_silent() { now.after_ms(SWEEP_MS) } else { Instant::FAR };
        }
    }

    /// Mail that connections brought, to the shard.
    pub(super) fn deliver_mail(&mut self, index: usize) {
        if let Some(conn) = self.conns.get_mut(index)
            && let Session::Peer(peer) = &mut conn.session
        {
            let (crcs, mail) = peer.take_bad();
            if crcs + mail > 0 {
                tracing::warn!(crcs, mail, "messages of a peer dropped: bad checksums, not understood");
                self.context.metrics().add(Counter::PeerBad, crcs + mail);
            }
        }
        if self.peer_mail.is_empty() {
            return;
        }
        self.context.metrics().add(Counter::PeerMailIn, self.peer_mail.len() as u64);
        self.requested = true;
        for mail in self.peer_mail.drain(..) {
            if shard_of(mail.copyset, self.shards) == self.number {
                self.shard.peer_mail(mail, &mut self.effects);
            } else {
                self.context.metrics().add(Counter::PeerBad, 1);
            }
        }
    }

    /// At the end of a turn: what the links want done.
    pub(super) fn peers_step(&mut self) {
        self.sweep();
        if self.is_alone() {
            return;
        }
        let now = self.io.now();
        self.peers.poll(now, &mut self.peer_events);
        while let Some(event) = self.peer_events.pop_front() {
            match event {
                PeerEvent::Dial { link, address, timeout_ms } => {
                    self.dialing += 1;
                    self.io.submit(token(Owner::Connect, 0, link), Op::Connect { address, timeout_ms });
                }
                PeerEvent::Close(link) => {
                    if let Some(&index) = self.link_conns.get(&link) {
                        self.doom(index);
                    }
                }
                PeerEvent::Send(link) => {
                    if let Some(&index) = self.link_conns.get(&link) {
                        self.touch(index);
                    }
                }
                PeerEvent::Up(peer) => tracing::info!(peer = %copyset::PeerId(peer), "a peer is connected"),
                PeerEvent::Lost { peer, copyset } => {
                    self.again = true;
                    self.shard.peer_lost(peer, copyset);
                }
            }
            // What was done may be cause for more.
            self.peers.poll(now, &mut self.peer_events);
        }
        self.publish_peers();
    }

    /// Peers this shard has mail for, as an operator sees them.
    pub(super) fn peer_views(&self) -> Vec<PeerView> {
        let view = |state: PeerState| {
            let PeerState { peer, up, links, end, rtt_ns } = state;
            PeerView { peer, up: up as u64, links: links as u64, rtt_ns, why: end.map(|end| end.to_string()) }
        };
        self.peers.states().map(view).collect()
    }

    fn publish_peers(&mut self) {
        let counts = self.peers.counts();
        let metrics = self.context.metrics();
        if counts != self.peer_counts {
            let down = self.peers.states().filter(|state| state.up < state.links).count();
            metrics.set(Counter::PeersDown, down as u64);
            metrics.set(Counter::PeerLinks, counts.up);
            metrics.add(Counter::PeerMailOut, counts.mail - self.peer_counts.mail);
            metrics.add(Counter::PeerMailLost, counts.lost - self.peer_counts.lost);
            metrics.add(Counter::PeerDials, counts.dials - self.peer_counts.dials);
            metrics.add(Counter::PeerHandshakesFailed, counts.refused - self.peer_counts.refused);
            self.peer_counts = counts;
        }
    }

    /// A connection attempt ended.
    pub(super) fn linked(&mut self, link: usize, done: &Done) {
        let Done::Connect(result) = *done else { unreachable!("a connect came back as {done:?}") };
        self.dialing -= 1;
        let wanted = !self.is_alone() & self.peers.dialed(self.io.now(), link, result.is_ok(), &mut self.peer_events);
        match result {
            Ok(conn) if wanted => {
                let index = self.add(conn, Session::Link(link));
                self.link_conns.insert(link, index);
            }
            Ok(conn) => self.io.submit(token(Owner::Close, 0, 0xffff_ffff), Op::Close { conn }),
            Err(error) => tracing::debug!(%error, "a peer cannot be reached"),
        }
    }

    /// A dialed connection is given up.
    pub(super) fn unlinked(&mut self, link: usize) {
        self.link_conns.remove(&link);
        self.peers.closed(self.io.now(), link, &mut self.peer_events);
        self.again = true;
    }
}

/// Who this shard is, for its peers.
pub(super) fn identity(context: &Context, setup: &Setup, shard: u16) -> Identity {
    let Setup { shards, chunk_size, disk, cluster, .. } = *setup;
    Identity { peer: context.info().peer.0, shard, shards, chunk_size, disk, cluster }
}

/// Stands for whoever sent a greeting that cannot be read.
fn nobody() -> Hello {
    let (from, to, from_shard, to_shard, shards, chunk_size) = (0, 0, 0, 0, 0, 0);
    Hello { lane: Lane::Control, chunk_size, from, to, from_shard, to_shard, shards, disk: [0; 16], cluster: [0; 16] }
}
