//! One model over several ranks, here threads: the same bits as by one.

use std::sync::Arc;
use std::thread;

use recoup::backend::cpu::CpuBackend;
use recoup::backend::parallel::{Parallel, Size, help};
use recoup::backend::{Backend as _, Span};
use recoup::checkpoint::Checkpoint;
use recoup::formats::kv::KvFormat;
use recoup::model::parallel::PlanError;
use recoup::model::{Decoder, Source as _};
use recoup::ranks::Link as _;
use recoup::ranks::threads::Thread;

use crate::support::fixtures::{
    Fixture, Session, all_fixtures, architecture_fixtures, bits, cpu, incremental_logits, logits, own_fixtures,
};
use crate::support::project;

fn size(tensor: usize, pipeline: usize) -> Size {
    Size { tensor, pipeline }
}

/// As many ranks as `size` says, each a thread with a CPU of its own.
fn ranks(size: Size) -> Parallel<CpuBackend> {
    let mut links = Thread::all(size.ranks()).into_iter();
    let first = links.next().unwrap();
    let helpers = links.map(|link| {
        thread::spawn(move || {
            let rank = link.rank();
            if let Err(e) = help(cpu(1), Arc::new(link), size) {
                // The others would wait for ever.
                eprintln!("rank {rank}: {e}");
                std::process::abort();
            }
        })
    });
    let helpers = helpers.collect();
    let several = Parallel::new(cpu(1), Arc::new(first), size).unwrap();
    several.wait_for(helpers);
    several
}

fn load(checkpoint: &Checkpoint, size: Size) -> Result<Decoder<Parallel<CpuBackend>>, PlanError> {
    let plan = checkpoint.config().unwrap().plan(size)?;
    Ok(Decoder::load(ranks(size).with_plan(plan), checkpoint).unwrap())
}

#[test]
fn every_checkpoint_has_the_bits_of_one_rank_whatever_ranks_have_of_it() {
    let sizes = [size(2, 1), size(3, 1), size(1, 2), size(2, 2), size(4, 1)];
    let mut spread = 0;
    for (at, fixture) in all_fixtures().into_iter().chain(architecture_fixtures()).enumerate() {
        let checkpoint = fixture.checkpoint();
        let ids = fixture.input_ids();
        let alone = bits(&logits(&fixture.load(cpu(1)), &ids));
        // Every checkpoint by two that share layers, and by two of the others.
        for &size in [&sizes[0], &sizes[1 + at % 4], &sizes[1 + (at + 1) % 4]] {
            let decoder = match load(&checkpoint, size) {
                Ok(decoder) => decoder,
                Err(PlanError::Heads { heads, tensor }) => {
                    assert!(heads < tensor, "{}", fixture.name);
                    continue;
                }
                Err(PlanError::Stages { layers, pipeline }) => {
                    assert!(layers < pipeline, "{}", fixture.name);
                    continue;
                }
            };
            spread += 1;
            assert!(bits(&logits(&decoder, &ids)) == alone, "{} by {size:?}", fixture.name);
            let pieces = incremental_logits(&decoder, &ids, 3);
            assert!(bits(&pieces) == alone, "{} by {size:?}, in pieces", fixture.name);
        }
    }
    assert!(spread > 2 * own_fixtures().len(), "{spread}");
}

#[test]
fn caches_grow_and_part_as_one_ranks() {
    for (name, size) in [
        ("tests/fixtures/modelopt/llama/nvfp4_four_over_six", size(2, 1)),
        ("tests/fixtures-models/modelopt/nemotron_h/bf16", size(2, 2)),
        ("tests/fixtures-models/modelopt/qwen3_5/bf16", size(1, 2)),
    ] {
        let fixture = Fixture { name: name.into(), folder: project().join(name) };
        let tokens: Vec<u32> = (0..20).map(|i| i * 7 % 50).collect();
        let alone = fixture.load(cpu(1));
        let expected = Session::new(&alone, 1, 20).forward(&[(0, 0, &tokens)]).remove(0);
        let decoder = load(&fixture.checkpoint(), size).unwrap();
        let span = |start, len, pages: &[u32], slot| Span { start, len, pages: pages.to_vec(), slot };
        let mut cache = decoder.new_cache(16, 1, KvFormat::F32).unwrap();
        let rows = |cache: &mut _, spans: Vec<Span>| {
            let tokens = spans.iter().flat_map(|s| tokens[s.start..s.start + s.len].to_vec()).collect();
            let batch = recoup::backend::Batch { tokens, spans };
            let x = decoder.forward(&batch, cache, recoup::model::Wanted::All).unwrap();
            decoder.backend().to_host(&x).unwrap()
        };
        rows(&mut cache, vec![span(0, 12, &[0], 0)]);
        decoder.backend().grow(&mut cache, 5, 3).unwrap();
        decoder.backend().fork(&mut cache, &span(0, 12, &[0], 0), &span(12, 0, &[3], 2)).unwrap();
        decoder.backend().copy_state(&mut cache, 0, 2).unwrap();
        let both = rows(&mut cache, vec![span(12, 8, &[0, 1], 0), span(12, 8, &[3, 4], 2)]);
        let last = bits(&expected[12 * decoder.config.vocab..]);
        assert!(bits(&both) == [&last[..], &last[..]].concat(), "{name} by {size:?}");
    }
}

#[test]
fn what_is_observed_and_asked_for_wrongly_leaves_the_ranks_in_step() {
    let fixture = Fixture::own("modelopt/llama/nvfp4_four_over_six");
    let ids = fixture.input_ids();
    let alone = bits(&logits(&fixture.load(cpu(1)), &ids));
    for size in [size(2, 1), size(1, 2)] {
        let decoder = load(&fixture.checkpoint(), size).unwrap();
        // Tokens that there are none of, and pages.
        let vocab = decoder.config.vocab as u32;
        let wrong = Session::new(&decoder, 1, 16).try_forward(&[(0, 0, &[1, vocab, 2])]);
        assert!(wrong.unwrap_err().to_string().contains(&format!("{vocab} is outside the vocabulary")));
        let mut small = decoder.new_cache(16, 1, KvFormat::F32).unwrap();
        let wrong =
            decoder.forward(&recoup::backend::Batch::alone(vec![1; 40]), &mut small, recoup::model::Wanted::Last);
        assert!(wrong.err().unwrap().to_string().contains("the KV cache holds"));
        // All that goes between modules is looked at, on its way.
        let seen = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let counter = seen.clone();
        let observed = decoder.observed(Box::new(move |_: &str, _: &[f32]| {
            counter.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }));
        assert!(bits(&logits(&observed, &ids)) == alone, "{size:?}");
        assert!(seen.load(std::sync::atomic::Ordering::Relaxed) > 10);
        assert!(bits(&logits(&decoder, &ids)) == alone, "{size:?}");
    }
}

#[test]
fn weights_are_shared_out() {
    let checkpoint = Checkpoint::open(&project().join("models/books-nvfp4")).unwrap();
    let config = checkpoint.config().unwrap();
    for size in [size(2, 1), size(1, 2), size(2, 2)] {
        // Of every rank: the bytes of its rows.
        let mut own = vec![0usize; size.ranks()];
        let mut all = 0;
        let plan = config.plan(size).unwrap();
        for module in config.modules() {
            let (stage, cut) = plan.place(&module.name, module.role.n, size.tensor);
            all += module.role.n * module.role.k;
            for rank in 0..size.tensor {
                let rows = cut.as_ref().map_or(module.role.n, |cut| cut.0[rank].1);
                own[stage * size.tensor + rank] += rows * module.role.k;
            }
        }
        let most = *own.iter().max().unwrap();
        assert!(own.iter().sum::<usize>() == all, "{size:?}: {own:?} of {all}");
        assert!(most * size.ranks() < all * 2, "{size:?}: {own:?} of {all}");
    }
}
