//! Memory and entropy: what the allocator and the kernel are asked for once at start.
//!
//! Rings of a mebibyte are allocated zeroed for each TCP flow and must cost nothing until written.

use std::io;

/// Allocations from this size on get pages of their own and give them back when freed.
#[cfg(target_env = "gnu")]
const OWN_PAGES: i32 = 256 * 1024;

/// Keeps large allocations out of the heap: glibc raises its threshold with every large block that
/// is freed (mallopt(3)), after which zeroed memory is written, not mapped, and is never returned.
pub fn map_large_allocations() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt takes two integers and changes the allocator's settings; called before any
    // thread is started.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, OWN_PAGES);
    }
}

/// Keeps the kernel from turning sparsely written rings into huge pages, which would commit all of
/// them (prctl(2), `PR_SET_THP_DISABLE`); matters where huge pages are "always" on.
///
/// # Errors
/// On kernels without huge pages, where there is nothing to keep from.
pub fn keep_pages_small() -> io::Result<()> {
    Ok(nix::sys::prctl::set_thp_disable(true)?)
}

/// Numbers from the system's entropy (getrandom(2)).
///
/// # Errors
/// On kernels before 3.17.
pub fn entropy() -> io::Result<[u64; 4]> {
    let mut bytes = [0_u8; 32];
    // SAFETY: the pointer and the length are those of a live array that the call writes to.
    let written = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    // Up to 256 bytes come whole or not at all.
    if usize::try_from(written) != Ok(bytes.len()) {
        return Err(io::Error::last_os_error());
    }
    let mut numbers = [0; 4];
    for (number, chunk) in numbers.iter_mut().zip(bytes.as_chunks::<8>().0) {
        *number = u64::from_ne_bytes(*chunk);
    }
    Ok(numbers)
}
