//! The table of files: numbers, states, who waits for what (nebd-behaviour §B4, §B5, §B8). Sans-I/O.
//!
//! ```text
//!            open: the executor opens, the record is written
//!  CLOSED ────────────────────────────────────────────────────► OPENED
//!     ▲◄──── silent too long: no request running, executor closes ──┤   the record stays
//!     └────► CloseFile: the same, and the record is removed ◄───────┘   then the file is gone
//! ```
//! Invariants
//! * A number belongs to one name until CloseFile, over heartbeat closes and restarts; a request for a number on record
//!   is never answered "unknown": it waits for the reopening, or opens the file itself.
//! * Requests of a file go in the order they came, past nobody who waits: one that waits to close or to open is not
//!   overtaken (writer-preferring). A file closes when none of its requests is running. Files never wait for each other.
//! * One task of a file is with the worker at a time.
//! * Who asked is answered once: [`Effect::Go`] (then [`Files::end`] once), [`Effect::Opened`], [`Effect::Done`] or
//!   [`Effect::Refused`].

use super::executor::OpenFlags;
use super::stat::{FileStat, IoKindStat};
use crate::io::Instant;
use crate::limits::NEBD_FILES_MAX;
use crate::shard::request::Origin;
use std::collections::{BTreeMap, VecDeque};

/// Number of a file, positive. Never an operating system's descriptor.
pub type NebdFd = i32;

/// What to do now.
#[derive(Debug, PartialEq, Eq)]
pub enum Effect<H> {
    /// This request may run; it counts as running until [`Files::end`].
    Go {
        /// Who asked.
        whom: Origin,
        /// With this.
        handle: H,
    },
    /// The file is open.
    Opened {
        /// Who asked.
        whom: Origin,
        /// Its number.
        fd: NebdFd,
    },
    /// The file is closed (or never was known, which is as good).
    Done(Origin),
    /// kNoOK.
    Refused(Origin),
    /// For the worker; it answers with [`Files::opened`] or [`Files::closed`].
    Task(Task),
}

/// Slow work on a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Task {
    /// Open and record it.
    Open {
        /// Number.
        fd: NebdFd,
        /// Name.
        name: String,
        /// Flags to open it with.
        flags: OpenFlags,
        /// As the record says, after a restart.
        reopen: bool,
    },
    /// Close it and perhaps forget it.
    Close {
        /// Number.
        fd: NebdFd,
        /// Name.
        name: String,
        /// It is open.
        open: bool,
        /// Remove the record.
        forget: bool,
    },
}

/// How a [`Task::Close`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closed {
    /// Everything was done.
    Done,
    /// The executor did not close it: it is open still.
    StillOpen,
    /// Closed, but the record could not be removed.
    StillRecorded,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ask {
    Io,
    Open(OpenFlags),
    Close,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    /// The first in the queue, with OpenFile.
    Call,
    /// The first in the queue, with a request for a closed file.
    Request,
    /// The start of the server.
    Start,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    CloseFile(Origin),
    Silent,
}

#[derive(Debug)]
enum State<H> {
    Closed,
    Opening(OpenFlags, By),
    Open(H),
    /// Closed for good, about to leave the table.
    Gone,
    /// Waits for running requests (`tasked` false), then for the worker.
    Closing {
        handle: Option<H>,
        why: Why,
        tasked: bool,
    },
}

#[derive(Debug)]
struct File<H> {
    name: String,
    flags: OpenFlags,
    recorded: bool,
    state: State<H>,
    /// Requests between [`Effect::Go`] and [`Files::end`].
    running: u32,
    /// Of these, the ones whose connection broke. New requests wait for them: the client sends them again elsewhere,
    /// and an old copy must not land after what follows the new one.
    orphans: u32,
    seen: Instant,
    waiting: VecDeque<(Origin, Ask)>,
    stat: FileStat,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Next {
    Nothing,
    Again,
    /// The file is gone; these asked for it, or its name, meanwhile.
    Gone(String, Vec<(Origin, Ask)>),
}

/// A file on record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// Its number.
    pub fd: NebdFd,
    /// Its name.
    pub name: String,
    /// Flags it was opened with.
    pub flags: OpenFlags,
}

/// All files.
#[derive(Debug)]
pub struct Files<H> {
    files: BTreeMap<NebdFd, File<H>>,
    by_name: BTreeMap<String, NebdFd>,
    last: NebdFd,
    timeout_ns: u64,
}

impl<H: Clone> Files<H> {
    /// A table with the files on record, all to be opened again: their tasks are in `out`. A file without heartbeat for
    /// `timeout_ns` is closed.
    #[must_use]
    pub fn new(known: Vec<Known>, timeout_ns: u64, now: Instant, out: &mut Vec<Effect<H>>) -> Self {
        let mut this = Self { files: BTreeMap::new(), by_name: BTreeMap::new(), last: 0, timeout_ns };
        for Known { fd, name, flags } in known {
            out.push(Effect::Task(Task::Open { fd, name: name.clone(), flags, reopen: true }));
            let mut file = File::new(name.clone(), now);
            (file.flags, file.recorded, file.state) = (flags, true, State::Opening(flags, By::Start));
            this.files.insert(fd, file);
            this.by_name.insert(name, fd);
            this.last = this.last.max(fd);
        }
        this
    }

    /// OpenFile. A new name uses up a number even if it cannot be opened.
    pub fn open(&mut self, name: &str, flags: OpenFlags, whom: Origin, now: Instant, out: &mut Vec<Effect<H>>) {
        let fd = match self.by_name.get(name) {
            Some(&fd) => fd,
            None if self.files.len() >= NEBD_FILES_MAX => return out.push(Effect::Refused(whom)),
            None => self.create(name, now),
        };
        self.ask(fd, whom, Ask::Open(flags), now, out);
    }

    /// Any request but those two.
    pub fn request(&mut self, fd: NebdFd, whom: Origin, now: Instant, out: &mut Vec<Effect<H>>) {
        self.ask(fd, whom, Ask::Io, now, out);
    }

    /// CloseFile.
    pub fn close(&mut self, fd: NebdFd, whom: Origin, now: Instant, out: &mut Vec<Effect<H>>) {
        self.ask(fd, whom, Ask::Close, now, out);
    }

    /// No task is with the worker.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        let tasked = |state: &State<H>| matches!(state, State::Opening(..) | State::Closing { tasked: true, .. });
        !self.files.values().any(|file| tasked(&file.state))
    }

    /// The connection of a running request broke; [`Self::end`] is still to come, with `orphan` set.
    pub fn orphaned(&mut self, fd: NebdFd) {
        if let Some(file) = self.files.get_mut(&fd) {
            file.orphans += 1;
        }
    }

    /// A running request ended.
    pub fn end(&mut self, fd: NebdFd, orphan: bool, now: Instant, out: &mut Vec<Effect<H>>) {
        let Some(file) = self.files.get_mut(&fd) else { return };
        assert!(file.running > 0 && (!orphan || file.orphans > 0), "a request ended twice");
        file.running -= 1;
        file.orphans -= u32::from(orphan);
        if matches!(file.state, State::Closing { tasked: false, .. }) || orphan {
            self.pump(fd, now, out);
        }
    }

    /// Count an I/O that ended.
    pub fn count(&mut self, fd: NebdFd, kind: IoKindStat, bytes: u64, ns: u64, ok: bool) {
        if let Some(file) = self.files.get_mut(&fd) {
            file.stat.count(kind, bytes, ns, ok);
        }
    }

    /// A [`Task::Open`] ended.
    pub fn opened(&mut self, fd: NebdFd, result: Option<H>, now: Instant, out: &mut Vec<Effect<H>>) {
        let Some(file) = self.files.get_mut(&fd) else { return };
        let State::Opening(flags, by) = file.state else { return };
        match result {
            Some(handle) => {
                (file.flags, file.recorded, file.seen) = (flags, true, now);
                file.state = State::Open(handle);
            }
            None => {
                file.state = State::Closed;
                if by != By::Start {
                    file.refuse_waiting(by, out);
                }
            }
        }
        self.pump(fd, now, out);
    }

    /// A [`Task::Close`] ended.
    pub fn closed(&mut self, fd: NebdFd, how: Closed, now: Instant, out: &mut Vec<Effect<H>>) {
        let Some(file) = self.files.get_mut(&fd) else { return };
        let State::Closing { handle, why, tasked: true } = std::mem::replace(&mut file.state, State::Closed) else {
            return;
        };
        match (how, handle, why) {
            (Closed::StillOpen, Some(handle), why) => {
                file.state = State::Open(handle);
                if let Why::CloseFile(whom) = why {
                    out.push(Effect::Refused(whom));
                }
            }
            (Closed::Done, _, Why::CloseFile(whom)) => {
                out.push(Effect::Done(whom));
                file.state = State::Gone;
            }
            (_, _, Why::CloseFile(whom)) => out.push(Effect::Refused(whom)),
            (_, _, Why::Silent) => {}
        }
        self.pump(fd, now, out);
    }

    /// These files are alive, says a client. False if one of them is not known.
    pub fn alive(&mut self, fds: impl Iterator<Item = NebdFd>, now: Instant) -> bool {
        let mut all = true;
        for fd in fds {
            match self.files.get_mut(&fd) {
                Some(file) => file.seen = now,
                None => all = false,
            }
        }
        all
    }

    /// Begin to close what was silent for too long; number and name of each.
    pub fn expire(&mut self, now: Instant, out: &mut Vec<Effect<H>>) -> Vec<(NebdFd, String)> {
        let timeout_ns = self.timeout_ns;
        let silent = |f: &File<H>| matches!(f.state, State::Open(_)) && now.since_ns(f.seen) > timeout_ns;
        let silent = self.files.iter().filter(|(_, file)| silent(file)).map(|(&fd, file)| (fd, file.name.clone()));
        let silent: Vec<(NebdFd, String)> = silent.collect();
        for &(fd, _) in &silent {
            if let Some(file) = self.files.get_mut(&fd) {
                file.begin_close(Why::Silent);
                self.pump(fd, now, out);
            }
        }
        silent
    }

    /// Name of a file.
    #[must_use]
    pub fn name_of(&self, fd: NebdFd) -> Option<&str> {
        self.files.get(&fd).map(|file| file.name.as_str())
    }

    /// Name, requests running and counts of every file that is open.
    pub fn stats(&self) -> impl Iterator<Item = (&str, u32, &FileStat)> {
        let open = |f: &&File<H>| matches!(f.state, State::Open(_));
        self.files.values().filter(open).map(|f| (f.name.as_str(), f.running, &f.stat))
    }

    /// Make the rates of the last `elapsed_ns`.
    pub fn tick_stats(&mut self, elapsed_ns: u64) {
        self.files.values_mut().for_each(|f| f.stat.tick(elapsed_ns));
    }

    fn create(&mut self, name: &str, now: Instant) -> NebdFd {
        loop {
            self.last = if self.last == NebdFd::MAX { 1 } else { self.last + 1 };
            if !self.files.contains_key(&self.last) {
                break;
            }
        }
        self.files.insert(self.last, File::new(name.to_owned(), now));
        self.by_name.insert(name.to_owned(), self.last);
        self.last
    }

    fn ask(&mut self, fd: NebdFd, whom: Origin, ask: Ask, now: Instant, out: &mut Vec<Effect<H>>) {
        let Some(file) = self.files.get_mut(&fd) else {
            return out.push(if ask == Ask::Close { Effect::Done(whom) } else { Effect::Refused(whom) });
        };
        // The way of nearly every request.
        if let State::Open(handle) = &file.state
            && ask == Ask::Io
            && file.waiting.is_empty()
            && file.orphans == 0
        {
            file.running += 1;
            return out.push(Effect::Go { whom, handle: handle.clone() });
        }
        file.waiting.push_back((whom, ask));
        self.pump(fd, now, out);
    }

    /// Serve those who wait, as far as the state allows.
    fn pump(&mut self, fd: NebdFd, now: Instant, out: &mut Vec<Effect<H>>) {
        loop {
            let Some(file) = self.files.get_mut(&fd) else { return };
            match file.advance(fd, now, out) {
                Next::Again => {}
                Next::Nothing => return,
                Next::Gone(name, waiting) => {
                    self.files.remove(&fd);
                    self.by_name.remove(&name);
                    for (whom, ask) in waiting {
                        match ask {
                            Ask::Io => out.push(Effect::Refused(whom)),
                            Ask::Close => out.push(Effect::Done(whom)),
                            // A file of its own, with a number of its own.
                            Ask::Open(flags) => self.open(&name, flags, whom, now, out),
                        }
                    }
                    return;
                }
            }
        }
    }
}

impl<H: Clone> File<H> {
    fn new(name: String, now: Instant) -> Self {
        Self {
            name,
            flags: None,
            recorded: false,
            state: State::Closed,
            running: 0,
            orphans: 0,
            seen: now,
            waiting: VecDeque::new(),
            stat: FileStat::default(),
        }
    }

    fn begin_close(&mut self, why: Why) {
        let handle = match std::mem::replace(&mut self.state, State::Closed) {
            State::Open(handle) => Some(handle),
            _ => None,
        };
        self.state = State::Closing { handle, why, tasked: false };
    }

    /// It could not be opened: who asked for that, and every request, is refused; none of them would fare better.
    fn refuse_waiting(&mut self, by: By, out: &mut Vec<Effect<H>>) {
        if by == By::Call
            && let Some((whom, _)) = self.waiting.pop_front()
        {
            out.push(Effect::Refused(whom));
        }
        self.waiting.retain(|&(whom, ask)| {
            if ask == Ask::Io {
                out.push(Effect::Refused(whom));
            }
            ask != Ask::Io
        });
    }

    /// One step for the first of those who wait.
    fn advance(&mut self, fd: NebdFd, now: Instant, out: &mut Vec<Effect<H>>) -> Next {
        match &mut self.state {
            State::Opening(..) | State::Closing { tasked: true, .. } => Next::Nothing,
            State::Closing { handle, why, tasked } => {
                if self.running > 0 {
                    return Next::Nothing;
                }
                *tasked = true;
                let forget = *why != Why::Silent;
                let task = Task::Close { fd, name: self.name.clone(), open: handle.is_some(), forget };
                out.push(Effect::Task(task));
                Next::Nothing
            }
            State::Open(handle) => {
                if self.orphans > 0 {
                    return Next::Nothing;
                }
                let Some((whom, ask)) = self.waiting.pop_front() else { return Next::Nothing };
                match ask {
                    Ask::Io => {
                        self.running += 1;
                        out.push(Effect::Go { whom, handle: handle.clone() });
                    }
                    Ask::Open(flags) if flags == self.flags => {
                        self.seen = now;
                        out.push(Effect::Opened { whom, fd });
                    }
                    Ask::Open(_) => out.push(Effect::Refused(whom)),
                    Ask::Close => self.begin_close(Why::CloseFile(whom)),
                }
                Next::Again
            }
            State::Gone => Next::Gone(std::mem::take(&mut self.name), self.waiting.drain(..).collect()),
            State::Closed => match self.waiting.front() {
                None if self.recorded => Next::Nothing,
                // Never opened, and nobody tries any more.
                None => Next::Gone(std::mem::take(&mut self.name), Vec::new()),
                Some(&(whom, Ask::Close)) => {
                    self.waiting.pop_front();
                    self.begin_close(Why::CloseFile(whom));
                    Next::Again
                }
                Some(&(_, ask)) => {
                    let (flags, by) = match ask {
                        Ask::Open(flags) => (flags, By::Call),
                        _ => (self.flags, By::Request),
                    };
                    self.state = State::Opening(flags, by);
                    let name = self.name.clone();
                    out.push(Effect::Task(Task::Open { fd, name, flags, reopen: false }));
                    Next::Nothing
                }
            },
        }
    }
}

#[cfg(test)]
mod tests;
