//! The header of a safetensors file, checked against the file: 8 bytes of length, that much JSON, then the data, which
//! the tensors cover exactly once. Written out here, since every refusal must name the tensor and both numbers.

use std::fmt;

use recoup_ground::foreign::foreign;
use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

/// Bytes of the little-endian length before the JSON.
const PREFIX: usize = 8;
/// The format's own bound on the JSON, as in the safetensors crate: a larger one is no header.
const MAX_HEADER: u64 = 100_000_000;
const METADATA: &str = "__metadata__";

/// One tensor of the file; `start..end` counts from the start of the file and lies within it.
#[derive(Debug)]
pub(super) struct Stored {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub start: usize,
    pub end: usize,
}

/// Reads the header of `file`, and checks that every tensor's bytes fit its shape and that together they are the file.
///
/// # Errors
/// What is wrong, in words.
pub(super) fn read(file: &[u8]) -> Result<Vec<Stored>, String> {
    let (length, rest) = file.split_first_chunk::<PREFIX>().ok_or_else(|| match file.len() {
        0 => "the file is empty; copy or download it again".to_owned(),
        n => format!("{n} bytes is too short for a header; the file is truncated: copy or download it again"),
    })?;
    let length = u64::from_le_bytes(*length);
    // A header is an object. The first bytes alone prove nothing: a length may look like another format's magic number.
    if !rest.starts_with(b"{")
        && let Some(what) = foreign(file)
    {
        return Err(format!("it is {what}"));
    }
    if length > MAX_HEADER || length > rest.len() as u64 {
        return Err(format!(
            "the header says it is {length} bytes long, and {} follow it; the file is truncated or no safetensors file",
            rest.len()
        ));
    }
    let (json, data) = rest.split_at(length as usize);
    let json = std::str::from_utf8(json).map_err(|e| format!("the header is not UTF-8: {e}"))?;
    let Header(mut tensors) = serde_json::from_str(json).map_err(|e| format!("the header is not valid: {e}"))?;
    tensors.iter().try_for_each(|(name, info)| check(name, info, data.len() as u64))?;
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    cover(&tensors, data.len() as u64)?;
    let before = PREFIX + json.len();
    let stored = tensors.into_iter().map(|(name, Info { dtype, shape, data_offsets: (start, end) })| Stored {
        name,
        dtype,
        shape,
        start: before + start as usize,
        end: before + end as usize,
    });
    Ok(stored.collect())
}

/// One tensor on its own: its offsets lie in the data and hold exactly what its type and shape need.
fn check(name: &str, info: &Info, room: u64) -> Result<(), String> {
    let Info { dtype, shape, data_offsets: (start, end) } = info;
    let bits = shape.iter().try_fold(dtype.bitsize() as u64, |n, &d| n.checked_mul(d as u64));
    let Some(bits) = bits else {
        return Err(format!("tensor `{name}`, {dtype} of shape {shape:?}, is larger than memory can be"));
    };
    if bits % 8 != 0 || end.checked_sub(*start) != Some(bits / 8) {
        return Err(format!(
            "tensor `{name}`, {dtype} of shape {shape:?}, needs {} bytes, but its offsets are {start}..{end}",
            bits.div_ceil(8)
        ));
    }
    if *end > room {
        return Err(format!(
            "tensor `{name}` ends at byte {end} of the data, but the file holds {room}: it is truncated; copy or \
             download it again"
        ));
    }
    Ok(())
}

/// All tensors, by offset: they follow each other without overlap or gap to the end of the file.
fn cover(tensors: &[(String, Info)], room: u64) -> Result<(), String> {
    let (mut covered, mut previous) = (0, None);
    for (name, info) in tensors {
        let (start, end) = info.data_offsets;
        if start != covered {
            let problem = if start < covered { "overlaps" } else { "leaves a gap after" };
            return Err(match previous {
                None => format!("tensor `{name}`, the first, starts at byte {start} of the data instead of 0"),
                Some(before) => {
                    format!("tensor `{name}` at {start}..{end} {problem} `{before}`, which ends at {covered}")
                }
            });
        }
        (covered, previous) = (end, Some(name));
    }
    if covered == room {
        return Ok(());
    }
    Err(format!("the tensors end at byte {covered} of the data, but the file goes on to {room}"))
}

#[derive(Deserialize)]
struct Info {
    dtype: Dtype,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

/// The entries in file order; a map type would silently keep one of two tensors of the same name.
struct Header(Vec<(String, Info)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut tensors = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    let info =
                        map.next_value().map_err(|e| serde::de::Error::custom(format!("tensor `{name}`: {e}")))?;
                    tensors.push((name, info));
                }
                Ok(Header(tensors))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}
