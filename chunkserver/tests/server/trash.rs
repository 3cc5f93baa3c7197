//! Deleted copysets: gone for everybody at once, their chunks for good only after a while.

use super::cli::refused;
use super::client::{BLOCK, NO_CHUNK, NO_COPYSET, SUCCESS, pattern};
use super::harness::{Lab, Server, Setup, text, wait_for};
use serde_json::{Value, json};

fn sum(lab: &Lab, key: &str) -> u64 {
    lab.ask(&["status"])["shards"].as_array().unwrap().iter().map(|shard| shard[key].as_u64().unwrap()).sum()
}

/// Slots nobody uses.
fn free(lab: &Lab) -> u64 {
    sum(lab, "slots_free") + lab.ask(&["status"])["slots_unclaimed"].as_u64().unwrap()
}

/// State of copyset 1:1, if there is one.
fn state(lab: &Lab) -> Option<String> {
    let list = lab.ask(&["copyset", "list"]);
    let found = list.as_array().unwrap().iter().find(|c| c["copyset"] == 1)?;
    found["state"].as_str().map(str::to_owned)
}

fn create(lab: &Lab) {
    lab.ask(&["copyset", "create", "--first", "1"]);
    lab.wait_led();
}

fn keep(seconds: u32) -> Setup {
    Setup { extra: format!("trash_expire_s = {seconds}"), ..Setup::default() }
}

#[test]
fn what_is_deleted_is_kept_for_a_while() {
    let lab = Lab::new(keep(3600));
    let server = lab.start();
    create(&lab);
    let all = free(&lab);
    for chunk in 1..4 {
        assert_eq!(server.client().write(1, chunk, 0, &pattern(chunk, BLOCK)), SUCCESS);
    }
    lab.ask(&["copyset", "delete", "1:1"]);
    assert_eq!(server.client().read(1, 1, 0, BLOCK).0, NO_COPYSET);
    assert_eq!(server.client().write(1, 1, 0, &pattern(1, BLOCK)), NO_COPYSET);
    assert_eq!((state(&lab).as_deref(), sum(&lab, "copysets"), sum(&lab, "chunks")), (Some("trash"), 0, 0));
    assert_eq!((sum(&lab, "trashed"), free(&lab)), (3, all - 3));
    // A crash does not bring it back, nor take its chunks away.
    server.kill();
    let server = lab.start();
    assert_eq!(server.client().read(1, 1, 0, BLOCK).0, NO_COPYSET);
    assert_eq!((state(&lab).as_deref(), sum(&lab, "trashed")), (Some("trash"), 3));
    assert!(
        !lab.cli(&["volume", "create", "--name", "v", "--size", "4MiB"]).status.success(),
        "there is none to be used"
    );
    // Created anew it knows nothing of its former life; also after another crash.
    create(&lab);
    assert_eq!((state(&lab).as_deref(), sum(&lab, "trashed")), (Some("leader"), 0));
    assert_eq!(server.client().read(1, 1, 0, BLOCK).0, NO_CHUNK);
    assert_eq!(server.client().write(1, 9, 0, &pattern(9, BLOCK)), SUCCESS);
    server.kill();
    let server = lab.start();
    assert_eq!(server.client().read(1, 1, 0, BLOCK).0, NO_CHUNK);
    assert!(server.client().data(1, 9, 0, BLOCK) == pattern(9, BLOCK));
    // Deleted twice it is gone; its slots come back.
    lab.ask(&["copyset", "delete", "1:1"]);
    lab.ask(&["copyset", "delete", "1:1"]);
    assert_eq!((state(&lab), sum(&lab, "trashed")), (None, 0));
    create(&lab);
    assert_eq!(server.client().write(1, 1, 0, &pattern(1, BLOCK)), SUCCESS);
    wait_for("the slots, with the next round of write-back", || free(&lab) == all - 1);
    server.stop();

    // Time does it too, also time that passes while the server is down.
    let lab = Lab::new(keep(1));
    let server = lab.start();
    create(&lab);
    assert_eq!(server.client().write(1, 1, 0, &pattern(1, BLOCK)), SUCCESS);
    lab.ask(&["copyset", "delete", "1:1"]);
    wait_for("the end of its time", || state(&lab).is_none() && sum(&lab, "trashed") == 0);
    create(&lab);
    assert_eq!(server.client().write(1, 1, 0, &pattern(1, BLOCK)), SUCCESS);
    lab.ask(&["copyset", "delete", "1:1"]);
    server.kill();
    let _server = lab.start();
    wait_for("the end of its time after a crash", || state(&lab).is_none());
    let list: Value = lab.ask(&["copyset", "list"]);
    assert_eq!(list, serde_json::json!([]));
}

#[test]
fn what_was_deleted_by_mistake_comes_back() {
    let lab = Lab::new(keep(3600));
    let server = lab.start();
    refused(&lab, &["copyset", "restore", "1:1"], "no such copyset");
    create(&lab);
    refused(&lab, &["copyset", "restore", "1:1"], "not in the trash");
    for chunk in 1..4 {
        assert_eq!(server.client().write(1, chunk, 0, &pattern(chunk, BLOCK)), SUCCESS);
    }
    let whole = |server: &Server<'_>| {
        wait_for("its leader", || server.client().read(1, 1, 0, BLOCK).0 == SUCCESS);
        (1..4).for_each(|chunk| assert!(server.client().data(1, chunk, 0, BLOCK) == pattern(chunk, BLOCK)));
        assert_eq!((state(&lab).as_deref(), sum(&lab, "trashed"), sum(&lab, "chunks")), (Some("leader"), 0, 3));
    };
    lab.ask(&["copyset", "delete", "1:1"]);
    let out = lab.cli(&["copyset", "restore", "1:1"]);
    assert!(out.status.success() && text(&out.stdout).contains("restored"), "{}", text(&out.stderr));
    whole(&server);
    // Also after the server was killed, in the trash and out of it.
    lab.ask(&["copyset", "delete", "1:1"]);
    server.kill();
    let server = lab.start();
    assert_eq!(lab.ask(&["copyset", "restore", "1:1"]), json!({"restored": [1, 1]}));
    server.kill();
    let server = lab.start();
    whole(&server);
    // What was created anew in its place is another, and what left the trash is gone.
    lab.ask(&["copyset", "delete", "1:1"]);
    create(&lab);
    refused(&lab, &["copyset", "restore", "1:1"], "not in the trash");
    assert_eq!(server.client().read(1, 1, 0, BLOCK).0, NO_CHUNK);
    lab.ask(&["copyset", "delete", "1:1"]);
    lab.ask(&["copyset", "delete", "1:1"]);
    refused(&lab, &["copyset", "restore", "1:1"], "no such copyset");
}
