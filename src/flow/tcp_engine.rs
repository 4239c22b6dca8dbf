//! One TCP endpoint towards the guest: an `Interface` with a single socket, and the one-packet
//! device between it and a transmit batch.
//!
//! This and [`tcp`](super::tcp) are the only files that name smoltcp's TCP socket. Comes in: IP
//! packets that the parser has passed, and the time. Goes out: frames with the offloads that the
//! link does, or complete ones. The engine has no policy: it neither opens nor closes by itself.

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroUsize;

use smoltcp::iface::{Config, Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::{
    Checksum, ChecksumCapabilities, Device, DeviceCapabilities, Medium, PacketMeta, RxToken,
    TxToken,
};
use smoltcp::socket::tcp::{ConnectError, ListenError, Socket, SocketBuffer, State};
use smoltcp::wire::{
    HardwareAddress, IpAddress, IpCidr, IpEndpoint, IpProtocol, IpRepr, TcpControl, TcpRepr,
    TcpSeqNumber,
};

use crate::buf::{
    ETHERNET_HEADER, Offload, PartialChecksum, TcpSegmentation, TxBatch, TxCapabilities,
};
use crate::net::checksum::{Sum, complete};
use crate::net::parse::{self, SynOptions, TcpSegment, tcp_flags};
use crate::net::{Duration, Instant, PROTOCOL_TCP, Wire, emit};

/// Bytes of each direction's ring. Less costs throughput (design.md 1.4); the memory is committed
/// as it is used.
pub const RING: usize = 1 << 20;

/// Largest IP packet that is handed to a link for segmentation.
const MAX_SEGMENT_PACKET: usize = 65_535;

/// Headers of a segment without payload are no longer than this: 60 bytes each at most.
const MAX_HEADERS: usize = 120;

/// Distance from the start of a TCP header to its checksum field.
const CHECKSUM_FIELD: u16 = 16;

/// An idle guest is probed after this time (RFC 5382 REQ-5 forbids less than 2 h 4 min before a
/// connection is given up; the probe itself may come earlier).
const KEEPALIVE: Duration = Duration::from_secs(7200);

/// A guest that answers nothing for this time is gone.
const SILENCE: Duration = Duration::from_secs(7200 + 600);

/// Engines kept ready, so that a short connection costs no allocation.
const WARM: usize = 64;

/// An engine that carried more than this has dirtied its rings and is not kept.
const WARM_BYTES: u64 = 64 * 1024;

// Flows are many: a smoltcp feature that fattens these shows here (design.md 1.3).
const _: () = assert!(
    size_of::<Interface>() <= 160,
    "smoltcp's default features crept in"
);
const _: () = assert!(
    size_of::<Socket<'static>>() <= 520,
    "smoltcp's default features crept in"
);

/// How frames reach the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Path {
    /// The link and both Ethernet addresses.
    pub wire: Wire,
    /// Largest IP packet, bytes.
    pub mtu: u16,
    /// What the link does for us.
    pub capabilities: TxCapabilities,
}

/// The connection request of a guest, kept while the host connects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Syn {
    /// Initial sequence number.
    pub seq: u32,
    /// Window field.
    pub window: u16,
    /// Options.
    pub options: SynOptions,
}

/// The sequence space of the last segment sent: all that is left to answer with once a
/// connection is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LastSent {
    /// Sequence number of that segment.
    pub seq: u32,
    /// Acknowledgement number of that segment.
    pub ack: u32,
    /// Window field of that segment.
    pub window: u16,
}

/// A TCP endpoint towards the guest.
pub struct Engine {
    interface: Interface,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    path: Path,
    last: LastSent,
    carried: u64,
    /// The guest's window scale (RFC 7323), at most 14.
    scale: u8,
    varied: bool,
}

/// Engines that wait to be used again.
#[derive(Default)]
pub struct EnginePool {
    warm: Vec<(SocketSet<'static>, SocketHandle)>,
}

impl EnginePool {
    fn take(&mut self) -> (SocketSet<'static>, SocketHandle) {
        self.warm.pop().unwrap_or_else(|| {
            let ring = || SocketBuffer::new(vec![0; RING]);
            let mut sockets = SocketSet::new(Vec::with_capacity(1));
            let handle = sockets.add(Socket::new(ring(), ring()));
            (sockets, handle)
        })
    }

    /// Takes an engine back whose connection is over.
    pub fn put(&mut self, engine: Engine) {
        if engine.carried <= WARM_BYTES && self.warm.len() < WARM {
            self.warm.push((engine.sockets, engine.handle));
        }
    }

    /// An engine for the endpoint `local` (an outside address), not yet open. `seed` decides its
    /// initial sequence number and must be unpredictable (RFC 6528).
    pub fn engine(&mut self, now: Instant, path: Path, local: IpAddr, seed: u64) -> Engine {
        let (sockets, handle) = self.take();
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = seed;
        let mut no_frames = NullDevice(capabilities(path));
        let mut interface = Interface::new(config, &mut no_frames, now);
        interface.update_ip_addrs(|addrs| {
            // One address fits: the feature iface-max-addr-count-1 is on, and the list is empty.
            let _ = addrs.push(IpCidr::new(
                local.into(),
                if local.is_ipv4() { 32 } else { 128 },
            ));
        });
        Engine {
            interface,
            sockets,
            handle,
            path,
            last: LastSent::default(),
            carried: 0,
            scale: 0,
            varied: false,
        }
    }
}

/// What smoltcp must know of the link.
fn capabilities(path: Path) -> DeviceCapabilities {
    let mut caps = DeviceCapabilities::default();
    caps.medium = Medium::Ip;
    caps.max_transmission_unit = usize::from(path.mtu);
    caps.checksum = ChecksumCapabilities::ignored();
    // Received headers are verified by the parser; sent ones are summed by smoltcp.
    caps.checksum.ipv4 = Checksum::Tx;
    if path.capabilities.tso4 {
        caps.segmentation.tcpv4 = NonZeroUsize::new(MAX_SEGMENT_PACKET);
    }
    if path.capabilities.tso6 {
        caps.segmentation.tcpv6 = NonZeroUsize::new(MAX_SEGMENT_PACKET);
    }
    caps
}

impl Engine {
    /// The socket: states, rings.
    pub fn socket(&mut self) -> &mut Socket<'static> {
        self.sockets.get_mut(self.handle)
    }

    /// What was sent last.
    #[must_use]
    pub const fn last_sent(&self) -> LastSent {
        self.last
    }

    /// Counts payload bytes, either direction.
    pub fn carried(&mut self, bytes: usize) {
        self.carried += bytes as u64;
    }

    fn prepare(&mut self) -> &mut Socket<'static> {
        let socket = self.socket();
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        socket.set_keep_alive(Some(KEEPALIVE));
        socket.set_timeout(Some(SILENCE));
        socket
    }

    /// Answers a guest's connection request to `local`: listens, and replays the SYN.
    ///
    /// # Errors
    /// When `local` is no endpoint to listen at, which the parser excludes.
    pub fn accept(
        &mut self,
        now: Instant,
        tx: &mut TxBatch,
        ends: emit::Ends,
        syn: Syn,
    ) -> Result<(), ListenError> {
        let local = endpoint(ends.dst);
        self.scale = syn.options.window_scale.unwrap_or(0);
        self.prepare().listen(local)?;
        let replay = syn_packet(ends, syn);
        self.ingress(now, tx, &replay);
        Ok(())
    }

    /// Begins a connection to the guest at `ends.dst` from `ends.src`.
    ///
    /// # Errors
    /// When an endpoint has port 0.
    pub fn connect(&mut self, ends: emit::Ends) -> Result<(), ConnectError> {
        self.prepare();
        let socket = self.sockets.get_mut::<Socket<'static>>(self.handle);
        socket.connect(
            self.interface.context(),
            endpoint(ends.dst),
            endpoint(ends.src),
        )
    }

    /// Takes one segment of this connection from the guest; `packet` is its whole IP packet.
    pub fn segment(&mut self, now: Instant, tx: &mut TxBatch, segment: &TcpSegment, packet: &[u8]) {
        if segment.has(tcp_flags::SYN) {
            let options = parse::syn_options(segment.bytes(packet));
            self.scale = options.window_scale.unwrap_or(0);
        }
        let window = if self.only_fin_outstanding() {
            Some(1)
        } else {
            self.small_window(segment)
        };
        let mut copy = [0; MAX_HEADERS];
        match (copy.get_mut(..packet.len()), window) {
            (Some(copy), Some(window)) if segment.payload_len == 0 => {
                copy.copy_from_slice(packet);
                self.vary_window(copy, window);
                self.ingress(now, tx, copy);
            }
            _ => self.ingress(now, tx, packet),
        }
    }

    /// The window less one, if it is too small for a whole segment. An open one is not closed by that,
    /// since nothing would probe it, nor made larger, since what goes beyond it is lost.
    fn small_window(&self, segment: &TcpSegment) -> Option<u16> {
        let bytes = u32::from(segment.window) << self.scale;
        let small = bytes < u32::from(self.path.mtu) && !segment.has(tcp_flags::SYN);
        (small && segment.window > 1).then(|| segment.window - 1)
    }

    fn only_fin_outstanding(&mut self) -> bool {
        let socket = self.socket();
        matches!(
            socket.state(),
            State::FinWait1 | State::Closing | State::LastAck
        ) && socket.send_queue() == 0
    }

    /// Keeps three repetitions of an acknowledgement from being taken for a loss, by a window that
    /// changes between `window` and one more. Two cases need that, for smoltcp 0.14:
    ///
    /// - Nothing but our FIN is outstanding: it stops its retransmission timer without sending, and the
    ///   FIN, if it was lost, never goes out again. The window itself no longer matters.
    /// - The window has no room for a whole segment: it retransmits one all the same, which the guest
    ///   takes in part, and when the window next closes and opens, it waits for ever for an
    ///   acknowledgement of the rest. The window is true within one unit.
    fn vary_window(&mut self, packet: &mut [u8], window: u16) {
        self.varied = !self.varied;
        let window = window.saturating_add(u16::from(self.varied));
        let header_len = if packet[0] >> 4 == 6 {
            40
        } else {
            usize::from(packet[0] & 0xf) * 4
        };
        if let Some(field) = packet.get_mut(header_len + 14..header_len + 16) {
            field.copy_from_slice(&window.to_be_bytes());
        }
    }

    fn ingress(&mut self, now: Instant, tx: &mut TxBatch, packet: &[u8]) {
        let mut device = OnePacket {
            packet: Some(packet),
            bulk: false,
            tx,
            path: &self.path,
            last: &mut self.last,
        };
        self.interface
            .poll_ingress_single(now, &mut device, &mut self.sockets);
    }

    /// Sends what is due, until nothing is or the batch is full; true when the batch stopped it.
    /// `bulk` off lets a last segment (a RST) into the reserve for control frames.
    pub fn egress(&mut self, now: Instant, tx: &mut TxBatch, bulk: bool) -> bool {
        loop {
            let mut device = OnePacket {
                packet: None,
                bulk,
                tx,
                path: &self.path,
                last: &mut self.last,
            };
            let sent = self
                .interface
                .poll_egress(now, &mut device, &mut self.sockets);
            if matches!(sent, PollResult::None) {
                return !tx.has_room();
            }
        }
    }

    /// When the engine wants to be polled next.
    pub fn poll_at(&mut self, now: Instant) -> Option<Instant> {
        self.interface.poll_at(now, &self.sockets)
    }
}

fn endpoint(addr: SocketAddr) -> IpEndpoint {
    IpEndpoint::new(addr.ip().into(), addr.port())
}

/// Writes a SYN anew from what was kept of it, so that nothing of the guest's options but the
/// known ones reaches smoltcp.
fn syn_packet(ends: emit::Ends, syn: Syn) -> Vec<u8> {
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
        timestamp: None,
        payload: &[],
    };
    let (src, dst): (IpAddress, IpAddress) = (ends.src.ip().into(), ends.dst.ip().into());
    let ip = IpRepr::new(src, dst, IpProtocol::Tcp, tcp.buffer_len(), 64);
    let mut packet = vec![0; ip.buffer_len()];
    let caps = ChecksumCapabilities::ignored();
    ip.emit(&mut packet[..], &caps);
    let mut segment = smoltcp::wire::TcpPacket::new_unchecked(&mut packet[ip.header_len()..]);
    tcp.emit(&mut segment, &src, &dst, &caps);
    packet
}

/// A device for constructing an `Interface`, which asks it for its capabilities only.
struct NullDevice(DeviceCapabilities);

impl Device for NullDevice {
    type RxToken<'a> = NoPacket;
    type TxToken<'a> = NoPacket;

    fn receive(&mut self, _now: Instant) -> Option<(NoPacket, NoPacket)> {
        None
    }

    fn transmit(&mut self, _now: Instant) -> Option<NoPacket> {
        None
    }

    fn capabilities(&self) -> DeviceCapabilities {
        self.0.clone()
    }
}

/// A token that is never given out.
enum NoPacket {}

impl RxToken for NoPacket {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, _f: F) -> R {
        match self {}
    }
}

impl TxToken for NoPacket {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, _len: usize, _f: F) -> R {
        match self {}
    }
}

/// The device of one poll: at most one packet in, frames out to the batch.
struct OnePacket<'a> {
    packet: Option<&'a [u8]>,
    bulk: bool,
    tx: &'a mut TxBatch,
    path: &'a Path,
    last: &'a mut LastSent,
}

impl Device for OnePacket<'_> {
    type RxToken<'a>
        = Received<'a>
    where
        Self: 'a;
    type TxToken<'a>
        = Transmit<'a>
    where
        Self: 'a;

    fn receive(&mut self, _now: Instant) -> Option<(Received<'_>, Transmit<'_>)> {
        let packet = self.packet.take()?;
        // An answer to a segment is short and may use the reserve, so no room is asked for.
        let token = Transmit {
            tx: self.tx,
            path: self.path,
            last: self.last,
            segment: None,
        };
        Some((Received(packet), token))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Transmit<'_>> {
        let room = !self.bulk || self.tx.has_room();
        room.then_some(Transmit {
            tx: self.tx,
            path: self.path,
            last: self.last,
            segment: None,
        })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        capabilities(*self.path)
    }
}

struct Received<'a>(&'a [u8]);

impl RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

struct Transmit<'a> {
    tx: &'a mut TxBatch,
    path: &'a Path,
    last: &'a mut LastSent,
    segment: Option<std::num::NonZeroU16>,
}

impl TxToken for Transmit<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let Self {
            tx,
            path,
            last,
            segment,
        } = self;
        let mut write = Some(f);
        let mut result = None;
        tx.push(path.wire.link, ETHERNET_HEADER + len, |frame| {
            // `push` calls this at most once, so the closure is there.
            if let Some(write) = write.take() {
                let packet = emit::ethernet_ipv4(frame, path.wire);
                result = Some(write(packet));
            }
            (finish(frame, path.capabilities, segment, last), ())
        });
        // No room: the frame is lost as on any link, but the closure must have its bytes.
        match (result, write) {
            (Some(result), _) => result,
            (None, Some(write)) => write(&mut vec![0; len]),
            (None, None) => unreachable_write(),
        }
    }

    fn set_meta(&mut self, meta: PacketMeta) {
        self.segment = meta.segmentation_offload_size;
    }
}

/// `write` was taken only where `result` was set.
#[expect(
    clippy::panic,
    reason = "both arms above cover every state that `push` can leave"
)]
fn unreachable_write() -> ! {
    panic!("a transmit closure ran without a result")
}

/// Completes a frame that smoltcp wrote: the checksum, or what the link needs to complete it.
fn finish(
    frame: &mut [u8],
    capabilities: TxCapabilities,
    segment: Option<std::num::NonZeroU16>,
    last: &mut LastSent,
) -> Offload {
    let packet = &frame[ETHERNET_HEADER..];
    let ipv6 = packet[0] >> 4 == 6;
    let header_len = if ipv6 { 40 } else { 20 };
    let tcp = &packet[header_len..];
    let word = |at: usize| u32::from_be_bytes([tcp[at], tcp[at + 1], tcp[at + 2], tcp[at + 3]]);
    *last = LastSent {
        seq: word(4),
        ack: word(8),
        window: u16::from_be_bytes([tcp[14], tcp[15]]),
    };
    let tcp_header = usize::from(tcp[12] >> 4) * 4;
    let start = ETHERNET_HEADER + header_len;
    let length = u16::try_from(tcp.len()).unwrap_or(u16::MAX);
    let pseudo = pseudo_header(packet, ipv6, length).fold();
    frame[start + 16..start + 18].copy_from_slice(&pseudo.to_be_bytes());
    if !capabilities.checksum {
        complete(frame, start, usize::from(CHECKSUM_FIELD));
        return Offload::NONE;
    }
    let header = |len: usize| u16::try_from(len).unwrap_or(u16::MAX);
    Offload {
        checksum: Some(PartialChecksum {
            start: header(start),
            offset: CHECKSUM_FIELD,
        }),
        segment: segment.map(|size| TcpSegmentation {
            ipv6,
            size,
            header_len: header(start + tcp_header),
        }),
    }
}

fn pseudo_header(packet: &[u8], ipv6: bool, length: u16) -> Sum {
    // The addresses stand next to each other in both headers, so their order does not matter.
    let addresses = if ipv6 {
        &packet[8..40]
    } else {
        &packet[12..20]
    };
    Sum::default()
        .bytes(addresses)
        .word(u16::from(PROTOCOL_TCP))
        .word(length)
}
