//! The vnet header: how a tap tells, and is told, what is left to do for a frame.
//!
//! `struct virtio_net_hdr_v1` of linux/virtio_net.h, twelve bytes in the byte order of the machine
//! (a tap's default). Pure: bytes to values and back.

use std::num::NonZeroU16;

use crate::buf::{Cut, LinkId, Offload, RxMeta};

/// Bytes of the header.
pub const LEN: usize = 12;

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
/// Set beside a TCP type where the segments carry ECN marks.
const GSO_ECN: u8 = 0x80;

/// What the header of a received frame says.
#[must_use]
pub fn decode(link: LinkId, header: [u8; LEN]) -> RxMeta {
    let size = NonZeroU16::new(u16::from_ne_bytes([header[4], header[5]]));
    let udp_segment = if header[1] & !GSO_ECN == GSO_UDP_L4 {
        size
    } else {
        None
    };
    RxMeta {
        link,
        checksum_verified: header[0] & (NEEDS_CSUM | DATA_VALID) != 0,
        udp_segment,
    }
}

/// The header of a frame to be sent.
#[must_use]
pub fn encode(offload: Offload) -> [u8; LEN] {
    let mut header = [0; LEN];
    if let Some(checksum) = offload.checksum {
        header[0] = NEEDS_CSUM;
        header[6..8].copy_from_slice(&checksum.start.to_ne_bytes());
        header[8..10].copy_from_slice(&checksum.offset.to_ne_bytes());
    }
    header[1] = GSO_NONE;
    if let Some(segment) = offload.segment {
        header[1] = match segment.cut {
            Cut::Tcp4 => GSO_TCPV4,
            Cut::Tcp6 => GSO_TCPV6,
            Cut::Udp => GSO_UDP_L4,
        };
        header[2..4].copy_from_slice(&segment.header_len.to_ne_bytes());
        header[4..6].copy_from_slice(&segment.size.get().to_ne_bytes());
    }
    header
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buf::{PartialChecksum, Segmentation};
    use proptest::prelude::*;

    #[test]
    fn a_segmented_frame_says_all_that_the_kernel_needs() {
        let header = encode(Offload {
            checksum: Some(PartialChecksum {
                start: 34,
                offset: 16,
            }),
            segment: NonZeroU16::new(1448).map(|size| Segmentation {
                cut: Cut::Tcp4,
                size,
                header_len: 54,
            }),
        });
        assert_eq!(header[..2], [NEEDS_CSUM, GSO_TCPV4]);
        assert_eq!(u16::from_ne_bytes([header[2], header[3]]), 54);
        assert_eq!(u16::from_ne_bytes([header[4], header[5]]), 1448);
        assert_eq!(u16::from_ne_bytes([header[6], header[7]]), 34);
        assert_eq!(u16::from_ne_bytes([header[8], header[9]]), 16);
    }

    proptest! {
        #[test]
        fn any_header_decodes(bytes: [u8; LEN]) {
            let meta = decode(LinkId(1), bytes);
            prop_assert_eq!(meta.checksum_verified, bytes[0] & 3 != 0);
            prop_assert!(meta.udp_segment.is_none() || bytes[1] & 0x7f == GSO_UDP_L4);
        }
    }
}
