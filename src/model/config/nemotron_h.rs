//! nemotron_h: Nemotron-H, Nemotron Nano 2 and Nemotron 3. Each layer is one step: Mamba-2, attention without positions, a
//! feed-forward or a mixture. Source: transformers 5.24 nemotron_h, vLLM's mamba_mixer2.py.

use super::{
    Activation, Architecture, AttentionConfig, Common, FfnNames, HEAD_COUNT, HEAD_DIM, LayerConfig, MambaConfig,
    MixerConfig, MixtureConfig, MlpConfig, ModelConfig, Names, SharedConfig, StepConfig, corrected, kv_heads, limit,
    only, width,
};
use crate::checkpoint::error::Result;
use crate::checkpoint::json::Object;

const NAMES: Names =
    Names { embedding: "backbone.embeddings", layers: "backbone.layers", norm: "backbone.norm_f", head: "lm_head" };

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Mamba,
    Attention,
    Mlp,
    Mixture,
}

pub(super) fn read(c: &Object, architecture: Architecture) -> Result<ModelConfig> {
    let common = Common::read(c)?;
    let kinds = kinds(c)?;
    let has = |kind| kinds.contains(&kind);
    only(c, "mamba_hidden_act", &["silu", "swish"])?;
    only(c, "mlp_hidden_act", &["relu2"])?;
    let attention = has(Kind::Attention).then(|| attention(c, &common)).transpose()?;
    let mamba = has(Kind::Mamba).then(|| mamba(c)).transpose()?;
    let bias = c.bool_or("mlp_bias", false)?;
    let mlp = |key: &str| -> Result<MlpConfig> {
        Ok(MlpConfig { width: width(c, key)?, activation: Activation::Relu2, bias, names: FfnNames::UNGATED })
    };
    let dense = has(Kind::Mlp).then(|| mlp("intermediate_size")).transpose()?;
    let mixtures = kinds.iter().filter(|k| **k == Kind::Mixture).count();
    let mixture = (mixtures > 0).then(|| mixture(c, mixtures, &mlp)).transpose()?;
    let layer = |kind: &Kind| {
        let mixer = match kind {
            Kind::Mamba => mamba.map(MixerConfig::Mamba),
            Kind::Attention => attention.map(MixerConfig::Attention),
            Kind::Mlp => dense.map(MixerConfig::Mlp),
            Kind::Mixture => mixture.clone().map(MixerConfig::Mixture),
        };
        LayerConfig {
            steps: mixer
                .map(|mixer| StepConfig { norm: "norm", after: None, at: "mixer", mixer })
                .into_iter()
                .collect(),
        }
    };
    let eps = ["layer_norm_epsilon", "norm_eps", "rms_norm_eps"];
    let eps = eps.iter().find_map(|key| c.positive_f32(key).transpose()).transpose()?;
    Ok(ModelConfig {
        architecture,
        names: NAMES,
        hidden: common.hidden,
        vocab: common.vocab,
        max_positions: c.integer("max_position_embeddings", 1..=limit::POSITIONS)?.unwrap_or(4096),
        rms_eps: eps.unwrap_or(1e-5),
        ropes: Vec::new(),
        layers: kinds.iter().map(layer).collect(),
        offset_norms: false,
        embedding_scale: None,
        tied_embeddings: common.tied_embeddings,
        eos_tokens: common.eos_tokens,
    })
}

/// The layers' kinds, in either spelling.
fn kinds(c: &Object) -> Result<Vec<Kind>> {
    const PATTERN: &str = "hybrid_override_pattern";
    const LIST: &str = "layers_block_type";
    let by_pattern = c.string(PATTERN)?.map(|pattern| {
        let kind = |letter| match letter {
            'M' => Ok(Kind::Mamba),
            '*' => Ok(Kind::Attention),
            '-' => Ok(Kind::Mlp),
            'E' => Ok(Kind::Mixture),
            _ => Err(c.error(PATTERN, "a string of M (Mamba-2), * (attention), - (feed-forward) and E (mixture)")),
        };
        pattern.chars().map(kind).collect::<Result<Vec<Kind>>>()
    });
    let by_list = (!c.strings(LIST)?.is_empty()).then(|| {
        let kind = |name: &String| match name.as_str() {
            "mamba" | "linear_attention" => Ok(Kind::Mamba),
            "attention" | "full_attention" => Ok(Kind::Attention),
            "mlp" => Ok(Kind::Mlp),
            "moe" => Ok(Kind::Mixture),
            _ => Err(c.error(LIST, "mamba (or linear_attention), attention (or full_attention), mlp and moe")),
        };
        c.strings(LIST)?.iter().map(kind).collect::<Result<Vec<Kind>>>()
    });
    let kinds = match (by_pattern.transpose()?, by_list.transpose()?) {
        (Some(a), Some(b)) if a != b => {
            return Err(c.error(PATTERN, format!("the layers that `{LIST}` has; correct the one that is wrong")));
        }
        (Some(kinds), _) | (None, Some(kinds)) => kinds,
        (None, None) => return Err(c.error(PATTERN, format!("the kind of each layer, here or in `{LIST}`"))),
    };
    if kinds.is_empty() || kinds.len() > limit::LAYERS {
        return Err(c.error(PATTERN, format!("from 1 to {} layers", limit::LAYERS)));
    }
    if c.integer("num_hidden_layers", 1..=limit::LAYERS)?.is_some_and(|n| n != kinds.len()) {
        return Err(c.error("num_hidden_layers", format!("{}, the number of layers whose kind is given", kinds.len())));
    }
    Ok(kinds)
}

fn attention(c: &Object, common: &Common) -> Result<AttentionConfig> {
    let heads = common.heads;
    let bias = c.bool_or("attention_bias", false)?;
    if c.get("sliding_window").is_some() {
        return Err(c.error("sliding_window", "null: no released model of this architecture has a window"));
    }
    // Older files have the second name.
    let head_dim = match c.integer("head_dim", HEAD_DIM)? {
        Some(d) => d,
        None => c.integer("attention_head_dim", HEAD_DIM)?.unwrap_or(128),
    };
    let kv_heads = kv_heads(c, heads, Some(8.min(heads)))?;
    let plain = AttentionConfig::new(heads, kv_heads, head_dim);
    Ok(AttentionConfig { rope: None, qkv_bias: bias, output_bias: bias, ..plain })
}

fn mamba(c: &Object) -> Result<MambaConfig> {
    let heads = c.required_integer("mamba_num_heads", HEAD_COUNT)?;
    let head_dim = c.required_integer("mamba_head_dim", HEAD_DIM)?;
    let groups = c.required_integer("n_groups", HEAD_COUNT)?;
    if heads % groups != 0 {
        return Err(c.error("n_groups", format!("a divisor of mamba_num_heads = {heads}")));
    }
    let state = c.required_integer("ssm_state_size", HEAD_DIM)?;
    if heads * head_dim * state > limit::STATE {
        return Err(c.error("ssm_state_size", format!("a state of at most {} values a layer", limit::STATE)));
    }
    let bias = c.bool_or("use_bias", false)? || c.bool_or("mamba_proj_bias", false)?;
    Ok(MambaConfig {
        heads,
        head_dim,
        groups,
        state,
        kernel: c.integer("conv_kernel", 1..=limit::KERNEL)?.unwrap_or(4),
        convolution_bias: c.bool_or("use_conv_bias", true)?,
        bias,
        step_limit: step_limit(c)?,
    })
}

/// Two numbers, the second infinite perhaps.
fn step_limit(c: &Object) -> Result<(f32, f32)> {
    const KEY: &str = "time_step_limit";
    match c.numbers(KEY)?.as_deref() {
        None => Ok((0.0, f32::INFINITY)),
        Some(&[low, high]) if low >= 0.0 && low <= high => Ok((low as f32, high as f32)),
        Some(_) => Err(c.error(KEY, "a list of two numbers, the first at least 0 and at most the second")),
    }
}

fn mixture(c: &Object, mixtures: usize, mlp: &dyn Fn(&str) -> Result<MlpConfig>) -> Result<MixtureConfig> {
    // More shared experts are one as wide as all of them.
    let shared = c.integer("n_shared_experts", 0..=limit::EXPERTS)?.unwrap_or(1);
    let shared = (shared > 0).then(|| mlp("moe_shared_expert_intermediate_size")).transpose()?;
    Ok(MixtureConfig {
        expert: mlp("moe_intermediate_size")?,
        latent: c.integer("moe_latent_size", 1..=limit::WIDTH)?,
        shared: shared.map(|mlp| SharedConfig { at: "shared_experts", mlp, gate: None }),
        ..corrected(c, mixtures, FfnNames::UNGATED)?
    })
}
