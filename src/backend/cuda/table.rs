//! Which kernels there are, and which of them computes a product: one table by kind of weight and number of rows.

use super::weight::{Kind, SIDE};
use super::{CudaBackend, Narrow};
use crate::backend::{BackendError, Result};

/// Kernels that are launched by name; matmul_*, tile_*, mixture_* and embed_* for each kind of weight.
pub(super) const KERNELS: [&str; 112] = [
    "activate",
    "add",
    "add_rows",
    "attention_bf16_16",
    "attention_bf16_32",
    "attention_combine",
    "attention_f32_16",
    "attention_fp8_16",
    "attention_fp8_32",
    "delta_convolve",
    "delta_norm",
    "delta_scan",
    "delta_unit",
    "embed_bf16",
    "embed_e2m1_16",
    "embed_e2m1_32",
    "embed_e4m3",
    "embed_f32",
    "embed_mxfp4",
    "embed_mxfp8",
    "gate",
    "gather",
    "keep_tail",
    "logits_at",
    "look",
    "mamba_convolve",
    "mamba_norm",
    "mamba_scan",
    "matmul_bf16_16",
    "matmul_bf16_16g",
    "matmul_bf16_32",
    "matmul_bf16_32g",
    "matmul_bf16_8",
    "matmul_bf16_8g",
    "matmul_e2m1_16_16",
    "matmul_e2m1_16_16g",
    "matmul_e2m1_16_32",
    "matmul_e2m1_16_32g",
    "matmul_e2m1_16_8",
    "matmul_e2m1_16_8g",
    "matmul_e2m1_32_16",
    "matmul_e2m1_32_16g",
    "matmul_e2m1_32_32",
    "matmul_e2m1_32_32g",
    "matmul_e2m1_32_8",
    "matmul_e2m1_32_8g",
    "matmul_e4m3_16",
    "matmul_e4m3_16g",
    "matmul_e4m3_32",
    "matmul_e4m3_32g",
    "matmul_e4m3_8",
    "matmul_e4m3_8g",
    "matmul_f32",
    "matmul_mxfp4_16",
    "matmul_mxfp4_16g",
    "matmul_mxfp4_32",
    "matmul_mxfp4_32g",
    "matmul_mxfp4_8",
    "matmul_mxfp4_8g",
    "matmul_mxfp8_16",
    "matmul_mxfp8_16g",
    "matmul_mxfp8_32",
    "matmul_mxfp8_32g",
    "matmul_mxfp8_8",
    "matmul_mxfp8_8g",
    "mixture_activate",
    "mixture_bf16_32",
    "mixture_bf16_8",
    "mixture_e2m1_16_32",
    "mixture_e2m1_16_8",
    "mixture_e2m1_32_32",
    "mixture_e2m1_32_8",
    "mixture_e4m3_32",
    "mixture_e4m3_32g",
    "mixture_e4m3_8",
    "mixture_e4m3_8g",
    "mixture_mxfp4_32",
    "mixture_mxfp4_8",
    "mixture_mxfp8_32",
    "mixture_mxfp8_8",
    "mixture_operand",
    "mixture_route",
    "mixture_sort",
    "mixture_sum",
    "operand_norm",
    "operand_plain",
    "operand_silu",
    "penalise",
    "rearrange",
    "rope_cache",
    "rotate",
    "sample_count",
    "sample_gather",
    "sample_head",
    "sample_max",
    "sample_pick",
    "sample_sums",
    "scale",
    "silu_mul",
    "tile_bf16",
    "tile_bf16g",
    "tile_e2m1_16",
    "tile_e2m1_16g",
    "tile_e2m1_32",
    "tile_e2m1_32g",
    "tile_e4m3",
    "tile_e4m3g",
    "tile_mxfp4",
    "tile_mxfp4g",
    "tile_mxfp8",
    "tile_mxfp8g",
    "totals",
];

/// Those that only images for GPUs with FP4 and FP8 tensor cores of their kind have: without them, the ones above compute the same
/// products.
pub(super) const NARROW_KERNELS: [&str; 34] = [
    "embed_fp4_16",
    "embed_fp4_32",
    "embed_fp8",
    "embed_fp8_mx",
    "matmul_fp4_16_16",
    "matmul_fp4_16_32",
    "matmul_fp4_16_8",
    "matmul_fp4_32_16",
    "matmul_fp4_32_32",
    "matmul_fp4_32_8",
    "matmul_fp8_16",
    "matmul_fp8_16g",
    "matmul_fp8_32",
    "matmul_fp8_32g",
    "matmul_fp8_8",
    "matmul_fp8_8g",
    "matmul_fp8_mx_16",
    "matmul_fp8_mx_32",
    "matmul_fp8_mx_8",
    "mixture_fp4_16_32",
    "mixture_fp4_16_8",
    "mixture_fp4_32_32",
    "mixture_fp4_32_8",
    "mixture_fp8_32",
    "mixture_fp8_32g",
    "mixture_fp8_8",
    "mixture_fp8_8g",
    "mixture_fp8_mx_32",
    "mixture_fp8_mx_8",
    "tile_fp4_16",
    "tile_fp4_32",
    "tile_fp8",
    "tile_fp8_mx",
    "tile_fp8g",
];

/// The same of sm_100's family and of sm_110, for four bits by tcgen05.
pub(super) const TCGEN_KERNELS: [&str; 11] = [
    "embed_tcgen_16",
    "embed_tcgen_32",
    "matmul_tcgen_16",
    "matmul_tcgen_32",
    "mixture_tcgen_16_128",
    "mixture_tcgen_16_8",
    "mixture_tcgen_32_128",
    "mixture_tcgen_32_8",
    "sum_slices",
    "tile_tcgen_16",
    "tile_tcgen_32",
];

/// Bytes of shared memory that a launch of this kernel gives beside what it declares: stages of kernels/tcgen.cu.
pub(super) fn shared_bytes(name: &str) -> u32 {
    let (stages, codes, piece) = (6, 4 * 16, 512);
    let Some((by, rest)) = name.split_once("_tcgen_") else { return 0 };
    let pieces = if rest.starts_with("16") { 2 } else { 1 };
    let tokens = match by {
        "tile" => SIDE,
        "matmul" => FEW,
        "mixture" if rest.ends_with("_8") => FEW,
        "mixture" => SIDE,
        _ => return 0,
    };
    (stages * (codes * (SIDE + tokens) + 2 * pieces * piece)) as u32
}

/// Tokens for which kernels/tcgen.cu has kernels of their own, and blocks that share a sum then.
pub(super) const FEW: usize = 8;
pub(super) const SLICES: usize = 8;

/// End of the name of a weight's kernels.
pub(super) fn suffix(kind: Kind) -> &'static str {
    match kind {
        Kind::E2m1 { block: 16 } => "e2m1_16",
        Kind::E2m1 { .. } => "e2m1_32",
        Kind::Mxfp4 => "mxfp4",
        Kind::E4m3 => "e4m3",
        Kind::Mxfp8 => "mxfp8",
        Kind::Bf16 => "bf16",
        Kind::F32 => "f32",
        Kind::Fp4 { block: 16 } => "fp4_16",
        Kind::Fp4 { .. } => "fp4_32",
        Kind::Fp8 => "fp8",
        Kind::Fp8Mx => "fp8_mx",
        Kind::Tcgen { block: 16 } => "tcgen_16",
        Kind::Tcgen { .. } => "tcgen_32",
    }
}

/// The loaded kernel of this name.
pub(super) fn kernel(name: &str) -> Result<&'static str> {
    let missing = || BackendError::Failed { context: "CUDA", message: format!("there is no kernel `{name}`") };
    KERNELS.iter().chain(&NARROW_KERNELS).chain(&TCGEN_KERNELS).copied().find(|k| *k == name).ok_or_else(missing)
}

/// The kernel of a product and its grid: of `tokens` rows of x, each of them `planes` rows of BF16, with a weight of `n` outputs,
/// on a device of so many multiprocessors. All kernels give the same bits.
///
/// Up to 32 rows the weights are read once and bound the time, by the kernel with the fewest columns that has room. Beyond, the
/// kernel for 32 is bound by L2, 160 bytes per HMMA (E2M1); a tile takes 34 and is bound by tensor cores, but its blocks are few.
/// By assumed rates of an H200 (42 bytes and 0.6 HMMA a clock and multiprocessor) they break even on a quarter of it.
///
/// By tcgen05 a grid's third number is the slices of K that are blocks of their own, as long as blocks are fewer than multiprocessors;
/// their sums are then to be added.
///
/// # Errors
/// When there is no kernel for this kind.
pub(crate) fn product_kernel(
    kind: Kind,
    grouped: bool,
    (tokens, planes): (usize, usize),
    n: usize,
    multiprocessors: usize,
) -> Result<(&'static str, [usize; 3])> {
    if matches!(kind, Kind::Tcgen { .. }) {
        let (name, wide) = if tokens <= FEW { ("matmul", FEW) } else { ("tile", SIDE) };
        let blocks = [n.div_ceil(SIDE), tokens.div_ceil(wide)];
        let slices = if tokens <= SIDE && blocks[0] * blocks[1] < multiprocessors { SLICES } else { 1 };
        return Ok((kernel(&format!("{name}_{}", suffix(kind)))?, [blocks[0], blocks[1], slices]));
    }
    let rows = tokens * planes;
    let group = if grouped { "g" } else { "" };
    let tile = [n.div_ceil(if grouped { 128 } else { 256 }), tokens.div_ceil(64), 1];
    if rows > 32 && 4 * tile[0] * tile[1] >= multiprocessors {
        return Ok((kernel(&format!("tile_{}{group}", suffix(kind)))?, tile));
    }
    let columns = [8, 16].into_iter().find(|c| rows <= *c).unwrap_or(32);
    let name = kernel(&format!("matmul_{}_{columns}{group}", suffix(kind)))?;
    Ok((name, [n.div_ceil(32), rows.div_ceil(columns), 1]))
}

/// Tokens that [`CudaBackend::kernel_table`] has a column for.
pub const TABLE_TOKENS: [usize; 6] = [1, 8, 16, 32, 128, 2048];

impl CudaBackend {
    /// Which kernel computes a product with 4,096 outputs, by weight and input, for each of [`TABLE_TOKENS`].
    ///
    /// # Errors
    /// Never, unless a kernel lacks that the table names.
    pub fn kernel_table(&self) -> Result<Vec<(String, Vec<&'static str>)>> {
        let weights = [
            ("NVFP4", Kind::E2m1 { block: 16 }, false),
            ("NVFP4 in blocks of 32", Kind::E2m1 { block: 32 }, false),
            ("MXFP4", Kind::Mxfp4, false),
            ("FP8", Kind::E4m3, false),
            ("FP8 in blocks, or inputs in groups of 128", Kind::E4m3, true),
            ("MXFP8", Kind::Mxfp8, false),
            ("BF16", Kind::Bf16, false),
        ];
        let mut out = Vec::new();
        let mut push = |name: String, kind, grouped, planes| {
            let row = |tokens| product_kernel(kind, grouped, (tokens, planes), 4096, self.device.multiprocessors);
            let kernels = TABLE_TOKENS.iter().map(|&tokens| Ok(row(tokens)?.0)).collect::<Result<_>>()?;
            out.push((name, kernels));
            Ok(())
        };
        if self.narrow == Narrow::Tcgen {
            push("NVFP4, NVFP4 inputs".into(), Kind::Tcgen { block: 16 }, false, 1)?;
            push("MXFP4, MXFP4 inputs".into(), Kind::Tcgen { block: 32 }, false, 1)?;
        }
        if self.narrow == Narrow::Mma {
            push("NVFP4, NVFP4 inputs".into(), Kind::Fp4 { block: 16 }, false, 1)?;
            push("MXFP4, MXFP4 inputs".into(), Kind::Fp4 { block: 32 }, false, 1)?;
            push("FP8, FP8 inputs".into(), Kind::Fp8, false, 1)?;
            push("FP8, FP8 inputs, one of them in blocks or groups of 128".into(), Kind::Fp8, true, 1)?;
            push("MXFP8, MXFP8 inputs".into(), Kind::Fp8Mx, false, 1)?;
        }
        for (name, kind, grouped) in weights {
            let narrow = match self.narrow {
                Narrow::None => false,
                Narrow::Mma => !matches!(kind, Kind::E2m1 { block: 32 } | Kind::Bf16),
                Narrow::Tcgen => matches!(kind, Kind::E2m1 { block: 16 } | Kind::Mxfp4),
            };
            let other = if narrow { "other " } else { "" };
            for (input, planes) in [("quantized", 1), ("float", 2)] {
                let other = if planes == 1 { other } else { "" };
                push(format!("{name}, {other}{input} inputs"), kind, grouped, planes)?;
            }
        }
        Ok(out)
    }
}
