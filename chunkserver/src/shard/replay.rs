//! Payloads for the replay, read from the log in large pieces in place of one read per entry.
//!
//! Entries of all copysets lie mixed in the log, and copysets are replayed side by side, so one piece serves them all. This
//! is only ever a short cut: what is not in a piece, or does not have the checksum the entry wants, is fetched by a
//! read of its own, which knows about retries and rot (`apply.rs`).

use super::{DISK, Effects, Shard, Task};
use crate::io::Op;
use crate::io::buffer::PoolBuf;
use raftlog::Location;
use std::collections::{BTreeMap, BTreeSet};

/// Bytes of a piece; pieces start at multiples of it in the log zone.
const WINDOW: u64 = 1 << 20;
/// Pieces read before they are asked for.
const AHEAD: u64 = 3;
/// Pieces in memory, being read or read: at most so many,
const WINDOWS_MAX: usize = 12;
/// and at most this part of the work arena: write-back, which the dirty limit makes the replay wait for, lives on the rest
/// (rule 14).
const ARENA_PART: usize = 4;

enum Window {
    Reading,
    Read(PoolBuf),
    Failed,
}

/// Pieces of the log in memory, by their offset in the zone.
#[derive(Default)]
pub(super) struct Replay {
    windows: BTreeMap<u64, Window>,
}

/// The piece that holds all of a payload.
fn window_of(location: Location) -> Option<u64> {
    let start = location.offset / WINDOW * WINDOW;
    (location.offset + location.len as u64 <= start + WINDOW).then_some(start)
}

impl Replay {
    /// A piece was read, or could not be. Nobody may want it any more.
    pub(super) fn arrived(&mut self, at: u64, buf: Option<PoolBuf>) {
        if let Some(window) = self.windows.get_mut(&at) {
            *window = buf.map_or(Window::Failed, Window::Read);
        }
    }

    /// The bytes at a place of the log, if they are here.
    pub(super) fn find(&self, location: Location) -> Option<&[u8]> {
        let start = window_of(location)?;
        let Some(Window::Read(buf)) = self.windows.get(&start) else { return None };
        let from = (location.offset - start) as usize;
        buf.get(from..from + location.len)
    }
}

impl Shard {
    /// See to it that the piece with this payload is read; true while it is on its way.
    pub(super) fn replay_read_ahead(&mut self, location: Location, out: &mut Effects) -> bool {
        let Some(at) = window_of(location).filter(|_| !self.replay_over) else { return false };
        match self.replay.windows.get(&at) {
            Some(Window::Reading) => return true,
            Some(Window::Read(_) | Window::Failed) => return false,
            None => {}
        }
        let max = self.windows_max();
        if self.replay.windows.len() + AHEAD as usize >= max {
            self.drop_windows();
        }
        let segment = self.layout.log_segment_size;
        let end = (at / segment + 1) * segment;
        for start in (at..end).step_by(WINDOW as usize).take(1 + AHEAD as usize) {
            if self.replay.windows.len() >= max || !self.read_window(start, out) {
                break;
            }
        }
        self.replay.windows.contains_key(&at)
    }

    fn windows_max(&self) -> usize {
        let largest = WINDOW.min(self.layout.log_bytes_per_shard) as usize;
        WINDOWS_MAX.min(self.arenas.work.size() / ARENA_PART / largest)
    }

    /// Start reading a piece, unless that has been done; false when there is no memory.
    fn read_window(&mut self, start: u64, out: &mut Effects) -> bool {
        if self.replay.windows.contains_key(&start) {
            return true;
        }
        let len = WINDOW.min(self.layout.log_bytes_per_shard.saturating_sub(start)) as usize;
        let Some(mut buf) = self.arenas.work.alloc(len) else { return false };
        buf.truncate(len);
        self.replay.windows.insert(start, Window::Reading);
        let offset = self.layout.log_offset_of(self.config.shard) + start;
        self.submit(out, Task::Window(start), Op::Read { file: DISK, offset, buf });
        true
    }

    /// Forget the pieces that no copyset reads from now or next.
    fn drop_windows(&mut self) {
        let log = self.log.borrow();
        let next = |(&id, group): (&raftlog::CopysetId, &super::Group)| {
            let head = group.queue.front().filter(|head| head.is_absent())?;
            window_of(log.index(id)?.location(head.index)?)
        };
        let wanted: BTreeSet<u64> = self.groups.iter().filter_map(next).collect();
        let near = |at: u64| wanted.range(at.saturating_sub(AHEAD * WINDOW)..=at).next().is_some();
        self.replay.windows.retain(|&at, window| matches!(window, Window::Reading) || near(at));
    }
}
