//! The `/etc/resolv.conf` that a command inside sees: the gateway's resolver, the host's search list.
//!
//! Comes in: the text. Goes out: a layer over `/etc` in a mount namespace of its own. A mount over the
//! file alone would not do: it vanishes as soon as the host replaces the file by rename, as network
//! managers do, and there is none to cover where the file is missing or a dangling symlink. Nothing is
//! left on the host: the layer lives on a tmpfs that only this mount keeps.

use std::fs;
use std::net::IpAddr;
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::{SetupError, Step, scratch_directory};

const ETC: &str = "/etc";

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

/// Lets everybody in this mount namespace, which must be our own, see `text` as the resolver's
/// configuration.
///
/// # Errors
/// The step that failed.
pub fn cover(text: &str) -> Result<(), SetupError> {
    let none = None::<&str>;
    // What is mounted here must not reach the host; what the host mounts may come in.
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)
        .step(|| "making mounts private".into())?;
    let scratch = scratch_directory()?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(
        Some("tapgate"),
        scratch,
        Some("tmpfs"),
        flags,
        Some("size=1m,mode=755"),
    )
    .step(|| format!("mounting a tmpfs on {}", scratch.display()))?;
    let covered = cover_from(scratch, text);
    umount2(scratch, MntFlags::MNT_DETACH).step(|| format!("unmounting {}", scratch.display()))?;
    covered
}

fn cover_from(scratch: &Path, text: &str) -> Result<(), SetupError> {
    let upper = scratch.join("upper");
    let work = scratch.join("work");
    fs::create_dir(&upper)
        .and_then(|()| fs::create_dir(&work))
        .and_then(|()| fs::write(upper.join("resolv.conf"), text))
        .step(|| "writing resolv.conf".into())?;
    // A layer shows the directory below without what is mounted inside it.
    if !has_mounts_below() {
        let options = format!(
            "lowerdir={ETC},upperdir={},workdir={},userxattr",
            upper.display(),
            work.display()
        );
        let layer = mount(
            Some("tapgate"),
            ETC,
            Some("overlay"),
            MsFlags::empty(),
            Some(options.as_str()),
        );
        match layer {
            Ok(()) => return Ok(()),
            Err(error) => tracing::debug!(%error, "no overlay: the file itself is covered"),
        }
    }
    cover_file(&upper.join("resolv.conf"))
}

/// Something is mounted inside `/etc`, as container engines do with single files.
fn has_mounts_below() -> bool {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    // proc_pid_mountinfo(5): the fifth field is the mount point.
    mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .any(|point| point.starts_with("/etc/"))
}

/// Without overlays: a mount over the file at the end of all symlinks.
fn cover_file(file: &Path) -> Result<(), SetupError> {
    let none = None::<&str>;
    let Ok(target) = fs::canonicalize(Path::new(ETC).join("resolv.conf")) else {
        tracing::warn!("/etc/resolv.conf does not exist: names are not resolved by the gateway");
        return Ok(());
    };
    mount(Some(file), &target, none, MsFlags::MS_BIND, none)
        .step(|| format!("covering {}", target.display()))
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
