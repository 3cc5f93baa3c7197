//! The bytes: a second implementation of the header, a golden hash, and hostile images.
#![allow(clippy::unwrap_used)]

mod common;

use bytes::Bytes;
use common::{Disk, Rng, UUID, checkpoint, entry, geometry, state};
use proptest::prelude::*;
use raftlog::{BLOCK, CopysetId, HardState, Limits, Log, Recovery};

const LIMITS: Limits = Limits { batch_bytes_max: 64 << 10, writes_in_flight: 2 };

/// docs/formats.md once more, from nothing but that text.
struct Head {
    flags: u16,
    generation: u64,
    seq: u64,
    durable: u64,
    live: u64,
    prev_crc: u32,
    offset: u64,
    count: u32,
    payload_len: u64,
}

fn encode(h: &Head, records: &[u8], header_len: usize) -> Vec<u8> {
    let mut rest = records.to_vec();
    rest.resize(header_len - 128, 0);
    let mut body = Vec::new();
    body.extend(1u16.to_le_bytes());
    body.extend(h.flags.to_le_bytes());
    body.extend(UUID);
    for v in [h.generation, h.seq, h.durable, h.live] {
        body.extend(v.to_le_bytes());
    }
    for v in [h.prev_crc, crc32c::crc32c(&rest), header_len as u32, h.count, records.len() as u32, 0] {
        body.extend(v.to_le_bytes());
    }
    body.extend(h.payload_len.to_le_bytes());
    body.extend(h.offset.to_le_bytes());
    body.resize(116, 0);
    let crc = crc32c::crc32c(&body).to_le_bytes();
    [b"RAFTLOG1".as_slice(), &crc, &body, &rest].concat()
}

fn record(kind: u8, flags: u16, copyset: u64, life: u64, tia: [u64; 3], payload_len: u32, context: &[u8]) -> Vec<u8> {
    let mut r = vec![kind, 0];
    r.extend(flags.to_le_bytes());
    r.extend((context.len() as u32).to_le_bytes());
    for v in [copyset, life, tia[0], tia[1], tia[2]] {
        r.extend(v.to_le_bytes());
    }
    r.extend(payload_len.to_le_bytes());
    r.extend([0; 4]);
    r.extend(context);
    r
}

/// One batch with a record of every kind.
fn sample() -> (Disk, Log) {
    let g = geometry(128 << 10, 3);
    let mut disk = Disk::new(&g);
    let mut log = disk.open(g, LIMITS);
    log.checkpoint(CopysetId(3), checkpoint(0, 0, 5));
    log.checkpoint(CopysetId(4), checkpoint(8, 2, 6));
    let hs = HardState { term: 3, vote: 9, commit: 8 };
    log.append(CopysetId(4), vec![entry(9, 3, 1, 1), entry(10, 3, 0, 2)], Some(hs));
    log.purge(CopysetId(3));
    disk.drain(&mut log);
    (disk, log)
}

#[test]
fn a_second_implementation_writes_the_same_bytes() {
    let (disk, _) = sample();
    let conf = |hs: [u64; 3]| [hs.map(u64::to_le_bytes).concat(), b"conf".to_vec()].concat();
    let e = [entry(9, 3, 1, 1), entry(10, 3, 0, 2)];
    let records = [
        record(3, 2, 3, 5, [0, 0, 0], 0, &conf([0, 1, 0])),
        record(3, 2, 4, 6, [2, 8, 8], 0, &conf([2, 1, 8])),
        record(1, 0, 4, 6, [3, 9, 2], 4096, &e[0].context),
        record(1, 0, 4, 6, [3, 10, 3], 0, &e[1].context),
        record(2, 0, 4, 6, [3, 8, 9], 0, &[]),
        record(4, 0, 3, 5, [0, 0, 0], 0, &[]),
    ];
    let head = Head {
        flags: 0,
        generation: 1,
        seq: 1,
        durable: 0,
        live: 1,
        prev_crc: 0,
        offset: 0,
        count: 6,
        payload_len: 4096,
    };
    let batch = [encode(&head, &records.concat(), BLOCK), e[0].payload.to_vec()].concat();
    assert!(disk.image[..batch.len()] == batch);
    assert_eq!(crc32c::crc32c(&batch), 4_230_694_093, "golden");
}

#[test]
fn crc_is_crc32c() {
    let mut rng = Rng(1);
    assert_eq!(raftlog::crc32c(b"123456789"), 0xe306_9283);
    for len in [0, 1, 7, 64, 511, 4096, 10_000] {
        let data: Vec<u8> = (0..len).map(|_| rng.next() as u8).collect();
        assert_eq!(raftlog::crc32c(&data), crc32c::crc32c(&data));
    }
}

/// Whatever recovery makes of it can be used: appended to, re-logged, written.
fn survives(disk: &mut Disk, segment: u64, count: u32) {
    let g = geometry(segment, count);
    let Ok((mut log, _)) = disk.recover(g, LIMITS) else { return };
    for id in log.copysets() {
        let index = log.index(id).unwrap();
        let (next, term) = (index.last_index() + 1, index.term(index.last_index()).unwrap());
        for (i, l) in index.not_resident() {
            assert!(l.offset + l.len as u64 <= log.capacity_bytes());
            assert_eq!(index.payload_len(i), Some(l.len));
        }
        let hs = index.hard_state();
        disk.restore(&mut log, id);
        log.append(id, vec![entry(next, term, 1, 3)], Some(hs));
        log.relog(id);
    }
    log.checkpoint(CopysetId(1000), checkpoint(0, 0, 1));
    disk.drain(&mut log);
    log.free_segments();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn noise_never_panics(seed: u64, zero in 0usize..4) {
        let mut rng = Rng(seed);
        let mut disk = Disk::new(&geometry(32 << 10, 4));
        for (nth, chunk) in disk.image.chunks_mut(8192).enumerate() {
            if nth % 4 != zero {
                chunk.fill_with(|| rng.next() as u8);
            }
        }
        survives(&mut disk, 32 << 10, 4);
    }

    #[test]
    fn damage_never_panics(seed: u64, hits in 1usize..20) {
        let mut rng = Rng(seed);
        let (mut disk, _) = sample();
        for _ in 0..hits {
            let at = rng.below(3 * BLOCK as u64) as usize;
            match rng.below(3) {
                0 => disk.image[at] ^= 1 << rng.below(8),
                1 => disk.image[at..at + 512].fill(rng.next() as u8),
                _ => {
                    let from = rng.below(2 * BLOCK as u64) as usize;
                    disk.image.copy_within(from..from + 600, at);
                }
            }
        }
        survives(&mut disk, 128 << 10, 3);
    }

    /// An adversary who knows the uuid and computes every CRC.
    #[test]
    fn forged_batches_never_panic(
        batches in prop::collection::vec((0u64..10, any::<u16>(), 0u64..40, any::<[u64; 4]>(), 0u64..8, 0u32..6), 1..12),
        records in prop::collection::vec((0u8..6, 0u16..4, 0u64..3, 1u64..3, any::<[u64; 3]>(), 0u32..4, 0usize..40), 0..12),
        small: bool,
    ) {
        let (segment, count) = (32u64 << 10, 4);
        let mut disk = Disk::new(&geometry(segment, count));
        let small_or = |v: u64| if small { v % 6 } else { v };
        for (nth, (generation, flags, block, wild, payload, n)) in batches.into_iter().enumerate() {
            let mut body = Vec::new();
            let mut sum = 0;
            for (kind, flag, id, life, tia, blocks, context) in records.iter().cycle().skip(nth).take((n as usize).min(records.len())) {
                let context = vec![7u8; context + 4 * *blocks as usize];
                sum += u64::from(*blocks) * 4096;
                body.extend(record(*kind, *flag, *id, *life, tia.map(small_or), blocks * 4096, &context));
            }
            let block = block % 32;
            let room = segment - block % 8 * 4096;
            let payload_len = if small { sum } else { payload * 4096 };
            let head = Head {
                flags: flags & 3,
                generation,
                seq: small_or(wild[0]) + u64::from(small) + nth as u64,
                durable: small_or(wild[1]).min(nth as u64 + small_or(wild[0])),
                live: small_or(wild[2]),
                prev_crc: 0,
                offset: block * 4096,
                count: n.min(records.len() as u32),
                payload_len: payload_len.min(room),
            };
            let bytes = encode(&head, &body, 4096.max((128 + body.len()).next_multiple_of(4096)));
            let end = (block as usize * BLOCK + bytes.len()).min(disk.image.len());
            let at = block as usize * BLOCK;
            disk.image[at..end].copy_from_slice(&bytes[..end - at]);
        }
        survives(&mut disk, segment, count);
    }
}

/// A log of record batches, one copyset each, from (generation, seq, live, prev_crc or "the right one").
fn forged(batches: &[(u64, u64, u64, Option<u32>)]) -> Vec<CopysetId> {
    let g = geometry(128 << 10, 3);
    let mut disk = Disk::new(&g);
    let mut prev = 0;
    for (nth, (generation, seq, live, crc)) in batches.iter().enumerate() {
        let conf = [0u8; 24];
        let body = record(3, 2, *seq, 1, [0, 0, 0], 0, &conf);
        let offset = (nth * BLOCK) as u64;
        let head = Head {
            flags: 0,
            generation: *generation,
            seq: *seq,
            durable: 0,
            live: *live,
            prev_crc: crc.unwrap_or(prev),
            offset,
            count: 1,
            payload_len: 0,
        };
        let bytes = encode(&head, &body, BLOCK);
        prev = u32::from_le_bytes(bytes[8..12].try_into().unwrap());
        disk.land(offset, &bytes);
    }
    disk.open(g, LIMITS).copysets()
}

#[test]
fn a_batch_counts_only_in_its_place_in_the_chain() {
    let ids = |n: &[u64]| n.iter().copied().map(CopysetId).collect::<Vec<_>>();
    assert_eq!(forged(&[(5, 1, 1, None), (5, 2, 1, None), (6, 3, 1, None)]), ids(&[1, 2, 3]));
    assert_eq!(forged(&[(5, 1, 1, None), (5, 2, 1, Some(77)), (5, 3, 1, None)]), ids(&[1]), "another predecessor");
    assert_eq!(forged(&[(5, 1, 1, None), (4, 2, 1, None)]), ids(&[1]), "an older generation");
    assert_eq!(forged(&[(5, 1, 1, None), (5, 3, 1, None)]), ids(&[1]), "a hole");
    assert_eq!(forged(&[(5, 1, 1, None), (u64::MAX, 2, 1, None)]), ids(&[1]), "a generation nobody counts to");
    assert_eq!(forged(&[(5, 1, 1, None), (5, 2, 2, None)]), ids(&[2]), "a copyset that died before live_seq");
}

#[test]
fn what_is_read_ahead_is_what_is_wanted_next() {
    let g = geometry(4 << 20, 6);
    let mut disk = Disk::new(&g);
    let mut log = Recovery::blank(g, LIMITS).unwrap();
    log.checkpoint(CopysetId(1), checkpoint(0, 0, 1));
    for index in 1..=40 {
        log.append(CopysetId(1), vec![entry(index, 1, 64, index)], None);
        disk.drain(&mut log);
    }
    let mut r = Recovery::new(g, LIMITS);
    let (mut expected, mut hits, mut reads) = (None, 0, 0);
    while let Some((offset, len)) = r.next_read() {
        hits += u32::from(expected == Some((offset, len)));
        reads += 1;
        expected = r.reads_ahead().nth(1);
        r.feed(Ok(&disk.image[offset as usize..offset as usize + len]));
    }
    // All but the ends of segments, of which a little is left unused and not read.
    assert!(reads > 12 && reads - hits <= 6, "{hits} of {reads}");
    r.finish().unwrap();
}

#[test]
fn impossible_geometries_are_refused() {
    for g in [geometry(4096, 4), geometry(20_000, 4), geometry(1 << 20, 1), geometry(!4095, 4), geometry(0, 0)] {
        let r = Recovery::new(g, LIMITS);
        assert_eq!(r.next_read(), None);
        assert!(r.finish().is_err());
    }
    let mut r = Recovery::new(geometry(1 << 20, 2), LIMITS);
    assert!(r.next_read().is_some());
    r.feed(Ok(&[1, 2, 3]));
    assert!(matches!(r.finish(), Err(raftlog::RecoverError::Unfinished)));
}

#[test]
fn payload_that_is_a_copy_of_a_batch_is_not_a_batch() {
    let g = geometry(128 << 10, 3);
    let (mut disk, mut log) = sample();
    let id = CopysetId(4);
    let mut e = entry(11, 3, 2, 5);
    e.payload = Bytes::copy_from_slice(&disk.image[..2 * BLOCK]);
    let crcs =
        e.payload.as_chunks::<BLOCK>().0.iter().flat_map(|b| crc32c::crc32c(b).to_le_bytes()).collect::<Vec<u8>>();
    e.context = crcs.into();
    log.append(id, vec![e], None);
    disk.drain(&mut log);
    let at = log.index(id).unwrap().location(11).unwrap().offset as usize - BLOCK;
    disk.image[at] ^= 1; // its header is gone: recovery looks for the next one
    let again = disk.open(g, LIMITS);
    assert_eq!(again.index(id).unwrap().last_index(), 10);
    assert_eq!(state(&again, &disk)[&id].entries.len(), 2);
}
