//! Experts of a layer written as one tensor, in the layouts that [`super::fused`] reads.

use std::borrow::Cow;

use safetensors::Dtype;

use super::fused::Fused;
use super::resolve::LinearRole;
use super::write::{Pending, TensorSpec};
use crate::formats::linear::{ActivationFormat, BlockScales, LinearTensors};
use crate::formats::scheme::Scheme;
use crate::formats::{mx, nvfp4};

/// How a dialect stores the experts of a layer together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FusedLayout {
    /// Outputs last, [E, K/2, N]; a scale of the weights and one of the input for all experts (ModelOpt's NVFP4).
    Columns,
    /// Blocks of 32 along K, [E, N, K/32, 16] (OpenAI's MXFP4).
    Blocks,
    /// Floats with the outputs last, [E, K, N], in BF16.
    Plain,
}

/// One projection of all experts of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Extent {
    experts: usize,
    /// Rows of one expert's, those of gate and up counted once.
    n: usize,
    k: usize,
}

/// A projection of all experts of a layer as the tensors that hold it, spelled as `stem` and quantized by `scheme`
/// ([`Scheme::None`] in the plain layout). `members`: where each linear lies, and its shape; `make` gives them in turn.
pub fn together<'a, 'l: 'a, E: 'a>(
    layout: FusedLayout,
    scheme: Scheme,
    stem: &str,
    members: Vec<(Fused, LinearRole)>,
    make: impl Fn(usize) -> Result<Cow<'a, LinearTensors<'l>>, E> + 'a,
) -> Pending<'a, E> {
    let experts = 1 + members.iter().map(|(place, _)| place.expert).max().unwrap_or(0);
    let specs = members.first().map_or_else(Vec::new, |(place, LinearRole { n, k, .. })| {
        place.specs(layout, scheme, Extent { experts, n: *n, k: *k }, stem)
    });
    let sizes: Vec<usize> = specs.iter().map(|s| s.bytes() as usize).collect();
    Pending::together(specs, move || {
        let mut out: Vec<Vec<u8>> = sizes.iter().map(|bytes| vec![0; *bytes]).collect();
        for (i, (place, _)) in members.iter().enumerate() {
            let linear = make(i)?;
            place.put(layout, &linear, &mut out);
        }
        Ok(out)
    })
}

impl Fused {
    /// What the tensors' names begin with.
    #[must_use]
    pub fn stem(&self) -> &str {
        &self.stem
    }

    /// Of all experts, each with a weight [n, k]: the tensor of their weights in the plain layout, and that of their biases.
    #[must_use]
    pub fn plain(&self, experts: usize, LinearRole { n, k, .. }: LinearRole) -> [TensorSpec; 2] {
        let spec = |suffix: &str, shape: &[usize]| TensorSpec {
            name: self.name(suffix),
            dtype: Dtype::BF16,
            shape: shape.to_vec(),
        };
        let rows = n * self.parts;
        [spec("", &[experts, k, rows]), spec("_bias", &[experts, rows])]
    }

    /// The tensors that hold all experts.
    fn specs(&self, layout: FusedLayout, scheme: Scheme, extent: Extent, stem: &str) -> Vec<TensorSpec> {
        let Extent { experts, n, k } = extent;
        let rows = n * self.parts;
        let spec = |suffix: &str, dtype, shape: &[usize]| TensorSpec {
            name: format!("{stem}{suffix}"),
            dtype,
            shape: shape.to_vec(),
        };
        match layout {
            FusedLayout::Columns => {
                let mut out = vec![
                    spec("", Dtype::U8, &[experts, k / 2, rows]),
                    spec("_weight_scale", Dtype::F8_E4M3, &[experts, k / nvfp4::BLOCK, rows]),
                    spec("_weight_scale_2", Dtype::F32, &[]),
                ];
                if scheme.has_input_scale() {
                    out.push(spec("_input_scale", Dtype::F32, &[]));
                }
                out
            }
            FusedLayout::Blocks => vec![
                spec("_blocks", Dtype::U8, &[experts, rows, k / mx::BLOCK, mx::BLOCK / 2]),
                spec("_scales", Dtype::U8, &[experts, rows, k / mx::BLOCK]),
            ],
            FusedLayout::Plain => vec![spec("", Dtype::BF16, &[experts, k, rows])],
        }
    }

    /// Puts one expert's projection where it lies in `out`, the bytes of the tensors of [`Self::specs`].
    fn put(&self, layout: FusedLayout, linear: &LinearTensors<'_>, out: &mut [Vec<u8>]) {
        let LinearTensors { n, k, .. } = *linear;
        let scales: &[u8] = match &linear.block_scales {
            BlockScales::E4m3 { codes, .. } | BlockScales::E8m0 { codes, .. } => codes,
            _ => &[],
        };
        match (layout, out) {
            (FusedLayout::Columns, [elements, blocks, rest @ ..]) => {
                self.put_columns(elements, &linear.data, [n, k / 2, 1]);
                self.put_columns(blocks, scales, [n, k / nvfp4::BLOCK, 1]);
                let input = match linear.activation {
                    ActivationFormat::Nvfp4 { global_scale } => global_scale,
                    _ => 1.0,
                };
                for (bytes, scale) in rest.iter_mut().zip([linear.output_scale.at(0), input]) {
                    bytes.copy_from_slice(&scale.to_le_bytes());
                }
            }
            (FusedLayout::Blocks, [elements, blocks, ..]) => {
                self.put_rows(elements, &linear.data, n, k / 2);
                self.put_rows(blocks, scales, n, k / mx::BLOCK);
            }
            (FusedLayout::Plain, [elements, ..]) => self.put_columns(elements, &linear.data, [n, k, 2]),
            _ => {}
        }
    }

    fn put_rows(&self, out: &mut [u8], rows: &[u8], n: usize, length: usize) {
        for (row, from) in rows.chunks_exact(length).enumerate() {
            out[self.row(row, n) * length..][..length].copy_from_slice(from);
        }
    }

    /// Rows of `units` of `size` bytes as columns.
    fn put_columns(&self, out: &mut [u8], rows: &[u8], [n, units, size]: [usize; 3]) {
        /// Rows that are read side by side, so that what is written is a run and what is read stays in the first cache.
        const TILE: usize = 64;
        let width = n * self.parts;
        let own = &mut out[self.expert * units * width * size..][..units * width * size];
        for tile in (0..n).step_by(TILE) {
            for (unit, own) in own.chunks_exact_mut(width * size).enumerate() {
                for row in tile..(tile + TILE).min(n) {
                    let column = row * self.parts + self.part;
                    own[column * size..][..size].copy_from_slice(&rows[(row * units + unit) * size..][..size]);
                }
            }
        }
    }
}
