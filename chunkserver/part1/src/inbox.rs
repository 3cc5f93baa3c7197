//! Bytes from the server: frames are cut, replies handed on, the bytes of reads put where they belong.
//!
//! Many replies arrive in one system call. A small read's bytes are copied once, from the receive buffer; the rest of a
//! large one is received straight into its place.

use std::{os::fd::OwnedFd, time::Instant};

use proto::frame::{Decoder, FrameError, Step};
use rustix::{
    io::Errno,
    net::{RecvFlags, recv},
};

use crate::{
    exchange::{Attachment, Exchange, TooEarly},
    request::ReadBuffer,
};

const BUFFER: usize = 256 << 10;
/// From here on bytes are received into their place.
const DIRECT: usize = 32 << 10;
/// System calls before other work gets its turn.
const CALLS: usize = 16;

/// Why a connection ends.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Broken {
    #[error("closed by the server")]
    Closed,
    #[error("{0}")]
    Socket(#[from] Errno),
    #[error("{0}")]
    Frame(#[from] FrameError),
    #[error("{0}")]
    TooEarly(#[from] TooEarly),
    #[error("a request instead of a reply")]
    Request,
}

enum Pending {
    None,
    Skip(usize),
    Fill { key: usize, buffer: ReadBuffer, filled: usize },
}

/// Where replies go.
pub(crate) trait Replies {
    /// Runs a piece of work on the exchange, which is locked for that long.
    fn with<T>(&self, work: impl FnOnce(&mut Exchange) -> T) -> T;
}

/// The receiving side of a connection.
pub(crate) struct Inbox {
    decoder: Decoder,
    buffer: Box<[u8]>,
    pending: Pending,
}

impl Inbox {
    pub(crate) fn new() -> Self {
        Self { decoder: Decoder::new(), buffer: vec![0; BUFFER].into(), pending: Pending::None }
    }

    /// Another connection begins; gives back a buffer that was being filled, and whose it is.
    pub(crate) fn reset(&mut self) -> Option<(usize, ReadBuffer)> {
        self.decoder = Decoder::new();
        match std::mem::replace(&mut self.pending, Pending::None) {
            Pending::Fill { key, buffer, .. } => Some((key, buffer)),
            _ => None,
        }
    }

    /// Takes what has come.
    pub(crate) fn receive(&mut self, socket: &OwnedFd, replies: &impl Replies) -> Result<(), Broken> {
        for _ in 0..CALLS {
            if let Pending::Fill { buffer, filled, .. } = &mut self.pending
                && buffer.len() - *filled >= DIRECT
            {
                let place = buffer.as_mut_slice().get_mut(*filled..).unwrap_or_default();
                let Some(count) = take(socket, place)? else { return Ok(()) };
                *filled += count;
                self.filled(replies);
                continue;
            }
            let Some(count) = take(socket, &mut self.buffer)? else { return Ok(()) };
            let bytes = std::mem::take(&mut self.buffer);
            let result = self.parse(bytes.get(..count).unwrap_or_default(), replies);
            self.buffer = bytes;
            result?;
            if count < BUFFER && !matches!(self.pending, Pending::Fill { .. }) {
                return Ok(());
            }
        }
        Ok(())
    }

    fn parse(&mut self, mut input: &[u8], replies: &impl Replies) -> Result<(), Broken> {
        while !input.is_empty() {
            match &mut self.pending {
                Pending::None => self.step(&mut input, replies)?,
                Pending::Skip(left) => {
                    let count = (*left).min(input.len());
                    input = input.get(count..).unwrap_or_default();
                    *left -= count;
                    if *left == 0 {
                        self.pending = Pending::None;
                        self.decoder.attachment_done();
                    }
                }
                Pending::Fill { buffer, filled, .. } => {
                    let place = buffer.as_mut_slice().get_mut(*filled..).unwrap_or_default();
                    let count = place.len().min(input.len());
                    if let (Some(place), Some((head, rest))) = (place.get_mut(..count), input.split_at_checked(count)) {
                        place.copy_from_slice(head);
                        input = rest;
                    }
                    *filled += count;
                    self.filled(replies);
                }
            }
        }
        Ok(())
    }

    fn step(&mut self, input: &mut &[u8], replies: &impl Replies) -> Result<(), Broken> {
        match self.decoder.step(input)? {
            Step::NeedMore => Ok(()),
            Step::Http(_) => Err(Broken::Request),
            Step::Reject(reject) => {
                let id = reject.meta.correlation_id;
                Ok(replies.with(|exchange| exchange.on_bad_reply(id, Instant::now()))?)
            }
            Step::Head(head) => {
                if head.meta.request.is_some() {
                    return Err(Broken::Request);
                }
                let (id, code, length) = (head.meta.correlation_id, head.meta.error_code(), head.attachment_len);
                let taken = replies.with(|exchange| exchange.on_reply(id, code, head.body, length, Instant::now()));
                self.pending = match taken? {
                    Attachment::Into(key, buffer) => Pending::Fill { key, buffer, filled: 0 },
                    Attachment::Skip if length > 0 => Pending::Skip(length),
                    Attachment::Skip => Pending::None,
                };
                Ok(())
            }
        }
    }

    /// Completes a read that has all its bytes.
    fn filled(&mut self, replies: &impl Replies) {
        match std::mem::replace(&mut self.pending, Pending::None) {
            Pending::Fill { key, buffer, filled } if filled == buffer.len() => {
                self.decoder.attachment_done();
                replies.with(|exchange| exchange.on_attachment(key, buffer));
            }
            other => self.pending = other,
        }
    }
}

/// Bytes that are there; `None` if none are.
fn take(socket: &OwnedFd, place: &mut [u8]) -> Result<Option<usize>, Broken> {
    match recv(socket, place, RecvFlags::DONTWAIT) {
        Ok((_, 0)) => Err(Broken::Closed),
        Ok((_, count)) => Ok(Some(count)),
        Err(Errno::AGAIN | Errno::INTR) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
