//! Start-up: recover the log, load the chunk metadata, start the copysets. The same code runs after a clean stop, a
//! kill and a power cut.

use super::{Arenas, Config, DISK, Effects, Failure, Group, Shard, State, Task, flush};
use crate::chunk::{ExtentPool, Layout, Loader, Store};
use crate::io::buffer::PoolBuf;
use crate::io::{Errno, Instant, Op};
use crate::metrics::ShardMetrics;
use copyset::Copyset;
use raftlog::{CopysetId, Limits, Log, ReadFailed, Recovery};
use slab::Slab;
use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

/// How far start-up is.
pub(super) enum Boot {
    Log { recovery: Option<Recovery>, started: Instant },
    Metadata { loader: Option<Loader>, started: Instant },
    /// Everything is read; other shards still claim the extents they have slots in.
    Extents { started: Instant },
}

impl Shard {
    /// A shard that will recover from `layout`'s disk.
    #[must_use]
    pub fn new(
        config: Config,
        layout: Layout,
        arenas: Arenas,
        extents: Arc<ExtentPool>,
        metrics: Arc<ShardMetrics>,
        now: Instant,
    ) -> Self {
        let recovery = Recovery::new(layout.log_geometry(config.shard), Limits::default());
        let log = Rc::new(RefCell::new(Log::empty(layout.log_geometry(config.shard), Limits::default())));
        let store = Store::new(&layout, config.shard, extents);
        Self {
            layout,
            arenas,
            log,
            store,
            groups: BTreeMap::new(),
            dirty: Vec::new(),
            unpersisted: Vec::new(),
            applying: Vec::new(),
            tasks: Slab::with_capacity(1024),
            waiting: Slab::with_capacity(1024),
            reads: Slab::with_capacity(256),
            read_queue: VecDeque::new(),
            deferred: VecDeque::new(),
            in_flight_bytes: 0,
            admin: Vec::new(),
            flush: flush::Flush::new(now),
            state: State::Boot(Box::new(Boot::Log { recovery: Some(recovery), started: now })),
            now,
            next_tick: now,
            incarnations: 0,
            effects: Vec::new(),
            metrics,
            config,
        }
    }

    pub(super) fn boot_deadline(&self) -> Instant {
        match &self.state {
            State::Boot(boot) if matches!(**boot, Boot::Extents { .. }) => self.now.after_ms(1),
            _ => Instant::FAR,
        }
    }

    /// Ask for the next piece, or go to the next stage.
    pub(super) fn boot_step(&mut self, out: &mut Effects) {
        if !self.tasks.is_empty() {
            return; // one read at a time
        }
        loop {
            let State::Boot(boot) = &mut self.state else { return };
            let (base, next) = match &mut **boot {
                Boot::Log { recovery: Some(recovery), .. } => {
                    (self.layout.log_offset(self.config.shard), recovery.next_read())
                }
                Boot::Metadata { loader: Some(loader), .. } => (0, loader.next_read()),
                _ => (0, None),
            };
            if let Some((offset, len)) = next {
                let Some(mut buf) = self.arenas.work.alloc(len) else {
                    return self.fail(Failure::Load("no buffer for start-up reads: the work arena is too small".into()));
                };
                buf.truncate(len);
                self.submit(out, Task::Boot, Op::Read { file: DISK, offset: base + offset, buf });
                return;
            }
            if !self.boot_advance() {
                return;
            }
        }
    }

    pub(super) fn boot_read(&mut self, buf: &PoolBuf, result: Result<(), Errno>) {
        let State::Boot(boot) = &mut self.state else { return };
        match &mut **boot {
            Boot::Log { recovery: Some(recovery), .. } => recovery.feed(result.map(|()| &**buf).map_err(|_| ReadFailed)),
            Boot::Metadata { loader: Some(loader), .. } => {
                if let Err(error) = loader.feed(&mut self.store, result.map(|()| &**buf)) {
                    self.fail(Failure::Load(error.to_string()));
                }
            }
            _ => {}
        }
    }

    /// A stage has read all it wants; false when start-up waits or has failed.
    fn boot_advance(&mut self) -> bool {
        let State::Boot(boot) = &mut self.state else { return false };
        match &mut **boot {
            Boot::Log { recovery, started } => {
                let Some(recovery) = recovery.take() else { return false };
                let started = *started;
                match recovery.finish() {
                    Ok((log, report)) => {
                        tracing::info!(shard = self.config.shard, ms = self.now.since_ns(started) / 1_000_000, ?report, "log recovered");
                        *self.log.borrow_mut() = log;
                    }
                    Err(error) => {
                        self.fail(Failure::Recovery(error.to_string()));
                        return false;
                    }
                }
                let loader = Some(Loader::new(&self.layout, self.config.shard));
                self.state = State::Boot(Box::new(Boot::Metadata { loader, started: self.now }));
                true
            }
            Boot::Metadata { started, .. } => {
                let started = *started;
                let log = Rc::clone(&self.log);
                self.store.retain(&|id| log.borrow().index(id).map(|i| i.checkpoint().incarnation));
                self.store.loaded();
                tracing::info!(
                    shard = self.config.shard,
                    ms = self.now.since_ns(started) / 1_000_000,
                    chunks = self.store.chunk_count(),
                    "chunk metadata loaded"
                );
                self.state = State::Boot(Box::new(Boot::Extents { started: self.now }));
                true
            }
            Boot::Extents { .. } => {
                if !self.store.ready() {
                    return false;
                }
                let ids = self.log.borrow().copysets();
                for id in ids {
                    if let Err(failure) = self.start_copyset(id) {
                        self.fail(failure);
                        return false;
                    }
                }
                self.state = State::Serving;
                false
            }
        }
    }

    /// Make a copyset live from what the log says of it.
    pub(super) fn start_copyset(&mut self, id: CopysetId) -> Result<(), Failure> {
        let config = copyset::Config {
            id,
            peer: self.config.peer,
            tick_ms: self.config.election_ms / 10,
            election_ticks: 10,
            heartbeat_ticks: 3,
            seed: self.config.seed ^ id.0.rotate_left(17),
            ..copyset::Config::default()
        };
        let checkpoint = self.log.borrow().index(id).map(|i| (i.checkpoint().incarnation, i.checkpoint().applied_index));
        let Some((incarnation, applied)) = checkpoint else {
            return Err(Failure::Copyset(id, "the log does not know it".into()));
        };
        let raft = Copyset::new(config, Rc::clone(&self.log)).map_err(|e| Failure::Copyset(id, e.to_string()))?;
        let group = Group {
            raft,
            incarnation,
            applied,
            queue: VecDeque::new(),
            fetching: false,
            dirty: false,
            unpersisted: false,
            applying: false,
            damaged: false,
        };
        self.groups.insert(id, group);
        self.store.add_copyset(id, incarnation);
        self.next_tick = self.now;
        self.mark_dirty(id);
        Ok(())
    }
}
