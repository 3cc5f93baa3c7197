//! A leader that is not ours: what volumes ask of Curve's original, as it answers.

use super::client::pattern;
use super::harness::{Lab, MIB, Server, Setup};
use super::nbd::Nbd;
use super::wire::{Fields, Message, Value, fields, frame};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// A call, taken apart.
struct Call {
    method: String,
    cid: u64,
    message: Fields,
    attachment: Vec<u8>,
}

fn int(fields: &Fields, field: u64) -> u64 {
    if let Some(&Value::Int(value)) = fields.get(&field).and_then(|all| all.first()) { value } else { 0 }
}

fn bytes(fields: &Fields, field: u64) -> Vec<u8> {
    if let Some(Value::Bytes(value)) = fields.get(&field).and_then(|all| all.first()) { value.clone() } else { vec![] }
}

fn receive(stream: &mut TcpStream) -> std::io::Result<Call> {
    let mut head = [0; 12];
    stream.read_exact(&mut head)?;
    let size = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap()) as usize;
    let mut body = vec![0; size(4)];
    stream.read_exact(&mut body)?;
    let meta = fields(&body[..size(8)]);
    let attachment = body.split_off(body.len() - int(&meta, 5) as usize);
    let method = String::from_utf8(bytes(&fields(&bytes(&meta, 1)), 2)).unwrap();
    Ok(Call { method, cid: int(&meta, 4), message: fields(&body[size(8)..]), attachment })
}

fn answer(cid: u64, code: u64, message: &Message, attachment: &[u8]) -> Vec<u8> {
    let mut meta = Message::default().bytes(2, &Message::default().int(1, code).0).int(3, 0).int(4, cid);
    if !attachment.is_empty() {
        meta = meta.int(5, attachment.len() as u64);
    }
    frame(&meta, &[&message.0, attachment].concat())
}

/// Its chunks, in memory.
struct Foreign {
    address: SocketAddr,
    chunks: Mutex<BTreeMap<u64, Vec<u8>>>,
    /// The next read stops in the middle of its data.
    stalls: AtomicBool,
}

impl Foreign {
    fn start() -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let own = Arc::new(Self { address, chunks: Mutex::default(), stalls: AtomicBool::new(false) });
        let foreign = Arc::clone(&own);
        std::thread::spawn(move || {
            for mut stream in listener.incoming().map_while(Result::ok) {
                let foreign = Arc::clone(&foreign);
                std::thread::spawn(move || {
                    while let Ok(call) = receive(&mut stream) {
                        let stalls = call.method == "ReadChunk" && foreign.stalls.swap(false, Ordering::SeqCst);
                        let answer = foreign.serve(call);
                        let sent = if stalls { answer.len() / 2 } else { answer.len() };
                        if stream.write_all(&answer[..sent]).is_err() {
                            return;
                        }
                        while stalls && receive(&mut stream).is_ok() {}
                    }
                });
            }
        });
        own
    }

    fn serve(&self, call: Call) -> Vec<u8> {
        let Call { method, cid, message, attachment } = call;
        let (chunk, offset, size) = (int(&message, 4), int(&message, 6) as usize, int(&message, 7) as usize);
        let done = Message::default().int(1, 0).int(3, 1);
        let mut chunks = self.chunks.lock().unwrap();
        match method.as_str() {
            "GetLeader" => {
                let peer = Message::default().bytes(3, format!("{}:0", self.address).as_bytes());
                answer(cid, 0, &Message::default().bytes(1, &peer.0), &[])
            }
            "WriteChunk" => {
                assert_eq!((attachment.len(), int(&message, 9)), (size, 1), "size and sn");
                chunks.entry(chunk).or_insert_with(|| vec![0; MIB as usize])[offset..offset + size]
                    .copy_from_slice(&attachment);
                answer(cid, 0, &done, &[])
            }
            "ReadChunk" => match chunks.get(&chunk) {
                None => answer(cid, 0, &Message::default().int(1, 7), &[]),
                Some(data) => answer(cid, 0, &done, &data[offset..offset + size]),
            },
            _ => answer(cid, 1002, &Message::default(), &[]),
        }
    }
}

fn export(lab: &Lab, foreign: &Foreign) -> Nbd {
    let peer = format!("{}:0", foreign.address);
    let create = ["volume", "create", "--name", "v", "--size", "8MiB", "--copysets", "1:1", "--chunk-size", "1MiB"];
    lab.ask(&[&create[..], &["--peers", &peer]].concat());
    Nbd::open(lab, "v")
}

#[test]
fn trim_is_zeros_to_who_does_not_know_it() {
    let (lab, foreign) = (Lab::exporter(Setup::default()), Foreign::start());
    let server: Server<'_> = lab.start();
    let mut volume = export(&lab, &foreign);
    let data = pattern(1, 2 << 20);
    assert_eq!(volume.write(0, &data), 0);
    assert_eq!(volume.zero(MIB / 2, MIB as usize), 0);
    assert_eq!(volume.zero(4 * MIB, 4 << 20), 0, "whole chunks, all at once");
    let (error, seen) = volume.read(0, 2 << 20);
    assert_eq!(error, 0);
    assert!(seen[..512 << 10] == data[..512 << 10] && seen[1536 << 10..] == data[1536 << 10..]);
    assert!(seen[512 << 10..1536 << 10].iter().all(|&byte| byte == 0));
    server.stop();
}

#[test]
fn an_answer_that_stops_in_its_middle_is_asked_for_again() {
    let (lab, foreign) = (Lab::exporter(Setup::default()), Foreign::start());
    let server: Server<'_> = lab.start();
    let mut volume = export(&lab, &foreign);
    let data = pattern(1, 1 << 20);
    assert_eq!(volume.write(0, &data), 0);
    foreign.stalls.store(true, Ordering::SeqCst);
    assert!(volume.read(0, 1 << 20) == (0, data));
    server.stop();
}
