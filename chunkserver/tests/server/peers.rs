//! Peers of a real server, played over sockets: who may speak to it, and whom it speaks to. The bytes are made here, not
//! by the server's codec.

use super::harness::{Lab, PATIENCE, Setup, http, wait_for};
use super::wire::{Message, frame, request};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

const SERVICE: &str = "chunkserver.internal.PeerService";

fn id(address: SocketAddr) -> u64 {
    let SocketAddr::V4(v4) = address else { panic!("IPv4") };
    u64::from(v4.ip().to_bits()) << 32 | u64::from(v4.port()) << 16
}

struct Hello {
    version: u16,
    lane: u16,
    chunk: u32,
    from: u64,
    to: u64,
    to_shard: u16,
    disk: u8,
}

impl Hello {
    fn to(lab: &Lab) -> Self {
        let from = id(SocketAddr::from((Ipv4Addr::new(10, 9, 8, 7), 65)));
        Self { version: 1, lane: 0, chunk: lab.setup.chunk as u32, from, to: id(lab.address), to_shard: 0, disk: 7 }
    }
    fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(self.version.to_le_bytes());
        out.extend(self.lane.to_le_bytes());
        out.extend(self.chunk.to_le_bytes());
        out.extend(self.from.to_le_bytes());
        out.extend(self.to.to_le_bytes());
        for number in [0, self.to_shard, 3, 0] {
            out.extend(number.to_le_bytes());
        }
        out.extend([self.disk; 16]);
        out.extend([0; 16]);
        out
    }
}

/// One frame: what is in its meta, and the bytes behind it.
fn receive(stream: &mut TcpStream) -> std::io::Result<(Vec<u8>, Vec<u8>)> {
    let mut head = [0; 12];
    stream.read_exact(&mut head)?;
    let size = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap()) as usize;
    let (mut meta, mut rest) = (vec![0; size(8)], vec![0; size(4) - size(8)]);
    stream.read_exact(&mut meta)?;
    stream.read_exact(&mut rest)?;
    Ok((meta, rest))
}

fn connect(lab: &Lab) -> TcpStream {
    let stream = TcpStream::connect(lab.address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Greets; the status of the answer.
fn greet(lab: &Lab, hello: &Hello) -> (TcpStream, u16, Vec<u8>) {
    let mut stream = connect(lab);
    stream.write_all(&request(SERVICE, "Hello", 5, &Message(hello.bytes()), &[])).unwrap();
    let (_, welcome) = receive(&mut stream).unwrap();
    assert_eq!((welcome.len(), &welcome[..2]), (48, &[1, 0][..]));
    let status = u16::from_le_bytes(welcome[2..4].try_into().unwrap());
    (stream, status, welcome)
}

fn is_closed(stream: &mut TcpStream) -> bool {
    let mut byte = [0];
    !stream.read(&mut byte).is_ok_and(|count| count > 0)
}

fn ping(stream: &mut TcpStream) {
    stream.write_all(&request(SERVICE, "Ping", 9, &Message::default(), &[])).unwrap();
    let (meta, body) = receive(stream).unwrap();
    assert!(body.is_empty() && meta.windows(2).any(|pair| pair == [0x20, 9]), "the ping's id comes back");
}

fn metric(lab: &Lab, name: &str) -> u64 {
    let page = http(lab.address, "/metrics").unwrap();
    let lines = page.lines().filter(|line| line.contains(name) && !line.starts_with('#'));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum::<f64>() as u64
}

/// A heartbeat for a copyset nobody has, with a bulk message of one block behind it.
fn batch() -> Vec<u8> {
    let mut body = vec![1, 0, 0, 0, 2, 0, 0, 0];
    body.extend([6, 0, 0, 0, 0, 0, 0, 0]);
    body.extend(77u64.to_le_bytes());
    [1u64, 0, 0, 0, 0, 0].iter().for_each(|number| body.extend(number.to_le_bytes()));
    body.extend([0; 8]);
    body.extend([0, 0, 0, 0, 4, 0, 0, 0]);
    body.extend(77u64.to_le_bytes());
    body.extend(4096u32.to_le_bytes());
    body.extend([0; 4]);
    body.extend(b"head");
    request(SERVICE, "Batch", 6, &Message(body), &[3; 4096])
}

#[test]
fn who_may_speak_and_what_ends_it() {
    let lab = Lab::new(Setup::default());
    let server = lab.start();
    let good = Hello::to(&lab);
    for to_shard in 0..2 {
        let (mut stream, status, welcome) = greet(&lab, &Hello { to_shard, ..Hello::to(&lab) });
        assert_eq!(status, 0);
        assert_eq!(welcome[8..16], id(lab.address).to_le_bytes());
        assert_eq!(welcome[16..18], 2u16.to_le_bytes(), "it has two shards");
        ping(&mut stream);
        stream.write_all(&batch()).unwrap();
        ping(&mut stream);
        // In pieces too.
        for piece in batch().chunks(11) {
            stream.write_all(piece).unwrap();
        }
        ping(&mut stream);
    }
    wait_for("mail to be counted", || metric(&lab, "peer_mail_in_num") + metric(&lab, "peer_mail_bad_num") >= 8);

    for (status, hello) in [
        (1, Hello { version: 2, ..Hello::to(&lab) }),
        (2, Hello { to: 99, ..Hello::to(&lab) }),
        (3, Hello { to_shard: 2, ..Hello::to(&lab) }),
        (4, Hello { chunk: 4096, ..Hello::to(&lab) }),
        (6, Hello { from: good.to, ..Hello::to(&lab) }),
        (8, Hello { lane: 2, ..Hello::to(&lab) }),
    ] {
        let (mut stream, answer, _) = greet(&lab, &hello);
        assert_eq!(answer, status);
        assert!(is_closed(&mut stream), "refused with {status}, then closed");
    }

    let (mut first, ..) = greet(&lab, &good);
    let (mut twin, status, _) = greet(&lab, &Hello { disk: 8, ..Hello::to(&lab) });
    assert_eq!(status, 6, "two nodes with one identity: the second is refused");
    assert!(is_closed(&mut twin));
    ping(&mut first);
    let (mut second, status, _) = greet(&lab, &good);
    assert_eq!(status, 0);
    assert!(is_closed(&mut first), "the same one again: it has lost the first connection");
    let (mut control, ..) = greet(&lab, &Hello { lane: 1, ..Hello::to(&lab) });
    ping(&mut second);
    ping(&mut control);

    let mut cut = batch();
    let at = cut.len() - 4096 - 4;
    cut[at - 1] = 1;
    for bytes in [
        b"GET /health HTTP/1.1\r\n\r\n".to_vec(),
        request("curve.chunkserver.ChunkService", "ReadChunk", 5, &Message::default(), &[]),
        request(SERVICE, "Batch", 5, &Message(vec![1; 100]), &[]),
        cut,
        vec![0; 100],
    ] {
        let (mut stream, ..) = greet(&lab, &good);
        stream.write_all(&bytes).unwrap();
        assert!(is_closed(&mut stream), "what a peer never says");
    }
    // Not the first thing said: an answer, as to any call that is not understood.
    let mut stream = connect(&lab);
    stream.write_all(&request(SERVICE, "Batch", 5, &Message::default(), &[])).unwrap();
    receive(&mut stream).unwrap();
    stream.write_all(&request(SERVICE, "Hello", 5, &Message(good.bytes()), &[1; 300])).unwrap();
    receive(&mut stream).unwrap();
    assert!(http(lab.address, "/health").unwrap().ends_with("OK"));
    drop(server);
}

#[test]
fn a_peer_that_fell_silent_makes_way_for_the_next_one_at_its_address() {
    let lab = Lab::new(Setup::default());
    let server = lab.start();
    let (mut gone, status, _) = greet(&lab, &Hello::to(&lab));
    assert_eq!(status, 0);
    let other = Hello { from: 99, ..Hello::to(&lab) };
    let (mut lives, status, _) = greet(&lab, &other);
    assert_eq!(status, 0);
    // The disk was formatted meanwhile; the old connection was never closed.
    let again = Hello { disk: 8, ..Hello::to(&lab) };
    assert_eq!(greet(&lab, &again).1, 6);
    let since = Instant::now();
    gone.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let (mut byte, mut pinged) = ([0], since);
    while gone.read(&mut byte).is_err() {
        if pinged.elapsed() > Duration::from_secs(5) {
            lives = greet(&lab, &other).0; // this process did not run
        }
        ping(&mut lives);
        pinged = Instant::now();
        assert!(since.elapsed() < PATIENCE * 2, "it is never closed");
    }
    assert!(since.elapsed() > Duration::from_secs(8), "closed after {:?}", since.elapsed());
    assert_eq!(greet(&lab, &again).1, 0);
    ping(&mut lives);
    drop(server);
}

/// Create a copyset of this server and others, as the MDS does.
fn create(lab: &Lab, copyset: u64, others: &[SocketAddr]) {
    let peers = others.iter().chain([&lab.address]);
    let peer = |address: &SocketAddr| Message::default().bytes(3, format!("{address}:0").as_bytes());
    let set = Message::default().int(1, 1).int(2, copyset);
    let set = peers.fold(set, |set, address| set.bytes(3, &peer(address).0));
    let mut stream = connect(lab);
    let all = Message::default().bytes(1, &set.0);
    stream.write_all(&request("curve.chunkserver.CopysetService", "CreateCopysetNode2", 1, &all, &[])).unwrap();
    assert_eq!(receive(&mut stream).unwrap().1, [8, 0], "SUCCESS");
}

fn welcome(peer: SocketAddr, chunk: u64) -> Vec<u8> {
    let mut body = vec![1, 0, 0, 0];
    body.extend((chunk as u32).to_le_bytes());
    body.extend(id(peer).to_le_bytes());
    body.extend(2u16.to_le_bytes());
    body.extend([0; 14]);
    body.extend([9; 16]);
    body
}

fn answer(cid: u64, body: &[u8]) -> Vec<u8> {
    let part = Message::default().int(1, 0);
    frame(&Message::default().bytes(2, &part.0).int(3, 0).int(4, cid), body)
}

/// The correlation id and the method of a request of few calls.
fn call(meta: &[u8]) -> (u64, String) {
    let text = String::from_utf8_lossy(meta);
    let method = ["Hello", "Batch", "Ping"].into_iter().find(|name| text.contains(*name)).unwrap_or("?");
    let at = meta.windows(2).position(|pair| pair == [0x18, 0]).unwrap();
    (u64::from(meta[at + 3]), method.to_owned())
}

#[test]
fn a_candidate_calls_its_peers_and_says_so_when_they_are_none() {
    let lab = Lab::new(Setup { extra: "election_timeout_ms = 100".into(), ..Setup::default() });
    let _server = lab.start();
    let listen = || TcpListener::bind(SocketAddr::new(lab.address.ip(), 0)).unwrap();
    let (peer, foreign) = (listen(), listen());
    let (address, other) = (peer.local_addr().unwrap(), foreign.local_addr().unwrap());
    create(&lab, 1, &[address, other]);

    // A server that is no peer of ours.
    let stranger = std::thread::spawn(move || {
        let (mut stream, _) = foreign.accept().unwrap();
        let (meta, _) = receive(&mut stream).unwrap();
        let (cid, method) = call(&meta);
        assert_eq!(method, "Hello");
        let part = Message::default().int(1, 1002).bytes(2, b"Fail to find method");
        stream.write_all(&frame(&Message::default().bytes(2, &part.0).int(3, 0).int(4, cid), &[])).unwrap();
        assert!(is_closed(&mut stream));
    });
    let (mut stream, _) = peer.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let (meta, hello) = receive(&mut stream).unwrap();
    assert_eq!((call(&meta).1.as_str(), hello.len()), ("Hello", 64));
    assert_eq!(hello[..8], [&[1, 0, 1, 0][..], &(lab.setup.chunk as u32).to_le_bytes()].concat(), "the control lane");
    assert_eq!(hello[8..24], [id(lab.address).to_le_bytes(), id(address).to_le_bytes()].concat());
    stream.write_all(&answer(call(&meta).0, &welcome(address, lab.setup.chunk))).unwrap();
    let mut votes = 0;
    while votes < 2 {
        let (meta, body) = receive(&mut stream).unwrap();
        match call(&meta) {
            (cid, method) if method == "Ping" => stream.write_all(&answer(cid, &[])).unwrap(),
            (_, method) => {
                assert_eq!((method.as_str(), &body[..4]), ("Batch", &[1, 0, 0, 0][..]));
                assert_eq!(body[8], 9, "a pre-vote: its election time is over, again and again");
                assert_eq!(body[16..24], (1u64 << 32 | 1).to_le_bytes());
                votes += 1;
            }
        }
    }
    stranger.join().unwrap();
    wait_for("the failed handshake to be counted", || metric(&lab, "peer_handshake_failed_num") > 0);
    assert_eq!(metric(&lab, "peer_link_count"), 1);
    wait_for("the log to name it", || lab.log().contains("it is no peer of ours (RPC error 1002)"));

    // The peer goes, and comes back.
    drop(stream);
    let (mut stream, _) = peer.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(call(&receive(&mut stream).unwrap().0).1, "Hello");
}
