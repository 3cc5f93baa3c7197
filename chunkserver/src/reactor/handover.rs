//! Handing over to another process, and taking over from one (rule 29): what the loop of one core does for it.
//!
//! The conductor (`serve`) sets the [`Stage`]; every reactor does its part and reports. Nothing here is final before
//! [`Stage::Leave`]: back at [`Stage::Serve`], the loop goes on with all its connections, and no client has noticed more
//! than a pause.
//!
//! ```text
//!  old   Serve ─► WriteBack ─► Hold ─► Leave ─► (connections as values, the loop ends)
//!                     └──────────┴──► Serve                        given up
//!  new   Wait ─► Serve                                             adopts the connections
//! ```
//!
//! * WriteBack: everything is served. What others can lead is handed to them now, so that its clients do not wait out the pause;
//!   dirty data is written back.
//! * Hold: no connection is accepted, no byte of a client is received; what was begun is answered. Peers are heard on:
//!   without them nothing commits.
//! * Leave: answers that a client does not take are cut off where the kernel has them, and go with it; the log is sealed,
//!   every device operation reaped, peers are closed.

use super::conn::{Conn, Session};
use super::{Owner, Reactor, token};
use crate::control::shards::Port;
use crate::io::buffer::RecvBuf;
use crate::io::{Cancel, ConnId, Instant, Io, Op};
use crate::metrics::Counter;
use crate::{nbd, rpc, service};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Answers that were given get this long to leave before they are cut off, milliseconds.
const SEND_GRACE_MS: u64 = 20;
/// A copyset that needs nobody's consent leads soon after recovery; one that does not is not waited for longer than this,
/// milliseconds.
const LEAD_MS: u64 = 2000;
/// So long others get to take over what they can lead, milliseconds; after that they do it when we are gone.
const HAND_OVER_MS: u64 = 600;
/// So long clients of what others lead by now are still answered: who does not ask meanwhile asks a server that is silent, and
/// waits as long as that is. Milliseconds.
const REDIRECT_MS: u64 = 100;
/// How often a loop looks for the next stage, milliseconds.
const LOOK_MS: u64 = 1;
/// Write-back rounds that leave little to replay: the one under way, and a whole one.
const ROUNDS: u64 = 2;

/// How far a hand-over is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    /// None is under way.
    Serve = 0,
    /// Write back what is dirty, so that little must be replayed; serve on.
    WriteBack = 1,
    /// Begin nothing new, answer what was begun.
    Hold = 2,
    /// End, and leave the connections to somebody else. There is no way back.
    Leave = 3,
    /// Recover, and wait: another process may still decide to go on itself.
    Wait = 4,
}

impl Stage {
    /// No client's bytes are received.
    pub(super) fn is_holding(self) -> bool {
        matches!(self, Self::Hold | Self::Leave)
    }
}

/// What the conductor and the reactors of a process tell each other.
#[derive(Debug)]
pub struct Pause {
    /// The stage, and below it how many have reported it done: in one word, for a report must count for no other stage.
    state: AtomicU64,
    shards: u16,
}

/// Bits of the count.
const REPORTS: u32 = 32;

impl Pause {
    /// For so many shards.
    #[must_use]
    pub fn new(stage: Stage, shards: u16) -> Arc<Self> {
        Arc::new(Self { state: AtomicU64::new((stage as u64) << REPORTS), shards })
    }
    /// Go to a stage; nobody has reported it done. Ring the shards' bells afterwards. The conductor's alone.
    pub fn set(&self, stage: Stage) {
        self.state.store((stage as u64) << REPORTS, Ordering::Release);
    }
    /// Where it is.
    #[must_use]
    pub fn stage(&self) -> Stage {
        match self.state.load(Ordering::Acquire) >> REPORTS {
            1 => Stage::WriteBack,
            2 => Stage::Hold,
            3 => Stage::Leave,
            4 => Stage::Wait,
            _ => Stage::Serve,
        }
    }
    /// All shards are through with the stage.
    #[must_use]
    pub fn is_reported(&self) -> bool {
        self.state.load(Ordering::Acquire) as u32 >= u32::from(self.shards)
    }
    /// One more is through with this stage. Too late if another one has been set: then it counts for nothing.
    fn report(&self, stage: Stage) {
        let counted = |state: u64| (state >> REPORTS == stage as u64).then_some(state + 1);
        let _ = self.state.fetch_update(Ordering::AcqRel, Ordering::Acquire, counted);
    }
}

/// A client's connection on its way to another process or another life of this one.
#[derive(Debug)]
pub struct Handed {
    /// The socket.
    pub conn: ConnId,
    /// What is spoken on it, and where it stands.
    pub session: SavedSession,
    /// To be given to the session before anything is received.
    pub input: Vec<u8>,
    /// To be sent before anything else is.
    pub unsent: Vec<u8>,
}

/// A session as values.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SavedSession {
    /// baidu_std and HTTP.
    Rpc(rpc::Saved),
    /// NBD.
    Nbd(nbd::Saved),
}

/// What is left of a loop that has ended.
#[derive(Debug)]
pub struct Parting<I> {
    /// Its kernel; nothing of it is in flight on these connections.
    pub io: I,
    /// Its end of the wire to the control thread.
    pub control: Option<Port>,
    /// Its clients.
    pub connections: Vec<Handed>,
}

/// This loop's part in the stage.
#[derive(Debug)]
pub(super) struct Part {
    stage: Stage,
    begun: Instant,
    /// WriteBack: when it last led what others can.
    led: Option<Instant>,
    reported: bool,
    /// Write-back rounds when it began.
    rounds: u64,
    /// Leave: when sends are cut off; that they were; that the shard was told to end; that peers were given up.
    cut_at: Instant,
    /// Wait: when a copyset that has no leader yet is not waited for any more.
    lead_by: Option<Instant>,
    cut: bool,
    draining: bool,
    alone: bool,
    done: bool,
}

impl Part {
    fn new(stage: Stage, now: Instant, rounds: u64) -> Self {
        let cut_at = now.after_ms(SEND_GRACE_MS);
        Self {
            stage,
            begun: now,
            led: None,
            reported: false,
            rounds,
            cut_at,
            lead_by: None,
            cut: false,
            draining: false,
            alone: false,
            done: false,
        }
    }
}

impl<I: Io> Reactor<I> {
    /// Take part in hand-overs; with connections to adopt once the stage is [`Stage::Serve`].
    pub fn take_part(&mut self, pause: Arc<Pause>, adopted: Vec<Handed>) {
        self.stage = pause.stage();
        self.pause = Some(pause);
        self.adopted = adopted;
    }

    /// It has ended for a hand-over: [`Self::part`] gives what is left.
    #[must_use]
    pub fn has_left(&self) -> bool {
        self.left() == Some(true)
    }

    /// What is left when the loop has ended.
    #[must_use]
    pub fn part(mut self) -> Parting<I> {
        self.context.metrics().sub(Counter::Connections, self.conns.len() as u64);
        let connections = self.conns.drain().filter_map(Conn::saved).collect();
        Parting { io: self.io, control: self.setup.control, connections }
    }

    /// No client's bytes are received.
    pub(super) fn is_holding(&self) -> bool {
        self.stage.is_holding()
    }
    /// Answers stay here.
    pub(super) fn is_cut(&self) -> bool {
        self.part.as_ref().is_some_and(|part| part.cut)
    }
    /// Peers are not spoken to any more.
    pub(super) fn is_alone(&self) -> bool {
        self.part.as_ref().is_some_and(|part| part.alone)
    }
    /// The loop ends for a hand-over: whether it is through.
    pub(super) fn left(&self) -> Option<bool> {
        self.part.as_ref().filter(|part| part.stage == Stage::Leave).map(|part| part.done)
    }
    pub(super) fn handover_deadline(&self) -> Instant {
        match &self.part {
            Some(part) if !part.done => self.io.now().after_ms(LOOK_MS),
            _ if !self.adopted.is_empty() => self.io.now().after_ms(LOOK_MS),
            _ => Instant::FAR,
        }
    }

    /// At the beginning of a turn, before mail is received: what was mailed before the stage was set is seen in it.
    pub(super) fn look_at_stage(&mut self) {
        if let Some(pause) = &self.pause {
            self.stage = pause.stage();
        }
    }

    pub(super) fn handover_step(&mut self) {
        let (stage, now) = (self.stage, self.io.now());
        if self.part.as_ref().map_or(Stage::Serve, |part| part.stage) != stage {
            let rounds = self.shard.write_back().0;
            self.part = (stage != Stage::Serve).then(|| Part::new(stage, now, rounds));
            match stage {
                Stage::Serve => self.resume(),
                Stage::Hold => self.io.cancel(Cancel::Receives),
                Stage::WriteBack | Stage::Leave | Stage::Wait => {}
            }
        }
        let through = match stage {
            Stage::Serve => return self.adopt(),
            Stage::WriteBack => self.led_by_others(now) & self.written_back(),
            Stage::Hold => self.is_held(),
            Stage::Wait => {
                let serving = self.shard.serving();
                let lead_by = self
                    .part
                    .as_mut()
                    .filter(|_| serving)
                    .map(|part| *part.lead_by.get_or_insert(now.after_ms(LEAD_MS)));
                serving && (self.shard.leads_alone() || lead_by.is_some_and(|at| at <= now))
            }
            Stage::Leave => self.leave(now),
        };
        if let (Some(part), Some(pause)) = (&mut self.part, &self.pause)
            && through
            && !std::mem::replace(&mut part.reported, true)
        {
            pause.report(stage);
        }
    }

    /// Others lead what they can, and whoever asked us lately has been sent to them.
    fn led_by_others(&mut self, now: Instant) -> bool {
        let Some(part) = &mut self.part else { return true };
        if part.begun.after_ms(HAND_OVER_MS) <= now {
            return true;
        }
        if self.shard.hand_over() {
            part.led = Some(now);
        }
        part.led.is_none_or(|led| led.after_ms(REDIRECT_MS) <= now)
    }

    fn written_back(&mut self) -> bool {
        let (rounds, dirty) = self.shard.write_back();
        let through = dirty == 0 || self.part.as_ref().is_some_and(|part| rounds >= part.rounds + ROUNDS);
        if !through {
            self.shard.want_memory();
        }
        through
    }

    /// Nothing is owed to a client but bytes, and nothing more of them can arrive.
    fn is_held(&self) -> bool {
        let asked = !self.waiting.is_empty() || self.jobs.iter().any(|(_, job)| !job.rests());
        self.accepting == 0 && !asked && self.nebd_is_held() && self.conns.iter().all(|(_, c)| c.is_held())
    }

    /// The stages of an end; true when it is over.
    fn leave(&mut self, now: Instant) -> bool {
        let Some(part) = &mut self.part else { return false };
        let owed = |conn: &Conn| conn.is_client() && !conn.doomed && conn.owes_bytes();
        if !part.cut {
            if self.conns.iter().any(|(_, conn)| owed(conn)) && now < part.cut_at {
                return false;
            }
            part.cut = true;
            self.io.cancel(Cancel::Sends);
        }
        if self.conns.iter().any(|(_, conn)| conn.is_client() && conn.sending) {
            return false;
        }
        if !std::mem::replace(&mut part.draining, true) {
            self.shard.drain(); // leaders among others are transferred
            self.again = true;
        }
        if !self.shard.stopped() || !self.shard.is_idle() {
            return false;
        }
        if !std::mem::replace(&mut part.alone, true) {
            self.io.cancel(Cancel::Receives); // connections that are being made, too
            let peers: Vec<usize> = self.conns.iter().filter(|(_, c)| !c.is_client()).map(|(index, _)| index).collect();
            peers.into_iter().for_each(|index| self.doom(index));
            self.remote.give_up();
        }
        let clients = self.conns.iter().all(|(_, conn)| conn.is_client() && !conn.doomed);
        let through = clients && self.dialing == 0;
        if let Some(part) = &mut self.part {
            part.done = through;
        }
        through
    }

    /// It was given up: go on where it was stopped.
    fn resume(&mut self) {
        self.accept_again = Some(self.io.now());
        let all: Vec<usize> = self.conns.iter().map(|(index, _)| index).collect();
        for index in all {
            self.wait_for_input(index);
        }
        let resting: Vec<usize> = self.jobs.iter().filter(|(_, job)| job.rests()).map(|(key, _)| key).collect();
        resting.into_iter().for_each(|key| self.drive(key));
        self.again = true;
    }

    /// Take over the connections that wait for it.
    fn adopt(&mut self) {
        if self.adopted.is_empty() || !self.shard.serving() {
            return;
        }
        for handed in std::mem::take(&mut self.adopted) {
            let conn = handed.conn;
            match self.restored(handed.session, handed.unsent.into()) {
                Ok(session) => {
                    let index = self.add(conn, session);
                    self.give_input(index, RecvBuf::new(Bytes::from(handed.input)));
                }
                Err(why) => {
                    tracing::warn!(why, "a connection that was handed over is closed");
                    self.context.metrics().add(Counter::ClosedByUs, 1);
                    self.io.submit(token(Owner::Close, 0, 0xffff_ffff), Op::Close { conn });
                }
            }
        }
        self.again = true;
    }

    fn restored(&self, session: SavedSession, unsent: Bytes) -> Result<Session, String> {
        match session {
            SavedSession::Rpc(saved) => rpc::Connection::restore(self.options, saved, unsent)
                .map(|connection| Session::Rpc(Box::new(connection)))
                .map_err(|error| error.to_string()),
            SavedSession::Nbd(saved) => {
                nbd::Session::restore(self.setup.catalog.clone(), nbd::Limits::default(), saved, unsent)
                    .map(|session| Session::Nbd(Box::new(session)))
                    .map_err(|error| error.to_string())
            }
        }
    }
}

impl Conn {
    /// A client's connection as values; nothing is in flight on it.
    fn saved(self) -> Option<Handed> {
        let (conn, mut session, rest, mut unsent) = self.dismantled();
        loop {
            let bufs: Vec<Bytes> = match &mut session {
                Session::Rpc(connection) => {
                    connection.sent();
                    connection.take_send(usize::MAX).into_vec()
                }
                Session::Nbd(session) => {
                    session.sent();
                    session.take_send().into_vec()
                }
                _ => return None,
            };
            if bufs.is_empty() {
                break;
            }
            unsent.extend(bufs);
        }
        let (session, mut input) = match &session {
            Session::Rpc(connection) => {
                let (saved, begun) = connection.save(service::names);
                (SavedSession::Rpc(saved), begun)
            }
            Session::Nbd(session) => {
                let (saved, begun) = session.save();
                (SavedSession::Nbd(saved), begun)
            }
            _ => return None,
        };
        input.extend_from_slice(&rest);
        Some(Handed { conn, session, input, unsent: unsent.concat() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_counts_for_its_own_stage_alone() {
        let pause = Pause::new(Stage::Serve, 2);
        pause.set(Stage::WriteBack);
        pause.report(Stage::WriteBack);
        assert!(!pause.is_reported());
        pause.set(Stage::Hold); // the other one took too long
        pause.report(Stage::WriteBack);
        pause.report(Stage::WriteBack);
        assert_eq!((pause.stage(), pause.is_reported()), (Stage::Hold, false));
        pause.report(Stage::Hold);
        pause.report(Stage::Hold);
        assert_eq!((pause.stage(), pause.is_reported()), (Stage::Hold, true));
    }
}
