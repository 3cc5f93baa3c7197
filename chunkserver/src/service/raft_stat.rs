//! braft's `raft_stat` text: one block per copyset, as the tools parse it (ops-contract §5).
//!
//! Lines end CRLF; the five from `storage` to `state_machine` end LF, because the C++ tool finds the last log index by
//! their standing on one CRLF line. Left out: what has no counterpart here (timers, conf_index, last_msg_to_now).

use crate::shard::request::{CopysetStatus, Reply, ReplyData};
use copyset::PeerId;
use std::fmt::Write as _;

/// The copysets of all shards, by id.
pub(super) fn copysets(replies: Vec<Reply>) -> Vec<CopysetStatus> {
    let lists = replies.into_iter().filter_map(|reply| match reply.data {
        ReplyData::Copysets(list) => Some(list),
        _ => None,
    });
    let mut all: Vec<CopysetStatus> = lists.flatten().collect();
    all.sort_unstable_by_key(|copyset| copyset.id);
    all
}

/// The text of all copysets, or of one.
pub(super) fn text(copysets: &[CopysetStatus], only: Option<u64>) -> String {
    let mut out = String::new();
    for copyset in copysets.iter().filter(|copyset| only.is_none_or(|id| id == copyset.id)) {
        // Writing to a String cannot fail.
        let _ = block(&mut out, copyset);
    }
    out
}

fn block(out: &mut String, copyset: &CopysetStatus) -> std::fmt::Result {
    let state = match copyset.state {
        1 => "LEADER",
        2 => "TRANSFERRING",
        3 => "CANDIDATE",
        4 => "FOLLOWER",
        5 => "ERROR",
        6 => "UNINITIALIZED",
        7 => "SHUTTING",
        _ => "SHUTDOWN",
    };
    let peers: Vec<String> = copyset.peers.iter().map(|&peer| PeerId(peer).to_string()).collect();
    write!(out, "[{}]\r\npeer_id: {}\r\nstate: {state}\r\n", copyset.id, PeerId(copyset.peer))?;
    write!(out, "readonly: 0\r\nterm: {}\r\npeers: {}\r\n", copyset.term, peers.join(" "))?;
    if state == "LEADER" {
        write!(out, "changing_conf: NO    stage: STAGE_NONE\r\n")?;
    } else if state == "FOLLOWER" {
        write!(out, "leader: {}\r\n", PeerId(copyset.leader))?;
    }
    writeln!(out, "storage: [{}, {}]", copyset.first, copyset.last)?;
    writeln!(out, "disk_index: {}", copyset.durable)?;
    writeln!(out, "known_applied_index: {}", copyset.applied)?;
    writeln!(out, "last_log_id: (index={},term={})", copyset.last, copyset.term)?;
    writeln!(out, "state_machine: Idle")?;
    write!(out, "last_committed_index: {}\r\n", copyset.committed)?;
    write!(out, "last_snapshot_index: {}\r\nlast_snapshot_term: 0\r\n", copyset.first.saturating_sub(1))?;
    write!(out, "snapshot_status: IDLE\r\n\r\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_block_is_what_the_tools_split() {
        let peer: PeerId = "127.0.0.1:8402:0".parse().unwrap();
        let copyset = CopysetStatus {
            id: 4_294_967_997,
            state: 1,
            peer: peer.0,
            leader: peer.0,
            peers: vec![peer.0],
            changing: false,
            term: 2,
            committed: 27,
            applied: 27,
            first: 1,
            last: 27,
            durable: 27,
            epoch: 2,
            chunks: 3,
        };
        let text = text(&[copyset.clone(), copyset], None);
        let blocks: Vec<&str> = text.split_terminator("\r\n\r\n").collect();
        assert_eq!(blocks.len(), 2);
        let lines: Vec<&str> = blocks[0].split("\r\n").collect();
        assert_eq!(lines[..3], ["[4294967997]", "peer_id: 127.0.0.1:8402:0", "state: LEADER"]);
        let storage = lines.iter().find(|line| line.starts_with("storage: ")).unwrap();
        assert!(storage.contains("last_log_id: (index=27,term=2)\nstate_machine: Idle\nlast_committed_index: 27"));
        assert!(storage.find('=') == storage.find("(index=").map(|at| at + 6));
    }
}
