//! The log file of a process that uses the C API. (Rust users subscribe to `tracing` as they like.)

use std::{fs, io, path::Path, sync::Mutex};

use tracing_subscriber::filter::LevelFilter;

/// Appends what happens to `nebd-client.log` in `folder` from now on. A process that has set up `tracing` keeps that.
pub(crate) fn start(folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    let file = fs::OpenOptions::new().append(true).create(true).open(folder.join("nebd-client.log"))?;
    let log = tracing_subscriber::fmt().with_ansi(false).with_max_level(LevelFilter::INFO);
    let _ = log.with_writer(Mutex::new(file)).try_init();
    Ok(())
}
