//! Mail of a shard into messages of the wire and back. Payloads move, they are never copied.
//!
//! raft-rs's form and the wire's hold the same (tested); what the wire has no place for is never set by our replicas:
//! a message that has it is not sent, so nothing is lost silently.

use crate::shard::mail::{PeerBody, PeerMail};
use bytes::Bytes;
use copyset::raft::eraftpb::{self, MessageType};
use proto::peer::{Body, Entry, EntryKind, Kind, Message, Raft, Snapshot};
use raftlog::CopysetId;

/// Why mail cannot travel.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConvertError {
    /// A kind that stays inside a process.
    #[error("messages of kind {0:?} do not travel")]
    Kind(MessageType),
    /// Something the wire has no place for.
    #[error("a message holds what the wire has no place for")]
    Field,
    /// A membership change that cannot be read.
    #[error("a membership change: {0}")]
    Change(String),
}

const KINDS: [(MessageType, Kind); 10] = [
    (MessageType::MsgAppend, Kind::Append),
    (MessageType::MsgAppendResponse, Kind::AppendResponse),
    (MessageType::MsgRequestVote, Kind::RequestVote),
    (MessageType::MsgRequestVoteResponse, Kind::RequestVoteResponse),
    (MessageType::MsgSnapshot, Kind::Snapshot),
    (MessageType::MsgHeartbeat, Kind::Heartbeat),
    (MessageType::MsgHeartbeatResponse, Kind::HeartbeatResponse),
    (MessageType::MsgTimeoutNow, Kind::TimeoutNow),
    (MessageType::MsgRequestPreVote, Kind::PreVote),
    (MessageType::MsgRequestPreVoteResponse, Kind::PreVoteResponse),
];

/// For the wire.
///
/// # Errors
/// It cannot travel.
pub fn to_wire(mail: PeerMail) -> Result<Message, ConvertError> {
    let body = match mail.body {
        PeerBody::Raft(message) => Body::Raft(raft_to_wire(*message)?),
        PeerBody::Bulk { head, payload } => Body::Bulk { head, payload_len: payload.len() as u32, payload },
    };
    Ok(Message { copyset: mail.copyset.0, body })
}

fn raft_to_wire(mut message: eraftpb::Message) -> Result<Raft, ConvertError> {
    let sort = message.get_msg_type();
    let found = KINDS.iter().find(|(of, _)| *of == sort);
    let kind = found.map(|(_, kind)| *kind).ok_or(ConvertError::Kind(sort))?;
    if message.request_snapshot != 0 || message.priority != 0 {
        return Err(ConvertError::Field);
    }
    let snapshot = if kind == Kind::Snapshot {
        let snapshot = message.mut_snapshot();
        let data = std::mem::take(&mut snapshot.data);
        Some(Snapshot { index: snapshot.get_metadata().index, term: snapshot.get_metadata().term, data })
    } else {
        None
    };
    let entries = message.take_entries().into_iter().map(entry_to_wire).collect::<Result<_, _>>()?;
    Ok(Raft {
        kind,
        term: message.term,
        log_term: message.log_term,
        index: message.index,
        commit: message.commit,
        commit_term: message.commit_term,
        reject: message.reject,
        reject_hint: message.reject_hint,
        context: std::mem::take(&mut message.context),
        snapshot,
        entries,
    })
}

fn entry_to_wire(entry: eraftpb::Entry) -> Result<Entry, ConvertError> {
    let entry = copyset::entry_to_log(entry);
    let kind = match entry.kind {
        raftlog::EntryKind::Normal => EntryKind::Normal,
        raftlog::EntryKind::ConfChange => EntryKind::ConfChange,
    };
    let (term, index, context, payload) = (entry.term, entry.index, entry.context, entry.payload);
    Ok(Entry { term, index, kind, context, payload_len: payload.len() as u32, payload })
}

/// For a shard; `from` and `to` are those of the handshake.
///
/// # Errors
/// [`ConvertError::Change`].
pub fn from_wire(message: Message, from: u64, to: u64) -> Result<PeerMail, ConvertError> {
    let body = match message.body {
        Body::Raft(raft) => PeerBody::Raft(Box::new(raft_from_wire(raft, from, to)?)),
        Body::Bulk { head, payload, .. } => PeerBody::Bulk { head, payload },
    };
    Ok(PeerMail { copyset: CopysetId(message.copyset), from, to, body })
}

fn raft_from_wire(raft: Raft, from: u64, to: u64) -> Result<eraftpb::Message, ConvertError> {
    let mut message = eraftpb::Message { from, to, ..eraftpb::Message::default() };
    for (sort, kind) in KINDS {
        if kind == raft.kind {
            message.set_msg_type(sort);
        }
    }
    message.term = raft.term;
    message.log_term = raft.log_term;
    message.index = raft.index;
    message.commit = raft.commit;
    message.commit_term = raft.commit_term;
    message.reject = raft.reject;
    message.reject_hint = raft.reject_hint;
    message.context = raft.context;
    if let Some(Snapshot { index, term, data }) = raft.snapshot {
        let snapshot = message.mut_snapshot();
        snapshot.data = data;
        snapshot.mut_metadata().index = index;
        snapshot.mut_metadata().term = term;
    }
    let entries: Vec<_> = raft.entries.into_iter().map(entry_from_wire).collect::<Result<_, _>>()?;
    message.set_entries(entries.into());
    Ok(message)
}

fn entry_from_wire(entry: Entry) -> Result<eraftpb::Entry, ConvertError> {
    let kind = match entry.kind {
        EntryKind::Normal => raftlog::EntryKind::Normal,
        EntryKind::ConfChange => raftlog::EntryKind::ConfChange,
    };
    let Entry { term, index, context, payload, .. } = entry;
    let entry = raftlog::Entry { index, term, kind, context, payload };
    copyset::entry_from_log(entry).map_err(|why| ConvertError::Change(why.to_string()))
}

/// Whether the payload of an entry has the checksums its context begins with.
#[must_use]
pub fn crcs_match(context: &Bytes, crcs: &[u32]) -> bool {
    let (said, _) = context.as_chunks::<4>();
    said.len() >= crcs.len() && said.iter().zip(crcs).all(|(said, crc)| u32::from_le_bytes(*said) == *crc)
}

#[cfg(test)]
mod tests {
    use super::*;
    use copyset::raft::eraftpb::{ConfChangeSingle, ConfChangeType, ConfChangeV2, EntryType};
    use proptest::prelude::*;

    fn conf_change(index: u64, node: u64) -> eraftpb::Entry {
        let mut single = ConfChangeSingle::default();
        single.set_change_type(ConfChangeType::AddLearnerNode);
        single.set_node_id(node);
        let mut change = ConfChangeV2::default();
        change.mut_changes().push(single);
        let kind = raftlog::EntryKind::ConfChange;
        let context = copyset::encode_change(&change);
        copyset::entry_from_log(raftlog::Entry { index, term: 3, kind, context, payload: Bytes::new() }).unwrap()
    }

    fn entries(first: u64) -> impl Strategy<Value = Vec<eraftpb::Entry>> {
        let one = (0usize..3, proptest::collection::vec(any::<u8>(), 1..60), any::<bool>(), 1u64..);
        proptest::collection::vec(one, 0..6).prop_map(move |all| {
            let make = |(at, (blocks, mut header, change, node)): (usize, (usize, Vec<u8>, bool, u64))| {
                let index = first.saturating_add(at as u64);
                if change {
                    return conf_change(index, node);
                }
                let mut context = vec![at as u8; blocks * 4];
                context.append(&mut header);
                let mut entry = eraftpb::Entry { index, term: 3, ..eraftpb::Entry::default() };
                entry.set_entry_type(EntryType::EntryNormal);
                (entry.context, entry.data) = (context.into(), vec![7u8; blocks * 4096].into());
                entry
            };
            all.into_iter().enumerate().map(make).collect()
        })
    }

    proptest! {
        #[test]
        fn there_and_back_is_the_same(
            (kind, numbers, reject, context) in (0..KINDS.len(), any::<[u64; 6]>(), any::<bool>(), "[a-z]{0,9}"),
            entries in (1u64..1 << 60).prop_flat_map(entries),
        ) {
            let mut message = eraftpb::Message { from: 5, to: 6, ..eraftpb::Message::default() };
            message.set_msg_type(KINDS[kind].0);
            [message.term, message.log_term, message.index, message.commit, message.commit_term, message.reject_hint]
                = numbers;
            (message.reject, message.context) = (reject, context.into());
            if KINDS[kind].1 == Kind::Snapshot {
                message.mut_snapshot().data = Bytes::from_static(b"configuration");
                message.mut_snapshot().mut_metadata().index = numbers[0];
                message.mut_snapshot().mut_metadata().term = numbers[1];
            }
            message.set_entries(entries.into());
            let mail = PeerMail { copyset: CopysetId(9), from: 5, to: 6, body: PeerBody::Raft(Box::new(message)) };
            let wire = to_wire(mail.clone()).unwrap();
            let back = from_wire(wire, 5, 6).unwrap();
            prop_assert_eq!(format!("{back:?}"), format!("{mail:?}"));
            let (PeerBody::Raft(there), PeerBody::Raft(here)) = (&mail.body, &back.body) else { panic!() };
            for (a, b) in there.get_entries().iter().zip(here.get_entries()) {
                let shared = a.data.as_ptr() == b.data.as_ptr();
                prop_assert!(shared || a.get_entry_type() != EntryType::EntryNormal || a.data.is_empty(), "a copy was made");
            }
        }
    }

    #[test]
    fn what_the_wire_has_no_place_for_is_not_sent() {
        let mail = |message: eraftpb::Message| {
            let body = PeerBody::Raft(Box::new(message));
            to_wire(PeerMail { copyset: CopysetId(9), from: 5, to: 6, body })
        };
        let mut message = eraftpb::Message::default();
        message.set_msg_type(MessageType::MsgPropose);
        assert_eq!(mail(message.clone()), Err(ConvertError::Kind(MessageType::MsgPropose)));
        message.set_msg_type(MessageType::MsgAppend);
        assert!(mail(message.clone()).is_ok());
        message.priority = 1;
        assert_eq!(mail(message), Err(ConvertError::Field));
    }

    #[test]
    fn checksums_are_compared_one_by_one() {
        let context = Bytes::from_static(&[1, 0, 0, 0, 2, 0, 0, 0, 99]);
        assert!(crcs_match(&context, &[1, 2]) && crcs_match(&context, &[]));
        assert!(!crcs_match(&context, &[1, 3]) && !crcs_match(&context, &[1, 2, 99]));
    }
}
