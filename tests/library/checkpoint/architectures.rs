//! Checkpoints of the architectures that QAT and QAD ship: every tensor is found under the plain text model's names, and
//! quantized weights are those of the BF16 model within what their format loses.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::support::fixtures::{self, FLOAT_BOUND, Fixture, QUANTIZED_BOUND, cpu, shared_folder};
use recoup::checkpoint::Checkpoint;
use recoup::checkpoint::resolve::LinearRole;
use recoup::formats::linear::{BlockScales, Element, LinearTensors};

fn folder(name: &str) -> Option<PathBuf> {
    let folder = shared_folder().join("fixtures-models").join(name);
    let there = folder.is_dir();
    assert!(there || std::env::var_os("RECOUP_SHARED").is_none(), "{} is missing", folder.display());
    there.then_some(folder)
}

/// A checkpoint's linears with their roles, and the modules that attend, by the names and shapes of its own tensors.
struct Plan {
    linears: Vec<(String, LinearRole)>,
    attentions: BTreeSet<String>,
}

fn may_be_plain(module: &str) -> bool {
    ["lm_head", "embed_tokens", "embeddings", "gate", "router", "shared_expert_gate"]
        .iter()
        .any(|end| module.rsplit('.').next() == Some(end))
}

fn plan(c: &Checkpoint) -> Plan {
    let mut linears = Vec::new();
    let mut attentions = BTreeSet::new();
    for name in c.tensors.names() {
        let view = c.tensors.peek(name).unwrap();
        let packed = if view.dtype == safetensors::Dtype::U8 { 2 } else { 1 };
        if let Some(module) = name.strip_suffix("_proj.k_scale").or_else(|| name.strip_suffix("_proj.weight")) {
            attentions.extend(module.strip_suffix(".k").map(str::to_owned));
        }
        let mut add = |module: String, [n, k]: [usize; 2], bias: bool| {
            let role = LinearRole { n, k, bias, may_be_plain: may_be_plain(&module) };
            linears.push((module, role));
        };
        if let (Some(module), [n, k]) = (name.strip_suffix(".weight"), view.shape) {
            add(module.to_owned(), [*n, k * packed], c.tensors.contains(&format!("{module}.bias")));
        }
        let Some((experts, part)) = name.split_once(".mlp.experts.") else { continue };
        let of = |expert: usize, which: &str| format!("{experts}.mlp.experts.{expert}.{which}_proj");
        // Fused: the dimension of the outputs is the last but for OpenAI's.
        let shape: Option<[usize; 3]> = match (part, view.shape) {
            ("gate_up_proj" | "down_proj", &[e, k, n]) => Some([e, n, k * packed]),
            ("gate_up_proj_blocks" | "down_proj_blocks", &[e, n, blocks, 16]) => Some([e, n, blocks * 32]),
            _ => None,
        };
        for (expert, [e, n, k]) in (0..).zip(shape.into_iter().flat_map(|s| vec![s; s[0]])) {
            assert!(expert < e);
            if part.starts_with("gate_up") {
                ["gate", "up"].iter().for_each(|w| add(of(expert, w), [n / 2, k], true));
            } else {
                add(of(expert, "down"), [n, k], true);
            }
        }
    }
    Plan { linears, attentions }
}

/// Takes everything that the text model has, and checks that nothing is left.
fn take_all<'a>(c: &'a Checkpoint, name: &str) -> Vec<LinearTensors<'a>> {
    let plan = plan(c);
    let linears: Vec<LinearTensors> = plan
        .linears
        .iter()
        .map(|(module, role)| {
            assert!(c.has_linear(module), "{name}: {module}");
            c.linear(module, *role).unwrap_or_else(|e| panic!("{name}: {e}"))
        })
        .collect();
    for module in &plan.attentions {
        assert_eq!(c.kv_scales(module).unwrap().is_some(), c.announced.fp8_kv_cache, "{name}: {module}");
    }
    let scales = ["_scale", "_scale_2", "_scale_inv"];
    for tensor in c.tensors.unused() {
        assert!(!scales.iter().any(|s| tensor.ends_with(s)), "{name}: {tensor} is left");
        let shape = c.tensors.peek(&tensor).unwrap().shape.to_vec();
        c.floats(&tensor, &shape).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    c.finish().unwrap_or_else(|e| panic!("{name}: {e}"));
    linears
}

/// ‖a - b‖ / ‖b‖.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let squares = |v: &mut dyn Iterator<Item = f32>| v.map(|x| f64::from(x).powi(2)).sum::<f64>();
    (squares(&mut a.iter().zip(b).map(|(a, b)| a - b)) / squares(&mut b.iter().copied())).sqrt()
}

/// The root mean square error that a format may leave of a weight; powers of two as scales cost the most.
fn lost(linear: &LinearTensors) -> f64 {
    match (linear.element, &linear.block_scales) {
        (Element::E2m1, BlockScales::E8m0 { .. }) => 0.16,
        (Element::E2m1, _) => 0.13,
        (Element::E4m3, _) => 0.04,
        _ => 0.0,
    }
}

/// Reads `quantized` and compares its weights with those of `plain`; how many were quantized.
fn compare(quantized: &Path, plain: &Path) -> usize {
    let name = quantized.display().to_string();
    let c = Checkpoint::open(quantized).unwrap_or_else(|e| panic!("{name}: {e}"));
    let reference = Checkpoint::open(plain).unwrap();
    let mut count = 0;
    for linear in take_all(&c, &name) {
        let role = LinearRole { n: linear.n, k: linear.k, bias: linear.bias.is_some(), may_be_plain: true };
        let expected = reference.linear(&linear.name, role).unwrap_or_else(|e| panic!("{name}: {e}"));
        let error = distance(&linear.decode(), &expected.decode());
        assert!(error <= lost(&linear), "{name}: {} ({:?}) is {error} off", linear.name, linear.element);
        assert_eq!(linear.bias, expected.bias, "{name}: {}", linear.name);
        count += usize::from(!linear.element.is_float());
    }
    count
}

#[test]
fn every_architecture_resolves_under_its_plain_names_and_its_weights_are_the_bf16_models() {
    // Model, configuration, and how many of its quantized linears are compared.
    let models = [
        ("nemotron_h", "nvfp4", 18),
        ("nemotron_h", "nvfp4_kv_fp8", 22),
        ("nemotron_h", "nvfp4_kv_cast", 18),
        ("nemotron_h", "mixed_lightning", 17),
        ("nemotron_h", "mixed_super", 22),
        ("nemotron_h", "mixed_nano4b", 14),
        ("nemotron_h_vl", "nvfp4", 12),
        ("gpt_oss", "nvfp4", 39),
        ("qwen3_5", "nvfp4", 25),
        ("qwen3_5", "mixed_w4a16_fp8_kv_cast", 26),
        ("qwen3_5_moe", "nvfp4", 55),
        ("qwen3_5_moe", "mixed_w4a16_fp8_kv_cast", 56),
        ("nemotron_nas", "nvfp4", 18),
        ("gemma3", "nvfp4", 28),
        ("mixtral", "nvfp4", 48),
        ("ministral3", "nvfp4", 21),
        ("glm4_moe", "nvfp4", 45),
        ("deepseek_v3", "nvfp4", 48),
        ("phi3", "nvfp4", 12),
        ("minimax_m2", "nvfp4", 48),
    ];
    for (model, config, quantized) in models {
        let Some(root) = folder(&format!("modelopt/{model}")) else { return };
        let (plain, folder) = (root.join("bf16"), root.join(config));
        // Models of their own, with nothing to compare.
        let found = if ["mixed_super", "mixed_nano4b"].contains(&config) {
            let c = Checkpoint::open(&folder).unwrap();
            take_all(&c, config).iter().filter(|l| !l.element.is_float()).count()
        } else {
            take_all(&Checkpoint::open(&plain).unwrap(), model);
            compare(&folder, &plain)
        };
        assert_eq!(found, quantized, "{model}/{config}");
    }
}

#[test]
fn fused_experts_in_mxfp4_are_those_of_the_bf16_model() {
    let Some(root) = folder("native/gpt_oss/mxfp4") else { return };
    // Three layers of three experts of three projections.
    assert_eq!(compare(&root, &root.join("../../../modelopt/gpt_oss/bf16")), 27);
}

#[test]
fn deepseeks_own_blocks_resolve() {
    let Some(root) = folder("native/deepseek_v3/fp8_block") else { return };
    let c = Checkpoint::open(&root).unwrap();
    let blocks = take_all(&c, "deepseek_v3").into_iter().filter(|l| matches!(l.block_scales, BlockScales::Grid { .. }));
    assert_eq!(blocks.count(), 28);
}

#[test]
fn what_a_text_model_does_not_use_is_told_with_its_size() {
    for (name, part) in [
        ("modelopt/nemotron_h/mixed_super", "5 tensor(s) of `mtp.` (36320 bytes)"),
        ("modelopt/nemotron_h_vl/nvfp4", "tensor(s) of `vision_model.` ("),
        ("modelopt/nemotron_h_vl/nvfp4", "3 tensor(s) of `mlp1.` ("),
        ("modelopt/qwen3_5/nvfp4", "tensor(s) of `model.visual.` ("),
        ("modelopt/nemotron_h/nvfp4", "is read as `lm_head`"),
    ] {
        let Some(folder) = folder(name) else { return };
        let notes = Checkpoint::open(&folder).unwrap().notes;
        assert!(notes.iter().any(|n| n.contains(part)), "{name}: `{part}` is not in {notes:?}");
    }
}

#[test]
fn fp_quant_models_compute_the_logits_of_its_own_forward() {
    for config in ["bf16", "nvfp4", "mxfp4", "mxfp4_abs_max"] {
        let Some(folder) = folder(&format!("fp_quant/llama/{config}")) else { return };
        let fixture = Fixture { name: config.into(), folder };
        let decoder = fixture.load(cpu(2));
        let got = fixtures::logits(&decoder, &fixture.input_ids());
        let deviation = fixtures::deviation(&got, &fixture.golden_logits());
        let bound = if config == "bf16" { FLOAT_BOUND } else { QUANTIZED_BOUND };
        assert!(deviation < bound, "{config}: {deviation}");
    }
}
