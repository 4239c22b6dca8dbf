//! The `/etc/resolv.conf` that a command inside sees: the gateway's resolver, the host's search list.
//!
//! Comes in: the text. Goes out: a mount over whatever the path leads to, in a mount namespace of
//! its own. No file is left on the host: the text lives on a tmpfs that only this mount keeps.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::{SetupError, Step};

const TARGET: &str = "/etc/resolv.conf";

/// Directories over which a tmpfs may lie for a moment; one of them is everywhere.
const SCRATCH: [&str; 4] = ["/tmp", "/run", "/mnt", "/var"];

/// The text of a `resolv.conf`.
#[must_use]
pub fn text(resolver: IpAddr, search: &[String]) -> String {
    let mut text = format!("# made by tapgate\nnameserver {resolver}\n");
    if !search.is_empty() {
        text.push_str("search ");
        text.push_str(&search.join(" "));
        text.push('\n');
    }
    text
}

/// Mounts `text` over the host's `/etc/resolv.conf`. Needs a mount namespace of our own.
///
/// # Errors
/// The step that failed.
pub fn cover(text: &str) -> Result<(), SetupError> {
    let none = None::<&str>;
    // What is mounted here must not reach the host; what the host mounts may come in.
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)
        .step(|| "making mounts private".into())?;
    let Some(target) = target() else {
        tracing::warn!(
            path = TARGET,
            "the file does not exist: names are not resolved by the gateway"
        );
        return Ok(());
    };
    let scratch = SCRATCH
        .into_iter()
        .find(|dir| Path::new(dir).is_dir() && !target.starts_with(dir));
    let scratch = scratch
        .ok_or(io::ErrorKind::NotFound)
        .step(|| "finding a directory for a moment".into())?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(
        Some("tapgate"),
        scratch,
        Some("tmpfs"),
        flags,
        Some("size=64k,mode=755"),
    )
    .step(|| format!("mounting a tmpfs on {scratch}"))?;
    let file = Path::new(scratch).join("resolv.conf");
    let covered = fs::write(&file, text)
        .and_then(|()| Ok(mount(Some(&file), &target, none, MsFlags::MS_BIND, none)?))
        .step(|| format!("covering {}", target.display()));
    umount2(scratch, MntFlags::MNT_DETACH).step(|| format!("unmounting {scratch}"))?;
    covered
}

/// The file at the end of all symlinks.
fn target() -> Option<PathBuf> {
    fs::canonicalize(TARGET).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_names_resolver_and_search_list() {
        let resolver = IpAddr::from([10, 0, 2, 3]);
        assert_eq!(
            text(resolver, &[]),
            "# made by tapgate\nnameserver 10.0.2.3\n"
        );
        let search = ["a.example".to_owned(), "b".to_owned()];
        assert!(text(resolver, &search).ends_with("search a.example b\n"));
    }
}
