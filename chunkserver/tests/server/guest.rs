//! A C program on the real `libnebd.so` (chunkserver/part1/tests/c/load.c): it writes, reads back what was answered, and
//! must see no failure and no other data, whatever happens to the servers.

use super::client::{BLOCK, pattern};
use super::harness::{Lab, MIB, Server, wait_for};
use super::nbd::Nbd;
use super::nebd::{lab, setup};
use super::replicas::{COPYSETS, Nodes, create_volume};
use super::upgrade::{Heir, is_gone, upgrade};
use rustix::process::Signal;
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// The program, at work; killed when dropped.
struct Guest {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Guest {
    fn start(lab: &Lab, file: &str, blocks: u64, rate: u64) -> Self {
        let part1 = Path::new(env!("CARGO_MANIFEST_DIR")).join("part1");
        // Cargo puts the library beside the tests that depend on its crate.
        let libraries = std::env::current_exe().unwrap().parent().unwrap().to_owned();
        assert!(libraries.join("libnebd.so").exists(), "{} has no libnebd.so", libraries.display());
        let program = lab.path("load");
        let mut cc = Command::new("cc");
        cc.args(["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-O2", "-pthread", "-I"]);
        cc.arg(part1.join("include")).arg(part1.join("tests/c/load.c")).arg("-o").arg(&program);
        cc.arg("-L").arg(&libraries).arg("-lnebd").arg(format!("-Wl,-rpath,{}", libraries.display()));
        assert!(cc.status().unwrap().success());
        let conf = lab.path("nebd-client.conf");
        std::fs::create_dir_all(lab.path("locks")).unwrap();
        let keys = format!(
            "nebdserver.serverAddress={}\nmetacache.fileLockPath={}\nlog.path={}\nrequest.syncRpcMaxRetryTimes=50\n\
             request.rpcRetryIntervalUs=100000\nrequest.rpcRetryMaxIntervalUs=64000000\n\
             request.rpcHostDownRetryIntervalUs=10000\nrequest.rpcHealthCheckIntervalS=1\n\
             request.rpcMaxDelayHealthCheckIntervalMs=100\nheartbeat.intervalS=5\nheartbeat.rpcTimeoutMs=500\n",
            lab.path("nebd.sock").display(),
            lab.path("locks").display(),
            lab.path("client-log").display(),
        );
        std::fs::write(&conf, keys).unwrap();
        let numbers = [blocks.to_string(), "16".into(), rate.to_string()];
        let mut command = Command::new(program);
        command.arg(conf).arg(file).args(numbers).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (input, mut output) = (child.stdin.take(), BufReader::new(child.stdout.take().unwrap()));
        let mut said = String::new();
        output.read_line(&mut said).unwrap();
        assert_eq!(said, "open\n", "{:?}", child.wait());
        Self { child, input, output }
    }

    /// No more requests; when all are answered, what it saw. Nothing failed, and every block was what it should be.
    fn finish(self) -> Value {
        let (content, seen) = self.end();
        println!("{seen}");
        assert!(content, "{seen}");
        assert_eq!((&seen["failed"], &seen["wrong"]), (&0.into(), &0.into()));
        assert!(seen["writes"].as_u64() > Some(100) && seen["checked"].as_u64() > Some(50), "{seen}");
        seen
    }
}

impl Guest {
    /// Whether it is content, and what it saw.
    fn end(mut self) -> (bool, Value) {
        drop(self.input.take());
        let mut said = String::new();
        self.output.read_to_string(&mut said).unwrap();
        let content = self.child.wait().unwrap().success();
        (content, serde_json::from_str(&said).unwrap())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn moment() {
    std::thread::sleep(Duration::from_millis(300));
}

#[test]
fn part2_is_killed_and_handed_over() {
    let lab = lab("");
    let mut server = lab.start();
    let guest = Guest::start(&lab, "cbd:pool1//vol1_user_", 1024, 0);
    for _ in 0..3 {
        moment();
        server.kill();
        server = lab.start();
    }
    let mut heir: Option<Heir> = None;
    for _ in 0..2 {
        moment();
        let next = upgrade(&lab).0;
        match heir.replace(next) {
            None => assert!(server.wait().success()),
            Some(old) => wait_for("the end of the old process", || old.is_gone()),
        }
    }
    moment();
    let seen = guest.finish();
    assert!(seen["retried"].as_u64() >= Some(5), "it was under load each time: {seen}");
    heir.unwrap().end(Signal::TERM);
}

/// What the other tests rest on.
#[test]
fn a_lost_block_is_noticed() {
    let lab = lab("");
    let server = lab.start();
    let guest = Guest::start(&lab, "cbd:pool1//vol1_user_", 1024, 1000);
    moment();
    assert_eq!(Nbd::open(&lab, "vol1").zero(0, 1024 * BLOCK), 0);
    let (content, seen) = guest.end();
    assert!(!content && seen["wrong"].as_u64() > Some(50) && seen["failed"] == 0, "{seen}");
    server.stop();
}

/// Three servers with replicas, and one without a disk that exports them, for NBD and NEBD.
struct Cluster {
    nodes: Nodes,
    exporter: Lab,
}

impl Cluster {
    fn new() -> Self {
        Self { nodes: Nodes::new(), exporter: Lab::exporter(setup("")) }
    }

    fn create(&self) {
        self.nodes.create();
        create_volume(&self.exporter, &self.nodes);
        (1..=COPYSETS).for_each(|copyset| self.nodes.lead(copyset, 0));
    }

    /// Blocks of the volume that the guest writes: all but its last MiB.
    fn guest(&self) -> Guest {
        Guest::start(&self.exporter, "cbd:pool//v_user_", 11 * MIB / BLOCK as u64, 500)
    }

    /// Until a node has applied what is committed now: before that the loss of another may stop a copyset.
    fn wait_caught_up(&self, node: usize) {
        for copyset in 1..=COPYSETS {
            let leader = self.nodes.leader(copyset, None);
            let committed = self.nodes.status(leader, copyset).unwrap()["committed"].as_u64().unwrap();
            wait_for("the node to catch up", || {
                self.nodes.status(node, copyset).is_some_and(|seen| seen["applied"].as_u64() >= Some(committed))
            });
        }
    }
}

/// The leader of everything is upgraded, then a follower, then the exporter: nobody sees more than a pause.
#[test]
fn replicas_are_upgraded_one_by_one() {
    let cluster = Cluster::new();
    let mut servers: Vec<Server<'_>> = cluster.nodes.labs.iter().map(Lab::start).collect();
    let mut export = cluster.exporter.start();
    cluster.create();
    let guest = cluster.guest();
    let (stop, writes) = (AtomicBool::new(false), AtomicU64::new(0));
    let heirs = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut volume = Nbd::open(&cluster.exporter, "v");
            while !stop.load(Ordering::Relaxed) {
                let version = writes.load(Ordering::Relaxed) + 1;
                let at = 11 * MIB + version % 64 * BLOCK as u64;
                assert_eq!(volume.write(at, &pattern(version, BLOCK)), 0);
                assert!(volume.read(at, BLOCK) == (0, pattern(version, BLOCK)), "version {version}");
                writes.store(version, Ordering::Relaxed);
            }
        });
        let progress = |what: &str| {
            let before = writes.load(Ordering::Relaxed);
            wait_for(what, || writes.load(Ordering::Relaxed) > before + 20 || writer.is_finished());
        };
        progress("writes");
        let mut heirs = Vec::new();
        for node in [0, 1] {
            let old = servers[node].pid();
            heirs.push(upgrade(&cluster.nodes.labs[node]).0);
            wait_for("the end of the old process", || is_gone(old));
            cluster.wait_caught_up(node);
            progress("writes after an upgrade");
        }
        heirs.push(upgrade(&cluster.exporter).0);
        progress("writes through the new exporter");
        stop.store(true, Ordering::Relaxed);
        writer.join().unwrap();
        heirs
    });
    guest.finish();
    assert!(export.wait().success());
    assert!(servers[0].wait().success() && servers[1].wait().success());
    for heir in heirs {
        heir.end(Signal::TERM);
    }
}

/// Two of three are gone, the leader of everything among them, with writes in the middle: these wait, longer than any
/// time-out of a single call, and end when the servers are back. (A whole minute: `scripts/part2 minute`.)
#[test]
fn writes_wait_for_a_leader_that_is_gone_for_long() {
    const GONE: Duration = Duration::from_secs(4);
    let cluster = Cluster::new();
    let mut servers: Vec<Option<Server<'_>>> = cluster.nodes.labs.iter().map(|lab| Some(lab.start())).collect();
    let export = cluster.exporter.start();
    cluster.create();
    let guest = cluster.guest();
    moment();
    for node in [0, 1] {
        servers[node].take().unwrap().kill();
    }
    std::thread::sleep(GONE);
    for node in [0, 1] {
        servers[node] = Some(cluster.nodes.labs[node].start_unled());
    }
    (1..=COPYSETS).for_each(|copyset| _ = cluster.nodes.leader(copyset, None));
    moment();
    let seen = guest.finish();
    assert!(seen["longest_ms"].as_f64().unwrap() >= GONE.as_millis() as f64, "writes were in flight: {seen}");
    assert_eq!(seen["retried"], 0, "part2 kept them, and its connection");
    let log = cluster.exporter.log();
    assert!(!log.contains("parked"), "a leader that is away is no failure: {log}");
    // The end of part2 does not wait for them either.
    let guest = cluster.guest();
    moment();
    for node in [0, 1] {
        servers[node].take().unwrap().kill();
    }
    moment();
    assert!(export.stop() < Duration::from_secs(10));
    drop(guest);
}
