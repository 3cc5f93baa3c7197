//! Where a byte of a volume lives: offset -> (copyset, chunk, offset in chunk). Pure arithmetic.
//!
//! Promises: every byte of the volume has exactly one place and no two bytes share one; the place of a byte never
//! changes when the volume grows. An unstriped volume is the case `stripe unit = chunk size, stripe count = 1`, so
//! there is one formula. Chunk id = `volume id << 32 | chunk index`; copyset = `copysets[chunk index % count]`.

use raftlog::{BLOCK, CopysetId};

/// Longest piece of data asked of a chunk at once, bytes. Also the size of a payload buffer of a large write.
pub const EXTENT_BYTES_MAX: u32 = 256 << 10;
/// Smallest unit of every offset and length, bytes.
pub const BLOCK_BYTES: u32 = BLOCK as u32;
/// Curve's segment: a stripe must not be wider than one.
pub const VOLUME_SEGMENT_BYTES: u64 = 1 << 30;
/// Largest volume: offsets must stay valid as signed 64-bit numbers in every client.
pub const VOLUME_BYTES_MAX: u64 = 1 << 62;
/// Most copysets one volume may be spread over.
pub const COPYSETS_MAX: usize = 1 << 16;

/// Why a shape is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// Chunk size.
    #[error("chunk size {0} is not a multiple of 4096 between 4096 and 1 GiB")]
    ChunkSize(u32),
    /// Size.
    #[error("size {0} is not a positive multiple of 4096")]
    Size(u64),
    /// More chunks than a chunk id can number, or more bytes than an offset can.
    #[error("size {0} is too large")]
    TooLarge(u64),
    /// No copysets.
    #[error("a volume needs at least one copyset")]
    NoCopysets,
    /// Too many copysets.
    #[error("{0} copysets are more than {COPYSETS_MAX}")]
    TooManyCopysets(usize),
    /// One of the two stripe parameters without the other.
    #[error("stripe unit {unit} and stripe count {count} must both be given or both be 0")]
    HalfStriped {
        /// Stripe unit.
        unit: u32,
        /// Stripe count.
        count: u32,
    },
    /// Stripe unit.
    #[error("stripe unit {unit} must be a multiple of 4096 that divides the chunk size {chunk_size}")]
    StripeUnit {
        /// Stripe unit.
        unit: u32,
        /// Chunk size.
        chunk_size: u32,
    },
    /// Stripe count.
    #[error("stripe count {count} must divide the chunk size {chunk_size} and a stripe must fit in 1 GiB of chunks")]
    StripeCount {
        /// Stripe count.
        count: u32,
        /// Chunk size.
        chunk_size: u32,
    },
    /// A stripe over one chunk is no stripe.
    #[error("stripe count 1 needs stripe unit = chunk size, not {0}")]
    StripeOfOne(u32),
}

/// The numbers that define a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Bytes of the volume.
    pub size: u64,
    /// Bytes of a chunk.
    pub chunk_size: u32,
    /// Bytes of a stripe unit; 0 = not striped.
    pub stripe_unit: u32,
    /// Chunks side by side; 0 = not striped.
    pub stripe_count: u32,
}

/// A piece of a volume inside one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Copyset of the chunk.
    pub copyset: CopysetId,
    /// Chunk id.
    pub chunk: u64,
    /// Offset in the chunk.
    pub offset: u32,
    /// Bytes.
    pub len: u32,
    /// Offset of the piece in the request it is part of (for whole-chunk ranges: of its first byte).
    pub at: u64,
}

/// A checked [`Shape`] with the copysets it is spread over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Geometry {
    volume: u32,
    shape: Shape,
    /// `shape.stripe_unit`, or the chunk size.
    unit: u64,
    /// `shape.stripe_count`, or 1.
    count: u64,
    copysets: Vec<CopysetId>,
}

impl Geometry {
    /// Check and build.
    ///
    /// # Errors
    /// [`GeometryError`], the rules MDS enforces (curve-client-executor.md §1).
    pub fn new(volume: u32, shape: Shape, copysets: Vec<CopysetId>) -> Result<Self, GeometryError> {
        let (unit, count) = check_stripe(&shape)?;
        if copysets.is_empty() {
            return Err(GeometryError::NoCopysets);
        }
        if copysets.len() > COPYSETS_MAX {
            return Err(GeometryError::TooManyCopysets(copysets.len()));
        }
        let geometry = Self { volume, shape, unit, count, copysets };
        geometry.check_size(shape.size)?;
        Ok(geometry)
    }

    fn check_size(&self, size: u64) -> Result<(), GeometryError> {
        if size == 0 || !size.is_multiple_of(u64::from(BLOCK_BYTES)) {
            return Err(GeometryError::Size(size));
        }
        let chunks = size.div_ceil(self.group_bytes()).checked_mul(self.count);
        if size > VOLUME_BYTES_MAX || chunks.is_none_or(|n| n > 1 << 32) {
            return Err(GeometryError::TooLarge(size));
        }
        Ok(())
    }

    /// The same mapping for another size.
    ///
    /// # Errors
    /// When the size itself is not allowed.
    pub fn resized(&self, size: u64) -> Result<Self, GeometryError> {
        self.check_size(size)?;
        Ok(Self { shape: Shape { size, ..self.shape }, ..self.clone() })
    }

    /// The numbers it was made from.
    #[must_use]
    pub const fn shape(&self) -> &Shape {
        &self.shape
    }
    /// Bytes of the volume.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.shape.size
    }
    /// Copysets, in mapping order.
    #[must_use]
    pub fn copysets(&self) -> &[CopysetId] {
        &self.copysets
    }

    /// Bytes of `count` chunks side by side: the volume repeats with this period.
    const fn group_bytes(&self) -> u64 {
        self.count * self.shape.chunk_size as u64
    }

    fn chunk(&self, index: u64) -> (CopysetId, u64) {
        let copyset = self.copysets[(index % self.copysets.len() as u64) as usize];
        (copyset, (u64::from(self.volume) << 32) | index)
    }

    /// Place of the byte at `offset`: chunk index and offset in the chunk.
    #[must_use]
    pub const fn locate(&self, offset: u64) -> (u64, u64) {
        let stripes_per_chunk = self.shape.chunk_size as u64 / self.unit;
        let block = offset / self.unit;
        let (stripe, position) = (block / self.count, block % self.count);
        let index = (stripe / stripes_per_chunk) * self.count + position;
        (index, (stripe % stripes_per_chunk) * self.unit + offset % self.unit)
    }

    /// Every chunk the volume may have, for deleting it.
    pub fn chunks(&self) -> impl Iterator<Item = (CopysetId, u64)> + '_ {
        let count = self.size().div_ceil(self.group_bytes()) * self.count;
        (0..count).map(|index| self.chunk(index))
    }

    /// The pieces of a range, in order.
    pub fn extents(&self, offset: u64, len: u64) -> impl Iterator<Item = Extent> + '_ {
        let mut cursor = Cursor::data(offset, len);
        std::iter::from_fn(move || cursor.next(self))
    }

    fn data_extent(&self, at: u64, from: u64, end: u64) -> Extent {
        let (index, inner) = self.locate(from);
        let run = self.unit - from % self.unit;
        let len = run.min(end - from).min(u64::from(EXTENT_BYTES_MAX));
        let (copyset, chunk) = self.chunk(index);
        Extent { copyset, chunk, offset: inner as u32, len: len as u32, at }
    }

    /// How many of the first `bytes` bytes of a group are in the chunk at `position`. As the offset grows a chunk is
    /// filled from its start, so a range of the volume is one range in each chunk.
    fn filled(&self, bytes: u64, position: u64) -> u64 {
        let stripe = self.unit * self.count;
        let rest = (bytes % stripe).saturating_sub(position * self.unit).min(self.unit);
        bytes / stripe * self.unit + rest
    }

    fn chunk_range(&self, start: u64, end: u64, group: u64, position: u64) -> Option<Extent> {
        let base = group * self.group_bytes();
        let from = self.filled(start.saturating_sub(base), position);
        let to = self.filled((end - base).min(self.group_bytes()), position);
        let (copyset, chunk) = self.chunk(group * self.count + position);
        let extent = Extent { copyset, chunk, offset: from as u32, len: (to - from) as u32, at: 0 };
        (to > from).then_some(extent)
    }
}

fn check_stripe(shape: &Shape) -> Result<(u64, u64), GeometryError> {
    let Shape { chunk_size, stripe_unit: unit, stripe_count: count, .. } = *shape;
    let whole = |n: u32| n > 0 && n.is_multiple_of(BLOCK_BYTES);
    if !whole(chunk_size) || u64::from(chunk_size) > VOLUME_SEGMENT_BYTES {
        return Err(GeometryError::ChunkSize(chunk_size));
    }
    if unit == 0 && count == 0 {
        return Ok((u64::from(chunk_size), 1));
    }
    if unit == 0 || count == 0 {
        return Err(GeometryError::HalfStriped { unit, count });
    }
    if !whole(unit) || !chunk_size.is_multiple_of(unit) {
        return Err(GeometryError::StripeUnit { unit, chunk_size });
    }
    let width = u64::from(count) * u64::from(chunk_size);
    if !chunk_size.is_multiple_of(count) || width > VOLUME_SEGMENT_BYTES {
        return Err(GeometryError::StripeCount { count, chunk_size });
    }
    if count == 1 && unit != chunk_size {
        return Err(GeometryError::StripeOfOne(unit));
    }
    Ok((u64::from(unit), u64::from(count)))
}

/// A walk over a range. It borrows nothing, so it can live beside the `Arc` of its volume.
#[derive(Clone, Debug)]
pub struct Cursor {
    start: u64,
    end: u64,
    walk: Walk,
}

#[derive(Clone, Debug)]
enum Walk {
    /// Pieces in data order, from this offset on.
    Data(u64),
    /// One range per chunk: group of chunks side by side, and position in it. `None` = not begun.
    Chunks(Option<(u64, u64)>),
}

impl Cursor {
    /// In data order, at most [`EXTENT_BYTES_MAX`] at a time: what reads and writes need.
    #[must_use]
    pub const fn data(offset: u64, len: u64) -> Self {
        Self { start: offset, end: offset + len, walk: Walk::Data(offset) }
    }

    /// One range per chunk however narrow the stripes are: what carries no data (zero) needs.
    #[must_use]
    pub const fn chunks(offset: u64, len: u64) -> Self {
        Self { start: offset, end: offset + len, walk: Walk::Chunks(None) }
    }

    /// The next piece.
    pub fn next(&mut self, geometry: &Geometry) -> Option<Extent> {
        match &mut self.walk {
            Walk::Data(from) => {
                let extent = (*from < self.end).then(|| geometry.data_extent(*from - self.start, *from, self.end))?;
                *from += u64::from(extent.len);
                Some(extent)
            }
            Walk::Chunks(place) => loop {
                let (group, position) = place.unwrap_or((self.start / geometry.group_bytes(), 0));
                if group * geometry.group_bytes() >= self.end {
                    return None;
                }
                let wrap = position + 1 == geometry.count;
                *place = Some(if wrap { (group + 1, 0) } else { (group, position + 1) });
                if let Some(extent) = geometry.chunk_range(self.start, self.end, group, position) {
                    return Some(extent);
                }
            },
        }
    }

    /// Whether nothing is left.
    #[must_use]
    pub fn is_done(&self, geometry: &Geometry) -> bool {
        self.clone().next(geometry).is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const MIB: u64 = 1 << 20;

    fn sets(n: u32) -> Vec<CopysetId> {
        (0..n).map(|i| CopysetId::new(1, 100 + i)).collect()
    }
    fn shape(size: u64, chunk_size: u32, stripe_unit: u32, stripe_count: u32) -> Shape {
        Shape { size, chunk_size, stripe_unit, stripe_count }
    }

    #[test]
    fn unstriped_pieces_end_at_chunks_and_at_the_limit() {
        let g = Geometry::new(7, shape(64 * MIB, 16 << 20, 0, 0), sets(3)).unwrap();
        let all: Vec<_> = g.extents(16 * MIB - 8192, 300 << 10).collect();
        let want = [
            (CopysetId::new(1, 100), 7 << 32, (16 << 20) - 8192, 8192, 0),
            (CopysetId::new(1, 101), 7 << 32 | 1, 0, 256 << 10, 8192),
            (CopysetId::new(1, 101), 7 << 32 | 1, 256 << 10, (44 << 10) - 8192, 8192 + (256 << 10)),
        ];
        let got: Vec<_> = all.iter().map(|e| (e.copyset, e.chunk, e.offset, e.len, e.at)).collect();
        assert_eq!(got, want);
    }

    #[test]
    fn worked_examples_of_the_striping_formula() {
        // U = 64 KiB, N = 4, 16 MiB chunks: S = 256 stripes per chunk.
        let g = Geometry::new(1, shape(1024 * MIB, 16 << 20, 64 << 10, 4), sets(8)).unwrap();
        let k = 1u64 << 10;
        for (offset, index, inner) in [
            (0, 0, 0),
            (64 * k, 1, 0),
            (3 * 64 * k + 5, 3, 5),
            (4 * 64 * k, 0, 64 * k),
            (5 * 64 * k + 4096, 1, 64 * k + 4096),
            (64 * MIB - 1, 3, 16 * MIB - 1),
            (64 * MIB, 4, 0),
            (64 * MIB + 9 * 64 * k, 5, 2 * 64 * k),
        ] {
            assert_eq!(g.locate(offset), (index, inner), "offset {offset}");
        }
        let lens: Vec<_> = g.extents(60 * k, 72 * k).map(|e| (e.chunk as u32, e.offset, e.len)).collect();
        assert_eq!(lens, [(0, 60 << 10, 4 << 10), (1, 0, 64 << 10), (2, 0, 4 << 10)]);
    }

    #[test]
    fn shapes_are_checked() {
        use GeometryError as E;
        let new = |s: Shape| Geometry::new(1, s, sets(2)).map(|_| ());
        let cs = 16 << 20;
        assert_eq!(new(shape(MIB, 1000, 0, 0)), Err(E::ChunkSize(1000)));
        assert_eq!(new(shape(MIB, 0, 0, 0)), Err(E::ChunkSize(0)));
        assert_eq!(new(shape(0, cs, 0, 0)), Err(E::Size(0)));
        assert_eq!(new(shape(MIB + 512, cs, 0, 0)), Err(E::Size(MIB + 512)));
        assert_eq!(new(shape(1 << 63, cs, 0, 0)), Err(E::TooLarge(1 << 63)));
        assert_eq!(new(shape(1 << 61, cs, 0, 0)), Err(E::TooLarge(1 << 61)), "more than 2^32 chunks");
        assert_eq!(new(shape(1 << 56, cs, 0, 0)), Ok(()), "exactly 2^32 chunks");
        assert_eq!(new(shape(MIB, cs, 4096, 0)), Err(E::HalfStriped { unit: 4096, count: 0 }));
        assert_eq!(new(shape(MIB, cs, 0, 2)), Err(E::HalfStriped { unit: 0, count: 2 }));
        assert_eq!(new(shape(MIB, cs, 512, 2)), Err(E::StripeUnit { unit: 512, chunk_size: cs }));
        assert_eq!(new(shape(MIB, cs, 12288, 2)), Err(E::StripeUnit { unit: 12288, chunk_size: cs }));
        assert_eq!(new(shape(MIB, cs, 2 * cs, 2)), Err(E::StripeUnit { unit: 2 * cs, chunk_size: cs }));
        assert_eq!(new(shape(MIB, cs, 4096, 3)), Err(E::StripeCount { count: 3, chunk_size: cs }));
        assert_eq!(new(shape(MIB, cs, 4096, 128)), Err(E::StripeCount { count: 128, chunk_size: cs }));
        assert_eq!(new(shape(MIB, cs, 4096, 1)), Err(E::StripeOfOne(4096)));
        assert_eq!(new(shape(MIB, cs, cs, 1)), Ok(()));
        assert_eq!(new(shape(MIB, cs, 4096, 64)), Ok(()));
        assert_eq!(Geometry::new(1, shape(MIB, cs, 0, 0), vec![]).err(), Some(E::NoCopysets));
    }

    fn any_shape() -> impl Strategy<Value = Shape> {
        (1u64..200, 0usize..7).prop_map(|(blocks, kind)| {
            let (chunk_size, unit, count) = [
                (16384, 0, 0),
                (4096, 0, 0),
                (16384, 4096, 4),
                (16384, 8192, 2),
                (8192, 4096, 8),
                (16384, 16384, 4),
                (16384, 16384, 1),
            ][kind];
            shape(blocks * 4096, chunk_size, unit, count)
        })
    }

    proptest! {
        #[test]
        fn every_block_has_one_place_and_no_two_share_one(shape in any_shape(), sets_n in 1u32..5) {
            let g = Geometry::new(3, shape, sets(sets_n)).unwrap();
            let mut seen = BTreeMap::new();
            for offset in (0..shape.size).step_by(4096) {
                let (index, inner) = g.locate(offset);
                prop_assert!(inner + 4096 <= u64::from(shape.chunk_size));
                prop_assert!(seen.insert((index, inner), offset).is_none());
                prop_assert_eq!(g.locate(offset + 4095), (index, inner + 4095));
                let bigger = g.resized(shape.size * 3).unwrap();
                prop_assert_eq!(bigger.locate(offset), (index, inner));
            }
            let chunks: BTreeMap<u64, CopysetId> = g.chunks().map(|(set, chunk)| (chunk, set)).collect();
            for (index, _) in seen.keys() {
                let set = g.copysets()[(*index % u64::from(sets_n)) as usize];
                prop_assert_eq!(chunks.get(&(3 << 32 | index)), Some(&set));
            }
        }

        #[test]
        fn both_walks_cover_a_range_exactly(shape in any_shape(), a in 0u64..200, b in 1u64..200) {
            let g = Geometry::new(3, shape, sets(3)).unwrap();
            let start = a * 4096 % shape.size;
            let len = (b * 4096).min(shape.size - start);
            let mut want = BTreeMap::new();
            for offset in (start..start + len).step_by(4096) {
                let (index, inner) = g.locate(offset);
                want.insert((3 << 32 | index, inner as u32), offset - start);
            }
            let (mut data, mut at) = (BTreeMap::new(), 0);
            for e in g.extents(start, len) {
                prop_assert_eq!(e.at, at);
                at += u64::from(e.len);
                for i in (0..e.len).step_by(4096) {
                    prop_assert!(data.insert((e.chunk, e.offset + i), e.at + u64::from(i)).is_none());
                }
            }
            prop_assert_eq!(&data, &want);
            let mut cursor = Cursor::chunks(start, len);
            let mut last = None;
            while let Some(e) = cursor.next(&g) {
                prop_assert!(last < Some(e.chunk), "one range per chunk");
                last = Some(e.chunk);
                for i in (0..e.len).step_by(4096) {
                    prop_assert!(want.remove(&(e.chunk, e.offset + i)).is_some());
                }
            }
            prop_assert!(want.is_empty() && cursor.is_done(&g));
        }
    }
}
