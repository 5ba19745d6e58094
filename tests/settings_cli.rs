//! Settings of an evaluation as their users give them: each is used, refused by name, or named as without effect.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

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
    folder: tempfile::TempDir,
    model: PathBuf,
}

impl Place {
    fn new(task: &str, generation_config: Option<Value>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("tasks")).unwrap();
        std::fs::write(folder.path().join("tasks/gen.yaml"), task).unwrap();
        std::fs::write(folder.path().join("tasks/gen.jsonl"), PROMPTS).unwrap();
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/books-bf16");
        let model = folder.path().join("model");
        std::fs::create_dir(&model).unwrap();
        for entry in std::fs::read_dir(shipped).unwrap().map(Result::unwrap) {
            if entry.file_name() != "generation_config.json" {
                std::fs::copy(entry.path(), model.join(entry.file_name())).unwrap();
            }
        }
        let config = generation_config.unwrap_or(json!({"eos_token_id": 0}));
        std::fs::write(model.join("generation_config.json"), config.to_string()).unwrap();
        Self { folder, model }
    }

    fn run(&self, more: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_recoup"));
        let tasks = self.folder.path().join("tasks");
        command.arg("eval").arg(&self.model).arg("--include-path").arg(tasks);
        command.arg("-o").arg(self.folder.path().join("out")).args(more);
        command.current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap()
    }

    /// The answers of a run that succeeds, what it says, and its results.json.
    fn answers(&self, more: &[&str]) -> (Vec<String>, String, Value) {
        let _ = std::fs::remove_dir_all(self.folder.path().join("out"));
        let out = self.run(&[&["--tasks", "gen"], more].concat());
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success(), "{said}");
        let read = |name: &str| std::fs::read_to_string(self.folder.path().join("out").join(name)).unwrap();
        let answer = |line: &str| {
            let sample: Value = serde_json::from_str(line).unwrap();
            sample["resps"][0][0].as_str().unwrap().to_owned()
        };
        (
            read("samples_gen.jsonl").lines().map(answer).collect(),
            said,
            serde_json::from_str(&read("results.json")).unwrap(),
        )
    }

    fn refused(&self, more: &[&str]) -> String {
        let out = self.run(more);
        assert_eq!(out.status.code(), Some(1), "{more:?}");
        String::from_utf8_lossy(&out.stderr).into_owned()
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
    let out = place.run(&["--tasks", "wikitext", "-L", "1", "--gen-kwargs", "top_k=1", "--num-fewshot", "2"]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(said.contains("--gen-kwargs is without effect") && said.contains("wikitext: without effect"), "{said}");
}

#[test]
fn a_data_folder_that_lacks_a_file_is_no_reason_to_take_the_shipped_sample() {
    let place = Place::new(TASK, None);
    let data = place.folder.path().join("data");
    let at = data.to_str().unwrap();
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
