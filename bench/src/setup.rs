//! Calls made once, blocking, before the load: creating copysets and finding their leaders.

use crate::codec::{self, HEADER};
use crate::leaders::Leaders;
use anyhow::{Context, Result, bail};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

const CREATE_WAIT: Duration = Duration::from_secs(5);
const LEADER_WAIT: Duration = Duration::from_secs(30);
/// For one node's answer when there are others to ask.
const ASK_WAIT: Duration = Duration::from_millis(500);

/// A connection for one call at a time.
struct Caller {
    stream: TcpStream,
    cid: u64,
}

impl Caller {
    fn connect(addr: SocketAddr, limit: Duration) -> Result<Self> {
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

/// Creates the copysets on all nodes, which become their members. True if none of them existed before.
pub fn create_copysets(nodes: &[SocketAddr], copysets: &[(u32, u32)]) -> Result<bool> {
    let peers: Vec<String> = nodes.iter().map(|node| format!("{node}:0")).collect();
    let mut fresh = true;
    for node in nodes {
        let mut caller = Caller::connect(*node, CREATE_WAIT)?;
        for (pool, copyset) in copysets {
            let (code, message) =
                caller.call(|out, cid| codec::put_create_copyset(out, cid, *pool, *copyset, &peers))?;
            match (code, codec::status(&message)?) {
                (0, Some(0)) => {}
                (0, Some(1)) => fresh = false,
                (code, status) => bail!("{node}: create copyset {pool}:{copyset}: rpc error {code}, status {status:?}"),
            }
        }
    }
    Ok(fresh)
}

/// Waits until every copyset names a leader.
pub fn wait_for_leaders(leaders: &mut Leaders, copysets: &[(u32, u32)]) -> Result<()> {
    let deadline = Instant::now() + LEADER_WAIT;
    let mut open = copysets.to_vec();
    loop {
        find_leaders(leaders, &mut open)?;
        let Some((pool, copyset)) = open.first() else { return Ok(()) };
        if Instant::now() >= deadline {
            bail!("{} copysets have no leader, {pool}:{copyset} the first of them", open.len());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Asks the nodes, one after the other, for the leaders of the copysets in `open`; what is left has none, as far as
/// they say. A node that does not answer is an error only if it is the only one.
pub fn find_leaders(leaders: &mut Leaders, open: &mut Vec<(u32, u32)>) -> Result<()> {
    let nodes = leaders.nodes().to_vec();
    let (limit, single) = if nodes.len() > 1 { (ASK_WAIT, false) } else { (CREATE_WAIT, true) };
    for node in nodes {
        if let Err(error) = ask(node, limit, leaders, open)
            && single
        {
            return Err(error);
        }
    }
    Ok(())
}

fn ask(node: SocketAddr, limit: Duration, leaders: &mut Leaders, open: &mut Vec<(u32, u32)>) -> Result<()> {
    let mut caller = Caller::connect(node, limit)?;
    let mut left = Vec::new();
    for copyset in open.iter().copied() {
        let (code, message) = caller.call(|out, cid| codec::put_get_leader(out, cid, copyset.0, copyset.1))?;
        let named = if code == 0 { codec::leader(&message)? } else { None };
        match named {
            // A leader that is none of our nodes may be one of them under another name: it is asked and found out.
            Some(peer) => {
                leaders.learn(copyset, &peer);
            }
            None => left.push(copyset),
        }
    }
    *open = left;
    Ok(())
}
