//! A chunkserver in a few lines that misbehaves on request. It decodes with plain byte offsets of its own, so that
//! the client's codec is not tested against itself.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What the server does with a request.
pub(crate) enum Act {
    Serve,
    Stall(Duration),
    Status(u8),
    /// Another node leads: this one, as far as it is known.
    Redirect(Option<SocketAddr>),
    /// Neither apply nor answer yet: the request is executed, unanswered, that much later.
    Late(Duration),
    /// Apply a write, but never answer.
    Mute,
    /// Break the connection; the request is applied first or not.
    Close {
        applied: bool,
    },
    /// Acknowledge a write without doing it.
    Forget,
    /// Answer a read with the data of another offset.
    Misplace(u32),
    /// Flip a bit of the data read.
    Rot,
    /// Bytes that are no frame.
    Babble,
    /// Answer with an RPC error.
    RpcError(u8),
}

#[derive(Debug, Default, Clone)]
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) cid: Vec<u8>,
    pub(crate) pool: u64,
    pub(crate) copyset: u64,
    pub(crate) chunk: u64,
    pub(crate) offset: usize,
    pub(crate) size: usize,
    pub(crate) attachment: Vec<u8>,
}

pub(crate) type Chunks = Arc<Mutex<HashMap<(u64, u64, u64), Vec<u8>>>>;

#[derive(Clone)]
pub(crate) struct Fake {
    pub(crate) addr: SocketAddr,
    pub(crate) chunks: Chunks,
}

impl Fake {
    /// Serves on a port of its own; `decide` sees every request with its number.
    pub(crate) fn start(decide: impl Fn(u64, &Request) -> Act + Send + Sync + 'static) -> Self {
        Self::node(TcpListener::bind("127.0.0.1:0").unwrap(), Chunks::default(), decide)
    }

    /// One of several that serve the same chunks.
    pub(crate) fn node(
        listener: TcpListener,
        chunks: Chunks,
        decide: impl Fn(u64, &Request) -> Act + Send + Sync + 'static,
    ) -> Self {
        let fake = Self { addr: listener.local_addr().unwrap(), chunks };
        let (chunks, decide) = (Arc::clone(&fake.chunks), Arc::new(decide));
        let count = Arc::new(Mutex::new(0));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (chunks, decide, count) = (Arc::clone(&chunks), Arc::clone(&decide), Arc::clone(&count));
                std::thread::spawn(move || {
                    let _ = stream.set_nodelay(true);
                    let _ = serve(stream, &chunks, |request| {
                        let mut count = count.lock().unwrap();
                        *count += 1;
                        decide(*count, request)
                    });
                });
            }
        });
        fake
    }
}

fn varint(buf: &[u8], at: &mut usize) -> u64 {
    let (mut value, mut shift) = (0, 0);
    loop {
        let byte = buf[*at];
        *at += 1;
        value |= u64::from(byte & 127) << shift;
        shift += 7;
        if byte < 128 {
            return value;
        }
    }
}

fn fields(buf: &[u8]) -> Vec<(u64, u64, Vec<u8>)> {
    let (mut at, mut list) = (0, Vec::new());
    while at < buf.len() {
        let tag = varint(buf, &mut at);
        let value = varint(buf, &mut at);
        let mut bytes = Vec::new();
        if tag & 7 == 2 {
            bytes = buf[at..at + value as usize].to_vec();
            at += value as usize;
        }
        list.push((tag >> 3, value, bytes));
    }
    list
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value > 127 {
        out.push(value as u8 | 128);
        value >>= 7;
    }
    out.push(value as u8);
}

fn read_request(stream: &mut TcpStream) -> std::io::Result<Request> {
    let mut head = [0; 12];
    stream.read_exact(&mut head)?;
    if &head[..4] != b"PRPC" {
        // The client looks for counters over HTTP; this server has none.
        return Err(std::io::ErrorKind::InvalidData.into());
    }
    let mut body = vec![0; u32::from_be_bytes(head[4..8].try_into().unwrap()) as usize];
    stream.read_exact(&mut body)?;
    let rest = body.split_off(u32::from_be_bytes(head[8..].try_into().unwrap()) as usize);
    let (mut request, mut attachment) = (Request::default(), 0);
    for (number, value, bytes) in fields(&body) {
        match number {
            1 => request.method = String::from_utf8(fields(&bytes)[1].2.clone()).unwrap(),
            4 => put_varint(&mut request.cid, value),
            5 => attachment = value as usize,
            _ => {}
        }
    }
    let (message, data) = rest.split_at(rest.len() - attachment);
    request.attachment = data.to_vec();
    for (number, value, _) in fields(message) {
        match number {
            2 => request.pool = value,
            3 => request.copyset = value,
            4 => request.chunk = value,
            6 => request.offset = value as usize,
            7 => request.size = value as usize,
            _ => {}
        }
    }
    Ok(request)
}

fn reply(request: &Request, code: u8, message: &[u8], data: &[u8]) -> Vec<u8> {
    let mut meta = vec![0x12, 2, 8, code, 0x18, 0, 0x20];
    meta.extend_from_slice(&request.cid);
    if !data.is_empty() {
        meta.push(0x28);
        put_varint(&mut meta, data.len() as u64);
    }
    let mut frame = b"PRPC".to_vec();
    frame.extend_from_slice(&((meta.len() + message.len() + data.len()) as u32).to_be_bytes());
    frame.extend_from_slice(&(meta.len() as u32).to_be_bytes());
    frame.extend_from_slice(&meta);
    frame.extend_from_slice(message);
    frame.extend_from_slice(data);
    frame
}

fn serve(mut stream: TcpStream, chunks: &Chunks, decide: impl Fn(&Request) -> Act) -> std::io::Result<()> {
    loop {
        let request = read_request(&mut stream)?;
        let act = decide(&request);
        match request.method.as_str() {
            "CreateCopysetNode2" => stream.write_all(&reply(&request, 0, &[8, 0], &[]))?,
            "GetLeader" => stream.write_all(&reply(&request, 0, b"\x0a\x0d\x1a\x0b127.0.0.1:1", &[]))?,
            _ => chunk(&mut stream, chunks, &request, &act)?,
        }
    }
}

fn apply(chunks: &mut HashMap<(u64, u64, u64), Vec<u8>>, request: &Request) {
    assert_eq!(request.attachment.len(), request.size);
    let data = chunks.entry((request.pool, request.copyset, request.chunk)).or_insert_with(|| vec![0; 16 << 20]);
    data[request.offset..request.offset + request.size].copy_from_slice(&request.attachment);
}

fn chunk(stream: &mut TcpStream, chunks: &Chunks, request: &Request, act: &Act) -> std::io::Result<()> {
    let key = (request.pool, request.copyset, request.chunk);
    let (mut rot, mut from) = (false, request.offset);
    match act {
        Act::Status(status) => return stream.write_all(&reply(request, 0, &[8, *status], &[])),
        Act::Redirect(leader) => {
            let mut message = vec![8, 1];
            if let Some(leader) = leader {
                let peer = format!("{leader}:0");
                message.extend([0x12, peer.len() as u8]);
                message.extend(peer.as_bytes());
            }
            return stream.write_all(&reply(request, 0, &message, &[]));
        }
        Act::Late(time) => {
            let (time, chunks, request) = (*time, Arc::clone(chunks), request.clone());
            std::thread::spawn(move || {
                std::thread::sleep(time);
                apply(&mut chunks.lock().unwrap(), &request);
            });
            return Ok(());
        }
        Act::RpcError(code) => return stream.write_all(&reply(request, *code, &[], &[])),
        Act::Babble => return stream.write_all(b"HTTP/1.1 400 what?\r\n\r\n"),
        Act::Close { applied: false } => return Err(std::io::ErrorKind::BrokenPipe.into()),
        Act::Forget if request.method == "WriteChunk" => return stream.write_all(&reply(request, 0, &[8, 0], &[])),
        Act::Stall(time) => std::thread::sleep(*time),
        Act::Rot => rot = true,
        Act::Misplace(offset) => from = *offset as usize,
        _ => {}
    }
    let mut locked = chunks.lock().unwrap();
    if request.method == "WriteChunk" {
        apply(&mut locked, request);
        drop(locked);
        return match act {
            Act::Mute => Ok(()),
            Act::Close { .. } => Err(std::io::ErrorKind::BrokenPipe.into()),
            _ => stream.write_all(&reply(request, 0, &[8, 0, 0x18, 3], &[])),
        };
    }
    let Some(data) = locked.get(&key).map(|data| data[from..from + request.size].to_vec()) else {
        drop(locked);
        return stream.write_all(&reply(request, 0, &[8, 7, 0x18, 0], &[]));
    };
    drop(locked);
    let mut data = data;
    data[1000] ^= u8::from(rot);
    stream.write_all(&reply(request, 0, &[8, 0, 0x18, 3], &data))
}
