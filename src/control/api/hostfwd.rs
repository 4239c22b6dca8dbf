//! The requests of slirp4netns's API: text to a [`Request`], an outcome back to text.
//!
//! Engines compare these bytes, so names, numbers and error texts are slirp4netns 1.3.2's; what it
//! can't do (IPv6, the system's reason for a failure) is added behind them. Pure: no socket, no clock.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use serde_json::{Map, Value, json};

use crate::config::{AddressPlan, Protocol, Publish, Splice};

/// Longest request, bytes.
pub const MAX_REQUEST: usize = 4095;

/// What a client asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// `add_hostfwd`: publish a port.
    Add(Publish),
    /// `list_hostfwd`: the published ports.
    List,
    /// `remove_hostfwd`: take one back.
    Remove(usize),
}

/// Why a request is refused, in slirp4netns's words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("bad request: {0}")]
pub struct Refused(String);

impl Refused {
    fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// Publishing failed, for the system's reason.
    pub(super) fn add_failed(error: &io::Error) -> Self {
        let reason = error.to_string();
        // Without " (os error 98)", which says nothing more.
        let reason = reason.split(" (os error").next().unwrap_or_default();
        Self(format!("add_hostfwd: slirp_add_hostfwd failed: {reason}"))
    }

    /// There is no such published port.
    pub(super) fn unknown_id() -> Self {
        Self::new("remove_hostfwd: bad arguments.id")
    }
}

/// What has been read so far.
#[derive(Debug, PartialEq, Eq)]
pub enum Parsed {
    /// A whole request.
    Whole(Result<Request, Refused>),
    /// The beginning of one.
    Partial,
}

/// Reads the first JSON value; what follows it is not looked at.
#[must_use]
pub fn parse(bytes: &[u8], plan: &AddressPlan) -> Parsed {
    if bytes.len() > MAX_REQUEST {
        return Parsed::Whole(Err(Refused::new("too large message")));
    }
    let mut values = serde_json::Deserializer::from_slice(bytes).into_iter::<Value>();
    match values.next() {
        None => Parsed::Partial,
        Some(Ok(value)) => Parsed::Whole(request(&value, plan)),
        Some(Err(error)) if error.is_eof() => Parsed::Partial,
        Some(Err(_)) => Parsed::Whole(Err(not_json())),
    }
}

/// The refusal of what is no JSON, or ended before it was.
pub(super) fn not_json() -> Refused {
    Refused::new("cannot parse JSON")
}

fn request(value: &Value, plan: &AddressPlan) -> Result<Request, Refused> {
    let object = value
        .as_object()
        .ok_or_else(|| Refused::new("json_object() failed"))?;
    let execute = object.get("execute").and_then(Value::as_str);
    let none = Map::new();
    let arguments = object.get("arguments").and_then(Value::as_object);
    let arguments = arguments.unwrap_or(&none);
    match execute.ok_or_else(|| Refused::new("no execute found"))? {
        "add_hostfwd" => add(arguments, plan).map(Request::Add),
        "list_hostfwd" => Ok(Request::List),
        "remove_hostfwd" => {
            let id = arguments.get("id").and_then(whole_number);
            let id = id.and_then(|id| usize::try_from(id).ok());
            id.map(Request::Remove).ok_or_else(Refused::unknown_id)
        }
        _ => Err(Refused::new("unknown execute")),
    }
}

/// A number without a fraction: some JSON libraries have only floating point.
fn whole_number(value: &Value) -> Option<u64> {
    let float = || value.as_f64().filter(|it| it.fract() == 0.0);
    value
        .as_u64()
        .or_else(|| format!("{:.0}", float()?).parse().ok())
}

fn add(arguments: &Map<String, Value>, plan: &AddressPlan) -> Result<Publish, Refused> {
    let bad = |name: &str| Refused(format!("add_hostfwd: bad arguments.{name}"));
    let proto = arguments.get("proto").and_then(Value::as_str);
    let (protocol, ipv6) = match proto {
        Some("tcp") => (Protocol::Tcp, false),
        Some("udp") => (Protocol::Udp, false),
        Some("tcp6") => (Protocol::Tcp, true),
        Some("udp6") => (Protocol::Udp, true),
        Some(_) | None => return Err(bad("proto")),
    };
    let address = |name: &str, default: IpAddr| match arguments.get(name) {
        None | Some(Value::Null) => Ok(default),
        Some(Value::String(text)) if text.is_empty() => Ok(default),
        Some(Value::String(text)) => text.parse().map_err(|_| bad(name)),
        Some(_) => Err(bad(name)),
    };
    let port = |name: &str| {
        let number = arguments.get(name).and_then(whole_number);
        let port = number.and_then(|number| u16::try_from(number).ok());
        port.filter(|port| *port != 0).ok_or_else(|| bad(name))
    };
    let any = if ipv6 {
        IpAddr::V6(Ipv6Addr::UNSPECIFIED)
    } else {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED)
    };
    let host = address("host_addr", any)?;
    let mapped = matches!(host, IpAddr::V6(host) if host.to_ipv4_mapped().is_some());
    if mapped || ipv6 && host.is_ipv4() {
        return Err(bad("host_addr"));
    }
    let host = SocketAddr::new(host, port("host_port")?);
    let guest = match address("guest_addr", plan.guest().into())? {
        any if any.is_unspecified() => plan.guest().into(),
        guest => guest,
    };
    // A guest can't answer the world from an address of its link alone.
    let link_local = matches!(guest, IpAddr::V6(guest) if guest.is_unicast_link_local());
    if link_local || !plan.is_guest_side(guest) {
        let subnets = match plan.subnet6() {
            Some(subnet6) => format!("{} or {subnet6}", plan.subnet()),
            None => plan.subnet().to_string(),
        };
        return Err(Refused(format!(
            "add_hostfwd: bad arguments.guest_addr: {guest} is no guest's in {subnets}"
        )));
    }
    Ok(Publish {
        protocol,
        host,
        guest: SocketAddr::new(guest, port("guest_port")?),
        // As slirp4netns has it: the guest sees who is there, loopback clients as the gateway.
        splice: Splice::Never,
    })
}

/// The answer to a request that was refused.
#[must_use]
pub fn refusal(refused: &Refused) -> String {
    json!({"error": {"desc": refused.to_string()}}).to_string()
}

/// The answer to `add_hostfwd`.
#[must_use]
pub fn added(id: usize) -> String {
    json!({"return": {"id": id}}).to_string()
}

/// The answer to `remove_hostfwd`.
#[must_use]
pub fn removed() -> String {
    json!({"return": {}}).to_string()
}

/// The answer to `list_hostfwd`: under `return` what its manual promises, beside it what slirp4netns
/// sends. Names in its order, hence written out; nothing in it needs escaping.
#[must_use]
pub fn listed(ports: &[(usize, Publish)]) -> String {
    let entries: Vec<String> = ports.iter().map(entry).collect();
    let entries = entries.join(",");
    format!(r#"{{"return":{{"entries":[{entries}]}},"entries":[{entries}]}}"#)
}

fn entry((id, rule): &(usize, Publish)) -> String {
    let proto = match (rule.protocol, rule.host.is_ipv6()) {
        (Protocol::Tcp, false) => "tcp",
        (Protocol::Tcp, true) => "tcp6",
        (Protocol::Udp, false) => "udp",
        (Protocol::Udp, true) => "udp6",
    };
    // Told of ports that slirp4netns could not have published, by `--publish`.
    let splice = match rule.may_splice() {
        true => format!(r#","splice":"{}""#, rule.splice),
        false => String::new(),
    };
    format!(
        r#"{{"id":{id},"proto":"{proto}","host_addr":"{}","host_port":{},"guest_addr":"{}","guest_port":{}{splice}}}"#,
        rule.host.ip(),
        rule.host.port(),
        rule.guest.ip(),
        rule.guest.port(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn whole(text: &str) -> Result<Request, String> {
        match parse(text.as_bytes(), &AddressPlan::default()) {
            Parsed::Whole(request) => request.map_err(|refused| refused.to_string()),
            Parsed::Partial => panic!("{text} is whole"),
        }
    }

    fn add_with(arguments: &str) -> Result<Request, String> {
        whole(&format!(
            r#"{{"execute":"add_hostfwd","arguments":{arguments}}}"#
        ))
    }

    #[test]
    fn a_published_port_needs_only_protocol_and_ports() {
        let expected = Publish {
            protocol: Protocol::Tcp,
            host: "0.0.0.0:8080".parse().unwrap(),
            guest: "10.0.2.100:80".parse().unwrap(),
            splice: Splice::Never,
        };
        for arguments in [
            r#"{"proto":"tcp","host_port":8080,"guest_port":80}"#,
            r#"{"proto":"tcp","host_port":8080,"guest_addr":"0.0.0.0","guest_port":80}"#,
            r#"{"proto":"tcp","host_addr":"","host_port":8080.0,"guest_addr":"","guest_port":80}"#,
            r#"{"proto":"tcp","host_addr":"0.0.0.0","host_port":8080,"guest_addr":"10.0.2.100","guest_port":80}"#,
        ] {
            assert_eq!(
                add_with(arguments),
                Ok(Request::Add(expected)),
                "{arguments}"
            );
        }
    }

    #[test]
    fn ipv6_is_published_too() {
        for arguments in [
            r#"{"proto":"udp6","host_port":53,"guest_port":53}"#,
            r#"{"proto":"udp","host_addr":"::","host_port":53,"guest_port":53}"#,
        ] {
            let Ok(Request::Add(rule)) = add_with(arguments) else {
                panic!("{arguments}")
            };
            assert_eq!(rule.host, "[::]:53".parse().unwrap());
            assert_eq!(rule.protocol, Protocol::Udp);
            assert_eq!(rule.guest, "10.0.2.100:53".parse().unwrap());
        }
        let inside = r#"{"proto":"tcp6","host_port":80,"guest_addr":"fd00::5","guest_port":80}"#;
        let Ok(Request::Add(rule)) = add_with(inside) else {
            panic!("{inside}")
        };
        assert_eq!(rule.guest, "[fd00::5]:80".parse().unwrap());
    }

    #[test]
    fn refusals_have_the_texts_of_slirp4netns() {
        for (text, desc) in [
            ("x", "bad request: cannot parse JSON"),
            ("[]", "bad request: json_object() failed"),
            ("{}", "bad request: no execute found"),
            (r#"{"execute":1}"#, "bad request: no execute found"),
            (r#"{"execute":"x"}"#, "bad request: unknown execute"),
            (
                r#"{"execute":"add_hostfwd"}"#,
                "bad request: add_hostfwd: bad arguments.proto",
            ),
            (
                r#"{"execute":"remove_hostfwd"}"#,
                "bad request: remove_hostfwd: bad arguments.id",
            ),
        ] {
            assert_eq!(whole(text), Err(desc.to_owned()), "{text}");
        }
        for (arguments, name) in [
            (r#"{"proto":"sctp"}"#, "proto"),
            (r#"{"proto":"tcp","host_addr":"x"}"#, "host_addr"),
            (
                r#"{"proto":"tcp6","host_addr":"127.0.0.1","host_port":1,"guest_port":1}"#,
                "host_addr",
            ),
            (
                r#"{"proto":"tcp","host_addr":"::ffff:127.0.0.1"}"#,
                "host_addr",
            ),
            (r#"{"proto":"tcp"}"#, "host_port"),
            (r#"{"proto":"tcp","host_port":"80"}"#, "host_port"),
            (r#"{"proto":"tcp","host_port":0}"#, "host_port"),
            (r#"{"proto":"tcp","host_port":-1}"#, "host_port"),
            (r#"{"proto":"tcp","host_port":65536}"#, "host_port"),
            (r#"{"proto":"tcp","host_port":1.5}"#, "host_port"),
            (
                r#"{"proto":"tcp","host_port":1,"guest_addr":"x"}"#,
                "guest_addr",
            ),
            (
                r#"{"proto":"tcp","host_port":1,"guest_port":0}"#,
                "guest_port",
            ),
        ] {
            let desc = format!("bad request: add_hostfwd: bad arguments.{name}");
            assert_eq!(add_with(arguments), Err(desc), "{arguments}");
        }
        let outside =
            add_with(r#"{"proto":"tcp","host_port":1,"guest_addr":"192.0.2.1","guest_port":1}"#);
        assert!(
            outside
                .unwrap_err()
                .starts_with("bad request: add_hostfwd: bad arguments.guest_addr")
        );
    }

    #[test]
    fn answers_are_byte_for_byte_those_of_slirp4netns() {
        assert_eq!(added(1), r#"{"return":{"id":1}}"#);
        assert_eq!(removed(), r#"{"return":{}}"#);
        let Parsed::Whole(Err(too_large)) =
            parse(&[b' '; MAX_REQUEST + 1], &AddressPlan::default())
        else {
            panic!("that much is refused")
        };
        assert_eq!(
            refusal(&too_large),
            r#"{"error":{"desc":"bad request: too large message"}}"#
        );
        let in_use = io::Error::from_raw_os_error(libc::EADDRINUSE);
        assert_eq!(
            refusal(&Refused::add_failed(&in_use)),
            r#"{"error":{"desc":"bad request: add_hostfwd: slirp_add_hostfwd failed: Address already in use"}}"#
        );
    }

    #[test]
    fn the_list_comes_both_ways() {
        let rule = Publish {
            protocol: Protocol::Tcp,
            host: "[::1]:8080".parse().unwrap(),
            guest: "10.0.2.100:80".parse().unwrap(),
            splice: Splice::Never,
        };
        let list: Value = serde_json::from_str(&listed(&[(7, rule)])).unwrap();
        assert_eq!(list["entries"], list["return"]["entries"]);
        assert_eq!(
            list["entries"][0],
            json!({"id":7,"proto":"tcp6","host_addr":"::1","host_port":8080,"guest_addr":"10.0.2.100","guest_port":80})
        );
        assert_eq!(listed(&[]), r#"{"return":{"entries":[]},"entries":[]}"#);
        let spliced = Publish {
            splice: Splice::Always,
            ..rule
        };
        let list: Value = serde_json::from_str(&listed(&[(7, spliced)])).unwrap();
        assert_eq!(list["entries"][0]["splice"], "always");
    }

    #[test]
    fn a_beginning_is_told_from_nonsense() {
        let plan = AddressPlan::default();
        for partial in ["", " ", "{", r#"{"execute"#, r#"{"execute":"list_hostfwd""#] {
            assert_eq!(
                parse(partial.as_bytes(), &plan),
                Parsed::Partial,
                "{partial}"
            );
        }
        assert_eq!(
            whole("{\"execute\":\"list_hostfwd\"}\n rest"),
            Ok(Request::List)
        );
        assert!(whole(&"[".repeat(1000)).is_err(), "deep nesting is refused");
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&bytes, &AddressPlan::default());
        }

        #[test]
        fn any_mutation_is_answered(at in 0_usize..140, byte in any::<u8>()) {
            let mut bytes = br#"{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_addr":"0.0.0.0","host_port":8080,"guest_addr":"10.0.2.100","guest_port":80}}"#.to_vec();
            let at = at % bytes.len();
            bytes[at] = byte;
            let _ = parse(&bytes, &AddressPlan::default());
        }
    }
}
