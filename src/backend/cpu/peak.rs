//! How fast a CPU multiplies at best: the instructions of the kernels alone, on registers, with as many sums as none waits for.

use std::hint::black_box;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use super::elementwise::LANES;
use super::isa::{Isa, Kind};
use super::lanes::{self, Lanes};
use super::threads::Threads;

/// Multiply-adds per second of all threads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Peak {
    /// Of f32, each rounded once.
    pub floats: f64,
    /// Of bytes, summed in 32 bits; none where no instruction of the kernels does that.
    pub integers: Option<f64>,
}

/// Rounds of a loop, a millisecond or so, and how often they are timed.
const ROUNDS: u32 = 100_000;
const REPEATS: usize = 8;

/// What a loop of rounds does: it returns a number that depends on all of them.
type Loop = unsafe fn(u32) -> u32;

pub(super) fn peak(isa: Isa, threads: &Threads) -> Peak {
    let (floats, integers): ((Loop, usize), Option<(Loop, usize)>) = match isa.kind() {
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 => ((x86::floats_512, of::<lanes::Avx512>()), Some((x86::bytes_512, x86::SUMS * 64))),
        #[cfg(target_arch = "x86_64")]
        Kind::AvxVnni => ((x86::floats_256, of::<lanes::Avx2>()), Some((x86::bytes_vnni, x86::SUMS * 32))),
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2 => ((x86::floats_256, of::<lanes::Avx2>()), Some((x86::bytes_256, x86::SUMS * 32))),
        #[cfg(target_arch = "aarch64")]
        Kind::Neon => ((floats::<lanes::Neon>, of::<lanes::Neon>()), None),
        _ => ((floats::<[f32; LANES]>, of::<[f32; LANES]>()), None),
    };
    let measure = |(run, each): (Loop, usize)| {
        let mut fastest = f64::INFINITY;
        for _ in 0..REPEATS {
            let (start, all) = (Instant::now(), AtomicU32::new(0));
            threads.run(threads.count(), |_| {
                // SAFETY: an Isa of a kind exists only if the CPU has its features.
                all.fetch_xor(unsafe { run(black_box(ROUNDS)) }, Ordering::Relaxed);
            });
            black_box(all.into_inner());
            fastest = fastest.min(start.elapsed().as_secs_f64());
        }
        f64::from(ROUNDS) * (each * threads.count()) as f64 / fastest
    };
    Peak { floats: measure(floats), integers: integers.map(measure) }
}

/// Multiply-adds of a round of [`floats`].
fn of<V: Lanes>() -> usize {
    V::SUMS * LANES
}

/// # Safety
/// The CPU has the instruction set of `V`.
#[inline(always)]
unsafe fn floats<V: Lanes>(rounds: u32) -> u32 {
    /// At least as many as any instruction set has room for.
    const MOST: usize = 16;
    // SAFETY: the caller's.
    unsafe {
        let (x, y) = (V::splat(black_box(0.5)), V::splat(black_box(0.25)));
        let mut sums = [V::splat(0.0); MOST];
        for _ in 0..rounds {
            for sum in &mut sums[..V::SUMS] {
                *sum = x.times_plus(y, *sum);
            }
        }
        let mut out = [0.0f32; LANES];
        let mut bits = 0;
        for sum in &sums[..V::SUMS] {
            sum.store(out.as_mut_ptr());
            bits ^= out.iter().fold(0, |bits, v| bits ^ v.to_bits());
        }
        bits
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{black_box, floats, lanes};
    use std::arch::x86_64::*;

    /// Sums of bytes side by side.
    pub(super) const SUMS: usize = 8;

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
    pub(super) unsafe fn floats_512(rounds: u32) -> u32 {
        // SAFETY: the caller's.
        unsafe { floats::<lanes::Avx512>(rounds) }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn floats_256(rounds: u32) -> u32 {
        // SAFETY: as above.
        unsafe { floats::<lanes::Avx2>(rounds) }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    pub(super) unsafe fn bytes_512(rounds: u32) -> u32 {
        let (x, y) = (_mm512_set1_epi8(black_box(3)), _mm512_set1_epi8(black_box(5)));
        let mut sums = [_mm512_setzero_si512(); SUMS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, x, y);
            }
        }
        sums.iter().fold(0, |bits, sum| bits ^ _mm512_reduce_add_epi32(*sum) as u32)
    }

    macro_rules! bytes {
        ($name:ident, $features:literal, |$sum:ident, $x:ident, $y:ident| $next:expr) => {
            #[target_feature(enable = $features)]
            pub(super) unsafe fn $name(rounds: u32) -> u32 {
                let ($x, $y) = (_mm256_set1_epi8(black_box(3)), _mm256_set1_epi8(black_box(5)));
                let mut sums = [_mm256_setzero_si256(); SUMS];
                for _ in 0..rounds {
                    for sum in &mut sums {
                        let $sum = *sum;
                        *sum = $next;
                    }
                }
                sums.iter().fold(0, |bits, sum| bits ^ _mm256_extract_epi32::<0>(*sum) as u32)
            }
        };
    }
    bytes!(bytes_vnni, "avx2,fma,f16c,avxvnni", |sum, x, y| _mm256_dpbusd_avx_epi32(sum, x, y));
    // As the kernel has it: sums of 16 bits, which the end of a block widens.
    bytes!(bytes_256, "avx2,fma,f16c", |sum, x, y| _mm256_add_epi16(sum, _mm256_maddubs_epi16(x, another(y))));

    /// `y`, of which the compiler does not know that it is the same each time.
    #[target_feature(enable = "avx2")]
    fn another(mut y: __m256i) -> __m256i {
        // SAFETY: nothing is done.
        unsafe { std::arch::asm!("/* {0} */", inout(ymm_reg) y, options(nomem, nostack, preserves_flags)) }
        y
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instruction_set_has_a_peak() {
        let threads = Threads::new(1).unwrap();
        for isa in Isa::available() {
            let peak = peak(isa, &threads);
            assert!(peak.floats > 1e7 && peak.floats < 1e13, "{isa}: {peak:?}");
            assert_eq!(peak.integers.is_some(), !matches!(isa.kind(), Kind::Scalar | Kind::Neon), "{isa}");
            assert!(peak.integers.is_none_or(|p| p > peak.floats / 4.0 && p < 1e14), "{isa}: {peak:?}");
            println!("{isa}: {peak:?}");
        }
    }
}
