//! The install target: the links work, the drop-in names them, and all of it goes away again.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn make(goal: &str, destination: &Path) -> Output {
    let packaging = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging");
    let variable = |name: &str, value: &Path| format!("{name}={}", value.display());
    let output = Command::new("make")
        .arg("-C")
        .arg(packaging)
        .arg(goal)
        .arg(variable("DESTDIR", destination))
        .arg(variable("BINARY", Path::new(env!("CARGO_BIN_EXE_tapgate"))))
        .arg("LINKS=all")
        .output()
        .expect("make is there");
    assert!(output.status.success(), "{output:?}");
    output
}

/// Every file and link below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    entries
        .flatten()
        .flat_map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => files(&entry.path()),
            _ => vec![entry.path()],
        })
        .collect()
}

#[test]
fn installed_links_speak_slirp4netns_and_go_away_again() {
    let destination = tempfile::tempdir().unwrap();
    let root = destination.path();
    fs::create_dir_all(root.join("etc/apparmor.d")).unwrap();
    // Twice: an update finds the links in place.
    make("install", root);
    make("install", root);
    for link in [
        "usr/local/libexec/tapgate/slirp4netns",
        "usr/local/bin/slirp4netns",
    ] {
        let said = Command::new(root.join(link))
            .arg("--version")
            .output()
            .unwrap();
        let said = String::from_utf8(said.stdout).unwrap();
        assert!(
            said.starts_with("slirp4netns version 1.3.2\n"),
            "{link}: {said}"
        );
    }
    let drop_in = root.join("etc/containers/containers.conf.d/50-tapgate.conf");
    let drop_in = fs::read_to_string(drop_in).unwrap();
    let path = "network_cmd_path = \"/usr/local/libexec/tapgate/slirp4netns\"";
    assert!(drop_in.contains(path), "{drop_in}");
    let profile = fs::read_to_string(root.join("etc/apparmor.d/tapgate")).unwrap();
    assert!(
        profile.contains("profile tapgate /usr/local/bin/tapgate "),
        "{profile}"
    );
    make("uninstall", root);
    assert_eq!(files(root), Vec::<PathBuf>::new());
}
