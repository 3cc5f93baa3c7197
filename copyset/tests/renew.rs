//! Groups that start anew from their own log: a replica whose others are gone is the only voter, and out of the trash.
#![allow(clippy::unwrap_used)]

mod common;

use common::net::{MS, Net, config};
use common::{ID, Node};
use copyset::{ConfState, Config, Renewal, ResetRefused, Role, Started};
use raftlog::EntryKind;

const ME: u64 = 3;

fn load(net: &mut Net, writes: usize) {
    for i in 0..writes {
        net.write(i % 3);
        net.run(2 * MS);
    }
}

/// As the shard does: all that is applied is on the slots, then the checkpoint.
fn force(node: &mut Node) {
    assert_eq!(node.copyset.may_reset(&[ME]), Ok(Started::Begun));
    node.copyset.freeze(node.now);
    assert!(node.copyset.is_settled());
    node.checkpoint(node.copyset.applied_index());
    node.copyset.renew(&Renewal::Reset);
}

/// Three nodes under load, until `stop` says so of [`ME`], a follower; then only that one is left.
fn survivor(seed: u64, stop: impl Fn(&Node) -> bool) -> Net {
    let mut net = Net::new(3, seed);
    net.await_leader(3000);
    load(&mut net, 40);
    let leader = net.await_leader(3000);
    if leader == ME {
        let node = net.node(ME);
        node.copyset.transfer_leader(node.now, 1).unwrap();
    }
    let leader = net.await_that(5000, "another leader", |net| net.leader().filter(|&l| l != ME));
    net.add(4, &[], seed);
    net.change(&[1, 2, 3, 4]);
    for _ in 0..20_000 {
        net.write(1);
        net.run(MS);
        assert_eq!(net.leader(), Some(leader));
        if stop(&net.nodes[&ME]) {
            for gone in [1, 2, 4] {
                net.nodes.remove(&gone);
                net.down.insert(gone); // for what is on its way to it
            }
            return net;
        }
    }
    panic!("it never comes to that");
}

fn tail(node: &Node) -> u64 {
    node.copyset.durable_index().saturating_sub(node.copyset.commit_index())
}

/// A membership change that is durable and, as far as this node knows, not committed.
fn change_in_tail(node: &Node) -> bool {
    let (low, high) = (node.copyset.commit_index() + 1, node.copyset.durable_index() + 1);
    let entries = node.log.borrow().index(ID).unwrap().entries(low, high, usize::MAX);
    entries.iter().any(|entry| entry.kind == EntryKind::ConfChange)
}

#[test]
fn the_last_of_three_goes_on_alone_with_all_it_acknowledged() {
    for seed in 1..6 {
        let mut net = survivor(seed, |node| tail(node) > 2 && !change_in_tail(node));
        let node = net.node(ME);
        let (term, epoch, held) = (node.copyset.term(), node.copyset.conf().epoch, node.copyset.durable_index());
        force(node);
        assert!(!node.copyset.may_read(node.now) && node.copyset.role() != Role::Leader, "it is not durable yet");
        assert_eq!(node.renewed, 0);
        assert_eq!(net.await_leader(2000), ME);
        let node = net.node(ME);
        assert_eq!(
            (node.renewed, node.copyset.term()),
            (1, term + 2),
            "a term for what was forced, one for its leader"
        );
        assert!(node.copyset.applied_index() > held, "nothing it had acknowledged is lost");
        let conf = node.copyset.conf().clone();
        assert_eq!((&conf.voters, conf.learners.len(), conf.epoch), (&vec![ME], 0, epoch + 2));
        // Others take its state over, also after restarts.
        net.crash(ME);
        load(&mut net, 10);
        net.add(5, &[], seed);
        net.add(6, &[], seed);
        let (_, cookie, started) = net.change(&[ME, 5, 6]).unwrap();
        assert_eq!(started, Ok(Started::Begun));
        while !net.node(ME).changes.contains_key(&cookie) {
            load(&mut net, 5);
        }
        net.converge(5000);
        assert!(net.node(6).copyset.applied_index() > held && net.answered > held);
        net.assert_clean();
    }
}

#[test]
fn membership_changes_in_the_tail_do_not_undo_what_was_forced() {
    let mut net = survivor(11, change_in_tail);
    let last = net.nodes[&ME].copyset.last_index();
    force(net.node(ME));
    net.await_leader(2000);
    let alone = |net: &mut Net| {
        let conf = net.node(ME).copyset.conf().clone();
        assert_eq!((conf.joint(), conf.learners.len(), conf.voters), (false, 0, vec![ME]));
    };
    alone(&mut net);
    assert!(net.node(ME).copyset.applied_index() >= last);
    // From a checkpoint before the change, and from one behind it.
    net.crash(ME);
    net.await_leader(2000);
    alone(&mut net);
    let node = net.node(ME);
    let forced = ConfState::decode(&node.log.borrow().index(ID).unwrap().checkpoint().conf).unwrap();
    assert!(forced.void > 0 && forced.void <= last, "{forced:?}");
    assert_eq!(node.copyset.conf().void, 0, "what comes behind it counts");
    node.checkpoint(node.copyset.applied_index());
    net.run(50 * MS);
    net.crash(ME);
    net.await_leader(2000);
    alone(&mut net);
    net.add(5, &[], 11);
    let (_, cookie, _) = net.change(&[ME, 5]).unwrap();
    while !net.node(ME).changes.contains_key(&cookie) {
        load(&mut net, 5);
    }
    net.converge(5000);
    assert_eq!(net.node(5).copyset.conf().voters, [ME, 5]);
    net.assert_clean();
}

#[test]
fn a_crash_leaves_the_old_voters_or_the_forced_ones() {
    let mut seen = [0; 2];
    for seed in 0..60 {
        let mut node = Node::new(Config::new(ID, ME, seed), &[1, 2, ME], seed);
        node.settle();
        let term = node.copyset.term();
        force(&mut node);
        node.turn();
        node.restart();
        let voters = node.copyset.conf().voters.clone();
        let forced = voters == [ME];
        assert!(forced || voters == [1, 2, ME]);
        assert!(if forced { node.copyset.term() > term } else { node.copyset.term() == term });
        node.settle();
        assert_eq!(node.copyset.is_leader_ready(), forced);
        seen[usize::from(forced)] += 1;
    }
    assert!(seen.iter().all(|&n| n > 5), "{seen:?}");
}

#[test]
fn what_cannot_be_forced() {
    let mut node = Node::new(Config::new(ID, ME, 1), &[ME], 1);
    node.settle();
    let refused = |node: &Node, peers: &[u64]| node.copyset.may_reset(peers).unwrap_err();
    assert_eq!(refused(&node, &[]), ResetRefused::Invalid);
    assert_eq!(refused(&node, &[ME, 0]), ResetRefused::Invalid);
    assert_eq!(refused(&node, &[5]), ResetRefused::Invalid, "it would never campaign again");
    assert_eq!(refused(&node, &[ME, 5]), ResetRefused::Invalid, "the other one's tail may say otherwise");
    assert_eq!(node.copyset.may_reset(&[ME, ME]), Ok(Started::Already));
    // A leader with a change under way; without leading it does not matter.
    node.copyset.change_peers(node.now, 9, &[ME, 8]).unwrap();
    assert_eq!(refused(&node, &[ME]), ResetRefused::Busy);
    node.settle();
    assert_eq!(node.copyset.conf().learners, [8]);
    node.restart();
    node.settle();
    assert_eq!(node.copyset.may_reset(&[ME]), Ok(Started::Begun), "learners go");
    force(&mut node);
    assert_eq!(refused(&node, &[ME]), ResetRefused::Busy, "one at a time");
    node.settle();
    assert_eq!((node.copyset.conf().learners.len(), node.copyset.is_leader_ready()), (0, true));
    let passive = Node::new(Config::new(ID, ME, 2), &[], 2);
    assert_eq!(refused(&passive, &[ME]), ResetRefused::Inactive);
}

#[test]
fn a_replica_whose_log_lost_records_is_trusted_again() {
    for fetched in [true, false] {
        let mut net = survivor(21, |node| tail(node) > 2 && !change_in_tail(node));
        let node = net.node(ME);
        let (held, commit) = (node.copyset.durable_index(), node.copyset.commit_index());
        node.config = Config { suspect: true, ..config(ME, 21) };
        node.restart();
        assert!(node.copyset.is_suspect());
        if fetched {
            node.fetch_tail();
        }
        node.turn();
        force(node);
        node.config.suspect = false; // as the log says from now on
        net.await_leader(2000);
        let node = net.node(ME);
        assert!(!node.copyset.is_suspect());
        let applied = node.copyset.applied_index();
        // What has no payload any more cannot be kept, nor what is behind it.
        assert!(if fetched { applied > held } else { applied > commit && applied <= held + 1 });
        net.crash(ME);
        assert_eq!(net.await_leader(2000), ME);
    }
}

#[test]
fn out_of_the_trash_it_goes_on_where_it_was() {
    let mut node = Node::new(Config::new(ID, ME, 1), &[ME], 1);
    node.settle();
    (1..5).for_each(|cookie| node.propose(cookie, 1).unwrap());
    node.settle();
    let (applied, conf) = (node.copyset.applied_index(), node.copyset.conf().clone());
    node.copyset.retire(77);
    node.checkpoint(applied);
    node.settle();
    let retired = |node: &Node| {
        let said = ConfState::decode(&node.log.borrow().index(ID).unwrap().checkpoint().conf).unwrap();
        (said.retired, node.copyset.retired())
    };
    assert_eq!(retired(&node), (77, 77));
    node.restart();
    assert_eq!(retired(&node), (77, 77));
    node.settle();
    node.copyset.freeze(node.now);
    node.checkpoint(node.copyset.applied_index());
    node.copyset.renew(&Renewal::Restored);
    assert_eq!(node.copyset.retired(), 77, "not before that is durable");
    node.settle();
    assert_eq!((retired(&node), node.renewed), ((0, 0), 1));
    assert!(node.copyset.is_leader_ready() && node.copyset.applied_index() > applied);
    assert_eq!(node.copyset.conf().voters, conf.voters);
    node.check_epoch();
    node.restart();
    assert_eq!(retired(&node), (0, 0));
}
