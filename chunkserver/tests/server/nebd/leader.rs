//! A copyset of two servers that loses one: requests wait as long as it takes, and hold up nothing that is not theirs.

use super::client::{K, Nebd, OK, VOL1, range, setup};
use crate::client::pattern;
use crate::harness::{Lab, Setup, wait_for};
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

#[test]
fn a_leader_without_its_majority() {
    let timeout = "election_timeout_ms = 200\n";
    let mut mine = setup("");
    mine.extra = format!("{timeout}{}", mine.extra);
    let lab = Lab::new(mine);
    let other = Lab::new(Setup { extra: timeout.into(), ..Setup::default() });
    let (mut server, mut peer) = (lab.start(), other.start());
    let peers = format!("{},{}", lab.peer(), other.peer());
    lab.ask(&["copyset", "create", "--pool", "1", "--first", "1", "--count", "1", "--peers", &peers]);
    lab.ask(&["volume", "create", "--name", "vol1", "--size", "4MiB", "--copysets", "1:1"]);
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
            server.signal(rustix::process::Signal::TERM);
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
