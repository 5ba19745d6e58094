//! Experts that are stored as one tensor for a layer: each comes out as what the same numbers give as a linear of its
//! own, and what is broken is refused by name.

use crate::support::fused::{EXPERTS, HIDDEN, INNER, P, Stored, pair};
use crate::support::tiny::{FILE, Tiny};
use recoup::checkpoint::Checkpoint;
use recoup::checkpoint::resolve::LinearRole;
use serde_json::{Value, json};

fn role(part: &str) -> LinearRole {
    let (n, k) = if part == "down_proj" { (HIDDEN, 32) } else { (INNER, HIDDEN) };
    LinearRole { n, k, bias: true, may_be_plain: false }
}

/// A projection in f32, its bias, and what else a kernel is told.
type Told = (Vec<f32>, Option<Vec<f32>>, String);

/// Every expert's projections, or why one was refused.
fn experts(t: &Tiny) -> Result<Vec<Told>, String> {
    let folder = tempfile::tempdir().unwrap();
    t.write(folder.path());
    let checkpoint = Checkpoint::open(folder.path()).map_err(|e| e.to_string())?;
    let mut out = Vec::new();
    for expert in 0..EXPERTS {
        for part in ["gate_proj", "up_proj", "down_proj"] {
            let module = format!("{P}.{expert}.{part}");
            let l = checkpoint.linear(&module, role(part)).map_err(|e| e.to_string())?;
            assert!(checkpoint.has_linear(&module));
            let told = format!("{} {:?} {:?}", l.weight_format(), l.output_scale, l.activation);
            out.push((l.decode(), l.bias.clone(), told));
        }
    }
    checkpoint.finish().map_err(|e| e.to_string())?;
    Ok(out)
}

#[track_caller]
fn refused(stored: Stored, change: impl FnOnce(&mut Tiny), needles: &[&str]) {
    let [mut t, _] = pair(stored);
    change(&mut t);
    let message = experts(&t).err().unwrap_or_else(|| panic!("{stored:?} was read"));
    needles.iter().for_each(|n| assert!(message.contains(n), "`{n}` is not in: {message}"));
}

#[test]
fn an_expert_of_a_fused_tensor_is_the_linear_that_its_rows_are() {
    for stored in Stored::ALL {
        let [fused, apart] = pair(stored);
        assert_eq!(experts(&fused).unwrap(), experts(&apart).unwrap(), "{stored:?}");
    }
}

#[test]
fn the_number_of_experts_is_the_configurations() {
    for stored in Stored::ALL {
        for count in [2, 4] {
            refused(stored, |t| t.config["num_local_experts"] = json!(count), &[FILE, P, &format!("[{count}, ")]);
        }
        // Without the key at least the one that is asked for must be there.
        let change = |t: &mut Tiny| {
            t.config.as_object_mut().unwrap().remove("num_local_experts");
            for tensor in &mut t.tensors {
                if tensor.shape.first() == Some(&EXPERTS) {
                    tensor.shape[0] -= 1;
                    tensor.bytes.truncate(tensor.bytes.len() / EXPERTS * (EXPERTS - 1));
                }
            }
        };
        refused(stored, change, &[FILE, P, "expected shape [3, "]);
    }
}

#[test]
fn each_tensor_that_belongs_to_a_fused_one_is_needed() {
    for (stored, suffixes) in [
        (Stored::Bf16, &["gate_up_proj_bias"][..]),
        (
            Stored::Nvfp4,
            &["gate_up_proj_weight_scale", "down_proj_weight_scale_2", "gate_up_proj_input_scale", "down_proj_bias"],
        ),
        (Stored::Mxfp4, &["gate_up_proj_scales", "down_proj_scales", "down_proj_bias"]),
    ] {
        for suffix in suffixes {
            let name = format!("{P}.{suffix}");
            refused(stored, |t| t.remove(&name), &[&format!("`{name}` is missing")]);
        }
    }
    let [mut t, _] = pair(Stored::Mxfp4);
    t.push(&format!("{P}.gate_up_proj_input_scale"), "F32", &[], vec![0; 4]);
    assert!(experts(&t).unwrap_err().contains("gate_up_proj_input_scale"));
}

#[test]
fn bad_scales_are_refused_with_the_expert_and_the_row() {
    let scale = format!("{P}.gate_up_proj_weight_scale");
    // [E, K/16, 2I]: expert 1, block 2, column 5, which is row 2 of up.
    let at = (HIDDEN / 16 + 2) * 2 * INNER + 5;
    for (code, problem) in [(0x7f, "is NaN"), (0xb8, "is negative"), (0, "is zero, but its block is not")] {
        let needles = [FILE, &scale, "expert 1: the scale of row 2, block 2", problem];
        refused(Stored::Nvfp4, |t| t.tensor(&scale).bytes[at] = code, &needles);
    }
    let scales = format!("{P}.down_proj_scales");
    let needles = [FILE, &scales, "expert 2: the scale of row 7, block 0 is NaN"];
    refused(Stored::Mxfp4, |t| t.tensor(&scales).bytes[2 * HIDDEN + 7] = 0xff, &needles);
    for suffix in ["_weight_scale_2", "_input_scale"] {
        for value in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            let name = format!("{P}.down_proj{suffix}");
            refused(Stored::Nvfp4, |t| t.set_f32(&name, value), &[FILE, &name, "positive"]);
        }
    }
}

#[test]
fn a_nan_in_one_experts_floats_is_refused() {
    for name in ["gate_up_proj", "down_proj", "down_proj_bias"] {
        let name = format!("{P}.{name}");
        let change = |t: &mut Tiny| {
            let bytes = &mut t.tensor(&name).bytes;
            let at = bytes.len() - 2;
            bytes[at..].copy_from_slice(&[0xc0, 0x7f]);
        };
        refused(Stored::Bf16, change, &[FILE, &name, "NaN"]);
        refused(Stored::Rows, change, &[FILE, &name, "NaN"]);
    }
}

#[test]
fn the_layout_and_the_configuration_must_be_of_one_format() {
    let q = |t: &mut Tiny, q: Value| t.config["quantization_config"] = q;
    refused(
        Stored::Mxfp4,
        |t| q(t, Value::Null),
        &["gate_up_proj_blocks", "laid out as MXFP4", "leaves it unquantized"],
    );
    let modelopt = json!({"quant_method": "modelopt", "quant_algo": "NVFP4"});
    refused(Stored::Mxfp4, |t| q(t, modelopt.clone()), &["laid out as MXFP4", "announces NVFP4"]);
    refused(Stored::Nvfp4, |t| q(t, json!({"quant_method": "mxfp4"})), &["laid out as NVFP4", "announces MXFP4"]);
    refused(Stored::Nvfp4, |t| q(t, Value::Null), &["gate_up_proj", "leaves this module unquantized"]);
    refused(Stored::Bf16, |t| q(t, modelopt), &["gate_up_proj", "announces NVFP4", "stored as BF16"]);
    let excluded = json!({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.mlp.experts"]});
    refused(Stored::Mxfp4, |t| q(t, excluded), &["laid out as MXFP4", "leaves it unquantized"]);
}

#[test]
fn fused_tensors_of_another_type_or_shape_are_refused() {
    let gate_up = format!("{P}.gate_up_proj");
    refused(
        Stored::Bf16,
        |t| t.tensor(&gate_up).shape = vec![EXPERTS, 2 * INNER, HIDDEN],
        &["expected shape [3, 64, 32]"],
    );
    refused(
        Stored::Rows,
        |t| t.tensor(&gate_up).shape = vec![EXPERTS, HIDDEN, 2 * INNER],
        &["expected shape [3, 32, 64]"],
    );
    refused(Stored::Rows, |t| t.tensor(&gate_up).dtype = "U16", &["expected dtype F32, F16 or BF16"]);
    refused(Stored::Nvfp4, |t| t.tensor(&gate_up).dtype = "I8", &["expected dtype", "I8"]);
    refused(Stored::Mxfp4, |t| t.tensor(&format!("{gate_up}_blocks")).dtype = "I8", &["expected dtype U8"]);
    refused(Stored::Mxfp4, |t| t.tensor(&format!("{gate_up}_scales")).dtype = "I8", &["expected dtype U8 (E8M0)"]);
    refused(Stored::Nvfp4, |t| t.tensor(&format!("{gate_up}_weight_scale")).dtype = "U8", &["expected dtype F8_E4M3"]);
    // The same bytes in another order.
    let change = |t: &mut Tiny| t.tensor(&format!("{gate_up}_scales")).shape = vec![EXPERTS, HIDDEN / 32, 2 * INNER];
    refused(Stored::Mxfp4, change, &["expected shape [3, 32, 2]"]);
}
