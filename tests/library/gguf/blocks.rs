//! Every block format, decoded here a second time from ggml-common.h's description of its bytes.

use half::{bf16, f16};

use crate::support::gguf::{Model, Sizes, f32_bytes, import, tensors};
use crate::support::random::Random;

/// One block's bytes to its values.
type Decoder = fn(&[u8]) -> Vec<f32>;
/// Number in the file, name, elements and bytes of a block, where its half-precision fields are, decoder.
type Case = (u32, &'static str, usize, usize, &'static [usize], Decoder);

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Low nibbles are elements 0 to 15, high nibbles 16 to 31.
fn nibble(bytes: &[u8], i: usize) -> u8 {
    if i < 16 { bytes[i] & 15 } else { bytes[i - 16] >> 4 }
}

fn fifth_bit(bytes: &[u8], i: usize) -> u8 {
    (bytes[i / 8] >> (i % 8) & 1) << 4
}

fn q4_0(b: &[u8]) -> Vec<f32> {
    (0..32).map(|i| (f32::from(nibble(&b[2..], i)) - 8.0) * half_at(b, 0)).collect()
}

fn q4_1(b: &[u8]) -> Vec<f32> {
    (0..32).map(|i| f32::from(nibble(&b[4..], i)) * half_at(b, 0) + half_at(b, 2)).collect()
}

fn q5_0(b: &[u8]) -> Vec<f32> {
    (0..32).map(|i| (f32::from(nibble(&b[6..], i) | fifth_bit(&b[2..], i)) - 16.0) * half_at(b, 0)).collect()
}

fn q5_1(b: &[u8]) -> Vec<f32> {
    (0..32).map(|i| f32::from(nibble(&b[8..], i) | fifth_bit(&b[4..], i)) * half_at(b, 0) + half_at(b, 2)).collect()
}

fn q8_0(b: &[u8]) -> Vec<f32> {
    b[2..].iter().map(|q| f32::from(*q as i8) * half_at(b, 0)).collect()
}

/// Position of element `i` of 256 in the layout that Q2_K, Q3_K and Q6_K share: which half, which 32 of it, which of those.
fn split(i: usize) -> (usize, usize, usize) {
    (i / 128, i % 128 / 32, i % 32)
}

fn q2_k(b: &[u8]) -> Vec<f32> {
    let (scales, qs, d, dmin) = (&b[..16], &b[16..80], half_at(b, 80), half_at(b, 82));
    let value = |i| {
        let (half, j, l) = split(i);
        let scale = scales[half * 8 + j * 2 + l / 16];
        let q = qs[half * 32 + l] >> (2 * j) & 3;
        d * f32::from(scale & 15) * f32::from(q) - dmin * f32::from(scale >> 4)
    };
    (0..256).map(value).collect()
}

fn q3_k(b: &[u8]) -> Vec<f32> {
    let (mask, qs, scales, d) = (&b[..32], &b[32..96], &b[96..108], half_at(b, 108));
    let value = |i| {
        let (half, j, l) = split(i);
        let s = half * 8 + j * 2 + l / 16;
        let low = if s < 8 { scales[s] & 15 } else { scales[s - 8] >> 4 };
        let high = scales[8 + s % 4] >> (2 * (s / 4)) & 3;
        let scale = i32::from(low | high << 4) - 32;
        let q = i32::from(qs[half * 32 + l] >> (2 * j) & 3) - 4 * i32::from(mask[l] >> (half * 4 + j) & 1 == 0);
        d * scale as f32 * q as f32
    };
    (0..256).map(value).collect()
}

/// Six-bit scale and minimum of each of 8 groups in 12 bytes: the first four whole, the others in pieces.
fn scale_and_min(s: &[u8], i: usize) -> (f32, f32) {
    let (scale, min) = if i < 4 {
        (s[i] & 63, s[i + 4] & 63)
    } else {
        (s[i + 4] & 15 | s[i - 4] >> 6 << 4, s[i + 4] >> 4 | s[i] >> 6 << 4)
    };
    (f32::from(scale), f32::from(min))
}

fn q4_k(b: &[u8]) -> Vec<f32> {
    let value = |i: usize| {
        let (scale, min) = scale_and_min(&b[4..16], i / 32);
        let byte = b[16 + i / 64 * 32 + i % 32];
        let q = if i % 64 < 32 { byte & 15 } else { byte >> 4 };
        half_at(b, 0) * scale * f32::from(q) - half_at(b, 2) * min
    };
    (0..256).map(value).collect()
}

fn q5_k(b: &[u8]) -> Vec<f32> {
    let value = |i: usize| {
        let (scale, min) = scale_and_min(&b[4..16], i / 32);
        let byte = b[48 + i / 64 * 32 + i % 32];
        let q = if i % 64 < 32 { byte & 15 } else { byte >> 4 } | (b[16 + i % 32] >> (i / 32) & 1) << 4;
        half_at(b, 0) * scale * f32::from(q) - half_at(b, 2) * min
    };
    (0..256).map(value).collect()
}

fn q6_k(b: &[u8]) -> Vec<f32> {
    let (ql, qh, scales, d) = (&b[..128], &b[128..192], &b[192..208], half_at(b, 208));
    let value = |i| {
        let (half, j, l) = split(i);
        let byte = ql[half * 64 + j % 2 * 32 + l];
        let low = if j < 2 { byte & 15 } else { byte >> 4 };
        let q = i32::from(low | (qh[half * 32 + l] >> (2 * j) & 3) << 4) - 32;
        d * f32::from(scales[half * 8 + j * 2 + l / 16] as i8) * q as f32
    };
    (0..256).map(value).collect()
}

/// Random blocks whose half-precision fields, at `halves`, are finite and of both signs.
fn random_blocks(noise: &mut Random, count: usize, bytes: usize, halves: &[usize]) -> Vec<u8> {
    let mut data: Vec<u8> = (0..count * bytes).map(|_| (noise.next() >> 32) as u8).collect();
    for block in data.chunks_mut(bytes) {
        for &at in halves {
            block[at..at + 2].copy_from_slice(&f16::from_f32(noise.uniform() * 0.1).to_le_bytes());
        }
    }
    data
}

#[test]
fn every_block_type_decodes_as_an_independent_decoder_says() {
    const N: usize = 256;
    let sizes = Sizes { layers: 1, hidden: N, ffn: N, heads: 4, kv_heads: 2, head_dim: 8, experts: 0 };
    let cases: [Case; 13] = [
        (0, "F32", 1, 4, &[], |b| vec![f32::from_le_bytes([b[0], b[1], b[2], b[3]])]),
        (1, "F16", 1, 2, &[0], |b| vec![half_at(b, 0)]),
        (30, "BF16", 1, 2, &[0], |b| vec![f32::from_bits(u32::from(b[0]) << 16 | u32::from(b[1]) << 24)]),
        (2, "Q4_0", 32, 18, &[0], q4_0),
        (3, "Q4_1", 32, 20, &[0, 2], q4_1),
        (6, "Q5_0", 32, 22, &[0], q5_0),
        (7, "Q5_1", 32, 24, &[0, 2], q5_1),
        (8, "Q8_0", 32, 34, &[0], q8_0),
        (10, "Q2_K", 256, 84, &[80, 82], q2_k),
        (11, "Q3_K", 256, 110, &[108], q3_k),
        (12, "Q4_K", 256, 144, &[0, 2], q4_k),
        (13, "Q5_K", 256, 176, &[0, 2], q5_k),
        (14, "Q6_K", 256, 210, &[208], q6_k),
    ];
    let mut model = Model::new("llama", sizes, false, true);
    let mut noise = Random(17);
    for (tag, name, elements, bytes, halves, decode) in cases {
        let data = match name {
            // Random bits would hold NaN.
            "F32" => f32_bytes(&noise.values(N * N)),
            _ => random_blocks(&mut noise, N * N / elements, bytes, halves),
        };
        let expected: Vec<bf16> = data.chunks(bytes).flat_map(decode).map(bf16::from_f32).collect();
        let tensor = model.file.tensor("blk.0.ffn_down.weight");
        (tensor.tag, tensor.data) = (tag, data);

        let imported = import(&model.file);
        let report = imported.result.as_ref().unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(report.source_types.contains_key(name), "{:?}", report.source_types);
        let (shape, found) = &tensors(&imported.out().join("model.safetensors"))["model.layers.0.mlp.down_proj.weight"];
        assert_eq!(shape, &[N, N]);
        let differs = expected.iter().zip(found).position(|(a, b)| a.to_bits() != b.to_bits());
        assert_eq!(differs, None, "{name}");
    }
}

#[test]
fn quantized_query_rows_are_moved_as_whole_rows_of_blocks() {
    const N: usize = 64;
    let sizes = Sizes { layers: 1, hidden: N, ffn: N, heads: 4, kv_heads: 2, head_dim: 8, experts: 0 };
    let mut model = Model::new("llama", sizes, false, true);
    let data = random_blocks(&mut Random(3), 32 * N / 32, 34, &[0]);
    let rows: Vec<Vec<f32>> = data.chunks(2 * 34).map(|row| row.chunks(34).flat_map(q8_0).collect()).collect();
    let tensor = model.file.tensor("blk.0.attn_q.weight");
    (tensor.tag, tensor.data) = (8, data);
    let imported = import(&model.file);
    assert!(imported.result.is_ok(), "{:?}", imported.result);
    let (_, found) = &tensors(&imported.out().join("model.safetensors"))["model.layers.0.self_attn.q_proj.weight"];
    // Rows 0, 1, 2 … of a head came from 0, 2, 4, 6, 1, 3, 5, 7.
    for (row, found) in found.chunks(N).enumerate() {
        let source = row / 8 * 8 + [0, 2, 4, 6, 1, 3, 5, 7][row % 8];
        let expected: Vec<bf16> = rows[source].iter().map(|v| bf16::from_f32(*v)).collect();
        assert_eq!(found, expected, "row {row}");
    }
}
