//! What a file really is, where its first bytes say that it is not what its name says: a Git LFS pointer, a web page, an
//! archive. One list for everything that reads files, so that each reader gives the same true reason.

/// How far [`foreign`] looks: a pointer is shorter than this.
pub const LOOK: usize = 512;

/// First bytes of pointers of Git LFS, of its forerunner, of Xet and of git-annex.
const POINTERS: [(&str, &str, &str); 5] = [
    ("version https://git-lfs.github.com/spec/", "Git LFS", "git lfs pull"),
    ("version https://hawser.github.com/spec/", "Git LFS", "git lfs pull"),
    ("version http://git-media.io/v/", "Git LFS", "git lfs pull"),
    ("# xet version", "Xet", "git xet checkout"),
    ("/annex/objects/", "git-annex", "git annex get"),
];

/// First bytes of formats that are never a checkpoint's file, and what to do.
const MAGIC: [(&[u8], &str, &str); 10] = [
    (b"PK\x03\x04", "a ZIP archive (what PyTorch's torch.save writes is one)", PICKLES),
    (b"\x80\x02", "a Python pickle (an old PyTorch file)", PICKLES),
    (b"\x80\x04", "a Python pickle", PICKLES),
    (b"\x1f\x8b", "compressed by gzip", "unpack it (gunzip)"),
    (b"\x28\xb5\x2f\xfd", "compressed by Zstandard", "unpack it (zstd -d)"),
    (b"\xfd7zXZ\0", "compressed by xz", "unpack it (unxz)"),
    (b"BZh", "compressed by bzip2", "unpack it (bunzip2)"),
    (b"GGUF", "a GGUF file", "import it: recoup convert FILE.gguf -o FOLDER"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras)", "take the model's safetensors instead"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
];
const PICKLES: &str = "take the model's safetensors instead, or write them with transformers' save_pretrained";

/// What hubs and stores answer instead of a file, as text and with no sign of an error in a saved file.
const ANSWERS: [&str; 7] = [
    "Entry not found",
    "Repository not found",
    "Invalid username or password",
    "Access to model ",
    "Access to dataset ",
    "Access to this resource",
    "Too Many Requests",
];

/// A pointer to a file that lies elsewhere, said as what it is and what to do about it: "a Git LFS pointer …". Looks at
/// nothing else, so it is right for files that may hold any text.
#[must_use]
pub fn pointer(beginning: &[u8]) -> Option<String> {
    let (_, what, command) = POINTERS.iter().find(|(head, ..)| beginning.starts_with(head.as_bytes()))?;
    let text = String::from_utf8_lossy(&beginning[..beginning.len().min(LOOK)]);
    let size = text.lines().find_map(|l| l.strip_prefix("size ")?.trim().parse::<u64>().ok());
    let size = size.map_or_else(String::new, |n| format!(" to {n} bytes"));
    Some(format!(
        "a {what} pointer{size}, not the file itself; fetch it with `{command}` in the folder that was cloned, or \
         download the file"
    ))
}

/// What a file that begins like this is instead of a model's file, and what to do; `None` where nothing speaks against it.
/// `beginning` is the whole file or its first [`LOOK`] bytes at least.
#[must_use]
pub fn foreign(beginning: &[u8]) -> Option<String> {
    if beginning.is_empty() {
        return Some("empty; copy or download it again".into());
    }
    if let Some(pointer) = pointer(beginning) {
        return Some(pointer);
    }
    if let Some((_, what, todo)) = MAGIC.iter().find(|(head, ..)| beginning.starts_with(head)) {
        return Some(format!("{what}; {todo}"));
    }
    let look = &beginning[..beginning.len().min(LOOK)];
    if look.iter().all(|b| *b == 0) && look.len() >= 32 {
        return Some("all zeros at its beginning, so a download that never finished; download it again".into());
    }
    if look.starts_with(b"\xff\xfe") || look.starts_with(b"\xfe\xff") {
        return Some("text in UTF-16 (PowerShell's `>` writes that); save it as UTF-8".into());
    }
    let text = String::from_utf8_lossy(look);
    let text = text.trim_start_matches('\u{feff}').trim_start();
    let begins = |head: &str| text.get(..head.len()).is_some_and(|t| t.eq_ignore_ascii_case(head));
    if begins("<!doctype html") || begins("<html") {
        return Some("a web page (HTML) that was saved instead of the file; download the file itself".into());
    }
    if begins("<?xml") || begins("<Error>") {
        return Some("XML, as stores answer with an error; download the file again".into());
    }
    let answer = ANSWERS.iter().any(|a| text.starts_with(a)) || text.starts_with("{\"error\":");
    answer.then(|| {
        let said: String = text.lines().next().unwrap_or_default().chars().take(80).collect();
        format!(
            "a server's answer that was saved instead of the file ({said:?}); log in if you must, and download it again"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_in_the_place_of_a_file_is_named_and_real_files_are_not_taken_for_it() {
        let header = [&2u64.to_le_bytes()[..], b"{}"].concat();
        for (bytes, expected) in [
            (&b"version https://git-lfs.github.com/spec/v1\nsize 538\n"[..], "a Git LFS pointer to 538 bytes, not"),
            (b"version http://git-media.io/v/1\n", "fetch it with `git lfs pull`"),
            (b"# xet version 0\nfilesize = 5\n", "git xet checkout"),
            (b"/annex/objects/MD5E-s5--x.safetensors\n", "git annex get"),
            (b"", "empty"),
            (&[0; 600], "never finished"),
            (b"\n<!DOCTYPE html><html>", "web page"),
            (b"<HTML lang=en>", "web page"),
            (b"<?xml version=\"1.0\"?><Error>", "XML"),
            (b"Entry not found", "\"Entry not found\""),
            (b"{\"error\":\"Repository not found\"}", "server's answer"),
            (b"PK\x03\x04\0\0", "PyTorch"),
            (b"\x1f\x8b\x08", "gunzip"),
            (b"\x28\xb5\x2f\xfd\x00", "zstd"),
            (b"GGUF\x03\0\0\0", "recoup convert"),
            (b"\xff\xfe{\0", "UTF-16"),
        ] {
            let said = foreign(bytes).unwrap_or_else(|| panic!("{bytes:?}"));
            assert!(said.contains(expected), "{said}");
            assert_eq!(pointer(bytes).is_some(), said.contains("pointer"), "{said}");
        }
        for bytes in [&header[..], b"{\"a\": 1}", b"{}", b"{{ bos_token }}", b"version https://example.org", b"text"] {
            assert_eq!(foreign(bytes), None, "{bytes:?}");
        }
    }
}
