//! Harm to what lies on a disk at rest: which sectors of a formatted disk hold what, and what is exposed when one of
//! them changes by itself or is overwritten by a stray write.
//!
//! Only what the format can notice is harmed here: a durable block of data, one copy of a CRC page or a metapage, one
//! superblock, and log batches that a later header calls durable. (The last batch of a log has no such witness: rot
//! there looks like a torn tail. docs/formats.md says so; nothing with one replica can do better.)

use crate::disk::Disk;
use crate::history::{self, Place};
use crate::rng::Rng;
use bytes::Buf;
use chunkserver::chunk::{Layout, shard_of};
use chunkserver::io::buffer::BLOCK;
use raftlog::CopysetId;

const B: u64 = BLOCK as u64;
const POOL: u64 = 1;
const COPYSETS: u64 = 4;

/// A whole number of a page, little-endian.
fn number(page: &[u8], at: usize) -> u64 {
    (&page[at..at + 8]).get_u64_le()
}

/// The map of the disk, if the server formatted it.
pub(crate) fn layout(disk: &Disk) -> Option<Layout> {
    Layout::decode(disk.peek(0, 2 * BLOCK), disk.len()).ok()
}

/// One block rots. What was hit, or `None` if nothing suitable was found.
pub(crate) fn strike(disk: &mut Disk, rng: &mut Rng) -> Option<&'static str> {
    let layout = layout(disk)?;
    let (what, offset) = match rng.below(100) {
        0..45 => ("rot of data", data_block(disk, &layout, rng)?),
        45..65 => ("rot of a CRC page", crc_page(disk, &layout, rng)?),
        65..85 => ("rot of a metapage", metapage(disk, &layout, rng)?),
        85..97 => ("rot of the log", log_block(disk, &layout, rng)?),
        _ => ("rot of a superblock", 0), // always the same copy of the two
    };
    let pages = layout.meta_offset..layout.slots_offset;
    // Half of what hits a page hits the few fields that say what it is.
    let head = pages.contains(&offset) && rng.coin();
    // A metapage without its first sector looks like one that was never begun (docs/formats.md).
    spoil(disk, offset, if head { 128 } else { B }, what != "rot of a metapage", rng);
    Some(what)
}

/// Flip a bit, or fill a sector with garbage, or with zeros if it may be `blank`.
fn spoil(disk: &mut Disk, offset: u64, bytes: u64, blank: bool, rng: &mut Rng) {
    let at = offset + rng.below(bytes);
    let sector = at / 512 * 512;
    match rng.below(4) {
        0 => (sector..sector + 512).for_each(|at| disk.rot(at, (rng.next() & 0xff) as u8)),
        1 if blank => (sector..sector + 512).for_each(|at| disk.rot(at, disk.peek(at, 1)[0])),
        _ => disk.rot(at, 1 << rng.below(8)),
    }
}

/// A block of some chunk's data, if its content says whose it is.
fn data_block(disk: &mut Disk, layout: &Layout, rng: &mut Rng) -> Option<u64> {
    for _ in 0..64 {
        let slot = rng.below(u64::from(layout.slot_count)) as u32;
        let offset = layout.block_offset(slot, rng.skewed(0, 31) as u32);
        if let Some(place) = history::place_of(disk.peek(offset, BLOCK)).filter(|_| disk.rests(offset, B)) {
            disk.exposed.block(place);
            return Some(offset);
        }
    }
    None
}

/// The chunks that the copies of a slot's metapage speak of: copyset, chunk, created index.
fn chunks_of(disk: &Disk, layout: &Layout, slot: u32) -> Vec<(u64, u64, u64)> {
    let mut all = Vec::new();
    for copy in 0..2 {
        let page = disk.peek(layout.metapage_offset(slot, copy), BLOCK);
        if &page[..4] == b"CMPG" {
            all.push((number(page, 32) & 0xffff_ffff, number(page, 48), number(page, 56)));
        }
    }
    all
}

/// Note that everything in a slot is doubtful.
fn expose_slot(disk: &mut Disk, layout: &Layout, slot: u32) {
    disk.exposed.slots.insert(slot);
    for (copyset, chunk, _) in chunks_of(disk, layout, slot) {
        disk.exposed.chunk(copyset, chunk);
    }
}

/// Look again whose the harmed slots are: a new chunk's pages go out together, so the harm may have come before its name.
pub(crate) fn name_the_harmed(disk: &mut Disk) {
    let Some(layout) = layout(disk) else { return };
    for slot in disk.exposed.slots.clone() {
        expose_slot(disk, &layout, slot);
    }
}

/// An older block of data verifies if the CRC page written after it is lost as well. That is two faults which agree, and
/// nothing could notice: so one disk loses writes of data or CRC pages, not both.
fn may_harm(disk: &mut Disk, pages: bool) -> bool {
    *disk.exposed.pages.get_or_insert(pages) == pages
}

fn used_slot(disk: &Disk, layout: &Layout, rng: &mut Rng) -> Option<u32> {
    let slots = u64::from(layout.slot_count);
    let first = rng.below(slots);
    let mut all = (0..slots).map(|n| ((first + n) % slots) as u32);
    all.find(|&slot| !chunks_of(disk, layout, slot).is_empty())
}

fn crc_page(disk: &mut Disk, layout: &Layout, rng: &mut Rng) -> Option<u64> {
    let slot = used_slot(disk, layout, rng)?;
    let offset = layout.crcpage_offset(slot, 0, rng.below(2));
    let harm = disk.rests(offset, B) && may_harm(disk, true);
    harm.then(|| expose_slot(disk, layout, slot)).map(|()| offset)
}

/// One copy of a metapage. A life's first one has no second copy until the next round: that is for the unit tests.
fn metapage(disk: &mut Disk, layout: &Layout, rng: &mut Rng) -> Option<u64> {
    let slot = used_slot(disk, layout, rng)?;
    let chunks = chunks_of(disk, layout, slot);
    let offset = layout.metapage_offset(slot, rng.below(2));
    let paired = chunks.len() == 2 && chunks[0] == chunks[1];
    let harm = paired && disk.rests(offset, B);
    harm.then(|| expose_slot(disk, layout, slot)).map(|()| offset)
}

/// A block of a batch that a later header calls durable.
fn log_block(disk: &mut Disk, layout: &Layout, rng: &mut Rng) -> Option<u64> {
    let shard = rng.below(u64::from(layout.shards)) as u16;
    let base = layout.log_offset_of(shard);
    let (mut batches, mut covered, mut live) = (Vec::new(), 0, 0);
    for at in (0..layout.log_bytes_per_shard).step_by(BLOCK) {
        let head = disk.durable(base + at, 128);
        if &head[..8] == b"RAFTLOG1" && number(head, 96) == at {
            let (flags, seq, len) = (head[14], number(head, 40), (&head[72..76]).get_u32_le());
            covered = covered.max(number(head, 48));
            live = live.max(number(head, 56));
            if flags == 0 {
                batches.push((seq, base + at, (u64::from(len) + number(head, 88)) / B));
            }
        }
    }
    batches.retain(|&(seq, offset, blocks)| (live..=covered).contains(&seq) && disk.rests(offset, blocks * B));
    let &(_, offset, blocks) = batches.get(rng.below(batches.len() as u64) as usize)?;
    for copyset in 1..=COPYSETS {
        if shard_of(CopysetId(POOL << 32 | copyset), layout.shards) == shard {
            disk.exposed.copyset(copyset);
        }
    }
    Some(offset + rng.below(blocks) * B)
}

/// Where a write that goes astray lands: other data at rest, whose loss is noted, or nothing at all.
pub(crate) fn stray(disk: &mut Disk, intended: u64, data: &[u8], rng: &mut Rng) -> Option<u64> {
    let layout = layout(disk).filter(|layout| intended >= layout.crc_offset)?;
    let len = data.len() as u64;
    let zone = if intended < layout.slots_offset { layout.crc_offset } else { layout.slots_offset };
    let victim = zone + rng.below((disk.len() - zone - len) / B) * B;
    if victim.abs_diff(intended) < len || !disk.rests(victim, len) || !may_harm(disk, intended < layout.slots_offset) {
        return None;
    }
    let lost: Vec<Place> = data.chunks(BLOCK).filter_map(history::place_of).collect();
    let hit: Vec<Place> = disk.peek(victim, data.len()).chunks(BLOCK).filter_map(history::place_of).collect();
    lost.into_iter().chain(hit).for_each(|place| disk.exposed.block(place));
    for offset in [intended, victim] {
        for at in
            (offset..offset + len).step_by(BLOCK).filter(|at| (layout.crc_offset..layout.slots_offset).contains(at))
        {
            let slot = ((at - layout.crc_offset) / layout.crc_bytes_per_slot()) as u32;
            if slot < layout.slot_count {
                expose_slot(disk, &layout, slot);
            }
        }
    }
    Some(victim)
}
