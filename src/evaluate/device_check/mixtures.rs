//! Mixtures of experts: every rule of a router and every activation of experts.

use super::{Checked, Failure, PRODUCT, REQUANTIZED, Side, deviation, of};
use crate::backend::{Activation, Backend, BackendError, Ffn};
use crate::formats::linear::{ActivationFormat, Element, LinearTensors};
use crate::formats::synthetic::{self, Blocks, WEIGHTS};
use crate::logits::{RouterRule, RouterScores};
use crate::random::SplitMix64;

const EXPERTS: usize = 6;

/// A mixture and how many tokens it is given.
struct Case {
    router: &'static str,
    rule: RouterRule,
    activation: Activation,
    rows: usize,
}

fn cases() -> Vec<Case> {
    let case = |router, rule, activation, rows| Case { router, rule, activation, rows };
    let bias = || Some([0.5, -0.25, 0.0, 0.75, -0.5, 0.25].into());
    let sigmoid = |top_k, bias, groups, top_groups, scale| RouterRule {
        top_k,
        scores: RouterScores::Sigmoid { bias, groups, top_groups },
        renormalize: Some(1e-20),
        scale,
    };
    let of_chosen = RouterRule { scores: RouterScores::SoftmaxOfChosen, ..RouterRule::softmax(2, false) };
    let clamped = Activation::ClampedSwiglu { limit: 1.5 };
    vec![
        case("softmax, rescaled", RouterRule::softmax(2, true), Activation::Silu, 1),
        case("softmax", RouterRule::softmax(2, false), Activation::Silu, 5),
        case("softmax, rescaled", RouterRule::softmax(2, true), Activation::Silu, 40),
        case("softmax of the chosen", of_chosen.clone(), clamped, 1),
        case("softmax of the chosen", of_chosen, clamped, 40),
        case("sigmoid", sigmoid(3, None, 1, 1, 1.0), Activation::GeluTanh, 5),
        case("sigmoid, corrected", sigmoid(2, bias(), 1, 1, 2.5), Activation::Silu, 5),
        case("sigmoid, corrected, in groups", sigmoid(3, bias(), 3, 2, 2.5), Activation::Relu2, 1),
        case("sigmoid, corrected, in groups", sigmoid(2, bias(), 2, 1, 2.5), Activation::Relu2, 40),
    ]
}

/// Compares them on `device`, experts stored as `weight` says.
///
/// # Errors
/// The device's own.
pub(super) fn check<A: Backend, B: Backend>(
    cpu: &A,
    device: &B,
    seed: u64,
    weight: (Element, Blocks),
    out: &mut Vec<Checked>,
) -> Result<(), Failure> {
    for case in cases() {
        let Case { router, rule, activation, rows } = &case;
        let (element, blocks) = weight;
        let what = format!(
            "mixture of {EXPERTS} experts, {element:?} {blocks:?}, {activation:?}, {rows} rows, top {} by {router}",
            rule.top_k
        );
        let expected = Side { backend: cpu }.mixture(seed, weight, &case).map_err(of(&what))?;
        let got = Side { backend: device }.mixture(seed, weight, &case).map_err(of(&what))?;
        let allowed = if input_of(weight) == ActivationFormat::Float { 10.0 * PRODUCT } else { REQUANTIZED };
        out.push(Checked { what, deviation: deviation(&got, &expected), allowed });
    }
    Ok(())
}

/// What experts stored as `weight` says have their inputs quantized to.
fn input_of(weight: (Element, Blocks)) -> ActivationFormat {
    match weight.0 {
        Element::E2m1 => ActivationFormat::Nvfp4 { global_scale: 0.01 },
        Element::E4m3 => ActivationFormat::Fp8Group,
        _ => ActivationFormat::Float,
    }
}

impl<B: Backend> Side<'_, B> {
    fn mixture(&self, seed: u64, weight: (Element, Blocks), case: &Case) -> Result<Vec<f32>, BackendError> {
        let (hidden, middle) = (64, 96);
        let b = self.backend;
        let mut r = SplitMix64(seed);
        let mut layer = |n, k, weight, activation| {
            let layer = synthetic::layer(&mut r, n, k, weight, activation);
            b.load_linear(LinearTensors { pre_quant_scale: None, ..layer })
        };
        let router = layer(EXPERTS, hidden, WEIGHTS[2], ActivationFormat::Float)?;
        let mut part = |n, k| layer(n, k, weight, input_of(weight));
        let gated = case.activation.is_gated();
        let gates: Vec<B::Linear> =
            (0..if gated { EXPERTS } else { 0 }).map(|_| part(middle, hidden)).collect::<Result<_, _>>()?;
        let others: Vec<[B::Linear; 2]> = (0..EXPERTS)
            .map(|_| Ok([part(middle, hidden)?, part(hidden, middle)?]))
            .collect::<Result<_, BackendError>>()?;
        let experts: Vec<Ffn<'_, B::Linear>> = others
            .iter()
            .enumerate()
            .map(|(at, [up, down])| Ffn { gate: gates.get(at), up, down, activation: case.activation })
            .collect();
        let x = b.tensor((0..case.rows * hidden).map(|_| synthetic::uniform(&mut r)).collect(), hidden)?;
        b.to_host(&b.mixture(&x, &x, &router, &experts, &case.rule)?)
    }
}
