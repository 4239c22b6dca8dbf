//! The guest: frames written in advance, in which only sequence numbers and checksums change.
//!
//! [`GuestTcp`] keeps to the dialogue that it was made for, over a link that loses nothing, and
//! fails loudly when the stack does not: a benchmark of something else is worth nothing.

use std::net::{IpAddr, Ipv4Addr};

use tapgate::buf::{ETHERNET_HEADER, RxMeta};
use tapgate::net::checksum::Sum;
use tapgate::net::emit;
use tapgate::net::parse::syn_options;
use tapgate::net::parse::tcp_flags::{ACK, FIN, SYN};
use tapgate::net::{IPV4_HEADER, Mac, PROTOCOL_TCP, PROTOCOL_UDP, TCP_HEADER, UDP_HEADER, Wire};

use super::host::ECHO;
use super::{Bed, LINK};

pub(crate) const GUEST_MAC: Mac = Mac([2, 0, 0, 0, 0, 100]);
const WIRE: Wire = Wire {
    link: LINK,
    src: GUEST_MAC,
    dst: Mac([0x52, 0x55, 10, 0, 2, 2]),
};
const GUEST: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 2, 100));
const SERVER: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
const GUEST_PORT: u16 = 40_000;

/// Payload of a full segment at an MTU of 1500.
pub(crate) const MSS: usize = 1500 - IPV4_HEADER - TCP_HEADER;
/// Payload of the longest segment that segmentation offload makes.
pub(crate) const OFFLOADED: usize = 65_535 - IPV4_HEADER - TCP_HEADER;
/// The guest's receive window: so much is under way to it in a turn.
pub(crate) const WINDOW: usize = 256 * 1024;

/// MSS 1460, window scale 7, selective acknowledgements; padded with no-operations.
const SYN_OPTIONS: [u8; 12] = [2, 4, 0x05, 0xb4, 1, 3, 3, WINDOW_SHIFT, 1, 1, 4, 2];
const WINDOW_SHIFT: u8 = 7;
/// Most segments that a window is cut into.
const SEGMENTS: usize = 512;

/// Where a TCP header begins in a frame.
const TCP_AT: usize = ETHERNET_HEADER + IPV4_HEADER;

/// What a link tells of a frame whose checksum its sender left to the offload.
pub(crate) const VOUCHED_FOR: RxMeta = RxMeta {
    link: LINK,
    checksum_verified: true,
    udp_segment: None,
};

/// A segment whose numbers are filled in when it is sent.
struct Segment {
    frame: Vec<u8>,
    /// The sum over all that does not change.
    constant: Sum,
}

impl Segment {
    fn new(to: u16, flags: u8, options: &[u8], payload: usize) -> Self {
        let header = TCP_HEADER + options.len();
        let mut tcp = vec![0; header + payload];
        tcp[..2].copy_from_slice(&GUEST_PORT.to_be_bytes());
        tcp[2..4].copy_from_slice(&to.to_be_bytes());
        // Four bits of header length in words of four bytes: its bytes times four.
        tcp[12] = u8::try_from(header * 4).expect("options are short");
        tcp[13] = flags;
        let window = u16::try_from(WINDOW >> WINDOW_SHIFT).expect("the shift is large enough");
        tcp[14..16].copy_from_slice(&window.to_be_bytes());
        tcp[TCP_HEADER..header].copy_from_slice(options);
        tcp[header..].fill(b'x');
        let length = u16::try_from(tcp.len()).expect("a segment fits a packet");
        let constant = Sum::pseudo_header(GUEST, SERVER, PROTOCOL_TCP, length).bytes(&tcp);
        let mut frame = ethernet_and_ip(PROTOCOL_TCP, length);
        frame.extend(tcp);
        Self { frame, constant }
    }

    fn at(&mut self, seq: u32, ack: u32) -> &[u8] {
        let tcp = &mut self.frame[TCP_AT..];
        tcp[4..8].copy_from_slice(&seq.to_be_bytes());
        tcp[8..12].copy_from_slice(&ack.to_be_bytes());
        let checksum = self.constant.bytes(&tcp[4..12]).finish();
        tcp[16..18].copy_from_slice(&checksum.to_be_bytes());
        &self.frame
    }
}

/// The headers in front of a segment or datagram of `length` bytes.
fn ethernet_and_ip(protocol: u8, length: u16) -> Vec<u8> {
    let mut frame = vec![0; TCP_AT];
    let packet = emit::ethernet_ip(&mut frame, WIRE, false);
    let total = length + u16::try_from(IPV4_HEADER).expect("20 bytes");
    packet[..2].copy_from_slice(&[0x45, 0]);
    packet[2..4].copy_from_slice(&total.to_be_bytes());
    packet[6..10].copy_from_slice(&[0x40, 0, 64, protocol]);
    if let (IpAddr::V4(src), IpAddr::V4(dst)) = (GUEST, SERVER) {
        packet[12..16].copy_from_slice(&src.octets());
        packet[16..20].copy_from_slice(&dst.octets());
    }
    let checksum = Sum::default().bytes(packet).finish();
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    frame
}

/// The guest's end of a TCP connection.
pub(crate) struct GuestTcp {
    syn: Segment,
    bare: Segment,
    fin: Segment,
    data: Segment,
    payload: u32,
    /// The next sequence number to send.
    next: u32,
    /// The sequence number up to which the stack has acknowledged.
    acknowledged: u32,
    /// The sequence number up to which the stack lets it send.
    edge: u32,
    /// The shift of the stack's window (RFC 7323).
    scale: u8,
    /// The next sequence number to come.
    heard: u32,
    /// What `heard` was after each segment since the last [`GuestTcp::acknowledge`].
    ends: Vec<u32>,
}

impl GuestTcp {
    /// A guest that will speak to the service at a port, in segments of `payload` bytes.
    pub(crate) fn new(port: u16, payload: usize) -> Self {
        Self {
            syn: Segment::new(port, SYN, &SYN_OPTIONS, 0),
            bare: Segment::new(port, ACK, &[], 0),
            fin: Segment::new(port, FIN | ACK, &[], 0),
            data: Segment::new(port, ACK, &[], payload),
            payload: u32::try_from(payload).expect("a segment fits a packet"),
            next: 0,
            acknowledged: 0,
            edge: 0,
            scale: 0,
            heard: 0,
            ends: Vec::with_capacity(SEGMENTS),
        }
    }

    /// Connects: three frames, and the host's connect in between.
    pub(crate) fn connect(&mut self, bed: &mut Bed) {
        self.open(bed);
        self.confirm(bed);
    }

    /// From the SYN to the answer to it.
    pub(crate) fn open(&mut self, bed: &mut Bed) {
        bed.frame(self.syn.at(self.next, 0), VOUCHED_FOR);
        self.next = self.next.wrapping_add(1);
        bed.finish(|_| {});
        bed.ready();
        bed.finish(|frame| {
            // The stack chooses where its sequence numbers begin.
            self.heard = Seen::in_frame(frame).seq;
            self.see(frame);
            // A SYN's own window is not scaled.
            self.scale = syn_options(&frame[TCP_AT..]).window_scale.unwrap_or(0);
        });
        assert_eq!(self.acknowledged, self.next, "the SYN was answered");
    }

    /// The third frame of a connection.
    pub(crate) fn confirm(&mut self, bed: &mut Bed) {
        self.ends.clear();
        self.answer(bed);
        bed.finish(|frame| self.see(frame));
    }

    /// Ends both directions, the guest first.
    pub(crate) fn close(&mut self, bed: &mut Bed) {
        bed.frame(self.fin.at(self.next, self.heard), VOUCHED_FOR);
        self.next = self.next.wrapping_add(1);
        bed.finish(|frame| self.see(frame));
        bed.ready();
        bed.finish(|frame| self.see(frame));
        self.ends.clear();
        self.answer(bed);
        bed.finish(|frame| self.see(frame));
        assert_eq!(bed.flows(), 0, "the connection is over");
    }

    /// Sends the next segment.
    pub(crate) fn send(&mut self, bed: &mut Bed, meta: RxMeta) {
        bed.frame(self.data.at(self.next, self.heard), meta);
        self.next = self.next.wrapping_add(self.payload);
        self.ends.clear();
    }

    fn answer(&mut self, bed: &mut Bed) {
        bed.frame(self.bare.at(self.next, self.heard), VOUCHED_FOR);
    }

    /// Acknowledges each segment that came with a frame of its own; returns their number.
    pub(crate) fn acknowledge(&mut self, bed: &mut Bed) -> usize {
        for &end in &self.ends {
            bed.frame(self.bare.at(self.next, end), VOUCHED_FOR);
        }
        let count = self.ends.len();
        self.ends.clear();
        count
    }

    /// Takes a frame of the stack.
    pub(crate) fn see(&mut self, frame: &[u8]) {
        let seen = Seen::in_frame(frame);
        assert_eq!(seen.seq, self.heard, "in order, and nothing twice");
        self.acknowledged = seen.ack;
        self.edge = seen.ack.wrapping_add(seen.window << self.scale);
        if seen.length > 0 {
            self.heard = self.heard.wrapping_add(seen.length);
            self.ends.push(self.heard);
        }
    }

    /// The stack's window has room for a segment.
    pub(crate) fn may_send(&self) -> bool {
        let end = self.next.wrapping_add(self.payload);
        self.edge.wrapping_sub(end).cast_signed() >= 0
    }

    /// The stack has acknowledged everything.
    pub(crate) fn is_acknowledged(&self) -> bool {
        self.acknowledged == self.next
    }

    /// The next sequence number to come: how far the stack's stream is.
    pub(crate) fn heard(&self) -> u32 {
        self.heard
    }
}

/// The numbers of a segment that the stack sent.
struct Seen {
    seq: u32,
    ack: u32,
    /// The field of the header.
    window: u32,
    /// Sequence space: payload, SYN and FIN.
    length: u32,
}

impl Seen {
    fn in_frame(frame: &[u8]) -> Self {
        let tcp = &frame[TCP_AT..];
        let word = |at: usize| u32::from_be_bytes([tcp[at], tcp[at + 1], tcp[at + 2], tcp[at + 3]]);
        let payload = tcp.len() - usize::from(tcp[12] >> 4) * 4;
        let control = u32::from(tcp[13] & SYN != 0) + u32::from(tcp[13] & FIN != 0);
        Self {
            seq: word(4),
            ack: word(8),
            window: u32::from(u16::from_be_bytes([tcp[14], tcp[15]])),
            length: u32::try_from(payload).expect("a frame is short") + control,
        }
    }
}

/// A datagram of the guest to the echo service.
pub(crate) fn datagram(payload: usize) -> Vec<u8> {
    let mut udp = vec![b'x'; UDP_HEADER + payload];
    let length = u16::try_from(udp.len()).expect("a datagram fits a packet");
    udp[..2].copy_from_slice(&GUEST_PORT.to_be_bytes());
    udp[2..4].copy_from_slice(&ECHO.to_be_bytes());
    udp[4..6].copy_from_slice(&length.to_be_bytes());
    udp[6..8].fill(0);
    let sum = Sum::pseudo_header(GUEST, SERVER, PROTOCOL_UDP, length).bytes(&udp);
    udp[6..8].copy_from_slice(&sum.finish().to_be_bytes());
    let mut frame = ethernet_and_ip(PROTOCOL_UDP, length);
    frame.extend(udp);
    frame
}

/// Capabilities of a tap whose kernel grants everything, or nothing.
pub(crate) fn capabilities(offload: bool) -> tapgate::buf::TxCapabilities {
    tapgate::buf::TxCapabilities {
        checksum: offload,
        tso4: offload,
        tso6: offload,
        uso: offload,
    }
}
