//! The requests of a client: which are on the wire, which wait, and what an answer or its absence leads to. It knows no
//! socket and no clock.
//!
//! A request is parked while there is no connection, queued when its frame waits for the socket, sent when the last byte
//! of it is in the kernel, and waits for its time after a failed attempt. It stays in the table until its callback is
//! due, so whatever happens to the connection, no request is lost and none is completed twice. An answer to a request
//! that is not wholly sent is a breach of protocol: completing it would leave its payload in use.

use std::{
    collections::{BTreeSet, VecDeque},
    io::IoSlice,
    time::{Duration, Instant},
};

use bytes::Bytes;
use proto::code::{ELOGOFF, errno::EHOSTDOWN};
use slab::Slab;
use smallvec::SmallVec;

use crate::{
    config::Config,
    error::{Error, Failure},
    outgoing::{Outgoing, PIECES},
    request::{Body, Budget, Done, MAX_IO, Outcome, ReadBuffer, Reply, Request},
};

/// What a client has counted since it began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Attempts after the first.
    pub retries: u64,
    /// Connections made.
    pub connects: u64,
    /// Connections that broke.
    pub disconnects: u64,
    /// Replies nobody waited for.
    pub late_replies: u64,
    /// Keep-alives answered kOK.
    pub heartbeats: u64,
    /// Keep-alives refused or not answered in time.
    pub heartbeats_failed: u64,
}

/// A request that is over, and whom to tell.
pub(crate) struct Finished {
    done: Done,
    outcome: Outcome,
}

impl Finished {
    pub(crate) fn new(done: Done, outcome: Outcome) -> Self {
        Self { done, outcome }
    }

    pub(crate) fn deliver(self) {
        (self.done)(self.outcome);
    }
}

/// What to do with the attachment of a reply.
#[derive(Debug)]
pub(crate) enum Attachment {
    /// Pass it over (there may be none).
    Skip,
    /// It has exactly the size of this buffer, which [`Exchange::on_attachment`] gets back filled.
    Into(usize, ReadBuffer),
}

/// The server answered what it cannot have read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a reply to a request that is not wholly sent")]
pub(crate) struct TooEarly;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    Down,
    Up,
    /// The server is stopping: what is in flight may still be answered, nothing new is sent.
    Leaving(Instant),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Parked,
    Waiting(Instant),
    Queued,
    Sent,
}

struct Entry {
    body: Body,
    payload: Bytes,
    buffer: Option<ReadBuffer>,
    budget: Budget,
    done: Done,
    state: State,
    /// Of the last attempt.
    correlation_id: i64,
    /// Order of arrival.
    serial: u64,
    retries: u32,
    /// Failures that make the pauses longer.
    strikes: u32,
}

/// The state machine.
pub(crate) struct Exchange {
    config: Config,
    entries: Slab<Entry>,
    outgoing: Outgoing,
    parked: VecDeque<usize>,
    timers: BTreeSet<(Instant, usize)>,
    link: Link,
    last_connect: Option<Instant>,
    /// Entries queued or sent.
    on_wire: usize,
    attempts: u32,
    serial: u64,
    /// Calls of the file service and of the heartbeat service so far.
    log_ids: [i64; 2],
    stopped: bool,
    finished: Vec<Finished>,
    pub(crate) stats: Stats,
}

impl Exchange {
    pub(crate) fn new(config: Config) -> Self {
        Self {
            config,
            entries: Slab::new(),
            outgoing: Outgoing::default(),
            parked: VecDeque::new(),
            timers: BTreeSet::new(),
            link: Link::Down,
            last_connect: None,
            on_wire: 0,
            attempts: 0,
            serial: 0,
            log_ids: [0; 2],
            stopped: false,
            finished: Vec::new(),
            stats: Stats::default(),
        }
    }

    /// Takes a request; gives it back if it is over at once.
    pub(crate) fn submit(&mut self, request: Request) -> Option<Finished> {
        let Request { body, payload, buffer, budget, done } = request;
        let size = payload.len().max(buffer.as_ref().map_or(0, ReadBuffer::len)) as u64;
        let refusal =
            if self.stopped { Some(Error::Stopped) } else { (size > MAX_IO).then_some(Error::TooLarge(size)) };
        if let Some(error) = refusal {
            return Some(Finished::new(done, Outcome { result: Err(error), buffer, retries: 0 }));
        }
        self.serial += 1;
        let entry = Entry {
            body,
            payload,
            buffer,
            budget,
            done,
            state: State::Parked,
            correlation_id: 0,
            serial: self.serial,
            retries: 0,
            strikes: 0,
        };
        let key = self.entries.insert(entry);
        if let Budget::Once(until) = budget {
            self.timers.insert((until, key));
        }
        self.try_again(key);
        None
    }

    pub(crate) fn is_up(&self) -> bool {
        self.link == Link::Up
    }

    /// Whether there are bytes for the socket.
    pub(crate) fn has_output(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Requests queued or sent.
    pub(crate) fn in_flight(&self) -> usize {
        self.on_wire
    }

    /// Requests that wait for a connection.
    pub(crate) fn parked(&self) -> usize {
        self.parked.len()
    }

    /// The next bytes for the socket.
    pub(crate) fn output(&self) -> SmallVec<[IoSlice<'_>; PIECES]> {
        self.outgoing.pieces()
    }

    /// The socket took so many of them.
    pub(crate) fn sent(&mut self, count: usize) {
        let entries = &mut self.entries;
        self.outgoing.advance(count, |key, correlation_id| {
            let entry = entries.get_mut(key).filter(|entry| entry.correlation_id == correlation_id);
            if let Some(entry) = entry
                && entry.state == State::Queued
            {
                entry.state = State::Sent;
            }
        });
    }

    /// When a connection is wanted; `None` if not at all.
    pub(crate) fn connect_at(&self, now: Instant) -> Option<Instant> {
        let wanted = self.link == Link::Down && !self.parked.is_empty();
        let paced = self.last_connect.map_or(now, |last| last + self.config.host_down_interval);
        wanted.then_some(paced)
    }

    pub(crate) fn on_connected(&mut self, now: Instant) {
        self.last_connect = Some(now);
        self.link = Link::Up;
        self.stats.connects += 1;
        for key in std::mem::take(&mut self.parked) {
            self.enqueue(key);
        }
    }

    pub(crate) fn on_connect_failed(&mut self, now: Instant) {
        self.last_connect = Some(now);
        for key in std::mem::take(&mut self.parked) {
            self.failed(key, Failure::HostDown, now);
        }
    }

    /// The connection is gone, and with it every answer.
    pub(crate) fn on_broken(&mut self, now: Instant) {
        self.link = Link::Down;
        self.stats.disconnects += 1;
        self.outgoing.clear();
        let on_wire = |(key, entry): (usize, &Entry)| {
            matches!(entry.state, State::Queued | State::Sent).then_some((entry.serial, key))
        };
        let mut lost: Vec<(u64, usize)> = self.entries.iter().filter_map(on_wire).collect();
        lost.sort_unstable();
        for (_, key) in lost {
            self.failed(key, Failure::HostDown, now);
        }
    }

    /// Whether the connection of a stopping server has nothing more to give.
    pub(crate) fn is_left(&self, now: Instant) -> bool {
        match self.link {
            Link::Leaving(since) => self.on_wire == 0 || now >= since + self.config.health_check_interval,
            _ => false,
        }
    }

    /// A reply without its attachment of `length` bytes.
    pub(crate) fn on_reply(
        &mut self,
        correlation_id: i64,
        error_code: i32,
        body: Bytes,
        length: usize,
        now: Instant,
    ) -> Result<Attachment, TooEarly> {
        let Some((key, entry)) = self.find(correlation_id)? else { return Ok(Attachment::Skip) };
        if error_code != 0 {
            self.on_rpc_error(key, error_code, now);
            return Ok(Attachment::Skip);
        }
        let reply = match entry.body.judge(body) {
            Ok(reply) => reply,
            Err(failure) => {
                self.failed(key, failure, now);
                return Ok(Attachment::Skip);
            }
        };
        match (reply, entry.buffer.as_ref().map(ReadBuffer::len)) {
            (Ok(_), Some(wanted)) if wanted != length => {
                self.finish(key, Err(Error::Reply("not as many bytes as asked for")));
            }
            (Ok(_), Some(1..)) => {
                // The entry stays where it is: if the connection breaks now, it is asked for again.
                if let Some(buffer) = entry.buffer.take() {
                    return Ok(Attachment::Into(key, buffer));
                }
            }
            (reply, _) => self.finish(key, reply),
        }
        Ok(Attachment::Skip)
    }

    /// A reply the framing refused.
    pub(crate) fn on_bad_reply(&mut self, correlation_id: i64, now: Instant) -> Result<(), TooEarly> {
        if let Some((key, _)) = self.find(correlation_id)? {
            self.failed(key, Failure::BadReply, now);
        }
        Ok(())
    }

    /// The attachment of a reply is complete: the read is done.
    pub(crate) fn on_attachment(&mut self, key: usize, buffer: ReadBuffer) {
        self.give_back(key, buffer);
        self.finish(key, Ok(Reply::Done));
    }

    /// The attachment will not become complete.
    pub(crate) fn give_back(&mut self, key: usize, buffer: ReadBuffer) {
        if let Some(entry) = self.entries.get_mut(key) {
            entry.buffer = Some(buffer);
        }
    }

    /// Does what is due.
    pub(crate) fn poll(&mut self, now: Instant) {
        while let Some((until, key)) = self.timers.first().copied()
            && until <= now
        {
            self.timers.remove(&(until, key));
            match self.entries.get(key).map(|entry| (entry.budget, entry.state)) {
                Some((Budget::Once(_), _)) => self.failed(key, Failure::TimedOut, now),
                Some((_, State::Waiting(_))) => self.try_again(key),
                _ => {}
            }
        }
    }

    /// When [`Self::poll`], a connect or [`Self::is_left`] is due.
    pub(crate) fn deadline(&self, now: Instant) -> Option<Instant> {
        let leaving = match self.link {
            Link::Leaving(since) => Some(since + self.config.health_check_interval),
            _ => None,
        };
        let timer = self.timers.first().map(|(at, _)| *at);
        [self.connect_at(now), leaving, timer].into_iter().flatten().min()
    }

    /// Ends everything: what is open fails, nothing more is taken.
    pub(crate) fn stop(&mut self) {
        self.stopped = true;
        self.link = Link::Down;
        self.outgoing.clear();
        // First, so that nothing looks for each of its requests in them.
        self.parked.clear();
        self.timers.clear();
        let mut open: Vec<(u64, usize)> = self.entries.iter().map(|(key, entry)| (entry.serial, key)).collect();
        open.sort_unstable();
        for (_, key) in open {
            self.finish(key, Err(Error::Stopped));
        }
    }

    /// Takes the requests that are over.
    pub(crate) fn take_finished(&mut self, into: &mut VecDeque<Finished>) {
        into.extend(self.finished.drain(..));
    }

    fn find(&mut self, correlation_id: i64) -> Result<Option<(usize, &mut Entry)>, TooEarly> {
        let key = (correlation_id & i64::from(u32::MAX)) as usize;
        match self.entries.get_mut(key).filter(|entry| entry.correlation_id == correlation_id) {
            Some(entry) if entry.state == State::Sent => Ok(Some((key, entry))),
            Some(entry) if entry.state == State::Queued => Err(TooEarly),
            _ => {
                self.stats.late_replies += 1;
                Ok(None)
            }
        }
    }

    fn on_rpc_error(&mut self, key: usize, error_code: i32, now: Instant) {
        if error_code == ELOGOFF && self.link == Link::Up {
            tracing::info!("the server is stopping");
            self.link = Link::Leaving(now);
        }
        let gone = [ELOGOFF, EHOSTDOWN].contains(&error_code);
        self.failed(key, if gone { Failure::HostDown } else { Failure::Rpc(error_code) }, now);
    }

    /// Queues or parks an entry that is neither on the wire nor waiting.
    fn try_again(&mut self, key: usize) {
        if self.link == Link::Up {
            return self.enqueue(key);
        }
        if let Some(entry) = self.entries.get_mut(key) {
            entry.state = State::Parked;
            self.parked.push_back(key);
        }
    }

    fn enqueue(&mut self, key: usize) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        // No attempt has number 0, so the id 0 stands for "not on the wire".
        self.attempts = self.attempts.wrapping_add(1).max(1);
        entry.correlation_id = i64::from(self.attempts) << 32 | key as i64;
        entry.state = State::Queued;
        self.on_wire += 1;
        let log_id = &mut self.log_ids[usize::from(entry.body.is_heartbeat())];
        *log_id += 1;
        let (body, payload, log_id, id) = (&entry.body, entry.payload.clone(), *log_id, entry.correlation_id);
        let length = payload.len();
        self.outgoing.push(key, id, payload, |head| body.put(head, id, log_id, length));
    }

    /// An attempt failed: again, or not.
    fn failed(&mut self, key: usize, failure: Failure, now: Instant) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        let pause = match entry.budget {
            Budget::Once(_) => None,
            Budget::Attempts(most) => (entry.retries + 1 < most).then_some(self.config.retry_interval),
            Budget::Forever if failure == Failure::HostDown => Some(Duration::ZERO),
            Budget::Forever => {
                entry.strikes = entry.strikes.saturating_add(1);
                Some(pause(&self.config, entry.strikes))
            }
        };
        let Some(mut pause) = pause else {
            let attempts = entry.retries + 1;
            return self.finish(key, Err(Error::Attempts { attempts, last: failure }));
        };
        if matches!(entry.state, State::Queued | State::Sent) {
            self.on_wire -= 1;
        }
        entry.retries = entry.retries.saturating_add(1);
        entry.correlation_id = 0;
        self.stats.retries += 1;
        if pause.is_zero() && self.link == Link::Up {
            // EHOSTDOWN by word of the server, over a connection that works.
            pause = self.config.host_down_interval;
        }
        if pause.is_zero() {
            entry.state = State::Parked;
            self.parked.push_back(key);
        } else {
            entry.state = State::Waiting(now + pause);
            self.timers.insert((now + pause, key));
        }
    }

    fn finish(&mut self, key: usize, result: Result<Reply, Error>) {
        let Some(entry) = self.entries.try_remove(key) else { return };
        match (entry.state, entry.budget) {
            (State::Queued | State::Sent, _) => self.on_wire -= 1,
            (State::Waiting(until), _) => drop(self.timers.remove(&(until, key))),
            (State::Parked, _) => self.parked.retain(|parked| *parked != key),
        }
        if let Budget::Once(until) = entry.budget {
            self.timers.remove(&(until, key));
        }
        if entry.body.is_heartbeat() {
            let count = if result.is_ok() { &mut self.stats.heartbeats } else { &mut self.stats.heartbeats_failed };
            *count += 1;
        }
        let outcome = Outcome { result, buffer: entry.buffer, retries: entry.retries };
        self.finished.push(Finished::new(entry.done, outcome));
    }
}

/// How long I/O waits after its `strikes`th failure that was not a lost connection.
fn pause(config: &Config, strikes: u32) -> Duration {
    match strikes {
        0 | 1 => config.retry_interval,
        _ => config.retry_interval.saturating_mul(strikes).min(config.retry_interval_max.max(config.retry_interval)),
    }
}

#[cfg(test)]
#[path = "exchange_tests.rs"]
mod tests;
