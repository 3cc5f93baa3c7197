//! One voter, end to end over the real log on a simulated disk: nothing is applied before it is durable, nothing
//! applied is lost, whenever the power fails.

mod common;

use common::{ID, Node, Rng};
use copyset::raft::eraftpb::{ConfChangeSingle, ConfChangeType, ConfChangeV2, Message, MessageType};
use copyset::{Config, Copyset, Error, ProposeError, Role};
use raftlog::HardState;
use std::rc::Rc;

const ME: u64 = 42;

fn node(seed: u64) -> Node {
    Node::new(Config::new(ID, ME, seed), &[ME], seed)
}

#[test]
fn a_sole_voter_leads_at_once_and_commits_after_the_disk() {
    let mut node = node(1);
    assert_eq!((node.copyset.role(), node.copyset.leader()), (Role::Leader, ME));
    assert_eq!(node.propose(1, 1), Err(ProposeError::NotReady));
    node.turn();
    assert_eq!(node.leader_changes, [(ME, 2, false)]);
    assert!(!node.copyset.is_leader_ready() && node.applied.is_empty());
    node.settle();
    assert_eq!(node.leader_changes, [(ME, 2, false), (ME, 2, true)]);
    assert!(node.may_read());
    assert_eq!(node.copyset.conf().epoch, 1);

    (1..=10).for_each(|cookie| node.propose(cookie, 1).unwrap());
    for _ in 0..5 {
        node.turn();
        node.tick();
    }
    assert!(node.answered.is_empty(), "nothing is durable yet");
    assert_eq!((node.copyset.waits(), node.copyset.commit_index()), (10, 2));
    node.settle();
    assert_eq!(node.answered.len(), 10);
    assert_eq!((node.copyset.waits(), node.copyset.applied_index()), (0, 12));
}

#[test]
fn a_turn_of_proposals_is_one_batch() {
    let mut node = node(2);
    node.settle();
    let before = node.log.borrow().durable_seq();
    (0..8).for_each(|cookie| node.propose(cookie, 1).unwrap());
    node.settle();
    assert_eq!(node.log.borrow().durable_seq(), before + 1, "and the commit that followed wrote nothing");
}

#[test]
fn restart_at_every_step() {
    let (mut answered, mut vanished) = (0, 0);
    for seed in 0..120 {
        let mut node = node(seed);
        let mut rng = Rng(seed ^ 0xdead);
        let (mut cookie, mut term, mut proposed) = (0, node.copyset.term(), 0);
        for _ in 0..80 {
            match rng.below(16) {
                0 => {
                    let applied = node.applied.keys().next_back().copied().unwrap_or(1);
                    let unanswered = proposed - node.answered.len();
                    node.restart();
                    if rng.one_in(2) {
                        node.restart(); // again, before anything new is durable
                    }
                    node.check_epoch();
                    node.settle();
                    assert!(node.copyset.applied_index() > applied, "acknowledged entries came back");
                    assert!(node.copyset.term() > term || applied == 1, "terms rise");
                    term = node.copyset.term();
                    (proposed, vanished) = (node.answered.len(), vanished + unanswered);
                }
                1 => {
                    let (low, high) = (node.copyset.first_index() - 1, node.copyset.applied_index());
                    node.checkpoint(low + rng.below(high - low + 1));
                }
                2 if rng.one_in(2) => node.tick(),
                2 => {
                    node.fetch_tail();
                    node.log.borrow_mut().relog(ID);
                }
                3 => {
                    let state = node.copyset.hard_state_for_log();
                    node.log.borrow_mut().append(ID, Vec::new(), Some(state));
                }
                4..=8 => {
                    if node.propose(cookie, rng.below(3) as usize).is_ok() {
                        (cookie, proposed) = (cookie + 1, proposed + 1);
                    }
                }
                9..=11 => {
                    node.complete_one();
                }
                _ => node.turn(),
            }
        }
        node.settle();
        node.check_epoch();
        answered += node.answered.values().filter(|fate| fate.is_none()).count();
    }
    assert!(answered > 500 && vanished > 50, "{answered} answered, {vanished} vanished");
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let run = |seed| {
        let mut node = node(seed);
        for cookie in 0..200 {
            let _ = node.propose(cookie, 1);
            node.turn();
            node.complete_one();
            if cookie % 37 == 0 {
                node.restart();
            }
        }
        node.settle();
        (node.applied, node.leader_changes, node.answered)
    };
    assert_eq!(run(5), run(5));
}

#[test]
fn checkpoint_then_restart_starts_there() {
    let mut node = node(3);
    node.settle();
    (0..20).for_each(|cookie| node.propose(cookie, 1).unwrap());
    node.settle();
    node.checkpoint(12);
    assert_eq!((node.copyset.first_index(), node.copyset.last_index()), (13, 22));
    node.settle();
    node.restart();
    assert_eq!((node.copyset.applied_index(), node.copyset.conf().epoch), (12, 1));
    node.settle();
    assert_eq!((node.copyset.applied_index(), node.copyset.conf().epoch), (23, 2));
    node.checkpoint(23);
    node.settle();
    node.restart();
    node.settle();
    assert_eq!((node.copyset.applied_index(), node.copyset.conf().epoch), (24, 3));
}

#[test]
fn limits_push_back() {
    let mut config = Config::new(ID, ME, 4);
    (config.max_waiting, config.max_waiting_bytes) = (3, 3 * 4200);
    let mut node = Node::new(config, &[ME], 4);
    node.settle();
    (0..3).for_each(|cookie| node.propose(cookie, 1).unwrap());
    assert_eq!(node.propose(3, 0), Err(ProposeError::Full));
    node.settle();
    assert_eq!(node.propose(4, 10), Ok(()), "one that is too long alone still goes");
    assert_eq!(node.propose(5, 1), Err(ProposeError::Full));
    let max = node.log.borrow().max_entry_bytes();
    assert_eq!(node.propose(6, max / 4096 + 1), Err(ProposeError::TooLarge));
}

#[test]
fn a_passive_replica_waits() {
    let mut node = Node::new(Config::new(ID, ME, 5), &[], 5);
    for _ in 0..100 {
        node.tick();
        node.settle();
    }
    assert_eq!((node.copyset.role(), node.copyset.term(), node.copyset.last_index()), (Role::Passive, 0, 0));
    assert_eq!(node.propose(1, 1), Err(ProposeError::NotLeader { leader: 0 }));
}

#[test]
fn a_log_that_contradicts_itself_is_an_error() {
    let node = node(6);
    let start = |commit, term| {
        node.log.borrow_mut().append(ID, Vec::new(), Some(HardState { term, vote: 0, commit }));
        Copyset::new(node.config.clone(), Rc::clone(&node.log), 0).map(|_| ())
    };
    assert!(matches!(start(9, 1), Err(Error::CommitBeyondLog { commit: 9, last: 1, .. })));
    assert!(matches!(start(0, 0), Err(Error::Term { term: 0, last: 1, .. })));
    assert!(start(0, 1).is_ok(), "a commit older than the checkpoint is none");
    let stranger = Config::new(raftlog::CopysetId::new(9, 9), ME, 0);
    assert!(matches!(Copyset::new(stranger, Rc::clone(&node.log), 0), Err(Error::Unknown(_))));
    assert!(matches!(Copyset::new(Config::new(ID, 0, 0), Rc::clone(&node.log), 0), Err(Error::Nobody)));
}

#[test]
fn a_hostile_configuration_is_an_error() {
    let node = node(7);
    let mut checkpoint = Copyset::initial_checkpoint(&[ME], 2);
    checkpoint.conf = vec![9; 30].into();
    let id = raftlog::CopysetId::new(1, 8);
    node.log.borrow_mut().checkpoint(id, checkpoint);
    let started = Copyset::new(Config::new(id, ME, 0), Rc::clone(&node.log), 0);
    assert!(matches!(started, Err(Error::Conf(..))));
}

#[test]
fn a_learner_raises_no_epoch_and_survives_restart() {
    let mut node = node(8);
    node.settle();
    let mut single = ConfChangeSingle::default();
    single.set_change_type(ConfChangeType::AddLearnerNode);
    single.set_node_id(77);
    let mut change = ConfChangeV2::default();
    change.mut_changes().push(single);
    node.copyset.propose_change(&change).unwrap();
    node.settle();
    assert_eq!((node.copyset.conf().learners.as_slice(), node.copyset.conf().epoch), (&[77][..], 1));
    node.restart();
    assert!(node.copyset.conf().learners.is_empty(), "replayed from the log, not assumed");
    node.settle();
    assert_eq!((node.copyset.conf().learners.as_slice(), node.copyset.conf().epoch), (&[77][..], 2));
    node.checkpoint(node.copyset.applied_index());
    node.settle();
    node.restart();
    assert_eq!((node.copyset.conf().learners.as_slice(), node.copyset.conf().epoch), (&[77][..], 2));
}

#[test]
fn a_learner_hears_nothing_of_a_term_whose_vote_may_be_lost() {
    let mut node = node(9);
    node.settle();
    let mut single = ConfChangeSingle::default();
    single.set_change_type(ConfChangeType::AddLearnerNode);
    single.set_node_id(77);
    let mut change = ConfChangeV2::default();
    change.mut_changes().push(single);
    node.copyset.propose_change(&change).unwrap();
    node.settle();
    node.checkpoint(node.copyset.applied_index());
    node.settle();
    node.restart();
    node.turn();
    assert_eq!(node.copyset.role(), Role::Leader);
    assert!(node.outgoing.is_empty(), "the vote is not durable");
    node.settle();
    assert!(node.outgoing.iter().any(|m| m.to == 77));
    // Later entries of the term go out before they are durable.
    node.outgoing.clear();
    (0..20).for_each(|_| node.tick());
    node.turn();
    assert!(!node.outgoing.is_empty());
}

#[test]
fn a_payload_not_in_memory_is_never_sent_empty() {
    let mut node = node(10);
    node.settle();
    let mut single = ConfChangeSingle::default();
    single.set_change_type(ConfChangeType::AddLearnerNode);
    single.set_node_id(77);
    let mut change = ConfChangeV2::default();
    change.mut_changes().push(single);
    node.copyset.propose_change(&change).unwrap();
    (0..3).for_each(|cookie| node.propose(cookie, 1).unwrap());
    node.settle();
    node.restart();
    node.settle();
    let answer = |node: &Node, kind, index, reject| {
        let mut message = Message::default();
        message.set_msg_type(kind);
        (message.from, message.to, message.term) = (77, ME, node.copyset.term());
        (message.index, message.reject, message.reject_hint, message.log_term) = (index, reject, 1, 1);
        message
    };
    let probe = node.outgoing.iter().find(|m| m.get_msg_type() == MessageType::MsgAppend).unwrap().index;
    let rejected = answer(&node, MessageType::MsgAppendResponse, probe, true);
    let mut sent = Vec::new();
    let mut hear = |node: &mut Node, message| {
        node.outgoing.clear();
        node.step(message).unwrap();
        node.settle();
        sent.clear();
        sent.extend(node.outgoing.iter().flat_map(|m| m.get_entries().to_vec()));
        assert!(sent.iter().all(|e| e.context.len() <= 8 || !e.data.is_empty()), "{sent:?}");
        sent.last().map(|e| e.index)
    };
    let last = hear(&mut node, rejected).expect("entries before the first payload are sent");
    let taken = answer(&node, MessageType::MsgAppendResponse, last, false);
    assert_eq!(hear(&mut node, taken), None, "the next one has to be fetched");
    node.fetch_tail();
    let alive = answer(&node, MessageType::MsgHeartbeatResponse, 0, false);
    assert_eq!(hear(&mut node, alive), Some(node.copyset.last_index()));
}
