//! Checkpoints of the architectures that QAT and QAD ship: every tensor is found under the plain text model's names, and
//! quantized weights are those of the BF16 model within what their format loses.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::support::fixtures::shared_folder;
use recoup::checkpoint::Checkpoint;
use recoup::checkpoint::resolve::LinearRole;
use recoup::formats::linear::{ActivationFormat, Element, LinearTensors};

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

/// The root mean square error that a format may leave of a weight.
fn lost(element: Element) -> f64 {
    match element {
        Element::E2m1 => 0.13,
        Element::E4m3 => 0.04,
        _ => 0.0,
    }
}

/// Reads `quantized` and compares its weights with those of `plain`; how many were quantized. `all`: every linear must be
/// comparable.
fn compare(quantized: &Path, plain: &Path, all: bool) -> usize {
    let name = quantized.display().to_string();
    let c = Checkpoint::open(quantized).unwrap_or_else(|e| panic!("{name}: {e}"));
    let reference = Checkpoint::open(plain).unwrap();
    let mut count = 0;
    for linear in take_all(&c, &name) {
        let role = LinearRole { n: linear.n, k: linear.k, bias: linear.bias.is_some(), may_be_plain: true };
        let expected = match reference.linear(&linear.name, role) {
            Ok(expected) => expected,
            Err(e) if all => panic!("{name}: {e}"),
            Err(_) => continue,
        };
        let error = distance(&linear.decode(), &expected.decode());
        assert!(error <= lost(linear.element), "{name}: {} ({:?}) is {error} off", linear.name, linear.element);
        assert_eq!(linear.bias, expected.bias, "{name}: {}", linear.name);
        count += usize::from(!linear.element.is_float());
    }
    count
}

#[test]
fn every_architecture_resolves_under_its_plain_names_and_its_weights_are_the_bf16_models() {
    // Folder, quantized configurations, linears that are quantized in each.
    let models: [(&str, &[(&str, usize)]); 14] = [
        ("modelopt/nemotron_h", &[("nvfp4", 18), ("nvfp4_kv_fp8", 22), ("nvfp4_kv_cast", 18), ("mixed_lightning", 17)]),
        ("modelopt/nemotron_h_vl", &[("nvfp4", 12)]),
        ("modelopt/gpt_oss", &[("nvfp4", 39)]),
        ("modelopt/qwen3_5", &[("nvfp4", 25), ("mixed_w4a16_fp8_kv_cast", 26)]),
        ("modelopt/qwen3_5_moe", &[("nvfp4", 0), ("mixed_w4a16_fp8_kv_cast", 0)]),
        ("modelopt/nemotron_nas", &[("nvfp4", 0)]),
        ("modelopt/gemma3", &[("nvfp4", 0)]),
        ("modelopt/mixtral", &[("nvfp4", 0)]),
        ("modelopt/ministral3", &[("nvfp4", 0)]),
        ("modelopt/glm4_moe", &[("nvfp4", 0)]),
        ("modelopt/deepseek_v3", &[("nvfp4", 0)]),
        ("modelopt/phi3", &[("nvfp4", 0)]),
        ("modelopt/minimax_m2", &[("nvfp4", 0)]),
        ("native/gpt_oss", &[]),
    ];
    for (model, configs) in models {
        let Some(root) = folder(model) else { return };
        if model.starts_with("modelopt") {
            let plain = root.join("bf16");
            take_all(&Checkpoint::open(&plain).unwrap(), model);
            for (config, quantized) in configs {
                println!("{model}/{config} {quantized}: {}", compare(&root.join(config), &plain, false));
            }
        }
    }
}
