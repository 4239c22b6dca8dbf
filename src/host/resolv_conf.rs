//! What `/etc/resolv.conf` says: the parser, and the resolvers as they are at this moment.
//!
//! Comes in: text (resolv.conf(5)) from an [`Origin`]. Goes out: resolver addresses and the search
//! list, both bounded, whatever the text's size.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::resolv_text::Origin;
use crate::config::DNS_PORT;

/// More resolvers than this are not used; the libc resolver uses three.
const MAX_RESOLVERS: usize = 8;
/// More search domains than this are not passed on; the libc resolver takes six or more.
const MAX_SEARCH: usize = 32;

/// The parts of a `resolv.conf` that matter here.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ResolvConf {
    /// Resolvers in order.
    pub resolvers: Vec<SocketAddr>,
    /// The search list in order.
    pub search: Vec<String>,
}

/// Reads the text of a `resolv.conf`. Lines that make no sense are passed over, as libc does.
#[must_use]
pub fn parse(text: &str) -> ResolvConf {
    let mut conf = ResolvConf::default();
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        match words.next() {
            Some("nameserver") => {
                let addr = words.next().and_then(parse_resolver);
                if let Some(addr) = addr.filter(|_| conf.resolvers.len() < MAX_RESOLVERS) {
                    conf.resolvers.push(SocketAddr::new(addr, DNS_PORT));
                }
            }
            // The last of these lines counts (resolv.conf(5)).
            Some("search" | "domain") => {
                conf.search = words
                    .take_while(|word| !word.starts_with(['#', ';']))
                    .take(MAX_SEARCH)
                    .map(Into::into)
                    .collect();
            }
            _ => {}
        }
    }
    conf
}

/// An address; an IPv6 zone (`fe80::1%eth0`) can't be kept in a plain address, so such a resolver is
/// left out.
fn parse_resolver(word: &str) -> Option<IpAddr> {
    word.parse().ok()
}

/// The host's resolvers and search list, which follow the file they come from.
#[derive(Debug)]
pub struct Source {
    origin: Box<dyn Origin>,
    conf: ResolvConf,
}

impl Source {
    /// What `origin` says, now and later.
    #[must_use]
    pub fn new(origin: impl Origin + 'static) -> Self {
        let mut source = Self {
            origin: Box::new(origin),
            conf: ResolvConf::default(),
        };
        source.take(b"");
        source.current();
        source
    }

    /// What the file says now. A file that can't be read for the moment (being replaced, or no
    /// descriptor left) changes nothing; one that is gone or names no resolver means the local
    /// machine, as it does for libc.
    pub fn current(&mut self) -> &ResolvConf {
        if let Some(text) = self.origin.changed() {
            self.take(&text);
        }
        &self.conf
    }

    /// What the file said when it was last looked at.
    #[must_use]
    pub const fn known(&self) -> &ResolvConf {
        &self.conf
    }

    fn take(&mut self, text: &[u8]) {
        self.conf = parse(&String::from_utf8_lossy(text));
        if self.conf.resolvers.is_empty() {
            self.conf
                .resolvers
                .push(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), DNS_PORT));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::resolv_text::TextFile;
    use proptest::prelude::*;

    #[test]
    fn resolvers_and_search_list_in_order() {
        let conf = parse(
            "# c\nnameserver 192.0.2.1\nnameserver ::1 # x\nsearch a.example b.example\nnameserver nonsense\n",
        );
        assert_eq!(
            conf.resolvers,
            ["192.0.2.1:53".parse().unwrap(), "[::1]:53".parse().unwrap()]
        );
        assert_eq!(conf.search, ["a.example", "b.example"]);
    }

    #[test]
    fn a_long_list_is_cut() {
        let text = "nameserver 192.0.2.1\n".repeat(1000);
        assert_eq!(parse(&text).resolvers.len(), MAX_RESOLVERS);
    }

    #[test]
    fn a_source_follows_replacement_and_symlinks() {
        let dir = tempfile::tempdir().unwrap();
        let (link, one, two) = (
            dir.path().join("conf"),
            dir.path().join("one"),
            dir.path().join("two"),
        );
        std::fs::write(&one, "nameserver 192.0.2.1\n").unwrap();
        std::fs::write(&two, "nameserver 192.0.2.2\n").unwrap();
        std::os::unix::fs::symlink(&one, &link).unwrap();
        let mut source = Source::new(TextFile::new(&link));
        assert_eq!(
            source.current().resolvers,
            ["192.0.2.1:53".parse().unwrap()]
        );
        let new = dir.path().join("new");
        std::os::unix::fs::symlink(&two, &new).unwrap();
        std::fs::rename(&new, &link).unwrap();
        assert_eq!(
            source.current().resolvers,
            ["192.0.2.2:53".parse().unwrap()]
        );
        std::fs::remove_file(&two).unwrap();
        assert_eq!(
            source.current().resolvers,
            ["127.0.0.1:53".parse().unwrap()]
        );
    }

    proptest! {
        #[test]
        fn any_text_parses(text in "\\PC{0,200}", words in proptest::collection::vec("[a-z0-9.: ]{0,20}", 0..20)) {
            let _ = parse(&text);
            let conf = parse(&words.join("\nnameserver "));
            prop_assert!(conf.resolvers.len() <= MAX_RESOLVERS);
        }
    }
}
