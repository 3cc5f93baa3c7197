//! The map of a disk, and the superblock that states it (format: docs/formats.md, "Superblock" and "Zones").
//!
//! One address space, the same on a file and on a block device (rule 1): superblock | log zone of each shard | metadata
//! zone | CRC zone | slots. Everything is decided when the disk is formatted and never changes; the superblock stores
//! the inputs *and* the derived numbers, so a build that would derive other ones refuses the disk instead of reading
//! it wrongly.

use super::crcpage;
use super::page::{self, Page, put, u16_at, u32_at, u64_at};
use raftlog::{BLOCK, CopysetId};

/// `flags`: the slots were not written when formatting (lab use; writes may allocate in the file system).
pub const FLAG_SPARSE: u32 = 1;

/// Version of the on-disk format this build reads and writes.
pub const VERSION: u32 = 1;

const KNOWN_FLAGS: u32 = FLAG_SPARSE;
const MAGIC: [u8; 8] = *b"CHUNKSRV";
const CRC_AT: usize = 12;
const USED: usize = 128;
/// Zones start at multiples of this.
const ALIGN: u64 = 1 << 20;
/// Most slots of an extent.
const EXTENT_SLOTS_MAX: u32 = 64;
/// Bytes of metapages per slot: two copies.
pub(super) const META_PAIR: u64 = 2 * BLOCK as u64;
const B: u64 = BLOCK as u64;

/// What `format` decides.
#[derive(Clone, Debug)]
pub struct Params {
    /// Identity of the disk.
    pub uuid: [u8; 16],
    /// Bytes of the file or device.
    pub size: u64,
    /// Shards; each has its own log zone.
    pub shards: u16,
    /// Bytes of a chunk: a power of two, 64 KiB to 16 MiB.
    pub chunk_size: u32,
    /// Bytes of one shard's log zone: a multiple of `log_segment_size`, at least three segments.
    pub log_bytes_per_shard: u64,
    /// Bytes of a log segment: a multiple of 4 KiB, at least 64 KiB.
    pub log_segment_size: u64,
    /// `FLAG_*`.
    pub flags: u32,
}

/// Why a disk cannot be laid out this way.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Shard count.
    #[error("shard count {0} is not between 1 and 256")]
    Shards(u16),
    /// Chunk size.
    #[error("chunk size {0} is not a power of two between 64 KiB and 16 MiB")]
    ChunkSize(u32),
    /// Log sizes.
    #[error("a log of {log} bytes in segments of {segment} is not at least 3 whole segments of 64 KiB or more")]
    Log {
        /// Zone size.
        log: u64,
        /// Segment size.
        segment: u64,
    },
    /// Flags of a newer build.
    #[error("unknown flags {0:#x}")]
    Flags(u32),
    /// No room for slots.
    #[error("{size} bytes are too few: {shards} shards need {needed}")]
    TooSmall {
        /// Disk size.
        size: u64,
        /// Shards.
        shards: u16,
        /// Smallest size that works.
        needed: u64,
    },
    /// More slots than 32-bit numbers.
    #[error("{0} bytes are too many for this chunk size")]
    TooLarge(u64),
}

/// Why a superblock was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SuperblockError {
    /// Nothing there.
    #[error("the disk is not formatted (it is blank)")]
    Blank,
    /// Something there that is not ours.
    #[error("the disk holds something else (no superblock of a chunkserver)")]
    Foreign,
    /// A newer build made it.
    #[error("the disk has format version {0}; this build knows up to {VERSION}")]
    Newer(u32),
    /// Ours, but both copies are damaged.
    #[error("both copies of the superblock are damaged")]
    Corrupt,
    /// File or device shrank or grew.
    #[error("the disk was formatted with {formatted} bytes and now has {actual}")]
    WrongSize {
        /// Then.
        formatted: u64,
        /// Now.
        actual: u64,
    },
    /// It verifies, but its numbers are impossible.
    #[error("the superblock contradicts itself: {0}")]
    Invalid(String),
}

/// The map of one disk. Offsets are bytes from its start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Identity of the disk.
    pub uuid: [u8; 16],
    /// Bytes in use (whole blocks).
    pub size: u64,
    /// Shards.
    pub shards: u16,
    /// Bytes of a chunk.
    pub chunk_size: u32,
    /// Bytes of one shard's log zone.
    pub log_bytes_per_shard: u64,
    /// Bytes of a log segment.
    pub log_segment_size: u64,
    /// `FLAG_*`.
    pub flags: u32,
    /// Slots.
    pub slot_count: u32,
    /// Slots of an extent, the unit in which shards get slots.
    pub extent_slots: u32,
    /// Start of shard 0's log zone.
    pub log_offset: u64,
    /// Start of the metadata zone.
    pub meta_offset: u64,
    /// Start of the CRC zone.
    pub crc_offset: u64,
    /// Start of slot 0.
    pub slots_offset: u64,
}

impl Layout {
    /// Lay out a disk.
    ///
    /// # Errors
    /// When the parameters do not fit each other or the disk.
    pub fn new(p: &Params) -> Result<Self, LayoutError> {
        check_params(p)?;
        let size = p.size / B * B;
        let log_offset = ALIGN;
        let log_end = log_offset + u64::from(p.shards) * p.log_bytes_per_shard;
        let mut layout = Self {
            uuid: p.uuid,
            size,
            shards: p.shards,
            chunk_size: p.chunk_size,
            log_bytes_per_shard: p.log_bytes_per_shard,
            log_segment_size: p.log_segment_size,
            flags: p.flags,
            slot_count: 0,
            extent_slots: 1,
            log_offset,
            meta_offset: log_end.next_multiple_of(ALIGN),
            crc_offset: 0,
            slots_offset: 0,
        };
        let per_slot = META_PAIR + layout.crc_bytes_per_slot() + u64::from(p.chunk_size);
        let mut slots = size.saturating_sub(layout.meta_offset) / per_slot;
        if slots > u64::from(u32::MAX - 1) {
            return Err(LayoutError::TooLarge(size));
        }
        // Aligning the zones costs a few slots at most.
        while slots > 0 && layout.place(slots) > size {
            slots -= 1;
        }
        if slots < u64::from(p.shards) {
            let needed = layout.place(u64::from(p.shards));
            return Err(LayoutError::TooSmall { size: p.size, shards: p.shards, needed });
        }
        layout.place(slots);
        // Small disks get small extents, so that every shard can have several.
        layout.extent_slots = (layout.slot_count / (u32::from(p.shards) * 8)).clamp(1, EXTENT_SLOTS_MAX);
        Ok(layout)
    }

    /// Place the zones for `slots` slots; returns where the last slot ends.
    fn place(&mut self, slots: u64) -> u64 {
        self.slot_count = slots as u32;
        self.crc_offset = (self.meta_offset + slots * META_PAIR).next_multiple_of(ALIGN);
        self.slots_offset = (self.crc_offset + slots * self.crc_bytes_per_slot()).next_multiple_of(ALIGN);
        self.slots_offset + slots * u64::from(self.chunk_size)
    }

    /// Blocks of a chunk.
    #[must_use]
    pub fn blocks(&self) -> u32 {
        self.chunk_size / BLOCK as u32
    }
    /// CRC pages of a slot (one copy).
    #[must_use]
    pub fn crc_pages(&self) -> u32 {
        self.blocks().div_ceil(crcpage::CRCS as u32)
    }
    /// Bytes of the CRC zone per slot: both copies.
    #[must_use]
    pub fn crc_bytes_per_slot(&self) -> u64 {
        u64::from(self.crc_pages()) * 2 * B
    }
    /// Number of extents; the last one may be shorter.
    #[must_use]
    pub fn extents(&self) -> u32 {
        self.slot_count.div_ceil(self.extent_slots)
    }
    /// Slots of an extent.
    #[must_use]
    pub fn extent_range(&self, extent: u32) -> std::ops::Range<u32> {
        let first = extent.saturating_mul(self.extent_slots).min(self.slot_count);
        first..first.saturating_add(self.extent_slots).min(self.slot_count)
    }
    /// Start of a shard's log zone.
    #[must_use]
    pub fn log_offset_of(&self, shard: u16) -> u64 {
        self.log_offset + u64::from(shard) * self.log_bytes_per_shard
    }
    /// Start of a copy of a slot's metapage. The copy follows from the page's generation: they alternate.
    #[must_use]
    pub fn metapage_offset(&self, slot: u32, page_generation: u64) -> u64 {
        self.meta_offset + u64::from(slot) * META_PAIR + (page_generation & 1) * B
    }
    /// Start of a copy of a CRC page.
    #[must_use]
    pub fn crcpage_offset(&self, slot: u32, page: u32, page_generation: u64) -> u64 {
        let copy = (page_generation & 1) * u64::from(self.crc_pages()) * B;
        self.crc_offset + u64::from(slot) * self.crc_bytes_per_slot() + copy + u64::from(page) * B
    }
    /// Start of a block of a slot.
    #[must_use]
    pub fn block_offset(&self, slot: u32, block: u32) -> u64 {
        self.slots_offset + u64::from(slot) * u64::from(self.chunk_size) + u64::from(block) * B
    }
    /// What `format` must zero before it writes the superblock: log and metadata zones. CRC pages and slots need
    /// none: nothing in them counts without a metapage of the same generation.
    #[must_use]
    pub fn zero_range(&self) -> std::ops::Range<u64> {
        self.log_offset..self.crc_offset
    }
    pub(super) fn seed(&self) -> u32 {
        page::seed_of(&self.uuid)
    }

    /// The superblock: written identically to block 0 and block 1, last when formatting.
    #[must_use]
    pub fn encode(&self) -> [u8; BLOCK] {
        let mut out = [0; BLOCK];
        put(&mut out, 0, &MAGIC);
        put(&mut out, 8, &VERSION.to_le_bytes());
        put(&mut out, 16, &self.uuid);
        put(&mut out, 32, &self.size.to_le_bytes());
        put(&mut out, 40, &(BLOCK as u32).to_le_bytes());
        put(&mut out, 44, &self.chunk_size.to_le_bytes());
        put(&mut out, 48, &self.flags.to_le_bytes());
        put(&mut out, 52, &self.shards.to_le_bytes());
        put(&mut out, 56, &self.log_bytes_per_shard.to_le_bytes());
        put(&mut out, 64, &self.log_segment_size.to_le_bytes());
        put(&mut out, 72, &self.slot_count.to_le_bytes());
        put(&mut out, 76, &self.extent_slots.to_le_bytes());
        put(&mut out, 80, &self.log_offset.to_le_bytes());
        put(&mut out, 88, &self.meta_offset.to_le_bytes());
        put(&mut out, 96, &self.crc_offset.to_le_bytes());
        put(&mut out, 104, &self.slots_offset.to_le_bytes());
        page::seal(&mut out, CRC_AT, page::seed_of(&self.uuid));
        out
    }

    /// Read the first two blocks of a disk of `actual_size` bytes.
    ///
    /// # Errors
    /// Whatever makes the disk not ours, or not usable by this build.
    pub fn decode(head: &[u8], actual_size: u64) -> Result<Self, SuperblockError> {
        let copy = |n: usize| head.get(n * BLOCK..(n + 1) * BLOCK).and_then(page::page);
        let (Some(first), Some(second)) = (copy(0), copy(1)) else { return Err(SuperblockError::Blank) };
        let layout = match (decode_copy(first), decode_copy(second)) {
            (Ok(layout), _) | (Err(_), Ok(layout)) => layout,
            (Err(a), Err(b)) => return Err(worse(a, b)),
        };
        let actual = actual_size / B * B;
        if layout.size != actual {
            return Err(SuperblockError::WrongSize { formatted: layout.size, actual });
        }
        Ok(layout)
    }
}

fn check_params(p: &Params) -> Result<(), LayoutError> {
    if p.shards == 0 || p.shards > 256 {
        return Err(LayoutError::Shards(p.shards));
    }
    if !p.chunk_size.is_power_of_two() || !(64 << 10..=16 << 20).contains(&p.chunk_size) {
        return Err(LayoutError::ChunkSize(p.chunk_size));
    }
    let (log, segment) = (p.log_bytes_per_shard, p.log_segment_size);
    let segment_ok = segment >= 64 << 10 && segment.is_multiple_of(B) && segment <= 1 << 40;
    if !segment_ok || !log.is_multiple_of(segment) || log / segment < 3 || log > 1 << 48 {
        return Err(LayoutError::Log { log, segment });
    }
    if p.flags & !KNOWN_FLAGS != 0 {
        return Err(LayoutError::Flags(p.flags));
    }
    if p.size > 1 << 60 {
        return Err(LayoutError::TooLarge(p.size));
    }
    Ok(())
}

fn decode_copy(page: &Page) -> Result<Layout, SuperblockError> {
    if page[..8] != MAGIC {
        return Err(if page::is_blank(page) { SuperblockError::Blank } else { SuperblockError::Foreign });
    }
    // Before the CRC: a newer format may compute it otherwise.
    let version = u32_at(page, 8);
    if version > VERSION {
        return Err(SuperblockError::Newer(version));
    }
    let uuid = page::bytes_at(page, 16);
    if !page::verify(page, CRC_AT, page::seed_of(&uuid)) || version == 0 {
        return Err(SuperblockError::Corrupt);
    }
    let invalid = |what: &str| SuperblockError::Invalid(what.to_owned());
    if u32_at(page, 40) != BLOCK as u32 {
        return Err(invalid("block size is not 4096"));
    }
    if page[54..56].iter().chain(&page[112..]).any(|&b| b != 0) {
        return Err(invalid("reserved bytes are in use"));
    }
    let layout = Layout::new(&Params {
        uuid,
        size: u64_at(page, 32),
        chunk_size: u32_at(page, 44),
        flags: u32_at(page, 48),
        shards: u16_at(page, 52),
        log_bytes_per_shard: u64_at(page, 56),
        log_segment_size: u64_at(page, 64),
    })
    .map_err(|e| SuperblockError::Invalid(e.to_string()))?;
    if layout.encode()[..USED] != page[..USED] {
        return Err(invalid("stored zones differ from the ones its parameters give"));
    }
    Ok(layout)
}

/// Which of two refusals tells more.
fn worse(a: SuperblockError, b: SuperblockError) -> SuperblockError {
    let rank = |e: &SuperblockError| match e {
        SuperblockError::Blank => 0,
        SuperblockError::Foreign => 1,
        SuperblockError::Corrupt => 2,
        SuperblockError::Invalid(_) | SuperblockError::WrongSize { .. } => 3,
        SuperblockError::Newer(_) => 4,
    };
    if rank(&b) > rank(&a) { b } else { a }
}

/// The shard a copyset lives on. Part of the disk format: slots and log zones are found by it.
#[must_use]
pub fn shard_of(copyset: CopysetId, shards: u16) -> u16 {
    // splitmix64's finalizer, then the high part of a multiplication: even for any count of shards.
    let mut x = copyset.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^= x >> 31;
    ((u128::from(x) * u128::from(shards.max(1))) >> 64) as u16
}
