//! Copysets come and go; their state is shown.

use super::request::{AdminOp, CopysetStatus, Origin, Outcome, Reply, ReplyData, Request, RequestOp};
use super::{Effects, Shard, reply};
use copyset::{Copyset, Role};
use raftlog::{CopysetId, Seq};

/// braft's state of a replica that is out of service.
const STATE_ERROR: u32 = 5;
/// Voters of a new copyset.
const VOTERS_MAX: usize = 32;

/// What is to be done when a change's log record is durable.
pub(super) enum Then {
    /// Start it.
    Start,
    /// Free its chunks.
    Free,
    /// Free its chunks, and create it anew with these voters.
    Renew(Vec<u64>),
    /// Nothing else.
    Answer,
}

/// A change that waits for its log record.
pub(super) struct Pending {
    /// Who is to be told; nobody, if time has done it.
    pub(super) origin: Option<Origin>,
    seq: Seq,
    pub(super) copyset: CopysetId,
    then: Then,
}

impl Shard {
    pub(super) fn administer(&mut self, request: Request, out: &mut Effects) {
        let RequestOp::Admin(op) = request.op else { return };
        let (id, origin) = (request.copyset, request.origin);
        match op {
            AdminOp::CreateCopyset { peers } => self.create_copyset(id, &peers, origin, out),
            AdminOp::DeleteCopyset => self.delete_copyset(id, Some(origin), out),
            AdminOp::RestoreCopyset => self.restore_copyset(id, origin, out),
            AdminOp::CopysetStatus => {
                self.wanted(id);
                match self.copyset_status(id).filter(|_| !self.is_retired(id)) {
                    Some(status) => answer(out, origin, ReplyData::Copysets(vec![status])),
                    None => reply(out, origin, Outcome::NoCopyset),
                }
            }
            AdminOp::ListCopysets => {
                let all = self.copyset_statuses().collect();
                answer(out, origin, ReplyData::Copysets(all));
            }
            AdminOp::ListTrash => {
                let all = self.groups.keys().filter(|&&id| self.is_retired(id));
                let all = all.filter_map(|&id| self.copyset_status(id)).collect();
                answer(out, origin, ReplyData::Copysets(all));
            }
            AdminOp::Members(op) => self.change_members(id, op, origin, out),
            AdminOp::Checkpoint if !self.groups.contains_key(&id) => reply(out, origin, Outcome::NoCopyset),
            AdminOp::Checkpoint => self.want_checkpoints(&[id], Some(origin), out),
            AdminOp::CheckpointAll => {
                let ids: Vec<CopysetId> = self.groups.keys().copied().collect();
                self.want_checkpoints(&ids, Some(origin), out);
            }
            AdminOp::ShardStatus => answer(out, origin, ReplyData::Shard(Box::new(self.status()))),
        }
    }

    fn create_copyset(&mut self, id: CopysetId, peers: &[u64], origin: Origin, out: &mut Effects) {
        if self.is_retired(id) && !self.admin_busy(id) && peers.len() <= VOTERS_MAX {
            return self.purge(id, Some(origin), Then::Renew(peers.to_vec()), out);
        }
        if self.groups.contains_key(&id) || self.broken.contains(&id) || self.admin_busy(id) {
            return reply(out, origin, Outcome::Exists);
        }
        if peers.len() > VOTERS_MAX {
            return reply(out, origin, Outcome::Invalid); // a configuration that cannot be encoded
        }
        self.incarnations += 1;
        let incarnation = mix(self.config.seed ^ self.now.0.rotate_left(32) ^ self.incarnations ^ id.0).max(1);
        let checkpoint = Copyset::initial_checkpoint(peers, incarnation);
        let seq = self.log.borrow_mut().checkpoint(id, checkpoint);
        self.await_record(id, seq, Some(origin), Then::Start);
    }

    pub(super) fn await_record(&mut self, copyset: CopysetId, seq: Seq, origin: Option<Origin>, then: Then) {
        self.admin.push(Pending { origin, seq, copyset, then });
    }

    /// Into the trash, or, from there, if it is damaged or if nothing is to be kept, out of existence.
    pub(super) fn delete_copyset(&mut self, id: CopysetId, origin: Option<Origin>, out: &mut Effects) {
        if self.admin_busy(id) {
            return tell(out, origin, Outcome::Failed);
        }
        let whole = |group: &super::Group| !group.damaged && !group.raft.is_installing();
        if self.config.trash_s > 0 && !self.is_retired(id) && self.groups.get(&id).is_some_and(whole) {
            return self.retire(id, origin, out);
        }
        self.purge(id, origin, Then::Free, out);
    }

    fn purge(&mut self, id: CopysetId, origin: Option<Origin>, then: Then, out: &mut Effects) {
        let broken = self.broken.iter().position(|&b| b == id);
        self.silence(id, Outcome::NoCopyset, out);
        match self.groups.remove(&id) {
            Some(mut group) => {
                self.unfollow(&mut group);
                // What was proposed and not yet applied is over.
                let cookies: Vec<u64> = group.raft.waiting_cookies().collect();
                for cookie in cookies.into_iter().chain(group.queue.iter().filter_map(|c| c.cookie)) {
                    self.settle(cookie, Outcome::NoCopyset, 0, out);
                }
            }
            None if broken.is_some() => {}
            None => return tell(out, origin, Outcome::NoCopyset),
        }
        broken.map(|at| self.broken.swap_remove(at));
        self.lost.retain(|&lost| lost != id); // its next life has a log of its own
        let seq = self.log.borrow_mut().purge(id);
        self.await_record(id, seq, origin, then);
        self.flush.next = self.now;
    }

    /// Answer the changes whose records are durable.
    pub(super) fn admin_step(&mut self, out: &mut Effects) {
        let durable = self.log.borrow().durable_seq();
        let (done, waiting) = std::mem::take(&mut self.admin).into_iter().partition(|p| p.seq <= durable);
        self.admin = waiting;
        for Pending { origin, copyset, then, .. } in done {
            match then {
                Then::Answer => {}
                Then::Start => {
                    if let Err(failure) = self.start_copyset(copyset) {
                        tracing::error!("{failure}");
                        tell(out, origin, Outcome::Failed);
                        continue;
                    }
                }
                Then::Free => self.store.remove_copyset(copyset), // only now: the Purge is durable
                Then::Renew(peers) => {
                    self.store.remove_copyset(copyset);
                    if let Some(origin) = origin {
                        self.create_copyset(copyset, &peers, origin, out);
                    }
                    continue;
                }
            }
            tell(out, origin, Outcome::Success);
        }
    }

    /// Copysets that this replica leads, each with its term, and its ConfEpoch once the leader is ready.
    pub fn led(&self) -> impl Iterator<Item = (CopysetId, u64, Option<u64>)> + '_ {
        let leads = self.groups.iter().filter(|(_, g)| g.raft.role() == Role::Leader && g.raft.retired() == 0);
        leads.map(|(&id, g)| (id, g.raft.term(), g.raft.may_read_index().then(|| g.raft.conf().epoch)))
    }

    /// State of every copyset here, those in the trash excepted.
    pub fn copyset_statuses(&self) -> impl Iterator<Item = CopysetStatus> + '_ {
        let live = self.groups.keys().filter(|&&id| !self.is_retired(id));
        live.chain(&self.broken).filter_map(|&id| self.copyset_status(id))
    }

    fn copyset_status(&self, id: CopysetId) -> Option<CopysetStatus> {
        if self.broken.contains(&id) {
            return Some(CopysetStatus { id: id.0, state: STATE_ERROR, peer: self.config.peer, ..Default::default() });
        }
        let group = self.groups.get(&id)?;
        let raft = &group.raft;
        let conf = raft.conf();
        Some(CopysetStatus {
            id: id.0,
            state: if group.damaged || raft.is_suspect() { STATE_ERROR } else { raft.role() as u32 },
            peer: raft.peer(),
            leader: raft.leader(),
            peers: conf.voters.clone(),
            changing: raft.change_in_progress().is_some(),
            term: raft.term(),
            committed: raft.commit_index(),
            applied: group.applied,
            first: raft.first_index(),
            last: raft.last_index(),
            durable: raft.durable_index(),
            epoch: conf.epoch,
            chunks: self.store.chunks_of(id),
        })
    }
}

pub(super) fn tell(out: &mut Effects, origin: Option<Origin>, outcome: Outcome) {
    if let Some(origin) = origin {
        reply(out, origin, outcome);
    }
}

fn answer(out: &mut Effects, origin: Origin, data: ReplyData) {
    out.replies.push(Reply { origin, outcome: Outcome::Success, applied_index: 0, data });
}

/// SplitMix64's finaliser: spreads a seed over all 64 bits.
const fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
