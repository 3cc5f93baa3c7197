//! Calls made once, blocking, before the load: creating copysets and waiting for their leaders.

use crate::codec::{self, HEADER};
use anyhow::{Context, Result, bail};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

const LEADER_WAIT: Duration = Duration::from_secs(30);

/// A connection for one call at a time.
struct Caller {
    stream: TcpStream,
    cid: u64,
}

impl Caller {
    fn connect(addr: SocketAddr) -> Result<Self> {
        let limit = Duration::from_secs(5);
        let stream = TcpStream::connect_timeout(&addr, limit).with_context(|| format!("connect to {addr}"))?;
        stream.set_read_timeout(Some(limit))?;
        Ok(Self { stream, cid: 1 << 32 })
    }

    /// Makes one call; returns the RPC error code and the response message.
    fn call(&mut self, put: impl FnOnce(&mut Vec<u8>, u64)) -> Result<(i32, Vec<u8>)> {
        self.cid += 1;
        let mut frame = Vec::new();
        put(&mut frame, self.cid);
        self.stream.write_all(&frame)?;
        let mut buf = vec![0; HEADER];
        self.stream.read_exact(&mut buf)?;
        let len = codec::frame_len(&buf)?.context("no frame")?;
        buf.resize(len, 0);
        self.stream.read_exact(buf.get_mut(HEADER..).unwrap_or_default())?;
        let (reply, _) = codec::cut_reply(&buf)?.context("no reply")?;
        if reply.cid != self.cid {
            bail!("reply to call {} for call {}", reply.cid, self.cid);
        }
        Ok((reply.error_code, reply.message.to_vec()))
    }
}

/// Creates the copysets with `peers` (by default the server alone). True if none of them existed before.
pub fn create_copysets(addr: SocketAddr, copysets: &[(u32, u32)], peers: &[String]) -> Result<bool> {
    let own = [format!("{addr}:0")];
    let peers = if peers.is_empty() { &own[..] } else { peers };
    let mut caller = Caller::connect(addr)?;
    let mut fresh = true;
    for (pool, copyset) in copysets {
        let (code, message) = caller.call(|out, cid| codec::put_create_copyset(out, cid, *pool, *copyset, peers))?;
        match (code, codec::status(&message)?) {
            (0, Some(0)) => {}
            (0, Some(1)) => fresh = false,
            (code, status) => bail!("create copyset {pool}:{copyset}: rpc error {code}, status {status:?}"),
        }
    }
    Ok(fresh)
}

/// Waits until every copyset names a leader.
pub fn wait_for_leaders(addr: SocketAddr, copysets: &[(u32, u32)]) -> Result<()> {
    let mut caller = Caller::connect(addr)?;
    let deadline = Instant::now() + LEADER_WAIT;
    for (pool, copyset) in copysets {
        loop {
            let (code, message) = caller.call(|out, cid| codec::put_get_leader(out, cid, *pool, *copyset))?;
            if code == 0 && codec::leader(&message)?.is_some() {
                break;
            }
            if Instant::now() >= deadline {
                bail!("copyset {pool}:{copyset} has no leader (rpc error {code})");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    Ok(())
}
