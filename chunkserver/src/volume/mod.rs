//! Volumes: where they are described ([`catalog`]), where their bytes live ([`map`]) and how one I/O becomes requests
//! to chunks ([`io`]). No socket and no ring here; NBD (and later NEBD) stand on top.

pub mod catalog;
pub mod io;
pub mod map;

#[cfg(test)]
pub(crate) mod fake;

use crate::volume::map::Geometry;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A volume as sessions hold it. It never changes: a resize makes a new one, which shares the mark of deletion.
#[derive(Debug)]
pub struct Volume {
    id: u32,
    name: String,
    sn: u64,
    created: u64,
    geometry: Geometry,
    deleted: Arc<AtomicBool>,
}

impl Volume {
    /// A volume that is not deleted.
    #[must_use]
    pub fn new(id: u32, name: String, sn: u64, created: u64, geometry: Geometry) -> Self {
        Self { id, name, sn, created, geometry, deleted: Arc::default() }
    }

    /// The same volume with another mapping (a larger size).
    #[must_use]
    pub(crate) fn with_geometry(&self, geometry: Geometry) -> Self {
        let deleted = Arc::clone(&self.deleted);
        Self { id: self.id, name: self.name.clone(), sn: self.sn, created: self.created, geometry, deleted }
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
    /// Whether it was deleted; no new I/O then.
    #[must_use]
    pub fn is_deleted(&self) -> bool {
        self.deleted.load(Ordering::Acquire)
    }
    pub(crate) fn mark_deleted(&self) {
        self.deleted.store(true, Ordering::Release);
    }
}
