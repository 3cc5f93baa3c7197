//! The handshake of a connection between two shards of two chunkservers.
//!
//! The first four bytes of a [`Hello`] are the version, a number all versions have there; those of a [`Welcome`] are
//! version and status. So two ends of different versions can always tell each other why they part.

use super::{Fields, PeerError};
use bytes::BufMut;

/// Version of everything in this module's directory.
pub const VERSION: u16 = 1;
/// Bytes of a hello.
pub const HELLO_LEN: usize = 64;
/// Bytes of a welcome.
pub const WELCOME_LEN: usize = 48;

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Lane {
    /// Appends, snapshots, bulk data.
    Data = 0,
    /// Votes, heartbeats, lease rounds, answers to appends: never behind data.
    Control = 1,
}

/// Who calls, and whom it believes to call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// What the connection is for.
    pub lane: Lane,
    /// Chunk size of the caller's disk, bytes.
    pub chunk_size: u32,
    /// Peer id of the caller.
    pub from: u64,
    /// Peer id the caller believes to call.
    pub to: u64,
    /// Shard of the caller.
    pub from_shard: u16,
    /// Shard it wants to talk to.
    pub to_shard: u16,
    /// Shards of the caller.
    pub shards: u16,
    /// Identity of the caller's disk.
    pub disk: [u8; 16],
    /// Identity of the cluster; all zeros if the caller knows none.
    pub cluster: [u8; 16],
}

/// How a hello was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Status {
    /// Go on.
    Ok = 0,
    /// The versions differ.
    Version = 1,
    /// Another peer lives at this address.
    NotMe = 2,
    /// No such shard; the welcome says how many there are.
    Shard = 3,
    /// The chunk sizes differ.
    ChunkSize = 4,
    /// Another cluster.
    Cluster = 5,
    /// Another disk is connected under the caller's peer id.
    Duplicate = 6,
    /// Not serving: starting or stopping.
    NotReady = 7,
    /// The hello is malformed.
    Malformed = 8,
}

/// The answer to a hello.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// How it was taken.
    pub status: Status,
    /// Chunk size of the called, bytes.
    pub chunk_size: u32,
    /// Peer id of the called.
    pub peer: u64,
    /// Shards of the called.
    pub shards: u16,
    /// Identity of its disk.
    pub disk: [u8; 16],
}

impl Hello {
    /// To bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HELLO_LEN);
        out.put_u16_le(VERSION);
        out.put_u16_le(self.lane as u16);
        out.put_u32_le(self.chunk_size);
        out.put_u64_le(self.from);
        out.put_u64_le(self.to);
        out.put_u16_le(self.from_shard);
        out.put_u16_le(self.to_shard);
        out.put_u16_le(self.shards);
        out.put_u16_le(0);
        out.put_slice(&self.disk);
        out.put_slice(&self.cluster);
        out
    }

    /// From bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, PeerError> {
        let mut fields = Fields(bytes);
        version(&mut fields)?;
        let lane = match fields.u16("lane")? {
            0 => Lane::Data,
            1 => Lane::Control,
            other => return Err(PeerError::Unknown { what: "lane", value: u32::from(other) }),
        };
        let (chunk_size, from, to) = (fields.u32("hello")?, fields.u64("hello")?, fields.u64("hello")?);
        let (from_shard, to_shard, shards) = (fields.u16("hello")?, fields.u16("hello")?, fields.u16("hello")?);
        fields.zeros(2, "hello padding")?;
        let (disk, cluster) = (fields.uuid("hello")?, fields.uuid("hello")?);
        fields.end("hello")?;
        Ok(Self { lane, chunk_size, from, to, from_shard, to_shard, shards, disk, cluster })
    }
}

impl Welcome {
    /// To bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(WELCOME_LEN);
        out.put_u16_le(VERSION);
        out.put_u16_le(self.status as u16);
        out.put_u32_le(self.chunk_size);
        out.put_u64_le(self.peer);
        out.put_u16_le(self.shards);
        out.put_bytes(0, 14);
        out.put_slice(&self.disk);
        out
    }

    /// From bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, PeerError> {
        let mut fields = Fields(bytes);
        version(&mut fields)?;
        let status = match fields.u16("status")? {
            0 => Status::Ok,
            1 => Status::Version,
            2 => Status::NotMe,
            3 => Status::Shard,
            4 => Status::ChunkSize,
            5 => Status::Cluster,
            6 => Status::Duplicate,
            7 => Status::NotReady,
            8 => Status::Malformed,
            other => return Err(PeerError::Unknown { what: "status", value: u32::from(other) }),
        };
        let (chunk_size, peer, shards) = (fields.u32("welcome")?, fields.u64("welcome")?, fields.u16("welcome")?);
        fields.zeros(14, "welcome padding")?;
        let disk = fields.uuid("welcome")?;
        fields.end("welcome")?;
        Ok(Self { status, chunk_size, peer, shards, disk })
    }
}

fn version(fields: &mut Fields<'_>) -> Result<(), PeerError> {
    match fields.u16("version")? {
        VERSION => Ok(()),
        other => Err(PeerError::Version(other)),
    }
}

impl Fields<'_> {
    pub(super) fn end(&self, what: &'static str) -> Result<(), PeerError> {
        if self.0.is_empty() { Ok(()) } else { Err(PeerError::Length(what)) }
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Ok => "ok",
            Self::Version => "it speaks another version",
            Self::NotMe => "another peer id lives there",
            Self::Shard => "it has no such shard",
            Self::ChunkSize => "its chunks have another size",
            Self::Cluster => "it belongs to another cluster",
            Self::Duplicate => "another disk uses this peer id",
            Self::NotReady => "it is starting or stopping",
            Self::Malformed => "it does not understand the hello",
        })
    }
}
