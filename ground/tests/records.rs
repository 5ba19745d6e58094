//! The one reader of data: what each kind of file gives, and what is refused, with its place.

use std::path::{Path, PathBuf};

use recoup_ground::records::{Content, RecordsError, Table, distinct_names, expand, read, same_file_twice};
use serde_json::{Value, json};

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
        path
    }

    fn records(&self, name: &str, content: impl AsRef<[u8]>) -> Vec<Value> {
        match read(&self.file(name, content)).unwrap() {
            Content::Records(records) => (0..records.len()).map(|i| records.get(i).unwrap().into_owned()).collect(),
            Content::Text(text) => panic!("{name}: a text: {text}"),
        }
    }

    fn text(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        match read(&self.file(name, content)).unwrap() {
            Content::Text(text) => text,
            Content::Records(records) => panic!("{name}: records: {records:?}"),
        }
    }

    fn refused(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        read(&self.file(name, content)).unwrap_err().to_string()
    }
}

fn hex(text: &str) -> Vec<u8> {
    (0..text.len() / 2).map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap()).collect()
}

/// `{"text": "one"}` and `{"text": "two"}`, each a line, by gzip.
const GZIP: [&str; 2] = [
    "1f8b0800000000000203ab562a49ad2851b25250cacf4b55aae502006d03d10610000000",
    "1f8b0800000000000203ab562a49ad2851b252502a29cf57aae50200a2e48d6d10000000",
];
/// The same by `zstd --check`.
const ZSTANDARD: [&str; 2] = [
    "28b52ffd04588100007b2274657874223a20226f6e65227d0ada470a1d",
    "28b52ffd04588100007b2274657874223a202274776f227d0a456ac41f",
];

#[test]
fn json_is_told_by_its_content_whatever_the_file_is_called() {
    let folder = Folder::new();
    let rows = json!([{"text": "one"}, {"text": "two"}]);
    let lines = "{\"text\": \"one\"}\n{\"text\": \"two\"}\n";
    let pretty = format!("{rows:#}");
    let wrapped = json!({"data": rows, "version": 2}).to_string();
    let train = json!({"train": rows}).to_string();
    let concatenated = "{\n \"text\": \"one\"\n}\n{\n \"text\": \"two\"\n}\n";
    for ending in ["json", "jsonl", "ndjson", "JSONL", "Json", "txt", "md", "data"] {
        for content in [lines, &rows.to_string(), &pretty, &wrapped, &train, concatenated] {
            let found = folder.records(&format!("a.{ending}"), content);
            assert_eq!(Value::from(found), rows, "a.{ending}: {content}");
        }
    }
    assert_eq!(Value::from(folder.records("a", lines)), rows);
}

#[test]
fn marks_line_ends_and_compression_change_nothing() {
    let folder = Folder::new();
    let rows = json!([{"text": "one"}, {"text": "two"}]);
    let lines = "{\"text\": \"one\"}\n{\"text\": \"two\"}\n";
    let windows = format!("\u{feff}{}", lines.replace('\n', "\r\n"));
    let both = |packed: [&str; 2]| packed.map(hex).concat();
    // Two members, two frames, and one that holds no data, are one file.
    let skipped = [&hex("502a4d1804000000deadbeef")[..], &both(ZSTANDARD)].concat();
    let files: [(&str, Vec<u8>); 8] = [
        ("a.jsonl", windows.clone().into()),
        ("b.txt", windows.into()),
        ("c.jsonl", lines.trim_end().replace('\n', "\r").into()),
        ("d.jsonl.gz", both(GZIP)),
        ("e.JSONL.GZ", both(GZIP)),
        ("f.jsonl.zst", both(ZSTANDARD)),
        ("g.txt", both(ZSTANDARD)),
        ("h.json.zst", skipped),
    ];
    for (name, content) in files {
        assert_eq!(Value::from(folder.records(name, content)), rows, "{name}");
    }
    assert_eq!(folder.text("a.txt", "\u{feff}one\r\ntwo\rthree"), "one\ntwo\nthree");
    for (name, packed) in [("cut.gz", hex(GZIP[0])), ("cut.zst", hex(ZSTANDARD[0]))] {
        let said = folder.refused(name, &packed[..packed.len() - 6]);
        assert!(said.contains(name) && said.contains("damaged or cut off"), "{said}");
    }
    let mut flipped = hex(ZSTANDARD[0]);
    let at = flipped.windows(3).position(|w| w == b"one").unwrap();
    flipped[at] ^= 1;
    assert!(folder.refused("flipped.zst", flipped).contains("checksum"));
}

#[test]
fn text_that_only_begins_like_json_stays_text() {
    let folder = Folder::new();
    for text in [
        "[1] Smith et al. (2003).\n[2] Jones.\n",
        "{braces} in a text",
        "[Music playing]\nHello.",
        "{{ template }}",
        "{\"Hello\", he said.}",
        "{ x }",
        "0 1 4 9",
        "\"quoted\"",
        "",
        "{",
        "He wrote {\"a\": 1} into the file.\nThat was all.\n",
    ] {
        assert_eq!(folder.text("a.txt", text), text);
    }
}

#[test]
fn what_looks_like_json_and_is_none_is_refused_with_its_line() {
    let folder = Folder::new();
    for (name, content, expected) in [
        ("a.txt", "{\"text\": \"a\"}\n{\"text\": \"b\n", "a.txt, line 2: looks like JSON but is not"),
        ("b.txt", "[{\"text\": \"a\"},\n {\"text\" \"b\"}]", "b.txt, line 2"),
        ("c", "[{\"text\": \"a\"},\n{\"text\": \"b\"}", "found the end of the file"),
        ("c2", "[{\"text\": \"a\"}\n{\"text\": \"b\"}]", "expected `,` or `]` after item 1"),
        ("d.txt", "{\"text\": \"a\"},\n{\"text\": \"b\"}", "a comma between values"),
        ("e.txt", "[[1, 2], [3", "line 1"),
        ("f.txt", "made by hand\n{\"text\": \"a\"}\n{\"text\": \"b\"}\n", "f.txt, line 1"),
        ("g.json", "plain words", "g.json, line 1: not a JSON document"),
        ("h.jsonl", "{\"a\": 1}\n{\"a\": \n{\"a\": 3}\n", "h.jsonl, line 2"),
        ("i.jsonl", "{\"a\": NaN}", "i.jsonl, line 1"),
    ] {
        let said = folder.refused(name, content);
        assert!(said.contains(expected), "{name}: {said}");
    }
}

#[test]
fn token_ids_are_records_of_numbers() {
    let folder = Folder::new();
    assert_eq!(Value::from(folder.records("a.json", "[[1, 2], [3]]")), json!([[1, 2], [3]]));
    assert_eq!(Value::from(folder.records("a.json", "[1, 2]\n[3]\n")), json!([[1, 2], [3]]));
    assert_eq!(Value::from(folder.records("a.json", "[1, 2, 3]")), json!([[1, 2, 3]]));
    assert_eq!(Value::from(folder.records("a.json", "{\"input_ids\": [[1]]}")), json!([{"input_ids": [[1]]}]));
}

#[test]
fn tables_are_read_by_their_head() {
    let folder = Folder::new();
    let rows = json!([{"text": "a, \"b\"\nc", "n": "1"}, {"text": null, "n": "2"}]);
    let csv = "text,n\r\n\"a, \"\"b\"\"\nc\",1\r\n,2\r\n";
    assert_eq!(Value::from(folder.records("a.csv", csv)), rows);
    assert_eq!(Value::from(folder.records("a.CSV", format!("\u{feff}{csv}"))), rows);
    let tsv = "text\tn\n\"a, \"\"b\"\"\nc\"\t1\n\t2\n";
    assert_eq!(Value::from(folder.records("a.tsv", tsv)), rows);
    // The index that pandas writes.
    assert_eq!(Table::read("a", ",text\n0,x\n", b',').unwrap().names, ["Unnamed: 0", "text"]);
    for (content, expected) in [
        ("text,text\n1,2\n", "names the column `text` twice"),
        ("a,b\n1,2\n1\n", "line 3: not a CSV file with a head: a row of 1 cells where the head names 2"),
        ("text;n\nx;1\n", "separated by `;`"),
        ("text\tn\nx\t1\n", "separated by `\\t`"),
        ("a,b\n1,2\n3,\"4\n5,6\n", "line 3: a quotation mark that opens in this row is never closed"),
    ] {
        let said = folder.refused("b.csv", content);
        assert!(said.contains(expected), "{content:?}: {said}");
    }
}

#[test]
fn what_is_no_text_is_called_what_it_is() {
    let folder = Folder::new();
    for (content, expected) in [
        (&b"\xff\xfe{\0\"\0"[..], "UTF-16"),
        (b"\xfe\xff\0{", "UTF-16"),
        (b"one\ntwo\0three", "line 2: a NUL byte"),
        (b"one\ncaf\xe9\n", "line 2: not UTF-8 (byte 0xe9); save the file as UTF-8"),
        (b"PK\x03\x04\0\0", "a ZIP archive"),
        (b"ARROW1\0\0\xff", "an Arrow file"),
        (b"\xfd7zXZ\0\0", "compressed by xz"),
        (b"version https://git-lfs.github.com/spec/v1\nsize 5\n", "Git LFS"),
    ] {
        for name in ["a.jsonl", "a.txt", "a.csv"] {
            let said = folder.refused(name, content);
            assert!(said.contains(expected), "{name}, {content:?}: {said}");
        }
    }
    let missing = read(Path::new("missing.txt")).unwrap_err().to_string();
    assert!(missing.contains("missing.txt: cannot be read"), "{missing}");
}

#[test]
fn folders_and_patterns_give_their_files_of_data_in_order() {
    let folder = Folder::new();
    let [b, a, c] = ["b.jsonl", "a.json.gz", "deeper/c.TXT"].map(|n| folder.file(n, "x"));
    let others = ["README.md", "dataset_info.json"].map(|n| folder.file(n, "x"));
    folder.file(".hidden.jsonl", "x");
    let root = folder.0.path();
    let found = expand(root).unwrap();
    assert_eq!(found.files, [a.clone(), b.clone(), c.clone()]);
    assert_eq!(found.others, others);
    assert_eq!(expand(&root.join("[ab].json*")).unwrap().files, [a.clone(), b.clone()]);
    assert_eq!(expand(&root.join("**/[a-c].*")).unwrap().files, [a, b.clone(), c]);
    assert_eq!(expand(&b).unwrap().files, [b]);
    // A file is itself, brackets or not; what is not there is left to the reader to name.
    let odd = folder.file("odd[1].jsonl", "x");
    assert_eq!(expand(&odd).unwrap().files, [odd]);
    assert_eq!(expand(Path::new("missing.txt")).unwrap().files, [Path::new("missing.txt")]);
    for nothing in [root.join("*.csv"), root.join("[")] {
        expand(&nothing).unwrap_err();
    }
    std::fs::create_dir(root.join("empty")).unwrap();
    assert!(matches!(expand(&root.join("empty")), Err(RecordsError::NoFiles { .. })));
}

#[test]
fn files_of_one_name_are_told_apart_by_as_much_of_their_paths_as_is_needed() {
    let names =
        |paths: &[&str], taken: &[&str]| distinct_names(&paths.iter().map(PathBuf::from).collect::<Vec<_>>(), taken);
    assert_eq!(
        names(&["prose/test.txt", "digits/test.txt", "x/other.jsonl.gz"], &[]),
        ["prose/test.txt", "digits/test.txt", "other"]
    );
    assert_eq!(names(&["a.txt", "a.jsonl"], &[]), ["a.txt", "a.jsonl"]);
    assert_eq!(names(&["one/x/a.txt", "two/x/a.txt"], &[]), ["one/x/a.txt", "two/x/a.txt"]);
    assert_eq!(names(&["p/wikitext.txt"], &["wikitext"]), ["wikitext.txt"]);
    // Names that become one in a file's name, or where case does not count.
    assert_eq!(names(&["p/a b.txt", "q/a_b.txt"], &[]), ["p/a b.txt", "q/a_b.txt"]);
    assert_eq!(names(&["p/A.txt", "q/a.txt"], &[]), ["p/A.txt", "q/a.txt"]);
    assert_eq!(names(&["a b.txt", "a_b.txt"], &[]), ["a b.txt", "a_b.txt (2)"]);
    assert_eq!(names(&["-"], &[]), ["stdin"]);
}

#[test]
fn a_file_that_is_given_twice_is_refused() {
    let folder = Folder::new();
    let [a, b] = ["a.txt", "b.txt"].map(|n| folder.file(n, "x"));
    same_file_twice(&[a.clone(), b.clone()]).unwrap();
    let again = folder.0.path().join("./a.txt");
    let said = same_file_twice(&[a.clone(), b, again]).unwrap_err().to_string();
    assert!(said.contains("are the same file"), "{said}");
    #[cfg(unix)]
    {
        let link = folder.0.path().join("link.txt");
        std::os::unix::fs::symlink(&a, &link).unwrap();
        same_file_twice(&[a, link]).unwrap_err();
    }
}

#[test]
fn parquet_is_read_as_a_file_of_its_own_only_and_what_is_none_is_named() {
    let folder = Folder::new();
    // printf PAR1aaaaPAR1 | gzip
    let packed = hex("1f8b08000000000002030b700c324c048200200d00676abfe10c000000");
    for name in ["a.parquet.gz", "a.parquet", "b.gz"] {
        let said = folder.refused(name, &packed);
        assert!(said.contains(name) && said.contains("not read out of gzip or Zstandard; unpack it"), "{said}");
    }
    let said = folder.refused("c.parquet", "<!DOCTYPE html><title>Sign in</title>");
    assert!(said.contains("c.parquet: not a Parquet file: it is a web page"), "{said}");
}
