//! The ggml block formats, decoded to f32 by candle; the plain ones (F32, F16, BF16) here.

use std::borrow::Cow;

use candle_core::CpuStorage;
use candle_core::quantized::GgmlDType;
use half::{bf16, f16};

/// A ggml storage format that Recoup decodes. Numbers and sizes: `enum ggml_type` and ggml-common.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BlockType(GgmlDType);

/// Every format that is decoded: its number in the file, its ggml name, candle's name for it.
const KNOWN: [(u32, &str, GgmlDType); 13] = [
    (0, "F32", GgmlDType::F32),
    (1, "F16", GgmlDType::F16),
    (30, "BF16", GgmlDType::BF16),
    (2, "Q4_0", GgmlDType::Q4_0),
    (3, "Q4_1", GgmlDType::Q4_1),
    (6, "Q5_0", GgmlDType::Q5_0),
    (7, "Q5_1", GgmlDType::Q5_1),
    (8, "Q8_0", GgmlDType::Q8_0),
    (10, "Q2_K", GgmlDType::Q2K),
    (11, "Q3_K", GgmlDType::Q3K),
    (12, "Q4_K", GgmlDType::Q4K),
    (13, "Q5_K", GgmlDType::Q5K),
    (14, "Q6_K", GgmlDType::Q6K),
];

/// Names of formats that exist and are not decoded, for the message only.
const OTHERS: [(u32, &str); 19] = [
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
];

impl BlockType {
    /// The format with this number in `enum ggml_type`.
    pub fn from_tag(tag: u32) -> Option<Self> {
        KNOWN.iter().find(|(t, ..)| *t == tag).map(|(.., kind)| Self(*kind))
    }

    /// What to call a number, known or not.
    pub fn describe(tag: u32) -> String {
        let name = KNOWN.iter().map(|(t, name, _)| (t, name)).chain(OTHERS.iter().map(|(t, name)| (t, name)));
        name.into_iter().find(|(t, _)| **t == tag).map_or_else(|| format!("number {tag}"), |(_, name)| (*name).into())
    }

    /// The names of all formats that are decoded.
    pub fn known() -> String {
        KNOWN.map(|(_, name, _)| name).join(", ")
    }

    /// ggml's name.
    pub fn name(self) -> &'static str {
        KNOWN.iter().find(|(.., kind)| *kind == self.0).map_or("?", |(_, name, _)| name)
    }

    /// Elements in one block; 1 for the plain formats.
    pub fn elements(self) -> u64 {
        self.0.block_size() as u64
    }

    /// Bytes in one block.
    pub fn bytes(self) -> u64 {
        self.0.type_size() as u64
    }

    /// Decodes whole blocks: `blocks` holds n·[`Self::bytes`] bytes, the result n·[`Self::elements`] values.
    ///
    /// # Errors
    /// A sentence, when `blocks` does not hold whole blocks.
    pub fn decode(self, blocks: &Blocks) -> Result<Vec<f32>, String> {
        let bytes = blocks.as_slice();
        let size = self.0.type_size();
        if !bytes.len().is_multiple_of(size) {
            return Err(format!("{} bytes are no whole number of {} blocks", bytes.len(), self.name()));
        }
        Ok(match self.0 {
            GgmlDType::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            GgmlDType::F16 => bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
            GgmlDType::BF16 => bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
            kind => {
                let elements = bytes.len() / size * kind.block_size();
                match kind.from_data(Cow::Borrowed(bytes)).dequantize(elements).map_err(|e| e.to_string())? {
                    CpuStorage::F32(values) => values,
                    _ => return Err(format!("candle decoded {} to something else than f32", self.name())),
                }
            }
        })
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
