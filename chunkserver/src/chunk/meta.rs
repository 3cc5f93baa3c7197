//! The metapage: what a slot holds (format: docs/formats.md, "Metapage"). Pure codec.
//!
//! Two copies per slot, written in turn: copy = page generation mod 2. A torn write spoils at most the copy that was
//! being written; the other one is the state before.

use super::bitmap::Bitmap;
use super::layout::Layout;
use super::page::{self, Page, put, u16_at, u32_at, u64_at};
use raftlog::{BLOCK, CopysetId};

const MAGIC: u32 = u32::from_le_bytes(*b"CMPG");
const VERSION: u16 = 1;
const CRC_AT: usize = 4;
const NO_SLOT: u32 = u32::MAX;
/// Bytes of each bitmap on disk: 4096 blocks.
const BITMAP: usize = 512;
const WRITTEN_AT: usize = 112;
const PRESENT_AT: usize = WRITTEN_AT + BITMAP;
const LOCATION_AT: usize = PRESENT_AT + BITMAP;
const WHOLE_AT: usize = BLOCK - 8;

/// Bytes of a clone location that fit here. Curve allows 3000: the rest will go into the 64 reserved bytes of the
/// slot's first CRC page, which the format keeps free for it.
pub const LOCATION_INLINE_MAX: usize = WHOLE_AT - LOCATION_AT;

/// A chunk whose blocks come from elsewhere until they are written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CloneMeta {
    /// Where from; at most [`LOCATION_INLINE_MAX`] bytes.
    pub location: Vec<u8>,
    /// Blocks that are present locally.
    pub present: Bitmap,
}

/// The only chunk snapshot a chunk may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkSnapshot {
    /// Slot that holds the frozen blocks.
    pub slot: u32,
    /// Version frozen.
    pub sn: u64,
}

/// What a chunk is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkMeta {
    /// Copyset.
    pub copyset: CopysetId,
    /// Life of the copyset.
    pub incarnation: u64,
    /// Chunk id.
    pub chunk: u64,
    /// Log index of the write that created this life of the chunk. Entries before it belong to a former one.
    pub created_index: u64,
    /// Log index of the last change.
    pub applied_index: u64,
    /// Some of it is as of this index: before the log has passed it the chunk is a mixture of two states. 0: it is none.
    pub whole_at: u64,
    /// Version of the last write.
    pub sn: u64,
    /// Version up to which chunk snapshots are known to be finished.
    pub corrected_sn: u64,
    /// Chunk snapshot.
    pub snapshot: Option<ChunkSnapshot>,
    /// Highest fence epoch seen.
    pub fence: u64,
    /// Blocks that hold data; all others read as zero.
    pub written: Bitmap,
    /// Set while the chunk is a clone.
    pub clone: Option<CloneMeta>,
}

/// What is left of a chunk in its slot. Until a checkpoint covers `deleted_index` the slot is not reused, so that replay
/// knows what to leave out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tombstone {
    /// Copyset.
    pub copyset: CopysetId,
    /// Life of the copyset.
    pub incarnation: u64,
    /// Chunk id.
    pub chunk: u64,
    /// Log index that created the chunk.
    pub created_index: u64,
    /// Log index up to which nothing of the chunk is left: of its Delete, or of what is known to follow it.
    pub deleted_index: u64,
}

/// What a metapage says of its slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Free.
    Tombstone(Tombstone),
    /// Allocated.
    Chunk(ChunkMeta),
}

/// One metapage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metapage {
    /// Its slot.
    pub slot: u32,
    /// Life of the slot; rises with every chunk it gets.
    pub generation: u64,
    /// Number of this write of the page; rises for ever.
    pub page: u64,
    /// What the slot holds.
    pub content: Content,
}

/// What a page that does not verify says it is. A torn page tells the truth: these fields share a sector. A rotten one may
/// say anything, so this decides only between harmless and CRC_FAIL, never what is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Claim {
    /// Life of the slot.
    pub(super) generation: u64,
    /// Number of the page.
    pub(super) page: u64,
    /// Applied index, or deleted index of a tombstone.
    pub(super) last_index: u64,
    /// The chunk it names, if it can be a page of this slot at all; nothing in it counts as written.
    pub(super) chunk: Option<Box<ChunkMeta>>,
}

/// Why a page is not a metapage of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MetaError {
    /// Never written.
    #[error("blank")]
    Blank,
    /// Torn or rotten.
    #[error("checksum or magic is wrong")]
    Corrupt,
    /// It verifies and is of a newer format.
    #[error("version {0} is newer than this build")]
    Newer(u16),
    /// It verifies and is at the wrong place.
    #[error("it belongs to slot {0}")]
    Misplaced(u32),
    /// It verifies and makes no sense.
    #[error("field {0} is impossible")]
    Invalid(&'static str),
}

/// Write the page that says what `slot` holds into `out`.
pub(super) fn encode(
    layout: &Layout,
    slot: u32,
    generation: u64,
    page_generation: u64,
    content: &Content,
    out: &mut [u8],
) {
    out.fill(0);
    put(out, 0, &MAGIC.to_le_bytes());
    put(out, 8, &VERSION.to_le_bytes());
    put(out, 12, &slot.to_le_bytes());
    put(out, 16, &generation.to_le_bytes());
    put(out, 24, &page_generation.to_le_bytes());
    put(out, 88, &NO_SLOT.to_le_bytes());
    match content {
        Content::Chunk(chunk) => {
            out[10] = 1;
            encode_chunk(chunk, out);
        }
        Content::Tombstone(tomb) => {
            put(out, 32, &tomb.copyset.0.to_le_bytes());
            put(out, 40, &tomb.incarnation.to_le_bytes());
            put(out, 48, &tomb.chunk.to_le_bytes());
            put(out, 56, &tomb.created_index.to_le_bytes());
            put(out, 64, &tomb.deleted_index.to_le_bytes());
        }
    }
    page::seal(out, CRC_AT, layout.seed());
}

fn encode_chunk(chunk: &ChunkMeta, out: &mut [u8]) {
    put(out, 32, &chunk.copyset.0.to_le_bytes());
    put(out, 40, &chunk.incarnation.to_le_bytes());
    put(out, 48, &chunk.chunk.to_le_bytes());
    put(out, 56, &chunk.created_index.to_le_bytes());
    put(out, 64, &chunk.applied_index.to_le_bytes());
    put(out, 72, &chunk.sn.to_le_bytes());
    put(out, 80, &chunk.corrected_sn.to_le_bytes());
    if let Some(snapshot) = chunk.snapshot {
        put(out, 88, &snapshot.slot.to_le_bytes());
        put(out, 96, &snapshot.sn.to_le_bytes());
    }
    put(out, 104, &chunk.fence.to_le_bytes());
    chunk.written.encode(&mut out[WRITTEN_AT..PRESENT_AT]);
    put(out, WHOLE_AT, &chunk.whole_at.to_le_bytes());
    if let Some(clone) = &chunk.clone {
        assert!(!clone.location.is_empty() && clone.location.len() <= LOCATION_INLINE_MAX);
        put(out, 92, &(clone.location.len() as u16).to_le_bytes());
        clone.present.encode(&mut out[PRESENT_AT..LOCATION_AT]);
        put(out, LOCATION_AT, &clone.location);
    }
}

/// Read the page at one of the two places of `slot`.
pub(super) fn decode(layout: &Layout, slot: u32, page: &Page) -> Result<Metapage, MetaError> {
    if u32_at(page, 0) != MAGIC || !page::verify(page, CRC_AT, layout.seed()) {
        return Err(if page::is_blank(page) { MetaError::Blank } else { MetaError::Corrupt });
    }
    let version = u16_at(page, 8);
    if version != VERSION {
        return Err(MetaError::Newer(version));
    }
    let own = u32_at(page, 12);
    if own != slot {
        return Err(MetaError::Misplaced(own));
    }
    if page[11] != 0 || u16_at(page, 94) != 0 {
        return Err(MetaError::Invalid("reserved"));
    }
    let (generation, number) = (u64_at(page, 16), u64_at(page, 24));
    if generation > page::GENERATION_MAX || number > page::GENERATION_MAX {
        return Err(MetaError::Invalid("generation"));
    }
    let content = match page[10] {
        0 => Content::Tombstone(Tombstone {
            copyset: CopysetId(u64_at(page, 32)),
            incarnation: u64_at(page, 40),
            chunk: u64_at(page, 48),
            created_index: u64_at(page, 56),
            deleted_index: u64_at(page, 64),
        }),
        1 => Content::Chunk(decode_chunk(layout, page)?),
        _ => return Err(MetaError::Invalid("state")),
    };
    Ok(Metapage { slot, generation, page: number, content })
}

/// What a page that `decode` refused claims.
pub(super) fn claim(layout: &Layout, slot: u32, page: &Page) -> Claim {
    let (generation, number, last_index) = (u64_at(page, 16), u64_at(page, 24), u64_at(page, 64));
    let counted = generation <= page::GENERATION_MAX && number <= page::GENERATION_MAX;
    let ours = u32_at(page, 0) == MAGIC && u16_at(page, 8) == VERSION && u32_at(page, 12) == slot && page[10] == 1;
    let chunk = (counted && ours).then(|| {
        Box::new(ChunkMeta {
            copyset: CopysetId(u64_at(page, 32)),
            incarnation: u64_at(page, 40),
            chunk: u64_at(page, 48),
            created_index: u64_at(page, 56),
            applied_index: last_index,
            whole_at: 0,
            sn: 0,
            corrected_sn: 0,
            snapshot: None,
            fence: 0,
            written: Bitmap::new(layout.blocks()),
            clone: None,
        })
    });
    Claim { generation, page: number, last_index, chunk }
}

fn decode_chunk(layout: &Layout, page: &Page) -> Result<ChunkMeta, MetaError> {
    let snapshot = match u32_at(page, 88) {
        NO_SLOT => None,
        slot if slot < layout.slot_count => Some(ChunkSnapshot { slot, sn: u64_at(page, 96) }),
        _ => return Err(MetaError::Invalid("snapshot slot")),
    };
    let bits = layout.blocks();
    let written = Bitmap::decode(bits, &page[WRITTEN_AT..PRESENT_AT]).ok_or(MetaError::Invalid("written bitmap"))?;
    let clone = match usize::from(u16_at(page, 92)) {
        0 => None,
        len => Some(CloneMeta {
            location: page[LOCATION_AT..WHOLE_AT].get(..len).ok_or(MetaError::Invalid("location length"))?.to_vec(),
            present: Bitmap::decode(bits, &page[PRESENT_AT..LOCATION_AT]).ok_or(MetaError::Invalid("clone bitmap"))?,
        }),
    };
    Ok(ChunkMeta {
        copyset: CopysetId(u64_at(page, 32)),
        incarnation: u64_at(page, 40),
        chunk: u64_at(page, 48),
        created_index: u64_at(page, 56),
        applied_index: u64_at(page, 64),
        whole_at: u64_at(page, WHOLE_AT),
        sn: u64_at(page, 72),
        corrected_sn: u64_at(page, 80),
        snapshot,
        fence: u64_at(page, 104),
        written,
        clone,
    })
}
