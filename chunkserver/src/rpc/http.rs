//! HTTP/1.x requests on the RPC port: a bounded parser and the texts of replies. Sans-I/O.
//!
//! Promises: a request owns at most its head ([`HTTP_HEAD_BYTES_MAX`]); its body is counted and skipped; whatever is
//! malformed becomes a request with a [`HttpRequest::problem`], which is answered and then the connection closes.

use crate::limits::{HTTP_BODY_BYTES_MAX, HTTP_HEAD_BYTES_MAX};
use bytes::Bytes;

/// A request. Its body is not kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HttpRequest {
    /// The method as sent.
    pub method: String,
    /// Path, percent-decoded, without the query.
    pub path: String,
    /// What follows `?`.
    pub query: String,
    /// The connection stays open after the reply.
    pub keep_alive: bool,
    /// Status to answer instead of serving it.
    pub problem: Option<u16>,
}

/// Parser of one connection.
#[derive(Debug, Default)]
pub struct HttpParser {
    head: Vec<u8>,
    /// Set when the head is complete: the request, and how much of its body is still to come.
    body: Option<(HttpRequest, usize)>,
    /// The head it was parsed from, and how much of its body was passed over.
    parsed: (Vec<u8>, usize),
}

impl HttpParser {
    /// Take bytes from `input`; `Some` when a request is complete, with `input` standing behind it.
    pub fn feed(&mut self, input: &mut &[u8]) -> Option<HttpRequest> {
        if self.body.is_none() {
            self.take_head(input)?;
        }
        let (request, missing) = self.body.as_mut()?;
        let skip = (*missing).min(input.len());
        *input = input.get(skip..).unwrap_or_default();
        *missing -= skip;
        self.parsed.1 += skip;
        if *missing > 0 && request.problem.is_none() {
            return None;
        }
        self.body.take().map(|(request, _)| request)
    }

    /// Bytes it holds.
    #[must_use]
    pub fn held(&self) -> usize {
        self.head.capacity() + self.parsed.0.capacity()
    }

    /// What a fresh parser must be given to be where this one is; zeros stand for what was passed over of a body.
    #[must_use]
    pub fn begun(&self) -> Vec<u8> {
        match &self.body {
            None => self.head.clone(),
            Some(_) => {
                let (mut bytes, passed) = self.parsed.clone();
                bytes.resize(bytes.len() + passed, 0);
                bytes
            }
        }
    }

    fn take_head(&mut self, input: &mut &[u8]) -> Option<()> {
        let before = self.head.len();
        let room = HTTP_HEAD_BYTES_MAX - before;
        let taken = input.get(..room.min(input.len()))?;
        self.head.extend_from_slice(taken);
        // The end may lie across the border of two inputs.
        let from = before.saturating_sub(3);
        let end = self.head.get(from..)?.windows(4).position(|four| four == b"\r\n\r\n").map(|at| from + at + 4);
        match end {
            Some(end) => {
                *input = input.get(end - before..)?;
                let mut head = std::mem::take(&mut self.head);
                head.truncate(end);
                self.body = Some(parse_head(&head));
                self.parsed = (head, 0);
                Some(())
            }
            None if self.head.len() == HTTP_HEAD_BYTES_MAX => {
                self.head = Vec::new();
                *input = &[];
                self.body = Some((HttpRequest { problem: Some(431), ..HttpRequest::default() }, 0));
                Some(())
            }
            None => {
                *input = &[];
                None
            }
        }
    }
}

fn parse_head(head: &[u8]) -> (HttpRequest, usize) {
    let bad = |status| (HttpRequest { problem: Some(status), ..HttpRequest::default() }, 0);
    let Ok(text) = std::str::from_utf8(head) else { return bad(400) };
    let mut lines = text.split("\r\n");
    let mut words = lines.next().unwrap_or_default().split(' ');
    let (Some(method), Some(target), Some(version), None) = (words.next(), words.next(), words.next(), words.next())
    else {
        return bad(400);
    };
    if !(version == "HTTP/1.1" || version == "HTTP/1.0") || !target.starts_with('/') {
        return bad(400);
    }
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let Some(path) = percent_decoded(path) else { return bad(400) };
    let mut keep_alive = version == "HTTP/1.1";
    let mut length = 0usize;
    for line in lines.filter(|line| !line.is_empty()) {
        let Some((name, value)) = line.split_once(':') else { return bad(400) };
        let value = value.trim();
        if name.eq_ignore_ascii_case("connection") {
            if value.eq_ignore_ascii_case("close") {
                keep_alive = false;
            } else if value.eq_ignore_ascii_case("keep-alive") {
                keep_alive = true;
            }
        } else if name.eq_ignore_ascii_case("content-length") {
            match value.parse::<usize>() {
                Ok(n) if n <= HTTP_BODY_BYTES_MAX => length = n,
                Ok(_) => return bad(413),
                Err(_) => return bad(400),
            }
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            return bad(411);
        }
    }
    let request = HttpRequest { method: method.into(), path, query: query.into(), keep_alive, problem: None };
    (request, length)
}

fn percent_decoded(text: &str) -> Option<String> {
    if !text.contains('%') {
        return Some(text.to_owned());
    }
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = tail;
        if *first != b'%' {
            out.push(*first);
            continue;
        }
        let digits = std::str::from_utf8(tail.get(..2)?).ok()?;
        out.push(u8::from_str_radix(digits, 16).ok()?);
        rest = tail.get(2..)?;
    }
    String::from_utf8(out).ok()
}

/// A reply to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpReply {
    /// Status.
    pub status: u16,
    /// brpc's error code, sent as `x-bd-error-code`.
    pub error_code: Option<u32>,
    /// Body, plain text.
    pub body: String,
}

impl HttpReply {
    /// 200 with a text.
    #[must_use]
    pub fn ok(body: impl Into<String>) -> Self {
        Self { status: 200, error_code: None, body: body.into() }
    }
    /// A failure.
    #[must_use]
    pub fn error(status: u16, code: u32, body: impl Into<String>) -> Self {
        Self { status, error_code: Some(code), body: body.into() }
    }

    /// The bytes; a HEAD request gets the head alone.
    #[must_use]
    pub fn encode(&self, request: &HttpRequest) -> Bytes {
        let reason = match self.status {
            200 => "OK",
            400 => "Bad Request",
            403 => "Forbidden",
            404 => "Not Found",
            405 => "Method Not Allowed",
            411 => "Length Required",
            413 => "Content Too Large",
            431 => "Request Header Fields Too Large",
            503 => "Service Unavailable",
            _ => "Internal Server Error",
        };
        let mut head = format!(
            "HTTP/1.1 {} {reason}\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n",
            self.status,
            self.body.len()
        );
        if let Some(code) = self.error_code {
            head.push_str(&format!("x-bd-error-code: {code}\r\n"));
        }
        if self.status == 405 {
            head.push_str("Allow: GET, HEAD, POST\r\n");
        }
        head.push_str(if request.keep_alive { "Connection: keep-alive\r\n\r\n" } else { "Connection: close\r\n\r\n" });
        if request.method != "HEAD" {
            head.push_str(&self.body);
        }
        Bytes::from(head)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(mut input: &[u8]) -> Vec<HttpRequest> {
        let mut parser = HttpParser::default();
        std::iter::from_fn(|| parser.feed(&mut input)).collect()
    }

    #[test]
    fn what_the_tools_send() {
        let requests = all(b"GET /vars/a%2A?console=1 HTTP/1.1\r\nHost: x\r\nUser-Agent: curl/7.54.0\r\n\r\n\
            POST /x HTTP/1.1\r\nContent-Length: 3\r\nConnection: Close\r\n\r\nabcHEAD /health HTTP/1.0\r\n\r\n");
        let seen: Vec<_> =
            requests.iter().map(|r| (r.method.as_str(), r.path.as_str(), r.query.as_str(), r.keep_alive)).collect();
        assert_eq!(
            seen,
            [("GET", "/vars/a*", "console=1", true), ("POST", "/x", "", false), ("HEAD", "/health", "", false)]
        );
    }

    #[test]
    fn what_is_refused() {
        for (bytes, status) in [
            (b"GET  HTTP/1.1\r\n\r\n".to_vec(), 400),
            (b"GET / HTTP/2.0\r\n\r\n".to_vec(), 400),
            (b"GET /%zz HTTP/1.1\r\n\r\n".to_vec(), 400),
            (b"GET / HTTP/1.1\r\nno colon\r\n\r\n".to_vec(), 400),
            (b"GET / HTTP/1.1\r\nContent-Length: 9999999\r\n\r\n".to_vec(), 413),
            (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec(), 411),
            ([b"GET /".to_vec(), vec![b'a'; HTTP_HEAD_BYTES_MAX]].concat(), 431),
            (b"GET /\xff HTTP/1.1\r\n\r\n".to_vec(), 400),
        ] {
            let requests = all(&bytes);
            assert_eq!(requests.first().and_then(|r| r.problem), Some(status), "{bytes:?}");
            assert!(!requests[0].keep_alive);
        }
    }

    #[test]
    fn a_reply_says_its_length_and_head_has_no_body() {
        let mut request = HttpRequest { method: "GET".into(), keep_alive: true, ..HttpRequest::default() };
        let reply = HttpReply::error(404, 1002, "no");
        let text = String::from_utf8(reply.encode(&request).to_vec()).unwrap();
        assert!(text.starts_with("HTTP/1.1 404 Not Found\r\n") && text.ends_with("\r\n\r\nno"));
        assert!(text.contains("Content-Length: 2\r\n") && text.contains("x-bd-error-code: 1002\r\n"));
        request.method = "HEAD".into();
        assert!(reply.encode(&request).ends_with(b"\r\n\r\n"));
    }

    proptest! {
        #[test]
        fn any_split_gives_the_same_requests(cuts in prop::collection::vec(0usize..200, 0..8)) {
            let bytes = b"GET /vars HTTP/1.1\r\nA: b\r\n\r\nPOST /p HTTP/1.1\r\nContent-Length: 5\r\n\r\nhelloGET /q?x HTTP/1.1\r\n\r\n";
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(bytes.len())).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let mut parser = HttpParser::default();
            let mut seen = Vec::new();
            for pair in cuts.windows(2) {
                let mut part = &bytes[pair[0]..pair[1]];
                while let Some(request) = parser.feed(&mut part) {
                    seen.push(request);
                }
                prop_assert!(part.is_empty());
            }
            prop_assert_eq!(seen, all(bytes));
        }

        #[test]
        fn hostile_bytes_never_panic_and_never_grow(bytes in prop::collection::vec(any::<u8>(), 0..20_000)) {
            let mut parser = HttpParser::default();
            let mut input = bytes.as_slice();
            for _ in 0..50 {
                let _ = parser.feed(&mut input);
                prop_assert!(parser.held() <= 2 * HTTP_HEAD_BYTES_MAX);
            }
        }
    }
}
