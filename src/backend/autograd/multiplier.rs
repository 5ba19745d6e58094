//! Who multiplies in training: the threads of this process, or a GPU by cuBLAS. All else is the CPU's either way.

use std::sync::Arc;

use candle_core::{Error, Result};
use rayon::prelude::*;

use super::dense::{self, View};
pub use super::gpu::Gpu;
use super::gpu::Place;
use super::operand::{Operand, Precision};
use crate::backend::BackendError;
use crate::random::SplitMix64;

/// Who multiplies. Clones are the same one.
#[derive(Clone, Debug, Default)]
pub enum Multiplier {
    /// The threads of the current rayon pool ([`dense`]).
    #[default]
    Cpu,
    /// A GPU. The same products have the same bits there each time, and others than the CPU's: sums have another order.
    Gpu(Arc<Gpu>),
}

/// Values of a matrix, row-major, that products take. They never change, so whatever copy a device has of them is right.
#[derive(Clone, Debug)]
pub struct Factor {
    values: Arc<Operand>,
    rows: usize,
    columns: usize,
    place: Arc<Place>,
}

impl Factor {
    /// A matrix of `rows` rows.
    ///
    /// # Panics
    /// When there are not as many values.
    #[must_use]
    pub fn new(values: Operand, rows: usize, columns: usize) -> Self {
        assert_eq!(values.len(), rows * columns, "a matrix of {rows} x {columns}");
        Self { values: Arc::new(values), rows, columns, place: Arc::default() }
    }

    /// Row `row`, in f32.
    #[must_use]
    pub fn row(&self, row: usize) -> Vec<f32> {
        self.values.row(row, self.columns)
    }

    /// As a side of a product.
    #[must_use]
    pub fn as_it_is(&self) -> Side<'_> {
        Side { factor: self, transposed: false }
    }

    /// Its transpose as a side of a product.
    #[must_use]
    pub fn transposed(&self) -> Side<'_> {
        Side { factor: self, transposed: true }
    }

    pub(super) fn values(&self) -> &Operand {
        &self.values
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    pub(super) fn columns(&self) -> usize {
        self.columns
    }

    /// Where it lies on a device.
    pub(super) fn place(&self) -> &Arc<Place> {
        &self.place
    }
}

/// A matrix as a product takes it: as it is, or transposed first.
#[derive(Clone, Copy, Debug)]
pub struct Side<'a> {
    pub(super) factor: &'a Factor,
    pub(super) transposed: bool,
}

impl Side<'_> {
    /// Rows and columns as the product sees them.
    pub(super) fn shape(&self) -> (usize, usize) {
        let Factor { rows, columns, .. } = *self.factor;
        if self.transposed { (columns, rows) } else { (rows, columns) }
    }

    fn view<'v, T>(&self, data: &'v [T]) -> View<'v, T> {
        let view = View::new(data, self.factor.rows, self.factor.columns);
        if self.transposed { view.t() } else { view }
    }
}

/// Both sides of a linear's three products, of x, W and dy.
fn three([x, w, dy]: &[Factor; 3]) -> [(Side<'_>, Side<'_>); 3] {
    [(x.as_it_is(), w.transposed()), (dy.as_it_is(), w.as_it_is()), (dy.transposed(), x.as_it_is())]
}

/// The first of a linear's three products, in either precision, that is not the CPU's.
fn differs(gpu: &Gpu) -> crate::backend::Result<Option<String>> {
    // Ragged, and more than any tile has.
    let (rows, n, k) = (147, 201, 333);
    let mut random = SplitMix64(22);
    let mut values = |count: usize| -> Vec<f32> {
        let value = |bits: u64| (bits >> 40) as f32 / (1u32 << 23) as f32 - 1.0;
        (0..count).map(|_| value(random.draw())).collect()
    };
    let (x, w, dy) = (values(rows * k), values(n * k), values(rows * n));
    for precision in [Precision::Bf16, Precision::F32] {
        let factor = |v: &[f32], rows, columns| Factor::new(Operand::new(precision, v), rows, columns);
        let [signed, sizes] = [false, true].map(|size| {
            let of = |v: &[f32]| v.iter().map(|v| if size { v.abs() } else { *v }).collect::<Vec<f32>>();
            [factor(&of(&x), rows, k), factor(&of(&w), n, k), factor(&of(&dy), rows, n)]
        });
        for (which, name) in ["x Wᵀ", "dy W", "dyᵀ x"].into_iter().enumerate() {
            let (a, b) = three(&signed)[which];
            let (got, expected) = (gpu.product(1.0, a, b)?, on_cpu(1.0, a, b));
            let terms = a.shape().1;
            let (a, b) = three(&sizes)[which];
            // Sums in two orders are less apart, of the sum of magnitudes; a term that is missing, or numbers of fewer bits, bring more.
            let bounds = on_cpu((terms as f32).sqrt() * 2f32.powi(-21), a, b);
            let mut all = got.iter().zip(&expected).zip(&bounds);
            if let Some(((got, expected), _)) = all.find(|((g, e), bound)| (*g - *e).abs() > **bound || g.is_nan()) {
                return Ok(Some(format!("{name} in {precision:?}: {got}, and {expected} on the CPU")));
            }
        }
    }
    Ok(None)
}

/// `alpha · a · b`, by the threads of the pool.
fn on_cpu(alpha: f32, a: Side<'_>, b: Side<'_>) -> Vec<f32> {
    match (a.factor.values(), b.factor.values()) {
        (Operand::F32(x), Operand::F32(y)) => dense::product_f32(alpha, a.view(x), b.view(y)),
        (Operand::Bf16(x), Operand::Bf16(y)) => dense::product_bf16(alpha, a.view(x), b.view(y)),
        _ => unreachable!("operands of two precisions: one backend makes them all"),
    }
}

/// Values that one task adds at a time.
const CHUNK: usize = 1 << 16;

impl Multiplier {
    /// Device `ordinal`, with cuBLAS, after it has shown that it multiplies.
    ///
    /// # Errors
    /// No driver, device or library, or one that is too old: says what is missing. Products that are not the CPU's.
    pub fn gpu(ordinal: usize) -> crate::backend::Result<Self> {
        let gpu = Gpu::open(ordinal)?;
        match differs(&gpu)? {
            None => Ok(Self::Gpu(Arc::new(gpu))),
            Some(what) => Err(BackendError::Failed {
                context: "cuBLAS",
                message: format!(
                    "{gpu} does not multiply as the CPU does ({what}): another version of cuBLAS, or --device cpu"
                ),
            }),
        }
    }

    /// What the bits of results depend on, where that is not the CPU.
    #[must_use]
    pub fn device(&self) -> Option<String> {
        match self {
            Self::Cpu => None,
            Self::Gpu(gpu) => Some(gpu.to_string()),
        }
    }

    /// `alpha · a · b`, row-major. Both sides are of the same precision.
    ///
    /// # Errors
    /// What the GPU's driver or library says.
    ///
    /// # Panics
    /// When shapes or precisions do not fit.
    pub fn product(&self, alpha: f32, a: Side<'_>, b: Side<'_>) -> Result<Vec<f32>> {
        match self {
            Self::Cpu => Ok(on_cpu(alpha, a, b)),
            Self::Gpu(gpu) => gpu.product(alpha, a, b).map_err(Error::wrap),
        }
    }

    /// `c + alpha · a · b` in place, whole products one after the other: gradients are sums in the order of batches, wherever each
    /// was computed.
    ///
    /// # Errors
    /// As [`Self::product`].
    ///
    /// # Panics
    /// As [`Self::product`].
    pub fn add_product(&self, c: &mut [f32], alpha: f32, a: Side<'_>, b: Side<'_>) -> Result<()> {
        let product = self.product(alpha, a, b)?;
        assert_eq!(c.len(), product.len(), "shape of the result");
        let chunks = c.par_chunks_mut(CHUNK).zip(product.par_chunks(CHUNK));
        chunks.for_each(|(c, product)| c.iter_mut().zip(product).for_each(|(c, p)| *c += p));
        Ok(())
    }
}
