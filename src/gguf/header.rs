//! Reads a GGUF header strictly: every length is checked against the file before anything is allocated for it.
//!
//! candle's own reader divides by an alignment of zero, lets the last of two equal names win and keeps every array
//! element in a 32-byte enum; a file that people download from anywhere needs a reader that does not trust it.
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, versions 2 and 3, little-endian.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, ErrorKind, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use recoup_ground::foreign;

use super::blocks::BlockType;
use super::error::{GgufError, Result};

const MAGIC: &[u8; 4] = b"GGUF";
/// `GGUF_DEFAULT_ALIGNMENT`: where tensors start when `general.alignment` is absent, bytes.
const DEFAULT_ALIGNMENT: u64 = 32;
/// Larger alignments than this serve no purpose.
const MAX_ALIGNMENT: u64 = 1 << 20;
/// A 256k-token vocabulary with its merges takes about 20 MB; this bounds what a hostile header can make us read.
const MAX_HEADER_BYTES: u64 = 256 << 20;
/// Files in the wild carry 20 to 60 keys.
const MAX_KEYS: u64 = 1 << 14;
/// `split.no` and `split.count` are 16-bit numbers.
const MAX_PARTS: u64 = u16::MAX as u64;
/// A model of 1024 layers with 20 tensors each stays below this.
const MAX_TENSORS: u64 = 1 << 16;
/// Names are at most 64 bytes long by the specification; the margin is for what people write anyway.
const MAX_NAME_BYTES: u64 = 1 << 10;
/// `GGML_MAX_DIMS`.
const MAX_DIMS: u32 = 4;
/// More elements than any tensor that fits on a disk, and few enough that sizes in bytes cannot overflow.
const MAX_ELEMENTS: u64 = 1 << 48;

/// One metadata value, in the few shapes that an importer asks for.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Unsigned(u64),
    Signed(i64),
    /// An f32 is widened by way of its shortest decimal form, so that 1e-5 stays 1e-5 in JSON.
    Float(f64),
    Bool(bool),
    String(String),
    Strings(Vec<String>),
    /// An array of i32 or u32.
    Integers(Vec<i64>),
    /// An array of f32.
    Floats(Vec<f32>),
    /// An array of another type: checked and skipped, since nothing here reads one.
    Skipped {
        length: u64,
    },
}

impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unsigned(v) => write!(f, "{v}"),
            Self::Signed(v) => write!(f, "{v}"),
            Self::Float(v) => write!(f, "{v}"),
            Self::Bool(v) => write!(f, "{v}"),
            Self::String(v) => write!(f, "{:?}", v.chars().take(80).collect::<String>()),
            Self::Strings(v) => write!(f, "an array of {} strings", v.len()),
            Self::Integers(v) => write!(f, "an array of {} integers", v.len()),
            Self::Floats(v) => write!(f, "an array of {} floats", v.len()),
            Self::Skipped { length } => write!(f, "an array of {length} values"),
        }
    }
}

/// One tensor's entry in the header, its place already checked against the file's length.
#[derive(Clone, Debug)]
pub(super) struct TensorInfo {
    pub name: String,
    pub kind: BlockType,
    /// Row-major, outermost dimension first (ggml stores the reverse).
    pub shape: Vec<u64>,
    /// Which of the model's files it is in.
    pub part: usize,
    /// First byte, from the start of that file.
    pub start: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// An opened GGUF model: its metadata and where its tensors lie.
pub(super) struct Gguf {
    /// The file, or the first of those that the model is split into.
    pub path: PathBuf,
    files: Vec<(PathBuf, File)>,
    pub metadata: BTreeMap<String, Value>,
    /// By name.
    pub tensors: BTreeMap<String, TensorInfo>,
}

impl Gguf {
    /// Opens a model and reads its header, or the headers of all its parts where `path` is one of several
    /// (`-00001-of-00003.gguf`). No tensor data is read.
    pub fn open(path: &Path) -> Result<Self> {
        let given = Self::read(path)?;
        match given.integer("split.count", 0..=MAX_PARTS)? {
            Some(count) if count > 1 => Self::join(given, count),
            _ => Ok(given),
        }
    }

    /// The model of which `given` is one of `count` parts: the first has the metadata, all have tensors.
    fn join(given: Self, count: u64) -> Result<Self> {
        let number = given
            .integer("split.no", 0..=count - 1)?
            .ok_or_else(|| given.key_error("split.no", "the number of this part"))?;
        let name = given.path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let ending = |i: u64| format!("-{:05}-of-{count:05}.gguf", i + 1);
        let Some(stem) = name.strip_suffix(&ending(number)) else {
            return Err(GgufError::NotGguf {
                file: given.path.clone(),
                detail: format!(
                    "is part {} of {count}, whose names must end in {} and so on, so that the others are found; rename \
                     them, or join them with `llama-gguf-split --merge`",
                    number + 1,
                    ending(number)
                ),
            });
        };
        let part = |i: u64| {
            let path = given.path.with_file_name(format!("{stem}{}", ending(i)));
            if !path.is_file() {
                let detail = format!("is missing: the model has {count} parts; download the others too");
                return Err(GgufError::NotGguf { file: path, detail });
            }
            let part = Self::read(&path)?;
            for (key, expected) in [("split.no", i), ("split.count", count)] {
                if part.integer(key, 0..=MAX_PARTS)? != Some(expected) {
                    return Err(part.key_error(key, format!("{expected}, as its name says")));
                }
            }
            Ok(part)
        };
        let mut model = part(0)?;
        for i in 1..count {
            let other = part(i)?;
            model.files.extend(other.files);
            for (name, info) in other.tensors {
                if model.tensors.insert(name.clone(), TensorInfo { part: i as usize, ..info }).is_some() {
                    let detail = "is in two parts of the model".into();
                    return Err(GgufError::Tensor { file: other.path, tensor: name, detail });
                }
            }
        }
        let total = model.tensors.len() as u64;
        if model.integer("split.tensors.count", 0..=MAX_TENSORS)?.is_some_and(|n| n != total) {
            return Err(model.key_error("split.tensors.count", format!("{total}, what the {count} parts hold")));
        }
        Ok(model)
    }

    /// Reads `buffer.len()` bytes of a tensor from its byte `skip` on.
    pub fn tensor_bytes(&self, info: &TensorInfo, skip: u64, buffer: &mut [u8]) -> Result<()> {
        let (path, mut file) = (&self.files[info.part].0, &self.files[info.part].1);
        let start = info.start + skip;
        file.seek(SeekFrom::Start(start)).and_then(|_| file.read_exact(buffer)).map_err(|e| {
            if e.kind() == ErrorKind::UnexpectedEof {
                let detail = "the file became shorter while it was read".into();
                return GgufError::Header { file: path.clone(), at: start, detail };
            }
            GgufError::io(path, "read", e)
        })
    }

    /// One file's header.
    fn read(path: &Path) -> Result<Self> {
        let not_gguf = |detail: String| GgufError::NotGguf { file: path.into(), detail };
        let file = File::open(path).map_err(|e| GgufError::io(path, "open", e))?;
        let meta = file.metadata().map_err(|e| GgufError::io(path, "read its length", e))?;
        // A pipe or a device has no length to check anything against.
        if !meta.is_file() {
            return Err(not_gguf("is no regular file; expected a .gguf file".into()));
        }
        let length = meta.len();
        let mut beginning = Vec::new();
        let mut head = (&file).take(foreign::LOOK as u64);
        head.read_to_end(&mut beginning).map_err(|e| GgufError::io(path, "read", e))?;
        if !beginning.starts_with(MAGIC)
            && let Some(what) = foreign::foreign(&beginning)
        {
            return Err(not_gguf(format!("is no GGUF file but {what}")));
        }
        (&file).rewind().map_err(|e| GgufError::io(path, "read", e))?;
        let mut cursor = Cursor {
            path,
            reader: BufReader::with_capacity(1 << 16, &file),
            at: 0,
            file_length: length,
            end: length.min(MAX_HEADER_BYTES),
        };

        if length < 24 {
            return Err(not_gguf(format!("is {length} bytes long, too short for a GGUF file")));
        }
        let magic = cursor.array::<4>()?;
        if &magic != MAGIC {
            return Err(not_gguf(format!("expected the magic \"GGUF\", found {:?}", magic.escape_ascii().to_string())));
        }
        match cursor.u32()? {
            2 | 3 => {}
            1 => return Err(not_gguf("is GGUF version 1 (2023); convert it again with a current llama.cpp".into())),
            v if v.swap_bytes() <= 3 => {
                return Err(not_gguf("is a big-endian GGUF file; expected little-endian".into()));
            }
            v => return Err(not_gguf(format!("is GGUF version {v}; expected version 2 or 3"))),
        }
        let tensor_count = cursor.u64()?;
        let key_count = cursor.u64()?;
        if tensor_count > MAX_TENSORS {
            return Err(cursor.error(format!("{tensor_count} tensors; at most {MAX_TENSORS} make sense")));
        }
        if key_count > MAX_KEYS {
            return Err(cursor.error(format!("{key_count} metadata keys; at most {MAX_KEYS} make sense")));
        }

        let mut metadata = BTreeMap::new();
        for _ in 0..key_count {
            let key = cursor.name("metadata key")?;
            let value = cursor.value(&key)?;
            if metadata.contains_key(&key) {
                return Err(cursor.error(format!("metadata key `{key}` appears twice")));
            }
            metadata.insert(key, value);
        }
        let alignment = match metadata.get("general.alignment") {
            None => DEFAULT_ALIGNMENT,
            Some(Value::Unsigned(a)) if a.is_power_of_two() && *a <= MAX_ALIGNMENT => *a,
            Some(v) => {
                return Err(GgufError::Key {
                    file: path.into(),
                    key: "general.alignment".into(),
                    expected: format!("a power of two up to {MAX_ALIGNMENT}"),
                    found: v.to_string(),
                });
            }
        };

        let mut tensors = BTreeMap::new();
        for _ in 0..tensor_count {
            let info = cursor.tensor(alignment)?;
            if let Some(first) = tensors.insert(info.name.clone(), info) {
                return Err(cursor.error(format!("tensor `{}` appears twice", first.name)));
            }
        }
        let data_start = cursor.at.next_multiple_of(alignment);
        drop(cursor);
        place_tensors(path, &mut tensors, data_start, length)?;
        Ok(Self { path: path.into(), files: vec![(path.into(), file)], metadata, tensors })
    }

    /// The error that says what `key` should have been.
    pub fn key_error(&self, key: &str, expected: impl Into<String>) -> GgufError {
        let found = self.metadata.get(key).map_or_else(|| "nothing".into(), Value::to_string);
        GgufError::Key { file: self.path.clone(), key: key.into(), expected: expected.into(), found }
    }

    /// A string, if the key is there.
    pub fn string(&self, key: &str) -> Result<Option<&str>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(_) => Err(self.key_error(key, "a string")),
        }
    }

    /// A truth value, if the key is there.
    pub fn boolean(&self, key: &str) -> Result<Option<bool>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(*b)),
            Some(_) => Err(self.key_error(key, "true or false")),
        }
    }

    /// A whole number within `range`, if the key is there.
    pub fn integer(&self, key: &str, range: std::ops::RangeInclusive<u64>) -> Result<Option<u64>> {
        let value = match self.metadata.get(key) {
            None => return Ok(None),
            Some(Value::Unsigned(v)) => Some(*v),
            Some(Value::Signed(v)) => u64::try_from(*v).ok(),
            Some(_) => None,
        };
        match value {
            Some(v) if range.contains(&v) => Ok(Some(v)),
            _ => Err(self.key_error(key, format!("a whole number from {} to {}", range.start(), range.end()))),
        }
    }

    /// A number for which `accept` holds, if the key is there.
    pub fn float(&self, key: &str, expected: &str, accept: impl Fn(f64) -> bool) -> Result<Option<f64>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Float(v)) if v.is_finite() && accept(*v) => Ok(Some(*v)),
            Some(_) => Err(self.key_error(key, expected)),
        }
    }

    /// An array of strings, if the key is there.
    pub fn strings(&self, key: &str) -> Result<Option<&[String]>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Strings(v)) => Ok(Some(v)),
            Some(_) => Err(self.key_error(key, "an array of strings")),
        }
    }
}

/// Turns the offsets of the header into places in the file, and refuses those outside it or on top of each other.
fn place_tensors(path: &Path, tensors: &mut BTreeMap<String, TensorInfo>, data_start: u64, length: u64) -> Result<()> {
    let error = |tensor: &str, detail: String| GgufError::Tensor { file: path.into(), tensor: tensor.into(), detail };
    let mut places = Vec::with_capacity(tensors.len());
    for info in tensors.values_mut() {
        let offset = info.start;
        let end = data_start.checked_add(offset).and_then(|start| start.checked_add(info.bytes));
        match end {
            Some(end) if end <= length => info.start = data_start + offset,
            _ => {
                let bytes = info.bytes;
                return Err(error(
                    &info.name,
                    format!(
                        "{bytes} bytes at offset {offset} of the data end after the file, which is {length} bytes long; \
                         the download is incomplete or the header is damaged"
                    ),
                ));
            }
        }
        places.push((info.start, info.bytes, info.name.clone()));
    }
    places.sort_unstable();
    for pair in places.windows(2) {
        if let [(start, bytes, first), (next, _, second)] = pair
            && start + bytes > *next
        {
            return Err(error(second, format!("overlaps tensor `{first}` in the file; the header is damaged")));
        }
    }
    Ok(())
}

/// Reads forward through the header and knows how much may still come.
struct Cursor<'a> {
    path: &'a Path,
    reader: BufReader<&'a File>,
    at: u64,
    file_length: u64,
    /// The header must not reach beyond this byte.
    end: u64,
}

impl Cursor<'_> {
    fn error(&self, detail: String) -> GgufError {
        GgufError::Header { file: self.path.into(), at: self.at, detail }
    }

    /// Checks that `bytes` more can follow, before they are read or allocated.
    fn reserve(&self, bytes: u64, what: &str) -> Result<()> {
        let left = self.end - self.at;
        if bytes <= left {
            Ok(())
        } else if self.end < self.file_length {
            Err(self.error(format!("{what} of {bytes} bytes makes the header larger than {MAX_HEADER_BYTES} bytes")))
        } else {
            Err(self.error(format!("{what} needs {bytes} bytes, {left} are left in the file")))
        }
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<()> {
        self.reader.read_exact(buffer).map_err(|e| match e.kind() {
            ErrorKind::UnexpectedEof => self.error("the file ends here; another program is changing it".into()),
            _ => GgufError::io(self.path, "read", e),
        })?;
        self.at += buffer.len() as u64;
        Ok(())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        self.reserve(N as u64, "a value")?;
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn bytes(&mut self, length: u64, what: &str) -> Result<Vec<u8>> {
        self.reserve(length, what)?;
        let length = usize::try_from(length).map_err(|_| self.error(format!("{what} does not fit in memory")))?;
        let mut bytes = vec![0; length];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn skip(&mut self, length: u64, what: &str) -> Result<()> {
        self.reserve(length, what)?;
        let mut buffer = [0; 4096];
        let mut left = length;
        while left > 0 {
            let n = left.min(buffer.len() as u64) as usize;
            self.fill(&mut buffer[..n])?;
            left -= n as u64;
        }
        Ok(())
    }

    fn name(&mut self, what: &str) -> Result<String> {
        let length = self.u64()?;
        if length > MAX_NAME_BYTES {
            return Err(self.error(format!("a {what} of {length} bytes; at most {MAX_NAME_BYTES} make sense")));
        }
        let bytes = self.bytes(length, what)?;
        String::from_utf8(bytes).map_err(|_| self.error(format!("a {what} that is no UTF-8")))
    }

    /// Text of `key`. Tokens must be exact; in descriptions, other encodings do occur and do no harm.
    fn string(&mut self, key: &str) -> Result<String> {
        let length = self.u64()?;
        let bytes = self.bytes(length, "a string")?;
        match String::from_utf8(bytes) {
            Ok(text) => Ok(text),
            Err(e) if !key.starts_with("tokenizer.") => Ok(String::from_utf8_lossy(e.as_bytes()).into_owned()),
            Err(_) => Err(self.error(format!("metadata `{key}` holds text that is no UTF-8"))),
        }
    }

    /// One value with its type tag, numbered as in `enum gguf_type`.
    fn value(&mut self, key: &str) -> Result<Value> {
        let tag = self.u32()?;
        Ok(match tag {
            0 => Value::Unsigned(u8::from_le_bytes(self.array()?).into()),
            1 => Value::Signed(i8::from_le_bytes(self.array()?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array()?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Unsigned(self.u32()?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.array()?).into()),
            6 => Value::Float(shortest(f32::from_le_bytes(self.array()?))),
            7 => match self.array::<1>()? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [b] => return Err(self.error(format!("metadata `{key}`: {b} is no truth value"))),
            },
            8 => Value::String(self.string(key)?),
            9 => self.list(key)?,
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            _ => return Err(self.error(format!("metadata `{key}` has unknown value type {tag}"))),
        })
    }

    fn list(&mut self, key: &str) -> Result<Value> {
        let tag = self.u32()?;
        let length = self.u64()?;
        let size: u64 = match tag {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            // A string takes its length prefix at least.
            8 | 10..=12 => 8,
            9 => return Err(self.error(format!("metadata `{key}` is an array of arrays, which no key of a model is"))),
            _ => return Err(self.error(format!("metadata `{key}` is an array of unknown value type {tag}"))),
        };
        let needed =
            length.checked_mul(size).ok_or_else(|| self.error(format!("metadata `{key}`: {length} values")))?;
        let what = format!("metadata `{key}`, an array of {length} values,");
        self.reserve(needed, &what)?;
        match tag {
            4..=6 => {
                let bytes = self.bytes(needed, &what)?;
                let words = bytes.as_chunks::<4>().0.iter();
                Ok(match tag {
                    4 => Value::Integers(words.map(|w| u32::from_le_bytes(*w).into()).collect()),
                    5 => Value::Integers(words.map(|w| i32::from_le_bytes(*w).into()).collect()),
                    _ => Value::Floats(words.map(|w| f32::from_le_bytes(*w)).collect()),
                })
            }
            8 => {
                // Grown as strings arrive, so that memory follows what the file really holds.
                let mut strings = Vec::new();
                for _ in 0..length {
                    strings.push(self.string(key)?);
                }
                Ok(Value::Strings(strings))
            }
            _ => {
                self.skip(needed, &what)?;
                Ok(Value::Skipped { length })
            }
        }
    }

    /// One tensor entry; `start` is still the offset into the data section.
    fn tensor(&mut self, alignment: u64) -> Result<TensorInfo> {
        let name = self.name("tensor name")?;
        let error = |detail: String| GgufError::Tensor { file: self.path.into(), tensor: name.clone(), detail };
        let dims = self.u32()?;
        if dims == 0 || dims > MAX_DIMS {
            return Err(error(format!("{dims} dimensions; expected 1 to {MAX_DIMS}")));
        }
        let mut shape = Vec::with_capacity(dims as usize);
        for _ in 0..dims {
            shape.push(self.u64()?);
        }
        shape.reverse();
        let error = |detail: String| GgufError::Tensor { file: self.path.into(), tensor: name.clone(), detail };
        let elements = shape
            .iter()
            .try_fold(1u64, |product, &n| product.checked_mul(n))
            .filter(|n| (1..=MAX_ELEMENTS).contains(n))
            .ok_or_else(|| error(format!("impossible shape {shape:?}")))?;
        let tag = self.u32()?;
        let offset = self.u64()?;
        let kind = BlockType::from_tag(tag).ok_or_else(|| GgufError::TensorType {
            file: self.path.into(),
            tensor: name.clone(),
            found: BlockType::describe(tag),
            known: BlockType::known(),
        })?;
        let error = |detail: String| GgufError::Tensor { file: self.path.into(), tensor: name.clone(), detail };
        let row = shape.last().copied().unwrap_or(1);
        if row % kind.elements() != 0 {
            let (block, kind) = (kind.elements(), kind.name());
            return Err(error(format!("rows of {row} elements do not divide into {kind} blocks of {block}")));
        }
        if offset % alignment != 0 {
            return Err(error(format!("offset {offset} is no multiple of the file's alignment, {alignment}")));
        }
        let bytes = elements / kind.elements() * kind.bytes();
        Ok(TensorInfo { name, kind, shape, part: 0, start: offset, bytes })
    }
}

/// Widens by way of the shortest decimal that reads back as the same f32.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or_else(|_| value.into())
}
