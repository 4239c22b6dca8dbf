//! Who is who in a new user namespace (user_namespaces(7)).
//!
//! Comes in: the wish and the process that made the namespace. Goes out: its identity maps, written
//! from outside: by this process where one identity is enough, by newuidmap(1) and newgidmap(1)
//! where the system lends a range.

use std::fs;
use std::io;
use std::process::Command;

use nix::unistd::{Gid, Pid, Uid, User};

use super::{SetupError, Step};

/// How identities are mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Mapping {
    /// The caller is root inside, and there is nobody else.
    #[default]
    Root,
    /// The caller keeps its own identity.
    User,
    /// The caller is root inside, and the subordinate identities follow; like `root` where there
    /// are none.
    Auto,
}

/// A range of subordinate identities (subuid(5)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    first: u32,
    count: u32,
}

/// The first range of a user, by name or number.
fn subordinate(text: &str, user: &str, id: u32) -> Option<Range> {
    text.lines().find_map(|line| {
        let mut fields = line.trim().split(':');
        let owner = fields.next()?;
        if owner != user && owner.parse() != Ok(id) {
            return None;
        }
        let range = Range {
            first: fields.next()?.parse().ok()?,
            count: fields.next()?.parse().ok()?,
        };
        (range.count > 0).then_some(range)
    })
}

fn write(pid: Pid, file: &str, text: &str) -> Result<(), SetupError> {
    fs::write(format!("/proc/{pid}/{file}"), text).step(|| format!("writing {file}"))
}

/// Maps the identities of the user namespace that `child` made.
///
/// # Errors
/// The step that failed.
pub fn apply(mapping: Mapping, child: Pid) -> Result<(), SetupError> {
    let (uid, gid) = (Uid::effective(), Gid::effective());
    let (inside_uid, inside_gid) = match mapping {
        Mapping::Root => (0, 0),
        Mapping::User => (uid.as_raw(), gid.as_raw()),
        Mapping::Auto => match ranges(uid) {
            Some((uids, gids)) => {
                helper("newuidmap", child, uid.as_raw(), uids)?;
                return helper("newgidmap", child, gid.as_raw(), gids);
            }
            None => {
                tracing::info!(%uid, "no subordinate identities: only root is mapped");
                (0, 0)
            }
        },
    };
    // Without this an unprivileged process may not map groups (user_namespaces(7)).
    write(child, "setgroups", "deny")?;
    write(child, "uid_map", &format!("{inside_uid} {uid} 1"))?;
    write(child, "gid_map", &format!("{inside_gid} {gid} 1"))
}

fn ranges(uid: Uid) -> Option<(Range, Range)> {
    let name = User::from_uid(uid)
        .ok()
        .flatten()
        .map(|user| user.name)
        .unwrap_or_default();
    let find = |path: &str| subordinate(&fs::read_to_string(path).ok()?, &name, uid.as_raw());
    Some((find("/etc/subuid")?, find("/etc/subgid")?))
}

fn helper(program: &str, child: Pid, own: u32, range: Range) -> Result<(), SetupError> {
    let ids = [0, own, 1, 1, range.first, range.count].map(|id| id.to_string());
    let output = Command::new(program)
        .arg(child.to_string())
        .args(ids)
        .output()
        .step(|| format!("running {program} (install uidmap, or use --map root)"))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(io::Error::other(text)).step(|| format!("{program} refused"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_found_by_name_and_by_number() {
        let text = "other:1:2\nalice:100000:65536\n1002:200000:65536\n";
        assert_eq!(
            subordinate(text, "alice", 1001),
            Some(Range {
                first: 100_000,
                count: 65_536
            })
        );
        assert_eq!(
            subordinate(text, "bob", 1002),
            Some(Range {
                first: 200_000,
                count: 65_536
            })
        );
        assert_eq!(subordinate(text, "carol", 1003), None);
        assert_eq!(
            subordinate("alice:x:1\nalice:5:0\nnonsense", "alice", 1),
            None
        );
    }
}
