//! Clients of the API that ask for nothing that makes sense: bytes by chance, requests with some places changed,
//! clients that leave before their answer.
//!
//! In: a seed. Out: requests, and whether each client that waited was answered as it must be.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;

use super::process::fail;
use super::slirp4netns::Api;

/// What random requests are made of.
const SEEDS: [&str; 6] = [
    r#"{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_addr":"127.0.0.1","host_port":8080,"guest_addr":"10.0.2.100","guest_port":80}}"#,
    r#"{"execute":"add_hostfwd","arguments":{"proto":"udp6","host_addr":"::1","host_port":8080,"guest_addr":"","guest_port":80}}"#,
    r#"{"execute":"list_hostfwd"}"#,
    r#"{"execute":"remove_hostfwd","arguments":{"id":1}}"#,
    r#"{"return":{"entries":[{"id":1,"x":[1,2.5e3,true,null,"\u00e9\\"]}]}}"#,
    r#"[[[[[[[[{"execute":["#,
];

/// Clients of the API that mean no good, by a generator (xorshift64*).
pub(crate) struct Nonsense(u64);

impl Nonsense {
    /// The same clients for the same seed, which must not be 0.
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: usize) -> usize {
        let limit = u64::try_from(limit.max(1)).expect("small");
        usize::try_from((self.next() >> 16) % limit).expect("small")
    }

    fn byte(&mut self) -> u8 {
        self.next().to_be_bytes()[0]
    }

    /// Bytes without sense, or a seed with some places changed.
    pub(crate) fn request(&mut self) -> Vec<u8> {
        if self.below(8) == 0 {
            let length = [8, 100, 5000][self.below(3)];
            return (0..self.below(length)).map(|_| self.byte()).collect();
        }
        let mut request = SEEDS[self.below(SEEDS.len())].as_bytes().to_vec();
        for _ in 0..self.below(6) {
            let place = self.below(request.len());
            let end = (place + self.below(9)).min(request.len());
            match self.below(6) {
                0 if place < request.len() => request[place] = self.byte(),
                1 => request.truncate(place),
                2 => drop(request.drain(place..end)),
                3 => {
                    let piece = request[place..end].to_vec();
                    request.splice(place..place, piece.repeat(self.below(300)));
                }
                4 => {
                    let number = self.next().to_string();
                    request.splice(place..place, number.into_bytes());
                }
                _ => {
                    let other = SEEDS[self.below(SEEDS.len())].as_bytes();
                    let from = self.below(other.len());
                    request.splice(place..end, other[from..].iter().copied());
                }
            }
        }
        request
    }

    /// Sends a request as one kind of client or another. A client that waits for its answer gets one,
    /// which is JSON with either a `return` or an `error`.
    pub(crate) fn ask(&mut self, api: &Api) {
        let request = self.request();
        let mut client = api.connect().expect("it listens");
        let middle = self.below(request.len());
        let leaves = self.below(10) == 0;
        // A request that is too long may be answered before it is written.
        let _ = client.write_all(&request[..middle]);
        let _ = client.write_all(&request[middle..]);
        if leaves {
            return;
        }
        let _ = client.shutdown(Shutdown::Write);
        let mut answer = Vec::new();
        match client.read_to_end(&mut answer) {
            Ok(_) => {}
            // What it didn't read of the request is lost, which resets the connection.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            Err(error) => fail(&format!("{error} after {request:?}")),
        }
        let text = String::from_utf8_lossy(&answer);
        let value: BTreeMap<String, serde_json::Value> = serde_json::from_slice(&answer)
            .unwrap_or_else(|error| fail(&format!("{error}: {text:?} to {request:?}")));
        assert!(
            value.contains_key("return") != value.contains_key("error"),
            "{text} to {request:?}"
        );
    }
}
