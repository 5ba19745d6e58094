//! Whether every rank of a model finds room where it is, asked before anything is loaded.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::device::Own;
use super::human_bytes;
use super::machine::limiting_group;
use super::room::{BESIDE, Memory};
use crate::backend::Either;

/// Where a rank is, and what memory there is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Place {
    /// Ranks in the same place share its memory.
    pub name: String,
    pub free: Option<u64>,
    pub all: Option<u64>,
}

impl Place {
    /// Of a rank on the machine `host`.
    pub(super) fn of(own: &Own, host: &str) -> Self {
        match own {
            Either::A(_) => {
                let Memory { free, all } = Memory::here();
                // Processes that have a limit each are in places of their own.
                let within = limiting_group().map_or_else(String::new, |group| format!(" within {}", group.display()));
                Self { name: format!("{host}{within}"), free, all }
            }
            Either::B(gpu) => {
                let (free, all) = gpu.device().memory().ok().unzip();
                let name = format!("cuda:{} of {host}", gpu.device().ordinal);
                Self { name, free: free.map(|free| free as u64), all: all.map(|all| all as u64) }
            }
        }
    }
}

/// What is to be said of ranks that need so much, each in its place.
///
/// # Errors
/// When what is in one place can never fit.
pub(super) fn check(places: &[Place], needs: &[u64]) -> Result<Vec<String>, String> {
    let mut by_place: BTreeMap<&str, (Vec<usize>, u64)> = BTreeMap::new();
    for (rank, (place, needs)) in places.iter().zip(needs).enumerate() {
        let (ranks, needed) = by_place.entry(&place.name).or_default();
        ranks.push(rank);
        *needed += needs;
    }
    let mut notes = Vec::new();
    for (name, (ranks, needed)) in by_place {
        let place = &places[ranks[0]];
        let who = match ranks[..] {
            [one] => format!("rank {one} needs"),
            _ => {
                let ranks: Vec<String> = ranks.iter().map(ToString::to_string).collect();
                format!("ranks {} need", ranks.join(", "))
            }
        };
        let beside = BESIDE * ranks.len() as u64;
        let about = human_bytes(needed + beside);
        if let Some(all) = place.all.filter(|all| needed > *all) {
            return Err(format!(
                "{who} about {about}; there are {} in all on {name}: more ranks have less each",
                human_bytes(all)
            ));
        }
        if let Some(free) = place.free.filter(|free| needed + beside > *free) {
            notes.push(format!(
                "{who} about {about}, and {} are free on {name}: the system may become slow or end this",
                human_bytes(free)
            ));
        }
    }
    Ok(notes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn place(name: &str, free: u64, all: u64) -> Place {
        Place { name: name.into(), free: Some(free * GIB), all: Some(all * GIB) }
    }

    #[test]
    fn ranks_in_one_place_share_its_memory() {
        let places = [place("a", 10, 16), place("a", 10, 16), place("b", 10, 16)];
        assert_eq!(check(&places, &[4 * GIB, 4 * GIB, 8 * GIB]), Ok(vec![]));
        let notes = check(&places, &[6 * GIB, 6 * GIB, 8 * GIB]).unwrap();
        assert!(notes.len() == 1 && notes[0].contains("ranks 0, 1 need about 12.8 GiB"), "{notes:?}");
        let error = check(&places, &[GIB, GIB, 17 * GIB]).unwrap_err();
        assert!(error.contains("rank 2 needs about") && error.contains("16.0 GiB in all on b"), "{error}");
        let unknown = Place { name: "c".into(), free: None, all: None };
        assert_eq!(check(&[unknown], &[u64::MAX / 2]), Ok(vec![]));
    }
}
