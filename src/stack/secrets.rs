//! Unpredictable numbers: a keyed pseudo-random function over a counter.
//!
//! Comes in: a seed from the system's entropy, once. Goes out: numbers that a guest can't guess
//! from others it has seen (RFC 6056, RFC 6528). Deterministic by seed, so tests can repeat a run.

use std::hash::{Hash, Hasher};

use siphasher::sip::SipHasher24;

/// The generator.
#[derive(Debug, Clone)]
pub struct Secrets {
    seed: [u64; 4],
    counter: u64,
}

impl Secrets {
    /// A generator of its own kind for each seed.
    #[must_use]
    pub const fn new(seed: [u64; 4]) -> Self {
        Self { seed, counter: 0 }
    }

    /// The key of hash tables whose keys a guest chooses.
    #[must_use]
    pub const fn hash_key(&self) -> (u64, u64) {
        (self.seed[2], self.seed[3])
    }

    /// A number that belongs to a value: the same each time, and not to be guessed from it.
    #[must_use]
    pub fn fingerprint(&self, value: &impl Hash) -> u16 {
        let mut hasher = SipHasher24::new_with_keys(self.seed[2], self.seed[3]);
        value.hash(&mut hasher);
        let [a, b, ..] = hasher.finish().to_be_bytes();
        u16::from_be_bytes([a, b])
    }

    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.counter += 1;
        let mut hasher = SipHasher24::new_with_keys(self.seed[0], self.seed[1]);
        hasher.write_u64(self.counter);
        hasher.finish()
    }

    /// The next 32-bit number.
    pub fn next_u32(&mut self) -> u32 {
        let [a, b, c, d, ..] = self.next_u64().to_be_bytes();
        u32::from_be_bytes([a, b, c, d])
    }

    /// The next 16-bit number.
    pub fn next_u16(&mut self) -> u16 {
        let [a, b, ..] = self.next_u64().to_be_bytes();
        u16::from_be_bytes([a, b])
    }

    /// An ephemeral port (RFC 6335: 49152 to 65535).
    pub fn next_port(&mut self) -> u16 {
        49152 + (self.next_u16() & 0x3fff)
    }
}
