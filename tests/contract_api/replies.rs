//! Requests and replies, byte for byte: how podman, rootlesskit and others ask, every row with its
//! errors, and what published ports do.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown};

use crate::support::process::fail;
use crate::support::serve::{accept, udp_echo};
use crate::support::slirp4netns::{Api, Served};
use crate::support::sockets::{Sockets, assert_errno};
use crate::support::{GATEWAY, LOOPBACK, SOON, WORLD_A, WORLD_B, at, wait_until};
use serde_json::json;

const ANY: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
const LOOPBACK6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);
const LIST: &str = r#"{"execute":"list_hostfwd"}"#;

/// An error as it is to come, without what is added behind the words of the table.
#[track_caller]
fn assert_error(api: &Api, request: &str, desc: &str) {
    let answer = api.ask(request);
    let expected = format!(r#"{{"error":{{"desc":"bad request: {desc}"#);
    assert!(answer.starts_with(&expected), "{request}: {answer}");
    let value: serde_json::Value = serde_json::from_str(&answer).expect("JSON");
    assert!(value["error"].is_object(), "rootlesskit: {answer}");
}

/// The whole error, to the last byte.
#[track_caller]
fn assert_exact_error(api: &Api, request: &str, desc: &str) {
    let expected = format!(r#"{{"error":{{"desc":"bad request: {desc}"}}}}"#);
    assert_eq!(api.ask(request), expected, "{request}");
}

/// Contract 3.2, API, row `add_hostfwd`, as podman sends it (LIVE), and 3.11 item 6.
#[test]
fn add_answers_with_a_number_that_counts_from_one() {
    let net = Served::with(&[]);
    for (id, proto) in [(1, "tcp"), (2, "udp")] {
        let request = format!(
            r#"{{"execute":"add_hostfwd","arguments":{{"proto":"{proto}","host_addr":"0.0.0.0","host_port":8080,"guest_addr":"","guest_port":80}}}}"#
        );
        let expected = format!(r#"{{"return":{{"id":{id}}}}}"#);
        assert_eq!(net.api.ask(&request), expected);
    }
}

/// Contract 3.2, API, row `add_hostfwd`: "`host_addr` missing/"" -> 0.0.0.0; `guest_addr` missing/""
/// -> net+100".
#[test]
fn missing_addresses_are_any_and_the_guests_own() {
    let net = Served::with(&["--cidr=192.168.77.0/24"]);
    for arguments in [
        json!({"proto": "tcp", "host_port": 8081, "guest_port": 80}),
        json!({"proto": "tcp", "host_addr": "", "host_port": 8082, "guest_addr": "", "guest_port": 80}),
        json!({"proto": "tcp", "host_addr": "127.0.0.1", "host_port": 8083, "guest_port": 80}),
    ] {
        net.api.add(&arguments);
    }
    let list = net.api.list();
    let hosts: Vec<_> = list.iter().map(|it| it["host_addr"].clone()).collect();
    assert_eq!(hosts, ["0.0.0.0", "0.0.0.0", "127.0.0.1"]);
    assert!(
        list.iter().all(|it| it["guest_addr"] == "192.168.77.100"),
        "{list:?}"
    );
}

/// Contract 3.2, API, row `list_hostfwd`: "emit both".
#[test]
fn list_comes_both_ways_and_in_the_order_of_slirp4netns() {
    let net = Served::with(&[]);
    assert_eq!(
        net.api.ask(LIST),
        r#"{"return":{"entries":[]},"entries":[]}"#
    );
    net.api.publish("tcp", 8080, 80);
    net.api.publish("udp", 5353, 53);
    let entries = concat!(
        r#"{"id":1,"proto":"tcp","host_addr":"0.0.0.0","host_port":8080,"guest_addr":"10.0.2.100","guest_port":80},"#,
        r#"{"id":2,"proto":"udp","host_addr":"0.0.0.0","host_port":5353,"guest_addr":"10.0.2.100","guest_port":53}"#,
    );
    let expected = format!(r#"{{"return":{{"entries":[{entries}]}},"entries":[{entries}]}}"#);
    assert_eq!(net.api.ask(LIST), expected);
}

/// Contract 3.2, API, row `remove_hostfwd`.
#[test]
fn removed_port_is_closed_and_free() {
    let net = Served::with(&[]);
    for proto in ["tcp", "udp"] {
        let id = net.api.publish(proto, 8080, 80);
        assert_eq!(net.api.remove(id), r#"{"return":{}}"#);
    }
    assert!(net.api.list().is_empty());
    assert_errno(net.world.connect(at(LOOPBACK, 8080)), &[libc::ECONNREFUSED]);
    net.world.listen(at(ANY, 8080)).unwrap();
    net.world.udp(at(ANY, 8080)).unwrap();
    assert_eq!(net.api.publish("tcp", 8080, 80), 3, "no number comes twice");
}

/// Contract 3.2, API, row "failures" of `remove_hostfwd`. A port that is there can always be taken
/// back, so `slirp_remove_hostfwd failed` never comes.
#[test]
fn remove_of_what_is_not_there_is_an_error() {
    let net = Served::with(&[]);
    let id = net.api.publish("tcp", 8080, 80);
    net.api.remove(id);
    const BAD: &str = "remove_hostfwd: bad arguments.id";
    for arguments in [
        format!(r#"{{"id":{id}}}"#),
        r#"{"id":0}"#.into(),
        r#"{"id":-1}"#.into(),
        r#"{"id":99999999999999999999}"#.into(),
        r#"{"id":"1"}"#.into(),
        r#"{"id":null}"#.into(),
        "{}".into(),
        "[]".into(),
    ] {
        let request = format!(r#"{{"execute":"remove_hostfwd","arguments":{arguments}}}"#);
        assert_exact_error(&net.api, &request, BAD);
    }
    assert_exact_error(&net.api, r#"{"execute":"remove_hostfwd"}"#, BAD);
}

/// Contract 3.2, API, row "failures" of `add_hostfwd`, and 3.11 item 6: port 0, missing proto.
#[test]
fn wrong_arguments_of_add_are_named() {
    let net = Served::with(&[]);
    for (name, arguments) in [
        ("proto", r#"{"host_port":8080,"guest_port":80}"#),
        (
            "proto",
            r#"{"proto":"sctp","host_port":8080,"guest_port":80}"#,
        ),
        ("proto", r#"{"proto":6,"host_port":8080,"guest_port":80}"#),
        ("proto", "{}"),
        ("proto", "[]"),
        ("proto", "null"),
        (
            "host_addr",
            r#"{"proto":"tcp","host_addr":"localhost","host_port":8080,"guest_port":80}"#,
        ),
        (
            "host_addr",
            r#"{"proto":"tcp","host_addr":"256.0.0.1","host_port":8080,"guest_port":80}"#,
        ),
        ("host_port", r#"{"proto":"tcp","guest_port":80}"#),
        (
            "host_port",
            r#"{"proto":"tcp","host_port":0,"guest_port":80}"#,
        ),
        (
            "host_port",
            r#"{"proto":"tcp","host_port":65536,"guest_port":80}"#,
        ),
        (
            "host_port",
            r#"{"proto":"tcp","host_port":-1,"guest_port":80}"#,
        ),
        (
            "host_port",
            r#"{"proto":"tcp","host_port":"8080","guest_port":80}"#,
        ),
        (
            "host_port",
            r#"{"proto":"tcp","host_port":1e300,"guest_port":80}"#,
        ),
        (
            "guest_addr",
            r#"{"proto":"tcp","host_port":8080,"guest_addr":"x","guest_port":80}"#,
        ),
        ("guest_port", r#"{"proto":"tcp","host_port":8080}"#),
        (
            "guest_port",
            r#"{"proto":"tcp","host_port":8080,"guest_port":0}"#,
        ),
        (
            "guest_port",
            r#"{"proto":"tcp","host_port":8080,"guest_port":65536}"#,
        ),
        (
            "guest_port",
            r#"{"proto":"tcp","host_port":8080,"guest_port":-80}"#,
        ),
    ] {
        let request = format!(r#"{{"execute":"add_hostfwd","arguments":{arguments}}}"#);
        let desc = format!("add_hostfwd: bad arguments.{name}");
        assert_exact_error(&net.api, &request, &desc);
    }
    assert_exact_error(
        &net.api,
        r#"{"execute":"add_hostfwd"}"#,
        "add_hostfwd: bad arguments.proto",
    );
    assert_eq!(net.api.publish("tcp", 8080, 80), 1, "it lives on");
}

/// Contract 3.2, API, row "failures": no address of the network is nobody's.
#[test]
fn guest_address_outside_the_network_is_named() {
    let net = Served::with(&[]);
    for guest in ["192.0.2.1", "10.0.2.2", "10.0.2.3", "10.0.2.255", "::1"] {
        let request = json!({"execute": "add_hostfwd", "arguments":
            {"proto": "tcp", "host_port": 8080, "guest_addr": guest, "guest_port": 80}});
        let desc = "add_hostfwd: bad arguments.guest_addr";
        assert_error(&net.api, &request.to_string(), desc);
    }
}

/// Contract 3.2, API, rows "failures" and "extra keys in `desc`".
#[test]
fn port_that_cannot_be_opened_comes_with_the_systems_reason() {
    let net = Served::with(&[]);
    let _taken = (
        net.world.listen(at(ANY, 8081)).unwrap(),
        net.world.udp(at(ANY, 8081)).unwrap(),
    );
    net.api.publish("tcp", 8080, 80);
    net.api.publish("udp", 8080, 80);
    for proto in ["tcp", "udp"] {
        for port in [8080, 8081] {
            let request = json!({"execute": "add_hostfwd", "arguments":
                {"proto": proto, "host_port": port, "guest_port": 80}});
            let desc = "add_hostfwd: slirp_add_hostfwd failed: Address already in use";
            assert_exact_error(&net.api, &request.to_string(), desc);
        }
    }
    let foreign = r#"{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_addr":"203.0.113.5","host_port":8080,"guest_port":80}}"#;
    let desc = "add_hostfwd: slirp_add_hostfwd failed: Cannot assign requested address";
    assert_exact_error(&net.api, foreign, desc);
    assert_eq!(net.api.list().len(), 2, "nothing of it stays");
}

/// Contract 3.2, API, row "failures" of the request itself.
#[test]
fn requests_that_are_none_have_the_texts_of_slirp4netns() {
    let net = Served::with(&[]);
    for (request, desc) in [
        (r#"{"execute":"reboot"}"#, "unknown execute"),
        (r#"{"execute":""}"#, "unknown execute"),
        ("{}", "no execute found"),
        (r#"{"execute":1}"#, "no execute found"),
        (r#"{"execute":null}"#, "no execute found"),
        (r#"{"Execute":"list_hostfwd"}"#, "no execute found"),
        ("", "cannot parse JSON"),
        (" \n", "cannot parse JSON"),
        ("list_hostfwd", "cannot parse JSON"),
        (r#"{"execute":"list_hostfwd""#, "cannot parse JSON"),
        (r#"{'execute':'list_hostfwd'}"#, "cannot parse JSON"),
        ("[]", "json_object() failed"),
        ("null", "json_object() failed"),
        ("17", "json_object() failed"),
        (r#""list_hostfwd""#, "json_object() failed"),
    ] {
        assert_exact_error(&net.api, request, desc);
    }
}

/// Contract 3.2, API: "request <= 4095 bytes", and row `too large message`.
#[test]
fn request_of_4095_bytes_is_taken_and_no_longer_one() {
    let net = Served::with(&[]);
    let padded = |length: usize| " ".repeat(length - LIST.len()) + LIST;
    // The newline is one of them.
    assert_eq!(
        net.api.ask(&padded(4094)),
        r#"{"return":{"entries":[]},"entries":[]}"#
    );
    assert_exact_error(&net.api, &padded(4095), "too large message");
    for length in [4096, 5000, 100_000] {
        // The rest of the request is lost with the connection; the answer comes first.
        let mut client = net.api.connect().unwrap();
        let _ = client.write_all(padded(length).as_bytes());
        let mut answer = [0; 2048];
        let got = client.read(&mut answer).unwrap();
        assert_eq!(
            String::from_utf8_lossy(&answer[..got]),
            r#"{"error":{"desc":"bad request: too large message"}}"#
        );
    }
    assert!(net.api.list().is_empty(), "it lives on");
}

/// Contract 3.2, API: "server answers in **one write** and closes. podman does a single `Read(2048)`".
#[test]
fn answer_comes_whole_at_the_first_read_and_then_the_end() {
    let net = Served::with(&[]);
    for (request, half_close) in [
        (LIST.to_owned(), false),
        (LIST.to_owned(), true),
        (format!("{LIST}\n"), false),
        (format!("{LIST}\n"), true),
        (format!(" \t\r\n{LIST}\r\n\n"), true),
    ] {
        let mut client = net.api.connect().unwrap();
        client.write_all(request.as_bytes()).unwrap();
        if half_close {
            client.shutdown(Shutdown::Write).unwrap();
        }
        let mut answer = [0; 2048];
        let got = client.read(&mut answer).unwrap();
        assert_eq!(
            String::from_utf8_lossy(&answer[..got]),
            r#"{"return":{"entries":[]},"entries":[]}"#,
            "{request:?}, half-closed: {half_close}"
        );
        assert_eq!(client.read(&mut answer).unwrap(), 0, "and no more");
    }
}

/// Contract 3.2, API: a long list is one write too, so a client with room for it reads it at once.
#[test]
fn long_list_is_one_write() {
    let net = Served::with(&[]);
    for port in 8000..8050 {
        net.api.publish("tcp", port, 80);
    }
    let mut client = net.api.connect().unwrap();
    client.write_all(LIST.as_bytes()).unwrap();
    let mut answer = vec![0; 65536];
    let got = client.read(&mut answer).unwrap();
    let value: serde_json::Value = serde_json::from_slice(&answer[..got]).unwrap();
    assert_eq!(value["entries"].as_array().map(Vec::len), Some(50));
    assert_eq!(value["entries"], value["return"]["entries"]);
}

/// Contract 3.2, API: "one request per connection".
#[test]
fn second_request_on_a_connection_is_not_looked_at() {
    let net = Served::with(&[]);
    let add =
        r#"{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_port":8080,"guest_port":80}}"#;
    assert_eq!(
        net.api.ask(&format!("{LIST}{add}")),
        r#"{"return":{"entries":[]},"entries":[]}"#
    );
    assert!(net.api.list().is_empty());
}

/// Contract 3.2, API: a request may come in pieces.
#[test]
fn request_byte_by_byte_is_answered() {
    let net = Served::with(&[]);
    let mut client = net.api.connect().unwrap();
    for byte in LIST.as_bytes() {
        client.write_all(&[*byte]).unwrap();
        // Others are served in the meantime.
        assert!(net.api.list().is_empty());
    }
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, r#"{"return":{"entries":[]},"entries":[]}"#);
}

/// Contract 3.2, API: who leaves early is not missed.
#[test]
fn client_that_does_not_wait_for_its_answer_is_served() {
    let net = Served::with(&[]);
    let add =
        r#"{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_port":8080,"guest_port":80}}"#;
    let mut client = net.api.connect().unwrap();
    client.write_all(add.as_bytes()).unwrap();
    drop(client);
    wait_until("the port to be published", SOON, || {
        (net.api.list().len() == 1).then_some(())
    });
}

/// Contract 3.2, API, row `add_hostfwd` with "tcp", and "Semantics: source address kept for
/// non-loopback peers (LIVE)".
#[test]
fn server_in_the_guest_sees_the_tcp_client() {
    let net = Served::with(&[]);
    net.api.publish("tcp", 8080, 80);
    let listener = net.guest.listen(at(ANY, 80)).unwrap();
    for (client, seen) in [(LOOPBACK, GATEWAY), (WORLD_A, WORLD_A), (WORLD_B, WORLD_B)] {
        let mut outside = net.world.connect(at(client, 8080)).unwrap();
        let (mut inside, peer) = accept(&listener);
        assert_eq!(peer.ip(), seen, "a client at {client}");
        outside.write_all(b"question").unwrap();
        outside.shutdown(Shutdown::Write).unwrap();
        let mut heard = String::new();
        inside.read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "question");
    }
}

/// Contract 3.2, API, row `add_hostfwd` with "udp".
#[test]
fn server_in_the_guest_sees_the_udp_client() {
    let net = Served::with(&[]);
    net.api.publish("udp", 5353, 53);
    let inside = net.guest.udp(at(ANY, 53)).unwrap();
    for (server, seen) in [(LOOPBACK, GATEWAY), (WORLD_A, WORLD_A)] {
        let client = net.world.udp_to(at(server, 5353)).unwrap();
        client.send(b"question").unwrap();
        let mut heard = [0; 64];
        let (length, from) = inside.recv_from(&mut heard).unwrap();
        assert_eq!(&heard[..length], b"question");
        assert_eq!(from.ip(), seen, "a client at {server}");
        inside.send_to(b"answer", from).unwrap();
        let length = client.recv(&mut heard).unwrap();
        assert_eq!(&heard[..length], b"answer", "to a client at {server}");
    }
}

/// Beyond the table of 3.2: rootlesskit asks for "tcp6" and "udp6" where a host address is IPv6.
#[test]
fn clients_over_ipv6_reach_the_guest() {
    let net = Served::with(&[]);
    for (proto, host) in [("tcp6", "::1"), ("udp6", "::1")] {
        let added = net.api.add(
            &json!({"proto": proto, "host_addr": host, "host_port": 8080,
            "guest_addr": "10.0.2.100", "guest_port": 80}),
        );
        assert!(added["return"]["id"].is_u64(), "{proto}: {added}");
    }
    let protos: Vec<_> = net
        .api
        .list()
        .iter()
        .map(|it| it["proto"].clone())
        .collect();
    assert_eq!(protos, ["tcp6", "udp6"]);

    let listener = net.guest.listen(at(ANY, 80)).unwrap();
    let mut outside = net.world.connect(at(LOOPBACK6, 8080)).unwrap();
    let (mut inside, _) = accept(&listener);
    inside.write_all(b"over IPv6").unwrap();
    drop(inside);
    let mut heard = String::new();
    outside.read_to_string(&mut heard).unwrap();
    assert_eq!(heard, "over IPv6");

    let _echo = udp_echo(net.guest.udp(at(ANY, 80)).unwrap());
    let client = net.world.udp(at(LOOPBACK6, 0)).unwrap();
    client.send_to(b"over IPv6", at(LOOPBACK6, 8080)).unwrap();
    let mut heard = [0; 64];
    let (length, from) = client.recv_from(&mut heard).unwrap();
    assert_eq!(&heard[..length], b"over IPv6");
    assert_eq!(from, at(LOOPBACK6, 8080));
}

/// Contract 3.2, API, row `remove_hostfwd`: connections that came by the port live on.
#[test]
fn connection_outlives_its_port() {
    let net = Served::with(&[]);
    let id = net.api.publish("tcp", 8080, 80);
    let listener = net.guest.listen(at(ANY, 80)).unwrap();
    let mut outside = net.world.connect(at(WORLD_A, 8080)).unwrap();
    let (mut inside, _) = accept(&listener);
    net.api.remove(id);
    outside.write_all(b"still here").unwrap();
    let mut heard = [0; 10];
    inside.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"still here");
    assert_errno(net.world.connect(at(WORLD_A, 8080)), &[libc::ECONNREFUSED]);
}

/// Contract 3.2, API: a client that is half of one gets no answer that it didn't ask for.
#[test]
fn client_that_says_nothing_is_not_answered_until_it_ends() {
    let net = Served::with(&[]);
    let mut silent = net.api.connect().unwrap();
    silent.set_nonblocking(true).unwrap();
    assert!(net.api.list().is_empty(), "another is served");
    match silent.read(&mut [0; 64]) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => {}
        other => fail(&format!("nothing yet: {other:?}")),
    }
    silent.set_nonblocking(false).unwrap();
    silent.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    silent.read_to_string(&mut answer).unwrap();
    assert_eq!(
        answer,
        r#"{"error":{"desc":"bad request: cannot parse JSON"}}"#
    );
}
