//! buildah: `RUN` has a network, by the `slirp4netns` that is first in PATH.

use std::io::Write;

use crate::host::Host;
use crate::support::process::{Running, run};
use crate::support::serve::accept;
use crate::support::sockets::Sockets;
use crate::support::{LOOPBACK, SOON, at};
use crate::witness::testimony;

/// Builds the image `built` with `command`; a `RUN` in it fetches a page from the host's loopback to
/// `/page`.
pub(crate) fn assert_build(host: &Host, command: &[&str]) {
    let listener = host.listen(at(LOOPBACK, 0)).expect("a free port");
    let port = listener.local_addr().expect("it is bound").port();
    host.administer(&format!(
        "mkdir /tmp/context
         printf '%s\\n' 'FROM box' 'RUN wget -qO /page http://10.0.2.2:{port}/in-a-build' \
         >/tmp/context/Containerfile"
    ));
    let (program, arguments) = command.split_first().expect("a program");
    let mut build = host.command(program);
    build
        .args(arguments)
        .args(["--tag", "built", "/tmp/context"]);
    let build = Running::start(&mut build);
    let (mut stream, client) = accept(&listener);
    assert_eq!(host.networks().len(), 1, "one of ours runs");
    let body = testimony("host", client.ip(), "in-a-build");
    let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
    let sent = stream.write_all(format!("{head}{body}").as_bytes());
    sent.expect("the build waits for it");
    drop(stream);
    build.finish(SOON).output();
}

#[test]
fn build_and_run_have_a_network() {
    let host = Host::new(&["buildah", "crun"]);
    let base = "buildah from --name base scratch
                buildah add base /run/image.tar /
                buildah commit base box";
    host.run(&["sh", "-ec", base]).output();
    assert_build(&host, &["buildah", "build"]);
    host.run(&["buildah", "from", "--name", "work", "built"])
        .output();
    let page = host
        .run(&["buildah", "run", "work", "cat", "/page"])
        .output();
    assert_eq!(page, testimony("host", LOOPBACK, "in-a-build"));

    let web = crate::witness::page(&host, at(LOOPBACK, 0));
    let url = format!("http://10.0.2.2:{}/in-a-run", web.port());
    let page = run(host
        .command("buildah")
        .args(["run", "work", "wget", "-qO-", &url]));
    assert_eq!(page.output(), testimony("host", LOOPBACK, "in-a-run"));
    drop(web);
    host.assert_nothing_left();
}
