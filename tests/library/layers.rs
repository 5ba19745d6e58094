//! Dependencies point one way: the `use` lines say so.

use std::path::{Path, PathBuf};

use crate::support::project;

/// What each layer may use of the others.
const ALLOWED: [(&str, &[&str]); 18] = [
    ("formats", &["random"]),
    ("random", &[]),
    ("ranks", &[]),
    ("logits", &["random"]),
    ("output", &[]),
    ("checkpoint", &["formats", "output"]),
    ("backend", &["formats", "random", "ranks", "logits"]),
    ("model", &["formats", "logits", "checkpoint", "backend"]),
    ("gguf", &["formats", "checkpoint", "model"]),
    ("text", &["logits", "checkpoint"]),
    ("corpus", &["random", "text"]),
    ("engine", &["formats", "logits", "checkpoint", "backend", "model", "text"]),
    (
        "quantize",
        &["formats", "random", "logits", "output", "checkpoint", "backend", "model", "text", "corpus", "engine"],
    ),
    (
        "recover",
        &[
            "formats",
            "random",
            "ranks",
            "logits",
            "output",
            "checkpoint",
            "backend",
            "model",
            "text",
            "corpus",
            "engine",
        ],
    ),
    (
        "evaluate",
        &[
            "formats",
            "random",
            "ranks",
            "logits",
            "output",
            "checkpoint",
            "backend",
            "model",
            "text",
            "corpus",
            "engine",
        ],
    ),
    ("serve", &["logits", "backend", "text", "engine"]),
    (
        "cli",
        &[
            "formats",
            "ranks",
            "logits",
            "output",
            "checkpoint",
            "backend",
            "model",
            "text",
            "corpus",
            "quantize",
            "recover",
            "engine",
            "evaluate",
            "serve",
            "gguf",
        ],
    ),
    ("main", &["cli"]),
];

/// Crates that the library stands on.
const BELOW: [&str; 5] = ["eval", "ground", "ifeval", "jinja", "openai"];

fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn every_layer_uses_only_what_lies_below_it() {
    let src = project().join("src");
    let mut files = Vec::new();
    rust_files(&src, &mut files);
    let mut seen = 0;
    for file in files {
        let relative = file.strip_prefix(&src).unwrap();
        let layer = relative.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs");
        let Some((_, allowed)) = ALLOWED.iter().find(|(l, _)| *l == layer) else {
            assert_eq!(layer, "lib", "{} is in no known layer", relative.display());
            continue;
        };
        for line in std::fs::read_to_string(&file).unwrap().lines() {
            for (at, _) in line.match_indices("crate::") {
                let used: String = line[at + 7..].chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                if used != layer && ALLOWED.iter().any(|(l, _)| *l == used) {
                    assert!(allowed.contains(&used.as_str()), "{} uses {used}: {line}", relative.display());
                    seen += 1;
                }
            }
        }
    }
    assert!(seen > 50, "only {seen} uses between layers were found; does the test still read them?");
}

/// What runs on a device is handed in: all that knows of the CPU's kernels is behind the seam, or at the command line. Who
/// evaluates, or asks a server, is no model and trains none. What holds answers to grammars can be another.
#[test]
fn devices_evaluator_servers_and_grammars_are_named_where_they_belong() {
    const NAMED: [(&str, [&str; 2]); 4] = [
        ("CpuBackend", ["backend", "cli"]),
        ("recoup_eval", ["evaluate", "cli"]),
        ("recoup_openai", ["evaluate", "cli"]),
        ("llguidance::", ["text/grammar", "text/grammar"]),
    ];
    let src = project().join("src");
    let mut files = Vec::new();
    rust_files(&src, &mut files);
    for file in files {
        let relative = file.strip_prefix(&src).unwrap();
        let text = std::fs::read_to_string(&file).unwrap();
        let product = text.split("#[cfg(test)]").next().unwrap();
        for (name, _) in NAMED.iter().filter(|(_, layers)| !layers.iter().any(|layer| relative.starts_with(layer))) {
            assert!(!product.contains(name), "{} names {name}", relative.display());
        }
    }
}

/// What two verbs share is in a file that is no verb, or in a library.
#[test]
fn no_verb_uses_a_verb() {
    let cli = project().join("src/cli");
    let main = std::fs::read_to_string(cli.join("mod.rs")).unwrap();
    // `Verb::Eval(a) => evaluation::eval::run(&a)`
    let called = main.lines().filter(|line| line.trim_start().starts_with("Verb::"));
    let path = |line: &str| Some(line.split_once("=> ")?.1.split_once("::run(")?.0.to_owned());
    let verbs: Vec<String> = called.filter_map(path).collect();
    assert!(verbs.len() > 8, "only {verbs:?} are verbs; does the test still read them?");
    let mut files = Vec::new();
    rust_files(&cli, &mut files);
    for file in files.iter().filter(|f| **f != cli.join("mod.rs")) {
        let text = std::fs::read_to_string(file).unwrap();
        let here = file.strip_prefix(&cli).unwrap().with_extension("");
        let here = here.to_str().unwrap().replace('/', "::");
        for verb in verbs.iter().filter(|verb| **verb != here) {
            let name = verb.rsplit("::").next().unwrap();
            for line in text.lines().filter(|line| !line.trim_start().starts_with("//")) {
                let from = ["super::", "cli::", "evaluation::"].map(|above| format!("{above}{name}::"));
                assert!(!from.iter().any(|used| line.contains(used)), "{here} uses {verb}: {line}");
            }
        }
    }
}

#[test]
fn no_crate_below_knows_anything_of_recoup() {
    for below in BELOW {
        let manifest = std::fs::read_to_string(project().join(below).join("Cargo.toml")).unwrap();
        assert!(!manifest.contains("path = \"..\""), "{below}");
    }
}

/// std's printing macros panic when nobody reads, which would end the work: the talk goes through `say!` and `outln!`.
#[test]
fn nothing_prints_with_a_macro_that_panics() {
    let root = project();
    let mut files = Vec::new();
    rust_files(&root.join("src"), &mut files);
    BELOW.iter().for_each(|below| rust_files(&root.join(below).join("src"), &mut files));
    let mut seen = 0;
    for file in files.iter().filter(|f| !f.ends_with("tests.rs")) {
        let text = std::fs::read_to_string(file).unwrap();
        let product = text.split("#[cfg(test)]").next().unwrap();
        for line in product.lines().map(str::trim_start).filter(|l| !l.starts_with("//")) {
            for name in ["print!", "println!", "eprint!", "eprintln!", "dbg!"] {
                assert!(!line.contains(name), "{}: {line}", file.display());
            }
            seen += usize::from(line.contains("say!") || line.contains("outln!"));
        }
    }
    assert!(seen > 30, "only {seen} lines print; does the test still read them?");
}
