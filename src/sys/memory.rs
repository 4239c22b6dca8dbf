//! Memory and entropy, of the allocator and the kernel.
//!
//! Rings of a mebibyte are allocated zeroed for TCP flows, cost nothing until written, and may be refused; the
//! rest is asked for once at start.

use std::alloc::{self, Layout};
use std::io;
use std::ops::Range;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

/// Allocations from this size on get pages of their own and give them back when freed.
#[cfg(target_env = "gnu")]
const OWN_PAGES: i32 = 256 * 1024;

/// Keeps large allocations out of the heap: glibc raises its threshold with every large block that
/// is freed (mallopt(3)), after which zeroed memory is written, not mapped, and is never returned. Threads
/// share one heap: there are few, and they seldom allocate.
pub fn map_large_allocations() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt takes two integers and changes the allocator's settings; called before any
    // thread is started.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, OWN_PAGES);
    }
    #[cfg(target_env = "gnu")]
    // SAFETY: as above.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Gives the heap's free pages back, those below what is still in use, too: of itself the allocator returns only
/// what is free at its end (malloc_trim(3)).
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the call changes nothing that is allocated, and may be made at any time by any thread.
    unsafe {
        libc::malloc_trim(0);
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

/// Gives back the pages of program text that setting up has touched; what is needed again the kernel reads
/// again. For processes that will do little from now on.
///
/// # Errors
/// When no `/proc` is mounted.
pub fn release_text() -> io::Result<()> {
    for line in std::fs::read_to_string("/proc/self/maps")?.lines() {
        if let Some((start, length)) = text_mapping(line) {
            // SAFETY: a private mapping of a file's executable part, to which nothing is ever written, so
            // the same bytes are there at the next access.
            unsafe { libc::madvise(start as *mut libc::c_void, length, libc::MADV_DONTNEED) };
        }
    }
    Ok(())
}

/// Place and length of the mapping that a line of proc_pid_maps(5) tells of, if that is program text.
fn text_mapping(line: &str) -> Option<(usize, usize)> {
    let mut words = line.split_ascii_whitespace();
    let (first, last) = words.next()?.split_once('-')?;
    let is_text = words.next()? == "r-xp" && words.nth(3)?.starts_with('/');
    let (first, last) = (
        usize::from_str_radix(first, 16).ok()?,
        usize::from_str_radix(last, 16).ok()?,
    );
    is_text.then(|| (first, last.saturating_sub(first)))
}

/// Address space that this process may still take, bytes; none where that has no limit (getrlimit(2),
/// `RLIMIT_AS`, `RLIMIT_DATA`), or no `/proc` tells how much it has.
#[must_use]
pub fn address_space_left() -> Option<u64> {
    let left = |resource, name: &str| {
        let (limit, _) = getrlimit(resource).ok()?;
        let text = std::fs::read_to_string("/proc/self/status").ok()?;
        // proc_pid_status(5): in kibibytes.
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        let taken: u64 = line.split_ascii_whitespace().next()?.parse().ok()?;
        (limit != RLIM_INFINITY).then(|| limit.saturating_sub(taken * 1024))
    };
    let all = left(Resource::RLIMIT_AS, "VmSize:");
    let data = left(Resource::RLIMIT_DATA, "VmData:");
    all.into_iter().chain(data).min()
}

/// Zeroed bytes, whose pages are committed when they are first written to; none where there is no
/// memory, or no address space.
#[must_use]
pub fn zeroed(len: usize) -> Option<Vec<u8>> {
    let layout = Layout::array::<u8>(len).ok().filter(|_| len > 0)?;
    // SAFETY: the layout is not of size zero.
    let start = unsafe { alloc::alloc_zeroed(layout) };
    if start.is_null() {
        return None;
    }
    // SAFETY: the memory came from the global allocator with the layout of that many bytes, and every
    // one of them is initialized.
    Some(unsafe { Vec::from_raw_parts(start, len, len) })
}

/// Where a block of memory lies that somebody else owns, and goes on using.
#[derive(Debug)]
pub(crate) struct Pages {
    start: usize,
    len: usize,
}

impl Pages {
    /// Those of a block that lives for as long as this is used.
    #[must_use]
    pub(crate) fn of(block: &mut [u8]) -> Self {
        Self {
            start: block.as_mut_ptr().expose_provenance(),
            len: block.len(),
        }
    }

    /// Gives back the pages that lie wholly within some bytes of the block (madvise(2), `MADV_DONTNEED`): these are zero
    /// from now on. Nobody may look at the block meanwhile, which who has the owner for himself sees to.
    pub(crate) fn give_back(&mut self, bytes: Range<usize>) {
        let page = page_size();
        let end = bytes.end.min(self.len);
        let first = (self.start + bytes.start).next_multiple_of(page);
        let last = (self.start + end) / page * page;
        if first < last {
            // SAFETY: the range lies within a block that lives, of bytes, which may have any value, and to which no
            // reference is in use during the call; private anonymous memory, as all of the allocator's is.
            unsafe {
                libc::madvise(
                    std::ptr::with_exposed_provenance_mut(first),
                    last - first,
                    libc::MADV_DONTNEED,
                )
            };
        }
    }
}

fn page_size() -> usize {
    // SAFETY: the call takes a number and gives one.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).unwrap_or(65_536)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_within_are_given_back_and_nothing_else() {
        const LEN: usize = 1 << 20;
        let mut block = zeroed(LEN).unwrap();
        block.fill(7);
        let mut pages = Pages::of(&mut block);
        pages.give_back(100_000..300_001);
        pages.give_back(LEN - 10..LEN + 100_000);
        pages.give_back(5..6);
        let page = page_size();
        let zeros: Vec<_> = (0..LEN).filter(|at| block[*at] == 0).collect();
        assert!((100_000..100_000 + page).contains(&zeros[0]));
        assert!((300_001 - page..300_001).contains(zeros.last().unwrap()));
        assert_eq!(zeros.len() % page, 0);
    }

    #[test]
    fn program_text_is_told_from_other_mappings() {
        let text = "55a0-75a0 r-xp 0006e000 fd:00 123  /usr/bin/tapgate";
        assert_eq!(text_mapping(text), Some((0x55a0, 0x2000)));
        for other in [
            "55a0-75a0 r--p 00000000 fd:00 123  /usr/bin/tapgate",
            "55a0-75a0 rwxp 00000000 fd:00 123  /usr/bin/tapgate",
            "55a0-75a0 r-xp 00000000 00:00 0  [vdso]",
            "55a0-75a0 r-xp 00000000 00:00 0",
            "",
        ] {
            assert_eq!(text_mapping(other), None, "{other}");
        }
        release_text().unwrap();
    }
}
