//! Every checkpoint that other tools wrote computes here what it computes when deployed.

use recoup::backend::cpu::{CpuBackend, isa::Isa};
use recoup::backend::{Backend, Batch, PAGE, Span};
use recoup::checkpoint::Checkpoint;
use recoup::formats::kv::KvFormat;
use recoup::model::{Decoder, Wanted};
use std::path::{Path, PathBuf};

fn main_dir() -> PathBuf {
    PathBuf::from("/work/shared/fixtures")
}

fn load(p: &Path) -> std::collections::HashMap<String, (Vec<usize>, Vec<f32>)> {
    let bytes = std::fs::read(p).unwrap();
    let st = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    st.tensors()
        .into_iter()
        .map(|(n, t)| {
            let v = match t.dtype() {
                safetensors::Dtype::F32 => {
                    t.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
                }
                safetensors::Dtype::I64 => {
                    t.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f32).collect()
                }
                d => panic!("{d}"),
            };
            (n, (t.shape().to_vec(), v))
        })
        .collect()
}

fn logits<B: Backend>(d: &Decoder<B>, ids: &[u32], rows: usize) -> Vec<f32> {
    let t = ids.len() / rows;
    let mut cache = d.new_cache(rows * t.next_multiple_of(PAGE), KvFormat::F32).unwrap();
    let pages = t.div_ceil(PAGE) as u32;
    let spans = (0..rows)
        .map(|r| Span { slot: r, start: 0, len: t, pages: (r as u32 * pages..(r as u32 + 1) * pages).collect() })
        .collect();
    let out = d.forward(&Batch { tokens: ids.to_vec(), spans }, &mut cache, Wanted::All).unwrap();
    d.backend().to_host(&out).unwrap()
}

fn rel(a: &[f32], b: &[f32]) -> f64 {
    let d: f64 = a.iter().zip(b).map(|(x, y)| (f64::from(*x) - f64::from(*y)).powi(2)).sum();
    let n: f64 = b.iter().map(|y| f64::from(*y).powi(2)).sum();
    (d / n).sqrt()
}

#[test]
fn all() {
    let mut dirs = vec![];
    for tool in ["modelopt", "compressed-tensors"] {
        for a in std::fs::read_dir(main_dir().join(tool)).unwrap() {
            for c in std::fs::read_dir(a.unwrap().path()).unwrap() {
                dirs.push(c.unwrap().path());
            }
        }
    }
    for a in std::fs::read_dir("/tmp/ref/tiny").into_iter().flatten() {
        dirs.push(a.unwrap().path());
    }
    dirs.sort();
    for d in dirs {
        let r = if d.join("deployed.safetensors").exists() { "deployed.safetensors" } else { "reference.safetensors" };
        let Ok(ck) = Checkpoint::open(&d) else {
            println!("{}: {}", d.display(), Checkpoint::open(&d).err().unwrap());
            continue;
        };
        let b = CpuBackend::new(Isa::detect(), 2).unwrap();
        let m = match Decoder::load(b, &ck) {
            Ok(m) => m,
            Err(e) => {
                println!("{}: {e}", d.display());
                continue;
            }
        };
        let refs = load(&d.join(r));
        let ids: Vec<u32> = refs["input_ids"].1.iter().map(|v| *v as u32).collect();
        let got = logits(&m, &ids, refs["input_ids"].0[0]);
        println!("{:60} {:.2e}", d.strip_prefix(main_dir()).unwrap_or(&d).display(), rel(&got, &refs["logits"].1));
    }
}
