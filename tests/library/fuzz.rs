//! What the fuzz targets run, under a plain driver: for where libFuzzer cannot be built. Inputs are kept that end with an error
//! nobody ended with before, which stands for the coverage that libFuzzer sees.

#[path = "../../fuzz/src/checkpoint.rs"]
mod checkpoint;
#[path = "../../fuzz/src/configuration.rs"]
mod configuration;
#[path = "../../fuzz/src/corpus.rs"]
mod corpus;
#[path = "../../fuzz/src/mutate.rs"]
mod mutate;
#[path = "../../fuzz/src/parts.rs"]
mod parts;

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use crate::support::{fused, project, tiny};
use mutate::Random;
use parts::Parts;

/// What an input takes at most.
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs mutations of `seeds` for $RECOUP_FUZZ_SECONDS.
fn drive(
    name: &str,
    seeds: Vec<(String, Vec<u8>)>,
    run: impl Fn(&[u8]) -> Result<(), String>,
    mutated: impl Fn(&[u8], u32) -> Option<Vec<u8>>,
) {
    let number = |variable: &str| std::env::var(variable).ok().and_then(|v| v.parse::<u64>().ok());
    let time = Duration::from_secs(number("RECOUP_FUZZ_SECONDS").unwrap_or(660));
    let mut random = Random::new(number("RECOUP_FUZZ_SEED").unwrap_or(1) as u32);
    let mut pool: Vec<Vec<u8>> = seeds.into_iter().map(|(_, bytes)| bytes).collect();
    let (mut seen, mut failed, mut runs, mut whole) = (HashSet::new(), Vec::new(), 0u64, 0u64);
    let begin = Instant::now();
    while begin.elapsed() < time && failed.len() < 10 {
        let parent = &pool[random.below(pool.len())];
        let mut input = mutated(parent, random.below(1 << 31) as u32).unwrap_or_else(|| parent.clone());
        // A byte now and then, where no structure says which.
        if random.below(6) == 0 && !input.is_empty() {
            let at = random.below(input.len());
            input[at] = random.below(256) as u8;
        }
        let start = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| run(&input)));
        runs += 1;
        let late = start.elapsed() > PATIENCE;
        match outcome {
            Ok(outcome) if !late => {
                whole += u64::from(outcome.is_ok());
                // Errors differ by more than their numbers and names.
                let told: String =
                    outcome.err().unwrap_or_default().chars().filter(char::is_ascii_alphabetic).collect();
                if input.len() < 60_000 && pool.len() < 4000 && seen.insert(told) {
                    pool.push(input);
                }
            }
            outcome => {
                let file = std::env::temp_dir().join(format!("recoup-fuzz-{name}-{}", failed.len()));
                std::fs::write(&file, &input).unwrap();
                failed.push((file, if late { "takes long" } else { "panics" }, outcome.is_err()));
            }
        }
    }
    println!("{name}: {runs} inputs in {:.0?}, {whole} of them computed, {} ends", begin.elapsed(), seen.len());
    assert!(failed.is_empty(), "{failed:?}");
    assert!(seen.len() > 20 && whole > 0);
}

#[test]
#[ignore = "runs for as long as RECOUP_FUZZ_SECONDS says, else eleven minutes"]
fn any_checkpoint_is_a_result_or_an_error() {
    drive("checkpoint", corpus::checkpoints(), checkpoint::run, checkpoint::mutated);
}

#[test]
#[ignore = "runs for as long as RECOUP_FUZZ_SECONDS says, else eleven minutes"]
fn any_configuration_is_a_model_or_an_error() {
    let seeds = corpus::configurations(&project().join("tests")).unwrap();
    drive("configuration", seeds, configuration::run, configuration::mutated);
}
