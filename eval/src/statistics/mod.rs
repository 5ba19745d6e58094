//! Statistics of paired scores: standard errors, bootstrap intervals, tests, correction for many comparisons.
//!
//! Documents are the unit throughout: what one document (or window of text) contributes is one row, whatever number of
//! repeats or tokens it stands for, so all errors are robust to dependence within a document.

mod bootstrap;
mod distributions;
mod holm;
mod mcnemar;
mod permutation;
mod random;
mod sample;

pub use bootstrap::{Resamples, Smoothing, interval, resample};
pub use distributions::{normal_cdf, student_quantile};
pub use holm::holm;
pub use mcnemar::mcnemar;
pub use permutation::paired_permutation;
pub use random::Random;
pub use sample::{Sample, mean_and_standard_error};
