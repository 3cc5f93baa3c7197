//! `raft::Storage` over the shard's shared log.
//!
//! Every entry that is not applied yet is known to the log's index, so nothing here waits, except the sending of old
//! entries whose payload is no longer in memory (rule 16). The log is borrowed inside each call only; its owner never holds a
//! borrow while it calls into a copyset.

use crate::conf::ConfState;
use crate::entry::to_raft;
use raft::eraftpb::{self, Snapshot};
use raft::{Error, GetEntriesContext, RaftState, Storage, StorageError};
use raftlog::{CopysetId, Index, Log};
use std::cell::RefCell;
use std::rc::Rc;

/// One copyset's view of the log.
pub(crate) struct LogStorage {
    log: Rc<RefCell<Log>>,
    id: CopysetId,
    /// Read once, when raft-rs starts.
    start: RaftState,
    /// Entries raft-rs wants for a peer whose payload is not in memory, from the first such one, since last asked.
    absent: RefCell<Vec<(u64, GetEntriesContext)>>,
}

impl LogStorage {
    pub(crate) fn new(log: Rc<RefCell<Log>>, id: CopysetId, start: RaftState) -> Self {
        Self { log, id, start, absent: RefCell::default() }
    }

    /// Length of an entry's payload, resident or not.
    pub(crate) fn payload_len(&self, index: u64) -> usize {
        self.index(|log| log.payload_len(index).unwrap_or(0))
    }

    /// What raft-rs was told to wait for: the first entry absent, and the question.
    pub(crate) fn take_absent(&self) -> Vec<(u64, GetEntriesContext)> {
        std::mem::take(&mut self.absent.borrow_mut())
    }

    /// End of a fetch from `low` on: at most `bytes` of payload, at least one entry.
    pub(crate) fn fetch_end(&self, low: u64, bytes: u64) -> u64 {
        self.index(|log| {
            let mut sum = 0;
            let within = |&at: &u64| {
                sum += log.payload_len(at).unwrap_or(0) as u64;
                sum <= bytes
            };
            (low + 1..=log.last_index()).take_while(within).last().unwrap_or(low) + 1
        })
    }

    /// Index the log's newest checkpoint stands at.
    pub(crate) fn checkpoint_index(&self) -> u64 {
        self.index(|log| log.checkpoint().applied_index)
    }

    /// Which life of the copyset this is.
    pub(crate) fn incarnation(&self) -> u64 {
        self.index(|log| log.checkpoint().incarnation)
    }

    fn index<T>(&self, read: impl FnOnce(&Index) -> T) -> T {
        let log = self.log.borrow();
        let index = log.index(self.id);
        read(index.unwrap_or_else(|| panic!("copyset {:?} was purged from the log while in use", self.id)))
    }
}

impl Storage for LogStorage {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(self.start.clone())
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        context: GetEntriesContext,
    ) -> raft::Result<Vec<eraftpb::Entry>> {
        let bytes_max = max_size.into().map_or(usize::MAX, |bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
        self.index(|log| {
            if low < log.first_index() {
                return Err(Error::Store(StorageError::Compacted));
            }
            if high > log.last_index() + 1 {
                return Err(Error::Store(StorageError::Unavailable));
            }
            let mut entries = log.entries(low, high, bytes_max);
            // Only entries for a peer may be waited for, and only they need their payload: an absent one must not
            // be sent as an empty one.
            if context.can_async() {
                let absent = |e: &raftlog::Entry| e.payload.is_empty() && log.payload_len(e.index).unwrap_or(0) > 0;
                match entries.iter().position(absent) {
                    Some(0) => {
                        self.absent.borrow_mut().push((low, context));
                        return Err(Error::Store(StorageError::LogTemporarilyUnavailable));
                    }
                    Some(n) => entries.truncate(n),
                    None => {}
                }
            }
            Ok(entries.into_iter().map(to_raft).collect())
        })
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        self.index(|log| match log.term(index) {
            Some(term) => Ok(term),
            None if index < log.first_index() => Err(Error::Store(StorageError::Compacted)),
            None => Err(Error::Store(StorageError::Unavailable)),
        })
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.index(Index::first_index))
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.index(Index::last_index))
    }

    /// Names the checkpoint; the chunks are the shard's to send. Our form of the configuration, which has the epoch,
    /// travels as data.
    fn snapshot(&self, request_index: u64, _to: u64) -> raft::Result<Snapshot> {
        self.index(|log| {
            let checkpoint = log.checkpoint();
            let conf = ConfState::decode(&checkpoint.conf).ok().filter(|_| checkpoint.applied_index >= request_index);
            let conf = conf.ok_or(Error::Store(StorageError::SnapshotTemporarilyUnavailable))?;
            let conf = ConfState { retired: 0, suspect: false, ..conf };
            let mut snapshot = Snapshot { data: conf.encode(), ..Snapshot::default() };
            let metadata = snapshot.mut_metadata();
            metadata.index = checkpoint.applied_index;
            metadata.term = checkpoint.applied_term;
            metadata.set_conf_state(conf.to_raft());
            Ok(snapshot)
        })
    }
}
