//! The giving side of a raft snapshot: a peer that lags asks for the list of chunks and for their pieces, at its own
//! pace. Nothing is kept between two questions, so there is nothing that a crash could lose.

use super::bulk::{Bulk, LIST_MAX};
use super::mail::{PeerBody, PeerMail};
use super::read::ZEROS;
use super::request::{Origin, Outcome, Reply, ReplyData};
use super::{Effects, Shard};
use crate::chunk::ChunkInfo;
use bytes::Bytes;
use raftlog::{BLOCK, CopysetId, crc32c};
use slab::Slab;

/// `Origin::shard` of reads made for peers; no shard has this number.
pub(super) const PEERS: u16 = u16::MAX - 1;
/// Pieces being read for peers at once; what is asked beyond is asked again by the peer.
const PIECES_MAX: usize = 16;

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
}

/// What is being read for peers.
#[derive(Debug, Default)]
pub(super) struct Supply(Slab<Piece>);

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
        (chunk, offset, len): (u64, u32, u32),
        out: &mut Effects,
    ) {
        if !self.can_supply(id, index) || self.supply.0.len() >= PIECES_MAX {
            return;
        }
        self.progressed(id, to);
        let (at, info) = (self.groups.get(&id).map_or(0, |group| group.applied), self.store.chunk_info(id, chunk));
        let doubtful = self.store.is_doubtful(id, chunk);
        let slot = self.supply.0.insert(Piece { copyset: id, to, chunk, offset, len, at, info, doubtful }) as u32;
        self.read(Origin { shard: PEERS, slot, serial: 0 }, id, chunk, offset, len, out);
        self.supply_step(out);
    }

    fn progressed(&mut self, id: CopysetId, to: u64) {
        if let Some(group) = self.groups.get_mut(&id) {
            group.raft.snapshot_progress(self.now.0, to);
        }
    }

    /// Pieces that have been read go to their peers; nobody else sees these answers.
    pub(super) fn supply_step(&mut self, out: &mut Effects) {
        if self.supply.0.is_empty() {
            return;
        }
        for reply in out.replies.extract_if(.., |reply| reply.origin.shard == PEERS).collect::<Vec<_>>() {
            self.piece_read(reply, out);
        }
    }

    fn piece_read(&mut self, reply: Reply, out: &mut Effects) {
        let Some(piece) = self.supply.0.try_remove(reply.origin.slot as usize) else { return };
        let Piece { copyset: id, to, chunk, offset, len, at: index, info, doubtful } = piece;
        if doubtful {
            return; // it is mended by now, or never will be: the peer asks again
        }
        let parts = match (reply.outcome, reply.data) {
            (Outcome::Success, ReplyData::Data(parts)) if info.is_some() => parts,
            (Outcome::Success | Outcome::NoChunk, _) if info.is_none() => {
                let gone = Bulk::Piece { index, chunk, offset, len, info: None, crcs: Vec::new() };
                return self.send_bulk(id, to, &gone, Bytes::new(), out);
            }
            _ => return, // rot, a device error, deleted meanwhile: the peer asks again, here or elsewhere
        };
        let Some(mut buf) = self.arenas.payload.alloc(len as usize) else { return self.want_memory() };
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
        self.send_bulk(id, to, &Bulk::Piece { index, chunk, offset, len, info, crcs }, payload, out);
    }

    pub(super) fn send_bulk(&self, id: CopysetId, to: u64, bulk: &Bulk, payload: Bytes, out: &mut Effects) {
        let body = PeerBody::Bulk { head: bulk.encode(), payload };
        out.mail.push(PeerMail { copyset: id, from: self.config.peer, to, body });
    }

    /// The shard ends: nobody waits for these.
    pub(super) fn stop_supply(&mut self, out: &mut Effects) {
        out.replies.retain(|reply| reply.origin.shard != PEERS);
        self.supply.0.clear();
    }
}
