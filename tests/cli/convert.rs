//! `recoup convert` as its users run it.

use crate::support::command::{BF16, Folder, NVFP4, fail, succeed};

#[test]
fn convert_goes_between_dialects_and_to_bf16() {
    let folder = Folder::new();
    let (there, plain) = (folder.name("there"), folder.name("plain"));
    succeed(&["convert", NVFP4, "-o", &there, "--to", "compressed-tensors"]);
    let answer = |model: &str| succeed(&["run", model, "-p", "It was a dark", "-n", "12", "--temperature", "0"]).0;
    assert_eq!(answer(NVFP4), answer(&there));
    succeed(&["convert", &there, "-o", &plain]);
    answer(&plain);
    let error = fail(&["convert", BF16, "-o", &folder.name("out"), "--to", "modelopt"]);
    assert!(error.contains("plain") && !folder.at("out").exists(), "{error}");
}
