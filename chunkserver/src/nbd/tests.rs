//! Whole sessions against a shard in memory. Client bytes are written by hand here, not by the server's codec.

use super::export;
use super::session::*;
use crate::io::Instant;
use crate::io::buffer::{Arena, PoolBuf};
use crate::volume::Volume;
use crate::volume::catalog::{Catalog, SharedCatalog};
use crate::volume::fake::{FakeShard, volume};
use crate::volume::io;
use crate::volume::map::Shape;
use proptest::prelude::*;
use std::sync::Arc;

const NOW: Instant = Instant(1_000_000_000);
const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;
const FLAGS: u16 = 0b1_0110_1101;
const GREETING: &[u8] = b"NBDMAGICIHAVEOPT\0\x03";

fn shape() -> Shape {
    Shape { size: SIZE, chunk_size: 1 << 20, stripe_unit: 64 << 10, stripe_count: 4 }
}

// What clients send and servers answer.
fn opt(option: u32, data: &[u8]) -> Vec<u8> {
    [b"IHAVEOPT", &option.to_be_bytes()[..], &(data.len() as u32).to_be_bytes(), data].concat()
}
fn go(option: u32, name: &str, infos: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend(name.as_bytes());
    data.extend((infos.len() as u16).to_be_bytes());
    infos.iter().for_each(|i| data.extend(i.to_be_bytes()));
    opt(option, &data)
}
fn opt_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let magic = 0x3_e889_0455_65a9_u64.to_be_bytes();
    [&magic[..], &option.to_be_bytes(), &kind.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat()
}
fn described(option: u32, size: u64) -> Vec<u8> {
    let export = [&[0, 0][..], &size.to_be_bytes(), &FLAGS.to_be_bytes()].concat();
    let block = [&[0, 3][..], &4096u32.to_be_bytes(), &4096u32.to_be_bytes(), &(32u32 << 20).to_be_bytes()].concat();
    [opt_reply(option, 3, &export), opt_reply(option, 3, &block), opt_reply(option, 1, &[])].concat()
}
fn request(command: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let head = [0x25, 0x60, 0x95, 0x13, 0, 0];
    let (command, cookie) = (command.to_be_bytes(), cookie.to_be_bytes());
    [&head[..], &command, &cookie, &offset.to_be_bytes(), &len.to_be_bytes()].concat()
}
fn write(cookie: u64, offset: u64, data: &[u8]) -> Vec<u8> {
    [request(1, cookie, offset, data.len() as u32), data.to_vec()].concat()
}
fn answer(error: u32, cookie: u64) -> Vec<u8> {
    [&[0x67, 0x44, 0x66, 0x98][..], &error.to_be_bytes(), &cookie.to_be_bytes()].concat()
}
const READ: u16 = 0;
const DISC: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const ZERO: u16 = 6;

/// A session, what it runs on, and a reactor that does everything at once.
struct Rig {
    session: Session,
    arena: Arc<Arena>,
    shard: FakeShard,
    volume: Arc<Volume>,
    running: Vec<(u32, io::VolumeIo)>,
    /// Received, not taken.
    unread: Vec<u8>,
    sent: Vec<u8>,
    disconnected: bool,
}

impl Rig {
    fn new(limits: Limits, arena_bytes: usize) -> Self {
        let volume = volume("vol", shape());
        let exports = SharedCatalog::new(Catalog::of([Arc::clone(&volume)]));
        Self {
            session: Session::new(exports, limits),
            arena: Arena::new(arena_bytes).unwrap(),
            shard: FakeShard::default(),
            volume,
            running: Vec::new(),
            unread: Vec::new(),
            sent: Vec::new(),
            disconnected: false,
        }
    }
    fn chosen(limits: Limits, arena_bytes: usize) -> Self {
        let mut rig = Self::new(limits, arena_bytes);
        let got = rig.talk(&[&[0, 0, 0, 3][..], &go(7, "vol", &[])].concat());
        assert_eq!(got, [GREETING, &described(7, SIZE)].concat());
        rig
    }
    fn events(&mut self, events: Vec<NbdEvent>) {
        for event in events {
            match event {
                NbdEvent::Io { id, io } => self.running.push((id, io)),
                NbdEvent::Disconnect => self.disconnected = true,
            }
        }
    }
    fn receive(&mut self, bytes: &[u8]) -> Result<Progress, CloseReason> {
        self.unread.extend_from_slice(bytes);
        let mut input = &self.unread[..];
        let mut events = Vec::new();
        let progress = self.session.received(NOW, &mut input, &self.arena, &mut events);
        self.unread = input.to_vec();
        self.events(events);
        progress
    }
    fn run_one(&mut self, at: usize) {
        let (id, mut io) = self.running.swap_remove(at);
        loop {
            let part = io.next_part(NOW).expect("every part is answered at once");
            let reply = self.shard.serve(part.copyset, part.op);
            if let io::Progress::Done(result) = io.reply(part.part, reply, NOW) {
                return self.session.done(id, result);
            }
        }
    }
    fn send_all(&mut self) {
        loop {
            let bufs = self.session.take_send();
            if bufs.is_empty() {
                return;
            }
            bufs.iter().for_each(|b| self.sent.extend_from_slice(b));
            self.session.sent();
        }
    }
    /// Receive, run and send until nothing moves; what was sent.
    fn talk(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut progress = self.receive(bytes).unwrap();
        loop {
            while !self.running.is_empty() {
                self.run_one(0);
            }
            self.send_all();
            if progress == Progress::Consumed || self.disconnected {
                return std::mem::take(&mut self.sent);
            }
            progress = self.receive(&[]).unwrap();
        }
    }
}

#[test]
fn a_session_from_greeting_to_goodbye() {
    let mut rig = Rig::chosen(Limits::default(), 4 << 20);
    let data: Vec<u8> = (0..200 << 10).map(|i| (i / 300) as u8).collect();
    assert_eq!(rig.talk(&write(1, 32 << 10, &data)), answer(0, 1));
    assert_eq!(rig.talk(&request(FLUSH, 2, 0, 0)), answer(0, 2));
    let len = data.len() as u32;
    assert_eq!(rig.talk(&request(READ, 3, 32 << 10, len)), [answer(0, 3), data.clone()].concat());
    assert_eq!(rig.talk(&request(ZERO, 4, 36 << 10, 100 << 10)), answer(0, 4));
    assert_eq!(rig.talk(&request(TRIM, 5, 140 << 10, 4096)), answer(0, 5));
    let mut want = data;
    want[4 << 10..104 << 10].fill(0);
    want[108 << 10..112 << 10].fill(0);
    assert_eq!(rig.talk(&request(READ, 6, 32 << 10, len)), [answer(0, 6), want].concat());
    let zeros = vec![0; 1 << 20];
    assert_eq!(rig.talk(&request(READ, 7, 32 * MIB, 1 << 20)), [answer(0, 7), zeros].concat());

    rig.receive(&[request(READ, 8, 0, 4096), request(DISC, 9, 0, 0), b"ignored".to_vec()].concat()).unwrap();
    assert!(rig.disconnected && !rig.session.may_receive() && !rig.session.is_finished());
    rig.run_one(0);
    assert!(!rig.session.is_finished(), "a reply waits to be sent");
    rig.send_all();
    assert_eq!(rig.sent, [answer(0, 8), vec![0; 4096]].concat());
    assert!(rig.session.is_finished());
}

#[test]
fn negotiation() {
    let mut rig = Rig::new(Limits::default(), 1 << 20);
    assert_eq!(rig.talk(&[0, 0, 0, 3]), GREETING);
    let named = [&3u32.to_be_bytes()[..], b"vol"].concat();
    assert_eq!(rig.talk(&opt(3, &[])), [opt_reply(3, 2, &named), opt_reply(3, 1, &[])].concat());
    assert_eq!(rig.talk(&go(6, "vol", &[3])), described(6, SIZE));
    let name_reply = opt_reply(6, 3, &[&[0, 1][..], b"vol"].concat());
    let got = rig.talk(&go(6, "", &[1]));
    assert!(got.windows(name_reply.len()).any(|w| w == name_reply), "the default export, with its name");
    let kind = |reply: &[u8]| u32::from_be_bytes(reply[12..16].try_into().unwrap());
    assert_eq!(kind(&rig.talk(&go(7, "other", &[]))), (1 << 31) + 6);
    assert_eq!(kind(&rig.talk(&opt(5, &[]))), (1 << 31) + 1);
    assert_eq!(kind(&rig.talk(&opt(8, &[]))), (1 << 31) + 1);
    assert!(rig.talk(&go(7, "vol", &[])[..16]).is_empty(), "half an option waits for the rest");
}

#[test]
fn export_name_abort_and_bad_beginnings() {
    for (flags, zeros) in [(3u8, 0), (1, 124)] {
        let mut rig = Rig::new(Limits::default(), 1 << 20);
        let got = rig.talk(&[&[0, 0, 0, flags][..], &opt(1, b"vol"), &request(FLUSH, 5, 0, 0)].concat());
        let export = [&SIZE.to_be_bytes()[..], &FLAGS.to_be_bytes(), &vec![0; zeros]].concat();
        assert_eq!(got, [GREETING, &export, &answer(0, 5)].concat());
    }
    let mut rig = Rig::new(Limits::default(), 1 << 20);
    assert_eq!(rig.talk(&[&[0, 0, 0, 3][..], &opt(2, &[])].concat()), [GREETING, &opt_reply(2, 1, &[])].concat());
    assert!(rig.disconnected && rig.session.is_finished());

    for (bad, why) in [
        ([&[0, 0, 0, 3][..], &opt(1, b"other")].concat(), CloseReason::UnknownExport),
        (b"GET / HTTP/1.1\r\n".to_vec(), CloseReason::Failed),
    ] {
        let mut rig = Rig::new(Limits::default(), 1 << 20);
        let got = rig.receive(&bad).unwrap_err();
        assert!(got == why || matches!(got, CloseReason::Negotiation(_)));
        assert_eq!(rig.receive(&[0; 100]), Err(CloseReason::Failed));
        assert!(!rig.session.may_receive());
    }
}

#[test]
fn bad_requests_are_answered_and_take_no_memory() {
    let mut rig = Rig::chosen(Limits::default(), 256 << 10);
    let free = rig.arena.free_bytes();
    let (einval, enospc) = (22, 28);
    for (bytes, want) in [
        (request(READ, 1, 1, 4096), answer(einval, 1)),
        (request(READ, 2, 0, 100), answer(einval, 2)),
        (request(READ, 3, SIZE, 4096), answer(einval, 3)),
        (request(READ, 4, 0, (32 << 20) + 4096), answer(einval, 4)),
        (write(5, SIZE - 4096, &[1; 8192]), answer(enospc, 5)),
        (write(6, 0, &[1; 4095]), answer(einval, 6)),
        (request(ZERO, 7, u64::MAX - 4095, 4096), answer(enospc, 7)),
        (request(9, 8, 0, 4096), answer(einval, 8)),
        (write(9, 0, &vec![1; 8 << 20]), answer(12, 9)), // ENOMEM: more than the arena can ever hold
    ] {
        assert_eq!(rig.talk(&bytes), want);
        assert_eq!(rig.arena.free_bytes(), free);
    }
    // 64 MiB of payload, in pieces, with nothing held.
    rig.receive(&request(1, 10, 0, 64 << 20)).unwrap();
    for _ in 0..64 {
        assert_eq!(rig.receive(&vec![7; 1 << 20]), Ok(Progress::Consumed));
        assert!(rig.unread.is_empty() && rig.arena.free_bytes() == free && rig.session.may_receive());
    }
    assert_eq!(rig.talk(&request(FLUSH, 11, 0, 0)), [answer(einval, 10), answer(0, 11)].concat());
    rig.volume.mark_deleted();
    assert_eq!(rig.talk(&write(12, 0, &[1; 4096])), answer(108, 12));
    assert_eq!(rig.talk(&request(READ, 13, 0, 4096)), answer(108, 13));
    assert!(matches!(rig.receive(&[0; 28]), Err(CloseReason::Request(_))));
}

#[test]
fn chunk_errors_reach_the_client_as_error_numbers() {
    use crate::shard::request::Outcome as O;
    let mut rig = Rig::chosen(Limits::default(), 1 << 20);
    for (outcome, error) in [(O::NoSpace, 28), (O::CrcFail, 5), (O::DiskFail, 5), (O::Stopping, 108), (O::Backward, 5)]
    {
        rig.shard.broken.insert(5 << 32, outcome);
        assert_eq!(rig.talk(&write(1, 0, &[1; 4096])), answer(error, 1));
        assert_eq!(rig.talk(&request(READ, 2, 0, 4096)), answer(error, 2), "no data behind an error");
    }
    assert_eq!(export::errno_of(io::VolumeError::TimedOut(O::NotLeader)), 5);
}

#[test]
fn a_client_that_does_not_read_its_replies_is_not_served_further() {
    let limits = Limits { requests: 1000, bytes: 1 << 20, io_timeout_ms: 1 };
    let mut rig = Rig::chosen(limits, 4 << 20);
    let reads: Vec<u8> = (0..40).flat_map(|i| request(READ, i, 0, 64 << 10)).collect();
    assert_eq!(rig.receive(&reads), Ok(Progress::Stalled));
    assert_eq!(rig.running.len(), 16, "1 MiB in flight");
    while !rig.running.is_empty() {
        rig.run_one(0);
    }
    assert!(!rig.session.may_receive(), "replies count until they are sent");
    assert_eq!(rig.receive(&[]), Ok(Progress::Stalled));
    assert!(rig.running.is_empty());
    let bufs = rig.session.take_send();
    assert!(!bufs.is_empty() && !rig.session.may_receive());
    rig.session.sent();
    rig.send_all();
    assert_eq!(rig.receive(&[]), Ok(Progress::Stalled));
    assert_eq!(rig.running.len(), 16);

    // Requests without data, and haggling, have limits too.
    let mut rig = Rig::chosen(Limits { requests: 4, ..limits }, 1 << 20);
    let zeroes: Vec<u8> = (0..9).flat_map(|i| request(ZERO, i, 0, 4096)).collect();
    assert_eq!((rig.receive(&zeroes), rig.running.len()), (Ok(Progress::Stalled), 4));
    let mut rig = Rig::chosen(limits, 1 << 20);
    assert_eq!(rig.receive(&request(9, 0, 0, 0).repeat(100_000)), Ok(Progress::Stalled));
    assert!(rig.session.backlog_bytes() < 80 << 10);
    let mut rig = Rig::new(limits, 1 << 20);
    assert_eq!(rig.receive(&[vec![0, 0, 0, 3], opt(3, &[]).repeat(100_000)].concat()), Ok(Progress::Stalled));
    assert!(rig.session.backlog_bytes() < 80 << 10);
}

#[test]
fn waiting_for_memory_holds_none() {
    let mut rig = Rig::chosen(Limits::default(), 1 << 20);
    let hog: Vec<PoolBuf> = std::iter::from_fn(|| rig.arena.alloc(64 << 10)).take(12).collect();
    let data: Vec<u8> = (0..512 << 10).map(|i| (i / 999) as u8).collect();
    assert_eq!(rig.receive(&write(1, 0, &data)), Ok(Progress::Stalled));
    assert_eq!(rig.receive(&[]), Ok(Progress::Stalled));
    assert_eq!(rig.arena.free_bytes(), 256 << 10);
    assert!(!rig.session.may_receive());
    drop(hog);
    assert_eq!(rig.receive(&[]), Ok(Progress::Consumed));
    assert_eq!(rig.talk(&request(READ, 2, 0, 512 << 10)), [answer(0, 1), answer(0, 2), data].concat());
    drop(std::mem::take(&mut rig.shard));
    assert_eq!(rig.arena.free_bytes(), 1 << 20, "nothing is kept when all is done");
}

#[derive(Clone, Debug)]
enum Cmd {
    Write(u64, u64, u8),
    Read(u64, u64),
    Zero(u64, u64),
    Flush,
}
fn cmds() -> impl Strategy<Value = Vec<Cmd>> {
    let (at, len) = (0u64..100, 1u64..80);
    let one = prop_oneof![
        (at.clone(), len.clone(), any::<u8>()).prop_map(|(a, l, s)| Cmd::Write(a, l, s)),
        (at.clone(), len.clone()).prop_map(|(a, l)| Cmd::Read(a, l)),
        (at, len).prop_map(|(a, l)| Cmd::Zero(a, l)),
        Just(Cmd::Flush),
    ];
    prop::collection::vec(one, 1..25)
}
/// The commands as a client's bytes, and the right answers.
fn script(cmds: &[Cmd]) -> (Vec<u8>, Vec<u8>) {
    let (mut model, mut bytes, mut want) = (vec![0u8; 200 * 4096], vec![], vec![]);
    for (cookie, cmd) in cmds.iter().enumerate() {
        let cookie = cookie as u64;
        let range = |at: &u64, len: &u64| (*at * 4096) as usize..((*at + *len) * 4096) as usize;
        want.extend(answer(0, cookie));
        match cmd {
            Cmd::Write(at, len, stamp) => {
                let data: Vec<u8> = (0..len * 4096).map(|i| stamp ^ (i / 500) as u8).collect();
                model[range(at, len)].copy_from_slice(&data);
                bytes.extend(write(cookie, at * 4096, &data));
            }
            Cmd::Read(at, len) => {
                want.extend(&model[range(at, len)]);
                bytes.extend(request(READ, cookie, at * 4096, (len * 4096) as u32));
            }
            Cmd::Zero(at, len) => {
                model[range(at, len)].fill(0);
                bytes.extend(request(ZERO, cookie, at * 4096, (len * 4096) as u32));
            }
            Cmd::Flush => bytes.extend(request(FLUSH, cookie, 0, 0)),
        }
    }
    (bytes, want)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_split_of_the_stream_gives_the_same_answers(
        cmds in cmds(),
        cuts in prop::collection::vec((1usize..200_000, any::<bool>()), 1..60),
    ) {
        // One request at a time, so that the answers come in order.
        let mut rig = Rig::chosen(Limits { requests: 1, ..Limits::default() }, 8 << 20);
        let (stream, want) = script(&cmds);
        let (mut at, mut got, mut cuts) = (0, vec![], cuts.into_iter().cycle());
        while at < stream.len() {
            let (len, direct) = cuts.next().unwrap();
            let end = (at + len).min(stream.len());
            if direct && let Some((mut buf, filled)) = rig.session.direct() {
                let added = (end - at).min(buf.len() - filled);
                buf[filled..filled + added].copy_from_slice(&stream[at..at + added]);
                let mut events = Vec::new();
                rig.session.direct_done(NOW, buf, added, &mut events);
                rig.events(events);
                at += added;
                got.extend(rig.talk(&[]));
            } else {
                got.extend(rig.talk(&stream[at..end]));
                at = end;
            }
        }
        prop_assert!(got == want);
        prop_assert!(rig.session.is_idle());
    }

    #[test]
    fn hostile_bytes_never_panic_and_hold_little(
        start in 0usize..3,
        chunks in prop::collection::vec(hostile(), 1..60),
    ) {
        let limits = Limits { requests: 8, bytes: 256 << 10, io_timeout_ms: 1 };
        let mut rig = if start == 0 { Rig::new(limits, 1 << 20) } else { Rig::chosen(limits, 1 << 20) };
        let all = rig.arena.free_bytes();
        for (i, bytes) in chunks.iter().enumerate() {
            let progress = rig.receive(bytes);
            prop_assert!(rig.running.len() <= 8);
            prop_assert!(rig.session.backlog_bytes() <= (256 << 10) + (80 << 10));
            match progress {
                Ok(Progress::Consumed) => prop_assert!(rig.unread.is_empty()),
                Ok(Progress::Stalled) => {
                    prop_assert!(!rig.session.may_receive());
                    rig.unread.clear(); // the rest would wait in the socket
                }
                Err(_) => break,
            }
            if i % 3 == 2 {
                while let Some(at) = rig.running.len().checked_sub(1) {
                    rig.run_one(at);
                }
                rig.send_all();
            }
        }
        let arena = Arc::clone(&rig.arena);
        drop(rig);
        prop_assert_eq!(arena.free_bytes(), all);
    }
}

/// Bytes near enough to the protocol to get far.
fn hostile() -> impl Strategy<Value = Vec<u8>> {
    let number = prop_oneof![Just(0u64), Just(4096), Just(SIZE), Just(u64::MAX), 0..SIZE, any::<u64>()];
    let len = prop_oneof![Just(4096u32), Just(65536), Just(32 << 20), Just(u32::MAX), 0u32..200_000, any::<u32>()];
    prop_oneof![
        4 => (0u16..10, any::<u64>(), number, len.clone()).prop_map(|(c, k, o, l)| request(c, k, o & !4095, l)),
        1 => prop::collection::vec(any::<u8>(), 0..70),
        2 => (0u32..12, prop::collection::vec(any::<u8>(), 0..40)).prop_map(|(o, d)| opt(o, &d)),
        2 => (6u32..8, "[a-z]{0,4}", prop::collection::vec(any::<u16>(), 0..4)).prop_map(|(o, n, i)| go(o, &n, &i)),
        2 => (1usize..70_000, any::<u8>()).prop_map(|(n, b)| vec![b; n]),
        1 => Just(vec![0, 0, 0, 3]),
    ]
}
