//! A mixture of experts whose gradient reaches its router: through the weights of the experts that are chosen. Which are
//! chosen is constant.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::host;
use crate::logits::{RouterRule, RouterScores, Routing};

/// Weights [rows, top_k] of what `routing` chose of router logits [rows, experts], in its order.
pub(super) fn weights(logits: &Tensor, rule: &RouterRule, routing: &[Routing]) -> Result<Tensor> {
    logits.contiguous()?.apply_op1(Weights { rule: rule.clone(), routing: routing.to_vec() })
}

struct Weights {
    rule: RouterRule,
    routing: Vec<Routing>,
}

impl CustomOp1 for Weights {
    fn name(&self) -> &'static str {
        "router weights"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let weights = self.routing.iter().flatten().map(|(_, weight)| *weight).collect();
        Ok((CpuStorage::F32(weights), Shape::from((self.routing.len(), self.rule.top_k))))
    }

    fn bwd(&self, logits: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let experts = logits.dims().last().copied().unwrap_or(1).max(1);
        let d_logits = host::with(logits, |logits| {
            host::with(grad, |grad| {
                let mut out = vec![0.0; logits.len()];
                let rows = logits.chunks_exact(experts).zip(out.chunks_exact_mut(experts));
                for (((logits, out), routing), grad) in rows.zip(&self.routing).zip(grad.chunks_exact(self.rule.top_k))
                {
                    let chosen: Vec<usize> = routing.iter().map(|(expert, _)| *expert).collect();
                    gradient(&self.rule, logits, &chosen, grad, out);
                }
                Ok(out)
            })
        })?;
        Ok(Some(Tensor::from_vec(d_logits, logits.shape(), logits.device())?))
    }
}

/// dL/d(logits) of one row, of dL/d(weights) of the experts `chosen`.
fn gradient(rule: &RouterRule, logits: &[f32], chosen: &[usize], grad: &[f32], out: &mut [f32]) {
    let all: Vec<usize> = (0..logits.len()).collect();
    // The experts whose logits count, and the scores of all.
    let (among, scores) = match rule.scores {
        RouterScores::Softmax => (&all[..], softmax(logits, &all)),
        RouterScores::SoftmaxOfChosen => (chosen, softmax(logits, chosen)),
        RouterScores::Sigmoid { .. } => (chosen, logits.iter().map(|v| 1.0 / (1.0 + (-v).exp())).collect()),
    };
    let mut grad: Vec<f32> = grad.iter().map(|g| g * rule.scale).collect();
    if let Some(epsilon) = rule.renormalize {
        // w = s / S: ds = (dw - Σ dw w) / S.
        let total = chosen.iter().map(|e| scores[*e]).sum::<f32>() + epsilon;
        let along: f32 = chosen.iter().zip(&grad).map(|(e, g)| g * scores[*e] / total).sum();
        grad.iter_mut().for_each(|g| *g = (*g - along) / total);
    }
    for (expert, grad) in chosen.iter().zip(&grad) {
        out[*expert] = *grad;
    }
    if let RouterScores::Sigmoid { .. } = rule.scores {
        return among.iter().for_each(|&e| out[e] *= scores[e] * (1.0 - scores[e]));
    }
    let along: f32 = among.iter().map(|&e| out[e] * scores[e]).sum();
    among.iter().for_each(|&e| out[e] = scores[e] * (out[e] - along));
}

/// Softmax over the logits of `among`; 0 elsewhere.
fn softmax(logits: &[f32], among: &[usize]) -> Vec<f32> {
    let max = among.iter().fold(f32::NEG_INFINITY, |m, &e| m.max(logits[e]));
    let mut out = vec![0.0; logits.len()];
    among.iter().for_each(|&e| out[e] = (logits[e] - max).exp());
    let total: f32 = out.iter().sum();
    out.iter_mut().for_each(|v| *v /= total);
    out
}
