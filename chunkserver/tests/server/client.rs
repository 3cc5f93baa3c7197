//! A brpc client over one blocking socket, with frames of the test's own making.

use super::harness::{PATIENCE, POOL};
use super::wire::{CHUNK, Message, Response, request, responses};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

pub(crate) const BLOCK: usize = 4096;
pub(crate) const SUCCESS: u64 = 0;
pub(crate) const CRC_FAIL: u64 = 3;
pub(crate) const INVALID: u64 = 4;
pub(crate) const NOSPACE: u64 = 5;
pub(crate) const NO_COPYSET: u64 = 6;
pub(crate) const NO_CHUNK: u64 = 7;
pub(crate) const FAILURE: u64 = 8;
pub(crate) const BACKWARD: u64 = 10;
pub(crate) const EPOCH_TOO_OLD: u64 = 12;

pub(crate) struct Client {
    pub(crate) stream: TcpStream,
    next: u64,
}

/// ChunkRequest; which fields a method looks at is its business.
pub(crate) fn chunk_request(op: u64, copyset: u64, chunk: u64, offset: u64, size: u64, sn: u64) -> Message {
    Message::default().int(1, op).int(2, POOL).int(3, copyset).int(4, chunk).int(6, offset).int(7, size).int(9, sn)
}

pub(crate) fn write_frame(cid: u64, copyset: u64, chunk: u64, offset: u64, data: &[u8]) -> Vec<u8> {
    let message = chunk_request(2, copyset, chunk, offset, data.len() as u64, 1);
    request(CHUNK, "WriteChunk", cid, &message, data)
}

pub(crate) fn read_frame(cid: u64, copyset: u64, chunk: u64, offset: u64, size: u64) -> Vec<u8> {
    request(CHUNK, "ReadChunk", cid, &chunk_request(1, copyset, chunk, offset, size, 0), &[])
}

/// The next frame of a stream.
pub(crate) fn receive(stream: &mut impl Read) -> std::io::Result<Response> {
    let mut frame = vec![0; 12];
    stream.read_exact(&mut frame)?;
    let body = u32::from_be_bytes(frame[4..8].try_into().unwrap()) as usize;
    frame.resize(12 + body, 0);
    stream.read_exact(&mut frame[12..])?;
    Ok(responses(&frame).remove(0))
}

/// Bytes that tell place and version apart, for whole blocks.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(len);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(len);
    out
}

impl Client {
    pub(crate) fn connect(address: SocketAddr) -> Self {
        Self::over(TcpStream::connect(address).unwrap())
    }

    pub(crate) fn over(stream: TcpStream) -> Self {
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self { stream, next: 0 }
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub(crate) fn try_receive(&mut self) -> std::io::Result<Response> {
        receive(&mut self.stream)
    }

    pub(crate) fn receive(&mut self) -> Response {
        self.try_receive().unwrap()
    }

    /// The server closes, having sent nothing more.
    pub(crate) fn expect_close(&mut self) {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => assert!(rest.is_empty(), "{}", String::from_utf8_lossy(&rest)),
            Err(e) => assert_eq!(e.kind(), std::io::ErrorKind::ConnectionReset),
        }
    }

    pub(crate) fn call(&mut self, service: &str, method: &str, message: &Message, attachment: &[u8]) -> Response {
        self.next += 1;
        self.send(&request(service, method, self.next, message, attachment));
        let response = self.receive();
        assert_eq!(response.cid, self.next);
        response
    }

    pub(crate) fn chunk_call(&mut self, method: &str, message: &Message, attachment: &[u8]) -> Response {
        self.call(CHUNK, method, message, attachment)
    }

    /// Status of a write with sn 1.
    pub(crate) fn write(&mut self, copyset: u64, chunk: u64, offset: u64, data: &[u8]) -> u64 {
        let message = chunk_request(2, copyset, chunk, offset, data.len() as u64, 1);
        self.chunk_call("WriteChunk", &message, data).status()
    }

    pub(crate) fn read(&mut self, copyset: u64, chunk: u64, offset: u64, size: usize) -> (u64, Vec<u8>) {
        let message = chunk_request(1, copyset, chunk, offset, size as u64, 0);
        let response = self.chunk_call("ReadChunk", &message, &[]);
        (response.status(), response.attachment)
    }

    /// The data of a read that must succeed.
    pub(crate) fn data(&mut self, copyset: u64, chunk: u64, offset: u64, size: usize) -> Vec<u8> {
        let (status, data) = self.read(copyset, chunk, offset, size);
        assert_eq!((status, data.len()), (SUCCESS, size), "chunk {chunk} of copyset {copyset} at {offset}");
        data
    }

    pub(crate) fn delete(&mut self, copyset: u64, chunk: u64) -> u64 {
        self.chunk_call("DeleteChunk", &chunk_request(0, copyset, chunk, 0, 0, 1), &[]).status()
    }
}
