//! What a path that is no checkpoint is instead, from the names in it: PyTorch's or GGUF files, an adapter, a download that
//! did not finish. Only asked once something is missing.

use std::collections::BTreeSet;
use std::path::Path;

/// What is in `folder` instead of a checkpoint, and what to do; as the end of a sentence that says what is missing.
pub(super) fn instead(folder: &Path) -> String {
    let Ok(entries) = std::fs::read_dir(folder) else { return String::new() };
    let names: BTreeSet<String> = entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    let find = |fits: &dyn Fn(&str) -> bool| names.iter().find(|n| fits(&n.to_ascii_lowercase())).cloned();
    let ends = |ends: &[&str]| find(&|n| ends.iter().any(|e| n.ends_with(e)));
    let said = if names.is_empty() {
        "the folder is empty".into()
    } else if let Some(name) = names.iter().find(|n| is_dangling(&folder.join(n))) {
        format!("{name} is a link to a file that does not exist; download it again")
    } else if let Some(name) = ends(&[".incomplete", ".part", ".crdownload", ".aria2", ".download"]) {
        format!("{name} is a download that has not finished; let it finish or download it again")
    } else if let Some(name) = find(&|n| n == "adapter_config.json" || n.starts_with("adapter_model.")) {
        format!("{name} is a part of a LoRA adapter; merge it into its base model first (peft: merge_and_unload)")
    } else if let Some(name) = ends(&[".gguf"]) {
        format!("{name} is a GGUF file; import it first: recoup convert {} -o FOLDER", folder.join(&name).display())
    } else if let Some(name) = ends(&[".safetensors.gz", ".safetensors.zst", ".safetensors.xz", ".safetensors.zip"]) {
        format!("{name} is compressed; unpack it")
    } else if let Some(name) = find(&|n| n.starts_with("model-") && n.ends_with(".safetensors") && n.contains("-of-")) {
        format!(
            "{name} is one of several parts, which need their index, model.safetensors.index.json; download that too"
        )
    } else if let Some(name) = find(&|n| n.starts_with("consolidated") && n.ends_with(".safetensors")) {
        format!(
            "{name} is in Mistral's own layout; take the files in Hugging Face's layout (config.json, model*.safetensors)"
        )
    } else if let Some(name) = find(&|n| n.ends_with(".safetensors") && n != "model.safetensors") {
        format!("{name} has another name than a model's; is it a whole model? then call it model.safetensors")
    } else if let Some(name) = ends(&[".bin", ".pth", ".pt", ".ckpt"]) {
        format!("{name} is in PyTorch's own format; write safetensors with transformers' save_pretrained")
    } else if let Some(name) = ends(&[".h5", ".msgpack", ".onnx", ".nemo", ".npz", ".tflite"]) {
        format!("{name} is of another framework; take the model's safetensors")
    } else if let Some(below) = below(folder, &names) {
        format!("the checkpoint is in {below} below it; give that folder")
    } else {
        return String::new();
    };
    format!(": {said}")
}

/// The folder one or two levels below that has a config.json, relative to `folder`: a repository with the model in a folder,
/// or an entry of the hub's cache (`models--org--name/snapshots/COMMIT`).
fn below(folder: &Path, names: &BTreeSet<String>) -> Option<String> {
    let has = |path: &str| folder.join(path).join("config.json").exists();
    if let Some(name) = names.iter().find(|n| has(n)) {
        return Some(name.clone());
    }
    let snapshots = std::fs::read_dir(folder.join("snapshots")).ok()?;
    snapshots.flatten().map(|e| format!("snapshots/{}", e.file_name().to_string_lossy())).find(|path| has(path))
}

fn is_dangling(path: &Path) -> bool {
    path.is_symlink() && !path.exists()
}

/// What a file that was given as a checkpoint is, and what to give instead.
pub(super) fn file_instead(file: &Path) -> String {
    let ends = |end: &str| file.extension().is_some_and(|e| e.eq_ignore_ascii_case(end));
    if ends("gguf") {
        return format!("is a GGUF file; import it first: recoup convert {} -o FOLDER", file.display());
    }
    let parent = file.parent().filter(|p| p.join("config.json").is_file());
    let parent = match parent {
        Some(p) if p.as_os_str().is_empty() => "; give the folder that it is in: .".into(),
        Some(p) => format!("; give the folder that it is in: {}", p.display()),
        None => String::new(),
    };
    format!("is a file; a checkpoint is a folder with config.json and model.safetensors{parent}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_there_instead_of_a_checkpoint_is_named_with_what_to_do() {
        for (file, expected) in [
            ("pytorch_model-00001-of-00002.bin", "PyTorch's own format"),
            ("model.Q4_K_M.GGUF", "recoup convert"),
            ("adapter_model.safetensors", "LoRA adapter"),
            ("model.safetensors.incomplete", "not finished"),
            ("model.safetensors.gz", "compressed"),
            ("model-00001-of-00003.safetensors", "need their index"),
            ("consolidated.safetensors", "Mistral's own layout"),
            ("weights.safetensors", "another name"),
            ("tf_model.h5", "another framework"),
        ] {
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join(file), b"x").unwrap();
            let said = instead(folder.path());
            assert!(said.contains(expected) && said.contains(file), "{file}: {said}");
        }
    }

    #[test]
    fn the_checkpoint_below_a_folder_of_the_hubs_cache_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let commit = folder.path().join("snapshots/abc");
        std::fs::create_dir_all(&commit).unwrap();
        std::fs::write(commit.join("config.json"), b"{}").unwrap();
        assert!(instead(folder.path()).contains("snapshots/abc"));
    }
}
