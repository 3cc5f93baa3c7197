//! The decoder against what peers should not send: limits, rejects, other protocols, arbitrary bytes. Whatever comes, the
//! result does not depend on the split, and memory stays bounded (checked at every step in `common::run`).

mod common;

use bytes::{Bytes, BytesMut};
use common::{Event, run};
use proptest::{collection::vec, prelude::*};
use prost::Message as _;
use proto::{
    brpc, chunkserver,
    frame::{Decoder, FrameError, MAX_BODY, MAX_ERROR_TEXT, MAX_MESSAGE, MAX_META, Step, put_error, put_response},
    meta::RpcMeta,
};

/// A frame with any meta, lengths as they are.
fn frame(meta: &[u8], payload: &[u8]) -> Vec<u8> {
    header(meta.len() + payload.len(), meta.len()).into_iter().chain([meta, payload].concat()).collect()
}

fn header(body: usize, meta: usize) -> Vec<u8> {
    let (body, meta) = (u32::try_from(body).expect("32 bits"), u32::try_from(meta).expect("32 bits"));
    [&b"PRPC"[..], &body.to_be_bytes(), &meta.to_be_bytes()].concat()
}

fn meta(attachment_size: Option<i32>, compress_type: i32, content_type: i32) -> Vec<u8> {
    let request = brpc::RpcRequestMeta {
        service_name: "ChunkService".into(),
        method_name: "ReadChunk".into(),
        ..Default::default()
    };
    brpc::RpcMeta {
        request: Some(request),
        correlation_id: Some(77),
        attachment_size,
        compress_type: Some(compress_type),
        content_type: Some(content_type),
        ..Default::default()
    }
    .encode_to_vec()
}

fn closes(stream: &[u8], error: FrameError) {
    for pieces in [&[][..], &[1], &[5]] {
        assert_eq!(run(stream, pieces).0, [Event::Close(error)], "{stream:?}");
    }
}

#[test]
fn protocols_are_told_apart_by_their_first_bytes() {
    for start in ["GET / ", "HEAD /", "POST /x HTTP/1.1", "PUT ", "PATCH ", "DELETE ", "OPTIONS ", "CONNECT ", "TRACE "]
    {
        for pieces in [&[][..], &[1], &[3]] {
            assert_eq!(run(start.as_bytes(), pieces).0, [Event::Http], "{start}");
        }
    }
    for start in
        ["P", "PR", "PRP", "PRPC", "PRPC\0\0\0", "PRI", "PO", "PUT", "PATC", "S", "STR", "OPTIONS", "G", "D", "T"]
    {
        assert_eq!(run(start.as_bytes(), &[1]), (vec![], false), "{start} is undecided");
    }
    closes(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", FrameError::Http2);
    closes(b"STRMxxxx", FrameError::Streaming);
    for garbage in [&b"\0"[..], b"PX", b"PRX", b"PRPX", b"GETX", b"get / ", b"HULU", b"\x16\x03\x01", b" GET /"] {
        closes(garbage, FrameError::UnknownProtocol);
    }
    assert_eq!(run(b"", &[1]), (vec![], true), "a connection without a byte is fine");
}

#[test]
fn http_between_two_frames_on_one_connection() {
    let mut decoder = Decoder::new();
    let mut good = BytesMut::new();
    put_response(&mut good, 1, &(), 0);
    let stream = [&good[..], b"GET /health HTTP/1.1\r\n\r\n", &good].concat();
    let mut input = &stream[..];
    assert!(matches!(decoder.step(&mut input), Ok(Step::Head(_))));
    let Ok(Step::Http(start)) = decoder.step(&mut input) else { panic!("not HTTP") };
    assert_eq!(start.as_bytes(), b"GET /health ");
    assert!(decoder.is_idle());
    input = &input[b"HTTP/1.1\r\n\r\n".len()..];
    assert!(matches!(decoder.step(&mut input), Ok(Step::Head(_))));
    assert!(input.is_empty());
}

#[test]
fn impossible_lengths_close_as_soon_as_they_are_known() {
    closes(&header(MAX_BODY + 1, 10), FrameError::BodyTooLarge(MAX_BODY as u32 + 1));
    closes(&header(u32::MAX as usize, u32::MAX as usize), FrameError::BodyTooLarge(u32::MAX));
    closes(&header(10, 11), FrameError::MetaBeyondBody { meta: 11, body: 10 });
    closes(&header(MAX_META + 2, MAX_META + 1), FrameError::MetaTooLarge(MAX_META as u32 + 1));
    closes(&frame(&[0xff; 3], b""), FrameError::BadMeta);
    // A request part without names.
    closes(&frame(&[0x0a, 0], b""), FrameError::BadMeta);
    closes(&frame(&[0x0a, 3, 0x0a, 1, b'S'], b""), FrameError::BadMeta);
    // The largest of all is waited for.
    assert_eq!(run(&header(MAX_BODY, MAX_META), &[1]), (vec![], false));
}

#[test]
fn an_announced_length_is_not_memory() {
    let mut decoder = Decoder::new();
    let stream = [header(MAX_MESSAGE + meta(None, 0, 0).len(), meta(None, 0, 0).len()), meta(None, 0, 0)].concat();
    assert!(matches!(decoder.step(&mut &stream[..]), Ok(Step::NeedMore)));
    assert!(decoder.held() <= 4096, "{}", decoder.held());
    assert!(matches!(decoder.step(&mut &[1][..]), Ok(Step::NeedMore)));
    assert!(decoder.held() <= 2 * 4096, "{}", decoder.held());
    let mut rest = &vec![0; MAX_MESSAGE][..];
    assert!(matches!(decoder.step(&mut rest), Ok(Step::Head(_))));
    assert_eq!(decoder.held(), 0, "a large message takes its buffer along");
}

#[test]
fn a_rejected_frame_is_passed_over_and_the_next_one_served() {
    let rejects = [
        (frame(&meta(Some(-1), 0, 0), b"abc"), "attachment_size=-1 of 3 bytes"),
        (frame(&meta(Some(i32::MIN), 0, 0), b""), "attachment_size=-2147483648 of 0 bytes"),
        (frame(&meta(Some(4), 0, 0), b"abc"), "attachment_size=4 of 3 bytes"),
        (frame(&meta(None, 9, 0), b"abc"), "CompressType=9"),
        (frame(&meta(None, 0, 1), b"abc"), "ContentType=1"),
        (frame(&meta(None, 0, 0), &vec![0; MAX_MESSAGE + 1]), "1048577 bytes are too many"),
        (frame(&meta(Some(2), 0, 0), &vec![0; MAX_MESSAGE + 3]), "1048577 bytes are too many"),
    ];
    for (bytes, want) in rejects {
        let stream =
            [&bytes[..], &frame(&meta(Some(2), 0, 0), b"abc"), &bytes, &frame(&meta(None, 0, 0), b"")].concat();
        for pieces in [&[][..], &[1000, 3, 1]] {
            let (events, clean) = run(&stream, pieces);
            assert!(clean);
            let [Event::Reject { meta, text }, Event::Frame { body, attachment, .. }, Event::Reject { .. }, _] =
                &events[..]
            else {
                panic!("{events:?}")
            };
            assert!(text.contains(want), "{text}");
            assert_eq!((meta.correlation_id, meta.names()), (77, (&b"ChunkService"[..], &b"ReadChunk"[..])));
            assert_eq!((&body[..], &attachment[..]), (&b"a"[..], &b"bc"[..]));
        }
    }
}

#[test]
fn a_meta_without_a_request_part_is_a_frame() {
    let (events, _) = run(&frame(&[], &[]), &[1]);
    assert_eq!(
        events,
        [Event::Frame { meta: RpcMeta::default(), body: Bytes::new(), attachment: vec![] }],
        "the answer is ENOSERVICE"
    );
}

#[test]
fn small_messages_share_a_buffer() {
    let mut stream = BytesMut::new();
    for id in 0..20 {
        put_response(&mut stream, id, &chunkserver::UpdateEpochRequest { file_id: 1, epoch: 2 }, 0);
    }
    let mut decoder = Decoder::new();
    let mut input = &stream[..];
    let mut held = Vec::new();
    while let Ok(Step::Head(head)) = decoder.step(&mut input) {
        held.push(head.body.as_ptr() as usize);
    }
    assert_eq!(held.len(), 20);
    assert!(held.windows(2).all(|pair| pair[0] < pair[1] && pair[1] - pair[0] < 64), "not from one buffer");
}

#[test]
fn long_error_texts_are_cut_at_a_character() {
    let mut out = BytesMut::new();
    put_error(&mut out, 1, 1003, &"é€".repeat(MAX_ERROR_TEXT));
    let (events, clean) = run(&out, &[]);
    let [Event::Frame { meta, .. }] = &events[..] else { panic!("{events:?}") };
    let text = std::str::from_utf8(&meta.response.as_ref().unwrap().error_text).unwrap();
    assert!(clean && text.len() <= MAX_ERROR_TEXT && text.len() > MAX_ERROR_TEXT - 3);
}

#[test]
#[should_panic(expected = "no attachment")]
fn attachment_done_without_attachment_is_a_broken_invariant() {
    Decoder::new().attachment_done();
}

prop_compose! {
    fn any_meta()(
        names in proptest::option::of((".{0,12}", ".{0,12}", any::<Option<i64>>(), any::<Option<i32>>())),
        response in proptest::option::of((any::<Option<i32>>(), proptest::option::of(".{0,12}"))),
        numbers in any::<(Option<i32>, Option<i64>, Option<i32>, Option<i32>)>(),
        extra in any::<(Option<i32>, Option<bool>)>(),
        fields in proptest::collection::hash_map(".{0,4}", ".{0,4}", 0..3),
        data in proptest::option::of(vec(any::<u8>(), 0..9)),
    ) -> brpc::RpcMeta {
        let request = names.map(|(service_name, method_name, log_id, timeout_ms)| brpc::RpcRequestMeta {
            service_name, method_name, log_id, timeout_ms, trace_id: log_id, request_id: Some("r".into()),
            ..Default::default()
        });
        brpc::RpcMeta {
            request,
            response: response.map(|(error_code, error_text)| brpc::RpcResponseMeta { error_code, error_text }),
            compress_type: numbers.0, correlation_id: numbers.1, attachment_size: numbers.2, content_type: numbers.3,
            checksum_type: extra.0, checksum_with_attachment: extra.1,
            authentication_data: data.map(Bytes::from),
            user_fields: fields,
            ..Default::default()
        }
    }
}

/// What prost's decoding amounts to in our terms.
fn as_ours(meta: brpc::RpcMeta) -> RpcMeta {
    RpcMeta {
        request: meta.request.map(|request| proto::meta::RequestMeta {
            service: request.service_name.into(),
            method: request.method_name.into(),
            log_id: request.log_id,
            timeout_ms: request.timeout_ms,
        }),
        response: meta.response.map(|response| proto::meta::ResponseMeta {
            error_code: response.error_code.unwrap_or(0),
            error_text: response.error_text.unwrap_or_default().into(),
        }),
        compress_type: meta.compress_type.unwrap_or(0),
        correlation_id: meta.correlation_id.unwrap_or(0),
        attachment_size: meta.attachment_size.unwrap_or(0),
        content_type: meta.content_type.unwrap_or(0),
    }
}

fn any_message() -> impl Strategy<Value = Vec<u8>> {
    let payload = || vec(any::<u8>(), 0..6000);
    prop_oneof![
        4 => (0..50i32, payload()).prop_map(|(size, payload)| frame(&meta(Some(size), 0, 0), &payload)),
        2 => (any_meta(), payload()).prop_map(|(meta, payload)| frame(&meta.encode_to_vec(), &payload)),
        1 => (vec(any::<u8>(), 0..40), payload()).prop_map(|(meta, payload)| frame(&meta, &payload)),
        1 => (0..200usize, 0..200usize).prop_map(|(body, meta)| header(body, meta)),
        1 => Just(b"GET / HTTP/1.1\r\n".to_vec()),
    ]
}

proptest! {
    #[test]
    fn any_split_gives_the_same_and_nothing_panics(
        messages in vec(any_message(), 0..6),
        flips in vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
        pieces in vec(1..700usize, 1..40),
    ) {
        let mut stream = messages.concat();
        for (index, byte) in flips {
            if !stream.is_empty() {
                let at = index.index(stream.len());
                stream[at] ^= byte;
            }
        }
        let whole = run(&stream, &[]);
        prop_assert_eq!(&run(&stream, &pieces), &whole);
        prop_assert_eq!(&run(&stream, &[1]), &whole);
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in vec(any::<u8>(), 0..200), pieces in vec(1..20usize, 1..9)) {
        prop_assert_eq!(run(&bytes, &pieces), run(&bytes, &[]));
        let framed = frame(&bytes, &bytes);
        prop_assert_eq!(run(&framed, &pieces), run(&framed, &[]));
    }

    #[test]
    fn metas_mean_what_prost_reads(meta in any_meta()) {
        let bytes = Bytes::from(meta.encode_to_vec());
        prop_assert_eq!(RpcMeta::decode(&bytes), Ok(as_ours(meta)));
    }

    #[test]
    fn damaged_metas_are_refused_by_both_or_mean_the_same(
        meta in any_meta(), at in any::<prop::sample::Index>(), byte in any::<u8>(),
    ) {
        let mut bytes = meta.encode_to_vec();
        if !bytes.is_empty() {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let bytes = Bytes::from(bytes);
        // Ours is laxer in what we do not use, and stricter in that names must be there.
        if let (Ok(theirs), Ok(ours)) = (brpc::RpcMeta::decode(bytes.clone()), RpcMeta::decode(&bytes)) {
            prop_assert_eq!(ours, as_ours(theirs));
        }
    }
}
