//! How the control thread talks to the shards: requests through a bounded channel and a doorbell, replies by slot.

use crate::chunk::shard_of;
use crate::io::uring::Doorbells;
use crate::shard::request::{AdminOp, ChunkOp, Origin, Reply, Request, RequestOp};
use raftlog::CopysetId;
use slab::Slab;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use tokio::sync::{mpsc, oneshot};

/// Requests of the control thread that one shard may hold.
const DEPTH: usize = 1024;
/// `Origin::shard` of the control thread.
pub const CONTROL: u16 = u16::MAX;

/// What the control thread wants of a shard's thread.
#[derive(Debug)]
pub enum Order {
    /// An answer of this shard.
    Ask(Request),
    /// An operation on a chunk by whoever leads its copyset, here or on another server.
    Errand {
        /// Where the reply goes.
        origin: Origin,
        /// Copyset.
        copyset: CopysetId,
        /// Where to look for it ([`crate::volume::Volume::homes`]).
        homes: Vec<u64>,
        /// Chunk.
        chunk: u64,
        /// What.
        op: ChunkOp,
    },
}

/// A shard's end.
#[derive(Debug)]
pub struct Port {
    requests: Receiver<Order>,
    replies: mpsc::UnboundedSender<Reply>,
}

impl Port {
    /// The next request, if one is there.
    #[must_use]
    pub fn poll(&self) -> Option<Order> {
        self.requests.try_recv().ok()
    }
    /// Answer one. Bounded: there are never more replies than requests in flight.
    pub fn reply(&self, reply: Reply) {
        let _ = self.replies.send(reply);
    }
}

/// The control thread's end, before it is on its thread.
#[derive(Debug)]
pub struct Links {
    requests: Vec<SyncSender<Order>>,
    replies: mpsc::UnboundedReceiver<Reply>,
    bells: Arc<Doorbells>,
}

/// Connect a control thread with `shards` shards.
#[must_use]
pub fn connect(shards: u16, bells: &Arc<Doorbells>) -> (Links, Vec<Port>) {
    let (reply_out, replies) = mpsc::unbounded_channel();
    let (requests, ports) = (0..shards)
        .map(|_| {
            let (out, requests) = sync_channel(DEPTH);
            (out, Port { requests, replies: reply_out.clone() })
        })
        .unzip();
    (Links { requests, replies, bells: Arc::clone(bells) }, ports)
}

/// Who waits for a reply: the serial number of the request, and where the reply goes.
type Waiting = Slab<(u32, oneshot::Sender<Reply>)>;

/// The shards, as the control thread's tasks use them.
#[derive(Clone, Debug)]
pub struct Shards {
    links: Rc<Vec<SyncSender<Order>>>,
    bells: Arc<Doorbells>,
    waiting: Rc<RefCell<Waiting>>,
    serial: Rc<RefCell<u32>>,
}

/// The shard did not take or not answer the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a shard does not answer (stopping, or swamped)")]
pub struct NoAnswer;

impl Shards {
    /// On the control thread: start routing replies.
    #[must_use]
    pub fn new(links: Links) -> Self {
        let Links { requests, mut replies, bells } = links;
        let this = Self { links: Rc::new(requests), bells, waiting: Rc::default(), serial: Rc::new(RefCell::new(0)) };
        let waiting = Rc::clone(&this.waiting);
        tokio_uring::spawn(async move {
            while let Some(reply) = replies.recv().await {
                let mut waiting = waiting.borrow_mut();
                let slot = reply.origin.slot as usize;
                if waiting.get(slot).is_some_and(|w| w.0 == reply.origin.serial) {
                    let _ = waiting.remove(slot).1.send(reply);
                }
            }
        });
        this
    }

    /// How many.
    #[must_use]
    pub fn count(&self) -> u16 {
        self.links.len() as u16
    }

    /// Ask one shard.
    ///
    /// # Errors
    /// [`NoAnswer`].
    pub async fn ask(&self, shard: u16, copyset: CopysetId, op: RequestOp) -> Result<Reply, NoAnswer> {
        self.order(shard, |origin| Order::Ask(Request { copyset, op, origin })).await
    }

    /// Have whoever leads the copyset do something on a chunk. Not done for a passing reason, as [`Outcome::NotLeader`]
    /// while nobody is known to lead: ask again.
    ///
    /// # Errors
    /// [`NoAnswer`].
    ///
    /// [`Outcome::NotLeader`]: crate::shard::request::Outcome::NotLeader
    pub async fn errand(&self, copyset: CopysetId, homes: &[u64], chunk: u64, op: ChunkOp) -> Result<Reply, NoAnswer> {
        let homes = homes.to_vec();
        let order = |origin| Order::Errand { origin, copyset, homes, chunk, op };
        self.order(shard_of(copyset, self.count()), order).await
    }

    async fn order(&self, shard: u16, order: impl FnOnce(Origin) -> Order) -> Result<Reply, NoAnswer> {
        let (out, answer) = oneshot::channel();
        let serial = {
            let mut serial = self.serial.borrow_mut();
            *serial = serial.wrapping_add(1);
            *serial
        };
        let slot = self.waiting.borrow_mut().insert((serial, out));
        let origin = Origin { shard: CONTROL, slot: slot as u32, serial };
        let mut order = order(origin);
        let link = self.links.get(usize::from(shard)).ok_or(NoAnswer)?;
        loop {
            match link.try_send(order) {
                Ok(()) => break,
                Err(TrySendError::Disconnected(_)) => {
                    self.waiting.borrow_mut().try_remove(slot);
                    return Err(NoAnswer);
                }
                Err(TrySendError::Full(back)) => {
                    order = back;
                    self.bells.ring(shard);
                    tokio::time::sleep(std::time::Duration::from_millis(1)).await;
                }
            }
        }
        self.bells.ring(shard);
        answer.await.map_err(|_| NoAnswer)
    }

    /// Ask the shard of a copyset.
    ///
    /// # Errors
    /// [`NoAnswer`].
    pub async fn ask_copyset(&self, copyset: CopysetId, op: RequestOp) -> Result<Reply, NoAnswer> {
        self.ask(shard_of(copyset, self.count()), copyset, op).await
    }

    /// Ask every shard the same.
    ///
    /// # Errors
    /// [`NoAnswer`], when one of them does not answer.
    pub async fn ask_all(&self, op: &AdminOp) -> Result<Vec<Reply>, NoAnswer> {
        let mut replies = Vec::new();
        for shard in 0..self.count() {
            replies.push(self.ask(shard, CopysetId(0), RequestOp::Admin(op.clone())).await?);
        }
        Ok(replies)
    }
}
