//! The writes of the log: what they carry, and what follows when they are done. When they start: [`super::pace`].

use super::{DISK, Effects, SEAL_AFTER_MS, Shard, Task};
use crate::io::Op;
use crate::metrics::Counter;
use bytes::Bytes;
use raftlog::WriteId;

impl Shard {
    /// Start as many log writes as may be in flight.
    pub(super) fn write_log(&mut self, out: &mut Effects) {
        while self.log_write_due() {
            let Some(len) = self.log.borrow_mut().next_header() else { return };
            let Some(mut header) = self.arenas.work.alloc(len) else {
                self.starved = true;
                return;
            };
            let write = self.log.borrow_mut().take_write(&mut header);
            self.pace.started(self.now, write.id, write.records);
            self.slow.started(self.now, write.id);
            let offset = self.layout.log_offset_of(self.config.shard) + write.offset;
            let payload: usize = write.payloads.iter().map(Bytes::len).sum();
            self.seal_at = self.now.after_ms(SEAL_AFTER_MS);
            self.metrics.add(Counter::LogWrites, 1);
            self.metrics.add(Counter::LogBytes, (len + payload) as u64);
            let bufs = std::iter::once(header.freeze()).chain(write.payloads).collect();
            self.submit(out, Task::LogWrite(write.id), Op::Write { file: DISK, offset, bufs, dsync: true });
        }
    }

    /// A log write completed: what it carried is durable, unless an earlier one is still in flight.
    pub(super) fn log_written(&mut self, id: WriteId) {
        self.pace.done(id);
        self.slow.done(self.now, id);
        let Some(durable) = self.log.borrow_mut().write_done(id) else { return };
        let mut unpersisted = std::mem::replace(&mut self.unpersisted, std::mem::take(&mut self.spare));
        for id in unpersisted.drain(..) {
            let Some(group) = self.groups.get_mut(&id) else { continue };
            group.raft.persisted(durable);
            group.unpersisted = group.raft.awaits_log();
            if group.unpersisted {
                self.unpersisted.push(id);
            }
            self.mark_dirty(id);
        }
        self.spare = unpersisted;
    }
}
