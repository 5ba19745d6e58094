pub mod formats;
pub mod checkpoint;
