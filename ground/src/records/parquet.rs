//! Parquet, where the feature is there.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use serde_json::Value;

use super::RecordsError;
use super::raw::{GZIP, ZSTANDARD};
use crate::foreign;

/// What a Parquet file begins with.
pub(super) const MAGIC: &[u8] = b"PAR1";

/// The rows of a Parquet file.
pub(super) fn read(path: &Path) -> Result<Vec<Value>, RecordsError> {
    let fail = |message: String| RecordsError::Unreadable { file: path.display().to_string(), message };
    if path == Path::new(super::STDIN) {
        return Err(fail("Parquet cannot be read from standard input; give it as a file".into()));
    }
    let mut head = Vec::new();
    let read = File::open(path).and_then(|file| file.take(foreign::LOOK as u64).read_to_end(&mut head));
    read.map_err(|source| RecordsError::Read { path: path.into(), source })?;
    if head.starts_with(GZIP) || head.starts_with(ZSTANDARD) {
        let message = "a Parquet file is compressed by itself and is not read out of gzip or Zstandard; unpack it";
        return Err(fail(message.into()));
    }
    if !head.starts_with(MAGIC) {
        let what = foreign::foreign(&head).map_or("it begins otherwise".into(), |what| format!("it is {what}"));
        return Err(fail(format!("not a Parquet file: {what}")));
    }
    rows(path, &fail)
}

#[cfg(not(feature = "parquet"))]
fn rows(_: &Path, fail: &dyn Fn(String) -> RecordsError) -> Result<Vec<Value>, RecordsError> {
    let message =
        "this program was built without the feature `parquet`; build it with that, or convert the file to JSON lines";
    Err(fail(message.into()))
}

#[cfg(feature = "parquet")]
fn rows(path: &Path, fail: &dyn Fn(String) -> RecordsError) -> Result<Vec<Value>, RecordsError> {
    use ::parquet::file::reader::{FileReader, SerializedFileReader};
    let file = File::open(path).map_err(|source| RecordsError::Read { path: path.into(), source })?;
    let reader = SerializedFileReader::new(file).map_err(|e| fail(format!("not a Parquet file: {e}")))?;
    let rows = reader.get_row_iter(None).map_err(|e| fail(e.to_string()))?;
    let value = |(i, row): (usize, Result<::parquet::record::Row, _>)| {
        row.map(|r| r.to_json_value()).map_err(|e| fail(format!("row {} cannot be read: {e}", i + 1)))
    };
    rows.enumerate().map(value).collect()
}
