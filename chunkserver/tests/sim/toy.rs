//! The toy: a tiny log server on the same `Io`, to test the simulator itself.
//!
//! Each shard appends every change to its own log with a dsync write, keeps all blocks in memory, answers afterwards,
//! and replays its log when it starts. Requests for the other shard take a mailbox and a wake-up. Each [`Bug`] breaks
//! one rule, and the checker must notice.

use crate::codec::{self, ChunkRequest};
use crate::disk::Disk;
use crate::run::{Program, System};
use crate::world::{Shared, SimIo};
use bytes::{Bytes, BytesMut};
use chunkserver::io::buffer::{Arena, PoolBuf};
use chunkserver::io::{Completion, ConnId, Done, FileId, Instant, Io, ListenerId, Op, ShardId, Token};
use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

const BLOCK: usize = 4096;
const SHARDS: u16 = 2;
const ZONE: u64 = 48 << 20;
const MAX_CHUNKS: usize = 24;
const MAGIC: u64 = 0x746f_795f_6c6f_6721;
const FILE: FileId = FileId(0);
const LOG: Token = Token(1 << 32);
const ACCEPT: Token = Token(2 << 32);
const RECV: u64 = 3;
const SEND: u64 = 4;

/// What is wrong with this toy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bug {
    None,
    /// Answers before its log write completes.
    AckBeforeDurable,
    /// Writes its log without dsync.
    NoDsync,
    /// Replays batches without looking at their checksum.
    NoChecksum,
    /// Serves what it replayed before that is durable again.
    NoSyncAfterReplay,
}

struct Mail {
    conn: ConnId,
    home: u16,
    correlation: u64,
    request: ChunkRequest,
    payload: Bytes,
}

enum Letter {
    Request(Mail),
    Reply(ConnId, Bytes),
}

type Mailboxes = Rc<RefCell<Vec<VecDeque<Letter>>>>;

enum Phase {
    Header(u64),
    Payload(u64, Vec<u8>),
    Sync,
    Serve,
}

#[derive(Default)]
struct Conn {
    inbox: BytesMut,
    outbox: VecDeque<Bytes>,
    sending: bool,
}

struct Toy {
    io: SimIo,
    shard: u16,
    bug: Bug,
    arena: Arc<Arena>,
    mail: Mailboxes,
    phase: Phase,
    end: u64,
    sequence: u64,
    conns: BTreeMap<ConnId, Conn>,
    queue: VecDeque<Mail>,
    writing: Option<Vec<Mail>>,
    blocks: BTreeMap<(u64, u64, u64), Bytes>,
    chunks: BTreeMap<(u64, u64), ()>,
    done: Vec<Completion>,
    failed: Option<String>,
}

fn crc(bytes: &[&[u8]]) -> u32 {
    bytes.iter().fold(0, |crc, part| crc32c::crc32c_append(crc, part))
}

fn words(block: &[u8]) -> Vec<u64> {
    block.chunks_exact(8).map(|w| w.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b))).collect()
}

impl Toy {
    fn base(&self) -> u64 {
        u64::from(self.shard) * ZONE
    }

    fn read(&mut self, offset: u64, len: usize) {
        let buf = self.arena.alloc(len).expect("the toy's arena is large enough");
        self.io.submit(LOG, Op::Read { file: FILE, offset: self.base() + offset, buf });
    }

    /// Replay: one batch header, its payload, the next header.
    fn replay(&mut self, buf: &[u8]) {
        match std::mem::replace(&mut self.phase, Phase::Serve) {
            Phase::Header(at) => {
                let head = words(&buf[..BLOCK]);
                let ours = head[0] == MAGIC && head[1] == self.sequence;
                let payload = if ours { head[3].min(ZONE) as usize * BLOCK } else { 0 };
                if !ours || at + 2 * BLOCK as u64 + payload as u64 > ZONE {
                    self.settle(at);
                } else if payload == 0 {
                    self.replay_batch(at, buf, &[]);
                } else {
                    self.phase = Phase::Payload(at, buf[..BLOCK].to_vec());
                    self.read(at + BLOCK as u64, payload);
                }
            }
            Phase::Payload(at, head) => self.replay_batch(at, &head, buf),
            Phase::Sync | Phase::Serve => {}
        }
    }

    fn replay_batch(&mut self, at: u64, head: &[u8], payload: &[u8]) {
        let fields = words(&head[..BLOCK]);
        if self.bug != Bug::NoChecksum && fields[4] != u64::from(crc(&[&head[..32], &head[40..BLOCK], payload])) {
            return self.settle(at);
        }
        let mut payload = Bytes::copy_from_slice(payload);
        for entry in 0..(fields[2] as usize).min(80) {
            let f = &fields[8 + entry * 6..];
            let request =
                ChunkRequest { op: f[0], pool: 1, copyset: f[1], chunk: f[2], offset: f[3], size: f[4], sn: f[5] };
            let len = if request.op == 2 { (request.size as usize).min(payload.len()) } else { 0 };
            self.apply(&request, &payload.split_to(len));
        }
        self.sequence += 1;
        let next = at + BLOCK as u64 * (1 + fields[3]);
        self.phase = Phase::Header(next);
        self.read(next, BLOCK);
    }

    /// The end of the log is found. What was read may still be in the drive's cache only: sync before serving it.
    fn settle(&mut self, end: u64) {
        self.end = end;
        if self.bug == Bug::NoSyncAfterReplay {
            return self.serve();
        }
        self.phase = Phase::Sync;
        self.io.submit(LOG, Op::Sync { file: FILE });
    }

    fn serve(&mut self) {
        self.phase = Phase::Serve;
        self.io.submit(ACCEPT, Op::Accept { listener: ListenerId(0) });
    }

    fn apply(&mut self, request: &ChunkRequest, payload: &Bytes) {
        let key = (request.copyset, request.chunk);
        let first = request.offset / BLOCK as u64;
        match request.op {
            2 => {
                self.chunks.insert(key, ());
                for (at, block) in (first..).zip(payload.chunks(BLOCK)) {
                    self.blocks.insert((key.0, key.1, at), payload.slice_ref(block));
                }
            }
            7 => (first..first + request.size / BLOCK as u64).for_each(|at| {
                self.blocks.remove(&(key.0, key.1, at));
            }),
            _ => {
                self.chunks.remove(&key);
                self.blocks.retain(|&(copyset, chunk, _), _| (copyset, chunk) != key);
            }
        }
    }

    /// A request, on the shard it belongs to.
    fn request(&mut self, mail: Mail) {
        let key = (mail.request.copyset, mail.request.chunk);
        let exists = self.chunks.contains_key(&key);
        match mail.request.op {
            1 if exists => {
                let mut data = BytesMut::new();
                let first = mail.request.offset / BLOCK as u64;
                for at in first..first + mail.request.size / BLOCK as u64 {
                    let block = self.blocks.get(&(key.0, key.1, at));
                    data.extend_from_slice(block.map_or(&[0; BLOCK], |block| &block[..]));
                }
                self.reply(&mail, 0, &data);
            }
            1 => self.reply(&mail, 7, &[]),
            2 if !exists && self.chunks.len() >= MAX_CHUNKS => self.reply(&mail, 5, &[]),
            _ if self.bug == Bug::AckBeforeDurable => {
                self.apply(&mail.request, &mail.payload);
                self.reply(&mail, 0, &[]);
                self.queue.push_back(mail);
            }
            _ => self.queue.push_back(mail),
        }
    }

    fn reply(&mut self, mail: &Mail, status: u64, attachment: &[u8]) {
        let mut body = BytesMut::new();
        codec::number(&mut body, 1, status);
        let bytes = codec::response(mail.correlation, &body, attachment);
        if mail.home == self.shard {
            self.send(mail.conn, bytes);
        } else {
            self.post(mail.home, Letter::Reply(mail.conn, bytes));
        }
    }

    fn post(&mut self, shard: u16, letter: Letter) {
        self.mail.borrow_mut()[usize::from(shard)].push_back(letter);
        self.io.submit(Token(0), Op::Wake { shard: ShardId(shard) });
    }

    fn send(&mut self, id: ConnId, bytes: Bytes) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        conn.outbox.push_back(bytes);
        self.flush(id);
    }

    fn flush(&mut self, id: ConnId) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        if !conn.sending && !conn.outbox.is_empty() {
            conn.sending = true;
            let take = conn.outbox.len().min(16);
            let bufs = conn.outbox.drain(..take).collect();
            self.io.submit(Token(SEND << 32 | id.0 as u64), Op::Send { conn: id, bufs });
        }
    }

    /// All changes that wait become one batch, one write.
    fn write_log(&mut self) {
        if self.writing.is_some() || self.queue.is_empty() || !matches!(self.phase, Phase::Serve) {
            return;
        }
        let take = self.queue.len().min(20);
        let batch: Vec<Mail> = self.queue.drain(..take).collect();
        let payload: usize = batch.iter().map(|mail| mail.payload.len()).sum();
        let len = BLOCK + payload;
        let mut buf: PoolBuf = self.arena.alloc(len).expect("the toy's arena is large enough");
        buf[..BLOCK].fill(0);
        let mut head = vec![MAGIC, self.sequence, batch.len() as u64, (payload / BLOCK) as u64, 0, 0, 0, 0];
        let mut at = BLOCK;
        for mail in &batch {
            let r = &mail.request;
            head.extend([r.op, r.copyset, r.chunk, r.offset, r.size, r.sn]);
            buf[at..at + mail.payload.len()].copy_from_slice(&mail.payload);
            at += mail.payload.len();
        }
        head.iter().zip(buf.chunks_exact_mut(8)).for_each(|(word, to)| to.copy_from_slice(&word.to_le_bytes()));
        let sum = crc(&[&buf[..32], &buf[40..BLOCK], &buf[BLOCK..len]]);
        buf[32..40].copy_from_slice(&u64::from(sum).to_le_bytes());
        assert!(self.end + (2 * BLOCK + len) as u64 <= ZONE, "the toy's log is full");
        let (offset, dsync) = (self.base() + self.end, self.bug != Bug::NoDsync);
        self.end += len as u64;
        self.sequence += 1;
        self.writing = Some(batch);
        self.io.submit(
            LOG,
            Op::Write { file: FILE, offset, bufs: [buf.freeze().slice(..len)].into_iter().collect(), dsync },
        );
    }

    fn log_written(&mut self) {
        for mail in self.writing.take().unwrap_or_default() {
            if self.bug != Bug::AckBeforeDurable {
                self.apply(&mail.request, &mail.payload);
                self.reply(&mail, 0, &[]);
            }
        }
    }

    fn received(&mut self, id: ConnId, bytes: &[u8]) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        conn.inbox.extend_from_slice(bytes);
        let mut frames = Vec::new();
        let broken = loop {
            match codec::cut(&mut conn.inbox) {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break bytes.is_empty(),
                Err(_) => break true,
            }
        };
        for frame in frames {
            self.dispatch(id, &frame);
        }
        if broken {
            self.conns.remove(&id);
            self.io.submit(Token(0), Op::Close { conn: id });
        } else {
            self.io.submit(Token(RECV << 32 | id.0 as u64), Op::Recv { conn: id });
        }
    }

    fn dispatch(&mut self, conn: ConnId, frame: &codec::Frame) {
        let request = ChunkRequest::decode(&frame.body).unwrap_or_default();
        let (home, correlation) = (self.shard, frame.correlation);
        let mut mail = Mail { conn, home, correlation, request, payload: frame.attachment.clone() };
        match frame.method.as_str() {
            "Zero" => mail.request.op = 7,
            "WriteChunk" | "ReadChunk" | "DeleteChunk" => {}
            _ => return self.reply(&mail, 0, &[]),
        }
        let owner = (mail.request.copyset % u64::from(SHARDS)) as u16;
        if owner == self.shard {
            self.request(mail);
        } else {
            self.post(owner, Letter::Request(mail));
        }
    }

    fn completed(&mut self, completion: Completion) {
        let id = ConnId(completion.token.0 as u32 as i32);
        match completion.done {
            Done::Read { buf, result: Ok(()) } => self.replay(&buf),
            Done::Sync(Ok(())) => self.serve(),
            Done::Write(Ok(())) => self.log_written(),
            Done::Read { .. } | Done::Sync(_) | Done::Write(_) => self.failed = Some("the log's disk failed".into()),
            Done::Accept(result) => {
                if let Ok(conn) = result {
                    self.conns.insert(conn, Conn::default());
                    self.io.submit(Token(RECV << 32 | conn.0 as u64), Op::Recv { conn });
                }
                self.io.submit(ACCEPT, Op::Accept { listener: ListenerId(0) });
            }
            Done::Recv(Ok(bytes)) => self.received(id, &bytes),
            Done::Recv(Err(errno)) if errno.0 == 105 => self.io.submit(completion.token, Op::Recv { conn: id }),
            Done::Recv(Err(_)) => self.received(id, &[]),
            Done::Send(_) => {
                if let Some(conn) = self.conns.get_mut(&id) {
                    conn.sending = false;
                }
                self.flush(id);
            }
            Done::RecvInto { .. } | Done::SendCut(_) | Done::Connect(_) | Done::Close | Done::Wake => {}
        }
    }
}

impl Program for Toy {
    fn turn(&mut self) -> Option<String> {
        let mut done = std::mem::take(&mut self.done);
        self.io.turn(Instant::FAR, &mut done);
        done.drain(..).for_each(|completion| self.completed(completion));
        self.done = done;
        if matches!(self.phase, Phase::Serve) {
            let letters = std::mem::take(&mut self.mail.borrow_mut()[usize::from(self.shard)]);
            for letter in letters {
                match letter {
                    Letter::Request(mail) => self.request(mail),
                    Letter::Reply(conn, bytes) => self.send(conn, bytes),
                }
            }
        }
        self.write_log();
        self.failed.take()
    }
}

/// A node that runs the toy.
pub(crate) struct ToySystem(pub(crate) Bug);

impl System for ToySystem {
    fn shards(&self) -> u16 {
        SHARDS
    }
    fn listeners(&self) -> u32 {
        1
    }
    fn disk_len(&self) -> u64 {
        ZONE * u64::from(SHARDS)
    }
    fn peer(&self) -> String {
        "127.0.0.1:8200:0".into()
    }
    fn format(&self, _disk: &mut Disk) {}
    fn boot(&self, world: &Shared, node: usize, life: u64) -> Vec<Box<dyn Program>> {
        let mail: Mailboxes = Rc::new(RefCell::new((0..SHARDS).map(|_| VecDeque::new()).collect()));
        let start = |shard| {
            let mut toy = Toy {
                io: SimIo::new(world, node, shard, life),
                shard,
                bug: self.0,
                arena: Arena::new(16 << 20).expect("memory"),
                mail: Rc::clone(&mail),
                phase: Phase::Header(0),
                end: 0,
                sequence: 0,
                conns: BTreeMap::new(),
                queue: VecDeque::new(),
                writing: None,
                blocks: BTreeMap::new(),
                chunks: BTreeMap::new(),
                done: Vec::new(),
                failed: None,
            };
            toy.read(0, BLOCK);
            Box::new(toy) as Box<dyn Program>
        };
        (0..SHARDS).map(start).collect()
    }
}
