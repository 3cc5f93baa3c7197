//! The codec against frames recorded from the original C++ peers (`data/chunkserver.jsonl`, see the captures' README).
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use bench::codec::{self, ChunkRequest};
use serde_json::Value;

fn cases() -> Vec<Value> {
    include_str!("data/chunkserver.jsonl").lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn hex(case: &Value, key: &str) -> Vec<u8> {
    let text = case[key].as_str().unwrap();
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

/// Numbers a request was made of, found by walking it with the protobuf rules alone.
fn number(message: &[u8], field: u64) -> Option<u64> {
    codec::Fields::new(message).map_while(Result::ok).find_map(|(number, value)| match value {
        codec::Value::Number(value) if number == field => Some(value),
        _ => None,
    })
}

#[test]
fn requests_come_out_as_the_cpp_client_sends_them() {
    let mut compared = [0; 4];
    for case in cases() {
        let frame = hex(&case, "request");
        let Ok(Some((seen, _))) = codec::cut_reply(&frame) else { continue };
        let mut out = Vec::new();
        let kind = match case["method"].as_str().unwrap() {
            "ReadChunk" | "WriteChunk" if number(seen.message, 1).is_some() => {
                let get = |field| number(seen.message, field);
                let request = ChunkRequest {
                    write: get(1) == Some(2),
                    pool: get(2).unwrap() as u32,
                    copyset: get(3).unwrap() as u32,
                    chunk: get(4).unwrap(),
                    offset: get(6).unwrap() as u32,
                    size: get(7).unwrap() as u32,
                    sn: get(9),
                    file_id: get(18),
                    epoch: get(19),
                };
                if request.write && seen.attachment.len() != request.size as usize {
                    continue;
                }
                codec::put_chunk_request(&mut out, seen.cid, &request);
                out.extend_from_slice(seen.attachment);
                usize::from(request.write)
            }
            "CreateCopysetNode2" => {
                let peers: Vec<String> = (0..3).map(|index| format!("127.0.0.1:840{index}:0")).collect();
                codec::put_create_copyset(&mut out, seen.cid, 1, 701, &peers);
                2
            }
            "GetLeader" => {
                codec::put_get_leader(&mut out, seen.cid, 1, 701);
                3
            }
            _ => continue,
        };
        compared[kind] += 1;
        assert_eq!(out, frame, "{}", case["name"]);
    }
    assert!(compared[0] >= 8 && compared[1] >= 9 && compared[2] >= 6 && compared[3] >= 3, "{compared:?}");
}

#[test]
fn replies_of_the_cpp_server_are_understood() {
    let mut seen = 0;
    for case in cases() {
        let frame = hex(&case, "response");
        let (reply, len) = codec::cut_reply(&frame).unwrap().unwrap();
        assert_eq!(len, frame.len());
        let request = hex(&case, "request");
        assert_eq!(reply.cid, codec::cut_reply(&request).unwrap().unwrap().0.cid, "{}", case["name"]);
        for cut in 0..frame.len().min(64) {
            assert_eq!(codec::cut_reply(&frame[..cut]), Ok(None), "cut at {cut}");
        }
        let expect = |name: &str, status: u64| {
            if case["name"] == name {
                assert_eq!((reply.error_code, codec::status(reply.message)), (0, Ok(Some(status))), "{name}");
                return 1;
            }
            0
        };
        seen += expect("first write", 0) + expect("read absent chunk", 7) + expect("write to a follower", 1);
        seen += expect("read unaligned", 4) + expect("write unknown copyset", 6) + expect("write with backward sn", 10);
        match case["name"].as_str().unwrap() {
            "read written" => assert_eq!(reply.attachment[..4], [0x03, 0x0a, 0x11, 0x18]),
            "get leader" => assert_eq!(codec::leader(reply.message).unwrap().unwrap(), "127.0.0.1:8402:0"),
            "unknown method" => assert_eq!((reply.error_code, reply.message.len()), (1002, 0)),
            "unparsable request" => assert_eq!(reply.error_code, 1003),
            _ => continue,
        }
        seen += 1;
    }
    assert!(seen >= 11, "{seen} of the known cases");
}

#[test]
fn bytes_that_are_no_reply_are_refused_without_a_panic() {
    assert_eq!(codec::cut_reply(b"HTTP/1.1"), Err(codec::WireError::Magic));
    assert_eq!(codec::cut_reply(b"PRPC\xff\xff\xff\xff\0\0\0\x01"), Err(codec::WireError::Size));
    assert_eq!(codec::cut_reply(b"PRPC\0\0\0\x01\0\0\0\x02"), Err(codec::WireError::Size));
    assert_eq!(codec::cut_reply(b"PR"), Ok(None));
    let written = cases().into_iter().find(|case| case["name"] == "read written").unwrap();
    let frame = hex(&written, "response");
    for at in 0..32 {
        for bit in 0..8 {
            let mut broken = frame.clone();
            broken[at] ^= 1 << bit;
            if let Ok(Some((reply, _))) = codec::cut_reply(&broken) {
                let _ = (codec::status(reply.message), codec::leader(reply.message));
            }
        }
    }
}
