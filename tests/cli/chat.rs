//! Chat templates and generation settings as users of `run`, `eval` and `quantize` meet them.

use std::path::Path;

use serde_json::Value;

use crate::support::command::{BF16, Folder, fail, succeed};
use crate::support::{json, json_lines};

/// A folder with a copy of a shipped model that has these files too; the model's name.
fn with_model(files: &[(&str, &str)]) -> (Folder, String) {
    let folder = Folder::new();
    let model = folder.model("m", BF16);
    for (name, text) in files {
        folder.write(format!("m/{name}"), text);
    }
    (folder, model)
}

/// Qwen3's way: an empty thinking stands in the prompt where thinking is disabled.
const THINKING: &str = "{%- for m in messages %}<|im_start|>{{ m.role }}\r\n{{ m.content }}<|im_end|>\r\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\r\n{% if enable_thinking is defined and enable_thinking is false %}\
    <think>\r\n\r\n</think>\r\n\r\n{% endif %}{% endif %}";

const TASK: &str = "task: ask\ndataset_path: json\ndataset_kwargs: {data_files: {test: d.jsonl}}\ntest_split: test\n\
    output_type: generate_until\ndoc_to_text: \"{{q}}\"\ndoc_to_target: \"{{a}}\"\n\
    generation_kwargs: {until: [\"\\n\\n\"], max_gen_toks: 4, do_sample: false}\nmetric_list: [{metric: exact_match}]\n";

fn prompt(folder: &Path) -> String {
    let sample = &json_lines(&folder.join("samples_ask.jsonl"))[0];
    sample["arguments"]["gen_args_0"]["arg_0"].as_str().unwrap().to_owned()
}

#[test]
fn a_templates_arguments_reach_it_and_stand_in_the_record() {
    let (folder, model) = with_model(&[("chat_template.jinja", THINKING)]);
    folder.write("ask.yaml", TASK);
    folder.write("d.jsonl", "{\"q\": \"Who?\\r\\n\", \"a\": \"x\"}\n");
    let tasks = folder.name("");
    let ask = ["eval", &model, "--tasks", "ask", "--include-path", &tasks, "-o"];
    let eval =
        |out: &str, more: &[&str]| succeed(&[&ask[..], &[&folder.name(out), "--apply-chat-template"], more].concat()).1;
    let plain = "<|im_start|>user\nWho?\r\n<|im_end|>\n<|im_start|>assistant\n";
    eval("plain", &[]);
    assert_eq!(prompt(&folder.at("plain")), plain);
    for (name, more) in [
        ("kwargs", ["--chat-template-kwargs", r#"{"enable_thinking": false}"#]),
        ("option", ["--enable-thinking", "false"]),
    ] {
        eval(name, &more);
        assert_eq!(prompt(&folder.at(name)), format!("{plain}<think>\n\n</think>\n\n"));
        let results = json(&folder.at(name).join("results.json"));
        assert_eq!(results["config"]["chat_template_kwargs"]["enable_thinking"], false);
    }
    let stderr = eval("unknown", &["--chat-template-kwargs", r#"{"enable_thinkin": false}"#]);
    assert!(stderr.contains("does not know enable_thinkin"), "{stderr}");

    let out = folder.name("refused");
    for (more, part) in [
        (&["--chat-template-kwargs", "{\"a\": 1}"][..], "--apply-chat-template"),
        (&["--apply-chat-template", "--enable-thinking", "true"], "--think-end-token"),
        (&["--apply-chat-template", "--chat-template-kwargs", "{\"messages\": 1}"], "`messages`"),
    ] {
        let stderr = fail(&[&ask[..], &[&out], more].concat());
        assert!(stderr.contains(part), "{stderr}");
    }
    let words = ["eval", &model, "--tasks", "piqa", "--apply-chat-template", "--enable-thinking", "true"];
    let stderr = fail(&[&words[..], &["--think-end-token", "</think>"]].concat());
    assert!(stderr.contains("piqa") && stderr.contains("probabilities"), "{stderr}");
}

#[test]
fn a_template_that_cannot_be_rendered_is_blamed_itself() {
    let template = "{% for m in messages %}\n{{ m.content | urlize }}{% endfor %}";
    let (folder, model) = with_model(&[("chat_template.jinja", template)]);
    folder.write("ask.yaml", TASK);
    folder.write("d.jsonl", "{\"q\": \"Who?\", \"a\": \"x\"}\n");
    let tasks = folder.name("");
    let stderr = fail(&["eval", &model, "--tasks", "ask", "--include-path", &tasks, "--apply-chat-template"]);
    assert!(stderr.contains("chat_template.jinja, line 2") && stderr.contains("'urlize' is not supported"), "{stderr}");
}

#[test]
fn generation_config_is_used_and_what_is_not_used_is_named() {
    let config = r#"{"eos_token_id": 0, "do_sample": true, "temperature": 1.5, "min_p": 0.5, "top_k": -1, "num_beams": 3,
        "max_new_tokens": 9}"#;
    let (_folder, model) = with_model(&[("generation_config.json", config)]);
    let answer = |more: &[&str]| {
        let words = ["run", &model, "-p", "Once upon a time", "--seed", "3", "--json"];
        let (stdout, stderr) = succeed(&[&words[..], more].concat());
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
    let files = [
        ("chat_template.jinja", "{{ messages }}"),
        ("additional_chat_templates/tool_use.jinja", "tools {{ tools }}"),
        ("vocab.txt", "a\n"),
        ("strange.json", "{}"),
    ];
    let (folder, model) = with_model(&files);
    let (_, stderr) = succeed(&["quantize", &model, "-o", &folder.name("q"), "--recipe", "nvfp4"]);
    for (name, text) in &files[..3] {
        assert_eq!(folder.read(format!("q/{name}")), *text, "{name}");
    }
    assert!(stderr.contains("not copied") && stderr.contains("strange.json"), "{stderr}");
    assert!(!folder.at("q/strange.json").exists());
}

#[test]
fn worked_examples_are_turns_of_the_conversation_unless_they_are_to_be_one_message() {
    let (folder, model) = with_model(&[("chat_template.jinja", THINKING)]);
    let task = TASK.replace("test_split: test", "test_split: test\nfewshot_split: test\nnum_fewshot: 1");
    folder.write("tasks/ask.yaml", task);
    folder.write("tasks/d.jsonl", "{\"q\": \"one\", \"a\": \"1\"}\n{\"q\": \"two\", \"a\": \"2\"}\n");
    let tasks = folder.name("tasks");
    let ask = |more: &[&str]| {
        let out = Folder::new();
        let args = ["eval", &model, "--tasks", "ask", "--include-path", &tasks, "--apply-chat-template"];
        succeed(&[&args[..], &["-L", "1", "-o", &out.name("out")], more].concat());
        prompt(&out.at("out"))
    };
    // lm_eval 0.4.13 --apply_chat_template, with its default and with --fewshot_as_multiturn false.
    let turns = "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\none<|im_end|>\n\
                 <|im_start|>assistant\n";
    let one = "<|im_start|>user\ntwo 2\n\none<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(ask(&[]), turns);
    assert_eq!(ask(&["--fewshot-as-multiturn"]), turns);
    assert_eq!(ask(&["--fewshot-as-multiturn", "false"]), one);
}
