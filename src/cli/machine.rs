//! What this machine is and what it has left, as far as the system says it.

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
    let left = container("memory.max").map(|most| most.saturating_sub(container("memory.current").unwrap_or(0)));
    Some(left.map_or(free, |left| left.min(free)))
}

/// Memory that there could be at the most (Linux), bytes: the machine's with what it swaps to, or a container's limit.
pub(super) fn all_bytes() -> Option<u64> {
    let all = memory_bytes()? + kib("/proc/meminfo", "SwapTotal:").unwrap_or(0);
    Some(container("memory.max").map_or(all, |most| most.min(all)))
}

/// A number that a file of the container's control group holds; none where it has no such limit.
fn container(file: &str) -> Option<u64> {
    std::fs::read_to_string(format!("/sys/fs/cgroup/{file}")).ok()?.trim().parse().ok()
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
