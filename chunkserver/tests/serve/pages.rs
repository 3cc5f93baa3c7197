//! The HTTP pages, with the names that `captures/http` of an original shows.

use super::node::Node;
use super::wire::{CHUNK, chunk, request};
use chunkserver::io::Instant;

fn get(node: &mut Node, path: &str) -> (String, String) {
    let mut connection = node.connection();
    let sent = node.serve(&mut connection, format!("GET {path} HTTP/1.1\r\nUser-Agent: curl/7\r\n\r\n").as_bytes());
    let text = String::from_utf8(sent).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    assert!(head.contains(&format!("Content-Length: {}\r\n", body.len())));
    (head.lines().next().unwrap().to_owned(), body.to_owned())
}

fn busy() -> Node {
    let mut node = Node::with_copyset();
    let mut connection = node.connection();
    for cid in 0..7 {
        node.serve(&mut connection, &request(CHUNK, "WriteChunk", cid, &chunk(2, 9, 0, 4096, 1), &[1; 4096]));
    }
    node.serve(&mut connection, &request(CHUNK, "ReadChunk", 8, &chunk(1, 9, 0, 4096, 0), &[]));
    node.serve(&mut connection, &request(CHUNK, "ReadChunk", 9, &chunk(1, 9, 7, 4096, 0), &[]));
    node.now = Instant(2_000_000_000);
    node
}

#[test]
fn the_names_of_the_original() {
    let mut node = busy();
    let (status, vars) = get(&mut node, "/vars");
    assert_eq!(status, "HTTP/1.1 200 OK");
    for (name, value) in [
        ("chunkserver_127_0_0_1_8402_write_request_num", "7"),
        ("chunkserver_127_0_0_1_8402_write_io_num", "7"),
        ("chunkserver_127_0_0_1_8402_write_io_bytes", "28672"),
        ("chunkserver_127_0_0_1_8402_write_error_num", "0"),
        ("chunkserver_127_0_0_1_8402_write_lat_count", "7"),
        ("chunkserver_127_0_0_1_8402_write_io_size_latency_99", "4096"),
        ("chunkserver_127_0_0_1_8402_read_request_num", "2"),
        ("chunkserver_127_0_0_1_8402_read_error_num", "1"),
        ("chunkserver_127_0_0_1_8402_leader_count", "1"),
        ("chunkserver_127_0_0_1_8402_chunk_count", "1"),
        ("chunkserver_127_0_0_1_8402_chunkfilepool_left", "61"),
        ("copyset_1_701_chunk_count", "0"),
        ("rpc_server_8402_curve_chunkserver_chunk_service_write_chunk_count", "7"),
        ("rpc_server_8402_curve_chunkserver_chunk_service_write_chunk_max_latency", "0"),
        ("curve_version", "\"0.1.0\""),
        (
            "chunkserver_127_0_0_1_8402_config_copyset_raft_log_uri",
            "\"{\"conf_name\":\"copyset.raft_log_uri\",\"conf_value\":\"curve:///data\"}\"",
        ),
    ] {
        assert!(vars.contains(&format!("{name} : {value}\n")), "{name}");
        assert_eq!(get(&mut node, &format!("/vars/{name}")).1, format!("{name} : {value}\n"));
    }
    assert!(get(&mut node, "/vars/*chunkfilepool_left,curve_$ersion").1.lines().count() == 2);
}

#[test]
fn prometheus() {
    let mut node = busy();
    let (_, text) = get(&mut node, "/metrics");
    assert_eq!(get(&mut node, "/brpc_metrics").0, "HTTP/1.1 200 OK");
    let name = "rpc_server_8402_curve_chunkserver_chunk_service_write_chunk";
    assert!(text.contains(&format!("# TYPE {name} summary\n{name}{{quantile=\"0.8\"}} 0\n")));
    assert!(text.contains(&format!("{name}_count 7\n")) && text.contains(&format!("{name}_qps ")));
    assert!(text.contains("_io_uring_enter_total 0\n"));
    assert!(
        text.contains(
            "config_copyset_raft_log_uri{conf_name=\"copyset.raft_log_uri\",conf_value=\"curve:///data\"} 0\n"
        )
    );
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (_, value) = line.rsplit_once(' ').unwrap();
        value.parse::<f64>().unwrap_or_else(|_| panic!("{line}"));
    }
}

#[test]
fn the_other_pages() {
    let mut node = busy();
    assert_eq!(get(&mut node, "/health"), ("HTTP/1.1 200 OK".into(), "OK".into()));
    let (_, version) = get(&mut node, "/version");
    assert!(version.contains("curve.chunkserver.ChunkService+"), "{version}");
    let (_, status) = get(&mut node, "/status");
    assert!(
        status.contains(
            "[curve.chunkserver.ChunkService]\n\nWriteChunk (ChunkRequest) returns (ChunkResponse)\ncount: 7\n"
        )
    );
    assert!(status.contains("GetLeader (GetLeaderRequest2) returns (GetLeaderResponse2)\n"));
    assert!(get(&mut node, "/raft_stat").1.starts_with("[4294967997]\r\n"));
    assert_eq!(get(&mut node, "/raft_stat/4294967997").0, "HTTP/1.1 200 OK");
    assert_eq!(get(&mut node, "/raft_stat/1").0, "HTTP/1.1 404 Not Found");
    assert_eq!(get(&mut node, "/flags").1, "copyset.raft_log_uri | curve:///data\n");
    assert_eq!(get(&mut node, "/flags/copyset.raft_log_uri?setvalue=1").0, "HTTP/1.1 403 Forbidden");
    assert_eq!(get(&mut node, "/vars/nothing").0, "HTTP/1.1 404 Not Found");
    assert_eq!(get(&mut node, "/ChunkService/ReadChunk").0, "HTTP/1.1 404 Not Found");
    node.ctx.shared().drain();
    assert_eq!(get(&mut node, "/health").0, "HTTP/1.1 503 Service Unavailable");
}

#[test]
fn other_methods_are_refused() {
    let mut node = busy();
    let mut connection = node.connection();
    let sent = node.serve(&mut connection, b"DELETE /health HTTP/1.1\r\n\r\nHEAD /health HTTP/1.1\r\n\r\n");
    let text = String::from_utf8(sent).unwrap();
    assert!(text.starts_with("HTTP/1.1 405 Method Not Allowed\r\n") && text.ends_with("\r\n\r\n"));
}
