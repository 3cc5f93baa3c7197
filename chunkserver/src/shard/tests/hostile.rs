//! Mail that no correct peer sends: refused, counted, and nothing changes.

use super::cluster::{Cluster, peer};
use super::world::Setup;
use crate::metrics::Counter;
use crate::shard::Effects;
use crate::shard::bulk::Bulk;
use crate::shard::entry::Header;
use crate::shard::mail::{PeerBody, PeerMail};
use crate::shard::request::{ChunkOp, CopysetStatus, Outcome};
use bytes::Bytes;
use copyset::raft::eraftpb::{Entry, Message, MessageType};
use raftlog::{BLOCK, CopysetId, crc32c};

const ID: CopysetId = CopysetId::new(1, 1);

fn raft(from: u64, to: u64, term: u64, kind: MessageType) -> Message {
    let mut message = Message::default();
    message.set_msg_type(kind);
    (message.from, message.to, message.term) = (from, to, term);
    message
}

/// An append of one write behind `last`, whose payload does or does not have the checksum it is sent with.
fn append(from: u64, to: u64, status: &CopysetStatus, crc: impl Fn(u32) -> u32) -> Message {
    let payload = Bytes::from(vec![7; BLOCK]);
    let crcs = [crc(crc32c(&payload))];
    let op = ChunkOp::Write { sn: 1, offset: 0, payload: payload.clone(), crcs: crcs.into_iter().collect() };
    let header = Header::of(1, &op).unwrap();
    let mut entry = Entry { index: status.last + 1, term: status.term, data: payload, ..Entry::default() };
    entry.context = [&crcs[0].to_le_bytes()[..], &header.encode()].concat().into();
    let mut message = raft(from, to, status.term, MessageType::MsgAppend);
    (message.index, message.log_term, message.commit) = (status.last, status.term, status.committed);
    message.set_entries(vec![entry].into());
    message
}

#[test]
fn mail_of_strangers_and_of_the_past_changes_nothing() {
    let mut c = Cluster::new(3, &Setup::default(), 1);
    c.create(ID, &[0, 1, 2]);
    let leader = c.wait_leader(ID);
    let slot = c.nodes[leader].write(ID, 1, 0, 1, 5).expect("a buffer");
    assert_eq!(c.answer(leader, slot).outcome, Outcome::Success);
    c.quiesce(&[ID]);
    let node = (leader + 1) % 3;
    let (me, lead, third) = (peer(node), peer(leader), peer((leader + 2) % 3));
    let before = c.status(node, ID).unwrap();
    let stranger = CopysetId::new(9, 9);
    let piece = |len: u32| {
        let info = Some(crate::chunk::ChunkInfo { chunk: 1, created: 3, applied: 9, sn: 1, corrected_sn: 0 });
        Bulk::Piece { index: 99, chunk: 1, offset: 0, len, info, crcs: vec![1; len as usize / BLOCK] }.encode()
    };
    let bulk = |head: Bytes, payload: usize| PeerBody::Bulk { head, payload: Bytes::from(vec![1; payload]) };
    let body = |message: Message| PeerBody::Raft(Box::new(message));
    let beat = MessageType::MsgHeartbeat;
    let mut far = raft(lead, me, before.term, beat);
    far.commit = before.last + 5;
    // What, and whether it must be counted as refused (a late message of the past is merely of no use).
    let mail: Vec<(&str, CopysetId, u64, u64, PeerBody, bool)> = vec![
        ("another copyset", stranger, lead, me, body(raft(lead, me, before.term, beat)), true),
        ("for another replica", ID, lead, third, body(raft(lead, third, before.term, beat)), true),
        ("a false sender", ID, lead, me, body(raft(third, me, before.term, beat)), true),
        ("who is no member", ID, 999, me, body(append(999, me, &before, |crc| crc)), true),
        ("a stale term", ID, third, me, body(raft(third, me, before.term - 1, beat)), false),
        (
            "a stale append",
            ID,
            third,
            me,
            body({
                let mut old = append(third, me, &before, |crc| crc);
                old.term = before.term - 1;
                old
            }),
            true,
        ),
        ("an entry with a bad checksum", ID, lead, me, body(append(lead, me, &before, |crc| crc ^ 1)), true),
        ("a commit beyond the log", ID, lead, me, body(far), true),
        ("raft's own kind", ID, lead, me, body(raft(lead, me, before.term, MessageType::MsgHup)), true),
        ("a bulk message of no kind", ID, lead, me, bulk(Bytes::from_static(&[1, 77, 0, 0]), 0), true),
        ("a bulk message of no version", ID, lead, me, bulk(Bytes::from_static(&[9, 1]), 0), true),
        ("a piece nobody asked for", ID, lead, me, bulk(piece(BLOCK as u32), BLOCK), false),
        (
            "a list nobody asked for",
            ID,
            lead,
            me,
            bulk(Bulk::List { index: 99, from: 0, more: false, chunks: Vec::new() }.encode(), 0),
            false,
        ),
    ];
    for (what, copyset, from, to, body, counted) in mail {
        let count = |c: &mut Cluster| c.nodes[node].shard().metrics.value(Counter::PeerRefused);
        let refused = count(&mut c);
        let mut out = Effects::default();
        let now = c.nodes[node].now;
        c.nodes[node].shard().observe(now);
        c.nodes[node].shard().peer_mail(PeerMail { copyset, from, to, body }, &mut out);
        assert!(out.ops.is_empty() && out.replies.is_empty(), "{what}");
        assert_eq!(count(&mut c) - refused, u64::from(counted), "{what}");
        c.nodes[node].turn();
        let after = c.status(node, ID).unwrap();
        assert_eq!(
            (after.term, after.last, after.committed, after.applied, after.chunks, after.leader),
            (before.term, before.last, before.committed, before.applied, before.chunks, before.leader),
            "{what}"
        );
    }
    c.quiesce(&[ID]);
    c.compare(ID, 2);
}
