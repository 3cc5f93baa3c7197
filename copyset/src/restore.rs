//! From what the log says to what raft-rs may be started with (rule 7).
//!
//! raft-rs ends the process when its storage contradicts itself. Here the same contradictions are found first and
//! are errors of that one copyset.

use crate::change::{ChangeError, decode_change};
use crate::conf::{ConfError, ConfState};
use raftlog::{CopysetId, EntryKind, HardState, Index, Log};

/// Largest index or term that is believed: what lies beyond was never reached by counting.
pub(crate) const NUMBER_MAX: u64 = 1 << 60;
/// Entries looked at in one go.
const SCAN: u64 = 1024;

/// Why a copyset cannot start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No checkpoint was ever logged for it.
    #[error("copyset {0:?} is not in the log")]
    Unknown(CopysetId),
    /// The own peer id is 0.
    #[error("a copyset needs a peer id of its own")]
    Nobody,
    /// The checkpoint's configuration is unreadable.
    #[error("checkpoint of copyset {0:?}")]
    Conf(CopysetId, #[source] ConfError),
    /// Committed entries are missing.
    #[error("copyset {id:?} had committed up to {commit}, but its log ends at {last}")]
    CommitBeyondLog {
        /// Copyset.
        id: CopysetId,
        /// Committed index.
        commit: u64,
        /// Last index.
        last: u64,
    },
    /// Indexes have a hole or terms run backward.
    #[error("copyset {id:?}: entry {index} of the log does not follow the one before it")]
    Order {
        /// Copyset.
        id: CopysetId,
        /// Where.
        index: u64,
    },
    /// The log holds entries of a term that was never recorded.
    #[error("copyset {id:?} is at term {term}, but its log at term {last}")]
    Term {
        /// Copyset.
        id: CopysetId,
        /// Of the hard state.
        term: u64,
        /// Of the last entry.
        last: u64,
    },
    /// An index or term no copyset ever counts to.
    #[error("copyset {0:?}: the log speaks of an absurd index or term")]
    Number(CopysetId),
    /// A membership change in the log is unreadable.
    #[error("copyset {id:?}: membership change at {index}")]
    Change {
        /// Copyset.
        id: CopysetId,
        /// Where.
        index: u64,
        /// Why.
        #[source]
        source: ChangeError,
    },
    /// raft-rs refuses the settings.
    #[error("raft")]
    Raft(#[from] raft::Error),
}

/// What to start from.
#[derive(Debug)]
pub(crate) struct Start {
    /// As the log holds it, with what is only of this replica.
    pub(crate) conf: ConfState,
    /// Records of it are lost, now or before it was last caught up.
    pub(crate) suspect: bool,
    pub(crate) applied: u64,
    pub(crate) applied_term: u64,
    /// With a commit in `applied..=last`.
    pub(crate) hard_state: HardState,
}

/// Reads and checks one copyset's part of the log. `lost`: records of it are; then, and while its checkpoint says that they
/// were, it may end before what was committed, and in a term that no hard state speaks of (rule 21).
pub(crate) fn load(log: &Log, id: CopysetId, lost: bool) -> Result<Start, Error> {
    let index = log.index(id).ok_or(Error::Unknown(id))?;
    let checkpoint = index.checkpoint();
    let conf = ConfState::decode(&checkpoint.conf).map_err(|e| Error::Conf(id, e))?;
    let suspect = lost || conf.suspect;
    let (applied, applied_term) = (checkpoint.applied_index, checkpoint.applied_term);
    let mut hard_state = index.hard_state();
    // A commit record may be older than the checkpoint; what is applied is committed.
    hard_state.commit = hard_state.commit.max(applied);
    let last = index.last_index();
    if suspect {
        hard_state.commit = hard_state.commit.min(last);
    }
    if hard_state.commit > last {
        return Err(Error::CommitBeyondLog { id, commit: hard_state.commit, last });
    }
    let last_term = check_entries(index, id, applied, applied_term)?;
    if hard_state.term > NUMBER_MAX || last > NUMBER_MAX {
        return Err(Error::Number(id));
    }
    if suspect && hard_state.term < last_term {
        (hard_state.term, hard_state.vote) = (last_term, 0);
    }
    if hard_state.term < last_term {
        return Err(Error::Term { id, term: hard_state.term, last: last_term });
    }
    Ok(Start { conf, suspect, applied, applied_term, hard_state })
}

/// Contiguous indexes, rising terms, readable changes; gives the last term.
fn check_entries(index: &Index, id: CopysetId, applied: u64, applied_term: u64) -> Result<u64, Error> {
    let end = index.last_index().saturating_add(1);
    let (mut next, mut term) = (applied.saturating_add(1), applied_term);
    if index.first_index() != next {
        return Err(Error::Order { id, index: index.first_index() });
    }
    while next < end {
        let entries = index.entries(next, end.min(next.saturating_add(SCAN)), usize::MAX);
        if entries.is_empty() {
            return Err(Error::Order { id, index: next });
        }
        for entry in entries {
            if entry.index != next || entry.term < term || entry.term == 0 {
                return Err(Error::Order { id, index: next });
            }
            if entry.kind == EntryKind::ConfChange {
                decode_change(&entry.context).map_err(|source| Error::Change { id, index: next, source })?;
            }
            (next, term) = (next + 1, entry.term);
        }
    }
    Ok(term)
}
