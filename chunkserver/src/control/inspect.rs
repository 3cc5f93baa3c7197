//! `chunkserver inspect`: what is on a disk, without a server and without writing.

use super::disk::{Disk, DiskError};
use crate::chunk::{
    ExtentPool, FLAG_SPARSE, Known, Layout, LoadReport, Loader, ReadFailed, Store, StoreConfig, VERSION,
};
use crate::io::buffer::{Arena, PoolBuf};
use crate::shard::log_geometry;
use copyset::{ConfState, PeerId};
use raftlog::{CopysetId, Limits, Log, Recovery, Report};
use serde_json::{Value, json};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Why a disk could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// The disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A buffer.
    #[error("no memory for a buffer: {0}")]
    Memory(#[from] std::io::Error),
    /// The log.
    #[error("the log of shard {0}: {1}")]
    Log(u16, raftlog::RecoverError),
    /// The metadata.
    #[error("the metadata of shard {0}: {1}")]
    Load(u16, crate::chunk::LoadError),
}

/// The superblock's facts.
#[must_use]
pub fn layout_json(layout: &Layout) -> Value {
    let uuid: String = layout.uuid.iter().map(|b| format!("{b:02x}")).collect();
    json!({
        "format_version": VERSION, "uuid": uuid, "disk_size": layout.size, "shards": layout.shards,
        "chunk_size": layout.chunk_size, "slots": layout.slot_count, "extent_slots": layout.extent_slots,
        "log_bytes_per_shard": layout.log_bytes_per_shard, "log_segment_size": layout.log_segment_size,
        "sparse": layout.flags & FLAG_SPARSE != 0,
        "offsets": {
            "log": layout.log_offset, "metadata": layout.meta_offset, "crc": layout.crc_offset,
            "slots": layout.slots_offset,
        },
    })
}

/// Everything about a disk.
///
/// # Errors
/// [`InspectError`].
pub fn inspect(path: &Path) -> Result<Value, InspectError> {
    let (disk, serving) = Disk::inspect(path)?;
    let layout = &disk.layout;
    let arena = Arena::new(4 << 20)?;
    let read = |offset: u64, len: usize| -> Result<PoolBuf, ReadFailed> {
        let mut buf = arena.alloc(len).ok_or(ReadFailed)?;
        buf.truncate(len);
        disk.file.read_exact_at(&mut buf, offset).map_err(|_| ReadFailed)?;
        Ok(buf)
    };
    let pool = ExtentPool::new(layout);
    let (mut shards, mut copysets) = (Vec::new(), Vec::new());
    for shard in 0..layout.shards {
        let mut recovery = Recovery::new(log_geometry(layout, shard), Limits::default());
        while let Some((offset, len)) = recovery.next_read() {
            let data = read(layout.log_offset_of(shard) + offset, len);
            recovery.feed(data.as_deref().map_err(|_| raftlog::ReadFailed));
        }
        let (log, report) = recovery.finish().map_err(|e| InspectError::Log(shard, e))?;
        let mut loader = Loader::new(layout, shard, pool.clone(), StoreConfig::default());
        while let Some((offset, len)) = loader.next_read() {
            loader.feed((offset, len), read(offset, len).as_deref().map_err(|_| ReadFailed));
        }
        let known = |id: CopysetId| {
            let index = log.index(id)?;
            let (checkpoint, last) = (index.checkpoint(), index.last_index());
            Some(Known { incarnation: checkpoint.incarnation, checkpoint: checkpoint.applied_index, last })
        };
        let (store, loaded) = loader.finish(&known).map_err(|e| InspectError::Load(shard, e))?;
        shards.push(shard_json(shard, &log, &report, &loaded));
        copysets.extend(log.copysets().into_iter().filter_map(|id| copyset_json(shard, id, &log, &store)));
    }
    let note = if serving { "a server has this disk: the view may be torn" } else { "no server has this disk" };
    Ok(json!({
        "disk": path, "serving": serving, "note": note, "superblock": layout_json(layout),
        "pool": { "slots": layout.slot_count, "slots_free_in_whole_extents": pool.free_slots() },
        "shards": shards, "copysets": copysets,
    }))
}

fn shard_json(shard: u16, log: &Log, report: &Report, loaded: &LoadReport) -> Value {
    json!({
        "shard": shard, "log_used_bytes": log.used_bytes(), "log_bytes": log.capacity_bytes(),
        "batches": report.batches, "last_batch": log.durable_seq(), "torn_batches": report.torn,
        "rotten_records": report.rot.len(), "chunks": loaded.chunks, "torn_metapages": loaded.torn,
        "quarantined_slots": loaded.quarantined, "crc_pages_lost": loaded.crc_pages_lost,
    })
}

fn copyset_json(shard: u16, id: CopysetId, log: &Log, store: &Store) -> Option<Value> {
    let index = log.index(id)?;
    let checkpoint = index.checkpoint();
    let conf = ConfState::decode(&checkpoint.conf).ok();
    let peers: Vec<String> = conf.iter().flat_map(|c| &c.voters).map(|&p| PeerId(p).to_string()).collect();
    Some(json!({
        "pool": id.pool(), "copyset": id.copyset(), "shard": shard, "checkpoint": checkpoint.applied_index,
        "commit": index.hard_state().commit, "last": index.last_index(), "term": index.hard_state().term,
        "epoch": conf.as_ref().map_or(0, |c| c.epoch), "chunks": store.chunks_of(id), "peers": peers,
        "incarnation": format!("{:016x}", checkpoint.incarnation),
    }))
}
