//! `chunkserver.jsonl`: what original C++ chunkservers answered, asked again of the running server, in the same order.
//!
//! The recording has three peers and the leader was the third; here one server is the sole peer. Every case of an
//! operation that exists must get the same error code, the same fields and the same attachment. What differs stands in
//! [`difference`], case by case.

use super::client::Client;
use super::harness::{Lab, MIB, Setup};
use super::wire::{Message, Response, Value, request, responses};

#[derive(Debug, PartialEq, Eq)]
enum Difference {
    /// Compared in full, but for appliedIndex, of which only the presence counts.
    None,
    /// These fields of the response message are left out of the comparison.
    Fields(&'static [u64]),
    /// The operation does not exist yet: FAILURE_UNKNOWN.
    Absent,
    /// Not sent: it cannot be asked of a sole peer.
    NotSent,
    /// This status instead: an earlier case is of an operation that does not exist yet.
    Status(u64),
}

fn difference(line: usize, name: &str, peer: u64) -> Difference {
    use Difference::{Absent, Fields, None, NotSent, Status};
    match (line, name, peer) {
        // The second and third server's share in creating the copyset.
        (_, "create copyset", 1 | 2) => NotSent,
        // Followers; there is none.
        (_, "copyset status", 0 | 1) | (_, "write to a follower", _) => NotSent,
        // Term, indexes and epoch count elections and entries of another history.
        (_, "copyset status", _) => Fields(&[6, 7, 8, 12, 13, 14, 15]),
        // The hash of C++ covers its file headers; we answer without one.
        (_, "copyset status with hash", _) => Fields(&[6, 7, 8, 12, 13, 14, 15, 16]),
        // Likewise: ours is of the data alone.
        (_, "chunk hash (C++ includes the metapage)", _) => Fields(&[2]),
        // Chunk snapshots.
        (_, "write with higher sn makes a snapshot", _) => Absent,
        (_, "read snapshot sn 1" | "read snapshot sn 2 (current)", _) => Absent,
        (_, "delete snapshot, backward correctedSn" | "delete snapshot" | "correct sn to 3", _) => Absent,
        // The versions that those would have left.
        (31 | 37 | 39, "chunk info", _) => Fields(&[3]),
        // It is backward only behind that snapshot: here it is the chunk's current version.
        (_, "write with backward sn", _) => Status(0),
        // Clones.
        (_, "create clone" | "create clone, other location", _) => Absent,
        // (An ordinary chunk is written instead of a clone, and the next case reads it.)
        (_, "delete snapshot of a clone", _) => Absent,
        // It passes the fence, and then needs a snapshot; admission.rs has fences without.
        (_, "write with epoch 5", _) => Absent,
        _ => None,
    }
}

/// The original's addresses in a message: replaced by ours wherever they stand alone.
fn own_addresses(response: &mut Response, own: &str) {
    let theirs = Message::default().bytes(3, b"127.0.0.1:8402:0").0;
    for value in response.message.values_mut().flatten() {
        if *value == Value::Bytes(theirs.clone()) {
            *value = Value::Bytes(Message::default().bytes(3, own.as_bytes()).0);
        }
    }
}

/// appliedIndex: both there or neither. Error texts are free.
fn normal(mut response: Response, method: &str) -> Response {
    if matches!(method, "WriteChunk" | "ReadChunk" | "DeleteChunk")
        && let Some(values) = response.message.get_mut(&3)
    {
        *values = vec![Value::Int(1)];
    }
    response.error_text.clear();
    response
}

fn hex(text: &str) -> Vec<u8> {
    text.as_bytes().chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}

fn create(cid: u64, peer: &str) -> Vec<u8> {
    let peer = Message::default().bytes(3, peer.as_bytes());
    let entry = Message::default().int(1, 1).int(2, 701).bytes(3, &peer.0);
    let message = Message::default().bytes(1, &entry.0);
    request("curve.chunkserver.CopysetService", "CreateCopysetNode2", cid, &message, &[])
}

#[test]
fn the_originals_answers() {
    // A chunk of the original is 16 MiB; cases at its end count on it.
    let setup = Setup { size: 320 * MIB, chunk: 16 * MIB, log: 64 * MIB, buffers: 64 * MIB, ..Setup::default() };
    let lab = Lab::new(setup);
    let server = lab.start();
    let mut client: Client = server.client();
    let cases = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/chunkserver.jsonl")).unwrap();
    let (mut compared, mut absent, mut not_sent) = (0, 0, 0);
    let mut wrong = Vec::new();
    for (line, json) in cases.lines().enumerate() {
        let case: serde_json::Value = serde_json::from_str(json).unwrap();
        let field = |name: &str| case[name].as_str().unwrap().to_owned();
        let (name, method) = (field("name"), field("method"));
        let difference = difference(line, &name, case["peer"].as_u64().unwrap());
        if difference == Difference::NotSent {
            not_sent += 1;
            continue;
        }
        let mut expected = normal(responses(&hex(&field("response"))).remove(0), &method);
        own_addresses(&mut expected, &lab.peer());
        let frame =
            if method == "CreateCopysetNode2" { create(expected.cid, &lab.peer()) } else { hex(&field("request")) };
        client.send(&frame);
        let mut seen = normal(client.receive(), &method);
        if method == "CreateCopysetNode2" {
            lab.wait_led();
        }
        match difference {
            Difference::Fields(ignored) => {
                seen.message.retain(|number, _| !ignored.contains(number));
                expected.message.retain(|number, _| !ignored.contains(number));
            }
            Difference::Absent => {
                absent += 1;
                if (seen.cid, seen.status(), seen.attachment.len()) != (expected.cid, 8, 0) {
                    wrong.push(format!("{line} {name}: {seen:?}, not FAILURE_UNKNOWN"));
                }
                continue;
            }
            Difference::Status(status) => expected.message.insert(1, vec![Value::Int(status)]).map_or((), drop),
            Difference::None | Difference::NotSent => {}
        }
        compared += 1;
        if seen != expected {
            wrong.push(format!("{line} {name}:\n  seen     {seen:?}\n  expected {expected:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!((compared, absent, not_sent), (45, 10, 5));
}
