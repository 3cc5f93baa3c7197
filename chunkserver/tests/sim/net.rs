//! Byte streams between simulated clients and node shards.
//!
//! Every stream keeps its order and loses nothing while both ends live, and promises nothing else: any segmentation, any
//! delay, bounded socket buffers (a send completes when its last byte found room), resets when a node goes down.
//! Ends are symmetric, so that node-to-node connections need nothing new here.

use crate::rng::Rng;
use crate::world::{ActorEvent, Route};
use bytes::{Buf, Bytes, BytesMut};
use chunkserver::io::buffer::{PoolBuf, RecvBuf};
use chunkserver::io::{ConnId, Done, Errno, ListenerId};
use std::collections::{BTreeMap, VecDeque};

const EBADF: Errno = Errno(9);
const EMFILE: Errno = Errno(24);
const EPIPE: Errno = Errno(32);
const ECONNRESET: Errno = Errno(104);
const ENOBUFS: Errno = Errno(105);
const BACKLOG: usize = 128;
const RECV_MAX: usize = 64 << 10;

/// Whose end it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    Actor(usize),
    Node(usize),
}

/// What the world has to do for the network.
pub(crate) enum Effect {
    Complete(Route, Done),
    Tell(usize, ActorEvent),
    At(u64, NetEvent),
}

/// What happens later.
#[derive(Clone, Copy, Debug)]
pub(crate) enum NetEvent {
    /// A connection request reaches its listener.
    Arrive(ConnId, usize, ListenerId),
    /// The oldest piece sent by this end reaches the other.
    Deliver(ConnId, usize),
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Faults {
    pub(crate) enobufs_ppm: u32,
    pub(crate) emfile_ppm: u32,
    /// Every latency is multiplied by this plus one.
    pub(crate) slower: u64,
}

enum Item {
    Data(Bytes),
    Fin,
    Reset,
}

enum Receiving {
    Any,
    Into(PoolBuf, usize),
}

struct End {
    owner: Owner,
    open: bool,
    inbox: BytesMut,
    ended: Option<Result<(), Errno>>,
    recv: Option<(Route, Receiving)>,
    /// Not yet in the socket buffer; the route is told when the last byte is.
    sends: VecDeque<(Option<Route>, VecDeque<Bytes>)>,
    transit: VecDeque<Item>,
    transit_bytes: usize,
    last_due: u64,
}

impl End {
    fn new(owner: Owner) -> Self {
        Self {
            owner,
            open: true,
            inbox: BytesMut::new(),
            ended: None,
            recv: None,
            sends: VecDeque::new(),
            transit: VecDeque::new(),
            transit_bytes: 0,
            last_due: 0,
        }
    }
}

#[derive(Default)]
struct Listener {
    backlog: VecDeque<ConnId>,
    accepts: VecDeque<Route>,
}

#[derive(Default)]
pub(crate) struct Net {
    conns: BTreeMap<ConnId, (usize, [End; 2])>,
    listeners: BTreeMap<(usize, ListenerId), Listener>,
    last: i32,
    pub(crate) faults: Faults,
    pub(crate) resets: u64,
    pub(crate) refusals: u64,
    pub(crate) out: Vec<Effect>,
}

impl Net {
    pub(crate) fn listen(&mut self, node: usize, listener: ListenerId) {
        self.listeners.insert((node, listener), Listener::default());
    }

    fn latency(&self, rng: &mut Rng) -> u64 {
        rng.skewed(5_000, 300_000) * (1 + self.faults.slower)
    }

    /// An actor connects; it is told later how that went.
    pub(crate) fn connect(&mut self, now: u64, rng: &mut Rng, actor: usize, node: usize, to: ListenerId) -> ConnId {
        self.last += 1;
        let conn = ConnId(self.last);
        let capacity = rng.between(4 << 10, 256 << 10) as usize;
        self.conns.insert(conn, (capacity, [End::new(Owner::Actor(actor)), End::new(Owner::Node(node))]));
        let due = now + self.latency(rng);
        self.out.push(Effect::At(due, NetEvent::Arrive(conn, node, to)));
        conn
    }

    pub(crate) fn event(&mut self, now: u64, rng: &mut Rng, event: NetEvent) {
        match event {
            NetEvent::Arrive(conn, node, to) => self.arrive(rng, conn, node, to),
            NetEvent::Deliver(conn, from) => self.deliver(now, rng, conn, from),
        }
    }

    fn arrive(&mut self, rng: &mut Rng, conn: ConnId, node: usize, to: ListenerId) {
        let Some((_, ends)) = self.conns.get_mut(&conn) else { return };
        let owner = ends[0].owner;
        let listener = self.listeners.get_mut(&(node, to)).filter(|l| l.backlog.len() < BACKLOG);
        let event = match listener {
            Some(listener) => {
                listener.backlog.push_back(conn);
                self.serve_accepts(rng, node, to);
                ActorEvent::Connected(conn)
            }
            None => {
                self.refusals += 1;
                self.conns.remove(&conn);
                ActorEvent::Closed(conn)
            }
        };
        if let Owner::Actor(actor) = owner {
            self.out.push(Effect::Tell(actor, event));
        }
    }

    pub(crate) fn accept(&mut self, rng: &mut Rng, route: Route, listener: ListenerId) {
        match self.listeners.get_mut(&(route.node, listener)) {
            Some(l) => l.accepts.push_back(route),
            None => self.out.push(Effect::Complete(route, Done::Accept(Err(EBADF)))),
        }
        self.serve_accepts(rng, route.node, listener);
    }

    fn serve_accepts(&mut self, rng: &mut Rng, node: usize, to: ListenerId) {
        let emfile = self.faults.emfile_ppm;
        let Some(listener) = self.listeners.get_mut(&(node, to)) else { return };
        while !listener.backlog.is_empty() {
            // Which shard of several waiting ones gets a connection is the kernel's choice.
            let chosen = rng.below(listener.accepts.len() as u64) as usize;
            let Some(route) = listener.accepts.remove(chosen) else { return };
            let failed = rng.ppm(emfile);
            let result = if failed { Err(EMFILE) } else { listener.backlog.pop_front().ok_or(EBADF) };
            self.out.push(Effect::Complete(route, Done::Accept(result)));
        }
    }

    fn side(&self, conn: ConnId, owner: Owner) -> Option<usize> {
        let (_, ends) = self.conns.get(&conn)?;
        ends.iter().position(|end| end.owner == owner && end.open)
    }

    /// Queue bytes; `route` is told when all found room.
    pub(crate) fn send(
        &mut self,
        now: u64,
        rng: &mut Rng,
        who: Owner,
        route: Option<Route>,
        conn: ConnId,
        data: VecDeque<Bytes>,
    ) {
        let Some(side) = self.side(conn, who) else {
            self.out.extend(route.map(|r| Effect::Complete(r, Done::Send(Err(EPIPE)))));
            return;
        };
        if let Some((_, ends)) = self.conns.get_mut(&conn) {
            ends[side].sends.push_back((route, data));
        }
        self.pump(now, rng, conn, side);
    }

    /// Move bytes of one end from its sends into the socket buffer while there is room.
    fn pump(&mut self, now: u64, rng: &mut Rng, conn: ConnId, side: usize) {
        let Some((capacity, ends)) = self.conns.get_mut(&conn) else { return };
        let capacity = *capacity;
        let peer_inbox = ends[1 - side].inbox.len();
        let broken = ends[side].ended == Some(Err(ECONNRESET));
        let end = &mut ends[side];
        while let Some((route, data)) = end.sends.front_mut() {
            if broken {
                self.out.extend(route.map(|r| Effect::Complete(r, Done::Send(Err(ECONNRESET)))));
                end.sends.pop_front();
                continue;
            }
            let Some(first) = data.front_mut() else {
                self.out.extend(route.map(|r| Effect::Complete(r, Done::Send(Ok(())))));
                end.sends.pop_front();
                continue;
            };
            let room = capacity.saturating_sub(peer_inbox + end.transit_bytes);
            let limit =
                if rng.ppm(150_000) { rng.between(1, 100) as usize } else { rng.between(1, RECV_MAX as u64) as usize };
            let piece = first.len().min(limit).min(room);
            if piece == 0 && !first.is_empty() {
                return;
            }
            let bytes = first.split_to(piece);
            if first.is_empty() {
                data.pop_front();
            }
            end.transit_bytes += bytes.len();
            end.transit.push_back(Item::Data(bytes));
            end.last_due = end.last_due.max(now + rng.skewed(5_000, 300_000) * (1 + self.faults.slower));
            self.out.push(Effect::At(end.last_due, NetEvent::Deliver(conn, side)));
        }
    }

    fn deliver(&mut self, now: u64, rng: &mut Rng, conn: ConnId, from: usize) {
        let Some((_, ends)) = self.conns.get_mut(&conn) else { return };
        let Some(item) = ends[from].transit.pop_front() else { return };
        if let Item::Data(bytes) = &item {
            ends[from].transit_bytes -= bytes.len();
        }
        let to = &mut ends[1 - from];
        match item {
            Item::Data(bytes) if to.open => to.inbox.extend_from_slice(&bytes),
            Item::Data(_) => {}
            Item::Fin => to.ended = to.ended.or(Some(Ok(()))),
            Item::Reset => {
                to.inbox.clear();
                to.ended = Some(Err(ECONNRESET));
            }
        }
        let (open, ended, owner) = (to.open, to.ended, to.owner);
        self.serve_recv(now, rng, conn, 1 - from);
        if let (Owner::Actor(actor), true) = (owner, open) {
            let event = if ended.is_some() { ActorEvent::Closed(conn) } else { ActorEvent::Readable(conn) };
            self.out.push(Effect::Tell(actor, event));
        }
        self.pump(now, rng, conn, from);
        self.pump(now, rng, conn, 1 - from);
        self.forget_if_over(conn);
    }

    /// A shard receives, into memory of ours or of its own.
    pub(crate) fn recv(&mut self, now: u64, rng: &mut Rng, route: Route, conn: ConnId, into: Option<(PoolBuf, usize)>) {
        let receiving = into.map_or(Receiving::Any, |(buf, filled)| Receiving::Into(buf, filled));
        let Some(side) = self.side(conn, Owner::Node(route.node)) else {
            self.out.push(Effect::Complete(route, received(receiving, Err(EBADF))));
            return;
        };
        if rng.ppm(self.faults.enobufs_ppm) && matches!(receiving, Receiving::Any) {
            self.out.push(Effect::Complete(route, Done::Recv(Err(ENOBUFS))));
            return;
        }
        if let Some((_, ends)) = self.conns.get_mut(&conn) {
            assert!(ends[side].recv.is_none(), "two receives at once on {conn:?}");
            ends[side].recv = Some((route, receiving));
        }
        self.serve_recv(now, rng, conn, side);
    }

    fn serve_recv(&mut self, now: u64, rng: &mut Rng, conn: ConnId, side: usize) {
        let Some((_, ends)) = self.conns.get_mut(&conn) else { return };
        let end = &mut ends[side];
        if end.inbox.is_empty() && end.ended.is_none() {
            return;
        }
        let Some((route, receiving)) = end.recv.take() else { return };
        let done = if end.inbox.is_empty() {
            received(receiving, end.ended.unwrap_or(Ok(())).map(|()| Bytes::new()))
        } else {
            let space = match &receiving {
                Receiving::Any => RECV_MAX,
                Receiving::Into(buf, filled) => buf.len() - filled,
            };
            let all = end.inbox.len().min(space);
            let taken = if rng.ppm(200_000) { rng.between(1, all as u64) as usize } else { all };
            received(receiving, Ok(end.inbox.split_to(taken).freeze()))
        };
        self.out.push(Effect::Complete(route, done));
        self.pump(now, rng, conn, 1 - side);
    }

    /// An actor takes what has arrived, at most `max` bytes.
    pub(crate) fn take(&mut self, now: u64, rng: &mut Rng, actor: usize, conn: ConnId, max: usize) -> Bytes {
        let Some(side) = self.side(conn, Owner::Actor(actor)) else { return Bytes::new() };
        let Some((_, ends)) = self.conns.get_mut(&conn) else { return Bytes::new() };
        let inbox = &mut ends[side].inbox;
        let len = inbox.len().min(max);
        let bytes = inbox.split_to(len).freeze();
        self.pump(now, rng, conn, 1 - side);
        bytes
    }

    /// One end closes: what is in its socket buffer still arrives, then the end of the stream (or a reset).
    pub(crate) fn close(&mut self, now: u64, rng: &mut Rng, who: Owner, conn: ConnId, reset: bool) {
        let due = now + self.latency(rng);
        let Some(side) = self.side(conn, who) else { return };
        let Some((_, ends)) = self.conns.get_mut(&conn) else { return };
        let end = &mut ends[side];
        end.open = false;
        end.inbox.clear();
        if let Some((route, receiving)) = end.recv.take() {
            self.out.push(Effect::Complete(route, received(receiving, Ok(Bytes::new()))));
        }
        for (route, _) in std::mem::take(&mut end.sends) {
            self.out.extend(route.map(|r| Effect::Complete(r, Done::Send(Err(EPIPE)))));
        }
        self.resets += u64::from(reset);
        end.transit.push_back(if reset { Item::Reset } else { Item::Fin });
        end.last_due = end.last_due.max(due);
        self.out.push(Effect::At(end.last_due, NetEvent::Deliver(conn, side)));
        self.pump(now, rng, conn, 1 - side);
    }

    fn forget_if_over(&mut self, conn: ConnId) {
        let over = |ends: &[End; 2]| ends.iter().all(|end| !end.open && end.transit.is_empty());
        if self.conns.get(&conn).is_some_and(|(_, ends)| over(ends)) {
            self.conns.remove(&conn);
        }
    }

    /// The node is gone: its waiting operations with it, and its peers see a reset.
    pub(crate) fn crash(&mut self, now: u64, rng: &mut Rng, node: usize) {
        self.listeners.retain(|&(of, _), _| of != node);
        let conns: Vec<_> = self.conns.keys().copied().collect();
        for conn in conns {
            if let Some(side) = self.side(conn, Owner::Node(node)) {
                if let Some((_, ends)) = self.conns.get_mut(&conn) {
                    ends[side].recv = None;
                    ends[side].sends.clear();
                }
                self.close(now, rng, Owner::Node(node), conn, true);
            }
        }
    }

    /// Connections of actors that are open, oldest first.
    pub(crate) fn open(&self) -> Vec<(usize, ConnId)> {
        let of = |(conn, (_, ends)): (&ConnId, &(usize, [End; 2]))| match ends[0].owner {
            Owner::Actor(actor) if ends[0].open && ends[1].open => Some((actor, *conn)),
            _ => None,
        };
        self.conns.iter().filter_map(of).collect()
    }

    /// The network breaks a connection: both ends see a reset.
    pub(crate) fn cut(&mut self, now: u64, rng: &mut Rng, conn: ConnId) {
        let due = now + self.latency(rng);
        let Some((_, ends)) = self.conns.get_mut(&conn) else { return };
        self.resets += 1;
        for (side, end) in ends.iter_mut().enumerate() {
            end.transit.push_back(Item::Reset);
            end.last_due = end.last_due.max(due);
            self.out.push(Effect::At(end.last_due, NetEvent::Deliver(conn, side)));
        }
    }
}

fn received(receiving: Receiving, result: Result<Bytes, Errno>) -> Done {
    match receiving {
        Receiving::Any => Done::Recv(result.map(RecvBuf::new)),
        Receiving::Into(mut buf, filled) => {
            let result = result.map(|mut bytes| {
                let len = bytes.len();
                bytes.copy_to_slice(&mut buf[filled..filled + len]);
                len
            });
            Done::RecvInto { buf, result }
        }
    }
}
