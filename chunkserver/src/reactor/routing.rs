//! Requests from sessions to shards, replies from shards back to sessions.
//!
//! Every request has a slot here until its reply came; a connection that is gone by then only loses the answer.

use super::conn::Session;
use super::remote::Asker;
use super::{Owner, Reactor, token};
use crate::chunk::shard_of;
use crate::control::shards::CONTROL;
use crate::io::{Io, Op, ShardId};
use crate::metrics::Counter;
use crate::nbd::NbdEvent;
use crate::rpc::{self, Incoming};
use crate::service::{self, Handled, Pending};
use crate::shard::request::{Origin, Outcome, Reply, ReplyData, Request, RequestOp};
use crate::volume::io::{Pieces, Progress, VolumeError, VolumeIo};
use crate::volume::leaders::Leader;
use raftlog::CopysetId;
use std::cmp::Reverse;
use std::sync::Arc;

/// Timers at or above this number are for listeners.
pub(super) const ACCEPT_TIMER: usize = 1 << 31;

/// A connection's slot and serial.
#[derive(Clone, Copy, Debug)]
pub(super) struct Client {
    pub(super) index: usize,
    pub(super) serial: u32,
}

/// Who waits for a reply.
#[derive(Debug)]
pub(super) struct Waiting {
    serial: u32,
    whom: Whom,
}

#[derive(Debug)]
pub(super) enum Whom {
    Call(Client, Pending),
    Gather(usize),
    /// An operation of a volume, asked of the replica of this process.
    Leader {
        asker: Asker,
        copyset: CopysetId,
        leader: Leader,
    },
    /// Who leads, asked of the replica of this process.
    Told(CopysetId),
}

/// A call that asks every shard.
#[derive(Debug)]
pub(super) struct Gather {
    client: Client,
    pending: Pending,
    replies: Vec<Reply>,
}

/// Whose a volume I/O is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Whose {
    /// The request of this number, of an NBD session.
    Nbd(u32),
    /// The NEBD call in this slot.
    Nebd(usize),
}

/// A volume I/O in progress.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) client: Client,
    pub(super) whose: Whose,
    pub(super) io: VolumeIo,
    pub(super) serial: u32,
    /// Never used again, unlike its slot; but by what repeats the same I/O.
    pub(super) number: u64,
}

impl Job {
    /// Nothing of it is asked, and its client sends it again to whoever serves: a hand-over does not wait for it, and
    /// asks nothing more for it.
    pub(super) fn rests(&self) -> bool {
        matches!(self.whose, Whose::Nebd(_)) && self.io.is_waiting()
    }
}

impl<I: Io> Reactor<I> {
    /// Act on what a session made of its input.
    pub(super) fn handle_incoming(&mut self, index: usize) {
        let Some(serial) = self.conns.get(index).map(|c| c.serial) else { return };
        let client = Client { index, serial };
        let mut incoming = std::mem::take(&mut self.incoming);
        for item in incoming.drain(..) {
            self.call(client, item);
        }
        self.incoming = incoming;
        let mut events = std::mem::take(&mut self.nbd_events);
        for event in events.drain(..) {
            match event {
                NbdEvent::Io { id, io } => {
                    self.context.metrics().add(Counter::NbdRequests, 1);
                    let serial = self.next_serial();
                    self.next_job += 1;
                    let whose = Whose::Nbd(id);
                    let job = self.jobs.insert(Job { client, whose, io, serial, number: self.next_job });
                    self.drive(job);
                }
                NbdEvent::Disconnect => self.touch(index),
            }
        }
        self.nbd_events = events;
    }

    fn call(&mut self, client: Client, incoming: Incoming) {
        let nebd = self.conns.get(client.index).is_some_and(|conn| matches!(conn.session, Session::Nebd(_)));
        let incoming = match incoming {
            Incoming::Greeting(greeting) if !nebd => return self.greeted(client, greeting),
            Incoming::Call(call) if nebd => return self.nebd_call(client, call),
            // ELOGOFF would make part1 wait for the connection's end; that comes by itself.
            Incoming::Reject(_) if nebd && self.context.is_draining() => return,
            other => other,
        };
        let handled = service::handle(&self.context, self.io.now(), incoming);
        self.handled(client, handled);
    }

    pub(super) fn handled(&mut self, client: Client, handled: Handled) {
        match handled {
            Handled::Reply(out) => {
                if let Some(session) = self.rpc_session(client) {
                    session.push_reply(out);
                    self.touch(client.index);
                }
            }
            Handled::Shard { copyset, op, charge, pending } => {
                self.charge(client, charge);
                self.ask(copyset, op, Whom::Call(client, pending));
            }
            Handled::AllShards { op, pending } => {
                let gather = self.gathers.insert(Gather { client, pending, replies: Vec::new() });
                for shard in 0..self.shards {
                    let op = RequestOp::Admin(op.clone());
                    self.ask_shard(ShardId(shard), CopysetId(0), op, Whom::Gather(gather));
                }
            }
        }
    }

    /// The connection of this client, if it is the same still.
    pub(super) fn rpc_session(&mut self, client: Client) -> Option<&mut rpc::Connection> {
        let conn = self.conns.get_mut(client.index).filter(|c| c.serial == client.serial)?;
        match &mut conn.session {
            Session::Rpc(session) | Session::Nebd(session) => Some(session),
            _ => None,
        }
    }

    pub(super) fn charge(&mut self, client: Client, bytes: usize) {
        if let Some(session) = self.rpc_session(client) {
            session.charge(bytes);
        }
    }

    /// Whether an answer for this client would be sent.
    pub(super) fn is_connected(&self, client: Client) -> bool {
        self.conns.get(client.index).is_some_and(|c| c.serial == client.serial && !c.doomed)
    }

    pub(super) fn ask(&mut self, copyset: CopysetId, op: RequestOp, whom: Whom) {
        self.ask_shard(ShardId(shard_of(copyset, self.shards)), copyset, op, whom);
    }

    pub(super) fn ask_shard(&mut self, shard: ShardId, copyset: CopysetId, op: RequestOp, whom: Whom) {
        let serial = self.next_serial();
        let slot = self.waiting.insert(Waiting { serial, whom });
        let origin = Origin { shard: self.number, slot: slot as u32, serial };
        let request = Request { copyset, op, origin };
        if shard.0 == self.number {
            self.requested = true;
            self.shard.request(request, &mut self.effects);
        } else {
            self.context.metrics().add(Counter::Hops, 1);
            self.setup.mailbox.send_request(shard.0, request);
        }
    }

    /// A reply of our shard: to us, another shard or the control thread.
    pub(super) fn route_reply(&mut self, mut reply: Reply) {
        if let ReplyData::Shard(status) = &mut reply.data {
            status.peers = self.peer_views();
        }
        match reply.origin.shard {
            shard if shard == self.number => self.own_reply(reply),
            CONTROL => {
                if let Some(port) = &self.setup.control {
                    port.reply(reply);
                }
            }
            shard => self.setup.mailbox.send_reply(shard, reply),
        }
    }

    pub(super) fn own_reply(&mut self, reply: Reply) {
        let slot = reply.origin.slot as usize;
        let known = self.waiting.get(slot).is_some_and(|w| w.serial == reply.origin.serial);
        assert!(known, "a reply to nothing: {:?}", reply.origin);
        match self.waiting.remove(slot).whom {
            Whom::Call(client, pending) => {
                let handled = service::resume(&self.context, self.io.now(), pending, reply);
                self.handled(client, handled);
            }
            Whom::Gather(key) => {
                let Some(gather) = self.gathers.get_mut(key) else { return };
                gather.replies.push(reply);
                if gather.replies.len() == usize::from(self.shards) {
                    let Gather { client, pending, replies } = self.gathers.remove(key);
                    let handled = service::resume_all(&self.context, self.io.now(), pending, replies);
                    self.handled(client, handled);
                }
            }
            Whom::Leader { asker, copyset, leader } => self.leader_reply(asker, copyset, leader, reply),
            Whom::Told(copyset) => self.told(copyset, &reply),
        }
    }

    pub(super) fn volume_reply(&mut self, key: usize, part: u32, reply: Reply) {
        let now = self.io.now();
        let Some(job) = self.jobs.get_mut(key) else { return };
        match job.io.reply(part, reply, now) {
            Progress::More | Progress::Retry { .. } => self.drive(key),
            Progress::Done(result) => self.job_done(key, result),
        }
    }

    fn job_done(&mut self, key: usize, result: Result<Pieces, VolumeError>) {
        let Job { client, whose, io, .. } = self.jobs.remove(key);
        let id = match whose {
            Whose::Nbd(id) => id,
            Whose::Nebd(slot) => return self.nebd_done(slot, result, io.lost_max()),
        };
        if let Some(conn) = self.conns.get_mut(client.index).filter(|c| c.serial == client.serial)
            && let Session::Nbd(session) = &mut conn.session
        {
            session.done(id, result);
            self.touch(client.index);
        }
    }

    /// Send what a volume I/O may send now.
    pub(super) fn drive(&mut self, key: usize) {
        let (now, holding) = (self.io.now(), self.is_holding());
        if holding && self.jobs.get(key).is_some_and(|job| matches!(job.whose, Whose::Nebd(_))) {
            return;
        }
        while let Some(job) = self.jobs.get_mut(key) {
            let Some(part) = job.io.next_part(now) else { break };
            let (volume, id) = (Arc::clone(job.io.volume()), job.number << 24 | u64::from(part.instance & 0xff_ffff));
            let asker = Asker::Part { job: key, part: part.part };
            let (homes, id) = (volume.homes(part.copyset), (id, part.attempt));
            if self.dispatch(asker, part.copyset, homes, volume.sn(), part.op, id) {
                continue;
            }
            let Some(job) = self.jobs.get_mut(key) else { break };
            if let Progress::Done(result) = job.io.reply(part.part, nobody_leads(), now) {
                return self.job_done(key, result);
            }
        }
        if let Some(job) = self.jobs.get(key)
            && let Some(at) = job.io.wake_at()
        {
            self.timers.push(Reverse((at, key, job.serial)));
        }
    }

    pub(super) fn fire_timers(&mut self) {
        while let Some(&Reverse((at, key, serial))) = self.timers.peek() {
            if at > self.io.now() {
                return;
            }
            self.timers.pop();
            if key >= ACCEPT_TIMER {
                self.accept_timer(key - ACCEPT_TIMER);
            } else if self.jobs.get(key).is_some_and(|job| job.serial == serial) {
                self.drive(key);
            }
        }
    }

    /// Nobody waits for a shard.
    pub(super) fn is_quiet(&self) -> bool {
        self.waiting.is_empty() && self.jobs.is_empty()
    }

    /// Make the other shards write back too: their dirty data may sit in our buffers.
    pub(super) fn wake_all(&mut self) {
        for shard in (0..self.shards).filter(|&s| s != self.number) {
            self.io.submit(token(Owner::Wake, 0, 0), Op::Wake { shard: ShardId(shard) });
        }
    }
}

/// The answer to a request that was sent to nobody.
fn nobody_leads() -> Reply {
    let origin = Origin { shard: 0, slot: 0, serial: 0 };
    Reply { origin, outcome: Outcome::NotLeader, applied_index: 0, data: ReplyData::None }
}
