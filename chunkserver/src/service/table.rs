//! Which methods are offered, under which names, and who serves them.
//!
//! A [`MethodId`] is a place in [`OFFERED`]; it also indexes the method's metrics. Tested against the schema: every
//! method of an offered service has its line.

use crate::metrics::METHODS_MAX;
use crate::rpc::{MethodId, Route};
use proto::code;

/// A method, by who serves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Method {
    Chunk(Chunk),
    Copyset(Copyset),
    Cli(Cli),
    /// braft's builtin page as an RPC.
    RaftStat,
}

/// ChunkService and the private ZeroService.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Chunk {
    Read,
    Write,
    Delete,
    Zero,
    ReadSnapshot,
    DeleteSnapshot,
    Info,
    Hash,
    CreateClone,
    CreateS3Clone,
    Recover,
    UpdateEpoch,
}

/// CopysetService, ChunkServerService, ScanService and the private ReplicaService.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Copyset {
    Create,
    CreateMany,
    DeleteBroken,
    Delete,
    Status,
    ServerStatus,
    FollowScanMap,
}

/// CliService2 and CliService.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cli {
    GetLeader,
    GetLeaderV1,
    AddPeer,
    RemovePeer,
    ChangePeers,
    TransferLeader,
    ResetPeer,
    Snapshot,
    SnapshotAll,
    AddPeerV1,
    RemovePeerV1,
    ChangePeersV1,
    TransferLeaderV1,
    ResetPeerV1,
    SnapshotV1,
}

/// A line of the table.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) service: &'static str,
    pub(super) method: &'static str,
    pub(super) serve: Method,
}

const CHUNK: &str = "curve.chunkserver.ChunkService";
const ZERO: &str = "chunkserver.internal.ZeroService";
const COPYSET: &str = "curve.chunkserver.CopysetService";
const SERVER: &str = "curve.chunkserver.ChunkServerService";
const REPLICA: &str = "chunkserver.internal.ReplicaService";
const SCAN: &str = "curve.chunkserver.ScanService";
const CLI2: &str = "curve.chunkserver.CliService2";
const CLI1: &str = "curve.chunkserver.CliService";
/// Not in the schema: its messages are empty.
pub(super) const RAFT_STAT: &str = "braft.raft_stat";

macro_rules! offered {
    ($($service:ident { $($name:literal => $serve:expr,)* })*) => {
        /// All methods; those of the data path first. Lines of one service stand together.
        pub(super) const OFFERED: &[Line] =
            &[$($(Line { service: $service, method: $name, serve: $serve },)*)*];
    };
}

offered! {
    CHUNK {
        "WriteChunk" => Method::Chunk(Chunk::Write),
        "ReadChunk" => Method::Chunk(Chunk::Read),
        "DeleteChunk" => Method::Chunk(Chunk::Delete),
        "ReadChunkSnapshot" => Method::Chunk(Chunk::ReadSnapshot),
        "DeleteChunkSnapshotOrCorrectSn" => Method::Chunk(Chunk::DeleteSnapshot),
        "GetChunkInfo" => Method::Chunk(Chunk::Info),
        "GetChunkHash" => Method::Chunk(Chunk::Hash),
        "CreateCloneChunk" => Method::Chunk(Chunk::CreateClone),
        "CreateS3CloneChunk" => Method::Chunk(Chunk::CreateS3Clone),
        "RecoverChunk" => Method::Chunk(Chunk::Recover),
        "UpdateEpoch" => Method::Chunk(Chunk::UpdateEpoch),
    }
    ZERO {
        "Zero" => Method::Chunk(Chunk::Zero),
    }
    COPYSET {
        "CreateCopysetNode" => Method::Copyset(Copyset::Create),
        "CreateCopysetNode2" => Method::Copyset(Copyset::CreateMany),
        "DeleteBrokenCopyset" => Method::Copyset(Copyset::DeleteBroken),
        "GetCopysetStatus" => Method::Copyset(Copyset::Status),
    }
    REPLICA {
        "Delete" => Method::Copyset(Copyset::Delete),
    }
    SERVER {
        "ChunkServerStatus" => Method::Copyset(Copyset::ServerStatus),
    }
    SCAN {
        "FollowScanMap" => Method::Copyset(Copyset::FollowScanMap),
    }
    CLI2 {
        "GetLeader" => Method::Cli(Cli::GetLeader),
        "AddPeer" => Method::Cli(Cli::AddPeer),
        "RemovePeer" => Method::Cli(Cli::RemovePeer),
        "ChangePeers" => Method::Cli(Cli::ChangePeers),
        "TransferLeader" => Method::Cli(Cli::TransferLeader),
        "ResetPeer" => Method::Cli(Cli::ResetPeer),
        "Snapshot" => Method::Cli(Cli::Snapshot),
        "SnapshotAll" => Method::Cli(Cli::SnapshotAll),
    }
    CLI1 {
        "get_leader" => Method::Cli(Cli::GetLeaderV1),
        "add_peer" => Method::Cli(Cli::AddPeerV1),
        "remove_peer" => Method::Cli(Cli::RemovePeerV1),
        "change_peers" => Method::Cli(Cli::ChangePeersV1),
        "transfer_leader" => Method::Cli(Cli::TransferLeaderV1),
        "reset_peer" => Method::Cli(Cli::ResetPeerV1),
        "snapshot" => Method::Cli(Cli::SnapshotV1),
    }
    RAFT_STAT {
        "default_method" => Method::RaftStat,
    }
}

/// Methods of the NEBD socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "they are named as the calls")]
pub enum NebdMethod {
    Write,
    Read,
    Open,
    Close,
    Discard,
    Resize,
    Flush,
    Info,
    Invalidate,
    KeepAlive,
}

const NEBD_FILE: &str = "nebd.client.NebdFileService";
const NEBD_HEARTBEAT: &str = "nebd.client.NebdHeartbeatService";

/// What the NEBD socket offers; no other does. Their numbers follow those of [`OFFERED`].
pub(super) const NEBD: &[(&str, &str, NebdMethod)] = &[
    (NEBD_FILE, "Write", NebdMethod::Write),
    (NEBD_FILE, "Read", NebdMethod::Read),
    (NEBD_FILE, "OpenFile", NebdMethod::Open),
    (NEBD_FILE, "CloseFile", NebdMethod::Close),
    (NEBD_FILE, "Discard", NebdMethod::Discard),
    (NEBD_FILE, "ResizeFile", NebdMethod::Resize),
    (NEBD_FILE, "Flush", NebdMethod::Flush),
    (NEBD_FILE, "GetInfo", NebdMethod::Info),
    (NEBD_FILE, "InvalidateCache", NebdMethod::Invalidate),
    (NEBD_HEARTBEAT, "KeepAlive", NebdMethod::KeepAlive),
];

const _: () = assert!(OFFERED.len() + NEBD.len() <= METHODS_MAX, "every method has its metrics");

fn short(name: &str) -> &str {
    name.rsplit_once('.').map_or(name, |(_, short)| short)
}

/// Find a method by the names of a call. A service may be named in full or, without a dot, in short.
#[must_use]
pub fn route(service: &[u8], method: &[u8]) -> Route {
    let dotted = service.contains(&b'.');
    let mut known = false;
    for (index, line) in OFFERED.iter().enumerate() {
        let name = if dotted { line.service } else { short(line.service) };
        if name.as_bytes() != service {
            continue;
        }
        known = true;
        if line.method.as_bytes() == method {
            let payload = line.serve == Method::Chunk(Chunk::Write);
            return Route::Method { id: MethodId(index as u16), payload };
        }
    }
    if service == proto::peer::SERVICE.as_bytes() && method == proto::peer::HELLO.as_bytes() {
        return Route::Peer;
    }
    Route::Unknown(if known || dotted { code::ENOMETHOD } else { code::ENOSERVICE })
}

/// The same on the NEBD socket.
#[must_use]
pub fn nebd_route(service: &[u8], method: &[u8]) -> Route {
    let dotted = service.contains(&b'.');
    let named = |full: &str| (if dotted { full } else { short(full) }).as_bytes() == service;
    let mut lines = NEBD.iter().enumerate();
    match lines.find(|(_, line)| named(line.0) && line.1.as_bytes() == method) {
        Some((index, line)) => {
            let id = MethodId((OFFERED.len() + index) as u16);
            Route::Method { id, payload: line.2 == NebdMethod::Write }
        }
        None if dotted || NEBD.iter().any(|line| named(line.0)) => Route::Unknown(code::ENOMETHOD),
        None => Route::Unknown(code::ENOSERVICE),
    }
}

/// Which method of the NEBD socket it is.
#[must_use]
pub fn nebd_method(id: MethodId) -> Option<NebdMethod> {
    let index = usize::from(id.0).checked_sub(OFFERED.len())?;
    NEBD.get(index).map(|line| line.2)
}

/// Number, service and name of the methods to be shown.
pub(super) fn lines(with_nebd: bool) -> impl Iterator<Item = (usize, &'static str, &'static str)> {
    let nebd = NEBD.iter().filter(move |_| with_nebd).map(|line| (line.0, line.1));
    OFFERED.iter().map(|line| (line.service, line.method)).chain(nebd).enumerate().map(|(i, (s, m))| (i, s, m))
}

/// Its service and its name.
#[must_use]
pub fn names(id: MethodId) -> Option<(&'static str, &'static str)> {
    OFFERED.get(usize::from(id.0)).map(|line| (line.service, line.method))
}

/// Who serves it.
pub(super) fn method(id: MethodId) -> Option<Method> {
    OFFERED.get(usize::from(id.0)).map(|line| line.serve)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_method_of_an_offered_service_has_one_line() {
        let lines: BTreeSet<_> = OFFERED.iter().map(|line| (line.service, line.method)).collect();
        assert_eq!(lines.len(), OFFERED.len());
        let offered: BTreeSet<_> = OFFERED.iter().map(|line| line.service).collect();
        let mut schema = BTreeSet::from([(RAFT_STAT, "default_method")]);
        for service in proto::service::SERVICES.iter().filter(|service| offered.contains(service.name)) {
            schema.extend(service.methods.iter().map(|method| (service.name, method.name)));
        }
        assert_eq!(lines, schema);
    }

    #[test]
    fn every_method_of_nebd_has_one_line() {
        let lines: BTreeSet<_> = NEBD.iter().map(|line| (line.0, line.1)).collect();
        let services = proto::service::SERVICES.iter().filter(|service| service.name.starts_with("nebd."));
        let schema: BTreeSet<_> =
            services.flat_map(|service| service.methods.iter().map(|method| (service.name, method.name))).collect();
        assert_eq!((NEBD.len(), lines), (schema.len(), schema));
        for (service, method, kind) in NEBD {
            let Route::Method { id, payload } = nebd_route(service.as_bytes(), method.as_bytes()) else { panic!() };
            assert_eq!((nebd_method(id), payload), (Some(*kind), *method == "Write"));
            assert_eq!(super::method(id), None);
            assert_eq!(nebd_route(short(service).as_bytes(), method.as_bytes()), Route::Method { id, payload });
            assert_eq!(route(service.as_bytes(), method.as_bytes()), Route::Unknown(code::ENOMETHOD));
        }
        for (service, method, code) in [
            ("NebdFileService", "NoSuch", 1002),
            ("nebd.client.NoSuch", "Foo", 1002),
            ("ChunkService", "WriteChunk", 1001),
            ("", "", 1001),
        ] {
            assert_eq!(nebd_route(service.as_bytes(), method.as_bytes()), Route::Unknown(code), "{service}/{method}");
        }
    }

    #[test]
    fn names_are_found_in_full_and_in_short() {
        let write = Route::Method { id: MethodId(0), payload: true };
        assert_eq!(route(b"curve.chunkserver.ChunkService", b"WriteChunk"), write);
        assert_eq!(route(b"ChunkService", b"WriteChunk"), write);
        for (service, method, code) in [
            ("ChunkService", "NoSuch", 1002),
            ("curve.chunkserver.NoSuch", "Foo", 1002),
            ("NoSuch", "Foo", 1001),
            ("", "", 1001),
            ("chunkservice", "WriteChunk", 1001),
            (".ChunkService", "WriteChunk", 1002),
        ] {
            assert_eq!(route(service.as_bytes(), method.as_bytes()), Route::Unknown(code), "{service}/{method}");
        }
    }
}
