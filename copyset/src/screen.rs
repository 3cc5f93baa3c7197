//! What a peer's message must fulfil before raft-rs sees it.
//!
//! raft-rs trusts its peers and ends the process over messages that no correct peer sends (a commit beyond the log,
//! entries that leave a gap). Such a message is refused here; a correct group loses nothing by a lost message.

use crate::entry::read_change;
use raft::eraftpb::{EntryType, Message, MessageType};

/// Why a message was not stepped.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StepError {
    /// Not to this replica, from nobody or from itself.
    #[error("message from {from} to {to} is not for this replica")]
    Address {
        /// Sender.
        from: u64,
        /// Addressee.
        to: u64,
    },
    /// A kind that does not travel between our replicas (proposals are redirected, not forwarded), or not yet.
    #[error("messages of kind {0:?} are not taken from peers")]
    Kind(MessageType),
    /// No term.
    #[error("message without a term")]
    NoTerm,
    /// The leader has committed what this replica's log does not hold: entries it acknowledged are lost.
    #[error("the leader has committed {commit} here, but the log ends at {last}: acknowledged entries are lost")]
    Lost {
        /// Leader's word.
        commit: u64,
        /// Own last index.
        last: u64,
    },
    /// Entries that do not follow each other, or from where they claim to.
    #[error("entries after {index} are malformed")]
    Entries {
        /// Index before them.
        index: u64,
    },
    /// An acknowledgement of entries that were never sent.
    #[error("acknowledgement of {index}, but the log ends at {last}")]
    Acknowledged {
        /// What it acknowledges.
        index: u64,
        /// Own last index.
        last: u64,
    },
    /// raft-rs refuses it.
    #[error("raft refuses the message: {0}")]
    Raft(String),
}

/// Checks a message for replica `me`, whose log ends at `last`.
pub(crate) fn check(message: &Message, me: u64, last: u64) -> Result<(), StepError> {
    let &Message { from, to, term, index, .. } = message;
    if to != me || from == me || from == 0 {
        return Err(StepError::Address { from, to });
    }
    if term == 0 {
        return Err(StepError::NoTerm);
    }
    match message.get_msg_type() {
        MessageType::MsgAppend => check_entries(message),
        MessageType::MsgHeartbeat if message.commit > last => Err(StepError::Lost { commit: message.commit, last }),
        MessageType::MsgAppendResponse if index > last => Err(StepError::Acknowledged { index, last }),
        MessageType::MsgHeartbeat
        | MessageType::MsgHeartbeatResponse
        | MessageType::MsgAppendResponse
        | MessageType::MsgRequestVote
        | MessageType::MsgRequestVoteResponse
        | MessageType::MsgRequestPreVote
        | MessageType::MsgRequestPreVoteResponse
        | MessageType::MsgTimeoutNow => Ok(()),
        kind => Err(StepError::Kind(kind)),
    }
}

fn check_entries(message: &Message) -> Result<(), StepError> {
    let malformed = StepError::Entries { index: message.index };
    // Term 0 belongs to index 0 only; elsewhere raft-rs would take it for "beyond my log" and call it a match.
    if (message.log_term == 0) != (message.index == 0) || message.log_term > message.term {
        return Err(malformed);
    }
    let (mut index, mut term) = (message.index, message.log_term);
    for entry in message.get_entries() {
        let follows = index.checked_add(1) == Some(entry.index) && entry.index < u64::MAX;
        let readable = entry.get_entry_type() == EntryType::EntryNormal || read_change(entry).is_some();
        if !follows || !readable || entry.term < term.max(1) || entry.term > message.term {
            return Err(malformed);
        }
        (index, term) = (entry.index, entry.term);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use raft::eraftpb::Entry;

    fn message(kind: MessageType) -> Message {
        let mut message = Message::default();
        message.set_msg_type(kind);
        (message.from, message.to, message.term) = (2, 1, 5);
        message
    }

    fn append(index: u64, log_term: u64, entries: &[(u64, u64)]) -> Message {
        let mut message = message(MessageType::MsgAppend);
        (message.index, message.log_term) = (index, log_term);
        for &(index, term) in entries {
            let mut entry = Entry::default();
            (entry.index, entry.term) = (index, term);
            message.mut_entries().push(entry);
        }
        message
    }

    #[test]
    fn takes_what_correct_peers_send() {
        assert_eq!(check(&append(0, 0, &[(1, 1), (2, 5)]), 1, 0), Ok(()));
        assert_eq!(check(&append(7, 3, &[]), 1, 3), Ok(()));
        let mut heartbeat = message(MessageType::MsgHeartbeat);
        heartbeat.commit = 3;
        assert_eq!(check(&heartbeat, 1, 3), Ok(()));
        assert_eq!(check(&heartbeat, 1, 2), Err(StepError::Lost { commit: 3, last: 2 }));
    }

    #[test]
    fn refuses_what_would_end_the_process() {
        let malformed = [
            append(7, 0, &[(8, 5)]),
            append(0, 3, &[(1, 5)]),
            append(7, 6, &[]),
            append(7, 3, &[(9, 5)]),
            append(7, 3, &[(8, 2)]),
            append(7, 3, &[(8, 6)]),
            append(7, 3, &[(8, 5), (8, 5)]),
            append(0, 0, &[(1, 0)]),
            append(u64::MAX - 1, 3, &[(u64::MAX, 5)]),
        ];
        for message in malformed {
            let refused = check(&message, 1, 100);
            assert_eq!(refused, Err(StepError::Entries { index: message.index }), "{message:?}");
        }
        let mut ack = message(MessageType::MsgAppendResponse);
        ack.index = 4;
        assert_eq!(check(&ack, 1, 3), Err(StepError::Acknowledged { index: 4, last: 3 }));
    }

    #[test]
    fn refuses_strangers_and_local_kinds() {
        assert_eq!(check(&message(MessageType::MsgHeartbeat), 3, 0), Err(StepError::Address { from: 2, to: 1 }));
        for kind in [MessageType::MsgPropose, MessageType::MsgHup, MessageType::MsgSnapshot, MessageType::MsgReadIndex]
        {
            assert_eq!(check(&message(kind), 1, 0), Err(StepError::Kind(kind)));
        }
        let mut local = message(MessageType::MsgHeartbeat);
        local.term = 0;
        assert_eq!(check(&local, 1, 0), Err(StepError::NoTerm));
    }
}
