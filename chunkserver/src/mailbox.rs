//! Mail between shards: bounded single-producer rings, one pair for each direction of each pair of shards.
//!
//! Credits make a reply always fit: a shard has at most [`CREDITS`] requests unanswered at another one, and the ring
//! for replies holds that many. What has no credit waits on the sender's side, bounded by the sender's own table of
//! requests in flight.

use crate::io::{ConnId, ShardId};
use crate::shard::request::{Reply, Request};
use proto::peer::Hello;
use rtrb::{Consumer, Producer, RingBuffer};
use std::collections::VecDeque;

/// Requests one shard may have unanswered at another.
pub const CREDITS: usize = crate::limits::MAILBOX_DEPTH;
const CONNECTIONS: usize = 1024;
const GREETINGS: usize = 64;

/// What one shard sends another.
#[derive(Debug)]
pub enum Mail {
    /// Work.
    Request(Request),
    /// An answer.
    Reply(Reply),
    /// A connection accepted elsewhere that this shard shall serve; the number says which kind.
    Connection(ConnId, u8),
    /// A connection of a peer that asked for this shard, and what it said.
    Peer(ConnId, Box<Greeted>),
}

/// A greeting that is not answered yet.
#[derive(Clone, Copy, Debug)]
pub struct Greeted {
    /// What it says.
    pub hello: Hello,
    /// To be echoed in the answer.
    pub correlation_id: i64,
}

struct Peer {
    requests_out: Producer<Request>,
    replies_out: Producer<Reply>,
    connections_out: Producer<(ConnId, u8)>,
    peers_out: Producer<(ConnId, Box<Greeted>)>,
    requests_in: Consumer<Request>,
    replies_in: Consumer<Reply>,
    connections_in: Consumer<(ConnId, u8)>,
    peers_in: Consumer<(ConnId, Box<Greeted>)>,
    backlog: VecDeque<Request>,
    credits: usize,
    wake: bool,
}

/// One shard's end of the mesh.
pub struct Mailbox {
    peers: Vec<Option<Peer>>,
}

impl std::fmt::Debug for Mailbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mailbox").field("shards", &self.peers.len()).finish()
    }
}

/// The mailboxes of `shards` shards, connected with each other.
#[must_use]
pub fn mesh(shards: u16) -> Vec<Mailbox> {
    let n = usize::from(shards);
    let mut boxes: Vec<Mailbox> = (0..n).map(|_| Mailbox { peers: (0..n).map(|_| None).collect() }).collect();
    for a in 0..n {
        for b in a + 1..n {
            let (ab_out, ab_in) = one_way();
            let (ba_out, ba_in) = one_way();
            boxes[a].peers[b] = Some(Peer::new(ab_out, ba_in));
            boxes[b].peers[a] = Some(Peer::new(ba_out, ab_in));
        }
    }
    boxes
}

type Out = (Producer<Request>, Producer<Reply>, Producer<(ConnId, u8)>, Producer<(ConnId, Box<Greeted>)>);
type In = (Consumer<Request>, Consumer<Reply>, Consumer<(ConnId, u8)>, Consumer<(ConnId, Box<Greeted>)>);

/// One direction of a pair.
fn one_way() -> (Out, In) {
    let (requests_out, requests_in) = RingBuffer::new(CREDITS);
    let (replies_out, replies_in) = RingBuffer::new(CREDITS);
    let (connections_out, connections_in) = RingBuffer::new(CONNECTIONS);
    let (peers_out, peers_in) = RingBuffer::new(GREETINGS);
    ((requests_out, replies_out, connections_out, peers_out), (requests_in, replies_in, connections_in, peers_in))
}

impl Peer {
    fn new(out: Out, inward: In) -> Self {
        Self {
            requests_out: out.0,
            replies_out: out.1,
            connections_out: out.2,
            peers_out: out.3,
            requests_in: inward.0,
            replies_in: inward.1,
            connections_in: inward.2,
            peers_in: inward.3,
            backlog: VecDeque::new(),
            credits: CREDITS,
            wake: false,
        }
    }

    fn push_backlog(&mut self) {
        while self.credits > 0 {
            let Some(request) = self.backlog.pop_front() else { return };
            self.credits -= 1;
            self.wake = true;
            assert!(self.requests_out.push(request).is_ok(), "a credit is room in the ring");
        }
    }
}

impl Mailbox {
    fn peer(&mut self, shard: u16) -> &mut Peer {
        self.peers
            .get_mut(usize::from(shard))
            .and_then(Option::as_mut)
            .expect("a shard of this process other than self")
    }

    /// Send work; it waits here until the receiver has room.
    pub fn send_request(&mut self, to: u16, request: Request) {
        let peer = self.peer(to);
        peer.backlog.push_back(request);
        peer.push_backlog();
    }

    /// Answer; always fits.
    pub fn send_reply(&mut self, to: u16, reply: Reply) {
        let peer = self.peer(to);
        assert!(peer.replies_out.push(reply).is_ok(), "credits leave room for every reply");
        peer.wake = true;
    }

    /// Hand a connection over; gives it back when the other side is swamped.
    ///
    /// # Errors
    /// The connection, when there is no room.
    pub fn send_connection(&mut self, to: u16, conn: ConnId, kind: u8) -> Result<(), ConnId> {
        let peer = self.peer(to);
        peer.wake = true;
        peer.connections_out.push((conn, kind)).map_err(|_| conn)
    }

    /// Hand a peer's connection over; gives it back when the other side is swamped.
    ///
    /// # Errors
    /// The connection, when there is no room.
    pub fn send_peer(&mut self, to: u16, conn: ConnId, greeted: Greeted) -> Result<(), ConnId> {
        let peer = self.peer(to);
        peer.wake = true;
        peer.peers_out.push((conn, Box::new(greeted))).map_err(|_| conn)
    }

    /// Everything that has arrived.
    pub fn receive(&mut self, mut each: impl FnMut(u16, Mail)) {
        for (shard, peer) in self.peers.iter_mut().enumerate() {
            let Some(peer) = peer else { continue };
            while let Ok(reply) = peer.replies_in.pop() {
                peer.credits += 1;
                each(shard as u16, Mail::Reply(reply));
            }
            while let Ok(request) = peer.requests_in.pop() {
                each(shard as u16, Mail::Request(request));
            }
            while let Ok((conn, kind)) = peer.connections_in.pop() {
                each(shard as u16, Mail::Connection(conn, kind));
            }
            while let Ok((conn, greeted)) = peer.peers_in.pop() {
                each(shard as u16, Mail::Peer(conn, greeted));
            }
            peer.push_backlog();
        }
    }

    /// Is something waiting to be received?
    #[must_use]
    pub fn has_mail(&self) -> bool {
        self.peers.iter().flatten().any(|p| {
            !(p.replies_in.is_empty()
                && p.requests_in.is_empty()
                && p.connections_in.is_empty()
                && p.peers_in.is_empty())
        })
    }

    /// Who was sent something since the last call and must be woken.
    pub fn take_wakes(&mut self, mut each: impl FnMut(ShardId)) {
        for (shard, peer) in self.peers.iter_mut().enumerate() {
            if let Some(peer) = peer
                && std::mem::take(&mut peer.wake)
            {
                each(ShardId(shard as u16));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::request::{AdminOp, Origin, Outcome, ReplyData, RequestOp};
    use raftlog::CopysetId;

    fn request(slot: u32) -> Request {
        Request {
            copyset: CopysetId(1),
            op: RequestOp::Admin(AdminOp::ShardStatus),
            origin: Origin { shard: 0, slot, serial: 0 },
        }
    }

    #[test]
    fn replies_always_fit_and_order_holds() {
        let mut boxes = mesh(2);
        let total = CREDITS as u32 * 3;
        for slot in 0..total {
            boxes[0].send_request(1, request(slot));
        }
        let mut next = 0;
        while next < total {
            let mut answers = Vec::new();
            boxes[1].receive(|from, mail| {
                let Mail::Request(r) = mail else { panic!("only requests") };
                assert_eq!((from, r.origin.slot), (0, next + answers.len() as u32));
                answers.push(Reply {
                    origin: r.origin,
                    outcome: Outcome::Success,
                    applied_index: 0,
                    data: ReplyData::None,
                });
            });
            assert!(!answers.is_empty() && answers.len() <= CREDITS);
            next += answers.len() as u32;
            for reply in answers {
                boxes[1].send_reply(0, reply);
            }
            boxes[0].receive(|_, mail| assert!(matches!(mail, Mail::Reply(_))));
        }
        let mut woken = Vec::new();
        boxes[0].take_wakes(|s| woken.push(s));
        assert_eq!(woken, [ShardId(1)]);
    }
}
