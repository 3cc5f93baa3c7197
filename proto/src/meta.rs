//! `RpcMeta`, the head of a baidu_std frame, decoded and encoded by hand: it is on the way of every request, holds few
//! fields we use, and names that need no copy.
//!
//! Decoding promises: names are slices of the given bytes; unknown fields (those of newer peers) are passed over; a
//! request part without service or method name is refused as C++ refuses it. Encoding writes what brpc of 2019 writes:
//! ascending fields, `error_code` and `compress_type` explicit also when 0, `attachment_size` only if there is one.

use bytes::{BufMut, Bytes};

use crate::wire::{NotProtobuf, Reader, WireType, put_varint, varint_len};

/// What a frame's meta says, as far as we use it. Absent numbers are 0.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RpcMeta {
    /// Present in requests.
    pub request: Option<RequestMeta>,
    /// Present in responses (some peers leave it out on success).
    pub response: Option<ResponseMeta>,
    /// Compression of the message; only 0, none, is supported.
    pub compress_type: i32,
    /// Echoed bit for bit in the reply.
    pub correlation_id: i64,
    /// Bytes of attachment as sent: may be negative or too large, see [`crate::frame`].
    pub attachment_size: i32,
    /// Encoding of the message (newer peers); only 0, protobuf, is supported.
    pub content_type: i32,
}

/// The request part.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RequestMeta {
    /// Full name, or a short one without a dot. Bytes as sent: not necessarily UTF-8.
    pub service: Bytes,
    /// Bare method name. Bytes as sent: not necessarily UTF-8.
    pub method: Bytes,
    /// The caller's number for its logs.
    pub log_id: Option<i64>,
    /// How long the caller waits (newer peers, off by default).
    pub timeout_ms: Option<i32>,
}

/// The response part.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResponseMeta {
    /// 0 is success.
    pub error_code: i32,
    /// Free text. Bytes as sent: not necessarily UTF-8.
    pub error_text: Bytes,
}

impl RpcMeta {
    /// Decodes a whole meta.
    pub fn decode(bytes: &Bytes) -> Result<Self, NotProtobuf> {
        let mut meta = Self::default();
        let mut names = Names::default();
        let mut reader = Reader::new(bytes);
        while !reader.is_empty() {
            match reader.key()? {
                (1, WireType::Bytes) => {
                    let request = meta.request.get_or_insert_default();
                    request.merge(bytes, reader.bytes()?, &mut names)?;
                }
                (2, WireType::Bytes) => meta.response.get_or_insert_default().merge(bytes, reader.bytes()?)?,
                (3, WireType::Varint) => meta.compress_type = reader.varint()? as i32,
                (4, WireType::Varint) => meta.correlation_id = reader.varint()? as i64,
                (5, WireType::Varint) => meta.attachment_size = reader.varint()? as i32,
                (10, WireType::Varint) => meta.content_type = reader.varint()? as i32,
                (number, wire) => reader.skip(number, wire, 0)?,
            }
        }
        if meta.request.is_some() && !(names.service && names.method) { Err(NotProtobuf) } else { Ok(meta) }
    }

    /// A meta that decodes to this one (fields at their default are left out, unknown ones are gone).
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        if let Some(request) = &self.request {
            let mut part = Vec::new();
            put_bytes(&mut part, 0x0a, &request.service);
            put_bytes(&mut part, 0x12, &request.method);
            for (key, value) in [(0x18, request.log_id), (0x40, request.timeout_ms.map(i64::from))] {
                if let Some(value) = value {
                    part.push(key);
                    put_varint(&mut part, value as u64);
                }
            }
            put_bytes(&mut out, 0x0a, &part);
        }
        if let Some(response) = &self.response {
            let mut part = vec![0x08];
            put_varint(&mut part, i64::from(response.error_code) as u64);
            put_bytes(&mut part, 0x12, &response.error_text);
            put_bytes(&mut out, 0x12, &part);
        }
        for (key, value) in [
            (0x18, i64::from(self.compress_type)),
            (0x20, self.correlation_id),
            (0x28, i64::from(self.attachment_size)),
            (0x50, i64::from(self.content_type)),
        ] {
            if value != 0 {
                out.push(key);
                put_varint(&mut out, value as u64);
            }
        }
        out
    }

    /// Service and method as the caller wrote them; empty without a request part.
    pub fn names(&self) -> (&[u8], &[u8]) {
        self.request.as_ref().map_or((&[], &[]), |request| (&request.service, &request.method))
    }

    /// The response's code; a reply without one is a success.
    pub fn error_code(&self) -> i32 {
        self.response.as_ref().map_or(0, |response| response.error_code)
    }
}

/// Which of the required names were there.
#[derive(Default)]
struct Names {
    service: bool,
    method: bool,
}

impl RequestMeta {
    /// `part` lies inside `whole`.
    fn merge(&mut self, whole: &Bytes, part: &[u8], names: &mut Names) -> Result<(), NotProtobuf> {
        let mut reader = Reader::new(part);
        while !reader.is_empty() {
            match reader.key()? {
                (1, WireType::Bytes) => {
                    self.service = whole.slice_ref(reader.bytes()?);
                    names.service = true;
                }
                (2, WireType::Bytes) => {
                    self.method = whole.slice_ref(reader.bytes()?);
                    names.method = true;
                }
                (3, WireType::Varint) => self.log_id = Some(reader.varint()? as i64),
                (8, WireType::Varint) => self.timeout_ms = Some(reader.varint()? as i32),
                (number, wire) => reader.skip(number, wire, 0)?,
            }
        }
        Ok(())
    }
}

impl ResponseMeta {
    /// `part` lies inside `whole`.
    fn merge(&mut self, whole: &Bytes, part: &[u8]) -> Result<(), NotProtobuf> {
        let mut reader = Reader::new(part);
        while !reader.is_empty() {
            match reader.key()? {
                (1, WireType::Varint) => self.error_code = reader.varint()? as i32,
                (2, WireType::Bytes) => self.error_text = whole.slice_ref(reader.bytes()?),
                (number, wire) => reader.skip(number, wire, 0)?,
            }
        }
        Ok(())
    }
}

/// A meta about to be written; [`Outgoing::len`] is exactly what [`Outgoing::put`] appends.
#[derive(Clone, Copy)]
pub(crate) struct Outgoing<'a> {
    pub(crate) part: Part<'a>,
    pub(crate) correlation_id: i64,
    pub(crate) attachment_len: usize,
}

#[derive(Clone, Copy)]
pub(crate) enum Part<'a> {
    Request { service: &'a str, method: &'a str, log_id: Option<i64> },
    Response { error_code: i32, error_text: &'a str },
}

impl Outgoing<'_> {
    pub(crate) fn len(&self) -> usize {
        let part = self.part.len();
        let attachment = if self.attachment_len == 0 { 0 } else { 1 + varint_len(self.attachment_len as u64) };
        1 + varint_len(part as u64) + part + 2 + 1 + varint_len(self.correlation_id as u64) + attachment
    }

    pub(crate) fn put(&self, out: &mut impl BufMut) {
        out.put_u8(if matches!(self.part, Part::Request { .. }) { 0x0a } else { 0x12 });
        put_varint(out, self.part.len() as u64);
        self.part.put(out);
        out.put_slice(&[0x18, 0]);
        out.put_u8(0x20);
        put_varint(out, self.correlation_id as u64);
        if self.attachment_len > 0 {
            out.put_u8(0x28);
            put_varint(out, self.attachment_len as u64);
        }
    }
}

impl Part<'_> {
    fn len(&self) -> usize {
        match *self {
            Part::Request { service, method, log_id } => {
                string_len(service) + string_len(method) + log_id.map_or(0, |id| 1 + varint_len(id as u64))
            }
            Part::Response { error_code, error_text } => {
                let text = if error_text.is_empty() { 0 } else { string_len(error_text) };
                1 + varint_len(i64::from(error_code) as u64) + text
            }
        }
    }

    fn put(&self, out: &mut impl BufMut) {
        match *self {
            Part::Request { service, method, log_id } => {
                put_string(out, 0x0a, service);
                put_string(out, 0x12, method);
                if let Some(id) = log_id {
                    out.put_u8(0x18);
                    put_varint(out, id as u64);
                }
            }
            Part::Response { error_code, error_text } => {
                out.put_u8(0x08);
                put_varint(out, i64::from(error_code) as u64);
                if !error_text.is_empty() {
                    put_string(out, 0x12, error_text);
                }
            }
        }
    }
}

fn string_len(text: &str) -> usize {
    1 + varint_len(text.len() as u64) + text.len()
}

fn put_string(out: &mut impl BufMut, key: u8, text: &str) {
    put_bytes(out, key, text.as_bytes());
}

fn put_bytes(out: &mut impl BufMut, key: u8, bytes: &[u8]) {
    out.put_u8(key);
    put_varint(out, bytes.len() as u64);
    out.put_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_encoded_meta_decodes_to_itself() {
        let request = RequestMeta {
            service: Bytes::from_static(b"a.B"),
            method: Bytes::from_static(b"\xffC"),
            log_id: Some(-1),
            timeout_ms: Some(7),
        };
        let response = ResponseMeta { error_code: -5, error_text: Bytes::from_static(b"why") };
        let plain = RpcMeta { request: Some(request.clone()), correlation_id: -9, ..RpcMeta::default() };
        let odd = RpcMeta {
            request: Some(RequestMeta { log_id: None, timeout_ms: None, ..request }),
            response: Some(response),
            compress_type: 2,
            correlation_id: i64::MIN,
            attachment_size: -4096,
            content_type: 1,
        };
        for meta in [RpcMeta::default(), plain, odd] {
            assert_eq!(RpcMeta::decode(&meta.encode().into()).ok(), Some(meta));
        }
    }
}
