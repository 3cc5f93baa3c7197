//! Blocks that are applied but not yet on their slots, and the payloads they keep in memory.
//!
//! A block refers to a place in its payload, it owns nothing: one reference count per block on the payload's [`Pin`],
//! and the bytes of a payload count as dirty until its last block is written or superseded (rule 12).

use bytes::Bytes;
use raftlog::BLOCK;
use slab::Slab;
use std::collections::BTreeMap;

/// A payload that blocks refer to.
#[derive(Debug)]
struct Pin {
    payload: Bytes,
    refs: u32,
}

/// Place of one block in a payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PinRef {
    pin: u32,
    at: u32,
}

impl PinRef {
    /// The block behind this one in the same payload.
    pub(super) fn next(self) -> Self {
        Self { pin: self.pin, at: self.at + BLOCK as u32 }
    }
}

/// The payloads in use.
#[derive(Debug, Default)]
pub(super) struct Pins {
    pins: Slab<Pin>,
    bytes: u64,
}

/// Bytes a payload keeps busy: buffers come in powers of two.
fn cost(payload: &Bytes) -> u64 {
    payload.len().next_power_of_two().max(BLOCK) as u64
}

impl Pins {
    /// Hold `payload` for each of its blocks; returns the first one's place. Every block must be released once.
    pub(super) fn hold(&mut self, payload: Bytes) -> PinRef {
        let refs = (payload.len() / BLOCK) as u32;
        assert!(refs > 0, "a payload has at least one block");
        self.bytes += cost(&payload);
        PinRef { pin: self.pins.insert(Pin { payload, refs }) as u32, at: 0 }
    }

    /// One more reference to a block that is held already.
    pub(super) fn share(&mut self, block: PinRef) {
        self.pins[block.pin as usize].refs += 1;
    }

    /// Drop one reference.
    pub(super) fn release(&mut self, block: PinRef) {
        let pin = &mut self.pins[block.pin as usize];
        pin.refs -= 1;
        if pin.refs == 0 {
            let pin = self.pins.remove(block.pin as usize);
            self.bytes -= cost(&pin.payload);
        }
    }

    /// The bytes of `blocks` blocks from `first` on.
    pub(super) fn slice(&self, first: PinRef, blocks: u32) -> Bytes {
        let at = first.at as usize;
        self.pins[first.pin as usize].payload.slice(at..at + blocks as usize * BLOCK)
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// A block not yet on its slot.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dirty {
    /// Where its bytes are.
    pub(super) at: PinRef,
    /// CRC32C of its bytes.
    pub(super) crc: u32,
    /// Log index it was written at.
    pub(super) index: u64,
    /// Lowest log index of this block that neither is on the slot nor will be when the running round is over.
    pub(super) oldest: u64,
    /// This version is being written by the running round.
    pub(super) captured: bool,
}

/// The dirty blocks of a chunk, by block number.
#[derive(Debug, Default)]
pub(super) struct Overlay {
    blocks: BTreeMap<u32, Dirty>,
}

impl Overlay {
    pub(super) fn put(&mut self, pins: &mut Pins, block: u32, mut dirty: Dirty) {
        if let Some(old) = self.blocks.get(&block) {
            if !old.captured {
                dirty.oldest = old.oldest.min(dirty.oldest);
            }
            pins.release(old.at);
        }
        self.blocks.insert(block, dirty);
    }

    pub(super) fn get(&self, block: u32) -> Option<&Dirty> {
        self.blocks.get(&block)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &Dirty)> {
        self.blocks.iter().map(|(&block, dirty)| (block, dirty))
    }

    /// All blocks, for a round that takes them.
    pub(super) fn capture(&mut self) -> impl Iterator<Item = (u32, &Dirty)> {
        self.blocks.iter_mut().map(|(&block, dirty)| {
            dirty.captured = true;
            (block, &*dirty)
        })
    }

    /// Version `index` of `block` is on the slot. True if that is the newest version; then it is no longer dirty.
    pub(super) fn written(&mut self, pins: &mut Pins, block: u32, index: u64) -> bool {
        match self.blocks.get_mut(&block) {
            Some(dirty) if dirty.index == index => {
                pins.release(dirty.at);
                self.blocks.remove(&block);
                true
            }
            _ => false,
        }
    }

    /// Forget the blocks of a range.
    pub(super) fn drop_range(&mut self, pins: &mut Pins, range: std::ops::Range<u32>) {
        while let Some((&block, dirty)) = self.blocks.range(range.clone()).next() {
            pins.release(dirty.at);
            self.blocks.remove(&block);
        }
    }
}
