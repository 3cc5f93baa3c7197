//! Tests of the model of what a server may answer.

use super::*;

const CHUNKS: [ChunkAddr; 2] =
    [ChunkAddr { pool: 1, copyset: 2, chunk: 10 }, ChunkAddr { pool: 1, copyset: 3, chunk: 11 }];

fn model(initial: Initial) -> Model {
    Model::new(77, 5, initial, &CHUNKS, 8, (1, 1))
}

fn payload(model: &Model, chunk: usize, block: u32, seq: u64) -> Vec<u8> {
    let mut data = vec![0; BLOCK];
    model.fill(chunk, block, seq, &mut data);
    data
}

fn write(model: &mut Model, block: u32) -> u64 {
    let seq = model.begin_write(0, block, 1);
    model.end_write(0, block, 1, seq);
    seq
}

fn end(model: &mut Model, token: ReadToken, block: u32, data: Option<&[u8]>) -> Option<Wrong> {
    let mut wrong = None;
    model.end_read(token, 0, (block, 1), data, &mut |violation| wrong = Some(violation.kind));
    wrong
}

fn read(model: &mut Model, block: u32, data: Option<&[u8]>) -> Option<Wrong> {
    let token = model.begin_read();
    end(model, token, block, data)
}

#[test]
fn planted_faults_are_named_and_the_right_block_is_not_one() {
    let mut m = model(Initial::Zero);
    assert_eq!(read(&mut m, 0, None), None, "a chunk that does not exist reads as zeros");
    let old = write(&mut m, 0);
    let new = write(&mut m, 0);
    let good = payload(&m, 0, 0, new);
    assert_eq!(read(&mut m, 0, Some(&good)), None);
    let stale = payload(&m, 0, 0, old);
    assert_eq!(read(&mut m, 0, Some(&stale)), Some(Wrong::Stale));
    assert_eq!(read(&mut m, 0, None), Some(Wrong::Lost));
    assert_eq!(read(&mut m, 0, Some(&[0; BLOCK])), Some(Wrong::Lost));
    let mut torn = good.clone();
    torn[2048..].copy_from_slice(&stale[2048..]);
    assert_eq!(read(&mut m, 0, Some(&torn)), Some(Wrong::Garbage));
    assert_eq!(read(&mut m, 0, Some(&good[..512])), Some(Wrong::Garbage), "cut short");
    let elsewhere = payload(&m, 0, 1, new);
    assert_eq!(read(&mut m, 0, Some(&elsewhere)), Some(Wrong::Misplaced));
    let other_copyset = payload(&m, 1, 0, new);
    assert_eq!(read(&mut m, 0, Some(&other_copyset)), Some(Wrong::Misplaced));
    let foreign = Model::new(78, 5, Initial::Zero, &CHUNKS, 8, (1, 1));
    let foreign = payload(&foreign, 0, 0, new);
    assert_eq!(read(&mut m, 0, Some(&foreign)), Some(Wrong::Foreign));
    let future = payload(&m, 0, 0, new + 1);
    assert_eq!(read(&mut m, 0, Some(&future)), Some(Wrong::NeverWritten));
}

#[test]
fn unknown_initial_content_is_legal_only_until_the_first_answered_write() {
    let mut m = model(Initial::Unknown);
    let foreign = Model::new(78, 5, Initial::Zero, &CHUNKS, 8, (1, 1));
    let foreign = payload(&foreign, 0, 0, 9);
    assert_eq!(read(&mut m, 0, Some(&foreign)), None);
    assert_eq!(read(&mut m, 0, Some(&[7; BLOCK])), None);
    let mine = payload(&m, 0, 0, 4);
    assert_eq!(read(&mut m, 0, Some(&mine)), Some(Wrong::NeverWritten), "it claims to be ours");
    write(&mut m, 0);
    assert_eq!(read(&mut m, 0, Some(&foreign)), Some(Wrong::Foreign));
    assert_eq!(read(&mut m, 0, Some(&[7; BLOCK])), Some(Wrong::Garbage));
}

#[test]
fn a_read_beside_a_write_may_return_either_but_not_go_back() {
    let mut m = model(Initial::Zero);
    let old = write(&mut m, 3);
    let (before, during) = (m.begin_read(), m.begin_read());
    let new = m.begin_write(0, 3, 1);
    let (old, new_data) = (payload(&m, 0, 3, old), payload(&m, 0, 3, new));
    assert_eq!(end(&mut m, during, 3, Some(&old)), None);
    assert_eq!(read(&mut m, 3, Some(&new_data)), None, "visible before it is answered");
    assert_eq!(read(&mut m, 3, Some(&old)), Some(Wrong::Stale), "and then not the old one again");
    assert_eq!(end(&mut m, before, 3, Some(&old)), None, "but a read that began earlier may still return it");
    m.end_write(0, 3, 1, new);
    assert_eq!(read(&mut m, 3, Some(&new_data)), None);
}

#[test]
fn two_writes_at_once_end_in_any_order_that_reads_agree_on() {
    let mut m = model(Initial::Zero);
    let (a, b) = (m.begin_write(0, 2, 1), m.begin_write(0, 2, 1));
    m.end_write(0, 2, 1, b);
    m.end_write(0, 2, 1, a);
    let (a, b) = (payload(&m, 0, 2, a), payload(&m, 0, 2, b));
    assert_eq!(read(&mut m, 2, None), Some(Wrong::Lost));
    assert_eq!(read(&mut m, 2, Some(&a)), None);
    assert_eq!(read(&mut m, 2, Some(&b)), Some(Wrong::Stale), "the first read decided it");
    assert_eq!(read(&mut m, 2, Some(&a)), None);
}

#[test]
fn unanswered_writes_stay_possible_and_a_restart_settles_them() {
    let mut m = model(Initial::Zero);
    let acked = write(&mut m, 0);
    let open = m.begin_write(0, 0, 1);
    let (acked_data, open_data) = (payload(&m, 0, 0, acked), payload(&m, 0, 0, open));
    assert_eq!(read(&mut m, 0, Some(&acked_data)), None);
    let saved = m.save();
    assert_eq!(saved, [(CHUNKS[0], vec![(0, vec![acked], vec![open])])]);

    let settle = |data: &[u8]| {
        let mut m = Model::new(77, 5, Initial::Zero, &CHUNKS, 8, (open + 1, 1));
        assert!(m.restore(saved[0].0, &saved[0].1));
        let mut wrong = Vec::new();
        let survival = m.settle(0, (0, 1), Some(data), &mut |violation| wrong.push(violation.kind));
        (m, survival, wrong)
    };
    let (mut m, survival, wrong) = settle(&open_data);
    assert_eq!((survival, wrong.len()), (Survival { survived: 1, vanished: 0, hidden: 0 }, 0));
    assert_eq!(read(&mut m, 0, Some(&acked_data)), Some(Wrong::Stale));
    let (mut m, survival, wrong) = settle(&acked_data);
    assert_eq!((survival, wrong.len()), (Survival { survived: 0, vanished: 1, hidden: 0 }, 0));
    assert_eq!(read(&mut m, 0, Some(&open_data)), Some(Wrong::NeverWritten), "gone is gone");
    let (_, _, wrong) = settle(&[0; BLOCK]);
    assert_eq!(wrong, [Wrong::Lost]);
}

#[test]
fn a_write_that_was_seen_is_done_and_cannot_come_back() {
    let mut m = model(Initial::Zero);
    let open = m.begin_write(0, 4, 1);
    let open_data = payload(&m, 0, 4, open);
    assert_eq!(read(&mut m, 4, Some(&open_data)), None);
    let acked = write(&mut m, 4);
    let acked_data = payload(&m, 0, 4, acked);
    assert_eq!(read(&mut m, 4, Some(&open_data)), Some(Wrong::Stale), "seen, then overwritten");
    assert_eq!(read(&mut m, 4, Some(&acked_data)), None);
    let unseen = m.begin_write(0, 4, 1);
    let (unseen_data, last) = (payload(&m, 0, 4, unseen), write(&mut m, 4));
    assert_eq!(read(&mut m, 4, Some(&unseen_data)), None, "one that was never seen may come late");
    let last = payload(&m, 0, 4, last);
    assert_eq!(read(&mut m, 4, Some(&last)), Some(Wrong::Stale), "and then it is the newest");
}

#[test]
fn a_hot_block_with_reads_always_in_flight_does_not_grow_its_history() {
    let mut m = model(Initial::Zero);
    let mut token = m.begin_read();
    let mut last = 0;
    for _ in 0..1000 {
        let next = m.begin_read();
        if last != 0 {
            let data = payload(&m, 0, 1, last);
            assert_eq!(end(&mut m, token, 1, Some(&data)), None);
        } else {
            m.cancel_read(token);
        }
        token = next;
        last = write(&mut m, 1);
    }
    assert!(m.chunks[0].blocks[1].writes.len() < 8 && m.reads.len() < 8);
}

proptest::proptest! {
    /// A register that applies each write at some moment between issue and answer never trips the checker.
    #[test]
    fn an_honest_register_is_never_accused(script in proptest::collection::vec((0u8..6, 0usize..4), 1..200)) {
        let mut m = model(Initial::Zero);
        let mut register: Option<u64> = None;
        let mut writes: Vec<(u64, bool)> = Vec::new();
        let mut reads: Vec<(ReadToken, Option<Option<u64>>)> = Vec::new();
        for (step, pick) in script {
            match step {
                0 => writes.push((m.begin_write(0, 5, 1), false)),
                1 => if let Some(write) = writes.get_mut(pick) && !write.1 {
                    register = Some(write.0);
                    write.1 = true;
                },
                2 => if writes.get(pick).is_some_and(|write| write.1) {
                    let (seq, _) = writes.remove(pick);
                    m.end_write(0, 5, 1, seq);
                },
                3 => reads.push((m.begin_read(), None)),
                4 => if let Some(read) = reads.get_mut(pick) {
                    read.1 = Some(register);
                },
                _ => if reads.get(pick).is_some_and(|read| read.1.is_some()) {
                    let (token, value) = reads.remove(pick);
                    let data = value.flatten().map(|seq| payload(&m, 0, 5, seq));
                    proptest::prop_assert_eq!(end(&mut m, token, 5, data.as_deref()), None);
                },
            }
        }
    }
}
