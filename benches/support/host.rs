//! A [`Host`] that allocates nothing and costs next to nothing, with three of the small services and a slow one.
//!
//! The port decides what a connection leads to: discard (RFC 863) swallows what is sent, chargen
//! (RFC 864) has endless data, echo (RFC 862) gives back as many bytes as it got, and the slow one swallows a little
//! each time that it is said to be ready. One socket is open
//! at a time. What is received is written once, as the kernel would; what is sent is not read.

use std::cell::{Cell, RefCell};
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;

use tapgate::host::{
    DatagramRole, EchoSocket, Host, Inbox, Outgoing, Pipe, QueuedError, Received, SendFailure,
    TcpSocket, Token, UdpSocket,
};
use tapgate::net::Marks;

/// Ports of the services.
pub(crate) const ECHO: u16 = 7;
pub(crate) const DISCARD: u16 = 9;
pub(crate) const CHARGEN: u16 = 19;
pub(crate) const SLOW: u16 = 10;

/// What the slow service takes at a time, bytes.
const SIP: usize = 40_000;

/// Largest datagram that is echoed.
const DATAGRAM: usize = 2048;

/// What the only socket holds.
struct Server {
    token: Cell<Token>,
    /// Bytes that the echo service has yet to give back.
    pending: Cell<usize>,
    /// Bytes that the slow service still takes.
    room: Cell<usize>,
    /// Bytes that all services took.
    taken: Cell<usize>,
    /// Bytes that were peeked at, and not received since.
    peeked: Cell<usize>,
    /// All that were received after that.
    discarded: Cell<usize>,
    /// The guest's stream has ended.
    ended: Cell<bool>,
    /// The datagram that the echo service has yet to give back: to whom, how long, its bytes.
    datagram: RefCell<(Option<SocketAddr>, usize, [u8; DATAGRAM])>,
}

/// The host's network.
pub(crate) struct BenchHost {
    server: Rc<Server>,
}

impl Default for BenchHost {
    fn default() -> Self {
        let server = Server {
            token: Cell::new(Token(0)),
            pending: Cell::new(0),
            room: Cell::new(0),
            taken: Cell::new(0),
            peeked: Cell::new(0),
            discarded: Cell::new(0),
            ended: Cell::new(false),
            datagram: RefCell::new((None, 0, [0; DATAGRAM])),
        };
        Self {
            server: Rc::new(server),
        }
    }
}

impl BenchHost {
    /// The owner of the socket that was opened last.
    pub(crate) fn token(&self) -> Token {
        self.server.token.get()
    }

    /// The guest's stream has ended, and so has the service's.
    pub(crate) fn ended(&self) -> bool {
        self.server.ended.get()
    }

    /// Bytes that were taken from the guest.
    pub(crate) fn taken(&self) -> usize {
        self.server.taken.get()
    }

    /// Bytes that were received to nowhere, after they had been peeked at.
    pub(crate) fn discarded(&self) -> usize {
        self.server.discarded.get()
    }

    /// Its socket is about to be said to be ready.
    pub(crate) fn refill(&self) {
        self.server.room.set(SIP);
    }

    fn open(&self, token: Token) -> Rc<Server> {
        self.server.token.set(token);
        self.server.pending.set(0);
        self.server.peeked.set(0);
        self.server.ended.set(false);
        Rc::clone(&self.server)
    }
}

impl Host for BenchHost {
    type Tcp = BenchTcp;
    type Listener = ();
    type Udp = BenchUdp;
    type Echo = NoEcho;
    type Pipe = NoPipe;

    fn resolvers(&mut self) -> &[SocketAddr] {
        &[]
    }

    fn reaches_ipv6(&mut self) -> Option<bool> {
        Some(true)
    }

    fn tcp_connect(
        &mut self,
        token: Token,
        remote: SocketAddr,
        _marks: Marks,
    ) -> io::Result<BenchTcp> {
        Ok(BenchTcp {
            port: remote.port(),
            server: self.open(token),
        })
    }

    fn tcp_listen(&mut self, _token: Token, _local: SocketAddr) -> io::Result<()> {
        Err(ErrorKind::Unsupported.into())
    }

    fn tcp_accept(&mut self, (): &()) -> io::Result<(BenchTcp, SocketAddr)> {
        Err(ErrorKind::WouldBlock.into())
    }

    fn tcp_watch(&mut self, _token: Token, _socket: &BenchTcp) -> io::Result<()> {
        Ok(())
    }

    fn tcp_connect_inside(&mut self, _token: Token, _to: SocketAddr) -> io::Result<BenchTcp> {
        Err(ErrorKind::Unsupported.into())
    }

    fn pass_over_inside(&mut self) {}

    fn pipe(&mut self) -> io::Result<NoPipe> {
        Err(ErrorKind::Unsupported.into())
    }

    fn return_pipe(&mut self, pipe: NoPipe) {
        match pipe {}
    }

    fn udp_open(&mut self, _role: DatagramRole) -> io::Result<BenchUdp> {
        Ok(BenchUdp {
            server: self.open(Token(0)),
        })
    }

    fn udp_watch(&mut self, token: Token, socket: &BenchUdp) -> io::Result<()> {
        socket.server.token.set(token);
        Ok(())
    }

    fn echo_open(&mut self, _token: Token, _ipv6: bool) -> io::Result<NoEcho> {
        Err(ErrorKind::PermissionDenied.into())
    }
}

/// A connection to one of the services.
pub(crate) struct BenchTcp {
    port: u16,
    server: Rc<Server>,
}

impl TcpSocket for BenchTcp {
    fn connect_outcome(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn connect_error(&mut self) -> Option<QueuedError> {
        None
    }

    fn set_tos(&mut self, _tos: u8) {}

    fn send(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.port == ECHO {
            let pending = self.server.pending.get() + bytes.len();
            self.server.pending.set(pending);
        }
        let mut len = bytes.len();
        if self.port == SLOW {
            len = len.min(self.server.room.get());
            self.server.room.set(self.server.room.get() - len);
        }
        if len == 0 {
            return Err(ErrorKind::WouldBlock.into());
        }
        self.server.taken.set(self.server.taken.get() + len);
        Ok(len)
    }

    fn recv(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if self.server.ended.get() {
            return Ok(0);
        }
        let len = match self.port {
            CHARGEN => bytes.len(),
            _ => self.server.pending.get().min(bytes.len()),
        };
        if len == 0 {
            return Err(ErrorKind::WouldBlock.into());
        }
        bytes[..len].fill(b'x');
        let pending = self.server.pending.get().saturating_sub(len);
        self.server.pending.set(pending);
        Ok(len)
    }

    fn begin_peeking(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn peek(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if self.port != CHARGEN {
            return Err(ErrorKind::WouldBlock.into());
        }
        bytes.fill(b'x');
        self.server
            .peeked
            .set(self.server.peeked.get() + bytes.len());
        Ok(bytes.len())
    }

    fn discard(&mut self, len: usize) -> io::Result<()> {
        let left = self.server.peeked.get().checked_sub(len);
        self.server
            .peeked
            .set(left.expect("no more than was peeked at"));
        self.server.discarded.set(self.server.discarded.get() + len);
        Ok(())
    }

    fn shutdown_write(&mut self) -> io::Result<()> {
        self.server.ended.set(true);
        Ok(())
    }

    fn reset(self) {}
}

/// A socket whose datagrams are echoed, one at a time.
pub(crate) struct BenchUdp {
    server: Rc<Server>,
}

impl UdpSocket for BenchUdp {
    fn send(&mut self, datagram: &Outgoing<'_>) -> Result<(), SendFailure> {
        let payload = datagram.payload;
        let (from, len, bytes) = &mut *self.server.datagram.borrow_mut();
        bytes[..payload.len()].copy_from_slice(payload);
        (*from, *len) = (Some(datagram.to), payload.len());
        Ok(())
    }

    fn recv(&mut self, inbox: &mut Inbox) -> io::Result<()> {
        let (from, len, datagram) = &mut *self.server.datagram.borrow_mut();
        let received = Received {
            from: from.take().ok_or(ErrorKind::WouldBlock)?,
            asked: None,
            marks: Marks::default(),
        };
        inbox.clear();
        inbox.add(received, &datagram[..*len]);
        Ok(())
    }

    fn queued_error(&mut self, _bytes: &mut [u8]) -> Option<QueuedError> {
        None
    }
}

/// There are no echo sockets here.
pub(crate) enum NoEcho {}

impl EchoSocket for NoEcho {
    fn send(&mut self, _to: IpAddr, _seq: u16, _data: &[u8], _marks: Marks) -> io::Result<()> {
        match *self {}
    }

    fn recv(&mut self, _inbox: &mut Inbox) -> io::Result<()> {
        match *self {}
    }

    fn queued_error(&mut self, _bytes: &mut [u8]) -> Option<QueuedError> {
        match *self {}
    }
}

/// There are no pipes here.
pub(crate) enum NoPipe {}

impl Pipe<BenchTcp> for NoPipe {
    fn fill(&mut self, _from: &mut BenchTcp, _urgent: bool) -> io::Result<usize> {
        match *self {}
    }

    fn drain(&mut self, _to: &mut BenchTcp) -> io::Result<usize> {
        match *self {}
    }

    fn held(&self) -> usize {
        match *self {}
    }
}
