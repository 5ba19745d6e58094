//! Options of how an answer's tokens are drawn, over what the model's generation_config.json says.

use crate::logits::SamplingParams;

#[derive(clap::Args)]
pub(super) struct SamplingOptions {
    /// 0 takes the most probable token always [default: generation_config.json's, else 0]
    #[arg(long)]
    temperature: Option<f32>,
    /// Only the K most probable tokens
    #[arg(long)]
    top_k: Option<usize>,
    /// Only the most probable tokens that together reach this probability
    #[arg(long)]
    top_p: Option<f32>,
    /// Only tokens at least this probable, relative to the most probable one
    #[arg(long)]
    min_p: Option<f32>,
    /// Over 1 discourages tokens of prompt and answer
    #[arg(long)]
    repetition_penalty: Option<f32>,
    /// Discourages tokens that the answer has already
    #[arg(long, allow_negative_numbers = true)]
    presence_penalty: Option<f32>,
    /// Discourages tokens by how often the answer has them
    #[arg(long, allow_negative_numbers = true)]
    frequency_penalty: Option<f32>,
    /// Repeats a sampled answer
    #[arg(long)]
    seed: Option<u64>,
}

impl SamplingOptions {
    /// `model`'s own way of drawing, with what is given in its stead.
    pub(super) fn over(&self, model: &SamplingParams) -> SamplingParams {
        SamplingParams {
            temperature: self.temperature.unwrap_or(model.temperature),
            top_k: self.top_k.unwrap_or(model.top_k),
            top_p: self.top_p.unwrap_or(model.top_p),
            min_p: self.min_p.unwrap_or(model.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(model.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(model.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(model.frequency_penalty),
            seed: self.seed,
            ..model.clone()
        }
    }

    /// Options given that mean nothing where the most probable token is always taken.
    pub(super) fn of_drawing(&self) -> Vec<&'static str> {
        let drawing = [
            ("--top-k", self.top_k.is_some()),
            ("--top-p", self.top_p.is_some()),
            ("--min-p", self.min_p.is_some()),
            ("--seed", self.seed.is_some()),
        ];
        drawing.iter().filter(|(_, given)| *given).map(|(name, _)| *name).collect()
    }

    /// Whether an option stands in for a setting of the model that is not used, `temperature 0.6 (…)`.
    pub(super) fn stands_for(&self, ignored: &str) -> bool {
        let given = [
            ("temperature ", self.temperature.is_some()),
            ("top_k ", self.top_k.is_some()),
            ("top_p ", self.top_p.is_some()),
            ("min_p ", self.min_p.is_some()),
        ];
        given.iter().any(|(name, given)| *given && ignored.starts_with(name))
    }
}
