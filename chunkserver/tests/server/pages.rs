//! The HTTP pages, by raw socket, on the port of the RPCs.

use super::client::{BLOCK, SUCCESS, pattern, read_frame};
use super::harness::{Lab, Setup, http};
use std::io::{Read, Write};

fn body(lab: &Lab, path: &str) -> String {
    let answer = http(lab.address, path).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{path}: {head}");
    assert!(head.contains(&format!("Content-Length: {}", body.len())), "{path}: {head}");
    body.to_owned()
}

#[test]
fn pages_of_a_running_server() {
    let lab = Lab::new(Setup::default());
    let server = lab.start();
    lab.copysets(2);
    let mut client = server.client();
    for i in 0..7 {
        assert_eq!(client.write(1 + i % 2, 1, 0, &pattern(i, BLOCK)), SUCCESS);
    }
    assert_eq!(client.read(1, 1, 0, BLOCK).0, SUCCESS);
    assert_eq!(body(&lab, "/health"), "OK");
    assert!(body(&lab, "/version").contains("curve.chunkserver.ChunkService"));
    let status = body(&lab, "/status");
    let write = status.split("WriteChunk (ChunkRequest) returns (ChunkResponse)\n").nth(1).unwrap();
    assert!(write.starts_with("count: 7\n"), "{status}");
    let prefix = format!("chunkserver_{}_", lab.address.to_string().replace(['.', ':'], "_"));
    let vars = body(&lab, "/vars");
    for (name, value) in [
        ("write_request_num", "7"),
        ("write_io_bytes", "28672"),
        ("write_error_num", "0"),
        ("read_request_num", "1"),
        ("leader_count", "2"),
        ("chunk_count", "2"),
        ("chunkfilepool_left", &(lab.ask(&["status"])["slots"].as_u64().unwrap() - 2).to_string()),
    ] {
        assert!(vars.contains(&format!("{prefix}{name} : {value}\n")), "{name} : {value} in\n{vars}");
    }
    let metrics = body(&lab, "/metrics");
    for line in metrics.lines().filter(|line| !line.starts_with('#')) {
        line.rsplit_once(' ').and_then(|(_, value)| value.parse::<f64>().ok()).unwrap_or_else(|| panic!("{line}"));
    }
    assert!(metrics.contains(&format!("{prefix}write_request_num 7")), "{metrics}");
    for path in ["/nothing", "/vars/nothing", "/ChunkService/ReadChunk"] {
        assert!(http(lab.address, path).unwrap().starts_with("HTTP/1.1 404 Not Found\r\n"), "{path}");
    }
}

#[test]
fn requests_that_are_no_pages() {
    let lab = Lab::new(Setup::default());
    let server = lab.start();
    lab.copysets(1);
    let mut client = server.client();
    let block = pattern(1, BLOCK);
    assert_eq!(client.write(1, 1, 0, &block), SUCCESS);
    // HTTP and RPC take turns on one connection.
    client.send(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n");
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\nOK") {
        let mut byte = [0];
        client.stream.read_exact(&mut byte).unwrap();
        answer.push(byte[0]);
    }
    client.send(&read_frame(1, 1, 1, 0, BLOCK as u64));
    assert_eq!(client.receive().attachment, block);
    // A head without end, and a body that is announced and does not come.
    let mut endless = server.client();
    endless.stream.write_all(&[&b"GET /"[..], &vec![b'a'; 100_000]].concat()).unwrap_or_default();
    let mut said = String::new();
    let _ = endless.stream.read_to_string(&mut said);
    assert!(said.is_empty() || said.starts_with("HTTP/1.1 4"), "{said}");
    let mut slow = server.client();
    slow.send(b"POST /health HTTP/1.1\r\nContent-Length: 100\r\n\r\n");
    let mut large = server.client();
    large.send(b"POST /health HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n");
    assert_eq!(client.data(1, 1, 0, BLOCK), block);
}
