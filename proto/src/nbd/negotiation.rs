//! From the greeting to the chosen export.
//!
//! ```text
//! server   "NBDMAGIC" "IHAVEOPT" u16 flags
//! client   u32 flags
//! client   "IHAVEOPT" u32 option | u32 length | data            repeated
//! server   u64 magic | u32 option | u32 reply | u32 length | data   one or more per option, but EXPORT_NAME:
//! server   u64 size | u16 flags | 124 zeros unless agreed otherwise
//! ```
//!
//! [`Negotiation`] takes the client's side in any split, one option at a time and never a byte behind it, and holds at
//! most [`MAX_OPTION`] bytes. The `put_*` functions write the server's side. Which exports exist is the caller's to know.

use bytes::{Buf, Bytes, BytesMut};

pub use super::answers::{
    greeting, put_ack, put_error, put_export, put_info_block_size, put_info_export, put_info_name, put_list_entry,
};
use super::{
    FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, IHAVEOPT, MAX_OPTION, MAX_OPTION_SKIP, MAX_STRING, be_u16, be_u32, fill, info,
    option, reply,
};

/// Length of an option without its data.
const OPTION_LEN: usize = 16;
const CLIENT_FLAGS_LEN: usize = 4;

/// What a client asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientOption {
    /// Start with this export; if there is none, close.
    ExportName(String),
    /// Acknowledge and close.
    Abort,
    /// Name the exports, then acknowledge.
    List,
    /// Describe an export.
    Info(Haggle),
    /// Describe an export and start.
    Go(Haggle),
    /// Nothing to act on: answer with [`put_error`].
    Refuse {
        /// Number of the option.
        option: u32,
        /// One of the errors in [`reply`].
        reply: u32,
        /// For the client's log.
        text: &'static str,
    },
}

/// The data of INFO and GO.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Haggle {
    /// The export; empty means the default one.
    pub name: String,
    /// Whether the client asked for block sizes. One that did not may send requests of any alignment.
    pub block_size: bool,
    /// Whether the client asked for the canonical name.
    pub wants_name: bool,
}

/// Why a connection must be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NegotiationError {
    /// Flags nobody offered.
    #[error("unknown client flags {0:#x}")]
    ClientFlags(u32),
    /// Not fixed newstyle: such a client understands no option reply.
    #[error("a client without fixed newstyle")]
    OldClient,
    /// Something else than an option.
    #[error("not an option")]
    BadMagic,
    /// More data than is worth passing over.
    #[error("option {option} with {length} bytes")]
    TooLong {
        /// Number of the option.
        option: u32,
        /// Length of its data.
        length: u32,
    },
    /// EXPORT_NAME with a bad name; there is no way to say so.
    #[error("a bad export name")]
    BadName,
}

/// The server's view of a negotiation.
#[derive(Debug)]
pub struct Negotiation {
    state: State,
    data: BytesMut,
    no_zeroes: bool,
}

#[derive(Debug)]
enum State {
    Flags { bytes: [u8; CLIENT_FLAGS_LEN], len: usize },
    Option { bytes: [u8; OPTION_LEN], len: usize },
    Data { option: u32, length: usize },
    Skip { option: u32, length: usize, left: usize },
    Broken(NegotiationError),
}

impl State {
    fn next_option() -> Self {
        Self::Option { bytes: [0; OPTION_LEN], len: 0 }
    }
}

impl Default for Negotiation {
    fn default() -> Self {
        Self { state: State::Flags { bytes: [0; CLIENT_FLAGS_LEN], len: 0 }, data: BytesMut::new(), no_zeroes: false }
    }
}

impl Negotiation {
    /// Before the client's first byte; the server has sent its [`greeting`].
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether both sides agreed to leave out the zeros behind the reply to EXPORT_NAME.
    pub fn no_zeroes(&self) -> bool {
        self.no_zeroes
    }

    /// What a fresh negotiation must be given to be where this one is: the client's flags and what is here of an option
    /// (zeros for data that is passed over). At most [`MAX_OPTION_SKIP`] bytes and a header.
    pub fn begun(&self) -> Vec<u8> {
        let flags = u32::from(FLAG_FIXED_NEWSTYLE) | if self.no_zeroes { u32::from(FLAG_NO_ZEROES) } else { 0 };
        let flags = flags.to_be_bytes();
        let header = |option: u32, length: usize| {
            [&flags[..], &IHAVEOPT, &option.to_be_bytes(), &(length as u32).to_be_bytes()].concat()
        };
        match &self.state {
            State::Flags { bytes, len } => bytes.get(..*len).unwrap_or_default().to_vec(),
            State::Option { bytes, len } => [&flags, bytes.get(..*len).unwrap_or_default()].concat(),
            State::Data { option, length } => [&header(*option, *length)[..], &self.data[..]].concat(),
            State::Skip { option, length, left } => {
                let mut begun = header(*option, *length);
                begun.resize(begun.len() + (length - left), 0);
                begun
            }
            State::Broken(_) => Vec::new(),
        }
    }

    /// Takes bytes from the front of `input` until an option is complete; `None` when the input is used up before that.
    /// After an error every further call returns the same error.
    pub fn step(&mut self, input: &mut &[u8]) -> Result<Option<ClientOption>, NegotiationError> {
        loop {
            let stop = self.advance(input).inspect_err(|&error| self.state = State::Broken(error))?;
            if let Some(found) = stop {
                return Ok(found);
            }
        }
    }

    /// One move: `None` means go on, `Some(None)` that the input is used up.
    fn advance(&mut self, input: &mut &[u8]) -> Result<Option<Option<ClientOption>>, NegotiationError> {
        match &mut self.state {
            State::Flags { bytes, len } => {
                if !fill(input, bytes, len) {
                    return Ok(Some(None));
                }
                let flags = u32::from_be_bytes(*bytes);
                self.flags(flags)?;
                self.state = State::next_option();
                Ok(None)
            }
            State::Option { bytes, len } => {
                if !fill(input, bytes, len) {
                    return Ok(Some(None));
                }
                let bytes = *bytes;
                self.state = header(&bytes)?;
                Ok(None)
            }
            State::Data { option, length } => {
                let (option, length) = (*option, *length);
                let count = (length - self.data.len()).min(input.len());
                self.data.extend_from_slice(input.get(..count).unwrap_or_default());
                *input = input.get(count..).unwrap_or_default();
                if self.data.len() < length {
                    return Ok(Some(None));
                }
                let data = std::mem::take(&mut self.data).freeze();
                self.state = State::next_option();
                parse(option, data).map(|found| Some(Some(found)))
            }
            State::Skip { option, left, .. } => {
                let option = *option;
                let count = (*left).min(input.len());
                *input = input.get(count..).unwrap_or_default();
                *left -= count;
                if *left > 0 {
                    return Ok(Some(None));
                }
                self.state = State::next_option();
                Ok(Some(Some(ClientOption::Refuse { option, reply: reply::ERR_TOO_BIG, text: "too much data" })))
            }
            State::Broken(error) => Err(*error),
        }
    }

    fn flags(&mut self, flags: u32) -> Result<(), NegotiationError> {
        if flags & !u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES) != 0 {
            return Err(NegotiationError::ClientFlags(flags));
        }
        if flags & u32::from(FLAG_FIXED_NEWSTYLE) == 0 {
            return Err(NegotiationError::OldClient);
        }
        self.no_zeroes = flags & u32::from(FLAG_NO_ZEROES) != 0;
        Ok(())
    }
}

/// What follows an option's header.
fn header(bytes: &[u8; OPTION_LEN]) -> Result<State, NegotiationError> {
    if !bytes.starts_with(&IHAVEOPT) {
        return Err(NegotiationError::BadMagic);
    }
    // The header's length is a type, so nothing can be missing.
    let (option, length) = (be_u32(bytes, 8).unwrap_or(0), be_u32(bytes, 12).unwrap_or(0));
    let size = usize::try_from(length).unwrap_or(usize::MAX);
    if size <= MAX_OPTION {
        Ok(State::Data { option, length: size })
    } else if option == option::EXPORT_NAME {
        // Its only possible answer would be an export.
        Err(NegotiationError::BadName)
    } else if size <= MAX_OPTION_SKIP {
        Ok(State::Skip { option, length: size, left: size })
    } else {
        Err(NegotiationError::TooLong { option, length })
    }
}

fn parse(option: u32, data: Bytes) -> Result<ClientOption, NegotiationError> {
    let invalid = |text| ClientOption::Refuse { option, reply: reply::ERR_INVALID, text };
    Ok(match option {
        option::EXPORT_NAME => ClientOption::ExportName(name(&data).ok_or(NegotiationError::BadName)?),
        option::ABORT => ClientOption::Abort,
        option::LIST if data.is_empty() => ClientOption::List,
        option::LIST => invalid("LIST has no data"),
        option::INFO => haggle(data).map_or(invalid("malformed INFO"), ClientOption::Info),
        option::GO => haggle(data).map_or(invalid("malformed GO"), ClientOption::Go),
        _ => ClientOption::Refuse { option, reply: reply::ERR_UNSUP, text: "unknown option" },
    })
}

/// u32 name length | name | u16 count | count × u16 kind of information, and nothing more.
fn haggle(mut data: Bytes) -> Option<Haggle> {
    let length = usize::try_from(be_u32(&data, 0)?).ok()?;
    data.advance(4);
    let name = name(data.get(..length)?)?;
    data.advance(length);
    let count = usize::from(be_u16(&data, 0)?);
    data.advance(2);
    if data.len() != 2 * count {
        return None;
    }
    let asks = |kind: u16| data.chunks_exact(2).any(|pair| pair == kind.to_be_bytes());
    Some(Haggle { name, block_size: asks(info::BLOCK_SIZE), wants_name: asks(info::NAME) })
}

/// A string of the protocol: UTF-8 without NUL, at most [`MAX_STRING`] bytes.
fn name(bytes: &[u8]) -> Option<String> {
    if bytes.len() > MAX_STRING || bytes.contains(&0) {
        return None;
    }
    std::str::from_utf8(bytes).ok().map(str::to_owned)
}
