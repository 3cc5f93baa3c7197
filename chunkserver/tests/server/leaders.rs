//! An exporter whose leaders are of the test's own making: what they owe it when it hands over.

use super::client::{BLOCK, pattern};
use super::harness::{BINARY, Lab, Setup, text, wait_for};
use super::nbd::Nbd;
use super::upgrade::upgrade;
use super::upgrade_failures::{fails, fake};
use super::wire::{Message, Value, fields, frame};
use rustix::process::Signal;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Two servers; one of them leads, in a term of its own.
struct Leaders {
    addresses: [SocketAddr; 2],
    leader: AtomicUsize,
    /// Deletes so far, and whether they are answered.
    deletes: AtomicUsize,
    answers_deletes: AtomicBool,
}

impl Leaders {
    fn start(lab: &Lab) -> Arc<Self> {
        let listeners = [0, 0].map(|port| TcpListener::bind(SocketAddr::new(lab.address.ip(), port)).unwrap());
        let this = Arc::new(Self {
            addresses: listeners.each_ref().map(|listener| listener.local_addr().unwrap()),
            leader: AtomicUsize::new(0),
            deletes: AtomicUsize::new(0),
            answers_deletes: AtomicBool::new(false),
        });
        for (me, listener) in listeners.into_iter().enumerate() {
            let this = Arc::clone(&this);
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let this = Arc::clone(&this);
                    std::thread::spawn(move || this.serve(me, stream));
                }
            });
        }
        this
    }

    fn serve(&self, me: usize, mut stream: TcpStream) -> Option<()> {
        loop {
            let mut head = [0; 12];
            stream.read_exact(&mut head).ok()?;
            let size = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap()) as usize;
            let mut rest = vec![0; size(4)];
            stream.read_exact(&mut rest).ok()?;
            let meta = fields(&rest[..size(8)]);
            let Value::Bytes(call) = &meta[&1][0] else { panic!("{meta:?}") };
            let Value::Bytes(method) = &fields(call)[&2][0] else { panic!("{meta:?}") };
            let Value::Int(cid) = &meta[&4][0] else { panic!("{meta:?}") };
            let answer = match text(method).as_str() {
                "GetLeader" => {
                    let leader = self.leader.load(Ordering::SeqCst);
                    let peer = Message::default().bytes(3, format!("{}:0", self.addresses[leader]).as_bytes());
                    answer(*cid, &Message::default().bytes(1, &peer.0).int(1001, leader as u64 + 1), &[])
                }
                "ReadChunk" => {
                    let Value::Int(size) = fields(&rest[size(8)..])[&7][0] else { panic!("{rest:?}") };
                    let mut whole = answer(*cid, &Message::default().int(1, 0), &pattern(7, size as usize));
                    if me == 0 {
                        whole.truncate(whole.len() - size as usize / 2);
                        self.leader.store(1, Ordering::SeqCst);
                    }
                    whole
                }
                "DeleteChunk" => {
                    self.deletes.fetch_add(1, Ordering::SeqCst);
                    if !self.answers_deletes.load(Ordering::SeqCst) {
                        continue;
                    }
                    answer(*cid, &Message::default().int(1, 0), &[])
                }
                other => panic!("{other}"),
            };
            stream.write_all(&answer).ok()?;
        }
    }

    fn volume(&self, lab: &Lab) {
        let peers = self.addresses.map(|address| format!("{address}:0")).join(",");
        let what = ["volume", "create", "--name", "v", "--size", "1MiB", "--copysets", "1:1"];
        lab.ask(&[&what[..], &["--peers", &peers, "--chunk-size", "1MiB"]].concat());
    }
}

fn answer(cid: u64, message: &Message, attachment: &[u8]) -> Vec<u8> {
    let meta = Message::default().bytes(2, &Message::default().int(1, 0).0).int(3, 0).int(4, cid);
    let meta = if attachment.is_empty() { meta } else { meta.int(5, attachment.len() as u64) };
    frame(&meta, &[&message.0, attachment].concat())
}

/// An answer comes into a buffer that the kernel has been lent; nobody waits for the rest any more.
#[test]
fn half_an_answer_of_a_former_leader_does_not_hinder_a_hand_over() {
    let lab = Lab::exporter(Setup::default());
    let leaders = Leaders::start(&lab);
    let mut server = lab.start();
    leaders.volume(&lab);
    let mut volume = Nbd::open(&lab, "v");
    let size = 64 * BLOCK;
    assert!(volume.read(0, size) == (0, pattern(7, size)), "the new leader is asked");
    let (heir, _) = upgrade(&lab);
    assert!(server.wait().success(), "{}", lab.log());
    assert!(volume.read(0, size) == (0, pattern(7, size)));
    heir.end(Signal::TERM);
}

#[test]
fn a_command_that_waits_for_another_server_survives_a_hand_over_that_fails() {
    let lab = Lab::exporter(Setup::default());
    let leaders = Leaders::start(&lab);
    let server = lab.start();
    leaders.volume(&lab);
    let mut command = Command::new(BINARY);
    command.args(["volume", "delete", "--name", "v", "--ctl"]).arg(lab.path("ctl.sock")).stdout(Stdio::null());
    let mut deletion = command.spawn().unwrap();
    wait_for("the order", || leaders.deletes.load(Ordering::SeqCst) > 0);
    fails(&lab, fake(&lab, "dies-with-everything").to_str().unwrap());
    leaders.answers_deletes.store(true, Ordering::SeqCst);
    let mut end = None;
    wait_for("the deletion", || {
        end = deletion.try_wait().unwrap();
        end.is_some()
    });
    assert!(end.unwrap().success());
    server.stop();
}
