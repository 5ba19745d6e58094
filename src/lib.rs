pub mod backend;
pub mod checkpoint;
pub mod formats;
pub mod model;
pub mod quantize;
