//! Tests of the documents: every command in them can be given, every link in them leads somewhere.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use clap::Parser as _;

use super::Cli;
use crate::quantize::Recipe;
use crate::recover::stage::Stage;

/// Every Markdown file of the project, with its text.
fn documents() -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::from(env!("CARGO_MANIFEST_DIR"))];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() && !name.starts_with('.') && !["target", "recoup-demo"].contains(&name.as_str()) {
                folders.push(path);
            } else if name.ends_with(".md") {
                let text = std::fs::read_to_string(&path).unwrap();
                found.push((path, text));
            }
        }
    }
    found
}

/// The commands in a document's blocks of shell, continued lines joined.
fn commands(text: &str) -> Vec<String> {
    let mut commands: Vec<String> = Vec::new();
    let (mut shell, mut continued) = (false, false);
    for line in text.lines() {
        if let Some(language) = line.trim_start().strip_prefix("```") {
            shell = !shell && language == "sh";
            continued = false;
        } else if shell {
            let part = line.trim_end().trim_end_matches('\\');
            match commands.last_mut().filter(|_| continued) {
                Some(command) => command.push_str(part),
                None => commands.push(part.to_owned()),
            }
            continued = line.trim_end().ends_with('\\');
        }
    }
    commands
}

/// What recoup itself is given in a command, up to where the shell ends it.
fn arguments(command: &str) -> Option<Vec<String>> {
    let words = shlex::split(command)?;
    let recoup = |w: &String| w == "recoup" || w.ends_with("/recoup");
    let start = match words.first()?.as_str() {
        "cargo" if words.get(1).is_some_and(|w| w == "run") => words.iter().position(|w| w == "--")?,
        _ => words.iter().position(|w| !w.contains('=')).filter(|i| recoup(&words[*i]))?,
    };
    let ends = |w: &String| ["|", ">", "2>", "&&", ";"].contains(&w.as_str());
    Some(words[start + 1..].iter().take_while(|w| !ends(w)).cloned().collect())
}

/// What follows an option, each time it is given.
fn values<'a>(words: &'a [String], option: &'a str) -> impl Iterator<Item = &'a str> {
    words.windows(2).filter(move |pair| pair[0] == option).map(|pair| pair[1].as_str())
}

#[test]
fn every_command_in_the_documents_can_be_given() {
    let mut seen = BTreeSet::new();
    for (path, text) in documents() {
        for command in commands(&text) {
            let Some(words) = arguments(&command) else { continue };
            let at = format!("{}: {command}", path.display());
            if let Err(e) = Cli::try_parse_from(std::iter::once("recoup").chain(words.iter().map(String::as_str)))
                && e.exit_code() != 0
            {
                panic!("{at}\n{e}");
            }
            for recipe in values(&words, "--recipe").filter(|r| !r.ends_with(".json")) {
                assert!(Recipe::find(recipe).is_ok(), "{at}: no recipe {recipe}");
            }
            for method in values(&words, "--method") {
                Stage::parse(method, 0).unwrap_or_else(|e| panic!("{at}: {e}"));
            }
            seen.extend(words.into_iter().next());
        }
    }
    for verb in ["demo", "quantize", "recover", "eval", "compare", "inspect", "run", "convert", "logits", "doctor"] {
        assert!(seen.contains(verb), "no document shows `recoup {verb}`; does the test still read them?");
    }
}

#[test]
fn every_setting_of_a_method_in_the_documents_is_one() {
    let mut seen = 0;
    for (path, text) in documents() {
        // Between backticks is every second piece; what is fenced stays out.
        let prose = text.split("```").step_by(2).collect::<Vec<_>>().join(" ");
        for method in prose.split('`').skip(1).step_by(2) {
            if ["qad:", "qat:", "block:"].iter().any(|name| method.starts_with(name)) {
                Stage::parse(method, 0).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
                seen += 1;
            }
        }
    }
    assert!(seen > 0, "no method with settings was found; does the test still read the documents?");
}

/// The Rust files below a folder, from there.
fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn every_source_file_that_the_map_names_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for folder in ["src", "eval", "ground", "ifeval", "jinja", "tests", "benches", "fuzz/src"] {
        sources(&root.join(folder), &mut files);
    }
    let mut seen = 0;
    let names = |(path, _): &(PathBuf, String)| {
        let of_root = ["ARCHITECTURE.md", "CONTRIBUTING.md", "README.md"].iter().any(|name| *path == root.join(name));
        of_root || path.starts_with(root.join("docs"))
    };
    for (path, text) in documents().into_iter().filter(names) {
        let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || "_/.".contains(c)));
        for name in words.filter(|w| w.ends_with(".rs") && w.len() > 3 && !w.contains("VERB")) {
            assert!(files.iter().any(|f| f.ends_with(name)), "{}: there is no {name}", path.display());
            seen += 1;
        }
    }
    assert!(seen > 20, "only {seen} files are named; does the test still read the documents?");
}

/// The text without what stands between backticks.
fn without_code(text: &str) -> String {
    let mut fenced = false;
    let prose: Vec<&str> = text
        .lines()
        .filter(|line| {
            let fence = line.trim_start().starts_with("```");
            fenced ^= fence;
            !fence && !fenced
        })
        .collect();
    prose.join("\n").split('`').step_by(2).collect::<Vec<_>>().join("``")
}

/// Names that a document's headings have as targets of links, as GitHub makes them.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings = text.lines().filter(|l| l.starts_with('#')).map(|l| l.trim_start_matches('#').trim().to_lowercase());
    headings
        .map(|h| {
            let kept = h.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
            kept.map(|c| if c == ' ' { '-' } else { c }).collect()
        })
        .collect()
}

#[test]
fn every_link_within_the_documents_leads_somewhere() {
    let mut followed = 0;
    for (path, text) in documents() {
        let prose = without_code(&text);
        let markdown = prose.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        let html = prose.split("src=\"").skip(1).filter_map(|rest| rest.split('"').next());
        for link in markdown.chain(html).filter(|l| !l.contains("://")) {
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { path.clone() } else { path.parent().unwrap_or(Path::new("")).join(file) };
            assert!(target.exists(), "{}: the link {link} leads nowhere", path.display());
            if !anchor.is_empty() {
                let there = std::fs::read_to_string(&target).unwrap();
                assert!(anchors(&there).contains(anchor), "{}: {link}: no such heading", path.display());
            }
            followed += 1;
        }
    }
    assert!(followed > 10, "only {followed} links were found; does the test still read them?");
}
