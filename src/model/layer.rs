//! What a decoder is made of: layers, each a list of residual steps x ← x + mixer(norm(x)).

use std::sync::Arc;

use crate::backend::{AttentionShape, Backend, Choice};

/// A linear and the Hugging Face name of its module.
pub struct Named<B: Backend> {
    pub name: Arc<str>,
    pub linear: Arc<B::Linear>,
}

/// A norm and the name of its weight's tensor.
pub struct NamedNorm<B: Backend> {
    pub name: Arc<str>,
    pub norm: Arc<B::Norm>,
}

/// One layer.
pub(super) struct Layer<B: Backend> {
    pub steps: Vec<Step<B>>,
}

/// x ← x + mixer(norm(x)).
pub(super) struct Step<B: Backend> {
    pub norm: NamedNorm<B>,
    pub mixer: Mixer<B>,
}

/// What a residual step computes of its normed input.
pub(super) enum Mixer<B: Backend> {
    Attention(Box<Attention<B>>),
    Mlp(Mlp<B>),
    Mixture { router: Named<B>, experts: Vec<Mlp<B>>, choice: Choice },
}

pub(super) struct Attention<B: Backend> {
    pub q: Named<B>,
    pub k: Named<B>,
    pub v: Named<B>,
    pub o: Named<B>,
    /// Norms over each head's queries and keys.
    pub heads: Option<[NamedNorm<B>; 2]>,
    pub shape: AttentionShape,
}

/// down(silu(gate x) · up x).
pub(super) struct Mlp<B: Backend> {
    pub gate: Named<B>,
    pub up: Named<B>,
    pub down: Named<B>,
}

impl<B: Backend> Clone for Named<B> {
    fn clone(&self) -> Self {
        Self { name: self.name.clone(), linear: self.linear.clone() }
    }
}

impl<B: Backend> Clone for NamedNorm<B> {
    fn clone(&self) -> Self {
        Self { name: self.name.clone(), norm: self.norm.clone() }
    }
}

impl<B: Backend> Layer<B> {
    /// The same layer of what `linear` and `norm` make of its parts, on another backend perhaps.
    pub fn map<C: Backend>(
        &self,
        linear: &dyn Fn(&Named<B>) -> Named<C>,
        norm: &dyn Fn(&NamedNorm<B>) -> NamedNorm<C>,
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
    pub fn linears(&self) -> Vec<&Named<B>> {
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
    pub fn linears_mut(&mut self) -> Vec<&mut Named<B>> {
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
    pub fn norms(&self) -> Vec<&NamedNorm<B>> {
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
            Self::Attention(a) => vec![&a.q.linear, &a.k.linear, &a.v.linear],
            Self::Mlp(m) => vec![&m.gate.linear, &m.up.linear],
            Self::Mixture { .. } => Vec::new(),
        }
    }
}

impl<B: Backend> Mlp<B> {
    fn linears(&self) -> [&Named<B>; 3] {
        [&self.gate, &self.up, &self.down]
    }

    fn linears_mut(&mut self) -> [&mut Named<B>; 3] {
        [&mut self.gate, &mut self.up, &mut self.down]
    }
}
