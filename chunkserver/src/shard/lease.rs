//! Reads of copysets with several voters: by the leader's lease, else after it has heard from a quorum (rule 18).

use super::request::{ChunkOp, Request, RequestOp};
use super::{Effects, Shard};

impl Shard {
    /// Whether a read may be answered from the applied state now. If not, it is answered with a redirection, or waits
    /// for the quorum's word.
    pub(super) fn may_read(&mut self, request: Request, out: &mut Effects) -> Option<Request> {
        let id = request.copyset;
        let group = self.groups.get_mut(&id)?;
        if group.raft.may_read(self.now.0) {
            return Some(request);
        }
        if !group.raft.may_read_index() {
            self.redirect(id, request.origin, out);
            return None;
        }
        let entry = self.parked.vacant_entry();
        let asked = group.raft.read_index(self.now.0, entry.key() as u64);
        match asked {
            Ok(()) => {
                entry.insert(request);
            }
            Err(_) => self.redirect(id, request.origin, out),
        }
        self.mark_dirty(id);
        None
    }

    /// The quorum has spoken.
    pub(super) fn read_ready(&mut self, cookie: u64, out: &mut Effects) {
        let Some(request) = self.parked.try_remove(cookie as usize) else { return };
        self.read_now(&request, out);
    }

    pub(super) fn read_dropped(&mut self, cookie: u64, out: &mut Effects) {
        let Some(request) = self.parked.try_remove(cookie as usize) else { return };
        self.redirect(request.copyset, request.origin, out);
    }

    /// Answer from the applied state, which is new enough.
    pub(super) fn read_now(&mut self, request: &Request, out: &mut Effects) {
        let Request { copyset, op: RequestOp::Chunk { chunk, ref op }, origin } = *request else { return };
        match *op {
            ChunkOp::Read { offset, len } => self.read(origin, copyset, chunk, offset, len, out),
            ChunkOp::Info => self.info(origin, copyset, chunk, out),
            _ => unreachable!("only reads wait for a lease"),
        }
    }
}
