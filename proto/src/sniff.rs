//! What protocol a message is of, told from its first bytes: a port serves baidu_std and HTTP/1, message by message.

use crate::frame::{FrameError, MAGIC};

const HTTP_METHODS: [&[u8]; 9] =
    [b"GET ", b"HEAD ", b"POST ", b"PUT ", b"DELETE ", b"OPTIONS ", b"PATCH ", b"CONNECT ", b"TRACE "];
const HTTP2: &[u8] = b"PRI ";
const STREAM: &[u8] = b"STRM";

/// Verdict on a message's first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sniff {
    /// Too few to tell.
    Wait,
    /// baidu_std.
    Frame,
    /// HTTP/1.
    Http,
}

/// What protocol a message's first bytes are of.
pub(crate) fn sniff(first: &[u8]) -> Result<Sniff, FrameError> {
    // Either one is the other's beginning; decided once `known` is complete.
    let fits = |known: &[u8]| first.starts_with(known) || known.starts_with(first);
    if fits(MAGIC) {
        return Ok(if first.len() < MAGIC.len() { Sniff::Wait } else { Sniff::Frame });
    }
    if HTTP_METHODS.iter().any(|method| first.starts_with(method)) {
        return Ok(Sniff::Http);
    }
    if first.starts_with(HTTP2) {
        return Err(FrameError::Http2);
    }
    if first.starts_with(STREAM) {
        return Err(FrameError::Streaming);
    }
    if fits(HTTP2) || fits(STREAM) || HTTP_METHODS.iter().any(|method| fits(method)) {
        return Ok(Sniff::Wait);
    }
    Err(FrameError::UnknownProtocol)
}
