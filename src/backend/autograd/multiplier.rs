//! Who multiplies in training: the threads of this process, or a GPU by cuBLAS. All else is the CPU's either way.

use std::sync::Arc;

use candle_core::{Error, Result};
use rayon::prelude::*;

use super::dense::{self, View};
pub use super::gpu::Gpu;
use super::gpu::Place;
use super::operand::Operand;

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

/// Values that one task adds at a time.
const CHUNK: usize = 1 << 16;

impl Multiplier {
    /// Device `ordinal`, with cuBLAS.
    ///
    /// # Errors
    /// No driver, device or library, or one that is too old: says what is missing.
    pub fn gpu(ordinal: usize) -> crate::backend::Result<Self> {
        Gpu::open(ordinal).map(|gpu| Self::Gpu(Arc::new(gpu)))
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
            Self::Cpu => Ok(match (a.factor.values(), b.factor.values()) {
                (Operand::F32(x), Operand::F32(y)) => dense::new_product_f32(alpha, a.view(x), b.view(y)),
                (Operand::Bf16(x), Operand::Bf16(y)) => dense::new_product_bf16(alpha, a.view(x), b.view(y)),
                _ => unreachable!("operands of two precisions: one backend makes them all"),
            }),
            Self::Gpu(gpu) => gpu.product(alpha, a, b).map_err(Error::wrap),
        }
    }

    /// `c + alpha · a · b` in place. A GPU's product is added here, by the CPU: gradients stay in the order of batches.
    ///
    /// # Errors
    /// As [`Self::product`].
    ///
    /// # Panics
    /// As [`Self::product`].
    pub fn add_product(&self, c: &mut [f32], alpha: f32, a: Side<'_>, b: Side<'_>) -> Result<()> {
        if let Self::Gpu(_) = self {
            let product = self.product(alpha, a, b)?;
            assert_eq!(c.len(), product.len(), "shape of the result");
            let chunks = c.par_chunks_mut(CHUNK).zip(product.par_chunks(CHUNK));
            chunks.for_each(|(c, product)| c.iter_mut().zip(product).for_each(|(c, p)| *c += p));
            return Ok(());
        }
        match (a.factor.values(), b.factor.values()) {
            (Operand::F32(x), Operand::F32(y)) => dense::product_f32(c, true, alpha, a.view(x), b.view(y)),
            (Operand::Bf16(x), Operand::Bf16(y)) => dense::product_bf16(c, true, alpha, a.view(x), b.view(y)),
            _ => unreachable!("operands of two precisions: one backend makes them all"),
        }
        Ok(())
    }
}
