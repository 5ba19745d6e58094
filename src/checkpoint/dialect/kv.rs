//! Scales of a quantized KV cache: their names, and which are written.

/// E4M3 scales of a quantized KV cache, multipliers: stored = e4m3(value / scale).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KvScales {
    pub k: f32,
    pub v: f32,
}

/// Names under which tools store the scale of keys (`which` = k) or values (v) of attention module `module`: the one that is
/// written, compressed-tensors', its old one, and the one that older files have for both.
pub(in crate::checkpoint) fn names(module: &str, which: char) -> [String; 4] {
    [
        format!("{module}.{which}_proj.{which}_scale"),
        format!("{module}.{which}_scale"),
        format!("{module}.{which}_proj.output_scale"),
        format!("{module}.kv_scale"),
    ]
}

/// Names of the tensors in which the scales of keys and values of attention module `module` are written.
#[must_use]
pub fn written(module: &str) -> [String; 2] {
    [names(module, 'k'), names(module, 'v')].map(|[first, ..]| first)
}

/// Whether `tensor` is a scale of the KV cache, of whichever layer.
#[must_use]
pub fn is_scale(tensor: &str) -> bool {
    // Nemotron-H's attention is one kind of `mixer`.
    let found = [".self_attn.", ".mixer."].iter().find_map(|m| Some(tensor.find(m)? + m.len() - 1));
    let Some(module) = found.map(|end| &tensor[..end]) else { return false };
    ['k', 'v'].iter().any(|&which| names(module, which).iter().any(|n| n == tensor))
}
