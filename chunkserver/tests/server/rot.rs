//! Bytes that change on the disk: never served as data, and everything else goes on.

use super::client::{BLOCK, CRC_FAIL, Client, SUCCESS, pattern};
use super::harness::{Lab, MIB, Setup};
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

/// Where this block is on the disk, at or behind `from`.
fn find(lab: &Lab, from: u64, block: &[u8]) -> Vec<u64> {
    let bytes = std::fs::read(lab.disk()).unwrap();
    let blocks = bytes.chunks(BLOCK).enumerate().map(|(i, b)| (i as u64 * BLOCK as u64, b));
    blocks.filter(|&(at, b)| at >= from && b == block).map(|(at, _)| at).collect()
}

fn flip(lab: &Lab, at: u64) {
    let file = OpenOptions::new().read(true).write(true).open(lab.disk()).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

fn write_blocks(client: &mut Client, copyset: u64, chunk: u64) {
    for i in 0..16 {
        assert_eq!(
            client.write(copyset, chunk, i * BLOCK as u64, &pattern(copyset * 1000 + chunk * 100 + i, BLOCK)),
            SUCCESS
        );
    }
}

#[test]
fn a_rotten_block_is_never_served() {
    let lab = Lab::new(Setup { size: 64 * MIB, log: 8 * MIB, ..Setup::default() });
    let server = lab.start();
    lab.copysets(2);
    let mut client = server.client();
    write_blocks(&mut client, 1, 1);
    write_blocks(&mut client, 2, 1);
    lab.wait_written_back(&[1, 2]);
    drop(client);
    server.stop();
    let slots = lab.inspect()["superblock"]["offsets"]["slots"].as_u64().unwrap();
    let block = |i: u64| pattern(1100 + i, BLOCK);
    let places = find(&lab, slots, &block(5));
    assert_eq!(places.len(), 1, "written back, once");
    flip(&lab, places[0] + 1234);

    let server = lab.start();
    let mut client = server.client();
    for _ in 0..3 {
        assert_eq!(client.read(1, 1, 5 * BLOCK as u64, BLOCK), (CRC_FAIL, Vec::new()));
        assert_eq!(client.read(1, 1, 0, 16 * BLOCK), (CRC_FAIL, Vec::new()), "a range with the block in it");
    }
    for i in (0..16).filter(|&i| i != 5) {
        assert_eq!(client.data(1, 1, i * BLOCK as u64, BLOCK), block(i), "block {i}");
    }
    assert_eq!(client.data(2, 1, 0, 16 * BLOCK).len(), 16 * BLOCK);
    // Written anew it is good again, also on the disk.
    let fresh = pattern(9, BLOCK);
    assert_eq!(client.write(1, 1, 5 * BLOCK as u64, &fresh), SUCCESS);
    assert_eq!(client.data(1, 1, 5 * BLOCK as u64, BLOCK), fresh);
    lab.wait_written_back(&[1]);
    server.kill();
    let server = lab.start();
    let mut client = server.client();
    assert_eq!(client.data(1, 1, 5 * BLOCK as u64, BLOCK), fresh);
    assert_eq!(client.data(1, 1, 0, 16 * BLOCK)[..BLOCK], block(0));
}

#[test]
fn a_misplaced_block_is_never_served() {
    let lab = Lab::new(Setup { size: 64 * MIB, log: 8 * MIB, ..Setup::default() });
    let server = lab.start();
    lab.copysets(1);
    let mut client = server.client();
    write_blocks(&mut client, 1, 1);
    lab.wait_written_back(&[1]);
    server.stop();
    let slots = lab.inspect()["superblock"]["offsets"]["slots"].as_u64().unwrap();
    let (from, to) = (find(&lab, slots, &pattern(1103, BLOCK))[0], find(&lab, slots, &pattern(1104, BLOCK))[0]);
    let file = OpenOptions::new().read(true).write(true).open(lab.disk()).unwrap();
    let mut block = vec![0; BLOCK];
    file.read_exact_at(&mut block, from).unwrap();
    file.write_all_at(&block, to).unwrap();
    let server = lab.start();
    let mut client = server.client();
    assert_eq!(client.read(1, 1, 4 * BLOCK as u64, BLOCK), (CRC_FAIL, Vec::new()));
    assert_eq!(client.data(1, 1, 3 * BLOCK as u64, BLOCK), pattern(1103, BLOCK));
}

/// The log's durable part rots before it was written back: with one replica nobody can repair it (rule 21).
#[test]
fn a_rotten_log_is_never_replayed_as_data() {
    let lab = Lab::new(Setup { size: 64 * MIB, log: 8 * MIB, flush_age_ms: 600_000, ..Setup::default() });
    let server = lab.start();
    lab.copysets(4);
    let mut client = server.client();
    for copyset in 1..5 {
        write_blocks(&mut client, copyset, 1);
    }
    server.kill();
    let places = find(&lab, 0, &pattern(1103, BLOCK));
    assert_eq!(places.len(), 1, "in the log only");
    flip(&lab, places[0] + 77);
    let server = lab.start_unled();
    let mut client = server.client();
    for i in 0..16 {
        let (status, data) = client.read(1, 1, i * BLOCK as u64, BLOCK);
        assert!((status, data.len()) == (CRC_FAIL, 0), "block {i}: status {status}");
    }
    assert_eq!(client.write(1, 1, 0, &pattern(1, BLOCK)), CRC_FAIL, "nor does it take writes");
    for copyset in 2..5 {
        for i in 0..16 {
            let data = client.data(copyset, 1, i * BLOCK as u64, BLOCK);
            assert!(data == pattern(copyset * 1000 + 100 + i, BLOCK), "copyset {copyset}, block {i}");
        }
    }
    assert!(lab.log().contains("lost records that were durable"), "and it says so");
}
