// What a feed-forward makes of its gate and of what that lets through, as backend/cpu/elementwise.rs defines it: the same bits.
#pragma once
#include "formats.cuh"

// The numbers are those of `activation_number` in elementwise.rs.
enum ActivationOf { RELU2 = 0, GELU_TANH = 1, CLAMPED_SWIGLU = 2, SILU = 3 };

DEV float silu(float x) { return x / (1.0f + exp_f32(-x)); }

// activation(g) · u; of g alone for relu².
DEV float activated(int kind, float limit, float g, float u) {
    if (kind == RELU2) {
        g = g < 0.0f ? 0.0f : g;
        return g * g;
    }
    // All others are g · sigmoid(y) · u.
    float y = g;
    if (kind == GELU_TANH) {
        // x/2 · (1 + tanh y) = x · sigmoid(2y), 2y = 2·√(2/π) · (x + 0.044715 x³).
        y = 1.595769122f * fmaf(0.044715f * g * g, g, g);
    } else if (kind == CLAMPED_SWIGLU) {
        g = g > limit ? limit : g;
        u = u > limit ? limit : u;
        u = (u < -limit ? -limit : u) + 1.0f;
        y = 1.702f * g;
    }
    return g / (1.0f + exp_f32(-y)) * u;
}
