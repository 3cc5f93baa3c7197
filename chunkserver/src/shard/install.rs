//! The taking side of a raft snapshot (rule 20): the leader's log no longer has what this replica needs, so it asks for
//! the chunks that differ, piece by piece, and starts again behind them.
//!
//! No mark on the disk is needed for this. What is taken in comes from committed entries, all of which are in any leader's log or
//! chunks; a chunk that is incomplete, or that replay of the own log has touched, says so by its index and is asked for
//! again ([`crate::chunk::ChunkInfo`]). (Its metapage says more, for the case that there is nobody left to ask:
//! `chunk/install.rs`, [`Store::ends_at`](crate::chunk::Store::ends_at).) Until the end the own log says how far this replica is, and a replica that lacks
//! committed entries is elected by nobody. While chunks are taken in, nothing of the copyset is applied: an entry that
//! can be applied after all ends the installation.

use super::bulk::{Bulk, PIECE_BYTES, pieces};
use super::{Effects, Shard};
use crate::chunk::ChunkInfo;
use crate::io::Instant;
use crate::metrics::Counter;
use bytes::Bytes;
use raftlog::{BLOCK, CopysetId, crc32c};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Copysets of a shard that are installed at once; the others wait for their leader's next offer.
const AT_ONCE_MAX: usize = 4;
/// Pieces of one copyset asked for at once.
const PIECES_MAX: usize = 4;
/// What was not answered after so long is asked again, milliseconds.
const PATIENCE_MS: u64 = 1000;

#[derive(Debug)]
enum Stage {
    /// Waiting for chunks from this number on.
    List(u64),
    Pieces,
    /// All is in the store; the round that takes it to the slots, once it has begun, has this number.
    Flush(Option<u64>),
    /// The checkpoint is on its way to the log.
    Log,
}

/// A chunk being taken in.
#[derive(Debug)]
struct Taking {
    /// As of its first piece.
    info: Option<ChunkInfo>,
    left: u32,
}

#[derive(Debug)]
struct Asked {
    chunk: u64,
    offset: u32,
    len: u32,
    due: Instant,
}

/// One copyset's installation.
#[derive(Debug)]
struct Install {
    from: u64,
    index: u64,
    stage: Stage,
    due: Instant,
    seen: BTreeSet<u64>,
    todo: VecDeque<ChunkInfo>,
    taking: BTreeMap<u64, Taking>,
    /// Pieces not asked for yet.
    pieces: VecDeque<(u64, u32, u32)>,
    asked: Vec<Asked>,
    /// The limit on raft snapshots lets no more be asked for now.
    limited: bool,
    promised: usize,
}

/// The installations of a shard.
#[derive(Debug, Default)]
pub(super) struct Installs(BTreeMap<CopysetId, Install>);

impl Installs {
    /// A raft snapshot of this copyset is being taken in.
    pub(super) fn takes(&self, id: CopysetId) -> bool {
        self.0.contains_key(&id)
    }
}

impl Shard {
    /// A raft snapshot of this copyset is being taken in.
    pub(super) fn installs(&self, id: CopysetId) -> bool {
        self.installs.takes(id)
    }

    /// A leader offers its chunks instead of entries.
    pub(super) fn offered(&mut self, id: CopysetId, from: u64, index: u64) {
        // What can be applied goes first: an older entry must not come over a newer chunk.
        if self.groups.get(&id).is_none_or(|group| !group.queue.is_empty() || group.damaged) || self.mends.holds(id) {
            return;
        }
        if let Some(install) = self.installs.0.get(&id) {
            if install.from == from && install.index == index || matches!(install.stage, Stage::Log) {
                return;
            }
            self.stop_install(id); // what is complete will be found equal
        } else if self.installs.0.len() >= AT_ONCE_MAX {
            return;
        }
        tracing::info!(copyset = ?id, from, index, "taking in a raft snapshot");
        let install = Install {
            from,
            index,
            stage: Stage::List(0),
            due: Instant(0),
            seen: BTreeSet::new(),
            todo: VecDeque::new(),
            taking: BTreeMap::new(),
            pieces: VecDeque::new(),
            asked: Vec::new(),
            limited: false,
            promised: 0,
        };
        self.installs.0.insert(id, install);
    }

    /// Give up; the next offer begins again.
    pub(super) fn stop_install(&mut self, id: CopysetId) {
        if let Some(install) = self.installs.0.remove(&id) {
            self.store.unpromise(install.promised);
        }
    }

    /// Move all installations on.
    pub(super) fn install_step(&mut self, out: &mut Effects) {
        let mut ids: Vec<CopysetId> = self.installs.0.keys().copied().collect();
        if let Some(first) = self.throttle.turns().checked_rem(ids.len()) {
            ids.rotate_left(first); // or the first one would take all that the limit allows
        }
        for id in ids {
            let Some(install) = self.installs.0.get_mut(&id) else { continue };
            match install.stage {
                Stage::List(from) if install.due <= self.now => {
                    install.due = self.now.after_ms(PATIENCE_MS);
                    let (to, ask) = (install.from, Bulk::AskList { index: install.index, from });
                    self.send_bulk(id, to, &ask, Bytes::new(), out);
                }
                Stage::Pieces => self.ask_pieces(id, out),
                Stage::Flush(round) => self.install_flushed(id, round),
                Stage::List(_) | Stage::Log => {}
            }
        }
    }

    /// When something is to be asked again.
    pub(super) fn install_deadline(&self) -> Instant {
        let due = |install: &Install| match install.stage {
            Stage::List(_) => install.due,
            Stage::Pieces => {
                let again = install.asked.iter().map(|asked| asked.due).min();
                let more = install.limited.then(|| self.throttle.due());
                again.into_iter().chain(more).min().unwrap_or(self.now.after_ms(1))
            }
            Stage::Flush(_) | Stage::Log => Instant::FAR,
        };
        self.installs.0.values().map(due).min().unwrap_or(Instant::FAR)
    }

    pub(super) fn listed(
        &mut self,
        id: CopysetId,
        from_peer: u64,
        index: u64,
        from: u64,
        more: bool,
        chunks: Vec<ChunkInfo>,
    ) {
        let Some(install) = self.installs.0.get_mut(&id).filter(|i| i.from == from_peer && i.index == index) else {
            return;
        };
        if !matches!(install.stage, Stage::List(at) if at == from) {
            return;
        }
        let last = chunks.last().map(|info| info.chunk);
        for info in chunks {
            install.seen.insert(info.chunk);
            if self.store.lacks(id, &info) {
                install.todo.push_back(info);
            }
        }
        install.due = Instant(0);
        match last.and_then(|last| last.checked_add(1)).filter(|_| more) {
            Some(next) => install.stage = Stage::List(next),
            None => self.all_listed(id),
        }
    }

    /// What is to be asked for is known: is there space for it?
    fn all_listed(&mut self, id: CopysetId) {
        let Some(install) = self.installs.0.get_mut(&id) else { return };
        for info in self.store.list(id, 0, usize::MAX) {
            if !install.seen.contains(&info.chunk) {
                self.store.install_drop(id, info.chunk, self.now.0);
            }
        }
        let same_life =
            |info: &&ChunkInfo| self.store.chunk_info(id, info.chunk).is_some_and(|here| here.created == info.created);
        let needed = install.todo.iter().filter(|info| !same_life(info)).count();
        if !self.store.promise(needed) {
            tracing::error!(copyset = ?id, needed, "no space for the chunks of a raft snapshot");
            self.installs.0.remove(&id);
            self.want_slots(); // the next offer finds what that sets free
            return;
        }
        (install.promised, install.stage) = (needed, Stage::Pieces);
    }

    /// Ask for as many pieces as there may be on their way, and again for those that were lost.
    fn ask_pieces(&mut self, id: CopysetId, out: &mut Effects) {
        let now = self.now;
        let Some(install) = self.installs.0.get_mut(&id) else { return };
        let mut asks: Vec<(u64, u32, u32)> = Vec::new();
        for asked in install.asked.iter_mut().filter(|asked| asked.due <= now) {
            asked.due = now.after_ms(PATIENCE_MS);
            asks.push((asked.chunk, asked.offset, asked.len));
        }
        let chunk_size = self.layout.chunk_size;
        let room = self.store.pinned_bytes() as usize * 2 <= self.config.dirty_limit;
        let size = self.throttle.piece(PIECE_BYTES);
        install.limited = false;
        while install.asked.len() < PIECES_MAX && room {
            if !self.throttle.ready(now) {
                install.limited = !install.pieces.is_empty() || !install.todo.is_empty();
                break;
            }
            if install.pieces.is_empty() {
                let Some(info) = install.todo.pop_front() else { break };
                install.pieces.extend(pieces(chunk_size, size).map(|(at, len)| (info.chunk, at, len)));
                install.taking.insert(info.chunk, Taking { info: None, left: install.pieces.len() as u32 });
            }
            let Some((chunk, offset, len)) = install.pieces.pop_front() else { break };
            self.throttle.take(now, len);
            install.asked.push(Asked { chunk, offset, len, due: now.after_ms(PATIENCE_MS) });
            asks.push((chunk, offset, len));
        }
        let (to, index) = (install.from, install.index);
        if install.asked.is_empty() && install.todo.is_empty() && install.pieces.is_empty() {
            install.stage = Stage::Flush(None);
        }
        for (chunk, offset, len) in asks {
            self.send_bulk(id, to, &Bulk::AskPiece { index, chunk, offset, len }, Bytes::new(), out);
        }
        if !room {
            self.want_memory();
        }
    }

    pub(super) fn piece(&mut self, id: CopysetId, from: u64, piece: Bulk, payload: &Bytes, out: &mut Effects) {
        let Bulk::Piece { index: at_least, chunk, offset, len, info, crcs } = piece else { return };
        if self.mends_from((id, chunk), from) && (info.is_none() || matches(len, &crcs, payload)) {
            return self.mend_piece((id, chunk), (offset, len), at_least, info, &crcs, payload, out);
        }
        // A late answer to a question about an older offer may hold what the newer one has overwritten.
        let wanted = |install: &&mut Install| install.from == from && at_least >= install.index;
        let Some(install) = self.installs.0.get_mut(&id).filter(wanted) else { return };
        let asked = |asked: &Asked| (asked.chunk, asked.offset, asked.len) == (chunk, offset, len);
        let Some(at) = install.asked.iter().position(asked) else { return };
        if info.is_some() && !matches(len, &crcs, payload) {
            tracing::warn!(copyset = ?id, chunk, "a piece of a chunk does not match its checksums");
            return; // it is asked for again
        }
        install.asked.swap_remove(at);
        if payload.is_empty() {
            self.throttle.give_back(len);
        }
        self.metrics.add(Counter::SnapshotBytesIn, payload.len() as u64);
        let Some(taking) = install.taking.get_mut(&chunk) else { return };
        let Some(info) = info else {
            // Deleted meanwhile. The entry that says so comes after the snapshot.
            forget(install, chunk);
            return self.store.install_drop(id, chunk, self.now.0);
        };
        match taking.info {
            Some(first) if first.created == info.created => self.store.install_seen(id, &info),
            Some(_) => {
                forget(install, chunk); // another life of it: from the beginning
                return install.todo.push_back(info);
            }
            None => {
                taking.info = Some(info);
                let here = self.store.chunk_info(id, chunk).is_some_and(|here| here.created == info.created);
                if !here && install.promised > 0 {
                    install.promised -= 1;
                    self.store.unpromise(1);
                }
                if !self.store.install_begin(id, &info) {
                    tracing::error!(copyset = ?id, chunk, "no space for a chunk of a raft snapshot");
                    return self.stop_install(id);
                }
            }
        }
        taking.left -= 1;
        let done = if taking.left == 0 { taking.info } else { None };
        let index = install.index;
        if done.is_some() {
            install.taking.remove(&chunk);
        }
        self.take_in(id, chunk, index, offset, &crcs, payload);
        if let Some(info) = done {
            self.store.install_end(id, &info, self.now.0);
        }
    }

    /// Runs of blocks that hold something, and of those that do not.
    pub(super) fn take_in(
        &mut self,
        id: CopysetId,
        chunk: u64,
        index: u64,
        offset: u32,
        crcs: &[u32],
        payload: &Bytes,
    ) {
        let mut at = 0;
        for run in crcs.chunk_by(|a, b| (*a == 0) == (*b == 0)) {
            let (start, bytes) = (offset + (at * BLOCK) as u32, run.len() * BLOCK);
            if run.first() == Some(&0) {
                self.store.install_hole(id, chunk, start, bytes as u32);
            } else {
                let data = payload.slice(at * BLOCK..at * BLOCK + bytes);
                self.store.install_data(id, chunk, index, start, (data, run), self.now.0);
            }
            at += run.len();
        }
    }

    /// All is in the store. A round that began after that takes it to the slots; then the log may say so.
    fn install_flushed(&mut self, id: CopysetId, round: Option<u64>) {
        let rounds = self.store.counters().rounds;
        let Some(install) = self.installs.0.get_mut(&id) else { return };
        match round {
            None if self.store.round_active() => {}
            None => {
                install.stage = Stage::Flush(Some(rounds));
                self.want_memory();
            }
            Some(before) if rounds == before && self.store.oldest_dirty_ns().is_some() => self.want_memory(),
            Some(_) if self.store.round_active() => {}
            Some(_) => {
                let index = install.index;
                let Some(group) = self.groups.get_mut(&id) else { return };
                match group.raft.install_snapshot(self.now.0, index) {
                    Ok(_) => {
                        install.stage = Stage::Log;
                        if !std::mem::replace(&mut group.unpersisted, true) {
                            self.unpersisted.push(id);
                        }
                    }
                    Err(error) => {
                        tracing::info!(copyset = ?id, %error, "a raft snapshot is not needed (any more)");
                        self.stop_install(id);
                    }
                }
            }
        }
    }

    /// The checkpoint is durable; entries behind it follow.
    pub(super) fn installed(&mut self, id: CopysetId, index: u64) {
        self.stop_install(id);
        if let Some(group) = self.groups.get_mut(&id) {
            tracing::info!(copyset = ?id, index, "a raft snapshot is installed");
            group.queue.retain(|committed| committed.index > index);
            group.applied = index;
            group.follow.forget();
        }
        self.tail_applied(id);
        self.store.checkpoint_durable(id, index);
        self.mark_dirty(id);
    }
}

/// Nothing more of this chunk is wanted.
fn forget(install: &mut Install, chunk: u64) {
    install.taking.remove(&chunk);
    install.asked.retain(|asked| asked.chunk != chunk);
    install.pieces.retain(|piece| piece.0 != chunk);
}

fn matches(len: u32, crcs: &[u32], payload: &Bytes) -> bool {
    let holes = crcs.iter().all(|&crc| crc == 0);
    crcs.len() == len as usize / BLOCK
        && (if holes { payload.is_empty() } else { payload.len() == len as usize })
        && payload.chunks(BLOCK).zip(crcs).all(|(block, &crc)| crc == 0 || crc32c(block) == crc)
}
