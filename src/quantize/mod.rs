//! Post-training quantization: calibrate, encode, export in a dialect that other engines load.

mod apply;
pub mod auto;
pub mod calibrate;
pub mod convert;
pub mod dequantize;
mod describe;
mod encode;
mod error;
mod export;
pub mod gptq;
mod layerwise;
mod linalg;
pub mod random_model;
pub mod recipe;
mod refine;
pub mod rotate;
pub mod smooth;
mod space;
mod text;

pub use crate::formats::scheme::Scheme;
pub use apply::{Found, Made, Places, apply, apply_once, find_share};
pub use error::QuantizeError;
pub use export::{Report, quantize};
pub use recipe::Recipe;
pub use text::{Amount, CalibrationText};
