//! Clients that do not read their replies, or stop in the middle of a frame: only they wait, and memory is bounded.

use super::client::{BLOCK, Client, SUCCESS, pattern, read_frame, write_frame};
use super::harness::{Lab, MIB, Setup};
use std::io::Write;
use std::time::Duration;

/// Reads and writes of others go on.
fn others_go_on(client: &mut Client, round: u64) {
    for i in 0..20 {
        let data = pattern(round * 100 + i, 4 * BLOCK);
        let copyset = 1 + i % 4;
        assert_eq!(client.write(copyset, 50, i * 4 * BLOCK as u64, &data), SUCCESS);
        assert_eq!(client.data(copyset, 50, i * 4 * BLOCK as u64, 4 * BLOCK), data);
    }
}

#[test]
fn whoever_does_not_read_makes_only_himself_wait() {
    let lab = Lab::new(Setup::default());
    let server = lab.start();
    lab.copysets(4);
    let mut other = server.client();
    let chunk = pattern(1, MIB as usize);
    assert_eq!(other.write(1, 1, 0, &chunk), SUCCESS);
    lab.wait_written_back(&[1]);
    let before = server.resident_bytes();
    // Each asks for 2 GiB and reads nothing, until it cannot even ask.
    let mut deaf: Vec<Client> = (0..4).map(|_| server.client()).collect();
    for client in &mut deaf {
        client.stream.set_nonblocking(true).unwrap();
        for cid in 0..2000 {
            if client.stream.write(&read_frame(cid, 1, 1, 0, MIB)).is_err() {
                break;
            }
        }
        client.stream.set_nonblocking(false).unwrap();
    }
    for round in 0..3 {
        others_go_on(&mut other, round);
        std::thread::sleep(Duration::from_millis(50));
    }
    let grown = server.resident_bytes().saturating_sub(before);
    println!("memory grew by {} MiB", grown / MIB);
    // 32 MiB of replies a connection (limits.rs), the buffers of the configuration, and sockets.
    assert!(grown < 4 * 33 * MIB + 2 * (lab.setup.buffers + lab.setup.work()), "memory grew by {} MiB", grown / MIB);
    // They were not forgotten either.
    let mut first = deaf.remove(0);
    drop(deaf);
    for _ in 0..60 {
        let answer = first.receive();
        assert_eq!(answer.status(), SUCCESS);
        assert!(answer.attachment == chunk);
    }
    others_go_on(&mut other, 9);
}

#[test]
fn whoever_stops_in_mid_frame_makes_only_himself_wait() {
    let lab = Lab::new(Setup::default());
    let server = lab.start();
    lab.copysets(4);
    let mut other = server.client();
    others_go_on(&mut other, 0);
    let whole = write_frame(7, 2, 9, 0, &pattern(7, 64 * BLOCK));
    let mut stalled: Vec<(Client, usize)> = Vec::new();
    // In the magic, in the header, in the meta, in the message, in the payload.
    for cut in [1, 3, 4, 11, 12, 20, 60, 100, 130, 200, BLOCK, 5 * BLOCK, whole.len() - 1] {
        let mut client = server.client();
        client.send(&whole[..cut]);
        stalled.push((client, cut));
    }
    others_go_on(&mut other, 1);
    for (client, cut) in &mut stalled {
        client.send(&whole[*cut..]);
        assert_eq!(client.receive().status(), SUCCESS, "cut at {cut}");
    }
    assert_eq!(other.data(2, 9, 0, 64 * BLOCK), pattern(7, 64 * BLOCK));
}

/// As many as would take all payload memory if each kept what it announced.
#[test]
fn many_that_stop_in_mid_frame_do_not_take_all_memory() {
    let lab = Lab::new(Setup::default());
    let server = lab.start();
    lab.copysets(4);
    let mut other = server.client();
    others_go_on(&mut other, 0);
    let whole = write_frame(7, 2, 9, 0, &pattern(7, MIB as usize));
    let count = 3 * lab.setup.buffers / MIB * u64::from(lab.setup.shards);
    let mut stalled: Vec<Client> = (0..count)
        .map(|_| {
            let mut client = server.client();
            client.send(&whole[..whole.len() / 2]);
            client
        })
        .collect();
    std::thread::sleep(Duration::from_millis(200));
    others_go_on(&mut other, 1);
    // Those that made others wait were given up; the rest may go on.
    let mut kept = 0;
    for client in &mut stalled {
        let goes_on = client.stream.write_all(&whole[whole.len() / 2..]).is_ok();
        kept += usize::from(goes_on && client.try_receive().is_ok_and(|answer| answer.status() == SUCCESS));
    }
    println!("{kept} of {count} were kept");
    drop(stalled);
    let data = pattern(8, MIB as usize);
    assert_eq!(other.write(2, 9, 0, &data), SUCCESS);
    assert_eq!(server.client().data(2, 9, 0, MIB as usize), data);
}

/// Deaf clients whose answers come from the device: their answers must not keep the memory that others read with.
#[test]
fn deaf_clients_do_not_keep_what_others_read_with() {
    let lab = Lab::new(Setup::default());
    let server = lab.start();
    lab.copysets(4);
    let mut other = server.client();
    for copyset in 1..5 {
        assert_eq!(other.write(copyset, 1, 0, &pattern(copyset, MIB as usize)), SUCCESS);
    }
    lab.wait_written_back(&[1, 2, 3, 4]);
    drop(other);
    server.kill();
    // Nothing is in memory now.
    let server = lab.start();
    let mut deaf: Vec<Client> = (0..4).map(|_| server.client()).collect();
    for (client, copyset) in deaf.iter_mut().zip(1..) {
        (0..60).for_each(|cid| client.send(&read_frame(cid, copyset, 1, 0, MIB)));
    }
    std::thread::sleep(Duration::from_millis(300));
    let mut other = server.client();
    for copyset in 1..5 {
        assert!(other.data(copyset, 1, 0, MIB as usize) == pattern(copyset, MIB as usize));
    }
    others_go_on(&mut other, 1);
    for (client, copyset) in deaf.iter_mut().zip(1..) {
        for _ in 0..60 {
            assert!(client.receive().attachment == pattern(copyset, MIB as usize));
        }
    }
}
