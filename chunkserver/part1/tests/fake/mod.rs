//! A small part2 that serves a volume from memory and misbehaves on demand. It reads and writes the wire with code of its
//! own, so that the client's codec is not tested against itself.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::{
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

pub(crate) const KNOOK: i64 = -1;
pub(crate) const VOLUME: usize = 8 << 20;

/// A request as it came.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    /// Number of the connection, from 0.
    pub(crate) connection: usize,
    pub(crate) service: String,
    pub(crate) method: String,
    pub(crate) log_id: u64,
    pub(crate) id: u64,
    pub(crate) message: Vec<u8>,
    pub(crate) attachment: Vec<u8>,
    /// Numbers of the meta's fields in order, those of the request part behind 1.
    pub(crate) meta: Vec<u64>,
    /// All bytes of the frame.
    pub(crate) frame: Vec<u8>,
    pub(crate) at: Instant,
}

impl Seen {
    /// The number in a field of the message.
    pub(crate) fn number(&self, field: u64) -> Option<u64> {
        fields(&self.message).into_iter().find_map(|(number, value)| match value {
            Value::Number(value) if number == field => Some(value),
            _ => None,
        })
    }

    /// The bytes of a field of the message.
    pub(crate) fn bytes(&self, field: u64) -> Option<Vec<u8>> {
        fields(&self.message).into_iter().find_map(|(number, value)| match value {
            Value::Bytes(value) if number == field => Some(value),
            _ => None,
        })
    }
}

/// What the server does with a request.
#[derive(Clone, Debug)]
pub(crate) enum Act {
    Serve,
    /// Serve, but answer later.
    After(Duration),
    /// This retCode and nothing done.
    Ret(i64),
    /// An RPC error.
    Rpc(u64),
    /// No answer, ever.
    Mute,
    /// Break the connection, with the request executed or not.
    Close {
        executed: bool,
    },
    /// These bytes in place of an answer.
    Raw(Vec<u8>),
    /// These bytes, then the connection breaks.
    Last(Vec<u8>),
    /// The right answer under this id.
    AsId(u64),
    /// The right answer, twice.
    Twice,
    /// The right message with this attachment.
    Attach(Vec<u8>),
    /// An answer of which half comes before the connection breaks.
    Half,
    /// This message.
    Message(Vec<u8>),
    /// Serve a read from so many bytes further.
    Shifted(usize),
}

type Plan = dyn Fn(usize, &Seen) -> Act + Send + Sync;

struct Inner {
    plan: Box<Plan>,
    volume: Mutex<Vec<u8>>,
    seen: Mutex<Vec<Seen>>,
    streams: Mutex<Vec<UnixStream>>,
    connections: AtomicUsize,
    next_fd: AtomicUsize,
    running: AtomicBool,
}

/// The server.
pub(crate) struct Fake {
    pub(crate) folder: tempfile::TempDir,
    inner: Arc<Inner>,
    acceptor: Option<thread::JoinHandle<()>>,
}

impl Fake {
    /// Starts one that acts on its nth request (from 0) as `plan` says.
    pub(crate) fn start(plan: impl Fn(usize, &Seen) -> Act + Send + Sync + 'static) -> Self {
        let mut fake = Self::down(plan);
        fake.up();
        fake
    }

    /// One that does not listen yet.
    pub(crate) fn down(plan: impl Fn(usize, &Seen) -> Act + Send + Sync + 'static) -> Self {
        let inner = Inner {
            plan: Box::new(plan),
            volume: Mutex::new(vec![0; VOLUME]),
            seen: Mutex::default(),
            streams: Mutex::default(),
            connections: AtomicUsize::new(0),
            next_fd: AtomicUsize::new(1),
            running: AtomicBool::new(false),
        };
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("lock")).unwrap();
        Self { folder, inner: Arc::new(inner), acceptor: None }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("nebd.sock")
    }

    /// Listens.
    pub(crate) fn up(&mut self) {
        let _ = std::fs::remove_file(self.socket());
        let listener = UnixListener::bind(self.socket()).unwrap();
        listener.set_nonblocking(true).unwrap();
        self.inner.running.store(true, Ordering::SeqCst);
        let inner = Arc::clone(&self.inner);
        self.acceptor = Some(thread::spawn(move || {
            while inner.running.load(Ordering::SeqCst) {
                match listener.accept() {
                    Ok((stream, _)) => {
                        stream.set_nonblocking(false).unwrap();
                        inner.streams.lock().unwrap().push(stream.try_clone().unwrap());
                        let number = inner.connections.fetch_add(1, Ordering::SeqCst);
                        let inner = Arc::clone(&inner);
                        thread::spawn(move || {
                            let end = stream.try_clone().unwrap();
                            serve(&inner, stream, number);
                            let _ = end.shutdown(std::net::Shutdown::Both);
                        });
                    }
                    Err(_) => thread::sleep(Duration::from_millis(1)),
                }
            }
        }));
    }

    /// Dies: the socket is gone, connections break.
    pub(crate) fn stop(&mut self) {
        self.inner.running.store(false, Ordering::SeqCst);
        if let Some(acceptor) = self.acceptor.take() {
            acceptor.join().unwrap();
        }
        for stream in self.inner.streams.lock().unwrap().drain(..) {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
        let _ = std::fs::remove_file(self.socket());
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.inner.seen.lock().unwrap().clone()
    }

    pub(crate) fn methods(&self) -> Vec<String> {
        self.seen().into_iter().map(|seen| seen.method).collect()
    }

    pub(crate) fn connections(&self) -> usize {
        self.inner.connections.load(Ordering::SeqCst)
    }

    pub(crate) fn volume(&self, offset: usize, length: usize) -> Vec<u8> {
        self.inner.volume.lock().unwrap()[offset..offset + length].to_vec()
    }

    /// A configuration file for this server.
    pub(crate) fn conf(&self, more: &[(&str, &str)]) -> PathBuf {
        let folder = self.folder.path();
        let mut keys = vec![
            ("nebdserver.serverAddress", self.socket().display().to_string()),
            ("metacache.fileLockPath", folder.join("lock").display().to_string()),
            ("request.syncRpcMaxRetryTimes", "50".into()),
            ("request.rpcRetryIntervalUs", "100000".into()),
            ("request.rpcRetryMaxIntervalUs", "64000000".into()),
            ("request.rpcHostDownRetryIntervalUs", "10000".into()),
            ("request.rpcHealthCheckIntervalS", "1".into()),
            ("request.rpcMaxDelayHealthCheckIntervalMs", "100".into()),
            ("heartbeat.intervalS", "5".into()),
            ("heartbeat.rpcTimeoutMs", "500".into()),
            ("log.path", folder.join("log").display().to_string()),
        ];
        keys.extend(more.iter().map(|(key, value)| (*key, (*value).to_owned())));
        let text: String = keys.iter().map(|(key, value)| format!("{key}={value}\n")).collect();
        let path = folder.join("nebd-client.conf");
        std::fs::write(&path, text).unwrap();
        path
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A recorded connection or a part of it.
pub(crate) fn capture(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../proto/tests/data").join(name);
    std::fs::read(path).unwrap()
}

/// Cuts a stream of requests.
pub(crate) fn requests(mut bytes: &[u8]) -> Vec<Seen> {
    let mut all = Vec::new();
    while let Some(seen) = read_frame(&mut bytes, 0) {
        all.push(seen);
    }
    all
}

/// An answer as it was recorded.
#[derive(Clone, Debug)]
pub(crate) struct Response {
    pub(crate) id: u64,
    pub(crate) message: Vec<u8>,
    pub(crate) attachment: Vec<u8>,
}

/// Cuts a stream of responses.
pub(crate) fn responses(mut bytes: &[u8]) -> Vec<Response> {
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let size = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
        let (frame, rest) = bytes.split_at(12 + size(4));
        let (meta, body) = frame[12..].split_at(size(8));
        let number = |field| {
            fields(meta).into_iter().find_map(|(number, value)| match value {
                Value::Number(value) if number == field => Some(value),
                _ => None,
            })
        };
        let (message, attachment) = body.split_at(body.len() - number(5).unwrap_or(0) as usize);
        let id = number(4).unwrap();
        all.push(Response { id, message: message.to_vec(), attachment: attachment.to_vec() });
        bytes = rest;
    }
    all
}

fn serve(inner: &Arc<Inner>, mut stream: UnixStream, number: usize) -> Option<()> {
    let out = Arc::new(Mutex::new(stream.try_clone().ok()?));
    loop {
        let seen = read_frame(&mut stream, number)?;
        let count = {
            let mut list = inner.seen.lock().unwrap();
            list.push(seen.clone());
            list.len() - 1
        };
        let act = (inner.plan)(count, &seen);
        let send = |bytes: &[u8]| out.lock().unwrap().write_all(bytes).ok();
        match act {
            Act::Serve => send(&answer(inner, &seen, seen.id))?,
            Act::After(pause) => {
                let (reply, out) = (answer(inner, &seen, seen.id), Arc::clone(&out));
                thread::spawn(move || {
                    thread::sleep(pause);
                    let _ = out.lock().unwrap().write_all(&reply);
                });
            }
            Act::Ret(code) => send(&frame(0, &number_field(1, code as u64), seen.id, &[]))?,
            Act::Rpc(code) => send(&frame(code, &[], seen.id, &[]))?,
            Act::Mute => {}
            Act::Close { executed } => {
                if executed {
                    answer(inner, &seen, seen.id);
                }
                return None;
            }
            Act::Raw(bytes) => send(&bytes)?,
            Act::Last(bytes) => {
                send(&bytes)?;
                return None;
            }
            Act::AsId(id) => send(&answer(inner, &seen, id))?,
            Act::Twice => {
                let reply = answer(inner, &seen, seen.id);
                send(&[reply.clone(), reply].concat())?;
            }
            Act::Attach(bytes) => send(&frame(0, &number_field(1, 0), seen.id, &bytes))?,
            Act::Half => {
                let reply = answer(inner, &seen, seen.id);
                send(&reply[..reply.len() / 2])?;
                return None;
            }
            Act::Shifted(by) => {
                let (offset, size) = (seen.number(2)? as usize + by, seen.number(3)? as usize);
                let mut bytes = inner.volume.lock().unwrap()[offset..].to_vec();
                bytes.resize(size, 0);
                send(&frame(0, &number_field(1, 0), seen.id, &bytes))?;
            }
            Act::Message(message) => send(&frame(0, &message, seen.id, &[]))?,
        }
    }
}

/// Executes a request; the frame that answers it.
fn answer(inner: &Inner, seen: &Seen, id: u64) -> Vec<u8> {
    let (mut message, mut attachment) = (number_field(1, 0), Vec::new());
    let offset = seen.number(2).unwrap_or(0) as usize;
    let size = seen.number(3).unwrap_or(0) as usize;
    let mut volume = inner.volume.lock().unwrap();
    let inside = offset.checked_add(size).is_some_and(|end| end <= volume.len());
    match seen.method.as_str() {
        "OpenFile" => message.extend(number_field(3, inner.next_fd.fetch_add(1, Ordering::SeqCst) as u64)),
        "Read" | "Write" | "Discard" if !inside => message = number_field(1, KNOOK as u64),
        "Read" => attachment = volume[offset..offset + size].to_vec(),
        "Write" if seen.attachment.len() != size => message = number_field(1, KNOOK as u64),
        "Write" => volume[offset..offset + size].copy_from_slice(&seen.attachment),
        "Discard" => volume[offset..offset + size].fill(0),
        "GetInfo" => {
            let info: Vec<u8> = [(1, VOLUME as u64), (2, 1 << 20), (3, 8), (4, 4096)]
                .into_iter()
                .flat_map(|(number, value)| number_field(number, value))
                .collect();
            message.extend([0x1a, info.len() as u8]);
            message.extend(info);
        }
        _ => {}
    }
    frame(0, &message, id, &attachment)
}

/// A response.
pub(crate) fn frame(code: u64, message: &[u8], id: u64, attachment: &[u8]) -> Vec<u8> {
    let code = number_field(1, code);
    let mut meta = vec![0x12, code.len() as u8];
    meta.extend(code);
    meta.extend(number_field(3, 0));
    meta.extend(number_field(4, id));
    if !attachment.is_empty() {
        meta.extend(number_field(5, attachment.len() as u64));
    }
    let body = (meta.len() + message.len() + attachment.len()) as u32;
    let sizes = [body.to_be_bytes(), (meta.len() as u32).to_be_bytes()].concat();
    [b"PRPC", &sizes[..], &meta, message, attachment].concat()
}

fn number_field(number: u64, mut value: u64) -> Vec<u8> {
    let mut out = vec![(number << 3) as u8];
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
    out
}

fn read_frame(stream: &mut impl Read, connection: usize) -> Option<Seen> {
    let mut frame = vec![0; 12];
    stream.read_exact(&mut frame).ok()?;
    if &frame[..4] != b"PRPC" {
        return None;
    }
    let size = |at: usize| u32::from_be_bytes(frame[at..at + 4].try_into().unwrap()) as usize;
    let (body_size, meta_size) = (size(4), size(8));
    frame.resize(12 + body_size, 0);
    stream.read_exact(&mut frame[12..]).ok()?;
    let meta = fields(&frame[12..12 + meta_size]);
    let find = |list: &[(u64, Value)], field: u64| {
        list.iter().find(|(number, _)| *number == field).map(|(_, value)| value.clone())
    };
    let number = |value: Option<Value>| match value {
        Some(Value::Number(value)) => value,
        _ => 0,
    };
    let Some(Value::Bytes(request)) = find(&meta, 1) else { panic!("no request part") };
    let request = fields(&request);
    let inner: Vec<u64> = [1].into_iter().chain(request.iter().map(|(number, _)| *number)).collect();
    let text = |field| match find(&request, field) {
        Some(Value::Bytes(bytes)) => String::from_utf8(bytes).unwrap(),
        _ => panic!("no name"),
    };
    let split = 12 + body_size - number(find(&meta, 5)) as usize;
    Some(Seen {
        connection,
        service: text(1),
        method: text(2),
        log_id: number(find(&request, 3)),
        id: number(find(&meta, 4)),
        message: frame[12 + meta_size..split].to_vec(),
        attachment: frame[split..].to_vec(),
        meta: meta.iter().flat_map(|(number, _)| if *number == 1 { inner.clone() } else { vec![*number] }).collect(),
        frame,
        at: Instant::now(),
    })
}

#[derive(Clone, Debug)]
enum Value {
    Number(u64),
    Bytes(Vec<u8>),
}

fn fields(mut bytes: &[u8]) -> Vec<(u64, Value)> {
    fn varint(bytes: &mut &[u8]) -> u64 {
        let mut value = 0;
        for shift in (0..).step_by(7) {
            let (first, rest) = bytes.split_first().unwrap();
            *bytes = rest;
            value |= u64::from(first & 0x7f) << shift;
            if first & 0x80 == 0 {
                break;
            }
        }
        value
    }
    let mut list = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        let value = match key & 7 {
            0 => Value::Number(varint(&mut bytes)),
            2 => {
                let length = varint(&mut bytes) as usize;
                let (head, rest) = bytes.split_at(length);
                bytes = rest;
                Value::Bytes(head.to_vec())
            }
            other => panic!("wire type {other}"),
        };
        list.push((key >> 3, value));
    }
    list
}
