//! The linear layers and other parts of a model by their Hugging Face names: what loading, inspecting and quantizing agree on.

use super::config::{AttentionConfig, InputsConfig, MixerConfig, MlpConfig, ModelConfig, QkNorm};
use crate::checkpoint::dialect::Place;
use crate::checkpoint::resolve::LinearRole;

/// What a linear layer does in the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    Embedding,
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
    Router,
    /// The gate of a shared expert.
    SharedGate,
    /// What a mixture's experts, or queries and keys of latent attention, come of instead of the stream; and back.
    LatentIn,
    LatentOut,
    MambaIn,
    MambaOut,
    /// Of a delta net: q, k and v; z.
    DeltaIn,
    /// Rates of writing and of forgetting.
    DeltaRate,
    DeltaOut,
    Head,
}

impl Part {
    /// Embeddings, heads, routers and other small ones, which no engine quantizes unless the file holds them so.
    #[must_use]
    pub fn may_be_plain(self) -> bool {
        matches!(self, Self::Embedding | Self::Router | Self::SharedGate | Self::DeltaRate | Self::Head)
    }
}

/// One linear layer.
#[derive(Clone, Debug)]
pub struct Module {
    /// `model.layers.0.self_attn.q_proj`.
    pub name: String,
    pub part: Part,
    /// `None` for embedding and head.
    pub layer: Option<usize>,
    /// Which expert it belongs to, in a mixture of experts.
    pub expert: Option<usize>,
    pub role: LinearRole,
}

impl Module {
    /// Whether quantization recipes apply to it by default: the linears of the blocks, not embedding, head or router.
    #[must_use]
    pub fn is_block_linear(&self) -> bool {
        !self.part.may_be_plain()
    }

    /// Whether a recipe may name it: the linears of the blocks, the embedding and the head.
    #[must_use]
    pub fn is_quantizable(&self) -> bool {
        self.is_block_linear() || matches!(self.part, Part::Embedding | Part::Head)
    }

    /// Where it stands, for dialects.
    #[must_use]
    pub fn place(&self) -> Place {
        match self.part {
            Part::Embedding => Place::Embedding,
            Part::Head => Place::Head,
            _ => Place::Block,
        }
    }

    /// Modules with the same key read the same input and are fused by deploying engines, so that they share scales:
    /// q, k and v; gate and up of one MLP or expert; q, k, v and z of a delta net; what latent attention's queries and keys
    /// come of.
    #[must_use]
    pub fn fusion_key(&self) -> String {
        let suffix = match self.part {
            // Those of latent attention read different things.
            Part::Q | Part::K | Part::V if !self.name.ends_with("_b_proj") => "qkv",
            Part::Gate | Part::Up => "gate_up",
            Part::DeltaIn => "in_proj",
            Part::LatentIn => "latent",
            _ => return self.name.clone(),
        };
        let parent = self.name.rsplit_once('.').map_or("", |(parent, _)| parent);
        format!("{parent}.{suffix}")
    }

    /// Modules with the same key share the scale of their input: as [`Self::fusion_key`], but all experts of a layer
    /// together, whose kernels quantize tokens before they are routed.
    #[must_use]
    pub fn input_key(&self) -> String {
        let experts = self.name.rfind(".experts.").filter(|_| self.expert.is_some());
        match (experts, self.part) {
            (Some(at), Part::Gate | Part::Up) => format!("{}.experts.gate_up", &self.name[..at]),
            (Some(at), _) => format!("{}.experts.down", &self.name[..at]),
            _ => self.fusion_key(),
        }
    }
}

/// A tensor that is no linear's: its name and shape.
pub type Vector = (String, Vec<usize>);

/// What a model is made of, as it is walked through.
#[derive(Default)]
struct Parts {
    modules: Vec<Module>,
    vectors: Vec<Vector>,
    layer: Option<usize>,
    expert: Option<usize>,
}

impl Parts {
    fn linear(&mut self, name: String, part: Part, [n, k]: [usize; 2], bias: bool) {
        let (layer, expert) = (self.layer, self.expert);
        let role = LinearRole { n, k, bias, may_be_plain: part.may_be_plain() };
        self.modules.push(Module { name, part, layer, expert, role });
    }

    fn vector(&mut self, name: String, shape: &[usize]) {
        self.vectors.push((name, shape.to_vec()));
    }

    /// A feed-forward that reads and gives `h` values.
    fn mlp(&mut self, prefix: &str, m: &MlpConfig, h: usize) {
        if let Some(gate) = m.names.gate {
            self.linear(format!("{prefix}.{gate}"), Part::Gate, [m.width, h], m.bias);
        }
        let rows = if m.is_fused() { 2 * m.width } else { m.width };
        self.linear(format!("{prefix}.{}", m.names.up), Part::Up, [rows, h], m.bias);
        self.linear(format!("{prefix}.{}", m.names.down), Part::Down, [h, m.width], m.bias);
    }

    fn attention(&mut self, at: &str, a: &AttentionConfig, h: usize) {
        let name = |part: &str| format!("{at}.{part}");
        let (q, kv) = (a.heads * a.head_dim, a.kv_heads * a.head_dim);
        match a.inputs {
            InputsConfig::Separate => {
                let rows = if a.gated { 2 * q } else { q };
                self.linear(name("q_proj"), Part::Q, [rows, h], a.qkv_bias);
                self.linear(name("k_proj"), Part::K, [kv, h], a.qkv_bias);
                self.linear(name("v_proj"), Part::V, [kv, h], a.qkv_bias);
            }
            InputsConfig::Fused => self.linear(name("qkv_proj"), Part::Q, [q + 2 * kv, h], a.qkv_bias),
            InputsConfig::Latent(l) => {
                match l.q_rank {
                    Some(rank) => {
                        self.linear(name("q_a_proj"), Part::LatentIn, [rank, h], false);
                        self.vector(name("q_a_layernorm.weight"), &[rank]);
                        self.linear(name("q_b_proj"), Part::Q, [q, rank], false);
                    }
                    None => self.linear(name("q_proj"), Part::Q, [q, h], false),
                }
                self.linear(name("kv_a_proj_with_mqa"), Part::LatentIn, [l.kv_rank + l.turned, h], false);
                self.vector(name("kv_a_layernorm.weight"), &[l.kv_rank]);
                self.linear(name("kv_b_proj"), Part::K, [a.heads * (l.still + l.value_dim), l.kv_rank], false);
            }
        }
        self.linear(name("o_proj"), Part::O, [h, a.heads * a.value_dim()], a.output_bias);
        let widths = match a.qk_norm {
            QkNorm::None => None,
            QkNorm::Heads => Some([a.head_dim; 2]),
            QkNorm::Rows => Some([q, kv]),
        };
        for (norm, width) in ["q_norm.weight", "k_norm.weight"].into_iter().zip(widths.into_iter().flatten()) {
            self.vector(name(norm), &[width]);
        }
        if a.sinks {
            self.vector(name("sinks"), &[a.heads]);
        }
    }

    fn mixer(&mut self, at: &str, mixer: &MixerConfig, h: usize) {
        let name = |part: &str| format!("{at}.{part}");
        match mixer {
            MixerConfig::Attention(a) => self.attention(at, a, h),
            MixerConfig::Mamba(m) => {
                let (inner, channels) = (m.inner(), m.channels());
                self.linear(name("in_proj"), Part::MambaIn, [inner + channels + m.heads, h], m.bias);
                self.linear(name("out_proj"), Part::MambaOut, [h, inner], m.bias);
                self.vector(name("conv1d.weight"), &[channels, 1, m.kernel]);
                if m.convolution_bias {
                    self.vector(name("conv1d.bias"), &[channels]);
                }
                ["A_log", "D", "dt_bias"].iter().for_each(|v| self.vector(name(v), &[m.heads]));
                self.vector(name("norm.weight"), &[inner]);
            }
            MixerConfig::DeltaNet(d) => {
                let (keys, values) = (d.key_heads * d.key_dim, d.value_heads * d.value_dim);
                self.linear(name("in_proj_qkv"), Part::DeltaIn, [2 * keys + values, h], false);
                self.linear(name("in_proj_z"), Part::DeltaIn, [values, h], false);
                self.linear(name("in_proj_b"), Part::DeltaRate, [d.value_heads, h], false);
                self.linear(name("in_proj_a"), Part::DeltaRate, [d.value_heads, h], false);
                self.linear(name("out_proj"), Part::DeltaOut, [h, values], false);
                self.vector(name("conv1d.weight"), &[2 * keys + values, 1, d.kernel]);
                ["A_log", "dt_bias"].iter().for_each(|v| self.vector(name(v), &[d.value_heads]));
                self.vector(name("norm.weight"), &[d.value_dim]);
            }
            MixerConfig::Mlp(m) => self.mlp(at, m, h),
            MixerConfig::Mixture(m) => {
                if let Some(latent) = m.latent {
                    self.linear(name("fc1_latent_proj"), Part::LatentIn, [latent, h], false);
                }
                for e in 0..m.experts {
                    self.expert = Some(e);
                    self.mlp(&name(&format!("experts.{e}")), &m.expert, m.latent.unwrap_or(h));
                }
                self.expert = None;
                if let Some(latent) = m.latent {
                    self.linear(name("fc2_latent_proj"), Part::LatentOut, [h, latent], false);
                }
                if let Some(shared) = &m.shared {
                    self.mlp(&name(shared.at), &shared.mlp, h);
                    if let Some(gate) = shared.gate {
                        self.linear(name(gate), Part::SharedGate, [1, h], false);
                    }
                }
                self.linear(name(m.router), Part::Router, [m.experts, h], m.router_bias);
                if let Some(correction) = m.correction {
                    self.vector(name(correction), &[m.experts]);
                }
            }
        }
    }
}

impl ModelConfig {
    fn parts(&self) -> Parts {
        let (mut parts, h) = (Parts::default(), self.hidden);
        parts.linear(self.names.embedding.into(), Part::Embedding, [self.vocab, h], false);
        for (index, layer) in self.layers.iter().enumerate() {
            parts.layer = Some(index);
            let norms = layer.steps.iter().flat_map(|s| std::iter::once(s.norm).chain(s.after));
            let norms = norms.map(|norm| (self.in_layer(index, &format!("{norm}.weight")), vec![h]));
            parts.vectors.extend(norms);
            for step in &layer.steps {
                parts.mixer(&self.in_layer(index, step.at), &step.mixer, h);
            }
        }
        parts.layer = None;
        parts.vector(format!("{}.weight", self.names.norm), &[h]);
        if !self.tied_embeddings {
            parts.linear(self.names.head.into(), Part::Head, [self.vocab, h], false);
        }
        parts
    }

    /// Every linear layer in the order of the forward pass. A tied head is not listed.
    #[must_use]
    pub fn modules(&self) -> Vec<Module> {
        self.parts().modules
    }

    /// Every tensor that is no linear's, with its shape: norms, and what mixers have of their own.
    #[must_use]
    pub fn vectors(&self) -> Vec<Vector> {
        self.parts().vectors
    }
}
