//! The chunk store: where the chunks of a shard are on the disk, what of them is still in memory, and how it gets from
//! there to their slots. Sans-I/O: callers perform the reads and writes asked for and report back.
//!
//! Reading order: `layout` (the map of a disk), `meta` and `crcpage` (what is written about a slot), `admit`, `follow`,
//! `store`, `apply` and `read` (what a chunk is asked), `overlay` (blocks in memory), `writeback` (the round that empties
//! it), `load` and `scan` (start-up), `pool` (who gets which slots). Byte formats: docs/formats.md.

mod admit;
mod apply;
mod bitmap;
mod crcpage;
mod follow;
mod install;
mod layout;
mod load;
mod mend;
mod meta;
mod overlay;
mod page;
mod pool;
mod read;
mod scan;
mod store;
mod writeback;

#[cfg(test)]
mod tests;

pub use admit::Change;
pub use apply::{ApplyError, ApplyOp};
pub use bitmap::Bitmap;
pub use install::ChunkInfo;
pub use layout::{FLAG_SPARSE, Layout, LayoutError, Params, SuperblockError, VERSION, shard_of};
pub use load::{Known, LoadError, LoadReport, Loader, READ_BYTES_MAX, ReadFailed};
pub use meta::{ChunkMeta, ChunkSnapshot, CloneMeta, Content, LOCATION_INLINE_MAX, MetaError, Metapage, Tombstone};
pub use pool::{ExtentConflict, ExtentPool};
pub use read::{Piece, PlanKey, ReadPlan, Verified};
pub use store::{Counters, Store, StoreConfig};
pub use writeback::{IoId, RoundIo, RoundStart};
