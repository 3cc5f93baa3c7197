//! `bench nebd` against a part2 that misbehaves: planted faults are found, legal trouble is not one.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../../chunkserver/part1/tests/fake/mod.rs"]
mod fake;

use bench::nebd::{self, Args};
use bench::report::Report;
use clap::Parser;
use fake::{Act, Fake, KNOOK};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: Args,
}

fn run(fake: &Fake, more: &str) -> anyhow::Result<Report> {
    let conf = fake.conf(&[]).display().to_string();
    let fixed = ["bench", "--conf", &conf, "--file", "cbd:pool//v_u_"];
    nebd::run(&Cli::parse_from(fixed.into_iter().chain(more.split_ascii_whitespace())).args)
}

#[test]
fn a_correct_server_passes_in_every_mode() {
    let fake = Fake::start(|_, _| Act::Serve);
    let report = run(&fake, "--verify --fresh --fill --ops 2000 --mix 50:50 --depth 32 --span 4MiB").unwrap();
    assert!(report.is_clean() && report.failed + report.unanswered == 0, "{report}");
    assert_eq!(report.total.ops, 2000);
    assert!(report.read.ops > 800 && report.write.ops > 800);
    assert!(report.checked_blocks >= 1024 + report.read.ops, "every written block is read at the end");
    let report = run(&fake, "--ops 64 --bs 64k --pattern sequential --mix 100:0 --depth 4 --exclusive false").unwrap();
    assert_eq!((report.read.ops, report.retries), (64, 0));
    assert!(report.client_cpu_us_per_op.is_some() && report.server_cpu_us_per_op.is_some());
    let count = |name: &str| fake.methods().iter().filter(|method| *method == name).count();
    let before = count("Write");
    let report = run(&fake, "--rate 1000 --warmup 0.1 --seconds 0.2").unwrap();
    assert!(report.write.ops < (count("Write") - before) as u64, "the warm-up does not count: {report}");
    // Without a warm-up none is answered in the measured time that had begun before it.
    let report = run(&fake, "--rate 1000 --warmup 0 --seconds 0.5").unwrap();
    assert!((400..=500).contains(&report.write.ops), "{report}");
    assert_eq!((count("OpenFile"), count("CloseFile")), (4, 4));
    let json = serde_json::to_value(&report).unwrap();
    for key in ["iops", "mbps", "p50_us", "p99_us", "max_us"] {
        assert!(json["write"][key].is_number(), "{key}");
    }
}

#[test]
fn several_workers_share_a_volume_without_sharing_a_block() {
    // Pieces of 16 MiB are dealt out, so the volume must be larger than the fake's: writes wrap to the server's size.
    let fake = Fake::start(|_, seen| match seen.method.as_str() {
        "GetInfo" => Act::Message(vec![8, 0, 0x1a, 11, 8, 0x80, 0x80, 0x80, 32, 16, 1, 24, 1, 32, 1]),
        "Write" => Act::Message(vec![8, 0]),
        _ => Act::Serve,
    });
    let report = run(&fake, "--ops 500 --threads 3 --depth 16").unwrap();
    assert_eq!((report.write.ops, report.failed), (500, 0));
    let seen = fake.seen();
    let pieces = |connection: usize| -> std::collections::BTreeSet<u64> {
        let writes = seen.iter().filter(|seen| seen.connection == connection && seen.method == "Write");
        writes.map(|seen| seen.number(2).unwrap() >> 24).collect()
    };
    let parts: Vec<_> = (0..fake.connections()).map(pieces).filter(|part| !part.is_empty()).collect();
    assert_eq!(parts.len(), 3);
    assert_eq!(parts.iter().map(std::collections::BTreeSet::len).sum::<usize>(), 4, "{parts:?}");
}

#[test]
fn planted_faults_are_found() {
    type Plant = fn(usize, &fake::Seen) -> Act;
    let plants: [(&str, Plant); 3] = [
        ("Lost", |count, seen| match seen.method.as_str() {
            "Write" if (40..80).contains(&count) => Act::Message(vec![8, 0]),
            _ => Act::Serve,
        }),
        ("Garbage", |_, seen| match (seen.method.as_str(), seen.number(2)) {
            ("Read", Some(8192)) => Act::Attach(vec![9; seen.number(3).unwrap() as usize]),
            _ => Act::Serve,
        }),
        ("Misplaced", |_, seen| match seen.method.as_str() {
            // A server that reads one block further.
            "Read" if seen.number(2) == Some(0) => Act::Serve,
            "Read" => Act::Shifted(4096),
            _ => Act::Serve,
        }),
    ];
    for (name, plant) in plants {
        let fake = Fake::start(plant);
        let report = run(&fake, "--verify --fresh --ops 1024 --mix 70:30 --depth 8 --span 1MiB").unwrap();
        let found = report.verify_examples.iter().any(|example| example.contains(name));
        assert!(found && !report.is_clean(), "{name} not found: {report}");
    }
}

#[test]
fn a_restart_is_a_stall_and_nothing_else() {
    let stopped = AtomicBool::new(false);
    let mut fake = Fake::start(move |count, _| {
        if count == 500 && !stopped.swap(true, Ordering::SeqCst) { Act::Close { executed: true } } else { Act::Serve }
    });
    let conf = fake.conf(&[]).display().to_string();
    let load = std::thread::spawn(move || {
        let fixed = ["bench", "--conf", &conf, "--file", "v", "--verify", "--fresh", "--span", "4MiB"];
        let more = "--mix 50:50 --depth 16 --warmup 0 --seconds 1.5";
        nebd::run(&Cli::parse_from(fixed.into_iter().chain(more.split_ascii_whitespace())).args).unwrap()
    });
    std::thread::sleep(Duration::from_millis(700));
    fake.stop();
    std::thread::sleep(Duration::from_millis(300));
    fake.up();
    let report = load.join().unwrap();
    assert!(report.is_clean() && report.failed + report.unanswered == 0, "{report}");
    assert!(report.retries > 0 && report.disconnects >= 1, "{report}");
    assert!(report.write.max_us > 250_000.0, "the stall is in the latencies: {report}");
}

#[test]
fn what_is_refused_is_counted_and_what_was_written_is_remembered() {
    let fake = Fake::start(|count, seen| match seen.method.as_str() {
        "Write" if count % 10 == 0 => Act::Ret(KNOOK),
        _ => Act::Serve,
    });
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state").display().to_string();
    let report = run(&fake, &format!("--verify --fresh --ops 200 --depth 4 --span 1MiB --state {state}")).unwrap();
    assert!(report.failed > 5 && report.is_clean(), "{report}");
    assert_eq!(report.statuses.get("REFUSED"), Some(&report.failed));
    let report = run(&fake, &format!("--verify-only --span 1MiB --state {state}")).unwrap();
    assert!(report.is_clean() && report.checked_blocks > 50, "{report}");
    assert!(report.unanswered_vanished.is_some());
    assert!(run(&fake, "--fill --ops 1 --span 1MiB").is_err(), "a fill that was refused is no fill");
    assert!(run(&fake, "--bs 1000").is_err() && run(&fake, "--mix 1:2").is_err());
}
