//! The programs below `benches/` that tests run: the Python ones, and the load generator that they use.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;
use std::time::Duration;

use super::process::Running;

/// A build takes some seconds, or a minute where others build as well.
const LIMIT: Duration = Duration::from_secs(240);

/// The crate's folder.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A program below `benches/` that is written in Python.
pub(crate) fn bench(name: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new("python3");
    command
        .arg(root().join("benches").join(name))
        .args(arguments);
    command
}

/// The load generator, built as the program under test was: `cargo test --test report` alone does not
/// build examples.
pub(crate) static LOAD: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = Path::new(env!("CARGO_BIN_EXE_tapgate"))
        .parent()
        .expect("it lies in a folder");
    let name = folder
        .file_name()
        .and_then(|name| name.to_str())
        .expect("cargo's own name for a profile");
    let profile = if name == "debug" { "dev" } else { name };
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(root());
    command.args(["build", "--locked", "--offline", "--example", "load"]);
    command.args(["--profile", profile, "--target-dir"]);
    command.arg(folder.parent().expect("the target folder"));
    Running::start(&mut command).finish(LIMIT).output();
    folder.join("examples/load")
});
