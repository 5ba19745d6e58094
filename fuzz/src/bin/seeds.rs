//! Writes what libFuzzer begins with: checkpoints into the corpus of `checkpoint`, configurations into that of `configuration`.

use std::path::Path;

use recoup_fuzz::corpus::{checkpoints, configurations};

fn main() -> std::io::Result<()> {
    let corpus = std::env::args().nth(1).unwrap_or_else(|| "corpus".into());
    for (target, seeds) in [("checkpoint", checkpoints()), ("configuration", configurations(Path::new("../tests"))?)] {
        let folder = Path::new(&corpus).join(target);
        std::fs::create_dir_all(&folder)?;
        seeds.into_iter().try_for_each(|(name, bytes)| std::fs::write(folder.join(name), bytes))?;
    }
    Ok(())
}
