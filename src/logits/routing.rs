//! Which experts a token goes to, from a row of a router's logits.

/// Experts chosen for one token: (expert, weight), ascending by expert, so that sums do not depend on the batch.
pub type Routing = Vec<(usize, f32)>;

/// Softmax over one row of router logits and its `top_k` experts (ties go to the lower index), their weights rescaled to
/// one if `normalize`.
#[must_use]
pub fn route_row(logits: &[f32], top_k: usize, normalize: bool) -> Routing {
    let max = logits.iter().fold(f32::NEG_INFINITY, |m, &v| m.max(v));
    let weights: Vec<f32> = logits.iter().map(|&v| libm::expf(v - max)).collect();
    let total: f32 = weights.iter().sum();
    let mut chosen: Routing = weights.iter().map(|w| w / total).enumerate().collect();
    chosen.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    chosen.truncate(top_k);
    if normalize {
        let kept: f32 = chosen.iter().map(|c| c.1).sum();
        chosen.iter_mut().for_each(|c| c.1 /= kept);
    }
    chosen.sort_by_key(|c| c.0);
    chosen
}
