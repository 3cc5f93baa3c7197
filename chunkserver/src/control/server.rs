//! The control thread: serves `ctl.sock`, owns the catalog. Runs on tokio-uring; no data passes here.

use super::ctl::{Answer, Command, LINE_BYTES_MAX};
use super::local::LocalExecutor;
use super::nebd;
use super::shards::{Links, NoAnswer, Shards};
use crate::shard::request::{AdminOp, ChunkOp, CopysetStatus, Outcome, PeerView, Reply, ReplyData, RequestOp};
use crate::volume::catalog::{CatalogStore, NewVolume, SHARED_IDS};
use crate::volume::map::Shape;
use crate::volume::{Homes, Volume};
use copyset::PeerId;
use raftlog::CopysetId;
use serde_json::{Value, json};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::oneshot;

/// Chunk deletions in flight when a volume is deleted.
const DELETES_AT_ONCE: usize = 64;
/// Attempts at a deletion that is not done for a passing reason.
const DELETE_ATTEMPTS: u32 = 100;

/// State of a replica in the trash; never on the wire.
const STATE_TRASH: u32 = 100;

/// Changes the log filter of the process.
pub type SetLog = Box<dyn Fn(&str) -> Result<(), String> + Send>;

/// An order to hand over to a new process.
#[derive(Debug)]
pub struct Upgrade {
    /// Program; `None` = the path this one was started from.
    pub binary: Option<PathBuf>,
    /// How long the new one may take from when it has everything until it can serve.
    pub timeout: Duration,
    /// Where the outcome goes.
    pub answer: oneshot::Sender<Upgraded>,
}

/// How a hand-over ended.
#[derive(Debug)]
pub struct Upgraded {
    /// What happened; or why nothing did.
    pub result: Result<Value, String>,
    /// Dropped when whoever asked has been told: before that the process must not end.
    pub told: Told,
}

type Told = std::sync::mpsc::Sender<()>;

/// Passes an order on; false when nobody takes it.
pub type SetUpgrade = Box<dyn Fn(Upgrade) -> bool + Send>;

/// What the control thread needs.
pub struct Setup {
    /// Path of `ctl.sock`.
    pub socket: PathBuf,
    /// The shards.
    pub links: Links,
    /// The volumes.
    pub catalog: CatalogStore,
    /// Own peer id.
    pub peer: u64,
    /// Bytes of a chunk.
    pub chunk_size: u32,
    /// Facts for `status` that never change.
    pub about: Value,
    /// See [`SetLog`].
    pub set_log: SetLog,
    /// NEBD's worker, if it is served.
    pub nebd: Option<nebd::Setup>,
    /// See [`SetUpgrade`].
    pub upgrade: SetUpgrade,
}

impl std::fmt::Debug for Setup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Setup").field("socket", &self.socket).finish_non_exhaustive()
    }
}

struct Server {
    shards: Shards,
    catalog: Rc<RefCell<CatalogStore>>,
    peer: u64,
    chunk_size: u32,
    about: Value,
    set_log: SetLog,
    upgrade: SetUpgrade,
}

/// Serve until the process ends. Call on a thread of its own.
///
/// # Errors
/// When the socket cannot be made.
pub fn run(setup: Setup) -> std::io::Result<()> {
    let Setup { socket, links, catalog, peer, chunk_size, about, set_log, nebd, upgrade } = setup;
    tokio_uring::start(async move {
        let catalog = Rc::new(RefCell::new(catalog));
        let with_nebd = nebd.is_some();
        if let Some(setup) = nebd {
            nebd::spawn(setup, Rc::new(LocalExecutor::new(Rc::clone(&catalog))));
        }
        let listener = match bind(&socket) {
            Err(error) if with_nebd => {
                tracing::error!(%error, "the command socket is not served");
                return std::future::pending().await; // clients' files still need their worker
            }
            other => other?,
        };
        let server = Rc::new(Server { shards: Shards::new(links), catalog, peer, chunk_size, about, set_log, upgrade });
        let resume = Rc::clone(&server);
        tokio_uring::spawn(async move { resume.finish_deletions().await });
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let server = Rc::clone(&server);
                    tokio_uring::spawn(async move {
                        if let Err(error) = server.converse(stream).await {
                            tracing::debug!(%error, "a command's connection ended");
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "accept on the command socket failed");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    })
}

/// A stale socket file of a dead server is replaced: the lock on the disk, or without one on the catalog, says that no
/// other server lives, or the one that hands over serves no more. The socket is tokio's: tokio-uring sets SO_REUSEPORT on
/// Unix sockets, which kernels from 6.12 on refuse.
fn bind(path: &Path) -> std::io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    Ok(listener)
}

impl Server {
    async fn converse(&self, mut stream: UnixStream) -> std::io::Result<()> {
        let mut line = Vec::new();
        let mut buf = vec![0; 4096];
        loop {
            let count = stream.read(&mut buf).await?;
            if count == 0 {
                return Ok(());
            }
            line.extend_from_slice(buf.get(..count).unwrap_or_default());
            while let Some(end) = line.iter().position(|&b| b == b'\n') {
                let rest = line.split_off(end + 1);
                let (answer, told) = match serde_json::from_slice(&line) {
                    Ok(command) => self.answer(command).await,
                    Err(error) => (Answer::Error(format!("not a command: {error}")), None),
                };
                line = rest;
                let mut text = serde_json::to_vec(&answer)?;
                text.push(b'\n');
                let written = stream.write_all(&text).await;
                drop(told);
                written?;
            }
            if line.len() > LINE_BYTES_MAX {
                return Ok(());
            }
        }
    }

    /// The answer to a command, and what is to be dropped when it has been told.
    async fn answer(&self, command: Command) -> (Answer, Option<Told>) {
        let mut telling = None;
        let result = self.execute(command, &mut telling).await;
        (result.map_or_else(Answer::Error, Answer::Ok), telling)
    }

    async fn execute(&self, command: Command, telling: &mut Option<Told>) -> Result<Value, String> {
        match command {
            Command::VolumeCreate { name, size, copysets, peers, id, chunk_size, stripe_unit, stripe_count } => {
                let (copysets, homes) = self.known_copysets(&copysets, &peers).await?;
                let chunk_size = chunk_size.unwrap_or(self.chunk_size);
                let shape = Shape { size, chunk_size, stripe_unit, stripe_count };
                let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
                let id = id.or_else(|| (!homes.is_empty()).then(drawn_id));
                let new = NewVolume { name, id, shape, copysets, homes, created };
                let volume = self.catalog.borrow_mut().create(new).map_err(|e| e.to_string())?;
                Ok(volume_json(&volume))
            }
            Command::VolumeList => {
                let catalog = self.catalog.borrow().catalog();
                Ok(catalog.volumes().map(|v| volume_json(v)).collect())
            }
            Command::VolumeDelete { name } => {
                let volume = self.catalog.borrow_mut().delete(&name).map_err(|e| e.to_string())?;
                self.finish_deletion(&volume).await?;
                Ok(json!({ "deleted": name }))
            }
            Command::VolumeResize { name, size } => {
                let volume = self.catalog.borrow_mut().resize(&name, size).map_err(|e| e.to_string())?;
                Ok(volume_json(&volume))
            }
            Command::CopysetCreate { pool, first, count } => self.create_copysets(pool, first, count).await,
            Command::CopysetList => {
                let trash = self.listed(&AdminOp::ListTrash).await?;
                let trash = trash.into_iter().map(|copyset| CopysetStatus { state: STATE_TRASH, ..copyset });
                let mut all: Vec<CopysetStatus> = self.copysets().await?.into_iter().chain(trash).collect();
                all.sort_by_key(|copyset| copyset.id);
                Ok(all.iter().map(copyset_json).collect())
            }
            Command::CopysetStatus { pool, copyset } => {
                let id = CopysetId::new(pool, copyset);
                let reply = self.shards.ask_copyset(id, RequestOp::Admin(AdminOp::CopysetStatus)).await;
                match success(reply)?.data {
                    ReplyData::Copysets(all) => all.first().map(copyset_json).ok_or_else(|| "no status".into()),
                    _ => Err("the shard answered something else".into()),
                }
            }
            Command::CopysetDelete { pool, copyset } => {
                let id = CopysetId::new(pool, copyset);
                if let Some(volume) = self.user_of(id) {
                    return Err(format!("volume {volume:?} uses this copyset"));
                }
                success(self.shards.ask_copyset(id, RequestOp::Admin(AdminOp::DeleteCopyset)).await)?;
                Ok(json!({ "deleted": [pool, copyset] }))
            }
            Command::CopysetRestore { pool, copyset } => {
                let id = CopysetId::new(pool, copyset);
                let reply = self.shards.ask_copyset(id, RequestOp::Admin(AdminOp::RestoreCopyset)).await;
                match reply {
                    Ok(Reply { outcome: Outcome::Exists, .. }) => Err("it is not in the trash".into()),
                    Ok(Reply { outcome: Outcome::Busy, .. }) => {
                        Err("it is on its way into the trash or out of it".into())
                    }
                    other => success(other).map(|_| json!({ "restored": [pool, copyset] })),
                }
            }
            Command::Status => self.status().await,
            Command::Upgrade { binary, timeout_ms } => {
                let (answer, outcome) = oneshot::channel();
                let order = Upgrade { binary, timeout: Duration::from_millis(timeout_ms), answer };
                if !(self.upgrade)(order) {
                    return Err("the server is stopping".into());
                }
                let Upgraded { result, told } = outcome.await.map_err(|_| "the server is stopping".to_owned())?;
                *telling = Some(told);
                result
            }
            Command::LogLevel { filter } => (self.set_log)(&filter).map(|()| json!({ "log": filter })),
        }
    }

    fn user_of(&self, id: CopysetId) -> Option<String> {
        let catalog = self.catalog.borrow().catalog();
        let mut all = catalog.volumes().chain(catalog.deleting());
        all.find(|v| v.geometry().copysets().contains(&id)).map(|v| v.name().to_owned())
    }

    async fn copysets(&self) -> Result<Vec<CopysetStatus>, String> {
        self.listed(&AdminOp::ListCopysets).await
    }

    async fn listed(&self, op: &AdminOp) -> Result<Vec<CopysetStatus>, String> {
        let mut all = Vec::new();
        for reply in self.shards.ask_all(op).await.map_err(|e| e.to_string())? {
            if let ReplyData::Copysets(some) = success(Ok(reply))?.data {
                all.extend(some);
            }
        }
        all.sort_by_key(|c| c.id);
        Ok(all)
    }

    /// The copysets asked for, if all exist; all there are when none is named. And where they are. With `peers` they are
    /// taken to be there.
    async fn known_copysets(&self, wanted: &[(u32, u32)], peers: &[String]) -> Result<(Vec<CopysetId>, Homes), String> {
        let ids: Vec<CopysetId> = wanted.iter().map(|&(pool, id)| CopysetId::new(pool, id)).collect();
        if !peers.is_empty() {
            let peers: Result<Vec<u64>, _> =
                peers.iter().map(|peer| peer.parse::<PeerId>().map(|peer| peer.0)).collect();
            let peers = peers.map_err(|e| e.to_string())?;
            let homes = ids.iter().map(|&id| (id, peers.clone())).collect();
            return Ok((ids, homes));
        }
        let here: BTreeMap<CopysetId, Vec<u64>> =
            self.copysets().await?.into_iter().map(|c| (CopysetId(c.id), c.peers)).collect();
        if let Some(id) = ids.iter().find(|id| !here.contains_key(id)) {
            return Err(format!("there is no copyset {}:{}; name its servers (--peers)", id.pool(), id.copyset()));
        }
        let ids: Vec<CopysetId> = if wanted.is_empty() { here.keys().copied().collect() } else { ids };
        if ids.is_empty() {
            return Err("create copysets first".into());
        }
        // A copyset that is here alone needs no description.
        let homes = here.into_iter().filter(|(id, peers)| ids.contains(id) && peers.iter().any(|&p| p != self.peer));
        let homes = homes.collect();
        Ok((ids, homes))
    }

    async fn create_copysets(&self, pool: u32, first: u32, count: u32) -> Result<Value, String> {
        let last = first.checked_add(count).ok_or("copyset ids end at 4294967295")?;
        let mut created = Vec::new();
        for copyset in first..last {
            let op = RequestOp::Admin(AdminOp::CreateCopyset { peers: vec![self.peer] });
            let reply = self.shards.ask_copyset(CopysetId::new(pool, copyset), op).await;
            success(reply).map_err(|e| format!("copyset {pool}:{copyset}: {e} ({} created before)", created.len()))?;
            created.push(json!([pool, copyset]));
        }
        Ok(json!({ "created": created }))
    }

    async fn status(&self) -> Result<Value, String> {
        let (mut shards, mut slots_unclaimed, mut peers) = (Vec::new(), 0, BTreeMap::new());
        for reply in self.shards.ask_all(&AdminOp::ShardStatus).await.map_err(|e| e.to_string())? {
            if let ReplyData::Shard(s) = reply.data {
                slots_unclaimed = s.slots_unclaimed;
                s.peers.iter().for_each(|view| add_peer(&mut peers, view));
                shards.push(json!({
                    "shard": s.shard, "copysets": s.copysets, "leaders": s.leaders, "chunks": s.chunks, "trashed": s.trashed,
                    "slots_free": s.slots_free, "dirty_bytes": s.dirty_bytes, "log_used_bytes": s.log_used_bytes,
                    "log_bytes": s.log_bytes, "buffers_free_bytes": s.buffers_free_bytes, "failed": s.failed,
                }));
            } else {
                shards.push(json!({ "state": format!("{:?}", reply.outcome) }));
            }
        }
        let catalog = self.catalog.borrow().catalog();
        let mut status = self.about.clone();
        status["shards"] = shards.into();
        status["slots_unclaimed"] = slots_unclaimed.into();
        let peer = |(peer, view): (u64, PeerView)| {
            let peer = PeerId(peer).to_string();
            let state = if view.up == view.links { "up" } else { "down" };
            json!({ "peer": peer, "state": state, "up": view.up, "links": view.links, "rtt_us": view.rtt_ns / 1000, "why": view.why })
        };
        status["peers"] = peers.into_iter().map(peer).collect();
        status["volumes"] = catalog.volumes().len().into();
        Ok(status)
    }

    /// Deletions that a restart interrupted.
    async fn finish_deletions(&self) {
        let volumes: Vec<Arc<Volume>> = self.catalog.borrow().catalog().deleting().cloned().collect();
        for volume in volumes {
            if let Err(error) = self.finish_deletion(&volume).await {
                tracing::warn!(
                    volume = volume.name(),
                    error,
                    "chunks of a deleted volume remain; the next start tries again"
                );
            }
        }
    }

    async fn finish_deletion(&self, volume: &Volume) -> Result<(), String> {
        let chunks: Vec<_> = volume.geometry().chunks().collect();
        for some in chunks.chunks(DELETES_AT_ONCE) {
            let mut tasks = Vec::with_capacity(some.len());
            for &(copyset, chunk) in some {
                let (shards, sn, homes) = (self.shards.clone(), volume.sn(), volume.homes(copyset).to_vec());
                tasks.push(tokio_uring::spawn(async move { delete_chunk(&shards, copyset, &homes, chunk, sn).await }));
            }
            for task in tasks {
                task.await.map_err(|e| e.to_string())??;
            }
        }
        self.catalog.borrow_mut().forget(volume.id()).map_err(|e| e.to_string())
    }
}

async fn delete_chunk(shards: &Shards, copyset: CopysetId, homes: &[u64], chunk: u64, sn: u64) -> Result<(), String> {
    for _ in 0..DELETE_ATTEMPTS {
        let reply = shards.errand(copyset, homes, chunk, ChunkOp::Delete { sn }).await.map_err(|e| e.to_string())?;
        match reply.outcome {
            Outcome::Success | Outcome::NoChunk | Outcome::NoCopyset => return Ok(()),
            Outcome::NotLeader | Outcome::Overload => tokio::time::sleep(Duration::from_millis(20)).await,
            other => return Err(format!("deleting chunk {chunk}: {other:?}")),
        }
    }
    Err(format!("deleting chunk {chunk}: its copyset has no leader"))
}

/// What all shards see of a peer.
fn add_peer(peers: &mut BTreeMap<u64, PeerView>, view: &PeerView) {
    let all = peers.entry(view.peer).or_default();
    all.up += view.up;
    all.links += view.links;
    all.rtt_ns = all.rtt_ns.max(view.rtt_ns);
    all.why = all.why.take().or_else(|| view.why.clone());
}

/// An id that no other catalog has, as far as chance goes.
fn drawn_id() -> u32 {
    let mut drawn = [0; 4];
    let _ = rustix::rand::getrandom(&mut drawn, rustix::rand::GetRandomFlags::empty());
    u32::from_le_bytes(drawn) | SHARED_IDS
}

fn success(reply: Result<Reply, NoAnswer>) -> Result<Reply, String> {
    let reply = reply.map_err(|e| e.to_string())?;
    match reply.outcome {
        Outcome::Success => Ok(reply),
        Outcome::NoCopyset => Err("there is no such copyset".into()),
        Outcome::Exists => Err("it exists already".into()),
        other => Err(format!("{other:?}")),
    }
}

fn volume_json(volume: &Volume) -> Value {
    let shape = volume.geometry().shape();
    let servers: BTreeSet<u64> = volume.all_homes().copied().collect();
    let servers: Vec<String> = servers.into_iter().map(|peer| PeerId(peer).to_string()).collect();
    json!({
        "id": volume.id(), "name": volume.name(), "size": volume.size(), "chunk_size": shape.chunk_size,
        "stripe_unit": shape.stripe_unit, "stripe_count": shape.stripe_count, "sn": volume.sn(),
        "created": volume.created(), "servers": servers,
        "copysets": volume.geometry().copysets().iter().map(|c| json!([c.pool(), c.copyset()])).collect::<Vec<_>>(),
    })
}

fn copyset_json(c: &CopysetStatus) -> Value {
    let id = CopysetId(c.id);
    let state = match c.state {
        1 => "leader",
        3 => "candidate",
        4 => "follower",
        5 => "error",
        STATE_TRASH => "trash",
        _ => "passive",
    };
    json!({
        "pool": id.pool(), "copyset": id.copyset(), "state": state, "leader": PeerId(c.leader).to_string(),
        "peers": c.peers.iter().map(|&p| PeerId(p).to_string()).collect::<Vec<_>>(), "term": c.term,
        "committed": c.committed, "applied": c.applied, "first": c.first, "last": c.last, "durable": c.durable,
        "epoch": c.epoch, "chunks": c.chunks, "changing": c.changing,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copyset_out_of_service_says_so() {
        let state = |state| copyset_json(&CopysetStatus { state, ..CopysetStatus::default() })["state"].clone();
        assert_eq!([1, 4, 5, 6].map(state), ["leader", "follower", "error", "passive"]);
    }
}
