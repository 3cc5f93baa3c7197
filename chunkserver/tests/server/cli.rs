//! The commands, each for people and as JSON.

use super::client::{BLOCK, SUCCESS, pattern};
use super::harness::{BINARY, Lab, MIB, Setup, text, wait_for};
use serde_json::{Value, json};
use std::process::Command;

/// Runs it both ways: text with these words, JSON to look at.
fn both(lab: &Lab, args: &[&str], words: &[&str]) -> Value {
    let out = lab.cli(args);
    let said = text(&out.stdout);
    assert!(out.status.success(), "{args:?}: {}", text(&out.stderr));
    assert!(words.iter().all(|word| said.contains(word)), "{args:?}: {words:?} in\n{said}");
    assert!(!said.trim_start().starts_with(['{', '[']), "{args:?} is for people:\n{said}");
    lab.ask(args)
}

/// Refused, with these words in one line.
pub(super) fn refused(lab: &Lab, args: &[&str], words: &str) {
    let out = lab.cli(args);
    let said = text(&out.stderr);
    assert!(!out.status.success() && said.contains(words) && said.trim_end().lines().count() == 1, "{args:?}: {said}");
}

#[test]
fn copysets_and_status() {
    let lab = Lab::new(Setup::default());
    let server = lab.start();
    assert_eq!(both(&lab, &["copyset", "list"], &["(none)"]), json!([]));
    let created = lab.cli(&["copyset", "create", "--pool", "1", "--first", "1", "--count", "2"]);
    assert!(created.status.success() && text(&created.stdout).contains("created"));
    let created = lab.ask(&["copyset", "create", "--pool", "7", "--first", "3"]);
    assert_eq!(created, json!({"created": [[7, 3]]}));
    refused(&lab, &["copyset", "create", "--pool", "7", "--first", "3"], "7:3");
    lab.wait_led();
    let list = both(&lab, &["copyset", "list"], &["pool", "copyset", "leader", &lab.peer()]);
    assert_eq!(list.as_array().unwrap().len(), 3);
    let one = both(&lab, &["copyset", "status", "7:3"], &["leader"]);
    assert_eq!((&one["pool"], &one["copyset"], &one["state"]), (&json!(7), &json!(3), &json!("leader")));
    assert_eq!(one["peers"], json!([lab.peer()]));
    refused(&lab, &["copyset", "status", "7:4"], "no such copyset");
    refused(&lab, &["copyset", "status", "seven"], "POOL:ID");
    assert_eq!(server.client().write(1, 1, 0, &pattern(1, BLOCK)), SUCCESS);
    let status = both(&lab, &["status"], &["version", "peer", "shards", "slots", &lab.peer()]);
    assert_eq!(status["pid"], json!(server.pid()));
    assert_eq!(status["shards"].as_array().unwrap().len(), 2);
    let sum = |key: &str| status["shards"].as_array().unwrap().iter().map(|s| s[key].as_u64().unwrap()).sum::<u64>();
    assert_eq!((sum("copysets"), sum("leaders"), sum("chunks")), (3, 3, 1));
    // Deleting one takes its chunks along.
    assert_eq!(lab.ask(&["copyset", "delete", "1:1"]), json!({"deleted": [1, 1]}));
    assert_eq!(server.client().read(1, 1, 0, BLOCK).0, super::client::NO_COPYSET);
    assert_eq!(lab.ask(&["copyset", "delete", "1:1"]), json!({"deleted": [1, 1]}), "out of the trash");
    refused(&lab, &["copyset", "delete", "1:1"], "no such copyset");
    let out = lab.cli(&["copyset", "delete", "7:3"]);
    assert!(out.status.success() && text(&out.stdout).contains("deleted"));
    // Re-created, it knows nothing of its former life; also after a kill.
    lab.ask(&["copyset", "create", "--pool", "1", "--first", "1"]);
    lab.wait_led();
    assert_eq!(server.client().read(1, 1, 0, BLOCK).0, super::client::NO_CHUNK);
    server.kill();
    let server = lab.start();
    assert_eq!(server.client().read(1, 1, 0, BLOCK).0, super::client::NO_CHUNK);
    let list = lab.ask(&["copyset", "list"]);
    assert_eq!(list.as_array().unwrap().iter().map(|c| &c["state"]).collect::<Vec<_>>(), ["leader", "leader", "trash"]);
}

#[test]
fn volumes() {
    let lab = Lab::new(Setup::default());
    let server = lab.start();
    assert_eq!(both(&lab, &["volume", "list"], &["(none)"]), json!([]));
    refused(&lab, &["volume", "create", "--name", "v", "--size", "8MiB"], "copyset");
    lab.copysets(4);
    let out = lab.cli(&["volume", "create", "--name", "a", "--size", "8MiB"]);
    assert!(out.status.success() && text(&out.stdout).contains('a'), "{}", text(&out.stderr));
    let striped =
        ["volume", "create", "--name", "b", "--size", "16MiB", "--copysets", "1:1-3", "--stripe-unit", "64KiB"];
    let b = lab.ask(&[&striped[..], &["--stripe-count", "2"]].concat());
    assert_eq!(b["copysets"], json!([[1, 1], [1, 2], [1, 3]]));
    assert_eq!((&b["stripe_unit"], &b["stripe_count"], &b["size"]), (&json!(65536), &json!(2), &json!(16 * MIB)));
    for (args, words) in [
        (&["--name", "a", "--size", "8MiB"][..], "a"),
        (&["--name", "c", "--size", "1000"], "1000"),
        (&["--name", "c", "--size", "0"], "0"),
        (&["--name", "", "--size", "8MiB"], "name"),
        (&["--name", "c", "--size", "8MiB", "--copysets", "1:9"], "1:9"),
        (&["--name", "c", "--size", "8MiB", "--copysets", "nine"], "POOL:ID"),
        (&["--name", "c", "--size", "8MiB", "--stripe-unit", "64KiB"], "stripe"),
    ] {
        refused(&lab, &[&["volume", "create"], args].concat(), words);
    }
    let list = both(&lab, &["volume", "list"], &["name", "size", "a", "b"]);
    assert_eq!(list.as_array().unwrap().iter().map(|v| v["name"].as_str().unwrap()).collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(lab.ask(&["volume", "resize", "--name", "a", "--size", "12MiB"])["size"], json!(12 * MIB));
    refused(&lab, &["volume", "resize", "--name", "a", "--size", "8MiB"], "");
    refused(&lab, &["volume", "resize", "--name", "zz", "--size", "8MiB"], "zz");
    refused(&lab, &["copyset", "delete", "1:1"], "uses this copyset");
    assert_eq!(lab.ask(&["status"])["volumes"], json!(2));
    // The catalog outlives a kill.
    server.kill();
    let _server = lab.start();
    assert_eq!(lab.ask(&["volume", "list"]).as_array().unwrap().len(), 2);
    assert_eq!(lab.ask(&["volume", "delete", "--name", "b"]), json!({"deleted": "b"}));
    let out = lab.cli(&["volume", "delete", "--name", "a"]);
    assert!(out.status.success() && text(&out.stdout).contains("deleted"));
    refused(&lab, &["volume", "delete", "--name", "a"], "a");
    assert_eq!(lab.ask(&["volume", "list"]), json!([]));
}

#[test]
fn inspect_says_whether_the_disk_is_served() {
    let lab = Lab::new(Setup::default());
    let look = || {
        let out = Command::new(BINARY).arg("inspect").arg(lab.disk()).output().unwrap();
        assert!(out.status.success(), "{}", text(&out.stderr));
        text(&out.stdout)
    };
    assert!(look().contains("no server has this disk"));
    let fresh = lab.inspect();
    assert_eq!((&fresh["serving"], &fresh["superblock"]["shards"]), (&json!(false), &json!(2)));
    let server = lab.start();
    lab.copysets(3);
    assert_eq!(server.client().write(1, 1, 0, &pattern(1, BLOCK)), SUCCESS);
    lab.wait_written_back(&[1]);
    let busy = lab.inspect();
    assert_eq!(busy["serving"], json!(true));
    assert!(
        busy["note"].as_str().unwrap().contains("a server has this disk") && look().contains("a server has this disk")
    );
    assert_eq!(busy["copysets"].as_array().unwrap().len(), 3);
    let chunks = busy["copysets"].as_array().unwrap().iter().map(|c| c["chunks"].as_u64().unwrap()).sum::<u64>();
    assert_eq!(chunks, 1);
    assert_eq!(server.client().data(1, 1, 0, BLOCK), pattern(1, BLOCK), "it does not mind being looked at");
    server.stop();
    let before = std::fs::metadata(lab.disk()).unwrap().modified().unwrap();
    // The kernel may keep the lock of a process that is gone for a moment.
    wait_for("the lock", || lab.inspect()["serving"] == json!(false));
    assert_eq!(std::fs::metadata(lab.disk()).unwrap().modified().unwrap(), before, "read-only");
}

#[test]
fn log_level_at_run_time() {
    let lab = Lab::new(Setup::default());
    let server = lab.start();
    let closed = |lab: &Lab| lab.log().matches("closing a connection").count();
    let provoke = || {
        let mut client = server.client();
        client.send(b"nonsense, and more of it");
        client.expect_close();
    };
    provoke();
    assert_eq!(closed(&lab), 0, "info says nothing of that");
    assert_eq!(lab.ask(&["log-level", "info,chunkserver=debug"]), json!({"log": "info,chunkserver=debug"}));
    wait_for("the line", || {
        provoke();
        closed(&lab) > 0
    });
    let out = lab.cli(&["log-level", "info"]);
    assert!(out.status.success() && text(&out.stdout).contains("info"));
    refused(&lab, &["log-level", "chunkserver=loud"], "loud");
    let seen = closed(&lab);
    provoke();
    assert_eq!(closed(&lab), seen);
    assert!(!lab.log().contains('\x1b'), "no colours in a file");
}

#[test]
fn without_a_server() {
    let lab = Lab::new(Setup::default());
    for args in [&["status"][..], &["volume", "list"], &["copyset", "list"], &["log-level", "info"]] {
        refused(&lab, args, "no server answers at");
    }
    let out = Command::new(BINARY).arg("frobnicate").output().unwrap();
    assert_eq!(out.status.code(), Some(2));
    assert!(text(&Command::new(BINARY).arg("--version").output().unwrap().stdout).starts_with("chunkserver "));
}
