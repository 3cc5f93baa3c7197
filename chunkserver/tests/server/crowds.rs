//! Thousands of idle connections, floods of new ones, and no descriptors left: served all the same, and after it too.

use super::client::{BLOCK, Client, SUCCESS, pattern};
use super::harness::{Lab, MIB, Setup, http, wait_for};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::net::TcpStream;
use std::process::Command;

/// How many connections this process may open; as many as it is allowed to.
fn raise_limit() -> u64 {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    getrlimit(Resource::Nofile).current.unwrap_or(1 << 20)
}

#[test]
fn ten_thousand_idle_connections() {
    let count = 10_000.min(raise_limit().saturating_sub(2000)) as usize;
    if count < 10_000 {
        eprintln!("{count} connections only: the limit of open files");
    }
    let lab = Lab::new(Setup::default());
    let server = lab.start();
    lab.copysets(4);
    let mut client = server.client();
    assert_eq!(client.write(1, 1, 0, &pattern(1, BLOCK)), SUCCESS);
    let before = server.resident_bytes();
    let idle: Vec<TcpStream> = (0..count).map(|_| TcpStream::connect(lab.address).unwrap()).collect();
    wait_for("all to be accepted", || server.descriptors() >= count);
    let grown = server.resident_bytes().saturating_sub(before);
    println!("{count} idle connections: {} bytes each", grown / count as u64);
    // Rule 15: a waiting receive owns at most 4 KiB; the rest of a connection must not be much.
    assert!(grown < count as u64 * 16 * 1024 + 32 * MIB, "{grown} bytes");
    for i in 0..50 {
        let data = pattern(i, BLOCK);
        assert_eq!(client.write(1 + i % 4, 1, 0, &data), SUCCESS);
        assert_eq!(client.data(1 + i % 4, 1, 0, BLOCK), data);
    }
    // They are not dead: first and last and some in between are served.
    for stream in idle.iter().step_by(idle.len() / 20) {
        let mut one = Client::over(stream.try_clone().unwrap());
        assert_eq!(one.read(1, 1, 0, BLOCK).0, SUCCESS);
    }
    assert_eq!(server.client().read(2, 1, 0, BLOCK).0, SUCCESS);
    drop(idle);
    wait_for("all to be closed", || server.descriptors() < 200);
    assert_eq!(client.read(3, 1, 0, BLOCK).0, SUCCESS);
    let took = server.stop();
    println!("stopped in {} ms", took.as_millis());
}

#[test]
fn a_flood_of_connections() {
    raise_limit();
    let lab = Lab::new(Setup::default());
    let server = lab.start();
    lab.copysets(2);
    let mut client = server.client();
    let block = pattern(1, BLOCK);
    assert_eq!(client.write(1, 1, 0, &block), SUCCESS);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for i in 0..500 {
                    let mut one = Client::connect(lab.address);
                    if i % 5 == 0 {
                        assert_eq!(one.data(1, 1, 0, BLOCK), block);
                    }
                }
            });
        }
        for _ in 0..100 {
            assert_eq!(client.data(1, 1, 0, BLOCK), block);
        }
    });
    wait_for("all to be closed", || server.descriptors() < 200);
    assert!(http(lab.address, "/health").unwrap().ends_with("OK"));
}

#[test]
fn no_descriptors_left() {
    let lab = Lab::new(Setup::default());
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -n 100 && exec \"$0\" serve --config \"$1\"", super::harness::BINARY]);
    command.arg(lab.path("chunkserver.toml"));
    let mut server = lab.launch(command);
    server.wait_ready();
    lab.copysets(2);
    let mut client = server.client();
    let block = pattern(1, BLOCK);
    assert_eq!(client.write(1, 1, 0, &block), SUCCESS);
    for round in 0..3 {
        let mut crowd: Vec<Client> = (0..300).map(|_| Client::connect(lab.address)).collect();
        wait_for("the last descriptor", || server.descriptors() >= 100);
        for i in 0..20 {
            let data = pattern(i, BLOCK);
            assert_eq!(client.write(2, 1, 0, &data), SUCCESS, "who is there is served");
            assert_eq!(client.data(2, 1, 0, BLOCK), data);
        }
        // Who has to wait is served as soon as others leave.
        let mut last = crowd.pop().unwrap();
        drop(crowd);
        assert_eq!(last.data(1, 1, 0, BLOCK), block, "round {round}");
        drop(last);
        wait_for("all to be closed", || server.descriptors() < 80);
        assert_eq!(lab.ask(&["status"])["shards"].as_array().unwrap().len(), 2);
    }
    assert!(server.is_alive());
    server.stop();
}
