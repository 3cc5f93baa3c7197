//! All connections a shard dials: which mail goes where, and what is to be done for them.
//!
//! A peer may have another number of shards. Its welcome says how many; until then it is taken for one like us.

use super::inbound::Identity;
use super::link::{DIAL_MS, Do, Link, LinkEnd};
use crate::chunk::shard_of;
use crate::io::Instant;
use crate::limits::PEERS_MAX;
use crate::rpc::outbox::SendBufs;
use crate::shard::mail::{PeerBody, PeerMail};
use copyset::PeerId;
use copyset::raft::eraftpb::MessageType;
use proto::peer::{Hello, Lane, Welcome};
use raftlog::CopysetId;
use slab::Slab;
use std::collections::{BTreeMap, VecDeque};

pub use crate::io::Address;

/// A peer that gets no mail for this long is forgotten, milliseconds.
const FORGET_MS: u64 = 60_000;

/// What is to be done or known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerEvent {
    /// Connect, then [`Peers::dialed`].
    Dial {
        /// Which link.
        link: usize,
        /// Where.
        address: Address,
        /// How long at most.
        timeout_ms: u32,
    },
    /// Close its connection, then [`Peers::closed`].
    Close(usize),
    /// It has something to send.
    Send(usize),
    /// The data link to this peer is up.
    Up(u64),
    /// Mail was lost: all of a peer's with its connection, or one copyset's for want of room.
    Lost {
        /// Peer.
        peer: u64,
        /// Of whom, if not all.
        copyset: Option<CopysetId>,
    },
}

/// Counts since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeerCounts {
    /// Messages queued.
    pub mail: u64,
    /// Messages that found no room or no connection.
    pub lost: u64,
    /// Attempts to connect.
    pub dials: u64,
    /// Handshakes that were refused or failed.
    pub refused: u64,
    /// Links that are up.
    pub up: u64,
}

/// A peer as an operator sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerState {
    /// Who.
    pub peer: u64,
    /// Links that are up, and all of them.
    pub up: usize,
    /// Links.
    pub links: usize,
    /// Why one of them is not up.
    pub end: Option<LinkEnd>,
    /// Of the control link, nanoseconds.
    pub rtt_ns: u64,
}

/// Answers to appends go with the heartbeats: behind payloads that wait for memory they would keep the very entries from
/// committing whose memory is waited for, on both sides.
fn lane_of(mail: &PeerMail) -> Lane {
    match &mail.body {
        PeerBody::Raft(message) => match message.get_msg_type() {
            MessageType::MsgAppend | MessageType::MsgSnapshot => Lane::Data,
            _ => Lane::Control,
        },
        PeerBody::Bulk { .. } => Lane::Data,
    }
}

#[derive(Debug)]
struct Peer {
    shards: u16,
    /// By shard of the peer: data and control.
    links: BTreeMap<u16, [usize; 2]>,
    used: Instant,
}

#[derive(Debug)]
struct Slot {
    link: Link,
    /// [`PeerEvent::Send`] was left and nothing was taken since.
    said: bool,
    /// Of no peer any more: forgotten when its connection is closed.
    retired: bool,
}

/// See the module's text.
#[derive(Debug)]
pub struct Peers {
    me: Identity,
    peers: BTreeMap<u64, Peer>,
    slots: Slab<Slot>,
    /// Nothing is due before.
    deadline: Instant,
    draw: u64,
    counts: PeerCounts,
}

impl Peers {
    /// None yet; `seed` for the pauses between attempts.
    #[must_use]
    pub fn new(me: Identity, seed: u64) -> Self {
        let counts = PeerCounts::default();
        Self { me, peers: BTreeMap::new(), slots: Slab::new(), deadline: Instant::FAR, draw: seed | 1, counts }
    }

    /// Counts.
    #[must_use]
    pub fn counts(&self) -> PeerCounts {
        let up = self.slots.iter().filter(|(_, slot)| slot.link.is_up()).count() as u64;
        PeerCounts { up, ..self.counts }
    }

    /// All peers there are.
    pub fn states(&self) -> impl Iterator<Item = PeerState> {
        self.peers.iter().map(move |(&peer, of)| {
            let links = || of.links.values().flatten().filter_map(|&key| Some(&self.slots.get(key)?.link));
            PeerState {
                peer,
                up: links().filter(|link| link.is_up()).count(),
                links: links().count(),
                end: links().find_map(Link::end),
                rtt_ns: links().filter(|link| link.lane() == Lane::Control).map(Link::rtt_ns).max().unwrap_or(0),
            }
        })
    }

    fn random(&mut self) -> u64 {
        // xorshift64*: pauses need no better.
        self.draw ^= self.draw >> 12;
        self.draw ^= self.draw << 25;
        self.draw ^= self.draw >> 27;
        self.draw.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 8
    }

    fn hello(&self, lane: Lane, to: u64, to_shard: u16) -> Hello {
        let Identity { peer, shard, shards, chunk_size, disk, cluster } = self.me;
        Hello { lane, chunk_size, from: peer, to, from_shard: shard, to_shard, shards, disk, cluster }
    }

    /// Take mail; it leaves at the end of the turn, or is lost.
    pub fn mail(&mut self, now: Instant, mail: PeerMail, out: &mut VecDeque<PeerEvent>) {
        let (peer, copyset, lane) = (mail.to, mail.copyset, lane_of(&mail));
        let key = if mail.from == self.me.peer { self.link_for(now, peer, copyset, lane) } else { None };
        self.counts.mail += 1;
        if let Some(slot) = key.and_then(|key| self.slots.get_mut(key))
            && slot.link.push(mail)
        {
            self.deadline = self.deadline.min(slot.link.deadline());
            if slot.link.is_up() && !std::mem::replace(&mut slot.said, true) {
                out.extend(key.map(PeerEvent::Send));
            }
            return;
        }
        if let Some(slot) = key.and_then(|key| self.slots.get(key)) {
            self.deadline = self.deadline.min(slot.link.deadline());
        }
        self.counts.lost += 1;
        if lane == Lane::Data {
            out.push_back(PeerEvent::Lost { peer, copyset: Some(copyset) });
        }
    }

    fn link_for(&mut self, now: Instant, peer: u64, copyset: CopysetId, lane: Lane) -> Option<usize> {
        if peer == self.me.peer || peer == 0 || (self.peers.len() >= PEERS_MAX && !self.peers.contains_key(&peer)) {
            return None;
        }
        let shards = self.me.shards;
        let of = self.peers.entry(peer).or_insert_with(|| Peer { shards, links: BTreeMap::new(), used: now });
        of.used = now;
        let to_shard = shard_of(copyset, of.shards);
        if let Some(pair) = of.links.get(&to_shard) {
            return Some(pair[lane as usize]);
        }
        let pair = [Lane::Data, Lane::Control].map(|lane| {
            let link = Link::new(self.hello(lane, peer, to_shard));
            self.slots.insert(Slot { link, said: false, retired: false })
        });
        self.peers.get_mut(&peer)?.links.insert(to_shard, pair);
        Some(pair[lane as usize])
    }

    /// When [`Self::poll`] has something to do.
    #[must_use]
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Do what is due.
    pub fn poll(&mut self, now: Instant, out: &mut VecDeque<PeerEvent>) {
        if self.deadline > now {
            return;
        }
        self.forget_unused(now);
        self.deadline = Instant::FAR;
        let mut gone = Vec::new();
        for (key, slot) in &mut self.slots {
            match slot.link.poll(now) {
                Some(Do::Dial) => {
                    let id = PeerId(slot.link.peer());
                    let address = Address::Tcp(id.ip(), id.port());
                    self.counts.dials += 1;
                    out.push_back(PeerEvent::Dial { link: key, address, timeout_ms: DIAL_MS });
                }
                Some(Do::Close) => out.push_back(PeerEvent::Close(key)),
                None => {}
            }
            if slot.link.wants_send() && !std::mem::replace(&mut slot.said, true) {
                out.push_back(PeerEvent::Send(key));
            }
            if slot.retired && slot.link.is_idle() {
                gone.push(key);
            } else {
                self.deadline = self.deadline.min(slot.link.deadline());
            }
        }
        for key in gone {
            self.slots.remove(key);
        }
    }

    fn forget_unused(&mut self, now: Instant) {
        let unused = |of: &Peer| of.used.after_ms(FORGET_MS) <= now;
        let peers: Vec<u64> = self.peers.iter().filter(|(_, of)| unused(of)).map(|(&peer, _)| peer).collect();
        for peer in peers {
            self.retire(peer);
            self.peers.remove(&peer);
        }
    }

    /// Give up all links of a peer.
    fn retire(&mut self, peer: u64) {
        let Some(of) = self.peers.get_mut(&peer) else { return };
        for key in std::mem::take(&mut of.links).into_values().flatten() {
            if let Some(slot) = self.slots.get_mut(key) {
                slot.link.give_up(LinkEnd::Unused);
                slot.retired = true;
            }
        }
        self.deadline = Instant(0);
    }

    /// How a connection attempt went. False: nobody wants the connection any more, close it.
    pub fn dialed(&mut self, now: Instant, key: usize, connected: bool, out: &mut VecDeque<PeerEvent>) -> bool {
        let draw = self.random();
        let Some(slot) = self.slots.get_mut(key) else { return false };
        slot.link.dialed(now, connected && !slot.retired, draw);
        self.deadline = self.deadline.min(slot.link.deadline());
        if slot.retired {
            self.deadline = Instant(0);
            return false;
        }
        if connected && !std::mem::replace(&mut slot.said, true) {
            out.push_back(PeerEvent::Send(key));
        }
        if !connected && slot.link.lane() == Lane::Data {
            out.push_back(PeerEvent::Lost { peer: slot.link.peer(), copyset: None });
        }
        connected
    }

    /// Bytes from the peer of a link.
    pub fn received(&mut self, now: Instant, key: usize, input: &[u8], out: &mut VecDeque<PeerEvent>) {
        let Some(slot) = self.slots.get_mut(key) else { return };
        let (peer, lane) = (slot.link.peer(), slot.link.lane());
        let found = slot.link.received(now, input);
        self.deadline = self.deadline.min(slot.link.deadline());
        match found {
            Ok(Some(welcome)) => self.welcomed(key, peer, lane, &welcome, out),
            Ok(None) => {}
            Err(end) => {
                self.counts.refused += 1;
                tracing::warn!(peer = %PeerId(peer), %end, "a connection to a peer is given up");
            }
        }
    }

    fn welcomed(&mut self, key: usize, peer: u64, lane: Lane, welcome: &Welcome, out: &mut VecDeque<PeerEvent>) {
        let Some(of) = self.peers.get_mut(&peer) else { return };
        if of.shards != welcome.shards && welcome.shards > 0 {
            tracing::info!(peer = %PeerId(peer), shards = welcome.shards, "a peer has another number of shards");
            of.shards = welcome.shards;
            out.push_back(PeerEvent::Lost { peer, copyset: None });
            return self.retire(peer);
        }
        if lane == Lane::Data {
            out.push_back(PeerEvent::Up(peer));
        }
        if let Some(slot) = self.slots.get_mut(key)
            && !std::mem::replace(&mut slot.said, true)
        {
            out.push_back(PeerEvent::Send(key));
        }
    }

    /// Buffers for the next send of a link.
    pub fn take_send(&mut self, key: usize, max_bufs: usize) -> SendBufs {
        let Some(slot) = self.slots.get_mut(key) else { return SendBufs::new() };
        slot.said = false;
        slot.link.take_send(max_bufs)
    }

    /// Its send completed.
    pub fn sent(&mut self, key: usize) {
        if let Some(slot) = self.slots.get_mut(key) {
            slot.link.sent();
        }
    }

    /// Its connection is gone.
    pub fn closed(&mut self, now: Instant, key: usize, out: &mut VecDeque<PeerEvent>) {
        let draw = self.random();
        let Some(slot) = self.slots.get_mut(key) else { return };
        let (peer, lane) = (slot.link.peer(), slot.link.lane());
        let silent = slot.link.end() == Some(LinkEnd::Silent);
        let lost = slot.link.closed(now, draw);
        slot.said = false;
        self.deadline = if slot.retired { Instant(0) } else { self.deadline.min(slot.link.deadline()) };
        if lost && lane == Lane::Data {
            out.push_back(PeerEvent::Lost { peer, copyset: None });
        }
        if silent {
            self.give_up(peer);
        }
    }

    /// What holds for one connection that fell silent holds for all to that peer.
    fn give_up(&mut self, peer: u64) {
        for (_, slot) in self.slots.iter_mut().filter(|(_, slot)| slot.link.peer() == peer) {
            slot.link.give_up(LinkEnd::Silent);
        }
        self.deadline = Instant(0);
    }

    /// The peer has just called us, so it can be called.
    pub fn nudge(&mut self, now: Instant, peer: u64) {
        for (_, slot) in self.slots.iter_mut().filter(|(_, slot)| slot.link.peer() == peer) {
            slot.link.nudge();
        }
        self.deadline = self.deadline.min(now);
    }
}
