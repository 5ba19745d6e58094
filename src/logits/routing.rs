//! Which experts a token goes to, from a row of a router's logits.

use std::sync::Arc;

/// Experts chosen for one token: (expert, weight), ascending by expert, so that sums do not depend on the batch.
pub type Routing = Vec<(usize, f32)>;

/// How a row of router logits becomes experts and their weights. Of equal scores the lower expert is chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct RouterRule {
    /// Experts a token.
    pub top_k: usize,
    /// What is compared, and what the weights are made of.
    pub scores: RouterScores,
    /// Weights are divided by their sum and this; `None`: they stay as they are.
    pub renormalize: Option<f32>,
    /// What weights are multiplied by last (routed_scaling_factor).
    pub scale: f32,
}

/// Scores of a router's experts.
#[derive(Clone, Debug, PartialEq)]
pub enum RouterScores {
    /// Softmax over all experts.
    Softmax,
    /// Logits choose; the weights are the softmax over those that are chosen (gpt_oss).
    SoftmaxOfChosen,
    /// Sigmoid of each logit, which the weights are made of.
    Sigmoid {
        /// Added to choose only (e_score_correction_bias), [experts].
        bias: Option<Arc<[f32]>>,
        /// Runs of experts (n_group); 1: no groups.
        groups: usize,
        /// Groups, by the sum of their two best, whose experts can be chosen (topk_group).
        top_groups: usize,
    },
}

/// Why a rule doesn't fit its router.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum RouterRuleError {
    #[error("{top_k} experts a token of {available} that can be chosen")]
    TopK { top_k: usize, available: usize },
    #[error("a correction bias of {found} values for {experts} experts")]
    Bias { found: usize, experts: usize },
    #[error("{experts} experts in {groups} groups of which {top_groups} are kept")]
    Groups { experts: usize, groups: usize, top_groups: usize },
}

impl RouterRule {
    /// Softmax over all experts and the `top_k` of them, their weights rescaled to one if `normalize`.
    #[must_use]
    pub fn softmax(top_k: usize, normalize: bool) -> Self {
        Self { top_k, scores: RouterScores::Softmax, renormalize: normalize.then_some(0.0), scale: 1.0 }
    }

    /// Whether it can choose of `experts` experts.
    ///
    /// # Errors
    /// When there are too few experts, groups don't divide them, or the bias has another length.
    pub fn check(&self, experts: usize) -> Result<(), RouterRuleError> {
        let mut available = experts;
        if let RouterScores::Sigmoid { bias, groups, top_groups } = &self.scores {
            let (groups, top_groups) = (*groups, *top_groups);
            if let Some(bias) = bias.as_ref().filter(|bias| bias.len() != experts) {
                return Err(RouterRuleError::Bias { found: bias.len(), experts });
            }
            let divides = groups > 0 && experts.is_multiple_of(groups) && (groups == 1 || experts / groups >= 2);
            if !divides || top_groups == 0 || top_groups > groups {
                return Err(RouterRuleError::Groups { experts, groups, top_groups });
            }
            available = experts / groups * top_groups;
        }
        if self.top_k == 0 || self.top_k > available {
            return Err(RouterRuleError::TopK { top_k: self.top_k, available });
        }
        Ok(())
    }

    /// The experts of one row of logits, for which [`Self::check`] was asked.
    #[must_use]
    pub fn route(&self, logits: &[f32]) -> Routing {
        let mut chosen = match &self.scores {
            RouterScores::Softmax => best(softmax(logits), self.top_k),
            RouterScores::SoftmaxOfChosen => {
                let chosen = best(logits.to_vec(), self.top_k);
                let weights = softmax(&chosen.iter().map(|c| c.1).collect::<Vec<_>>());
                chosen.iter().zip(weights).map(|(&(expert, _), weight)| (expert, weight)).collect()
            }
            RouterScores::Sigmoid { bias, groups, top_groups } => {
                let weights: Vec<f32> = logits.iter().map(|&v| 1.0 / (1.0 + libm::expf(-v))).collect();
                let mut scores = weights.clone();
                if let Some(bias) = bias {
                    scores.iter_mut().zip(bias.iter()).for_each(|(s, b)| *s += b);
                }
                let chosen = of_groups(&scores, *groups, *top_groups, self.top_k);
                chosen.into_iter().map(|(expert, _)| (expert, weights[expert])).collect()
            }
        };
        if let Some(epsilon) = self.renormalize {
            let kept: f32 = chosen.iter().map(|c| c.1).sum();
            chosen.iter_mut().for_each(|c| c.1 /= kept + epsilon);
        }
        if self.scale != 1.0 {
            chosen.iter_mut().for_each(|c| c.1 *= self.scale);
        }
        chosen.sort_by_key(|c| c.0);
        chosen
    }
}

/// Softmax over one row of router logits and its `top_k` experts (ties go to the lower index), their weights rescaled to
/// one if `normalize`.
#[must_use]
pub fn route_row(logits: &[f32], top_k: usize, normalize: bool) -> Routing {
    RouterRule::softmax(top_k, normalize).route(logits)
}

fn softmax(logits: &[f32]) -> Vec<f32> {
    let max = logits.iter().fold(f32::NEG_INFINITY, |m, &v| m.max(v));
    let mut weights: Vec<f32> = logits.iter().map(|&v| libm::expf(v - max)).collect();
    let total: f32 = weights.iter().sum();
    weights.iter_mut().for_each(|w| *w /= total);
    weights
}

/// The `count` largest with their indices, the largest first, of equal ones the lower index.
fn best(scores: Vec<f32>, count: usize) -> Routing {
    let mut all: Routing = scores.into_iter().enumerate().collect();
    keep_best(&mut all, count);
    all
}

/// [`best`] of scores with their experts. -0 and 0 are equal scores, but total_cmp tells them apart.
fn keep_best(all: &mut Routing, count: usize) {
    all.sort_by(|a, b| (b.1 + 0.0).total_cmp(&(a.1 + 0.0)).then(a.0.cmp(&b.0)));
    all.truncate(count);
}

/// The `count` best of the experts in the `top_groups` best groups. Others are left out rather than scored -inf, which a
/// bias may be too.
fn of_groups(scores: &[f32], groups: usize, top_groups: usize, count: usize) -> Routing {
    if groups <= 1 {
        return best(scores.to_vec(), count);
    }
    let size = scores.len() / groups;
    let two_best = |group: &[f32]| best(group.to_vec(), 2).iter().map(|b| b.1).sum::<f32>();
    let kept = best(scores.chunks_exact(size).map(two_best).collect(), top_groups);
    let experts = kept.iter().flat_map(|&(group, _)| group * size..(group + 1) * size);
    let mut all: Routing = experts.map(|expert| (expert, scores[expert])).collect();
    keep_best(&mut all, count);
    all
}
