//! Checkpoints of hybrids, mixtures and wrappers: what they compute when deployed, and that neither how a sequence is cut
//! nor what runs beside it nor the instruction set changes a bit.

use recoup::backend::cpu::{CpuBackend, isa::Isa};
use recoup::checkpoint::Checkpoint;
use recoup::model::ModelConfig;

use crate::support::fixtures::{
    Fixture, Report, Session, architecture_fixtures, bits, cpu, deviation, incremental_logits, logits,
};

/// Those whose architecture is read; others must be refused by its name.
fn fixtures() -> Vec<Fixture> {
    let config = |f: &Fixture| ModelConfig::read(&Checkpoint::open(&f.folder)?.config);
    let known = |f: &Fixture| match config(f) {
        Ok(_) => true,
        Err(e) => {
            assert!(e.to_string().contains("unknown "), "{}: {e}", f.name);
            println!("refused: {}: {e}", f.name);
            false
        }
    };
    architecture_fixtures().into_iter().filter(known).collect()
}

#[test]
fn every_architecture_gives_the_logits_it_gives_when_deployed() {
    let mut report = Report::default();
    for fixture in fixtures() {
        let got = logits(&fixture.load(cpu(2)), &fixture.input_ids());
        report.check(&fixture.name, deviation(&got, &fixture.golden_logits()), fixture.bound());
    }
    report.finish();
}

#[test]
fn a_prefill_in_any_pieces_gives_the_same_bits() {
    for fixture in fixtures() {
        let (model, ids) = (fixture.load(cpu(2)), fixture.input_ids());
        let whole = bits(&logits(&model, &ids));
        for prefill in [1, 5] {
            assert!(whole == bits(&incremental_logits(&model, &ids, prefill)), "{}: {prefill}", fixture.name);
        }
        // Pieces of several sizes, and sequences that run beside each other at different places.
        let vocab = model.config.vocab;
        let mut session = Session::new(&model, ids.len(), ids[0].len());
        let mut parts = vec![Vec::new(); ids.len()];
        let mut at: Vec<usize> = vec![0; ids.len()];
        for round in 0.. {
            let piece = |s: usize| [3, 1, 7, 2][(round + s) % 4].min(ids[s].len() - at[s]);
            let now: Vec<_> = (0..ids.len()).filter(|&s| piece(s) > 0).map(|s| (s, piece(s))).collect();
            if now.is_empty() {
                break;
            }
            let new: Vec<_> = now.iter().map(|&(s, n)| (s, at[s], &ids[s][at[s]..at[s] + n])).collect();
            for (&(s, n), logits) in now.iter().zip(session.forward(&new)) {
                assert_eq!(logits.len(), n * vocab);
                parts[s].extend(logits);
                at[s] += n;
            }
        }
        assert!(whole == bits(&parts.concat()), "{}", fixture.name);
    }
}

#[test]
fn every_instruction_set_and_number_of_threads_gives_the_same_bits() {
    for fixture in fixtures() {
        let mut first = None;
        for (isa, threads) in Isa::available().into_iter().flat_map(|isa| [(isa, 1), (isa, 3)]) {
            let model = fixture.load(CpuBackend::new(isa, threads).unwrap());
            let got = bits(&logits(&model, &fixture.input_ids()));
            assert!(*first.get_or_insert_with(|| got.clone()) == got, "{}: {isa}, {threads} threads", fixture.name);
        }
    }
}
