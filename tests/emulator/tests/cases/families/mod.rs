//! One file per family of instructions.

use super::Case;

pub mod async_copy;
pub mod atomic;
pub mod barrier;
pub mod cluster;
pub mod control;
pub mod convert;
pub mod float;
pub mod half;
pub mod integer;
pub mod matrix;
pub mod mbarrier;
pub mod memory;
pub mod rare;
pub mod tensor;
pub mod warp;
pub mod wgmma;

/// Every family whose cases all pass.
pub fn all() -> Vec<Family> {
    vec![
        async_copy::family(),
        atomic::family(),
        barrier::family(),
        cluster::family(),
        control::family(),
        convert::family(),
        float::family(),
        half::family(),
        integer::family(),
        matrix::family(),
        mbarrier::family(),
        memory::family(),
        tensor::family(),
        warp::family(),
        wgmma::family(),
    ]
}

/// A family: its image and the cases that launch it.
pub struct Family {
    /// Stem of `kernels/instructions/<name>.ptx`.
    pub name: &'static str,
    /// The image's text where it is written from tables; `None` where the file is written by hand.
    pub text: Option<String>,
    pub cases: Vec<Case>,
}

impl Family {
    pub fn table(name: &'static str, text: String, cases: Vec<Case>) -> Family {
        Family { name, text: Some(text), cases }
    }

    pub fn by_hand(name: &'static str, cases: Vec<Case>) -> Family {
        Family { name, text: None, cases }
    }
}
