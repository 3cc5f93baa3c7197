//! Everything off the data path: the disk as a file, the commands' socket, the thread that serves it.

pub mod ctl;
pub mod disk;
pub mod inspect;
pub mod local;
pub mod nebd;
pub mod remote;
pub mod server;
pub mod shards;
pub mod text;
