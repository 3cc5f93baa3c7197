//! Two of three servers are gone: the third is forced to be the only member, serves, and gets company again.

use super::client::{BLOCK, SUCCESS, pattern};
use super::harness::{BINARY, Lab, Server, text, wait_for};
use super::replicas::Nodes;
use serde_json::{Value, json};
use std::process::Command;

/// A command without a control socket.
fn run(args: &[&str]) -> Result<Value, String> {
    let out = Command::new(BINARY).arg("copyset").args(args).arg("--json").output().unwrap();
    if out.status.success() { Ok(serde_json::from_slice(&out.stdout).unwrap()) } else { Err(text(&out.stderr)) }
}

fn holds(server: &Server<'_>) {
    for chunk in 1..9 {
        wait_for("its leader", || server.client().read(1, chunk, 0, BLOCK).0 == SUCCESS);
        assert!(server.client().data(1, chunk, 0, BLOCK) == pattern(chunk, BLOCK), "chunk {chunk}");
    }
}

#[test]
fn the_last_of_three_servers_goes_on_alone() {
    let nodes = Nodes::new();
    let mut servers: Vec<Option<Server<'_>>> = nodes.labs.iter().map(|lab| Some(lab.start())).collect();
    nodes.create();
    let leader = nodes.leader(1, None);
    let (last, other) = ((leader + 1) % 3, (leader + 2) % 3);
    // What is answered now only the leader and the last one have.
    servers[other].take().unwrap().kill();
    for chunk in 1..9 {
        let lead = servers[leader].as_ref().unwrap();
        wait_for("an answer", || lead.client().write(1, chunk, 0, &pattern(chunk, BLOCK)) == SUCCESS);
    }
    servers[leader].take().unwrap().kill();
    let at = nodes.labs[last].address.to_string();
    let peer = nodes.labs[last].peer();
    let reset = |copyset: &str, to: &str| run(&["reset-peer", copyset, to, "--node", &at]);
    assert!(reset("1:9", &peer).unwrap_err().contains("error 2"), "no such copyset");
    assert!(reset("1:1", "0.0.0.0:0").unwrap_err().contains("error 22"), "nobody");
    assert!(reset("1:1", &nodes.labs[leader].peer()).unwrap_err().contains("error 22"), "another one");
    run(&["create", "--first", "7", "--empty-on", &peer]).unwrap();
    assert!(reset("1:7", &peer).unwrap_err().contains("error 1)"), "nothing there could count");
    wait_for("nobody to lead", || nodes.status(last, 1).is_some_and(|seen| seen["state"] != "leader"));
    assert_eq!(nodes.status(last, 1).unwrap()["peers"].as_array().unwrap().len(), 3);
    assert_eq!(reset("1:1", &peer).unwrap(), json!({"reset": [1, 1], "node": at, "peers": [peer]}));
    holds(servers[last].as_ref().unwrap());
    assert_eq!(nodes.status(last, 1).unwrap()["peers"], json!([peer]));
    // The answer was durable.
    servers[last].take().unwrap().kill();
    servers[last] = Some(nodes.labs[last].start_unled());
    holds(servers[last].as_ref().unwrap());
    assert_eq!(reset("1:1", &peer).unwrap()["peers"], json!([peer]), "so it is already");

    // One of the others comes back: its replica is of another history, and goes before it is made a member again.
    let back: &Lab = &nodes.labs[other];
    servers[other] = Some(back.start_unled());
    let there = back.address.to_string();
    run(&["delete", "1:1", "--node", &there]).unwrap();
    run(&["create", "--first", "1", "--empty-on", &back.peer()]).unwrap();
    let added = run(&["add-peer", "1:1", &back.peer(), "--node", &at]).unwrap();
    assert_eq!(added["new"].as_array().unwrap().len(), 2, "{added}");
    wait_for("the same state on both", || {
        let seen = [last, other].map(|node| nodes.status(node, 1).unwrap());
        seen[0]["applied"] == seen[1]["applied"] && seen[0]["chunks"] == json!(8) && seen[1]["chunks"] == json!(8)
    });
    holds(servers[last].as_ref().unwrap());
}
