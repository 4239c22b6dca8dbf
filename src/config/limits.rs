//! How many flows there may be, and how much their buffers may hold, where nobody said: what the memory that this
//! process may have allows.
//!
//! Comes in: limits on memory. Goes out: limits that stay below them with room to spare, so that it is a new flow that
//! is refused, never an allocation that fails or a process that is killed. Nothing is taken for what a guest has not
//! asked for; these are bounds.

use super::{Config, DEFAULT_MAX_BUFFER_MEMORY, DEFAULT_MAX_FLOWS, MIN_MAX_BUFFER_MEMORY};

/// Resident memory of all our processes together at rest, and what the kernel holds for them, bytes: twice
/// what was measured.
const AT_REST: u64 = 16 << 20;
/// What a flow costs, bytes, while buffers hold all that they may together: 1 KiB here, and in the kernel a socket, its file
/// and its place in an epoll set (5 KiB were measured on Linux 6.18), an engine, and of its rings what has room even so
/// (`flow/tcp_open.rs`, `LITTLE`), a segment each way and the rest of each one's last page.
const FLOW: u64 = 24 << 10;
/// The part of it that is of this process's address space, tables that double included.
const FLOW_HERE: u64 = 4 << 10;
/// The least that is of any use.
const LEAST_FLOWS: u64 = 64;

/// The memory that this process may have; none where it has no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Memory {
    /// Resident memory, the kernel's for its sockets included, bytes: a control group's limit.
    pub resident: Option<u64>,
    /// Address space that is left, bytes (`RLIMIT_AS`, `RLIMIT_DATA`).
    pub address_space: Option<u64>,
}

impl Config {
    /// Lets the limits follow the memory that there is: a quarter for buffers and the rest for flows of what a control
    /// group leaves, half for rings and a quarter for flows of the address space.
    pub fn fit(&mut self, memory: Memory) {
        let (mut flows, mut buffers) = (u64::from(DEFAULT_MAX_FLOWS), DEFAULT_MAX_BUFFER_MEMORY);
        if let Some(resident) = memory.resident {
            let free = resident.saturating_sub(AT_REST);
            let least = MIN_MAX_BUFFER_MEMORY as u64;
            let for_buffers = (free / 4).clamp(least, buffers as u64);
            buffers = usize::try_from(for_buffers).unwrap_or(buffers);
            flows = flows.min(free.saturating_sub(for_buffers) / FLOW);
        }
        if let Some(space) = memory.address_space {
            flows = flows.min(space / 4 / FLOW_HERE);
            self.ring_space = usize::try_from(space / 2).unwrap_or(usize::MAX);
        }
        self.max_flows = u32::try_from(flows.max(LEAST_FLOWS)).unwrap_or(DEFAULT_MAX_FLOWS);
        self.max_buffer_memory = buffers.max(MIN_MAX_BUFFER_MEMORY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fitted(memory: Memory) -> (u32, usize, usize) {
        let mut config = Config::default();
        config.fit(memory);
        (
            config.max_flows,
            config.max_buffer_memory,
            config.ring_space,
        )
    }

    fn resident(bytes: u64) -> Memory {
        Memory {
            resident: Some(bytes),
            ..Memory::default()
        }
    }

    #[test]
    fn limits_follow_memory() {
        let most = (DEFAULT_MAX_FLOWS, DEFAULT_MAX_BUFFER_MEMORY, usize::MAX);
        assert_eq!(fitted(Memory::default()), most);
        assert_eq!(fitted(resident(4 << 30)), most);
        assert_eq!(fitted(resident(64 << 20)), (1536, 12 << 20, usize::MAX));
        assert_eq!(fitted(resident(0)), (64, 1 << 20, usize::MAX));
        let space = Memory {
            address_space: Some(40 << 20),
            ..Memory::default()
        };
        let (flows, buffers, rings) = fitted(space);
        assert_eq!((flows, buffers, rings), (2560, most.1, 20 << 20));
    }

    #[test]
    fn what_is_promised_is_there() {
        for mebibytes in 19..4096 {
            let free = (mebibytes << 20) - AT_REST;
            let (flows, buffers, _) = fitted(resident(mebibytes << 20));
            let buffers = u64::try_from(buffers).unwrap();
            assert!(u64::from(flows) * FLOW + buffers <= free, "{mebibytes} MiB");
        }
    }
}
