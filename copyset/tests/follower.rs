//! One replica of three, its peers played by the test.

mod common;

use common::{ID, Node};
use copyset::raft::eraftpb::{Entry, Message, MessageType};
use copyset::{Config, Role};

fn node(seed: u64) -> Node {
    Node::new(Config::new(ID, 1, seed), &[1, 2, 3], seed)
}

fn message(kind: MessageType, from: u64, term: u64) -> Message {
    let mut message = Message::default();
    message.set_msg_type(kind);
    (message.from, message.to, message.term) = (from, 1, term);
    message
}

fn append(from: u64, term: u64, after: (u64, u64), count: u64, commit: u64) -> Message {
    let mut message = message(MessageType::MsgAppend, from, term);
    (message.index, message.log_term, message.commit) = (after.0, after.1, commit);
    for index in after.0 + 1..=after.0 + count {
        let mut entry = Entry::default();
        (entry.index, entry.term) = (index, term);
        message.mut_entries().push(entry);
    }
    message
}

#[test]
fn a_commit_is_not_logged_before_the_entries_it_speaks_of() {
    let mut node = node(1);
    node.step(append(2, 5, (1, 1), 3, 0)).unwrap();
    node.settle();
    assert_eq!((node.copyset.last_index(), node.copyset.commit_index()), (4, 1));
    // Another leader replaces entries 3 and 4 and has committed its own.
    node.step(append(3, 6, (2, 5), 2, 4)).unwrap();
    let state = node.copyset.hard_state_for_log();
    assert_eq!((state.term, state.commit), (5, 1), "the log still holds the replaced entries");
    node.turn();
    let state = node.copyset.hard_state_for_log();
    assert_eq!((state.term, state.commit), (6, 4));
    assert_eq!(node.handed_out, 2, "the others are committed, but not durable");
    node.settle();
    assert_eq!(node.applied.keys().copied().collect::<Vec<_>>(), [2, 3, 4]);
    assert_eq!(node.copyset.conf().epoch, 2, "two leaders");
}

#[test]
fn acknowledgements_wait_for_the_disk() {
    let mut node = node(2);
    node.step(append(2, 5, (1, 1), 2, 0)).unwrap();
    node.turn();
    assert!(node.outgoing.is_empty());
    node.settle();
    let acks: Vec<_> = node.outgoing.drain(..).map(|m| (m.get_msg_type(), m.to, m.index)).collect();
    assert_eq!(acks, [(MessageType::MsgAppendResponse, 2, 3)]);

    let mut vote = message(MessageType::MsgRequestVote, 3, 9);
    (vote.index, vote.log_term) = (9, 8);
    (0..30).for_each(|_| node.tick()); // long after the leader was heard
    node.settle();
    node.outgoing.clear();
    node.step(vote).unwrap();
    node.turn();
    assert!(node.outgoing.is_empty(), "a vote is a promise: it must survive a crash first");
    node.settle();
    assert!(node.outgoing.iter().any(|m| m.get_msg_type() == MessageType::MsgRequestVoteResponse && !m.reject));
    node.restart();
    assert_eq!((node.copyset.term(), node.copyset.hard_state_for_log().vote), (9, 3));
}

#[test]
fn election_timeouts_come_from_the_seed() {
    let waits = |seed| {
        let mut node = node(seed);
        let mut wait = move || {
            node.step(message(MessageType::MsgHeartbeat, 2, 1)).unwrap();
            assert_eq!(node.copyset.role(), Role::Follower);
            let ticks = (1..).find(|_| {
                node.tick();
                node.settle();
                node.copyset.role() == Role::Candidate
            });
            ticks.unwrap()
        };
        (0..20).map(|_| wait()).collect::<Vec<u32>>()
    };
    assert_eq!(waits(3), waits(3));
    assert_ne!(waits(3), waits(4));
    assert!(waits(5).iter().all(|ticks| (20..=30).contains(ticks)));
}
