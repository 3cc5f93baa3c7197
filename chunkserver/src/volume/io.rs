//! One I/O on a volume: cut into requests to chunks, a bounded number of them in flight, gathered again.
//!
//! Promises: an I/O ends exactly once, and only when none of its requests is in flight (a late piece of a failed
//! write could otherwise overtake the client's next one); requests that were not done for a passing reason are asked
//! again with back-off until the deadline; a read of an absent chunk is zeros; data is shared, never copied.
//!
//! Limit: what makes repeats harmless is counted within one I/O and what repeats it by [`VolumeIo::after`]. Whoever asks
//! anew, because he was told that an I/O failed or lives after this process, is somebody else to the servers: a write that
//! lies unread in its leader's connection may still be done in that leader's term (decision 0018).

use crate::io::Instant;
use crate::shard::request::{BlockCrcs, ChunkOp, Outcome, Reply, ReplyData, RequestOp};
use crate::volume::Volume;
use crate::volume::map::{BLOCK_BYTES, Cursor, EXTENT_BYTES_MAX, Extent};
use bytes::Bytes;
use raftlog::CopysetId;
use smallvec::SmallVec;
use std::sync::Arc;

/// Requests of one I/O in flight at a time. A zero range of 4 GiB has hundreds, an I/O of 32 MiB 128.
pub const PARTS_IN_FLIGHT_MAX: usize = 32;
/// Pause before the next attempt, milliseconds: while somebody else is found who leads,
const REDIRECTED_MS: u64 = 10;
/// of a server that has too much to do already (doubling from the first to the second, a tenth more or less),
const OVERLOAD_MS: (u64, u64) = (100, 8_000);
/// and after anything else that passes.
const FAILED_MS: (u64, u64) = (10, 640);
/// A failed disk is asked again so often, while its server ends.
const DISK_ATTEMPTS: u32 = 7;

static ZEROS: [u8; EXTENT_BYTES_MAX as usize] = [0; EXTENT_BYTES_MAX as usize];

/// Data of a finished read, in order; total length = the length asked.
pub type Pieces = SmallVec<[Bytes; 4]>;

/// Data of a write with its checksums.
#[derive(Clone, Debug)]
pub struct Payload {
    /// Whole blocks, 4 KiB aligned memory.
    pub data: Bytes,
    /// CRC32C of each block.
    pub crcs: BlockCrcs,
}

impl Payload {
    /// Cut off the first `len` bytes (whole blocks).
    fn split_to(&mut self, len: usize) -> Self {
        let rest = self.crcs.split_off_blocks(len / BLOCK_BYTES as usize);
        Self { data: self.data.split_to(len), crcs: std::mem::replace(&mut self.crcs, rest) }
    }
}

trait SplitOffBlocks {
    fn split_off_blocks(&mut self, at: usize) -> Self;
}
impl SplitOffBlocks for BlockCrcs {
    /// `Vec::split_off`, which `SmallVec` lacks.
    fn split_off_blocks(&mut self, at: usize) -> Self {
        let rest = Self::from_slice(&self[at..]);
        self.truncate(at);
        rest
    }
}

/// What to do.
#[derive(Clone, Debug)]
pub enum IoKind {
    /// Read.
    Read,
    /// Write. No buffer may straddle a border between two extents that another buffer ends in: either one buffer for
    /// all, or one per extent of `Geometry::extents` (then a small write-back does not pin a large buffer).
    Write(SmallVec<[Payload; 1]>),
    /// Make it read as zeros.
    Zero,
}

impl IoKind {
    /// A write from one buffer.
    #[must_use]
    pub fn write(data: Bytes, crcs: BlockCrcs) -> Self {
        Self::Write(SmallVec::from_iter([Payload { data, crcs }]))
    }
}

/// Why an I/O failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VolumeError {
    /// Offset or length is no multiple of the block size, or the length is 0, or payload and length differ.
    #[error("offset or length is not a whole number of blocks")]
    Unaligned,
    /// Reaches beyond the end.
    #[error("beyond the end of the volume")]
    BeyondEnd,
    /// The volume was deleted.
    #[error("the volume was deleted")]
    Deleted,
    /// No free slot for a new chunk.
    #[error("no space left in the chunk pool")]
    NoSpace,
    /// The server is stopping.
    #[error("the server is stopping")]
    Stopping,
    /// A chunk answered this.
    #[error("a chunk answered {0:?}")]
    Chunk(Outcome),
    /// Asked again until the deadline; the last answer.
    #[error("not done before the deadline: {0:?}")]
    TimedOut(Outcome),
    /// A read was answered with the wrong number of bytes.
    #[error("a chunk answered with the wrong number of bytes")]
    WrongLength,
}

/// A request to send.
#[derive(Clone, Debug)]
pub struct Part {
    /// To whom.
    pub copyset: CopysetId,
    /// What.
    pub op: RequestOp,
    /// To be given to [`VolumeIo::reply`].
    pub part: u32,
    /// Which of the I/O's requests it is, from 0; the same for all its attempts.
    pub instance: u32,
    /// How many attempts were lost before ([`VolumeIo::lost`]).
    pub attempt: u32,
}

/// What a reply changed.
#[derive(Debug)]
pub enum Progress {
    /// Ask [`VolumeIo::next_part`] for more; others may still be in flight.
    More,
    /// As `More`, and a request waits: call [`VolumeIo::next_part`] again then too.
    Retry {
        /// From now.
        after_ms: u64,
    },
    /// Finished.
    Done(Result<Pieces, VolumeError>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    Asked,
    Waiting(Instant),
}

#[derive(Debug)]
struct Slot {
    state: State,
    extent: Extent,
    /// Place of the answer among the pieces of a read.
    piece: usize,
    /// Kept for asking again.
    payload: Option<Payload>,
    instance: u32,
    /// Answers that were no success.
    attempts: u32,
    /// See [`Part::attempt`].
    lost: u32,
}

#[derive(Debug)]
enum Work {
    /// Answers in order of the extents.
    Read(SmallVec<[SmallVec<[Bytes; 2]>; 1]>),
    /// What is not asked yet, last first.
    Write(SmallVec<[Payload; 1]>),
    Zero,
}

/// One I/O in progress.
#[derive(Debug)]
pub struct VolumeIo {
    volume: Arc<Volume>,
    work: Work,
    cursor: Cursor,
    deadline: Instant,
    slots: SmallVec<[Slot; 1]>,
    /// Requests begun so far.
    begun: u32,
    /// What [`Slot::lost`] begins with, and the most it came to.
    lost: (u32, u32),
    asked: usize,
    waiting: usize,
    failed: Option<VolumeError>,
    done: bool,
}

impl VolumeIo {
    /// Check it against the volume and make it ready to start. After `deadline` nothing is asked again.
    ///
    /// # Errors
    /// [`VolumeError`] when it cannot be started.
    pub fn new(
        volume: &Arc<Volume>,
        kind: IoKind,
        offset: u64,
        len: u64,
        deadline: Instant,
    ) -> Result<Self, VolumeError> {
        check(volume, &kind, offset, len)?;
        let (work, cursor) = match kind {
            IoKind::Read => (Work::Read(SmallVec::new()), Cursor::data(offset, len)),
            IoKind::Write(mut payload) => {
                payload.reverse();
                (Work::Write(payload), Cursor::data(offset, len))
            }
            IoKind::Zero => (Work::Zero, Cursor::chunks(offset, len)),
        };
        Ok(Self {
            volume: Arc::clone(volume),
            work,
            cursor,
            deadline,
            slots: SmallVec::new(),
            begun: 0,
            lost: (0, 0),
            asked: 0,
            waiting: 0,
            failed: None,
            done: false,
        })
    }

    /// It repeats an I/O that failed, whose [`Self::lost_max`] came to this: its attempts are later ones.
    #[must_use]
    pub fn after(mut self, lost: u32) -> Self {
        self.lost = (lost, lost);
        self
    }

    /// How many attempts of one of its requests were lost at most, those of the I/Os it repeats too.
    #[must_use]
    pub const fn lost_max(&self) -> u32 {
        self.lost.1
    }

    /// The attempt in flight was sent and has no answer, so it may come late: the next one says that it is another one.
    pub fn lost(&mut self, part: u32) {
        if let Some(slot) = self.slots.get_mut(part as usize) {
            slot.lost += 1;
            self.lost.1 = self.lost.1.max(slot.lost);
        }
    }

    /// Whose bytes these are.
    #[must_use]
    pub const fn volume(&self) -> &Arc<Volume> {
        &self.volume
    }

    /// The next request to send now, if any. Each must be answered with [`Self::reply`] once.
    pub fn next_part(&mut self, now: Instant) -> Option<Part> {
        if self.done || self.failed.is_some() {
            return None;
        }
        let at = match self.due(now) {
            Some(at) => {
                self.waiting -= 1;
                at
            }
            None => self.start_next()?,
        };
        let op = self.request(at);
        let slot = &mut self.slots[at];
        slot.state = State::Asked;
        self.asked += 1;
        let (copyset, part) = (slot.extent.copyset, at as u32);
        Some(Part { copyset, op, part, instance: slot.instance, attempt: slot.lost })
    }

    /// When to call [`Self::next_part`] although no reply came.
    #[must_use]
    pub fn wake_at(&self) -> Option<Instant> {
        if self.waiting == 0 || self.failed.is_some() {
            return None;
        }
        let waits = |slot: &Slot| if let State::Waiting(until) = slot.state { Some(until) } else { None };
        self.slots.iter().filter_map(waits).min()
    }

    /// Ask nothing more: it ends with `why` when nothing is in flight. True if that is now, and no reply will say so.
    pub fn cancel(&mut self, why: VolumeError) -> bool {
        self.failed.get_or_insert(why);
        self.done |= self.asked == 0;
        self.done
    }

    /// Nothing of it is in flight: it waits until it is time to ask again.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        self.asked == 0
    }

    /// Take the answer to `part`.
    ///
    /// # Panics
    /// When `part` is not in flight.
    pub fn reply(&mut self, part: u32, reply: Reply, now: Instant) -> Progress {
        let at = part as usize;
        assert!(self.slots.get(at).is_some_and(|s| s.state == State::Asked), "a reply to a part not in flight");
        self.asked -= 1;
        let after_ms = match self.judge(at, reply) {
            Verdict::Done => self.free(at),
            Verdict::Again(outcome) => self.again(at, outcome, now),
            Verdict::Fail(error) => {
                self.failed.get_or_insert(error);
                self.free(at)
            }
        };
        self.progress(after_ms)
    }

    /// A slot whose time to ask again has come.
    fn due(&self, now: Instant) -> Option<usize> {
        if self.waiting == 0 {
            return None;
        }
        self.slots.iter().position(|s| matches!(s.state, State::Waiting(until) if until <= now))
    }

    /// Put the next extent into a slot.
    fn start_next(&mut self) -> Option<usize> {
        let free = self.slots.iter().position(|s| s.state == State::Free);
        if free.is_none() && self.slots.len() >= PARTS_IN_FLIGHT_MAX {
            return None;
        }
        let extent = self.cursor.next(self.volume.geometry())?;
        let (mut piece, mut payload) = (0, None);
        match &mut self.work {
            Work::Read(pieces) => {
                piece = pieces.len();
                pieces.push(SmallVec::new());
            }
            Work::Write(payloads) => payload = Some(take_payload(payloads, extent.len as usize)),
            Work::Zero => {}
        }
        let slot =
            Slot { state: State::Free, extent, piece, payload, instance: self.begun, attempts: 0, lost: self.lost.0 };
        self.begun += 1;
        let at = free.unwrap_or(self.slots.len());
        if at < self.slots.len() {
            self.slots[at] = slot;
        } else {
            self.slots.push(slot);
        }
        Some(at)
    }

    fn request(&self, at: usize) -> RequestOp {
        let Slot { extent: Extent { offset, len, chunk, .. }, payload, .. } = &self.slots[at];
        let (offset, len) = (*offset, *len);
        let op = match (&self.work, payload) {
            (Work::Write(_), Some(Payload { data, crcs })) => {
                ChunkOp::Write { sn: self.volume.sn(), offset, payload: data.clone(), crcs: crcs.clone() }
            }
            (Work::Zero, _) => ChunkOp::Zero { offset, len },
            _ => ChunkOp::Read { offset, len },
        };
        RequestOp::Chunk { chunk: *chunk, op }
    }

    fn judge(&mut self, at: usize, reply: Reply) -> Verdict {
        let Slot { piece, extent, attempts, .. } = &self.slots[at];
        match (&mut self.work, reply.outcome) {
            (Work::Read(pieces), Outcome::Success) => match whole_data(reply.data, extent.len) {
                Some(data) => pieces[*piece] = data,
                None => return Verdict::Fail(VolumeError::WrongLength),
            },
            (Work::Read(pieces), Outcome::NoChunk) => pieces[*piece] = SmallVec::from_iter([zeros(extent.len)]),
            (Work::Write(_), Outcome::Success) | (Work::Zero, Outcome::Success | Outcome::NoChunk) => {}
            (_, Outcome::NoSpace) => return Verdict::Fail(VolumeError::NoSpace),
            (_, Outcome::Stopping) => return Verdict::Fail(VolumeError::Stopping),
            // The reason passes.
            (_, again @ (Outcome::NotLeader | Outcome::Overload | Outcome::Failed)) => return Verdict::Again(again),
            // A server whose disk failed ends, and another one leads then, if there is one.
            (_, Outcome::DiskFail) if *attempts < DISK_ATTEMPTS && self.volume.homes(extent.copyset).len() > 1 => {
                return Verdict::Again(Outcome::DiskFail);
            }
            (_, outcome) => return Verdict::Fail(VolumeError::Chunk(outcome)),
        }
        Verdict::Done
    }

    fn free(&mut self, at: usize) -> Option<u64> {
        let slot = &mut self.slots[at];
        slot.state = State::Free;
        slot.payload = None;
        None
    }

    /// Keep the slot for another attempt, if there is time for one.
    fn again(&mut self, at: usize, outcome: Outcome, now: Instant) -> Option<u64> {
        let slot = &mut self.slots[at];
        let after_ms = pause_ms(outcome, slot.attempts, slot.extent.chunk ^ u64::from(slot.extent.offset));
        let until = now.after_ms(after_ms);
        if until >= self.deadline || self.volume.is_deleted() {
            let why = if self.volume.is_deleted() { VolumeError::Deleted } else { VolumeError::TimedOut(outcome) };
            self.failed.get_or_insert(why);
            return self.free(at);
        }
        slot.attempts += 1;
        slot.state = State::Waiting(until);
        self.waiting += 1;
        Some(after_ms)
    }

    fn progress(&mut self, after_ms: Option<u64>) -> Progress {
        let left = || !self.cursor.is_done(self.volume.geometry());
        if self.failed.is_none() && self.volume.is_deleted() && (self.waiting > 0 || left()) {
            self.failed = Some(VolumeError::Deleted);
        }
        if let Some(error) = self.failed {
            self.done = self.asked == 0;
            return if self.done { Progress::Done(Err(error)) } else { Progress::More };
        }
        if self.asked == 0 && self.waiting == 0 && self.cursor.is_done(self.volume.geometry()) {
            self.done = true;
            return Progress::Done(Ok(self.take_pieces()));
        }
        after_ms.map_or(Progress::More, |after_ms| Progress::Retry { after_ms })
    }

    fn take_pieces(&mut self) -> Pieces {
        match &mut self.work {
            Work::Read(pieces) => pieces.drain(..).flatten().collect(),
            _ => Pieces::new(),
        }
    }
}

/// How long to wait before attempt number `attempts + 1`. `spread`: so that not all come back at the same time.
fn pause_ms(outcome: Outcome, attempts: u32, spread: u64) -> u64 {
    let doubled = |(first, last): (u64, u64)| (first << attempts.min(7)).min(last);
    match outcome {
        Outcome::NotLeader => REDIRECTED_MS,
        Outcome::Overload => {
            let pause = doubled(OVERLOAD_MS);
            let draw = spread.wrapping_add(u64::from(attempts)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
            (pause - pause / 10 + draw % (pause / 5)).clamp(OVERLOAD_MS.0, OVERLOAD_MS.1)
        }
        _ => doubled(FAILED_MS),
    }
}

enum Verdict {
    Done,
    Again(Outcome),
    Fail(VolumeError),
}

fn check(volume: &Volume, kind: &IoKind, offset: u64, len: u64) -> Result<(), VolumeError> {
    let whole = |n: u64| n.is_multiple_of(u64::from(BLOCK_BYTES));
    if !whole(offset) || !whole(len) || len == 0 {
        return Err(VolumeError::Unaligned);
    }
    if offset.checked_add(len).is_none_or(|end| end > volume.size()) {
        return Err(VolumeError::BeyondEnd);
    }
    if volume.is_deleted() {
        return Err(VolumeError::Deleted);
    }
    if let IoKind::Write(payload) = kind {
        let bytes: u64 = payload.iter().map(|p| p.data.len() as u64).sum();
        let fits = |p: &Payload| p.data.len() == p.crcs.len() * BLOCK_BYTES as usize;
        if bytes != len || !payload.iter().all(fits) {
            return Err(VolumeError::Unaligned);
        }
    }
    Ok(())
}

/// The next `len` bytes of what is left to write.
fn take_payload(left: &mut SmallVec<[Payload; 1]>, len: usize) -> Payload {
    let exact = left.last().map(|p| p.data.len() == len);
    assert!(left.last().is_some_and(|p| p.data.len() >= len), "a payload buffer ends inside an extent");
    match (exact, left.last_mut()) {
        (Some(false), Some(longer)) => longer.split_to(len),
        _ => left.pop().unwrap_or_else(|| Payload { data: Bytes::new(), crcs: BlockCrcs::new() }),
    }
}

fn whole_data(data: ReplyData, len: u32) -> Option<SmallVec<[Bytes; 2]>> {
    let ReplyData::Data(data) = data else { return None };
    let bytes: usize = data.iter().map(Bytes::len).sum();
    (bytes == len as usize).then_some(data)
}

pub(super) fn zeros(len: u32) -> Bytes {
    Bytes::from_static(ZEROS.get(..len as usize).unwrap_or(&ZEROS))
}

#[cfg(test)]
mod tests;
