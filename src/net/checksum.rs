//! The Internet checksum (RFC 1071): sums over bytes, and pseudo-headers (RFC 793, RFC 8200 8.1).
//!
//! Comes in: byte slices. Goes out: folded 16-bit sums in host order. Sums are kept in 64 bits
//! and folded once, so that a 64 KiB payload needs no carry handling.

use std::net::IpAddr;

/// A running one's-complement sum.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sum(u64);

impl Sum {
    /// Adds bytes as big-endian 16-bit words; an odd last byte is padded with zero, so only the
    /// last slice added may have an odd length.
    #[must_use]
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        let mut chunks = bytes.chunks_exact(4);
        for chunk in &mut chunks {
            self.0 += u64::from(u32::from_be_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]));
        }
        self.0 += match *chunks.remainder() {
            [a, b, c] => u64::from(u32::from_be_bytes([a, b, c, 0])),
            [a, b] => u64::from(u16::from_be_bytes([a, b])),
            [a] => u64::from(u16::from_be_bytes([a, 0])),
            _ => 0,
        };
        self
    }

    /// Adds one 16-bit word.
    #[must_use]
    pub fn word(self, word: u16) -> Self {
        Self(self.0 + u64::from(word))
    }

    /// The sum of an IPv4 or IPv6 pseudo-header with an upper-layer length below 64 KiB.
    #[must_use]
    pub fn pseudo_header(src: IpAddr, dst: IpAddr, protocol: u8, length: u16) -> Self {
        let sum = match (src, dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                Self::default().bytes(&src.octets()).bytes(&dst.octets())
            }
            (src, dst) => {
                let octets = |addr| match addr {
                    IpAddr::V4(addr) => std::net::Ipv4Addr::to_ipv6_mapped(&addr).octets(),
                    IpAddr::V6(addr) => addr.octets(),
                };
                Self::default().bytes(&octets(src)).bytes(&octets(dst))
            }
        };
        sum.word(u16::from(protocol)).word(length)
    }

    /// Folds the carries in: the value that a partial checksum field holds.
    #[must_use]
    pub fn fold(self) -> u16 {
        let mut sum = self.0;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        u16::try_from(sum).unwrap_or(u16::MAX)
    }

    /// The checksum: the complement of the folded sum. Zero over data with a right checksum.
    #[must_use]
    pub fn finish(self) -> u16 {
        !self.fold()
    }
}

/// Completes the partial checksum of a TCP segment in place: sums from `start` to the end, stores at
/// `start + offset`. Zero stays zero: only UDP has another meaning for it.
/// Out-of-range positions are left alone.
pub fn complete(frame: &mut [u8], start: usize, offset: usize) {
    let Some(summed) = frame.get(start..) else {
        return;
    };
    let checksum = Sum::default().bytes(summed).finish();
    if let Some(field) = frame.get_mut(start + offset..start + offset + 2) {
        field.copy_from_slice(&checksum.to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn naive(bytes: &[u8]) -> u16 {
        let mut sum = 0_u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(u16::from_be_bytes([
                pair[0],
                pair.get(1).copied().unwrap_or(0),
            ]));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !u16::try_from(sum).unwrap()
    }

    #[test]
    fn the_example_of_rfc_1071() {
        let sum = Sum::default().bytes(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!(sum.fold(), 0xddf2);
    }

    #[test]
    fn zero_is_a_checksum_like_any_other() {
        let mut segment = [0xff, 0xff, 0, 0];
        complete(&mut segment, 0, 2);
        assert_eq!(segment, [0xff, 0xff, 0, 0]);
    }

    proptest! {
        #[test]
        fn agrees_with_the_word_by_word_sum(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            // Both representations of zero are the same checksum.
            let (ours, theirs) = (Sum::default().bytes(&bytes).finish(), naive(&bytes));
            prop_assert!(ours == theirs || (ours | theirs == 0xffff && ours & theirs == 0));
        }

        #[test]
        fn a_completed_frame_verifies(
            mut frame in proptest::collection::vec(any::<u8>(), 40..200), start in 0_usize..20
        ) {
            let start = start * 2;
            prop_assume!(start + 18 <= frame.len());
            frame[start + 16..start + 18].fill(0);
            complete(&mut frame, start, 16);
            prop_assert_eq!(Sum::default().bytes(&frame[start..]).finish(), 0);
        }
    }
}
