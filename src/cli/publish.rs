//! The language of published ports: `[HOSTIP:]HOSTPORT:GUESTPORT[/tcp|/udp][,splice=WHO]`, or ranges of
//! ports.
//!
//! Comes in: a word. Goes out: a [`Spec`], from which [`Publish`] rules follow once the guest's
//! address is known. IPv6 host addresses stand in brackets.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;

use crate::config::{AddressPlan, Protocol, Publish, Splice};

/// One `--publish` option.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    protocol: Protocol,
    host: IpAddr,
    host_ports: RangeInclusive<u16>,
    guest_ports: RangeInclusive<u16>,
    splice: Splice,
}

impl Spec {
    /// A rule for each port. What comes in by IPv6 goes on by IPv6, where the guest has that.
    pub fn rules(&self, plan: &AddressPlan) -> impl Iterator<Item = Publish> {
        let (protocol, host, splice) = (self.protocol, self.host, self.splice);
        let guest6 = plan.guest6().filter(|_| host.is_ipv6());
        let guest = guest6.map_or_else(|| plan.guest().into(), IpAddr::V6);
        self.host_ports
            .clone()
            .zip(self.guest_ports.clone())
            .map(move |(host_port, guest_port)| Publish {
                protocol,
                host: SocketAddr::new(host, host_port),
                guest: SocketAddr::new(guest, guest_port),
                splice,
            })
    }
}

/// Reads one option.
///
/// # Errors
/// What is wrong with it, and how to write it.
pub fn parse(word: &str) -> Result<Spec, String> {
    let (word, wish) = match word.split_once(',') {
        None => (word, None),
        Some((word, wish)) => (word, Some(splice(wish)?)),
    };
    let (addresses, protocol) = match word.rsplit_once('/') {
        None => (word, Protocol::Tcp),
        Some((addresses, "tcp")) => (addresses, Protocol::Tcp),
        Some((addresses, "udp")) => (addresses, Protocol::Udp),
        Some((_, other)) => return Err(format!("unknown protocol '{other}': use tcp or udp")),
    };
    if wish.is_some() && protocol == Protocol::Udp {
        return Err("splice= is for TCP: leave it out of a UDP port".into());
    }
    let form = || {
        "write [HOSTIP:]HOSTPORT:GUESTPORT[/tcp|/udp][,splice=WHO], such as 127.0.0.1:8080:80"
            .to_owned()
    };
    let (rest, guest_ports) = addresses.rsplit_once(':').ok_or_else(form)?;
    let (host, host_ports) = match rest.rsplit_once(':') {
        None => (Ipv4Addr::UNSPECIFIED.into(), rest),
        Some((host, ports)) => (address(host)?, ports),
    };
    let (host_ports, guest_ports) = (ports(host_ports)?, ports(guest_ports)?);
    if host_ports.len() != guest_ports.len() {
        return Err("both ranges must have the same number of ports".into());
    }
    Ok(Spec {
        protocol,
        host,
        host_ports,
        guest_ports,
        splice: match protocol {
            Protocol::Tcp => wish.unwrap_or_default(),
            Protocol::Udp => Splice::Never,
        },
    })
}

fn splice(word: &str) -> Result<Splice, String> {
    match word.strip_prefix("splice=") {
        Some("auto") => Ok(Splice::Auto),
        Some("always") => Ok(Splice::Always),
        Some("never") => Ok(Splice::Never),
        Some(_) | None => Err(format!(
            "unknown setting '{word}': use splice=auto, splice=always or splice=never"
        )),
    }
}

fn address(word: &str) -> Result<IpAddr, String> {
    let inside = word
        .strip_prefix('[')
        .and_then(|word| word.strip_suffix(']'));
    match inside {
        Some(inside) => inside
            .parse()
            .map(IpAddr::V6)
            .map_err(|_| format!("'{inside}' is no IPv6 address")),
        None => word
            .parse()
            .map(IpAddr::V4)
            .map_err(|_| format!("'{word}' is no IPv4 address (IPv6 goes in brackets)")),
    }
}

fn ports(word: &str) -> Result<RangeInclusive<u16>, String> {
    let port = |word: &str| match word.parse() {
        Ok(0) | Err(_) => Err(format!("'{word}' is no port: use 1 to 65535")),
        Ok(port) => Ok(port),
    };
    let (first, last) = match word.split_once('-') {
        None => (port(word)?, port(word)?),
        Some((first, last)) => (port(first)?, port(last)?),
    };
    if first > last {
        return Err(format!("the range {word} runs backwards"));
    }
    Ok(first..=last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rules(word: &str) -> Vec<String> {
        let plan = AddressPlan::default();
        parse(word)
            .unwrap()
            .rules(&plan)
            .map(|rule| format!("{}>{}/{:?}", rule.host, rule.guest, rule.protocol))
            .collect()
    }

    #[test]
    fn every_form_is_read() {
        assert_eq!(rules("8080:80"), ["0.0.0.0:8080>10.0.2.100:80/Tcp"]);
        assert_eq!(
            rules("127.0.0.1:53:5353/udp"),
            ["127.0.0.1:53>10.0.2.100:5353/Udp"]
        );
        assert_eq!(rules("[::1]:1:2/tcp"), ["[::1]:1>[fd00::100]:2/Tcp"]);
        assert_eq!(
            rules("1-2:5-6"),
            ["0.0.0.0:1>10.0.2.100:5/Tcp", "0.0.0.0:2>10.0.2.100:6/Tcp"]
        );
    }

    #[test]
    fn who_takes_the_short_cut_is_read() {
        for (word, expected) in [
            ("8080:80", Splice::Auto),
            ("8080:80,splice=auto", Splice::Auto),
            ("[::1]:8080:80/tcp,splice=always", Splice::Always),
            ("1-2:5-6,splice=never", Splice::Never),
            ("53:53/udp", Splice::Never),
        ] {
            let (spec, plan) = (parse(word).unwrap(), AddressPlan::default());
            let told: Vec<_> = spec.rules(&plan).map(|rule| rule.splice).collect();
            assert!(told.iter().all(|splice| *splice == expected), "{word}");
        }
    }

    #[test]
    fn wrong_forms_say_what_is_wrong() {
        for (word, hint) in [
            ("80", "write [HOSTIP:]"),
            ("0:80", "1 to 65535"),
            ("65536:80", "1 to 65535"),
            ("80:80/sctp", "use tcp or udp"),
            ("::1:80:80", "brackets"),
            ("1-3:1-2", "same number"),
            ("3-1:1-3", "backwards"),
            ("80:80,splice=maybe", "splice=always"),
            ("80:80,fast", "splice=auto"),
            ("80:80/udp,splice=auto", "is for TCP"),
        ] {
            let error = parse(word).unwrap_err();
            assert!(error.contains(hint), "{word}: {error}");
        }
    }

    proptest! {
        #[test]
        fn any_word_is_answered(word in "[0-9a-f:\\[\\]./udptc,splice=-]{0,40}") {
            let _ = parse(&word);
        }
    }
}
