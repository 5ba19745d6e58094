//! A little GGUF writer, independent of the reader under test, that can also write nonsense.

/// A metadata value.
#[derive(Clone)]
pub enum Meta {
    U32(u32),
    F32(f32),
    Bool(bool),
    Str(String),
    Strs(Vec<String>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    /// A type tag and the bytes after it, as they are.
    Raw(u32, Vec<u8>),
}

/// A tensor; `dims` in ggml's order, the contiguous dimension first.
#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    pub dims: Vec<u64>,
    pub tag: u32,
    pub data: Vec<u8>,
    /// Instead of the place where the writer puts it.
    pub offset: Option<u64>,
}

/// A file to be.
#[derive(Clone)]
pub struct Gguf {
    pub magic: [u8; 4],
    pub version: u32,
    pub keys: Vec<(String, Meta)>,
    pub tensors: Vec<Tensor>,
    pub tensor_count: Option<u64>,
    pub key_count: Option<u64>,
}

impl Gguf {
    pub fn new() -> Self {
        Self { magic: *b"GGUF", version: 3, keys: vec![], tensors: vec![], tensor_count: None, key_count: None }
    }

    pub fn set(&mut self, key: &str, value: Meta) -> &mut Self {
        self.remove(key);
        self.keys.push((key.into(), value));
        self
    }

    pub fn remove(&mut self, key: &str) -> &mut Self {
        self.keys.retain(|(k, _)| k != key);
        self
    }

    pub fn add(&mut self, name: &str, dims: &[u64], tag: u32, data: Vec<u8>) -> &mut Self {
        self.tensors.push(Tensor { name: name.into(), dims: dims.into(), tag, data, offset: None });
        self
    }

    pub fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|t| t.name == name).expect("the tensor is there")
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.key_count.unwrap_or(self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            text(&mut out, key);
            meta(&mut out, value);
        }
        let mut offset = 0;
        for tensor in &self.tensors {
            text(&mut out, &tensor.name);
            out.extend((tensor.dims.len() as u32).to_le_bytes());
            out.extend(tensor.dims.iter().flat_map(|d| d.to_le_bytes()));
            out.extend(tensor.tag.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(offset).to_le_bytes());
            offset += (tensor.data.len() as u64).next_multiple_of(32);
        }
        for tensor in &self.tensors {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(&tensor.data);
        }
        out
    }
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn meta(out: &mut Vec<u8>, value: &Meta) {
    let tag = |out: &mut Vec<u8>, tag: u32| out.extend(tag.to_le_bytes());
    let array = |out: &mut Vec<u8>, kind: u32, length: usize| {
        tag(out, 9);
        tag(out, kind);
        out.extend((length as u64).to_le_bytes());
    };
    match value {
        Meta::U32(v) => {
            tag(out, 4);
            out.extend(v.to_le_bytes());
        }
        Meta::F32(v) => {
            tag(out, 6);
            out.extend(v.to_le_bytes());
        }
        Meta::Bool(v) => {
            tag(out, 7);
            out.push((*v).into());
        }
        Meta::Str(v) => {
            tag(out, 8);
            text(out, v);
        }
        Meta::Strs(v) => {
            array(out, 8, v.len());
            v.iter().for_each(|v| text(out, v));
        }
        Meta::I32s(v) => {
            array(out, 5, v.len());
            out.extend(v.iter().flat_map(|v| v.to_le_bytes()));
        }
        Meta::F32s(v) => {
            array(out, 6, v.len());
            out.extend(v.iter().flat_map(|v| v.to_le_bytes()));
        }
        Meta::Raw(kind, bytes) => {
            tag(out, *kind);
            out.extend(bytes);
        }
    }
}
