//! Chunk operations to whoever leads the copyset, in this process or on another server. Sans-I/O.
//!
//! Promises: each operation is answered exactly once; one that has no answer because its server is gone, slow or leads no
//! more ends as [`Outcome::NotLeader`], to be asked again; changes carry what makes that harmless ([`Guard`]); a server
//! that says nothing for long is checked on by asking the others, so a paused leader costs an election and not a time-out;
//! connections are shared by all volumes, and what waits for a server is bounded (`rpc::client`).

use crate::io::buffer::{Arena, PoolBuf};
use crate::io::{Address, Instant};
use crate::rpc::Attachment;
use crate::rpc::CloseReason;
use crate::rpc::client::{self, CallError, Client, DIAL_MS, Outgoing};
use crate::rpc::outbox::SendBufs;
use crate::shard::request::{ChunkOp, Guard, Outcome, ReplyData};
use crate::volume::leaders::{Leader, Leaders};
use crate::volume::wire::{self, Letter};
use bytes::Bytes;
use copyset::PeerId;
use proto::code;
use raftlog::CopysetId;
use rustc_hash::FxHashMap;
use slab::Slab;
use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::sync::Arc;

/// Time of an attempt: the first, and the most it doubles to while a server answers nothing, milliseconds.
const CALL_MS: (u64, u64) = (1_000, 8_000);
/// Time of a question for a leader, milliseconds.
const LOOK_MS: u64 = 500;
/// An operation without an answer for this long makes us ask whether its server still leads, milliseconds.
const DOUBT_MS: u64 = 200;
/// Between two looks for such operations, milliseconds.
const DOUBT_EVERY_MS: u64 = 50;
/// So many time-outs in a row, with nothing heard meanwhile, and the connection is given up.
const TIMEOUTS_MAX: u32 = 3;
/// Servers called.
const SERVERS_MAX: usize = 1024;

/// What is to be done or known.
#[derive(Debug)]
pub enum RemoteEvent<A> {
    /// Connect, then [`Remote::dialed`].
    Dial {
        /// Which server.
        server: usize,
        /// Where.
        address: Address,
        /// How long at most.
        timeout_ms: u32,
    },
    /// It has something to send.
    Send(usize),
    /// Close its connection, then [`Remote::closed`].
    Close(usize),
    /// An operation ended.
    Done {
        /// Whose.
        asker: A,
        /// It may have been sent, and was not answered: it may still be done, and asking again is another attempt.
        lost: bool,
        /// How.
        outcome: Outcome,
        /// Data of a read.
        data: ReplyData,
    },
    /// Ask this process's own replica who leads, then [`Remote::told`].
    AskHere(CopysetId),
}

/// An operation to be done by whoever leads.
#[derive(Clone, Copy, Debug)]
pub struct Errand<'a> {
    /// Copyset.
    pub copyset: CopysetId,
    /// Where to look for it.
    pub homes: &'a [u64],
    /// Chunk.
    pub chunk: u64,
    /// Of a write in place of a Zero.
    pub sn: u64,
    /// What.
    pub op: &'a ChunkOp,
    /// Names it among all of this process's life; the same for all its attempts.
    pub id: u64,
    /// How many attempts were lost before ([`RemoteEvent::Done`]).
    pub attempt: u32,
}

/// Where an [`Errand`] went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Went {
    /// To another server: [`RemoteEvent::Done`] follows.
    Away,
    /// Nowhere: this process leads, ask it. What it says goes to [`Remote::refused_here`] if it does not lead.
    Here(Leader),
    /// Nowhere: nobody is known to lead, ask again soon.
    Nowhere,
}

#[derive(Debug)]
struct Server {
    client: Client,
    /// In a row.
    timeouts: u32,
    heard: bool,
    /// It is not ours: zeros are written.
    no_zero: bool,
}

#[derive(Debug)]
enum Call<A> {
    Errand { asker: A, copyset: CopysetId, leader: Leader, since: Instant, zero: bool },
    Look { copyset: CopysetId, peer: u64 },
}

#[derive(Debug)]
struct Slot<A> {
    serial: u32,
    call: Call<A>,
}

/// Counts since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RemoteCounts {
    /// Operations sent to other servers.
    pub sent: u64,
    /// Of these, ended without their server's answer.
    pub lost: u64,
    /// Questions for a leader.
    pub looks: u64,
    /// Operations without an answer now.
    pub waiting: u64,
}

/// See the module's text. `A` says whose an operation is.
#[derive(Debug)]
pub struct Remote<A> {
    me: Option<u64>,
    client: u64,
    leaders: Leaders,
    servers: Slab<Server>,
    by_address: FxHashMap<(Ipv4Addr, u16), usize>,
    /// Called while they had no connection.
    to_dial: Vec<usize>,
    /// No call's time is up before this.
    next: Instant,
    calls: Slab<Slot<A>>,
    serial: u32,
    doubt_at: Instant,
    draw: u64,
    answers: Vec<client::Answer>,
    events: VecDeque<RemoteEvent<A>>,
    counts: RemoteCounts,
}

impl<A: Copy> Remote<A> {
    /// `me`: this process as a peer, if it has replicas. `seed`: of this life, no other has it.
    #[must_use]
    pub fn new(me: Option<u64>, seed: u64) -> Self {
        Self {
            me,
            client: seed | 1,
            leaders: Leaders::new(me),
            servers: Slab::new(),
            by_address: FxHashMap::default(),
            to_dial: Vec::new(),
            next: Instant::FAR,
            calls: Slab::new(),
            serial: 0,
            doubt_at: Instant(0),
            draw: seed,
            answers: Vec::new(),
            events: VecDeque::new(),
            counts: RemoteCounts::default(),
        }
    }

    /// What is to be done, in order.
    pub fn next_event(&mut self) -> Option<RemoteEvent<A>> {
        self.events.pop_front()
    }

    /// Whether [`Self::next_event`] has one.
    #[must_use]
    pub fn has_events(&self) -> bool {
        !self.events.is_empty()
    }

    /// See [`RemoteCounts`].
    #[must_use]
    pub fn counts(&self) -> RemoteCounts {
        RemoteCounts { waiting: self.calls.len() as u64, ..self.counts }
    }

    /// Send an operation to whoever leads.
    pub fn ask(&mut self, now: Instant, errand: Errand<'_>, asker: A) -> Went {
        let Errand { copyset, homes, chunk, sn, op, id, attempt } = errand;
        let Some(leader) = self.leaders.find(now, copyset, homes) else { return Went::Nowhere };
        if Some(leader.peer) == self.me {
            return Went::Here(leader);
        }
        let guard = Guard { client: self.client, id, attempt, term: leader.term };
        let Some(server) = self.server(leader.peer) else { return Went::Nowhere };
        let (timeouts, no_zero) = self.servers.get(server).map_or((0, false), |s| (s.timeouts, s.no_zero));
        let zeros = no_zero.then_some(sn);
        let Some(letter) = wire::letter(copyset, chunk, op, zeros, guard) else { return Went::Nowhere };
        let until = now.after_ms((CALL_MS.0 << timeouts.min(7)).min(CALL_MS.1));
        self.counts.sent += 1;
        let zero = zeros.is_none() && matches!(op, ChunkOp::Zero { .. });
        self.send(now, server, letter, until, Call::Errand { asker, copyset, leader, since: now, zero });
        Went::Away
    }

    /// The replica of this process, which [`Went::Here`] named, does not lead; `hint`: who does, 0 = not known. True: the
    /// copyset may lead elsewhere, so asking again has a point.
    pub fn refused_here(&mut self, now: Instant, copyset: CopysetId, leader: Leader, hint: u64) -> bool {
        self.leaders.failed(now, copyset, leader, hint);
        self.leaders.is_elsewhere(copyset)
    }

    /// What the replica of this process says to [`RemoteEvent::AskHere`].
    pub fn told(&mut self, now: Instant, copyset: CopysetId, leader: Option<Leader>) {
        if let Some(me) = self.me {
            self.answered(now, copyset, me, leader);
        }
    }

    fn server(&mut self, peer: u64) -> Option<usize> {
        let (ip, port) = (PeerId(peer).ip(), PeerId(peer).port());
        if let Some(&server) = self.by_address.get(&(ip, port)) {
            return Some(server);
        }
        if self.servers.len() >= SERVERS_MAX {
            self.make_room()?;
        }
        let client = Client::new(Address::Tcp(ip, port));
        let server = self.servers.insert(Server { client, timeouts: 0, heard: false, no_zero: false });
        self.by_address.insert((ip, port), server);
        Some(server)
    }

    /// Forget a server that is not called; `None`: not now.
    fn make_room(&mut self) -> Option<()> {
        let idle = |server: &Server| server.client.calls() == 0 && !server.client.is_dialing();
        let all = self.servers.iter().filter(|(_, server)| idle(server));
        let (at, _) = all.min_by_key(|(_, server)| server.client.is_up())?;
        if self.servers.get(at).is_some_and(|server| server.client.is_up()) {
            self.events.push_back(RemoteEvent::Close(at));
            return None;
        }
        self.servers.remove(at);
        self.by_address.retain(|_, server| *server != at);
        Some(())
    }

    fn send(&mut self, now: Instant, server: usize, letter: Letter, until: Instant, call: Call<A>) {
        let Letter { service, method, body, attachment } = letter;
        self.serial = self.serial.wrapping_add(1);
        let serial = self.serial;
        let token = self.calls.insert(Slot { serial, call }) as u64 | u64::from(serial) << 32;
        let Some(to) = self.servers.get_mut(server) else { return };
        to.client.call(now, Outgoing { token, service, method, body, attachment, until }, &mut self.answers);
        self.next = self.next.min(until);
        if to.client.is_up() {
            self.events.push_back(RemoteEvent::Send(server));
        } else if self.to_dial.last() != Some(&server) {
            self.to_dial.push(server);
        }
    }

    /// Do what is due; events follow.
    pub fn poll(&mut self, now: Instant) {
        self.take_answers(now);
        self.look_for_slow(now);
        let mut asked = Vec::new();
        self.leaders.due(now, |copyset, peer| asked.push((copyset, peer)));
        for (copyset, peer) in asked {
            self.counts.looks += 1;
            if Some(peer) == self.me {
                self.events.push_back(RemoteEvent::AskHere(copyset));
            } else if let Some(server) = self.server(peer) {
                let call = Call::Look { copyset, peer };
                self.send(now, server, wire::ask_leader(copyset), now.after_ms(LOOK_MS), call);
            } else {
                self.answered(now, copyset, peer, None);
            }
        }
        let mut due = std::mem::take(&mut self.to_dial);
        due.drain(..).for_each(|server| self.poll_server(now, server));
        if self.next <= now {
            due.extend(self.servers.iter().map(|(server, _)| server));
            due.drain(..).for_each(|server| self.poll_server(now, server));
            let next = self.servers.iter().map(|(_, server)| server.client.deadline()).min();
            self.next = next.unwrap_or(Instant::FAR);
        }
        self.to_dial = due;
        self.take_answers(now);
    }

    /// Whether to dial, and what timed out.
    fn poll_server(&mut self, now: Instant, index: usize) {
        let Some(server) = self.servers.get_mut(index) else { return };
        let before = self.answers.len();
        if server.client.poll(now, &mut self.answers).is_some() {
            let address = server.client.address().clone();
            self.events.push_back(RemoteEvent::Dial { server: index, address, timeout_ms: DIAL_MS });
        }
        if self.answers.len() > before {
            server.timeouts = if server.heard { 1 } else { server.timeouts.saturating_add(1) };
            server.heard = false;
            if server.timeouts >= TIMEOUTS_MAX && server.client.is_up() {
                self.events.push_back(RemoteEvent::Close(index));
            }
        }
    }

    /// When [`Self::poll`] must be called if nothing else happens.
    #[must_use]
    pub fn deadline(&self) -> Instant {
        let doubt = if self.calls.is_empty() { Instant::FAR } else { self.doubt_at };
        self.next.min(doubt).min(self.leaders.deadline())
    }

    /// Operations that have waited long: does their server still lead?
    fn look_for_slow(&mut self, now: Instant) {
        if self.calls.is_empty() || now < self.doubt_at {
            return;
        }
        self.doubt_at = now.after_ms(DOUBT_EVERY_MS);
        for (_, slot) in &self.calls {
            if let Call::Errand { copyset, since, .. } = slot.call
                && since.after_ms(DOUBT_MS) <= now
            {
                self.leaders.doubt(now, copyset, DOUBT_MS);
            }
        }
    }

    fn take_answers(&mut self, now: Instant) {
        let mut answers = std::mem::take(&mut self.answers);
        for client::Answer { token, result } in answers.drain(..) {
            let (key, serial) = ((token & 0xffff_ffff) as usize, (token >> 32) as u32);
            if self.calls.get(key).is_none_or(|slot| slot.serial != serial) {
                continue; // given up when another leader showed
            }
            match self.calls.remove(key).call {
                Call::Errand { asker, copyset, leader, zero, .. } => {
                    let lost = matches!(result, Err(CallError::TimedOut | CallError::Broken));
                    let (outcome, data) = self.judge(now, copyset, leader, zero, result);
                    self.events.push_back(RemoteEvent::Done { asker, lost, outcome, data });
                }
                Call::Look { copyset, peer } => {
                    let said = result.ok().and_then(|(body, _)| wire::leader(body));
                    self.answered(now, copyset, peer, said);
                }
            }
        }
        if self.answers.is_empty() {
            self.answers = answers;
        }
    }

    fn judge(
        &mut self,
        now: Instant,
        copyset: CopysetId,
        leader: Leader,
        zero: bool,
        result: Result<(Bytes, Attachment), CallError>,
    ) -> (Outcome, ReplyData) {
        let (hint, why) = match result {
            Ok((body, attachment)) => match wire::outcome(body, attachment) {
                (Outcome::NotLeader, ReplyData::Leader(hint)) => (hint, Outcome::NotLeader),
                answer => return answer,
            },
            Err(error) => {
                self.counts.lost += 1;
                tracing::debug!(peer = %PeerId(leader.peer), %error, "an operation of a volume has no answer");
                match error {
                    CallError::Rpc { code: code::ELOGOFF, .. } => (0, Outcome::NotLeader),
                    CallError::Rpc { code: code::ENOMETHOD | code::ENOSERVICE, .. } if zero => {
                        self.has_no_zero(leader.peer);
                        (0, Outcome::Failed)
                    }
                    CallError::Rpc { code: code::ENOMETHOD | code::ENOSERVICE, .. } => (0, Outcome::Invalid),
                    // Full: it is not the server that is overloaded.
                    CallError::Full | CallError::Rpc { .. } | CallError::TooLong(_) => (0, Outcome::Failed),
                    CallError::Unreachable | CallError::TimedOut | CallError::Broken => (0, Outcome::NotLeader),
                }
            }
        };
        if why == Outcome::NotLeader {
            self.leaders.failed(now, copyset, leader, hint);
        }
        (why, ReplyData::None)
    }

    /// This server does not know our Zero.
    fn has_no_zero(&mut self, peer: u64) {
        let at = self.by_address.get(&(PeerId(peer).ip(), PeerId(peer).port()));
        if let Some(server) = at.and_then(|&at| self.servers.get_mut(at)) {
            server.no_zero = true;
        }
    }

    fn answered(&mut self, now: Instant, copyset: CopysetId, from: u64, said: Option<Leader>) {
        let Some((old, _)) = self.leaders.answered(now, copyset, from, said) else { return };
        // What was asked of the old leader and not answered is asked again, of the new one.
        let of_old =
            |call: &Call<A>| matches!(call, Call::Errand { copyset: c, leader, .. } if (*c, *leader) == (copyset, old));
        self.end(of_old);
    }

    /// Nobody is called any more: whatever has no answer ends.
    pub fn give_up(&mut self) {
        self.end(|call| matches!(call, Call::Errand { .. }));
    }

    /// Operations that end without their server's answer, to be asked again.
    fn end(&mut self, which: impl Fn(&Call<A>) -> bool) {
        let keys: Vec<usize> = self.calls.iter().filter(|(_, slot)| which(&slot.call)).map(|(key, _)| key).collect();
        for key in keys {
            if let Call::Errand { asker, .. } = self.calls.remove(key).call {
                self.counts.lost += 1;
                let (outcome, data) = (Outcome::NotLeader, ReplyData::None);
                self.events.push_back(RemoteEvent::Done { asker, lost: true, outcome, data });
            }
        }
    }

    /// How [`RemoteEvent::Dial`] went.
    pub fn dialed(&mut self, now: Instant, server: usize, connected: bool) {
        let draw = self.draw();
        if let Some(to) = self.servers.get_mut(server) {
            to.client.dialed(now, connected, draw, &mut self.answers);
            self.events.push_back(RemoteEvent::Send(server));
        }
        self.take_answers(now);
    }

    /// A connection is gone.
    pub fn closed(&mut self, now: Instant, server: usize) {
        let draw = self.draw();
        if let Some(to) = self.servers.get_mut(server) {
            (to.timeouts, to.no_zero) = (0, false);
            to.client.closed(now, draw, &mut self.answers);
        }
        self.take_answers(now);
    }

    fn draw(&mut self) -> u64 {
        self.draw = self.draw.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.draw >> 24
    }

    /// Buffers for the next send to a server.
    pub fn take_send(&mut self, server: usize, max_bufs: usize) -> SendBufs {
        self.servers.get_mut(server).map_or_else(SendBufs::new, |to| to.client.take_send(max_bufs))
    }
    /// A send ended.
    pub fn sent(&mut self, server: usize) {
        if let Some(to) = self.servers.get_mut(server) {
            to.client.sent();
        }
    }

    /// Bytes of a server. True: an answer waits for a buffer; keep the rest and call again.
    ///
    /// # Errors
    /// Close the connection, then [`Self::closed`].
    pub fn received(
        &mut self,
        now: Instant,
        server: usize,
        input: &mut &[u8],
        arena: &Arc<Arena>,
    ) -> Result<bool, CloseReason> {
        let Some(from) = self.servers.get_mut(server) else { return Ok(false) };
        if !input.is_empty() {
            (from.timeouts, from.heard) = (0, true);
        }
        let waits = from.client.received(input, arena, &mut self.answers);
        self.take_answers(now);
        waits
    }

    /// An answer's buffer for the kernel to receive into, with the bytes in use; then [`Self::direct_done`].
    pub fn direct(&mut self, server: usize) -> Option<(PoolBuf, usize)> {
        self.servers.get_mut(server)?.client.direct()
    }
    /// The kernel is done with it.
    pub fn direct_done(&mut self, server: usize, buf: PoolBuf, added: usize) {
        if let Some(from) = self.servers.get_mut(server) {
            (from.timeouts, from.heard) = (0, true);
            from.client.direct_done(buf, added);
        }
    }
    /// In the middle of an answer, with memory for all of it.
    #[must_use]
    pub fn holds_payload(&self, server: usize) -> bool {
        self.servers.get(server).is_some_and(|from| from.client.holds_payload())
    }
    /// An answer waits for a buffer.
    #[must_use]
    pub fn wants_buffer(&self, server: usize) -> bool {
        self.servers.get(server).is_some_and(|from| from.client.wants_buffer())
    }
}

#[cfg(test)]
mod tests;
