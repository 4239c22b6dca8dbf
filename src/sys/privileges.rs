//! What this process may do, given up for good (capabilities(7), credentials(7)).
//!
//! Comes in: what is to be kept. Goes out: nothing; what was given up does not come back.

use std::io;

use nix::sys::prctl;
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities,
};

/// The user and group that own nothing.
const NOBODY: u32 = 65_534;

/// Whether this process holds a capability over its own user namespace.
fn holds(capability: CapabilitySet) -> bool {
    capabilities(None).is_ok_and(|sets| sets.effective.contains(capability))
}

/// May listen on privileged ports, where the network belongs to our user namespace.
#[must_use]
pub fn holds_low_ports() -> bool {
    holds(CapabilitySet::NET_BIND_SERVICE)
}

/// May mount, in a mount namespace of its own.
#[must_use]
pub fn holds_mounts() -> bool {
    holds(CapabilitySet::SYS_ADMIN)
}

/// Gives up every capability but those over files, where they are held.
///
/// # Errors
/// What capset(2) reports.
pub fn keep_files() -> io::Result<()> {
    let files = CapabilitySet::DAC_OVERRIDE | CapabilitySet::DAC_READ_SEARCH;
    keep(files & capabilities(None)?.permitted)
}

/// Gives up every capability but that for privileged ports, where it is held.
///
/// # Errors
/// What capset(2) reports.
pub fn keep_low_ports() -> io::Result<()> {
    keep(CapabilitySet::NET_BIND_SERVICE & capabilities(None)?.permitted)
}

/// Gives up every capability.
///
/// # Errors
/// What capset(2) reports.
pub fn keep_nothing() -> io::Result<()> {
    keep(CapabilitySet::empty())
}

fn keep(kept: CapabilitySet) -> io::Result<()> {
    // Without CAP_SETPCAP the bounding set stays; it only limits what exec could give, and nothing
    // is executed any more.
    for capability in CapabilitySet::all().difference(kept).iter() {
        let _ = remove_capability_from_bounding_set(capability);
    }
    let _ = clear_ambient_capability_set();
    let sets = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    Ok(set_capabilities(None, sets)?)
}

/// Root of the system, not just called so in a user namespace (user_namespaces(7)).
#[must_use]
pub fn is_real_root() -> bool {
    let maps = std::fs::read_to_string("/proc/self/uid_map");
    // Who can't be told is taken for the worse.
    let outside = maps.map_or(Some("0".to_owned()), |maps| {
        maps.lines().find_map(|line| {
            let mut words = line.split_ascii_whitespace();
            (words.next() == Some("0")).then(|| words.next().unwrap_or("0").to_owned())
        })
    });
    Uid::effective().is_root() && outside.as_deref() == Some("0")
}

/// Becomes nobody, but holds on to capabilities until [`keep_low_ports`], and to its own entry in
/// `/proc`, which a change of user gives to root.
///
/// # Errors
/// What setresuid(2) reports.
pub fn become_nobody() -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
    prctl::set_keepcaps(true)?;
    setgroups(&[])?;
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)?;
    prctl::set_keepcaps(false)?;
    prctl::set_dumpable(true)?;
    let mut sets = capabilities(None)?;
    sets.effective = sets.permitted;
    Ok(set_capabilities(None, sets)?)
}
