//! Lists the files of `tasks/` in a table of the crate, so that an installed program evaluates without them.

use std::{env, fs, io, path::Path};

fn main() -> io::Result<()> {
    let root = Path::new(&env::var("CARGO_MANIFEST_DIR").map_err(io::Error::other)?).join("tasks");
    println!("cargo::rerun-if-changed={}", root.display());
    let mut files = Vec::new();
    list(&root, "", &mut files)?;
    files.sort();
    let mut table = String::from(
        "/// Every built-in file by its path below `tasks/`, sorted.\nstatic FILES: &[(&str, &[u8])] = &[\n",
    );
    for name in files {
        table += &format!("    ({name:?}, include_bytes!({:?})),\n", root.join(&name));
    }
    table += "];\n";
    fs::write(Path::new(&env::var("OUT_DIR").map_err(io::Error::other)?).join("tasks.rs"), table)
}

fn list(folder: &Path, prefix: &str, files: &mut Vec<String>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        if entry.file_type()?.is_dir() {
            list(&entry.path(), &format!("{name}/"), files)?;
        } else if !name.ends_with(".py") && !name.ends_with(".md") && !name.contains("__pycache__") {
            files.push(name);
        }
    }
    Ok(())
}
