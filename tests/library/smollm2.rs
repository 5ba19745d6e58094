//! A real model, end to end: imported, computed, quantized, run. Needs `RECOUP_SMOLLM2_GGUF`, see CONTRIBUTING.md.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use recoup::backend::cpu::{CpuBackend, isa::Isa};
use recoup::backend::{Backend, Batch, PAGE, Span};
use recoup::checkpoint::Checkpoint;
use recoup::checkpoint::dialect::Dialect;
use recoup::checkpoint::tensors::TensorStore;
use recoup::formats::kv::KvFormat;
use recoup::gguf;
use recoup::model::{Decoder, Wanted};
use recoup::quantize::{Recipe, Scheme, calibrate::calibrate, quantize};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/smollm2").join(name)
}

struct Models {
    _folder: tempfile::TempDir,
    bf16: PathBuf,
    nvfp4: PathBuf,
    fp8: PathBuf,
}

fn backend() -> CpuBackend {
    CpuBackend::new(Isa::detect(), 0).unwrap()
}

/// Imports and quantizes once for all tests; `None` where the file is not there.
fn models() -> Option<&'static Models> {
    static MODELS: OnceLock<Option<Models>> = OnceLock::new();
    let models = MODELS.get_or_init(|| {
        let gguf = PathBuf::from(std::env::var_os("RECOUP_SMOLLM2_GGUF")?);
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let (bf16, nvfp4, fp8) = (at("bf16"), at("nvfp4"), at("fp8"));
        gguf::import(&gguf, &bf16, &mut |_, _, _| {}).unwrap();
        let source = Checkpoint::open(&bf16).unwrap();
        let tokens: Vec<u32> = (0..128).map(|i| (i * 379) % 49_152).collect();
        let calibration = calibrate(&source, backend(), &[tokens], "test", &mut |_, _| {}).unwrap();
        quantize(
            &source,
            &calibration,
            &Recipe::uniform(Scheme::Nvfp4),
            Dialect::ModelOpt,
            &Default::default(),
            None,
            &nvfp4,
        )
        .unwrap();
        quantize(
            &source,
            &calibration,
            &Recipe::uniform(Scheme::Fp8),
            Dialect::ModelOpt,
            &Default::default(),
            None,
            &fp8,
        )
        .unwrap();
        Some(Models { _folder: folder, bf16, nvfp4, fp8 })
    });
    if models.is_none() {
        eprintln!("skipped: set RECOUP_SMOLLM2_GGUF to SmolLM2-135M-Instruct.Q4_1.gguf");
    }
    models.as_ref()
}

fn logits(model: &Decoder<CpuBackend>, tokens: &[u32]) -> Vec<f32> {
    let mut cache = model.new_cache(tokens.len().next_multiple_of(PAGE), KvFormat::F32).unwrap();
    let pages = (0..tokens.len().div_ceil(PAGE) as u32).collect();
    let span = Span { start: 0, len: tokens.len(), pages };
    let out = model.forward(&Batch { tokens: tokens.to_vec(), spans: vec![span] }, &mut cache, Wanted::All).unwrap();
    model.backend().to_host(&out).unwrap()
}

#[test]
fn bf16_logits_agree_with_hugging_face_transformers() {
    let Some(models) = models() else { return };
    let store = TensorStore::open_file(&golden("logits.safetensors")).unwrap();
    let integers = |name: &str| -> Vec<u32> {
        let bytes = store.peek(name).unwrap().bytes;
        bytes.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32).collect()
    };
    let (ids, columns) = (integers("input_ids"), integers("columns"));
    let expected = store.peek("logits").unwrap().floats().unwrap();
    let model = Decoder::load(backend(), &Checkpoint::open(&models.bf16).unwrap()).unwrap();
    let (mut error, mut norm) = (0.0f64, 0.0f64);
    for (row, ids) in ids.chunks(64).enumerate() {
        let got = logits(&model, ids);
        for (t, got) in got.chunks(model.config.vocab).enumerate() {
            for (c, &column) in columns.iter().enumerate() {
                let expected = f64::from(expected[(row * 64 + t) * columns.len() + c]);
                error += (f64::from(got[column as usize]) - expected).powi(2);
                norm += expected.powi(2);
            }
        }
    }
    let relative = (error / norm).sqrt();
    println!("relative difference {relative:.2e}");
    assert!(relative < 1e-3, "{relative}");
}

#[test]
fn quantized_weights_and_scales_are_modelopts_byte_for_byte() {
    let Some(models) = models() else { return };
    let golden: serde_json::Value = serde_json::from_slice(&std::fs::read(golden("modelopt.json")).unwrap()).unwrap();
    for (name, folder) in [("nvfp4", &models.nvfp4), ("fp8", &models.fp8)] {
        let expected: BTreeMap<String, u32> = serde_json::from_value(golden[name].clone()).unwrap();
        let store = TensorStore::open(folder).unwrap();
        let ours: BTreeMap<String, u32> = store
            .names()
            .filter(|n| !n.ends_with("input_scale"))
            .map(|n| (n.to_owned(), crc32fast::hash(store.peek(n).unwrap().bytes)))
            .collect();
        assert_eq!(ours.len(), expected.len());
        let differing: Vec<_> = expected.iter().filter(|(n, crc)| ours.get(*n) != Some(*crc)).collect();
        assert!(differing.is_empty(), "{name}: {differing:?}");
    }
}

#[test]
fn packed_weights_are_as_large_as_their_file() {
    let Some(models) = models() else { return };
    for folder in [&models.bf16, &models.nvfp4, &models.fp8] {
        let checkpoint = Checkpoint::open(folder).unwrap();
        let model = Decoder::load(backend(), &checkpoint).unwrap();
        let mut resident = 0;
        model.linears().for_each(|l| resident += l.resident_bytes() as u64);
        let file = checkpoint.tensors.file_bytes();
        assert!(resident * 10 <= file * 11, "{resident} bytes held for a file of {file}");
    }
}

#[test]
fn every_instruction_set_and_thread_count_gives_the_same_bits_on_a_real_model() {
    let Some(models) = models() else { return };
    let checkpoint = Checkpoint::open(&models.nvfp4).unwrap();
    let mut first: Option<Vec<u32>> = None;
    for isa in Isa::available() {
        for threads in [1, 2] {
            let model = Decoder::load(CpuBackend::new(isa, threads).unwrap(), &checkpoint).unwrap();
            let bits: Vec<u32> = logits(&model, &[504, 3575, 282]).iter().map(|v| v.to_bits()).collect();
            assert!(*first.get_or_insert_with(|| bits.clone()) == bits, "{isa}, {threads} threads");
        }
    }
}

#[test]
fn it_answers_a_question() {
    let Some(models) = models() else { return };
    for folder in [&models.bf16, &models.nvfp4, &models.fp8] {
        let out = Command::new(env!("CARGO_BIN_EXE_recoup"))
            .arg("run")
            .arg(folder)
            .args(["-p", "What is the capital of France?", "-n", "24"])
            .output()
            .unwrap();
        let text = String::from_utf8(out.stdout).unwrap();
        assert!(out.status.success() && text.contains("Paris"), "{text}");
    }
}

/// Recovery of a real model, judged by the packed kernels on text of another kind than it was trained on.
#[test]
fn recovery_brings_a_real_model_nearer_to_its_teacher() {
    let Some(models) = models() else { return };
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let recoup = |args: &[&str]| {
        let out = Command::new(env!("CARGO_BIN_EXE_recoup"))
            .args(args)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .output()
            .unwrap();
        assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
        out.stdout
    };
    let (bf16, ptq) = (models.bf16.to_str().unwrap(), models.nvfp4.to_str().unwrap());
    let (out, report) = (at("recovered"), at("report"));
    let (out, report) = (out.to_str().unwrap(), report.to_str().unwrap());
    let method = ["--method", "block:steps=12,samples=24", "--method", "qad:steps=6,lr=3e-5"];
    let data = ["--data", "src/cli/calibration.txt", "--length", "128", "--samples", "40", "--watch-samples", "4"];
    recoup(&[&["recover", ptq, "--teacher", bf16, "-o", out, "--evaluate-every", "3"][..], &method, &data].concat());
    let compare = ["compare", bf16, ptq, out, "--tasks", "none", "--no-speed", "--json", "-o", report];
    let text = ["--text", "wikitext", "--windows", "4", "--window", "256"];
    let found = recoup(&[&compare[..], &text].concat());
    let found: serde_json::Value = serde_json::from_slice(&found).unwrap();
    let kl = |i: usize| found["divergences"][i]["kl"]["value"].as_f64().unwrap();
    println!("KL {:.4}, recovered {:.4}", kl(0), kl(1));
    assert!(kl(1) < 0.9 * kl(0), "{} against {}", kl(1), kl(0));
    let page = std::fs::read_to_string(Path::new(report).join("report.html")).unwrap();
    assert!(page.contains("While training: KL on the data"), "the report shows how it was trained");
}

/// Answers of lm-evaluation-harness 0.4.13 (`--model hf`, transformers 5.24, f32) to the first documents of the shipped GSM8K
/// under the model's chat template: `lm_eval --model hf --model_args pretrained=BF16,dtype=float32 --tasks gsm8k
/// --apply_chat_template --gen_kwargs max_gen_toks=96`, with the shipped data. `<|im_end|>`, one of the task's stop strings
/// and a special token, ends them.
#[test]
fn gsm8k_is_answered_as_in_lm_evaluation_harness() {
    let Some(models) = models() else { return };
    let out = tempfile::tempdir().unwrap();
    let to = out.path().join("out");
    let run = Command::new(env!("CARGO_BIN_EXE_recoup"))
        .arg("eval")
        .arg(&models.bf16)
        .args(["--tasks", "gsm8k", "--apply-chat-template", "--gen-kwargs", "max_gen_toks=96", "-L", "2", "-o"])
        .arg(&to)
        .output()
        .unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let samples = std::fs::read_to_string(to.join("samples_gsm8k.jsonl")).unwrap();
    let samples: Vec<serde_json::Value> = samples.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let expected = [
        "She makes 16*3 = <<16*3=54>>54 cents per duck egg\nShe sells the remainder at the farmers' market for $2*5 = <<2*5=10>>10 cents per duck egg\n#### 10",
        "The robe takes 2 x 2 = <<2*2=4>>4 bolts of blue fiber.\nThe robe takes 4 x 2 = <<4*2=8>>8 bolts of white fiber.\n#### 8",
    ];
    for (document, text) in expected.into_iter().enumerate() {
        let of_document = samples.iter().filter(|s| s["doc_id"] == document);
        let answers: Vec<&str> = of_document.map(|s| s["resps"][0][0].as_str().unwrap()).collect();
        assert!(!answers.is_empty() && answers.iter().all(|a| *a == text), "{answers:?}");
    }
}
