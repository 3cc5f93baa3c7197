//! Volumes whose copysets have three replicas: through a server without a disk, through one that leads nothing, and while
//! the leaders are killed, paused and moved.

use super::client::{BLOCK, FAILURE, SUCCESS, chunk_request, pattern};
use super::harness::{BINARY, Lab, MIB, PATIENCE, Server, Setup, http, text, wait_for};
use super::nbd::Nbd;
use rustix::process::Signal;
use serde_json::Value;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

pub(super) const COPYSETS: u32 = 3;

fn setup() -> Setup {
    Setup { extra: "election_timeout_ms = 300".into(), ..Setup::default() }
}

/// Three nodes with disks.
pub(super) struct Nodes {
    pub(super) labs: Vec<Lab>,
}

impl Nodes {
    pub(super) fn new() -> Self {
        Self { labs: (0..3).map(|_| Lab::new(setup())).collect() }
    }

    fn peers(&self) -> String {
        self.labs.iter().map(Lab::peer).collect::<Vec<_>>().join(",")
    }

    /// Copysets of all three, each with a leader.
    pub(super) fn create(&self) {
        let count = COPYSETS.to_string();
        self.labs[0].ask(&[
            "copyset",
            "create",
            "--pool",
            "1",
            "--first",
            "1",
            "--count",
            &count,
            "--peers",
            &self.peers(),
        ]);
        for copyset in 1..=COPYSETS {
            self.leader(copyset, None);
        }
    }

    pub(super) fn status(&self, node: usize, copyset: u32) -> Option<Value> {
        let lab = &self.labs[node];
        let out = Command::new(BINARY)
            .args(["copyset", "status", &format!("1:{copyset}"), "--json", "--node", &lab.address.to_string()])
            .output()
            .unwrap();
        serde_json::from_slice(&out.stdout).ok()
    }

    /// Who leads, apart from `but`.
    pub(super) fn leader(&self, copyset: u32, but: Option<usize>) -> usize {
        let mut leader = None;
        wait_for("a leader", || {
            let leads = |&node: &usize| self.status(node, copyset).is_some_and(|seen| seen["state"] == "leader");
            leader = (0..3).filter(|&node| Some(node) != but).find(leads);
            leader.is_some()
        });
        leader.unwrap()
    }

    pub(super) fn lead(&self, copyset: u32, node: usize) {
        let (set, peer) = (format!("1:{copyset}"), self.labs[node].peer());
        wait_for("the leader to move", || {
            if self.status(node, copyset).is_some_and(|seen| seen["state"] == "leader") {
                return true;
            }
            let at = self.labs[node].address.to_string();
            let _ = self.labs[node].cli(&["copyset", "transfer-leader", &set, &peer, "--node", &at]);
            false
        });
    }
}

pub(super) fn create_volume(lab: &Lab, nodes: &Nodes) -> Value {
    let (peers, sets) = (nodes.peers(), format!("1:1-{COPYSETS}"));
    lab.ask(&[
        "volume",
        "create",
        "--name",
        "v",
        "--size",
        "12MiB",
        "--copysets",
        &sets,
        "--peers",
        &peers,
        "--chunk-size",
        "1MiB",
    ])
}

#[test]
fn a_server_without_a_disk_exports_what_others_lead() {
    let nodes = Nodes::new();
    let servers: Vec<Server<'_>> = nodes.labs.iter().map(Lab::start).collect();
    nodes.create();
    (1..=COPYSETS).for_each(|copyset| nodes.lead(copyset, copyset as usize % 3));
    let lab = Lab::exporter(setup());
    let export = lab.start();
    let out = lab.cli(&["volume", "create", "--name", "v", "--size", "12MiB", "--copysets", "1:1-3"]);
    assert!(text(&out.stderr).contains("--peers"), "{}", text(&out.stderr));
    let created = create_volume(&lab, &nodes);
    assert_eq!(created["servers"].as_array().unwrap().len(), 3, "{created}");
    let mut volume = Nbd::open(&lab, "v");
    assert_eq!(volume.size, 12 * MIB);
    assert_eq!(volume.read(5 * MIB, 4 * BLOCK), (0, vec![0; 4 * BLOCK]), "never written");
    let data = pattern(1, 3 * MIB as usize);
    let at = MIB / 2;
    assert_eq!(volume.write(at, &data), 0);
    assert!(volume.read(at, data.len()) == (0, data.clone()));
    assert_eq!(volume.zero(at + MIB, 2 * BLOCK), 0);
    let mut expected = data.clone();
    expected[MIB as usize..MIB as usize + 2 * BLOCK].fill(0);
    assert!(volume.read(at, data.len()) == (0, expected.clone()));
    // The leaders move; whoever asks is sent after them.
    for copyset in 1..=COPYSETS {
        nodes.lead(copyset, (copyset as usize + 1) % 3);
    }
    assert!(volume.read(at, data.len()) == (0, expected.clone()));
    assert_eq!(volume.write(at, &data[..BLOCK]), 0);
    let page = http(lab.address, "/metrics").unwrap();
    assert!(page.contains("remote_request_num"), "{page}");
    let status = lab.ask(&["status"]);
    assert_eq!((&status["slots"], &status["volumes"]), (&0.into(), &1.into()));
    assert_eq!(lab.ask(&["copyset", "list"]), serde_json::json!([]));
    assert!(!lab.cli(&["copyset", "create", "--first", "9"]).status.success(), "it has no place for one");
    // The catalog is its own; after a restart all is as before.
    export.kill();
    let export = lab.start();
    assert!(Nbd::open(&lab, "v").read(at, data.len()) == (0, expected.clone()));
    // A node with replicas serves them wherever they lead: the same chunks, by another description.
    let id = created["id"].to_string();
    let own = ["volume", "create", "--name", "v", "--size", "12MiB", "--copysets", "1:1-3", "--id", &id];
    let own = nodes.labs[0].ask(&own);
    assert_eq!((&own["id"], own["servers"].as_array().unwrap().len()), (&created["id"], 3));
    assert!(Nbd::open(&nodes.labs[0], "v").read(at, data.len()) == (0, expected));
    let (_, seen) = Nbd::open(&nodes.labs[0], "v").read(at, BLOCK);
    assert!(seen == data[..BLOCK]);
    // Deleting it deletes the chunks, on whoever leads.
    lab.ask(&["volume", "delete", "--name", "v"]);
    let chunks = |node: usize| {
        let status = nodes.labs[node].ask(&["status"]);
        status["shards"].as_array().unwrap().iter().map(|s| s["chunks"].as_u64().unwrap()).sum::<u64>()
    };
    wait_for("the chunks to go", || (0..3).all(|node| chunks(node) == 0));
    export.stop();
    for server in servers {
        server.stop();
    }
}

/// What our own clients say of a change that they may send again (docs/wire.md).
#[test]
fn an_outdated_change_is_refused() {
    let lab = Lab::new(Setup::default());
    let server = lab.start();
    lab.copysets(1);
    let mut client = server.client();
    let term = lab.ask(&["copyset", "status", "1:1"])["term"].as_u64().unwrap();
    let mut write = |version: u64, attempt: u64, term: u64| {
        let guarded =
            chunk_request(2, 1, 5, 0, BLOCK as u64, 1).int(1001, term).int(1002, 99).int(1003, 7).int(1004, attempt);
        client.chunk_call("WriteChunk", &guarded, &pattern(version, BLOCK)).status()
    };
    const REDIRECTED: u64 = 1;
    assert_eq!(write(1, 0, term + 1), REDIRECTED, "it was meant for another term");
    assert_eq!(write(1, 0, term - 1), REDIRECTED);
    assert_eq!(write(2, 1, term), SUCCESS);
    assert_eq!(write(3, 0, term), FAILURE, "a later attempt came before");
    assert_eq!(write(4, 1, 0), SUCCESS, "any term");
    assert!(server.client().data(1, 5, 0, BLOCK) == pattern(4, BLOCK));
}

#[test]
fn nobody_is_told_that_a_leader_died() {
    let nodes = Nodes::new();
    let mut servers: Vec<Option<Server<'_>>> = nodes.labs.iter().map(|lab| Some(lab.start())).collect();
    nodes.create();
    let lab = Lab::exporter(setup());
    let export = lab.start();
    create_volume(&lab, &nodes);
    let (stop, writes, longest) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let content = |writer: u64, block: u64, version: u64| pattern(writer << 56 | block << 32 | version, BLOCK);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..4u64)
            .map(|writer| {
                let (lab, stop, writes, longest) = (&lab, &stop, &writes, &longest);
                scope.spawn(move || {
                    let mut volume = Nbd::open(lab, "v");
                    let (blocks, mut versions) = (32u64, vec![0u64; 32]);
                    // Every writer has blocks in every chunk, so in every copyset.
                    let place = |block: u64| (block % 12) * MIB + (writer * blocks + block) * BLOCK as u64;
                    let mut step = 0u64;
                    while !stop.load(Ordering::Relaxed) {
                        step += 1;
                        let block = step.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 59;
                        let version = versions[block as usize] + 1;
                        let begun = Instant::now();
                        assert_eq!(volume.write(place(block), &content(writer, block, version)), 0, "no error");
                        longest.fetch_max(begun.elapsed().as_millis() as u64, Ordering::Relaxed);
                        writes.fetch_add(1, Ordering::Relaxed);
                        versions[block as usize] = version;
                        let other = (step * 7) % blocks;
                        let expected = match versions[other as usize] {
                            0 => vec![0; BLOCK],
                            version => content(writer, other, version),
                        };
                        assert!(volume.read(place(other), BLOCK) == (0, expected), "what was acknowledged is read");
                    }
                    (writer, versions)
                })
            })
            .collect();
        let progress = |what: &str| {
            let before = writes.load(Ordering::Relaxed);
            // Each writer at least once more, whichever copyset it is at.
            wait_for(what, || writes.load(Ordering::Relaxed) > before + 40);
        };
        progress("writes");
        for round in 0..3 {
            let leader = nodes.leader(round % COPYSETS + 1, None);
            servers[leader].take().unwrap().kill();
            progress("writes without the killed leader");
            servers[leader] = Some(nodes.labs[leader].start_unled());
            // One that says nothing, and takes everything it is sent.
            let paused = nodes.leader(round % COPYSETS + 1, None);
            servers[paused].as_ref().unwrap().signal(Signal::STOP);
            progress("writes without the paused leader");
            servers[paused].as_ref().unwrap().signal(Signal::CONT);
            progress("writes after the pause");
            for copyset in 1..=COPYSETS {
                nodes.lead(copyset, (round + copyset) as usize % 3);
            }
            progress("writes after the leaders moved");
        }
        stop.store(true, Ordering::Relaxed);
        for (writer, versions) in writers.into_iter().map(|writer| writer.join().unwrap()) {
            let mut volume = Nbd::open(&lab, "v");
            for (block, version) in (0u64..).zip(versions).filter(|(_, version)| *version > 0) {
                let at = (block % 12) * MIB + (writer * 32 + block) * BLOCK as u64;
                assert!(
                    volume.read(at, BLOCK) == (0, content(writer, block, version)),
                    "writer {writer} block {block}"
                );
            }
        }
    });
    println!("{} writes, longest {} ms (patience {PATIENCE:?})", writes.into_inner(), longest.into_inner());
    export.stop();
}

#[test]
fn a_replica_comes_and_goes() {
    let nodes = Nodes::new();
    let servers: Vec<Server<'_>> = nodes.labs.iter().map(Lab::start).collect();
    let [a, b, c] = [0, 1, 2].map(|node: usize| nodes.labs[node].peer());
    let lab = &nodes.labs[0];
    lab.ask(&["copyset", "create", "--first", "1", "--peers", &format!("{a},{b}")]);
    let leader = nodes.leader(1, None);
    // A leader may still have to apply its first entry.
    wait_for("an answer", || servers[leader].client().write(1, 5, 0, &pattern(1, BLOCK)) == SUCCESS);
    lab.ask(&["copyset", "create", "--first", "1", "--empty-on", &c]);
    assert_eq!(nodes.status(2, 1).unwrap()["state"], "passive");
    let at = lab.address.to_string();
    let changed = lab.ask(&["copyset", "add-peer", "1:1", &c, "--node", &at]);
    assert_eq!(changed["new"].as_array().unwrap().len(), 3, "{changed}");
    wait_for("the new member's data", || {
        let seen = nodes.status(2, 1).unwrap();
        seen["peers"].as_array().unwrap().len() == 3 && seen["chunks"] == 1
    });
    // Whom it has mail for is shown, with the state of the connections.
    wait_for("its peers in the status", || {
        let peers = nodes.labs[leader].ask(&["status"])["peers"].clone();
        let up = |peer: &Value| peer["state"] == "up" && peer["links"].as_u64() > Some(0);
        peers.as_array().unwrap().len() == 2 && peers.as_array().unwrap().iter().all(up)
    });
    lab.ask(&["copyset", "remove-peer", "1:1", &c, "--node", &at]);
    let there = nodes.labs[2].address.to_string();
    let deleted = lab.ask(&["copyset", "delete", "1:1", "--node", &there]);
    assert_eq!(deleted["deleted"], serde_json::json!([1, 1]));
    assert!(nodes.status(2, 1).is_none(), "its replica is gone");
    lab.ask(&["copyset", "delete", "1:1", "--node", &there]); // out of the trash
    assert!(!lab.cli(&["copyset", "delete", "1:1", "--node", &there]).status.success(), "there is none any more");
    let leader = nodes.leader(1, None);
    assert!(servers[leader].client().data(1, 5, 0, BLOCK) == pattern(1, BLOCK));
}

#[test]
fn servers_of_two_clusters_do_not_talk() {
    let of = |digit: &str| {
        let extra = format!("election_timeout_ms = 300\ncluster = \"{}\"", digit.repeat(32));
        Lab::new(Setup { extra, ..Setup::default() })
    };
    let (one, two) = (of("1"), of("2"));
    let _servers = [one.start(), two.start()];
    one.ask(&["copyset", "create", "--first", "1", "--peers", &format!("{},{}", one.peer(), two.peer())]);
    wait_for("the refusal to be shown", || {
        let peers = one.ask(&["status"])["peers"].clone();
        let refused =
            |peer: &Value| peer["state"] == "down" && peer["why"].as_str().is_some_and(|why| why.contains("cluster"));
        peers.as_array().unwrap().iter().any(refused)
    });
    assert_eq!(one.ask(&["copyset", "status", "1:1"])["leader"], "0.0.0.0:0:0");
    let page = http(one.address, "/metrics").unwrap();
    let down = page.lines().find(|line| line.contains("peer_down_count") && !line.starts_with('#'));
    assert!(down.is_some_and(|line| !line.ends_with(" 0")), "{down:?}");
}
