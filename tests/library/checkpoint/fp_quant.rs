//! fp_quant's checkpoints: what is broken is refused by name, and what cannot honour a rotated input says so.

use super::hostile::{breaking, refused, scale, shape};
use crate::support::tiny::{FILE, Format, Tiny};
use recoup::backend::autograd::AutogradBackend;
use recoup::backend::cpu::{CpuBackend, isa::Isa};
use recoup::backend::{Backend, BackendError};
use recoup::checkpoint::Checkpoint;
use recoup::checkpoint::dialect::Dialect;
use recoup::checkpoint::resolve::LinearRole;
use recoup::formats::linear::LinearTensors;
use recoup::quantize::convert::convert;
use serde_json::json;

const Q: &str = "model.layers.0.self_attn.q_proj";
const BOTH: [Format; 2] = [Format::FpQuantNvfp4, Format::FpQuantMxfp4];

fn name(suffix: &str) -> String {
    format!("{Q}.{suffix}")
}

/// Of Tiny's q_proj.
const ROLE: LinearRole = LinearRole { n: 64, k: 64, bias: false, may_be_plain: false };

fn written(format: Format) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    Tiny::new(format).write(folder.path());
    folder
}

#[test]
fn the_scales_of_both_formats_are_checked() {
    for format in BOTH {
        scale(format, &name("weight_global_scale"));
        scale(format, &name("act_global_scale"));
        breaking(format, |t| t.remove(&name("scales")), &[&format!("`{}` is missing", name("scales"))]);
        breaking(
            format,
            |t| t.tensor(&name("scales")).dtype = "F8_E4M3",
            &[FILE, &name("scales"), "expected dtype U8"],
        );
        breaking(format, |t| t.tensor(&name("scales")).bytes[5] = 0xff, &[FILE, &name("scales"), "is NaN"]);
    }
    breaking(Format::FpQuantNvfp4, |t| t.tensor(&name("scales")).bytes[5] = 0x85, &["row 1, block 1 is negative"]);
    // Swizzled, or of the other format.
    shape(Format::FpQuantNvfp4, &name("scales"), &[64, 2], &["[64, 4]"]);
    shape(Format::FpQuantMxfp4, &name("scales"), &[64, 4], &["[64, 2]"]);
}

#[test]
fn a_rotation_that_is_none_is_refused() {
    let matrix = name("forward_hadamard_matrix");
    for format in BOTH {
        breaking(format, |t| t.remove(&matrix), &[&format!("`{matrix}` is missing"), "rotates"]);
        breaking(format, |t| t.tensor(&matrix).dtype = "F16", &[FILE, &matrix, "squared length"]);
        breaking(format, |t| t.fill(&matrix, f32::NAN), &[FILE, &matrix, "NaN"]);
        breaking(format, |t| t.fill(&matrix, 0.0), &[FILE, &matrix, "row 0", "squared length of 0"]);
    }
    shape(Format::FpQuantNvfp4, &matrix, &[32, 32], &["[16, 16]"]);
}

#[test]
fn runs_that_do_not_divide_the_inputs_are_refused() {
    let change = |t: &mut Tiny| {
        t.config["quantization_config"]["hadamard_group_size"] = json!(48);
        for tensor in t.tensors.iter_mut().filter(|t| t.name.ends_with("_hadamard_matrix")) {
            tensor.shape = vec![48, 48];
            tensor.bytes = vec![0; 2 * 48 * 48];
        }
    };
    breaking(Format::FpQuantNvfp4, change, &[FILE, "forward_hadamard_matrix", "no multiple of 48"]);
}

#[test]
fn settings_that_mean_another_computation_are_refused_by_key() {
    for (key, value, expected) in [
        ("store_master_weights", json!(true), "master weights"),
        ("pseudoquantization", json!(true), "dqweight"),
        ("forward_dtype", json!("mxfp8"), "\"nvfp4\" or \"mxfp4\""),
        ("forward_method", json!("quest"), "\"abs_max\""),
        ("forward_method", json!("mse"), "\"abs_max\""),
        ("hadamard_group_size", json!(0), "a whole number from 16 to 256"),
        ("hadamard_group_size", json!(1u64 << 40), "a whole number from 16 to 256"),
        ("hadamard_group_size", json!(null), "a whole number from 16 to 256"),
    ] {
        let change = |t: &mut Tiny| t.config["quantization_config"][key] = value.clone();
        breaking(Format::FpQuantNvfp4, change, &["config.json", &format!("`quantization_config.{key}`"), expected]);
    }
    // The group is at least a block.
    let change = |t: &mut Tiny| t.config["quantization_config"]["hadamard_group_size"] = json!(16);
    breaking(Format::FpQuantMxfp4, change, &["hadamard_group_size", "from 32 to 256"]);
}

#[test]
fn master_weights_in_the_place_of_codes_are_refused() {
    let change = |t: &mut Tiny| {
        t.remove(&name("qweight"));
        t.push(&name("weight"), "BF16", &[64, 64], vec![0; 2 * 64 * 64]);
    };
    breaking(Format::FpQuantNvfp4, change, &[FILE, Q, "announces NVFP4", "stored as BF16"]);
}

#[test]
fn a_module_is_left_alone_when_its_name_ends_as_an_entry_says() {
    let change =
        |t: &mut Tiny| t.config["quantization_config"]["modules_to_not_convert"] = json!(["lm_head", "q_proj"]);
    breaking(Format::FpQuantNvfp4, change, &[FILE, Q, "leaves this module unquantized"]);
    // Without the key only the head is.
    let folder = tempfile::tempdir().unwrap();
    let mut t = Tiny::new(Format::FpQuantNvfp4);
    t.config["quantization_config"].as_object_mut().unwrap().remove("modules_to_not_convert");
    t.remove("lm_head.weight");
    t.write(folder.path());
    refused(folder.path(), &["`lm_head.weight` is missing"]);
}

/// The rotation is applied: in f64 by the definition, and the CPU's product of it.
#[test]
fn the_input_of_a_rotated_linear_is_rotated_before_it_is_quantized() {
    for format in BOTH {
        let folder = written(format);
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let linear = checkpoint.linear(Q, ROLE).unwrap();
        let x: Vec<f32> = (0..64).map(|i| ((i * 37) % 64) as f32 / 16.0 - 2.0).collect();
        let mut rotated = x.clone();
        linear.rotation.as_ref().unwrap().apply(&mut rotated);
        assert!(rotated.iter().zip(&x).any(|(a, b)| (a - b).abs() > 0.5));
        let length = |v: &[f32]| v.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
        assert!((length(&rotated) / length(&x) - 1.0).abs() < 0.01);
        linear.activation.fake_quantize(&mut rotated);
        let weights = linear.decode();
        let expected: Vec<f64> = weights
            .chunks_exact(64)
            .map(|row| row.iter().zip(&rotated).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum())
            .collect();
        let backend = CpuBackend::new(Isa::detect(), 1).unwrap();
        let packed = backend.load_linear(linear).unwrap();
        let input = backend.tensor(x, 64).unwrap();
        let y = backend.linears(&input, &[&packed]).unwrap();
        let got = backend.to_host(&y[0]).unwrap();
        let size = length(&got).sqrt();
        let apart = got.iter().zip(&expected).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum::<f64>().sqrt();
        assert!(size > 0.0 && apart < 1e-5 * size, "{format:?}: {apart} of {size}");
    }
}

#[test]
fn linears_that_differ_in_their_rotation_do_not_share_a_quantized_input() {
    let folder = written(Format::FpQuantNvfp4);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let rotated = checkpoint.linear(Q, ROLE).unwrap();
    let plain = LinearTensors { rotation: None, ..rotated.clone() };
    let backend = CpuBackend::new(Isa::detect(), 1).unwrap();
    let [a, b] = [rotated, plain].map(|l| backend.load_linear(l).unwrap());
    let x = backend.tensor((0..64).map(|i| i as f32 / 32.0 - 1.0).collect(), 64).unwrap();
    let host = |y: &_| backend.to_host(y).unwrap();
    let together = backend.linears(&x, &[&a, &b]).unwrap();
    let alone = [&a, &b].map(|l| host(&backend.linears(&x, &[l]).unwrap()[0]));
    assert_eq!([host(&together[0]), host(&together[1])], alone);
    assert_ne!(alone[0], alone[1]);
}

#[test]
fn what_cannot_rotate_an_input_refuses_the_module_by_name() {
    for format in BOTH {
        let folder = written(format);
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let linear = checkpoint.linear(Q, ROLE).unwrap();
        let refused = AutogradBackend::new().load_linear(linear).err();
        let Some(BackendError::Unsupported { module, what, .. }) = refused else { panic!("{format:?} was loaded") };
        assert!(module == Q && what.contains("fp_quant"), "{module}: {what}");
        let out = tempfile::tempdir().unwrap();
        let message = convert(&checkpoint, Dialect::ModelOpt, &out.path().join("a")).unwrap_err().to_string();
        assert!(message.contains("model.layers.0.") && message.contains("fp_quant"), "{message}");
    }
}
