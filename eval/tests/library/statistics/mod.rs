//! What models' scores say of each other, and how sure it is.

mod compare;
mod coverage;
