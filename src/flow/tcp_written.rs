//! Segments without payload, written as the guest would send them: what smoltcp is told.
//!
//! Comes in: numbers and options. Goes out: an IP packet whose checksums nobody verifies.

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    IpAddress, IpProtocol, IpRepr, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber, TcpTimestampRepr,
};

use super::tcp_engine::{MAX_HEADERS, Syn};
use crate::net::emit;

/// A segment without payload, as the guest would send it.
pub(super) struct Written {
    bytes: [u8; MAX_HEADERS],
    len: usize,
}

impl Written {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// A SYN anew from what was kept of it, so that nothing of the guest's options but the known ones
    /// reaches smoltcp.
    pub(super) fn syn(ends: emit::Ends, syn: Syn) -> Self {
        let tcp = TcpRepr {
            src_port: ends.src.port(),
            dst_port: ends.dst.port(),
            control: TcpControl::Syn,
            seq_number: TcpSeqNumber(syn.seq.cast_signed()),
            ack_number: None,
            window_len: syn.window,
            window_scale: syn.options.window_scale,
            max_seg_size: syn.options.mss,
            sack_permitted: syn.options.sack_permitted,
            sack_ranges: [None; 3],
            timestamp: syn
                .options
                .timestamp
                .map(|sent| TcpTimestampRepr::new(sent, 0)),
            payload: &[],
        };
        Self::new(ends, &tcp)
    }

    /// An acknowledgement, or the end of the guest's stream.
    pub(super) fn ack(
        ends: emit::Ends,
        control: TcpControl,
        numbers: [u32; 2],
        window: u16,
    ) -> Self {
        let [seq, ack] = numbers.map(|number| TcpSeqNumber(number.cast_signed()));
        let tcp = TcpRepr {
            src_port: ends.src.port(),
            dst_port: ends.dst.port(),
            control,
            seq_number: seq,
            ack_number: Some(ack),
            window_len: window,
            window_scale: None,
            max_seg_size: None,
            sack_permitted: false,
            sack_ranges: [None; 3],
            timestamp: None,
            payload: &[],
        };
        Self::new(ends, &tcp)
    }

    fn new(ends: emit::Ends, tcp: &TcpRepr<'_>) -> Self {
        let (src, dst): (IpAddress, IpAddress) = (ends.src.ip().into(), ends.dst.ip().into());
        let ip = IpRepr::new(src, dst, IpProtocol::Tcp, tcp.buffer_len(), 64);
        let mut bytes = [0; MAX_HEADERS];
        let len = ip.buffer_len();
        let caps = ChecksumCapabilities::ignored();
        ip.emit(&mut bytes[..len], &caps);
        let mut segment = TcpPacket::new_unchecked(&mut bytes[ip.header_len()..len]);
        tcp.emit(&mut segment, &src, &dst, &caps);
        Self { bytes, len }
    }
}
