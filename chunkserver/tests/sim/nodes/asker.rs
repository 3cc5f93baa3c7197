//! Asks several replicas something, each again and again until it gives an answer that will do.

use super::client::Links;
use crate::codec::{self, Frame};
use crate::run::Actor;
use crate::world::{ActorEvent, World};
use bytes::BytesMut;
use std::collections::BTreeSet;

/// Node, copyset, chunk (0 if it is about the whole replica).
pub(super) type Part = (usize, u64, u64);

/// An answer: whether it will do.
pub(super) type Answered = dyn FnMut(Part, &Frame) -> bool;

pub(super) struct Asker {
    pub(super) me: usize,
    pub(super) links: Links,
    pub(super) left: BTreeSet<Part>,
    /// Between two attempts, ns.
    pub(super) pause: u64,
    /// Service and method.
    pub(super) call: (&'static str, &'static str),
    pub(super) body: fn(Part) -> BytesMut,
    pub(super) answered: Box<Answered>,
}

impl Asker {
    fn ask(&mut self, world: &mut World) {
        for &(node, copyset, chunk) in &self.left {
            let Some(conn) = self.links.ready(world, self.me, node) else { continue };
            let id = (node as u64) << 56 | copyset << 32 | chunk;
            let body = (self.body)((node, copyset, chunk));
            world.send(self.me, conn, codec::request(self.call.0, self.call.1, id, &body, &[]));
        }
        world.tell_at(world.now() + self.pause, self.me, ActorEvent::Timer(0));
    }
}

impl Actor for Asker {
    fn event(&mut self, world: &mut World, event: ActorEvent) {
        match event {
            ActorEvent::Connected(conn) => {
                self.links.connected(conn);
                self.ask(world);
            }
            ActorEvent::Readable(conn) => {
                for frame in self.links.receive(world, self.me, conn).expect("frames") {
                    let id = frame.correlation;
                    let part = ((id >> 56) as usize, id >> 32 & 0xff_ffff, id & 0xffff_ffff);
                    if frame.error == 0 && self.left.contains(&part) && (self.answered)(part, &frame) {
                        self.left.remove(&part);
                    }
                }
            }
            ActorEvent::Closed(conn) => drop(self.links.closed(world, self.me, conn)),
            ActorEvent::Start | ActorEvent::Timer(_) if !self.done() => self.ask(world),
            _ => {}
        }
    }
    fn done(&self) -> bool {
        self.left.is_empty()
    }
}
