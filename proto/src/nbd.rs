//! NBD, the server's side of the fixed newstyle protocol, sans-I/O.
//!
//! What is spoken: the haggling options EXPORT_NAME, ABORT, LIST, INFO and GO; simple replies only; the commands READ,
//! WRITE, DISC, FLUSH, TRIM and WRITE_ZEROES with FUA and NO_HOLE. STARTTLS, STRUCTURED_REPLY, EXTENDED_HEADERS, meta
//! contexts and everything newer are answered with ERR_UNSUP, which every client must cope with.
//!
//! * [`negotiation`]: from the greeting to the chosen export;
//! * [`transmission`]: requests and replies.
//!
//! All integers are big-endian. Payloads of WRITE and data of READ never enter this module: the caller moves them.

mod answers;
pub mod negotiation;
pub mod transmission;

pub use negotiation::{ClientOption, Haggle, Negotiation, NegotiationError};
pub use transmission::{BadRequestMagic, Command, Request, RequestDecoder, simple_reply};

/// First bytes of the server's greeting.
pub const NBDMAGIC: [u8; 8] = *b"NBDMAGIC";
/// Second part of the greeting; starts every option a client sends, too.
pub const IHAVEOPT: [u8; 8] = *b"IHAVEOPT";
/// Starts every option reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Starts every request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Starts every simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;

/// Handshake flag, both sides: fixed newstyle.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// Handshake flag, both sides: no 124 zero bytes behind the reply to EXPORT_NAME.
pub const FLAG_NO_ZEROES: u16 = 1 << 1;

/// Options (what a client may ask during negotiation).
pub mod option {
    /// Choose an export and start; has no error reply.
    pub const EXPORT_NAME: u32 = 1;
    /// End the session.
    pub const ABORT: u32 = 2;
    /// Name the exports.
    pub const LIST: u32 = 3;
    /// Not supported.
    pub const STARTTLS: u32 = 5;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Describe an export and start.
    pub const GO: u32 = 7;
    /// Not supported.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Not supported.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Types of option replies.
pub mod reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// One export's name.
    pub const SERVER: u32 = 2;
    /// One piece of information.
    pub const INFO: u32 = 3;
    /// The option is not known.
    pub const ERR_UNSUP: u32 = (1 << 31) + 1;
    /// Forbidden by policy.
    pub const ERR_POLICY: u32 = (1 << 31) + 2;
    /// The option's data make no sense.
    pub const ERR_INVALID: u32 = (1 << 31) + 3;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    /// The server is going down.
    pub const ERR_SHUTDOWN: u32 = (1 << 31) + 7;
    /// The client must ask for block sizes.
    pub const ERR_BLOCK_SIZE_REQD: u32 = (1 << 31) + 8;
    /// The option has too much data.
    pub const ERR_TOO_BIG: u32 = (1 << 31) + 9;
}

/// Kinds of information about an export.
pub mod info {
    /// Size and flags; always sent.
    pub const EXPORT: u16 = 0;
    /// Canonical name.
    pub const NAME: u16 = 1;
    /// Description.
    pub const DESCRIPTION: u16 = 2;
    /// Block sizes.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags: what an export can do.
pub mod flag {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH is served.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// FUA is honoured.
    pub const SEND_FUA: u16 = 1 << 3;
    /// TRIM is served.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES is served.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// A flush or FUA on one connection covers what was answered on the others.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// CACHE is served.
    pub const SEND_CACHE: u16 = 1 << 10;
}

/// Flags of a request.
pub mod command_flag {
    /// Durable before the reply.
    pub const FUA: u16 = 1 << 0;
    /// WRITE_ZEROES: allocate.
    pub const NO_HOLE: u16 = 1 << 1;
    /// READ: one chunk (structured replies only).
    pub const DF: u16 = 1 << 2;
    /// BLOCK_STATUS only.
    pub const REQ_ONE: u16 = 1 << 3;
    /// WRITE_ZEROES: only if fast.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Error values of replies; their numbers are the protocol's, whatever the system's are.
pub mod errno {
    /// Not permitted (write to a read-only export).
    pub const EPERM: u32 = 1;
    /// Input/output error.
    pub const EIO: u32 = 5;
    /// Out of memory.
    pub const ENOMEM: u32 = 12;
    /// Invalid request.
    pub const EINVAL: u32 = 22;
    /// No space, or beyond the end.
    pub const ENOSPC: u32 = 28;
    /// Too large.
    pub const EOVERFLOW: u32 = 75;
    /// Not supported.
    pub const ENOTSUP: u32 = 95;
    /// The server is going down.
    pub const ESHUTDOWN: u32 = 108;
}

/// Smallest and preferred block: what the chunk store keeps a checksum for.
pub const BLOCK_SIZE: u32 = 4096;
/// Largest READ or WRITE.
pub const MAX_PAYLOAD: u32 = 32 << 20;
/// Longest string (the protocol's own limit).
pub const MAX_STRING: usize = 4096;
/// Most data an option may have to be looked at; more is ERR_TOO_BIG.
pub const MAX_OPTION: usize = 8192;
/// An option with more data than this ends the connection instead of being passed over.
pub const MAX_OPTION_SKIP: usize = 1 << 20;

/// The integer at `at`, if the bytes are there.
fn be_u16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn be_u32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn be_u64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Moves bytes from the front of `input` into `place[*len..]`; whether `place` is full.
fn fill(input: &mut &[u8], place: &mut [u8], len: &mut usize) -> bool {
    let free = place.get_mut(*len..).unwrap_or_default();
    let count = free.len().min(input.len());
    if let (Some((head, rest)), Some(to)) = (input.split_at_checked(count), free.get_mut(..count)) {
        to.copy_from_slice(head);
        *input = rest;
        *len += count;
    }
    *len == place.len()
}
