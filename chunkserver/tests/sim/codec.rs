//! The clients' own codec (rule 34): baidu_std frames and the few messages they need, written by hand from
//! the wire's field tables. Shares nothing with the server's.

use bytes::{BufMut, Bytes, BytesMut};

fn varint(out: &mut BytesMut, mut value: u64) {
    while value >= 0x80 {
        out.put_u8(value as u8 | 0x80);
        value >>= 7;
    }
    out.put_u8(value as u8);
}

pub(crate) fn number(out: &mut BytesMut, field: u64, value: u64) {
    varint(out, field << 3);
    varint(out, value);
}

pub(crate) fn bytes(out: &mut BytesMut, field: u64, value: &[u8]) {
    varint(out, field << 3 | 2);
    varint(out, value.len() as u64);
    out.put_slice(value);
}

/// A field's value on the wire.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

fn read_varint(input: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = input.split_first()?;
        *input = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

/// All fields of a message; `None` if it is malformed.
pub(crate) fn fields(mut input: &[u8]) -> Option<Vec<(u64, Value<'_>)>> {
    let mut all = Vec::new();
    while !input.is_empty() {
        let key = read_varint(&mut input)?;
        let value = match key & 7 {
            0 => Value::Number(read_varint(&mut input)?),
            2 => {
                let len = read_varint(&mut input)? as usize;
                let (head, rest) = input.split_at_checked(len)?;
                input = rest;
                Value::Bytes(head)
            }
            _ => return None,
        };
        all.push((key >> 3, value));
    }
    Some(all)
}

pub(crate) fn get_number(fields: &[(u64, Value<'_>)], field: u64) -> Option<u64> {
    fields.iter().rev().find_map(|&(f, v)| match v {
        Value::Number(n) if f == field => Some(n),
        _ => None,
    })
}

pub(crate) fn get_bytes<'a>(fields: &[(u64, Value<'a>)], field: u64) -> Option<&'a [u8]> {
    fields.iter().rev().find_map(|&(f, v)| match v {
        Value::Bytes(b) if f == field => Some(b),
        _ => None,
    })
}

fn frame(meta: &[u8], body: &[u8], attachment: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(12 + meta.len() + body.len() + attachment.len());
    out.put_slice(b"PRPC");
    out.put_u32((meta.len() + body.len() + attachment.len()) as u32);
    out.put_u32(meta.len() as u32);
    out.put_slice(meta);
    out.put_slice(body);
    out.put_slice(attachment);
    out.freeze()
}

/// A request frame.
pub(crate) fn request(service: &str, method: &str, correlation: u64, body: &[u8], attachment: &[u8]) -> Bytes {
    let (mut call, mut meta) = (BytesMut::new(), BytesMut::new());
    bytes(&mut call, 1, service.as_bytes());
    bytes(&mut call, 2, method.as_bytes());
    bytes(&mut meta, 1, &call);
    number(&mut meta, 3, 0);
    number(&mut meta, 4, correlation);
    if !attachment.is_empty() {
        number(&mut meta, 5, attachment.len() as u64);
    }
    frame(&meta, body, attachment)
}

/// A response frame; only the toy server sends these.
pub(crate) fn response(correlation: u64, body: &[u8], attachment: &[u8]) -> Bytes {
    let (mut answer, mut meta) = (BytesMut::new(), BytesMut::new());
    number(&mut answer, 1, 0);
    bytes(&mut meta, 2, &answer);
    number(&mut meta, 3, 0);
    number(&mut meta, 4, correlation);
    if !attachment.is_empty() {
        number(&mut meta, 5, attachment.len() as u64);
    }
    frame(&meta, body, attachment)
}

/// A frame, either way.
#[derive(Clone, Debug)]
pub(crate) struct Frame {
    pub(crate) correlation: u64,
    /// Method of a request.
    pub(crate) method: String,
    /// RPC error of a response.
    pub(crate) error: u64,
    pub(crate) body: Bytes,
    pub(crate) attachment: Bytes,
}

/// Cut one frame off the front. `Ok(None)` = incomplete; `Err` = not this protocol.
pub(crate) fn cut(input: &mut BytesMut) -> Result<Option<Frame>, &'static str> {
    let Some(head) = input.get(..12) else { return Ok(None) };
    let word = |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]) as usize;
    if !head.starts_with(b"PRPC") {
        return Err("no PRPC");
    }
    let (total, meta_len) = (word(4), word(8));
    if meta_len > total || total > 64 << 20 {
        return Err("frame sizes");
    }
    if input.len() < 12 + total {
        return Ok(None);
    }
    let mut rest = input.split_to(12 + total).freeze().slice(12..);
    let raw_meta = rest.split_to(meta_len);
    let meta = fields(&raw_meta).ok_or("meta")?;
    let attached = get_number(&meta, 5).unwrap_or(0) as usize;
    let body_len = rest.len().checked_sub(attached).ok_or("attachment size")?;
    let body = rest.split_to(body_len);
    let call = fields(get_bytes(&meta, 1).unwrap_or(b"")).ok_or("request meta")?;
    let answer = fields(get_bytes(&meta, 2).unwrap_or(b"")).ok_or("response meta")?;
    Ok(Some(Frame {
        correlation: get_number(&meta, 4).unwrap_or(0),
        method: String::from_utf8_lossy(get_bytes(&call, 2).unwrap_or(b"")).into_owned(),
        error: get_number(&answer, 1).unwrap_or(0),
        body,
        attachment: rest,
    }))
}

/// `ChunkRequest` fields the clients use.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ChunkRequest {
    pub(crate) op: u64,
    pub(crate) pool: u64,
    pub(crate) copyset: u64,
    pub(crate) chunk: u64,
    pub(crate) offset: u64,
    pub(crate) size: u64,
    pub(crate) sn: u64,
}

impl ChunkRequest {
    pub(crate) fn encode(&self) -> BytesMut {
        let mut out = BytesMut::new();
        number(&mut out, 1, self.op);
        number(&mut out, 2, self.pool);
        number(&mut out, 3, self.copyset);
        number(&mut out, 4, self.chunk);
        number(&mut out, 6, self.offset);
        number(&mut out, 7, self.size);
        if self.sn != 0 {
            number(&mut out, 9, self.sn);
        }
        out
    }

    pub(crate) fn decode(body: &[u8]) -> Option<Self> {
        let all = fields(body)?;
        let get = |field| get_number(&all, field);
        Some(Self {
            op: get(1)?,
            pool: get(2)?,
            copyset: get(3)?,
            chunk: get(4)?,
            offset: get(6).unwrap_or(0),
            size: get(7).unwrap_or(0),
            sn: get(9).unwrap_or(0),
        })
    }
}

/// `CopysetRequest2` with one copyset of one peer.
pub(crate) fn create_copyset(pool: u64, copyset: u64, peer: &str) -> BytesMut {
    create_copyset_of(pool, copyset, &[peer.to_owned()])
}

/// `CopysetRequest2` with one copyset of these peers.
pub(crate) fn create_copyset_of(pool: u64, copyset: u64, peers: &[String]) -> BytesMut {
    let (mut entry, mut out) = (BytesMut::new(), BytesMut::new());
    number(&mut entry, 1, pool);
    number(&mut entry, 2, copyset);
    for peer in peers {
        let mut address = BytesMut::new();
        bytes(&mut address, 3, peer.as_bytes());
        bytes(&mut entry, 3, &address);
    }
    bytes(&mut out, 1, &entry);
    out
}
