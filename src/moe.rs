//! The MoE layer: not here yet.
