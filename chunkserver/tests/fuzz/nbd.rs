//! NBD: negotiation and requests alone, and whole sessions whose volumes answer at once.

use crate::engine::{Cuts, Rng, Target};
use crate::fake;
use crate::mutate::Corpus;
use chunkserver::io::Instant;
use chunkserver::io::buffer::Arena;
use chunkserver::nbd::{Limits, NbdEvent, Progress, Session};
use chunkserver::volume::Volume;
use chunkserver::volume::catalog::{Catalog, SharedCatalog};
use chunkserver::volume::io as volume_io;
use chunkserver::volume::map::{Geometry, Shape};
use proto::nbd::{
    ClientOption, Command, MAX_OPTION, MAX_STRING, Negotiation, NegotiationError, Request, RequestDecoder,
};
use raftlog::CopysetId;
use std::sync::Arc;

const CHUNK_SIZE: u32 = 1 << 20;
const VOLUME: u64 = 64 << 20;

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut out = b"IHAVEOPT".to_vec();
    out.extend_from_slice(&number.to_be_bytes());
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
    out
}

fn haggle(name: &str, infos: &[u16]) -> Vec<u8> {
    let mut out = (name.len() as u32).to_be_bytes().to_vec();
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(&(infos.len() as u16).to_be_bytes());
    infos.iter().for_each(|info| out.extend_from_slice(&info.to_be_bytes()));
    out
}

fn options() -> Vec<Vec<u8>> {
    vec![
        option(3, &[]),
        option(6, &haggle("vol", &[3, 1])),
        option(7, &haggle("vol", &[3])),
        option(7, &haggle("", &[])),
        option(7, &haggle("absent", &[0, 1, 2, 3, 9])),
        option(8, &[]),
        option(5, &[]),
        option(10, &haggle("vol", &[])),
        option(1, b"vol"),
        option(1, b"absent"),
        option(2, &[]),
        option(99, &[7; 9000]),
        option(3, &[1, 2]),
    ]
}

const WORDS: &[&[u8]] = &[
    b"IHAVEOPT",
    b"NBDMAGIC",
    b"\0\0\0\x07",
    b"\0\0\0\x01",
    b"\0\0\0\x03",
    b"vol",
    b"\0\0\x20\0",
    b"\x25\x60\x95\x13",
    b"\0",
];

fn corpus() -> Corpus {
    Corpus::new(options(), WORDS)
}

/// Flags and options.
fn negotiation(options: &Corpus, rng: &mut Rng) -> Vec<u8> {
    let mut stream = vec![0, 0, 0, if rng.one_in(20) { rng.next() as u8 } else { 1 + 2 * (rng.next() as u8 & 1) }];
    for _ in 0..rng.below(5) {
        stream.extend(if rng.one_in(2) { options.mutated(rng) } else { options.pick(rng) });
    }
    stream
}

/// [`Negotiation`] alone.
pub(crate) struct Options(Corpus);

impl Options {
    pub(crate) fn new() -> Self {
        Self(corpus())
    }
}

type Haggled = (Vec<ClientOption>, Option<NegotiationError>);

fn negotiate(stream: &[u8], cuts: &mut Cuts) -> Haggled {
    let (mut negotiation, mut all, mut rest) = (Negotiation::new(), Vec::new(), stream);
    while !rest.is_empty() {
        let mut input = cuts.piece(&mut rest);
        loop {
            match negotiation.step(&mut input) {
                Ok(None) => break,
                Ok(Some(option)) => all.push(option),
                Err(error) => return (all, Some(error)),
            }
            assert!(all.len() <= stream.len() / 16, "options out of nothing");
        }
        assert!(input.is_empty());
    }
    (all, None)
}

impl Target for Options {
    fn input(&mut self, rng: &mut Rng) -> bool {
        let mut stream = negotiation(&self.0, rng);
        if rng.one_in(2) {
            self.0.mutate(&mut stream, rng);
        }
        let whole = negotiate(&stream, &mut Cuts::none());
        for option in &whole.0 {
            if let ClientOption::Info(haggle) | ClientOption::Go(haggle) = option {
                assert!(haggle.name.len() <= MAX_STRING.min(MAX_OPTION));
            }
        }
        assert_eq!(negotiate(&stream, &mut Cuts::new(rng)), whole, "any split gives the same");
        whole.1.is_none()
    }
}

fn header(rng: &mut Rng) -> Vec<u8> {
    let mut out = 0x2560_9513u32.to_be_bytes().to_vec();
    let flags = if rng.one_in(8) { rng.next() as u16 } else { rng.next() as u16 & 3 };
    let command = *rng.pick(&[0u16, 0, 0, 1, 1, 1, 3, 4, 6, 6, 5, 2, 7, 0xffff]);
    // To leave early tests little.
    let command = if command == 2 && !rng.one_in(8) { 1 } else { command };
    out.extend_from_slice(&flags.to_be_bytes());
    out.extend_from_slice(&command.to_be_bytes());
    out.extend_from_slice(&rng.next().to_be_bytes());
    let block = rng.below((VOLUME >> 12) as usize) as u64;
    let offset = if rng.one_in(6) { rng.number(VOLUME) } else { block << 12 };
    let most = if command == 1 { 6 } else { 600 };
    let len = if rng.one_in(6) { rng.number(1 << 25) as u32 } else { (rng.below(most) as u32) << 12 };
    out.extend_from_slice(&offset.to_be_bytes());
    out.extend_from_slice(&len.to_be_bytes());
    out
}

fn requests(rng: &mut Rng) -> Vec<u8> {
    let mut stream = Vec::new();
    for _ in 0..1 + rng.below(6) {
        let header = header(rng);
        let len = u32::from_be_bytes(header[24..28].try_into().unwrap()) as usize;
        let payload = if header[7] == 1 && header[6] == 0 { len.min(80 << 10) } else { 0 };
        stream.extend(header);
        stream.resize(stream.len() + payload, rng.next() as u8);
    }
    stream
}

/// [`RequestDecoder`] alone, payloads passed over.
pub(crate) struct Requests(Corpus);

impl Requests {
    pub(crate) fn new() -> Self {
        Self(corpus())
    }
}

fn decode(stream: &[u8], cuts: &mut Cuts) -> (Vec<Request>, bool) {
    let (mut decoder, mut all, mut rest, mut skip) = (RequestDecoder::new(), Vec::new(), stream, 0usize);
    while !rest.is_empty() {
        let mut input = cuts.piece(&mut rest);
        loop {
            let skipped = skip.min(input.len());
            input = &input[skipped..];
            skip -= skipped;
            if skip > 0 {
                break;
            }
            match decoder.step(&mut input) {
                Ok(None) => break,
                Ok(Some(request)) => {
                    let moves = !matches!(request.command, Command::Flush | Command::Disconnect);
                    if moves && request.check(VOLUME, 4096, 1 << 25).is_ok() {
                        assert!(request.offset + u64::from(request.length) <= VOLUME);
                    }
                    skip = request.payload_len() as usize;
                    all.push(request);
                }
                Err(_) => return (all, false),
            }
        }
        assert!(input.is_empty());
    }
    (all, true)
}

impl Target for Requests {
    fn input(&mut self, rng: &mut Rng) -> bool {
        let mut stream = Vec::new();
        for _ in 0..1 + rng.below(6) {
            let header = header(rng);
            let len = u32::from_be_bytes(header[24..28].try_into().unwrap()) as usize;
            let payload = if header[7] == 1 { len.min(rng.below(300)) } else { 0 };
            stream.extend(header);
            stream.resize(stream.len() + payload, 0x25);
        }
        if rng.one_in(2) {
            self.0.mutate(&mut stream, rng);
        }
        let whole = decode(&stream, &mut Cuts::none());
        assert_eq!(decode(&stream, &mut Cuts::new(rng)), whole, "any split gives the same");
        whole.1
    }
}

/// Whole sessions.
pub(crate) struct Sessions {
    options: Corpus,
    exports: SharedCatalog,
    arenas: Vec<Arc<Arena>>,
}

impl Sessions {
    pub(crate) fn new() -> Self {
        let shape = Shape { size: VOLUME, chunk_size: CHUNK_SIZE, stripe_unit: 65536, stripe_count: 4 };
        let copysets: Vec<CopysetId> = (0..3).map(|i| CopysetId::new(1, i)).collect();
        let volume = |id: u32, name: &str, shape| {
            let geometry = Geometry::new(id, shape, copysets.clone()).unwrap();
            Arc::new(Volume::new(id, name.to_owned(), 1, 0, geometry))
        };
        let plain = Shape { stripe_unit: 0, stripe_count: 0, ..shape };
        let exports = SharedCatalog::new(Catalog::of([volume(1, "vol", shape), volume(2, "plain", plain)]));
        let arenas = [64 << 10, 1 << 20, (1 << 20) + (300 << 10)].map(|size| Arena::new(size).unwrap()).to_vec();
        Self { options: corpus(), exports, arenas }
    }

    /// Bytes of all replies, whether the session failed, requests it never answered.
    fn run(&self, stream: &[u8], cuts: &mut Cuts, arena: &Arc<Arena>, seed: u64) -> (usize, bool) {
        let limits = Limits { requests: 4, bytes: 1 << 20, io_timeout_ms: 100 };
        let mut session = Session::new(self.exports.clone(), limits);
        let (mut sent, mut rest, mut events, mut steps) = (0, stream, Vec::new(), 0);
        'stream: while !rest.is_empty() {
            let mut input = cuts.piece(&mut rest);
            loop {
                let progress = session.received(Instant(1), &mut input, arena, &mut events);
                let had = !events.is_empty();
                for event in events.drain(..) {
                    if let NbdEvent::Io { id, io } = event {
                        session.done(id, drive(io, seed));
                    }
                }
                let before = sent;
                sent += send(&mut session);
                match progress {
                    Ok(Progress::Consumed) => break,
                    Ok(Progress::Stalled) => {
                        // Nothing is in flight or unsent: it may only wait for what just went.
                        steps = if had || sent > before { 0 } else { steps + 1 };
                        assert!(steps < 2, "a session that waits for nothing");
                    }
                    Err(_) => {
                        assert_eq!(session.requests_in_flight(), 0);
                        return (sent, true);
                    }
                }
            }
            if session.is_finished() {
                break 'stream;
            }
            if steps == 0
                && let Some((mut buf, filled)) = session.direct()
            {
                let added = (buf.len() - filled).min(rest.len());
                buf[filled..filled + added].copy_from_slice(&rest[..added]);
                rest = &rest[added..];
                session.direct_done(Instant(1), buf, added, &mut events);
            }
        }
        for event in events.drain(..) {
            if let NbdEvent::Io { id, io } = event {
                session.done(id, drive(io, seed));
            }
        }
        sent += send(&mut session);
        assert_eq!((session.requests_in_flight(), session.backlog_bytes()), (0, 0));
        (sent, false)
    }
}

fn send(session: &mut Session) -> usize {
    let mut sent = 0;
    loop {
        let bufs = session.take_send();
        if bufs.is_empty() {
            return sent;
        }
        sent += bufs.iter().map(bytes::Bytes::len).sum::<usize>();
        session.sent();
    }
}

/// Runs a volume I/O to its end. What is answered depends on the request alone, so any split sees the same.
fn drive(mut io: volume_io::VolumeIo, seed: u64) -> Result<volume_io::Pieces, volume_io::VolumeError> {
    let mut now = Instant(1);
    let mut parts = 0u64;
    for _ in 0..100_000 {
        let Some(part) = io.next_part(now) else {
            now = io.wake_at().expect("an I/O waits for something").max(now.after_ms(1));
            continue;
        };
        parts += 1;
        let mut rng = Rng::of(seed, parts);
        let reply = fake::answer(&part.op, CHUNK_SIZE, 12, &mut rng);
        drop(part.op);
        if let volume_io::Progress::Done(result) = io.reply(part.part, reply, now) {
            return result;
        }
    }
    panic!("an I/O that never ends");
}

impl Target for Sessions {
    fn input(&mut self, rng: &mut Rng) -> bool {
        let mut stream = negotiation(&self.options, rng);
        if rng.one_in(3) {
            self.options.mutate(&mut stream, rng);
        }
        let name = *rng.pick(&["vol", "plain"]);
        stream.extend(if rng.one_in(2) { option(7, &haggle(name, &[3])) } else { option(1, name.as_bytes()) });
        stream.extend(requests(rng));
        if rng.one_in(4) {
            self.options.mutate(&mut stream, rng);
        }
        let arena = rng.pick(&self.arenas);
        let seed = rng.next();
        let whole = self.run(&stream, &mut Cuts::none(), arena, seed);
        let split = self.run(&stream, &mut Cuts::new(rng), arena, seed);
        assert_eq!(split, whole, "any split gives the same");
        assert_eq!(arena.free_bytes(), arena.size(), "every buffer came back");
        !whole.1
    }
}
