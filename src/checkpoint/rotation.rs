//! The rotation that fp_quant stores beside a linear and applies to its input.

use std::sync::Arc;

use super::error::Result;
use super::tensors::TensorStore;
use crate::formats::linear::{InputRotation, MAX_ROTATION};

/// How far the squared length of a row may be from 1: the matrix is stored in BF16, whose 32^-0.5 is 0.2 % off.
const LENGTH: f32 = 0.02;

/// Takes `forward_hadamard_matrix` [group, group] of linear `module` with `k` inputs, and `backward_hadamard_matrix`, which
/// only training uses.
///
/// # Errors
/// When it is missing, of another shape, not finite, or no rotation.
pub(super) fn read(tensors: &TensorStore, module: &str, k: usize, group: usize) -> Result<Arc<InputRotation>> {
    let why = "fp_quant's weights belong to inputs that it rotates";
    let view = tensors.require(&format!("{module}.forward_hadamard_matrix"), why)?;
    view.expect_shape(&[group, group])?;
    if !k.is_multiple_of(group) {
        return Err(view.wrong_shape(format!("runs of {group} inputs, but K = {k} is no multiple of {group}")));
    }
    view.expect_finite()?;
    let matrix = view.floats()?;
    for (i, row) in matrix.chunks_exact(group).enumerate() {
        let length: f32 = row.iter().map(|v| v * v).sum();
        if (length - 1.0).abs() > LENGTH {
            return Err(view.bad_value(format!("row {i} has a squared length of {length}; a rotation's is 1")));
        }
    }
    tensors.take(&format!("{module}.backward_hadamard_matrix"));
    let rotation = InputRotation::new(matrix, group);
    rotation.map(Arc::new).ok_or_else(|| view.wrong_shape(format!("runs of 1 to {MAX_ROTATION} inputs")))
}
