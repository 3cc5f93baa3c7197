//! The giving side of a raft snapshot: a peer that lags asks for the list of chunks and for their pieces, at its own
//! pace. Nothing is kept between two questions, so there is nothing that a crash could lose.

use super::bulk::{Bulk, LIST_MAX};
use super::mail::{PeerBody, PeerMail};
use super::read::ZEROS;
use super::request::{Origin, Outcome, Reply, ReplyData};
use super::throttle::Throttle;
use super::{Effects, Shard};
use crate::chunk::ChunkInfo;
use crate::io::Instant;
use crate::metrics::Counter;
use bytes::Bytes;
use raftlog::{BLOCK, CopysetId, crc32c};
use slab::Slab;
use std::collections::VecDeque;

/// `Origin::shard` of reads made for peers; no shard has this number.
pub(super) const PEERS: u16 = u16::MAX - 1;
/// Pieces being read for peers at once; what is asked beyond is asked again by the peer.
const PIECES_MAX: usize = 16;
/// Pieces that wait for the limit on raft snapshots; likewise.
const WAITING_MAX: usize = 64;

/// A piece that a peer asks for, applied here at least up to `index`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ask {
    copyset: CopysetId,
    to: u64,
    index: u64,
    piece: (u64, u32, u32),
}

/// A piece being read.
#[derive(Clone, Copy, Debug)]
struct Piece {
    copyset: CopysetId,
    to: u64,
    chunk: u64,
    offset: u32,
    len: u32,
    /// Applied here when it was asked for, and what the chunk was: both from before the data is read, which may be newer
    /// than they say, never older.
    at: u64,
    info: Option<ChunkInfo>,
    /// What it was is nothing to go by.
    doubtful: bool,
    /// Counts against the limit.
    limited: bool,
}

/// What is being read for peers, and what will be when the limit allows.
#[derive(Debug, Default)]
pub(super) struct Supply {
    reading: Slab<Piece>,
    waiting: VecDeque<Ask>,
    /// What is taken in here had its share of the limit: now it is their turn.
    pub(super) first: bool,
}

impl Shard {
    /// This replica's applied state is at least as new as `index`, and whole.
    fn can_supply(&self, id: CopysetId, index: u64) -> bool {
        self.groups.get(&id).is_some_and(|group| {
            !group.damaged && !group.raft.is_suspect() && group.applied >= index && !self.installs(id)
        })
    }

    pub(super) fn supply_list(&mut self, id: CopysetId, to: u64, index: u64, from: u64, out: &mut Effects) {
        if !self.can_supply(id, index) {
            return;
        }
        let mut chunks = self.store.list(id, from, LIST_MAX + 1);
        let more = chunks.len() > LIST_MAX;
        chunks.truncate(LIST_MAX);
        self.send_bulk(id, to, &Bulk::List { index, from, more, chunks }, Bytes::new(), out);
        self.progressed(id, to);
    }

    pub(super) fn supply_piece(
        &mut self,
        id: CopysetId,
        to: u64,
        index: u64,
        piece: (u64, u32, u32),
        out: &mut Effects,
    ) {
        if !self.can_supply(id, index) {
            return;
        }
        self.progressed(id, to);
        // The limit is for replicas that are fed. Others mend what they have, and somebody may wait for that.
        let limited = self.groups.get(&id).is_some_and(|group| group.raft.feeds(to));
        let ask = Ask { copyset: id, to, index, piece };
        let waits = limited && (!self.supply.waiting.is_empty() || !self.throttle.ready(self.now));
        if !waits {
            self.begin_piece(ask, limited, out);
        } else if self.supply.waiting.len() < WAITING_MAX && !self.supply.waiting.contains(&ask) {
            self.supply.waiting.push_back(ask);
        }
        self.supply_step(out);
    }

    fn begin_piece(&mut self, ask: Ask, limited: bool, out: &mut Effects) {
        let Ask { copyset, to, index, piece: (chunk, offset, len) } = ask;
        if !self.can_supply(copyset, index) || self.supply.reading.len() >= PIECES_MAX {
            return;
        }
        if limited {
            self.throttle.take(self.now, len);
        }
        let at = self.groups.get(&copyset).map_or(0, |group| group.applied);
        let info = self.store.chunk_info(copyset, chunk);
        let doubtful = self.store.is_doubtful(copyset, chunk) || self.store.is_mixed(copyset, chunk, at);
        let piece = Piece { copyset, to, chunk, offset, len, at, info, doubtful, limited };
        let slot = self.supply.reading.insert(piece) as u32;
        self.read(Origin { shard: PEERS, slot, serial: 0 }, copyset, chunk, offset, len, out);
    }

    /// Move what is taken in on. The limit is for both: who gives and who takes come first in turn.
    pub(super) fn feed_step(&mut self, out: &mut Effects) {
        if self.supply.first {
            self.supply_waiting(out);
        }
        let taken = self.throttle.turns();
        self.install_step(out);
        self.supply.first |= self.throttle.turns() != taken;
    }

    /// Pieces that waited for the limit. Their peers are being fed, if slowly: what they were offered stands.
    pub(super) fn supply_waiting(&mut self, out: &mut Effects) {
        while self.throttle.ready(self.now)
            && self.supply.reading.len() < PIECES_MAX
            && let Some(ask) = self.supply.waiting.pop_front()
        {
            self.supply.first = false;
            self.begin_piece(ask, true, out);
        }
        let fed: Vec<(CopysetId, u64)> = self.supply.waiting.iter().map(|ask| (ask.copyset, ask.to)).collect();
        fed.into_iter().for_each(|(id, to)| self.progressed(id, to));
    }

    /// When the limit lets the next piece go.
    pub(super) fn supply_deadline(&self) -> Instant {
        let waits = !self.supply.waiting.is_empty() && self.supply.reading.len() < PIECES_MAX;
        if waits { self.throttle.due() } else { Instant::FAR }
    }

    fn progressed(&mut self, id: CopysetId, to: u64) {
        if let Some(group) = self.groups.get_mut(&id) {
            group.raft.snapshot_progress(self.now.0, to);
        }
    }

    /// Pieces that have been read go to their peers; nobody else sees these answers.
    pub(super) fn supply_step(&mut self, out: &mut Effects) {
        if self.supply.reading.is_empty() {
            return;
        }
        for reply in out.replies.extract_if(.., |reply| reply.origin.shard == PEERS).collect::<Vec<_>>() {
            self.piece_read(reply, out);
        }
    }

    fn piece_read(&mut self, reply: Reply, out: &mut Effects) {
        let Some(piece) = self.supply.reading.try_remove(reply.origin.slot as usize) else { return };
        let Piece { copyset: id, to, chunk, offset, len, at: index, info, doubtful, limited } = piece;
        let free = |throttle: &mut Throttle| throttle.give_back(if limited { len } else { 0 });
        if doubtful {
            return free(&mut self.throttle); // it is mended by now, or never will be: the peer asks again
        }
        let parts = match (reply.outcome, reply.data) {
            (Outcome::Success, ReplyData::Data(parts)) if info.is_some() => parts,
            (Outcome::Success | Outcome::NoChunk, _) if info.is_none() => {
                free(&mut self.throttle);
                let gone = Bulk::Piece { index, chunk, offset, len, info: None, crcs: Vec::new() };
                return self.send_bulk(id, to, &gone, Bytes::new(), out);
            }
            // Rot, a device error, deleted meanwhile: the peer asks again, here or elsewhere.
            _ => return free(&mut self.throttle),
        };
        let Some(mut buf) = self.arenas.payload.alloc(len as usize) else {
            free(&mut self.throttle);
            return self.want_memory();
        };
        buf.truncate(len as usize);
        let mut at = 0;
        for part in parts {
            let end = at + part.len();
            if let Some(place) = buf.get_mut(at..end) {
                place.copy_from_slice(&part);
            }
            at = end;
        }
        let is_hole = |block: &[u8]| ZEROS.get(..BLOCK) == Some(block);
        let crcs: Vec<u32> = buf.chunks(BLOCK).map(|block| if is_hole(block) { 0 } else { crc32c(block) }).collect();
        let payload = if crcs.iter().all(|&crc| crc == 0) { Bytes::new() } else { buf.freeze() };
        if payload.is_empty() {
            free(&mut self.throttle);
        } else if limited {
            self.metrics.add(Counter::SnapshotBytesOut, u64::from(len));
        }
        self.send_bulk(id, to, &Bulk::Piece { index, chunk, offset, len, info, crcs }, payload, out);
    }

    pub(super) fn send_bulk(&self, id: CopysetId, to: u64, bulk: &Bulk, payload: Bytes, out: &mut Effects) {
        let body = PeerBody::Bulk { head: bulk.encode(), payload };
        out.mail.push(PeerMail { copyset: id, from: self.config.peer, to, body });
    }

    /// The shard ends: nobody waits for these.
    pub(super) fn stop_supply(&mut self, out: &mut Effects) {
        out.replies.retain(|reply| reply.origin.shard != PEERS);
        self.supply = Supply::default();
    }
}
