//! A real model, end to end: imported, computed, quantized, run. Needs `RECOUP_SMOLLM2_GGUF`, see CONTRIBUTING.md.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, Weak};

use recoup::backend::Backend;
use recoup::backend::cpu::{CpuBackend, isa::Isa};
use recoup::checkpoint::Checkpoint;
use recoup::checkpoint::dialect::Dialect;
use recoup::checkpoint::tensors::TensorStore;
use recoup::gguf;
use recoup::model::Decoder;
use recoup::quantize::{Recipe, Scheme, calibrate::calibrate, quantize};

use crate::support::command::{Folder, shown_json, succeed};
use crate::support::fixtures::{bits, cpu, try_logits};
use crate::support::{json, json_lines, path_from, project};

fn golden(name: &str) -> PathBuf {
    project().join("tests/data/smollm2").join(name)
}

pub struct Models {
    _folder: tempfile::TempDir,
    pub bf16: PathBuf,
    nvfp4: PathBuf,
    fp8: PathBuf,
}

/// Imported and quantized once for tests that run at once, and gone with the last of them; `None` where the file is not
/// there.
pub fn models() -> Option<Arc<Models>> {
    static MODELS: Mutex<Weak<Models>> = Mutex::new(Weak::new());
    let gguf = path_from("RECOUP_SMOLLM2_GGUF")?;
    let mut shared = MODELS.lock().unwrap();
    if let Some(models) = shared.upgrade() {
        return Some(models);
    }
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (bf16, nvfp4, fp8) = (at("bf16"), at("nvfp4"), at("fp8"));
    gguf::import(&gguf, &bf16, &mut |_, _, _| {}).unwrap();
    let source = Checkpoint::open(&bf16).unwrap();
    let tokens: Vec<u32> = (0..128).map(|i| (i * 379) % 49_152).collect();
    let calibration = calibrate(&source, cpu(0), &[tokens], "test", &mut |_, _| {}).unwrap();
    for (scheme, out) in [(Scheme::Nvfp4, &nvfp4), (Scheme::Fp8, &fp8)] {
        let recipe = Recipe::uniform(scheme);
        quantize(&source, &calibration, &recipe, Dialect::ModelOpt, &Default::default(), None, out).unwrap();
    }
    let models = Arc::new(Models { _folder: folder, bf16, nvfp4, fp8 });
    *shared = Arc::downgrade(&models);
    Some(models)
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
    let model = Decoder::load(cpu(0), &Checkpoint::open(&models.bf16).unwrap()).unwrap();
    let (mut error, mut norm) = (0.0f64, 0.0f64);
    for (row, ids) in ids.chunks(64).enumerate() {
        let got = try_logits(&model, ids).unwrap();
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
    let golden = json(&golden("modelopt.json"));
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
        let model = Decoder::load(cpu(0), &checkpoint).unwrap();
        let mut resident = 0;
        model.linears().for_each(|l| resident += model.backend().resident_bytes(l) as u64);
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
            let bits = bits(&try_logits(&model, &[504, 3575, 282]).unwrap());
            assert!(*first.get_or_insert_with(|| bits.clone()) == bits, "{isa}, {threads} threads");
        }
    }
}

#[test]
fn it_answers_a_question() {
    let Some(models) = models() else { return };
    for folder in [&models.bf16, &models.nvfp4, &models.fp8] {
        let folder = folder.to_str().unwrap();
        let (text, _) = succeed(&["run", folder, "-p", "What is the capital of France?", "-n", "24"]);
        assert!(text.contains("Paris"), "{text}");
    }
}

/// Recovery of a real model, judged by the packed kernels on text of another kind than it was trained on.
#[test]
fn recovery_brings_a_real_model_nearer_to_its_teacher() {
    let Some(models) = models() else { return };
    let folder = Folder::new();
    let (bf16, ptq) = (models.bf16.to_str().unwrap(), models.nvfp4.to_str().unwrap());
    let (out, report) = (&folder.name("recovered"), &folder.name("report"));
    let method = ["--method", "block:steps=12,samples=24", "--method", "qad:steps=6,lr=3e-5"];
    let data = ["--data", "src/corpus/calibration.txt", "--length", "128", "--samples", "40", "--watch-samples", "4"];
    succeed(&[&["recover", ptq, "--teacher", bf16, "-o", out, "--evaluate-every", "3"][..], &method, &data].concat());
    let compare = ["compare", bf16, ptq, out, "--tasks", "none", "--no-speed", "--json", "-o", report];
    let text = ["--text", "wikitext", "--windows", "4", "--window", "256"];
    let found = shown_json(&[&compare[..], &text].concat());
    let kl = |i: usize| found["divergences"][i]["kl"]["value"].as_f64().unwrap();
    println!("KL {:.4}, recovered {:.4}", kl(0), kl(1));
    assert!(kl(1) < 0.9 * kl(0), "{} against {}", kl(1), kl(0));
    let page = folder.read("report/report.html");
    assert!(page.contains("While training: KL on the data"), "the report shows how it was trained");
}

/// Answers of lm-evaluation-harness 0.4.13 (`--model hf`, transformers 5.24, f32) to the first documents of the shipped GSM8K
/// under the model's chat template: `lm_eval --model hf --model_args pretrained=BF16,dtype=float32 --tasks gsm8k
/// --apply_chat_template --gen_kwargs max_gen_toks=96`, with the shipped data. `<|im_end|>`, one of the task's stop strings
/// and a special token, ends them.
#[test]
fn gsm8k_is_answered_as_in_lm_evaluation_harness() {
    let Some(models) = models() else { return };
    let folder = Folder::new();
    let ask = ["eval", models.bf16.to_str().unwrap(), "--tasks", "gsm8k", "--apply-chat-template", "-L", "2"];
    succeed(&[&ask[..], &["--gen-kwargs", "max_gen_toks=96", "-o", &folder.name("out")]].concat());
    let samples = json_lines(&folder.at("out/samples_gsm8k.jsonl"));
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
