//! An allocator that counts, per thread: how often, how much lives, and how much lived at most.
//!
//! A single allocation of more than [`SINGLE_MAX`] ends the process: it says who asked for it, which a failed
//! allocation would not.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::Write;

/// Nothing asks for so much at once but a length that was believed.
const SINGLE_MAX: usize = 1 << 30;

thread_local! {
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
    static COUNT: Cell<u64> = const { Cell::new(0) };
    static WATCH: Cell<Option<fn(usize)>> = const { Cell::new(None) };
    static WHERE: Cell<(&'static str, u64, u64)> = const { Cell::new(("", 0, 0)) };
}

/// The allocator; a test binary makes it the global one.
pub(crate) struct Counting;

// SAFETY: every call goes to the system's allocator with the same arguments; the counters are plain cells of the thread,
// which need no memory and no destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        let _ = LIVE.try_with(|live| live.set(live.get() - layout.size() as isize));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(ptr, layout) }
    }
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new: usize) -> *mut u8 {
        let _ = LIVE.try_with(|live| live.set(live.get() - layout.size() as isize));
        grown(new);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.realloc(ptr, layout, new) }
    }
}

fn grown(size: usize) {
    if size > SINGLE_MAX {
        absurd(size);
    }
    let _ = LIVE.try_with(|live| {
        live.set(live.get() + size as isize);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(live.get())));
    });
    let _ = COUNT.try_with(|count| count.set(count.get() + 1));
    // Taken out while it runs: what it allocates is not watched.
    if let Ok(Some(watch)) = WATCH.try_with(Cell::take) {
        watch(size);
        let _ = WATCH.try_with(|cell| cell.set(Some(watch)));
    }
}

fn absurd(size: usize) -> ! {
    let mut text = [0; 256];
    let mut rest = &mut text[..];
    let (what, seed, index) = WHERE.get();
    let _ = writeln!(rest, "{size} bytes asked for at once: {what}, seed {seed}, input {index}");
    let _ = std::io::stderr().write_all(&text);
    std::process::abort();
}

/// What this thread is about, for the message of an absurd allocation.
pub(crate) fn at(what: &'static str, seed: u64, index: u64) {
    WHERE.set((what, seed, index));
}

/// What [`at`] said last.
pub(crate) fn place() -> (&'static str, u64, u64) {
    WHERE.get()
}

/// Bytes this thread has allocated and not freed.
pub(crate) fn live() -> isize {
    LIVE.get()
}

/// Forget the peak; returns what lives now.
pub(crate) fn mark() -> isize {
    PEAK.set(LIVE.get());
    LIVE.get()
}

/// Most bytes that lived since [`mark`].
pub(crate) fn peak() -> isize {
    PEAK.get()
}

/// Allocations of this thread so far.
pub(crate) fn count() -> u64 {
    COUNT.get()
}

/// Call `watch` with the size of every allocation of this thread from now on.
pub(crate) fn watch(watch: Option<fn(usize)>) {
    WATCH.set(watch);
}
