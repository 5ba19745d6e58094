//! Our scores are lm-evaluation-harness's, request by request.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use recoup::backend::Backend;
use recoup::backend::autograd::AutogradBackend;
use recoup::checkpoint::Checkpoint;
use recoup::evaluate::{EvaluatedModel, ModelText};
use recoup::formats::kv::KvFormat;
use recoup::model::Decoder;
use recoup_eval::{GenerationOptions, LanguageModel as _, Request, Response};

use crate::smollm2;
use crate::support::fixtures::cpu;
use crate::support::{json_lines, project};

struct Loaded<B: Backend> {
    model: Decoder<B>,
    text: ModelText,
}

impl<B: Backend> Loaded<B> {
    fn open(backend: B, folder: &Path) -> Self {
        let checkpoint = Checkpoint::open(folder).unwrap();
        let text = ModelText::from_folder(folder, &checkpoint.config).unwrap();
        Self { model: Decoder::load(backend, &checkpoint).unwrap(), text }
    }

    fn evaluated(&self) -> EvaluatedModel<'_, B> {
        EvaluatedModel::new(&self.model, &self.text, KvFormat::F32, None)
    }

    fn answers(&self, requests: &[Request]) -> Vec<Response> {
        let mut out = vec![None; requests.len()];
        let mut model = self.evaluated();
        model
            .answer(requests, &mut |i, response| {
                assert!(out[i].replace(response).is_none(), "request {i} was answered twice");
                ControlFlow::Continue(())
            })
            .unwrap();
        out.into_iter().map(Option::unwrap).collect()
    }
}

/// What lm-evaluation-harness asked and got.
struct Golden {
    task: String,
    request: Request,
    /// Of the continuation or the text; 0 where text was generated.
    log_likelihood: f64,
    is_greedy: bool,
    generated: String,
}

fn golden(file: &Path) -> Vec<Golden> {
    let rows = json_lines(file).into_iter().map(|row| {
        let string = |key: &str| row[key].as_str().map(str::to_owned);
        let request = match (string("context"), string("continuation")) {
            (Some(context), Some(continuation)) => Request::LogLikelihood { context, continuation },
            (None, Some(text)) => Request::Rolling { text },
            (Some(prompt), None) => {
                let until = row["until"].as_array().unwrap().iter().map(|u| u.as_str().unwrap().to_owned()).collect();
                Request::Generate {
                    context: prompt,
                    options: GenerationOptions { until, ..GenerationOptions::default() },
                }
            }
            (None, None) => panic!("{row}"),
        };
        Golden {
            task: string("task").unwrap(),
            request,
            log_likelihood: row["log_likelihood"].as_f64().unwrap_or_default(),
            is_greedy: row["is_greedy"].as_bool().unwrap_or_default(),
            generated: string("generated").unwrap_or_default(),
        }
    });
    rows.collect()
}

/// Largest difference by task.
fn compare<B: Backend>(model: &Loaded<B>, golden: &[Golden]) -> BTreeMap<String, f64> {
    let requests: Vec<Request> = golden.iter().map(|g| g.request.clone()).collect();
    let mut worst: BTreeMap<String, f64> = BTreeMap::new();
    for (g, response) in golden.iter().zip(model.answers(&requests)) {
        let log_likelihood = match response {
            Response::LogLikelihood { log_likelihood, is_greedy } => {
                assert_eq!(is_greedy, g.is_greedy, "{}: {:?}", g.task, g.request);
                log_likelihood
            }
            Response::Rolling { log_likelihood, .. } => log_likelihood,
            Response::Generated { text, .. } => {
                assert_eq!(text, g.generated, "{}", g.task);
                0.0
            }
        };
        let error = (log_likelihood - g.log_likelihood).abs();
        // Each of a document's many tokens adds rounding: there, per part in a hundred of the sum.
        let error =
            if matches!(g.request, Request::Rolling { .. }) { 100.0 * error / log_likelihood.abs() } else { error };
        worst.entry(g.task.clone()).and_modify(|w| *w = w.max(error)).or_insert(error);
    }
    worst
}

fn books() -> PathBuf {
    project().join("models/books-bf16")
}

#[test]
fn log_likelihoods_of_the_small_model_are_those_of_lm_evaluation_harness() {
    let golden = golden(&project().join("tests/data/evaluate/books.jsonl"));
    let worst = compare(&Loaded::open(cpu(0), &books()), &golden);
    println!("{worst:?}");
    assert!(worst.len() > 8 && worst.values().all(|w| *w < 1e-3), "{worst:?}");
}

#[test]
fn log_likelihoods_do_not_depend_on_what_else_is_asked_or_on_threads() {
    let golden = golden(&project().join("tests/data/evaluate/books.jsonl"));
    let requests: Vec<Request> = golden.iter().map(|g| g.request.clone()).collect();
    let model = Loaded::open(cpu(2), &project().join("models/books-nvfp4"));
    let together = model.answers(&requests);
    let single = Loaded::open(cpu(1), &project().join("models/books-nvfp4"));
    let reversed: Vec<Request> = requests.iter().rev().cloned().collect();
    let mut backwards = single.answers(&reversed);
    backwards.reverse();
    assert_eq!(together, backwards);
    for i in (0..requests.len()).step_by(7) {
        assert_eq!(single.answers(&requests[i..=i]), together[i..=i], "{:?}", requests[i]);
    }
}

#[test]
fn the_plain_reference_gives_the_same_log_likelihoods() {
    let mut golden = golden(&project().join("tests/data/evaluate/books.jsonl"));
    golden.truncate(60);
    let worst = compare(&Loaded::open(AutogradBackend::new(), &books()), &golden);
    assert!(worst.values().all(|w| *w < 1e-3), "{worst:?}");
}

/// Needs `RECOUP_SMOLLM2_GGUF`, see CONTRIBUTING.md. `RECOUP_GOLDEN` may name a larger file of the same form.
#[test]
fn a_real_model_has_the_log_likelihoods_and_texts_of_lm_evaluation_harness() {
    let Some(models) = smollm2::models() else { return };
    let file = std::env::var_os("RECOUP_GOLDEN").map(PathBuf::from);
    let golden = golden(&file.unwrap_or_else(|| project().join("tests/data/evaluate/smollm2.jsonl")));
    let worst = compare(&Loaded::open(cpu(0), &models.bf16), &golden);
    println!("{worst:?}");
    assert!(worst.len() > 13 && worst.values().all(|w| *w < 1e-3), "{worst:?}");
}
