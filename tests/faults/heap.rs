//! The global allocator of these tests: the system's, with the bytes that each thread holds.
//!
//! Owns one number for each thread. A test runs in a thread of its own, and the stack in no other, so what
//! a fault leaves behind shows here, whatever the tests beside it do.
#![allow(
    unsafe_code,
    reason = "`GlobalAlloc` can't be implemented without; each call goes on to `System` as it came"
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Once;

use tapgate::sys::memory;

thread_local! {
    static HELD: Cell<i64> = const { Cell::new(0) };
}

/// Has rings cost nothing until they are written to, as the program does (`sys/memory.rs`).
pub(crate) fn map_large_allocations() {
    static ONCE: Once = Once::new();
    ONCE.call_once(memory::map_large_allocations);
}

/// Bytes that this thread took and did not give back.
pub(crate) fn held() -> i64 {
    HELD.get()
}

/// Counts `taken` bytes and `given` back.
fn count(taken: usize, given: usize) {
    let signed = |bytes| i64::try_from(bytes).unwrap_or(i64::MAX);
    // A thread that is ending has no number any more.
    let _ = HELD.try_with(|held| held.set(held.get() + signed(taken) - signed(given)));
}

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: every method passes its arguments on to `System`, which keeps the trait's contract; counting
// neither allocates (the number needs no initialization) nor unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: the caller keeps the contract of `alloc`, which is `System`'s as well.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: the caller keeps the contract of `alloc_zeroed`, which is `System`'s as well.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count(new_size, layout.size());
        // SAFETY: `ptr` came from `System` by the methods here, with this layout.
        unsafe { System.realloc(ptr, layout, new_size) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        count(0, layout.size());
        // SAFETY: `ptr` came from `System` by the methods here, with this layout.
        unsafe { System.dealloc(ptr, layout) }
    }
}
