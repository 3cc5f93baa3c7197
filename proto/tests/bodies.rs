//! Message bodies from hostile peers: what proto2 refuses is refused, nothing panics.

mod common;

use bytes::Bytes;
use common::with_message;
use proptest::{collection::vec, prelude::*};
use prost::Message as _;
use proto::{BodyError, chunkserver, code, decode, heartbeat, required, service::SERVICES};

fn request() -> chunkserver::ChunkRequest {
    chunkserver::ChunkRequest {
        op_type: code::ChunkOpType::ChunkOpWrite as i32,
        logic_pool_id: 1,
        copyset_id: 701,
        chunk_id: 5,
        offset: Some(4096),
        size: Some(8192),
        ..Default::default()
    }
}

fn read(bytes: &[u8]) -> Result<chunkserver::ChunkRequest, BodyError> {
    decode(Bytes::copy_from_slice(bytes))
}

#[test]
fn closed_enums_are_closed() {
    const NAME: &str = "curve.chunkserver.ChunkRequest";
    for value in [-1, 10, i32::MAX, i32::MIN] {
        let bytes = chunkserver::ChunkRequest { op_type: value, ..request() }.encode_to_vec();
        assert_eq!(read(&bytes), Err(BodyError::BadEnum { message: NAME, number: 1, value: value.into() }));
    }
    // More than 32 bits are not cut down to something valid.
    let mut bytes = vec![0x08, 0x81, 0x80, 0x80, 0x80, 0x10];
    bytes.extend(request().encode_to_vec());
    assert_eq!(read(&bytes), Err(BodyError::BadEnum { message: NAME, number: 1, value: (1 << 32) + 1 }));
    // An optional one too: prost would take an unknown order for TRANSFER_LEADER.
    let order = heartbeat::CopySetConf { r#type: Some(99), ..Default::default() };
    let answer = heartbeat::ChunkServerHeartbeatResponse { need_update_copysets: vec![order], status_code: None };
    let got = decode::<heartbeat::ChunkServerHeartbeatResponse>(answer.encode_to_vec().into());
    let message = "curve.mds.heartbeat.CopySetConf";
    assert_eq!(got, Err(BodyError::BadEnum { message, number: 5, value: 99 }));
}

#[test]
fn what_is_missing_inside_is_missing() {
    let nested = chunkserver::FollowScanMapRequest::default().encode_to_vec();
    // scanMap is there but empty.
    assert_eq!(nested, [0x0a, 14, 8, 0, 16, 0, 24, 0, 32, 0, 40, 0, 48, 0, 56, 0]);
    let got = decode::<chunkserver::FollowScanMapRequest>(Bytes::from_static(&[0x0a, 0]));
    assert_eq!(got, Err(BodyError::Missing { message: "curve.chunkserver.ScanMap", number: 1 }));
}

#[test]
fn unknown_fields_of_any_kind_are_ignored() {
    let mut bytes = request().encode_to_vec();
    // 100: varint, 101: 64 bit, 102: bytes, 103: a group with a field, 104: 32 bit
    bytes.extend([0xa0, 0x06, 0x05]);
    bytes.extend([0xa9, 0x06, 1, 2, 3, 4, 5, 6, 7, 8]);
    bytes.extend([0xb2, 0x06, 2, 9, 9]);
    bytes.extend([0xbb, 0x06, 0x08, 0x01, 0xbc, 0x06]);
    bytes.extend([0xc5, 0x06, 1, 2, 3, 4]);
    assert_eq!(read(&bytes), Ok(request()));
}

#[test]
fn malformed_bodies() {
    let good = request().encode_to_vec();
    for bad in [
        &[0xff][..],             // half a key
        &[0x07, 0],              // wire type 7
        &[0x00, 0],              // field 0
        &[0x5a, 5, b'x'],        // a string longer than the message
        &[0x5a, 1, 0xff],        // not UTF-8
        &[0x08, 0xff],           // half a varint
        &[0x0c],                 // a group ends that never began
        &[0x30 | 2, 2, 1, 1],    // offset as bytes
        &[0x30 | 5, 0, 0, 0, 0], // offset as 32 bits
        &[0x40, 1],              // deltaRho as a number
    ] {
        assert_eq!(read(&[&good[..], bad].concat()), Err(BodyError::Malformed), "{bad:?}");
    }
    assert_eq!(read(&good), Ok(request()));
    // The last of several values counts.
    assert_eq!(read(&[&good[..], &[0x30, 7]].concat()).map(|r| r.offset), Ok(Some(7)));
    // Lists of numbers may be packed.
    let packed = decode::<chunkserver::GetChunkInfoResponse>(Bytes::from_static(&[8, 0, 0x1a, 2, 5, 6]));
    assert_eq!(packed.map(|info| info.chunk_sn), Ok(vec![5, 6]));
    // A single one may not: the check does not know, prost does.
    let single = decode::<chunkserver::ChunkServerStatusResponse>(Bytes::from_static(&[0x0a, 1, 1]));
    assert_eq!(single.map(|_| ()), Err(BodyError::Malformed));
}

#[test]
fn short_names_are_unique_and_both_forms_find_their_service() {
    let offered: Vec<_> = SERVICES.iter().collect();
    for service in SERVICES {
        assert_eq!(SERVICES.iter().filter(|other| other.is_named(service.short.as_bytes())).count(), 1);
        for method in service.methods {
            for name in [service.name, service.short] {
                let (found, called) =
                    proto::service::find(&offered, name.as_bytes(), method.name.as_bytes()).expect("known");
                assert_eq!((found.name, called.name), (service.name, method.name));
            }
        }
    }
    let find = |service: &[u8], method: &[u8]| proto::service::find(&offered, service, method).map(|_| ());
    assert_eq!(find(b"", b""), Err(code::ENOSERVICE));
    assert_eq!(find(b"NoSuchService", b"ReadChunk"), Err(code::ENOSERVICE));
    assert_eq!(find(b"no.such.Service", b"ReadChunk"), Err(code::ENOMETHOD));
    assert_eq!(find(b"ChunkService", b"readchunk"), Err(code::ENOMETHOD));
    assert_eq!(find(b"chunkservice", b"ReadChunk"), Err(code::ENOSERVICE));
    assert_eq!(proto::service::find(&[], b"ChunkService", b"ReadChunk").map(|_| ()), Err(code::ENOSERVICE));
}

proptest! {
    #[test]
    fn arbitrary_bodies_never_panic_and_prost_reads_what_passes(bytes in vec(any::<u8>(), 0..64), flip in any::<(u8, u8)>()) {
        let mut near = request().encode_to_vec();
        let at = usize::from(flip.0) % near.len();
        near[at] = flip.1;
        for body in [bytes, near] {
            for service in SERVICES {
                for method in service.methods {
                    for shape in [method.request, method.response] {
                        let passed = required::check(shape, &body).is_ok();
                        with_message!(shape.name, Message => {
                            let decoded = Message::decode(&body[..]);
                            // What is prost's to refuse: texts that are not UTF-8, single numbers packed as a list.
                            let error = decoded.as_ref().err().map(ToString::to_string).unwrap_or_default();
                            let own = error.contains("UTF-8") || error.contains("wire type");
                            prop_assert!(!passed || decoded.is_ok() || own, "{}: {decoded:?}", shape.name);
                        });
                    }
                }
            }
        }
    }
}
