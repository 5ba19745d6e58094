//! From a file, or standard input, to its text: unpacked, UTF-8 and without a byte order mark.

use std::io::Read as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::de::DeserializeOwned;

use super::RecordsError;
use crate::foreign;

/// The path that stands for standard input.
pub const STDIN: &str = "-";
/// Largest window of a Zstandard frame that is unpacked, bytes: what the `zstd` program takes without being asked to.
const MAX_WINDOW: u64 = 128 << 20;

pub(super) const GZIP: &[u8] = b"\x1f\x8b";
pub(super) const ZSTANDARD: &[u8] = b"\x28\xb5\x2f\xfd";

/// The content of a file, or of standard input for `-`, unpacked where it is compressed, whatever it is called.
///
/// # Errors
/// A file that cannot be read, compressed data that is damaged or ends early, a pointer to a file elsewhere, standard
/// input that has been read already.
pub fn bytes(path: &Path) -> Result<Vec<u8>, RecordsError> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let read = |source| RecordsError::Read { path: path.into(), source };
    let packed = if path == Path::new(STDIN) {
        if TAKEN.swap(true, Ordering::Relaxed) {
            let message = "standard input has been read already; it can be given once";
            return Err(RecordsError::Unreadable { file: STDIN.into(), message: message.into() });
        }
        let mut bytes = Vec::new();
        std::io::stdin().lock().read_to_end(&mut bytes).map_err(read)?;
        bytes
    } else {
        std::fs::read(path).map_err(read)?
    };
    unpack(&path.display().to_string(), packed)
}

/// `packed` as it is, or unpacked where its first bytes say that gzip or Zstandard wrote it; errors call it `file`.
fn unpack(file: &str, packed: Vec<u8>) -> Result<Vec<u8>, RecordsError> {
    let unreadable = |message: String| RecordsError::Unreadable { file: file.into(), message };
    if let Some(what) = foreign::pointer(&packed) {
        return Err(unreadable(format!("it is {what}")));
    }
    let (by, unpacked) = if packed.starts_with(GZIP) {
        let mut out = Vec::new();
        let read = flate2::bufread::MultiGzDecoder::new(&packed[..]).read_to_end(&mut out);
        ("gzip", read.map(|_| out).map_err(|e| e.to_string()))
    } else if packed.starts_with(ZSTANDARD) || skippable(&packed).is_some() {
        ("Zstandard", zstandard(&packed))
    } else {
        return Ok(packed);
    };
    let damaged = |said| unreadable(format!("{by}: damaged or cut off ({said}); copy or download the file again"));
    unpacked.map_err(damaged)
}

/// Length of a Zstandard frame that holds no data, if one begins here.
fn skippable(packed: &[u8]) -> Option<usize> {
    let number = |from: usize| Some(u32::from_le_bytes(packed.get(from..from + 4)?.try_into().ok()?));
    let (magic, length) = (number(0)?, number(4)?);
    (magic & 0xffff_fff0 == 0x184d_2a50).then_some(8 + length as usize)
}

/// All frames of a Zstandard file.
fn zstandard(packed: &[u8]) -> Result<Vec<u8>, String> {
    let mut out = Vec::new();
    let mut rest = packed;
    let mut decoder = ruzstd::decoding::FrameDecoder::new();
    decoder.set_max_window_size(MAX_WINDOW);
    while !rest.is_empty() {
        if let Some(length) = skippable(rest) {
            rest = rest.get(length..).ok_or("a frame ends early")?;
            continue;
        }
        let mut frame =
            ruzstd::decoding::StreamingDecoder::new_with_decoder(&mut rest, decoder).map_err(|e| e.to_string())?;
        frame.read_to_end(&mut out).map_err(|e| e.to_string())?;
        decoder = frame.into_frame_decoder();
        let stored = decoder.get_checksum_from_data();
        if stored.is_some() && stored != decoder.get_calculated_checksum() {
            return Err("the checksum differs".into());
        }
    }
    Ok(out)
}

/// Bytes without the mark that Windows programs write before UTF-8.
#[must_use]
pub fn without_mark(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes)
}

/// Bytes as text, without a byte order mark, with the line ends that it has; errors call it `file`.
///
/// # Errors
/// What is not UTF-8 or holds NUL bytes, with the line.
pub fn decode(file: &str, mut bytes: Vec<u8>) -> Result<String, RecordsError> {
    let mark = bytes.len() - without_mark(&bytes).len();
    bytes.drain(..mark);
    let wrong = |at: usize, bytes: &[u8], message: String| match binary(bytes) {
        Some(what) => RecordsError::Unreadable { file: file.into(), message: format!("it is {what}") },
        None => {
            let line = 1 + bytes[..at].iter().filter(|b| **b == b'\n').count();
            RecordsError::Wrong { file: file.into(), line, message }
        }
    };
    if let Some(at) = bytes.iter().position(|b| *b == 0) {
        let message = "a NUL byte, which no text has (UTF-16, or a binary file); save it as UTF-8".into();
        return Err(wrong(at, &bytes, message));
    }
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        wrong(at, e.as_bytes(), format!("not UTF-8 (byte {:#04x}); save the file as UTF-8", e.as_bytes()[at]))
    })
}

/// What a file is that is no text, where its first bytes say so.
fn binary(bytes: &[u8]) -> Option<String> {
    const MORE: [(&[u8], &str); 5] = [
        (b"ARROW1", "an Arrow file; save the data set as Parquet or JSON lines (to_parquet, to_json)"),
        (b"%PDF", "a PDF; extract its text"),
        (b"SQLite format 3", "an SQLite database; export its rows as JSON lines or CSV"),
        (
            b"PK\x03\x04",
            "a ZIP archive (a .zip, or a spreadsheet or document of an office program); unpack or export it",
        ),
        (b"\xd0\xcf\x11\xe0", "a document of an old office program; export it as CSV or text"),
    ];
    let more = MORE.iter().find(|(magic, _)| bytes.starts_with(magic)).map(|(_, what)| (*what).to_owned());
    more.or_else(|| foreign::foreign(bytes))
}

/// The line ends that Python's `open` gives: `\n` for `\r\n` and `\r`, so that files that differ only there are the same.
#[must_use]
pub fn plain_line_ends(text: String) -> String {
    if text.contains('\r') { text.replace("\r\n", "\n").replace('\r', "\n") } else { text }
}

/// A file as text, whatever it holds, with `\n` at the ends of lines.
///
/// # Errors
/// As [`bytes`] and [`decode`].
pub fn read_text(path: &Path) -> Result<String, RecordsError> {
    Ok(plain_line_ends(decode(&path.display().to_string(), bytes(path)?)?))
}

/// A file that is one value in JSON.
///
/// # Errors
/// As [`read_text`]; with what the file is instead, where its beginning tells that, or else where it is no such value.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, RecordsError> {
    let text = read_text(path)?;
    parse_json(&text).map_err(|message| RecordsError::Unreadable { file: path.display().to_string(), message })
}

/// A text that is one value in JSON.
///
/// # Errors
/// What the text is instead, where its beginning tells that, or else what is wrong where.
pub fn parse_json<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_str(text).map_err(|e| match foreign::foreign(text.as_bytes()) {
        Some(what) => format!("it is {what}"),
        None => e.to_string(),
    })
}
