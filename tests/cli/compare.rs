//! `recoup compare` as its users run it.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::eval::damage_the_middle_of_weights;
use crate::support::command::{BF16, Folder, NVFP4, copy_model, fail, files, recoup, run, said, shown_json, succeed};
use crate::support::{json, project};

#[test]
fn a_comparison_reports_gates_and_repeats_itself() {
    let folder = Folder::new();
    let models = ["compare", BF16, NVFP4, "--no-speed", "--text", "books"];
    let on = ["--tasks", "books_cloze,piqa", "--limit", "20", "--window", "64", "--windows", "6"];
    let go = |out: &str, more: &[&str]| run(&[&models[..], &on, &["-o", &folder.name(out)], more].concat());
    let attribute = ["--json", "--attribute", "--attribute-windows", "2"];
    let first = go("report", &attribute);
    assert!(first.status.success(), "{}", said(&first));
    let comparison: Value = serde_json::from_slice(&first.stdout).unwrap();
    assert!(comparison["divergences"][0]["kl"]["value"].as_f64().is_some_and(|kl| kl > 1e-4), "{comparison:#}");
    assert!(!comparison["attributions"][0]["parts"].as_array().unwrap().is_empty());
    let html = folder.read("report/report.html");
    assert!(html.contains("<svg") && !html.contains("<script src") && !html.contains("https://"), "not self-contained");
    // Again from what is kept, and afresh.
    let (again, fresh) = (go("report", &attribute), go("fresh", &attribute));
    assert!(first.stdout == again.stdout && first.stdout == fresh.stdout);
    // The gate.
    assert_eq!(go("report", &["--require-recovery", "5"]).status.code(), Some(3));
    assert_eq!(go("report", &["--require-recovery", "0.01"]).status.code(), Some(0));
    // Windows longer than the models can see.
    let long = ["--tasks", "none", "--window", "4096", "--windows", "2", "-o", &folder.name("long")];
    let (_, said) = succeed(&[&models[..], &long].concat());
    let note = "Windows of 256 tokens instead of 4096";
    assert!(said.contains(note) && folder.read("long/report.html").contains(note), "{said}");
}

#[test]
fn a_divergence_is_computed_anew_when_the_middle_of_a_weight_changes() {
    let folder = Folder::new();
    let model = folder.model("model", BF16);
    let kl = |out: &str| -> f64 {
        let args = ["compare", BF16, &model, "--tasks", "none", "--text", "books", "--windows", "2"];
        let found = shown_json(&[&args[..], &["--no-speed", "--json", "-o", &folder.name(out)]].concat());
        found["divergences"][0]["kl"]["value"].as_f64().unwrap()
    };
    assert_eq!(kl("kept"), 0.0);
    damage_the_middle_of_weights(Path::new(&model));
    let changed = kl("kept");
    assert!(changed > 0.1, "{changed}");
    assert_eq!(changed, kl("fresh"));
}

/// A copy of the shipped model with rows behind the tokenizer's last token, as vocabularies are padded for the
/// hardware.
fn padded_copy(to: &Path, rows: usize) {
    copy_model(BF16, to);
    let config = to.join("config.json");
    let mut value = json(&config);
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
}

#[test]
fn a_vocabulary_that_is_only_padded_is_compared_with_a_note() {
    let folder = Folder::new();
    padded_copy(&folder.at("padded"), 64);
    let (padded, out) = (folder.name("padded"), folder.name("out"));
    for models in [[BF16, &padded], [&padded, BF16]] {
        let args =
            ["compare", models[0], models[1], "--tasks", "none", "--text", "books", "--windows", "2", "--no-speed"];
        let found = run(&[&args[..], &["--json", "-o", &out]].concat());
        let stderr = said(&found);
        assert!(found.status.success() && stderr.contains("one is padded"), "{stderr}");
        let comparison: Value = serde_json::from_slice(&found.stdout).unwrap();
        // The same model but for rows that no token has.
        assert_eq!(comparison["divergences"][0]["kl"]["value"], 0.0);
    }
}

#[test]
fn what_a_comparison_lacks_is_said_before_it_begins() {
    let folder = Folder::new();
    let short = folder.write("short.txt", "Too short for two windows.");
    let base = ["compare", BF16, NVFP4, "--no-speed", "-o", &folder.name("out")];
    for (more, part) in [
        (&["--tasks", "piqa", "-L", "1", "--text", "none"][..], "1 document to compare on"),
        (&["--tasks", "none", "--text", "books", "--windows", "1"], "two windows"),
        (&["--tasks", "none", "--text", "books", "--require-recovery", "0.9"], "--tasks names none"),
        (&["--tasks", "piqa", "--text", &short], "do not fill two windows"),
        (&["--tasks", "piqa", "--text", "none", "--confidence", "1"], "--confidence 1"),
    ] {
        let said = fail(&[&base[..], more].concat());
        assert!(said.contains(part), "{more:?}: {said}");
        assert!(!folder.at("out/books-bf16/responses.jsonl").exists(), "{more:?}");
    }
}

#[test]
fn identical_models_are_said_to_be_so() {
    let folder = Folder::new();
    let copy = folder.model("copy", BF16);
    let args = ["compare", BF16, &copy, "--tasks", "piqa,lambada_openai", "-L", "20", "--text", "books"];
    let (shown, _) = succeed(&[&args[..], &["--windows", "2", "--no-speed", "-o", &folder.name("out")]].concat());
    let said = shown.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(said.contains("both score the same on every document"), "{said}");
    assert!(said.contains("Mean KLD: 0.000000 ± 0.000000") && !said.contains("NaN"), "{said}");
}

/// Two files of one name are two texts, and records are the texts that they hold.
#[test]
fn texts_of_one_name_are_told_apart_and_records_are_read_as_what_they_say() {
    let folder = Folder::new();
    let prose = std::fs::read_to_string(project().join("src/corpus/calibration.txt")).unwrap();
    let text = &prose[..8000];
    let digits: String = (0..3000).map(|i| format!("{} ", i * i)).collect();
    let prose = folder.write("prose/test.txt", text);
    let texts = [
        prose.clone(),
        folder.write("digits/test.txt", &digits),
        folder.write("same.txt", serde_json::json!([{"text": text, "url": "x"}]).to_string()),
        folder.write("wikitext.txt", &digits),
    ]
    .join(",");
    let base = ["compare", BF16, NVFP4, "--tasks", "none", "--windows", "2", "--no-speed"];
    let comparison = shown_json(&[&base[..], &["--json", "-o", &folder.name("out"), "--text", &texts]].concat());
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
    let kept = files(&folder.at("out/books-nvfp4"));
    assert_eq!(kept.keys().filter(|k| k.starts_with("divergence_")).count(), 4, "{:?}", kept.keys());

    let ids = folder.write("ids.json", "[[1, 2], [3]]");
    let chat = folder.write("chat.jsonl", "{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}]}");
    for (texts, expected) in [
        (format!("{prose},{prose}"), "are the same file; give it once"),
        ("books,books".into(), "--text books: given twice"),
        ("none,books".into(), "`none` stands alone"),
        (ids, "token ids, where a text is needed"),
        (chat, "needs a chat template"),
        (folder.name("none.txt"), "is no shipped text (wikitext, books)"),
    ] {
        let error = fail(&[&base[..], &["-o", &folder.name("other"), "--text", &texts]].concat());
        assert!(error.contains(expected), "{texts}: {error}");
    }
}

/// Everything that a comparison keeps, but for what names its command line.
fn found(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap().map(|e| e.unwrap()) {
        let name = entry.file_name().into_string().unwrap();
        if entry.path().is_dir() {
            all.extend(files(&entry.path()).into_iter().map(|(file, bytes)| (format!("{name}/{file}"), bytes)));
        } else if name == "comparison.json" {
            all.insert(name, std::fs::read(entry.path()).unwrap());
        }
    }
    all
}

fn go<'a>(base: &[&'a str], more: &[&'a str]) -> Vec<&'a str> {
    [base, more].concat()
}

#[test]
fn shares_of_a_comparison_are_merged_to_the_bytes_of_one_run() {
    let folder = Folder::new();
    let base = ["compare", BF16, NVFP4, "--no-speed", "--text", "books", "--window", "64", "--windows", "5"];
    let on = ["--tasks", "books_cloze", "--limit", "8", "--attribute", "restore", "--attribute-windows", "2"];
    let base = [&base[..], &on].concat();
    let (one, parts, merged) = (folder.name("one"), folder.name("parts"), folder.name("merged"));
    let (tables, _) = succeed(&go(&base, &["-o", &one]));
    // As MPI begins them; the one that was lost by its number.
    for rank in ["2", "0"] {
        let mut part = recoup(&go(&base, &["--shard", "auto", "-o", &parts]));
        let out = part.env("OMPI_COMM_WORLD_RANK", rank).env("OMPI_COMM_WORLD_SIZE", "3").output().unwrap();
        assert!(out.status.success() && said(&out).contains(&format!("shard {rank}/3 is complete")), "{}", said(&out));
    }
    let merge = ["--merge", &parts, "-o", &merged];
    assert!(fail(&go(&base, &merge)).contains("of 3 parts these are missing: 1;"));
    succeed(&go(&base, &["--shard", "1/3", "-o", &folder.name("parts/shard-1-of-3")]));
    let (again, _) = succeed(&go(&base, &merge));
    assert_eq!(again, tables);
    let (expected, all) = (found(&folder.at("one")), found(&folder.at("merged")));
    assert_eq!(all.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    assert!(all.iter().all(|(name, bytes)| expected[name] == *bytes) && all.len() > 6, "{:?}", all.keys());
    // The gate is about the whole; so is the data.
    assert_eq!(run(&go(&base, &[&merge[..], &["--require-recovery", "5"]].concat())).status.code(), Some(3));
    for whole in [&["--json"][..], &["--require-recovery", "0.5"]] {
        let refused = fail(&go(&base, &[&["--shard", "0/3", "-o", &folder.name("x")], whole].concat()));
        assert!(refused.contains("give them with --merge"), "{refused}");
    }
    // What the parts were not made with.
    for (other, key) in [(&["--windows", "4"][..], "windows"), (&["--limit", "7"], "tasks")] {
        let mut args = go(&base, &["--merge", &parts, "-o"]);
        let at = args.iter().position(|a| *a == other[0]).unwrap();
        args[at + 1] = other[1];
        let place = folder.name(key);
        args.push(&place);
        let refused = fail(&args);
        assert!(refused.contains(&format!("`{key}")), "{refused}");
    }
    assert!(fail(&go(&base, &[&merge[..], &["--kv-cache-dtype", "bf16"]].concat())).contains("leave the option out"));
}
