//! The memory that this process may have, as the system limits it: control groups of either version
//! (cgroups(7)), and the limits on address space (getrlimit(2)).
//!
//! Read once, before `/proc` and `/sys` are out of reach. Comes in: nothing. Goes out: a [`Memory`]. Where a file can't be
//! read, or says nothing that is understood, there is no limit by it.

use std::fs;

use crate::config::Memory;
use crate::sys::memory::address_space_left;

/// Where the groups of version 2 are, and those of version 1's memory controller, and the file that has the
/// limit.
const VERSION_2: [&str; 2] = ["/sys/fs/cgroup", "memory.max"];
const VERSION_1: [&str; 2] = ["/sys/fs/cgroup/memory", "memory.limit_in_bytes"];
/// Version 1 says a number near 2^63 where there is no limit.
const NO_LIMIT: u64 = 1 << 60;

/// What this process may have now.
#[must_use]
pub fn read() -> Memory {
    let text = |path: &str| fs::read_to_string(path).ok();
    Memory {
        resident: text("/proc/self/cgroup").and_then(|groups| group_limit(&groups, text)),
        address_space: address_space_left(),
    }
}

/// The least limit of the groups that a process is in, and of those above them; `groups` is its
/// `/proc/PID/cgroup`, `read` gives a file's text.
fn group_limit(groups: &str, read: impl Fn(&str) -> Option<String>) -> Option<u64> {
    let mut least: Option<u64> = None;
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':');
        let (number, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        let [root, file] = if controllers.split(',').any(|name| name == "memory") {
            VERSION_1
        } else if number == "0" && controllers.is_empty() {
            VERSION_2
        } else {
            continue;
        };
        // Within a container only its own group may be there, at the root.
        let above = path.match_indices('/').map(|(end, _)| &path[..end]);
        for group in above.chain([path.trim_end_matches('/')]) {
            let limit = read(&format!("{root}{group}/{file}"));
            let limit = limit.and_then(|text| text.trim().parse().ok());
            least = limit
                .filter(|limit| *limit < NO_LIMIT)
                .into_iter()
                .chain(least)
                .min();
        }
    }
    least
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(groups: &str, files: &[(&str, &str)]) -> Option<u64> {
        group_limit(groups, |path| {
            let found = files.iter().find(|(name, _)| *name == path);
            found.map(|(_, text)| (*text).to_owned())
        })
    }

    #[test]
    fn the_least_of_all_groups_counts() {
        let files = [
            ("/sys/fs/cgroup/a.slice/memory.max", "67108864\n"),
            ("/sys/fs/cgroup/a.slice/b.scope/memory.max", "max\n"),
        ];
        assert_eq!(limit("0::/a.slice/b.scope\n", &files), Some(64 << 20));
        assert_eq!(limit("0::/\n", &files), None);
        let inside = [("/sys/fs/cgroup/memory.max", "1048576\n")];
        assert_eq!(limit("0::/../gone\n", &inside), Some(1 << 20));
    }

    #[test]
    fn the_first_version_has_its_own_place_and_number() {
        let groups = "5:cpu,memory:/x/y\n1:name=systemd:/z\n0::/\n";
        let at = |text| [("/sys/fs/cgroup/memory/x/memory.limit_in_bytes", text)];
        assert_eq!(limit(groups, &at("33554432\n")), Some(32 << 20));
        assert_eq!(limit(groups, &at("9223372036854771712\n")), None);
        assert_eq!(limit("nonsense", &at("33554432\n")), None);
    }
}
