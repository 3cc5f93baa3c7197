//! Who is in a copyset and who leads it: changes asked of its leader, answered when they are done; and checkpoints that
//! somebody asks for.

use super::admin::tell;
use super::request::{MemberOp, Origin, Outcome, Reply, ReplyData};
use super::{Effects, Group, Shard, reply};
use copyset::{ChangeFailed, ChangeRefused, Changed, Role, Started};
use raftlog::CopysetId;
use slab::Slab;

/// What is asked of copysets and not answered yet.
#[derive(Debug, Default)]
pub(super) struct Members {
    /// Changes under way.
    changes: Slab<(CopysetId, Origin)>,
    wanted: Vec<Wanted>,
}

/// Checkpoints wanted: who asked (`None`: nobody outside), and the applied index each copyset had then.
type Wanted = (Option<Origin>, Vec<(CopysetId, u64)>);

impl Members {
    /// Everybody who waits, for one copyset or all.
    pub(super) fn give_up(&mut self, id: Option<CopysetId>) -> Vec<Origin> {
        let concerned = |other: CopysetId| id.is_none_or(|id| id == other);
        let keys: Vec<usize> = self.changes.iter().filter(|(_, c)| concerned(c.0)).map(|(key, _)| key).collect();
        let mut origins: Vec<Origin> = keys.into_iter().map(|key| self.changes.remove(key).1).collect();
        self.wanted.retain_mut(|(origin, targets)| {
            targets.retain(|(other, _)| !concerned(*other));
            if id.is_none() {
                origins.extend(*origin);
            }
            id.is_some()
        });
        origins
    }

    /// Somebody waits for a checkpoint of this copyset.
    pub(super) fn wants_checkpoint(&self, id: CopysetId) -> bool {
        self.wanted.iter().any(|(_, targets)| targets.iter().any(|(other, _)| *other == id))
    }
}

impl Shard {
    pub(super) fn change_members(&mut self, id: CopysetId, op: MemberOp, origin: Origin, out: &mut Effects) {
        let now = self.now.0;
        if let MemberOp::Reset(peers) = op {
            return self.reset_peer(id, &peers, origin, out);
        }
        let Some(group) = self.groups.get_mut(&id) else { return reply(out, origin, Outcome::NoCopyset) };
        if group.raft.retired() != 0 {
            return reply(out, origin, Outcome::NoCopyset);
        }
        if group.damaged {
            return reply(out, origin, Outcome::CrcFail);
        }
        let entry = self.members.changes.vacant_entry();
        let cookie = entry.key() as u64;
        let before = group.raft.conf().voters.clone();
        let transfer = matches!(op, MemberOp::Transfer(_));
        let started = match op {
            MemberOp::Add(peer) => group.raft.add_peer(now, cookie, peer),
            MemberOp::Remove(peer) => group.raft.remove_peer(now, cookie, peer),
            MemberOp::Set(peers) => group.raft.change_peers(now, cookie, &peers),
            MemberOp::Transfer(to) => group.raft.transfer_leader(now, to),
            MemberOp::Reset(_) => return,
        };
        match started {
            Ok(Started::Begun) if transfer => reply(out, origin, Outcome::Success),
            Ok(Started::Begun) => {
                entry.insert((id, origin));
            }
            Ok(Started::Already) => {
                let data = ReplyData::Members { old: before.clone(), new: before };
                out.replies.push(Reply { origin, outcome: Outcome::Success, applied_index: 0, data });
            }
            Err(ChangeRefused::NotLeader { .. } | ChangeRefused::NotReady) => self.redirect(id, origin, out),
            Err(ChangeRefused::Busy) => reply(out, origin, Outcome::Busy),
            Err(ChangeRefused::Invalid) => reply(out, origin, Outcome::Invalid),
        }
        self.mark_dirty(id);
    }

    /// This node stops: others may lead at once instead of after an election timeout. Whether it leads any still that others
    /// could, on its way to another or not.
    pub fn hand_over(&mut self) -> bool {
        let alive = |group: &Group| group.raft.needs_ticks() && !group.damaged && group.raft.retired() == 0;
        let shared = self.groups.iter().filter(|(_, group)| alive(group) && group.raft.role() == Role::Leader);
        let led: Vec<CopysetId> = shared.map(|(&id, _)| id).collect();
        for &id in led.iter().filter(|&&id| self.leads(id)).collect::<Vec<_>>() {
            // Nobody to hand it to: they will elect.
            if self.groups.get_mut(&id).is_some_and(|group| group.raft.transfer_leader(self.now.0, 0).is_ok()) {
                self.mark_dirty(id);
            }
        }
        !led.is_empty()
    }

    /// A change that had started is over.
    pub(super) fn change_done(&mut self, cookie: u64, result: Result<Changed, ChangeFailed>, out: &mut Effects) {
        let Some((id, origin)) = self.members.changes.try_remove(cookie as usize) else { return };
        match result {
            Ok(Changed { old, new }) => {
                let data = ReplyData::Members { old, new };
                out.replies.push(Reply { origin, outcome: Outcome::Success, applied_index: 0, data });
            }
            Err(ChangeFailed::CatchUp { .. }) => reply(out, origin, Outcome::CatchUp),
            Err(ChangeFailed::LeaderLost) => self.redirect(id, origin, out),
            Err(ChangeFailed::Refused) => reply(out, origin, Outcome::Failed),
        }
    }

    /// Make what these copysets have applied durable outside the log.
    pub(super) fn want_checkpoints(&mut self, ids: &[CopysetId], origin: Option<Origin>, out: &mut Effects) {
        let lacks = |id: &CopysetId| {
            let group = self.groups.get(id).filter(|group| !group.damaged)?;
            let known = self.log.borrow().index(*id)?.checkpoint().applied_index;
            (known < group.applied).then_some((*id, group.applied))
        };
        let targets: Vec<(CopysetId, u64)> = ids.iter().filter_map(lacks).collect();
        if targets.is_empty() {
            return tell(out, origin, Outcome::Success);
        }
        self.members.wanted.push((origin, targets));
        self.flush.next = self.now;
    }

    /// Checkpoints became durable: answer those who waited for them.
    pub(super) fn checkpoints_durable(&mut self, out: &mut Effects) {
        let log = self.log.borrow();
        self.members.wanted.retain_mut(|(origin, targets)| {
            let durable = |id: CopysetId, at: u64| log.index(id).is_none_or(|i| i.checkpoint().applied_index >= at);
            targets.retain(|&(id, at)| !durable(id, at));
            if targets.is_empty() {
                tell(out, *origin, Outcome::Success);
            }
            !targets.is_empty()
        });
        drop(log);
        if !self.members.wanted.is_empty() {
            self.flush.next = self.now;
        }
    }

    /// Somebody waits for a checkpoint.
    pub(super) fn checkpoints_wanted(&self) -> bool {
        !self.members.wanted.is_empty()
    }
}
