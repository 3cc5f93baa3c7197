//! What other chunkservers say: batches, and the whole called end of their connections.

use crate::engine::{Cuts, Rng, Target};
use crate::mutate::Corpus;
use crate::samples;
use bytes::Bytes;
use chunkserver::io::buffer::Arena;
use chunkserver::peer::{Identity, Inbound, Progress, convert};
use proto::peer::{Batch, Body, Hello, Lane, Limits, Message, PeerError, Status, Welcome};
use std::sync::Arc;

const CHUNK: u32 = 1 << 20;
const LIMITS: Limits = Limits { payload_max: CHUNK, head_max: 64 << 10, context_max: 1024 };

/// Messages of golden frames of this kind, and the whole frames.
fn golden(kind: &str) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
    samples::peers().into_iter().filter(|(of, _)| of == kind).map(|(_, frame)| (body(&frame), frame)).unzip()
}

/// The message of a frame, without its attachment.
fn body(frame: &[u8]) -> Vec<u8> {
    let mut decoder = proto::frame::Decoder::new();
    match decoder.step(&mut &frame[..]) {
        Ok(proto::frame::Step::Head(head)) => head.body.to_vec(),
        other => panic!("{other:?}"),
    }
}

/// Decoders of single messages.
pub(crate) struct Messages {
    batches: Corpus,
    greetings: Corpus,
}

impl Messages {
    pub(crate) fn new() -> Self {
        let words: &[&[u8]] = &[&[0, 16, 0, 0], &[0xff; 4], &[1, 0, 0, 0], &[0; 28]];
        let greetings = [golden("hello").0, golden("welcome").0].concat();
        Self { batches: Corpus::new(golden("batch").0, words), greetings: Corpus::new(greetings, words) }
    }
}

fn payloads(messages: &mut [Message]) -> usize {
    let slots =
        |message: &mut Message| (0..).map_while(|n| message.payload_slot(n).map(|slot| slot.0 as usize)).sum::<usize>();
    messages.iter_mut().map(slots).sum()
}

impl Target for Messages {
    fn input(&mut self, rng: &mut Rng) -> bool {
        if rng.one_in(4) {
            let bytes = self.greetings.mutated(rng);
            let hello = Hello::decode(&bytes).inspect(|hello| assert_eq!(hello.encode(), bytes));
            let welcome = Welcome::decode(&bytes).inspect(|welcome| assert_eq!(welcome.encode(), bytes));
            return hello.is_ok() || welcome.is_ok();
        }
        let bytes = Bytes::from(self.batches.mutated(rng));
        let guess = rng.number(5 * 4096) as usize;
        let len = match Batch::decode(&bytes, guess, &LIMITS) {
            Err(PeerError::Attachment { said, .. }) => said as usize,
            _ => guess,
        };
        let Ok(mut messages) = Batch::decode(&bytes, len, &LIMITS) else { return false };
        assert_eq!(payloads(&mut messages), len);
        for message in messages {
            // Without their payloads these are no mail, but bytes all the same.
            let whole =
                matches!(&message.body, Body::Raft(raft) if raft.entries.iter().all(|entry| entry.payload_len == 0));
            if let (Ok(mail), true) = (convert::from_wire(message.clone(), 1, 2), whole) {
                assert_eq!(convert::to_wire(mail), Ok(message));
            }
        }
        true
    }
}

/// A connection after its handshake.
pub(crate) struct Streams {
    frames: Corpus,
    arena: Arc<Arena>,
}

impl Streams {
    pub(crate) fn new() -> Self {
        Self { frames: Corpus::new(golden("batch").1, &[b"PRPC", &[0, 16, 0, 0]]), arena: Arena::new(4 << 20).unwrap() }
    }

    fn inbound() -> Inbound {
        let disk = [7; 16];
        let me = Identity { peer: 2, shard: 0, shards: 1, chunk_size: CHUNK, disk, cluster: disk };
        let (lane, from, to, from_shard, to_shard, shards) = (Lane::Data, 1, 2, 0, 0, 1);
        let hello = Hello { lane, chunk_size: CHUNK, from, to, from_shard, to_shard, shards, disk, cluster: disk };
        Inbound::new(&me, hello, 1, Status::Ok)
    }

    /// All that came out of a stream, as text, and how it ended.
    fn seen(&self, stream: &[u8], cuts: &mut Cuts) -> (Vec<String>, String) {
        let (mut inbound, mut rest, mut mail) = (Self::inbound(), stream, Vec::new());
        let mut end = "open".to_owned();
        while !rest.is_empty() {
            let mut input = cuts.piece(&mut rest);
            match inbound.received(&mut input, &self.arena, &mut mail) {
                Ok(Progress::Consumed) => {}
                Ok(other) => {
                    end = format!("{other:?}");
                    break;
                }
                Err(error) => {
                    end = error.to_string();
                    break;
                }
            }
        }
        (mail.iter().map(|mail| format!("{mail:?}")).collect(), end)
    }
}

impl Target for Streams {
    fn input(&mut self, rng: &mut Rng) -> bool {
        let mut stream = self.frames.pick(rng);
        stream.extend(self.frames.mutated(rng));
        stream.extend(self.frames.pick(rng));
        let whole = self.seen(&stream, &mut Cuts::none());
        let pieces = self.seen(&stream, &mut Cuts::new(rng));
        assert_eq!(whole, pieces, "the split does not matter");
        assert_eq!(self.arena.free_bytes(), self.arena.size(), "every buffer came back");
        whole.1 == "open"
    }
}
