//! Frames of a second implementation (`scripts/golden-frames`, written from the wire contract's tables): they decode to
//! the values it meant, re-encode to its bytes, and what it calls required is refused when missing.

mod common;

use std::{collections::BTreeSet, fs};

use bytes::{Bytes, BytesMut};
use common::{frames, path, unhex, with_message};
use proto::{
    BodyError, Checked, code,
    frame::{RequestHead, put_error, put_request, put_response},
    heartbeat,
    service::SERVICES,
};

struct Golden {
    request: bool,
    message: String,
    service: String,
    method: String,
    log_id: Option<i64>,
    correlation_id: i64,
    attachment: Vec<u8>,
    required: Vec<u32>,
    frame: Vec<u8>,
    printed: String,
}

fn golden() -> Vec<Golden> {
    let mut all = Vec::new();
    for entry in fs::read_dir(path("golden")).expect("the folder") {
        let file = entry.expect("an entry").path();
        if file.extension().is_some_and(|extension| extension == "hex") {
            all.extend(fs::read_to_string(file).expect("text").lines().map(parse));
        }
    }
    all
}

fn parse(line: &str) -> Golden {
    let fields: Vec<&str> = line.split('\t').collect();
    let [side, message, service, method, log_id, correlation_id, attachment, required, frame, printed] = fields[..]
    else {
        panic!("not ten fields: {line}")
    };
    Golden {
        request: side == "request",
        message: message.into(),
        service: service.into(),
        method: method.into(),
        log_id: log_id.parse().ok(),
        correlation_id: correlation_id.parse().expect("a number"),
        attachment: if attachment == "-" { Vec::new() } else { unhex(attachment) },
        required: if required == "-" {
            Vec::new()
        } else {
            required.split(',').map(|n| n.parse().unwrap_or(0)).collect()
        },
        frame: unhex(frame),
        printed: printed.into(),
    }
}

/// The message without this field; walks the few wire types of the schema.
fn without(body: &[u8], number: u64) -> Bytes {
    let mut kept = Vec::new();
    let mut rest = body;
    while !rest.is_empty() {
        let start = rest;
        let key = prost::encoding::decode_varint(&mut rest).expect("a key");
        let value = prost::encoding::decode_varint(&mut rest).expect("a value or a length");
        if key & 7 == 2 {
            rest = &rest[usize::try_from(value).expect("a length")..];
        }
        if key >> 3 != number {
            kept.extend_from_slice(&start[..start.len() - rest.len()]);
        }
    }
    kept.into()
}

#[test]
fn golden_frames_decode_to_their_values_and_re_encode_to_their_bytes() {
    for case in golden() {
        let [(meta, body, attachment)] = &frames(&case.frame, &[5, 1, 64])[..] else { panic!("not one frame") };
        assert_eq!(meta.correlation_id, case.correlation_id);
        assert_eq!(*attachment, case.attachment);
        if case.request {
            assert_eq!(meta.names(), (case.service.as_bytes(), case.method.as_bytes()));
            assert_eq!(meta.request.as_ref().unwrap().log_id, case.log_id);
            assert_eq!(meta.response, None);
        } else {
            assert_eq!(meta.response, Some(Default::default()));
            assert_eq!(meta.request, None);
        }
        let mut out = BytesMut::new();
        let (service, method, correlation_id) = (&case.service[..], &case.method[..], case.correlation_id);
        with_message!(case.message, Message => {
            let message: Message = proto::decode(body.clone()).unwrap();
            assert_eq!(format!("{message:?}").replace("r#", ""), case.printed);
            if case.request {
                let head = RequestHead { service, method, log_id: case.log_id, correlation_id };
                put_request(&mut out, &head, &message, attachment.len());
            } else {
                put_response(&mut out, correlation_id, &message, attachment.len());
            }
        });
        out.extend_from_slice(attachment);
        assert_eq!(out, case.frame, "{}", case.printed);
    }
}

#[test]
fn what_the_contract_requires_is_required_and_nothing_else() {
    for case in golden() {
        let (_, body, _) = &frames(&case.frame, &[])[0];
        with_message!(case.message, Message => {
            let shape = <Message as Checked>::SHAPE;
            for number in 1..32 {
                let got = proto::decode::<Message>(without(body, u64::from(number))).err();
                let required = case.required.contains(&number);
                let want = required.then_some(BodyError::Missing { message: shape.name, number });
                assert_eq!(got, want, "{} without {number}", case.printed);
            }
        });
    }
}

#[test]
fn every_method_of_the_schema_has_golden_frames() {
    let have: BTreeSet<_> =
        golden().into_iter().map(|case| (case.service, case.method, case.request, case.message)).collect();
    let mut want = BTreeSet::new();
    for service in SERVICES {
        for method in service.methods {
            for (request, shape) in [(true, method.request), (false, method.response)] {
                want.insert((service.name.to_owned(), method.name.to_owned(), request, shape.name.to_owned()));
            }
        }
    }
    assert_eq!(have, want);
}

#[test]
fn error_replies_are_what_the_second_implementation_writes() {
    for line in fs::read_to_string(path("golden/errors.txt")).unwrap().lines() {
        let [correlation_id, code, text, frame] = line.split('\t').collect::<Vec<_>>()[..] else { panic!("{line}") };
        let (correlation_id, code) = (correlation_id.parse().unwrap(), code.parse().unwrap());
        let mut out = BytesMut::new();
        put_error(&mut out, correlation_id, code, text);
        assert_eq!(out, unhex(frame));
        let [(meta, body, attachment)] = &frames(&out, &[3])[..] else { panic!("not one frame") };
        assert_eq!((meta.correlation_id, meta.error_code()), (correlation_id, code));
        assert_eq!(meta.response.as_ref().unwrap().error_text, text);
        assert!(body.is_empty() && attachment.is_empty());
    }
}

#[test]
fn enums_have_the_values_of_the_contract() {
    fn show<E: TryFrom<i32> + std::fmt::Debug>(number: i32) -> Option<String> {
        E::try_from(number).ok().map(|value| format!("{value:?}"))
    }
    let shown = |name: &str, number| match name {
        "curve.chunkserver.CHUNK_OP_TYPE" => show::<code::ChunkOpType>(number),
        "curve.chunkserver.CHUNK_OP_STATUS" => show::<code::ChunkOpStatus>(number),
        "curve.chunkserver.COPYSET_OP_STATUS" => show::<code::CopysetOpStatus>(number),
        "curve.mds.heartbeat.ConfigChangeType" => show::<heartbeat::ConfigChangeType>(number),
        "curve.mds.heartbeat.HeartbeatStatusCode" => show::<heartbeat::HeartbeatStatusCode>(number),
        "nebd.client.RetCode" => show::<code::RetCode>(number),
        other => panic!("unknown enum {other}"),
    };
    let text = fs::read_to_string(path("golden/enums.txt")).unwrap();
    let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split('\t').collect()).collect();
    for number in -3..40 {
        for name in lines.iter().map(|line| line[0]) {
            let want = lines.iter().find(|line| line[0] == name && line[1] == number.to_string());
            assert_eq!(shown(name, number).as_deref(), want.map(|line| line[2]), "{name} {number}");
        }
    }
}
