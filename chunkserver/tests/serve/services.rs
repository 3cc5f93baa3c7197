//! Services at their edges: bad input, overload, fences, draining.

use super::node::{CHUNK_SIZE, Node, peer};
use super::wire::{CHUNK, Message, Response, Value, chunk, request, responses};
use chunkserver::metrics::{Counter, OpKind};
use chunkserver::rpc::Connection;
use chunkserver::service::Handled;
use chunkserver::shard::request::Outcome;
use raftlog::CopysetId;

const COPYSET: &str = "curve.chunkserver.CopysetService";

fn call(node: &mut Node, bytes: &[u8]) -> Response {
    let mut connection = node.connection();
    let sent = node.serve(&mut connection, bytes);
    let mut all = responses(&sent);
    assert_eq!(all.len(), 1);
    all.remove(0)
}

fn chunk_call(node: &mut Node, method: &str, message: &Message, attachment: &[u8]) -> Response {
    call(node, &request(CHUNK, method, 1, message, attachment))
}

#[test]
fn bad_sizes_propose_nothing() {
    let mut node = Node::with_copyset();
    let max = u64::from(CHUNK_SIZE);
    for (offset, size, attached) in [
        (0, 4096, 0),
        (0, 4096, 8192),
        (0, 8192, 4096),
        (0, 100, 100),
        (0, 4096, 100),
        (100, 4096, 4096),
        (max, 4096, 4096),
        (max - 4096, 8192, 8192),
        (0xffff_f000, 4096, 4096),
        (0, 0, 4096),
    ] {
        let seen = chunk_call(&mut node, "WriteChunk", &chunk(2, 9, offset, size, 1), &vec![1; attached]);
        assert_eq!((seen.status(), seen.int(3)), (4, None), "{offset} {size} {attached}");
    }
    let beyond = chunk_call(&mut node, "WriteChunk", &chunk(2, 9, 0, max + 4096, 1), &vec![1; max as usize + 4096]);
    assert_eq!(beyond.status(), 4, "larger than a chunk");
    assert!(node.chunks.is_empty());
    assert_eq!(node.arena.free_bytes(), node.arena.size());
    assert_eq!(node.ctx.shared().registry().op(OpKind::Write).errors, 11);
}

#[test]
fn zero_is_a_write_of_zeros() {
    let mut node = Node::with_copyset();
    let block = [vec![5u8; 4096], vec![6u8; 4096]].concat();
    assert_eq!(chunk_call(&mut node, "WriteChunk", &chunk(2, 9, 0, 8192, 1), &block).status(), 0);
    let zero = request("chunkserver.internal.ZeroService", "Zero", 1, &chunk(2, 9, 0, 4096, 1), &[]);
    assert_eq!(call(&mut node, &zero).status(), 0);
    let read = chunk_call(&mut node, "ReadChunk", &chunk(1, 9, 0, 8192, 0), &[]);
    assert_eq!(read.attachment, [vec![0u8; 4096], vec![6u8; 4096]].concat());
}

#[test]
fn overload_begins_above_the_limit() {
    let mut node = Node::with_copyset();
    let mut connection = node.connection();
    let read = request(CHUNK, "ReadChunk", 1, &chunk(1, 9, 0, 4096, 0), &[]);
    let begin = |node: &Node, connection: &mut Connection| {
        let mut out = Vec::new();
        connection.received(&mut read.as_slice(), &node.arena, &mut out).unwrap();
        node.begin(out.pop().unwrap())
    };
    let waiting: Vec<Handled> = (0..5000).map(|_| begin(&node, &mut connection)).collect();
    assert!(waiting.iter().all(|handled| matches!(handled, Handled::Shard { .. })));
    let Handled::Reply(out) = begin(&node, &mut connection) else { panic!("the 5001st is refused") };
    assert_eq!(responses(&out.head)[0].status(), 9);
    connection.push_reply(out);
    assert_eq!(node.ctx.shared().inflight(), 5000);
    for handled in waiting {
        let out = node.finish(handled, &mut connection);
        connection.push_reply(out);
    }
    assert_eq!((node.ctx.shared().inflight(), connection.requests(), connection.held_bytes()), (0, 0, 0));
    assert_eq!(node.ctx.shared().registry().total(Counter::Overloads), 1);
}

#[test]
fn a_stopping_server_sends_everybody_away() {
    let mut node = Node::with_copyset();
    let mut connection = node.connection();
    node.ctx.shared().drain();
    let read = request(CHUNK, "ReadChunk", 1, &chunk(1, 9, 0, 4096, 0), &[]);
    let unknown = request("NoSuch", "Foo", 2, &Message::default(), &[]);
    let sent = node.serve(&mut connection, &read);
    assert_eq!(responses(&sent)[0].error_code, 2003);
    assert!(connection.is_finished(), "C++ clients wait until it breaks");
    assert_eq!(call(&mut node, &unknown).error_code, 2003);
}

#[test]
fn every_outcome_has_its_status() {
    let mut node = Node::with_copyset();
    for (outcome, status) in [
        (Outcome::Success, 0),
        (Outcome::NotLeader, 1),
        (Outcome::DiskFail, 2),
        (Outcome::CrcFail, 3),
        (Outcome::Invalid, 4),
        (Outcome::NoSpace, 5),
        (Outcome::NoCopyset, 6),
        (Outcome::NoChunk, 7),
        (Outcome::Failed, 8),
        (Outcome::Overload, 9),
        (Outcome::Backward, 10),
        (Outcome::Exists, 11),
    ] {
        let (mut connection, mut out) = (node.connection(), Vec::new());
        let delete = request(CHUNK, "DeleteChunk", 1, &chunk(0, 9, 0, 0, 1), &[]);
        connection.received(&mut delete.as_slice(), &node.arena, &mut out).unwrap();
        let Handled::Shard { copyset, op, pending, .. } = node.begin(out.pop().unwrap()) else { panic!() };
        let mut reply = node.ask(copyset, op);
        reply.outcome = outcome;
        let Handled::Reply(out) = chunkserver::service::resume(&node.ctx, node.now, pending, reply) else { panic!() };
        assert_eq!(responses(&out.head)[0].status(), status, "{outcome:?}");
    }
}

#[test]
fn a_follower_names_the_leader() {
    let mut node = Node::new(8400, 8402);
    let entry = Message::default().int(1, 1).int(2, 701).bytes(3, &Message::default().bytes(3, b"127.0.0.1:8400:0").0);
    let create = request(COPYSET, "CreateCopysetNode2", 1, &Message::default().bytes(1, &entry.0), &[]);
    assert_eq!(call(&mut node, &create).status(), 0);
    let info = chunk_call(&mut node, "GetChunkInfo", &Message::default().int(1, 1).int(2, 701).int(3, 9), &[]);
    assert_eq!(info.status(), 1);
    assert_eq!(info.message[&2], [Value::Bytes(b"127.0.0.1:8402:0".to_vec())]);
    let read = chunk_call(&mut node, "ReadChunk", &chunk(1, 9, 0, 4096, 0), &[]);
    assert_eq!((read.status(), &read.message[&2]), (1, &vec![Value::Bytes(b"127.0.0.1:8402:0".to_vec())]));
    // What does not exist yet is refused in the original's order: leader before FAILURE_UNKNOWN.
    let recover = chunk_call(&mut node, "RecoverChunk", &chunk(6, 9, 0, 4096, 0), &[]);
    assert_eq!(recover.status(), 1);
}

#[test]
fn create_many_stops_at_the_first_that_exists() {
    let mut node = Node::with_copyset();
    let entry = |id: u64, address: &str| {
        let peer = Message::default().bytes(3, address.as_bytes());
        Message::default().int(1, 1).int(2, id).bytes(3, &peer.0).0
    };
    let own = "127.0.0.1:8402:0";
    let many = Message::default().bytes(1, &entry(1, own)).bytes(1, &entry(701, own)).bytes(1, &entry(2, own));
    assert_eq!(call(&mut node, &request(COPYSET, "CreateCopysetNode2", 1, &many, &[])).status(), 1);
    let known = |node: &Node, id| node.copysets.contains_key(&CopysetId::new(1, id));
    assert_eq!((known(&node, 1), known(&node, 2)), (true, false));
    let bad = Message::default().bytes(1, &entry(3, own)).bytes(1, &entry(4, "nonsense"));
    assert_eq!(call(&mut node, &request(COPYSET, "CreateCopysetNode2", 1, &bad, &[])).status(), 3);
    assert_eq!((known(&node, 3), known(&node, 4)), (true, false));
    let single = |id, address: &str| Message::default().int(1, 1).int(2, id).bytes(3, address.as_bytes());
    let create = |message: &Message| request(COPYSET, "CreateCopysetNode", 1, message, &[]);
    assert_eq!(call(&mut node, &create(&single(5, "nonsense"))).error_code, 22);
    assert_eq!(call(&mut node, &create(&single(5, own))).status(), 0);
    assert_eq!(call(&mut node, &create(&single(5, own))).status(), 1);
    let broken = |message: &Message| request(COPYSET, "DeleteBrokenCopyset", 1, message, &[]);
    assert_eq!(call(&mut node, &broken(&single(5, own))).status(), 4);
    assert_eq!(call(&mut node, &broken(&single(6, own))).status(), 3);
}

#[test]
fn get_leader_fails_as_an_rpc() {
    let mut node = Node::with_copyset();
    let ask = |id: u64| {
        let message = Message::default().int(1, 1).int(2, id);
        request("curve.chunkserver.CliService2", "GetLeader", 1, &message, &[])
    };
    let missing = call(&mut node, &ask(9));
    assert_eq!(missing.error_code, 2);
    assert!(missing.error_text.ends_with("No nodes in group 4294967305"), "{}", missing.error_text);
    node.copysets.get_mut(&CopysetId::new(1, 701)).unwrap().leader = 0;
    assert_eq!(call(&mut node, &ask(701)).error_code, 11);
    node.copysets.get_mut(&CopysetId::new(1, 701)).unwrap().leader = peer(8402);
    let v1 = request("CliService", "get_leader", 1, &Message::default().int(1, 1).int(2, 701), &[]);
    assert_eq!(call(&mut node, &v1).message[&1], [Value::Bytes(b"127.0.0.1:8402:0".to_vec())]);
}

#[test]
fn members_are_changed_as_curve_s_tools_do() {
    let mut node = Node::with_copyset();
    let peer = |port: u16| Message::default().bytes(3, format!("127.0.0.1:{port}:0").as_bytes()).0;
    let group = |id: u64| Message::default().int(1, 1).int(2, id);
    let ask = |method: &str, message: &Message| request("curve.chunkserver.CliService2", method, 1, message, &[]);
    let leader = |id| group(id).bytes(3, &peer(8402));
    // The answer: members before and after.
    let added = call(&mut node, &ask("AddPeer", &leader(701).bytes(4, &peer(8403))));
    assert_eq!((added.error_code, added.message[&1].len(), added.message[&2].len()), (0, 1, 2));
    assert_eq!(added.message[&2][1], Value::Bytes(peer(8403)));
    let removed = call(&mut node, &ask("RemovePeer", &leader(701).bytes(4, &peer(8403))));
    assert_eq!((removed.message[&1].len(), removed.message[&2].len()), (2, 1));
    let changed = call(&mut node, &ask("ChangePeers", &leader(701).bytes(4, &peer(8402)).bytes(4, &peer(8404))));
    assert_eq!((changed.message[&1].len(), changed.message[&2].len()), (1, 2));
    // Errors are RPC errors: busy, not here, unparsable, another node's, unknown.
    assert_eq!(call(&mut node, &ask("TransferLeader", &leader(701).bytes(4, &peer(8404)))).error_code, 16);
    assert_eq!(call(&mut node, &ask("AddPeer", &leader(9).bytes(4, &peer(8403)))).error_code, 2);
    let elsewhere = group(701).bytes(3, &peer(8499)).bytes(4, &peer(8403));
    assert_eq!(call(&mut node, &ask("AddPeer", &elsewhere)).error_code, 2);
    let nonsense = Message::default().bytes(3, b"nonsense").0;
    assert_eq!(call(&mut node, &ask("AddPeer", &leader(701).bytes(4, &nonsense))).error_code, 22);
    // Forced on the replica that is asked: the old members do not matter, the new one must be that replica.
    let mut reset = |at: &Message| call(&mut node, &ask("ResetPeer", at)).error_code;
    let stray = leader(701).bytes(4, &nonsense).bytes(5, &peer(8402));
    let elsewhere = group(701).bytes(3, &peer(8499)).bytes(5, &peer(8402));
    let two = leader(701).bytes(5, &peer(8402)).bytes(5, &peer(8403));
    let alone = leader(701).bytes(5, &peer(8402));
    let codes = [&alone, &stray, &leader(701), &leader(701).bytes(5, &nonsense), &elsewhere, &two];
    assert_eq!(codes.map(&mut reset), [0, 0, 22, 22, 2, 22]);
    assert!(call(&mut node, &ask("ResetPeer", &two)).error_text.contains("the replica itself"));
    // Busy while it leads and a change is under way; out of service or without members it is not active; else it does
    // not matter who leads.
    for (state, code) in [(2, 16), (4, 0), (5, 1), (6, 1)] {
        node.copysets.get_mut(&CopysetId::new(1, 701)).unwrap().state = state;
        assert_eq!(call(&mut node, &ask("ResetPeer", &alone)).error_code, code, "state {state}");
    }
    node.copysets.get_mut(&CopysetId::new(1, 701)).unwrap().state = 1;
    assert_eq!(call(&mut node, &ask("Snapshot", &group(701))).error_code, 0);
    assert_eq!(call(&mut node, &ask("SnapshotAll", &Message::default())).error_code, 0);
    node.copysets.get_mut(&CopysetId::new(1, 701)).unwrap().state = 4;
    assert_eq!(call(&mut node, &ask("AddPeer", &leader(701).bytes(4, &peer(8403)))).error_code, 1);
    // The old service, by strings.
    node.copysets.get_mut(&CopysetId::new(1, 701)).unwrap().state = 1;
    let v1 = group(701).bytes(3, b"127.0.0.1:8402:0").bytes(4, b"127.0.0.1:8405:0");
    let added = call(&mut node, &request("CliService", "add_peer", 1, &v1, &[]));
    assert_eq!(added.message[&2][2], Value::Bytes(b"127.0.0.1:8405:0".to_vec()));
    let never = request("CliService", "snapshot", 1, &group(701), &[]);
    assert_eq!(call(&mut node, &never).error_code, 1002);
}

#[test]
fn raft_stat_is_an_rpc_too() {
    let mut node = Node::with_copyset();
    let stat = call(&mut node, &request("braft.raft_stat", "default_method", 1, &Message::default(), &[]));
    assert!(stat.attachment.starts_with(b"[4294967997]\r\npeer_id: 127.0.0.1:8402:0\r\nstate: LEADER\r\n"));
}
