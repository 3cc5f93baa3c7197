//! Aligned buffers from fixed pools, as `Bytes`. One of the two rooms with `unsafe`.
//!
//! An [`Arena`] is one mapping, cut by a buddy allocator into power-of-two pieces of at least 4 KiB. Its owner
//! allocates; anyone may drop. A drop on another thread goes through a lock-free stack that the owner empties when it
//! allocates, so no lock is on the data path.

use bytes::Bytes;
use std::cell::UnsafeCell;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::thread::ThreadId;

/// Smallest piece and alignment, bytes.
pub const BLOCK: usize = 4096;
const ORDERS: usize = 16; // 4 KiB .. 128 MiB
const NIL: u32 = u32::MAX;

/// Intrusive links of the remote-free stack, written into the freed memory itself.
#[repr(C)]
struct RemoteFree {
    next: *mut Self,
    order: u32,
}

/// Buddy state; touched by the owning thread alone.
struct Buddy {
    /// Head of the free list per order, as block numbers.
    heads: [u32; ORDERS],
    /// Doubly linked free lists by block number.
    next: Vec<u32>,
    prev: Vec<u32>,
    /// Order of the free piece that starts at this block, 0xff when none does.
    free_order: Vec<u8>,
    top: usize,
}

impl Buddy {
    fn new(blocks: usize) -> Self {
        let mut buddy = Self {
            heads: [NIL; ORDERS],
            next: vec![NIL; blocks],
            prev: vec![NIL; blocks],
            free_order: vec![0xff; blocks],
            top: ORDERS - 1,
        };
        let mut at = 0usize;
        while at < blocks {
            let fits = (usize::BITS - 1 - (blocks - at).leading_zeros()) as usize;
            let aligned = if at == 0 { ORDERS - 1 } else { at.trailing_zeros() as usize };
            let order = fits.min(aligned).min(buddy.top);
            buddy.push(at as u32, order);
            at += 1 << order;
        }
        buddy
    }
    fn push(&mut self, block: u32, order: usize) {
        let head = self.heads[order];
        self.next[block as usize] = head;
        self.prev[block as usize] = NIL;
        if head != NIL {
            self.prev[head as usize] = block;
        }
        self.heads[order] = block;
        self.free_order[block as usize] = order as u8;
    }
    fn unlink(&mut self, block: u32, order: usize) {
        let (next, prev) = (self.next[block as usize], self.prev[block as usize]);
        if prev == NIL {
            self.heads[order] = next;
        } else {
            self.next[prev as usize] = next;
        }
        if next != NIL {
            self.prev[next as usize] = prev;
        }
        self.free_order[block as usize] = 0xff;
    }
    fn alloc(&mut self, order: usize) -> Option<u32> {
        let mut from = (order..ORDERS).find(|&o| self.heads[o] != NIL)?;
        let block = self.heads[from];
        self.unlink(block, from);
        while from > order {
            from -= 1;
            self.push(block + (1 << from), from);
        }
        Some(block)
    }
    fn free(&mut self, mut block: u32, mut order: usize) {
        while order < self.top {
            let buddy = block ^ (1 << order);
            if (buddy as usize) >= self.free_order.len() || self.free_order[buddy as usize] != order as u8 {
                break;
            }
            self.unlink(buddy, order);
            block &= !(1 << order);
            order += 1;
        }
        self.push(block, order);
    }
}

/// A fixed pool of aligned memory. Allocation is for the thread that called [`Arena::adopt`] alone.
pub struct Arena {
    base: NonNull<u8>,
    len: usize,
    owner: std::sync::OnceLock<ThreadId>,
    buddy: UnsafeCell<Buddy>,
    remote: AtomicPtr<RemoteFree>,
    free_bytes: AtomicUsize,
}

// SAFETY: `buddy` is touched only by the owner thread (checked in `alloc` and `release`); everything else is atomic,
// and `base` is plain memory whose pieces are owned by exactly one `PoolBuf` each.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl std::fmt::Debug for Arena {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Arena").field("len", &self.len).field("free", &self.free_bytes()).finish()
    }
}

impl Arena {
    /// Map `len` bytes (rounded up to 4 KiB).
    ///
    /// # Errors
    /// The kernel's, when memory cannot be mapped.
    pub fn new(len: usize) -> std::io::Result<Arc<Self>> {
        let len = len.next_multiple_of(BLOCK).max(BLOCK);
        // SAFETY: an anonymous private mapping at an address of the kernel's choice aliases nothing.
        let base = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                len,
                rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE,
                rustix::mm::MapFlags::PRIVATE,
            )?
        };
        // All of it is touched at start: in huge pages that takes a fraction of the time. Without them it works too.
        // SAFETY: the range is the mapping just made; the advice changes nothing about its contents.
        let _ = unsafe { rustix::mm::madvise(base, len, rustix::mm::Advice::LinuxHugepage) };
        let base = NonNull::new(base.cast::<u8>()).ok_or(std::io::ErrorKind::OutOfMemory)?;
        Ok(Arc::new(Self {
            base,
            len,
            owner: std::sync::OnceLock::new(),
            buddy: UnsafeCell::new(Buddy::new(len / BLOCK)),
            remote: AtomicPtr::new(std::ptr::null_mut()),
            free_bytes: AtomicUsize::new(len),
        }))
    }

    /// Touch all of it, so that registering it takes no time. From any thread, also while it is in use.
    pub fn populate(&self) {
        // A piece at a time: the kernel holds the mapping's lock over each call.
        for at in (0..self.len).step_by(8 << 20) {
            let len = (self.len - at).min(8 << 20);
            // SAFETY: the range is within the mapping, which lives as long as `self`; the advice faults pages in and changes
            // no contents. A kernel that does not know it refuses, and nothing is lost.
            let _ = unsafe {
                rustix::mm::madvise(self.base.as_ptr().add(at).cast(), len, rustix::mm::Advice::LinuxPopulateWrite)
            };
        }
    }

    /// Make the calling thread the one that may allocate. The first caller of this or of `alloc` wins.
    pub fn adopt(&self) {
        let _ = self.owner.set(std::thread::current().id());
    }

    /// Start and length of the mapping, for registration with a ring.
    #[must_use]
    pub fn region(&self) -> (*const u8, usize) {
        (self.base.as_ptr(), self.len)
    }

    /// Size, bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        self.len
    }

    /// Bytes not handed out (pieces count with their rounded size).
    #[must_use]
    pub fn free_bytes(&self) -> usize {
        self.free_bytes.load(Ordering::Relaxed)
    }

    /// A buffer of `len` bytes (a multiple of 4 KiB, at least one block), contents unspecified but initialised.
    /// `None` when no piece is free.
    ///
    /// # Panics
    /// On a thread that is not the owner.
    #[must_use]
    pub fn alloc(self: &Arc<Self>, len: usize) -> Option<PoolBuf> {
        let owner = self.owner.get_or_init(|| std::thread::current().id());
        assert!(*owner == std::thread::current().id(), "an arena allocates on its own thread only");
        let blocks = len.div_ceil(BLOCK).max(1);
        let order = blocks.next_power_of_two().trailing_zeros() as usize;
        if order >= ORDERS {
            return None;
        }
        self.collect();
        // SAFETY: owner thread (asserted above); no other reference to the buddy lives across this call.
        let block = unsafe { (*self.buddy.get()).alloc(order)? };
        self.free_bytes.fetch_sub(BLOCK << order, Ordering::Relaxed);
        // SAFETY: the buddy hands out blocks inside the mapping only.
        let ptr = unsafe { NonNull::new_unchecked(self.base.as_ptr().add(block as usize * BLOCK)) };
        Some(PoolBuf { arena: Arc::clone(self), ptr, len: blocks * BLOCK, order: order as u32 })
    }

    /// Take back what other threads dropped. Owner thread only.
    fn collect(&self) {
        if self.remote.load(Ordering::Relaxed).is_null() {
            return;
        }
        let mut at = self.remote.swap(std::ptr::null_mut(), Ordering::Acquire);
        while !at.is_null() {
            // SAFETY: nodes on the stack were written by `release` into memory nobody else owns; the Acquire swap
            // makes those writes visible and takes the whole stack for us.
            let (next, order) = unsafe { ((*at).next, (*at).order) };
            self.put_back(at.cast::<u8>(), order);
            at = next;
        }
    }

    fn put_back(&self, ptr: *mut u8, order: u32) {
        let block = (ptr as usize - self.base.as_ptr() as usize) / BLOCK;
        // SAFETY: callers are on the owner thread.
        unsafe { (*self.buddy.get()).free(block as u32, order as usize) };
    }

    fn release(&self, ptr: NonNull<u8>, order: u32) {
        // Counted here and not when the owner collects it: an owner that waits for free bytes does not allocate.
        self.free_bytes.fetch_add(BLOCK << order, Ordering::Relaxed);
        if self.owner.get() == Some(&std::thread::current().id()) {
            self.put_back(ptr.as_ptr(), order);
            return;
        }
        let node = ptr.as_ptr().cast::<RemoteFree>();
        let mut head = self.remote.load(Ordering::Relaxed);
        loop {
            // SAFETY: the piece is at least 4 KiB, aligned, and was owned by the buffer being dropped.
            unsafe { node.write(RemoteFree { next: head, order }) };
            match self.remote.compare_exchange_weak(head, node, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: every `PoolBuf` holds an `Arc` of this arena, so none is left.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// A piece of an [`Arena`]: unique, writable, 4 KiB aligned; its length is a multiple of 4 KiB.
pub struct PoolBuf {
    arena: Arc<Arena>,
    ptr: NonNull<u8>,
    len: usize,
    order: u32,
}

// SAFETY: a `PoolBuf` is the only owner of its memory, and the arena's `release` is thread-safe.
unsafe impl Send for PoolBuf {}
// SAFETY: shared access is read-only.
unsafe impl Sync for PoolBuf {}

impl std::fmt::Debug for PoolBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PoolBuf").field("len", &self.len).finish_non_exhaustive()
    }
}

impl PoolBuf {
    /// Shrink to the first `len` bytes (a multiple of 4 KiB); the piece keeps its size in the pool.
    pub fn truncate(&mut self, len: usize) {
        assert!(len.is_multiple_of(BLOCK) && len <= self.len);
        self.len = len;
    }

    /// Share it, read-only; it returns to its arena when the last reference is dropped.
    #[must_use]
    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }

    /// Bytes this buffer pins in its arena (its size rounded up to the piece).
    #[must_use]
    pub fn pinned(&self) -> usize {
        BLOCK << self.order
    }
}

impl Deref for PoolBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the piece is ours, mapped (zeroed by the kernel, so initialised) and `len` bytes long.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}
impl DerefMut for PoolBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` is the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}
impl AsRef<[u8]> for PoolBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}
impl Drop for PoolBuf {
    fn drop(&mut self) {
        self.arena.release(self.ptr, self.order);
    }
}

/// Received bytes, on loan from the implementation of [`crate::io::Io`]; dropping it gives the space back.
#[derive(Debug)]
pub struct RecvBuf(Received);

#[derive(Debug)]
enum Received {
    Pooled(PoolBuf, usize),
    Shared(Bytes),
}

impl RecvBuf {
    /// Wrap received bytes.
    #[must_use]
    pub fn new(bytes: Bytes) -> Self {
        Self(Received::Shared(bytes))
    }

    /// The first `len` bytes of a pool buffer.
    #[must_use]
    pub fn pooled(buf: PoolBuf, len: usize) -> Self {
        assert!(len <= buf.len());
        Self(Received::Pooled(buf, len))
    }

    /// Whether it is on loan: to be given back within the turn.
    #[must_use]
    pub fn is_pooled(&self) -> bool {
        matches!(self.0, Received::Pooled(..))
    }
}

impl Deref for RecvBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match &self.0 {
            Received::Pooled(buf, len) => buf.get(..*len).unwrap_or(&[]),
            Received::Shared(bytes) => bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_do_not_overlap_and_come_back() {
        let arena = Arena::new(1 << 20).unwrap();
        let mut held = Vec::new();
        let mut seed = 7u64;
        for round in 0..2000u64 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let blocks = 1 + (seed >> 33) as usize % 9;
            if let Some(mut buf) = arena.alloc(blocks * BLOCK) {
                assert_eq!(buf.as_ptr() as usize % BLOCK, 0);
                buf.fill(round as u8);
                held.push((round as u8, buf));
            } else {
                assert!(!held.is_empty());
                for _ in 0..held.len().div_ceil(2) {
                    let (stamp, buf) = held.swap_remove(seed as usize % held.len());
                    assert!(buf.iter().all(|&b| b == stamp), "a piece was handed out twice");
                }
            }
        }
        drop(held);
        assert_eq!(arena.free_bytes(), 1 << 20);
        assert!(arena.alloc(1 << 20).is_some(), "all pieces merge again");
    }

    #[test]
    fn drops_on_other_threads_come_back() {
        let arena = Arena::new(64 * BLOCK).unwrap();
        for _ in 0..100 {
            let all: Vec<_> = std::iter::from_fn(|| arena.alloc(BLOCK)).map(PoolBuf::freeze).collect();
            assert_eq!(all.len(), 64);
            std::thread::spawn(move || drop(all)).join().unwrap();
            assert_eq!(arena.free_bytes(), 64 * BLOCK, "seen before the owner allocates again");
        }
        assert_eq!(arena.alloc(64 * BLOCK).map(|b| b.len()), Some(64 * BLOCK));
    }
}
