//! A guest, a stack and a host with something going on beside what is tried.
//!
//! Owns the bystander: a connection that is open before anything fails, and must be after. In: a fault. Out:
//! whether everything works afterwards, and nothing is left ([`World::recovers`]).

use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::State;
use tapgate::buf::TxCapabilities;
use tapgate::config::{Config, Protocol, Publish, Splice};
use tapgate::host::DatagramRole;
use tapgate::host::simulated::{Call, ConnectAnswer, Fault, Inside, SocketId};
use tapgate::net::Duration;

use crate::lab::{GATEWAY, Lab, addr, millis, secs};
use crate::packets::{self, Ipv4};
use crate::sim::LinkKind;

pub(crate) const RESOLVER: &str = "192.0.2.53:53";
pub(crate) const OTHER_RESOLVER: &str = "198.51.100.53:53";
/// The published ports, and what they lead to in the guest.
pub(crate) const TCP_PORT: &str = "0.0.0.0:8080";
pub(crate) const UDP_PORT: &str = "0.0.0.0:5353";
pub(crate) const TCP_SERVICE: &str = "10.0.2.100:80";
pub(crate) const UDP_SERVICE: &str = "10.0.2.100:5000";
pub(crate) const NEIGHBOUR: &str = "127.0.0.1:5000";

/// Longer than any flow lives without a move.
const LONGEST: Duration = Duration::from_secs(3 * 3600);
/// Buffers of the host's sockets: less than is sent, so that a call would block.
const HOST_BUFFER: usize = 2000;

/// What is needed to go on when something has failed.
pub(crate) struct World {
    pub(crate) lab: Lab,
    bystander: (SocketHandle, SocketId),
    /// Sockets that stay open.
    listening: usize,
    struck: usize,
    /// What the life came to when nothing fails.
    pub(crate) complete: bool,
}

impl World {
    pub(crate) fn new() -> Self {
        Self::over(LinkKind::default(), HOST_BUFFER)
    }

    /// One whose link cuts segments up, and whose host holds much.
    pub(crate) fn of_bulk() -> Self {
        let capabilities = TxCapabilities {
            checksum: true,
            tso4: true,
            tso6: true,
            uso: true,
        };
        let kind = LinkKind {
            capabilities,
            ..LinkKind::default()
        };
        Self::over(kind, 1 << 20)
    }

    fn over(kind: LinkKind, host_buffer: usize) -> Self {
        let mut lab = Lab::over(kind, Config::default());
        lab.0.net.answer_all(ConnectAnswer::Accept);
        lab.0
            .net
            .set_resolvers(&[addr(RESOLVER), addr(OTHER_RESOLVER)]);
        lab.0.net.set_inside(Inside::Ready);
        lab.0.net.set_socket_buffer(host_buffer);
        let handle = lab.0.connect("192.0.2.200:80");
        assert!(
            lab.0.run(secs(1), |sim| sim.socket(handle).state()
                == State::Established),
            "the bystander connects"
        );
        let bystander = (handle, SocketId(0));
        let mut world = Self {
            lab,
            bystander,
            listening: 0,
            struck: 0,
            complete: false,
        };
        world.echo(bystander);
        // It rests from now on, so that no call is its own.
        world.lab.wait(secs(2));
        world
    }

    /// The same with ports that lead inside.
    pub(crate) fn published() -> Self {
        let mut world = Self::new();
        for (protocol, host, guest) in [
            (Protocol::Tcp, TCP_PORT, TCP_SERVICE),
            (Protocol::Udp, UDP_PORT, UDP_SERVICE),
        ] {
            world.publish(protocol, host, guest).unwrap();
        }
        world
    }

    /// Publishes a port, if it can be.
    pub(crate) fn publish(
        &mut self,
        protocol: Protocol,
        host: &str,
        guest: &str,
    ) -> std::io::Result<usize> {
        let rule = Publish {
            protocol,
            host: addr(host),
            guest: addr(guest),
            splice: Splice::Auto,
        };
        let id = self
            .lab
            .0
            .with_stack(|stack, turn| stack.publish(turn.host, rule));
        self.listening += usize::from(id.is_ok());
        id
    }

    pub(crate) fn unpublish(&mut self, id: usize) {
        assert!(self.lab.0.stack.unpublish(id, None));
        self.listening -= 1;
    }

    pub(crate) fn fail(&mut self, fault: Fault) {
        self.lab.0.net.fail_call(fault);
    }

    /// Calls are counted from now on.
    pub(crate) fn count_calls(&mut self) {
        self.fail(Fault {
            call: Call::Listen,
            nth: usize::MAX,
            errno: 0,
            lasts: false,
        });
    }

    pub(crate) fn calls(&self, call: Call) -> usize {
        self.lab.0.net.calls(call)
    }

    /// Calls that have failed so far.
    pub(crate) fn struck(&self) -> usize {
        self.struck.max(self.lab.0.net.faults_struck())
    }

    /// The host is well again.
    pub(crate) fn heal(&mut self) {
        self.struck = self.struck();
        self.lab.0.net.heal();
    }

    /// The life came to its end with everything done.
    pub(crate) fn is_complete(&self) {
        assert!(self.complete, "something was lost without a reason");
    }

    /// Runs until `done`, or for so many seconds.
    pub(crate) fn until(
        &mut self,
        limit: u64,
        mut done: impl FnMut(&mut crate::sim::Sim) -> bool,
    ) -> bool {
        self.lab.0.run(secs(limit), |sim| done(sim))
    }

    /// The host's datagram socket with that role, the latest.
    pub(crate) fn datagram_socket(&self, is: fn(Option<DatagramRole>) -> bool) -> Option<SocketId> {
        let net = &self.lab.0.net;
        let open = net.open_datagram_sockets();
        open.into_iter().rev().find(|id| is(net.role(*id)))
    }

    /// Bytes go both ways.
    fn echo(&mut self, (handle, id): (SocketHandle, SocketId)) {
        let sim = &mut self.lab.0;
        assert_eq!(sim.socket(handle).send_slice(b"echo"), Ok(4));
        let mut came = Vec::new();
        let arrives = sim.run(secs(5), |sim| {
            came.extend(sim.net.server_read(id, usize::MAX));
            came.len() >= 4
        });
        assert!(arrives && came == b"echo", "the host hears {came:?}");
        assert_eq!(sim.net.server_write(id, b"ohce"), 4);
        let mut heard = [0; 4];
        let arrives = sim.run(secs(5), |sim| {
            let socket = sim.socket(handle);
            socket.can_recv() && socket.recv_slice(&mut heard) == Ok(4)
        });
        assert!(arrives && &heard == b"ohce", "the guest hears {heard:?}");
    }

    /// Everything works: what was open before, and a new flow of every kind. Then nothing is left.
    pub(crate) fn recovers(mut self) {
        self.heal();
        self.lab.0.net.answer_all(ConnectAnswer::Accept);
        self.lab.wait(secs(10));
        self.lab.0.received.clear();
        let _ = self.lab.sent();
        self.echo(self.bystander);
        let fresh = self.lab.0.connect("192.0.2.201:80");
        let connects = self.lab.0.run(secs(5), |sim| {
            sim.socket(fresh).state() == State::Established
        });
        assert!(connects, "a new connection");
        let id = SocketId(self.lab.0.net.connections().len() - 1);
        self.echo((fresh, id));
        self.datagrams_pass();
        for (handle, id) in [self.bystander, (fresh, id)] {
            self.lab.0.socket(handle).close();
            self.lab.0.net.server_shutdown(id);
        }
        self.lab.wait(secs(5));
        for (handle, id) in [self.bystander, (fresh, id)] {
            let state = self.lab.0.socket(handle).state();
            assert!(
                matches!(state, State::Closed | State::TimeWait),
                "an orderly end: {state:?}"
            );
            assert!(self.lab.0.net.server_sees_end(id), "at the host, too");
        }
        let end = self.lab.0.clock.now() + LONGEST;
        self.lab.0.run(LONGEST, |sim| sim.flows() == 0);
        assert!(self.lab.0.clock.now() < end, "all is over in time");
        assert_eq!(
            (self.lab.0.flows(), self.lab.0.net.open_sockets()),
            (0, self.listening),
            "flows and sockets that are left"
        );
        self.lab.0.stack.check().unwrap();
    }

    /// A datagram, a ping, a query, each with its answer.
    fn datagrams_pass(&mut self) {
        let lab = &mut self.lab;
        lab.udp(6000, "192.0.2.202:7", b"over");
        let out = lab.sent();
        assert_eq!(out.len(), 1, "a datagram leaves");
        lab.deliver(out[0].socket, "192.0.2.202:7", b"back");
        assert_eq!(lab.reply().payload[8..], *b"back");
        ping(lab, 600, "192.0.2.203");
        let out = lab.sent();
        assert_eq!(out.len(), 1, "a ping leaves");
        lab.0
            .net
            .deliver_echo(out[0].socket, "192.0.2.203".parse().unwrap(), 1, b"ping");
        lab.wait(millis(1));
        assert_eq!(lab.reply().icmp(), Some((0, 0)));
        lab.udp(6001, "10.0.2.3:53", &query(9));
        let out = lab.sent();
        assert_eq!(out.len(), 1, "a query leaves");
        let answer = answer(&out[0].payload);
        let resolver = out[0].to.to_string();
        lab.deliver(out[0].socket, &resolver, &answer);
        assert_eq!(lab.reply().payload[8..10], [0, 9]);
        let ip = Ipv4::new(GATEWAY, packets::ICMP);
        lab.send(ip.frame(&packets::icmp(8, 0, [1, 1], b"ping")));
        assert_eq!(lab.reply().icmp(), Some((0, 0)), "the gateway is there");
    }
}

/// The guest pings.
pub(crate) fn ping(lab: &mut Lab, ident: u16, to: &str) {
    let ip = Ipv4::new(to.parse().unwrap(), packets::ICMP);
    lab.send(ip.frame(&packets::icmp(8, 0, [ident, 1], b"ping")));
}

/// A question for an address of example.net, with that number.
pub(crate) fn query(id: u8) -> Vec<u8> {
    let mut query = vec![0, id, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    query.extend(b"\x07example\x03net\x00\x00\x01\x00\x01");
    query
}

/// An answer to a query as it came to the resolver.
pub(crate) fn answer(query: &[u8]) -> Vec<u8> {
    let mut answer = query.to_vec();
    answer[2] |= 0x80;
    answer
}
