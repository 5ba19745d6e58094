//! Number formats: pure functions between `f32` and the codes that checkpoints store. No candle, no IO.
//!
//! Every function here is the definition that the fast kernels in `backend/` are held to, bit for bit.
//! Sources: OCP Microscaling v1.0 (E2M1, E4M3, E8M0, MX), NVIDIA's NVFP4, and the exporting tools' own files.

pub mod e2m1;
pub mod e4m3;
pub mod e8m0;
pub mod fp8;
pub mod kv;
pub mod linear;
pub mod mx;
pub mod nvfp4;

/// Largest absolute value of `values`; 0 for an empty slice. NaN elements are passed over: check for them first.
#[inline(always)]
#[must_use]
pub fn amax(values: &[f32]) -> f32 {
    let mut max = 0.0f32;
    for &v in values {
        let a = v.abs();
        max = if a > max { a } else { max };
    }
    max
}
