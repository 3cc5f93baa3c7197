//! Copyset commands to any node, through the public RPCs: what Curve's own tools use.
//!
//! Blocking and without retries but for one: a change goes to the leader, and when the node asked says that another one
//! leads now, it goes there.

use bytes::BytesMut;
use copyset::PeerId;
use prost::Message;
use proto::Checked;
use proto::chunkserver as wire;
use proto::code::CopysetOpStatus;
use proto::common::Peer;
use proto::frame::{Decoder, FrameError, RequestHead, Step, put_request};
use raftlog::CopysetId;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{SocketAddr, SocketAddrV4, TcpStream};
use std::time::Duration;

/// A change of members may have to wait for data to be copied, a snapshot for a write-back.
const WORK: Duration = Duration::from_secs(3600);
/// All else is answered from memory, or by deleting files.
const ANSWER: Duration = Duration::from_secs(30);
const CONNECT: Duration = Duration::from_secs(5);
/// Leaders asked one after the other.
const LEADERS_MAX: u32 = 3;

const COPYSET: &str = "curve.chunkserver.CopysetService";
const REPLICA: &str = "chunkserver.internal.ReplicaService";
const CLI: &str = "curve.chunkserver.CliService2";

/// Why a command is not done.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// No connection, or it broke.
    #[error("{0}: {1}")]
    Socket(SocketAddr, #[source] std::io::Error),
    /// Not brpc.
    #[error("{0} does not speak our protocol: {1}")]
    Frame(SocketAddr, #[source] FrameError),
    /// An answer that is none.
    #[error("{0} answers what is not understood")]
    Answer(SocketAddr),
    /// The node says no.
    #[error("{text} (error {code})")]
    Refused {
        /// brpc's or a system error number.
        code: i32,
        /// Why.
        text: String,
    },
    /// A status that says no.
    #[error("{0}: {1}")]
    Status(SocketAddr, String),
}

/// Ask one node, which may take so long.
fn call<A: Checked>(
    to: SocketAddr,
    patience: Duration,
    service: &str,
    method: &str,
    ask: &impl Message,
) -> Result<A, RemoteError> {
    let socket = |e| RemoteError::Socket(to, e);
    let mut stream = TcpStream::connect_timeout(&to, CONNECT).map_err(socket)?;
    stream.set_read_timeout(Some(patience)).map_err(socket)?;
    stream.set_write_timeout(Some(ANSWER)).map_err(socket)?;
    let mut out = BytesMut::new();
    put_request(&mut out, &RequestHead { service, method, log_id: None, correlation_id: 1 }, ask, 0);
    stream.write_all(&out).map_err(socket)?;
    let (mut decoder, mut buf) = (Decoder::new(), vec![0; 64 << 10]);
    loop {
        let count = stream.read(&mut buf).map_err(socket)?;
        if count == 0 {
            return Err(RemoteError::Socket(to, std::io::ErrorKind::UnexpectedEof.into()));
        }
        let mut input = buf.get(..count).unwrap_or_default();
        match decoder.step(&mut input).map_err(|e| RemoteError::Frame(to, e))? {
            Step::NeedMore => {}
            Step::Head(head) if head.meta.error_code() != 0 => {
                let text = head.meta.response.as_ref().map(|r| String::from_utf8_lossy(&r.error_text).into_owned());
                return Err(RemoteError::Refused { code: head.meta.error_code(), text: text.unwrap_or_default() });
            }
            Step::Head(head) => return proto::decode(head.body).map_err(|_| RemoteError::Answer(to)),
            Step::Reject(_) | Step::Http(_) => return Err(RemoteError::Answer(to)),
        }
    }
}

fn address(peer: PeerId) -> SocketAddr {
    SocketAddrV4::new(peer.ip(), peer.port()).into()
}

fn named(peer: PeerId) -> Peer {
    Peer { id: None, address: Some(peer.to_string()) }
}

/// The status, which the schema does not demand: without one it would read as success.
fn said(at: SocketAddr, answer: &wire::CopysetResponse) -> Result<CopysetOpStatus, RemoteError> {
    answer.status.map(|_| answer.status()).ok_or(RemoteError::Answer(at))
}

fn names(peers: &[Peer]) -> Vec<&str> {
    peers.iter().map(Peer::address).collect()
}

/// Create copysets on all of these nodes, as their members.
///
/// # Errors
/// [`RemoteError`]; what was created before stays. A copyset that exists on a node already is no error.
pub fn create(peers: &[PeerId], pool: u32, first: u32, count: u32) -> Result<Value, RemoteError> {
    create_on(peers, peers, pool, first, count)
}

fn create_on(on: &[PeerId], members: &[PeerId], pool: u32, first: u32, count: u32) -> Result<Value, RemoteError> {
    let ids: Vec<u32> = (first..first.saturating_add(count)).collect();
    let peerid: Vec<String> = members.iter().map(ToString::to_string).collect();
    for &peer in on {
        for &copyset_id in &ids {
            let ask = wire::CopysetRequest { logic_pool_id: pool, copyset_id, peerid: peerid.clone() };
            let answer: wire::CopysetResponse = call(address(peer), ANSWER, COPYSET, "CreateCopysetNode", &ask)?;
            let status = said(address(peer), &answer)?;
            if !matches!(status, CopysetOpStatus::Success | CopysetOpStatus::Exist) {
                return Err(RemoteError::Status(address(peer), format!("{pool}:{copyset_id}: {status:?}")));
            }
        }
    }
    Ok(json!({ "created": ids.iter().map(|id| json!([pool, id])).collect::<Vec<_>>(), "peers": peerid }))
}

/// Create replicas without members on these nodes: each waits until it is made one.
///
/// # Errors
/// [`RemoteError`]; what was created before stays. A copyset that exists on a node already is no error.
pub fn create_empty(on: &[PeerId], pool: u32, first: u32, count: u32) -> Result<Value, RemoteError> {
    create_on(on, &[], pool, first, count)
}

/// Take a node's replica of a copyset away, with its data.
///
/// # Errors
/// [`RemoteError`].
pub fn delete(at: SocketAddr, id: CopysetId) -> Result<Value, RemoteError> {
    let (logic_pool_id, copyset_id) = (id.pool(), id.copyset());
    let ask = wire::CopysetRequest { logic_pool_id, copyset_id, peerid: Vec::new() };
    let answer: wire::CopysetResponse = call(at, ANSWER, REPLICA, "Delete", &ask)?;
    match said(at, &answer)? {
        CopysetOpStatus::Success => Ok(json!({ "deleted": [logic_pool_id, copyset_id], "node": at.to_string() })),
        status => Err(RemoteError::Status(at, format!("{logic_pool_id}:{copyset_id}: {status:?}"))),
    }
}

/// State of a copyset on one node.
///
/// # Errors
/// [`RemoteError`].
pub fn status(at: SocketAddr, id: CopysetId) -> Result<Value, RemoteError> {
    let (logic_pool_id, copyset_id) = (id.pool(), id.copyset());
    let peer = Peer { id: None, address: Some(format!("{at}:0")) };
    let ask =
        wire::CopysetStatusRequest { logic_pool_id, copyset_id, peer, query_hash: false, want_members: Some(true) };
    let answer: wire::CopysetStatusResponse = call(at, ANSWER, COPYSET, "GetCopysetStatus", &ask)?;
    if answer.status() != CopysetOpStatus::Success {
        return Err(RemoteError::Status(at, format!("{logic_pool_id}:{copyset_id}: {:?}", answer.status())));
    }
    let state = match answer.state() {
        1 => "leader",
        2 => "transferring",
        3 => "candidate",
        4 => "follower",
        5 => "error",
        _ => "passive",
    };
    let name = |peer: &Option<Peer>| peer.as_ref().map(|peer| peer.address().to_owned());
    Ok(json!({
        "pool": logic_pool_id, "copyset": copyset_id, "state": state, "peer": name(&answer.peer),
        "leader": name(&answer.leader), "term": answer.term(), "committed": answer.committed_index(),
        "applied": answer.known_applied_index(), "first": answer.first_index(), "last": answer.last_index(),
        "durable": answer.disk_index(), "epoch": answer.epoch(), "peers": names(&answer.members), "chunks": answer.chunks,
    }))
}

/// What is to be changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A member more.
    Add(PeerId),
    /// One less.
    Remove(PeerId),
    /// These members.
    Set(Vec<PeerId>),
    /// Another leader; nobody = whoever is furthest.
    Transfer(PeerId),
}

/// Change a copyset's members or leader. Any of its nodes will do; the leader is asked.
///
/// # Errors
/// [`RemoteError`].
pub fn change(at: SocketAddr, id: CopysetId, change: &Change) -> Result<Value, RemoteError> {
    let mut left = LEADERS_MAX;
    loop {
        left -= 1;
        let leader = leader(at, id)?;
        match change_at(leader, id, change) {
            Err(RemoteError::Refused { code: proto::code::errno::EPERM, .. }) if left > 0 => {
                std::thread::sleep(Duration::from_millis(500));
            }
            outcome => return outcome,
        }
    }
}

/// Who leads.
fn leader(at: SocketAddr, id: CopysetId) -> Result<PeerId, RemoteError> {
    let ask = wire::GetLeaderRequest2 { logic_pool_id: id.pool(), copyset_id: id.copyset(), ..Default::default() };
    let answer: wire::GetLeaderResponse2 = call(at, ANSWER, CLI, "GetLeader", &ask)?;
    answer.leader.address().parse().map_err(|_| RemoteError::Answer(at))
}

fn change_at(leader: PeerId, id: CopysetId, change: &Change) -> Result<Value, RemoteError> {
    let (logic_pool_id, copyset_id, at) = (id.pool(), id.copyset(), address(leader));
    let leader = named(leader);
    let (old, new) = match change {
        Change::Add(peer) => {
            let ask = wire::AddPeerRequest2 { logic_pool_id, copyset_id, leader, add_peer: named(*peer) };
            let answer: wire::AddPeerResponse2 = call(at, WORK, CLI, "AddPeer", &ask)?;
            (answer.old_peers, answer.new_peers)
        }
        Change::Remove(peer) => {
            let ask = wire::RemovePeerRequest2 { logic_pool_id, copyset_id, leader, remove_peer: named(*peer) };
            let answer: wire::RemovePeerResponse2 = call(at, WORK, CLI, "RemovePeer", &ask)?;
            (answer.old_peers, answer.new_peers)
        }
        Change::Set(peers) => {
            let new_peers = peers.iter().map(|peer| named(*peer)).collect();
            let ask = wire::ChangePeersRequest2 { logic_pool_id, copyset_id, leader, new_peers };
            let answer: wire::ChangePeersResponse2 = call(at, WORK, CLI, "ChangePeers", &ask)?;
            (answer.old_peers, answer.new_peers)
        }
        Change::Transfer(to) => {
            let ask = wire::TransferLeaderRequest2 { logic_pool_id, copyset_id, leader, transferee: named(*to) };
            let _: wire::TransferLeaderResponse2 = call(at, ANSWER, CLI, "TransferLeader", &ask)?;
            return Ok(json!({ "transfer": to.to_string() }));
        }
    };
    Ok(json!({ "old": names(&old), "new": names(&new) }))
}

/// Force one node's replica of a copyset to be its only member, whoever leads.
///
/// # Errors
/// [`RemoteError`].
pub fn reset(at: SocketAddr, id: CopysetId, peer: PeerId) -> Result<Value, RemoteError> {
    let (logic_pool_id, copyset_id) = (id.pool(), id.copyset());
    let request_peer = Peer { id: None, address: Some(format!("{at}:0")) };
    let new_peers = vec![named(peer)];
    let members = json!(names(&new_peers));
    let ask = wire::ResetPeerRequest2 { logic_pool_id, copyset_id, request_peer, old_peers: Vec::new(), new_peers };
    let _: wire::ResetPeerResponse2 = call(at, WORK, CLI, "ResetPeer", &ask)?;
    Ok(json!({ "reset": [logic_pool_id, copyset_id], "node": at.to_string(), "peers": members }))
}

/// Make what a node has applied of a copyset durable outside its log.
///
/// # Errors
/// [`RemoteError`].
pub fn snapshot(at: SocketAddr, id: CopysetId) -> Result<Value, RemoteError> {
    let (logic_pool_id, copyset_id) = (id.pool(), id.copyset());
    let peer = Some(Peer { id: None, address: Some(format!("{at}:0")) });
    let ask = wire::SnapshotRequest2 { logic_pool_id, copyset_id, peer };
    let _: wire::SnapshotResponse2 = call(at, WORK, CLI, "Snapshot", &ask)?;
    Ok(json!({ "snapshot": [logic_pool_id, copyset_id] }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    /// A node that says this to the first call.
    fn node(says: &'static [u8]) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 4096]).unwrap();
            let mut out = BytesMut::new();
            proto::frame::put_response_bytes(&mut out, 1, says);
            stream.write_all(&out).unwrap();
        });
        at
    }

    #[test]
    fn an_answer_without_what_it_must_say_is_none() {
        let id = CopysetId(1 << 32 | 7);
        assert!(delete(node(&[8, 0]), id).is_ok());
        for says in [&[][..], &[0xff; 3]] {
            assert!(matches!(delete(node(says), id), Err(RemoteError::Answer(_))));
            assert!(matches!(status(node(says), id), Err(RemoteError::Answer(_))));
            assert!(matches!(leader(node(says), id), Err(RemoteError::Answer(_))));
        }
    }

    #[test]
    fn nobody_is_waited_for_longer_than_it_may_take() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (at, patience) = (listener.local_addr().unwrap(), Duration::from_millis(50));
        let answer = call::<wire::CopysetResponse>(at, patience, REPLICA, "Delete", &wire::CopysetRequest::default());
        assert!(matches!(answer, Err(RemoteError::Socket(..))));
    }
}
