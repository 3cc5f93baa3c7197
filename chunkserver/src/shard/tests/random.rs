//! Operations, completions, crashes and restarts in random order.

use super::model::Model;
use super::world::{Rng, Setup, World};
use raftlog::CopysetId;

#[derive(Default, Debug)]
struct Totals {
    changes: u64,
    reads: u64,
    refused: u64,
    survived: u64,
    vanished: u64,
    crashes: u64,
}

fn setup(rng: &mut Rng) -> Setup {
    let segment = [96 << 10, 128 << 10, 512 << 10][rng.below(3)];
    let segments = 3 + rng.below(4) as u64;
    let slots = [10, 60][rng.below(2)];
    Setup {
        size: segment * segments + (4 << 20) + slots * (80 << 10),
        segment,
        segments,
        payload_arena: [512 << 10, 4 << 20][rng.below(2)],
        dirty_limit: [32 << 10, 256 << 10, 2 << 20][rng.below(3)],
        flush_age_ms: [1, 50, 5000][rng.below(3)],
        ..Setup::default()
    }
}

fn run(seed: u64, steps: usize, totals: &mut Totals) {
    let mut rng = Rng(seed);
    let setup = setup(&mut rng);
    let mut world = World::new(setup, seed);
    world.boot();
    let copysets: Vec<CopysetId> = (1..=4).map(|n| CopysetId::new(1, n)).collect();
    for &id in &copysets {
        world.create(id);
    }
    let busy = 1 + rng.below(copysets.len()); // the others only pin the log
    let (depth, chunks) = (1 + rng.below(40), 1 + rng.below(30));
    let mut model = Model::default();
    for _ in 0..steps {
        if world.owed.len() < depth && rng.one_in(2) {
            model.ask(&mut world, &copysets[..busy], chunks);
        } else {
            world.step();
            model.take_replies(&mut world);
        }
        if rng.one_in(400) {
            match rng.below(4) {
                0 => {
                    world.restart();
                    model.take_replies(&mut world);
                }
                1 => {
                    world.crash();
                    for _ in 0..rng.below(60) {
                        world.step(); // and again while it recovers
                    }
                    world.crash();
                }
                _ => world.crash(),
            }
            world.boot();
            model.recover(&mut world);
        }
    }
    world.settle();
    model.take_replies(&mut world);
    assert_eq!(model.unanswered(), 0);
    world.crash();
    world.boot();
    model.recover(&mut world);
    totals.changes += model.changes;
    totals.reads += model.reads;
    totals.refused += model.refused;
    totals.survived += model.survived;
    totals.vanished += model.vanished;
    totals.crashes += world.crashes;
}

/// `SHARD_SEED` runs one, `SHARD_SEEDS` so many.
#[test]
fn what_was_answered_holds_and_everything_is_answered() {
    let number = |name| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    let (first, count) = match number("SHARD_SEED") {
        Some(seed) => (seed, 1),
        None => (0, number("SHARD_SEEDS").unwrap_or(30)),
    };
    let mut totals = Totals::default();
    for seed in first..first + count {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(seed, 3000, &mut totals)));
        if let Err(why) = result {
            eprintln!("SHARD_SEED={seed}");
            std::panic::resume_unwind(why);
        }
    }
    eprintln!("{totals:?}");
    if count >= 30 {
        assert!(totals.survived > 0 && totals.vanished > 0 && totals.crashes > 20, "{totals:?}");
    }
}
