//! What a peer's message must fulfil before raft-rs sees it.
//!
//! raft-rs trusts its peers and ends the process over messages that no correct peer sends (a commit beyond the log,
//! entries that leave a gap). Such a message is refused here; a correct group loses nothing by a lost message.

use crate::change::CHANGES_MAX;
use crate::conf::ConfState;
use crate::entry::read_change;
use crate::restore::NUMBER_MAX;
use raft::StateRole;
use raft::eraftpb::{Entry, EntryType, Message, MessageType};
use raftlog::BLOCK;

/// Longest header of an operation.
pub const HEADER_MAX: usize = 1024;
/// Beside a round's number, in a heartbeat's context: the leader would become idle. In its echo: the follower has. Whoever knows no idle
/// copysets echoes the first as it came, and so is never taken for one that has.
pub(crate) const IDLE_ASKED: u64 = 1 << 63;
pub(crate) const IDLE_TAKEN: u64 = 1 << 62;

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
    /// A kind that does not travel between our replicas (proposals and reads are redirected, not forwarded).
    #[error("messages of kind {0:?} are not taken from peers")]
    Kind(MessageType),
    /// No term, or one that no number of elections leads to.
    #[error("message of term {0}")]
    Term(u64),
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
    /// A vote, an echo or a hand-over that nobody who could was asked for.
    #[error("an answer that was not asked for")]
    Unasked,
    /// Another replica leads this term.
    #[error("{from} claims to lead term {term}, which {leader} leads")]
    Usurper {
        /// Sender.
        from: u64,
        /// Who leads.
        leader: u64,
        /// Term.
        term: u64,
    },
    /// A context that is no round, or no notice of removal.
    #[error("the message's context is malformed")]
    Context,
    /// The offer of a raft snapshot contradicts itself.
    #[error("the offer of a snapshot is malformed")]
    Snapshot,
    /// This replica's log lost records; until it knows which, it promises nothing (rule 21).
    #[error("this replica lost records and takes part in nothing yet")]
    Suspect,
    /// A raft snapshot is becoming durable, or the group starts anew.
    #[error("the group is about to start anew")]
    Installing,
    /// raft-rs refuses it.
    #[error("raft refuses the message: {0}")]
    Raft(String),
}

/// What a check must know of the replica.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Receiver {
    pub(crate) me: u64,
    pub(crate) role: StateRole,
    pub(crate) term: u64,
    /// Of `term`, 0 if unknown.
    pub(crate) leader: u64,
    /// Last entry, and the last durable one.
    pub(crate) last: u64,
    pub(crate) durable: u64,
    /// Newest lease round started.
    pub(crate) round: u64,
    /// Longest payload its log takes.
    pub(crate) payload_max: usize,
}

/// Checks a message.
pub(crate) fn check(message: &Message, receiver: &Receiver) -> Result<(), StepError> {
    let &Message { from, to, term, index, .. } = message;
    let &Receiver { me, role, last, durable, payload_max, .. } = receiver;
    if to != me || from == me || from == 0 {
        return Err(StepError::Address { from, to });
    }
    // One more, and raft-rs could not count on.
    if term == 0 || term > NUMBER_MAX {
        return Err(StepError::Term(term));
    }
    check_leader(message, receiver)?;
    match message.get_msg_type() {
        MessageType::MsgAppend => check_entries(message, payload_max),
        MessageType::MsgHeartbeat if message.commit > last => Err(StepError::Lost { commit: message.commit, last }),
        MessageType::MsgHeartbeat => check_round(message, u64::MAX),
        MessageType::MsgHeartbeatResponse if role == StateRole::Leader => check_round(message, receiver.round),
        MessageType::MsgSnapshot => check_snapshot(message),
        // Late ones, of an earlier life or leadership, are raft-rs's to ignore.
        MessageType::MsgAppendResponse if role == StateRole::Leader => {
            let index = index.max(message.reject_hint).max(message.request_snapshot);
            match message.request_snapshot {
                0 if index <= last => Ok(()),
                0 => Err(StepError::Acknowledged { index, last }),
                _ => Err(StepError::Unasked),
            }
        }
        // Votes are asked for when the whole log is durable, and raft-rs insists on it when they make a leader.
        MessageType::MsgRequestVoteResponse if durable != last && role == StateRole::Candidate => {
            Err(StepError::Unasked)
        }
        // Only the leader hands over, and its own term.
        MessageType::MsgTimeoutNow if term < receiver.term => Ok(()),
        MessageType::MsgTimeoutNow if term != receiver.term || from != receiver.leader => Err(StepError::Unasked),
        MessageType::MsgHeartbeatResponse
        | MessageType::MsgAppendResponse
        | MessageType::MsgRequestVote
        | MessageType::MsgRequestVoteResponse
        | MessageType::MsgRequestPreVote
        | MessageType::MsgRequestPreVoteResponse
        | MessageType::MsgTimeoutNow => Ok(()),
        kind => Err(StepError::Kind(kind)),
    }
}

/// True for what only a leader sends.
pub(crate) fn from_leader(kind: MessageType) -> bool {
    matches!(kind, MessageType::MsgAppend | MessageType::MsgHeartbeat | MessageType::MsgSnapshot)
}

/// One leader per term.
fn check_leader(message: &Message, receiver: &Receiver) -> Result<(), StepError> {
    let &Receiver { term, leader, .. } = receiver;
    let other = leader != 0 && message.from != leader;
    if from_leader(message.get_msg_type()) && message.term == term && other {
        return Err(StepError::Usurper { from: message.from, leader, term });
    }
    Ok(())
}

/// A round of a lease, or nothing.
fn check_round(message: &Message, newest: u64) -> Result<(), StepError> {
    match round_of(message) {
        Some(round) if round > newest => Err(StepError::Unasked),
        None if !message.context.is_empty() => Err(StepError::Context),
        _ => Ok(()),
    }
}

/// The round in a heartbeat or its answer.
pub(crate) fn round_of(message: &Message) -> Option<u64> {
    context_of(message).map(|context| context & !(IDLE_ASKED | IDLE_TAKEN))
}

/// Whether a heartbeat or its answer says this of idleness.
pub(crate) fn says(message: &Message, bit: u64) -> bool {
    let beats = matches!(message.get_msg_type(), MessageType::MsgHeartbeat | MessageType::MsgHeartbeatResponse);
    beats && context_of(message).is_some_and(|context| context & bit != 0)
}

fn context_of(message: &Message) -> Option<u64> {
    message.context.as_ref().try_into().ok().map(u64::from_le_bytes)
}

fn check_snapshot(message: &Message) -> Result<(), StepError> {
    let snapshot = message.get_snapshot();
    let (index, term) = (snapshot.get_metadata().index, snapshot.get_metadata().term);
    let numbers = (1..=NUMBER_MAX).contains(&index) && (1..=message.term).contains(&term);
    let conf = ConfState::decode(&snapshot.data).is_ok_and(|conf| !conf.voters.is_empty());
    if numbers && conf { Ok(()) } else { Err(StepError::Snapshot) }
}

fn check_entries(message: &Message, payload_max: usize) -> Result<(), StepError> {
    let malformed = StepError::Entries { index: message.index };
    // Term 0 belongs to index 0 only; elsewhere raft-rs would take it for "beyond my log" and call it a match.
    if (message.log_term == 0) != (message.index == 0) || message.log_term > message.term {
        return Err(malformed);
    }
    let (mut index, mut term) = (message.index, message.log_term);
    for entry in message.get_entries() {
        let follows = index.checked_add(1) == Some(entry.index) && entry.index < u64::MAX;
        if !follows || !well_formed(entry, payload_max) || entry.term < term.max(1) || entry.term > message.term {
            return Err(malformed);
        }
        (index, term) = (entry.index, entry.term);
    }
    Ok(())
}

/// What the log takes: whole blocks with a CRC each, or a membership change we can write.
fn well_formed(entry: &Entry, payload_max: usize) -> bool {
    match entry.get_entry_type() {
        EntryType::EntryNormal => {
            let (data, context) = (entry.data.len(), entry.context.len());
            data.is_multiple_of(BLOCK)
                && data <= payload_max
                && context >= data / BLOCK * 4
                && context <= data / BLOCK * 4 + HEADER_MAX
        }
        _ => read_change(entry).is_some_and(|change| change.get_changes().len() <= CHANGES_MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: usize = 1 << 20;

    fn to(me: u64, last: u64) -> Receiver {
        let role = StateRole::Follower;
        Receiver { me, role, term: 5, leader: 0, last, durable: last, round: 3, payload_max: MAX }
    }

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
        assert_eq!(check(&append(0, 0, &[(1, 1), (2, 5)]), &to(1, 0)), Ok(()));
        assert_eq!(check(&append(7, 3, &[]), &to(1, 3)), Ok(()));
        let mut heartbeat = message(MessageType::MsgHeartbeat);
        heartbeat.commit = 3;
        assert_eq!(check(&heartbeat, &to(1, 3)), Ok(()));
        assert_eq!(check(&heartbeat, &to(1, 2)), Err(StepError::Lost { commit: 3, last: 2 }));
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
            let refused = check(&message, &to(1, 100));
            assert_eq!(refused, Err(StepError::Entries { index: message.index }), "{message:?}");
        }
        let spoilers: [fn(&mut Entry); 5] = [
            |e| e.data = vec![0; 4096].into(),
            |e| (e.data, e.context) = (vec![0; 100].into(), vec![0; 4].into()),
            |e| (e.data, e.context) = (vec![0; MAX + 4096].into(), vec![0; MAX / 1024 + 4].into()),
            |e| e.context = vec![0; HEADER_MAX + 1].into(),
            |e| e.set_entry_type(EntryType::EntryConfChange),
        ];
        for (i, spoil) in spoilers.iter().enumerate() {
            let mut message = append(7, 3, &[(8, 5)]);
            assert_eq!(check(&message, &to(1, 100)), Ok(()));
            spoil(&mut message.mut_entries()[0]);
            assert_eq!(check(&message, &to(1, 100)), Err(StepError::Entries { index: 7 }), "spoiler {i}");
        }
        let vote = message(MessageType::MsgRequestVoteResponse);
        assert_eq!(check(&vote, &to(1, 3)), Ok(()));
        let candidate = Receiver { role: StateRole::Candidate, ..to(1, 3) };
        assert_eq!(check(&vote, &candidate), Ok(()));
        assert_eq!(check(&vote, &Receiver { durable: 2, ..candidate }), Err(StepError::Unasked));
        let mut ack = message(MessageType::MsgAppendResponse);
        ack.index = 4;
        assert_eq!(check(&ack, &to(1, 3)), Ok(()), "late");
        let leader = Receiver { role: StateRole::Leader, ..to(1, 3) };
        assert_eq!(check(&ack, &leader), Err(StepError::Acknowledged { index: 4, last: 3 }));
    }

    #[test]
    fn refuses_strangers_and_local_kinds() {
        assert_eq!(check(&message(MessageType::MsgHeartbeat), &to(3, 0)), Err(StepError::Address { from: 2, to: 1 }));
        for kind in [MessageType::MsgPropose, MessageType::MsgHup, MessageType::MsgReadIndex, MessageType::MsgBeat] {
            assert_eq!(check(&message(kind), &to(1, 0)), Err(StepError::Kind(kind)));
        }
        let mut local = message(MessageType::MsgHeartbeat);
        local.term = 0;
        assert_eq!(check(&local, &to(1, 0)), Err(StepError::Term(0)));
        local.term = u64::MAX;
        assert_eq!(check(&local, &to(1, 0)), Err(StepError::Term(u64::MAX)));
    }

    #[test]
    fn one_leader_per_term() {
        let follower = Receiver { leader: 3, ..to(1, 100) };
        let usurper = StepError::Usurper { from: 2, leader: 3, term: 5 };
        assert_eq!(check(&append(7, 3, &[]), &follower), Err(usurper.clone()));
        assert_eq!(check(&message(MessageType::MsgHeartbeat), &follower), Err(usurper));
        assert_eq!(check(&append(7, 3, &[]), &Receiver { term: 4, ..follower }), Ok(()), "a later term");
        let mut hand_over = message(MessageType::MsgTimeoutNow);
        assert_eq!(check(&hand_over, &follower), Err(StepError::Unasked));
        assert_eq!(check(&hand_over, &Receiver { leader: 2, ..follower }), Ok(()));
        hand_over.term = 6;
        assert_eq!(check(&hand_over, &Receiver { leader: 2, ..follower }), Err(StepError::Unasked));
    }

    #[test]
    fn rounds_and_offers() {
        let mut beat = message(MessageType::MsgHeartbeat);
        beat.context = 9u64.to_le_bytes().to_vec().into();
        assert_eq!((check(&beat, &to(1, 0)), round_of(&beat)), (Ok(()), Some(9)));
        beat.context = vec![1].into();
        assert_eq!(check(&beat, &to(1, 0)), Err(StepError::Context));
        let leader = Receiver { role: StateRole::Leader, leader: 1, ..to(1, 0) };
        let mut echo = message(MessageType::MsgHeartbeatResponse);
        echo.context = 3u64.to_le_bytes().to_vec().into();
        assert_eq!(check(&echo, &leader), Ok(()));
        echo.context = 4u64.to_le_bytes().to_vec().into();
        assert_eq!(check(&echo, &leader), Err(StepError::Unasked));
        assert!(!says(&echo, IDLE_TAKEN));
        echo.context = (3 | IDLE_ASKED | IDLE_TAKEN).to_le_bytes().to_vec().into();
        assert_eq!((check(&echo, &leader), round_of(&echo)), (Ok(()), Some(3)));
        assert!(says(&echo, IDLE_TAKEN) && says(&echo, IDLE_ASKED));

        let mut offer = message(MessageType::MsgSnapshot);
        offer.mut_snapshot().data = ConfState::of(&[2]).encode();
        (offer.mut_snapshot().mut_metadata().index, offer.mut_snapshot().mut_metadata().term) = (10, 5);
        assert_eq!(check(&offer, &to(1, 0)), Ok(()));
        let spoilers: [fn(&mut Message); 5] = [
            |m| m.mut_snapshot().mut_metadata().index = 0,
            |m| m.mut_snapshot().mut_metadata().term = 6,
            |m| m.mut_snapshot().mut_metadata().term = 0,
            |m| m.mut_snapshot().data = ConfState::default().encode(),
            |m| m.mut_snapshot().data = vec![7].into(),
        ];
        for spoil in spoilers {
            let mut offer = offer.clone();
            spoil(&mut offer);
            assert_eq!(check(&offer, &to(1, 0)), Err(StepError::Snapshot));
        }
    }
}
