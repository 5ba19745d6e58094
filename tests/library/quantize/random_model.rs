//! Models of random weights: made in memory and read back from a folder they are the same, in every format that can be said.

use recoup::checkpoint::Checkpoint;
use recoup::checkpoint::dialect::Dialect;
use recoup::checkpoint::tensors::TensorStore;
use recoup::model::Decoder;
use recoup::quantize::Recipe;
use recoup::quantize::random_model::RandomModel;

use crate::support::fixtures::{bits, cpu, logits};

#[test]
fn memory_and_folder_hold_the_same_model() {
    let ids: Vec<Vec<u32>> = vec![(0..24).map(|i| i * 37 % 4096).collect(), (0..24).map(|i| i * 11 % 4096).collect()];
    let (mut made, mut fused) = (0, 0);
    for (shape, dialect) in ["tiny", "tiny-gpt-oss"].into_iter().flat_map(|s| Dialect::written().map(move |d| (s, d))) {
        let recipes = Recipe::shipped().unwrap().into_iter().filter(|r| r.auto.is_none() && r.rotate.is_none());
        for recipe in recipes.map(Some).chain([None]) {
            // A dialect need not have a name for a format.
            let Ok(random) = RandomModel::new(shape, recipe.as_ref(), dialect) else { continue };
            let folder = tempfile::tempdir().unwrap();
            let out = folder.path().join("m");
            random.write(&out, &|| ()).unwrap();
            let read = Decoder::load(cpu(1), &Checkpoint::open(&out).unwrap()).unwrap();
            let memory = Decoder::load(cpu(1), &random).unwrap();
            let (a, b) = (logits(&read, &ids), logits(&memory, &ids));
            let name = recipe.map_or("none".into(), |r| r.name);
            assert!(bits(&a) == bits(&b), "{shape} {name} {dialect}");
            let stored = TensorStore::open(&out).unwrap();
            fused += usize::from(stored.names().any(|n| n.contains(".mlp.experts.gate_up_proj")));
            // Neither overflow nor nothing.
            let size = (a.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / a.len() as f64).sqrt();
            assert!((0.01..1e3).contains(&size), "{shape} {name} {dialect}: logits of {size}");
            made += 1;
        }
    }
    println!("{made} models, {fused} with their experts in one tensor");
    assert!(made > 40 && fused >= 5, "only {made}, {fused}");
}
