//! The metafile: which files were opened and not closed, so that a client's numbers hold over restarts. One writer.
//!
//! Promises
//! * What a change says is on disk before the caller goes on (temporary file, sync, rename, sync of the folder), or it
//!   is not made at all: memory follows the file. If nobody can say which ([`MetafileError::Unsure`]), nothing is
//!   confirmed or changed before a restart has read the file.
//! * A file that is not understood in every detail is refused and stays as it is.
//! * The text is the originals' ([`text`]), in both directions, so part2 can be exchanged for theirs and back.

pub mod text;

pub use text::{Attributes, Record};

use crate::limits::{NEBD_FILES_MAX, NEBD_METAFILE_BYTES_MAX};
use crate::replace::{ReplaceError, replace};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

/// What is wrong with the contents of a metafile.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// Not JSON, cut short, or a value that cannot be.
    #[error("it is damaged: {0}")]
    Json(String),
    /// A member that must be there.
    #[error("it is damaged: {0} is missing")]
    Missing(&'static str),
    /// The checksum is not that of the contents.
    #[error("it is damaged: its checksum is {written}, its contents have {found}")]
    Checksum {
        /// Stands in the file.
        written: u32,
        /// Computed.
        found: u32,
    },
    /// It says something this program does not know and would lose.
    #[error("it was written by a newer program: {0:?} is not known")]
    Newer(String),
}

/// Why the metafile cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MetafileError {
    /// Its contents.
    #[error("metafile {path}: {why}")]
    Contents {
        /// File.
        path: PathBuf,
        /// What is wrong.
        why: ReadError,
    },
    /// Too large, or too many records.
    #[error("metafile {0}: more than {NEBD_FILES_MAX} files or {NEBD_METAFILE_BYTES_MAX} bytes")]
    TooBig(PathBuf),
    /// The file system's error. If it came late, memory and file may differ: no more changes until a restart.
    #[error("metafile {path}: cannot {what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// After a failed sync of the folder.
    #[error("an earlier change of the metafile may or may not be on disk: restart before changing more")]
    Unsure,
}

/// The records and their file.
#[derive(Debug)]
pub struct Metafile {
    path: PathBuf,
    records: Vec<Record>,
    /// Places of the records, by name: all of them are looked for at start.
    places: BTreeMap<String, usize>,
    unsure: bool,
}

impl Metafile {
    /// Read it; a missing file has no records.
    ///
    /// # Errors
    /// [`MetafileError`].
    pub fn open(path: &Path) -> Result<Self, MetafileError> {
        let failed = |what| move |source| MetafileError::Io { what, path: path.to_owned(), source };
        let mut bytes = Vec::new();
        match File::open(path) {
            Err(e) if e.kind() == ErrorKind::NotFound => {
                return Ok(Self::of(path, Vec::new()));
            }
            other => {
                let limit = NEBD_METAFILE_BYTES_MAX as u64 + 1;
                other.map_err(failed("open it"))?.take(limit).read_to_end(&mut bytes).map_err(failed("read it"))?;
            }
        }
        if bytes.len() > NEBD_METAFILE_BYTES_MAX {
            return Err(MetafileError::TooBig(path.to_owned()));
        }
        let records = text::decode(&bytes).map_err(|why| MetafileError::Contents { path: path.to_owned(), why })?;
        if records.len() > NEBD_FILES_MAX {
            return Err(MetafileError::TooBig(path.to_owned()));
        }
        Ok(Self::of(path, records))
    }

    fn of(path: &Path, records: Vec<Record>) -> Self {
        Self { path: path.to_owned(), places: places(&records), records, unsure: false }
    }

    /// What is recorded.
    #[must_use]
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// The record of a file.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Record> {
        self.places.get(name).and_then(|&at| self.records.get(at))
    }

    /// What is in memory is what is on disk.
    fn check(&self) -> Result<(), MetafileError> {
        if self.unsure { Err(MetafileError::Unsure) } else { Ok(()) }
    }

    /// Record a file, in place of an earlier record of its name. An equal record is not written again.
    ///
    /// # Errors
    /// [`MetafileError`]; nothing was changed, but see [`MetafileError::Io`].
    pub fn put(&mut self, record: Record) -> Result<(), MetafileError> {
        if self.get(&record.name) == Some(&record) {
            return self.check();
        }
        let mut next = self.records.clone();
        match self.places.get(&record.name).and_then(|&at| next.get_mut(at)) {
            Some(known) => *known = record,
            None => next.push(record),
        }
        self.save(next)
    }

    /// Forget a file.
    ///
    /// # Errors
    /// [`MetafileError`]; nothing was changed, but see [`MetafileError::Io`].
    pub fn remove(&mut self, name: &str) -> Result<(), MetafileError> {
        if self.get(name).is_none() {
            return self.check();
        }
        let mut next = self.records.clone();
        next.retain(|known| known.name != name);
        self.save(next)
    }

    fn save(&mut self, next: Vec<Record>) -> Result<(), MetafileError> {
        self.check()?;
        let text = text::encode(&next);
        if text.len() > NEBD_METAFILE_BYTES_MAX {
            return Err(MetafileError::TooBig(self.path.clone()));
        }
        replace(&self.path, text.as_bytes()).map_err(|ReplaceError { what, path, source, unsure }| {
            self.unsure = unsure;
            MetafileError::Io { what, path, source }
        })?;
        self.places = places(&next);
        self.records = next;
        Ok(())
    }
}

fn places(records: &[Record]) -> BTreeMap<String, usize> {
    records.iter().enumerate().map(|(at, record)| (record.name.clone(), at)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(fd: i32, name: &str) -> Record {
        Record { fd, name: name.into(), attributes: Attributes::from([("session".into(), String::new())]) }
    }

    #[test]
    fn changes_survive_and_nothing_is_written_twice() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("nebdserver.meta");
        let mut file = Metafile::open(&path).unwrap();
        assert!(file.records().is_empty() && !path.exists());
        file.remove("cbd:none").unwrap();
        assert!(!path.exists(), "nothing changed");
        file.put(of(1, "cbd:a")).unwrap();
        file.put(of(2, "cbd:b")).unwrap();
        std::fs::remove_file(&path).unwrap();
        file.put(of(2, "cbd:b")).unwrap();
        assert!(!path.exists(), "an equal record is not written");
        file.put(of(9, "cbd:b")).unwrap();
        assert_eq!(Metafile::open(&path).unwrap().records(), [of(1, "cbd:a"), of(9, "cbd:b")]);
        file.remove("cbd:a").unwrap();
        file.remove("cbd:b").unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, include_str!("../../tests/data/metafile-empty.json"));
        assert!(!path.with_extension("meta.tmp").exists());
    }

    #[test]
    fn a_failed_write_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("nebdserver.meta");
        let mut file = Metafile::open(&path).unwrap();
        file.put(of(1, "cbd:a")).unwrap();
        let before = std::fs::read(&path).unwrap();
        let temp = folder.path().join("nebdserver.meta.tmp");
        std::fs::create_dir(&temp).unwrap();
        assert!(matches!(file.put(of(2, "cbd:b")), Err(MetafileError::Io { .. })));
        assert!(matches!(file.remove("cbd:a"), Err(MetafileError::Io { .. })));
        assert_eq!((file.records(), std::fs::read(&path).unwrap()), ([of(1, "cbd:a")].as_slice(), before.clone()));
        std::fs::remove_dir(&temp).unwrap();
        // A longer left-over of an interrupted write does no harm.
        std::fs::write(&temp, vec![b'x'; 10_000]).unwrap();
        file.put(of(2, "cbd:b")).unwrap();
        assert_eq!(Metafile::open(&path).unwrap().records().len(), 2);
        // The rename fails.
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert!(matches!(file.put(of(3, "cbd:c")), Err(MetafileError::Io { .. })));
        assert_eq!(file.records().len(), 2);
        assert!(matches!(Metafile::open(&path), Err(MetafileError::Io { .. })), "a folder is no metafile");
    }

    #[test]
    fn nothing_is_confirmed_that_may_not_be_on_disk() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = Metafile::open(&folder.path().join("nebdserver.meta")).unwrap();
        file.put(of(1, "cbd:a")).unwrap();
        file.unsure = true; // as after a failed sync of the folder
        for refused in [file.put(of(1, "cbd:a")), file.put(of(2, "cbd:b")), file.remove("cbd:a"), file.remove("cbd:b")]
        {
            assert!(matches!(refused, Err(MetafileError::Unsure)));
        }
    }

    #[test]
    fn what_is_refused_stays_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("nebdserver.meta");
        let good = text::encode(&[of(1, "cbd:a")]);
        for bytes in [good.replace("cbd:a", "cbd:b").into_bytes(), good.as_bytes()[..40].to_vec(), vec![]] {
            std::fs::write(&path, &bytes).unwrap();
            let error = Metafile::open(&path).unwrap_err();
            assert!(matches!(error, MetafileError::Contents { .. }), "{error}");
            assert_eq!(std::fs::read(&path).unwrap(), bytes);
        }
        std::fs::write(&path, vec![b' '; NEBD_METAFILE_BYTES_MAX + 1]).unwrap();
        assert!(matches!(Metafile::open(&path), Err(MetafileError::TooBig(_))));
    }
}
