//! A leader that is heard and whose entries nobody takes: followers without room for the chunks that these would create.

#![allow(clippy::unwrap_used)]

mod common;

use common::trio::Trio;

#[test]
fn a_leader_whose_entries_nobody_takes_lets_another_one_lead() {
    for seed in 0..5 {
        let mut group = Trio::new(seed, |config| config);
        group.pass(4);
        let leader = group.leader();
        group.nodes[leader].propose(1, 1).unwrap();
        group.exchange();
        assert_eq!(group.nodes[leader].answered.get(&1), Some(&None), "seed {seed}");
        group.refused = leader as u64 + 1;
        group.nodes[leader].propose(2, 1).unwrap();
        group.pass(8);
        assert_eq!(group.leader(), leader, "seed {seed}: not at once");
        group.pass(8);
        let next = group.leader();
        assert_ne!(next, leader, "seed {seed}");
        assert_eq!(group.nodes[leader].answered.get(&2), Some(&Some(true)), "seed {seed}: it was never committed");
        group.nodes[next].propose(3, 1).unwrap();
        group.exchange();
        assert_eq!(group.nodes[next].answered.get(&3), Some(&None), "seed {seed}: what makes room is committed");
        let applied = |n: &common::Node| n.copyset.applied_index();
        group.pass(1);
        assert!(group.nodes.iter().all(|n| applied(n) == applied(&group.nodes[next])), "seed {seed}");
    }
}

#[test]
fn a_leader_with_work_or_without_stays_as_it_was() {
    let mut group = Trio::new(9, |config| config);
    group.pass(4);
    let (leader, term) = (group.leader(), group.nodes[0].copyset.term());
    group.pass(40);
    assert_eq!((group.leader(), group.nodes[0].copyset.term()), (leader, term));
    for cookie in 0..40 {
        group.nodes[leader].propose(cookie, 1).unwrap();
        group.pass(1);
    }
    assert_eq!((group.leader(), group.nodes[leader].copyset.term()), (leader, term));
}
