//! Servers that say what a test wants, and nothing else.

use super::*;
use bytes::BytesMut;
use prost::Message;
use proto::chunkserver::{ChunkOpStatus as Status, ChunkRequest, ChunkResponse, GetLeaderRequest2, GetLeaderResponse2};
use proto::common::Peer;
use proto::frame::{Decoder, Step, put_error, put_response};
use std::collections::BTreeMap;

const SET: CopysetId = CopysetId(1 << 32 | 7);
const START: Instant = Instant(1_000_000_000);
const BLOCK: usize = 4096;

fn peer_at(net: usize, n: usize) -> u64 {
    PeerId::new([10, 1, net as u8, n as u8].into(), 8200, 0).0
}
fn peer(n: u8) -> u64 {
    PeerId::new([10, 0, 0, n].into(), 8200, 0).0
}

/// A call as a server sees it.
struct Seen {
    server: usize,
    id: i64,
    method: String,
    body: Bytes,
    payload: Vec<u8>,
}

impl Seen {
    fn chunk(&self) -> ChunkRequest {
        ChunkRequest::decode(self.body.clone()).unwrap()
    }
}

struct World {
    now: Instant,
    remote: Remote<u32>,
    homes: Vec<u64>,
    /// Address of each server that was dialed.
    dialed: BTreeMap<usize, Address>,
    /// Nobody is there.
    dead: Vec<u64>,
    decoders: BTreeMap<usize, Decoder>,
    calls: Vec<Seen>,
    done: Vec<(u32, Outcome, Vec<u8>)>,
    /// Of these, sent and not answered.
    lost: u32,
    closed: Vec<usize>,
    arena: Arc<Arena>,
}

impl World {
    fn new(me: Option<u64>) -> Self {
        Self {
            now: START,
            remote: Remote::new(me, 77),
            homes: (1..4).map(peer).collect(),
            dialed: BTreeMap::new(),
            dead: Vec::new(),
            decoders: BTreeMap::new(),
            calls: Vec::new(),
            done: Vec::new(),
            lost: 0,
            closed: Vec::new(),
            arena: Arena::new(1 << 20).unwrap(),
        }
    }

    fn ask(&mut self, asker: u32, op: &ChunkOp, attempt: u32) -> Went {
        let homes = self.homes.clone();
        let errand = Errand { copyset: SET, homes: &homes, chunk: 9, sn: 3, op, id: u64::from(asker), attempt };
        let went = self.remote.ask(self.now, errand, asker);
        self.run();
        went
    }

    /// Until nothing more happens at this moment.
    fn run(&mut self) {
        loop {
            self.remote.poll(self.now);
            let mut idle = true;
            while let Some(event) = self.remote.next_event() {
                idle = false;
                self.event(event);
            }
            if idle {
                return;
            }
        }
    }

    fn event(&mut self, event: RemoteEvent<u32>) {
        match event {
            RemoteEvent::Dial { server, address, .. } => {
                let Address::Tcp(ip, port) = address else { panic!("TCP") };
                let there = !self.dead.contains(&PeerId::new(ip, port, 0).0);
                self.dialed.insert(server, address);
                self.decoders.insert(server, Decoder::new());
                self.remote.dialed(self.now, server, there);
            }
            RemoteEvent::Send(server) => {
                let bytes: Vec<u8> = self.remote.take_send(server, 256).iter().flat_map(|buf| buf.to_vec()).collect();
                self.remote.sent(server);
                self.take(server, &bytes);
            }
            RemoteEvent::Close(server) => {
                self.closed.push(server);
                self.remote.closed(self.now, server);
            }
            RemoteEvent::Done { asker, lost, outcome, data } => {
                self.lost += u32::from(lost);
                let data = if let ReplyData::Data(data) = data { data.concat() } else { Vec::new() };
                self.done.push((asker, outcome, data));
            }
            RemoteEvent::AskHere(copyset) => assert_eq!(copyset, SET),
        }
    }

    fn take(&mut self, server: usize, mut bytes: &[u8]) {
        let decoder = self.decoders.get_mut(&server).unwrap();
        while let Step::Head(head) = decoder.step(&mut bytes).unwrap() {
            let payload = bytes[..head.attachment_len].to_vec();
            bytes = &bytes[head.attachment_len..];
            if head.attachment_len > 0 {
                decoder.attachment_done();
            }
            let method = String::from_utf8(head.meta.names().1.to_vec()).unwrap();
            self.calls.push(Seen { server, id: head.meta.correlation_id, method, body: head.body, payload });
        }
        assert!(bytes.is_empty());
    }

    fn of(&self, n: u8) -> usize {
        let is = |(server, address): (&usize, &Address)| {
            (*address == Address::Tcp([10, 0, 0, n].into(), 8200)).then_some(*server)
        };
        self.dialed.iter().find_map(is).unwrap()
    }

    /// The calls of a method at a server that nobody looked at yet.
    fn seen(&mut self, n: u8, method: &str) -> Vec<Seen> {
        let server = self.of(n);
        let (found, rest) = std::mem::take(&mut self.calls)
            .into_iter()
            .partition(|call| call.server == server && call.method == method);
        self.calls = rest;
        found
    }

    fn say(&mut self, server: usize, bytes: &[u8]) {
        let mut input = bytes;
        let waits = self.remote.received(self.now, server, &mut input, &self.arena).unwrap();
        assert!(!waits && input.is_empty());
        self.run();
    }

    fn answer(&mut self, call: &Seen, status: Status, redirect: Option<u64>, data: &[u8]) {
        let redirect = redirect.map(|peer| PeerId(peer).to_string());
        let response = ChunkResponse { status: status.into(), redirect, ..ChunkResponse::default() };
        let mut out = BytesMut::new();
        put_response(&mut out, call.id, &response, data.len());
        self.say(call.server, &[&out[..], data].concat());
    }

    fn error(&mut self, call: &Seen, code: i32) {
        let mut out = BytesMut::new();
        put_error(&mut out, call.id, code, "no");
        self.say(call.server, &out);
    }

    /// Every question for a leader that server `n` has is answered so.
    fn leads(&mut self, n: u8, leader: Option<(u8, u64)>) {
        for call in self.seen(n, "GetLeader") {
            let ask = GetLeaderRequest2::decode(call.body.clone()).unwrap();
            assert_eq!((ask.logic_pool_id, ask.copyset_id, ask.want_term), (1, 7, Some(true)));
            let Some((leader, term)) = leader else {
                self.error(&call, 11);
                continue;
            };
            let leader = Peer { id: None, address: Some(PeerId(peer(leader)).to_string()) };
            let mut out = BytesMut::new();
            put_response(&mut out, call.id, &GetLeaderResponse2 { leader, term: Some(term) }, 0);
            self.say(call.server, &out);
        }
    }

    fn pass(&mut self, ms: u64) {
        let until = self.now.after_ms(ms);
        while self.now < until {
            self.now = self.remote.deadline().max(self.now.after_ns(1)).min(until);
            self.run();
        }
    }

    fn take_done(&mut self) -> Vec<(u32, Outcome)> {
        std::mem::take(&mut self.done).into_iter().map(|(asker, outcome, _)| (asker, outcome)).collect()
    }

    /// Somebody is known to lead.
    fn led(me: Option<u64>, leader: u8, term: u64) -> Self {
        let mut world = Self::new(me);
        assert_eq!(world.ask(0, &read(), 0), Went::Nowhere);
        world.leads(1, Some((leader, term)));
        world.leads(2, None);
        world.leads(3, None);
        world
    }
}

fn read() -> ChunkOp {
    ChunkOp::Read { offset: 8192, len: BLOCK as u32 }
}
fn write() -> ChunkOp {
    ChunkOp::Write { sn: 1, offset: 4096, payload: Bytes::from(vec![5; BLOCK]), crcs: [1].into_iter().collect() }
}

#[test]
fn operations_go_to_the_leader_and_say_what_makes_them_harmless() {
    let mut world = World::led(None, 2, 4);
    assert_eq!(world.ask(1, &write(), 0), Went::Away);
    assert_eq!(world.ask(2, &read(), 3), Went::Away);
    let (writes, reads) = (world.seen(2, "WriteChunk"), world.seen(2, "ReadChunk"));
    let asked = writes[0].chunk();
    assert_eq!((asked.logic_pool_id, asked.copyset_id, asked.chunk_id, asked.sn()), (1, 7, 9, 1));
    assert_eq!((asked.offset(), asked.size(), writes[0].payload == [5; BLOCK]), (4096, 4096, true));
    assert_eq!(
        (asked.leader_term, asked.request_id, asked.attempt, asked.client_id),
        (Some(4), Some(1), None, Some(77))
    );
    let asked = reads[0].chunk();
    assert_eq!((asked.offset(), asked.size(), asked.client_id, asked.leader_term), (8192, 4096, None, None));
    world.answer(&reads[0], Status::Success, None, &[6; BLOCK]);
    world.answer(&writes[0], Status::Success, None, &[]);
    assert_eq!(std::mem::take(&mut world.done), [(2, Outcome::Success, vec![6; BLOCK]), (1, Outcome::Success, vec![])]);
    for (status, outcome) in [
        (Status::Nospace, Outcome::NoSpace),
        (Status::CrcFail, Outcome::CrcFail),
        (Status::ChunkNotexist, Outcome::NoChunk),
        (Status::Overload, Outcome::Overload),
        (Status::FailureUnknown, Outcome::Failed),
        (Status::InvalidRequest, Outcome::Invalid),
    ] {
        world.ask(3, &read(), 0);
        let call = world.seen(2, "ReadChunk").remove(0);
        world.answer(&call, status, None, &[]);
        assert_eq!(world.take_done(), [(3, outcome)]);
    }
    for (code, outcome) in [(1002, Outcome::Invalid), (1003, Outcome::Failed), (2003, Outcome::NotLeader)] {
        world.ask(4, &write(), 0);
        let call = world.seen(2, "WriteChunk").remove(0);
        world.error(&call, code);
        assert_eq!(world.take_done(), [(4, outcome)]);
    }
    assert_eq!(world.lost, 0, "all were answered");
}

#[test]
fn to_whom_does_not_know_zero_zeros_are_written() {
    let mut world = World::led(None, 2, 4);
    let zero = ChunkOp::Zero { offset: 4096, len: 600 << 10 };
    (1..3).for_each(|asker| assert_eq!(world.ask(asker, &zero, 0), Went::Away));
    for call in world.seen(2, "Zero") {
        assert_eq!((call.chunk().sn, call.payload.len()), (None, 0));
        world.error(&call, 1002);
    }
    assert_eq!(world.take_done(), [(1, Outcome::Failed), (2, Outcome::Failed)], "to be asked again");
    world.ask(1, &zero, 0);
    let call = world.seen(2, "WriteChunk").remove(0);
    let asked = call.chunk();
    assert_eq!((asked.offset(), asked.size(), asked.sn), (4096, 600 << 10, Some(3)));
    assert!(call.payload == [0; 600 << 10]);
    world.answer(&call, Status::Success, None, &[]);
    assert_eq!(world.take_done(), [(1, Outcome::Success)]);
}

#[test]
fn what_finds_the_way_full_is_asked_again_soon() {
    let mut world = World::led(None, 2, 4);
    let homes = world.homes.clone();
    let op = ChunkOp::Write { sn: 1, offset: 0, payload: vec![0; 16 << 20].into(), crcs: [].into_iter().collect() };
    for id in 1..4 {
        let errand = Errand { copyset: SET, homes: &homes, chunk: 9, sn: 1, op: &op, id, attempt: 0 };
        assert_eq!(world.remote.ask(world.now, errand, id as u32), Went::Away);
    }
    world.remote.poll(world.now);
    let sent = |event| match event {
        RemoteEvent::Done { asker, lost, outcome, .. } => Some((asker, lost, outcome)),
        _ => None,
    };
    let ended: Vec<_> = std::iter::from_fn(|| world.remote.next_event()).filter_map(sent).collect();
    assert_eq!(ended, [(2, false, Outcome::Failed), (3, false, Outcome::Failed)]);
}

#[test]
fn servers_that_are_not_called_make_room_for_others() {
    let mut world = World::led(None, 2, 4);
    let peers = |n: usize| peer_at(n / 250, n % 250);
    for n in 0..SERVERS_MAX + 100 {
        if world.remote.server(peers(n)).is_none() {
            world.run();
            assert!(world.remote.server(peers(n)).is_some(), "what has a connection is closed first");
        }
    }
    assert_eq!((world.remote.servers.len(), world.remote.by_address.len()), (SERVERS_MAX, SERVERS_MAX));
    assert!(world.closed.len() <= 3);
    world.ask(1, &write(), 0);
    world.pass(50);
    world.leads(1, Some((2, 4)));
    assert_eq!(world.ask(1, &write(), 0), Went::Away);
}

#[test]
fn a_redirection_is_followed_to_whom_it_names() {
    let mut world = World::led(None, 2, 4);
    world.ask(1, &write(), 0);
    let call = world.seen(2, "WriteChunk").remove(0);
    world.answer(&call, Status::Redirected, Some(peer(4)), &[]);
    assert_eq!(world.take_done(), [(1, Outcome::NotLeader)]);
    assert_eq!(world.ask(1, &write(), 1), Went::Nowhere, "its word is not enough: the term is missing");
    world.leads(4, Some((4, 5)));
    assert_eq!(world.ask(1, &write(), 2), Went::Away);
    let asked = world.seen(4, "WriteChunk").remove(0).chunk();
    assert_eq!((asked.leader_term(), asked.request_id(), asked.attempt()), (5, 1, 2));
}

#[test]
fn with_a_broken_connection_everything_ends_once() {
    let mut world = World::led(None, 2, 4);
    for asker in 1..6 {
        assert_eq!(world.ask(asker, &write(), 0), Went::Away);
    }
    let server = world.of(2);
    world.dead.push(peer(2));
    world.remote.closed(world.now, server);
    world.run();
    assert_eq!(world.take_done(), (1..6).map(|asker| (asker, Outcome::NotLeader)).collect::<Vec<_>>());
    assert_eq!(world.lost, 5);
    assert_eq!(world.ask(1, &write(), 1), Went::Nowhere);
    world.leads(3, Some((2, 4)));
    assert_eq!(world.ask(1, &write(), 1), Went::Nowhere, "3 has not noticed");
    world.pass(30);
    world.leads(1, Some((3, 5)));
    assert_eq!(world.ask(1, &write(), 1), Went::Away);
    assert_eq!(world.seen(3, "WriteChunk").len(), 1);
    assert!(world.done.is_empty());
}

#[test]
fn a_leader_that_says_nothing_is_left_when_another_one_shows() {
    let mut world = World::led(None, 2, 4);
    world.ask(1, &write(), 0);
    let late = world.seen(2, "WriteChunk").remove(0);
    world.pass(DOUBT_MS - 1);
    assert!(world.seen(1, "GetLeader").is_empty(), "not yet");
    world.pass(DOUBT_EVERY_MS + 1);
    world.leads(1, Some((2, 4)));
    world.leads(3, None);
    assert!(world.take_done().is_empty(), "nobody knows better");
    world.pass(100);
    world.leads(3, Some((3, 5)));
    assert_eq!(world.take_done(), [(1, Outcome::NotLeader)]);
    assert_eq!(world.ask(1, &write(), 1), Went::Away);
    let again = world.seen(3, "WriteChunk").remove(0);
    assert_eq!((again.chunk().attempt(), again.chunk().leader_term()), (1, 5));
    world.answer(&late, Status::Success, None, &[]);
    assert!(world.take_done().is_empty(), "an answer to what was given up");
    world.answer(&again, Status::Success, None, &[]);
    assert_eq!(world.take_done(), [(1, Outcome::Success)]);
}

#[test]
fn a_slow_leader_that_still_leads_keeps_its_operations() {
    let mut world = World::led(None, 2, 4);
    world.ask(1, &write(), 0);
    let slow = world.seen(2, "WriteChunk").remove(0);
    for _ in 0..9 {
        world.pass(100);
        (1..4).for_each(|n| world.leads(n, Some((2, 4))));
    }
    assert!(world.take_done().is_empty());
    world.answer(&slow, Status::Success, None, &[]);
    assert_eq!(world.take_done(), [(1, Outcome::Success)]);
    world.pass(5_000);
    assert_eq!(world.remote.deadline(), Instant::FAR, "nothing is left to do");
}

#[test]
fn silence_ends_in_time_outs_and_a_new_connection() {
    let mut world = World::led(None, 2, 4);
    world.ask(1, &write(), 0);
    world.pass(CALL_MS.0 - 1);
    assert!(world.done.is_empty());
    world.pass(2);
    assert_eq!(world.take_done(), [(1, Outcome::NotLeader)]);
    world.pass(3_000);
    assert!(world.closed.contains(&world.of(2)), "its questions for a leader timed out too");
    assert!(world.remote.deadline() > world.now, "it does not spin");
}

#[test]
fn the_replica_at_hand_is_asked_first() {
    let mut world = World::new(Some(peer(3)));
    let Went::Here(leader) = world.ask(1, &write(), 0) else { panic!("here") };
    assert!(world.remote.refused_here(world.now, SET, leader, peer(1)));
    world.run();
    assert_eq!(world.seen(1, "GetLeader").len() + world.seen(2, "GetLeader").len(), 2);
    world.remote.told(world.now, SET, Some(Leader { peer: peer(3), term: 6 }));
    assert_eq!(world.ask(1, &write(), 1), Went::Here(Leader { peer: peer(3), term: 6 }));
    let mut alone = World::new(Some(peer(3)));
    alone.homes.clear();
    let Went::Here(leader) = alone.ask(1, &write(), 0) else { panic!("here") };
    assert!(!alone.remote.refused_here(alone.now, SET, leader, 0), "nobody else may have it");
}

#[test]
fn nonsense_is_not_success() {
    let mut world = World::led(None, 2, 4);
    world.ask(1, &read(), 0);
    let call = world.seen(2, "ReadChunk").remove(0);
    let mut out = BytesMut::new();
    proto::frame::put_response_bytes(&mut out, call.id, &[0xff; 9]);
    world.say(call.server, &out);
    assert_eq!(world.take_done(), [(1, Outcome::Failed)]);
    world.ask(2, &read(), 0);
    let server = world.of(2);
    let mut input = &b"nonsense on the wire"[..];
    let (now, arena) = (world.now, Arc::clone(&world.arena));
    assert!(world.remote.received(now, server, &mut input, &arena).is_err());
    world.remote.closed(now, server);
    world.run();
    assert_eq!(world.take_done(), [(2, Outcome::NotLeader)]);
}
