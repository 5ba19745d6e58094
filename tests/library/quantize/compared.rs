//! Comparing what `quantize` writes with what the exporting tools wrote.

use std::path::Path;

use recoup::checkpoint::Checkpoint;
use recoup::checkpoint::dialect::Dialect;
use recoup::checkpoint::json::Object;
use recoup::checkpoint::tensors::TensorStore;
use recoup::model::{Decoder, ModelConfig};
use recoup::quantize::calibrate::{Calibration, calibrate};
use recoup::quantize::recipe::ScaleChoice;
use recoup::quantize::{Recipe, quantize};
use serde_json::Value;

use crate::support::fixtures::cpu;

/// Calibrated on some tokens of the model's.
pub fn calibrated(source: &Checkpoint) -> Calibration {
    let vocab = ModelConfig::read(&source.config).unwrap().vocab as u32;
    let tokens: Vec<Vec<u32>> = (0..4).map(|s| (0..64).map(|i| (i * 37 + s * 101) % vocab).collect()).collect();
    calibrate(source, cpu(2), &tokens, "test", &mut |_, _| {}).unwrap()
}

/// The quantization that a checkpoint's configurations state, without who wrote it.
pub fn stated(folder: &Path) -> [Option<Value>; 2] {
    ["config.json", "hf_quant_config.json"].map(|file| {
        let file = folder.join(file);
        let mut value = file.is_file().then(|| Object::read(&file).unwrap().value().clone())?;
        let mut quantization = value
            .get_mut("quantization_config")
            .or(None)
            .map(Value::take)
            .unwrap_or_else(|| value["quantization"].take());
        // What llm-compressor says of itself, and engines do not read.
        for key in ["producer", "moe_sparsity_config"] {
            quantization.as_object_mut().unwrap().remove(key);
        }
        // Sets.
        for key in ["ignore", "exclude_modules", "modules_to_not_convert"] {
            if let Some(names) = quantization.get_mut(key).and_then(Value::as_array_mut) {
                names.sort_by(|a, b| a.as_str().cmp(&b.as_str()));
            }
        }
        Some(quantization)
    })
}

/// Quantizes the BF16 model in `source` and compares with what the dialect's tool exported to `theirs`: weights, their
/// scales, names, types and configurations. Activation and KV scales depend on the calibration text, which fixtures do not
/// hold. `mend` is applied to what theirs states.
pub fn compare(source: &Path, recipe: &Recipe, dialect: Dialect, theirs: &Path, mend: &dyn Fn(&mut Value)) {
    let source = Checkpoint::open(source).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("quantized");
    let at = theirs.display();
    quantize(&source, &calibrated(&source), recipe, dialect, &Default::default(), None, &out).unwrap();
    let ours = TensorStore::open(&out).unwrap();
    let exported = TensorStore::open(theirs).unwrap();
    assert_eq!(ours.names().collect::<Vec<_>>(), exported.names().collect::<Vec<_>>(), "{at}");
    let (mut weights, mut wrong) = (0, Vec::new());
    for name in exported.names() {
        let (a, b) = (ours.peek(name).unwrap(), exported.peek(name).unwrap());
        assert_eq!((a.dtype, a.shape), (b.dtype, b.shape), "{at}: {name}");
        if !name.contains("input_") && !name.ends_with("k_scale") && !name.ends_with("v_scale") {
            let differing = a.bytes.iter().zip(b.bytes).filter(|(a, b)| a != b).count();
            // The tools' searches ran on a simulation of theirs, whose f32 rounding decides where two scales err nearly
            // equally: the scales of 4 blocks in 1,000 and their codes may differ.
            let scales = if recipe.block_scales == ScaleChoice::Max { 0 } else { 4 };
            let ties = a.bytes.len() * scales / 1000;
            if differing > ties {
                wrong.push(format!("{name}: {differing} of {}", a.bytes.len()));
            }
            weights += usize::from(name.contains("proj") || name.contains(".experts."));
        }
    }
    assert!(wrong.is_empty(), "{at}: {} of {weights} differ: {:?}", wrong.len(), &wrong[..wrong.len().min(4)]);
    assert!(weights >= 14, "{at}: {weights}");
    let mut expected = stated(theirs);
    expected.iter_mut().flatten().for_each(mend);
    assert_eq!(stated(&out), expected, "{at}");
    // All else of config.json is the source's.
    let written = Checkpoint::open(&out).unwrap();
    let mut config = written.whole_config.value().clone();
    config.as_object_mut().unwrap().remove("quantization_config");
    assert_eq!(&config, source.whole_config.value(), "{at}");
    Decoder::load(cpu(2), &written).unwrap();
}
