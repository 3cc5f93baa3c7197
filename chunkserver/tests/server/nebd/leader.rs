//! A copyset of two servers that loses one: requests wait as long as it takes, and hold up nothing that is not theirs.

use super::client::{K, Nebd, OK, VOL1, range, setup};
use crate::client::pattern;
use crate::harness::{BINARY, Lab, Setup, wait_for};
use crate::nbd::Nbd;
use crate::upgrade::upgrade;
use crate::upgrade_failures::fails;
use rustix::process::Signal;
use std::time::{Duration, Instant};

/// Make `lab` the leader of 1:1.
fn lead(lab: &Lab) {
    let (peer, node) = (lab.peer(), lab.address.to_string());
    wait_for("the leader", || {
        let status = lab.cli(&["copyset", "status", "1:1", "--json"]);
        let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap_or_default();
        if status["state"] == "leader" {
            return true;
        }
        let leader = status["leader"].as_str().unwrap_or_default().trim_end_matches(":0").to_owned();
        let at = if leader.is_empty() || leader.starts_with("0.") { node.clone() } else { leader };
        drop(lab.cli(&["copyset", "transfer-leader", "1:1", &peer, "--node", &at]));
        std::thread::sleep(Duration::from_millis(100));
        false
    });
}

/// Two servers' disks, the first with part2.
fn two() -> (Lab, Lab) {
    let timeout = "election_timeout_ms = 200\n";
    let mut mine = setup("");
    mine.extra = format!("{timeout}{}", mine.extra);
    (Lab::new(mine), Lab::new(Setup { extra: timeout.into(), ..Setup::default() }))
}

/// A copyset of both, and a volume on it.
fn create(lab: &Lab, other: &Lab) {
    let peers = format!("{},{}", lab.peer(), other.peer());
    lab.ask(&["copyset", "create", "--pool", "1", "--first", "1", "--count", "1", "--peers", &peers]);
    lab.ask(&["volume", "create", "--name", "vol1", "--size", "4MiB", "--copysets", "1:1"]);
}

#[test]
fn a_leader_without_its_majority() {
    let (lab, other) = two();
    let (mut server, mut peer) = (lab.start(), other.start());
    create(&lab, &other);
    let mut client = Nebd::connect(&lab);
    let fd = client.open(VOL1);
    for round in 0..2u64 {
        lead(&lab);
        assert_eq!(client.write(fd, 0, &pattern(round, K)), OK);
        peer.kill();
        let hanging = client.begin("Write", &range(fd, 4096, 4096), &pattern(round + 10, K));
        client.expect_silence();
        assert!(client.info(fd).is_some() && client.plain("Flush", fd) == OK, "what needs no leader is answered");
        // A client that gives up leaves nothing behind.
        let mut gone = Nebd::connect(&lab);
        for i in 0..32 {
            gone.begin("Write", &range(fd, 8192 + i * 4096, 4096), &pattern(i, K));
        }
        gone.expect_silence();
        drop(gone);
        std::thread::sleep(Duration::from_millis(1500));
        client.expect_silence();
        if round == 1 {
            // The end does not wait for a majority.
            let begun = Instant::now();
            server.signal(Signal::TERM);
            assert!(server.wait().success());
            assert!(begun.elapsed() < Duration::from_secs(10));
            client.expect_close();
            return;
        }
        peer = other.start_unled();
        lead(&lab);
        let answer = client.try_receive().unwrap();
        assert_eq!((answer.cid, answer.status()), (hanging, OK));
        assert_eq!(client.read(fd, 4096, 4096), (OK, pattern(round + 10, K)));
        let mut again = Nebd::connect(&lab);
        assert_eq!(again.write(fd, 8192, &pattern(99, K)), OK, "what the dead left does not bar the way");
        assert_eq!(client.read(fd, 8192, 4096), (OK, pattern(99, K)));
    }
}

/// What waits for a leader may wait for ever: its client sends it again to the new process, or it goes on in the old one.
#[test]
fn a_hand_over_does_not_wait_for_a_leader() {
    let (lab, other) = two();
    let (mut server, peer) = (lab.start(), other.start());
    create(&lab, &other);
    lead(&lab);
    let mut client = Nebd::connect(&lab);
    let fd = client.open(VOL1);
    assert_eq!(client.write(fd, 0, &pattern(1, K)), OK);
    peer.kill();
    let hanging = client.begin("Write", &range(fd, 4096, 4096), &pattern(2, K));
    std::thread::sleep(Duration::from_millis(1500));
    // A user of the volume over NBD is not made to connect anew.
    let mut volume = Nbd::open(&lab, "vol1");
    let peer = std::thread::scope(|scope| {
        let read = scope.spawn(|| volume.read(0, K));
        std::thread::sleep(Duration::from_millis(300));
        assert!(fails(&lab, BINARY).contains("did not end in time"));
        client.expect_silence();
        let peer = other.start_unled();
        assert_eq!(read.join().unwrap(), (0, pattern(1, K)));
        peer
    });
    let answer = client.try_receive().unwrap();
    assert_eq!((answer.cid, answer.status()), (hanging, OK), "it went on");
    lead(&lab);
    peer.kill();
    client.begin("Write", &range(fd, 8192, 4096), &pattern(3, K));
    std::thread::sleep(Duration::from_millis(1500));
    let (heir, _) = upgrade(&lab);
    assert!(server.wait().success());
    client.expect_close();
    let peer = other.start_unled();
    lead(&lab);
    let mut client = Nebd::connect(&lab);
    assert_eq!(client.write(fd, 8192, &pattern(3, K)), OK);
    assert_eq!(client.read(fd, 4096, 4096), (OK, pattern(2, K)));
    heir.end(Signal::TERM);
    peer.stop();
}
