//! What the software costs where the device costs nothing: `scripts/micro`.
//!
//! The codecs, the log's record encoding, the CRC of a block, the overlay of the chunk store, and whole reactor turns on an
//! `Io` that completes everything at once: nanoseconds per 4 KiB write (and read) in software. Times are those of the
//! thread on its CPU, so what else the machine does matters little.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../tests/support/rig.rs"]
mod rig;

use bytes::{Bytes, BytesMut};
use chunkserver::chunk::{ApplyOp, ExtentPool, Store};
use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use proto::chunkserver::ChunkResponse;
use proto::frame::{Decoder, Step, put_response};
use raftlog::{Checkpoint, CopysetId, Entry, EntryKind, Geometry, HardState, Limits, Log, Recovery, crc32c};
use rig::{Rig, reads, scattered, writes};
use std::hint::black_box;
use std::time::Duration;

const BLOCK: usize = 4096;

/// Time of this thread on a CPU.
struct CpuTime;

impl CpuTime {
    fn now() -> Duration {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        Duration::new(now.tv_sec.cast_unsigned(), now.tv_nsec as u32)
    }
}

impl Measurement for CpuTime {
    type Intermediate = Duration;
    type Value = Duration;

    fn start(&self) -> Duration {
        Self::now()
    }
    fn end(&self, start: Duration) -> Duration {
        Self::now() - start
    }
    fn add(&self, a: &Duration, b: &Duration) -> Duration {
        *a + *b
    }
    fn zero(&self) -> Duration {
        Duration::ZERO
    }
    fn to_f64(&self, value: &Duration) -> f64 {
        value.as_nanos() as f64
    }
    fn formatter(&self) -> &dyn ValueFormatter {
        WallTime.formatter()
    }
}

/// One WriteChunk request with its 4 KiB, as it comes from the socket.
fn frame_decode(c: &mut Criterion<CpuTime>) {
    let stream = writes(scattered(1, 1));
    let mut decoder = Decoder::new();
    c.bench_function("frame/decode WriteChunk", |b| {
        b.iter(|| {
            let mut input = &stream[..];
            let Ok(Step::Head(head)) = decoder.step(&mut input) else { panic!("a frame") };
            let request: proto::chunkserver::ChunkRequest = proto::decode(head.body).unwrap();
            decoder.attachment_done();
            black_box((head.meta, request))
        });
    });
}

fn frame_encode(c: &mut Criterion<CpuTime>) {
    let response = ChunkResponse { status: 0, applied_index: Some(123_456_789), ..ChunkResponse::default() };
    let mut out = BytesMut::with_capacity(1 << 16);
    c.bench_function("frame/encode ChunkResponse", |b| {
        b.iter(|| {
            if out.capacity() < 1024 {
                out.reserve(1 << 16);
            }
            put_response(&mut out, 77, black_box(&response), 0);
            black_box(out.split().freeze())
        });
    });
}

fn log() -> Log {
    let geometry = Geometry { uuid: [1; 16], segment_size: 32 << 20, segment_count: 16 };
    let mut log = Recovery::blank(geometry, Limits::default()).unwrap();
    let hard_state = HardState { term: 1, vote: 1, commit: 1 };
    let (applied_index, applied_term, conf) = (1, 1, Bytes::from_static(b"conf"));
    log.checkpoint(CopysetId(1), Checkpoint { applied_index, applied_term, hard_state, conf, incarnation: 1 });
    log
}

/// 64 entries of 4 KiB into one batch, its header, and its end; the log's space is given back as a checkpoint would.
fn record_encode(c: &mut Criterion<CpuTime>) {
    let (mut log, mut header) = (log(), vec![0; 1 << 20]);
    let (payload, context) = (Bytes::from(vec![7; BLOCK]), Bytes::from(vec![3; 32]));
    let mut next = 2;
    let mut group = c.benchmark_group("log");
    group.throughput(Throughput::Elements(64));
    group.bench_function("append 64 x 4 KiB + take_write + write_done", |b| {
        b.iter(|| {
            let entry = |index| {
                let (payload, context) = (payload.clone(), context.clone());
                Entry { index, term: 1, kind: EntryKind::Normal, context, payload }
            };
            let entries: Vec<Entry> = (next..next + 64).map(entry).collect();
            next += 64;
            log.append(CopysetId(1), entries, Some(HardState { term: 1, vote: 1, commit: next - 1 }));
            drain(&mut log, &mut header);
            log.evict(CopysetId(1), next - 1);
            if log.used_bytes() * 4 > log.capacity_bytes() {
                let hard_state = HardState { term: 1, vote: 1, commit: next - 1 };
                let conf = Bytes::from_static(b"conf");
                let point = Checkpoint { applied_index: next - 1, applied_term: 1, hard_state, conf, incarnation: 1 };
                log.checkpoint(CopysetId(1), point);
                drain(&mut log, &mut header);
                log.free_segments();
            }
        });
    });
    group.finish();
}

fn drain(log: &mut Log, header: &mut [u8]) {
    while let Some(len) = log.next_header() {
        let write = log.take_write(&mut header[..len]);
        black_box(&write.payloads);
        log.write_done(write.id);
    }
}

fn crc(c: &mut Criterion<CpuTime>) {
    let block: Vec<u8> = (0..BLOCK).map(|i| (i * 31) as u8).collect();
    let mut group = c.benchmark_group("crc of 4 KiB");
    group.throughput(Throughput::Bytes(BLOCK as u64));
    group.bench_function("crc-fast", |b| b.iter(|| crc32c(black_box(&block))));
    group.bench_function("crc32c", |b| b.iter(|| crc32c::crc32c(black_box(&block))));
    group.finish();
}

/// A store with nothing on its disk and `blocks` blocks in memory.
fn store(blocks: u64) -> Store {
    let layout = rig::layout();
    let pool = ExtentPool::new(&layout);
    let mut loader = chunkserver::chunk::Loader::new(&layout, 0, pool, chunkserver::chunk::StoreConfig::default());
    while let Some(read) = loader.next_read() {
        loader.feed(read, Ok(&vec![0; read.1]));
    }
    let (mut store, _) = loader.finish(&|_| None).unwrap();
    store.add_copyset(CopysetId(1), 1);
    store.replay_done();
    apply(&mut store, 1, blocks);
    store
}

fn apply(store: &mut Store, seed: u64, blocks: u64) {
    let payload = Bytes::from(vec![7; BLOCK]);
    for (index, (chunk, block)) in (1..).zip(scattered(blocks, seed)) {
        let crcs = std::iter::once(77).collect();
        let op = ApplyOp::Write { sn: 1, offset: block as u32 * BLOCK as u32, payload: payload.clone(), crcs };
        store.apply(CopysetId(1), index, chunk, op, index).unwrap();
    }
}

fn overlay(c: &mut Criterion<CpuTime>) {
    let mut group = c.benchmark_group("overlay");
    group.throughput(Throughput::Elements(4096));
    group.bench_function("insert 4096 scattered blocks", |b| {
        b.iter_batched_ref(|| store(0), |store| apply(store, 9, 4096), BatchSize::PerIteration);
    });
    let full = store(8192);
    let places: Vec<(u64, u64)> = scattered(4096, 1).collect();
    group.bench_function("look 4096 blocks up among 8192", |b| {
        b.iter(|| {
            for &(chunk, block) in &places {
                black_box(full.read(CopysetId(1), chunk, block as u32 * BLOCK as u32, BLOCK as u32).unwrap());
            }
        });
    });
    group.finish();
}

/// 64 calls at once, through the whole server, until all are answered; write-back rounds included.
fn turns(c: &mut Criterion<CpuTime>) {
    let mut rig = Rig::new(96 << 20);
    let streams: Vec<Bytes> = (0..256).map(|seed| writes(scattered(64, seed))).collect();
    let mut next = streams.iter().cycle();
    let mut group = c.benchmark_group("reactor on a null Io");
    group.throughput(Throughput::Elements(64));
    group.bench_function("64 writes of 4 KiB", |b| {
        b.iter(|| rig.run(next.next().unwrap(), 64));
    });
    let stream = reads(scattered(64, 1));
    group.bench_function("64 reads of 4 KiB", |b| b.iter(|| rig.run(&stream, 64)));
    let (one, read) = (writes(scattered(1, 5)), reads(scattered(1, 5)));
    group.throughput(Throughput::Elements(1));
    group.bench_function("1 write of 4 KiB", |b| b.iter(|| rig.run(&one, 1)));
    group.bench_function("1 read of 4 KiB", |b| b.iter(|| rig.run(&read, 1)));
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().with_measurement(CpuTime);
    targets = frame_decode, frame_encode, record_encode, crc, overlay, turns
}
criterion_main!(benches);
