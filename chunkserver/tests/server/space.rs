//! The pool runs empty: new chunks are refused, everything else goes on, and deleting makes room.

use super::client::{BLOCK, Client, NOSPACE, SUCCESS, pattern};
use super::harness::{Lab, MIB, Setup, wait_for};
use super::nbd::Nbd;

fn small() -> Setup {
    Setup { size: 48 * MIB, log: 8 * MIB, flush_age_ms: 50, ..Setup::default() }
}

/// Chunks of copysets 1 to 4, until every shard says NOSPACE; which there are.
fn fill(client: &mut Client) -> Vec<(u64, u64)> {
    let (mut made, mut full) = (Vec::new(), [false; 5]);
    for chunk in 1..1000 {
        for copyset in (1..5).filter(|&c| !full[c as usize]).collect::<Vec<_>>() {
            match client.write(copyset, chunk, 0, &pattern(chunk * 10 + copyset, BLOCK)) {
                SUCCESS => made.push((copyset, chunk)),
                NOSPACE => full[copyset as usize] = true,
                status => panic!("status {status}"),
            }
        }
        if full[1..].iter().all(|&f| f) {
            return made;
        }
    }
    panic!("the pool has no end");
}

#[test]
fn an_empty_pool_refuses_new_chunks_only() {
    let lab = Lab::new(small());
    let server = lab.start();
    lab.copysets(4);
    let slots = lab.ask(&["status"])["slots"].as_u64().unwrap();
    let mut client = server.client();
    let made = fill(&mut client);
    assert_eq!(made.len() as u64, slots, "every slot is of use");
    for &(copyset, chunk) in &made {
        assert_eq!(client.data(copyset, chunk, 0, BLOCK), pattern(chunk * 10 + copyset, BLOCK));
        assert_eq!(client.write(copyset, chunk, 0, &pattern(chunk * 10 + copyset, BLOCK)), SUCCESS, "overwrite");
        assert_eq!(client.write(copyset, chunk, 7 * BLOCK as u64, &pattern(chunk, BLOCK)), SUCCESS, "another block");
    }
    assert_eq!(client.write(1, 2000, 0, &pattern(1, BLOCK)), NOSPACE);
    // A restart changes nothing of that.
    drop(client);
    server.stop();
    let server = lab.start();
    let mut client = server.client();
    assert_eq!(client.write(1, 2000, 0, &pattern(1, BLOCK)), NOSPACE);
    for &(copyset, chunk) in &made {
        assert_eq!(client.data(copyset, chunk, 0, BLOCK), pattern(chunk * 10 + copyset, BLOCK));
    }
    // Deleting makes room as soon as the deletes are durable; what is written then reads as zero elsewhere.
    for &(copyset, chunk) in made.iter().filter(|m| m.0 == 1).take(3) {
        assert_eq!(client.delete(copyset, chunk), SUCCESS);
    }
    wait_for("a slot", || client.write(1, 2000, BLOCK as u64, &pattern(1, BLOCK)) == SUCCESS);
    let mut expected = vec![0; 8 * BLOCK];
    expected[BLOCK..2 * BLOCK].copy_from_slice(&pattern(1, BLOCK));
    assert_eq!(client.data(1, 2000, 0, 8 * BLOCK), expected, "a recycled slot shows nothing of its former chunk");
}

#[test]
fn a_deleted_volume_gives_its_slots_back() {
    let lab = Lab::new(small());
    let server = lab.start();
    lab.copysets(4);
    let slots = lab.ask(&["status"])["slots"].as_u64().unwrap();
    let size = slots / 2 * MIB;
    let chunks = || {
        let shards = lab.ask(&["status"])["shards"].clone();
        shards.as_array().unwrap().iter().map(|s| s["chunks"].as_u64().unwrap()).sum::<u64>()
    };
    // Three times half the pool: the third has only recycled slots.
    for round in 0..3 {
        lab.ask(&["volume", "create", "--name", "v", "--size", &size.to_string()]);
        let mut volume = Nbd::open(&lab, "v");
        assert_eq!(volume.size, size);
        for chunk in 0..size / MIB {
            let data = pattern(round * 1000 + chunk, BLOCK);
            wait_for("a slot", || volume.write(chunk * MIB, &data) == 0);
        }
        for chunk in 0..size / MIB {
            let mut expected = pattern(round * 1000 + chunk, BLOCK);
            expected.resize(2 * BLOCK, 0);
            assert!(volume.read(chunk * MIB, 2 * BLOCK) == (0, expected), "chunk {chunk} in round {round}");
        }
        assert_eq!(chunks(), size / MIB, "round {round}");
        drop(volume);
        lab.ask(&["volume", "delete", "--name", "v"]);
        assert_eq!(chunks(), 0, "round {round}");
    }
    let mut client = server.client();
    let mut made = Vec::new();
    wait_for("all slots to be free again", || {
        made.extend(fill(&mut client));
        made.sort_unstable();
        made.dedup();
        made.len() as u64 == slots
    });
}
