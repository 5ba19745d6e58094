//! One training by several processes: what each holds, what goes between them, how long a step takes.
//!
//! A step's batches are shared out; each process has both models and all gradients, the moments of its share of the weights, and moves
//! those (`recover/team`). So gradients of what moves go to who moves it, in every round of batches, and what was moved goes to all.

use super::costs::Costs;
use super::timeline::rounds;
use crate::model::ModelConfig;

/// What a training is of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Training {
    /// Weights of a model, and those of them that are trained.
    pub weights: f64,
    pub trained: f64,
    /// Multiply-adds of a token in one model.
    pub products: f64,
    /// Tokens of a batch, and batches of a step.
    pub tokens: usize,
    pub batches: usize,
}

/// What comes of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// Bytes of memory of a process beside activations.
    pub memory: f64,
    /// Bytes that a process gets in a step.
    pub bytes: f64,
    /// Seconds of a step, and of what of it goes between processes.
    pub seconds: f64,
    pub exchange: f64,
}

/// Bytes of a weight's master, gradient and moments, as `recover` keeps them.
const MASTER: f64 = 4.0;
const GRADIENT: f64 = 4.0;
const MOMENTS: f64 = 8.0;
/// Values that go to one process at a time, as `recover/team` sends them.
const CHUNK: f64 = (1 << 20) as f64;
/// Passes through a model that a batch takes: the teacher's, the student's, and twice that back.
const PASSES: f64 = 4.0;

impl Training {
    /// Of all linears of the blocks of `config`, of a mixture those that a token uses.
    #[must_use]
    pub fn of(config: &ModelConfig, tokens: usize, batches: usize) -> Self {
        let mixtures = config.mixtures();
        let used = |layer: Option<usize>| {
            let mixture = mixtures.iter().find(|m| Some(m.0) == layer);
            mixture.map_or(1.0, |(_, _, m)| m.rule.top_k as f64 / m.experts as f64)
        };
        let mut training = Self { weights: 0.0, trained: 0.0, products: 0.0, tokens, batches };
        for module in config.modules() {
            let weights = (module.role.n * module.role.k) as f64;
            training.weights += weights;
            if module.is_block_linear() {
                training.trained += weights;
                training.products += weights * if module.expert.is_some() { used(module.layer) } else { 1.0 };
            }
        }
        // An embedding is looked up; as a head it multiplies.
        training.products += (config.vocab * config.hidden) as f64;
        training
    }

    /// Bytes of gradients, and of what was moved, that each of `processes` gets in a step.
    #[must_use]
    pub fn bytes(&self, processes: usize) -> [f64; 2] {
        let others = (processes - 1) as f64 / processes as f64;
        let rounds = self.batches.div_ceil(processes) as f64;
        [4.0 * self.trained * others * rounds, 4.0 * self.trained * others]
    }

    /// A step by `processes` processes on what `costs` says; `batch` are the seconds that one of them takes for a batch, where that is
    /// known.
    #[must_use]
    pub fn step(&self, processes: usize, costs: &Costs, batch: Option<f64>) -> Step {
        let batch = batch.unwrap_or(PASSES * self.products * self.tokens as f64 / costs.floats);
        let [gradients, moved] = self.bytes(processes);
        let wire = costs.wire(0, processes - 1);
        let chunks = (self.trained / processes as f64 / CHUNK).ceil() * (gradients / moved.max(1.0) + 1.0);
        let exchange = (gradients + moved) / wire.bandwidth + chunks * rounds(processes) * wire.latency;
        let own = self.trained / processes as f64;
        // Gradients, masters and moments are read, masters and moments written.
        let moving = own * (GRADIENT + 2.0 * (MASTER + MOMENTS)) / costs.memory;
        Step {
            memory: 2.0 * 2.0 * self.weights + self.trained * (MASTER + GRADIENT + MOMENTS / processes as f64),
            bytes: gradients + moved,
            seconds: self.batches.div_ceil(processes) as f64 * batch + exchange + moving,
            exchange,
        }
    }
}
