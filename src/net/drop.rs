//! Why a frame, or what the host received for a guest, goes no further: one name for each reason, so that each
//! can be counted.
//!
//! Drops are silent on the wire and counted by reason in [`crate::stack`]; what deserves an answer
//! is not dropped but answered.

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        /// A reason for which a frame was dropped.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum DropReason {
            $($(#[doc = $doc])+ $name,)+
        }

        impl DropReason {
            /// Every reason, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];
        }
    };
}

reasons! {
    /// The frame is shorter than a header or a length field says.
    Truncated,
    /// A field has a value that no such packet may have.
    Malformed,
    /// A checksum does not match.
    Checksum,
    /// Neither ARP nor IP.
    EtherType,
    /// IPv6 is switched off.
    Ipv6,
    /// An IPv6 extension header asks for something that is not done, or there are too many.
    ExtensionHeader,
    /// An IP protocol that is not carried.
    Protocol,
    /// An ICMP type that is not carried.
    IcmpType,
    /// Not addressed to the gateway's Ethernet address, nor to all.
    NotForUs,
    /// The source address is not one a guest may use (RFC 2827).
    Source,
    /// The destination must never reach a socket: loopback, multicast, broadcast, reserved.
    Destination,
    /// A fragment overlaps another (RFC 1858, RFC 5722).
    FragmentOverlap,
    /// A datagram has more gaps between its fragments than one in the making has.
    FragmentGaps,
    /// A fragment ends beyond the largest datagram.
    FragmentTooLong,
    /// A datagram was pushed out of the reassembly memory or timed out there.
    FragmentEvicted,
    /// An ARP packet that wants no answer.
    ArpIgnored,
    /// A message of neighbour discovery that wants no answer.
    NdpIgnored,
    /// A DHCP message that wants no answer, or makes no sense.
    DhcpIgnored,
    /// A TCP segment of no flow, to which no RST is due.
    TcpNoFlow,
    /// A TCP segment of a flow that nobody sends who is there: a RST or a SYN that does not count (RFC 5961, RFC 1337),
    /// or what comes before there is a connection.
    TcpUnacceptable,
    /// A TCP segment of a flow for which no memory is to be had; the guest sends it again.
    TcpNoMemory,
    /// A TCP connection request for which no port of the host's was found in the time that there is; the guest sends it
    /// again.
    TcpNoPort,
    /// A DNS query too short to have a header, or an answer sent to the resolver.
    DnsMalformed,
    /// The host's socket took no more datagrams.
    HostBusy,
    /// A datagram for a guest's port that does not hear its sender.
    Filtered,
    /// A datagram for a flow that has ended meanwhile.
    FlowGone,
    /// A datagram of a client for whom there is no room among the flows, or one of more queries than a frame may hold.
    NoRoom,
    /// What came from a resolver and is no answer to the query.
    DnsUnasked,
    /// The worker that it was handed to had no room for more.
    WorkerBusy,
    /// Errors are told at a limited rate.
    ErrorRate,
    /// No room in the transmit batch for an answer.
    TransmitFull,
    /// The guest's Ethernet address is not known yet.
    NoNeighbour,
}
