//! The real engines: Debian's podman, buildah and rootlesskit, each with the program under test in
//! the place of slirp4netns, and what the applications at both ends of a connection saw.
//!
//! Each test has a [`host::Host`] to itself, made of namespaces, in which an unprivileged user runs
//! the engines on an own network, own storage and own processes. When it goes, everything goes.
//!
//! `TAPGATE_ENGINES_SLIRP4NETNS=/usr/bin/slirp4netns` puts another program to the same test.

#![allow(
    clippy::disallowed_methods,
    reason = "the bans on clocks and threads are for the core; tests measure time and serve from threads"
)]

mod buildah;
mod host;
mod podman;
mod podman_ipv6;
mod podman_options;
mod podman_ports;
mod rootlesskit;
#[path = "../support/mod.rs"]
mod support;
mod witness;
