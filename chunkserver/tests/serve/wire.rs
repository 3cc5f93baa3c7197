//! baidu_std and protobuf by hand, for tests.

use std::collections::BTreeMap;

pub(crate) fn varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// A protobuf message of numbers and byte strings.
#[derive(Clone, Default)]
pub(crate) struct Message(pub(crate) Vec<u8>);

impl Message {
    pub(crate) fn int(mut self, field: u64, value: u64) -> Self {
        varint(field << 3, &mut self.0);
        varint(value, &mut self.0);
        self
    }
    pub(crate) fn bytes(mut self, field: u64, value: &[u8]) -> Self {
        varint(field << 3 | 2, &mut self.0);
        varint(value.len() as u64, &mut self.0);
        self.0.extend_from_slice(value);
        self
    }
}

pub(crate) fn request(service: &str, method: &str, cid: u64, message: &Message, attachment: &[u8]) -> Vec<u8> {
    let call = Message::default().bytes(1, service.as_bytes()).bytes(2, method.as_bytes()).int(3, 1);
    let mut meta = Message::default().bytes(1, &call.0).int(3, 0).int(4, cid);
    if !attachment.is_empty() {
        meta = meta.int(5, attachment.len() as u64);
    }
    frame(&meta, &[&message.0, attachment].concat())
}

pub(crate) fn frame(meta: &Message, rest: &[u8]) -> Vec<u8> {
    let mut out = b"PRPC".to_vec();
    out.extend_from_slice(&((meta.0.len() + rest.len()) as u32).to_be_bytes());
    out.extend_from_slice(&(meta.0.len() as u32).to_be_bytes());
    out.extend_from_slice(&meta.0);
    out.extend_from_slice(rest);
    out
}

pub(crate) const CHUNK: &str = "curve.chunkserver.ChunkService";

/// ChunkRequest of copyset 1:701.
pub(crate) fn chunk(op: u64, chunk: u64, offset: u64, size: u64, sn: u64) -> Message {
    Message::default().int(1, op).int(2, 1).int(3, 701).int(4, chunk).int(6, offset).int(7, size).int(9, sn)
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    Int(u64),
    Bytes(Vec<u8>),
}

pub(crate) type Fields = BTreeMap<u64, Vec<Value>>;

fn read_varint(bytes: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = bytes[0];
        *bytes = &bytes[1..];
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return value;
        }
    }
    panic!("a varint without end");
}

pub(crate) fn fields(mut bytes: &[u8]) -> Fields {
    let mut fields = Fields::new();
    while !bytes.is_empty() {
        let key = read_varint(&mut bytes);
        let value = match key & 7 {
            0 => Value::Int(read_varint(&mut bytes)),
            2 => {
                let len = read_varint(&mut bytes) as usize;
                let (value, rest) = bytes.split_at(len);
                bytes = rest;
                Value::Bytes(value.to_vec())
            }
            other => panic!("wire type {other}"),
        };
        fields.entry(key >> 3).or_default().push(value);
    }
    fields
}

/// A response frame, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Response {
    pub(crate) cid: u64,
    pub(crate) error_code: u64,
    pub(crate) error_text: String,
    pub(crate) message: Fields,
    pub(crate) attachment: Vec<u8>,
}

impl Response {
    pub(crate) fn int(&self, field: u64) -> Option<u64> {
        match self.message.get(&field)?.first()? {
            Value::Int(value) => Some(*value),
            Value::Bytes(_) => None,
        }
    }
    pub(crate) fn status(&self) -> u64 {
        assert_eq!(self.error_code, 0, "{}", self.error_text);
        self.int(1).unwrap()
    }
}

/// Every response in `bytes`; there must be nothing else.
pub(crate) fn responses(mut bytes: &[u8]) -> Vec<Response> {
    let mut all = Vec::new();
    while !bytes.is_empty() {
        assert_eq!(&bytes[..4], b"PRPC");
        let size = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
        let (body, meta) = (size(4), size(8));
        let (head, rest) = bytes.split_at(12 + body);
        bytes = rest;
        let meta_fields = fields(&head[12..12 + meta]);
        let int = |fields: &Fields, field| match fields.get(&field).map(Vec::as_slice) {
            Some([Value::Int(value)]) => *value,
            None => 0,
            other => panic!("{other:?}"),
        };
        assert_eq!(meta_fields.get(&3), Some(&vec![Value::Int(0)]), "compress_type is explicit");
        let Some([Value::Bytes(response)]) = meta_fields.get(&2).map(Vec::as_slice) else { panic!("no response part") };
        let response = fields(response);
        assert!(response.contains_key(&1), "error_code is explicit");
        let attachment = int(&meta_fields, 5) as usize;
        assert!(attachment > 0 || !meta_fields.contains_key(&5));
        let message_end = 12 + body - attachment;
        all.push(Response {
            cid: int(&meta_fields, 4),
            error_code: int(&response, 1),
            error_text: match response.get(&2).map(Vec::as_slice) {
                Some([Value::Bytes(text)]) => String::from_utf8(text.clone()).unwrap(),
                _ => String::new(),
            },
            message: fields(&head[12 + meta..message_end]),
            attachment: head[message_end..].to_vec(),
        });
    }
    all
}
