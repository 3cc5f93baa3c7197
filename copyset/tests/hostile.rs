//! Whatever a peer sends, a replica refuses it or takes it; it never ends the process.

mod common;

use bytes::Bytes;
use common::{ID, Node, Rng};
use copyset::raft::eraftpb::{Entry, EntryType, Message, MessageType};
use copyset::{ConfState, Config, Effect};

const KINDS: [MessageType; 19] = [
    MessageType::MsgHup,
    MessageType::MsgBeat,
    MessageType::MsgPropose,
    MessageType::MsgAppend,
    MessageType::MsgAppendResponse,
    MessageType::MsgRequestVote,
    MessageType::MsgRequestVoteResponse,
    MessageType::MsgSnapshot,
    MessageType::MsgHeartbeat,
    MessageType::MsgHeartbeatResponse,
    MessageType::MsgUnreachable,
    MessageType::MsgSnapStatus,
    MessageType::MsgCheckQuorum,
    MessageType::MsgTransferLeader,
    MessageType::MsgTimeoutNow,
    MessageType::MsgReadIndex,
    MessageType::MsgReadIndexResp,
    MessageType::MsgRequestPreVote,
    MessageType::MsgRequestPreVoteResponse,
];

/// Numbers near those that matter: small ones, those in use, the largest.
fn number(rng: &mut Rng, near: u64) -> u64 {
    match rng.below(12) {
        0 => rng.next(),
        1 => u64::MAX - rng.below(2),
        2..=4 => rng.below(4),
        _ => near.saturating_add(rng.below(5)).saturating_sub(2),
    }
}

fn entry(rng: &mut Rng, index: u64, term: u64) -> Entry {
    let mut entry = Entry::default();
    (entry.index, entry.term) = (index, term);
    match rng.below(8) {
        0 => entry.set_entry_type(EntryType::EntryConfChange),
        1 => entry.set_entry_type(EntryType::EntryConfChangeV2),
        2 => entry.data = Bytes::from(vec![1; rng.below(5000) as usize]),
        3 => entry.data = Bytes::from(vec![1; 4096]),
        _ => {}
    }
    entry.context = Bytes::from(vec![2; rng.below(12) as usize]);
    entry
}

/// Bytes of a configuration, mostly a sound one.
fn conf(rng: &mut Rng) -> Vec<u8> {
    let voters: Vec<u64> = (1..5).filter(|_| !rng.one_in(3)).collect();
    let mut bytes = ConfState { epoch: rng.below(9), ..ConfState::of(&voters) }.encode().to_vec();
    if rng.one_in(4) {
        let at = rng.below(bytes.len() as u64) as usize;
        bytes[at] = rng.next() as u8;
    }
    bytes
}

fn context(rng: &mut Rng, kind: MessageType, node: &Node) -> Vec<u8> {
    use MessageType::{MsgHeartbeat, MsgHeartbeatResponse, MsgRequestPreVoteResponse, MsgRequestVote};
    match (kind, rng.below(4)) {
        (_, 0) => (0..rng.below(20)).map(|_| rng.next() as u8).collect(),
        (MsgHeartbeat | MsgHeartbeatResponse, _) => number(rng, node.copyset.term()).to_le_bytes().to_vec(),
        (MsgRequestPreVoteResponse, 1) => conf(rng),
        (MsgRequestVote, 1) => raft::CAMPAIGN_TRANSFER.to_vec(),
        _ => Vec::new(),
    }
}

fn message(rng: &mut Rng, node: &Node) -> Message {
    let (last, term) = (node.copyset.last_index(), node.copyset.term());
    let mut message = Message::default();
    let kind = if rng.one_in(2) { MessageType::MsgAppend } else { KINDS[rng.below(19) as usize] };
    message.set_msg_type(kind);
    message.to = if rng.one_in(20) { rng.next() } else { 1 };
    message.from = if rng.one_in(20) { number(rng, 1) } else { 2 + rng.below(2) };
    message.term = if rng.one_in(40) { number(rng, term) } else { term + u64::from(rng.one_in(10)) };
    message.log_term = number(rng, term);
    message.index = number(rng, last);
    message.commit = number(rng, last);
    message.commit_term = number(rng, term);
    message.reject = rng.one_in(3);
    message.reject_hint = number(rng, last);
    message.request_snapshot = if rng.one_in(4) { number(rng, last) } else { 0 };
    message.context = context(rng, kind, node).into();
    if kind == MessageType::MsgSnapshot {
        message.mut_snapshot().data = conf(rng).into();
        let (index, term) = (last + rng.below(9), number(rng, term));
        let metadata = message.mut_snapshot().mut_metadata();
        (metadata.index, metadata.term) = (if rng.one_in(4) { number(rng, index) } else { index }, term);
    }
    let mut index = message.index;
    for _ in 0..rng.below(4) {
        index = index.wrapping_add(if rng.one_in(10) { 2 } else { 1 });
        let term = if rng.one_in(10) { number(rng, term) } else { message.term };
        let entry = entry(rng, index, term);
        message.mut_entries().push(entry);
    }
    message
}

fn turn(node: &mut Node) {
    let mut effects = Vec::new();
    while node.copyset.dirty() {
        node.copyset.ready(&mut effects);
        for effect in effects.drain(..) {
            if let Effect::Apply(entry) = &effect {
                let _ = (entry.header(), entry.crcs().len());
                node.copyset.applied(entry.index);
            }
            if let Effect::Fetch { low, .. } = effect {
                node.copyset.fetched(low, true);
            }
        }
    }
    node.disk.submit(&mut node.log.borrow_mut());
}

#[test]
fn any_message_is_safe() {
    let (mut taken, mut led, mut applied, mut installs) = (0, 0, 0, 0);
    for seed in 0..300 {
        let mut node = Node::new(Config::new(ID, 1, seed), &[1, 2, 3], seed);
        let mut rng = Rng(seed);
        for _ in 0..150 {
            match rng.below(10) {
                0..=5 => {
                    let message = message(&mut rng, &node);
                    taken += u64::from(node.step(message).is_ok());
                }
                6 => (0..rng.below(12)).for_each(|_| node.tick()),
                7 => {
                    node.complete_one();
                }
                8 => {
                    let now = node.now;
                    let _ = match rng.below(6) {
                        0 => node.copyset.change_peers(now, rng.next(), &[1, 2 + rng.below(4)]).is_ok(),
                        1 => node.copyset.transfer_leader(now, rng.below(4)).is_ok(),
                        2 => node.copyset.read_index(now, rng.next()).is_ok(),
                        3 => {
                            node.copyset.unreachable(rng.below(4));
                            node.copyset.snapshot_sent(rng.below(4), rng.one_in(2));
                            false
                        }
                        4 => {
                            let index = node.copyset.offered().map_or(0, |offer| offer.index);
                            let installed = node.copyset.install_snapshot(now, index).is_ok();
                            installs += u64::from(installed);
                            installed
                        }
                        _ => node.propose(rng.next(), 1).is_ok(),
                    };
                }
                _ => turn(&mut node),
            }
            led += u64::from(node.copyset.role() == copyset::Role::Leader);
        }
        applied += node.copyset.applied_index();
    }
    let counts = format!("{taken} taken, {led} leading, {applied} applied, {installs} installed");
    assert!(taken > 5000 && led > 100 && applied > 300 && installs > 5, "{counts}");
}
