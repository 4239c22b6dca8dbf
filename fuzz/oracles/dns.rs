//! The DNS forwarder: queries of the guest, answers of resolvers, silence, errors and time by the input.
//!
//! What must hold: a query is answered once, and not at all only where it can't be read; an answer is what the
//! resolver that was asked said, a refusal, or the gateway's own; nothing is left in the end.

use std::collections::{HashMap, HashSet};

use tapgate::config::Config;
use tapgate::host::QueuedError;
use tapgate::host::simulated::Sent;
use tapgate::net::emit::IcmpError;
use tapgate::stack::names::{self, Lookup};

use crate::lab::{Lab, addr, millis, secs};

const RESOLVERS: [&str; 3] = ["192.0.2.53:53", "198.51.100.53:53", "127.0.0.53:53"];
const RESOLVER: &str = "10.0.2.3:53";
const NAMES: [&[u8]; 4] = [
    b"\x07example\x03net\x00",
    b"\x04host\x07tapgate\x08internal\x00",
    b"\x012\x012\x010\x0210\x07in-addr\x04arpa\x00",
    b"\x00",
];

/// Steps of one input.
const MAX_STEPS: usize = 60;

/// A query that waits: the guest's port and its number.
type Asked = (u16, [u8; 2]);

#[derive(Default)]
struct World {
    /// The questions under way, and whether an answer must come.
    asked: HashMap<Asked, Vec<(Vec<u8>, bool)>>,
    /// Queries at the resolvers, answered or not.
    sent: Vec<Sent>,
    /// What resolvers have said, without the number.
    said: HashSet<Vec<u8>>,
}

struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        first
    }

    fn take(&mut self, most: usize) -> Vec<u8> {
        let (taken, rest) = self.0.split_at(most.min(self.0.len()));
        self.0 = rest;
        taken.to_vec()
    }
}

/// What the gateway says itself, which is nothing at all where a query can't be read; `None` where the
/// resolvers are asked.
fn own_answer(query: &[u8]) -> Option<Option<Vec<u8>>> {
    match names::lookup(&Config::default(), query) {
        Lookup::Answer(answer) | Lookup::FormErr(answer) => Some(Some(answer)),
        Lookup::Ignore => Some(None),
        Lookup::Pass => None,
    }
}

fn query(input: &mut Input<'_>) -> Vec<u8> {
    let kind = input.byte();
    if kind & 0xf0 == 0xf0 {
        return input.take(usize::from(kind & 0x0f) * 4);
    }
    let mut query = vec![0, kind & 3, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    query.extend(NAMES[usize::from(kind >> 2 & 3)]);
    query.extend([0, 1, 0, 1]);
    query
}

impl World {
    fn ask(&mut self, lab: &mut Lab, input: &mut Input<'_>) {
        let port = 5000 + u16::from(input.byte() & 3);
        let query = query(input);
        // What is cut short has zeros for a number.
        let number = [0, 1].map(|at| query.get(at).copied().unwrap_or(0));
        let waiting = self.asked.entry((port, number)).or_default();
        match own_answer(&query) {
            Some(None) => {}
            Some(Some(_)) => waiting.push((query.clone(), true)),
            None => {
                // The first of two with one number is given up, or both have one answer, or the first one's is
                // on its way.
                for (other, due) in &mut *waiting {
                    *due &= own_answer(other).is_some();
                }
                waiting.push((query.clone(), true));
            }
        }
        lab.udp(port, RESOLVER, &query);
    }

    fn answer(&mut self, lab: &mut Lab, input: &mut Input<'_>) {
        if self.sent.is_empty() {
            return;
        }
        let which = usize::from(input.byte()) % self.sent.len();
        let asked = self.sent[which].clone();
        let kind = input.byte();
        let mut answer = asked.payload;
        if kind & 1 == 0 {
            answer.extend(input.take(usize::from(kind >> 4) * 2));
        }
        if let Some(flags) = answer.get_mut(2).filter(|_| kind & 2 == 0) {
            *flags |= 0x80;
        }
        if let Some(number) = answer.get_mut(1).filter(|_| kind & 12 == 12) {
            *number ^= 1;
        }
        let from = if kind & 0x30 == 0x30 {
            addr("192.0.2.66:53")
        } else {
            asked.to
        };
        self.said.insert(answer.iter().skip(2).copied().collect());
        lab.0.net.deliver(asked.socket, from, &answer);
        lab.wait(millis(1));
    }

    fn complain(&self, lab: &mut Lab, input: &mut Input<'_>) {
        let Some(last) = self.sent.last() else { return };
        let error = QueuedError {
            error: IcmpError::PortUnreachable,
            reporter: None,
            destination: last.to,
            quoted: 0,
        };
        let open = lab.0.net.open_datagram_sockets();
        if open.contains(&last.socket) {
            let quoted = input.take(8);
            lab.0.net.report_error(last.socket, error, &quoted);
        }
        lab.wait(millis(1));
    }

    /// What came to the guest, and what went to the resolvers.
    fn look(&mut self, lab: &mut Lab) {
        self.sent.extend(lab.sent());
        for came in lab.received() {
            let Some((from, port, bytes)) = came.udp() else {
                unreachable!("{came:?}");
            };
            assert_eq!(from, addr(RESOLVER));
            assert!(bytes.len() >= 2, "a number at least");
            let waiting = self.asked.entry((port, [bytes[0], bytes[1]])).or_default();
            let answers = |asked: &Vec<u8>| {
                let refused = bytes.len() == asked.len() && bytes[3] & 15 == 2;
                let said = refused || self.said.contains(&bytes[2..]);
                own_answer(asked).map_or(said, |own| own.as_deref() == Some(bytes))
            };
            let which = |must| {
                let mut waiting = waiting.iter();
                waiting.position(|(asked, due)| *due == must && answers(asked))
            };
            let answered = which(true).or_else(|| which(false));
            let answered = answered.unwrap_or_else(|| unreachable!("made up: {bytes:?}"));
            waiting.remove(answered);
        }
    }
}

/// Tries an input.
pub fn run(bytes: &[u8]) {
    let mut input = Input(bytes);
    let mut lab = Lab::new();
    let some = usize::from(input.byte()) % 4;
    let resolvers: Vec<_> = RESOLVERS[..some].iter().map(|it| addr(it)).collect();
    lab.0.net.set_resolvers(&resolvers);
    let mut world = World::default();
    for _ in 0..MAX_STEPS {
        if input.0.is_empty() {
            break;
        }
        match input.byte() % 8 {
            0..3 => world.ask(&mut lab, &mut input),
            3..5 => world.answer(&mut lab, &mut input),
            5 => world.complain(&mut lab, &mut input),
            6 => lab.wait(millis(1 << (input.byte() % 14))),
            _ => {
                let first = usize::from(input.byte()) % 3;
                let rest: Vec<_> = RESOLVERS[first..].iter().map(|it| addr(it)).collect();
                lab.0.net.set_resolvers(&rest);
            }
        }
        world.look(&mut lab);
    }
    for _ in 0..8 {
        lab.wait(secs(5));
        lab.wait(millis(1));
        world.look(&mut lab);
    }
    let left = world.asked.values().flatten().filter(|(_, due)| *due);
    let left: Vec<_> = left.collect();
    assert!(left.is_empty(), "never answered: {left:?}");
    assert_eq!((lab.0.flows(), lab.0.net.open_sockets()), (0, 0));
}
