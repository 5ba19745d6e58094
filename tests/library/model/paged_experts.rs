//! Experts that are packed when they are used: the same bits as with all of them in memory, and never more in memory than was
//! allowed, whoever asks at once.

use crate::support::fixtures::{architecture_fixtures, bits, cpu, incremental_logits, logits};
use recoup::checkpoint::Checkpoint;
use recoup::checkpoint::dialect::Dialect;
use recoup::model::Decoder;
use recoup::quantize::Recipe;
use recoup::quantize::random_model::RandomModel;

fn sequences(vocab: u32) -> Vec<Vec<u32>> {
    (0..3).map(|s| (0..24).map(|i| (i * 37 + s * 101 + i * i) % vocab).collect()).collect()
}

/// Bytes of the largest expert's three products, and of all, as they are in memory; and how many products there are.
fn experts(checkpoint: &Checkpoint) -> (usize, usize, usize) {
    let whole = Decoder::load(cpu(1).with_expert_memory(usize::MAX), checkpoint).unwrap();
    let (count, sizes): (Vec<_>, Vec<_>) = whole
        .config
        .modules()
        .into_iter()
        .filter(|m| m.expert.is_some())
        .map(|m| (m.name.clone(), checkpoint.linear(&m.name, m.role).unwrap().stored_bytes()))
        .unzip();
    // Padded rows and biases in f32 take some more.
    (2 * 3 * sizes.iter().max().unwrap(), sizes.iter().sum(), count.len())
}

#[test]
fn experts_that_come_and_go_compute_the_same_bits_in_the_memory_that_they_may_have() {
    let folder = tempfile::tempdir().unwrap();
    let mut checkpoints = Vec::new();
    for fixture in architecture_fixtures() {
        let checkpoint = fixture.checkpoint();
        let config = recoup::model::ModelConfig::read(&checkpoint.config);
        if config.is_ok_and(|c| !c.mixtures().is_empty()) {
            checkpoints.push((fixture.name, checkpoint));
        }
    }
    for (dialect, recipe) in [(Dialect::ModelOpt, "nvfp4_experts_only"), (Dialect::Mxfp4, "mxfp4a16_experts_only")] {
        let out = folder.path().join(dialect.name());
        let recipe = Recipe::find(recipe).unwrap();
        RandomModel::new("tiny-gpt-oss", Some(&recipe), dialect).unwrap().write(&out, &|| ()).unwrap();
        checkpoints.push((dialect.name().into(), Checkpoint::open(&out).unwrap()));
    }
    assert!(checkpoints.len() >= 4);
    for (name, checkpoint) in checkpoints {
        let whole = Decoder::load(cpu(2), &checkpoint).unwrap();
        let ids = sequences(whole.config.vocab as u32);
        let expected = bits(&logits(&whole, &ids));
        let (one, all, count) = experts(&checkpoint);
        for limit in [1, one, all / 2] {
            let backend = cpu(2).with_expert_memory(limit);
            let paged = Decoder::load(backend.clone(), &checkpoint).unwrap();
            assert_eq!(backend.expert_usage().unwrap().brought, 0, "{name}: loading brings none in");
            assert!(expected == bits(&logits(&paged, &ids)), "{name}: {limit}");
            assert!(expected == bits(&incremental_logits(&paged, &ids, 5)), "{name}: {limit}");
            let usage = backend.expert_usage().unwrap();
            println!("{name}: {limit} of {all} bytes, {usage:?}");
            // At the least what is in use is there.
            assert!(usage.peak <= limit.max(one / 2) && usage.bytes <= usage.peak, "{name}: {usage:?}");
            assert!(usage.brought as usize > count && usage.wanted >= usage.brought, "{name}: {usage:?}");
        }
        // With room for all of them each comes once.
        let backend = cpu(2).with_expert_memory(usize::MAX);
        let paged = Decoder::load(backend.clone(), &checkpoint).unwrap();
        assert!(expected == bits(&logits(&paged, &ids)) && expected == bits(&logits(&paged, &ids)), "{name}");
        let usage = backend.expert_usage().unwrap();
        assert!(usage.brought as usize <= count && usage.bytes == usage.peak, "{name}: {usage:?}");
    }
}

#[test]
fn threads_that_want_other_experts_at_once_get_theirs() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("m");
    let recipe = Recipe::find("nvfp4_experts_only").unwrap();
    RandomModel::new("tiny-gpt-oss", Some(&recipe), Dialect::ModelOpt).unwrap().write(&out, &|| ()).unwrap();
    let checkpoint = Checkpoint::open(&out).unwrap();
    let (one, all, _) = experts(&checkpoint);
    let limit = one.max(all / 3);
    let backend = cpu(2).with_expert_memory(limit);
    let paged = Decoder::load(backend.clone(), &checkpoint).unwrap();
    let ids = sequences(paged.config.vocab as u32);
    let whole = Decoder::load(cpu(2), &checkpoint).unwrap();
    std::thread::scope(|scope| {
        for sequence in &ids {
            let (paged, whole, sequence) = (&paged, &whole, vec![sequence.clone()]);
            scope.spawn(move || {
                let expected = bits(&logits(whole, &sequence));
                for _ in 0..10 {
                    assert!(expected == bits(&incremental_logits(paged, &sequence, 3)));
                }
            });
        }
    });
    let usage = backend.expert_usage().unwrap();
    assert!(usage.peak <= limit && usage.brought > 100, "{usage:?}");
    // What it may still take is known to whoever loads another model, until it is gone.
    assert_eq!(backend.open_expert_bytes(), limit - usage.bytes);
    let other = backend.with_expert_memory(7);
    assert_eq!(backend.open_expert_bytes(), limit - usage.bytes + 7);
    drop(other);
    let left = cpu(1).with_expert_memory(5);
    assert_eq!(left.open_expert_bytes(), 5);
}

#[test]
fn the_files_may_be_closed_and_the_checkpoint_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("m");
    RandomModel::new("tiny-gpt-oss", None, Dialect::ModelOpt).unwrap().write(&out, &|| ()).unwrap();
    let checkpoint = Checkpoint::open(&out).unwrap();
    let expected = Decoder::load(cpu(1), &checkpoint).unwrap();
    let ids = sequences(expected.config.vocab as u32);
    let expected = bits(&logits(&expected, &ids));
    let paged = Decoder::load(cpu(1).with_expert_memory(1), &checkpoint).unwrap();
    drop(checkpoint);
    // Its maps are what holds the files.
    folder.close().unwrap();
    assert!(expected == bits(&logits(&paged, &ids)));
}
