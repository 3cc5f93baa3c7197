//! The client against a server that behaves, misbehaves, dies and comes back.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may panic")]

mod fake;

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use fake::{Act, Fake, KNOOK, VOLUME};
use nebd::{Config, Error, Failure, Io, NebdClient, NebdFd, OpenFlags, ReadBuffer, block_on};

const NAME: &str = "cbd:pool//v1_u_";
const MS: Duration = Duration::from_millis(1);

fn client(fake: &Fake) -> NebdClient {
    NebdClient::new(Config::load(&fake.conf(&[])).unwrap()).unwrap()
}

fn pattern(seed: usize, length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 31 + at / 251 + seed * 7) as u8).collect()
}

#[test]
fn every_call_does_what_it_says() {
    let fake = Fake::start(|_, _| Act::Serve);
    let client = client(&fake);
    let fd = block_on(client.open(NAME, Some(OpenFlags { exclusive: true }))).unwrap();
    assert_eq!(fd, NebdFd(1));
    assert_eq!(block_on(client.file_size(fd)), Ok(VOLUME as u64));
    assert_eq!(block_on(client.block_size(fd)), Ok(4096));
    assert_eq!(block_on(client.get_info(fd)).unwrap().object_size, 1 << 20);
    let data = pattern(1, 12288);
    block_on(client.write(fd, 4096, data.clone().into())).unwrap();
    assert_eq!(fake.volume(4096, 12288), data);
    assert_eq!(block_on(client.read(fd, 8192, 4096)).unwrap(), data[4096..8192]);
    block_on(client.discard(fd, 4096, 4096)).unwrap();
    assert_eq!(block_on(client.read(fd, 4096, 4096)).unwrap(), [0; 4096]);
    block_on(client.flush(fd)).unwrap();
    block_on(client.extend(fd, 1 << 30)).unwrap();
    block_on(client.invalidate_cache(fd)).unwrap();
    assert_eq!(block_on(client.read(fd, 4096, 0)).unwrap(), []);
    assert_eq!(block_on(client.write(fd, VOLUME as u64, data.into())), Err(Error::Refused));
    block_on(client.close(fd)).unwrap();
    let seen = fake.seen();
    assert_eq!(seen[0].bytes(1).unwrap(), NAME.as_bytes());
    assert_eq!(seen[0].bytes(2).unwrap(), [8, 1]);
    let resize = seen.iter().find(|seen| seen.method == "ResizeFile").unwrap();
    assert_eq!((resize.number(1), resize.number(2)), (Some(1), Some(1 << 30)));
    let log_ids: Vec<u64> = seen.iter().map(|seen| seen.log_id).collect();
    assert_eq!(log_ids, (1..=seen.len() as u64).collect::<Vec<_>>());
    assert_eq!(fake.connections(), 1);
}

#[test]
fn requests_are_the_bytes_of_the_cpp_client() {
    // Frames of the recording, but for ids and log ids, which are the client's to choose.
    let recorded = fake::requests(&fake::capture("nebd-heartbeat-c2s.bin"));
    let fake = Fake::start(|_, seen| match seen.method.as_str() {
        "OpenFile" => Act::Message(vec![8, 0, 0x18, 5]),
        _ => Act::Serve,
    });
    let client = NebdClient::new(Config::load(&fake.conf(&[("heartbeat.intervalS", "1")])).unwrap()).unwrap();
    let name = "cbd:pool1//vol1_user_:/etc/curve/client.conf";
    let mut fd = NebdFd(0);
    for request in &recorded {
        let at = request.number(2).unwrap_or(0);
        match request.method.as_str() {
            "OpenFile" => fd = block_on(client.open(name, Some(OpenFlags { exclusive: false }))).unwrap(),
            "GetInfo" => drop(block_on(client.get_info(fd)).unwrap()),
            "Write" => block_on(client.write(fd, at, request.attachment.clone().into())).unwrap(),
            "Read" => drop(block_on(client.read(fd, at, request.number(3).unwrap() as usize)).unwrap()),
            "KeepAlive" => {
                let began = Instant::now();
                while client.stats().heartbeats == 0 {
                    assert!(began.elapsed() < Duration::from_secs(60));
                    thread::sleep(MS);
                }
            }
            "CloseFile" => block_on(client.close(fd)).unwrap(),
            other => panic!("{other}"),
        }
    }
    let seen = fake.seen();
    // A keep-alive may come at any time.
    let of = |list: &[fake::Seen]| -> Vec<fake::Seen> {
        list.iter().filter(|seen| seen.method != "KeepAlive").cloned().collect()
    };
    let (ours, theirs) = (of(&seen), of(&recorded));
    assert_eq!(ours.len(), theirs.len());
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert_eq!((&ours.service, &ours.method), (&theirs.service, &theirs.method));
        assert_eq!(ours.message, theirs.message, "{}", ours.method);
        assert_eq!(ours.attachment, theirs.attachment);
        assert_eq!(ours.meta, theirs.meta, "the same fields in the same order");
    }
    let beat = |list: &[fake::Seen]| list.iter().find(|seen| seen.method == "KeepAlive").cloned().unwrap();
    let (ours, theirs) = (beat(&seen), beat(&recorded));
    assert_eq!((ours.service.clone(), ours.log_id), (theirs.service.clone(), theirs.log_id));
    assert_eq!((ours.bytes(3), &ours.meta), (theirs.bytes(3), &theirs.meta));
    assert_eq!(ours.number(1), Some(u64::from(std::process::id())));
}

/// Makes the recorded requests once more and answers them with the recorded answers.
fn replay(name: &str) -> (usize, usize) {
    let recorded = fake::requests(&fake::capture(&format!("nebd-{name}-c2s.bin")));
    let answers = fake::responses(&fake::capture(&format!("nebd-{name}-s2c.bin")));
    let next: Arc<Mutex<Option<fake::Response>>> = Arc::default();
    let planned = Arc::clone(&next);
    let fake = Fake::start(move |_, seen| match planned.lock().unwrap().take() {
        Some(answer) => Act::Raw(fake::frame(0, &answer.message, seen.id, &answer.attachment)),
        None => Act::Serve,
    });
    let client = client(&fake);
    let (mut good, mut refused) = (0, 0);
    for request in recorded.iter().filter(|request| request.method != "KeepAlive") {
        let answer = answers.iter().find(|answer| answer.id == request.id).unwrap().clone();
        let ok = answer.message.starts_with(&[8, 0]);
        *next.lock().unwrap() = Some(answer.clone());
        let (fd, offset) = (NebdFd(request.number(1).unwrap_or(0) as i32), request.number(2).unwrap_or(0));
        let length = request.number(3).unwrap_or(0);
        let result = match request.method.as_str() {
            "OpenFile" => {
                let name = String::from_utf8(request.bytes(1).unwrap()).unwrap();
                let flags = request.bytes(2).map(|flags| OpenFlags { exclusive: flags == [8, 1] });
                let opened = block_on(client.open(&name, flags));
                opened.map(|fd| assert_eq!(answer.message, [8, 0, 0x18, fd.0 as u8]))
            }
            "CloseFile" => {
                assert_eq!(block_on(client.close(fd)), Ok(()), "whatever the server said");
                if ok { Ok(()) } else { Err(Error::Refused) }
            }
            "GetInfo" => block_on(client.get_info(fd)).map(|info| {
                assert_eq!((info.size, info.block_size), (64 << 20, 4096));
            }),
            "Read" => {
                let read = block_on(client.read(fd, offset, length as usize));
                read.map(|bytes| assert!(bytes == answer.attachment && bytes.len() == length as usize))
            }
            "Write" => block_on(client.write(fd, offset, request.attachment.clone().into())),
            "Discard" => block_on(client.discard(fd, offset, length)),
            "Flush" => block_on(client.flush(fd)),
            "InvalidateCache" => block_on(client.invalidate_cache(fd)),
            "ResizeFile" => block_on(client.extend(fd, offset)),
            other => panic!("{other}"),
        };
        assert_eq!(result, if ok { Ok(()) } else { Err(Error::Refused) }, "{request:?}");
        *(if ok { &mut good } else { &mut refused }) += 1;
        let seen = fake.seen();
        let ours = seen.iter().rfind(|seen| seen.method != "KeepAlive").unwrap();
        assert_eq!((&ours.service, &ours.method), (&request.service, &request.method));
        assert_eq!((&ours.message, &ours.attachment), (&request.message, &request.attachment));
    }
    (good, refused)
}

#[test]
fn recorded_connections_replay() {
    assert_eq!(replay("open-missing"), (0, 1));
    assert_eq!(replay("heartbeat"), (10, 0));
    let (good, refused) = replay("verify");
    assert!(good > 50 && refused > 3, "{good} {refused}");
}

#[test]
fn many_at_once_on_one_connection_answered_in_any_order() {
    let fake = Fake::start(|count, _| if count % 3 == 1 { Act::After(MS * (count % 5) as u32) } else { Act::Serve });
    let client = Arc::new(client(&fake));
    let threads: Vec<_> = (0..4)
        .map(|thread| {
            let client = Arc::clone(&client);
            thread::spawn(move || {
                let fd = NebdFd(1);
                for round in 0..8 {
                    let sizes = [4096, 512, 100_000, 1 << 20];
                    let at = |n: usize| ((thread * 4 + n) << 18) as u64;
                    // No two overlap.
                    let size = |n: usize| sizes[(n + round) % 4].min(1 << 18);
                    let writes: Vec<_> =
                        (0..3).map(|n| client.write(fd, at(n), pattern(n + round, size(n)).into())).collect();
                    for write in writes {
                        block_on(write).unwrap();
                    }
                    let reads: Vec<_> = (0..3).map(|n| client.read(fd, at(n), size(n))).collect();
                    for (n, read) in reads.into_iter().enumerate() {
                        assert!(block_on(read).unwrap() == pattern(n + round, size(n)), "{thread} {round} {n}");
                    }
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    assert_eq!((fake.connections(), client.stats().late_replies), (1, 0));
}

#[test]
fn callbacks_submit_and_wait_for_calls() {
    let fake = Fake::start(|_, _| Act::Serve);
    let client = Arc::new(client(&fake));
    let (sender, receiver) = mpsc::channel();
    // A chain of reads, each submitted by the one before it; in between a callback that blocks on a call.
    fn next(client: &Arc<NebdClient>, left: usize, done: mpsc::Sender<thread::ThreadId>) {
        let (again, buffer) = (Arc::clone(client), ReadBuffer::Owned(vec![0; 4096]));
        client.submit(NebdFd(1), Io::Read { offset: 0, buffer }, move |completion| {
            completion.result.unwrap();
            if left % 10 == 5 {
                assert_eq!(block_on(again.file_size(NebdFd(1))), Ok(VOLUME as u64));
            }
            if left == 0 { done.send(thread::current().id()).unwrap() } else { next(&again, left - 1, done) }
        });
    }
    for _ in 0..8 {
        next(&client, 40, sender.clone());
    }
    for _ in 0..8 {
        receiver.recv_timeout(Duration::from_secs(60)).unwrap();
    }
    // One that panics does not end the others, nor the client.
    client.submit(NebdFd(1), Io::Flush, |_| panic!("on purpose"));
    block_on(client.flush(NebdFd(1))).unwrap();
    // The last owner may be a callback.
    let (last, sent) = (Arc::clone(&client), sender);
    drop(client);
    let weak = Arc::downgrade(&last);
    let own = Arc::clone(&last);
    last.submit(NebdFd(1), Io::Flush, move |completion| {
        drop(own);
        completion.result.unwrap();
        sent.send(thread::current().id()).unwrap();
    });
    drop(last);
    receiver.recv_timeout(Duration::from_secs(60)).ok();
    assert!(weak.upgrade().is_none());
}

#[test]
fn a_callback_waits_for_a_completion_that_came_with_its_own() {
    let fake = Fake::start(|_, _| Act::Mute);
    let client = client(&fake);
    let (sender, receiver) = mpsc::channel();
    let (give, second) = mpsc::channel();
    client.submit(NebdFd(1), Io::Flush, move |_| sender.send(block_on(second.recv().unwrap())).unwrap());
    give.send(client.flush(NebdFd(1))).unwrap();
    // Both end at once, in this order.
    client.shutdown();
    assert_eq!(receiver.recv_timeout(Duration::from_secs(20)), Ok(Err(Error::Stopped)));
}

#[test]
fn io_survives_a_server_that_dies_and_comes_back() {
    let mut fake = Fake::start(|count, _| match count % 50 {
        20 => Act::Close { executed: false },
        40 => Act::Close { executed: true },
        45 => Act::Half,
        _ => Act::Serve,
    });
    let client = Arc::new(client(&fake));
    let fd = block_on(client.open(NAME, None)).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let (theirs, over) = (Arc::clone(&client), Arc::clone(&stop));
    let worker = thread::spawn(move || {
        let mut round = 0;
        while !over.load(Ordering::SeqCst) {
            let writes: Vec<_> =
                (0..16).map(|n| theirs.write(fd, n * 4096, pattern(round + n as usize, 4096).into())).collect();
            writes.into_iter().for_each(|write| block_on(write).unwrap());
            let reads: Vec<_> = (0..16).map(|n| theirs.read(fd, n * 4096, 4096)).collect();
            for (n, read) in reads.into_iter().enumerate() {
                assert_eq!(block_on(read).unwrap(), pattern(round + n, 4096));
            }
            round += 1;
        }
        round
    });
    for _ in 0..3 {
        thread::sleep(200 * MS);
        fake.stop();
        thread::sleep(100 * MS);
        fake.up();
    }
    thread::sleep(200 * MS);
    stop.store(true, Ordering::SeqCst);
    assert!(worker.join().unwrap() > 3);
    let stats = client.stats();
    assert!(stats.disconnects >= 3 && stats.retries > 0 && stats.connects == stats.disconnects + 1, "{stats:?}");
    block_on(client.close(fd)).unwrap();
}

#[test]
fn nothing_is_sent_before_the_server_is_needed_and_calls_give_up() {
    let mut fake = Fake::down(|_, _| Act::Serve);
    let client = client(&fake);
    let began = Instant::now();
    let error = block_on(client.open(NAME, None)).unwrap_err();
    assert_eq!(error, Error::Attempts { attempts: 50, last: Failure::HostDown });
    assert!((Duration::from_millis(4900)..Duration::from_secs(30)).contains(&began.elapsed()));
    assert_eq!(std::fs::read_dir(fake.folder.path().join("lock")).unwrap().count(), 0);
    // I/O does not give up, and a server that comes is found soon.
    let write = client.write(NebdFd(1), 0, vec![1; 4096].into());
    thread::sleep(300 * MS);
    fake.up();
    block_on(write).unwrap();
    assert_eq!(fake.connections(), 1);
}

#[test]
fn hostile_bytes_never_pass_for_an_answer() {
    let good = |seen: &fake::Seen, attachment: &[u8]| fake::frame(0, &[8, 0], seen.id, attachment);
    let huge = |body: u32, meta: u32| [b"PRPC", &body.to_be_bytes()[..], &meta.to_be_bytes()].concat();
    type Make = Box<dyn Fn(&fake::Seen) -> Act + Send + Sync>;
    let cases: Vec<(&str, Make)> = vec![
        ("garbage", Box::new(|_| Act::Raw(b"\xff\xfe\xfd garbage that is no frame".to_vec()))),
        ("http", Box::new(|_| Act::Raw(b"GET / HTTP/1.1\r\n\r\n".to_vec()))),
        ("http answer", Box::new(|_| Act::Raw(b"HTTP/1.1 200 OK\r\n\r\n".to_vec()))),
        ("too large", Box::new(move |_| Act::Raw(huge(u32::MAX, 12)))),
        ("meta beyond body", Box::new(move |_| Act::Raw(huge(12, 13)))),
        ("no meta", Box::new(move |_| Act::Raw([huge(3, 3), vec![0xff; 3]].concat()))),
        ("a request", Box::new(|seen| Act::Raw(seen.frame.clone()))),
        ("half an answer", Box::new(|_| Act::Half)),
        ("RPC error", Box::new(|_| Act::Rpc(2001))),
        ("host down", Box::new(|_| Act::Rpc(112))),
        ("empty message", Box::new(|_| Act::Message(vec![]))),
        ("unknown retCode", Box::new(|_| Act::Message(vec![8, 7]))),
        ("no protobuf", Box::new(|_| Act::Message(vec![0xff; 9]))),
        (
            "another id first",
            Box::new(move |seen| {
                let other = fake::frame(0, &[8, 0], seen.id ^ 1 << 33, &[9; 4096]);
                Act::Raw([other, good(seen, &[1; 4096])].concat())
            }),
        ),
        (
            "bad attachment size",
            Box::new(move |seen| {
                let mut frame = good(seen, &[1; 200]);
                let at = frame.windows(3).position(|bytes| bytes == [0x28, 0xc8, 1]).unwrap();
                frame[at + 2] = 0x7f;
                Act::Raw(frame)
            }),
        ),
        ("logoff", Box::new(|_| Act::Rpc(2003))),
    ];
    for (name, make) in cases {
        let fake = Fake::start(move |count, seen| if count == 0 { make(seen) } else { Act::Attach(vec![1; 4096]) });
        let client = client(&fake);
        let read = client.read(NebdFd(1), 0, 4096);
        assert_eq!(block_on(read).unwrap(), [1; 4096], "{name}");
    }
}

#[test]
fn mutilated_answers_are_refusals_or_are_asked_for_again() {
    // Every other request gets a mutilated answer. Each byte of it is hit, by each bit, and it is cut at each place.
    let mutilated = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&mutilated);
    let answer = |id| fake::frame(0, &[8, 0], id, &[]);
    let (length, turn) = (answer(1 << 33).len(), AtomicBool::new(false));
    let total = length * 9;
    let fake = Fake::start(move |_, seen| {
        if !turn.fetch_not(Ordering::SeqCst) {
            return Act::Serve;
        }
        let n = count.fetch_add(1, Ordering::SeqCst);
        let mut bytes = answer(seen.id);
        let at = n / 9 % bytes.len();
        match n % 9 {
            8 => bytes.truncate(at),
            bit => bytes[at] ^= 1 << bit,
        }
        Act::Last(bytes)
    });
    let mut config = Config::load(&fake.conf(&[])).unwrap();
    (config.host_down_interval, config.retry_interval) = (MS, MS);
    let client = NebdClient::new(config).unwrap();
    while mutilated.load(Ordering::SeqCst) < total {
        let result = block_on(client.flush(NebdFd(1)));
        assert!(matches!(result, Ok(()) | Err(Error::Refused)), "{result:?}");
    }
    assert!(client.stats().retries > total as u64 / 2);
}

#[test]
fn a_read_gets_exactly_its_bytes_or_fails() {
    for length in [0, 1, 4095, 4097, 100_000] {
        let fake = Fake::start(move |count, _| if count == 0 { Act::Attach(vec![1; length]) } else { Act::Serve });
        let client = client(&fake);
        let failed = block_on(client.read(NebdFd(1), 0, 4096));
        assert!(matches!(failed, Err(Error::Reply(_))), "{length}: {failed:?}");
        // The stream goes on behind the bytes nobody wanted.
        assert_eq!(block_on(client.read(NebdFd(1), 0, 4096)).unwrap(), [0; 4096]);
        assert_eq!(fake.connections(), 1);
    }
}

#[test]
fn answers_that_come_twice_late_or_not_at_all() {
    let fake = Fake::start(|count, _| match count {
        0 => Act::Twice,
        1 => Act::Mute,
        2 => Act::AsId(12345),
        _ => Act::Serve,
    });
    let client = client(&fake);
    let fd = NebdFd(1);
    block_on(client.flush(fd)).unwrap();
    let mute = client.flush(fd);
    let lost = client.flush(fd);
    block_on(client.flush(fd)).unwrap();
    assert_eq!(client.stats().late_replies, 2);
    // What is open when the client ends fails.
    client.shutdown();
    assert_eq!((block_on(mute), block_on(lost)), (Err(Error::Stopped), Err(Error::Stopped)));
    assert_eq!(block_on(client.flush(fd)), Err(Error::Stopped));
}

#[test]
fn calls_take_the_word_of_the_server() {
    let fake = Fake::start(|count, seen| match (seen.method.as_str(), count) {
        ("OpenFile", 0) => Act::Message(vec![8, 0]),
        ("OpenFile", 1) => Act::Message(vec![8, 0, 0x18, 0]),
        ("OpenFile", 2) => Act::Message([&[8, 0, 0x18][..], &[0xff; 9], &[1]].concat()),
        ("GetInfo", _) => Act::Message(vec![8, 0]),
        ("CloseFile" | "Write", _) => Act::Ret(KNOOK),
        _ => Act::Serve,
    });
    let client = client(&fake);
    for _ in 0..3 {
        assert!(matches!(block_on(client.open(NAME, None)), Err(Error::Reply(_))));
    }
    let fd = block_on(client.open(NAME, None)).unwrap();
    assert!(matches!(block_on(client.open(NAME, None)), Err(Error::Locked(_))));
    assert!(matches!(block_on(client.file_size(fd)), Err(Error::Reply(_))));
    assert_eq!(block_on(client.write(fd, 0, Bytes::from_static(b"x"))), Err(Error::Refused));
    assert_eq!(block_on(client.close(fd)), Ok(()), "closing succeeds whatever the server says");
    let fd = block_on(client.open(NAME, None)).unwrap();
    assert!(fd.0 > 1, "the lock was released");
    assert_eq!(client.stats().retries, 0);
}

#[test]
fn a_number_that_two_files_share_is_given_to_neither() {
    let fake = Fake::start(|_, seen| match seen.method.as_str() {
        "OpenFile" => Act::Message(vec![8, 0, 0x18, 9]),
        _ => Act::Serve,
    });
    let client = client(&fake);
    block_on(client.open(NAME, None)).unwrap();
    assert_eq!(block_on(client.open("cbd:pool//v2_u_", None)), Err(Error::FdInUse(9)));
    block_on(client.flush(NebdFd(9))).unwrap();
    assert_eq!(fake.methods(), ["OpenFile", "OpenFile", "CloseFile", "Flush"]);
}

#[test]
fn a_file_nobody_waits_for_is_closed_again() {
    let fake = Fake::start(|count, _| if count == 0 { Act::After(100 * MS) } else { Act::Serve });
    let client = client(&fake);
    drop(client.open(NAME, None));
    let began = Instant::now();
    while fake.methods() != ["OpenFile", "CloseFile"] {
        assert!(began.elapsed() < Duration::from_secs(60), "{:?}", fake.methods());
        thread::sleep(MS);
    }
}

#[test]
fn open_files_are_kept_alive_over_the_same_connection() {
    let muted = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&muted);
    let fake = Fake::start(move |_, seen| match seen.method.as_str() {
        // The second one is not answered: nothing follows from that.
        "KeepAlive" if count.fetch_add(1, Ordering::SeqCst) == 1 => Act::Mute,
        _ => Act::Serve,
    });
    let config = Config::load(&fake.conf(&[("heartbeat.intervalS", "1"), ("heartbeat.rpcTimeoutMs", "200")])).unwrap();
    let client = NebdClient::new(config).unwrap();
    thread::sleep(1500 * MS);
    assert_eq!(fake.connections(), 0, "nothing open, nothing sent");
    let first = block_on(client.open(NAME, None)).unwrap();
    let second = block_on(client.open("cbd:pool//v2_u_", None)).unwrap();
    let began = Instant::now();
    while client.stats().heartbeats < 2 {
        assert!(began.elapsed() < Duration::from_secs(60), "{:?}", client.stats());
        thread::sleep(MS);
    }
    assert!(client.stats().heartbeats_failed >= 1);
    let beats: Vec<_> = fake.seen().into_iter().filter(|seen| seen.method == "KeepAlive").collect();
    assert_eq!(beats[0].service, "nebd.client.NebdHeartbeatService");
    assert_eq!(beats[0].number(1), Some(u64::from(std::process::id())));
    let gap = beats[1].at - beats[0].at;
    assert!((900 * MS..1900 * MS).contains(&gap) || gap > 1900 * MS, "{gap:?}");
    assert!(gap >= 900 * MS);
    for (name, fd) in [(NAME, first), ("cbd:pool//v2_u_", second)] {
        let wanted = [&[8, fd.0 as u8, 0x12, name.len() as u8][..], name.as_bytes()].concat();
        assert!(beats[0].message.windows(wanted.len()).any(|bytes| bytes == wanted));
    }
    block_on(client.close(first)).unwrap();
    block_on(client.close(second)).unwrap();
    let before = client.stats();
    thread::sleep(1500 * MS);
    let after = client.stats();
    assert_eq!(before.heartbeats + before.heartbeats_failed, after.heartbeats + after.heartbeats_failed);
    assert_eq!(fake.connections(), 1);
}

#[test]
fn two_clients_of_a_host_exclude_each_other_by_lock_alone() {
    let fake = Fake::start(|_, _| Act::Serve);
    let (one, two) = (client(&fake), client(&fake));
    let fd = block_on(one.open(NAME, None)).unwrap();
    assert!(matches!(block_on(two.open(NAME, None)), Err(Error::Locked(_))));
    assert_eq!(fake.methods(), ["OpenFile"], "the lock decides, the server is not asked");
    drop(one);
    let again = block_on(two.open(NAME, None)).unwrap();
    assert_ne!(fd, again);
}

#[test]
fn a_socket_path_that_is_too_long_is_an_error_at_once() {
    let config = Config { server_address: format!("/tmp/{}", "x".repeat(200)).into(), ..Config::default() };
    assert!(NebdClient::new(config).is_err());
}
