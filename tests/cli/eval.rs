//! `recoup eval` and `recoup compare` as their users run them: killed and resumed, in shards, with bad input.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

#[cfg(unix)]
use crate::support::held::Held;

fn recoup(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_recoup"));
    command.args(args).current_dir(env!("CARGO_MANIFEST_DIR"));
    command
}

fn run(args: &[&str]) -> Output {
    recoup(args).output().unwrap()
}

fn succeed(args: &[&str]) -> String {
    let out = run(args);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// What stderr says of a run that must fail with 1.
fn fail(args: &[&str]) -> String {
    let out = run(args);
    let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(1), "{args:?}: {stderr}");
    stderr
}

/// Files of a folder by name.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder).unwrap().map(Result::unwrap);
    entries.map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap())).collect()
}

fn assert_same_files(a: &Path, b: &Path) {
    let (a, b) = (files(a), files(b));
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    for (name, bytes) in &a {
        assert!(*bytes == b[name], "{name} differs");
    }
}

#[cfg(unix)]
fn lines(path: &Path) -> usize {
    std::fs::read(path).map_or(0, |bytes| bytes.iter().filter(|b| **b == b'\n').count())
}

#[cfg(unix)]
#[test]
fn a_killed_run_goes_on_and_ends_with_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (whole, killed) = (at("whole"), at("killed"));
    let args = |out: &str| {
        let words = ["eval", "models/books-nvfp4", "--tasks", "hellaswag,lambada_openai,books_cloze", "--limit", "60"];
        words.into_iter().chain(["-o", out]).map(str::to_owned).collect::<Vec<_>>()
    };
    let whole_args = args(&whole);
    succeed(&whole_args.iter().map(String::as_str).collect::<Vec<_>>());
    let all = lines(&Path::new(&whole).join("responses.jsonl"));

    let killed_args = args(&killed);
    let words: Vec<&str> = killed_args.iter().map(String::as_str).collect();
    // Killed three times, each time when some more answers are there.
    let journal = Path::new(&killed).join("responses.jsonl");
    for _ in 0..3 {
        let before = lines(&journal);
        let mut run = Held::start(recoup(&words));
        run.until(|| lines(&journal) > before + 5);
        run.kill();
    }
    let kept = lines(&journal);
    assert!(kept > 5 && kept < all, "{kept} of {all} lines when killed");
    // A line that was cut in the middle is asked again.
    let mut bytes = std::fs::read(&journal).unwrap();
    bytes.truncate(bytes.len() - 3);
    std::fs::write(&journal, bytes).unwrap();

    let out = run(&words);
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && stderr.contains("answers are there already"), "{stderr}");
    assert_same_files(Path::new(&whole), Path::new(&killed));
}

#[test]
fn shards_merge_to_the_bytes_of_one_run() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let base = [
        "eval",
        "models/books-bf16",
        "--tasks",
        "piqa,blimp_wh_island,gsm8k",
        "--limit",
        "7",
        "--gen-kwargs",
        "max_gen_toks=64",
    ];
    let with = |more: &[&str]| succeed(&base.iter().chain(more).copied().collect::<Vec<_>>());
    let whole = at("whole");
    let table = with(&["-o", &whole]);
    let parts: Vec<String> = (0..3).map(|i| at(&format!("part{i}"))).collect();
    for (i, part) in parts.iter().enumerate() {
        with(&["-o", part, "--shard", &format!("{i}/3")]);
    }
    let merged = at("merged");
    assert_eq!(with(&["-o", &merged, "--merge", &parts.join(",")]), table);
    assert_same_files(Path::new(&whole), Path::new(&merged));

    // Not a shard twice, not one too few, not another run's.
    let refuse = |more: &[&str]| fail(&base.iter().chain(more).copied().collect::<Vec<_>>());
    let twice = [parts[0].as_str(), &parts[1], &parts[1]].join(",");
    assert!(refuse(&["--merge", &twice]).contains("shard"));
    assert!(refuse(&["--merge", &parts[..2].join(",")]).contains("shard"));
    let other = fail(&["eval", "models/books-bf16", "--tasks", "piqa", "--limit", "7", "--merge", &parts.join(",")]);
    assert!(other.contains("responses.jsonl") && other.contains("tasks"), "{other}");
}

#[test]
fn an_output_folder_of_another_run_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().to_str().unwrap();
    succeed(&["eval", "models/books-bf16", "--tasks", "piqa", "--limit", "3", "-o", out]);
    let before = files(folder.path());
    let message = fail(&["eval", "models/books-nvfp4", "--tasks", "piqa", "--limit", "3", "-o", out]);
    assert!(message.contains("responses.jsonl") && message.contains("model"), "{message}");
    assert!(before == files(folder.path()), "the other run's files changed");
}

/// A task of our own: a folder with `mine.yaml` and `mine.jsonl`.
struct OwnTask(tempfile::TempDir);

impl OwnTask {
    fn new(yaml: &str, data: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("mine.yaml"), yaml).unwrap();
        std::fs::write(folder.path().join("mine.jsonl"), data).unwrap();
        Self(folder)
    }

    fn args(&self) -> [&str; 6] {
        ["eval", "models/books-bf16", "--include-path", self.0.path().to_str().unwrap(), "--tasks", "mine"]
    }
}

const YAML: &str = "task: mine
dataset_path: json
dataset_kwargs:
  data_files:
    test: mine.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: \"{{question}}\"
doc_to_choice: \"{{choices}}\"
doc_to_target: answer
";

const ROWS: &str = r#"{"question": "It was a dark and stormy", "choices": ["night", "piano"], "answer": 0}
{"question": "Once upon a", "choices": ["time", "the", "of"], "answer": 0}
"#;

#[test]
fn a_task_of_ones_own_runs_and_its_faults_are_named() {
    let good = OwnTask::new(YAML, ROWS);
    let out: Value = serde_json::from_str(&succeed(&[&good.args()[..], &["--json"]].concat())).unwrap();
    assert_eq!(out["n-samples"]["mine"]["effective"], 2);
    assert!(out["results"]["mine"]["acc,none"].is_number(), "{out:#}");

    let faults = [
        (YAML.replace("answer\n", "answr\n"), ROWS.to_owned(), &["mine", "document 0", "answr"][..]),
        (YAML.replace("answer\n", "\"{{solution}}\"\n"), ROWS.to_owned(), &["mine", "document 0", "solution"]),
        (YAML.into(), String::new(), &["mine.jsonl", "no documents"]),
        (YAML.into(), ROWS.replace("\"answer\": 0}\n{", "\"answer\": 9}\n{"), &["mine", "document 0", "9"]),
        (YAML.into(), format!("{ROWS}{{\"question\": \"cut"), &["mine.jsonl:3"]),
        (YAML.replace("doc_to_choice: \"", "doc_to_choice: [\""), ROWS.into(), &["mine.yaml:10", "YAML"]),
        (YAML.replace("test_split: test", "test_split: dev"), ROWS.into(), &["mine.yaml", "dev", "test"]),
        (YAML.replace("output_type", "ouput_type"), ROWS.into(), &["mine.yaml:7", "ouput_type", "output_type"]),
        (YAML.replace("\"{{question}}\"", "!function code.f"), ROWS.into(), &["mine.yaml:8", "Python"]),
    ];
    for (yaml, rows, wanted) in faults {
        let task = OwnTask::new(&yaml, &rows);
        let message = fail(&task.args());
        assert!(wanted.iter().all(|w| message.contains(w)), "{wanted:?}: {message}");
        assert!(!message.contains("panicked"), "{message}");
    }
}

#[test]
fn long_contexts_lose_their_beginning_and_long_continuations_are_refused() {
    let long = "word ".repeat(900);
    let rows = |question: &str, choice: &str| {
        format!("{}\n", serde_json::json!({"question": question, "choices": ["night", choice], "answer": 0}))
    };
    let task = OwnTask::new(YAML, &rows(&long, "day"));
    let out = run(&task.args());
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && stderr.contains("2 contexts were longer"), "{stderr}");

    let task = OwnTask::new(YAML, &rows("It was", &long));
    let message = fail(&task.args());
    assert!(message.contains("256"), "{message}");
}

#[test]
fn names_that_mean_nothing_are_answered_with_the_nearest() {
    let message = fail(&["eval", "models/books-bf16", "--tasks", "helaswag"]);
    assert!(message.contains("hellaswag"), "{message}");
    let message = fail(&["eval", "models/books-bf16"]);
    assert!(message.contains("--tasks"), "{message}");
    let message = fail(&["eval", "models/none-such", "--tasks", "piqa"]);
    assert!(message.contains("none-such"), "{message}");
    // Nothing listens on port 1.
    let message = fail(&["eval", "http://127.0.0.1:1/v1", "--tasks", "piqa", "--retries", "0"]);
    assert!(message.contains("127.0.0.1:1"), "{message}");
    assert_eq!(
        run(&["eval", "models/books-bf16", "--tasks", "piqa", "--shard", "3/3", "-o", "x"]).status.code(),
        Some(2)
    );
}

/// A server that answers nothing.
#[test]
fn a_silent_server_is_given_up_on() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}/v1", listener.local_addr().unwrap());
    // It would wait for ever otherwise.
    let message = fail(&["eval", &address, "--tasks", "piqa", "--timeout", "1", "--retries", "0", "--limit", "1"]);
    assert!(message.contains(&address) || message.contains(&listener.local_addr().unwrap().to_string()), "{message}");
}

#[test]
fn a_comparison_reports_gates_and_repeats_itself() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("report");
    let args = |out: &PathBuf, more: &[&str]| {
        let mut args: Vec<String> =
            ["compare", "models/books-bf16", "models/books-nvfp4", "--no-speed"].map(String::from).into();
        args.extend(
            ["--tasks", "books_cloze,piqa", "--limit", "20", "--text", "books", "--window", "64"].map(String::from),
        );
        args.extend(["--windows", "6", "-o", out.to_str().unwrap()].map(String::from));
        args.extend(more.iter().map(|s| (*s).to_owned()));
        args
    };
    let go = |args: Vec<String>| run(&args.iter().map(String::as_str).collect::<Vec<_>>());
    let first = go(args(&out, &["--json", "--attribute", "--attribute-windows", "2"]));
    assert!(first.status.success(), "{}", String::from_utf8_lossy(&first.stderr));
    let comparison: Value = serde_json::from_slice(&first.stdout).unwrap();
    assert!(comparison["divergences"][0]["kl"]["value"].as_f64().is_some_and(|kl| kl > 1e-4), "{comparison:#}");
    assert!(!comparison["attributions"][0]["parts"].as_array().unwrap().is_empty());
    let html = std::fs::read_to_string(out.join("report.html")).unwrap();
    assert!(html.contains("<svg") && !html.contains("<script src") && !html.contains("https://"), "not self-contained");
    // Again from what is kept, and afresh.
    let again = go(args(&out, &["--json", "--attribute", "--attribute-windows", "2"]));
    let fresh = go(args(&folder.path().join("fresh"), &["--json", "--attribute", "--attribute-windows", "2"]));
    assert!(first.stdout == again.stdout && first.stdout == fresh.stdout);
    // The gate.
    assert_eq!(go(args(&out, &["--require-recovery", "5"])).status.code(), Some(3));
    assert_eq!(go(args(&out, &["--require-recovery", "0.01"])).status.code(), Some(0));
    // Windows longer than the models can see.
    let long =
        ["compare", "models/books-bf16", "models/books-nvfp4", "--no-speed", "--tasks", "none", "--text", "books"];
    let out = folder.path().join("long");
    let long = run(&[&long[..], &["--window", "4096", "--windows", "2", "-o", out.to_str().unwrap()]].concat());
    assert!(long.status.success(), "{}", String::from_utf8_lossy(&long.stderr));
    let note = "Windows of 256 tokens instead of 4096";
    assert!(String::from_utf8_lossy(&long.stderr).contains(note));
    assert!(std::fs::read_to_string(out.join("report.html")).unwrap().contains(note));
}

/// A copy of a shipped model that may be changed.
fn copy_of(model: &str, to: &Path) -> String {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("models").join(model)).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
    to.to_str().unwrap().to_owned()
}

/// Sets bytes in the middle of every down_proj to zero: names, shapes and both ends of each tensor stay.
fn damage_the_middle_of_weights(folder: &Path) {
    let path = folder.join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    for (name, tensor) in header.as_object().unwrap().iter().filter(|(n, _)| n.contains("down_proj")) {
        let at = |i: usize| 8 + length + tensor["data_offsets"][i].as_u64().unwrap() as usize;
        let quarter = (at(1) - at(0)) / 4;
        assert!(quarter > 1024, "{name}");
        bytes[at(0) + quarter..at(1) - quarter].fill(0);
    }
    std::fs::write(&path, bytes).unwrap();
}

#[test]
fn answers_are_given_out_again_only_for_the_same_files_and_options() {
    let folder = tempfile::tempdir().unwrap();
    let model = copy_of("books-bf16", &folder.path().join("model"));
    let out = folder.path().join("out").to_str().unwrap().to_owned();
    let base = ["eval", &model, "--tasks", "lambada_openai", "-L", "4", "-o", &out];
    let again = |more: &[&str]| fail(&base.iter().chain(more).copied().collect::<Vec<_>>());
    succeed(&base);
    let same = run(&[&base[..], &["--threads", "1", "--isa", "scalar"]].concat());
    let stderr = String::from_utf8_lossy(&same.stderr);
    assert!(same.status.success() && stderr.contains("4 of 4 answers are there already"), "{stderr}");
    for (options, key) in [
        (&["--max-length", "16"][..], "`model.context` is 256 there and 16 here"),
        (&["--kv-cache-dtype", "bf16"], "`model.computation.kv_cache_dtype` is \"f32\" there and \"bf16\" here"),
    ] {
        let refused = again(options);
        assert!(refused.contains("answers of another run") && refused.contains(key), "{refused}");
    }
    let tokenizer = Path::new(&model).join("tokenizer.json");
    let original = std::fs::read(&tokenizer).unwrap();
    let mut value: Value = serde_json::from_slice(&original).unwrap();
    value["model"]["merges"].as_array_mut().unwrap().truncate(200);
    std::fs::write(&tokenizer, value.to_string()).unwrap();
    let refused = again(&[]);
    assert!(refused.contains("`model.files.tokenizer.json`"), "{refused}");
    std::fs::write(&tokenizer, original).unwrap();
    succeed(&base);
    std::fs::write(Path::new(&model).join("generation_config.json"), r#"{"eos_token_id": 5}"#).unwrap();
    let refused = again(&[]);
    assert!(refused.contains("`model.files.generation_config.json`"), "{refused}");
    std::fs::remove_file(Path::new(&model).join("generation_config.json")).unwrap();
    damage_the_middle_of_weights(Path::new(&model));
    let refused = again(&[]);
    assert!(refused.contains("`model.files.weights`"), "{refused}");
}

#[test]
fn a_divergence_is_computed_anew_when_the_middle_of_a_weight_changes() {
    let folder = tempfile::tempdir().unwrap();
    let model = copy_of("books-bf16", &folder.path().join("model"));
    let kl = |out: &str| -> f64 {
        let out = folder.path().join(out);
        let out = out.to_str().unwrap();
        let args = ["compare", "models/books-bf16", &model, "--tasks", "none", "--text", "books", "--windows", "2"];
        let found = succeed(&[&args[..], &["--no-speed", "--json", "-o", out]].concat());
        serde_json::from_str::<Value>(&found).unwrap()["divergences"][0]["kl"]["value"].as_f64().unwrap()
    };
    assert_eq!(kl("kept"), 0.0);
    damage_the_middle_of_weights(Path::new(&model));
    let changed = kl("kept");
    assert!(changed > 0.1, "{changed}");
    assert_eq!(changed, kl("fresh"));
}

/// A copy of the shipped model with rows behind the tokenizer's last token, as vocabularies are padded for the hardware.
fn padded_copy(to: &Path, rows: usize) -> String {
    let model = copy_of("books-bf16", to);
    let config = to.join("config.json");
    let mut value: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    let hidden = value["hidden_size"].as_u64().unwrap() as usize;
    value["vocab_size"] = (value["vocab_size"].as_u64().unwrap() + rows as u64).into();
    std::fs::write(&config, value.to_string()).unwrap();
    let path = to.join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let mut data = Vec::new();
    for (name, tensor) in header.as_object_mut().unwrap().iter_mut().filter(|(n, _)| *n != "__metadata__") {
        let at = |i: usize| 8 + length + tensor["data_offsets"][i].as_u64().unwrap() as usize;
        let start = data.len();
        data.extend_from_slice(&bytes[at(0)..at(1)]);
        if name.contains("embed_tokens") || name.contains("lm_head") {
            assert_eq!(tensor["dtype"], "BF16");
            data.resize(data.len() + rows * hidden * 2, 0);
            tensor["shape"][0] = (tensor["shape"][0].as_u64().unwrap() + rows as u64).into();
        }
        tensor["data_offsets"] = serde_json::json!([start, data.len()]);
    }
    let mut header = header.to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    std::fs::write(&path, [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat()).unwrap();
    model
}

#[test]
fn a_vocabulary_that_is_only_padded_is_compared_with_a_note() {
    let folder = tempfile::tempdir().unwrap();
    let padded = padded_copy(&folder.path().join("padded"), 64);
    let out = folder.path().join("out");
    let out = out.to_str().unwrap();
    for models in [["models/books-bf16", &padded], [&padded, "models/books-bf16"]] {
        let args =
            ["compare", models[0], models[1], "--tasks", "none", "--text", "books", "--windows", "2", "--no-speed"];
        let found = run(&[&args[..], &["--json", "-o", out]].concat());
        let stderr = String::from_utf8_lossy(&found.stderr);
        assert!(found.status.success() && stderr.contains("one is padded"), "{stderr}");
        let comparison: Value = serde_json::from_slice(&found.stdout).unwrap();
        // The same model but for rows that no token has.
        assert_eq!(comparison["divergences"][0]["kl"]["value"], 0.0);
    }
}

#[test]
fn what_a_comparison_lacks_is_said_before_it_begins() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let short = folder.path().join("short.txt");
    std::fs::write(&short, "Too short for two windows.").unwrap();
    let base = ["compare", "models/books-bf16", "models/books-nvfp4", "--no-speed", "-o", out.to_str().unwrap()];
    let short = short.to_str().unwrap();
    for (more, part) in [
        (&["--tasks", "piqa", "-L", "1", "--text", "none"][..], "1 document to compare on"),
        (&["--tasks", "none", "--text", "books", "--windows", "1"], "two windows"),
        (&["--tasks", "none", "--text", "books", "--require-recovery", "0.9"], "--tasks names none"),
        (&["--tasks", "piqa", "--text", short], "do not fill two windows"),
        (&["--tasks", "piqa", "--text", "none", "--confidence", "1"], "--confidence 1"),
    ] {
        let said = fail(&[&base[..], more].concat());
        assert!(said.contains(part), "{more:?}: {said}");
        let answered = out.join("books-bf16/responses.jsonl");
        assert!(!answered.exists(), "{more:?}");
    }
}

#[test]
fn identical_models_are_said_to_be_so() {
    let folder = tempfile::tempdir().unwrap();
    let copy = copy_of("books-bf16", &folder.path().join("copy"));
    let out = folder.path().join("out");
    let args = ["compare", "models/books-bf16", &copy, "--tasks", "piqa,lambada_openai", "-L", "20", "--text", "books"];
    let said = succeed(&[&args[..], &["--windows", "2", "--no-speed", "-o", out.to_str().unwrap()]].concat());
    let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(said.contains("both score the same on every document"), "{said}");
    assert!(said.contains("Mean KLD: 0.000000 ± 0.000000") && !said.contains("NaN"), "{said}");
}

#[test]
fn names_that_differ_in_signs_only_have_files_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("d.jsonl"), "{\"q\": \"x\"}\n").unwrap();
    for (file, name) in [("one", "a b"), ("two", "a_b"), ("three", "a/b")] {
        let task = format!(
            "task: \"{name}\"\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: d.jsonl}}}}\ntest_split: test\n\
             output_type: multiple_choice\ndoc_to_text: \"{name}\"\ndoc_to_choice: [\"yes\", \"no\"]\ndoc_to_target: 0\n"
        );
        std::fs::write(folder.path().join(format!("{file}.yaml")), task).unwrap();
    }
    let tasks = folder.path().to_str().unwrap();
    let out = folder.path().join("out");
    let to = out.to_str().unwrap();
    succeed(&["eval", "models/books-bf16", "--tasks", "a b,a_b,a/b", "--include-path", tasks, "-o", to]);
    for (file, name) in [("a%20b", "a b"), ("a_b", "a_b"), ("a%2Fb", "a/b")] {
        let samples = std::fs::read_to_string(out.join(format!("samples_{file}.jsonl"))).unwrap();
        assert!(samples.contains(&format!("\"{name}\"")), "{samples}");
    }
    let compare = |labels: &str, out: &Path| {
        let models =
            ["compare", "models/books-bf16", "models/books-nvfp4", "--labels", labels, "--tasks", "piqa", "-L", "3"];
        run(&[&models[..], &["--text", "none", "--no-speed", "-o", out.to_str().unwrap()]].concat())
    };
    let both = folder.path().join("compared");
    let found = compare("a b,a_b", &both);
    assert!(found.status.success(), "{}", String::from_utf8_lossy(&found.stderr));
    assert!(both.join("a%20b").is_dir() && both.join("a_b").is_dir());
    let none = folder.path().join("none");
    let same = compare("a,a", &none);
    let stderr = String::from_utf8_lossy(&same.stderr);
    assert!(stderr.contains("`a` stands for two models") && !none.exists(), "{stderr}");
}

/// Two files of one name are two texts, and records are the texts that they hold.
#[test]
fn texts_of_one_name_are_told_apart_and_records_are_read_as_what_they_say() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    for name in ["prose", "digits"] {
        std::fs::create_dir(at(name)).unwrap();
    }
    let prose = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cli/calibration.txt")).unwrap();
    let prose = &prose[..8000];
    let digits: String = (0..3000).map(|i| format!("{} ", i * i)).collect();
    std::fs::write(at("prose/test.txt"), prose).unwrap();
    std::fs::write(at("digits/test.txt"), &digits).unwrap();
    std::fs::write(at("same.txt"), serde_json::json!([{"text": prose, "url": "x"}]).to_string()).unwrap();
    std::fs::write(at("wikitext.txt"), &digits).unwrap();
    let out = at("out");
    let texts = ["prose/test.txt", "digits/test.txt", "same.txt", "wikitext.txt"].map(at).join(",");
    let base =
        ["compare", "models/books-bf16", "models/books-nvfp4", "--tasks", "none", "--windows", "2", "--no-speed"];
    let json = succeed(&[&base[..], &["--json", "-o", &out, "--text", &texts]].concat());
    let comparison: Value = serde_json::from_str(&json).unwrap();
    let found: Vec<(&str, f64)> = comparison["divergences"]
        .as_array()
        .unwrap()
        .iter()
        .map(|d| (d["text"].as_str().unwrap(), d["kl"]["value"].as_f64().unwrap()))
        .collect();
    let names: Vec<&str> = found.iter().map(|f| f.0).collect();
    assert_eq!(names, ["prose/test.txt", "digits/test.txt", "same", "wikitext.txt"]);
    assert_ne!(found[0].1, found[1].1);
    assert_eq!((found[2].1, found[3].1), (found[0].1, found[1].1));
    let kept = files(&folder.path().join("out/books-nvfp4"));
    assert_eq!(kept.keys().filter(|k| k.starts_with("divergence_")).count(), 4, "{:?}", kept.keys());

    let other = at("other");
    std::fs::write(at("ids.json"), "[[1, 2], [3]]").unwrap();
    std::fs::write(at("chat.jsonl"), "{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}]}").unwrap();
    let (prose, ids, chat, none) = (at("prose/test.txt"), at("ids.json"), at("chat.jsonl"), at("none.txt"));
    for (texts, expected) in [
        (format!("{prose},{prose}"), "are the same file; give it once"),
        ("books,books".into(), "--text books: given twice"),
        ("none,books".into(), "`none` stands alone"),
        (ids, "token ids, where a text is needed"),
        (chat, "needs a chat template"),
        (none, "is no shipped text (wikitext, books)"),
    ] {
        let error = fail(&[&base[..], &["-o", &other, "--text", &texts]].concat());
        assert!(error.contains(expected), "{texts}: {error}");
    }
}
