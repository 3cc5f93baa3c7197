//! The shipping server as the simulator's system: reactor, RPC, shard, log and recovery, unchanged, on [`SimIo`].
//!
//! Small on purpose: chunks of 256 KiB, log segments of 1 MiB and a pool of few slots, so that segments roll, logs are
//! released, checkpoints are taken and the pool runs full within one seed.

use crate::disk::Disk;
use crate::run::{Program, System};
use crate::world::{Shared as World, SimIo};
use chunkserver::chunk::{ExtentPool, Layout, Params};
use chunkserver::io::buffer::{Arena, BLOCK};
use chunkserver::io::{Address, Io, ListenerId};
use chunkserver::mailbox::mesh;
use chunkserver::metrics::process::ProcessStats;
use chunkserver::metrics::{Counter, ShardMetrics};
use chunkserver::reactor::{Protocol, Reactor, Setup};
use chunkserver::service::{Info, Shared};
use chunkserver::shard::request::CopysetStatus;
use chunkserver::shard::{Arenas, Config, Shard};
use chunkserver::volume::catalog::{Catalog, SharedCatalog};
use copyset::PeerId;
use std::net::Ipv4Addr;
use std::sync::Arc;

pub(crate) const SHARDS: u16 = 2;
const SIZE: u64 = 40 << 20;
const CHUNK: u32 = 256 << 10;
const SEGMENT: u64 = 1 << 20;
const LOG: u64 = 12 * SEGMENT;
const DIRTY: usize = 3 << 20;
const PAYLOAD: usize = 16 << 20;
const WORK: usize = 16 << 20;
const FLUSH_AGE_NS: u64 = 20_000_000;

/// A node's name; its port is where it listens.
pub(crate) fn peer(node: usize) -> PeerId {
    PeerId::new(Ipv4Addr::from_bits(Ipv4Addr::LOCALHOST.to_bits() + node as u32), 8200, 0)
}

/// A node that runs the server.
pub(crate) struct ServerSystem {
    /// Election timeout of copysets with several voters.
    pub(crate) election_ms: u64,
    pub(crate) trash_s: u64,
}

impl Default for ServerSystem {
    fn default() -> Self {
        Self { election_ms: 1_000, trash_s: 0 }
    }
}

impl ServerSystem {
    fn params(&self, node: usize) -> Params {
        let mut uuid = *b"a simulated disk";
        uuid[0] += node as u8;
        Params {
            uuid,
            size: SIZE,
            shards: SHARDS,
            chunk_size: CHUNK,
            log_bytes_per_shard: LOG,
            log_segment_size: SEGMENT,
            flags: 0,
        }
    }
}

impl System for ServerSystem {
    fn shards(&self) -> u16 {
        SHARDS
    }
    fn listeners(&self) -> u32 {
        1
    }
    fn disk_len(&self) -> u64 {
        SIZE
    }
    fn peer(&self) -> String {
        peer(0).to_string()
    }
    fn format(&self, node: usize, disk: &mut Disk) {
        let layout = Layout::new(&self.params(node)).expect("the sizes above fit");
        (0..2).for_each(|copy| disk.preset(copy * BLOCK as u64, &layout.encode()));
    }

    fn boot(&self, world: &World, node: usize, life: u64) -> Vec<Box<dyn Program>> {
        let layout = {
            let world = world.borrow();
            let disk = &world.nodes[node].disk;
            Layout::decode(disk.peek(0, 2 * BLOCK), disk.len()).expect("nobody writes the superblock")
        };
        let me = peer(node);
        world.borrow_mut().net.publish(Address::Tcp(me.ip(), me.port()), node, ListenerId(0));
        let info = Info {
            peer: me,
            chunk_size: CHUNK,
            max_inflight: 5_000,
            version: "sim".into(),
            config: Vec::new(),
            process: ProcessStats::default,
        };
        let shared = Shared::new(info, usize::from(SHARDS));
        let arenas = |size| -> Vec<Arc<Arena>> { (0..SHARDS).map(|_| Arena::new(size).expect("memory")).collect() };
        let (payload, work, extents) = (arenas(PAYLOAD), arenas(WORK), ExtentPool::new(&layout));
        let mut programs: Vec<Box<dyn Program>> = Vec::new();
        for (number, mailbox) in (0..SHARDS).zip(mesh(SHARDS)) {
            let n = usize::from(number);
            let io = SimIo::new(world, node, number, life);
            let config = Config {
                shard: number,
                peer: me.0,
                dirty_limit: DIRTY,
                flush_age_ns: FLUSH_AGE_NS,
                election_ms: self.election_ms,
                snapshot_rate: 0,
                trash_s: self.trash_s,
                wall_s: 0,
                seed: world.borrow_mut().rng.next(),
            };
            let arenas =
                Arenas { payload: Arc::clone(&payload[n]), work: Arc::clone(&work[n]), all_payload: payload.clone() };
            let metrics = Arc::clone(shared.registry().shard(n).expect("as many as shards"));
            let counts = Arc::clone(&metrics);
            let shard = Shard::new(config, layout.clone(), arenas.clone(), Arc::clone(&extents), metrics, io.now());
            let shard = shard.expect("the sizes above suit a shard");
            let setup = Setup {
                listeners: if number == 0 { vec![(ListenerId(0), Protocol::Rpc)] } else { Vec::new() },
                shared: Arc::clone(&shared),
                catalog: SharedCatalog::new(Catalog::of([])),
                nebd: None,
                mailbox,
                control: None,
                arenas,
                shards: layout.shards,
                chunk_size: layout.chunk_size,
                disk: layout.uuid,
                cluster: [0; 16],
                seed: u64::from(number),
            };
            programs.push(Box::new(Server(Reactor::new(io, number, shard, setup), counts)));
        }
        programs
    }
}

struct Server(Reactor<SimIo>, Arc<ShardMetrics>);

impl Server {
    fn shard(&self) -> &Shard {
        self.0.shard().expect("simulated nodes have disks")
    }
}

impl Program for Server {
    fn turn(&mut self) -> Option<String> {
        self.0.turn();
        self.0.finished().then(|| self.0.failure().map_or_else(|| "stopped".into(), ToString::to_string))
    }
    fn led(&self, see: &mut dyn FnMut(u64, u64, Option<u64>)) {
        self.shard().led().for_each(|(id, term, epoch)| see(id.0, term, epoch));
    }
    fn count(&self, counter: Counter) -> u64 {
        self.1.value(counter)
    }
    fn status(&self) -> String {
        let s = self.shard().status();
        format!(
            "\n      shard {}: {} chunks, slots {} spare and {} unclaimed, log {} of {}, dirty {}, serving {}",
            s.shard,
            s.chunks,
            s.slots_free,
            s.slots_unclaimed,
            s.log_used_bytes,
            s.log_bytes,
            s.dirty_bytes,
            self.0.serving()
        )
    }
    fn copysets(&self) -> Vec<CopysetStatus> {
        self.shard().copyset_statuses().collect()
    }
}
