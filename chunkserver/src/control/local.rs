//! The executor over the local catalog: `cbd:` names mean volumes of this server (nebd-behaviour §B3, §B12).
//!
//! The pool word, the owner and the client configuration of a name are not looked at: there is one catalog, and it has
//! no owners. A handle belongs to one volume for good; a volume that was deleted and made again is another one.

use crate::io::Instant;
use crate::nebd::executor::{
    Executor, ExecutorError, FileInfo, Handle, OpenFlags, Opened, Pending, attributes_of, flags_of,
};
use crate::nebd::metafile::Attributes;
use crate::nebd::name::CurveName;
use crate::volume::Volume;
use crate::volume::catalog::{CatalogStore, SharedCatalog};
use crate::volume::io::{IoKind, VolumeError, VolumeIo};
use crate::volume::map::BLOCK_BYTES;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

/// An open file.
#[derive(Debug)]
struct File {
    catalog: SharedCatalog,
    /// As it was when last looked up.
    volume: Mutex<Arc<Volume>>,
}

impl File {
    fn volume(&self) -> Arc<Volume> {
        Arc::clone(&self.volume.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The volume as it is now; as it was, if it is gone.
    fn refreshed(&self) -> Arc<Volume> {
        let mut volume = self.volume.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(now) = self.catalog.snapshot().get(volume.name()).filter(|now| now.id() == volume.id()) {
            *volume = Arc::clone(now);
        }
        Arc::clone(&volume)
    }

    /// The volume, with a size that has room for this range, if it has one.
    fn holding(&self, offset: u64, len: u64) -> Arc<Volume> {
        let volume = self.volume();
        if offset.saturating_add(len) > volume.size() { self.refreshed() } else { volume }
    }

    fn check(&self) -> Result<(), VolumeError> {
        if self.volume().is_deleted() { Err(VolumeError::Deleted) } else { Ok(()) }
    }
}

impl Handle for File {
    fn info(&self) -> Result<FileInfo, VolumeError> {
        let volume = self.refreshed();
        if volume.is_deleted() {
            return Err(VolumeError::Deleted);
        }
        let chunk_size = u64::from(volume.geometry().shape().chunk_size);
        Ok(FileInfo { size: volume.size(), chunk_size, block_size: BLOCK_BYTES })
    }

    fn start(&self, kind: IoKind, offset: u64, len: u64, deadline: Instant) -> Result<VolumeIo, VolumeError> {
        VolumeIo::new(&self.holding(offset, len), kind, offset, len, deadline)
    }

    fn discard(&self, offset: u64, len: u64, deadline: Instant) -> Result<Option<VolumeIo>, VolumeError> {
        VolumeIo::new(&self.holding(offset, len), IoKind::Zero, offset, len, deadline).map(Some)
    }

    fn flush(&self) -> Result<(), VolumeError> {
        self.check()
    }

    fn invalidate_cache(&self) -> Result<(), VolumeError> {
        self.check()
    }
}

/// Volumes of this server.
#[derive(Debug)]
pub struct LocalExecutor {
    store: Rc<RefCell<CatalogStore>>,
    open: RefCell<BTreeMap<String, Arc<File>>>,
}

impl LocalExecutor {
    /// Over this catalog.
    #[must_use]
    pub fn new(store: Rc<RefCell<CatalogStore>>) -> Self {
        Self { store, open: RefCell::default() }
    }

    fn open_now(&self, name: &str, flags: OpenFlags) -> Result<Opened, ExecutorError> {
        let parsed = CurveName::parse(name).map_err(|e| ExecutorError(e.to_string()))?;
        let catalog = self.store.borrow().shared();
        let local = parsed.local();
        let found = catalog.snapshot().get(&local).cloned();
        let volume = Mutex::new(found.ok_or_else(|| ExecutorError(format!("there is no volume {local:?}")))?);
        let file = Arc::new(File { catalog, volume });
        self.open.borrow_mut().insert(name.to_owned(), Arc::clone(&file));
        Ok(Opened { handle: file, attributes: attributes_of(flags) })
    }

    fn extend_now(&self, name: &str, size: u64) -> Result<(), ExecutorError> {
        let file = self.open.borrow().get(name).cloned().ok_or_else(|| ExecutorError("it is not open".into()))?;
        let volume = file.refreshed();
        if volume.is_deleted() {
            return Err(ExecutorError("the volume was deleted".into()));
        }
        let grown = self.store.borrow_mut().resize(volume.name(), size);
        grown.map_err(|e| ExecutorError(e.to_string()))?;
        file.refreshed();
        Ok(())
    }
}

impl Executor for LocalExecutor {
    fn open<'a>(&'a self, name: &'a str, flags: OpenFlags) -> Pending<'a, Opened> {
        Box::pin(async move { self.open_now(name, flags) })
    }
    fn reopen<'a>(&'a self, name: &'a str, attributes: &'a Attributes) -> Pending<'a, Opened> {
        Box::pin(async move { self.open_now(name, flags_of(attributes)?) })
    }
    fn close<'a>(&'a self, name: &'a str) -> Pending<'a, ()> {
        Box::pin(async move {
            self.open.borrow_mut().remove(name);
            Ok(())
        })
    }
    fn extend<'a>(&'a self, name: &'a str, size: u64) -> Pending<'a, ()> {
        Box::pin(async move { self.extend_now(name, size) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::catalog::NewVolume;
    use crate::volume::map::Shape;
    use raftlog::CopysetId;
    use std::collections::BTreeMap;

    fn executor() -> (tempfile::TempDir, LocalExecutor) {
        let folder = tempfile::tempdir().unwrap();
        let mut store = CatalogStore::open(&folder.path().join("volumes.json")).unwrap();
        create(&mut store, "a");
        create(&mut store, "cinder+b");
        (folder, LocalExecutor::new(Rc::new(RefCell::new(store))))
    }
    fn create(store: &mut CatalogStore, name: &str) {
        let shape = Shape { size: 8 << 20, chunk_size: 1 << 20, stripe_unit: 0, stripe_count: 0 };
        let copysets = vec![CopysetId::new(1, 1)];
        store
            .create(NewVolume { name: name.into(), shape, copysets, homes: BTreeMap::new(), id: None, created: 0 })
            .unwrap();
    }

    #[test]
    fn names_lead_to_volumes() {
        let (_folder, executor) = executor();
        for name in ["cbd:p//a_u_", "cbd:other/a_v_:/conf", "cbd:p//cinder/b_u_"] {
            let opened = executor.open_now(name, Some(true)).unwrap();
            assert_eq!(opened.attributes, attributes_of(Some(true)));
            let info = opened.handle.info().unwrap();
            assert_eq!(info, FileInfo { size: 8 << 20, chunk_size: 1 << 20, block_size: 4096 });
        }
        for name in ["cbd:p//c_u_", "cbd:p//a_u", "test:p//a_u_", "cbd:p//cinder_u_"] {
            assert!(executor.open_now(name, None).is_err(), "{name}");
        }
    }

    #[test]
    fn a_handle_sees_the_volume_grow_and_go() {
        let (_folder, executor) = executor();
        let handle = executor.open_now("cbd:p//a_u_", None).unwrap().handle;
        let read = |offset| handle.start(IoKind::Read, offset, 4096, Instant::FAR).map(|_| ());
        let size = || handle.info().map(|info| info.size);
        assert_eq!((size(), read(8 << 20)), (Ok(8 << 20), Err(VolumeError::BeyondEnd)));
        executor.extend_now("cbd:p//a_u_", 8 << 20).unwrap();
        assert!(executor.extend_now("cbd:p//a_u_", 4 << 20).is_err(), "it does not shrink");
        assert!(executor.extend_now("cbd:p//a_u_", (8 << 20) + 1).is_err());
        assert!(executor.extend_now("cbd:p//cinder/b_u_", 16 << 20).is_err(), "not open");
        executor.extend_now("cbd:p//a_u_", 16 << 20).unwrap();
        assert_eq!((size(), read(8 << 20)), (Ok(16 << 20), Ok(())));
        // Grown by somebody else: seen when asked for, and when it matters.
        executor.store.borrow_mut().resize("a", 24 << 20).unwrap();
        assert_eq!((read(16 << 20), size()), (Ok(()), Ok(24 << 20)));
        executor.store.borrow_mut().delete("a").unwrap();
        create(&mut executor.store.borrow_mut(), "a");
        assert_eq!(
            (read(0), size(), handle.flush()),
            (Err(VolumeError::Deleted), Err(VolumeError::Deleted), Err(VolumeError::Deleted))
        );
        assert!(executor.extend_now("cbd:p//a_u_", 32 << 20).is_err(), "a namesake is another volume");
    }
}
