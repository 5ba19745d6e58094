//! What is computed from a row of logits, on the host: the definitions that every backend's own kernels must equal.

mod constraint;
mod params;
mod routing;
mod sampler;
mod score;

pub use constraint::{Constraint, ConstraintError, TokenSet};
pub use params::{SamplingError, SamplingParams};
pub use routing::{RouterRule, RouterRuleError, RouterScores, Routing, route_row};
pub use sampler::{Draw, History, Sampled, Sampler, Scratch};
pub(crate) use sampler::{Question, generated_counts, largest_of, most_probable, rank_of, sure_log_prob};
pub use score::{RankedScore, TokenScore, score_row, softmax_total};
