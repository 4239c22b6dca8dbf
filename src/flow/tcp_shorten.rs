//! A segment sent again, made to fit the guest's window.
//!
//! Comes in: a frame as smoltcp wrote it. Goes out: how much of it is sent. After three repeated acknowledgements
//! smoltcp 0.14 sends a whole segment again, of which a small window may have no room for the end: Linux takes nothing of
//! such a segment. What is left out here smoltcp sends when its retransmission timer runs out, by the window.

use super::tcp_device::word;
use super::tcp_direct::set_length;
use crate::buf::ETHERNET_HEADER;
use crate::net::IPV4_HEADER;
use crate::net::checksum::Sum;
use crate::net::parse::tcp_flags;

/// Makes the frame whose TCP header begins at `start` no longer than the guest has room for, which is up to `reach` where
/// that is known; returns its length. `claimed` is behind all that smoltcp takes for sent.
///
/// What it sends for the first time it judges rightly, also by the window of a SYN, which has no scale. One byte goes in
/// any case: it probes the window (RFC 9293 3.8.6.1).
pub(super) fn shorten(
    frame: &mut [u8],
    start: usize,
    reach: Option<u32>,
    claimed: &mut u32,
) -> usize {
    let tcp = &frame[start..];
    let (seq, flags) = (word(tcp, 4), tcp[13]);
    let payload_at = start + usize::from(tcp[12] >> 4) * 4;
    let payload = frame.len() - payload_at;
    let distance = |to: u32| usize::try_from(to.wrapping_sub(seq).cast_signed()).unwrap_or(0);
    let is_syn = flags & tcp_flags::SYN != 0;
    let again = distance(*claimed) > 0 && !is_syn;
    let controls = usize::from(is_syn) + usize::from(flags & tcp_flags::FIN != 0);
    if is_syn || payload + controls > distance(*claimed) {
        let length = u32::try_from(payload + controls).unwrap_or(u32::MAX);
        *claimed = seq.wrapping_add(length);
    }
    let room = match reach {
        Some(reach) if again => distance(reach).max(1),
        Some(_) | None => payload,
    };
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

    /// Payload of what is sent, where so much was before, and the guest has room for so much.
    fn sent(seq: u32, before: u32, room: Option<u32>) -> usize {
        let mut frame = frame(seq);
        let mut claimed = seq.wrapping_add(before);
        let reach = room.map(|room| seq.wrapping_add(room));
        let len = shorten(&mut frame, START, reach, &mut claimed);
        assert_eq!(claimed, seq.wrapping_add(1001), "the end has a number, too");
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
    fn what_is_sent_again_fits_the_window() {
        for seq in [7, u32::MAX - 500] {
            assert_eq!(sent(seq, 900, Some(10)), 10);
            assert_eq!(sent(seq, 1, Some(999)), 999);
            assert_eq!(sent(seq, 900, Some(1000)), PAYLOAD);
            assert_eq!(sent(seq, 900, Some(0)), 1, "a probe");
            assert_eq!(sent(seq, 900, Some(u32::MAX)), 1, "it has shrunk");
            assert_eq!(sent(seq, 900, None), PAYLOAD, "nothing is known");
            assert_eq!(sent(seq, 0, Some(10)), PAYLOAD, "the first time");
        }
    }
}
