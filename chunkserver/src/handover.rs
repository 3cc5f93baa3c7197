//! What the old and the new process of a hand-over say to each other: messages with descriptors over a socket pair.
//!
//! ```text
//! frame    "CHO1" | u32 LE json size | u64 LE data size | json | data        descriptors ride on the first byte
//! old: Offer+listeners   Connection+socket …   Fences  End             Commit             (exits)
//! new:                 Prepared                             Ready               Serving
//! ```
//!
//! Owns the format of these messages (docs/wire.md). Promises: every size is bounded before anything is read; bytes that
//! are no message, and messages that nobody waits for, are errors; descriptors that come along are closed on exec and,
//! if nobody takes them, closed.

use crate::reactor::handover::SavedSession;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Version of the messages and of what they mean. A process of another one is refused before anything is touched.
pub const PROTOCOL: u32 = 1;
/// Descriptors of one message.
pub const DESCRIPTORS_MAX: usize = 32;
/// Longest message without its data, bytes: all fences, or a connection with a message that is passed over.
const JSON_BYTES_MAX: u64 = 8 << 20;
/// Longest data, bytes: a frame half received, and the answers a connection may have unsent.
const DATA_BYTES_MAX: u64 = 256 << 20;
const MAGIC: &[u8; 4] = b"CHO1";
const HEADER: usize = 16;

/// A message.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "kebab-case")]
pub enum Message {
    /// Old: who it is. Descriptors: its listening sockets.
    Offer(Offer),
    /// New: all that needs no disk is done.
    Prepared {
        /// See [`PROTOCOL`].
        protocol: u32,
        /// Process id.
        pid: u32,
        /// Of the program.
        version: String,
    },
    /// New: it cannot, and ends.
    Refused {
        /// One line.
        why: String,
    },
    /// Old: a client's connection. Descriptor: its socket; data: input and unsent bytes.
    Connection {
        /// Where it stands.
        session: SavedSession,
        /// Bytes of the data that are input; the rest is unsent.
        input: usize,
    },
    /// Old: the volumes' fences.
    Fences {
        /// File id and epoch.
        epochs: Vec<(u64, u64)>,
    },
    /// Old: that was all; nothing of it uses the disk any more.
    End {
        /// How many were sent.
        connections: usize,
        /// When the old one stopped to listen: CLOCK_BOOTTIME, nanoseconds.
        since_ns: u64,
    },
    /// New: recovered; could serve.
    Ready,
    /// Old: it will never serve again.
    Commit,
    /// New: it serves.
    Serving {
        /// From the last byte received by the old one to the first the new one would receive, microseconds.
        pause_us: u64,
    },
}

/// Who the old process is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// See [`PROTOCOL`].
    pub protocol: u32,
    /// Of the program.
    pub version: String,
    /// Its peer id.
    pub peer: u64,
    /// Device and inode of the disk's file, if there is one.
    pub disk: Option<(u64, u64)>,
    /// The disk's uuid, or the number of the process without one.
    pub uuid: [u8; 16],
}

/// Why a conversation ends.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The socket.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// The other one is gone.
    #[error("the other process ended the conversation")]
    Closed,
    /// Nothing came in time.
    #[error("the other process does not answer")]
    TimedOut,
    /// Not the protocol.
    #[error("the other process says what is not understood: {0}")]
    Garbage(String),
    /// It says no.
    #[error("{0}")]
    Refused(String),
}

/// A message with what came along.
#[derive(Debug)]
pub struct Received {
    /// What it says.
    pub message: Message,
    /// Its data.
    pub data: Vec<u8>,
    /// Its descriptors.
    pub descriptors: Vec<OwnedFd>,
}

/// One end of the conversation.
#[derive(Debug)]
pub struct Channel(UnixStream);

impl Channel {
    /// Over this socket.
    #[must_use]
    pub fn new(socket: UnixStream) -> Self {
        Self(socket)
    }

    /// Over this socket, to a process that must not keep us waiting longer than this with what it does not take.
    ///
    /// # Errors
    /// The system's.
    pub fn with_send_wait(socket: UnixStream, wait: Duration) -> std::io::Result<Self> {
        socket.set_write_timeout(Some(wait))?;
        Ok(Self(socket))
    }

    /// Say something. `data` in two parts, so that they need not be joined.
    ///
    /// # Errors
    /// [`ChannelError`].
    pub fn send(
        &mut self,
        message: &Message,
        data: [&[u8]; 2],
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        let json = serde_json::to_vec(message).map_err(|error| ChannelError::Garbage(error.to_string()))?;
        let data_len: usize = data.iter().map(|part| part.len()).sum();
        if json.len() as u64 > JSON_BYTES_MAX || data_len as u64 > DATA_BYTES_MAX || descriptors.len() > DESCRIPTORS_MAX
        {
            return Err(ChannelError::Garbage("a message that is too large to be sent".into()));
        }
        let mut header = MAGIC.to_vec();
        header.extend((json.len() as u32).to_le_bytes());
        header.extend((data_len as u64).to_le_bytes());
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(ChannelError::Garbage("too many descriptors".into()));
        }
        let sent = loop {
            match sendmsg(&self.0, &[IoSlice::new(&header)], &mut control, SendFlags::NOSIGNAL) {
                Err(rustix::io::Errno::INTR) => {}
                other => break other.map_err(|error| classify(error.into()))?,
            }
        };
        for part in [header.get(sent..).unwrap_or_default(), &json, data[0], data[1]] {
            self.0.write_all(part).map_err(classify)?;
        }
        Ok(())
    }

    /// Say something without data.
    ///
    /// # Errors
    /// [`ChannelError`].
    pub fn say(&mut self, message: &Message) -> Result<(), ChannelError> {
        self.send(message, [&[], &[]], &[])
    }

    /// The next message; `patience`: how long each part of it may take, for ever without.
    ///
    /// # Errors
    /// [`ChannelError`]; [`Message::Refused`] is one of them.
    pub fn receive(&mut self, patience: Option<Duration>) -> Result<Received, ChannelError> {
        self.0.set_read_timeout(patience)?;
        let (header, descriptors) = self.header()?;
        let number = |from: usize, len: usize| {
            header.iter().skip(from).take(len).rev().fold(0u64, |sum, &byte| sum << 8 | u64::from(byte))
        };
        let (json_len, data_len) = (number(4, 4), number(8, 8));
        if !header.starts_with(MAGIC) || json_len > JSON_BYTES_MAX || data_len > DATA_BYTES_MAX {
            return Err(ChannelError::Garbage("no header of a message".into()));
        }
        let json = self.bytes(json_len)?;
        let data = self.bytes(data_len)?;
        match serde_json::from_slice(&json).map_err(|error| ChannelError::Garbage(error.to_string()))? {
            Message::Refused { why } => Err(ChannelError::Refused(why)),
            message => Ok(Received { message, data, descriptors }),
        }
    }

    /// The fixed part, read alone so that the next message's descriptors are never met.
    fn header(&mut self) -> Result<([u8; HEADER], Vec<OwnedFd>), ChannelError> {
        let (mut header, mut at, mut descriptors) = ([0; HEADER], 0, Vec::new());
        while at < HEADER {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let rest = header.get_mut(at..).unwrap_or_default();
            let received = match recvmsg(&self.0, &mut [IoSliceMut::new(rest)], &mut control, RecvFlags::CMSG_CLOEXEC) {
                Err(rustix::io::Errno::INTR) => continue,
                other => other.map_err(|error| classify(error.into()))?,
            };
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(some) = message {
                    descriptors.extend(some);
                }
            }
            if received.bytes == 0 {
                return Err(ChannelError::Closed);
            }
            if received.flags.contains(ReturnFlags::CTRUNC) {
                return Err(ChannelError::Garbage("descriptors were lost (the limit of open files?)".into()));
            }
            at += received.bytes;
        }
        Ok((header, descriptors))
    }

    /// Memory grows with what arrives, not with what was announced.
    fn bytes(&mut self, len: u64) -> Result<Vec<u8>, ChannelError> {
        let mut bytes = Vec::new();
        (&mut self.0).take(len).read_to_end(&mut bytes).map_err(classify)?;
        if (bytes.len() as u64) < len { Err(ChannelError::Closed) } else { Ok(bytes) }
    }

    /// Wait until the other process is gone.
    pub fn wait_closed(&mut self) {
        let _ = self.0.set_read_timeout(None);
        let mut byte = [0];
        while matches!(self.0.read(&mut byte), Ok(count) if count > 0) {}
    }
}

fn classify(error: std::io::Error) -> ChannelError {
    match error.kind() {
        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => ChannelError::TimedOut,
        std::io::ErrorKind::BrokenPipe | std::io::ErrorKind::ConnectionReset => ChannelError::Closed,
        _ => ChannelError::Io(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn pair() -> (Channel, Channel) {
        let (a, b) = UnixStream::pair().unwrap();
        (Channel::new(a), Channel::new(b))
    }

    #[test]
    fn messages_keep_their_data_and_their_descriptors() {
        let (mut old, mut new) = pair();
        let (mut kept, given) = UnixStream::pair().unwrap();
        let session = SavedSession::Rpc(crate::rpc::Saved::default());
        let first = Message::Connection { session, input: 3 };
        let big = vec![7; 1 << 20];
        let sent = first.clone();
        let sender = std::thread::spawn(move || {
            old.send(&sent, [b"abc", &big], &[given.as_fd()]).unwrap();
            old.send(&sent, [b"", b""], &[given.as_fd(), given.as_fd()]).unwrap();
            old.say(&Message::Commit).unwrap();
            old
        });
        let received = new.receive(None).unwrap();
        assert_eq!((&received.message, received.data.len(), received.descriptors.len()), (&first, 3 + (1 << 20), 1));
        let mut socket = UnixStream::from(received.descriptors.into_iter().next().unwrap());
        socket.write_all(b"hello").unwrap();
        let mut hello = [0; 5];
        kept.read_exact(&mut hello).unwrap();
        assert_eq!(&hello, b"hello");
        assert_eq!(new.receive(None).unwrap().descriptors.len(), 2);
        assert_eq!(new.receive(None).unwrap().message, Message::Commit);
        drop(sender.join().unwrap());
        assert!(matches!(new.receive(None), Err(ChannelError::Closed)));
    }

    #[test]
    fn who_does_not_listen_is_not_waited_for_long() {
        let (a, _deaf) = UnixStream::pair().unwrap();
        let mut old = Channel::with_send_wait(a, Duration::from_millis(5)).unwrap();
        let fences = Message::Fences { epochs: Vec::new() };
        assert!(matches!(old.send(&fences, [&[0; 4 << 20], b""], &[]), Err(ChannelError::TimedOut)));
        let full = (0..1000).find_map(|_| old.say(&fences).err());
        assert!(matches!(full, Some(ChannelError::TimedOut)));
    }

    #[test]
    fn what_is_no_message_is_an_error_and_costs_nothing() {
        for bytes in [
            b"HTTP/1.1 200 OK\r\n\r\n".to_vec(),
            [b"CHO1".as_slice(), &u32::MAX.to_le_bytes(), &0u64.to_le_bytes()].concat(),
            [b"CHO1".as_slice(), &2u32.to_le_bytes(), &u64::MAX.to_le_bytes(), b"{}"].concat(),
            [b"CHO1".as_slice(), &2u32.to_le_bytes(), &0u64.to_le_bytes(), b"{}"].concat(),
            [b"CHO1".as_slice(), &4u32.to_le_bytes(), &0u64.to_le_bytes(), b"null"].concat(),
        ] {
            let (mut socket, b) = UnixStream::pair().unwrap();
            socket.write_all(&bytes).unwrap();
            assert!(matches!(Channel::new(b).receive(None), Err(ChannelError::Garbage(_))), "{bytes:?}");
        }
        // Announced, never sent.
        let (mut socket, b) = UnixStream::pair().unwrap();
        socket.write_all(&[b"CHO1".as_slice(), &8u32.to_le_bytes(), &(200u64 << 20).to_le_bytes()].concat()).unwrap();
        drop(socket);
        assert!(matches!(Channel::new(b).receive(None), Err(ChannelError::Closed)));
        let (mut old, mut new) = pair();
        assert!(matches!(new.receive(Some(Duration::from_millis(5))), Err(ChannelError::TimedOut)));
        old.say(&Message::Refused { why: "no".into() }).unwrap();
        assert!(matches!(new.receive(None), Err(ChannelError::Refused(why)) if why == "no"));
    }
}
