//! What becomes of files over heartbeats, deaths and restarts, and of two clients with one volume.

use super::client::{K, M, NOK, Nebd, OK, VOL1, lab, open, open_files, range, var, wait_buffers_free};
use crate::client::pattern;
use crate::harness::wait_for;
use rustix::process::Signal;
use std::time::{Duration, Instant};

#[test]
fn a_file_is_written_and_read_in_every_size() {
    let lab = lab("");
    let server = lab.start();
    let mut client = Nebd::connect(&lab);
    let fd = client.open(VOL1);
    // Over borders of extents, chunks, and what is received straight into a buffer.
    for (offset, len) in [(0, K), (M - 4096, 2 * K), (3 * M, 300 * K), (7 * M - 8192, 256 * K), (9 * M, 4 * M as usize)]
    {
        let data = pattern(offset + 1, len);
        assert_eq!(client.write(fd, offset, &data), OK, "{len} at {offset}");
        assert!(client.read(fd, offset, len as u64) == (OK, data), "{len} at {offset}");
    }
    assert_eq!(client.discard(fd, 9 * M + 4096, M), OK);
    let data = pattern(9 * M + 1, 4 * M as usize);
    let (_, mut seen) = client.read(fd, 9 * M, 4 * M);
    assert!(seen[K..K + M as usize].iter().all(|&b| b == 0), "what was discarded is zeros");
    seen[K..K + M as usize].copy_from_slice(&data[K..K + M as usize]);
    assert!(seen == data, "and nothing else");
    assert_eq!(client.discard(fd, 0, 64 * M), OK);
    assert!(client.read(fd, 0, 32 * M) == (OK, vec![0; 32 * M as usize]));
    assert_eq!((client.plain("Flush", fd), client.plain("InvalidateCache", fd)), (OK, OK));
    server.stop();
}

#[test]
fn a_file_grows() {
    let lab = lab("");
    let server = lab.start();
    let mut client = Nebd::connect(&lab);
    let fd = client.open(VOL1);
    assert_eq!(client.write(fd, 64 * M, &pattern(1, K)), NOK);
    assert_eq!((client.resize(fd, 64 * M), client.resize(fd, 80 * M)), (OK, OK));
    assert_eq!(client.info(fd), Some([80 * M, M, 80, 4096]));
    assert_eq!(client.write(fd, 64 * M, &pattern(1, K)), OK);
    lab.ask(&["volume", "resize", "--name", "vol1", "--size", "96MiB"]);
    assert_eq!(client.info(fd).unwrap()[0], 96 * M, "seen without opening it again");
    assert_eq!(client.write(fd, 95 * M, &pattern(2, K)), OK);
    drop(client);
    server.stop();
    let server = lab.start();
    let mut client = Nebd::connect(&lab);
    assert_eq!(client.info(fd).unwrap()[0], 96 * M);
    assert_eq!(client.read(fd, 64 * M, 4096), (OK, pattern(1, K)));
    server.stop();
}

#[test]
fn two_clients_one_volume() {
    let lab = lab("");
    let server = lab.start();
    let (mut a, mut b) = (Nebd::connect(&lab), Nebd::connect(&lab));
    let fd = a.open(VOL1);
    assert_eq!(b.open_with(VOL1, None), (OK, Some(fd)));
    let tail = format!("{VOL1}:/etc/curve/client.conf");
    let (code, other) = b.open_with(&tail, Some(false));
    let other = other.unwrap();
    assert!(code == OK && other != fd);
    assert_eq!(a.write(fd, 0, &pattern(1, K)), OK);
    assert_eq!((b.read(fd, 0, 4096), b.read(other, 0, 4096)), ((OK, pattern(1, K)), (OK, pattern(1, K))));
    // Both at once, each on its half, with many in flight.
    std::thread::scope(|scope| {
        for half in 0..2u64 {
            let lab = &lab;
            scope.spawn(move || {
                let mut client = Nebd::connect(lab);
                for round in 0..8u64 {
                    let seed = |i: u64| half << 40 | round << 20 | i;
                    let place = |i: u64| half * 32 * M + (i * 7 % 64) * 64 * 1024;
                    for i in 0..64 {
                        client.begin("Write", &range(fd, place(i), 64 * 1024), &pattern(seed(i), 16 * K));
                    }
                    (0..64).for_each(|_| assert_eq!(client.try_receive().unwrap().status(), OK));
                    for i in 0..64 {
                        assert!(client.read(other, place(i), 64 * 1024) == (OK, pattern(seed(i), 16 * K)));
                    }
                }
            });
        }
    });
    assert_eq!(a.plain("CloseFile", fd), OK);
    assert_eq!((b.read(fd, 0, 4096).0, b.read(other, 0, 4096).0), (NOK, OK));
    server.stop();
}

#[test]
fn silence_closes_a_file_and_its_next_request_opens_it() {
    let lab = lab("heartbeat_timeout_s = 1\nheartbeat_check_ms = 50");
    let server = lab.start();
    let mut client = Nebd::connect(&lab);
    let (code, fd) = client.open_with(VOL1, Some(false));
    let fd = fd.unwrap();
    assert_eq!((code, client.write(fd, 0, &pattern(1, K))), (OK, OK));
    let record = std::fs::read_to_string(lab.path("nebdserver.meta")).unwrap();
    // With signs of life it stays open for longer than the time-out, although nothing is read or written.
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(2500) {
        assert_eq!(client.keep_alive(77, &[(fd, VOL1), (4711, "cbd:p//unknown_u_")]), NOK, "one is not known");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(open_files(&lab), 1, "the other one counts all the same");
    wait_for("the file to be closed", || open_files(&lab) == 0);
    wait_for("the client to be forgotten", || var(&lab, "nebd_client_num").as_deref() == Some("0"));
    assert_eq!(std::fs::read_to_string(lab.path("nebdserver.meta")).unwrap(), record, "the record stays");
    for method in ["read", "write", "flush", "info", "discard", "resize", "invalidate"] {
        wait_for("the file to be closed", || open_files(&lab) == 0);
        let code = match method {
            "read" => {
                let (code, data) = client.read(fd, 0, 4096);
                assert_eq!(data, pattern(1, K));
                code
            }
            "write" => client.write(fd, 0, &pattern(1, K)),
            "flush" => client.plain("Flush", fd),
            "info" => client.info(fd).map_or(NOK, |_| OK),
            "discard" => client.discard(fd, M, 4096),
            "resize" => client.resize(fd, 64 * M),
            _ => client.plain("InvalidateCache", fd),
        };
        assert_eq!((method, code), (method, OK), "on a closed file");
    }
    wait_for("the file to be closed", || open_files(&lab) == 0);
    assert_eq!(client.open_with(VOL1, None), (OK, Some(fd)), "the same number, with other flags if it likes");
    wait_for("the file to be closed", || open_files(&lab) == 0);
    assert_eq!((client.plain("CloseFile", fd), client.read(fd, 0, 4096).0), (OK, NOK));
    server.stop();
}

#[test]
fn numbers_hold_over_kill_and_restart() {
    let lab = lab("");
    for round in 0..4u64 {
        let server = lab.launch(lab.command());
        // As soon as there is a socket: part2 holds the request until the disk is recovered.
        let (mut client, answer) = Nebd::insist(&lab, 1, round * 65_536, 65_536);
        let data = |round| pattern(round, 16 * K);
        if round == 0 {
            assert_eq!(answer.status(), NOK);
            assert_eq!(client.open_with(VOL1, Some(true)), (OK, Some(1)));
            let (code, fd) = client.open_with("cbd:pool1//vol1_user_:tail", None);
            assert_eq!((code, fd), (OK, Some(2)));
        } else {
            assert!(answer.status() == OK && answer.attachment == data(round), "round {round}");
        }
        assert_eq!(client.write(2, (round + 1) * 65_536, &data(round + 1)), OK);
        assert_eq!(client.open_with(VOL1, None).0, NOK, "the flags are remembered");
        assert_eq!(client.open_with(VOL1, Some(true)), (OK, Some(1)));
        if round == 2 {
            server.stop();
        } else {
            server.kill();
        }
    }
}

#[test]
fn requests_during_recovery_are_never_of_an_unknown_number() {
    let lab = lab("");
    let server = lab.start();
    let mut client = Nebd::connect(&lab);
    assert_eq!(client.open(VOL1), 1);
    for block in 0..1000u64 {
        client.begin("Write", &range(1, block * 4096, 4096), &pattern(block, K));
    }
    (0..1000).for_each(|_| assert_eq!(client.try_receive().unwrap().status(), OK));
    server.kill();
    let mut server = lab.launch(lab.command());
    // Connections from before there is a server that answers until well after.
    std::thread::scope(|scope| {
        for block in 0..40u64 {
            let lab = &lab;
            scope.spawn(move || {
                std::thread::sleep(Duration::from_millis(5 * block));
                let (_, answer) = Nebd::insist(lab, 1, block * 4096, 4096);
                assert_eq!((answer.status(), answer.attachment == pattern(block, K)), (OK, true), "block {block}");
            });
        }
    });
    server.wait_ready();
    server.stop();
}

#[test]
fn a_client_dies_with_requests_in_flight() {
    let lab = lab("");
    let server = lab.start();
    let mut other = Nebd::connect(&lab);
    let fd = other.open(VOL1);
    let before = server.descriptors();
    for round in 0..30u64 {
        let mut dying = Nebd::connect(&lab);
        dying.begin("OpenFile", &open(&format!("{VOL1}:{round}"), None), &[]);
        for i in 0..64u64 {
            dying.begin("Write", &range(fd, (round * 64 + i) % 256 * 65_536, 65_536), &pattern(i, 16 * K));
            dying.begin("Read", &range(fd, i * 65_536, 65_536), &[]);
            dying.begin("Discard", &range(fd, 32 * M + i * 65_536, 65_536), &[]);
        }
        if round % 3 == 0 {
            assert!(dying.try_receive().unwrap().error_code == 0);
        }
        drop(dying);
        assert_eq!(other.write(fd, 60 * M, &pattern(round, K)), OK);
        assert!(other.read(fd, 60 * M, 4096) == (OK, pattern(round, K)));
    }
    wait_for("all descriptors to be closed", || server.descriptors() <= before);
    assert_eq!(other.plain("CloseFile", fd), OK, "nothing of the dead runs any more");
    wait_buffers_free(&lab);
    server.stop();
}

#[test]
fn the_end_of_the_server_under_load() {
    let lab = lab("");
    for (round, signal) in [Signal::TERM, Signal::INT, Signal::TERM].into_iter().enumerate() {
        let mut server = lab.start();
        let mut client = Nebd::connect(&lab);
        let fd = client.open(VOL1);
        let mut idle = Nebd::connect(&lab);
        let mut half = Nebd::connect(&lab);
        half.send(b"PRPC\0\0");
        for i in 0..500u64 {
            client.begin("Write", &range(fd, i * 4096, 4096), &pattern(i + round as u64, K));
        }
        let begun = Instant::now();
        server.signal(signal);
        // Answers, then the end: never an error that part1 would take for one of the connection's.
        let mut answered = 0;
        while let Ok(answer) = client.try_receive() {
            assert_eq!((answer.error_code, answer.status()), (0, OK));
            answered += 1;
        }
        idle.expect_close();
        half.expect_close();
        assert!(server.wait().success());
        println!("{answered} of 500 answered, ended after {} ms", begun.elapsed().as_millis());
        assert!(begun.elapsed() < Duration::from_secs(10));
    }
}
