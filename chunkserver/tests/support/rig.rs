//! A whole reactor on an `Io` that completes everything at once: what is left is software.
//!
//! One client on one connection. What it sends is received in pieces of [`RECV`] bytes, its replies are counted and dropped,
//! the disk reads as zeros and forgets.

use bytes::Bytes;
use chunkserver::chunk::{ExtentPool, FLAG_SPARSE, Layout, Params};
use chunkserver::io::buffer::{Arena, RecvBuf};
use chunkserver::io::{Completion, ConnId, Done, Errno, Instant, Io, ListenerId, Op, Token};
use chunkserver::mailbox::mesh;
use chunkserver::metrics::{OpKind, ProcessStats};
use chunkserver::reactor::{Protocol, Reactor, Setup};
use chunkserver::service::{Info, Shared};
use chunkserver::shard::{Arenas, Config, Shard};
use chunkserver::volume::catalog::{Catalog, SharedCatalog};
use copyset::PeerId;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

/// A receive buffer of the server.
const RECV: usize = 64 << 10;
/// Time between two turns, nanoseconds.
const TURN_NS: u64 = 50_000;
pub(crate) const CHUNK_SIZE: u32 = 16 << 20;
/// Chunks that writes go to.
pub(crate) const CHUNKS: u64 = 16;
const PORT: u16 = 8200;

/// What the client and the kernel have for each other.
#[derive(Default)]
struct Wire {
    to_server: VecDeque<Bytes>,
    /// A receive that waits for bytes.
    waiting: Option<Token>,
    connected: bool,
    sends: u64,
}

/// The kernel.
pub(crate) struct NullIo {
    now: u64,
    wire: Rc<RefCell<Wire>>,
    done: Vec<Completion>,
}

impl Io for NullIo {
    fn now(&self) -> Instant {
        Instant(self.now)
    }

    fn submit(&mut self, token: Token, op: Op) {
        let mut wire = self.wire.borrow_mut();
        let done = match op {
            Op::Read { mut buf, .. } => {
                buf.fill(0);
                Done::Read { buf, result: Ok(()) }
            }
            Op::Write { .. } => Done::Write(Ok(())),
            Op::Sync { .. } => Done::Sync(Ok(())),
            Op::Accept { .. } if std::mem::replace(&mut wire.connected, true) => return,
            Op::Accept { .. } => Done::Accept(Ok(ConnId(1))),
            Op::Recv { .. } => match wire.to_server.pop_front() {
                Some(bytes) => Done::Recv(Ok(RecvBuf::new(bytes))),
                None => {
                    wire.waiting = Some(token);
                    return;
                }
            },
            Op::RecvInto { .. } => unreachable!("payloads are small"),
            Op::Send { .. } => {
                wire.sends += 1;
                Done::Send(Ok(()))
            }
            Op::Connect { .. } => Done::Connect(Err(Errno(libc::ECONNREFUSED))),
            Op::Close { .. } => Done::Close,
            Op::Wake { .. } => return,
        };
        self.done.push(Completion { token, done });
    }

    fn turn(&mut self, _deadline: Instant, out: &mut Vec<Completion>) {
        self.now += TURN_NS;
        let mut wire = self.wire.borrow_mut();
        if let Some(token) = wire.waiting
            && let Some(bytes) = wire.to_server.pop_front()
        {
            wire.waiting = None;
            self.done.push(Completion { token, done: Done::Recv(Ok(RecvBuf::new(bytes))) });
        }
        out.append(&mut self.done);
    }
}

/// The reactor and its client.
pub(crate) struct Rig {
    reactor: Reactor<NullIo>,
    wire: Rc<RefCell<Wire>>,
    shared: Arc<Shared>,
}

impl Rig {
    /// Started, with copyset 1:701 led here and all chunks written to.
    pub(crate) fn new(dirty_limit: usize) -> Self {
        let layout = layout();
        let peer: PeerId = format!("127.0.0.1:{PORT}:0").parse().unwrap();
        let info = Info {
            peer,
            chunk_size: CHUNK_SIZE,
            max_inflight: 5000,
            version: "0".into(),
            config: Vec::new(),
            process: ProcessStats::default,
        };
        let shared = Shared::new(info, 1);
        let payload = Arena::new(dirty_limit * 4).unwrap();
        let arenas =
            Arenas { payload: Arc::clone(&payload), work: Arena::new(64 << 20).unwrap(), all_payload: vec![payload] };
        let config = Config {
            shard: 0,
            peer: peer.0,
            dirty_limit,
            flush_age_ns: 5_000_000_000,
            election_ms: 1000,
            snapshot_rate: 0,
            trash_s: 0,
            wall_s: 0,
            seed: 7,
        };
        let metrics = Arc::clone(shared.registry().shard(0).unwrap());
        let extents = ExtentPool::new(&layout);
        let shard = Shard::new(config, layout.clone(), arenas.clone(), extents, metrics, Instant(1)).unwrap();
        let setup = Setup {
            listeners: vec![(ListenerId(0), Protocol::Rpc)],
            shared: Arc::clone(&shared),
            catalog: SharedCatalog::new(Catalog::default()),
            nebd: None,
            mailbox: mesh(1).remove(0),
            control: None,
            arenas,
            shards: layout.shards,
            chunk_size: layout.chunk_size,
            disk: layout.uuid,
            cluster: [0; 16],
            seed: 7,
        };
        let wire = Rc::<RefCell<Wire>>::default();
        let io = NullIo { now: 1, wire: Rc::clone(&wire), done: Vec::new() };
        let mut rig = Self { reactor: Reactor::new(io, 0, shard, setup), wire, shared };
        rig.turn_until("started", |rig| rig.reactor.serving() && rig.wire.borrow().waiting.is_some());
        rig.send(&create());
        rig.turn_until("a copyset", |rig| rig.wire.borrow().sends == 1);
        // Until it leads itself.
        (0..16).for_each(|_| rig.reactor.turn());
        rig.run(&writes((0..CHUNKS).map(|chunk| (chunk, 0))), CHUNKS);
        rig
    }

    fn turn_until(&mut self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        for _ in 0..1_000_000 {
            if done(self) {
                return;
            }
            self.reactor.turn();
            assert!(self.reactor.failure().is_none(), "{:?}", self.reactor.failure());
        }
        panic!("never: {what}; answered {:?}", self.answered());
    }

    fn send(&mut self, stream: &Bytes) {
        let pieces = (0..stream.len()).step_by(RECV).map(|at| stream.slice(at..(at + RECV).min(stream.len())));
        self.wire.borrow_mut().to_server.extend(pieces);
    }

    /// Chunk operations answered with success, and with anything else.
    fn answered(&self) -> (u64, u64) {
        let kinds = [OpKind::Write, OpKind::Read].map(|kind| self.shared.registry().op(kind));
        (kinds.iter().map(|totals| totals.done).sum(), kinds.iter().map(|totals| totals.errors).sum())
    }

    /// Sends a stream of `count` calls and turns until all are answered.
    pub(crate) fn run(&mut self, stream: &Bytes, count: u64) {
        let want = self.answered().0 + count;
        self.send(stream);
        self.turn_until("all answered", |rig| rig.answered().0 >= want);
        assert_eq!(self.answered(), (want, 0), "no refusals");
    }
}

/// A log of ordinary size; chunks enough for [`CHUNKS`].
pub(crate) fn layout() -> Layout {
    Layout::new(&Params {
        uuid: [3; 16],
        size: 2 << 30,
        shards: 1,
        chunk_size: CHUNK_SIZE,
        log_bytes_per_shard: 512 << 20,
        log_segment_size: 32 << 20,
        flags: FLAG_SPARSE,
    })
    .unwrap()
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn message(numbers: &[(u64, u64)]) -> Vec<u8> {
    let mut out = Vec::new();
    for &(field, value) in numbers {
        varint(&mut out, field << 3);
        varint(&mut out, value);
    }
    out
}

fn part(out: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    varint(out, field << 3 | 2);
    varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

fn call(out: &mut Vec<u8>, service: &str, method: &str, message: &[u8], attachment: &[u8]) {
    let (mut names, mut meta) = (Vec::new(), Vec::new());
    part(&mut names, 1, service.as_bytes());
    part(&mut names, 2, method.as_bytes());
    part(&mut meta, 1, &names);
    meta.extend_from_slice(&[0x18, 0, 0x20, 9]);
    if !attachment.is_empty() {
        meta.push(0x28);
        varint(&mut meta, attachment.len() as u64);
    }
    out.extend_from_slice(b"PRPC");
    out.extend_from_slice(&((meta.len() + message.len() + attachment.len()) as u32).to_be_bytes());
    out.extend_from_slice(&(meta.len() as u32).to_be_bytes());
    out.extend_from_slice(&meta);
    out.extend_from_slice(message);
    out.extend_from_slice(attachment);
}

/// The call that creates copyset 1:701.
fn create() -> Bytes {
    let (mut peer, mut copyset, mut request, mut out) =
        (Vec::new(), message(&[(1, 1), (2, 701)]), Vec::new(), Vec::new());
    part(&mut peer, 3, format!("127.0.0.1:{PORT}:0").as_bytes());
    part(&mut copyset, 3, &peer);
    part(&mut request, 1, &copyset);
    call(&mut out, "curve.chunkserver.CopysetService", "CreateCopysetNode2", &request, &[]);
    out.into()
}

const SERVICE: &str = "curve.chunkserver.ChunkService";

/// A stream of 4 KiB writes to (chunk, block).
pub(crate) fn writes(places: impl Iterator<Item = (u64, u64)>) -> Bytes {
    let mut out = Vec::new();
    for (chunk, block) in places {
        let request = message(&[(1, 2), (2, 1), (3, 701), (4, chunk), (6, block * 4096), (7, 4096), (9, 1)]);
        // What the disk will say when it is asked.
        call(&mut out, SERVICE, "WriteChunk", &request, &[0; 4096]);
    }
    out.into()
}

/// A stream of 4 KiB reads.
#[allow(dead_code)]
pub(crate) fn reads(places: impl Iterator<Item = (u64, u64)>) -> Bytes {
    let mut out = Vec::new();
    for (chunk, block) in places {
        let request = message(&[(1, 1), (2, 1), (3, 701), (4, chunk), (6, block * 4096), (7, 4096)]);
        call(&mut out, SERVICE, "ReadChunk", &request, &[]);
    }
    out.into()
}

/// Places all over the chunks, in an order of no order.
pub(crate) fn scattered(count: u64, seed: u64) -> impl Iterator<Item = (u64, u64)> {
    let blocks = u64::from(CHUNK_SIZE) / 4096;
    let mut at = seed;
    (0..count).map(move |_| {
        at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let place = (at >> 33) % (CHUNKS * blocks);
        (place / blocks, place % blocks)
    })
}
