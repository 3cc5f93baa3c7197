//! Heap allocations of a 4 KiB write, counted through the whole software: reactor, connection, service, shard, copyset, log,
//! chunk store and write-back, at queue depth 64 with group commit, on an `Io` that completes everything at once.
//!
//! Run with `-- --nocapture` to see where they come from.
#![allow(clippy::unwrap_used, missing_docs, unsafe_code)]

#[path = "support/heap.rs"]
#[allow(dead_code)]
mod heap;
#[path = "support/rig.rs"]
mod rig;

use rig::{Rig, scattered, writes};
use std::backtrace::Backtrace;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

#[global_allocator]
static HEAP: heap::Counting = heap::Counting;

const DEPTH: u64 = 64;
/// Allocations per write today, all of them; the test is there so that it goes down only.
const BOUND: f64 = 2.2;
/// Of these, the ones outside raft-rs.
const BOUND_OURS: f64 = 2.0;
/// Every so many allocations one is looked at. Prime, so that it does not fall in step with the writes.
const SAMPLE: u64 = 23;

thread_local! {
    static SEEN: Cell<u64> = const { Cell::new(0) };
    static TRACES: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

fn sample(_size: usize) {
    SEEN.set(SEEN.get() + 1);
    if SEEN.get().is_multiple_of(SAMPLE) {
        let trace = Backtrace::force_capture().to_string();
        TRACES.with_borrow_mut(|traces| traces.push(trace));
    }
}

/// Crates whose frames say whose allocation it is.
const OURS: [&str; 5] = ["chunkserver::", "copyset::", "raftlog::", "proto::", "raft::"];

/// The frames of known crates, innermost first: function and place.
fn frames(trace: &str) -> Vec<(String, String)> {
    let mut all: Vec<(String, String)> = Vec::new();
    for line in trace.lines().map(str::trim) {
        if let Some(place) = line.strip_prefix("at ") {
            if let Some(last) = all.last_mut() {
                last.1 = place.rsplit('/').next().unwrap_or(place).to_owned();
            }
        } else if let Some((_, name)) = line.split_once(": ") {
            all.push((name.trim_start_matches(['<', '&']).trim_start_matches("mut ").to_owned(), String::new()));
        }
    }
    all.retain(|(name, _)| OURS.iter().any(|ours| name.starts_with(ours)));
    all
}

fn run(rig: &mut Rig, count: u64, seed: u64) {
    for round in 0..count / DEPTH {
        rig.run(&writes(scattered(DEPTH, seed + round)), DEPTH);
    }
}

/// Allocations the test's own client makes.
fn own(count: u64, seed: u64) -> u64 {
    let before = heap::count();
    for round in 0..count / DEPTH {
        drop(writes(scattered(DEPTH, seed + round)));
    }
    heap::count() - before
}

#[test]
fn allocations_per_write_stay_few() {
    // Write-back begins at half of it: several rounds are in the count.
    let mut rig = Rig::new(16 << 20);
    run(&mut rig, 8192, 1);
    let before = heap::count();
    run(&mut rig, 8192, 1000);
    let count = heap::count() - before - own(8192, 1000);
    let per_write = count as f64 / 8192.0;

    heap::watch(Some(sample));
    run(&mut rig, 2048, 5000);
    heap::watch(None);
    let traces = TRACES.take();
    let (mut raft, mut known, mut sites) = (0, 0, BTreeMap::<String, u64>::new());
    for trace in &traces {
        let frames = frames(trace);
        let Some((name, place)) = frames.first().filter(|(name, _)| !name.starts_with("allocations")) else { continue };
        known += 1;
        raft += u64::from(name.starts_with("raft::"));
        let caller = frames.get(1).map_or("", |(_, place)| place);
        *sites.entry(format!("{name} ({place}) from {caller}")).or_default() += 1;
    }
    let ours = per_write * (known - raft) as f64 / known.max(1) as f64;
    let share = |count: u64| per_write * count as f64 / known.max(1) as f64;
    println!(
        "{per_write:.2} allocations per 4 KiB write: {:.2} in raft-rs, {:.2} elsewhere",
        share(raft),
        share(known - raft)
    );
    let mut sites: Vec<_> = sites.into_iter().collect();
    sites.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    for (site, count) in sites.iter().take(40) {
        println!("{:6.2}  {site}", share(*count));
    }
    assert!(per_write <= BOUND, "{per_write:.2} allocations per write");
    assert!(ours <= BOUND_OURS, "{ours:.2} allocations per write outside raft-rs");
}
