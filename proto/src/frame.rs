//! baidu_std framing, sans-I/O: a byte stream in any split becomes frames, messages become bytes.
//!
//! ```text
//! "PRPC" | u32 BE body_size | u32 BE meta_size | RpcMeta | message | attachment       body_size counts what follows
//! ```
//!
//! What [`Decoder`] promises:
//! * The same frames whatever the split, and never a byte of the next message taken.
//! * It owns a frame's meta and message, never its attachment: after [`Step::Head`] the caller takes exactly
//!   `attachment_len` bytes of the stream itself, straight to where they belong.
//! * Bounded memory: nothing but 12 bytes before the lengths are known, then at most twice what was received of meta and
//!   message plus [`BUFFER`]. A small message costs no allocation of its own: it is cut from a buffer of [`BUFFER`] bytes.
//! * A frame that cannot be served but whose end is known is a [`Step::Reject`] (the reply is an error) and passed over;
//!   a stream that cannot be followed any more is a [`FrameError`] (the caller closes, without a reply, as C++ does).
//! * Each message of a connection is sniffed: an HTTP request becomes [`Step::Http`], after which the decoder waits for
//!   the next message.

use bytes::{Bytes, BytesMut};

pub use crate::encode::{RequestHead, put_error, put_request, put_request_bytes, put_response, put_response_bytes};
use crate::{
    code,
    meta::RpcMeta,
    sniff::{Sniff, sniff},
};

/// Largest body (meta, message and attachment). The default of every brpc; Curve changes it nowhere.
pub const MAX_BODY: usize = 64 << 20;
/// Largest meta. Those of real peers have some 50 to 150 bytes.
pub const MAX_META: usize = 64 << 10;
/// Largest message. The longest of real peers create all copysets of a pool on one server: 4000 of them are 360 KB.
pub const MAX_MESSAGE: usize = 1 << 20;
/// Magic and the two lengths.
pub const HEADER: usize = 12;
/// Small metas and messages are cut from buffers of this size; reserved ahead of what was received.
pub const BUFFER: usize = 4096;
/// Error texts are cut to this length.
pub const MAX_ERROR_TEXT: usize = 1024;

const _: () = assert!(MAX_META + MAX_MESSAGE < MAX_BODY && MAX_BODY <= i32::MAX as usize);
const _: () = assert!(MAX_ERROR_TEXT + 64 < MAX_META);

pub(crate) const MAGIC: &[u8] = b"PRPC";

/// What one step found.
#[derive(Debug)]
pub enum Step {
    /// All input was taken and no message is complete.
    NeedMore,
    /// A frame's meta and message.
    Head(FrameHead),
    /// A frame that gets an error reply. Its remaining bytes are passed over by the following steps.
    Reject(Reject),
    /// An HTTP request starts. These are its first bytes, taken from the input already; the rest of it is the caller's
    /// to consume, then the decoder goes on with the next message.
    Http(HttpStart),
}

/// A frame without its attachment.
#[derive(Debug)]
pub struct FrameHead {
    /// The meta.
    pub meta: RpcMeta,
    /// The serialized message.
    pub body: Bytes,
    /// So many bytes follow in the stream. If it is not 0 the caller consumes exactly these and then calls
    /// [`Decoder::attachment_done`].
    pub attachment_len: usize,
}

/// A frame refused by the framing; the answer is [`code::EREQUEST`], after the name of service and method has been found
/// good (an unknown one goes first).
#[derive(Debug)]
pub struct Reject {
    /// The meta.
    pub meta: RpcMeta,
    /// Why.
    pub reason: RejectReason,
}

impl Reject {
    /// The code of the error reply.
    pub const CODE: i32 = code::EREQUEST;
}

/// Why a frame is refused; the text goes into the error reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RejectReason {
    /// Negative, or larger than what follows the meta.
    #[error("Fail to parse request message, attachment_size={size} of {payload} bytes")]
    AttachmentSize {
        /// As sent.
        size: i32,
        /// Bytes behind the meta.
        payload: usize,
    },
    /// The message has more than [`MAX_MESSAGE`] bytes.
    #[error("Fail to parse request message, {0} bytes are too many")]
    MessageTooLarge(usize),
    /// A compressed message.
    #[error("Fail to parse request message, CompressType={0} is not supported")]
    Compression(i32),
    /// Not protobuf.
    #[error("Fail to parse request message, ContentType={0} is not supported")]
    ContentType(i32),
}

/// Why a connection must be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Neither baidu_std nor HTTP/1.
    #[error("unknown protocol")]
    UnknownProtocol,
    /// The first bytes of HTTP/2 (gRPC).
    #[error("HTTP/2 is not served")]
    Http2,
    /// The first bytes of brpc's streaming RPC.
    #[error("streaming RPC is not served")]
    Streaming,
    /// More than [`MAX_BODY`].
    #[error("a frame of {0} bytes")]
    BodyTooLarge(u32),
    /// More than [`MAX_META`].
    #[error("a meta of {0} bytes")]
    MetaTooLarge(u32),
    /// The meta is said to be longer than the frame.
    #[error("a meta of {meta} bytes in a frame of {body}")]
    MetaBeyondBody {
        /// meta_size.
        meta: u32,
        /// body_size.
        body: u32,
    },
    /// The meta is no RpcMeta.
    #[error("undecodable meta")]
    BadMeta,
}

/// The first bytes of an HTTP request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HttpStart {
    bytes: [u8; HEADER],
    len: usize,
}

impl HttpStart {
    /// At least the method and the space behind it.
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

/// A message that a decoder has begun: a fresh decoder that is given `bytes` is where the other one was (an attachment,
/// and whatever is due for it, is the caller's); one made by [`Decoder::skipping`] if there is something to skip.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Begun {
    /// Of the message, from its first byte; the meta may be written in another way than it was received.
    pub bytes: Vec<u8>,
    /// Bytes of a rejected frame still to come; its reject was told.
    pub skip: usize,
}

/// Cuts a byte stream into frames.
#[derive(Debug, Default)]
pub struct Decoder {
    state: State,
    buffer: BytesMut,
}

#[derive(Debug)]
enum State {
    /// Between messages, or inside a header.
    Header {
        bytes: [u8; HEADER],
        len: usize,
    },
    Meta {
        body_size: usize,
        meta_size: usize,
    },
    Message {
        meta: RpcMeta,
        size: usize,
        attachment_len: usize,
    },
    /// The caller consumes the attachment.
    Attachment,
    /// Passing over what is left of a rejected frame.
    Skip {
        left: usize,
    },
    Broken(FrameError),
}

impl Default for State {
    fn default() -> Self {
        Self::Header { bytes: [0; HEADER], len: 0 }
    }
}

impl Decoder {
    /// A decoder at the start of a stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes bytes from the front of `input` until something is complete or the input is used up. After an error every
    /// further call returns the same error.
    pub fn step(&mut self, input: &mut &[u8]) -> Result<Step, FrameError> {
        loop {
            let step = self.advance(input).inspect_err(|&error| self.state = State::Broken(error))?;
            if let Some(step) = step {
                return Ok(step);
            }
        }
    }

    /// The caller has consumed the attachment of the last [`FrameHead`] with `attachment_len > 0`.
    pub fn attachment_done(&mut self) {
        assert!(matches!(self.state, State::Attachment), "no attachment is being consumed");
        self.state = State::default();
    }

    /// Whether the stream may end here without cutting a message short.
    pub fn is_idle(&self) -> bool {
        matches!(self.state, State::Header { len: 0, .. })
    }

    /// What another decoder must be told to be where this one is: see [`Begun`].
    pub fn begun(&self) -> Begun {
        let head =
            |body: usize, meta: usize| [MAGIC, &(body as u32).to_be_bytes(), &(meta as u32).to_be_bytes()].concat();
        match &self.state {
            State::Header { bytes, len } => Begun { bytes: bytes.get(..*len).unwrap_or_default().to_vec(), skip: 0 },
            State::Meta { body_size, meta_size } => {
                Begun { bytes: [&head(*body_size, *meta_size), &self.buffer[..]].concat(), skip: 0 }
            }
            State::Message { meta, size, attachment_len } => {
                let meta = meta.encode();
                let head = head(meta.len() + size + attachment_len, meta.len());
                Begun { bytes: [&head, &meta, &self.buffer[..]].concat(), skip: 0 }
            }
            State::Skip { left } => Begun { bytes: Vec::new(), skip: *left },
            State::Attachment | State::Broken(_) => Begun::default(),
        }
    }

    /// A decoder that passes over `left` bytes before the next message: the rest of a rejected frame.
    pub fn skipping(left: usize) -> Self {
        let state = if left == 0 { State::default() } else { State::Skip { left: left.min(MAX_BODY) } };
        Self { state, buffer: BytesMut::new() }
    }

    /// A decoder whose caller consumes an attachment: [`Self::attachment_done`] ends it.
    pub fn in_attachment() -> Self {
        Self { state: State::Attachment, buffer: BytesMut::new() }
    }

    /// Bytes of memory this decoder holds.
    pub fn held(&self) -> usize {
        self.buffer.capacity()
    }

    /// One move of the state machine; `None` means go on.
    fn advance(&mut self, input: &mut &[u8]) -> Result<Option<Step>, FrameError> {
        match &mut self.state {
            State::Header { bytes, len } => {
                let count = take(input, bytes.get_mut(*len..).unwrap_or_default());
                *len += count;
                self.header()
            }
            State::Meta { body_size, meta_size } => {
                let (body_size, meta_size) = (*body_size, *meta_size);
                match gather(&mut self.buffer, input, meta_size) {
                    Some(bytes) => self.meta(&bytes, body_size - meta_size),
                    None => Ok(Some(Step::NeedMore)),
                }
            }
            State::Message { meta, size, attachment_len } => {
                let Some(body) = gather(&mut self.buffer, input, *size) else { return Ok(Some(Step::NeedMore)) };
                let head = FrameHead { meta: std::mem::take(meta), body, attachment_len: *attachment_len };
                self.state = if head.attachment_len > 0 { State::Attachment } else { State::default() };
                Ok(Some(Step::Head(head)))
            }
            State::Attachment => panic!("the attachment is the caller's to consume"),
            State::Skip { left } => {
                let count = (*left).min(input.len());
                *input = input.get(count..).unwrap_or_default();
                *left -= count;
                if *left > 0 {
                    return Ok(Some(Step::NeedMore));
                }
                self.state = State::default();
                Ok(None)
            }
            State::Broken(error) => Err(*error),
        }
    }

    /// The header got longer.
    fn header(&mut self) -> Result<Option<Step>, FrameError> {
        let State::Header { bytes, len } = self.state else { unreachable!("called in this state only") };
        match sniff(bytes.get(..len).unwrap_or_default())? {
            Sniff::Wait => return Ok(Some(Step::NeedMore)),
            Sniff::Http => {
                self.state = State::default();
                return Ok(Some(Step::Http(HttpStart { bytes, len })));
            }
            Sniff::Frame if len < HEADER => return Ok(Some(Step::NeedMore)),
            Sniff::Frame => {}
        }
        let [_, _, _, _, b0, b1, b2, b3, m0, m1, m2, m3] = bytes;
        let (body, meta) = (u32::from_be_bytes([b0, b1, b2, b3]), u32::from_be_bytes([m0, m1, m2, m3]));
        if body as usize > MAX_BODY {
            return Err(FrameError::BodyTooLarge(body));
        }
        if meta > body {
            return Err(FrameError::MetaBeyondBody { meta, body });
        }
        if meta as usize > MAX_META {
            return Err(FrameError::MetaTooLarge(meta));
        }
        self.state = State::Meta { body_size: body as usize, meta_size: meta as usize };
        Ok(None)
    }

    /// The meta is complete, `payload` bytes follow it.
    fn meta(&mut self, bytes: &Bytes, payload: usize) -> Result<Option<Step>, FrameError> {
        let meta = RpcMeta::decode(bytes).map_err(|_| FrameError::BadMeta)?;
        match split(&meta, payload) {
            Ok((size, attachment_len)) => {
                self.state = State::Message { meta, size, attachment_len };
                Ok(None)
            }
            Err(reason) => {
                self.state = State::Skip { left: payload };
                Ok(Some(Step::Reject(Reject { meta, reason })))
            }
        }
    }
}

/// How the bytes behind the meta divide into message and attachment.
fn split(meta: &RpcMeta, payload: usize) -> Result<(usize, usize), RejectReason> {
    let size = meta.attachment_size;
    let attachment = usize::try_from(size).ok().filter(|&attachment| attachment <= payload);
    let attachment = attachment.ok_or(RejectReason::AttachmentSize { size, payload })?;
    let message = payload - attachment;
    if meta.compress_type != 0 {
        return Err(RejectReason::Compression(meta.compress_type));
    }
    if meta.content_type != 0 {
        return Err(RejectReason::ContentType(meta.content_type));
    }
    if message > MAX_MESSAGE { Err(RejectReason::MessageTooLarge(message)) } else { Ok((message, attachment)) }
}

/// Moves bytes from the front of `input` to the front of `place`, as many as there are and fit.
fn take(input: &mut &[u8], place: &mut [u8]) -> usize {
    let count = input.len().min(place.len());
    if let (Some((head, rest)), Some(place)) = (input.split_at_checked(count), place.get_mut(..count)) {
        place.copy_from_slice(head);
        *input = rest;
    }
    count
}

/// Collects `size` bytes, then gives them away. Between calls `buffer` holds the part collected so far.
fn gather(buffer: &mut BytesMut, input: &mut &[u8], size: usize) -> Option<Bytes> {
    if size == 0 {
        return Some(Bytes::new());
    }
    let missing = size - buffer.len();
    let (head, rest) = input.split_at_checked(missing.min(input.len()))?;
    if buffer.capacity() - buffer.len() < head.len() {
        // A whole buffer for what fits into one, so that the next messages find room in it. For anything larger little
        // more than what was received: a length announced is not yet a length sent.
        let ahead = if size <= BUFFER { BUFFER - buffer.len() } else { missing.min(BUFFER) };
        buffer.reserve(head.len().max(ahead));
    }
    buffer.extend_from_slice(head);
    *input = rest;
    if buffer.len() < size {
        return None;
    }
    // What is left of a small buffer serves the next messages; a large one goes with its message.
    Some(if size > BUFFER { std::mem::take(buffer).freeze() } else { buffer.split().freeze() })
}
