//! One process of a host has a file open: a lock file per name, `flock`ed as long as the file is open.
//!
//! The C++ client locks the same file the same way, so the two exclude each other. C++ unlocks before it unlinks, which
//! lets two others believe that they hold the lock (one on the file that is unlinked next, one on its successor). Here
//! the file is unlinked while it is still locked, and who gets a lock makes sure that the file is still the one of that
//! name. Against a C++ process that is just closing the gap remains.

use std::{
    fs::{self, File},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};

use crate::error::Error;

/// How often a lock file that vanished meanwhile is made anew.
const TRIES: u32 = 16;

/// The lock on a file's name; released when dropped.
#[derive(Debug)]
pub(crate) struct FileLock {
    path: PathBuf,
    /// Keeps the lock.
    _file: File,
}

impl FileLock {
    /// Takes the lock of `name`, or says that somebody has it.
    pub(crate) fn take(folder: &Path, name: &str) -> Result<Self, Error> {
        let path = folder.join(name.replace('/', "+"));
        let failed = |error: std::io::Error| Error::Lock { path: path.clone(), error: error.to_string() };
        for _ in 0..TRIES {
            let file = fs::OpenOptions::new().write(true).create(true).truncate(false).mode(0o644).open(&path);
            let file = file.map_err(failed)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => return Err(Error::Locked(path)),
                Err(error) => return Err(failed(error.into())),
            }
            let (ours, named) = (file.metadata().map_err(failed)?, fs::metadata(&path));
            if named.is_ok_and(|named| (named.dev(), named.ino()) == (ours.dev(), ours.ino())) {
                return Ok(Self { path, _file: file });
            }
        }
        Err(Error::Locked(path))
    }
}

impl Drop for FileLock {
    fn drop(&mut self) {
        // Gone already is as good; the lock itself goes with the descriptor.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_holder_at_a_time_and_nothing_left_behind() {
        let folder = tempfile::tempdir().unwrap();
        let name = "cbd:pool1//vol1_user_:/etc/curve/client.conf";
        let lock = FileLock::take(folder.path(), name).unwrap();
        let path = folder.path().join("cbd:pool1++vol1_user_:+etc+curve+client.conf");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o644);
        assert_eq!(FileLock::take(folder.path(), name).unwrap_err(), Error::Locked(path.clone()));
        drop(FileLock::take(folder.path(), "another").unwrap());
        drop(lock);
        assert!(!path.exists());
        drop(FileLock::take(folder.path(), name).unwrap());
        let missing = folder.path().join("missing");
        assert!(matches!(FileLock::take(&missing, name), Err(Error::Lock { .. })));
    }

    #[test]
    fn an_unlinked_lock_file_is_no_lock() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("v");
        // As C++ leaves it for a moment: the name is gone, the descriptor still locked by somebody.
        let old = File::create(&path).unwrap();
        flock(&old, FlockOperation::NonBlockingLockExclusive).unwrap();
        fs::remove_file(&path).unwrap();
        let held = FileLock::take(folder.path(), "v").unwrap();
        assert!(matches!(FileLock::take(folder.path(), "v"), Err(Error::Locked(_))));
        drop(held);
    }
}
