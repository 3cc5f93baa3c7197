//! The one writer of the catalog: lock, check, write a new file, make it durable, then show it.

use super::{Catalog, NAME_BYTES_MAX, OpenError, PEERS_MAX, SHARED_IDS, SharedCatalog, VOLUMES_MAX, is_name};
use crate::replace::{ReplaceError, beside, replace};
use crate::volume::map::{Geometry, GeometryError, Shape};
use crate::volume::{Homes, Volume};
use raftlog::CopysetId;
use rustix::fs::{FlockOperation, flock};
use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Version of a volume that never had a chunk snapshot (0 is refused by chunks, datastore.md §7).
const FIRST_SN: u64 = 1;

/// Why a change was not made.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// Bad name.
    #[error("a name is 1 to {NAME_BYTES_MAX} bytes of printable characters without '/', not {0:?}")]
    Name(String),
    /// Name in use.
    #[error("volume {0:?} exists")]
    Exists(String),
    /// No such volume.
    #[error("there is no volume {0:?}")]
    NotFound(String),
    /// No such volume being deleted.
    #[error("no volume {0} is being deleted")]
    NotDeleting(u32),
    /// Smaller.
    #[error("a volume only grows: {to} is smaller than {from}")]
    Shrink {
        /// Present size.
        from: u64,
        /// Size asked.
        to: u64,
    },
    /// Bad size, chunk size, striping or copysets.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// An id that cannot be given.
    #[error("volume id {0} is in use, or below {SHARED_IDS}")]
    Id(u32),
    /// Too many servers.
    #[error("{0} servers of one copyset are more than {PEERS_MAX}")]
    Servers(usize),
    /// Too many.
    #[error("{VOLUMES_MAX} volumes exist, no more are possible")]
    TooMany,
    /// All ids used.
    #[error("all volume ids are used up")]
    IdsUsedUp,
    /// The file system's error. If it came late, memory and file may differ: no more changes until a restart.
    #[error("catalog {path}: cannot {what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// After a failed sync of the folder.
    #[error("an earlier change may or may not be on disk: restart before changing more")]
    Unsure,
    /// Another process is taking over.
    #[error("the server is being replaced; try again in a moment")]
    HandedOver,
}

/// What [`CatalogStore::create`] needs.
#[derive(Clone, Debug)]
pub struct NewVolume {
    /// Name.
    pub name: String,
    /// Id, [`SHARED_IDS`] or more; `None`: the next one counted.
    pub id: Option<u32>,
    /// Size, chunk size, striping.
    pub shape: Shape,
    /// Copysets, in mapping order.
    pub copysets: Vec<CopysetId>,
    /// Servers of these copysets, for those that are not in this process alone.
    pub homes: Homes,
    /// Now, seconds since 1970.
    pub created: u64,
}

/// The one writer of the catalog.
#[derive(Debug)]
pub struct CatalogStore {
    path: PathBuf,
    gate: CatalogGate,
    shared: SharedCatalog,
    unsure: bool,
}

/// Lets another process have the catalog, and takes it back.
#[derive(Clone, Debug)]
pub struct CatalogGate {
    path: PathBuf,
    shared: SharedCatalog,
    /// The file with the flock; whether it is ours.
    lock: Arc<Mutex<(File, bool)>>,
}

impl CatalogGate {
    fn lock(&self) -> MutexGuard<'_, (File, bool)> {
        self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on every change is refused, and the lock is free. Waits for a change that is under way.
    pub fn close(&self) {
        let mut lock = self.lock();
        lock.1 = false;
        let _ = flock(&lock.0, FlockOperation::Unlock);
    }

    /// Lock it again, and read what the other process made of it.
    ///
    /// # Errors
    /// [`OpenError`]; it stays closed.
    pub fn open(&self) -> Result<(), OpenError> {
        let mut lock = self.lock();
        match flock(&lock.0, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(OpenError::Locked(self.path.clone())),
            Err(e) => {
                return Err(OpenError::Io { what: "lock", path: self.path.clone(), source: e.into() });
            }
        }
        self.shared.publish(Catalog::read(&self.path)?);
        lock.1 = true;
        Ok(())
    }
}

impl CatalogStore {
    /// Lock and read. A missing file is an empty catalog, written at the first change.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        Self::open_within(path, Duration::ZERO)
    }

    /// The same, waiting at most `wait` for the lock of a server that is ending.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open_within(path: &Path, wait: Duration) -> Result<Self, OpenError> {
        let lock_path = beside(path, ".lock");
        let failed = |source| OpenError::Io { what: "open the lock", path: lock_path.clone(), source };
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(&lock_path).map_err(failed)?;
        let until = Instant::now() + wait;
        loop {
            match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(rustix::io::Errno::WOULDBLOCK) => return Err(OpenError::Locked(path.to_owned())),
                Err(e) => return Err(failed(e.into())),
            }
        }
        let shared = SharedCatalog::new(Catalog::read(path)?);
        let lock = Arc::new(Mutex::new((lock, true)));
        let gate = CatalogGate { path: path.to_owned(), shared: shared.clone(), lock };
        Ok(Self { path: path.to_owned(), gate, shared, unsure: false })
    }

    /// For a hand-over to another process.
    #[must_use]
    pub fn gate(&self) -> CatalogGate {
        self.gate.clone()
    }

    /// For the shards.
    #[must_use]
    pub fn shared(&self) -> SharedCatalog {
        self.shared.clone()
    }
    /// The present state.
    #[must_use]
    pub fn catalog(&self) -> Arc<Catalog> {
        self.shared.snapshot()
    }

    /// Create a volume.
    ///
    /// # Errors
    /// [`ChangeError`]; nothing was created.
    pub fn create(&mut self, new: NewVolume) -> Result<Arc<Volume>, ChangeError> {
        let gate = self.gate.clone();
        let ours = gate.lock();
        let mut next = (*self.catalog()).clone();
        if !is_name(&new.name) {
            return Err(ChangeError::Name(new.name));
        }
        if next.volumes.contains_key(&new.name) {
            return Err(ChangeError::Exists(new.name));
        }
        if next.volumes.len() + next.deleting.len() >= VOLUMES_MAX {
            return Err(ChangeError::TooMany);
        }
        let id = new.id.unwrap_or(next.next_id);
        let used = next.volumes.values().any(|v| v.id() == id) || next.deleting.contains_key(&id);
        match new.id {
            Some(id) if id < SHARED_IDS || used => return Err(ChangeError::Id(id)),
            Some(_) => {}
            None if id >= SHARED_IDS => return Err(ChangeError::IdsUsedUp),
            None => next.next_id = id + 1,
        }
        let geometry = Geometry::new(id, new.shape, new.copysets)?;
        if let Some(count) = new.homes.values().map(Vec::len).find(|&count| count > PEERS_MAX) {
            return Err(ChangeError::Servers(count));
        }
        let volume = Volume::new(id, new.name.clone(), FIRST_SN, new.created, geometry).with_homes(new.homes);
        let volume = Arc::new(volume);
        next.volumes.insert(new.name, Arc::clone(&volume));
        self.save(&ours, next)?;
        Ok(volume)
    }

    /// Make a volume larger. Sessions that are open keep the old size. The same size changes nothing.
    ///
    /// # Errors
    /// [`ChangeError`]; nothing was changed.
    pub fn resize(&mut self, name: &str, size: u64) -> Result<Arc<Volume>, ChangeError> {
        let gate = self.gate.clone();
        let ours = gate.lock();
        let mut next = (*self.catalog()).clone();
        let slot = next.volumes.get_mut(name).ok_or_else(|| ChangeError::NotFound(name.to_owned()))?;
        if size < slot.size() {
            return Err(ChangeError::Shrink { from: slot.size(), to: size });
        }
        if size == slot.size() {
            return Ok(Arc::clone(slot));
        }
        let volume = Arc::new(slot.with_geometry(slot.geometry().resized(size)?));
        *slot = Arc::clone(&volume);
        self.save(&ours, next)?;
        Ok(volume)
    }

    /// Delete a volume: its name is free, new I/O fails. Its chunks (`geometry().chunks()`) are the caller's to remove;
    /// then [`Self::forget`] it.
    ///
    /// # Errors
    /// [`ChangeError`]; nothing was deleted.
    pub fn delete(&mut self, name: &str) -> Result<Arc<Volume>, ChangeError> {
        let gate = self.gate.clone();
        let ours = gate.lock();
        let mut next = (*self.catalog()).clone();
        let volume = next.volumes.remove(name).ok_or_else(|| ChangeError::NotFound(name.to_owned()))?;
        next.deleting.insert(volume.id(), Arc::clone(&volume));
        self.save(&ours, next)?;
        volume.mark_deleted();
        Ok(volume)
    }

    /// The chunks of a deleted volume are gone: drop its record.
    ///
    /// # Errors
    /// [`ChangeError`].
    pub fn forget(&mut self, id: u32) -> Result<(), ChangeError> {
        let gate = self.gate.clone();
        let ours = gate.lock();
        let mut next = (*self.catalog()).clone();
        next.deleting.remove(&id).ok_or(ChangeError::NotDeleting(id))?;
        self.save(&ours, next)
    }

    /// `next` was made under the lock of the gate: no other process has changed anything meanwhile.
    fn save(&mut self, ours: &(File, bool), mut next: Catalog) -> Result<(), ChangeError> {
        if self.unsure {
            return Err(ChangeError::Unsure);
        }
        if !ours.1 {
            return Err(ChangeError::HandedOver);
        }
        next.generation += 1;
        let failed = |what, path, source| ChangeError::Io { what, path, source };
        let bytes = next.encode().map_err(|e| failed("encode it", self.path.clone(), e.into()))?;
        replace(&self.path, &bytes).map_err(|ReplaceError { what, path, source, unsure }| {
            self.unsure = unsure;
            failed(what, path, source)
        })?;
        self.shared.publish(next);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use copyset::PeerId;
    use proptest::prelude::*;

    fn new(name: &str, size: u64) -> NewVolume {
        let shape = Shape { size, chunk_size: 16 << 20, stripe_unit: 65536, stripe_count: 4 };
        let copysets = (0..8).map(|i| CopysetId::new(1, 100 + i)).collect();
        NewVolume { name: name.to_owned(), id: None, shape, copysets, homes: Homes::new(), created: 1_700_000_000 }
    }
    fn names(catalog: &Catalog) -> Vec<(u32, String, u64)> {
        catalog.volumes().map(|v| (v.id(), v.name().to_owned(), v.size())).collect()
    }

    #[test]
    fn a_change_that_waits_for_the_gate_is_made_to_what_is_there_then() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("volumes.json");
        let mut store = CatalogStore::open(&path).unwrap();
        store.create(new("a", 1 << 30)).unwrap();
        let gate = store.gate();
        let lock = gate.lock();
        std::thread::scope(|scope| {
            let changing = scope.spawn(|| store.create(new("b", 1 << 30)).map(|volume| volume.id()));
            std::thread::sleep(Duration::from_millis(50));
            // As another process would have, in the meantime.
            let mut next = (*gate.shared.snapshot()).clone();
            next.volumes.clear();
            next.next_id += 7;
            let id = next.next_id;
            gate.shared.publish(next);
            drop(lock);
            assert_eq!(changing.join().unwrap().unwrap(), id);
        });
        assert_eq!(store.catalog().volumes().count(), 1);
    }

    #[test]
    fn a_server_that_is_ending_is_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("volumes.json");
        let first = CatalogStore::open(&path).unwrap();
        assert!(matches!(CatalogStore::open(&path), Err(OpenError::Locked(_))));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(20));
                drop(first);
            });
            CatalogStore::open_within(&path, Duration::from_secs(60)).unwrap();
        });
    }

    #[test]
    fn changes_survive_and_ids_are_not_reused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("volumes.json");
        let mut store = CatalogStore::open(&path).unwrap();
        let shared = store.shared();
        assert!(!path.exists(), "nothing is written before the first change");
        let a = store.create(new("a", 1 << 30)).unwrap();
        store.create(new("b c", 1 << 30)).unwrap();
        let before = shared.snapshot();
        assert_eq!(store.resize("b c", 2 << 30).unwrap().size(), 2 << 30);
        assert_eq!(before.get("b c").unwrap().size(), 1 << 30, "a snapshot does not change");
        assert!(!before.get("a").unwrap().is_deleted());
        store.delete("a").unwrap();
        assert!(before.get("a").unwrap().is_deleted() && a.is_deleted());
        assert!(shared.snapshot().get("a").is_none());
        assert_eq!(store.create(new("a", 4096)).unwrap().id(), 3);
        drop(store);

        let mut store = CatalogStore::open(&path).unwrap();
        let catalog = store.catalog();
        assert_eq!(names(&catalog), [(3, "a".into(), 4096), (2, "b c".into(), 2 << 30)]);
        assert_eq!(catalog.generation(), 5);
        assert_eq!(catalog.get("b c").unwrap().geometry().shape(), &Shape { size: 2 << 30, ..new("", 0).shape });
        assert_eq!(catalog.get("b c").unwrap().geometry().copysets(), new("", 0).copysets);
        let gone: Vec<_> = catalog.deleting().map(|v| (v.id(), v.is_deleted())).collect();
        assert_eq!(gone, [(1, true)], "an interrupted deletion is not forgotten");
        store.forget(1).unwrap();
        assert!(matches!(store.forget(1), Err(ChangeError::NotDeleting(1))));
        store.delete("a").unwrap();
        store.forget(3).unwrap();
        drop(store);
        assert_eq!(CatalogStore::open(&path).unwrap().create(new("z", 4096)).unwrap().id(), 4);
    }

    #[test]
    fn bad_changes_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("volumes.json");
        let mut store = CatalogStore::open(&path).unwrap();
        store.create(new("a", 8192)).unwrap();
        let file = std::fs::read(&path).unwrap();
        for name in ["", "a/b", "a\n", "\u{7f}", "\u{2028}", &"x".repeat(256)] {
            assert!(matches!(store.create(new(name, 4096)), Err(ChangeError::Name(_))), "{name:?}");
        }
        assert!(matches!(store.create(new("a", 4096)), Err(ChangeError::Exists(_))));
        assert!(matches!(store.create(new("b", 5000)), Err(ChangeError::Geometry(GeometryError::Size(5000)))));
        assert!(matches!(store.resize("a", 4096), Err(ChangeError::Shrink { .. })));
        assert!(matches!(store.resize("a", 8193), Err(ChangeError::Geometry(_))));
        assert!(matches!(store.resize("b", 8192), Err(ChangeError::NotFound(_))));
        assert!(matches!(store.delete("b"), Err(ChangeError::NotFound(_))));
        assert_eq!(store.resize("a", 8192).unwrap().size(), 8192);
        assert_eq!(std::fs::read(&path).unwrap(), file, "nothing was written");
    }

    #[test]
    fn a_failed_write_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("volumes.json");
        let mut store = CatalogStore::open(&path).unwrap();
        store.create(new("a", 8192)).unwrap();
        std::fs::create_dir(beside(&path, ".tmp")).unwrap();
        assert!(matches!(store.create(new("b", 4096)), Err(ChangeError::Io { .. })));
        assert!(matches!(store.delete("a"), Err(ChangeError::Io { .. })));
        assert!(!store.catalog().get("a").unwrap().is_deleted());
        std::fs::remove_dir(beside(&path, ".tmp")).unwrap();
        assert_eq!(store.create(new("b", 4096)).unwrap().id(), 2);
    }

    #[test]
    fn one_writer_many_readers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("volumes.json");
        let mut store = CatalogStore::open(&path).unwrap();
        store.create(new("a", 8192)).unwrap();
        assert!(matches!(CatalogStore::open(&path), Err(OpenError::Locked(_))));
        assert_eq!(names(&Catalog::read(&path).unwrap()), [(1, "a".into(), 8192)]);
        drop(store);
        CatalogStore::open(&path).unwrap();
    }

    fn written() -> (tempfile::TempDir, PathBuf, String) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("volumes.json");
        let mut store = CatalogStore::open(&path).unwrap();
        store.create(new("vol", 1 << 30)).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        (dir, path, text)
    }

    #[test]
    fn what_is_not_understood_is_refused_and_kept() {
        let (_dir, path, good) = written();
        let cases: [(&str, Vec<u8>); 7] = [
            ("empty", vec![]),
            ("not JSON", b"hello".to_vec()),
            ("cut", good.as_bytes()[..good.len() / 2].to_vec()),
            ("other size", good.replace("1073741824", "1073745920").into_bytes()),
            ("unknown field", good.replace("\"next_id\"", "\"colour\": 1, \"next_id\"").into_bytes()),
            ("not UTF-8", vec![0xff; 100]),
            ("two documents", format!("{good}{good}").into_bytes()),
        ];
        for (what, bytes) in cases {
            std::fs::write(&path, &bytes).unwrap();
            let error = CatalogStore::open(&path).unwrap_err();
            assert!(matches!(error, OpenError::Damaged { .. }), "{what}: {error}");
            assert_eq!(std::fs::read(&path).unwrap(), bytes, "{what}: kept as it is");
        }
        std::fs::write(&path, good.replace("\"version\": 2", "\"version\": 3")).unwrap();
        assert!(matches!(CatalogStore::open(&path), Err(OpenError::Version { found: 3, .. })));
        std::fs::write(&path, good.replace("\"version\": 2", "\"version\": 0")).unwrap();
        assert!(matches!(CatalogStore::open(&path), Err(OpenError::Version { found: 0, .. })));
        std::fs::write(&path, r#"{"version": 7, "anything": ["else"]}"#).unwrap();
        assert!(matches!(CatalogStore::open(&path), Err(OpenError::Version { found: 7, .. })));
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert!(matches!(CatalogStore::open(&path), Err(OpenError::Damaged { .. })));
    }

    #[test]
    fn servers_are_kept_and_version_1_has_none() {
        let (_dir, path, good) = written();
        std::fs::write(&path, good.replace("\"version\": 2", "\"version\": 1")).unwrap();
        let mut store = CatalogStore::open(&path).unwrap();
        assert!(store.catalog().get("vol").unwrap().homes(CopysetId::new(1, 100)).is_empty());
        let peers: Vec<u64> = (1..4).map(|n| PeerId::new([127, 0, 0, n].into(), 8200, 0).0).collect();
        let homes = (100..108).map(|id| (CopysetId::new(1, id), peers.clone())).collect::<Homes>();
        let many = homes.keys().map(|&id| (id, vec![peers[0]; PEERS_MAX + 1])).collect();
        let refused = store.create(NewVolume { homes: many, ..new("many", 1 << 30) });
        assert!(matches!(refused, Err(ChangeError::Servers(33))));
        store.create(NewVolume { homes: homes.clone(), ..new("far", 1 << 30) }).unwrap();
        store.resize("far", 2 << 30).unwrap();
        let given = |id| NewVolume { id: Some(id), ..new(&format!("given {id}"), 1 << 30) };
        assert_eq!(store.create(given(SHARED_IDS + 9)).unwrap().id(), SHARED_IDS + 9);
        for id in [0, 77, SHARED_IDS + 9] {
            let again = NewVolume { name: "again".into(), ..given(id) };
            assert!(matches!(store.create(again), Err(ChangeError::Id(refused)) if refused == id));
        }
        drop(store);
        let catalog = Catalog::read(&path).unwrap();
        assert_eq!(catalog.get("far").unwrap().homes(CopysetId::new(1, 107)), peers);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replace("\"version\": 2", "\"version\": 1")).unwrap();
        assert!(matches!(Catalog::read(&path), Err(OpenError::Damaged { .. })), "version 1 had no servers");
        std::fs::write(&path, text.replace("127.0.0.2:8200:0", "127.0.0.2:8200:x")).unwrap();
        assert!(matches!(Catalog::read(&path), Err(OpenError::Damaged { .. })));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn rot_is_never_taken_for_a_catalog(at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let (_dir, path, good) = written();
            let mut bytes = good.clone().into_bytes();
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            std::fs::write(&path, &bytes).unwrap();
            // A flip in white space may be harmless; anything else is an error. Never another catalog.
            if let Ok(catalog) = Catalog::read(&path) {
                prop_assert_eq!(names(&catalog), vec![(1, "vol".to_owned(), 1 << 30)]);
            }
        }
    }
}
