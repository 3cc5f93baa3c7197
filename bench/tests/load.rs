//! The whole client against a server that misbehaves: planted faults are found, legal trouble is not one.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod fake;

use bench::report::Report;
use bench::rpc::{self, Args};
use clap::Parser;
use fake::{Act, Chunks, Fake};
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: Args,
}

fn args(fake: &Fake, more: &str) -> Args {
    let addr = fake.addr.to_string();
    let fixed = ["bench", "--addr", &addr, "--copysets", "1:1-2", "--chunks", "2", "--span", "1MiB", "--create"];
    Cli::parse_from(fixed.into_iter().chain(more.split_ascii_whitespace())).args
}

fn run(fake: &Fake, more: &str) -> Report {
    rpc::run(&args(fake, more)).unwrap()
}

#[test]
fn a_correct_server_passes_in_every_mode() {
    let fake = Fake::start(|_, _| Act::Serve);
    let report = run(&fake, "--verify --fill --ops 3000 --mix 50:50 --depth 32 --conns 2 --threads 2");
    assert!(report.is_clean(), "{report}");
    assert_eq!(report.total.ops, 3000);
    assert!(report.read.ops > 1000 && report.write.ops > 1000);
    assert!(report.checked_blocks >= 256 + report.read.ops, "every written block is read at the end");
    assert!(report.client_cpu_us_per_op.is_some());
    let report = run(&fake, "--ops 64 --bs 64k --pattern sequential --mix 100:0 --depth 4");
    assert_eq!((report.read.ops, report.retries), (64, 0));
    assert!(report.to_string().contains("IOPS"));
}

#[test]
fn what_is_legal_trouble_is_retried_and_counted_but_not_wrong() {
    let fake = Fake::start(|count, _| match count % 40 {
        3 => Act::Status(1),
        7 => Act::Status(9),
        13 => Act::Status(8),
        17 => Act::RpcError(11),
        20 if count < 200 => Act::Close { applied: true },
        33 if count < 200 => Act::Close { applied: false },
        // Late enough that no broken connection answers for it.
        38 | 39 if count > 250 => Act::Mute,
        _ => Act::Serve,
    });
    let report = run(&fake, "--verify --ops 400 --mix 50:50 --depth 16 --conns 2 --timeout 100");
    assert!(report.is_clean(), "{report}");
    assert_eq!(report.total.ops, 400);
    assert!(report.retries > 0 && report.disconnects > 0 && report.timeouts > 0, "{report}");
    for status in ["REDIRECTED", "OVERLOAD", "FAILURE_UNKNOWN", "rpc_11"] {
        assert!(report.statuses.contains_key(status), "{status} in {report}");
    }
}

#[test]
fn planted_faults_are_found() {
    type Plant = fn(u64, &fake::Request) -> Act;
    let plants: [(&str, Plant); 3] =
        [
            ("Lost", |count, request| {
                if (40..80).contains(&count) && request.method == "WriteChunk" { Act::Forget } else { Act::Serve }
            }),
            ("Garbage", |_, request| if request.offset == 8192 { Act::Rot } else { Act::Serve }),
            ("Misplaced", |_, request| if request.offset == 4096 { Act::Misplace(0) } else { Act::Serve }),
        ];
    for (name, plant) in plants {
        let fake = Fake::start(plant);
        let report = run(&fake, "--verify --ops 1024 --mix 70:30 --depth 8");
        let found = report.verify_examples.iter().any(|example| example.contains(name));
        assert!(found && !report.is_clean(), "{name} not found: {report}");
    }
}

#[test]
fn a_write_lost_after_its_answer_is_stale_even_if_an_older_one_is_whole() {
    let filled = AtomicBool::new(false);
    let fake = Fake::start(move |_, request| {
        // Everything is filled with 64 KiB writes; then one 4 KiB block of each chunk ignores its writes.
        let small = request.method == "WriteChunk" && request.size == 4096;
        filled.fetch_or(small, Ordering::Relaxed);
        if small && request.offset == 0 { Act::Forget } else { Act::Serve }
    });
    let report = run(&fake, "--verify --fill --ops 500 --depth 4");
    assert!(report.verify_examples.iter().any(|example| example.contains("Stale")), "{report}");
}

#[test]
fn a_stall_is_seen_by_every_request_that_should_have_started_in_it() {
    let fake = Fake::start(|count, _| if count == 300 { Act::Stall(Duration::from_millis(400)) } else { Act::Serve });
    let report = run(&fake, "--rate 1000 --warmup 0 --seconds 1.5 --timeout 5000");
    // 400 of 1500 requests were due during the stall and waited 0..400 ms each: a client that waits with the server
    // would show one slow request. (Quantiles have slack for a busy machine.)
    assert!(report.write.p90_us > 100_000.0, "{report}");
    assert!(report.write.p50_us < 100_000.0, "{report}");
    assert!((1300..=1500).contains(&report.write.ops), "{report}");
}

#[test]
fn a_crash_leaves_unanswered_writes_that_the_next_process_settles() {
    let down = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&down);
    let fake = Fake::start(move |count, request| {
        if count == 400 {
            seen.store(true, Ordering::Relaxed);
        }
        // The last requests before the break: some applied, some not, none answered.
        match request.method.as_str() {
            "WriteChunk" if count == 400 => Act::Close { applied: true },
            "WriteChunk" if (380..400).contains(&count) && count % 2 == 0 => Act::Mute,
            _ => Act::Serve,
        }
    });
    let dir = tempfile();
    let state = dir.join("state.json");
    let state = state.display();
    let report = run(&fake, &format!("--verify --until-disconnect --seconds 20 --depth 32 --state {state}"));
    assert!(down.load(Ordering::Relaxed) && report.disconnects == 1 && report.unanswered > 10, "{report}");
    let check = run(&fake, &format!("--verify-only --state {state}"));
    assert!(check.is_clean(), "{check}");
    let (survived, vanished) = (check.unanswered_survived.unwrap(), check.unanswered_vanished.unwrap());
    assert!(survived > 0 && vanished > 0, "{check}");
    // Settled is settled: losing a survivor now is an error, as is losing anything acknowledged.
    let again = run(&fake, &format!("--verify-only --state {state}"));
    assert_eq!((again.is_clean(), again.unanswered_survived), (true, Some(0)));
    fake.chunks.lock().unwrap().clear();
    let lost = run(&fake, &format!("--verify-only --state {state}"));
    assert!(lost.verify_errors > 100, "{lost}");
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn a_server_that_babbles_or_vanishes_ends_the_run_in_time() {
    let fake = Fake::start(|_, _| Act::Babble);
    let report = run(&fake, "--seconds 0.3 --warmup 0 --give-up 0.3");
    assert!(report.write.ops == 0 && report.disconnects > 0 && report.unanswered > 0, "{report}");
    let error = rpc::run(&Args { addr: Some("127.0.0.1:1".into()), ..args(&fake, "") });
    assert!(error.is_err());
}

/// Three nodes over the same chunks. Node `leader % 3` leads; `act` says what a node does with a request it should serve.
fn three(
    leader: &Arc<AtomicU64>,
    act: impl Fn(u64, &fake::Request) -> Act + Send + Sync + Clone + 'static,
) -> Vec<Fake> {
    let listeners: Vec<_> = (0..3).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let addrs: Vec<SocketAddr> = listeners.iter().map(|listener| listener.local_addr().unwrap()).collect();
    let chunks = Chunks::default();
    let start = |(node, listener): (u64, TcpListener)| {
        let (leader, addrs, act) = (Arc::clone(leader), addrs.clone(), act.clone());
        Fake::node(listener, Arc::clone(&chunks), move |count, request| {
            let leads = leader.load(Ordering::Relaxed) % 3;
            if leads == node {
                act(count, request)
            } else {
                Act::Redirect((count % 3 != 0).then(|| addrs[leads as usize]))
            }
        })
    };
    (0..).zip(listeners).map(start).collect()
}

fn run_on(nodes: &[Fake], more: &str) -> Report {
    let peers = nodes.iter().map(|fake| fake.addr.to_string()).collect::<Vec<_>>().join(",");
    let fixed = ["bench", "--peers", &peers, "--copysets", "1:1-2", "--chunks", "2", "--span", "1MiB", "--create"];
    rpc::run(&Cli::parse_from(fixed.into_iter().chain(more.split_ascii_whitespace())).args).unwrap()
}

#[test]
fn leaders_are_followed_by_hint_and_left_when_they_break_or_fall_silent() {
    let leader = Arc::new(AtomicU64::new(2));
    let moves = Arc::clone(&leader);
    let nodes = three(&leader, move |count, request| {
        // Every hundred requests of a node it stops leading: with the connection broken, silent, or in good order.
        let how = if count % 100 == 99 { moves.fetch_add(1, Ordering::Relaxed) } else { 3 };
        match how % 3 {
            0 if count % 100 == 99 && request.method == "WriteChunk" => Act::Mute,
            1 if count % 100 == 99 => Act::Close { applied: true },
            _ => Act::Serve,
        }
    });
    let report = run_on(&nodes, "--verify --ops 2000 --mix 30:70 --depth 16 --conns 2 --timeout 200");
    assert!(report.is_clean() && report.total.ops == 2000 && report.unanswered == 0, "{report}");
    assert!(report.statuses["REDIRECTED"] > 10 && report.disconnects > 1 && report.timeouts > 0, "{report}");
    assert!(leader.load(Ordering::Relaxed) > 10, "{report}");
}

#[test]
fn an_attempt_that_turns_up_late_is_no_error_but_a_lost_answer_is() {
    let leader = Arc::new(AtomicU64::new(0));
    // A paused node in small: what it was sent is executed after the retry was answered, and newer writes too.
    let late = |count: u64, request: &fake::Request| {
        let late = request.method == "WriteChunk" && count % 50 == 20;
        if late { Act::Late(Duration::from_millis(150)) } else { Act::Serve }
    };
    let flags = "--verify --seconds 1 --warmup 0 --mix 50:50 --depth 8 --timeout 50";
    let report = run_on(&three(&leader, late), flags);
    assert!(report.is_clean() && report.timeouts > 0, "{report}");
    // A new leader that does not know what the old one acknowledged.
    let report = run_on(
        &three(
            &leader,
            |count, request| {
                if request.method == "WriteChunk" && count % 50 == 20 { Act::Forget } else { Act::Serve }
            },
        ),
        flags,
    );
    assert!(!report.is_clean(), "{report}");
}

#[test]
fn options_that_cannot_work_are_refused() {
    let fake = Fake::start(|_, _| Act::Serve);
    for bad in ["--bs 1000", "--mix 50:60", "--chunks 0", "--rate 0", "--copysets 1", "--span 4k"] {
        let args =
            match Cli::try_parse_from(["bench", "--addr", &fake.addr.to_string()].into_iter().chain(bad.split(' '))) {
                Ok(cli) => cli.args,
                Err(_) => continue,
            };
        assert!(rpc::run(&args).is_err(), "{bad}");
    }
}

fn tempfile() -> std::path::PathBuf {
    let dir = std::env::temp_dir().join(format!("bench-load-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    dir
}
