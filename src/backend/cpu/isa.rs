//! Which instruction sets this CPU has, and one function compiled for each of them.

use std::fmt;

/// An instruction set that this CPU has: values are only made by [`Isa::detect`] and [`Isa::available`], which is what
/// makes calling the kernels of one safe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Isa(Kind);

/// The instruction sets there are kernels for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Portable Rust: the definition of every result.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C (2013 and later).
    Avx2,
    /// x86-64 with these and AVX-VNNI (Alder Lake, Zen 5 and later).
    AvxVnni,
    /// x86-64 with AVX-512 F, BW, DQ, VL and VNNI (Ice Lake, Zen 4 and later).
    Avx512,
    /// AArch64: NEON is always there.
    Neon,
}

impl Isa {
    /// The fastest that this CPU has.
    #[must_use]
    pub fn detect() -> Self {
        Self::available().pop().unwrap_or(Self(Kind::Scalar))
    }

    /// All that this CPU has, slowest first.
    #[must_use]
    pub fn available() -> Vec<Self> {
        let mut all = vec![Self(Kind::Scalar)];
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            if has!("avx2") && has!("fma") && has!("f16c") {
                all.push(Self(Kind::Avx2));
                if has!("avxvnni") {
                    all.push(Self(Kind::AvxVnni));
                }
                if has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl") && has!("avx512vnni") {
                    all.push(Self(Kind::Avx512));
                }
            }
        }
        #[cfg(target_arch = "aarch64")]
        all.push(Self(Kind::Neon));
        all
    }

    /// The instruction set called `name`, if this CPU has it.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        Self::available().into_iter().find(|i| i.to_string() == name)
    }

    /// Which one it is.
    #[must_use]
    pub fn kind(self) -> Kind {
        self.0
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Kind::Scalar => "scalar",
            Kind::Avx2 => "avx2",
            Kind::AvxVnni => "avxvnni",
            Kind::Avx512 => "avx512",
            Kind::Neon => "neon",
        })
    }
}

/// Compiles one body for every instruction set and picks by the first argument, an [`Isa`].
///
/// The source is the same and Rust neither fuses nor reorders float operations, so the results are the same bits: the
/// portable instance is the scalar twin. `f32::mul_add` is one instruction where there is FMA and exact without.
macro_rules! multiversion {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name(isa: $crate::backend::cpu::isa::Isa, $($arg: $ty),*) {
            #[inline(always)]
            fn portable($($arg: $ty),*) $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2($($arg: $ty),*) { portable($($arg),*) }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
            fn avx512($($arg: $ty),*) { portable($($arg),*) }
            match isa.kind() {
                // SAFETY: an Isa of this kind exists only if the CPU has these features.
                #[cfg(target_arch = "x86_64")]
                $crate::backend::cpu::isa::Kind::Avx2 | $crate::backend::cpu::isa::Kind::AvxVnni => unsafe { avx2($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::backend::cpu::isa::Kind::Avx512 => unsafe { avx512($($arg),*) },
                _ => portable($($arg),*),
            }
        }
    };
}
pub(in crate::backend) use multiversion;
