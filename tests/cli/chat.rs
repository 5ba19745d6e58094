//! Chat templates and generation settings as users of `run`, `eval` and `quantize` meet them.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn run(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_recoup"));
    command.args(args).current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap()
}

fn succeed(args: &[&str]) -> (String, String) {
    let out = run(args);
    let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success(), "{args:?}: {stderr}");
    (String::from_utf8(out.stdout).unwrap(), stderr)
}

fn fail(args: &[&str]) -> String {
    let out = run(args);
    let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(1), "{args:?}: {stderr}");
    stderr
}

/// A copy of a shipped model with more files.
fn model(to: &Path, files: &[(&str, &str)]) -> String {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("models/books-bf16")).unwrap() {
        let entry = entry.unwrap();
        if entry.path().is_file() {
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
    for (name, text) in files {
        std::fs::create_dir_all(to.join(name).parent().unwrap()).unwrap();
        std::fs::write(to.join(name), text).unwrap();
    }
    to.to_str().unwrap().to_owned()
}

/// Qwen3's way: an empty thinking stands in the prompt where thinking is disabled.
const THINKING: &str = "{%- for m in messages %}<|im_start|>{{ m.role }}\r\n{{ m.content }}<|im_end|>\r\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\r\n{% if enable_thinking is defined and enable_thinking is false %}\
    <think>\r\n\r\n</think>\r\n\r\n{% endif %}{% endif %}";

const TASK: &str = "task: ask\ndataset_path: json\ndataset_kwargs: {data_files: {test: d.jsonl}}\ntest_split: test\n\
    output_type: generate_until\ndoc_to_text: \"{{q}}\"\ndoc_to_target: \"{{a}}\"\n\
    generation_kwargs: {until: [\"\\n\\n\"], max_gen_toks: 4, do_sample: false}\nmetric_list: [{metric: exact_match}]\n";

fn prompt(folder: &Path) -> String {
    let text = std::fs::read_to_string(folder.join("samples_ask.jsonl")).unwrap();
    let sample: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    sample["arguments"]["gen_args_0"]["arg_0"].as_str().unwrap().to_owned()
}

#[test]
fn a_templates_arguments_reach_it_and_stand_in_the_record() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let model = model(&folder.path().join("m"), &[("chat_template.jinja", THINKING)]);
    std::fs::write(folder.path().join("ask.yaml"), TASK).unwrap();
    std::fs::write(folder.path().join("d.jsonl"), "{\"q\": \"Who?\\r\\n\", \"a\": \"x\"}\n").unwrap();
    let eval = |out: &str, more: &[&str]| {
        let tasks = at("");
        let words = ["eval", &model, "--tasks", "ask", "--include-path", &tasks, "-o", out, "--apply-chat-template"];
        succeed(&words.iter().chain(more).copied().collect::<Vec<_>>()).1
    };
    let plain = "<|im_start|>user\nWho?\r\n<|im_end|>\n<|im_start|>assistant\n";
    eval(&at("plain"), &[]);
    assert_eq!(prompt(&folder.path().join("plain")), plain);
    for (name, more) in [
        ("kwargs", ["--chat-template-kwargs", r#"{"enable_thinking": false}"#]),
        ("option", ["--enable-thinking", "false"]),
    ] {
        eval(&at(name), &more);
        assert_eq!(prompt(&folder.path().join(name)), format!("{plain}<think>\n\n</think>\n\n"));
        let results = std::fs::read_to_string(folder.path().join(name).join("results.json")).unwrap();
        let results: Value = serde_json::from_str(&results).unwrap();
        assert_eq!(results["config"]["chat_template_kwargs"]["enable_thinking"], false);
    }
    let stderr = eval(&at("unknown"), &["--chat-template-kwargs", r#"{"enable_thinkin": false}"#]);
    assert!(stderr.contains("does not know enable_thinkin"), "{stderr}");

    let tasks = at("");
    let refused = |more: &[&str]| {
        let out = at("refused");
        let words = ["eval", &model, "--tasks", "ask", "--include-path", &tasks, "-o", &out];
        fail(&words.iter().chain(more).copied().collect::<Vec<_>>())
    };
    let stderr = refused(&["--chat-template-kwargs", "{\"a\": 1}"]);
    assert!(stderr.contains("--apply-chat-template"), "{stderr}");
    let stderr = refused(&["--apply-chat-template", "--enable-thinking", "true"]);
    assert!(stderr.contains("--think-end-token"), "{stderr}");
    let stderr = refused(&["--apply-chat-template", "--chat-template-kwargs", "{\"messages\": 1}"]);
    assert!(stderr.contains("`messages`"), "{stderr}");
    let words = ["eval", &model, "--tasks", "piqa", "--apply-chat-template", "--enable-thinking", "true"];
    let stderr = fail(&words.iter().chain(&["--think-end-token", "</think>"]).copied().collect::<Vec<_>>());
    assert!(stderr.contains("piqa") && stderr.contains("probabilities"), "{stderr}");
}

#[test]
fn a_template_that_cannot_be_rendered_is_blamed_itself() {
    let folder = tempfile::tempdir().unwrap();
    let template = "{% for m in messages %}\n{{ m.content | urlize }}{% endfor %}";
    let model = model(&folder.path().join("m"), &[("chat_template.jinja", template)]);
    std::fs::write(folder.path().join("ask.yaml"), TASK).unwrap();
    std::fs::write(folder.path().join("d.jsonl"), "{\"q\": \"Who?\", \"a\": \"x\"}\n").unwrap();
    let tasks = folder.path().to_str().unwrap();
    let stderr = fail(&["eval", &model, "--tasks", "ask", "--include-path", tasks, "--apply-chat-template"]);
    assert!(stderr.contains("chat_template.jinja, line 2") && stderr.contains("'urlize' is not supported"), "{stderr}");
}

#[test]
fn generation_config_is_used_and_what_is_not_used_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let config = r#"{"eos_token_id": 0, "do_sample": true, "temperature": 1.5, "min_p": 0.5, "top_k": -1, "num_beams": 3,
        "max_new_tokens": 9}"#;
    let model = model(&folder.path().join("m"), &[("generation_config.json", config)]);
    let answer = |more: &[&str]| {
        let words = ["run", &model, "-p", "Once upon a time", "--seed", "3", "--json"];
        let (stdout, stderr) = succeed(&words.iter().chain(more).copied().collect::<Vec<_>>());
        let answer: Value = serde_json::from_str(&stdout).unwrap();
        (answer["text"].clone(), answer["tokens"].as_array().unwrap().len(), stderr)
    };
    let (own, tokens, stderr) = answer(&[]);
    assert_eq!(tokens, 9);
    assert!(stderr.contains("not used: num_beams 3") && !stderr.contains("top_k"), "{stderr}");
    assert_eq!(own, answer(&["--min-p", "0.5"]).0);
    assert_ne!(own, answer(&["--min-p", "0"]).0);
    assert_eq!(answer(&["-n", "3"]).1, 3);
}

#[test]
fn a_quantized_model_has_all_templates_of_its_source() {
    let folder = tempfile::tempdir().unwrap();
    let files = [
        ("chat_template.jinja", "{{ messages }}"),
        ("additional_chat_templates/tool_use.jinja", "tools {{ tools }}"),
        ("vocab.txt", "a\n"),
        ("strange.json", "{}"),
    ];
    let model = model(&folder.path().join("m"), &files);
    let out = folder.path().join("q");
    let (_, stderr) = succeed(&["quantize", &model, "-o", out.to_str().unwrap(), "--recipe", "nvfp4"]);
    for (name, text) in &files[..3] {
        assert_eq!(std::fs::read_to_string(out.join(name)).unwrap(), *text, "{name}");
    }
    assert!(stderr.contains("not copied") && stderr.contains("strange.json"), "{stderr}");
    assert!(!out.join("strange.json").exists());
}

#[test]
fn worked_examples_are_turns_of_the_conversation_unless_they_are_to_be_one_message() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(&folder.path().join("model"), &[("chat_template.jinja", THINKING)]);
    let tasks = folder.path().join("tasks");
    std::fs::create_dir(&tasks).unwrap();
    let task = TASK.replace("test_split: test", "test_split: test\nfewshot_split: test\nnum_fewshot: 1");
    std::fs::write(tasks.join("ask.yaml"), task).unwrap();
    std::fs::write(tasks.join("d.jsonl"), "{\"q\": \"one\", \"a\": \"1\"}\n{\"q\": \"two\", \"a\": \"2\"}\n").unwrap();
    let ask = |more: &[&str]| {
        let out = tempfile::tempdir().unwrap();
        let to = out.path().join("out");
        let args =
            ["eval", &model, "--tasks", "ask", "--include-path", tasks.to_str().unwrap(), "--apply-chat-template"];
        succeed(&[&args[..], &["-L", "1", "-o", to.to_str().unwrap()], more].concat());
        prompt(&to)
    };
    // lm_eval 0.4.13 --apply_chat_template, with its default and with --fewshot_as_multiturn false.
    let turns = "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\none<|im_end|>\n\
                 <|im_start|>assistant\n";
    let one = "<|im_start|>user\ntwo 2\n\none<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(ask(&[]), turns);
    assert_eq!(ask(&["--fewshot-as-multiturn"]), turns);
    assert_eq!(ask(&["--fewshot-as-multiturn", "false"]), one);
}
