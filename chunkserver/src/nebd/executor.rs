//! What stands behind the files: the seam between part2 and volumes, wherever they are described.
//!
//! Slow work (opening, closing, growing; another executor asks an MDS for it) is an [`Executor`]'s and runs beside the
//! shards. What is left is quick and any shard's: a [`Handle`] turns a request into a [`VolumeIo`] or an answer.

use super::metafile::Attributes;
use crate::io::Instant;
use crate::volume::io::{IoKind, VolumeError, VolumeIo};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

/// `ProtoOpenFlags.exclusive`, if the client sent flags at all. Absent and `Some(true)` open alike, but are not equal.
pub type OpenFlags = Option<bool>;

/// Slow work of an [`Executor`], done on its thread.
pub type Pending<'a, T> = Pin<Box<dyn Future<Output = Result<T, ExecutorError>> + 'a>>;

/// Why an executor refused or failed. The client sees kNoOK; the text is for the log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ExecutorError(pub String);

/// What a file says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileInfo {
    /// Bytes.
    pub size: u64,
    /// Bytes of a chunk.
    pub chunk_size: u64,
    /// Unit of offsets and lengths, bytes.
    pub block_size: u32,
}

/// An open file. Refusals are answered at once, whatever `return_io_errors` says.
pub trait Handle: Send + Sync + std::fmt::Debug {
    /// Size and the like, as they are now.
    ///
    /// # Errors
    /// The volume is gone.
    fn info(&self) -> Result<FileInfo, VolumeError>;

    /// A read or a write. After `deadline` it is not asked again.
    ///
    /// # Errors
    /// Misaligned, empty, beyond the end, gone.
    fn start(&self, kind: IoKind, offset: u64, len: u64, deadline: Instant) -> Result<VolumeIo, VolumeError>;

    /// Make a range read as zeros; `None` when there is nothing to do.
    ///
    /// # Errors
    /// As [`Self::start`].
    fn discard(&self, offset: u64, len: u64, deadline: Instant) -> Result<Option<VolumeIo>, VolumeError>;

    /// Every write answered before is durable when this has returned.
    ///
    /// # Errors
    /// The volume is gone.
    fn flush(&self) -> Result<(), VolumeError>;

    /// Forget what was cached of the volume.
    ///
    /// # Errors
    /// The volume is gone.
    fn invalidate_cache(&self) -> Result<(), VolumeError>;
}

/// A file that was opened.
#[derive(Debug)]
pub struct Opened {
    /// For requests.
    pub handle: Arc<dyn Handle>,
    /// To be recorded, and given to [`Executor::reopen`] after a restart.
    pub attributes: Attributes,
}

/// Opens and closes files by their complete names; one handle per name at a time.
pub trait Executor {
    /// Open.
    fn open<'a>(&'a self, name: &'a str, flags: OpenFlags) -> Pending<'a, Opened>;
    /// Open again what was open before a restart.
    fn reopen<'a>(&'a self, name: &'a str, attributes: &'a Attributes) -> Pending<'a, Opened>;
    /// Close. No I/O of its handle is running.
    fn close<'a>(&'a self, name: &'a str) -> Pending<'a, ()>;
    /// Make it larger; the same size is fine. Its handle knows the new size when this is done.
    fn extend<'a>(&'a self, name: &'a str, size: u64) -> Pending<'a, ()>;
}

/// Attribute with the flags a file was opened with: a serialized `ProtoOpenFlags`, absent without flags.
pub const OPENFLAGS: &str = "openflags";
/// Attribute the originals crash without. Always empty.
pub const SESSION: &str = "session";

/// What is recorded of a file opened with these flags.
#[must_use]
pub fn attributes_of(flags: OpenFlags) -> Attributes {
    let mut all = Attributes::from([(SESSION.to_owned(), String::new())]);
    if let Some(exclusive) = flags {
        all.insert(OPENFLAGS.to_owned(), if exclusive { "\u{8}\u{1}" } else { "\u{8}\0" }.to_owned());
    }
    all
}

/// The flags in a record.
///
/// # Errors
/// They cannot be read.
pub fn flags_of(attributes: &Attributes) -> Result<OpenFlags, ExecutorError> {
    let Some(text) = attributes.get(OPENFLAGS) else { return Ok(None) };
    let bytes = bytes::Bytes::copy_from_slice(text.as_bytes());
    match proto::decode::<proto::nebd::ProtoOpenFlags>(bytes) {
        Ok(flags) => Ok(Some(flags.exclusive)),
        Err(why) => Err(ExecutorError(format!("recorded flags {text:?}: {why}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_survive_the_record() {
        for flags in [None, Some(true), Some(false)] {
            assert_eq!(flags_of(&attributes_of(flags)), Ok(flags));
        }
        for bad in ["", "\u{8}", "x"] {
            assert!(flags_of(&Attributes::from([(OPENFLAGS.into(), bad.into())])).is_err(), "{bad:?}");
        }
    }
}
