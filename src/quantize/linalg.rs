//! The little linear algebra that calibrated rounding needs: products of activations, Cholesky's factor, solving.

use candle_core::{Device, Tensor};
use rayon::prelude::*;

/// aᵀ·b of a [rows, m] and b [rows, n], row-major, in f32: [m, n].
pub(super) fn transposed_product(a: &[f32], m: usize, b: &[f32], n: usize) -> candle_core::Result<Vec<f32>> {
    let rows = a.len() / m.max(1);
    let a = Tensor::from_slice(a, (rows, m), &Device::Cpu)?;
    let b = Tensor::from_slice(b, (rows, n), &Device::Cpu)?;
    a.t()?.matmul(&b)?.flatten_all()?.to_vec1()
}

/// a·bᵀ of a [m, k] and b [n, k], row-major, in f32: [m, n].
pub(super) fn product_transposed(a: &[f32], b: &[f32], k: usize) -> candle_core::Result<Vec<f32>> {
    let (m, n) = (a.len() / k.max(1), b.len() / k.max(1));
    let a = Tensor::from_slice(a, (m, k), &Device::Cpu)?;
    let b = Tensor::from_slice(b, (n, k), &Device::Cpu)?;
    a.matmul(&b.t()?)?.flatten_all()?.to_vec1()
}

/// A lower triangular factor: `matrix` = L·Lᵀ, rows of L contiguous.
pub(super) struct Cholesky {
    size: usize,
    rows: Vec<f64>,
}

/// Columns that are factored together.
const PANEL: usize = 48;

impl Cholesky {
    /// Factors a symmetric positive definite matrix [size, size]; `None` if it is not one (in f64).
    pub fn new(mut a: Vec<f64>, size: usize) -> Option<Self> {
        for start in (0..size).step_by(PANEL) {
            let end = (start + PANEL).min(size);
            // What the columns before take away from this panel: rows of L against the panel's own rows.
            let (above, below) = a.split_at_mut(start * size);
            let _ = above;
            let panel: Vec<f64> = below[..(end - start) * size].to_vec();
            below.par_chunks_mut(size).for_each(|row| {
                for j in start..end {
                    let other = &panel[(j - start) * size..][..start];
                    row[j] -= dot(&row[..start], other);
                }
            });
            // The panel's own triangle.
            for j in start..end {
                let diagonal = a[j * size + j] - squares(&a[j * size + start..j * size + j]);
                if diagonal.is_nan() || diagonal <= 0.0 {
                    return None;
                }
                let root = diagonal.sqrt();
                a[j * size + j] = root;
                for i in j + 1..end {
                    let (upper, lower) = a.split_at_mut(i * size);
                    let sum = dot(&lower[start..j], &upper[j * size + start..j * size + j]);
                    lower[j] = (lower[j] - sum) / root;
                }
            }
            // The rows under it.
            let (upper, lower) = a.split_at_mut(end * size);
            let triangle = &upper[start * size..];
            lower.par_chunks_mut(size).for_each(|row| {
                for j in start..end {
                    let l = &triangle[(j - start) * size..][..size];
                    row[j] = (row[j] - dot(&row[start..j], &l[start..j])) / l[j];
                }
            });
        }
        Some(Self { size, rows: a })
    }

    /// Row `i` of L up to its diagonal, [i + 1].
    pub fn row(&self, i: usize) -> &[f64] {
        &self.rows[i * self.size..][..=i]
    }

    /// Solves L·Lᵀ·x = b in place.
    pub fn solve(&self, x: &mut [f64]) {
        for i in 0..self.size {
            let row = self.row(i);
            x[i] = (x[i] - dot(&row[..i], &x[..i])) / row[i];
        }
        for i in (0..self.size).rev() {
            let row = self.row(i);
            let (before, at) = x.split_at_mut(i);
            at[0] /= row[i];
            let factor = at[0];
            before.iter_mut().zip(row).for_each(|(x, l)| *x -= factor * l);
        }
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut lanes = [0.0; 8];
    let (a, b) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    for (a, b) in a.0.iter().zip(b.0) {
        for i in 0..8 {
            lanes[i] += a[i] * b[i];
        }
    }
    lanes.iter().sum::<f64>() + a.1.iter().zip(b.1).map(|(a, b)| a * b).sum::<f64>()
}

fn squares(a: &[f64]) -> f64 {
    dot(a, a)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A positive definite matrix from a small generator.
    fn matrix(size: usize) -> Vec<f64> {
        let mut state = 1u64;
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as f64 / f64::from(1u32 << 31) - 0.5
        };
        let x: Vec<f64> = (0..2 * size * size).map(|_| random()).collect();
        let entry = |i: usize, j: usize| (0..2 * size).map(|r| x[r * size + i] * x[r * size + j]).sum();
        (0..size * size).map(|at| entry(at / size, at % size)).collect()
    }

    #[test]
    fn the_factor_times_its_transpose_is_the_matrix_and_solving_inverts_it() {
        for size in [1, 7, 48, 49, 131] {
            let a = matrix(size);
            let l = Cholesky::new(a.clone(), size).unwrap();
            for i in 0..size {
                for j in 0..=i {
                    let sum: f64 = (0..=j).map(|k| l.row(i)[k] * l.row(j)[k]).sum();
                    assert!((sum - a[i * size + j]).abs() < 1e-9, "{size}: {i}, {j}");
                }
            }
            let x: Vec<f64> = (0..size).map(|i| i as f64 - 3.0).collect();
            let mut b: Vec<f64> = (0..size).map(|i| (0..size).map(|j| a[i * size + j] * x[j]).sum()).collect();
            l.solve(&mut b);
            assert!(b.iter().zip(&x).all(|(b, x)| (b - x).abs() < 1e-6), "{size}");
        }
    }

    #[test]
    fn what_is_not_positive_definite_has_no_factor() {
        assert!(Cholesky::new(vec![1.0, 2.0, 2.0, 1.0], 2).is_none());
        assert!(Cholesky::new(vec![f64::NAN], 1).is_none());
    }

    #[test]
    fn products_are_those_of_the_definition() {
        let a = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let b = [1.0, 0.0, 2.0];
        // a [3, 2], b [3, 1]: aᵀb.
        assert_eq!(transposed_product(&a, 2, &b, 1).unwrap(), [11.0, 14.0]);
        // a [2, 3], b [1, 3]: abᵀ.
        assert_eq!(product_transposed(&a, &b, 3).unwrap(), [7.0, 16.0]);
    }
}
