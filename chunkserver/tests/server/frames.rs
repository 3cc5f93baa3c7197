//! Streams that are broken, too large or meant for somebody else: what each gets, and that only it is concerned.

use super::client::{BLOCK, Client, SUCCESS, pattern, read_frame, write_frame};
use super::harness::{Lab, Setup, http, wait_for};
use super::wire::{CHUNK, Message, frame, request};
use std::net::{Shutdown, TcpStream};

fn meta(service: &str, method: &str, cid: u64) -> Message {
    let call = Message::default().bytes(1, service.as_bytes()).bytes(2, method.as_bytes());
    Message::default().bytes(1, &call.0).int(3, 0).int(4, cid)
}

#[test]
fn streams_that_cannot_be_followed_are_closed() {
    let lab = Lab::new(Setup::default());
    let server = lab.start();
    lab.copysets(1);
    let mut other = server.client();
    let block = pattern(1, BLOCK);
    assert_eq!(other.write(1, 1, 0, &block), SUCCESS);
    let oversize = [b"PRPC".as_slice(), &((64 << 20) + 1u32).to_be_bytes(), &8u32.to_be_bytes()].concat();
    let huge = [b"PRPC".as_slice(), &u32::MAX.to_be_bytes(), &8u32.to_be_bytes()].concat();
    let meta_beyond = [b"PRPC".as_slice(), &8u32.to_be_bytes(), &9u32.to_be_bytes(), &[0; 32]].concat();
    let huge_meta = [b"PRPC".as_slice(), &(1u32 << 20).to_be_bytes(), &(1u32 << 20).to_be_bytes()].concat();
    let bad_meta = frame(&Message(vec![0xff; 40]), &[]);
    for (what, bytes) in [
        ("body over 64 MiB", oversize),
        ("body of 4 GiB", huge),
        ("meta longer than the body", meta_beyond),
        ("meta of 1 MiB", huge_meta),
        ("undecodable meta", bad_meta),
        ("another protocol", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03aaaaaaaaaaaaaaaa".to_vec()),
        ("streaming", b"STRM\0\0\0\0\0\0\0\0".to_vec()),
        ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec()),
        ("zeros", vec![0; 5000]),
    ] {
        println!("{what}");
        let mut client = server.client();
        client.send(&bytes);
        client.expect_close();
        // What was complete before the fault is still answered, then the connection ends.
        let mut client = server.client();
        client.send(&[read_frame(7, 1, 1, 0, BLOCK as u64), bytes].concat());
        if let Ok(answer) = client.try_receive() {
            assert_eq!((answer.cid, answer.attachment.as_slice()), (7, block.as_slice()));
            client.expect_close();
        }
        assert_eq!(other.data(1, 1, 0, BLOCK), block, "others do not notice");
    }
}

#[test]
fn calls_that_cannot_be_served_get_the_code_and_the_connection_stays() {
    let lab = Lab::new(Setup::default());
    let server = lab.start();
    lab.copysets(1);
    let mut client = server.client();
    let block = pattern(1, BLOCK);
    assert_eq!(client.write(1, 1, 0, &block), SUCCESS);
    let none = Message::default();
    let good = super::client::chunk_request(1, 1, 1, 0, BLOCK as u64, 0);
    let required_missing = Message::default().int(1, 1).int(2, 1);
    let compressed = meta(CHUNK, "ReadChunk", 3).int(3, 1);
    let attachment_beyond = meta(CHUNK, "ReadChunk", 3).int(5, 5000);
    let negative = meta(CHUNK, "ReadChunk", 3).int(5, u64::MAX);
    let no_request = Message::default().int(4, 3);
    for (what, code, bytes) in [
        ("short name", 1001, request("NoSuch", "Foo", 3, &none, &[])),
        ("short name, with payload", 1001, request("NoSuch", "Foo", 3, &none, &[7; 300_000])),
        ("no request part", 1001, frame(&no_request, &[])),
        ("full name", 1002, request("curve.chunkserver.NoSuch", "Foo", 3, &none, &[])),
        ("method", 1002, request(CHUNK, "NoSuch", 3, &good, &[])),
        ("method, other case", 1002, request(CHUNK, "readchunk", 3, &good, &[])),
        ("not protobuf", 1003, request(CHUNK, "ReadChunk", 3, &Message(vec![0xff; 20]), &[])),
        ("required fields missing", 1003, request(CHUNK, "ReadChunk", 3, &required_missing, &[])),
        ("unknown enum value", 1003, request(CHUNK, "ReadChunk", 3, &good.clone().int(1, 99), &[])),
        ("message of 2 MiB", 1003, request(CHUNK, "ReadChunk", 3, &Message(vec![0; 2 << 20]), &[])),
        ("compressed", 1003, frame(&compressed, &good.0)),
        ("attachment beyond the frame", 1003, frame(&attachment_beyond, &good.0)),
        ("negative attachment", 1003, frame(&negative, &good.0)),
        ("attachment on a read", 1003, request(CHUNK, "ReadChunk", 3, &good, &[1; 300_000])),
    ] {
        client.send(&bytes);
        let answer = client.receive();
        assert_eq!((answer.cid, answer.error_code), (3, code), "{what}: {}", answer.error_text);
        assert!(!answer.error_text.is_empty() && answer.message.is_empty() && answer.attachment.is_empty(), "{what}");
        assert_eq!(client.data(1, 1, 0, BLOCK), block, "after: {what}");
    }
    let nobody =
        client.call("curve.chunkserver.CliService2", "GetLeader", &Message::default().int(1, 1).int(2, 9), &[]);
    assert_eq!(nobody.error_code, 2, "ENOENT");
    assert_eq!(client.call("ChunkService", "ReadChunk", &good, &[]).status(), SUCCESS, "short names are found");
}

#[test]
fn frames_in_any_pieces_and_many_at_once() {
    let lab = Lab::new(Setup::default());
    let server = lab.start();
    lab.copysets(3);
    let mut client = server.client();
    let data = pattern(1, 2 * BLOCK);
    for piece in [1, 5, 11, 13, 4096, 4097] {
        for part in write_frame(piece as u64, 1, 1, 0, &data).chunks(piece) {
            client.send(part);
            if piece < 20 && part[0].is_multiple_of(64) {
                std::thread::yield_now();
            }
        }
        let answer = client.receive();
        assert_eq!((answer.cid, answer.status()), (piece as u64, SUCCESS), "pieces of {piece}");
    }
    // Three hundred calls in one go, to copysets of every shard; answers in any order, one each.
    let mut many = Vec::new();
    for cid in 0..300u64 {
        let data = pattern(cid, BLOCK);
        many.extend(write_frame(cid, 1 + cid % 3, 2, cid / 3 * BLOCK as u64, &data));
    }
    client.send(&many);
    let mut seen: Vec<u64> =
        (0..300).map(|_| client.receive()).inspect(|r| assert_eq!(r.status(), 0)).map(|r| r.cid).collect();
    seen.sort_unstable();
    assert_eq!(seen, (0..300).collect::<Vec<_>>());
    for cid in 0..300u64 {
        assert_eq!(client.data(1 + cid % 3, 2, cid / 3 * BLOCK as u64, BLOCK), pattern(cid, BLOCK));
    }
}

#[test]
fn connections_that_come_and_go_leave_nothing() {
    let lab = Lab::new(Setup::default());
    let server = lab.start();
    lab.copysets(1);
    let block = pattern(1, BLOCK);
    let mut client = server.client();
    assert_eq!(client.write(1, 1, 0, &block), SUCCESS);
    let before = server.descriptors();
    let whole = write_frame(1, 1, 1, 0, &pattern(2, 64 * BLOCK));
    for round in 0..200 {
        // Nothing at all (that is how C++ clients probe), part of a frame, a request nobody waits for.
        drop(TcpStream::connect(lab.address).unwrap());
        let mut half = Client::connect(lab.address);
        half.send(&whole[..whole.len() * round / 200]);
        let mut gone = Client::connect(lab.address);
        gone.send(&read_frame(1, 1, 1, 0, BLOCK as u64));
        if round % 2 == 0 {
            gone.stream.shutdown(Shutdown::Write).unwrap();
        }
    }
    assert_eq!(client.data(1, 1, 0, BLOCK), block, "a write of which a part came is no write");
    wait_for("all descriptors to be closed", || server.descriptors() <= before);
    let free = || {
        let shards = lab.ask(&["status"])["shards"].clone();
        shards.as_array().unwrap().iter().map(|s| s["buffers_free_bytes"].as_u64().unwrap()).sum::<u64>()
    };
    wait_for("all payload buffers to come back", || free() == lab.setup.buffers * u64::from(lab.setup.shards));
    assert!(http(lab.address, "/health").unwrap().ends_with("OK"));
}
