//! A segment made to fit the guest's window.
//!
//! Comes in: a frame as smoltcp wrote it. Goes out: how much of it is sent. smoltcp 0.14 sends more than there is room for
//! in two cases: a whole segment after three repeated acknowledgements, and what follows the bytes that went past it while
//! it has not taken the segments that acknowledge those. Linux takes nothing of a segment that is too long. What is left
//! out here smoltcp sends when its retransmission timer runs out, by the window.

use super::tcp_completion::word;
use super::tcp_direct::set_length;
use crate::buf::ETHERNET_HEADER;
use crate::net::IPV4_HEADER;
use crate::net::checksum::Sum;
use crate::net::parse::tcp_flags;

/// Makes the frame whose TCP header begins at `start` no longer than the guest has room for, which is up to `reach` where
/// that is known; returns its length. One byte goes in any case: it probes the window (RFC 9293 3.8.6.1).
pub(super) fn shorten(frame: &mut [u8], start: usize, reach: Option<u32>) -> usize {
    let Some(reach) = reach else {
        return frame.len();
    };
    let tcp = &frame[start..];
    let payload_at = start + usize::from(tcp[12] >> 4) * 4;
    let payload = frame.len() - payload_at;
    let room = reach.wrapping_sub(word(tcp, 4)).cast_signed();
    let room = usize::try_from(room).unwrap_or(0).max(1);
    if room >= payload {
        return frame.len();
    }
    frame[start + 13] &= !(tcp_flags::PSH | tcp_flags::FIN);
    let len = payload_at + room;
    let packet = &mut frame[ETHERNET_HEADER..len];
    set_length(packet);
    if packet[0] >> 4 == 4 {
        packet[10..12].fill(0);
        let sum = Sum::default().bytes(&packet[..IPV4_HEADER]).finish();
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    len
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: usize = ETHERNET_HEADER + IPV4_HEADER;
    const PAYLOAD: usize = 1000;

    fn frame(seq: u32) -> Vec<u8> {
        let mut frame = vec![0; START + 20 + PAYLOAD];
        frame[ETHERNET_HEADER] = 0x45;
        frame[START + 4..START + 8].copy_from_slice(&seq.to_be_bytes());
        frame[START + 12] = 5 << 4;
        frame[START + 13] = tcp_flags::ACK | tcp_flags::PSH | tcp_flags::FIN;
        set_length(&mut frame[ETHERNET_HEADER..]);
        frame
    }

    /// Payload of what is sent where the guest has room for so much.
    fn sent(seq: u32, room: Option<u32>) -> usize {
        let mut frame = frame(seq);
        let reach = room.map(|room| seq.wrapping_add(room));
        let len = shorten(&mut frame, START, reach);
        let packet = &frame[ETHERNET_HEADER..len];
        let total = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
        assert_eq!(total, packet.len());
        let sum = Sum::default().bytes(&packet[..IPV4_HEADER]).finish();
        assert!(len == frame.len() || sum == 0, "the header is summed anew");
        let ends = packet[IPV4_HEADER + 13] & (tcp_flags::PSH | tcp_flags::FIN) != 0;
        assert_eq!(ends, len == frame.len(), "the end goes with the last byte");
        packet.len() - IPV4_HEADER - 20
    }

    #[test]
    fn what_is_sent_fits_the_window() {
        for seq in [7, u32::MAX - 500] {
            assert_eq!(sent(seq, Some(10)), 10);
            assert_eq!(sent(seq, Some(999)), 999);
            assert_eq!(sent(seq, Some(1000)), PAYLOAD);
            assert_eq!(sent(seq, Some(0)), 1, "a probe");
            assert_eq!(sent(seq, Some(u32::MAX)), 1, "it has shrunk");
            assert_eq!(sent(seq, None), PAYLOAD, "nothing is known");
        }
    }
}
