//! What this machine is and what it has left, as far as the system says it.

use std::path::{Path, PathBuf};

/// The CPU as the system names it.
pub(super) fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|l| l.strip_prefix("model name")?.split_once(": ").map(|(_, n)| n.to_owned()));
    name.unwrap_or_else(|| "unknown".into())
}

/// Memory of the machine (Linux), bytes.
pub(super) fn memory_bytes() -> Option<u64> {
    kib("/proc/meminfo", "MemTotal:")
}

/// Memory that is free or would be given (Linux), bytes; of a container, what its limit leaves of it.
pub(super) fn available_bytes() -> Option<u64> {
    let free = kib("/proc/meminfo", "MemAvailable:")?;
    Some(limits().into_iter().map(|limit| limit.left).fold(free, u64::min))
}

/// Memory that there could be at the most (Linux), bytes: the machine's with what it swaps to, or a container's limit.
pub(super) fn all_bytes() -> Option<u64> {
    let all = memory_bytes()? + kib("/proc/meminfo", "SwapTotal:").unwrap_or(0);
    Some(limits().into_iter().map(|limit| limit.all).fold(all, u64::min))
}

/// What a control group may hold, and what of that it does not hold yet, or would give up.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Limit {
    group: PathBuf,
    all: u64,
    left: u64,
}

/// The control group whose limit is below the machine's memory, and the lowest.
#[cfg(feature = "parallel")]
pub(super) fn limiting_group() -> Option<PathBuf> {
    let machine = memory_bytes()?;
    limits().into_iter().filter(|limit| limit.all < machine).min_by_key(|limit| limit.all).map(|limit| limit.group)
}

/// The limits of the control groups that this process is in.
fn limits() -> Vec<Limit> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    limits_of(&groups, Path::new("/sys/fs/cgroup"))
}

/// The limits of the groups that a process's `groups` names (its /proc/self/cgroup), and of those around them, below `mount`: of both
/// versions of control groups. In a container a group may be named as the machine has it, and stand at the top.
fn limits_of(groups: &str, mount: &Path) -> Vec<Limit> {
    let mut limits = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let (top, most, used, given_up) = match controllers {
            "" => (mount.to_owned(), "memory.max", "memory.current", "inactive_file"),
            one if one.split(',').any(|c| c == "memory") => {
                (mount.join("memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            }
            _ => continue,
        };
        let mut group = top.join(path.trim_start_matches('/'));
        if !group.is_dir() {
            group.clone_from(&top);
        }
        let number = |group: &Path, file: &str| std::fs::read_to_string(group.join(file)).ok()?.trim().parse().ok();
        for group in group.ancestors().take_while(|group| group.starts_with(&top)) {
            let Some(all): Option<u64> = number(group, most) else { continue };
            let stat = std::fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
            let given_up = stat.lines().find_map(|l| l.strip_prefix(given_up)?.trim().parse().ok()).unwrap_or(0);
            let held = number(group, used).unwrap_or(0u64).saturating_sub(given_up);
            limits.push(Limit { group: group.to_owned(), all, left: all.saturating_sub(held) });
        }
    }
    limits
}

/// Most memory that this process has held (Linux), bytes.
pub(super) fn peak_memory() -> Option<u64> {
    kib("/proc/self/status", "VmHWM:")
}

/// What the line of that name in a file of the system says, in bytes.
fn kib(file: &str, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(name))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// Instruction sets that the CPU has, of those that matter here.
pub(super) fn features() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! present {
            ($($name:tt)*) => {[$(($name, std::arch::is_x86_feature_detected!($name))),*]};
        }
        let all = present!["sse4.2" "avx" "f16c" "fma" "avx2" "avxvnni" "avx512f" "avx512bw" "avx512dq" "avx512vl"
            "avx512vnni" "avx512bf16" "avx512vbmi"];
        all.into_iter().filter(|f| f.1).map(|f| f.0).collect()
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with these files.
    fn groups(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let file = folder.path().join(name);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, text).unwrap();
        }
        folder
    }

    #[test]
    fn the_limits_of_a_group_and_of_those_around_it_count() {
        let folder = groups(&[
            ("a/memory.max", "1000\n"),
            ("a/memory.current", "900\n"),
            ("a/memory.stat", "anon 500\ninactive_file 400\nactive_file 0\n"),
            ("a/b/memory.max", "max\n"),
            ("a/b/c/memory.max", "2000\n"),
            ("a/b/c/memory.current", "100\n"),
            ("other/memory.max", "1\n"),
        ]);
        let limit = |group: &str, all, left| Limit { group: folder.path().join(group), all, left };
        let found = limits_of("0::/a/b/c\n", folder.path());
        assert_eq!(found, [limit("a/b/c", 2000, 1900), limit("a", 1000, 500)]);
    }

    #[test]
    fn the_first_version_and_a_container_that_stands_at_the_top_are_known() {
        let folder = groups(&[
            ("memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("memory/own/memory.limit_in_bytes", "300\n"),
            ("memory/own/memory.usage_in_bytes", "100\n"),
            ("memory/own/memory.stat", "inactive_file 10\ntotal_inactive_file 20\n"),
        ]);
        let lines = "5:cpu,cpuacct:/own\n4:memory:/own\n0::/\n";
        let found = limits_of(lines, folder.path());
        assert_eq!(found[0], Limit { group: folder.path().join("memory/own"), all: 300, left: 220 });
        assert_eq!(found.len(), 2, "the top's, which is none");
        let folder = groups(&[("memory.max", "700\n"), ("memory.current", "600\n")]);
        let found = limits_of("0::/machine/says/this\n", folder.path());
        assert_eq!(found, [Limit { group: folder.path().to_owned(), all: 700, left: 100 }]);
        assert_eq!(limits_of("nonsense\n", folder.path()), []);
    }
}
