//! Byte streams between simulated clients and node shards.
//!
//! Every stream keeps its order and loses nothing while both ends live, and promises nothing else: any segmentation, any
//! delay, bounded socket buffers (a send completes when its last byte found room), resets when a node goes down.
//! Ends are symmetric, so that node-to-node connections need nothing new here.

use crate::rng::Rng;
use crate::world::{ActorEvent, Route};
use bytes::{Buf, Bytes, BytesMut};
use chunkserver::io::buffer::{PoolBuf, RecvBuf};
use chunkserver::io::{Address, ConnId, Done, Errno, ListenerId};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

const EBADF: Errno = Errno(9);
const EMFILE: Errno = Errno(24);
const EPIPE: Errno = Errno(32);
const ECONNRESET: Errno = Errno(104);
const ENOBUFS: Errno = Errno(105);
const ETIMEDOUT: Errno = Errno(110);
const ECONNREFUSED: Errno = Errno(111);
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
    /// Where nodes find each other.
    addresses: BTreeMap<Address, (usize, ListenerId)>,
    /// Connections of nodes that have not arrived yet.
    dialing: BTreeMap<ConnId, Route>,
    last: i32,
    /// From which node nothing reaches which other one.
    blocked: BTreeSet<(usize, usize)>,
    /// Deliveries that wait for the end of that: connection and sending end.
    stalled: Vec<(ConnId, usize)>,
    pub(crate) faults: Faults,
    pub(crate) resets: u64,
    pub(crate) refusals: u64,
    /// Pieces that waited for the end of a partition.
    pub(crate) held: u64,
    pub(crate) out: Vec<Effect>,
}

impl Net {
    pub(crate) fn listen(&mut self, node: usize, listener: ListenerId) {
        self.listeners.insert((node, listener), Listener::default());
    }

    /// A listener's address, for nodes that connect to it; it outlives the node's crashes.
    pub(crate) fn publish(&mut self, address: Address, node: usize, listener: ListenerId) {
        self.addresses.insert(address, (node, listener));
    }

    fn latency(&self, rng: &mut Rng) -> u64 {
        rng.skewed(5_000, 300_000) * (1 + self.faults.slower)
    }

    /// A shard connects to a node's published address. An unknown one answers nothing, so the time is up some day.
    pub(crate) fn dial(&mut self, now: u64, rng: &mut Rng, route: Route, address: &Address, timeout_ns: u64) {
        self.last += 1;
        let conn = ConnId(self.last);
        let owner = Owner::Node(route.node);
        let (due, node, to) = match self.addresses.get(address) {
            // A first packet is lost, or the answer to it: the same as silence.
            Some(&(node, to)) if !self.is_blocked(route.node, node) && !self.is_blocked(node, route.node) => {
                (now + self.latency(rng), node, to)
            }
            _ => (now + timeout_ns, usize::MAX, ListenerId(0)),
        };
        assert!(node != route.node, "a node connects to itself");
        let capacity = rng.between(4 << 10, 256 << 10) as usize;
        self.conns.insert(conn, (capacity, [End::new(owner), End::new(Owner::Node(node))]));
        self.dialing.insert(conn, route);
        self.out.push(Effect::At(due, NetEvent::Arrive(conn, node, to)));
    }

    fn is_blocked(&self, from: usize, to: usize) -> bool {
        self.blocked.contains(&(from, to))
    }

    /// From now on nothing of `from` reaches `to`. Connections stay; what they carry waits, as for a retransmission.
    pub(crate) fn block(&mut self, from: usize, to: usize) {
        self.blocked.insert((from, to));
    }

    /// The end of all that.
    pub(crate) fn unblock(&mut self, now: u64, rng: &mut Rng, pairs: &[(usize, usize)]) {
        self.blocked.retain(|pair| !pairs.contains(pair));
        for (conn, side) in std::mem::take(&mut self.stalled) {
            // Retransmissions of one connection keep their order: each delivery takes what is oldest then.
            let due = now + self.latency(rng);
            self.out.push(Effect::At(due, NetEvent::Deliver(conn, side)));
        }
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
        } else if let Some(route) = self.dialing.remove(&conn) {
            let refused = if node == usize::MAX { ETIMEDOUT } else { ECONNREFUSED };
            let result = if self.conns.contains_key(&conn) { Ok(conn) } else { Err(refused) };
            self.out.push(Effect::Complete(route, Done::Connect(result)));
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
        if let (Owner::Node(a), Owner::Node(b)) = (ends[from].owner, ends[1 - from].owner)
            && self.blocked.contains(&(a, b))
        {
            self.held += 1;
            return self.stalled.push((conn, from));
        }
        let Some(item) = ends[from].transit.pop_front() else { return };
        if let Item::Data(bytes) = &item {
            ends[from].transit_bytes -= bytes.len();
        }
        let to = &mut ends[1 - from];
        match item {
            // What was under way when a reset struck is gone: never a stream with a hole.
            Item::Data(bytes) if to.open && to.ended.is_none() => to.inbox.extend_from_slice(&bytes),
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

    /// Connections between nodes, oldest first.
    pub(crate) fn between_nodes(&self) -> Vec<ConnId> {
        let nodes = |ends: &[End; 2]| ends.iter().all(|end| end.open && matches!(end.owner, Owner::Node(_)));
        self.conns.iter().filter(|(_, (_, ends))| nodes(ends)).map(|(conn, _)| *conn).collect()
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

#[cfg(test)]
mod tests {
    use super::*;
    use chunkserver::io::Token;
    use chunkserver::io::buffer::Arena;

    const LISTENER: ListenerId = ListenerId(0);

    fn route(token: u64) -> Route {
        Route { node: 0, shard: 0, life: 1, token: Token(token) }
    }

    /// A network with its own clock: runs its events until none is left, and collects what it told.
    struct Wire {
        net: Net,
        rng: Rng,
        now: u64,
        events: BTreeMap<(u64, u64), NetEvent>,
        serial: u64,
        done: Vec<(u64, Done)>,
        told: Vec<ActorEvent>,
    }

    impl Wire {
        /// With one connection, accepted by the node.
        fn connected(seed: u64) -> (Self, ConnId) {
            let net = Net::default();
            let (events, done, told) = (BTreeMap::new(), Vec::new(), Vec::new());
            let mut wire = Self { net, rng: Rng::new(seed), now: 0, events, serial: 0, done, told };
            wire.net.listen(0, LISTENER);
            let conn = wire.net.connect(0, &mut wire.rng, 9, 0, LISTENER);
            wire.net.accept(&mut wire.rng, route(1), LISTENER);
            wire.run();
            assert!(matches!(wire.done.pop(), Some((1, Done::Accept(Ok(accepted)))) if accepted == conn));
            assert_eq!(wire.told.pop(), Some(ActorEvent::Connected(conn)));
            (wire, conn)
        }
        fn settle(&mut self) {
            for effect in std::mem::take(&mut self.net.out) {
                match effect {
                    Effect::Complete(route, done) => self.done.push((route.token.0, done)),
                    Effect::Tell(_, event) => self.told.push(event),
                    Effect::At(at, event) => {
                        self.serial += 1;
                        self.events.insert((at, self.serial), event);
                    }
                }
            }
        }
        fn run(&mut self) {
            self.settle();
            while let Some(((at, _), event)) = self.events.pop_first() {
                self.now = at;
                self.net.event(at, &mut self.rng, event);
                self.settle();
            }
        }
        fn node_sends(&mut self, token: u64, conn: ConnId, data: &[u8]) {
            let data = data.chunks(1000).map(Bytes::copy_from_slice).collect();
            self.net.send(self.now, &mut self.rng, Owner::Node(0), Some(route(token)), conn, data);
            self.run();
        }
        fn node_receives(&mut self, conn: ConnId) -> Option<Result<Vec<u8>, Errno>> {
            self.net.recv(self.now, &mut self.rng, route(2), conn, None);
            self.run();
            match self.done.pop() {
                Some((2, Done::Recv(result))) => Some(result.map(|bytes| bytes.to_vec())),
                other => other.map(|(_, done)| panic!("{done:?}")),
            }
        }
    }

    #[test]
    fn every_byte_arrives_once_and_in_order_both_ways() {
        for seed in 0..50 {
            let (mut wire, conn) = Wire::connected(seed);
            let data: Vec<u8> = (0..300_000u32).map(|at| (at * 7 + at / 256) as u8).collect();
            let sent = VecDeque::from([Bytes::from(data.clone())]);
            wire.net.send(wire.now, &mut wire.rng, Owner::Actor(9), None, conn, sent);
            wire.run();
            let mut received = Vec::new();
            let arena = Arena::new(1 << 20).unwrap();
            while received.len() < data.len() {
                if wire.rng.coin() {
                    received.extend(wire.node_receives(conn).unwrap().unwrap());
                    continue;
                }
                let mut buf = arena.alloc(8192).unwrap();
                buf[..5].fill(1);
                wire.net.recv(wire.now, &mut wire.rng, route(3), conn, Some((buf, 5)));
                wire.run();
                let Some((3, Done::RecvInto { buf, result: Ok(added) })) = wire.done.pop() else { panic!("recv") };
                assert_eq!(&buf[..5], &[1; 5]);
                received.extend_from_slice(&buf[5..5 + added]);
            }
            assert_eq!(received, data);
            wire.node_sends(4, conn, &data);
            let mut back = Vec::new();
            while back.len() < data.len() {
                back.extend_from_slice(&wire.net.take(wire.now, &mut wire.rng, 9, conn, 10_000));
                wire.run();
            }
            assert_eq!(back, data);
            assert!(matches!(wire.done.pop(), Some((4, Done::Send(Ok(()))))));
        }
    }

    #[test]
    fn nodes_connect_to_published_addresses() {
        let (mut wire, _) = Wire::connected(4);
        let address = |last| Address::Tcp(std::net::Ipv4Addr::new(10, 0, 0, last), 8200);
        let from = Route { node: 1, shard: 0, life: 1, token: Token(7) };
        wire.net.publish(address(1), 0, LISTENER);
        wire.net.publish(address(2), 2, LISTENER);
        let dial = |wire: &mut Wire, to| {
            wire.net.dial(wire.now, &mut wire.rng, from, &address(to), 50_000_000);
            wire.run();
            match wire.done.pop() {
                Some((7, Done::Connect(result))) => result,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(dial(&mut wire, 2), Err(ECONNREFUSED), "node 2 is down");
        let before = wire.now;
        assert_eq!(dial(&mut wire, 3), Err(ETIMEDOUT));
        assert_eq!(wire.now, before + 50_000_000);

        let conn = dial(&mut wire, 1).unwrap();
        wire.net.accept(&mut wire.rng, route(1), LISTENER);
        wire.run();
        assert!(matches!(wire.done.pop(), Some((1, Done::Accept(Ok(accepted)))) if accepted == conn));
        wire.net.send(wire.now, &mut wire.rng, Owner::Node(1), None, conn, VecDeque::from([Bytes::from_static(b"hi")]));
        wire.run();
        assert_eq!(wire.node_receives(conn).unwrap().unwrap(), b"hi");
        wire.net.crash(wire.now, &mut wire.rng, 1);
        wire.run();
        assert_eq!(wire.node_receives(conn), Some(Err(ECONNRESET)));
    }

    #[test]
    fn a_send_waits_for_a_slow_reader() {
        let (mut wire, conn) = Wire::connected(5);
        wire.node_sends(4, conn, &vec![3; 1 << 20]);
        assert!(wire.done.is_empty(), "more than any socket buffer holds");
        let mut taken = 0;
        while wire.done.is_empty() {
            taken += wire.net.take(wire.now, &mut wire.rng, 9, conn, 5_000).len();
            wire.run();
        }
        assert!(((768 << 10)..1 << 20).contains(&taken), "complete when the last byte has room: {taken}");
    }

    #[test]
    fn ends_are_seen_after_the_data_and_resets_at_once() {
        let (mut wire, conn) = Wire::connected(6);
        wire.net.send(0, &mut wire.rng, Owner::Actor(9), None, conn, VecDeque::from([Bytes::from_static(b"bye")]));
        wire.net.close(0, &mut wire.rng, Owner::Actor(9), conn, false);
        wire.run();
        let mut all = Vec::new();
        while let Some(Ok(bytes)) = wire.node_receives(conn) {
            if bytes.is_empty() {
                break;
            }
            all.extend(bytes);
        }
        assert_eq!(all, b"bye");

        let (mut wire, conn) = Wire::connected(7);
        wire.net.recv(0, &mut wire.rng, route(2), conn, None);
        wire.net.crash(0, &mut wire.rng, 0);
        wire.run();
        assert!(wire.done.is_empty(), "the dead are told nothing");
        assert_eq!(wire.told, [ActorEvent::Closed(conn)]);

        let (mut wire, conn) = Wire::connected(8);
        wire.net.cut(0, &mut wire.rng, conn);
        wire.run();
        assert_eq!(wire.node_receives(conn), Some(Err(ECONNRESET)));
        wire.node_sends(4, conn, b"late");
        assert!(matches!(wire.done.pop(), Some((4, Done::Send(Err(ECONNRESET))))));
        wire.net.close(wire.now, &mut wire.rng, Owner::Node(0), conn, false);
        wire.run();
        assert_eq!(wire.node_receives(conn), Some(Err(EBADF)));
    }
    #[test]
    fn what_is_blocked_waits_one_way_and_arrives_in_order() {
        let (mut wire, _) = Wire::connected(9);
        let address = Address::Tcp(std::net::Ipv4Addr::new(10, 0, 0, 1), 8200);
        wire.net.publish(address.clone(), 0, LISTENER);
        let from = Route { node: 1, shard: 0, life: 1, token: Token(7) };
        wire.net.dial(wire.now, &mut wire.rng, from, &address, 50_000_000);
        wire.net.accept(&mut wire.rng, route(1), LISTENER);
        wire.run();
        let conn = match wire.done.drain(..).next() {
            Some((_, Done::Connect(Ok(conn)) | Done::Accept(Ok(conn)))) => conn,
            other => panic!("{other:?}"),
        };
        wire.net.block(1, 0);
        for byte in 0..9u8 {
            let bytes = VecDeque::from([Bytes::copy_from_slice(&[byte])]);
            wire.net.send(wire.now, &mut wire.rng, Owner::Node(1), None, conn, bytes);
        }
        wire.node_sends(4, conn, b"back");
        assert!(matches!(wire.done.pop(), Some((4, Done::Send(Ok(()))))), "the other way is open");
        assert!(wire.node_receives(conn).is_none());
        let refused = Route { token: Token(8), ..from };
        wire.net.dial(wire.now, &mut wire.rng, refused, &address, 50_000_000);
        wire.run();
        assert!(matches!(wire.done.pop(), Some((8, Done::Connect(Err(ETIMEDOUT))))));
        wire.net.unblock(wire.now, &mut wire.rng, &[(1, 0)]);
        wire.run();
        let mut all = Vec::new();
        while let Some((2, Done::Recv(Ok(bytes)))) = wire.done.pop() {
            all.extend_from_slice(&bytes);
            wire.net.recv(wire.now, &mut wire.rng, route(2), conn, None);
            wire.run();
        }
        assert_eq!(all, [0, 1, 2, 3, 4, 5, 6, 7, 8]);
    }
}
