//! Elements as the multipliers take them (f32, or bytes with 12 added), made once for all the tokens of a task: where those are many,
//! decoding in every tile would take as long as its products. The same values, so the same bits.

use std::cell::RefCell;

use super::super::isa::{Isa, Kind};
#[cfg(target_arch = "aarch64")]
use super::neon;
use super::{GROUP, Scales, scalar};
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};
use crate::formats::linear::Element;

/// Tokens from which it is worth writing the values and reading them again.
const TOKENS: usize = 32;
/// Values of a line of the cache.
const LINE: usize = 16;

/// Whether a task of so many tokens should decode these elements once. Two bytes are decoded as fast as four are read.
pub(super) fn worthwhile(element: Element, tokens: usize) -> bool {
    tokens >= TOKENS && matches!(element, Element::E2m1 | Element::E4m3)
}

/// Calls `then` with a group's values as [`Element::F32`] is packed: per k, one of each row.
pub(super) fn with(isa: Isa, element: Element, packed: &[u8], then: impl FnOnce(&[u8])) {
    let count = packed.len() / element.row_bytes(GROUP) * GROUP;
    with_scratch(count, |values| {
        decode(isa, element, packed, values);
        // SAFETY: every f32 is four bytes that may be read as such.
        then(unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), 4 * count) });
    });
}

/// Whether a task of so many tokens should make bytes of E2M1 elements once.
pub(super) fn bytes_are_worthwhile(isa: Isa, tokens: usize) -> bool {
    match isa.kind() {
        Kind::Avx512 => tokens >= TOKENS,
        // Their tiles are of two tokens each.
        Kind::Avx2 | Kind::AvxVnni => tokens >= 8,
        _ => false,
    }
}

/// Calls `then` with what a [`super::BytesTile`] has of some groups: their `packed` E2M1 elements, and `scales` of so many blocks.
pub(super) fn with_bytes(isa: Isa, packed: &[u8], scales: Scales<'_>, blocks: usize, then: impl FnOnce(&[u8], &[f32])) {
    // A byte of an element where half of one was.
    let words = 2 * packed.len() / 4;
    with_scratch(words + blocks * GROUP, |scratch| {
        let (bytes, values) = scratch.split_at_mut(words);
        // SAFETY: every f32 is four bytes that may be read and written as such.
        let bytes = unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast::<u8>(), 4 * words) };
        match isa.kind() {
            // SAFETY: an Isa of this kind exists only if the CPU has the features.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => unsafe { avx512::decode_bytes(packed, scales, bytes, values) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 | Kind::AvxVnni => unsafe { avx2::decode_bytes(packed, scales, bytes, values) },
            _ => scalar::decode_bytes(packed, scales, bytes, values),
        }
        then(bytes, values);
    });
}

/// Calls `then` with room for `count` values that begins at a line of the cache.
fn with_scratch(count: usize, then: impl FnOnce(&mut [f32])) {
    SCRATCH.with_borrow_mut(|scratch| {
        if scratch.len() < count + LINE {
            scratch.resize(count + LINE, 0.0);
        }
        // A kernel's loads never lie in two lines.
        let skip = scratch.as_ptr().align_offset(4 * LINE).min(LINE);
        then(&mut scratch[skip..skip + count]);
    });
}

thread_local! {
    /// Values of the group that a thread is at.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

fn decode(isa: Isa, element: Element, packed: &[u8], values: &mut [f32]) {
    match isa.kind() {
        // SAFETY: an Isa of this kind exists only if the CPU has the features.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 => unsafe { avx512::decode(element, packed, values) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2 | Kind::AvxVnni => unsafe { avx2::decode(element, packed, values) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Kind::Neon => unsafe { neon::decode(element, packed, values) },
        _ => scalar::decode(element, packed, values),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All codes, in every place of a word and every row.
    #[test]
    fn values_are_the_scalar_twins_on_every_instruction_set() {
        for element in [Element::E2m1, Element::E4m3, Element::Bf16, Element::F16, Element::F32] {
            for shift in 0..=255u8 {
                let packed: Vec<u8> = (0..GROUP * element.row_bytes(24))
                    .map(|i| (i as u8).wrapping_mul(37).wrapping_add(shift))
                    .collect();
                let mut expected = vec![0.0; 24 * GROUP];
                scalar::decode(element, &packed, &mut expected);
                for isa in Isa::available() {
                    let mut values = vec![1.0; 24 * GROUP];
                    decode(isa, element, &packed, &mut values);
                    for (i, (value, expected)) in values.iter().zip(&expected).enumerate() {
                        // The loader refuses weights that are no numbers.
                        let same = value.to_bits() == expected.to_bits() || expected.is_nan() || expected.is_infinite();
                        assert!(same, "{isa}, {element:?}: {value} instead of {expected}, value {i}");
                    }
                    with(isa, element, &packed, |bytes| {
                        assert_eq!(bytes.as_ptr() as usize % 64, 0);
                        let bits: Vec<u8> = values.iter().flat_map(|v| v.to_ne_bytes()).collect();
                        assert!(bytes == bits);
                    });
                }
            }
        }
    }
}
