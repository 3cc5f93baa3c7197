//! NEBD calls: from a connection to the table of files, from there to a volume or the worker, and back.
//!
//! Invariants: a call keeps its slot from its arrival until it is answered, or its connection and what it set going are
//! gone; a failed I/O is answered with kNoOK or *parked*, as the configuration says. A parked call holds no place
//! among the running requests of its file, so it hinders nobody; it is tried again once a second, and answered when that
//! works; it ends with its connection, and stopping does not wait for it. A call that cannot be tried again ends its
//! connection at the next try: its client sends all again. So does a connection that is not read because of its calls, and
//! stays so: its client may be gone.

use super::Reactor;
use super::conn::Session;
use super::routing::{Client, Job, Whose};
use crate::io::{Instant, Io};
use crate::metrics::Counter;
use crate::nebd::files::NebdFd;
use crate::nebd::server::{Answer, Reply, Server};
use crate::nebd::service::{self, Op, Outcome, Parsed, Run};
use crate::rpc;
use crate::service::Ticket;
use crate::shard::request::Origin;
use crate::volume::io::{Pieces, VolumeError};
use slab::Slab;
use std::sync::Arc;

/// A parked call is tried again after this, milliseconds.
const RETRY_MS: u64 = 1000;
/// A connection that has all the calls it may have, and from which nothing was read for this long, is given up,
/// milliseconds.
const STUCK_MS: u64 = 10_000;
/// Calls that were parked keep at most this share of the payload arena until they end; beyond it data is given up, and
/// the client sends it again over another connection.
const PARKED_SHARE: usize = 8;

/// What a reactor keeps for NEBD.
#[derive(Debug)]
pub(super) struct Nebd {
    pub(super) server: Arc<Server>,
    calls: Slab<Call>,
    /// Data of writes that were parked and have not ended.
    kept_bytes: usize,
    retry_at: Option<Instant>,
    replies: Vec<Reply>,
}

#[derive(Debug)]
struct Call {
    client: Client,
    serial: u32,
    ticket: Ticket,
    fd: NebdFd,
    op: Op,
    state: State,
    /// It failed before, so it is not refused any more: it works or waits.
    retried: bool,
    /// Of its data, counted in [`Nebd::kept_bytes`].
    kept: usize,
    /// Number of its job, and how many attempts were lost: what repeats it is the same to other servers.
    job: (u64, u32),
    /// Its connection broke while it ran.
    orphan: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The table of files owes an answer.
    Asked,
    /// This job runs.
    Running(usize),
    /// The worker makes the file larger.
    Extending,
    Parked,
}

impl Nebd {
    pub(super) fn new(server: Arc<Server>) -> Self {
        Self { server, calls: Slab::new(), kept_bytes: 0, retry_at: None, replies: Vec::new() }
    }

    /// When parked calls are tried again.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.retry_at
    }

    /// Try again at this moment, or earlier if that was meant already.
    fn retry(&mut self, at: Instant) {
        self.retry_at = Some(self.retry_at.map_or(at, |known| known.min(at)));
    }

    fn remove(&mut self, slot: usize) -> Call {
        let call = self.calls.remove(slot);
        self.kept_bytes -= call.kept;
        call
    }
}

fn data_len(op: &Op) -> usize {
    if let Op::Write { data, .. } = op { data.len() } else { 0 }
}

impl<I: Io> Reactor<I> {
    /// A call arrived on a connection of NEBD.
    pub(super) fn nebd_call(&mut self, client: Client, call: rpc::Call) {
        let now = self.io.now();
        if self.draining.is_some() || self.context.is_draining() {
            return; // unanswered: the client sends it again, to whoever serves next
        }
        let Some(nebd) = &mut self.nebd else { return };
        let (mut ticket, fd, op) = match service::parse(&self.context, now, call) {
            Parsed::Answered(handled) => return self.handled(client, handled),
            Parsed::KeepAlive(ticket, message) => {
                let fds = message.info.iter().map(|file| file.fd);
                let known = nebd.server.keep_alive(message.pid, &message.nebd_version, fds, now);
                let handled = service::alive(&self.context, now, ticket, known);
                return self.handled(client, handled);
            }
            Parsed::Call { ticket, fd, op } => (ticket, fd, op),
        };
        self.context.metrics().add(Counter::NebdRequests, 1);
        if let Op::Read { size, .. } = op {
            ticket.charge(size as usize);
            self.charge(client, size as usize);
        }
        let serial = self.next_serial();
        let full = self.rpc_session(client).is_some_and(|session| session.is_full());
        let Some(nebd) = &mut self.nebd else { return };
        if full {
            nebd.retry(now.after_ms(RETRY_MS));
        }
        let call = Call {
            client,
            serial,
            ticket,
            fd,
            op,
            state: State::Asked,
            retried: false,
            kept: 0,
            job: (0, 0),
            orphan: false,
        };
        let slot = nebd.calls.insert(call);
        self.nebd_ask(slot);
        self.nebd_replies();
    }

    /// Ask the table of files for this call.
    fn nebd_ask(&mut self, slot: usize) {
        let now = self.io.now();
        let Some(nebd) = &mut self.nebd else { return };
        let Some(call) = nebd.calls.get_mut(slot) else { return };
        call.state = State::Asked;
        let whom = Origin { shard: self.number, slot: slot as u32, serial: call.serial };
        match &call.op {
            Op::Open { name, flags } => nebd.server.open(name, *flags, whom, now, &mut nebd.replies),
            Op::Close => nebd.server.close(call.fd, whom, now, &mut nebd.replies),
            _ => nebd.server.request(call.fd, whom, now, &mut nebd.replies),
        }
    }

    /// Once a turn: answers of the worker and of other shards, and parked calls that are due.
    pub(super) fn nebd_step(&mut self) {
        let holding = self.is_holding();
        let Some(nebd) = &mut self.nebd else { return };
        nebd.server.receive(self.number, &mut nebd.replies);
        if nebd.retry_at.is_some_and(|at| at <= self.io.now()) && !holding {
            nebd.retry_at = None;
            self.nebd_retry();
        }
        self.nebd_replies();
    }

    /// Try parked calls again; connections that it cannot help are given up.
    fn nebd_retry(&mut self) {
        let now = self.io.now();
        let Some(nebd) = &mut self.nebd else { return };
        let full = |session: &Session| matches!(session, Session::Nebd(calls) if calls.is_full());
        let mut hopeless = Vec::new();
        for (index, conn) in self.conns.iter().filter(|(_, conn)| full(&conn.session) && !conn.doomed) {
            if conn.moved.after_ms(STUCK_MS) <= now {
                hopeless.push(Client { index, serial: conn.serial });
            } else {
                nebd.retry(now.after_ms(RETRY_MS));
            }
        }
        let parked = || nebd.calls.iter().filter(|(_, call)| call.state == State::Parked);
        hopeless.extend(parked().filter(|(_, call)| matches!(call.op, Op::Lost)).map(|(_, call)| call.client));
        let due: Vec<(usize, u32)> = parked().map(|(slot, call)| (slot, call.serial)).collect();
        for client in hopeless {
            if self.is_connected(client) {
                tracing::warn!("closing a connection of NEBD whose requests wait too long: they will be sent again");
                self.context.metrics().add(Counter::ClosedByUs, 1);
                self.doom(client.index);
            }
        }
        for (slot, serial) in due {
            let there = |nebd: &Nebd| nebd.calls.get(slot).is_some_and(|call| call.serial == serial);
            if self.nebd.as_ref().is_some_and(there) {
                self.nebd_ask(slot);
            }
        }
    }

    /// For a hand-over: nothing of NEBD is under way but what is parked, or a job ([`Job::rests`] is not asked here), and
    /// the worker writes no record.
    pub(super) fn nebd_is_held(&self) -> bool {
        let held = |call: &Call| matches!(call.state, State::Parked | State::Running(_));
        self.nebd.as_ref().is_none_or(|nebd| nebd.calls.iter().all(|(_, call)| held(call)) && nebd.server.is_idle())
    }

    /// Act on what the table of files said, and on what that leads to.
    fn nebd_replies(&mut self) {
        while let Some(nebd) = self.nebd.as_mut().filter(|nebd| !nebd.replies.is_empty()) {
            let mut replies = std::mem::take(&mut nebd.replies);
            replies.drain(..).for_each(|reply| self.nebd_reply(reply));
            if let Some(nebd) = self.nebd.as_mut().filter(|nebd| nebd.replies.is_empty()) {
                nebd.replies = replies;
            }
        }
    }

    fn nebd_reply(&mut self, Reply { whom, answer }: Reply) {
        let slot = whom.slot as usize;
        let Some(nebd) = &mut self.nebd else { return };
        let Some(call) = nebd.calls.get(slot).filter(|call| call.serial == whom.serial) else {
            panic!("an answer to nothing: {whom:?}");
        };
        let (client, extending) = (call.client, call.state == State::Extending);
        let alive = self.is_connected(client) && self.draining.is_none();
        if extending {
            self.nebd_end(slot, None);
        }
        match answer {
            Answer::Go(_) if !alive => {
                self.nebd_end(slot, None);
                self.nebd_drop(slot);
            }
            Answer::Go(handle) => self.nebd_run(slot, handle.as_ref()),
            _ if !alive => self.nebd_drop(slot),
            Answer::Opened(fd) => self.nebd_finish(slot, Outcome::Opened(fd)),
            Answer::Done => self.nebd_finish(slot, Outcome::Done),
            Answer::Refused => self.nebd_refuse(slot),
        }
    }

    fn nebd_run(&mut self, slot: usize, handle: &dyn crate::nebd::executor::Handle) {
        let serial = self.next_serial();
        let Some(nebd) = &mut self.nebd else { return };
        let Some(call) = nebd.calls.get_mut(slot) else { return };
        match service::run(&call.op, handle) {
            Run::Io(io) => {
                if call.job.0 == 0 {
                    self.next_job += 1;
                    call.job.0 = self.next_job;
                }
                let (client, whose, (number, lost)) = (call.client, Whose::Nebd(slot), call.job);
                let job = self.jobs.insert(Job { client, whose, io: io.after(lost), serial, number });
                call.state = State::Running(job);
                self.drive(job);
            }
            Run::Extend(size) => {
                call.state = State::Extending;
                let whom = Origin { shard: self.number, slot: slot as u32, serial: call.serial };
                nebd.server.extend(call.fd, size, whom);
            }
            Run::Answer(outcome) => {
                self.nebd_end(slot, None);
                match outcome {
                    Outcome::Refused => self.nebd_refuse(slot),
                    outcome => self.nebd_finish(slot, outcome),
                }
            }
        }
    }

    /// The I/O of a call ended; `lost`: [`VolumeIo::lost_max`](crate::volume::io::VolumeIo::lost_max).
    pub(super) fn nebd_done(&mut self, slot: usize, result: Result<Pieces, VolumeError>, lost: u32) {
        let Some(call) = self.nebd.as_mut().and_then(|nebd| nebd.calls.get_mut(slot)) else { return };
        call.job.1 = lost;
        let (client, is_read) = (call.client, matches!(call.op, Op::Read { .. }));
        let alive = self.is_connected(client) && self.draining.is_none();
        self.nebd_end(slot, Some(result.is_ok()));
        let returns = self.nebd.as_ref().is_some_and(|nebd| nebd.server.options().return_io_errors);
        match result {
            Ok(pieces) if is_read => self.nebd_finish(slot, Outcome::Data(pieces)),
            Ok(_) => self.nebd_finish(slot, Outcome::Done),
            Err(_) if !alive => self.nebd_drop(slot),
            Err(why) if returns => {
                tracing::warn!(%why, "an NEBD request failed; the client is told");
                self.nebd_finish(slot, Outcome::Refused);
            }
            Err(why) => self.nebd_park(slot, &why),
        }
        self.nebd_replies();
    }

    /// A running request of a file ended, with success or not if it was an I/O.
    fn nebd_end(&mut self, slot: usize, ok: Option<bool>) {
        let now = self.io.now();
        let Some(nebd) = &mut self.nebd else { return };
        let Some(call) = nebd.calls.get_mut(slot) else { return };
        let ns = now.since_ns(call.ticket.started());
        let io = ok.and_then(|ok| call.op.io().map(|(kind, bytes)| (kind, bytes, ns, ok)));
        let orphan = std::mem::take(&mut call.orphan);
        nebd.server.end(self.number, call.fd, orphan, io, now, &mut nebd.replies);
    }

    fn nebd_finish(&mut self, slot: usize, outcome: Outcome) {
        let Some(nebd) = &mut self.nebd else { return };
        let Call { client, ticket, op, .. } = nebd.remove(slot);
        let handled = service::answer(&self.context, self.io.now(), ticket, &op, outcome);
        self.handled(client, handled);
    }

    /// kNoOK, unless it failed before and was to wait.
    fn nebd_refuse(&mut self, slot: usize) {
        let at = self.io.now().after_ms(RETRY_MS);
        let Some(nebd) = &mut self.nebd else { return };
        match nebd.calls.get_mut(slot) {
            Some(call) if call.retried => {
                (call.state, call.op) = (State::Parked, Op::Lost);
                nebd.kept_bytes -= std::mem::take(&mut call.kept);
                nebd.retry(at);
            }
            _ => self.nebd_finish(slot, Outcome::Refused),
        }
    }

    /// Leave it unanswered, and try again later.
    fn nebd_park(&mut self, slot: usize, why: &VolumeError) {
        let max = self.setup.arenas.payload.size() / PARKED_SHARE;
        let at = self.io.now().after_ms(RETRY_MS);
        let Some(nebd) = &mut self.nebd else { return };
        let Some(call) = nebd.calls.get_mut(slot) else { return };
        if !std::mem::replace(&mut call.retried, true) {
            self.context.metrics().add(Counter::NebdParked, 1);
            tracing::warn!(fd = call.fd, %why, "an NEBD request failed; it stays unanswered and is tried again");
        }
        call.state = State::Parked;
        let more = data_len(&call.op) - call.kept;
        if nebd.kept_bytes + more > max {
            call.op = Op::Lost;
            nebd.kept_bytes -= std::mem::take(&mut call.kept);
        } else {
            call.kept += more;
            nebd.kept_bytes += more;
        }
        let (client, charged) = (call.client, call.ticket.release());
        nebd.retry(at);
        if let Some(session) = self.rpc_session(client) {
            session.release(charged);
        }
    }

    /// Nobody waits for this call any more.
    fn nebd_drop(&mut self, slot: usize) {
        let Some(nebd) = &mut self.nebd else { return };
        let call = nebd.remove(slot);
        call.ticket.abandon(&self.context, self.io.now());
    }

    /// A connection is being given up: what it waits for ends as soon as it can. Nothing new is asked for it.
    pub(super) fn nebd_hangup(&mut self, index: usize) {
        let (Some(nebd), Some(conn)) = (&mut self.nebd, self.conns.get(index)) else { return };
        let of = |call: &Call| call.client.index == index && call.client.serial == conn.serial;
        let mine: Vec<(usize, State, NebdFd)> =
            nebd.calls.iter().filter(|(_, c)| of(c)).map(|(slot, c)| (slot, c.state, c.fd)).collect();
        for (slot, state, fd) in mine {
            match state {
                State::Parked => self.nebd_drop(slot),
                State::Asked | State::Extending => {}
                State::Running(job) => {
                    if let Some(nebd) = &mut self.nebd
                        && let Some(call) = nebd.calls.get_mut(slot)
                        && !std::mem::replace(&mut call.orphan, true)
                    {
                        nebd.server.orphaned(fd);
                    }
                    if self.jobs.get_mut(job).is_some_and(|job| job.io.cancel(VolumeError::Stopping)) {
                        self.jobs.remove(job);
                        self.nebd_done(slot, Err(VolumeError::Stopping), 0);
                    }
                }
            }
        }
        self.nebd_replies();
    }
}

#[cfg(test)]
mod tests;
