//! `chunkserver.jsonl`: what original C++ chunkservers answered, case by case. Every case of an operation that exists
//! must get the same error code, the same fields and the same attachment; each exception stands in [`difference`].

use super::node::Node;
use super::wire::{Response, Value, responses};
use raftlog::CopysetId;

#[derive(Debug, PartialEq, Eq)]
enum Difference {
    /// Compared in full.
    None,
    /// The operation does not exist yet: its answer is FAILURE_UNKNOWN. Then the case's effect is put in by hand.
    Absent,
    /// These fields are left out of the comparison.
    Fields(&'static [u64]),
}

fn difference(line: usize, name: &str) -> Difference {
    match (line, name) {
        // The hash of C++ covers its file headers; we answer without one (service/copyset.rs).
        (_, "copyset status with hash") => Difference::Fields(&[16]),
        // Likewise: ours is of the data alone.
        (_, "chunk hash (C++ includes the metapage)") => Difference::Fields(&[2]),
        // We name the leader, as clients may expect of any REDIRECTED; the original does in GetChunkInfo only.
        (_, "write to a follower") => Difference::Fields(&[2]),
        // Chunk snapshots and clones.
        (_, "write with higher sn makes a snapshot") => Difference::Absent,
        (31, "chunk info") => Difference::Fields(&[3]),
        (_, "read snapshot sn 1" | "read snapshot sn 2 (current)") => Difference::Absent,
        (_, "delete snapshot, backward correctedSn" | "delete snapshot" | "correct sn to 3") => Difference::Absent,
        (_, "create clone" | "create clone, other location") => Difference::Absent,
        // Answered with the same status, but nothing reached apply.
        (_, "delete snapshot of a clone") => Difference::Fields(&[3]),
        // Refused before it is proposed, so there is no index.
        (_, "write with backward sn") => Difference::Fields(&[3]),
        _ => Difference::None,
    }
}

/// What the original's operation would have done to the chunk, where the fake shard has no such operation.
fn effect(node: &mut Node, name: &str, attachment: &[u8]) {
    const CHUNK: (CopysetId, u64) = (CopysetId::new(1, 701), 900_001);
    let Some(chunk) = node.chunks.get_mut(&CHUNK) else { return };
    match name {
        "write with higher sn makes a snapshot" => {
            chunk.sn = 2;
            chunk.blocks.insert(0, attachment.to_vec());
        }
        "correct sn to 3" => chunk.sn = 3,
        _ => {}
    }
}

fn hex(text: &str) -> Vec<u8> {
    text.as_bytes().chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}

/// appliedIndex of two runs: both there or neither.
fn without_numbers(mut response: Response, method: &str) -> Response {
    if matches!(method, "WriteChunk" | "ReadChunk" | "DeleteChunk")
        && let Some(values) = response.message.get_mut(&3)
    {
        *values = vec![Value::Int(1)];
    }
    response.error_text.clear();
    response
}

#[test]
fn the_originals_answers() {
    let mut nodes: Vec<Node> = (8400..8403).map(|port| Node::new(port, 8402)).collect();
    let mut connections: Vec<_> = nodes.iter().map(Node::connection).collect();
    let (mut compared, mut absent) = (0, 0);
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/chunkserver.jsonl")).unwrap();
    for (line, json) in text.lines().enumerate() {
        let case: serde_json::Value = serde_json::from_str(json).unwrap();
        let field = |name: &str| case[name].as_str().unwrap().to_owned();
        let (name, method) = (field("name"), field("method"));
        let peer = case["peer"].as_u64().unwrap() as usize;
        let (request, expected) = (hex(&field("request")), responses(&hex(&field("response"))));
        // In two pieces, at another place for every case.
        let (first, second) = request.split_at(line * 7 % request.len());
        let mut sent = nodes[peer].serve(&mut connections[peer], first);
        sent.extend(nodes[peer].serve(&mut connections[peer], second));
        let seen = responses(&sent);
        assert_eq!((seen.len(), expected.len()), (1, 1), "{line} {name}");
        let mut seen = without_numbers(seen[0].clone(), &method);
        let mut expected = without_numbers(expected[0].clone(), &method);
        match difference(line, &name) {
            Difference::None => compared += 1,
            Difference::Fields(ignored) => {
                seen.message.retain(|number, _| !ignored.contains(number));
                expected.message.retain(|number, _| !ignored.contains(number));
                compared += 1;
            }
            Difference::Absent => {
                assert_eq!((seen.cid, seen.status()), (expected.cid, 8), "{line} {name}");
                absent += 1;
                effect(&mut nodes[peer], &name, &request[request.len().saturating_sub(4096)..]);
                continue;
            }
        }
        assert_eq!(seen, expected, "{line} {name}");
    }
    assert_eq!((compared, absent), (52, 8));
    for (node, connection) in nodes.iter().zip(&connections) {
        assert!(connection.is_idle());
        assert_eq!((connection.held_bytes(), node.ctx.shared().inflight()), (0, 0));
        assert_eq!(node.arena.free_bytes(), node.arena.size(), "every payload buffer came back");
    }
}
