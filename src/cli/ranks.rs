//! The processes that `mpirun` or `srun` began for one work.

use std::sync::Arc;

use anyhow::Result;

use super::shards::launched;
use crate::ranks::{Link, ROOT};

/// All of them, where there are others than this one.
#[cfg(not(feature = "cluster"))]
pub(super) fn here() -> Result<Option<Arc<dyn Link>>> {
    let Some(shard) = launched() else { return Ok(None) };
    anyhow::bail!(
        "this is process {} of {} that were begun together, and this build of recoup has no MPI: build it with \
         --features cluster, or begin one process",
        shard.index,
        shard.of
    )
}

/// All of them, where there are others than this one. MPI is touched only then.
#[cfg(feature = "cluster")]
pub(super) fn here() -> Result<Option<Arc<dyn Link>>> {
    let Some(shard) = launched() else { return Ok(None) };
    let link = crate::ranks::mpi::Mpi::begin().map_err(anyhow::Error::msg)?;
    if (link.rank(), link.size()) != (shard.index, shard.of) {
        anyhow::bail!(
            "process {} of {} by the environment is {} of {} for MPI: they were not begun by the MPI that recoup was built with (with \
             Slurm: srun --mpi=pmix or pmi2, as that MPI has it; srun --mpi=list)",
            shard.index,
            shard.of,
            link.rank(),
            link.size()
        );
    }
    Ok(Some(Arc::new(link)))
}

/// What is done by one process only; `why` says so.
pub(super) fn alone(what: &str, why: &str) -> Result<()> {
    match launched() {
        None => Ok(()),
        Some(shard) => anyhow::bail!("{what} is begun as one process, and {} were begun together: {why}", shard.of),
    }
}

/// What a process has of its machine.
pub(super) struct Share {
    pub threads: usize,
    /// Processes on this machine; known to the root.
    pub here: usize,
}

/// What this process has of its machine, where `asked` threads were wanted: those that may run on the same cores share them, and the
/// root says so.
///
/// # Errors
/// At the root, when the others were begun by another command.
pub(super) fn share(link: &dyn Link, asked: usize) -> Result<Share> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    // Which cores these are, where the system says it.
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let allowed = status.lines().find_map(|l| l.strip_prefix("Cpus_allowed_list:")).unwrap_or_default().trim();
    let words: Vec<_> = std::env::args_os().collect();
    let mine = (link.host(), allowed.to_owned(), format!("{:?}", &words[1..]));
    let all: Vec<(String, String, String)> = link
        .gather(&serde_json::to_vec(&mine).unwrap_or_default())
        .iter()
        .map(|told| serde_json::from_slice(told).unwrap_or_default())
        .collect();
    let mut beside: Vec<u8> = all
        .iter()
        .flat_map(|own| (all.iter().filter(|o| (&o.0, &o.1) == (&own.0, &own.1)).count() as u64).to_le_bytes())
        .collect();
    link.broadcast(&mut beside);
    let beside = beside.as_chunks::<8>().0.get(link.rank()).map_or(1, |b| u64::from_le_bytes(*b) as usize);
    let threads = if asked > 0 { asked } else { (cores / beside.max(1)).max(1) };
    if link.rank() == ROOT {
        if let Some((rank, (host, _, words))) = all.iter().enumerate().find(|(_, other)| other.2 != mine.2) {
            anyhow::bail!(
                "processes that are begun together do one work, and process {rank} ({host}) was begun with other arguments: {words}"
            );
        }
        let machines = all.iter().map(|own| &own.0).collect::<std::collections::BTreeSet<_>>().len();
        super::say!(
            "{} processes on {}, {threads} thread{} here",
            link.size(),
            if machines == 1 { "one machine".to_owned() } else { format!("{machines} machines") },
            if threads == 1 { "" } else { "s" }
        );
    }
    let here = all.iter().filter(|own| own.0 == mine.0).count().max(1);
    Ok(Share { threads, here })
}
