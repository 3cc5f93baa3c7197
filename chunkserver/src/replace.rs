//! A small file that is replaced as a whole: temporary file, sync, rename, sync of the folder.
//!
//! Promise: after an error that is not [`ReplaceError::unsure`] the old file is in its place, now and after a crash.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// What could not be done.
#[derive(Debug)]
pub struct ReplaceError {
    /// What was tried.
    pub what: &'static str,
    /// On what.
    pub path: PathBuf,
    /// Why not.
    pub source: std::io::Error,
    /// The new file is seen, but a crash may bring the old one back.
    pub unsure: bool,
}

/// Make `bytes` the contents of a file, durably.
///
/// # Errors
/// [`ReplaceError`].
pub fn replace(path: &Path, bytes: &[u8]) -> Result<(), ReplaceError> {
    let temp = beside(path, ".tmp");
    let failed = |what, path: &Path, unsure| {
        let path = path.to_owned();
        move |source| ReplaceError { what, path, source, unsure }
    };
    // Truncated: no end of an older file is left behind the new bytes.
    let mut file = File::create(&temp).map_err(failed("create the new file", &temp, false))?;
    file.write_all(bytes).map_err(failed("write the new file", &temp, false))?;
    file.sync_all().map_err(failed("sync the new file", &temp, false))?;
    std::fs::rename(&temp, path).map_err(failed("replace it", path, false))?;
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder).and_then(|f| f.sync_all()).map_err(failed("sync its folder", path, true))
}

/// The path with something at its end.
#[must_use]
pub fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}
