//! The ggml block formats, decoded to f32: most by candle, the plain ones and those that candle lacks here.

use std::borrow::Cow;

use candle_core::CpuStorage;
use candle_core::quantized::GgmlDType;
use half::{bf16, f16};

use crate::formats::{e2m1, e4m3};

/// A ggml storage format that Recoup decodes.
#[derive(Clone, Copy, Debug)]
pub(super) struct BlockType(&'static Format);

#[derive(Debug)]
struct Format {
    /// Its number in `enum ggml_type`.
    tag: u32,
    /// ggml's name.
    name: &'static str,
    /// Elements and bytes of a block; `GGML_QUANT_SIZES` of gguf-py.
    elements: u64,
    bytes: u64,
    decoder: Decoder,
}

#[derive(Clone, Copy, Debug)]
enum Decoder {
    Candle(GgmlDType),
    /// Decodes one block and appends its values.
    Own(fn(&[u8], &mut Vec<f32>)),
}

const fn own(tag: u32, name: &'static str, elements: u64, bytes: u64, decode: fn(&[u8], &mut Vec<f32>)) -> Format {
    Format { tag, name, elements, bytes, decoder: Decoder::Own(decode) }
}

const fn candle(tag: u32, name: &'static str, elements: u64, bytes: u64, kind: GgmlDType) -> Format {
    Format { tag, name, elements, bytes, decoder: Decoder::Candle(kind) }
}

/// Every format that is decoded.
static KNOWN: [Format; 17] = [
    own(0, "F32", 1, 4, |b, out| out.push(f32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
    own(1, "F16", 1, 2, |b, out| out.push(half_at(b, 0))),
    own(30, "BF16", 1, 2, |b, out| out.push(bf16::from_le_bytes([b[0], b[1]]).to_f32())),
    candle(2, "Q4_0", 32, 18, GgmlDType::Q4_0),
    candle(3, "Q4_1", 32, 20, GgmlDType::Q4_1),
    candle(6, "Q5_0", 32, 22, GgmlDType::Q5_0),
    candle(7, "Q5_1", 32, 24, GgmlDType::Q5_1),
    candle(8, "Q8_0", 32, 34, GgmlDType::Q8_0),
    candle(10, "Q2_K", 256, 84, GgmlDType::Q2K),
    candle(11, "Q3_K", 256, 110, GgmlDType::Q3K),
    candle(12, "Q4_K", 256, 144, GgmlDType::Q4K),
    candle(13, "Q5_K", 256, 176, GgmlDType::Q5K),
    candle(14, "Q6_K", 256, 210, GgmlDType::Q6K),
    own(20, "IQ4_NL", 32, 18, iq4_nl),
    own(23, "IQ4_XS", 256, 136, iq4_xs),
    own(39, "MXFP4", 32, 17, mxfp4),
    own(40, "NVFP4", 64, 36, nvfp4),
];

/// Names of formats that exist and are not decoded, for the message only.
const OTHERS: [(u32, &str); 18] = [
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (41, "Q1_0"),
    (31, "Q4_0_4_4 (an old layout for ARM)"),
];

/// Values of the non-linear 4-bit formats (`kvalues_iq4nl`).
const IQ4: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Codes of a run of bytes: the low nibbles first, then the high ones.
fn nibbles(bytes: &[u8]) -> impl Iterator<Item = u8> {
    bytes.iter().map(|b| b & 15).chain(bytes.iter().map(|b| b >> 4))
}

/// An E2M1 value; both zeros are +0, as ggml's integer table has it.
fn e2m1_value(code: u8) -> f32 {
    if code == 8 { 0.0 } else { e2m1::decode(code) }
}

fn iq4_nl(block: &[u8], out: &mut Vec<f32>) {
    let scale = half_at(block, 0);
    out.extend(nibbles(&block[2..]).map(|code| scale * f32::from(IQ4[usize::from(code)])));
}

/// Eight groups of 32 whose 6-bit scales, less 32, are split: four low bits each, two high ones each.
fn iq4_xs(block: &[u8], out: &mut Vec<f32>) {
    let scale = half_at(block, 0);
    let high = u16::from_le_bytes([block[2], block[3]]);
    for (group, codes) in block[8..].chunks_exact(16).enumerate() {
        let low = block[4 + group / 2] >> (4 * (group % 2)) & 15;
        let own = u16::from(low) | (high >> (2 * group) & 3) << 4;
        let scale = scale * (f32::from(own) - 32.0);
        out.extend(nibbles(codes).map(|code| scale * f32::from(IQ4[usize::from(code)])));
    }
}

/// OCP MXFP4: an E8M0 scale and 32 E2M1 codes.
fn mxfp4(block: &[u8], out: &mut Vec<f32>) {
    // 2^(e - 127) in f64, as the smallest are subnormal in f32; every product is exact in f32.
    let scale = (f64::from(block[0]) - 127.0).exp2();
    out.extend(nibbles(&block[1..]).map(|code| (scale * f64::from(e2m1_value(code))) as f32));
}

/// Four groups of 16 E2M1 codes, each under an E4M3 scale; the second scale of the tensor stands in a tensor of its own.
fn nvfp4(block: &[u8], out: &mut Vec<f32>) {
    for (scale, codes) in block[..4].iter().zip(block[4..].chunks_exact(8)) {
        // ggml's scales have no sign, and their NaN stands for 0.
        let scale = match scale & 0x7f {
            e4m3::NAN if *scale == e4m3::NAN => 0.0,
            e4m3::NAN => 480.0,
            magnitude => e4m3::decode(magnitude),
        };
        out.extend(nibbles(codes).map(|code| scale * e2m1_value(code)));
    }
}

impl BlockType {
    /// The format with this number in `enum ggml_type`.
    pub fn from_tag(tag: u32) -> Option<Self> {
        KNOWN.iter().find(|f| f.tag == tag).map(Self)
    }

    /// What to call a number, known or not.
    pub fn describe(tag: u32) -> String {
        let names = KNOWN.iter().map(|f| (f.tag, f.name)).chain(OTHERS);
        names.into_iter().find(|(t, _)| *t == tag).map_or_else(|| format!("number {tag}"), |(_, name)| name.into())
    }

    /// The names of all formats that are decoded.
    pub fn known() -> String {
        KNOWN.iter().map(|f| f.name).collect::<Vec<_>>().join(", ")
    }

    /// ggml's name.
    pub fn name(self) -> &'static str {
        self.0.name
    }

    /// Elements in one block; 1 for the plain formats.
    pub fn elements(self) -> u64 {
        self.0.elements
    }

    /// Bytes in one block.
    pub fn bytes(self) -> u64 {
        self.0.bytes
    }

    /// Decodes whole blocks: `blocks` holds n·[`Self::bytes`] bytes, the result n·[`Self::elements`] values.
    ///
    /// # Errors
    /// A sentence, when `blocks` does not hold whole blocks.
    pub fn decode(self, blocks: &Blocks) -> Result<Vec<f32>, String> {
        let bytes = blocks.as_slice();
        let size = self.0.bytes as usize;
        if !bytes.len().is_multiple_of(size) {
            return Err(format!("{} bytes are no whole number of {} blocks", bytes.len(), self.name()));
        }
        let elements = bytes.len() / size * self.0.elements as usize;
        match self.0.decoder {
            Decoder::Own(decode) => {
                let mut out = Vec::with_capacity(elements);
                bytes.chunks_exact(size).for_each(|block| decode(block, &mut out));
                Ok(out)
            }
            Decoder::Candle(kind) => {
                match kind.from_data(Cow::Borrowed(bytes)).dequantize(elements).map_err(|e| e.to_string())? {
                    CpuStorage::F32(values) => Ok(values),
                    _ => Err(format!("candle decoded {} to something else than f32", self.name())),
                }
            }
        }
    }
}

/// A byte buffer that starts at a multiple of 16: candle asserts the alignment of what it casts to blocks.
pub(super) struct Blocks {
    bytes: Vec<u8>,
    skip: usize,
    length: usize,
}

impl Blocks {
    const ALIGNMENT: usize = 16;

    pub fn new() -> Self {
        Self { bytes: Vec::new(), skip: 0, length: 0 }
    }

    /// The buffer, `length` bytes long, for the caller to fill.
    pub fn resize(&mut self, length: usize) -> &mut [u8] {
        self.bytes.resize(length + Self::ALIGNMENT, 0);
        self.skip = self.bytes.as_ptr().align_offset(Self::ALIGNMENT).min(Self::ALIGNMENT);
        self.length = length;
        &mut self.bytes[self.skip..self.skip + length]
    }

    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[self.skip..self.skip + self.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sha2::{Digest as _, Sha256};

    /// The SHA-256 of what gguf-py 0.19.0's `quants.dequantize` makes of 4,096 blocks of pseudo-random bytes, in f32.
    #[test]
    fn formats_decoded_here_give_the_bits_of_gguf_py() {
        for (tag, expected) in [
            (20, "6c0c7ea89d7041d8f99f5c8146c15affcd68485a19869c95ca451d07029c6692"),
            (23, "17ad836b6f9a7a169fd69bf7cc64ff905fcced5ec0536faee1f0c3583f2102f4"),
            (39, "ae3acd61dad27ac414d9caa3f2e3ce60f92e157f6e6e17ec7c4fbdea3558643d"),
            (40, "322454db79f92cab7d97498aac8bf1801a563db4db5b59c78daaf0589d21f7ef"),
        ] {
            let kind = BlockType::from_tag(tag).unwrap();
            let size = kind.bytes() as usize;
            let mut blocks = Blocks::new();
            let bytes = blocks.resize(4096 * size);
            for (k, byte) in bytes.iter_mut().enumerate() {
                *byte = ((k as u64 * 2_654_435_761) >> 13) as u8;
            }
            for (i, block) in bytes.chunks_exact_mut(size).enumerate() {
                match kind.name() {
                    // Halves that are finite; exponents whose products are.
                    "IQ4_NL" | "IQ4_XS" => block[..2].copy_from_slice(&(0x2800 + (i % 1024) as u16).to_le_bytes()),
                    "MXFP4" => block[0] = (i % 254) as u8,
                    _ => {}
                }
            }
            let mut hash = Sha256::new();
            for value in kind.decode(&blocks).unwrap() {
                hash.update(value.to_le_bytes());
            }
            let found: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
            assert_eq!(found, expected, "{}", kind.name());
        }
    }

    #[test]
    fn sizes_of_blocks_are_candles_where_candle_decodes() {
        for format in &KNOWN {
            if let Decoder::Candle(kind) = format.decoder {
                assert_eq!((format.elements, format.bytes), (kind.block_size() as u64, kind.type_size() as u64));
            }
        }
    }
}
