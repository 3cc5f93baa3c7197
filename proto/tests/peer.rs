//! What our chunkservers say to each other: against a second implementation (`scripts/golden-frames`), against random
//! messages, and against bytes that are none.

mod common;

use std::fs;

use bytes::{Bytes, BytesMut};
use common::{frames, path, unhex};
use proptest::prelude::*;
use proto::peer::{Batch, BatchWriter, Body, Entry, EntryKind, Hello, Kind, Limits, Message, PeerError, Raft, SERVICE};
use proto::peer::{HELLO, HELLO_LEN, Snapshot, VERSION, WELCOME_LEN, Welcome};

const LIMITS: Limits = Limits { payload_max: 16 << 20, head_max: 64 << 10, context_max: 1024 };

/// Puts the attachment's bytes where they belong.
fn fill(messages: &mut [Message], mut attachment: Bytes) {
    for message in messages {
        let mut place = 0;
        while let Some((len, payload)) = message.payload_slot(place) {
            *payload = attachment.split_to(len as usize);
            place += 1;
        }
    }
    assert!(attachment.is_empty());
}

fn written(messages: Vec<Message>, correlation_id: i64) -> Vec<u8> {
    let mut writer = BatchWriter::default();
    messages.into_iter().for_each(|message| writer.push(message));
    let (mut out, bytes) = (BytesMut::new(), writer.payload_bytes());
    let payloads = writer.finish(&mut out, correlation_id);
    assert_eq!(payloads.iter().map(Bytes::len).sum::<usize>(), bytes);
    assert!(writer.is_empty() && writer.payload_bytes() == 0);
    payloads.iter().for_each(|payload| out.extend_from_slice(payload));
    out.to_vec()
}

#[test]
fn golden_frames_decode_to_their_values_and_re_encode_to_their_bytes() {
    let text = fs::read_to_string(path("golden/peer.txt")).unwrap();
    assert!(text.lines().count() >= 6);
    for line in text.lines() {
        let [kind, correlation_id, frame, printed] = line.split('\t').collect::<Vec<_>>()[..] else { panic!("{line}") };
        let (correlation_id, frame) = (correlation_id.parse::<i64>().unwrap(), unhex(frame));
        let [(meta, body, attachment)] = &frames(&frame, &[7, 1, 64])[..] else { panic!("not one frame") };
        assert_eq!(meta.correlation_id, correlation_id);
        match kind {
            "hello" => {
                assert_eq!(meta.names(), (SERVICE.as_bytes(), HELLO.as_bytes()));
                let hello = Hello::decode(body).unwrap();
                assert_eq!((format!("{hello:?}"), hello.encode()), (printed.into(), body.to_vec()));
                assert_eq!(body.len(), HELLO_LEN);
            }
            "welcome" => {
                let welcome = Welcome::decode(body).unwrap();
                assert_eq!((format!("{welcome:?}"), welcome.encode()), (printed.into(), body.to_vec()));
                assert_eq!(body.len(), WELCOME_LEN);
            }
            _ => {
                let mut messages = Batch::decode(body, attachment.len(), &LIMITS).unwrap();
                assert_eq!(format!("{messages:?}"), printed);
                fill(&mut messages, attachment.clone().into());
                assert_eq!(written(messages, correlation_id), frame);
            }
        }
    }
}

fn bytes(max: usize) -> impl Strategy<Value = Bytes> {
    proptest::collection::vec(any::<u8>(), 0..max).prop_map(Bytes::from)
}

fn payload(blocks: usize, byte: u8) -> Bytes {
    vec![byte; blocks * 4096].into()
}

fn entry() -> impl Strategy<Value = Entry> {
    (any::<[u64; 2]>(), any::<bool>(), 0usize..4, any::<u8>(), bytes(40)).prop_map(
        |([term, index], change, blocks, byte, header)| {
            let (kind, blocks) = if change { (EntryKind::ConfChange, 0) } else { (EntryKind::Normal, blocks) };
            let context = [vec![byte; blocks * 4], header.to_vec()].concat().into();
            let payload = payload(blocks, byte);
            Entry { term, index, kind, context, payload_len: payload.len() as u32, payload }
        },
    )
}

fn message() -> impl Strategy<Value = Message> {
    let snapshot = proptest::option::of((any::<[u64; 2]>(), bytes(50)));
    let snapshot = snapshot.prop_map(|s| s.map(|([index, term], data)| Snapshot { index, term, data }));
    let parts = (any::<[u64; 6]>(), any::<bool>(), bytes(30), snapshot, proptest::collection::vec(entry(), 0..4));
    let raft = (0..Kind::ALL.len(), parts).prop_map(|(kind, (numbers, reject, context, snapshot, entries))| {
        let [term, log_term, index, commit, commit_term, reject_hint] = numbers;
        let kind = Kind::ALL[kind];
        Body::Raft(Raft {
            kind,
            term,
            log_term,
            index,
            commit,
            commit_term,
            reject,
            reject_hint,
            context,
            snapshot,
            entries,
        })
    });
    let bulk = (bytes(100), 0usize..3, any::<u8>()).prop_map(|(head, blocks, byte)| {
        let payload = payload(blocks, byte);
        Body::Bulk { head, payload_len: payload.len() as u32, payload }
    });
    (any::<u64>(), prop_oneof![4 => raft, 1 => bulk]).prop_map(|(copyset, body)| Message { copyset, body })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn there_and_back_is_the_same(messages in proptest::collection::vec(message(), 0..6), id: i64) {
        let frame = written(messages.clone(), id);
        let [(_, body, attachment)] = &frames(&frame, &[4099])[..] else { panic!("not one frame") };
        let mut back = Batch::decode(body, attachment.len(), &LIMITS).unwrap();
        fill(&mut back, attachment.clone().into());
        prop_assert_eq!(back, messages);
    }

    #[test]
    fn cut_or_changed_bytes_are_an_error_or_another_batch(
        messages in proptest::collection::vec(message(), 1..4),
        at: prop::sample::Index,
        flip in 1u8..,
    ) {
        let frame = written(messages, 1);
        let [(_, body, attachment)] = &frames(&frame, &[])[..] else { panic!("not one frame") };
        let at = at.index(body.len());
        prop_assert!(Batch::decode(&body.slice(..at), attachment.len(), &LIMITS).is_err());
        prop_assert!(Batch::decode(body, attachment.len() + 4096, &LIMITS).is_err());
        let mut longer = body.to_vec();
        longer.push(0);
        prop_assert!(Batch::decode(&longer.into(), attachment.len(), &LIMITS).is_err());
        let mut changed = body.to_vec();
        changed[at] ^= flip;
        if let Ok(mut messages) = Batch::decode(&changed.clone().into(), attachment.len(), &LIMITS) {
            // What was taken says all there was: nothing of the change is lost.
            fill(&mut messages, attachment.clone().into());
            let frame = written(messages, 1);
            let [(_, again, _)] = &frames(&frame, &[])[..] else { panic!("not one frame") };
            prop_assert_eq!(&again[..], &changed[..]);
        }
    }

    #[test]
    fn random_bytes_do_no_harm(bytes in proptest::collection::vec(any::<u8>(), 0..300), attachment in 0usize..9000) {
        let _ = Batch::decode(&Bytes::from(bytes.clone()), attachment, &LIMITS);
        let _ = (Hello::decode(&bytes), Welcome::decode(&bytes));
    }
}

fn one(entry: Entry) -> Bytes {
    let raft = Raft {
        kind: Kind::Append,
        term: 1,
        log_term: 0,
        index: 0,
        commit: 0,
        commit_term: 0,
        reject: false,
        reject_hint: 0,
        context: Bytes::new(),
        snapshot: None,
        entries: vec![entry],
    };
    let frame = written(vec![Message { copyset: 1, body: Body::Raft(raft) }], 1);
    let [(_, body, _)] = &frames(&frame, &[])[..] else { panic!("not one frame") };
    body.clone()
}

#[test]
fn payloads_and_contexts_are_held_against_their_limits() {
    let entry = |blocks: usize, odd: usize, context: usize, kind| {
        let payload = Bytes::from(vec![0; blocks * 4096 + odd]);
        let context = vec![0; context].into();
        Entry { term: 1, index: 1, kind, context, payload_len: payload.len() as u32, payload }
    };
    let limits = Limits { payload_max: 8192, head_max: 10, context_max: 5 };
    let decode = |body: &Bytes, len| Batch::decode(body, len, &limits).map(drop);
    let normal = EntryKind::Normal;
    assert_eq!(decode(&one(entry(2, 0, 13, normal)), 8192), Ok(()));
    assert_eq!(decode(&one(entry(2, 0, 14, normal)), 8192), Err(PeerError::Length("entry context")));
    assert_eq!(decode(&one(entry(2, 0, 7, normal)), 8192), Err(PeerError::Payload(8192)), "a checksum is missing");
    assert_eq!(decode(&one(entry(3, 0, 12, normal)), 12288), Err(PeerError::Payload(12288)));
    assert_eq!(decode(&one(entry(1, 1, 12, normal)), 4097), Err(PeerError::Payload(4097)));
    assert_eq!(decode(&one(entry(1, 0, 5, EntryKind::ConfChange)), 4096), Err(PeerError::Payload(4096)));
    let said = PeerError::Attachment { said: 8192, found: 4096 };
    assert_eq!(decode(&one(entry(2, 0, 13, normal)), 4096), Err(said));
}

#[test]
fn counts_are_not_believed() {
    for (at, what) in [(4, "message count"), (8 + 64, "entry count")] {
        let body = one(Entry {
            term: 1,
            index: 1,
            kind: EntryKind::Normal,
            context: Bytes::new(),
            payload_len: 0,
            payload: Bytes::new(),
        });
        let mut changed = body.to_vec();
        changed[at..at + 4].fill(0xff);
        assert_eq!(Batch::decode(&changed.into(), 0, &LIMITS).map(drop), Err(PeerError::Length(what)));
    }
}

#[test]
fn every_version_can_be_told_that_it_is_another() {
    for other in [0, VERSION + 1, u16::MAX] {
        let mut bytes = vec![0xee; 4];
        bytes[..2].copy_from_slice(&other.to_le_bytes());
        assert_eq!(Hello::decode(&bytes), Err(PeerError::Version(other)));
        assert_eq!(Welcome::decode(&bytes), Err(PeerError::Version(other)));
        assert_eq!(Batch::decode(&bytes.into(), 0, &LIMITS).map(drop), Err(PeerError::Version(other)));
    }
}
