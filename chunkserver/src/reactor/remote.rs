//! Volumes' operations on their way to other servers, and the connections to those (`volume::remote`).

use super::conn::Session;
use super::routing::Whom;
use super::{Owner, Reactor, token};
use crate::chunk::shard_of;
use crate::io::{Done, Io, Op, ShardId};
use crate::metrics::Counter;
use crate::shard::request::{AdminOp, ChunkOp, Origin, Outcome, Reply, ReplyData, RequestOp};
use crate::volume::leaders::Leader;
use crate::volume::remote::{Errand, RemoteEvent, Went};
use raftlog::CopysetId;

/// Whose operation another server does.
#[derive(Clone, Copy, Debug)]
pub(super) enum Asker {
    /// Part of a volume's I/O.
    Part { job: usize, part: u32 },
    /// The control thread.
    Order(Origin),
}

impl<I: Io> Reactor<I> {
    /// An operation on a chunk by whoever leads its copyset. False: nobody is known to lead now.
    pub(super) fn dispatch(
        &mut self,
        asker: Asker,
        copyset: CopysetId,
        homes: &[u64],
        sn: u64,
        op: RequestOp,
        id: (u64, u32),
    ) -> bool {
        let RequestOp::Chunk { chunk, op } = op else { return false };
        let errand = Errand { copyset, homes, chunk, sn, op: &op, id: id.0, attempt: id.1 };
        match self.remote.ask(self.io.now(), errand, asker) {
            Went::Nowhere => return false,
            Went::Away => {}
            Went::Here(leader) => {
                let whom = Whom::Leader { asker, copyset, leader };
                self.ask(copyset, RequestOp::Chunk { chunk, op }, whom);
            }
        }
        true
    }

    /// The replica of this process answers an operation.
    pub(super) fn leader_reply(&mut self, asker: Asker, copyset: CopysetId, leader: Leader, mut reply: Reply) {
        if matches!(reply.outcome, Outcome::NotLeader | Outcome::NoCopyset) {
            let hint = if let ReplyData::Leader(hint) = reply.data { hint } else { 0 };
            if self.remote.refused_here(self.io.now(), copyset, leader, hint) {
                reply.outcome = Outcome::NotLeader;
            }
        }
        self.done(asker, reply);
    }

    fn done(&mut self, asker: Asker, reply: Reply) {
        match asker {
            Asker::Part { job, part } => self.volume_reply(job, part, reply),
            Asker::Order(origin) => self.route_reply(Reply { origin, ..reply }),
        }
    }

    /// An operation for the control thread.
    pub(super) fn errand(&mut self, origin: Origin, copyset: CopysetId, homes: &[u64], chunk: u64, op: ChunkOp) {
        self.next_job += 1;
        let id = (self.next_job << 24, 0);
        let asker = Asker::Order(origin);
        if !self.dispatch(asker, copyset, homes, 0, RequestOp::Chunk { chunk, op }, id) {
            self.done(asker, ended(Outcome::NotLeader, ReplyData::None));
        }
    }

    /// The replica of this process says who leads.
    pub(super) fn told(&mut self, copyset: CopysetId, reply: &Reply) {
        let leader = match &reply.data {
            ReplyData::Copysets(list) => list.first().map(|found| Leader { peer: found.leader, term: found.term }),
            _ => None,
        };
        self.remote.told(self.io.now(), copyset, leader);
    }

    /// At the end of a turn: what `remote` wants done, and what was answered.
    pub(super) fn remote_step(&mut self) {
        let (now, alone) = (self.io.now(), self.is_alone());
        if !alone {
            self.remote.poll(now);
        }
        while let Some(event) = self.remote.next_event() {
            match event {
                RemoteEvent::Done { asker, lost, outcome, data } => {
                    if let (true, Asker::Part { job, part }) = (lost, asker)
                        && let Some(job) = self.jobs.get_mut(job)
                    {
                        job.io.lost(part);
                    }
                    self.done(asker, ended(outcome, data));
                }
                _ if alone => {}
                RemoteEvent::Dial { server, address, timeout_ms } => {
                    self.dialing += 1;
                    self.io.submit(token(Owner::Dial, 0, server), Op::Connect { address, timeout_ms });
                }
                RemoteEvent::Send(server) => {
                    if let Some(&index) = self.server_conns.get(&server) {
                        self.touch(index);
                    }
                }
                RemoteEvent::Close(server) => {
                    if let Some(&index) = self.server_conns.get(&server) {
                        self.doom(index);
                    }
                }
                RemoteEvent::AskHere(copyset) => {
                    let shard = ShardId(shard_of(copyset, self.shards));
                    let op = RequestOp::Admin(AdminOp::CopysetStatus);
                    self.ask_shard(shard, copyset, op, Whom::Told(copyset));
                }
            }
        }
        if alone {
            return;
        }
        // What that led to, at the latest in the next turn.
        self.remote.poll(now);
        self.again |= self.requested || self.remote.has_events();
        let counts = self.remote.counts();
        if counts != self.remote_counts {
            let (metrics, last) = (self.context.metrics(), self.remote_counts);
            metrics.set(Counter::RemoteWaiting, counts.waiting);
            metrics.add(Counter::RemoteSent, counts.sent - last.sent);
            metrics.add(Counter::RemoteLost, counts.lost - last.lost);
            metrics.add(Counter::LeaderLooks, counts.looks - last.looks);
            self.remote_counts = counts;
        }
    }

    /// A connection attempt to a server ended.
    pub(super) fn server_dialed(&mut self, server: usize, done: &Done) {
        let Done::Connect(result) = *done else { unreachable!("a connect came back as {done:?}") };
        self.dialing -= 1;
        if let Ok(conn) = result {
            let index = self.add(conn, Session::Server(server));
            self.server_conns.insert(server, index);
        }
        self.remote.dialed(self.io.now(), server, result.is_ok());
        if self.is_alone()
            && let Some(&index) = self.server_conns.get(&server)
        {
            self.doom(index);
        }
    }

    /// A connection to a server is given up.
    pub(super) fn server_lost(&mut self, server: usize) {
        self.server_conns.remove(&server);
        self.remote.closed(self.io.now(), server);
        self.again = true;
    }
}

fn ended(outcome: Outcome, data: ReplyData) -> Reply {
    Reply { origin: Origin { shard: 0, slot: 0, serial: 0 }, outcome, applied_index: 0, data }
}
