//! Published ports past the tap on a real kernel, as an unprivileged user: whom the short cut is for, what
//! the guest sees, that ends, resets and urgent data cross it, and what becomes of it when the process that
//! opens the sockets inside dies, or its parent. Bytes in bulk are `ns_bulk.rs`'s.

#![allow(
    clippy::unwrap_used,
    reason = "a test fails by panicking, also inside a helper"
)]

mod support;

use std::fs;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{MsgFlags, send};
use nix::unistd::Pid;
use std::os::fd::AsRawFd;
use support::attached::{Attached, Net};
use support::guest::Guest;
use support::process::state_of;
use support::serve::{self, accept};
use support::slirp4netns::Api;
use support::sockets::{Sockets, assert_answer_is_heard, assert_errno, ports_to_give, reset};
use support::sys::{raise_descriptor_limit, unacknowledged};
use support::world::World;
use support::{
    ANY, ANY6, GATEWAY, GUEST, GUEST6, LOOPBACK, LOOPBACK6, SOON, WORLD_A, at, wait_until,
};

/// The guest's service on every address; the host's port 8080 leads to it.
fn listener(net: &Net) -> TcpListener {
    net.guest.listen(at(ANY, 80)).unwrap()
}

/// A client at `to`, its other end inside, and whom the guest sees.
#[track_caller]
fn connected(net: &Net, listener: &TcpListener, to: SocketAddr) -> (TcpStream, TcpStream, IpAddr) {
    let outside = net.world.connect(to).expect("the port is published");
    let (inside, peer) = accept(listener);
    (outside, inside, peer.ip())
}

#[track_caller]
fn assert_carries(from: &mut TcpStream, to: &mut TcpStream, text: &[u8]) {
    from.write_all(text).expect("it is connected");
    let mut heard = vec![0; text.len()];
    to.read_exact(&mut heard).expect("it is connected");
    assert_eq!(heard, text);
}

/// What a client at `to` hears whom nobody serves.
fn refused(net: &Net, to: SocketAddr) -> io::Result<usize> {
    net.world.connect(to).and_then(|mut it| it.read(&mut [0]))
}

const REFUSED: &[i32] = &[libc::ECONNRESET, libc::ECONNREFUSED];

// --- whom it is for ------------------------------------------------------------------------------

#[test]
fn client_on_loopback_looks_like_the_guest_itself_and_others_like_themselves() {
    let net = Net::up(&["-p", "8080:80", "-p", "[::]:8080:80"]);
    let four = net.guest.listen(at(GUEST, 80)).unwrap();
    let six = net.guest.listen(at(GUEST6, 80)).unwrap();
    for (listener, to, seen) in [
        (&four, LOOPBACK, GUEST),
        (&six, LOOPBACK6, GUEST6),
        (&four, WORLD_A, WORLD_A),
    ] {
        let (mut outside, mut inside, peer) = connected(&net, listener, at(to, 8080));
        assert_eq!(peer, seen, "a client at {to}");
        assert_carries(&mut outside, &mut inside, b"question");
        assert_carries(&mut inside, &mut outside, b"answer");
    }
}

#[test]
fn rule_forces_or_forbids_it() {
    let net = Net::up(&[
        "-p",
        "8080:80,splice=never",
        "-p",
        "8081:80/tcp,splice=always",
        "-p",
        "8082:80,splice=auto",
    ]);
    let listener = listener(&net);
    for (to, port, seen) in [
        (LOOPBACK, 8080, GATEWAY),
        (WORLD_A, 8080, WORLD_A),
        (LOOPBACK, 8081, GUEST),
        (WORLD_A, 8081, GUEST),
        (LOOPBACK, 8082, GUEST),
        (WORLD_A, 8082, WORLD_A),
    ] {
        let (.., peer) = connected(&net, &listener, at(to, port));
        assert_eq!(peer, seen, "{to}:{port}");
    }
}

#[test]
fn service_on_the_namespaces_loopback_is_reached_from_the_hosts_alone() {
    let net = Net::up(&[
        "-p",
        "8080:80",
        "-p",
        "8081:80,splice=never",
        "-p",
        "8082:80,splice=always",
        "-p",
        "[::1]:8080:80",
    ]);
    let four = net.guest.listen(at(LOOPBACK, 80)).unwrap();
    let six = net.guest.listen(at(LOOPBACK6, 80)).unwrap();
    for (listener, to, port) in [
        (&four, LOOPBACK, 8080),
        (&four, LOOPBACK, 8082),
        (&six, LOOPBACK6, 8080),
    ] {
        let (mut outside, mut inside, peer) = connected(&net, listener, at(to, port));
        assert_eq!(peer, to);
        assert_carries(&mut outside, &mut inside, b"hello");
    }
    for (to, port) in [(WORLD_A, 8080), (LOOPBACK, 8081), (WORLD_A, 8082)] {
        assert_errno(refused(&net, at(to, port)), REFUSED);
    }
}

#[test]
fn client_is_reset_when_nobody_listens_inside() {
    let net = Net::up(&["-p", "8080:80", "-p", "[::1]:8080:80"]);
    for to in [LOOPBACK, LOOPBACK6] {
        assert_errno(refused(&net, at(to, 8080)), REFUSED);
    }
    // And is served as soon as somebody does.
    let listener = listener(&net);
    connected(&net, &listener, at(LOOPBACK, 8080));
}

#[test]
fn client_is_reset_when_the_namespace_has_no_port_but_the_one_that_is_asked_for() {
    let port = 40_001;
    let net = Net::up(&["-p", &format!("8080:{port}")]);
    let only = ports_to_give(port, port);
    net.guest.run("sh", &["-c", &only]).output();
    assert_errno(refused(&net, at(LOOPBACK, 8080)), REFUSED);
    let listener = net.guest.listen(at(GUEST, port));
    listener.expect("nobody keeps the port");
}

#[test]
fn ports_of_the_api_lead_over_the_tap_and_the_list_tells_which_do_not() {
    let net = Net::up(&["-p", "8080:80", "--api-socket", "/mnt/api.sock"]);
    let api = Api::new(&net.world, "api.sock");
    api.publish("tcp", 8081, 80);
    let listener = listener(&net);
    for (port, seen) in [(8080, GUEST), (8081, GATEWAY)] {
        let (.., peer) = connected(&net, &listener, at(LOOPBACK, port));
        assert_eq!(peer, seen, "port {port}");
    }
    let told: Vec<_> = api
        .list()
        .iter()
        .map(|it| it.get("splice").cloned())
        .collect();
    assert_eq!(told, [Some("auto".into()), None]);
}

// --- what crosses it -----------------------------------------------------------------------------

#[test]
fn half_closed_connection_still_carries_the_other_way() {
    let net = Net::up(&["-p", "8080:80"]);
    let listener = listener(&net);
    for swapped in [false, true] {
        let (outside, inside, _) = connected(&net, &listener, at(LOOPBACK, 8080));
        let (mut ended, mut other) = if swapped {
            (inside, outside)
        } else {
            (outside, inside)
        };
        assert_carries(&mut ended, &mut other, b"question");
        ended.shutdown(Shutdown::Write).unwrap();
        assert_eq!(other.read(&mut [0]).unwrap(), 0, "the end has come");
        for _ in 0..3 {
            assert_carries(&mut other, &mut ended, &[7; 100_000]);
        }
        drop(other);
        assert_eq!(ended.read(&mut [0]).unwrap(), 0);
    }
}

/// Its kernel forgets an end that nobody owns, and says so only when it is asked.
#[test]
fn guest_that_has_gone_from_a_half_closed_connection_is_noticed() {
    let net = Net::up(&["-p", "8080:80", "--tcp-half-closed-timeout", "5"]);
    let forget = "echo 1 > /proc/sys/net/ipv4/tcp_fin_timeout";
    net.guest.run("sh", &["-c", forget]).output();
    let listener = listener(&net);
    let (mut outside, inside, _) = connected(&net, &listener, at(LOOPBACK, 8080));
    drop(inside);
    assert_eq!(outside.read(&mut [0]).unwrap(), 0, "the end has come");
    let error = wait_until("the client is reset", SOON, || outside.take_error().ok()?);
    assert_errno(Err::<(), _>(error), &[libc::ECONNRESET, libc::EPIPE]);
}

#[test]
fn reset_crosses_both_ways_also_behind_an_end() {
    let net = Net::up(&["-p", "8080:80"]);
    let listener = listener(&net);
    for (swapped, ends_before) in [(false, false), (true, false), (false, true), (true, true)] {
        let (outside, inside, _) = connected(&net, &listener, at(LOOPBACK, 8080));
        let (mut resetting, mut other) = if swapped {
            (inside, outside)
        } else {
            (outside, inside)
        };
        assert_carries(&mut resetting, &mut other, b"x");
        if ends_before {
            resetting.shutdown(Shutdown::Write).unwrap();
            assert_eq!(other.read(&mut [0]).unwrap(), 0);
        }
        reset(resetting);
        let heard = wait_until("the reset", SOON, || other.write(b"x").err());
        assert_errno::<()>(Err(heard), &[libc::ECONNRESET, libc::EPIPE]);
    }
}

#[test]
fn urgent_data_stay_in_the_stream() {
    let net = Net::up(&["-p", "8080:80"]);
    let listener = listener(&net);
    let (outside, inside, _) = connected(&net, &listener, at(LOOPBACK, 8080));
    for (mut from, mut to) in [
        (outside.try_clone().unwrap(), inside.try_clone().unwrap()),
        (inside, outside),
    ] {
        for _ in 0..3 {
            from.write_all(b"plain ").unwrap();
            send(from.as_raw_fd(), b"urgent", MsgFlags::MSG_OOB).unwrap();
            from.write_all(b" after").unwrap();
            let mut heard = [0; 18];
            to.read_exact(&mut heard).unwrap();
            assert_eq!(&heard, b"plain urgent after");
        }
    }
}

#[test]
fn urgent_data_before_the_end_stay_in_the_stream() {
    let net = Net::up(&["-p", "8080:80"]);
    let listener = listener(&net);
    for round in 0..10 {
        let (outside, inside, _) = connected(&net, &listener, at(LOOPBACK, 8080));
        let (mut from, mut to) = match round % 2 {
            0 => (outside, inside),
            _ => (inside, outside),
        };
        from.write_all(b"plain ").unwrap();
        send(from.as_raw_fd(), b"urgent", MsgFlags::MSG_OOB).unwrap();
        from.write_all(b" after").unwrap();
        from.shutdown(Shutdown::Write).unwrap();
        let mut heard = String::new();
        to.read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "plain urgent after");
    }
}

#[test]
fn answer_before_the_end_of_an_upload_is_heard() {
    let net = Net::up(&["-p", "8080:80"]);
    let listener = listener(&net);
    for round in 0..10 {
        let (outside, inside, _) = connected(&net, &listener, at(LOOPBACK, 8080));
        assert_answer_is_heard(outside, inside, round % 2 == 0);
    }
}

/// All of it has left the server, whose end is a reset then: most lies where the client's system has no room for it yet.
#[test]
fn long_answer_before_the_end_of_an_upload_reaches_who_reads_late() {
    const ANSWER: usize = 1 << 20;
    let net = Net::up(&["-p", "8080:80"]);
    let listener = listener(&net);
    let (mut outside, mut inside, _) = connected(&net, &listener, at(LOOPBACK, 8080));
    assert_carries(&mut outside, &mut inside, b"request");
    let answer: Vec<u8> = (0..=250).cycle().take(ANSWER).collect();
    inside.write_all(&answer).unwrap();
    wait_until("the answer to leave", SOON, || {
        (unacknowledged(&inside) == 0).then_some(())
    });
    outside.write_all(b"what is not read").unwrap();
    wait_until("it to arrive", SOON, || {
        (inside.peek(&mut [0; 100]).unwrap() > 0).then_some(())
    });
    drop(inside);
    // Tapgate hears of the reset by what it sends on.
    outside.write_all(b"nor this").unwrap();
    let mut heard: Vec<u8> = Vec::new();
    let mut piece = vec![0; 16 * 1024];
    while let Ok(len @ 1..) = outside.read(&mut piece) {
        heard.extend(&piece[..len]);
    }
    assert_eq!(heard.len(), ANSWER);
    assert!(heard == answer);
}

#[test]
fn reader_that_stops_holds_its_own_connection_back_alone() {
    let net = Net::up(&["-p", "8080:80"]);
    let listener = listener(&net);
    let (mut stuck, _unread, _) = connected(&net, &listener, at(LOOPBACK, 8080));
    stuck.set_nonblocking(true).unwrap();
    let mut written = 0;
    while let Ok(len) = stuck.write(&[1; 65536]) {
        written += len;
    }
    assert!(written > 0, "it is connected");
    for _ in 0..10 {
        let (mut outside, mut inside, _) = connected(&net, &listener, at(LOOPBACK, 8080));
        assert_carries(&mut outside, &mut inside, &[3; 50_000]);
    }
}

/// How the kernel schedules a process (proc(5), field 41 of `/proc/PID/stat`).
fn policy(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, from_the_third) = stat.rsplit_once(") ")?;
    from_the_third.split(' ').nth(41 - 3)?.parse().ok()
}

#[test]
fn bulk_takes_the_processor_from_nobody_while_it_lasts() {
    let net = Net::up(&["-p", "8080:80"]);
    let listener = listener(&net);
    let pid = net.tapgate.pid();
    let becomes = |wanted: i32| {
        let what = format!("policy {wanted}");
        wait_until(&what, SOON, || (policy(pid) == Some(wanted)).then_some(()));
    };
    becomes(libc::SCHED_OTHER);
    /// Ends a connection, however the test does.
    struct Ending(TcpStream);
    impl Drop for Ending {
        fn drop(&mut self) {
            let _ = self.0.shutdown(Shutdown::Both);
        }
    }
    let (mut outside, mut inside, _) = connected(&net, &listener, at(LOOPBACK, 8080));
    let end = Ending(inside.try_clone().unwrap());
    thread::scope(|scope| {
        scope.spawn(move || while outside.write(&[0; 1 << 16]).is_ok() {});
        scope.spawn(move || io::copy(&mut inside, &mut io::sink()));
        let _end = end;
        becomes(libc::SCHED_BATCH);
    });
    // By itself: what comes next finds it so.
    becomes(libc::SCHED_OTHER);
}

#[test]
fn five_hundred_at_once_are_all_joined() {
    let _ = raise_descriptor_limit();
    let net = Net::up(&["-p", "8080:80"]);
    // On the loopback alone: who took the tap would be refused.
    let echo = serve::tcp_echo(net.guest.listen(at(LOOPBACK, 80)).unwrap());
    let mut clients: Vec<_> = (0..500)
        .map(|_| net.world.connect(at(LOOPBACK, 8080)).unwrap())
        .collect();
    for (number, client) in clients.iter_mut().enumerate() {
        client.write_all(&number.to_be_bytes()).unwrap();
    }
    for (number, client) in clients.iter_mut().enumerate() {
        let mut back = [0; 8];
        client.read_exact(&mut back).unwrap();
        assert_eq!(back, number.to_be_bytes());
    }
    drop(clients);
    drop(echo);
}

// --- the opener ----------------------------------------------------------------------------------

/// A process's name and parent, from `/proc/PID/stat`.
fn name_and_parent(pid: i32) -> Option<(String, i32)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (head, tail) = stat.rsplit_once(')')?;
    let mut fields = tail.split_ascii_whitespace();
    let state = fields.next()?;
    let parent = fields.next()?.parse().ok()?;
    let name = head.split_once('(')?.1.to_owned();
    (state != "Z").then_some((name, parent))
}

/// The opener among the descendants of a process.
fn opener_of(ancestor: i32) -> Option<i32> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let descends = |pid: i32| {
        std::iter::successors(Some(pid), |pid| name_and_parent(*pid).map(|it| it.1))
            .any(|pid| pid == ancestor)
    };
    pids.into_iter().find(|pid| {
        name_and_parent(*pid).is_some_and(|it| it.0 == "tapgate-opener") && descends(*pid)
    })
}

#[track_caller]
fn assert_gone(pid: i32) {
    wait_until("the opener to be gone", SOON, || {
        name_and_parent(pid).is_none().then_some(())
    });
}

fn signal(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}

#[test]
fn opener_is_there_only_where_a_port_may_need_it() {
    for (options, needed) in [
        (&["-p", "8080:80"][..], true),
        (&["-p", "192.0.2.1:8080:80,splice=always"], true),
        (&[], false),
        (&["-p", "8080:80,splice=never"], false),
        (&["-p", "192.0.2.1:8080:80"], false),
        (&["-p", "8080:80/udp"], false),
    ] {
        let net = Net::up(options);
        let pid = net.tapgate.pid();
        assert_eq!(opener_of(pid).is_some(), needed, "{options:?}");
    }
}

#[test]
fn opener_has_no_powers_and_hardly_any_calls() {
    let net = Net::up(&["-p", "8080:80"]);
    let opener = opener_of(net.tapgate.pid()).unwrap();
    let filtered = wait_until("its filter", SOON, || {
        let text = fs::read_to_string(format!("/proc/{opener}/status")).ok()?;
        text.contains("Seccomp:\t2").then_some(text)
    });
    for line in [
        "NoNewPrivs:\t1",
        "CapPrm:\t0000000000000000",
        "CapEff:\t0000000000000000",
        "CapInh:\t0000000000000000",
        "CapBnd:\t0000000000000000",
    ] {
        assert!(filtered.contains(line), "{line}: {filtered}");
    }
    // Another process of the user may not look into it.
    let mut look = net.world.command("ls");
    let looked = support::process::run(look.arg(format!("/proc/{opener}/fd")));
    assert!(looked.stderr.contains("denied"), "{looked:?}");
}

#[test]
fn without_opener_the_tap_carries_connections() {
    let net = Net::up(&["-p", "8080:80"]);
    let listener = listener(&net);
    let opener = opener_of(net.tapgate.pid()).unwrap();
    let (mut early, mut its_end, peer) = connected(&net, &listener, at(LOOPBACK, 8080));
    assert_eq!(peer, GUEST);
    signal(opener, Signal::SIGKILL);
    // Sockets that were in stock may still be used; then there are none.
    let (mut outside, mut inside) = wait_until("the tap to be taken", SOON, || {
        let (outside, inside, peer) = connected(&net, &listener, at(LOOPBACK, 8080));
        (peer == GATEWAY).then_some((outside, inside))
    });
    assert_carries(&mut outside, &mut inside, b"hello");
    assert_carries(&mut inside, &mut outside, b"there");
    assert_carries(&mut early, &mut its_end, b"still joined");
}

#[test]
fn stopped_opener_delays_and_the_tap_carries_connections_until_it_goes_on() {
    let net = Net::up(&["-p", "8080:80"]);
    let opener = opener_of(net.tapgate.pid()).unwrap();
    signal(opener, Signal::SIGSTOP);
    let listener = listener(&net);
    for _ in 0..2 {
        let (mut outside, mut inside, peer) = connected(&net, &listener, at(LOOPBACK, 8080));
        assert_eq!(peer, GATEWAY);
        assert_carries(&mut outside, &mut inside, b"hello");
    }
    signal(opener, Signal::SIGCONT);
    wait_until("the way inside to be taken again", SOON, || {
        let (_, _, peer) = connected(&net, &listener, at(LOOPBACK, 8080));
        (peer == GUEST).then_some(())
    });
    signal(opener, Signal::SIGSTOP);
    let Net { tapgate, .. } = net;
    tapgate.signal(Signal::SIGTERM);
    assert_eq!(tapgate.finish(SOON).code(), 0);
    assert_gone(opener);
}

/// A stop in the middle of its wait has the kernel go on by `restart_syscall`, as the end of a suspend does.
#[test]
fn opener_goes_on_after_a_stop() {
    let net = Net::up(&["-p", "8080:80"]);
    let opener = opener_of(net.tapgate.pid()).unwrap();
    let listener = listener(&net);
    for _ in 0..3 {
        signal(opener, Signal::SIGSTOP);
        wait_until("the opener to stop", SOON, || {
            (state_of(opener) == Some('T')).then_some(())
        });
        signal(opener, Signal::SIGCONT);
        wait_until("it to go on", SOON, || {
            (state_of(opener) == Some('S')).then_some(())
        });
    }
    let (mut outside, mut inside, peer) = connected(&net, &listener, at(LOOPBACK, 8080));
    assert_eq!(peer, GUEST, "past the tap");
    assert_carries(&mut outside, &mut inside, b"hello");
    assert_eq!(opener_of(net.tapgate.pid()), Some(opener));
}

#[test]
fn opener_goes_with_tapgate_however_that_ends() {
    for end in [Signal::SIGKILL, Signal::SIGTERM] {
        let Net {
            tapgate,
            guest,
            world,
        } = Net::up(&["-p", "8080:80"]);
        let opener = opener_of(tapgate.pid()).unwrap();
        tapgate.signal(end);
        tapgate.finish(SOON);
        assert_gone(opener);
        drop((guest, world));
    }
}

#[test]
fn end_of_the_target_is_noticed_though_the_opener_is_inside() {
    let world = World::new();
    let guest = Guest::new(&world);
    let path = format!("/proc/{}/ns/net", guest.pid());
    let tapgate = Attached::start(&world, &["-p", "8080:80", &path]);
    let opener = opener_of(tapgate.pid()).unwrap();
    drop(guest);
    assert_eq!(tapgate.finish(SOON).code(), 0);
    assert_gone(opener);
}

#[test]
fn command_is_reached_past_the_tap_and_leaves_no_opener_behind() {
    for end in [None, Some(Signal::SIGKILL)] {
        let world = World::new();
        // On the loopback, where only the short cut leads.
        let script = "echo ready; exec socat TCP-LISTEN:80,bind=127.0.0.1 EXEC:'echo inside'";
        let mut running = world.start_inside(&["-p", "8080:80"], script);
        running.wait_for_output("ready");
        let opener = opener_of(running.pid()).unwrap();
        if let Some(end) = end {
            running.signal(end);
            running.finish(SOON);
        } else {
            let heard = wait_until("the command to answer", SOON, || {
                let mut stream = world.connect(at(LOOPBACK, 8080)).ok()?;
                let mut text = String::new();
                stream.read_to_string(&mut text).ok()?;
                (!text.is_empty()).then_some(text)
            });
            assert_eq!(heard, "inside\n");
            assert_eq!(running.finish(SOON).code(), 0);
        }
        assert_gone(opener);
    }
}

#[test]
fn guest_whose_loopback_is_down_is_reached_over_the_tap() {
    let net = Net::up(&["--no-configure", "-p", "8080:80"]);
    let script = "ip address add 10.0.2.100/24 dev tap0; ip link set tap0 up
        ip route add default via 10.0.2.2";
    net.guest.run("sh", &["-ec", script]).output();
    let listener = listener(&net);
    let (mut outside, mut inside, peer) = connected(&net, &listener, at(LOOPBACK, 8080));
    assert_eq!(peer, GATEWAY);
    assert_carries(&mut outside, &mut inside, b"hello");
    // Once it is up, the short cut works.
    net.guest.run("ip", &["link", "set", "lo", "up"]).output();
    let (.., peer) = connected(&net, &listener, at(LOOPBACK, 8080));
    assert_eq!(peer, GUEST);
}

#[test]
fn service_on_every_address_of_both_families_is_reached_by_ipv4() {
    let net = Net::up(&["-p", "8080:80"]);
    let listener = net.guest.listen(at(ANY6, 80)).unwrap();
    let (mut outside, mut inside, _) = connected(&net, &listener, at(LOOPBACK, 8080));
    assert_carries(&mut outside, &mut inside, b"hello");
}
