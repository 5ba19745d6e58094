//! A model that computes what is no number is stopped, by every engine, with the first module that did: nothing is scored,
//! chosen or calibrated from it.

use crate::support::fixtures::{cpu, try_logits};
use crate::support::project;
use crate::support::tiny::{Format, Tiny};
use recoup::backend::autograd::AutogradBackend;
use recoup::backend::{Backend, BackendError};
use recoup::checkpoint::Checkpoint;
use recoup::engine::{Engine, Limits, Request, Sequence, score_all};
use recoup::formats::kv::KvFormat;
use recoup::model::Decoder;
use recoup::quantize::calibrate::calibrate;
use recoup::text::Tokenizer;
use tempfile::TempDir;

const TOKENS: [u32; 5] = [3, 1, 4, 1, 5];

fn written(format: Format, change: impl FnOnce(&mut Tiny)) -> (TempDir, Checkpoint) {
    let mut t = Tiny::new(format);
    change(&mut t);
    let folder = tempfile::tempdir().unwrap();
    t.write(folder.path());
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    (folder, checkpoint)
}

fn forward<B: Backend>(backend: B, checkpoint: &Checkpoint) -> Result<Vec<f32>, BackendError> {
    try_logits(&Decoder::load(backend, checkpoint).unwrap(), &TOKENS)
}

/// Where the numbers end, as the packed kernels and the reference say.
fn places(checkpoint: &Checkpoint) -> [String; 2] {
    let place = |result: Result<Vec<f32>, BackendError>| match result {
        Err(BackendError::NotFinite { place, value, model }) => {
            assert!(!value.is_finite());
            assert_eq!(model, checkpoint.tensors.folder());
            place
        }
        other => panic!("{other:?}"),
    };
    [place(forward(cpu(1), checkpoint)), place(forward(AutogradBackend::new(), checkpoint))]
}

#[test]
fn the_first_module_that_overflows_is_named_wherever_it_stands() {
    for (tensor, expected) in [
        ("model.layers.0.self_attn.q_proj", "what comes out of `model.layers.0.self_attn.q_proj`"),
        ("model.layers.1.self_attn.v_proj", "what comes out of `model.layers.1.self_attn.v_proj`"),
        ("model.layers.1.self_attn.o_proj", "what comes out of `model.layers.1.self_attn.o_proj`"),
        ("model.layers.0.mlp.up_proj", "what comes out of `model.layers.0.mlp.up_proj`"),
        ("model.layers.1.mlp.down_proj", "what comes out of `model.layers.1.mlp.down_proj`"),
        ("model.layers.1.input_layernorm", "what enters `model.layers.1.self_attn.q_proj`"),
        ("model.norm", "what enters `lm_head`"),
        ("lm_head", "what comes out of `lm_head`"),
    ] {
        let (_folder, checkpoint) = written(Format::Bf16, |t| t.fill_signed(&format!("{tensor}.weight"), 3.3e38));
        assert_eq!(places(&checkpoint), [expected; 2], "{tensor}");
    }
}

#[test]
fn four_bit_and_eight_bit_inputs_do_not_swallow_what_is_no_number() {
    // Finite scales whose products are not: what enters down_proj is then infinite, and E2M1 has no infinity.
    for (format, scale) in
        [(Format::Nvfp4, "weight_scale_2"), (Format::Fp8, "weight_scale"), (Format::W4a8, "weight_scale_2")]
    {
        let module = "model.layers.0.mlp.up_proj";
        let (_folder, checkpoint) = written(format, |t| t.set_f32(&format!("{module}.{scale}"), 3e38));
        assert_eq!(places(&checkpoint)[0], format!("what comes out of `{module}`"), "{format:?}");
    }
}

#[test]
fn scoring_generation_and_calibration_end_with_the_module() {
    let (_folder, checkpoint) = written(Format::Bf16, |t| t.fill_signed("model.layers.1.mlp.down_proj.weight", 3.3e38));
    let expected = "`model.layers.1.mlp.down_proj`";
    let model = Decoder::load(cpu(1), &checkpoint).unwrap();
    let engine = || Engine::new(&model, Limits::new(64, 1), KvFormat::F32).unwrap();
    let sequence = Sequence { tokens: TOKENS.into(), first: 2 };
    let scored = score_all(&mut engine(), &[sequence], &mut |_, s| panic!("scored {s:?}"));
    let error = scored.unwrap_err().to_string();
    assert!(error.contains(expected), "{error}");
    let tokenizer = Tokenizer::from_folder(&project().join("models/books-bf16")).unwrap();
    let mut engine = engine();
    engine.generate(&tokenizer, Request { prompt: TOKENS.into(), max_tokens: 1, ..Request::default() }).unwrap();
    let error = engine.step().unwrap_err().to_string();
    assert!(error.contains(expected), "{error}");
    let error = calibrate(&checkpoint, cpu(1), &[TOKENS.into()], "", &mut |_, _| {}).unwrap_err().to_string();
    assert!(error.contains(expected) && error.contains("no number"), "{error}");
}

#[test]
fn what_is_not_broken_computes_numbers_in_every_format() {
    for format in Format::ALL {
        let (_folder, checkpoint) = written(format, |_| {});
        assert!(forward(cpu(1), &checkpoint).unwrap().iter().all(|v| v.is_finite()), "{format:?}");
    }
}
