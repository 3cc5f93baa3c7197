//! The retry rules, by a clock that only the test moves.

use std::sync::{Arc, Mutex};

use proto::nebd;

use super::*;

const MS: Duration = Duration::from_millis(1);
const OK: &[u8] = &[8, 0];
const REFUSED: &[u8] = &[8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1];

struct Bed {
    exchange: Exchange,
    now: Instant,
    outcomes: Arc<Mutex<Vec<(u32, Outcome)>>>,
    made: u32,
}

impl Bed {
    fn new() -> Self {
        let exchange = Exchange::new(Config::default());
        Self { exchange, now: Instant::now(), outcomes: Arc::default(), made: 0 }
    }

    fn up() -> Self {
        let mut bed = Self::new();
        bed.exchange.on_connected(bed.now);
        bed
    }

    fn submit(&mut self, body: Body, budget: Budget, buffer: Option<usize>) -> u32 {
        self.made += 1;
        let (number, outcomes) = (self.made, Arc::clone(&self.outcomes));
        let done = Box::new(move |outcome| outcomes.lock().unwrap().push((number, outcome)));
        let buffer = buffer.map(|size| ReadBuffer::Owned(vec![0; size]));
        let over = self.exchange.submit(Request { body, payload: Bytes::new(), buffer, budget, done });
        if let Some(over) = over {
            over.deliver();
        }
        number
    }

    fn flush(&mut self) -> u32 {
        self.submit(Body::Flush(nebd::FlushRequest { fd: 1 }), Budget::Forever, None)
    }

    fn sync(&mut self) -> u32 {
        self.submit(Body::Resize(nebd::ResizeRequest { fd: 1, new_size: 2 }), Budget::Attempts(50), None)
    }

    fn read(&mut self, size: usize) -> u32 {
        let body = Body::Read(nebd::ReadRequest { fd: 1, offset: 0, size: size as u64 });
        self.submit(body, Budget::Forever, Some(size))
    }

    /// Sends everything; the ids of what was sent.
    fn send(&mut self) -> Vec<i64> {
        let mut ids = Vec::new();
        while self.exchange.has_output() {
            let count = self.exchange.output().iter().map(|piece| piece.len()).sum();
            self.exchange.sent(count);
        }
        for (_, entry) in &self.exchange.entries {
            if entry.state == State::Sent {
                ids.push(entry.correlation_id);
            }
        }
        ids
    }

    fn reply(&mut self, id: i64, code: i32, body: &[u8], length: usize) -> Attachment {
        let body = Bytes::copy_from_slice(body);
        self.exchange.on_reply(id, code, body, length, self.now).unwrap()
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.exchange.poll(self.now);
    }

    /// Outcomes since the last call.
    fn over(&mut self) -> Vec<(u32, Outcome)> {
        let mut finished = VecDeque::new();
        self.exchange.take_finished(&mut finished);
        finished.into_iter().for_each(Finished::deliver);
        std::mem::take(&mut self.outcomes.lock().unwrap())
    }

    fn result(&mut self) -> Result<Reply, Error> {
        let mut over = self.over();
        assert_eq!(over.len(), 1, "{over:?}");
        over.remove(0).1.result
    }
}

#[test]
fn io_that_fails_waits_longer_each_time_and_never_gives_up() {
    let mut bed = Bed::up();
    bed.flush();
    // 100 ms, then 100 ms × the number of failures, at most 64 s.
    let pauses = [1, 2, 3, 4, 5, 6].map(|n| n * 100);
    for pause in pauses {
        let ids = bed.send();
        bed.reply(ids[0], 2001, &[], 0);
        bed.pass((pause - 1) * MS);
        assert!(!bed.exchange.has_output(), "{pause}");
        bed.pass(MS);
        assert!(bed.exchange.has_output(), "{pause}");
    }
    for _ in 0..700 {
        let ids = bed.send();
        bed.reply(ids[0], 0, &[], 0); // no retCode: no reply
        bed.pass(64_000 * MS);
    }
    let ids = bed.send();
    bed.reply(ids[0], 0, OK, 0);
    let over = bed.over();
    assert_eq!((&over[0].1.result, over[0].1.retries), (&Ok(Reply::Done), 706));
}

#[test]
fn a_lost_connection_costs_io_no_pause_and_no_longer_pauses_later() {
    let mut bed = Bed::up();
    bed.flush();
    for _ in 0..500 {
        bed.send();
        bed.exchange.on_broken(bed.now);
        assert_eq!(bed.exchange.connect_at(bed.now), bed.exchange.last_connect.map(|last| last + 10 * MS));
        bed.pass(10 * MS);
        bed.exchange.on_connect_failed(bed.now);
        bed.pass(10 * MS);
        bed.exchange.on_connected(bed.now);
    }
    // C++ would sleep 50 s now, as it counts those as failures.
    let ids = bed.send();
    bed.reply(ids[0], 2001, &[], 0);
    bed.pass(100 * MS);
    assert!(bed.exchange.has_output());
    // EHOSTDOWN by word of the server.
    let ids = bed.send();
    bed.reply(ids[0], 112, &[], 0);
    bed.pass(9 * MS);
    assert!(!bed.exchange.has_output());
    bed.pass(MS);
    let ids = bed.send();
    bed.reply(ids[0], 0, OK, 0);
    assert_eq!(bed.result(), Ok(Reply::Done));
}

#[test]
fn a_call_gives_up_after_its_attempts_some_five_seconds() {
    let mut bed = Bed::new();
    bed.sync();
    let began = bed.now;
    let last = loop {
        if bed.exchange.connect_at(bed.now).is_some_and(|at| at <= bed.now) {
            bed.exchange.on_connect_failed(bed.now);
        }
        if let [(_, outcome)] = &bed.over()[..] {
            break outcome.result.clone();
        }
        bed.pass(MS);
    };
    assert_eq!(last, Err(Error::Attempts { attempts: 50, last: Failure::HostDown }));
    let took = bed.now - began;
    assert!((4900 * MS..5500 * MS).contains(&took), "{took:?}");
    // Connected in time it is answered; what the answer says is final.
    bed.sync();
    bed.pass(10 * MS);
    bed.exchange.on_connect_failed(bed.now);
    bed.exchange.on_connected(bed.now);
    bed.pass(100 * MS);
    let ids = bed.send();
    bed.reply(ids[0], 0, REFUSED, 0);
    assert_eq!(bed.result(), Err(Error::Refused));
}

#[test]
fn a_keep_alive_is_tried_once_and_its_late_answer_ignored() {
    let mut bed = Bed::up();
    let until = bed.now + 500 * MS;
    let message = nebd::HeartbeatRequest { pid: 1, nebd_version: "v".into(), info: vec![] };
    bed.submit(Body::KeepAlive(message.clone()), Budget::Once(until), None);
    let ids = bed.send();
    assert_eq!(bed.exchange.deadline(bed.now), Some(until));
    bed.pass(500 * MS);
    assert_eq!(bed.result(), Err(Error::Attempts { attempts: 1, last: Failure::TimedOut }));
    bed.reply(ids[0], 0, OK, 0);
    assert_eq!((bed.exchange.stats.late_replies, bed.exchange.stats.heartbeats_failed), (1, 1));
    bed.submit(Body::KeepAlive(message), Budget::Once(bed.now + 500 * MS), None);
    let ids = bed.send();
    bed.reply(ids[0], 0, OK, 0);
    assert_eq!((bed.result(), bed.exchange.stats.heartbeats), (Ok(Reply::Done), 1));
    assert_eq!(bed.exchange.deadline(bed.now), None, "no timer is left");
}

#[test]
fn a_read_takes_exactly_its_bytes() {
    let mut bed = Bed::up();
    for length in [0, 4095, 4097, 64 << 20] {
        bed.read(4096);
        let ids = bed.send();
        assert!(matches!(bed.reply(ids[0], 0, OK, length), Attachment::Skip));
        assert!(matches!(bed.result(), Err(Error::Reply(_))), "{length}");
    }
    bed.read(4096);
    let ids = bed.send();
    let Attachment::Into(key, mut buffer) = bed.reply(ids[0], 0, OK, 4096) else { panic!() };
    buffer.as_mut_slice().fill(7);
    assert!(bed.over().is_empty());
    // The connection breaks while the bytes come: asked for again.
    bed.exchange.give_back(key, buffer);
    bed.exchange.on_broken(bed.now);
    bed.exchange.on_connected(bed.now);
    let ids = bed.send();
    let Attachment::Into(key, mut buffer) = bed.reply(ids[0], 0, OK, 4096) else { panic!() };
    buffer.as_mut_slice().fill(8);
    bed.exchange.on_attachment(key, buffer);
    let over = bed.over();
    assert!(matches!(&over[0].1.buffer, Some(ReadBuffer::Owned(bytes)) if bytes == &[8; 4096]));
    // Nothing asked for, nothing needed; a refusal needs no bytes either.
    bed.read(0);
    let ids = bed.send();
    bed.reply(ids[0], 0, OK, 0);
    assert_eq!(bed.result(), Ok(Reply::Done));
    bed.read(4096);
    let ids = bed.send();
    bed.reply(ids[0], 0, REFUSED, 0);
    assert_eq!(bed.result(), Err(Error::Refused));
}

#[test]
fn an_answer_needs_a_request_that_was_wholly_sent() {
    let mut bed = Bed::up();
    bed.flush();
    let id = bed.exchange.entries.iter().next().unwrap().1.correlation_id;
    let total: usize = bed.exchange.output().iter().map(|piece| piece.len()).sum();
    bed.exchange.sent(total - 1);
    let early = bed.exchange.on_reply(id, 0, Bytes::from_static(OK), 0, bed.now);
    assert_eq!(early.unwrap_err(), TooEarly);
    bed.exchange.sent(1);
    bed.reply(id ^ 1 << 40, 0, OK, 0);
    bed.reply(id ^ 1, 0, OK, 0);
    bed.reply(0, 0, OK, 0);
    assert!(bed.over().is_empty());
    bed.reply(id, 0, OK, 0);
    bed.reply(id, 0, REFUSED, 0);
    assert_eq!(bed.result(), Ok(Reply::Done));
    assert_eq!(bed.exchange.stats.late_replies, 4);
}

#[test]
fn a_stopping_server_may_answer_what_it_has_and_gets_nothing_new() {
    let mut bed = Bed::up();
    let (first, second) = (bed.flush(), bed.flush());
    let ids = bed.send();
    bed.reply(ids[0], ELOGOFF, &[], 0);
    let third = bed.flush();
    assert!(!bed.exchange.has_output() && !bed.exchange.is_left(bed.now));
    bed.reply(ids[1], 0, OK, 0);
    assert_eq!(bed.over()[0].0, second);
    assert!(bed.exchange.is_left(bed.now));
    bed.exchange.on_broken(bed.now);
    bed.exchange.on_connected(bed.now);
    for id in bed.send() {
        bed.reply(id, 0, OK, 0);
    }
    let mut over: Vec<u32> = bed.over().iter().map(|(number, _)| *number).collect();
    over.sort_unstable();
    assert_eq!(over, [first, third]);
    // One that neither answers nor closes is left after a while.
    let (_, _) = (bed.flush(), bed.flush());
    let ids = bed.send();
    bed.reply(ids[0], ELOGOFF, &[], 0);
    assert!(!bed.exchange.is_left(bed.now + 999 * MS) && bed.exchange.is_left(bed.now + 1000 * MS));
    assert_eq!(bed.exchange.deadline(bed.now), Some(bed.now + 1000 * MS));
}

#[test]
fn stopping_ends_everything_once() {
    let mut bed = Bed::up();
    let message = nebd::HeartbeatRequest { pid: 1, nebd_version: "v".into(), info: vec![] };
    bed.submit(Body::KeepAlive(message), Budget::Once(bed.now + MS), None);
    bed.read(4096);
    bed.sync();
    let ids = bed.send();
    bed.reply(ids[1], 2001, &[], 0); // waits for its next attempt
    bed.exchange.on_broken(bed.now);
    bed.read(0);
    bed.exchange.stop();
    bed.flush();
    let over = bed.over();
    assert_eq!(over.len(), 5);
    let ended = |(_, outcome): &(u32, Outcome)| outcome.result == Err(Error::Stopped);
    assert_eq!(over.iter().filter(|over| ended(over)).count(), 4, "the keep-alive fell with the connection");
    assert_eq!((bed.exchange.deadline(bed.now), bed.exchange.on_wire), (None, 0));
    assert!(bed.exchange.entries.is_empty() && bed.exchange.parked.is_empty() && !bed.exchange.has_output());
}

#[test]
fn what_no_frame_can_carry_is_refused_at_once() {
    let mut bed = Bed::up();
    let most = MAX_IO as usize;
    bed.read(most + 1);
    assert_eq!(bed.result(), Err(Error::TooLarge(MAX_IO + 1)));
    bed.read(most);
    assert_eq!(bed.send().len(), 1);
}
