//! Parquet, where the feature is there.

use std::path::Path;

use serde_json::Value;

use super::RecordsError;

/// What a Parquet file begins with.
pub(super) const MAGIC: &[u8] = b"PAR1";

#[cfg(not(feature = "parquet"))]
pub(super) fn read(path: &Path) -> Result<Vec<Value>, RecordsError> {
    let message =
        "this program was built without the feature `parquet`; build it with that, or convert the file to JSON lines";
    Err(RecordsError::Unreadable { file: path.display().to_string(), message: message.into() })
}

#[cfg(feature = "parquet")]
pub(super) fn read(path: &Path) -> Result<Vec<Value>, RecordsError> {
    use ::parquet::file::reader::{FileReader, SerializedFileReader};
    let fail = |message: String| RecordsError::Unreadable { file: path.display().to_string(), message };
    if path == Path::new(super::STDIN) {
        return Err(fail("Parquet cannot be read from standard input; give it as a file".into()));
    }
    let file = std::fs::File::open(path).map_err(|source| RecordsError::Read { path: path.into(), source })?;
    let reader = SerializedFileReader::new(file).map_err(|e| fail(format!("not a Parquet file: {e}")))?;
    let rows = reader.get_row_iter(None).map_err(|e| fail(e.to_string()))?;
    let value = |(i, row): (usize, Result<::parquet::record::Row, _>)| {
        row.map(|r| r.to_json_value()).map_err(|e| fail(format!("row {} cannot be read: {e}", i + 1)))
    };
    rows.enumerate().map(value).collect()
}
