//! Reads and checksums: memory first, the device for the rest, every device block verified before it leaves.

use super::request::{Origin, Outcome, Reply, ReplyData};
use super::{DISK, Effects, Shard, Task, reply};
use crate::chunk::{Piece, ReadPlan, Verified};
use crate::io::buffer::PoolBuf;
use crate::io::{Errno, Op};
use crate::limits::READ_RESERVE_BYTES;
use crate::metrics::Counter;
use bytes::Bytes;
use raftlog::CopysetId;
use smallvec::SmallVec;

/// A checksum reads this much at a time, bytes.
const HASH_STEP: u32 = 1 << 20;
/// Zeros for unwritten blocks.
pub(crate) static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
/// A block that changes under a read is read again at most this often; then the overlay must have had it.
const ATTEMPTS: u8 = 8;

/// A running checksum over a range.
pub(super) struct Hash {
    digest: crc_fast::Digest,
    end: u32,
}

/// A read that waits for the device.
pub(super) struct Job {
    pub(super) origin: Origin,
    pub(super) copyset: CopysetId,
    pub(super) chunk: u64,
    pub(super) offset: u32,
    pub(super) len: u32,
    plan: ReadPlan,
    done: SmallVec<[Option<Bytes>; 2]>,
    pending: usize,
    /// Reads so far that ended stale, and that ended in a mismatch without a reason.
    stales: u8,
    rots: u8,
    /// The block that was found rotten last, and how often it was mended in vain.
    pub(super) rotten: u32,
    pub(super) mends: u8,
    failed: Option<Outcome>,
    stale: bool,
    rot: bool,
    hash: Option<Hash>,
}

impl Shard {
    pub(super) fn read(&mut self, origin: Origin, id: CopysetId, chunk: u64, offset: u32, len: u32, out: &mut Effects) {
        match self.store.read(id, chunk, offset, len) {
            Ok(plan) => {
                let job = Job::new(origin, id, chunk, offset, len, plan, None);
                self.run(job, out);
            }
            Err(Outcome::CrcFail) => {
                self.read_lost(Job::new(origin, id, chunk, offset, len, ReadPlan::none(), None), out)
            }
            Err(outcome) => {
                let applied_index = self.groups.get(&id).map_or(0, |g| g.applied);
                out.replies.push(Reply { origin, outcome, applied_index, data: ReplyData::None });
            }
        }
    }

    pub(super) fn info(&self, origin: Origin, id: CopysetId, chunk: u64, out: &mut Effects) {
        let versions = self.store.info(id, chunk).unwrap_or_default();
        let applied_index = self.groups.get(&id).map_or(0, |g| g.applied);
        let data = ReplyData::Versions(versions);
        out.replies.push(Reply { origin, outcome: Outcome::Success, applied_index, data });
    }

    pub(super) fn hash(&mut self, origin: Origin, id: CopysetId, chunk: u64, offset: u32, len: u32, out: &mut Effects) {
        let digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
        let hash = Hash { digest, end: offset.saturating_add(len) };
        match self.store.read(id, chunk, offset, len.min(HASH_STEP)) {
            Ok(plan) => {
                let job = Job::new(origin, id, chunk, offset, len.min(HASH_STEP), plan, Some(hash));
                self.run(job, out);
            }
            Err(Outcome::NoChunk) => {
                let data = ReplyData::Hash(None);
                out.replies.push(Reply { origin, outcome: Outcome::Success, applied_index: 0, data });
            }
            Err(Outcome::CrcFail) => {
                let job = Job::new(origin, id, chunk, offset, len.min(HASH_STEP), ReadPlan::none(), Some(hash));
                self.read_lost(job, out);
            }
            Err(outcome) => reply(out, origin, outcome),
        }
    }

    /// Answer at once, or put the device to work.
    fn run(&mut self, mut job: Job, out: &mut Effects) {
        let short = self.arenas.all_payload.iter().any(|arena| arena.free_bytes() < arena.size() / 2);
        job.done = job.plan.pieces.iter().map(|piece| Job::in_memory(piece, short)).collect();
        if job.done.iter().all(Option::is_some) {
            return self.finish(job, out);
        }
        let key = self.reads.insert(job);
        if !self.read_queue.is_empty() || !self.start_read(key, out) {
            self.read_queue.push_back(key);
        }
    }

    /// Submit a job's device pieces, all or none: two half-served jobs must not wait for each other.
    fn start_read(&mut self, key: usize, out: &mut Effects) -> bool {
        let Some(job) = self.reads.get_mut(key) else { return true };
        let device: SmallVec<[(usize, u64, usize); 2]> = job
            .plan
            .pieces
            .iter()
            .enumerate()
            .filter(|&(i, _)| job.done.get(i).is_some_and(Option::is_none))
            .filter_map(|(i, p)| {
                if let Piece::Device { disk_offset, len, .. } = *p {
                    Some((i, disk_offset, len as usize))
                } else {
                    None
                }
            })
            .collect();
        let needed: usize = device.iter().map(|d| d.2.next_power_of_two()).sum();
        let work = &self.arenas.work;
        if work.free_bytes() < needed + READ_RESERVE_BYTES.min(work.size() / 4) {
            return false;
        }
        let mut bufs: SmallVec<[PoolBuf; 2]> = SmallVec::new();
        for &(_, _, len) in &device {
            match self.arenas.work.alloc(len) {
                Some(buf) => bufs.push(buf),
                None => return false,
            }
        }
        job.pending = device.len();
        for ((piece, offset, _), buf) in device.into_iter().zip(bufs) {
            self.metrics.add(Counter::DataReads, 1);
            self.metrics.add(Counter::DataReadBytes, buf.len() as u64);
            self.submit(out, Task::Read { job: key, piece }, Op::Read { file: DISK, offset, buf });
        }
        true
    }

    pub(super) fn start_waiting_reads(&mut self, out: &mut Effects) {
        while let Some(&key) = self.read_queue.front() {
            if !self.start_read(key, out) {
                return;
            }
            self.read_queue.pop_front();
        }
    }

    pub(super) fn read_done(
        &mut self,
        key: usize,
        piece: usize,
        buf: PoolBuf,
        result: Result<(), Errno>,
        out: &mut Effects,
    ) {
        let Some(job) = self.reads.get_mut(key) else { return };
        job.pending -= 1;
        if let Err(error) = result {
            tracing::warn!(copyset = ?job.copyset, chunk = job.chunk, %error, "read failed");
            self.metrics.add(Counter::DeviceErrors, 1);
            job.failed = Some(Outcome::DiskFail);
        } else {
            let Some(&Piece::Device { first_block, .. }) = job.plan.pieces.get(piece) else { return };
            match self.store.check(&job.plan.key, first_block, &buf) {
                Verified::Ok => {
                    // A reply may wait long for its client, or for the other parts of a volume's read: it must not keep
                    // what the next read needs, or reads wait for each other for ever.
                    let short = self.arenas.work.free_bytes() < READ_RESERVE_BYTES + self.layout.chunk_size as usize;
                    if let Some(slot) = job.done.get_mut(piece) {
                        *slot = Some(if short { Bytes::copy_from_slice(&buf) } else { buf.freeze() });
                    }
                }
                Verified::Stale => job.stale = true,
                Verified::Rot { block } => (job.rot, job.rotten) = (true, block),
            }
        }
        if job.pending == 0 {
            let job = self.reads.remove(key);
            self.conclude(job, out);
        }
    }

    /// All device pieces of a job are back.
    fn conclude(&mut self, mut job: Job, out: &mut Effects) {
        if job.failed.is_some() {
            return self.finish(job, out);
        }
        // Rule 12: a mismatch is read once more before it counts as rot; a block that changed meanwhile as often as it takes.
        job.rots += u8::from(job.rot);
        job.stales += u8::from(job.stale && !job.rot);
        if (job.rot || job.stale) && job.rots < 2 && job.stales < ATTEMPTS {
            match self.store.read(job.copyset, job.chunk, job.offset, job.len) {
                Ok(plan) => {
                    let mut next =
                        Job::new(job.origin, job.copyset, job.chunk, job.offset, job.len, plan, job.hash.take());
                    (next.stales, next.rots, next.mends) = (job.stales, job.rots, job.mends);
                    return self.run(next, out);
                }
                // Another read found more rot, and the whole chunk is being taken in.
                Err(Outcome::CrcFail) => return self.read_lost(job, out),
                Err(outcome) => job.failed = Some(outcome),
            }
        } else if job.rot || job.stale {
            tracing::error!(copyset = ?job.copyset, chunk = job.chunk, offset = job.offset, "checksum mismatch on the device");
            self.metrics.add(Counter::Rot, 1);
            return self.read_lost(job, out);
        }
        self.finish(job, out);
    }

    /// What a read wants is lost here: another replica may have it.
    fn read_lost(&mut self, job: Job, out: &mut Effects) {
        if let Err(job) = self.mend_read(job) {
            self.give_up_read(*job, out);
        }
    }

    /// Nobody has it.
    pub(super) fn give_up_read(&mut self, mut job: Job, out: &mut Effects) {
        job.failed = Some(Outcome::CrcFail);
        self.finish(job, out);
    }

    /// What was lost may be there now.
    pub(super) fn read_again(&mut self, mut job: Job, out: &mut Effects) {
        match self.store.read(job.copyset, job.chunk, job.offset, job.len) {
            Ok(plan) => {
                let mut next = Job::new(job.origin, job.copyset, job.chunk, job.offset, job.len, plan, job.hash.take());
                next.mends = job.mends;
                self.run(next, out);
            }
            Err(Outcome::CrcFail) => self.read_lost(job, out),
            Err(outcome) => {
                job.failed = Some(outcome);
                self.finish(job, out);
            }
        }
    }

    fn finish(&mut self, mut job: Job, out: &mut Effects) {
        let applied_index = self.groups.get(&job.copyset).map_or(0, |g| g.applied);
        let origin = job.origin;
        if let Some(outcome) = job.failed {
            out.replies.push(Reply { origin, outcome, applied_index, data: ReplyData::None });
            return;
        }
        let data: SmallVec<[Bytes; 2]> = assemble(&job);
        let Some(mut hash) = job.hash.take() else {
            let data = ReplyData::Data(data);
            out.replies.push(Reply { origin, outcome: Outcome::Success, applied_index, data });
            return;
        };
        for bytes in &data {
            hash.digest.update(bytes);
        }
        drop(data);
        let next = job.offset + job.len;
        if next >= hash.end {
            let data = ReplyData::Hash(Some(hash.digest.finalize() as u32));
            out.replies.push(Reply { origin, outcome: Outcome::Success, applied_index, data });
            return;
        }
        let len = (hash.end - next).min(HASH_STEP);
        match self.store.read(job.copyset, job.chunk, next, len) {
            Ok(plan) => self.run(Job::new(origin, job.copyset, job.chunk, next, len, plan, Some(hash)), out),
            Err(Outcome::CrcFail) => {
                let none = ReadPlan::none();
                self.read_lost(Job::new(origin, job.copyset, job.chunk, next, len, none, Some(hash)), out)
            }
            Err(outcome) => reply(out, origin, outcome),
        }
    }
}

/// The pieces in order; zeros come from one shared static.
fn assemble(job: &Job) -> SmallVec<[Bytes; 2]> {
    let mut data = SmallVec::new();
    for (piece, done) in job.plan.pieces.iter().zip(&job.done) {
        match (piece, done) {
            (&Piece::Zeros(mut len), _) => {
                while len > 0 {
                    let step = len.min(ZEROS.len() as u32);
                    data.push(Bytes::from_static(&ZEROS).slice(..step as usize));
                    len -= step;
                }
            }
            (_, Some(bytes)) => data.push(bytes.clone()),
            (_, None) => unreachable!("a finished read has all its pieces"),
        }
    }
    data
}

impl Job {
    fn new(
        origin: Origin,
        copyset: CopysetId,
        chunk: u64,
        offset: u32,
        len: u32,
        plan: ReadPlan,
        hash: Option<Hash>,
    ) -> Self {
        let done = SmallVec::new();
        Self {
            origin,
            copyset,
            chunk,
            offset,
            len,
            plan,
            done,
            pending: 0,
            stales: 0,
            rots: 0,
            rotten: 0,
            mends: 0,
            failed: None,
            stale: false,
            rot: false,
            hash,
        }
    }

    /// What needs no device. When payload memory is short a reply must not pin it: nobody knows when it will be sent.
    fn in_memory(piece: &Piece, short: bool) -> Option<Bytes> {
        match piece {
            Piece::Memory(bytes) if short => Some(Bytes::copy_from_slice(bytes)),
            Piece::Memory(bytes) => Some(bytes.clone()),
            Piece::Zeros(_) => Some(Bytes::new()),
            Piece::Device { .. } => None,
        }
    }
}
