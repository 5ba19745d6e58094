//! Sixteen f32 side by side in whatever registers an instruction set has for them, for kernels that compilers do not turn into
//! such by themselves. Each operation rounds every lane as `f32`'s own does, so all of them give the same bits.

use super::elementwise::LANES;

/// Sixteen f32.
pub(super) trait Lanes: Copy {
    /// How many of these sums there is room for in registers, with what they are made of.
    const SUMS: usize;

    /// `x` in every lane.
    ///
    /// # Safety
    /// The CPU has the instruction set.
    unsafe fn splat(x: f32) -> Self;

    /// # Safety
    /// As of `splat`, and 16 floats can be read from `p`.
    unsafe fn load(p: *const f32) -> Self;

    /// # Safety
    /// As of `splat`, and 16 floats can be written to `p`.
    unsafe fn store(self, p: *mut f32);

    /// `self · by`.
    ///
    /// # Safety
    /// As of `splat`.
    unsafe fn times(self, by: Self) -> Self;

    /// `self · by + plus`, rounded once.
    ///
    /// # Safety
    /// As of `splat`.
    unsafe fn times_plus(self, by: Self, plus: Self) -> Self;
}

/// The definition.
impl Lanes for [f32; LANES] {
    const SUMS: usize = 4;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        [x; LANES]
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the caller's.
        unsafe { p.cast::<Self>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the caller's.
        unsafe { p.cast::<Self>().write_unaligned(self) }
    }

    #[inline(always)]
    unsafe fn times(self, by: Self) -> Self {
        std::array::from_fn(|i| self[i] * by[i])
    }

    #[inline(always)]
    unsafe fn times_plus(self, by: Self, plus: Self) -> Self {
        std::array::from_fn(|i| self[i].mul_add(by[i], plus[i]))
    }
}

/// Implements [`Lanes`] for `$n` registers of `$width` lanes.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! lanes {
    ($(#[$meta:meta])* $name:ident, $register:ty, $n:literal of $width:literal, sums $sums:literal,
     $splat:expr, $load:expr, $store:expr, $times:expr, $times_plus:expr) => {
        $(#[$meta])*
        #[derive(Clone, Copy)]
        pub(in crate::backend::cpu) struct $name([$register; $n]);

        impl Lanes for $name {
            const SUMS: usize = $sums;

            #[inline(always)]
            unsafe fn splat(x: f32) -> Self {
                // SAFETY: the caller's, as below.
                Self([unsafe { $splat(x) }; $n])
            }

            #[inline(always)]
            unsafe fn load(p: *const f32) -> Self {
                // SAFETY: as above.
                let mut out = unsafe { Self::splat(0.0) };
                for i in 0..$n {
                    // SAFETY: as above.
                    out.0[i] = unsafe { $load(p.add($width * i)) };
                }
                out
            }

            #[inline(always)]
            unsafe fn store(self, p: *mut f32) {
                for i in 0..$n {
                    // SAFETY: as above.
                    unsafe { $store(p.add($width * i), self.0[i]) }
                }
            }

            #[inline(always)]
            unsafe fn times(self, by: Self) -> Self {
                let mut out = self;
                for i in 0..$n {
                    // SAFETY: as above.
                    out.0[i] = unsafe { $times(self.0[i], by.0[i]) };
                }
                out
            }

            #[inline(always)]
            unsafe fn times_plus(self, by: Self, plus: Self) -> Self {
                let mut out = self;
                for i in 0..$n {
                    // SAFETY: as above.
                    out.0[i] = unsafe { $times_plus(self.0[i], by.0[i], plus.0[i]) };
                }
                out
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Lanes;
    use std::arch::x86_64::*;

    lanes!(
        /// One register of AVX-512.
        Avx512, __m512, 1 of 16, sums 16,
        _mm512_set1_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_mul_ps, _mm512_fmadd_ps
    );
    lanes!(
        /// Two registers of AVX2.
        Avx2, __m256, 2 of 8, sums 4,
        _mm256_set1_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_mul_ps, _mm256_fmadd_ps
    );
}
#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "aarch64")]
mod arm {
    use super::Lanes;
    use std::arch::aarch64::*;

    lanes!(
        /// Four registers of NEON.
        Neon, float32x4_t, 4 of 4, sums 4,
        vdupq_n_f32, vld1q_f32, vst1q_f32, vmulq_f32, |x, by, plus| vfmaq_f32(plus, x, by)
    );
}
#[cfg(target_arch = "aarch64")]
pub(super) use arm::Neon;
