//! Thins out what a guest floods its network with, so that its connections still get through.
//!
//! A tap has a queue for each worker, which a guest can fill faster than anybody reads: a frame costs a microsecond there
//! and here alike, and some cost ten to answer. What the queue has no room for is lost, whatever it is, and a connection
//! comes to a stop at one loss in ten. So while connections carry data, of each other kind of frame only so many a second
//! are taken, and fewer where the processor does not keep up: a filter of the tap (classic BPF,
//! `Documentation/networking/filter.rst`) drops part of the rest before it is queued, at the cost of who sends it.
//! Comes in: frames as they are read, the time. Goes out: the filter, when it is to be another. Each queue's frames are
//! counted for themselves; the queues meet in [`TapFilter`].

pub(super) mod tap_filter;

use std::io;
use std::time::{Duration, Instant};

use libc::sock_filter as Instruction;

use tap_filter::TapFilter;

/// A kind of frame that is thinned by itself: what else there is gets through unharmed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// ARP, and what is no IP at all.
    Link,
    /// Fragments of either family.
    Fragment,
    /// UDP; a train of datagrams is one. Those of flows that came lately do not count.
    Datagram,
    /// TCP segments with SYN or RST, or without ACK: none carries a connection on.
    Control,
    /// ICMP and every other protocol.
    Other,
}

const KINDS: usize = 5;

/// Flows of datagrams that are remembered: who sends much has few of them, and a flood to random ports has many.
const FLOWS: usize = 1024;
/// Frames of each kind that are taken in a second while connections carry data, in the order of [`Kind`], where no
/// other kind is too much: several times what they are used for, and less than a third of what a fast processor answers.
const MOST: [u64; KINDS] = [10_000, 20_000, 20_000, 40_000, 10_000];
/// Kinds that hold what makes sockets of the host's: that costs more than anything else, and on some machines a
/// processor can't answer half of what is allowed.
const COSTLY: [Kind; 2] = [Kind::Datagram, Kind::Control];
/// How often what is taken of those is halved at most: to 1,250 and 2,500 a second.
const MOST_STRAIN: u8 = 4;
/// How long the link runs empty in every window before one halving is taken back.
const CALM: Duration = Duration::from_secs(2);
/// How long is counted before anything changes.
const WINDOW: Duration = Duration::from_millis(10);
/// So many windows in a row a kind is too much before it is thinned: a crowd that comes at once is no flood.
const PATIENCE: u8 = 10;
/// How long connections that say nothing count as carrying data: a flood may have stopped them.
const MEMORY: Duration = Duration::from_secs(3);
/// Frames of those kinds after which the clock is looked at.
const GLANCE: u64 = 256;
/// The part of a kind that gets through, of 2^32: all of it, and the least.
const ALL: u32 = u32::MAX;
const LEAST: u32 = 1 << 16;

/// Counts of one queue, and the part of each kind that is let through.
#[derive(Debug)]
pub(super) struct Thinning {
    shared: TapFilter,
    queue: usize,
    queues: u64,
    counts: [u64; KINDS],
    kept: [u32; KINDS],
    /// Segments that carry connections on.
    segments: u64,
    /// Datagrams of flows that came lately.
    known: u64,
    /// The link ran empty since.
    emptied: bool,
    /// How often what is taken of [`COSTLY`] kinds is halved, because the processor does not keep up with them.
    strain: u8,
    /// Windows in a row in which the processor did not keep up.
    strained: u8,
    /// How long the link has run empty in every window.
    calm: Duration,
    /// Windows in a row in which a kind was too much.
    over: [u8; KINDS],
    /// The latest flow of datagrams for each place.
    flows: Box<[u32; FLOWS]>,
    since: Option<Instant>,
}

impl Thinning {
    pub(super) fn new(shared: TapFilter, queue: usize) -> Self {
        Self {
            queues: shared.queues().max(1),
            shared,
            queue,
            counts: [0; KINDS],
            kept: [ALL; KINDS],
            segments: 0,
            known: 0,
            emptied: false,
            strain: 0,
            strained: 0,
            calm: Duration::ZERO,
            over: [0; KINDS],
            flows: Box::new([0; FLOWS]),
            since: None,
        }
    }

    /// Counts a frame that came through.
    pub(super) fn count(&mut self, frame: &[u8]) {
        let Some(kind) = kind(frame) else {
            self.segments += 1;
            return;
        };
        if kind != Kind::Datagram || self.is_new(flow(frame)) {
            self.counts[kind as usize] += 1;
        } else {
            self.known += 1;
        }
    }

    /// Nothing more waits in the link.
    pub(super) const fn note_empty(&mut self) {
        self.emptied = true;
    }

    /// Of a costly kind, where the processor keeps up: it is dealt to all queues alike, by its ports, and one processor
    /// has to do with all of it where the guest keeps the others busy.
    const fn costly(&self, kind: usize) -> u64 {
        MOST[kind] / self.queues
    }

    /// Frames of a kind that are taken in a second.
    fn most(&self, kind: usize) -> u64 {
        if COSTLY.iter().any(|costly| *costly as usize == kind) {
            self.costly(kind) >> self.strain
        } else {
            MOST[kind]
        }
    }

    /// Learns whether the processor keeps up, `rates` being those of each kind in the time that has `elapsed`: not where
    /// the link is never empty, and more begins and ends than is carried on. A crowd of connections that come about
    /// carries more than it begins. What is changed gets [`PATIENCE`] to show.
    fn feel_strain(&mut self, elapsed: Duration, rates: [u64; KINDS]) {
        let costly = COSTLY.map(|kind| self.counts[kind as usize]);
        let costly: u64 = costly.into_iter().sum();
        let much = |kind: Kind| rates[kind as usize] > self.costly(kind as usize) >> MOST_STRAIN;
        if self.emptied {
            self.strained = 0;
            self.calm += elapsed;
            while self.strain > 0 && self.calm >= CALM {
                self.calm -= CALM;
                self.strain -= 1;
            }
        } else if costly > self.segments + self.known && COSTLY.into_iter().any(much) {
            self.calm = Duration::ZERO;
            self.strained += 1;
            if self.strained == PATIENCE {
                self.strained = 0;
                self.strain = (self.strain + 1).min(MOST_STRAIN);
            }
        } else {
            self.strained = 0;
        }
        self.emptied = false;
    }

    /// No datagram of this flow came lately.
    fn is_new(&mut self, flow: u32) -> bool {
        let place = usize::try_from(flow).unwrap_or(0) % FLOWS;
        std::mem::replace(&mut self.flows[place], flow) != flow
    }

    /// It is time to look at the clock: something is thinned, or may have to be, or less is taken than else; or another
    /// queue wants to know whether connections carry data.
    pub(super) fn is_due(&self) -> bool {
        let counted = self.counts.iter().sum::<u64>();
        let tells = self.segments > 0 && self.shared.is_asked();
        self.is_on() || self.strain > 0 || counted >= GLANCE || tells
    }

    /// Something is thinned.
    pub(super) fn is_on(&self) -> bool {
        self.kept != [ALL; KINDS]
    }

    /// What is to change by what was counted; true when there is to be another filter.
    pub(super) fn look(&mut self, now: Instant) -> bool {
        let since = *self.since.get_or_insert(now);
        let elapsed = now.duration_since(since);
        if elapsed < WINDOW && self.since != Some(now) {
            return false;
        }
        if self.segments > 0 {
            self.shared.note_carried(now);
        }
        let carries = self.shared.carried_within(MEMORY, now);
        let before = self.kept;
        if !elapsed.is_zero() {
            let micros = u64::try_from(elapsed.as_micros())
                .unwrap_or(u64::MAX)
                .max(1);
            let rates = self
                .counts
                .map(|count| count.saturating_mul(1_000_000) / micros);
            self.feel_strain(elapsed, rates);
            let floods =
                (0..KINDS).filter(|kind| before[*kind] != ALL || rates[*kind] > self.most(*kind));
            // Several at once share what one would have.
            let floods = u64::try_from(floods.count()).unwrap_or(1).max(1);
            for kind in 0..KINDS {
                let (rate, most) = (rates[kind], self.most(kind));
                let over = &mut self.over[kind];
                *over = if rate > most {
                    over.saturating_add(1)
                } else {
                    0
                };
                if *over > 0 {
                    self.shared.ask();
                }
                let floods_it = *over >= PATIENCE || before[kind] != ALL;
                self.kept[kind] = if carries && floods_it {
                    part(before[kind], rate, most / floods)
                } else {
                    ALL
                };
            }
        }
        self.counts = [0; KINDS];
        self.segments = 0;
        self.known = 0;
        self.since = Some(now);
        self.kept != before
    }

    /// Has the filter of the tap set as it is to be now, if that is another; none where nothing is thinned.
    ///
    /// # Errors
    /// What `set` reports; there is no filter then until another queue's part changes.
    pub(super) fn set(
        &self,
        set: impl Fn(Option<Vec<Instruction>>) -> io::Result<()>,
    ) -> io::Result<()> {
        self.shared.change(self.queue, self.kept, set)
    }

    /// Has the filter of the tap taken away, if there is one, for good: no queue sets another.
    pub(super) fn end(&self, clear: impl FnOnce()) {
        self.shared.end(clear);
    }
}

/// The part to let through of what came at this rate by letting a part through.
fn part(kept: u32, rate: u64, most: u64) -> u32 {
    if rate > most + most / 4 {
        let less = u64::from(kept) * most / rate;
        u32::try_from(less).unwrap_or(ALL).max(LEAST)
    } else if rate < most / 2 {
        kept.saturating_mul(2)
    } else {
        kept
    }
}

const ETHERTYPE: usize = 12;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const TCP: u8 = 6;
const UDP: u8 = 17;
const IPV6_FRAGMENT: u8 = 44;
/// More fragments follow, or the place is not the first (RFC 791).
const FRAGMENTED: u16 = 0x3fff;
/// SYN, RST and ACK; what carries a connection on has the last alone.
const FLAGS: u8 = 0x16;
const CARRIES: u8 = 0x10;

/// What is thinned as one kind; none for what never is. The same as [`filter`] does in the kernel.
fn kind(frame: &[u8]) -> Option<Kind> {
    let byte = |at: usize| frame.get(at).copied().unwrap_or(0);
    let word = |at: usize| u16::from_be_bytes([byte(at), byte(at + 1)]);
    let (protocol, flags) = match word(ETHERTYPE) {
        IPV4 if word(20) & FRAGMENTED != 0 => return Some(Kind::Fragment),
        IPV4 => (byte(23), 14 + usize::from(byte(14) & 15) * 4 + 13),
        IPV6 => (byte(20), 67),
        _ => return Some(Kind::Link),
    };
    match protocol {
        TCP if byte(flags) & FLAGS == CARRIES => None,
        TCP => Some(Kind::Control),
        UDP => Some(Kind::Datagram),
        IPV6_FRAGMENT if word(ETHERTYPE) == IPV6 => Some(Kind::Fragment),
        _ => Some(Kind::Other),
    }
}

/// What tells a datagram's flow from others: addresses, or their ends, and ports, in one number (FNV-1a). Who has two
/// flows taken for one gains nothing by that.
fn flow(frame: &[u8]) -> u32 {
    let place = if frame.get(12..14) == Some(&IPV6.to_be_bytes()) {
        42..58
    } else {
        26..38
    };
    let bytes = frame.get(place).unwrap_or_default();
    bytes.iter().fold(0x811c_9dc5, |sum, byte| {
        (sum ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    })
}

/// The program that lets through a part of each kind, of 2^32.
fn filter(kept: [u32; KINDS]) -> Vec<Instruction> {
    use libc::{
        BPF_ABS, BPF_ALU, BPF_AND, BPF_B, BPF_H, BPF_IMM, BPF_IND, BPF_JA, BPF_JEQ, BPF_JGT,
        BPF_JMP, BPF_JSET, BPF_K, BPF_LD, BPF_LDX, BPF_MSH, BPF_RET, BPF_W, BPF_X,
    };
    let op = |code: u32, jt, jf, k: u32| Instruction {
        code: u16::try_from(code).unwrap_or(0),
        jt,
        jf,
        k,
    };
    let is = |k: u32, jt, jf| op(BPF_JMP | BPF_JEQ | BPF_K, jt, jf, k);
    let jump = |k| op(BPF_JMP | BPF_JA, 0, 0, k);
    let threshold = |kind: Kind| op(BPF_LDX | BPF_IMM, 0, 0, kept[kind as usize]);
    // Where a kind's threshold is taken; jumps count from the next instruction.
    const LINK: u8 = 18;
    const FRAGMENT: u8 = 20;
    const DATAGRAM: u8 = 22;
    const OTHER: u8 = 24;
    const CONTROL: u8 = 26;
    const TAKE: u8 = 29;
    vec![
        op(BPF_LD | BPF_H | BPF_ABS, 0, 0, 12),
        is(IPV4.into(), 1, 0),
        is(IPV6.into(), 11 - 3, LINK - 3),
        op(BPF_LD | BPF_H | BPF_ABS, 0, 0, 20),
        op(
            BPF_JMP | BPF_JSET | BPF_K,
            FRAGMENT - 5,
            0,
            FRAGMENTED.into(),
        ),
        op(BPF_LD | BPF_B | BPF_ABS, 0, 0, 23),
        is(UDP.into(), DATAGRAM - 7, 0),
        is(TCP.into(), 0, OTHER - 8),
        op(BPF_LDX | BPF_B | BPF_MSH, 0, 0, 14),
        op(BPF_LD | BPF_B | BPF_IND, 0, 0, 27),
        jump(16 - 11),
        // 11: IPv6.
        op(BPF_LD | BPF_B | BPF_ABS, 0, 0, 20),
        is(UDP.into(), DATAGRAM - 13, 0),
        is(IPV6_FRAGMENT.into(), FRAGMENT - 14, 0),
        is(TCP.into(), 0, OTHER - 15),
        op(BPF_LD | BPF_B | BPF_ABS, 0, 0, 67),
        // 16: the flags of a segment.
        op(BPF_ALU | BPF_AND | BPF_K, 0, 0, FLAGS.into()),
        is(CARRIES.into(), TAKE - 18, CONTROL - 18),
        threshold(Kind::Link),
        jump(27 - 20),
        threshold(Kind::Fragment),
        jump(27 - 22),
        threshold(Kind::Datagram),
        jump(27 - 24),
        threshold(Kind::Other),
        jump(27 - 26),
        threshold(Kind::Control),
        // 27: a number by chance against it.
        op(BPF_LD | BPF_W | BPF_ABS, 0, 0, RANDOM),
        op(BPF_JMP | BPF_JGT | BPF_X, 1, 0, 0),
        op(BPF_RET | BPF_K, 0, 0, u32::MAX),
        op(BPF_RET | BPF_K, 0, 0, 0),
    ]
}

/// Where the kernel has a random number to load (linux/filter.h, `SKF_AD_OFF + SKF_AD_RANDOM`).
const RANDOM: u32 = u32::MAX - 0x1000 + 1 + 56;

#[cfg(test)]
#[allow(
    clippy::disallowed_methods,
    reason = "any moment will do to count from"
)]
mod tests;
