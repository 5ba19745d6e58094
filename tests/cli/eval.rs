//! `recoup eval` as its users run it: killed and resumed, in shards, with bad input.

use std::path::Path;

use serde_json::Value;

use crate::support::command::{
    BF16, Folder, NVFP4, assert_same_files, fail, files, lines, recoup, run, shown_json, succeed,
};
#[cfg(unix)]
use crate::support::held::Held;
use crate::support::http::Server;

#[cfg(unix)]
#[test]
fn a_killed_run_goes_on_and_ends_with_the_same_bytes() {
    let folder = Folder::new();
    let (whole, killed) = (folder.name("whole"), folder.name("killed"));
    let base = ["eval", NVFP4, "--tasks", "hellaswag,lambada_openai,books_cloze", "--limit", "60", "-o"];
    succeed(&[&base[..], &[&whole]].concat());
    let all = lines(&folder.at("whole/responses.jsonl"));

    let words = [&base[..], &[&killed]].concat();
    // Killed three times, each time when some more answers are there.
    let journal = folder.at("killed/responses.jsonl");
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

    let (_, stderr) = succeed(&words);
    assert!(stderr.contains("answers are there already"), "{stderr}");
    assert_same_files(&folder.at("whole"), &folder.at("killed"));
}

#[test]
fn shards_merge_to_the_bytes_of_one_run() {
    let folder = Folder::new();
    let tasks = "piqa,blimp_wh_island,gsm8k";
    let base = ["eval", BF16, "--tasks", tasks, "--limit", "7", "--gen-kwargs", "max_gen_toks=64"];
    let with = |more: &[&str]| succeed(&[&base[..], more].concat()).0;
    let table = with(&["-o", &folder.name("whole")]);
    let parts: Vec<String> = (0..3).map(|i| folder.name(format!("part{i}"))).collect();
    for (i, part) in parts.iter().enumerate() {
        with(&["-o", part, "--shard", &format!("{i}/3")]);
    }
    assert_eq!(with(&["-o", &folder.name("merged"), "--merge", &parts.join(",")]), table);
    assert_same_files(&folder.at("whole"), &folder.at("merged"));

    // Not a shard twice, not one too few, not another run's.
    let refuse = |more: &[&str]| fail(&[&base[..], more].concat());
    let twice = [parts[0].as_str(), &parts[1], &parts[1]].join(",");
    assert!(refuse(&["--merge", &twice]).contains("shard"));
    assert!(refuse(&["--merge", &parts[..2].join(",")]).contains("shard"));
    let other = fail(&["eval", BF16, "--tasks", "piqa", "--limit", "7", "--merge", &parts.join(",")]);
    assert!(other.contains("responses.jsonl") && other.contains("tasks"), "{other}");
}

#[test]
fn processes_of_a_cluster_do_their_parts_of_one_command() {
    let folder = Folder::new();
    let (whole, parts) = (folder.name("whole"), folder.name("parts"));
    let base = ["eval", BF16, "--tasks", "piqa,blimp_wh_island", "--limit", "7"];
    let table = succeed(&[&base[..], &["-o", &whole]].concat()).0;
    let as_process = |number: &str, size: &str| {
        let mut command = recoup(&[&base[..], &["--shard", "auto", "-o", &parts]].concat());
        command.env("OMPI_COMM_WORLD_RANK", number).env("OMPI_COMM_WORLD_SIZE", size).output().unwrap()
    };
    assert!(as_process("0", "3").status.success() && as_process("2", "3").status.success());
    let (merged, one) = (folder.name("merged"), folder.name("alone"));
    let merge = [&base[..], &["-o", &merged, "--merge", &parts]].concat();
    assert!(fail(&merge).contains("of 3 parts these are missing: 1;"));
    // The one that was lost is run again alone, by a pod that knows only its own number.
    let mut again = recoup(&[&base[..], &["--shard", "auto/3", "-o", &parts]].concat());
    assert!(again.env("JOB_COMPLETION_INDEX", "1").output().unwrap().status.success());
    assert_eq!(succeed(&merge).0, table);
    assert_same_files(&folder.at("whole"), &folder.at("merged"));
    // One process has everything to do, and results at once.
    let mut alone = recoup(&[&base[..], &["--shard", "auto", "-o", &one]].concat());
    let alone = alone.env("SLURM_PROCID", "0").env("SLURM_STEP_NUM_TASKS", "1").output().unwrap();
    assert_eq!(String::from_utf8(alone.stdout).unwrap(), table);
    assert_same_files(&folder.at("whole"), &folder.at("alone"));
    assert!(fail(&[&base[..], &["--shard", "auto", "-o", &parts]].concat()).contains("say --shard i/n"));
}

/// Rewrites which device answered, as the shard in `folder` records it.
fn answered_on(folder: &Path, device: &str) {
    let path = folder.join("responses.jsonl");
    let text = std::fs::read_to_string(&path).unwrap();
    let (header, answers) = text.split_once('\n').unwrap();
    let mut header: Value = serde_json::from_str(header).unwrap();
    header["model"]["computation"] =
        serde_json::json!({"device": device, "kernels": "k1", "kv_cache_dtype": "f32", "numerics": 1});
    std::fs::write(path, format!("{header}\n{answers}")).unwrap();
}

#[test]
fn shards_of_a_device_that_is_not_here_are_merged_and_those_of_two_devices_are_not() {
    let folder = Folder::new();
    let base = ["eval", BF16, "--tasks", "piqa", "--limit", "6"];
    let with = |more: &[&str]| succeed(&[&base[..], more].concat()).0;
    let table = with(&["-o", &folder.name("whole")]);
    for (i, part) in ["a", "b"].iter().enumerate() {
        with(&["-o", &folder.name(part), "--shard", &format!("{i}/2")]);
        answered_on(&folder.at(part), "cuda sm_90");
    }
    let parts = [folder.name("a"), folder.name("b")].join(",");
    // Whatever device the command names: none is asked for.
    assert_eq!(with(&["-o", &folder.name("merged"), "--device", "cuda:7", "--merge", &parts]), table);
    let results = crate::support::json(&folder.at("merged/results.json"));
    assert_eq!(results["config"]["model_identity"]["computation"]["device"], "cuda sm_90");

    let refuse = |more: &[&str]| fail(&[&base[..], &["--merge", &parts], more].concat());
    let bf16 = refuse(&["--kv-cache-dtype", "bf16"]);
    assert!(bf16.contains("--kv-cache-dtype bf16") && bf16.contains("\"f32\""), "{bf16}");
    answered_on(&folder.at("b"), "cuda sm_80");
    let two = refuse(&[]);
    for part in ["`model.computation.device`", "cuda sm_80", "cuda sm_90", "a/responses", "b/responses"] {
        assert!(two.contains(part), "{part}: {two}");
    }
}

#[test]
fn an_output_folder_of_another_run_is_left_alone() {
    let folder = Folder::new();
    let out = &folder.name("");
    succeed(&["eval", BF16, "--tasks", "piqa", "--limit", "3", "-o", out]);
    let before = files(folder.path());
    let message = fail(&["eval", NVFP4, "--tasks", "piqa", "--limit", "3", "-o", out]);
    assert!(message.contains("responses.jsonl") && message.contains("model"), "{message}");
    assert!(before == files(folder.path()), "the other run's files changed");
}

/// A task of our own: a folder with `mine.yaml` and `mine.jsonl`.
struct OwnTask(Folder);

impl OwnTask {
    fn new(yaml: &str, data: &str) -> Self {
        let folder = Folder::new();
        folder.write("mine.yaml", yaml);
        folder.write("mine.jsonl", data);
        Self(folder)
    }

    fn args(&self) -> [&str; 6] {
        ["eval", BF16, "--include-path", self.0.path().to_str().unwrap(), "--tasks", "mine"]
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
    let out = shown_json(&[&good.args()[..], &["--json"]].concat());
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
    let (_, stderr) = succeed(&task.args());
    assert!(stderr.contains("2 contexts were longer"), "{stderr}");

    let task = OwnTask::new(YAML, &rows("It was", &long));
    let message = fail(&task.args());
    assert!(message.contains("256"), "{message}");
}

#[test]
fn names_that_mean_nothing_are_answered_with_the_nearest() {
    let message = fail(&["eval", BF16, "--tasks", "helaswag"]);
    assert!(message.contains("hellaswag"), "{message}");
    let message = fail(&["eval", BF16]);
    assert!(message.contains("--tasks"), "{message}");
    let message = fail(&["eval", "models/none-such", "--tasks", "piqa"]);
    assert!(message.contains("none-such"), "{message}");
    // Nothing listens on port 1.
    let message = fail(&["eval", "http://127.0.0.1:1/v1", "--tasks", "piqa", "--retries", "0"]);
    assert!(message.contains("127.0.0.1:1"), "{message}");
    assert_eq!(run(&["eval", BF16, "--tasks", "piqa", "--shard", "3/3", "-o", "x"]).status.code(), Some(2));
}

/// A server that answers nothing.
/// Our own server, asked by our own client: the same scores as without either, but for what f32 has fewer digits.
#[test]
fn a_served_model_has_the_scores_of_the_model() {
    let rows: String =
        ["It was a dark and stormy", "The king said to the", "She looked at him and", "In the beginning there"]
            .iter()
            .map(|q| {
                format!(
                    "{{\"question\": \"{q}\", \"choices\": [\"night\", \"man who came\", \"piano\"], \"answer\": 1}}\n"
                )
            })
            .collect();
    let task = OwnTask::new(YAML, &rows);
    let server = Server::start(&[BF16]);
    let url = format!("http://{}/v1", server.address);
    let logged = |model: &str, out: &str| {
        let folder = task.0.name(out);
        succeed(&["eval", model, "--include-path", task.0.path().to_str().unwrap(), "--tasks", "mine", "-o", &folder]);
        let results = task.0.json(format!("{out}/results.json"));
        (results["results"]["mine"].clone(), task.0.read(format!("{out}/responses.jsonl")))
    };
    let ((local, own), (remote, served)) = (logged(BF16, "local"), logged(&url, "served"));
    assert_eq!(local, remote);
    let scores = |text: &str| -> Vec<f64> {
        let row = |line: &str| serde_json::from_str::<serde_json::Value>(line).ok();
        text.lines().filter_map(row).filter_map(|r| find_number(&r, "log_likelihood")).collect()
    };
    let (own, served) = (scores(&own), scores(&served));
    assert_eq!((own.len(), served.len()), (12, 12));
    for (a, b) in own.iter().zip(&served) {
        assert!((a - b).abs() < 1e-4, "{a} {b}");
    }
}

/// The number under a key, however deep.
fn find_number(value: &serde_json::Value, key: &str) -> Option<f64> {
    match value {
        serde_json::Value::Object(map) => {
            map.get(key).and_then(serde_json::Value::as_f64).or_else(|| map.values().find_map(|v| find_number(v, key)))
        }
        serde_json::Value::Array(list) => list.iter().find_map(|v| find_number(v, key)),
        _ => None,
    }
}

#[test]
fn a_silent_server_is_given_up_on() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}/v1", listener.local_addr().unwrap());
    // It would wait for ever otherwise.
    let message = fail(&["eval", &address, "--tasks", "piqa", "--timeout", "1", "--retries", "0", "--limit", "1"]);
    assert!(message.contains(&address) || message.contains(&listener.local_addr().unwrap().to_string()), "{message}");
}

/// Sets bytes in the middle of every down_proj to zero: names, shapes and both ends of each tensor stay.
pub fn damage_the_middle_of_weights(folder: &Path) {
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
    let folder = Folder::new();
    let model = folder.model("model", BF16);
    let base = ["eval", &model, "--tasks", "lambada_openai", "-L", "4", "-o", &folder.name("out")];
    let again = |more: &[&str]| fail(&[&base[..], more].concat());
    succeed(&base);
    let (_, stderr) = succeed(&[&base[..], &["--threads", "1", "--isa", "scalar"]].concat());
    assert!(stderr.contains("4 of 4 answers are there already"), "{stderr}");
    for (options, key) in [
        (&["--max-length", "16"][..], "`model.context` is 256 there and 16 here"),
        (&["--kv-cache-dtype", "bf16"], "`model.computation.kv_cache_dtype` is \"f32\" there and \"bf16\" here"),
    ] {
        let refused = again(options);
        assert!(refused.contains("answers of another run") && refused.contains(key), "{refused}");
    }
    let original = folder.read("model/tokenizer.json");
    let mut value = folder.json("model/tokenizer.json");
    value["model"]["merges"].as_array_mut().unwrap().truncate(200);
    folder.write("model/tokenizer.json", value.to_string());
    let refused = again(&[]);
    assert!(refused.contains("`model.files.tokenizer.json`"), "{refused}");
    folder.write("model/tokenizer.json", original);
    succeed(&base);
    folder.write("model/generation_config.json", r#"{"eos_token_id": 5}"#);
    let refused = again(&[]);
    assert!(refused.contains("`model.files.generation_config.json`"), "{refused}");
    std::fs::remove_file(folder.at("model/generation_config.json")).unwrap();
    damage_the_middle_of_weights(&folder.at("model"));
    let refused = again(&[]);
    assert!(refused.contains("`model.files.weights`"), "{refused}");
}

#[test]
fn names_that_differ_in_signs_only_have_files_of_their_own() {
    let folder = Folder::new();
    folder.write("d.jsonl", "{\"q\": \"x\"}\n");
    for (file, name) in [("one", "a b"), ("two", "a_b"), ("three", "a/b")] {
        let task = format!(
            "task: \"{name}\"\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: d.jsonl}}}}\ntest_split: test\n\
             output_type: multiple_choice\ndoc_to_text: \"{name}\"\ndoc_to_choice: [\"yes\", \"no\"]\ndoc_to_target: 0\n"
        );
        folder.write(format!("{file}.yaml"), task);
    }
    let (tasks, out) = (folder.name(""), folder.name("out"));
    succeed(&["eval", BF16, "--tasks", "a b,a_b,a/b", "--include-path", &tasks, "-o", &out]);
    for (file, name) in [("a%20b", "a b"), ("a_b", "a_b"), ("a%2Fb", "a/b")] {
        let samples = folder.read(format!("out/samples_{file}.jsonl"));
        assert!(samples.contains(&format!("\"{name}\"")), "{samples}");
    }
    let compare = ["compare", BF16, NVFP4, "--tasks", "piqa", "-L", "3", "--text", "none", "--no-speed"];
    succeed(&[&compare[..], &["--labels", "a b,a_b", "-o", &folder.name("compared")]].concat());
    assert!(folder.at("compared/a%20b").is_dir() && folder.at("compared/a_b").is_dir());
    let stderr = fail(&[&compare[..], &["--labels", "a,a", "-o", &folder.name("none")]].concat());
    assert!(stderr.contains("`a` stands for two models") && !folder.at("none").exists(), "{stderr}");
}
