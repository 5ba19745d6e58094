//! Every checkpoint that other tools wrote computes here what it computes when deployed.

use crate::support::fixtures::{
    FLOAT_BOUND, Fixture, Report, all_fixtures, bits, deviation, is_full, logits, own_fixtures,
};
use recoup::backend::Backend;
use recoup::backend::cpu::{CpuBackend, isa::Isa};
use recoup::checkpoint::Checkpoint;
use recoup::formats::linear::{ActivationFormat, LinearTensors};
use recoup::model::{Decoder, ModelConfig};

/// Where the reference ran in f32 and in f64 and only the f64 run is golden: each holds an activation of -6.75 times
/// its scale up to the rounding of f32, a tie between two codes, which exact arithmetic decides the other way.
const TIES: [&str; 2] = ["modelopt/llama/nvfp4_four_over_six", "modelopt/qwen3/fp8"];

fn cpu(isa: Isa) -> CpuBackend {
    CpuBackend::new(isa, 2).unwrap()
}

/// Calls `f` with each linear whose input and output the reference holds.
fn for_each_traced_linear(fixture: &Fixture, mut f: impl FnMut(&LinearTensors<'_>, &[f32], &[f32], &[f32])) -> usize {
    let (checkpoint, reference) = (fixture.checkpoint(), fixture.reference());
    let mut traced = 0;
    for module in ModelConfig::read(&checkpoint.config).unwrap().modules() {
        let get = |what: &str| reference.get(&format!("{}.{what}", module.name)).map(|t| &t.values[..]);
        let (Some(input), Some(quantized), Some(output)) = (get("input"), get("input_fake_quant"), get("output"))
        else {
            continue;
        };
        let linear = checkpoint.linear(&module.name, module.role).unwrap();
        f(&linear, input, quantized, output);
        traced += 1;
    }
    traced
}

#[test]
fn every_checkpoint_gives_the_logits_it_gives_when_deployed() {
    let mut report = Report::default();
    for fixture in all_fixtures() {
        let got = logits(&fixture.load(cpu(Isa::detect())), &fixture.input_ids());
        report.check(&fixture.name, deviation(&got, &fixture.golden_logits()), fixture.bound());
    }
    report.finish();
}

#[test]
fn only_the_two_known_ties_need_the_reference_in_f64() {
    for name in TIES {
        let fixture = Fixture::own(name);
        let (f32_run, f64_run) = (fixture.reference().remove("logits").unwrap().values, fixture.f64_logits().unwrap());
        let apart = deviation(&f32_run, &f64_run);
        println!("{name}: the reference in f32 is {apart:.2e} from itself in f64");
        assert!(apart > fixture.bound(), "{name} is no exception any more");
    }
    let excepted: Vec<_> = own_fixtures().into_iter().filter(|f| f.f64_logits().is_some()).map(|f| f.name).collect();
    assert_eq!(excepted, TIES);
}

#[test]
fn the_given_inputs_quantize_to_the_given_values_in_every_element() {
    let mut traced = 0;
    for fixture in all_fixtures() {
        traced += for_each_traced_linear(&fixture, |linear, input, quantized, _| {
            let mut ours = input.to_vec();
            for row in ours.chunks_exact_mut(linear.k) {
                if let Some(scale) = &linear.pre_quant_scale {
                    row.iter_mut().zip(scale).for_each(|(x, s)| *x *= s);
                }
                linear.activation.fake_quantize(row);
            }
            let different = ours.iter().zip(quantized).filter(|(a, b)| a != b).count();
            let (name, module) = (&fixture.name, &linear.name);
            assert!(different == 0, "{name}, {module}: {different} of {} elements differ", ours.len());
        });
    }
    println!("{traced} linears");
    assert!(traced >= if is_full() { 60 } else { 20 }, "{traced}");
}

#[test]
fn the_packed_kernels_of_every_instruction_set_give_the_given_outputs() {
    let mut report = Report::default();
    for isa in Isa::available() {
        let backend = cpu(isa);
        for fixture in all_fixtures() {
            for_each_traced_linear(&fixture, |linear, input, _, output| {
                let packed = backend.load_linear(linear.clone()).unwrap();
                let x = backend.tensor(input.to_vec(), linear.k).unwrap();
                let y = backend.linears(&x, &[&packed]).unwrap().remove(0);
                let got = backend.to_host(&y).unwrap();
                report.check(&format!("{isa} {} {}", fixture.name, linear.name), deviation(&got, output), 1e-5);
            });
        }
    }
    report.finish();
}

#[test]
fn the_fixtures_cover_every_weight_and_activation_format_of_both_dialects() {
    let mut found: Vec<String> = Vec::new();
    for fixture in all_fixtures() {
        let checkpoint = fixture.checkpoint();
        let dialect = checkpoint.announced.dialect.to_string();
        let config = ModelConfig::read(&checkpoint.config).unwrap();
        for module in config.modules().iter().filter(|m| m.is_block_linear()) {
            let linear = checkpoint.linear(&module.name, module.role).unwrap();
            let scaled = if linear.pre_quant_scale.is_some() { ", scaled" } else { "" };
            found.push(format!("{dialect}: {} x {}{scaled}", linear.weight_format(), linear.activation));
            if let ActivationFormat::Mxfp4 { rule } | ActivationFormat::Mxfp8 { rule } = linear.activation {
                found.push(format!("{dialect}: rule {rule:?}"));
            }
        }
        if checkpoint.announced.fp8_kv_cache {
            found.push(format!("{dialect}: fp8 KV cache"));
        }
    }
    found.sort();
    found.dedup();
    let expected = [
        "compressed-tensors: fp8 128x128 x fp8 per 128",
        "compressed-tensors: fp8 per channel x fp8 per token",
        "compressed-tensors: fp8 x fp8 static",
        "compressed-tensors: mxfp4 x float",
        "compressed-tensors: mxfp4 x mxfp4",
        "compressed-tensors: mxfp8 x mxfp8",
        "compressed-tensors: nvfp4 x float",
        "compressed-tensors: nvfp4 x nvfp4",
        "compressed-tensors: rule Even",
        "fp8 (DeepSeek): fp8 128x128 x fp8 per 128",
        "modelopt: fp8 128x128 x float",
        "modelopt: fp8 KV cache",
        "modelopt: fp8 per channel x fp8 per token",
        "modelopt: fp8 x fp8 static",
        "modelopt: mxfp4 x mxfp4",
        "modelopt: mxfp8 x mxfp8",
        "modelopt: nvfp4 block 32 x fp8 static",
        "modelopt: nvfp4 x float",
        "modelopt: nvfp4 x nvfp4",
        "modelopt: nvfp4 x nvfp4, scaled",
        "modelopt: rule Ceil",
        "plain: bf16 x float",
    ];
    // In the full set only: what is here in the other dialect, MXFP8, and FP8 activations on NVFP4 weights.
    let elsewhere = [
        "compressed-tensors: fp8 x fp8 static",
        "compressed-tensors: mxfp4 x float",
        "compressed-tensors: mxfp4 x mxfp4",
        "compressed-tensors: mxfp8 x mxfp8",
        "compressed-tensors: nvfp4 x float",
        "compressed-tensors: rule Even",
        "modelopt: fp8 128x128 x float",
        "modelopt: fp8 per channel x fp8 per token",
        "modelopt: mxfp8 x mxfp8",
        "modelopt: nvfp4 block 32 x fp8 static",
        "modelopt: nvfp4 x nvfp4, scaled",
    ];
    let wanted = expected.iter().filter(|e| is_full() || !elsewhere.contains(e));
    let missing: Vec<_> = wanted.filter(|e| !found.iter().any(|f| f == *e)).collect();
    assert!(missing.is_empty(), "missing {missing:#?} in {found:#?}");
}

#[test]
fn a_config_in_the_keys_of_transformers_4_gives_the_same_logits() {
    for name in ["llama_rope_llama3", "qwen3_moe_sparse_step"] {
        let fixture = Fixture::own(&format!("transformers/{name}"));
        let folder = tempfile::tempdir().unwrap();
        std::fs::copy(fixture.folder.join("config_v4.json"), folder.path().join("config.json")).unwrap();
        let weights = "model.safetensors";
        std::fs::copy(fixture.folder.join(weights), folder.path().join(weights)).unwrap();
        let old = Decoder::load(cpu(Isa::detect()), &Checkpoint::open(folder.path()).unwrap()).unwrap();
        let ids = fixture.input_ids();
        let got = logits(&old, &ids);
        assert!(bits(&got) == bits(&logits(&fixture.load(cpu(Isa::detect())), &ids)), "{name}");
        assert!(deviation(&got, &fixture.golden_logits()) < FLOAT_BOUND, "{name}");
    }
}
