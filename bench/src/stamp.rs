//! What a verified block looks like: 4 KiB that say who wrote them, as what number, and for which address.
//!
//! Format (little endian): magic u64 | run u64 | seq u64 | pool u32 | copyset u32 | chunk u64 | block u32 | 0 u32 |
//! seed u64 | 0 u32 | CRC32C u32 of the whole block without this field | body derived from seed, seq and address.
//! Two stamps differ in every word, so a block torn between two of them fails the CRC, and a block that ended up at
//! another address says so itself. Which stamps may legally be seen where is `model`'s business.

/// Bytes of a block.
pub const BLOCK: usize = 4096;
/// A block as the stamp functions see it.
pub type Block = [u8; BLOCK];

const MAGIC: u64 = u64::from_le_bytes(*b"BSTAMP01");
const CRC_AT: usize = 60;
const BODY_AT: usize = 64;
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// Where a block lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address {
    /// Logical pool.
    pub pool: u32,
    /// Copyset inside the pool.
    pub copyset: u32,
    /// Chunk id.
    pub chunk: u64,
    /// Block inside the chunk.
    pub block: u32,
}

/// Who wrote a block, and as what number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// The client run.
    pub run: u64,
    /// The write's number inside the run; from 1.
    pub seq: u64,
    /// Seed of the run.
    pub seed: u64,
    /// The block it was written to.
    pub address: Address,
}

/// What a block read back turns out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// All zeros: never written, as far as the block tells.
    Zero,
    /// A whole, valid stamp.
    Stamped(Stamp),
    /// Neither: torn, rotten or not ours.
    Garbage,
}

/// One round of splitmix64: the only source of pseudo-randomness here.
pub const fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(STEP);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

fn checksum(block: &Block) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&block[..CRC_AT]), &block[BODY_AT..])
}

/// Writes `stamp` over the whole block.
pub fn put(stamp: &Stamp, block: &mut Block) {
    let address = &stamp.address;
    block[..BODY_AT].fill(0);
    block[0..8].copy_from_slice(&MAGIC.to_le_bytes());
    block[8..16].copy_from_slice(&stamp.run.to_le_bytes());
    block[16..24].copy_from_slice(&stamp.seq.to_le_bytes());
    block[24..28].copy_from_slice(&address.pool.to_le_bytes());
    block[28..32].copy_from_slice(&address.copyset.to_le_bytes());
    block[32..40].copy_from_slice(&address.chunk.to_le_bytes());
    block[40..44].copy_from_slice(&address.block.to_le_bytes());
    block[48..56].copy_from_slice(&stamp.seed.to_le_bytes());
    // A word sequence that vectorizes: the CRC, not the body, is what proves the block whole.
    let place = mix(address.chunk ^ (u64::from(address.copyset) << 32)) ^ u64::from(address.block);
    let mut word = mix(stamp.seed ^ mix(stamp.seq) ^ place);
    for bytes in block[BODY_AT..].chunks_exact_mut(8) {
        bytes.copy_from_slice(&word.to_le_bytes());
        word = word.wrapping_add(STEP);
    }
    let crc = checksum(block);
    block[CRC_AT..BODY_AT].copy_from_slice(&crc.to_le_bytes());
}

fn u32_at(block: &Block, at: usize) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&block[at..at + 4]);
    u32::from_le_bytes(bytes)
}

fn u64_at(block: &Block, at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&block[at..at + 8]);
    u64::from_le_bytes(bytes)
}

/// Reads a block's stamp.
pub fn get(block: &Block) -> Content {
    if u64_at(block, 0) != MAGIC {
        let zero = block.iter().fold(0, |all, byte| all | byte) == 0;
        return if zero { Content::Zero } else { Content::Garbage };
    }
    if u32_at(block, CRC_AT) != checksum(block) {
        return Content::Garbage;
    }
    let address = Address {
        pool: u32_at(block, 24),
        copyset: u32_at(block, 28),
        chunk: u64_at(block, 32),
        block: u32_at(block, 40),
    };
    Content::Stamped(Stamp { run: u64_at(block, 8), seq: u64_at(block, 16), seed: u64_at(block, 48), address })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp(seq: u64) -> Stamp {
        let address = Address { pool: 1, copyset: 2, chunk: 3, block: 4 };
        Stamp { run: 9, seq, seed: 5, address }
    }

    #[test]
    fn a_stamp_reads_back_and_any_flipped_bit_is_garbage() {
        let mut block = [0; BLOCK];
        assert_eq!(get(&block), Content::Zero);
        put(&stamp(7), &mut block);
        assert_eq!(get(&block), Content::Stamped(stamp(7)));
        for at in [0, 9, 17, 30, 45, 57, 61, 64, 2000, BLOCK - 1] {
            block[at] ^= 4;
            assert_eq!(get(&block), Content::Garbage, "byte {at}");
            block[at] ^= 4;
        }
    }

    #[test]
    fn a_block_torn_at_any_sector_is_garbage() {
        let (mut old, mut new) = ([0; BLOCK], [0; BLOCK]);
        put(&stamp(1), &mut old);
        put(&stamp(2), &mut new);
        for sector in 1..8 {
            let mut torn = old;
            torn[..sector * 512].copy_from_slice(&new[..sector * 512]);
            assert_eq!(get(&torn), Content::Garbage);
        }
    }
}
