//! Who the tests are: always an unprivileged user, also when the test program runs as root (as CI
//! does). Then every child first becomes the user `tapgate-test`, or 61234 where there is none.

use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::unistd::{Gid, Uid, User, getegid, geteuid};

use super::sys::Plan;

/// The user where root has no `tapgate-test` to become: nobody's number on any distribution.
const FALLBACK_ID: u32 = 61234;

/// Where every distribution that the tests know keeps its programs; the caller's own PATH may lead
/// to places that the test user can't read.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The user and group of everything that the harness starts.
pub(crate) fn ids() -> (Uid, Gid) {
    if !geteuid().is_root() {
        return (geteuid(), getegid());
    }
    match User::from_name("tapgate-test") {
        Ok(Some(user)) => (user.uid, user.gid),
        Ok(None) | Err(_) => (Uid::from_raw(FALLBACK_ID), Gid::from_raw(FALLBACK_ID)),
    }
}

/// The first part of every [`Plan`].
pub(crate) fn plan() -> Plan {
    Plan {
        become_user: geteuid().is_root().then(ids),
        ..Plan::default()
    }
}

/// Whether the test user has subordinate ids (`--map auto` needs them, and `newuidmap`).
pub(crate) fn has_subordinate_ids() -> bool {
    let uid = ids().0;
    let name = User::from_uid(uid).ok().flatten().map(|user| user.name);
    let lists_user = |file: &str| {
        let text = fs::read_to_string(file).unwrap_or_default();
        text.lines()
            .filter_map(|line| line.split(':').next())
            .any(|owner| owner == uid.to_string() || name.as_deref() == Some(owner))
    };
    lists_user("/etc/subuid") && lists_user("/etc/subgid")
}

/// Whether a program is there for the test user.
pub(crate) fn has_program(name: &str) -> bool {
    PATH.split(':')
        .any(|folder| Path::new(folder).join(name).exists())
}

/// `command` with an environment in which HOME, locale and shell of the caller don't matter.
pub(crate) fn plain_environment(command: &mut Command) {
    command
        .env_clear()
        .env("PATH", PATH)
        .env("HOME", "/")
        .env("LC_ALL", "C")
        .env("TERM", "dumb")
        .env("SHELL", "/bin/sh");
    for name in ["RUST_BACKTRACE", "RUST_LOG", "LLVM_PROFILE_FILE"] {
        if let Some(value) = env::var_os(name) {
            command.env(name, value);
        }
    }
}

/// Puts the program under test into `folder`, where the test user can read it (the target folder may
/// lie below root's home).
pub(crate) fn stage_binary(folder: &Path) -> PathBuf {
    let built = Path::new(env!("CARGO_BIN_EXE_tapgate"));
    let staged = folder.join("tapgate");
    let for_everyone = fs::metadata(built)
        .expect("cargo builds the program before its tests")
        .permissions()
        .mode()
        & 0o005
        == 0o005;
    if !for_everyone || fs::hard_link(built, &staged).is_err() {
        fs::copy(built, &staged).expect("there is room for a copy of the program");
        fs::set_permissions(&staged, fs::Permissions::from_mode(0o755)).expect("the copy is ours");
    }
    staged
}
