//! Bytes recorded from the C++ originals: every frame decodes in any split, every body decodes, and what our encoders
//! make of the decoded values is the recorded bytes.

mod common;

use std::{collections::BTreeMap, fs};

use bytes::{Bytes, BytesMut};
use common::{frames, path, unhex, with_message};
use proto::{
    code,
    frame::{RequestHead, put_error, put_request, put_response},
    meta::RpcMeta,
    service::{self, SERVICES, Service},
};

type Frame = (RpcMeta, Bytes, Vec<u8>);

/// Lengths of an arbitrary split, mostly short ones.
fn random_pieces(seed: u64) -> Vec<usize> {
    let mut state = seed;
    let mut next = move || {
        // An MMIX generator; its upper bits are good enough.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as usize
    };
    (0..997).map(|_| 1 + next() % if next() % 4 == 0 { 9000 } else { 30 }).collect()
}

/// Decodes in several splits, with the same result.
fn decode(stream: &[u8]) -> Vec<Frame> {
    let whole = frames(stream, &[]);
    for pieces in [vec![1], vec![7], random_pieces(1), random_pieces(2), random_pieces(3)] {
        assert!(frames(stream, &pieces) == whole, "another split, other frames");
    }
    whole
}

fn find(meta: &RpcMeta) -> Option<(&'static Service, &'static service::Method)> {
    let offered: Vec<&Service> = SERVICES.iter().collect();
    let (service, method) = meta.names();
    service::find(&offered, service, method).ok()
}

/// Our bytes for this request, and the method it names.
fn encode_request((meta, body, attachment): &Frame) -> (Vec<u8>, &'static service::Method) {
    let (service, method) = find(meta).expect("a known method");
    let mut out = BytesMut::new();
    let log_id = meta.request.as_ref().and_then(|request| request.log_id);
    let head = RequestHead { service: service.name, method: method.name, log_id, correlation_id: meta.correlation_id };
    with_message!(method.request.name, Message => {
        let message: Message = proto::decode(body.clone()).expect("a request of the originals");
        put_request(&mut out, &head, &message, attachment.len());
    });
    out.extend_from_slice(attachment);
    (out.into(), method)
}

/// Our bytes for this response to a call of `method`.
fn encode_response((meta, body, attachment): &Frame, method: Option<&service::Method>) -> Vec<u8> {
    let mut out = BytesMut::new();
    if meta.error_code() != 0 {
        assert!(body.is_empty() && attachment.is_empty(), "an error reply is a meta and nothing else");
        let text = meta.response.as_ref().map(|response| String::from_utf8_lossy(&response.error_text));
        put_error(&mut out, meta.correlation_id, meta.error_code(), &text.unwrap_or_default());
        return out.into();
    }
    let method = method.expect("a success of a known method");
    with_message!(method.response.name, Message => {
        let message: Message = proto::decode(body.clone()).expect("a response of the originals");
        put_response(&mut out, meta.correlation_id, &message, attachment.len());
    });
    out.extend_from_slice(attachment);
    out.into()
}

/// One connection of NEBD: both directions, matched by correlation id.
fn nebd(name: &str) -> (usize, usize) {
    let requests = fs::read(path(&format!("data/nebd-{name}-c2s.bin"))).expect("the capture");
    let responses = fs::read(path(&format!("data/nebd-{name}-s2c.bin"))).expect("the capture");
    let (mut methods, mut again) = (BTreeMap::new(), Vec::new());
    let sent = decode(&requests);
    for frame in &sent {
        let (bytes, method) = encode_request(frame);
        again.extend(bytes);
        methods.insert(frame.0.correlation_id, method);
    }
    assert!(again == requests, "{name}: requests differ");
    again.clear();
    let answered = decode(&responses);
    for frame in &answered {
        again.extend(encode_response(frame, methods.get(&frame.0.correlation_id).copied()));
    }
    assert!(again == responses, "{name}: responses differ");
    (sent.len(), answered.len())
}

#[test]
fn nebd_connections() {
    assert_eq!(nebd("open-missing"), (1, 1));
    let (sent, answered) = nebd("heartbeat");
    assert_eq!(sent, answered);
    let (sent, answered) = nebd("verify");
    assert!(sent > 100 && answered > 100 && answered <= sent, "{sent} {answered}");
}

#[test]
fn chunkserver_exchanges() {
    let text = fs::read_to_string(path("data/chunkserver.jsonl")).unwrap();
    let mut errors = Vec::new();
    for line in text.lines() {
        let case: serde_json::Value = serde_json::from_str(line).unwrap();
        let field = |name: &str| case[name].as_str().unwrap();
        let (request, response) = (unhex(field("request")), unhex(field("response")));
        let sent = decode(&request);
        let [call] = &sent[..] else { panic!("{}: not one frame", field("name")) };
        assert_eq!(call.0.names(), (field("service").as_bytes(), field("method").as_bytes()));
        let got = decode(&response);
        let [answer] = &got[..] else { panic!("{}: not one frame", field("name")) };
        assert_eq!(answer.0.correlation_id, call.0.correlation_id);
        let code = answer.0.error_code();
        if code == 0 {
            let (again, method) = encode_request(call);
            assert_eq!(again, request, "{}", field("name"));
            assert_eq!(encode_response(answer, Some(method)), response, "{}", field("name"));
        } else {
            errors.push(code);
            assert_eq!(encode_response(answer, None), response, "{}", field("name"));
            refused_alike(&call.0, &call.1, code);
        }
    }
    errors.sort_unstable();
    // unknown service (dotted), unknown method, unparsable request
    assert_eq!(errors, [code::ENOMETHOD, code::ENOMETHOD, code::EREQUEST]);
}

/// What the original refuses with this code we refuse with it, too.
fn refused_alike(meta: &RpcMeta, body: &Bytes, code: i32) {
    let offered: Vec<&Service> = SERVICES.iter().collect();
    let (service, method) = meta.names();
    match service::find(&offered, service, method) {
        Err(ours) => assert_eq!(ours, code),
        Ok((_, method)) => {
            assert_eq!(code, code::EREQUEST);
            assert!(proto::required::check(method.request, body).is_err(), "{body:?}");
        }
    }
}
