//! `recoup recover` as its users run it: the same bytes every time, killed and resumed, and what happens on bad input.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::support::command::{
    BF16 as TEACHER, Folder, NVFP4 as STUDENT, assert_same_files, fail, files, recoup, run, said, succeed,
};
use crate::support::{json_lines, project};

#[cfg(unix)]
use crate::support::held::Held;

pub const TEXT: &str = "src/corpus/calibration.txt";

/// A copy of the shipped student with a chat template.
fn chatting(folder: &Folder, template: &str) -> String {
    let student = folder.model("chatting", STUDENT);
    folder.write("chatting/chat_template.jinja", template);
    student
}

fn record(folder: &Folder, name: &str) -> Value {
    folder.json(format!("{name}/recoup_recovery.json"))
}

const COMMON: [&str; 12] = [
    "--teacher",
    TEACHER,
    "--data",
    TEXT,
    "--samples",
    "24",
    "--length",
    "64",
    "--watch-samples",
    "2",
    "--threads",
    "2",
];

fn arguments<'a>(student: &[&'a str], out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    ["recover"].iter().chain(student).chain(&COMMON).chain(&["-o", out]).chain(more).copied().collect()
}

#[test]
fn a_recovered_model_is_better_and_says_how_it_came_to_be() {
    let folder = Folder::new();
    let out = folder.name("out");
    let (_, stderr) = succeed(&arguments(
        &[STUDENT],
        &out,
        &[
            "--method",
            "block:steps=24",
            "--method",
            "qad:steps=10,lr=3e-5,hidden=10",
            "--evaluate-every",
            "5",
            "--keep-stages",
        ],
    ));
    assert!(stderr.contains("masters from the teacher's weights"), "{stderr}");
    assert!(!Path::new(&format!("{out}.training")).exists());
    let record: Value = folder.json("out/recoup_recovery.json");
    let kl = |when: &str, text: &str| record["watched_loss"][when][text].as_f64().unwrap();
    let mean = |when| (kl(when, "data, held out") + kl(when, "built-in text")) / 2.0;
    assert!(mean("after") < 0.95 * mean("before"), "{record:#}");
    assert_eq!(record["methods"][0]["settings"]["steps"], 24);
    assert_eq!(record["methods"][1]["method"], "qad");
    assert_eq!(record["data"]["sha256"].as_str().unwrap().len(), 64);
    let events = json_lines(&folder.at("out/recoup_curve.jsonl"));
    let count = |name: &str| events.iter().filter(|e| e["event"] == name).count();
    assert_eq!((count("block"), count("step"), count("watched"), count("kept")), (12, 10, 5, 2));
    let steps = || events.iter().filter(|e| e["event"] == "step");
    for what in ["learning_rate", "hidden"] {
        assert!(steps().all(|e| e[what].as_f64().unwrap() > 0.0), "{what}");
    }
    // What the first method gave is there as well, and is another model.
    let weights = |f: &str| std::fs::read(folder.at(f).join("model.safetensors")).unwrap();
    assert!(weights("out-1-block") != weights("out"));
    assert!(!folder.at("out-2-qad").exists());
    // It is a checkpoint like the student: packed, inspected, run.
    succeed(&["inspect", &out]);
    let size = |f: &Path| std::fs::metadata(f.join("model.safetensors")).unwrap().len() as f64;
    assert!((size(&folder.at("out")) / size(&project().join(STUDENT)) - 1.0).abs() < 0.01);
}

#[cfg(unix)]
#[test]
fn runs_give_the_same_bytes_whatever_the_threads_and_after_being_killed_anywhere() {
    let folder = Folder::new();
    let (first, second, third) = (folder.name("first"), folder.name("second"), folder.name("third"));
    let more = [
        "--method",
        "block:steps=6,rounding=true",
        "--method",
        "qad:steps=16,lr=1e-5,average=0.8,scales=true,dual=true,scale_lr=0.01,norms=true",
        "--evaluate-every",
        "4",
        "--save-every",
        "0",
    ];
    let student = ["--recipe", "nvfp4_smooth"];
    succeed(&arguments(&student, &first, &more));
    let mut one = arguments(&student, &second, &more);
    let threads = one.iter().position(|a| *a == "--threads").unwrap();
    one[threads + 1] = "1";
    succeed(&one);
    assert_same_files(&folder.at("first"), &folder.at("second"));
    let resume: Vec<&str> = more.iter().chain(&["--resume"]).copied().collect();
    let arguments = arguments(&student, &third, &resume);
    // Killed among the blocks, and again among the steps.
    for events in [6, 18] {
        Held::killed_at(recoup(&arguments), &folder.at("third.training/curve.jsonl"), events);
        assert!(!folder.at("third").exists());
    }
    // What was done before is not told as work of now, whose speed it would belie.
    let resumed = recoup(&arguments).env("RECOUP_LOG_SECONDS", "0").output().unwrap();
    let told = said(&resumed);
    assert!(resumed.status.success() && told.contains("qad: 16/16 after"), "{told}");
    assert!(!told.contains("qad: 1/16 after"), "{told}");
    assert_same_files(&folder.at("first"), &folder.at("third"));
    assert!(!folder.at("third.training").exists());
}

/// Powers of two have no neighbours near enough to be learned.
#[test]
fn scales_that_cannot_be_learned_are_refused_before_training() {
    let folder = Folder::new();
    let out = folder.name("out");
    let fp8 = folder.name("fp8");
    succeed(&["quantize", TEACHER, "--recipe", "fp8", "-o", &fp8]);
    let go = |student: &[&str], method: &str| {
        let refused = fail(&arguments(student, &out, &["--method", method]));
        assert!(refused.contains("has none; leave it out"), "{refused}");
        assert!(!folder.at("out").exists() && !folder.at("out.training").exists());
    };
    go(&["--recipe", "mxfp4"], "qad:steps=2,scales=true");
    go(&[&fp8], "block:steps=2,scales=true");
}

/// What is to be learned and is not is told; each has a rate of its own, and what changed is counted as the files have it.
#[test]
fn what_changed_is_counted_and_scales_that_moved_nowhere_are_told() {
    let folder = Folder::new();
    let train = |name: &str, method: &str| {
        let out = folder.name(name);
        let method = format!("qad:steps=2,warmup=0,{method}");
        let mut all = arguments(&[STUDENT], &out, &["--method", &method]);
        let watched = all.iter().position(|a| *a == "--watch-samples").unwrap();
        // Nothing is watched: the last weights are kept, whatever they are worth.
        all[watched + 1] = "0";
        (succeed(&all).1, record(&folder, name)["changed"].clone())
    };
    let tensors = |path: &Path| -> BTreeMap<String, Vec<u8>> {
        let bytes = std::fs::read(path.join("model.safetensors")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        tensors.tensors().into_iter().map(|(name, view)| (name, view.data().to_vec())).collect()
    };
    let before = tensors(&project().join(STUDENT));
    let others = |name: &str, suffix: &str| -> usize {
        let after = tensors(&folder.at(name));
        let of = |(name, bytes): (&String, &Vec<u8>)| bytes.iter().zip(&after[name]).filter(|(a, b)| a != b).count();
        before.iter().filter(|(n, _)| n.ends_with(suffix)).map(of).sum()
    };
    let (said, changed) = train("still", "scales=true,lr=1e-5");
    assert!(said.contains("warning: no block scale reached another code"), "{said}");
    assert_eq!(changed["scales"]["changed"], 0);
    for (name, dual) in [("tied", false), ("dual", true)] {
        let (said, changed) = train(name, &format!("scales=true,scale_lr=0.05,weights=false,dual={dual}"));
        assert!(!said.contains("warning: no block scale"), "{said}");
        let moved = changed["scales"]["changed"].as_u64().unwrap() as usize;
        assert!(moved > 0 && moved == others(name, ".weight_scale"), "{name}: {changed}");
        // Codes are made by the scales that they are divided by.
        assert_eq!(changed["codes"]["changed"] == 0, dual, "{name}: {changed}");
        assert_eq!(others(name, "embed_tokens.weight") + others(name, "norm.weight"), 0, "{name}");
    }
    let (_, changed) = train("ends", "lr=1e-6,norms=true,norm_lr=0.01");
    assert_eq!(changed["scales"], json!({"changed": 0, "all": 0}));
    assert!(others("ends", "embed_tokens.weight") == 0 && others("ends", "norm.weight") > 100);
}

#[cfg(unix)]
#[test]
fn an_interrupted_run_is_neither_overwritten_nor_mixed_with_another() {
    let folder = Folder::new();
    let out = folder.name("out");
    let command = |samples: &str, more: &[&str]| {
        let mut all = arguments(&[STUDENT], &out, &["--method", "qad:steps=400", "--save-every", "0"]);
        all.extend(more);
        let at = all.iter().position(|a| *a == "--samples").unwrap();
        all[at + 1] = samples;
        recoup(&all)
    };
    let mut run = Held::start(command("24", &[]));
    run.until(|| folder.at("out.training/state.safetensors").exists());
    run.kill();
    let again = command("24", &[]).output().unwrap();
    let text = said(&again);
    assert!(!again.status.success() && text.contains("out.training") && text.contains("--resume"), "{text}");
    let other = command("20", &["--resume"]).output().unwrap();
    let text = said(&other);
    assert!(!other.status.success() && text.contains("data.") && text.contains("another run"), "{text}");
}

#[test]
fn bad_input_is_named_and_nothing_is_left() {
    let folder = Folder::new();
    let out = folder.name("out");
    let try_with = |args: &[&str]| {
        let error = fail(args);
        assert!(!Path::new(&out).exists() && !Path::new(&format!("{out}.training")).exists(), "{args:?}: {error}");
        error
    };
    let method = ["--method", "qad:steps=2"];
    let fixture = "tests/fixtures/modelopt/llama/bf16";
    let mut args = arguments(&[STUDENT], &out, &method);
    args[3] = fixture;
    let error = try_with(&args);
    assert!(error.contains("the vocabulary is 4096") && error.contains("384"), "{error}");
    let error = try_with(&arguments(&[TEACHER], &out, &method));
    assert!(error.contains("books-bf16") && error.contains("quantize it first"), "{error}");
    let short = folder.write("short.txt", "A few words.");
    let mut args = arguments(&[STUDENT], &out, &method);
    args[5] = &short;
    let error = try_with(&args);
    assert!(error.contains("short.txt") && error.contains("one sequence of 64"), "{error}");
    for (name, text, part) in [
        ("empty.txt", "", "empty"),
        ("bad.jsonl", "{\"text\": \"x\"}\n{\"text\": 3}\n", "line 2"),
        ("worse.jsonl", "{\"text\"", "line 1"),
        ("chat.jsonl", "{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}]}", "chat template"),
        ("missing/none.txt", "", "none.txt"),
    ] {
        let file = if name.contains('/') { folder.name(name) } else { folder.write(name, text) };
        let mut args = arguments(&[STUDENT], &out, &method);
        args[5] = &file;
        let error = try_with(&args);
        assert!(error.contains(part), "{name}: {error}");
    }
    assert!(try_with(&arguments(&[STUDENT], &out, &["--method", "magic"])).contains("block, qad and qat"));
    let mut args = arguments(&[STUDENT], &out, &method);
    args[9] = "1000000";
    assert!(try_with(&args).contains("positions"));
    assert!(try_with(&arguments(&["--recipe", "nothing"], &out, &method)).contains("nothing"));
}

/// Numbers that leave their range end the run with the best weights until then, and say where.
#[test]
fn a_run_that_diverges_keeps_the_last_good_weights() {
    let folder = Folder::new();
    let out = folder.name("out");
    // Logits beyond what a norm of f32 can hold: the loss is no number from the first step that uses them on.
    let error = fail(&arguments(&[STUDENT], &out, &["--method", "qad:steps=5,lr=1e-4,temperature=1e-44"]));
    assert!(error.contains("ended early") && error.contains("step 1"), "{error}");
    let record: Value = folder.json("out/recoup_recovery.json");
    assert!(record["stopped"].as_str().unwrap().contains("step 1"), "{record:#}");
    succeed(&["inspect", &out]);
}

/// A full disk is an error that names the file; what was trained until the last save is still there.
#[test]
#[cfg(unix)]
fn a_full_disk_is_told_and_the_run_can_go_on() {
    let folder = Folder::new();
    let (out, reference) = (folder.name("out"), folder.name("reference"));
    let method = ["--method", "qad:steps=4", "--save-every", "0", "--resume"];
    let args = arguments(&[STUDENT], &out, &method);
    // Files of at most 8 MB (in blocks of 512 bytes): masters fit, masters with moments do not.
    let shell = format!("trap '' XFSZ; ulimit -f 16000; exec {} {}", env!("CARGO_BIN_EXE_recoup"), args.join(" "));
    let limited = Command::new("sh").args(["-c", &shell]).current_dir(project()).output().unwrap();
    let error = said(&limited);
    assert_eq!(limited.status.code(), Some(1), "{error}");
    assert!(error.contains("out.training") && error.contains("write"), "{error}");
    assert!(!Path::new(&out).exists());
    succeed(&args);
    succeed(&arguments(&[STUDENT], &reference, &method));
    assert_same_files(&folder.at("out"), &folder.at("reference"));
}

/// Conversations by the template, of which only the assistant's words are learned; data without text of its own.
#[test]
fn conversations_and_documents_are_trained_on() {
    let folder = Folder::new();
    let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}";
    let student = chatting(&folder, template);
    let turn = |role: &str, content: String| serde_json::json!({"role": role, "content": content});
    let chat = |i: usize| {
        let messages = [
            turn("user", format!("What is {i}?")),
            turn("assistant", format!("It is the number {i}, as everybody knows.")),
        ];
        serde_json::json!({"messages": messages}).to_string()
    };
    let chats = folder.write("chats.jsonl", (0..40).map(chat).collect::<Vec<_>>().join("\n"));
    let document = |i: usize| {
        serde_json::json!({"text": format!("Chapter {i}. It was a dark night, and the road was long. ").repeat(i % 7 + 1)}).to_string()
    };
    let documents = folder.write("documents.jsonl", (0..60).map(document).collect::<Vec<_>>().join("\n"));
    let mut losses = Vec::new();
    for (name, more) in [("all", &[][..]), ("assistant", &["--assistant-only"])] {
        let out = folder.name(name);
        let mut args = arguments(&[&student], &out, &["--method", "qat:steps=3,lr=1e-5", "--data"]);
        args[5] = &chats;
        let weighted = format!("{documents}=0.5");
        args.push(&weighted);
        args.extend(more);
        let (_, stderr) = succeed(&args);
        assert!(
            stderr.contains("chats.jsonl: 16 sequences") && stderr.contains("documents.jsonl: 8 sequences"),
            "{stderr}"
        );
        let curve = json_lines(&folder.at(name).join("recoup_curve.jsonl"));
        let step = curve.iter().find(|e| e["event"] == "step").unwrap();
        losses.push(step["cross_entropy"].as_f64().unwrap());
        // Without a teacher in the loss, the text is what it is judged by.
        assert_eq!(record(&folder, name)["watched_loss"]["measure"], "cross_entropy");
    }
    assert!((losses[0] - losses[1]).abs() > 1e-3, "{losses:?}");
}

/// Text that the teacher writes: the same for the same seed, and enough to recover by.
#[test]
fn the_teacher_writes_its_own_data() {
    let folder = Folder::new();
    let recover = |name: &str, seed: &str| {
        let out = folder.name(name);
        let mut args = arguments(&[STUDENT], &out, &["--method", "block:steps=8", "--seed", seed]);
        args[5] = "teacher";
        let (_, stderr) = succeed(&args);
        assert!(stderr.contains("teacher: 24 sequences, 1536 tokens"), "{stderr}");
        (files(&folder.at(name)), record(&folder, name))
    };
    let (first, record) = recover("first", "1");
    assert_eq!(first, recover("second", "1").0);
    let other = recover("third", "2").1;
    assert_ne!(record["data"]["sha256"], other["data"]["sha256"]);
    let out = folder.name("chat");
    let mut args = arguments(&[STUDENT], &out, &["--method", "block:steps=8"]);
    args[5] = "teacher-chat";
    assert!(fail(&args).contains("no chat template"));
}

#[test]
fn options_of_recover_are_used_refused_or_named() {
    let folder = Folder::new();
    let out = folder.name("out");
    let with = |more: &[&'static str]| {
        let _ = std::fs::remove_dir_all(folder.at("out"));
        arguments(&[STUDENT], &out, &[&["--method", "block:steps=8"], more].concat())
    };
    let say = |more: &[&'static str]| succeed(&with(more)).1;
    let named = say(&["--patience", "2", "--keep-stages", "--assistant-only"]);
    for option in
        ["--patience is without effect", "--keep-stages is without effect", "--assistant-only is without effect"]
    {
        assert!(named.contains(option), "{option}: {named}");
    }
    assert!(!say(&[]).contains("without effect"));
    for more in [["--patience", "0"], ["--evaluate-every", "0"]] {
        assert_eq!(run(&with(&more)).status.code(), Some(2), "{more:?}");
    }
    let mut args = with(&["--patience", "1"]);
    let at = args.iter().position(|a| *a == "--watch-samples").unwrap();
    args[at + 1] = "0";
    assert!(fail(&args).contains("nothing is watched"));
}

#[test]
fn conversations_that_the_teacher_writes_begin_as_its_template_does_with_its_arguments() {
    let folder = Folder::new();
    let template = "{% if not think %}Be brief. {% endif %}user: {{ messages[0].content }}\n{% if late %}x{% endif %}";
    let teacher = chatting(&folder, template);
    let recovered = |name: &str, more: &[&str]| {
        let out = folder.name(name);
        let mut args = arguments(&[STUDENT], &out, &[&["--method", "block:steps=8"], more].concat());
        (args[3], args[5]) = (&teacher, "teacher-chat");
        let (_, said) = succeed(&args);
        (said, record(&folder, name)["data"]["sha256"].clone())
    };
    let (said, plain) = recovered("plain", &["--assistant-only"]);
    assert!(
        said.contains("--assistant-only is not for what the teacher writes itself")
            || said.contains("--assistant-only is without effect"),
        "{said}"
    );
    let (said, thinking) = recovered("thinking", &["--chat-template-kwargs", r#"{"think": true}"#]);
    assert!(!said.contains("--chat-template-kwargs changes nothing"), "{said}");
    assert_ne!(plain, thinking);
    let (said, late) = recovered("late", &["--chat-template-kwargs", r#"{"late": true}"#]);
    assert!(said.contains("--chat-template-kwargs changes nothing"), "{said}");
    assert_eq!(plain, late);
}

/// With tools, as many templates write them.
const TEMPLATE: &str = "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}\n\
                        {% endfor %}{% if add_generation_prompt %}assistant: {% endif %}";

fn turns(user: &str, assistant: &str) -> Value {
    serde_json::json!([{"role": "user", "content": user}, {"role": "assistant", "content": assistant}])
}

/// What is trained on is what the file means, whatever it is called and however it is written.
#[test]
fn conversations_are_the_same_data_in_every_kind_of_file() {
    let folder = Folder::new();
    let student = chatting(&folder, TEMPLATE);
    let rows: Vec<Value> =
        (0..24).map(|i| turns(&format!("What is {i}?"), &format!("It is {i}, as all know."))).collect();
    let each = |make: &dyn Fn(&Value) -> Value| rows.iter().map(make).collect::<Vec<_>>();
    let messages = each(&|t| serde_json::json!({"messages": t}));
    let sharegpt = each(&|t| {
        let turn = |i: usize, from: &str| serde_json::json!({"from": from, "value": t[i]["content"]});
        serde_json::json!({"conversations": [turn(0, "human"), turn(1, "gpt")]})
    });
    let lines = |rows: &[Value], end: &str| rows.iter().map(|r| format!("{r}{end}")).collect::<String>();
    let csv: String = rows.iter().map(|r| format!("\"{}\"\n", r.to_string().replace('"', "\"\""))).collect();
    let mut hashes = Vec::new();
    for (i, (name, content)) in [
        ("a.jsonl", lines(&messages, "\n")),
        ("b.json", Value::from(messages.clone()).to_string()),
        ("c.ndjson", format!("\u{feff}{}", lines(&messages, "\r\n"))),
        ("d.txt", lines(&sharegpt, "\n")),
        ("e.csv", format!("messages\n{csv}")),
    ]
    .into_iter()
    .enumerate()
    {
        let (file, out) = (folder.write(name, &content), folder.name(format!("out{i}")));
        let mut args = arguments(&[&student], &out, &["--method", "qat:steps=1"]);
        args[5] = &file;
        succeed(&args);
        let record = record(&folder, &format!("out{i}"));
        assert_eq!(record["data"]["sources"][0]["read"]["conversations"], 24, "{name}: {record:#}");
        hashes.push(record["data"]["sha256"].clone());
    }
    assert!(hashes.iter().all(|h| *h == hashes[0]), "{hashes:?}");
}

#[test]
fn conversations_that_are_cut_and_fields_that_are_not_used_are_told_and_counted() {
    let folder = Folder::new();
    let student = chatting(&folder, TEMPLATE);
    let long = "a long question of many words, ".repeat(20);
    let line = |i: usize| {
        let mut row =
            serde_json::json!({"messages": turns(if i.is_multiple_of(4) { &long } else { "Who?" }, "Nobody at all.")});
        row["source"] = "web".into();
        if i.is_multiple_of(2) {
            row["images"] = serde_json::json!(["a.png"]);
        }
        row.to_string()
    };
    let file = folder.write("chats.jsonl", (0..16).map(line).collect::<Vec<_>>().join("\n"));
    let out = folder.name("out");
    let mut args = arguments(&[&student], &out, &["--method", "qat:steps=1", "--assistant-only"]);
    args[5] = &file;
    let (_, said) = succeed(&args);
    assert!(
        said.contains("chats.jsonl: 4 of 16 conversations are longer than 64 tokens (--length) and were cut"),
        "{said}"
    );
    assert!(said.contains("4 of 16 conversations have nothing to learn from and were left out"), "{said}");
    assert!(said.contains("not used, with the number of records: images (8), source (16)"), "{said}");
    let read = &record(&folder, "out")["data"]["sources"][0]["read"];
    assert_eq!((&read["cut"], &read["nothing_to_learn"]), (&4.into(), &4.into()), "{read:#}");
    assert_eq!(read["unused_fields"], serde_json::json!({"images": 8, "source": 16}));

    // Nothing at all is left: refused before anything is computed, wherever it is given.
    let none =
        folder.write("none.jsonl", serde_json::json!({"messages": turns(&long, "Nobody.")}).to_string().repeat(3));
    let silent =
        folder.write("silent.jsonl", serde_json::json!({"messages": [{"role": "user", "content": "Hi"}]}).to_string());
    let out = folder.name("out2");
    for (at, file, expected) in [
        (5, &none, "3 of 3 conversations were cut at 64 tokens, before the assistant says anything"),
        (5, &silent, "the assistant says nothing in any of the 1 conversations"),
        (16, &none, "nothing is left to learn"),
    ] {
        let mut args = arguments(&[&student], &out, &["--method", "qat:steps=1", "--assistant-only", "--watch", TEXT]);
        args.push("--seed");
        args.push("0");
        let at = if at == 16 { args.iter().position(|a| *a == "--watch").unwrap() + 1 } else { at };
        args[at] = file;
        let error = fail(&args);
        assert!(error.contains(expected), "{error}");
        assert!(!Path::new(&out).exists() && !Path::new(&format!("{out}.training")).exists());
    }
}

#[test]
fn tools_of_a_conversation_are_written_by_the_template_or_named() {
    let folder = Folder::new();
    let student = chatting(&folder, TEMPLATE);
    let tools = serde_json::json!([{"type": "function", "function": {"name": "get_weather"}}]);
    let file = |name: &str, tools: Value| {
        let line = |i: usize| {
            let mut row = serde_json::json!({"messages": turns(&format!("What is {i}?"), "A number.")});
            if !tools.is_null() {
                row["tools"] = tools.clone();
            }
            row.to_string()
        };
        folder.write(name, (0..16).map(line).collect::<Vec<_>>().join("\n"))
    };
    let plain = file("plain.jsonl", Value::Null);
    let listed = file("listed.jsonl", tools.clone());
    let text = file("text.jsonl", tools.to_string().into());
    let run = |name: &str, file: &str| {
        let out = folder.name(name);
        let mut args = arguments(&[&student], &out, &["--method", "qat:steps=1"]);
        args[5] = file;
        let (_, said) = succeed(&args);
        (record(&folder, name)["data"]["sha256"].as_str().unwrap().to_owned(), said)
    };
    let (plain_hash, _) = run("plain", &plain);
    let (listed_hash, _) = run("listed", &listed);
    assert_ne!(plain_hash, listed_hash);
    assert_eq!(run("text", &text).0, listed_hash);
    // A template that knows nothing of tools.
    let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}";
    folder.write("chatting/chat_template.jinja", template);
    let (_, said) = run("unwritten", &listed);
    assert!(said.contains("tools, which the chat template does not write (16)"), "{said}");
}

/// Two files of one name are two texts, everywhere that a name stands for one.
#[test]
fn watched_texts_of_one_name_are_told_apart_and_one_given_twice_is_refused() {
    let folder = Folder::new();
    let text = std::fs::read_to_string(project().join(TEXT)).unwrap();
    let prose = folder.write("prose/test.txt", &text[..8000]);
    let digits = folder.write("digits/test.txt", (0..2000).map(|i| format!("{} ", i * i)).collect::<String>());
    let out = folder.name("out");
    let watch = ["--method", "qad:steps=1", "--watch", &prose, "--watch"];
    succeed(&arguments(&[STUDENT], &out, &[&watch[..], &[&digits]].concat()));
    let record = record(&folder, "out");
    let before = record["watched_loss"]["before"].as_object().unwrap();
    assert_eq!(before.keys().collect::<Vec<_>>(), ["prose/test.txt", "digits/test.txt"], "{record:#}");
    assert_ne!(before["digits/test.txt"], before["prose/test.txt"]);
    let out = folder.name("out2");
    let error = fail(&arguments(&[STUDENT], &out, &[&watch[..], &[&prose]].concat()));
    assert!(error.contains("are the same file; give it once"), "{error}");
    let error = fail(&arguments(&[STUDENT], &out, &["--method", "qad:steps=1", "--data", TEXT]));
    assert!(error.contains("given twice"), "{error}");
}
