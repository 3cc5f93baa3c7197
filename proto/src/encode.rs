//! Frames out: requests, responses and error replies as the bytes up to their attachment, byte for byte what brpc of 2019
//! writes. No frame leaves here that [`crate::frame::Decoder`] would not take.

use bytes::{BufMut, BytesMut};

use crate::{
    frame::{HEADER, MAGIC, MAX_BODY, MAX_ERROR_TEXT, MAX_META},
    meta::{Outgoing, Part},
};

/// Who is called, by whom.
#[derive(Clone, Copy, Debug)]
pub struct RequestHead<'a> {
    /// Full name of the service.
    pub service: &'a str,
    /// Bare name of the method.
    pub method: &'a str,
    /// A number for the callee's logs.
    pub log_id: Option<i64>,
    /// Unique among the calls in flight.
    pub correlation_id: i64,
}

/// Appends a request up to its attachment, of which the caller sends exactly `attachment_len` bytes next.
pub fn put_request<M: prost::Message>(out: &mut BytesMut, head: &RequestHead<'_>, message: &M, attachment_len: usize) {
    let part = Part::Request { service: head.service, method: head.method, log_id: head.log_id };
    put(out, Outgoing { part, correlation_id: head.correlation_id, attachment_len }, Some(message));
}

/// The same for a message that is bytes already.
pub fn put_request_bytes(out: &mut BytesMut, head: &RequestHead<'_>, message: &[u8], attachment_len: usize) {
    let part = Part::Request { service: head.service, method: head.method, log_id: head.log_id };
    put_head(out, Outgoing { part, correlation_id: head.correlation_id, attachment_len }, message.len());
    out.put_slice(message);
}

/// Appends a successful response whose message is bytes already, without attachment.
pub fn put_response_bytes(out: &mut BytesMut, correlation_id: i64, message: &[u8]) {
    let part = Part::Response { error_code: 0, error_text: "" };
    put_head(out, Outgoing { part, correlation_id, attachment_len: 0 }, message.len());
    out.put_slice(message);
}

/// Appends a successful response up to its attachment, of which the caller sends exactly `attachment_len` bytes next.
pub fn put_response<M: prost::Message>(out: &mut BytesMut, correlation_id: i64, message: &M, attachment_len: usize) {
    let part = Part::Response { error_code: 0, error_text: "" };
    put(out, Outgoing { part, correlation_id, attachment_len }, Some(message));
}

/// Appends a whole error response. `code` is not 0; the text is cut to [`MAX_ERROR_TEXT`].
pub fn put_error(out: &mut BytesMut, correlation_id: i64, code: i32, text: &str) {
    assert!(code != 0, "an error response without an error");
    let text = text.get(..text.floor_char_boundary(MAX_ERROR_TEXT)).unwrap_or_default();
    let part = Part::Response { error_code: code, error_text: text };
    put(out, Outgoing { part, correlation_id, attachment_len: 0 }, None::<&()>);
}

fn put<M: prost::Message>(out: &mut BytesMut, meta: Outgoing<'_>, message: Option<&M>) {
    put_head(out, meta, message.map_or(0, prost::Message::encoded_len));
    if let Some(message) = message {
        message.encode(out).expect("a BytesMut grows");
    }
}

/// Everything before the message.
fn put_head(out: &mut BytesMut, meta: Outgoing<'_>, message_size: usize) {
    let meta_size = meta.len();
    let body_size = meta_size + message_size + meta.attachment_len;
    assert!(body_size <= MAX_BODY && meta_size <= MAX_META, "a frame no peer would accept: {body_size} bytes");
    out.reserve(HEADER + meta_size + message_size);
    out.put_slice(MAGIC);
    out.put_u32(body_size as u32);
    out.put_u32(meta_size as u32);
    meta.put(out);
}
