//! Both ends of peers' connections against each other, over a wire that splits bytes as it likes.

use super::*;
use crate::io::Instant;
use crate::io::buffer::Arena;
use crate::limits::{PEER_CONTROL_BYTES_MAX, PEER_DATA_BYTES_MAX};
use crate::shard::mail::{PeerBody, PeerMail};
use bytes::{Bytes, BytesMut};
use copyset::PeerId;
use copyset::raft::eraftpb::{Entry, Message, MessageType};
use proto::frame::{Decoder, Step, put_error, put_response_bytes};
use proto::peer::{Lane, Status};
use raftlog::{BLOCK, CopysetId, crc32c};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

const CHUNK: u32 = 1 << 20;

fn peer(last: u8) -> u64 {
    PeerId::new(std::net::Ipv4Addr::new(10, 0, 0, last), 8200, 0).0
}

fn identity(last: u8, shards: u16) -> Identity {
    Identity { peer: peer(last), shard: 0, shards, chunk_size: CHUNK, disk: [last; 16], cluster: [0; 16] }
}

fn message(kind: MessageType, from: u8, to: u8, number: u64) -> Message {
    let mut message = Message { from: peer(from), to: peer(to), term: 1, index: number, ..Message::default() };
    message.set_msg_type(kind);
    message
}

fn mail(copyset: u64, message: Message) -> PeerMail {
    let (from, to) = (message.from, message.to);
    PeerMail { copyset: CopysetId(copyset), from, to, body: PeerBody::Raft(Box::new(message)) }
}

fn entry(index: u64, blocks: usize) -> Entry {
    let data: Vec<u8> = (0..blocks * BLOCK).map(|at| (at as u64 * 31 + index * 7 + at as u64 / 509) as u8).collect();
    let mut context: Vec<u8> = data.chunks(BLOCK).flat_map(|block| crc32c(block).to_le_bytes()).collect();
    context.extend_from_slice(b"header");
    Entry { index, term: 1, context: context.into(), data: data.into(), ..Entry::default() }
}

fn append(copyset: u64, index: u64, blocks: &[usize]) -> PeerMail {
    let mut message = message(MessageType::MsgAppend, 1, 2, index);
    let entries: Vec<_> = blocks.iter().zip(1..).map(|(&blocks, at)| entry(index + at, blocks)).collect();
    message.set_entries(entries.into());
    mail(copyset, message)
}

fn is_append(mail: &PeerMail) -> bool {
    matches!(&mail.body, PeerBody::Raft(message) if message.get_msg_type() == MessageType::MsgAppend)
}

fn heartbeat(copyset: u64, number: u64) -> PeerMail {
    mail(copyset, message(MessageType::MsgHeartbeat, 1, 2, number))
}

/// The called end of one connection.
struct Far {
    decoder: Decoder,
    inbound: Option<Inbound>,
    input: BytesMut,
}

/// What the called process does with connections.
#[derive(Clone, Copy, PartialEq)]
enum Mood {
    Serves,
    /// Connections fail.
    Away,
    /// It takes connections and bytes, and says nothing.
    Mute,
    /// It is a server of something else.
    Foreign,
    /// It writes rubbish.
    Rubbish,
}

struct World {
    peers: Peers,
    server: Identity,
    mood: Mood,
    /// The network carries nothing.
    jammed: bool,
    events: VecDeque<PeerEvent>,
    far: BTreeMap<usize, Far>,
    arena: Arc<Arena>,
    now: Instant,
    dials: Vec<Instant>,
    received: Vec<PeerMail>,
    ups: usize,
    lost: Vec<Option<u64>>,
    rng: u64,
    inbound_bad: (u64, u64),
}

impl World {
    fn new(seed: u64, shards: u16) -> Self {
        Self {
            peers: Peers::new(identity(1, 1), seed),
            server: identity(2, shards),
            mood: Mood::Serves,
            jammed: false,
            events: VecDeque::new(),
            far: BTreeMap::new(),
            arena: Arena::new(8 << 20).unwrap(),
            now: Instant(1_000_000_000),
            dials: Vec::new(),
            received: Vec::new(),
            ups: 0,
            lost: Vec::new(),
            rng: seed,
            inbound_bad: (0, 0),
        }
    }

    fn below(&mut self, n: usize) -> usize {
        self.rng = self.rng.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.rng >> 33) as usize % n.max(1)
    }

    fn send(&mut self, mail: PeerMail) {
        self.peers.mail(self.now, mail, &mut self.events);
        self.settle();
    }

    /// Until nothing happens any more at this time.
    fn settle(&mut self) {
        loop {
            self.peers.poll(self.now, &mut self.events);
            let mut busy = false;
            while let Some(event) = self.events.pop_front() {
                busy = true;
                self.event(event);
            }
            for link in self.far.keys().copied().collect::<Vec<_>>() {
                busy |= self.carry(link);
            }
            if !busy {
                return;
            }
        }
    }

    fn event(&mut self, event: PeerEvent) {
        match event {
            PeerEvent::Dial { link, address, .. } => {
                assert_eq!(address, Address::Tcp(std::net::Ipv4Addr::new(10, 0, 0, 2), 8200));
                self.dials.push(self.now);
                let there = self.mood != Mood::Away;
                if self.peers.dialed(self.now, link, there, &mut self.events) {
                    self.far.insert(link, Far { decoder: Decoder::new(), inbound: None, input: BytesMut::new() });
                }
            }
            PeerEvent::Close(link) => {
                self.far.remove(&link);
                self.peers.closed(self.now, link, &mut self.events);
            }
            PeerEvent::Send(_) => {}
            PeerEvent::Up(to) => {
                assert_eq!(to, peer(2));
                self.ups += 1;
            }
            PeerEvent::Lost { copyset, .. } => self.lost.push(copyset.map(|id| id.0)),
        }
    }

    /// Carry bytes of one connection, both ways; true if there were any.
    fn carry(&mut self, link: usize) -> bool {
        if self.jammed {
            return false;
        }
        let mut busy = false;
        let sent = self.peers.take_send(link, 5);
        if !sent.is_empty() {
            busy = true;
            self.peers.sent(link);
        }
        let piece = 1 + self.below(100_000);
        let Some(far) = self.far.get_mut(&link) else { return busy };
        sent.iter().for_each(|buf| far.input.extend_from_slice(buf));
        if self.mood == Mood::Mute {
            return busy;
        }
        let mut back = BytesMut::new();
        let length = far.input.len().min(piece);
        let bytes = far.input.split_to(length);
        busy |= !bytes.is_empty();
        let mut input = &bytes[..];
        if far.inbound.is_none() && !input.is_empty() {
            let Ok(Step::Head(head)) = far.decoder.step(&mut input) else { return busy };
            let id = head.meta.correlation_id;
            match self.mood {
                Mood::Foreign => put_error(&mut back, id, 1002, "Fail to find method"),
                Mood::Rubbish => back.extend_from_slice(b"PRPC\0\0\0\x02\0\0\0\x02\xff\xff"),
                _ => {
                    let hello = inbound::read_hello(&head.body).unwrap();
                    let status = judge(&self.server, &hello);
                    far.inbound = Some(Inbound::new(&self.server, hello, id, status));
                }
            }
        }
        if let Some(inbound) = &mut far.inbound {
            let progress = inbound.received(&mut input, &self.arena, &mut self.received).unwrap();
            assert_eq!(progress, Progress::Consumed);
            let (crcs, mail) = inbound.take_bad();
            self.inbound_bad = (self.inbound_bad.0 + crcs, self.inbound_bad.1 + mail);
            inbound.take_send(100).iter().for_each(|buf| back.extend_from_slice(buf));
            inbound.sent();
        }
        while !back.is_empty() {
            let length = 1 + self.below(back.len());
            let part = back.split_to(length);
            self.peers.received(self.now, link, &part, &mut self.events);
        }
        busy
    }

    fn pass(&mut self, ms: u64) {
        let until = self.now.after_ms(ms);
        while self.now < until {
            self.now = self.peers.deadline().max(self.now.after_ms(1)).min(until);
            self.settle();
        }
    }

    /// The connections break.
    fn cut(&mut self) {
        for link in std::mem::take(&mut self.far).into_keys() {
            self.peers.closed(self.now, link, &mut self.events);
        }
        self.settle();
    }

    fn state(&self) -> PeerState {
        self.peers.states().next().unwrap()
    }
}

fn show(mail: &[PeerMail]) -> Vec<String> {
    let one = |mail: &PeerMail| format!("{:?} {:08x}", mail.copyset, crc32c(format!("{mail:?}").as_bytes()));
    mail.iter().map(one).collect()
}

#[test]
fn mail_arrives_whole_and_in_order_whatever_the_split() {
    for seed in 1..30 {
        let mut world = World::new(seed, 1);
        let (mut data, mut control) = (vec![append(1, 1, &[1])], vec![heartbeat(1, 1)]);
        // Before a link is up it takes less.
        world.send(data[0].clone());
        world.send(control[0].clone());
        for number in 0..40u64 {
            let blocks: Vec<usize> = (0..world.below(4)).map(|_| world.below(20)).collect();
            let next = match world.below(3) {
                0 => heartbeat(number, number),
                1 => append(number, number, &blocks),
                _ => mail(number, message(MessageType::MsgAppendResponse, 1, 2, number)),
            };
            if is_append(&next) {
                data.push(next.clone());
            } else {
                control.push(next.clone());
            }
            if world.below(3) == 0 {
                world.send(next);
            } else {
                world.peers.mail(world.now, next, &mut world.events);
            }
        }
        world.settle();
        let (appends, other): (Vec<_>, Vec<_>) = world.received.into_iter().partition(is_append);
        assert_eq!((show(&appends), show(&other)), (show(&data), show(&control)), "seed {seed}");
        assert_eq!((world.lost.len(), world.dials.len(), world.inbound_bad), (0, 2, (0, 0)));
        drop(appends);
        assert_eq!(world.arena.free_bytes(), 8 << 20, "payloads came in pool memory and went back");
    }
}

#[test]
fn a_payload_with_wrong_checksums_costs_its_message_only() {
    let mut world = World::new(3, 1);
    let mut bad = append(1, 1, &[1, 2, 1]);
    let PeerBody::Raft(raft) = &mut bad.body else { panic!() };
    let mut data = raft.get_entries()[1].data.to_vec();
    data[BLOCK + 17] ^= 4;
    raft.mut_entries()[1].data = data.into();
    let good = [append(1, 10, &[1]), append(2, 20, &[0, 3])];
    for mail in [good[0].clone(), bad, good[1].clone()] {
        world.peers.mail(world.now, mail, &mut world.events);
    }
    world.settle();
    assert_eq!(show(&world.received), show(&good));
    assert_eq!((world.inbound_bad, world.state().up), ((1, 0), 1));
}

#[test]
fn a_peer_that_does_not_drain_is_bounded_and_heartbeats_go_on() {
    let mut world = World::new(4, 1);
    world.send(append(1, 1, &[1]));
    world.send(heartbeat(1, 1));
    world.jammed = true;
    for number in 0..40 {
        world.peers.mail(world.now, append(7, number, &[256]), &mut world.events);
    }
    let pending: usize = world.peers.take_send(0, 1000).iter().map(Bytes::len).sum();
    assert!((PEER_DATA_BYTES_MAX / 2..=PEER_DATA_BYTES_MAX + 4096).contains(&pending), "{pending} bytes");
    world.settle();
    let lost = world.lost.len();
    assert!((24..=26).contains(&lost) && world.lost.iter().all(|one| *one == Some(7)), "raft is told what was lost");
    for number in 0..100_000 {
        world.peers.mail(world.now, heartbeat(number, number), &mut world.events);
    }
    let pending: usize = world.peers.take_send(1, 10_000).iter().map(Bytes::len).sum();
    assert!((PEER_CONTROL_BYTES_MAX / 2..=PEER_CONTROL_BYTES_MAX + 4096).contains(&pending), "{pending} bytes");
    assert_eq!(world.lost.len(), lost, "a lost heartbeat is nothing to tell");
}

#[test]
fn a_dead_peer_costs_no_memory_and_is_tried_again_ever_more_rarely() {
    let mut world = World::new(5, 1);
    world.mood = Mood::Away;
    for _ in 0..200 {
        world.send(append(1, 1, &[16]));
        world.pass(50);
    }
    assert_eq!(world.state().end, Some(LinkEnd::Unreachable));
    assert!(world.lost.len() >= 200 && world.received.is_empty());
    let pauses: Vec<u64> = world.dials.windows(2).map(|pair| pair[1].since_ns(pair[0]) / 1_000_000).collect();
    assert!((14..50).contains(&pauses.len()), "10 s of pauses that grow to half a second: {pauses:?}");
    assert!(pauses.iter().all(|&pause| pause <= 850), "{pauses:?}");
    assert!(pauses.iter().rev().take(8).any(|pause| *pause != pauses[pauses.len() - 1]), "no jitter");

    world.mood = Mood::Serves;
    world.peers.nudge(world.now, peer(2));
    world.send(append(1, 2, &[1]));
    world.pass(1);
    assert_eq!((world.ups, world.received.len()), (1, 1), "it called, so it is called at once");
}

#[test]
fn what_a_broken_connection_held_is_lost_and_the_next_one_carries_on() {
    let mut world = World::new(6, 1);
    world.send(append(1, 1, &[1]));
    world.jammed = true;
    world.send(append(1, 2, &[40]));
    world.jammed = false;
    world.cut();
    assert_eq!(world.lost, [None]);
    world.pass(30);
    world.send(append(1, 3, &[2]));
    world.pass(30);
    assert_eq!(show(&world.received), show(&[append(1, 1, &[1]), append(1, 3, &[2])]));
}

#[test]
fn a_connection_that_fell_silent_is_given_up_with_its_twin() {
    let mut world = World::new(7, 1);
    world.send(append(1, 1, &[1]));
    world.send(heartbeat(1, 1));
    world.pass(30_000);
    assert_eq!((world.state().up, world.lost.len()), (2, 0), "an idle one is not silent: it answers pings");
    world.mood = Mood::Mute;
    world.pass(3_000);
    assert_eq!((world.lost.last(), world.state().up), (Some(&None), 0));
    world.mood = Mood::Serves;
    for number in 0..10 {
        world.send(append(1, 10 + number, &[1]));
        world.send(heartbeat(1, number));
        world.pass(100);
    }
    assert_eq!(world.state().up, 2);
}

#[test]
fn a_handshake_that_fails_says_why_and_is_not_repeated_in_haste() {
    let with = |change: fn(&mut Identity), mood| {
        let mut world = World::new(8, 1);
        change(&mut world.server);
        world.mood = mood;
        for _ in 0..40 {
            world.send(append(1, 1, &[1]));
            world.pass(100);
        }
        assert!((1..8).contains(&world.dials.len()), "{:?}", world.dials);
        assert!(world.received.is_empty() && world.ups == 0);
        assert!(world.peers.counts().refused >= 1);
        world.state().end.unwrap()
    };
    assert_eq!(with(|server| server.peer = peer(3), Mood::Serves), LinkEnd::Refused(Status::NotMe));
    assert_eq!(with(|server| server.chunk_size *= 2, Mood::Serves), LinkEnd::Refused(Status::ChunkSize));
    assert_eq!(with(|_| {}, Mood::Foreign), LinkEnd::Foreign(1002));
    assert_eq!(with(|_| {}, Mood::Rubbish), LinkEnd::Protocol);
}

#[test]
fn mail_goes_to_the_shard_that_the_peer_has_for_it() {
    let mut world = World::new(9, 5);
    for number in 0..400 {
        world.send(append(number % 50, number, &[1]));
        world.pass(10);
    }
    let state = world.state();
    assert_eq!((state.up, state.links), (5, 10), "five shards, and nothing urgent was sent");
    let shards: Vec<_> = world.far.values().filter_map(|far| Some(far.inbound.as_ref()?.hello().to_shard)).collect();
    assert_eq!(shards.len(), 5);
    assert!((350..400).contains(&world.received.len()), "{}", world.received.len());
}

#[test]
fn who_gets_no_mail_is_forgotten() {
    let mut world = World::new(10, 1);
    world.send(append(1, 1, &[1]));
    world.send(heartbeat(1, 1));
    world.pass(59_000);
    assert_eq!(world.far.len(), 2);
    world.pass(2_000);
    assert_eq!((world.far.len(), world.peers.states().count()), (0, 0));
    world.send(append(1, 2, &[1]));
    assert_eq!(world.received.len(), 3, "and known again when there is some");
}

#[test]
fn mail_of_others_and_to_ourselves_does_not_travel() {
    let mut world = World::new(11, 1);
    world.send(mail(1, message(MessageType::MsgAppend, 3, 2, 1)));
    world.send(mail(1, message(MessageType::MsgAppend, 1, 1, 1)));
    assert_eq!((world.dials.len(), world.lost.len(), world.peers.counts().lost), (0, 2, 2));
}

#[test]
fn who_may_speak() {
    let me = identity(2, 3);
    let hello = proto::peer::Hello {
        lane: Lane::Data,
        chunk_size: CHUNK,
        from: peer(1),
        to: peer(2),
        from_shard: 0,
        to_shard: 2,
        shards: 9,
        disk: [1; 16],
        cluster: [0; 16],
    };
    assert_eq!(judge(&me, &hello), Status::Ok);
    let me = Identity { cluster: [7; 16], ..me };
    assert_eq!(judge(&me, &hello), Status::Ok, "it knows no cluster");
    for (other, status) in [
        (proto::peer::Hello { to: peer(3), ..hello }, Status::NotMe),
        (proto::peer::Hello { from: peer(2), ..hello }, Status::Duplicate),
        (proto::peer::Hello { cluster: [8; 16], ..hello }, Status::Cluster),
        (proto::peer::Hello { chunk_size: 1, ..hello }, Status::ChunkSize),
        (proto::peer::Hello { to_shard: 3, ..hello }, Status::Shard),
    ] {
        assert_eq!(judge(&me, &other), status);
    }
}

/// Frames for an inbound end that has said its welcome.
fn frames(mail: impl IntoIterator<Item = PeerMail>) -> Vec<u8> {
    let mut writer = proto::peer::BatchWriter::default();
    mail.into_iter().for_each(|mail| writer.push(convert::to_wire(mail).unwrap()));
    let mut out = BytesMut::new();
    let payloads = writer.finish(&mut out, 1);
    payloads.iter().for_each(|payload| out.extend_from_slice(payload));
    out.to_vec()
}

fn inbound() -> Inbound {
    let hello = proto::peer::Hello {
        lane: Lane::Data,
        chunk_size: CHUNK,
        from: peer(1),
        to: peer(2),
        from_shard: 0,
        to_shard: 0,
        shards: 1,
        disk: [1; 16],
        cluster: [0; 16],
    };
    Inbound::new(&identity(2, 1), hello, 1, Status::Ok)
}

#[test]
fn without_a_buffer_it_waits_and_goes_on_where_it_was() {
    let arena = Arena::new(64 << 10).unwrap();
    let mut inbound = inbound();
    let sent = [append(1, 1, &[8, 0, 8]), append(1, 4, &[1])];
    let stream = frames(sent.clone());
    let (mut input, mut out) = (&stream[..], Vec::new());
    let taken = arena.alloc(32 << 10).unwrap();
    assert_eq!(inbound.received(&mut input, &arena, &mut out), Ok(Progress::NoBuffer));
    assert!(inbound.wants_buffer() && !inbound.may_receive() && !inbound.holds_payload() && out.is_empty());
    drop(taken);
    assert_eq!(inbound.received(&mut input, &arena, &mut out), Ok(Progress::NoBuffer), "the second message's");
    assert_eq!(show(&out), show(&sent[..1]));
    out.clear();
    assert_eq!(inbound.received(&mut input, &arena, &mut out), Ok(Progress::Consumed));
    assert_eq!(show(&out), show(&sent[1..]));
}

#[test]
fn large_payloads_are_received_straight_into_place() {
    let arena = Arena::new(2 << 20).unwrap();
    let mut inbound = inbound();
    let sent = [append(1, 1, &[64, 1, 128])];
    let stream = frames(sent.clone());
    let (first, rest) = stream.split_at(2000);
    let (mut input, mut out) = (first, Vec::new());
    assert_eq!(inbound.received(&mut input, &arena, &mut out), Ok(Progress::Consumed));
    let (mut buf, filled) = inbound.direct().expect("enough is missing");
    assert!(inbound.direct().is_none() && inbound.holds_payload(), "lent once");
    let missing = 64 * BLOCK - filled;
    buf[filled..].copy_from_slice(&rest[..missing]);
    inbound.direct_done(buf, missing);
    let mut input = &rest[missing..];
    assert_eq!(inbound.received(&mut input, &arena, &mut out), Ok(Progress::Consumed));
    assert_eq!(show(&out), show(&sent));
}

#[test]
fn what_makes_no_sense_ends_the_connection() {
    let arena = Arena::new(1 << 20).unwrap();
    let request = |service, method, body: &[u8]| {
        let mut out = BytesMut::new();
        let head = proto::frame::RequestHead { service, method, log_id: None, correlation_id: 1 };
        proto::frame::put_request_bytes(&mut out, &head, body, 0);
        out
    };
    let mut answer = BytesMut::new();
    put_response_bytes(&mut answer, 1, b"");
    let other = request("ChunkService", "WriteChunk", b"");
    let version = request(proto::peer::SERVICE, proto::peer::BATCH, &[2, 0, 0, 0, 0, 0, 0, 0]);
    let again = request(proto::peer::SERVICE, proto::peer::HELLO, b"");
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"junk", &answer, &other, &version, &again] {
        let (mut input, mut out) = (bytes, Vec::new());
        assert!(inbound().received(&mut input, &arena, &mut out).is_err() && out.is_empty(), "{bytes:?}");
    }
}
