//! Several workers behind one link: which of them a guest's frame comes to, and who else there is.
//!
//! In: frames both ways. Out: the number of a worker, as the kernel's tap would choose it: the one that sent
//! the last frame of a flow, or, once that is forgotten (which here may be at any time), one by the flow's hash.

use std::collections::HashMap;

use tapgate::host::simulated::SimulatedHost;
use tapgate::stack::Stack;

use super::Random;

/// A worker beside the first.
pub(crate) struct Other {
    pub(crate) stack: Stack<SimulatedHost>,
    pub(crate) host: SimulatedHost,
}

/// The queues of a link.
pub(crate) struct Queues {
    count: usize,
    learned: HashMap<Vec<u8>, usize>,
    random: Random,
}

impl Queues {
    pub(crate) fn new(count: usize, seed: u64) -> Self {
        Self {
            count,
            learned: HashMap::new(),
            random: Random::new(seed),
        }
    }

    pub(crate) const fn count(&self) -> usize {
        self.count
    }

    /// A worker has sent a frame to the guest.
    pub(crate) fn note(&mut self, frame: &[u8], worker: usize) {
        if self.count > 1 {
            self.learned.insert(flow(frame), worker);
        }
    }

    /// The worker that a frame of the guest's comes to.
    pub(crate) fn choose(&mut self, frame: &[u8]) -> usize {
        if self.count == 1 {
            return 0;
        }
        let flow = flow(frame);
        let remembers = self.random.below(4) > 0;
        match self.learned.get(&flow) {
            Some(worker) if remembers => *worker,
            Some(_) | None => {
                // FNV-1a.
                let hash = flow.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
                    (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
                });
                usize::try_from(hash >> 32).unwrap() % self.count
            }
        }
    }
}

/// What tells flows apart, the same both ways: addresses, and ports where the packet is no fragment.
fn flow(frame: &[u8]) -> Vec<u8> {
    let (addresses, protocol, at, fragment): (std::ops::Range<usize>, _, _, _) =
        match frame.get(12..14) {
            Some([8, 0]) if frame.len() >= 34 => {
                let header = usize::from(frame[14] & 15) * 4;
                let fragment = frame[20] & 0x3f != 0 || frame[21] != 0;
                (26..34, frame[23], 14 + header, fragment)
            }
            Some([0x86, 0xdd]) if frame.len() >= 54 => (22..54, frame[20], 54, false),
            _ => return Vec::new(),
        };
    let half = addresses.start.midpoint(addresses.end);
    let mut one = frame[addresses.start..half].to_vec();
    let mut other = frame[half..addresses.end].to_vec();
    if matches!(protocol, 6 | 17) && !fragment && frame.len() >= at + 4 {
        one.extend(&frame[at..at + 2]);
        other.extend(&frame[at + 2..at + 4]);
    }
    if one > other {
        std::mem::swap(&mut one, &mut other);
    }
    one.extend(other);
    one
}
