//! Rows 43, 44, 46 and 49 with the real program: how instances end, what they leave, and many at once.
//!
//! In: namespaces that vanish, signals to an instance under load, descriptors that are not what they should be. Out:
//! its exit status, and that the next one finds everything as the first did.

#![allow(
    clippy::disallowed_methods,
    reason = "the bans on clocks and threads are for the core; load comes from a thread"
)]

use std::fs;
use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::count;
use crate::support::attached::{Attached, pipe};
use crate::support::bulk::{self, Way};
use crate::support::guest::Guest;
use crate::support::process::run;
use crate::support::serve::{self, Server};
use crate::support::sockets::Sockets;
use crate::support::world::World;
use crate::support::{GATEWAY, LOOPBACK, SOON, at, timed, wait_until};

/// The guest has no tap any more.
fn wait_for_no_tap(guest: &Guest) {
    wait_until("the tap to be gone", SOON, || {
        let shown = guest.run("ip", &["link", "show", "tap0"]);
        (!shown.status.success()).then_some(())
    });
}

#[test]
fn row_43_namespace_vanishes() {
    let world = World::new();
    for round in 0..count(4, 100) {
        let guest = Guest::new(&world);
        let pid = guest.pid().to_string();
        let target = [pid.clone(), format!("/proc/{pid}/ns/net")];
        let tapgate = Attached::start(&world, &["-v", &target[round % 2], "tap0"]);
        drop(guest);
        let finished = tapgate.finish(SOON);
        assert_eq!(finished.code(), 0, "{finished:?}");
        assert!(
            finished.stderr.contains("gone"),
            "it says why: {finished:?}"
        );
    }
}

/// Connections of a guest's that carry as much as they can until their network ends.
struct Load {
    inside: TcpStream,
    writer: Option<thread::JoinHandle<()>>,
    _sink: Server,
}

impl Load {
    fn start(world: &World, guest: &Guest) -> Self {
        let sink = serve::tcp(world.listen(at(LOOPBACK, 0)).unwrap(), |mut stream| {
            let _ = std::io::copy(&mut stream, &mut std::io::sink());
        });
        let inside = guest.connect(at(GATEWAY, sink.port())).unwrap();
        let mut writing = inside.try_clone().unwrap();
        let (ready, carries) = std::sync::mpsc::sync_channel(1);
        let writer = thread::spawn(move || {
            let chunk = vec![7; 64 << 10];
            while writing.write_all(&chunk).is_ok() {
                let _ = ready.try_send(());
            }
        });
        carries.recv_timeout(SOON).unwrap();
        Self {
            inside,
            writer: Some(writer),
            _sink: sink,
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.inside.shutdown(Shutdown::Both);
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

#[test]
fn row_44_signals_under_load() {
    let world = World::new();
    let guest = Guest::new(&world);
    let pid = guest.pid().to_string();
    let arguments = ["--api-socket", "/mnt/api.sock", &pid, "tap0"];
    let socket = world.dir().join("api.sock");
    let mut longest = Duration::ZERO;
    for _ in 0..count(2, 100) {
        for signal in [
            Signal::SIGTERM,
            Signal::SIGINT,
            Signal::SIGHUP,
            Signal::SIGKILL,
        ] {
            // Whatever the one before has left is not in its way.
            let mut tapgate = Attached::start(&world, &arguments);
            let load = Load::start(&world, &guest);
            tapgate.signal(Signal::SIGPIPE);
            let another = guest.connect(at(GATEWAY, load.inside.peer_addr().unwrap().port()));
            assert!(another.is_ok(), "SIGPIPE ends nothing");
            assert_eq!(tapgate.try_status(), None);
            tapgate.signal(signal);
            let (took, finished) = timed(|| tapgate.finish(SOON));
            if signal == Signal::SIGKILL {
                assert_eq!(finished.code(), 128 + libc::SIGKILL);
            } else {
                longest = longest.max(took);
                assert_eq!(finished.code(), 0, "{signal}: {finished:?}");
                assert!(!socket.exists(), "{signal}: gone when the process is");
            }
            drop(load);
            wait_for_no_tap(&guest);
        }
    }
    println!("the longest end took {longest:?}");
}

#[test]
fn row_46_descriptors_that_are_wrong() {
    let world = World::new();
    let guest = Guest::new(&world);
    let pid = guest.pid().to_string();
    for _ in 0..count(1, 20) {
        let (read, write) = pipe();
        let read = Arc::new(read);
        let file: OwnedFd = fs::File::open("/etc/passwd").unwrap().into();
        let file = Arc::new(file);
        let number = |descriptor: &Arc<OwnedFd>| descriptor.as_raw_fd().to_string();
        for (option, value) in [
            ("--ready-fd", "987".to_owned()),
            ("--exit-fd", "987".to_owned()),
            ("--ready-fd", "-1".to_owned()),
            ("--exit-fd", "x".to_owned()),
            ("--ready-fd", number(&read)),
            ("--ready-fd", number(&file)),
        ] {
            let inherit = vec![Arc::clone(&read), Arc::clone(&write), Arc::clone(&file)];
            let mut command = world.tapgate_with(&["attach"], inherit);
            let refused = run(command.arg(format!("{option}={value}")).arg(&pid));
            assert!(
                matches!(refused.code(), 1 | 2),
                "{option} {value}: {refused:?}"
            );
            assert!(refused.stderr.contains(option), "{refused:?}");
        }
        let shown = guest.run("ip", &["link", "show", "tap0"]);
        assert!(!shown.status.success(), "no tap was made");
    }
}

#[test]
fn row_49_twenty_instances() {
    let world = World::new();
    let server = bulk::server(world.listen(at(LOOPBACK, 0)).unwrap());
    let nets: Vec<(Guest, Attached)> = (0..20)
        .map(|_| {
            let guest = Guest::new(&world);
            let pid = guest.pid().to_string();
            let tapgate = Attached::start(&world, &[&pid, "tap0"]);
            (guest, tapgate)
        })
        .collect();
    let bytes = u64::try_from(count(1 << 20, 64 << 20)).unwrap();
    thread::scope(|scope| {
        for (guest, _) in &nets {
            let to = at(GATEWAY, server.port());
            scope.spawn(move || {
                for way in [Way::Up, Way::Down] {
                    bulk::transfer(guest, to, way, (2, bytes));
                }
                guest.run("ping", &["-c1", "-W10", "10.0.2.2"]).output();
            });
        }
    });
    for (_, tapgate) in nets {
        tapgate.signal(Signal::SIGTERM);
        assert_eq!(tapgate.finish(SOON).code(), 0);
    }
}
