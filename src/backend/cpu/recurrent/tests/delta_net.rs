//! The gated delta net.

use super::*;

struct Delta {
    mixer: DeltaNet,
    weights: DeltaNetWeights,
    /// qkv, z, a and b of the stream, with their widths.
    rows: [(Vec<f32>, usize); 4],
}

impl Delta {
    fn random(random: &mut Random, shape: DeltaNetShape, tokens: usize) -> Self {
        let weights = DeltaNetWeights {
            conv1d: random.uniform(shape.channels() * shape.kernel, 0.8),
            a_log: random.uniform(shape.value_heads, 1.5),
            dt_bias: random.uniform(shape.value_heads, 2.0),
            norm: random.uniform(shape.value_dim, 1.5),
        };
        let widths = [shape.channels(), shape.inner(), shape.value_heads, shape.value_heads];
        let rows = widths.map(|width| (random.uniform(tokens * width, 2.0), width));
        Self { mixer: DeltaNet::new(shape, weights.clone()).unwrap(), weights, rows }
    }

    fn batch(&self, tokens: impl Iterator<Item = usize> + Clone) -> [Vec<f32>; 4] {
        self.rows
            .each_ref()
            .map(|(rows, width)| tokens.clone().flat_map(|t| &rows[t * width..(t + 1) * width]).copied().collect())
    }
}

impl Subject for Delta {
    fn tokens(&self) -> usize {
        self.rows[0].0.len() / self.rows[0].1
    }

    fn kept(&self) -> RecurrentShape {
        self.mixer.shape().kept()
    }

    fn inner(&self) -> usize {
        self.mixer.shape().inner()
    }

    fn run(&self, isa: Isa, batch: &[usize], spans: &[RecurrentSpan], states: &mut RecurrentStates) -> Vec<f32> {
        let [qkv, z, a, b] = &self.batch(batch.iter().copied());
        let mut out = vec![f32::NAN; batch.len() * self.inner()];
        let inputs = DeltaNetInputs { qkv, z, a, b };
        self.mixer.run(isa, &Threads::ambient(), &BufferPool::default(), inputs, spans, states, 1, &mut out).unwrap();
        out
    }

    fn exact(&self, sequence: Range<usize>) -> Vec<f64> {
        let shape = self.mixer.shape();
        let &DeltaNetShape { key_heads, value_heads, key_dim, value_dim, eps, .. } = shape;
        let (inner, channels, tokens) = (shape.inner(), shape.channels(), sequence.len());
        let [qkv, z, a, b] = self.batch(sequence).map(|x| x.iter().map(|v| f64::from(*v)).collect::<Vec<_>>());
        let v = exact_convolution(&qkv, channels, &self.weights.conv1d, &vec![0.0; channels]);
        let mut states = vec![0.0f64; inner * key_dim];
        let mut out = Vec::new();
        let unit = |x: &[f64], scale: f64| -> Vec<f64> {
            let length = (x.iter().map(|x| x * x).sum::<f64>() + 1e-6).sqrt();
            x.iter().map(|x| x / length * scale).collect()
        };
        for t in 0..tokens {
            let [queries, keys, values] = {
                let (queries, rest) = v[t * channels..(t + 1) * channels].split_at(key_heads * key_dim);
                let (keys, values) = rest.split_at(key_heads * key_dim);
                [queries, keys, values]
            };
            for h in 0..value_heads {
                let key_head = h / (value_heads / key_heads) * key_dim;
                let q = unit(&queries[key_head..][..key_dim], 1.0 / (key_dim as f64).sqrt());
                let k = unit(&keys[key_head..][..key_dim], 1.0);
                let beta = 1.0 / (1.0 + (-b[t * value_heads + h]).exp());
                let step = (1.0 + (a[t * value_heads + h] + f64::from(self.weights.dt_bias[h])).exp()).ln();
                let decay = (-f64::from(self.weights.a_log[h]).exp() * step).exp();
                // [value_dim][key_dim]
                let state = &mut states[h * value_dim * key_dim..][..value_dim * key_dim];
                let mut o = Vec::new();
                for (j, row) in state.chunks_exact_mut(key_dim).enumerate() {
                    row.iter_mut().for_each(|s| *s *= decay);
                    let held: f64 = row.iter().zip(&k).map(|(s, k)| s * k).sum();
                    let d = beta * (values[h * value_dim + j] - held);
                    row.iter_mut().zip(&k).for_each(|(s, k)| *s += k * d);
                    o.push(row.iter().zip(&q).map(|(s, q)| s * q).sum::<f64>());
                }
                let mean = o.iter().map(|o| o * o).sum::<f64>() / value_dim as f64;
                out.extend(o.iter().zip(&self.weights.norm).enumerate().map(|(j, (o, w))| {
                    o / (mean + f64::from(eps)).sqrt() * f64::from(*w) * silu(z[t * inner + h * value_dim + j])
                }));
            }
        }
        out
    }
}

const SHAPE: DeltaNetShape =
    DeltaNetShape { key_heads: 2, value_heads: 4, key_dim: 16, value_dim: 16, kernel: 4, eps: 1e-6 };

#[test]
fn the_delta_net_is_its_restatement_in_any_chunks_batch_threads_and_instruction_set() {
    let mut random = Random(29);
    let mut shapes = vec![
        SHAPE,
        DeltaNetShape { key_heads: 2, value_heads: 6, key_dim: 128, value_dim: 128, ..SHAPE },
        DeltaNetShape { key_heads: 1, value_heads: 1, key_dim: 1, value_dim: 2, kernel: 1, ..SHAPE },
    ];
    for _ in 0..12 {
        let mut upto = |n| 1 + random.below(n);
        let (key_heads, key_dim, value_dim, kernel) = (upto(3), upto(40), 1 + upto(21), upto(6));
        shapes.push(DeltaNetShape { key_heads, value_heads: key_heads * upto(3), key_dim, value_dim, kernel, ..SHAPE });
    }
    for shape in shapes {
        for tokens in [2, 5, 45] {
            let subject = Delta::random(&mut random, shape, tokens);
            check(&subject, &format!("{shape:?}"), &mut random);
        }
    }
}

#[test]
fn the_delta_net_gives_what_transformers_gives_for_qwen3_5() {
    let (weights, reference) =
        (fixture("qwen3_5/bf16", "model.safetensors"), fixture("qwen3_5/bf16", "reference.safetensors"));
    let of = |name: &str| tensor(&weights, &format!("model.language_model.layers.0.linear_attn.{name}"));
    let captured = |name: &str| tensor(&reference, &format!("model.language_model.layers.0.linear_attn.{name}"));
    let mixer = DeltaNet::new(
        SHAPE,
        DeltaNetWeights {
            conv1d: of("conv1d.weight"),
            a_log: of("A_log"),
            dt_bias: of("dt_bias"),
            norm: of("norm.weight"),
        },
    )
    .unwrap();
    let x = captured("input");
    let [qkv, z, a, b] = &["qkv", "z", "a", "b"].map(|name| project(&x, &of(&format!("in_proj_{name}.weight")), 80));
    let mut out = vec![0.0; 48 * SHAPE.inner()];
    let mut states = states(SHAPE.kept(), 2);
    let inputs = DeltaNetInputs { qkv, z, a, b };
    mixer
        .run(Isa::detect(), &Threads::ambient(), &BufferPool::default(), inputs, &two_of_24(), &mut states, 1, &mut out)
        .unwrap();
    let off = deviation(&project(&out, &of("out_proj.weight"), SHAPE.inner()), &captured("output"));
    assert!(off < 1e-5, "{off:e}");
}

#[test]
fn the_delta_net_refuses_tensors_of_another_length_and_keeps_what_is_no_number() {
    let mut random = Random(3);
    let subject = Delta::random(&mut random, SHAPE, 3);
    let w = &subject.weights;
    let wrong = [
        DeltaNetWeights { conv1d: w.conv1d[1..].to_vec(), ..w.clone() },
        DeltaNetWeights { a_log: vec![0.0; 5], ..w.clone() },
        DeltaNetWeights { dt_bias: Vec::new(), ..w.clone() },
        DeltaNetWeights { norm: vec![0.0; 15], ..w.clone() },
    ];
    for weights in wrong {
        assert!(DeltaNet::new(SHAPE, weights).is_err());
    }
    assert!(DeltaNet::new(DeltaNetShape { value_heads: 5, ..SHAPE }, w.clone()).is_err());
    assert!(DeltaNet::new(DeltaNetShape { key_heads: 0, ..SHAPE }, w.clone()).is_err());
    let spans = [RecurrentSpan { rows: 0..3, starts: true, slot: 0 }];
    let mut out = vec![0.0; 3 * SHAPE.inner()];
    let whole = subject.batch(0..3);
    for part in 0..4 {
        for at in 0..whole[part].len() / 3 {
            let mut rows = whole.clone();
            rows[part][at] = f32::NAN;
            let [qkv, z, a, b] = &rows;
            let (inputs, mut states) = (DeltaNetInputs { qkv, z, a, b }, states(SHAPE.kept(), 1));
            let pool = BufferPool::default();
            subject
                .mixer
                .run(Isa::detect(), &Threads::ambient(), &pool, inputs, &spans, &mut states, 1, &mut out)
                .unwrap();
            let seen = if part == 2 { &out[..] } else { &out[..SHAPE.inner()] };
            assert!(seen.iter().any(|v| v.is_nan()), "input {part}, column {at} of the first token");
        }
        let mut rows = whole.clone();
        rows[part].pop();
        let [qkv, z, a, b] = &rows;
        let (inputs, mut states) = (DeltaNetInputs { qkv, z, a, b }, states(SHAPE.kept(), 1));
        let pool = BufferPool::default();
        let result =
            subject.mixer.run(Isa::detect(), &Threads::ambient(), &pool, inputs, &spans, &mut states, 1, &mut out);
        assert!(result.is_err(), "input {part}");
    }
}
