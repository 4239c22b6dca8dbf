//! Sockets that others find by their path: the API, and frames of a virtual machine.
//!
//! Comes in: a path. Goes out: a listening socket, for its owner only, that appears as soon as it works
//! and not before; an old socket is replaced. The broker removes it at the end.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen as listen_at, socket,
};

use super::{SetupError, Step};
use crate::sys::memory;

/// Clients that may wait to be accepted; who finds no room is refused by the kernel (connect(2),
/// `EAGAIN`). The kernel caps it at `somaxconn`.
const BACKLOG: i32 = 4096;

/// Listens at `path`; `option` is what named it.
///
/// # Errors
/// When the directory can't be written to, or something else than a socket is in the way.
pub fn listen(option: &str, path: &Path, kind: SockType) -> Result<OwnedFd, SetupError> {
    open(path, kind).step(|| format!("{option} {}", path.display()))
}

fn open(path: &Path, kind: SockType) -> io::Result<OwnedFd> {
    if fs::symlink_metadata(path).is_ok_and(|meta| !meta.file_type().is_socket()) {
        return Err(io::Error::new(
            ErrorKind::AlreadyExists,
            "something else than a socket is there: remove it, or name another path",
        ));
    }
    let parent = path.parent().filter(|dir| !dir.as_os_str().is_empty());
    let directory = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
        .open(parent.unwrap_or(Path::new(".")))?;
    // By the directory's descriptor, since an address holds only 107 bytes (unix(7)).
    let directory = format!("/proc/self/fd/{}", directory.as_raw_fd());
    // A name that nobody else has, also from another process namespace.
    let aside = format!("{directory}/.tapgate-{:x}.sock", memory::entropy()?[0]);
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, kind, flags, None)?;
    bind(socket.as_raw_fd(), &UnixAddr::new(Path::new(&aside))?)?;
    let shown = show(&socket, Path::new(&aside), path);
    if shown.is_err() {
        let _ = fs::remove_file(&aside);
    }
    shown.map(|()| socket)
}

/// Makes a bound socket work, then gives it its name.
fn show(socket: &OwnedFd, aside: &Path, path: &Path) -> io::Result<()> {
    fs::set_permissions(aside, fs::Permissions::from_mode(0o600))?;
    listen_at(socket, Backlog::new(BACKLOG)?)?;
    fs::rename(aside, path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_socket_is_for_its_owner_and_replaces_an_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        for _ in 0..2 {
            let _socket = listen("--api-socket", &path, SockType::Stream).unwrap();
            let mode = fs::metadata(&path).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
            UnixStream::connect(&path).unwrap();
        }
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count(),
            1,
            "nothing beside it"
        );
    }

    #[test]
    fn nothing_but_a_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        fs::write(&path, "text").unwrap();
        let error = listen("--api-socket", &path, SockType::Stream).unwrap_err();
        assert!(error.to_string().starts_with("--api-socket"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "text");
    }

    #[test]
    fn a_path_longer_than_an_address_works() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d".repeat(120));
        fs::create_dir(&path).unwrap();
        let path = path.join("api.sock");
        let _socket = listen("--api-socket", &path, SockType::Stream).unwrap();
        assert!(path.exists());
    }
}
