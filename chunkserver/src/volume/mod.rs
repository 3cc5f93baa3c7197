//! Volumes: where they are described ([`catalog`]), where their bytes live ([`map`]) and how one I/O becomes requests
//! to chunks ([`io`]), to whom they go ([`leaders`]) and how those of other servers are asked ([`remote`], `wire`). No
//! socket and no ring here; NBD (and later NEBD) stand on top.

pub mod catalog;
pub mod io;
pub mod leaders;
pub mod map;
pub mod remote;
mod wire;

#[cfg(test)]
pub(crate) mod fake;

use crate::volume::map::Geometry;
use raftlog::CopysetId;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Servers that had a copyset when the volume was described, as [`copyset::PeerId`] packs them. Where to begin: whoever
/// leads says who else is a member by now.
pub type Homes = BTreeMap<CopysetId, Vec<u64>>;

/// A volume as sessions hold it. It never changes: a resize makes a new one, which shares the mark of deletion.
#[derive(Debug)]
pub struct Volume {
    id: u32,
    name: String,
    sn: u64,
    created: u64,
    geometry: Geometry,
    homes: Arc<Homes>,
    deleted: Arc<AtomicBool>,
}

impl Volume {
    /// A volume that is not deleted.
    #[must_use]
    pub fn new(id: u32, name: String, sn: u64, created: u64, geometry: Geometry) -> Self {
        Self { id, name, sn, created, geometry, homes: Arc::default(), deleted: Arc::default() }
    }

    /// The same volume, with where its copysets are. Without it they are taken to be in this process.
    #[must_use]
    pub fn with_homes(self, homes: Homes) -> Self {
        Self { homes: Arc::new(homes), ..self }
    }

    /// The same volume with another mapping (a larger size).
    #[must_use]
    pub(crate) fn with_geometry(&self, geometry: Geometry) -> Self {
        let (homes, deleted) = (Arc::clone(&self.homes), Arc::clone(&self.deleted));
        Self { id: self.id, name: self.name.clone(), sn: self.sn, created: self.created, geometry, homes, deleted }
    }

    /// Number, never reused.
    #[must_use]
    pub const fn id(&self) -> u32 {
        self.id
    }
    /// Name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
    /// Version that writes carry.
    #[must_use]
    pub const fn sn(&self) -> u64 {
        self.sn
    }
    /// Time of creation, seconds since 1970.
    #[must_use]
    pub const fn created(&self) -> u64 {
        self.created
    }
    /// Bytes.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.geometry.size()
    }
    /// Mapping.
    #[must_use]
    pub const fn geometry(&self) -> &Geometry {
        &self.geometry
    }
    /// Servers of a copyset; empty if none are described.
    #[must_use]
    pub fn homes(&self, copyset: CopysetId) -> &[u64] {
        self.homes.get(&copyset).map_or(&[], Vec::as_slice)
    }
    /// Servers of all copysets, some more than once.
    pub fn all_homes(&self) -> impl Iterator<Item = &u64> {
        self.homes.values().flatten()
    }
    /// Whether it was deleted; no new I/O then.
    #[must_use]
    pub fn is_deleted(&self) -> bool {
        self.deleted.load(Ordering::Acquire)
    }
    pub(crate) fn mark_deleted(&self) {
        self.deleted.store(true, Ordering::Release);
    }
}
