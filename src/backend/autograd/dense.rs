//! Dense matrix products for training: BF16 operands summed in f32, by AVX-512 BF16 where the CPU has it.
//!
//! Unlike the packed kernels these promise no bits across instruction sets: the same machine gives the same bits, for any
//! number of threads. Rows of the result are shared out among the threads of the current rayon pool; nothing else is.

use std::mem::MaybeUninit;

use rayon::prelude::*;

/// A matrix seen through strides, so that a transpose costs nothing.
#[derive(Clone, Copy, Debug)]
pub struct View<'a, T> {
    data: &'a [T],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a, T> View<'a, T> {
    /// Row-major `data` of the given shape.
    ///
    /// # Panics
    /// When `data` has another length.
    #[must_use]
    pub fn new(data: &'a [T], rows: usize, columns: usize) -> Self {
        assert_eq!(data.len(), rows * columns, "a view of {rows} x {columns}");
        Self { data, rows, columns, row_stride: columns, column_stride: 1 }
    }

    /// Columns `from..from + columns` of every row.
    ///
    /// # Panics
    /// When there are not as many.
    #[must_use]
    pub fn columns(self, from: usize, columns: usize) -> Self {
        assert!(from + columns <= self.columns, "columns {from}..{} of {}", from + columns, self.columns);
        Self { data: &self.data[(from * self.column_stride).min(self.data.len())..], columns, ..self }
    }

    /// Rows `from..from + rows`.
    ///
    /// # Panics
    /// When there are not as many.
    #[must_use]
    pub fn rows(self, from: usize, rows: usize) -> Self {
        assert!(from + rows <= self.rows, "rows {from}..{} of {}", from + rows, self.rows);
        Self { data: &self.data[(from * self.row_stride).min(self.data.len())..], rows, ..self }
    }

    /// The transpose.
    #[must_use]
    pub fn t(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }
}

/// `alpha · a · b` for BF16 bits, row-major. All threads of the current pool work on it.
///
/// # Panics
/// When the shapes do not fit.
#[must_use]
pub fn product_bf16(alpha: f32, a: View<'_, u16>, b: View<'_, u16>) -> Vec<f32> {
    filled(a.rows * b.columns, |c| into_bf16(c, alpha, a, b))
}

/// As [`product_bf16`] for f32.
///
/// # Panics
/// When the shapes do not fit.
#[must_use]
pub fn product_f32(alpha: f32, a: View<'_, f32>, b: View<'_, f32>) -> Vec<f32> {
    filled(a.rows * b.columns, |c| into_f32(c, alpha, a, b))
}

/// Memory that holds values, as memory that may hold none.
fn written(c: &mut [f32]) -> &mut [MaybeUninit<f32>] {
    // SAFETY: the two types are laid out alike, and the functions below write nothing but values.
    unsafe { &mut *(std::ptr::from_mut(c) as *mut [MaybeUninit<f32>]) }
}

/// A result of `length` values that `f` writes without reading it.
fn filled(length: usize, f: impl FnOnce(&mut [MaybeUninit<f32>])) -> Vec<f32> {
    let mut c = Vec::with_capacity(length);
    f(&mut c.spare_capacity_mut()[..length]);
    // SAFETY: a product writes every value of its result.
    unsafe { c.set_len(length) };
    c
}

fn into_bf16(c: &mut [MaybeUninit<f32>], alpha: f32, a: View<'_, u16>, b: View<'_, u16>) {
    assert_eq!(a.columns, b.rows, "inner dimensions");
    assert_eq!(c.len(), a.rows * b.columns, "shape of the result");
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx512bw") && std::arch::is_x86_feature_detected!("avx512bf16") {
        // SAFETY: the features are there.
        return unsafe { avx512bf16::product(c, alpha, a, b) };
    }
    let wide = |v: View<'_, u16>| v.data.iter().map(|x| f32::from_bits(u32::from(*x) << 16)).collect::<Vec<f32>>();
    let (wide_a, wide_b) = (wide(a), wide(b));
    let view = |data, v: View<'_, u16>| View::<f32> {
        data,
        rows: v.rows,
        columns: v.columns,
        row_stride: v.row_stride,
        column_stride: v.column_stride,
    };
    into_f32(c, alpha, view(&wide_a, a), view(&wide_b, b));
}

/// Rows of the result that one thread takes at a time.
const ROWS: usize = 64;

fn into_f32(c: &mut [MaybeUninit<f32>], alpha: f32, a: View<'_, f32>, b: View<'_, f32>) {
    assert_eq!(a.columns, b.rows, "inner dimensions");
    assert_eq!(c.len(), a.rows * b.columns, "shape of the result");
    let n = b.columns;
    if c.is_empty() {
        return;
    }
    c.par_chunks_mut(ROWS * n).enumerate().for_each(|(i, c)| {
        serial(c, n, false, alpha, a.rows(i * ROWS, c.len() / n), b);
    });
}

/// `c = alpha · a · b`, or that added to c, on this thread; c row-major with `stride` values from row to row.
///
/// # Panics
/// When the shapes do not fit.
pub fn serial_f32(c: &mut [f32], stride: usize, accumulate: bool, alpha: f32, a: View<'_, f32>, b: View<'_, f32>) {
    serial(written(c), stride, accumulate, alpha, a, b);
}

fn serial(c: &mut [MaybeUninit<f32>], stride: usize, accumulate: bool, alpha: f32, a: View<'_, f32>, b: View<'_, f32>) {
    assert_eq!(a.columns, b.rows, "inner dimensions");
    if a.rows == 0 || b.columns == 0 {
        return;
    }
    assert!(b.columns <= stride && c.len() >= (a.rows - 1) * stride + b.columns, "shape of the result");
    let reach = |v: View<'_, f32>| (v.rows - 1) * v.row_stride + v.columns.saturating_sub(1) * v.column_stride;
    if a.columns == 0 {
        if !accumulate {
            c.chunks_mut(stride).for_each(|row| row[..b.columns].fill(MaybeUninit::new(0.0)));
        }
        return;
    }
    assert!(reach(a) < a.data.len() && reach(b) < b.data.len(), "a view past its data");
    // SAFETY: the asserts above keep every index within its slice; c is borrowed mutably, so it overlaps neither, and is
    // read only where it is added to.
    unsafe {
        gemm::gemm(
            a.rows,
            b.columns,
            a.columns,
            c.as_mut_ptr().cast::<f32>(),
            1,
            stride as isize,
            accumulate,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            alpha,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// BF16 bits of `x`, to the nearest, ties to even; a NaN stays one.
#[inline(always)]
#[must_use]
pub fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if x.is_nan() { (bits >> 16 | 0x40) as u16 } else { rounded as u16 }
}

#[cfg(target_arch = "x86_64")]
mod avx512bf16 {
    use std::arch::x86_64::*;
    use std::mem::MaybeUninit;

    use rayon::prelude::*;

    use super::View;

    /// Rows and columns of the result that are kept in registers: 8 x 3 accumulators of 16 lanes.
    const TILE_ROWS: usize = 8;
    const TILE_COLUMNS: usize = 48;
    /// Pairs along the inner dimension between visits to the result: a panel of b then takes 36 KiB.
    const DEPTH: usize = 192;

    /// Pairs (element 2i low, 2i + 1 high) of up to `width` lines of `v` from line `first`, side by side: [pairs, width].
    /// Lines are rows if `v` is the left operand (as given) and columns of the right one (given transposed).
    #[target_feature(enable = "avx512f,avx512bw")]
    fn pack<const WIDTH: usize>(v: View<'_, u16>, first: usize, out: &mut [u32]) {
        let width = WIDTH;
        let count = width.min(v.rows - first);
        let (pairs, odd) = (v.columns / 2, v.columns % 2 == 1);
        let at = |line: usize, i: usize| v.data[(first + line) * v.row_stride + i * v.column_stride];
        if v.column_stride == 1 {
            let mut done = 0;
            // Whole squares of 16 pairs of 16 lines, then what is left.
            while count == width && width.is_multiple_of(16) && done + 16 <= pairs {
                for from in (0..width).step_by(16) {
                    let rows: [&[u16]; 16] =
                        std::array::from_fn(|line| &v.data[(first + from + line) * v.row_stride + 2 * done..][..32]);
                    transpose(rows, &mut out[done * width + from..], width);
                }
                done += 16;
            }
            for line in 0..count {
                let row = &v.data[(first + line) * v.row_stride..][2 * done..2 * pairs];
                let pairs = out.iter_mut().skip(done * width + line).step_by(width);
                for (pair, out) in row.chunks_exact(2).zip(pairs) {
                    *out = u32::from(pair[0]) | u32::from(pair[1]) << 16;
                }
            }
        } else if v.row_stride == 1 {
            for (i, out) in out.chunks_mut(width).enumerate().take(pairs) {
                let low = &v.data[2 * i * v.column_stride + first..];
                let high = &v.data[(2 * i + 1) * v.column_stride + first..];
                if let (Some(out), Some(low), Some(high)) =
                    (out.first_chunk_mut::<WIDTH>(), low.first_chunk::<WIDTH>(), high.first_chunk::<WIDTH>())
                {
                    for ((out, low), high) in out.iter_mut().zip(low).zip(high) {
                        *out = u32::from(*low) | u32::from(*high) << 16;
                    }
                    continue;
                }
                for ((out, low), high) in out[..count].iter_mut().zip(low).zip(high) {
                    *out = u32::from(*low) | u32::from(*high) << 16;
                }
            }
        } else {
            for (i, out) in out.chunks_mut(width).enumerate().take(pairs) {
                for (line, out) in out[..count].iter_mut().enumerate() {
                    *out = u32::from(at(line, 2 * i)) | u32::from(at(line, 2 * i + 1)) << 16;
                }
            }
        }
        if odd {
            let last = &mut out[pairs * width..];
            for (line, out) in last[..count].iter_mut().enumerate() {
                *out = u32::from(at(line, 2 * pairs));
            }
        }
    }

    /// 16 pairs of each of 16 rows become 16 rows of `out`, `stride` values from row to row.
    #[target_feature(enable = "avx512f,avx512bw")]
    fn transpose(rows: [&[u16]; 16], out: &mut [u32], stride: usize) {
        assert!(rows.iter().all(|r| r.len() == 32) && out.len() >= 15 * stride + 16);
        let mut x = [_mm512_setzero_si512(); 16];
        for (x, row) in x.iter_mut().zip(rows) {
            // SAFETY: each row has 32 values of 16 bits.
            *x = unsafe { _mm512_loadu_si512(row.as_ptr().cast()) };
        }
        // Squares of 2, of 4, of 8 and of 16 pairs, one after the other.
        let mut a = x;
        for i in (0..16).step_by(2) {
            (a[i], a[i + 1]) = (_mm512_unpacklo_epi32(x[i], x[i + 1]), _mm512_unpackhi_epi32(x[i], x[i + 1]));
        }
        let mut b = a;
        for i in (0..16).step_by(4) {
            for j in 0..2 {
                (b[i + 2 * j], b[i + 2 * j + 1]) =
                    (_mm512_unpacklo_epi64(a[i + j], a[i + j + 2]), _mm512_unpackhi_epi64(a[i + j], a[i + j + 2]));
            }
        }
        let mut c = b;
        for i in (0..16).step_by(8) {
            for j in 0..4 {
                c[i + j] = _mm512_shuffle_i32x4::<0x88>(b[i + j], b[i + j + 4]);
                c[i + j + 4] = _mm512_shuffle_i32x4::<0xdd>(b[i + j], b[i + j + 4]);
            }
        }
        for j in 0..8 {
            let (low, high) =
                (_mm512_shuffle_i32x4::<0x88>(c[j], c[j + 8]), _mm512_shuffle_i32x4::<0xdd>(c[j], c[j + 8]));
            // SAFETY: the assert above.
            unsafe {
                _mm512_storeu_si512(out.as_mut_ptr().add(j * stride).cast(), low);
                _mm512_storeu_si512(out.as_mut_ptr().add((j + 8) * stride).cast(), high);
            }
        }
    }

    /// Every panel of `width` lines, one after the other.
    fn pack_all<const WIDTH: usize>(v: View<'_, u16>) -> Vec<u32> {
        let panel = v.columns.div_ceil(2) * WIDTH;
        let mut out = vec![0; v.rows.div_ceil(WIDTH) * panel];
        if panel > 0 {
            // SAFETY: only `product` calls this, which has the features.
            out.par_chunks_mut(panel).enumerate().for_each(|(i, out)| unsafe { pack::<WIDTH>(v, i * WIDTH, out) });
        }
        out
    }

    /// Pairs of the left operand's rows: from row to row, and from pair to pair, in values of 16 bits.
    #[derive(Clone, Copy)]
    struct Left<'a> {
        data: &'a [u16],
        row: usize,
        pair: usize,
    }

    /// See [`super::product_bf16`].
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) fn product(c: &mut [MaybeUninit<f32>], alpha: f32, a: View<'_, u16>, b: View<'_, u16>) {
        let (n, pairs) = (b.columns, a.columns.div_ceil(2));
        if c.is_empty() {
            return;
        }
        if pairs == 0 {
            c.fill(MaybeUninit::new(0.0));
            return;
        }
        // Rows that lie one value after the other are read where they are.
        let in_place = a.column_stride == 1 && a.columns.is_multiple_of(2);
        let packed = if in_place { Vec::new() } else { pack_all::<TILE_ROWS>(a) };
        // SAFETY: 32 bits are two values of 16.
        let packed: &[u16] = unsafe { std::slice::from_raw_parts(packed.as_ptr().cast(), 2 * packed.len()) };
        let right = pack_all::<TILE_COLUMNS>(b.t());
        c.par_chunks_mut(super::ROWS * n).enumerate().for_each(|(block, c)| {
            let rows = c.len() / n;
            for from in (0..pairs).step_by(DEPTH) {
                let depth = DEPTH.min(pairs - from);
                for (panel, right) in right.chunks_exact(pairs * TILE_COLUMNS).enumerate() {
                    let right = &right[from * TILE_COLUMNS..][..depth * TILE_COLUMNS];
                    let columns = TILE_COLUMNS.min(n - panel * TILE_COLUMNS);
                    for tile in 0..rows.div_ceil(TILE_ROWS) {
                        let index = block * (super::ROWS / TILE_ROWS) + tile;
                        let left = if in_place {
                            let start = index * TILE_ROWS * a.row_stride + 2 * from;
                            Left { data: &a.data[start..], row: a.row_stride, pair: 2 }
                        } else {
                            let start = 2 * (index * pairs + from) * TILE_ROWS;
                            Left { data: &packed[start..], row: 2, pair: 2 * TILE_ROWS }
                        };
                        let c = &mut c[tile * TILE_ROWS * n + panel * TILE_COLUMNS..];
                        let rows = TILE_ROWS.min(rows - tile * TILE_ROWS);
                        add_tile(left, right, c, n, rows, columns, from > 0, alpha);
                    }
                }
            }
        });
    }

    /// c [rows, columns] (`stride` from row to row) plus, or set to, alpha · left · right over their pairs.
    #[target_feature(enable = "avx512f,avx512bf16")]
    #[expect(clippy::too_many_arguments, reason = "the innermost function; a struct would be taken apart again")]
    fn add_tile(
        left: Left<'_>,
        right: &[u32],
        c: &mut [MaybeUninit<f32>],
        stride: usize,
        rows: usize,
        columns: usize,
        accumulate: bool,
        alpha: f32,
    ) {
        let mask = |part: usize| -> __mmask16 {
            let used = columns.saturating_sub(16 * part).min(16);
            ((1u32 << used) - 1) as u16
        };
        let masks = [mask(0), mask(1), mask(2)];
        let depth = right.len() / TILE_COLUMNS;
        assert!(rows <= TILE_ROWS && columns <= TILE_COLUMNS && c.len() >= (rows - 1) * stride + columns);
        assert!(depth > 0 && left.data.len() >= (rows - 1) * left.row + (depth - 1) * left.pair + 2);
        // A row past the last is the last once more; nobody reads its sums.
        let lines: [*const u16; TILE_ROWS] =
            std::array::from_fn(|row| left.data.as_ptr().wrapping_add(row.min(rows - 1) * left.row));
        let mut sums = [[_mm512_setzero_ps(); 3]; TILE_ROWS];
        let mut offset = 0;
        for r in right.chunks_exact(TILE_COLUMNS) {
            // SAFETY: r holds 48 values; a __m512bh is 32 BF16 values in the same 64 bytes.
            let r: [__m512bh; 3] = unsafe {
                std::array::from_fn(|part| std::mem::transmute(_mm512_loadu_si512(r.as_ptr().add(16 * part).cast())))
            };
            for (sums, line) in sums.iter_mut().zip(&lines) {
                // SAFETY: as above; `offset` is below depth · pair, so the pair is in the data by the second assert.
                let l: __m512bh =
                    unsafe { std::mem::transmute(_mm512_set1_epi32(line.add(offset).cast::<i32>().read_unaligned())) };
                for (sum, r) in sums.iter_mut().zip(r) {
                    *sum = _mm512_dpbf16_ps(*sum, l, r);
                }
            }
            offset += left.pair;
        }
        let alpha = _mm512_set1_ps(alpha);
        for (row, sums) in sums.iter().enumerate().take(rows) {
            for (part, sum) in sums.iter().enumerate() {
                let at = c.as_mut_ptr().cast::<f32>().wrapping_add(row * stride + 16 * part);
                // SAFETY: masked lanes are neither read nor written; the others lie within c by the assert, and hold
                // values where they are added to.
                unsafe {
                    let sum = if accumulate {
                        _mm512_fmadd_ps(*sum, alpha, _mm512_maskz_loadu_ps(masks[part], at))
                    } else {
                        _mm512_mul_ps(*sum, alpha)
                    };
                    _mm512_mask_storeu_ps(at, masks[part], sum);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    /// Shapes that are whole tiles, ragged in each direction, odd in the inner one, and tiny; both operands as they are
    /// and transposed.
    #[test]
    fn products_equal_the_plain_sum_of_the_rounded_operands() {
        for (m, k, n) in
            [(64, 128, 96), (70, 34, 110), (70, 33, 50), (1, 1, 1), (9, 800, 49), (130, 2, 47), (3, 17, 200)]
        {
            let round = |v: Vec<f32>| v.into_iter().map(to_bf16).collect::<Vec<u16>>();
            let (a, b) = (round(values(m * k, 1)), round(values(k * n, 2)));
            let wide = |v: &[u16]| v.iter().map(|x| f32::from_bits(u32::from(*x) << 16)).collect::<Vec<f32>>();
            let (a_wide, b_wide) = (wide(&a), wide(&b));
            let transposed = |v: &[u16], rows: usize, columns: usize| -> Vec<u16> {
                (0..columns).flat_map(|c| (0..rows).map(move |r| v[r * columns + c])).collect()
            };
            let (a_t, b_t) = (transposed(&a, m, k), transposed(&b, k, n));
            for alpha in [1.0, -0.3] {
                let exact = |i: usize| {
                    let sum: f64 =
                        (0..k).map(|j| f64::from(a_wide[i / n * k + j]) * f64::from(b_wide[j * n + i % n])).sum();
                    f64::from(alpha) * sum
                };
                let check = |c: &[f32], what: &str| {
                    for (i, c) in c.iter().enumerate() {
                        let bound = 1e-6 * (k as f64).sqrt() + 1e-6;
                        assert!(
                            (f64::from(*c) - exact(i)).abs() < bound,
                            "{what} {m}x{k}x{n} at {i}: {c}, {}",
                            exact(i)
                        );
                    }
                };
                for (a, b, what) in [
                    (View::new(&a, m, k), View::new(&b, k, n), "plain"),
                    (View::new(&a_t, k, m).t(), View::new(&b, k, n), "left transposed"),
                    (View::new(&a, m, k), View::new(&b_t, n, k).t(), "right transposed"),
                ] {
                    check(&product_bf16(alpha, a, b), what);
                }
                let (a, b) = (View::new(&a_wide, m, k), View::new(&b_wide, k, n));
                check(&product_f32(alpha, a, b), "f32");
                // What is added to is there already.
                let mut c = values(m * n, 3);
                let before = c.clone();
                serial_f32(&mut c, n, true, alpha, a, b);
                let added: Vec<f32> = c.iter().zip(before).map(|(c, b)| c - b).collect();
                check(&added, "added");
            }
        }
    }

    #[test]
    fn rounding_to_bf16_is_to_the_nearest_even() {
        for bits in (0..=u32::MAX).step_by(65_521) {
            let x = f32::from_bits(bits);
            let expected = half::bf16::from_f32(x);
            assert!(x.is_nan() || to_bf16(x) == expected.to_bits(), "{x}");
            assert_eq!(x.is_nan(), half::bf16::from_bits(to_bf16(x)).is_nan());
        }
    }

    /// Not a check but a figure: `cargo test --lib dense -- --ignored --nocapture`.
    #[test]
    #[ignore = "prints how fast the products are"]
    fn speed() {
        let (m, k, n) = (1024, 576, 1536);
        let (x, w) = (values(m * k, 1), values(n * k, 2));
        let bits = |v: &[f32]| v.iter().map(|v| to_bf16(*v)).collect::<Vec<u16>>();
        let (xb, wb) = (bits(&x), bits(&w));
        let g = bits(&values(m * n, 4));
        let time = |what: &str, f: &mut dyn FnMut()| {
            f();
            let start = std::time::Instant::now();
            (0..20).for_each(|_| f());
            let s = start.elapsed().as_secs_f64() / 20.0;
            println!("{what}: {:.0} GFLOP/s", 2e-9 * (m * k * n) as f64 / s);
        };
        time("f32 forward", &mut || drop(product_f32(1.0, View::new(&x, m, k), View::new(&w, n, k).t())));
        time("bf16 forward", &mut || drop(product_bf16(1.0, View::new(&xb, m, k), View::new(&wb, n, k).t())));
        time("bf16 dX", &mut || drop(product_bf16(1.0, View::new(&g, m, n), View::new(&wb, n, k))));
        time("bf16 dW", &mut || drop(product_bf16(1.0, View::new(&g, m, n).t(), View::new(&xb, m, k))));
    }
}
