//! Requests and replies once an export is chosen.
//!
//! ```text
//! request  u32 magic | u16 flags | u16 type | u64 cookie | u64 offset | u32 length | payload of WRITE
//! reply    u32 magic | u32 error | u64 cookie | data of a READ without error
//! ```
//!
//! [`RequestDecoder`] takes headers in any split and never a payload byte: behind a WRITE the caller consumes `length`
//! bytes itself, also when it refuses the request.

use super::{REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, be_u16, be_u32, be_u64, command_flag, errno, fill};

/// Length of a request without its payload.
pub const REQUEST_LEN: usize = 28;
/// Length of a reply without its data.
pub const REPLY_LEN: usize = 16;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Data follow in the reply.
    Read,
    /// Data follow in the request.
    Write,
    /// End the session when everything before is answered; has no reply.
    Disconnect,
    /// Make everything answered so far durable.
    Flush,
    /// The range's content may be forgotten.
    Trim,
    /// Prefetch; not offered.
    Cache,
    /// The range reads as zeros afterwards.
    WriteZeroes,
    /// Not known; has no payload, is answered with EINVAL.
    Other(u16),
}

impl Command {
    /// On the wire.
    pub fn number(self) -> u16 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Disconnect => 2,
            Self::Flush => 3,
            Self::Trim => 4,
            Self::Cache => 5,
            Self::WriteZeroes => 6,
            Self::Other(other) => other,
        }
    }
}

impl From<u16> for Command {
    fn from(number: u16) -> Self {
        match number {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::Disconnect,
            3 => Self::Flush,
            4 => Self::Trim,
            5 => Self::Cache,
            6 => Self::WriteZeroes,
            other => Self::Other(other),
        }
    }
}

/// One request without its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// See [`command_flag`].
    pub flags: u16,
    /// What to do.
    pub command: Command,
    /// Chosen by the client, echoed in the reply.
    pub cookie: u64,
    /// In bytes.
    pub offset: u64,
    /// In bytes.
    pub length: u32,
}

/// The stream is not where a request starts: the connection cannot be followed any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a request: magic {0:#010x}")]
pub struct BadRequestMagic(pub u32);

impl Request {
    /// Reads a header.
    pub fn parse(header: &[u8; REQUEST_LEN]) -> Result<Self, BadRequestMagic> {
        match be_u32(header, 0) {
            Some(REQUEST_MAGIC) => {}
            magic => return Err(BadRequestMagic(magic.unwrap_or(0))),
        }
        // The header's length is a type, so nothing can be missing.
        Ok(Self {
            flags: be_u16(header, 4).unwrap_or(0),
            command: be_u16(header, 6).unwrap_or(0).into(),
            cookie: be_u64(header, 8).unwrap_or(0),
            offset: be_u64(header, 16).unwrap_or(0),
            length: be_u32(header, 24).unwrap_or(0),
        })
    }

    /// The header, as [`Self::parse`] reads it.
    pub fn encode(&self) -> [u8; REQUEST_LEN] {
        let mut header = [0; REQUEST_LEN];
        let (flags, command) = (self.flags.to_be_bytes(), self.command.number().to_be_bytes());
        let fields: [&[u8]; 6] = [
            &REQUEST_MAGIC.to_be_bytes(),
            &flags,
            &command,
            &self.cookie.to_be_bytes(),
            &self.offset.to_be_bytes(),
            &self.length.to_be_bytes(),
        ];
        for (place, byte) in header.iter_mut().zip(fields.concat()) {
            *place = byte;
        }
        header
    }

    /// Bytes of payload behind the header.
    pub fn payload_len(&self) -> u32 {
        if self.command == Command::Write { self.length } else { 0 }
    }

    /// Whether the request may be served by an export of `size` bytes in blocks of `block_size` that takes READs and
    /// WRITEs of at most `max_payload`; otherwise the error to answer. An empty range is refused, as the protocol
    /// leaves it undefined.
    pub fn check(&self, size: u64, block_size: u32, max_payload: u32) -> Result<(), u32> {
        let allowed = match self.command {
            Command::WriteZeroes => command_flag::FUA | command_flag::NO_HOLE,
            // Harmless where it means nothing: clients may set FUA on any command once it is offered.
            Command::Read | Command::Write | Command::Trim | Command::Flush | Command::Disconnect => command_flag::FUA,
            Command::Cache | Command::Other(_) => return Err(errno::EINVAL),
        };
        if self.flags & !allowed != 0 {
            return Err(errno::EINVAL);
        }
        let moves_data = match self.command {
            Command::Flush | Command::Disconnect => return Ok(()),
            command => matches!(command, Command::Read | Command::Write),
        };
        if moves_data && self.length > max_payload {
            return Err(errno::EINVAL);
        }
        let (block, length) = (u64::from(block_size), u64::from(self.length));
        if length == 0 || !self.offset.is_multiple_of(block) || !length.is_multiple_of(block) {
            return Err(errno::EINVAL);
        }
        match self.offset.checked_add(length) {
            Some(end) if end <= size => Ok(()),
            _ if matches!(self.command, Command::Write | Command::WriteZeroes) => Err(errno::ENOSPC),
            _ => Err(errno::EINVAL),
        }
    }
}

/// Cuts a byte stream into request headers.
#[derive(Debug)]
pub struct RequestDecoder {
    header: [u8; REQUEST_LEN],
    len: usize,
}

impl Default for RequestDecoder {
    fn default() -> Self {
        Self { header: [0; REQUEST_LEN], len: 0 }
    }
}

impl RequestDecoder {
    /// A decoder where a request starts.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes bytes from the front of `input` until a header is complete; `None` when the input is used up before that.
    pub fn step(&mut self, input: &mut &[u8]) -> Result<Option<Request>, BadRequestMagic> {
        if !fill(input, &mut self.header, &mut self.len) {
            return Ok(None);
        }
        self.len = 0;
        Request::parse(&self.header).map(Some)
    }

    /// Whether the stream may end here without cutting a request short.
    pub fn is_idle(&self) -> bool {
        self.len == 0
    }

    /// The part of a header that is here; a fresh decoder that is given it is where this one is.
    pub fn begun(&self) -> &[u8] {
        self.header.get(..self.len).unwrap_or_default()
    }
}

/// A simple reply; `error` is 0 or one of [`errno`]. The data of a READ without error follow it.
pub fn simple_reply(error: u32, cookie: u64) -> [u8; REPLY_LEN] {
    let [m0, m1, m2, m3] = SIMPLE_REPLY_MAGIC.to_be_bytes();
    let [e0, e1, e2, e3] = error.to_be_bytes();
    let [c0, c1, c2, c3, c4, c5, c6, c7] = cookie.to_be_bytes();
    [m0, m1, m2, m3, e0, e1, e2, e3, c0, c1, c2, c3, c4, c5, c6, c7]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::{BLOCK_SIZE, MAX_PAYLOAD};

    /// WRITE of 4096 bytes at 8192 with FUA, as a client of the protocol document writes it.
    const WRITE: [u8; REQUEST_LEN] =
        [0x25, 0x60, 0x95, 0x13, 0, 1, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0x10, 0];

    fn request(command: Command, offset: u64, length: u32) -> Request {
        Request { flags: 0, command, cookie: 0, offset, length }
    }

    #[test]
    fn a_request_is_read_in_any_split_and_nothing_behind_it_is_taken() {
        let stream = [&WRITE[..], b"payload"].concat();
        for cut in 0..REQUEST_LEN {
            let mut decoder = RequestDecoder::new();
            let mut first = &stream[..cut];
            assert_eq!(decoder.step(&mut first), Ok(None));
            assert!(first.is_empty());
            let mut second = &stream[cut..];
            let got = decoder.step(&mut second).unwrap().unwrap();
            let flags = command_flag::FUA;
            let cookie = 0x0102_0304_0506_0708;
            assert_eq!(got, Request { flags, command: Command::Write, cookie, offset: 8192, length: 4096 });
            assert_eq!(got.payload_len(), 4096);
            assert_eq!(got.encode(), WRITE);
            assert_eq!(second, b"payload");
            assert!(decoder.is_idle());
        }
    }

    #[test]
    fn another_magic_ends_the_session() {
        let mut bytes = WRITE;
        bytes[0] = 0;
        assert_eq!(Request::parse(&bytes), Err(BadRequestMagic(0x0060_9513)));
    }

    #[test]
    fn replies_are_sixteen_bytes() {
        let want = [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 22, 1, 2, 3, 4, 5, 6, 7, 8];
        assert_eq!(simple_reply(errno::EINVAL, 0x0102_0304_0506_0708), want);
    }

    #[test]
    fn ranges_and_flags_are_checked() {
        use Command::{Cache, Disconnect, Flush, Other, Read, Trim, Write, WriteZeroes};
        const SIZE: u64 = 1 << 33;
        let check = |command, offset, length| request(command, offset, length).check(SIZE, BLOCK_SIZE, MAX_PAYLOAD);
        assert_eq!(check(Read, SIZE - 4096, 4096), Ok(()));
        assert_eq!(check(Write, 0, MAX_PAYLOAD), Ok(()));
        assert_eq!(check(Write, 0, MAX_PAYLOAD + 4096), Err(errno::EINVAL));
        assert_eq!(check(WriteZeroes, 0, u32::MAX - 4095), Ok(()));
        assert_eq!(check(Trim, 0, u32::MAX - 4095), Ok(()));
        assert_eq!(check(Read, SIZE, 4096), Err(errno::EINVAL));
        assert_eq!(check(Write, SIZE, 4096), Err(errno::ENOSPC));
        assert_eq!(check(Write, u64::MAX - 4095, 4096), Err(errno::ENOSPC));
        for (offset, length) in [(1, 4096), (512, 4096), (0, 512), (0, 0)] {
            assert_eq!(check(Read, offset, length), Err(errno::EINVAL));
        }
        assert_eq!(check(Flush, 1, 1), Ok(()));
        assert_eq!(check(Disconnect, 0, 0), Ok(()));
        assert_eq!(check(Cache, 0, 4096), Err(errno::EINVAL));
        assert_eq!(check(Other(9), 0, 4096), Err(errno::EINVAL));
        let flagged = |command, flags| Request { flags, ..request(command, 0, 4096) }.check(SIZE, 4096, MAX_PAYLOAD);
        assert_eq!(flagged(Write, command_flag::FUA), Ok(()));
        assert_eq!(flagged(Write, command_flag::NO_HOLE), Err(errno::EINVAL));
        assert_eq!(flagged(WriteZeroes, command_flag::NO_HOLE | command_flag::FUA), Ok(()));
        assert_eq!(flagged(WriteZeroes, command_flag::FAST_ZERO), Err(errno::EINVAL));
        assert_eq!(flagged(Read, command_flag::DF), Err(errno::EINVAL));
        assert_eq!(flagged(Read, 1 << 15), Err(errno::EINVAL));
    }
}
