//! What a decoder is made of: layers, each a list of residual steps x ← x + mixer(norm(x)).

use crate::backend::{AttentionShape, Backend, Choice, Named};

/// One layer.
pub(super) struct Layer<B: Backend> {
    pub steps: Vec<Step<B>>,
}

/// x ← x + mixer(norm(x)).
pub(super) struct Step<B: Backend> {
    pub norm: Named<B::Norm>,
    pub mixer: Mixer<B>,
}

/// What a residual step computes of its normed input.
pub(super) enum Mixer<B: Backend> {
    Attention(Box<Attention<B>>),
    Mlp(Mlp<B>),
    Mixture { router: Named<B::Linear>, experts: Vec<Mlp<B>>, choice: Choice },
}

pub(super) struct Attention<B: Backend> {
    pub q: Named<B::Linear>,
    pub k: Named<B::Linear>,
    pub v: Named<B::Linear>,
    pub o: Named<B::Linear>,
    /// Norms over each head's queries and keys.
    pub heads: Option<[Named<B::Norm>; 2]>,
    pub shape: AttentionShape,
}

/// down(silu(gate x) · up x).
pub(super) struct Mlp<B: Backend> {
    pub gate: Named<B::Linear>,
    pub up: Named<B::Linear>,
    pub down: Named<B::Linear>,
}

impl<B: Backend> Layer<B> {
    /// The same layer of what `linear` and `norm` make of its parts, on another backend perhaps.
    pub fn map<C: Backend>(
        &self,
        linear: impl Fn(&Named<B::Linear>) -> Named<C::Linear>,
        norm: impl Fn(&Named<B::Norm>) -> Named<C::Norm>,
    ) -> Layer<C> {
        let mlp = |m: &Mlp<B>| Mlp { gate: linear(&m.gate), up: linear(&m.up), down: linear(&m.down) };
        let mixer = |m: &Mixer<B>| match m {
            Mixer::Attention(a) => Mixer::Attention(Box::new(Attention {
                q: linear(&a.q),
                k: linear(&a.k),
                v: linear(&a.v),
                o: linear(&a.o),
                heads: a.heads.as_ref().map(|[q, k]| [norm(q), norm(k)]),
                shape: a.shape,
            })),
            Mixer::Mlp(m) => Mixer::Mlp(mlp(m)),
            Mixer::Mixture { router, experts, choice } => {
                Mixer::Mixture { router: linear(router), experts: experts.iter().map(mlp).collect(), choice: *choice }
            }
        };
        Layer { steps: self.steps.iter().map(|s| Step { norm: norm(&s.norm), mixer: mixer(&s.mixer) }).collect() }
    }

    /// Its linears, in the order of the forward pass.
    pub fn linears(&self) -> Vec<&Named<B::Linear>> {
        let mut out = Vec::new();
        for step in &self.steps {
            match &step.mixer {
                Mixer::Attention(a) => out.extend([&a.q, &a.k, &a.v, &a.o]),
                Mixer::Mlp(m) => out.extend(m.linears()),
                Mixer::Mixture { router, experts, .. } => {
                    out.push(router);
                    out.extend(experts.iter().flat_map(Mlp::linears));
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
                Mixer::Attention(a) => out.extend([&mut a.q, &mut a.k, &mut a.v, &mut a.o]),
                Mixer::Mlp(m) => out.extend(m.linears_mut()),
                Mixer::Mixture { router, experts, .. } => {
                    out.push(router);
                    out.extend(experts.iter_mut().flat_map(Mlp::linears_mut));
                }
            }
        }
        out
    }

    /// Its norms, in the order of the forward pass.
    pub fn norms(&self) -> Vec<&Named<B::Norm>> {
        let mut out = Vec::new();
        for step in &self.steps {
            out.push(&step.norm);
            if let Mixer::Attention(a) = &step.mixer {
                out.extend(a.heads.iter().flatten());
            }
        }
        out
    }
}

impl<B: Backend> Mixer<B> {
    /// The linears that read the step's normed input, where that is all that reads it.
    pub fn readers(&self) -> Vec<&B::Linear> {
        match self {
            Self::Attention(a) => vec![&a.q, &a.k, &a.v],
            Self::Mlp(m) => vec![&m.gate, &m.up],
            Self::Mixture { .. } => Vec::new(),
        }
    }
}

impl<B: Backend> Mlp<B> {
    fn linears(&self) -> [&Named<B::Linear>; 3] {
        [&self.gate, &self.up, &self.down]
    }

    fn linears_mut(&mut self) -> [&mut Named<B::Linear>; 3] {
        [&mut self.gate, &mut self.up, &mut self.down]
    }
}
