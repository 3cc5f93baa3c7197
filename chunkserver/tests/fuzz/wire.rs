//! The RPC port's codecs: frames, metas, every message body, HTTP requests.

use crate::engine::{Cuts, Rng, Target};
use crate::mutate::{Corpus, number, protobuf};
use crate::samples;
use bytes::{Bytes, BytesMut};
use chunkserver::limits::HTTP_HEAD_BYTES_MAX;
use chunkserver::rpc::HttpRequest;
use chunkserver::rpc::http::HttpParser;
use proto::frame::{self, BUFFER, Decoder, FrameError, MAX_BODY, RequestHead, Step};
use proto::meta::RpcMeta;
use proto::{BodyError, Checked};

/// Requests and responses, metas apart from what follows them.
pub(crate) struct Frames {
    whole: Corpus,
    metas: Corpus,
    bodies: Corpus,
}

impl Frames {
    pub(crate) fn new() -> Self {
        let mut whole = samples::captured("request");
        whole.extend(samples::captured("response"));
        whole.extend(samples::golden().into_iter().map(|(_, _, frame)| frame));
        // Long attachments only cost time.
        whole.retain(|frame| frame.len() < 9000);
        let (metas, bodies) = whole.iter().map(|frame| samples::split(frame)).unzip();
        whole.extend(samples::HTTP.iter().map(|text| text.to_vec()));
        let corpus = |all| Corpus::new(all, samples::WORDS);
        Self { whole: corpus(whole), metas: corpus(metas), bodies: corpus(bodies) }
    }

    /// One message with right lengths around wrong contents, or now and then the other way round.
    pub(crate) fn message(&self, rng: &mut Rng) -> Vec<u8> {
        let at = rng.below(self.metas.samples.len());
        let (mut meta, mut rest) = (self.metas.samples[at].clone(), self.bodies.samples[at].clone());
        match rng.below(4) {
            0 => protobuf(&mut meta, rng, &self.metas, 0),
            1 => protobuf(&mut rest, rng, &self.bodies, 0),
            2 => self.bodies.mutate(&mut rest, rng),
            _ => {}
        }
        let mut bytes = samples::frame(&meta, &rest);
        if rng.one_in(8) {
            number(&mut bytes, *rng.pick(&[4, 8]), rng);
        }
        bytes
    }

    pub(crate) fn stream(&self, rng: &mut Rng) -> Vec<u8> {
        let mut stream = Vec::new();
        for _ in 0..1 + rng.below(4) {
            if rng.one_in(3) {
                stream.extend(self.whole.pick(rng));
            } else {
                stream.extend(self.message(rng));
            }
        }
        if rng.one_in(3) {
            self.whole.mutate(&mut stream, rng);
        }
        stream
    }
}

#[derive(Debug, PartialEq)]
enum Event {
    Head(RpcMeta, Bytes, usize),
    Reject(RpcMeta, String),
    /// Where in the stream.
    Http(usize),
    Close(FrameError),
    End {
        idle: bool,
        attachment: usize,
    },
}

fn events(stream: &[u8], cuts: &mut Cuts) -> Vec<Event> {
    let (mut decoder, mut events, mut rest) = (Decoder::new(), Vec::new(), stream);
    let (mut attachment, mut steps) = (0usize, 0);
    while !rest.is_empty() {
        let mut input = cuts.piece(&mut rest);
        loop {
            let skip = attachment.min(input.len());
            input = &input[skip..];
            attachment -= skip;
            if skip > 0 && attachment == 0 {
                decoder.attachment_done();
            }
            if attachment > 0 {
                break;
            }
            steps += 1;
            assert!(steps <= 2 * stream.len() + 2, "a step that gets nowhere");
            let taken = stream.len() - rest.len();
            assert!(decoder.held() <= 2 * taken + 2 * BUFFER, "{} bytes held of {taken}", decoder.held());
            match decoder.step(&mut input) {
                Ok(Step::NeedMore) => {
                    assert!(input.is_empty());
                    break;
                }
                Ok(Step::Head(head)) => {
                    attachment = head.attachment_len;
                    assert!(attachment <= MAX_BODY);
                    events.push(Event::Head(head.meta, head.body, attachment));
                }
                Ok(Step::Reject(reject)) => events.push(Event::Reject(reject.meta, reject.reason.to_string())),
                Ok(Step::Http(start)) => {
                    let at = stream.len() - rest.len() - input.len() - start.as_bytes().len();
                    assert!(stream[at..].starts_with(start.as_bytes()));
                    events.push(Event::Http(at));
                    return events;
                }
                Err(error) => {
                    assert_eq!(decoder.step(&mut &b"PRPC"[..]).err(), Some(error), "an error stays");
                    events.push(Event::Close(error));
                    return events;
                }
            }
        }
    }
    events.push(Event::End { idle: attachment == 0 && decoder.is_idle(), attachment });
    events
}

impl Target for Frames {
    fn input(&mut self, rng: &mut Rng) -> bool {
        let stream = self.stream(rng);
        let whole = events(&stream, &mut Cuts::none());
        assert_eq!(events(&stream, &mut Cuts::new(rng)), whole, "any split gives the same");
        matches!(whole.last(), Some(Event::End { idle: true, .. }))
    }
}

/// [`RpcMeta`] alone: what decodes is understood by the encoder's reader, too.
pub(crate) struct Metas(Corpus);

impl Metas {
    pub(crate) fn new() -> Self {
        Self(Frames::new().metas)
    }
}

impl Target for Metas {
    fn input(&mut self, rng: &mut Rng) -> bool {
        let mut bytes = self.0.pick(rng);
        if rng.one_in(2) {
            protobuf(&mut bytes, rng, &self.0, 0);
        } else {
            self.0.mutate(&mut bytes, rng);
        }
        let Ok(meta) = RpcMeta::decode(&Bytes::from(bytes)) else { return false };
        let (service, method) = meta.names();
        let (Ok(service), Ok(method)) = (str::from_utf8(service), str::from_utf8(method)) else { return true };
        let log_id = meta.request.as_ref().and_then(|request| request.log_id);
        let head = RequestHead { service, method, log_id, correlation_id: meta.correlation_id };
        let mut out = BytesMut::new();
        frame::put_request(&mut out, &head, &(), 0);
        let Ok(Step::Head(again)) = Decoder::new().step(&mut &out[..]) else {
            panic!("our own frame is not understood")
        };
        assert_eq!(again.meta.names(), meta.names());
        assert_eq!(again.meta.correlation_id, meta.correlation_id);
        assert_eq!(again.meta.request.and_then(|request| request.log_id), log_id);
        true
    }
}

type Decode = fn(Bytes) -> Result<(), BodyError>;

fn decode<M: Checked + PartialEq + std::fmt::Debug>(body: Bytes) -> Result<(), BodyError> {
    let message: M = proto::decode(body)?;
    let again: M = proto::decode(message.encode_to_vec().into()).expect("what was decoded encodes to a valid message");
    assert_eq!(again, message);
    Ok(())
}

macro_rules! decoders {
    ($($module:ident: $($type:ident)*;)*) => {
        [$($((<proto::$module::$type as Checked>::SHAPE.name, decode::<proto::$module::$type> as Decode),)*)*]
    };
}

/// Every message of every method.
pub(crate) struct Bodies(Vec<(Decode, Corpus)>);

impl Bodies {
    pub(crate) fn new() -> Self {
        let decoders = decoders! {
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
        };
        let mut all: Vec<(&str, Decode, Vec<Vec<u8>>)> =
            decoders.into_iter().map(|(name, decode)| (name, decode, Vec::new())).collect();
        for (_, name, bytes) in samples::golden() {
            let Ok(Step::Head(head)) = Decoder::new().step(&mut &bytes[..]) else { panic!("a golden frame") };
            let known = all.iter_mut().find(|(known, _, _)| *known == name);
            known.unwrap_or_else(|| panic!("{name} is not listed")).2.push(head.body.to_vec());
        }
        let bare = |(name, decode, bodies): (&str, Decode, Vec<Vec<u8>>)| {
            assert!(!bodies.is_empty(), "no sample of {name}");
            (decode, Corpus::new(bodies, samples::WORDS))
        };
        Self(all.into_iter().map(bare).collect())
    }
}

impl Target for Bodies {
    fn input(&mut self, rng: &mut Rng) -> bool {
        let (decode, corpus) = rng.pick(&self.0);
        let mut body = corpus.pick(rng);
        if rng.one_in(3) {
            // Another message's bytes: every method may be sent anything.
            body = rng.pick(&self.0).1.pick(rng);
        }
        match rng.below(4) {
            0 => corpus.mutate(&mut body, rng),
            _ => protobuf(&mut body, rng, corpus, 0),
        }
        decode(body.into()).is_ok()
    }
}

/// HTTP requests, pipelined.
pub(crate) struct Http(Corpus);

impl Http {
    pub(crate) fn new() -> Self {
        Self(Corpus::new(samples::HTTP.iter().map(|text| text.to_vec()).collect(), samples::WORDS))
    }
}

fn requests(stream: &[u8], cuts: &mut Cuts) -> Vec<HttpRequest> {
    let (mut parser, mut all, mut rest) = (HttpParser::default(), Vec::new(), stream);
    while !rest.is_empty() {
        let mut input = cuts.piece(&mut rest);
        while let Some(request) = parser.feed(&mut input) {
            // Whoever is at fault is not listened to any more.
            let ends = request.problem.is_some();
            all.push(request);
            if ends {
                return all;
            }
            assert!(all.len() <= stream.len(), "requests out of nothing");
        }
        assert!(input.is_empty() && parser.held() <= 2 * HTTP_HEAD_BYTES_MAX);
    }
    all
}

impl Target for Http {
    fn input(&mut self, rng: &mut Rng) -> bool {
        let mut stream = Vec::new();
        for _ in 0..1 + rng.below(3) {
            stream.extend(self.0.mutated(rng));
        }
        if rng.one_in(100) {
            let at = rng.below(stream.len());
            let filler = vec![b'a'; rng.below(3 * HTTP_HEAD_BYTES_MAX)];
            stream.splice(at..at, filler);
        }
        let whole = requests(&stream, &mut Cuts::none());
        assert_eq!(requests(&stream, &mut Cuts::new(rng)), whole, "any split gives the same");
        whole.iter().any(|request| request.problem.is_none())
    }
}
