//! A checkpoint of several files in one input.

/// The files of one checkpoint. An empty one (but for the tensors) is not written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parts {
    pub config: Vec<u8>,
    pub hf_quant_config: Vec<u8>,
    pub index: Vec<u8>,
    pub tensors: Vec<u8>,
}

impl Parts {
    /// Three little-endian u32 lengths, each before its part; what remains is model.safetensors. Any bytes are an input.
    pub fn split(mut data: &[u8]) -> Self {
        let mut part = || {
            let (length, rest) = data.split_first_chunk::<4>().unwrap_or((&[0; 4], &[]));
            let (part, rest) = rest.split_at((u32::from_le_bytes(*length) as usize).min(rest.len()));
            data = rest;
            part.to_vec()
        };
        let (config, hf_quant_config, index) = (part(), part(), part());
        Self { config, hf_quant_config, index, tensors: data.to_vec() }
    }

    /// The inverse of [`Self::split`].
    pub fn join(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for part in [&self.config, &self.hf_quant_config, &self.index] {
            out.extend((part.len() as u32).to_le_bytes());
            out.extend(part);
        }
        out.extend(&self.tensors);
        out
    }
}
