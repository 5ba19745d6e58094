//! Mamba-2.

use super::*;

struct Mamba {
    mixer: Mamba2,
    weights: Mamba2Weights,
    rows: Vec<f32>,
}

impl Mamba {
    fn random(random: &mut Random, shape: Mamba2Shape, tokens: usize) -> Self {
        let (heads, channels) = (shape.heads, shape.channels());
        let weights = Mamba2Weights {
            conv1d: random.uniform(channels * shape.kernel, 0.8),
            conv1d_bias: (random.below(2) == 0).then(|| random.uniform(channels, 0.5)),
            a_log: random.uniform(heads, 1.5),
            d: random.uniform(heads, 1.0),
            dt_bias: random.uniform(heads, 2.0),
            norm: random.uniform(shape.inner(), 1.5),
        };
        let rows = random.uniform(tokens * shape.projected(), 2.0);
        Self { mixer: Mamba2::new(shape, weights.clone()).unwrap(), weights, rows }
    }
}

impl Subject for Mamba {
    fn tokens(&self) -> usize {
        self.rows.len() / self.mixer.shape().projected()
    }

    fn kept(&self) -> RecurrentShape {
        self.mixer.shape().kept()
    }

    fn inner(&self) -> usize {
        self.mixer.shape().inner()
    }

    fn run(&self, isa: Isa, batch: &[usize], spans: &[RecurrentSpan], states: &mut RecurrentStates) -> Vec<f32> {
        let width = self.mixer.shape().projected();
        let rows: Vec<f32> = batch.iter().flat_map(|t| &self.rows[t * width..(t + 1) * width]).copied().collect();
        let mut out = vec![f32::NAN; batch.len() * self.inner()];
        self.mixer.run(isa, &Threads::ambient(), &BufferPool::default(), &rows, spans, states, 1, &mut out).unwrap();
        out
    }

    fn exact(&self, sequence: Range<usize>) -> Vec<f64> {
        let shape = self.mixer.shape();
        let &Mamba2Shape { heads, head_dim, groups, state, eps, time_step_limit, .. } = shape;
        let (inner, channels, width) = (shape.inner(), shape.channels(), shape.projected());
        let rows: Vec<f64> =
            self.rows[sequence.start * width..sequence.end * width].iter().map(|v| f64::from(*v)).collect();
        let part = |from: usize, count: usize| -> Vec<f64> {
            rows.chunks_exact(width).flat_map(|row| row[from..from + count].to_vec()).collect()
        };
        let (z, u, dt) = (part(0, inner), part(inner, channels), part(inner + channels, heads));
        let bias = self.weights.conv1d_bias.clone().unwrap_or(vec![0.0; channels]);
        let v = exact_convolution(&u, channels, &self.weights.conv1d, &bias);
        let mut states = vec![0.0f64; inner * state];
        let mut out = Vec::new();
        for t in 0..sequence.len() {
            let v = &v[t * channels..(t + 1) * channels];
            let mut y = vec![0.0; inner];
            for h in 0..heads {
                let step = dt[t * heads + h] + f64::from(self.weights.dt_bias[h]);
                let step = (1.0 + step.exp()).ln().clamp(f64::from(time_step_limit.0), f64::from(time_step_limit.1));
                let decay = (-f64::from(self.weights.a_log[h]).exp() * step).exp();
                let group = h / (heads / groups);
                for p in 0..head_dim {
                    let x = v[h * head_dim + p];
                    for s in 0..state {
                        let at = &mut states[(h * head_dim + p) * state + s];
                        *at = decay * *at + step * x * v[inner + group * state + s];
                        y[h * head_dim + p] += v[inner + (groups + group) * state + s] * *at;
                    }
                    y[h * head_dim + p] += f64::from(self.weights.d[h]) * x;
                }
            }
            let r: Vec<f64> = y.iter().zip(&z[t * inner..]).map(|(y, z)| y * silu(*z)).collect();
            for (r, w) in r.chunks(inner / groups).zip(self.weights.norm.chunks(inner / groups)) {
                let mean = r.iter().map(|r| r * r).sum::<f64>() / r.len() as f64;
                out.extend(r.iter().zip(w).map(|(r, w)| r / (mean + f64::from(eps)).sqrt() * f64::from(*w)));
            }
        }
        out
    }
}

const SHAPE: Mamba2Shape = Mamba2Shape {
    heads: 6,
    head_dim: 16,
    groups: 2,
    state: 16,
    kernel: 4,
    eps: 1e-5,
    time_step_limit: (0.0, f32::INFINITY),
};

#[test]
fn mamba2_is_its_restatement_in_any_chunks_batch_threads_and_instruction_set() {
    let mut random = Random(17);
    let mut shapes = vec![
        SHAPE,
        Mamba2Shape { heads: 8, head_dim: 64, state: 128, groups: 1, ..SHAPE },
        Mamba2Shape { heads: 1, head_dim: 1, state: 1, groups: 1, kernel: 1, ..SHAPE },
        Mamba2Shape { time_step_limit: (0.3, 1.2), ..SHAPE },
    ];
    for _ in 0..12 {
        let groups = 1 + random.below(3);
        let mut upto = |n| 1 + random.below(n);
        let (heads, head_dim, state, kernel) = (groups * upto(3), upto(21), upto(40), upto(6));
        shapes.push(Mamba2Shape { heads, head_dim, groups, state, kernel, ..SHAPE });
    }
    assert_eq!(SHAPE.projected(), 262, "no multiple of 16");
    for shape in shapes {
        for tokens in [2, 5, 45] {
            let subject = Mamba::random(&mut random, shape, tokens);
            check(&subject, &format!("{shape:?}"), &mut random);
        }
    }
}

#[test]
fn mamba2_gives_what_transformers_gives_for_nemotron_h() {
    let (weights, reference) =
        (fixture("nemotron_h/bf16", "model.safetensors"), fixture("nemotron_h/bf16", "reference.safetensors"));
    let of = |name: &str| tensor(&weights, &format!("backbone.layers.0.mixer.{name}"));
    let captured = |name: &str| tensor(&reference, &format!("backbone.layers.0.mixer.{name}"));
    let mixer = Mamba2::new(
        SHAPE,
        Mamba2Weights {
            conv1d: of("conv1d.weight"),
            conv1d_bias: Some(of("conv1d.bias")),
            a_log: of("A_log"),
            d: of("D"),
            dt_bias: of("dt_bias"),
            norm: of("norm.weight"),
        },
    )
    .unwrap();
    let rows = project(&captured("input"), &of("in_proj.weight"), 80);
    let mut out = vec![0.0; 48 * SHAPE.inner()];
    let mut states = states(SHAPE.kept(), 2);
    mixer
        .run(Isa::detect(), &Threads::ambient(), &BufferPool::default(), &rows, &two_of_24(), &mut states, 1, &mut out)
        .unwrap();
    let off = deviation(&project(&out, &of("out_proj.weight"), SHAPE.inner()), &captured("output"));
    assert!(off < 1e-5, "{off:e}");
}

#[test]
fn mamba2_refuses_tensors_of_another_length_and_keeps_what_is_no_number() {
    let mut random = Random(3);
    let subject = Mamba::random(&mut random, SHAPE, 3);
    let w = &subject.weights;
    let wrong = [
        Mamba2Weights { conv1d: w.conv1d[1..].to_vec(), ..w.clone() },
        Mamba2Weights { conv1d_bias: Some(vec![0.0; 3]), ..w.clone() },
        Mamba2Weights { a_log: vec![0.0; 5], ..w.clone() },
        Mamba2Weights { d: vec![0.0; 7], ..w.clone() },
        Mamba2Weights { dt_bias: Vec::new(), ..w.clone() },
        Mamba2Weights { norm: vec![0.0; 16], ..w.clone() },
    ];
    for weights in wrong {
        assert!(Mamba2::new(SHAPE, weights).is_err());
    }
    assert!(Mamba2::new(Mamba2Shape { groups: 4, ..SHAPE }, w.clone()).is_err());
    assert!(Mamba2::new(Mamba2Shape { kernel: 0, ..SHAPE }, w.clone()).is_err());
    let spans = [RecurrentSpan { rows: 0..3, starts: true, slot: 0 }];
    let mut out = vec![0.0; 3 * SHAPE.inner()];
    let run = |rows: &[f32], out: &mut [f32]| {
        let mut states = states(SHAPE.kept(), 1);
        subject.mixer.run(Isa::detect(), &Threads::ambient(), &BufferPool::default(), rows, &spans, &mut states, 1, out)
    };
    assert!(run(&subject.rows[1..], &mut out).is_err());
    assert!(run(&subject.rows, &mut out[1..]).is_err());
    for at in 0..SHAPE.projected() {
        let mut rows = subject.rows.clone();
        rows[at] = f32::NAN;
        run(&rows, &mut out).unwrap();
        assert!(out[..SHAPE.inner()].iter().any(|v| v.is_nan()), "column {at} of the first token");
    }
}
