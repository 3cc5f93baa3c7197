//! Valid bytes to start from: captures of real peers and the golden frames of proto's tests.

use std::path::PathBuf;

pub(crate) fn unhex(text: &str) -> Vec<u8> {
    let digit = |b: u8| (b as char).to_digit(16).unwrap() as u8;
    text.as_bytes().chunks_exact(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect()
}

fn proto_tests() -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "..", "proto", "tests"].iter().collect()
}

/// Requests (or responses) that real peers sent to (or got from) a C++ chunkserver.
pub(crate) fn captured(direction: &str) -> Vec<Vec<u8>> {
    let path = proto_tests().join("data").join("chunkserver.jsonl");
    let text = std::fs::read_to_string(path).unwrap();
    let hex = |line: &str| {
        let case: serde_json::Value = serde_json::from_str(line).unwrap();
        unhex(case[direction].as_str().unwrap())
    };
    text.lines().map(hex).collect()
}

/// A frame of every message: (is a request, full name of the message, frame).
pub(crate) fn golden() -> Vec<(bool, String, Vec<u8>)> {
    let mut all = Vec::new();
    let mut files: Vec<_> =
        std::fs::read_dir(proto_tests().join("golden")).unwrap().map(|f| f.unwrap().path()).collect();
    files.sort_unstable();
    for file in files {
        for line in std::fs::read_to_string(file).unwrap().lines() {
            let columns: Vec<&str> = line.split('\t').collect();
            // Error replies have no message.
            if columns.len() < 9 {
                continue;
            }
            all.push((columns[0] == "request", columns[1].to_owned(), unhex(columns[8])));
        }
    }
    assert!(all.len() > 100, "the golden frames are there");
    all
}

/// What chunkservers of ours say to each other: kind and frame.
pub(crate) fn peers() -> Vec<(String, Vec<u8>)> {
    let text = std::fs::read_to_string(proto_tests().join("golden").join("peer.txt")).unwrap();
    let line = |line: &str| {
        let columns: Vec<&str> = line.split('\t').collect();
        (columns[0].to_owned(), unhex(columns[2]))
    };
    text.lines().map(line).collect()
}

/// A frame's meta and what follows it.
pub(crate) fn split(frame: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let meta = u32::from_be_bytes(frame[8..12].try_into().unwrap()) as usize;
    (frame[12..12 + meta].to_vec(), frame[12 + meta..].to_vec())
}

/// "PRPC", the two lengths, meta, the rest.
pub(crate) fn frame(meta: &[u8], rest: &[u8]) -> Vec<u8> {
    let mut out = b"PRPC".to_vec();
    out.extend_from_slice(&((meta.len() + rest.len()) as u32).to_be_bytes());
    out.extend_from_slice(&(meta.len() as u32).to_be_bytes());
    out.extend_from_slice(meta);
    out.extend_from_slice(rest);
    out
}

/// Bytes that open other protocols, and requests of the HTTP pages.
pub(crate) const HTTP: &[&[u8]] = &[
    b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /vars/process_*?console=1 HTTP/1.1\r\nHost: 127.0.0.1:8200\r\nUser-Agent: curl/7.54.0\r\nAccept: */*\r\n\r\n",
    b"GET /brpc_metrics HTTP/1.1\r\n\r\n",
    b"GET /metrics HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    b"HEAD /status HTTP/1.0\r\n\r\n",
    b"POST /raft_stat/4294967997 HTTP/1.1\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello",
    b"GET /raft_stat HTTP/1.1\r\n\r\n",
    b"GET /flags/%2a?setvalue=1 HTTP/1.1\r\nA: b\r\n\r\n",
    b"GET /curve.chunkserver.ChunkServerService/ChunkServerStatus HTTP/1.1\r\n\r\n",
    b"POST /ChunkService/WriteChunk HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n",
];

/// Words of the wire.
pub(crate) const WORDS: &[&[u8]] = &[
    b"PRPC",
    b"STRM",
    b"PRI * HTTP/2.0\r\n\r\nSM",
    b"GET ",
    b"POST ",
    b"HEAD ",
    b" HTTP/1.1\r\n",
    b"\r\n\r\n",
    b"\r\n",
    b"Content-Length: ",
    b"Content-Length: 65536\r\n",
    b"Content-Length: -1\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Connection: close\r\n",
    b"Connection: keep-alive\r\n",
    b"%",
    b"%2",
    b"%ff",
    b"?",
    b":",
    b"curve.chunkserver.ChunkService",
    b"WriteChunk",
    b"ReadChunk",
    b"GetChunkHash",
    b"CopysetService",
    b"CreateCopysetNode2",
    b"127.0.0.1:8200:0",
    b"\0\0\0\0",
    b"\xff\xff\xff\xff",
    b"\x0a\x80\x80\x80\x80\x10",
    &[0x0b; 120],
    &[0x0a, 0x7f],
    b"\x18\x00",
    b"\x28\x80\x20",
    b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
    b"\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80",
];
