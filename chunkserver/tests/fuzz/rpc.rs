//! A whole connection: bytes in, calls through the services to a fake shard, replies out.

use crate::engine::{Cuts, Rng, Target};
use crate::fake;
use crate::mutate::put_varint;
use crate::wire::Frames;
use chunkserver::io::Instant;
use chunkserver::io::buffer::Arena;
use chunkserver::limits::{BLOCK, CONNECTION_BYTES_MAX};
use chunkserver::metrics::ProcessStats;
use chunkserver::rpc::{Attachment, Connection, Incoming, Options, Out, Progress};
use chunkserver::service::{Context, Handled, Info, Shared, handle, resume, resume_all, route};
use chunkserver::shard::request::RequestOp;
use copyset::PeerId;
use std::sync::Arc;

const CHUNK_SIZE: u32 = 1 << 20;

pub(crate) struct Connections {
    frames: Frames,
    arena: Arc<Arena>,
    ctx: Context,
}

fn context() -> Context {
    let info = Info {
        peer: "127.0.0.1:8200:0".parse::<PeerId>().unwrap(),
        chunk_size: CHUNK_SIZE,
        max_inflight: 8,
        version: "0.1.0".into(),
        config: vec![("copyset.raft_log_uri".into(), "curve:///data".into())],
        process: ProcessStats::default,
    };
    let shared = Shared::new(info, 1);
    shared.set_loaded();
    Context::new(shared, 0)
}

impl Connections {
    pub(crate) fn new() -> Self {
        Self { frames: Frames::new(), arena: Arena::new(4 << 20).unwrap(), ctx: context() }
    }

    fn connection() -> Connection {
        Connection::new(Options { route, chunk_size: CHUNK_SIZE as usize })
    }

    /// What arrives, without serving it.
    fn incoming(&self, stream: &[u8], cuts: &mut Cuts, direct: bool) -> Vec<String> {
        let (mut connection, mut seen, mut rest) = (Self::connection(), Vec::new(), stream);
        let mut out = Vec::new();
        while !rest.is_empty() {
            let mut input = cuts.piece(&mut rest);
            loop {
                let progress = connection.received(&mut input, &self.arena, &mut out);
                // At most one HTTP request: the next waits for its answer. After nonsense the service closes.
                let http = out
                    .iter()
                    .find_map(|one| if let Incoming::Http(http) = one { Some(http.keep_alive) } else { None });
                seen.extend(out.drain(..).map(|one| describe(&one)));
                if let Some(keep_alive) = http {
                    connection.push_reply(Out { http: true, close: !keep_alive, ..Out::default() });
                }
                match progress {
                    Ok(Progress::Consumed) => break,
                    Ok(Progress::More) => {}
                    Ok(Progress::Later) if connection.may_receive() => {}
                    Ok(Progress::Later | Progress::NoBuffer) => return seen,
                    Err(error) => {
                        seen.push(error.to_string());
                        return seen;
                    }
                }
            }
            if direct && let Some((mut buf, filled)) = connection.direct() {
                let added = (buf.len() - filled).min(rest.len());
                buf[filled..filled + added].copy_from_slice(&rest[..added]);
                rest = &rest[added..];
                connection.direct_done(buf, added, &mut out);
                seen.extend(out.drain(..).map(|one| describe(&one)));
            }
        }
        seen
    }

    /// Whether any call got as far as a shard.
    fn serve(&mut self, stream: &[u8], rng: &mut Rng) -> bool {
        let (mut connection, mut rest, mut cuts) = (Self::connection(), stream, Cuts::new(rng));
        let mut late = Vec::new();
        let (mut steps, mut reached) = (0, false);
        'stream: while !rest.is_empty() {
            let mut input = cuts.piece(&mut rest);
            loop {
                let mut out = Vec::new();
                let progress = connection.received(&mut input, &self.arena, &mut out);
                for one in out {
                    let handled = handle(&self.ctx, Instant(5), one);
                    reached |= !matches!(handled, Handled::Reply(_));
                    // Some are answered only when others have come; HTTP at once, for the rest waits for it.
                    late.push(handled);
                    if rng.one_in(2) {
                        let at = rng.below(late.len());
                        let handled = late.swap_remove(at);
                        self.finish(handled, &mut connection, rng);
                    }
                }
                steps += 1;
                assert!(steps < 4 * stream.len() + 64, "steps that get nowhere");
                match progress {
                    Ok(Progress::Consumed) => break,
                    Ok(Progress::More) => {}
                    Ok(Progress::Later | Progress::NoBuffer) if connection.is_finished() => break 'stream,
                    Ok(Progress::Later | Progress::NoBuffer) => {
                        let owed = !late.is_empty();
                        for handled in late.drain(..) {
                            self.finish(handled, &mut connection, rng);
                        }
                        send(&mut connection);
                        if !owed && !connection.may_receive() && connection.wants_buffer().is_none() {
                            assert!(connection.is_finished(), "it waits for nothing");
                            break 'stream;
                        }
                    }
                    Err(_) => break 'stream,
                }
            }
        }
        for handled in late.drain(..) {
            self.finish(handled, &mut connection, rng);
        }
        send(&mut connection);
        assert_eq!((connection.requests(), connection.backlog_bytes()), (0, 0), "each is answered once");
        assert_eq!(self.ctx.shared().inflight(), 0);
        reached
    }

    fn finish(&mut self, mut handled: Handled, connection: &mut Connection, rng: &mut Rng) {
        for _ in 0..10_000 {
            handled = match handled {
                Handled::Reply(out) => {
                    connection.push_reply(out);
                    if rng.one_in(4) {
                        send(connection);
                    }
                    return;
                }
                Handled::Shard { op, charge, pending, .. } => {
                    connection.charge(charge);
                    let reply = fake::answer(&op, CHUNK_SIZE, 4, rng);
                    drop(op);
                    resume(&self.ctx, Instant(9), pending, reply)
                }
                Handled::AllShards { op, pending } => {
                    let reply = fake::answer(&RequestOp::Admin(op), CHUNK_SIZE, 4, rng);
                    resume_all(&self.ctx, Instant(9), pending, vec![reply])
                }
            };
        }
        panic!("a call that never ends");
    }
}

fn send(connection: &mut Connection) {
    assert!(connection.backlog_bytes() <= 2 * CONNECTION_BYTES_MAX);
    while !connection.take_send(16).is_empty() {
        connection.sent();
    }
}

fn describe(incoming: &Incoming) -> String {
    match incoming {
        Incoming::Call(call) => {
            if let Attachment::Data { data, crcs } = &call.attachment {
                assert!(data.chunks(BLOCK).map(raftlog::crc32c).eq(crcs.iter().copied()));
            }
            let sum = match &call.attachment {
                Attachment::Data { data, .. } => raftlog::crc32c(data),
                _ => 0,
            };
            format!("{:?} {} {:?} {} {sum}", call.method, call.correlation_id, call.body, call.attachment.len())
        }
        other => format!("{other:?}"),
    }
}

impl Target for Connections {
    fn input(&mut self, rng: &mut Rng) -> bool {
        let mut stream = self.frames.stream(rng);
        if rng.one_in(200) {
            // A payload worth receiving in place.
            let size = 65536 * (1 + rng.below(15)) as u64;
            stream.extend(write(size));
        }
        let reached = if rng.one_in(3) {
            let whole = self.incoming(&stream, &mut Cuts::none(), false);
            let split = self.incoming(&stream, &mut Cuts::new(rng), rng.one_in(2));
            assert_eq!(split, whole, "any split gives the same");
            !whole.is_empty()
        } else {
            self.serve(&stream, rng)
        };
        assert_eq!(self.arena.free_bytes(), self.arena.size(), "every buffer came back");
        reached
    }

    fn reset(&mut self) {
        self.ctx = context();
    }
}

/// A WriteChunk of so many zeros.
fn write(size: u64) -> Vec<u8> {
    let mut message = Vec::new();
    for (field, value) in [(1u64, 1u64), (2, 1), (3, 701), (4, 9), (6, 0), (7, size), (9, 1)] {
        put_varint(&mut message, field << 3);
        put_varint(&mut message, value);
    }
    let (service, method) = (b"curve.chunkserver.ChunkService", b"WriteChunk");
    let mut meta = vec![0x0a, (service.len() + method.len() + 4) as u8, 0x0a, service.len() as u8];
    meta.extend_from_slice(service);
    meta.extend_from_slice(&[0x12, method.len() as u8]);
    meta.extend_from_slice(method);
    meta.extend_from_slice(b"\x20\x07\x28");
    put_varint(&mut meta, size);
    message.resize(message.len() + size as usize, 0);
    crate::samples::frame(&meta, &message)
}
