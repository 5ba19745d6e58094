//! Writes safetensors files in BF16, one tensor after the other, so that memory does not grow with the model.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;

use half::bf16;
use serde_json::{Map, Value as Json, json};

use super::blocks::Blocks;
use super::error::{GgufError, Result};
use super::header::Gguf;
use super::staging::{Staging, write_json};
use super::tensors::Output;

const BF16_BYTES: u64 = 2;

/// Writes `outputs` as model.safetensors or, above `max_bytes` of tensors a file, as numbered shards with an index.
/// Returns how many files there are and how many bytes of tensors.
///
/// # Errors
/// On anything that cannot be read, decoded or written, and on a value that is no finite BF16 number.
pub(super) fn write(
    gguf: &Gguf,
    outputs: &[Output<'_>],
    staging: &Staging,
    max_bytes: u64,
    progress: &mut dyn FnMut(usize, usize, &str),
) -> Result<(usize, u64)> {
    let shards = split(outputs, max_bytes);
    let mut weight_map = Map::new();
    let mut done = 0;
    for (i, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => "model.safetensors".into(),
            n => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
        };
        write_file(gguf, shard, &staging.file(&name), &mut |tensor| {
            done += 1;
            progress(done, outputs.len(), tensor);
        })?;
        weight_map.extend(shard.iter().map(|output| (output.name.clone(), json!(name))));
    }
    let total = outputs.iter().map(Output::elements).sum::<u64>() * BF16_BYTES;
    if shards.len() > 1 {
        let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
        write_json(&staging.file("model.safetensors.index.json"), &index, true)?;
    }
    Ok((shards.len(), total))
}

/// Cuts the list where the next tensor would exceed the limit; a tensor larger than that gets a file of its own.
fn split<'a, 'b>(outputs: &'a [Output<'b>], max_bytes: u64) -> Vec<&'a [Output<'b>]> {
    let mut shards = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (i, output) in outputs.iter().enumerate() {
        let size = output.elements() * BF16_BYTES;
        if i > start && bytes + size > max_bytes {
            shards.push(&outputs[start..i]);
            (start, bytes) = (i, 0);
        }
        bytes += size;
    }
    shards.push(&outputs[start..]);
    shards
}

/// One safetensors file: the header's length (u64), the header (JSON, padded to 8 bytes), the tensors without gaps.
fn write_file(gguf: &Gguf, outputs: &[Output<'_>], path: &Path, done: &mut dyn FnMut(&str)) -> Result<()> {
    let failed = |e| GgufError::io(path, "write the weights", e);
    let mut writer = BufWriter::with_capacity(1 << 20, File::create_new(path).map_err(failed)?);
    let header = header(outputs);
    writer.write_all(&(header.len() as u64).to_le_bytes()).map_err(failed)?;
    writer.write_all(&header).map_err(failed)?;

    let mut blocks = Blocks::new();
    let mut bytes = Vec::new();
    for output in outputs {
        output.read(gguf, &mut blocks, |values| {
            bytes.clear();
            for &value in values {
                let rounded = bf16::from_f32(value);
                if !rounded.is_finite() {
                    let detail = format!("holds {value}, which is no finite BF16 number; the file is damaged");
                    return Err(output.error(gguf, detail));
                }
                bytes.extend_from_slice(&rounded.to_le_bytes());
            }
            writer.write_all(&bytes).map_err(failed)
        })?;
        done(&output.name);
    }
    let file = writer.into_inner().map_err(|e| failed(e.into_error()))?;
    file.sync_all().map_err(failed)
}

fn header(outputs: &[Output<'_>]) -> Vec<u8> {
    let mut header = Map::new();
    // transformers refuses a file without it.
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut start = 0;
    for output in outputs {
        let end = start + output.elements() * BF16_BYTES;
        let entry = json!({"dtype": "BF16", "shape": output.shape, "data_offsets": [start, end]});
        header.insert(output.name.clone(), entry);
        start = end;
    }
    let mut text = Json::Object(header).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    text
}
