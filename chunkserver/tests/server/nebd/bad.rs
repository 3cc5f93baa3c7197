//! Requests that cannot be served, and clients that misbehave: the outcome of the contract, and nobody else notices.

use super::client::{FILE, K, M, NOK, Nebd, OK, VOL1, http, lab, open, open_files, range, var, wait_buffers_free};
use crate::client::pattern;
use crate::harness::wait_for;
use crate::wire::{Message, request};
use rustix::process::Signal;
use std::time::{Duration, Instant};

#[test]
fn requests_that_are_refused_at_once() {
    // Whatever becomes of an I/O that fails: these are none.
    ["", "return_io_errors = true"].into_iter().for_each(refused_at_once);
}

fn refused_at_once(more: &str) {
    let lab = lab(more);
    let server = lab.start();
    let mut client = Nebd::connect(&lab);
    let fd = client.open(VOL1);
    let block = pattern(1, K);
    assert_eq!(client.write(fd, 0, &block), OK);
    let size = 64 * M;
    for (what, method, message, attachment) in [
        ("unknown number", "Read", range(fd + 1, 0, 4096), 0),
        ("number 0", "Write", range(0, 0, 4096), K),
        ("negative number", "Discard", range(u64::MAX, 0, 4096), 0),
        ("attachment too short", "Write", range(fd, 0, 8192), K),
        ("attachment too long", "Write", range(fd, 0, 4096), 2 * K),
        ("attachment missing", "Write", range(fd, 0, 4096), 0),
        ("attachment without size", "Write", range(fd, 0, 0), K),
        ("absurd size", "Write", range(fd, 0, u64::MAX), K),
        ("attachment of no whole blocks", "Write", range(fd, 0, 100), 100),
        ("more than can be taken", "Write", range(fd, 0, 8 * M), 8 * M as usize),
        ("write: misaligned offset", "Write", range(fd, 512, 4096), K),
        ("read: misaligned offset", "Read", range(fd, 1, 4096), 0),
        ("read: misaligned size", "Read", range(fd, 0, 4097), 0),
        ("discard: misaligned", "Discard", range(fd, 100, 4096), 0),
        ("write: at the end", "Write", range(fd, size, 4096), K),
        ("write: over the end", "Write", range(fd, size - 4096, 8192), 2 * K),
        ("read: over the end", "Read", range(fd, size - 4096, 8192), 0),
        ("read: the sum wraps", "Read", range(fd, u64::MAX - 4095, 8192), 0),
        ("discard: over the end", "Discard", range(fd, 4096, size), 0),
        ("discard: everything there is", "Discard", range(fd, 0, u64::MAX - 4095), 0),
        ("read: more than is read at once", "Read", range(fd, 0, 33 * M), 0),
        ("resize: smaller", "ResizeFile", Message::default().int(1, fd).int(2, 32 * M), 0),
        ("resize: no whole blocks", "ResizeFile", Message::default().int(1, fd).int(2, size + 1), 0),
        ("resize: absurd", "ResizeFile", Message::default().int(1, fd).int(2, u64::MAX), 0),
        ("resize: unknown number", "ResizeFile", Message::default().int(1, 99).int(2, size), 0),
        ("flush: unknown number", "Flush", Message::default().int(1, 99), 0),
        ("invalidate: unknown number", "InvalidateCache", Message::default().int(1, 99), 0),
        ("info: unknown number", "GetInfo", Message::default().int(1, 99), 0),
        ("open: another type", "OpenFile", open("test:/a_u_", None), 0),
        ("open: no type", "OpenFile", open("vol1", None), 0),
        ("open: no volume", "OpenFile", open("cbd:p//other_u_", None), 0),
        ("open: no owner", "OpenFile", open("cbd:p//vol1", None), 0),
        ("open: empty", "OpenFile", open("", None), 0),
        ("open: far too long", "OpenFile", open(&format!("cbd:{}//vol1_u_", "p".repeat(10_000)), None), 0),
        ("open: other flags", "OpenFile", open(VOL1, Some(true)), 0),
        ("open: other flags, too", "OpenFile", open(VOL1, Some(false)), 0),
    ] {
        let response = client.call(method, &message, &pattern(9, attachment));
        assert_eq!((response.status(), response.message.len()), (NOK, 1), "{what}");
        assert!(response.attachment.is_empty(), "{what}");
    }
    assert_eq!(client.plain("CloseFile", 99), OK, "close of an unknown number");
    assert_eq!(client.read(fd, 0, 8192), (OK, [block, vec![0; K]].concat()), "nothing was changed");
    assert_eq!(client.info(fd), Some([size, M, 64, 4096]));
    server.stop();
}

#[test]
fn empty_requests_are_answered() {
    let lab = lab("");
    let server = lab.start();
    let mut client = Nebd::connect(&lab);
    let fd = client.open(VOL1);
    assert_eq!((client.write(fd, 0, &[]), client.discard(fd, 4096, 0)), (OK, OK));
    assert_eq!(client.read(fd, 0, 0), (OK, vec![]));
    assert_eq!((client.write(77, 0, &[]), client.read(77, 0, 0).0, client.discard(77, 0, 0)), (NOK, NOK, NOK));
    assert_eq!(client.plain("CloseFile", fd), OK, "nothing of it is left running");
    server.stop();
}

#[test]
fn calls_nobody_knows() {
    let lab = lab("");
    let server = lab.start();
    let mut client = Nebd::connect(&lab);
    let none = Message::default();
    for (service, method, code) in [
        (FILE, "Truncate", 1002),
        ("nebd.client.Other", "Read", 1002),
        ("ChunkService", "ReadChunk", 1001),
        ("curve.chunkserver.ChunkService", "ReadChunk", 1002),
        ("chunkserver.internal.PeerService", "Hello", 1002),
        (FILE, "Read", 1003),
    ] {
        client.send(&request(service, method, 9, &none, &[]));
        let response = client.try_receive().unwrap();
        assert_eq!((response.cid, response.error_code), (9, code), "{service}.{method}");
    }
    let fd = client.open(VOL1);
    assert_eq!(client.write(fd, 0, &pattern(1, K)), OK, "the connection is as good as before");
    server.stop();
}

#[test]
fn garbage_costs_its_connection_and_no_other() {
    let lab = lab("");
    let server = lab.start();
    let mut good = Nebd::connect(&lab);
    let fd = good.open(VOL1);
    let before = server.descriptors();
    for bytes in [b"\x16\x03\x01\x02\x00".to_vec(), vec![0; 5000], [b"PRPC".as_slice(), &[0xff; 8]].concat()] {
        let mut bad = Nebd::connect(&lab);
        bad.send(&bytes);
        bad.expect_close();
    }
    let whole = request(FILE, "Write", 5, &range(fd, 0, 64 * K as u64), &pattern(3, 64 * K));
    for cut in [0, 1, 11, 50, 100, 5000, whole.len() - 1] {
        Nebd::connect(&lab).send(&whole[..cut]);
    }
    assert_eq!(good.read(fd, 0, 4096), (OK, vec![0; K]), "a write of which a part came is no write");
    wait_for("all descriptors to be closed", || server.descriptors() <= before);
    wait_buffers_free(&lab);
    server.stop();
}

/// More answers than a socket holds, and nobody reads them: the others are served, and the end of the server comes.
#[test]
fn clients_that_read_no_answers() {
    let lab = lab("");
    let mut server = lab.start();
    let mut good = Nebd::connect(&lab);
    let fd = good.open(VOL1);
    assert_eq!(good.write(fd, 0, &pattern(1, K)), OK);
    let deaf: Vec<Nebd> = (0..4)
        .map(|_| {
            let mut deaf = Nebd::connect(&lab);
            for i in 0..200 {
                deaf.begin("Read", &range(fd, i % 64 * M, M), &[]);
            }
            deaf
        })
        .collect();
    for round in 0..50 {
        assert_eq!(good.write(fd, 4096, &pattern(round, K)), OK);
        assert_eq!(good.read(fd, 4096, 4096), (OK, pattern(round, K)));
    }
    let begun = Instant::now();
    server.signal(Signal::TERM);
    assert!(server.wait().success());
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    drop(deaf);
}

#[test]
fn pages_on_the_socket() {
    let lab = lab("");
    let server = lab.start();
    assert!(http(&lab, "/health").ends_with("\r\n\r\nOK"));
    let mut client = Nebd::connect(&lab);
    let fd = client.open(VOL1);
    assert_eq!((client.write(fd, 0, &pattern(1, K)), client.read(fd, 0, 4096).0), (OK, OK));
    assert_eq!(client.keep_alive(1234, &[(fd, VOL1)]), OK);
    assert!(var(&lab, "nebd_version").unwrap().starts_with("\"{\"version\":\""));
    assert_eq!(var(&lab, "nebd_client_num").as_deref(), Some("1"));
    assert_eq!(var(&lab, "nebd_client_pid_1234_version").as_deref(), Some("\"{\"version\":\"2.7.0\"}\""));
    assert_eq!(open_files(&lab), 1);
    assert!(var(&lab, "process_cmdline").unwrap().contains("serve"));
    assert_eq!(var(&lab, "curve_client_vol1_write_lat_count").as_deref(), Some("1"));
    assert_eq!(var(&lab, "curve_client_vol1_read_io_bytes").as_deref(), Some("4096"));
    assert_eq!(var(&lab, "rpc_server_0_nebd_client_nebd_file_service_open_file_count").as_deref(), Some("1"));
    assert_eq!(var(&lab, "nebd_client_pid_1_version"), None);
    assert!(http(&lab, "/status").contains("[nebd.client.NebdFileService]"));
    let page = crate::harness::http(lab.address, "/vars/nebd_client_num").unwrap();
    assert!(page.ends_with("nebd_client_num : 1\n") || page.ends_with("nebd_client_num : 1\r\n"), "{page}");
    assert!(crate::harness::http(lab.address, "/metrics").unwrap().contains("nebd_client_num 1"));
    // Pages and calls on one connection.
    client.send(b"GET /version HTTP/1.1\r\n\r\n");
    let mut first = [0; 15];
    std::io::Read::read_exact(&mut client.stream, &mut first).unwrap();
    assert_eq!(&first, b"HTTP/1.1 200 OK");
    server.stop();
}
