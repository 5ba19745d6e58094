//! Prompts, filters, values, scores and logged samples equal those of lm-evaluation-harness 0.4.13 on the same task files.
//!
//! `golden/make.py` wrote the expected values; the model that answers by a formula is the same in both.

use std::path::{Path, PathBuf};

use recoup_eval::{
    Message, Request, Response,
    tasks::{Chat, Instance, Library, Limit, Options, OutputType, Sample, Task, standard_error},
};
use recoup_ground::digest::sha256;
use serde_json::{Map, Value, json};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn read(name: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(folder().join(name)).unwrap()).unwrap()
}

fn library() -> Library {
    Library::new(&[folder().join("tasks")], None).unwrap()
}

fn load(name: &str) -> Task {
    library().select(&[name]).unwrap().tasks.remove(0)
}

/// `Formula` of make.py.
fn answer(task: &Task, instance: &Instance, doc: &Map<String, Value>, answers: &Value) -> Vec<Response> {
    let doc_id = instance.doc_id;
    let answers = answers[task.name()].as_array().or(answers["default"].as_array()).unwrap();
    let gold = doc.get("answer").and_then(Value::as_str).and_then(|a| a.rsplit_once("#### ")).map_or("", |(_, g)| g);
    let respond = |(i, request): (usize, &Request)| match request {
        Request::LogLikelihood { .. } => Response::LogLikelihood {
            log_likelihood: -(((doc_id * 31 + i * 17 + 7) % 101) as f64) / 7.0,
            is_greedy: (doc_id * 7 + i).is_multiple_of(3),
        },
        Request::Rolling { text } => Response::Rolling {
            log_likelihood: -(text.chars().count() as f64 * 0.7 + doc_id as f64 / 3.0),
            tokens: None,
        },
        Request::Generate { .. } => {
            let text = answers[(doc_id + i) % answers.len()].as_str().unwrap().replace("GOLD", gold);
            Response::Generated { text, tokens: None, capped: false }
        }
    };
    instance.requests.iter().enumerate().map(respond).collect()
}

fn chatml(messages: &[Message], continue_last: bool) -> Result<String, String> {
    let text: String = messages.iter().map(|m| format!("<|im_start|>{}\n{}<|im_end|>\n", m.role, m.content)).collect();
    Ok(match continue_last {
        true => text.strip_suffix("<|im_end|>\n").unwrap().to_owned(),
        false => text + "<|im_start|>assistant\n",
    })
}

fn mode(name: &str, limit: usize) -> (Options, Option<Chat<'static>>) {
    let options = |shots: Option<usize>, system: Option<&str>| Options {
        num_fewshot: shots,
        system: system.map(str::to_owned),
        limit: Some(Limit::First(limit)),
        ..Options::default()
    };
    let chat = |multiturn| Some(Chat { render: &chatml, fewshot_as_multiturn: multiturn });
    match name {
        "zero" => (options(Some(0), None), None),
        "three" => (options(Some(3), None), None),
        "own" => (options(None, Some("Be brief.")), None),
        "chat" => (options(Some(3), None), chat(true)),
        "chat_single" => (options(Some(2), Some("You are exact.")), chat(false)),
        other => panic!("{other}"),
    }
}

/// Requests as make.py's `arguments` shows them.
fn arguments(task: &Task, instance: &Instance) -> Vec<String> {
    let text = |request: &Request| match request {
        Request::LogLikelihood { context, continuation } => format!("{context}\x1f{continuation}"),
        Request::Rolling { text } => text.clone(),
        Request::Generate { context, .. } => format!("{context}\x1f"),
    };
    let all: Vec<String> = instance.requests.iter().map(text).collect();
    match task.output_type() {
        // Repeats are asked next to each other.
        OutputType::Generate => vec![all[0].clone()],
        _ => all,
    }
}

fn sha(text: &str) -> String {
    sha256(text)[..24].to_owned()
}

fn scored(task: &Task, limit: usize) -> Vec<Sample> {
    let answers = read("answers.json");
    let (options, _) = mode("zero", limit);
    let instances = task.instances(&options, None).unwrap();
    let score = |instance: &Instance| {
        // The record holds the document; a first pass with any answers is how to see it.
        let blank: Vec<Response> = answer(task, instance, &Map::new(), &answers);
        let doc = task.score(instance, &blank).unwrap()[0].record["doc"].as_object().unwrap().clone();
        task.score(instance, &answer(task, instance, &doc, &answers)).unwrap()
    };
    instances.iter().flat_map(score).collect()
}

/// Whether two JSON values are the same, numbers by value with a relative tolerance.
fn close(a: &Value, b: &Value, tolerance: f64) -> bool {
    match (a, b) {
        (Value::Array(a), Value::Array(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| close(a, b, tolerance))
        }
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().all(|(k, v)| b.get(k).is_some_and(|w| close(v, w, tolerance)))
        }
        (Value::Number(a), Value::Number(b)) => {
            let (a, b) = (a.as_f64().unwrap(), b.as_f64().unwrap());
            a == b || (a - b).abs() <= tolerance * a.abs().max(b.abs())
        }
        // Python's True is 1.
        (a, b) => a == b,
    }
}

fn limit(task: &str) -> usize {
    if task == "gsm8k" { 20 } else { 10 }
}

#[test]
fn prompts_are_those_of_lm_evaluation_harness_byte_for_byte() {
    let golden = read("golden.json");
    let mut compared = 0;
    for (name, expected) in golden["tasks"].as_object().unwrap() {
        let task = load(name);
        for (mode_name, expected) in expected["modes"].as_object().unwrap() {
            let (options, chat) = mode(mode_name, limit(name));
            let instances = task.instances(&options, chat.as_ref()).unwrap();
            let prompts: Vec<Vec<String>> = instances.iter().map(|i| arguments(&task, i)).collect();
            if let Some(second) = expected["second"].as_array() {
                assert_eq!(json!(prompts[1]), json!(second), "{name}, {mode_name}, document 1");
            }
            let hashes: Vec<String> = prompts.iter().take(10).map(|p| sha(&p.join("\x1e"))).collect();
            assert_eq!(json!(hashes), expected["hashes"], "{name}, {mode_name}");
            compared += hashes.len();
        }
    }
    assert!(compared > 700, "only {compared} documents compared");
}

#[test]
fn values_and_scores_are_those_of_lm_evaluation_harness() {
    let golden = read("golden.json");
    for (name, expected) in golden["tasks"].as_object().unwrap().iter().filter(|(name, _)| *name != "ifeval") {
        compare_scores(&load(name), expected, golden["resamples"].as_u64().unwrap() as usize);
    }
}

#[test]
fn ifeval_scores_are_those_of_lm_evaluation_harness() {
    let golden = read("golden.json");
    compare_scores(&load("ifeval"), &golden["tasks"]["ifeval"], 1);
}

fn compare_scores(task: &Task, expected: &Value, resamples: usize) {
    let name = task.name();
    let samples = scored(task, limit(name));
    let values = expected["values"].as_array().unwrap();
    assert_eq!(samples.len(), values.len(), "{name}");
    for value in values {
        let (doc_id, filter) = (value[0].as_u64().unwrap() as usize, value[1].as_str().unwrap());
        let sample = samples.iter().find(|s| s.doc_id == doc_id && s.filter == filter).unwrap();
        for (metric, expected) in value[2].as_object().unwrap() {
            let found = &sample.record[metric.as_str()];
            assert!(close(found, expected, 1e-14), "{name}, {doc_id}, {filter}, {metric}: {found}, not {expected}");
        }
    }
    for (at, hashes) in expected["hashes"].as_array().unwrap().iter().enumerate() {
        let sample =
            samples.iter().find(|s| json!([s.doc_id, s.filter]) == json!([values[at][0], values[at][1]])).unwrap();
        let found = json!([sample.record["doc_hash"], sample.record["prompt_hash"], sample.record["target_hash"]]);
        assert_eq!(&found, hashes, "{name}, document {}", sample.doc_id);
    }
    if let Some(line) = expected.get("log") {
        assert!(close(&Value::Object(samples[0].record.clone()), line, 1e-14), "{name}: {:#?}", samples[0].record);
    }
    let mut results = Map::new();
    for scores in task.aggregate(&samples) {
        let error = standard_error(&scores, resamples);
        results.insert(format!("{},{}", scores.metric, scores.filter), scores.score().into());
        results.insert(format!("{}_stderr,{}", scores.metric, scores.filter), error.map_or("N/A".into(), Value::from));
    }
    assert!(
        close(&json!(results), &expected["results"], 1e-12),
        "{name}: {results:#?}, not {:#?}",
        expected["results"]
    );
}

#[test]
fn groups_add_up_as_in_lm_evaluation_harness() {
    let golden = read("golden.json");
    for (name, expected) in golden["groups"].as_object().unwrap() {
        let selection = library().select(&[name]).unwrap();
        let mut names: Vec<&str> = selection.tasks.iter().map(Task::name).collect();
        names.sort_unstable();
        assert_eq!(json!(names), expected["tasks"]);
        let scores: Vec<_> = selection.tasks.iter().flat_map(|t| t.aggregate(&scored(t, 3))).collect();
        let mut groups = Map::new();
        for group in &selection.groups {
            let mut own = Map::new();
            for score in group.aggregate(&scores, 0).into_iter().chain(group.aggregate(&scores, 1)) {
                own.insert(format!("{},{}", score.metric, score.filter), score.score.into());
                let error = score.standard_error.map_or("N/A".into(), Value::from);
                own.insert(format!("{}_stderr,{}", score.metric, score.filter), error);
            }
            groups.insert(group.name.clone(), own.into());
        }
        assert!(close(&json!(groups), &expected["groups"], 1e-12), "{groups:#?}, not {:#?}", expected["groups"]);
    }
}
