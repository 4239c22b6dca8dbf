//! Segments of a guest's TCP, written by the test: what they announce, how long they may be, and the
//! headers that they may come behind.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tapgate::buf::{Cut, LinkId, RxMeta, TxBatch, TxCapabilities};
use tapgate::config::Config;
use tapgate::flow::Turn;
use tapgate::host::simulated::{ConnectAnswer, Network, SimulatedHost, SocketId};
use tapgate::net::{Instant, Mac};
use tapgate::stack::{LinkInfo, Stack};

use crate::lab::{FIRST, Lab, addr, filled, micros, millis};
use crate::packets::v6::{DESTINATION, Extension, HOP_BY_HOP, Ipv6, PADDING, ROUTING};
use crate::packets::{GUEST_MAC, Ip, Segment, TCP, checksum, read::Received};
use crate::sim::{GUEST, GUEST6};
use crate::{MTUS, OUTSIDE6, fits};

pub(crate) const SYN: u8 = 2;
pub(crate) const ACK: u8 = 0x10;
const FIN: u8 = 1;

/// What a test needs of a segment to the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    pub(crate) flags: u8,
    pub(crate) options: Vec<u8>,
    pub(crate) data: Vec<u8>,
}

pub(crate) fn seen(packet: &Received) -> Seen {
    assert_eq!(packet.protocol, TCP, "{packet:?}");
    let bytes = &packet.payload;
    let long = |at: usize| u32::from(packet.word(at)) << 16 | u32::from(packet.word(at + 2));
    let header = usize::from(bytes[12] >> 4) * 4;
    Seen {
        seq: long(4),
        ack: long(8),
        flags: bytes[13],
        options: bytes[20..header].to_vec(),
        data: bytes[header..].to_vec(),
    }
}

/// The largest segment that a SYN announces.
fn announced(options: &[u8]) -> Option<u16> {
    let mut rest = options;
    loop {
        rest = match rest {
            [1, rest @ ..] => rest,
            [2, 4, high, low, ..] => return Some(u16::from_be_bytes([*high, *low])),
            [_, length @ 2..=40, ..] => rest.get(usize::from(*length)..)?,
            _ => return None,
        };
    }
}

/// One end of a connection, in the guest.
pub(crate) struct Peer {
    ip: Ip,
    /// What the next segment says, but for its flags.
    pub(crate) next: Segment,
}

impl Peer {
    pub(crate) fn new(to: SocketAddr, from: u16) -> Self {
        Self {
            ip: Ip::new(to.ip(), TCP),
            next: Segment {
                from,
                to: to.port(),
                seq: 1000,
                window: 65_535,
                ..Segment::default()
            },
        }
    }

    pub(crate) fn segment(&self, flags: u8, options: &[u8], data: &[u8]) -> Vec<u8> {
        let fields = Segment { flags, ..self.next };
        self.ip.tcp(&fields, options, data)
    }

    pub(crate) fn frame(&self, flags: u8, options: &[u8], data: &[u8]) -> Vec<u8> {
        self.ip.frame(&self.segment(flags, options, data))
    }

    /// Takes note of a segment that came.
    pub(crate) fn take(&mut self, came: &Seen) {
        let length = u32::try_from(came.data.len()).unwrap();
        self.next.ack = came
            .seq
            .wrapping_add(length + u32::from(came.flags >> 1 & 1));
        self.next.seq = came.ack;
    }
}

/// A guest's own TCP over that family, in a lab whose smoltcp speaks the other.
fn lab(to: SocketAddr, mtu: u16) -> Lab {
    let other: IpAddr = if to.is_ipv6() { GUEST } else { GUEST6 };
    let lab = Lab::of(
        other,
        Config {
            mtu,
            ..Config::default()
        },
    );
    lab.0.net.answer_all(ConnectAnswer::Accept);
    lab
}

#[test]
fn no_segment_is_above_what_either_side_can_take() {
    let outside = ["[2001:db8::1]:80", "192.0.2.1:80"].map(addr);
    for (to, mtu) in outside.into_iter().flat_map(|to| MTUS.map(|mtu| (to, mtu))) {
        let headers = if to.is_ipv6() { 60 } else { 40 };
        // Who announces nothing takes 1220 bytes, or 536 (RFC 9293 3.7.1).
        let silent = if to.is_ipv6() { 1220 } else { 536 };
        for mss in [
            None,
            Some(536),
            Some(1220),
            Some(1440),
            Some(9000),
            Some(65_535),
        ] {
            let mut lab = lab(to, mtu);
            let mut peer = Peer::new(to, 4000);
            let option = mss.map_or_else(Vec::new, |mss: u16| {
                [&[2, 4], &mss.to_be_bytes()[..]].concat()
            });
            lab.send(peer.frame(SYN, &option, &[]));
            let answer = seen(&lab.reply());
            assert_eq!((answer.flags, answer.ack), (SYN | ACK, 1001));
            assert_eq!(announced(&answer.options), Some(mtu - headers));
            peer.take(&answer);
            lab.send(peer.frame(ACK, &[], &[]));
            let data = filled(100_000);
            assert_eq!(lab.0.net.server_write(FIRST, &data), data.len());
            let limit = usize::from(mss.unwrap_or(silent).min(mtu - headers));
            let mut got: Vec<u8> = Vec::new();
            let mut longest = 0;
            while got.len() < data.len() {
                lab.wait(millis(1));
                assert!(fits(&lab, mtu));
                for packet in lab.received() {
                    let came = seen(&packet);
                    longest = longest.max(came.data.len());
                    peer.take(&came);
                    got.extend(came.data);
                }
                lab.send(peer.frame(ACK, &[], &[]));
            }
            assert!(got == data);
            assert_eq!(longest, limit, "{to}, MTU {mtu}, MSS {mss:?}");
        }
    }
}

#[test]
fn timestamps_take_their_room_from_the_segments() {
    let to = addr("[2001:db8::1]:80");
    let mut lab = lab(to, 1500);
    let mut peer = Peer::new(to, 4000);
    lab.send(peer.frame(
        SYN,
        &[2, 4, 5, 0xa0, 8, 10, 0, 0, 0, 9, 0, 0, 0, 0, 1, 1],
        &[],
    ));
    let answer = seen(&lab.reply());
    let agreed = answer.options.windows(2).any(|pair| pair == [8, 10]);
    peer.take(&answer);
    let stamps = [1, 1, 8, 10, 0, 0, 0, 10, 0, 0, 0, 0];
    let options = if agreed { &stamps[..] } else { &[] };
    lab.send(peer.frame(ACK, options, &[]));
    let _ = lab.0.net.server_write(FIRST, &filled(20_000));
    lab.wait(millis(1));
    assert!(fits(&lab, 1500));
    let longest = lab.received().iter().map(|it| it.payload.len()).max();
    assert_eq!(longest, Some(1460), "full packets, not more");
}

/// The connection of a guest that is open, with nothing under way.
fn open(to: SocketAddr) -> (Lab, Peer) {
    let mut lab = lab(to, 1500);
    let mut peer = Peer::new(to, 4000);
    lab.send(peer.frame(SYN, &[2, 4, 5, 0xa0], &[]));
    peer.take(&seen(&lab.reply()));
    lab.send(peer.frame(ACK, &[], &[]));
    assert!(lab.received().is_empty());
    (lab, peer)
}

#[test]
fn a_request_s_acknowledgement_goes_with_the_answer() {
    for to in ["[2001:db8::1]:80", "192.0.2.1:80"].map(addr) {
        let (mut lab, peer) = open(to);
        lab.0.inject(peer.frame(ACK, &[], b"request"));
        lab.wait(micros(200));
        assert!(lab.received().is_empty(), "it waits for an answer");
        assert_eq!(lab.0.net.server_write(FIRST, b"answer"), 6);
        lab.wait(micros(200));
        let came = seen(&lab.reply());
        assert_eq!((came.ack, &came.data[..]), (1008, &b"answer"[..]));
        lab.wait(millis(5));
        assert!(lab.received().is_empty(), "nothing is left to be said");
    }
}

#[test]
fn an_acknowledgement_waits_for_a_millisecond_and_for_short_segments_alone() {
    let to = addr("192.0.2.1:80");
    let (mut lab, mut peer) = open(to);
    lab.0.inject(peer.frame(ACK, &[], b"request"));
    lab.wait(micros(200));
    assert!(lab.received().is_empty());
    lab.wait(millis(1));
    lab.wait(micros(200));
    assert_eq!(seen(&lab.reply()).ack, 1008);
    // A whole segment is part of more, whose sender may wait for room; so is what comes before it.
    peer.next.seq = 1008;
    lab.0.inject(peer.frame(ACK, &[], b"short"));
    peer.next.seq += 5;
    lab.0.inject(peer.frame(ACK, &[], &filled(1440)));
    lab.wait(micros(200));
    assert_eq!(seen(lab.received().last().unwrap()).ack, 1008 + 5 + 1440);
    // So is an end of stream.
    peer.next.seq += 1440;
    lab.0.inject(peer.frame(ACK | FIN, &[], b"end"));
    lab.wait(micros(200));
    let end = 1008 + 5 + 1440 + 4;
    assert_eq!(seen(lab.received().last().unwrap()).ack, end);
}

#[test]
fn segments_behind_extension_headers_reach_their_flow() {
    let to = addr("[2001:db8::1]:80");
    let mut lab = lab(to, 1500);
    let mut peer = Peer::new(to, 4000);
    let ip = Ipv6::new(OUTSIDE6, TCP);
    let hops = Extension(HOP_BY_HOP, PADDING);
    let options = Extension(DESTINATION, PADDING);
    let there = Extension(ROUTING, &[0, 0, 0, 0, 0, 0]);
    lab.send(ip.extended_frame(&[hops, there], &peer.segment(SYN, &[2, 4, 4, 0], &[])));
    let answer = seen(&lab.reply());
    assert_eq!(answer.flags, SYN | ACK);
    peer.take(&answer);
    lab.send(ip.extended_frame(&[options], &peer.segment(ACK, &[], &[])));
    let mut expected = Vec::new();
    for (chain, data) in [
        (&[options][..], filled(10)),
        (&[hops, options, options], filled(1000)),
        (&[], filled(20)),
    ] {
        lab.send(ip.extended_frame(chain, &peer.segment(ACK, &[], &data)));
        peer.next.seq += u32::try_from(data.len()).unwrap();
        expected.extend(data);
    }
    // In fragments, too.
    let data = filled(3000);
    for frame in ip.fragments(7, &peer.segment(ACK, &[], &data), 1448) {
        lab.send(frame);
    }
    expected.extend(data);
    assert_eq!(lab.0.net.server_read(FIRST, usize::MAX), expected);
    let acknowledged = lab.received().last().map(|it| seen(it).ack).unwrap();
    assert_eq!(acknowledged, 1001 + u32::try_from(expected.len()).unwrap());
    // The limits of the guest's SYN hold, though it stood behind other headers.
    let _ = lab.0.net.server_write(FIRST, &filled(5000));
    lab.wait(millis(1));
    let longest = lab.received().iter().map(|it| seen(it).data.len()).max();
    assert_eq!(longest, Some(1024));
}

/// A stack whose link does what a kernel's tap does; no link in between.
struct Offloading {
    stack: Stack<SimulatedHost>,
    host: SimulatedHost,
    net: Network,
    tx: TxBatch,
}

impl Offloading {
    fn new(mtu: u16) -> Self {
        let net = Network::new();
        net.answer_all(ConnectAnswer::Accept);
        let link = LinkInfo {
            id: LinkId(0),
            capabilities: TxCapabilities {
                checksum: true,
                tso4: true,
                tso6: true,
                uso: true,
            },
            guest_mac: Some(Mac(GUEST_MAC)),
        };
        let config = Arc::new(Config {
            mtu,
            ..Config::default()
        });
        Self {
            stack: Stack::new(config, link, [1, 2, 3, 4]),
            host: net.host(),
            net,
            tx: TxBatch::new(256, 512 * 1024),
        }
    }

    /// Gives the stack a frame and lets it act; what it sends, and what the link is to do to it.
    fn turn(&mut self, frame: Option<&[u8]>) -> Vec<(Vec<u8>, tapgate::buf::Offload)> {
        let mut turn = Turn {
            now: Instant::from_millis(1),
            host: &mut self.host,
            tx: &mut self.tx,
        };
        if let Some(frame) = frame {
            self.stack
                .handle_frame(&mut turn, frame, RxMeta::plain(LinkId(0)));
        }
        for event in self.net.take_events() {
            self.stack.handle_host(&mut turn, event);
        }
        self.stack.handle_timeout(&mut turn);
        while self.stack.poll_transmit(&mut turn) {}
        let frames = self.tx.frames();
        let sent = frames.map(|it| (it.bytes().to_vec(), it.offload)).collect();
        self.tx.clear();
        self.stack.check().unwrap();
        sent
    }
}

/// What the kernel does to a partial checksum: sums up from `start` and puts it in place.
fn completed(frame: &[u8], start: usize, field: usize) -> Vec<u8> {
    let mut frame = frame.to_vec();
    let sum = checksum(&[&frame[start..]]);
    frame[field..field + 2].copy_from_slice(&sum.to_be_bytes());
    frame
}

/// What a link is asked to do to a segment: whether it is long, and what then holds.
fn judged(frame: &[u8], offload: tapgate::buf::Offload, headers: usize, size: u16) -> (Seen, bool) {
    let partial = offload.checksum.unwrap();
    let start = 14 + headers - 20;
    assert_eq!((usize::from(partial.start), partial.offset), (start, 16));
    let whole = completed(frame, start, start + 16);
    let came = seen(&crate::packets::read(&[whole]).unwrap()[0]);
    let size = size - u16::try_from(came.options.len()).unwrap();
    let long = came.data.len() > usize::from(size);
    if long {
        let segment = offload.segment.unwrap();
        let cut = if headers == 60 { Cut::Tcp6 } else { Cut::Tcp4 };
        assert_eq!((segment.size.get(), segment.cut), (size, cut));
        let header_len = 14 + headers + came.options.len();
        assert_eq!(usize::from(segment.header_len), header_len);
    }
    (came, long)
}

fn long_segments(to: &str, (mtu, mss): (u16, u16), stamped: bool) {
    let headers = if addr(to).is_ipv6() { 60 } else { 40 };
    let size = mss.min(mtu - u16::try_from(headers).unwrap());
    let mut world = Offloading::new(mtu);
    world.turn(None);
    let mut peer = Peer::new(addr(to), 4000);
    let mut option = [&[2, 4], &mss.to_be_bytes()[..]].concat();
    let stamps = [1, 1, 8, 10, 0, 0, 0, 9, 0, 0, 0, 0];
    let stamps = if stamped { &stamps[..] } else { &[] };
    option.extend(stamps);
    let answers = world.turn(Some(&peer.frame(SYN, &option, &[])));
    let (answer, _) = judged(&answers[0].0, answers[0].1, headers, size);
    peer.take(&answer);
    world.turn(Some(&peer.frame(ACK, stamps, &[])));
    let data = filled(30_000);
    assert_eq!(world.net.server_write(SocketId(0), &data), data.len());
    let mut got: Vec<u8> = Vec::new();
    let mut cut = 0;
    for (frame, offload) in world.turn(None) {
        let (came, long) = judged(&frame, offload, headers, size);
        assert_eq!(came.options.len(), stamps.len());
        cut += usize::from(long);
        got.extend(came.data);
    }
    let told = format!("{to}, MTU {mtu}, MSS {mss}, {stamped}: {cut} were long");
    assert!(got == data && cut > 0, "{told}");
}

#[test]
fn long_segments_are_cut_by_the_link_to_what_the_guest_takes() {
    for to in ["[2001:db8::1]:80", "192.0.2.1:80"] {
        for limits in [(1500, 9000), (1500, 1000), (65_520, 1440), (1280, 1220)] {
            for stamped in [false, true] {
                long_segments(to, limits, stamped);
            }
        }
    }
}
