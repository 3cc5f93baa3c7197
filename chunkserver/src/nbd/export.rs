//! How a volume looks to an NBD client: name, size, flags; and how errors of volume I/O look.

use crate::shard::request::Outcome;
use crate::volume::Volume;
use crate::volume::catalog::Catalog;
use crate::volume::io::VolumeError;
use proto::nbd::{errno, flag};
use std::sync::Arc;

/// What every export can do. Every reply means committed, so FLUSH and FUA hold across connections.
pub const FLAGS: u16 = flag::HAS_FLAGS
    | flag::SEND_FLUSH
    | flag::SEND_FUA
    | flag::SEND_TRIM
    | flag::SEND_WRITE_ZEROES
    | flag::CAN_MULTI_CONN;

/// The volume exported as `name`. The empty name is the default export: the only volume, if there is just one.
#[must_use]
pub fn find<'a>(catalog: &'a Catalog, name: &str) -> Option<&'a Arc<Volume>> {
    if !name.is_empty() {
        return catalog.get(name);
    }
    let mut all = catalog.volumes();
    all.next().filter(|_| all.len() == 0)
}

/// The error of a reply.
#[must_use]
pub const fn errno_of(error: VolumeError) -> u32 {
    match error {
        VolumeError::Unaligned | VolumeError::Chunk(Outcome::Invalid) => errno::EINVAL,
        VolumeError::NoSpace | VolumeError::BeyondEnd => errno::ENOSPC,
        VolumeError::Stopping | VolumeError::Deleted => errno::ESHUTDOWN,
        VolumeError::Chunk(_) | VolumeError::TimedOut(_) | VolumeError::WrongLength => errno::EIO,
    }
}
