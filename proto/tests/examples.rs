//! The worked examples of the wire contract, byte for byte, both ways.

mod common;

use bytes::BytesMut;
use common::{frames, unhex};
use proto::{
    code,
    frame::{RequestHead, put_error, put_request, put_response},
    nebd,
};

const SERVICE: &str = "nebd.client.NebdFileService";

fn head(method: &str, log_id: i64, correlation_id: i64) -> RequestHead<'_> {
    RequestHead { service: SERVICE, method, log_id: Some(log_id), correlation_id }
}

#[test]
fn open_file() {
    let bytes = unhex(
        "50 52 50 43 00 00 00 48 00 00 00 33 0a 29 0a 1b 6e 65 62 64 2e 63 6c 69 65 6e 74 2e 4e 65 62 64
         46 69 6c 65 53 65 72 76 69 63 65 12 08 4f 70 65 6e 46 69 6c 65 18 01 18 00 20 82 80 80 80 10 0a
         0f 63 62 64 3a 70 6f 6f 6c 2f 2f 76 31 5f 75 5f 12 02 08 01",
    );
    let flags = Some(nebd::ProtoOpenFlags { exclusive: true });
    let message = nebd::OpenFileRequest { file_name: "cbd:pool//v1_u_".into(), flags };
    let mut out = BytesMut::new();
    put_request(&mut out, &head("OpenFile", 1, 0x1_0000_0002), &message, 0);
    assert_eq!(out, bytes);
    let [(meta, body, _)] = &frames(&bytes, &[7])[..] else { panic!("not one frame") };
    assert_eq!(meta.names(), (SERVICE.as_bytes(), &b"OpenFile"[..]));
    assert_eq!(meta.correlation_id, 0x1_0000_0002);
    assert_eq!(proto::decode::<nebd::OpenFileRequest>(body.clone()), Ok(message));
}

#[test]
fn open_file_response() {
    let bytes = unhex("50 52 50 43 00 00 00 10 00 00 00 0c 12 02 08 00 18 00 20 82 80 80 80 10 08 00 18 01");
    let message = nebd::OpenFileResponse { ret_code: code::RetCode::KOk as i32, ret_msg: None, fd: Some(1) };
    let mut out = BytesMut::new();
    put_response(&mut out, 0x1_0000_0002, &message, 0);
    assert_eq!(out, bytes);
    // The same reply of a newer brpc has three more fields in its meta.
    let newer =
        unhex("50 52 50 43 00 00 00 16 00 00 00 12 12 02 08 00 18 00 20 82 80 80 80 10 50 00 58 00 62 00 08 00 18 01");
    assert_eq!(frames(&newer, &[1]), frames(&bytes, &[]));
    // And a minimal one has neither error_code nor compress_type.
    let minimal = unhex("50 52 50 43 00 00 00 0c 00 00 00 08 12 00 20 82 80 80 80 10 08 00 18 01");
    assert_eq!(frames(&minimal, &[1]), frames(&bytes, &[]));
}

#[test]
fn write_with_attachment() {
    let bytes = unhex(
        "50 52 50 43 00 00 00 41 00 00 00 32 0a 26 0a 1b 6e 65 62 64 2e 63 6c 69 65 6e 74 2e 4e 65 62 64
         46 69 6c 65 53 65 72 76 69 63 65 12 05 57 72 69 74 65 18 02 18 00 20 82 82 80 80 10 28 08 08 01
         10 80 20 18 08 41 42 43 44 45 46 47 48",
    );
    let message = nebd::WriteRequest { fd: 1, offset: 4096, size: 8 };
    let mut out = BytesMut::new();
    put_request(&mut out, &head("Write", 2, 0x1_0000_0102), &message, 8);
    out.extend_from_slice(b"ABCDEFGH");
    assert_eq!(out, bytes);
    let [(_, body, attachment)] = &frames(&bytes, &[1])[..] else { panic!("not one frame") };
    assert_eq!(proto::decode::<nebd::WriteRequest>(body.clone()), Ok(message));
    assert_eq!(attachment, b"ABCDEFGH");
}

#[test]
fn write_response_with_a_negative_code() {
    let bytes = unhex(
        "50 52 50 43 00 00 00 17 00 00 00 0c 12 02 08 00 18 00 20 82 82 80 80 10 08 ff ff ff ff ff ff ff
         ff ff 01",
    );
    let message = nebd::WriteResponse { ret_code: code::RetCode::KNoOk as i32, ret_msg: None };
    let mut out = BytesMut::new();
    put_response(&mut out, 0x1_0000_0102, &message, 0);
    assert_eq!(out, bytes);
    let (_, body, _) = &frames(&bytes, &[])[0];
    assert_eq!(proto::decode::<nebd::WriteResponse>(body.clone()), Ok(message));
}

#[test]
fn read_response_with_attachment() {
    let bytes = unhex("50 52 50 43 00 00 00 10 00 00 00 0a 12 02 08 00 18 00 20 05 28 04 08 00 01 02 03 04");
    let message = nebd::ReadResponse { ret_code: code::RetCode::KOk as i32, ret_msg: None };
    let mut out = BytesMut::new();
    put_response(&mut out, 5, &message, 4);
    out.extend_from_slice(&[1, 2, 3, 4]);
    assert_eq!(out, bytes);
    assert_eq!(frames(&bytes, &[2])[0].2, [1, 2, 3, 4]);
}

#[test]
fn unknown_method() {
    let text = "[E1002]Fail to find method=nebd.client.NebdFileService/Foo";
    let mut bytes = unhex("50 52 50 43 00 00 00 45 00 00 00 45 12 3f 08 ea 07 12 3a");
    bytes.extend_from_slice(text.as_bytes());
    bytes.extend_from_slice(&[0x18, 0, 0x20, 7]);
    let mut out = BytesMut::new();
    put_error(&mut out, 7, code::ENOMETHOD, text);
    assert_eq!(out, bytes);
}

#[test]
fn a_heartbeat_and_an_open_with_and_without_flags() {
    let body = unhex("08 d2 09 12 05 32 2e 37 2e 30 1a 13 08 01 12 0f 63 62 64 3a 70 6f 6f 6c 2f 2f 76 31 5f 75 5f");
    let info = vec![nebd::HeartbeatFileInfo { fd: 1, name: "cbd:pool//v1_u_".into() }];
    let message = nebd::HeartbeatRequest { pid: 1234, nebd_version: "2.7.0".into(), info };
    assert_eq!(prost::Message::encode_to_vec(&message), body);
    assert_eq!(proto::decode(body.into()), Ok(message));
    // Absent flags and flags that say `exclusive` are not the same to a server.
    let open = |bytes: &'static [u8]| proto::decode::<nebd::OpenFileRequest>(bytes.into()).unwrap().flags;
    assert_eq!(open(b"\x0a\x01v"), None);
    assert_eq!(open(b"\x0a\x01v\x12\x02\x08\x01"), Some(nebd::ProtoOpenFlags { exclusive: true }));
}
