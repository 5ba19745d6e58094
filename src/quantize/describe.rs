//! What a quantized model's configuration has to say of each module, by the names that the files have.

use safetensors::Dtype;

use super::QuantizeError;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::dialect::{Assigned, Kind, Plain};
use crate::checkpoint::tensors::{TensorStore, TensorView};
use crate::formats::scheme::Scheme;
use crate::model::ModelConfig;
use crate::model::modules::{Module, Part};

/// Names of convolutions' weights, which exporting tools count among the modules.
const CONVOLUTION: &str = ".conv1d.weight";

/// Refuses a checkpoint whose other parts than the text model are quantized: what their configuration says of them is not
/// read here, and would be lost.
///
/// # Errors
/// Names the first such tensor.
pub(super) fn plain_beside(checkpoint: &Checkpoint) -> Result<(), QuantizeError> {
    let codes = |v: &TensorView<'_>| matches!(v.dtype, Dtype::U8 | Dtype::I8 | Dtype::F8_E4M3 | Dtype::F8_E5M2);
    match checkpoint.tensors.aside().find(codes) {
        None => Ok(()),
        Some(view) => Err(QuantizeError::Module {
            module: view.name.strip_suffix(".weight").unwrap_or(view.name).into(),
            detail: format!(
                "is of a part that the text model computes without, and quantized ({}); only text models are rewritten, so \
                 take that part's unquantized tensors",
                view.dtype
            ),
        }),
    }
}

/// What each module of a model became: `linears` are all [`Module::is_quantizable`] in the model's order. `from`: the
/// checkpoint whose names and other parts (towers of vision, heads of several tokens) it keeps.
pub(super) fn assigned(
    config: &ModelConfig,
    linears: &[(&Module, Scheme)],
    fp8_kv_cache: bool,
    from: Option<&TensorStore>,
) -> Assigned {
    let stored = |name: &str| from.map_or_else(|| name.to_owned(), |store| store.stored_name(name));
    let modules = config.modules();
    let quantized = |m: &Module| linears.iter().any(|(q, s)| q.name == m.name && *s != Scheme::None);
    let plain = modules.iter().filter(|m| !m.is_block_linear() && m.part != Part::Head && !quantized(m)).map(|m| {
        let kind = match (m.part, config.embedding_scale) {
            (Part::Embedding, None) => Kind::Embedding,
            (Part::Embedding, Some(_)) => Kind::ScaledEmbedding,
            _ => Kind::Linear,
        };
        Plain { name: stored(&m.name), kind }
    });
    let vectors = config.vectors();
    let convolutions = vectors.iter().filter_map(|(name, _)| {
        let module = name.strip_suffix(".weight").filter(|_| name.ends_with(CONVOLUTION))?;
        Some(Plain { name: stored(module), kind: Kind::Convolution })
    });
    let beside = from.into_iter().flat_map(TensorStore::aside).filter_map(|view| {
        let kind = match view.shape.len() {
            0 | 1 => return None,
            2 => Kind::Linear,
            _ => Kind::Convolution,
        };
        Some(Plain { name: view.name.strip_suffix(".weight")?.to_owned(), kind })
    });
    Assigned {
        linears: linears
            .iter()
            .filter(|(m, s)| m.is_block_linear() || *s != Scheme::None)
            .map(|(m, s)| (stored(&m.name), *s))
            .collect(),
        others: plain.chain(convolutions).chain(beside).collect(),
        embedding: stored(config.names.embedding),
        head: stored(config.names.head),
        fp8_kv_cache,
    }
}
