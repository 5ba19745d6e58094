//! Which part of a work a process does: as it is told, or as its cluster numbers it; and which folders hold all parts.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail};
use recoup_eval::run::RESPONSES;
use recoup_ground::shares::Shard;
use serde_json::Value;

use super::options::kv_name;
use super::place::{self, Place};
use crate::formats::kv::KvFormat;

/// Which part of a work is asked for, or of which parts the whole is to be made.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct Shares {
    /// Do every n-th part of the work from the i-th on (documents, windows of text, parts of a model), i/n from 0/n to (n-1)/n.
    /// `auto` takes both from a Slurm array, ranks of MPI or srun, or all of these, `auto/N` where the environment has only the number
    /// of this process (a Kubernetes Indexed Job) or parts of an array are run again; what is found is then in shard-I-of-N below -o.
    /// Needs -o
    #[arg(long, value_parser = part, requires = "output", value_name = "I/N|auto|auto/N")]
    shard: Option<Part>,
    /// Take what shards found from their output folders, or from the folder that they are below, with the same options, instead of
    /// finding it
    #[arg(long, value_delimiter = ',', conflicts_with = "shard", value_name = "DIRS")]
    pub merge: Vec<PathBuf>,
}

impl Shares {
    /// Does `work` with this process's own part, where its cluster says which that is, and the folders of all parts, and with where
    /// of `output` the part lies.
    pub(super) fn of_this_process(
        &self,
        output: Option<&Path>,
        work: impl FnOnce(Self, Option<PathBuf>) -> Result<ExitCode>,
    ) -> Result<ExitCode> {
        let (mut own, mut place) = (self.clone(), output.map(Path::to_path_buf));
        if let Some(part @ Part::Auto(_)) = self.shard {
            if super::parallel::joined() {
                bail!(
                    "--shard auto: the processes that were begun together are ranks of one model (--tensor-parallel-size, \
                     --pipeline-parallel-size), not parts of the work; give --shard i/n to each run"
                );
            }
            let shard = resolved(part, &|name| std::env::var(name).ok())?;
            own.shard = Some(Part::Given(shard));
            place = output.map(|output| folder(output, shard));
            super::say!("shard {shard} of the environment");
        }
        let (merge, _fetched) = place::fetched(&self.merge)?;
        own.merge = folders(&merge)?;
        let place = Place::of(place.as_deref())?;
        let outcome = work(own, place.folder());
        place.finish(outcome)
    }

    pub(super) fn part(&self) -> Shard {
        match self.shard {
            Some(Part::Given(shard)) => shard,
            _ => Shard::ALL,
        }
    }
}

/// A KV cache that is asked for has to be the one that the parts were computed with.
pub(super) fn same_kv(asked: KvFormat, computation: &Value) -> Result<()> {
    let (asked_name, recorded) = (kv_name(asked), &computation["kv_cache_dtype"]);
    if asked != KvFormat::F32 && *recorded != asked_name {
        bail!(
            "--kv-cache-dtype {asked_name}: the shards were answered with {recorded}; leave the option out to merge them"
        );
    }
    Ok(())
}

/// What `--shard` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// `2/8`.
    Given(Shard),
    /// `auto`, or `auto/8` where the environment has only the process's own number.
    Auto(Option<usize>),
}

/// `i/n`, i from 0; `auto`; `auto/n`.
pub(super) fn part(text: &str) -> Result<Part, String> {
    let wrong = || {
        format!(
            "`{text}`: expected i/n with i from 0 to n-1, such as 0/4; or auto, or auto/n, for the number that Slurm, MPI or Kubernetes gives"
        )
    };
    let number = |text: &str| text.parse::<usize>().ok();
    match text.split_once('/') {
        None if text == "auto" => Ok(Part::Auto(None)),
        Some(("auto", of)) => number(of).filter(|of| *of > 0).map(|of| Part::Auto(Some(of))).ok_or_else(wrong),
        Some((index, of)) => {
            let shard = number(index).zip(number(of)).map(|(index, of)| Shard { index, of });
            shard.filter(|s| s.index < s.of).map(Part::Given).ok_or_else(wrong)
        }
        None => Err(wrong()),
    }
}

/// Of several names for one thing: a process's number among all, and how many there are.
const RANKS: [(&str, &str); 6] = [
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    ("PALS_RANKID", "PALS_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("RANK", "WORLD_SIZE"),
];

/// Which of how many processes of one MPI program this is, where a launcher says that there are several. (torchrun's names stand in
/// the environment of much that is none.)
pub(super) fn launched() -> Option<Shard> {
    let number = |name: &str| std::env::var(name).ok()?.parse::<usize>().ok();
    let both = |(rank, size): &(&str, &str)| Some(Shard { index: number(rank)?, of: number(size)? });
    let of_mpi = RANKS.iter().filter(|(rank, _)| *rank != "RANK");
    of_mpi.filter_map(both).find(|s| s.index < s.of).filter(|s| s.of > 1)
}

/// The part that this process does. `variable` reads the environment.
pub(super) fn resolved(part: Part, variable: &dyn Fn(&str) -> Option<String>) -> Result<Shard> {
    let of = match part {
        Part::Given(shard) => return Ok(shard),
        Part::Auto(of) => of,
    };
    let number = |name: &str| -> Result<Option<usize>> {
        let Some(text) = variable(name).filter(|text| !text.is_empty()) else { return Ok(None) };
        match text.parse() {
            Ok(number) => Ok(Some(number)),
            Err(_) => bail!("--shard auto: {name}={text} in the environment is no number"),
        }
    };
    let mut found = None;
    for (rank, size) in RANKS {
        if let (Some(rank), Some(size)) = (number(rank)?, number(size)?)
            && rank < size
        {
            found = Some((rank, size));
            break;
        }
    }
    let (rank, ranks) = found.unwrap_or((0, 1));
    // Of an array whose tasks run several processes each, every process has a part.
    let task = match (array(&number, of, ranks)?, number("JOB_COMPLETION_INDEX")?) {
        (Some((task, tasks)), _) => Some((task, tasks)),
        (None, Some(index)) => match of {
            Some(of) => Some((index, of / ranks)),
            None => bail!(
                "--shard auto: Kubernetes tells the number of this pod ({index}) and not how many there are: --shard auto/N, N as `completions`"
            ),
        },
        (None, None) => None,
    };
    let shard = match (task, of) {
        (Some((task, tasks)), _) => Shard { index: task * ranks + rank, of: tasks * ranks },
        (None, _) if found.is_none() => bail!(
            "--shard auto: nothing in the environment says which part this process does: neither a Slurm array (SLURM_ARRAY_TASK_ID), nor \
             ranks of MPI or srun ({}), nor a Kubernetes Indexed Job (JOB_COMPLETION_INDEX); say --shard i/n",
            RANKS.map(|(rank, _)| rank).join(", ")
        ),
        (None, _) => Shard { index: rank, of: ranks },
    };
    if let Some(of) = of.filter(|of| *of != shard.of) {
        bail!("--shard auto/{of}: by the environment there are {} processes, and each does one part", shard.of);
    }
    if shard.index >= shard.of {
        bail!(
            "--shard auto: this process is number {}, and there are {} parts, numbered from 0",
            shard.index,
            shard.of
        );
    }
    Ok(shard)
}

/// This task's number in a Slurm array, and how many tasks the whole has: `of`, with `ranks` processes a task, where a part of an array
/// is run again.
fn array(
    number: &dyn Fn(&str) -> Result<Option<usize>>,
    of: Option<usize>,
    ranks: usize,
) -> Result<Option<(usize, usize)>> {
    let Some(id) = number("SLURM_ARRAY_TASK_ID")? else { return Ok(None) };
    if let Some(of) = of {
        let tasks = of / ranks.max(1);
        let last = number("SLURM_ARRAY_TASK_MAX")?.unwrap_or(id);
        if last >= tasks {
            bail!(
                "--shard auto/{of}: the array has a task of number {last}; number them from 0, as in --array=0-{}",
                tasks.saturating_sub(1)
            );
        }
        return Ok(Some((id, tasks)));
    }
    let (Some(first), Some(last), Some(count)) =
        (number("SLURM_ARRAY_TASK_MIN")?, number("SLURM_ARRAY_TASK_MAX")?, number("SLURM_ARRAY_TASK_COUNT")?)
    else {
        bail!(
            "--shard auto: SLURM_ARRAY_TASK_ID={id} is set, and not SLURM_ARRAY_TASK_MIN, _MAX and _COUNT: say --shard auto/N"
        )
    };
    if first > 1 || last + 1 != first + count || !(first..=last).contains(&id) {
        bail!(
            "--shard auto: the array has {count} tasks of the numbers {first} to {last}, which may be a part of another that is run \
             again; number all from 0 (--array=0-7), and run parts of it again with --shard auto/N, N the number of all"
        );
    }
    Ok(Some((id - first, count)))
}

/// Where a part keeps its answers below the folder that all were given: `shard-2-of-8`.
pub(super) fn folder(output: &Path, shard: Shard) -> PathBuf {
    if shard == Shard::ALL { output.into() } else { output.join(format!("shard-{}-of-{}", shard.index, shard.of)) }
}

/// The folders of all parts: those given, and below one that holds parts, each of those.
pub(super) fn folders(given: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for folder in given {
        let parts = if folder.join(RESPONSES).exists() { Vec::new() } else { parts(folder) };
        let Some((first, _)) = parts.first() else {
            all.push(folder.clone());
            continue;
        };
        if let Some((other, _)) = parts.iter().find(|(s, _)| s.of != first.of) {
            bail!(
                "--merge {}: holds parts of {} and parts of {}; remove those of the run that is not meant",
                folder.display(),
                first.of,
                other.of
            );
        }
        let missing: Vec<String> =
            (0..first.of).filter(|i| !parts.iter().any(|(s, _)| s.index == *i)).map(|i| i.to_string()).collect();
        if !missing.is_empty() {
            bail!(
                "--merge {}: of {} parts these are missing: {}; run them again with --shard auto/{}, and this once all are there",
                folder.display(),
                first.of,
                missing.join(", "),
                first.of
            );
        }
        all.extend(parts.into_iter().map(|(_, path)| path));
    }
    Ok(all)
}

/// The folders below `folder` that are named as parts, in their order.
fn parts(folder: &Path) -> Vec<(Shard, PathBuf)> {
    let shard = |path: &Path| {
        let (index, of) = path.file_name()?.to_str()?.strip_prefix("shard-")?.split_once("-of-")?;
        Some(Shard { index: index.parse().ok()?, of: of.parse().ok()? })
    };
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path());
    let mut found: Vec<(Shard, PathBuf)> = entries.filter_map(|path| Some((shard(&path)?, path))).collect();
    found.sort_by_key(|(s, _)| (s.of, s.index));
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn by(text: &str, environment: &[(&str, &str)]) -> Result<(usize, usize), String> {
        let variable = |name: &str| environment.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned());
        let shard = part(text).and_then(|p| resolved(p, &variable).map_err(|e| e.to_string()))?;
        Ok((shard.index, shard.of))
    }

    fn slurm<'a>(id: &'a str, first: &'a str, last: &'a str, count: &'a str) -> Vec<(&'a str, &'a str)> {
        vec![
            ("SLURM_ARRAY_TASK_ID", id),
            ("SLURM_ARRAY_TASK_MIN", first),
            ("SLURM_ARRAY_TASK_MAX", last),
            ("SLURM_ARRAY_TASK_COUNT", count),
        ]
    }

    #[test]
    fn a_part_is_what_is_said_whatever_the_cluster_says() {
        assert_eq!(by("2/4", &slurm("0", "0", "7", "8")), Ok((2, 4)));
        for wrong in ["4/4", "x", "1", "auto/0", "auto/x", "-1/4", "1/4/2", ""] {
            assert!(by(wrong, &[]).unwrap_err().contains("expected i/n"), "{wrong}");
        }
    }

    #[test]
    fn arrays_of_slurm_are_numbered_from_their_first() {
        assert_eq!(by("auto", &slurm("3", "0", "7", "8")), Ok((3, 8)));
        assert_eq!(by("auto", &slurm("1", "1", "8", "8")), Ok((0, 8)));
        assert_eq!(by("auto", &slurm("8", "1", "8", "8")), Ok((7, 8)));
        // With gaps, or later numbers: some tasks of another array run again.
        for rerun in [slurm("3", "3", "5", "2"), slurm("3", "3", "3", "1"), slurm("4", "0", "8", "5")] {
            assert!(by("auto", &rerun).unwrap_err().contains("--shard auto/N"), "{rerun:?}");
        }
        assert_eq!(by("auto/8", &slurm("5", "3", "5", "2")), Ok((5, 8)));
        // From 1 on, the last would be none of eight, so that all are told.
        assert!(by("auto/8", &slurm("1", "1", "8", "8")).unwrap_err().contains("--array=0-7"));
        assert!(by("auto", &[("SLURM_ARRAY_TASK_ID", "3")]).unwrap_err().contains("auto/N"));
        assert!(by("auto", &[("SLURM_ARRAY_TASK_ID", "x")]).unwrap_err().contains("is no number"));
    }

    #[test]
    fn ranks_of_mpi_are_parts() {
        for (rank, size) in RANKS {
            assert_eq!(by("auto", &[(rank, "2"), (size, "4")]), Ok((2, 4)), "{rank}");
        }
        assert_eq!(by("auto", &[("OMPI_COMM_WORLD_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "1")]), Ok((0, 1)));
        // A batch script of Slurm has a number too, but no step with several tasks.
        assert!(by("auto", &[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8")]).is_err());
        assert!(by("auto/8", &[("PMI_RANK", "2"), ("PMI_SIZE", "4")]).unwrap_err().contains("there are 4 processes"));
        assert_eq!(by("auto/4", &[("PMI_RANK", "2"), ("PMI_SIZE", "4")]), Ok((2, 4)));
    }

    #[test]
    fn tasks_of_several_processes_have_a_part_for_each() {
        let both = [slurm("3", "0", "3", "4"), vec![("SLURM_PROCID", "1"), ("SLURM_STEP_NUM_TASKS", "2")]].concat();
        assert_eq!(by("auto", &both), Ok((7, 8)));
        assert_eq!(by("auto/8", &both), Ok((7, 8)));
        assert!(by("auto/7", &both).is_err());
    }

    #[test]
    fn pods_of_a_job_know_only_their_own_number() {
        assert_eq!(by("auto/8", &[("JOB_COMPLETION_INDEX", "7")]), Ok((7, 8)));
        assert!(by("auto", &[("JOB_COMPLETION_INDEX", "7")]).unwrap_err().contains("`completions`"));
        assert!(by("auto/4", &[("JOB_COMPLETION_INDEX", "4")]).unwrap_err().contains("number 4"));
        assert!(by("auto", &[]).unwrap_err().contains("say --shard i/n"));
        assert!(by("auto/4", &[]).unwrap_err().contains("say --shard i/n"));
    }

    #[test]
    fn parts_below_a_folder_are_all_or_named() {
        let folder = tempfile::tempdir().unwrap();
        let make = |name: &str| {
            let path = folder.path().join(name);
            std::fs::create_dir_all(&path).unwrap();
            std::fs::write(path.join(RESPONSES), "").unwrap();
            path
        };
        let made: Vec<PathBuf> =
            (0..12).filter(|i| *i != 3 && *i != 10).map(|i| make(&format!("shard-{i}-of-12"))).collect();
        let given = [folder.path().to_path_buf()];
        let said = folders(&given).unwrap_err().to_string();
        assert!(said.contains("of 12 parts these are missing: 3, 10;"), "{said}");
        let all = [&made[..3], &[make("shard-3-of-12")], &made[3..9], &[make("shard-10-of-12")], &made[9..]].concat();
        assert_eq!(folders(&given).unwrap(), all);
        assert_eq!(folders(&made).unwrap(), made, "what is given by itself is what is meant");
        make("shard-0-of-4");
        assert!(folders(&given).unwrap_err().to_string().contains("parts of 4 and parts of 12"));
    }
}
