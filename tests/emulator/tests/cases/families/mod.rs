//! One file per family of instructions.

use super::Case;

pub mod convert;
pub mod float;
pub mod half;
pub mod integer;

/// A family: the text of its image and the cases that launch it.
pub struct Family {
    /// Stem of `kernels/instructions/<name>.ptx`.
    pub name: &'static str,
    pub text: String,
    pub cases: Vec<Case>,
}

pub fn all() -> Vec<Family> {
    vec![integer::family(), float::family(), half::family(), convert::family()]
}
