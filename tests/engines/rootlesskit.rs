//! rootlesskit: a network for one program, with published ports by either driver, sandboxed or not.

use crate::host::Host;
use crate::support::process::{Running, run};
use crate::support::sockets::Sockets;
use crate::support::{GATEWAY, LOOPBACK, SOON, WORLD_A, WORLD_C, at, wait_until};
use crate::witness::{answerer, assert_answer, assert_closed, assert_page, page, testimony};

const SLIRP: &str = "--slirp4netns-binary=/mnt/bin/slirp4netns";
const SERVE: &str = "/run/image/bin/serve";

/// A host with rootlesskit.
struct Kit {
    host: Host,
}

impl Kit {
    fn new() -> Self {
        Self {
            host: Host::new(&["rootlesskit"]),
        }
    }

    /// Starts `rootlesskit --net=slirp4netns ... OPTIONS COMMAND`; what it serves is called `name`.
    /// [`SERVE`] is two processes, which end together in a process namespace of their own.
    fn start(&self, name: &str, options: &[&str], command: &[&str]) -> Running {
        let mut kit = self.host.command("rootlesskit");
        kit.args(["--net=slirp4netns", SLIRP]).args(options);
        if command == [SERVE] {
            kit.arg("--pidns");
        }
        kit.args(command).env("NAME", name);
        Running::start(&mut kit)
    }

    /// Ends every rootlesskit of this host with `signal`; nothing of them may stay.
    fn end_all(&self, signal: &str) {
        for process in self.host.processes() {
            if process.command.starts_with("rootlesskit ") {
                self.host
                    .administer(&format!("kill -{signal} {}", process.pid));
            }
        }
        self.host.assert_nothing_left();
    }

    /// `rootlessctl` for the one that was started with `--state-dir=/tmp/state`.
    fn control(&self, arguments: &[&str]) -> String {
        let mut control = self.host.command("rootlessctl");
        run(control.arg("--socket=/tmp/state/api.sock").args(arguments)).output()
    }
}

#[test]
fn page_is_served_in_a_sandbox() {
    let kit = Kit::new();
    let options = [
        "--slirp4netns-sandbox=auto",
        "--slirp4netns-seccomp=auto",
        "--port-driver=slirp4netns",
        "-p",
        "127.0.0.1:8080:80/tcp",
    ];
    let server = [
        "busybox",
        "httpd",
        "-f",
        "-p",
        "0.0.0.0:80",
        "-h",
        "/run/image/www",
    ];
    let _running = kit.start("kit", &options, &server);
    assert_page(&kit.host, LOOPBACK, at(LOOPBACK, 8080), "kit", GATEWAY);
    assert_closed(&kit.host, at(WORLD_A, 8080));
    kit.end_all("TERM");
}

#[test]
fn each_port_driver_and_sandbox_mode_serves() {
    let kit = Kit::new();
    let drivers = ["slirp4netns", "builtin"];
    let modes = ["auto", "true", "false"];
    let mut cases = Vec::new();
    for driver in drivers {
        for sandbox in modes {
            cases.extend(modes.map(|seccomp| (driver, sandbox, seccomp)));
        }
    }
    let mut running = Vec::new();
    for ((driver, sandbox, seccomp), port) in cases.iter().zip(8000..) {
        let name = format!("{driver}-{sandbox}-{seccomp}");
        let options = [
            format!("--slirp4netns-sandbox={sandbox}"),
            format!("--slirp4netns-seccomp={seccomp}"),
            format!("--port-driver={driver}"),
            "--disable-host-loopback".to_owned(),
            "-p".to_owned(),
            format!("0.0.0.0:{port}:80/tcp"),
            "-p".to_owned(),
            format!("192.0.2.1:{port}:5000/udp"),
        ];
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        running.push(kit.start(&name, &options, &[SERVE]));
    }
    for ((driver, sandbox, seccomp), port) in cases.iter().zip(8000..) {
        let name = format!("{driver}-{sandbox}-{seccomp}");
        let seen = if *driver == "builtin" {
            LOOPBACK
        } else {
            WORLD_C
        };
        assert_page(&kit.host, WORLD_C, at(WORLD_A, port), &name, seen);
        assert_answer(&kit.host, WORLD_C, at(WORLD_A, port), &name, seen);
    }
    assert_eq!(kit.host.networks().len(), cases.len());
    drop(running);
    kit.end_all("TERM");
}

#[test]
fn sandbox_hides_the_files_and_seccomp_is_on() {
    let kit = Kit::new();
    let options = ["--slirp4netns-sandbox=true", "--slirp4netns-seccomp=true"];
    let mut running = kit.start("kit", &options, &["sh", "-c", "echo up; exec sleep 1000"]);
    running.wait_for_output("up");
    // Whoever waits for a network need not wait until it is safe.
    let readers = wait_until("a process that reads packets", SOON, || {
        let readers = kit.host.packet_readers();
        (kit.host.networks().len() == 1 && !readers.is_empty()).then_some(readers)
    });
    for pid in readers {
        wait_until("a root without the user's files", SOON, || {
            let look = format!("cd /proc/{pid}/root && test ! -e home/user && echo hidden || true");
            (kit.host.administer(&look) == "hidden\n").then_some(())
        });
        wait_until("a filter of system calls", SOON, || {
            let look = format!("grep Seccomp: /proc/{pid}/status");
            (kit.host.administer(&look) == "Seccomp:\t2\n").then_some(())
        });
    }
    kit.end_all("TERM");
}

#[test]
fn ports_come_and_go_while_it_runs() {
    let kit = Kit::new();
    let options = ["--state-dir=/tmp/state", "--port-driver=slirp4netns"];
    let _running = kit.start("kit", &options, &[SERVE]);
    wait_until("the control socket", SOON, || {
        let look = kit.host.administer("ls /tmp/state 2>/dev/null || true");
        look.contains("api.sock").then_some(())
    });
    let added = kit.control(&[
        "add-ports",
        "0.0.0.0:8080:80/tcp",
        "192.0.2.1:5300:5000/udp",
    ]);
    assert_eq!(added, "1\n2\n");
    assert_page(&kit.host, WORLD_C, at(WORLD_A, 8080), "kit", WORLD_C);
    assert_answer(&kit.host, WORLD_C, at(WORLD_A, 5300), "kit", WORLD_C);
    kit.control(&["remove-ports", "1"]);
    assert_closed(&kit.host, at(WORLD_A, 8080));
    assert_answer(&kit.host, WORLD_C, at(WORLD_A, 5300), "kit", WORLD_C);
    let listed = kit.control(&["list-ports", "--json"]);
    assert!(
        listed.contains("5300") && !listed.contains("8080"),
        "{listed}"
    );
    kit.control(&["add-ports", "0.0.0.0:8080:80/tcp"]);
    assert_page(&kit.host, WORLD_C, at(WORLD_A, 8080), "kit", WORLD_C);
    kit.end_all("TERM");
}

#[test]
fn network_is_the_one_that_was_asked_for() {
    let kit = Kit::new();
    let web = page(&kit.host, at(WORLD_A, 0));
    let echo = answerer(&kit.host, at(WORLD_A, 0));
    let closed = kit.host.listen(at(LOOPBACK, 0)).unwrap();
    let script = format!(
        "cat /sys/class/net/tap0/mtu; ip -4 address show tap0 | grep -o 'inet [^ ]*'
         busybox wget -qO- http://{}/kit; /run/image/bin/ask UDP4:{} kit
         busybox wget -T5 -qO- http://10.77.0.2:{}/ || echo closed",
        web.addr,
        echo.addr,
        closed.local_addr().unwrap().port()
    );
    let options = [
        "--mtu=1400",
        "--cidr=10.77.0.0/24",
        "--disable-host-loopback",
    ];
    let got = kit
        .start("kit", &options, &["sh", "-c", &script])
        .finish(SOON)
        .output();
    let served = testimony("host", WORLD_A, "kit").repeat(2);
    assert_eq!(got, format!("1400\ninet 10.77.0.100/24\n{served}closed\n"));
    drop((web, echo, closed));
    kit.host.assert_nothing_left();
}

#[test]
fn network_dies_with_a_killed_parent() {
    let kit = Kit::new();
    let options = ["--port-driver=slirp4netns", "-p", "0.0.0.0:8080:80/tcp"];
    let _running = kit.start("kit", &options, &[SERVE]);
    assert_page(&kit.host, WORLD_C, at(WORLD_A, 8080), "kit", WORLD_C);
    for process in kit.host.processes() {
        if process.command.starts_with("rootlesskit ") {
            kit.host.administer(&format!("kill -KILL {}", process.pid));
        }
    }
    wait_until("the network to end", SOON, || {
        kit.host.networks().is_empty().then_some(())
    });
    assert_closed(&kit.host, at(WORLD_A, 8080));
}
