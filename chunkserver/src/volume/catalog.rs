//! The catalog: which volumes exist. Owner of the format of one JSON file.
//!
//! `{"version":1,"crc":"<CRC32C of the compact JSON of body>","body":{"generation","next_id","volumes":[…]}}`
//!
//! Promises: a change is on disk (temp file, fsync, rename, fsync of the folder) before anyone sees it; a file that is
//! not understood in every detail is refused and never overwritten; ids are never reused, so neither are chunk ids; one
//! process at a time writes (flock on `<file>.lock`). Deleting has two steps, so that chunks of a volume whose deletion
//! was interrupted are not forgotten: [`CatalogStore::delete`], remove the chunks, [`CatalogStore::forget`].
//!
//! Runs on the control thread; shards see [`SharedCatalog`] only.

pub use self::store::{CatalogGate, CatalogStore, ChangeError, NewVolume};

mod store;

use crate::volume::Volume;
use crate::volume::map::{BLOCK_BYTES, Geometry, Shape};
use raftlog::CopysetId;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// Version of the file this code writes, and the only one it reads.
pub const CATALOG_VERSION: u32 = 1;
/// Most volumes.
pub const VOLUMES_MAX: usize = 4096;
/// Longest name, bytes.
pub const NAME_BYTES_MAX: usize = 255;
const FILE_BYTES_MAX: u64 = 256 << 20;

/// Why the catalog cannot be used. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has it.
    #[error("catalog {0} is in use by another process")]
    Locked(PathBuf),
    /// The file system's error.
    #[error("catalog {path}: cannot {what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Absurdly large.
    #[error("catalog {0} is larger than {FILE_BYTES_MAX} bytes")]
    TooBig(PathBuf),
    /// Damaged or foreign.
    #[error("catalog {path} is damaged or no catalog: {why}")]
    Damaged {
        /// File.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// Of another version.
    #[error("catalog {path} has format version {found}, this program knows {CATALOG_VERSION}")]
    Version {
        /// File.
        path: PathBuf,
        /// Its version.
        found: u64,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileForm {
    version: u32,
    crc: String,
    body: Body,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Body {
    generation: u64,
    next_id: u32,
    volumes: Vec<Record>,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CopysetRecord {
    pool: u32,
    copyset: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    id: u32,
    name: String,
    size: u64,
    chunk_size: u32,
    stripe_unit: u32,
    stripe_count: u32,
    block_size: u32,
    sn: u64,
    copysets: Vec<CopysetRecord>,
    created: u64,
    deleting: bool,
}

/// Only the version, of a file of any version.
#[derive(Deserialize)]
struct AnyVersion {
    version: u64,
}

/// All volumes at one moment.
#[derive(Clone, Debug, Default)]
pub struct Catalog {
    generation: u64,
    next_id: u32,
    volumes: BTreeMap<String, Arc<Volume>>,
    deleting: BTreeMap<u32, Arc<Volume>>,
}

impl Catalog {
    fn empty() -> Self {
        Self { next_id: 1, ..Self::default() }
    }

    /// A catalog of these volumes that is on no disk (for a simulator).
    #[must_use]
    pub fn of(volumes: impl IntoIterator<Item = Arc<Volume>>) -> Self {
        let by_name = |volume: Arc<Volume>| (volume.name().to_owned(), volume);
        let volumes: BTreeMap<_, _> = volumes.into_iter().map(by_name).collect();
        let next_id = volumes.values().map(|v| v.id().saturating_add(1)).max().unwrap_or(1);
        Self { next_id, volumes, ..Self::default() }
    }

    /// Counts changes.
    #[must_use]
    pub const fn generation(&self) -> u64 {
        self.generation
    }
    /// By name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Arc<Volume>> {
        self.volumes.get(name)
    }
    /// All, by name.
    pub fn volumes(&self) -> impl ExactSizeIterator<Item = &Arc<Volume>> {
        self.volumes.values()
    }
    /// Deleted volumes whose chunks may still exist.
    pub fn deleting(&self) -> impl ExactSizeIterator<Item = &Arc<Volume>> {
        self.deleting.values()
    }

    /// Read a catalog without the right to change it. A missing file is an empty catalog.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn read(path: &Path) -> Result<Self, OpenError> {
        let failed = |what| move |source| OpenError::Io { what, path: path.to_owned(), source };
        let file = match File::open(path) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Self::empty()),
            other => other.map_err(failed("open it"))?,
        };
        if !file.metadata().map_err(failed("look at it"))?.is_file() {
            return Err(OpenError::Damaged { path: path.to_owned(), why: "not a regular file".to_owned() });
        }
        let mut bytes = Vec::new();
        file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed("read it"))?;
        if bytes.len() as u64 > FILE_BYTES_MAX {
            return Err(OpenError::TooBig(path.to_owned()));
        }
        Self::decode(path, &bytes)
    }

    fn decode(path: &Path, bytes: &[u8]) -> Result<Self, OpenError> {
        let damaged = |why: String| OpenError::Damaged { path: path.to_owned(), why };
        let AnyVersion { version: found } = serde_json::from_slice(bytes).map_err(|e| damaged(e.to_string()))?;
        if found != u64::from(CATALOG_VERSION) {
            return Err(OpenError::Version { path: path.to_owned(), found });
        }
        let form: FileForm = serde_json::from_slice(bytes).map_err(|e| damaged(e.to_string()))?;
        let crc = body_crc(&form.body).map_err(|e| damaged(e.to_string()))?;
        if form.crc != crc {
            return Err(damaged(format!("checksum is {}, its contents have {crc}", form.crc)));
        }
        Self::from_body(form.body).map_err(damaged)
    }

    /// Everything a later look-up relies on is checked here, once.
    fn from_body(body: Body) -> Result<Self, String> {
        if body.volumes.len() > VOLUMES_MAX {
            return Err(format!("{} volumes are more than {VOLUMES_MAX}", body.volumes.len()));
        }
        let mut catalog = Self { generation: body.generation, next_id: body.next_id, ..Self::default() };
        let mut ids = BTreeSet::new();
        for record in body.volumes {
            let (id, name, deleting) = (record.id, record.name.clone(), record.deleting);
            if id == 0 || id >= body.next_id || !ids.insert(id) {
                return Err(format!("volume {name:?} has an impossible id {id}"));
            }
            let volume = Arc::new(record.into_volume()?);
            if deleting {
                volume.mark_deleted();
                catalog.deleting.insert(id, volume);
            } else if catalog.volumes.insert(name.clone(), volume).is_some() {
                return Err(format!("volume {name:?} is listed twice"));
            }
        }
        Ok(catalog)
    }

    fn encode(&self) -> Result<Vec<u8>, serde_json::Error> {
        let live = self.volumes.values().map(|v| Record::of(v, false));
        let gone = self.deleting.values().map(|v| Record::of(v, true));
        let body = Body { generation: self.generation, next_id: self.next_id, volumes: live.chain(gone).collect() };
        let crc = body_crc(&body)?;
        let mut bytes = serde_json::to_vec_pretty(&FileForm { version: CATALOG_VERSION, crc, body })?;
        bytes.push(b'\n');
        Ok(bytes)
    }
}

fn body_crc(body: &Body) -> Result<String, serde_json::Error> {
    Ok(format!("{:08x}", raftlog::crc32c(&serde_json::to_vec(body)?)))
}

impl Record {
    fn of(volume: &Volume, deleting: bool) -> Self {
        let Shape { size, chunk_size, stripe_unit, stripe_count } = *volume.geometry().shape();
        let copyset = |id: &CopysetId| CopysetRecord { pool: id.pool(), copyset: id.copyset() };
        Self {
            id: volume.id(),
            name: volume.name().to_owned(),
            size,
            chunk_size,
            stripe_unit,
            stripe_count,
            block_size: BLOCK_BYTES,
            sn: volume.sn(),
            copysets: volume.geometry().copysets().iter().map(copyset).collect(),
            created: volume.created(),
            deleting,
        }
    }

    fn into_volume(self) -> Result<Volume, String> {
        let name = self.name;
        if !is_name(&name) {
            return Err(format!("{name:?} is no name for a volume"));
        }
        if self.block_size != BLOCK_BYTES || self.sn == 0 {
            return Err(format!("volume {name:?} has block size {} and version {}", self.block_size, self.sn));
        }
        let Self { size, chunk_size, stripe_unit, stripe_count, .. } = self;
        let copysets = self.copysets.iter().map(|c| CopysetId::new(c.pool, c.copyset)).collect();
        let geometry = Geometry::new(self.id, Shape { size, chunk_size, stripe_unit, stripe_count }, copysets)
            .map_err(|e| format!("volume {name:?}: {e}"))?;
        Ok(Volume::new(self.id, name, self.sn, self.created, geometry))
    }
}

/// Whether a volume may be called so: 1 to 255 bytes, printable, no '/'.
#[must_use]
pub fn is_name(name: &str) -> bool {
    let printable = |c: char| !c.is_control() && (c == ' ' || !c.is_whitespace());
    (1..=NAME_BYTES_MAX).contains(&name.len()) && name.chars().all(|c| c != '/' && printable(c))
}

/// The newest catalog, for other threads. The lock is held for the copy of one `Arc`; asked when a client negotiates.
#[derive(Clone, Debug)]
pub struct SharedCatalog(Arc<Mutex<Arc<Catalog>>>);

impl SharedCatalog {
    /// Share this one.
    #[must_use]
    pub fn new(catalog: Catalog) -> Self {
        Self(Arc::new(Mutex::new(Arc::new(catalog))))
    }
    /// The newest.
    #[must_use]
    pub fn snapshot(&self) -> Arc<Catalog> {
        Arc::clone(&self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
    fn publish(&self, catalog: Catalog) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(catalog);
    }
}
