//! The disk as a file or block device: locking, formatting, opening. Blocking calls, for start-up and commands only.
//!
//! Exclusive use is a `flock` on the very file that I/O goes through (rule 2). `format` never overwrites anything
//! without `--force`, and writes the superblock last: an interrupted format leaves a disk that is refused as blank.

use crate::chunk::{FLAG_SPARSE, Layout, LayoutError, Params, SuperblockError};
use crate::io::buffer::{Arena, PoolBuf};
use raftlog::BLOCK;
use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const STEP: usize = 4 << 20;
/// `format` waits this long for the lock: the kernel may still be ending the I/O of a server that is gone (rule 2).
const FORMAT_WAIT: Duration = Duration::from_secs(2);
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// Why a disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// A system call failed.
    #[error("{path}: {what}: {source}")]
    Io {
        /// File or device.
        path: PathBuf,
        /// Doing what.
        what: &'static str,
        /// Cause.
        source: std::io::Error,
    },
    /// Another process has it.
    #[error("{0}: locked by another process")]
    Locked(PathBuf),
    /// It holds something.
    #[error("{0}: {1}; nothing was touched. Use --force to format it all the same")]
    InUse(PathBuf, &'static str),
    /// tmpfs cannot do what a disk does.
    #[error("{0}: tmpfs is memory, not a disk; choose a directory on a disk (ext4, XFS) or a block device")]
    Tmpfs(PathBuf),
    /// The superblock was refused.
    #[error("{path}: {source}")]
    Superblock {
        /// File or device.
        path: PathBuf,
        /// Why.
        source: SuperblockError,
    },
    /// The sizes do not fit.
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

/// What to format, and how.
#[derive(Clone, Debug)]
pub struct Format {
    /// File (made if missing) or block device.
    pub path: PathBuf,
    /// Size; `None` = all of a block device or existing file.
    pub size: Option<u64>,
    /// Shards.
    pub shards: u16,
    /// Chunk size, bytes.
    pub chunk_size: u32,
    /// Log per shard, bytes; `None` = a sixteenth of the disk, within 64 MiB and 512 MiB.
    pub log_size: Option<u64>,
    /// Do not write the slots (lab).
    pub sparse: bool,
    /// Overwrite what is there.
    pub force: bool,
}

/// An open, locked, checked disk.
#[derive(Debug)]
pub struct Disk {
    /// Opened with O_DIRECT; the lock lives as long as it does.
    pub file: File,
    /// From the superblock.
    pub layout: Layout,
}

fn io<'a>(path: &'a Path, what: &'static str) -> impl Fn(std::io::Error) -> DiskError + 'a {
    move |source| DiskError::Io { path: path.to_owned(), what, source }
}

fn lock(file: &File, path: &Path, wait: Duration) -> Result<(), DiskError> {
    let until = Instant::now() + wait;
    loop {
        match rustix::fs::flock(file.as_fd(), rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(DiskError::Locked(path.to_owned())),
            Err(e) => return Err(io(path, "lock")(e.into())),
        }
    }
}

fn locked(path: &Path, error: std::io::Error) -> DiskError {
    match error.kind() {
        std::io::ErrorKind::WouldBlock => DiskError::Locked(path.to_owned()),
        _ => io(path, "lock")(error),
    }
}

/// Make our share of a lock the only one, waiting at most `wait` for the others to go. The kernel gives a share up when it
/// cannot make it exclusive, so it is taken again each time: who fails here has it still.
///
/// # Errors
/// The system's: `WouldBlock` when the others did not go in time, or somebody else has it alone.
pub fn claim(file: &File, wait: Duration) -> std::io::Result<()> {
    use rustix::fs::{FlockOperation, flock};
    let until = Instant::now() + wait;
    loop {
        match flock(file, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => flock(file, FlockOperation::NonBlockingLockShared)?,
            other => return Ok(other?),
        }
        if Instant::now() >= until {
            return Err(std::io::ErrorKind::WouldBlock.into());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Bytes of a file or block device.
fn size_of(mut file: &File) -> std::io::Result<u64> {
    use std::io::{Seek, SeekFrom};
    let end = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(0))?;
    Ok(end)
}

fn refuse_tmpfs(file: &File, path: &Path) -> Result<(), DiskError> {
    let stat = rustix::fs::fstatfs(file.as_fd()).map_err(|e| io(path, "statfs")(e.into()))?;
    if stat.f_type as u64 == TMPFS_MAGIC { Err(DiskError::Tmpfs(path.to_owned())) } else { Ok(()) }
}

fn direct(path: &Path, write: bool, create: bool) -> Result<File, DiskError> {
    OpenOptions::new()
        .read(true)
        .write(write)
        .create(create)
        .truncate(false)
        .custom_flags(libc::O_DIRECT)
        .open(path)
        .map_err(io(path, "open with O_DIRECT"))
}

fn buffer(len: usize) -> std::io::Result<PoolBuf> {
    let arena = Arena::new(len.next_power_of_two())?;
    arena.alloc(len).ok_or_else(|| std::io::ErrorKind::OutOfMemory.into())
}

/// Read the superblock of an open disk.
///
/// # Errors
/// [`DiskError`].
pub fn read_layout(file: &File, path: &Path) -> Result<Layout, DiskError> {
    let size = size_of(file).map_err(io(path, "size"))?;
    let mut head = buffer(2 * BLOCK).map_err(io(path, "buffer"))?;
    if size >= head.len() as u64 {
        file.read_exact_at(&mut head, 0).map_err(io(path, "read the superblock"))?;
    }
    Layout::decode(&head, size).map_err(|source| DiskError::Superblock { path: path.to_owned(), source })
}

impl Disk {
    /// Open for serving: lock first, then look.
    ///
    /// # Errors
    /// [`DiskError`], in one line each; nothing is written.
    pub fn open(path: &Path, wait: Duration) -> Result<Self, DiskError> {
        let file = direct(path, true, false)?;
        lock(&file, path, wait)?;
        let layout = read_layout(&file, path)?;
        Ok(Self { file, layout })
    }

    /// Open without the lock, to take the disk over from the process that has it: see [`Self::join`].
    ///
    /// # Errors
    /// [`DiskError`]; nothing is written.
    pub fn open_unlocked(path: &Path) -> Result<Self, DiskError> {
        let file = direct(path, true, false)?;
        let layout = read_layout(&file, path)?;
        Ok(Self { file, layout })
    }

    /// Device and inode: the same for every path to it.
    ///
    /// # Errors
    /// The system's.
    pub fn identity(&self) -> std::io::Result<(u64, u64)> {
        let stat = rustix::fs::fstat(&self.file)?;
        Ok((stat.st_dev, stat.st_ino))
    }

    /// Let one process join: others stay locked out, for the lock is shared, never free. To be called when none of our
    /// writes is in flight.
    ///
    /// # Errors
    /// The system's.
    pub fn share(&self) -> std::io::Result<()> {
        Ok(rustix::fs::flock(&self.file, rustix::fs::FlockOperation::NonBlockingLockShared)?)
    }

    /// Take a share of the lock of a process that has called [`Self::share`].
    ///
    /// # Errors
    /// [`DiskError::Locked`] when it has not.
    pub fn join(&self, path: &Path) -> Result<(), DiskError> {
        self.share().map_err(|error| locked(path, error))
    }

    /// Be alone again: the other process is gone, and with it all of its writes, for they hold its lock.
    ///
    /// # Errors
    /// [`DiskError::Locked`] when that does not happen in time, or a third process got in between.
    pub fn claim(&self, path: &Path, wait: Duration) -> Result<(), DiskError> {
        claim(&self.file, wait).map_err(|error| locked(path, error))
    }

    /// Give our share of the lock away: the other process has its own.
    pub fn leave(&self) {
        let _ = rustix::fs::flock(&self.file, rustix::fs::FlockOperation::Unlock);
    }

    /// Open without the lock, read-only; says whether a server has it. Who looks on hinders nobody who wants it.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn inspect(path: &Path) -> Result<(Self, bool), DiskError> {
        let file = direct(path, false, false)?;
        let free = rustix::fs::flock(file.as_fd(), rustix::fs::FlockOperation::NonBlockingLockShared).is_ok();
        let _ = rustix::fs::flock(file.as_fd(), rustix::fs::FlockOperation::Unlock);
        let layout = read_layout(&file, path)?;
        Ok((Self { file, layout }, !free))
    }
}

/// Is there anything that must not be overwritten?
fn occupied(file: &File, path: &Path, block_device: bool) -> Result<Option<&'static str>, DiskError> {
    let size = size_of(file).map_err(io(path, "size"))?;
    if !block_device {
        return Ok((size > 0).then_some("the file exists and is not empty"));
    }
    let len = (size.min(1 << 20) as usize) / BLOCK * BLOCK;
    if len == 0 {
        return Ok(None);
    }
    let mut head = buffer(len).map_err(io(path, "buffer"))?;
    file.read_exact_at(&mut head, 0).map_err(io(path, "read"))?;
    Ok(head.iter().any(|&b| b != 0).then_some("the device holds something"))
}

/// Format a disk. `progress` is told bytes done and bytes in all.
///
/// # Errors
/// [`DiskError`]; before anything is written wherever that can be known.
pub fn format(what: &Format, mut progress: impl FnMut(u64, u64)) -> Result<Layout, DiskError> {
    let path = what.path.as_path();
    let existed = path.exists();
    let block_device = existed && std::fs::metadata(path).map_err(io(path, "stat"))?.file_type().is_block_device();
    let file = direct(path, true, true)?;
    let result = format_open(what, &file, block_device, &mut progress);
    if result.is_err() && !existed {
        let _ = std::fs::remove_file(path); // leave nothing half made behind
    }
    result
}

fn format_open(
    what: &Format,
    file: &File,
    block_device: bool,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Layout, DiskError> {
    let path = what.path.as_path();
    lock(file, path, FORMAT_WAIT)?;
    refuse_tmpfs(file, path)?;
    if let Some(why) = occupied(file, path, block_device)?
        && !what.force
    {
        return Err(DiskError::InUse(path.to_owned(), why));
    }
    let present = size_of(file).map_err(io(path, "size"))?;
    let size = match what.size {
        Some(size) if block_device && size > present => return Err(LayoutError::TooLarge(size).into()),
        Some(size) => size,
        None => present,
    } / BLOCK as u64
        * BLOCK as u64;
    let layout = Layout::new(&params(what, if block_device { present } else { size }))?;
    if !block_device {
        file.set_len(size).map_err(io(path, "set the size"))?;
        if !what.sparse {
            let flags = rustix::fs::FallocateFlags::empty();
            rustix::fs::fallocate(file.as_fd(), flags, 0, size).map_err(|e| io(path, "allocate")(e.into()))?;
        }
    }
    // The old superblock goes first: a disk is never half old, half new.
    let zeros = buffer(STEP).map_err(io(path, "buffer"))?;
    file.write_all_at(zeros.get(..2 * BLOCK).unwrap_or(&[]), 0).map_err(io(path, "write"))?;
    file.sync_all().map_err(io(path, "sync"))?;
    let end = if what.sparse { layout.zero_range().end } else { layout.size };
    let mut at = 0;
    while at < end {
        let step = (end - at).min(STEP as u64);
        file.write_all_at(zeros.get(..step as usize).unwrap_or(&[]), at).map_err(io(path, "write"))?;
        at += step;
        progress(at, end);
    }
    file.sync_all().map_err(io(path, "sync"))?;
    let mut head = buffer(2 * BLOCK).map_err(io(path, "buffer"))?;
    for copy in head.chunks_mut(BLOCK) {
        copy.copy_from_slice(&layout.encode());
    }
    file.write_all_at(&head, 0).map_err(io(path, "write the superblock"))?;
    file.sync_all().map_err(io(path, "sync"))?;
    if let Some(folder) = path.parent().filter(|p| !p.as_os_str().is_empty() && !block_device) {
        File::open(folder).and_then(|f| f.sync_all()).map_err(io(folder, "sync"))?;
    }
    Ok(layout)
}

fn params(what: &Format, size: u64) -> Params {
    let wanted = what.log_size.unwrap_or_else(|| (size / 16).clamp(64 << 20, 512 << 20));
    // Eight segments, each large enough for a whole chunk and more.
    let segment = (wanted / 8).next_multiple_of(1 << 20).max(u64::from(what.chunk_size) + (1 << 20));
    let log = (wanted / segment).max(3) * segment;
    Params {
        uuid: uuid(),
        size,
        shards: what.shards,
        chunk_size: what.chunk_size,
        log_bytes_per_shard: log,
        log_segment_size: segment,
        flags: if what.sparse { FLAG_SPARSE } else { 0 },
    }
}

/// Sixteen random bytes from the kernel.
fn uuid() -> [u8; 16] {
    let mut bytes = [0; 16];
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    fn disk() -> (tempfile::TempDir, PathBuf) {
        let program = std::env::current_exe().unwrap(); // what is beside it is not in memory only
        let folder = tempfile::tempdir_in(program.parent().unwrap()).unwrap();
        let path = folder.path().join("disk");
        let what = Format {
            path: path.clone(),
            size: Some(64 << 20),
            shards: 1,
            chunk_size: 1 << 20,
            log_size: Some(8 << 20),
            sparse: true,
            force: false,
        };
        format(&what, |_, _| {}).unwrap();
        (folder, path)
    }

    #[test]
    fn a_share_that_cannot_be_made_the_only_one_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let open = || OpenOptions::new().create(true).truncate(false).write(true).open(&path).unwrap();
        let share = |file: &File| rustix::fs::flock(file, rustix::fs::FlockOperation::NonBlockingLockShared);
        let alone = |file: &File| rustix::fs::flock(file, rustix::fs::FlockOperation::NonBlockingLockExclusive);
        let (ours, other, third) = (open(), open(), open());
        share(&ours).unwrap();
        share(&other).unwrap();
        let failed = claim(&ours, Duration::from_millis(5)).unwrap_err();
        assert_eq!(failed.kind(), std::io::ErrorKind::WouldBlock);
        drop(other);
        assert!(alone(&third).is_err(), "ours is there still");
        claim(&ours, PATIENCE).unwrap();
        assert!(share(&third).is_err());
        drop(ours);
        alone(&third).unwrap();
        let late = open();
        assert_eq!(claim(&late, PATIENCE).unwrap_err().kind(), std::io::ErrorKind::WouldBlock, "nothing to wait for");
    }

    #[test]
    fn who_looks_at_a_disk_hinders_nobody() {
        let (_folder, path) = disk();
        let (looking, serving) = Disk::inspect(&path).unwrap();
        assert!(!serving);
        let disk = Disk::open(&path, Duration::ZERO).unwrap();
        assert!(Disk::inspect(&path).unwrap().1);
        disk.share().unwrap();
        let (again, _) = Disk::inspect(&path).unwrap();
        disk.claim(&path, Duration::ZERO).unwrap();
        drop((looking, again));
    }
}
