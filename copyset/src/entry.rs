//! Log entries, between raft-rs's form and the log's.
//!
//! | raft-rs | log |
//! |---|---|
//! | normal: `data`, `context` | `payload` and `context`, the same buffers |
//! | conf change (v2): protobuf in `data` | `context` = [`crate::change`]'s bytes, no payload |

use crate::change::{ChangeError, decode_change, encode_change};
use bytes::Bytes;
use protobuf::Message as _;
use raft::eraftpb::{self, ConfChangeV2, EntryType};
use raftlog::{Entry, EntryKind};

/// For the log, and for the wire between peers.
#[must_use]
pub fn to_log(mut entry: eraftpb::Entry) -> Entry {
    let (index, term) = (entry.index, entry.term);
    match entry.get_entry_type() {
        EntryType::EntryNormal => Entry {
            index,
            term,
            kind: EntryKind::Normal,
            context: std::mem::take(&mut entry.context),
            payload: std::mem::take(&mut entry.data),
        },
        EntryType::EntryConfChange | EntryType::EntryConfChangeV2 => {
            let change = change_of(&entry);
            Entry { index, term, kind: EntryKind::ConfChange, context: encode_change(&change), payload: Bytes::new() }
        }
    }
}

/// For raft-rs.
///
/// # Panics
/// If a conf change in the log cannot be read: `restore` has read each of them before raft-rs exists.
pub(crate) fn to_raft(entry: Entry) -> eraftpb::Entry {
    let index = entry.index;
    from_log(entry).unwrap_or_else(|e| panic!("entry {index}: {e}"))
}

/// For raft-rs, from bytes that may come from anywhere.
pub fn from_log(entry: Entry) -> Result<eraftpb::Entry, ChangeError> {
    let mut out = eraftpb::Entry { index: entry.index, term: entry.term, ..eraftpb::Entry::default() };
    match entry.kind {
        EntryKind::Normal => {
            out.context = entry.context;
            out.data = entry.payload;
        }
        EntryKind::ConfChange => {
            out.set_entry_type(EntryType::EntryConfChangeV2);
            out.data = protobuf_of(&decode_change(&entry.context)?);
        }
    }
    Ok(out)
}

/// The change a conf change entry of raft-rs holds.
///
/// # Panics
/// If it cannot be read: it was written by this process, by raft-rs or by [`to_raft`].
pub(crate) fn change_of(entry: &eraftpb::Entry) -> ConfChangeV2 {
    read_change(entry).unwrap_or_else(|| panic!("entry {}: unreadable conf change", entry.index))
}

/// The same, for entries that may come from elsewhere. None of ours makes conf changes of version 1.
pub(crate) fn read_change(entry: &eraftpb::Entry) -> Option<ConfChangeV2> {
    if entry.get_entry_type() != EntryType::EntryConfChangeV2 {
        return None;
    }
    let mut change = ConfChangeV2::default();
    change.merge_from_bytes(&entry.data).ok()?;
    Some(change)
}

fn protobuf_of(change: &ConfChangeV2) -> Bytes {
    let bytes = change.write_to_bytes().unwrap_or_else(|e| panic!("a conf change always encodes: {e}"));
    bytes.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use raft::eraftpb::{ConfChangeSingle, ConfChangeType};

    #[test]
    fn normal_entries_share_their_buffers() {
        let mut entry = eraftpb::Entry::default();
        (entry.index, entry.term) = (5, 2);
        (entry.data, entry.context) = (Bytes::from(vec![7u8; 4096]), Bytes::from_static(b"context"));
        let logged = to_log(entry.clone());
        assert_eq!(logged.payload.as_ptr(), entry.data.as_ptr());
        assert_eq!(to_raft(logged), entry);
    }

    #[test]
    fn conf_changes_are_translated() {
        let mut single = ConfChangeSingle::default();
        single.set_change_type(ConfChangeType::AddLearnerNode);
        single.set_node_id(77);
        let mut change = ConfChangeV2::default();
        change.mut_changes().push(single);
        let mut entry = eraftpb::Entry { index: 9, ..eraftpb::Entry::default() };
        entry.set_entry_type(EntryType::EntryConfChangeV2);
        entry.data = change.write_to_bytes().unwrap().into();
        let logged = to_log(entry.clone());
        assert_eq!(logged.kind, EntryKind::ConfChange);
        assert!(logged.payload.is_empty());
        assert_eq!(change_of(&to_raft(logged)), change);
        entry.set_entry_type(EntryType::EntryConfChange);
        assert_eq!(read_change(&entry), None);
    }

    #[test]
    fn leaving_a_joint_stage_is_empty_as_raft_writes_it() {
        let mut entry = eraftpb::Entry::default();
        entry.set_entry_type(EntryType::EntryConfChangeV2);
        let logged = to_log(entry.clone());
        assert!(!logged.context.is_empty(), "only a leader's first entry is empty in the log");
        assert_eq!(to_raft(logged), entry);
    }
}
