//! Volume I/Os against a fake shard: the right bytes, bounded windows, retries and their end.

use super::*;
use crate::io::buffer::Arena;
use crate::volume::fake::{FakeShard, pooled, reply, volume};
use crate::volume::map::Shape;
use proptest::prelude::*;

const K: u64 = 1024;
const FAR: Instant = Instant(3_600_000_000_000);

fn shape(size: u64, chunk_size: u32, stripe_unit: u32, stripe_count: u32) -> Shape {
    Shape { size, chunk_size, stripe_unit, stripe_count }
}
fn crcs(data: &[u8]) -> BlockCrcs {
    data.chunks(4096).map(raftlog::crc32c).collect()
}
fn joined(pieces: &Pieces) -> Vec<u8> {
    pieces.concat()
}
fn read(volume: &Arc<Volume>, offset: u64, len: u64) -> VolumeIo {
    VolumeIo::new(volume, IoKind::Read, offset, len, FAR).unwrap()
}

/// Pseudo-random numbers for orders and refusals.
struct Dice(u64);
impl Dice {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % n
    }
}

/// Serve an I/O with replies in any order and passing refusals, honouring the back-off.
fn drive(shard: &mut FakeShard, mut io: VolumeIo, dice: &mut Dice) -> Result<Pieces, VolumeError> {
    let (mut now, mut flying, mut refusals) = (Instant(1), Vec::new(), 0);
    loop {
        while let Some(part) = io.next_part(now) {
            flying.push(part);
        }
        assert!(flying.len() <= PARTS_IN_FLIGHT_MAX);
        if flying.is_empty() {
            let wake = io.wake_at().expect("an unfinished I/O waits for something");
            assert!(wake > now);
            now = wake;
            continue;
        }
        let Part { copyset, op, part, .. } = flying.swap_remove(dice.below(flying.len()));
        let refuse = refusals < 40 && dice.below(4) == 0;
        let answer = if refuse {
            refusals += 1;
            let why = [Outcome::NotLeader, Outcome::Overload, Outcome::Failed][dice.below(3)];
            reply(why, ReplyData::None)
        } else {
            shard.serve(copyset, op)
        };
        match io.reply(part, answer, now) {
            Progress::Done(result) => {
                assert!(flying.is_empty() && io.next_part(FAR).is_none() && io.wake_at().is_none());
                return result;
            }
            Progress::Retry { after_ms } => assert!(refuse && after_ms > 0),
            Progress::More => {}
        }
    }
}

#[test]
fn a_large_write_goes_in_parts_without_a_copy() {
    let v = volume("v", shape(64 << 20, 16 << 20, 0, 0));
    let arena = Arena::new(4 << 20).unwrap();
    let data = pooled(&arena, &vec![7; 1 << 20]).freeze();
    let base = data.as_ptr() as usize;
    let kind = IoKind::write(data.clone(), crcs(&data));
    let mut io = VolumeIo::new(&v, kind, (16 << 20) - 4096, 1 << 20, FAR).unwrap();
    let mut at = 0;
    for want in [4096, 256 << 10, 256 << 10, 256 << 10, (256 << 10) - 4096] {
        let part = io.next_part(Instant(0)).unwrap();
        let RequestOp::Chunk { op: ChunkOp::Write { payload, crcs, sn: 1, .. }, .. } = part.op else { panic!() };
        assert_eq!((payload.as_ptr() as usize, payload.len()), (base + at, want));
        assert_eq!(crcs.len(), want / 4096);
        at += want;
    }
    assert!(io.next_part(Instant(0)).is_none());
}

#[test]
fn zeroing_4_gib_needs_one_request_per_chunk_and_a_bounded_window() {
    for stripes in [(0, 0), (4096, 16)] {
        let v = volume("v", shape(8 << 30, 16 << 20, stripes.0, stripes.1));
        let len = (4 << 30) - 4096;
        let mut shard = FakeShard::default();
        let io = VolumeIo::new(&v, IoKind::Zero, 8192, len, FAR).unwrap();
        drive(&mut shard, io, &mut Dice(1)).unwrap();
        let chunks = if stripes.0 == 0 { 257 } else { 272 };
        assert!(shard.requests <= chunks, "{} requests", shard.requests);
    }
}

#[test]
fn absent_chunks_read_as_shared_zeros() {
    let v = volume("v", shape(4 << 20, 1 << 20, 0, 0));
    let pieces = drive(&mut FakeShard::default(), read(&v, 4096, 3 << 20), &mut Dice(3)).unwrap();
    assert_eq!(joined(&pieces), vec![0; 3 << 20]);
    assert!(pieces.iter().all(|p| p.as_ptr() == ZEROS.as_ptr()));
}

#[test]
fn a_failure_is_reported_when_nothing_is_in_flight() {
    let v = volume("v", shape(4 << 20, 1 << 20, 0, 0));
    let mut io = read(&v, 0, 1 << 20);
    let parts: Vec<_> = std::iter::from_fn(|| io.next_part(Instant(0))).map(|p| p.part).collect();
    assert_eq!(parts, [0, 1, 2, 3]);
    let no = |o| reply(o, ReplyData::None);
    assert!(matches!(io.reply(1, no(Outcome::NotLeader), Instant(0)), Progress::Retry { after_ms: 10 }));
    assert!(matches!(io.reply(2, no(Outcome::CrcFail), Instant(0)), Progress::More));
    assert!(io.next_part(FAR).is_none() && io.wake_at().is_none(), "a failed I/O asks nothing more");
    assert!(matches!(io.reply(0, no(Outcome::NoSpace), Instant(0)), Progress::More));
    let Progress::Done(Err(error)) = io.reply(3, no(Outcome::NoChunk), Instant(0)) else { panic!("not done") };
    assert_eq!(error, VolumeError::Chunk(Outcome::CrcFail), "the first failure counts");
}

#[test]
fn a_cancelled_io_ends_when_nothing_is_in_flight() {
    let v = volume("v", shape(4 << 20, 1 << 20, 0, 0));
    assert!(read(&v, 0, 4096).cancel(VolumeError::Stopping), "not begun");
    let mut io = read(&v, 0, 512 << 10);
    let parts: Vec<_> = std::iter::from_fn(|| io.next_part(Instant(0))).map(|p| p.part).collect();
    let no = |o| reply(o, ReplyData::None);
    assert!(matches!(io.reply(parts[0], no(Outcome::NotLeader), Instant(0)), Progress::Retry { .. }));
    assert!(!io.cancel(VolumeError::Stopping));
    assert!(io.next_part(FAR).is_none() && io.wake_at().is_none());
    let end = io.reply(parts[1], no(Outcome::NotLeader), Instant(0));
    assert!(matches!(end, Progress::Done(Err(VolumeError::Stopping))));
}

#[test]
fn errors_and_lengths() {
    let v = volume("v", shape(4 << 20, 1 << 20, 0, 0));
    let one = |answer: Reply| {
        let mut io = read(&v, 0, 4096);
        let part = io.next_part(Instant(0)).unwrap().part;
        match io.reply(part, answer, Instant(0)) {
            Progress::Done(result) => result.map(|p| joined(&p)),
            other => panic!("{other:?}"),
        }
    };
    let no = |o| reply(o, ReplyData::None);
    assert_eq!(one(no(Outcome::NoSpace)), Err(VolumeError::NoSpace));
    assert_eq!(one(no(Outcome::Stopping)), Err(VolumeError::Stopping));
    assert_eq!(one(no(Outcome::CrcFail)), Err(VolumeError::Chunk(Outcome::CrcFail)));
    assert_eq!(one(no(Outcome::DiskFail)), Err(VolumeError::Chunk(Outcome::DiskFail)), "nobody else has it");
    assert_eq!(one(no(Outcome::Success)), Err(VolumeError::WrongLength));
    let short = ReplyData::Data([Bytes::from_static(&[1; 100])].into_iter().collect());
    assert_eq!(one(reply(Outcome::Success, short)), Err(VolumeError::WrongLength));
    let new = |kind, offset, len| VolumeIo::new(&v, kind, offset, len, FAR).err();
    assert_eq!(new(IoKind::Read, 1, 4096), Some(VolumeError::Unaligned));
    assert_eq!(new(IoKind::Read, 0, 0), Some(VolumeError::Unaligned));
    assert_eq!(new(IoKind::Zero, 4 << 20, 4096), Some(VolumeError::BeyondEnd));
    assert_eq!(new(IoKind::Zero, u64::MAX - 4095, 8192), Some(VolumeError::BeyondEnd));
    assert_eq!(
        new(IoKind::write(Bytes::from_static(&[0; 4096]), BlockCrcs::new()), 0, 4096),
        Some(VolumeError::Unaligned)
    );
    v.mark_deleted();
    assert_eq!(new(IoKind::Read, 0, 4096), Some(VolumeError::Deleted));
}

#[test]
fn only_lost_attempts_are_counted_and_repetitions_go_on_counting() {
    let v = volume("v", shape(4 << 20, 1 << 20, 0, 0));
    let mut io = read(&v, 0, 4096);
    let mut now = Instant(0);
    let mut attempt = |io: &mut VolumeIo, lost: bool| {
        let part = io.next_part(now).expect("due");
        if lost {
            io.lost(part.part);
        }
        let progress = io.reply(part.part, reply(Outcome::NotLeader, ReplyData::None), now);
        assert!(matches!(progress, Progress::Retry { .. }));
        now = io.wake_at().unwrap();
        part.attempt
    };
    let seen = [false, false, true, false, true, true].map(|lost| attempt(&mut io, lost));
    assert_eq!((seen, io.lost_max()), ([0, 0, 0, 1, 1, 2], 3));
    let mut again = read(&v, 0, 4096).after(io.lost_max());
    assert_eq!((attempt(&mut again, true), attempt(&mut again, false), again.lost_max()), (3, 4, 4));
}

/// Pauses until a request that is always answered so is given up, 2 s after it was made.
fn pauses(outcome: Outcome) -> Vec<u64> {
    let v = volume("v", shape(4 << 20, 1 << 20, 0, 0));
    let deadline = Instant(0).after_ms(2000);
    let mut io = VolumeIo::new(&v, IoKind::Read, 0, 4096, deadline).unwrap();
    let (mut now, mut waits) = (Instant(0), Vec::new());
    let error = loop {
        let part = io.next_part(now).expect("due");
        assert_eq!((part.instance, part.attempt as usize), (0, waits.len()));
        io.lost(part.part);
        match io.reply(part.part, reply(outcome, ReplyData::None), now) {
            Progress::Retry { after_ms } => {
                assert!(io.next_part(now).is_none(), "not yet");
                waits.push(after_ms);
                assert!(waits.len() < 1000, "the deadline has passed");
                now = io.wake_at().unwrap();
            }
            Progress::Done(result) => break result.unwrap_err(),
            Progress::More => panic!("nothing else is in flight"),
        }
    };
    assert_eq!(error, VolumeError::TimedOut(outcome));
    waits
}

#[test]
fn back_off_depends_on_the_answer_and_ends_at_the_deadline() {
    assert_eq!(pauses(Outcome::Failed), [10, 20, 40, 80, 160, 320, 640, 640]);
    assert_eq!(pauses(Outcome::NotLeader), vec![10; 199], "a new leader is taken up at once");
    let overload = pauses(Outcome::Overload);
    assert!(overload.len() >= 4, "{overload:?}");
    for (got, want) in overload.into_iter().zip([100u64, 200, 400, 800]) {
        assert!(got >= want - want / 10 && got <= want + want / 10, "{got} for {want}");
    }
}

#[test]
fn deletion_ends_a_long_io() {
    let v = volume("v", shape(1 << 30, 1 << 20, 0, 0));
    let mut io = VolumeIo::new(&v, IoKind::Zero, 0, 1 << 30, FAR).unwrap();
    let parts: Vec<_> = std::iter::from_fn(|| io.next_part(Instant(0))).map(|p| p.part).collect();
    assert_eq!(parts.len(), PARTS_IN_FLIGHT_MAX);
    v.mark_deleted();
    for part in parts {
        match io.reply(part, reply(Outcome::Success, ReplyData::None), Instant(0)) {
            Progress::Done(result) => assert_eq!(result.err(), Some(VolumeError::Deleted)),
            _ => assert!(io.next_part(Instant(0)).is_none()),
        }
    }
    assert!(io.done);
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, u64, u8, bool),
    Read(u64, u64),
    Zero(u64, u64),
}
fn steps() -> impl Strategy<Value = Vec<Step>> {
    let at = 0u64..256;
    let len = 1u64..160;
    prop::collection::vec(
        prop_oneof![
            (at.clone(), len.clone(), any::<u8>(), any::<bool>()).prop_map(|(a, l, s, b)| Step::Write(a, l, s, b)),
            (at.clone(), len.clone()).prop_map(|(a, l)| Step::Read(a, l)),
            (at, len).prop_map(|(a, l)| Step::Zero(a, l)),
        ],
        1..30,
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn a_volume_is_a_flat_array_of_bytes(kind in 0usize..4, steps in steps(), seed in any::<u64>()) {
        let (chunk_size, unit, count) =
            [(64 << 10, 0, 0), (512 << 10, 0, 0), (16 << 10, 4096, 4), (64 << 10, 16 << 10, 2)][kind];
        let size = 1024 * K;
        let v = volume("v", shape(size, chunk_size, unit, count));
        let arena = Arena::new(16 << 20).unwrap();
        let (mut shard, mut dice, mut model) = (FakeShard::default(), Dice(seed), vec![0u8; size as usize]);
        for step in steps {
            let clip = |at: u64, len: u64| (at * 4096, (len * 4096).min(size - at * 4096));
            match step {
                Step::Write(at, len, stamp, by_extent) => {
                    let (at, len) = clip(at, len);
                    let data: Vec<u8> = (0..len).map(|i| stamp ^ (i / 512) as u8).collect();
                    model[at as usize..(at + len) as usize].copy_from_slice(&data);
                    let one = |d: &[u8]| Payload { data: pooled(&arena, d).freeze(), crcs: crcs(d) };
                    let payload = if by_extent {
                        let range = |e: Extent| e.at as usize..e.at as usize + e.len as usize;
                        v.geometry().extents(at, len).map(|e| one(&data[range(e)])).collect()
                    } else {
                        SmallVec::from_iter([one(&data)])
                    };
                    let io = VolumeIo::new(&v, IoKind::Write(payload), at, len, FAR).unwrap();
                    prop_assert!(drive(&mut shard, io, &mut dice).unwrap().is_empty());
                }
                Step::Read(at, len) => {
                    let (at, len) = clip(at, len);
                    let got = drive(&mut shard, read(&v, at, len), &mut dice).unwrap();
                    prop_assert!(joined(&got) == model[at as usize..(at + len) as usize]);
                }
                Step::Zero(at, len) => {
                    let (at, len) = clip(at, len);
                    model[at as usize..(at + len) as usize].fill(0);
                    let io = VolumeIo::new(&v, IoKind::Zero, at, len, FAR).unwrap();
                    drive(&mut shard, io, &mut dice).unwrap();
                }
            }
        }
        let all = drive(&mut shard, read(&v, 0, size), &mut dice).unwrap();
        prop_assert!(joined(&all) == model);
        prop_assert!(shard.longest <= EXTENT_BYTES_MAX);
    }
}
