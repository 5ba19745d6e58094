// Codecs of the low-precision formats, as formats/*.rs defines them: the same code for the same float, bit for bit.
#pragma once
#include "prim.cuh"

// What an input is quantized to before a product; the numbers are those of `format` in product.rs.
enum Activation { FLOAT = 0, NVFP4 = 1, FP8_STATIC = 2, FP8_TOKEN = 3, FP8_GROUP = 4, MXFP4 = 5, MXFP8 = 6, FP_QUANT_AMAX = 7, FP_QUANT_QUEST = 8,
                  // Added to one of these: as codes and scales, not as BF16, for narrow.cu; twice: in order, for tcgen.cu.
                  CODES = 16 };
// How the scale of an MX block follows from its largest magnitude.
enum Rule { RULE_CEIL = 0, RULE_FLOOR = 1, RULE_EVEN = 2 };

DEV bool finite(float x) { return (bits_of(x) & 0x7f800000u) != 0x7f800000u; }
DEV float magnitude(float x) { return float_of(bits_of(x) & 0x7fffffffu); }
DEV float nan_value() { return float_of(0x7fc00000u); }

// E2M1 code nearest to x, ties to even.
DEV uint32_t encode_e2m1(float x) {
    const float a = magnitude(x);
    const uint32_t code = (a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) + (a > 2.5f) + (a >= 3.5f) + (a > 5.0f);
    return x < 0.0f ? code | 8u : code;
}
DEV float decode_e2m1(uint32_t code) {
    // Twice the magnitudes, a digit each.
    const float v = 0.5f * (float)(0xc8643210u >> 4 * (code & 7u) & 15u);
    return code & 8u ? -v : v;
}
DEV float round_e2m1(float x) { return decode_e2m1(encode_e2m1(x)); }

// Code of the E4M3 value nearest to x, ties to even; saturates; NaN stays NaN.
DEV uint32_t encode_e4m3(float x) {
    const uint32_t sign = bits_of(x) >> 24 & 0x80u;
    float a = magnitude(x);
    if (a != a) return 0x7fu | sign;
    if (a > 448.0f) a = 448.0f;
    const uint32_t bits = bits_of(a);
    // Subnormal: counts units of 2^-9; adding 2^23 makes the unit round the count half to even.
    if (a < 0.015625f) return (bits_of(a * 512.0f + 8388608.0f) & 0xffu) | sign;
    return (((bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20) - (120u << 3)) | sign;
}
DEV float decode_e4m3(uint32_t code) {
    const uint32_t exponent = code >> 3 & 15u, mantissa = code & 7u;
    float v;
    if ((code & 0x7fu) == 0x7fu) v = nan_value();
    else if (exponent == 0) v = (float)mantissa * 0.001953125f;
    else v = float_of((exponent + 120u) << 23 | mantissa << 20);
    return code & 0x80u ? -v : v;
}
// E4M3 of x / scale; what is not finite becomes NaN.
DEV uint32_t encode_fp8(float x, float scale) { return finite(x) ? encode_e4m3(x / scale) : 0x7fu; }

// E8M0 scale, a power of two, of a block whose largest magnitude is `amax`, of elements up to `largest` = 2^emax · something.
DEV float scale_e8m0(float amax, float largest, int emax, int rule) {
    int e;
    if (rule == RULE_CEIL) {
        // The least e with largest · 2^e >= amax: mantissas are compared, which is exact.
        const uint32_t a = bits_of(amax), l = bits_of(largest);
        e = amax < 1.17549435e-38f ? -127 : (int)(a >> 23) - (int)(l >> 23) + ((a & 0x7fffffu) > (l & 0x7fffffu) ? 1 : 0);
    } else {
        e = (int)((bits_of(amax) + (rule == RULE_EVEN ? 1u << 21 : 0u)) >> 23) - 127 - emax;
    }
    e = e < -127 ? -127 : e > 127 ? 127 : e;
    return e == -127 ? float_of(0x00400000u) : float_of((uint32_t)(e + 127) << 23);
}

// e^x, the arithmetic of backend/cpu/elementwise.rs: the same bits.
DEV float exp_f32(float x) {
    float c = x < -87.3f ? -87.3f : x;
    c = c > 88.3f ? 88.3f : c;
    const float shifted = fmaf(c, 1.44269504088896341f, 12582912.0f), n = shifted - 12582912.0f;
    float r = fmaf(n, -0.693359375f, c);
    r = fmaf(n, 2.12194440e-4f, r);
    float p = 1.9875691500e-4f;
    p = fmaf(p, r, 1.3982e-3f);
    p = fmaf(p, r, 8.333452e-3f);
    p = fmaf(p, r, 4.1665796e-2f);
    p = fmaf(p, r, 1.6666665459e-1f);
    p = fmaf(p, r, 0.5f);
    p = fmaf(p, r * r, r) + 1.0f;
    const float power = float_of((bits_of(shifted) << 23) + 0x3f800000u);
    return x < -87.3f ? 0.0f : p * power;
}

// e^x, bit for bit that of the `libm` crate, which the host routes and steps by. Source of the method and its constants: FreeBSD,
// e_expf.c.
DEV float exp_libm(float x) {
    const float a = magnitude(x);
    if (x != x) return x;
    if (x >= 88.72283935546875f) return INFINITY;
    if (x < 0.0f && bits_of(a) >= 0x42cff1b5u) return 0.0f;
    int n = 0;
    float high = x, low = 0.0f, r = x;
    if (bits_of(a) > 0x3eb17218u) {
        n = bits_of(a) > 0x3f851592u ? (int)(1.4426950216f * x + (x < 0.0f ? -0.5f : 0.5f)) : x < 0.0f ? -1 : 1;
        high = x - (float)n * 6.9314575195e-01f;
        low = (float)n * 1.4286067653e-06f;
        r = high - low;
    } else if (bits_of(a) <= 0x39000000u) {
        return 1.0f + x;
    }
    const float rr = r * r, c = r - rr * (1.6666625440e-1f + rr * -2.7667332906e-3f);
    const float y = 1.0f + (r * c / (2.0f - c) - low + high);
    // 2^n in two steps where it would not be a normal number: the last multiplication rounds.
    if (n > 127) return y * float_of(254u << 23) * 2.0f;
    return n >= -126 ? y * float_of((uint32_t)(n + 127) << 23) : y * float_of(25u << 23) * float_of((uint32_t)(n + 102 + 127) << 23);
}
// ln(1 + x) for x from 0 to 1, likewise. Source: FreeBSD, s_log1pf.c.
DEV float log1p_libm(float x) {
    if (x != x || x < 5.9604644775390625e-8f) return x;
    float f = x, c = 0.0f, k = 0.0f;
    if (bits_of(x) >= 0x3ed413d0u) {
        // 1 + x = 2^k · (1 + f), and what its rounding lost; half of it where it is beyond √2.
        const float u = 1.0f + x;
        const uint32_t moved = bits_of(u) + (0x3f800000u - 0x3f3504f3u);
        k = (float)((int)(moved >> 23) - 127);
        c = (x - (u - 1.0f)) / u;
        f = float_of((moved & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
    }
    const float s = f / (2.0f + f), z = s * s, w = z * z;
    const float r = z * (6.6666662693e-1f + w * 2.8498786688e-1f) + w * (4.0000972152e-1f + w * 2.4279078841e-1f), half = 0.5f * f * f;
    return s * (half + r) + (k * 9.0580006145e-6f + c) - half + f + k * 6.9313812256e-1f;
}
// ln(1 + e^x); x where e^x is large.
DEV float softplus(float x) { return (x < 0.0f ? 0.0f : x) + log1p_libm(exp_libm(-magnitude(x))); }
