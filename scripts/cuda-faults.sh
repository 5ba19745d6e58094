#!/usr/bin/env bash
# Does the check see faults? Plants some in a copy of the kernels and says which check catches each: the build for the CPU (g++)
# or the compiler's PTX, interpreted.
# usage: cuda-faults.sh [--quick] [FILTER]   the list below (of which FILTER is in the name); fails if one is not caught.
#                                            --quick: the CPU's build only where the PTX shows nothing
#        cuda-faults.sh --random N [SEED [FILE]]    N random faults of one token, anywhere or in a file; prints those that nothing
#                                            caught as diffs
set -euo pipefail
exec python3 - "$(cd "$(dirname "$0")/.." && pwd)" "$@" <<'EOF'
import os, random, re, resource, shutil, subprocess, sys, tempfile

root, args = sys.argv[1], sys.argv[2:]
source = root + "/src/backend/cuda"
nvcc = subprocess.run([root + "/scripts/cuda-nvcc.sh"], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
work = tempfile.mkdtemp()
LIMIT = 100  # seconds of a processor for a check

# Name, file, what stands there (once), what shall.
FAULTS = [
    ("weights: wrong rotation", "weight.cuh", "rotr(u, 10) & 0x80c080c0u", "rotr(u, 11) & 0x80c080c0u"),
    ("weights: mask one bit short", "weight.cuh", "a = u & 0x87f087f0u", "a = u & 0x87e087f0u"),
    ("weights: scale of the other row", "weight.cuh", "a[1] = mul_bf16x2(a[1], s1), a[2]", "a[1] = mul_bf16x2(a[1], s0), a[2]"),
    ("weights: bias of the scale's exponent", "weight.cuh", "0x70007000u", "0x70807080u"),
    ("weights: lane of a scale of 32", "weight.cuh", "(lane & 3) / 2", "(lane & 3) / 3"),
    ("weights: upper row in embeddings", "weight.cuh", "upper = n >> 3 & 1", "upper = n >> 4 & 1"),
    ("matmul: rows of tokens not bounded", "matmul.cu", "b[c][1] = row < rows ?", "b[c][1] = true ?"),
    ("matmul: rows of results not bounded", "matmul.cu", "if (out >= n || m * planes >= rows) continue;", "if (out >= n) continue;"),
    ("matmul: last step of a slice dropped", "matmul.cu", "step < last; step++", "step < last - 1; step++"),
    ("matmul: slices overlap", "matmul.cu", "slice_begin(steps, warp + 1);", "slice_begin(steps, warp + 1) + 1;"),
    ("matmul: a slice is not added", "matmul.cu", "w < WARPS; w++) total", "w < WARPS - 1; w++) total"),
    ("matmul: no barrier before the sums are read", "matmul.cu", "    block_sync();\n", "\n"),
    ("matmul: scale of the group before", "matmul.cu", "x_groups + (long)(row / planes) * steps + step)", "x_groups + (long)(row / planes) * steps + step / 2)"),
    ("matmul: some outputs computed twice", "matmul.cu", "e += WARPS * 32", "e += WARPS * 16"),
    ("matmul: columns 2t and 2t+1 exchanged", "matmul.cu", "c * 8 + t * 2 + (i & 1)) * OUT", "c * 8 + t * 2 + (~i & 1)) * OUT"),
    ("primitives: registers of A in another order", "prim.cuh", '"r"(a[1]), "r"(a[2])', '"r"(a[2]), "r"(a[1])'),
    ("primitives: operands of mma in another order", "prim.cuh", "{%8,%9}, {%0,%1,%2,%3};", "{%9,%8}, {%0,%1,%2,%3};"),
    ("primitives: halves of a BF16 pair exchanged", "prim.cuh", '"f"(high), "f"(low)', '"f"(low), "f"(high)'),
    ("primitives: a word of a wide load", "prim.cuh", 'asm("ld.global.nc.v4.u32 {%0,%1,%2,%3}', 'asm("ld.global.nc.v4.u32 {%0,%1,%3,%2}'),
    ("primitives: left for right rotation", "prim.cuh", "__funnelshift_r(u, u, r)", "__funnelshift_l(u, u, r)"),
    ("primitives: something added to a product", "prim.cuh", "0x80008000u", "0x80003f80u"),
    ("operand: ties away from the even code", "formats.cuh", "(a > 0.25f)", "(a >= 0.25f)"),
    ("operand: subnormals of E4M3", "formats.cuh", "a * 512.0f + 8388608.0f", "a * 256.0f + 8388608.0f"),
    ("operand: rounding of an MX scale", "formats.cuh", "1u << 21", "1u << 22"),
    ("operand: half of an MX block", "operand.cu", "const float o = shfl_xor(a, 1);", "const float o = shfl_xor(a, 2);"),
    ("operand: no barrier around the scratch", "operand.cu", "    }\n    block_sync();\n    if (lane_index() == 0)", "    }\n    if (lane_index() == 0)"),
    ("operand: barrier that some warps skip", "operand.cu", "    block_sync();\n    float all", "    if (warp_index() > 0) block_sync();\n    float all"),
    ("operand: a shuffle that some lanes skip", "operand.cu", "            const float o = shfl_xor(a, 1);", "            if (u >= units) continue;\n            const float o = shfl_xor(a, 1);"),
    ("operand: aligned load at the end of a row", "operand.cu", "k % 4 == 0 && k0 + UNIT <= k", "k0 + UNIT <= k"),
    ("operand: row of the low plane", "operand.cu", "(long)(2 * row + 1) * kp", "(long)(2 * row) * kp"),
    ("operand: fp_quant's deviation without its mean", "operand.cu", "(v[i] - mean) * (v[i] - mean)", "v[i] * v[i]"),
    ("rows: rotation by the transpose", "rows.cu", "ld(matrix + j * group + i - first)", "ld(matrix + (i - first) * group + j)"),
    ("rope: sines from the cosines", "attention.cu", "s = ld(turn + half + i)", "s = ld(turn + i)"),
    ("rope: a head's end where half of it turns", "attention.cu", "give(i + pairs, value(i + pairs));", "give(i, value(i));"),
    ("rope: queries do not grow", "attention.cu", "+ i, x * grown)", "+ i, x)"),
    ("cache: values as wide as keys", "attention.cu", "PAGE + slot % PAGE) * row_pitch(dv);", "PAGE + slot % PAGE) * row_pitch(d);"),
    ("attention: values as wide as keys", "attention.cu", "wide = row_pitch(dv)", "wide = row_pitch(d)"),
    ("attention: a sink without its exponential", "attention.cu", "exp_f32(ld(sinks + head) - most)", "(ld(sinks + head) - most)"),
    ("cache: page of the wrong head", "attention.cu", "ld(table + p) * kv_heads + kv_head", "ld(table + p) * kv_heads"),
    ("attention: a piece left out of the sum", "attention.cu", "last = (end - 1) / SPLIT", "last = (end - 2) / SPLIT"),
    ("attention: the other page", "attention.cu", "(ld(table + p) * kv_heads", "(ld(table + (p ^ 1)) * kv_heads"),
    ("attention: window too wide by one", "attention.cu", "max(0, end - window) : 0; }", "max(0, end - window - 1) : 0; }"),
    ("attention: a key after the end", "attention.cu", "last - key0 - 2 * t;", "last - key0 - 2 * t + 1;"),
    ("attention: no barrier before maxima are read", "attention.cu", "maxima[warp * ROWS + row] = most;\n        }\n    block_sync();", "maxima[warp * ROWS + row] = most;\n        }"),
    ("attention: heads that share", "attention.cu", "kv_head * share + row % share", "kv_head * share + row / share"),
    ("attention: sums over queries still in use", "attention.cu", "// Everyone is done with queries, or with the sums before these.\n        block_sync();", ""),
    ("attention: a term of f32 dropped", "attention.cu", "terms(int format) { return format == KV_F32 ? 3 : 2; }", "terms(int format) { return 2; }"),
    ("attention: NaN codes of one byte missed", "attention.cu", "(w & 0x7f7f7f7fu) + 0x01010101u", "(w & 0x7f7f7f7fu) + 0x00010101u"),
    ("tile: stage filled while it is read", "tile.cu", "copy((pass + 1) & 1)", "copy(pass & 1)"),
    ("tile: copies not waited for", "tile.cu", "cp_wait<0>();", "cp_wait<1>();"),
    ("tile: no barrier between stages", "tile.cu", "cp_wait<0>();\n        block_sync();", "cp_wait<0>();"),
    ("tile: end of a slice", "tile.cu", "<= step) slice++", "< step) slice++"),
    ("tile: rows beyond the last", "tile.cu", "min(token0 + row0 + 16 * i, tokens - 1)", "(token0 + row0 + 16 * i)"),
    ("tile: scales of the other stage", "tile.cu", "token_scales[(pass & 1) * TOKENS", "token_scales[((pass + 1) & 1) * TOKENS"),
    ("primitives: a wait that does not wait", "prim.cuh", '"cp.async.wait_group %0;"', '"cp.async.wait_group 1;"'),
    ("primitives: source and size of a copy", "prim.cuh", '[%0], [%1], 16;"\n                 : : "r"((uint32_t)__cvta_generic_to_shared(to + i)), "l"(from)', '[%0], [%1], 16;"\n                 : : "r"((uint32_t)__cvta_generic_to_shared(to + i)), "l"(from + 1)'),
    ("routing: of equal scores the last", "mixture.cu", "&& a < at)", "&& a > at)"),
    ("routing: of equal groups the last", "mixture.cu", "&& other < g)", "&& other > g)"),
    ("routing: of a lane's equal scores the last", "mixture.cu", "            if (o > most) most = o, at = e;", "            if (o >= most) most = o, at = e;"),
    ("routing: chosen again", "mixture.cu", ", orders[base + at] = NEVER;", ";"),
    ("routing: no barrier before the next is chosen", "mixture.cu", ", orders[base + at] = NEVER;\n        warp_sync();", ", orders[base + at] = NEVER;"),
    ("routing: places in the order of scores", "mixture.cu", "        for (int other = 0; other < k; other++) to += chosen[base + other] < e;\n", "        to = i;\n"),
    ("mixture: rows of an expert", "mixture.cu", "x + (long)first * planes * k", "x + (long)first * k"),
    ("mixture: one expert not added", "mixture.cu", "i < k; i++) sum = sum + ld", "i < k - 1; i++) sum = sum + ld"),
    ("mixture: no barrier around counts", "mixture.cu", "of_warps[warp_index()] = upto;\n        block_sync();", "of_warps[warp_index()] = upto;"),
    ("mixture: shares read before they are written", "mixture.cu", " : v);\n    }\n    warp_sync();", " : v);\n    }"),
    ("mixture: row scales for biases", "mixture.cu", "(const float*)ld(p + 4),\n                           y", "(const float*)ld(p + 3),\n                           y"),
    ("mixture: rows of gate and up as wide as one", "mixture.cu", "*g = gate + (long)row * pitch", "*g = gate + (long)row * k"),
    ("mixture: the gate for what is beside it", "mixture.cu", "up ? up + (long)row * pitch", "up ? gate + (long)row * pitch"),
    ("routing: sigmoid of the other sign", "mixture.cu", "exp_libm(-v)", "exp_libm(v)"),
    ("routing: -0 below 0", "mixture.cu", "bits_of(x + 0.0f)", "bits_of(x)"),
    ("routing: what is no number is not chosen", "mixture.cu", "    if (x != x) return 0x7fffffff;\n", ""),
    ("routing: the correction does not choose", "mixture.cu", "order_of(bias ? v + ld(bias + e) : v)", "order_of(v)"),
    ("routing: the correction weighs", "mixture.cu", "best[base + i] = values[base + at]", "best[base + i] = values[base + at] + (bias ? ld(bias + at) : 0.0f)"),
    ("routing: groups by their best alone", "mixture.cu", "order_of(two[0] + two[1])", "order_of(two[0])"),
    ("routing: groups by what is not corrected", "mixture.cu", "const float v = bias ? values[base + e] + ld(bias + e) : values[base + e];", "const float v = values[base + e];"),
    ("routing: a group's second is its first of before", "mixture.cu", "else if (o > second) second = o, two[1] = v;", ""),
    ("routing: a group too many", "mixture.cu", "(rank < top_groups) continue;", "(rank <= top_groups) continue;"),
    ("routing: others' experts score nothing", "mixture.cu", "orders[base + e] = NEVER;", "orders[base + e] = 0;"),
    ("routing: no barrier before groups are compared", "mixture.cu", "order_of(two[0] + two[1]);\n        }\n        warp_sync();", "order_of(two[0] + two[1]);\n        }"),
    ("routing: the chosen's logits changed while read", "mixture.cu", "most = fmaxf(most, best[base + i]);\n        warp_sync();", "most = fmaxf(most, best[base + i]);"),
    ("routing: one of the chosen not in the sum", "mixture.cu", "i < k; i++) total +=", "i < k - 1; i++) total +="),
    ("routing: shares added up before all are", "mixture.cu", "best[base + i] / total;\n        warp_sync();", "best[base + i] / total;"),
    ("routing: what is added to the sum", "mixture.cu", "own / (kept + epsilon)", "own / kept"),
    ("routing: the factor", "mixture.cu", " : own) * scale);", " : own));"),
    ("activations: gelu without its cube", "activation.cuh", "fmaf(0.044715f * g * g, g, g)", "g"),
    ("activations: clamped up without its one", "activation.cuh", "(u < -limit ? -limit : u) + 1.0f;", "(u < -limit ? -limit : u);"),
    ("activations: clamped gate's sigmoid", "activation.cuh", "y = 1.702f * g;", "y = g;"),
    ("sample: rounding of e^x", "sample.cu", "6755399441055744.0, n", "6755399441055745.0, n"),
    ("sample: candidates of the run before", "sample.cu", "i < run; i += 32) at +=", "i <= run; i += 32) at +="),
    ("sample: no barrier before a sum is read", "sample.cu", "scratch[warp_index()] = v;\n    block_sync();\n    double", "scratch[warp_index()] = v;\n    double"),
    ("recurrent: a tail that begins late", "recurrent.cu", "from = at + j - (kernel - 1)", "from = at + j - kernel"),
    ("recurrent: a beginning finds the slot's tail", "recurrent.cu", "else if (!begins) x = ld(tail", "else x = ld(tail"),
    ("recurrent: a beginning finds the slot's state", "recurrent.cu", "inside && ld(span + 2) == 0, lane, width, s);", "inside, lane, width, s);"),
    ("recurrent: the tail of a short pass", "recurrent.cu", "if (j + len >= kept)", "if (j + len > kept)"),
    ("recurrent: group of a head", "recurrent.cu", "h / (heads / groups) * width", "h % groups * width"),
    ("recurrent: key head of a value head", "recurrent.cu", "h / (value_heads / key_heads) * key_dim", "h % key_heads * key_dim"),
    ("recurrent: a state's row left as it was", "recurrent.cu", "    store_state(kept, inside, lane, width, s);", ""),
    ("recurrent: value put right before it decays", "recurrent.cu", "            s[i] *= decay;\n            sum = fmaf(s[i], key[i], sum);", "            sum = fmaf(s[i], key[i], sum);\n            s[i] *= decay;"),
    ("recurrent: eight lanes for sixteen", "recurrent.cu", "m = LANES / 2; m > 0", "m = LANES / 4; m > 0"),
    ("recurrent: queries longer than one", "recurrent.cu", "(run % heads < scaled ? scale : 1.0f)", "scale"),
    ("recurrent: gate after the norm", "recurrent.cu", "squares = fmaf(gated(i), gated(i), squares)", "squares = fmaf(ld(y + token * inner + first + i), ld(y + token * inner + first + i), squares)"),
    ("recurrent: no barrier before the sum is read", "recurrent.cu", "scratch[warp_index()] = squares;\n    block_sync();", "scratch[warp_index()] = squares;"),
    ("recurrent: ln(1 + x) beyond the root of 2", "formats.cuh", "c = (x - (u - 1.0f)) / u;", "c = (u - 1.0f - x) / u;"),
    ("recurrent: a step's upper limit", "recurrent.cu", "step = step > high ? high : step;", ""),
    ("activations: clamp of the gate from below too", "activation.cuh", "g = g > limit ? limit : g;", "g = g > limit ? limit : g;\n        g = g < -limit ? -limit : g;"),
    ("activations: relu without its square", "activation.cuh", "return g * g;", "return g;"),
    ("narrow: products of the other half's scales", "prim.cuh", '{%10}, {0,%12}, {%11}, {0,%12};', '{%10}, {0,0}, {%11}, {0,%12};'),
    ("narrow: lane of a token's scales", "prim.cuh", '{%10}, {0,%12}, {%11}, {0,%12};', '{%10}, {0,%12}, {%11}, {0,3};'),
    ("narrow: bytes of MX scales", "prim.cuh", 'e2m1.e2m1.f32.ue8m0 "\n            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3}, {%10}, {%12,0}, {%11}, {%12,0};', 'e2m1.e2m1.f32.ue8m0 "\n            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3}, {%10}, {%12,0}, {%11}, {0,0};'),
    ("narrow: registers of A in another order", "prim.cuh", '{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3}, {%10}, {0,%12}', '{%4,%6,%5,%7}, {%8,%9}, {%0,%1,%2,%3}, {%10}, {0,%12}'),
    ("narrow: registers of B exchanged", "prim.cuh", 'e2m1.e2m1.f32.ue8m0 "\n            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}', 'e2m1.e2m1.f32.ue8m0 "\n            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%9,%8}'),
    ("narrow: scales of weights for those of tokens", "prim.cuh", '{%10}, {0,%12}, {%11}, {0,%12};', '{%11}, {0,%12}, {%10}, {0,%12};'),
    ("narrow: a fragment turned by a lane", "narrow.cu", "((long)row * steps + step) * 4 + t) *", "((long)row * steps + step) * 4 + (t + 1) % 4) *"),
    ("narrow: the wrong half of K", "narrow.cu", "J>(acc[r][c], q[r][0], b[c].x", "J>(acc[r][c], q[r][1], b[c].x"),
    ("narrow: a half's scales for both", "narrow.cu", "J + 1>(acc[r][c], q[r][1], b[c].z", "J>(acc[r][c], q[r][1], b[c].z"),
    ("narrow: last step of a slice dropped", "narrow.cu", "step < last; step++", "step < last - 1; step++"),
    ("narrow: scales of the step before", "narrow.cu", "pitch + step * WORDS + t %", "pitch + step / 2 * WORDS + t %"),
    ("narrow: a token's factor left out", "narrow.cu", "return x_scales ? float_of(ld(x_scales + (long)(m + 1) * token_pitch(w, steps) - 1)) : 1.0f;", "return 1.0f;"),
    ("narrow: rows of tokens not bounded", "narrow.cu", "b[c] = row < rows ?", "b[c] = true ?"),
    ("narrow: the tensor's scale left out", "narrow.cu", "store_sums<NT>(acc, sums, (int)tile0 * TILE, row0, rows, 1, n, 1.0f, row_scales, x_scale,", "store_sums<NT>(acc, sums, (int)tile0 * TILE, row0, rows, 1, n, 1.0f, row_scales, 1.0f,"),
    ("narrow: the tensor's scale twice", "narrow.cu", "store_tile(total, (int)tile0 * TILE, token0, tokens, n, 1.0f, row_scales, x_scale,", "store_tile(total, (int)tile0 * TILE, token0, tokens, n, x_scale, row_scales, x_scale,"),
    ("narrow: tile: a stage's scales before they are there", "narrow.cu", "token_scales[(stage ^ 1) * TOKENS * WORDS + thread] = next_scale", "token_scales[stage * TOKENS * WORDS + thread] = next_scale"),
    ("narrow: tile: a slice not begun from nothing", "narrow.cu", "total[r][c][i] += acc[r][c][i], acc[r][c][i] = 0.0f;", "total[r][c][i] += acc[r][c][i];"),
    ("narrow: tile: no barrier between stages", "narrow.cu", "cp_wait<0>();\n        block_sync();", "cp_wait<0>();"),
    ("narrow: tile: the last token again", "narrow.cu", "min(token0 + token + ROWS * i, tokens - 1)", "(token0 + token + ROWS * i)"),
    ("narrow: layout: scales of the other rows", "weight.cuh", "(lane >> 2) * 2 + (lane & 1);", "(lane >> 2) * 2 + (lane >> 1 & 1);"),
    ("narrow: embedding: words beyond column 32", "weight.cuh", "t < 2 ? (upper ? q.y : q.x)", "t < 3 ? (upper ? q.y : q.x)"),
    ("narrow: operand: order of a row's words", "operand.cu", "natural ? at : at % 4 * 4 + at / 4", "natural ? at : at"),
    ("narrow: operand: what is broken is not told", "operand.cu", "broken = 1.0f, byte = 0;", "byte = 0;"),
    ("narrow: operand: place of a block's scale", "operand.cu", "scale_row() + u * UNIT / block, (uint8_t)byte", "scale_row() + u, (uint8_t)byte"),
    ("narrow: mixture: rows of an expert", "mixture.cu", "x + (long)first * (k / 32 * words(W)),", "x + (long)first * (k / 16 * words(W)),"),
    ("narrow: mixture: scales of an expert", "mixture.cu", "x_scales + (long)first * token_pitch(W, k / STEP)", "x_scales"),
    ("narrow: eight bits: registers of A in another order", "prim.cuh", 'e4m3.e4m3.f32.ue8m0 "\n        "{%0,%1,%2,%3}, {%4,%5,%6,%7}', 'e4m3.e4m3.f32.ue8m0 "\n        "{%0,%1,%2,%3}, {%4,%6,%5,%7}'),
    ("narrow: eight bits: registers of B exchanged", "prim.cuh", 'e4m3.e4m3.f32.ue8m0 "\n        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}', 'e4m3.e4m3.f32.ue8m0 "\n        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%9,%8}'),
    ("narrow: eight bits: byte of a token's scale", "prim.cuh", 'e4m3.e4m3.f32.ue8m0 "\n        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3}, {%10}, {%12,0}, {%11}, {%12,0}', 'e4m3.e4m3.f32.ue8m0 "\n        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3}, {%10}, {%12,0}, {%11}, {0,0}'),
    ("narrow: eight bits: lane of a token's scale", "prim.cuh", 'e4m3.e4m3.f32.ue8m0 "\n        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3}, {%10}, {%12,0}, {%11}, {%12,0}', 'e4m3.e4m3.f32.ue8m0 "\n        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3}, {%10}, {%12,0}, {%11}, {%12,1}'),
    ("narrow: eight bits: lanes of weights' scales", "prim.cuh", 'e4m3.e4m3.f32.ue8m0 "\n        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3}, {%10}, {%12,0}', 'e4m3.e4m3.f32.ue8m0 "\n        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3}, {%10}, {%12,1}'),
    ("narrow: eight bits: two for one", "narrow.cu", "b0, b1, 127, 127)", "b0, b1, 127, 128)"),
    ("narrow: eight bits: scales of the first half for both", "narrow.cu", "words(W) == 2 ? 2 : 0>(acc", "0>(acc"),
    ("narrow: eight bits: tokens of the first half again", "narrow.cu", "* words(W) + unit) : U4", "* words(W)) : U4"),
    ("narrow: eight bits: weights of the first half again", "narrow.cu", "2 * unit + j, lane)", "j, lane)"),
    ("narrow: eight bits: a step's sum without its scales", "narrow.cu", "GROUPED ? part : acc, q, s, b, xs", "acc, q, s, b, xs"),
    ("narrow: eight bits: tile: tokens of the first half again", "narrow.cu", "t * words(W) + unit]", "t * words(W)]"),
    ("narrow: eight bits: tile: weights of the next step too early", "narrow.cu", "unit + 1 < words(W) ? step : next", "next"),
    ("narrow: eight bits: tile: rows of a stage overlap", "narrow.cu", "words(w) == 1 ? 4 : 9", "words(w) == 1 ? 4 : 7"),
    ("narrow: eight bits: tile: scales of the other stage", "narrow.cu", "token_scales[stage * TOKENS + m]", "token_scales[(stage ^ 1) * TOKENS + m]"),
    ("narrow: eight bits: tile: a group's scale for its neighbour's token", "narrow.cu", "(const uint32_t*)x_groups + (long)scaled * steps", "(const uint32_t*)x_groups + (long)min(scaled, 1) * steps"),
    ("narrow: eight bits: layout: products exchanged", "weight.cuh", "(2 * words(W)) + product)", "(2 * words(W)) + (product ^ 1))"),
    ("narrow: eight bits: embedding: runs of eight exchanged", "weight.cuh", "g * 4 + first + i)", "g * 4 + first + (i ^ 1))"),
    ("narrow: eight bits: embedding: the other row", "weight.cuh", "decode_e4m3((upper ? q.w : q.z)", "decode_e4m3((upper ? q.z : q.w)"),
    ("narrow: eight bits: operand: bytes of a word", "operand.cu", "bits_of(v[i]) << 8 * (i % 4)", "bits_of(v[i]) << 8 * (3 - i % 4)"),
    ("narrow: eight bits: operand: rows of four bits", "operand.cu", "code_row(8)", "code_row(4)"),
    ("narrow: eight bits: operand: what is broken is not told", "operand.cu", "block && !sound ? 0x7fu", "block && !sound ? 0x7eu"),
    ("narrow: eight bits: mixture: groups of an expert", "mixture.cu", ": nullptr,\n                                  x_groups ? x_groups + (long)first * (k / STEP) : nullptr", ": nullptr,\n                                  x_groups"),
    ("narrow: eight bits: mixture: grid of an expert", "mixture.cu", "(const float*)ld(p + 2), x + (long)first * (k / 32 * words(W))", "nullptr, x + (long)first * (k / 32 * words(W))"),
    ("tcgen: rows eight on at another stride", "tcgen.cu", "16 * SIDE, 128),\n", "16 * SIDE, 256),\n"),
    ("tcgen: columns 32 on at another offset", "tcgen.cu", "16 * TOKENS, TOKENS == 8 ? 0 : 128)", "8 * TOKENS, TOKENS == 8 ? 0 : 128)"),
    ("tcgen: the product's second half from the first", "tcgen.cu", "base + 2 * SIDE * i)", "base + SIDE * i)"),
    ("tcgen: scales of the column beside", "tcgen.cu", "scales + 4 * piece, scales + 8 + 4 * piece, add", "scales + 4 * piece, scales + 9 + 4 * piece, add"),
    ("tcgen: scales of the other piece", "tcgen.cu", "const int piece = PIECES == 2 ? i : 0", "const int piece = PIECES == 2 ? 1 - i : 0"),
    ("tcgen: bytes of MX scales", "tcgen.cu", "part = PIECES == 2 ? 0 : 2 * i", "part = PIECES == 2 ? 0 : 2 - 2 * i"),
    ("tcgen: scales of one stage for all", "tcgen.cu", "sums + SIDE + stage * 16", "sums + SIDE"),
    ("tcgen: sums not begun from zero", "tcgen.cu", "step > begin);", "step > first);"),
    ("tcgen: no fence between proxies", "tcgen.cu", "            async_fence();\n", ""),
    ("tcgen: copies waited for too late", "tcgen.cu", "cp_wait<STAGES - 3>();", "cp_wait<STAGES - 2>();"),
    ("tcgen: no barrier before products are issued", "tcgen.cu", "            block_sync();\n            if (thread == 0) {", "            if (thread == 0) {"),
    ("tcgen: no fence after the barrier", "tcgen.cu", "                tensor_fence_after();\n                issue", "                issue"),
    ("tcgen: no fence before sums are loaded", "tcgen.cu", "        auto drain = [&] {\n            tensor_fence_after();", "        auto drain = [&] {"),
    ("tcgen: no fence behind loaded sums", "tcgen.cu", "            tensor_fence_before();\n        };", "        };"),
    ("tcgen: the other phase", "tcgen.cu", "at / STAGES & 1);", "~at / STAGES & 1);"),
    ("tcgen: no commit", "tcgen.cu", "    tensor_commit(done, stage);\n", ""),
    ("tcgen: a stage filled while it is read", "tcgen.cu", "if (step - first >= 2) wait(step - 2);", "if (step - first >= 3) wait(step - 3);"),
    ("tcgen: sums read before they are done", "tcgen.cu", "                wait(step - 1);\n                drain();", "                drain();"),
    ("tcgen: lanes of another warp", "tcgen.cu", "(uint32_t)(warp % 4 * 32) << 16) + warp / 4 * OWN", "(uint32_t)(warp % 2 * 32) << 16) + warp / 4 * OWN"),
    ("tcgen: columns of the other half", "tcgen.cu", "<< 16) + warp / 4 * OWN + c, v)", "<< 16) + c, v)"),
    ("tcgen: outputs of another lane", "tcgen.cu", "(int)tile * SIDE + warp % 4 * 32 + lane", "(int)tile * SIDE + warp % 4 * 32 + (lane ^ 1)"),
    ("tcgen: another token's factor", "tcgen.cu", "x_scales + (long)(m + 1) * pitch - 1)), bias, add));", "x_scales + (long)(token0 + 1) * pitch - 1)), bias, add));"),
    ("tcgen: tensor memory that is not freed", "tcgen.cu", "            tensor_free<TENSOR_COLUMNS_USED>(sums);\n", ""),
    ("tcgen: freed before all have loaded", "tcgen.cu", "        drain();\n        block_sync();\n        if (warp == 0) {", "        drain();\n        if (warp == 0) {"),
    ("tcgen: columns beyond eight tokens without scales", "tcgen.cu", "        if (TOKENS == 8)\n            for", "        if (TOKENS == 0)\n            for"),
    ("tcgen: a slice's sums at another's place", "tcgen.cu", "((long)block_z() * tokens + m) * n + out, total[i])", "((long)(block_z() ^ 1) * tokens + m) * n + out, total[i])"),
    ("tcgen: a slice not added", "tcgen.cu", "slice < WARPS; slice++) total", "slice < WARPS - 1; slice++) total"),
    ("tcgen: rows of tokens not bounded", "tcgen.cu", "x + ((long)min(token0 + row, tokens - 1) * steps", "x + ((long)(token0 + row) * steps"),
    ("tcgen: the shape in the descriptor", "tcgen.cu", "(uint32_t)(SIDE / 8) << 17", "(uint32_t)(SIDE / 16) << 17"),
    ("tcgen: one kind of scales for all", "tcgen.cu", "(w == W_TCGEN_32 ? 1u << 23 : 0)", "(w == W_TCGEN_16 ? 1u << 23 : 0)"),
    ("tcgen: a wait that is given up is not told", "tcgen.cu", "        if (lost) total[i] = nan_value();\n", ""),
    ("tcgen: primitives, registers not waited for", "prim.cuh", 'x32.b32 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"\n                 "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, [%32];\\n"\n                 "tcgen05.wait::ld.sync.aligned;"', 'x32.b32 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"\n                 "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, [%32];"'),
    ("tcgen: primitives, scales of a and b exchanged", "prim.cuh", 'kind::mxf4nvf4.block_scale.block16 [%0], %1, %2, %3, [%5], [%6], p;', 'kind::mxf4nvf4.block_scale.block16 [%0], %1, %2, %3, [%6], [%5], p;'),
    ("tcgen: primitives, the mbarrier's making not fenced", "prim.cuh", '    asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");\n', ''),
    ("rows: gate of the first row for all", "rows.cu", "(long)block_x() * width + (width == 1 ? 0 : i)", "(long)(width == 1 ? 0 : block_x()) * width + (width == 1 ? 0 : i)"),
    ("rows: a column of the second tensor", "rows.cu", "(-1 - c)", "(-c)"),
    ("rows: grid of blocks", "rows.cu", "const int out = block_x() * 8 + warp_index()", "const int out = block_x() * 4 + warp_index()"),
    ("rows: a bound", "rows.cu", "if (k0 + i < k) st(out", "if (k0 + i <= k) st(out"),
    ("rows: index of the source", "rows.cu", "const long to = (long)ld(index + block_x()) * k, from = (long)block_x() * k;", "const long to = (long)block_x() * k, from = (long)ld(index + block_x()) * k;"),
]


def run(command, **more):
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)


def sources(name):
    folder = f"{work}/{name}"
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("kernels", "standin"):
        shutil.copytree(f"{source}/{part}", f"{folder}/{part}")
    return folder


# All kernels, and primitives alone.
ALL = "standin/checked.cu"


def edit(folder, file, text):
    with open(f"{folder}/kernels/{file}", "w") as f:
        f.write(text)


# What only the family of sm_100 has: a file, and the check of its name.
TCGEN = "tcgen.cu"
# Files that such a one includes, whose kernels its check does not ask for: they would take most of the time.
INCLUDED = {"narrow.cu": ("matmul.cu", "tile.cu"), TCGEN: ("matmul.cu", "tile.cu", "narrow.cu")}


def to_ptx(folder, unit):
    """The PTX of a folder's file, for the family of sm_120, which has all but what sm_100's alone has; None if it does not compile."""
    architecture, of = "compute_100f" if unit.endswith(TCGEN) else "compute_120f", folder
    if included := INCLUDED.get(os.path.basename(unit)):
        of = f"{work}/alone"
        shutil.rmtree(of, ignore_errors=True)
        shutil.copytree(f"{folder}/kernels", f"{of}/kernels")
        for file in included:
            text = open(f"{of}/kernels/{file}").read()
            edit(of, file, re.sub(r"^(MATMULS|TILES_OF|NARROW_\w+)\(.*\)$", "", text, flags=re.M))
    made = run([nvcc, "-std=c++17", "-O3", "-fmad=false", "-ptx", f"-arch={architecture}", "-o", f"{folder}/k.ptx", f"{of}/{unit}"])
    return open(f"{folder}/k.ptx").read() if made.returncode == 0 else None


def build(folder, *flags):
    vector = ["-march=x86-64-v3"] if os.uname().machine == "x86_64" else []
    return run([os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-w", "-ffp-contract=off", *vector, *flags, "-pthread", "-o", f"{folder}/check", f"{folder}/standin/check.cc"])


def caught(command):
    """What a check says first of a fault, at which it is ended; None if it passes."""
    last = ""
    limit = lambda: resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=limit) as check:
        for line in check.stdout:
            last = line.rstrip()
            if last.startswith("FAIL"):
                check.terminate()
                return last
    return None if check.returncode == 0 else f"ended with {check.returncode}: {last}"


FAMILIES = re.findall(r'{"(\w+)", check_\w+}', open(f"{source}/standin/check.cc").read())


def families(file):
    """The checks that a fault in a file can change; none named: all."""
    return [file[:-3]] if file[:-3] in FAMILIES and file.endswith(".cu") else []


base = sources("base")
if (built := build(base, "-DPTX")).returncode:
    sys.exit(built.stdout)
BASE = {}


def base_of(file):
    """What is compiled to see a fault in a file, the file itself where it stands alone, and its PTX without faults."""
    if file not in BASE:
        for unit in [f"kernels/{file}"] * bool(families(file)) + [ALL]:
            # A file alone may lack what its check asks for.
            if (ptx := to_ptx(base, unit)) and not by_ptx(base, file):
                BASE[file] = unit, ptx
                break
        else:
            sys.exit(f"{file}: the kernels as they are do not compile, or do not pass")
    return BASE[file]


def by_ptx(folder, file):
    return caught([f"{base}/check", "--ptx", f"{folder}/k.ptx", *families(file)])


def by_cpu(folder, file):
    return "does not compile" if build(folder).returncode else caught([f"{folder}/check", *families(file)])


def planted(wanted, quick):
    missed = 0
    for name, file, old, new in FAULTS:
        if wanted not in name:
            continue
        text = open(f"{source}/kernels/{file}").read()
        if text.count(old) != 1:
            print(f"{name:50s} CANNOT BE PLANTED: {text.count(old)} times in {file}", flush=True)
            missed += 1
            continue
        folder = sources("fault")
        edit(folder, file, text.replace(old, new))
        # By the check of tcgen.cu, wherever the fault is.
        by = TCGEN if name.startswith("tcgen") else file
        if to_ptx(folder, base_of(by)[0]) is None:
            sys.exit(f"{name}: does not compile")
        ptx = by_ptx(folder, by)
        cpu = None if quick and ptx else by_cpu(folder, by)
        who = " and ".join(w for w, found in (("g++", cpu), ("PTX", ptx)) if found) or "NOTHING"
        missed += who == "NOTHING"
        print(f"{name:50s} {who:12s} {(ptx or cpu or '')[:130]}", flush=True)
    print(f"{missed} faults not caught or not planted")
    return missed


TOKEN = re.compile(r'//[^\n]*|/\*.*?\*/|"[^"\n]*"|0x[0-9a-fA-F]+[uUlL]*|\d+\.\d*(?:e[-+]?\d+)?f?|\d+[uUlL]*|[A-Za-z_]\w*|<<=|>>=|&&|\|\||<<|>>|[-+*/%&|^=!<>]=|\+\+|--|->|::|[-+*/%<>=&|^!?:~.]', re.S)
SWAPS = {"+": "-*", "-": "+*", "*": "+/", "/": "*%", "%": "/*", "<": ("<=", ">"), "<=": ("<", ">="), ">": (">=", "<"), ">=": (">", "<="),
         "==": ("!=",), "!=": ("==",), "&&": ("||",), "||": ("&&",), "&": "|^", "|": "&^", "^": "|&", "<<": (">>",), ">>": ("<<",),
         "+=": ("-=", "="), "-=": ("+=",), "*=": ("+=", "/="), "min": ("max",), "max": ("min",), "true": ("false",), "false": ("true",),
         "shfl_xor": ("shfl",), "continue": ("break",), "~": "-", "!": ("",)}
KEYWORDS = set("if else for while return const constexpr int float long bool void template class struct enum auto continue break typename using char double unsigned inline static alignas uint32_t uint16_t uint8_t include pragma define ifdef else endif once asm volatile".split())


def tokens(file, text):
    """Where a fault can be planted, with the rest of the text blanked out of the view: comments, directives, the CPU's branch."""
    end = text.find("#else\n#include") if file == "prim.cuh" else -1
    for m in TOKEN.finditer(text):
        line = text[text.rfind("\n", 0, m.start()) + 1:m.start()]
        if m[0].startswith(("//", "/*")) or line.lstrip().startswith("#") and not line.lstrip().startswith("#define MATMUL"):
            continue
        if end >= 0 and end <= m.start() < text.find("#endif", end):
            continue
        yield m


def mutate(rng, file, text):
    """One random fault: start, end, what it becomes. None if the place that was drawn has none."""
    all_tokens = list(tokens(file, text))
    m = rng.choice(all_tokens)
    t = m[0]
    if t.startswith('"'):
        holes = list(re.finditer(r"%(\d)", t))
        if holes:
            h = rng.choice(holes)
            return m.start() + h.start(1), m.start() + h.end(1), str(rng.choice([d for d in range(10) if str(d) != h[1]]))
        return None
    if t in ("block_sync", "warp_sync"):
        at = text.find(";", m.end())
        return m.start(), at, ""
    if t in SWAPS:
        return m.start(), m.end(), rng.choice(SWAPS[t])
    if t.startswith("0x"):
        digits = re.match(r"0x[0-9a-fA-F]+", t)[0]
        value = int(digits, 16) ^ 1 << rng.randrange(max(4 * (len(digits) - 2), 1))
        return m.start(), m.end(), f"0x{value:x}" + t[len(digits):]
    if re.match(r"\d+\.", t):
        number, tail = re.match(r"([\d.]+)(.*)", t).groups()
        digit = rng.choice([i for i, c in enumerate(number) if c.isdigit()])
        new = str((int(number[digit]) + rng.choice([1, 9])) % 10)
        return m.start(), m.end(), number[:digit] + new + number[digit + 1:] + tail
    if re.match(r"\d", t):
        n, tail = re.match(r"(\d+)(.*)", t).groups()
        return m.start(), m.end(), str(rng.choice([int(n) + 1, max(int(n) - 1, 0), int(n) * 2])) + tail
    if re.match(r"[A-Za-z_]", t) and t not in KEYWORDS and not t.isupper():
        # Another name from nearby.
        near = {x[0] for x in all_tokens if abs(x.start() - m.start()) < 600 and re.match(r"[a-z_]\w*$", x[0])} - KEYWORDS - {t}
        return (m.start(), m.end(), rng.choice(sorted(near))) if near else None
    return None


def at_random(count, seed, only=None):
    rng = random.Random(seed)
    files = sorted(f for f in os.listdir(f"{source}/kernels") if f != "all.cu" and only in (None, f))
    texts = {f: open(f"{source}/kernels/{f}").read() for f in files}
    weights = [len(list(tokens(f, texts[f]))) for f in files]
    tally = {"equal": 0, "caught": 0, "survived": 0}
    seen, survivors = set(), []
    while sum(tally.values()) < count:
        file = rng.choices(files, weights)[0]
        change = mutate(rng, file, texts[file])
        if change is None or (file, *change) in seen or texts[file][change[0]:change[1]] == change[2]:
            continue
        seen.add((file, *change))
        folder = sources("fault")
        edit(folder, file, texts[file][:change[0]] + change[2] + texts[file][change[1]:])
        ptx = to_ptx(folder, base_of(file)[0])
        if ptx is None:
            continue
        verdict, said = "equal", ""
        if ptx != base_of(file)[1]:
            said = by_ptx(folder, file) or by_cpu(folder, file)
            verdict = "caught" if said else "survived"
        tally[verdict] += 1
        diff = run(["diff", "-U0", f"{base}/kernels/{file}", f"{folder}/kernels/{file}"]).stdout
        lines = [l for l in diff.splitlines() if l[:1] in "-+@" and l[:3] not in ("---", "+++")]
        if verdict == "survived":
            survivors.append(f"{file} " + "\n".join(lines))
        print(f"{verdict:8s} {file}: {texts[file][change[0]:change[1]]!r} -> {change[2]!r} {lines[0] if lines else ''} {(said or '')[:110]}", flush=True)
    changed = tally["caught"] + tally["survived"]
    print(f"{tally['caught']} of {changed} caught ({tally['caught'] / max(changed, 1):.1%}); {tally['equal']} the same PTX")
    for s in survivors:
        print("SURVIVED " + s)


try:
    if args[:1] == ["--random"]:
        at_random(int(args[1]), int(args[2]) if len(args) > 2 else 1, *args[3:4])
    else:
        sys.exit(planted("".join(a for a in args if a != "--quick"), "--quick" in args) > 0)
finally:
    shutil.rmtree(work)
EOF
