//! A membership change as bytes of our own, for log records and the peer wire.
//!
//! raft-rs keeps a change as a protobuf message inside `Entry.data`. Those bytes stay inside the process: what is
//! stored or sent is the format below, so nothing from a disk or a socket reaches rust-protobuf's parser.
//!
//! Format owned (little-endian):
//! ```text
//! | version u8 = 1 | transition u8 | count u16 | count x { type u8, node u64 } |
//! ```
//! transition: 0 auto, 1 implicit, 2 explicit. type: 0 add voter, 1 remove, 2 add learner. No changes + auto = leave
//! the joint stage.

use bytes::{BufMut, Bytes, BytesMut};
use raft::eraftpb::{ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2};

const VERSION: u8 = 1;
const HEAD: usize = 4;
const SINGLE: usize = 9;
/// Most changes in one.
pub(crate) const CHANGES_MAX: usize = 64;

/// Why bytes are no membership change.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// Written by a newer program, or rotten.
    #[error("membership change has unknown version {0}")]
    Version(u8),
    /// Unknown transition or type.
    #[error("membership change has unknown code {0}")]
    Code(u8),
    /// Length does not fit the count.
    #[error("membership change of {0} bytes is cut short, too long or too big")]
    Length(usize),
}

/// Bytes of `change`. Its context is not kept: nothing of ours uses it.
#[must_use]
pub fn encode_change(change: &ConfChangeV2) -> Bytes {
    let singles = change.get_changes();
    assert!(singles.len() <= CHANGES_MAX, "{} membership changes at once", singles.len());
    let mut out = BytesMut::with_capacity(HEAD + SINGLE * singles.len());
    out.put_u8(VERSION);
    out.put_u8(match change.get_transition() {
        ConfChangeTransition::Auto => 0,
        ConfChangeTransition::Implicit => 1,
        ConfChangeTransition::Explicit => 2,
    });
    out.put_u16_le(singles.len() as u16);
    for single in singles {
        out.put_u8(match single.get_change_type() {
            ConfChangeType::AddNode => 0,
            ConfChangeType::RemoveNode => 1,
            ConfChangeType::AddLearnerNode => 2,
        });
        out.put_u64_le(single.get_node_id());
    }
    out.freeze()
}

/// Reads what [`encode_change`] wrote; any bytes are safe.
pub fn decode_change(bytes: &[u8]) -> Result<ConfChangeV2, ChangeError> {
    let short = || ChangeError::Length(bytes.len());
    let (&[version, transition, low, high], rest) = bytes.split_first_chunk::<HEAD>().ok_or_else(short)?;
    if version != VERSION {
        return Err(ChangeError::Version(version));
    }
    let mut change = ConfChangeV2::default();
    change.set_transition(match transition {
        0 => ConfChangeTransition::Auto,
        1 => ConfChangeTransition::Implicit,
        2 => ConfChangeTransition::Explicit,
        code => return Err(ChangeError::Code(code)),
    });
    let count = usize::from(u16::from_le_bytes([low, high]));
    if count > CHANGES_MAX || rest.len() != count * SINGLE {
        return Err(short());
    }
    for [kind, node @ ..] in rest.as_chunks::<SINGLE>().0 {
        let mut single = ConfChangeSingle::default();
        single.set_change_type(match kind {
            0 => ConfChangeType::AddNode,
            1 => ConfChangeType::RemoveNode,
            2 => ConfChangeType::AddLearnerNode,
            &code => return Err(ChangeError::Code(code)),
        });
        single.set_node_id(u64::from_le_bytes(*node));
        change.mut_changes().push(single);
    }
    Ok(change)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn golden_bytes() {
        let bytes = [1, 2, 2, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0];
        let change = decode_change(&bytes).unwrap();
        assert_eq!(change.get_transition(), ConfChangeTransition::Explicit);
        assert_eq!(change.get_changes()[0].get_node_id(), 7);
        assert_eq!(change.get_changes()[1].get_change_type(), ConfChangeType::RemoveNode);
        assert_eq!(change.get_changes()[1].get_node_id(), 256);
        assert_eq!(encode_change(&change), &bytes[..]);
        assert!(decode_change(&encode_change(&ConfChangeV2::default())).unwrap().leave_joint());
    }

    proptest! {
        #[test]
        fn any_bytes_are_safe(mut bytes in proptest::collection::vec(any::<u8>(), 0..40), plausible: bool) {
            if plausible && bytes.len() >= 13 {
                bytes.truncate(13);
                bytes[..4].copy_from_slice(&[1, 0, 1, 0]);
            }
            if let Ok(change) = decode_change(&bytes) {
                prop_assert_eq!(encode_change(&change), bytes);
            }
        }
    }
}
