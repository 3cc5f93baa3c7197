//! One connection: any split gives the same calls, and who does not read or stalls makes only itself wait.

use super::node::{CHUNK_SIZE, Node};
use super::wire::{CHUNK, Message, chunk, request, responses};
use bytes::Bytes;
use chunkserver::io::buffer::Arena;
use chunkserver::limits::CONNECTION_BYTES_MAX;
use chunkserver::rpc::{Attachment, CloseReason, Connection, Incoming, Options, Out, Progress};
use chunkserver::service::{names, route};
use proptest::prelude::*;
use std::sync::Arc;

fn connection() -> Connection {
    Connection::new(Options { route, chunk_size: CHUNK_SIZE as usize })
}

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + seed * 7 + i / 253) as u8).collect()
}

fn write(cid: u64, size: usize) -> Vec<u8> {
    request(CHUNK, "WriteChunk", cid, &chunk(2, 1, 0, size as u64, 1), &pattern(size, cid as usize))
}

/// What arrived, in a form that can be compared.
fn describe(incoming: &Incoming) -> String {
    match incoming {
        Incoming::Call(call) => {
            let attachment = match &call.attachment {
                Attachment::Data { data, crcs } => {
                    let expected: Vec<u32> = data.chunks(4096).map(crc32c::crc32c).collect();
                    assert_eq!(crcs.to_vec(), expected);
                    format!("data {} {:08x}", data.len(), crc32c::crc32c(data))
                }
                other => format!("{other:?}"),
            };
            format!("call {} {} {:?} {attachment}", call.method.0, call.correlation_id, call.body)
        }
        other => format!("{other:?}"),
    }
}

fn everything() -> Vec<u8> {
    let empty = Message::default();
    let mut stream = write(1, 8192);
    stream.extend(request(CHUNK, "ReadChunk", 2, &chunk(1, 1, 0, 4096, 0), &[]));
    stream.extend(write(3, 100));
    stream.extend(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n");
    stream.extend(request("NoSuch", "Foo", 4, &empty, &[7; 5000]));
    stream.extend(request(CHUNK, "ReadChunk", 5, &chunk(1, 1, 0, 4096, 0), &[1; 300]));
    stream.extend(request(CHUNK, "ReadChunk", 6, &chunk(1, 1, 0, 4096, 0), &vec![1; 70_000]));
    stream.extend(write(7, 4096));
    stream
}

/// Feed the pieces; an HTTP request is answered at once, so that what is behind it goes on.
fn feed<'a>(pieces: impl Iterator<Item = &'a [u8]>, arena: &Arc<Arena>) -> Vec<String> {
    feed_to(&mut connection(), pieces, arena)
}

fn feed_to<'a>(connection: &mut Connection, pieces: impl Iterator<Item = &'a [u8]>, arena: &Arc<Arena>) -> Vec<String> {
    let mut seen = Vec::new();
    for mut piece in pieces {
        loop {
            let mut out = Vec::new();
            let progress = connection.received(&mut piece, arena, &mut out).unwrap();
            for incoming in out {
                seen.push(describe(&incoming));
                if matches!(incoming, Incoming::Http(_)) {
                    connection.push_reply(Out { http: true, ..Out::default() });
                }
            }
            if progress == Progress::Consumed {
                break;
            }
        }
    }
    seen
}

#[test]
fn every_kind_of_message_is_understood() {
    let arena = Arena::new(1 << 20).unwrap();
    let seen = feed([everything().as_slice()].into_iter(), &arena);
    assert_eq!(seen.len(), 8, "{seen:#?}");
    assert!(seen[0].contains("data 8192"));
    assert!(seen[2].contains("Dropped(100)") && seen[5].contains("Dropped(300)"));
    assert!(seen[4].contains("code: 1001") && seen[6].contains("code: 1003"));
    assert_eq!(arena.free_bytes(), arena.size());
}

/// A hand-over in the middle of anything.
#[test]
fn saved_anywhere_and_restored_elsewhere_it_goes_on() {
    let arena = Arena::new(1 << 20).unwrap();
    let mut stream = everything();
    stream.extend(b"POST /health HTTP/1.1\r\nContent-Length: 300\r\n\r\n");
    stream.extend([b'x'; 300]);
    stream.extend(write(8, 4096));
    let whole = feed([stream.as_slice()].into_iter(), &arena);
    for cut in (0..stream.len()).filter(|cut| cut % 53 == 0 || cut % 8192 < 400) {
        let mut before = connection();
        let mut seen = feed_to(&mut before, [&stream[..cut]].into_iter(), &arena);
        let (saved, begun) = before.save(names);
        drop(before);
        let saved = serde_json::from_slice(&serde_json::to_vec(&saved).unwrap()).unwrap();
        let options = Options { route, chunk_size: CHUNK_SIZE as usize };
        let mut after = Connection::restore(options, saved, Bytes::from_static(b"unsent")).unwrap();
        assert_eq!(after.take_send(8).concat(), b"unsent");
        after.sent();
        seen.extend(feed_to(&mut after, [&begun[..], &stream[cut..]].into_iter(), &arena));
        assert_eq!(seen, whole, "cut at {cut}");
        assert_eq!(arena.free_bytes(), arena.size());
    }
    for absurd in [
        "{\"skip\":99999999999}",
        "{\"passing\":{\"left\":0,\"correlation_id\":1,\"due\":{\"Reject\":{\"code\":1,\"text\":\"\"}}}}",
    ] {
        let options = Options { route, chunk_size: CHUNK_SIZE as usize };
        assert!(Connection::restore(options, serde_json::from_str(absurd).unwrap(), Bytes::new()).is_err(), "{absurd}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_split_gives_the_same_calls(mut cuts in prop::collection::vec(0usize..90_000, 0..40)) {
        let arena = Arena::new(1 << 20).unwrap();
        let stream = everything();
        let whole = feed([stream.as_slice()].into_iter(), &arena);
        cuts.iter_mut().for_each(|cut| *cut = (*cut).min(stream.len()));
        cuts.extend([0, stream.len()]);
        cuts.sort_unstable();
        prop_assert_eq!(feed(cuts.windows(2).map(|pair| &stream[pair[0]..pair[1]]), &arena), whole);
    }

    #[test]
    fn hostile_bytes_never_panic(prefix in 0usize..3, bytes in prop::collection::vec(any::<u8>(), 0..3000)) {
        let arena = Arena::new(1 << 20).unwrap();
        let mut stream = [&b""[..], b"PRPC\0\0\x01\0\0\0\0\x08", b"GET "][prefix].to_vec();
        stream.extend(bytes);
        let (mut connection, mut input, mut out) = (connection(), stream.as_slice(), Vec::new());
        while connection.received(&mut input, &arena, &mut out) == Ok(Progress::Later) {
            if !out.iter().any(|one| matches!(one, Incoming::Http(_))) {
                break;
            }
            out.clear();
            connection.push_reply(Out { http: true, ..Out::default() });
        }
        prop_assert!(connection.held_bytes() <= 2 << 20);
    }
}

#[test]
fn byte_by_byte() {
    let arena = Arena::new(1 << 20).unwrap();
    let stream = everything();
    assert_eq!(feed(stream.chunks(1), &arena), feed([stream.as_slice()].into_iter(), &arena));
}

#[test]
fn without_a_buffer_it_stands_still_and_goes_on() {
    let arena = Arena::new(64 << 10).unwrap();
    let held = arena.alloc(64 << 10).unwrap();
    let (mut connection, mut out) = (connection(), Vec::new());
    let stream = [write(1, 8192), write(2, 4096)].concat();
    let mut input = stream.as_slice();
    assert_eq!(connection.received(&mut input, &arena, &mut out), Ok(Progress::NoBuffer));
    assert_eq!((connection.wants_buffer(), connection.may_receive(), out.len()), (Some(8192), false, 0));
    assert!(stream.len() - input.len() < 200, "the payload stays where it is");
    assert_eq!(connection.received(&mut input, &arena, &mut out), Ok(Progress::NoBuffer));
    drop(held);
    assert_eq!(connection.received(&mut input, &arena, &mut out), Ok(Progress::Consumed));
    assert_eq!((out.len(), connection.wants_buffer(), connection.may_receive()), (2, None, true));
}

#[test]
fn a_large_payload_is_received_in_place() {
    let arena = Arena::new(4 << 20).unwrap();
    let stream = [write(9, 1 << 20), write(10, 4096)].concat();
    let (mut connection, mut out) = (connection(), Vec::new());
    let mut at = 30_000;
    let mut first = &stream[..at];
    assert_eq!(connection.received(&mut first, &arena, &mut out), Ok(Progress::Consumed));
    let mut lent = 0;
    while let Some((mut buf, filled)) = connection.direct() {
        // As the kernel would: some bytes, never beyond the buffer.
        let count = (buf.len() - filled).min(200_000);
        buf[filled..filled + count].copy_from_slice(&stream[at..at + count]);
        at += count;
        connection.direct_done(buf, count, &mut out);
        lent += 1;
    }
    assert_eq!(lent, 5, "the small rest comes with the next receive");
    let mut rest = &stream[at..];
    assert_eq!(connection.received(&mut rest, &arena, &mut out), Ok(Progress::Consumed));
    let seen: Vec<String> = out.iter().map(describe).collect();
    assert_eq!(seen.len(), 2);
    let data = pattern(1 << 20, 9);
    assert!(seen[0].contains(&format!("data 1048576 {:08x}", crc32c::crc32c(&data))));
}

#[test]
fn whoever_does_not_read_is_not_read() {
    let mut node = Node::with_copyset();
    let mut connection = node.connection();
    node.serve(&mut connection, &write(1, 1 << 20));
    let read = request(CHUNK, "ReadChunk", 2, &chunk(1, 1, 0, 1 << 20, 0), &[]);
    let mut answered = 0;
    while connection.may_receive() {
        let mut out = Vec::new();
        let mut input = read.as_slice();
        assert_eq!(connection.received(&mut input, &node.arena, &mut out), Ok(Progress::Consumed));
        let handled = node.begin(out.pop().unwrap());
        let reply = node.finish(handled, &mut connection);
        connection.push_reply(reply);
        answered += 1;
    }
    assert_eq!(answered, 32);
    assert!((CONNECTION_BYTES_MAX..CONNECTION_BYTES_MAX + (2 << 20)).contains(&connection.backlog_bytes()));
    let (mut out, mut input) = (Vec::new(), read.as_slice());
    assert_eq!(connection.received(&mut input, &node.arena, &mut out), Ok(Progress::Later));
    assert_eq!((out.len(), input.len()), (0, read.len()), "not even looked at");
    // A send makes room.
    let taken: usize = connection.take_send(600).iter().map(Bytes::len).sum();
    assert!(taken > 0 && !connection.may_receive(), "until the send completed it counts");
    connection.sent();
    assert!(connection.may_receive());
}

#[test]
fn unanswered_reads_count_what_they_will_pin() {
    let node = Node::with_copyset();
    let mut connection = node.connection();
    let read = request(CHUNK, "ReadChunk", 2, &chunk(1, 1, 0, 16 << 20, 0), &[]);
    let mut begun = 0;
    while connection.may_receive() {
        let mut out = Vec::new();
        connection.received(&mut read.as_slice(), &node.arena, &mut out).unwrap();
        if let chunkserver::service::Handled::Shard { charge, .. } = node.begin(out.pop().unwrap()) {
            connection.charge(charge);
        }
        begun += 1;
    }
    assert_eq!(begun, 2, "two whole chunks");
}

#[test]
fn reads_that_arrive_together_are_counted_one_by_one() {
    let node = Node::with_copyset();
    let mut connection = node.connection();
    let stream = request(CHUNK, "ReadChunk", 2, &chunk(1, 1, 0, 1 << 20, 0), &[]).repeat(200);
    let (mut input, mut out, mut begun) = (stream.as_slice(), Vec::new(), 0);
    while connection.received(&mut input, &node.arena, &mut out) == Ok(Progress::More) {
        assert_eq!(out.len(), 1);
        if let chunkserver::service::Handled::Shard { charge, .. } = node.begin(out.pop().unwrap()) {
            connection.charge(charge);
        }
        begun += 1;
    }
    assert_eq!((begun, out.len()), (32, 0), "as many as the connection's budget is for");
    assert!(!connection.may_receive() && connection.held_bytes() < CONNECTION_BYTES_MAX + (1 << 20));
}

#[test]
fn streams_that_cannot_be_followed_are_closed() {
    for stream in [&b"PRPC\xff\xff\xff\xff\0\0\0\x08"[..], b"STRM", b"PRI * HTTP/2.0\r\n\r\nSM", b"hello"] {
        let (mut connection, mut out) = (connection(), Vec::new());
        let arena = Arena::new(1 << 20).unwrap();
        let result = connection.received(&mut &stream[..], &arena, &mut out);
        assert!(matches!(result, Err(CloseReason::Frame(_))), "{stream:?}");
        assert!(out.is_empty());
    }
}

#[test]
fn http_and_rpc_alternate_and_close_is_honoured() {
    let mut node = Node::with_copyset();
    let mut connection = node.connection();
    let health = b"GET /health HTTP/1.1\r\n\r\n";
    let stream =
        [&health[..], health, &write(5, 4096), b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n", &write(6, 4096)];
    let sent = node.serve(&mut connection, &stream.concat());
    let text = String::from_utf8_lossy(&sent);
    assert_eq!(text.matches("HTTP/1.1 200 OK").count(), 3);
    assert!(text.ends_with("\r\n\r\nOK"), "nothing is served after the close");
    let at = sent.windows(4).position(|four| four == b"PRPC").unwrap();
    let end = sent.len() - text.rfind("HTTP/1.1").map(|at| text.len() - at).unwrap();
    assert_eq!(responses(&sent[at..end])[0].status(), 0);
    assert!(connection.is_finished() && !connection.may_receive());
}

#[test]
fn an_empty_http_request_is_answered_and_closed() {
    for stream in [&b"GET \r\n\r\n"[..], b"GET \r\n\r\nPRPC", b"POST \r\n\r\n", b"GET x\r\n\r\nGET / HTTP/1.1\r\n\r\n"]
    {
        for size in [1, stream.len()] {
            let mut node = Node::with_copyset();
            let mut connection = node.connection();
            let sent: Vec<u8> = stream.chunks(size).flat_map(|piece| node.serve(&mut connection, piece)).collect();
            assert!(sent.starts_with(b"HTTP/1.1 400 "), "{stream:?}");
            assert!(connection.is_finished());
        }
    }
}
