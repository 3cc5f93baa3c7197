//! The server's side of the negotiation; used through [`super::negotiation`].

use bytes::{BufMut, BytesMut};

use super::{
    BLOCK_SIZE, FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, IHAVEOPT, MAX_OPTION, MAX_PAYLOAD, MAX_STRING, NBDMAGIC,
    OPTION_REPLY_MAGIC, info, option, reply,
};

/// The server's first bytes.
pub fn greeting() -> [u8; 18] {
    let mut bytes = [0; 18];
    let mut place = &mut bytes[..];
    place.put_slice(&NBDMAGIC);
    place.put_slice(&IHAVEOPT);
    place.put_u16(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
    bytes
}

/// An acknowledgement: the last reply to an option.
pub fn put_ack(out: &mut BytesMut, option: u32) {
    put_reply(out, option, reply::ACK, &[]);
}

/// An error reply; `text` is for people.
pub fn put_error(out: &mut BytesMut, option: u32, error: u32, text: &str) {
    let text = text.get(..text.floor_char_boundary(MAX_STRING)).unwrap_or_default();
    put_reply(out, option, error, &[text.as_bytes()]);
}

/// One export in the answer to LIST.
pub fn put_list_entry(out: &mut BytesMut, name: &str) {
    put_reply(out, option::LIST, reply::SERVER, &[&(name.len() as u32).to_be_bytes(), name.as_bytes()]);
}

/// Size and flags of an export, for INFO and GO.
pub fn put_info_export(out: &mut BytesMut, option: u32, size: u64, flags: u16) {
    let parts = [&info::EXPORT.to_be_bytes()[..], &size.to_be_bytes(), &flags.to_be_bytes()];
    put_reply(out, option, reply::INFO, &parts);
}

/// Block sizes, for INFO and GO: [`BLOCK_SIZE`] as minimum and preference, [`MAX_PAYLOAD`] at most.
pub fn put_info_block_size(out: &mut BytesMut, option: u32) {
    let (kind, block, most) = (info::BLOCK_SIZE.to_be_bytes(), BLOCK_SIZE.to_be_bytes(), MAX_PAYLOAD.to_be_bytes());
    put_reply(out, option, reply::INFO, &[&kind, &block, &block, &most]);
}

/// The export's canonical name, for INFO and GO.
pub fn put_info_name(out: &mut BytesMut, option: u32, name: &str) {
    put_reply(out, option, reply::INFO, &[&info::NAME.to_be_bytes(), name.as_bytes()]);
}

/// The answer to EXPORT_NAME, after which requests follow.
pub fn put_export(out: &mut BytesMut, size: u64, flags: u16, no_zeroes: bool) {
    out.put_u64(size);
    out.put_u16(flags);
    if !no_zeroes {
        out.put_bytes(0, 124);
    }
}

fn put_reply(out: &mut BytesMut, option: u32, kind: u32, parts: &[&[u8]]) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    assert!(length <= MAX_OPTION, "an option reply of {length} bytes");
    out.put_u64(OPTION_REPLY_MAGIC);
    out.put_u32(option);
    out.put_u32(kind);
    out.put_u32(length as u32);
    for part in parts {
        out.put_slice(part);
    }
}
