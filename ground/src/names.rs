//! Names of files for things that people name: tasks, labels, texts. Two names never give one file.

use crate::digest::sha256;

/// Longest name that is used as it is, bytes; file systems allow 255, and there is more in a file's name than this.
const LONGEST: usize = 160;

/// `name` as a part of a file name: letters, digits, `-`, `_` and inner dots stay, other bytes become `%XX` as in a URL.
/// What is too long is cut, with a hash of the whole behind it.
#[must_use]
pub fn file_name(name: &str) -> String {
    let mut out = String::new();
    let last = name.chars().count().saturating_sub(1);
    for (i, c) in name.chars().enumerate() {
        let stays = c.is_alphanumeric() || "-_".contains(c) || c == '.' && i > 0 && i < last;
        if stays {
            out.push(c);
        } else {
            let mut bytes = [0; 4];
            c.encode_utf8(&mut bytes).bytes().for_each(|b| out += &format!("%{b:02X}"));
        }
    }
    if out.is_empty() {
        // No other name gives a lone percent sign.
        return "%".into();
    }
    if out.len() > LONGEST {
        let hash = &sha256(name)[..16];
        let cut = (0..=LONGEST).rev().find(|at| out.is_char_boundary(*at)).unwrap_or(0);
        out.truncate(cut);
        out += &format!("%{hash}");
    }
    out
}

/// The first two of `names` that would be one file: equal ones, and on file systems that do not tell capitals apart (those
/// of Windows and macOS) those that differ by nothing else.
#[must_use]
pub fn clash<'a>(names: &[&'a str]) -> Option<(&'a str, &'a str)> {
    let same =
        |a: &str, b: &str| a == b || cfg!(any(windows, target_os = "macos")) && a.to_lowercase() == b.to_lowercase();
    names.iter().enumerate().find_map(|(i, a)| names[..i].iter().find(|b| same(a, b)).map(|b| (*b, *a)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn different_names_give_different_files_that_can_be_made() {
        let long = "long".repeat(100);
        let longer = format!("{long}er");
        let names = [
            "a b",
            "a_b",
            "a%20b",
            "a/b",
            "a\\b",
            "..",
            ".",
            "",
            "%",
            "a.",
            ".a",
            "a",
            "arc_easy",
            "mmlu:anatomy",
            "中文",
            "a\nb",
            &long,
            &longer,
        ];
        let files: BTreeSet<String> = names.iter().map(|n| file_name(n)).collect();
        assert_eq!(files.len(), names.len(), "{files:?}");
        let folder = tempfile::tempdir().unwrap();
        for file in &files {
            assert!(!file.contains(['/', '\\', ':']) && !file.starts_with('.') && file.len() < 200, "{file}");
            std::fs::write(folder.path().join(format!("samples_{file}.jsonl")), "").unwrap();
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), names.len());
        assert_eq!(file_name("lambada_openai-v1.2"), "lambada_openai-v1.2");
    }

    #[test]
    fn the_same_name_twice_is_found() {
        assert_eq!(clash(&["a", "b", "a"]), Some(("a", "a")));
        assert_eq!(clash(&["a b", "a_b"]), None);
    }
}
