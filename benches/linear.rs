//! Packed matrix products by format, instruction set and number of tokens.
//!
//! `cargo bench --bench linear`; one line per format, throughput in multiply-adds.

use std::borrow::Cow;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use recoup::backend::Backend;
use recoup::backend::cpu::{CpuBackend, isa::Isa};
use recoup::formats::linear::{ActivationFormat, BlockScales, Element, LinearTensors, OutputScale};

/// SmolLM2-135M's up_proj.
const N: usize = 1536;
const K: usize = 576;

fn linear(element: Element, activation: ActivationFormat) -> LinearTensors<'static> {
    // 1.0 in every format, so that no product is denormal.
    let pattern: &[u8] = match element {
        Element::F32 => &[0, 0, 0x80, 0x3f],
        Element::F16 => &[0, 0x3c],
        Element::Bf16 => &[0x80, 0x3f],
        Element::E4m3 => &[0x38],
        Element::E2m1 => &[0x22],
    };
    let data = pattern.iter().copied().cycle().take(N * element.row_bytes(K)).collect();
    let block_scales = match element {
        Element::E2m1 => BlockScales::E4m3 { block: 16, codes: Cow::Owned(vec![0x38; N * K / 16]) },
        _ => BlockScales::None,
    };
    LinearTensors {
        name: "bench".into(),
        n: N,
        k: K,
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
        let mut group = c.benchmark_group(format!("linear {N}x{K} {isa}"));
        group.sample_size(20);
        for (name, element, activation) in formats {
            let weight = backend.load_linear(linear(element, activation)).expect("a kernel");
            for tokens in [1, 8, 512] {
                let x = backend.tensor((0..tokens * K).map(|i| (i % 13) as f32 - 6.0).collect(), K).expect("rows");
                group.throughput(Throughput::Elements((tokens * N * K) as u64));
                group.bench_function(BenchmarkId::new(name, tokens), |b| {
                    b.iter(|| backend.linears(&x, &[&weight]).expect("computes"));
                });
            }
        }
        group.finish();
    }
}

criterion_group!(all, benches);
criterion_main!(all);
