//! THE loop of a core: completions -> events -> step -> effects -> operations, one kernel entry a turn.
//!
//! Generic over [`Io`], so that the simulator runs this very code. Group commit, send batching and raft batching come
//! from the turn, not from a knob.

mod conn;
mod drain;
pub mod handover;
mod nebd;
mod peers;
mod remote;
mod routing;
mod sockets;

use crate::control::shards::{Order, Port};
use crate::io::{Completion, ConnId, Done, Instant, Io, ListenerId, Op, ShardId, Token};
use crate::limits;
use crate::mailbox::{Mail, Mailbox};
use crate::metrics::Counter;
use crate::nbd;
use crate::nebd::server::Server as NebdServer;
use crate::peer::{PeerCounts, PeerEvent, Peers};
use crate::rpc;
use crate::service::{self, Context, Shared};
use crate::shard::diskless::Core;
use crate::shard::mail::PeerMail;
use crate::shard::{Arenas, Effects, Failure, Shard};
use crate::volume::catalog::SharedCatalog;
use crate::volume::remote::{Remote, RemoteCounts};
use conn::Conn;
use handover::{Handed, Pause, Stage};
use routing::{Gather, Job, Waiting};
use slab::Slab;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::sync::Arc;

/// What a listening socket speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Protocol {
    /// baidu_std and HTTP.
    Rpc = 0,
    /// NBD.
    Nbd = 1,
    /// NEBD, and HTTP.
    Nebd = 2,
}

/// What a reactor is made of, apart from its shard and its kernel.
#[derive(Debug)]
pub struct Setup {
    /// Sockets this reactor accepts from; one reactor of the process has them all.
    pub listeners: Vec<(ListenerId, Protocol)>,
    /// What all shards share.
    pub shared: Arc<Shared>,
    /// Volumes, for NBD.
    pub catalog: SharedCatalog,
    /// NEBD's part2, if it is served.
    pub nebd: Option<Arc<NebdServer>>,
    /// To the other shards.
    pub mailbox: Mailbox,
    /// To the control thread, if there is one.
    pub control: Option<Port>,
    /// Of this shard.
    pub arenas: Arenas,
    /// Shards of this process.
    pub shards: u16,
    /// Bytes of a chunk.
    pub chunk_size: u32,
    /// Identity of the disk; a process without one has a number of its own life.
    pub disk: [u8; 16],
    /// Identity of the cluster; zeros: none is named.
    pub cluster: [u8; 16],
    /// Drawn: no other life of this loop has it, in this process or another.
    pub seed: u64,
}

/// Owners of operations, the top byte of a token.
#[derive(Clone, Copy)]
#[repr(u8)]
enum Owner {
    Disk = 1,
    Accept = 2,
    Recv = 3,
    Send = 4,
    Close = 5,
    Wake = 6,
    Connect = 7,
    Dial = 8,
}

/// Largest NEBD write of a shard with these buffers, bytes: one buffer holds it, and others have room beside it.
fn nebd_payload(arenas: &Arenas) -> usize {
    let quarter = (arenas.payload.size() / 4).max(limits::BLOCK);
    limits::NEBD_READ_BYTES_MAX.min(1 << quarter.ilog2())
}

const SERIAL_MASK: u32 = 0x00ff_ffff;
/// Passes over a turn's consequences before the kernel is asked again.
const PASSES_MAX: usize = 8;

fn token(owner: Owner, serial: u32, index: usize) -> Token {
    Token((owner as u64) << 56 | u64::from(serial & SERIAL_MASK) << 32 | index as u64 & 0xffff_ffff)
}

/// One core's loop.
pub struct Reactor<I: Io> {
    io: I,
    shard: Core,
    number: u16,
    shards: u16,
    setup: Setup,
    context: Context,
    options: rpc::Options,
    nebd_options: rpc::Options,
    nebd: Option<nebd::Nebd>,
    conns: Slab<Conn>,
    /// Connections with bytes that could not be used yet, or that must be armed again.
    unread: Vec<usize>,
    /// Connections with something to send or to re-arm at the end of the turn.
    touched: Vec<usize>,
    /// An empty list for whoever takes one of the two above, so that none is allocated each turn.
    spare: Vec<usize>,
    waiting: Slab<Waiting>,
    gathers: Slab<Gather>,
    jobs: Slab<Job>,
    timers: BinaryHeap<std::cmp::Reverse<(Instant, usize, u32)>>,
    serial: u32,
    next_shard: u16,
    /// When to look for peers that are not there any more.
    sweep_at: Instant,
    accept_again: Option<Instant>,
    effects: Effects,
    completions: Vec<Completion>,
    incoming: Vec<rpc::Incoming>,
    nbd_events: Vec<nbd::NbdEvent>,
    mail: Vec<(u16, Mail)>,
    peers: Peers,
    peer_events: VecDeque<PeerEvent>,
    /// Mail of peers that was received and not handed to the shard yet.
    peer_mail: Vec<PeerMail>,
    peer_counts: PeerCounts,
    /// Connections of the links of `peers`.
    link_conns: BTreeMap<usize, usize>,
    remote: Remote<remote::Asker>,
    remote_counts: RemoteCounts,
    /// Connections to the servers of `remote`.
    server_conns: BTreeMap<usize, usize>,
    /// Volume I/Os and errands so far.
    next_job: u64,
    again: bool,
    requested: bool,
    starved: bool,
    /// When stalled payloads may be looked for again.
    look_for_stalled: Instant,
    draining: Option<drain::Drain>,
    /// Accepts in flight.
    accepting: usize,
    /// Connections to peers being made.
    dialing: usize,
    pause: Option<Arc<Pause>>,
    stage: Stage,
    part: Option<handover::Part>,
    /// Connections of another process, until it has ended.
    adopted: Vec<Handed>,
}

impl<I: Io> std::fmt::Debug for Reactor<I> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reactor").field("shard", &self.number).field("connections", &self.conns.len()).finish()
    }
}

impl<I: Io> Reactor<I> {
    /// A loop for `shard`, which will recover in the first turns.
    pub fn new(io: I, number: u16, shard: impl Into<Core>, setup: Setup) -> Self {
        let shard = shard.into();
        let context = Context::new(Arc::clone(&setup.shared), usize::from(number));
        let me = peers::identity(&context, &setup, number);
        let options = rpc::Options { route: service::route, chunk_size: setup.chunk_size as usize };
        let nebd_options = rpc::Options { route: service::nebd_route, chunk_size: nebd_payload(&setup.arenas) };
        let nebd = setup.nebd.clone().map(nebd::Nebd::new);
        let now = io.now();
        let remote = Remote::new(shard.has_disk().then_some(me.peer), setup.seed ^ u64::from(number) << 48);
        Self {
            io,
            shard,
            number,
            shards: setup.shards,
            context,
            options,
            nebd_options,
            nebd,
            conns: Slab::new(),
            unread: Vec::new(),
            touched: Vec::new(),
            spare: Vec::new(),
            waiting: Slab::with_capacity(1024),
            gathers: Slab::new(),
            jobs: Slab::new(),
            timers: BinaryHeap::new(),
            serial: 0,
            next_shard: 0,
            sweep_at: Instant::FAR,
            accept_again: Some(Instant(0)),
            effects: Effects::default(),
            completions: Vec::with_capacity(256),
            incoming: Vec::new(),
            nbd_events: Vec::new(),
            mail: Vec::new(),
            peers: Peers::new(me, me.peer ^ u64::from(number) << 48 ^ now.0),
            peer_events: VecDeque::new(),
            peer_mail: Vec::new(),
            peer_counts: PeerCounts::default(),
            link_conns: BTreeMap::new(),
            remote,
            remote_counts: RemoteCounts::default(),
            server_conns: BTreeMap::new(),
            next_job: 0,
            again: true,
            requested: false,
            starved: false,
            look_for_stalled: Instant(0),
            draining: None,
            accepting: 0,
            dialing: 0,
            pause: None,
            stage: Stage::Serve,
            part: None,
            adopted: Vec::new(),
            setup,
        }
    }

    /// Run until drained or failed.
    ///
    /// # Errors
    /// Why the disk is out of service.
    pub fn run(&mut self) -> Result<(), Failure> {
        while !self.finished() {
            self.turn();
        }
        self.shard.failure().cloned().map_or(Ok(()), Err)
    }

    /// Nothing is left to do: drained, handed over, or failed.
    pub fn finished(&self) -> bool {
        self.left().unwrap_or_else(|| self.shard.stopped()) || self.shard.failure().is_some()
    }

    /// Why the disk is out of service, if it is.
    pub fn failure(&self) -> Option<&Failure> {
        self.shard.failure()
    }

    /// The state machine inside, for who watches it from the same thread; `None` without a disk.
    pub fn shard(&self) -> Option<&Shard> {
        match &self.shard {
            Core::Shard(shard) => Some(shard),
            Core::Diskless(_) => None,
        }
    }

    /// Requests are answered.
    pub fn serving(&self) -> bool {
        self.shard.serving()
    }

    /// One pass of the loop.
    pub fn turn(&mut self) {
        let deadline = self.deadline();
        let mut completions = std::mem::take(&mut self.completions);
        self.io.turn(deadline, &mut completions);
        self.again = false;
        self.shard.observe(self.io.now());
        let metrics = self.context.metrics();
        metrics.add(Counter::Turns, 1);
        metrics.tick(self.io.now());
        for completion in completions.drain(..) {
            self.completed(completion);
        }
        self.completions = completions;
        self.look_at_stage();
        self.receive_mail();
        self.receive_control();
        self.nebd_step();
        self.fire_timers();
        self.accept_more();
        self.drain_step();
        self.handover_step();
        self.consequences();
        self.remote_step();
        self.peers_step();
        self.finish_sockets();
        let io = &mut self.io;
        self.setup.mailbox.take_wakes(|shard| io.submit(token(Owner::Wake, 0, 0), Op::Wake { shard }));
    }

    fn completed(&mut self, completion: Completion) {
        let Token(bits) = completion.token;
        let (owner, serial, index) = (bits >> 56, (bits >> 32) as u32 & SERIAL_MASK, (bits & 0xffff_ffff) as usize);
        match owner {
            o if o == Owner::Disk as u64 => self.shard.completed(bits & 0xffff_ffff, completion, &mut self.effects),
            o if o == Owner::Accept as u64 => self.accepted(index, completion.done),
            o if o == Owner::Recv as u64 => self.received(index, serial, completion.done),
            o if o == Owner::Send as u64 => self.sent(index, serial, completion.done),
            o if o == Owner::Close as u64 => self.closed(index, serial),
            o if o == Owner::Connect as u64 => self.linked(index, &completion.done),
            o if o == Owner::Dial as u64 => self.server_dialed(index, &completion.done),
            _ => assert!(matches!(completion.done, Done::Wake), "a completion without an owner: {completion:?}"),
        }
    }

    /// Let the shard work, hand out what it answers, and again for what that made possible.
    fn consequences(&mut self) {
        for pass in 0.. {
            if self.starved {
                self.starved = false;
                self.end_stalled();
                self.shard.want_memory();
                self.wake_all();
            }
            self.requested = false;
            self.shard.end_turn(self.io.now(), &mut self.effects);
            self.hand_out();
            self.retry_unread();
            if !self.requested && self.effects.ops.is_empty() && self.effects.replies.is_empty() {
                return;
            }
            if pass == PASSES_MAX {
                self.again = true;
                return self.hand_out();
            }
        }
    }

    /// Submit the shard's disk operations and route its replies.
    fn hand_out(&mut self) {
        let mut effects = std::mem::take(&mut self.effects);
        for (number, op) in effects.ops.drain(..) {
            self.io.submit(token(Owner::Disk, 0, number as usize), op);
        }
        for reply in effects.replies.drain(..) {
            self.route_reply(reply);
        }
        for mail in effects.mail.drain(..) {
            self.peers.mail(self.io.now(), mail, &mut self.peer_events);
        }
        // Routing may have made new effects; keep them, and the buffers.
        effects.ops.append(&mut self.effects.ops);
        effects.replies.append(&mut self.effects.replies);
        effects.mail.append(&mut self.effects.mail);
        self.effects = effects;
    }

    fn receive_mail(&mut self) {
        let mut mail = std::mem::take(&mut self.mail);
        self.setup.mailbox.receive(|from, item| mail.push((from, item)));
        for (_, item) in mail.drain(..) {
            match item {
                Mail::Request(request) => self.shard.request(request, &mut self.effects),
                Mail::Reply(reply) => self.own_reply(reply),
                Mail::Connection(conn, protocol) => self.open(conn, protocol),
                Mail::Peer(conn, greeted) => self.open_peer(conn, &greeted),
            }
        }
        self.mail = mail;
    }

    /// Orders that come while clients are held stay where they are: whoever goes on does them.
    fn receive_control(&mut self) {
        if self.is_holding() {
            return;
        }
        while let Some(order) = self.setup.control.as_ref().and_then(Port::poll) {
            match order {
                Order::Ask(request) => self.shard.request(request, &mut self.effects),
                Order::Errand { origin, copyset, homes, chunk, op } => {
                    self.errand(origin, copyset, &homes, chunk, op);
                }
            }
        }
    }

    fn deadline(&self) -> Instant {
        if self.again {
            return self.io.now();
        }
        let mut deadline = self.shard.deadline().min(self.handover_deadline()).min(self.sweep_at);
        if !self.is_alone() {
            deadline = deadline.min(self.peers.deadline()).min(self.remote.deadline());
        }
        if let Some(std::cmp::Reverse((at, ..))) = self.timers.peek() {
            deadline = deadline.min(*at);
        }
        let parked = self.nebd.as_ref().and_then(nebd::Nebd::deadline).filter(|_| !self.is_holding());
        for at in [self.accept_again, parked].into_iter().flatten() {
            deadline = deadline.min(at);
        }
        if !self.unread.is_empty() {
            deadline = deadline.min(self.io.now().after_ms(1));
        }
        if self.draining.is_some() {
            deadline = deadline.min(self.io.now().after_ms(5));
        }
        deadline
    }

    /// The next number for something whose slot may be reused.
    fn next_serial(&mut self) -> u32 {
        self.serial = self.serial.wrapping_add(1);
        self.serial
    }

    fn round_robin(&mut self) -> ShardId {
        self.next_shard = (self.next_shard + 1) % self.shards;
        ShardId(self.next_shard)
    }

    fn open(&mut self, conn: ConnId, protocol: u8) {
        let max = limits::CONNECTIONS_MAX / usize::from(self.shards);
        if self.conns.len() >= max || self.draining.is_some() {
            self.io.submit(token(Owner::Close, 0, 0xffff_ffff), Op::Close { conn });
            return;
        }
        let all = [Protocol::Rpc, Protocol::Nbd, Protocol::Nebd];
        let protocol = all.into_iter().find(|p| *p as u8 == protocol).unwrap_or(Protocol::Rpc);
        self.serve(conn, protocol);
    }
}
