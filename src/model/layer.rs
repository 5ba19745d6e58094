//! What a decoder is made of: layers, each a list of residual steps x ← x + mixer(norm(x)).

use crate::backend::{Activation, AttentionShape, Backend, Ffn, Named, Run};
use crate::logits::RouterRule;

/// One layer.
pub(super) struct Layer<B: Backend> {
    pub steps: Vec<Step<B>>,
}

/// x ← x + mixer(norm(x)).
pub(super) struct Step<B: Backend> {
    pub norm: Named<B::Vector>,
    pub mixer: Mixer<B>,
    /// A norm of what the mixer gives.
    pub after: Option<Named<B::Vector>>,
}

/// What a residual step computes of its normed input.
pub(super) enum Mixer<B: Backend> {
    Attention(Box<Attention<B>>),
    Mamba(Box<Mamba<B>>),
    DeltaNet(Box<DeltaNet<B>>),
    Mlp(Mlp<B>),
    Mixture(Box<Mixture<B>>),
}

pub(super) struct Attention<B: Backend> {
    pub inputs: Inputs<B>,
    pub o: Named<B::Linear>,
    /// Norms over each head's queries and keys.
    pub norms: Option<[Named<B::Vector>; 2]>,
    pub sinks: Option<Named<B::Vector>>,
    pub shape: AttentionShape,
}

/// Where q, k and v come from.
pub(super) enum Inputs<B: Backend> {
    /// q, k and v.
    Separate([Named<B::Linear>; 3]),
    /// As before, but each head's query is followed by the gate of its output: runs of q, and of the gate.
    Gated([Named<B::Linear>; 3], [Vec<Run>; 2]),
    /// All in one: runs of q, k and v.
    Fused(Named<B::Linear>, [Vec<Run>; 3]),
    Latent(Latent<B>),
}

/// A narrow vector that others come of: its linear and its norm.
pub(super) type Narrow<B> = (Named<<B as Backend>::Linear>, Named<<B as Backend>::Vector>);

/// An expert that every token goes to, and its gate.
pub(super) type Shared<B> = (Mlp<B>, Option<Named<<B as Backend>::Linear>>);

/// Multi-head latent attention.
pub(super) struct Latent<B: Backend> {
    /// What queries come of, and its norm; `None`: the step's input.
    pub q_narrow: Option<Narrow<B>>,
    pub q: Named<B::Linear>,
    /// What keys and values come of, followed by the part of keys that turns; and the norm of the first.
    pub kv_narrow: Named<B::Linear>,
    pub kv_norm: Named<B::Vector>,
    pub kv: Named<B::Linear>,
    /// Of `q`; of `kv` and `kv_narrow`; of `kv`; and of `kv_narrow`, what keys and values come of.
    pub runs: [Vec<Run>; 4],
}

impl<B: Backend> Inputs<B> {
    fn linears(&self) -> Vec<&Named<B::Linear>> {
        match self {
            Self::Separate(qkv) | Self::Gated(qkv, _) => qkv.iter().collect(),
            Self::Fused(qkv, _) => vec![qkv],
            Self::Latent(l) => {
                let narrow = l.q_narrow.iter().map(|(linear, _)| linear);
                narrow.chain([&l.q, &l.kv_narrow, &l.kv]).collect()
            }
        }
    }

    fn linears_mut(&mut self) -> Vec<&mut Named<B::Linear>> {
        match self {
            Self::Separate(qkv) | Self::Gated(qkv, _) => qkv.iter_mut().collect(),
            Self::Fused(qkv, _) => vec![qkv],
            Self::Latent(l) => {
                let narrow = l.q_narrow.iter_mut().map(|(linear, _)| linear);
                narrow.chain([&mut l.q, &mut l.kv_narrow, &mut l.kv]).collect()
            }
        }
    }

    fn vectors(&self) -> Vec<&Named<B::Vector>> {
        match self {
            Self::Latent(l) => l.q_narrow.iter().map(|(_, norm)| norm).chain([&l.kv_norm]).collect(),
            _ => Vec::new(),
        }
    }

    fn map<C: Backend>(
        &self,
        linear: impl Fn(&Named<B::Linear>) -> Named<C::Linear>,
        vector: impl Fn(&Named<B::Vector>) -> Named<C::Vector>,
    ) -> Inputs<C> {
        match self {
            Self::Separate(qkv) => Inputs::Separate(qkv.each_ref().map(linear)),
            Self::Gated(qkv, runs) => Inputs::Gated(qkv.each_ref().map(linear), runs.clone()),
            Self::Fused(qkv, runs) => Inputs::Fused(linear(qkv), runs.clone()),
            Self::Latent(l) => Inputs::Latent(Latent {
                q_narrow: l.q_narrow.as_ref().map(|(l, norm)| (linear(l), vector(norm))),
                q: linear(&l.q),
                kv_narrow: linear(&l.kv_narrow),
                kv_norm: vector(&l.kv_norm),
                kv: linear(&l.kv),
                runs: l.runs.clone(),
            }),
        }
    }
}

pub(super) struct Mamba<B: Backend> {
    pub input: Named<B::Linear>,
    pub output: Named<B::Linear>,
    pub mixer: Named<B::Mamba>,
    /// Index among the cache's recurrent layers.
    pub cache: usize,
}

pub(super) struct DeltaNet<B: Backend> {
    /// q, k and v; z; b; a.
    pub inputs: [Named<B::Linear>; 4],
    pub output: Named<B::Linear>,
    pub mixer: Named<B::DeltaNet>,
    /// Index among the cache's recurrent layers.
    pub cache: usize,
}

/// down(activation(gate x, up x)).
pub(super) struct Mlp<B: Backend> {
    pub gate: Option<Named<B::Linear>>,
    pub up: Named<B::Linear>,
    pub down: Named<B::Linear>,
    pub activation: Activation,
}

pub(super) struct Mixture<B: Backend> {
    pub router: Named<B::Linear>,
    pub experts: Vec<Mlp<B>>,
    pub rule: RouterRule,
    /// What experts read instead of the step's input, and what makes their sum one of its width again.
    pub latent: Option<[Named<B::Linear>; 2]>,
    /// An expert that every token goes to, and its gate.
    pub shared: Option<Shared<B>>,
}

impl<B: Backend> Layer<B> {
    /// The same layer with other linears and vectors, on another backend perhaps whose mixers are the same.
    pub fn map<C: Backend<Mamba = B::Mamba, DeltaNet = B::DeltaNet>>(
        &self,
        linear: impl Fn(&Named<B::Linear>) -> Named<C::Linear>,
        vector: impl Fn(&Named<B::Vector>) -> Named<C::Vector>,
    ) -> Layer<C> {
        let mlp = |m: &Mlp<B>| Mlp {
            gate: m.gate.as_ref().map(&linear),
            up: linear(&m.up),
            down: linear(&m.down),
            activation: m.activation,
        };
        let mixer = |m: &Mixer<B>| match m {
            Mixer::Attention(a) => Mixer::Attention(Box::new(Attention {
                inputs: a.inputs.map(&linear, &vector),
                o: linear(&a.o),
                norms: a.norms.as_ref().map(|[q, k]| [vector(q), vector(k)]),
                sinks: a.sinks.as_ref().map(&vector),
                shape: a.shape,
            })),
            Mixer::Mamba(m) => Mixer::Mamba(Box::new(Mamba {
                input: linear(&m.input),
                output: linear(&m.output),
                mixer: m.mixer.clone(),
                cache: m.cache,
            })),
            Mixer::DeltaNet(d) => Mixer::DeltaNet(Box::new(DeltaNet {
                inputs: d.inputs.each_ref().map(&linear),
                output: linear(&d.output),
                mixer: d.mixer.clone(),
                cache: d.cache,
            })),
            Mixer::Mlp(m) => Mixer::Mlp(mlp(m)),
            Mixer::Mixture(m) => Mixer::Mixture(Box::new(Mixture {
                router: linear(&m.router),
                experts: m.experts.iter().map(mlp).collect(),
                rule: m.rule.clone(),
                latent: m.latent.as_ref().map(|l| l.each_ref().map(&linear)),
                shared: m.shared.as_ref().map(|(m, gate)| (mlp(m), gate.as_ref().map(&linear))),
            })),
        };
        Layer {
            steps: self
                .steps
                .iter()
                .map(|s| Step { norm: vector(&s.norm), mixer: mixer(&s.mixer), after: s.after.as_ref().map(&vector) })
                .collect(),
        }
    }

    /// Its linears, in the order of the forward pass.
    pub fn linears(&self) -> Vec<&Named<B::Linear>> {
        let mut out = Vec::new();
        for step in &self.steps {
            match &step.mixer {
                Mixer::Attention(a) => out.extend(a.inputs.linears().into_iter().chain([&a.o])),
                Mixer::Mamba(m) => out.extend([&m.input, &m.output]),
                Mixer::DeltaNet(d) => out.extend(d.inputs.iter().chain([&d.output])),
                Mixer::Mlp(m) => out.extend(m.linears()),
                Mixer::Mixture(m) => {
                    out.push(&m.router);
                    out.extend(m.latent.iter().flatten());
                    out.extend(m.experts.iter().flat_map(Mlp::linears));
                    out.extend(m.shared.iter().flat_map(|(m, gate)| m.linears().chain(gate)));
                }
            }
        }
        out
    }

    /// Its linears, to be replaced.
    pub fn linears_mut(&mut self) -> Vec<&mut Named<B::Linear>> {
        let mut out = Vec::new();
        for step in &mut self.steps {
            match &mut step.mixer {
                Mixer::Attention(a) => out.extend(a.inputs.linears_mut().into_iter().chain([&mut a.o])),
                Mixer::Mamba(m) => out.extend([&mut m.input, &mut m.output]),
                Mixer::DeltaNet(d) => out.extend(d.inputs.iter_mut().chain([&mut d.output])),
                Mixer::Mlp(m) => out.extend(m.linears_mut()),
                Mixer::Mixture(m) => {
                    out.push(&mut m.router);
                    out.extend(m.latent.iter_mut().flatten());
                    out.extend(m.experts.iter_mut().flat_map(Mlp::linears_mut));
                    out.extend(m.shared.iter_mut().flat_map(|(m, gate)| m.linears_mut().chain(gate)));
                }
            }
        }
        out
    }

    /// Its norms and sinks, in the order of the forward pass.
    pub fn vectors(&self) -> Vec<&Named<B::Vector>> {
        let mut out = Vec::new();
        for step in &self.steps {
            out.push(&step.norm);
            if let Mixer::Attention(a) = &step.mixer {
                out.extend(a.inputs.vectors());
                out.extend(a.norms.iter().flatten().chain(&a.sinks));
            }
            out.extend(&step.after);
        }
        out
    }
}

impl<B: Backend> Mixer<B> {
    /// The linears that read the step's normed input, where that is all that reads it.
    pub fn readers(&self) -> Vec<&B::Linear> {
        match self {
            Self::Attention(a) => match &a.inputs {
                Inputs::Separate(qkv) | Inputs::Gated(qkv, _) => qkv.iter().map(|l| &**l).collect(),
                Inputs::Fused(qkv, _) => vec![qkv],
                Inputs::Latent(_) => Vec::new(),
            },
            Self::Mamba(m) => vec![&m.input],
            Self::Mlp(m) => m.gate.iter().map(|g| &**g).chain([&*m.up]).collect(),
            Self::DeltaNet(_) | Self::Mixture(_) => Vec::new(),
        }
    }
}

impl<B: Backend> Mlp<B> {
    /// As the backend takes it.
    pub fn ffn(&self) -> Ffn<'_, B::Linear> {
        Ffn { gate: self.gate.as_deref(), up: &self.up, down: &self.down, activation: self.activation }
    }

    fn linears(&self) -> impl Iterator<Item = &Named<B::Linear>> {
        self.gate.iter().chain([&self.up, &self.down])
    }

    fn linears_mut(&mut self) -> impl Iterator<Item = &mut Named<B::Linear>> {
        self.gate.iter_mut().chain([&mut self.up, &mut self.down])
    }
}
