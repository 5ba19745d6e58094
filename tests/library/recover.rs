//! Training: every gradient against finite differences, a whole step against PyTorch's, and what training may not do.

use candle_core::{Device, Tensor, Var};
use recoup::backend::autograd::operand::{Operand, Precision, WeightGrid};
use recoup::backend::autograd::{AutogradBackend, Linear, loss};
use recoup::backend::{AttentionShape, Backend, Batch, CacheLayout, LayerCache, PAGE, Rotation, Span};
use recoup::checkpoint::Checkpoint;
use recoup::corpus::Row;
use recoup::formats::kv::KvFormat;
use recoup::formats::linear::{ActivationFormat, BlockScales, Element, LinearTensors, OutputScale};
use recoup::model::Decoder;
use recoup::recover::data::Data;
use recoup::recover::parameter::Learned;
use recoup::recover::student::Student;
use recoup::recover::{block, distill};

use crate::support::fixtures::{Fixture, cpu, deviation, logits, own_fixtures};
use crate::support::project;
use crate::support::random::Random;

pub(crate) fn tensor(values: &[f32], columns: usize) -> Tensor {
    Tensor::from_slice(values, (values.len() / columns, columns), &Device::Cpu).unwrap()
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

pub(crate) fn host(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

/// Compares the gradients of Σ weights · f(inputs) with central differences along random directions, input by input.
/// `inputs` are matrices: values and columns.
pub(crate) fn check_gradients(what: &str, inputs: &[(Vec<f32>, usize)], f: impl Fn(&[Tensor]) -> Tensor) {
    let mut random = Random(42);
    let vars: Vec<Var> = inputs.iter().map(|(v, c)| Var::from_tensor(&tensor(v, *c)).unwrap()).collect();
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let out = f(&tensors);
    let weights = random.values(out.elem_count());
    let gradients = loss::given(&out, 0.0, weights.clone()).unwrap().backward().unwrap();
    for (i, (values, columns)) in inputs.iter().enumerate() {
        let gradient = host(gradients.get(vars[i].as_tensor()).unwrap_or_else(|| panic!("{what}: input {i} has none")));
        assert!(gradient.iter().any(|g| *g != 0.0), "{what}: the gradient of input {i} is zero");
        // Whole directions, and single values: an error in few of them would not show in a direction.
        let mut directions: Vec<Vec<f32>> = (0..4).map(|_| random.values(values.len())).collect();
        for j in (0..values.len()).step_by((values.len() / 12).max(1)) {
            let mut one = vec![0.0; values.len()];
            one[j] = 1.0;
            directions.push(one);
        }
        for direction in directions {
            let length = dot(&direction, &direction).sqrt() as f32;
            let h = 2e-2 / length;
            let at = |sign: f32| {
                let moved: Vec<f32> = values.iter().zip(&direction).map(|(v, d)| v + sign * h * d).collect();
                let mut all = tensors.clone();
                all[i] = tensor(&moved, *columns);
                dot(&host(&f(&all)), &weights)
            };
            let difference = (at(1.0) - at(-1.0)) / (2.0 * f64::from(h));
            let exact = dot(&gradient, &direction);
            let size = (dot(&gradient, &gradient).sqrt() * f64::from(length)).max(exact.abs());
            assert!((difference - exact).abs() < 2e-3 * size, "{what}, input {i}: {difference} and {exact} of {size}");
        }
    }
}

fn attention_inputs(tokens: usize, shape: &AttentionShape, value_dim: usize) -> Vec<(Vec<f32>, usize)> {
    let mut random = Random(5);
    let widths = [shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.kv_heads * value_dim];
    widths.map(|width| (random.values(tokens * width), width)).to_vec()
}

#[test]
fn gradients_of_norm_and_activation_are_those_of_finite_differences() {
    let mut random = Random(1);
    let backend = AutogradBackend::new();
    let norm = backend.load_vector(random.values(24)).unwrap();
    check_gradients("rms_norm", &[(random.values(5 * 24), 24)], |x| backend.rms_norm(&x[0], &norm, 1e-5).unwrap());
    // Over heads, as Qwen3's: the weight's length is that of a head.
    check_gradients("rms_norm of heads", &[(random.values(5 * 48), 48)], |x| {
        backend.rms_norm(&x[0], &norm, 1e-5).unwrap()
    });
    check_gradients("silu_mul", &[(random.values(3 * 40), 40), (random.values(3 * 40), 40)], |x| {
        backend.silu_mul(x[0].clone(), &x[1]).unwrap()
    });
    check_gradients("add", &[(random.values(40), 8), (random.values(40), 8)], |x| {
        backend.add(x[0].clone(), &x[1]).unwrap()
    });
    check_gradients("add_rows", &[(random.values(40), 8), (random.values(24), 8)], |x| {
        backend.add_rows(x[0].clone(), &x[1], &[4, 0, 2], &[0.5, -1.0, 2.0]).unwrap()
    });
    check_gradients("select_rows", &[(random.values(40), 8)], |x| backend.select_rows(&x[0], &[3, 1, 1]).unwrap());
}

/// The gradient of a norm's weight is summed over calls, while it is trained.
#[test]
fn the_gradient_of_a_norms_weight_is_that_of_finite_differences() {
    let mut random = Random(2);
    let (n, x) = (24, Random(3).values(5 * 24));
    let weight = random.values(n);
    let out = random.values(x.len());
    let backend = AutogradBackend::new();
    let value = |w: &[f32]| {
        let norm = backend.load_vector(w.to_vec()).unwrap();
        2.0 * dot(&host(&backend.rms_norm(&tensor(&x, n), &norm, 1e-5).unwrap()), &out)
    };
    let norm = backend.load_vector(weight.clone()).unwrap();
    let step = || {
        let x = Var::from_tensor(&tensor(&x, n)).unwrap();
        let y = backend.rms_norm(x.as_tensor(), &norm, 1e-5).unwrap();
        loss::given(&y, 0.0, out.clone()).unwrap().backward().unwrap();
    };
    step();
    assert!(norm.gradient().is_none());
    norm.train();
    step();
    step();
    let gradient = norm.gradient().clone().unwrap();
    for (i, gradient) in gradient.iter().enumerate() {
        let moved =
            |h: f32| weight.iter().enumerate().map(|(j, w)| w + if i == j { h } else { 0.0 }).collect::<Vec<_>>();
        let difference = (value(&moved(1e-2)) - value(&moved(-1e-2))) / 2e-2;
        assert!((difference - f64::from(*gradient)).abs() < 2e-3, "{i}: {difference} {gradient}");
    }
}

#[test]
fn gradients_of_attention_are_those_of_finite_differences() {
    for (heads, kv_heads, value_dim, window, lengths, rope, kept) in [
        (2, 2, 8, None, &[7][..], Some(1), true),
        (4, 2, 5, None, &[5, 1, 9], Some(1), false),
        (3, 1, 8, Some(4), &[11, 3], None, true),
        (2, 1, 8, None, &[150], Some(1), true),
    ] {
        let shape =
            AttentionShape { layer: 0, cache: 0, heads, kv_heads, head_dim: 8, window, rope, scale: 0.4, growth: None };
        let tokens: usize = lengths.iter().sum();
        let mut batch = Batch { tokens: vec![0; tokens], spans: Vec::new() };
        let mut page = 0;
        for len in lengths {
            // What is not kept is computed all the same.
            let count = if kept { len.div_ceil(PAGE) as u32 } else { 0 };
            let pages = (page..page + count).collect();
            page += count;
            batch.spans.push(Span { start: 0, len: *len, pages, slot: 0 });
        }
        let backend = AutogradBackend::new();
        let rotation = |frequencies: &[f32]| Rotation { frequencies: frequencies.to_vec(), factor: 1.3 };
        let ropes = [rotation(&[0.9, 0.8, 0.7, 0.6]), rotation(&[1.0, 0.3, 0.1, 0.03])];
        let ropes = ropes.map(|r| backend.load_rope(r).unwrap());
        let pass = backend.prepare(&batch, &ropes.each_ref()).unwrap();
        let layer = LayerCache { format: KvFormat::F32, kv_heads, head_dim: 8, value_dim };
        let layout = CacheLayout { layers: vec![layer], pages: page as usize, ..CacheLayout::default() };
        check_gradients(&format!("attention {lengths:?}"), &attention_inputs(tokens, &shape, value_dim), |x| {
            let mut cache = backend.new_cache(&layout).unwrap();
            let (q, k, v) = (x[0].clone(), x[1].clone(), x[2].clone());
            backend.attention(q, k, v, None, &shape, &pass, &mut cache).unwrap()
        });
    }
}

/// A linear of floats.
pub(crate) fn float_linear<'a>(
    weight: &[f32],
    n: usize,
    scale: OutputScale,
    bias: bool,
    pre: Option<Vec<f32>>,
) -> LinearTensors<'a> {
    LinearTensors {
        name: "m".into(),
        n,
        k: weight.len() / n,
        element: Element::F32,
        data: weight.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>().into(),
        block_scales: BlockScales::None,
        output_scale: scale,
        activation: ActivationFormat::Float,
        pre_quant_scale: pre,
        rotation: None,
        bias: bias.then(|| vec![0.25; n]),
    }
}

#[test]
fn gradients_of_linears_are_those_of_finite_differences() {
    let mut random = Random(7);
    let (n, k, rows) = (6, 10, 4);
    let (a, b) = (random.values(n * k), random.values(n * k));
    let x = random.values(rows * k);
    for pre in [None, Some((0..k).map(|i| 0.5 + i as f32 / 8.0).collect::<Vec<_>>())] {
        let backend = AutogradBackend::new();
        let load = |w: &[f32]| backend.load_linear(float_linear(w, n, OutputScale::One, true, pre.clone())).unwrap();
        let (one, two) = (load(&a), load(&b));
        check_gradients("linears", &[(x.clone(), k)], |x| {
            let [y, z]: [Tensor; 2] = backend.linears(&x[0], &[&one, &two]).unwrap().try_into().unwrap();
            (y + z).unwrap()
        });
        // The weight's gradient, summed over two calls.
        let out = random.values(rows * n);
        let value = |w: &[f32]| {
            let y = backend.linears(&tensor(&x, k), &[&load(w)]).unwrap().remove(0);
            2.0 * dot(&host(&y), &out)
        };
        one.train();
        for _ in 0..2 {
            let x = Var::from_tensor(&tensor(&x, k)).unwrap();
            let y = backend.linears(x.as_tensor(), &[&one]).unwrap().remove(0);
            loss::given(&y, 0.0, out.clone()).unwrap().backward().unwrap();
        }
        let gradient = one.gradient().clone().unwrap();
        for (i, gradient) in gradient.iter().enumerate() {
            let moved =
                |h: f32| a.iter().enumerate().map(|(j, w)| w + if i == j { h } else { 0.0 }).collect::<Vec<_>>();
            let difference = (value(&moved(0.1)) - value(&moved(-0.1))) / 0.2;
            assert!((difference - f64::from(*gradient)).abs() < 1e-3, "{i}: {difference} {gradient}");
        }
    }
}

#[test]
fn gradients_of_the_losses_are_those_of_finite_differences() {
    let mut random = Random(11);
    let (rows, k, vocab) = (5, 8, 30);
    let (hidden, other) = (random.values(rows * k), random.values(rows * k));
    let backend = AutogradBackend::new();
    let mut head = || {
        let weight = random.values(vocab * k);
        backend.load_linear(float_linear(&weight, vocab, OutputScale::One, false, None)).unwrap()
    };
    let (student, teacher) = (head(), head());
    let weights = [1.0, 0.0, 1.0, 0.5, 2.0];
    let targets = [3, 0, 29, 7, 7];
    fn bundle<'a>(
        hidden: &'a Tensor,
        head: &'a Linear,
        teacher: Option<loss::Teacher<'a>>,
        targets: &'a [u32],
        weights: &'a [f32],
    ) -> loss::Rows<'a> {
        loss::Rows { hidden, head, teacher, targets, weights }
    }
    let objective = |kl, cross_entropy, temperature, top_k| loss::Objective { kl, cross_entropy, temperature, top_k };
    for o in [
        objective(1.0, 0.0, 1.0, None),
        objective(0.0, 1.0, 1.0, None),
        objective(0.6, 0.4, 2.5, None),
        objective(1.0, 0.0, 1.0, Some(5)),
        objective(0.5, 0.5, 0.7, Some(12)),
    ] {
        let reference = Some(loss::Teacher { hidden: &other, head: &teacher });
        check_gradients(&format!("{o:?}"), &[(hidden.clone(), k)], |x| {
            loss::next_token(&bundle(&x[0], &student, reference, &targets, &weights), 3.0, &o).unwrap().0
        });
        let x = tensor(&hidden, k);
        let (value, sums) = loss::next_token(&bundle(&x, &student, reference, &targets, &weights), 3.0, &o).unwrap();
        let expected = (f64::from(o.kl) * sums.kl + f64::from(o.cross_entropy) * sums.cross_entropy) / 3.0;
        assert!((f64::from(value.to_scalar::<f32>().unwrap()) - expected).abs() < 1e-5 * expected.abs());
        assert_eq!(loss::measure(&bundle(&x, &student, reference, &targets, &weights), &o).unwrap(), sums);
        assert_eq!(sums.weight, 4.5);
    }
    check_gradients("squared_error", &[(hidden, k)], |x| {
        loss::squared_error(&x[0], &other, &[1.0, 0.5, 0.0, 2.0, 1.0]).unwrap().0
    });
    let x = tensor(&other, k);
    assert!(
        loss::next_token(&bundle(&x, &student, None, &targets, &weights), 3.0, &objective(1.0, 0.0, 1.0, None))
            .is_err()
    );
    assert!(
        loss::next_token(&bundle(&x, &student, None, &[99; 5], &weights), 3.0, &objective(0.0, 1.0, 1.0, None))
            .is_err()
    );
    assert!(
        loss::next_token(&bundle(&x, &student, None, &[1; 4], &weights), 3.0, &objective(0.0, 1.0, 1.0, None)).is_err()
    );
}

/// Straight through the rounding, but nothing where an input is beyond the reach of its calibrated scale.
#[test]
fn gradients_pass_straight_through_within_reach_of_a_static_scale() {
    let (n, k) = (3, 32);
    let weight = Random(4).values(n * k);
    for (activation, reach) in [
        (ActivationFormat::Nvfp4 { global_scale: 1e-3 }, 2.688),
        (ActivationFormat::Fp8Static { scale: 5e-3 }, 2.24),
        (ActivationFormat::Fp8Token, f32::INFINITY),
    ] {
        let backend = AutogradBackend::new();
        let tensors = LinearTensors { activation, ..float_linear(&weight, n, OutputScale::One, false, None) };
        let linear = backend.load_linear(tensors).unwrap();
        let mut x: Vec<f32> = Random(9).values(2 * k);
        (x[3], x[40]) = (2.9, -50.0);
        let x_var = Var::from_tensor(&tensor(&x, k)).unwrap();
        let y = backend.linears(x_var.as_tensor(), &[&linear]).unwrap().remove(0);
        let out = Random(8).values(2 * n);
        let store = loss::given(&y, 0.0, out.clone()).unwrap().backward().unwrap();
        let gradient = host(store.get(x_var.as_tensor()).unwrap());
        for (i, g) in gradient.iter().enumerate() {
            let plain: f32 = (0..n).map(|j| out[i / k * n + j] * weight[j * k + i % k]).sum();
            let expected = if x[i].abs() <= reach { plain } else { 0.0 };
            assert!((g - expected).abs() < 1e-5, "{activation} at {i}: {g} {expected}");
        }
    }
}

fn fixture(name: &str) -> Checkpoint {
    Fixture::own(&format!("modelopt/llama/{name}")).checkpoint()
}

fn student(name: &str, precision: Precision) -> Student {
    Student::load(&fixture(name), None, AutogradBackend::with_precision(precision)).unwrap()
}

fn rows() -> Vec<Row> {
    (0..2).map(|s| Row::text((0..24).map(|t| ((s * 24 + t) * 37 + 11) % 256).collect())).collect()
}

/// `tests/data/recover/make_training_step.py` says what PyTorch computes here, in f64.
#[test]
fn a_training_step_is_that_of_pytorch() {
    let file = project().join("tests/data/recover/training_step.safetensors");
    let bytes = std::fs::read(file).unwrap();
    let golden = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let floats = |name: &str| -> Vec<f32> {
        golden.tensor(name).unwrap().data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    };
    let teacher = Decoder::load(AutogradBackend::new(), &fixture("bf16")).unwrap();
    let rows = rows();
    let rows: Vec<&Row> = rows.iter().collect();
    let mut compared = 0;
    for name in ["nvfp4_w4a16", "nvfp4_four_over_six"] {
        for (kl, ce) in [("1.0", "0.0"), ("0.0", "1.0"), ("0.7", "0.3")] {
            for recompute in [false, true] {
                let mut student = student(name, Precision::F32);
                student.train(|_| Learned::weight(true));
                let options = distill::Options {
                    kl: kl.parse().unwrap(),
                    cross_entropy: ce.parse().unwrap(),
                    recompute,
                    ..distill::Options::default()
                };
                let (sums, _) = distill::gradients(&student.decoder, Some(&teacher), &rows, 46.0, &options).unwrap();
                let case = format!("{name}/{kl}/{ce}");
                let expected = floats(&format!("{case}/losses"));
                assert_eq!(sums.weight, 46.0);
                for (what, sum, expected) in
                    [("KL", sums.kl, expected[0]), ("entropy", sums.cross_entropy, expected[1])]
                {
                    let asked = what == "entropy" || options.kl != 0.0;
                    let apart = (sum / 46.0 / f64::from(expected) - 1.0).abs();
                    assert!(!asked || apart < 1e-4, "{case}: {what} {} {expected}", sum / 46.0);
                }
                for p in student.parameters.iter().filter(|p| p.is_quantized()) {
                    let gradient = p.gradient().clone().unwrap();
                    let norm = dot(&gradient, &gradient).sqrt();
                    let expected = f64::from(floats(&format!("{case}/{}.norm", p.name))[0]);
                    assert!((norm / expected - 1.0).abs() < 1e-4, "{case} {}: {norm} {expected}", p.name);
                    let row = floats(&format!("{case}/{}.first_row", p.name));
                    let apart = deviation(&gradient[..row.len()], &row);
                    assert!(apart < 1e-4, "{case} {}: {apart}", p.name);
                    compared += 1;
                }
            }
        }
    }
    assert_eq!(compared, 2 * 3 * 2 * 14);
}

/// BF16 operands are exact where they are quantized, and gradients near those in f32.
#[test]
fn gradients_with_bf16_operands_are_near_those_in_f32() {
    let rows = rows();
    let rows: Vec<&Row> = rows.iter().collect();
    let gradients = |precision| {
        let teacher = Decoder::load(AutogradBackend::with_precision(precision), &fixture("bf16")).unwrap();
        let mut student = student("nvfp4_w4a16", precision);
        student.train(|_| Learned::weight(true));
        let options = distill::Options::default();
        let (sums, _) = distill::gradients(&student.decoder, Some(&teacher), &rows, 46.0, &options).unwrap();
        let all: Vec<Vec<f32>> = student.parameters.iter().map(|p| p.gradient().clone().unwrap()).collect();
        (sums.kl / 46.0, all)
    };
    let (exact, rounded) = (gradients(Precision::F32), gradients(Precision::Bf16));
    assert!((rounded.0 / exact.0 - 1.0).abs() < 0.02, "{} {}", rounded.0, exact.0);
    for (a, b) in exact.1.iter().zip(&rounded.1) {
        let cosine = dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
        assert!(cosine > 0.999, "{cosine}");
    }
}

/// The teacher as its own student: the KL is 0, and nothing is to be learned.
#[test]
fn distillation_from_itself_finds_nothing_to_do() {
    let teacher = Decoder::load(AutogradBackend::new(), &fixture("bf16")).unwrap();
    let own = Decoder::load(AutogradBackend::new(), &fixture("bf16")).unwrap();
    let linears: Vec<Linear> = own.linears().map(|l| Linear::clone(l)).collect();
    linears.iter().for_each(Linear::train);
    let rows = rows();
    let rows: Vec<&Row> = rows.iter().collect();
    let all = |options: &distill::Options| {
        let (sums, hidden) = distill::gradients(&own, Some(&teacher), &rows, 46.0, options).unwrap();
        let of = |l: &Linear| l.gradient().as_ref().unwrap().iter().fold(0.0f32, |m, g| m.max(g.abs()));
        (sums.kl + hidden, linears.iter().map(of).collect::<Vec<_>>())
    };
    for temperature in [1.0, 2.0] {
        for top_k in [None, Some(20)] {
            let (kl, gradients) =
                all(&distill::Options { temperature, top_k, hidden: 0.5, ..distill::Options::default() });
            assert!(kl < 1e-6, "{kl}");
            assert!(gradients.iter().all(|g| *g < 1e-8), "{gradients:?}");
        }
    }
    // The same with the text as its aim has something to learn in every linear but the embedding.
    let (_, gradients) = all(&distill::Options { kl: 0.0, cross_entropy: 1.0, ..distill::Options::default() });
    assert!(gradients[1..].iter().all(|g| *g > 1e-6), "{gradients:?}");
}

/// Every quantized linear of every architecture and format gets a gradient, by blocks and as a whole.
#[test]
fn every_trained_weight_receives_a_gradient() {
    let mut checked = 0;
    for fixture in own_fixtures() {
        let checkpoint = fixture.checkpoint();
        let Ok(mut student) = Student::load(&checkpoint, None, AutogradBackend::new()) else { continue };
        student.train(|_| Learned::weight(true));
        let vocab = student.decoder.config.vocab as u32;
        let row = Row::text((0..48).map(|t| (t * 29 + 5) % vocab).collect());
        let options = distill::Options { kl: 0.0, cross_entropy: 1.0, ..distill::Options::default() };
        distill::gradients(&student.decoder, None, &[&row], 47.0, &options).unwrap();
        for p in &student.parameters {
            let some = p.gradient().as_ref().unwrap().iter().any(|g| *g != 0.0);
            // Routing may leave an expert without a token.
            assert!(some || p.name.contains("experts"), "{}: {}", fixture.name, p.name);
            checked += 1;
        }
    }
    assert!(checked > 200, "{checked}");
}

/// The gradient of a block's scale: where values are rounded, straight through; where they are beyond reach, exactly.
#[test]
fn scales_get_the_gradient_of_learned_step_sizes() {
    let grid = WeightGrid::of(&LinearTensors {
        element: Element::E2m1,
        data: vec![0; 16].into(),
        block_scales: BlockScales::E4m3 { block: 16, codes: vec![0x38, 0x40].into() },
        ..float_linear(&[0.0; 32], 1, OutputScale::Tensor(0.5), false, None)
    });
    // Scales 0.5 and 1: codes of .3 and 4 (beyond reach) in the first block, of -1.4 in the second.
    let mut master = vec![0.0; 32];
    (master[0], master[1], master[16]) = (0.3, 4.0, -1.4);
    let mut gradient: Vec<f32> = (0..32).map(|i| 1.0 + i as f32).collect();
    let scales = grid.scale_gradient(&master, &mut gradient);
    let expected = [(0.25 - 0.3) + 2.0 * 3.0, 17.0 * (-1.5 + 1.4)];
    assert!(scales.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-5), "{scales:?} {expected:?}");
    assert_eq!((gradient[0], gradient[1], gradient[16]), (1.0, 0.0, 17.0));
    let wider = grid.with_block_scales([2.1, 0.0].into_iter());
    assert_eq!(wider.learnable_scales().unwrap(), [2.0, 0.001_953_125]);
    assert_eq!(wider.scale_codes(), [0x40, 0x01]);
}

/// Where weights are divided by scales that stay, values are linear in what they are multiplied by: differences of any size say
/// what the gradient of a scale's logarithm is, and codes are the same under all of them.
#[test]
fn scales_that_only_multiply_get_the_gradient_of_finite_differences() {
    let grid = WeightGrid::of(&LinearTensors {
        element: Element::E2m1,
        data: vec![0; 16].into(),
        block_scales: BlockScales::E4m3 { block: 16, codes: vec![0x38, 0x40].into() },
        ..float_linear(&[0.0; 32], 1, OutputScale::Tensor(0.5), false, None)
    })
    .with_frozen_divisors();
    // Scales 0.5 and 1; the second value is beyond reach.
    let mut master: Vec<f32> = (0..32).map(|i| (i * 7 % 13) as f32 / 4.0 - 1.5).collect();
    master[1] = 4.0;
    let gradient: Vec<f32> = (0..32).map(|i| 1.0 - i as f32 / 8.0).collect();
    let loss = |grid: &WeightGrid, block: usize| -> f32 {
        let Operand::F32(values) = grid.operand(Precision::F32, &master) else { unreachable!() };
        values.iter().zip(&gradient).skip(16 * block).take(16).map(|(v, g)| v * g).sum()
    };
    let mut passed = gradient.clone();
    let found = grid.scale_gradient(&master, &mut passed);
    for (block, found) in found.into_iter().enumerate() {
        let wider = grid.with_block_scales([1.25, 2.5].into_iter());
        let slope = (loss(&wider, block) - loss(&grid, block)) / 0.25;
        assert!((slope - found).abs() < 1e-4, "{block}: {slope} {found}");
        assert_eq!(wider.encode(&master), grid.encode(&master));
    }
    assert_eq!((passed[0], passed[1], passed[16]), (gradient[0], 0.0, gradient[16]));
}

/// What training computes with and what the packed kernels compute after it was written are the same, in both dialects.
#[test]
fn the_fake_quant_forward_and_the_packed_forward_agree_after_training() {
    let folder = tempfile::tempdir().unwrap();
    let teacher = |precision| Decoder::load(AutogradBackend::with_precision(precision), &fixture("bf16")).unwrap();
    let data = Data { rows: rows(), description: String::new() };
    for (i, name) in [
        "modelopt/llama/nvfp4_four_over_six",
        "modelopt/llama/nvfp4_w4a16",
        "compressed-tensors/llama/nvfp4",
        "compressed-tensors/llama/fp8_dynamic",
        "modelopt/llama/mxfp4",
        "modelopt/llama/mixed_fp8_attn_nvfp4_mlp",
    ]
    .into_iter()
    .enumerate()
    {
        let checkpoint = Fixture::own(name).checkpoint();
        let mut student = Student::load(&checkpoint, None, AutogradBackend::new()).unwrap();
        let before = logits(&student.decoder, &[data.rows[0].0[0].tokens.clone()]);
        let options = block::Options {
            steps: 60,
            learning_rate: 2e-3,
            sequences: 2,
            scales: i % 2 == 0,
            rounding: i % 3 == 1,
            ..block::Options::default()
        };
        student.allow_scales(false);
        let mut reports = Vec::new();
        block::train(&mut student, &teacher(Precision::F32), &data, &options, 0, &std::env::temp_dir(), &mut |r, _| {
            reports.push(*r);
            Ok(())
        })
        .unwrap();
        assert!(reports.iter().all(|r| r.after < r.before), "{name}: {reports:?}");
        let out = folder.path().join(i.to_string());
        student.write(&checkpoint, &[("note.txt", b"trained".to_vec())], &out).unwrap();
        assert_eq!(std::fs::read(out.join("note.txt")).unwrap(), b"trained");
        let written = Checkpoint::open(&out).unwrap();
        let scales = "model.layers.0.self_attn.q_proj.weight_scale";
        let of = |c: &Checkpoint| c.tensors.peek(scales).unwrap().bytes.to_vec();
        let learned = options.scales && name.contains("nvfp4") && !name.contains("mixed");
        assert_eq!(of(&written) != of(&checkpoint), learned, "{name}: scales");
        let packed = Decoder::load(cpu(0), &written).unwrap();
        let again = Student::load(&written, None, AutogradBackend::with_precision(Precision::Bf16)).unwrap();
        let tokens = [data.rows[0].0[0].tokens.clone()];
        let trained = logits(&student.decoder, &tokens);
        assert!(deviation(&trained, &before) > 1e-2, "{name}: training moved nothing");
        let (deployed, bf16) = (logits(&packed, &tokens), logits(&again.decoder, &tokens));
        assert!(deviation(&deployed, &trained) < 2e-3, "{name}: {}", deviation(&deployed, &trained));
        // BF16 rounds only what is not quantized: the head, and activations of W4A16.
        let bound = if name.ends_with("w4a16") { 2e-2 } else { 5e-3 };
        assert!(deviation(&bf16, &trained) < bound, "{name}: {}", deviation(&bf16, &trained));
    }
}

/// Training that harms a block on sequences that it does not see is undone, to the byte.
#[test]
fn a_block_that_training_made_worse_is_put_back() {
    let checkpoint = fixture("nvfp4_w4a16");
    let teacher = Decoder::load(AutogradBackend::new(), &fixture("bf16")).unwrap();
    let row = |s: u32| Row::text((0..24).map(|t| ((s * 24 + t) * 37 + 11) % 256).collect());
    let data = Data { rows: (0..24).map(row).collect(), description: String::new() };
    let masters = |s: &Student| s.parameters.iter().map(|p| p.master().to_vec()).collect::<Vec<_>>();
    for (learning_rate, harmful) in [(5.0, true), (1e-3, false)] {
        let mut student = Student::load(&checkpoint, None, AutogradBackend::new()).unwrap();
        let before = masters(&student);
        let options = block::Options { steps: 20, learning_rate, ..block::Options::default() };
        let mut reports = Vec::new();
        block::train(&mut student, &teacher, &data, &options, 0, &std::env::temp_dir(), &mut |r, _| {
            reports.push(*r);
            Ok(())
        })
        .unwrap();
        assert_eq!(reports.iter().all(|r| r.after == r.before), harmful, "{reports:?}");
        assert!(reports.iter().all(|r| r.after <= r.before), "{reports:?}");
        assert_eq!(masters(&student) == before, harmful);
    }
}
