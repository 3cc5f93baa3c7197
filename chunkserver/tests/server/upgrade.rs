//! `chunkserver upgrade`: a new process takes over, and no client notices more than a pause.

use super::client::{BLOCK, Client, SUCCESS, pattern, read_frame, write_frame};
use super::harness::{Lab, MIB, PATIENCE, Server, Setup, wait_for};
use super::nbd::Nbd;
use super::wire::{CHUNK, Message, request};
use rustix::process::{Pid, Signal, kill_process};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The process that serves now, which is not our child; killed when dropped.
pub(super) struct Heir(pub(super) u32);

/// Gone, or dead and waiting for somebody to ask how.
pub(super) fn is_gone(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_none_or(|rest| rest.is_empty() || rest.starts_with('Z'))
}

impl Heir {
    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.0).unwrap()).unwrap()
    }
    pub(super) fn is_gone(&self) -> bool {
        is_gone(self.0)
    }
    pub(super) fn end(self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
        wait_for("the end of the new process", || self.is_gone());
    }
    fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.0)).unwrap().count()
    }
}

impl Drop for Heir {
    fn drop(&mut self) {
        if !self.is_gone() {
            let _ = kill_process(self.pid(), Signal::KILL);
        }
    }
}

/// Who answers commands; nobody while the one ends and the other begins.
fn serving_pid(lab: &Lab) -> Option<u64> {
    let out = lab.cli(&["status", "--json"]);
    serde_json::from_slice::<serde_json::Value>(&out.stdout).ok()?["pid"].as_u64()
}

/// Upgrade to the same program; who serves now, and the pause in milliseconds.
pub(super) fn upgrade(lab: &Lab) -> (Heir, f64) {
    let said = lab.ask(&["upgrade", "--timeout-ms", "60000"]);
    let heir = Heir(said["pid"].as_u64().unwrap() as u32);
    wait_for("its command socket", || serving_pid(lab) == said["pid"].as_u64());
    (heir, said["pause_ms"].as_f64().unwrap())
}

/// Write versions of blocks with 24 in flight on one connection until told to stop; every answer must be a success, and
/// come once. The newest version of each block. `longest_us`: the longest time without an answer.
pub(super) fn write_on(
    client: &mut Client,
    copyset: u64,
    stop: &AtomicBool,
    longest_us: &AtomicU64,
) -> BTreeMap<u64, u64> {
    const BLOCKS: u64 = 200;
    let (mut next, mut flying, mut newest) = (0u64, BTreeMap::new(), BTreeMap::new());
    let mut last = Instant::now();
    loop {
        while flying.len() < 24 && !stop.load(Ordering::Relaxed) {
            let block = next % BLOCKS;
            let data = pattern(copyset << 48 | next, BLOCK);
            client.send(&write_frame(next, copyset, 1, block * BLOCK as u64, &data));
            flying.insert(next, block);
            next += 1;
        }
        if flying.is_empty() {
            return newest;
        }
        let answer = client.receive();
        longest_us.fetch_max(last.elapsed().as_micros() as u64, Ordering::Relaxed);
        last = Instant::now();
        assert_eq!(answer.status(), SUCCESS);
        let block = flying.remove(&answer.cid).expect("answered once");
        let known = newest.entry(block).or_insert(answer.cid);
        *known = answer.cid.max(*known);
    }
}

pub(super) fn check(client: &mut Client, copyset: u64, newest: &BTreeMap<u64, u64>) {
    assert!(!newest.is_empty());
    for (block, version) in newest {
        let data = client.data(copyset, 1, block * BLOCK as u64, BLOCK);
        assert!(data == pattern(copyset << 48 | version, BLOCK), "copyset {copyset}, block {block}, version {version}");
    }
}

#[test]
fn five_times_under_load() {
    let lab = Lab::new(Setup { size: 160 * MIB, ..Setup::default() });
    let mut first = lab.start();
    lab.copysets(4);
    lab.ask(&["volume", "create", "--name", "v", "--size", "16MiB"]);
    let (stop, longest_us) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut idle = first.client();
    assert_eq!(idle.write(1, 9, 0, &pattern(1, BLOCK)), SUCCESS);
    let heir = std::thread::scope(|scope| {
        let writers: Vec<_> = (1..5)
            .map(|copyset| {
                let (mut client, stop, longest_us) = (first.client(), &stop, &longest_us);
                scope.spawn(move || {
                    let newest = write_on(&mut client, copyset, stop, longest_us);
                    check(&mut client, copyset, &newest);
                    newest
                })
            })
            .collect();
        let volume = {
            let (mut volume, stop) = (Nbd::open(&lab, "v"), &stop);
            scope.spawn(move || {
                let (mut version, mut last) = (0, BTreeMap::new());
                while !stop.load(Ordering::Relaxed) {
                    version += 1;
                    let at = version % 31 * 128 * 1024;
                    assert_eq!(volume.write(at, &pattern(version, 8 * BLOCK)), 0);
                    last.insert(at, version);
                    if let Some((&at, &version)) = last.iter().nth((version % 7) as usize) {
                        assert!(volume.read(at, 8 * BLOCK) == (0, pattern(version, 8 * BLOCK)));
                    }
                }
                for (at, version) in &last {
                    assert!(volume.read(*at, 8 * BLOCK) == (0, pattern(*version, 8 * BLOCK)));
                }
                version
            })
        };
        let (mut heir, mut descriptors): (Option<Heir>, Vec<usize>) = (None, Vec::new());
        for round in 0..5 {
            std::thread::sleep(Duration::from_millis(300));
            let (next, pause_ms) = upgrade(&lab);
            println!("round {round}: pause {pause_ms} ms");
            assert!(pause_ms > 0.0);
            match heir.replace(next) {
                None => assert!(first.wait().success()),
                Some(old) => wait_for("the end of the old process", || old.is_gone()),
            }
            descriptors.push(heir.as_ref().unwrap().descriptors());
        }
        stop.store(true, Ordering::Relaxed);
        let writes: u64 = writers.into_iter().map(|w| w.join().unwrap().values().max().copied().unwrap()).sum();
        let volume_writes = volume.join().unwrap();
        println!(
            "{writes} RPC writes, {volume_writes} NBD writes; longest gap {} ms",
            longest_us.load(Ordering::Relaxed) / 1000
        );
        println!("descriptors {descriptors:?}");
        assert!(descriptors.iter().max().unwrap() - descriptors.iter().min().unwrap() <= 2, "{descriptors:?}");
        heir.unwrap()
    });
    assert!(idle.data(1, 9, 0, BLOCK) == pattern(1, BLOCK), "the connection that had nothing to say is alive");
    assert!(lab.log().contains("took over") && lab.log().contains("handed over"), "{}", lab.log());
    heir.end(Signal::TERM);
    for shard in lab.inspect()["shards"].as_array().unwrap() {
        assert_eq!((&shard["torn_batches"], &shard["rotten_records"]), (&0.into(), &0.into()));
    }
    lab.start().stop();
}

type Expect<'a> = Box<dyn Fn(&mut dyn ReadWrite) + 'a>;

/// What a client has sent of a message when the process changes, what it sends later, and what must come of it.
struct Half<'a> {
    what: String,
    stream: Box<dyn ReadWrite + 'a>,
    rest: Vec<u8>,
    expect: Expect<'a>,
}

trait ReadWrite: Read + Write {}
impl<T: Read + Write> ReadWrite for T {}

fn tcp<'a>(server: &Server<'_>, all: &[u8], cut: usize, what: String, expect: impl Fn(&mut Client) + 'a) -> Half<'a> {
    let mut client = server.client();
    client.send(&all[..cut]);
    let shared = client.stream.try_clone().unwrap();
    let expect = move |_: &mut dyn ReadWrite| expect(&mut Client::over(shared.try_clone().unwrap()));
    Half { what, stream: Box::new(client.stream), rest: all[cut..].to_vec(), expect: Box::new(expect) }
}

fn nbd(lab: &Lab, all: &[u8], cut: usize, what: String, answer: Vec<u8>) -> Half<'static> {
    let mut stream = UnixStream::connect(lab.path("nbd.sock")).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(&all[..cut]).unwrap();
    let expect = move |stream: &mut dyn ReadWrite| {
        let mut seen = vec![0; answer.len()];
        stream.read_exact(&mut seen).unwrap();
        assert!(seen == answer, "{seen:x?} instead of {answer:x?}");
    };
    Half { what, stream: Box::new(stream), rest: all[cut..].to_vec(), expect: Box::new(expect) }
}

fn nbd_write(offset: u64, data: &[u8]) -> Vec<u8> {
    let mut bytes = [0x2560_9513u32.to_be_bytes().to_vec(), vec![0, 0, 0, 1]].concat();
    bytes.extend([7u64.to_be_bytes(), offset.to_be_bytes()].concat());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

#[test]
fn in_the_middle_of_every_kind_of_message() {
    let lab = Lab::new(Setup { size: 96 * MIB, ..Setup::default() });
    let mut server = lab.start();
    lab.copysets(2);
    lab.ask(&["volume", "create", "--name", "v", "--size", "8MiB", "--copysets", "1:2"]);
    let mut halves = Vec::new();
    // Writes: in the header, the meta, the message, a payload that is copied and one that the kernel receives.
    for (number, (blocks, cut)) in
        [(1, 3), (1, 12), (1, 40), (1, 100), (1, 150), (4, 9000), (128, 120), (128, 300_000)].into_iter().enumerate()
    {
        let chunk = 10 + number as u64;
        let data = pattern(chunk, blocks * BLOCK);
        let frame = write_frame(chunk, 1, chunk, 0, &data);
        halves.push(tcp(&server, &frame, cut, format!("{blocks} blocks, cut at {cut}"), move |client| {
            let answer = client.receive();
            assert_eq!((answer.cid, answer.status()), (chunk, SUCCESS));
            assert!(client.data(1, chunk, 0, data.len()) == data);
        }));
    }
    // Attachments that are passed over: of an unknown method, of a write that is not whole blocks.
    let unknown = request(CHUNK, "NoSuch", 5, &Message::default(), &[1; 50_000]);
    halves.push(tcp(&server, &unknown, 20_000, "unknown method".into(), |client| {
        let answer = client.receive();
        assert_eq!((answer.cid, answer.error_code), (5, 1002));
    }));
    let odd = write_frame(6, 1, 3, 0, &[1; 30_001]);
    halves.push(tcp(&server, &odd, 20_000, "not whole blocks".into(), |client| {
        let answer = client.receive();
        assert_eq!((answer.cid, answer.status()), (6, super::client::INVALID));
    }));
    // A second request behind a half one; they may be answered in any order.
    assert_eq!(server.client().write(1, 41, 0, &pattern(41, BLOCK)), SUCCESS);
    let two = [write_frame(1, 1, 40, 0, &pattern(40, BLOCK)), read_frame(2, 1, 41, 0, BLOCK as u64)].concat();
    halves.push(tcp(&server, &two, 2000, "two requests".into(), |client| {
        let mut answers = [client.receive(), client.receive()];
        answers.sort_by_key(|answer| answer.cid);
        assert_eq!(answers.each_ref().map(|answer| answer.status()), [SUCCESS; 2]);
        assert!(answers[1].attachment == pattern(41, BLOCK));
    }));
    let get = b"POST /health HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n0123456789";
    for cut in [2, 20, get.len() - 4] {
        halves.push(tcp(&server, get, cut, format!("HTTP cut at {cut}"), |client| {
            let mut answer = [0; 15];
            client.stream.read_exact(&mut answer).unwrap();
            assert_eq!(&answer, b"HTTP/1.1 200 OK");
        }));
    }
    // NBD: greeting, flags, option; a request; payloads.
    let hello = [&3u32.to_be_bytes()[..], b"IHAVEOPT", &1u32.to_be_bytes(), &1u32.to_be_bytes(), b"v"].concat();
    let greeted = [b"NBDMAGICIHAVEOPT".as_slice(), &[0, 3]].concat();
    let export = [&(8 * MIB).to_be_bytes()[..], &[1, 0x6d]].concat();
    let ok = [&0x6744_6698u32.to_be_bytes()[..], &[0; 4], &7u64.to_be_bytes()].concat();
    let enospc = [&0x6744_6698u32.to_be_bytes()[..], &[0, 0, 0, 28], &7u64.to_be_bytes()].concat();
    for cut in [0, 2, 4, 11, 20, 21] {
        let all = [&hello[..], &nbd_write(0, &[3; BLOCK])].concat();
        halves.push(nbd(&lab, &all, cut, format!("NBD option cut at {cut}"), [&greeted[..], &export, &ok].concat()));
    }
    for (offset, len, cut, reply) in [
        (MIB, BLOCK, 10, &ok),
        (MIB, 2 * BLOCK, 28 + 5000, &ok),
        (2 * MIB - 8192, 100 * BLOCK, 28 + 200_000, &ok),
        (8 * MIB, 4 * BLOCK, 28 + 5000, &enospc),
    ] {
        let all = [&hello[..], &nbd_write(offset, &pattern(offset + 1, len))].concat();
        let answer = [&greeted[..], &export, reply].concat();
        halves.push(nbd(&lab, &all, hello.len() + cut, format!("NBD write at {offset} cut at {cut}"), answer));
    }
    // Answers that nobody reads: more than a socket holds.
    let mut deaf = server.client();
    let large = pattern(99, MIB as usize);
    assert_eq!(deaf.write(2, 99, 0, &large), SUCCESS);
    let reads: Vec<u8> = (0..12).flat_map(|cid| read_frame(cid, 2, 99, 0, MIB)).collect();
    deaf.send(&reads);
    std::thread::sleep(Duration::from_millis(300)); // so that what was sent has been received

    let (heir, pause_ms) = upgrade(&lab);
    println!("pause {pause_ms} ms with {} half messages", halves.len());
    assert!(server.wait().success());
    let mut seen: Vec<u64> = Vec::new();
    for half in &mut halves {
        println!("{}", half.what);
        half.stream.write_all(&half.rest).unwrap();
        (half.expect)(&mut half.stream);
    }
    for _ in 0..12 {
        let answer = deaf.receive();
        assert!(answer.attachment == large, "read {}", answer.cid);
        seen.push(answer.cid);
    }
    seen.sort_unstable();
    assert_eq!(seen, (0..12).collect::<Vec<u64>>());
    let mut volume = Nbd::open(&lab, "v");
    assert!(volume.read(2 * MIB - 8192, 100 * BLOCK) == (0, pattern(2 * MIB - 8191, 100 * BLOCK)));
    heir.end(Signal::TERM);
}

/// Fences are in memory only: they go along.
#[test]
fn what_only_memory_knows_goes_along() {
    let lab = Lab::new(Setup { size: 64 * MIB, log: 8 * MIB, ..Setup::default() });
    let mut server = lab.start();
    lab.copysets(1);
    let fence = Message::default().int(1, 77).int(2, 5);
    let mut client = server.client();
    assert_eq!(client.chunk_call("UpdateEpoch", &fence, &[]).status(), SUCCESS);
    let write = |epoch| {
        let message = super::client::chunk_request(2, 1, 1, 0, BLOCK as u64, 1).int(18, 77).int(19, epoch);
        (message, pattern(1, BLOCK))
    };
    let status = |client: &mut Client, epoch| {
        let (message, data) = write(epoch);
        client.chunk_call("WriteChunk", &message, &data).status()
    };
    assert_eq!(status(&mut client, 4), super::client::EPOCH_TOO_OLD);
    let (heir, _) = upgrade(&lab);
    assert!(server.wait().success());
    assert_eq!(status(&mut client, 4), super::client::EPOCH_TOO_OLD);
    assert_eq!(status(&mut client, 5), SUCCESS);
    // A signal does the same as the command; a stop is a stop.
    let old = heir.0;
    kill_process(heir.pid(), Signal::USR2).unwrap();
    let mut next = None;
    wait_for("the next process", || {
        next = serving_pid(&lab).filter(|&pid| pid != u64::from(old)).map(|pid| Heir(pid as u32));
        next.is_some()
    });
    let next = next.unwrap();
    assert_eq!(status(&mut client, 5), SUCCESS);
    assert!(TcpStream::connect(lab.address).is_ok());
    next.end(Signal::TERM);
    client.expect_close();
}
