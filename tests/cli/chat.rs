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

/// Opens the thinking in the prompt, as Qwen3.5's and Nemotron's templates do.
const OPENED: &str = "{%- for m in messages %}{{ m.content }}{% if m.reasoning_content %}[{{ m.reasoning_content }}]{% endif %}\
    {% endfor %}{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% else %}<think>\n{% endif %}\
    {# '</think>' #}";

/// The shipped model, whose ` the` ends its thinking, as a special token.
fn thinker(template: &str) -> (Folder, String) {
    let (folder, model) = with_model(&[("chat_template.jinja", template)]);
    let mut tokenizer = json(&folder.at("m/tokenizer.json"));
    let word = "Ġthe";
    let vocab = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    let id = vocab.remove(word).unwrap();
    vocab.insert("</think>".into(), id.clone());
    let merges = tokenizer["model"]["merges"].as_array_mut().unwrap();
    merges.retain(|merge| {
        let [a, b] = [0, 1].map(|i| merge[i].as_str().unwrap());
        a != word && b != word && [a, b].concat() != word
    });
    let mut added = tokenizer["added_tokens"][0].clone();
    added["id"] = id;
    added["content"] = "</think>".into();
    tokenizer["added_tokens"].as_array_mut().unwrap().push(added);
    folder.write("m/tokenizer.json", tokenizer.to_string());
    (folder, model)
}

#[test]
fn thinking_is_told_from_the_answer() {
    let (folder, model) = thinker(OPENED);
    let limited = |n: &str, more: &[&str]| {
        succeed(&[&["run", &model, "-p", "Once upon a time", "-n", n, "--temperature", "0"], more].concat())
    };
    let ask = |more: &[&str]| limited("40", more);
    let report = |more: &[&str]| -> Value { serde_json::from_str(&ask(&[&["--json"], more].concat()).0).unwrap() };
    let own = report(&[]);
    let (thinking, answer) = (own["thinking"].as_str().unwrap(), own["text"].as_str().unwrap());
    assert!(!thinking.is_empty() && !answer.is_empty() && own["thinking_finished"] == true, "{own:#}");
    // The end is in neither, though there may be more than one.
    assert!(!thinking.contains("think>"), "{thinking}");

    let (stdout, stderr) = ask(&[]);
    assert_eq!(stdout, format!("{answer}\n"));
    assert!(stderr.contains(thinking), "{stderr}");
    let (stdout, stderr) = ask(&["--hide-thinking"]);
    assert!(stdout == format!("{answer}\n") && !stderr.contains(thinking), "{stderr}");
    // Not told apart: all is the answer, and the special token is not shown.
    let whole = report(&["--reasoning-parser", "none"]);
    assert!(whole["thinking"].is_null() && whole["text"].as_str().unwrap().contains(thinking), "{whole:#}");
    // Cut short inside of it.
    let (stdout, stderr) = limited("1", &["--reasoning-parser", "nemotron_v3"]);
    assert!(stdout.trim().is_empty() && stderr.contains("inside of the thinking"), "{stderr}");
    let off = report(&["--enable-thinking", "false"]);
    assert!(off["thinking"].is_null(), "{off:#}");

    // A stop string counts in the answer only.
    let piece: String = thinking.chars().take(3).collect();
    let stopped = report(&["--stop", &piece]);
    assert_eq!(stopped["thinking"], thinking, "{piece:?}");

    // The same for tasks, whose answers are what follows the last end of thinking.
    folder.write("ask.yaml", TASK.replace("max_gen_toks: 4", "max_gen_toks: 40"));
    folder.write("d.jsonl", "{\"q\": \"Once upon a time\", \"a\": \"x\"}\n");
    let tasks = folder.name("");
    let eval = ["eval", &model, "--tasks", "ask", "--include-path", &tasks, "--apply-chat-template", "-o"];
    let of = |out: &str, more: &[&str]| {
        let stderr = succeed(&[&eval[..], &[&folder.name(out)], more].concat()).1;
        let sample = &json_lines(&folder.at(out).join("samples_ask.jsonl"))[0];
        (sample["resps"][0][0].as_str().unwrap().to_owned(), stderr)
    };
    let (with, stderr) = of("with", &[]);
    assert!(stderr.contains("--reasoning-parser qwen3 leaves it out"), "{stderr}");
    for (out, more) in [("by-name", ["--reasoning-parser", "qwen3"]), ("by-token", ["--think-end-token", "</think>"])] {
        let (without, stderr) = of(out, &more);
        assert!(!without.contains(thinking) && with.contains(thinking), "{with:?} {without:?}");
        assert!(!stderr.contains("leaves it out") && !stderr.contains("does not end"), "{stderr}");
        assert_eq!(json(&folder.at(out).join("results.json"))["config"]["think_end_token"], "</think>");
    }
    let (_, stderr) = of("short", &["--think-end-token", "</think>", "--gen-kwargs", "max_gen_toks=1"]);
    assert!(stderr.contains("in 1 answers the thinking does not end"), "{stderr}");
}

#[test]
fn what_a_template_has_no_switch_for_is_refused_and_messages_may_be_one() {
    let (_folder, model) = with_model(&[("chat_template.jinja", "{{ reasoning_effort }}{{ messages[0].content }}")]);
    let stderr = fail(&["run", &model, "-p", "a", "--enable-thinking", "false"]);
    assert!(stderr.contains("no switch") && stderr.contains("reasoning_effort"), "{stderr}");
    let template = "{% for m in messages %}{{ m.content | replace('/no_think', 'Silent') }}{% endfor %}";
    let (_folder, model) = with_model(&[("chat_template.jinja", template)]);
    let ask = |more: &[&str]| -> Value {
        let words = ["run", &model, "-p", " night", "-n", "8", "--temperature", "0", "--json"];
        serde_json::from_str(&succeed(&[&words[..], more].concat()).0).unwrap()
    };
    let switched = ask(&["--enable-thinking", "false"])["tokens"].clone();
    assert_eq!(switched, ask(&["--system", "Silent"])["tokens"]);
    assert_ne!(switched, ask(&[])["tokens"]);
}

#[test]
fn tools_reach_the_template_and_what_is_no_list_of_them_is_refused() {
    let template = "{{ tools[0].function.name if tools else 'no tool' }}{{ messages[0].content }}";
    let (folder, model) = with_model(&[("chat_template.jinja", template)]);
    folder.write("tools.json", r#"[{"type": "function", "function": {"name": "Once upon"}}]"#);
    let ask = |prompt: &str, more: &[&str]| -> Value {
        let words = ["run", &model, "-p", prompt, "-n", "8", "--temperature", "0", "--json"];
        serde_json::from_str(&succeed(&[&words[..], more].concat()).0).unwrap()
    };
    let tools = folder.name("tools.json");
    let with = ask(" a time", &["--tools", &tools])["tokens"].clone();
    assert_ne!(with, ask(" a time", &[])["tokens"]);
    for (text, part) in [("{}", "a JSON list of tools"), ("[{\"a\": 1}]", "a JSON list of tools"), ("[", "no JSON")] {
        folder.write("bad.json", text);
        let stderr = fail(&["run", &model, "-p", "a", "--tools", &folder.name("bad.json")]);
        assert!(stderr.contains("bad.json") && stderr.contains(part), "{stderr}");
    }
    let stderr = fail(&["run", &model, "--raw", "-p", "a", "--tools", &tools]);
    assert!(stderr.contains("--tools") && stderr.contains("no chat template"), "{stderr}");
}
