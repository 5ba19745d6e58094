//! Which files travel with a model's weights: everything from which transformers makes text, and the terms of use.

use std::fs;
use std::path::{Path, PathBuf};

/// Files by name. Source: transformers 5, the `vocab_files_names` of its tokenizers, `utils/__init__.py`'s names of
/// templates and configurations of processors; mistral-common's and tiktoken's.
const NAMES: [&str; 26] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "spm.model",
    "source.spm",
    "target.spm",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "tekken.json",
    "tiktoken.model",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    "params.json",
    "NOTICE",
];

/// Files by ending: more vocabularies and templates, and the code that `auto_map` of a configuration names.
const ENDINGS: [&str; 4] = [".tiktoken", ".jinja", ".py", ".spm"];

/// Files by beginning: the terms under which the model is given, which go with every copy of it.
const TERMS: [&str; 3] = ["LICENSE", "USE_POLICY", "Notice"];

/// Folder of the templates beside the first one.
const TEMPLATES: &str = "additional_chat_templates";

/// Files of which a changed model has its own, or that describe the model as it was.
const OWN: [&str; 5] =
    ["config.json", "hf_quant_config.json", "quantize_config.json", "quantization_config.json", "README.md"];

/// A file that is larger is no text that a tokenizer or a processor reads.
const SMALL: u64 = 4 << 20;

/// The files of `folder` that a copy of the model needs, by their path in it, in a fixed order.
#[must_use]
pub fn to_copy(folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = files(folder).into_iter().filter(|name| travels(name)).map(PathBuf::from).collect();
    let templates = folder.join(TEMPLATES);
    found
        .extend(files(&templates).iter().filter(|name| name.ends_with(".jinja")).map(|n| Path::new(TEMPLATES).join(n)));
    found.sort_unstable();
    found
}

/// Small text files of `folder` that are not copied and of which nothing is known: to be named.
#[must_use]
pub fn left_out(folder: &Path) -> Vec<String> {
    let unknown = |name: &String| {
        let text = [".json", ".txt", ".model", ".yaml", ".yml"].iter().any(|ending| name.ends_with(ending));
        let index = name.ends_with(".index.json");
        let small = fs::metadata(folder.join(name)).is_ok_and(|m| m.len() <= SMALL);
        text && small && !index && !name.starts_with('.') && !travels(name) && !is_own(name)
    };
    let mut names: Vec<String> = files(folder).into_iter().filter(unknown).collect();
    names.sort_unstable();
    names
}

/// What whoever writes a checkpoint writes anew: configurations, and Recoup's own records of how weights came to be.
fn is_own(name: &str) -> bool {
    OWN.contains(&name) || name.starts_with("recoup_")
}

fn travels(name: &str) -> bool {
    NAMES.contains(&name)
        || ENDINGS.iter().any(|ending| name.ends_with(ending))
        || TERMS.iter().any(|term| name.starts_with(term))
}

/// Names of the files right in a folder; none where it cannot be read, which the copy then says.
fn files(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter(|e| e.path().is_file()).filter_map(|e| e.file_name().into_string().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_that_makes_text_travels_and_what_is_not_known_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        fs::create_dir(path.join(TEMPLATES)).unwrap();
        for name in [
            "additional_chat_templates/tool_use.jinja",
            "additional_chat_templates/notes.txt",
            "chat_template.jinja",
            "config.json",
            "model.safetensors",
            "model.safetensors.index.json",
            "qwen.tiktoken",
            "vocab.txt",
            "LICENSE.md",
            "configuration_x.py",
            "README.md",
            "odd.json",
        ] {
            fs::write(path.join(name), "x").unwrap();
        }
        let expected = [
            "LICENSE.md",
            "additional_chat_templates/tool_use.jinja",
            "chat_template.jinja",
            "configuration_x.py",
            "qwen.tiktoken",
            "vocab.txt",
        ];
        assert_eq!(to_copy(path), expected.map(PathBuf::from));
        assert_eq!(left_out(path), ["odd.json"]);
    }
}
