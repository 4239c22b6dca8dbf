//! The guest's end of a TCP connection, written segment by segment.
//!
//! In: segments to the guest. Out: frames with whatever the test wants to be in them; nothing is sent by
//! itself, so a test says exactly what a guest does and does not do.

use std::net::SocketAddr;

use crate::packets::{Ip, Received, Segment, TCP};

pub(crate) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(crate) const RST: u8 = 4;
pub(crate) const ACK: u8 = 0x10;

/// A segment to the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    pub(crate) flags: u8,
    pub(crate) window: u16,
    pub(crate) data: Vec<u8>,
}

/// One end of a connection, in the guest.
#[derive(Debug, Clone)]
pub(crate) struct Peer {
    ip: Ip,
    /// What the next segment says, but for its flags.
    pub(crate) next: Segment,
    /// Options of its SYN.
    pub(crate) options: Vec<u8>,
}

impl Peer {
    pub(crate) fn new(from: u16, to: SocketAddr) -> Self {
        Self {
            ip: Ip::new(to.ip(), TCP),
            next: Segment {
                from,
                to: to.port(),
                seq: 1000,
                window: 65_535,
                ..Segment::default()
            },
            // The largest segment of an MTU of 1500, no scaling.
            options: vec![2, 4, 5, 0xb4],
        }
    }

    /// A frame with these flags and data, and other fields than the next.
    pub(crate) fn with(
        &self,
        flags: u8,
        data: &[u8],
        change: impl FnOnce(&mut Segment),
    ) -> Vec<u8> {
        let mut fields = Segment { flags, ..self.next };
        change(&mut fields);
        self.ip.frame(&self.ip.tcp(&fields, &[], data))
    }

    /// A frame with options of its own in front of the data.
    pub(crate) fn with_options(&self, flags: u8, options: &[u8], data: &[u8]) -> Vec<u8> {
        let fields = Segment { flags, ..self.next };
        self.ip.frame(&self.ip.tcp(&fields, options, data))
    }

    pub(crate) fn syn(&mut self) -> Vec<u8> {
        let fields = Segment {
            flags: SYN,
            ..self.next
        };
        self.next.seq = self.next.seq.wrapping_add(1);
        self.ip.frame(&self.ip.tcp(&fields, &self.options, &[]))
    }

    pub(crate) fn ack(&self) -> Vec<u8> {
        self.with(ACK, &[], |_| ())
    }

    /// The next data of its stream.
    pub(crate) fn data(&mut self, data: &[u8]) -> Vec<u8> {
        let frame = self.with(ACK, data, |_| ());
        self.next.seq = self.next.seq.wrapping_add(length(data));
        frame
    }

    /// The end of its stream.
    pub(crate) fn fin(&mut self) -> Vec<u8> {
        let frame = self.with(FIN | ACK, &[], |_| ());
        self.next.seq = self.next.seq.wrapping_add(1);
        frame
    }

    pub(crate) fn rst(&self) -> Vec<u8> {
        self.with(RST, &[], |fields| fields.ack = 0)
    }

    /// The segments among these packets that are for this connection.
    pub(crate) fn read(&self, packets: &[Received]) -> Vec<Seen> {
        let mine = packets.iter().filter(|it| {
            it.protocol == TCP && it.word(0) == self.next.to && it.word(2) == self.next.from
        });
        mine.map(seen).collect()
    }

    /// Takes note of a segment that came in order.
    pub(crate) fn take(&mut self, came: &Seen) {
        let controls = u32::from(came.flags & FIN) + u32::from(came.flags & SYN) / 2;
        let end = came.seq.wrapping_add(length(&came.data) + controls);
        if end.wrapping_sub(self.next.ack).cast_signed() > 0 || came.flags & SYN != 0 {
            self.next.ack = end;
        }
    }

    pub(crate) fn take_all(&mut self, came: &[Seen]) {
        for segment in came {
            self.take(segment);
        }
    }
}

fn seen(packet: &Received) -> Seen {
    let bytes = &packet.payload;
    let long = |at: usize| u32::from(packet.word(at)) << 16 | u32::from(packet.word(at + 2));
    let header = usize::from(bytes[12] >> 4) * 4;
    Seen {
        seq: long(4),
        ack: long(8),
        flags: bytes[13],
        window: packet.word(14),
        data: bytes[header..].to_vec(),
    }
}

pub(crate) fn length(data: &[u8]) -> u32 {
    u32::try_from(data.len()).unwrap()
}
