//! Packed matrix products by format, instruction set and number of tokens, of a weight that a cache holds and of many that none
//! does: what decoding reads.
//!
//! `cargo bench --bench linear`; for each format its throughput, in multiply-adds, from memory in bytes of weights, and the share that
//! this is of what the machine multiplies at best (bytes where both sides have four bits, else f32), or reads.

use std::borrow::Cow;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use recoup::backend::Backend;
use recoup::backend::cpu::{CpuBackend, isa::Isa};
use recoup::formats::linear::{ActivationFormat, BlockScales, Element, LinearTensors, OutputScale};

/// SmolLM2-135M's up_proj.
const SMALL: [usize; 2] = [1536, 576];
/// Llama-3.2-1B's gate_proj.
const LARGE: [usize; 2] = [8192, 2048];
/// Bytes of large weights that are gone through before one is read again.
const BEYOND_CACHES: usize = 256 << 20;

fn linear([n, k]: [usize; 2], element: Element, activation: ActivationFormat) -> LinearTensors<'static> {
    // 1.0 in every format, so that no product is denormal.
    let pattern: &[u8] = match element {
        Element::F32 => &[0, 0, 0x80, 0x3f],
        Element::F16 => &[0, 0x3c],
        Element::Bf16 => &[0x80, 0x3f],
        Element::E4m3 => &[0x38],
        Element::E2m1 => &[0x22],
    };
    let data = pattern.iter().copied().cycle().take(n * element.row_bytes(k)).collect();
    let block_scales = match element {
        Element::E2m1 => BlockScales::E4m3 { block: 16, codes: Cow::Owned(vec![0x38; n * k / 16]) },
        _ => BlockScales::None,
    };
    LinearTensors {
        name: "bench".into(),
        n,
        k,
        element,
        data: Cow::Owned(data),
        block_scales,
        output_scale: OutputScale::One,
        activation,
        pre_quant_scale: None,
        rotation: None,
        bias: None,
    }
}

fn benches(c: &mut Criterion) {
    let formats = [
        ("nvfp4 w4a4", Element::E2m1, ActivationFormat::Nvfp4 { global_scale: 1e-3 }),
        ("nvfp4 w4a16", Element::E2m1, ActivationFormat::Float),
        ("fp8 static", Element::E4m3, ActivationFormat::Fp8Static { scale: 1e-2 }),
        ("bf16", Element::Bf16, ActivationFormat::Float),
    ];
    for isa in Isa::available().into_iter().skip(1) {
        let backend = CpuBackend::new(isa, 0).expect("threads");
        let (memory, peak) = (backend.memory_speed(), backend.peak());
        println!("{isa}: memory gives {:.0} GB/s, {peak:.0?}", memory / 1e9);
        for [n, k] in [SMALL, LARGE] {
            let from_memory = [n, k] == LARGE;
            let mut group = c.benchmark_group(format!("linear {n}x{k} {isa}"));
            group.sample_size(20);
            for (name, element, activation) in formats {
                let load = || backend.load_linear(linear([n, k], element, activation)).expect("a kernel");
                let mut weights = vec![load()];
                let bytes = backend.resident_bytes(&weights[0]);
                while from_memory && weights.len() * bytes < BEYOND_CACHES {
                    weights.push(load());
                }
                for tokens in if from_memory { [1, 2, 8] } else { [1, 8, 512] } {
                    let x = backend.tensor((0..tokens * k).map(|i| (i % 13) as f32 - 6.0).collect(), k).expect("rows");
                    let integers = matches!(activation, ActivationFormat::Nvfp4 { .. });
                    let products = (tokens * n * k) as f64;
                    let (throughput, floor, limit) = if from_memory {
                        (Throughput::Bytes(bytes as u64), bytes as f64 / memory, "memory")
                    } else {
                        let best = peak.integers.filter(|_| integers).unwrap_or(peak.floats);
                        (Throughput::Elements(products as u64), products / best, "multiply-adds")
                    };
                    group.throughput(throughput);
                    let mut turn = weights.iter().cycle();
                    let mut fastest = Duration::MAX;
                    group.bench_function(BenchmarkId::new(name, tokens), |b| {
                        b.iter_custom(|times| {
                            let start = Instant::now();
                            for _ in 0..times {
                                backend.linears(&x, &[turn.next().expect("a weight")]).expect("computes");
                            }
                            let taken = start.elapsed();
                            fastest = fastest.min(taken.div_f64(times as f64));
                            taken
                        });
                    });
                    // A filter on the command line leaves some out.
                    if fastest < Duration::MAX {
                        let share = floor / fastest.as_secs_f64();
                        println!("{name}, {tokens} tokens: {:.0} % of this machine's {limit}", 100.0 * share);
                    }
                }
            }
            group.finish();
        }
    }
}

criterion_group!(all, benches);
criterion_main!(all);
