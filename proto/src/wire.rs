//! Protobuf's wire format at its lowest level: varints, keys, lengths, skipping.
//!
//! Promise: no read past the slice it was given, no allocation, no recursion deeper than [`MAX_DEPTH`], whatever the
//! bytes are. `meta.rs` and `required.rs` stand on it; message bodies are decoded by prost.

/// Nesting (messages or groups) beyond this is refused.
pub(crate) const MAX_DEPTH: u32 = 16;

/// Wire types of protobuf; 6 and 7 do not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WireType {
    Varint,
    Fixed64,
    Bytes,
    GroupStart,
    GroupEnd,
    Fixed32,
}

/// The bytes are not a protobuf message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("bytes that are not a protobuf message")]
pub struct NotProtobuf;

/// Reads a slice from front to back.
#[derive(Clone, Copy)]
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    pub(crate) fn varint(&mut self) -> Result<u64, NotProtobuf> {
        let mut value = 0u64;
        for (index, &byte) in self.rest.iter().take(10).enumerate() {
            // The tenth byte has room for one bit only.
            if index == 9 && byte > 1 {
                return Err(NotProtobuf);
            }
            value |= u64::from(byte & 0x7f) << (7 * index);
            if byte < 0x80 {
                self.take(index + 1)?;
                return Ok(value);
            }
        }
        Err(NotProtobuf)
    }

    /// A field's number and wire type.
    pub(crate) fn key(&mut self) -> Result<(u32, WireType), NotProtobuf> {
        let key = u32::try_from(self.varint()?).map_err(|_| NotProtobuf)?;
        let wire = match key & 7 {
            0 => WireType::Varint,
            1 => WireType::Fixed64,
            2 => WireType::Bytes,
            3 => WireType::GroupStart,
            4 => WireType::GroupEnd,
            5 => WireType::Fixed32,
            _ => return Err(NotProtobuf),
        };
        if key >> 3 == 0 { Err(NotProtobuf) } else { Ok((key >> 3, wire)) }
    }

    pub(crate) fn take(&mut self, count: usize) -> Result<&'a [u8], NotProtobuf> {
        let (head, rest) = self.rest.split_at_checked(count).ok_or(NotProtobuf)?;
        self.rest = rest;
        Ok(head)
    }

    /// The content of a length-delimited field.
    pub(crate) fn bytes(&mut self) -> Result<&'a [u8], NotProtobuf> {
        let length = usize::try_from(self.varint()?).map_err(|_| NotProtobuf)?;
        self.take(length)
    }

    /// Passes over the value of a field nobody asked for.
    pub(crate) fn skip(&mut self, number: u32, wire: WireType, depth: u32) -> Result<(), NotProtobuf> {
        match wire {
            WireType::Varint => self.varint().map(drop),
            WireType::Fixed64 => self.take(8).map(drop),
            WireType::Fixed32 => self.take(4).map(drop),
            WireType::Bytes => self.bytes().map(drop),
            WireType::GroupStart if depth < MAX_DEPTH => loop {
                match self.key()? {
                    (end, WireType::GroupEnd) if end == number => return Ok(()),
                    (inner, wire) => self.skip(inner, wire, depth + 1)?,
                }
            },
            WireType::GroupStart | WireType::GroupEnd => Err(NotProtobuf),
        }
    }
}

/// How many bytes `value` takes as a varint.
pub(crate) fn varint_len(value: u64) -> usize {
    // 1 byte per started 7 bits; zero takes one.
    (64 - (value | 1).leading_zeros() as usize).div_ceil(7)
}

/// Appends `value` as a varint.
pub(crate) fn put_varint(out: &mut impl bytes::BufMut, mut value: u64) {
    while value >= 0x80 {
        out.put_u8(value as u8 | 0x80);
        value >>= 7;
    }
    out.put_u8(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn varints_round_trip_and_their_length_is_known() {
        for shift in 0..64 {
            for value in [(1u64 << shift) - 1, 1 << shift, (1 << shift) + 1, u64::MAX] {
                let mut out = Vec::new();
                put_varint(&mut out, value);
                assert_eq!(out.len(), varint_len(value), "{value}");
                let mut reader = Reader::new(&out);
                assert_eq!(reader.varint(), Ok(value));
                assert!(reader.is_empty());
                assert_eq!(Reader::new(&out[..out.len() - 1]).varint(), Err(NotProtobuf));
            }
        }
    }

    #[test]
    fn a_varint_of_eleven_bytes_or_more_than_64_bits_is_refused() {
        assert_eq!(Reader::new(&[0xff; 11]).varint(), Err(NotProtobuf));
        assert_eq!(Reader::new(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2]).varint(), Err(NotProtobuf));
        assert_eq!(Reader::new(&[]).varint(), Err(NotProtobuf));
    }

    #[test]
    fn groups_are_skipped_to_their_own_end_and_not_deeper_than_allowed() {
        // group 1 { group 2 { } field 3 = 5 } and one byte behind it
        let bytes = [0x0b, 0x13, 0x14, 0x18, 0x05, 0x0c, 0x77];
        let mut reader = Reader::new(&bytes);
        let (number, wire) = reader.key().unwrap();
        reader.skip(number, wire, 0).unwrap();
        assert_eq!(reader.rest, [0x77]);
        // wrong end, no end, bottomless
        for bytes in [&[0x0b, 0x14][..], &[0x0b], &[0x0b; 10_000]] {
            let mut reader = Reader::new(bytes);
            let (number, wire) = reader.key().unwrap();
            assert_eq!(reader.skip(number, wire, 0), Err(NotProtobuf));
        }
    }
}
