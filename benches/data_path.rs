//! What a packet costs between link and host sockets: time, and, once warm, no allocation at all.
//!
//! Each [`Scenario`] drives the real stack with frames written in advance and a host that costs
//! next to nothing, so what is measured is ours: parsing, flows, rings, frames. One step is one
//! turn of the event loop, or the few that a dialogue takes. Before anything is measured,
//! [`assert_no_allocations`] holds the promise about memory; it runs in the quick form as well
//! (`cargo test --benches`, `cargo bench -- --test`).

mod support;

use std::cell::RefCell;
use std::hint::black_box;

use criterion::{BatchSize, BenchmarkGroup, Criterion, Throughput, measurement::WallTime};
use tapgate::buf::RxMeta;
use tapgate::net::Duration;
use tapgate::net::parse::{self, Frame, Packet, Transport};

use support::alloc::allocations;
use support::guest::{GuestTcp, MSS, OFFLOADED, VOUCHED_FOR, WINDOW, capabilities, datagram};
use support::host::{CHARGEN, DISCARD, ECHO, SLOW};
use support::{Bed, LINK};

/// Payload of a segment of somebody who types, or plays.
const SMALL: usize = 64;
/// Payloads of datagrams that are parsed: short, full at an MTU of 1500, the longest.
const PARSED: [usize; 3] = [64, 1472, 65_507];
/// Packets to warm up: the rings are filled from end to end, and timers of a second have come due.
const WARM_PACKETS: usize = 50_000;
/// Packets that must not allocate after that.
const STEADY_PACKETS: usize = 10_000;
/// A pause after which a retransmission timer of smoltcp (1 s at least) has come due.
const PAUSE: Duration = Duration::from_millis(1100);
/// How long the acknowledgement of a short segment may take.
const ACK_DELAY: Duration = Duration::from_millis(1);

/// A dialogue that can be gone through again and again.
trait Scenario {
    /// One turn, or one round of the dialogue; returns the packets with payload in it.
    fn step(&mut self) -> usize;

    /// What a step carries.
    fn throughput(&self) -> Throughput;
}

/// The guest sends a turn's worth of segments; the host swallows them.
struct Upload {
    bed: Bed,
    guest: GuestTcp,
    meta: RxMeta,
    payload: usize,
    segments: usize,
}

impl Upload {
    fn new(payload: usize, meta: RxMeta) -> Self {
        Self::to(DISCARD, payload, meta)
    }

    /// To the service at that port.
    fn to(port: u16, payload: usize, meta: RxMeta) -> Self {
        let mut bed = Bed::new(capabilities(true));
        let mut guest = GuestTcp::new(port, payload);
        guest.connect(&mut bed);
        Self {
            bed,
            guest,
            meta,
            payload,
            // As much as the receive batch of a turn holds (`event_loop.rs`): 128 frames, 256 KiB.
            segments: 128.min(256 * 1024 / payload),
        }
    }
}

impl Scenario for Upload {
    fn step(&mut self) -> usize {
        let (mut sent, before) = (0, self.bed.host.taken());
        // The window opens with what has been sent.
        while sent < self.segments && self.guest.may_send() {
            self.guest.send(&mut self.bed, self.meta);
            sent += 1;
        }
        self.bed.finish(|frame| self.guest.see(frame));
        // What does not fill a segment waits for an answer to be acknowledged with.
        if !self.guest.is_acknowledged() {
            self.bed.rest(ACK_DELAY, |frame| self.guest.see(frame));
        }
        assert!(self.guest.is_acknowledged(), "all of it came");
        let mut times = 0;
        while self.bed.host.taken() - before < sent * self.payload {
            self.bed.ready();
            self.bed.finish(|frame| self.guest.see(frame));
            times += 1;
            assert!(times <= 2 * sent, "the host takes some each time");
        }
        sent
    }

    fn throughput(&self) -> Throughput {
        bytes(self.segments * self.payload)
    }
}

/// The host has endless data; the guest acknowledges a window of it, segment by segment.
struct Download {
    bed: Bed,
    guest: GuestTcp,
    /// It goes out of the host's socket into frames, past the ring.
    ahead: bool,
    /// Steps that may go by until it does.
    turning: usize,
}

impl Download {
    fn new(offload: bool) -> Self {
        let mut bed = Bed::new(capabilities(offload));
        let mut guest = GuestTcp::new(CHARGEN, 0);
        guest.connect(&mut bed);
        Self {
            bed,
            guest,
            ahead: offload,
            turning: if offload { 10 } else { 0 },
        }
    }
}

impl Scenario for Download {
    fn step(&mut self) -> usize {
        let (before, discarded) = (self.guest.heard(), self.bed.host.discarded());
        let packets = self.guest.acknowledge(&mut self.bed);
        self.bed.finish(|frame| self.guest.see(frame));
        let came = usize::try_from(self.guest.heard().wrapping_sub(before));
        if self.turning > 0 {
            self.turning -= 1;
            return packets;
        }
        assert_eq!(came, Ok(WINDOW), "a window came, no more and no less");
        let ahead = if self.ahead { WINDOW } else { 0 };
        let went = self.bed.host.discarded() - discarded;
        assert_eq!(went, ahead, "the way that it went");
        packets
    }

    fn throughput(&self) -> Throughput {
        bytes(WINDOW)
    }
}

/// One byte there, one byte back.
struct RequestResponse {
    bed: Bed,
    guest: GuestTcp,
}

impl RequestResponse {
    fn new() -> Self {
        let mut bed = Bed::new(capabilities(true));
        let mut guest = GuestTcp::new(ECHO, 1);
        guest.connect(&mut bed);
        Self { bed, guest }
    }
}

impl Scenario for RequestResponse {
    fn step(&mut self) -> usize {
        let before = self.guest.heard();
        self.guest.send(&mut self.bed, VOUCHED_FOR);
        self.bed.finish(|frame| self.guest.see(frame));
        self.bed.ready();
        self.bed.finish(|frame| self.guest.see(frame));
        assert_eq!(self.guest.heard(), before.wrapping_add(1), "the answer");
        2
    }

    fn throughput(&self) -> Throughput {
        Throughput::Elements(1)
    }
}

/// A connection that rests after each round trip, beside a UDP port whose deadline is always near.
struct Paced {
    pair: RequestResponse,
    frame: Vec<u8>,
}

impl Paced {
    fn new() -> Self {
        let frame = datagram(64);
        let mut bed = Bed::new(capabilities(true));
        bed.frame(&frame, RxMeta::plain(LINK));
        let mut guest = GuestTcp::new(ECHO, 1);
        guest.connect(&mut bed);
        let pair = RequestResponse { bed, guest };
        Self { pair, frame }
    }
}

impl Scenario for Paced {
    fn step(&mut self) -> usize {
        let packets = self.pair.step();
        let RequestResponse { bed, guest } = &mut self.pair;
        guest.acknowledge(bed);
        bed.frame(&self.frame, RxMeta::plain(LINK));
        bed.finish(|frame| guest.see(frame));
        bed.rest(PAUSE, |_| {});
        packets + 1
    }

    fn throughput(&self) -> Throughput {
        self.pair.throughput()
    }
}

/// One datagram there, the same back.
struct UdpEcho {
    bed: Bed,
    frame: Vec<u8>,
}

impl UdpEcho {
    fn new(payload: usize) -> Self {
        Self {
            bed: Bed::new(capabilities(true)),
            frame: datagram(payload),
        }
    }
}

impl Scenario for UdpEcho {
    fn step(&mut self) -> usize {
        self.bed.frame(&self.frame, RxMeta::plain(LINK));
        self.bed.ready();
        let mut came = 0;
        self.bed.finish(|frame| came += frame.len());
        assert_eq!(came, self.frame.len(), "the same datagram");
        2
    }

    fn throughput(&self) -> Throughput {
        Throughput::Elements(1)
    }
}

/// A connection begins and ends, both directions in order.
struct Connections {
    bed: Bed,
    guest: GuestTcp,
}

impl Connections {
    fn new() -> Self {
        Self {
            bed: Bed::new(capabilities(true)),
            guest: GuestTcp::new(DISCARD, 1),
        }
    }
}

impl Scenario for Connections {
    fn step(&mut self) -> usize {
        self.guest.connect(&mut self.bed);
        self.guest.close(&mut self.bed);
        1
    }

    fn throughput(&self) -> Throughput {
        Throughput::Elements(1)
    }
}

impl Connections {
    /// From the guest's SYN to the SYN|ACK.
    fn open(&mut self) {
        self.guest.open(&mut self.bed);
    }

    /// The rest of a connection that was opened, if one was.
    fn end(&mut self) {
        if self.bed.flows() > 0 {
            self.guest.confirm(&mut self.bed);
            self.guest.close(&mut self.bed);
        }
    }
}

/// Parses a datagram's frame and verifies every checksum in it; gives the length of its payload.
fn parsed(frame: &[u8]) -> usize {
    let Ok(Frame {
        packet: Packet::Ip(ip),
        ..
    }) = parse::frame(frame, RxMeta::plain(LINK))
    else {
        return 0;
    };
    match parse::transport(&ip) {
        Ok(Transport::Udp(datagram)) => datagram.payload.len(),
        Ok(_) | Err(_) => 0,
    }
}

fn bytes(count: usize) -> Throughput {
    Throughput::Bytes(count as u64)
}

/// The scenarios in which only packets of flows that exist are carried.
fn steady() -> Vec<(&'static str, Box<dyn Scenario>)> {
    let plain = RxMeta::plain(LINK);
    vec![
        ("upload", Box::new(Upload::new(MSS, plain))),
        ("upload small", Box::new(Upload::new(SMALL, VOUCHED_FOR))),
        (
            "upload offloaded",
            Box::new(Upload::new(OFFLOADED, VOUCHED_FOR)),
        ),
        (
            "upload offloaded, slow host",
            Box::new(Upload::to(SLOW, OFFLOADED, VOUCHED_FOR)),
        ),
        (
            "upload, slow host",
            Box::new(Upload::to(SLOW, MSS, VOUCHED_FOR)),
        ),
        ("download", Box::new(Download::new(false))),
        ("download offloaded", Box::new(Download::new(true))),
        ("request-response", Box::new(RequestResponse::new())),
        ("udp echo 64", Box::new(UdpEcho::new(64))),
        ("udp echo 1400", Box::new(UdpEcho::new(1400))),
    ]
}

/// Goes on until so many packets were carried; returns their exact number.
fn carry(scenario: &mut dyn Scenario, least: usize) -> usize {
    let mut packets = 0;
    while packets < least {
        packets += scenario.step();
    }
    packets
}

/// Allocations while a warm scenario carries its packets; prints them.
fn count_allocations(name: &str, scenario: &mut dyn Scenario) -> u64 {
    carry(scenario, WARM_PACKETS);
    let before = allocations();
    let packets = carry(scenario, STEADY_PACKETS);
    let count = allocations() - before;
    println!("steady state {name}: {count} allocations in {packets} packets");
    count
}

/// Every steady scenario, once warm, carries its packets without a single allocation.
fn assert_no_allocations() {
    assert!(allocations() > 0, "allocations are counted");
    let mut total = 0;
    for (name, mut scenario) in steady() {
        total += count_allocations(name, scenario.as_mut());
    }
    total += count_allocations("paced round trips", &mut Paced::new());
    // No promise is made for beginnings; the number is for the reader.
    let mut connections = Connections::new();
    carry(&mut connections, 100);
    let before = allocations();
    let begun = carry(&mut connections, 100);
    let count = allocations() - before;
    println!("set-up and tear-down: {count} allocations in {begun} connections");
    assert_eq!(total, 0, "a packet of a flow that exists allocates nothing");
}

fn measure(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, mut scenario: impl Scenario) {
    group.throughput(scenario.throughput());
    carry(&mut scenario, WARM_PACKETS);
    group.bench_function(name, |bencher| {
        bencher.iter(|| black_box(scenario.step()));
    });
}

fn measure_all(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("upload");
    let plain = RxMeta::plain(LINK);
    measure(&mut group, "1500", Upload::new(MSS, plain));
    measure(
        &mut group,
        "1500 checksum offload",
        Upload::new(MSS, VOUCHED_FOR),
    );
    measure(
        &mut group,
        "64 KiB offload",
        Upload::new(OFFLOADED, VOUCHED_FOR),
    );
    measure(
        &mut group,
        "64 bytes a segment",
        Upload::new(SMALL, VOUCHED_FOR),
    );
    measure(
        &mut group,
        "64 KiB offload, slow host",
        Upload::to(SLOW, OFFLOADED, VOUCHED_FOR),
    );
    group.finish();

    let mut group = criterion.benchmark_group("download");
    measure(&mut group, "1500", Download::new(false));
    measure(&mut group, "64 KiB offload", Download::new(true));
    group.finish();

    let mut group = criterion.benchmark_group("round trip");
    measure(&mut group, "tcp 1", RequestResponse::new());
    measure(&mut group, "udp 64", UdpEcho::new(64));
    measure(&mut group, "udp 1400", UdpEcho::new(1400));
    group.finish();

    let mut group = criterion.benchmark_group("connection");
    measure(&mut group, "set-up and tear-down", Connections::new());
    measure_opening(&mut group);
    group.finish();

    let mut group = criterion.benchmark_group("parse");
    for payload in PARSED {
        measure_parsing(&mut group, payload);
    }
    group.finish();
}

/// The time to the SYN|ACK alone; what ends the connection before is not counted.
fn measure_opening(group: &mut BenchmarkGroup<'_, WallTime>) {
    let connections = RefCell::new(Connections::new());
    group.throughput(Throughput::Elements(1));
    group.bench_function("SYN to SYN|ACK", |bencher| {
        bencher.iter_batched(
            || connections.borrow_mut().end(),
            |()| connections.borrow_mut().open(),
            BatchSize::PerIteration,
        );
    });
}

fn measure_parsing(group: &mut BenchmarkGroup<'_, WallTime>, payload: usize) {
    let frame = datagram(payload);
    assert_eq!(parsed(&frame), payload, "it is what the stack would take");
    group.throughput(bytes(payload));
    group.bench_function(format!("and verify a datagram of {payload}"), |bencher| {
        bencher.iter(|| parsed(black_box(&frame)));
    });
}

fn main() {
    // A list of names is read by programs.
    if !std::env::args().any(|arg| arg == "--list") {
        assert_no_allocations();
    }
    let mut criterion = Criterion::default().configure_from_args();
    measure_all(&mut criterion);
    criterion.final_summary();
}
