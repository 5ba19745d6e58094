//! Whether a model finds room in memory, asked before it is loaded; and what of its experts stays in its files where it does not.

use crate::model::memory::Needs;

/// Memory beside weights and caches: activations, the program, what a weight is made of while it is packed.
pub(super) const BESIDE: u64 = 384 << 20;

/// How a model is to be loaded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    /// Bytes of experts that are kept in memory; all of them where it is `None`.
    pub experts: Option<u64>,
    /// What is to be said.
    pub note: Option<String>,
}

/// What the machine has, as far as it says it: free now, and in all.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Memory {
    pub free: Option<u64>,
    pub all: Option<u64>,
}

impl Memory {
    pub(super) fn here() -> Self {
        Self { free: super::machine::available_bytes(), all: super::machine::all_bytes() }
    }

    /// Without so many bytes, which models that are loaded are going to take.
    pub(super) fn without(self, taken: usize) -> Self {
        Self { free: self.free.map(|free| free.saturating_sub(taken as u64)), ..self }
    }
}

/// How a model is loaded that `needs` so much, for `tokens` tokens of `sequences`, where `asked` bytes of experts may stay in memory
/// or nobody said how many.
///
/// # Errors
/// When it can never fit, or not one expert may stay.
pub(super) fn plan(
    needs: &Needs,
    (tokens, sequences): (usize, usize),
    asked: Option<u64>,
    memory: Memory,
) -> Result<Plan, String> {
    let bytes = super::human_bytes;
    let whole = needs.bytes(tokens, sequences).saturating_add(BESIDE);
    let rest = whole - needs.experts;
    if let Some(asked) = asked.filter(|asked| needs.experts > 0 && *asked < needs.expert) {
        return Err(format!("--expert-memory: {} is less than one expert, {}", bytes(asked), bytes(needs.expert)));
    }
    let experts = match (asked.filter(|_| needs.experts > 0), memory.free) {
        (Some(asked), _) => Some(asked).filter(|asked| *asked < needs.experts),
        (None, Some(free)) if whole > free && needs.experts > 0 => {
            Some(free.saturating_sub(rest).max(2 * needs.expert).min(needs.experts))
        }
        _ => None,
    };
    let needed = rest + experts.unwrap_or(needs.experts);
    let kept = match experts {
        None => String::new(),
        Some(kept) => format!(" with {} of its {} of experts in memory", bytes(kept), bytes(needs.experts)),
    };
    // What is beside is a guess, and far too much for a small model: by itself it refuses nothing.
    if let Some(all) = memory.all.filter(|all| needed - BESIDE > *all) {
        return Err(format!("the model needs about {}{kept}; this machine has {} in all", bytes(needed), bytes(all)));
    }
    let note = match memory.free {
        Some(free) if needed > free => Some(format!(
            "the model needs about {}{kept}, and {} are free: the system may become slow or end this program",
            bytes(needed),
            bytes(free)
        )),
        Some(free) if experts.is_some() && asked.is_none() => Some(format!(
            "of the model's {} {} are experts, more than finds room in the {} that are free: {} of them stay in memory, the \
             others are read again when they are used (--expert-memory says how many)",
            bytes(needs.weights),
            bytes(needs.experts),
            bytes(free),
            bytes(experts.unwrap_or_default())
        )),
        _ if asked.is_some() && needs.experts == 0 => {
            Some("--expert-memory is without effect: the model has no experts".into())
        }
        _ => None,
    };
    Ok(Plan { experts, note })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn mixture() -> Needs {
        Needs { weights: 12 * GIB, experts: 10 * GIB, expert: GIB / 64, token: 1 << 16, sequence: 0 }
    }

    fn memory(free: u64, all: u64) -> Memory {
        Memory { free: Some(free), all: Some(all) }
    }

    #[test]
    fn what_fits_is_loaded_whole_and_nothing_is_said() {
        for memory in [memory(13 * GIB, 16 * GIB), Memory::default()] {
            assert_eq!(plan(&mixture(), (0, 1), None, memory), Ok(Plan::default()));
        }
    }

    #[test]
    fn experts_that_find_no_room_stay_in_the_files() {
        let found = plan(&mixture(), (0, 1), None, memory(8 * GIB, 16 * GIB)).unwrap();
        assert_eq!(found.experts, Some(6 * GIB - BESIDE));
        assert!(found.note.unwrap().contains("--expert-memory"));
        // A long context takes from them.
        let longer = plan(&mixture(), (1 << 14, 1), None, memory(8 * GIB, 16 * GIB)).unwrap();
        assert_eq!(longer.experts, Some(5 * GIB - BESIDE));
        // What was asked for is done without words, if it fits.
        let asked = plan(&mixture(), (0, 1), Some(GIB), memory(8 * GIB, 16 * GIB)).unwrap();
        assert_eq!(asked, Plan { experts: Some(GIB), note: None });
        assert_eq!(plan(&mixture(), (0, 1), Some(11 * GIB), memory(13 * GIB, 16 * GIB)), Ok(Plan::default()));
    }

    #[test]
    fn what_does_not_fit_is_told_or_refused() {
        let dense = Needs { experts: 0, expert: 0, ..mixture() };
        let told = plan(&dense, (0, 1), None, memory(8 * GIB, 16 * GIB)).unwrap();
        assert!(told.experts.is_none() && told.note.unwrap().contains("8.0 GiB are free"));
        let refused = plan(&dense, (0, 1), None, memory(8 * GIB, 10 * GIB)).unwrap_err();
        assert!(refused.contains("about 12.4 GiB") && refused.contains("10.0 GiB in all"), "{refused}");
        let tiny = Needs { weights: 1 << 20, experts: 0, expert: 0, ..mixture() };
        let small = plan(&tiny, (0, 1), None, memory(GIB / 8, GIB / 4)).unwrap();
        assert!(small.note.is_some(), "a small machine runs a small model");
        let tight = plan(&mixture(), (0, 1), None, memory(GIB, 16 * GIB)).unwrap();
        assert!(tight.experts == Some(GIB / 32) && tight.note.unwrap().contains("end this program"));
        assert!(plan(&mixture(), (0, 1), None, memory(GIB, 2 * GIB)).is_err());
        let asked = plan(&mixture(), (0, 1), Some(9), memory(8 * GIB, 16 * GIB)).unwrap_err();
        assert!(asked.contains("--expert-memory") && asked.contains("16.0 MiB"), "{asked}");
        let idle = plan(&dense, (0, 1), Some(GIB), memory(13 * GIB, 16 * GIB)).unwrap();
        assert!(idle.note.unwrap().contains("without effect"));
    }
}
