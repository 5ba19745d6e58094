//! Settings of an evaluation as their users give them: each is used, refused by name, or named as without effect.

use std::io::Write as _;
use std::process::Stdio;

use serde_json::{Value, json};

use crate::support::command::{BF16, Folder, NVFP4, fail, recoup, run, said, succeed};
use crate::support::json_lines;

const TASK: &str = "\
task: gen
dataset_path: json
dataset_kwargs: {data_files: {test: gen.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: \"{{q}}\"
doc_to_target: \"x\"
generation_kwargs: {max_gen_toks: 12, until: []}
metric_list: [{metric: exact_match}]
";
const PROMPTS: &str = "{\"q\": \"Once upon a time\"}\n{\"q\": \"It was a dark and\"}\n";

/// A folder with a task, its data and a model.
struct Place {
    folder: Folder,
    model: String,
}

impl Place {
    fn new(task: &str, generation_config: Option<Value>) -> Self {
        let folder = Folder::new();
        folder.write("tasks/gen.yaml", task);
        folder.write("tasks/gen.jsonl", PROMPTS);
        let model = folder.model("model", BF16);
        let config = generation_config.unwrap_or(json!({"eos_token_id": 0}));
        folder.write("model/generation_config.json", config.to_string());
        Self { folder, model }
    }

    fn args(&self, more: &[&str]) -> Vec<String> {
        let (tasks, out) = (self.folder.name("tasks"), self.folder.name("out"));
        let words = ["eval", &self.model, "--include-path", &tasks, "-o", &out];
        words.iter().chain(more).map(|w| (*w).to_owned()).collect()
    }

    /// The answers of a run that succeeds, what it says, and its results.json.
    fn answers(&self, more: &[&str]) -> (Vec<String>, String, Value) {
        let _ = std::fs::remove_dir_all(self.folder.at("out"));
        let (_, said) = succeed(&self.args(&[&["--tasks", "gen"], more].concat()));
        let samples = json_lines(&self.folder.at("out/samples_gen.jsonl"));
        let answers = samples.iter().map(|s| s["resps"][0][0].as_str().unwrap().to_owned());
        (answers.collect(), said, self.folder.json("out/results.json"))
    }

    fn refused(&self, more: &[&str]) -> String {
        fail(&self.args(more))
    }
}

/// lm-evaluation-harness 0.4.13's `hf` model with transformers 5.24 on models/books-bf16 (float32), by repetition penalty.
const PLAIN: [&str; 2] =
    [", I was not at all afraid of the matter. I", " dark night, and the sun was shining on the sunset"];
const PENALTY_5: [&str; 2] = [", I was not at all afraid of the matter.\n", " beautiful, with the green eyes of it.\n"];
const PENALTY_1_3: [&str; 2] =
    [", I was not at all afraid of the matter.\n", " beautiful, and the sun had been so big that it seemed"];

#[test]
fn a_repetition_penalty_is_applied_as_lm_eval_applies_it_and_recorded() {
    let place = Place::new(TASK, None);
    let (plain, said, _) = place.answers(&[]);
    assert_eq!(plain, PLAIN);
    assert!(!said.contains("without effect"), "{said}");
    let (answers, _, results) = place.answers(&["--gen-kwargs", "repetition_penalty=5.0"]);
    assert_eq!(answers, PENALTY_5);
    assert_eq!(results["generation"]["gen"]["settings"]["repetition_penalty"], 5.0);
    let task = TASK.replace("until: []", "until: [], repetition_penalty: 1.3");
    assert_eq!(Place::new(&task, None).answers(&[]).0, PENALTY_1_3);
}

#[test]
fn a_models_own_repetition_penalty_counts_unless_the_command_says_otherwise() {
    let config = json!({"eos_token_id": 0, "repetition_penalty": 1.3, "max_new_tokens": 3, "no_repeat_ngram_size": 2,
        "do_sample": true, "temperature": 0.8, "top_p": 0.95});
    let place = Place::new(TASK, Some(config));
    let (answers, said, results) = place.answers(&[]);
    assert_eq!(answers, PENALTY_1_3);
    for named in ["temperature 0.8", "top_p 0.95", "max_new_tokens 3", "no_repeat_ngram_size 2"] {
        assert!(said.contains(named), "{named}: {said}");
        assert!(results["notes"].to_string().contains(named), "{named}: {results:#}");
    }
    assert_eq!(place.answers(&["--gen-kwargs", "repetition_penalty=1.0"]).0, PLAIN);

    let sampled = Place::new(TASK, Some(json!({"eos_token_id": 0, "top_k": 1})));
    assert_eq!(sampled.answers(&["--gen-kwargs", "do_sample=True,temperature=5"]).0, PLAIN);
    let stopped = Place::new(TASK, Some(json!({"eos_token_id": 0, "stop_strings": ["afraid"]})));
    let (answers, _, results) = stopped.answers(&[]);
    assert_eq!(answers[0], ", I was not at all ");
    assert_eq!(results["generation"]["gen"]["settings"]["until"], json!(["afraid"]));
}

#[test]
fn stop_strings_are_given_as_a_list_or_by_openais_name() {
    let place = Place::new(TASK, None);
    let (answers, _, _) = place.answers(&["--gen-kwargs", r#"until=["afraid","sun"],max_gen_toks=12"#]);
    assert_eq!(answers, [", I was not at all ", " dark night, and the "]);
    assert_eq!(place.answers(&["--gen-kwargs", "stop=afraid"]).0[0], ", I was not at all ");
}

#[test]
fn settings_that_mean_nothing_are_refused_before_anything_is_asked() {
    let place = Place::new(TASK, None);
    for (setting, wanted) in [
        ("temprature=1.5", "the nearest is `temperature`"),
        ("num_beams=4", "`num_beams` cannot be 4"),
        ("max_length=9", "set `max_gen_toks`"),
        ("top_k=-3", "`top_k` must be a whole number"),
        ("max_gen_toks=many", "`max_gen_toks` must be a count of tokens"),
    ] {
        for tasks in ["gen", "hellaswag"] {
            let said = place.refused(&["--tasks", tasks, "--gen-kwargs", setting]);
            assert!(said.contains("--gen-kwargs") && said.contains(wanted), "{said}");
        }
    }
    let said = Place::new(&TASK.replace("until: []", "num_beam: 4"), None).refused(&["--tasks", "gen"]);
    assert!(said.contains("gen.yaml:8") && said.contains("`num_beam`") && said.contains("`num_beams`"), "{said}");
}

#[test]
fn settings_without_effect_are_named_and_recorded() {
    let place = Place::new(&TASK.replace("until: []", "until: [], do_sample: false"), None);
    let (answers, said, results) = place.answers(&["--gen-kwargs", "temperature=1.5,max_new_tokens=3", "--seeds", "2"]);
    assert_eq!(answers, PLAIN);
    for named in ["temperature 1.5 (do_sample is false", "max_new_tokens 3 (max_gen_toks 12 counts", "--seeds 2"] {
        assert!(said.contains(named), "{named}: {said}");
        assert!(results["notes"].to_string().contains(named), "{named}: {results:#}");
    }
    std::fs::remove_dir_all(place.folder.at("out")).unwrap();
    let wikitext = ["--tasks", "wikitext", "-L", "1", "--gen-kwargs", "top_k=1", "--num-fewshot", "2"];
    let (_, said) = succeed(&place.args(&wikitext));
    assert!(said.contains("--gen-kwargs is without effect") && said.contains("wikitext: without effect"), "{said}");
}

#[test]
fn settings_of_tasks_that_do_not_matter_to_them_are_named() {
    let place = Place::new(TASK, None);
    let choice = TASK
        .replace("task: gen", "task: choice")
        .replace("output_type: generate_until", "output_type: multiple_choice\ndoc_to_choice: [a, b]")
        .replace("doc_to_target: \"x\"", "doc_to_target: 0")
        .replace("exact_match", "acc");
    place.folder.write("tasks/choice.yaml", &choice);
    let hub = choice
        .replace("task: choice", "task: hub")
        .replace("dataset_path: json", "dataset_path: org/set")
        .replace("{data_files: {test: gen.jsonl}}", "{trust_remote_code: true, revision: abc, data_dir: en}");
    place.folder.write("tasks/hub.yaml", &hub);
    place.folder.write("tasks/org/set/test.jsonl", PROMPTS);
    let (_, said) = succeed(&place.args(&["--tasks", "choice,hub"]));
    for named in [
        "choice, hub: without effect: `generation_kwargs`",
        "hub: of `dataset_kwargs` not used",
        "revision \"abc\"",
        "data_dir \"en\"",
    ] {
        assert!(said.contains(named), "{named}: {said}");
    }
    assert!(!said.contains("trust_remote_code"), "{said}");
}

#[test]
fn sampled_answers_have_transformers_top_k_where_nobody_sets_one_and_that_is_said() {
    // As lm-evaluation-harness 0.4.13's `hf` model with transformers 5.24 (GenerationConfig: 50).
    let sampled = |config: Value, more: &str| {
        let place = Place::new(TASK, Some(config));
        let (_, said, results) = place.answers(&["--gen-kwargs", &format!("temperature=0.7{more}")]);
        (results["generation"]["gen"]["settings"]["top_k"].clone(), said.contains("top_k is transformers' default"))
    };
    assert_eq!(sampled(json!({"eos_token_id": 0}), ""), (json!(50), true));
    assert_eq!(sampled(json!({"eos_token_id": 0}), ",top_k=0"), (json!(0), false));
    assert_eq!(sampled(json!({"eos_token_id": 0, "top_k": 0}), ""), (json!(0), false));
    assert_eq!(sampled(json!({"eos_token_id": 0, "top_k": 20}), ""), (json!(20), false));
    let (_, said, results) = Place::new(TASK, None).answers(&[]);
    assert_eq!(results["generation"]["gen"]["settings"]["top_k"], 0);
    assert!(!said.contains("top_k"), "{said}");
}

#[test]
fn windows_without_a_text_are_named() {
    let folder = Folder::new();
    let pair = ["compare", BF16, NVFP4, "--no-speed", "-o", &folder.name("")];
    let none = ["--tasks", "piqa", "-L", "2", "--text", "none", "--window", "64", "--windows", "3"];
    let (_, said) = succeed(&[&pair[..], &none].concat());
    assert!(said.contains("without effect, as --text names none: --window, --windows"), "{said}");
    let one = ["--tasks", "none", "--text", "books", "--attribute", "--attribute-windows", "1"];
    let said = fail(&[&pair[..], &one].concat());
    assert!(said.contains("--attribute-windows 1: an error needs two windows"), "{said}");
}

#[test]
fn what_files_of_a_model_contradict_each_other_in_is_said_by_every_verb_and_stands_in_the_results() {
    let place = Place::new(TASK, None);
    let model = place.model.as_str();
    place.folder.write("model/tokenizer_config.json", r#"{"pad_token": "<|nowhere|>"}"#);
    let [q, p, r, c] = ["q", "p", "r", "c"].map(|name| place.folder.name(name));
    let data = ["--data", "built-in", "--samples", "4", "--length", "32", "--method", "qad:steps=1"];
    for args in [
        &["inspect", model][..],
        &["run", model, "-p", "It was", "-n", "1"],
        // One recipe looks at text, the other at none.
        &["quantize", model, "--recipe", "nvfp4", "-o", &q],
        &["quantize", model, "--recipe", "fp8_pc_pt", "-o", &p],
        &[&["recover", &q, "--teacher", model, "-o", &r][..], &data].concat(),
        &["compare", model, &q, "--tasks", "piqa", "-L", "2", "--text", "none", "--no-speed", "-o", &c],
    ] {
        let (shown, said) = succeed(args);
        assert!((shown + &said).contains("`pad_token` is `<|nowhere|>`"), "{args:?}: {said}");
    }
    let (.., results) = place.answers(&[]);
    assert!(results["config"]["model_notes"].to_string().contains("<|nowhere|>"), "{results:#}");
    let report = place.folder.read("c/report.md");
    assert!(report.contains(r"model: \`pad_token\` is"), "{report}");
}

#[test]
fn a_file_that_is_something_else_is_named_as_that_by_every_option() {
    let folder = Folder::new();
    let page = folder.write("page.json", "<!DOCTYPE html><title>Sign in</title>");
    let (page, out) = (page.as_str(), folder.name("out"));
    for args in [
        &["quantize", BF16, "-o", &out, "--recipe", page][..],
        &["quantize", BF16, "-o", &out, "--recipe", "nvfp4_fp8_auto", "--sensitivity", page],
        &["logits", BF16, "-o", &out, "--input-ids", page],
    ] {
        let said = fail(args);
        assert!(said.contains(page) && said.contains("it is a web page"), "{args:?}: {said}");
    }
    let mut command = recoup(&["quantize", BF16, "-o", &out, "--recipe", "nvfp4", "--calibration", "-"]);
    command.stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"PAR1aaaaPAR1").unwrap();
    let said = said(&child.wait_with_output().unwrap());
    assert!(said.contains("Parquet cannot be read from standard input; give it as a file"), "{said}");
}

#[test]
fn a_refused_configuration_has_no_parameters() {
    let place = Place::new(TASK, None);
    let mut config = place.folder.json("model/config.json");
    config["hidden_act"] = "relu".into();
    place.folder.write("model/config.json", config.to_string());
    let inspected = |more: &[&str]| {
        let out = run(&[&["inspect", &place.model][..], more].concat());
        assert!(!out.status.success());
        String::from_utf8(out.stdout).unwrap()
    };
    let shown = inspected(&[]);
    assert!(shown.contains("problem") && shown.contains("on disk"), "{shown}");
    assert!(!shown.contains("parameters") && !shown.contains("module"), "{shown}");
    let report: Value = serde_json::from_str(&inspected(&["--json"])).unwrap();
    assert_eq!(report["parameters"], Value::Null);
}

#[test]
fn a_data_folder_that_lacks_a_file_is_no_reason_to_take_the_shipped_sample() {
    let place = Place::new(TASK, None);
    let (data, at) = (place.folder.at("data"), &place.folder.name("data"));
    let ask = ["--tasks", "hellaswag", "-L", "2", "--data-dir", at];
    assert!(place.refused(&ask).contains("there is no such folder"));
    std::fs::write(&data, "").unwrap();
    assert!(place.refused(&ask).contains("it is a file, not a folder"));
    std::fs::remove_file(&data).unwrap();
    std::fs::create_dir(&data).unwrap();
    let said = place.refused(&ask);
    assert!(said.contains("the shipped sample is not taken in its place"), "{said}");

    // A task's own file beside it is taken, and it is said.
    let (answers, said, results) = place.answers(&["--data-dir", at]);
    assert_eq!(answers, PLAIN);
    assert!(said.contains("gen.jsonl is not in the data folder"), "{said}");
    // printf '{"q": "Once upon a time"}\n{"q": "It was a dark and"}\n' | sha256sum
    let sum = "e257d42c3b69fbde2b8ac6caae6fee2caf2e95b2ee08f6204db4439ae77895ce";
    assert_eq!(results["data"]["gen"][0]["sha256"], sum);
    std::fs::write(data.join("gen.jsonl"), "{\"q\": \"It was a dark and\"}\n").unwrap();
    let (answers, said, _) = place.answers(&["--data-dir", at]);
    assert_eq!(answers, PLAIN[1..]);
    assert!(!said.contains("not in the data folder"), "{said}");
}

#[test]
fn shells_are_told_every_verb() {
    for shell in ["bash", "zsh", "fish"] {
        let (script, _) = succeed(&["completions", shell]);
        for verb in ["serve", "verify", "quantize", "--max-model-len"] {
            assert!(script.contains(verb.trim_start_matches("--")), "{shell} is not told of {verb}");
        }
    }
}
