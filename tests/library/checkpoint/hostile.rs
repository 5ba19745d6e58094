//! Bad checkpoints, one test each: every one is refused with a message that names the file and the tensor or key, and
//! nothing panics, hangs or allocates what a configuration asks for before the tensors back it.

use std::path::Path;

use crate::support::fixtures::try_logits;
use crate::support::tiny::{FILE, Format, INDEX, SMALL, Size, Tiny};
use recoup::backend::cpu::{CpuBackend, isa::Isa};
use recoup::checkpoint::Checkpoint;
use recoup::model::Decoder;
use serde_json::json;

const Q: &str = "model.layers.0.self_attn.q_proj";
const UP: &str = "model.layers.1.mlp.up_proj";

/// Loads a folder and returns logits for a few tokens, or why it was refused.
pub(super) fn load(folder: &Path) -> Result<Vec<f32>, String> {
    load_on(Isa::detect(), folder)
}

fn load_on(isa: Isa, folder: &Path) -> Result<Vec<f32>, String> {
    let checkpoint = Checkpoint::open(folder).map_err(|e| e.to_string())?;
    let backend = CpuBackend::new(isa, 1).unwrap();
    let decoder = Decoder::load(backend, &checkpoint).map_err(|e| e.to_string())?;
    Ok(try_logits(&decoder, &[3, 1, 4, 1, 5]).unwrap())
}

/// The message with which a folder is refused; it must hold all of `needles`. What loops or allocates without bound never
/// comes to its end here: no clock is needed to see that.
pub(super) fn refused(folder: &Path, needles: &[&str]) {
    let message = load(folder).map(|_| ()).expect_err("the checkpoint loaded");
    for needle in needles {
        assert!(message.contains(needle), "`{needle}` is not in: {message}");
    }
    assert!(message.starts_with(folder.to_str().unwrap()), "does not start with the file: {message}");
}

/// Breaks a good checkpoint and expects the message.
pub(super) fn breaking(format: Format, change: impl FnOnce(&mut Tiny), needles: &[&str]) {
    let mut t = Tiny::new(format);
    change(&mut t);
    let folder = tempfile::tempdir().unwrap();
    t.write(folder.path());
    refused(folder.path(), needles);
}

/// Writes these bytes in place of a good model.safetensors.
fn file(bytes: &[u8], needles: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    Tiny::new(Format::Nvfp4).write_configs(folder.path());
    std::fs::write(folder.path().join(FILE), bytes).unwrap();
    refused(folder.path(), needles);
}

/// A good file whose header was changed.
fn header(change: impl FnOnce(&mut serde_json::Value), needles: &[&str]) {
    let t = Tiny::new(Format::Nvfp4);
    let mut header = Tiny::header(&t.tensors);
    change(&mut header);
    file(&Tiny::file(&header.to_string(), &Tiny::data(&t.tensors)), needles);
}

/// A good sharded folder of which one thing was changed.
fn sharded(change: impl FnOnce(&Path, &mut serde_json::Value), needles: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let mut index = Tiny::new(Format::Nvfp4).write_sharded(folder.path(), 3);
    change(folder.path(), &mut index);
    std::fs::write(folder.path().join(INDEX), index.to_string()).unwrap();
    refused(folder.path(), needles);
}

/// A good checkpoint but for one value of config.json.
fn config(key: &str, value: serde_json::Value, needles: &[&str]) {
    breaking(Format::Bf16, |t| t.config[key] = value, &[&["config.json", key], needles].concat());
}

/// Every bad value of the one F32 scale `name`, with the value in the message; and the tensor gone.
pub(super) fn scale(format: Format, name: &str) {
    for value in [0.0, -0.0, -1.5, f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        breaking(
            format,
            |t| t.set_f32(name, value),
            &[FILE, &format!("`{name}`"), &format!("is {value};"), "positive"],
        );
    }
    breaking(format, |t| t.remove(name), &[&format!("`{name}` is missing")]);
}

pub(super) fn shape(format: Format, name: &str, shape: &[usize], needles: &[&str]) {
    let change = |t: &mut Tiny| {
        let tensor = t.tensor(name);
        let size = tensor.bytes.len() / tensor.shape.iter().product::<usize>().max(1);
        tensor.shape = shape.into();
        tensor.bytes.resize(size * shape.iter().product::<usize>(), 0x30);
    };
    breaking(
        format,
        change,
        &[&[FILE, &format!("`{name}`"), "expected shape", &format!("{shape:?}")], needles].concat(),
    );
}

// What is good loads: otherwise the refusals below would say nothing.

#[test]
fn every_format_loads_and_computes_finite_logits() {
    for format in Format::ALL {
        let folder = tempfile::tempdir().unwrap();
        Tiny::new(format).write(folder.path());
        let logits = load(folder.path()).unwrap_or_else(|e| panic!("{format:?}: {e}"));
        assert!(logits.iter().all(|v| v.is_finite()) && logits.iter().any(|v| *v != 0.0), "{format:?}");
    }
}

#[test]
fn every_instruction_set_computes_the_same_bits() {
    for format in Format::ALL {
        let folder = tempfile::tempdir().unwrap();
        Tiny::new(format).write(folder.path());
        let bits = |isa| load_on(isa, folder.path()).unwrap().iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        let all = Isa::available();
        for isa in &all[1..] {
            assert!(bits(*isa) == bits(all[0]), "{format:?}: {isa} differs from {}", all[0]);
        }
    }
}

#[test]
fn both_dialects_of_the_same_numbers_compute_the_same_bits() {
    let pairs = [
        (Format::Nvfp4, Format::CtNvfp4),
        (Format::Fp8Channel, Format::CtFp8Channel),
        (Format::DeepSeek, Format::CtFp8Block),
        (Format::F32, Format::Bf16),
        (Format::F32, Format::F16),
    ];
    for (a, b) in pairs {
        let [x, y] = [a, b].map(|format| {
            let folder = tempfile::tempdir().unwrap();
            Tiny::new(format).write(folder.path());
            load(folder.path()).unwrap()
        });
        assert_eq!(x, y, "{a:?} and {b:?}");
    }
}

#[test]
fn a_mixture_of_experts_loads() {
    for format in [Format::Bf16, Format::Nvfp4, Format::CtFp8Channel] {
        let folder = tempfile::tempdir().unwrap();
        Tiny::with_size(format, Size { experts: Some(3), ..SMALL }).write(folder.path());
        assert!(load(folder.path()).unwrap().iter().all(|v| v.is_finite()));
    }
}

#[test]
fn three_shards_with_an_index_give_the_bits_of_the_single_file() {
    for format in Format::ALL {
        let (one, three) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let t = Tiny::new(format);
        t.write(one.path());
        t.write_sharded(three.path(), 3);
        let bits = |folder: &Path| load(folder).unwrap().iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(one.path()), bits(three.path()), "{format:?}");
    }
}

#[test]
fn mx_scales_may_be_stored_as_u8_or_as_e8m0() {
    for format in [Format::Mxfp8, Format::CtMxfp4] {
        let (u8s, e8m0) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut t = Tiny::new(format);
        t.write(u8s.path());
        t.tensors.iter_mut().filter(|t| t.name.ends_with("weight_scale")).for_each(|t| t.dtype = "F8_E8M0");
        t.write(e8m0.path());
        assert_eq!(load(u8s.path()).unwrap(), load(e8m0.path()).unwrap());
    }
}

#[test]
fn a_tied_checkpoint_may_store_the_same_head_again() {
    let folder = tempfile::tempdir().unwrap();
    let mut t = Tiny::new(Format::Bf16);
    t.config["tie_word_embeddings"] = json!(true);
    t.tensor("lm_head.weight").bytes = t.tensor("model.embed_tokens.weight").bytes.clone();
    t.write(folder.path());
    load(folder.path()).unwrap();
}

// The file itself.

#[test]
fn a_file_truncated_anywhere_is_refused() {
    let bytes = Tiny::new(Format::Nvfp4).bytes();
    let header = 8 + u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    for length in [1, 7] {
        file(&bytes[..length], &[FILE, &format!("{length} bytes is too short"), "truncated"]);
    }
    for length in [8, 9, 100, header - 1] {
        file(&bytes[..length], &[FILE, "the header says it is", &format!("{} follow", length - 8), "truncated"]);
    }
    for length in [header, header + 1, bytes.len() / 2, bytes.len() - 1] {
        file(&bytes[..length], &[FILE, "tensor `", &format!("the file holds {}", length - header), "truncated"]);
    }
}

#[test]
fn an_empty_file_is_refused() {
    file(&[], &[FILE, "the file is empty"]);
}

const POINTER: &[u8] =
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0000000000000000000000000000000000000000000000000000000000000007\nsize 538090408\n";

#[test]
fn a_git_lfs_pointer_in_the_place_of_any_file_of_a_checkpoint_is_called_one() {
    for name in [FILE, "config.json", INDEX] {
        let folder = tempfile::tempdir().unwrap();
        Tiny::new(Format::Nvfp4).write_sharded(folder.path(), 3);
        if name == FILE {
            Tiny::new(Format::Nvfp4).write_configs(folder.path());
            std::fs::remove_file(folder.path().join(INDEX)).unwrap();
        }
        std::fs::write(folder.path().join(name), POINTER).unwrap();
        refused(folder.path(), &[name, "Git LFS pointer to 538090408 bytes", "`git lfs pull`"]);
    }
}

#[test]
fn what_was_saved_instead_of_the_weights_is_named() {
    file(b"<!DOCTYPE html>\n<html><title>huggingface</title></html>", &[FILE, "web page"]);
    file(b"PK\x03\x04\0\0\0\0archive/data.pkl", &[FILE, "PyTorch"]);
    file(b"\x1f\x8b\x08\0\0\0\0\0\0\x03payload", &[FILE, "gunzip"]);
    file(&[0; 4096], &[FILE, "never finished"]);
    file(b"GGUF\x03\0\0\0\x01\0\0\0", &[FILE, "GGUF", "recoup convert"]);
}

#[test]
fn a_header_whose_length_looks_like_another_formats_first_bytes_is_a_header() {
    // 0x8b1f bytes: the first two are gzip's.
    let t = Tiny::new(Format::Nvfp4);
    let header = Tiny::header(&t.tensors).to_string();
    let padded = format!("{header:0$}", 0x8b1f);
    let folder = tempfile::tempdir().unwrap();
    t.write_configs(folder.path());
    std::fs::write(folder.path().join(FILE), Tiny::file(&padded, &Tiny::data(&t.tensors))).unwrap();
    load(folder.path()).unwrap();
}

#[test]
fn bytes_after_the_last_tensor_are_refused() {
    let mut bytes = Tiny::new(Format::Nvfp4).bytes();
    bytes.push(0);
    file(&bytes, &[FILE, "the tensors end at byte", "goes on"]);
}

#[test]
fn a_header_longer_than_the_file_is_refused() {
    let mut bytes = Tiny::new(Format::Nvfp4).bytes();
    let length = bytes.len() as u64;
    bytes[..8].copy_from_slice(&length.to_le_bytes());
    file(&bytes, &[FILE, &format!("the header says it is {length} bytes")]);
}

#[test]
fn a_header_of_two_to_the_63_bytes_is_refused() {
    let mut bytes = Tiny::new(Format::Nvfp4).bytes();
    for length in [1u64 << 63, u64::MAX, u64::MAX - 7] {
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        file(&bytes, &[FILE, &format!("the header says it is {length} bytes")]);
    }
}

#[test]
fn a_header_that_is_no_json_is_refused() {
    for text in ["", "{", "[]", "7", "hello, this is a web page", r#"{"a": 1}"#] {
        file(&Tiny::file(text, &[]), &[FILE, "the header is not valid"]);
    }
    file(&Tiny::file(&"[".repeat(100_000), &[]), &[FILE, "the header is not valid"]);
}

#[test]
fn a_header_that_is_no_utf8_is_refused() {
    let mut bytes = Tiny::file(r#"{"ab": 0}"#, &[]);
    bytes[10] = 0xff;
    file(&bytes, &[FILE, "not UTF-8"]);
}

#[test]
fn a_header_of_no_tensors_is_refused_for_what_is_missing() {
    file(&Tiny::file("{}", &[]), &["`model.embed_tokens.weight` is missing"]);
}

#[test]
fn a_header_with_one_tensor_twice_is_refused() {
    let entry = |a, b| format!(r#""x": {{"dtype": "U8", "shape": [1], "data_offsets": [{a}, {b}]}}"#);
    file(&Tiny::file(&format!("{{{}, {}}}", entry(0, 1), entry(1, 2)), &[0; 2]), &[FILE, "`x` is there twice"]);
}

#[test]
fn overlapping_offsets_are_refused() {
    header(
        |h| h[format!("{Q}.input_scale")]["data_offsets"] = h[format!("{Q}.weight_scale_2")]["data_offsets"].clone(),
        &[FILE, &format!("{Q}.input_scale"), &format!("{Q}.weight_scale_2"), "overlaps"],
    );
}

#[test]
fn a_hole_between_tensors_is_refused() {
    let mut t = Tiny::new(Format::Nvfp4);
    t.push("filler", "U8", &[4], vec![0; 4]);
    t.push("last", "U8", &[1], vec![0]);
    let mut header = Tiny::header(&t.tensors);
    header.as_object_mut().unwrap().remove("filler");
    let bytes = Tiny::file(&header.to_string(), &Tiny::data(&t.tensors));
    file(&bytes, &[FILE, "`last`", "leaves a gap after `lm_head.weight`"]);
}

#[test]
fn a_first_tensor_that_does_not_start_at_zero_is_refused() {
    let text = r#"{"x": {"dtype": "U8", "shape": [1], "data_offsets": [3, 4]}}"#;
    file(&Tiny::file(text, &[0; 4]), &[FILE, "`x`, the first, starts at byte 3"]);
}

#[test]
fn offsets_beyond_the_file_are_refused() {
    let text = r#"{"x": {"dtype": "U8", "shape": [9000], "data_offsets": [0, 9000]}}"#;
    file(&Tiny::file(text, &[0; 4]), &[FILE, "`x` ends at byte 9000", "holds 4"]);
}

#[test]
fn offsets_that_do_not_match_the_shape_are_refused() {
    let name = "lm_head.weight";
    header(|h| h[name]["shape"] = json!([40, 63]), &[FILE, name, "BF16 of shape [40, 63], needs 5040 bytes"]);
    header(|h| h[name]["dtype"] = json!("F32"), &[FILE, name, "F32 of shape [40, 64], needs 10240 bytes"]);
    header(|h| h[name]["data_offsets"] = json!([10, 0]), &[FILE, name, "its offsets are 10..0"]);
    header(|h| h[name]["dtype"] = json!("Q4_K"), &[FILE, name, "Q4_K"]);
    header(|h| h[name]["shape"] = json!([-1, 64]), &[FILE, name, "-1"]);
    header(|h| h[name]["data_offsets"] = json!([-1, 64]), &[FILE, name, "-1"]);
}

#[test]
fn shapes_and_offsets_that_overflow_are_refused() {
    let huge = (1u64 << 61) - 1;
    header(
        |h| h["lm_head.weight"]["shape"] = json!([huge, huge]),
        &[FILE, "lm_head.weight", "larger than memory can be"],
    );
    // Eight of these end at 2⁶⁴ - 8: adding the header's length to that wraps around.
    let entries: Vec<String> = (0..8)
        .map(|i| {
            let (start, end) = (i * huge, (i + 1) * huge);
            format!(r#""t{i}": {{"dtype": "U8", "shape": [{huge}], "data_offsets": [{start}, {end}]}}"#)
        })
        .collect();
    file(&Tiny::file(&format!("{{{}}}", entries.join(",")), &[]), &[FILE, "`t0` ends at byte"]);
}

#[test]
fn a_folder_that_is_none_or_holds_nothing_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    refused(&folder.path().join("absent"), &["absent", "no such folder"]);
    refused(folder.path(), &["holds no config.json", "empty"]);
    Tiny::new(Format::Bf16).write_configs(folder.path());
    refused(folder.path(), &["holds neither model.safetensors nor model.safetensors.index.json"]);
    std::fs::write(folder.path().join("m.gguf"), b"GGUF").unwrap();
    refused(&folder.path().join("m.gguf"), &["m.gguf", "GGUF"]);
}

// Tensors.

#[test]
fn a_missing_tensor_is_refused_by_name() {
    for name in
        ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.1.input_layernorm.weight"]
    {
        breaking(Format::Bf16, |t| t.remove(name), &[&format!("`{name}` is missing")]);
    }
    breaking(Format::Nvfp4, |t| t.remove(&format!("{Q}.weight")), &[&format!("`{Q}.weight` is missing")]);
    breaking(Format::CtNvfp4, |t| t.remove(&format!("{Q}.weight_packed")), &[&format!("`{Q}.weight` is missing")]);
}

#[test]
fn a_leftover_tensor_is_refused_by_name() {
    for name in
        ["model.layers.2.mlp.up_proj.weight", "audio.patch_embed.weight", "model.layers.0.self_attn.q_norm.weight"]
    {
        let bytes = vec![0; 4];
        breaking(Format::Bf16, |t| t.push(name, "F32", &[1], bytes), &[FILE, "1 tensor(s)", &format!("`{name}`")]);
    }
}

#[test]
fn scales_that_the_format_does_not_use_are_refused_as_leftover() {
    let one = 1.0f32.to_le_bytes().to_vec();
    for (format, suffix) in
        [(Format::Bf16, "weight_scale"), (Format::Fp8Channel, "input_scale"), (Format::Nvfp4, "input_global_scale")]
    {
        let name = format!("{Q}.{suffix}");
        breaking(format, |t| t.push(&name, "F32", &[], one.clone()), &[FILE, &format!("`{name}`")]);
    }
    breaking(
        Format::Nvfp4,
        |t| t.push("model.layers.0.self_attn.k_proj.k_scale", "F32", &[], one.clone()),
        &[FILE, "k_proj.k_scale"],
    );
}

#[test]
fn a_bias_that_the_architecture_does_not_have_is_refused() {
    let name = format!("{Q}.bias");
    breaking(Format::Bf16, |t| t.push(&name, "BF16", &[64], vec![0; 128]), &[FILE, &name, "bias"]);
}

#[test]
fn a_bias_that_the_architecture_needs_is_not_assumed_to_be_zero() {
    breaking(Format::Bf16, |t| t.config["attention_bias"] = json!(true), &[&format!("`{Q}.bias` is missing")]);
}

#[test]
fn a_bias_of_nan_is_refused() {
    let change = |t: &mut Tiny| {
        t.config["mlp_bias"] = json!(true);
        t.push("model.layers.0.mlp.gate_proj.bias", "F32", &[96], f32::NAN.to_le_bytes().repeat(96));
    };
    breaking(Format::Bf16, change, &[FILE, "model.layers.0.mlp.gate_proj.bias", "element 0 is NaN"]);
}

#[test]
fn a_weight_of_the_wrong_type_is_refused() {
    for dtype in ["I8", "F8_E5M2"] {
        let name = format!("{Q}.weight");
        breaking(Format::Fp8, |t| t.tensor(&name).dtype = dtype, &[FILE, &name, "expected dtype", dtype]);
    }
    let name = "model.norm.weight";
    breaking(Format::Bf16, |t| t.tensor(name).dtype = "I16", &[FILE, name, "F32, F16 or BF16", "I16"]);
}

#[test]
fn a_scale_of_the_wrong_type_is_refused() {
    for (format, name, dtype) in [
        (Format::Nvfp4, "weight_scale", "U8"),
        (Format::Nvfp4, "weight_scale_2", "I32"),
        (Format::Nvfp4, "input_scale", "U32"),
        (Format::CtNvfp4, "weight_scale", "F8_E5M2"),
        (Format::CtNvfp4, "weight_global_scale", "I32"),
        (Format::Fp8, "weight_scale", "I32"),
        (Format::CtMxfp4, "weight_scale", "F8_E4M3"),
        (Format::Mxfp8, "weight_scale", "I8"),
        (Format::DeepSeek, "weight_scale_inv", "U32"),
    ] {
        let name = format!("{Q}.{name}");
        breaking(format, |t| t.tensor(&name).dtype = dtype, &[FILE, &name, "expected dtype", dtype]);
    }
}

#[test]
fn a_weight_of_the_wrong_shape_is_refused() {
    shape(Format::Bf16, "model.norm.weight", &[63], &["[64]"]);
    shape(Format::Bf16, "model.norm.weight", &[64, 1], &["[64]"]);
    shape(Format::Bf16, &format!("{UP}.weight"), &[64, 96], &["[96, 64]"]);
    shape(Format::Fp8, &format!("{UP}.weight"), &[96, 65], &["[96, 64]"]);
    shape(Format::Bf16, &format!("{UP}.weight"), &[96 * 64], &["[96, 64]"]);
}

#[test]
fn a_four_bit_weight_that_is_not_packed_two_to_a_byte_is_refused() {
    shape(Format::Nvfp4, &format!("{UP}.weight"), &[96, 64], &["[96, 32]", "[N, K/2]", "K = 64"]);
    shape(Format::CtNvfp4, &format!("{UP}.weight_packed"), &[96, 64], &["[96, 32]", "[N, K/2]"]);
    shape(Format::CtMxfp4, &format!("{UP}.weight_packed"), &[96, 16], &["[96, 32]", "[N, K/2]"]);
}

#[test]
fn swizzled_block_scales_are_refused() {
    // 96 rows padded to 128, as the GPU kernels want them; flat; and in the 5-D form.
    let name = format!("{UP}.weight_scale");
    for swizzled in [&[128, 4][..], &[512], &[1, 1, 32, 4, 4]] {
        shape(Format::Nvfp4, &name, swizzled, &["[96, 4]", "row-major, not swizzled"]);
        shape(Format::CtNvfp4, &name, swizzled, &["[96, 4]", "row-major, not swizzled"]);
    }
}

#[test]
fn block_scales_for_another_block_size_are_refused() {
    shape(Format::Nvfp4, &format!("{UP}.weight_scale"), &[96, 2], &["[96, 4]", "K/16"]);
    shape(Format::CtMxfp4, &format!("{UP}.weight_scale"), &[96, 4], &["[96, 2]", "K/32"]);
    shape(Format::Mxfp8, &format!("{UP}.weight_scale"), &[96, 4], &["[96, 2]", "K/32"]);
}

#[test]
fn fp8_scales_of_no_known_shape_are_refused() {
    for (format, suffix) in
        [(Format::Fp8, "weight_scale"), (Format::Fp8Channel, "weight_scale"), (Format::DeepSeek, "weight_scale_inv")]
    {
        shape(format, &format!("{UP}.{suffix}"), &[95], &["[96]"]);
        shape(format, &format!("{UP}.{suffix}"), &[2, 2], &["[1, 1]"]);
        shape(format, &format!("{UP}.{suffix}"), &[0], &[]);
    }
}

#[test]
fn scalar_scales_of_another_shape_are_refused() {
    for (format, suffix) in [
        (Format::Nvfp4, "weight_scale_2"),
        (Format::Nvfp4, "input_scale"),
        (Format::Fp8, "input_scale"),
        (Format::CtNvfp4, "weight_global_scale"),
        (Format::CtNvfp4, "input_global_scale"),
    ] {
        shape(format, &format!("{Q}.{suffix}"), &[2], &["one scale"]);
        shape(format, &format!("{Q}.{suffix}"), &[0], &["one scale"]);
    }
}

#[test]
fn a_block_that_does_not_divide_the_input_features_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let t = Tiny::with_size(Format::Nvfp4, Size { intermediate: 72, ..SMALL });
    t.write(folder.path());
    refused(folder.path(), &[FILE, "model.layers.0.mlp.down_proj.weight_scale", "K = 72 is no multiple of 16"]);
}

// Scales and codes.

#[test]
fn a_bad_weight_scale_2_is_refused() {
    scale(Format::Nvfp4, &format!("{Q}.weight_scale_2"));
    scale(Format::W4a8, &format!("{UP}.weight_scale_2"));
}

#[test]
fn a_bad_input_scale_is_refused() {
    scale(Format::Nvfp4, &format!("{Q}.input_scale"));
    scale(Format::Fp8, &format!("{UP}.input_scale"));
    scale(Format::W4a8, &format!("{UP}.input_scale"));
}

#[test]
fn a_bad_weight_global_scale_is_refused() {
    scale(Format::CtNvfp4, &format!("{Q}.weight_global_scale"));
}

#[test]
fn a_bad_input_global_scale_is_refused() {
    scale(Format::CtNvfp4, &format!("{UP}.input_global_scale"));
}

#[test]
fn a_divisor_whose_reciprocal_vanishes_is_refused() {
    let name = format!("{Q}.input_global_scale");
    breaking(Format::CtNvfp4, |t| t.set_f32(&name, f32::MAX), &[FILE, &name, "reciprocal"]);
    breaking(Format::CtNvfp4, |t| t.set_f32(&name, 1e-45), &[FILE, &name]);
}

#[test]
fn a_bad_fp8_tensor_scale_is_refused() {
    scale(Format::Fp8, &format!("{Q}.weight_scale"));
}

#[test]
fn a_bad_fp8_channel_scale_is_refused() {
    scale(Format::Fp8Channel, &format!("{UP}.weight_scale"));
    scale(Format::CtFp8Channel, &format!("{UP}.weight_scale"));
    let name = format!("{UP}.weight_scale");
    let last = |t: &mut Tiny| t.tensor(&name).bytes[4 * 95..].copy_from_slice(&f32::NAN.to_le_bytes());
    breaking(Format::CtFp8Channel, last, &[FILE, &name, "element 95 is NaN"]);
}

#[test]
fn a_bad_fp8_block_scale_is_refused() {
    scale(Format::CtFp8Block, &format!("{UP}.weight_scale"));
}

#[test]
fn a_bad_weight_scale_inv_is_refused() {
    scale(Format::DeepSeek, &format!("{UP}.weight_scale_inv"));
}

#[test]
fn a_bad_kv_cache_scale_is_refused() {
    scale(Format::Fp8, "model.layers.1.self_attn.k_proj.k_scale");
    scale(Format::Fp8, "model.layers.1.self_attn.v_proj.v_scale");
}

#[test]
fn an_e4m3_block_scale_of_nan_is_refused() {
    for (format, code) in [(Format::Nvfp4, 0x7f), (Format::CtNvfp4, 0xff), (Format::W4a8, 0x7f)] {
        let name = format!("{UP}.weight_scale");
        let per_row = if format == Format::W4a8 { 2 } else { 4 };
        let change = |t: &mut Tiny| t.tensor(&name).bytes[7 * per_row + 1] = code;
        breaking(format, change, &[FILE, &name, "the scale of row 7, block 1 is NaN"]);
    }
}

#[test]
fn a_negative_e4m3_block_scale_is_refused() {
    let name = format!("{UP}.weight_scale");
    breaking(Format::Nvfp4, |t| t.tensor(&name).bytes[5] |= 0x80, &[FILE, &name, "row 1, block 1 is negative"]);
}

#[test]
fn a_zero_e4m3_block_scale_over_a_nonzero_block_is_refused() {
    for code in [0, 0x80] {
        let name = format!("{UP}.weight_scale");
        breaking(Format::Nvfp4, |t| t.tensor(&name).bytes[3] = code, &[FILE, &name, "row 0, block 3 is zero"]);
    }
}

#[test]
fn a_zero_e4m3_block_scale_over_a_zero_block_is_fine() {
    let folder = tempfile::tempdir().unwrap();
    let mut t = Tiny::new(Format::Nvfp4);
    t.tensor(&format!("{UP}.weight_scale")).bytes[3] = 0;
    // Code 8 is -0.
    t.tensor(&format!("{UP}.weight")).bytes[24..32].copy_from_slice(&[0, 0x80, 0x08, 0x88, 0, 0, 0, 0]);
    t.write(folder.path());
    assert!(load(folder.path()).unwrap().iter().all(|v| v.is_finite()));
}

#[test]
fn an_e8m0_block_scale_of_nan_is_refused() {
    for format in [Format::Mxfp8, Format::CtMxfp4] {
        let name = format!("{UP}.weight_scale");
        breaking(format, |t| t.tensor(&name).bytes[9] = 0xff, &[FILE, &name, "row 4, block 1 is NaN (0xff)"]);
    }
}

#[test]
fn a_nan_code_in_an_fp8_weight_is_refused() {
    for (format, code) in [
        (Format::Fp8, 0x7f),
        (Format::Fp8Channel, 0xff),
        (Format::Mxfp8, 0x7f),
        (Format::CtFp8Block, 0x7f),
        (Format::DeepSeek, 0xff),
    ] {
        let name = format!("{UP}.weight");
        breaking(format, |t| t.tensor(&name).bytes[65] = code, &[FILE, &name, "row 1, column 1 is a NaN code"]);
    }
}

#[test]
fn a_nan_or_infinity_in_a_plain_weight_is_refused() {
    for (format, bytes) in
        [(Format::Bf16, &[0xc0, 0x7f][..]), (Format::F16, &[0x00, 0xfc]), (Format::F32, &[0, 0, 0x80, 0x7f])]
    {
        let name = format!("{UP}.weight");
        let change = |t: &mut Tiny| t.tensor(&name).bytes[8..8 + bytes.len()].copy_from_slice(bytes);
        breaking(format, change, &[FILE, &name, "is NaN or infinite"]);
    }
    breaking(
        Format::Nvfp4,
        |t| t.tensor("model.norm.weight").bytes.fill(0xff),
        &[FILE, "model.norm.weight", "element 0"],
    );
}

#[test]
fn a_bad_pre_quant_scale_is_refused() {
    let name = format!("{UP}.pre_quant_scale");
    for value in [0.0f32, -1.0, f32::NAN] {
        let bytes = value.to_le_bytes().repeat(64);
        breaking(Format::Nvfp4, |t| t.push(&name, "F32", &[64], bytes), &[FILE, &name, "element 0 is"]);
    }
    breaking(Format::Nvfp4, |t| t.push(&name, "F32", &[63], vec![0; 252]), &[FILE, &name, "expected shape [64]"]);
}

// Configuration against tensors.

#[test]
fn declared_fp8_but_stored_nvfp4_is_refused() {
    breaking(
        Format::Nvfp4,
        |t| {
            t.hf_quant_config = None;
            t.config["quantization_config"]["quant_algo"] = json!("FP8");
        },
        &[FILE, Q, "announces FP8", "stored as U8"],
    );
}

#[test]
fn declared_nvfp4_but_stored_fp8_is_refused() {
    breaking(
        Format::Fp8,
        |t| {
            t.hf_quant_config = None;
            t.config["quantization_config"]["quant_algo"] = json!("NVFP4");
        },
        &[FILE, Q, "announces NVFP4 in blocks of 16", "stored as F8_E4M3"],
    );
}

#[test]
fn declared_quantized_but_stored_plain_is_refused() {
    let plain = Tiny::new(Format::Bf16).tensors;
    for format in [Format::Nvfp4, Format::CtFp8Channel, Format::Mxfp8] {
        breaking(format, |t| t.tensors = plain.clone(), &[FILE, Q, "announces", "stored as BF16"]);
    }
}

#[test]
fn an_excluded_module_that_is_quantized_is_refused() {
    for (format, key) in
        [(Format::Nvfp4, "exclude_modules"), (Format::CtNvfp4, "ignore"), (Format::DeepSeek, "modules_to_not_convert")]
    {
        let change = |t: &mut Tiny| t.config["quantization_config"][key] = json!(["lm_head", UP]);
        breaking(format, change, &[FILE, UP, "leaves this module unquantized", "stored as"]);
    }
}

#[test]
fn quantized_tensors_without_any_configuration_are_refused() {
    let change = |t: &mut Tiny| {
        t.hf_quant_config = None;
        t.config.as_object_mut().unwrap().remove("quantization_config");
    };
    breaking(Format::Nvfp4, change, &[FILE, Q, "unquantized", "stored as U8"]);
    breaking(Format::DeepSeek, change, &[FILE, Q, "unquantized", "stored as F8_E4M3"]);
}

#[test]
fn two_configurations_that_disagree_are_refused() {
    let change = |t: &mut Tiny| t.hf_quant_config.as_mut().unwrap()["quantization"]["quant_algo"] = json!("FP8");
    breaking(Format::Nvfp4, change, &["hf_quant_config.json", "quantization.quant_algo", "NVFP4", "FP8"]);
}

#[test]
fn a_declared_fp8_cache_with_a_part_of_its_scales_is_refused() {
    breaking(
        Format::Fp8,
        |t| t.remove("model.layers.1.self_attn.v_proj.v_scale"),
        &["`model.layers.1.self_attn.v_proj.v_scale` is missing", "other scales of it are stored"],
    );
    // One file announces it, the other does not, and no scale decides.
    breaking(
        Format::Nvfp4,
        |t| t.config["quantization_config"]["kv_cache_quant_algo"] = json!("FP8"),
        &["hf_quant_config.json", "quantization.kv_cache_quant_algo", "no scale of it is stored"],
    );
}

#[test]
fn a_tied_checkpoint_with_another_head_is_refused() {
    breaking(
        Format::Bf16,
        |t| t.config["tie_word_embeddings"] = json!(true),
        &[FILE, "lm_head.weight", "tie_word_embeddings"],
    );
    let other_type = |t: &mut Tiny| {
        t.config["tie_word_embeddings"] = json!(true);
        let values = 0.25f32.to_le_bytes().repeat(40 * 64);
        let head = t.tensor("lm_head.weight");
        (head.dtype, head.bytes) = ("F32", values);
    };
    breaking(Format::Bf16, other_type, &[FILE, "lm_head.weight", "tie_word_embeddings"]);
}

#[test]
fn a_vocabulary_that_does_not_match_the_embedding_is_refused() {
    config_only("vocab_size", json!(41), &[FILE, "model.embed_tokens.weight", "[41, 64]", "[40, 64]", "config.json"]);
}

// Names nobody knows.

#[test]
fn an_unknown_quant_method_is_refused() {
    for method in ["awq", "gptq", "bitsandbytes", "Modelopt", ""] {
        let change = |t: &mut Tiny| t.config["quantization_config"] = json!({"quant_method": method});
        breaking(Format::Bf16, change, &["config.json", "unknown quant_method", &format!("`{method}`"), "modelopt"]);
    }
    let nameless = |t: &mut Tiny| t.config["quantization_config"] = json!({});
    breaking(Format::Bf16, nameless, &["config.json", "quantization_config.quant_method", "nothing"]);
}

#[test]
fn an_unknown_quant_algo_is_refused() {
    let change = |t: &mut Tiny| {
        t.hf_quant_config = None;
        t.config["quantization_config"]["quant_algo"] = json!("W4A8_AWQ");
    };
    breaking(Format::Nvfp4, change, &["config.json", "unknown quant_algo `W4A8_AWQ`", "W4A16_NVFP4"]);
}

#[test]
fn an_unknown_cache_algorithm_is_refused() {
    let change = |t: &mut Tiny| t.config["quantization_config"]["kv_cache_quant_algo"] = json!("INT8");
    breaking(Format::Nvfp4, change, &["config.json", "kv_cache_quant_algo `INT8`"]);
    let change = |t: &mut Tiny| t.config["quantization_config"]["kv_cache_scheme"] = json!({"num_bits": 4});
    breaking(Format::CtNvfp4, change, &["config.json", "kv_cache_scheme", "8-bit float"]);
}

#[test]
fn an_unknown_rope_type_is_refused() {
    let change = |t: &mut Tiny| t.config["rope_scaling"] = json!({"rope_type": "longrope", "factor": 4.0});
    breaking(Format::Bf16, change, &["config.json", "unknown rope type `longrope`", "llama3"]);
}

#[test]
fn an_unknown_architecture_is_refused() {
    let change = |t: &mut Tiny| t.config["architectures"] = json!(["GemmaForCausalLM"]);
    breaking(Format::Bf16, change, &["config.json", "unknown architecture `GemmaForCausalLM`", "LlamaForCausalLM"]);
    let change = |t: &mut Tiny| drop(t.config.as_object_mut().unwrap().remove("architectures"));
    breaking(Format::Bf16, change, &["config.json", "unknown architecture"]);
}

#[test]
fn a_group_size_without_a_kernel_is_refused() {
    for size in [0, 1, 8, 12, 64] {
        let change = |t: &mut Tiny| {
            t.hf_quant_config = None;
            t.config["quantization_config"]["quant_algo"] = json!("W4A16_NVFP4");
            t.config["quantization_config"]["group_size"] = json!(size);
        };
        breaking(Format::Nvfp4, change, &["config.json", "quantization_config.group_size", "16 or 32"]);
    }
}

// The index.

#[test]
fn an_index_that_names_a_file_outside_the_folder_is_refused() {
    for name in
        ["../model.safetensors", "a/../../b", "/etc/passwd", "..", ".", "", "a\\b", "..\\b", "C:\\b", "b/", "a\0b"]
    {
        let shown = format!("{name:?}");
        sharded(|_, index| index["weight_map"]["lm_head.weight"] = json!(name), &[INDEX, "`lm_head.weight`", &shown]);
    }
}

#[test]
fn an_index_entry_that_is_no_file_name_is_refused() {
    sharded(|_, index| index["weight_map"]["lm_head.weight"] = json!(3), &[INDEX, "weight_map.lm_head.weight", "3"]);
    sharded(|_, index| index["weight_map"] = json!([]), &[INDEX, "weight_map", "an object"]);
    sharded(|_, index| index["weight_map"] = json!({}), &[INDEX, "weight_map", "at least one"]);
    sharded(|_, index| *index = json!({}), &[INDEX, "weight_map", "nothing"]);
}

#[test]
fn an_index_that_names_a_missing_file_is_refused() {
    sharded(
        |folder, _| std::fs::remove_file(folder.join("model-00002-of-00003.safetensors")).unwrap(),
        &[INDEX, "lists tensor `", "model-00002-of-00003.safetensors", "no such file", "download"],
    );
}

#[test]
fn an_index_that_names_a_folder_is_refused() {
    sharded(
        |folder, index| {
            std::fs::create_dir(folder.join("d")).unwrap();
            index["weight_map"]["lm_head.weight"] = json!("d");
        },
        &[INDEX, "`lm_head.weight` in d", "no such file"],
    );
}

#[cfg(unix)]
#[test]
fn an_index_that_names_a_pipe_does_not_hang() {
    sharded(
        |folder, index| {
            let made = std::process::Command::new("mkfifo").arg(folder.join("pipe")).status();
            assert!(made.is_ok_and(|s| s.success()));
            index["weight_map"]["lm_head.weight"] = json!("pipe");
        },
        &[INDEX, "`lm_head.weight` in pipe", "no such file"],
    );
}

#[test]
fn an_index_that_lists_a_tensor_the_shard_lacks_is_refused() {
    let shard = "model-00001-of-00003.safetensors";
    sharded(|_, index| index["weight_map"]["ghost"] = json!(shard), &[INDEX, "`ghost`", shard, "does not hold it"]);
    sharded(
        |_, index| index["weight_map"]["lm_head.weight"] = json!(shard),
        &[INDEX, "`lm_head.weight`", shard, "does not hold it"],
    );
}

#[test]
fn a_shard_in_the_place_of_another_is_refused() {
    let (first, last) = ("model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors");
    sharded(
        |folder, _| assert!(std::fs::copy(folder.join(first), folder.join(last)).is_ok()),
        &[INDEX, "lists tensor `lm_head.weight`", last, "does not hold it"],
    );
}

#[test]
fn a_truncated_shard_is_refused() {
    let last = "model-00003-of-00003.safetensors";
    sharded(
        |folder, _| {
            let bytes = std::fs::read(folder.join(last)).unwrap();
            std::fs::write(folder.join(last), &bytes[..bytes.len() - 1]).unwrap();
        },
        &[last, "`lm_head.weight` ends at byte", "truncated"],
    );
}

// Absurd configurations: refused before anything of their size is allocated.

#[test]
fn absurd_counts_are_refused() {
    let huge = 1u64 << 60;
    for key in [
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "max_position_embeddings",
    ] {
        for bad in [json!(huge), json!(u64::MAX), json!(0), json!(-1), json!(2.5), json!("2"), json!([2]), json!(1e300)]
        {
            config(key, bad.clone(), &["a whole number from 1", &bad.to_string()]);
        }
    }
}

#[test]
fn counts_that_are_allowed_but_not_stored_are_refused_without_allocating_them() {
    config_only("num_hidden_layers", json!(1024), &["`num_hidden_layers`: expected 2", "found 1024"]);
    config_only("hidden_size", json!(1 << 18), &[FILE, "model.embed_tokens.weight", "262144"]);
    config_only("vocab_size", json!(1 << 24), &[FILE, "model.embed_tokens.weight", "16777216"]);
}

fn config_only(key: &str, value: serde_json::Value, needles: &[&str]) {
    breaking(Format::Bf16, |t| t.config[key] = value, needles);
}

#[test]
fn a_missing_count_is_refused() {
    for key in ["num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"] {
        let change = |t: &mut Tiny| drop(t.config.as_object_mut().unwrap().remove(key));
        breaking(Format::Bf16, change, &["config.json", key, "found nothing"]);
    }
}

#[test]
fn absurd_numbers_of_experts_are_refused() {
    let moe = |key: &'static str, value: u64, needles: &[&str]| {
        let folder = tempfile::tempdir().unwrap();
        let mut t = Tiny::with_size(Format::Bf16, Size { experts: Some(2), ..SMALL });
        t.config["num_hidden_layers"] = json!(1024);
        t.config[key] = json!(value);
        t.write(folder.path());
        refused(folder.path(), &[&["config.json", key], needles].concat());
    };
    moe("num_experts", 1 << 60, &["a whole number"]);
    moe("num_experts", 4096, &["65536 experts in all 1024 layers"]);
    moe("num_experts_per_tok", 3, &["from 1 to 2"]);
    moe("moe_intermediate_size", 0, &["a whole number"]);
}

#[test]
fn head_counts_that_do_not_divide_are_refused() {
    config("num_key_value_heads", json!(3), &["a divisor of num_attention_heads = 4"]);
    config("num_key_value_heads", json!(8), &["a divisor"]);
    let change = |t: &mut Tiny| {
        t.config.as_object_mut().unwrap().remove("head_dim");
        t.config["num_attention_heads"] = json!(6);
        t.config["num_key_value_heads"] = json!(2);
    };
    breaking(Format::Bf16, change, &["config.json", "num_attention_heads", "a divisor of hidden_size = 64"]);
}

#[test]
fn an_odd_head_dim_is_refused() {
    config("head_dim", json!(15), &["an even number"]);
}

#[test]
fn numbers_outside_f32_are_refused() {
    for bad in [json!(0), json!(-1e-5), json!("1e-5"), json!(1e-60), json!(1e60), json!([1])] {
        config("rms_norm_eps", bad, &["a positive finite number"]);
    }
    for bad in [json!(0), json!(-1.0), json!("10000")] {
        config("rope_theta", bad, &["a positive finite number"]);
    }
    let llama3 = |factor: f64, low: f64| {
        json!({"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64})
    };
    config("rope_scaling", llama3(1e-300, 1.0), &["rope_scaling.factor", "a positive finite number"]);
    config("rope_scaling", llama3(8.0, 4.0), &["rope_scaling.low_freq_factor", "less than"]);
}

#[test]
fn rope_scaling_without_a_type_is_not_guessed() {
    config("rope_scaling", json!({"factor": 2.0}), &["rope_scaling.rope_type"]);
    config(
        "rope_parameters",
        json!({"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        &["rope_parameters.partial_rotary_factor"],
    );
}

#[test]
fn settings_of_another_type_are_refused() {
    config("tie_word_embeddings", json!("yes"), &["true or false"]);
    config("hidden_act", json!("gelu"), &["silu"]);
    config("architectures", json!("LlamaForCausalLM"), &["a list of strings"]);
    config("eos_token_id", json!(-3), &["a token id"]);
    config("quantization_config", json!([]), &["an object"]);
    config("rope_scaling", json!(7), &["an object"]);
}

#[test]
fn a_config_that_is_an_array_deeply_nested_or_huge_is_refused() {
    let text = |text: &str, needle: &str| {
        let folder = tempfile::tempdir().unwrap();
        Tiny::new(Format::Bf16).write(folder.path());
        std::fs::write(folder.path().join("config.json"), text).unwrap();
        refused(folder.path(), &["config.json", needle]);
    };
    text("[]", "expected an object");
    text("", "it is empty");
    text("{\"a\": 1,}", "trailing comma");
    text(&"{\"a\":".repeat(100_000), "recursion limit");
    text(&format!("{{\"a\": {}1{}}}", "[".repeat(5000), "]".repeat(5000)), "recursion limit");
    text(&" ".repeat((64 << 20) + 1), "more than a configuration file");
}

#[test]
fn an_invalid_expression_is_refused() {
    for bad in ["re:(", "re:[a", "re:a{99999}{99999}", "re:(?P<x>", "re:*"] {
        let change = |t: &mut Tiny| t.config["quantization_config"]["ignore"] = json!(["lm_head", bad]);
        breaking(Format::CtNvfp4, change, &["config.json", "quantization_config.ignore", bad]);
    }
}

#[test]
fn a_hundred_thousand_names_are_looked_up_and_as_many_expressions_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut t = Tiny::new(Format::CtNvfp4);
    let mut names: Vec<String> = (0..100_000).map(|i| format!("model.layers.{i}.mlp.experts.7.up_proj")).collect();
    names.push("lm_head".into());
    t.config["quantization_config"]["ignore"] = json!(names);
    t.write(folder.path());
    load(folder.path()).unwrap();
    let expressions: Vec<String> = (0..100_000).map(|i| format!("re:model.layers.{i}.*")).collect();
    let change = |t: &mut Tiny| t.config["quantization_config"]["ignore"] = json!(expressions);
    breaking(Format::CtNvfp4, change, &["config.json", "quantization_config.ignore", "at most 2048 expressions"]);
}

#[test]
fn an_expression_that_backtracks_catastrophically_ends_quickly_and_is_refused() {
    // The look-ahead keeps it from the linear-time engine.
    let bad = "re:(?:(?:(?:\\w|\\.)(?!!))+)+!";
    let change = |t: &mut Tiny| t.config["quantization_config"]["ignore"] = json!([bad]);
    breaking(Format::CtNvfp4, change, &["config.json", "quantization_config.ignore", bad]);
    // Without any, the linear-time engine takes it, and it matches nothing.
    let folder = tempfile::tempdir().unwrap();
    let mut t = Tiny::new(Format::CtNvfp4);
    t.config["quantization_config"]["ignore"] = json!(["lm_head", "re:((\\w|\\.)+)+!"]);
    t.write(folder.path());
    load(folder.path()).unwrap();
}
