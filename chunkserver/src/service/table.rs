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

/// CopysetService, ChunkServerService, ScanService.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Copyset {
    Create,
    CreateMany,
    DeleteBroken,
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

const _: () = assert!(OFFERED.len() <= METHODS_MAX, "every method has its metrics");

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
