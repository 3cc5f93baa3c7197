//! The wire as this client speaks it: baidu_std frames and the few protobuf messages of a chunkserver.
//!
//! Written by hand from the protocol description and sharing nothing with the server's codec, so that a mistake made
//! there is not made here a second time. Requests come out byte for byte as the original C++ client of 2019 puts them
//! on the wire (the tests compare with recordings); of replies only what the load needs is decoded, unknown fields are
//! skipped. Bytes from the wire are read with checked access only.

use std::fmt;

/// Length of the fixed part in front of every frame.
pub const HEADER: usize = 12;
/// brpc's default limit of a frame's body; larger ones end the connection.
pub const MAX_BODY: usize = 64 << 20;

/// Why the byte stream of a connection cannot be read any further.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WireError {
    /// The stream does not start with the frame magic.
    Magic,
    /// The body is larger than [`MAX_BODY`], or the parts do not fit into it.
    Size,
    /// A protobuf message is cut short or has an impossible tag.
    Protobuf,
}

impl fmt::Display for WireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Magic => "no frame magic",
            Self::Size => "frame sizes do not fit",
            Self::Protobuf => "malformed protobuf",
        })
    }
}

impl std::error::Error for WireError {}

/// The calls this client makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// ChunkService.ReadChunk
    ReadChunk,
    /// ChunkService.WriteChunk
    WriteChunk,
    /// CopysetService.CreateCopysetNode2
    CreateCopysetNode2,
    /// CliService2.GetLeader
    GetLeader,
}

impl Method {
    /// Full service name and method name, as they stand in the request meta.
    pub const fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::ReadChunk => ("curve.chunkserver.ChunkService", "ReadChunk"),
            Self::WriteChunk => ("curve.chunkserver.ChunkService", "WriteChunk"),
            Self::CreateCopysetNode2 => ("curve.chunkserver.CopysetService", "CreateCopysetNode2"),
            Self::GetLeader => ("curve.chunkserver.CliService2", "GetLeader"),
        }
    }
}

/// One read or write as the ChunkService takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkRequest {
    /// Write (else read).
    pub write: bool,
    /// Logical pool id.
    pub pool: u32,
    /// Copyset id inside the pool.
    pub copyset: u32,
    /// Chunk id.
    pub chunk: u64,
    /// Bytes from the start of the chunk.
    pub offset: u32,
    /// Bytes.
    pub size: u32,
    /// File version; writes carry it.
    pub sn: Option<u64>,
    /// Volume id, for the fence.
    pub file_id: Option<u64>,
    /// Volume epoch, for the fence.
    pub epoch: Option<u64>,
}

impl ChunkRequest {
    fn put(&self, out: &mut Vec<u8>) {
        put_field(out, 1, if self.write { 2 } else { 1 });
        put_field(out, 2, u64::from(self.pool));
        put_field(out, 3, u64::from(self.copyset));
        put_field(out, 4, self.chunk);
        put_field(out, 6, u64::from(self.offset));
        put_field(out, 7, u64::from(self.size));
        for (number, value) in [(9, self.sn), (18, self.file_id), (19, self.epoch)] {
            if let Some(value) = value {
                put_field(out, number, value);
            }
        }
    }
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_field(out: &mut Vec<u8>, number: u64, value: u64) {
    put_varint(out, number << 3);
    put_varint(out, value);
}

fn put_bytes(out: &mut Vec<u8>, number: u64, bytes: &[u8]) {
    put_varint(out, number << 3 | 2);
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

const fn varint_len(value: u64) -> usize {
    (70 - (value | 1).leading_zeros() as usize) / 7
}

/// Appends a request frame; the caller appends exactly `attachment` more bytes behind it.
fn put_frame(out: &mut Vec<u8>, method: Method, cid: u64, attachment: usize, body: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    let (service, name) = method.names();
    out.extend_from_slice(b"PRPC\0\0\0\0\0\0\0\0");
    put_varint(out, 1 << 3 | 2);
    // The nested message: two strings of less than 128 bytes and log_id 1.
    let nested =
        1 + varint_len(service.len() as u64) + service.len() + 1 + varint_len(name.len() as u64) + name.len() + 2;
    put_varint(out, nested as u64);
    put_bytes(out, 1, service.as_bytes());
    put_bytes(out, 2, name.as_bytes());
    put_field(out, 3, 1);
    put_field(out, 3, 0);
    put_field(out, 4, cid);
    if attachment > 0 {
        put_field(out, 5, attachment as u64);
    }
    let meta = out.len() - start - HEADER;
    body(out);
    let total = out.len() - start - HEADER + attachment;
    if let Some(sizes) = out.get_mut(start + 4..start + HEADER) {
        sizes[..4].copy_from_slice(&(total as u32).to_be_bytes());
        sizes[4..].copy_from_slice(&(meta as u32).to_be_bytes());
    }
}

/// Appends a read or write; for a write the caller appends `request.size` payload bytes behind it.
pub fn put_chunk_request(out: &mut Vec<u8>, cid: u64, request: &ChunkRequest) {
    let (method, attachment) =
        if request.write { (Method::WriteChunk, request.size as usize) } else { (Method::ReadChunk, 0) };
    put_frame(out, method, cid, attachment, |out| request.put(out));
}

/// Appends CreateCopysetNode2 for one copyset with these peers (`ip:port:0`).
pub fn put_create_copyset(out: &mut Vec<u8>, cid: u64, pool: u32, copyset: u32, peers: &[String]) {
    put_frame(out, Method::CreateCopysetNode2, cid, 0, |out| {
        let mut entry = Vec::new();
        put_field(&mut entry, 1, u64::from(pool));
        put_field(&mut entry, 2, u64::from(copyset));
        for address in peers {
            let mut peer = Vec::new();
            put_bytes(&mut peer, 3, address.as_bytes());
            put_bytes(&mut entry, 3, &peer);
        }
        put_bytes(out, 1, &entry);
    });
}

/// Appends GetLeader of a copyset.
pub fn put_get_leader(out: &mut Vec<u8>, cid: u64, pool: u32, copyset: u32) {
    put_frame(out, Method::GetLeader, cid, 0, |out| {
        put_field(out, 1, u64::from(pool));
        put_field(out, 2, u64::from(copyset));
    });
}

/// A value of a protobuf field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Value<'a> {
    /// Wire types varint, 64 bit and 32 bit.
    Number(u64),
    /// Wire type length delimited.
    Bytes(&'a [u8]),
}

/// Walks the fields of a message.
pub struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    /// The fields of `message`, in wire order.
    pub const fn new(message: &'a [u8]) -> Self {
        Self(message)
    }

    fn varint(&mut self) -> Result<u64, WireError> {
        let mut value = 0u64;
        for index in 0..10 {
            let byte = *self.0.get(index).ok_or(WireError::Protobuf)?;
            value |= u64::from(byte & 0x7f) << (7 * index);
            if byte < 0x80 {
                self.0 = self.0.get(index + 1..).ok_or(WireError::Protobuf)?;
                return Ok(value);
            }
        }
        Err(WireError::Protobuf)
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], WireError> {
        let (head, tail) = self.0.split_at_checked(len).ok_or(WireError::Protobuf)?;
        self.0 = tail;
        Ok(head)
    }

    fn field(&mut self) -> Result<(u64, Value<'a>), WireError> {
        let tag = self.varint()?;
        let fixed = |bytes: &[u8]| bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
        let value = match tag & 7 {
            0 => Value::Number(self.varint()?),
            1 => Value::Number(fixed(self.take(8)?)),
            2 => {
                let len = usize::try_from(self.varint()?).map_err(|_| WireError::Protobuf)?;
                Value::Bytes(self.take(len)?)
            }
            5 => Value::Number(fixed(self.take(4)?)),
            _ => return Err(WireError::Protobuf),
        };
        Ok((tag >> 3, value))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Value<'a>), WireError>;

    fn next(&mut self) -> Option<Self::Item> {
        (!self.0.is_empty()).then(|| self.field())
    }
}

/// A reply frame, borrowed from the receive buffer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reply<'a> {
    /// Correlation id of the request it answers.
    pub cid: u64,
    /// RPC error; 0 is success.
    pub error_code: i32,
    /// Free text of an RPC error.
    pub error_text: &'a [u8],
    /// The protobuf message.
    pub message: &'a [u8],
    /// What follows the message.
    pub attachment: &'a [u8],
}

fn word(buf: &[u8], at: usize) -> Option<usize> {
    let bytes: [u8; 4] = buf.get(at..at + 4)?.try_into().ok()?;
    Some(u32::from_be_bytes(bytes) as usize)
}

/// Bytes the frame at the start of `buf` occupies, or `None` while its header is not there yet.
pub fn frame_len(buf: &[u8]) -> Result<Option<usize>, WireError> {
    let seen = buf.len().min(4);
    if buf.get(..seen) != b"PRPC".get(..seen) {
        return Err(WireError::Magic);
    }
    let (Some(body), Some(meta)) = (word(buf, 4), word(buf, 8)) else { return Ok(None) };
    if body > MAX_BODY || meta > body {
        return Err(WireError::Size);
    }
    Ok(Some(HEADER + body))
}

/// Cuts the first reply out of `buf`; `None` while it is incomplete. Also returns how many bytes it took.
pub fn cut_reply(buf: &[u8]) -> Result<Option<(Reply<'_>, usize)>, WireError> {
    let Some(len) = frame_len(buf)? else { return Ok(None) };
    let (Some(body), Some(meta)) = (buf.get(HEADER..len), word(buf, 8)) else { return Ok(None) };
    let (meta, payload) = body.split_at_checked(meta).ok_or(WireError::Size)?;
    let mut reply = Reply::default();
    let mut attachment = 0;
    for field in Fields::new(meta) {
        match field? {
            (2, Value::Bytes(response)) => {
                for field in Fields::new(response) {
                    match field? {
                        (1, Value::Number(code)) => reply.error_code = code as i32,
                        (2, Value::Bytes(text)) => reply.error_text = text,
                        _ => {}
                    }
                }
            }
            (4, Value::Number(cid)) => reply.cid = cid,
            (5, Value::Number(size)) => attachment = usize::try_from(size).map_err(|_| WireError::Size)?,
            _ => {}
        }
    }
    let split = payload.len().checked_sub(attachment).ok_or(WireError::Size)?;
    (reply.message, reply.attachment) = payload.split_at_checked(split).ok_or(WireError::Size)?;
    Ok(Some((reply, len)))
}

/// The `status` every response of ChunkService and CopysetService carries in field 1.
pub fn status(message: &[u8]) -> Result<Option<u64>, WireError> {
    for field in Fields::new(message) {
        if let (1, Value::Number(status)) = field? {
            return Ok(Some(status));
        }
    }
    Ok(None)
}

/// The peer (`ip:port:index`) that a redirect names, in field 2 of a response.
pub fn redirect(message: &[u8]) -> Result<Option<String>, WireError> {
    for field in Fields::new(message) {
        if let (2, Value::Bytes(peer)) = field? {
            return Ok(Some(String::from_utf8_lossy(peer).into_owned()));
        }
    }
    Ok(None)
}

/// The leader's address in a GetLeader response.
pub fn leader(message: &[u8]) -> Result<Option<String>, WireError> {
    for field in Fields::new(message) {
        let (1, Value::Bytes(peer)) = field? else { continue };
        for field in Fields::new(peer) {
            if let (3, Value::Bytes(address)) = field? {
                return Ok(Some(String::from_utf8_lossy(address).into_owned()));
            }
        }
    }
    Ok(None)
}

/// Name of a CHUNK_OP_STATUS, for reports.
pub fn status_name(status: u64) -> &'static str {
    const NAMES: [&str; 13] = [
        "SUCCESS",
        "REDIRECTED",
        "DISK_FAIL",
        "CRC_FAIL",
        "INVALID_REQUEST",
        "NOSPACE",
        "COPYSET_NOTEXIST",
        "CHUNK_NOTEXIST",
        "FAILURE_UNKNOWN",
        "OVERLOAD",
        "BACKWARD",
        "CHUNK_EXIST",
        "EPOCH_TOO_OLD",
    ];
    usize::try_from(status).ok().and_then(|index| NAMES.get(index)).copied().unwrap_or("UNKNOWN_STATUS")
}
