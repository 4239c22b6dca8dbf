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
/// What a flow at rest costs, bytes: 1 KiB here, and in the kernel a socket, its file and its place in an epoll set. Two
/// thirds of this were measured on Linux 6.18.
const FLOW: u64 = 8 << 10;
/// What a flow costs beside that while it moves and buffers hold all that they may together, bytes: an engine, a page that
/// tells the kernel of its rings, and of these what has room even so (`flow/tcp_open/saving.rs`, `LITTLE`), whole pages.
const ENGINE: u64 = 24 << 10;
/// A segment each way, which always has room, fits this beside that at an MTU of 1500; each byte more is needed twice.
const USUAL_MTU: u64 = 1500;
/// The part of it that is of this process's address space, tables that double included.
const FLOW_HERE: u64 = 4 << 10;
/// Address space of one that moves ([`Config::ring_space`]).
const ENGINE_SPACE: usize = 2 << 20;
/// What a worker takes beside the first, bytes: its batches and what may wait for it, and its thread's stack.
const WORKER: u64 = 8 << 20;
/// The least that is of any use.
const LEAST_FLOWS: u64 = 64;
const LEAST_ENGINES: usize = 8;

/// The memory that this process may have; none where it has no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Memory {
    /// Resident memory, the kernel's for its sockets included, bytes: a control group's limit.
    pub resident: Option<u64>,
    /// Address space that is left, bytes (`RLIMIT_AS`, `RLIMIT_DATA`).
    pub address_space: Option<u64>,
}

impl Config {
    /// Lets the limits follow the memory that there is: half for flows, a quarter for buffers and a quarter for what
    /// flows that move hold beyond that limit, of what a control group leaves; half for rings and a quarter for flows of the
    /// address space. The MTU must be there, and the number of workers.
    pub fn fit(&mut self, memory: Memory) {
        let others = WORKER * (self.workers as u64).saturating_sub(1);
        let (mut flows, mut buffers) = (u64::from(DEFAULT_MAX_FLOWS), DEFAULT_MAX_BUFFER_MEMORY);
        if let Some(resident) = memory.resident {
            let free = resident.saturating_sub(AT_REST + others);
            flows = flows.min(free / 2 / FLOW);
            buffers = buffers.min(usize::try_from(free / 4).unwrap_or(buffers));
            let engine = ENGINE + 2 * u64::from(self.mtu).saturating_sub(USUAL_MTU);
            let engines = usize::try_from(free / 4 / engine).unwrap_or(usize::MAX);
            self.ring_space = engines.max(LEAST_ENGINES).saturating_mul(ENGINE_SPACE);
        }
        if let Some(space) = memory.address_space {
            let space = space.saturating_sub(others);
            flows = flows.min(space / 4 / FLOW_HERE);
            let space = usize::try_from(space / 2).unwrap_or(usize::MAX);
            self.ring_space = self.ring_space.min(space);
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
        let (flows, buffers, rings) = fitted(resident(4 << 30));
        assert_eq!((flows, buffers), (most.0, most.1));
        assert!(rings > 20_000 * ENGINE_SPACE);
        let rings = |engines| engines * ENGINE_SPACE;
        assert_eq!(fitted(resident(64 << 20)), (3072, 12 << 20, rings(512)));
        assert_eq!(fitted(resident(0)), (64, 1 << 20, rings(LEAST_ENGINES)));
        let space = Memory {
            address_space: Some(40 << 20),
            ..Memory::default()
        };
        let (flows, buffers, rings) = fitted(space);
        assert_eq!((flows, buffers, rings), (2560, most.1, 20 << 20));
        let mut shared = Config {
            workers: 3,
            ..Config::default()
        };
        shared.fit(space);
        assert_eq!((shared.max_flows, shared.ring_space), (1536, 12 << 20));
    }

    #[test]
    fn what_is_promised_is_there() {
        let kinds = [(1500, 1), (65_520, 1), (1500, 4)];
        for (mebibytes, (mtu, workers)) in (24..4096).flat_map(|mib| kinds.map(|it| (mib, it))) {
            if mebibytes < 24 + 8 * (workers as u64 - 1) {
                continue;
            }
            let free = (mebibytes << 20) - AT_REST - (workers as u64 - 1) * WORKER;
            let mut config = Config {
                mtu,
                workers,
                ..Config::default()
            };
            config.fit(resident(mebibytes << 20));
            let [buffers, engines] = [config.max_buffer_memory, config.ring_space / ENGINE_SPACE];
            // What doc/architecture.md says that a flow has room for at the limit, in whole pages.
            let segments = 2 * u64::from(mtu).next_multiple_of(4096);
            let held = engines as u64 * ((8 << 10) + segments) + buffers as u64;
            let flows = u64::from(config.max_flows) * FLOW;
            assert!(flows + held <= free, "{mebibytes} MiB, MTU {mtu}");
        }
    }
}
