//! What the wire tests share: a stream cut into pieces, through the decoder, with attachments consumed as a server would.

#![allow(dead_code, unused_macros, unused_imports, reason = "each test file uses its part")]

use std::path::PathBuf;

use bytes::Bytes;
use proto::{
    frame::{BUFFER, Decoder, FrameError, MAX_MESSAGE, MAX_META, Step},
    meta::RpcMeta,
};

/// What came out of a stream.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Event {
    Frame {
        meta: RpcMeta,
        body: Bytes,
        attachment: Vec<u8>,
    },
    Reject {
        meta: RpcMeta,
        text: String,
    },
    /// The first bytes of an HTTP request; everything behind it is not looked at.
    Http,
    Close(FrameError),
}

/// Feeds `stream` in pieces of the given lengths (repeated; the rest in one piece) until it ends, closes or turns HTTP.
/// Checks on the way what the decoder promises about its input and its memory. The flag says whether the stream ended
/// between two messages.
pub(crate) fn run(stream: &[u8], pieces: &[usize]) -> (Vec<Event>, bool) {
    let mut decoder = Decoder::new();
    let mut events = Vec::new();
    let mut attachment: Option<(RpcMeta, Bytes, Vec<u8>, usize)> = None;
    let (mut fed, mut turn) = (0, 0);
    while fed < stream.len() {
        let piece =
            pieces.get(turn % pieces.len().max(1)).copied().unwrap_or(stream.len()).clamp(1, stream.len() - fed);
        turn += 1;
        let mut input = &stream[fed..fed + piece];
        fed += piece;
        loop {
            if let Some((meta, body, mut data, left)) = attachment.take() {
                let count = left.min(input.len());
                data.extend_from_slice(&input[..count]);
                input = &input[count..];
                if count < left {
                    attachment = Some((meta, body, data, left - count));
                    break;
                }
                decoder.attachment_done();
                events.push(Event::Frame { meta, body, attachment: data });
            }
            let step = decoder.step(&mut input);
            assert!(decoder.held() <= 2 * fed.min(MAX_META + MAX_MESSAGE) + 2 * BUFFER, "held {}", decoder.held());
            match step {
                Ok(Step::NeedMore) => {
                    assert!(input.is_empty(), "asked for more before all was taken");
                    break;
                }
                Ok(Step::Head(head)) if head.attachment_len == 0 => {
                    events.push(Event::Frame { meta: head.meta, body: head.body, attachment: Vec::new() });
                }
                Ok(Step::Head(head)) => attachment = Some((head.meta, head.body, Vec::new(), head.attachment_len)),
                Ok(Step::Reject(reject)) => {
                    events.push(Event::Reject { meta: reject.meta, text: reject.reason.to_string() });
                }
                Ok(Step::Http(start)) => {
                    let taken = stream.len() - fed + input.len();
                    assert!(stream[..stream.len() - taken].ends_with(start.as_bytes()));
                    events.push(Event::Http);
                    return (events, false);
                }
                Err(error) => {
                    assert_eq!(decoder.step(&mut &b"PRPC"[..]).err(), Some(error), "an error stays");
                    events.push(Event::Close(error));
                    return (events, false);
                }
            }
        }
    }
    (events, attachment.is_none() && decoder.is_idle())
}

/// The frames of a stream that holds nothing else.
pub(crate) fn frames(stream: &[u8], pieces: &[usize]) -> Vec<(RpcMeta, Bytes, Vec<u8>)> {
    let (events, clean) = run(stream, pieces);
    assert!(clean, "the stream ends inside a frame");
    let frame = |event| match event {
        Event::Frame { meta, body, attachment } => (meta, body, attachment),
        other => panic!("not a frame: {other:?}"),
    };
    events.into_iter().map(frame).collect()
}

/// Text of a number in hex, blanks allowed.
pub(crate) fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(|b| !b.is_ascii_whitespace()).collect();
    let digit = |b: u8| (b as char).to_digit(16).expect("a hex digit") as u8;
    digits.chunks_exact(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect()
}

/// A file below `tests/`.
pub(crate) fn path(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", name].iter().collect()
}

/// Calls `$body` with `$message` an alias of the message type of this full name.
macro_rules! with_message {
    ($name:expr, $message:ident => $body:expr) => {
        with_message!(@ $name, $message, $body;
            chunkserver: ChunkRequest ChunkResponse GetChunkInfoRequest GetChunkInfoResponse GetChunkHashRequest
                GetChunkHashResponse CreateS3CloneChunkRequest CreateS3CloneChunkResponse UpdateEpochRequest
                UpdateEpochResponse CopysetRequest CopysetResponse CopysetRequest2 CopysetResponse2 CopysetStatusRequest
                CopysetStatusResponse AddPeerRequest2 AddPeerResponse2 RemovePeerRequest2 RemovePeerResponse2
                ChangePeersRequest2 ChangePeersResponse2 TransferLeaderRequest2 TransferLeaderResponse2
                ResetPeerRequest2 ResetPeerResponse2 SnapshotRequest2 SnapshotResponse2 SnapshotAllRequest
                SnapshotAllResponse GetLeaderRequest2 GetLeaderResponse2 AddPeerRequest AddPeerResponse
                RemovePeerRequest RemovePeerResponse ChangePeersRequest ChangePeersResponse ResetPeerRequest
                ResetPeerResponse SnapshotRequest SnapshotResponse TransferLeaderRequest TransferLeaderResponse
                GetLeaderRequest GetLeaderResponse ChunkServerStatusRequest ChunkServerStatusResponse
                FollowScanMapRequest FollowScanMapResponse;
            heartbeat: ChunkServerHeartbeatRequest ChunkServerHeartbeatResponse;
            topology: ChunkServerRegistRequest ChunkServerRegistResponse;
            nebd: OpenFileRequest OpenFileResponse CloseFileRequest CloseFileResponse ReadRequest ReadResponse
                WriteRequest WriteResponse DiscardRequest DiscardResponse ResizeRequest ResizeResponse FlushRequest
                FlushResponse GetInfoRequest GetInfoResponse InvalidateCacheRequest InvalidateCacheResponse
                HeartbeatRequest HeartbeatResponse;
        )
    };
    (@ $name:expr, $message:ident, $body:expr; $($module:ident: $($type:ident)*;)*) => {
        match $name {
            $($(name if name == <proto::$module::$type as proto::Checked>::SHAPE.name => {
                type $message = proto::$module::$type;
                $body
            })*)*
            other => panic!("unknown message {other}"),
        }
    };
}
pub(crate) use with_message;
