//! Whether a training finds room in memory, asked before anything is loaded; and what one takes that goes block by block.

use std::path::Path;

use anyhow::{Result, bail};

use super::human_bytes;
use super::machine::peak_memory;
use super::recovery_plan::for_seconds;
use super::room::Memory;
use crate::backend::autograd::operand::Precision;
use crate::checkpoint::Checkpoint;
use crate::corpus::spread;
use crate::model::ModelConfig;
use crate::model::modules::Part;
use crate::recover::data::Data;
use crate::recover::measure::Bench;
use crate::recover::optimizer::Moments;
use crate::recover::stage::{Method, Stage};
use crate::recover::streamed::BlockSize;
use crate::recover::team::Team;
use crate::recover::trainee::Trainee;

/// What a training needs in memory beside activations, and what there is.
pub(super) struct Room {
    /// The whole of both models, with masters, gradients and moments.
    whole: u64,
    /// What stands before and behind the blocks of both, or the largest block.
    block: u64,
    /// Processes that train the whole model on this machine.
    processes: u64,
    memory: Memory,
}

impl Room {
    /// For the processes of `team` that are on this machine; moments are shared out among all of it.
    pub(super) fn of(config: &ModelConfig, sizes: &[BlockSize], precision: Precision, team: Option<&Team>) -> Self {
        let operand = precision.bytes();
        let both = |ends: bool| -> usize {
            let is_end = |part| matches!(part, Part::Embedding | Part::Head);
            let modules = config.modules();
            modules.iter().filter(|m| !ends || is_end(m.part)).map(|m| 2 * operand * m.role.n * m.role.k).sum()
        };
        let quantized: usize = sizes.iter().map(|s| s.quantized).sum();
        let (processes, all) = team.map_or((1, 1), |team| (team.here() as u64, team.size()));
        let own = quantized / 4 + quantized * (4 + 4) + quantized * Moments::BYTES / all;
        let largest = sizes.iter().map(|s| s.training_bytes(operand)).max().unwrap_or(0);
        let whole = processes * (both(false) + own) as u64;
        Self { whole, block: processes * largest.max(both(true) as u64), processes, memory: Memory::here() }
    }

    /// Whether the whole model can be trained, with what is beside.
    pub(super) fn has_whole(&self) -> bool {
        self.memory.free.is_none_or(|free| self.whole + self.whole / 8 <= free)
    }

    /// How much of `most` bytes of freed memory may be kept for its next use where blocks are trained one by one.
    pub(super) fn kept(&self, most: usize) -> usize {
        let left = self.memory.free.map_or(u64::MAX, |free| free.saturating_sub(self.block) / 4);
        most.min(usize::try_from(left).unwrap_or(most))
    }

    /// Says, or refuses, what finds no room: of the whole model, or of blocks `one_by_one`, which may have been `chosen` for that.
    pub(super) fn tell(&self, one_by_one: bool, chosen: bool) -> Result<()> {
        let (needed, what) = match one_by_one {
            true => (self.block, "the largest block"),
            false => (self.whole, "the whole model"),
        };
        let by = if self.processes > 1 { format!(" by {} processes here", self.processes) } else { String::new() };
        let takes = |needed: u64, what: &str| format!("training {what}{by} takes about {}", human_bytes(needed));
        let way_out = match one_by_one {
            true => "",
            false if self.processes > 1 => "; fewer processes on a machine, with more threads each, take less",
            false => "; --method block trains one block at a time, which takes the memory of a block",
        };
        if let Some(all) = self.memory.all.filter(|all| needed > *all) {
            bail!("{}; this machine has {} in all{way_out}", takes(needed, what), human_bytes(all));
        }
        let Some(free) = self.memory.free else { return Ok(()) };
        if one_by_one && chosen && !self.has_whole() {
            let whole = takes(self.whole, "the whole model");
            super::say!("note: {whole}, {} are free: so its blocks are trained one by one", human_bytes(free));
        }
        if needed > free {
            super::say!("note: {}, {} are free: this may fail{way_out}", takes(needed, what), human_bytes(free));
        }
        Ok(())
    }
}

/// Tokens that a stage of blocks trains on.
pub(super) fn trained_tokens(stage: &Stage, data: &Data) -> usize {
    let samples = if let Method::Block(options) = &stage.method { options.samples } else { None };
    spread(&data.rows, samples.unwrap_or(usize::MAX)).iter().map(|r| r.len()).sum()
}

/// Measures a block, and says what they all take.
pub(super) fn tell_blocks(
    trainee: &mut Trainee<'_>,
    stage: &Stage,
    data: &Data,
    watched: &[(String, Data)],
    (of, training): (&Checkpoint, &Path),
    now: &dyn Fn() -> f64,
) -> Result<()> {
    let Method::Block(options) = &stage.method else { return Ok(()) };
    let bench = Bench { now, patience: f64::INFINITY, scratch: training };
    let samples = data.rows.len().min(options.samples.unwrap_or(usize::MAX));
    let cost = bench.stage(trainee, data, stage, Some(samples))?;
    let (ready, look) = bench.look(trainee, watched)?;
    let Trainee::Streamed(model) = trainee else { return Ok(()) };
    let blocks = model.sizes.len();
    let training = cost.fixed + cost.step * options.steps as f64;
    let disk = model.disk(trained_tokens(stage, data));
    let memory = peak_memory()
        .map_or_else(String::new, |b| format!(", peak memory {} (reached while measuring)", human_bytes(b)));
    super::say!(
        "{blocks} blocks, one at a time: {} each on average, {} in all with looks at the watched texts ({}); {} on disk meanwhile, \
         and {} for the result{memory}",
        for_seconds(training / blocks.max(1) as f64),
        for_seconds(training + ready + 2.0 * look),
        for_seconds(look),
        human_bytes(disk),
        human_bytes(of.tensors.file_bytes())
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn room(free: u64, all: u64) -> Room {
        let memory = Memory { free: Some(free * GIB), all: Some(all * GIB) };
        Room { whole: 16 * GIB, block: 2 * GIB, processes: 1, memory }
    }

    #[test]
    fn the_whole_model_needs_room_with_something_beside_it() {
        assert!(room(18, 24).has_whole() && !room(17, 24).has_whole());
        assert!(Room { memory: Memory::default(), ..room(0, 0) }.has_whole(), "nobody says what there is");
    }

    #[test]
    fn what_can_never_fit_is_refused_and_what_would_fit_is_named() {
        let error = room(8, 12).tell(false, false).unwrap_err().to_string();
        for part in ["training the whole model takes about 16.0 GiB", "12.0 GiB in all", "--method block"] {
            assert!(error.contains(part), "{error}");
        }
        let error = room(1, 1).tell(true, true).unwrap_err().to_string();
        assert!(error.contains("the largest block takes about 2.0 GiB") && !error.contains("--method"), "{error}");
        for (one_by_one, chosen) in [(true, true), (true, false), (false, false)] {
            room(8, 24).tell(one_by_one, chosen).unwrap();
        }
    }

    /// Of a block the activations and nothing else may stay: what is kept beside it must not fill the memory.
    #[test]
    fn little_is_kept_where_there_is_little() {
        let kept = |free| room(free, 24).kept(4 << 30);
        assert_eq!([kept(2), kept(3), kept(100)], [0, 1 << 28, 4 << 30]);
    }

    /// The parts of a known shape, by hand.
    #[test]
    fn what_a_model_needs_is_the_sum_of_its_parts() {
        let model = Checkpoint::open(Path::new("models/books-nvfp4")).unwrap();
        let (config, sizes) = crate::recover::streamed::sizes(&model).unwrap();
        let quantized: usize = sizes.iter().map(|s| s.quantized).sum();
        assert_eq!((sizes.len(), sizes.iter().map(|s| s.linears).sum::<usize>(), quantized), (12, 84, 2_359_296));
        let room = Room::of(&config, &sizes, Precision::Bf16, None);
        let ends = 2 * 2 * config.vocab * config.hidden;
        assert!(config.tied_embeddings && sizes.iter().all(|s| s.floats == 0 && s.coarse));
        assert_eq!(room.whole, (ends + quantized * 4 + quantized / 4 + quantized * 16) as u64);
        assert_eq!(room.block, ends.max(quantized / 12 * (2 + 16) + quantized / 48) as u64);
        // Two of four processes are here; each has a quarter of the moments.
        let link = crate::ranks::threads::Thread::all(4).remove(0);
        let room = Room::of(&config, &sizes, Precision::Bf16, Some(&Team::new(std::sync::Arc::new(link), 2)));
        assert_eq!(room.whole, 2 * (ends + quantized * 4 + quantized / 4 + quantized * (4 + 4 + 8 / 4)) as u64);
    }
}
