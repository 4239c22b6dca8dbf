//! What is on a guest's link, captured inside and judged by tshark.
//!
//! tcpdump gives up the powers of root by becoming another user, and a guest's user namespace has
//! none; so the capture is a few lines of Python.

use std::time::{Duration, Instant};

use super::attached::Net;
use super::process::{Running, run};
use super::sockets::Sockets;
use super::{ANY, GATEWAY, SOON, at, wait_until};

/// Says in the capture that everything before it is there.
const LAST: &str = "nothing of interest comes after this";
/// How often that is said, in case it is lost.
const AGAIN: Duration = Duration::from_millis(100);

/// Writes every frame of `tap0`, both ways, to a file in the format of libpcap, up to the one that is
/// the last.
const CAPTURE: &str = "
import socket, struct, sys
link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
link.bind(('tap0', 3))
print('listening', flush=True)
frames = []
while not frames or sys.argv[2].encode() not in frames[-1]:
    frames.append(link.recv(1 << 17))
with open(sys.argv[1], 'wb') as file:
    file.write(struct.pack('=IHHiIII', 0xa1b2c3d4, 2, 4, 0, 0, 1 << 17, 1))
    for number, frame in enumerate(frames):
        file.write(struct.pack('=IIII', number, 0, len(frame), len(frame)) + frame)
";

/// A running capture of `tap0`.
pub(crate) struct Capture<'a> {
    net: &'a Net,
    python: Running,
    name: &'static str,
}

impl<'a> Capture<'a> {
    /// Begins; the interface must be up.
    pub(crate) fn start(net: &'a Net, name: &'static str) -> Self {
        let mut command = net.guest.command("/usr/bin/python3");
        let file = format!("/mnt/{name}");
        let mut python = Running::start(command.args(["-I", "-c", CAPTURE, &file, LAST]));
        python.wait_for_output("listening");
        Self { net, python, name }
    }

    /// Ends; everything that the guest's kernel has sent or taken by now is captured.
    pub(crate) fn stop(mut self) -> Packets<'a> {
        let last = self.net.guest.udp(at(ANY, 0)).expect("a free port");
        let mut next = Instant::now();
        wait_until("the end of the capture", SOON, || {
            if Instant::now() >= next {
                // Nobody listens there. The route may be gone for a moment.
                let _ = last.send_to(LAST.as_bytes(), at(GATEWAY, 9));
                next += AGAIN;
            }
            self.python.try_status()
        });
        self.python.finish(SOON).output();
        Packets {
            net: self.net,
            name: self.name,
        }
    }
}

/// A capture.
pub(crate) struct Packets<'a> {
    net: &'a Net,
    name: &'static str,
}

impl Packets<'_> {
    /// What tshark says of the packets that match `filter`: a line for each, with `fields` separated by
    /// bars. Every checksum is looked at.
    pub(crate) fn fields(&self, filter: &str, fields: &[&str]) -> Vec<String> {
        let mut command = self.net.world.command("tshark");
        command.args(["-n", "-r", &format!("/mnt/{}", self.name)]);
        for protocol in ["ip", "udp", "tcp"] {
            command.args(["-o", &format!("{protocol}.check_checksum:TRUE")]);
        }
        command.args(["-Y", filter, "-T", "fields", "-E", "separator=|"]);
        for field in fields {
            command.args(["-e", field]);
        }
        let output = run(&mut command).output();
        output.lines().map(str::to_owned).collect()
    }

    /// How many packets match.
    pub(crate) fn count(&self, filter: &str) -> usize {
        self.fields(filter, &["frame.number"]).len()
    }

    /// Asserts that tshark finds nothing wrong: nothing malformed, every checksum right.
    #[track_caller]
    pub(crate) fn assert_well_formed(&self) {
        /// `PI_ERROR` of tshark's expert information.
        const ERROR: &str = "_ws.expert.severity >= 8388608";
        /// Where Linux sums up a segment by itself it writes UDP's other zero, which tshark takes for a
        /// mistake (RFC 1624); that is the guest's kernel's business.
        const LINUX: &str =
            "tcp.checksum == 0xffff && (ip.src == 10.0.2.100 || ipv6.src == fd00::100)";
        let checksums = ["ip", "udp", "tcp", "icmp", "icmpv6"]
            .map(|protocol| format!("{protocol}.checksum.status == 0"));
        let wrong = format!("_ws.malformed || {ERROR} || {}", checksums.join(" || "));
        let wrong = format!("({wrong}) && !({LINUX})");
        let fields = ["frame.number", "_ws.col.Info", "_ws.expert.message"];
        let found = self.fields(&wrong, &fields);
        assert!(found.is_empty(), "{}", found.join("\n"));
    }
}
