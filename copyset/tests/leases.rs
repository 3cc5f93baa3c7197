//! Leases, the silence voters owe, and reads with a quorum's word (rules 17, 18).
#![allow(clippy::unwrap_used)]

mod common;

use common::net::{Fault, MS, Net};
use common::{ID, Node};
use copyset::raft::eraftpb::{Message, MessageType};
use copyset::{Config, ProposeError, Role};

const T: u64 = 400 * MS;

fn message(kind: MessageType, from: u64, term: u64) -> Message {
    let mut message = Message::default();
    message.set_msg_type(kind);
    (message.from, message.to, message.term) = (from, 1, term);
    message
}

fn vote(kind: MessageType, from: u64, term: u64) -> Message {
    let mut message = message(kind, from, term);
    (message.index, message.log_term) = (99, term - 1);
    message
}

/// Answers to votes that left.
fn granted(node: &mut Node) -> usize {
    node.settle();
    let answers = node.outgoing.drain(..).filter(|m| {
        let kind = m.get_msg_type();
        !m.reject && matches!(kind, MessageType::MsgRequestVoteResponse | MessageType::MsgRequestPreVoteResponse)
    });
    answers.count()
}

#[test]
fn a_voter_owes_silence_after_contact_and_after_its_start() {
    let mut node = Node::new(Config::new(ID, 1, 1), &[1, 2, 3], 1);
    node.step(vote(MessageType::MsgRequestPreVote, 3, 2)).unwrap();
    assert_eq!(granted(&mut node), 1, "nobody ever led: it owes nothing");
    node.step(message(MessageType::MsgHeartbeat, 2, 5)).unwrap();
    node.settle();
    let contact = node.now;
    for (after, votes) in [(0, 0), (T - 1, 0), (T, 1)] {
        node.now = contact + after;
        node.step(vote(MessageType::MsgRequestPreVote, 3, 6)).unwrap();
        assert_eq!(granted(&mut node), votes, "{after} ns after contact");
    }
    node.restart();
    let start = node.now;
    for (after, votes) in [(0, 0), (T - 1, 0), (T, 1)] {
        node.now = start + after;
        node.step(vote(MessageType::MsgRequestVote, 3, 6)).unwrap();
        assert_eq!(granted(&mut node), votes, "{after} ns after its start");
    }
    // What the leader itself asked for is granted.
    node.step(message(MessageType::MsgHeartbeat, 3, 6)).unwrap();
    let mut handed = vote(MessageType::MsgRequestVote, 2, 7);
    handed.context = raft::CAMPAIGN_TRANSFER.into();
    node.step(handed).unwrap();
    assert_eq!(granted(&mut node), 1);
}

#[test]
fn a_lease_ends_before_the_silence_does() {
    let mut net = Net::new(3, 7);
    let leader = net.await_leader(3000);
    net.await_that(1000, "lease", |net| net.node(leader).may_read().then_some(()));
    net.isolate(leader);
    let cut = net.time;
    net.await_that(1000, "end of the lease", |net| (!net.node(leader).may_read()).then_some(()));
    assert!(net.time - cut <= T, "{} ms", (net.time - cut) / MS);
    assert_eq!(net.node(leader).copyset.role(), Role::Leader, "it cannot know yet");
    let next = net.await_that(3000, "another leader", |net| net.leader().filter(|&next| next != leader));
    assert!(net.time - cut >= T - 80 * MS && net.time - cut <= 2 * T, "{} ms", (net.time - cut) / MS);
    net.write(1);
    net.run(50 * MS);
    assert!(net.answered > 2, "{next} commits");
    net.run(2 * T);
    assert_ne!(net.node(leader).copyset.role(), Role::Leader, "no quorum answered for long");
    net.converge(5000);
    net.assert_clean();
}

#[test]
fn a_paused_leader_knows_it() {
    let mut net = Net::new(3, 8);
    let leader = net.await_leader(3000);
    net.await_that(1000, "lease", |net| net.node(leader).may_read().then_some(()));
    net.paused.insert(leader);
    net.await_that(3000, "another leader", |net| net.leader());
    net.write(1);
    net.run(50 * MS);
    net.paused.clear();
    let node = net.node(leader);
    assert_eq!(node.copyset.role(), Role::Leader, "no message has told it");
    assert!(!node.may_read());
    net.converge(5000);
    net.assert_clean();
}

#[test]
fn reads_without_a_lease_ask_a_quorum() {
    let mut net = Net::new(3, 9);
    let leader = net.await_leader(3000);
    net.write(1);
    net.read();
    net.run(20 * MS);
    assert_eq!((net.index_reads, net.node(leader).copyset.reads_waiting()), (1, 0));
    let follower = (1..=3).find(|&p| p != leader).unwrap();
    let node = net.node(follower);
    assert_eq!(node.copyset.read_index(node.now, 77), Err(ProposeError::NotLeader { leader }));
    // A round is lost; the next heartbeat serves as well.
    net.isolate(leader);
    net.read();
    net.run(100 * MS);
    assert_eq!(net.node(leader).copyset.reads_waiting(), 1);
    net.heal();
    net.run(150 * MS);
    assert_eq!(net.index_reads, 2);
    // Leadership is lost: no read stays behind.
    net.isolate(leader);
    net.read();
    net.run(3 * T);
    let node = net.node(leader);
    assert_eq!(node.copyset.reads_waiting(), 0);
    assert_eq!(node.reads.values().filter(|answered| !**answered).count(), 1);
    net.assert_clean();
}

#[test]
fn a_sole_voter_reads_without_asking() {
    let mut net = Net::new(1, 10);
    net.await_leader(100);
    net.write(1);
    net.read();
    net.run(10 * MS);
    assert!(net.node(1).may_read());
    assert_eq!(net.index_reads, 1);
    net.assert_clean();
}

#[test]
fn after_a_hand_over_no_lease_for_the_rest_of_the_term() {
    let mut net = Net::new(3, 11);
    let leader = net.await_leader(3000);
    net.await_that(1000, "lease", |net| net.node(leader).may_read().then_some(()));
    net.run(100 * MS);
    let to = (1..=3).find(|&p| p != leader).unwrap();
    // The order to take over is lost on the way.
    net.cut.insert((leader, to));
    let node = net.node(leader);
    node.copyset.transfer_leader(node.now, to).unwrap();
    assert_eq!(node.propose(900, 1), Err(ProposeError::NotReady));
    net.run(5 * MS);
    assert!(!net.node(leader).may_read());
    net.cut.clear();
    net.run(T + 50 * MS);
    let node = net.node(leader);
    let (role, term) = (node.copyset.role(), node.copyset.term());
    if role == Role::Leader {
        assert!(node.copyset.is_leader_ready() && !node.may_read(), "it goes on, without a lease");
        net.read();
        net.run(20 * MS);
        assert_eq!(net.index_reads, 1);
    }
    assert!(net.node(leader).copyset.term() == term);
    net.converge(5000);
    net.assert_clean();
}

#[test]
fn a_hand_over_is_quick_and_loses_nothing() {
    let mut net = Net::new(3, 12);
    let leader = net.await_leader(3000);
    for _ in 0..20 {
        net.write(1);
        net.run(MS);
    }
    let to = (1..=3).find(|&p| p != leader).unwrap();
    let node = net.node(leader);
    node.copyset.transfer_leader(node.now, to).unwrap();
    let begun = net.time;
    net.await_that(400, "the next leader", |net| (net.leader() == Some(to)).then_some(()));
    assert!(net.time - begun < 100 * MS, "{} ms", (net.time - begun) / MS);
    net.converge(5000);
    net.assert_clean();
}

#[test]
fn a_short_pause_ends_no_leadership() {
    let mut net = Net::new(3, 13);
    let leader = net.await_leader(3000);
    let term = net.node(leader).copyset.term();
    // Followers that wake up have heard nothing for long, by the clock.
    for follower in (1..=3).filter(|&p| p != leader) {
        net.paused.insert(follower);
        net.run(3 * T / 2);
        net.paused.clear();
        net.run(T);
    }
    assert_eq!((net.leader(), net.node(leader).copyset.term()), (Some(leader), term));
    assert!(net.nodes.values().all(|n| n.copyset.leader() == leader));
    assert_eq!(net.fault, Fault::None);
    net.assert_clean();
}

#[test]
fn an_election_takes_less_than_two_timeouts() {
    let mut took = Vec::new();
    for seed in 0..100 {
        let mut net = Net::new(3, 100 + seed);
        let leader = net.await_leader(3000);
        net.run(200 * MS + seed * 7 * MS);
        net.down.insert(leader);
        let down = net.time;
        net.await_that(5000, "another leader", |net| net.leader());
        took.push((net.time - down) / MS);
        net.assert_clean();
    }
    took.sort_unstable();
    println!(
        "100 elections, T = 400 ms: median {} ms, 95 of them within {} ms, all within {} ms",
        took[50], took[94], took[99]
    );
    assert!(took[94] <= 2 * T / MS && took[99] <= 5 * T / 2 / MS, "{took:?}");
}
