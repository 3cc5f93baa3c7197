//! Hostile bytes for everything that reads bytes: deterministic, without coverage, checked for panics, memory, work and
//! the invariants of each reader.
//!
//! `cargo test` runs a fixed number of inputs of each target; `scripts/fuzz NAME|all --minutes M` runs them for long. Every
//! input follows from (seed, index), so what fails is replayed by these two numbers.
#![allow(clippy::unwrap_used, missing_docs, unsafe_code)]

mod disk;
mod engine;
mod fake;
#[path = "../support/heap.rs"]
#[allow(dead_code)]
mod heap;
mod log;
mod mutate;
mod nbd;
mod nebd;
mod peer;
mod rpc;
mod samples;
mod text;
mod wire;

use engine::{Spec, Stats, Target, run};
use std::time::{Duration, Instant};

#[global_allocator]
static HEAP: heap::Counting = heap::Counting;

const MIB: usize = 1 << 20;

macro_rules! targets {
    ($($name:ident: $make:expr, smoke $smoke:expr, every $every:expr, heap $heap:expr, weight $weight:expr;)*) => {
        const TARGETS: &[Spec] = &[$(Spec {
            name: stringify!($name),
            make: || -> Box<dyn Target> { Box::new($make) },
            smoke: $smoke,
            every: $every,
            heap_max: $heap,
            weight: $weight,
        },)*];
        $(#[test]
        fn $name() {
            smoke(stringify!($name));
        })*
    };
}

targets! {
    frame: wire::Frames::new(), smoke 8_000, every 4096, heap MIB, weight 4;
    meta: wire::Metas::new(), smoke 20_000, every 4096, heap MIB, weight 3;
    bodies: wire::Bodies::new(), smoke 20_000, every 4096, heap MIB, weight 3;
    http: wire::Http::new(), smoke 20_000, every 4096, heap MIB, weight 3;
    rpc: rpc::Connections::new(), smoke 2_000, every 512, heap 8 * MIB, weight 4;
    nbd_options: nbd::Options::new(), smoke 20_000, every 4096, heap MIB, weight 3;
    nbd_requests: nbd::Requests::new(), smoke 20_000, every 4096, heap MIB, weight 3;
    nbd_session: nbd::Sessions::new(), smoke 1_000, every 512, heap 8 * MIB, weight 4;
    peer_messages: peer::Messages::new(), smoke 20_000, every 4096, heap MIB, weight 3;
    peer_streams: peer::Streams::new(), smoke 2_000, every 512, heap 2 * MIB, weight 4;
    log: log::Recoveries::new(), smoke 1_000, every 512, heap 4 * MIB, weight 6;
    metadata: disk::Loads::new(), smoke 1_000, every 512, heap 4 * MIB, weight 6;
    superblock: disk::Superblocks::new(), smoke 10_000, every 4096, heap MIB, weight 2;
    catalog: text::Catalogs::new(), smoke 5_000, every 4096, heap MIB, weight 3;
    config: text::Configs::new(), smoke 3_000, every 4096, heap MIB, weight 3;
    nebd_texts: nebd::Texts::new(), smoke 10_000, every 4096, heap MIB, weight 3;
    codecs: text::Codecs::new(), smoke 50_000, every 4096, heap MIB, weight 3;
}

fn spec(name: &str) -> &'static Spec {
    TARGETS.iter().find(|spec| spec.name == name).unwrap_or_else(|| {
        let names: Vec<&str> = TARGETS.iter().map(|spec| spec.name).collect();
        panic!("no target {name:?}; there are {names:?}")
    })
}

fn smoke(name: &str) {
    let spec = spec(name);
    let stats = run(spec, 1, 0, |done| done >= spec.smoke);
    assert!(stats.inputs >= spec.smoke);
    let taken = stats.accepted * 100 / stats.inputs;
    assert!((5..=99).contains(&taken), "{taken} % of the inputs are taken for valid: they are not worth much");
}

fn variable<T: std::str::FromStr>(name: &str) -> Option<T> {
    std::env::var(name).ok()?.parse().ok()
}

/// What scripts/fuzz runs; its arguments come as environment variables. Without them: a tenth of the smoke inputs of
/// every target, from another seed.
#[test]
fn long() {
    let name: String = variable("FUZZ_TARGET").unwrap_or_else(|| "all".into());
    if name == "list" {
        return TARGETS.iter().for_each(|spec| println!("{}", spec.name));
    }
    let seed = variable("FUZZ_SEED").unwrap_or(2);
    if let Some(index) = variable::<u64>("FUZZ_AT") {
        run(spec(&name), seed, index, |done| done > index);
        println!("{name}: input {index} of seed {seed} is fine");
        return;
    }
    let seconds: Option<f64> = variable("FUZZ_SECONDS");
    let first = variable("FUZZ_FROM").unwrap_or(0);
    let chosen: Vec<&Spec> = if name == "all" { TARGETS.iter().collect() } else { vec![spec(&name)] };
    let weights: u64 = chosen.iter().map(|spec| spec.weight).sum();
    let (mut total, mut failed) = (0, Vec::new());
    for spec in chosen {
        let share = seconds.map(|all| Duration::from_secs_f64(all * spec.weight as f64 / weights as f64));
        let started = Instant::now();
        let enough = |done| share.map_or(done >= first + spec.smoke / 10, |share| started.elapsed() >= share);
        let run = || run(spec, seed, first, enough);
        let Ok(stats) = std::panic::catch_unwind(run) else {
            failed.push(spec.name);
            continue;
        };
        total += stats.inputs;
        report(spec.name, seed, started.elapsed(), &stats);
    }
    heap::at("", 0, 0);
    println!("total {total} inputs");
    assert!(failed.is_empty(), "failed: {failed:?}");
}

fn report(name: &str, seed: u64, took: Duration, stats: &Stats) {
    let rate = stats.inputs as f64 / took.as_secs_f64();
    println!(
        "{name:<12} seed {seed} {:>11} inputs {rate:>9.0}/s | {:>2} % valid | most heap {:>8} B | most allocations {:>6} \
         (input {}) | slowest {:>7} us (input {})",
        stats.inputs,
        stats.accepted * 100 / stats.inputs.max(1),
        stats.peak,
        stats.allocations.0,
        stats.allocations.1,
        stats.slowest.0.as_micros(),
        stats.slowest.1,
    );
}
