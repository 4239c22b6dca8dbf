//! Why a frame, or what the host received for a guest, goes no further: one name for each reason, so that each
//! can be counted.
//!
//! Drops are silent on the wire and counted by reason in [`crate::stack`]; what deserves an answer
//! is not dropped but answered.

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $text:literal,)+) => {
        /// A reason for which a frame was dropped.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum DropReason {
            $($(#[doc = $doc])+ $name,)+
        }

        impl DropReason {
            /// Every reason, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// A short name for counters and logs.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)+
                }
            }
        }
    };
}

reasons! {
    /// The frame is shorter than a header or a length field says.
    Truncated = "truncated",
    /// A field has a value that no such packet may have.
    Malformed = "malformed",
    /// A checksum does not match.
    Checksum = "checksum",
    /// Neither ARP nor IP.
    EtherType = "ethertype",
    /// IPv6 is switched off.
    Ipv6 = "ipv6",
    /// An IPv6 extension header asks for something that is not done, or there are too many.
    ExtensionHeader = "extension_header",
    /// An IP protocol that is not carried.
    Protocol = "protocol",
    /// An ICMP type that is not carried.
    IcmpType = "icmp_type",
    /// Not addressed to the gateway's Ethernet address, nor to all.
    NotForUs = "not_for_us",
    /// The source address is not one a guest may use (RFC 2827).
    Source = "source",
    /// The destination must never reach a socket: loopback, multicast, broadcast, reserved.
    Destination = "destination",
    /// A fragment overlaps another (RFC 1858, RFC 5722).
    FragmentOverlap = "fragment_overlap",
    /// A datagram has more gaps between its fragments than one in the making has.
    FragmentGaps = "fragment_gaps",
    /// A fragment ends beyond the largest datagram.
    FragmentTooLong = "fragment_too_long",
    /// A datagram was pushed out of the reassembly memory or timed out there.
    FragmentEvicted = "fragment_evicted",
    /// An ARP packet that wants no answer.
    ArpIgnored = "arp_ignored",
    /// A message of neighbour discovery that wants no answer.
    NdpIgnored = "ndp_ignored",
    /// A DHCP message that wants no answer, or makes no sense.
    DhcpIgnored = "dhcp_ignored",
    /// A TCP segment of no flow, to which no RST is due.
    TcpNoFlow = "tcp_no_flow",
    /// A DNS query too short to have a header, or an answer sent to the resolver.
    DnsMalformed = "dns_malformed",
    /// The host's socket took no more datagrams.
    HostBusy = "host_busy",
    /// A datagram for a guest's port that does not hear its sender.
    Filtered = "filtered",
    /// A datagram for a flow that has ended meanwhile.
    FlowGone = "flow_gone",
    /// What came from a resolver and is no answer to the query.
    DnsUnasked = "dns_unasked",
    /// The worker that it was handed to had no room for more.
    WorkerBusy = "worker_busy",
    /// Errors are told at a limited rate.
    ErrorRate = "error_rate",
    /// No room in the transmit batch for an answer.
    TransmitFull = "transmit_full",
    /// The guest's Ethernet address is not known yet.
    NoNeighbour = "no_neighbour",
}
