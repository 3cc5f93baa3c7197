//! A disk that keeps exactly the promises of the kernel and no other.
//!
//! * Two images of 512-byte sectors: `live` is what reads see, `durable` is what a power cut leaves for sure. Between
//!   them stand the versions of each sector written since the last sync.
//! * A write takes effect when it completes; a read that overlaps a write in flight may see any mix of its sectors.
//! * `dsync` makes that write durable when it completes; a sync, every write that completed before it was submitted.
//! * A power cut keeps, drops or tears each un-synced or in-flight write on its own, sector by sector. A kill keeps what
//!   completed; writes in flight land wholly, partly or not at all.
//! * It may break its promises, each on demand: bits rot at rest, a read or a write goes to a wrong place, and while it
//!   *lies* no sync and no dsync write makes anything durable. What that exposes is noted (`exposed`).
//! * A failed write may have written any of its sectors; a failed sync may have thrown away any write it covers
//!   (reads show that: with O_DIRECT there is no page cache that would go on showing what the drive lost).

use crate::exposure::Exposure;
use crate::rng::Rng;
use crate::rot;
use crate::world::Route;
use chunkserver::io::buffer::{BLOCK, PoolBuf};
use chunkserver::io::{Bufs, Done, Errno, Op};
use std::collections::BTreeMap;
use std::rc::Rc;

pub(crate) const SECTOR: usize = 512;
const EIO: Errno = Errno(5);

/// Chances and speeds, changed by whoever makes trouble.
#[derive(Clone, Debug, Default)]
pub(crate) struct Faults {
    pub(crate) read_ppm: u32,
    pub(crate) write_ppm: u32,
    pub(crate) sync_ppm: u32,
    /// Chance of an operation that takes 5 to 300 ms.
    pub(crate) spike_ppm: u32,
    /// Every latency is multiplied by this plus one.
    pub(crate) slower: u64,
    /// Chance of a read that returns what lies elsewhere.
    pub(crate) stray_read_ppm: u32,
    /// Chance of a write to the CRC zone or a slot that lands elsewhere, and not where it should.
    pub(crate) stray_write_ppm: u32,
    /// Syncs and dsync writes are acknowledged and make nothing durable.
    pub(crate) lying: bool,
    /// Chance of a write that is acknowledged and not made.
    pub(crate) lost_write_ppm: u32,
}

/// What the disk has seen; for the report and for asserting that faults did happen.
#[derive(Clone, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) ops: u64,
    pub(crate) eio: u64,
    pub(crate) spikes: u64,
    pub(crate) torn: u64,
    pub(crate) lost: u64,
    pub(crate) survived: u64,
    pub(crate) stray_reads: u64,
    pub(crate) stray_writes: u64,
    pub(crate) lost_flushes: u64,
    pub(crate) lost_writes: u64,
}

#[derive(Clone, Debug)]
struct Version {
    write: u64,
    order: u64,
    data: Rc<[u8]>,
    at: usize,
}

impl Version {
    fn sector(&self) -> &[u8] {
        &self.data[self.at..self.at + SECTOR]
    }
}

enum Flight {
    Read { offset: u64, buf: PoolBuf },
    Write { offset: u64, bufs: Bufs, dsync: bool },
    Sync { mark: u64 },
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Kept,
    Dropped,
    Torn,
}

/// How a node goes down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Crash {
    /// The machine loses power: the drive's cache is gone.
    Power,
    /// The process dies; the kernel and the drive live on.
    Kill,
}

pub(crate) struct Disk {
    live: Vec<u8>,
    durable: Vec<u8>,
    pending: BTreeMap<u64, Vec<Version>>,
    flights: BTreeMap<u64, (Route, Flight)>,
    next: u64,
    completed: u64,
    pub(crate) faults: Faults,
    pub(crate) counts: Counts,
    pub(crate) exposed: Exposure,
}

fn gather(bufs: &Bufs) -> Rc<[u8]> {
    let mut all = Vec::with_capacity(bufs.iter().map(bytes::Bytes::len).sum());
    bufs.iter().for_each(|buf| all.extend_from_slice(buf));
    all.into()
}

impl Disk {
    pub(crate) fn new(len: u64) -> Self {
        assert!(len.is_multiple_of(BLOCK as u64));
        Self {
            live: vec![0; len as usize],
            durable: vec![0; len as usize],
            pending: BTreeMap::new(),
            flights: BTreeMap::new(),
            next: 0,
            completed: 0,
            faults: Faults::default(),
            counts: Counts::default(),
            exposed: Exposure::default(),
        }
    }

    pub(crate) fn len(&self) -> u64 {
        self.live.len() as u64
    }

    /// Put bytes there, durable at once: what a format tool did before the world began.
    pub(crate) fn preset(&mut self, offset: u64, data: &[u8]) {
        let range = offset as usize..offset as usize + data.len();
        self.live[range.clone()].copy_from_slice(data);
        self.durable[range].copy_from_slice(data);
    }

    /// What a read would see now.
    pub(crate) fn peek(&self, offset: u64, len: usize) -> &[u8] {
        &self.live[offset as usize..offset as usize + len]
    }

    /// What a power cut would leave for sure.
    pub(crate) fn durable(&self, offset: u64, len: usize) -> &[u8] {
        &self.durable[offset as usize..offset as usize + len]
    }

    /// Whether nothing there is on its way or waits for a sync.
    pub(crate) fn rests(&self, offset: u64, len: u64) -> bool {
        let sectors = offset / SECTOR as u64..(offset + len) / SECTOR as u64;
        let overlaps = |(_, flight): &(Route, Flight)| match flight {
            Flight::Write { offset: start, bufs, .. } => {
                let end = start + bufs.iter().map(bytes::Bytes::len).sum::<usize>() as u64;
                *start < offset + len && offset < end
            }
            _ => false,
        };
        self.pending.range(sectors).next().is_none() && !self.flights.values().any(overlaps)
    }

    /// Change the bits of `mask` in one byte for good, silently.
    pub(crate) fn rot(&mut self, offset: u64, mask: u8) {
        self.live[offset as usize] ^= mask;
        self.durable[offset as usize] = self.live[offset as usize];
        self.pending.remove(&(offset / SECTOR as u64));
    }

    /// Begin an operation: its id and how long it will take, ns.
    pub(crate) fn start(&mut self, route: Route, op: Op, rng: &mut Rng) -> (u64, u64) {
        let (flight, base) = match op {
            Op::Read { offset, buf, .. } => {
                assert_aligned(offset, &buf);
                (Flight::Read { offset, buf }, rng.skewed(30_000, 200_000))
            }
            Op::Write { offset, bufs, dsync, .. } => {
                bufs.iter().for_each(|buf| assert_aligned(offset, buf));
                let extra = if dsync { 60_000 } else { 0 };
                (Flight::Write { offset, bufs, dsync }, extra + rng.skewed(40_000, 400_000))
            }
            Op::Sync { .. } => (Flight::Sync { mark: self.completed }, rng.skewed(100_000, 3_000_000)),
            other => unreachable!("not a disk operation: {other:?}"),
        };
        self.next += 1;
        self.counts.ops += 1;
        self.flights.insert(self.next, (route, flight));
        let mut latency = base * (1 + self.faults.slower);
        if rng.ppm(self.faults.spike_ppm) {
            self.counts.spikes += 1;
            latency += rng.between(5_000_000, 300_000_000);
        }
        (self.next, latency)
    }

    /// End an operation; `None` when a crash took it.
    pub(crate) fn finish(&mut self, id: u64, rng: &mut Rng) -> Option<(Route, Done)> {
        let (route, flight) = self.flights.remove(&id)?;
        Some((
            route,
            match flight {
                Flight::Read { offset, mut buf } => {
                    let result = self.read(offset, &mut buf, rng);
                    Done::Read { buf, result }
                }
                Flight::Write { offset, bufs, dsync } => Done::Write(self.write(id, offset, &bufs, dsync, rng)),
                Flight::Sync { mark } => Done::Sync(self.sync(mark, rng)),
            },
        ))
    }

    /// Whether an operation that should make something durable does not.
    fn lies(&mut self) -> bool {
        self.counts.lost_flushes += u64::from(self.faults.lying);
        self.faults.lying
    }

    fn fails(&mut self, ppm: u32, rng: &mut Rng) -> bool {
        let fails = rng.ppm(ppm);
        self.counts.eio += u64::from(fails);
        fails
    }

    fn read(&mut self, offset: u64, buf: &mut [u8], rng: &mut Rng) -> Result<(), Errno> {
        let at = offset as usize;
        if self.fails(self.faults.read_ppm, rng) {
            buf.iter_mut().for_each(|byte| *byte = 0xde);
            return Err(EIO);
        }
        if rng.ppm(self.faults.stray_read_ppm) {
            self.counts.stray_reads += 1;
            let elsewhere = rng.below((self.live.len() - buf.len()) as u64) as usize / BLOCK * BLOCK;
            buf.copy_from_slice(&self.live[elsewhere..elsewhere + buf.len()]);
            return Ok(());
        }
        buf.copy_from_slice(self.live.get(at..at + buf.len()).ok_or(EIO)?);
        for (_, flight) in self.flights.values() {
            let Flight::Write { offset: start, bufs, .. } = flight else { continue };
            let (start, len) = (*start as usize, bufs.iter().map(bytes::Bytes::len).sum::<usize>());
            if start >= at + buf.len() || at >= start + len {
                continue;
            }
            let data = gather(bufs);
            for sector in (start.max(at)..(start + len).min(at + buf.len())).step_by(SECTOR) {
                if rng.coin() {
                    buf[sector - at..][..SECTOR].copy_from_slice(&data[sector - start..][..SECTOR]);
                }
            }
        }
        Ok(())
    }

    fn write(&mut self, id: u64, offset: u64, bufs: &Bufs, dsync: bool, rng: &mut Rng) -> Result<(), Errno> {
        let data = gather(bufs);
        if offset as usize + data.len() > self.live.len() {
            return Err(EIO);
        }
        self.completed += 1;
        let failed = self.fails(self.faults.write_ppm, rng);
        if rng.ppm(self.faults.lost_write_ppm) {
            self.counts.lost_writes += 1;
            return Ok(());
        }
        let stray = if rng.ppm(self.faults.stray_write_ppm) { rot::stray(self, offset, &data, rng) } else { None };
        self.counts.stray_writes += u64::from(stray.is_some());
        let offset = stray.unwrap_or(offset);
        let dsync = dsync && !self.lies();
        for at in (0..data.len()).step_by(SECTOR) {
            if failed && rng.coin() {
                continue;
            }
            let version = Version { write: id, order: self.completed, data: Rc::clone(&data), at };
            self.land(offset / SECTOR as u64 + (at / SECTOR) as u64, version, dsync && !failed);
        }
        if failed { Err(EIO) } else { Ok(()) }
    }

    /// One sector reaches the drive.
    fn land(&mut self, sector: u64, version: Version, durable: bool) {
        let range = sector as usize * SECTOR..(sector as usize + 1) * SECTOR;
        self.live[range.clone()].copy_from_slice(version.sector());
        if durable {
            self.durable[range].copy_from_slice(version.sector());
            self.pending.remove(&sector);
        } else {
            self.pending.entry(sector).or_default().push(version);
        }
    }

    fn sync(&mut self, mark: u64, rng: &mut Rng) -> Result<(), Errno> {
        let failed = self.fails(self.faults.sync_ppm, rng);
        if self.lies() {
            return if failed { Err(EIO) } else { Ok(()) };
        }
        let mut fates = BTreeMap::new();
        let (live, durable) = (&mut self.live, &mut self.durable);
        self.pending.retain(|&sector, versions| {
            let range = sector as usize * SECTOR..(sector as usize + 1) * SECTOR;
            versions.retain(|version| {
                let covered = version.order <= mark;
                if covered && !failed {
                    durable[range.clone()].copy_from_slice(version.sector());
                }
                !covered || (failed && *fates.entry(version.write).or_insert_with(|| rng.coin()))
            });
            let newest = versions.last().map_or(&durable[range.clone()], Version::sector);
            live[range].copy_from_slice(newest);
            !versions.is_empty()
        });
        if failed { Err(EIO) } else { Ok(()) }
    }

    fn fate(&mut self, rng: &mut Rng) -> Fate {
        let fate = [Fate::Kept, Fate::Dropped, Fate::Torn][rng.below(3) as usize];
        match fate {
            Fate::Kept => self.counts.survived += 1,
            Fate::Dropped => self.counts.lost += 1,
            Fate::Torn => self.counts.torn += 1,
        }
        fate
    }

    /// The node goes down. Everything in flight ends here, without an answer.
    pub(crate) fn crash(&mut self, crash: Crash, rng: &mut Rng) {
        let mut flights: Vec<_> = std::mem::take(&mut self.flights).into_iter().collect();
        rng.shuffle(&mut flights);
        for (id, (_, flight)) in flights {
            let Flight::Write { offset, bufs, .. } = flight else { continue };
            let data = gather(&bufs);
            if offset as usize + data.len() > self.live.len() {
                continue;
            }
            self.completed += 1;
            // After a power cut the fate is drawn below, with that of everything else that is not durable.
            let fate = if crash == Crash::Power { Fate::Kept } else { self.fate(rng) };
            for at in (0..data.len()).step_by(SECTOR) {
                if fate == Fate::Kept || (fate == Fate::Torn && rng.coin()) {
                    let version = Version { write: id, order: self.completed, data: Rc::clone(&data), at };
                    self.land(offset / SECTOR as u64 + (at / SECTOR) as u64, version, false);
                }
            }
        }
        if crash == Crash::Power {
            self.cut(rng);
        }
    }

    fn cut(&mut self, rng: &mut Rng) {
        let pending = std::mem::take(&mut self.pending);
        let mut fates = BTreeMap::new();
        for (sector, versions) in pending {
            let range = sector as usize * SECTOR..(sector as usize + 1) * SECTOR;
            for version in versions {
                let fate = *fates.entry(version.write).or_insert_with(|| self.fate(rng));
                if fate == Fate::Kept || (fate == Fate::Torn && rng.coin()) {
                    self.durable[range.clone()].copy_from_slice(version.sector());
                }
            }
            self.live[range.clone()].copy_from_slice(&self.durable[range]);
        }
    }
}

fn assert_aligned(offset: u64, buf: &[u8]) {
    assert!(offset.is_multiple_of(BLOCK as u64), "O_DIRECT offset {offset}");
    assert!(buf.len().is_multiple_of(BLOCK), "O_DIRECT length {}", buf.len());
    assert!((buf.as_ptr() as usize).is_multiple_of(BLOCK), "O_DIRECT memory {:p}", buf.as_ptr());
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use chunkserver::io::buffer::Arena;
    use chunkserver::io::{FileId, Token};
    use std::collections::BTreeSet;
    use std::sync::Arc;

    const FILE: FileId = FileId(0);
    const ROUTE: Route = Route { node: 0, shard: 0, life: 1, token: Token(0) };

    struct Bench {
        disk: Disk,
        arena: Arc<Arena>,
        rng: Rng,
    }

    impl Bench {
        fn new(seed: u64) -> Self {
            Self { disk: Disk::new(1 << 20), arena: Arena::new(1 << 20).unwrap(), rng: Rng::new(seed) }
        }
        fn page(&self, byte: u8) -> Bytes {
            let mut buf = self.arena.alloc(BLOCK).unwrap();
            buf.fill(byte);
            buf.freeze()
        }
        fn start_write(&mut self, offset: u64, byte: u8, dsync: bool) -> u64 {
            let bufs = [self.page(byte)].into_iter().collect();
            self.disk.start(ROUTE, Op::Write { file: FILE, offset, bufs, dsync }, &mut self.rng).0
        }
        fn start_sync(&mut self) -> u64 {
            self.disk.start(ROUTE, Op::Sync { file: FILE }, &mut self.rng).0
        }
        fn finish(&mut self, id: u64) -> Option<Done> {
            self.disk.finish(id, &mut self.rng).map(|(_, done)| done)
        }
        fn write(&mut self, offset: u64, byte: u8, dsync: bool) {
            let id = self.start_write(offset, byte, dsync);
            assert!(matches!(self.finish(id), Some(Done::Write(Ok(())))));
        }
        fn crash(&mut self, crash: Crash) {
            self.disk.crash(crash, &mut self.rng);
        }
        /// The byte a whole block consists of, `None` for a mixture.
        fn byte(&self, offset: u64) -> Option<u8> {
            let page = self.disk.peek(offset, BLOCK);
            page.iter().all(|&b| b == page[0]).then_some(page[0])
        }
    }

    /// What a block may be after the crash, over many seeds.
    fn after(crash: Crash, prepare: impl Fn(&mut Bench)) -> BTreeSet<Option<u8>> {
        let one = |seed| {
            let mut bench = Bench::new(seed);
            prepare(&mut bench);
            bench.crash(crash);
            bench.byte(0)
        };
        (0..200).map(one).collect()
    }

    #[test]
    fn only_synced_writes_survive_a_power_cut_for_sure() {
        let any = BTreeSet::from([None, Some(0), Some(1)]);
        let sure = BTreeSet::from([Some(1)]);
        assert_eq!(after(Crash::Power, |b| b.write(0, 1, false)), any);
        assert_eq!(after(Crash::Kill, |b| b.write(0, 1, false)), sure);
        assert_eq!(after(Crash::Power, |b| b.write(0, 1, true)), sure);
        let synced = |b: &mut Bench| {
            b.write(0, 1, false);
            let id = b.start_sync();
            assert!(matches!(b.finish(id), Some(Done::Sync(Ok(())))));
        };
        assert_eq!(after(Crash::Power, synced), sure);
        let in_flight = |b: &mut Bench| {
            b.start_write(0, 1, true);
        };
        assert_eq!(after(Crash::Power, in_flight), any);
        assert_eq!(after(Crash::Kill, in_flight), any);
    }

    #[test]
    fn a_sync_covers_what_completed_before_it_began() {
        let late = |b: &mut Bench| {
            b.write(0, 1, false);
            let sync = b.start_sync();
            b.write(0, 2, false);
            b.finish(sync);
        };
        assert_eq!(after(Crash::Power, late), BTreeSet::from([None, Some(1), Some(2)]));
        let early = |b: &mut Bench| {
            b.write(0, 1, false);
            b.write(0, 2, true);
        };
        assert_eq!(after(Crash::Power, early), BTreeSet::from([Some(2)]), "an old version never comes back");
    }

    #[test]
    fn a_failed_sync_may_lose_any_write_and_reads_show_it() {
        let failed = |b: &mut Bench| {
            b.write(0, 1, false);
            b.disk.faults.sync_ppm = 1_000_000;
            let sync = b.start_sync();
            assert!(matches!(b.finish(sync), Some(Done::Sync(Err(EIO)))));
            b.disk.faults = Faults::default();
            let (seen, again) = (b.byte(0), b.start_sync());
            assert!(matches!(b.finish(again), Some(Done::Sync(Ok(())))));
            b.disk.crash(Crash::Power, &mut b.rng);
            assert_eq!(b.byte(0), seen, "what is seen and then synced stays");
        };
        assert_eq!(after(Crash::Power, failed), BTreeSet::from([Some(0), Some(1)]));
    }

    #[test]
    fn a_read_beside_a_write_sees_any_mix_and_a_crash_ends_both() {
        let mut bench = Bench::new(1);
        bench.disk.preset(0, &[7; BLOCK]);
        let write = bench.start_write(0, 8, false);
        let buf = bench.arena.alloc(BLOCK).unwrap();
        let read = bench.disk.start(ROUTE, Op::Read { file: FILE, offset: 0, buf }, &mut bench.rng).0;
        let Some(Done::Read { buf, result: Ok(()) }) = bench.finish(read) else { panic!("read") };
        assert!(buf.contains(&7) && buf.contains(&8) && !buf.contains(&0));
        bench.crash(Crash::Power);
        assert!(bench.finish(write).is_none());
        bench.disk.rot(5, 1 << 1);
        assert_eq!(bench.byte(0), None);
        assert_eq!(bench.disk.len(), 1 << 20);
    }

    #[test]
    #[should_panic(expected = "O_DIRECT memory")]
    fn unaligned_memory_is_refused() {
        let mut bench = Bench::new(1);
        let bufs = [Bytes::from(vec![0; 2 * BLOCK]).slice(8..8 + BLOCK)].into_iter().collect();
        bench.disk.start(ROUTE, Op::Write { file: FILE, offset: 0, bufs, dsync: false }, &mut bench.rng);
    }
}
