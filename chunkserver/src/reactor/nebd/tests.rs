//! A loop without a disk, on an `Io` that receives when the test says so: what it does for NEBD while clients are held.

use super::super::handover::{Pause, Stage};
use super::super::{Protocol, Reactor, Setup};
use crate::io::buffer::{Arena, RecvBuf};
use crate::io::{Completion, ConnId, Done, Instant, Io, Op, Token};
use crate::mailbox::mesh;
use crate::metrics::ProcessStats;
use crate::nebd::server::{Options, Server};
use crate::service::{Info, Shared};
use crate::shard::Arenas;
use crate::shard::diskless::Diskless;
use crate::volume::catalog::{Catalog, SharedCatalog};
use bytes::BytesMut;
use copyset::PeerId;
use proto::frame::{RequestHead, put_request_bytes};
use std::sync::Arc;

#[derive(Default)]
struct Script {
    now: u64,
    /// A receive that waits.
    receive: Option<Token>,
    sends: u32,
    /// Turns that did not wait.
    restless: u32,
    done: Vec<Completion>,
}

impl Io for Script {
    fn now(&self) -> Instant {
        Instant(self.now)
    }
    fn submit(&mut self, token: Token, op: Op) {
        match op {
            Op::Recv { .. } => self.receive = Some(token),
            Op::Send { .. } => {
                self.sends += 1;
                self.done.push(Completion { token, done: Done::Send(Ok(())) });
            }
            other => panic!("{other:?}"),
        }
    }
    fn turn(&mut self, deadline: Instant, out: &mut Vec<Completion>) {
        self.restless += u32::from(deadline <= self.now() && self.done.is_empty());
        self.now += 1_000_000;
        out.append(&mut self.done);
    }
}

struct Rig {
    reactor: Reactor<Script>,
    pause: Arc<Pause>,
}

impl Rig {
    /// With one connection of NEBD.
    fn new() -> Self {
        let peer = "127.0.0.1:8200:0".parse::<PeerId>().unwrap();
        let info = Info {
            peer,
            chunk_size: 1 << 20,
            max_inflight: 100,
            version: "0".into(),
            config: Vec::new(),
            process: ProcessStats::default,
        };
        let payload = Arena::new(16 << 20).unwrap();
        let arenas =
            Arenas { payload: Arc::clone(&payload), work: Arena::new(1 << 20).unwrap(), all_payload: vec![payload] };
        let options = Options { heartbeat_timeout_ns: u64::MAX, return_io_errors: false };
        let nebd = Server::new(options, Vec::new(), 1, Instant(0), Box::new(|_| {}), Box::new(|_| {}));
        let core = Diskless::new(0, Arc::clone(&arenas.payload));
        let setup = Setup {
            listeners: Vec::new(),
            shared: Shared::new(info, 1),
            catalog: SharedCatalog::new(Catalog::default()),
            nebd: Some(nebd),
            mailbox: mesh(1).remove(0),
            control: None,
            arenas,
            shards: 1,
            chunk_size: 1 << 20,
            disk: [0; 16],
            cluster: [0; 16],
            seed: 1,
        };
        let pause = Pause::new(Stage::Serve, 1);
        let mut reactor = Reactor::new(Script::default(), 0, core, setup);
        reactor.take_part(Arc::clone(&pause), Vec::new());
        reactor.serve(ConnId(1), Protocol::Nebd);
        let mut rig = Self { reactor, pause };
        rig.turns();
        assert!(rig.reactor.io.receive.is_some());
        rig
    }

    /// Enough for anything to end.
    fn turns(&mut self) {
        (0..5).for_each(|_| self.reactor.turn());
        self.reactor.io.restless = 0;
        (0..5).for_each(|_| self.reactor.turn());
    }

    fn received(&mut self, bytes: BytesMut) {
        let token = self.reactor.io.receive.take().unwrap();
        let done = Done::Recv(Ok(RecvBuf::new(bytes.freeze())));
        self.reactor.io.done.push(Completion { token, done });
    }
}

/// A call that is answered at once: there is no such file.
fn call() -> BytesMut {
    let mut out = BytesMut::new();
    let (service, method) = ("nebd.client.NebdFileService", "GetInfo");
    put_request_bytes(&mut out, &RequestHead { service, method, log_id: None, correlation_id: 1 }, &[8, 1], 0);
    out
}

#[test]
fn what_arrives_while_clients_are_held_waits() {
    let mut rig = Rig::new();
    rig.pause.set(Stage::Hold);
    rig.turns();
    assert!(!rig.pause.is_reported(), "it may receive still");
    rig.received(call());
    rig.turns();
    assert_eq!((rig.pause.is_reported(), rig.reactor.io.sends), (true, 0));
    rig.pause.set(Stage::Serve);
    rig.turns();
    assert_eq!(rig.reactor.io.sends, 1);
    rig.received(call());
    rig.turns();
    assert_eq!(rig.reactor.io.sends, 2);
}

#[test]
fn what_is_parked_leaves_a_held_loop_in_peace() {
    let mut rig = Rig::new();
    let due = rig.reactor.io.now();
    rig.reactor.nebd.as_mut().unwrap().retry_at = Some(due);
    rig.pause.set(Stage::Hold);
    rig.turns();
    assert_eq!((rig.reactor.io.restless, rig.reactor.nebd.as_ref().unwrap().retry_at), (0, Some(due)));
    rig.pause.set(Stage::Serve);
    rig.turns();
    assert_eq!(rig.reactor.nebd.as_ref().unwrap().retry_at, None);
}
