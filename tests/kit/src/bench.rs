//! What a bench declares beside its time: FLOP and bytes, by formula.

/// The work of one call, by the formulas of the operation's documentation.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// Floating-point operations; a multiply-add counts two.
    pub flop: u64,
    /// Bytes that must move: each input read once, each output written once.
    pub bytes: u64,
}

impl Cost {
    /// A label for a bench: the shape with its FLOP and bytes.
    pub fn label(&self, shape: impl std::fmt::Display) -> String {
        format!("{shape} ({:.3e} FLOP, {:.3e} B)", self.flop as f64, self.bytes as f64)
    }
}
