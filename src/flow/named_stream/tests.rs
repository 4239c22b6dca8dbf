//! A stream between a guest and a resolver that are both slow, moved as `flow/tcp.rs` moves bytes:
//! by flags that edge-triggered events set, and by [`NamedStream::woken`].

use super::*;
use crate::stack::names;
use proptest::prelude::*;
use std::cell::RefCell;
use std::rc::Rc;

/// A socket whose edges are the kernel's: readable when data arrives, writable when there is room
/// again after a call found too little.
#[derive(Default)]
struct Wire {
    incoming: VecDeque<u8>,
    ended: bool,
    outgoing: Vec<u8>,
    room: usize,
    found_full: bool,
    readable: bool,
    writable: bool,
}

impl Wire {
    fn arrive(&mut self, bytes: &[u8]) {
        self.incoming.extend(bytes);
        self.readable = true;
    }

    fn make_room(&mut self, room: usize) {
        self.room += room;
        self.writable |= std::mem::take(&mut self.found_full);
    }
}

#[derive(Clone, Default)]
struct Socket(Rc<RefCell<Wire>>);

impl TcpSocket for Socket {
    fn connect_error(&mut self) -> Option<QueuedError> {
        None
    }

    fn set_tos(&mut self, _tos: u8) {}

    fn connect_outcome(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let wire = &mut *self.0.borrow_mut();
        let sent = bytes.len().min(wire.room);
        wire.room -= sent;
        wire.outgoing.extend(&bytes[..sent]);
        wire.found_full |= sent < bytes.len();
        if sent == 0 {
            return Err(ErrorKind::WouldBlock.into());
        }
        Ok(sent)
    }

    fn recv(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let wire = &mut *self.0.borrow_mut();
        if wire.incoming.is_empty() && !wire.ended {
            return Err(ErrorKind::WouldBlock.into());
        }
        // A kernel's short read means that nothing is left; a deque's only that it wraps around.
        wire.incoming.make_contiguous();
        wire.incoming.read(bytes)
    }

    fn shutdown_write(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn reset(self) {}
}

/// Both ends and the flow between.
struct Lab {
    socket: Socket,
    stream: NamedStream<Socket>,
    readable: bool,
    writable: bool,
    /// What the guest has sent and nobody has taken.
    ring: VecDeque<u8>,
    /// How much the guest is ready to get, and what it got.
    room: usize,
    got: Vec<u8>,
}

impl Lab {
    fn new() -> Self {
        let socket = Socket::default();
        let config = Arc::new(Config::default());
        Self {
            stream: NamedStream::new(socket.clone(), config, names::judge),
            socket,
            readable: true,
            writable: true,
            ring: VecDeque::new(),
            room: 0,
            got: Vec::new(),
        }
    }

    fn wake(&mut self) {
        let woken = self.stream.woken();
        let mut wire = self.socket.0.borrow_mut();
        self.readable |= woken.readable | std::mem::take(&mut wire.readable);
        self.writable |= woken.writable | std::mem::take(&mut wire.writable);
    }

    fn carry_to_host(&mut self) -> usize {
        let mut moved = 0;
        while self.writable && !self.ring.is_empty() {
            let offered = self.ring.as_slices().0.to_vec();
            match self.stream.send(&offered) {
                Ok(len) => {
                    assert!(len > 0, "takes at least one byte");
                    self.ring.drain(..len);
                    moved += len;
                    self.writable = len == offered.len();
                }
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::WouldBlock);
                    self.writable = false;
                }
            }
        }
        moved
    }

    fn carry_to_guest(&mut self) -> usize {
        if !self.readable || self.room == 0 {
            return 0;
        }
        let mut bytes = vec![0; self.room];
        match self.stream.recv(&mut bytes) {
            Ok(len) => {
                self.got.extend(&bytes[..len]);
                self.readable = len == self.room;
                self.room -= len;
                len
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                self.readable = false;
                0
            }
        }
    }

    fn pump(&mut self) {
        loop {
            self.wake();
            let moved = self.carry_to_host();
            self.wake();
            if moved + self.carry_to_guest() == 0 {
                break;
            }
            assert!(self.stream.held.len() <= MAX_HELD);
            assert!(self.stream.answers.len() < MAX_ANSWERS + 600);
        }
    }

    fn sent(&self) -> Vec<u8> {
        self.socket.0.borrow().outgoing.clone()
    }
}

fn framed(message: &[u8]) -> Vec<u8> {
    let mut bytes = u16::try_from(message.len()).unwrap().to_be_bytes().to_vec();
    bytes.extend(message);
    bytes
}

fn query(name: &[u8], padding: usize) -> Vec<u8> {
    let mut bytes = b"id\x01\0\0\x01\0\0\0\0\0\0".to_vec();
    bytes.extend(name);
    bytes.extend([0, 1, 0, 1]);
    bytes.resize(bytes.len() + padding, 0);
    bytes
}

const OURS: &[u8] = b"\x04host\x07tapgate\x08internal\0";
const OTHER: &[u8] = b"\x07example\x03org\0";

fn answer(query: &[u8]) -> Option<Vec<u8>> {
    match names::judge(&Config::default(), query, query.len()) {
        Judgement::Answer(answer) => Some(answer),
        Judgement::More | Judgement::Pass => None,
    }
}

/// Splits a stream into its messages; it must end with one.
fn messages(mut bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let (message, rest) = bytes.split_at(message_end(bytes));
        found.push(message[PREFIX..].to_vec());
        bytes = rest;
    }
    found
}

#[test]
fn our_names_are_answered_and_others_pass() {
    let mut lab = Lab::new();
    (lab.room, lab.socket.0.borrow_mut().room) = (10_000, 10_000);
    let queries = [query(OTHER, 0), query(OURS, 0), query(OTHER, 5000)];
    for query in &queries {
        lab.ring.extend(framed(query));
    }
    lab.pump();
    assert_eq!(messages(&lab.sent()), [&queries[0][..], &queries[2]]);
    assert_eq!(messages(&lab.got), [answer(&queries[1]).unwrap()]);
}

#[test]
fn an_answer_waits_for_the_end_of_the_resolver_s_message() {
    let mut lab = Lab::new();
    lab.room = 10_000;
    lab.pump();
    let reply = framed(&[0xee; 300]);
    for part in [&reply[..1], &reply[1..2], &reply[2..40]] {
        lab.socket.0.borrow_mut().arrive(part);
        lab.pump();
        lab.ring.extend(framed(&query(OURS, 0)));
        lab.pump();
        assert!(reply.starts_with(&lab.got), "nothing in between");
    }
    // The rest and the next come in one: the answers go in between.
    let rest = [&reply[40..], &reply, &reply[..9]].concat();
    lab.socket.0.borrow_mut().arrive(&rest);
    lab.pump();
    let ours = framed(&answer(&query(OURS, 0)).unwrap());
    let expected = [&reply[..], &ours, &ours, &ours, &reply, &reply[..9]].concat();
    assert!(lab.got == expected);
}

#[test]
fn a_query_is_not_sent_on_before_it_is_judged() {
    let mut lab = Lab::new();
    lab.socket.0.borrow_mut().room = 5;
    let other = framed(&query(OTHER, 0));
    let (last, start) = other.split_last().unwrap();
    for byte in start {
        lab.ring.push_back(*byte);
        lab.pump();
        assert!(lab.ring.is_empty() && lab.sent().is_empty());
    }
    // With no room for what was kept the last byte stays with the flow, which comes back with it.
    lab.ring.push_back(*last);
    lab.pump();
    assert_eq!((lab.ring.len(), lab.sent().len()), (1, 5));
    lab.socket.0.borrow_mut().make_room(100);
    lab.pump();
    assert_eq!(lab.sent(), other);
}

#[test]
fn who_does_not_read_is_not_listened_to() {
    let mut lab = Lab::new();
    let ours = query(OURS, 0);
    for _ in 0..1000 {
        lab.ring.extend(framed(&ours));
    }
    lab.pump();
    let left = lab.ring.len();
    assert!(left > 30_000, "bounded");
    lab.pump();
    assert_eq!(lab.ring.len(), left);
    lab.room = 1_000_000;
    lab.pump();
    assert!(lab.ring.is_empty());
    assert_eq!(messages(&lab.got), vec![answer(&ours).unwrap(); 1000]);
}

#[test]
fn after_the_resolver_s_end_no_answer_follows() {
    let mut lab = Lab::new();
    lab.room = 10_000;
    lab.ring.extend(framed(&query(OURS, 0)));
    lab.socket.0.borrow_mut().ended = true;
    lab.pump();
    let got = lab.got.len();
    assert!(got > 0, "what was answered before comes first");
    for _ in 0..1000 {
        lab.ring.extend(framed(&query(OURS, 0)));
    }
    lab.pump();
    assert!(lab.ring.is_empty(), "the guest can still end its stream");
    assert_eq!((lab.got.len(), lab.stream.woken()), (got, Woken::default()));
}

#[derive(Debug, Clone)]
enum Act {
    Asks(Vec<u8>),
    Replies(usize),
    HostReads(usize),
    GuestReads(usize),
}

fn any_query() -> impl Strategy<Value = Vec<u8>> {
    let padding = || prop_oneof![4 => 0_usize..40, 1 => 4000_usize..4200];
    prop_oneof![
        3 => padding().prop_map(|padding| query(OURS, padding)),
        3 => padding().prop_map(|padding| query(OTHER, padding)),
        1 => proptest::collection::vec(any::<u8>(), 0..20),
        1 => Just(query(b"\xc0\x0c", 0)),
    ]
}

fn any_act() -> impl Strategy<Value = Act> {
    prop_oneof![
        any_query().prop_map(Act::Asks),
        prop_oneof![0_usize..3, 0_usize..600].prop_map(Act::Replies),
        (0_usize..300).prop_map(Act::HostReads),
        (0_usize..300).prop_map(Act::GuestReads),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// However the streams are cut, everything arrives whole, in order, and nothing waits for ever.
    #[test]
    fn nothing_is_lost_mixed_up_or_stuck(
        acts in proptest::collection::vec((any_act(), 1_usize..700), 0..60),
    ) {
        let mut lab = Lab::new();
        let (mut to_host, mut answers, mut replies) = (Vec::new(), Vec::new(), Vec::new());
        for (act, piece) in acts {
            match act {
                Act::Asks(query) => {
                    for part in framed(&query).chunks(piece) {
                        lab.ring.extend(part);
                        lab.pump();
                    }
                    match answer(&query) {
                        Some(answer) => answers.push(answer),
                        None => to_host.push(query),
                    }
                }
                Act::Replies(len) => {
                    let reply = vec![0xee; len];
                    for part in framed(&reply).chunks(piece) {
                        lab.socket.0.borrow_mut().arrive(part);
                        lab.pump();
                    }
                    replies.push(reply);
                }
                Act::HostReads(room) => lab.socket.0.borrow_mut().make_room(room),
                Act::GuestReads(room) => lab.room += room,
            }
            lab.pump();
        }
        lab.room += 1_000_000;
        lab.socket.0.borrow_mut().make_room(1_000_000);
        lab.pump();
        prop_assert!(lab.ring.is_empty());
        prop_assert_eq!(messages(&lab.sent()), to_host);
        let is_reply = |message: &Vec<u8>| message.iter().all(|byte| *byte == 0xee);
        let (from_host, ours): (Vec<_>, Vec<_>) = messages(&lab.got).into_iter().partition(is_reply);
        prop_assert_eq!(from_host, replies);
        prop_assert_eq!(ours, answers);
    }
}

#[test]
fn behind_the_resolvers_end_nothing_is_looked_at() {
    let mut lab = Lab::new();
    lab.socket.0.borrow_mut().ended = true;
    lab.room = 1;
    lab.pump();
    assert!(lab.stream.ended);
    // Each two bytes are a message of their own.
    assert_eq!(lab.stream.send(&[0; 65_536]).unwrap(), 65_536);
    assert!(lab.stream.held.is_empty() && lab.stream.answers.is_empty());
}
