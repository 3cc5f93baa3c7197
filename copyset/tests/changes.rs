//! Membership changes as Curve's clients order them, raft snapshots for those that lag, and what flows to peers.
#![allow(clippy::unwrap_used)]

mod common;

use common::net::{MS, Net};
use copyset::{ChangeFailed, ChangeRefused, Changed, InProgress, Role, Stage, Started};

fn begin(net: &mut Net, target: &[u64]) -> (u64, u64) {
    let (leader, cookie, started) = net.change(target).unwrap();
    assert_eq!(started, Ok(Started::Begun));
    (leader, cookie)
}

fn load(net: &mut Net, writes: usize) {
    for i in 0..writes {
        net.write(i % 3);
        net.run(2 * MS);
    }
}

#[test]
fn a_member_is_added_under_load() {
    let mut net = Net::new(3, 1);
    let leader = net.await_leader(3000);
    load(&mut net, 50);
    net.add(4, &[], 1);
    let epoch = net.node(leader).copyset.conf().epoch;
    let (_, cookie) = begin(&mut net, &[1, 2, 3, 4]);
    let node = net.node(leader);
    assert_eq!(node.copyset.change_peers(node.now, 0, &[1, 2]), Err(ChangeRefused::Busy));
    let follower = if leader == 1 { 2 } else { 1 };
    assert_eq!(node.copyset.transfer_leader(node.now, follower), Err(ChangeRefused::Busy));
    let stage = Stage::CatchUp;
    assert_eq!(node.copyset.change_in_progress(), Some(InProgress::Change { target: &[1, 2, 3, 4], stage }));
    while net.node(leader).changes.is_empty() {
        load(&mut net, 5);
    }
    let changed = Changed { old: vec![1, 2, 3], new: vec![1, 2, 3, 4] };
    assert_eq!(net.node(leader).changes[&cookie], Ok(changed));
    assert_eq!(net.node(leader).copyset.change_in_progress(), None);
    net.converge(5000);
    let conf = net.node(4).copyset.conf().clone();
    assert_eq!((conf.voters, conf.learners.len(), conf.epoch), (vec![1, 2, 3, 4], 0, epoch + 1));
    net.assert_clean();
}

#[test]
fn one_joint_change_exchanges_two_members() {
    let mut net = Net::new(3, 2);
    let leader = net.await_leader(3000);
    load(&mut net, 30);
    net.add(4, &[], 2);
    net.add(5, &[], 2);
    let epoch = net.node(leader).copyset.conf().epoch;
    let target: Vec<u64> = [leader, 4, 5].into();
    let (_, cookie) = begin(&mut net, &target);
    while net.node(leader).changes.is_empty() {
        load(&mut net, 5);
    }
    assert!(net.node(leader).changes[&cookie].is_ok());
    net.converge(5000);
    assert_eq!(net.node(5).copyset.conf().epoch, epoch + 1, "one change, counted once");
    // Those that left are told so when they ask for votes.
    net.run(3000 * MS);
    for gone in (1..=3).filter(|&p| p != leader) {
        let copyset = &net.node(gone).copyset;
        assert!(copyset.is_removed() || !copyset.conf().has_member(gone), "{gone}");
        assert_ne!(copyset.role(), Role::Candidate);
    }
    net.assert_clean();
}

#[test]
fn a_leader_may_take_itself_out() {
    let mut net = Net::new(3, 3);
    let leader = net.await_leader(3000);
    let target: Vec<u64> = (1..=3).filter(|&p| p != leader).collect();
    let (_, cookie) = begin(&mut net, &target);
    net.run(300 * MS);
    assert_eq!(net.node(leader).changes[&cookie], Ok(Changed { old: vec![1, 2, 3], new: target.clone() }));
    assert_ne!(net.node(leader).copyset.role(), Role::Leader);
    let next = net.await_leader(3000);
    assert!(target.contains(&next));
    net.converge(5000);
    net.assert_clean();
}

#[test]
fn a_learner_that_never_answers_is_given_up() {
    let mut net = Net::new(3, 4);
    let leader = net.await_leader(3000);
    let epoch = net.node(leader).copyset.conf().epoch;
    let (_, cookie) = begin(&mut net, &[1, 2, 3, 9]);
    net.run(4000 * MS);
    assert!(net.node(leader).changes.is_empty() && net.node(leader).copyset.conf().learners == [9]);
    net.run(3000 * MS);
    assert_eq!(net.node(leader).changes[&cookie], Err(ChangeFailed::CatchUp { peer: 9 }));
    net.converge(3000);
    let conf = net.node(leader).copyset.conf().clone();
    assert_eq!((conf.voters, conf.learners.len(), conf.epoch), (vec![1, 2, 3], 0, epoch), "as if nothing had been");
    net.assert_clean();
}

#[test]
fn orders_are_checked() {
    let mut net = Net::new(3, 5);
    let leader = net.await_leader(3000);
    let follower = (1..=3).find(|&p| p != leader).unwrap();
    let node = net.node(follower);
    assert_eq!(node.copyset.add_peer(node.now, 1, 9), Err(ChangeRefused::NotLeader { leader }));
    assert_eq!(node.copyset.transfer_leader(node.now, follower), Err(ChangeRefused::NotLeader { leader }));
    let node = net.node(leader);
    let now = node.now;
    assert_eq!(node.copyset.add_peer(now, 1, follower), Ok(Started::Already));
    assert_eq!(node.copyset.remove_peer(now, 1, 9), Ok(Started::Already));
    assert_eq!(node.copyset.change_peers(now, 1, &[]), Err(ChangeRefused::Invalid));
    assert_eq!(node.copyset.change_peers(now, 1, &[0, 1]), Err(ChangeRefused::Invalid));
    assert_eq!(node.copyset.transfer_leader(now, leader), Ok(Started::Already));
    assert_eq!(node.copyset.transfer_leader(now, 9), Err(ChangeRefused::Invalid));
    assert_eq!(node.copyset.transfer_leader(now, 0), Ok(Started::Begun));
    assert_eq!(node.copyset.transfer_leader(now, follower), Err(ChangeRefused::Busy));
    assert!(matches!(node.copyset.change_in_progress(), Some(InProgress::Transfer(_))));
    assert!(node.changes.is_empty());
    net.await_that(500, "the next leader", |net| net.leader().filter(|&next| next != leader));
    net.assert_clean();
}

#[test]
fn leadership_lost_on_the_way_is_said() {
    let mut net = Net::new(3, 6);
    let leader = net.await_leader(3000);
    net.add(4, &[], 6);
    let (_, cookie) = begin(&mut net, &[1, 2, 3, 4]);
    net.isolate(leader);
    net.run(2000 * MS);
    assert_eq!(net.node(leader).changes[&cookie], Err(ChangeFailed::LeaderLost));
    net.converge(5000);
    net.assert_clean();
}

#[test]
fn one_voter_becomes_three_and_one_again() {
    let mut net = Net::new(1, 7);
    net.await_leader(100);
    load(&mut net, 20);
    net.add(2, &[], 7);
    net.add(3, &[], 7);
    let (_, cookie) = begin(&mut net, &[1, 2, 3]);
    net.await_that(5000, "three voters", |net| net.nodes[&1].changes.get(&cookie).cloned()).unwrap();
    load(&mut net, 20);
    net.converge(3000);
    let node = net.node(1);
    node.copyset.transfer_leader(node.now, 3).unwrap();
    net.await_that(1000, "the next leader", |net| (net.leader() == Some(3)).then_some(()));
    let (_, cookie) = begin(&mut net, &[3]);
    net.await_that(5000, "one voter", |net| net.nodes[&3].changes.get(&cookie).cloned()).unwrap();
    load(&mut net, 20);
    assert!(net.node(3).may_read());
    net.crash(3);
    net.await_leader(5000);
    net.assert_clean();
}

#[test]
fn who_lags_behind_the_log_gets_a_snapshot() {
    for seed in 0..20 {
        let mut net = Net::new(3, 20 + seed);
        let leader = net.await_leader(3000);
        let lagging = (1..=3).find(|&p| p != leader).unwrap();
        net.down.insert(lagging);
        load(&mut net, 60);
        net.run(50 * MS);
        for peer in (1..=3).filter(|&p| p != lagging) {
            let applied = net.nodes[&peer].copyset.applied_index();
            net.node(peer).checkpoint(applied - 3);
        }
        load(&mut net, 10);
        net.down.clear();
        if seed % 2 == 0 {
            net.crash(lagging);
        }
        net.await_that(8000, "installation", |net| (net.nodes[&lagging].installed > 0).then_some(()));
        if seed % 3 == 0 {
            net.crash(lagging); // the installed checkpoint is what it starts from
            assert!(net.node(lagging).copyset.applied_index() > 50);
        }
        load(&mut net, 10);
        net.converge(5000);
        net.assert_clean();
    }
}

#[test]
fn a_crash_during_the_installation_starts_from_before_or_after() {
    let (mut before, mut after) = (0, 0);
    for seed in 0..30 {
        let mut net = Net::new(3, 60 + seed);
        net.weather.disk_ns = 30 * MS;
        let leader = net.await_leader(5000);
        let lagging = (1..=3).find(|&p| p != leader).unwrap();
        net.down.insert(lagging);
        load(&mut net, 40);
        net.run(300 * MS);
        let applied = net.nodes[&leader].copyset.applied_index();
        net.node(leader).checkpoint(applied);
        net.down.clear();
        net.await_that(8000, "installation", |net| {
            let node = &net.nodes[&lagging];
            (node.copyset.is_installing() || node.installed > 0).then_some(())
        });
        net.crash(lagging);
        match net.node(lagging).copyset.applied_index() < 20 {
            true => before += 1,
            false => after += 1,
        }
        net.converge(8000);
        net.assert_clean();
    }
    assert!(before > 0 && after > 0, "{before} before, {after} after");
}

#[test]
fn payloads_that_left_memory_are_fetched_before_they_are_sent() {
    for seed in 0..10 {
        let mut net = Net::new(3, 40 + seed);
        let leader = net.await_leader(3000);
        let lagging = (1..=3).find(|&p| p != leader).unwrap();
        net.down.insert(lagging);
        load(&mut net, 60);
        net.run(50 * MS);
        for peer in (1..=3).filter(|&p| p != lagging) {
            let node = net.node(peer);
            let applied = node.copyset.applied_index();
            node.log.borrow_mut().evict(common::ID, applied);
        }
        net.converge(5000);
        assert!(net.fetched > 0);
        let (a, b) = (net.nodes[&lagging].applied.clone(), net.nodes[&leader].applied.clone());
        assert_eq!(
            a.values().filter(|(_, _, p)| !p.is_empty()).count(),
            b.values().filter(|(_, _, p)| !p.is_empty()).count()
        );
        net.assert_clean();
    }
}

#[test]
fn a_peer_that_does_not_answer_holds_up_no_more_than_a_window() {
    let mut net = Net::new(3, 50);
    let leader = net.await_leader(3000);
    {
        let node = net.node(leader);
        let mut config = node.config.clone();
        (config.window_bytes, config.max_message_bytes) = (64 << 10, 16 << 10);
        node.config = config;
        node.restart();
        net.down.insert((1..=3).find(|&p| p != leader).unwrap());
    }
    let down = *net.down.first().unwrap();
    net.await_that(5000, "the leader again", |net| {
        let found = net.leader()?;
        if found != leader {
            let node = net.node(found);
            let _ = node.copyset.transfer_leader(node.now, leader);
        }
        (found == leader).then_some(())
    });
    net.down.clear();
    net.run(300 * MS);
    // From now on its answers are lost, but not what it is sent.
    net.cut.insert((down, leader));
    let mut most = 0;
    for _ in 0..200 {
        net.write(3);
        net.run(MS);
        most = most.max(net.node(leader).copyset.bytes_in_flight(down));
    }
    assert!((60 << 10..=(64 + 16) << 10).contains(&most), "{most} bytes");
    net.converge(5000);
    net.assert_clean();
}

#[test]
fn a_suspect_takes_part_in_nothing_until_it_has_caught_up() {
    let mut net = Net::new(3, 70);
    let leader = net.await_leader(3000);
    load(&mut net, 10);
    let suspect = (1..=3).find(|&p| p != leader).unwrap();
    net.node(suspect).config.suspect = true;
    net.crash(suspect);
    net.down.insert(leader);
    net.run(3000 * MS);
    assert_eq!(net.leader(), None, "the suspect neither votes nor campaigns");
    assert!(net.node(suspect).copyset.is_suspect());
    assert!(net.refused["Suspect"] > 0);
    // The loss may be out of sight at the next start: the log says that there was one.
    net.node(suspect).config.suspect = false;
    net.crash(suspect);
    net.run(3000 * MS);
    assert!(net.node(suspect).copyset.is_suspect() && net.leader().is_none(), "suspicion survives a restart");
    net.down.clear();
    let leader = net.await_leader(3000);
    load(&mut net, 10);
    assert!(net.node(suspect).copyset.applied_index() < net.node(leader).copyset.applied_index());
    let others =
        (1..=3).filter(|&p| p != suspect).map(|p| (net.nodes[&p].copyset.term(), net.nodes[&p].copyset.last_index()));
    let (term, index) = others.fold((0, 0), |a, b| (a.0.max(b.0), a.1.max(b.1)));
    net.node(suspect).copyset.suspect_until(term, index);
    net.run(200 * MS);
    load(&mut net, 5);
    net.run(200 * MS);
    assert!(!net.node(suspect).copyset.is_suspect());
    net.crash(suspect);
    assert!(!net.node(suspect).copyset.is_suspect(), "what is over is over after a restart, too");
    net.converge(3000);
    net.assert_clean();
}

#[test]
fn what_is_held_back_does_not_lead() {
    let mut net = Net::new(3, 80);
    let leader = net.await_leader(3000);
    let held = (1..=3).find(|&p| p != leader).unwrap();
    net.node(held).copyset.hold_back(true);
    let node = net.node(leader);
    node.copyset.transfer_leader(node.now, held).unwrap();
    net.run(1000 * MS);
    assert_eq!(net.leader(), Some(leader));
    for seed in 0..3 {
        net.down = [leader].into();
        let next = net.await_leader(4000);
        assert_ne!(next, held, "{seed}");
        net.converge(4000);
        net.node(held).copyset.hold_back(true);
        if net.leader() != Some(leader) {
            let node = net.node(next);
            let _ = node.copyset.transfer_leader(node.now, leader);
            net.await_that(2000, "the leader again", |net| (net.leader() == Some(leader)).then_some(()));
        }
    }
    net.assert_clean();
}
