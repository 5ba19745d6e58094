//! Which experts a token goes to, from a row of a router's logits.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::sync::Arc;

/// Experts chosen for one token: (expert, weight), ascending by expert, so that sums do not depend on the batch.
pub type Routing = Vec<(usize, f32)>;

/// How a row of router logits becomes experts and their weights. Of equal scores the lower expert is chosen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum RouterScores {
    /// Softmax over all experts.
    Softmax,
    /// Logits choose; the weights are the softmax over those that are chosen (gpt_oss).
    SoftmaxOfChosen,
    /// Sigmoid of each logit, which the weights are made of.
    Sigmoid {
        /// Added to choose only (e_score_correction_bias), [experts].
        #[serde(serialize_with = "bias_as_list", deserialize_with = "bias_of_list")]
        bias: Option<Arc<[f32]>>,
        /// Runs of experts (n_group); 1: no groups.
        groups: usize,
        /// Groups, by the sum of their two best, whose experts can be chosen (topk_group).
        top_groups: usize,
    },
}

fn bias_as_list<S: Serializer>(bias: &Option<Arc<[f32]>>, to: S) -> Result<S::Ok, S::Error> {
    bias.as_deref().serialize(to)
}

fn bias_of_list<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Arc<[f32]>>, D::Error> {
    Ok(Option::<Vec<f32>>::deserialize(from)?.map(Into::into))
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

/// [`best`] of scores with their experts. NaN comes first, so that it isn't lost.
fn keep_best(all: &mut Routing, count: usize) {
    // total_cmp tells -0 from 0, which are equal scores, and puts NaN of either sign at either end.
    let key = |score: f32| if score.is_nan() { f32::NAN } else { score + 0.0 };
    all.sort_by(|a, b| key(b.1).total_cmp(&key(a.1)).then(a.0.cmp(&b.0)));
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

#[cfg(test)]
mod tests {
    use super::*;

    fn sigmoid_rule(top_k: usize, bias: Option<&[f32]>, groups: usize, top_groups: usize) -> RouterRule {
        let scores = RouterScores::Sigmoid { bias: bias.map(Arc::from), groups, top_groups };
        RouterRule { top_k, scores, renormalize: Some(1e-20), scale: 2.5 }
    }

    fn experts(routing: &Routing) -> Vec<usize> {
        routing.iter().map(|c| c.0).collect()
    }

    fn close(routing: &Routing, expected: &[(usize, f32)]) {
        assert_eq!(experts(routing), experts(&expected.to_vec()), "{routing:?}");
        for (got, expected) in routing.iter().zip(expected) {
            assert!((got.1 - expected.1).abs() <= 2e-7 * expected.1.abs(), "{routing:?}, not {expected:?}");
        }
    }

    fn sigmoid(x: f32) -> f32 {
        (1.0 / (1.0 + (-f64::from(x)).exp())) as f32
    }

    #[test]
    fn softmax_over_all_and_over_the_chosen_agree_where_weights_are_rescaled() {
        let logits = [0.3, -2.0, 1.5, 1.4, -7.0, 0.31];
        for top_k in 1..=6 {
            let all = RouterRule::softmax(top_k, true).route(&logits);
            let chosen = RouterRule { scores: RouterScores::SoftmaxOfChosen, ..RouterRule::softmax(top_k, false) };
            close(&chosen.route(&logits), &all);
            assert_eq!(all, route_row(&logits, top_k, true));
        }
        let e = f64::from(0.1f32).exp();
        let two = [(2, (e / (1.0 + e)) as f32), (3, (1.0 / (1.0 + e)) as f32)];
        assert_eq!(experts(&RouterRule::softmax(2, true).route(&logits)), [2, 3]);
        let off = RouterRule { scores: RouterScores::SoftmaxOfChosen, ..RouterRule::softmax(2, false) }.route(&logits);
        assert!(off.iter().zip(two).all(|(a, b)| (a.1 - b.1).abs() < 1e-6), "{off:?}");
    }

    #[test]
    fn ties_go_to_the_lower_expert() {
        let all = [RouterScores::Softmax, RouterScores::SoftmaxOfChosen];
        let sigmoid = RouterScores::Sigmoid { bias: None, groups: 1, top_groups: 1 };
        for scores in all.into_iter().chain([sigmoid]) {
            let rule = RouterRule { top_k: 3, scores, renormalize: None, scale: 1.0 };
            assert_eq!(experts(&rule.route(&[0.5; 7])), [0, 1, 2], "{rule:?}");
            assert_eq!(experts(&rule.route(&[0.5, 1.0, 0.5, 0.5, 1.0])), [0, 1, 4], "{rule:?}");
            assert_eq!(experts(&rule.route(&[-1.0, -0.0, 0.0, -0.0, -3.0])), [1, 2, 3], "{rule:?}");
            let one = RouterRule { top_k: 1, ..rule };
            assert_eq!(experts(&one.route(&[-1.0, -0.0, 0.0])), [1], "{one:?}");
        }
        // Of groups that are equal, the lower ones; within them, the lower experts.
        assert_eq!(experts(&sigmoid_rule(3, None, 4, 2).route(&[1.0; 8])), [0, 1, 2]);
    }

    #[test]
    fn the_correction_bias_chooses_and_does_not_weigh() {
        let logits = [2.0, 1.0, -1.0, 0.0];
        let bias = [-1.0, 0.0, 0.7, 0.0];
        let [b, c] = [sigmoid(1.0), sigmoid(-1.0)];
        close(&sigmoid_rule(2, Some(&bias), 1, 1).route(&logits), &[(1, 2.5 * b / (b + c)), (2, 2.5 * c / (b + c))]);
        let plain = RouterRule { renormalize: None, scale: 1.0, ..sigmoid_rule(2, Some(&bias), 1, 1) };
        close(&plain.route(&logits), &[(1, b), (2, c)]);
        // minimax_m2: no epsilon, no factor.
        let minimax = RouterRule { renormalize: Some(0.0), ..plain };
        close(&minimax.route(&logits), &[(1, b / (b + c)), (2, c / (b + c))]);
    }

    #[test]
    fn groups_are_chosen_by_their_two_best() {
        // The best expert of all is in a group whose second is poor.
        let logits = [9.0, -9.0, -9.0, 1.0, 1.0, -9.0, 0.5, 0.4, 0.3];
        let rule = RouterRule { renormalize: None, scale: 1.0, ..sigmoid_rule(2, None, 3, 1) };
        close(&rule.route(&logits), &[(3, sigmoid(1.0)), (4, sigmoid(1.0))]);
        close(&RouterRule { top_k: 3, ..sigmoid_rule(1, None, 3, 2) }.route(&logits), &{
            let [a, b] = [sigmoid(1.0), sigmoid(0.5)];
            let sum = a + a + b;
            [(3, 2.5 * a / sum), (4, 2.5 * a / sum), (6, 2.5 * b / sum)]
        });
    }

    #[test]
    fn experts_outside_the_groups_are_never_chosen_whatever_the_bias() {
        // All of the best group but two have -inf, as have those outside.
        let none = f32::NEG_INFINITY;
        let bias = [none, none, none, none, none, 3.0, 3.0, none];
        let rule = RouterRule { renormalize: None, scale: 1.0, ..sigmoid_rule(4, Some(&bias), 2, 1) };
        assert_eq!(experts(&rule.route(&[1.0; 8])), [4, 5, 6, 7]);
        // Biases below -1 leave all scores negative, which must not lose against those left out.
        let bias = [-5.0, -5.0, -4.0, -4.0];
        assert_eq!(experts(&sigmoid_rule(2, Some(&bias), 2, 1).route(&[0.0; 4])), [2, 3]);
        // All -inf: the first group, the first experts.
        assert_eq!(experts(&sigmoid_rule(2, Some(&[none; 4]), 2, 1).route(&[0.0; 4])), [0, 1]);
    }

    #[test]
    fn extreme_logits_give_finite_weights_and_no_number_stays_none() {
        let low = [-1e30f32; 4];
        for rule in [sigmoid_rule(2, None, 1, 1), RouterRule::softmax(2, true)] {
            assert!(rule.route(&low).iter().all(|c| c.1.is_finite()), "{rule:?}");
        }
        assert_eq!(sigmoid_rule(2, None, 1, 1).route(&low), [(0, 0.0), (1, 0.0)], "0 / 1e-20");
        for rule in [
            sigmoid_rule(2, None, 1, 1),
            sigmoid_rule(2, None, 2, 1),
            RouterRule::softmax(2, false),
            RouterRule { scores: RouterScores::SoftmaxOfChosen, ..RouterRule::softmax(2, false) },
        ] {
            let routing = rule.route(&[1.0, 2.0, f32::NAN, 0.0]);
            assert!(routing.iter().any(|c| c.1.is_nan()), "{rule:?}: {routing:?}");
        }
    }

    #[test]
    fn one_expert_takes_all() {
        close(&RouterRule::softmax(1, true).route(&[-3.0]), &[(0, 1.0)]);
        close(&RouterRule::softmax(1, false).route(&[-3.0]), &[(0, 1.0)]);
        close(&sigmoid_rule(1, Some(&[0.3]), 1, 1).route(&[-3.0]), &[(0, 2.5)]);
        let rule = RouterRule { scores: RouterScores::SoftmaxOfChosen, ..RouterRule::softmax(1, false) };
        close(&rule.route(&[-3.0]), &[(0, 1.0)]);
    }

    #[test]
    fn rules_that_do_not_fit_are_refused() {
        assert_eq!(RouterRule::softmax(4, true).check(4), Ok(()));
        assert_eq!(RouterRule::softmax(5, true).check(4), Err(RouterRuleError::TopK { top_k: 5, available: 4 }));
        assert_eq!(RouterRule::softmax(0, true).check(4), Err(RouterRuleError::TopK { top_k: 0, available: 4 }));
        assert_eq!(sigmoid_rule(4, Some(&[0.0; 8]), 4, 2).check(8), Ok(()));
        let too_many = RouterRuleError::TopK { top_k: 5, available: 4 };
        assert_eq!(sigmoid_rule(5, None, 4, 2).check(8), Err(too_many), "of the experts of two groups");
        assert_eq!(
            sigmoid_rule(2, Some(&[0.0; 7]), 1, 1).check(8),
            Err(RouterRuleError::Bias { found: 7, experts: 8 })
        );
        for (groups, top_groups) in [(3, 1), (0, 1), (4, 0), (4, 5), (8, 4)] {
            let refused = Err(RouterRuleError::Groups { experts: 8, groups, top_groups });
            assert_eq!(sigmoid_rule(1, None, groups, top_groups).check(8), refused);
        }
    }
}
