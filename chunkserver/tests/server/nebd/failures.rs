//! I/O that fails: parked and tried again, or told, as the configuration says; and nothing waits for it that should not.

use super::client::{K, M, NOK, Nebd, OK, VOL1, range, setup, var};
use crate::client::pattern;
use crate::harness::{Lab, Setup};
use std::time::{Duration, Instant};

/// A disk of few slots: volumes `vol1` and `filler`, the latter using most of them. The first chunk of `vol1` that finds
/// no slot.
fn full(more: &str) -> (Lab, u64) {
    let lab = Lab::new(Setup { size: 64 * M, log: 8 * M, dirty: 2 * M, ..setup(more) });
    let server = lab.start();
    lab.copysets(2);
    lab.ask(&["volume", "create", "--name", "vol1", "--size", "64MiB"]);
    lab.ask(&["volume", "create", "--name", "filler", "--size", "8MiB"]);
    let mut client = Nebd::connect(&lab);
    let filler = client.open("cbd:p//filler_u_");
    (0..8).for_each(|chunk| assert_eq!(client.write(filler, chunk * M, &pattern(chunk, K)), OK));
    assert_eq!(client.plain("CloseFile", filler), OK);
    drop(client);
    server.stop();
    (lab, 0)
}

/// Write a block into each chunk until one is not answered; its index.
fn fill(client: &mut Nebd, fd: u64) -> u64 {
    client.stream.set_read_timeout(Some(Duration::from_millis(1500))).unwrap();
    for chunk in 0..64 {
        client.begin("Write", &range(fd, chunk * M, 4096), &pattern(chunk, K));
        match client.try_receive() {
            Ok(answer) => assert_eq!(answer.status(), OK),
            Err(_) => {
                client.stream.set_read_timeout(Some(crate::harness::PATIENCE)).unwrap();
                return chunk;
            }
        }
    }
    panic!("the disk does not get full");
}

#[test]
fn a_write_without_room_waits_and_is_answered_when_there_is() {
    let (lab, _) = full("");
    let server = lab.start();
    let mut client = Nebd::connect(&lab);
    let fd = client.open(VOL1);
    let stuck = fill(&mut client, fd);
    assert_eq!(var(&lab, "*_nebd_parked_num").as_deref(), Some("1"));
    assert_eq!(client.read(fd, 0, 4096), (OK, pattern(0, K)), "others go on");
    assert_eq!(client.plain("Flush", fd), OK);
    let mut other = Nebd::connect(&lab);
    assert_eq!(other.read(fd, 0, 4096).0, OK);
    lab.ask(&["volume", "delete", "--name", "filler"]);
    assert_eq!(client.try_receive().unwrap().status(), OK, "it was tried again");
    assert_eq!(client.read(fd, stuck * M, 4096), (OK, pattern(stuck, K)));
    server.stop();
}

#[test]
fn a_parked_request_hinders_neither_close_nor_the_end() {
    let (lab, _) = full("");
    let server = lab.start();
    let mut client = Nebd::connect(&lab);
    let fd = client.open(VOL1);
    let stuck = fill(&mut client, fd);
    let mut dying = Nebd::connect(&lab);
    for i in 0..100 {
        dying.begin("Write", &range(fd, (stuck + i % 8) * M, 4096), &pattern(i, K));
    }
    dying.expect_silence();
    drop(dying);
    assert_eq!(client.plain("CloseFile", fd), OK, "it does not wait for what is parked");
    assert_eq!(client.read(fd, 0, 4096).0, NOK);
    client.expect_close(); // what was parked cannot be done any more: its client is to ask again, and hears so
    let mut client = Nebd::connect(&lab);
    assert_eq!(client.write(fd, stuck * M, &pattern(stuck, K)), NOK);
    let again = client.open(VOL1);
    assert!(again != fd);
    client.begin("Write", &range(again, stuck * M, 4096), &pattern(1, K));
    client.expect_silence();
    let begun = Instant::now();
    server.stop();
    assert!(begun.elapsed() < Duration::from_secs(10));
    client.expect_close();
    // Part1 sends it again to the next server.
    let server = lab.start();
    lab.ask(&["volume", "delete", "--name", "filler"]);
    let mut client = Nebd::connect(&lab);
    assert_eq!(client.write(again, stuck * M, &pattern(1, K)), OK);
    server.stop();
}

#[test]
fn what_cannot_be_kept_is_asked_for_again() {
    let (lab, _) = full("");
    let server = lab.start();
    let mut client = Nebd::connect(&lab);
    let fd = client.open(VOL1);
    let stuck = fill(&mut client, fd);
    drop(client);
    // More data than parked calls may keep.
    let mut client = Nebd::connect(&lab);
    let data: Vec<u8> = (0..16).flat_map(|block| pattern(block, K)).collect();
    let write = |chunk: u64| range(fd, chunk * M, data.len() as u64);
    for _ in 0..48 {
        client.begin("Write", &write(stuck), &data);
    }
    client.expect_close();
    lab.ask(&["volume", "delete", "--name", "filler"]);
    let mut client = Nebd::connect(&lab);
    assert_eq!(client.call("Write", &write(stuck), &data).status(), OK);
    server.stop();
}

#[test]
fn a_connection_with_all_its_calls_waiting_is_not_forgotten() {
    let lab = super::client::lab("");
    let server = lab.start();
    let mut client = Nebd::connect(&lab);
    let fd = client.open(VOL1);
    for id in 1..5 {
        lab.ask(&["copyset", "delete", &format!("1:{id}"), "--node", &lab.address.to_string()]);
    }
    client.begin("Read", &range(fd, 0, 4 * M), &[]);
    client.expect_silence();
    assert_eq!(var(&lab, "*_nebd_parked_num").as_deref(), Some("1"), "from now on nobody is known to lead");
    let mut full = Nebd::connect(&lab);
    for _ in 0..10 {
        full.begin("Read", &range(fd, 0, 4 * M), &[]);
    }
    full.expect_close(); // nothing more is read from it, so it may be that of a dead client
    client.expect_silence();
    assert_eq!(Nebd::connect(&lab).plain("Flush", fd), OK);
    server.stop();
}

#[test]
fn errors_are_told_if_that_is_wanted() {
    let (lab, _) = full("return_io_errors = true");
    let server = lab.start();
    let mut client = Nebd::connect(&lab);
    let fd = client.open(VOL1);
    let codes: Vec<u64> = (0..64).map(|chunk| client.write(fd, chunk * M, &pattern(chunk, K))).collect();
    assert!(codes.contains(&OK) && codes.contains(&NOK), "{codes:?}");
    assert_eq!(client.plain("CloseFile", fd), OK);
    server.stop();
}

#[test]
fn a_deleted_volume_is_refused() {
    let lab = super::client::lab("");
    let server = lab.start();
    let mut client = Nebd::connect(&lab);
    let fd = client.open(VOL1);
    assert_eq!(client.write(fd, 0, &pattern(1, K)), OK);
    lab.ask(&["volume", "delete", "--name", "vol1"]);
    assert_eq!((client.read(fd, 0, 4096).0, client.plain("Flush", fd), client.info(fd)), (NOK, NOK, None));
    lab.ask(&["volume", "create", "--name", "vol1", "--size", "64MiB"]);
    assert_eq!(client.read(fd, 0, 4096).0, NOK, "a namesake is another volume");
    assert_eq!(client.plain("CloseFile", fd), OK);
    let fd = client.open(VOL1);
    assert_eq!(client.read(fd, 0, 4096), (OK, vec![0; K]));
    server.stop();
}

#[test]
fn a_metafile_that_cannot_be_written_refuses_and_changes_nothing() {
    let lab = super::client::lab("");
    let server = lab.start();
    let mut client = Nebd::connect(&lab);
    let fd = client.open(VOL1);
    let record = std::fs::read(lab.path("nebdserver.meta")).unwrap();
    std::fs::create_dir(lab.path("nebdserver.meta.tmp")).unwrap();
    let tail = format!("{VOL1}:tail");
    assert_eq!(client.open_with(&tail, None), (NOK, None));
    assert_eq!(client.plain("CloseFile", fd), NOK);
    assert_eq!(std::fs::read(lab.path("nebdserver.meta")).unwrap(), record);
    assert_eq!(client.read(fd, 0, 4096), (OK, vec![0; K]), "closed, in the table still: opened again");
    std::fs::remove_dir(lab.path("nebdserver.meta.tmp")).unwrap();
    assert_eq!(client.open_with(&tail, None).0, OK);
    assert_eq!((client.plain("CloseFile", fd), client.read(fd, 0, 4096).0), (OK, NOK));
    server.stop();
}
